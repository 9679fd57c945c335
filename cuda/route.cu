// Routing in one launch of one block: which rows are active, where they go, and what they see. It touches a few words a
// row, between ops that move thousands: what counts is the latency of one launch, not throughput.

#include "common.cuh"

constexpr int THREADS = 1024;

namespace {

struct Shared {
    double sums[WARP];
    uint32_t counts[WARP];
    uint32_t bins[256];
    uint32_t key, left;
};

// Exclusive prefix count of `flag` over the block's threads, and the count of all. Two barriers.
__device__ uint32_t count_before(bool flag, uint32_t& all, uint32_t* counts) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const uint32_t votes = __ballot_sync(FULL, flag);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    const uint32_t own = lane < warps ? counts[lane] : 0;
    const uint32_t below = warp_sum(lane < warp ? own : 0u);
    all = warp_sum(own);
    __syncthreads();
    return below + __popc(votes & ((1u << lane) - 1));
}

// Ascends with the logit; a NaN ranks with -inf, and -0 with 0.
__device__ uint32_t key_of(float logit) {
    const uint32_t bits = __float_as_uint(logit != logit ? -INF : logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Marks the ceil(share * rows) best of the rows [start, end), of equals the earlier ones: the key of the last one that
// goes in is found 8 bits at a time.
__device__ void top_k(const RouteArgs& args, uint32_t start, uint32_t end, Shared& shared) {
    // The rounding of the share to f32 adds no row: see top_count in src/backend/mod.rs.
    const double share = (double)args.share * (1.0 - (double)__FLT_EPSILON__) * (double)(end - start);
    const uint32_t wanted = min((uint32_t)ceil(fmax(share, 0.0)), end - start);
    if (wanted == 0 || wanted == end - start) {
        for (uint32_t row = start + threadIdx.x; row < end; row += blockDim.x) args.scratch[row] = wanted != 0;
        return;
    }
    uint32_t key = 0, left = wanted;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (uint32_t bin = threadIdx.x; bin < 256; bin += blockDim.x) shared.bins[bin] = 0;
        __syncthreads();
        for (uint32_t row = start + threadIdx.x; row < end; row += blockDim.x) {
            const uint32_t k = key_of(args.logits[row]);
            if (shift == 24 || (k ^ key) >> (shift + 8) == 0) atomicAdd(&shared.bins[k >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t bin = 255;
            while (shared.bins[bin] < left) left -= shared.bins[bin--];
            shared.key = key | bin << shift;
            shared.left = left;
        }
        __syncthreads();
        key = shared.key, left = shared.left;
    }
    // `left` rows with the last key go in.
    for (uint32_t tile = start; tile < end; tile += blockDim.x) {
        const uint32_t row = tile + threadIdx.x;
        const uint32_t k = row < end ? key_of(args.logits[row]) : 0;
        uint32_t equal;
        const uint32_t before = count_before(row < end && k == key, equal, shared.counts);
        if (row < end) args.scratch[row] = k > key || (k == key && before < left);
        left -= min(left, equal);
    }
}

// Whether each row is active, into scratch.
__device__ void decide(const RouteArgs& args, Shared& shared) {
    if (args.decide == ROUTE_ALL || args.decide == ROUTE_THRESHOLD) {
        for (uint32_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
            args.scratch[row] = args.decide == ROUTE_ALL || sigmoid(args.logits[row]) >= args.share;
        }
        return;
    }
    for (uint32_t seq = 0; seq < args.seqs; seq++) {
        const uint32_t start = args.seq_start[seq], end = args.seq_start[seq + 1];
        if (args.decide == ROUTE_TOP_K) {
            top_k(args, start, end, shared);
            continue;
        }
        uint32_t decided = args.decided[seq];
        if (decided > 1) {
            double sum = 0;
            for (uint32_t row = start + threadIdx.x; row < end; row += blockDim.x) sum += args.logits[row];
            sum = block_sum(sum, shared.sums);
            decided = sigmoid((float)(sum / (end - start))) >= args.share;
            __syncthreads();
            if (threadIdx.x == 0) args.decided[seq] = decided;
        }
        for (uint32_t row = start + threadIdx.x; row < end; row += blockDim.x) args.scratch[row] = decided;
    }
}

// The last of the sequences that begin at or below `row`.
__device__ uint32_t sequence_of(const RouteArgs& args, uint32_t row) {
    uint32_t low = 0, high = args.seqs;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (args.seq_start[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

}  // namespace

KERNEL(route, RouteArgs, THREADS) {
    __shared__ Shared shared;
    decide(args, shared);
    __syncthreads();

    // scratch[row]: twice the active rows below it, plus one when it is active itself.
    uint32_t found = 0;
    for (uint32_t tile = 0; tile < args.rows; tile += blockDim.x) {
        const uint32_t row = tile + threadIdx.x;
        const bool active = row < args.rows && args.scratch[row];
        uint32_t all;
        const uint32_t at = found + count_before(active, all, shared.counts);
        if (active) args.active[at] = row;
        if (row < args.rows) args.scratch[row] = 2 * at + active;
        found += all;
    }
    if (threadIdx.x == 0) args.scratch[args.rows] = 2 * found;
    __syncthreads();

    const KvLayer& kv = args.kv;
    const auto below = [&](uint32_t row) { return args.scratch[row] / 2; };
    for (uint32_t cut = threadIdx.x; cut < args.cuts; cut += blockDim.x) args.active_at[cut] = below(args.cut_rows[cut]);

    for (uint32_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
        const uint32_t seq = sequence_of(args, row), start = args.seq_start[seq], slot = args.slots[seq];
        const uint32_t old = kv.lens[slot], at = below(row), at_start = below(start), active = args.scratch[row] & 1;
        const bool keeps = !args.keys_active || active, queries = !args.queries_active || active;
        const uint32_t own = old + (args.keys_active ? at - at_start : row - start);
        if (keeps) args.kv_row[args.keys_active ? at : row] = own;
        if (!queries) continue;
        const uint32_t end = own + keeps;
        uint32_t first = 0;
        if (args.window) {
            // Positions ascend over the rows that are held and those of this step that are kept.
            const uint32_t* pages = kv.tables + (size_t)slot * kv.pages_per_seq;
            uint32_t high = end;
            while (first < high) {
                const uint32_t middle = (first + high) / 2, step = middle - old;
                const uint32_t position = middle < old ? kv.positions[pages[middle / KV_PAGE] * KV_PAGE + middle % KV_PAGE]
                                                       : args.pos[args.keys_active ? args.active[at_start + step] : start + step];
                if ((uint64_t)position + args.window <= args.pos[row]) first = middle + 1;
                else high = middle;
            }
        }
        const uint32_t query = args.queries_active ? at : row;
        args.first[query] = first;
        args.end[query] = end;
    }
    __syncthreads();  // every row has read what its sequence held
    for (uint32_t seq = threadIdx.x; seq < args.seqs; seq += blockDim.x) {
        const uint32_t start = args.seq_start[seq], end = args.seq_start[seq + 1];
        args.kv.lens[args.slots[seq]] += args.keys_active ? below(end) - below(start) : end - start;
    }
}
