// dE of every sparse row, and dC and dbias of the frequent classes: those that so many rows keep that a dense product costs less than to
// gather a row of E, and one of C, for each entry. G of these classes is multiplied tile by tile (frequent_tile.cuh); a row's other
// entries are gathered, as in d_embeddings.cu, on top of the product.
//
//     dE_i = scale (sum over frequent classes of g C[class] + sum over the other entries of g C[class] - spread_i class_sum)
//     dC_v = scale (sum over rows of g E[token] - w_v spread_sum)                dbias_v = sum of g - w_v spread_total
//
// Items of work, drawn from one counter, the longest first: dE of 128 rows x 128 columns, dC of 128 classes x 128 columns, dbias of 128
// classes. Every output element has one owner, one order of additions and one rounding; who draws an item changes nothing.
//
// What bounds it: products, by tensor cores, and gathered rows of C, by L2; the two blocks of a multiprocessor overlap one's with the
// other's. G is rounded to the input type, divided by a power of two first, as on the exact path. No row takes that path here
// (columns.cu). Rows of E and C begin at multiples of 16 bytes and are whole vectors (the plan sees to that).
#include "column_sum.cuh"
#include "frequent_tile.cuh"
#include "gather.cuh"
#include "gradient_scale.cuh"
#include "logit_map.cuh"
#include "row_list.cuh"
#include "sink.cuh"

namespace frequent {

using gather::VECTOR;
using prim::bf16;
using prim::f16;

// ---- sizes and shared memory ----------------------------------------------------------------------------------------------
// Where a multiprocessor has 100 KiB of shared memory it holds one block.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr u32 BLOCKS_PER_SM = 1;
#else
constexpr u32 BLOCKS_PER_SM = 2;
#endif
constexpr u32 WARPS = THREADS / 32;
constexpr u32 STAGED_STRIDE = TILE + 4;      // words of a row of a staged tile: not all rows in the same banks
constexpr u32 QUEUE = 128;                   // entries of a row that a warp looks at at a time
constexpr u32 IN_FLIGHT = 8;                 // vectors that a thread waits for at once

struct Queue {                               // of a warp: entries of a row whose classes are not frequent
    u32 class_index[QUEUE];
    float gradient[QUEUE];
};

struct Smem {
    union {
        Operands<bf16> operands;             // of any 16 bits
        float staged[TILE * STAGED_STRIDE];  // a tile in f32
    };
    Queue queues[WARPS];
    f64 bias[TILE];
    u32 item;
    u32 next_row;                            // of a tile of dE, for the next warp that is free
};
static_assert(sizeof(Smem) <= 96 * 1024, "devices with 99 KB of shared memory run one block");

// ---- rows of the right operand, for gradient_product ------------------------------------------------------------------------
struct FrequentClasses {                     // k -> class
    const u32* frequent_class;
    u32 count;
    __device__ __forceinline__ u32 operator()(u32 k) const { return k < count ? frequent_class[k] : NONE; }
};

struct Tokens {                              // k-th row -> token; a row with a bad target has no entry, and may be NaN
    const u32 *row_token, *row_class;
    u32 count;
    __device__ __forceinline__ u32 operator()(u32 k) const { return k < count && row_class[k] != NONE ? row_token[k] : NONE; }
};

// ---- staging ----------------------------------------------------------------------------------------------------------------
// The block's tile to shared memory, times `factor`; complete behind a barrier to come.
__device__ __forceinline__ void stage(float* staged, const Accumulators& acc, float factor) {
    const u32 thread = gradient_product::own_thread();
#pragma unroll
    for (u32 m = 0; m < 4; ++m)
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                const u32 at = gradient_product::row_of(thread, m, h) * STAGED_STRIDE + gradient_product::column_of(thread, n);
                const float first = acc[m][n][2 * h] * factor, second = acc[m][n][2 * h + 1] * factor;
                *reinterpret_cast<u64*>(&staged[at]) = prim::f32_bits(first) | u64(prim::f32_bits(second)) << 32;
            }
}

template <u32 COUNT> __device__ __forceinline__ void load_staged(float (&values)[COUNT], const float* from) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i += 4) {
        const Vec16 v = *reinterpret_cast<const Vec16*>(from + i);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) values[i + j] = prim::bits_f32(v.w[j]);
    }
}

// ---- dE of 128 rows and 128 columns -----------------------------------------------------------------------------------------
// Entries [base, base + QUEUE) of a row that are not of frequent classes, in their order, into the warp's queue; their number. The
// gradients are times logit_scale. The queue must be free, and is complete for the warp.
__device__ __forceinline__ u32 fill_queue(const LceArgs& a, Queue& queue, const RowList& list, u32 base, u32 row) {
    const u32 lane = threadIdx.x % 32, target = a.saved.row_class[row];
    const LceRowStatistics statistics = a.saved.statistics[row];     // here: not in registers while rows of C are summed
    const LceCoefficients c = a.backward.coefficients[row];
    LceEntry entries[QUEUE / 32];
    bool rest[QUEUE / 32];
#pragma unroll
    for (u32 i = 0; i < QUEUE / 32; ++i) {
        const u32 k = base + i * 32 + lane;
        entries[i] = {NONE, 0.0f};
        if (k < list.count) entries[i] = list.entries[k];
    }
#pragma unroll
    for (u32 i = 0; i < QUEUE / 32; ++i) rest[i] = entries[i].index != NONE && !column_sum::is_frequent(a, entries[i].index);
    u32 count = 0;
#pragma unroll
    for (u32 i = 0; i < QUEUE / 32; ++i) {
        const u32 present = prim::ballot(rest[i]);
        if (rest[i]) {
            const u32 slot = count + u32(prim::popc(present & ((1u << lane) - 1)));
            const LceEntry entry = entries[i];
            queue.class_index[slot] = entry.index;
            queue.gradient[slot] = gradient::of_entry(a.problem, statistics, c, entry.value, entry.index == target) * a.problem.logit_scale;
        }
        count += u32(prim::popc(present));
    }
    prim::syncwarp();
    return count;
}

// sum += the queue's rows of C at `column`, eight columns a lane: half a warp takes every other entry.
template <class T>
__device__ __forceinline__ void add_queue(float (&sum)[8], const Queue& queue, u32 count, const gather::Rows<T>& rows, u32 column) {
    for (u32 k = threadIdx.x % 32 / 16; k < count; k += 2 * IN_FLIGHT) {
        Vec16 v[IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; ++i) {
            v[i] = {};
            if (k + 2 * i < count) v[i] = gather::load<T, true>(rows.data + i64(queue.class_index[k + 2 * i]) * rows.stride, column, rows.hidden);
        }
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; ++i)
            if (k + 2 * i < count) gather::add_scaled<T>(sum, queue.gradient[k + 2 * i], v[i]);
    }
}

// A row's other entries on top of its staged product, to the sink. A warp.
template <class T> __device__ __forceinline__ void finish_row(const LceArgs& a, Smem& smem, u32 row, u32 column0) {
    const LceProblem& p = a.problem;
    if (a.saved.row_class[row] == NONE) return;  // d_embeddings.cu poisons it
    const RowList list = row_list(a, row);
    const u32 lane = threadIdx.x % 32, in_tile = lane % 16 * 8, column = column0 + in_tile;

    float sum[8] = {};
    if (lane < 16) load_staged(sum, &smem.staged[row % TILE * STAGED_STRIDE + in_tile]);
    Queue& queue = smem.queues[threadIdx.x / 32];
    for (u32 base = 0; base < list.count; base += QUEUE) {
        prim::syncwarp();                        // the entries before have been used
        const u32 count = fill_queue(a, queue, list, base, row);
        add_queue<T>(sum, queue, count, gather::classifier<T>(p), column);
    }
    prim::syncwarp();
#pragma unroll
    for (u32 i = 0; i < 8; ++i) sum[i] += prim::shfl_xor(sum[i], 16);
    if (lane >= 16 || column >= p.hidden) return;
    if (a.backward.class_sum != nullptr) {
        const float spread = a.backward.coefficients[row].spread;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) sum[i] -= spread * p.logit_scale * a.backward.class_sum[column + i];
    }
    sink::put<false>(a.d_embeddings, u64(a.saved.row_token[row]) * p.hidden + column, sum, p.hidden - column);
}

template <class T> __device__ __forceinline__ void d_embeddings_tile(const LceArgs& a, Smem& smem, u32 row_block, u32 column0) {
    const LceProblem& p = a.problem;
    Operands<T>& operands = reinterpret_cast<Operands<T>&>(smem.operands);
    {
        Accumulators acc;
        const gradient_product::Right<T, FrequentClasses> right = {
            static_cast<const T*>(p.classifier), p.classifier_stride, {a.backward.frequent_class, a.backward.columns->frequent}, column0, p.hidden};
        multiply<T, false>(acc, operands, num_tiles(a), [&](u32 tile) { return list_of(a, row_block, tile); }, right);
        stage(smem.staged, acc, gradient::scale_of<T>(a.backward.exact_scale[0]).up * p.logit_scale);
    }
    if (threadIdx.x == 0) smem.next_row = row_block * TILE;
    __syncthreads();
    const u32 num_rows = a.saved.header->num_rows, end = (row_block + 1) * TILE < num_rows ? (row_block + 1) * TILE : num_rows;
    for (;;) {
        u32 row = 0;
        if (threadIdx.x % 32 == 0) row = prim::atomic_add(&smem.next_row, 1u);
        row = prim::shfl_idx(row, 0);
        if (row >= end) return;
        finish_row<T>(a, smem, row, column0);
    }
}

// ---- dC of 128 frequent classes and 128 columns -----------------------------------------------------------------------------
template <class T> __device__ __forceinline__ void d_classifier_tile(const LceArgs& a, Smem& smem, u32 tile, u32 column0) {
    const LceProblem& p = a.problem;
    Operands<T>& operands = reinterpret_cast<Operands<T>&>(smem.operands);
    {
        Accumulators acc;
        const u32 num_rows = a.saved.header->num_rows, row_blocks = (num_rows + TILE - 1) / TILE;
        const gradient_product::Right<T, Tokens> right = {
            static_cast<const T*>(p.embeddings), p.embeddings_stride, {a.saved.row_token, a.saved.row_class, num_rows}, column0, p.hidden};
        multiply<T, true>(acc, operands, row_blocks, [&](u32 row_block) { return list_of(a, row_block, tile); }, right);
        stage(smem.staged, acc, gradient::scale_of<T>(a.backward.exact_scale[0]).up);
    }
    __syncthreads();
    const u32 in_tile = threadIdx.x % 32 * 4, column = column0 + in_tile;
    for (u32 k = threadIdx.x / 32; k < TILE && tile * TILE + k < a.backward.columns->frequent && column < p.hidden; k += WARPS) {
        const u32 class_index = a.backward.frequent_class[tile * TILE + k];
        float values[4];
        load_staged(values, &smem.staged[k * STAGED_STRIDE + in_tile]);
        column_sum::finish(a, values, logit_map::class_weight(p, class_index), column, p.hidden);
        sink::put<true>(a.d_classifier, u64(class_index) * p.hidden + column, values, p.hidden - column);
    }
}

// ---- dbias of 128 frequent classes: in f32, each class's gradients in order of its rows ----------------------------------------
__device__ __forceinline__ void d_bias_tile(const LceArgs& a, Smem& smem, u32 tile, float up) {
    const u32 row_blocks = (a.saved.header->num_rows + TILE - 1) / TILE, c = threadIdx.x % TILE, half = threadIdx.x / TILE;
    f64 sum = 0.0;
    for (u32 row_block = 0; row_block < row_blocks; ++row_block) {
        for (u32 at = threadIdx.x; at < TILE * STAGED_STRIDE; at += THREADS) smem.staged[at] = 0.0f;
        __syncthreads();
        for_each_entry(list_of(a, row_block, tile), [&](LceEntry e) { smem.staged[e.index / TILE * STAGED_STRIDE + e.index % TILE] = e.value; });
        __syncthreads();
        for (u32 r = half * (TILE / 2); r < (half + 1) * (TILE / 2); ++r) sum += f64(smem.staged[r * STAGED_STRIDE + c]);
        __syncthreads();
    }
    if (half == 1) smem.bias[c] = sum;
    __syncthreads();
    if (half == 1 || tile * TILE + c >= a.backward.columns->frequent) return;
    const u32 class_index = a.backward.frequent_class[tile * TILE + c];
    const float weight = logit_map::class_weight(a.problem, class_index);
    sink::put_one(a.d_bias, class_index, column_sum::finish_bias(a, (sum + smem.bias[c]) * f64(up), weight));
}

// ---- items of work ------------------------------------------------------------------------------------------------------------
template <class T> __device__ __forceinline__ void run(const LceArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 tiles = num_tiles(a), row_blocks = (a.saved.header->num_rows + TILE - 1) / TILE;
    if (tiles == 0) return;
    const u32 columns = (a.problem.hidden + TILE - 1) / TILE;
    const u32 d_embeddings = a.d_embeddings.mode == SINK_SKIP ? 0 : row_blocks * columns;
    const u32 d_classifier = a.d_classifier.mode == SINK_SKIP ? 0 : tiles * columns, d_bias = a.d_bias.mode == SINK_SKIP ? 0 : tiles;
    for (;;) {
        if (threadIdx.x == 0) smem.item = prim::atomic_add(&a.backward.columns->next_item, 1u);
        __syncthreads();                         // the item before this one is done; every item has a barrier behind this read
        u32 item = smem.item;
        if (item < d_embeddings) {
            d_embeddings_tile<T>(a, smem, item / columns, item % columns * TILE);
            continue;
        }
        item -= d_embeddings;
        if (item < d_classifier) {
            d_classifier_tile<T>(a, smem, item / columns, item % columns * TILE);
            continue;
        }
        item -= d_classifier;
        if (item >= d_bias) return;
        d_bias_tile(a, smem, item, gradient::scale_of<T>(a.backward.exact_scale[0]).up);
    }
}

}  // namespace frequent

extern "C" __global__ void __launch_bounds__(frequent::THREADS, frequent::BLOCKS_PER_SM)
lce_frequent_f16(const __grid_constant__ LceArgs a) { frequent::run<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(frequent::THREADS, frequent::BLOCKS_PER_SM)
lce_frequent_bf16(const __grid_constant__ LceArgs a) { frequent::run<prim::bf16>(a); }
