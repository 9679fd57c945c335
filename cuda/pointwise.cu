// Ops that pass over rows: what they cost is the bytes they move. A block takes a row; its threads take 8 numbers at a time.

#include "common.cuh"
#include "softmax.cuh"

constexpr int THREADS = 256;

template <class T> __device__ void embed(const EmbedArgs& args) {
    const T* row = (const T*)args.table + (size_t)args.ids[blockIdx.x] * args.width;
    float* out = args.out + (size_t)blockIdx.x * args.width;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += 8 * blockDim.x) {
        float x[8];
        load8(x, row + at);
        store8(out + at, x);
    }
}

KERNEL(embed_f32, EmbedArgs, THREADS) { embed<float>(args); }
KERNEL(embed_f16, EmbedArgs, THREADS) { embed<f16>(args); }
KERNEL(embed_bf16, EmbedArgs, THREADS) { embed<bf16>(args); }

// Angles grow to thousands of turns, where sincosf reduces them slowly and to fewer digits; once a step in f64 is cheap.
KERNEL(rope_angles, RopeAnglesArgs, THREADS) {
    float* out = args.out + (size_t)blockIdx.x * 2 * args.half;
    for (uint32_t i = threadIdx.x; i < args.half; i += blockDim.x) {
        const float angle = __fmul_rn((float)args.pos[blockIdx.x], args.inv_freq[i]);
        double sine, cosine;
        sincos((double)angle, &sine, &cosine);
        out[i] = (float)cosine;
        out[args.half + i] = (float)sine;
    }
}

// Rows of up to 8 * THREADS * CHUNKS numbers stay in registers between the sum of squares and the product.
constexpr int CHUNKS = 4;

template <class T> __device__ void norm_gate(const NormGateArgs& args) {
    const uint32_t n = count_of(args.rows);
    if (blockIdx.x == 0 && threadIdx.x == 0) note_rows(args.work, n);
    if (blockIdx.x >= n) return;
    __shared__ float squares[WARP], dots[WARP];
    const uint32_t row = args.rows.index[blockIdx.x], step = 8 * blockDim.x;
    const float* x = args.x + (size_t)row * args.width;
    T* out = (T*)args.out + (size_t)blockIdx.x * args.width;

    float held[CHUNKS][8], sum = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const uint32_t at = 8 * threadIdx.x + c * step;
        if (at >= args.width) break;
        load8(held[c], x + at);
        for (float v : held[c]) sum += v * v;
    }
    for (uint32_t at = 8 * threadIdx.x + CHUNKS * step; at < args.width; at += step) {
        float v[8];
        load8(v, x + at);
        for (float u : v) sum += u * u;
    }
    const float scale = 1.0f / sqrtf(block_sum(sum, squares) / args.width + args.eps);

    float dot = 0;
    const auto put = [&](const float(&v)[8], uint32_t at) {
        float w[8], y[8];
        load8(w, args.weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = v[i] * scale * w[i];
        if (args.out) store8(out + at, y);
        if (!args.router) return;
        load8(w, args.router + at);
#pragma unroll
        for (int i = 0; i < 8; i++) dot += y[i] * w[i];
    };
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const uint32_t at = 8 * threadIdx.x + c * step;
        if (at < args.width) put(held[c], at);
    }
    for (uint32_t at = 8 * threadIdx.x + CHUNKS * step; at < args.width; at += step) {
        float v[8];
        load8(v, x + at);
        put(v, at);
    }
    if (!args.router) return;
    dot = block_sum(dot, dots);
    if (threadIdx.x == 0) args.logits[row] = dot;
}

KERNEL(norm_gate_f32, NormGateArgs, THREADS) { norm_gate<float>(args); }
KERNEL(norm_gate_f16, NormGateArgs, THREADS) { norm_gate<f16>(args); }
KERNEL(norm_gate_bf16, NormGateArgs, THREADS) { norm_gate<bf16>(args); }

KERNEL(gather, GatherArgs, THREADS) {
    const uint4* row = (const uint4*)args.src + (size_t)(args.rows.index[blockIdx.x] - args.base) * args.width;
    uint4* out = (uint4*)args.out + (size_t)blockIdx.x * args.width;
    for (uint32_t i = threadIdx.x; i < args.width; i += blockDim.x) out[i] = row[i];
}

KERNEL(scatter, ScatterArgs, THREADS) {
    const float* src = args.src + (size_t)blockIdx.x * args.width;
    float* x = args.x + (size_t)args.rows.index[blockIdx.x] * args.width;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += 8 * blockDim.x) {
        float sum[8] = {}, term[8];
        if (args.add) load8(sum, x + at);
        load8(term, src + at);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += term[i];
        if (args.bias) {
            load8(term, args.bias + at);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += term[i];
        }
        store8(x + at, sum);
    }
}

template <class T> __device__ void silu_mul(const SiluMulArgs& args) {
    const size_t row = (size_t)blockIdx.x * args.width;
    const T *gate = (const T*)args.gate + row, *up = (const T*)args.up + row;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += 8 * blockDim.x) {
        float g[8], u[8];
        load8(g, gate + at);
        load8(u, up + at);
#pragma unroll
        for (int i = 0; i < 8; i++) g[i] = silu(g[i]) * u[i];
        store8((T*)args.out + row + at, g);
    }
}

KERNEL(silu_mul_f32, SiluMulArgs, THREADS) { silu_mul<float>(args); }
KERNEL(silu_mul_f16, SiluMulArgs, THREADS) { silu_mul<f16>(args); }
KERNEL(silu_mul_bf16, SiluMulArgs, THREADS) { silu_mul<bf16>(args); }

template <class T> __device__ void bias(const BiasArgs& args) {
    T* out = (T*)args.out + (size_t)blockIdx.x * args.width;
    for (uint32_t at = 8 * threadIdx.x; at < args.width; at += 8 * blockDim.x) {
        float sum[8] = {}, term[8];
        if (args.add) load8(sum, out + at);
        load8(term, args.bias + at);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += term[i];
        store8(out + at, sum);
    }
}

KERNEL(bias_f32, BiasArgs, THREADS) { bias<float>(args); }
KERNEL(bias_f16, BiasArgs, THREADS) { bias<f16>(args); }
KERNEL(bias_bf16, BiasArgs, THREADS) { bias<bf16>(args); }

KERNEL(logprobs, LogProbsArgs, THREADS) {
    __shared__ SoftmaxRoom room;
    const float* row = args.logits + (size_t)blockIdx.x * args.vocab;
    const LogSum of = log_sum(row, args.vocab, room);
    if (threadIdx.x == 0) {
        args.out[blockIdx.x] = of.number ? row[args.targets[blockIdx.x]] - of.top - of.ln : quiet_nan();
    }
}

// SplitMix64's output for place i. Without fused multiply-adds, as the same numbers are made elsewhere.
__device__ inline float noise_at(const NoiseArgs& args, uint64_t i) {
    uint64_t z = args.seed + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    const uint32_t bits = (uint32_t)((z ^ (z >> 31)) >> 40);
    const float unit = __fadd_rn(__fmul_rn((float)bits, 1.0f / (1 << 23)), -1.0f);
    return __fadd_rn(args.mean, __fmul_rn(args.scale, unit));
}

template <class T> __device__ void noise(const NoiseArgs& args) {
    const uint64_t step = 8ull * gridDim.x * blockDim.x;
    for (uint64_t at = 8 * ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x); at < args.n; at += step) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = noise_at(args, at + i);
        store8((T*)args.out + at, x);
    }
}

KERNEL(noise_f32, NoiseArgs, THREADS) { noise<float>(args); }
KERNEL(noise_f16, NoiseArgs, THREADS) { noise<f16>(args); }
KERNEL(noise_bf16, NoiseArgs, THREADS) { noise<bf16>(args); }

KERNEL(put_ints, PutIntsArgs, THREADS) {
    const uint32_t* run = args.runs + args.starts[blockIdx.x];
    for (uint32_t i = threadIdx.x; i < run[1]; i += blockDim.x) args.ints[run[0] + i] = run[2 + i];
}
