// dE of every token, from the kept entries of its row: dE_i = scale (sum over entries of g C[class] - spread_i class_sum).
//
//     grid (N, ceil(D / 1024)): a block owns a token and a share of the columns; a thread 8 columns, in 16-byte vectors
//
// What bounds it: gathered rows of C, N k D elements, from L2 or HBM. A thread has 8 vectors in flight: 7 blocks of an SM keep
// 112 KiB on their way. The longest row is the tail: about 1 / eps entries, 8 at a time. Rows of the exact path are left to it, and
// sparse rows of blocks that multiply tiles to lce_d_embeddings_tiles.
#include "abi.h"
#include "gather.cuh"
#include "gradient.cuh"
#include "sink.cuh"

namespace {

using gather::VECTOR;
using prim::bf16;
using prim::f16;
using prim::Vec16;

constexpr u32 THREADS = 128;
// 72 registers, those of 7 blocks, spill up to 136 bytes from sm_100 on; f32 spills 24 with the 96 of 5 (ptxas 13.0).
#if __CUDA_ARCH__ >= 1000
template <class T> constexpr u32 BLOCKS_PER_SM = sizeof(T) == 4 ? 6 : 5;
#else
template <class T> constexpr u32 BLOCKS_PER_SM = 7;
#endif
constexpr u32 STAGED = THREADS;                  // entries whose gradients are computed at a time, one a thread
template <class T> constexpr u32 PARTS = 8 / VECTOR<T>;              // vectors of a thread
// Entries in flight: 8 vectors at once; unaligned rows come element by element, and need the registers.
template <class T, bool ALIGNED> constexpr u32 BATCH = ALIGNED ? 8 / PARTS<T> : 1;

struct Smem {
    i64 row[STAGED];                             // offset of the entry's row of C
    float gradient[STAGED];                      // times logit_scale
};

template <class T> using Sums = float[PARTS<T>][VECTOR<T>];

// Adds staged entries [first, first + BATCH), or, with TAIL, the `count` of them that there are.
template <class T, bool ALIGNED, bool TAIL>
__device__ __forceinline__ void add_batch(Sums<T>& sums, const Smem& smem, const T* classifier, u32 first, u32 count, u32 column, u32 end) {
    Vec16 v[BATCH<T, ALIGNED>][PARTS<T>];
#pragma unroll
    for (u32 k = 0; k < BATCH<T, ALIGNED>; ++k) {
        if (TAIL && k >= count) continue;
        const T* row = classifier + smem.row[first + k];
#pragma unroll
        for (u32 part = 0; part < PARTS<T>; ++part)
            v[k][part] = gather::load<T, ALIGNED>(row, column + part * THREADS * VECTOR<T>, end);
    }
#pragma unroll
    for (u32 k = 0; k < BATCH<T, ALIGNED>; ++k) {
        if (TAIL && k >= count) continue;
        const float g = smem.gradient[first + k];
#pragma unroll
        for (u32 part = 0; part < PARTS<T>; ++part) gather::add_scaled<T>(sums[part], g, v[k][part]);
    }
}

template <class T, bool ALIGNED>
__device__ __forceinline__ void sum_row(const LceArgs& a, u32 row, const LceCoefficients& c, u32 count, u32 begin, u32 end) {
    Smem& smem = prim::shared_memory<Smem>();
    const LceProblem& p = a.problem;
    const T* classifier = static_cast<const T*>(p.classifier);
    const u32 target = a.saved.row_class[row], token = a.saved.row_token[row];
    const u32 column = begin + threadIdx.x * VECTOR<T>;
    const u64 list = u64(row / BLOCK_N) * a.block_entries + (count == 0 ? 0 : a.saved.entry_begin[row]);

    // ---- gather -----------------------------------------------------------------------------------------------------------
    Sums<T> sums = {};
    for (u32 base = 0; base < count; base += STAGED) {
        const u32 staged = count - base < STAGED ? count - base : STAGED;
        if (base != 0) __syncthreads();          // the entries before have been used
        if (threadIdx.x < staged) {
            const LceRowStatistics statistics = a.saved.statistics[row];     // here: not in registers while the rows are summed
            const LceEntry entry = a.saved.entries[list + base + threadIdx.x];
            smem.row[threadIdx.x] = i64(entry.index) * p.classifier_stride;
            smem.gradient[threadIdx.x] = gradient::of_entry(p, statistics, c, entry.value, entry.index == target) * p.logit_scale;
        }
        __syncthreads();
        u32 k = 0;
        for (; k + BATCH<T, ALIGNED> <= staged; k += BATCH<T, ALIGNED>) add_batch<T, ALIGNED, false>(sums, smem, classifier, k, BATCH<T, ALIGNED>, column, end);
        if (k < staged) add_batch<T, ALIGNED, true>(sums, smem, classifier, k, staged - k, column, end);
    }

    // ---- smoothing's dense part, store --------------------------------------------------------------------------------------
#pragma unroll
    for (u32 part = 0; part < PARTS<T>; ++part) {
        const u32 at = column + part * THREADS * VECTOR<T>;
        if (at >= end) continue;
        if (a.backward.class_sum != nullptr) {
#pragma unroll
            for (u32 i = 0; i < VECTOR<T>; ++i)
                if (at + i < end) sums[part][i] -= c.spread * p.logit_scale * a.backward.class_sum[at + i];
        }
        sink::put<false>(a.d_embeddings, u64(token) * p.hidden + at, sums[part], end - at);
    }
}

__device__ __forceinline__ void fill(const LceArgs& a, u32 token, u32 begin, u32 end, float value) {
    const float values[8] = {value, value, value, value, value, value, value, value};
    for (u32 at = begin + threadIdx.x * 8; at < end; at += THREADS * 8)
        sink::put<false>(a.d_embeddings, u64(token) * a.problem.hidden + at, values, end - at);
}

template <class T> __device__ __forceinline__ void d_embeddings(const LceArgs& a) {
    // ---- this block's token and columns: equal shares, a multiple of 64 columns so that vectors stay aligned ----------------
    const u32 token = blockIdx.x, hidden = a.problem.hidden;
    const u32 share = ((hidden + gridDim.y - 1) / gridDim.y + 63) / 64 * 64;
    const u32 begin = blockIdx.y * share, end = begin + share < hidden ? begin + share : hidden;
    if (begin >= hidden || a.d_embeddings.mode == SINK_SKIP) return;

    const u32 row = a.saved.token_row[token];
    if (row == NONE) {
        if (a.d_embeddings.mode == SINK_OVERWRITE) fill(a, token, begin, end, 0.0f);
        return;
    }
    if (a.saved.row_class[row] == NONE) return fill(a, token, begin, end, prim::bits_f32(0x7FC00000u));
    u32 count = a.saved.entry_count[row];
    if (count == NONE) return;
    if (a.backward.tile_use != TILES_OFF && a.backward.tile_sources[row / BLOCK_N] > 0) return;     // tile_products.cu has it

    const LceCoefficients c = a.backward.coefficients[row];
    if (gradient::is_zero(c)) count = 0;
    if (gather::aligned(gather::classifier<T>(a.problem))) sum_row<T, true>(a, row, c, count, begin, end);
    else sum_row<T, false>(a, row, c, count, begin, end);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<float>) lce_d_embeddings_f32(const __grid_constant__ LceArgs a) { d_embeddings<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<f16>) lce_d_embeddings_f16(const __grid_constant__ LceArgs a) { d_embeddings<f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<bf16>) lce_d_embeddings_bf16(const __grid_constant__ LceArgs a) { d_embeddings<bf16>(a); }
