// Clusters: their barrier, and who may use another block's shared memory. A block's logical threads are numbered past those of
// the blocks before it, so that one vector clock covers the cluster.
#include "state.hpp"

namespace emu {

Block* block_of_thread(int who) { return me->worker->blocks[me->worker->size == 1 ? 0 : who / me->launch->logical].get(); }
Block* block_of(const void* p) {
    auto in = [&](const Block& b) { return (uintptr_t)p - (uintptr_t)b.smem < kSmemBase + kSmemMax + kPage; };
    if (in(*me)) return me;
    for (int r = 0; r < me->worker->size; ++r)
        if (in(*me->worker->blocks[r])) return me->worker->blocks[r].get();
    return nullptr;
}
void async_part(Clock& to, const Clock& from) {
    const size_t per = me->launch->logical, threads = me->cta.threads;
    for (size_t i = threads; i < from.all.size(); i = i / per * per + per + threads) {
        const size_t n = i / per * per + per - i;
        vmax(&to.all[i], &from.all[i], n);
        to.fenced.join(from.fenced, i, n, from.all.size());
    }
    ++to.version;
}

uint32_t cluster_rank() { return uint32_t(me->cta.rank); }
uint32_t cluster_size() { return uint32_t(me->worker->size); }
uint3 cluster_dims() { const dim3& c = me->launch->cluster; return {c.x, c.y, c.z}; }

void* map_shared(const void* p, uint32_t rank, Site at) {
    if (rank >= cluster_size()) { report("mapa", at, "block %u of a cluster of %u", rank, cluster_size()); abandon(); }
    Block* from = block_of(p);
    if (!from) { report("mapa", at, "%p is not in shared memory", p); abandon(); }
    return me->worker->blocks[rank]->smem + ((const char*)p - from->smem);
}

// ---- the life of a block -----------------------------------------------------------------------------------------------
void meet(Block* to, Fiber* by, const Loc& at) {
    const Cta& c = to->cta;
    if (!c.alive) {
        In home(by->home);
        report("shared memory of an exited block", at, "block %d of the cluster has exited", c.rank);
        abandon();
    }
    if (!checking() || by->known_blocks >> c.rank & 1) return;
    const auto& all = by->clock.all;
    if (std::none_of(all.begin() + c.base, all.begin() + c.base + c.threads, [](uint32_t clk) { return clk; }))
        report("shared memory of a block not started", at, "block %d of the cluster may not run yet: no cluster barrier orders its start before this", c.rank);
    by->known_blocks |= 1u << c.rank;
}
void reach(Block* to, int who, uint32_t clk, Fiber* by, const Loc& at) {
    meet(to, by, at);
    if (!checking()) return;
    auto [it, fresh] = to->cta.visits.try_emplace(who, Cta::Visit{clk, at});
    if (!fresh && it->second.clk < clk) it->second = {clk, at};
}
// Everything that others did here has to be known to a thread that exits, else the exit may come first.
void check_visits() {
    const Cta& c = me->cta;
    std::vector<uint32_t> end(c.clocks);
    for (int i = 0; i < c.threads; ++i) vmax(end.data(), me->pool[i]->clock.all.data(), end.size());
    auto late = [&](int who, const Loc& at) {
        report("shared memory of an exited block", at, "%s uses the shared memory of block %d of the cluster, which may have exited: nothing orders its exit after this",
               who_name(who).c_str(), c.rank);
    };
    for (auto& [who, visit] : c.visits) if (visit.clk > end[who]) late(who, visit.at);
    for (auto& b : c.mbars) if (b.remote.who >= 0 && b.seen <= b.remote.phase && b.remote.clk > end[b.remote.who]) late(b.remote.who, b.remote.at);
}

// ---- the barrier -------------------------------------------------------------------------------------------------------
static void complete(Worker& w) {
    ClusterBarrier& b = w.barrier;
    if (!b.arrived || b.arrived < w.alive) return;
    b.arrived = 0;
    ++b.phase;
    std::swap(b.pend, b.done);
    b.pend.clear();
    auto waiting = std::move(b.waiting);
    b.waiting.clear();
    for (Fiber* f : waiting) {
        if (checking()) f->clock.join(b.done);
        if (f != w.current) me->wake(f);
    }
}
void cluster_arrive(bool release, bool aligned, Site at) {
    Fiber* f = self();
    ClusterBarrier& b = me->worker->barrier;
    if (f->cluster_arrived) { report("cluster barrier", at, "a second arrival without a wait"); abandon(); }
    // The lanes of a warp arrive by the same instruction.
    Site& warp = me->cta.cluster_at[f->warp];
    bool first = true;
    for (int l = 0; l < 32 && f->warp * 32 + l < me->cta.threads; ++l) {
        Fiber* other = lane_fiber(l);
        if (other != f && other->cluster_arrived && other->cluster_phase == b.phase) first = false;
    }
    if (first) warp = at;
    else if (!aligned) {}
    else if (warp.line != at.line || warp.file != at.file) {
        report("cluster barrier divergence", at, "other lanes of this warp arrive at %s", where(warp).c_str());
        abandon();
    }
    f->cluster_arrived = true;
    f->cluster_phase = b.phase;
    if (checking()) {
        if (release) b.pend.join(f->clock);
        else if (!f->bars_fenced.all.empty()) b.pend.join(f->bars_fenced);
        b.pend.all[f->who] = std::max(b.pend.all[f->who], 1u);    // that it runs
        tick(f);
    }
    ++b.arrived;
    complete(*me->worker);
}
void cluster_wait(Site at) {
    Fiber* f = self();
    ClusterBarrier& b = me->worker->barrier;
    if (!f->cluster_arrived) { report("cluster barrier", at, "a wait without an arrival"); abandon(); }
    f->cluster_arrived = false;
    if (b.phase != f->cluster_phase) {
        if (checking()) f->clock.join(b.done);
        return;
    }
    b.waiting.push_back(f);
    block("the cluster's barrier", at);
}
void cluster_left(Fiber* f) {                          // who has exited is not waited for
    Worker& w = *me->worker;
    if (f->cluster_arrived && f->cluster_phase == w.barrier.phase) --w.barrier.arrived;
    f->cluster_arrived = false;
    complete(w);
}

}  // namespace emu
