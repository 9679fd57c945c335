// Kernels with what compute capability 9.0 adds, right and with one fault each; tests/emulator.rs knows what they must write.
#include "../../hopper.cuh"

namespace {

enum Fault {
    NONE,
    NO_WAIT_FOR_COPY,    // multiplies what may not have come yet
    NO_WAIT_FOR_PRODUCT, // reads sums that are under way
    NO_PRODUCTS_FENCE,   // behind what touched the sums
    TOUCHED,             // sums, while they are under way
    RELEASED_EARLY,      // what a product that is under way reads
    NEVER_RELEASED,      // so the copies wait for ever
    TOO_MANY_ARRIVALS,
    NO_BARRIER,       // at an address that is none
    MISALIGNED,       // where the box goes
    OVERLAPPING,      // two copies to one place
    LEFT_OUT,         // a product, by one warp of the warpgroup
    LEFT_UNDER_WAY,   // a copy, when the block ends
    DIFFERENT_COUNTS, // of the threads at a barrier of warps
};

template <class T> __device__ T& aligned_shared() {
    extern __shared__ uint4 shared[];
    return *(T*)((uintptr_t(shared) + SLAB_ALIGN - 1) / SLAB_ALIGN * SLAB_ALIGN);
}

// The rows and columns of the sums of 8 N columns that a thread of a warpgroup holds.
template <int N, class F> __device__ void each_sum(const float (&d)[N][4], F f) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = 0; i < N; i++)
        for (int c = 0; c < 4; c++) f(16 * warp + lane / 4 + c / 2 * 8, 8 * i + lane % 4 * 2 + c % 2, d[i][c]);
}

} // namespace

struct BoxSumArgs {
    TensorMap x; // [64 n, 64] in boxes of [64, 64]
    float* out;  // [n, 64, 64]
    uint32_t n;
};

// out[i] = ones . x[64 i .. 64 i + 64], by a warpgroup that multiplies and a warp that copies the next box meanwhile.
template <Fault fault> __device__ void box_sum(const BoxSumArgs& args) {
    struct Room {
        bf16 boxes[2][64 * SLAB];
        Barrier full[2], free[2], none;
    };
    Room& room = aligned_shared<Room>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) barrier_init(room.full[i], 1), barrier_init(room.free[i], 4);
        barrier_init_fence();
    }
    __syncthreads();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (warp == 4) {
        for (uint32_t i = 0; i < args.n && lane == 0; i++) {
            const uint32_t at = i % 2, parity = i / 2 % 2;
            barrier_wait(room.free[at], parity ^ 1);
            barrier_arrive_expecting(room.full[at], sizeof room.boxes[at]);
            copy_box(room.boxes[at] + (fault == MISALIGNED ? 8 : 0), args.x, 64 * i, 0, room.full[at]);
            if (fault == OVERLAPPING) copy_box(room.boxes[at], args.x, 64 * i, 0, room.full[at]);
            if (fault == TOO_MANY_ARRIVALS) barrier_arrive(room.full[at]), barrier_arrive(room.full[at]);
            if (fault == NO_BARRIER) barrier_arrive(room.none);
        }
        return;
    }
    const auto release = [&](Barrier& free) {
        __syncwarp();
        if (lane == 0) barrier_arrive(free);
    };
    group_sync(1, fault == DIFFERENT_COUNTS && warp == 0 ? 2 * WARPGROUP : WARPGROUP);
    for (uint32_t i = 0; i < args.n; i++) {
        const uint32_t at = i % 2, parity = i / 2 % 2;
        if (fault != NO_WAIT_FOR_COPY) barrier_wait(room.full[at], parity);
        float d[8][4] = {};
        const uint32_t one = pack<bf16>(1, 1), ones[4] = {one, one, one, one};
        if (fault != NO_PRODUCTS_FENCE) products_fence();
        for (int k = 0; k < 4; k++) {
            if (fault == LEFT_OUT && warp == 2 && k == 3) break;
            multiply_async<bf16>(d, ones, by_columns(room.boxes[at], sizeof room.boxes[at]).plus(k * 16 * SLAB * 2));
        }
        if (fault == TOUCHED) d[3][2] = 1;
        products_commit();
        if (fault == RELEASED_EARLY) release(room.free[at]);
        if (fault != NO_WAIT_FOR_PRODUCT) products_wait<0>(d);
        if (fault != RELEASED_EARLY && fault != NEVER_RELEASED) release(room.free[at]);
        each_sum(d, [&](int row, int column, float x) { args.out[(64 * i + row) * 64 + column] = x; });
        if (fault == NO_WAIT_FOR_PRODUCT) products_wait<0>(d);
        if (fault == LEFT_UNDER_WAY) return;
    }
}

#define BOX_SUM(name, fault) \
    KERNEL(name, BoxSumArgs, WARPGROUP + WARP) { box_sum<fault>(args); }
BOX_SUM(emu_box_sum, NONE)
BOX_SUM(emu_box_no_wait_for_copy, NO_WAIT_FOR_COPY)
BOX_SUM(emu_box_no_wait_for_product, NO_WAIT_FOR_PRODUCT)
BOX_SUM(emu_box_no_products_fence, NO_PRODUCTS_FENCE)
BOX_SUM(emu_box_touched, TOUCHED)
BOX_SUM(emu_box_released_early, RELEASED_EARLY)
BOX_SUM(emu_box_never_released, NEVER_RELEASED)
BOX_SUM(emu_box_too_many_arrivals, TOO_MANY_ARRIVALS)
BOX_SUM(emu_box_no_barrier, NO_BARRIER)
BOX_SUM(emu_box_misaligned, MISALIGNED)
BOX_SUM(emu_box_overlapping, OVERLAPPING)
BOX_SUM(emu_box_left_out, LEFT_OUT)
BOX_SUM(emu_box_left_under_way, LEFT_UNDER_WAY)
BOX_SUM(emu_box_different_counts, DIFFERENT_COUNTS)

struct OperandsArgs {
    const void* x; // [64, 64], then [128, 64]
    float* out;    // [64, 128]
    uint32_t n;
};

// out = x . y^T for y behind x, which threads bring to shared memory.
template <class T, bool fence> __device__ void operands(const OperandsArgs& args) {
    using Rows = T[192 * SLAB];
    Rows& rows = aligned_shared<Rows>();
    for (int i = threadIdx.x; i < 192 * 64; i += WARPGROUP) rows[in_slab(i / 64, i % 64)] = ((const T*)args.x)[i];
    if (fence) async_fence();
    __syncthreads();
    float d[16][4];
    products_fence();
    const Operand x = by_rows(rows), y = by_rows(rows + 64 * SLAB);
    for (int k = 0; k < 4; k++) multiply_async<T>(d, x.plus(32 * k), y.plus(32 * k), k > 0);
    products_commit();
    products_wait<0>(d);
    each_sum(d, [&](int row, int column, float x) { args.out[row * 128 + column] = x; });
}
KERNEL(emu_operands_f16, OperandsArgs, WARPGROUP) { operands<f16, true>(args); }
KERNEL(emu_operands_bf16, OperandsArgs, WARPGROUP) { operands<bf16, true>(args); }
KERNEL(emu_operands_no_fence, OperandsArgs, WARPGROUP) { operands<bf16, false>(args); }

// Warps 1 and 2 wait in turns for each other; out[t] is the number of turns that went wrong, out[96] whether any thread is 70.
KERNEL(emu_turns, OperandsArgs, 96) {
    __shared__ int turn;
    if (threadIdx.x == 0) turn = 1;
    __syncthreads();
    const int warp = threadIdx.x / WARP;
    int wrong = 0;
    if (warp == 2) group_arrive(1, 64);
    for (int i = 0; i < 5 && warp > 0; i++) {
        group_sync(warp, 64);
        wrong += turn != warp;
        __syncwarp();
        if (threadIdx.x % WARP == 0) turn = 3 - warp;
        __syncwarp();
        group_arrive(3 - warp, 64);
    }
    if (warp == 1) group_sync(1, 64);
    args.out[threadIdx.x] = wrong;
    const bool any = group_any(4, 96, threadIdx.x == 70), none = group_any(4, 96, false);
    if (threadIdx.x == 0) args.out[96] = any && !none;
}
