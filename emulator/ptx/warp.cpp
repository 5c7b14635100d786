// Collectives of a warp and barriers of a block.
#include <algorithm>

#include "program.hpp"

namespace emu::ptx {
namespace {

void run_shuffle(Thread& t, const Ins& i) {          // d|p, value, lane or distance, clamp and segments, mask
    const int lane = int(threadIdx.x % 32), segments = int(R(c) >> 8 & 31), clamp = int(R(c) & 31), by = int(R(b) & 31);
    const int width = 32 - segments, first = lane & segments, last = first | (clamp & ~segments);
    bool inside = true;
    switch (Shfl(i.k)) {
        case kUp: inside = lane - by >= first; break;
        case kDown: inside = lane + by <= last; break;
        case kXor: inside = (lane ^ by) <= last; break;
        case kIdx: inside = (first | (by & ~segments)) <= last; break;
    }
    const Reg v = shuffle(Shfl(i.k), uint32_t(t.r[i.e]), uint32_t(R(a)), int(R(b)), width, i.at);
    R(d) = uint32_t(v);
    t.r[i.more->v0[0]] = inside;
}
void run_match(Thread& t, const Ins& i) {            // d|p: lanes with the same value
    const uint32_t mask = uint32_t(R(b));
    uint32_t same = 0;
    for (int l = 0; l < 32; ++l)
        if (mask >> l & 1) {
            uint64_t theirs = shuffle(kIdx, mask, R(a), l, 32, i.at);
            if (theirs == R(a)) same |= 1u << l;
        }
    if (i.k) { R(c) = same == mask; R(d) = same == mask ? mask : 0; }
    else R(d) = same;
}
void run_reduce(Thread& t, const Ins& i) {
    const uint32_t mask = uint32_t(R(b));
    bool first = true;
    uint32_t r = 0;
    for (int l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        const uint32_t v = uint32_t(shuffle(kIdx, mask, R(a), l, 32, i.at));
        if (first) r = v;
        else switch (i.k) {
            case 0: r += v; break;
            case 1: r &= v; break;
            case 2: r |= v; break;
            case 3: r ^= v; break;
            case 4: r = std::min(r, v); break;
            case 5: r = std::max(r, v); break;
            case 6: r = uint32_t(std::min(int32_t(r), int32_t(v))); break;
            case 7: r = uint32_t(std::max(int32_t(r), int32_t(v))); break;
        }
        first = false;
    }
    R(d) = r;
}
void run_ldmatrix(Thread& t, const Ins& i) {
    uint32_t r[4];
    ldmatrix(r, i.n, i.k, own_shared(uint32_t(R(a) + Reg(i.off)), i.at), i.at);
    for (int k = 0; k < i.n; ++k) t.r[i.more->v1[size_t(k)]] = r[k];
}
void run_stmatrix(Thread& t, const Ins& i) {
    uint32_t r[4];
    for (int k = 0; k < i.n; ++k) r[k] = uint32_t(t.r[i.more->v1[size_t(k)]]);
    stmatrix(r, i.n, i.k, own_shared(uint32_t(R(a) + Reg(i.off)), i.at), i.at);
}
void run_mma(Thread& t, const Ins& i) {
    float d[4];
    uint32_t a[4], b[2];
    auto& m = *i.more;
    for (size_t k = 0; k < 4; ++k) { d[k] = as<float>(t.r[m.v3[k]]); a[k] = uint32_t(t.r[m.v1[k]]); }
    for (size_t k = 0; k < 2; ++k) b[k] = uint32_t(t.r[m.v2[k]]);
    mma_m16n8(Format(i.k), d, a, b, i.at);
    for (size_t k = 0; k < 4; ++k) t.r[m.v0[k]] = reg<float>(d[k]);
}

bool decode_barrier(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const bool warp = o.take("warp");
    o.take("cta");
    o.take("aligned");
    const bool arrive = o.take("arrive");
    if ((!arrive && !o.take("sync")) || x.empty() || x.size() > 2) return false;
    i.a = P.slot(x[0]);
    if (warp) { i.exec = RUN { sync_warp(uint32_t(R(a)), i.at); }; return x.size() == 1 && !arrive; }
    i.k = x.size() > 1;
    if (i.k) i.b = P.slot(x[1]);
    if (arrive) { i.exec = RUN { named_arrive(int(R(a)), int(R(b)), i.at); }; return i.k; }
    i.exec = RUN {
        if (i.k) named_sync(int(R(a)), int(R(b)), i.at);
        else if (R(a) == 0) sync_threads(i.at);
        else named_sync(int(R(a)), int(blockDim.x * blockDim.y * blockDim.z), i.at);
    };
    return true;
}
bool decode_vote(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (!o.take("sync") || x.size() != 3) return false;
    i.k = o.take("ballot") ? 0 : o.take("any") ? 1 : o.take("all") ? 2 : o.take("uni") ? 3 : -1;
    if (i.k < 0 || !o.take(i.k ? "pred" : "b32")) return false;
    bool negate;
    i.d = P.slot(x[0]);
    i.a = P.predicate(x[1], negate);
    i.n = negate;
    i.b = P.slot(x[2]);
    i.exec = RUN {
        const uint32_t mask = uint32_t(R(b)), votes = ballot(mask, (R(a) != 0) != bool(i.n), i.at);
        R(d) = i.k == 0 ? votes : i.k == 1 ? votes != 0 : i.k == 2 ? votes == mask : votes == mask || votes == 0;
    };
    return true;
}
bool decode_shuffle(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    if (!o.take("sync") || !o.take("b32") || x.size() != 5) return false;
    i.k = o.take("bfly") ? kXor : o.take("down") ? kDown : o.take("up") ? kUp : o.take("idx") ? kIdx : -1;
    auto results = split(x[0], '|');
    i.d = P.slot(results[0]);
    i.a = P.slot(x[1]);
    i.b = P.slot(x[2]);
    i.c = P.slot(x[3]);
    i.e = P.slot(x[4]);
    more(i).v0 = {results.size() > 1 ? P.slot(results[1]) : P.fresh()};
    i.exec = run_shuffle;
    return i.k >= 0;
}
bool decode_matrix(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const bool load = o.op() == "ldmatrix";
    for (const char* part : {"sync", "aligned", "m8n8", "b16"}) if (!o.take(part)) return false;
    if (!o.take("shared") && !o.take("shared::cta")) return false;
    i.n = o.take("x1") ? 1 : o.take("x2") ? 2 : o.take("x4") ? 4 : 0;
    i.k = o.take("trans");
    if (x.size() != 2) return false;
    more(i).v1 = P.list(x[load ? 0 : 1]);
    P.address(i, x[load ? 1 : 0], i.a);
    i.exec = load ? run_ldmatrix : run_stmatrix;
    return i.n && int(i.more->v1.size()) == i.n;
}
bool decode_mma(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    struct { const char* text; Format format; } known[] = {
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", kBf16},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", kF16},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", kTf32},
    };
    for (auto& k : known) {
        if (o.text != k.text || x.size() != 4) continue;
        for (size_t p = 1; p < o.taken.size(); ++p) o.taken[p] = true;
        auto& m = more(i);
        m.v0 = P.list(x[0]);
        m.v1 = P.list(x[1]);
        m.v2 = P.list(x[2]);
        m.v3 = P.list(x[3]);
        i.k = k.format;
        i.exec = run_mma;
        return m.v0.size() == 4 && m.v1.size() == 4 && m.v2.size() == 2 && m.v3.size() == 4;
    }
    return false;
}
}  // namespace

bool decode_warp(Parser& P, Ins& i, Opcode& o, const Operands& x) {
    const Str& op = o.op();
    if (op == "bar" || (op == "barrier" && !o.is("barrier.cluster."))) return decode_barrier(P, i, o, x);
    if (op == "vote") return decode_vote(P, i, o, x);
    if (op == "shfl") return decode_shuffle(P, i, o, x);
    if (op == "ldmatrix" || op == "stmatrix") return decode_matrix(P, i, o, x);
    if (op == "mma") return decode_mma(P, i, o, x);
    if (op == "elect" && o.take("sync") && x.size() == 2) {               // d|p, mask
        auto results = split(x[0], '|');
        if (results.size() != 2) return false;
        i.d = P.slot(results[0]);
        i.a = P.slot(results[1]);
        i.b = P.slot(x[1]);
        i.exec = RUN {
            const uint32_t mask = uint32_t(R(b));
            ballot(mask, true, i.at);
            R(d) = uint32_t(__builtin_ctz(mask));
            R(a) = threadIdx.x % 32 == R(d);
        };
        return true;
    }
    if (op == "match" && o.take("sync") && x.size() == 3) {
        i.k = o.take("all");
        if (!i.k && !o.take("any")) return false;
        if (!o.take("b32") && !o.take("b64")) return false;
        auto results = split(x[0], '|');
        i.d = P.slot(results[0]);
        i.c = results.size() > 1 ? P.slot(results[1]) : P.fresh();
        i.a = P.slot(x[1]);
        i.b = P.slot(x[2]);
        i.exec = run_match;
        return true;
    }
    if (op == "redux" && o.take("sync") && x.size() == 3) {
        const Str type = o.take_last();
        const char* names[] = {"add", "and", "or", "xor", "min", "max"};
        i.k = -1;
        for (int k = 0; k < 6; ++k) if (o.take(names[k])) i.k = k + (k >= 4 && type == "s32" ? 2 : 0);
        i.d = P.slot(x[0]);
        i.a = P.slot(x[1]);
        i.b = P.slot(x[2]);
        i.exec = run_reduce;
        return i.k >= 0 && width(type) == 4 && type[0] != 'f';
    }
    return false;
}

}  // namespace emu::ptx
