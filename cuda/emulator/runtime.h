// What the emulated CUDA functions of cuda.h and mma.h ask of emulator.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct uint3 {
    unsigned x, y, z;
};

namespace emu {

// A place in the source. As a default argument it is the place of the call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// The thread that runs, and its block.
struct Thread {
    uint3 thread;
    uint32_t lane;
};
struct Place {
    uint3 block, block_dim, grid_dim;
};
extern __thread Thread* now __attribute__((tls_model("initial-exec")));
extern __thread Place* here __attribute__((tls_model("initial-exec")));

// Abandons the block; the launch returns the text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for all threads of the block that have not exited.
struct Votes {
    uint32_t yes, all;
};
Votes barrier(bool vote, Site site);

// Waits until all lanes of the mask have come with the same mask and `finish`; the last one calls it with what each
// lane brought. What lanes bring stands on their stacks, which stay as they are while they wait. Without a `finish` they
// exchange nothing, and their accesses to memory are ordered, as by __syncwarp; with one they are not.
using Finish = void (*)(void* const lanes[32], uint32_t mask);
void collective(const char* what, uint32_t mask, void* mine, Finish finish, Site site);

// Another thread may run now.
void maybe_yield();
bool chance();

// __threadfence, or __threadfence_block.
void fence(bool of_block);

void* dynamic_shared();
// Memory of the block for the __shared__ variables of one declaration, which `key` stands for.
void* static_shared(const void* key, size_t size, size_t align, Site site);
template <class Variables> inline char declaration;
template <class Variables> Variables& static_shared(Site site = Site::here()) {
    return *(Variables*)static_shared(&declaration<Variables>, sizeof(Variables), alignof(Variables), site);
}

// Fails unless it is a multiple of 16 bytes and, if asked for, 16 bytes of shared memory.
void check16(const char* what, const void* address, bool shared);

// The calling thread reads 16 bytes that another one may take to its registers.
void reads16(const void* address);

void copy_async(void* to, const void* from);
void copy_commit();
void copy_wait(uint32_t groups_left);

struct Kernel {
    const char* name;
    size_t args_size;
    uint32_t threads; // at most
    void (*run)(const void* args);
};
bool add_kernel(const Kernel& kernel);

} // namespace emu
