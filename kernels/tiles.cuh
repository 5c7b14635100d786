// Gradients as products of tiles. A block has 128 owners: rows, of which each has a list of classes, or classes, of which each has a list
// of tokens. Sources are what the lists name: rows of C, or of E. The block's logit gradients G of sources that it has often come about
// in shared memory, 128 owners x 128 sources at a time, from lists, and are multiplied with the gathered rows of these sources.
//
//     left    a tile of G: zeros, and the entries of its list
//     right   128 rows of C or of E, gathered, 128 columns: [k][hidden]
//
// Layouts, fragments and warps are those of gradient_product.cuh; the right operand runs ahead through its ring, across tiles.
#pragma once

#include "gradient_product.cuh"

namespace tiles {

using gradient_product::Accumulators;
using gradient_product::OPERAND_BYTES;
using gradient_product::STAGES;
using gradient_product::TILE;
using prim::u8;
using prim::Vec16;

constexpr u32 THREADS = gradient_product::THREADS;
static_assert(TILE == BLOCK_N && TILE == BLOCK_V, "a tile has the owners of a block");

// ---- where a block's part of the scratch begins -----------------------------------------------------------------------------
// `first`: its first entry in the lists of all blocks. A block with n entries multiplies at most 2 n / 3 sources: the classes that two
// of its rows have, or all tokens that its classes have, if they are that few.
struct Block {
    u32 index;
    u64 first;
};

__device__ __forceinline__ Block of_rows(const LceArgs& a, u32 row_block) { return {row_block, u64(row_block) * a.block_entries}; }
__device__ __forceinline__ Block of_classes(const LceArgs& a, u32 tile) { return {tile, a.backward.column_begin[tile * TILE]}; }

__device__ __forceinline__ u32* sources_of(const LceArgs& a, const Block& block) { return a.backward.sources + (2 * block.first + 2) / 3; }
__device__ __forceinline__ u32* tile_begin_of(const LceArgs& a, const Block& block) {
    return a.backward.tile_begin + block.first / TILE + 2 * u64(block.index);
}
__device__ __forceinline__ u32* entries_of(const LceArgs& a, const Block& block) { return a.backward.tile_entries + block.first; }

// A crowded block has all rows for sources, in order, whether they have an entry or not, and the lists of its tiles come from as many
// blocks of threads: each has a begin and an end of its own. Others have lists one after the other.
__device__ __forceinline__ bool is_crowded(const LceArgs& a, const Block& block) { return (a.backward.tile_sources[block.index] & CROWDED) != 0; }
__device__ __forceinline__ u32 num_sources(const LceArgs& a, const Block& block) {
    return is_crowded(a, block) ? a.saved.header->num_rows : a.backward.tile_sources[block.index];
}

// The bit of an entry of dE, by its place in the block's lists.
__device__ __forceinline__ u32* in_tile_of(const LceArgs& a, u32 row_block) {
    return a.backward.in_tile + u64(row_block) * ((a.block_entries + 31) / 32);
}

// ---- the left operand -----------------------------------------------------------------------------------------------------
struct List { const u32* entries; u32 count; };

// As many stages as a tile has steps of 64 bytes of k.
template <class T> constexpr u32 STEPS = TILE / gradient_product::STEP<T>;
template <class T> using Left = u8[STEPS<T>][OPERAND_BYTES];

template <class T> __device__ __forceinline__ u32 offset_of(u32 owner, u32 k) {
    constexpr u32 STEP = gradient_product::STEP<T>, CHUNK = gradient_product::PER_CHUNK<T>;
    return k / STEP * OPERAND_BYTES + logits::swizzled(owner, k % STEP / CHUNK) + k % CHUNK * u32(sizeof(T));
}

// Block-wide; `left` must not be in use, and is complete behind a barrier to come. A thread waits for four entries at once: some 800 are
// in a tile of a busy vocabulary.
template <class T> __device__ __forceinline__ void fill(Left<T>& left, const List& list) {
    constexpr u32 BATCH = 4;
    u8* bytes = &left[0][0];
    for (u32 at = threadIdx.x * 16; at < STEPS<T> * OPERAND_BYTES; at += THREADS * 16) *reinterpret_cast<Vec16*>(bytes + at) = {};
    __syncthreads();
    for (u32 base = threadIdx.x; base < list.count; base += BATCH * THREADS) {
        u32 entries[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (base + i * THREADS < list.count) entries[i] = list.entries[base + i * THREADS];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            if (base + i * THREADS >= list.count) continue;
            const u32 at = entries[i] >> 16;
            reinterpret_cast<T*>(bytes + offset_of<T>(at / TILE, at % TILE))->bits = prim::u16(entries[i]);
        }
    }
}

// ---- main loop ------------------------------------------------------------------------------------------------------------
template <class T> struct Operands {
    alignas(128) Left<T> left;
    alignas(128) u8 right[STAGES][OPERAND_BYTES];
};

struct Sources {                             // k -> row of C or of E; NONE: nothing there
    const u32* rows;
    u32 count;
    __device__ __forceinline__ u32 operator()(u32 k) const { return k < count ? rows[k] : NONE; }
};

// acc = sum over the block's sources of their tiles times their rows. The operands must be free, and are free again (of all threads) on return.
template <class T>
__device__ __forceinline__ void multiply(
    Accumulators& acc, Operands<T>& operands, const LceArgs& a, const Block& block, const gradient_product::Right<T, Sources>& right
) {
    const u32 *entries = entries_of(a, block), *tile_begin = tile_begin_of(a, block);
    const u32 apart = is_crowded(a, block) ? 2 : 1;
#pragma unroll
    for (u32 i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;

    const u32 thread = gradient_product::own_thread(), num_tiles = (right.rows.count + TILE - 1) / TILE, steps = num_tiles * STEPS<T>;
    const gradient_product::FragmentOffsets<T, false> at(thread);
    gradient_product::RightCopies<T, true, Sources> copies(right, thread);
    auto fetch = [&](u32 step) {
        if (step < steps) {
#pragma unroll
            for (u32 i = 0; i < gradient_product::CHUNKS; ++i) copies.start(operands.right[step % STAGES], right, i, thread);
            copies.look_up(right, step + 1, thread);
        }
        prim::cp_async_commit();                 // an empty group too: the wait below counts groups
    };
    for (u32 step = 0; step < STAGES - 1; ++step) fetch(step);
    for (u32 tile = 0; tile < num_tiles; ++tile) {
        const u32 begin = tile_begin[tile * apart], end = tile_begin[tile * apart + 1];      // not a tile ahead: that spills on sm_100
        if (tile > 0) __syncthreads();           // the tile before this one has been multiplied
        fill<T>(operands.left, {entries + begin, end - begin});
#pragma unroll 1
        for (u32 part = 0; part < STEPS<T>; ++part) {
            const u32 step = tile * STEPS<T> + part;
            prim::cp_async_wait<STAGES - 2>();
            __syncthreads();                     // this step's copies and the tile are everyone's, and the stage before it is free
            fetch(step + STAGES - 1);
            gradient_product::multiply_stage<T, false>(acc, operands.left[part], operands.right[step % STAGES], at);
        }
    }
    prim::cp_async_wait<0>();
    __syncthreads();
}

}  // namespace tiles
