// The only contract between host and device: one argument block for every kernel. Plain data, mirrored field by field in
// src/cuda/abi.rs. Addresses are device addresses; null means "not there". N tokens, V vocab, D hidden; "row" is a token that
// is not ignored, numbered in token order (0 .. header->num_rows).
#pragma once

#include "prim/prim.cuh"

using prim::f64;
using prim::i64;
using prim::u32;
using prim::u64;

// ---- sizes that host and device agree on ------------------------------------------------------------------------------
constexpr u32 BLOCK_N = 128;                 // rows of a row block: of a logits tile, and of a pool of candidates
constexpr u32 BLOCK_V = 128;                 // classes of a logits tile
constexpr u32 MAX_PARTIALS = 1024;           // most (round, split) pairs of a forward
constexpr u32 CLASS_BITS = 25;               // a candidate packs its class below its row in the block: V <= 2^25
constexpr u32 NONE = 0xFFFFFFFFu;            // no row, no class
constexpr u32 CROWDED = 1u << 31;            // in tile_sources
constexpr u32 MOST_CROWDED = 1024;           // crowded blocks
constexpr u32 SUM_PARTS = 64;                // parts into which sums over all rows or classes are cut, whatever their number

enum ElementType : u32 { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_BF16 = 2 };
enum TargetType : u32 { TARGET_I64 = 0, TARGET_I32 = 1, TARGET_U32 = 2 };
enum Reduction : u32 { REDUCTION_NONE = 0, REDUCTION_MEAN = 1, REDUCTION_SUM = 2 };
enum Filter : u32 { FILTER_EXACT = 0, FILTER_UNBIASED = 1, FILTER_THRESHOLD = 2 };
enum SinkMode : u32 { SINK_SKIP = 0, SINK_OVERWRITE = 1, SINK_ACCUMULATE = 2 };
enum TileUse : u32 { TILES_OFF = 0, TILES_WHERE_FASTER = 1, TILES_EVERYWHERE = 2 };

// ---- inputs -----------------------------------------------------------------------------------------------------------
struct LceProblem {
    const void* embeddings;                  // E [N, D], rows embeddings_stride apart
    const void* classifier;                  // C [V, D], rows classifier_stride apart
    const void* targets;                     // [N] of target_type
    const void* bias;                        // [V] of bias_type, or null
    const float* class_weights;              // [V] or null: all 1
    const float* token_weights;              // [N] or null: all 1
    i64 embeddings_stride;                   // elements
    i64 classifier_stride;                   // elements
    i64 ignore_index;
    u64 seed;                                // of FILTER_UNBIASED
    u32 tokens, vocab, hidden;
    u32 seq_len;                             // tokens of a sequence; N where there is one
    u32 shift;                               // token t goes with target t + shift of its sequence
    u32 target_type, bias_type, reduction, filter;
    float eps;                               // of the filter
    float softcap;                           // 0: none
    float logit_scale, label_smoothing, z_loss;
    u32 entropy, metrics;                    // 0 or 1: compute these outputs
};

// ---- outputs, indexed by token; 0 (argmax: NONE) for ignored tokens --------------------------------------------------
struct LceOutputs {
    float* loss;                             // 1
    float* losses;                           // [N]
    float* nll;                              // [N]
    float* lse;                              // [N]
    float* target_logit;                     // [N]
    float* entropy;                          // [N] or null
    u32* argmax;                             // [N] or null
    float* accuracy;                         // 1 or null
};

// ---- what a forward keeps for its backward ----------------------------------------------------------------------------
struct LceHeader {
    f64 denominator;                         // of REDUCTION_MEAN: sum over rows of token weight x class weight; else 1
    f64 class_weight_sum;                    // sum over V, where label_smoothing > 0
    f64 kept_mass;                           // sum over rows of the softmax mass of kept entries, 1 for exact rows
    u64 candidates;                          // put aside and not dropped between rounds
    u64 kept_entries;                        // that passed with the final log-sum-exp
    i64 bad_target;                          // value of the first target out of range
    u32 bad_target_token;                    // its token, NONE if all are in range
    u32 num_rows;
    u32 exact_rows;                          // rows without a list of entries: they take the exact path
    u32 raised_rows;                         // rows whose eps is not the filter's, for want of room
};

// p = exp(z - max) * inverse_sum; ln p = (z - max) - log_sum
struct alignas(16) LceRowStatistics {
    float max, inverse_sum, log_sum, lse, entropy, target_logit;
    u32 argmax;
    float eps;                               // that the row's list is kept with: the filter's, or a raised one
};

struct alignas(8) LceEntry { u32 index; float value; };

struct LceSaved {
    LceHeader* header;
    u32* token_row;                          // [N] row of a token, NONE if ignored
    u32* row_token;                          // [N]
    u32* row_class;                          // [N] target, NONE if it is out of range (the row is poisoned with NaN)
    LceRowStatistics* statistics;            // [N]
    LceEntry* entries;                       // [row_blocks, block_entries] (class, logit): rows in order, classes ascending
    u32* entry_begin;                        // [N] of a row's list, from its row block's start
    u32* entry_count;                        // [N] NONE: the row takes the exact path
    u32* exact_row;                          // [N] the rows of the exact path, ascending; header->exact_rows of them
};

// ---- forward scratch --------------------------------------------------------------------------------------------------
// Softmax state of one row over one share of the vocabulary: sum = sum of exp(z - max), weighted = sum of
// exp(z - max)(z - max), smooth = sum of w_v (z_v - anchor), anchor = the row's seed logit where finite, else 0.
struct alignas(16) LcePartial { float max, sum, weighted, smooth; };

// The candidates of a row block. One that overflowed in a round has done the round again, with a larger eps.
struct LcePool {
    u32 count;                               // candidates in it, and those pushed beyond block_entries
    u32 before;                              // in it before the present round; NONE: some have been lost
    u32 redone;                              // 1 + the last round that was done again; 0: none
};

struct LceForwardScratch {
    float* seed_logit;                       // [N] target's logit by a dot product of its own
    // [N] A lower bound of the row's final log-sum-exp (natural log), or, for want of room, more than that: an entry is kept where
    // exp(z) >= eps u max(exp(lse), exp(bound)).
    float* bound;
    LcePartial* partial;                     // [partials, N]
    u32* partial_argmax;                     // [partials, N] first class that reached the share's max
    LcePool* pools;                          // [row_blocks]
    LceEntry* pool;                          // [row_blocks, block_entries] (row in block << CLASS_BITS | class, logit)
    u32* redo_count;                         // [rounds] row blocks that do this round again
    float* kept_mass;                        // [N] softmax mass of the row's kept entries
};

// ---- backward ---------------------------------------------------------------------------------------------------------
struct LceUpstream {
    const float* loss_scale;                 // [1] or null: multiplies loss
    const float* losses;                     // [N] or null, each
    const float* nll;
    const float* lse;
    const float* entropy;
    float loss;                              // of the scalar loss
    u32 padding;
};

struct LceSink { void* data; u32 type; u32 mode; };   // dense; ElementType, SinkMode (ACCUMULATE: TYPE_F32 only)

// dL/dz_v = p_v (softmax - entropy (ln p_v + H)) - [v = y] target - spread w_v, before the softcap's slope and the scale
struct alignas(16) LceCoefficients { float softmax, target, spread, entropy; };

// Blocks of 128 rows, or of 128 classes, whose sums are products of tiles (tile_lists.cu). Zero before the lists are made.
struct LceTileWork {
    u32 active;                              // such blocks
    u32 next_item;                           // of the products
    u32 crowded;                             // blocks of classes whose lists are made row block by row block
    u32 padding;
};

struct LceBackwardScratch {
    LceCoefficients* coefficients;           // [N] by row
    u32* column_begin;                       // [V + 1] first entry of each class's list
    u32* popular_classes;                    // [V] the classes with long lists
    u32* column_block_sum;                   // [ceil(V / 4096) + 1] of the scan; in the last: number of popular_classes
    LceEntry* column_entries;                // [row_blocks * block_entries] (token, dL/dz of the entry: before logit_scale)
    float* class_sum_parts;                  // [SUM_PARTS, D] label smoothing: parts of sum_v w_v C_v
    float* class_sum;                        // [D]
    float* spread_sum_parts;                 // [SUM_PARTS, D] label smoothing: parts of sum_i spread_i E_i over sparse rows
    float* spread_sum;                       // [D]
    float* spread_total;                     // [1] sum_i spread_i over sparse rows
    u32* exact_scale;                        // [1] bits of the largest magnitude of a logit gradient, atomic maximum
    u32* barrier;                            // [3] of the grid: arrivals, generation; items of work drawn; zero before the launch
    void* exact_gradients;                   // logit gradients of a panel of exact rows x a chunk of classes, of the input type
    float* exact_d_embeddings;               // [exact_slices, exact_panel_rows, D] accumulators
    u64 exact_gradients_elements;            // that exact_gradients holds
    u32 exact_panel_rows;                    // multiple of BLOCK_N
    u32 tile_use;                            // TileUse
    // The tiles of blocks of owners (rows, then classes): first those of dE, then, in the same memory, those of dC. A block's part
    // begins at its first entry e in the lists of all blocks: see tiles.cuh.
    LceTileWork* tile_work;
    // [max(row_blocks, ceil(V / 128))] Sources that the block multiplies, 0: its owners are gathered; CROWDED with the block's place in
    // crowded_blocks: all rows are its sources.
    u32* tile_sources;
    u32* active_blocks;                      // [as many] the blocks that multiply
    u32* sources;                            // at 2 e / 3: classes (rows of C), or tokens (rows of E), ascending
    u32* tile_begin;                         // at e / 128 + 2 block: where the list of a tile of 128 sources begins, from e; and the last one's end
    u32* tile_entries;                       // at e: (owner in block * 128 + source in tile) << 16 | dL/dz as the exact path stores it
    u32* crowded_blocks;                     // [MOST_CROWDED] blocks of classes, in any order
    u32* crowded_next;                       // [MOST_CROWDED] entries of theirs that have a place, from the block's first
    u32* in_tile;                            // [row_blocks, ceil(block_entries / 32)] a bit for each entry of dE that is in a tile
};

// ---- the argument of every kernel -------------------------------------------------------------------------------------
struct LceArgs {
    LceProblem problem;
    LceOutputs outputs;
    LceSaved saved;
    LceForwardScratch forward;
    LceUpstream upstream;
    LceSink d_embeddings, d_classifier, d_bias;
    LceBackwardScratch backward;
    u32 row_blocks;                          // ceil(N / BLOCK_N)
    u32 block_entries;                       // room of a row block in pool and entries
    u32 capture;                             // 1: this forward puts candidates aside
    u32 partials;                            // (round, split) pairs in all
    u32 first_partial;                       // of this round: split s of it writes partial first_partial + s
    u32 splits;                              // of this round
    u32 first_tile, num_tiles;               // tiles of BLOCK_V classes that this round covers, shared by its splits
    u32 previous_tile;                       // where the round before this one began
    u32 round;                               // which one this is
    u32 redo;                                // 1: for the blocks alone whose pools overflowed in this round
    u32 exact_slices;                        // most slices of a chunk of classes on the exact path, each with sums of dE of its own
};
