// Lists of the frequent classes' logit gradients, by tile: 128 rows of a row block x 128 such classes. A block a row block: it counts
// the entries of its tiles, takes room for them behind what others have in column_entries, and scatters them.
//
// Where a row block's lists lie, and the order within a list, is a matter of chance: every entry has its own place in its tile.
#include "abi.h"
#include "block_scan.cuh"
#include "frequent_tile.cuh"
#include "gradient_scale.cuh"
#include "row_list.cuh"

namespace {

constexpr u32 THREADS = 1024;                // a block for each row block is few: each step of it waits for memory

struct Smem {
    block::ScanSpace<THREADS> scan;
    u32 first;                               // where the block's lists begin
};

// Calls use(row in the block, entry, rank) for the block's entries of frequent classes; a warp a row.
template <class Use> __device__ __forceinline__ void for_each_frequent(const LceArgs& a, Use use) {
    for (u32 r = threadIdx.x / 32; r < BLOCK_N; r += THREADS / 32) {
        const RowList list = row_list(a, blockIdx.x * BLOCK_N + r);
#pragma unroll 4
        for (u32 k = threadIdx.x % 32; k < list.count; k += 32) {
            const LceEntry entry = list.entries[k];
            const u32 rank = a.backward.frequent_rank[entry.index];
            if (rank != NONE) use(r, entry, rank);
        }
    }
}

template <class T> __device__ __forceinline__ void frequent_tiles(const LceArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 tiles = frequent::num_tiles(a), t = threadIdx.x;
    if (tiles == 0) return;
    u32* begin = frequent::tile_begin(a, blockIdx.x);            // [tile + 1]: its entries; then where they begin; then where they end

    // ---- count --------------------------------------------------------------------------------------------------------------
    for (u32 tile = t; tile <= tiles; tile += THREADS) prim::st_relaxed(&begin[tile], 0);
    __syncthreads();
    for_each_frequent(a, [&](u32, LceEntry, u32 rank) { prim::atomic_add(&begin[rank / frequent::TILE + 1], 1u); });
    __syncthreads();

    // ---- take room ----------------------------------------------------------------------------------------------------------
    u32 entries = 0;
    for (u32 base = 0; base < tiles; base += THREADS) {
        const u32 own = base + t < tiles ? prim::ld_relaxed(&begin[base + t + 1]) : 0;
        u32 total;
        const u32 before = entries + block::exclusive_scan<THREADS>(smem.scan, own, total);
        if (base + t < tiles) prim::st_relaxed(&begin[base + t + 1], before);
        entries += total;
    }
    if (t == 0) smem.first = prim::atomic_add(&a.backward.columns->next_entry, entries);
    __syncthreads();
    for (u32 tile = t; tile <= tiles; tile += THREADS) prim::atomic_add(&begin[tile], smem.first);
    __syncthreads();

    // ---- scatter ------------------------------------------------------------------------------------------------------------
    const float down = gradient::scale_of<T>(a.backward.exact_scale[0]).down;   // as the exact path stores them
    for_each_frequent(a, [&](u32 r, LceEntry entry, u32 rank) {
        const u32 row = blockIdx.x * BLOCK_N + r;
        const bool is_target = entry.index == a.saved.row_class[row];
        const float g = gradient::of_entry(a.problem, a.saved.statistics[row], a.backward.coefficients[row], entry.value, is_target);
        const u32 slot = prim::atomic_add(&begin[rank / frequent::TILE + 1], 1u);
        a.backward.column_entries[slot] = {r * frequent::TILE + rank % frequent::TILE, g * down};
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lce_frequent_tiles_f16(const __grid_constant__ LceArgs a) { frequent_tiles<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_frequent_tiles_bf16(const __grid_constant__ LceArgs a) { frequent_tiles<prim::bf16>(a); }
