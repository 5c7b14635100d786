// What goes on while a thread does something else: cp.async, mbarriers, the copy engine, wgmma.
#include <algorithm>
#include <cstdlib>

#include "program.hpp"

namespace emu::ptx {
namespace {

uint64_t* barrier(Thread& t, const Ins& i) { return static_cast<uint64_t*>(smem_pointer(uint32_t(R(a) + Reg(i.off)))); }

// May fail once, so that a missing loop shows.
void run_try_wait(Thread& t, const Ins& i) {
    const bool again = t.failed_at == t.pc;
    t.failed_at = -1;
    if (again) { mbarrier_wait(barrier(t, i), uint32_t(R(b)), i.at); R(d) = 1; }
    else if (!(R(d) = mbarrier_test(barrier(t, i), uint32_t(R(b)), i.at))) t.failed_at = t.pc;
}
bool decode_mbarrier(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (!o.take("b64") || !(o.take("shared::cta") || o.take("shared"))) return false;
    if (o.take("init") && x.size() == 2) {
        P.address(i, x[0], i.a);
        i.b = P.slot(x[1]);
        i.exec = RUN { mbarrier_init(barrier(t, i), uint32_t(R(b)), i.at); };
        return true;
    }
    if (o.take("arrive")) {                          // the state that it returns is not modelled
        const bool expect = o.take("expect_tx");
        if (x.size() != (expect ? 3u : 2u) || x[0] != "_") return false;
        P.address(i, x[1], i.a);
        i.b = expect ? P.slot(x[2]) : P.value(0);
        i.exec = RUN { mbarrier_arrive(barrier(t, i), uint32_t(R(b)), i.at); };
        return true;
    }
    if (o.take("try_wait") && o.take("parity") && x.size() == 3) {
        i.d = P.slot(x[0]);
        P.address(i, x[1], i.a);
        i.b = P.slot(x[2]);
        i.exec = run_try_wait;
        return true;
    }
    return false;
}

int rank(Opcode& o) { for (int n = 1; n <= 5; ++n) if (o.take((std::to_string(n) + "d").c_str())) return n; return 0; }
void coordinates(Thread& t, const Ins& i, int* at) { for (size_t k = 0; k < i.more->v0.size(); ++k) at[k] = int(t.r[i.more->v0[k]]); }
bool decode_tensor_copy(Parser& P, Ins& i, Opcode& o, const Operands& x, bool reduce) {
    for (const char* part : {"async", "bulk", "tensor"}) if (!o.take(part)) return false;
    i.n = rank(o);
    o.take("tile");
    if (x.size() == 3 && !reduce) {                  // [shared], [map, coordinates], [mbarrier]
        const size_t to = o.text.find(".shared::"), from = o.text.find(".global");
        if (to > from || !(o.take("shared::cluster") || o.take("shared::cta")) || !o.take("global") || !o.take("mbarrier::complete_tx::bytes")) return false;
        i.a = P.plain_address(x[0]);
        P.address(i, x[1], i.b);
        i.c = P.plain_address(x[2]);
        i.exec = RUN {
            int at[5];
            coordinates(t, i, at);
            tma_load(smem_pointer(uint32_t(R(a))), reinterpret_cast<void*>(R(b) + Reg(i.off)), static_cast<uint64_t*>(smem_pointer(uint32_t(R(c)))), at, i.n, i.at);
        };
    } else if (x.size() == 2) {                      // [map, coordinates], [shared]
        const size_t to = o.text.find(".global"), from = o.text.find(".shared::");
        if (to > from || !o.take("global") || !o.take("shared::cta") || !o.take("bulk_group") || (reduce && !o.take("add"))) return false;
        P.address(i, x[0], i.b);
        i.a = P.plain_address(x[1]);
        i.k = int(reduce ? Bulk::ReduceAdd : Bulk::Store);
        i.exec = RUN {
            int at[5];
            coordinates(t, i, at);
            tma_store(Bulk(i.k), reinterpret_cast<void*>(R(b) + Reg(i.off)), smem_pointer(uint32_t(R(a))), at, i.n, i.at);
        };
    } else return false;
    return i.n && int(more(i).v0.size()) == i.n;
}
bool decode_copy(Parser& P, Ins& i, Opcode& o, const Operands& all) {
    Operands x = all;
    if (o.take("L2::cache_hint") && !x.empty()) x.pop_back();
    if (o.is("cp.reduce.async.bulk.tensor.")) { o.take("reduce"); return decode_tensor_copy(P, i, o, x, true); }
    if (o.is("cp.async.bulk.tensor.")) return decode_tensor_copy(P, i, o, x, false);
    if (!o.take("async")) return false;
    const bool bulk = o.take("bulk");
    if (o.take("commit_group")) { i.exec = bulk ? Exec(RUN { bulk_commit(); }) : Exec(RUN { cp_async_commit(); }); return x.empty(); }
    if (o.take("wait_group") && x.size() == 1) {
        i.n = atoi(x[0].c_str());
        i.k = bulk && o.take("read");
        i.exec = bulk ? Exec(RUN { bulk_wait(i.n, i.k); }) : Exec(RUN { cp_async_wait(i.n); });
        return true;
    }
    if (bulk || x.size() < 3 || x.size() > 4 || x[2] != "16") return false;
    if (!o.take("cg") || !o.take("shared") || !o.take("global")) return false;
    Ins from;                                        // two addresses, one offset each
    P.address(i, x[0], i.a);
    P.address(from, x[1], i.b);
    i.c = x.size() > 3 ? P.slot(x[3]) : P.value(16);
    i.n = int(from.off);
    i.exec = RUN { cp_async_16(smem_pointer(uint32_t(R(a) + Reg(i.off))), reinterpret_cast<void*>(R(b) + Reg(int64_t(i.n))), uint32_t(R(c)), i.at); };
    return from.off == i.n;
}

// ---- wgmma -------------------------------------------------------------------------------------------------------------
constexpr uint32_t kInFlight = 0xffbadbadu;          // what an accumulator's register holds until its wait
void run_wgmma(Thread& t, const Ins& i) {
    const auto &d = i.more->v1, &fragment = i.more->v2;
    Accumulator* acc = nullptr;
    for (auto& a : t.accumulators) if (*a->slots == d) acc = a.get();
    if (!acc) {
        t.accumulators.push_back(std::make_unique<Accumulator>());
        acc = t.accumulators.back().get();
        acc->slots = &d;
        acc->value.resize(d.size());
    }
    if (!acc->dirty) for (size_t k = 0; k < d.size(); ++k) acc->value[k] = as<float>(t.r[d[k]]);
    acc->dirty = true;
    uint32_t a[4] = {};
    for (size_t k = 0; k < fragment.size(); ++k) a[k] = uint32_t(t.r[fragment[k]]);
    const bool registers = !fragment.empty();
    for (int s : d) t.r[s] = kInFlight;
    wgmma(Format(i.off), int(d.size()) * 2, acc->value.data(), registers ? a : nullptr, registers ? 0 : R(a), i.n, R(b), i.k, R(c), i.at);
}
void run_wgmma_wait(Thread& t, const Ins& i) {       // accumulators whose products have retired return to registers
    wgmma_wait(i.n, i.at);
    for (auto& a : t.accumulators) {
        if (!a->dirty || wgmma_in_flight(a->value.data())) continue;
        for (size_t k = 0; k < a->slots->size(); ++k) {
            Reg& r = t.r[(*a->slots)[k]];
            if (uint32_t(r) != kInFlight) trap("an accumulator register changed while a wgmma was in flight", i.at);
            r = reg<float>(a->value[k]);
        }
        a->dirty = false;
    }
}
bool decode_wgmma(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (!o.take("sync") || !o.take("aligned")) return false;
    if (o.take("fence")) { i.exec = RUN { wgmma_fence(i.at); }; return x.empty(); }
    if (o.take("commit_group")) { i.exec = RUN { wgmma_commit(i.at); }; return x.empty(); }
    if (o.take("wait_group")) { i.n = atoi(x.at(0).c_str()); i.exec = run_wgmma_wait; return x.size() == 1; }
    // d, a-desc | {a}, b-desc, scale-d, imm-scale-a, imm-scale-b, [imm-trans-a,] imm-trans-b
    if (!o.take("mma_async") || x.size() < 7 || !o.take("f32")) return false;
    const Str shape = o.parts.size() > 4 ? o.parts[4] : "";
    if (shape.rfind("m64n", 0) != 0 || shape.substr(shape.size() - 3) != "k16" || !o.take(shape.c_str())) return false;
    i.off = o.take("bf16") && o.take("bf16") ? kBf16 : o.take("f16") && o.take("f16") ? kF16 : 0;
    auto& m = more(i);
    m.v1 = P.list(x[0]);
    const bool registers = x[1][0] == '{';
    if (registers) m.v2 = P.list(x[1]); else i.a = P.slot(x[1]);
    i.b = P.slot(x[2]);
    i.c = P.slot(x[3]);
    if (x.size() != (registers ? 7u : 8u) || x[4] != "1" || x[5] != "1") return false;
    i.n = registers ? 0 : atoi(x[6].c_str());
    i.k = atoi(x.back().c_str());
    i.exec = run_wgmma;
    auto sorted = m.v1;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) { P.fail("an accumulator twice"); return false; }
    return i.off && int(m.v1.size()) == atoi(shape.c_str() + 4) / 2 && (!registers || m.v2.size() == 4);
}
}  // namespace

bool decode_async(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const Str& op = o.op();
    if (op == "mbarrier") return decode_mbarrier(P, i, o, x);
    if (op == "cp") return decode_copy(P, i, o, x);
    if (op == "wgmma") return decode_wgmma(P, i, o, x);
    if (op == "fence" && o.take("mbarrier_init")) {
        i.exec = RUN { fence_mbarrier_init(); };
        return o.take("release") && o.take("cluster");
    }
    if (op == "fence" && o.take("proxy")) {
        i.exec = RUN { fence_proxy_async(); };
        return o.take("async") && o.take("shared::cta");
    }
    if (op == "setmaxnreg" && o.take("sync") && o.take("aligned") && o.take("u32") && x.size() == 1) {
        i.n = atoi(x[0].c_str());
        i.k = o.take("inc");
        i.exec = RUN { setmaxnreg(i.n, i.k, i.at); };
        return i.k || o.take("dec");
    }
    return false;
}

}  // namespace emu::ptx
