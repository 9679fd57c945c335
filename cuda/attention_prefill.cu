// Flash attention of many query rows (Dao, arXiv 2307.08691) over paged K/V by row ranges.
//
// Launch, with R = PREFILL_ROWS = 64, for f32 PREFILL_F32_ROWS = 32:
//   grid (ceil(bound * heads / kv_heads / R), kv_heads), 128 threads,
//   dynamic shared memory PREFILL_SHARED<HD>, for f32 prefill_f32_shared(head_dim), of which 99 KiB is the most.
// HD is the least of 32, 64, 80, 96, 128, 256 that is not below head_dim; what stands beyond head_dim is zero.

#include "prefill.cuh"
#include "tile_f32.cuh"

namespace {

// sums.out += weights . V. `values`: the lane's part of V for load_matrices_transposed.
template <class T, int HD, int N>
__device__ inline void add_values(Sums<HD>& sums, const float (&weights)[N][4], const T* values) {
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[4];
        pack_weights<T>(a, weights[2 * k], weights[2 * k + 1]);
#pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            uint32_t b[4];
            load_matrices_transposed(b, values + k * 16 * PREFILL_LINE<HD> + i * 16);
            multiply_add<T>(sums.out[2 * i], a, {b[0], b[1]});
            multiply_add<T>(sums.out[2 * i + 1], a, {b[2], b[3]});
        }
    }
}

// The same by one K/V row at a time, which goes to the queries that see it only.
template <class T, int HD, int N>
__device__ inline void add_values_apart(Sums<HD>& sums, const float (&weights)[N][4], const T* values, uint32_t key,
                                        Seen low, Seen high) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[4];
        pack_weights<T>(a, weights[2 * k], weights[2 * k + 1]);
#pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            uint32_t b[4];
            load_matrices_transposed(b, values + k * 16 * PREFILL_LINE<HD> + i * 16);
#pragma unroll 1
            for (int row = 0; row < 16; row++) {
                // The thread's words of b hold rows 2t, 2t + 1 and 2t + 8, 2t + 9.
                const uint32_t half = t == row % 8 / 2 ? (row % 2 ? 0xffff0000 : 0x0000ffff) : 0;
                const uint32_t upper = row < 8 ? half : 0, lower = row < 8 ? 0 : half;
                const bool sees_low = low(key + 16 * k + row), sees_high = high(key + 16 * k + row);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    multiply_add<T>(part, a, {b[2 * j] & upper, b[2 * j + 1] & lower});
                    float(&out)[4] = sums.out[2 * i + j];
                    out[0] += sees_low ? part[0] : 0.0f, out[1] += sees_low ? part[1] : 0.0f;
                    out[2] += sees_high ? part[2] : 0.0f, out[3] += sees_high ? part[3] : 0.0f;
                }
            }
        }
    }
}

template <class T, int HD> __device__ void prefill(const AttendArgs& args) {
    constexpr int KEYS = PREFILL_KEYS<HD>, LINE = PREFILL_LINE<HD>, STEPS = HD / 16, UNITS = HD / 8;
    constexpr bool HOLD = HOLDS_QUERIES<HD>;
    constexpr int PLANE = KEYS * LINE; // K or V of a tile
    extern __shared__ uint4 shared[];
    T* const tiles = (T*)shared; // [stage, K or V, KEYS, LINE]
    T* const queries = tiles + (HOLD ? 2 : 4) * PLANE;
    Share share;
    if (!share.take<PREFILL_ROWS>(args)) return;
    if (threadIdx.x < WARP) share.note(args);

    // Threads that copy a row, at least one for each of its units; the rows of one go.
    constexpr int LANES = UNITS <= 4 ? 4 : UNITS <= 8 ? 8 : UNITS <= 16 ? 16 : 32, ROWS = ATTEND_THREADS / LANES;
    const uint32_t row0 = threadIdx.x / LANES, column = threadIdx.x % LANES * 8;
    const KvLayer& kv = args.kv;
    const float scale2 = args.scale * LOG2E;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const uint32_t packed = share.packed + 16 * warp;
    // The lane's row of the four 8x8 matrices of a 16x16 one: the lower left one comes second, for K the upper right
    // one.
    const int by_rows = (lane & 15) * LINE + lane / 16 * 8;
    const int by_columns = (lane / 16 * 8 + lane % 8) * LINE + (lane & 8);

#pragma unroll
    for (int row = row0; row < PREFILL_ROWS; row += ROWS) {
        if (column >= HD) break;
        const uint32_t p = share.packed + row;
        const bool valid = p < share.limit && column < kv.head_dim;
        T* const to = queries + row * LINE + column;
        if (args.type == TYPE<T>) copy_async(to, (const T*)args.q + share.at(args, p) + column, valid);
        else *(uint4*)to = valid ? load_query<T>(args, share.at(args, p) + column) : make_uint4(0, 0, 0, 0);
    }
    copy_commit();
    uint32_t q[STEPS][4];
    const auto load_queries = [&](int k) { load_matrices(q[k], queries + 16 * warp * LINE + by_rows + k * 16); };
    // 16 bytes a thread go to shared memory, LANES threads a row; zeros for K/V rows that no query sees, which may
    // never have been written, and for columns beyond head_dim.
    const auto load_tile = [&](const Tile& tile, int stage) {
        if (column >= HD) return;
        const T* const from = key_at<T>(kv, tile.slot, blockIdx.y, tile.key) + column;
        T* const to = tiles + stage * 2 * PLANE + row0 * LINE + column;
        const uint32_t seen = column < kv.head_dim ? tile.last - tile.first : 0;
#pragma unroll
        for (int row = 0; row < KEYS; row += ROWS) {
            const bool valid = tile.key + row0 + row - tile.first < seen;
            copy_async(to + row * LINE, from + (row0 + row) * kv.head_dim, valid);
            copy_async(to + PLANE + row * LINE, from + (KV_PAGE + row0 + row) * kv.head_dim, valid);
        }
    };

    Sums<HD> sums;
    // A sum that is no number may come from a NaN or an infinity in V that its query does not see: 0 * NaN. Then,
    // rarely, the tile is done again, and where not all queries see all K/V rows these are added one by one.
    for (bool apart = false;; apart = true) {
        sums.clear();
        Tile tile = Tile::before(share.packed / share.group);
        bool more = tile.next<KEYS>(args, share.rows_end);
        if (more) load_tile(tile, 0);
        copy_commit();
        if (HOLD && !apart) {
            copy_wait<1>();
            __syncthreads();
#pragma unroll
            for (int k = 0; k < STEPS; k++) load_queries(k);
        }
        View view;
        bool fresh = true;
        for (int stage = 0; more; stage ^= 1) {
            Tile next = tile;
            const bool follows = next.next<KEYS>(args, share.rows_end);
            copy_wait<0>();
            __syncthreads(); // this tile is there, and nobody is at the one before
            if (follows) load_tile(next, stage ^ 1);
            copy_commit();
            if (fresh) view = View::of<16>(args, share, tile, packed);
            if (view.some<KEYS>(tile.key)) {
                const T* const keys = tiles + stage * 2 * PLANE;
                float scores[KEYS / 8][4] = {};
#pragma unroll
                for (int k = 0; k < STEPS; k++) {
                    if (!HOLD) load_queries(k);
#pragma unroll
                    for (int i = 0; i < KEYS / 16; i++) {
                        uint32_t b[4];
                        load_matrices(b, keys + i * 16 * LINE + by_columns + k * 16);
                        multiply_add<T>(scores[2 * i], q[k], {b[0], b[1]});
                        multiply_add<T>(scores[2 * i + 1], q[k], {b[2], b[3]});
                    }
                }
                const bool whole = view.all<KEYS>(tile.key);
                Seen seen[2];
                if (!whole) {
                    for (int r = 0; r < 2; r++) seen[r] = Seen::of(args, share, tile, packed + g + 8 * r);
                    hide(scores, seen, tile.key);
                }
                float shrink[2];
                soften(scores, sums, scale2, shrink);
                sums.rescale(shrink);
                const T* const values = keys + PLANE + by_rows;
                if (apart && !whole) add_values_apart<T, HD>(sums, scores, values, tile.key, seen[0], seen[1]);
                else add_values<T, HD>(sums, scores, values);
            }
            fresh = next.begin != tile.begin;
            tile = next, more = follows;
        }
        if (!__syncthreads_or(!sums.finite()) || apart) break;
    }

    // Rows leave by way of shared memory, 16 bytes a thread, each warp's on its own.
    T* const own = tiles + 16 * warp * LINE;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float inverse = sums.inverse(r);
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const float lo = sums.out[i][2 * r] * inverse, hi = sums.out[i][2 * r + 1] * inverse;
            *(uint32_t*)(own + (g + 8 * r) * LINE + 8 * i + 2 * t) = pack<T>(lo, hi);
        }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 16 * UNITS / WARP; j++) {
        const uint32_t i = lane + j * WARP, row = i / UNITS, column = i % UNITS * 8;
        if (packed + row >= share.limit || column >= kv.head_dim) continue;
        store_sums<T>(args, share.at(args, packed + row) + column, *(const uint4*)(own + row * LINE + column));
    }
}

// Plain f32 arithmetic, for any head_dim up to 256; see tile_f32.cuh. In the second product a thread takes columns
// 4 * (thread % 16) of every 64. With OWN rows also attend to K and V of their own, [rows, kv_heads, head_dim] each.
template <bool OWN> __device__ void prefill_f32(const AttendArgs& args, const float* own_k, const float* own_v) {
    constexpr int KEYS = PREFILL_F32_KEYS, ROWS = PREFILL_F32_ROWS;
    extern __shared__ uint4 shared[];
    const uint32_t head_dim = args.kv.head_dim, line = line_f32(head_dim);
    float* const queries = (float*)shared;
    float* const tile_room = queries + ROWS * line; // K, then V
    float* const weights = tile_room + KEYS * line; // of a K/V row that a query does not see: negative
    Share share;
    if (!share.take<ROWS>(args)) return;
    if (threadIdx.x < WARP) {
        if (OWN) share.note_apart(args);
        else share.note(args);
    }

    const float scale2 = args.scale * LOG2E;
    const int row0 = threadIdx.x / 16 * 4, x = threadIdx.x % 16;
    copy_tile<ROWS>(queries, head_dim, [&](uint32_t row) { return share.line(args, (const float*)args.q, row); });
    Tile tile = Tile::before(share.packed / share.group);
    const auto copy_rows = [&](const float* from) {
        copy_tile<KEYS>(tile_room, head_dim, [&](uint32_t row) {
            return Line{from + row * head_dim, tile.key + row - tile.first < tile.last - tile.first};
        });
        copy_commit();
        copy_wait<0>();
    };
    float out[4][4][4] = {}, top[4] = {-INF, -INF, -INF, -INF}, total[4] = {};
    if (OWN) {
        copy_commit();
        copy_wait<0>();
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const uint32_t p = share.packed + row0 + r;
            if (p < share.limit) {
                const size_t own = ((size_t)(p / share.group) * args.kv.kv_heads + blockIdx.y) * head_dim;
                top[r] = 0.0f;
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    const uint32_t column = 64 * part + 4 * x;
                    if (column >= head_dim) continue;
                    const float4 q = *(const float4*)(queries + (row0 + r) * line + column);
                    const float4 k = *(const float4*)(own_k + own + column), v = *(const float4*)(own_v + own + column);
                    top[r] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
                    out[r][part][0] = v.x, out[r][part][1] = v.y, out[r][part][2] = v.z, out[r][part][3] = v.w;
                }
                total[r] = x == 0; // which is a sum over 16 threads
            }
            sum_of_16(top[r]);
        }
    }
    while (tile.next<KEYS>(args, share.rows_end)) {
        const float* const keys = key_at<float>(args.kv, tile.slot, blockIdx.y, tile.key);
        __syncthreads(); // nobody is at the V before
        copy_rows(keys);
        __syncthreads();
        float scores[4][2];
        multiply_f32(scores, queries, tile_room, head_dim);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const Seen seen = Seen::of(args, share, tile, share.packed + row0 + r);
            const bool sees[2] = {seen(tile.key + x), seen(tile.key + x + 16)};
            const float shrink = soften_f32(scores[r], sees, top[r], total[r], scale2);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                weights[(row0 + r) * PREFILL_F32_WEIGHTS + x + 16 * j] = sees[j] ? scores[r][j] : -1.0f;
            }
#pragma unroll
            for (int i = 0; i < 16; i++) out[r][i / 4][i % 4] *= shrink;
        }
        __syncthreads(); // weights are there, and nobody is at K
        copy_rows(keys + KV_PAGE * head_dim);
        __syncthreads();
        for (int key = 0; key < KEYS; key++) {
            float weight[4];
#pragma unroll
            for (int r = 0; r < 4; r++) weight[r] = weights[(row0 + r) * PREFILL_F32_WEIGHTS + key];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const uint32_t column = 64 * part + 4 * x;
                if (column >= head_dim) continue;
                const float4 v = *(const float4*)(tile_room + key * line + column);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    if (weight[r] < 0.0f) continue;
                    float(&o)[4] = out[r][part];
                    o[0] = fmaf(weight[r], v.x, o[0]), o[1] = fmaf(weight[r], v.y, o[1]);
                    o[2] = fmaf(weight[r], v.z, o[2]), o[3] = fmaf(weight[r], v.w, o[3]);
                }
            }
        }
    }
    copy_wait<0>(); // the queries of a tile that sees nothing
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) total[r] += __shfl_xor_sync(FULL, total[r], lanes);
        const float inverse = 1.0f / total[r];
        const uint32_t p = share.packed + row0 + r;
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const uint32_t column = 64 * part + 4 * x;
            if (p >= share.limit || column >= head_dim) continue;
            const float(&o)[4] = out[r][part];
            *(float4*)((float*)args.out + share.at(args, p) + column) =
                make_float4(o[0] * inverse, o[1] * inverse, o[2] * inverse, o[3] * inverse);
        }
    }
}

} // namespace

#define PREFILL(HD) \
    KERNEL(attend_prefill_f16_##HD, AttendArgs, ATTEND_THREADS) { prefill<f16, HD>(args); } \
    KERNEL(attend_prefill_bf16_##HD, AttendArgs, ATTEND_THREADS) { prefill<bf16, HD>(args); }

PREFILL(32)
PREFILL(64)
PREFILL(80)
PREFILL(96)
PREFILL(128)
PREFILL(256)
KERNEL(attend_prefill_f32, AttendArgs, ATTEND_THREADS) { prefill_f32<false>(args, nullptr, nullptr); }
KERNEL(attend_apart, AttendApartArgs, ATTEND_THREADS) { prefill_f32<true>(args.attend, args.k, args.v); }
