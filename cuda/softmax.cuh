// What makes the softmax of a row of logits, by a block.
#pragma once

#include "common.cuh"

// Logits of a row that a thread has under way: there are few rows, and rows are long.
constexpr int AHEAD = 8;

struct SoftmaxRoom {
    float tops[WARP], sums[WARP];
};

// The highest logit, and ln of the sum of exp(logit - highest).
struct LogSum {
    float top, ln;
    bool number; // false with a NaN or +inf, or nothing but -inf
};

// In one pass, the same in all threads; a NaN stays in the sum.
__device__ inline LogSum log_sum(const float* row, uint32_t vocab, SoftmaxRoom& room) {
    float top = -INF, sum = 0;
    const uint32_t step = blockDim.x;
    for (uint32_t at = threadIdx.x; at < vocab; at += AHEAD * step) {
        float x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) x[i] = at + i * step < vocab ? row[at + i * step] : -INF;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (x[i] > top) {
                sum = sum * expf(top - x[i]) + 1;
                top = x[i];
            } else if (!(x[i] == -INF)) {
                sum += expf(x[i] - top);
            }
        }
    }
    const float warp_top = warp_max(top);
    if (threadIdx.x % WARP == 0) room.tops[threadIdx.x / WARP] = warp_top;
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    const float highest = warp_max(lane < (int)blockDim.x / WARP ? room.tops[lane] : -INF);
    sum = block_sum(top == -INF && sum == 0 ? 0 : sum * expf(top - highest), room.sums);
    return {highest, logf(sum), highest > -INF && highest < INF && sum == sum};
}
