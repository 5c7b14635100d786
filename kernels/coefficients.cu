// From upstream gradients to the few numbers a row's logit gradients are made of: src/cpu/coefficients.rs on the device.
//
//     L = sum over i of a nll + b sum over v of w_v (lse - z_v) + c lse^2 + l lse + h H
//
// The scale factors (1/N, the upstream) stay in f32 until a gradient's last rounding.
#include "abi.h"

namespace {

__device__ __forceinline__ f64 at(const float* vector, u32 index) { return vector == nullptr ? 0.0 : f64(vector[index]); }

// An upper bound of |dL/dz_v| over the row's classes: p <= 1, |p ln p| <= 1/e, p H <= ln V, and the class weights, not negative,
// are at most their sum. The softcap's slope is at most 1. A kept p counts for `eps` at least, and is eps 2^-33 at least: that
// makes |eps ln p| at most 1/e + 23 eps.
__device__ __forceinline__ float largest(const LceCoefficients& c, f64 class_weight_sum, u32 vocab, float eps) {
    const float counted = prim::fmax(eps, 1.0f);
    const float entropy = c.entropy == 0.0f ? 0.0f : prim::fabs(c.entropy) * (counted * (0.37f + prim::logf(float(vocab))) + 23.0f * eps);
    return prim::fabs(c.softmax) * counted + prim::fabs(c.target) + prim::fabs(c.spread) * float(class_weight_sum) + entropy;
}

}  // namespace

// ---- coefficients of every row, a thread a row --------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(256) lce_coefficients(const __grid_constant__ LceArgs a) {
    const LceProblem& p = a.problem;
    const LceHeader& header = *a.saved.header;
    const u32 row = blockIdx.x * 256 + threadIdx.x;

    u32 bound = 0;
    if (row < header.num_rows) {
        const u32 token = a.saved.row_token[row], target_class = a.saved.row_class[row];
        LceCoefficients c = {prim::bits_f32(0x7FC00000u), 0.0f, 0.0f, 0.0f};
        if (target_class != NONE) {
            const f64 smoothing = p.label_smoothing;
            const f64 loss_scale = a.upstream.loss_scale == nullptr ? 1.0 : f64(*a.upstream.loss_scale);
            const f64 d_loss = header.denominator == 0.0 ? 0.0 : f64(a.upstream.loss) * loss_scale / header.denominator;
            const f64 token_weight = p.token_weights == nullptr ? 1.0 : f64(p.token_weights[token]);
            const f64 class_weight = p.class_weights == nullptr ? 1.0 : f64(p.class_weights[target_class]);
            const f64 d_losses = (d_loss + at(a.upstream.losses, token)) * token_weight;
            const f64 target = d_losses * (1.0 - smoothing) * class_weight + at(a.upstream.nll, token);
            const f64 spread = smoothing > 0.0 ? d_losses * smoothing / f64(p.vocab) : 0.0;
            f64 softmax = target + at(a.upstream.lse, token);
            if (smoothing > 0.0) softmax += spread * header.class_weight_sum;
            if (p.z_loss > 0.0f) softmax += d_losses * 2.0 * f64(p.z_loss) * f64(a.saved.statistics[row].lse);
            c = {float(softmax), float(target), float(spread), float(at(a.upstream.entropy, token))};
        }
        a.backward.coefficients[row] = c;
        const float eps = a.saved.entry_count != nullptr && a.saved.entry_count[row] != NONE ? a.saved.statistics[row].eps : 0.0f;
        const float magnitude = largest(c, c.spread == 0.0f ? 0.0 : header.class_weight_sum, p.vocab, eps);
        if (magnitude <= 3.4028235e38f) bound = prim::f32_bits(magnitude);   // finite: false for NaN too
    }

    // ---- the largest bound of all rows: bits of floats that are not negative order like integers ------------------------
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const u32 other = prim::shfl_xor(bound, lanes);
        bound = other > bound ? other : bound;
    }
    if (threadIdx.x % 32 == 0 && bound != 0 && a.backward.exact_scale != nullptr) prim::atomic_max(a.backward.exact_scale, bound);
}
