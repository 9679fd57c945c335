// Flash attention of many query rows by wgmma and TMA, for compute capability 9.0 (after Shah et al., arXiv 2407.08608):
// what attention_prefill.cu computes, for f16 and bf16 and a head_dim of 64 or 128.
//
// A block has three warpgroups. In the first, one warp copies K and one V, page by page, into two stages each; a barrier
// tells when a stage is full, another when it may be written again. The two others take 64 packed rows each. While the
// tensor cores multiply for one of them, the other makes weights of its scores: they take turns at issuing products. A
// warpgroup also issues the scores of its next tile together with the sums of the one before, and makes the weights
// while the sums are under way.
//
// Launch: grid (ceil(bound * heads / kv_heads / HOPPER_ROWS), kv_heads), HOPPER_THREADS threads, dynamic shared memory
// HOPPER_SHARED<head_dim>.

#include "hopper.cuh"
#include "prefill.cuh"

// Code for 9.0 runs nowhere else: other architectures do not even have the kernels.
#if defined(MINDSKIP_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

constexpr int KEYS = 2 * KV_PAGE, STAGES = 2, HALF = 64; // HALF: packed rows of a warpgroup
constexpr uint32_t CONSUMERS = 2 * WARPGROUP;
// Of the 168 registers that 384 threads can have each.
constexpr int REGISTERS_COPYING = 40, REGISTERS_MULTIPLYING = 232;
// Barriers of warps: whose turn it is (one for each warpgroup), a warpgroup's own, the whole block's.
constexpr uint32_t TURN = 1, OWN = 3, ALL = 5;

// Shared memory.
template <class T, int HD> struct Room {
    T queries[2][HD / SLAB][HALF * SLAB];
    T keys[STAGES][HD / SLAB][KEYS * SLAB];
    T values[STAGES][HD / SLAB][KEYS * SLAB];
    Barrier keys_full[STAGES], keys_free[STAGES], values_full[STAGES], values_free[STAGES], landed;

    static __device__ Room& here() {
        extern __shared__ uint4 shared[];
        return *(Room*)((uintptr_t(shared) + SLAB_ALIGN - 1) / SLAB_ALIGN * SLAB_ALIGN);
    }
    __device__ void init() {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(keys_full[i], 1);
            barrier_init(values_full[i], 1);
            barrier_init(keys_free[i], CONSUMERS / WARP);
            barrier_init(values_free[i], CONSUMERS / WARP);
        }
        barrier_init(landed, 1);
        barrier_init_fence();
    }
};

// Where the tile of a number stands, and the parity of its barriers.
struct Stage {
    uint32_t at, parity;
    static __device__ Stage of(uint32_t number) { return {number % STAGES, number / STAGES % 2}; }
};

// The tiles of a block, numbered. A second walk goes on with the numbers.
struct Walk {
    Tile tile;
    uint32_t number = ~0u;

    __device__ void begin(const Share& share) { tile = Tile::before(share.packed / share.group); }
    __device__ bool next(const AttendArgs& args, const Share& share) {
        if (!tile.next<KEYS>(args, share.rows_end)) return false;
        number++;
        return true;
    }
};

// At the end of the first walk: whether there must be a second one, as some sum is no number. All threads take part.
__device__ inline bool again(bool finite) { return group_any(ALL, HOPPER_THREADS, !finite); }

// A warp copies K, or V, to shared memory.
template <bool VALUES, class T, int HD>
__device__ void copy(const AttendHopperArgs& all, const Share& share, Room<T, HD>& room) {
    const AttendArgs& args = all.attend;
    const KvLayer& kv = args.kv;
    const int lane = threadIdx.x % WARP;
    uint32_t landings = 0;
    Walk walk{};
    for (bool apart = false;; apart = true) {
        for (walk.begin(share); walk.next(args, share);) {
            const Tile& tile = walk.tile;
            const Stage stage = Stage::of(walk.number);
            auto& to = (VALUES ? room.values : room.keys)[stage.at];
            Barrier& full = (VALUES ? room.values_full : room.keys_full)[stage.at];
            // The tile's rows [from, end) are those that some query sees. V of others, which may never have been
            // written, must be zero, as weights of zero are multiplied with it; scores of others are not looked at.
            const uint32_t from = tile.first > tile.key ? tile.first - tile.key : 0;
            const uint32_t end = min(tile.last - tile.key, KEYS);
            const bool part = VALUES && end - from < KEYS;
            barrier_wait((VALUES ? room.values_free : room.keys_free)[stage.at], stage.parity ^ 1);
            if (lane == 0) {
                Barrier& arrival = part ? room.landed : full;
                const uint32_t pages = (end + KV_PAGE - 1) / KV_PAGE;
                barrier_arrive_expecting(arrival, pages * KV_PAGE * HD * sizeof(T));
                const uint32_t* const table = kv.tables + size_t(tile.slot) * kv.pages_per_seq + tile.key / KV_PAGE;
#pragma unroll 1
                for (uint32_t page = 0; page < pages; page++) {
                    const uint32_t row = ((table[page] * kv.kv_heads + blockIdx.y) * 2 + VALUES) * KV_PAGE;
#pragma unroll
                    for (int slab = 0; slab < HD / SLAB; slab++)
                        copy_box(to[slab] + page * KV_PAGE * SLAB, all.pool, row, slab * SLAB, arrival);
                }
            }
            if (!part) continue;
            barrier_wait(room.landed, landings++ % 2);
            for (uint32_t i = lane; i < KEYS * 8; i += WARP) {
                if (i / 8 - from < end - from) continue;
#pragma unroll
                for (int slab = 0; slab < HD / SLAB; slab++) *((uint4*)to[slab] + i) = make_uint4(0, 0, 0, 0);
            }
            async_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(full);
        }
        if (apart || !again(true)) return;
    }
}

// A warpgroup that multiplies, for half of the block's rows.
template <class T, int HD> struct Consumer {
    const AttendArgs& args;
    const Share& share;
    Room<T, HD>& room;
    const int warp, half = warp / 4 - 1, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    // The first packed row of the warpgroup, and of the warp.
    const uint32_t packed = share.packed + HALF * half, own = packed + warp % 4 * 16;
    Walk walk{};
    View view, own_view; // what these rows see of the K/V of the tile's sequence

    __device__ void load_queries() const {
        for (int i = threadIdx.x % WARPGROUP; i < HALF * HD / 8; i += WARPGROUP) {
            const int row = i / (HD / 8), column = i % (HD / 8) * 8;
            const uint32_t p = packed + row;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (p < share.limit) x = load_query<T>(args, share.at(args, p) + column);
            *(uint4*)(room.queries[half][column / SLAB] + in_slab(row, column % SLAB)) = x;
        }
        async_fence();
        group_sync(OWN + half, WARPGROUP);
    }

    __device__ bool next() {
        const uint32_t before = walk.tile.end;
        if (!walk.next(args, share)) return false;
        if (walk.tile.end != before) {
            view = View::of<HALF>(args, share, walk.tile, packed);
            own_view = View::of<16>(args, share, walk.tile, own);
        }
        return true;
    }
    __device__ bool sees() const { return view.template some<KEYS>(walk.tile.key); }

    __device__ void take_turn() const { group_sync(TURN + half, CONSUMERS); }
    __device__ void pass_turn() const { group_arrive(TURN + (half ^ 1), CONSUMERS); }

    // The warp has read K, or V.
    __device__ void release(Barrier& free) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(free);
    }

    // scores = Q . K^T, under way.
    __device__ void multiply_keys(float (&scores)[KEYS / 8][4], uint32_t at) const {
        const Operand queries = by_rows(room.queries[half]), keys = by_rows(room.keys[at]);
#pragma unroll
        for (int k = 0; k < HD / 16; k++) {
            const int slab = k * 16 / SLAB, column = k * 16 % SLAB * sizeof(T);
            multiply_async<T>(scores, queries.plus(slab * sizeof(room.queries[0][0]) + column),
                              keys.plus(slab * sizeof(room.keys[0][0]) + column), k > 0);
        }
        products_commit();
    }

    // sums += weights . V, under way.
    __device__ void add_values(Sums<HD>& sums, const uint32_t (&weights)[KEYS / 16][4], uint32_t at) const {
        const Operand values = by_columns(room.values[at], sizeof(room.values[0][0]));
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
            multiply_async<T>(sums.out, weights[k], values.plus(k * 16 * SLAB * sizeof(T)));
        products_commit();
    }

    // Turns the tile's scores into weights; says by what the sums are to shrink.
    __device__ void weigh(float (&scores)[KEYS / 8][4], Sums<HD>& sums, float (&shrink)[2]) const {
        const Tile& tile = walk.tile;
        if (!own_view.template all<KEYS>(tile.key)) {
            const Seen seen[2] = {Seen::of(args, share, tile, own + g), Seen::of(args, share, tile, own + g + 8)};
            hide(scores, seen, tile.key);
        }
        soften(scores, sums, args.scale * LOG2E, shrink);
    }
    static __device__ void round(uint32_t (&weights)[KEYS / 16][4], const float (&scores)[KEYS / 8][4]) {
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) pack_weights<T>(weights[k], scores[2 * k], scores[2 * k + 1]);
    }

    // One walk. Of the tiles that the rows see, the sums of one and the scores of the next are under way together, but where
    // V rows are added apart.
    __device__ void attend(Sums<HD>& sums, bool apart) {
        uint32_t weights[KEYS / 16][4];
        float shrink[2];
        if (half == 1) pass_turn(); // the other one begins
        walk.begin(share);
        bool more = next();
        while (more) {
            Stage stage = Stage::of(walk.number);
            barrier_wait(room.keys_full[stage.at], stage.parity);
            if (!sees()) {
                take_turn();
                pass_turn();
                release(room.keys_free[stage.at]);
                barrier_wait(room.values_full[stage.at], stage.parity);
                release(room.values_free[stage.at]);
                more = next();
                continue;
            }
            {
                float scores[KEYS / 8][4];
                take_turn();
                products_fence();
                multiply_keys(scores, stage.at);
                pass_turn();
                products_wait<0>(scores);
                release(room.keys_free[stage.at]);
                weigh(scores, sums, shrink);
                sums.rescale(shrink);
                if (apart) {
                    barrier_wait(room.values_full[stage.at], stage.parity);
                    add_values_apart(sums, scores, room.values[stage.at]);
                    release(room.values_free[stage.at]);
                    more = next();
                    continue;
                }
                round(weights, scores);
            }
            while ((more = next()) && sees()) {
                float scores[KEYS / 8][4];
                const Stage before = stage;
                stage = Stage::of(walk.number);
                barrier_wait(room.values_full[before.at], before.parity);
                barrier_wait(room.keys_full[stage.at], stage.parity);
                take_turn();
                products_fence();
                multiply_keys(scores, stage.at);
                add_values(sums, weights, before.at);
                pass_turn();
                products_wait<1>(scores);
                release(room.keys_free[stage.at]);
                weigh(scores, sums, shrink);
                // Never so; but without a branch on them the compiler makes the weights behind the wait, and nothing is left
                // to do while the sums are under way.
                if (sums.total[0] < 0.0f || sums.total[1] < 0.0f) __trap();
                products_wait<0>(sums.out);
                release(room.values_free[before.at]);
                sums.rescale(shrink);
                round(weights, scores);
            }
            barrier_wait(room.values_full[stage.at], stage.parity);
            products_fence();
            add_values(sums, weights, stage.at);
            products_wait<0>(sums.out);
            release(room.values_free[stage.at]);
        }
        if (half == 0) take_turn(); // what the other one passed last
    }

    // sums += weights . V by one K/V row at a time, which goes to the queries that see it only.
    __device__ void add_values_apart(Sums<HD>& sums, const float (&weights)[KEYS / 8][4],
                                     const T (&values)[HD / SLAB][KEYS * SLAB]) const {
        const Tile& tile = walk.tile;
        const Seen low = Seen::of(args, share, tile, own + g), high = Seen::of(args, share, tile, own + g + 8);
#pragma unroll 1
        for (int i = 0; i < KEYS / 8; i++) {
            float of[4]; // weights[i], without an array in memory
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int c = 0; c < 4; c++) of[c] = j == i ? weights[j][c] : of[c];
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
#pragma unroll 1
                for (int quarter = 0; quarter < 4; quarter++) {
                    const int row = 8 * i + 2 * quarter + c, from = lane / 4 * 4 + quarter;
                    const float x = to_f32(from_f32<T>(__shfl_sync(FULL, of[c], from)));
                    const float y = to_f32(from_f32<T>(__shfl_sync(FULL, of[2 + c], from)));
                    const bool sees_low = low(tile.key + row), sees_high = high(tile.key + row);
#pragma unroll
                    for (int j = 0; j < HD / 8; j++) {
                        const int column = 8 * j + 2 * t;
                        const T* const at = values[column / SLAB] + in_slab(row, column % SLAB);
                        const float v[2] = {to_f32(at[0]), to_f32(at[1])};
                        float(&out)[4] = sums.out[j];
                        if (sees_low) out[0] = fmaf(x, v[0], out[0]), out[1] = fmaf(x, v[1], out[1]);
                        if (sees_high) out[2] = fmaf(y, v[0], out[2]), out[3] = fmaf(y, v[1], out[3]);
                    }
                }
            }
        }
    }

    // Rows leave by way of shared memory, 16 bytes a thread, each warp's on its own: the queries are not needed any more.
    __device__ void store(const Sums<HD>& sums) const {
        group_sync(OWN + half, WARPGROUP); // nobody multiplies with the queries any more
        const int top = own - packed; // of the warp's rows
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float inverse = sums.inverse(r);
#pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                T* const slab = room.queries[half][8 * i / SLAB];
                *(uint32_t*)(slab + in_slab(top + g + 8 * r, 8 * i % SLAB + 2 * t)) =
                    pack<T>(sums.out[i][2 * r] * inverse, sums.out[i][2 * r + 1] * inverse);
            }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 16 * HD / 8 / WARP; j++) {
            const int i = lane + j * WARP, row = i / (HD / 8), column = i % (HD / 8) * 8;
            if (own + row >= share.limit) continue;
            const T* const from = room.queries[half][column / SLAB] + in_slab(top + row, column % SLAB);
            store_sums<T>(args, share.at(args, own + row) + column, *(const uint4*)from);
        }
    }

    __device__ void run() {
        load_queries();
        Sums<HD> sums;
        for (bool apart = false;; apart = true) {
            sums.clear();
            attend(sums, apart);
            if (apart || !again(sums.finite())) break;
        }
        store(sums);
    }
};

template <class T, int HD> __device__ void attend(const AttendHopperArgs& all) {
    const AttendArgs& args = all.attend;
    Room<T, HD>& room = Room<T, HD>::here();
    static_assert(sizeof(Room<T, HD>) + SLAB_ALIGN <= HOPPER_SHARED<HD>);
    Share share;
    if (!share.take<HOPPER_ROWS>(args)) return;
    if (threadIdx.x == 0) room.init();
    __syncthreads();
    // The same in all lanes, also for the compiler: it waits for each product else.
    const int warp = __shfl_sync(FULL, threadIdx.x / WARP, 0);
    if (warp >= WARPGROUP / WARP) {
        registers_more<REGISTERS_MULTIPLYING>();
        Consumer<T, HD>{args, share, room, warp}.run();
        return;
    }
    registers_fewer<REGISTERS_COPYING>();
    if (warp == 0) return copy<false>(all, share, room);
    if (warp == 1) return copy<true>(all, share, room);
    if (warp == 2) share.note(args);
    again(true);
}

} // namespace

#define ATTEND_HOPPER(HD) \
    KERNEL(attend_hopper_f16_##HD, AttendHopperArgs, HOPPER_THREADS) { attend<f16, HD>(args); } \
    KERNEL(attend_hopper_bf16_##HD, AttendHopperArgs, HOPPER_THREADS) { attend<bf16, HD>(args); }

ATTEND_HOPPER(64)
ATTEND_HOPPER(128)

#endif
