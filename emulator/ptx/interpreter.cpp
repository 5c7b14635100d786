// A second front end: runs the PTX that nvcc produced instead of the C++ it came from. The same functional
// SM underneath, so the inline assembly of ptx.cuh and the compiler's work are tested as well.
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../include/host.hpp"

namespace emu {
namespace {
using Reg = uint64_t;
using Str = std::string;

template <class T> T as(Reg r) { T t; std::memcpy(&t, &r, sizeof t); return t; }
template <class T> Reg reg(T t) { Reg r = 0; std::memcpy(&r, &t, sizeof t); return r; }

struct Ins;
struct Thread;
using Exec = void (*)(Thread&, const Ins&);

struct Ins {
    Exec exec = nullptr;
    int pred = -1;
    bool negate = false;
    int d = -1, a = -1, b = -1, c = -1, e = -1;       // slots
    int64_t off = 0;
    int n = 0, k = 0;                                 // small immediates
    std::vector<int> v0, v1, v2;
    int target = -1;
    Str label, text;
    Site at{"", 0};
};
struct Program {
    Str name;
    std::vector<Ins> code;
    std::vector<Reg> init;                            // registers, then constants
    std::map<Str, int> slot, labels;
    std::vector<std::pair<Str, int>> params;          // name, offset in the parameter block
    std::vector<int> param_size;
    std::vector<Str> files;
    int param_bytes = 0, max_threads = 0;
};
struct Acc { std::vector<int> slots; std::vector<float> value; bool dirty = false; };
struct Thread {
    Reg* r; const Program* p; char* params; int pc = 0; bool done = false; int failed_at = -1;
    std::vector<std::unique_ptr<Acc>> accs;
};

// ---- operands -----------------------------------------------------------------------------------
std::vector<Str> split(const Str& s, char by) {
    std::vector<Str> out;
    int depth = 0;
    Str cur;
    for (char ch : s) {
        if (ch == '{' || ch == '[') ++depth;
        if (ch == '}' || ch == ']') --depth;
        if (ch == by && !depth) { out.push_back(cur); cur.clear(); }
        else if (!isspace((unsigned char)ch)) cur += ch;
    }
    if (!cur.empty()) out.push_back(cur);
    return out;
}

struct Parser {
    Program p;
    std::vector<std::map<Str, Str>> scopes{1};        // inline assembly declares names in nested blocks
    int scope_id = 0;
    std::set<Str> dynamic_shared;                     // names of the block's dynamic shared memory

    Str resolve(const Str& n) {
        for (auto s = scopes.rbegin(); s != scopes.rend(); ++s) if (auto it = s->find(n); it != s->end()) return it->second;
        return n;
    }
    int fresh(Reg v) { p.init.push_back(v); return int(p.init.size()) - 1; }
    int slot(Str s) {
        if (s.empty() || s == "_") return fresh(0);
        if (isdigit((unsigned char)s[0]) || s[0] == '-') {
            if (s.rfind("0f", 0) == 0 || s.rfind("0F", 0) == 0) return fresh(strtoul(s.c_str() + 2, nullptr, 16));
            return fresh(Reg(strtoll(s.c_str(), nullptr, 0)));
        }
        s = resolve(s);
        auto [it, added] = p.slot.try_emplace(s, int(p.init.size()));
        if (added) p.init.push_back(0);
        return it->second;
    }
    std::vector<int> list(Str s) {                    // {a,b,c}
        std::vector<int> v;
        for (auto& x : split(s.substr(1, s.size() - 2), ',')) v.push_back(slot(x));
        return v;
    }
    void address(Ins& i, Str s, int& base) {          // [reg], [reg+8], [param+4], [addr, {x, y}]
        s = s.substr(1, s.size() - 2);
        auto parts = split(s, ',');
        auto plus = parts[0].find('+');
        Str name = parts[0].substr(0, plus);
        if (plus != Str::npos) i.off = strtoll(parts[0].c_str() + plus + 1, nullptr, 0);
        base = slot(name);
        if (parts.size() > 1) i.v0 = list(parts[1]);
    }
};

// ---- instructions -------------------------------------------------------------------------------
#define RUN [](Thread & t, const Ins& i)
#define R(x) t.r[i.x]

template <class T> Exec binary(const Str& op) {
    if (op == "add") return RUN { R(d) = reg<T>(T(as<T>(R(a)) + as<T>(R(b)))); };
    if (op == "sub") return RUN { R(d) = reg<T>(T(as<T>(R(a)) - as<T>(R(b)))); };
    if (op == "mul") return RUN { R(d) = reg<T>(T(as<T>(R(a)) * as<T>(R(b)))); };
    if (op == "div") return RUN { R(d) = reg<T>(T(as<T>(R(a)) / as<T>(R(b)))); };
    if (op == "min") return RUN { T x = as<T>(R(a)), y = as<T>(R(b)); R(d) = reg<T>(y < x ? y : x); };
    if (op == "max") return RUN { T x = as<T>(R(a)), y = as<T>(R(b)); R(d) = reg<T>(x < y ? y : x); };
    if (op == "mad" || op == "fma") return RUN { R(d) = reg<T>(T(as<T>(R(a)) * as<T>(R(b)) + as<T>(R(c)))); };
    if (op == "neg") return RUN { R(d) = reg<T>(T(-as<T>(R(a)))); };
    return nullptr;
}
template <class T> Exec integer(const Str& op) {
    if (op == "and") return RUN { R(d) = reg<T>(as<T>(R(a)) & as<T>(R(b))); };
    if (op == "or") return RUN { R(d) = reg<T>(as<T>(R(a)) | as<T>(R(b))); };
    if (op == "xor") return RUN { R(d) = reg<T>(as<T>(R(a)) ^ as<T>(R(b))); };
    if (op == "not") return RUN { R(d) = reg<T>(T(~as<T>(R(a)))); };
    if (op == "rem") return RUN { R(d) = reg<T>(T(as<T>(R(a)) % as<T>(R(b)))); };
    if (op == "shl") return RUN { uint32_t n = uint32_t(R(b)); R(d) = n >= sizeof(T) * 8 ? 0 : reg<T>(T(as<T>(R(a)) << n)); };
    if (op == "shr") return RUN { uint32_t n = uint32_t(R(b)); if (n >= sizeof(T) * 8) n = sizeof(T) * 8 - 1; R(d) = reg<T>(T(as<T>(R(a)) >> n)); };
    return binary<T>(op);
}
template <class T, class W> Exec wide() { return RUN { R(d) = reg<W>(W(as<T>(R(a))) * W(as<T>(R(b)))); }; }
template <class T> Exec compare(const Str& c) {
    if (c == "eq") return RUN { R(d) = as<T>(R(a)) == as<T>(R(b)); };
    if (c == "ne" || c == "neu") return RUN { R(d) = as<T>(R(a)) != as<T>(R(b)); };
    if (c == "lt" || c == "lo") return RUN { R(d) = as<T>(R(a)) < as<T>(R(b)); };
    if (c == "le" || c == "ls") return RUN { R(d) = as<T>(R(a)) <= as<T>(R(b)); };
    if (c == "gt" || c == "hi") return RUN { R(d) = as<T>(R(a)) > as<T>(R(b)); };
    if (c == "ge" || c == "hs") return RUN { R(d) = as<T>(R(a)) >= as<T>(R(b)); };
    return nullptr;
}
template <class D, class S> Exec convert() { return RUN { R(d) = reg<D>(D(as<S>(R(a)))); }; }
template <class D> Exec convert_from(const Str& s) {
    if (s == "s16") return convert<D, int16_t>();
    if (s == "u16") return convert<D, uint16_t>();
    if (s == "s32") return convert<D, int32_t>();
    if (s == "u32") return convert<D, uint32_t>();
    if (s == "s64") return convert<D, int64_t>();
    if (s == "u64") return convert<D, uint64_t>();
    if (s == "f32") return convert<D, float>();
    return nullptr;
}
#define BY_TYPE(t, f)                                                       \
    (t == "s16"                ? f<int16_t>                                 \
     : t == "u16" || t == "b16" ? f<uint16_t>                               \
     : t == "s32"              ? f<int32_t>                                 \
     : t == "u32" || t == "b32" ? f<uint32_t>                               \
     : t == "s64"              ? f<int64_t>                                 \
                               : f<uint64_t>)

int width(const Str& t) { return t.back() == '8' ? 1 : t.substr(t.size() - 2) == "16" ? 2 : t.substr(t.size() - 2) == "32" ? 4 : 8; }

char* shared(Thread& t, const Ins& i, int base) { return static_cast<char*>(smem_pointer(uint32_t(t.r[base] + i.off))); }
char* global(Thread& t, const Ins& i, int base) { return reinterpret_cast<char*>(t.r[base] + i.off); }
template <bool Shared> void load(Thread& t, const Ins& i) {
    char* p = Shared ? shared(t, i, i.a) : global(t, i, i.a);
    touch(p, size_t(i.n) * i.v1.size(), false, false, &i);
    for (size_t k = 0; k < i.v1.size(); ++k) { Reg x = 0; std::memcpy(&x, p + k * i.n, i.n); if (i.k && i.n < 8) x = Reg(int64_t(x << (64 - 8 * i.n)) >> (64 - 8 * i.n)); t.r[i.v1[k]] = x; }
}
template <bool Shared> void store(Thread& t, const Ins& i) {
    char* p = Shared ? shared(t, i, i.a) : global(t, i, i.a);
    touch(p, size_t(i.n) * i.v1.size(), true, false, &i);
    for (size_t k = 0; k < i.v1.size(); ++k) std::memcpy(p + k * i.n, &t.r[i.v1[k]], i.n);
}

void fetch(Thread& t, Acc& a) { for (size_t k = 0; k < a.slots.size(); ++k) a.value[k] = as<float>(t.r[a.slots[k]]); }
void publish(Thread& t) {                             // accumulators whose wgmmas have retired return to registers
    for (auto& a : t.accs)
        if (a->dirty && !wgmma_in_flight(a->value.data())) {
            for (size_t k = 0; k < a->slots.size(); ++k) {
                if (uint32_t(t.r[a->slots[k]]) != 0xffbadbadu) trap("an accumulator register changed while a wgmma was in flight", here());
                t.r[a->slots[k]] = reg<float>(a->value[k]);
            }
            a->dirty = false;
        }
}
void run_wgmma(Thread& t, const Ins& i) {
    Acc* acc = nullptr;
    for (auto& a : t.accs) if (a->slots == i.v1) acc = a.get();
    if (!acc) { t.accs.push_back(std::make_unique<Acc>()); acc = t.accs.back().get(); acc->slots = i.v1; acc->value.resize(i.v1.size()); }
    if (!acc->dirty) fetch(t, *acc);
    acc->dirty = true;
    uint32_t a[4] = {};
    for (size_t k = 0; k < i.v2.size(); ++k) a[k] = uint32_t(t.r[i.v2[k]]);
    bool rs = !i.v2.empty();
    for (int s : i.v1) t.r[s] = 0xffbadbadu;
    wgmma(kBf16, int(i.v1.size()) * 2, acc->value.data(), rs ? a : nullptr, rs ? 0 : t.r[i.a], i.n, t.r[i.b], i.k, t.r[i.c], i.at);
}

bool build(Parser& P, Ins& i, const Str& opcode, const std::vector<Str>& o) {
    auto m = split(opcode, '.');
    const Str &op = m[0], &type = m.back();
    auto has = [&](const char* s) { for (auto& x : m) if (x == s) return true; return false; };
    auto starts = [&](const char* s) { return opcode.rfind(s, 0) == 0; };
    auto dab = [&] { if (!o.empty()) i.d = P.slot(o[0]); if (o.size() > 1) i.a = P.slot(o[1]); if (o.size() > 2) i.b = P.slot(o[2]); if (o.size() > 3) i.c = P.slot(o[3]); };

    if (op == "ret" || op == "exit") { i.exec = RUN { (void)i; t.done = true; }; return true; }
    if (op == "bra") { i.label = P.resolve(o[0]); i.exec = RUN { t.pc = i.target; }; return true; }
    if (op == "mov") {
        static const std::map<Str, Exec> special = {
            {"%tid.x", RUN { R(d) = threadIdx.x; }}, {"%ntid.x", RUN { R(d) = blockDim.x; }}, {"%ctaid.x", RUN { R(d) = blockIdx.x; }}, {"%ctaid.y", RUN { R(d) = blockIdx.y; }},
            {"%ctaid.z", RUN { R(d) = blockIdx.z; }}, {"%nctaid.x", RUN { R(d) = gridDim.x; }}, {"%nctaid.y", RUN { R(d) = gridDim.y; }}, {"%laneid", RUN { R(d) = threadIdx.x % 32; }}};
        if (o[0][0] == '{') { i.v1 = P.list(o[0]); i.a = P.slot(o[1]); i.n = width(type) * 8 / int(i.v1.size()); i.exec = RUN { for (size_t k = 0; k < i.v1.size(); ++k) t.r[i.v1[k]] = R(a) >> (k * i.n) & ((1ull << i.n) - 1); }; return true; }
        i.d = P.slot(o[0]);
        if (o[1][0] == '{') { i.v1 = P.list(o[1]); i.n = width(type) * 8 / int(i.v1.size()); i.exec = RUN { Reg x = 0; for (size_t k = 0; k < i.v1.size(); ++k) x |= (t.r[i.v1[k]] & ((1ull << i.n) - 1)) << (k * i.n); R(d) = x; }; return true; }
        if (auto it = special.find(o[1]); it != special.end()) { i.exec = it->second; return true; }
        if (P.dynamic_shared.count(o[1])) { i.exec = RUN { R(d) = smem_addr(dynamic_smem()); }; return true; }
        for (auto& [n, off] : P.p.params) if (n == o[1]) { i.off = off; i.exec = RUN { R(d) = Reg(t.params + i.off); }; return true; }
        i.a = P.slot(o[1]);
        i.exec = RUN { R(d) = R(a); };
        return true;
    }
    if (op == "ld" && has("param")) {                 // of a named parameter, or through a register with its address
        i.v1 = o[0][0] == '{' ? P.list(o[0]) : std::vector<int>{P.slot(o[0])};
        i.n = width(type);
        i.k = type[0] == 's';
        Str s = o[1].substr(1, o[1].size() - 2), name = s.substr(0, s.find('+'));
        i.off = s.find('+') == Str::npos ? 0 : atoi(s.c_str() + s.find('+') + 1);
        bool named = false;
        for (auto& [n, off] : P.p.params) if (n == name) { i.off += off; named = true; }
        if (!named) i.a = P.slot(name);
        i.exec = RUN {
            const char* p = (i.a < 0 ? t.params : reinterpret_cast<char*>(R(a))) + i.off;
            for (size_t k = 0; k < i.v1.size(); ++k) {
                Reg x = 0;
                std::memcpy(&x, p + k * i.n, i.n);
                if (i.k && i.n < 8) x = Reg(int64_t(x << (64 - 8 * i.n)) >> (64 - 8 * i.n));
                t.r[i.v1[k]] = x;
            }
        };
        return true;
    }
    if (op == "ld" || op == "st") {
        bool ld = op == "ld";
        const Str& value = o[ld ? 0 : 1];
        P.address(i, o[ld ? 1 : 0], i.a);
        i.v1 = value[0] == '{' ? P.list(value) : std::vector<int>{P.slot(value)};
        i.n = width(type); i.k = type[0] == 's';
        bool sh = has("shared") || has("shared::cta");
        i.exec = ld ? (sh ? load<true> : load<false>) : (sh ? store<true> : store<false>);
        return sh || has("global");
    }
    if (op == "cvta") { dab(); i.exec = has("shared") ? (has("to") ? Exec(RUN { R(d) = smem_addr((void*)R(a)); }) : Exec(RUN { R(d) = Reg(smem_pointer(uint32_t(R(a)))); })) : RUN { R(d) = R(a); }; return true; }
    if (op == "setp") {
        auto pq = split(o[0], '|');
        i.d = P.slot(pq[0]); i.a = P.slot(o[1]); i.b = P.slot(o[2]);
        i.exec = type == "f32" ? compare<float>(m[1]) : BY_TYPE(type, compare)(m[1]);
        return i.exec && o.size() == 3;
    }
    if (op == "selp") { dab(); i.exec = RUN { R(d) = R(c) ? R(a) : R(b); }; return true; }
    if (type == "pred") { dab(); i.exec = op == "and" ? Exec(RUN { R(d) = R(a) && R(b); }) : op == "or" ? Exec(RUN { R(d) = R(a) || R(b); }) : op == "not" ? Exec(RUN { R(d) = !R(a); }) : op == "xor" ? Exec(RUN { R(d) = !R(a) != !R(b); }) : nullptr; return i.exec; }
    if (op == "cvt") {
        dab();
        const Str &to = m[m.size() - 2], &from = type;
        if (to == "bf16x2") { i.exec = RUN { auto h = [](float f) { uint32_t u; std::memcpy(&u, &f, 4); return (u + 0x7fff + ((u >> 16) & 1)) >> 16; }; R(d) = h(as<float>(R(b))) | h(as<float>(R(a))) << 16; }; return true; }
        if (to == "f32") i.exec = convert_from<float>(from);
        else if (to == "s32") i.exec = convert_from<int32_t>(from);
        else if (to == "u32") i.exec = convert_from<uint32_t>(from);
        else if (to == "s64") i.exec = convert_from<int64_t>(from);
        else if (to == "u64") i.exec = convert_from<uint64_t>(from);
        else if (to == "u16") i.exec = convert_from<uint16_t>(from);
        else if (to == "s16") i.exec = convert_from<int16_t>(from);
        return i.exec;
    }
    if (op == "mul" && has("wide")) { dab(); i.exec = type == "s32" ? wide<int32_t, int64_t>() : type == "u32" ? wide<uint32_t, uint64_t>() : type == "s16" ? wide<int16_t, int32_t>() : wide<uint16_t, uint32_t>(); return true; }
    if (op == "bfi") { i.d = P.slot(o[0]); i.a = P.slot(o[1]); i.b = P.slot(o[2]); i.c = P.slot(o[3]); i.e = P.slot(o[4]); i.exec = RUN { uint32_t n = uint32_t(R(e)), mask = n >= 32 ? ~0u : (1u << n) - 1, pos = uint32_t(R(c)); R(d) = (uint32_t(R(b)) & ~(mask << pos)) | (uint32_t(R(a)) & mask) << pos; }; return true; }
    if (op == "ex2") { dab(); i.exec = RUN { R(d) = reg<float>(std::exp2(as<float>(R(a)))); }; return true; }
    if (op == "lg2") { dab(); i.exec = RUN { R(d) = reg<float>(std::log2(as<float>(R(a)))); }; return true; }
    if (op == "atom" || op == "red") {
        if (type != "f32" || !has("add") || !has("global")) return false;
        bool at = op == "atom";
        i.d = at ? P.slot(o[0]) : P.slot("_");
        P.address(i, o[at], i.a);
        i.b = P.slot(o[at + 1]);
        i.exec = RUN {
            R(d) = atomic_rmw(Rmw::AddF32, Order::Relaxed, global(t, i, i.a), 4, uint32_t(R(b)), 0, i.at);
        };
        return true;
    }
    // --- everything below is a call into the functional SM
    if (op == "bar") {
        i.a = P.slot(o[0]); i.k = o.size() > 1; i.b = i.k ? P.slot(o[1]) : -1;
        i.exec = has("arrive") ? Exec(RUN { named_arrive(int(R(a)), int(R(b)), i.at); }) : Exec(RUN { if (i.k) named_sync(int(R(a)), int(R(b)), i.at); else if (R(a) == 0) sync_threads(i.at); else trap("bar.sync without a count", i.at); });
        return m.size() == 2;
    }
    if (starts("shfl.sync.")) {
        auto dp = split(o[0], '|');
        i.d = P.slot(dp[0]); i.a = P.slot(o[1]); i.b = P.slot(o[2]); i.c = P.slot(o[3]); i.e = P.slot(o[4]);
        i.k = m[2] == "bfly" ? kXor : m[2] == "down" ? kDown : m[2] == "up" ? kUp : kIdx;
        i.exec = RUN { R(d) = uint32_t(shuffle(Shfl(i.k), uint32_t(R(e)), R(a), int(R(b)), 32 - int(R(c) >> 8 & 31), i.at)); };
        return dp.size() < 2 || true;
    }
    if (opcode == "cp.async.cg.shared.global") {
        Ins tmp;
        P.address(tmp, o[0], i.a); P.address(tmp, o[1], i.b);
        i.c = o.size() > 3 ? P.slot(o[3]) : P.slot("16");
        i.exec = RUN { cp_async_16(smem_pointer(uint32_t(R(a))), (void*)R(b), uint32_t(R(c)), i.at); };
        return o[2] == "16" && !tmp.off;
    }
    if (opcode == "cp.async.commit_group") { i.exec = RUN { (void)t; (void)i; cp_async_commit(); }; return true; }
    if (opcode == "cp.async.wait_group") { i.n = atoi(o[0].c_str()); i.exec = RUN { (void)t; cp_async_wait(i.n); }; return true; }
    if (starts("ldmatrix.sync.aligned.m8n8.x4")) {
        i.v1 = P.list(o[0]); P.address(i, o[1], i.a); i.k = has("trans");
        i.exec = RUN { uint32_t r[4]; ldmatrix(r, 4, i.k, shared(t, i, i.a), i.at); for (int k = 0; k < 4; ++k) t.r[i.v1[k]] = r[k]; };
        return has("shared") && type == "b16" && i.v1.size() == 4;
    }
    if (opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") {
        i.v0 = P.list(o[0]); i.v1 = P.list(o[1]); i.v2 = P.list(o[2]);
        auto c = P.list(o[3]);
        i.exec = RUN {
            float d[4]; uint32_t a[4], b[2];
            for (int k = 0; k < 4; ++k) { d[k] = as<float>(t.r[i.v0[k]]); a[k] = uint32_t(t.r[i.v1[k]]); }
            for (int k = 0; k < 2; ++k) b[k] = uint32_t(t.r[i.v2[k]]);
            mma_m16n8(kBf16, d, a, b, i.at);
            for (int k = 0; k < 4; ++k) t.r[i.v0[k]] = reg<float>(d[k]);
        };
        return c == i.v0;
    }
    if (op == "mbarrier") {
        auto bar = [](Thread& t, const Ins& i) { return reinterpret_cast<uint64_t*>(shared(t, i, i.a)); };
        static auto at = bar;
        if (starts("mbarrier.init.shared::cta.b64")) { P.address(i, o[0], i.a); i.b = P.slot(o[1]); i.exec = RUN { mbarrier_init(at(t, i), uint32_t(R(b)), i.at); }; return true; }
        if (opcode == "mbarrier.arrive.shared::cta.b64") { P.address(i, o[1], i.a); i.exec = RUN { mbarrier_arrive(at(t, i), 0, i.at); }; return o.size() == 2 && o[0] == "_"; }
        if (opcode == "mbarrier.arrive.expect_tx.shared::cta.b64") { P.address(i, o[1], i.a); i.b = P.slot(o[2]); i.exec = RUN { mbarrier_arrive(at(t, i), uint32_t(R(b)), i.at); }; return o[0] == "_"; }
        if (opcode == "mbarrier.try_wait.parity.shared::cta.b64") { i.d = P.slot(o[0]); P.address(i, o[1], i.a); i.b = P.slot(o[2]); i.exec = RUN {                                            // may fail once, so that a missing loop shows
            bool again = t.failed_at == t.pc;
            t.failed_at = -1;
            if (again) { mbarrier_wait(at(t, i), uint32_t(R(b)), i.at); R(d) = 1; }
            else if (!(R(d) = mbarrier_test(at(t, i), uint32_t(R(b)), i.at))) t.failed_at = t.pc;
        }; return true; }
        return false;
    }
    if (opcode == "fence.mbarrier_init.release.cluster") { i.exec = RUN { (void)t; (void)i; fence_mbarrier_init(); }; return true; }
    if (opcode == "fence.proxy.async.shared::cta") { i.exec = RUN { (void)t; (void)i; fence_proxy_async(); }; return true; }
    if (opcode == "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes") {
        Ins x;
        P.address(x, o[0], i.a); P.address(i, o[1], i.b); P.address(x, o[2], i.c);
        i.exec = RUN { const int at[] = {int(t.r[i.v0[0]]), int(t.r[i.v0[1]])}; tma_load(smem_pointer(uint32_t(R(a))), (const void*)R(b), (uint64_t*)smem_pointer(uint32_t(R(c))), at, 2, i.at); };
        return i.v0.size() == 2;
    }
    if (opcode == "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group" || opcode == "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group") {
        Ins x;
        P.address(i, o[0], i.b); P.address(x, o[1], i.a);
        i.k = has("add");
        i.exec = RUN { const int at[] = {int(t.r[i.v0[0]]), int(t.r[i.v0[1]])}; tma_store(i.k ? Bulk::ReduceAdd : Bulk::Store, (const void*)R(b), smem_pointer(uint32_t(R(a))), at, 2, i.at); };
        return i.v0.size() == 2;
    }
    if (opcode == "cp.async.bulk.commit_group") { i.exec = RUN { (void)t; (void)i; bulk_commit(); }; return true; }
    if (starts("cp.async.bulk.wait_group")) { i.n = atoi(o[0].c_str()); i.k = has("read"); i.exec = RUN { (void)t; bulk_wait(i.n, i.k); }; return true; }
    if (opcode == "wgmma.fence.sync.aligned") { i.exec = RUN { (void)t; wgmma_fence(i.at); }; return true; }
    if (opcode == "wgmma.commit_group.sync.aligned") { i.exec = RUN { (void)t; wgmma_commit(i.at); }; return true; }
    if (opcode == "wgmma.wait_group.sync.aligned") { i.n = atoi(o[0].c_str()); i.exec = RUN { wgmma_wait(i.n, i.at); publish(t); }; return true; }
    if (starts("wgmma.mma_async.sync.aligned.m64n") && opcode.substr(opcode.size() - 14) == ".f32.bf16.bf16") {
        // d, a-desc | {a}, b-desc, scale-d, imm-scale-a, imm-scale-b, [imm-trans-a,] imm-trans-b
        i.v1 = P.list(o[0]);
        bool rs = o[1][0] == '{';
        if (rs) i.v2 = P.list(o[1]); else i.a = P.slot(o[1]);
        i.b = P.slot(o[2]); i.c = P.slot(o[3]);
        if (o.size() != (rs ? 7u : 8u) || o[4] != "1" || o[5] != "1") return false;
        i.n = rs ? 0 : atoi(o[6].c_str()); i.k = atoi(o.back().c_str());
        i.exec = run_wgmma;
        return int(i.v1.size()) == atoi(m[4].c_str() + 4) / 2;
    }
    if (op == "setmaxnreg") { i.n = atoi(o[0].c_str()); i.k = has("inc"); i.exec = RUN { (void)t; setmaxnreg(i.n, i.k, i.at); }; return true; }
    // --- plain arithmetic
    dab();
    if (type == "f32") i.exec = binary<float>(op);
    else if (type.size() == 3 && (type[0] == 's' || type[0] == 'u' || type[0] == 'b') && !has("hi") && !has("wide")) i.exec = BY_TYPE(type, integer)(op);
    return i.exec;
}

std::vector<std::unique_ptr<Program>>& programs() { static std::vector<std::unique_ptr<Program>> p; return p; }
bool locate_ins(const void* pc, Site* s) {
    for (auto& p : programs()) if (!p->code.empty() && pc >= &p->code.front() && pc <= &p->code.back()) { *s = static_cast<const Ins*>(pc)->at; return true; }
    return false;
}

void execute(const Program& p, void** params) {
    std::vector<Reg> regs(p.init);
    std::vector<char> block(p.param_bytes + 64);
    char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.data()) + 63) & ~uintptr_t(63));
    for (size_t k = 0; k < p.params.size(); ++k) std::memcpy(base + p.params[k].second, params[k], p.param_size[k]);
    Thread t{regs.data(), &p, base, 0, false, -1, {}};
    const Ins* code = p.code.data();
    while (!t.done) {
        const Ins& i = code[t.pc++];
        if (i.pred >= 0 && (t.r[i.pred] != 0) == i.negate) continue;
        i.exec(t, i);
    }
}
}  // namespace

int load_ptx(const char* text) {
    locate = locate_ins;
    std::map<int, Str> files;
    for (const char* s = text; (s = strstr(s, ".file")); ++s) { int n; char name[512]; if (sscanf(s, ".file %d \"%511[^\"]\"", &n, name) == 2) files[n] = name; }
    static std::vector<std::unique_ptr<Str>> kept;
    std::map<int, const char*> file_name;
    for (auto& [n, f] : files) { kept.push_back(std::make_unique<Str>(f)); file_name[n] = kept.back()->c_str(); }
    std::set<Str> dynamic_shared;
    for (const char* s = text; (s = strstr(s, ".extern .shared")); ++s) {
        const char* end = strpbrk(s, "[;");
        const char* begin = end;
        while (end && !isspace((unsigned char)begin[-1])) --begin;
        if (end) dynamic_shared.insert(Str(begin, end));
    }
    int count = 0;
    const char* s = text;
    while ((s = strstr(s, ".visible .entry "))) {
        Parser P;
        P.dynamic_shared = dynamic_shared;
        s += strlen(".visible .entry ");
        const char* paren = strchr(s, '(');
        P.p.name = Str(s, paren);
        const char* close = strchr(paren, ')');
        for (auto& d : split(Str(paren + 1, close), ',')) {       // whitespace is gone: .param.u32name or .param.align128.b8name[128]
            int size, align;
            auto name = d.find(P.p.name);
            auto bracket = d.find('[');
            if (bracket != Str::npos) { size = atoi(d.c_str() + bracket + 1); align = 64; }
            else { Str ty = d.substr(0, name); size = align = width(ty); }
            P.p.param_bytes = (P.p.param_bytes + align - 1) / align * align;
            P.p.params.push_back({d.substr(name, bracket - name), P.p.param_bytes});
            P.p.param_size.push_back(size);
            P.p.param_bytes += size;
        }
        const char* c = strchr(close, '{') + 1;
        if (const char* most = strstr(close, ".maxntid"); most && most < c) P.p.max_threads = atoi(most + strlen(".maxntid"));
        Site at{"", 0};
        int depth = 1;
        while (depth) {
            while (isspace((unsigned char)*c)) ++c;
            if (c[0] == '/' && c[1] == '/') { c = strchr(c, '\n'); continue; }
            if (*c == '{') {                                      // a block of inline assembly: collect its labels first
                ++depth; ++c;
                P.scopes.emplace_back();
                ++P.scope_id;
                int d = 1;
                for (const char* q = c; d; ++q) {
                    if (*q == '{') ++d;
                    if (*q == '}') --d;
                    if (*q == ':' && q[1] != ':' && q[-1] != ':') { const char* b = q; while (isalnum((unsigned char)b[-1]) || b[-1] == '_' || b[-1] == '$') --b; Str l(b, q); if (d == 1) P.scopes.back()[l] = l + "#" + std::to_string(P.scope_id); }
                }
                continue;
            }
            if (*c == '}') { --depth; ++c; if (depth) P.scopes.pop_back(); continue; }
            if (!strncmp(c, ".loc", 4)) {
                int f, l, col;
                const char* eol = strchr(c, '\n');
                Str line(c, eol);
                if (sscanf(c, ".loc %d %d %d", &f, &l, &col) == 3) at = {file_name.count(f) ? file_name[f] : "ptx", l};
                auto in = line.find("inlined_at ");               // a wrapper in kernels/prim: name its caller
                if (in != Str::npos && strstr(at.file, "/prim/") && sscanf(line.c_str() + in, "inlined_at %d %d", &f, &l) == 2) at = {file_name[f], l};
                c = eol;
                continue;
            }
            const char* e = c;
            while (*e != ';' && !(*e == ':' && e[1] != ':' && e[-1] != ':') ) ++e;
            Str stmt(c, e);
            if (*e == ':') { P.p.labels[P.resolve(split(stmt, '\n')[0])] = int(P.p.code.size()); c = e + 1; continue; }
            c = e + 1;
            if (stmt[0] == '.') {
                if (P.scopes.size() > 1 && stmt.rfind(".reg", 0) == 0) { auto sp = stmt.find_last_of(" \t"); Str n = stmt.substr(sp + 1); P.scopes.back()[n] = n + "#" + std::to_string(P.scope_id); }
                continue;                                         // other declarations and directives
            }
            Ins i;
            i.at = at;
            i.text = stmt;
            size_t pos = 0;
            if (stmt[0] == '@') {
                i.negate = stmt[1] == '!';
                pos = stmt.find_first_of(" \t");
                i.pred = P.slot(stmt.substr(1 + i.negate, pos - 1 - i.negate));
                pos = stmt.find_first_not_of(" \t", pos);
            }
            size_t sp = stmt.find_first_of(" \t\n", pos);
            Str opcode = stmt.substr(pos, sp - pos);
            auto ops = sp == Str::npos ? std::vector<Str>{} : split(stmt.substr(sp), ',');
            if (!build(P, i, opcode, ops)) { fprintf(stderr, "ptx: cannot run `%s` (%s:%d)\n", stmt.c_str(), at.file, at.line); return -1; }
            P.p.code.push_back(std::move(i));
        }
        for (auto& i : P.p.code)
            if (!i.label.empty()) {
                if (!P.p.labels.count(i.label)) { fprintf(stderr, "ptx: no label %s\n", i.label.c_str()); return -1; }
                i.target = P.p.labels[i.label];
            }
        programs().push_back(std::make_unique<Program>(std::move(P.p)));
        const Program* prog = programs().back().get();
        add_entry(prog->name.c_str(), Entry{[prog](void** params) { execute(*prog, params); }, std::vector<size_t>(prog->param_size.begin(), prog->param_size.end()), prog->max_threads, 0});
        ++count;
        s = c;
    }
    return count;
}
}  // namespace emu
