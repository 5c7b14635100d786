// The examples' Hopper entry points; the two letters say whether A and B are stored K-contiguous (k) or row-contiguous (m).
#include "gemm_sm90.cuh"
using prim::Major;

struct GemmParams { prim::TensorMap a, b, c; int tiles_m, tiles_n, steps, splits; };

extern "C" __global__ void __launch_bounds__(sm90::kThreads, 1) example_gemm_kk(const __grid_constant__ GemmParams p) {
    sm90::gemm<Major::K, Major::K>(p.a, p.b, p.c, p.tiles_m, p.tiles_n, p.steps, p.splits);
}
extern "C" __global__ void __launch_bounds__(sm90::kThreads, 1) example_gemm_km(const __grid_constant__ GemmParams p) {
    sm90::gemm<Major::K, Major::MN>(p.a, p.b, p.c, p.tiles_m, p.tiles_n, p.steps, p.splits);
}
extern "C" __global__ void __launch_bounds__(sm90::kThreads, 1) example_gemm_mk(const __grid_constant__ GemmParams p) {
    sm90::gemm<Major::MN, Major::K>(p.a, p.b, p.c, p.tiles_m, p.tiles_n, p.steps, p.splits);
}
extern "C" __global__ void __launch_bounds__(sm90::kThreads, 1) example_gemm_mm(const __grid_constant__ GemmParams p) {
    sm90::gemm<Major::MN, Major::MN>(p.a, p.b, p.c, p.tiles_m, p.tiles_n, p.steps, p.splits);
}
