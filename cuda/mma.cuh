// What CUDA C++ has no words for: tensor cores, asynchronous copies, conversions of 16-bit numbers. PTX on a GPU; on the
// emulator the same functions in C++. Everything here is there from sm_80 on.
#pragma once

#include <stdint.h>

// A 16-bit number in memory. Arithmetic is done in f32.
struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

#ifdef MINDSKIP_EMULATE
#include "emulator/mma.h"
#else

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest, ties to even. pack() puts two into a word, the first one low.
template <class T> __device__ T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x) { return x; }
template <> __device__ inline f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ inline bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <class T> __device__ uint32_t pack(float lo, float hi);
template <> __device__ inline uint32_t pack<f16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> __device__ inline uint32_t pack<bf16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

// 2^x, to 2 units in the last place; 0 for -inf.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes that are read once: they go past the L1 cache and leave it to what is read again.
__device__ inline uint4 load_once(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// Copies 16 bytes to shared memory without waiting, or zeros when not `valid`; `from` is then not read.
__device__ inline void copy_async(void* shared, const void* from, bool valid = true) {
    const uint32_t to = __cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// Closes the group of the thread's copies so far; waits until at most N groups are under way. Other threads see what was
// copied behind a barrier.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Has bytes, a multiple of 16, fetched into the L2 cache, where there is an instruction for many (sm_90).
__device__ inline void prefetch(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// What was read before wait_for_previous, and may be what stood there before.
__device__ inline uint32_t guess(uint32_t count) { return count; }

// Waits for the kernel before this one and for what it wrote, and lets the next one begin, which then waits for this one.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Four 8x8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes)
// and receives of each matrix, in a word, columns 2(l % 4) and the next of row l / 4; transposed: those of column l / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    const uint32_t at = __cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const uint32_t at = __cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// d += a . b for a [16, 16], b [16, 8], d [16, 8] in f32, all spread over the warp (PTX ISA, mma.m16n8k16). With
// g = lane / 4, t = lane % 4: a holds in its words rows g, g + 8, g, g + 8 of columns 2t, 2t, 2t + 8, 2t + 8 (and the
// next); b rows 2t, 2t + 8 (and the next) of column g; d rows g, g, g + 8, g + 8 of columns 2t, 2t + 1, 2t, 2t + 1.
template <class T> __device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> __device__ inline void multiply_add<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> __device__ inline void multiply_add<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
