// Tiles of E·Cᵀ on Hopper, by the pipeline. A tile is 128 rows x 256 classes; a step takes 64 columns of every row.
//
//        256 classes               stage: 128 + 256 rows of 128 bytes, each operand K-major under the 128-byte swizzle:
//    0 ┌─────────────┐             16-byte chunk c of the row at address a lies in place c ^ (a / 128 % 8)
//      │ consumer 0  │ 64 rows
//   64 ├─────────────┤             acc[c][i] of thread t of consumer w is row    64 w + 16 (t / 32) + t % 32 / 4 + 8 (i / 2)
//      │ consumer 1  │                                           and class  8 c + 2 (t % 4) + i % 2 of the tile.
//  128 └─────────────┘
//
// In a cluster the blocks have different rows and the same classes: each loads its part of C into all of them.
#pragma once

#include "abi_sm90.h"
#include "hopper_gather.cuh"
#include "hopper_pipeline.cuh"
#include "hopper_schedule.cuh"

namespace hopper {

using prim::u8;

// ---- shape --------------------------------------------------------------------------------------------------------
constexpr u32 TILE_V = SM90_TILE_V, TILE_D = SM90_TILE_D;
constexpr u32 CONSUMER_ROWS = BLOCK_N / CONSUMERS;
constexpr u32 ROW_BYTES = TILE_D * 2;
constexpr u32 STAGE_BYTES = (BLOCK_N + TILE_V) * ROW_BYTES;
constexpr u32 CLASS_BOX = 128;               // rows of a box of C
constexpr u32 MMA_V = TILE_V / 8;            // groups of 8 classes

struct Ring {
    alignas(1024) u8 rows[STAGES][BLOCK_N * ROW_BYTES];
    alignas(1024) u8 classes[STAGES][TILE_V * ROW_BYTES];
    alignas(16) u32 token[STAGES][BLOCK_N];  // of each row, where they are gathered; of the stage's warp alone
    u64 full[STAGES], empty[STAGES];
};

// ---- producer: a warp a stage ------------------------------------------------------------------------------------------
// The rows of a tile are the next 128 tokens that are not ignored. Mostly these follow one another: one box. Otherwise the warp gathers them.
// Rows that are not there are masked: a box has what follows, outside of E zeros, and what is gathered the last row again.
struct TileRows {
    u32 first_token;                         // of a box
    bool gathered;

    __device__ __forceinline__ TileRows(const LceHopperArgs& hopper, u32* table, u32 row_block) {
        const LceArgs& a = hopper.args;
        const u32 first_row = row_block * BLOCK_N, num_rows = a.saved.header->num_rows;
        const u32 rows = first_row < num_rows ? smaller(BLOCK_N, num_rows - first_row) : 0;
        const u32* token = a.saved.row_token + first_row;
        first_token = rows == 0 ? a.problem.tokens : token[0];
        gathered = rows > 0 && (hopper.gather || token[rows - 1] - first_token != rows - 1);      // tokens ascend
        if (!gathered) return;
        prim::syncwarp();                    // the tile before has been read
        for (u32 row = threadIdx.x % 32; row < BLOCK_N; row += 32) table[row] = token[smaller(row, rows - 1)];
        prim::syncwarp();
    }
};

// Those of all steps of tiles [first_tile, end_tile) that fall on the warp's stage. rank: of the block in its cluster.
template <u32 CLUSTER>
__device__ __forceinline__ void load_tiles(const LceHopperArgs& a, Ring& ring, Cursor& at, u32 rank, u32 row_block, u32 first_tile, u32 end_tile) {
    const u32 steps = div_up(a.args.problem.hidden, TILE_D);
    const u32 warp = threadIdx.x / 32;
    u64* full = &ring.full[warp];
    const TileRows rows(a, ring.token[warp], row_block);
    for (u32 tile = first_tile; tile < end_tile; ++tile) {
        for (u32 step = 0; step < steps; ++step, at.advance()) {
            if (at.stage != warp) continue;
            if (threadIdx.x % 32 == 0) {
                const int column = int(step * TILE_D);
                wait_empty<CLUSTER>(ring, at, false);
                if (!rows.gathered) {
                    prim::mbarrier_arrive_expect_tx(full, STAGE_BYTES);
                    prim::tma_load_2d(ring.rows[warp], &a.embeddings, full, column, int(rows.first_token), prim::L2::EvictLast);
                }
                // Each block of a cluster loads its part of C, into all blocks.
                for (u32 part = rank; part < TILE_V / CLASS_BOX; part += CLUSTER) {
                    u8* to = &ring.classes[warp][part * CLASS_BOX * ROW_BYTES];
                    const int first_class = int(tile * TILE_V + part * CLASS_BOX);
                    if constexpr (CLUSTER == 1) prim::tma_load_2d(to, &a.classifier, full, column, first_class, prim::L2::EvictFirst);
                    else prim::tma_load_2d_multicast(to, &a.classifier, full, column, first_class, prim::u16((1u << CLUSTER) - 1), prim::L2::EvictFirst);
                }
            }
            prim::syncwarp();                // the stage is empty
            if (!rows.gathered) continue;
            gather_rows<BLOCK_N, 1>(a.args.problem, ring.rows[warp], ring.token[warp], step * TILE_D);
            hand_on(full, TILE_V * ROW_BYTES);
        }
    }
}

// ---- consumers --------------------------------------------------------------------------------------------------------
// One tile, by a consumer. Two groups of products are in flight: a stage is released when the next one's have been issued and
// its own are done. `meanwhile(step)` runs while the products of the step do.
template <class T, u32 CLUSTER, class Meanwhile>
__device__ __forceinline__ void multiply_tile(float (&acc)[4 * MMA_V], Ring& ring, Cursor& at, u32 steps, u32 consumer, Meanwhile meanwhile) {
    constexpr u32 K16 = 32 >> 4;             // from one k16 to the next within the swizzled row, in units of a descriptor
    u32 previous = 0;
    for (u32 step = 0; step < steps; ++step, at.advance()) {
        prim::mbarrier_wait(&ring.full[at.stage], at.parity);
        const u64 rows = descriptor<prim::Major::K>(&ring.rows[at.stage][consumer * CONSUMER_ROWS * ROW_BYTES], 0);
        const u64 classes = descriptor<prim::Major::K>(ring.classes[at.stage], 0);
        prim::wgmma_fence();
#pragma unroll
        for (u32 k = 0; k < TILE_D / 16; ++k)
            prim::wgmma_m64k16<T, int(TILE_V), prim::Major::K, prim::Major::K>(acc, rows + k * K16, classes + k * K16, step > 0 || k > 0);
        prim::wgmma_commit();
        meanwhile(step);
        if (step > 0) {
            prim::wgmma_wait<1>(acc);
            release<CLUSTER>(ring, previous);
        }
        previous = at.stage;
    }
    prim::wgmma_wait<0>(acc);
    release<CLUSTER>(ring, previous);
}

}  // namespace hopper
