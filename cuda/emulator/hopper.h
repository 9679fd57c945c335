// The functions of hopper.cuh in C++; what they do is said there.
#pragma once

__device__ inline void barrier_init(Barrier& barrier, uint32_t arrivals) { emu::barrier_init(&barrier, arrivals); }
__device__ inline void barrier_init_fence() {}
__device__ inline void barrier_arrive(Barrier& barrier, emu::Site site = emu::Site::here()) {
    emu::barrier_arrive(&barrier, 0, site);
}
__device__ inline void barrier_arrive_expecting(Barrier& barrier, uint32_t bytes, emu::Site site = emu::Site::here()) {
    emu::barrier_arrive(&barrier, bytes, site);
}
__device__ inline void barrier_wait(Barrier& barrier, uint32_t parity, emu::Site site = emu::Site::here()) {
    emu::barrier_wait(&barrier, parity, site);
}
__device__ inline void copy_box(void* to, const TensorMap& from, uint32_t row, uint32_t column, Barrier& barrier,
                                emu::Site site = emu::Site::here()) {
    emu::copy_box(to, &from, row, column, &barrier, site);
}
__device__ inline void async_fence() { emu::async_fence(); }

__device__ inline void group_sync(uint32_t id, uint32_t threads, emu::Site site = emu::Site::here()) {
    emu::group_barrier(id, threads, true, false, site);
}
__device__ inline void group_arrive(uint32_t id, uint32_t threads, emu::Site site = emu::Site::here()) {
    emu::group_barrier(id, threads, false, false, site);
}
__device__ inline bool group_any(uint32_t id, uint32_t threads, bool yes, emu::Site site = emu::Site::here()) {
    return emu::group_barrier(id, threads, true, yes, site);
}

template <int N> __device__ inline void registers_fewer() { static_assert(N >= 24 && N <= 256 && N % 8 == 0); }
template <int N> __device__ inline void registers_more() { static_assert(N >= 24 && N <= 256 && N % 8 == 0); }

constexpr uint32_t SLAB_OPERAND = 8 * 128 >> 4 | 1u << 30;
__device__ inline Operand by_rows(const void* at) { return {emu::shared_address(at) >> 4, SLAB_OPERAND}; }
__device__ inline Operand by_columns(const void* at, uint32_t slab) {
    return {emu::shared_address(at) >> 4 | slab >> 4 << 16, SLAB_OPERAND};
}

__device__ inline void products_fence(emu::Site site = emu::Site::here()) { emu::products_fence(site); }
__device__ inline void products_commit(emu::Site site = emu::Site::here()) { emu::products_commit(site); }
template <int LEFT, int N>
__device__ inline void products_wait(float (&)[N][4], emu::Site site = emu::Site::here()) {
    emu::products_wait(LEFT, site);
}

template <class T>
__device__ inline void multiply_async(float (&d)[16][4], Operand a, Operand b, bool add,
                                      emu::Site site = emu::Site::here()) {
    emu::multiply_async({a.bits(), b.bits(), false, false, add, std::is_same_v<T, bf16>, 128}, d[0], nullptr, site);
}
template <class T, int N>
__device__ inline void multiply_async(float (&d)[N][4], const uint32_t (&a)[4], Operand b,
                                      emu::Site site = emu::Site::here()) {
    emu::multiply_async({0, b.bits(), true, true, true, std::is_same_v<T, bf16>, 8 * N}, d[0], a, site);
}
