// The register pool of setmaxnreg: what the block was launched with, passed on between its warpgroups.
#include "state.hpp"

namespace emu {

// A file of 65536; ptxas may use what the launch bounds leave to a thread.
int Entry::launch_registers() const {
    if (registers) return (registers + 7) / 8 * 8;
    if (!max_threads) return 0;
    const int warps = (max_threads + 31) / 32 * std::max(min_blocks, 1);
    return std::min(256, 65536 / (warps * 32) / 8 * 8);
}

void setmaxnreg(int regs, bool inc, Site at) {
    if (regs % 8 || regs < 24 || regs > 256) { report("setmaxnreg", at, "%d registers: a multiple of 8 from 24 to 256", regs); abandon(); }
    Fiber* f = self();
    Cta& c = me->cta;
    const int g = f->warp / 4, total = me->launch->registers * c.threads;
    if (!me->launch->registers) { report("setmaxnreg", at, "the kernel has no launch bounds: its registers at the launch are unknown, and ptxas ignores this"); abandon(); }
    if (!warpgroup_collective(kSetReg + 1024 * regs + inc, nullptr, at, "setmaxnreg")) return;
    WarpGroup& wg = c.wgs[g];
    const int more = regs - wg.regs;
    if (inc ? more < 0 : more > 0) { report("setmaxnreg", at, "%s to %d registers from %d", inc ? ".inc" : ".dec", regs, wg.regs); abandon(); }
    if (!inc) {
        wg.regs = regs;
        c.pool -= more * 128;
        while (!c.claims.empty() && c.claims.front().regs * 128 <= c.pool) {
            auto claim = c.claims.front();
            c.claims.pop_front();
            c.pool -= claim.regs * 128;
            c.wgs[claim.group].regs += claim.regs;
            wake_warpgroup(claim.group);
        }
    } else if (c.claims.empty() && more * 128 <= c.pool) {
        wg.regs = regs;
        c.pool -= more * 128;
    } else {
        // Those who wait cannot give back; anybody else might, but for 24.
        int least = regs * 128;
        for (int i = 0; i < int(c.wgs.size()); ++i) {
            if (i == g) continue;
            int theirs = 24;
            for (auto& claim : c.claims) if (claim.group == i) theirs = c.wgs[i].regs + claim.regs;
            least += theirs * 128;
        }
        if (least > total) {
            report("setmaxnreg over-subscription", at, "warpgroups ask for at least %d registers, the block was launched with %d (%d a thread)", least, total, me->launch->registers);
            abandon();
        }
        c.claims.push_back({g, more});
        block("setmaxnreg.inc", at);
        return;
    }
    wake_warpgroup(g);
}

}  // namespace emu
