// Rows of E that do not follow one another, on Hopper. The copy engine takes boxes of consecutive tokens; where some between are ignored, or,
// on the exact path, sparse rows, a warp gathers the rows itself, 16 bytes a lane, to where a box would put them:
//
//     block    rows of 128 bytes (64 columns) at a multiple of 1024 bytes, 16-byte chunk c of row r in place c ^ (r % 8)
//
// Each of the producer's four warps fills a stage of its own, from when it is empty: a step of 128 rows is 32 copies a lane, some 350
// instructions, beside 1024 cycles of products.
#pragma once

#include "abi_sm90.h"

namespace hopper {

// BLOCKS blocks of the same ROWS rows, one behind the other, by a whole warp: eight lanes to a row of E, at token[row], which is in shared
// memory. Columns that do not exist are zeros. WHOLE: they all do, and a row is some seven instructions, and one more for each further block.
template <u32 ROWS, u32 BLOCKS, bool WHOLE>
__device__ __forceinline__ void copy_rows(const LceProblem& p, prim::u8* to, const u32* token, u32 first_column) {
    static_assert(WHOLE || BLOCKS == 1, "columns of one block");
    static_assert(SM90_TILE_D == 64 && ROWS % 32 == 0, "a lane copies 16 bytes of every row of a quarter, in batches");
    const u32 lane = threadIdx.x % 32, chunk = lane % 8, first_row = lane / 8 * (ROWS / 4), column = first_column + chunk * 8;
    const u32 columns = WHOLE ? 8 : column >= p.hidden ? 0 : p.hidden - column < 8 ? p.hidden - column : 8;
    const prim::u8* from = static_cast<const prim::u8*>(p.embeddings) + (columns > 0 ? column : 0) * 2;
    const prim::u64 stride = prim::u64(p.embeddings_stride) * 2;
    constexpr u32 BATCH = BLOCKS == 1 ? 8 : 4;          // rows whose addresses fit into the producer's registers
#pragma unroll 1
    for (u32 row = first_row; row < first_row + ROWS / 4; row += BATCH) {
        prim::Vec16 tokens[BATCH / 4];
#pragma unroll
        for (u32 i = 0; i < BATCH / 4; ++i) tokens[i] = reinterpret_cast<const prim::Vec16*>(token + row)[i];
        const u32 place = row * 128 + (chunk ^ row % 8) * 16;
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const prim::u8* own = from + tokens[i / 4].w[i % 4] * stride;
            prim::u8* own_place = to + (place ^ i * 16) + i * 128;
#pragma unroll
            for (u32 k = 0; k < BLOCKS; ++k) prim::cp_async_16(own_place + k * (ROWS * 128), own + k * 128, columns * 2);
        }
    }
}
template <u32 ROWS, u32 BLOCKS> __device__ __forceinline__ void gather_rows(const LceProblem& p, prim::u8* to, const u32* token, u32 first_column) {
    if (first_column + BLOCKS * SM90_TILE_D <= p.hidden) {
        copy_rows<ROWS, BLOCKS, true>(p, to, token, first_column);
        return;
    }
#pragma unroll 1
    for (u32 k = 0; k < BLOCKS; ++k) copy_rows<ROWS, 1, false>(p, to + k * (ROWS * 128), token, first_column + k * SM90_TILE_D);
}

// When the warp has gathered: to the consumers, who also wait for `bytes` of the copy engine, some of which may have come. The copies are ordinary
// writes to wgmma: every lane's need a fence.
__device__ __forceinline__ void hand_on(prim::u64* full, u32 bytes) {
    prim::cp_async_commit();
    prim::cp_async_wait<0>();
    prim::fence_proxy_async();
    prim::syncwarp();
    if (threadIdx.x % 32 == 0) prim::mbarrier_arrive_expect_tx(full, bytes);
}

}  // namespace hopper
