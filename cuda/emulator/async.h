// What goes on beside the threads of a block, as on compute capability 9.0: barriers that copies arrive at, copies of boxes,
// products of warpgroups, barriers of some warps (async.cpp). hopper.cuh says what each does.
#pragma once

#include <string>

#include "runtime.h"

namespace emu {

// For kernels.

void barrier_init(void* barrier, uint32_t arrivals);
void barrier_arrive(void* barrier, uint32_t expected_bytes, Site site);
void barrier_wait(void* barrier, uint32_t parity, Site site);

void copy_box(void* to, const void* map, uint32_t row, uint32_t column, void* barrier, Site site);
void async_fence();

// Barriers of warps; whether any thread said yes, to those that wait.
bool group_barrier(uint32_t id, uint32_t threads, bool waits, bool yes, Site site);

// Where something stands in shared memory, below 256 KiB.
uint32_t shared_address(const void* at);

// d [64, n] (+)= a [64, 16] . b [16, n]; `a` in registers, or an operand in shared memory like `b`.
struct Product {
    uint64_t a_operand, b_operand;
    bool a_in_registers, b_by_columns, add, is_bf16;
    uint32_t n;
    bool operator==(const Product&) const = default;
};
void multiply_async(const Product& product, float* d, const uint32_t* a, Site site);
void products_fence(Site site);
void products_commit(Site site);
void products_wait(uint32_t groups_left, Site site);

// For emulator.cpp.

// A block starts.
void async_begin();
// Whether copies are under way.
extern __thread bool copying __attribute__((tls_model("initial-exec")));
// A piece of one arrives.
void async_copy_piece();
// What is under way when the block ends, or nothing.
std::string async_left();

// What emulator.cpp does for async.cpp.

struct Range {
    char *begin, *end;
};
Range dynamic_range(); // of the block's shared memory
uint32_t draw(uint32_t below);
// Another thread runs now.
void yield();
// The calling thread waits until it is woken.
void park(const char* what, Site site);
void wake(uint32_t thread);
// What the calling thread did comes before what others do that call order_after() with the same address later.
void order_before(void* at);
void order_after(void* at);

} // namespace emu
