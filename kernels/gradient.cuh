// From a logit to the gradient of the loss with respect to it, as src/cpu/coefficients.rs and src/cpu/columns.rs have it.
#pragma once

#include "filter.cuh"
#include "logit_map.cuh"
#include "softmax_state.cuh"

namespace gradient {

// Nothing upstream of the row: exactly nothing to give back, whatever its logits are.
__device__ __forceinline__ bool is_zero(const LceCoefficients& c) {
    return c.softmax == 0.0f && c.target == 0.0f && c.spread == 0.0f && c.entropy == 0.0f;
}

// The part of the gradient that goes with p, where p counts as `counted`.
__device__ __forceinline__ float of_probability(
    const LceRowStatistics& row, const LceCoefficients& c, float counted, float log_probability
) {
    if (c.entropy == 0.0f) return counted * c.softmax;
    if (counted == 0.0f) return 0.0f;            // p ln p at p = 0, where ln p may be -inf
    return counted * (c.softmax - c.entropy * (log_probability + row.entropy));
}

// Of a kept entry. What the filter kept with probability p / eps counts as eps, the target as what it is; label smoothing's
// dense part comes apart from the entries.
__device__ __forceinline__ float of_entry(
    const LceProblem& problem, const LceRowStatistics& row, const LceCoefficients& c, float logit, bool is_target
) {
    const float p = softmax::probability(row, logit), counted = is_target ? p : filter::counted(problem, row.eps, p);
    const float g = of_probability(row, c, counted, softmax::log_probability(row, logit));
    return (is_target ? g - c.target : g) * logit_map::softcap_slope(problem, logit);
}

// Of any class of a row on the exact path, label smoothing included.
__device__ __forceinline__ float of_logit(
    const LceProblem& problem, const LceRowStatistics& row, const LceCoefficients& c, float logit, float class_weight, bool is_target
) {
    float g = of_probability(row, c, softmax::probability(row, logit), softmax::log_probability(row, logit));
    if (c.spread != 0.0f) g -= c.spread * class_weight;
    return (is_target ? g - c.target : g) * logit_map::softcap_slope(problem, logit);
}

}  // namespace gradient
