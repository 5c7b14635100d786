// The copy engine. Loads land when nothing else can run (lazy), at once (eager) or at random; stores read their source when
// this thread waits for them at the latest.
#include "copy_engine.hpp"
#include "mbarrier.hpp"

namespace emu {

template <class T, class F> static void combine(T* p, F f) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, f(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}
static uint16_t narrow(Format f, float x) {
    if (f == kF16) { Binary16 h = Binary16(x); uint16_t r; std::memcpy(&r, &h, 2); return r; }
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
void put(Bulk kind, Format format, char* g, const char* s, uint32_t bytes) {
    if (kind == Bulk::Store) std::memcpy(g, s, bytes);
    else if (bytes == 4) {
        float v;
        std::memcpy(&v, s, 4);
        combine((uint32_t*)g, [&](uint32_t old) { float p; std::memcpy(&p, &old, 4); p += v; std::memcpy(&old, &p, 4); return old; });
    } else {
        uint16_t v;
        std::memcpy(&v, s, 2);
        combine((uint16_t*)g, [&](uint16_t old) { return narrow(format, to_float(format, old) + to_float(format, v)); });
    }
}
void fetched(Fiber* f, uintptr_t p, size_t n, Site at) {
    me->counters.bulk_read += n;
    check_global(p, n, false, false, f->who, now(f), f->clock, at);
}
void wrote(const BulkOp& op, uintptr_t p, size_t n) {
    me->counters.bulk_write += n;
    check_global(p, n, true, op.kind == Bulk::ReduceAdd, op.by->storer + kMaxStorers, op.clk, op.by->clock, op.at);
}

static void finish_load(LoadOp& op) {
    In in(op.to);
    op.linear ? line_in(op) : box_in(op);
    MBar& b = *op.bar;
    uint32_t clk = ++b.op_clk;
    if (checking()) {
        land(op.dst, op.bytes, b.who, clk, true);
        b.pend.all[b.who] = clk;
        b.pend.fenced.set(b.who, clk, b.pend.all.size());
    }
    b.tx -= op.bytes;
    phase_check(b);
}
void finish_store(BulkOp& op) {
    if (op.read_done) return;
    op.linear ? line_out(op) : box_out(op);
    op.read_done = true;
}
bool engine_step(bool random) {
    Worker& w = *me->worker;
    size_t n = 0;
    for (int r = 0; r < w.size; ++r) n += w.blocks[r]->cta.loads.size();
    if (!n) return false;
    size_t i = random ? w.rng() % n : 0;
    for (int r = 0;; ++r) {
        auto& L = w.blocks[r]->cta.loads;
        if (i >= L.size()) { i -= L.size(); continue; }
        auto op = std::move(L[i]);
        L.erase(L.begin() + i);
        finish_load(*op);
        return true;
    }
}

void issue_load(LoadOp op, void* dst, uint64_t* bar, uint32_t blocks, const char* name) {
    Fiber* f = self();
    if (!blocks || blocks >> me->worker->size) { report("multicast", op.at, "blocks %#x of a cluster of %d", blocks, me->worker->size); abandon(); }
    const Block *of_dst = block_of(dst), *of_bar = block_of(bar);
    const uintptr_t to = (char*)dst - (of_dst ? of_dst : me)->smem, at_bar = (char*)bar - (of_bar ? of_bar : me)->smem;
    for (int r = 0; r < me->worker->size; ++r) {
        if (!(blocks >> r & 1)) continue;
        Block* block = me->worker->blocks[r].get();
        In in(block);
        if (block != f->home) meet(block, f, op.at);
        MBar& b = bar_at((uint64_t*)(block->smem + at_bar), name, op.at);
        if (!b.visible_to_async) report("mbarrier init not fenced", op.at, "the async proxy may not see the initialised mbarrier");
        if (!in_smem(block->smem + to, op.bytes, name, op.at)) abandon();
        auto mine = std::make_unique<LoadOp>(op);
        mine->to = block;
        mine->bar = &b;
        mine->dst = uint32_t(to);
        mine->tag = uint16_t(0x8000 | (block->cta.next_tag++ & 0x7fff));
        if (checking()) {
            if (block != f->home) reach(block, b.who, b.op_clk + 1, f, op.at);
            check_write(mine->dst, op.bytes, b.who, b.op_clk + 1, f->clock, true, false, mine->tag, nullptr, op.at);
        }
        std::memset(block->smem + to, 0xff, op.bytes);
        if (me->launch->opt.async == Async::Eager) finish_load(*mine);
        else block->cta.loads.push_back(std::move(mine));
    }
}
void issue_store(BulkOp it) {
    Fiber* f = self();
    Cta& c = me->cta;
    if (f->storer < 0) {
        if (c.storers == kMaxStorers) { report("bulk store", it.at, "more than %d threads issue bulk stores", kMaxStorers); abandon(); }
        f->storer = c.base + c.threads + kMaxWg + kMaxBars + c.storers++;
    }
    it.clk = f->clock.all[f->storer] + uint32_t(f->bulk_groups.size()) + 1;   // one tick per group
    auto op = std::make_unique<BulkOp>(it);
    if (checking()) check_read(op->src, op->bytes, f->storer, op->clk, f->clock, true, false, nullptr, op->at);
    f->bulk.push_back(op.get());
    if (me->launch->opt.async == Async::Eager) finish_store(*op);
    c.stores.push_back(std::move(op));
}
void bulk_commit() {
    Fiber* f = self();
    f->bulk_groups.push_back(std::move(f->bulk));
    f->bulk.clear();
}
void bulk_wait(int pending, bool read_only) {
    Fiber* f = self();
    while ((int)f->bulk_groups.size() > pending) {
        for (auto* op : f->bulk_groups.front()) finish_store(*op);
        f->bulk_groups.pop_front();
        if (f->storer >= 0) ++f->clock.all[f->storer];
    }
    if (f->storer >= 0 && !read_only) f->clock.all[f->storer + kMaxStorers] = f->clock.all[f->storer];
    ++f->clock.version;
}

}  // namespace emu
