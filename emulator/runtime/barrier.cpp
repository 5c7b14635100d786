// __syncthreads and named barriers.
#include "state.hpp"

namespace emu {

static void bar_wait(int id, int threads, bool wait, Site at, const char* name) {
    Fiber* f = self();
    if (id < 0 || id > 15 || (threads % 32 && threads != me->cta.threads) || threads <= 0 || threads > me->cta.threads) {
        report("bad barrier", at, "%s id %d, %d threads", name, id, threads);
        abandon();
    }
    Barrier& b = me->cta.bars[id];
    if (b.arrived && b.expected != threads) { report("barrier mismatch", at, "barrier %d: %d threads here, %d elsewhere", id, threads, b.expected); abandon(); }
    if (!b.arrived) { b.expected = threads; b.clock.reset(me->cta.clocks); }
    if (b.lanes[f->warp] && (b.at[f->warp].line != at.line || b.at[f->warp].file != at.file)) {
        report("barrier divergence", at, "barrier %d: other lanes of this warp are at %s", id, where(b.at[f->warp]).c_str());
        abandon();
    }
    b.at[f->warp] = at;
    ++b.lanes[f->warp];
    if (checking()) { b.clock.join(f->clock); tick(f); }
    ++b.arrived;
    if (wait) b.waiting.push_back(f);
    if (b.arrived == b.expected) {
        b.arrived = 0;
        for (int w = 0; w < 32; ++w) {
            int size = std::min(32, me->cta.threads - 32 * w);     // the last warp may be a partial one
            if (b.lanes[w] && b.lanes[w] != size) { report("barrier divergence", at, "barrier %d completed by part of warp %d", id, w); abandon(); }
            b.lanes[w] = 0;
        }
        auto w = std::move(b.waiting);
        b.waiting.clear();
        for (Fiber* g : w) {
            if (checking()) g->clock.join(b.clock);
            if (g != f) me->wake(g);
        }
    } else if (wait) block(name, at);
}
void sync_threads(Site at) { bar_wait(0, me->cta.threads, true, at, "__syncthreads"); }
void named_sync(int id, int n, Site at) { bar_wait(id, n, true, at, "named_barrier_sync"); }
void named_arrive(int id, int n, Site at) { bar_wait(id, n, false, at, "named_barrier_arrive"); }

}  // namespace emu
