// Flash attention of few query rows, each with K/V of its own: what counts is the bandwidth of memory.
//
// A block takes a share of the K/V rows of a query row and K/V head, for all query heads of that head at once; its
// warps take turns, 16 K/V rows at a time (f32: 4). The grid is fixed, as it is recorded, but who shares what follows
// from what stands on the device: the pages that all rows see are dealt out to args.blocks blocks, DECODE_PAGES or more
// to each. So a short row is one block's, which merges with nobody, and a long one is many blocks', also among short
// ones. Warps merge in shared memory, blocks in args.partial by the last one to end, always in the same order: the same
// input gives the same bits.
//
// Launch: grid (units, kv_heads), 128 threads, dynamic shared memory decode_shared(head_dim, heads / kv_heads). units is
// bound + ceil(blocks / kv_heads), or less where even the longest rows come to less. HD is the least of 32, 64, 80, 96,
// 128, 256 that is not below head_dim.
//
// K/V go from memory straight into the registers of the tensor cores, past the L1 cache and shared memory. 16 bytes a
// lane are 8 numbers along head_dim where mma means 2, but a sum over head_dim does not mind in which order it is
// taken, nor columns of a result where they stand in memory. There is no barrier and no copy between a load and its
// use, and a warp has HD / 8 loads of 512 bytes under way: at HD 128 8 KiB, 64 KiB in the 8 warps of a multiprocessor
// that registers allow for, where 20 KiB cover 0.8 us at 3.3 TB/s on 132 of them (expected).

#include "attention.cuh"

namespace {

__device__ inline uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// The pages of K/V that a row sees.
__device__ inline uint32_t pages_of(const AttendArgs& args, uint32_t row) {
    const uint32_t from = args.first[row], to = args.end[row];
    return from < to ? (to - 1) / KV_PAGE + 1 - from / KV_PAGE : 0;
}

// The part of a block.
struct Part {
    uint32_t row, kv_head;
    uint32_t first, sharing;        // blocks [first, first + sharing) along x share the row
    uint32_t group, slot, from, to; // K/V rows [from, to)

    // Rows have their blocks one behind the other, as many as their pages ask for. Every warp finds the block's row by
    // itself, 32 rows at a time: there are seldom more.
    __device__ bool take(const AttendArgs& args) {
        const uint32_t n = count_of(args.rows), lane = threadIdx.x % WARP;
        uint32_t pages = 0;
        for (uint32_t i = lane; i < n; i += WARP) pages += pages_of(args, i);
        const uint32_t each = max(DECODE_PAGES, ceil_div(warp_sum(pages) * args.kv.kv_heads, args.blocks));
        first = 0;
        for (uint32_t row0 = 0; row0 < n; row0 += WARP) {
            const uint32_t i = row0 + lane, wanted = i < n ? ceil_div(pages_of(args, i), each) : 0;
            sharing = i < n ? min(max(wanted, 1u), DECODE_SPLITS) : 0;
            uint32_t end = first + sharing;
#pragma unroll
            for (int lanes = 1; lanes < WARP; lanes *= 2) {
                const uint32_t before = __shfl_up_sync(FULL, end - first, lanes);
                if (lane >= lanes) end += before;
            }
            const uint32_t beyond = __ballot_sync(FULL, blockIdx.x < end);
            if (beyond) {
                const int found = __ffs(beyond) - 1;
                sharing = __shfl_sync(FULL, sharing, found);
                first = __shfl_sync(FULL, end, found) - sharing;
                cut(args, row0 + found, n);
                return true;
            }
            first = __shfl_sync(FULL, end, WARP - 1);
        }
        return false;
    }

    // The block's piece of a row of n: as many pages as the others', but for the last one's.
    __device__ void cut(const AttendArgs& args, uint32_t of, uint32_t n) {
        row = of, kv_head = blockIdx.y;
        if (kv_head == 0 && blockIdx.x == first && threadIdx.x < WARP) note_attention(args, row, row + 1, n);
        group = args.heads / args.kv.kv_heads;
        slot = slot_of(args, row);
        const uint32_t piece = ceil_div(pages_of(args, row), sharing) * KV_PAGE, start = args.first[row];
        const uint32_t begin = start / KV_PAGE * KV_PAGE + (blockIdx.x - first) * piece;
        from = max(start, begin);
        to = min(args.end[row], begin + piece);
    }
};

// Sums, maximum and denominator of a query head.
struct State {
    float sum, top, total;

    // by(i) of `count` states, in order.
    template <class F> static __device__ State merge(uint32_t count, float scale2, F by) {
        State all{0.0f, -INF, 0.0f};
        for (uint32_t i = 0; i < count; i++) all.top = fmaxf(all.top, by(i).top);
        const float base = finite_top(all.top);
        for (uint32_t i = 0; i < count; i++) {
            const State part = by(i);
            const float weight = weight_of(part.top, base, scale2);
            all.sum += part.sum * weight;
            all.total += part.total * weight;
        }
        return all;
    }
};

// What the warps found for the heads [head, head + heads) of the group, in shared memory: [warp, heads, head_dim] sums,
// [warp, heads, 2] maximum and denominator.
struct Found {
    float *sums, *state;
    uint32_t heads, head_dim;

    __device__ Found(float* room, uint32_t heads, uint32_t head_dim)
        : sums(room), state(room + ATTEND_WARPS * heads * head_dim), heads(heads), head_dim(head_dim) {}
    __device__ float* sums_of(uint32_t warp, uint32_t head) const { return sums + (warp * heads + head) * head_dim; }
    __device__ float* state_of(uint32_t warp, uint32_t head) const { return state + (warp * heads + head) * 2; }
};

// Where a block, by its place along x, leaves what it found for a query head: head_dim sums; maximum and denominator.
__device__ inline float* sums_of(const AttendArgs& args, const Part& part, uint32_t head, uint32_t block) {
    return args.partial + (size_t(block) * args.heads + part.kv_head * part.group + head) * args.kv.head_dim;
}
__device__ inline float* state_of(const AttendArgs& args, const Part& part, uint32_t head, uint32_t block) {
    const size_t sums = size_t(gridDim.x) * args.heads * args.kv.head_dim;
    return args.partial + sums + (size_t(block) * args.heads + part.kv_head * part.group + head) * 2;
}

__device__ inline void put(const AttendArgs& args, const Part& part, uint32_t head, uint32_t column, float x) {
    store_of(args.type, args.out, query_at(args, part.row, part.kv_head * part.group + head) + column, x);
}

// Merges the warps: to `out` when nobody else has a part, else to the block's partial.
__device__ void merge_warps(const AttendArgs& args, const Part& part, const Found& found, uint32_t head0,
                            float scale2) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < found.heads * found.head_dim; i += ATTEND_THREADS) {
        const uint32_t head = i / found.head_dim, column = i % found.head_dim;
        const State state = State::merge(ATTEND_WARPS, scale2, [&](uint32_t warp) {
            const float* of = found.state_of(warp, head);
            return State{found.sums_of(warp, head)[column], of[0], of[1]};
        });
        if (part.sharing == 1) {
            put(args, part, head0 + head, column, state.sum / state.total);
        } else {
            sums_of(args, part, head0 + head, blockIdx.x)[column] = state.sum;
            float* const to = state_of(args, part, head0 + head, blockIdx.x);
            if (column == 0) to[0] = state.top, to[1] = state.total;
        }
    }
    __syncthreads();
}

// The last block of the row and K/V head to come here merges what all of them left. `room` holds DECODE_SPLITS numbers for
// each of `most` query heads. One row of 8192 K/V rows on an H100: 25.0 us, and 32.2 when each thread merged for itself.
constexpr int SPLITS_EACH = DECODE_SPLITS / WARP;
__device__ void merge_blocks(const AttendArgs& args, const Part& part, float* room, uint32_t most, float scale2) {
    if (part.sharing == 1) return;
    uint32_t* const ticket = args.tickets + part.row * args.kv.kv_heads + part.kv_head;
    __threadfence(); // this block's partials come before its ticket
    __syncthreads();
    const bool last = threadIdx.x == 0 && atomicInc(ticket, part.sharing - 1) == part.sharing - 1; // and is 0 again
    if (!__syncthreads_or(last)) return;
    __threadfence(); // the others' partials come behind theirs, and not from a stale L1 line
    const uint32_t head_dim = args.kv.head_dim, lane = threadIdx.x % WARP;
    for (uint32_t head0 = 0; head0 < part.group; head0 += most) {
        const uint32_t heads = min(part.group - head0, most);
        if (head0 > 0) __syncthreads(); // the room was read
        // The blocks' factors, a warp a head.
        for (uint32_t head = threadIdx.x / WARP; head < heads; head += ATTEND_WARPS) {
            float top[SPLITS_EACH], total[SPLITS_EACH], high = -INF, all = 0.0f;
#pragma unroll
            for (int i = 0; i < SPLITS_EACH; i++) {
                const uint32_t block = lane + i * WARP;
                const float* const of = state_of(args, part, head0 + head, part.first + min(block, part.sharing - 1));
                top[i] = block < part.sharing ? of[0] : -INF, total[i] = block < part.sharing ? of[1] : 0.0f;
                high = fmaxf(high, top[i]);
            }
            const float base = finite_top(warp_max(high));
#pragma unroll
            for (int i = 0; i < SPLITS_EACH; i++) all += total[i] * weight_of(top[i], base, scale2);
            all = warp_sum(all);
#pragma unroll
            for (int i = 0; i < SPLITS_EACH; i++) {
                room[head * DECODE_SPLITS + lane + i * WARP] = weight_of(top[i], base, scale2) / all;
            }
        }
        __syncthreads();
        for (uint32_t i = 4 * threadIdx.x; i < heads * head_dim; i += 4 * ATTEND_THREADS) {
            const uint32_t head = i / head_dim, column = i % head_dim;
            const size_t step = size_t(args.heads) * head_dim;
            const float* const from = sums_of(args, part, head0 + head, part.first) + column;
            float sums[4] = {};
#pragma unroll 8
            for (uint32_t block = 0; block < part.sharing; block++) {
                const float4 four = *(const float4*)(from + block * step);
                const float factor = room[head * DECODE_SPLITS + block];
                sums[0] += four.x * factor, sums[1] += four.y * factor;
                sums[2] += four.z * factor, sums[3] += four.w * factor;
            }
#pragma unroll
            for (int c = 0; c < 4; c++) put(args, part, head0 + head, column + c, sums[c]);
        }
    }
}

// K of 16 rows from `row` on. With g = lane / 4 and t = lane % 4, a lane has numbers 32c + 8t to 32c + 8t + 7 of rows g
// and g + 8: the right operand of two steps of mma along head_dim, if the queries are taken in the same order. Rows
// that are not seen, which may never have been written, are not read.
template <int HD> struct Keys {
    static constexpr int CHUNKS = (HD + 31) / 32;
    uint4 at[2][CHUNKS];

    template <class T> __device__ void load(const AttendArgs& args, const Part& part, const T* keys, uint32_t row) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t r = g + 8 * half;
            const bool seen = row + r >= part.from && row + r < part.to;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const uint32_t column = 32 * c + 8 * t;
                const bool valid = seen && column < args.kv.head_dim;
                at[half][c] = valid ? load_once(keys + r * args.kv.head_dim + column) : make_uint4(0, 0, 0, 0);
            }
        }
    }
};

// V of the same rows. A lane has columns 64c + 8g to 64c + 8g + 7 of the K/V rows that its weights belong to: 2t, 2t +
// 1, 2t + 8, 2t + 9. 8 lanes read 128 bytes in one piece.
template <int HD> struct Values {
    static constexpr int CHUNKS = (HD + 63) / 64;
    uint4 at[CHUNKS][4];

    template <class T> __device__ void load(const AttendArgs& args, const Part& part, const T* keys, uint32_t row) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        const T* const values = keys + KV_PAGE * args.kv.head_dim;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t r = 2 * t + i % 2 + 8 * (i / 2);
            const bool seen = row + r >= part.from && row + r < part.to;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const uint32_t column = 64 * c + 8 * g;
                const bool valid = seen && column < args.kv.head_dim;
                at[c][i] = valid ? load_once(values + r * args.kv.head_dim + column) : make_uint4(0, 0, 0, 0);
            }
        }
    }
};

__device__ inline uint32_t word_of(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// The first product has the heads as its 16 rows and the K/V rows as its columns. The second one is transposed, columns
// of V by heads: its right operand is what the first one left in each thread, and 8 heads, enough for most models, need
// half the registers of 16, which is what lets HD 256 in.
template <class T, int HD> __device__ void decode(const AttendArgs& args) {
    constexpr int HEADS = DECODE_HEADS<HD>, TILES = HEADS / 8;
    // Registers for K of the next rows while V of these are on their way.
    constexpr bool AHEAD = HD <= 128;
    extern __shared__ uint4 shared[];
    Part part;
    if (!part.take(args)) return;
    const float scale2 = args.scale * LOG2E;
    const uint32_t head_dim = args.kv.head_dim;
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const auto keys_at = [&](uint32_t row) { return key_at<T>(args.kv, part.slot, part.kv_head, row); };

    for (uint32_t head0 = 0; head0 < part.group; head0 += HEADS) {
        const uint32_t heads = min(part.group - head0, uint32_t(HEADS));
        uint4 q[Keys<HD>::CHUNKS][TILES];
#pragma unroll
        for (int c = 0; c < Keys<HD>::CHUNKS; c++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint32_t head = g + 8 * tile, column = 32 * c + 8 * t;
                const size_t at = query_at(args, part.row, part.kv_head * part.group + head0 + head) + column;
                const bool valid = head < heads && column < head_dim;
                q[c][tile] = valid ? load_query<T>(args, at) : make_uint4(0, 0, 0, 0);
            }
        }
        // Columns 64c + 8g + 2j of heads 2t, 2t + 1 of a tile, then the next column of both.
        float out[Values<HD>::CHUNKS][4][TILES][4] = {};
        float top[TILES], total[TILES]; // of head g of a tile, total over the thread's K/V rows
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) top[tile] = -INF, total[tile] = 0.0f;

        uint32_t row = (part.from / 16 + warp) * 16;
        const T* keys = row < part.to ? keys_at(row) : nullptr;
        Keys<HD> k;
        if (AHEAD && keys) k.load(args, part, keys, row);
        while (row < part.to) {
            const uint32_t next = row + 16 * ATTEND_WARPS;
            const T* const next_keys = next < part.to ? keys_at(next) : nullptr;
            Values<HD> v;
            if (AHEAD) v.load(args, part, keys, row);
            else k.load(args, part, keys, row);
            float scores[2][4] = {}; // K/V rows 8i + 2t, 8i + 2t + 1, of heads g, then g + 8
#pragma unroll
            for (int c = 0; c < Keys<HD>::CHUNKS; c++) {
#pragma unroll
                for (int step = 0; step < 4; step += 2) {
                    uint32_t a[4] = {word_of(q[c][0], step), 0, word_of(q[c][0], step + 1), 0};
                    if (TILES > 1) a[1] = word_of(q[c][TILES - 1], step), a[3] = word_of(q[c][TILES - 1], step + 1);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        multiply_add<T>(scores[i], a, {word_of(k.at[i][c], step), word_of(k.at[i][c], step + 1)});
                    }
                }
            }
            if (!AHEAD) v.load(args, part, keys, row);
            else if (next_keys) k.load(args, part, next_keys, next);

            uint32_t weights[TILES][2];
            float shrink[TILES];
            bool grown = false;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                float high = top[tile];
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const uint32_t r = row + 8 * i + 2 * t + j;
                        float& score = scores[i][2 * tile + j];
                        if (r < part.from || r >= part.to) score = -INF;
                        high = fmaxf(high, score);
                    }
                }
                high = fmaxf(high, __shfl_xor_sync(FULL, high, 1));
                high = fmaxf(high, __shfl_xor_sync(FULL, high, 2));
                const float base = finite_top(high);
                shrink[tile] = weight_of(top[tile], base, scale2);
                grown |= shrink[tile] != 1.0f;
                top[tile] = high;
                total[tile] *= shrink[tile];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float lo = weight_of(scores[i][2 * tile], base, scale2);
                    const float hi = weight_of(scores[i][2 * tile + 1], base, scale2);
                    total[tile] += lo + hi;
                    weights[tile][i] = pack<T>(lo, hi);
                }
            }
            if (__any_sync(FULL, grown)) {
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const float lo = __shfl_sync(FULL, shrink[tile], 8 * t); // of head 2t
                    const float hi = __shfl_sync(FULL, shrink[tile], 8 * t + 4);
#pragma unroll
                    for (auto& chunk : out) {
#pragma unroll
                        for (auto& columns : chunk) {
                            columns[tile][0] *= lo, columns[tile][1] *= hi;
                            columns[tile][2] *= lo, columns[tile][3] *= hi;
                        }
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < Values<HD>::CHUNKS; c++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    // Two K/V rows of a column in a word, where memory has two columns of a row.
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t one = word_of(v.at[c][2 * i], j), other = word_of(v.at[c][2 * i + 1], j);
                        a[2 * i] = (one & 0xffff) | other << 16;
                        a[2 * i + 1] = one >> 16 | (other & 0xffff0000);
                    }
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) multiply_add<T>(out[c][j][tile], a, weights[tile]);
                }
            }
            row = next, keys = next_keys;
        }

        const Found found((float*)shared, heads, head_dim);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            total[tile] += __shfl_xor_sync(FULL, total[tile], 1);
            total[tile] += __shfl_xor_sync(FULL, total[tile], 2);
            if (t == 0 && g + 8 * tile < heads) {
                float* const to = found.state_of(warp, g + 8 * tile);
                to[0] = top[tile], to[1] = total[tile];
            }
#pragma unroll
            for (int side = 0; side < 2; side++) {
                const uint32_t head = 8 * tile + 2 * t + side;
#pragma unroll
                for (int c = 0; c < Values<HD>::CHUNKS; c++) {
                    const uint32_t column = 64 * c + 8 * g;
                    if (head >= heads || column >= head_dim) continue;
                    float* const to = found.sums_of(warp, head) + column;
                    const auto of = [&](int j) { return out[c][j / 2][tile][2 * (j % 2) + side]; };
                    const float x[8] = {of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)};
                    store8(to, x);
                }
            }
        }
        merge_warps(args, part, found, head0, scale2);
    }
    merge_blocks(args, part, (float*)shared, min(part.group, uint32_t(HEADS)), scale2);
}

// Plain f32 arithmetic for any head_dim up to 256: a lane has columns 4 * lane and 128 + 4 * lane of K/V rows and
// heads, a warp 4 K/V rows and 4 heads at a time.
__device__ void decode_f32(const AttendArgs& args) {
    constexpr int HEADS = DECODE_F32_HEADS, ROWS = 4;
    extern __shared__ uint4 shared[];
    Part part;
    if (!part.take(args)) return;
    const float scale2 = args.scale * LOG2E;
    const uint32_t head_dim = args.kv.head_dim, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // A lane's columns of a row.
    const auto load = [&](float (&x)[8], const float* from, bool valid) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t column = 128 * c + 4 * lane;
            const bool within = valid && column < head_dim;
            const float4 four = within ? *(const float4*)(from + column) : make_float4(0, 0, 0, 0);
            x[4 * c] = four.x, x[4 * c + 1] = four.y, x[4 * c + 2] = four.z, x[4 * c + 3] = four.w;
        }
    };
    for (uint32_t head0 = 0; head0 < part.group; head0 += HEADS) {
        const uint32_t heads = min(part.group - head0, uint32_t(HEADS));
        float q[HEADS][8], out[HEADS][8] = {}, top[HEADS], total[HEADS] = {};
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
            const uint32_t head = part.kv_head * part.group + head0 + h;
            load(q[h], (const float*)args.q + query_at(args, part.row, head), h < heads);
            top[h] = -INF;
        }
        for (uint32_t row = (part.from / ROWS + warp) * ROWS; row < part.to; row += ROWS * ATTEND_WARPS) {
            const float* const keys = key_at<float>(args.kv, part.slot, part.kv_head, row);
            float k[ROWS][8], v[ROWS][8], scores[HEADS][ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bool seen = row + r >= part.from && row + r < part.to;
                load(k[r], keys + r * head_dim, seen);
                load(v[r], keys + (KV_PAGE + r) * head_dim, seen);
            }
#pragma unroll
            for (uint32_t h = 0; h < HEADS; h++) {
                float high = top[h];
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float& score = scores[h][r];
                    score = 0.0f;
#pragma unroll
                    for (int c = 0; c < 8; c++) score = fmaf(q[h][c], k[r][c], score);
                    score = warp_sum(score);
                    if (row + r < part.from || row + r >= part.to) score = -INF;
                    high = fmaxf(high, score);
                }
                const float base = finite_top(high), shrink = weight_of(top[h], base, scale2);
                top[h] = high;
                total[h] *= shrink;
#pragma unroll
                for (int c = 0; c < 8; c++) out[h][c] *= shrink;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float weight = weight_of(scores[h][r], base, scale2);
                    total[h] += weight;
#pragma unroll
                    for (int c = 0; c < 8; c++) out[h][c] = fmaf(weight, v[r][c], out[h][c]);
                }
            }
        }
        const Found found((float*)shared, heads, head_dim);
#pragma unroll
        for (uint32_t h = 0; h < HEADS; h++) {
            if (h >= heads) continue;
            if (lane == 0) found.state_of(warp, h)[0] = top[h], found.state_of(warp, h)[1] = total[h];
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint32_t column = 128 * c + 4 * lane;
                const float* const x = out[h] + 4 * c;
                if (column >= head_dim) continue;
                *(float4*)(found.sums_of(warp, h) + column) = make_float4(x[0], x[1], x[2], x[3]);
            }
        }
        merge_warps(args, part, found, head0, scale2);
    }
    merge_blocks(args, part, (float*)shared, min(part.group, uint32_t(HEADS)), scale2);
}

} // namespace

#define DECODE(HD) \
    KERNEL(attend_decode_f16_##HD, AttendArgs, ATTEND_THREADS) { decode<f16, HD>(args); } \
    KERNEL(attend_decode_bf16_##HD, AttendArgs, ATTEND_THREADS) { decode<bf16, HD>(args); }

DECODE(32)
DECODE(64)
DECODE(80)
DECODE(96)
DECODE(128)
DECODE(256)
KERNEL(attend_decode_f32, AttendArgs, ATTEND_THREADS, 2) { decode_f32(args); }
