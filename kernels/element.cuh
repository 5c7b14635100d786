// Elements whose type is known at run time only.
#pragma once

#include "abi.h"

namespace element {

// data[i] as f32; data holds elements of an ElementType.
__device__ __forceinline__ float load(const void* data, u32 type, u64 i) {
    if (type == TYPE_F32) return static_cast<const float*>(data)[i];
    if (type == TYPE_F16) return prim::to_f32(static_cast<const prim::f16*>(data)[i]);
    return prim::to_f32(static_cast<const prim::bf16*>(data)[i]);
}

// data[i] of a TargetType.
__device__ __forceinline__ i64 load_target(const void* data, u32 type, u64 i) {
    if (type == TARGET_I64) return static_cast<const i64*>(data)[i];
    if (type == TARGET_I32) return static_cast<const prim::i32*>(data)[i];
    return static_cast<const u32*>(data)[i];
}

}  // namespace element
