// Products of few rows, as in decode: weights are streamed past the rows once, so what counts is the bandwidth of memory.
//
// The rows are read through their index and their number from the device; a block that has none ends before it reads a
// weight, but for what it fetches ahead when the number that it guessed by is an older one. Weights are the left operand of the tensor cores, 16 bytes a lane: lane 4g + t takes numbers 8t to 8t + 7 of 32
// along k for weight rows g and g + 8, and of the sources likewise, which is another order along k than the one that mma
// means, but the same for both operands, and sums do not mind.

#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;

namespace {

enum Epilogue {
    STORE,   // gathered sources; out[i], in T
    ADD,     // x[index[i]] +=, in f32
    LOGITS,  // out[i], in f32
    SWIGLU,  // out[i] = silu(first product) * second product, in T
};

template <class T, int EPILOGUE>
__device__ void put(const SkinnyArgs& args, const Product& of, uint32_t i, uint32_t n, float sum, float gate) {
    if (of.bias) sum += of.bias[n];
    const size_t at = (size_t)i * of.n + n;
    if (EPILOGUE == STORE) ((T*)of.out)[at] = from_f32<T>(sum);
    if (EPILOGUE == LOGITS) ((float*)of.out)[at] = sum;
    if (EPILOGUE == ADD) ((float*)of.out)[(size_t)args.rows[of.set].index[i] * of.n + n] += sum;
    if (EPILOGUE == SWIGLU) ((T*)of.out)[at] = from_f32<T>(silu(gate + (args.of[0].bias ? args.of[0].bias[n] : 0)) * sum);
}

// The product that a block works on, of which `block` becomes its number there.
template <int EPILOGUE> __device__ const Product& product_of(const SkinnyArgs& args, uint32_t& block, uint32_t columns) {
    if (EPILOGUE != STORE) return args.of[EPILOGUE == SWIGLU];
    // Q, K, V.
    for (int p = 0; p < 2; p++) {
        const uint32_t blocks = (args.of[p].n + columns - 1) / columns;
        if (block < blocks) return args.of[p];
        block -= blocks;
    }
    return args.of[2];
}

__device__ void note(const SkinnyArgs& args) {
    if (blockIdx.x || blockIdx.y || threadIdx.x) return;
    note_rows(args.work, count_of(args.rows[0]), args.rows[1].index ? count_of(args.rows[1]) : 0);
}

// The best of 16 logits, which stand in as many lanes.
__device__ void note_best(const SkinnyArgs& args, const Product& of, bool inside, uint32_t row, uint32_t column, float logit) {
    uint64_t best = inside ? best_key(logit, column) : 0;
#pragma unroll
    for (int lanes = SAMPLE_GROUP / 2; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(FULL, best, lanes));
    const uint32_t groups = (of.n + SAMPLE_GROUP - 1) / SAMPLE_GROUP;
    if (inside && column % SAMPLE_GROUP == 0) args.best[(size_t)row * groups + column / SAMPLE_GROUP] = best;
}

// A block takes 16 * BANDS columns for 8 * TILES rows; its warps take turns along k. More rows than 64 are a matter of
// blockIdx.y. With many rows more columns a block keep the sources' share of the traffic low: each block reads them all.
//
// Operands come by asynchronous copies, STAGES - 1 steps ahead: ptxas moves loads into registers back behind the products
// that come before them, and one step under way does not fill the memory's pipe. A thread reads what it has copied itself,
// so there is no barrier. Dynamic shared memory: STAGES * THREADS * 16 bytes for each of UNITS.
//
// Measured, one row of Llama-3-8B on an H200: with 6 stages in place of 4 the products for Q, K and V take 16.2 us, not
// 18.3, the logits 257, not 260; but what is added takes 42 us, not 37, its inner width 14336.
template <int TILES, int EPILOGUE>
constexpr int STAGES_OF = TILES == 1 && (EPILOGUE == STORE || EPILOGUE == LOGITS) ? 6 : 4;

template <class T, int TILES, int EPILOGUE> __device__ void skinny(const SkinnyArgs& args) {
    constexpr int BANDS = TILES >= 4 && EPILOGUE != SWIGLU ? 2 : 1, PARTS = EPILOGUE == SWIGLU ? 2 : 1;
    // Pieces of 16 bytes that a thread copies for a step: weights, and of few rows the sources.
    constexpr int WEIGHTS = 2 * BANDS * PARTS, SOURCES = TILES <= 2 ? TILES : 0, UNITS = WEIGHTS + SOURCES;
    constexpr int COLUMNS = 16 * BANDS, ROWS = 8 * TILES, STEP = 32, STAGES = STAGES_OF<TILES, EPILOGUE>;
    extern __shared__ uint4 shared[];
    uint32_t block = blockIdx.x;
    const Product& of = product_of<EPILOGUE>(args, block, COLUMNS);
    const RowSet& rows = args.rows[of.set];
    const uint32_t row0 = blockIdx.y * ROWS, column0 = block * COLUMNS;
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4, k = args.k;

    // Columns beyond the last are computed as the last and not stored.
    const T* weights[WEIGHTS];
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++) {
        const T* weight = (const T*)(PARTS == 2 ? args.of[i / 2].weight : of.weight);
        const uint32_t column = column0 + 8 * (PARTS == 2 ? i % 2 : i) + g;
        weights[i] = weight + (size_t)min(column, of.n - 1) * k;
    }

    uint4* own = shared + threadIdx.x;
    const auto copy_weights = [&](uint32_t step) {
        const uint32_t at = (step * WARPS + warp) * STEP + 8 * t;
        if (at >= k) return;
#pragma unroll
        for (int i = 0; i < WEIGHTS; i++) {
            copy_async(own + step % STAGES * (UNITS * THREADS) + i * THREADS, weights[i] + at);
        }
    };
    // Weights are there before the kernel before has ended. How many rows there are may not be: it is a guess.
    const bool early = row0 < guess(count_of(rows));
    if (early) {
#pragma unroll
        for (int step = 0; step < STAGES - 1; step++) copy_weights(step);
        // What comes next goes to the L2 cache, as much as it holds of all blocks that are there at a time.
        constexpr uint32_t BEGUN = (STAGES - 1) * WARPS * STEP, AHEAD = EPILOGUE == ADD ? 4096 : 2048;
        if (warp == 0 && t == 0 && k > BEGUN) {
#pragma unroll
            for (int i = 0; i < WEIGHTS; i++) prefetch(weights[i] + BEGUN, sizeof(T) * min(k - BEGUN, AHEAD));
        }
    }
    wait_for_previous();
    note(args);
    const uint32_t n = count_of(rows);
    if (row0 >= n) {
        copy_commit();
        copy_wait<0>();
        return;
    }

    // Rows beyond the last are zeros or computed as the last, and not stored. Zeros, as the copies of one row for all eight
    // cost more than eight rows: 29.5 us for Q, K and V of Llama-3-8B on an H100, not 20.6.
    uint32_t source[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        const uint32_t i = min(row0 + 8 * j + g, n - 1);
        source[j] = (EPILOGUE == STORE ? rows.index[i] - args.base : i) * k;
    }
    const auto copy_sources = [&](uint32_t step) {
        const uint32_t at = (step * WARPS + warp) * STEP + 8 * t;
        if (at < k) {
#pragma unroll
            for (int j = 0; j < SOURCES; j++) {
                uint4* to = own + step % STAGES * (UNITS * THREADS) + (WEIGHTS + j) * THREADS;
                copy_async(to, (const T*)args.src + source[j] + at, row0 + 8 * j + g < n);
            }
        }
        copy_commit();
    };
    float sums[PARTS][BANDS][TILES][4] = {};
    const auto multiply = [&](uint32_t step) {
        const uint32_t at = (step * WARPS + warp) * STEP + 8 * t;
        const uint4* stage = own + step % STAGES * (UNITS * THREADS);
        // Beyond k nothing was copied.
        const auto read = [&](const uint4* from) { return at < k ? *from : make_uint4(0, 0, 0, 0); };
        uint4 w[WEIGHTS];
#pragma unroll
        for (int i = 0; i < WEIGHTS; i++) w[i] = read(stage + i * THREADS);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const uint4 x = read(j < SOURCES ? stage + (WEIGHTS + j) * THREADS
                                             : (const uint4*)((const T*)args.src + source[j] + at));
            const uint32_t low[2] = {x.x, x.y}, high[2] = {x.z, x.w};
#pragma unroll
            for (int i = 0; i < WEIGHTS; i += 2) {
                const uint32_t first[4] = {w[i].x, w[i + 1].x, w[i].y, w[i + 1].y};
                const uint32_t second[4] = {w[i].z, w[i + 1].z, w[i].w, w[i + 1].w};
                float(&sum)[4] = sums[PARTS == 2 ? i / 2 : 0][PARTS == 2 ? 0 : i / 2][j];
                multiply_add<T>(sum, first, low);
                multiply_add<T>(sum, second, high);
            }
        }
    };
    const uint32_t steps = (k + WARPS * STEP - 1) / (WARPS * STEP);
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (!early) copy_weights(step);
        copy_sources(step);
    }
    for (uint32_t step = 0; step < steps; step++) {
        copy_weights(step + STAGES - 1);
        copy_sources(step + STAGES - 1);
        copy_wait<STAGES - 1>();
        multiply(step);
    }
    copy_wait<0>();
    __syncthreads();  // the stages become room for sums

    // The warps' sums, band by band, always added in the same order.
    float(*room)[ROWS][16 + 1] = (float(*)[ROWS][16 + 1])shared;
    static_assert(sizeof(float) * WARPS * ROWS * (16 + 1) <= 16 * STAGES * UNITS * THREADS);
    constexpr int EACH = (ROWS * 16 + THREADS - 1) / THREADS;
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
        float gate[EACH] = {};
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (b + part > 0) __syncthreads();  // the band before was read
#pragma unroll
            for (int j = 0; j < TILES; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) room[warp][8 * j + 2 * t + c % 2][g + 8 * (c / 2)] = sums[part][b][j][c];
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const uint32_t at = threadIdx.x + e * THREADS, i = at / 16, column = column0 + 16 * b + at % 16;
                const bool inside = at < ROWS * 16 && row0 + i < n && column < of.n;
                float sum = 0;
                if (inside) {
#pragma unroll
                    for (int other = 0; other < WARPS; other++) sum += room[other][i][at % 16];
                    if (part + 1 < PARTS) gate[e] = sum;
                    else put<T, EPILOGUE>(args, of, row0 + i, column, sum, gate[e]);
                }
                if (EPILOGUE == LOGITS) note_best(args, of, inside, row0 + i, column, sum);
            }
        }
    }
}

// In f32, without tensor cores: a warp a column, 8 rows at a time.
template <int EPILOGUE> __device__ void skinny_f32(const SkinnyArgs& args) {
    constexpr int PARTS = EPILOGUE == SWIGLU ? 2 : 1, ROWS = 8;
    note(args);
    uint32_t block = blockIdx.x;
    const Product& of = product_of<EPILOGUE>(args, block, WARPS);
    const RowSet& rows = args.rows[of.set];
    const uint32_t n = count_of(rows), k = args.k, lane = threadIdx.x % WARP;
    const uint32_t column = block * WARPS + threadIdx.x / WARP;
    if (column >= of.n) return;
    for (uint32_t row0 = blockIdx.y * ROWS; row0 < n; row0 += gridDim.y * ROWS) {
        float sums[PARTS][ROWS] = {};
        for (uint32_t at = 8 * lane; at < k; at += 8 * WARP) {
            float w[PARTS][8];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                load8(w[part], (const float*)(PARTS == 2 ? args.of[part].weight : of.weight) + (size_t)column * k + at);
            }
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                if (row0 + j >= n) break;
                const uint32_t row = EPILOGUE == STORE ? rows.index[row0 + j] - args.base : row0 + j;
                float x[8];
                load8(x, (const float*)args.src + (size_t)row * k + at);
#pragma unroll
                for (int part = 0; part < PARTS; part++)
#pragma unroll
                    for (int c = 0; c < 8; c++) sums[part][j] += w[part][c] * x[c];
            }
        }
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            if (row0 + j >= n) break;
            const float sum = warp_sum(sums[PARTS - 1][j]), gate = PARTS == 2 ? warp_sum(sums[0][j]) : 0;
            if (lane == 0) put<float, EPILOGUE>(args, of, row0 + j, column, sum, gate);
        }
    }
}

}  // namespace

#define SKINNY(name, epilogue)                                                             \
    KERNEL(name##_f32, SkinnyArgs, THREADS) { skinny_f32<epilogue>(args); }                \
    EARLY_KERNEL(name##_f16_8, SkinnyArgs, THREADS) { skinny<f16, 1, epilogue>(args); }    \
    EARLY_KERNEL(name##_f16_16, SkinnyArgs, THREADS) { skinny<f16, 2, epilogue>(args); }   \
    EARLY_KERNEL(name##_f16_32, SkinnyArgs, THREADS) { skinny<f16, 4, epilogue>(args); }   \
    EARLY_KERNEL(name##_f16_64, SkinnyArgs, THREADS) { skinny<f16, 8, epilogue>(args); }   \
    EARLY_KERNEL(name##_bf16_8, SkinnyArgs, THREADS) { skinny<bf16, 1, epilogue>(args); }  \
    EARLY_KERNEL(name##_bf16_16, SkinnyArgs, THREADS) { skinny<bf16, 2, epilogue>(args); } \
    EARLY_KERNEL(name##_bf16_32, SkinnyArgs, THREADS) { skinny<bf16, 4, epilogue>(args); } \
    EARLY_KERNEL(name##_bf16_64, SkinnyArgs, THREADS) { skinny<bf16, 8, epilogue>(args); }

SKINNY(skinny_store, STORE)
SKINNY(skinny_add, ADD)
SKINNY(skinny_logits, LOGITS)
SKINNY(skinny_swiglu, SWIGLU)
