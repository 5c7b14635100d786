// What there is to do on the Hopper exact path: in each pass chunks of the vocabulary, in each chunk two phases, in these items, each a tile of
// an output for one thread block, or two tiles of the same columns for a cluster. And what of it lies in shared memory.
#pragma once

#include "deal.cuh"
#include "exact_passes.cuh"
#include "exact_slices.cuh"
#include "gradient_scale.cuh"
#include "hopper_blocks.cuh"

namespace blocks {

constexpr u32 GROUP_ROWS = 16;               // row tiles that the grid works on at a time, so that their E stays in L2
constexpr u32 CLASS_TILE = ROWS;             // classes of a tile of dC
constexpr u32 SUM_ROWS = 2;                  // of dE, whose slices are added by an item
enum Phase : u32 { GRADIENTS, PRODUCTS, SUMS };
enum Kind : u32 { GRADIENT_TILE, D_EMBEDDINGS, D_CLASSIFIER, D_BIAS, D_EMBEDDINGS_SUM, NONE_LEFT };

__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return a / b + (a % b != 0); }
__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// ---- passes, chunks, phases ------------------------------------------------------------------------------------------------------
struct Chunk {
    u32 first_tile, tiles;                   // of COLUMNS classes
    u32 classes;
    u32 is_first, is_last;                   // 0 or 1
};

// A phase; in shared memory, where it costs no registers.
struct Work {
    gradient::Scale scale;
    exact::Pass pass;
    u32 row_tiles, row_units, row_span;      // of the pass; units: of a block or cluster; their tiles, those that are not there included
    u32 slices, slice_steps;                 // of a chunk as long as the first
    u32 vocab_tiles, chunk_tiles;            // of COLUMNS classes: in all, in a chunk
    u32 column_tiles;                        // of COLUMNS of D
    u32 has_sparse_rows;                     // 0 or 1
    Chunk chunk;
    u32 phase;
    u32 drawn;                               // items that all blocks together have drawn in the phases before
};

__device__ __forceinline__ void begin_chunk(const LceProblem& p, Work& w, u32 first_tile) {
    const u32 tiles = smaller(w.chunk_tiles, w.vocab_tiles - first_tile);
    w.chunk = {first_tile, tiles, smaller(tiles * COLUMNS, p.vocab - first_tile * COLUMNS), first_tile == 0, first_tile + tiles == w.vocab_tiles};
    w.phase = GRADIENTS;
}

__device__ __forceinline__ u32 slices_of(const Work& w, const Chunk& chunk) { return div_up(div_up(chunk.classes, SIDE), w.slice_steps); }
__device__ __forceinline__ bool has_sums(const Work& w) { return w.pass.d_embeddings && w.slices > 1; }

template <u32 CLUSTER> __device__ __forceinline__ void begin_pass(const LceArgs& a, Work& w, const exact::Pass& pass) {
    w.pass = pass;
    w.row_tiles = div_up(pass.rows, ROWS);
    w.row_units = div_up(w.row_tiles, CLUSTER);
    w.row_span = w.row_units * CLUSTER;
    const u32 most_tiles = u32(a.backward.exact_gradients_elements / (ROWS * COLUMNS)) / w.row_tiles;
    w.chunk_tiles = div_up(w.vocab_tiles, div_up(w.vocab_tiles, most_tiles));    // equal chunks
    begin_chunk(a.problem, w, 0);
    const exact::Slices slices(div_up(w.chunk.classes, SIDE), a.exact_slices);
    w.slices = slices.count;
    w.slice_steps = slices.length;
}

template <class T, u32 CLUSTER> __device__ __forceinline__ void begin(const LceArgs& a, Work& w) {
    w.scale = gradient::scale_of<T>(a.backward.exact_scale[0]);
    w.vocab_tiles = div_up(a.problem.vocab, COLUMNS);
    w.column_tiles = div_up(a.problem.hidden, COLUMNS);
    w.has_sparse_rows = exact::has_sparse_rows(a);
    w.drawn = 0;
    begin_pass<CLUSTER>(a, w, exact::first_pass(a));
}

__device__ __forceinline__ bool is_last_phase(const Work& w) { return w.phase == (has_sums(w) ? SUMS : PRODUCTS) && w.chunk.is_last && w.pass.is_last; }

// ---- shared memory ---------------------------------------------------------------------------------------------------------
enum Barrier { BARRIER_LEAD = 1, BARRIER_CONSUMER, BARRIER_PRODUCER = BARRIER_CONSUMER + CONSUMERS, BARRIER_BLOCK };   // named barriers

struct Smem {
    Ring ring;
    alignas(1024) u8 staging[CONSUMERS][2][BYTES];   // blocks of G on their way out
    Work work;
    u32 drawn[2];                                    // items, in turn; of the producer alone
};
static_assert(sizeof(Smem) <= 227 * 1024, "shared memory of lce_exact_sm90");

// Block (r, c) of the chunk's G.
__device__ __forceinline__ u8* gradient_block(const LceArgs& a, const Work& work, u32 r, u32 c) {
    return static_cast<u8*>(a.backward.exact_gradients) + (u64(r) * (work.chunk_tiles * B_BLOCKS) + c) * BYTES;
}

// ---- items ------------------------------------------------------------------------------------------------------------------
// By unit: item.row is which, until own_item makes it the block's tile.
template <u32 CLUSTER> __device__ __forceinline__ u32 class_units(const Chunk& chunk) { return div_up(chunk.classes, CLASS_TILE * CLUSTER); }

// Items of the products, by kind, and the steps of one.
struct Products {
    u32 d_classifier, row_steps;
    u32 d_embeddings, class_steps;
    u32 d_bias;

    __device__ __forceinline__ bool classifier_first() const { return row_steps >= class_steps; }
    __device__ __forceinline__ u32 all() const { return d_classifier + d_embeddings + d_bias; }
};

template <u32 CLUSTER> __device__ __forceinline__ Products products_of(const Work& work) {
    const u32 classes = class_units<CLUSTER>(work.chunk);
    return {
        work.pass.d_classifier * classes * work.column_tiles, div_up(work.pass.rows, SIDE),
        work.pass.d_embeddings * slices_of(work, work.chunk) * work.row_units * work.column_tiles, work.slice_steps,
        work.pass.d_bias * classes
    };
}

template <u32 CLUSTER> __device__ __forceinline__ u32 count_items(const Work& work) {
    if (work.phase == GRADIENTS) return work.row_units * work.chunk.tiles;
    return work.phase == PRODUCTS ? products_of<CLUSTER>(work).all() : div_up(work.pass.rows, SUM_ROWS * CLUSTER);
}

// The item of a cluster's turn. They are not drawn: both blocks of a cluster must know of an item.
template <u32 CLUSTER> __device__ __forceinline__ u32 dealt_item(const Work& work, u32 turn) {
    const u32 worker = blockIdx.x / CLUSTER, workers = gridDim.x / CLUSTER;
    if (work.phase != PRODUCTS) return worker + turn * workers;
    const Products items = products_of<CLUSTER>(work);
    const bool classifier = items.classifier_first();
    const u32 longs = classifier ? items.d_classifier : items.d_embeddings;
    const u32 long_steps = classifier ? items.row_steps : items.class_steps, other_steps = classifier ? items.class_steps : items.row_steps;
    return share::Deal{worker, workers, longs, long_steps, other_steps}.item(turn);
}

// Row tiles in groups, in a group all tiles of classes, in those the group's row tiles: what the grid works on at a time is a near square.
template <u32 CLUSTER> __device__ __forceinline__ Item gradient_item(const LceProblem& p, const Work& work, u32 index) {
    constexpr u32 GROUP = GROUP_ROWS / CLUSTER;
    const u32 tiles = work.chunk.tiles, group = index / (GROUP * tiles), in_group = index % (GROUP * tiles);
    const u32 height = smaller(GROUP, work.row_units - group * GROUP);
    return {GRADIENT_TILE, group * GROUP + in_group % height, in_group / height, div_up(p.hidden, SIDE)};
}

// What takes longest comes first; all columns of a tile in a row, so that they find its G in L2. Of dE item.row counts the tiles of all slices.
template <u32 CLUSTER> __device__ __forceinline__ Item product_item(const Work& work, u32 index) {
    const Products items = products_of<CLUSTER>(work);
    const u32 products = items.d_classifier + items.d_embeddings, columns = work.column_tiles;
    if (index >= products) return {D_BIAS, index - products, 0, 0};
    const u32 first = items.classifier_first() ? items.d_classifier : items.d_embeddings;
    const bool classifier = (index < first) == items.classifier_first();
    const u32 at = index < first ? index : index - first;
    if (classifier) return {D_CLASSIFIER, at / columns, at % columns, items.row_steps};
    const u32 before = at / (work.row_units * columns) * work.slice_steps;
    return {D_EMBEDDINGS, at / columns, at % columns, smaller(work.slice_steps, div_up(work.chunk.classes, SIDE) - before)};
}

// rank: of the block in its cluster. The last unit of rows may have no tile for it: it goes the same steps, and stores nothing. Of classes
// there are always two tiles, since a chunk ends with a tile of COLUMNS.
template <u32 CLUSTER>
__device__ __forceinline__ Item own_item(const LceProblem& p, const Work& work, u32 index, u32 rank) {
    static_assert(CLUSTER * CLASS_TILE <= COLUMNS, "classes of a unit");
    if (index >= count_items<CLUSTER>(work)) return {NONE_LEFT, 0, 0, 0};
    Item item = {D_EMBEDDINGS_SUM, index, 0, 0};
    if (work.phase != SUMS) item = work.phase == GRADIENTS ? gradient_item<CLUSTER>(p, work, index) : product_item<CLUSTER>(work, index);
    item.row = item.row * CLUSTER + rank;
    return item;
}

// The phase after this one, of the same pass or the next; there is one. By one thread.
template <u32 CLUSTER> __device__ __forceinline__ void begin_next_phase(const LceArgs& a, Work& w) {
    w.drawn += count_items<CLUSTER>(w) + gridDim.x;       // each block draws one that is not there
    if (w.phase == GRADIENTS) w.phase = PRODUCTS;
    else if (w.phase == PRODUCTS && w.chunk.is_last && has_sums(w)) w.phase = SUMS;
    else if (!w.chunk.is_last) begin_chunk(a.problem, w, w.chunk.first_tile + w.chunk_tiles);
    else begin_pass<CLUSTER>(a, w, exact::next_pass(a, w.pass));
}

// Whether a tile of dC gets the sparse rows' share, too. It lies in all of the ring meanwhile (exact_outputs.cuh): the producer lends the
// stages behind the item's own.
__device__ __forceinline__ bool is_merged(const Work& w, const Item& item) { return item.kind == D_CLASSIFIER && w.has_sparse_rows; }

}  // namespace blocks
