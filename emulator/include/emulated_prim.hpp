// The emulator's implementation of kernels/prim: same names, same contracts, each a call into the functional SM. The last
// argument of each is filled in by the compiler, so that reports name the kernel's line.
#pragma once
#include "binary16.hpp"
#include "cuda.hpp"
#include "types.cuh"

namespace prim {
using emu::here;
using emu::Site;

// ---- math -------------------------------------------------------------------------------------------------------------
inline u32 opaque(u32 x) { return x; }
inline u32 f32_bits(float x) { return __builtin_bit_cast(u32, x); }
inline float bits_f32(u32 x) { return __builtin_bit_cast(float, x); }
inline float to_f32(float x) { return x; }
inline float to_f32(bf16 x) { return bits_f32(u32(x.bits) << 16); }
inline float to_f32(f16 x) { return float(__builtin_bit_cast(emu::Binary16, x.bits)); }
template <class T> T from_f32(float x);
template <> inline float from_f32<float>(float x) { return x; }
template <> inline bf16 from_f32<bf16>(float x) {
    u32 u = f32_bits(x);
    return {(u & 0x7fffffffu) > 0x7f800000u ? u16(0x7fff) : u16((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
template <> inline f16 from_f32<f16>(float x) { return {x != x ? u16(0x7fff) : __builtin_bit_cast(u16, emu::Binary16(x))}; }
template <class T> inline u32 pack2(float lo, float hi) { return from_f32<T>(lo).bits | u32(from_f32<T>(hi).bits) << 16; }
template <class T> inline float unpack_lo(u32 x) { return to_f32(T{u16(x & 0xffffu)}); }
template <class T> inline float unpack_hi(u32 x) { return to_f32(T{u16(x >> 16)}); }
inline u32 to_tf32(float x) {                                   // to nearest, ties away from zero
    u32 u = f32_bits(x);
    return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}
// The approximations are libm's here: correct to the last bit or two, where the hardware is within 2^-22 or so. A subnormal
// becomes zero.
inline float ftz(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }
inline float ex2(float x) { return ftz(::exp2f(ftz(x))); }
inline float lg2(float x) { return ::log2f(ftz(x)); }
inline float rcp(float x) { return ftz(bits_f32(0x3f800000u) / ftz(x)); }
inline float tanh_approx(float x) { return ::tanhf(x); }
inline float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return ::fma(a, b, c); }
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float div_rn(float a, float b) { return a / b; }
inline float fmax(float a, float b) { return ::fmaxf(a, b); }
inline float fmin(float a, float b) { return ::fminf(a, b); }
inline float fabs(float x) { return ::fabsf(x); }
inline float expf_accurate(float x) { return ::expf(x); }
inline float tanhf(float x) { return ::tanhf(x); }
inline float logf(float x) { return ::logf(x); }
inline float log1pf(float x) { return ::log1pf(x); }
inline float expm1f(float x) { return ::expm1f(x); }
inline float sqrtf(float x) { return ::sqrtf(x); }
inline double exp(double x) { return ::exp(x); }
inline double log(double x) { return ::log(x); }
inline i32 popc(u32 x) { return __builtin_popcount(x); }
inline i32 ffs(u32 x) { return __builtin_ffs(int(x)); }
inline i32 clz(u32 x) { return x ? __builtin_clz(x) : 32; }
inline u32 brev(u32 x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
inline u32 mul_hi(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
inline u64 mul_hi(u64 a, u64 b) { return u64((unsigned __int128)(a) * b >> 64); }

// ---- memory -----------------------------------------------------------------------------------------------------------
template <class T> inline T& shared_memory() { return *static_cast<T*>(emu::dynamic_smem()); }
inline u32 smem_addr(const void* p) { return emu::smem_addr(p); }
inline Vec16 ld_global_16(const void* p, Site at = here()) {
    Vec16 v;
    emu::load_global(&v, p, 16, at);
    return v;
}
inline Vec16 ld_global_nc_16(const void* p, Site at = here()) { return ld_global_16(p, at); }
inline void st_global_16(void* p, Vec16 v, Site at = here()) { emu::store_global(p, &v, 16, at); }
inline void st_global_cs_16(void* p, Vec16 v, Site at = here()) { emu::store_global(p, &v, 16, at); }

inline void cp_async_16(void* smem, const void* gmem, u32 src_bytes, Site at = here()) { emu::cp_async_16(smem, gmem, src_bytes, at); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int Pending> inline void cp_async_wait() { emu::cp_async_wait(Pending); }

// ---- fragments --------------------------------------------------------------------------------------------------------
inline void ldmatrix_x4(u32 (&r)[4], const void* row, Site at = here()) { emu::ldmatrix(r, 4, false, row, at); }
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, Site at = here()) { emu::ldmatrix(r, 4, true, row, at); }
inline void ldmatrix_x2(u32 (&r)[2], const void* row, Site at = here()) { emu::ldmatrix(r, 2, false, row, at); }
inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row, Site at = here()) { emu::ldmatrix(r, 2, true, row, at); }
inline void stmatrix_x1(void* row, const u32 (&r)[1], Site at = here()) { emu::stmatrix(r, 1, false, row, at); }
inline void stmatrix_x1_trans(void* row, const u32 (&r)[1], Site at = here()) { emu::stmatrix(r, 1, true, row, at); }
inline void stmatrix_x2(void* row, const u32 (&r)[2], Site at = here()) { emu::stmatrix(r, 2, false, row, at); }
inline void stmatrix_x2_trans(void* row, const u32 (&r)[2], Site at = here()) { emu::stmatrix(r, 2, true, row, at); }
inline void stmatrix_x4(void* row, const u32 (&r)[4], Site at = here()) { emu::stmatrix(r, 4, false, row, at); }
inline void stmatrix_x4_trans(void* row, const u32 (&r)[4], Site at = here()) { emu::stmatrix(r, 4, true, row, at); }
template <class T> constexpr emu::Format kFormat = emu::kBf16;
template <> inline constexpr emu::Format kFormat<f16> = emu::kF16;
template <class T> inline void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Site at = here()) {
    emu::mma_m16n8(kFormat<T>, d, a, b, at);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Site at = here()) {
    emu::mma_m16n8(emu::kTf32, d, a, b, at);
}

// ---- warp -------------------------------------------------------------------------------------------------------------
template <int Bytes> struct Pick { using type = u32; };
template <> struct Pick<8> { using type = u64; };
template <class T> inline T shuffle_as(emu::Shfl kind, u32 mask, T v, int src, Site at) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    using Bits = typename Pick<sizeof(T)>::type;
    return __builtin_bit_cast(T, Bits(emu::shuffle(kind, mask, __builtin_bit_cast(Bits, v), src, 32, at)));
}
template <class T> inline T shfl_xor(T v, int lanes, u32 mask = ~0u, Site at = here()) { return shuffle_as(emu::kXor, mask, v, lanes, at); }
template <class T> inline T shfl_down(T v, u32 delta, u32 mask = ~0u, Site at = here()) { return shuffle_as(emu::kDown, mask, v, int(delta), at); }
template <class T> inline T shfl_up(T v, u32 delta, u32 mask = ~0u, Site at = here()) { return shuffle_as(emu::kUp, mask, v, int(delta), at); }
template <class T> inline T shfl_idx(T v, int lane, u32 mask = ~0u, Site at = here()) { return shuffle_as(emu::kIdx, mask, v, lane, at); }
inline u32 ballot(bool p, u32 mask = ~0u, Site at = here()) { return emu::ballot(mask, p, at); }
inline bool any(bool p, u32 mask = ~0u, Site at = here()) { return emu::ballot(mask, p, at) != 0; }
inline bool all(bool p, u32 mask = ~0u, Site at = here()) { return emu::ballot(mask, p, at) == mask; }
inline void syncwarp(u32 mask = ~0u, Site at = here()) { emu::sync_warp(mask, at); }
inline bool elect_one(Site at = here()) { return emu::ballot(~0u, true, at) && threadIdx.x % 32 == 0; }   // collective, as elect.sync

// ---- atomics ----------------------------------------------------------------------------------------------------------
#define PRIM_RMW(name, op, T, U)                                                                              \
    inline T name(T* p, T v, Site at = here()) {                                                              \
        return __builtin_bit_cast(T, U(emu::atomic_rmw(emu::Rmw::op, emu::Order::Relaxed, p, sizeof(T), __builtin_bit_cast(U, v), 0, at))); \
    }
PRIM_RMW(atomic_add, Add, u32, u32)
PRIM_RMW(atomic_add, Add, i32, u32)
PRIM_RMW(atomic_add, Add, u64, u64)
PRIM_RMW(atomic_add, AddF32, float, u32)
PRIM_RMW(atomic_or, Or, u32, u32)
PRIM_RMW(atomic_and, And, u32, u32)
PRIM_RMW(atomic_max, MaxU, u32, u32)
PRIM_RMW(atomic_max, MaxS, i32, u32)
PRIM_RMW(atomic_max, MaxU, u64, u64)
PRIM_RMW(atomic_min, MinU, u32, u32)
PRIM_RMW(atomic_min, MinS, i32, u32)
PRIM_RMW(atomic_min, MinU, u64, u64)
PRIM_RMW(atomic_exch, Exch, u32, u32)
PRIM_RMW(atomic_exch, Exch, u64, u64)
#undef PRIM_RMW
inline u32 atomic_cas(u32* p, u32 expected, u32 v, Site at = here()) { return u32(emu::atomic_rmw(emu::Rmw::Cas, emu::Order::Relaxed, p, 4, v, expected, at)); }
inline u64 atomic_cas(u64* p, u64 expected, u64 v, Site at = here()) { return emu::atomic_rmw(emu::Rmw::Cas, emu::Order::Relaxed, p, 8, v, expected, at); }
inline void threadfence() { emu::thread_fence(); }
inline u32 ld_acquire(const u32* p, Site at = here()) { return u32(emu::atomic_load(emu::Order::Acquire, p, 4, at)); }
inline u32 ld_relaxed(const u32* p, Site at = here()) { return u32(emu::atomic_load(emu::Order::Relaxed, p, 4, at)); }
inline void st_release(u32* p, u32 v, Site at = here()) { emu::atomic_store(emu::Order::Release, p, 4, v, at); }
inline void st_relaxed(u32* p, u32 v, Site at = here()) { emu::atomic_store(emu::Order::Relaxed, p, 4, v, at); }
inline u32 atomic_add_acq_rel(u32* p, u32 v, Site at = here()) { return u32(emu::atomic_rmw(emu::Rmw::Add, emu::Order::AcqRel, p, 4, v, 0, at)); }
inline void reduce_add_2(float* p, float first, float second, Site at = here()) {
    atomic_add(p, first, at);
    atomic_add(p + 1, second, at);
}
inline void nanosleep(u32, Site at = here()) { emu::nanosleep(at); }

// ---- barriers ---------------------------------------------------------------------------------------------------------
inline void named_barrier_sync(int id, int threads, Site at = here()) { emu::named_sync(id, threads, at); }
inline void named_barrier_arrive(int id, int threads, Site at = here()) { emu::named_arrive(id, threads, at); }
inline uint64_t* word(u64* p) { return reinterpret_cast<uint64_t*>(p); }
inline void mbarrier_init(u64* b, u32 count, Site at = here()) { emu::mbarrier_init(word(b), count, at); }
inline void mbarrier_arrive(u64* b, Site at = here()) { emu::mbarrier_arrive(word(b), 0, at); }
inline void mbarrier_arrive_expect_tx(u64* b, u32 bytes, Site at = here()) { emu::mbarrier_arrive(word(b), bytes, at); }
inline void mbarrier_wait(u64* b, u32 parity, Site at = here()) { emu::mbarrier_wait(word(b), parity, at); }
inline void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
inline void fence_proxy_async() { emu::fence_proxy_async(); }
inline void fence_proxy_async_global() {}                       // not modelled

// ---- TMA, wgmma -------------------------------------------------------------------------------------------------------
inline void tma_load_2d(void* smem, const TensorMap* map, u64* bar, int x, int y, Site at = here()) {
    const int c[] = {x, y};
    emu::tma_load(smem, map, word(bar), c, 2, at);
}
inline void tma_load_2d(void* smem, const TensorMap* map, u64* bar, int x, int y, L2, Site at = here()) { tma_load_2d(smem, map, bar, x, y, at); }
inline void tma_load_3d(void* smem, const TensorMap* map, u64* bar, int x, int y, int z, Site at = here()) {
    const int c[] = {x, y, z};
    emu::tma_load(smem, map, word(bar), c, 3, at);
}
inline void tma_store_2d(const TensorMap* map, const void* smem, int x, int y, Site at = here()) {
    const int c[] = {x, y};
    emu::tma_store(emu::Bulk::Store, map, smem, c, 2, at);
}
inline void tma_store_3d(const TensorMap* map, const void* smem, int x, int y, int z, Site at = here()) {
    const int c[] = {x, y, z};
    emu::tma_store(emu::Bulk::Store, map, smem, c, 3, at);
}
inline void tma_reduce_add_2d(const TensorMap* map, const void* smem, int x, int y, Site at = here()) {
    const int c[] = {x, y};
    emu::tma_store(emu::Bulk::ReduceAdd, map, smem, c, 2, at);
}
inline void tma_prefetch_map(const TensorMap*) {}
inline void bulk_load(void* smem, const void* gmem, u32 bytes, u64* bar, Site at = here()) { emu::bulk_load(smem, gmem, bytes, word(bar), 0, at); }
inline void bulk_store(void* gmem, const void* smem, u32 bytes, Site at = here()) { emu::bulk_store(emu::Bulk::Store, emu::kF32, gmem, smem, bytes, at); }
inline void bulk_reduce_add(float* gmem, const float* smem, u32 bytes, Site at = here()) { emu::bulk_store(emu::Bulk::ReduceAdd, emu::kF32, gmem, smem, bytes, at); }
inline void bulk_reduce_add(bf16* gmem, const bf16* smem, u32 bytes, Site at = here()) { emu::bulk_store(emu::Bulk::ReduceAdd, emu::kBf16, gmem, smem, bytes, at); }
inline void bulk_reduce_add(f16* gmem, const f16* smem, u32 bytes, Site at = here()) { emu::bulk_store(emu::Bulk::ReduceAdd, emu::kF16, gmem, smem, bytes, at); }
inline void bulk_commit() { emu::bulk_commit(); }
template <int Pending> inline void bulk_wait_read() { emu::bulk_wait(Pending, true); }
template <int Pending> inline void bulk_wait() { emu::bulk_wait(Pending, false); }
template <int Regs> inline void setmaxnreg_inc(Site at = here()) { emu::setmaxnreg(Regs, true, at); }
template <int Regs> inline void setmaxnreg_dec(Site at = here()) { emu::setmaxnreg(Regs, false, at); }

inline void wgmma_fence(Site at = here()) { emu::wgmma_fence(at); }
inline void wgmma_commit(Site at = here()) { emu::wgmma_commit(at); }
template <int Pending, int R> inline void wgmma_wait(float (&)[R], Site at = here()) { emu::wgmma_wait(Pending, at); }
template <class T, int N, Major A, Major B> inline void wgmma_m64k16(float (&d)[N / 2], u64 a, u64 b, bool accumulate, Site at = here()) {
    static_assert(N == 128 || N == 192 || N == 256, "the device side has no other width");
    emu::wgmma(kFormat<T>, N, d, nullptr, a, A == Major::MN, b, B == Major::MN, accumulate, at);
}
template <class T, int N, Major B> inline void wgmma_m64k16(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate, Site at = here()) {
    static_assert(N == 128 || N == 192 || N == 256, "the device side has no other width");
    emu::wgmma(kFormat<T>, N, d, a, 0, false, b, B == Major::MN, accumulate, at);
}

// ---- clusters ---------------------------------------------------------------------------------------------------------
inline u32 cluster_rank() { return emu::cluster_rank(); }
inline u32 cluster_size() { return emu::cluster_size(); }
inline void cluster_arrive(Site at = here()) { emu::cluster_arrive(true, true, at); }
inline void cluster_arrive_relaxed(Site at = here()) { emu::cluster_arrive(false, true, at); }
inline void cluster_wait(Site at = here()) { emu::cluster_wait(at); }
inline void cluster_sync(Site at = here()) {
    emu::cluster_arrive(true, true, at);
    emu::cluster_wait(at);
}
template <class T> inline T* map_shared(T* p, u32 rank, Site at = here()) { return static_cast<T*>(emu::map_shared(p, rank, at)); }
inline void mbarrier_arrive_cluster(u64* b, u32 rank, Site at = here()) { emu::mbarrier_arrive_cluster(word(map_shared(b, rank, at)), 0, false, at); }
inline void mbarrier_arrive_cluster_release(u64* b, u32 rank, Site at = here()) { emu::mbarrier_arrive_cluster(word(map_shared(b, rank, at)), 0, true, at); }
inline void mbarrier_wait_cluster(u64* b, u32 parity, Site at = here()) { emu::mbarrier_wait_cluster(word(b), parity, false, at); }
inline void mbarrier_wait_cluster_acquire(u64* b, u32 parity, Site at = here()) { emu::mbarrier_wait_cluster(word(b), parity, true, at); }
inline void tma_load_2d_multicast(void* smem, const TensorMap* map, u64* bar, int x, int y, u16 blocks, L2, Site at = here()) {
    const int c[] = {x, y};
    emu::tma_load_multicast(smem, map, word(bar), c, 2, blocks, at);
}
inline void bulk_load_multicast(void* smem, const void* gmem, u32 bytes, u64* bar, u16 blocks, Site at = here()) { emu::bulk_load(smem, gmem, bytes, word(bar), blocks, at); }
inline void bulk_copy_cluster(void* to, const void* from, u32 bytes, u64* bar, u32 rank, Site at = here()) {
    emu::bulk_copy_cluster(map_shared(to, rank, at), from, bytes, word(map_shared(bar, rank, at)), at);
}

}  // namespace prim
