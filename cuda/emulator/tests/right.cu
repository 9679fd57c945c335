#include "../../common.cuh"

struct SumArgs {
    const float *x;
    float *out;
    uint32_t n;
};

// out[block] = the sum of the block's share of x.
KERNEL(emu_block_sum, SumArgs, 1024) {
    __shared__ float room[WARP];
    float sum = 0;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += gridDim.x * blockDim.x) sum += args.x[i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) args.out[blockIdx.x] = sum;
}
