// Which tokens take part: numbers them, reads their targets, and prepares the outputs. One block, so that the order of
// rows is the order of tokens without a second launch.
#include "block_scan.cuh"
#include "element.cuh"

namespace {

constexpr u32 THREADS = 1024;
constexpr u32 ITEMS = 4;                     // consecutive tokens a thread, a round

struct Smem {
    block::SumSpace<THREADS> sum;
    block::ScanSpace<THREADS> scan;
    u32 first_bad;
};

__device__ __forceinline__ i64 target_of(const LceProblem& p, u32 token) {
    return element::load_target(p.targets, p.target_type, u64(token) + p.shift);
}
// A token whose target would lie in the next sequence has none.
__device__ __forceinline__ bool has_target(const LceProblem& p, u32 token) {
    return u64(token % p.seq_len) + p.shift < p.seq_len;
}

__device__ __forceinline__ void clear_outputs(const LceOutputs& out, u32 token) {
    out.losses[token] = out.nll[token] = out.lse[token] = out.target_logit[token] = 0.0f;
    if (out.entropy) out.entropy[token] = 0.0f;
    if (out.argmax) out.argmax[token] = NONE;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_rows(const __grid_constant__ LceArgs a) {
    Smem& smem = prim::shared_memory<Smem>();
    const LceProblem& p = a.problem;
    if (threadIdx.x == 0) smem.first_bad = NONE;
    __syncthreads();

    // ---- rows, in token order -------------------------------------------------------------------------------------
    u32 num_rows = 0;
    f64 weight = 0;
    for (u64 round = 0; round < p.tokens; round += THREADS * ITEMS) {
        u32 target_class[ITEMS], count = 0;
        bool active[ITEMS];
#pragma unroll
        for (u32 k = 0; k < ITEMS; ++k) {
            const u64 token = round + threadIdx.x * ITEMS + k;
            active[k] = false;
            if (token >= p.tokens) continue;
            clear_outputs(a.outputs, u32(token));
            if (!has_target(p, u32(token))) continue;
            const i64 target = target_of(p, u32(token));
            active[k] = target != p.ignore_index;
            target_class[k] = target >= 0 && target < i64(p.vocab) ? u32(target) : NONE;
            count += active[k];
        }
        u32 total, row = num_rows + block::exclusive_scan<THREADS>(smem.scan, count, total);
#pragma unroll
        for (u32 k = 0; k < ITEMS; ++k) {
            const u64 token = round + threadIdx.x * ITEMS + k;
            if (token >= p.tokens) continue;
            a.saved.token_row[token] = active[k] ? row : NONE;
            if (!active[k]) continue;
            a.saved.row_token[row] = u32(token);
            a.saved.row_class[row] = target_class[k];
            ++row;
            if (target_class[k] == NONE) {
                prim::atomic_min(&smem.first_bad, u32(token));
            } else {
                const f64 token_weight = p.token_weights ? p.token_weights[token] : 1.0f;
                weight += token_weight * (p.class_weights ? p.class_weights[target_class[k]] : 1.0f);
            }
        }
        num_rows += total;
    }
    weight = block::sum<THREADS>(smem.sum, weight);

    // ---- the sum of all class weights, which label smoothing needs ------------------------------------------------
    f64 class_weight_sum = 0;
    if (p.label_smoothing > 0.0f && p.class_weights) {
        for (u32 v = threadIdx.x; v < p.vocab; v += THREADS) class_weight_sum += p.class_weights[v];
        class_weight_sum = block::sum<THREADS>(smem.sum, class_weight_sum);
    } else if (p.label_smoothing > 0.0f) {
        class_weight_sum = p.vocab;
    }

    if (threadIdx.x == 0) {
        LceHeader header = {};
        header.denominator = p.reduction == REDUCTION_MEAN ? weight : 1.0;
        header.class_weight_sum = class_weight_sum;
        header.bad_target_token = smem.first_bad;
        header.bad_target = smem.first_bad == NONE ? 0 : target_of(p, smem.first_bad);
        header.num_rows = num_rows;
        *a.saved.header = header;
    }
}
