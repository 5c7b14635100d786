// wgmma: accumulators are poisoned at the issue, operands count as being read until the wait.
#include "cut_sums.hpp"
#include "state.hpp"

namespace emu {
namespace {

const uint32_t kPoison = 0xffbadbadu;    // a signalling NaN: any arithmetic on it leaves a trace

EMU_SIMD void outer_products(float* __restrict c, const float* __restrict a, const float* __restrict b, int n) {
    for (int m = 0; m < 64; ++m, c += n)
        for (int k = 0; k < 16; ++k) {
            float x = a[m * 16 + k];
            for (int j = 0; j < n; ++j) c[j] += x * b[k * n + j];
        }
}
float operand(Format f, uint64_t desc, bool mn_major, int mn, int k) {
    uint16_t h;
    std::memcpy(&h, smem_ptr(wgmma_operand_addr(desc, mn_major, mn, k)), 2);
    return to_float(f, h);
}
void execute(WgmmaOp& op, WarpGroup& wg) {
    Block& w = *me;
    const int n = op.n;
    w.wg_a.resize(64 * 16);
    w.wg_b.resize(16 * n);
    w.wg_c.assign(64 * n, 0.0f);
    if (op.a_regs) {
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < 8; ++i) {
                int row = (t / 32) * 16 + (t % 32) / 4 + 8 * ((i / 2) % 2), k = (t % 4) * 2 + (i % 2) + 8 * (i / 4);
                w.wg_a[row * 16 + k] = to_float(op.format, op.a[t][i / 2] >> (16 * (i % 2)) & 0xffff);
            }
    } else {
        for (int m = 0; m < 64; ++m) for (int k = 0; k < 16; ++k) w.wg_a[m * 16 + k] = operand(op.format, op.a_desc, op.a_mn, m, k);
    }
    for (int j = 0; j < n; ++j) for (int k = 0; k < 16; ++k) w.wg_b[k * n + j] = operand(op.format, op.b_desc, op.b_mn, j, k);
    const Options& o = w.launch->opt;
    const auto each = [&](auto f) {                  // accumulators of the threads, and the elements that they are
        for (int t = 0; t < 128; ++t) {
            float* acc = wg.flying.at(op.d[t]).value.data();
            for (int i = 0; i < n / 2; ++i) {
                int row = (t / 32) * 16 + (t % 32) / 4 + 8 * ((i / 2) % 2), col = (i / 4) * 8 + (t % 4) * 2 + (i % 2);
                f(acc[i], w.wg_c[row * n + col]);
            }
        }
    };
    if (o.cut) {
        if (op.acc) each([](float& acc, float& element) { element = acc; });
        cut_products(w.wg_c.data(), w.wg_a.data(), w.wg_b.data(), 64, n, 16, o.cut_group, o.cut_group / 8);
        each([](float& acc, float& element) { acc = element; });
    } else {
        outer_products(w.wg_c.data(), w.wg_a.data(), w.wg_b.data(), n);
        each([&](float& acc, float& element) { acc = (op.acc ? acc : 0.0f) + element; });
    }
    op.done = true;
}
void retire(WgmmaOp& op, WarpGroup& wg) {
    if (!op.done) execute(op, wg);
    for (int t = 0; t < 128; ++t) {
        auto it = wg.flying.find(op.d[t]);
        if (--it->second.uses) continue;
        for (int i = 0; i < op.n / 2; ++i) {
            uint32_t u;
            std::memcpy(&u, &op.d[t][i], 4);
            if (u != kPoison) { report("wgmma accumulator touched", op.at, "accumulator %d of thread %d was written while the wgmma was in flight", i, t); break; }
        }
        std::memcpy(op.d[t], it->second.value.data(), it->second.value.size() * 4);
        wg.flying.erase(it);
    }
}
void check_operand(WarpGroup& wg, uint64_t desc, bool mn, int rows, uint32_t clk, Site at) {
    // one check per 16-byte chunk: 8 consecutive k (K-major) or 8 consecutive mn (MN-major)
    Loc loc(at);
    if ((desc >> 49) & 7) { report("wgmma descriptor", loc, "a non-zero base offset is not emulated"); abandon(); }
    int mode = int(desc >> 62), bits = mode == 1 ? 3 : mode == 2 ? 2 : mode == 3 ? 1 : 0;
    uint32_t start = uint32_t(desc & 0x3fff) << 4;
    if ((start >> 7) & ((1u << bits) - 1)) {
        report("wgmma descriptor", loc, "start address smem+%u is not at the start of a swizzle pattern and base offset is 0", start - kSmemBase);
        abandon();
    }
    for (int i = 0; i < rows / (mn ? 8 : 1); ++i)
        for (int k = 0; k < (mn ? 16 : 2); ++k) {
            uint32_t a = wgmma_operand_addr(desc, mn, mn ? i * 8 : i, mn ? k : k * 8);
            if (a < kSmemBase || a + 16 > kSmemBase + me->launch->smem) {
                report("shared out of bounds", loc, "wgmma operand at smem%+ld of %zu", long(a) - long(kSmemBase), me->launch->smem);
                abandon();
            }
            if (checking()) check_read(a, 16, wg.who, clk, wg.entry, true, false, nullptr, loc);
        }
}

}  // namespace

bool warpgroup_collective(int kind, void* a, Site at, const char* name) {   // true for the last to arrive
    Fiber* f = self();
    if (me->cta.threads % 128) { report("warpgroup", at, "%s in a block of %d threads", name, me->cta.threads); abandon(); }
    WarpGroup& wg = me->cta.wgs[f->warp / 4];
    if (wg.arrived == 0) { wg.kind = kind; wg.at = at; }
    else if (wg.kind != kind || wg.at.line != at.line) {
        report("warpgroup divergence", at, "%s while other threads of the warpgroup are at %s", name, where(wg.at).c_str());
        abandon();
    }
    wg.args[f->id % 128] = a;
    if (++wg.arrived < 128) { block(name, at); return false; }
    wg.arrived = 0;
    return true;
}
void wake_warpgroup(int wg) {
    for (int i = 0; i < 128; ++i) { Fiber* f = me->pool[wg * 128 + i].get(); if (f != self()) me->wake(f); }
}

// PTX ISA, "Asynchronous Warpgroup Level Majorness supported by Strides" and the canonical layouts
uint32_t wgmma_operand_addr(uint64_t desc, bool mn_major, int mn, int k) {
    uint32_t start = uint32_t(desc & 0x3fff) << 4, lbo = uint32_t(desc >> 16 & 0x3fff) << 4, sbo = uint32_t(desc >> 32 & 0x3fff) << 4;
    int mode = int(desc >> 62);
    int bits = mode == 1 ? 3 : mode == 2 ? 2 : mode == 3 ? 1 : 0;
    int w = 1 << bits;                              // width of the swizzle atom in 16-byte units
    uint32_t off;
    if (!mn_major)
        off = bits ? (mn % 8) * (w * 16) + (mn / 8) * sbo + k * 2
                   : (mn % 8) * 16 + (mn / 8) * sbo + (k / 8) * lbo + (k % 8) * 2;
    else
        off = bits ? (mn % (8 * w)) * 2 + (mn / (8 * w)) * lbo + (k % 8) * (w * 16) + (k / 8) * sbo
                   : (mn % 8) * 2 + (mn / 8) * sbo + (k % 8) * 16 + (k / 8) * lbo;
    return swizzle_addr(start + off, bits);
}
bool wgmma_in_flight(float* d) { return me->cta.wgs[self()->warp / 4].flying.count(d); }

void wgmma_fence(Site at) {
    Fiber* f = self();
    if (warpgroup_collective(kWgFence, nullptr, at, "wgmma_fence")) { me->cta.wgs[f->warp / 4].fenced = true; wake_warpgroup(f->warp / 4); }
}
void wgmma(Format format, int n, float* d, const uint32_t* a_regs, uint64_t a_desc, bool a_mn, uint64_t b_desc, bool b_mn, bool acc, Site at) {
    struct A { float* d; const uint32_t* a; uint64_t ad, bd; bool acc; } x{d, a_regs, a_desc, b_desc, acc};
    Fiber* f = self();
    int g = f->warp / 4;
    if (!warpgroup_collective(kWgmma, &x, at, "wgmma")) return;
    ++me->counters.wgmma;
    WarpGroup& wg = me->cta.wgs[g];
    if (!wg.fenced) report("missing wgmma_fence", at, "registers were accessible since the last wait and no wgmma.fence followed");
    auto op = std::make_unique<WgmmaOp>();
    op->format = format; op->n = n; op->a_regs = a_regs != nullptr; op->a_desc = a_desc; op->b_desc = b_desc; op->a_mn = a_mn; op->b_mn = b_mn; op->acc = acc; op->at = at;
    op->clk = ++wg.op_clk;
    for (int t = 0; t < 128; ++t) {
        A& y = *(A*)wg.args[t];
        if (y.ad != a_desc || y.bd != b_desc || y.acc != acc) { report("wgmma divergence", at, "thread %d passes other descriptors or scale-d", t); abandon(); }
        op->d[t] = y.d;
        if (y.a) std::memcpy(op->a[t], y.a, 16);
        auto [it, fresh] = wg.flying.try_emplace(y.d);
        if (fresh) { it->second.value.assign(y.d, y.d + n / 2); it->second.n = n / 2; it->second.uses = 0; }
        ++it->second.uses;
        for (int i = 0; i < n / 2; ++i) {
            if (!fresh) {
                uint32_t u;
                std::memcpy(&u, &y.d[i], 4);
                if (u != kPoison) { report("wgmma accumulator touched", at, "accumulator %d of thread %d changed while a wgmma was in flight", i, t); abandon(); }
            }
            std::memcpy(&y.d[i], &kPoison, 4);
        }
    }
    if (checking()) {
        uint64_t version = 0;
        for (int t = 0; t < 128; ++t) version += me->pool[g * 128 + t]->clock.version;
        if (version != wg.entry_version) {
            wg.entry = me->pool[g * 128]->clock;
            for (int t = 1; t < 128; ++t) wg.entry.meet(me->pool[g * 128 + t]->clock);
            wg.entry_version = version;
        }
    }
    if (!op->a_regs) check_operand(wg, a_desc, a_mn, 64, op->clk, at);
    check_operand(wg, b_desc, b_mn, n, op->clk, at);
    if (me->launch->opt.async == Async::Eager) execute(*op, wg);
    wg.open.push_back(std::move(op));
    wake_warpgroup(g);
}
void wgmma_commit(Site at) {
    Fiber* f = self();
    if (!warpgroup_collective(kWgCommit, nullptr, at, "wgmma_commit")) return;
    WarpGroup& wg = me->cta.wgs[f->warp / 4];
    wg.groups.push_back(std::move(wg.open));
    wg.open.clear();
    wake_warpgroup(f->warp / 4);
}
void wgmma_wait(int pending, Site at) {
    Fiber* f = self();
    int g = f->warp / 4;
    if (!warpgroup_collective(kWgWait, nullptr, at, "wgmma_wait")) return;
    WarpGroup& wg = me->cta.wgs[g];
    while ((int)wg.groups.size() > pending) {
        for (auto& op : wg.groups.front()) { retire(*op, wg); wg.seen = op->clk; }
        wg.groups.pop_front();
    }
    if (checking()) for (int t = 0; t < 128; ++t) { auto& c = me->pool[g * 128 + t]->clock; c.all[wg.who] = wg.seen; ++c.version; }
    wg.fenced = false;
    wake_warpgroup(g);
}
}  // namespace emu
