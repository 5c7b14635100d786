// Products of any two row-major matrices on Hopper, whichever of their dimensions is summed over: everything comes in blocks of 64 x 64
// elements, through the pipeline.
//
//     stage    A  blocks 0, 1        128 rows of the product: block w is consumer w's
//              B  blocks 2 .. 5      256 columns of the product
//
//     block    64 rows of 128 bytes, 16-byte chunk c of row r in place c ^ (r % 8). The sum runs along its rows (K-major: E and C of
//              E C^T, G of G C) or down its columns (MN-major: C of G C, G and E of G^T E): the same bytes, another descriptor.
//
// acc[4 c + i] of thread t of consumer w is row 64 w + 16 (t / 32) + t % 32 / 4 + 8 (i / 2), column 8 c + 2 (t % 4) + i % 2 of the product.
//
// In a cluster the blocks have different A and the same B: each loads its part of B into all of them, and all take the same steps. Stages may
// be lent, without any bytes, for consumers to write into and give back.
#pragma once

#include "abi_sm90.h"
#include "exact_passes.cuh"
#include "hopper_gather.cuh"
#include "hopper_pipeline.cuh"

namespace blocks {

using hopper::CONSUMERS;
using hopper::Cursor;
using hopper::STAGES;
using hopper::THREADS;
using hopper::WARPGROUP;
using hopper::descriptor;
using hopper::initialise;
using hopper::release;
using hopper::release_written;
using hopper::wait_empty;
using prim::Major;
using prim::u8;

// ---- shape ------------------------------------------------------------------------------------------------------------------
constexpr u32 SIDE = 64;                     // rows and columns of a block: a row is the span of the swizzle
constexpr u32 BYTES = SIDE * SIDE * 2;
constexpr u32 ROWS = 128, COLUMNS = 256;     // of the product
constexpr u32 A_BLOCKS = ROWS / SIDE, B_BLOCKS = COLUMNS / SIDE;
constexpr u32 STAGE_BYTES = (A_BLOCKS + B_BLOCKS) * BYTES;
constexpr u32 ACCUMULATORS = COLUMNS / 2;    // of a thread
static_assert(SIDE == SM90_TILE_D && COLUMNS == SM90_TILE_V, "a box of the tensor maps is a block");

struct Item { u32 kind, row, column, steps; };   // of a list of work: the kernel's kind, the product's tile, the steps of its sum

struct Ring {
    alignas(1024) u8 a[STAGES][A_BLOCKS][BYTES];
    alignas(1024) u8 b[STAGES][B_BLOCKS][BYTES];
    Item item[STAGES];                       // that this stage is of
    alignas(16) u32 token[STAGES * SIDE];    // of rows that are gathered, of the producer alone: a block a warp, or a tile for all
    u64 full[STAGES], empty[STAGES];
};

// ---- producer: a warp a stage -------------------------------------------------------------------------------------------------
static_assert(ROWS <= STAGES * SIDE, "a tile's rows in the table of tokens");

template <u32 CLUSTER> __device__ __forceinline__ void load_box(u8* to, const prim::TensorMap* map, u64* full, u32 x, u32 y) {
    if constexpr (CLUSTER == 1) prim::tma_load_2d(to, map, full, int(x), int(y), prim::L2::Normal);
    else prim::tma_load_2d_multicast(to, map, full, int(x), int(y), prim::u16((1u << CLUSTER) - 1), prim::L2::Normal);
}

// A block of exact rows. Where their tokens follow one another E's rows are one box, else they are gathered. Rows that do not exist are summed
// over, times zero: they are the last row once more, or zeros outside of E, but no other token's, which may be infinite.
struct Rows {
    u32 first_token;
    bool gathered;

    // From first_row on, of the pass; the same in every thread.
    __device__ __forceinline__ Rows(const LceHopperArgs& hopper, const exact::Pass& pass, u32 first_row) {
        const LceArgs& a = hopper.args;
        const u32 count = first_row >= pass.rows ? 0 : pass.rows - first_row < SIDE ? pass.rows - first_row : SIDE;
        first_token = count > 0 ? token_of(a, pass, first_row) : a.problem.tokens;
        const u32 end = count > 0 ? token_of(a, pass, first_row + count - 1) + 1 : a.problem.tokens;
        gathered = (hopper.gather && count > 0) || end - first_token != count || (count < SIDE && end != a.problem.tokens);
    }
    // Exact rows ascend: where every token is one, each is its own.
    static __device__ __forceinline__ u32 token_of(const LceArgs& a, const exact::Pass& pass, u32 row) {
        return pass.rows == a.problem.tokens ? row : a.saved.row_token[a.saved.exact_row[pass.first + row]];
    }
    // Of a row that is gathered.
    static __device__ __forceinline__ u32 token_or_last(const LceArgs& a, const exact::Pass& pass, u32 row) {
        return token_of(a, pass, row < pass.rows ? row : pass.rows - 1);
    }
};

// Waits for the warp's stage, by the whole warp. written: see wait_empty.
template <u32 CLUSTER> __device__ __forceinline__ void begin_stage(Ring& ring, const Cursor& at, const Item& item, bool written) {
    if (threadIdx.x % 32 == 0) {
        wait_empty<CLUSTER>(ring, at, written);
        ring.item[at.stage] = item;
    }
    prim::syncwarp();
}

// Says what the copy engine will bring to a stage into which nothing is gathered.
__device__ __forceinline__ void expect(Ring& ring, u32 stage, u32 bytes) {
    if (threadIdx.x % 32 == 0) prim::mbarrier_arrive_expect_tx(&ring.full[stage], bytes);
    prim::syncwarp();
}

// ---- consumers: a warpgroup each ------------------------------------------------------------------------------------------------
// From one k16 to the next, in units of a descriptor.
template <Major MAJOR> constexpr u32 K16 = (MAJOR == Major::K ? 32 : 16 * 128) >> 4;

// The item that begins with the stage at `at`, by whole warps.
__device__ __forceinline__ Item next_item(Ring& ring, const Cursor& at) {
    prim::mbarrier_wait(&ring.full[at.stage], at.parity);
    const Item item = ring.item[at.stage];
    prim::syncwarp();                        // a lane may release the stage for all lanes
    return item;
}

// The products of a stage, as one group.
template <class T, Major A, Major B>
__device__ __forceinline__ void multiply_stage(float (&acc)[ACCUMULATORS], Ring& ring, const Cursor& at, u32 consumer, bool accumulate) {
    prim::mbarrier_wait(&ring.full[at.stage], at.parity);
    const u64 a = descriptor<A>(ring.a[at.stage][consumer], BYTES), b = descriptor<B>(ring.b[at.stage][0], BYTES);
    prim::wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < SIDE / 16; ++k) prim::wgmma_m64k16<T, int(COLUMNS), A, B>(acc, a + k * K16<A>, b + k * K16<B>, accumulate || k > 0);
    prim::wgmma_commit();
}

// One tile, by a consumer: acc = A B. Two groups of products are in flight: a stage is released when the next one's have been issued and
// its own are done. `begun()` runs while the products of the first step do, `meanwhile(step)` while those of each.
template <class T, u32 CLUSTER, Major A, Major B, class Begun, class Meanwhile>
__device__ __forceinline__ void multiply(float (&acc)[ACCUMULATORS], Ring& ring, Cursor& at, u32 steps, u32 consumer, Begun begun, Meanwhile meanwhile) {
    multiply_stage<T, A, B>(acc, ring, at, consumer, false);
    begun();
    meanwhile(0);
    u32 previous = at.stage;
    at.advance();
    for (u32 step = 1; step < steps; ++step, at.advance()) {
        multiply_stage<T, A, B>(acc, ring, at, consumer, true);
        meanwhile(step);
        prim::wgmma_wait<1>(acc);
        release<CLUSTER>(ring, previous);
        previous = at.stage;
    }
    prim::wgmma_wait<0>(acc);
    release<CLUSTER>(ring, previous);
}

}  // namespace blocks
