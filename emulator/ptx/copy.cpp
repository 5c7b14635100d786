// Copies: cp.async, and the copy engine's boxes, plain ranges and reductions. Operands: a and b are the addresses in shared and in global
// memory (or the map's), c the bytes, e the mbarrier, d the blocks of a multicast.
#include <cstdlib>

#include "program.hpp"

namespace emu::ptx {
namespace {

int rank(Opcode& o) { for (int n = 1; n <= 5; ++n) if (o.take((std::to_string(n) + "d").c_str())) return n; return 0; }
void coordinates(Thread& t, const Ins& i, int* at) { for (size_t k = 0; k < i.more->v0.size(); ++k) at[k] = int(t.r[i.more->v0[k]]); }
// The state spaces as the text has them: destination.source
Str spaces(Opcode& o) {
    Str both;
    for (const Str& part : o.parts)
        if (part == "global" || part.rfind("shared::", 0) == 0) both += (both.empty() ? "" : ".") + part;
    for (const Str& space : split(both, '.')) o.take(space.c_str());
    return both;
}
bool into_shared(const Str& s) { return s == "shared::cluster.global" || s == "shared::cta.global"; }
bool out_of_shared(const Str& s) { return s == "global.shared::cta"; }

// Where a load goes: the mbarrier has to be in the same block.
struct Target { void* to; uint64_t* bar; };
Target target(Thread& t, const Ins& i) {
    const uint32_t to = uint32_t(R(a)), bar = uint32_t(R(e));
    if (to >> kRankShift != bar >> kRankShift) trap("the mbarrier of a copy is not in the block of its destination", i.at);
    return {smem_pointer(to), static_cast<uint64_t*>(smem_pointer(bar))};
}
void* generic(Thread& t, const Ins& i) { return reinterpret_cast<void*>(R(b) + Reg(i.off)); }
void run_box_load(Thread& t, const Ins& i) {
    int at[5];
    coordinates(t, i, at);
    const Target to = target(t, i);
    if (i.d < 0) tma_load(to.to, generic(t, i), to.bar, at, i.n, i.at);
    else tma_load_multicast(to.to, generic(t, i), to.bar, at, i.n, uint16_t(R(d)), i.at);
}
void run_box_store(Thread& t, const Ins& i) {
    int at[5];
    coordinates(t, i, at);
    tma_store(Bulk(i.k), generic(t, i), own_shared(uint32_t(R(a)), i.at), at, i.n, i.at);
}
// [shared], [map, coordinates], [mbarrier], blocks of a multicast; or [map, coordinates], [shared]
bool decode_box(Parser& P, Ins& i, Opcode& o, const Operands& x, bool reduce) {
    const bool multicast = o.take("multicast::cluster");
    const Str from_to = spaces(o);
    i.n = rank(o);
    o.take("tile");
    if (into_shared(from_to) && !reduce && x.size() == (multicast ? 4u : 3u) && o.take("mbarrier::complete_tx::bytes")) {
        i.a = P.plain_address(x[0]);
        P.address(i, x[1], i.b);
        i.e = P.plain_address(x[2]);
        if (multicast) i.d = P.slot(x[3]);
        i.exec = run_box_load;
    } else if (out_of_shared(from_to) && !multicast && x.size() == 2 && o.take("bulk_group") && (!reduce || o.take("add"))) {
        P.address(i, x[0], i.b);
        i.a = P.plain_address(x[1]);
        i.k = int(reduce ? Bulk::ReduceAdd : Bulk::Store);
        i.exec = run_box_store;
    } else return false;
    return i.n && int(more(i).v0.size()) == i.n;
}

void run_range_load(Thread& t, const Ins& i) {
    const Target to = target(t, i);
    bulk_load(to.to, generic(t, i), uint32_t(R(c)), to.bar, i.d < 0 ? uint16_t(0) : uint16_t(R(d)), i.at);
}
void run_range_copy(Thread& t, const Ins& i) {
    const Target to = target(t, i);
    bulk_copy_cluster(to.to, own_shared(uint32_t(R(b)), i.at), uint32_t(R(c)), to.bar, i.at);
}
void run_range_store(Thread& t, const Ins& i) {
    bulk_store(Bulk(i.k), Format(i.n), generic(t, i), own_shared(uint32_t(R(a)), i.at), uint32_t(R(c)), i.at);
}
// [to], [from], bytes, [mbarrier], blocks of a multicast
bool decode_range(Parser& P, Ins& i, Opcode& o, const Operands& x, bool reduce) {
    const bool multicast = o.take("multicast::cluster");
    const Str from_to = spaces(o);
    if (x.size() < 3) return false;
    const int to = P.plain_address(x[0]), from = P.plain_address(x[1]);
    i.c = P.slot(x[2]);
    if (out_of_shared(from_to)) {
        i.a = from;
        i.b = to;
        i.k = int(reduce ? Bulk::ReduceAdd : Bulk::Store);
        i.n = kF32;
        if (reduce) {
            const Str type = o.take_last();
            i.n = type == "f32" ? kF32 : type == "bf16" ? kBf16 : type == "f16" ? kF16 : 0;
            if (!i.n || !o.take("add") || o.take("noftz") != (i.n != kF32)) return false;
        }
        i.exec = run_range_store;
        return x.size() == 3 && !multicast && o.take("bulk_group");
    }
    if (reduce || x.size() != (multicast ? 5u : 4u) || !o.take("mbarrier::complete_tx::bytes")) return false;
    i.a = to;
    i.b = from;
    i.e = P.plain_address(x[3]);
    if (multicast) i.d = P.slot(x[4]);
    const bool between = from_to == "shared::cluster.shared::cta";
    i.exec = between ? run_range_copy : run_range_load;
    return between ? !multicast : into_shared(from_to);
}

// [shared], [global], 16, bytes that are read
bool decode_line(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (x.size() < 3 || x.size() > 4 || x[2] != "16") return false;
    if (!o.take("cg") || !(o.take("shared") || o.take("shared::cta")) || !o.take("global")) return false;
    Ins from;                                        // two addresses, one offset each
    P.address(i, x[0], i.a);
    P.address(from, x[1], i.b);
    i.c = x.size() > 3 ? P.slot(x[3]) : P.value(16);
    i.n = int(from.off);
    i.exec = RUN { cp_async_16(own_shared(uint32_t(R(a) + Reg(i.off)), i.at), reinterpret_cast<void*>(R(b) + Reg(int64_t(i.n))), uint32_t(R(c)), i.at); };
    return from.off == i.n;
}
}  // namespace

bool decode_copy(Parser& P, Ins& i, Opcode& o, const Operands& all) {
    if (o.op() != "cp") return false;
    Operands x = all;
    if (o.take("L2::cache_hint") && !x.empty()) x.pop_back();
    const bool reduce = o.take("reduce");
    if (!o.take("async")) return false;
    const bool bulk = o.take("bulk");
    if (o.take("commit_group")) { i.exec = bulk ? Exec(RUN { bulk_commit(); }) : Exec(RUN { cp_async_commit(); }); return x.empty(); }
    if (o.take("wait_group") && x.size() == 1) {
        i.n = atoi(x[0].c_str());
        i.k = bulk && o.take("read");
        i.exec = bulk ? Exec(RUN { bulk_wait(i.n, i.k); }) : Exec(RUN { cp_async_wait(i.n); });
        return true;
    }
    if (!bulk) return !reduce && decode_line(P, i, o, x);
    return o.take("tensor") ? decode_box(P, i, o, x, reduce) : decode_range(P, i, o, x, reduce);
}

}  // namespace emu::ptx
