// The power of two by which the exact path divides logit gradients before it stores them in the type of the inputs, so that |G| <= 1.
#pragma once

#include "abi.h"

namespace gradient {

struct Scale { float down, up; };            // G is stored times `down`; sums over it come back by `up`. Powers of two

// f16 has few binades below 1 before its subnormals begin: the upper half of its range is used too, but for a margin of 4.
template <class T> constexpr u32 LIFT = 0;
template <> constexpr u32 LIFT<prim::f16> = 14;

template <class T> __device__ __forceinline__ Scale scale_of(u32 largest_bits) {
    if (largest_bits == 0) return {1.0f, 1.0f};
    u32 exponent = (largest_bits >> 23) + ((largest_bits & 0x7FFFFFu) != 0);   // of the power of two at or above the largest |G|
    exponent = exponent < 32 ? 32 : exponent > 222 ? 222 : exponent;           // both factors stay normal numbers
    return {prim::bits_f32((254 - exponent + LIFT<T>) << 23), prim::bits_f32((exponent - LIFT<T>) << 23)};
}

}  // namespace gradient
