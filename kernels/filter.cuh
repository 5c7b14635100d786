// The random numbers of the unbiased filter and the final test of a candidate. src/filter.rs is the specification.
#pragma once

#include "abi.h"

namespace filter {

constexpr u32 WEYL_STEP = 0x9E3779B9u;       // 2^32 / golden ratio, rounded to odd

__device__ __forceinline__ u64 mix(u64 x) {  // SplitMix64's output function (Steele et al. 2014)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
// Start of token `token`'s walk.
__device__ __forceinline__ u32 row_start(u64 seed, u32 token) {
    const u64 key = mix(seed + 0x9E3779B97F4A7C15ull);
    return u32(mix(key ^ u64(token) * 0xD1B54A32D192ED03ull) >> 32);
}
// A state of the walk as a number in (0, 1].
__device__ __forceinline__ float uniform(u32 state) { return (float(state) + 0.5f) * (1.0f / 4294967296.0f); }

// How far class v lies along every row's walk, which takes the classes of each 64 in bit-reversed order. That of v | w is the sum of
// those of v and w where no bit is set in both.
__device__ __forceinline__ u32 class_offset(u32 v) { return (v & ~63u | prim::brev(v & 63u) >> 26) * WEYL_STEP; }

__device__ __forceinline__ float entry_uniform(u32 start, u32 v) { return uniform(start + class_offset(v)); }

// The least p that class v is kept with, in a row of this eps.
__device__ __forceinline__ float least(const LceProblem& p, float eps, u32 start, u32 v) {
    return p.filter == FILTER_UNBIASED ? eps * entry_uniform(start, v) : eps;
}
// What a kept p counts as.
__device__ __forceinline__ float counted(const LceProblem& p, float eps, float probability) {
    return p.filter == FILTER_UNBIASED ? prim::fmax(probability, eps) : probability;
}

}  // namespace filter
