// What happens to gradients row by row: it costs the bytes it moves. A block takes a row; its threads take 8 numbers at a time.

#include "common.cuh"

constexpr int THREADS = 256;

KERNEL(norm_backward, NormBackwardArgs, THREADS) {
    __shared__ float squares[WARP], alongs[WARP];
    const uint32_t row = args.rows[blockIdx.x], step = 8 * blockDim.x;
    const float *x = args.x + (size_t)row * args.width, *d_h = args.d_h + (size_t)blockIdx.x * args.width;
    float* d_x = args.d_x + (size_t)row * args.width;
    const float d_logit = args.router ? args.d_logits[row] : 0.0f;
    // Of x / |x|, in columns from `at` on. Read twice: the second time from a cache.
    const auto gradient = [&](float(&g)[8], uint32_t at) {
        float w[8];
        load8(g, d_h + at);
        if (args.router) {
            load8(w, args.router + at);
#pragma unroll
            for (int i = 0; i < 8; i++) g[i] += d_logit * w[i];
        }
        load8(w, args.weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) g[i] *= w[i];
    };
    float square = 0, along = 0;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += step) {
        float v[8], g[8];
        load8(v, x + at);
        gradient(g, at);
#pragma unroll
        for (int i = 0; i < 8; i++) square += v[i] * v[i], along += g[i] * v[i];
    }
    const float scale = 1.0f / sqrtf(block_sum(square, squares) / args.width + args.eps);
    along = block_sum(along, alongs) * scale * scale / args.width;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += step) {
        float v[8], g[8], d[8];
        load8(v, x + at);
        gradient(g, at);
        load8(d, d_x + at);
#pragma unroll
        for (int i = 0; i < 8; i++) d[i] += scale * (g[i] - v[i] * along);
        store8(d_x + at, d);
    }
}

// A few lanes take a head, as in rope_append.cu.
KERNEL(rope_backward, RopeBackwardArgs, THREADS) {
    const uint32_t d = args.head_dim, half = d / 2, lanes = lanes_of_head(half);
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, unit = thread / lanes, at = 8 * (thread % lanes);
    const uint32_t row = unit / args.heads;
    // Nobody leaves: all lanes of a warp take part in its sums.
    const bool live = at < half && row < args.rows;
    const size_t from = (size_t)unit * d + at;
    float low[8] = {}, high[8] = {}, x_low[8] = {}, x_high[8] = {};
    float squares = 0, along = 0;
    if (live) {
        const float* angles = args.angles + (size_t)args.index[row] * d + at;
        float cosine[8], sine[8];
        load8(low, args.d + from);
        load8(high, args.d + from + half);
        load8(cosine, angles);
        load8(sine, angles + half);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float a = low[j], b = high[j];
            low[j] = a * cosine[j] + b * sine[j];
            high[j] = b * cosine[j] - a * sine[j];
        }
    }
    if (live && args.norm) {
        load8(x_low, args.src + from);
        load8(x_high, args.src + from + half);
        float w[8];
        load8(w, args.norm + at);
#pragma unroll
        for (int j = 0; j < 8; j++) low[j] *= w[j];
        load8(w, args.norm + half + at);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            high[j] *= w[j];
            squares += x_low[j] * x_low[j] + x_high[j] * x_high[j];
            along += low[j] * x_low[j] + high[j] * x_high[j];
        }
    }
    if (args.norm) {
        for (uint32_t other = lanes / 2; other > 0; other /= 2) {
            squares += __shfl_xor_sync(FULL, squares, other);
            along += __shfl_xor_sync(FULL, along, other);
        }
        const float scale = 1.0f / sqrtf(squares / d + args.eps);
        along *= scale * scale / d;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            low[j] = scale * (low[j] - x_low[j] * along);
            high[j] = scale * (high[j] - x_high[j] * along);
        }
    }
    if (!live) return;
    store8(args.d + from, low);
    store8(args.d + from + half, high);
}

KERNEL(swiglu_backward, SwiGluBackwardArgs, THREADS) {
    __shared__ float room[WARP];
    const size_t row = (size_t)blockIdx.x * args.width;
    float dot = 0;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += 8 * blockDim.x) {
        float g[8], u[8], d[8];
        load8(g, args.gate + row + at);
        load8(u, args.up + row + at);
        load8(d, args.d_act + row + at);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float share = sigmoid(g[i]), d_up = d[i] * g[i] * share;
            dot += d_up * u[i];
            g[i] = d[i] * u[i] * share * (1.0f + g[i] * (1.0f - share));
            u[i] = d_up;
        }
        store8(args.gate + row + at, g);
        store8(args.up + row + at, u);
    }
    if (!args.index) return;
    dot = block_sum(dot, room);
    if (threadIdx.x == 0) args.dots[args.index[blockIdx.x]] += dot;
}

// The thread's part of a . b.
__device__ float dot_of(const float* a, const float* b, uint32_t width) {
    float dot = 0;
    for (uint32_t at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x) {
        float x[8], y[8];
        load8(x, a + at);
        load8(y, b + at);
#pragma unroll
        for (int i = 0; i < 8; i++) dot += x[i] * y[i];
    }
    return dot;
}

KERNEL(row_dots, RowDotsArgs, THREADS) {
    __shared__ float room[WARP];
    const size_t at = (size_t)blockIdx.x * args.width;
    const uint32_t row = args.index[blockIdx.x];
    float dot = dot_of(args.a + at, args.b + at, args.width);
    if (args.bias) dot += dot_of(args.c + (size_t)row * args.bias_width, args.bias, args.bias_width);
    dot = block_sum(dot, room);
    if (threadIdx.x == 0) args.out[row] += dot;
}

// The derivative of the sigmoid.
__device__ float slope(float logit) {
    const float score = sigmoid(logit);
    return score * (1.0f - score);
}

KERNEL(gate_slopes, GateBackwardArgs, THREADS) {
    if (!args.sequences) {
        const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
        if (row < args.rows) args.d_mask[row] = (args.d_mask[row] + args.penalty) * slope(args.logits[row]);
        return;
    }
    // Long sums: in f64, as the CPU's.
    __shared__ double masks[WARP], logits[WARP];
    const uint32_t start = args.sequences[blockIdx.x], end = args.sequences[blockIdx.x + 1];
    double mask = 0, logit = 0;
    for (uint32_t row = start + threadIdx.x; row < end; row += blockDim.x) {
        mask += args.d_mask[row] + args.penalty;
        logit += args.logits[row];
    }
    mask = block_sum(mask, masks);
    logit = block_sum(logit, logits);
    const float each = (float)(mask * slope((float)(logit / (end - start))) / (end - start));
    for (uint32_t row = start + threadIdx.x; row < end; row += blockDim.x) args.d_mask[row] = each;
}

KERNEL(gate_partial, GateBackwardArgs, THREADS) {
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * GATE_ROWS;
    if (column >= args.width) return;
    float sum = 0;
    for (uint32_t row = first; row < min(first + GATE_ROWS, args.rows); row++) {
        sum += args.d_mask[row] * args.h[(size_t)row * args.width + column];
    }
    args.partial[(size_t)blockIdx.y * args.width + column] = sum;
}

KERNEL(gate_sum, GateBackwardArgs, THREADS) {
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= args.width) return;
    double sum = 0;
    for (uint32_t i = 0; i < (args.rows + GATE_ROWS - 1) / GATE_ROWS; i++) sum += args.partial[(size_t)i * args.width + column];
    args.d_router[column] = (float)(args.d_router[column] + sum);
}
