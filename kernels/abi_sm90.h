// The argument of the Hopper kernels: that of every kernel, and how the copy engine finds E and C. Mirrored in
// src/cuda/hopper.rs.
//
// The copy engine needs bases and row strides of E and C that are multiples of 16 bytes, D > 0, and N, V > 0. Otherwise the
// host takes the portable kernels.
#pragma once

#include "abi.h"

constexpr u32 SM90_TILE_V = 256;             // classes of a tile: the unit of first_tile and num_tiles in a Hopper launch
constexpr u32 SM90_TILE_D = 64;              // columns of every box: 128 bytes, the span of the swizzle

// Two-dimensional tensor maps of 16-bit elements: boxes of 64 columns, swizzle of 128 bytes, no interleave, L2 promotion of
// 256 bytes, zeros outside.
struct LceHopperArgs {
    LceArgs args;                            // splits: partials a row block has in this round, of which the kernel may use fewer
    prim::TensorMap embeddings;              // E [N, D], boxes of 128 rows (exact path: 64)
    prim::TensorMap classifier;              // C [V, D], the same
    u32 sweep_blocks;                        // most row blocks that sweep the vocabulary together: their rows of E stay in L2
    u32 lead;                                // steps of consumer 1 behind consumer 0, below the stages of the ring
    u32 gather;                              // not 0: rows of E are gathered also where they follow one another
    u32 padding[13];
};
