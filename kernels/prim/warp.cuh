// Collectives of a warp, over the lanes of mask. T: u32, i32, float, u64, double.
#pragma once
#include "types.cuh"

namespace prim {

template <class T> PRIM T shfl_xor(T v, int lanes, u32 mask = 0xffffffffu) { return __shfl_xor_sync(mask, v, lanes); }
template <class T> PRIM T shfl_down(T v, u32 delta, u32 mask = 0xffffffffu) { return __shfl_down_sync(mask, v, delta); }
template <class T> PRIM T shfl_up(T v, u32 delta, u32 mask = 0xffffffffu) { return __shfl_up_sync(mask, v, delta); }
template <class T> PRIM T shfl_idx(T v, int lane, u32 mask = 0xffffffffu) { return __shfl_sync(mask, v, lane); }
PRIM u32 ballot(bool p, u32 mask = 0xffffffffu) { return __ballot_sync(mask, p); }
PRIM bool any(bool p, u32 mask = 0xffffffffu) { return __any_sync(mask, p) != 0; }
PRIM bool all(bool p, u32 mask = 0xffffffffu) { return __all_sync(mask, p) != 0; }
PRIM void syncwarp(u32 mask = 0xffffffffu) { __syncwarp(mask); }

#if __CUDA_ARCH__ >= 900
PRIM bool elect_one() {                                         // true in one lane of a converged full warp
    u32 elected;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.b32 %0, 1, 0, p;\n\t}" : "=r"(elected));
    return elected != 0;
}
#endif

}  // namespace prim
