// Attention in plain f32 arithmetic, by blocks of ATTEND_THREADS: tiles of rows in shared memory and their products. A thread
// takes 4 rows of the one tile, from 4 * (thread / 16) on, with every 16th row of the other from thread % 16 on.
#pragma once

#include "prefill.cuh"

// Floats of a row in shared memory: an odd number of 16-byte units, as head_dim is a multiple of 16, so that eight rows of a
// column of units stand in different banks.
__device__ inline uint32_t line_f32(uint32_t head_dim) { return head_dim + 4; }

// Begins to copy ROWS rows; row_of(row) says which, as a Line.
template <int ROWS, class RowOf> __device__ inline void copy_tile(float* to, uint32_t head_dim, RowOf row_of) {
    for (uint32_t i = threadIdx.x; i < ROWS * head_dim / 4; i += ATTEND_THREADS) {
        const uint32_t row = i / (head_dim / 4), column = i % (head_dim / 4) * 4;
        const Line line = row_of(row);
        copy_async(to + row * line_f32(head_dim) + column, line.at + column, line.valid);
    }
}

// Products of the thread's rows of two tiles.
template <int N>
__device__ inline void multiply_f32(float (&products)[4][N], const float* a, const float* b, uint32_t head_dim) {
    const int row0 = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    const uint32_t line = line_f32(head_dim);
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int j = 0; j < N; j++) products[r][j] = 0.0f;
    }
    for (uint32_t c = 0; c < head_dim; c += 4) {
        float4 v[N];
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = *(const float4*)(b + (x + 16 * j) * line + c);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float4 u = *(const float4*)(a + (row0 + r) * line + c);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float& s = products[r][j];
                s = fmaf(u.x, v[j].x, s), s = fmaf(u.y, v[j].y, s);
                s = fmaf(u.z, v[j].z, s), s = fmaf(u.w, v[j].w, s);
            }
        }
    }
}

// Over the 16 threads that share rows, the same in all of them.
__device__ inline void sum_of_16(float& x) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) x += __shfl_xor_sync(FULL, x, lanes);
}

// Turns the scores of a row into weights, relative to the highest so far; returns by what the sums are to shrink. `total` is
// the thread's part.
template <int N>
__device__ inline float soften_f32(float (&scores)[N], const bool (&sees)[N], float& top, float& total, float scale2) {
    float high = top;
#pragma unroll
    for (int j = 0; j < N; j++) high = fmaxf(high, sees[j] ? scores[j] : -INF);
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) high = fmaxf(high, __shfl_xor_sync(FULL, high, lanes));
    const float base = finite_top(high), shrink = weight_of(top, base, scale2);
    top = high;
    total *= shrink;
#pragma unroll
    for (int j = 0; j < N; j++) {
        scores[j] = weight_of(scores[j], base, scale2);
        if (sees[j]) total += scores[j];
    }
    return shrink;
}
