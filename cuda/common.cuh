// What all kernels share: how they are named, 16-byte access to rows, sums over a warp and a block.
#pragma once

#ifdef MINDSKIP_EMULATE
#include "emulator/cuda.h"
#endif
#include "kernels.h"
#include "mma.cuh"

// KERNEL(name, Args, threads) { body } is a kernel of blocks of at most `threads` that finds its arguments in `args`. A
// number behind that is of blocks that a multiprocessor holds: registers are made to do for so many, not for more.
//
// From sm_90 on a kernel may begin while the one before it ends (programmatic dependent launch), and waits for it; one made
// by EARLY_KERNEL says itself where, and all of its threads do. All that ran before the one before is over by then.
#ifndef MINDSKIP_EMULATE
#define EARLY_KERNEL(name, Args, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Args args)
#define KERNEL(name, Args, ...) \
    static __device__ __forceinline__ void name##_body(const Args& args); \
    EARLY_KERNEL(name, Args, __VA_ARGS__) { \
        wait_for_previous(); \
        name##_body(args); \
    } \
    static __device__ __forceinline__ void name##_body([[maybe_unused]] const Args& args)
#endif

constexpr int WARP = 32;
constexpr uint32_t FULL = 0xffffffff;
constexpr float INF = __builtin_huge_valf();
__device__ inline float quiet_nan() { return __uint_as_float(0x7fc00000); }

// The number of rows of a set.
__device__ inline uint32_t count_of(const RowSet& rows) { return rows.count ? *rows.count : rows.bound; }

// Notes what an op did; called by one thread of the grid.
__device__ inline void note_rows(WorkCount* work, uint32_t rows, uint32_t kv_rows = 0) {
    if (!work) return;
    if (rows) {
        atomicAdd((unsigned long long*)&work->row_calls, 1ull);
        atomicAdd((unsigned long long*)&work->rows, (unsigned long long)rows);
    }
    if (kv_rows) {
        atomicAdd((unsigned long long*)&work->kv_calls, 1ull);
        atomicAdd((unsigned long long*)&work->kv_rows, (unsigned long long)kv_rows);
    }
}

// Eight consecutive numbers of a row, as f32. Rows start at multiples of 16 bytes and are multiples of 8 long.
__device__ inline void load8(float (&x)[8], const float* from) {
    const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
template <class T> __device__ inline void unpack8(float (&x)[8], const uint4& words) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = to_f32(T{uint16_t(w[i])});
        x[2 * i + 1] = to_f32(T{uint16_t(w[i] >> 16)});
    }
}
template <class T> __device__ inline void load8(float (&x)[8], const T* from) { unpack8<T>(x, *(const uint4*)from); }

__device__ inline void store8(float* to, const float (&x)[8]) {
    ((float4*)to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
template <class T> __device__ inline void store8(T* to, const float (&x)[8]) {
    *(uint4*)to = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
}

// The same where the type of the numbers is known at run time only: it does not matter beside what else is read.
template <class T> constexpr uint32_t TYPE = TYPE_F32;
template <> constexpr uint32_t TYPE<f16> = TYPE_F16;
template <> constexpr uint32_t TYPE<bf16> = TYPE_BF16;
__device__ inline void load8_of(uint32_t type, float (&x)[8], const void* from, size_t at) {
    if (type == TYPE_F32) load8(x, (const float*)from + at);
    else if (type == TYPE_F16) load8(x, (const f16*)from + at);
    else load8(x, (const bf16*)from + at);
}
__device__ inline void store8_of(uint32_t type, void* to, size_t at, const float (&x)[8]) {
    if (type == TYPE_F32) store8((float*)to + at, x);
    else if (type == TYPE_F16) store8((f16*)to + at, x);
    else store8((bf16*)to + at, x);
}
__device__ inline void store_of(uint32_t type, void* to, size_t at, float x) {
    if (type == TYPE_F32) ((float*)to)[at] = x;
    else if (type == TYPE_F16) ((f16*)to)[at] = from_f32<f16>(x);
    else ((bf16*)to)[at] = from_f32<bf16>(x);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }

// The order of numbers as that of integers; 0 and -0 are the same, a NaN is above all.
__device__ inline uint32_t rank_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    if (x != x) return FULL;
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ inline float of_rank(uint32_t rank) { return __uint_as_float(rank >> 31 ? rank ^ 1u << 31 : ~rank); }

// Larger for the better token: the larger logit, of equals the lower id.
__device__ inline uint64_t best_key(float logit, uint32_t id) { return (uint64_t)rank_of(logit) << 32 | (FULL - id); }

// Lanes that take a head of twice `half` numbers, each 8 of its lower half and the 8 of its upper half that they are rotated
// against: half / 8, rounded up to a power of 2 so that they lie in one warp.
__device__ inline uint32_t lanes_of_head(uint32_t half) { return half <= 8 ? 1 : 1u << (32 - __clz(half / 8 - 1)); }

// Sums over the lanes of a warp, the same in all of them.
template <class T> __device__ inline T warp_sum(T x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(FULL, x, lanes);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, lanes));
    return x;
}

// The sum over a block, the same in all threads; `room` holds a number for each warp and may be used again behind the next
// barrier.
template <class T> __device__ inline T block_sum(T x, T* room) {
    const int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    x = warp_sum(x);
    if (lane == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(lane < warps ? room[lane] : T(0));
}
