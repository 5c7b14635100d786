// Merges the shares of each row and writes the statistics that the backward needs and the outputs of its token.
#include "logit_map.cuh"
#include "softmax_state.cuh"

namespace {

// t (1 - s) w_y nll + t s / V Σ_v w_v (lse - z_v) + t z_loss lse²
__device__ __forceinline__ float row_loss(const LceArgs& a, u32 row, u32 token, u32 y, const softmax::Totals& totals, f64 log_sum, f64 nll) {
    const LceProblem& p = a.problem;
    const f64 smoothing = p.label_smoothing;
    f64 loss = (1.0 - smoothing) * f64(logit_map::class_weight(p, y)) * nll;
    if (smoothing > 0.0) {
        const float seed = a.forward.seed_logit[row];
        const f64 anchor = softmax::is_finite(seed) ? seed : 0.0f;
        const f64 spread = a.saved.header->class_weight_sum * ((f64(totals.max) - anchor) + log_sum) - totals.smooth;
        loss += smoothing / f64(p.vocab) * spread;
    }
    if (p.z_loss > 0.0f) {
        const f64 lse = f64(totals.max) + log_sum;
        loss += f64(p.z_loss) * lse * lse;
    }
    return float((p.token_weights ? f64(p.token_weights[token]) : 1.0) * loss);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) lce_combine(const __grid_constant__ LceArgs a) {
    const u32 thread = blockIdx.x * 256 + threadIdx.x, row = thread / softmax::LANES, lane = thread % softmax::LANES;
    if (row >= a.saved.header->num_rows) return;
    const LceProblem& p = a.problem;

    // ---- merge ----------------------------------------------------------------------------------------------------
    const LcePartial* partial = a.forward.partial + row;
    float max = softmax::negative_infinity();
    for (u32 k = lane; k < a.partials; k += softmax::LANES) max = prim::fmax(max, partial[u64(k) * p.tokens].max);
    max = softmax::max_over_lanes(max);
    softmax::Totals totals(max);
    for (u32 k = lane; k < a.partials; k += softmax::LANES) totals.add(partial[u64(k) * p.tokens]);
    totals.sum = softmax::sum_over_lanes(totals.sum);
    totals.weighted = softmax::sum_over_lanes(totals.weighted);
    totals.smooth = softmax::sum_over_lanes(totals.smooth);
    const f64 log_sum = prim::log(totals.sum);

    u32 argmax = NONE;
    if (p.metrics) {
        for (u32 k = lane; k < a.partials; k += softmax::LANES) {
            const u64 at = u64(k) * p.tokens;
            const u32 v = a.forward.partial_argmax[at + row];
            if (partial[at].max == max && v < argmax) argmax = v;
        }
        argmax = softmax::over_lanes(argmax, [](u32 x, u32 y) { return x < y ? x : y; });
    }
    if (lane != 0) return;

    // ---- statistics -----------------------------------------------------------------------------------------------
    const u32 token = a.saved.row_token[row], y = a.saved.row_class[row];
    LceRowStatistics s;
    s.max = max;
    s.inverse_sum = float(1.0 / totals.sum);
    s.log_sum = float(log_sum);
    s.lse = float(f64(max) + log_sum);
    s.entropy = p.entropy ? float(log_sum - totals.weighted / totals.sum) : 0.0f;
    s.target_logit = y == NONE ? softmax::not_a_number() : a.saved.statistics[row].target_logit;
    s.argmax = argmax;
    s.eps = a.capture ? p.eps * prim::fmax(1.0f, float(prim::exp((f64(a.forward.bound[row]) - f64(max)) - log_sum))) : p.eps;
    a.saved.statistics[row] = s;

    // ---- outputs of the token -------------------------------------------------------------------------------------
    const f64 nll = (f64(max) - f64(s.target_logit)) + log_sum;
    a.outputs.losses[token] = y == NONE ? softmax::not_a_number() : row_loss(a, row, token, y, totals, log_sum, nll);
    a.outputs.nll[token] = float(nll);
    a.outputs.lse[token] = s.lse;
    a.outputs.target_logit[token] = s.target_logit;
    if (a.outputs.entropy) a.outputs.entropy[token] = s.entropy;
    if (a.outputs.argmax) a.outputs.argmax[token] = argmax;
}
