// Atomics and the order they carry. A release (a fence and then any atomic write, or a release form) leaves at the address
// what its thread knows; an acquire (an atomic read and then a fence, or an acquire form) takes it over. Read-modify-writes
// hand on what earlier ones left, as release sequences do in the PTX memory model.
#include "state.hpp"

namespace emu {

Message merged(const Message& a, const Message& b) {
    if (!a || a == b) return b;
    if (!b) return a;
    auto m = std::make_shared<BlockClocks>(*a);
    for (auto& [block, clock] : *b) {
        auto [it, fresh] = m->try_emplace(block, clock);
        if (fresh || it->second == clock) continue;
        auto both = std::make_shared<std::vector<uint32_t>>(*it->second);
        vmax(both->data(), clock->data(), both->size());
        it->second = both;
    }
    return m;
}
static Message knowledge(Fiber* f) {                           // all that f knows, its own block's threads included
    auto m = f->clock.others ? std::make_shared<BlockClocks>(*f->clock.others) : std::make_shared<BlockClocks>();
    (*m)[me->worker->cluster] = std::make_shared<std::vector<uint32_t>>(f->clock.all);
    return m;
}
void absorb(Clock& c, const Message& m) {
    if (!m) return;
    if (auto it = m->find(me->worker->cluster); it != m->end()) vmax(c.all.data(), it->second->data(), c.all.size());
    c.others = merged(c.others, m);
    ++c.version;
}

void thread_fence() {
    if (!checking()) return;
    Fiber* f = self();
    absorb(f->clock, f->clock.acquirable);
    f->clock.acquirable.reset();
    f->clock.released = knowledge(f);
    tick(f);
}

static bool acquires(Order o) { return o == Order::Acquire || o == Order::AcqRel; }
static bool releases(Order o) { return o == Order::Release || o == Order::AcqRel; }

// Runs op between the lock and the exchange of messages. reads, writes: what it does to the address.
template <class F> static uint64_t atomically(const void* p, int bytes, bool reads, bool writes, Order order, Site at, F op) {
    Fiber* f = self();
    Block* owner = in_heap(p) ? nullptr : block_of(p);
    const bool shared = owner;
    In in(shared ? owner : me);
    if (shared && owner != f->home) reach(owner, f->who, now(f), f, at);
    if (shared ? !in_smem(p, bytes, "atomic", at) : !owned((uintptr_t)p, bytes)) {
        if (!shared) report("global out of bounds", at, "atomic of %d bytes at %p", bytes, p);
        abandon();
    }
    if ((uintptr_t)p % bytes) { report("misaligned", at, "atomic of %d bytes at %p", bytes, p); abandon(); }
    ++me->counters.atomics;
    if (!checking()) return op();
    for (int write = 0; write < 2; ++write) {
        if (!(write ? writes : reads)) continue;
        if (!shared) check_global((uintptr_t)p, bytes, write, true, f->who, now(f), f->clock, at);
        else if (write) check_write(smem_addr(p), bytes, f->who, now(f), f->clock, false, true, 0, nullptr, at);
        else check_read(smem_addr(p), bytes, f->who, now(f), f->clock, false, true, nullptr, at);
    }
    std::unique_lock<std::mutex> lock(me->launch->message_mutex, std::defer_lock);
    if (!shared) lock.lock();
    auto& messages = shared ? me->messages : me->launch->messages;
    uint64_t result = op();
    Message left;
    if (auto it = messages.find((uintptr_t)p); it != messages.end()) left = it->second;
    if (reads && left) {
        if (acquires(order)) absorb(f->clock, left);
        else f->clock.acquirable = merged(f->clock.acquirable, left);
    }
    if (writes) {
        Message ours = releases(order) ? knowledge(f) : f->clock.released;
        if (releases(order)) tick(f);
        if (reads) ours = merged(left, ours);
        if (ours) messages[(uintptr_t)p] = ours;
        else if (left) messages.erase((uintptr_t)p);
    }
    return result;
}

static uint64_t apply(Rmw op, uint64_t old, uint64_t v, uint64_t expected, int bytes) {
    switch (op) {
        case Rmw::Add: return old + v;
        case Rmw::AddF32: { float a, b; uint32_t x = uint32_t(old), y = uint32_t(v); std::memcpy(&a, &x, 4); std::memcpy(&b, &y, 4); a += b; std::memcpy(&x, &a, 4); return x; }
        case Rmw::Or: return old | v;
        case Rmw::And: return old & v;
        case Rmw::MaxU: return std::max(old, v);
        case Rmw::MinU: return std::min(old, v);
        case Rmw::MaxS: return bytes == 4 ? uint64_t(std::max(int32_t(old), int32_t(v))) : uint64_t(std::max(int64_t(old), int64_t(v)));
        case Rmw::MinS: return bytes == 4 ? uint64_t(std::min(int32_t(old), int32_t(v))) : uint64_t(std::min(int64_t(old), int64_t(v)));
        case Rmw::Exch: return v;
        case Rmw::Cas: return old == expected ? v : old;
    }
    return old;
}
template <class T> static uint64_t exchange(T* p, Rmw op, uint64_t v, uint64_t expected) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, T(apply(op, old, v, expected, sizeof(T))), true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {}
    return old;
}
// A thread that keeps asking the same address waits for somebody: let the others run.
static void polled(const void* p, bool unchanged, Site at) {
    Fiber* f = self();
    f->polls = f->polled == p ? f->polls + 1 : 0;
    f->polled = p;
    if (unchanged || f->polls >= 16) { f->polls = 0; yield_polling("a poll", at); }
}

uint64_t atomic_rmw(Rmw op, Order order, void* p, int bytes, uint64_t v, uint64_t expected, Site at) {
    uint64_t old = atomically(p, bytes, true, true, order, at, [&] { return bytes == 4 ? exchange((uint32_t*)p, op, v, expected) : exchange((uint64_t*)p, op, v, expected); });
    polled(p, op == Rmw::Cas && old != expected, at);
    return old;
}
uint64_t atomic_load(Order order, const void* p, int bytes, Site at) {
    uint64_t v = atomically(p, bytes, true, false, order, at, [&]() -> uint64_t {
        return bytes == 4 ? __atomic_load_n((const uint32_t*)p, __ATOMIC_SEQ_CST) : __atomic_load_n((const uint64_t*)p, __ATOMIC_SEQ_CST); });
    polled(p, true, at);
    return v;
}
void atomic_store(Order order, void* p, int bytes, uint64_t v, Site at) {
    atomically(p, bytes, false, true, order, at, [&]() -> uint64_t {
        if (bytes == 4) __atomic_store_n((uint32_t*)p, uint32_t(v), __ATOMIC_SEQ_CST);
        else __atomic_store_n((uint64_t*)p, v, __ATOMIC_SEQ_CST);
        return 0;
    });
}
void nanosleep(Site at) { yield_polling("nanosleep", at); }

}  // namespace emu
