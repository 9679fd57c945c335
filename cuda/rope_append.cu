// q/k norm, RoPE at the original positions, and K/V into their pages, in one launch: every row is read and written once.

#include "common.cuh"

constexpr int THREADS = 256;

template <class T> __device__ void rope_append(const RopeAppendArgs& args) {
    const uint32_t q_rows = count_of(args.q_rows), kv_rows = count_of(args.kv_rows);
    if (blockIdx.x == 0 && threadIdx.x == 0) note_rows(args.work, q_rows, kv_rows);
    const KvLayer& kv = args.kv;
    const uint32_t d = kv.head_dim, half = d / 2, lanes = lanes_of_head(half);
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, unit = thread / lanes, at = 8 * (thread % lanes);
    // Heads of all query rows, then those of K, each with its V.
    const uint32_t queries = args.q_rows.bound * args.heads;
    const bool query = unit < queries;
    const uint32_t heads = query ? args.heads : kv.kv_heads;
    const uint32_t i = (query ? unit : unit - queries) / heads, head = (query ? unit : unit - queries) % heads;
    // Nobody leaves: all lanes of a warp take part in its sums.
    const bool live = at < half && i < (query ? q_rows : kv_rows);

    const size_t from = ((size_t)i * heads + head) * d + at;
    const float* norm = query ? args.q_norm : args.k_norm;
    float low[8] = {}, high[8] = {}, squares = 0;
    if (live) {
        const T* src = (query ? (const T*)args.q : (const T*)args.k) + from;
        load8(low, src);
        load8(high, src + half);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += low[j] * low[j] + high[j] * high[j];
    }
    if (args.q_norm || args.k_norm) {
        for (uint32_t other = lanes / 2; other > 0; other /= 2) squares += __shfl_xor_sync(FULL, squares, other);
    }
    if (!live) return;

    if (norm) {
        const float scale = 1.0f / sqrtf(squares / d + args.eps);
        float w[8];
        load8(w, norm + at);
#pragma unroll
        for (int j = 0; j < 8; j++) low[j] *= scale * w[j];
        load8(w, norm + half + at);
#pragma unroll
        for (int j = 0; j < 8; j++) high[j] *= scale * w[j];
    }
    const uint32_t row = query ? args.q_rows.index[i] : args.kv_rows.index[i];
    const float* angles = args.angles + (size_t)row * d + at;
    float cosine[8], sine[8];
    load8(cosine, angles);
    load8(sine, angles + half);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float a = low[j], b = high[j];
        low[j] = a * cosine[j] - b * sine[j];
        high[j] = b * cosine[j] + a * sine[j];
    }

    if (query) {
        store8((T*)args.q + from, low);
        store8((T*)args.q + from + half, high);
        return;
    }
    const uint32_t place = args.kv_row[i], slot = args.row_slot[row];
    const uint32_t page = kv.tables[(size_t)slot * kv.pages_per_seq + place / KV_PAGE];
    const size_t to = (((size_t)page * kv.kv_heads + head) * 2 * KV_PAGE + place % KV_PAGE) * d + at;
    if (head == 0 && at == 0) kv.positions[(size_t)page * KV_PAGE + place % KV_PAGE] = args.pos[row];
    store8_of(kv.type, kv.data, to, low);
    store8_of(kv.type, kv.data, to + half, high);
    load8(low, (const T*)args.v + from);
    load8(high, (const T*)args.v + from + half);
    store8_of(kv.type, kv.data, to + KV_PAGE * d, low);
    store8_of(kv.type, kv.data, to + KV_PAGE * d + half, high);
}

KERNEL(rope_append_f32, RopeAppendArgs, THREADS) { rope_append<float>(args); }
KERNEL(rope_append_f16, RopeAppendArgs, THREADS) { rope_append<f16>(args); }
KERNEL(rope_append_bf16, RopeAppendArgs, THREADS) { rope_append<bf16>(args); }
