// From E·C to a logit: scale, bias, softcap, in this order.
#pragma once

#include "element.cuh"

namespace logit_map {

__device__ __forceinline__ float bias(const LceProblem& p, u32 v) {
    return p.bias ? element::load(p.bias, p.bias_type, v) : 0.0f;
}
__device__ __forceinline__ float class_weight(const LceProblem& p, u32 v) { return p.class_weights ? p.class_weights[v] : 1.0f; }

__device__ __forceinline__ float softcapped(float x, float cap, float inverse_cap) { return cap * prim::tanhf(x * inverse_cap); }

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
