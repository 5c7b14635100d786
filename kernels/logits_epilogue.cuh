// What becomes of a tile of products in registers: logits, the online softmax of each row, the target's logit, and the
// candidates of the sparse gradient, put aside. Shared by the sm_80 and the sm_90 forward.
//
// A tile has STATE_ROWS rows, BLOCK_N or a part of it (`block`: which one of all), that have their own threads and barrier.
// Its classes are cut into PARTS, each with a softmax state of its own. A warp works on 16 M rows
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

template <u32 PARTS, u32 TILE_V = BLOCK_V, u32 ROWS = BLOCK_N> struct State {
    MaxThreshold row[PARTS][ROWS];           // threshold: of exp(z - max), for a class with u = 1
    float weighted[PARTS][ROWS];
    float smooth[PARTS][ROWS];
    u32 argmax[PARTS][ROWS];
    float bound[ROWS];                       // LceForwardScratch::bound; +inf: capture nothing
    float anchor[ROWS];
    u32 start[ROWS];                         // of the row's walk of random numbers
    u32 target[ROWS];
    float bias[TILE_V];                      // of the tile, where there is one
    float inverse_softcap;
    u32 staged, pool_begin;
    LceEntry staging[STAGING];
};
// May lie over what the main loop no longer needs.
template <u32 PARTS, u32 ROWS = BLOCK_N> struct Sums { float value[PARTS][ROWS]; };

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
template <u32 M, u32 C, u32 PARTS, u32 STATE_ROWS = BLOCK_N> class Epilogue {
    static constexpr u32 ROWS = 2 * M, CLASSES = 2 * C;
    static constexpr u32 TILE_V = PARTS * 8 * C;
    using State = epilogue::State<PARTS, TILE_V, STATE_ROWS>;
    static constexpr u32 CHUNK = CLASSES < 16 ? CLASSES : 16;   // classes whose exponentials are alive at a time
    static constexpr u32 GROUP = 8;          // classes that are looked at again if any of them is a candidate

    const LceArgs& a;
    State& state;
    const u32 part, first_row, first_column; // of this lane: in 0..PARTS, 0..STATE_ROWS, 0..TILE_V
    float sum[OWNED<ROWS>];                  // Σ exp(z - max) of the owned rows

    __device__ __forceinline__ u32 row(u32 r) const { return first_row + r / 2 * 16 + r % 2 * 8; }
    static __device__ __forceinline__ u32 column(u32 k) { return k / 2 * 8 + k % 2; }
    static __device__ __forceinline__ float& at(float (&acc)[M][C][4], u32 r, u32 k) { return acc[r / 2][k / 2][r % 2 * 2 + k % 2]; }

    static __device__ __forceinline__ u32 row_block_of(u32 block) { return block / (BLOCK_N / STATE_ROWS); }

    __device__ __forceinline__ float threshold(u32 in_block, float max, float at_least) const {
        const float known = prim::ex2(prim::fmin((state.bound[in_block] - softmax::reference(max)) * LOG2_E, 80.0f));
        const float least = prim::fmax(known, at_least);     // 0 where the sum is NaN: such rows are exact
        return least > 0.0f ? a.problem.eps * SLACK * least : OUT_OF_REACH;
    }

    __device__ __forceinline__ void to_logits(u32 first_class, float (&acc)[M][C][4]) const {
        const LceProblem& p = a.problem;
        if (p.bias || p.logit_scale != 1.0f) {
            const float* bias = state.bias + first_column;
#pragma unroll
            for (u32 k = 0; k < CLASSES; ++k) {
                const float b = p.bias && first_class + column(k) < p.vocab ? bias[column(k)] : 0.0f;
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) at(acc, r, k) = prim::fma(at(acc, r, k), p.logit_scale, b);
            }
        }
        if (p.softcap > 0.0f) {
            const float inverse = state.inverse_softcap;
            constexpr u32 TOGETHER = CLASSES < 16 ? CLASSES : 16;   // logits that decide whether any of them is large
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
#pragma unroll
                for (u32 begin = 0; begin < CLASSES; begin += TOGETHER) {
                    bool any_large = false;
#pragma unroll
                    for (u32 k = begin; k < begin + TOGETHER; ++k) {
                        at(acc, r, k) *= inverse;
                        any_large |= logit_map::is_large(at(acc, r, k));
                    }
                    if (any_large) {
#pragma unroll
                        for (u32 k = begin; k < begin + TOGETHER; ++k) at(acc, r, k) = p.softcap * logit_map::tanh(at(acc, r, k));
                    } else {
#pragma unroll
                        for (u32 k = begin; k < begin + TOGETHER; ++k) at(acc, r, k) = p.softcap * logit_map::tanh_of_small(at(acc, r, k));
                    }
                }
            }
        }
        if (first_class - first_column + TILE_V > p.vocab) {
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
            rose[k] = false;
            if (!is_owner<ROWS>()) continue;
            const float old = state.row[part][mine].max;
            rose[k] = largest[k] > old;
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
    // Its rounding is a few 2^-24 of the threshold, which `limit` gives back. Without random numbers: 0 - exp(z - max) <= -threshold.
    struct Test {
        float factor, limit;
        __device__ __forceinline__ Test(float threshold, bool unbiased)
            : factor(unbiased ? threshold : 0.0f), limit(unbiased ? threshold * (1.0f + 1.0f / 4194304.0f) : -threshold) {}
        __device__ __forceinline__ bool passes(float e, u32 walk) const { return prim::fma(factor, one_plus_uniform(walk), -e) <= limit; }
    };

    __device__ __forceinline__ void exponentials(float (&acc)[M][C][4], u32 r, u32 begin, float (&e)[CHUNK]) const {
        const float reference = softmax::reference(state.row[part][row(r)].max);
#pragma unroll
        for (u32 k = 0; k < CHUNK; ++k) e[k] = prim::ex2((at(acc, r, begin + k) - reference) * LOG2_E);
    }

    // value[which], by halving: an index that is not constant would put the array into memory.
    template <u32 N> static __device__ __forceinline__ float choose(const float (&value)[N], u32 which) {
        if constexpr (N == 1) {
            return value[0];
        } else {
            float half[N / 2];
#pragma unroll
            for (u32 k = 0; k < N / 2; ++k) half[k] = which & 1 ? value[2 * k + 1] : value[2 * k];
            return choose<N / 2>(half, which >> 1);
        }
    }

    // Puts aside the row's classes whose bit is set. Not one push a class, unrolled: 64 copies of it would not fit the
    // instruction cache beside the main loop.
    __device__ __forceinline__ void push(u32 hits, u32 in_block, u32 first_class, const float (&logit)[CHUNK], u32 row_block) const {
        u32 slot = prim::atomic_add(&state.staged, u32(prim::popc(hits)));
        for (; hits != 0; hits &= hits - 1, ++slot) {
            const u32 hit = u32(prim::ffs(hits)) - 1;
            const float z = choose<CHUNK>(logit, hit);
            const LceEntry entry = {in_block << CLASS_BITS | (first_class + column(hit)), z};
            if (slot < STAGING) {
                state.staging[slot] = entry;
                continue;
            }
            const u32 in_pool = prim::atomic_add(&a.forward.pools[row_block].count, 1u);
            if (in_pool < a.block_entries) a.forward.pool[u64(row_block) * a.block_entries + in_pool] = entry;
        }
    }

    // Puts aside the candidates of a chunk of row r: classes that may pass the filter.
    __device__ __forceinline__ void capture(
        u32 block, u32 first_class, float (&acc)[M][C][4], u32 r, u32 begin, const float (&e)[CHUNK], float threshold
    ) const {
        // First only whether any of a few classes passes, which is a predicate, not a mask.
        const Test test(threshold, a.problem.filter == FILTER_UNBIASED);
        const u32 walk = state.start[row(r)] + filter::class_offset(prim::opaque(first_class));
        bool any[CHUNK / GROUP], any_of_all = false;
#pragma unroll
        for (u32 g = 0; g < CHUNK / GROUP; ++g) {
            any[g] = false;
#pragma unroll
            for (u32 k = g * GROUP; k < g * GROUP + GROUP; ++k) any[g] |= test.passes(e[k], walk + filter::class_offset(column(begin + k)));
            any_of_all |= any[g];
        }
        // Also against a threshold out of reach something may pass where u is next to 0.
        if (!any_of_all || state.bound[row(r)] == -softmax::negative_infinity()) return;
        const u32 same_walk = prim::opaque(walk);      // the tests again, not their results kept in registers since
        u32 hits = 0;
#pragma unroll
        for (u32 g = 0; g < CHUNK / GROUP; ++g) {
            if (!any[g]) continue;
#pragma unroll
            for (u32 k = g * GROUP; k < g * GROUP + GROUP; ++k) {
                const bool hit = test.passes(e[k], same_walk + filter::class_offset(column(begin + k)));
                hits |= u32(hit && prim::opaque(first_class) + column(begin + k) < a.problem.vocab) << k;    // nor sums of the class
            }
        }
        float logit[CHUNK];
#pragma unroll
        for (u32 k = 0; k < CHUNK; ++k) logit[k] = at(acc, r, begin + k);
        if (hits != 0) push(hits, row(r) + block * STATE_ROWS % BLOCK_N, first_class + column(begin), logit, row_block_of(block));
    }

    // Exponentials, their sums, and candidates: in chunks, the next one's exponentials beside the present one's tests, which go to
    // another unit of the multiprocessor.
    template <bool CAPTURE>
    __device__ __forceinline__ void add_exponentials(
        u32 block, u32 first_class, float (&acc)[M][C][4], float (&sums)[ROWS], float (&weighted)[ROWS]
    ) const {
        constexpr u32 CHUNKS = CLASSES / CHUNK;
        float e[2][CHUNK];
        exponentials(acc, 0, 0, e[0]);
#pragma unroll
        for (u32 i = 0; i < ROWS * CHUNKS; ++i) {
            const u32 r = i / CHUNKS, begin = i % CHUNKS * CHUNK;
            const float (&now)[CHUNK] = e[i % 2];
            const MaxThreshold row_state = state.row[part][row(r)];
            if (begin == 0) sums[r] = weighted[r] = 0.0f;
            if (a.problem.entropy) {
                const float reference = softmax::reference(row_state.max);
#pragma unroll
                for (u32 k = 0; k < CHUNK; ++k) {
                    if (now[k] != 0.0f) weighted[r] = prim::fma(now[k], at(acc, r, begin + k) - reference, weighted[r]);
                }
            }
            if (i + 1 < ROWS * CHUNKS) exponentials(acc, (i + 1) / CHUNKS, (i + 1) % CHUNKS * CHUNK, e[(i + 1) % 2]);
#pragma unroll
            for (u32 k = 0; k < CHUNK; ++k) sums[r] += now[k];
            if constexpr (CAPTURE) capture(block, first_class, acc, r, begin, now, row_state.threshold);
        }
    }

public:
    // first_row and first_column: of the warp's part.
    __device__ __forceinline__ Epilogue(const LceArgs& a, State& state, u32 part, u32 first_row, u32 first_column)
        : a(a), state(state), part(part), first_row(first_row + threadIdx.x % 32 / 4), first_column(first_column + threadIdx.x % 4 * 2) {
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) sum[k] = 0.0f;
    }

    // By `threads` threads, thread_idx in 0..threads, before a barrier and the first tile.
    static __device__ __forceinline__ void initialise(const LceArgs& a, State& state, u32 block, u32 thread_idx, u32 threads) {
        const u32 num_rows = a.saved.header->num_rows;
        for (u32 i = thread_idx; i < STATE_ROWS; i += threads) {
            const u32 row = block * STATE_ROWS + i;
            const bool there = row < num_rows;
            const float seed = there && a.problem.label_smoothing > 0.0f ? a.forward.seed_logit[row] : 0.0f;
            state.anchor[i] = softmax::is_finite(seed) ? seed : 0.0f;
            state.bound[i] = there && a.capture ? a.forward.bound[row] : -softmax::negative_infinity();
            state.start[i] = there && a.problem.filter == FILTER_UNBIASED ? filter::row_start(a.problem.seed, a.saved.row_token[row]) : 0;
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

    // Before the take() of a tile: between two barriers that no take() crosses, by all threads that take.
    __device__ __forceinline__ void load_bias(u32 tile, u32 thread_idx, u32 threads) {
        const LceProblem& p = a.problem;
        if (!p.bias) return;
        for (u32 i = thread_idx; i < TILE_V; i += threads) {
            const u32 v = tile * TILE_V + i;
            if (v < p.vocab) state.bias[i] = logit_map::bias(p, v);
        }
    }

    // Takes in a tile of products. A warp by itself: no barrier of the block.
    __device__ __forceinline__ void take(u32 block, u32 tile, float (&acc)[M][C][4]) {
        const LceProblem& p = a.problem;
        const u32 first_class = tile * TILE_V + first_column;
        to_logits(first_class, acc);
        find_targets(first_class, acc, block * STATE_ROWS);

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

        float sums[ROWS], weighted[ROWS];
        if (a.capture) add_exponentials<true>(block, first_class, acc, sums, weighted);
        else add_exponentials<false>(block, first_class, acc, sums, weighted);

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
    __device__ __forceinline__ void flush(u32 block, u32 keep, u32 thread_idx, u32 threads, Barrier barrier) {
        const u32 staged = state.staged;
        if (!a.capture || staged <= keep) return;
        const u32 count = staged < STAGING ? staged : STAGING;
        const u32 row_block = row_block_of(block);
        if (thread_idx == 0) state.pool_begin = prim::atomic_add(&a.forward.pools[row_block].count, count);
        barrier();
        const u64 block_begin = u64(row_block) * a.block_entries;
        for (u32 i = thread_idx; i < count; i += threads) {
            const u32 in_pool = state.pool_begin + i;
            if (in_pool < a.block_entries) a.forward.pool[block_begin + in_pool] = state.staging[i];
        }
        if (thread_idx == 0) state.staged = 0;
    }

    // Merges the parts of every row, in order, and writes the share of this block, unless the round had it before. After the last
    // tile, by all threads.
    template <class Barrier>
    __device__ __forceinline__ void finish(Sums<PARTS, STATE_ROWS>& sums, u32 block, u32 split, u32 thread_idx, u32 threads, Barrier barrier) {
#pragma unroll
        for (u32 k = 0; k < OWNED<ROWS>; ++k) {
            if (is_owner<ROWS>()) sums.value[part][row(owned_row<ROWS>(k))] = sum[k];
        }
        barrier();
        if (a.redo) return;
        const u32 num_rows = a.saved.header->num_rows;
        for (u32 i = thread_idx; i < STATE_ROWS; i += threads) {
            const u32 row = block * STATE_ROWS + i;
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
