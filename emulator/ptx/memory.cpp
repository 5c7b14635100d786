// Moves, control, loads and stores, atomics, fences, calls.
#include <algorithm>

#include "program.hpp"

namespace emu::ptx {
namespace {

enum class Space { Generic, Shared, Cluster };       // Generic: global, too
Space space_of(Opcode& o) {
    if (o.take("shared") || o.take("shared::cta")) return Space::Shared;
    return o.take("shared::cluster") ? Space::Cluster : Space::Generic;
}
template <Space S> char* place(Thread& t, const Ins& i) {
    if constexpr (S == Space::Generic) return reinterpret_cast<char*>(t.r[i.a] + Reg(i.off));
    const uint32_t address = uint32_t(t.r[i.a] + Reg(i.off));
    return static_cast<char*>(S == Space::Shared ? own_shared(address, i.at) : smem_pointer(address));
}
char* place_in(Space s, Thread& t, const Ins& i) {
    return s == Space::Generic ? place<Space::Generic>(t, i) : s == Space::Shared ? place<Space::Shared>(t, i) : place<Space::Cluster>(t, i);
}
#define IN_SPACE(f, s) (s == Space::Generic ? f<Space::Generic> : s == Space::Shared ? f<Space::Shared> : f<Space::Cluster>)

// The bytes of a vector that nobody uses may be anything.
void touch_used(const char* p, const Ins& i, size_t bytes) {
    const uint64_t used = i.more ? i.more->used : ~0ull;
    if (used == ~0ull) { touch(p, bytes, false, false, &i); return; }
    for (size_t k = 0; k < bytes;) {
        size_t n = 0;
        while (k + n < bytes && (used >> (k + n) & 1)) ++n;
        for (size_t part; n; n -= part, k += part) {
            for (part = 16; part > n || k % part; part /= 2) {}
            touch(p + k, part, false, false, &i);
        }
        while (k < bytes && !(used >> k & 1)) ++k;
    }
}
Reg extended(const char* p, int n, bool sign) {
    Reg x = 0;
    std::memcpy(&x, p, size_t(n));
    return sign && n < 8 ? Reg(int64_t(x << (64 - 8 * n)) >> (64 - 8 * n)) : x;
}
template <Space S> void load1(Thread& t, const Ins& i) {
    const char* p = place<S>(t, i);
    touch(p, size_t(i.n), false, false, &i);
    R(d) = extended(p, i.n, i.k);
}
template <Space S> void load(Thread& t, const Ins& i) {
    const char* p = place<S>(t, i);
    auto& to = i.more->v1;
    touch_used(p, i, size_t(i.n) * to.size());
    for (size_t k = 0; k < to.size(); ++k) t.r[to[k]] = extended(p + k * size_t(i.n), i.n, i.k);
}
template <Space S> void store1(Thread& t, const Ins& i) {
    char* p = place<S>(t, i);
    touch(p, size_t(i.n), true, false, &i);
    std::memcpy(p, &R(d), size_t(i.n));
}
template <Space S> void store(Thread& t, const Ins& i) {
    char* p = place<S>(t, i);
    auto& from = i.more->v1;
    touch(p, size_t(i.n) * from.size(), true, false, &i);
    for (size_t k = 0; k < from.size(); ++k) std::memcpy(p + k * size_t(i.n), &t.r[from[k]], size_t(i.n));
}
// Parameters and the stack frame: the thread's own.
void load_own(Thread& t, const Ins& i) {
    const char* p = (i.a >= 0 ? reinterpret_cast<char*>(R(a)) : t.block) + i.off;
    for (size_t k = 0; k < i.more->v1.size(); ++k) t.r[i.more->v1[k]] = extended(p + k * size_t(i.n), i.n, i.k);
}
void store_own(Thread& t, const Ins& i) {
    char* p = (i.a >= 0 ? reinterpret_cast<char*>(R(a)) : t.block) + i.off;
    for (size_t k = 0; k < i.more->v1.size(); ++k) std::memcpy(p + k * size_t(i.n), &t.r[i.more->v1[k]], size_t(i.n));
}

Order order(Opcode& o) {
    return o.take("acq_rel") ? Order::AcqRel : o.take("acquire") ? Order::Acquire : o.take("release") ? Order::Release : Order::Relaxed;
}
// Within the device is what the emulator models; a narrower scope would hide what it leaves out.
bool scope(Opcode& o) { return o.take("gpu") || o.take("sys"); }

bool decode_access(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const bool load = o.op() == "ld";
    if (x.size() != 2) return false;
    const Str type = o.take_last();
    i.n = width(type);
    i.k = type[0] == 's';
    if (!i.n || type == "pred") return false;
    const Str &where = x[load ? 1 : 0], &what = x[load ? 0 : 1];
    const Space space = space_of(o);
    const bool generic = space == Space::Generic;
    const bool is_param = generic && (o.take("param") || o.take("param::entry") || o.take("param::func")), is_local = generic && !is_param && o.take("local");
    if (generic && !is_param && !is_local) o.take("global");
    const bool acquire = o.take("acquire"), release = o.take("release"), relaxed = o.take("relaxed");
    if (acquire || release || relaxed) {
        if (!scope(o) || i.n < 4 || is_param || is_local || (load ? release : acquire)) return false;
        i.c = int(space);
        P.address(i, where, i.a);
        i.d = P.slot(what);
        i.k = int(acquire ? Order::Acquire : release ? Order::Release : Order::Relaxed);
        i.exec = load ? Exec(RUN { R(d) = atomic_load(Order(i.k), place_in(Space(i.c), t, i), i.n, i.at); })
                      : Exec(RUN { atomic_store(Order(i.k), place_in(Space(i.c), t, i), i.n, R(d), i.at); });
        return true;
    }
    // Caching, prefetching, volatility: nothing that a result depends on.
    o.take_all({"volatile", "weak", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
                "L1::evict_last", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"});
    const size_t count = o.take("v2") ? 2 : o.take("v4") ? 4 : o.take("v8") ? 8 : 1;
    auto values = P.vector(what);
    if (values.size() != count) return false;
    const Variable* v;
    int64_t offset;
    if (is_param || is_local) {
        more(i).v1 = values;
        if (is_param && P.local_variable(where, &v, offset)) i.off = offset;
        else P.address(i, where, i.a);
        i.exec = load ? load_own : store_own;
        return true;
    }
    P.address(i, where, i.a);
    if (count == 1) {
        i.d = values[0];
        i.exec = load ? IN_SPACE(load1, space) : IN_SPACE(store1, space);
    } else {
        more(i).v1 = values;
        if (load) i.more->used = P.used;
        i.exec = load ? IN_SPACE(ptx::load, space) : IN_SPACE(store, space);
    }
    return true;
}

bool decode_atomic(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const bool returns = o.op() == "atom";
    const Str type = o.take_last();
    i.n = width(type);
    if (i.n != 4 && i.n != 8) return false;
    const Order how = order(o);
    o.take("relaxed");
    scope(o);                                        // without one: the device's
    const Space space = space_of(o);
    if (space == Space::Generic) o.take("global");
    const bool sign = type[0] == 's', single = type == "f32", pair = o.take("v2");
    Rmw op;
    if (o.take("add")) { if (type == "f64") return false; op = single ? Rmw::AddF32 : Rmw::Add; }
    else if (type[0] == 'f') return false;
    else if (o.take("or")) op = Rmw::Or;
    else if (o.take("and")) op = Rmw::And;
    else if (o.take("max")) op = sign ? Rmw::MaxS : Rmw::MaxU;
    else if (o.take("min")) op = sign ? Rmw::MinS : Rmw::MinU;
    else if (o.take("exch")) op = Rmw::Exch;
    else if (o.take("cas")) op = Rmw::Cas;
    else return false;
    const size_t at = returns ? 1 : 0;
    if (x.size() != at + 2 + (op == Rmw::Cas)) return false;
    if (pair) {                                      // red.global.add.v2.f32: two of them
        if (returns || op != Rmw::AddF32 || space != Space::Generic) return false;
        P.address(i, x[0], i.a);
        more(i).v1 = P.vector(x[1]);
        i.k = int(how);
        i.exec = RUN {
            char* p = place_in(Space::Generic, t, i);
            for (size_t k = 0; k < 2; ++k) atomic_rmw(Rmw::AddF32, Order(i.k), p + 4 * k, 4, t.r[i.more->v1[k]] & 0xffffffffull, 0, i.at);
        };
        return i.more->v1.size() == 2;
    }
    i.d = returns ? P.slot(x[0]) : P.fresh();
    P.address(i, x[at], i.a);
    i.c = op == Rmw::Cas ? P.slot(x[at + 1]) : P.value(0);
    i.b = P.slot(x.back());
    i.k = int(op) << 8 | int(how) << 4 | int(space);
    i.exec = RUN {
        char* p = place_in(Space(i.k & 15), t, i);
        const Reg mask = i.n == 4 ? 0xffffffffull : ~0ull;
        R(d) = atomic_rmw(Rmw(i.k >> 8), Order(i.k >> 4 & 15), p, i.n, R(b) & mask, R(c) & mask, i.at);
    };
    return true;
}

// ---- moves -------------------------------------------------------------------------------------------------------------
Exec special(const Str& name) {
    static const std::map<Str, Exec> all = {
        {"%tid.x", RUN { R(d) = threadIdx.x; }}, {"%tid.y", RUN { R(d) = threadIdx.y; }}, {"%tid.z", RUN { R(d) = threadIdx.z; }},
        {"%ntid.x", RUN { R(d) = blockDim.x; }}, {"%ntid.y", RUN { R(d) = blockDim.y; }}, {"%ntid.z", RUN { R(d) = blockDim.z; }},
        {"%ctaid.x", RUN { R(d) = blockIdx.x; }}, {"%ctaid.y", RUN { R(d) = blockIdx.y; }}, {"%ctaid.z", RUN { R(d) = blockIdx.z; }},
        {"%nctaid.x", RUN { R(d) = gridDim.x; }}, {"%nctaid.y", RUN { R(d) = gridDim.y; }}, {"%nctaid.z", RUN { R(d) = gridDim.z; }},
        {"%laneid", RUN { R(d) = threadIdx.x % 32; }},
        {"%lanemask_eq", RUN { R(d) = 1u << threadIdx.x % 32; }}, {"%lanemask_lt", RUN { R(d) = (1u << threadIdx.x % 32) - 1; }},
        {"%lanemask_le", RUN { R(d) = uint32_t((2ull << threadIdx.x % 32) - 1); }}, {"%lanemask_gt", RUN { R(d) = uint32_t(~((2ull << threadIdx.x % 32) - 1)); }},
        {"%lanemask_ge", RUN { R(d) = uint32_t(~((1ull << threadIdx.x % 32) - 1)); }}};
    auto it = all.find(name);
    return it == all.end() ? cluster_register(name) : it->second;
}
bool decode_move(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const Str type = o.take_last();
    const int bytes = type == "b128" ? 16 : width(type);
    if (x.size() != 2 || !bytes || bytes > 8) return false;
    if (x[0][0] == '{') {                            // unpack
        more(i).v1 = P.list(x[0]);
        i.a = P.slot(x[1]);
        i.n = bytes * 8 / int(i.more->v1.size());
        i.exec = RUN { const Reg v = R(a); for (size_t k = 0; k < i.more->v1.size(); ++k) t.r[i.more->v1[k]] = v >> (k * size_t(i.n)) & ((1ull << i.n) - 1); };
        return true;
    }
    i.d = P.slot(x[0]);
    if (x[1][0] == '{') {                            // pack
        more(i).v1 = P.list(x[1]);
        i.n = bytes * 8 / int(i.more->v1.size());
        i.exec = RUN { Reg v = 0; for (size_t k = 0; k < i.more->v1.size(); ++k) v |= (t.r[i.more->v1[k]] & ((1ull << i.n) - 1)) << (k * size_t(i.n)); R(d) = v; };
        return true;
    }
    if ((i.exec = special(x[1]))) return true;
    const Variable* v;
    if (P.local_variable(x[1], &v, i.off)) { i.exec = RUN { R(d) = Reg(t.block + i.off); }; return true; }
    if (auto it = P.locals.find(x[1]); it != P.locals.end()) { i.off = it->second; i.exec = RUN { R(d) = Reg(t.local + i.off); }; return true; }
    i.a = P.slot(x[1]);
    if (type == "pred") i.exec = RUN { R(d) = R(a) != 0; };
    else i.exec = RUN { R(d) = R(a); };
    return true;
}

// ---- control -----------------------------------------------------------------------------------------------------------
bool decode_call(Parser& P, Ins& i, Opcode& o, const Operands& x) {       // call (result), name, (arguments)
    o.take("uni");
    auto offsets = [&](const Str& s, std::vector<int>& to) {
        for (auto& n : split(s.substr(1, s.size() - 2), ',')) {
            const Variable* v;
            int64_t offset;
            if (!P.local_variable(n, &v, offset)) P.fail("`" + n + "` is no parameter");
            else to.push_back(int(offset));
        }
    };
    Call& c = more(i).call;
    size_t k = 0;
    if (k < x.size() && x[k][0] == '(') offsets(x[k++], c.results);
    if (k == x.size()) return false;
    c.name = x[k++];
    if (k < x.size() && x[k][0] == '(') offsets(x[k++], c.arguments);
    i.exec = call;
    return k == x.size();
}
}  // namespace

bool decode_memory(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const Str& op = o.op();
    if (op == "ld" || op == "st") return decode_access(P, i, o, x);
    if (op == "atom" || op == "red") return !o.is("red.async") && decode_atomic(P, i, o, x);
    if (op == "mov") return decode_move(P, i, o, x);
    if (op == "call") return decode_call(P, i, o, x);
    if (op == "ret" || op == "exit") {
        o.take("uni");
        if (op == "exit" && !P.p.entry) return false;                     // it would have to end the callers, too
        i.exec = RUN { t.done = true; };
        return x.empty();
    }
    if (op == "bra") {
        o.take("uni");
        more(i).labels = {P.resolve(x.at(0))};
        i.exec = RUN { t.pc = i.target; };
        return x.size() == 1;
    }
    if (op == "brx" && o.take("idx")) {                                   // the table lies before it or after it: read at the end
        o.take("uni");
        if (x.size() != 2 || !P.tables.count(x[1])) return false;
        i.a = P.slot(x[0]);
        more(i).labels = P.tables[x[1]];
        i.exec = RUN {
            const uint32_t k = uint32_t(R(a));
            if (k >= i.more->targets.size()) trap("brx.idx beyond its table", i.at);
            t.pc = i.more->targets[k];
        };
        return true;
    }
    if (op == "trap") { i.exec = RUN { trap("the kernel's own trap", i.at); }; return true; }
    if (op == "cvta") {
        const Str type = o.take_last();
        const bool to = o.take("to");
        if (x.size() != 2 || type != "u64") return false;
        i.d = P.slot(x[0]);
        i.a = P.slot(x[1]);
        if (space_of(o) != Space::Generic) i.exec = to ? Exec(RUN { R(d) = smem_addr(reinterpret_cast<void*>(R(a))); }) : Exec(RUN { R(d) = Reg(smem_pointer(uint32_t(R(a)))); });
        else if (o.take("global") || o.take("local") || o.take("param")) i.exec = RUN { R(d) = R(a); };
        return i.exec;
    }
    if (op == "membar" ? o.take("gl") || o.take("sys") : op == "fence" && (o.take("acq_rel") || o.take("sc")) && scope(o)) {
        i.exec = RUN { thread_fence(); };
        return x.empty();
    }
    if (op == "nanosleep") { o.take("u32"); i.exec = RUN { nanosleep(i.at); }; return true; }
    if (op == "prefetch" || op == "prefetchu") {
        o.take_all({"global", "L1", "L2", "L2::evict_last", "L2::evict_normal", "tensormap", "param"});
        i.exec = RUN {};
        return true;
    }
    return false;
}

}  // namespace emu::ptx
