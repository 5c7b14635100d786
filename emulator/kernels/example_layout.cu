// The tensor core's instructions on raw registers and raw shared memory, so that a test can hold them to layouts that others publish.
#include "prim/prim.cuh"
using prim::bf16;
using prim::Major;
using prim::u32;
using prim::u64;

struct LayoutParams { const u32 *a, *b; u32* out; float* d; u64 a_descriptor, b_descriptor; int mode; };

// a [32][4], b [32][2] and d [32][4] as lanes hold them. mode 0: bf16, 1: f16, 2: tf32.
extern "C" __global__ void __launch_bounds__(32) example_layout_mma(const __grid_constant__ LayoutParams p) {
    u32 a[4], b[2];
    float d[4] = {};
    for (int i = 0; i < 4; ++i) a[i] = p.a[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) b[i] = p.b[threadIdx.x * 2 + i];
    if (p.mode == 0) prim::mma_m16n8k16<bf16>(d, a, b);
    else if (p.mode == 1) prim::mma_m16n8k16<prim::f16>(d, a, b);
    else prim::mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) p.d[threadIdx.x * 4 + i] = d[i];
}

// mode 0: the registers of ldmatrix_x4 from the 32 rows of a, 1: transposed, 2: of ldmatrix_x2, 3: transposed; 4: the rows that
// stmatrix_x4 makes of the registers in a, 5: transposed.
extern "C" __global__ void __launch_bounds__(32) example_layout_matrix(const __grid_constant__ LayoutParams p) {
    struct Smem { alignas(16) u32 row[32][4]; };
    Smem& smem = prim::shared_memory<Smem>();
    const u32 lane = threadIdx.x;
    u32 r[4], two[2] = {};
    for (int i = 0; i < 4; ++i) r[i] = smem.row[lane][i] = p.a[lane * 4 + i];
    prim::syncwarp();
    if (p.mode == 0) prim::ldmatrix_x4(r, smem.row[lane]);
    else if (p.mode == 1) prim::ldmatrix_x4_trans(r, smem.row[lane]);
    else if (p.mode == 2) prim::ldmatrix_x2(two, smem.row[lane]);
    else if (p.mode == 3) prim::ldmatrix_x2_trans(two, smem.row[lane]);
    else if (p.mode == 4) prim::stmatrix_x4(smem.row[lane], r);
    else prim::stmatrix_x4_trans(smem.row[lane], r);
    prim::syncwarp();
    for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = p.mode < 2 ? r[i] : p.mode < 4 ? two[i % 2] : smem.row[lane][i];
}

// a and b are images of shared memory, or a is [128][4] as threads hold it; the descriptors lack the start address.
// mode 0 to 3: both from shared memory, + 2: a MN-major, + 1: b MN-major; 4, 5: a from registers, b K-major, MN-major; 6: as 4, 256 wide.
constexpr u32 A_BYTES = 16384, B_BYTES = 65536;
struct ProductSmem { alignas(1024) u32 a[A_BYTES / 4]; alignas(1024) u32 b[B_BYTES / 4]; };
__device__ __forceinline__ u64 placed(u64 descriptor, const void* image) { return descriptor | u64(prim::smem_addr(image) & 0x3ffff) >> 4; }
__device__ __forceinline__ void fetch(u32* image, const u32* from, u32 bytes) {
    for (u32 i = threadIdx.x * 4; i < bytes / 4; i += 512) *reinterpret_cast<prim::Vec16*>(&image[i]) = prim::ld_global_16(&from[i]);
}
template <int N, Major A, Major B, bool Registers> __device__ __forceinline__ void product(const LayoutParams& p, const ProductSmem& smem) {
    const u64 b_descriptor = placed(p.b_descriptor, smem.b);
    float d[N / 2] = {};
    u32 a[4] = {};
    if constexpr (Registers) for (int i = 0; i < 4; ++i) a[i] = p.a[threadIdx.x * 4 + i];
    prim::wgmma_fence();
    if constexpr (Registers) prim::wgmma_m64k16<bf16, N, B>(d, a, b_descriptor, false);
    else prim::wgmma_m64k16<bf16, N, A, B>(d, placed(p.a_descriptor, smem.a), b_descriptor, false);
    prim::wgmma_commit();
    prim::wgmma_wait<0>(d);
    for (int i = 0; i < N / 2; ++i) p.d[threadIdx.x * (N / 2) + i] = d[i];
}
extern "C" __global__ void __launch_bounds__(128) example_layout_wgmma(const __grid_constant__ LayoutParams p) {
    ProductSmem& smem = prim::shared_memory<ProductSmem>();
    if (p.mode < 4) fetch(smem.a, p.a, A_BYTES);
    fetch(smem.b, p.b, B_BYTES);
    prim::fence_proxy_async();
    __syncthreads();
    if (p.mode == 0) product<128, Major::K, Major::K, false>(p, smem);
    else if (p.mode == 1) product<128, Major::K, Major::MN, false>(p, smem);
    else if (p.mode == 2) product<128, Major::MN, Major::K, false>(p, smem);
    else if (p.mode == 3) product<128, Major::MN, Major::MN, false>(p, smem);
    else if (p.mode == 4) product<128, Major::K, Major::K, true>(p, smem);
    else if (p.mode == 5) product<128, Major::K, Major::MN, true>(p, smem);
    else product<256, Major::K, Major::K, true>(p, smem);
}

// Shared memory as a box of 16 rows leaves it.
struct BoxLayoutParams { prim::TensorMap x; u32* out; u32 bytes; };
extern "C" __global__ void __launch_bounds__(32) example_layout_box(const __grid_constant__ BoxLayoutParams p) {
    struct Smem { alignas(1024) u32 x[16 * 32]; u64 full; };
    Smem& smem = prim::shared_memory<Smem>();
    if (threadIdx.x == 0) {
        prim::mbarrier_init(&smem.full, 1);
        prim::fence_mbarrier_init();
        prim::mbarrier_arrive_expect_tx(&smem.full, p.bytes);
        prim::tma_load_2d(smem.x, &p.x, &smem.full, 0, 0);
    }
    prim::syncwarp();
    prim::mbarrier_wait(&smem.full, 0);
    for (u32 i = threadIdx.x; i < p.bytes / 4; i += 32) p.out[i] = smem.x[i];
}
