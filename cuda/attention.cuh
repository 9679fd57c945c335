// What prefill and decode share: where queries and K/V stand, shared memory, the softmax, work done.
//
// Scores are kept unscaled: their differences to the maximum are exact for near ones, however large both are, and
// 2^((score - maximum) * scale * log2(e)) takes no more instructions than scaling first. It needs scale > 0.
#pragma once

#include "common.cuh"

constexpr int ATTEND_WARPS = 4;
constexpr int ATTEND_THREADS = ATTEND_WARPS * WARP;
constexpr float LOG2E = 1.44269504f;

// Tiles of attend_prefill_f16_HD and _bf16_HD: packed query rows (16 for each warp), K/V rows. The sums take HD / 2
// registers a thread; at 256 they leave room for the scores of 32 K/V rows and none for the queries.
constexpr int PREFILL_ROWS = 64;
template <int HD> constexpr int PREFILL_KEYS = HD > 128 ? 32 : 64;
template <int HD> constexpr bool HOLDS_QUERIES = HD <= 128;
// A row in shared memory: 16 bytes longer than it is, an odd number of 16-byte units, so that eight rows of a column of
// units stand in different banks.
template <int HD> constexpr int PREFILL_LINE = HD + 8;
// Bytes of shared memory: two stages of K and V; the queries, where they do not go to registers by way of stage 1.
template <int HD>
constexpr int PREFILL_SHARED = (4 * PREFILL_KEYS<HD> + (HOLDS_QUERIES<HD> ? 0 : PREFILL_ROWS)) * PREFILL_LINE<HD> * 2;

// Tiles of attend_prefill_f32, for any head_dim: queries, K or V, weights.
constexpr int PREFILL_F32_ROWS = 32;
constexpr int PREFILL_F32_KEYS = 32;
constexpr int PREFILL_F32_WEIGHTS = PREFILL_F32_KEYS + 4;
constexpr int prefill_f32_shared(int head_dim) {
    return ((PREFILL_F32_ROWS + PREFILL_F32_KEYS) * (head_dim + 4) + PREFILL_F32_ROWS * PREFILL_F32_WEIGHTS) * 4;
}

// attend_hopper_*: packed query rows of a block and its threads; two stages of K and V of 128 rows, the queries, 1 KiB for
// barriers and 1 to begin at a multiple of it.
constexpr int HOPPER_ROWS = 128;
constexpr int HOPPER_THREADS = 384;
template <int HD> constexpr int HOPPER_SHARED = (4 * 128 + HOPPER_ROWS) * HD * 2 + 2 * 1024;

// attend_decode_*: query heads of a pass over the K/V; the sums, maximum and denominator of each from each warp.
template <int HD> constexpr int DECODE_HEADS = HD > 128 ? 8 : 16;
constexpr int DECODE_F32_HEADS = 4;
constexpr int decode_shared(int head_dim, int group) {
    return ATTEND_WARPS * (group < 16 ? group : 16) * (head_dim + 2) * 4;
}
// The most blocks that share a row.
constexpr uint32_t DECODE_SPLITS = 64;
static_assert(decode_shared(16, 1) >= 4 * DECODE_SPLITS, "each head has room for the factors of its blocks");

__device__ inline uint32_t slot_of(const AttendArgs& args, uint32_t row) { return args.row_slot[args.rows.index[row]]; }

// K of a row of a sequence; V stands KV_PAGE * head_dim behind.
template <class T> __device__ inline const T* key_at(const KvLayer& kv, uint32_t slot, uint32_t head, uint32_t row) {
    const size_t page = kv.tables[size_t(slot) * kv.pages_per_seq + row / KV_PAGE];
    return (const T*)kv.data + ((page * kv.kv_heads + head) * 2 * KV_PAGE + row % KV_PAGE) * kv.head_dim;
}

// Where a query stands in q and out.
__device__ inline size_t query_at(const AttendArgs& args, uint32_t row, uint32_t head) {
    return (size_t(row) * args.heads + head) * args.kv.head_dim;
}

// Eight numbers of a query, in the type of K/V.
template <class T> __device__ inline uint4 load_query(const AttendArgs& args, size_t at) {
    if (args.type == TYPE<T>) return *(const uint4*)((const T*)args.q + at);
    float x[8];
    load8_of(args.type, x, args.q, at);
    return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
}

// The maximum of scores as something to subtract: not of none, nor of NaNs alone, whose sums shall be 0 and NaN.
__device__ inline float finite_top(float top) { return top == -INF ? 0.0f : top; }
__device__ inline float weight_of(float score, float top, float scale2) { return exp2_approx((score - top) * scale2); }

// The (query row, K/V row) pairs of the rows [from, to); called by one warp.
__device__ inline unsigned long long pairs_of(const AttendArgs& args, uint32_t from, uint32_t to) {
    unsigned long long pairs = 0;
    for (uint32_t i = from + threadIdx.x % WARP; i < to; i += WARP) pairs += args.end[i] - args.first[i];
    return warp_sum(pairs);
}
__device__ inline void note_pairs(WorkCount* work, uint32_t rows, unsigned long long kv_rows, unsigned long long pairs) {
    if (!work) return;
    const auto add = [](uint64_t& to, unsigned long long x) { atomicAdd((unsigned long long*)&to, x); };
    add(work->rows, rows);
    add(work->kv_rows, kv_rows);
    add(work->pairs, pairs);
}

// Counts the query rows [from, to) of n, as the CPU backend does; called by one warp.
__device__ inline void note_attention(const AttendArgs& args, uint32_t from, uint32_t to, uint32_t n) {
    if (!args.work) return;
    unsigned long long kv_rows = 0, pairs = 0;
    for (uint32_t i = from + threadIdx.x % WARP; i < to; i += WARP) {
        const uint32_t first = args.first[i], end = args.end[i];
        const bool follows = i > 0 && slot_of(args, i - 1) == slot_of(args, i);
        kv_rows += end - (follows ? max(first, args.end[i - 1]) : first);
        pairs += end - first;
    }
    kv_rows = warp_sum(kv_rows);
    pairs = warp_sum(pairs);
    if (threadIdx.x % WARP != 0) return;
    note_pairs(args.work, to - from, kv_rows, pairs);
    if (from > 0) return;
    const auto add = [](uint64_t& to) { atomicAdd((unsigned long long*)&to, 1ull); };
    add(args.work->row_calls);
    uint32_t i = 0; // the first row that sees something, which is row 0 unless ranges are empty
    while (i < n && args.first[i] == args.end[i]) i++;
    if (i < n) add(args.work->kv_calls);
}
