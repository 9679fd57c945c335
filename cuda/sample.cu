// Choosing tokens from logits: the ones that the CPU chooses, by the same arithmetic (backend/cpu/sample.rs has the rules).
// Weights are whole numbers, so their sums do not depend on the order, and what is rounded is rounded alike: f64 by the
// intrinsics that the compiler does not fuse.
//
// A greedy row costs one launch, as its best comes with the logits. The others take three: what `top_k` leaves; weights,
// by blocks all over the GPU, because GPUs for games have little f64; nucleus and draw. What cannot be drawn is dropped
// on the way, so that few keys are left for the last.

#include "common.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int WEIGHERS = 256;
constexpr int EACH = SAMPLE_CHUNK / WEIGHERS;

constexpr uint64_t ONE = 1ull << 39;  // the weight of the best token
constexpr int WEIGHT_BITS = 40;

namespace {

// How a row is to be drawn.
struct Draw {
    float temperature;
    uint32_t top_k;  // 0: all
    float top_p, min_p;
    uint64_t random;

    __device__ explicit Draw(const uint32_t* words)
        : temperature(__uint_as_float(words[0])), top_k(words[1]), top_p(__uint_as_float(words[2])),
          min_p(__uint_as_float(words[3])), random((uint64_t)words[5] << 32 | words[4]) {}

    __device__ uint64_t least() const { return max((uint64_t)ceil(__dmul_rn(min_p, (double)ONE)), (uint64_t)1); }
};

__device__ Draw draw_of(const SampleArgs& args, uint32_t row) { return Draw(args.draws + row * SAMPLE_DRAW); }

__device__ uint64_t block_max(uint64_t x, uint64_t* room) {
    const int lane = threadIdx.x % WARP;
    const auto over_warp = [](uint64_t x) {
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(FULL, x, lanes));
        return x;
    };
    x = over_warp(x);
    if (lane == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    return over_warp(lane < (int)blockDim.x / WARP ? room[lane] : 0);
}

// Sums over the lanes before, of this one, and all of the warp.
template <class T> __device__ T before_in_warp(T x, T& all) {
    T sum = x;
    const uint32_t lane = threadIdx.x % WARP;
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const T other = __shfl_up_sync(FULL, sum, lanes);
        if (lane >= lanes) sum += other;
    }
    all = __shfl_sync(FULL, sum, WARP - 1);
    return sum - x;
}

struct Bins {
    unsigned long long amounts[256];
    uint64_t bin, wanted;
};

// The key at which the amounts of keys, from the largest key down, reach `wanted`, which becomes what is missing before it.
// `each(visit)` calls visit(key, amount) for all keys; their amounts reach `wanted` together.
template <int BITS, class Each> __device__ uint64_t reaching(uint64_t& wanted, Bins& bins, Each each) {
    uint64_t found = 0;
    for (int shift = BITS - 8; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) bins.amounts[threadIdx.x] = 0;
        __syncthreads();
        each([&](uint64_t key, uint64_t amount) {
            // The bits above are those that were found.
            if ((key ^ found) >> shift >> 8 == 0) atomicAdd(&bins.amounts[key >> shift & 255], (unsigned long long)amount);
        });
        __syncthreads();
        if (threadIdx.x < WARP) {
            // Eight bins a lane, the largest first.
            const int first = 255 - 8 * (int)threadIdx.x;
            uint64_t sum = 0, all;
            for (int i = 0; i < 8; i++) sum += bins.amounts[first - i];
            uint64_t before = before_in_warp(sum, all);
            if (before < wanted && wanted <= before + sum) {
                int bin = first;
                for (; before + bins.amounts[bin] < wanted; bin--) before += bins.amounts[bin];
                bins.bin = bin;
                bins.wanted = wanted - before;
            }
        }
        __syncthreads();
        found |= bins.bin << shift;
        wanted = bins.wanted;
    }
    return found;
}

// e^x * ONE, rounded, for x <= 0. See weight_of and exp in backend/cpu/sample.rs.
__device__ uint64_t weight_of(double x) {
    // Below, it rounds to 0: e^-28 * 2^39 is 0.38.
    if (!(x > -28)) return 0;
    constexpr double ROUND = 3ull << 51, SHIFT = 1ull << 52, LOG2_E = 1.4426950408889634;
    const double shifted = __dadd_rn(__dmul_rn(x, LOG2_E), ROUND), n = __dadd_rn(shifted, -ROUND);
    const double high = __longlong_as_double(0x3fe62e42fee00000), low = __longlong_as_double(0x3dea39ef35793c76);
    const double r = __dadd_rn(__dadd_rn(x, -__dmul_rn(n, high)), -__dmul_rn(n, low));
    constexpr double INVERSE_FACTORIALS[13] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
        1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
    double series = 0;
#pragma unroll
    for (int i = 12; i >= 0; i--) series = __dadd_rn(__dmul_rn(series, r), INVERSE_FACTORIALS[i]);
    const uint64_t power = ((uint64_t)__double_as_longlong(shifted) + 1023) << 52;
    const double exp = __dmul_rn(series, __longlong_as_double((long long)power));
    const double whole = __dadd_rn(__dmul_rn(exp, (double)ONE), SHIFT);
    return (uint64_t)__double_as_longlong(whole) ^ (uint64_t)__double_as_longlong(SHIFT);
}

// Calls visit(rank, 1) for the logits of a row in the groups whose best is at least of rank `bound`.
template <class Visit>
__device__ void each_high(const SampleArgs& args, const uint64_t* best, const float* logits, uint32_t bound, Visit visit) {
    const uint32_t lane = threadIdx.x % WARP;
    for (uint32_t first = threadIdx.x - lane; first < args.groups; first += THREADS) {
        const uint32_t group = first + lane;
        uint32_t high = __ballot_sync(FULL, group < args.groups && best[group] >> 32 >= bound);
        for (; high; high &= high - 1) {
            const uint32_t id = (first + __ffs(high) - 1) * SAMPLE_GROUP + lane;
            if (lane < SAMPLE_GROUP && id < args.vocab) visit(rank_of(logits[id]), 1);
        }
    }
}

}  // namespace

// The best of each group, where it did not come with the product.
KERNEL(sample_groups, SampleArgs, WEIGHERS) {
    const uint32_t group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= args.groups) return;
    const float* logits = args.logits + (size_t)blockIdx.y * args.vocab;
    uint64_t best = 0;
    for (uint32_t id = group * SAMPLE_GROUP; id < min((group + 1) * SAMPLE_GROUP, args.vocab); id++) {
        best = max(best, best_key(logits[id], id));
    }
    args.best[(size_t)blockIdx.y * args.groups + group] = best;
}

// The best token of a row, which is the choice of a greedy one; the bounds of what another may draw.
KERNEL(sample_select, SampleArgs, THREADS) {
    __shared__ uint64_t room[WARPS];
    __shared__ Bins bins;
    const uint32_t row = blockIdx.x;
    const float* logits = args.logits + (size_t)row * args.vocab;
    const uint64_t* best = args.best + (size_t)row * args.groups;
    uint64_t top = 0;
    for (uint32_t group = threadIdx.x; group < args.groups; group += THREADS) top = max(top, best[group]);
    top = block_max(top, room);
    const uint32_t rank = top >> 32, id = FULL - (uint32_t)top;
    const bool number = rank > rank_of(-INF) && rank < rank_of(INF);
    const bool drawn = number && args.draws && draw_of(args, row).temperature > 0;
    if (threadIdx.x == 0) {
        args.tokens[row] = number ? id : SAMPLE_NONE;
        if (args.draws) args.bounds[row].drawn = drawn;
    }
    if (!drawn) return;
    const Draw draw = draw_of(args, row);
    float floor = -INF;
    if (draw.top_k && draw.top_k < args.vocab) {
        // The k-th of the groups' best is not above the k-th of all: few groups have more to say.
        uint32_t bound = 0;
        uint64_t k = draw.top_k;
        if (k < args.groups) {
            bound = reaching<32>(k, bins, [&](auto visit) {
                for (uint32_t group = threadIdx.x; group < args.groups; group += THREADS) visit(best[group] >> 32, 1);
            });
        }
        k = draw.top_k;
        const uint32_t kth = reaching<32>(k, bins, [&](auto visit) { each_high(args, best, logits, bound, visit); });
        floor = of_rank(kth);
    }
    if (threadIdx.x == 0) {
        args.bounds[row].highest = of_rank(rank);
        args.bounds[row].floor = floor;
    }
}

// The sum of a chunk's weights, and the keys of those that may be drawn: weight, then the id within the chunk.
KERNEL(sample_weigh, SampleArgs, WEIGHERS) {
    __shared__ uint64_t room[WARP];
    __shared__ uint32_t warps[WARP];
    const uint32_t row = blockIdx.y, chunk = blockIdx.x, first = EACH * threadIdx.x;
    const SampleBounds bounds = args.bounds[row];
    if (!bounds.drawn) return;
    const float* logits = args.logits + (size_t)row * args.vocab;
    const Draw draw = draw_of(args, row);
    const double rate = __ddiv_rn(1, draw.temperature);
    uint64_t least = draw.least();
    if (draw.top_p < 1) {
        // Tokens so light do not matter to the nucleus even all together: the best alone leaves (1 - p) * ONE, but for
        // what is rounded.
        const double tail = (1.0 - draw.top_p) * (double)ONE * (1 - 1e-6) - 2;
        least = (uint64_t)max(tail / args.vocab, 0.0) + 1;
    }
    uint64_t weights[EACH], sum = 0;
    uint32_t kept = 0, all;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t id = chunk * SAMPLE_CHUNK + first + i;
        const float x = id < args.vocab ? logits[id] : -INF;
        const double distance = __dadd_rn((double)x, -(double)bounds.highest);
        weights[i] = x >= bounds.floor ? weight_of(__dmul_rn(distance, rate)) : 0;
        sum += weights[i];
        kept += weights[i] >= least;
    }
    uint32_t before = before_in_warp(kept, all);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = all;
    sum = block_sum(sum, room);  // with a barrier for `warps`, too
    for (uint32_t warp = 0; warp < threadIdx.x / WARP; warp++) before += warps[warp];
    const size_t at = (size_t)row * args.chunks + chunk;
    uint64_t* keys = args.keys + at * SAMPLE_CHUNK;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (weights[i] >= least) keys[before++] = weights[i] * SAMPLE_CHUNK + first + i;
    }
    if (threadIdx.x == WEIGHERS - 1) args.counts[at] = before;
    if (threadIdx.x == 0) args.sums[at] = sum;
}

namespace {

// The keys of a row.
struct Keys {
    const uint64_t* keys;
    const uint32_t* counts;
    uint32_t chunks;

    // Calls visit(weight, id) for the keys of some chunks, as many at a time as a warp has lanes; by id. All lanes call,
    // those without a key with weight 0. Ends when it answers that there is no more to do.
    template <class Visit> __device__ void visit(uint32_t first, uint32_t end, uint32_t step, Visit visit) const {
        for (uint32_t chunk = first; chunk < end; chunk += step) {
            const uint32_t count = counts[chunk];
            for (uint32_t i = 0; i < count; i += WARP) {
                const uint32_t at = i + threadIdx.x % WARP;
                const uint64_t key = at < count ? keys[(size_t)chunk * SAMPLE_CHUNK + at] : 0;
                if (!visit(key / SAMPLE_CHUNK, uint32_t(chunk * SAMPLE_CHUNK + key % SAMPLE_CHUNK))) return;
            }
        }
    }

    // The first id, in order, at which the amounts exceed wanted(their sum).
    template <class Amount, class Wanted>
    __device__ uint32_t find(uint64_t* room, uint32_t& found, Amount amount, Wanted wanted) const {
        const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const uint32_t each = (chunks + WARPS - 1) / WARPS, first = min(warp * each, chunks), end = min(first + each, chunks);
        uint64_t own = 0, total;
        visit(first, end, 1, [&](uint64_t weight, uint32_t id) {
            own += amount(weight, id);
            return true;
        });
        own = warp_sum(own);
        if (lane == 0) room[warp] = own;
        __syncthreads();
        uint64_t before = __shfl_sync(FULL, before_in_warp(room[lane], total), warp);
        const uint64_t left = wanted(total);
        if (before <= left && left < before + own) {
            visit(first, end, 1, [&](uint64_t weight, uint32_t id) {
                const uint64_t here = amount(weight, id);
                uint64_t all;
                const uint64_t start = before + before_in_warp(here, all);
                if (start <= left && left < start + here) found = id;
                before += all;
                return before <= left;
            });
        }
        __syncthreads();
        return found;
    }
};
static_assert(WARPS == WARP, "a lane for each warp");

}  // namespace

// Nucleus and draw of a row.
KERNEL(sample_draw, SampleArgs, THREADS) {
    __shared__ uint64_t room[3][WARPS];
    __shared__ uint32_t found[2];
    __shared__ Bins bins;
    const uint32_t row = blockIdx.x;
    if (!args.bounds[row].drawn) return;
    const Draw draw = draw_of(args, row);
    const size_t first = (size_t)row * args.chunks;
    const Keys keys{args.keys + first * SAMPLE_CHUNK, args.counts + first, args.chunks};
    // The last that may be drawn, by weight and then by id.
    uint64_t last_weight = 0;
    uint32_t last_id = FULL;
    if (draw.top_p < 1) {
        uint64_t total = 0;
        for (uint32_t chunk = threadIdx.x; chunk < args.chunks; chunk += THREADS) total += args.sums[first + chunk];
        total = block_sum(total, room[0]);
        uint64_t wanted = (uint64_t)ceil(__dmul_rn(draw.top_p, __ull2double_rn(total)));
        wanted = min(max(wanted, (uint64_t)1), total);
        last_weight = reaching<WEIGHT_BITS>(wanted, bins, [&](auto put) {
            keys.visit(threadIdx.x / WARP, args.chunks, WARPS, [&](uint64_t weight, uint32_t) {
                if (weight) put(weight, weight);
                return true;
            });
        });
        // So many of this weight are needed.
        const uint64_t more = (wanted + last_weight - 1) / last_weight;
        last_id = keys.find(
            room[1], found[0], [&](uint64_t weight, uint32_t) { return uint64_t(weight == last_weight); },
            [&](uint64_t) { return more - 1; });
    }
    const uint64_t least = max(draw.least(), last_weight);
    const auto share = [&](uint64_t weight, uint32_t id) {
        return weight >= least && (weight > last_weight || id <= last_id) ? weight : 0;
    };
    const uint32_t id =
        keys.find(room[2], found[1], share, [&](uint64_t total) { return __umul64hi(draw.random, total); });
    if (threadIdx.x == 0) args.tokens[row] = id;
}
