// Products with the logit gradients G of the frequent classes: tiles of 128 rows x 128 such classes come about in shared memory, from
// lists, and are multiplied by tensor cores.
//
//     left    a tile of G: zeros, and the entries of its list; read along its rows (G C, for dE) or transposed (G^T E, for dC)
//     right   128 rows of C or of E, gathered, 128 columns: [k][hidden]
//
// Layouts, fragments and warps are those of gradient_product.cuh; the right operand runs ahead through its ring, across tiles.
#pragma once

#include "gradient_product.cuh"

namespace frequent {

using gradient_product::Accumulators;
using gradient_product::OPERAND_BYTES;
using gradient_product::STAGES;
using gradient_product::TILE;
using prim::u8;
using prim::Vec16;

constexpr u32 THREADS = gradient_product::THREADS;
static_assert(TILE == BLOCK_N, "a tile has the rows of a row block");

// ---- lists ----------------------------------------------------------------------------------------------------------------
// Entries (row in the block * TILE + class in the tile, gradient) of a tile, in any order: each has a place of its own.
struct List { const LceEntry* entries; u32 count; };

__device__ __forceinline__ u32 num_tiles(const LceArgs& a) { return (a.backward.columns->frequent + TILE - 1) / TILE; }

// Where the lists of a row block's tiles begin, that of tile t at [t]; one more is the end.
__device__ __forceinline__ u32* tile_begin(const LceArgs& a, u32 row_block) {
    return a.backward.tile_begin + u64(row_block) * (a.backward.most_frequent / TILE + 1);
}

__device__ __forceinline__ List list_of(const LceArgs& a, u32 row_block, u32 tile) {
    const u32* begin = tile_begin(a, row_block) + tile;
    return {a.backward.column_entries + begin[0], begin[1] - begin[0]};
}

// The block's threads take its entries; each waits for four at once, what a tile has in a busy vocabulary (some 800).
template <class Use> __device__ __forceinline__ void for_each_entry(const List& list, Use use) {
    constexpr u32 BATCH = 4;
    for (u32 base = threadIdx.x; base < list.count; base += BATCH * THREADS) {
        LceEntry entries[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (base + i * THREADS < list.count) entries[i] = list.entries[base + i * THREADS];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (base + i * THREADS < list.count) use(entries[i]);
    }
}

// ---- the left operand -----------------------------------------------------------------------------------------------------
// As many stages as a tile has steps of 64 bytes of k, each as gradient_product.cuh has it.
template <class T> constexpr u32 STEPS = TILE / gradient_product::STEP<T>;
template <class T> using Left = u8[STEPS<T>][OPERAND_BYTES];

template <class T, bool TRANSPOSED> __device__ __forceinline__ u32 offset_of(u32 row, u32 class_in_tile) {
    const u32 at = TRANSPOSED ? class_in_tile : row, k = TRANSPOSED ? row : class_in_tile, in_step = k % gradient_product::STEP<T>;
    constexpr u32 CHUNK = gradient_product::PER_CHUNK<T>;
    const u32 in_stage = TRANSPOSED ? gradient_product::at_k<T>(in_step, at / CHUNK) + at % CHUNK * u32(sizeof(T))
                                    : logits::swizzled(at, in_step / CHUNK) + in_step % CHUNK * u32(sizeof(T));
    return k / gradient_product::STEP<T> * OPERAND_BYTES + in_stage;
}

// Block-wide; `left` must not be in use, and is complete behind a barrier to come.
template <class T, bool TRANSPOSED> __device__ __forceinline__ void fill(Left<T>& left, const List& list) {
    u8* bytes = &left[0][0];
    for (u32 at = threadIdx.x * 16; at < STEPS<T> * OPERAND_BYTES; at += THREADS * 16) *reinterpret_cast<Vec16*>(bytes + at) = {};
    __syncthreads();
    for_each_entry(list, [&](LceEntry entry) {
        *reinterpret_cast<T*>(bytes + offset_of<T, TRANSPOSED>(entry.index / TILE, entry.index % TILE)) = prim::from_f32<T>(entry.value);
    });
}

// ---- main loop ------------------------------------------------------------------------------------------------------------
template <class T> struct Operands {
    alignas(128) Left<T> left;
    alignas(128) u8 right[STAGES][OPERAND_BYTES];
};

// acc = sum over tiles t in [0, tiles) of the tile that list(t) is of, times right rows [TILE t, TILE (t + 1)). The operands must be free,
// and are free again (of all threads) on return. Nothing is multiplied with a tile that has no entry, nor with a row that is NONE.
template <class T, bool TRANSPOSED, class Rows, class ListOf>
__device__ __forceinline__ void multiply(
    Accumulators& acc, Operands<T>& operands, u32 tiles, ListOf list, const gradient_product::Right<T, Rows>& right
) {
#pragma unroll
    for (u32 i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;

    const u32 thread = gradient_product::own_thread(), steps = tiles * STEPS<T>;
    const gradient_product::FragmentOffsets<T, TRANSPOSED> at(thread);
    gradient_product::RightCopies<T, true, Rows> copies(right, thread);
    auto fetch = [&](u32 step) {
        if (step < steps) {
#pragma unroll
            for (u32 i = 0; i < gradient_product::CHUNKS; ++i) copies.start(operands.right[step % STAGES], right, i, thread);
            copies.look_up(right, step + 1, thread);
        }
        prim::cp_async_commit();                 // an empty group too: the wait below counts groups
    };
    for (u32 step = 0; step < STAGES - 1; ++step) fetch(step);
    for (u32 tile = 0; tile < tiles; ++tile) {
        const List entries = list(tile);         // not a tile ahead: that spills on sm_100
        if (tile > 0) __syncthreads();           // the tile before this one has been multiplied
        fill<T, TRANSPOSED>(operands.left, entries);
#pragma unroll 1
        for (u32 part = 0; part < STEPS<T>; ++part) {
            const u32 step = tile * STEPS<T> + part;
            prim::cp_async_wait<STAGES - 2>();
            __syncthreads();                     // this step's copies and the tile are everyone's, and the stage before it is free
            fetch(step + STAGES - 1);
            if (entries.count > 0)
                gradient_product::multiply_stage<T, TRANSPOSED>(acc, operands.left[part], operands.right[step % STAGES], at);
        }
    }
    prim::cp_async_wait<0>();
    __syncthreads();
}

}  // namespace frequent
