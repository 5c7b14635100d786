// Before each round of a forward that captures: what earlier rounds have summed up raises each row's lower bound of its
// final log-sum-exp, and a pool that is filling up drops the candidates that fail against it. A block a row block.
// lce_target_logit has set the bound before the first round.
#include "block_scan.cuh"
#include "filter.cuh"
#include "softmax_state.cuh"

namespace {

constexpr u32 THREADS = 1024;
constexpr u32 ENTRIES = 4;                   // of a thread, at a time
// A bound and a probability against it round; what the final test would keep must not be dropped.
constexpr float SLACK = 1.0f - 1e-4f;

struct Smem {
    float bound[BLOCK_N];
    u32 start[BLOCK_N];                      // of the row's walk of random numbers
    block::ScanSpace<THREADS> scan;
};

// What is known from earlier rounds, by the lanes of a row.
__device__ __forceinline__ float known_bound(const LceArgs& a, u32 row, u32 lane) {
    const LcePartial* partial = a.forward.partial + row;
    float max = softmax::negative_infinity(), sum = 0.0f;
    for (u32 k = lane; k < a.first_partial; k += softmax::LANES) max = prim::fmax(max, partial[u64(k) * a.problem.tokens].max);
    max = softmax::max_over_lanes(max);
    for (u32 k = lane; k < a.first_partial; k += softmax::LANES) {
        const LcePartial share = partial[u64(k) * a.problem.tokens];
        if (share.sum > 0.0f) sum += share.sum * prim::expf_accurate(share.max - max);
    }
    sum = softmax::sum_over_lanes(sum);
    if (!(sum > 0.0f)) return softmax::negative_infinity();
    // Lowered by more than the rounding of the sum, which is relative to the maximum.
    return max + prim::logf(sum) - prim::fabs(max) * (1.0f / 4194304.0f);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_bound(const __grid_constant__ LceArgs a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 first_row = blockIdx.x * BLOCK_N, num_rows = a.saved.header->num_rows, t = threadIdx.x;
    if (first_row >= num_rows) return;
    static_assert(THREADS == BLOCK_N * softmax::LANES, "eight lanes a row");
    const u32 r = t / softmax::LANES, lane = t % softmax::LANES;
    if (first_row + r < num_rows) {
        const float known = known_bound(a, first_row + r, lane);
        if (lane == 0) {
            smem.bound[r] = a.forward.bound[first_row + r] = prim::fmax(a.forward.bound[first_row + r], known);
            smem.start[r] = filter::row_start(a.problem.seed, a.saved.row_token[first_row + r]);
        }
    }

    // ---- half full: keep what may still pass. Beyond its room candidates are lost, and the rows exact -----------------------
    const u32 captured = a.forward.pool_count[blockIdx.x];
    if (captured <= a.block_entries / 2 || captured > a.block_entries) return;
    __syncthreads();
    LceEntry* pool = a.forward.pool + u64(blockIdx.x) * a.block_entries;
    u32 kept = 0;                            // never more than have been looked at: nothing unread is overwritten
    for (u32 base = 0; base < captured; base += THREADS * ENTRIES) {
        LceEntry entry[ENTRIES];
        bool keeps[ENTRIES];
        u32 count = 0, total;
#pragma unroll
        for (u32 k = 0; k < ENTRIES; ++k) {
            const u32 i = base + k * THREADS + t;
            keeps[k] = i < captured;
            if (!keeps[k]) continue;
            entry[k] = pool[i];
            const u32 row = entry[k].index >> CLASS_BITS, v = entry[k].index & ((1u << CLASS_BITS) - 1);
            const float most = prim::expf_accurate(prim::fmin(entry[k].value - smem.bound[row], 0.0f));
            keeps[k] = most >= SLACK * filter::least(a.problem, smem.start[row], v);
            count += keeps[k];
        }
        u32 slot = kept + block::exclusive_scan<THREADS>(smem.scan, count, total);
#pragma unroll
        for (u32 k = 0; k < ENTRIES; ++k) {
            if (keeps[k]) pool[slot++] = entry[k];
        }
        kept += total;
    }
    if (t == 0) a.forward.pool_count[blockIdx.x] = kept;
}
