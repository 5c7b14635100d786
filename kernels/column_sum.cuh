// What the sparse rows give to a class: its entries put in token order, and the rows of E that they name summed in that order.
//
//     dC_v = scale (sum over entries of g E[token] - w_v spread_sum)        dbias_v = sum of g - w_v spread_total
//
// A class's list lies in column_entries in whatever order its entries arrived; no floating-point sum may see that order.
//     up to WARP_LIST entries   a warp ranks them in registers and gathers whole rows: most classes
//     more ("popular")          a team of threads marks the tokens of one segment after the other in shared memory, then gathers a range of
//                               columns, its threads in groups that take batches of entries in turn
#pragma once

#include "abi.h"
#include "gather.cuh"
#include "logit_map.cuh"

namespace column_sum {

using gather::Rows;
using gather::VECTOR;
using prim::Vec16;

constexpr u32 WARP_LIST = 32;                    // longest list that a warp holds, an entry a lane
constexpr u32 SEGMENT = 2048;                    // tokens that a block puts in order at a time
constexpr u32 SEGMENT_WORDS = SEGMENT / 32;
// Vectors that a thread waits for at once; unaligned rows come element by element, and need the registers.
template <bool ALIGNED> constexpr u32 IN_FLIGHT = ALIGNED ? 8 : 2;

struct Order {
    alignas(16) float gradient[SEGMENT];         // by token of the segment; between lists: the groups' partial sums
    alignas(16) prim::u16 token[SEGMENT];        // of the segment's entries, ascending, from the segment's first token
    f64 bias[32];                                // a warp
    u32 bits[SEGMENT_WORDS];                     // tokens that have an entry
    u32 before[SEGMENT_WORDS];                   // entries before a word of bits
    u32 count;                                   // of the segment
    u32 next;                                    // least token beyond the segment
};

// The threads that work on a list together: all of a block.
template <u32 COUNT> struct Block {
    static constexpr u32 THREADS = COUNT;
    static __device__ __forceinline__ u32 thread() { return threadIdx.x; }
    static __device__ __forceinline__ void sync() { __syncthreads(); }
};

struct List { const LceEntry* entries; u32 count; };

// Without lists (all rows are exact ones) column_begin is null.
__device__ __forceinline__ List list_of(const LceArgs& a, u32 class_index) {
    if (a.backward.column_begin == nullptr) return {nullptr, 0};
    const u32 begin = a.backward.column_begin[class_index], end = a.backward.column_begin[class_index + 1];
    return {a.backward.column_entries + begin, end - begin};
}

// Whether the class's row of dC is a product of tiles (tile_products.cu). Its dbias is not.
__device__ __forceinline__ bool in_tiles(const LceArgs& a, u32 class_index) {
    const bool may_be = a.backward.tile_use != TILES_OFF && a.d_classifier.mode != SINK_SKIP;
    return may_be && a.backward.tile_sources[class_index / BLOCK_V] > 0;
}

__device__ __forceinline__ f64 warp_sum(f64 x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += prim::shfl_xor(x, lanes);
    return x;
}

// From the gathered sum to the value: label smoothing's dense part and the scale. `end` as in gather::load.
template <u32 COUNT>
__device__ __forceinline__ void finish(const LceArgs& a, float (&sum)[COUNT], float weight, u32 column, u32 end) {
    const float* spread_sum = a.backward.spread_sum;
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        if (spread_sum != nullptr && column + i < end) sum[i] -= weight * spread_sum[column + i];
        sum[i] *= a.problem.logit_scale;
    }
}

__device__ __forceinline__ float finish_bias(const LceArgs& a, f64 sum, float weight) {
    return a.backward.spread_total == nullptr ? float(sum) : float(sum) - weight * a.backward.spread_total[0];
}

// ---- lists that a warp holds ----------------------------------------------------------------------------------------------
// The k-th entry by token in lane k.
__device__ __forceinline__ LceEntry sorted(const List& list) {
    const u32 lane = threadIdx.x % 32;
    LceEntry own = {NONE, 0.0f};
    if (lane < list.count) own = list.entries[lane];
    if (list.count <= 1) return own;
    u32 rank = 0, source = lane;
    for (u32 k = 0; k < list.count; ++k) rank += prim::shfl_idx(own.index, int(k)) < own.index;
    for (u32 k = 0; k < list.count; ++k) source = prim::shfl_idx(rank, int(k)) == lane ? k : source;
    return {prim::shfl_idx(own.index, int(source)), prim::shfl_idx(own.value, int(source))};
}

// sums[p] += the list's rows at column + p * 32 * VECTOR, IN_FLIGHT vectors at once. The lanes' columns follow each other.
template <class T, bool ALIGNED, u32 PARTS>
__device__ __forceinline__ void add_list(
    float (&sums)[PARTS][VECTOR<T>], const Rows<T>& rows, const LceEntry& sorted_entry, u32 count, u32 column, u32 end
) {
    constexpr u32 ENTRIES = IN_FLIGHT<ALIGNED> / PARTS;
    for (u32 k = 0; k < count; k += ENTRIES) {
        Vec16 v[ENTRIES][PARTS];
#pragma unroll
        for (u32 i = 0; i < ENTRIES; ++i) {
            const u32 lane = k + i < count ? k + i : k, own_end = k + i < count ? end : 0;
            const T* row = rows.data + i64(prim::shfl_idx(sorted_entry.index, int(lane))) * rows.stride;
#pragma unroll
            for (u32 p = 0; p < PARTS; ++p) v[i][p] = gather::load<T, ALIGNED>(row, column + p * 32 * VECTOR<T>, own_end);
        }
#pragma unroll
        for (u32 i = 0; i < ENTRIES; ++i) {
            const float g = prim::shfl_idx(sorted_entry.value, int(k + i) & 31);
            if (k + i >= count) break;
#pragma unroll
            for (u32 p = 0; p < PARTS; ++p) gather::add_scaled<T>(sums[p], g, v[i][p]);
        }
    }
}

// ---- popular classes ------------------------------------------------------------------------------------------------------
// Puts the entries of tokens [begin, begin + SEGMENT) in order. By the whole team; `order` must not be in use beyond a barrier to come.
template <class Team> __device__ __forceinline__ void order_segment(Order& order, const List& list, u32 begin) {
    static_assert(SEGMENT_WORDS == 64, "a lane counts two words");
    Team::sync();                                // the segment before this one has been used
    for (u32 word = Team::thread(); word < SEGMENT_WORDS; word += Team::THREADS) order.bits[word] = 0;
    if (Team::thread() == 0) order.next = NONE;
    Team::sync();
    u32 least = NONE;
#pragma unroll 4
    for (u32 k = Team::thread(); k < list.count; k += Team::THREADS) {
        const LceEntry entry = list.entries[k];
        const u32 at = entry.index - begin;      // tokens before the segment wrap around
        if (at < SEGMENT) {
            order.gradient[at] = entry.value;
            prim::atomic_or(&order.bits[at / 32], 1u << at % 32);
        } else if (entry.index >= begin && entry.index < least) {
            least = entry.index;
        }
    }
    if (least != NONE) prim::atomic_min(&order.next, least);
    Team::sync();
    if (Team::thread() < 32) {
        const u32 lane = Team::thread(), low = u32(prim::popc(order.bits[2 * lane])), own = low + u32(prim::popc(order.bits[2 * lane + 1]));
        u32 through = own;
#pragma unroll
        for (u32 delta = 1; delta < 32; delta *= 2) {
            const u32 below = prim::shfl_up(through, delta);
            if (lane >= delta) through += below;
        }
        order.before[2 * lane] = through - own;
        order.before[2 * lane + 1] = through - own + low;
        if (lane == 31) order.count = through;
    }
    Team::sync();
    for (u32 at = Team::thread(); at < SEGMENT; at += Team::THREADS) {
        const u32 word = order.bits[at / 32], bit = 1u << at % 32;
        if (word & bit) order.token[order.before[at / 32] + u32(prim::popc(word & (bit - 1)))] = prim::u16(at);
    }
    Team::sync();
}

// sum += the segment's rows at `column`; group `group` of `groups` takes every groups-th batch.
template <class T, bool ALIGNED>
__device__ __forceinline__ void add_segment(
    float (&sum)[VECTOR<T>], const Order& order, const Rows<T>& rows, u32 begin, u32 group, u32 groups, u32 column, u32 end
) {
    constexpr u32 BATCH = IN_FLIGHT<ALIGNED>;
    const T* first = rows.data + i64(begin) * rows.stride;
    const u32 count = order.count;
    u32 k = group * BATCH;
    for (; k + BATCH <= count; k += groups * BATCH) {
        Vec16 v[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) v[i] = gather::load<T, ALIGNED>(first + i64(order.token[k + i]) * rows.stride, column, end);
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) gather::add_scaled<T>(sum, order.gradient[order.token[k + i]], v[i]);
    }
    if (k >= count) return;
    Vec16 v[BATCH];                              // this group has the last, short batch
#pragma unroll
    for (u32 i = 0; i < BATCH; ++i) {
        v[i] = {};
        if (k + i < count) v[i] = gather::load<T, ALIGNED>(first + i64(order.token[k + i]) * rows.stride, column, end);
    }
#pragma unroll
    for (u32 i = 0; i < BATCH; ++i)
        if (k + i < count) gather::add_scaled<T>(sum, order.gradient[order.token[k + i]], v[i]);
}

// The sums of a list at columns first .. first + GROUP * VECTOR, left in `sum` of thread t < GROUP for column first + t * VECTOR, and
// the sum of its gradients, returned to thread 0. By the whole team.
template <class T, bool ALIGNED, class Team, u32 GROUP>
__device__ __forceinline__ f64 popular_sum(float (&sum)[VECTOR<T>], Order& order, const Rows<T>& rows, const List& list, u32 first, u32 end) {
    static_assert(Team::THREADS * VECTOR<T> <= SEGMENT, "the groups' sums lie where the gradients were");
    static_assert(Team::THREADS % GROUP == 0 && Team::THREADS <= 1024, "whole groups, a bias sum a warp");
    constexpr u32 GROUPS = Team::THREADS / GROUP;
    const u32 thread = Team::thread();
    const u32 group = thread / GROUP, column = first + thread % GROUP * VECTOR<T>;
#pragma unroll
    for (u32 i = 0; i < VECTOR<T>; ++i) sum[i] = 0.0f;
    f64 bias = 0.0;
    for (u32 begin = 0; begin != NONE; begin = order.next) {
        order_segment<Team>(order, list, begin);
        for (u32 k = thread; k < order.count; k += Team::THREADS) bias += f64(order.gradient[order.token[k]]);
        if (column < end) add_segment<T, ALIGNED>(sum, order, rows, begin, group, GROUPS, column, end);
    }

    Team::sync();                                // the last segment has been used
#pragma unroll
    for (u32 i = 0; i < VECTOR<T>; ++i) order.gradient[thread * VECTOR<T> + i] = sum[i];
    bias = warp_sum(bias);
    if (thread % 32 == 0) order.bias[thread / 32] = bias;
    Team::sync();
    if (thread < GROUP) {
        for (u32 other = 1; other < GROUPS; ++other)
#pragma unroll
            for (u32 i = 0; i < VECTOR<T>; ++i) sum[i] += order.gradient[(other * GROUP + thread) * VECTOR<T> + i];
    }
    bias = 0.0;
    if (thread == 0)
        for (u32 warp = 0; warp < Team::THREADS / 32; ++warp) bias += order.bias[warp];
    return bias;
}

// ---- a tile of classes x columns, for the exact path ----------------------------------------------------------------------
// Adds what the sparse rows give to classes first_class .. + classes at columns [begin, end), begin a multiple of 8, to `tile`
// [classes][stride] in shared memory, and to bias[classes] in shared memory where it is not null. A popular class's list is put in order once
// every SPAN columns. By the whole team; the first and the last thing it does is a barrier.
template <class T, bool ALIGNED, u32 SPAN, class Team>
__device__ __forceinline__ void add_to_tile(
    const LceArgs& a, Order& order, u32 first_class, u32 classes, u32 begin, u32 end, float* tile, u32 stride, float* bias
) {
    const Rows<T> rows = gather::embeddings<T>(a.problem);
    const u32 thread = Team::thread(), lane = thread % 32;
    const bool dense = a.backward.spread_sum != nullptr || a.backward.spread_total != nullptr;
    // Entries of the lane's class among 32: mostly none, and a warp need not find that out class by class.
    const auto count_of = [&](u32 first) { return first + lane < classes ? list_of(a, first_class + first + lane).count : 0; };
    Team::sync();
    for (u32 first = 0; first < classes; first += 32) {
        const u32 count = count_of(first);
        u32 few = prim::ballot(first + lane < classes && count <= WARP_LIST && (count > 0 || dense));
        for (; few != 0; few &= few - 1) {
            const u32 c = first + u32(prim::ffs(few)) - 1;
            if (c % (Team::THREADS / 32) != thread / 32) continue;
            const List list = list_of(a, first_class + c);
            const float weight = logit_map::class_weight(a.problem, first_class + c);
            const LceEntry entry = sorted(list);
            for (u32 column0 = begin; column0 < end; column0 += 32 * VECTOR<T>) {
                const u32 column = column0 + lane * VECTOR<T>;
                float sum[1][VECTOR<T>] = {};
                add_list<T, ALIGNED, 1>(sum, rows, entry, list.count, column, end);
                finish(a, sum[0], weight, column, end);
#pragma unroll
                for (u32 i = 0; i < VECTOR<T>; ++i)
                    if (column + i < end) tile[c * stride + column + i - begin] += sum[0][i];
            }
            const f64 bias_sum = warp_sum(f64(entry.value));
            if (bias != nullptr && lane == 0) bias[c] += finish_bias(a, bias_sum, weight);
        }
    }

    constexpr u32 GROUP = SPAN / VECTOR<T>;
    for (u32 first = 0; first < classes; first += 32) {
        for (u32 many = prim::ballot(count_of(first) > WARP_LIST); many != 0; many &= many - 1) {      // the same in every warp
            const u32 c = first + u32(prim::ffs(many)) - 1;
            const List list = list_of(a, first_class + c);
            const float weight = logit_map::class_weight(a.problem, first_class + c);
            for (u32 column0 = begin; column0 < end || column0 == begin; column0 += SPAN) {
                float sum[VECTOR<T>];
                const f64 bias_sum = popular_sum<T, ALIGNED, Team, GROUP>(sum, order, rows, list, column0, end);
                if (thread < GROUP) {
                    const u32 column = column0 + thread * VECTOR<T>;
                    finish(a, sum, weight, column, end);
#pragma unroll
                    for (u32 i = 0; i < VECTOR<T>; ++i)
                        if (column + i < end) tile[c * stride + column + i - begin] += sum[i];
                }
                if (bias != nullptr && column0 == begin && thread == 0) bias[c] += finish_bias(a, bias_sum, weight);
            }
        }
    }
    Team::sync();
}

}  // namespace column_sum
