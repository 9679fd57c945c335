// What compute capability 9.0 adds: barriers in shared memory, copies of boxes of a matrix (TMA), matrix products of four
// warps from shared memory (wgmma), registers that warps hand over. PTX on a GPU, for sm_90a only; on the emulator the same
// functions in C++.
//
// Matrices of 16-bit numbers stand in shared memory in slabs of 64 columns: rows of 128 bytes, one behind the other, of
// which the 16-byte units are swizzled, so that a column of units lies in different banks. A slab begins at a multiple of
// 1024 bytes.
#pragma once

#include "common.cuh"

constexpr int WARPGROUP = 4 * WARP;
constexpr int SLAB = 64;
constexpr int SLAB_ALIGN = 1024;

// Counts arrivals, and bytes of asynchronous copies, phase by phase; 0 is the first phase's parity.
struct Barrier {
    uint64_t state;
};

// Where a number stands in a slab.
__device__ constexpr int in_slab(int row, int column) {
    return row * SLAB + ((column / 8 ^ row % 8) * 8 + column % 8);
}

// A matrix in shared memory as wgmma takes it (PTX ISA, matrix descriptor).
struct Operand {
    uint32_t low, high;
    __device__ Operand plus(int bytes) const { return {low + (bytes >> 4), high}; }
    __device__ uint64_t bits() const { return uint64_t(high) << 32 | low; }
};

#ifdef MINDSKIP_EMULATE
#include "emulator/hopper.h"
#else

__device__ inline uint32_t shared_address(const void* at) { return __cvta_generic_to_shared(at); }

// By one thread; a block's barrier after the fence makes it known to all, and to the copies.
__device__ inline void barrier_init(Barrier& barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and lets the phase last until so many bytes have come as well.
__device__ inline void barrier_arrive_expecting(Barrier& barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}
// Waits until the phase of this parity is over.
__device__ inline void barrier_wait(Barrier& barrier, uint32_t parity) {
    uint32_t over;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(over)
                     : "r"(shared_address(&barrier)), "r"(parity)
                     : "memory");
    } while (!over);
}

// Copies the box of the matrix that begins at (row, column) to shared memory; its bytes arrive at the barrier. By one
// thread.
__device__ inline void copy_box(void* to, const TensorMap& from, uint32_t row, uint32_t column, Barrier& barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&from), "r"(column), "r"(row), "r"(shared_address(&barrier))
                 : "memory");
}

// What the thread wrote to shared memory before it, wgmma and TMA find there afterwards.
__device__ inline void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers of some warps of a block, by number; 0 is that of __syncthreads(). `threads` counts those that wait and those
// that only arrive.
__device__ inline void group_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void group_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Whether any of the threads says yes.
__device__ inline bool group_any(uint32_t id, uint32_t threads, bool yes) {
    uint32_t any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"(uint32_t(yes))
                 : "memory");
    return any;
}

// By all warps of a warpgroup: threads have N registers from here on, of those that the block was launched with.
template <int N> __device__ inline void registers_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ inline void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// The upper half of an operand in slabs: eight rows are 1024 bytes apart, swizzled within 128 bytes.
constexpr uint32_t SLAB_OPERAND = 8 * 128 >> 4 | 1u << 30;
// A matrix whose rows are summed over: `at` is in a slab, at a multiple of 16 bytes.
__device__ inline Operand by_rows(const void* at) {
    return {(shared_address(at) & 0x3ffff) >> 4, SLAB_OPERAND};
}
// A matrix whose columns are summed over, in slabs that are `slab` bytes apart: `at` begins one of every 8 rows.
__device__ inline Operand by_columns(const void* at, uint32_t slab) {
    return {(shared_address(at) & 0x3ffff) >> 4 | slab >> 4 << 16, SLAB_OPERAND};
}

// Products are asynchronous: between the fence and the end of the wait nobody may touch their registers.
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `LEFT` groups are under way. The sums are of one that has ended: the compiler reads them no earlier.
template <int LEFT, int N> __device__ inline void products_wait(float (&d)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
    }
}

// The names of wgmma's operands: sums first.
#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D32 D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6), D4(7)
#define D64 D32, D4(8), D4(9), D4(10), D4(11), D4(12), D4(13), D4(14), D4(15)
#define R32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 \
    R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

template <class T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

// d = a . b^T, or d += where `add`: a [64, 16] and b [128, 16] by rows, d as of four multiply_add, warp by warp 16 rows.
template <class T> __device__ inline void multiply_async(float (&d)[16][4], Operand a, Operand b, bool add) {
#define PRODUCT(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
                 " {" R64 "}, %64, %65, p, 1, 1, 0, 0;\n}" \
                 : D64 \
                 : "l"(a.bits()), "l"(b.bits()), "r"(int(add)))
    if constexpr (IS_BF16<T>) PRODUCT("bf16");
    else PRODUCT("f16");
#undef PRODUCT
}

// d += a . b: a [64, 16] in registers, as of four multiply_add; b [16, 8 N] by columns.
template <class T, int N>
__device__ inline void multiply_async(float (&d)[N][4], const uint32_t (&a)[4], Operand b) {
    static_assert(N == 8 || N == 16);
#define PRODUCT(TYPE, COLUMNS, D, R, A, B) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE \
                 "." TYPE " {" R "}, {" A "}, " B ", p, 1, 1, 1;\n}" \
                 : D \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()))
    if constexpr (N == 8 && IS_BF16<T>) PRODUCT("bf16", "64", D32, R32, "%32,%33,%34,%35", "%36");
    else if constexpr (N == 8) PRODUCT("f16", "64", D32, R32, "%32,%33,%34,%35", "%36");
    else if constexpr (IS_BF16<T>) PRODUCT("bf16", "128", D64, R64, "%64,%65,%66,%67", "%68");
    else PRODUCT("f16", "128", D64, R64, "%64,%65,%66,%67", "%68");
#undef PRODUCT
}
#undef D4
#undef D32
#undef D64
#undef R32
#undef R64

#endif
