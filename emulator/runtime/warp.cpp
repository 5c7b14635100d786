// Collectives of a warp: the last lane to arrive acts for all. A lane that is somewhere else is a divergence.
#include "state.hpp"

namespace emu {

Rendezvous* warp_collective(int kind, uint32_t mask, void* a, Site at, const char* name) {
    Fiber* f = self();
    auto& open = me->cta.warp_rv[f->warp];
    if (!(mask >> f->lane & 1)) { report("bad mask", at, "%s: lane %d is not in mask %08x", name, f->lane, mask); abandon(); }
    for (auto& r : open) {
        if (!(r.mask & mask)) continue;
        if (r.kind != kind || r.mask != mask) {
            report("warp divergence", at, "%s (mask %08x) while other lanes are at %s (mask %08x)", name, mask, where(r.at).c_str(), r.mask);
            abandon();
        }
        r.args[f->lane] = a;
        r.arrived |= 1u << f->lane;
        if (r.arrived == r.mask) return &r;
        block(name, at);
        return nullptr;
    }
    Rendezvous r{kind, mask, 1u << f->lane, at, {}};
    r.args[f->lane] = a;
    open.push_back(r);
    if (r.arrived == r.mask) return &open.back();
    block(name, at);
    return nullptr;
}
void finish_warp(Rendezvous* r) {
    Fiber* f = self();
    auto& open = me->cta.warp_rv[f->warp];
    for (int l = 0; l < 32; ++l)
        if ((r->mask >> l & 1) && l != f->lane) me->wake(lane_fiber(l));
    open.erase(open.begin() + (r - open.data()));
}

void sync_warp(uint32_t mask, Site at) {
    if (Rendezvous* r = warp_collective(kSyncWarp, mask, nullptr, at, "__syncwarp")) {
        if (checking()) {
            Clock c = self()->clock;
            for (int l = 0; l < 32; ++l) if (mask >> l & 1) { c.join(lane_fiber(l)->clock); tick(lane_fiber(l)); }
            for (int l = 0; l < 32; ++l) if (mask >> l & 1) lane_fiber(l)->clock.join(c);
        }
        finish_warp(r);
    }
}
uint64_t shuffle(Shfl kind, uint32_t mask, uint64_t v, int src, int width, Site at) {
    struct A { Shfl kind; uint64_t v, out; int src, width; } a{kind, v, v, src, width};
    if (Rendezvous* r = warp_collective(kShfl, mask, &a, at, "shfl")) {
        for (int l = 0; l < 32; ++l) {
            if (!(mask >> l & 1)) continue;
            A& x = *(A*)r->args[l];
            int seg = l / x.width * x.width, s = l;
            if (x.kind == kIdx) s = seg + (x.src & (x.width - 1));
            if (x.kind == kXor) s = (l ^ x.src) < seg + x.width ? l ^ x.src : l;
            if (x.kind == kUp) s = l - x.src >= seg ? l - x.src : l;
            if (x.kind == kDown) s = l + x.src < seg + x.width ? l + x.src : l;
            if (!(mask >> s & 1)) { report("shuffle from inactive lane", at, "lane %d reads lane %d", l, s); x.out = ~0ull; continue; }
            x.out = ((A*)r->args[s])->v;
        }
        finish_warp(r);
    }
    return a.out;
}
uint32_t ballot(uint32_t mask, bool p, Site at) {
    struct A { bool p; uint32_t out; } a{p, 0};
    if (Rendezvous* r = warp_collective(kBallot, mask, &a, at, "vote")) {
        uint32_t m = 0;
        for (int l = 0; l < 32; ++l) if ((mask >> l & 1) && ((A*)r->args[l])->p) m |= 1u << l;
        for (int l = 0; l < 32; ++l) if (mask >> l & 1) ((A*)r->args[l])->out = m;
        finish_warp(r);
    }
    return a.out;
}

}  // namespace emu
