// What the prefill kernels share: a block's query rows, the K/V rows that these see, the softmax.
//
// The heads that share a K/V head are packed: of a K/V head with G query heads, packed row p is head p % G of query row
// p / G. A block takes a tile of packed rows, so K/V are read once for the group, and walks the K/V of the sequences
// its rows belong to, mostly one. K/V rows that no query of the tile sees are not read.
#pragma once

#include "attention.cuh"

// K/V rows [key, key + KEYS) of the sequence whose query rows [begin, end) see some of [first, last).
struct Tile {
    uint32_t begin, end, first, last, key, slot;

    // Before the first tile of query rows from `row` on.
    static __device__ Tile before(uint32_t row) { return {row, row, 0, 0, 0, 0}; }

    // The tile behind this one, if there is one, for query rows up to `limit`. Tiles begin where a page does, or a part
    // of KEYS rows of it.
    template <uint32_t KEYS> __device__ bool next(const AttendArgs& args, uint32_t limit) {
        constexpr uint32_t START = KEYS < KV_PAGE ? KEYS : KV_PAGE;
        key += KEYS;
        while (key >= last) {
            if (end >= limit) return false;
            begin = end;
            slot = slot_of(args, begin);
            // Its rows stand together: most often up to the limit, else up to where halving finds another.
            end = limit;
            uint32_t same = slot_of(args, limit - 1) == slot ? limit - 1 : begin;
            while (end - same > 1) {
                const uint32_t middle = (same + end) / 2;
                if (slot_of(args, middle) == slot) same = middle;
                else end = middle;
            }
            first = args.first[begin];
            last = args.end[end - 1];
            key = first / START * START;
        }
        return true;
    }
};

// A row of numbers, in whose place zeros are taken where it is not `valid`.
struct Line {
    const float* at;
    bool valid;
};

// The packed rows of a block.
struct Share {
    uint32_t group, packed, limit; // query heads of the K/V head; the packed rows [packed, limit)
    uint32_t rows_end;             // where the query rows end

    // The longest ranges come first: the blocks that start last then fill the gaps that are left at the end.
    template <uint32_t ROWS> __device__ bool take(const AttendArgs& args) {
        const uint32_t n = count_of(args.rows);
        group = args.heads / args.kv.kv_heads;
        packed = (gridDim.x - 1 - blockIdx.x) * ROWS;
        if (packed >= n * group) return false;
        limit = min(packed + ROWS, n * group);
        rows_end = (limit - 1) / group + 1;
        return true;
    }
    // Counts the rows, which is the first K/V head's part; called by one warp.
    __device__ void note(const AttendArgs& args) const {
        if (blockIdx.y > 0) return;
        note_attention(args, begin(), end(), count_of(args.rows));
    }
    // The same for rows with K and V of their own, each of which reads its K/V for itself.
    __device__ void note_apart(const AttendArgs& args) const {
        if (blockIdx.y > 0) return;
        const unsigned long long seen = pairs_of(args, begin(), end());
        if (threadIdx.x == 0) note_pairs(args.work, end() - begin(), seen, seen + end() - begin());
    }
    // The query rows of which the block has the first head.
    __device__ uint32_t begin() const { return (packed + group - 1) / group; }
    __device__ uint32_t end() const { return (limit + group - 1) / group; }
    // Of a matrix [rows, heads, head_dim], the i-th packed row.
    __device__ Line line(const AttendArgs& args, const float* of, uint32_t i) const {
        return {of + at(args, min(packed + i, limit - 1)), packed + i < limit};
    }
    __device__ size_t at(const AttendArgs& args, uint32_t p) const {
        return query_at(args, p / group, blockIdx.y * group + p % group);
    }
};

// The K/V rows of a tile that a packed row sees: `count` from `from` on.
struct Seen {
    uint32_t from, count;

    static __device__ Seen of(const AttendArgs& args, const Share& share, const Tile& tile, uint32_t p) {
        const uint32_t row = p / share.group;
        if (p >= share.limit || row < tile.begin || row >= tile.end) return {0, 0};
        return {args.first[row], args.end[row] - args.first[row]};
    }
    __device__ bool operator()(uint32_t key) const { return key - from < count; }
};

// Of the packed rows [packed, packed + ROWS) that belong to a tile's sequence: K/V rows that some see, and that all do.
struct View {
    uint32_t some_first, some_end, all_first, all_end;

    template <uint32_t ROWS>
    static __device__ View of(const AttendArgs& args, const Share& share, const Tile& tile, uint32_t packed) {
        const uint32_t from = max(packed, tile.begin * share.group);
        const uint32_t to = min(min(packed + ROWS, share.limit), tile.end * share.group);
        if (from >= to) return {0, 0, 0, 0};
        const uint32_t low = from / share.group, high = (to - 1) / share.group;
        View view{args.first[low], args.end[high], 0, 0};
        if (to - from == ROWS) view.all_first = args.first[high], view.all_end = args.end[low];
        return view;
    }
    template <uint32_t KEYS> __device__ bool some(uint32_t key) const {
        return key < some_end && key + KEYS > some_first;
    }
    template <uint32_t KEYS> __device__ bool all(uint32_t key) const {
        return key >= all_first && key + KEYS <= all_end;
    }
};

// What a warp holds of its 16 packed rows. A thread, with g = lane / 4 and t = lane % 4, has rows g and g + 8.
template <int HD> struct Sums {
    float out[HD / 8][4]; // sums of weight * V: columns 8i + 2t, 8i + 2t + 1 of row g, then of row g + 8
    float top[2];         // the highest score
    float total[2];       // the thread's part of the sum of weights

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < HD / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
        top[0] = top[1] = -INF;
        total[0] = total[1] = 0.0f;
    }
    __device__ bool finite() const {
        bool finite = true;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
#pragma unroll
            for (int c = 0; c < 4; c++) finite &= fabsf(out[i][c]) < INF;
        }
        return finite;
    }
    // To the new maximum. Behind the first tiles it seldom grows: expected to save a tenth of the instructions of a tile.
    __device__ void rescale(const float (&shrink)[2]) {
        if (!__any_sync(FULL, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            out[i][0] *= shrink[0], out[i][1] *= shrink[0];
            out[i][2] *= shrink[1], out[i][3] *= shrink[1];
        }
    }
    // What the thread's row g + 8r is divided by in the end, as a factor.
    __device__ float inverse(int r) const {
        float all = total[r];
        all += __shfl_xor_sync(FULL, all, 1);
        all += __shfl_xor_sync(FULL, all, 2);
        return 1.0f / all;
    }
};

// Eight numbers in the type of K/V to their place in the output.
template <class T> __device__ inline void store_sums(const AttendArgs& args, size_t at, const uint4& words) {
    if (args.type == TYPE<T>) {
        *(uint4*)((T*)args.out + at) = words;
    } else {
        float x[8];
        unpack8<T>(x, words);
        store8_of(args.type, args.out, at, x);
    }
}

// Removes the scores of K/V rows from `key` on that rows g and g + 8 do not see.
template <int N> __device__ inline void hide(float (&scores)[N][4], const Seen (&seen)[2], uint32_t key) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                if (!seen[r](key + 8 * i + 2 * t + c)) scores[i][2 * r + c] = -INF;
            }
        }
    }
}

// Turns scores into weights, and says by what the sums are to shrink.
template <int HD, int N>
__device__ inline void soften(float (&scores)[N][4], Sums<HD>& sums, float scale2, float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = sums.top[r];
#pragma unroll
        for (int i = 0; i < N; i++) top = fmaxf(top, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        const float base = finite_top(top);
        shrink[r] = weight_of(sums.top[r], base, scale2);
        sums.top[r] = top;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int c = 2 * r; c < 2 * r + 2; c++) total += scores[i][c] = weight_of(scores[i][c], base, scale2);
        }
        sums.total[r] = sums.total[r] * shrink[r] + total;
    }
}

// The left operand of the second product: the weights of 16 K/V rows.
template <class T>
__device__ inline void pack_weights(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
    a[0] = pack<T>(low[0], low[1]);
    a[1] = pack<T>(low[2], low[3]);
    a[2] = pack<T>(high[0], high[1]);
    a[3] = pack<T>(high[2], high[3]);
}
