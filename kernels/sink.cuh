// Stores of finished f32 values into a gradient buffer: its element type, rounded once, overwritten or added to.
#pragma once

#include "abi.h"

namespace sink {

using prim::bf16;
using prim::f16;
using prim::Vec16;

// STREAM: written once and not read again before the caches have moved on (dC, larger than L2).
template <bool STREAM> __device__ __forceinline__ void store_16(void* to, const Vec16& v) {
    if constexpr (STREAM) prim::st_global_cs_16(to, v);
    else prim::st_global_16(to, v);
}

template <bool STREAM, u32 COUNT>
__device__ __forceinline__ void put_f32(float* to, const float (&values)[COUNT], u32 count, bool accumulate) {
    if (count >= COUNT && reinterpret_cast<u64>(to) % 16 == 0) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i += 4) {
            Vec16 v = {};
            if (accumulate) v = prim::ld_global_16(to + i);
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
                v.w[j] = prim::f32_bits(accumulate ? prim::bits_f32(v.w[j]) + values[i + j] : values[i + j]);
            store_16<STREAM>(to + i, v);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
            if (i < count) to[i] = accumulate ? to[i] + values[i] : values[i];
    }
}

template <class S, bool STREAM, u32 COUNT>
__device__ __forceinline__ void put_narrow(S* to, const float (&values)[COUNT], u32 count) {
    if (count >= COUNT && reinterpret_cast<u64>(to) % (2 * COUNT) == 0) {
        u32 w[COUNT / 2];
#pragma unroll
        for (u32 i = 0; i < COUNT / 2; ++i) w[i] = prim::pack2<S>(values[2 * i], values[2 * i + 1]);
        if constexpr (COUNT == 8) store_16<STREAM>(to, {w[0], w[1], w[2], w[3]});
        else *reinterpret_cast<u64*>(to) = w[0] | u64(w[1]) << 32;
    } else {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
            if (i < count) to[i] = prim::from_f32<S>(values[i]);
    }
}

// The first `count` of `values`, to element `offset` on: vector stores where all of them go to an aligned address.
template <bool STREAM, u32 COUNT>
__device__ __forceinline__ void put(const LceSink& to, u64 offset, const float (&values)[COUNT], u32 count) {
    static_assert(COUNT == 4 || COUNT == 8, "a thread's vector of a matrix row: 16 bytes of f32 or of 16 bits");
    if (to.mode == SINK_SKIP) return;
    if (to.type == TYPE_F32)
        put_f32<STREAM>(static_cast<float*>(to.data) + offset, values, count, to.mode == SINK_ACCUMULATE);
    else if (to.type == TYPE_F16) put_narrow<f16, STREAM>(static_cast<f16*>(to.data) + offset, values, count);
    else put_narrow<bf16, STREAM>(static_cast<bf16*>(to.data) + offset, values, count);
}

__device__ __forceinline__ void put_one(const LceSink& to, u64 offset, float value) {
    if (to.mode == SINK_SKIP) return;
    if (to.type == TYPE_F32) {
        float* at = static_cast<float*>(to.data) + offset;
        *at = to.mode == SINK_ACCUMULATE ? *at + value : value;
    } else if (to.type == TYPE_F16) {
        static_cast<f16*>(to.data)[offset] = prim::from_f32<f16>(value);
    } else {
        static_cast<bf16*>(to.data)[offset] = prim::from_f32<bf16>(value);
    }
}

}  // namespace sink
