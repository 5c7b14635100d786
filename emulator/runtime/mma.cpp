// Matrix fragments and products of a warp: ldmatrix, stmatrix, mma.sync. Fragment tables: PTX ISA, matrix fragments for
// mma.m16n8k16 and m16n8k8, ldmatrix.
#include "cut_sums.hpp"
#include "state.hpp"

namespace emu {

float to_float(Format f, uint32_t bits) {
    uint32_t u = f == kBf16 ? bits << 16 : bits;
    if (f == kF16) { uint16_t h = uint16_t(bits); Binary16 x; std::memcpy(&x, &h, 2); return float(x); }
    if (f == kTf32) u &= 0xffffe000u;                // the tensor core drops the low 13 bits
    float r;
    std::memcpy(&r, &u, 4);
    return r;
}

// Runs f as if lane l did: reports and clocks are that lane's.
template <class F> static void as_lane(int l, F f) {
    Fiber* mine = me->worker->current;
    Fiber* other = lane_fiber(l);
    me->worker->current = other;
    bool ok = f(other);
    me->worker->current = mine;
    if (!ok) abandon();
}

void ldmatrix(uint32_t* r, int count, bool trans, const void* row, Site at) {
    struct A { uint32_t* r; const void* row; } a{r, row};
    Rendezvous* v = warp_collective(kLdm + 32 * count + 16 * trans, ~0u, &a, at, "ldmatrix");
    if (!v) return;
    uint16_t m[4][8][8];
    for (int l = 0; l < 8 * count; ++l) {
        const void* p = ((A*)v->args[l])->row;
        as_lane(l, [&](Fiber* f) {
            if (!in_smem(p, 16, "ldmatrix", at)) return false;
            if ((uintptr_t)p % 16) { report("misaligned", at, "ldmatrix row address"); return false; }
            if (checking()) check_read(smem_addr(p), 16, f->who, now(f), f->clock, false, false, nullptr, at);
            return true;
        });
        std::memcpy(m[l / 8][l % 8], p, 16);
    }
    if (me->launch->opt.banks) {
        uint32_t addr[32];
        for (int l = 0; l < 8 * count; ++l) addr[l] = smem_addr(((A*)v->args[l])->row);
        Banks::count(me->banks.by_site[{at.file, at.line}], addr, count == 4 ? ~0u : (1u << 8 * count) - 1, 16);
    }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < count; ++i) {
            int x = l / 4, y = (l % 4) * 2;
            uint32_t lo = trans ? m[i][y][x] : m[i][x][y], hi = trans ? m[i][y + 1][x] : m[i][x][y + 1];
            ((A*)v->args[l])->r[i] = lo | hi << 16;
        }
    finish_warp(v);
}
void stmatrix(const uint32_t* r, int count, bool trans, void* row, Site at) {
    struct A { const uint32_t* r; void* row; } a{r, row};
    Rendezvous* v = warp_collective(kStm + 32 * count + 16 * trans, ~0u, &a, at, "stmatrix");
    if (!v) return;
    uint16_t m[4][8][8];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < count; ++i) {
            int x = l / 4, y = (l % 4) * 2;
            uint32_t u = ((A*)v->args[l])->r[i];
            (trans ? m[i][y][x] : m[i][x][y]) = uint16_t(u);
            (trans ? m[i][y + 1][x] : m[i][x][y + 1]) = uint16_t(u >> 16);
        }
    for (int l = 0; l < 8 * count; ++l) {
        void* p = ((A*)v->args[l])->row;
        as_lane(l, [&](Fiber* f) {
            if (!in_smem(p, 16, "stmatrix", at)) return false;
            if ((uintptr_t)p % 16) { report("misaligned", at, "stmatrix row address"); return false; }
            if (checking()) check_write(smem_addr(p), 16, f->who, now(f), f->clock, false, false, 0, nullptr, at);
            return true;
        });
        std::memcpy(p, m[l / 8][l % 8], 16);
    }
    if (me->launch->opt.banks) {
        uint32_t addr[32];
        for (int l = 0; l < 8 * count; ++l) addr[l] = smem_addr(((A*)v->args[l])->row);
        Banks::count(me->banks.by_site[{at.file, at.line}], addr, count == 4 ? ~0u : (1u << 8 * count) - 1, 16);
    }
    finish_warp(v);
}

EMU_SIMD static void products(float (*__restrict c)[8], const float (*__restrict a)[16], const float (*__restrict b)[8], int depth) {
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < depth; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
}
void mma_m16n8(Format format, float* d, const uint32_t* a, const uint32_t* b, Site at) {
    struct A { float* d; const uint32_t *a, *b; } x{d, a, b};
    Rendezvous* v = warp_collective(kMma + 64 * format, ~0u, &x, at, "mma.sync");
    if (!v) return;
    ++me->counters.mma;
    float ma[16][16], mb[16][8];
    for (int l = 0; l < 32; ++l) {
        A& y = *(A*)v->args[l];
        int g = l / 4, t = l % 4;
        if (format == kTf32) {
            for (int i = 0; i < 4; ++i) ma[g + 8 * (i % 2)][t + 4 * (i / 2)] = to_float(format, y.a[i]);
            for (int i = 0; i < 2; ++i) mb[t + 4 * i][g] = to_float(format, y.b[i]);
        } else {
            for (int i = 0; i < 8; ++i) ma[g + 8 * ((i / 2) % 2)][t * 2 + (i % 2) + 8 * (i / 4)] = to_float(format, y.a[i / 2] >> (16 * (i % 2)) & 0xffff);
            for (int i = 0; i < 4; ++i) mb[t * 2 + (i % 2) + 8 * (i / 2)][g] = to_float(format, y.b[i / 2] >> (16 * (i % 2)) & 0xffff);
        }
    }
    float mc[16][8] = {};
    const auto element = [&](int l, int i) -> float& { return mc[l / 4 + 8 * (i / 2)][(l % 4) * 2 + (i % 2)]; };
    const Options& o = me->launch->opt;
    if (o.cut) {
        for (int l = 0; l < 32; ++l) for (int i = 0; i < 4; ++i) element(l, i) = ((A*)v->args[l])->d[i];
        float dense[16][8];                          // of TF32 half as many columns
        if (format == kTf32) for (int i = 0; i < 16; ++i) std::memcpy(dense[i], ma[i], sizeof dense[i]);
        if (format == kTf32) cut_products(mc[0], dense[0], mb[0], 16, 8, 8, o.cut_group / 2, o.cut_group / 8);
        else cut_products(mc[0], ma[0], mb[0], 16, 8, 16, o.cut_group, o.cut_group / 8);
    } else {
        products(mc, ma, mb, format == kTf32 ? 8 : 16);
    }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) {
            float& d = ((A*)v->args[l])->d[i];
            d = o.cut ? element(l, i) : d + element(l, i);
        }
    finish_warp(v);
}

}  // namespace emu
