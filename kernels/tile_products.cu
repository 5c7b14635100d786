// dE of the blocks of rows, and dC of the blocks of classes, that multiply tiles (tile_lists.cu).
//
//     dE_i = scale (sum over sources of g C[class] + sum over the row's other entries of g C[class] - spread_i class_sum)
//     dC_v = scale (sum over sources of g E[token] - w_v spread_sum)
//
// Items of work, 128 owners x 128 columns, are drawn from one counter. Every output element has one owner, one order of additions and one
// rounding; who draws an item changes nothing. A row's other entries are gathered as in d_embeddings.cu, on top of the product.
//
// What bounds it: products, by tensor cores, and gathered rows of C, by L2; the two blocks of a multiprocessor overlap one's with the
// other's. G is rounded to the input type, divided by a power of two first, as on the exact path. Rows of E and C begin at multiples of 16
// bytes and are whole vectors (the plan sees to that).
#include "column_sum.cuh"
#include "gather.cuh"
#include "gradient_scale.cuh"
#include "logit_map.cuh"
#include "row_list.cuh"
#include "sink.cuh"
#include "tiles.cuh"

namespace tiles {

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

struct Queue {                               // of a warp: entries of a row that are in no tile
    u32 class_index[QUEUE];
    float gradient[QUEUE];
};

struct Smem {
    union {
        Operands<prim::bf16> operands;             // of any 16 bits
        float staged[TILE * STAGED_STRIDE];  // a tile in f32
    };
    Queue queues[WARPS];
    u32 item;
    u32 next_row;                            // of a tile of dE, for the next warp that is free
};
static_assert(sizeof(Smem) <= 96 * 1024, "devices with 99 KB of shared memory run one block");

// ---- staging ----------------------------------------------------------------------------------------------------------------
template <u32 COUNT> __device__ __forceinline__ void load_staged(float (&values)[COUNT], const float* from) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i += 4) {
        const Vec16 v = *reinterpret_cast<const Vec16*>(from + i);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) values[i + j] = prim::bits_f32(v.w[j]);
    }
}

// ---- dE of 128 rows and 128 columns -----------------------------------------------------------------------------------------
// Entries [base, base + QUEUE) of a row that are in no tile, in their order, into the warp's queue; their number. The gradients are times
// logit_scale. The queue must be free, and is complete for the warp.
__device__ __forceinline__ u32 fill_queue(const LceArgs& a, Queue& queue, const RowList& list, u32 base, u32 row) {
    const u32* in_tile = in_tile_of(a, row / TILE);
    const u32 lane = threadIdx.x % 32, place = a.saved.entry_begin[row], target = a.saved.row_class[row];
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
    for (u32 i = 0; i < QUEUE / 32; ++i) {
        const u32 k = base + i * 32 + lane;
        rest[i] = k < list.count && (in_tile[(place + k) / 32] >> (place + k) % 32 & 1) == 0;
    }
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
    if (a.saved.row_class[row] == NONE || a.saved.entry_count[row] == NONE) return;     // poisoned by d_embeddings.cu; left to the exact path
    const RowList list = row_list(a, row);
    const u32 lane = threadIdx.x % 32, offset = lane % 16 * 8, column = column0 + offset;

    float sum[8] = {};
    if (lane < 16) load_staged(sum, &smem.staged[row % TILE * STAGED_STRIDE + offset]);
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

// Tile by tile of the block's sources into the staged tile, times `factor`. Complete behind a barrier.
template <class T>
__device__ __forceinline__ void product(
    const LceArgs& a, Smem& smem, const Block& block, const gather::Rows<T>& rows, u32 column0, float factor
) {
    Accumulators acc;
    const gradient_product::Right<T, Sources> right = {
        rows.data, rows.stride, {sources_of(a, block), num_sources(a, block)}, column0, rows.hidden};
    multiply<T>(acc, reinterpret_cast<Operands<T>&>(smem.operands), a, block, right);
    gradient_product::stage<STAGED_STRIDE>(smem.staged, acc, factor * gradient::scale_of<T>(a.backward.exact_scale[0]).up);
}

template <class T> __device__ __forceinline__ void d_embeddings(const LceArgs& a, Smem& smem, u32 row_block, u32 column0) {
    product<T>(a, smem, of_rows(a, row_block), gather::classifier<T>(a.problem), column0, a.problem.logit_scale);
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

// ---- dC of 128 classes and 128 columns --------------------------------------------------------------------------------------
template <class T> __device__ __forceinline__ void d_classifier(const LceArgs& a, Smem& smem, u32 tile, u32 column0) {
    const LceProblem& p = a.problem;
    product<T>(a, smem, of_classes(a, tile), gather::embeddings<T>(p), column0, 1.0f);
    __syncthreads();
    const u32 offset = threadIdx.x % 32 * 4, column = column0 + offset, end = (tile + 1) * TILE < p.vocab ? (tile + 1) * TILE : p.vocab;
    for (u32 v = tile * TILE + threadIdx.x / 32; v < end && column < p.hidden; v += WARPS) {
        float values[4];
        load_staged(values, &smem.staged[v % TILE * STAGED_STRIDE + offset]);
        column_sum::finish(a, values, logit_map::class_weight(p, v), column, p.hidden);
        sink::put<true>(a.d_classifier, u64(v) * p.hidden + column, values, p.hidden - column);
    }
}

// ---- items of work ------------------------------------------------------------------------------------------------------------
// use(block, column0) for every active block and 128 columns of D, shared out among the grid.
template <class Use> __device__ __forceinline__ void for_each_item(const LceArgs& a, Smem& smem, Use use) {
    const u32 columns = (a.problem.hidden + TILE - 1) / TILE, items = a.backward.tile_work->active * columns;
    for (;;) {
        if (threadIdx.x == 0) smem.item = prim::atomic_add(&a.backward.tile_work->next_item, 1u);
        __syncthreads();                         // the item before this one is done; every item has a barrier behind this read
        const u32 item = smem.item;
        if (item >= items) return;
        use(a.backward.active_blocks[item / columns], item % columns * TILE);
    }
}

template <class T> __device__ __forceinline__ void d_embeddings_tiles(const LceArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    for_each_item(a, smem, [&](u32 row_block, u32 column0) { d_embeddings<T>(a, smem, row_block, column0); });
}

template <class T> __device__ __forceinline__ void d_classifier_tiles(const LceArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    for_each_item(a, smem, [&](u32 tile, u32 column0) { d_classifier<T>(a, smem, tile, column0); });
}

}  // namespace tiles

#define PRODUCTS(name, type, run) \
    extern "C" __global__ void __launch_bounds__(tiles::THREADS, tiles::BLOCKS_PER_SM) name(const __grid_constant__ LceArgs a) { run<type>(a); }

PRODUCTS(lce_d_embeddings_tiles_f16, prim::f16, tiles::d_embeddings_tiles)
PRODUCTS(lce_d_embeddings_tiles_bf16, prim::bf16, tiles::d_embeddings_tiles)
PRODUCTS(lce_d_classifier_tiles_f16, prim::f16, tiles::d_classifier_tiles)
PRODUCTS(lce_d_classifier_tiles_bf16, prim::bf16, tiles::d_classifier_tiles)
