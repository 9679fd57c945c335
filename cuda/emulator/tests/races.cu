// Pairs of kernels, each with what orders its accesses and without; the lines that then race end in a mark.
#include "../../common.cuh"

struct RaceArgs {
    const float* x;
    float* out;
    uint32_t n;
};

__device__ uint32_t next_to(uint32_t thread) { return (thread + 1) % blockDim.x; }

// A shuffle in the place of __syncwarp orders no memory.
template <bool right> __device__ void through_a_warp(const RaceArgs& args) {
    __shared__ float room[32];
    room[threadIdx.x] = args.x[threadIdx.x]; // race
    if (right) __syncwarp();
    else __shfl_xor_sync(FULL, 1.0f, 1);
    args.out[threadIdx.x] = room[next_to(threadIdx.x)]; // race
}
KERNEL(emu_warp_right, RaceArgs, 32) { through_a_warp<true>(args); }
KERNEL(emu_warp_wrong, RaceArgs, 32) { through_a_warp<false>(args); }

// __syncwarp orders a warp, not the block.
template <bool right> __device__ void through_a_block(const RaceArgs& args) {
    __shared__ float room[256];
    room[threadIdx.x] = args.x[threadIdx.x]; // race
    if (right) __syncthreads();
    else __syncwarp();
    args.out[threadIdx.x] = room[next_to(threadIdx.x)]; // race
}
KERNEL(emu_block_right, RaceArgs, 256) { through_a_block<true>(args); }
KERNEL(emu_block_wrong, RaceArgs, 256) { through_a_block<false>(args); }

// The room is used again without a barrier behind its last use.
template <bool right> __device__ void twice(const RaceArgs& args) {
    __shared__ float room[256];
    float sum = 0;
    for (int round = 0; round < 2; round++) {
        room[threadIdx.x] = args.x[threadIdx.x]; // race
        __syncthreads();
        sum += room[next_to(threadIdx.x)]; // race
        if (right) __syncthreads();
    }
    args.out[threadIdx.x] = sum;
}
KERNEL(emu_twice_right, RaceArgs, 256) { twice<true>(args); }
KERNEL(emu_twice_wrong, RaceArgs, 256) { twice<false>(args); }

// load_matrices reads rows that other lanes have written.
template <bool right> __device__ void matrices(const RaceArgs& args) {
    __shared__ alignas(16) uint16_t rows[32][8];
    *(uint4*)rows[(threadIdx.x + 1) % 32] = make_uint4(0, 0, 0, 0); // race
    if (right) __syncwarp();
    uint32_t r[4];
    load_matrices(r, rows[threadIdx.x]); // race
    args.out[threadIdx.x] = r[0];
}
KERNEL(emu_matrices_right, RaceArgs, 32) { matrices<true>(args); }
KERNEL(emu_matrices_wrong, RaceArgs, 32) { matrices<false>(args); }

// A copy comes to a place that others may still read.
template <bool right> __device__ void copies(const RaceArgs& args) {
    __shared__ float4 room[256];
    room[threadIdx.x] = make_float4(0, 0, 0, 0);
    __syncthreads();
    const float before = room[next_to(threadIdx.x)].x; // race
    if (right) __syncthreads();
    copy_async(&room[threadIdx.x], args.x + 4 * threadIdx.x); // race
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    args.out[threadIdx.x] = before + room[next_to(threadIdx.x)].x;
}
KERNEL(emu_copies_right, RaceArgs, 256) { copies<true>(args); }
KERNEL(emu_copies_wrong, RaceArgs, 256) { copies<false>(args); }

// The last block adds what all have left; out[0] counts them. Fences on both sides order that.
template <bool right> __device__ void last_block(const RaceArgs& args) {
    uint32_t* const ticket = (uint32_t*)args.out;
    if (threadIdx.x == 0) args.out[2 + blockIdx.x] = args.x[blockIdx.x]; // race
    if (right) __threadfence();
    __syncthreads();
    const bool last = threadIdx.x == 0 && atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    if (!__syncthreads_or(last)) return;
    if (right) __threadfence();
    if (threadIdx.x > 0) return;
    float sum = 0;
    for (uint32_t i = 0; i < gridDim.x; i++) sum += args.out[2 + i]; // race
    args.out[1] = sum;
}
KERNEL(emu_last_right, RaceArgs, 64) { last_block<true>(args); }
KERNEL(emu_last_wrong, RaceArgs, 64) { last_block<false>(args); }

// Blocks that add to one number.
template <bool right> __device__ void common_sum(const RaceArgs& args) {
    if (threadIdx.x > 0) return;
    if (right) atomicAdd(args.out, args.x[blockIdx.x]);
    else args.out[0] += args.x[blockIdx.x]; // race
}
KERNEL(emu_sum_right, RaceArgs, 64) { common_sum<true>(args); }
KERNEL(emu_sum_wrong, RaceArgs, 64) { common_sum<false>(args); }
