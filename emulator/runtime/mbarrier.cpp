// mbarriers: a phase ends when no arrival and no byte is missing.
#include "mbarrier.hpp"

namespace emu {

MBar& bar_at(uint64_t* p, const char* op, Site at) {
    if (!in_smem(p, 8, op, at)) abandon();
    uint32_t a = smem_addr(p);
    for (auto& b : me->cta.mbars)
        if (b.addr == a) {
            if (*p != b.key) { report("mbarrier overwritten", at, "the object at smem+%u was overwritten", a - kSmemBase); abandon(); }
            return b;
        }
    report("mbarrier not initialised", at, "%s on smem+%u", op, a - kSmemBase);
    abandon();
}
static void passed(MBar& b, Fiber* f, bool cluster) {
    b.seen = b.completed;
    if (!checking()) return;
    f->clock.join(b.done);
    if (cluster && me->worker->size > 1) f->clock.join(b.cluster_done);
}
void phase_check(MBar& b) {
    if (b.pending != 0 || b.tx != 0) return;
    b.phase ^= 1;
    b.pending = b.count;
    ++b.completed;
    if (checking()) {
        std::swap(b.done, b.pend);
        b.pend.clear();
        if (me->worker->size > 1) { std::swap(b.cluster_done, b.cluster_pend); b.cluster_pend.clear(); }
    }
    auto waiting = std::move(b.waiting);
    b.waiting.clear();
    for (auto& w : waiting) {
        if (b.phase != w.parity) {
            passed(b, w.f, w.cluster);
            me->wake(w.f);
        } else b.waiting.push_back(w);
    }
}
void mbarrier_init(uint64_t* p, uint32_t count, Site at) {
    Fiber* f = self();
    if (!in_smem(p, 8, "mbarrier.init", at)) abandon();
    if ((uintptr_t)p % 8 || !count || count > 0xfffff) { report("mbarrier", at, "init(count %u) at %p", count, (void*)p); abandon(); }
    Cta& c = me->cta;
    uint32_t a = smem_addr(p);
    for (auto& b : c.mbars) if (b.addr == a && *p == b.key) { report("mbarrier", at, "init of a live mbarrier without inval"); abandon(); }
    if ((int)c.mbars.size() == kMaxBars) { report("mbarrier", at, "more than %d mbarriers", kMaxBars); abandon(); }
    c.mbars.emplace_back();
    MBar& b = c.mbars.back();
    b.addr = a;
    b.count = b.pending = count;
    b.who = c.base + c.threads + kMaxWg + int(c.mbars.size()) - 1;
    b.key = me->worker->rng() | 1;
    b.pend.reset(c.clocks);
    b.done.reset(c.clocks);
    if (me->worker->size > 1) { b.cluster_pend.reset(c.clocks); b.cluster_done.reset(c.clocks); }
    *p = b.key;
    if (checking()) check_write(a, 8, f->who, now(f), f->clock, false, false, 0, nullptr, at);
}
void fence_mbarrier_init() {
    if (me->worker->size > 1 && checking()) { self()->bars_fenced = self()->clock; tick(self()); }
    for (auto& b : me->cta.mbars) b.visible_to_async = true;
}
void fence_proxy_async() {
    Fiber* f = self();
    if (checking()) {
        f->clock.fenced.set(f->who, f->clock.all[f->who], f->clock.all.size());     // this thread's own writes, as the guide has it
        tick(f);
    }
    for (auto& b : me->cta.mbars) b.visible_to_async = true;
}
static void check_bar_use(MBar& b, Site at) {              // using an mbarrier reads what its init wrote
    if (!checking()) return;
    Fiber* f = self();
    check_read(b.addr, 8, f->who, now(f), f->clock, false, false, nullptr, at);
    for (Cell* k = cells_at(b.addr); k < cells_at(b.addr) + 4; ++k) k->readers.clear();
}
void mbarrier_arrive(uint64_t* p, uint32_t tx, Site at) { mbarrier_arrive_cluster(p, tx, false, at); }
void mbarrier_arrive_cluster(uint64_t* p, uint32_t tx, bool release, Site at) {
    Fiber* f = self();
    Block* owner = block_of(p);
    const bool remote = owner && owner != f->home;
    In in(remote ? owner : me);
    if (remote) meet(owner, f, at);
    MBar& b = bar_at(p, "mbarrier.arrive", at);
    check_bar_use(b, at);
    if (b.pending == 0) { report("mbarrier", at, "more arrivals than the count of %u in one phase", b.count); abandon(); }
    b.tx += tx;
    if (b.tx > 0xfffff) { report("mbarrier", at, "transaction count overflow"); abandon(); }
    if (checking()) {
        if (remote) {
            async_part(b.pend, f->clock);
            b.remote = {b.completed, now(f), f->who, at};
        } else b.pend.join(f->clock);
        if (release && me->worker->size > 1) b.cluster_pend.join(f->clock);
        tick(f);
    }
    --b.pending;
    phase_check(b);
}
bool mbarrier_test(uint64_t* p, uint32_t parity, Site at) { return mbarrier_test_cluster(p, parity, false, at); }
bool mbarrier_test_cluster(uint64_t* p, uint32_t parity, bool acquire, Site at) {
    MBar& b = bar_at(p, "mbarrier.try_wait", at);
    check_bar_use(b, at);
    if (parity > 1) { report("mbarrier", at, "parity %u", parity); abandon(); }
    if (b.phase == parity) return false;
    passed(b, self(), acquire);
    return true;
}
void mbarrier_wait(uint64_t* p, uint32_t parity, Site at) { mbarrier_wait_cluster(p, parity, false, at); }
void mbarrier_wait_cluster(uint64_t* p, uint32_t parity, bool acquire, Site at) {
    if (mbarrier_test_cluster(p, parity, acquire, at)) return;
    bar_at(p, "mbarrier.try_wait", at).waiting.push_back({self(), parity, acquire});
    block("mbarrier_wait", at);
}

}  // namespace emu
