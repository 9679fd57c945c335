// Kernels without faults; tests/emulator.rs knows what they must write.
#include "../../common.cuh"

struct TestArgs {
    const void* x;
    void* out;
    uint32_t n;
};

// out[block] = the sum of the block's share of x.
KERNEL(emu_block_sum, TestArgs, 1024) {
    __shared__ float room[WARP];
    float sum = 0;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += gridDim.x * blockDim.x)
        sum += ((const float*)args.x)[i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) ((float*)args.out)[blockIdx.x] = sum;
}

// out[i] = x[0] + ... + x[i], by one block that takes blockDim numbers at a time.
KERNEL(emu_scan, TestArgs, 1024) {
    extern __shared__ uint4 dynamic[];
    uint32_t* const sums = (uint32_t*)dynamic; // [warps]
    const uint32_t* x = (const uint32_t*)args.x;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    uint32_t before = 0;
    for (uint32_t begin = 0; begin < args.n; begin += blockDim.x) {
        const uint32_t i = begin + threadIdx.x;
        uint32_t sum = i < args.n ? x[i] : 0;
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const uint32_t other = __shfl_up_sync(FULL, sum, lanes);
            if (lane >= lanes) sum += other;
        }
        if (lane == WARP - 1) sums[warp] = sum;
        __syncthreads();
        uint32_t all = 0;
        for (int w = 0; w < warps; w++) {
            if (w == warp) sum += all;
            all += sums[w];
        }
        if (i < args.n) ((uint32_t*)args.out)[i] = before + sum;
        before += all;
        __syncthreads();
    }
}

// What each lane of one warp receives, for lane i with the number 100 + i: [op, lane].
KERNEL(emu_lanes, TestArgs, 32) {
    const int lane = threadIdx.x;
    const uint32_t x = 100 + lane;
    uint32_t* out = (uint32_t*)args.out + lane;
    const auto put = [&](uint32_t value) { *out = value, out += WARP; };
    put(__shfl_sync(FULL, x, 5));
    put(__shfl_sync(FULL, x, lane + 1, 8));
    put(__shfl_xor_sync(FULL, x, 3));
    put(__shfl_xor_sync(FULL, x, 16, 16));
    put(__shfl_up_sync(FULL, x, 2));
    put(__shfl_up_sync(FULL, x, 2, 4));
    put(__shfl_down_sync(FULL, x, 2));
    put(__shfl_down_sync(FULL, x, 2, 4));
    put(uint32_t(__shfl_sync(FULL, (unsigned long long)x << 32, 1) >> 32));
    put(__ballot_sync(FULL, lane % 3 == 0));
    put(__any_sync(FULL, lane == 7));
    put(__all_sync(FULL, lane != 7));
    put(__reduce_add_sync(FULL, x));
    put(__reduce_max_sync(FULL, x));
    // Two parts of the warp, each with a mask of its own.
    if (lane < 12) put(__reduce_add_sync(0x00000fff, x));
    else put(__reduce_add_sync(0xfffff000, x));
}

// Exited threads are not waited for. out[t] = how many came to the barrier with odd t, whether any was 1, whether all
// were.
KERNEL(emu_votes, TestArgs, 1024) {
    if (threadIdx.x % 4 == 3) return;
    int* out = (int*)args.out + 3 * threadIdx.x;
    out[0] = __syncthreads_count(threadIdx.x % 2);
    out[1] = __syncthreads_or(threadIdx.x == 1);
    out[2] = __syncthreads_and(threadIdx.x % 4 != 3);
}

// Over a grid of three dimensions: out[0] += 1, out[1] = max(global index), out[2]: bits, out[3]: wraps at n.
KERNEL(emu_atomics, TestArgs, 256) {
    uint32_t* out = (uint32_t*)args.out;
    const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    atomicAdd(&out[0], 1);
    atomicMax(&out[1], block * blockDim.x + threadIdx.x);
    atomicOr(&out[2], 1u << threadIdx.x % 32);
    atomicInc(&out[3], args.n);
    atomicAdd((float*)&out[4], 0.5f);
    if (atomicCAS(&out[5], 0u, 1u) == 0) atomicExch(&out[6], 7u);
}

// out[i] = bits of x[i] as f16 and bf16, and both as f32 again.
KERNEL(emu_convert, TestArgs, 256) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.n) return;
    const float x = ((const float*)args.x)[i];
    const f16 a = from_f32<f16>(x);
    const bf16 b = from_f32<bf16>(x);
    ((uint4*)args.out)[i] =
        make_uint4(pack<f16>(x, 0) | uint32_t(a.bits) << 16, pack<bf16>(x, 0) | uint32_t(b.bits) << 16,
                   __float_as_uint(to_f32(a)), __float_as_uint(to_f32(b)));
}

// Four 8x8 matrices, x, by load_matrices: out[0..32) as they are, out[32..64) transposed, a uint4 a lane.
KERNEL(emu_matrices, TestArgs, 32) {
    __shared__ alignas(16) uint16_t rows[32][8];
    const int lane = threadIdx.x;
    *(uint4*)rows[lane] = ((const uint4*)args.x)[lane];
    __syncwarp();
    uint32_t r[4];
    load_matrices(r, rows[lane]);
    ((uint4*)args.out)[lane] = make_uint4(r[0], r[1], r[2], r[3]);
    load_matrices_transposed(r, rows[lane]);
    ((uint4*)args.out)[WARP + lane] = make_uint4(r[0], r[1], r[2], r[3]);
}

// out[16, 8] = x[16, 16] . y[16, 8], y behind x; the fragments picked one number at a time.
template <class T> __device__ void multiply_once(const TestArgs& args) {
    const T *x = (const T*)args.x, *y = x + 256;
    float* out = (float*)args.out;
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++) {
        const T* from = x + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
        a[i] = from[0].bits | uint32_t(from[1].bits) << 16;
    }
    for (int i = 0; i < 2; i++)
        b[i] = y[(2 * t + 8 * i) * 8 + g].bits | uint32_t(y[(2 * t + 8 * i + 1) * 8 + g].bits) << 16;
    float d[4] = {1, 1, 1, 1};
    multiply_add<T>(d, a, b);
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i] - 1;
}
KERNEL(emu_multiply_f16, TestArgs, 32) { multiply_once<f16>(args); }
KERNEL(emu_multiply_bf16, TestArgs, 32) { multiply_once<bf16>(args); }

// out[n, n] = x . y^T, x and y [n, n], y behind x, n a multiple of 64. A block makes 64 x 64 numbers with four warps,
// each 16 rows, and copies the next 32 columns of x and y while it multiplies the last.
KERNEL(emu_gemm_bf16, TestArgs, 128) {
    constexpr int DEPTH = 32, PITCH = DEPTH + 8;
    extern __shared__ uint4 dynamic[];
    bf16* const tiles = (bf16*)dynamic; // [2 buffers, x and y, 64, PITCH]
    const bf16 *x = (const bf16*)args.x, *y = x + args.n * args.n;
    const uint32_t n = args.n;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const auto tile = [&](int buffer, int which) { return tiles + (buffer * 2 + which) * 64 * PITCH; };
    const auto fetch = [&](int buffer, uint32_t column) {
        for (int i = threadIdx.x; i < 64 * DEPTH / 8; i += blockDim.x) {
            const int row = i / (DEPTH / 8), at = i % (DEPTH / 8) * 8;
            copy_async(tile(buffer, 0) + row * PITCH + at, x + (blockIdx.y * 64 + row) * n + column + at);
            copy_async(tile(buffer, 1) + row * PITCH + at, y + (blockIdx.x * 64 + row) * n + column + at);
        }
        copy_commit();
    };
    float d[8][4] = {};
    fetch(0, 0);
    for (uint32_t column = 0, buffer = 0; column < n; column += DEPTH, buffer ^= 1) {
        if (column + DEPTH < n) fetch(buffer ^ 1, column + DEPTH);
        else copy_commit();
        copy_wait<1>();
        __syncthreads();
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t a[4];
            load_matrices(a, tile(buffer, 0) + (warp * 16 + lane % 16) * PITCH + k + lane / 16 * 8);
            for (int j = 0; j < 4; j++) {
                uint32_t b[4];
                load_matrices(b, tile(buffer, 1) + (j * 16 + lane % 8 + lane / 16 * 8) * PITCH + k + lane / 8 % 2 * 8);
                multiply_add<bf16>(d[2 * j], a, {b[0], b[1]});
                multiply_add<bf16>(d[2 * j + 1], a, {b[2], b[3]});
            }
        }
        __syncthreads();
    }
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++) {
            const uint32_t row = blockIdx.y * 64 + warp * 16 + g + i / 2 * 8,
                           to = blockIdx.x * 64 + j * 8 + 2 * t + i % 2;
            ((float*)args.out)[row * n + to] = d[j][i];
        }
}
