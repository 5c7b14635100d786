// dC and dbias where every row is sparse: each class finished by one owner, from its list of entries. Of classes that multiply tiles
// dbias alone.
//
//     grid P + ceil(V / 16), 256 threads; P >= 1 as the host likes (2 to 4 a SM), no result depends on it
//     blocks 0 .. P             the popular classes (more than 32 entries): items of (class, 64 vectors of columns), every P-th item;
//                               four groups of 64 threads take batches of 8 entries in turn
//     blocks P ..               16 classes each, a warp a class: whole rows, from up to 32 entries in the lanes' registers
//
// What bounds it: the store of dC, V D elements, streamed past L2; then the gathered rows of E, which mostly fit L2. Most classes of a
// large vocabulary have no entry and cost their zeros alone (nothing where dC is accumulated). A class that all tokens keep is N rows of E:
// its columns are spread over ceil(D / 512) blocks (16 bits), which start first, so that the small classes run beside them and
// the tail is one such item, N / 32 rounds of loads, about 0.2 ms for N = 8192 by estimate.
#include "abi.h"
#include "column_sum.cuh"
#include "gather.cuh"
#include "logit_map.cuh"
#include "sink.cuh"

namespace {

using column_sum::List;
using column_sum::Order;
using gather::Rows;
using gather::VECTOR;
using prim::bf16;
using prim::f16;

constexpr u32 THREADS = 256;
constexpr u32 CLASSES = 16;                      // of a block
constexpr u32 WARP_CLASSES = CLASSES / (THREADS / 32);
constexpr u32 GROUP = 64;                        // threads that share a popular class's columns
template <bool ALIGNED> constexpr u32 PARTS = ALIGNED ? 2 : 1;       // vectors of a lane, of a class that a warp holds

template <class T, bool ALIGNED> __device__ __forceinline__ void popular_classes(const LceArgs& a, u32 blocks) {
    constexpr u32 SPAN = GROUP * VECTOR<T>;      // columns of an item
    if (a.backward.column_begin == nullptr) return;
    Order& order = prim::shared_memory<Order>();
    const Rows<T> rows = gather::embeddings<T>(a.problem);
    const u32 hidden = a.d_classifier.mode == SINK_SKIP ? 0 : a.problem.hidden;
    const u32 spans = hidden == 0 ? 1 : (hidden + SPAN - 1) / SPAN;
    const u32 popular = a.backward.column_block_sum[(a.problem.vocab + 4095) / 4096];
    u32 slot = blockIdx.x / spans, span = blockIdx.x % spans;
    for (; slot < popular; slot += blocks / spans + (span + blocks % spans >= spans), span = (span + blocks % spans) % spans) {
        const u32 class_index = a.backward.popular_classes[slot], first = span * SPAN;
        const bool bias_alone = column_sum::in_tiles(a, class_index);
        if (bias_alone && (first > 0 || a.d_bias.mode == SINK_SKIP)) continue;
        const u32 end = bias_alone ? 0 : hidden;
        const float weight = logit_map::class_weight(a.problem, class_index);
        float sum[VECTOR<T>];
        const List list = column_sum::list_of(a, class_index);
        const f64 bias = column_sum::popular_sum<T, ALIGNED, column_sum::Block<THREADS>, GROUP>(sum, order, rows, list, first, end);
        const u32 column = first + threadIdx.x * VECTOR<T>;
        if (threadIdx.x < GROUP && column < end) {
            column_sum::finish(a, sum, weight, column, end);
            sink::put<true>(a.d_classifier, u64(class_index) * a.problem.hidden + column, sum, end - column);
        }
        if (threadIdx.x == 0 && first == 0) sink::put_one(a.d_bias, class_index, column_sum::finish_bias(a, bias, weight));
    }
}

__device__ __forceinline__ void put_zeros(const LceSink& to, u64 offset, u32 count) {
    if (to.mode != SINK_OVERWRITE) return;
    const float zeros[8] = {};
    for (u32 at = threadIdx.x % 32 * 8; at < count; at += 32 * 8) sink::put<true>(to, offset + at, zeros, count - at);
}

template <class T, bool ALIGNED> __device__ __forceinline__ void warp_classes(const LceArgs& a, u32 block) {
    const Rows<T> rows = gather::embeddings<T>(a.problem);
    const u32 hidden = a.problem.hidden, lane = threadIdx.x % 32;
    const u32 first = block * CLASSES + threadIdx.x / 32 * WARP_CLASSES;
    for (u32 class_index = first; class_index < first + WARP_CLASSES && class_index < a.problem.vocab; ++class_index) {
        const List list = column_sum::list_of(a, class_index);
        if (list.count > column_sum::WARP_LIST) continue;
        const float weight = logit_map::class_weight(a.problem, class_index);
        const LceEntry entry = column_sum::sorted(list);
        if (a.d_bias.mode != SINK_SKIP) {
            const f64 bias = column_sum::warp_sum(f64(entry.value));
            if (lane == 0) sink::put_one(a.d_bias, class_index, column_sum::finish_bias(a, bias, weight));
        }
        if (a.d_classifier.mode == SINK_SKIP || column_sum::in_tiles(a, class_index)) continue;
        const u64 offset = u64(class_index) * hidden;
        if (list.count == 0 && a.backward.spread_sum == nullptr) {
            put_zeros(a.d_classifier, offset, hidden);
            continue;
        }
        for (u32 slab = 0; slab < hidden; slab += PARTS<ALIGNED> * 32 * VECTOR<T>) {
            const u32 column = slab + lane * VECTOR<T>;
            float sums[PARTS<ALIGNED>][VECTOR<T>] = {};
            column_sum::add_list<T, ALIGNED, PARTS<ALIGNED>>(sums, rows, entry, list.count, column, hidden);
#pragma unroll
            for (u32 part = 0; part < PARTS<ALIGNED>; ++part) {
                const u32 at = column + part * 32 * VECTOR<T>;
                if (at >= hidden) continue;
                column_sum::finish(a, sums[part], weight, at, hidden);
                sink::put<true>(a.d_classifier, offset + at, sums[part], hidden - at);
            }
        }
    }
}

template <class T, bool ALIGNED> __device__ __forceinline__ void finish_classes(const LceArgs& a) {
    const u32 popular_blocks = gridDim.x - (a.problem.vocab + CLASSES - 1) / CLASSES;
    if (blockIdx.x < popular_blocks) popular_classes<T, ALIGNED>(a, popular_blocks);
    else warp_classes<T, ALIGNED>(a, blockIdx.x - popular_blocks);
}

template <class T> __device__ __forceinline__ void d_classifier(const LceArgs& a) {
    // With exact rows lce_exact writes every class: an output has one writer and one rounding.
    if (a.saved.header->exact_rows > 0) return;
    if (gather::aligned(gather::embeddings<T>(a.problem))) finish_classes<T, true>(a);
    else finish_classes<T, false>(a);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 3) lce_d_classifier_f32(const __grid_constant__ LceArgs a) { d_classifier<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 3) lce_d_classifier_f16(const __grid_constant__ LceArgs a) { d_classifier<f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 3) lce_d_classifier_bf16(const __grid_constant__ LceArgs a) { d_classifier<bf16>(a); }
