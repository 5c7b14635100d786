// From E·C to a logit: scale, bias, softcap, in this order.
#pragma once

#include "element.cuh"

namespace logit_map {

__device__ __forceinline__ float bias(const LceProblem& p, u32 v) {
    return p.bias ? element::load(p.bias, p.bias_type, v) : 0.0f;
}
__device__ __forceinline__ float class_weight(const LceProblem& p, u32 v) { return p.class_weights ? p.class_weights[v] : 1.0f; }

// tanh to 2^-22 relative, in two ranges, so that whoever has many small values does without the special function unit. Below
// 0.55 a polynomial; above, 1 - 2 / (exp(2 |t|) + 1). NaN is not large.
__device__ __forceinline__ bool is_large(float t) { return prim::fabs(t) >= 0.55f; }
__device__ __forceinline__ float tanh_of_small(float t) {
    const float s = t * t;
    const float r = prim::fma(prim::fma(prim::fma(1.57396831e-2f, s, -5.23039624e-2f), s, 1.33152977e-1f), s, -3.33327681e-1f);
    return prim::fma(r * s, t, t);
}
__device__ __forceinline__ float tanh_of_large(float t) {
    const float size = prim::fma(-2.0f, prim::rcp(prim::ex2(prim::fabs(t) * (2.0f * 1.4426950408889634f)) + 1.0f), 1.0f);
    return t < 0.0f ? -size : size;
}
__device__ __forceinline__ float tanh(float t) { return is_large(t) ? tanh_of_large(t) : tanh_of_small(t); }

__device__ __forceinline__ float softcapped(float x, float cap, float inverse_cap) { return cap * tanh(x * inverse_cap); }

// One logit; whoever maps many hoists the loads and the division.
__device__ __forceinline__ float apply(const LceProblem& p, float product, float bias) {
    const float x = prim::fma(product, p.logit_scale, bias);
    return p.softcap > 0.0f ? softcapped(x, p.softcap, prim::div_rn(1.0f, p.softcap)) : x;
}

// dz/dx of the softcap at a logit z.
__device__ __forceinline__ float softcap_slope(const LceProblem& p, float z) {
    if (!(p.softcap > 0.0f)) return 1.0f;
    const float t = prim::div_rn(z, p.softcap);
    return prim::fma(-t, t, 1.0f);
}

}  // namespace logit_map
