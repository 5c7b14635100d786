// What goes on while a thread does something else, but copies: mbarriers, wgmma.
#include <algorithm>
#include <cstdlib>

#include "program.hpp"

namespace emu::ptx {
namespace {

// mbarrier.sem.scope.space: whether the semantics are named, and reach the cluster.
bool of_cluster(Opcode& o, const char* semantics) {
    if (!o.take(semantics)) return false;
    if (o.take("cluster")) return true;
    o.take("cta");
    return false;
}
uint64_t* barrier(Thread& t, const Ins& i) { return static_cast<uint64_t*>(own_shared(uint32_t(R(a) + Reg(i.off)), i.at)); }
uint64_t* barrier_of_cluster(Thread& t, const Ins& i) { return static_cast<uint64_t*>(smem_pointer(uint32_t(R(a) + Reg(i.off)))); }

// May fail once, so that a missing loop shows.
void run_try_wait(Thread& t, const Ins& i) {
    const bool again = t.failed_at == t.pc;
    t.failed_at = -1;
    if (again) { mbarrier_wait_cluster(barrier(t, i), uint32_t(R(b)), i.k, i.at); R(d) = 1; }
    else if (!(R(d) = mbarrier_test_cluster(barrier(t, i), uint32_t(R(b)), i.k, i.at))) t.failed_at = t.pc;
}
bool decode_mbarrier(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const bool own = o.take("shared::cta") || o.take("shared");
    if (!o.take("b64") || !(own || o.take("shared::cluster"))) return false;
    if (o.take("init") && own && x.size() == 2) {
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
        i.k = of_cluster(o, "release");
        i.exec = own ? Exec(RUN { mbarrier_arrive_cluster(barrier(t, i), uint32_t(R(b)), i.k, i.at); })
                     : Exec(RUN { mbarrier_arrive_cluster(barrier_of_cluster(t, i), uint32_t(R(b)), i.k, i.at); });
        return true;
    }
    if (o.take("try_wait") && o.take("parity") && own && (x.size() == 3 || x.size() == 4)) {      // the fourth: for how long it may suspend
        i.d = P.slot(x[0]);
        P.address(i, x[1], i.a);
        i.b = P.slot(x[2]);
        i.k = of_cluster(o, "acquire");
        i.exec = run_try_wait;
        return true;
    }
    return false;
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
    if (op == "wgmma") return decode_wgmma(P, i, o, x);
    if (op == "fence" && o.take("mbarrier_init")) {
        i.exec = RUN { fence_mbarrier_init(); };
        return o.take("release") && o.take("cluster");
    }
    if (op == "fence" && o.take("proxy") && o.take("async")) {
        if (o.take("global")) i.exec = RUN {};       // not modelled
        else if (o.take("shared::cta") || o.take("shared::cluster")) i.exec = RUN { fence_proxy_async(); };
        return i.exec && x.empty();
    }
    if (op == "griddepcontrol" && (o.take("wait") || o.take("launch_dependents"))) {      // a launch here begins when those before it have ended
        i.exec = RUN {};
        return x.empty();
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
