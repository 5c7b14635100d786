// One product of every format and shape, straight from global memory, so that fragments can be held to a plain sum.
#include "prim/prim.cuh"

struct MmaParams { const void *a, *b; float* d; int format; };   // a [16, k], b [8, k], d [16, 8]; 0 bf16, 1 f16: k 16, 2 tf32: k 8

extern "C" __global__ void __launch_bounds__(32) example_mma(const __grid_constant__ MmaParams p) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float d[4] = {};
    prim::u32 a[4], b[2];
    if (p.format == 2) {
        const float *x = static_cast<const float*>(p.a), *y = static_cast<const float*>(p.b);
        for (int i = 0; i < 4; ++i) a[i] = prim::to_tf32(x[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
        for (int i = 0; i < 2; ++i) b[i] = prim::to_tf32(y[g * 8 + t + 4 * i]);
        prim::mma_m16n8k8_tf32(d, a, b);
    } else {
        struct Smem { prim::u32 x[16 * 8], y[8 * 8]; };          // pairs
        Smem& smem = prim::shared_memory<Smem>();
        for (int i = threadIdx.x; i < 16 * 8; i += 32) smem.x[i] = static_cast<const prim::u32*>(p.a)[i];
        for (int i = threadIdx.x; i < 8 * 8; i += 32) smem.y[i] = static_cast<const prim::u32*>(p.b)[i];
        prim::syncwarp();
        const int lane = threadIdx.x;
        prim::ldmatrix_x4(a, &smem.x[lane % 16 * 8 + lane / 16 * 4]);
        prim::ldmatrix_x2(b, &smem.y[lane % 8 * 8 + lane / 8 % 2 * 4]);
        if (p.format == 0) prim::mma_m16n8k16<prim::bf16>(d, a, b);
        else prim::mma_m16n8k16<prim::f16>(d, a, b);
    }
    for (int i = 0; i < 4; ++i) p.d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}
