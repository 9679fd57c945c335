// Cross-entropy of rows of logits, which become their own gradient: read twice and written once, so a step keeps logits of a
// chunk of rows only.

#include "softmax.cuh"

constexpr int THREADS = 512;

KERNEL(loss_tokens, LossArgs, THREADS) {
    __shared__ SoftmaxRoom room;
    float* row = args.logits + (size_t)blockIdx.x * args.vocab;
    const LogSum of = log_sum(row, args.vocab, room);
    const uint32_t target = args.targets[blockIdx.x];
    for (uint32_t at = threadIdx.x; at < args.vocab; at += blockDim.x) {
        const float x = row[at];
        float gradient = expf(x - of.top - of.ln) * args.scale;
        if (at == target) {
            args.losses[blockIdx.x] = of.number ? of.ln - (x - of.top) : quiet_nan();
            gradient -= args.scale;
        }
        row[at] = of.number ? gradient : quiet_nan();
    }
}

KERNEL(loss_distribution, LossArgs, THREADS) {
    __shared__ SoftmaxRoom room, other_room;
    __shared__ float sums[WARP];
    float* row = args.logits + (size_t)blockIdx.x * args.vocab;
    const float* other = args.other + (size_t)blockIdx.x * args.vocab;
    const LogSum p = log_sum(row, args.vocab, room), q = log_sum(other, args.vocab, other_room);
    const bool number = p.number && q.number;
    // ln q - ln p = (other - row) - (q.top + q.ln - p.top - p.ln), whose weights, the q, sum to 1.
    float sum = 0;
    for (uint32_t at = threadIdx.x; at < args.vocab; at += blockDim.x) {
        const float x = row[at], y = other[at], weight = expf(y - q.top - q.ln);
        if (weight > 0) sum += weight * (y - x);
        row[at] = number ? (expf(x - p.top - p.ln) - weight) * args.scale : quiet_nan();
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        args.losses[blockIdx.x] = number ? sum - ((q.top - p.top) + (q.ln - p.ln)) : quiet_nan();
    }
}
