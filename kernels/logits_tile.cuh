// Tiles of E·Cᵀ in registers: the main loop of the sm_80 forward and of the exact path.
//
//   256 threads = 8 warps as 2 (rows) x 4 (classes); a tile is 128 rows x 128 classes, a warp's part 64 x 32.
//   A step takes 64 bytes of every row, 32 elements of 16 bits or 16 of 32; four steps are in flight.
//
//        classes          Fragments are moved by bytes, so that 16-bit types (m16n8k16) and f32 (tf32 m16n8k8) share
//       0 32 64 96        every address: 32 bytes of a row are one k of a product. An f32 product is three of tf32.
//    0 ┌──┬──┬──┬──┐
//      │w0│w1│w2│w3│      acc[m][n][i] of lane l is row    64 (w / 4) + 16 m + l / 4 + 8 (i / 2)
// rows ├──┼──┼──┼──┤                          and class  32 (w % 4) +  8 n + 2 (l % 4) + i % 2 of the tile.
//   64 │w4│w5│w6│w7│
//      └──┴──┴──┴──┘
//
// Rows beyond the caller's and classes beyond V hold repeated values of others: mask them.
#pragma once

#include "abi.h"

namespace logits {

using prim::u8;

// ---- shape --------------------------------------------------------------------------------------------------------
constexpr u32 THREADS = 256;
constexpr u32 WARPS_V = 4;
constexpr u32 WARP_N = 64, WARP_V = 32;      // a warp's part of the tile
constexpr u32 MMA_N = WARP_N / 16, MMA_V = WARP_V / 8;
constexpr u32 STAGES = 4;
constexpr u32 STEP_BYTES = 64;
constexpr u32 CHUNK_BYTES = 16;
constexpr u32 COPIES = BLOCK_N * STEP_BYTES / CHUNK_BYTES / THREADS;   // chunks of one operand a thread copies a step
static_assert(BLOCK_N == BLOCK_V && COPIES == 2, "a thread copies two chunks of either operand");

// Two steps at least: between the first barrier of a tile and its end lies a second one, see for_each_tile.
template <class T> __device__ __forceinline__ u32 num_steps(u32 hidden) {
    const u32 steps = (hidden * u32(sizeof(T)) + STEP_BYTES - 1) / STEP_BYTES;
    return steps < 2 ? 2 : steps;
}

struct Ring {                                // 64 KiB of shared memory
    alignas(128) u8 rows[STAGES][BLOCK_N * STEP_BYTES];
    alignas(128) u8 classes[STAGES][BLOCK_V * STEP_BYTES];
};

// Four chunks make a row of a stage, two rows the 128 bytes of all banks: with chunk c of row r in place c ^ (r / 2 % 4),
// the eight rows that one phase of ldmatrix reads lie in different banks.
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) {
    return row * STEP_BYTES + (chunk ^ (row / 2 % 4)) * CHUNK_BYTES;
}

__device__ __forceinline__ bool is_multiple_of_16(const void* data, i64 stride_bytes) {
    return ((reinterpret_cast<u64>(data) | u64(stride_bytes)) & 15) == 0;
}

// ---- from global to shared memory -----------------------------------------------------------------------------------
// The first `count` elements of a chunk, zeros after them.
template <class T> __device__ __forceinline__ prim::Vec16 gather_chunk(const T* from, i64 count) {
    prim::Vec16 chunk;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk.w[i] = i < count ? prim::f32_bits(from[i]) : 0;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 lo = 2 * i < count ? from[2 * i].bits : 0, hi = 2 * i + 1 < count ? from[2 * i + 1].bits : 0;
            chunk.w[i] = lo | hi << 16;
        }
    }
    return chunk;
}

// Copies the steps of all tiles, one after another, into the ring. Thread t copies chunk t % 4 of rows t / 4 and t / 4 + 64.
template <class T, bool ALIGNED> struct Loader {
    const LceProblem& problem;
    Ring& ring;
    const u8* row[COPIES];                   // of E
    const u8* class_row[COPIES];             // of C, of the tile that is being copied
    u32 tile, end_tile, stage, step_byte;    // where the next step is
    bool vector_rows, vector_classes;        // !ALIGNED: whether that operand has 16-byte rows nevertheless

    template <class TokenOf>
    __device__ __forceinline__ Loader(const LceProblem& problem, Ring& ring, u32 first_tile, u32 end_tile, TokenOf token_of)
        : problem(problem), ring(ring), tile(first_tile), end_tile(end_tile), stage(0), step_byte(0) {
#pragma unroll
        for (u32 i = 0; i < COPIES; ++i) {
            const i64 token = token_of(threadIdx.x / 4 + i * BLOCK_N / COPIES);
            row[i] = reinterpret_cast<const u8*>(static_cast<const T*>(problem.embeddings) + token * problem.embeddings_stride);
        }
        if constexpr (!ALIGNED) {
            const bool any = problem.hidden > 0;
            vector_rows = any && is_multiple_of_16(problem.embeddings, problem.embeddings_stride * i64(sizeof(T)));
            vector_classes = any && is_multiple_of_16(problem.classifier, problem.classifier_stride * i64(sizeof(T)));
        }
        find_class_rows();
    }

    __device__ __forceinline__ void find_class_rows() {
#pragma unroll
        for (u32 i = 0; i < COPIES; ++i) {
            const u32 wanted = tile * BLOCK_V + threadIdx.x / 4 + i * BLOCK_V / COPIES;
            const i64 c = wanted < problem.vocab ? wanted : problem.vocab - 1;
            class_row[i] = reinterpret_cast<const u8*>(static_cast<const T*>(problem.classifier) + c * problem.classifier_stride);
        }
    }

    __device__ __forceinline__ void copy(u8* to, const u8* from, u32 offset, i64 bytes, bool vector) const {
        if (ALIGNED || vector) {
            prim::cp_async_16(to, from + offset, u32(bytes));
        } else {
            *reinterpret_cast<prim::Vec16*>(to) =
                gather_chunk<T>(reinterpret_cast<const T*>(from + offset), bytes / i64(sizeof(T)));
        }
    }

    // Starts the next step's copies; one group of them, empty when no step is left, so that waits can count groups.
    __device__ __forceinline__ void next() {
        if (tile < end_tile) {
            const u32 row_bytes = problem.hidden * u32(sizeof(T)), at = step_byte + threadIdx.x % 4 * CHUNK_BYTES;
            const u32 left = at < row_bytes ? row_bytes - at : 0, bytes = left < CHUNK_BYTES ? left : CHUNK_BYTES;
            const u32 offset = left > 0 ? at : 0;      // an address inside the row, also for a chunk of zeros
            const u32 to = swizzled(threadIdx.x / 4, threadIdx.x % 4);
#pragma unroll
            for (u32 i = 0; i < COPIES; ++i) {
                const u32 below = i * BLOCK_N / COPIES * STEP_BYTES;     // a multiple of 8 rows: the same swizzle
                copy(&ring.rows[stage][to + below], row[i], offset, bytes, !ALIGNED && vector_rows);
                copy(&ring.classes[stage][to + below], class_row[i], offset, bytes, !ALIGNED && vector_classes);
            }
            stage = (stage + 1) % STAGES;
            step_byte += STEP_BYTES;
            if (step_byte >= num_steps<T>(problem.hidden) * STEP_BYTES) {
                step_byte = 0;
                if (++tile < end_tile) find_class_rows();
            }
        }
        prim::cp_async_commit();
    }
};

// ---- from shared memory to products ---------------------------------------------------------------------------------
// Addresses of this lane in a stage, of the first k of a step: of A's first 16 x 32 byte fragment and of B's first two 8 x 32
// byte ones. The second k lies two chunks on, which the swizzle turns into an exclusive or.
struct FragmentOffsets {
    u32 rows, classes;

    __device__ __forceinline__ FragmentOffsets() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        rows = swizzled(warp / WARPS_V * WARP_N + lane % 16, lane / 16);
        classes = swizzled(warp % WARPS_V * WARP_V + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
};
constexpr u32 MMA_K_BYTES = 2 * CHUNK_BYTES;

// x = hi + lo, either of tf32's 11 bits; what is lost is below 2^-22 |x|.
__device__ __forceinline__ void split_tf32(u32 x, u32& hi, u32& lo) {
    hi = prim::to_tf32(prim::bits_f32(x));
    lo = prim::to_tf32(prim::bits_f32(x) - prim::bits_f32(hi));
}
// The same where x may be infinite. In the small products hi counts as `partner`, 0 where hi is not finite: an infinity times
// the other's lo may have the wrong sign, and infinity - infinity is NaN.
struct Tf32Pair {
    u32 hi, partner, lo;
    __device__ __forceinline__ explicit Tf32Pair(u32 x) {
        split_tf32(x, hi, lo);
        const bool finite = prim::fabs(prim::bits_f32(hi)) < prim::bits_f32(0x7f800000);
        partner = finite ? hi : 0;
        lo = finite ? lo : 0;
    }
};

template <class T>
__device__ __forceinline__ void multiply_step(float (&acc)[MMA_N][MMA_V][4], const u8* rows, const u8* classes,
                                              const FragmentOffsets& at) {
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
        u32 b[MMA_V][2];
#pragma unroll
        for (u32 n = 0; n < MMA_V; n += 2) {
            u32 pair[4];
            prim::ldmatrix_x4(pair, classes + (at.classes ^ k * MMA_K_BYTES) + n * 8 * STEP_BYTES);
            b[n][0] = pair[0], b[n][1] = pair[1], b[n + 1][0] = pair[2], b[n + 1][1] = pair[3];
        }
#pragma unroll
        for (u32 m = 0; m < MMA_N; ++m) {
            u32 a[4];
            prim::ldmatrix_x4(a, rows + (at.rows ^ k * MMA_K_BYTES) + m * 16 * STEP_BYTES);
#pragma unroll
            for (u32 n = 0; n < MMA_V; ++n) prim::mma_m16n8k16<T>(acc[m][n], a, b[n]);
        }
    }
}

// f32 as three products of tf32.
__device__ __forceinline__ void multiply_step_tf32(float (&acc)[MMA_N][MMA_V][4], const u8* rows, const u8* classes,
                                                   const FragmentOffsets& at) {
#pragma unroll 1
    for (u32 k = 0; k < 2; ++k) {
        u32 b[MMA_V][2], b_partner[MMA_V][2], b_lo[MMA_V][2];
#pragma unroll
        for (u32 n = 0; n < MMA_V; n += 2) {
            u32 pair[4];
            prim::ldmatrix_x4(pair, classes + (at.classes ^ k * MMA_K_BYTES) + n * 8 * STEP_BYTES);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const Tf32Pair x(pair[i]);
                b[n + i / 2][i % 2] = x.hi, b_partner[n + i / 2][i % 2] = x.partner, b_lo[n + i / 2][i % 2] = x.lo;
            }
        }
#pragma unroll
        for (u32 m = 0; m < MMA_N; ++m) {
            u32 a[4], a_partner[4], a_lo[4];
            prim::ldmatrix_x4(a, rows + (at.rows ^ k * MMA_K_BYTES) + m * 16 * STEP_BYTES);
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const Tf32Pair x(a[i]);
                a[i] = x.hi, a_partner[i] = x.partner, a_lo[i] = x.lo;
            }
#pragma unroll
            for (u32 n = 0; n < MMA_V; ++n) {
                // Small terms first. A sum of their own, added in plain f32: tensor cores cut off where f32 rounds, and three
                // cuts for every eight elements would be a drift of more than a few ulps at D = 1000.
                float sum[4] = {};
                prim::mma_m16n8k8_tf32(sum, a_lo, b_partner[n]);
                prim::mma_m16n8k8_tf32(sum, a_partner, b_lo[n]);
                prim::mma_m16n8k8_tf32(sum, a, b[n]);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) acc[m][n][i] += sum[i];
            }
        }
    }
}

// ---- the loop -------------------------------------------------------------------------------------------------------
// For each tile of classes [BLOCK_V tile, BLOCK_V (tile + 1)), tile in [first_tile, end_tile), computes the products of the
// block's 128 rows and hands them to `tile_done(tile, acc)`. Copies run ahead across tiles: those of the next tile are
// on their way while `tile_done` works.
//
//   token_of(row)     row in 0..128: its token, a valid one also for rows beyond the caller's
//   tile_start(tile)  called by all threads between the tile's first barrier and another one that comes before tile_done:
//                     what was written to shared memory by the last tile_done is seen there, and may be read at leisure
//   ALIGNED           base and row stride of E and of C are multiples of 16 bytes and D > 0; otherwise it is looked at here,
//                     and an operand that is not aligned is read element by element
//
// All threads of the block call it with the same range. It returns with the ring free for the next call.
template <class T, bool ALIGNED, class TokenOf, class TileStart, class TileDone>
__device__ __forceinline__ void for_each_tile(const LceProblem& problem, Ring& ring, u32 first_tile, u32 end_tile,
                                              TokenOf token_of, TileStart tile_start, TileDone tile_done) {
    Loader<T, ALIGNED> loader(problem, ring, first_tile, end_tile, token_of);
    for (u32 s = 0; s < STAGES - 1; ++s) loader.next();
    const FragmentOffsets at;
    const u32 steps = num_steps<T>(problem.hidden);
    u32 stage = 0;
    for (u32 tile = first_tile; tile < end_tile; ++tile) {
        float acc[MMA_N][MMA_V][4] = {};
        for (u32 step = 0; step < steps; ++step) {
            prim::cp_async_wait<STAGES - 2>();
            __syncthreads();                 // this step's copies have landed for all, and the last step's stage is free
            if (step == 0) tile_start(tile);
            loader.next();
            if constexpr (sizeof(T) == 4) {
                multiply_step_tf32(acc, ring.rows[stage], ring.classes[stage], at);
            } else {
                multiply_step<T>(acc, ring.rows[stage], ring.classes[stage], at);
            }
            stage = (stage + 1) % STAGES;
        }
        tile_done(tile, acc);
    }
    prim::cp_async_wait<0>();
    __syncthreads();
}

}  // namespace logits
