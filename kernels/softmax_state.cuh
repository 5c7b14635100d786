// Merging softmax states of shares of a row, and turning the statistics of a row into probabilities.
#pragma once

#include "abi.h"

namespace softmax {

// -inf as f32: nothing but classes of probability 0 so far.
__device__ __forceinline__ float negative_infinity() { return prim::bits_f32(0xff800000u); }
__device__ __forceinline__ float not_a_number() { return prim::bits_f32(0x7fc00000u); }
__device__ __forceinline__ bool is_finite(float x) { return (prim::f32_bits(x) & 0x7f800000u) != 0x7f800000u; }

// What exponents are taken against: the maximum, or 0 as long as that is -inf, so that `-inf - max` is not NaN.
__device__ __forceinline__ float reference(float max) { return max == negative_infinity() ? 0.0f : max; }

__device__ __forceinline__ float probability(float max, float inverse_sum, float logit) {
    return prim::expf_accurate(logit - max) * inverse_sum;
}
__device__ __forceinline__ float probability(const LceRowStatistics& s, float logit) { return probability(s.max, s.inverse_sum, logit); }
__device__ __forceinline__ float log_probability(const LceRowStatistics& s, float logit) { return (logit - s.max) - s.log_sum; }

// A row's state in f64. First the maximum over all shares, then each share is added against it: one exp a share.
struct Totals {
    float max;
    f64 sum = 0, weighted = 0, smooth = 0;

    __device__ __forceinline__ explicit Totals(float max) : max(max) {}
    __device__ __forceinline__ void add(const LcePartial& share) {
        smooth += share.smooth;
        if (share.sum == 0.0f) return;       // its maximum is -inf
        const f64 step = f64(share.max) - f64(max), scale = prim::exp(share.max == max ? 0.0 : step);
        // A step of -inf, to a maximum of +inf, makes the row NaN, as it should be.
        weighted += (f64(share.weighted) + (share.max == max ? 0.0 : f64(share.sum) * step)) * scale;
        sum += f64(share.sum) * scale;
    }
};

// ---- lanes of a row -----------------------------------------------------------------------------------------------------
// The shares of a row are merged by neighbouring lanes, each every LANES-th share, in order; then by halves. One block of rows
// has as many shares as the device has room for blocks: one lane would walk through hundreds.
constexpr u32 LANES = 8;
template <class T, class Op> __device__ __forceinline__ T over_lanes(T value, Op op) {
    const u32 mask = ((1u << LANES) - 1) << threadIdx.x % 32 / LANES * LANES;
#pragma unroll
    for (u32 lanes = LANES / 2; lanes > 0; lanes /= 2) value = op(value, prim::shfl_xor(value, int(lanes), mask));
    return value;
}
template <class T> __device__ __forceinline__ T sum_over_lanes(T value) {
    return over_lanes(value, [](T x, T y) { return x + y; });
}
__device__ __forceinline__ float max_over_lanes(float value) {
    return over_lanes(value, [](float x, float y) { return prim::fmax(x, y); });
}

}  // namespace softmax
