// The functions of mma.cuh in C++; what they do is said there.
#pragma once

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_f32(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent's bias differs by 112; a product is exact for subnormal numbers too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

template <class T> __device__ T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x) { return x; }
template <> __device__ inline f16 from_f32<f16>(float x) {
    const uint32_t bits = __float_as_uint(x), rest = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    uint32_t y;
    if (rest > 0x7f800000) return {0x7fff}; // the NaN that a GPU gives
    if (rest >= 0x477ff000) y = 0x7c00;     // from 65520 on: infinity
    else if (rest < 0x38800000)
        y = __float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000; // 0.5 has the ulp of subnormal f16
    else y = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
    return {uint16_t(sign | y)};
}
template <> __device__ inline bf16 from_f32<bf16>(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T> __device__ uint32_t pack(float lo, float hi) {
    return from_f32<T>(lo).bits | uint32_t(from_f32<T>(hi).bits) << 16;
}

__device__ inline void prefetch(const void* from, uint32_t bytes) {
    emu::check16("prefetch", from, false);
    if (bytes % 16) emu::fail("prefetch: %u bytes, which is no multiple of 16", bytes);
}

// Kernels run one after the other; a wrong guess is made up.
__device__ inline uint32_t guess(uint32_t count) { return emu::chance() ? count : count ? 0 : 1; }
__device__ inline void wait_for_previous() {}

__device__ inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

__device__ inline uint4 load_once(const void* from) {
    emu::check16("load_once", from, false);
    return *(const uint4*)from;
}

__device__ inline void copy_async(void* shared, const void* from, bool valid = true) {
    emu::copy_async(shared, valid ? from : nullptr);
}
__device__ inline void copy_commit() { emu::copy_commit(); }
template <int N> __device__ inline void copy_wait() { emu::copy_wait(N); }

namespace emu_mma {

struct MatrixRow {
    const uint16_t* row;
    uint32_t* r;
};
template <bool transposed> void load_matrices(void* const lanes[32], uint32_t) {
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++) {
            const auto at = [&](int row, int column) { return ((MatrixRow*)lanes[8 * m + row])->row[column]; };
            const int g = lane / 4, t = lane % 4;
            ((MatrixRow*)lanes[lane])->r[m] =
                transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
        }
}

struct Fragments {
    float* d;
    const uint32_t *a, *b;
};
// Much of a matrix product's time passes here: without the compiler's checks, and in vectors.
using Row = float __attribute__((vector_size(32)));
template <class T> __attribute__((no_sanitize("undefined"))) void multiply_add(void* const lanes[32], uint32_t) {
    float a[16][16];
    Row b[16];
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& it = *(Fragments*)lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            float* to = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
            to[0] = to_f32(T{uint16_t(it.a[i])}), to[1] = to_f32(T{uint16_t(it.a[i] >> 16)});
        }
        for (int i = 0; i < 2; i++) {
            Row* to = &b[2 * t + 8 * i];
            to[0][g] = to_f32(T{uint16_t(it.b[i])}), to[1][g] = to_f32(T{uint16_t(it.b[i] >> 16)});
        }
    }
    for (int row = 0; row < 16; row++) {
        Row sums = {};
        for (int k = 0; k < 16; k++) sums += a[row][k] * b[k];
        for (int t = 0; t < 4; t++) {
            float* d = ((Fragments*)lanes[row % 8 * 4 + t])->d + row / 8 * 2;
            d[0] += sums[2 * t], d[1] += sums[2 * t + 1];
        }
    }
}

} // namespace emu_mma

__device__ inline void load_matrices(uint32_t (&r)[4], const void* row, emu::Site site = emu::Site::here()) {
    emu::check16("load_matrices", row, true);
    emu::reads16(row);
    emu_mma::MatrixRow mine{(const uint16_t*)row, r};
    emu::collective("load_matrices", 0xffffffff, &mine, emu_mma::load_matrices<false>, site);
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, emu::Site site = emu::Site::here()) {
    emu::check16("load_matrices_transposed", row, true);
    emu::reads16(row);
    emu_mma::MatrixRow mine{(const uint16_t*)row, r};
    emu::collective("load_matrices_transposed", 0xffffffff, &mine, emu_mma::load_matrices<true>, site);
}

template <class T> __device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                emu::Site site = emu::Site::here()) {
    emu_mma::Fragments mine{d, a, b};
    emu::collective("multiply_add", 0xffffffff, &mine, emu_mma::multiply_add<T>, site);
}
