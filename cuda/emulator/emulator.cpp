// CUDA threads as fibers.
//
// The threads of a block share one thread of the host, and change places where they meet: at barriers, at what lanes of
// a warp do together, now and then at atomics. In between a thread runs undisturbed, so a missing barrier shows as one
// thread far ahead of the others; who that is, is drawn anew at every meeting. Blocks are spread over a few host
// threads.
//
// What a kernel must not do is found in four ways: by looking (barriers, masks, alignment), by memory full of NaN where
// nothing was written, by pages that cannot be touched around buffers, stacks and shared memory, and by the checks that
// the compiler puts in (-fsanitize; their handlers are at the end). A build with EMU_RACES also finds accesses that
// nothing orders (races.h).

#include "async.h"
#include "emulator.h"
#include "races.h"
#include "runtime.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace emu {

__thread Thread* now;
__thread Place* here;

namespace {

constexpr size_t MAX_THREADS = 1024, MAX_DYNAMIC = 227 * 1024, MAX_STATIC = 48 * 1024, STACK = 64 * 1024;
constexpr int POISON = 0xff; // NaN as f32, f16 and bf16; as an index far outside of anything
constexpr size_t REDZONE = 64;
const size_t PAGE = sysconf(_SC_PAGESIZE);

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }
bool untouched(const char* from, const char* to) {
    return std::all_of(from, to, [](char c) { return c == char(POISON); });
}

// SplitMix64.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    uint32_t below(uint32_t n) { return uint64_t(uint32_t(next())) * n >> 32; }
};

// Pages that can be touched between two that cannot.
class Pages {
  public:
    Pages() = default;
    explicit Pages(size_t size) : size_(round_up(size, PAGE)) {
        void* all = mmap(nullptr, size_ + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) return;
        at_ = (char*)all + PAGE;
        if (size_ && mprotect(at_, size_, PROT_READ | PROT_WRITE)) {
            munmap(all, size_ + 2 * PAGE);
            at_ = nullptr;
        }
    }
    Pages(Pages&& other) : at_(std::exchange(other.at_, nullptr)), size_(other.size_) {}
    Pages& operator=(Pages&& other) {
        std::swap(at_, other.at_), std::swap(size_, other.size_);
        return *this;
    }
    ~Pages() {
        if (at_) munmap(at_ - PAGE, size_ + 2 * PAGE);
    }
    explicit operator bool() const { return at_; }
    char* begin() const { return at_; }
    char* end() const { return at_ + size_; }
    bool guards(const char* address) const {
        return at_ && address >= at_ - PAGE && address < end() + PAGE && !(address >= at_ && address < end());
    }

  private:
    char* at_ = nullptr;
    size_t size_ = 0;
};

// A place where execution can go on. On x86-64 a change takes some 10 ns; ucontext, elsewhere, asks the system each
// time.
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
struct Context {
    void* stack_pointer;
    void start(char* stack_end, void (*entry)()) {
        void** top = (void**)stack_end;
        *--top = nullptr; // where `entry` would return to
        *--top = (void*)entry;
        stack_pointer = top - 6;
    }
};
extern "C" void emu_change(void** from, void* to);
asm(R"(
.text
.globl emu_change
.type emu_change, @function
emu_change:
    endbr64
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_change, .-emu_change
)");
void change(Context& from, const Context& to) { emu_change(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
    ucontext_t saved;
    void start(char* stack_end, void (*entry)()) {
        getcontext(&saved);
        saved.uc_stack.ss_sp = stack_end - STACK / 2;
        saved.uc_stack.ss_size = STACK / 2;
        saved.uc_link = nullptr;
        makecontext(&saved, entry, 0);
    }
};
void change(Context& from, const Context& to) { swapcontext(&from.saved, &to.saved); }
#endif

struct Copy {
    void* to;
    const void* from; // null: zeros
    uint32_t group;
    void* place; // in the kernel
};

// What every change of turns touches comes first, in one line of the cache.
struct alignas(64) Fiber : Thread {
    Context context;
    // While it waits:
    const char* what;
    Site site;
    uint32_t mask;
    uint32_t groups; // of copies, closed so far
    Finish finish;
    races::Track track;
    Pages stack;
    std::vector<Copy> copies;
};

struct Warp {
    uint32_t exists, exited;
    uint32_t ready;   // neither runs nor waits
    uint32_t waiting; // in collective()
    bool alike;       // those that wait came with this mask and finish
    uint32_t mask;
    Finish finish;
    // Lanes take turns in the order (a * i + b) % 32, with an odd a.
    uint32_t a, b, i;
    void* mine[32];
};

struct Launch {
    const Kernel* kernel;
    Place place;
    uint32_t threads, shared;
    const void* args;
    uint64_t seed;
    uint64_t blocks;
    uint64_t stride, offset; // which block comes next
    std::atomic<uint64_t> started{0};
    std::atomic<bool> failed{false};
    std::mutex lock;
    std::string error; // the first
    char ended, fence;   // what races:: orders by
};

struct StaticShared {
    const void* key;
    char* at;
    size_t size;
    Site site;
};

// What a host thread needs to run blocks; kept from launch to launch for its memory.
struct Worker {
    Launch* launch;
    Place place;
    std::vector<std::unique_ptr<Fiber>> fibers;
    Warp warps[32];
    uint32_t warp_order[32], warp_count, warp; // warp: whose lanes run
    Fiber* current;
    Context main;
    races::HostTrack main_track;
    Random random;
    uint32_t alive;

    uint32_t arrived, yes; // at the barrier
    Fiber* first_arrived;
    Votes votes; // of the last barrier

    Pages static_memory{MAX_STATIC * 2}, dynamic_memory{MAX_DYNAMIC}, signal_stack{64 * 1024};
    std::vector<StaticShared> statics;
    char *static_end, *dynamic_begin, *dynamic_end;

    volatile bool running = false;
    siginfo_t fault;

    void run(uint64_t index);
    void start(uint64_t index);
    bool turn_warp();
    Fiber* pick();
    void go(Fiber* to);
    void go_on();
    void check_races();
    [[noreturn]] void deadlock();
    [[noreturn]] void leave();
    void shuffle_warps();
    void shuffle_lanes(Warp& warp);
    void release_barrier();
    void order(uint32_t from, uint32_t to, uint32_t lanes);
    std::string waiting() const;
    void report(const std::string& text);
    std::string describe_fault() const;
    bool in_shared(const char* p, size_t size) const {
        return (p >= dynamic_begin && p + size <= dynamic_end) ||
               (p >= static_memory.begin() && p + size <= static_end);
    }
};

thread_local Worker* worker;

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string format_list(const char* format, va_list list) {
    char room[1024];
    vsnprintf(room, sizeof room, format, list);
    return room;
}
std::string text(const char* format, ...) {
    va_list list;
    va_start(list, format);
    std::string s = format_list(format, list);
    va_end(list);
    return s;
}
std::string text(const Site& site) { return text("%s:%d", site.file, site.line); }
std::string text(const uint3& at) { return text("(%u, %u, %u)", at.x, at.y, at.z); }

// Device memory

struct Buffer {
    Pages pages;
    char* at;
    size_t size;
};
std::mutex buffers_lock;
std::map<char*, Buffer> buffers; // by address

// "12 bytes behind a buffer of 4096", where such a buffer is near.
std::string near_buffer(const char* address) {
    std::lock_guard guard(buffers_lock);
    for (const auto& [at, buffer] : buffers) {
        if (!buffer.pages.guards(address)) continue;
        return address < at
                   ? text("%td bytes before a buffer of %zu", at - address, buffer.size)
                   : text("%td bytes behind the end of a buffer of %zu", address - at - buffer.size, buffer.size);
    }
    return {};
}

// Turns

void Worker::shuffle_lanes(Warp& w) {
    const uint32_t r = random.next();
    w.a = r | 1, w.b = r >> 8, w.i = 0;
}

void Worker::shuffle_warps() {
    for (uint32_t i = warp_count; i > 1; i--) std::swap(warp_order[i - 1], warp_order[random.below(i)]);
    warp = warp_order[0];
}

// To the first warp that can run; whether there is one.
__attribute__((noinline)) bool Worker::turn_warp() {
    uint32_t *const end = warp_order + warp_count, *next;
    const auto is_ready = [&](uint32_t w) { return warps[w].ready; };
    while ((next = std::find_if(warp_order, end, is_ready)) == end) {
        if (!copying) return false;
        async_copy_piece(); // others may be waiting for it
    }
    warp = *next;
    return true;
}

// The next thread to run; null when none can.
inline Fiber* Worker::pick() {
    if (copying && random.below(4) == 0) async_copy_piece();
    if (!warps[warp].ready && !turn_warp()) return nullptr;
    Warp& w = warps[warp];
    for (;;) {
        const uint32_t lane = (w.a * w.i++ + w.b) % 32;
        if (!(w.ready >> lane & 1)) continue;
        w.ready &= ~(1u << lane);
        return fibers[32 * warp + lane].get();
    }
}

inline void Worker::go(Fiber* to) {
    Fiber* from = current;
    if (from == to) return;
    now = current = to;
    to->track.go_on();
    change(from->context, to->context);
}

// To where the block was started, from a thread that does not go on.
void Worker::leave() {
    races::Unnoted::end();
    main_track.go_on();
    change(current->context, main);
    __builtin_unreachable();
}

void Worker::check_races() {
    if (const std::string race = races::take(); !race.empty()) fail("%s", race.c_str());
}

__attribute__((noinline)) void Worker::deadlock() { fail("deadlock: %s", waiting().c_str()); }

// Gives the turn to another thread; returns when the calling one has it again.
inline void Worker::go_on() {
    check_races();
    Fiber* next = pick();
    if (!next) deadlock();
    go(next);
}

// Who waits where, for a block in which nobody can run.
std::string Worker::waiting() const {
    std::string all;
    std::map<std::string, std::vector<const Fiber*>> groups;
    for (uint32_t i = 0; i < launch->threads; i++) {
        const Fiber& fiber = *fibers[i];
        const Warp& w = warps[i / 32];
        if (w.exited >> fiber.lane & 1) continue;
        std::string what = text("%s at %s", fiber.what, text(fiber.site).c_str());
        if (w.waiting >> fiber.lane & 1) {
            what += text(" with mask %08x", fiber.mask);
            if (fiber.mask & ~w.exists) what += text(" (lanes %08x are not there)", fiber.mask & ~w.exists);
            if (fiber.mask & w.exited) what += text(" (lanes %08x have exited)", fiber.mask & w.exited);
        }
        groups[what].push_back(&fiber);
    }
    for (const auto& [what, who] : groups) {
        if (!all.empty()) all += "; ";
        if (all.size() > 600) return all + "...";
        const std::string first = text(who[0]->thread);
        all += who.size() == 1 ? text("thread %s waits in ", first.c_str())
                               : text("%zu threads, %s the first, wait in ", who.size(), first.c_str());
        all += what;
    }
    return all;
}

// These lanes of the warps [from, to) have met: what each did comes before what any of them does next.
void Worker::order(uint32_t from, uint32_t to, uint32_t lanes) {
    if (!races::ON) return;
    const auto each = [&](void (*act)(void*)) {
        for (uint32_t w = from; w < to; w++) {
            for (uint32_t left = lanes & warps[w].exists & ~warps[w].exited; left; left &= left - 1) {
                fibers[32 * w + __builtin_ctz(left)]->track.go_on();
                act(&warps[from]);
            }
        }
    };
    each(races::release);
    each(races::acquire);
    current->track.go_on();
}

void Worker::release_barrier() {
    order(0, warp_count, ~0u);
    votes = {yes, arrived};
    arrived = yes = 0;
    for (uint32_t i = 0; i < warp_count; i++) {
        warps[i].ready = warps[i].exists & ~warps[i].exited;
        shuffle_lanes(warps[i]);
    }
    shuffle_warps();
}

[[noreturn]] void thread_main() {
    Worker& w = *worker;
    races::acquire(&w.main);
    w.launch->kernel->run(w.launch->args);
    w.check_races();
    races::release(&w.launch->ended);
    w.warps[w.current->thread.x / 32].exited |= 1u << w.current->lane;
    w.alive--;
    if (w.alive && w.arrived == w.alive) w.release_barrier();
    if (!w.alive) w.leave();
    w.go_on();
    __builtin_unreachable();
}

// A block

void Worker::start(uint64_t index) {
    const Launch& l = *launch;
    place = l.place;
    const uint3& grid = place.grid_dim;
    place.block = {uint32_t(index % grid.x), uint32_t(index / grid.x % grid.y), uint32_t(index / grid.x / grid.y)};
    random = {l.seed ^ index * 0xd1342543de82ef95};
    // Fresh memory is nobody's, where otherwise it would be the last block's.
    if (races::ON) static_memory = Pages(MAX_STATIC * 2), dynamic_memory = Pages(MAX_DYNAMIC);
    if (!static_memory || !dynamic_memory || !signal_stack) return report("no memory for what is shared");
    while (fibers.size() < l.threads) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = Pages(STACK);
        if (!fiber->stack) return report("no memory for the stack of a thread");
        fibers.push_back(std::move(fiber));
    }
    // What a thread did in one block is not ordered before what that of the same number does in the next.
    if (races::ON) std::rotate(fibers.begin(), fibers.begin() + 1, fibers.end());
    warp_count = (l.threads + 31) / 32;
    for (uint32_t i = 0; i < warp_count; i++) {
        const uint32_t lanes = std::min(32u, l.threads - 32 * i);
        warps[i].exists = warps[i].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warps[i].exited = warps[i].waiting = 0;
        shuffle_lanes(warps[i]);
        warp_order[i] = i;
    }
    shuffle_warps();
    for (uint32_t i = 0; i < l.threads; i++) {
        Fiber& fiber = *fibers[i];
        fiber.thread = {i, 0, 0};
        fiber.lane = i % 32;
        fiber.copies.clear();
        fiber.groups = 0;
        // Stacks begin at different places of their pages: else all would meet in the same lines of the cache.
        fiber.context.start(fiber.stack.end() - i % 32 * 128, thread_main);
    }
    alive = l.threads;
    arrived = yes = 0;

    static_end = static_memory.begin();
    statics.clear();
    dynamic_begin = dynamic_memory.end() - round_up(l.shared, 16);
    dynamic_end = dynamic_begin + l.shared;
    memset(dynamic_begin, POISON, dynamic_memory.end() - dynamic_begin);
    async_begin();
}

void Worker::run(uint64_t index) {
    worker = this;
    start(index);
    if (launch->failed) return;
    here = &place;
    fault.si_signo = 0;
    races::take();
    running = true;
    now = current = pick();
    main_track.set();
    races::release(&main);
    current->track.go_on();
    change(main, current->context);
    if (fault.si_signo) report(describe_fault());
    running = false;
    now = nullptr;
    // What a thread that does not go on leaves behind is not used again.
    if (launch->failed) return fibers.clear();
    for (const StaticShared& s : statics) {
        if (!untouched(s.at + s.size, s.at + s.size + REDZONE))
            return report(text("wrote behind the shared variables of %s", text(s.site).c_str()));
    }
    if (!untouched(dynamic_end, dynamic_memory.end()))
        return report(text("wrote behind its %u bytes of dynamic shared memory", launch->shared));
    if (const std::string left = async_left(); !left.empty()) report(left);
}

void Worker::report(const std::string& what) {
    std::lock_guard guard(launch->lock);
    if (launch->failed.exchange(true)) return;
    launch->error = text("kernel %s, block %s", launch->kernel->name, text(place.block).c_str());
    if (running) launch->error += text(", thread %s", text(current->thread).c_str());
    launch->error += ": " + what;
}

// Signals

struct sigaction old_actions[64];

void on_signal(int signal, siginfo_t* info, void* context) {
    if (worker && worker->running) {
        worker->fault = *info;
        worker->leave();
    }
    const struct sigaction& old = old_actions[signal];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
    sigaction(signal, &old, nullptr); // it comes again
}

void catch_signals() {
    static std::once_flag once;
    std::call_once(once, [] {
        races::begin();
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) sigaction(signal, &action, &old_actions[signal]);
    });
}

std::string Worker::describe_fault() const {
    if (fault.si_signo == SIGFPE) return "a division by zero";
    if (fault.si_code == SI_KERNEL) return "touched memory at an address that is misaligned or no address at all";
    const char* address = (const char*)fault.si_addr;
    std::string all = text("touched memory that is not there, at %p", (const void*)address);
    if (dynamic_memory.guards(address))
        all += text(": %td bytes behind the begin of the %u of dynamic shared memory", address - dynamic_begin,
                    launch->shared);
    if (static_memory.guards(address)) all += ": outside of the static shared memory";
    for (uint32_t i = 0; i < launch->threads; i++)
        if (fibers[i]->stack.guards(address)) all += text(": outside of the %zu bytes of a thread's stack", STACK);
    if (const std::string near = near_buffer(address); !near.empty()) all += ": " + near;
    return all;
}

// A launch

std::mutex pool_lock;
std::vector<std::unique_ptr<Worker>> pool;

std::unique_ptr<Worker> take_worker() {
    std::lock_guard guard(pool_lock);
    if (pool.empty()) return std::make_unique<Worker>();
    auto worker = std::move(pool.back());
    pool.pop_back();
    return worker;
}

// Runs blocks of the launch until none is left.
void work(Launch& launch) {
    auto mine = take_worker();
    mine->launch = &launch;
    stack_t stack = {}, old;
    stack.ss_sp = mine->signal_stack.begin();
    stack.ss_size = mine->signal_stack.end() - mine->signal_stack.begin();
    sigaltstack(&stack, &old);
    Worker* outer = worker;
    for (uint64_t i; !launch.failed && (i = launch.started++) < launch.blocks;)
        mine->run((i * launch.stride + launch.offset) % launch.blocks);
    worker = outer;
    sigaltstack(&old, nullptr);
    std::lock_guard guard(pool_lock);
    pool.push_back(std::move(mine));
}

std::atomic<uint64_t> seed{1}, launches{0};

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

} // namespace

bool add_kernel(const Kernel& kernel) {
    kernels().push_back(kernel);
    return true;
}

void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    worker->report(format_list(format, list));
    va_end(list);
    worker->leave();
}

Votes barrier(bool vote, Site site) {
    Worker& w = *worker;
    Fiber& me = *w.current;
    me.what = "__syncthreads";
    me.site = site;
    if (!w.arrived) {
        w.first_arrived = &me;
    } else if (const Fiber& first = *w.first_arrived;
               first.site.line != site.line || strcmp(first.site.file, site.file)) {
        fail("divergent barrier: it came to %s while thread %s waits at %s", text(site).c_str(),
             text(first.thread).c_str(), text(first.site).c_str());
    }
    w.arrived++;
    w.yes += vote;
    if (w.arrived == w.alive) w.release_barrier();
    w.go_on();
    return w.votes;
}

void collective(const char* what, uint32_t mask, void* mine, Finish finish, Site site) {
    Worker& w = *worker;
    Fiber& me = *w.current;
    const uint32_t index = me.thread.x / 32;
    Warp& warp = w.warps[index];
    if (!(mask >> me.lane & 1)) fail("%s at %s: the mask %08x lacks the calling lane", what, text(site).c_str(), mask);
    me.what = what;
    me.site = site;
    me.mask = mask;
    me.finish = finish;
    warp.mine[me.lane] = mine;
    if (!warp.waiting) warp.alike = true, warp.mask = mask, warp.finish = finish;
    warp.alike &= warp.mask == mask && warp.finish == finish;
    warp.waiting |= 1u << me.lane;
    if ((warp.waiting & mask) == mask) {
        for (uint32_t left = warp.alike ? 0 : mask; left; left &= left - 1) {
            const Fiber& other = *w.fibers[32 * index + __builtin_ctz(left)];
            if (other.mask != mask || other.finish != finish)
                fail("%s at %s with mask %08x, but lane %u waits in %s at %s with mask %08x", what, text(site).c_str(),
                     mask, other.lane, other.what, text(other.site).c_str(), other.mask);
        }
        if (finish) {
            const races::Unnoted lanes_stacks;
            finish(warp.mine, mask);
        } else {
            w.order(index, index + 1, mask);
        }
        warp.waiting &= ~mask;
        warp.ready |= mask;
        w.shuffle_lanes(warp);
        if (w.warp_count > 1 && w.random.below(4) == 0) w.shuffle_warps();
    }
    w.go_on();
}

bool chance() { return worker->random.below(2) == 0; }

void maybe_yield() {
    Worker& w = *worker;
    if (w.random.below(4)) return;
    w.warps[w.current->thread.x / 32].ready |= 1u << w.current->lane;
    if (w.warp_count > 1 && w.random.below(4) == 0) w.shuffle_warps();
    w.go_on();
}

void yield() {
    Worker& w = *worker;
    w.warps[w.current->thread.x / 32].ready |= 1u << w.current->lane;
    if (w.warp_count > 1) w.shuffle_warps();
    w.go_on();
}

Range dynamic_range() { return {worker->dynamic_begin, worker->dynamic_memory.end()}; }

uint32_t draw(uint32_t below) { return worker->random.below(below); }

void park(const char* what, Site site) {
    worker->current->what = what;
    worker->current->site = site;
    worker->go_on();
}

void order_before(void* at) { races::release(at); }
void order_after(void* at) { races::acquire(at); }

void wake(uint32_t thread) { worker->warps[thread / 32].ready |= 1u << thread % 32; }

void fence(bool of_block) {
    void* const at = of_block ? (void*)&worker->place : (void*)&worker->launch->fence;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    races::release(at);
    races::acquire(at);
}

void* dynamic_shared() { return worker->dynamic_begin; }

void* static_shared(const void* key, size_t size, size_t align, Site site) {
    Worker& w = *worker;
    for (const StaticShared& s : w.statics)
        if (s.key == key) return s.at;
    char* at = (char*)round_up((size_t)w.static_end, std::max<size_t>(align, 16));
    if (at + size + REDZONE > w.static_memory.end()) fail("more than %zu bytes of static shared memory", MAX_STATIC);
    w.static_end = at + size + REDZONE;
    memset(at, POISON, size + REDZONE);
    w.statics.push_back({key, at, size, site});
    return at;
}

void check16(const char* what, const void* address, bool shared) {
    if ((size_t)address % 16) fail("%s: %p is no multiple of 16", what, address);
    if (shared && !worker->in_shared((const char*)address, 16)) fail("%s: %p is not in shared memory", what, address);
}

void reads16(const void* address) { races::read16(address, __builtin_return_address(0)); }

// A copy happens at some time between its begin and the wait for it: noted at both.
void copy_async(void* to, const void* from) {
    Fiber& me = *worker->current;
    void* const place = __builtin_return_address(0);
    check16("copy_async", to, true);
    if (from) {
        check16("copy_async", from, false);
        (void)*(const volatile char*)from; // a bad address is reported here, not by copy_wait
    }
    if (from) races::read16(from, place);
    races::write16(to, place);
    memset(to, POISON, 16);
    me.copies.push_back({to, from, me.groups, place});
}

void copy_commit() { worker->current->groups++; }

void copy_wait(uint32_t groups_left) {
    Fiber& me = *worker->current;
    auto copy = me.copies.begin();
    for (; copy != me.copies.end() && copy->group + groups_left < me.groups; copy++) {
        if (copy->from) races::read16(copy->from, copy->place);
        races::write16(copy->to, copy->place);
        if (copy->from) memcpy(copy->to, copy->from, 16);
        else memset(copy->to, 0, 16);
    }
    me.copies.erase(me.copies.begin(), copy);
}

} // namespace emu

using namespace emu;

extern "C" {

const void* emu_kernel(const char* name) {
    for (const Kernel& kernel : kernels())
        if (!strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

void emu_seed(uint64_t to) { seed = to, launches = 0; }

int emu_launch(const void* handle, const uint32_t grid[3], uint32_t threads, uint32_t shared, const void* args,
               size_t args_size, char* error, size_t error_room) {
    const auto answer = [&](const std::string& what) {
        if (error_room) snprintf(error, error_room, "%s", what.c_str());
        return what.empty() ? 0 : 1;
    };
    if (!handle) return answer("no such kernel");
    const Kernel& kernel = *(const Kernel*)handle;
    const auto refuse = [&](const std::string& what) { return answer(text("kernel %s: ", kernel.name) + what); };
    if (args_size != kernel.args_size)
        return refuse(text("%zu bytes of arguments, it takes %zu", args_size, kernel.args_size));
    if (!threads || threads > std::min<size_t>(kernel.threads, MAX_THREADS))
        return refuse(text("%u threads a block, it takes up to %u", threads, kernel.threads));
    if (shared > MAX_DYNAMIC)
        return refuse(text("%u bytes of dynamic shared memory, there are %zu", shared, MAX_DYNAMIC));
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
        return refuse(text("a grid of %u x %u x %u blocks", grid[0], grid[1], grid[2]));
    if (std::count_if(kernels().begin(), kernels().end(),
                      [&](const Kernel& k) { return !strcmp(k.name, kernel.name); }) > 1)
        return refuse("there are several kernels of this name");

    catch_signals();
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> copied((args_size + 63) / 64);
    if (args_size) memcpy((void*)copied.data(), args, args_size);
    Launch launch;
    launch.kernel = &kernel;
    launch.place = {{}, {threads, 1, 1}, {grid[0], grid[1], grid[2]}};
    launch.threads = threads;
    launch.shared = shared;
    launch.args = copied.data();
    launch.blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    Random random{seed * 0x9e3779b97f4a7c15 + launches++};
    launch.seed = random.next();
    launch.offset = random.next() % launch.blocks;
    // A stride without common factors reaches every block.
    do launch.stride = random.next() % std::min<uint64_t>(launch.blocks, 1u << 20) + 1;
    while (std::gcd(launch.stride, launch.blocks) != 1);

    const uint64_t workers = std::min<uint64_t>(launch.blocks, std::clamp(std::thread::hardware_concurrency(), 1u, 4u));
    std::vector<std::thread> helpers;
    try {
        for (uint64_t i = 1; i < workers; i++) helpers.emplace_back([&] { work(launch); });
    } catch (const std::system_error&) {
        // The machine allows no more threads: fewer do.
    }
    work(launch);
    for (std::thread& helper : helpers) helper.join();
    races::acquire(&launch.ended);
    if (launch.failed) return answer(launch.error);

    std::lock_guard guard(buffers_lock);
    for (const auto& [at, buffer] : buffers)
        if (!untouched(at + buffer.size, buffer.pages.end()))
            return refuse(text("wrote behind the end of a buffer of %zu bytes", buffer.size));
    return answer("");
}

void* emu_alloc(size_t size) {
    const size_t rounded = round_up(size, 256);
    Buffer buffer{Pages(rounded), nullptr, size};
    if (rounded < size || !buffer.pages) return nullptr;
    buffer.at = buffer.pages.end() - rounded;
    memset(buffer.pages.begin(), POISON, buffer.pages.end() - buffer.pages.begin());
    char* at = buffer.at;
    std::lock_guard guard(buffers_lock);
    buffers.emplace(at, std::move(buffer));
    return at;
}

void emu_free(void* at) {
    std::lock_guard guard(buffers_lock);
    buffers.erase((char*)at);
}

// What code compiled with -fsanitize calls; the place in the source comes first in its data.

void __ubsan_handle_type_mismatch_v1(void* at, void* address) {
    fail("%s: %p is null or misaligned", text(*(const Site*)at).c_str(), address);
}
void __ubsan_handle_out_of_bounds(void* at, void* index) {
    fail("%s: the array has no element %td", text(*(const Site*)at).c_str(), (ptrdiff_t)index);
}
void __ubsan_handle_shift_out_of_bounds(void* at, void*, void* by) {
    fail("%s: a shift by %td", text(*(const Site*)at).c_str(), (ptrdiff_t)by);
}
void __ubsan_handle_divrem_overflow(void* at, void*, void*) {
    fail("%s: a division by zero", text(*(const Site*)at).c_str());
}

} // extern "C"
