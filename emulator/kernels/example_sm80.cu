// The examples' Ampere entry points. Every kernel takes one plain struct.
#include "gemm_sm80.cuh"
#include "row_lse.cuh"

struct GemmParams { const prim::bf16 *a, *b; float* c; int m, n, k; };
extern "C" __global__ void __launch_bounds__(sm80::kThreads) example_gemm_sm80(const __grid_constant__ GemmParams p) {
    sm80::gemm(p.a, p.b, p.c, p.m, p.n, p.k);
}

struct LseParams { const float* x; float *out, *total; int cols; };
extern "C" __global__ void __launch_bounds__(lse::kThreads) example_row_lse(const __grid_constant__ LseParams p) {
    lse::row_lse(p.x, p.out, p.total, p.cols);
}
