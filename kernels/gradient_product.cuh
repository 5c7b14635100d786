// The two products with the logit gradients G of the exact path: 128 x 128 tiles of G C (for dE) and of G^T E (for dC).
//
//     left    G [rows, classes] in the workspace: read along its rows (G C) or transposed in place (G^T E)
//     right   rows of C or of E, [k][hidden]
//
// Eight warps, 2 (of the left's 128) x 4 (of the right's 128): a warp owns 64 x 32. Both operands go through a ring of shared
// memory stages of 64 bytes of k: 32 elements of 16 bits, or 16 of f32, which multiply as tf32 in three parts.
#pragma once

#include "logits_tile.cuh"

namespace gradient_product {

using prim::bf16;
using prim::f16;
using prim::u8;
using prim::Vec16;

// ---- tile ---------------------------------------------------------------------------------------------------------------
constexpr u32 TILE = 128;                    // rows and columns of a tile of the product
constexpr u32 THREADS = 256;
constexpr u32 STAGES = 4;
constexpr u32 STEP_BYTES = 64;               // of k, in a stage
constexpr u32 OPERAND_BYTES = TILE * STEP_BYTES;
constexpr u32 CHUNKS = OPERAND_BYTES / 16 / THREADS;   // 16-byte chunks that a thread copies of each operand, a stage

template <class T> constexpr u32 STEP = STEP_BYTES / sizeof(T);          // k's of a stage
template <class T> constexpr u32 PER_CHUNK = 16 / sizeof(T);             // elements of a chunk
template <class T> constexpr u32 ROW_CHUNKS = TILE / PER_CHUNK<T>;       // chunks of a row of an operand stored [k][128]

struct Ring {
    alignas(128) u8 left[STAGES][OPERAND_BYTES];
    alignas(128) u8 right[STAGES][OPERAND_BYTES];
};

using Accumulators = float[4][4][4];         // [16 rows][8 columns][row = lane / 4 (+ 8 from 2 on), column = lane % 4 * 2 (+ 1)]

// Row and column in the tile of a thread's accumulators [m][n][2 * h] and [m][n][2 * h + 1] (one column on).
__device__ __forceinline__ u32 row_of(u32 thread, u32 m, u32 h) { return thread / 128 * 64 + m * 16 + h * 8 + thread % 32 / 4; }
__device__ __forceinline__ u32 column_of(u32 thread, u32 n) { return thread / 32 % 4 * 32 + n * 8 + thread % 4 * 2; }

// acc[1] becomes acc[0] and so on. Registers have no index: a loop over m that is not unrolled, four times shorter, takes acc[0] in turn.
__device__ __forceinline__ void shift_rows(Accumulators& acc) {
#pragma unroll
    for (u32 i = 0; i < 48; ++i) acc[i / 16][i / 4 % 4][i % 4] = acc[i / 16 + 1][i / 4 % 4][i % 4];
}

// threadIdx.x, by a shuffle of every lane with itself. What derives from the plain index is the same all through the kernel: the
// compiler computes the addresses of all phases once at its start, and then spills them in the main loops.
__device__ __forceinline__ u32 own_thread() { return prim::shfl_idx(u32(threadIdx.x), int(threadIdx.x % 32)); }

// The block's tile, times `factor`, to rows of STRIDE words in shared memory. Complete behind a barrier to come.
template <u32 STRIDE> __device__ __forceinline__ void stage(float* staged, const Accumulators& acc, float factor) {
    const u32 thread = own_thread();
#pragma unroll
    for (u32 m = 0; m < 4; ++m)
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                const float first = acc[m][n][2 * h] * factor, second = acc[m][n][2 * h + 1] * factor;
                *reinterpret_cast<u64*>(&staged[row_of(thread, m, h) * STRIDE + column_of(thread, n)]) =
                    prim::f32_bits(first) | u64(prim::f32_bits(second)) << 32;
            }
}

// ---- shared memory layouts ----------------------------------------------------------------------------------------------
// [128][k], rows of 64 bytes, lies as a logits tile's operands do.
// [k][128]: for 16 bits ldmatrix reads one chunk of eight k's; for f32 a warp reads eight words of four k's.
template <class T> __device__ __forceinline__ u32 at_k(u32 k, u32 chunk) {
    const u32 swizzle = sizeof(T) == 2 ? (k & 7) : (k & 3) * 2;
    return (k * ROW_CHUNKS<T> + (chunk ^ swizzle)) * 16;
}

// ---- rows of the right operand ------------------------------------------------------------------------------------------
struct ClassRows {                           // k -> class
    u32 first, vocab;
    __device__ __forceinline__ u32 operator()(u32 k) const { return k < vocab - first ? first + k : NONE; }
};

struct ExactTokens {                         // k-th exact row -> token
    const u32 *exact_row, *row_token;
    u32 count;
    __device__ __forceinline__ u32 operator()(u32 k) const { return k < count ? row_token[exact_row[k]] : NONE; }
};

// A matrix whose rows are gathered; a tile's columns begin at `column`, and what lies outside counts as 0.
template <class T, class Rows> struct Right {
    const T* data;
    i64 stride;
    Rows rows;
    u32 column, columns;
};

// ---- copies into a stage ------------------------------------------------------------------------------------------------
// A thread copies CHUNKS chunks of either operand each step. They lie 4 KiB apart in the stage: the swizzles repeat there.
constexpr u32 CHUNK_APART = THREADS * 16;

// The right operand's.
template <class T, bool ALIGNED, class Rows> struct RightCopies {
    static constexpr u32 ROWS_APART = THREADS / ROW_CHUNKS<T>;       // k's between a thread's chunks
    u32 to;                                  // bytes in a stage
    u32 count;                               // elements inside the matrix, of a chunk
    u32 row[CHUNKS];                         // of the next step's chunks, looked up a step ahead: two dependent loads would stall the copies

    __device__ __forceinline__ RightCopies(const Right<T, Rows>& right, u32 thread) {
        const u32 k = thread / ROW_CHUNKS<T>, chunk = thread % ROW_CHUNKS<T>;
        to = at_k<T>(k, chunk);
        const u32 column = right.column + chunk * PER_CHUNK<T>, inside = column < right.columns ? right.columns - column : 0;
        count = inside < PER_CHUNK<T> ? inside : PER_CHUNK<T>;
        look_up(right, 0, thread);
    }

    __device__ __forceinline__ void look_up(const Right<T, Rows>& right, u32 step, u32 thread) {
#pragma unroll
        for (u32 i = 0; i < CHUNKS; ++i) row[i] = right.rows(step * STEP<T> + thread / ROW_CHUNKS<T> + i * ROWS_APART);
    }

    __device__ __forceinline__ void start(u8* stage, const Right<T, Rows>& right, u32 i, u32 thread) const {
        const u32 column = right.column + thread % ROW_CHUNKS<T> * PER_CHUNK<T>;
        const u32 inside = row[i] == NONE ? 0 : count;
        const T* from = inside == 0 ? right.data : right.data + i64(row[i]) * right.stride + column;
        u8* chunk = stage + to + i * CHUNK_APART;
        if constexpr (ALIGNED) prim::cp_async_16(chunk, from, inside * sizeof(T));
        else *reinterpret_cast<Vec16*>(chunk) = logits::gather_chunk<T>(from, inside);
    }
};

template <class T, bool TRANSPOSED, bool ALIGNED, class Rows> struct Copies {
    static constexpr u32 LEFT_APART = TRANSPOSED ? THREADS / ROW_CHUNKS<T> : THREADS / 4;    // rows of G between a thread's chunks
    const T* left;                           // of the next step
    u32 left_to;                             // bytes in a stage
    RightCopies<T, ALIGNED, Rows> of_right;

    __device__ __forceinline__ Copies(const T* tile, u32 left_stride, const Right<T, Rows>& right, u32 thread) : of_right(right, thread) {
        const u32 k = thread / ROW_CHUNKS<T>, chunk = thread % ROW_CHUNKS<T>;
        if constexpr (TRANSPOSED) {
            left = tile + u64(k) * left_stride + chunk * PER_CHUNK<T>;
            left_to = at_k<T>(k, chunk);
        } else {
            left = tile + u64(thread / 4) * left_stride + thread % 4 * PER_CHUNK<T>;
            left_to = logits::swizzled(thread / 4, thread % 4);
        }
    }

    // G is a workspace of whole tiles: aligned, and with nothing outside.
    __device__ __forceinline__ void start(u8* left_stage, u8* right_stage, u32 left_stride, const Right<T, Rows>& right, u32 step, u32 thread) {
#pragma unroll
        for (u32 i = 0; i < CHUNKS; ++i) {
            prim::cp_async_16(left_stage + left_to + i * CHUNK_APART, left + u64(i) * LEFT_APART * left_stride, 16);
            of_right.start(right_stage, right, i, thread);
        }
        left += TRANSPOSED ? u64(STEP<T>) * left_stride : u64(STEP<T>);
        of_right.look_up(right, step + 1, thread);
    }
};

// ---- one stage on the tensor cores --------------------------------------------------------------------------------------
// Of 16 bits. Offsets in a stage of the rows that a lane names to ldmatrix; 16 k's are 4 KiB of a [k][128] operand, 32 bytes else.
template <class T, bool TRANSPOSED> struct FragmentOffsets {
    u32 left[TRANSPOSED ? 4 : 2];            // of 16 rows each, or of 16 k's each
    u32 right[2];                            // of 16 columns each

    __device__ __forceinline__ explicit FragmentOffsets(u32 thread) {
        const u32 lane = thread % 32, row0 = thread / 128 * 64, column0 = thread / 32 % 4 * 32;
        if constexpr (TRANSPOSED) {          // (rows, k), (rows + 8, k), (rows, k + 8), (rows + 8, k + 8)
#pragma unroll
            for (u32 m = 0; m < 4; ++m) left[m] = at_k<T>(lane / 16 * 8 + lane % 8, row0 / 8 + m * 2 + lane / 8 % 2);
        } else {
#pragma unroll
            for (u32 slice = 0; slice < 2; ++slice) left[slice] = logits::swizzled(row0 + lane % 16, slice * 2 + lane / 16);
        }
#pragma unroll
        for (u32 n = 0; n < 2; ++n)          // (k, columns), (k + 8, columns), (k, columns + 8), (k + 8, columns + 8)
            right[n] = at_k<T>(lane / 8 % 2 * 8 + lane % 8, column0 / 8 + n * 2 + lane / 16);
    }
};

template <class T, bool TRANSPOSED>
__device__ __forceinline__ void multiply_stage(Accumulators& acc, const u8* left, const u8* right, const FragmentOffsets<T, TRANSPOSED>& at) {
#pragma unroll
    for (u32 slice = 0; slice < 2; ++slice) {    // of 16 k's
        u32 b[4][2];
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
            u32 pair[4];
            prim::ldmatrix_x4_trans(pair, right + at.right[n] + slice * 16 * TILE * 2);
            b[2 * n][0] = pair[0], b[2 * n][1] = pair[1], b[2 * n + 1][0] = pair[2], b[2 * n + 1][1] = pair[3];
        }
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {
            u32 a[4];
            if constexpr (TRANSPOSED) prim::ldmatrix_x4_trans(a, left + at.left[m] + slice * 16 * TILE * 2);
            else prim::ldmatrix_x4(a, left + at.left[slice] + m * 16 * STEP_BYTES);
#pragma unroll
            for (u32 n = 0; n < 4; ++n) prim::mma_m16n8k16<T>(acc[m][n], a, b[n]);
        }
    }
}

// Offsets in a [k][128] stage of f32 of the word that this lane has of four k's and eight columns: at[j] + 512 k + 128 i for k's from
// k on (a multiple of 4) and columns from 32 i + 8 j on. There are only four, since a lane's k is always the same modulo 4.
struct WordOffsets {
    u32 at[4];
    __device__ __forceinline__ explicit WordOffsets(u32 thread) {
        const u32 lane = thread % 32;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) at[j] = at_k<float>(lane % 4, j * 2 + lane / 16) + lane / 4 % 4 * 4;
    }
    __device__ __forceinline__ u32 word(const u8* stage, u32 k, u32 column) const {
        return *reinterpret_cast<const u32*>(stage + at[column / 8 % 4] + k * (TILE * 4) + column / 32 * 128);
    }
};

template <bool TRANSPOSED>
__device__ __forceinline__ void multiply_stage_f32(Accumulators& acc, const u8* left, const u8* right, const WordOffsets& words, u32 thread) {
    const u32 lane = thread % 32, row0 = thread / 128 * 64, column0 = thread / 32 % 4 * 32;
    right += column0 * 4;
    if constexpr (TRANSPOSED) left += row0 * 4;
#pragma unroll 1                                 // both k's at once do not fit 128 registers
    for (u32 k = 0; k < 16; k += 8) {
        u32 b[4][2], b_low[4][2];
#pragma unroll
        for (u32 n = 0; n < 4; ++n)
#pragma unroll
            for (u32 i = 0; i < 2; ++i) logits::split_tf32(words.word(right, k + i * 4, n * 8), b[n][i], b_low[n][i]);
#pragma unroll
        for (u32 m = 0; m < 4; ++m) {            // (row, k), (row + 8, k), (row, k + 4), (row + 8, k + 4)
            u32 a[4], a_low[4];
            if constexpr (TRANSPOSED) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) a[i] = words.word(left, k + i / 2 * 4, m * 16 + i % 2 * 8);
            } else {
                prim::ldmatrix_x4(a, left + logits::swizzled(row0 + m * 16 + lane % 16, k / 4 + lane / 16));
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) logits::split_tf32(a[i], a[i], a_low[i]);
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {        // as in the logits: small terms first, and added in f32, which rounds
                float sum[4] = {};
                prim::mma_m16n8k8_tf32(sum, a_low, b[n]);
                prim::mma_m16n8k8_tf32(sum, a, b_low[n]);
                prim::mma_m16n8k8_tf32(sum, a, b[n]);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) acc[m][n][i] += sum[i];
            }
        }
    }
}

// ---- main loop ----------------------------------------------------------------------------------------------------------
// What a lane needs to find its fragments.
template <class T, bool TRANSPOSED> struct Multiplier {
    FragmentOffsets<T, TRANSPOSED> at;
    __device__ __forceinline__ explicit Multiplier(u32 thread) : at(thread) {}
    __device__ __forceinline__ void operator()(Accumulators& acc, const u8* left, const u8* right, u32) const {
        multiply_stage<T, TRANSPOSED>(acc, left, right, at);
    }
};
template <bool TRANSPOSED> struct Multiplier<float, TRANSPOSED> {
    WordOffsets words;
    __device__ __forceinline__ explicit Multiplier(u32 thread) : words(thread) {}
    __device__ __forceinline__ void operator()(Accumulators& acc, const u8* left, const u8* right, u32 thread) const {
        multiply_stage_f32<TRANSPOSED>(acc, left, right, words, thread);
    }
};

// acc = sum over k in [0, steps * STEP) of left(row, k) right(k, column). `left` is the tile's first element of G: its row 0 at k = 0, or,
// transposed, its column 0 at k = 0. The ring must be free, and is free again (of all threads) on return.
template <class T, bool TRANSPOSED, bool ALIGNED, class Rows>
__device__ __forceinline__ void multiply(
    Accumulators& acc, Ring& ring, const T* left, u32 left_stride, const Right<T, Rows>& right, u32 steps
) {
#pragma unroll
    for (u32 i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;

    const u32 thread = own_thread();
    const Multiplier<T, TRANSPOSED> multiplier(thread);
    Copies<T, TRANSPOSED, ALIGNED, Rows> copies(left, left_stride, right, thread);
    auto fetch = [&](u32 step) {
        const u32 stage = step % STAGES;
        if (step < steps) copies.start(ring.left[stage], ring.right[stage], left_stride, right, step, thread);
        prim::cp_async_commit();                 // an empty group too: the wait below counts groups
    };
    for (u32 step = 0; step < STAGES - 1; ++step) fetch(step);
    for (u32 step = 0; step < steps; ++step) {
        prim::cp_async_wait<STAGES - 2>();
        __syncthreads();                         // this step's copies are everyone's, and the stage before it is free
        fetch(step + STAGES - 1);
        multiplier(acc, ring.left[step % STAGES], ring.right[step % STAGES], thread);
    }
    prim::cp_async_wait<0>();
    __syncthreads();
}

}  // namespace gradient_product
