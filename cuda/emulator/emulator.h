/* The emulator of CUDA kernels, as Rust sees it. */
#ifndef MINDSKIP_EMULATOR_H
#define MINDSKIP_EMULATOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The kernel of that name; NULL when there is none. */
const void* emu_kernel(const char* name);

/* Runs a grid of blocks of `threads` with `shared` bytes of dynamic shared memory and returns when it is done: 0, or
 * another number and a text in `error` that says which thread of which block did what. After a fault nothing is
 * promised of what the kernel writes. */
int emu_launch(const void* kernel, const uint32_t grid[3], uint32_t threads, uint32_t shared, const void* args,
               size_t args_size, char* error, size_t error_room);

/* Threads run in an order drawn from the seed and the number of launches since; the same seed, the same order. */
void emu_seed(uint64_t seed);

/* Device memory: starts at a multiple of 256 bytes, full of NaN (0xff bytes), unreadable pages before and behind. NULL
 * when there is none left. A launch fails that has changed the bytes between the end of a buffer and the unreadable
 * page. */
void* emu_alloc(size_t size);
void emu_free(void* buffer);

/* A row-major matrix of numbers of `element` bytes in device memory, and the box of it that a copy takes, swizzled within
 * 128 bytes. Returns other than 0 where cuTensorMapEncodeTiled would refuse. */
int emu_tensor_map(uint64_t map[16], const void* base, uint64_t rows, uint64_t columns, uint32_t element,
                   uint32_t box_rows, uint32_t box_columns);

#ifdef __cplusplus
}
#endif

#endif
