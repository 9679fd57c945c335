// CUDA C++ for the host's compiler: a kernel's threads are fibers (emulator.cpp), device memory is the host's.
//
// build.rs rewrites __shared__ declarations on the way (so that shared memory can be filled with NaN and guarded) and
// puts each .cu file into a namespace of its own, as each is a module of its own on a GPU. Shared variables are
// references then: a lambda captures them by [&].
//
// Not here: spinning on what another thread or block will write (nobody else runs meanwhile), __activemask, weaker
// memory orders than the host's. A lost update without an atomic shows only between blocks.
#pragma once

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <utility>

#include "async.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ thread_local // never seen by the compiler behind build.rs
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define KERNEL(name, Args, threads, ...)                                                                               \
    static void name(const Args& args);                                                                                \
    [[maybe_unused]] static const bool emu_added_##name =                                                              \
        emu::add_kernel({#name, sizeof(Args), threads, [](const void* args) { name(*(const Args*)args); }});           \
    static void name([[maybe_unused]] const Args& args)
#define EARLY_KERNEL KERNEL

#define threadIdx (emu::now->thread)
#define blockIdx (emu::here->block)
#define blockDim (emu::here->block_dim)
#define gridDim (emu::here->grid_dim)
constexpr int warpSize = 32;

#define EMU_VECTOR(type, name)                                                                                         \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                           \
    struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; };                             \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                   \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR(unsigned short, ushort)
EMU_VECTOR(unsigned, uint)
EMU_VECTOR(int, int)
EMU_VECTOR(float, float)
EMU_VECTOR(double, double)
#undef EMU_VECTOR

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Barriers

inline void __syncthreads(emu::Site site = emu::Site::here()) { emu::barrier(false, site); }
inline int __syncthreads_count(int yes, emu::Site site = emu::Site::here()) { return emu::barrier(yes, site).yes; }
inline int __syncthreads_or(int yes, emu::Site site = emu::Site::here()) { return emu::barrier(yes, site).yes > 0; }
inline int __syncthreads_and(int yes, emu::Site site = emu::Site::here()) {
    const emu::Votes votes = emu::barrier(yes, site);
    return votes.yes == votes.all;
}
inline void __threadfence() { emu::fence(false); }
inline void __threadfence_block() { emu::fence(true); }
[[noreturn]] inline void __trap() { emu::fail("__trap()"); }
inline void __nanosleep(unsigned) { emu::maybe_yield(); }

// What lanes of a warp do together

namespace emu {

// Calls f(lane, what it brought) for the lanes of the mask.
template <class Lane, class F> inline void each_lane(void* const lanes[32], uint32_t mask, F f) {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask), *(Lane*)lanes[__builtin_ctz(mask)]);
}

template <class T> T shuffle(const char* what, uint32_t mask, T value, uint32_t from, Site site) {
    struct Lane {
        T in, out;
        uint32_t from;
    } mine{value, value, from};
    collective(
        what, mask, &mine,
        [](void* const lanes[32], uint32_t mask) {
            each_lane<Lane>(lanes, mask, [&](uint32_t lane, Lane& to) {
                if (!(mask >> to.from & 1))
                    fail("lane %u reads lane %u, which is not in the mask %08x", lane, to.from, mask);
                to.out = ((Lane*)lanes[to.from])->in;
            });
        },
        site);
    return mine.out;
}

// The numbers of all lanes, combined: f(so far, lane, number).
template <class In, class Out, class F>
Out combine(const char* what, uint32_t mask, In value, Out first, F, Site site) {
    static_assert(std::is_empty_v<F>);
    struct Lane {
        In in;
        Out out;
    } mine{value, first};
    collective(
        what, mask, &mine,
        [](void* const lanes[32], uint32_t mask) {
            Out sum = ((Lane*)lanes[__builtin_ctz(mask)])->out;
            each_lane<Lane>(lanes, mask, [&](uint32_t lane, Lane& it) { sum = F()(sum, lane, it.in); });
            each_lane<Lane>(lanes, mask, [&](uint32_t, Lane& it) { it.out = sum; });
        },
        site);
    return mine.out;
}

} // namespace emu

inline void __syncwarp(unsigned mask = 0xffffffff, emu::Site site = emu::Site::here()) {
    emu::collective("__syncwarp", mask, nullptr, nullptr, site);
}
template <class T> T __shfl_sync(unsigned mask, T x, int from, int width = 32, emu::Site site = emu::Site::here()) {
    return emu::shuffle("__shfl_sync", mask, x, (emu::now->lane & -width) | (from & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, emu::Site site = emu::Site::here()) {
    const uint32_t lane = emu::now->lane, from = (lane ^ lanes) & 31;
    return emu::shuffle("__shfl_xor_sync", mask, x, from <= (lane | (width - 1)) ? from : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned lanes, int width = 32, emu::Site site = emu::Site::here()) {
    const uint32_t lane = emu::now->lane;
    return emu::shuffle("__shfl_up_sync", mask, x, (lane & (width - 1)) >= lanes ? lane - lanes : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned lanes, int width = 32, emu::Site site = emu::Site::here()) {
    const uint32_t lane = emu::now->lane;
    return emu::shuffle("__shfl_down_sync", mask, x,
                        (lane & (width - 1)) + lanes < unsigned(width) ? lane + lanes : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int yes, emu::Site site = emu::Site::here()) {
    return emu::combine(
        "__ballot_sync", mask, yes, 0u, [](unsigned s, uint32_t i, int x) { return s | unsigned(x != 0) << i; }, site);
}
inline int __any_sync(unsigned mask, int yes, emu::Site site = emu::Site::here()) {
    return emu::combine("__any_sync", mask, yes, 0, [](int s, uint32_t, int x) { return int(s || x); }, site);
}
inline int __all_sync(unsigned mask, int yes, emu::Site site = emu::Site::here()) {
    return emu::combine("__all_sync", mask, yes, 1, [](int s, uint32_t, int x) { return int(s && x); }, site);
}
#define EMU_REDUCE(type, name, first, how)                                                                             \
    inline type __reduce_##name##_sync(unsigned mask, type x, emu::Site site = emu::Site::here()) {                    \
        return emu::combine(                                                                                           \
            "__reduce_" #name "_sync", mask, x, type(first), [](type a, uint32_t, type b) { return how; }, site);      \
    }
EMU_REDUCE(unsigned, add, 0, a + b)
EMU_REDUCE(unsigned, min, -1, a < b ? a : b)
EMU_REDUCE(unsigned, max, 0, a > b ? a : b)
EMU_REDUCE(unsigned, and, -1, a & b)
EMU_REDUCE(unsigned, or, 0, a | b)
EMU_REDUCE(unsigned, xor, 0, a ^ b)
EMU_REDUCE(int, add, 0, a + b)
EMU_REDUCE(int, min, std::numeric_limits<int>::max(), a < b ? a : b)
EMU_REDUCE(int, max, std::numeric_limits<int>::min(), a > b ? a : b)
#undef EMU_REDUCE

// Atomics, which order nothing else. Other threads may run before, so that the order of threads is seldom that of their
// numbers.

namespace emu {
template <class T, class F> T update(T* at, F change) {
    maybe_yield();
    T old, next;
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    do next = change(old);
    while (!__atomic_compare_exchange(at, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
} // namespace emu

template <class T> T atomicAdd(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return T(old + x); });
}
template <class T> T atomicSub(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return T(old - x); });
}
template <class T> T atomicMax(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return old > x ? old : x; });
}
template <class T> T atomicMin(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return old < x ? old : x; });
}
template <class T> T atomicAnd(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return old & x; });
}
template <class T> T atomicOr(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return old | x; });
}
template <class T> T atomicXor(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return old ^ x; });
}
template <class T> T atomicExch(T* at, std::type_identity_t<T> x) {
    return emu::update(at, [=](T) { return x; });
}
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
    return emu::update(at, [=](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
    return emu::update(at, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* at, unsigned last) {
    return emu::update(at, [=](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}

// Memory, bits, numbers

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> void __stcg(T* at, T x) { *at = x; }
template <class T> void __stcs(T* at, T x) { *at = x; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __ull2double_rn(unsigned long long x) { return double(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }

// Of an int and an unsigned, CUDA makes unsigned numbers, as C does.
template <class A, class B> constexpr auto min(A a, B b)
    -> std::enable_if_t<std::is_arithmetic_v<A>, std::common_type_t<A, B>> {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
    else return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B> constexpr auto max(A a, B b)
    -> std::enable_if_t<std::is_arithmetic_v<A>, std::common_type_t<A, B>> {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
    else return T(a) > T(b) ? T(a) : T(b);
}
