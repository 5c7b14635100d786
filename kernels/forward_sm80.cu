// The forward for every GPU from Ampere on: one block takes 128 rows past a share of the vocabulary, tile by tile; the
// logits never leave its registers.
//
//                  classes of the round →
//                ┌── split 0 ──┬── split 1 ──┬─ …
//   row block 0  │ tile tile … │             │          block (x, y): row block x, split y
//   row block 1  │             │             │          → partial[first_partial + y][row], candidates → pool[row block]
//        …
// Blocks that run together share a split, so that each tile of C comes from memory once.
#include "logits_epilogue.cuh"
#include "logits_tile.cuh"

namespace {

using namespace logits;

struct Smem {
    union {
        Ring ring;
        epilogue::Sums<WARPS_V> sums;
    };
    epilogue::State<WARPS_V> state;
};
// Two blocks a multiprocessor of 164 KiB (A100), each with 1 KiB that the system takes.
static_assert(sizeof(Smem) <= 81 * 1024, "shared memory of lce_forward_sm80");

template <class T, bool ALIGNED> __device__ __forceinline__ void forward(const LceArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 row_block = blockIdx.x, split = blockIdx.y, warp = threadIdx.x / 32;
    const u32 first_row = row_block * BLOCK_N, num_rows = a.saved.header->num_rows;
    if (first_row >= num_rows || (a.redo && a.forward.pools[row_block].redone != a.round + 1)) return;
    const u32 splits = gridDim.y;            // the round's, or more where it is done again
    const u32 first_tile = a.first_tile + a.num_tiles * split / splits;
    const u32 end_tile = a.first_tile + a.num_tiles * (split + 1) / splits;

    using RowEpilogue = epilogue::Epilogue<MMA_N, MMA_V, WARPS_V>;
    const auto barrier = [] { __syncthreads(); };
    const u32 last_row = num_rows - 1;
    RowEpilogue::initialise(a, smem.state, row_block, threadIdx.x, THREADS);
    RowEpilogue rows(a, smem.state, warp % WARPS_V, warp / WARPS_V * WARP_N, warp % WARPS_V * WARP_V);
    __syncthreads();
    for_each_tile<T, ALIGNED>(
        a.problem, smem.ring, first_tile, end_tile,
        [&](u32 row) { return a.saved.row_token[first_row + row < num_rows ? first_row + row : last_row]; },
        [&](u32 tile) {
            rows.flush(row_block, epilogue::STAGING / 2, threadIdx.x, THREADS, barrier);
            rows.load_bias(tile, threadIdx.x, THREADS);
        },
        [&](u32 tile, float(&acc)[MMA_N][MMA_V][4]) { rows.take(row_block, tile, acc); });
    rows.flush(row_block, 0, threadIdx.x, THREADS, barrier);
    rows.finish(smem.sums, row_block, split, threadIdx.x, THREADS, barrier);
}

}  // namespace

// Three products of TF32 for one of f32 take more registers than two blocks a multiprocessor have.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lce_forward_sm80_f32(const __grid_constant__ LceArgs a) { forward<float, true>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) lce_forward_sm80_f16(const __grid_constant__ LceArgs a) { forward<prim::f16, true>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) lce_forward_sm80_bf16(const __grid_constant__ LceArgs a) { forward<prim::bf16, true>(a); }

// For an operand whose base or row stride is not a multiple of 16 bytes, and for D = 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lce_forward_sm80_f32_unaligned(const __grid_constant__ LceArgs a) { forward<float, false>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) lce_forward_sm80_f16_unaligned(const __grid_constant__ LceArgs a) { forward<prim::f16, false>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) lce_forward_sm80_bf16_unaligned(const __grid_constant__ LceArgs a) { forward<prim::bf16, false>(a); }
