// The shadow of shared memory: races, reads of copies in flight or of what was never written, missing proxy fences.
#include "state.hpp"

namespace emu {

void* smem_pointer(uint32_t a) {
    int rank = int(a >> kRankShift) - 1;
    return rank < 0 || rank >= me->worker->size ? smem_ptr(a) : me->worker->blocks[rank]->smem + (a & ((1u << kRankShift) - 1));
}
void* dynamic_smem() { return me->smem + kSmemBase; }
uint32_t smem_addr(const void* p) {
    uintptr_t off = (const char*)p - me->smem;
    if (off < kSmemBase + kSmemMax || me->worker->size == 1) return uint32_t(off);
    Block* b = block_of(p);
    return b ? uint32_t((const char*)p - b->smem) | uint32_t(b->cta.rank + 1) << kRankShift : uint32_t(off);
}

bool in_smem(const void* p, size_t n, const char* op, const Loc& loc) {
    uintptr_t off = (const char*)p - me->smem;
    if (off >= kSmemBase && off + n <= kSmemBase + me->launch->smem) return true;
    report("shared out of bounds", loc, "%s of %zu bytes at offset %ld of %zu allocated", op, n, (long)off - (long)kSmemBase, me->launch->smem);
    return false;
}

static void race(const char* what, const Loc& loc, uint32_t addr, int other, const void* other_pc) {
    report("shared race", loc, "%s at smem+%u, unordered with %s%s%s", what, addr - kSmemBase, who_name(other).c_str(),
           other_pc ? " at " : "", other_pc ? where(other_pc).c_str() : "");
}
static void unfenced(const char* what, const Loc& loc, uint32_t addr, const Cell& k) {
    report("missing fence.proxy.async", loc, "async-proxy %s of smem+%u written by %s%s%s without a proxy fence", what, addr - kSmemBase,
           who_name(k.w_who).c_str(), k.w_pc ? " at " : "", k.w_pc ? where(k.w_pc).c_str() : "");
}
// Whether what lies here was read, by the async proxy at least, and that is over for `who`: then so is the writing, with its fence. Matters
// where reads alone are handed on: wgmma's, to another block of the cluster.
static bool was_read(const Cell& k, int who, const Clock& c) {
    for (auto& r : k.readers)
        if (r.async && (r.who == who || r.clk <= c.all[r.who])) return true;
    return false;
}
// Keeps the last read of each thread that may run beside this one, which is about to read. Not at each read: as many threads as read the same.
static void forget_readers(std::vector<Reader>& readers, int who, const Clock& c) {
    std::vector<bool> seen(c.all.size());
    size_t first = readers.size();
    for (size_t i = first; i-- > 0;) {
        const Reader r = readers[i];
        if (r.who == who || seen[r.who] || r.clk <= c.all[r.who]) continue;
        seen[r.who] = true;
        readers[--first] = r;
    }
    readers.erase(readers.begin(), readers.begin() + std::ptrdiff_t(first));
}
static uint32_t addr_of(const Cell* k) { return kSmemBase + 2 * uint32_t(k - me->cells.data()); }

void check_read(uint32_t addr, size_t n, int who, uint32_t clk, const Clock& c, bool async, bool atomic, const void* pc, const Loc& loc) {
    me->counters.shared_read += n;
    Cell* end = cells_at(addr + n + 1);
    for (Cell* k = cells_at(addr); k < end; ++k) {
        if (k->inflight) { race("read of the destination of a copy still in flight", loc, addr_of(k), k->w_who, k->w_pc); return; }
        if (!k->init) {
            if (instrumented) { report("uninitialised shared", loc, "read of smem+%u, never written", addr_of(k) - kSmemBase); return; }
            continue;
        }
        if (k->w_who != who && k->w_clk > c.all[k->w_who] && !(atomic && k->atomic)) { race("read", loc, addr_of(k), k->w_who, k->w_pc); return; }
        if (async && !k->by_async && k->w_clk > c.fenced[k->w_who]) { unfenced("read", loc, addr_of(k), *k); return; }
        if (atomic) continue;                // its write follows
        auto& r = k->readers;
        if (!r.empty() && r.back().who == who) { r.back().clk = clk; r.back().pc = pc; continue; }
        if (r.size() >= k->room) {
            forget_readers(r, who, c);
            k->room = std::max(8u, 2 * uint32_t(r.size()));
        }
        r.push_back({uint16_t(who), async, clk, pc});
    }
}

bool check_write(uint32_t addr, size_t n, int who, uint32_t clk, const Clock& c, bool async, bool atomic, uint16_t inflight, const void* pc, const Loc& loc) {
    me->counters.shared_write += n;
    Cell* end = cells_at(addr + n + 1);
    bool ok = true;
    for (Cell* k = cells_at(addr); k < end; ++k) {
        if (ok && k->inflight && k->inflight != inflight) {
            race("write over the destination of a copy still in flight", loc, addr_of(k), k->w_who, k->w_pc);
            ok = false;
        }
        if (ok && k->init && k->w_who != who && k->w_clk > c.all[k->w_who] && !(atomic && k->atomic) && !was_read(*k, who, c)) {
            race("write", loc, addr_of(k), k->w_who, k->w_pc);
            ok = false;
        }
        if (ok && async && k->init && !k->by_async && k->w_clk > c.fenced[k->w_who] && !was_read(*k, who, c)) { unfenced("write", loc, addr_of(k), *k); ok = false; }
        if (ok) for (auto& r : k->readers)
            if (r.who != who && r.clk > c.all[r.who]) { race("overwrite of data still being read", loc, addr_of(k), r.who, r.pc); ok = false; break; }
        k->readers.clear();
        k->w_who = uint16_t(who);
        k->w_clk = clk;
        k->w_pc = pc;
        k->by_async = async;
        k->atomic = atomic;
        k->inflight = inflight;
        k->init = true;
    }
    return ok;
}

void land(uint32_t addr, size_t n, int who, uint32_t clk, bool async) {
    Cell* end = cells_at(addr + n + 1);
    for (Cell* k = cells_at(addr); k < end; ++k) { k->inflight = 0; k->w_who = uint16_t(who); k->w_clk = clk; k->by_async = async; k->init = true; }
}

}  // namespace emu
