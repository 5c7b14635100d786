// The kept entries regrouped by class: count, scan, scatter. Row lists (class, logit) become column lists (token, dL/dz).
//
//     lce_column_count    column_begin[v + 1] = entries of class v                            (zero before)
//     lce_column_scan_*   column_begin[v + 1] = entries of classes below v; the popular classes' list; the frequent classes' ranks
//     lce_column_scatter  column_begin[v + 1] runs up to the entries of classes through v: the list of v is [v] .. [v + 1]
//
// Frequent classes, which tensor cores sum (frequent.cu), have no list here. There are none where there are exact rows: then lce_exact
// writes every class, from lists.
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
// Two sums at once: entries in lists below, frequent classes in the upper half.
using ScanSpace = block::ScanSpace<THREADS, u64>;
constexpr u64 ONE_FREQUENT = 1ull << 32;

__device__ __forceinline__ u64 counted(const LceArgs& a, u32 entries) {
    const bool frequent = a.backward.frequent_rank != nullptr && entries >= a.backward.least_frequent && a.saved.header->exact_rows == 0;
    return frequent ? ONE_FREQUENT : entries;
}

// A thread's PER_THREAD classes of a block's SCAN; those beyond the vocabulary have no entry.
struct Share {
    u32 entries[PER_THREAD];
    u64 sum;

    __device__ __forceinline__ Share(const LceArgs& a, u32 first) : sum(0) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            entries[i] = first + i < a.problem.vocab ? a.backward.column_begin[first + i + 1] : 0;
            sum += counted(a, entries[i]);
        }
    }
};

}  // namespace

// <ceil(N / 8), 256>: a warp a row.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_count(const __grid_constant__ LceArgs a) {
    const RowList list = row_list(a, blockIdx.x * (THREADS / 32) + threadIdx.x / 32);
    for (u32 k = threadIdx.x % 32; k < list.count; k += 32) prim::atomic_add(&a.backward.column_begin[list.entries[k].index + 1], 1u);
}

// <ceil(V / 4096), 256>: sums of the blocks' counts.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scan_a(const __grid_constant__ LceArgs a) {
    const Share share(a, blockIdx.x * SCAN + threadIdx.x * PER_THREAD);
    u64 total;
    block::exclusive_scan<THREADS>(prim::shared_memory<ScanSpace>(), share.sum, total);
    if (threadIdx.x == 0) a.backward.column_block_sum[blockIdx.x] = total;
}

// <1, 256>: what comes before each block.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scan_b(const __grid_constant__ LceArgs a) {
    ScanSpace& space = prim::shared_memory<ScanSpace>();
    const u32 blocks = (a.problem.vocab + SCAN - 1) / SCAN;
    u64* sums = a.backward.column_block_sum;
    u64 carry = 0;
    for (u32 base = 0; base < blocks; base += THREADS) {
        const u32 own = base + threadIdx.x;
        u64 total;
        const u64 before = carry + block::exclusive_scan<THREADS>(space, own < blocks ? sums[own] : 0, total);
        if (own < blocks) sums[own] = before;
        carry += total;
    }
    if (threadIdx.x == 0) *a.backward.columns = {0, u32(carry >> 32), u32(carry), 0};
}

// <ceil(V / 4096), 256>: what comes before each class.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scan_c(const __grid_constant__ LceArgs a) {
    const u32 first = blockIdx.x * SCAN + threadIdx.x * PER_THREAD;
    const LceBackwardScratch& to = a.backward;
    const Share share(a, first);
    u64 total;
    u64 before = to.column_block_sum[blockIdx.x] + block::exclusive_scan<THREADS>(prim::shared_memory<ScanSpace>(), share.sum, total);
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        const u32 class_index = first + i, rank = u32(before >> 32);
        const u64 own = counted(a, share.entries[i]);
        if (class_index < a.problem.vocab) {
            to.column_begin[class_index + 1] = u32(before);
            if (to.frequent_rank != nullptr) to.frequent_rank[class_index] = own == ONE_FREQUENT ? rank : NONE;
        }
        if (own == ONE_FREQUENT) to.frequent_class[rank] = class_index;
        // In any order: each has its own output.
        else if (own > column_sum::WARP_LIST) to.popular_classes[prim::atomic_add(&to.columns->popular, 1u)] = class_index;
        before += own;
    }
}

// <ceil(N / 8), 256>: a warp a row.
extern "C" __global__ void __launch_bounds__(THREADS) lce_column_scatter(const __grid_constant__ LceArgs a) {
    const u32 row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const RowList list = row_list(a, row);
    if (list.count == 0) return;
    const LceRowStatistics statistics = a.saved.statistics[row];
    const LceCoefficients c = a.backward.coefficients[row];
    const u32 token = a.saved.row_token[row], target = a.saved.row_class[row];
    for (u32 k = threadIdx.x % 32; k < list.count; k += 32) {
        const LceEntry entry = list.entries[k];
        if (column_sum::is_frequent(a, entry.index)) continue;
        const float g = gradient::of_entry(a.problem, statistics, c, entry.value, entry.index == target);
        a.backward.column_entries[prim::atomic_add(&a.backward.column_begin[entry.index + 1], 1u)] = {token, g};
    }
}
