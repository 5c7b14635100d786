// Between the rounds of a forward that captures. A block a row block.
//
// Before a round: what earlier rounds have summed up raises each row's lower bound of its final log-sum-exp, and a pool that is filling
// up drops the candidates that fail against it. lce_target_logit has set the bound before the first round.
//
// After a round (redo): a pool that has overflowed goes back to what it held before, less what a larger eps drops, and its row block
// does the round again. From then on its eps rises as far as the next round is expected to need. It does so by way of the bounds, which
// then are above what is known: eps exp(bound) is what a candidate meets. A larger eps keeps a part of what a smaller one keeps, so
// that nothing is missing, and is as unbiased: it costs variance, not time.
#include "block_scan.cuh"
#include "filter.cuh"
#include "softmax_state.cuh"

namespace {

constexpr u32 THREADS = 1024;
constexpr u32 ENTRIES = 4;                   // of a thread, at a time
// A bound and a probability against it round; what the final test would keep must not be dropped.
constexpr float SLACK = 1.0f - 1e-4f;
// Share of a pool that a raised eps aims at: what comes next is a forecast.
constexpr float AIM = 0.875f;
// Kept entries go with eps^-0.8: 759, 247 and 79 a row at 2^-12, 2^-10 and 2^-8 on a trained model (benches/record). A flat softmax
// keeps 1 / eps.
constexpr float ELASTICITY = 1.25f;

struct Smem {
    float bound[BLOCK_N];
    u32 start[BLOCK_N];                      // of the row's walk of random numbers
    block::ScanSpace<THREADS> scan;
};

// What is known from the first `partials` shares, by the lanes of a row.
__device__ __forceinline__ float known_bound(const LceArgs& a, u32 row, u32 lane, u32 partials) {
    const LcePartial* partial = a.forward.partial + row;
    float max = softmax::negative_infinity(), sum = 0.0f;
    for (u32 k = lane; k < partials; k += softmax::LANES) max = prim::fmax(max, partial[u64(k) * a.problem.tokens].max);
    max = softmax::max_over_lanes(max);
    for (u32 k = lane; k < partials; k += softmax::LANES) {
        const LcePartial share = partial[u64(k) * a.problem.tokens];
        if (share.sum > 0.0f) sum += share.sum * prim::expf_accurate(share.max - max);
    }
    sum = softmax::sum_over_lanes(sum);
    if (!(sum > 0.0f)) return softmax::negative_infinity();
    // Lowered by more than the roundings: of the sum's terms, and of the result, which is relative to the maximum.
    return max + prim::logf(sum) - 1e-5f - prim::fabs(max) * (1.0f / 4194304.0f);
}

// By how much the logarithm of eps rises, and the most that eps exp(bound) may be above eps exp(known). DESIGN.md, section 7, has
// what other rules come to.
struct Rise { float log_up, log_most; };

// So that as many candidates as there are, or will be after the next round if that finds them as the last did, come to AIM.
__device__ __forceinline__ Rise rise(const LceArgs& a, const LcePool& pool, u32 rows) {
    if (!a.redo && pool.redone == 0) return {0.0f, 0.0f};
    const float aim = AIM * float(a.block_entries - rows);       // in the lists each row has an entry of its target besides
    // No softmax keeps more than 1 / eps a row of what has been summed up. That is sure to fit, and before the last round costs little:
    // there is more to be summed up.
    const float log_sure = prim::logf(prim::fmax(float(rows) / (aim * a.problem.eps), 1.0f));
    float expected = float(pool.count), log_most = log_sure;
    if (a.redo && a.first_partial + a.splits < a.partials) return {-softmax::negative_infinity(), log_sure};
    if (!a.redo) {
        expected += float(pool.count - pool.before) * float(a.num_tiles) / float(a.first_tile - a.previous_tile);
        log_most += prim::logf(float(a.first_tile + a.num_tiles) / float(a.first_tile));
    }
    return {ELASTICITY * prim::logf(prim::fmax(expected / aim, 1.0f)), log_most};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_bound(const __grid_constant__ LceArgs a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 first_row = blockIdx.x * BLOCK_N, num_rows = a.saved.header->num_rows, t = threadIdx.x;
    if (first_row >= num_rows) return;
    const u32 rows = num_rows - first_row < BLOCK_N ? num_rows - first_row : BLOCK_N;
    LcePool& own = a.forward.pools[blockIdx.x];
    const LcePool pool = own;
    // The lists have an entry of each row's target besides: what a pool just holds need not fit them.
    if (a.redo && (pool.count <= a.block_entries - rows || pool.before == NONE)) return;
    const bool lost = !a.redo && pool.count > a.block_entries;       // candidates, for good: the rows will be exact, and need no more

    // ---- bounds -------------------------------------------------------------------------------------------------------------
    static_assert(THREADS == BLOCK_N * softmax::LANES, "eight lanes a row");
    const u32 r = t / softmax::LANES, lane = t % softmax::LANES;
    const Rise up = rise(a, pool, rows);
    if (r < rows) {
        const float known = known_bound(a, first_row + r, lane, a.first_partial + (a.redo ? a.splits : 0));
        if (lane == 0) {
            float& bound = a.forward.bound[first_row + r];
            const float least = prim::fmax(bound, known), raised = prim::fmin(least + up.log_up, known + up.log_most);
            smem.bound[r] = bound = lost ? -softmax::negative_infinity() : prim::fmax(least, raised);
            smem.start[r] = filter::row_start(a.problem.seed, a.saved.row_token[first_row + r]);
        }
    }
    __syncthreads();                         // and all threads have read the pool's state

    // ---- half full, or a larger eps: keep what may still pass ---------------------------------------------------------------
    const u32 captured = a.redo ? pool.before : pool.count;
    u32 kept = captured;
    if (!lost && (a.redo || up.log_up > 0.0f || captured > a.block_entries / 2)) {
        LceEntry* entries = a.forward.pool + u64(blockIdx.x) * a.block_entries;
        kept = 0;                            // never more than have been looked at: nothing unread is overwritten
        for (u32 base = 0; base < captured; base += THREADS * ENTRIES) {
            LceEntry entry[ENTRIES];
            bool keeps[ENTRIES];
            u32 count = 0, total;
#pragma unroll
            for (u32 k = 0; k < ENTRIES; ++k) {
                const u32 i = base + k * THREADS + t;
                keeps[k] = i < captured;
                if (!keeps[k]) continue;
                entry[k] = entries[i];
                const u32 row = entry[k].index >> CLASS_BITS, v = entry[k].index & ((1u << CLASS_BITS) - 1);
                const float most = prim::expf_accurate(prim::fmin(entry[k].value - smem.bound[row], 0.0f));
                keeps[k] = most >= SLACK * filter::least(a.problem, a.problem.eps, smem.start[row], v);
                count += keeps[k];
            }
            u32 slot = kept + block::exclusive_scan<THREADS>(smem.scan, count, total);
#pragma unroll
            for (u32 k = 0; k < ENTRIES; ++k) {
                if (keeps[k]) entries[slot++] = entry[k];
            }
            kept += total;
        }
    }
    if (t != 0) return;
    own = {kept, lost ? NONE : kept, a.redo ? a.round + 1 : pool.redone};
    if (a.redo) prim::atomic_add(&a.forward.redo_count[a.round], 1u);
}
