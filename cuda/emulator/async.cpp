// What goes on beside the threads of a block: see async.h.
//
// Nothing is done before it must be, nor after it may no longer be relied on. Where a copy writes, memory is NaN from the
// call on; its rows arrive at random, while others run. The sums of products are NaN until they are waited for, whereas the
// operands are read at once or as late as then, as is drawn. So what is not waited for shows in the results. Found by
// looking: barriers that nobody completes, too many arrivals, operands that are being copied to, copies to operands that
// are in use, warps of a warpgroup that multiply different things, registers written meanwhile.
//
// Wgmma and TMA do not see what threads write to shared memory before a fence. Here they see a second copy of it, which a
// fence makes equal to the first, for all threads: that one thread lacks its fence is not found, that all do is.

#include "async.h"
#include "cuda.h"
#include "emulator.h"
#include "../mma.cuh"

#include <deque>
#include <map>
#include <vector>

namespace emu {

__thread bool copying;

namespace {

constexpr int POISON = 0xff;
constexpr uint64_t BARRIER_WORD = 0xbabababa5e5e5e5e; // what stands in memory for a barrier
constexpr uint64_t MAP_WORD = 0x3a9b0c5d7e1f2468;

struct Phase {
    uint32_t arrivals, pending; // of a phase, and those that it lacks
    int64_t bytes;              // that it lacks
    uint32_t parity;
    std::vector<uint32_t> waiting;
};

struct Map {
    uint64_t word;
    const char* base;
    uint64_t rows, columns, row_bytes;
    uint32_t box_rows, box_columns, element;
};
static_assert(sizeof(Map) <= 128);

struct BoxCopy {
    Map map;
    char* to;
    uint32_t row, column;
    char* barrier;
    std::vector<uint32_t> left; // rows of the box
    uint32_t row_bytes() const { return map.box_columns * map.element; }
    uint32_t bytes() const { return map.box_rows * row_bytes(); }
};

// The sums of a warp, [lane, n]: what they are while memory says NaN.
struct Sums {
    float* at[32];
    uint32_t each, under_way;
    std::vector<float> value;
};

struct Issued {
    Product of;
    const uint32_t* a[32];
    Sums* sums;
    uint32_t group;
    bool done;
    Site site;
};

struct Warp {
    std::deque<Issued> issued;
    std::map<float*, Sums> sums; // by those of lane 0
    uint32_t groups, count;      // closed; products so far
    bool fenced;
};

struct Group {
    uint32_t threads, arrived;
    bool yes, result;
    std::vector<uint32_t> waiting;
};

struct Async {
    std::map<char*, Phase> barriers;
    std::vector<BoxCopy> copies;
    Warp warps[32];
    std::vector<std::pair<Product, Site>> products[8]; // of each warpgroup
    Group groups[16];
    // What wgmma and TMA see of the block's dynamic shared memory; empty until they are used.
    std::vector<char> seen;
};
thread_local Async async;
// Whether the block has to do with any of it. Most have not, and then a launch does not even make it.
thread_local bool used;

std::string text(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

uint32_t thread_index() { return now->thread.x; }

// The other view of a place in shared memory.
char* seen(const char* at) {
    const Range all = dynamic_range();
    used = true;
    if (async.seen.empty()) async.seen.assign(all.end - all.begin, char(POISON));
    return async.seen.data() + (at - all.begin);
}

bool overlap(const char* a, size_t a_size, const char* b, size_t b_size) { return a < b + b_size && b < a + a_size; }

// Barriers

Phase& phase_of(const char* what, void* barrier, Site site) {
    const auto found = async.barriers.find((char*)barrier);
    if (found == async.barriers.end() || *(uint64_t*)barrier != BARRIER_WORD)
        fail("%s at %s: %p is no barrier, or was written over", what, text(site).c_str(), barrier);
    return found->second;
}

void end_if_complete(Phase& phase) {
    if (phase.pending || phase.bytes) return;
    phase.pending = phase.arrivals;
    phase.parity ^= 1;
    for (const uint32_t thread : std::exchange(phase.waiting, {})) wake(thread);
}

// Operands (PTX ISA, matrix descriptor and canonical layouts)

struct Layout {
    uint32_t start, leading, stride, width; // width: bytes within which units are swizzled
    bool by_columns;

    Layout(uint64_t operand, bool by_columns, Site site) : by_columns(by_columns) {
        const auto field = [&](int bit) { return uint32_t(operand >> bit & 0x3fff) << 4; };
        start = field(0), leading = field(16), stride = field(32);
        constexpr uint32_t WIDTHS[] = {16, 128, 64, 32};
        width = WIDTHS[operand >> 62];
        if (operand >> 49 & 7) fail("an operand at %s has a base offset, which is not emulated", text(site).c_str());
    }
    // Where the unit of 8 numbers begins that holds row `row` (of M or N), column `k`.
    uint32_t unit(uint32_t row, uint32_t k) const {
        uint32_t at = start;
        if (by_columns) {
            const uint32_t wide = width / 2;
            if (width == 16) at += row / 8 * stride + k % 8 * 16 + k / 8 * leading;
            else at += row % wide * 2 + row / wide * leading + k % 8 * width + k / 8 * stride;
        } else {
            at += row % 8 * width + row / 8 * stride + (width == 16 ? k / 8 * leading : k * 2);
        }
        return at ^ (at >> 3 & (width - 16));
    }
};

// 8 numbers as f32, as wgmma finds them.
void load_unit(float (&x)[8], uint32_t address, bool is_bf16, Site site) {
    const Range all = dynamic_range();
    const char* const at = all.end - (256 << 10) + address;
    if (at < all.begin || at + 16 > all.end)
        fail("a product at %s reads outside of dynamic shared memory", text(site).c_str());
    for (const BoxCopy& copy : async.copies) {
        if (overlap(at, 16, copy.to, copy.bytes()))
            fail("a product at %s reads shared memory that copy_box is still writing to", text(site).c_str());
    }
    if (memcmp(at, seen(at), 16))
        fail("a product at %s reads what threads wrote to shared memory without an async_fence", text(site).c_str());
    uint16_t bits[8];
    memcpy(bits, at, 16);
    for (int i = 0; i < 8; i++) x[i] = is_bf16 ? to_f32(bf16{bits[i]}) : to_f32(f16{bits[i]});
}

void run(Issued& it, uint32_t warp) {
    using Eight = float __attribute__((vector_size(32)));
    const Product& of = it.of;
    float a[16][16];
    static thread_local Eight b[16][32]; // [k, n / 8]
    if (of.a_in_registers) {
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const uint32_t word = it.a[lane][i];
                float* const to = &a[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2)];
                for (int c = 0; c < 2; c++) {
                    const uint16_t bits = word >> 16 * c;
                    to[c] = of.is_bf16 ? to_f32(bf16{bits}) : to_f32(f16{bits});
                }
            }
        }
    } else {
        const Layout layout(of.a_operand, false, it.site);
        for (uint32_t row = 0; row < 16; row++) {
            for (uint32_t k = 0; k < 16; k += 8)
                load_unit(*(float(*)[8])&a[row][k], layout.unit(warp % 4 * 16 + row, k), of.is_bf16, it.site);
        }
    }
    const Layout layout(of.b_operand, of.b_by_columns, it.site);
    float x[8];
    for (uint32_t n = 0; n < of.n; n += of.b_by_columns ? 8 : 1) {
        for (uint32_t k = 0; k < 16; k += of.b_by_columns ? 1 : 8) {
            load_unit(x, layout.unit(n, k), of.is_bf16, it.site);
            for (int i = 0; i < 8; i++) {
                if (of.b_by_columns) b[k][n / 8][i] = x[i];
                else b[k + i][n / 8][n % 8] = x[i];
            }
        }
    }
    for (int row = 0; row < 16; row++) {
        for (uint32_t i = 0; i < of.n / 8; i++) {
            Eight sums = {};
            for (int k = 0; k < 16; k++) sums += a[row][k] * b[k][i];
            for (int t = 0; t < 4; t++) {
                float* const d = &it.sums->value[(row % 8 * 4 + t) * it.sums->each + 4 * i + row / 8 * 2];
                for (int c = 0; c < 2; c++) d[c] = (of.add ? d[c] : 0.0f) + sums[2 * t + c];
            }
        }
    }
    it.done = true;
}

void run_all(Warp& warp, uint32_t index) {
    for (Issued& it : warp.issued)
        if (!it.done) run(it, index);
}

bool is_poison(const Sums& sums) {
    for (const float* at : sums.at) {
        for (uint32_t i = 0; i < sums.each; i++)
            if (__float_as_uint(at[i]) != 0xffffffff) return false;
    }
    return true;
}

struct Lane {
    const Product* of;
    float* d;
    const uint32_t* a;
    Site site;
};

void issue(void* const lanes[32], uint32_t) {
    const uint32_t index = thread_index() / 32;
    Warp& warp = async.warps[index];
    const Lane& first = *(Lane*)lanes[0];
    const Product& of = *first.of;
    const std::string place = text(first.site);
    if (!warp.fenced) fail("a product at %s without products_fence since registers were touched", place.c_str());
    for (int lane = 1; lane < 32; lane++)
        if (*((Lane*)lanes[lane])->of != of) fail("lanes of a warp multiply different things at %s", place.c_str());
    auto& all = async.products[index / 4];
    if (warp.count == all.size()) all.emplace_back(of, first.site);
    const auto& [expected, site] = all[warp.count++];
    if (expected != of)
        fail("warps of a warpgroup multiply different things, at %s and %s", place.c_str(), text(site).c_str());
    auto [found, fresh] = warp.sums.try_emplace(first.d);
    Sums& sums = found->second;
    if (fresh) {
        sums.each = of.n / 2, sums.under_way = 0;
        sums.value.resize(32 * sums.each);
        for (int lane = 0; lane < 32; lane++) {
            float* const d = sums.at[lane] = ((Lane*)lanes[lane])->d;
            memcpy(&sums.value[lane * sums.each], d, 4 * sums.each);
            memset(d, POISON, 4 * sums.each);
        }
    } else if (!is_poison(sums) || sums.each != of.n / 2) {
        fail("the sums of a product at %s were touched while it was under way", place.c_str());
    }
    sums.under_way++;
    Issued it{of, {}, &sums, warp.groups, false, first.site};
    for (int lane = 0; lane < 32; lane++) it.a[lane] = ((Lane*)lanes[lane])->a;
    warp.issued.push_back(it);
    if (draw(2)) run_all(warp, index);
}

// Ends the groups but the newest `left`.
void finish(uint32_t left) {
    const uint32_t index = thread_index() / 32;
    Warp& warp = async.warps[index];
    warp.fenced = false;
    while (!warp.issued.empty() && warp.issued.front().group + left < warp.groups) {
        Issued& it = warp.issued.front();
        if (!it.done) run(it, index);
        Sums& sums = *it.sums;
        if (!is_poison(sums))
            fail("the sums of a product at %s were touched while it was under way", text(it.site).c_str());
        if (--sums.under_way == 0) {
            for (int lane = 0; lane < 32; lane++)
                memcpy(sums.at[lane], &sums.value[lane * sums.each], 4 * sums.each);
            warp.sums.erase(sums.at[0]);
        }
        warp.issued.pop_front();
    }
}

// Fails when a product that is under way reads some of it.
void check_unread(const char* at, size_t size, Site site) {
    const Range all = dynamic_range();
    for (const Warp& warp : async.warps) {
        for (const Issued& it : warp.issued) {
            const auto reads = [&](uint64_t operand, bool by_columns, uint32_t rows) {
                const Layout layout(operand, by_columns, it.site);
                for (uint32_t row = 0; row < rows; row += by_columns ? 8 : 1) {
                    for (uint32_t k = 0; k < 16; k += by_columns ? 1 : 8)
                        if (overlap(at, size, all.end - (256 << 10) + layout.unit(row, k), 16)) return true;
                }
                return false;
            };
            if (reads(it.of.b_operand, it.of.b_by_columns, it.of.n) ||
                (!it.of.a_in_registers && reads(it.of.a_operand, false, 64)))
                fail("copy_box at %s writes what a product at %s still reads", text(site).c_str(),
                     text(it.site).c_str());
        }
    }
}

} // namespace

void async_begin() {
    if (std::exchange(used, false)) async = {}, copying = false;
}

void async_copy_piece() {
    BoxCopy& copy = async.copies[draw(async.copies.size())];
    const uint32_t bytes = copy.row_bytes(), size = copy.map.element;
    uint32_t rows = draw(copy.left.size()) + 1;
    Phase& phase = async.barriers.at(copy.barrier);
    phase.bytes -= rows * bytes;
    for (; rows; rows--) {
        std::swap(copy.left[draw(copy.left.size())], copy.left.back());
        const uint32_t row = copy.left.back();
        copy.left.pop_back();
        for (uint32_t i = 0; i < bytes; i += size) {
            const uint32_t linear = shared_address(copy.to) + row * bytes + i;
            char* const to = copy.to + ((linear ^ (linear >> 3 & 0x70)) - shared_address(copy.to));
            const uint64_t from_row = copy.row + row, column = copy.column + i / size;
            // Outside of the matrix there are zeros.
            if (from_row >= copy.map.rows || column >= copy.map.columns) memset(to, 0, size);
            else memcpy(to, copy.map.base + from_row * copy.map.row_bytes + column * size, size);
            memcpy(seen(to), to, size);
        }
    }
    if (copy.left.empty()) {
        std::swap(copy, async.copies.back());
        async.copies.pop_back();
        copying = !async.copies.empty();
    }
    end_if_complete(phase);
}

std::string async_left() {
    if (!used) return {};
    if (!async.copies.empty()) return "the block ended while copy_box was under way";
    for (const Warp& warp : async.warps)
        if (!warp.issued.empty())
            return "the block ended with the product at " + text(warp.issued.front().site) + " under way";
    for (uint32_t i = 0; i < 32; i++)
        if (async.warps[i].count != async.products[i / 4].size())
            return "the block ended and a warp has left out the product at " +
                   text(async.products[i / 4][async.warps[i].count].second);
    return {};
}

void barrier_init(void* barrier, uint32_t arrivals) {
    const Range all = dynamic_range();
    char* const at = (char*)barrier;
    if (at < all.begin || at + 8 > all.end || (size_t)at % 8)
        fail("barrier_init: %p is no multiple of 8 in dynamic shared memory", barrier);
    if (!arrivals) fail("barrier_init: no arrivals");
    *(uint64_t*)at = BARRIER_WORD;
    used = true;
    async.barriers[at] = {arrivals, arrivals, 0, 0, {}};
}

void barrier_arrive(void* barrier, uint32_t expected_bytes, Site site) {
    maybe_yield();
    Phase& phase = phase_of("barrier_arrive", barrier, site);
    order_before(barrier);
    if (!phase.pending) fail("barrier_arrive at %s: all %u have arrived", text(site).c_str(), phase.arrivals);
    phase.pending--;
    phase.bytes += expected_bytes;
    end_if_complete(phase);
    // Whoever was waiting may well come first.
    if (draw(2)) yield();
}

void barrier_wait(void* barrier, uint32_t parity, Site site) {
    maybe_yield();
    Phase& phase = phase_of("barrier_wait", barrier, site);
    if (phase.parity == (parity & 1)) {
        phase.waiting.push_back(thread_index());
        park("barrier_wait", site);
    }
    order_after(barrier);
}

void copy_box(void* to, const void* map, uint32_t row, uint32_t column, void* barrier, Site site) {
    const std::string place = text(site);
    phase_of("copy_box", barrier, site);
    BoxCopy copy{*(const Map*)map, (char*)to, row, column, (char*)barrier, {}};
    if (copy.map.word != MAP_WORD || (size_t)map % 64)
        fail("copy_box at %s: no tensor map, or not at a multiple of 64 bytes", place.c_str());
    const Range all = dynamic_range();
    if (copy.to < all.begin || copy.to + copy.bytes() > all.end || shared_address(to) % 128)
        fail("copy_box at %s: %p is no multiple of 128 in dynamic shared memory", place.c_str(), to);
    for (const BoxCopy& other : async.copies) {
        if (overlap(copy.to, copy.bytes(), other.to, other.bytes()))
            fail("copy_box at %s: another copy to that place is under way", place.c_str());
    }
    check_unread(copy.to, copy.bytes(), site);
    for (uint32_t i = 0; i < copy.map.box_rows; i++) copy.left.push_back(i);
    memset(copy.to, POISON, copy.bytes());
    memset(seen(copy.to), POISON, copy.bytes());
    async.copies.push_back(std::move(copy));
    copying = true;
    maybe_yield();
}

void async_fence() {
    const Range all = dynamic_range();
    memcpy(seen(all.begin), all.begin, all.end - all.begin);
}

bool group_barrier(uint32_t id, uint32_t threads, bool waits, bool yes, Site site) {
    maybe_yield();
    if (!id || id > 15 || !threads || threads % 32)
        fail("at %s: barrier %u of %u threads", text(site).c_str(), id, threads);
    used = true;
    Group& group = async.groups[id];
    if (group.arrived && group.threads != threads)
        fail("at %s: barrier %u of %u threads, of which others come as to one of %u", text(site).c_str(), id, threads,
             group.threads);
    order_before(&group);
    group.threads = threads;
    group.yes |= yes;
    if (++group.arrived == threads) {
        group.result = std::exchange(group.yes, false);
        group.arrived = 0;
        for (const uint32_t thread : std::exchange(group.waiting, {})) wake(thread);
    } else if (waits) {
        group.waiting.push_back(thread_index());
        park("a barrier of warps", site);
    }
    if (waits) order_after(&group);
    return group.result;
}

uint32_t shared_address(const void* at) {
    const Range all = dynamic_range();
    return (const char*)at - (all.end - (256 << 10));
}

void multiply_async(const Product& product, float* d, const uint32_t* a, Site site) {
    Lane mine{&product, d, a, site};
    collective("multiply_async", 0xffffffff, &mine, issue, site);
}

void products_fence(Site site) {
    collective(
        "products_fence", 0xffffffff, nullptr,
        [](void* const*, uint32_t) { used = async.warps[thread_index() / 32].fenced = true; }, site);
}

void products_commit(Site site) {
    collective(
        "products_commit", 0xffffffff, nullptr,
        [](void* const*, uint32_t) { async.warps[thread_index() / 32].groups++; }, site);
}

void products_wait(uint32_t groups_left, Site site) {
    collective(
        "products_wait", 0xffffffff, &groups_left,
        [](void* const lanes[32], uint32_t) { finish(*(uint32_t*)lanes[0]); }, site);
}

} // namespace emu

extern "C" int emu_tensor_map(uint64_t map[16], const void* base, uint64_t rows, uint64_t columns, uint32_t element,
                              uint32_t box_rows, uint32_t box_columns) {
    const uint64_t row_bytes = columns * element;
    if ((size_t)base % 16 || row_bytes % 16 || !box_rows || box_rows > 256 || box_columns * element > 128 ||
        box_columns * element % 16 || !rows || rows >> 32 || columns >> 32)
        return 1;
    const emu::Map made{emu::MAP_WORD, (const char*)base, rows, columns, row_bytes, box_rows, box_columns, element};
    memset(map, 0, 128);
    memcpy(map, &made, sizeof made);
    return 0;
}
