// Device memory: guard pages, poison, and a shadow of two words for every two bytes: who wrote last, who read last. Threads of
// one block are ordered by their barriers, threads of different blocks only by released and acquired atomics.
#include <sys/mman.h>

#include <shared_mutex>

#include "state.hpp"

namespace emu {
namespace {
size_t heap_bytes = size_t(4) << 40;                     // of addresses: never used twice, so that a stale pointer faults
struct Alloc {
    uintptr_t base;
    size_t bytes, span;
    uintptr_t lo;
    uint8_t* init;                                      // per two bytes
    std::atomic<uint64_t>*writer, *reader;
};
std::mutex heap_mutex;
std::atomic<uintptr_t> heap_lo{0};
uintptr_t heap_top = 0;
size_t used = 0;
std::atomic<Alloc*>* pages = nullptr;                   // every page of the heap belongs to at most one allocation
std::map<uintptr_t, Alloc*> allocs;

void* reserve(size_t n, int prot) { return mmap(nullptr, n, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); }
size_t cells(size_t bytes) { return bytes / 2 + 1; }

// A tag: launch (12 bits) | block (19) | logical thread (11) | its clock (21) | atomic (1). A launch never ends up with the
// number of an earlier one whose tags are still there: the shadow is cleared when numbers start again.
struct Tag {
    uint64_t bits;
    Tag(uint64_t b) : bits(b) {}
    Tag(uint32_t launch, uint32_t block, uint32_t who, uint32_t clk, bool atomic)
        : bits(uint64_t(launch) << 52 | uint64_t(block & 0x7ffff) << 33 | uint64_t(who) << 22 | uint64_t(std::min(clk, 0x1fffffu)) << 1 | atomic) {}
    uint32_t launch() const { return uint32_t(bits >> 52); }
    uint32_t block() const { return uint32_t(bits >> 33) & 0x7ffff; }
    uint32_t who() const { return uint32_t(bits >> 22) & 0x7ff; }
    uint32_t clk() const { return uint32_t(bits >> 1) & 0x1fffff; }
    bool atomic() const { return bits & 1; }
};
std::shared_mutex launches;
std::mutex number_mutex;
uint32_t last_launch = 0;

Alloc* find(uintptr_t a, size_t n) {
    uintptr_t lo = heap_lo.load(std::memory_order_acquire);
    if (!lo || a - lo >= heap_bytes) return nullptr;
    Alloc* al = pages[(a - lo) / kPage].load(std::memory_order_acquire);
    return al && a >= al->base && a + n <= al->base + al->bytes ? al : nullptr;
}
}  // namespace

bool in_heap(const void* p) { uintptr_t lo = heap_lo.load(std::memory_order_acquire); return lo && (uintptr_t)p - lo < heap_bytes; }
bool owned(uintptr_t a, size_t n) { return find(a, n); }

uint32_t begin_launch() {
    std::lock_guard<std::mutex> lock(number_mutex);
    if (++last_launch == 4096) {
        std::unique_lock<std::shared_mutex> all(launches);       // no launch is running
        std::lock_guard<std::mutex> heap(heap_mutex);
        for (auto& [base, a] : allocs) {
            madvise(a->writer, cells(a->bytes) * 8, MADV_DONTNEED);
            madvise(a->reader, cells(a->bytes) * 8, MADV_DONTNEED);
        }
        last_launch = 1;
    }
    launches.lock_shared();
    return last_launch;
}
void end_launch() { launches.unlock_shared(); }

void* device_alloc(size_t bytes) {
    std::lock_guard<std::mutex> lock(heap_mutex);
    if (!heap_lo) {
        void* heap;
        while ((heap = reserve(heap_bytes, PROT_NONE)) == MAP_FAILED)         // there are machines with fewer addresses
            if ((heap_bytes /= 2) < kPage) return nullptr;
        pages = (std::atomic<Alloc*>*)reserve(heap_bytes / kPage * sizeof(*pages), PROT_READ | PROT_WRITE);
        uintptr_t lo = (uintptr_t)heap;
        heap_top = lo + kPage;
        heap_lo.store(lo, std::memory_order_release);
    }
    size_t round = (bytes + 255) / 256 * 256, span = (round + kPage - 1) / kPage * kPage;
    if (heap_top + span + kPage > heap_lo + heap_bytes) return nullptr;
    uintptr_t lo = heap_top, end = lo + span;
    mprotect((void*)lo, span, PROT_READ | PROT_WRITE);
    std::memset((void*)lo, 0xff, span);
    heap_top = end + kPage;
    auto* a = new Alloc;
    a->base = end - round;                                    // 256-byte aligned, the end touches the guard page
    a->bytes = bytes;
    a->lo = lo;
    a->span = span;
    a->init = (uint8_t*)reserve(cells(bytes), PROT_READ | PROT_WRITE);
    a->writer = (std::atomic<uint64_t>*)reserve(cells(bytes) * 8, PROT_READ | PROT_WRITE);
    a->reader = (std::atomic<uint64_t>*)reserve(cells(bytes) * 8, PROT_READ | PROT_WRITE);
    used += round;
    allocs[a->base] = a;
    for (uintptr_t p = lo; p < end; p += kPage) pages[(p - heap_lo) / kPage].store(a, std::memory_order_release);
    return (void*)a->base;
}
bool device_free(void* ptr) {
    std::lock_guard<std::mutex> lock(heap_mutex);
    auto it = allocs.find((uintptr_t)ptr);
    if (it == allocs.end()) return false;
    Alloc* a = it->second;
    for (uintptr_t p = a->lo; p < a->lo + a->span; p += kPage) pages[(p - heap_lo) / kPage].store(nullptr);
    madvise((void*)a->lo, a->span, MADV_DONTNEED);
    mprotect((void*)a->lo, a->span, PROT_NONE);
    munmap(a->init, cells(a->bytes));
    munmap(a->writer, cells(a->bytes) * 8);
    munmap(a->reader, cells(a->bytes) * 8);
    used -= (a->bytes + 255) / 256 * 256;
    allocs.erase(it);
    delete a;
    return true;
}
bool device_owns(const void* p, size_t n) { return find((uintptr_t)p, n); }
bool device_range(const void* p, uintptr_t* base, size_t* bytes) {
    Alloc* a = find((uintptr_t)p, 0);
    if (!a) return false;
    *base = a->base;
    *bytes = a->bytes;
    return true;
}
size_t device_used() { std::lock_guard<std::mutex> lock(heap_mutex); return used; }
void device_written(const void* p, size_t n) {
    Alloc* a = find((uintptr_t)p, n);
    if (!a || !n) return;
    size_t o = (uintptr_t)p - a->base;
    std::memset(a->init + o / 2, 1, (o + n - 1) / 2 - o / 2 + 1);
}
void device_moved(void* to, const void* from, size_t n) {
    Alloc *t = find((uintptr_t)to, n), *f = find((uintptr_t)from, n);
    if (!t || !n) return;
    if (!f) { device_written(to, n); return; }
    size_t ot = ((uintptr_t)to - t->base) / 2, of = ((uintptr_t)from - f->base) / 2;
    std::memmove(t->init + ot, f->init + of, n / 2 + n % 2);
}

// ---- the checker -------------------------------------------------------------------------------------------------------
// The cluster of a block, and the block's first logical thread in it.
static std::pair<uint32_t, int> place(uint32_t block) {
    const Launch& L = *me->launch;
    if (L.cluster_size == 1) return {block, 0};
    const unsigned x = block % L.grid.x, y = block / L.grid.x % L.grid.y, z = block / (L.grid.x * L.grid.y);
    return {x / L.cluster.x + L.clusters.x * (y / L.cluster.y + L.clusters.y * (z / L.cluster.z)),
            int(x % L.cluster.x + L.cluster.x * (y % L.cluster.y + L.cluster.y * (z % L.cluster.z))) * L.logical};
}
static bool ordered(Tag t, int who, const Clock& c) {         // did it happen before us?
    auto [cluster, first] = place(t.block());
    const int other = first + int(t.who());
    if (cluster == me->worker->cluster) return other == who || t.clk() <= c.all[other];
    if (!c.others) return false;
    auto it = c.others->find(cluster);
    return it != c.others->end() && t.clk() <= (*it->second)[other];
}
static void conflict(const char* what, const char* done, const Loc& loc, size_t byte, Tag t) {
    auto [cluster, first] = place(t.block());
    if (cluster == me->worker->cluster)
        report("global race", loc, "%s byte %zu of the allocation, %s by %s of the same %s and not ordered with it", what, byte, done,
               who_name(first + int(t.who())).c_str(), me->worker->size > 1 ? "cluster" : "block");
    else
        report(!strcmp(what, "read of") ? "cross-block read" : "cross-block write conflict", loc,
               "%s byte %zu of the allocation, %s by block #%u (thread %u) in the same launch, with no release and acquire between", what, byte, done, t.block(), t.who());
}

void check_global(uintptr_t addr, size_t n, bool write, bool atomic, int who, uint32_t clk, const Clock& c, const Loc& loc) {
    if (write) me->counters.global_write += n;
    else if (!atomic) me->counters.global_read += n;            // an atomic counts as its write
    Alloc* a = find(addr, n);
    if (!a) {
        report("global out of bounds", loc, "%s of %zu bytes at %p", write ? "write" : "read", n, (void*)addr);
        return;
    }
    const uint32_t launch = me->launch->id;
    const Block& home = *block_of_thread(who);
    const Tag mine(launch, home.cta.index, uint32_t(who - home.cta.base), clk, atomic);
    const size_t off = addr - a->base;
    for (size_t w = off / 2; w <= (off + n - 1) / 2; ++w) {
        if (write) {
            a->init[w] = 1;
            Tag old = a->writer[w].exchange(mine.bits, std::memory_order_relaxed);
            if (old.launch() == launch && !(atomic && old.atomic()) && !ordered(old, who, c)) { conflict("write of", "written", loc, w * 2, old); return; }
            Tag reader = a->reader[w].load(std::memory_order_relaxed);
            if (reader.launch() == launch && !(atomic && reader.atomic()) && !ordered(reader, who, c)) { conflict("write of", "read", loc, w * 2, reader); return; }
        } else {
            if (!a->init[w]) { report("uninitialised global", loc, "read of byte %zu of an allocation of %zu", w * 2, a->bytes); return; }
            Tag old = a->writer[w].load(std::memory_order_relaxed);
            if (old.launch() == launch && !(atomic && old.atomic()) && !ordered(old, who, c)) { conflict("read of", "written", loc, w * 2, old); return; }
            Tag reader = a->reader[w].load(std::memory_order_relaxed);
            // One reader is remembered: a concurrent one stays, so that a later write by whoever comes next is seen.
            if (reader.launch() != launch || ordered(reader, who, c)) a->reader[w].store(mine.bits, std::memory_order_relaxed);
        }
    }
}

static void own_access(const void* p, size_t n, bool write, Site at) {
    if (in_heap(p) ? !owned((uintptr_t)p, n) : true) { report("global out of bounds", at, "%s of %zu bytes at %p", write ? "write" : "read", n, p); abandon(); }
    if ((uintptr_t)p % n) { report("misaligned", at, "%s of %zu bytes at %p", write ? "write" : "read", n, p); abandon(); }
    if (checking()) { Fiber* f = self(); check_global((uintptr_t)p, n, write, false, f->who, now(f), f->clock, at); }
}
void load_global(void* to, const void* from, size_t n, Site at) { own_access(from, n, false, at); std::memcpy(to, from, n); }
void store_global(void* to, const void* from, size_t n, Site at) { own_access(to, n, true, at); std::memcpy(to, from, n); }

}  // namespace emu
