// Before each round of a forward that captures: what earlier rounds have summed up raises each row's lower bound of its
// final log-sum-exp. lce_target_logit has set the bound before the first round.
#include "softmax_state.cuh"

extern "C" __global__ void __launch_bounds__(256) lce_bound(const __grid_constant__ LceArgs a) {
    const u32 thread = blockIdx.x * 256 + threadIdx.x, row = thread / softmax::LANES, lane = thread % softmax::LANES;
    if (row >= a.saved.header->num_rows) return;
    const LcePartial* partial = a.forward.partial + row;
    float max = softmax::negative_infinity(), sum = 0.0f;
    for (u32 k = lane; k < a.first_partial; k += softmax::LANES) max = prim::fmax(max, partial[u64(k) * a.problem.tokens].max);
    max = softmax::max_over_lanes(max);
    for (u32 k = lane; k < a.first_partial; k += softmax::LANES) {
        const LcePartial share = partial[u64(k) * a.problem.tokens];
        if (share.sum > 0.0f) sum += share.sum * prim::expf_accurate(share.max - max);
    }
    sum = softmax::sum_over_lanes(sum);
    if (lane != 0 || !(sum > 0.0f)) return;
    // Lowered by more than the rounding of the sum, which is relative to the maximum.
    const float known = max + prim::logf(sum) - prim::fabs(max) * (1.0f / 4194304.0f);
    a.forward.bound[row] = prim::fmax(a.forward.bound[row], known);
}
