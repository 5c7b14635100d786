// Tensor maps, and copies of boxes.
#include <cstdio>

#include "copy_engine.hpp"
#include "mbarrier.hpp"

namespace emu {

static constexpr uint64_t kMapMagic = 0x50414d524f534e54ull;

// The checks are those that cuda.h and the programming guide document for cuTensorMapEncodeTiled.
int tensor_map_encode_tiled(void* out, int type, uint32_t rank, void* gaddr, const uint64_t* dims, const uint64_t* strides,
                            const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int l2, int oob) {
    const int invalid = 1, unsupported = 801;        // CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED
    static const uint8_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};         // of CUtensorMapDataType
    if ((uintptr_t)out % 64 || type < 0 || type > 12 || rank < 1 || rank > 5 || l2 < 0 || l2 > 3 || oob < 0 || oob > 1) return invalid;
    if (interleave != 0 || oob != 0) {
        fprintf(stderr, "emulated driver: tensor maps with interleave or NaN fill are not emulated\n");
        return unsupported;
    }
    Map m{};
    m.elem = sizes[type];
    if ((uintptr_t)gaddr % 16 || swizzle < 0 || swizzle > 3) return invalid;
    for (uint32_t i = 0; i < rank; ++i) {
        if (!dims[i] || dims[i] > (1ull << 32) || !box[i] || box[i] > 256 || !element_strides[i] || element_strides[i] > 8) return invalid;
        if (element_strides[i] != 1) { fprintf(stderr, "emulated driver: tensor maps with element strides are not emulated\n"); return unsupported; }
        m.last[i] = uint32_t(dims[i] - 1);
        m.box[i] = uint16_t(box[i]);
        if (i + 1 == rank) break;
        uint64_t least = i ? strides[i - 1] * dims[i] : dims[0] * m.elem;
        if (strides[i] % 16 || strides[i] >= (1ull << 40) || strides[i] < least) return invalid;
        m.stride[i] = strides[i];
    }
    uint32_t inner = box[0] * m.elem;
    if (inner % 16 || (swizzle && inner > (16u << swizzle))) return invalid;       // 32, 64, 128 bytes
    m.magic = kMapMagic;
    m.base = (uint64_t)gaddr;
    m.rank = uint8_t(rank);
    m.type = uint8_t(type);
    m.swizzle = uint8_t(swizzle);
    std::memcpy(out, &m, sizeof m);
    return 0;
}
static Map decode(const void* m, int rank, Site at) {
    Map r;
#if defined(__x86_64__)                              // elsewhere a parameter passed by value is aligned to 16 bytes
    if ((uintptr_t)m % 64) { report("bad tensor map", at, "not at a multiple of 64 bytes"); abandon(); }
#endif
    std::memcpy(&r, m, sizeof r);
    if (r.magic != kMapMagic) { report("bad tensor map", at, "not an encoded tensor map"); abandon(); }
    if (r.rank != rank) { report("bad tensor map", at, "a map of rank %d in an instruction of rank %d", r.rank, rank); abandon(); }
    return r;
}
uint32_t swizzle_addr(uint32_t a, int bits) { return a ^ (((a >> 7) & ((1u << bits) - 1)) << 4); }

// Visit the rows of the box: f(row's number in the box, coordinates of its first element)
template <class F> static void for_each_row(const Map& m, const Coords& c, F f) {
    uint32_t rows = 1;
    for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
    for (uint32_t r = 0; r < rows; ++r) {
        int64_t at[5] = {c.at[0]};
        uint32_t rest = r;
        for (int i = 1; i < m.rank; ++i) { at[i] = int64_t(c.at[i]) + rest % m.box[i]; rest /= m.box[i]; }
        f(r, at);
    }
}
static char* row_address(const Map& m, const int64_t* at) {     // null: outside
    char* p = (char*)m.base;
    for (int i = 1; i < m.rank; ++i) {
        if (at[i] < 0 || at[i] >= int64_t(m.dim(i))) return nullptr;
        p += at[i] * int64_t(m.stride[i - 1]);
    }
    return p;
}
// f(address in shared memory of an element, its address in global memory or null where it lies outside)
template <class F> static void for_each_element(const Map& m, uint32_t smem, const Coords& c, F f) {
    const uint32_t row_bytes = m.box[0] * m.elem;
    const int bits = m.swizzle;                                 // CUtensorMapSwizzle: 1, 2, 3 for 32, 64, 128 bytes
    for_each_row(m, c, [&](uint32_t r, const int64_t* at) {
        char* row = row_address(m, at);
        for (uint32_t b = 0; b < row_bytes; b += 16) {
            uint32_t a = swizzle_addr(smem + r * row_bytes + b, bits);
            for (uint32_t e = 0; e < 16; e += m.elem) {
                int64_t x = at[0] + (b + e) / m.elem;
                f(a + e, row && x >= 0 && x < int64_t(m.dim(0)) ? row + x * m.elem : nullptr);
            }
        }
    });
}
// What of the box lies inside, as ranges of global memory
template <class F> static void for_each_range(const Map& m, const Coords& c, F f) {
    for_each_row(m, c, [&](uint32_t, const int64_t* at) {
        char* row = row_address(m, at);
        int64_t x0 = std::max<int64_t>(at[0], 0), x1 = std::min<int64_t>(at[0] + m.box[0], m.dim(0));
        if (row && x1 > x0) f((uintptr_t)row + x0 * m.elem, size_t(x1 - x0) * m.elem);
    });
}

void box_in(const LoadOp& op) {
    const Map& m = op.map;
    for_each_element(m, op.dst, op.from, [&](uint32_t a, char* g) {
        if (!g) std::memset(smem_ptr(a), 0, m.elem);
        else if (owned((uintptr_t)g, m.elem)) std::memcpy(smem_ptr(a), g, m.elem);      // a lying map was reported at the issue
    });
}
void box_out(const BulkOp& op) {
    const Map& m = op.map;
    for_each_element(m, op.src, op.to, [&](uint32_t a, char* g) {
        if (g && owned((uintptr_t)g, m.elem)) put(op.kind, op.format, g, smem_ptr(a), m.elem);
    });
    if (checking()) for_each_range(m, op.to, [&](uintptr_t p, size_t n) { wrote(op, p, n); });
}

static Coords coordinates(const int* c, int rank) {
    Coords r{};
    std::copy(c, c + rank, r.at);
    return r;
}
static void check_swizzle(const Map& m, Site at) {
    if (m.swizzle && m.box[0] * m.elem != (16u << m.swizzle)) { report("tensor map", at, "swizzled box narrower than the swizzle span is not emulated"); abandon(); }
}
void tma_load(void* dst, const void* map, uint64_t* bar, const int* coords, int rank, Site at) {
    const Block* to = block_of(dst);
    tma_load_multicast(dst, map, bar, coords, rank, uint16_t(1u << (to ? to : me)->cta.rank), at);
}
void tma_load_multicast(void* dst, const void* map, uint64_t* bar, const int* coords, int rank, uint16_t blocks, Site at) {
    Fiber* f = self();
    Map m = decode(map, rank, at);
    check_swizzle(m, at);
    const Coords from = coordinates(coords, rank);
    if ((uintptr_t)dst % 128) { report("misaligned", at, "TMA destination smem+%u is not 128-byte aligned", smem_addr(dst) - kSmemBase); abandon(); }
    if (checking()) for_each_range(m, from, [&](uintptr_t p, size_t n) { fetched(f, p, n, at); });
    issue_load(LoadOp{nullptr, nullptr, m, nullptr, smem_addr(dst), from, m.box_bytes(), 0, at}, dst, bar, blocks, "TMA load");
}
void tma_store(Bulk kind, const void* map, const void* src, const int* coords, int rank, Site at) {
    Fiber* f = self();
    Map m = decode(map, rank, at);
    check_swizzle(m, at);
    uint32_t bytes = m.box_bytes();
    if (!in_smem(src, bytes, "TMA store", at)) abandon();
    if (kind == Bulk::ReduceAdd && m.type != kBf16 && m.type != kF16 && m.type != kF32) { report("tensor map", at, "a reduction of type %d is not emulated", m.type); abandon(); }
    uint32_t a = smem_addr(src);
    if (a % 128) { report("misaligned", at, "TMA source smem+%u is not 128-byte aligned", a - kSmemBase); abandon(); }
    issue_store(BulkOp{kind, m, nullptr, Format(m.type), a, coordinates(coords, rank), bytes, 0, f, false, at});
}

}  // namespace emu
