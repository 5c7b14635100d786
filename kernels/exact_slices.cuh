// Slices of a chunk's classes: dE of few rows has few tiles, each of which sums over a whole chunk. Cut into slices, with accumulators of their
// own, they are work for more blocks. When the last chunk is done each row's slices are added, in order.
#pragma once

#include "sink.cuh"

namespace exact {

struct Slices {
    u32 count, length;                       // of a chunk as long as the first; of a slice, in the unit that the classes come in

    __device__ __forceinline__ Slices(u32 classes, u32 most) {
        length = (classes - 1) / most + 1;
        count = (classes - 1) / length + 1;
    }
};

// Where a slice's accumulators of the panel's rows begin.
__device__ __forceinline__ float* slice_sums(const LceArgs& a, u32 slice) {
    return a.backward.exact_d_embeddings + u64(slice) * a.backward.exact_panel_rows * a.problem.hidden;
}

// dE of a row of the panel, which is a token's, by `threads` threads.
__device__ __forceinline__ void add_slices(const LceArgs& a, u32 slices, u32 row, u32 token, float factor, u32 thread, u32 threads) {
    const u32 hidden = a.problem.hidden;
    for (u32 column = thread * 4; column < hidden; column += threads * 4) {
        float values[4] = {};
        for (u32 slice = 0; slice < slices; ++slice) {
            const float* from = slice_sums(a, slice) + u64(row) * hidden + column;
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                if (column + i < hidden) values[i] += from[i];
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) values[i] *= factor;
        sink::put<false>(a.d_embeddings, u64(token) * hidden + column, values, hidden - column);
    }
}

}  // namespace exact
