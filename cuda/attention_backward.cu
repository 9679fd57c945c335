// Flash attention backward (Dao, arXiv 2307.08691) over paged K/V by row ranges, in plain f32 arithmetic: tile_f32.cuh.
//
// A block of attend_backward_q takes packed query rows, see prefill.cuh. It walks their K/V once for the softmax, which it
// leaves behind for the other kernel, and once for dQ. A block of attend_backward_kv takes K/V rows and walks the query
// heads that see some of them. So every sum belongs to one thread and has one order: the same bits each time, without
// atomics. Scores are computed three times. Where forward attention kept its softmax they would be two, of 8 products in all
// 7; but then each op that attends would have to write it, in every backend, for training alone.
//
// Launch, with R = BACKWARD_ROWS = 32, HD the least of 64, 128, 256 that is not below head_dim:
//   attend_backward_q_HD:  grid (ceil(rows * heads / kv_heads / R), kv_heads)
//   attend_backward_kv_HD: grid (ceil(kv_rows / R) + slots, kv_heads), behind it
//   128 threads, dynamic shared memory as below, 88,320 bytes at most.

#include "tile_f32.cuh"

namespace {

constexpr int BACKWARD_ROWS = 32;
// Rows of the other tile, which walks by; each has 4 more numbers in a tile of weights.
template <int HD> constexpr int OTHERS = HD > 128 ? 16 : 32;
// Q and dO of the other tile take turns where there is no room for both.
template <int HD> constexpr bool BOTH = HD <= 128;

// sums += weights . tile, by the rows of the tile that weigh something: no one else's NaN shall count.
template <int HD>
__device__ inline void add_products(float (&sums)[4][HD / 64][4], const float* weights, const float* tile, uint32_t head_dim) {
    const int row0 = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    for (int i = 0; i < OTHERS<HD>; i++) {
        float weight[4];
#pragma unroll
        for (int r = 0; r < 4; r++) weight[r] = weights[(row0 + r) * (OTHERS<HD> + 4) + i];
#pragma unroll
        for (int part = 0; part < HD / 64; part++) {
            const uint32_t column = 64 * part + 4 * x;
            if (column >= head_dim) continue;
            const float4 v = *(const float4*)(tile + i * line_f32(head_dim) + column);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                if (weight[r] == 0.0f) continue;
                float(&s)[4] = sums[r][part];
                s[0] = fmaf(weight[r], v.x, s[0]), s[1] = fmaf(weight[r], v.y, s[1]);
                s[2] = fmaf(weight[r], v.z, s[2]), s[3] = fmaf(weight[r], v.w, s[3]);
            }
        }
    }
}

// The thread's columns of a row.
template <int HD> __device__ inline void store_row(float* to, const float (&sums)[HD / 64][4], uint32_t head_dim) {
    const int x = threadIdx.x % 16;
#pragma unroll
    for (int part = 0; part < HD / 64; part++) {
        const uint32_t column = 64 * part + 4 * x;
        const float(&s)[4] = sums[part];
        if (column < head_dim) *(float4*)(to + column) = make_float4(s[0], s[1], s[2], s[3]);
    }
}

// Where the other kernel finds the query rows of a slot; and what the op did.
__device__ void note_rows_of(const AttendBackwardArgs& args, const Share& share) {
    const AttendArgs& attend = args.attend;
    const uint32_t n = count_of(attend.rows);
    if (blockIdx.y > 0 || threadIdx.x >= WARP) return;
    const unsigned long long pairs = pairs_of(attend, share.begin(), share.end());
    if (threadIdx.x == 0) note_pairs(attend.work, share.end() - share.begin(), 0, pairs);
    for (uint32_t i = share.begin() + threadIdx.x; i < share.end(); i += WARP) {
        const uint32_t slot = slot_of(attend, i);
        if (i == 0 || slot_of(attend, i - 1) != slot) args.bounds[2 * slot] = i;
        if (i + 1 == n || slot_of(attend, i + 1) != slot) args.bounds[2 * slot + 1] = i + 1;
    }
}

// Shared memory: (2 * 32 + OTHERS) rows, and one tile of weights.
template <int HD> __device__ void backward_q(const AttendBackwardArgs& args) {
    constexpr int ROWS = BACKWARD_ROWS, KEYS = OTHERS<HD>, N = KEYS / 16;
    const AttendArgs& attend = args.attend;
    extern __shared__ uint4 shared[];
    const uint32_t head_dim = attend.kv.head_dim, line = line_f32(head_dim);
    float* const queries = (float*)shared;
    float* const d_out = queries + ROWS * line;
    float* const tile_room = d_out + ROWS * line; // K or V
    float* const weights = tile_room + KEYS * line;
    Share share;
    if (!share.take<ROWS>(attend)) return;
    note_rows_of(args, share);

    const float scale2 = attend.scale * LOG2E;
    const int row0 = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    copy_tile<ROWS>(queries, head_dim, [&](uint32_t row) { return share.line(attend, (const float*)attend.q, row); });
    copy_tile<ROWS>(d_out, head_dim, [&](uint32_t row) { return share.line(attend, args.d_out, row); });
    Tile tile = Tile::before(share.packed / share.group);
    const auto copy_rows = [&](const float* from) {
        __syncthreads(); // nobody is at what stands there
        copy_tile<KEYS>(tile_room, head_dim, [&](uint32_t row) {
            return Line{from + row * head_dim, tile.key + row - tile.first < tile.last - tile.first};
        });
        copy_commit();
        copy_wait<0>();
        __syncthreads();
    };
    const auto keys_of = [&] { return key_at<float>(attend.kv, tile.slot, blockIdx.y, tile.key); };
    const auto see = [&](bool(&sees)[N], int r) {
        const Seen seen = Seen::of(attend, share, tile, share.packed + row0 + r);
#pragma unroll
        for (int j = 0; j < N; j++) sees[j] = seen(tile.key + x + 16 * j);
    };

    float top[4] = {-INF, -INF, -INF, -INF}, total[4] = {};
    while (tile.next<KEYS>(attend, share.rows_end)) {
        copy_rows(keys_of());
        float scores[4][N];
        multiply_f32(scores, queries, tile_room, head_dim);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            bool sees[N];
            see(sees, r);
            soften_f32(scores[r], sees, top[r], total[r], scale2);
        }
    }
    copy_commit();
    copy_wait<0>(); // the rows of a tile that sees nothing
    __syncthreads();
    float inverse[4], delta[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const uint32_t p = share.packed + row0 + r;
        top[r] = finite_top(top[r]);
        sum_of_16(total[r]);
        inverse[r] = 1.0f / total[r];
        delta[r] = 0.0f;
        if (p < share.limit) {
            const float* const out = (const float*)attend.out + share.at(attend, p);
#pragma unroll
            for (int part = 0; part < HD / 64; part++) {
                const uint32_t column = 64 * part + 4 * x;
                if (column >= head_dim) continue;
                const float4 o = *(const float4*)(out + column), d = *(const float4*)(d_out + (row0 + r) * line + column);
                delta[r] += o.x * d.x + o.y * d.y + o.z * d.z + o.w * d.w;
            }
        }
        sum_of_16(delta[r]);
        if (p < share.limit && x == 0) {
            ((float4*)args.stats)[share.at(attend, p) / head_dim] = make_float4(top[r], inverse[r], delta[r], 0.0f);
        }
    }

    float d_q[4][HD / 64][4] = {};
    tile = Tile::before(share.packed / share.group);
    while (tile.next<KEYS>(attend, share.rows_end)) {
        float d_weights[4][N], scores[4][N];
        copy_rows(keys_of() + KV_PAGE * head_dim);
        multiply_f32(d_weights, d_out, tile_room, head_dim);
        copy_rows(keys_of());
        multiply_f32(scores, queries, tile_room, head_dim);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            bool sees[N];
            see(sees, r);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float weight = weight_of(scores[r][j], top[r], scale2) * inverse[r];
                const float d_score = weight * (d_weights[r][j] - delta[r]) * attend.scale;
                weights[(row0 + r) * (KEYS + 4) + x + 16 * j] = sees[j] ? d_score : 0.0f;
            }
        }
        __syncwarp(); // a row's 16 threads are of one warp
        add_products<HD>(d_q, weights, tile_room, head_dim);
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const uint32_t p = share.packed + row0 + r;
        if (p < share.limit) store_row<HD>(args.d_q + share.at(attend, p), d_q[r], head_dim);
    }
}

// The first i of [low, high) for which `is` no longer holds, which it does up to there.
template <class Is> __device__ inline uint32_t end_of(uint32_t low, uint32_t high, Is is) {
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (is(middle)) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Shared memory: (2 * 32 + OTHERS) rows, with BOTH (2 * 32 + 2 * OTHERS); two tiles of weights.
template <int HD> __device__ void backward_kv(const AttendBackwardArgs& args) {
    constexpr int ROWS = BACKWARD_ROWS, QUERIES = OTHERS<HD>, N = QUERIES / 16;
    const AttendArgs& attend = args.attend;
    const KvLayer& kv = attend.kv;
    extern __shared__ uint4 shared[];
    const uint32_t head_dim = kv.head_dim, line = line_f32(head_dim), group = attend.heads / kv.kv_heads;
    float* const keys = (float*)shared;
    float* const values = keys + ROWS * line;
    float* const queries = values + ROWS * line;
    float* const d_out = BOTH<HD> ? queries + QUERIES * line : queries;
    float* const weights = d_out + QUERIES * line;
    float* const d_scores = weights + ROWS * (QUERIES + 4);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        note_rows(attend.work, 0, args.kv_start[args.slots] - args.kv_start[0]);
    }
    // The K/V rows [key, key_end) of a slot.
    uint32_t slot = 0, start = 0, count = 0, key = ROWS * blockIdx.x;
    for (; slot < args.slots; slot++) {
        start = args.kv_start[slot], count = args.kv_start[slot + 1] - start;
        if (key < count) break;
        key -= (count + ROWS - 1) / ROWS * ROWS;
    }
    if (slot == args.slots) return;
    const uint32_t key_end = min(key + ROWS, count);

    const float scale2 = attend.scale * LOG2E;
    const int row0 = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    const float* const held = key_at<float>(kv, slot, blockIdx.y, key);
    const auto row_of = [&](uint32_t row) { return Line{held + row * head_dim, key + row < key_end}; };
    copy_tile<ROWS>(keys, head_dim, row_of);
    copy_tile<ROWS>(values, head_dim, [&](uint32_t row) {
        const Line of = row_of(row);
        return Line{of.at + KV_PAGE * head_dim, of.valid};
    });
    // The query rows that see some of them: both ends of their ranges ascend.
    const uint32_t last = args.bounds[2 * slot + 1];
    const uint32_t from = end_of(args.bounds[2 * slot], last, [&](uint32_t i) { return attend.end[i] <= key; });
    const uint32_t to = end_of(from, last, [&](uint32_t i) { return attend.first[i] < key_end; });

    float d_k[4][HD / 64][4] = {}, d_v[4][HD / 64][4] = {};
    for (uint32_t packed = from * group; packed < to * group; packed += QUERIES) {
        const auto place = [&](uint32_t p) { return size_t(p / group) * attend.heads + blockIdx.y * group + p % group; };
        const auto copy_queries = [&](float* room, const void* of) {
            copy_tile<QUERIES>(room, head_dim, [&](uint32_t row) {
                const uint32_t p = packed + row, limit = to * group;
                return Line{(const float*)of + place(min(p, limit - 1)) * head_dim, p < limit};
            });
        };
        const auto exchange = [&](const void* of) {
            if (BOTH<HD>) return;
            __syncthreads(); // nobody is at what stands there
            copy_queries(queries, of);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
        };
        __syncthreads(); // nobody is at the queries before
        copy_queries(queries, attend.q);
        if (BOTH<HD>) copy_queries(d_out, args.d_out);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        float scores[4][N], d_weights[4][N];
        multiply_f32(scores, keys, queries, head_dim);
        exchange(args.d_out);
        multiply_f32(d_weights, values, d_out, head_dim);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const uint32_t p = packed + x + 16 * j;
            float4 of = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            uint32_t first = 0, end = 0;
            if (p < to * group) {
                of = ((const float4*)args.stats)[place(p)];
                first = attend.first[p / group], end = attend.end[p / group];
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const uint32_t row = key + row0 + r;
                const bool sees = row >= first && row < end;
                const float weight = sees ? weight_of(scores[r][j], of.x, scale2) * of.y : 0.0f;
                const int at = (row0 + r) * (QUERIES + 4) + x + 16 * j;
                weights[at] = weight;
                d_scores[at] = sees ? weight * (d_weights[r][j] - of.z) * attend.scale : 0.0f;
            }
        }
        __syncwarp(); // a row's 16 threads are of one warp
        add_products<HD>(d_v, weights, d_out, head_dim);
        exchange(attend.q);
        add_products<HD>(d_k, d_scores, queries, head_dim);
    }
    copy_commit();
    copy_wait<0>(); // of a tile that nobody sees
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const uint32_t row = key + row0 + r;
        if (row >= key_end) continue;
        const size_t at = (size_t(start + row) * kv.kv_heads + blockIdx.y) * head_dim;
        store_row<HD>(args.d_k + at, d_k[r], head_dim);
        store_row<HD>(args.d_v + at, d_v[r], head_dim);
    }
}

} // namespace

#define BACKWARD(HD) \
    KERNEL(attend_backward_q_##HD, AttendBackwardArgs, ATTEND_THREADS) { backward_q<HD>(args); } \
    KERNEL(attend_backward_kv_##HD, AttendBackwardArgs, ATTEND_THREADS) { backward_kv<HD>(args); }

BACKWARD(64)
BACKWARD(128)
BACKWARD(256)
