// Sums over the threads of a block. All threads call; BLOCK is their number, a multiple of 32.
#pragma once

#include "abi.h"

namespace block {

template <u32 BLOCK> struct ScanSpace { u32 warp_sum[BLOCK / 32]; };
template <u32 BLOCK> struct SumSpace { f64 value[BLOCK]; };

// Sum of `value` over the threads before this one; `total` over all.
template <u32 BLOCK> __device__ __forceinline__ u32 exclusive_scan(ScanSpace<BLOCK>& space, u32 value, u32& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 inclusive = value;
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        const u32 below = prim::shfl_up(inclusive, d);
        if (lane >= d) inclusive += below;
    }
    if (lane == 31) space.warp_sum[warp] = inclusive;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 w = 0; w < BLOCK / 32; ++w) {
        if (w < warp) before += space.warp_sum[w];
        total += space.warp_sum[w];
    }
    __syncthreads();                         // the space may be used again
    return before + inclusive - value;
}

// Sum over the block in a fixed order, returned to all.
template <u32 BLOCK> __device__ __forceinline__ f64 sum(SumSpace<BLOCK>& space, f64 value) {
    space.value[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = BLOCK / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) space.value[threadIdx.x] += space.value[threadIdx.x + half];
        __syncthreads();
    }
    const f64 all = space.value[0];
    __syncthreads();
    return all;
}

}  // namespace block
