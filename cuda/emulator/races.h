// Missing barriers, found by ThreadSanitizer: with EMU_RACES every CUDA thread is one of its threads. What orders their
// accesses is what CUDA says does: the block's barriers, __syncwarp, fences, begin and end of a launch. Shuffles, votes
// and atomics by themselves order nothing.
//
// Kernels are compiled with -fsanitize=thread and emulator.cpp is not, so what it touches itself, and what Rust does, is
// nobody's access. Without EMU_RACES all of this is nothing.
#pragma once

#include <string>

#ifdef EMU_RACES
#include <fcntl.h>
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
#include <stdint.h>
#include <string.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_read16_pc(const void*, void* place);
void __tsan_write16_pc(void*, void* place);
int __tsan_get_report_data(void* report, const char** what, int* count, int* stacks, int* accesses, int* locations,
                           int* mutexes, int* threads, int* thread_ids, void** sleep, unsigned long sleep_room);
int __tsan_get_report_mop(void* report, unsigned long which, int* thread, void** address, int* size, int* write,
                          int* atomic, void** trace, unsigned long trace_room);
}
#endif

namespace emu::races {

#ifdef EMU_RACES

constexpr bool ON = true;

// Launches tell what was found; its own reports would only repeat it.
inline void begin() { __sanitizer_set_report_fd((void*)(intptr_t)open("/dev/null", O_WRONLY)); }

// A thread of ThreadSanitizer's.
class Track {
  public:
    Track() : fiber(__tsan_create_fiber(0)) {}
    Track(const Track&) = delete;
    ~Track() { __tsan_destroy_fiber(fiber); }
    void go_on() const { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }

  private:
    void* fiber;
};
// The thread of the host.
struct HostTrack {
    void* fiber;
    void set() { fiber = __tsan_get_current_fiber(); }
    void go_on() const { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
};

// What the calling thread did before it releases `at` comes before what others do after they acquire it.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }

// 16 bytes that the emulator touches for the line of a kernel that `place` is the return address of.
inline void read16(const void* at, void* place) { __tsan_read16_pc(at, place); }
inline void write16(void* at, void* place) { __tsan_write16_pc(at, place); }

// Meanwhile nothing that the calling thread touches is noted.
struct Unnoted {
    Unnoted() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0), on = true; }
    ~Unnoted() { end(); }
    // Also for a thread that does not go on.
    static void end() {
        if (on) AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0);
        on = false;
    }
    static inline thread_local bool on = false;
};

// The first race that was found on this thread of the host since it was taken.
struct Race {
    struct Access {
        void* trace[16];
        int write, atomic;
    } accesses[2];
    int count = 0;
};
inline thread_local Race found;

// The innermost place of an access in a kernel's own text, "cuda/route.cu:55".
inline std::string place_of(const Race::Access& access) {
    for (void* address : access.trace) {
        if (!address) break;
        // A place for each function that was inlined there, one behind the other with a 0 between them.
        char places[2048] = {};
        __sanitizer_symbolize_pc(address, "%s:%l", places, sizeof places - 1);
        for (const char* at = places; *at; at += strlen(at) + 1) {
            if (strstr(at, ".cu:") || strstr(at, ".cuh:")) return at;
        }
    }
    return "somewhere";
}

// What was found, empty when nothing was.
inline std::string take() {
    std::string text;
    for (int i = 0; i < found.count; i++) {
        const Race::Access& access = found.accesses[i];
        text += i ? ", and nothing between it and " : "data race: ";
        text += access.atomic ? "an atomic " : "a ";
        text += (access.write ? "write at " : "read at ") + place_of(access);
        if (i) text += " in another thread";
    }
    found.count = 0;
    return text;
}

#else

constexpr bool ON = false;
inline void begin() {}
struct Track {
    void go_on() const {}
};
struct HostTrack {
    void set() {}
    void go_on() const {}
};
inline void release(void*) {}
inline void acquire(void*) {}
inline void read16(const void*, void*) {}
inline void write16(void*, void*) {}
struct Unnoted {
    Unnoted() {}
    static void end() {}
};
inline std::string take() { return {}; }

#endif

} // namespace emu::races

#ifdef EMU_RACES
extern "C" {

// ThreadSanitizer asks for these.
const char* __tsan_default_options() {
    return "ignore_interceptors_accesses=1 "                       // of malloc and memcpy, which are not a kernel's
           "suppress_equal_stacks=0 suppress_equal_addresses=0 "   // each launch is on its own
           "history_size=1 "                                       // of up to 4096 threads
           "exitcode=0";
}

void __tsan_on_report(void* report) {
    auto& found = emu::races::found;
    const char* what;
    int count, stacks, accesses, locations, mutexes, threads, ids;
    void* sleep[1];
    if (found.count || !__tsan_get_report_data(report, &what, &count, &stacks, &accesses, &locations, &mutexes, &threads,
                                               &ids, sleep, 1))
        return;
    for (int i = 0; i < accesses && i < 2; i++) {
        auto& access = found.accesses[found.count++] = {};
        int thread, size;
        void* address;
        __tsan_get_report_mop(report, i, &thread, &address, &size, &access.write, &access.atomic, access.trace, 16);
    }
}

} // extern "C"
#endif
