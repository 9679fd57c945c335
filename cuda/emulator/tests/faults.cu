// Kernels with one fault each. Where nothing is said, out[t] is to be x[(t + 1) % blockDim]. Lines that race end in a
// mark.
#include "../../common.cuh"

struct FaultArgs {
    const float* x;
    float* out;
    uint32_t n;
};

__device__ uint32_t after(uint32_t thread) { return (thread + 1) % blockDim.x; }

KERNEL(emu_no_barrier, FaultArgs, 1024) {
    __shared__ float room[1024];
    room[threadIdx.x] = args.x[threadIdx.x];          // race
    args.out[threadIdx.x] = room[after(threadIdx.x)]; // race
}

// The second round writes before all have read the first.
KERNEL(emu_no_second_barrier, FaultArgs, 1024) {
    __shared__ float room[1024];
    for (int round = 0; round < 2; round++) {
        room[threadIdx.x] = args.x[threadIdx.x] + round; // race
        __syncthreads();
        if (round == 0) args.out[threadIdx.x] = room[after(threadIdx.x)]; // race
    }
}

// Only one warp reads, and only what another one wrote: block_sum, for example, without its barrier.
KERNEL(emu_no_barrier_in_sum, FaultArgs, 1024) {
    __shared__ float room[WARP];
    const float sum = warp_sum(args.x[threadIdx.x]);
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = sum; // race
    if (threadIdx.x == 0) {
        float all = 0;
        for (uint32_t i = 0; i < blockDim.x / WARP; i++) all += room[i]; // race
        args.out[0] = all;
    }
}

KERNEL(emu_no_syncwarp, FaultArgs, 32) {
    __shared__ float room[32];
    room[threadIdx.x] = args.x[threadIdx.x];          // race
    args.out[threadIdx.x] = room[after(threadIdx.x)]; // race
}

KERNEL(emu_divergent_barrier, FaultArgs, 1024) {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

// Half of a warp waits for a barrier, the other half for the whole warp.
KERNEL(emu_barrier_and_warp, FaultArgs, 1024) {
    if (threadIdx.x % WARP < 16) __syncthreads();
    else args.out[threadIdx.x] = __shfl_xor_sync(FULL, 1.0f, 1);
}

KERNEL(emu_exited_lane, FaultArgs, 1024) {
    if (threadIdx.x % WARP == 5) return;
    args.out[threadIdx.x] = warp_sum(1.0f);
}

KERNEL(emu_two_primitives, FaultArgs, 32) {
    if (threadIdx.x < 16) args.out[threadIdx.x] = __shfl_xor_sync(FULL, 1.0f, 1);
    else args.out[threadIdx.x] = __any_sync(FULL, 1);
}

// Thread t writes dynamic[t]; there are fewer than threads.
KERNEL(emu_dynamic_overrun, FaultArgs, 1024) {
    extern __shared__ uint4 dynamic[];
    ((float*)dynamic)[threadIdx.x] = 0;
}

KERNEL(emu_static_overrun, FaultArgs, 1024) {
    __shared__ float room[8];
    float* at = room;
    at[threadIdx.x] = 0;
}

KERNEL(emu_static_index, FaultArgs, 1024) {
    __shared__ float room[8];
    room[threadIdx.x] = 0;
}

KERNEL(emu_register_index, FaultArgs, 1024) {
    float d[4] = {};
    args.out[0] = d[threadIdx.x];
}

// Writes out[0..n].
KERNEL(emu_global_overrun, FaultArgs, 1024) {
    for (uint32_t i = threadIdx.x; i <= args.n; i += blockDim.x) args.out[i] = 0;
}

KERNEL(emu_unwritten, FaultArgs, 1024) {
    if (threadIdx.x != 3) args.out[threadIdx.x] = args.x[after(threadIdx.x)];
}

KERNEL(emu_misaligned, FaultArgs, 1024) { *(float2*)(args.out + 1) = make_float2(0, 0); }

KERNEL(emu_null, FaultArgs, 1024) { args.out[0] = ((const float*)nullptr)[args.n]; }

__device__ __attribute__((noinline)) float deep(uint32_t n) {
    volatile float room[256] = {};
    return n ? deep(n - 1) + room[n % 256] : 0;
}
KERNEL(emu_deep, FaultArgs, 1024) { args.out[0] = deep(args.n); }

// Each thread copies four numbers and takes one of those that another has copied: x[4 * ((t + 1) % blockDim)].
template <bool wait, bool barrier> __device__ void copy(const FaultArgs& args) {
    __shared__ float4 room[256];
    copy_async(&room[threadIdx.x], args.x + 4 * threadIdx.x); // race
    copy_commit();
    if (wait) copy_wait<0>();
    if (barrier) __syncthreads();
    args.out[threadIdx.x] = room[after(threadIdx.x)].x; // race
}
KERNEL(emu_no_wait, FaultArgs, 256) { copy<false, true>(args); }
KERNEL(emu_wait_without_barrier, FaultArgs, 256) { copy<true, false>(args); }
KERNEL(emu_copied, FaultArgs, 256) { copy<true, true>(args); }

// Waits, but the copy is in no group. out[t] is to be x[4 * t].
KERNEL(emu_no_commit, FaultArgs, 256) {
    __shared__ float4 room[256];
    copy_async(&room[threadIdx.x], args.x + 4 * threadIdx.x);
    copy_wait<0>();
    args.out[threadIdx.x] = room[threadIdx.x].x;
}
