// Rows of E or C, gathered in 16-byte vectors and summed in f32.
#pragma once

#include "abi.h"

namespace gather {

using prim::bf16;
using prim::f16;
using prim::Vec16;

template <class T> constexpr u32 VECTOR = 16 / sizeof(T);            // elements of a vector

template <class T> struct Rows {
    const T* data;                               // [.., D], rows `stride` apart
    i64 stride;                                  // elements
    u32 hidden;
};

template <class T> __device__ __forceinline__ Rows<T> embeddings(const LceProblem& p) {
    return {static_cast<const T*>(p.embeddings), p.embeddings_stride, p.hidden};
}
template <class T> __device__ __forceinline__ Rows<T> classifier(const LceProblem& p) {
    return {static_cast<const T*>(p.classifier), p.classifier_stride, p.hidden};
}

// Whether every row is whole 16-byte vectors at multiples of 16 bytes.
template <class T> __device__ __forceinline__ bool aligned(const Rows<T>& rows) {
    return (reinterpret_cast<u64>(rows.data) | u64(rows.stride) * sizeof(T) | u64(rows.hidden) * sizeof(T)) % 16 == 0;
}

// A vector from column `column` on; 0, and nothing read, from column `end` on. ALIGNED: `column` and `end` are multiples of VECTOR.
template <class T, bool ALIGNED> __device__ __forceinline__ Vec16 load(const T* row, u32 column, u32 end) {
    Vec16 v = {};
    if constexpr (ALIGNED) {
        if (column < end) v = prim::ld_global_nc_16(row + column);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            if (column + i < end) v.w[i] = prim::f32_bits(row[column + i]);
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            if (column + i < end) v.w[i / 2] |= u32(row[column + i].bits) << (i % 2 * 16);
    }
    return v;
}

template <class T> __device__ __forceinline__ void add_scaled(float (&sum)[VECTOR<T>], float factor, const Vec16& v) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            sum[i] = prim::fma(factor, prim::bits_f32(v.w[i]), sum[i]);
        } else {
            sum[2 * i] = prim::fma(factor, prim::unpack_lo<T>(v.w[i]), sum[2 * i]);
            sum[2 * i + 1] = prim::fma(factor, prim::unpack_hi<T>(v.w[i]), sum[2 * i + 1]);
        }
    }
}

}  // namespace gather
