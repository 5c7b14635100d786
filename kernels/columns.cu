// The kept entries regrouped by class: count, scan, scatter. Row lists (class, logit) become column lists (token, dL/dz).
//
//     lce_column_count    column_begin[v + 1] = entries of class v                            (zero before)
//     lce_column_scan_*   column_begin[v + 1] = entries of classes below v; the popular classes' list
//     lce_column_scatter  column_begin[v + 1] runs up to the entries of classes through v: the list of v is [v] .. [v + 1]
//
// Slots within a list are given out by atomics and mean nothing: who sums a list puts it in token order first (column_sum.cuh).
// Each popular class is a counter that up to N rows add to; the adds are spread over time by the rows' other work.
#include "abi.h"
#include "block_scan.cuh"
#include "column_sum.cuh"
#include "row_list.cuh"

namespace {

constexpr u32 THREADS = 256;
constexpr u32 PER_THREAD = 16;
constexpr u32 SCAN = THREADS * PER_THREAD;       // classes that a block scans: the 4096 of column_block_sum

// ---- scan ---------------------------------------------------------------------------------------------------------------
using ScanSpace = block::ScanSpace<THREADS>;

// The thread's PER_THREAD values of a block's SCAN, 0 beyond `count`.
__device__ __forceinline__ u32 load_share(u32 (&values)[PER_THREAD], const u32* from, u32 first, u32 count) {
    u32 sum = 0;
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        values[i] = first + i < count ? from[first + i] : 0;
        sum += values[i];
    }
    return sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_column_count(const __grid_constant__ LceArgs a) {
    const RowList list = row_list(a, blockIdx.x * (THREADS / 32) + threadIdx.x / 32);
    for (u32 k = threadIdx.x % 32; k < list.count; k += 32) prim::atomic_add(&a.backward.column_begin[list.entries[k].index + 1], 1u);
}

// <ceil(V / 4096), 256>: sums of the blocks' counts.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scan_a(const __grid_constant__ LceArgs a) {
    u32 values[PER_THREAD];
    const u32 sum = load_share(values, a.backward.column_begin + 1, blockIdx.x * SCAN + threadIdx.x * PER_THREAD, a.problem.vocab);
    u32 total;
    block::exclusive_scan<THREADS>(prim::shared_memory<ScanSpace>(), sum, total);
    if (threadIdx.x == 0) a.backward.column_block_sum[blockIdx.x] = total;
}

// <1, 256>: entries before each block.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scan_b(const __grid_constant__ LceArgs a) {
    ScanSpace& space = prim::shared_memory<ScanSpace>();
    const u32 blocks = (a.problem.vocab + SCAN - 1) / SCAN;
    u32* sums = a.backward.column_block_sum;
    u32 carry = 0;
    for (u32 base = 0; base < blocks; base += SCAN) {
        u32 values[PER_THREAD], total;
        const u32 first = base + threadIdx.x * PER_THREAD;
        u32 before = carry + block::exclusive_scan<THREADS>(space, load_share(values, sums, first, blocks), total);
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            if (first + i < blocks) sums[first + i] = before;
            before += values[i];
        }
        carry += total;
    }
    if (threadIdx.x == 0) sums[blocks] = 0;      // of popular classes
}

// <ceil(V / 4096), 256>: entries before each class.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scan_c(const __grid_constant__ LceArgs a) {
    ScanSpace& space = prim::shared_memory<ScanSpace>();
    const u32 vocab = a.problem.vocab, first = blockIdx.x * SCAN + threadIdx.x * PER_THREAD;
    u32* popular = &a.backward.column_block_sum[(vocab + SCAN - 1) / SCAN];
    u32 values[PER_THREAD], total;
    const u32 own = load_share(values, a.backward.column_begin + 1, first, vocab);
    u32 before = a.backward.column_block_sum[blockIdx.x] + block::exclusive_scan<THREADS>(space, own, total);
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        if (first + i < vocab) a.backward.column_begin[first + i + 1] = before;
        before += values[i];
        // In any order: each has its own output.
        if (values[i] > column_sum::WARP_LIST) a.backward.popular_classes[prim::atomic_add(popular, 1u)] = first + i;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scatter(const __grid_constant__ LceArgs a) {
    const u32 row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const RowList list = row_list(a, row);
    if (list.count == 0) return;
    const LceRowStatistics statistics = a.saved.statistics[row];
    const LceCoefficients c = a.backward.coefficients[row];
    const u32 token = a.saved.row_token[row], target = a.saved.row_class[row];
    for (u32 k = threadIdx.x % 32; k < list.count; k += 32) {
        const LceEntry entry = list.entries[k];
        const float g = gradient::of_entry(a.problem, statistics, c, entry.value, entry.index == target);
        a.backward.column_entries[prim::atomic_add(&a.backward.column_begin[entry.index + 1], 1u)] = {token, g};
    }
}
