// Tensor maps and the copy engine. Loads land when nothing else can run (lazy), at once (eager) or at random; stores read
// their source when this thread waits for them at the latest.
#include "mbarrier.hpp"

namespace emu {

static constexpr uint64_t kMapMagic = 0x50414d524f534e54ull;

int tensor_map_encode_tiled(void* out, int type, uint32_t rank, void* gaddr, const uint64_t* dims, const uint64_t* strides,
                            const uint32_t* box, const uint32_t* es, int interleave, int swizzle, int, int oob) {
    const int invalid = 1;   // CUDA_ERROR_INVALID_VALUE
    if ((uintptr_t)out % 64 || rank != 2 || (type != kBf16 && type != kF16 && type != kF32 && type != kTf32) || interleave != 0 || oob != 0) return invalid;
    uint32_t elem = type == kBf16 || type == kF16 ? 2 : 4;
    if ((uintptr_t)gaddr % 16 || strides[0] % 16 || strides[0] >= (1ull << 40)) return invalid;
    for (int i = 0; i < 2; ++i) if (!dims[i] || dims[i] > (1ull << 32) || !box[i] || box[i] > 256 || es[i] != 1) return invalid;
    uint32_t inner = box[0] * elem;
    if (inner % 16 || swizzle < 0 || swizzle > 3) return invalid;
    if (swizzle && inner > (16u << swizzle)) return invalid;              // 32, 64, 128 bytes
    if (strides[0] < dims[0] * elem) return invalid;
    Map m{};
    m.magic = kMapMagic; m.base = (uint64_t)gaddr; m.dim[0] = dims[0]; m.dim[1] = dims[1]; m.stride = strides[0];
    m.box[0] = box[0]; m.box[1] = box[1]; m.elem = elem; m.type = type; m.swizzle = swizzle; m.oob = oob;
    std::memcpy(out, &m, sizeof m);
    return 0;
}
Map decode(const void* m, Site at) {
    Map r;
    if ((uintptr_t)m % 64) { report("bad tensor map", at, "not at a multiple of 64 bytes"); abandon(); }
    std::memcpy(&r, m, sizeof r);
    if (r.magic != kMapMagic) { report("bad tensor map", at, "not an encoded tensor map"); abandon(); }
    return r;
}
uint32_t swizzle_addr(uint32_t a, int bits) { return a ^ (((a >> 7) & ((1u << bits) - 1)) << 4); }
static int swizzle_bits(int mode) { return mode == 3 ? 3 : mode == 2 ? 2 : mode == 1 ? 1 : 0; }   // CUtensorMapSwizzle 128B, 64B, 32B

// Visit the box row by row: f(smem address of a 16-byte chunk, coordinates of its first element)
template <class F> static void for_each_chunk(const Map& m, uint32_t smem, int x, int y, F f) {
    uint32_t row_bytes = m.box[0] * m.elem;
    int bits = swizzle_bits(m.swizzle);
    for (uint32_t r = 0; r < m.box[1]; ++r)
        for (uint32_t b = 0; b < row_bytes; b += 16) f(swizzle_addr(smem + r * row_bytes + b, bits), int64_t(x) + b / m.elem, int64_t(y) + r);
}
static bool inside(const Map& m, int64_t x, int64_t y) { return y >= 0 && y < int64_t(m.dim[1]) && x >= 0 && x < int64_t(m.dim[0]); }
static char* element(const Map& m, int64_t x, int64_t y) { return (char*)m.base + y * m.stride + x * m.elem; }
// The rows of the box that lie inside, as ranges of global memory
template <class F> static void for_each_row(const Map& m, int x, int y, F f) {
    int64_t x0 = std::max(x, 0), x1 = std::min<int64_t>(int64_t(x) + m.box[0], m.dim[0]);
    for (int64_t gy = std::max(y, 0); gy < std::min<int64_t>(int64_t(y) + m.box[1], m.dim[1]); ++gy)
        if (x1 > x0) f((uintptr_t)element(m, x0, gy), size_t(x1 - x0) * m.elem);
}

static void copy_in(const LoadOp& op) {
    const Map& m = op.map;
    for_each_chunk(m, op.dst, op.x, op.y, [&](uint32_t a, int64_t gx, int64_t gy) {
        char* d = smem_ptr(a);
        for (int i = 0; i < int(16 / m.elem); ++i, d += m.elem) {
            if (!inside(m, gx + i, gy)) { std::memset(d, 0, m.elem); continue; }
            char* g = element(m, gx + i, gy);
            if (owned((uintptr_t)g, m.elem)) std::memcpy(d, g, m.elem);      // a lying map was reported at the issue
        }
    });
}
template <class T, class F> static void combine(T* p, F f) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, f(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}
static uint16_t narrow(Format f, float x) {
    if (f == kF16) { _Float16 h = _Float16(x); uint16_t r; std::memcpy(&r, &h, 2); return r; }
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
static void copy_out(const BulkOp& op) {
    const Map& m = op.map;
    Format format = Format(m.type);
    for_each_chunk(m, op.src, op.x, op.y, [&](uint32_t a, int64_t gx, int64_t gy) {
        const char* s = smem_ptr(a);
        for (int i = 0; i < int(16 / m.elem); ++i, s += m.elem) {
            if (!inside(m, gx + i, gy)) continue;
            char* g = element(m, gx + i, gy);
            if (!owned((uintptr_t)g, m.elem)) continue;
            if (op.kind == Bulk::Store) std::memcpy(g, s, m.elem);
            else if (m.elem == 4) {
                float v;
                std::memcpy(&v, s, 4);
                combine((uint32_t*)g, [&](uint32_t old) { float p; std::memcpy(&p, &old, 4); p += v; std::memcpy(&old, &p, 4); return old; });
            } else {
                uint16_t v;
                std::memcpy(&v, s, 2);
                combine((uint16_t*)g, [&](uint16_t old) { return narrow(format, to_float(format, old) + to_float(format, v)); });
            }
        }
    });
    if (checking())
        for_each_row(m, op.x, op.y, [&](uintptr_t p, size_t n) {
            check_global(p, n, true, op.kind == Bulk::ReduceAdd, op.by->storer + kMaxStorers, op.clk, op.by->clock, op.at);
        });
}

static void finish_load(LoadOp& op) {
    copy_in(op);
    MBar& b = *op.bar;
    uint32_t clk = ++b.op_clk;
    if (checking()) {
        for_each_chunk(op.map, op.dst, 0, 0, [&](uint32_t a, int64_t, int64_t) { land(a, 16, b.who, clk, true); });
        b.pend.all[b.who] = clk;
        b.pend.fenced[b.who] = clk;
    }
    b.tx -= op.bytes;
    phase_check(b);
}
void finish_store(BulkOp& op) { if (!op.read_done) { copy_out(op); op.read_done = true; } }
bool engine_step(bool random) {
    auto& L = me->cta.loads;
    if (L.empty()) return false;
    size_t i = random ? me->rng() % L.size() : 0;
    auto op = std::move(L[i]);
    L.erase(L.begin() + i);
    finish_load(*op);
    return true;
}

void tma_load_2d(void* dst, const void* map, uint64_t* bar, int x, int y, Site at) {
    Fiber* f = self();
    Map m = decode(map, at);
    MBar& b = bar_at(bar, "TMA load", at);
    if (!b.visible_to_async) report("mbarrier init not fenced", at, "the async proxy may not see the initialised mbarrier");
    uint32_t bytes = m.box[0] * m.box[1] * m.elem;
    if (!in_smem(dst, bytes, "TMA load", at)) abandon();
    uint32_t a = smem_addr(dst);
    if (a % 128) { report("misaligned", at, "TMA destination smem+%u is not 128-byte aligned", a - kSmemBase); abandon(); }
    if (m.swizzle && m.box[0] * m.elem != (16u << m.swizzle)) { report("tensor map", at, "swizzled box narrower than the swizzle span is not emulated"); abandon(); }
    Cta& c = me->cta;
    auto op = std::make_unique<LoadOp>(LoadOp{&b, m, a, x, y, bytes, 0, at});
    op->tag = uint16_t(0x8000 | (c.next_tag++ & 0x7fff));
    if (checking()) {
        for_each_row(m, x, y, [&](uintptr_t p, size_t n) { check_global(p, n, false, false, f->id, now(f), f->clock, at); });
        check_write(a, bytes, b.who, b.op_clk + 1, f->clock, true, false, op->tag, nullptr, at);
    }
    std::memset(dst, 0xff, bytes);
    if (me->launch->opt.async == Async::Eager) finish_load(*op);
    else c.loads.push_back(std::move(op));
}
void tma_store_2d(Bulk kind, const void* map, const void* src, int x, int y, Site at) {
    Fiber* f = self();
    Map m = decode(map, at);
    uint32_t bytes = m.box[0] * m.box[1] * m.elem;
    if (!in_smem(src, bytes, "TMA store", at)) abandon();
    uint32_t a = smem_addr(src);
    if (a % 128) { report("misaligned", at, "TMA source smem+%u is not 128-byte aligned", a - kSmemBase); abandon(); }
    Cta& c = me->cta;
    if (f->storer < 0) {
        if (c.storers == kMaxStorers) { report("bulk store", at, "more than %d threads issue bulk stores", kMaxStorers); abandon(); }
        f->storer = c.threads + kMaxWg + kMaxBars + c.storers++;
    }
    uint32_t clk = f->clock.all[f->storer] + uint32_t(f->bulk_groups.size()) + 1;   // one tick per group
    auto op = std::make_unique<BulkOp>(BulkOp{kind, m, a, x, y, bytes, clk, f, false, at});
    if (checking()) check_read(a, bytes, f->storer, clk, f->clock, true, false, nullptr, at);
    f->bulk.push_back(op.get());
    if (me->launch->opt.async == Async::Eager) finish_store(*op);
    c.stores.push_back(std::move(op));
}
void bulk_commit() {
    Fiber* f = self();
    f->bulk_groups.push_back(std::move(f->bulk));
    f->bulk.clear();
}
void bulk_wait(int pending, bool read_only) {
    Fiber* f = self();
    while ((int)f->bulk_groups.size() > pending) {
        for (auto* op : f->bulk_groups.front()) finish_store(*op);
        f->bulk_groups.pop_front();
        if (f->storer >= 0) ++f->clock.all[f->storer];
    }
    if (f->storer >= 0 && !read_only) f->clock.all[f->storer + kMaxStorers] = f->clock.all[f->storer];
    ++f->clock.version;
}

}  // namespace emu
