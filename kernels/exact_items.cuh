// What there is to do on the Hopper exact path: chunks of the vocabulary, in each two phases, in these items, each a tile of an output for one
// thread block, or two tiles of the same columns for a cluster.
#pragma once

#include "gradient_scale.cuh"
#include "hopper_blocks.cuh"

namespace blocks {

constexpr u32 GROUP_ROWS = 16;               // row tiles that the grid works on at a time, so that their E stays in L2
constexpr u32 CLASS_TILE = ROWS;             // classes of a tile of dC
enum Phase : u32 { GRADIENTS, PRODUCTS, PHASES };
enum Kind : u32 { GRADIENT_TILE, D_EMBEDDINGS, D_CLASSIFIER, D_BIAS, NONE_LEFT };

__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return a / b + (a % b != 0); }
__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// ---- chunks ------------------------------------------------------------------------------------------------------------------
// All of it; in shared memory, where it costs no registers.
struct Work {
    gradient::Scale scale;
    u32 rows, row_tiles, row_units;          // exact rows; units: of a block or cluster
    u32 vocab_tiles, chunk_tiles;            // of COLUMNS classes: in all, in a chunk
    u32 column_tiles;                        // of COLUMNS of D
    u32 d_embeddings, d_classifier, d_bias;  // 0 or 1
};

struct Chunk {
    u32 first_tile, tiles;                   // of COLUMNS classes
    u32 classes;
    bool is_first, is_last;
};

template <class T, u32 CLUSTER> __device__ __forceinline__ Work work_of(const LceArgs& a) {
    Work w;
    w.scale = gradient::scale_of<T>(a.backward.exact_scale[0]);
    w.rows = a.saved.header->exact_rows;
    w.row_tiles = div_up(w.rows, ROWS);
    w.row_units = div_up(w.row_tiles, CLUSTER);
    w.vocab_tiles = div_up(a.problem.vocab, COLUMNS);
    const u32 most_tiles = u32(a.backward.exact_gradients_elements / (u64(w.row_tiles) * ROWS * COLUMNS));
    w.chunk_tiles = div_up(w.vocab_tiles, div_up(w.vocab_tiles, most_tiles));    // equal chunks
    w.column_tiles = div_up(a.problem.hidden, COLUMNS);
    w.d_embeddings = a.d_embeddings.mode != SINK_SKIP;
    w.d_classifier = a.d_classifier.mode != SINK_SKIP;
    w.d_bias = a.d_bias.mode != SINK_SKIP;
    return w;
}

__device__ __forceinline__ Chunk chunk_of(const LceProblem& p, const Work& work, u32 first_tile) {
    const u32 tiles = smaller(work.chunk_tiles, work.vocab_tiles - first_tile);
    return {first_tile, tiles, smaller(tiles * COLUMNS, p.vocab - first_tile * COLUMNS), first_tile == 0, first_tile + tiles == work.vocab_tiles};
}

// ---- items ------------------------------------------------------------------------------------------------------------------
// By unit: item.row is which, until own_item makes it the block's tile.
template <u32 CLUSTER> __device__ __forceinline__ u32 class_units(const Chunk& chunk) { return div_up(chunk.classes, CLASS_TILE * CLUSTER); }

template <u32 CLUSTER> __device__ __forceinline__ u32 count_items(const Work& work, const Chunk& chunk, u32 phase) {
    if (phase == GRADIENTS) return work.row_units * chunk.tiles;
    const u32 classes = class_units<CLUSTER>(chunk);
    return (work.d_embeddings * work.row_units + work.d_classifier * classes) * work.column_tiles + work.d_bias * classes;
}

// Row tiles in groups, in a group all tiles of classes, in those the group's row tiles: what the grid works on at a time is a near square.
template <u32 CLUSTER> __device__ __forceinline__ Item gradient_item(const LceProblem& p, const Work& work, const Chunk& chunk, u32 index) {
    constexpr u32 GROUP = GROUP_ROWS / CLUSTER;
    const u32 group = index / (GROUP * chunk.tiles), in_group = index % (GROUP * chunk.tiles);
    const u32 height = smaller(GROUP, work.row_units - group * GROUP);
    return {GRADIENT_TILE, group * GROUP + in_group % height, in_group / height, div_up(p.hidden, SIDE)};
}

// What takes longest comes first; all columns of a tile in a row, so that they find its G in L2.
template <u32 CLUSTER> __device__ __forceinline__ Item product_item(const Work& work, const Chunk& chunk, u32 index) {
    const u32 classes = class_units<CLUSTER>(chunk), d_bias = work.d_bias * classes;
    if (index < d_bias) return {D_BIAS, index, 0, 0};
    index -= d_bias;
    const u32 columns = work.column_tiles;
    const u32 row_steps = div_up(work.rows, SIDE), class_steps = div_up(chunk.classes, SIDE);
    const u32 d_embeddings = work.d_embeddings * work.row_units * columns, d_classifier = work.d_classifier * classes * columns;
    const bool classifier_first = row_steps >= class_steps;
    const u32 first = classifier_first ? d_classifier : d_embeddings;
    const bool classifier = (index < first) == classifier_first;
    const u32 at = index < first ? index : index - first;
    if (classifier) return {D_CLASSIFIER, at / columns, at % columns, row_steps};
    return {D_EMBEDDINGS, at / columns, at % columns, class_steps};
}

// rank: of the block in its cluster. The last unit of rows may have no tile for it: it goes the same steps, and stores nothing. Of classes
// there are always two tiles, since a chunk ends with a tile of COLUMNS.
template <u32 CLUSTER>
__device__ __forceinline__ Item own_item(const LceProblem& p, const Work& work, const Chunk& chunk, u32 phase, u32 index, u32 rank) {
    static_assert(CLUSTER * CLASS_TILE <= COLUMNS, "classes of a unit");
    if (index >= count_items<CLUSTER>(work, chunk, phase)) return {NONE_LEFT, 0, 0, 0};
    Item item = phase == GRADIENTS ? gradient_item<CLUSTER>(p, work, chunk, index) : product_item<CLUSTER>(work, chunk, index);
    item.row = item.row * CLUSTER + rank;
    return item;
}

}  // namespace blocks
