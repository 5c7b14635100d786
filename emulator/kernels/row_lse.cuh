// out[row] = log Σ exp x[row, :], total += Σ out: shuffles, a shared-memory reduction, atomics.
#pragma once
#include "prim/prim.cuh"

namespace lse {
constexpr int kThreads = 256, kWarps = kThreads / 32;
struct Smem { float best[kWarps], sum[kWarps]; };

struct Pair { float best, sum; };
__device__ __forceinline__ Pair merge(Pair a, Pair b) {
    float m = a.best > b.best ? a.best : b.best;
    return {m, a.sum * prim::expf_accurate(a.best - m) + b.sum * prim::expf_accurate(b.best - m)};
}
__device__ __forceinline__ Pair warp_merge(Pair p) {
#pragma unroll
    for (int d = 16; d; d /= 2) p = merge(p, {prim::shfl_xor(p.best, d), prim::shfl_xor(p.sum, d)});
    return p;
}

__device__ __forceinline__ void row_lse(const float* x, float* out, float* total, int cols) {
    Smem& smem = prim::shared_memory<Smem>();
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Pair p{-1e30f, 0};
    for (int c = threadIdx.x; c < cols; c += kThreads) p = merge(p, {x[size_t(row) * cols + c], 1});
    p = warp_merge(p);
    if (lane == 0) smem.best[warp] = p.best, smem.sum[warp] = p.sum;
    __syncthreads();
    if (warp == 0) {
        p = lane < kWarps ? Pair{smem.best[lane], smem.sum[lane]} : Pair{-1e30f, 0};
        p = warp_merge(p);
        if (lane == 0) {
            float l = p.best + prim::logf(p.sum);
            out[row] = l;
            prim::atomic_add(total, l);
        }
    }
}
}  // namespace lse
