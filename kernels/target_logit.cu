// The logit of every row's target by a dot product of its own, N·D work before the N·V·D: a lower bound of the row's
// log-sum-exp from the first tile on, and the anchor of label smoothing's sums. A warp takes a row.
#include "logit_map.cuh"
#include "softmax_state.cuh"

namespace {

constexpr u32 THREADS = 256, WARPS = THREADS / 32;

// Σ x y and Σ |x y|.
struct Dot {
    float sum = 0, size = 0;
    __device__ __forceinline__ void add(float x, float y) {
        sum = prim::fma(x, y, sum);
        size = prim::fma(prim::fabs(x), prim::fabs(y), size);
    }
};

__device__ __forceinline__ void add_chunk(Dot& dot, const prim::Vec16& x, const prim::Vec16& y, const float*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dot.add(prim::bits_f32(x.w[i]), prim::bits_f32(y.w[i]));
}
template <class T> __device__ __forceinline__ void add_chunk(Dot& dot, const prim::Vec16& x, const prim::Vec16& y, const T*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        dot.add(prim::unpack_lo<T>(x.w[i]), prim::unpack_lo<T>(y.w[i]));
        dot.add(prim::unpack_hi<T>(x.w[i]), prim::unpack_hi<T>(y.w[i]));
    }
}

template <class T> __device__ __forceinline__ Dot dot_product(const T* x, const T* y, u32 hidden) {
    constexpr u32 CHUNK = 16 / sizeof(T);
    const u32 lane = threadIdx.x % 32;
    Dot dot;
    u32 done = 0;
    if (((reinterpret_cast<u64>(x) | reinterpret_cast<u64>(y)) & 15) == 0) {
        done = hidden / CHUNK * CHUNK;
#pragma unroll 4
        for (u32 d = lane * CHUNK; d < done; d += 32 * CHUNK) {
            add_chunk(dot, prim::ld_global_nc_16(x + d), prim::ld_global_nc_16(y + d), x);
        }
    }
    for (u32 d = done + lane; d < hidden; d += 32) dot.add(prim::to_f32(x[d]), prim::to_f32(y[d]));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        dot.sum += prim::shfl_xor(dot.sum, lanes);
        dot.size += prim::shfl_xor(dot.size, lanes);
    }
    return dot;
}

template <class T> __device__ __forceinline__ void target_logit(const LceArgs& a) {
    const LceProblem& p = a.problem;
    const u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.saved.header->num_rows) return;
    const u32 y = a.saved.row_class[row];
    // Of a row without a class nothing is captured: its bound is out of reach.
    float logit = softmax::negative_infinity(), bound = -logit;
    if (y != NONE) {
        const T* e = static_cast<const T*>(p.embeddings) + i64(a.saved.row_token[row]) * p.embeddings_stride;
        const T* c = static_cast<const T*>(p.classifier) + i64(y) * p.classifier_stride;
        const Dot dot = dot_product(e, c, p.hidden);
        logit = logit_map::apply(p, dot.sum, logit_map::bias(p, y));
        // Two sums of D terms in different orders differ by at most 2 D 2^-24 Σ |terms| (Higham 2002, eq. 3.5); the bias
        // and the softcap, which is a contraction, round a few times more.
        constexpr float EPSILON = 1.0f / 8388608.0f;
        const float margin = 1e-3f + float(p.hidden) * EPSILON * prim::fabs(p.logit_scale) * dot.size + 4.0f * EPSILON * prim::fabs(logit);
        bound = softmax::is_finite(logit) && softmax::is_finite(margin) ? logit - margin : softmax::negative_infinity();
    }
    if (lane == 0) {
        a.forward.seed_logit[row] = logit;
        if (a.capture) a.forward.bound[row] = bound;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_target_logit_f32(const __grid_constant__ LceArgs a) { target_logit<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_target_logit_f16(const __grid_constant__ LceArgs a) { target_logit<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_target_logit_bf16(const __grid_constant__ LceArgs a) { target_logit<prim::bf16>(a); }
