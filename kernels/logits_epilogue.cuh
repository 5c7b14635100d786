// What becomes of a tile of products in registers: logits, the online softmax of each row, the target's logit, and the
// candidates of the sparse gradient, put aside. Shared by the sm_80 and the sm_90 forward.
//
// A tile has BLOCK_N rows; its classes are cut into PARTS, each with a softmax state of its own. A warp works on 16 M rows
// of a part of 8 C classes: acc[m][c][i] of lane l is row  first_row + 16 m + l / 4 + 8 (i / 2)
//                                               and class  first_class + 8 c + 2 (l % 4) + i % 2,
// in other words a thread has 2 M rows (r = 2 m + i / 2) of 2 C classes (k = 2 c + i % 2), and a quad of lanes a row of a part.
// The state of a row of a part is in shared memory: what all four lanes read each tile (maximum, threshold) and what only its
// owner among them touches (sums). Owners are spread over the quad, so that a sum over the quad needs few shuffles.
#pragma once

#include "filter.cuh"
#include "logit_map.cuh"
#include "softmax_state.cuh"

namespace epilogue {

constexpr float LOG2_E = 1.4426950408889634f;
// Rounding in running sums and exponentials must never drop an entry that the final test would keep.
constexpr float SLACK = 1.0f - 1e-4f;
// Nothing is captured against this threshold: terms are at most 1.
constexpr float OUT_OF_REACH = 1e30f;
constexpr u32 STAGING = 512;                 // candidates a block holds before it hands them to its pool

// ---- shared memory ----------------------------------------------------------------------------------------------------
struct alignas(8) MaxThreshold { float max, threshold; };

template <u32 PARTS> struct State {
    MaxThreshold row[PARTS][BLOCK_N];        // threshold: of exp(z - max), for a class with u = 1
    float weighted[PARTS][BLOCK_N];
    float smooth[PARTS][BLOCK_N];
    u32 argmax[PARTS][BLOCK_N];
    float bound[BLOCK_N];                    // of the row's log-sum-exp, before this launch; +inf: capture nothing
    float anchor[BLOCK_N];
    u32 start[BLOCK_N];                      // of the row's walk of random numbers
    u32 target[BLOCK_N];
    float inverse_softcap;
    u32 staged, pool_begin;
    LceEntry staging[STAGING];
};
// Over the ring of the main loop, once that is done.
template <u32 PARTS> struct Sums { float value[PARTS][BLOCK_N]; };

// ---- rows of a quad ---------------------------------------------------------------------------------------------------
// Combines value[r] over the four lanes of a quad. Each lane is left with its own rows' results, R / 4 of them (with R = 2, two
// lanes are left with the same one): halves are exchanged, not all values, 6 shuffles for 8 rows instead of 16. The owned rows
// of a warp's lanes are neighbours, in different banks.
template <u32 R> constexpr u32 OWNED = R < 4 ? 1 : R / 4;
template <u32 R> __device__ __forceinline__ u32 owned_row(u32 k) {
    const u32 lane = threadIdx.x % 32;
    return R < 4 ? lane % 2 : lane % 4 + 4 * k;
}
template <u32 R> __device__ __forceinline__ bool is_owner() { return R >= 4 || threadIdx.x / 2 % 2 == 0; }

template <u32 R, class T, class Op> __device__ __forceinline__ void reduce_quad(const T (&value)[R], T (&result)[OWNED<R>], Op op) {
    static_assert(R == 2 || R % 4 == 0, "rows of a thread");
    const bool odd = threadIdx.x % 2 != 0, upper = threadIdx.x / 2 % 2 != 0;
    T half[R / 2];
#pragma unroll
    for (u32 r = 0; r < R / 2; ++r) {
        const T keep = odd ? value[2 * r + 1] : value[2 * r], give = odd ? value[2 * r] : value[2 * r + 1];
        half[r] = op(keep, prim::shfl_xor(give, 1));
    }
    if constexpr (R == 2) {
        result[0] = op(half[0], prim::shfl_xor(half[0], 2));
    } else {
#pragma unroll
        for (u32 r = 0; r < R / 4; ++r) {
            const T keep = upper ? half[2 * r + 1] : half[2 * r], give = upper ? half[2 * r] : half[2 * r + 1];
            result[r] = op(keep, prim::shfl_xor(give, 2));
        }
    }
}

// ---- the epilogue -----------------------------------------------------------------------------------------------------
template <u32 M, u32 C, u32 PARTS> class Epilogue {
    static constexpr u32 ROWS = 2 * M, CLASSES = 2 * C;

    const LceArgs& a;
    State<PARTS>& state;
    const u32 part, first_row, first_column; // of this lane: in 0..PARTS, 0..BLOCK_N, 0..BLOCK_V
    float sum[OWNED<ROWS>];                  // Σ exp(z - max) of the owned rows

    __device__ __forceinline__ u32 row(u32 r) const { return first_row + r / 2 * 16 + r % 2 * 8; }
    static __device__ __forceinline__ u32 column(u32 k) { return k / 2 * 8 + k % 2; }
    static __device__ __forceinline__ float& at(float (&acc)[M][C][4], u32 r, u32 k) { return acc[r / 2][k / 2][r % 2 * 2 + k % 2]; }

    __device__ __forceinline__ float threshold(u32 in_block, float max, float at_least) const {
        const float known = prim::ex2(prim::fmin((state.bound[in_block] - softmax::reference(max)) * LOG2_E, 80.0f));
        return a.problem.eps * SLACK * prim::fmax(known, at_least);
    }

    __device__ __forceinline__ void to_logits(u32 first_class, float (&acc)[M][C][4]) const {
        const LceProblem& p = a.problem;
        if (p.bias || p.logit_scale != 1.0f) {
#pragma unroll
            for (u32 k = 0; k < CLASSES; ++k) {
                const u32 v = first_class + column(k);
                const float bias = logit_map::bias(p, v < p.vocab ? v : p.vocab - 1);
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) at(acc, r, k) = prim::fma(at(acc, r, k), p.logit_scale, bias);
            }
        }
        if (p.softcap > 0.0f) {
            const float inverse = state.inverse_softcap;
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
#pragma unroll
                for (u32 k = 0; k < CLASSES; ++k) at(acc, r, k) = logit_map::softcapped(at(acc, r, k), p.softcap, inverse);
            }
        }
        if (first_class - first_column + BLOCK_V > p.vocab) {
#pragma unroll
            for (u32 k = 0; k < CLASSES; ++k) {
                if (first_class + column(k) < p.vocab) continue;
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) at(acc, r, k) = softmax::negative_infinity();
            }
        }
    }

    __device__ __forceinline__ void find_targets(u32 first_class, float (&acc)[M][C][4], u32 block_row) const {
        bool near = false;
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) near |= state.target[row(r)] - first_class < 8 * C;
        if (!near) return;
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            const u32 column_of_target = state.target[row(r)] - first_class;
#pragma unroll
            for (u32 k = 0; k < CLASSES; ++k) {
                if (column_of_target == column(k)) a.saved.statistics[block_row + row(r)].target_logit = at(acc, r, k);
            }
        }
    }

    // Some row of the warp's has a logit above its maximum: new maxima, sums and thresholds against them.
    __device__ __forceinline__ void raise(u32 first_class, float (&acc)[M][C][4], const float (&tile_max)[ROWS]) {
        float largest[OWNED<ROWS>];
        bool rose[OWNED<ROWS>];
        reduce_quad<ROWS>(tile_max, largest, [](float x, float y) { return prim::fmax(x, y); });
        prim::syncwarp();                    // all lanes have read the old maxima
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) {
            const u32 mine = row(owned_row<ROWS>(k));
            const float old = state.row[part][mine].max;
            rose[k] = is_owner<ROWS>() && largest[k] > old;
            if (!rose[k]) continue;
            if (old > softmax::negative_infinity()) {
                // With a maximum of +inf the step is -inf and the row NaN, as it should be.
                const float step = old - largest[k], scale = prim::expf_accurate(step);
                if (a.problem.entropy) state.weighted[part][mine] = (state.weighted[part][mine] + sum[k] * step) * scale;
                sum[k] *= scale;
            }
            // The maximum itself adds exp(0) to the sum, in this tile still.
            state.row[part][mine] = {largest[k], a.capture ? threshold(mine, largest[k], sum[k] + 1.0f) : 0.0f};
        }
        prim::syncwarp();
        if (!a.problem.metrics) return;
        u32 first[ROWS], lowest[OWNED<ROWS>];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            const float max = state.row[part][row(r)].max;
            first[r] = NONE;
#pragma unroll
            for (u32 k = CLASSES; k-- > 0;) {
                if (at(acc, r, k) == max) first[r] = first_class + column(k);
            }
        }
        reduce_quad<ROWS>(first, lowest, [](u32 x, u32 y) { return x < y ? x : y; });
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) {
            if (rose[k]) state.argmax[part][row(owned_row<ROWS>(k))] = lowest[k];
        }
    }

    __device__ __forceinline__ void add_smooth(u32 first_class, float (&acc)[M][C][4]) {
        float smooth[ROWS] = {}, total[OWNED<ROWS>];
#pragma unroll
        for (u32 k = 0; k < CLASSES; ++k) {
            const u32 v = first_class + column(k);
            if (v >= a.problem.vocab) continue;
            const float weight = logit_map::class_weight(a.problem, v);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) smooth[r] += weight * (at(acc, r, k) - state.anchor[row(r)]);
        }
        reduce_quad<ROWS>(smooth, total, [](float x, float y) { return x + y; });
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) {
            if (is_owner<ROWS>()) state.smooth[part][row(owned_row<ROWS>(k))] += total[k];
        }
    }

    // A state of the walk as a number u in [0, 1) at most 2^-23 below entry_uniform, plus 1: two instructions.
    static __device__ __forceinline__ float one_plus_uniform(u32 walk) { return prim::bits_f32(u32((0x7full << 32 | walk) >> 9)); }

    // exp(z - max) >= threshold * u, as threshold * (1 + u) - exp(z - max) <= threshold: one fused multiply-add and one compare.
    // Its rounding is a few 2^-24 of the threshold, which `limit` gives back.
    static __device__ __forceinline__ bool may_matter(float e, float threshold, float limit, u32 walk) {
        return prim::fma(threshold, one_plus_uniform(walk), -e) <= limit;
    }

    // Puts aside the row's classes whose bit is set. Not one push a class, unrolled: 64 copies of it would not fit the
    // instruction cache beside the main loop.
    __device__ __forceinline__ void push(u32 hits, u32 in_block, u32 first_class, const float (&logit)[CLASSES], u32 row_block) const {
        u32 slot = prim::atomic_add(&state.staged, u32(prim::popc(hits)));
        for (; hits != 0; hits &= hits - 1, ++slot) {
            const u32 hit = u32(prim::ffs(hits)) - 1;
            float z = logit[0];
#pragma unroll
            for (u32 k = 1; k < CLASSES; ++k) z = hit == k ? logit[k] : z;
            const LceEntry entry = {in_block << CLASS_BITS | (first_class + column(hit)), z};
            if (slot < STAGING) {
                state.staging[slot] = entry;
                continue;
            }
            const u32 in_pool = prim::atomic_add(&a.forward.pool_count[row_block], 1u);
            if (in_pool < a.block_entries) a.forward.pool[u64(row_block) * a.block_entries + in_pool] = entry;
        }
    }

public:
    // first_row and first_column: of the warp's part.
    __device__ __forceinline__ Epilogue(const LceArgs& a, State<PARTS>& state, u32 part, u32 first_row, u32 first_column)
        : a(a), state(state), part(part), first_row(first_row + threadIdx.x % 32 / 4), first_column(first_column + threadIdx.x % 4 * 2) {
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) sum[k] = 0.0f;
    }

    // By `threads` threads, thread_idx in 0..threads, before a barrier and the first tile.
    static __device__ __forceinline__ void initialise(const LceArgs& a, State<PARTS>& state, u32 row_block, u32 thread_idx, u32 threads) {
        const u32 num_rows = a.saved.header->num_rows;
        for (u32 i = thread_idx; i < BLOCK_N; i += threads) {
            const u32 row = row_block * BLOCK_N + i;
            const bool there = row < num_rows;
            const float seed = there && a.problem.label_smoothing > 0.0f ? a.forward.seed_logit[row] : 0.0f;
            state.anchor[i] = softmax::is_finite(seed) ? seed : 0.0f;
            state.bound[i] = there && a.capture ? a.forward.bound[row] : -softmax::negative_infinity();
            // The threshold filter: a walk that stands still just below 1.
            state.start[i] = there && a.problem.filter == FILTER_UNBIASED ? filter::row_start(a.problem.seed, a.saved.row_token[row]) : ~0u;
            state.target[i] = there ? a.saved.row_class[row] : NONE;
            for (u32 part = 0; part < PARTS; ++part) {
                state.row[part][i] = {softmax::negative_infinity(), OUT_OF_REACH};
                state.weighted[part][i] = state.smooth[part][i] = 0.0f;
                state.argmax[part][i] = NONE;
            }
        }
        if (thread_idx == 0) {
            state.inverse_softcap = a.problem.softcap > 0.0f ? prim::div_rn(1.0f, a.problem.softcap) : 0.0f;
            state.staged = 0;
        }
    }

    // Takes in a tile of products. A warp by itself: no barrier of the block.
    __device__ __forceinline__ void take(u32 row_block, u32 tile, float (&acc)[M][C][4]) {
        const LceProblem& p = a.problem;
        const u32 first_class = tile * BLOCK_V + first_column;
        to_logits(first_class, acc);
        find_targets(first_class, acc, row_block * BLOCK_N);

        // ---- maxima ---------------------------------------------------------------------------------------------------
        float tile_max[ROWS];
        bool rises = false;
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            tile_max[r] = at(acc, r, 0);
#pragma unroll
            for (u32 k = 1; k < CLASSES; ++k) tile_max[r] = prim::fmax(tile_max[r], at(acc, r, k));
            rises |= tile_max[r] > state.row[part][row(r)].max;
        }
        if (prim::any(rises)) raise(first_class, acc, tile_max);
        if (p.label_smoothing > 0.0f) add_smooth(first_class, acc);

        // ---- exponentials, and candidates -----------------------------------------------------------------------------
        const u32 step = p.filter == FILTER_UNBIASED ? filter::WEYL_STEP : 0;
        float sums[ROWS], weighted[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            const MaxThreshold row_state = state.row[part][row(r)];
            const float reference = softmax::reference(row_state.max);
            float e[CLASSES];
            sums[r] = weighted[r] = 0.0f;
#pragma unroll
            for (u32 k = 0; k < CLASSES; ++k) {
                e[k] = prim::ex2((at(acc, r, k) - reference) * LOG2_E);
                sums[r] += e[k];
            }
            if (p.entropy) {
#pragma unroll
                for (u32 k = 0; k < CLASSES; ++k) {
                    if (e[k] != 0.0f) weighted[r] = prim::fma(e[k], at(acc, r, k) - reference, weighted[r]);
                }
            }
            if (a.capture) {
                const float limit = row_state.threshold * (1.0f + 1.0f / 4194304.0f);
                const u32 walk = state.start[row(r)] + first_class * step;
                bool any = false;
#pragma unroll
                for (u32 k = 0; k < CLASSES; ++k) any |= may_matter(e[k], row_state.threshold, limit, walk + column(k) * step);
                // Also against a threshold out of reach something may pass where u is next to 0.
                if (any && state.bound[row(r)] != -softmax::negative_infinity()) {
                    u32 hits = 0;
                    float logit[CLASSES];
#pragma unroll
                    for (u32 k = 0; k < CLASSES; ++k) {
                        logit[k] = at(acc, r, k);
                        const bool hit = may_matter(e[k], row_state.threshold, limit, walk + column(k) * step);
                        hits |= u32(hit && first_class + column(k) < p.vocab) << k;
                    }
                    if (hits != 0) push(hits, row(r), first_class, logit, row_block);
                }
            }
        }

        // ---- sums, by their owners --------------------------------------------------------------------------------------
        float total[OWNED<ROWS>], total_weighted[OWNED<ROWS>];
        reduce_quad<ROWS>(sums, total, [](float x, float y) { return x + y; });
        if (p.entropy) reduce_quad<ROWS>(weighted, total_weighted, [](float x, float y) { return x + y; });
        prim::syncwarp();                    // all lanes have read the thresholds
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) {
            const u32 mine = row(owned_row<ROWS>(k));
            sum[k] += total[k];
            if (!is_owner<ROWS>()) continue;
            if (p.entropy) state.weighted[part][mine] += total_weighted[k];
            const float max = state.row[part][mine].max;
            if (a.capture && max > softmax::negative_infinity()) state.row[part][mine].threshold = threshold(mine, max, sum[k]);
        }
    }

    // Hands the staged candidates to the pool if there are more than `keep`. Between two barriers that no take() crosses, by
    // all threads that take; barrier() is one of them.
    template <class Barrier>
    __device__ __forceinline__ void flush(u32 row_block, u32 keep, u32 thread_idx, u32 threads, Barrier barrier) {
        const u32 staged = state.staged;
        if (!a.capture || staged <= keep) return;
        const u32 count = staged < STAGING ? staged : STAGING;
        if (thread_idx == 0) state.pool_begin = prim::atomic_add(&a.forward.pool_count[row_block], count);
        barrier();
        const u64 block_begin = u64(row_block) * a.block_entries;
        for (u32 i = thread_idx; i < count; i += threads) {
            const u32 in_pool = state.pool_begin + i;
            if (in_pool < a.block_entries) a.forward.pool[block_begin + in_pool] = state.staging[i];
        }
        if (thread_idx == 0) state.staged = 0;
    }

    // Merges the parts of every row, in order, and writes the share of this block. After the last tile, by all threads.
    template <class Barrier>
    __device__ __forceinline__ void finish(Sums<PARTS>& sums, u32 row_block, u32 split, u32 thread_idx, u32 threads, Barrier barrier) {
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) {
            if (is_owner<ROWS>()) sums.value[part][row(owned_row<ROWS>(k))] = sum[k];
        }
        barrier();
        const u32 num_rows = a.saved.header->num_rows;
        for (u32 i = thread_idx; i < BLOCK_N; i += threads) {
            const u32 row = row_block * BLOCK_N + i;
            if (row >= num_rows) continue;
            LcePartial share = {softmax::negative_infinity(), 0.0f, 0.0f, 0.0f};
            for (u32 q = 0; q < PARTS; ++q) share.max = prim::fmax(share.max, state.row[q][i].max);
            u32 argmax = NONE;
            for (u32 q = 0; q < PARTS; ++q) {
                const float max = state.row[q][i].max, part_sum = sums.value[q][i];
                share.smooth += state.smooth[q][i];
                if (max == share.max && state.argmax[q][i] < argmax) argmax = state.argmax[q][i];
                if (part_sum == 0.0f) continue;
                const bool is_max = max == share.max;
                const float down = is_max ? 0.0f : max - share.max, scale = prim::expf_accurate(down);
                share.sum += part_sum * scale;
                share.weighted += (state.weighted[q][i] + (is_max ? 0.0f : part_sum * down)) * scale;
            }
            const u64 at = u64(a.first_partial + split) * a.problem.tokens + row;
            a.forward.partial[at] = share;
            a.forward.partial_argmax[at] = argmax;
        }
    }
};

}  // namespace epilogue
