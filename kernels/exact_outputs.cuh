// Outputs of the Hopper exact path: a consumer's 64 rows of a tile from its accumulators to dE, dC and dbias.
#pragma once

#include "column_sum.cuh"
#include "exact_items.cuh"
#include "sink.cuh"

namespace blocks {

using prim::bf16;
using prim::f16;
using prim::Vec16;

// ---- stores -----------------------------------------------------------------------------------------------------------------
constexpr u64 NO_ROW = ~0ull;

__device__ __forceinline__ void store_pair(float* to, float first, float second) {
    *reinterpret_cast<u64*>(to) = prim::f32_bits(first) | u64(prim::f32_bits(second)) << 32;
}
template <class S> __device__ __forceinline__ void store_pair(S* to, float first, float second) {
    *reinterpret_cast<u32*>(to) = prim::pack2<S>(first, second);
}

// A thread's two rows of a tile to where they begin, `groups` of eight columns; pairs lie at multiples of their size. Additions are
// reductions in memory, which nobody waits for: an element has one owner.
template <bool ADD, class S>
__device__ __forceinline__ void store_rows(S* to, const u64 (&row)[2], u32 groups, float factor, const float (&acc)[ACCUMULATORS]) {
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (row[h] == NO_ROW) continue;
        S* at = to + row[h];
#pragma unroll
        for (u32 c = 0; c < COLUMNS / 8; ++c) {
            const float first = acc[4 * c + 2 * h] * factor, second = acc[4 * c + 2 * h + 1] * factor;
            if (c >= groups) break;
            if constexpr (ADD) prim::reduce_add_2(at + 8 * c, first, second);
            else store_pair(at + 8 * c, first, second);
        }
    }
}

// The same for any D and any address, in a loop, through shared memory of the thread's own: own[i * WARPGROUP] is a value's place.
__device__ __forceinline__ void store_rows_anywhere(
    const LceSink& to, const u64 (&row)[2], u32 columns, float factor, const float (&acc)[ACCUMULATORS], float* own
) {
#pragma unroll
    for (u32 block = 0; block < B_BLOCKS; ++block) {
#pragma unroll
        for (u32 i = 0; i < SIDE / 2; ++i) own[i * WARPGROUP] = acc[block * (SIDE / 2) + i] * factor;
#pragma unroll 1
        for (u32 i = 0; i < SIDE / 2; ++i) {
            const u32 column = block * SIDE + i / 4 * 8 + i % 2;     // from the thread's first
            const u64 begin = i / 2 % 2 == 0 ? row[0] : row[1];
            if (begin != NO_ROW && column < columns) sink::put_one(to, begin + column, own[i * WARPGROUP]);
        }
    }
}

// row: elements to the thread's first column of its rows, or NO_ROW. Its columns are first_column + 0, 1, 8, 9, 16, ...
__device__ __forceinline__ void store_tile(
    Smem& smem, const LceSink& to, const u64 (&row)[2], u32 first_column, u32 hidden, float factor, const float (&acc)[ACCUMULATORS]
) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    const u32 columns = first_column < hidden ? hidden - first_column : 0, groups = (columns + 7) / 8;
    const bool pairs = hidden % 8 == 0 && reinterpret_cast<u64>(to.data) % 8 == 0;
    if (!pairs) store_rows_anywhere(to, row, columns, factor, acc, reinterpret_cast<float*>(smem.staging[consumer]) + thread);
    else if (to.type == TYPE_F16) store_rows<false>(static_cast<f16*>(to.data), row, groups, factor, acc);
    else if (to.type == TYPE_BF16) store_rows<false>(static_cast<bf16*>(to.data), row, groups, factor, acc);
    else if (to.mode == SINK_ACCUMULATE) store_rows<true>(static_cast<float*>(to.data), row, groups, factor, acc);
    else store_rows<false>(static_cast<float*>(to.data), row, groups, factor, acc);
}

// Eight pairs of loads in flight: they are all that the thread waits for.
__device__ __forceinline__ void add_rows(const float* from, const u64 (&row)[2], u32 columns, float (&acc)[ACCUMULATORS]) {
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (row[h] == NO_ROW) continue;
        const float* at = from + row[h];
#pragma unroll
        for (u32 begin = 0; begin < COLUMNS / 8; begin += 8) {
            float sums[16];
#pragma unroll
            for (u32 i = 0; i < 16; ++i) sums[i] = (begin + i / 2) * 8 + i % 2 < columns ? at[(begin + i / 2) * 8 + i % 2] : 0.0f;
#pragma unroll
            for (u32 i = 0; i < 16; ++i) acc[4 * (begin + i / 2) + 2 * h + i % 2] += sums[i];
        }
    }
}

// ---- dE ---------------------------------------------------------------------------------------------------------------------
// dE of 64 exact rows and 256 columns: added to the accumulators, or with the last chunk written, unless it is one slice of several. Each
// element of the accumulators has one addition a chunk, and the barriers keep those of several chunks in order.
__device__ __forceinline__ void store_d_embeddings(const LceArgs& a, Smem& smem, const Item& item, float (&acc)[ACCUMULATORS]) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, hidden = a.problem.hidden;
    const exact::Pass& pass = smem.work.pass;
    const Chunk& chunk = smem.work.chunk;
    const bool writes = chunk.is_last && smem.work.slices == 1;
    const u32 first_row = item.row % smem.work.row_span * ROWS + consumer * SIDE + thread / 32 * 16 + thread % 32 / 4;
    float* slice_sums = exact::slice_sums(a, item.row / smem.work.row_span);
    const u32 first_column = item.column * COLUMNS + thread % 4 * 2;
    u64 in_sums[2], in_output[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 row = first_row + 8 * h;
        in_sums[h] = row < pass.rows ? u64(row) * hidden + first_column : NO_ROW;
        in_output[h] = row < pass.rows && writes ? u64(Rows::token_of(a, pass, row)) * hidden + first_column : NO_ROW;
    }
    if (!writes) {
        const LceSink sums = {slice_sums, TYPE_F32, chunk.is_first ? SINK_OVERWRITE : SINK_ACCUMULATE};
        store_tile(smem, sums, in_sums, first_column, hidden, 1.0f, acc);
        return;
    }
    if (!chunk.is_first) add_rows(slice_sums, in_sums, first_column < hidden ? hidden - first_column : 0, acc);
    store_tile(smem, a.d_embeddings, in_output, first_column, hidden, smem.work.scale.up * a.problem.logit_scale, acc);
}

// dE of some rows that was summed in slices.
__device__ __forceinline__ void store_sum_of_slices(const LceArgs& a, Smem& smem, const Item& item) {
    const Work& work = smem.work;
    const u32 end = smaller(work.pass.rows, (item.row + 1) * SUM_ROWS);
    for (u32 row = item.row * SUM_ROWS; row < end; ++row)
        exact::add_slices(a, work.slices, row, Rows::token_of(a, work.pass, row), work.scale.up * a.problem.logit_scale, threadIdx.x - WARPGROUP, CONSUMERS * WARPGROUP);
}

// ---- dC and dbias -----------------------------------------------------------------------------------------------------------
// dC of 64 classes and 256 columns, to which sparse rows give nothing.
__device__ __forceinline__ void store_d_classifier(const LceArgs& a, Smem& smem, const Item& item, const float (&acc)[ACCUMULATORS]) {
    const Chunk& chunk = smem.work.chunk;
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, hidden = a.problem.hidden;
    const u32 in_chunk = item.row * CLASS_TILE + consumer * SIDE + thread / 32 * 16 + thread % 32 / 4;
    const u32 first_column = item.column * COLUMNS + thread % 4 * 2;
    u64 row[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
        row[h] = in_chunk + 8 * h < chunk.classes ? u64(chunk.first_tile * COLUMNS + in_chunk + 8 * h) * hidden + first_column : NO_ROW;
    store_tile(smem, a.d_classifier, row, first_column, hidden, smem.work.scale.up * a.problem.logit_scale, acc);
}

// What sparse rows need to be put in order, in a consumer's staging, which G has left.
struct SparseSmem {
    column_sum::Order order;
    float bias[SIDE];
};
static_assert(sizeof(SparseSmem) <= 2 * BYTES, "a consumer's staging");
__device__ __forceinline__ SparseSmem& sparse_smem(Smem& smem, u32 consumer) { return *reinterpret_cast<SparseSmem*>(smem.staging[consumer]); }

// A consumer, as the threads that do so.
struct Consumer {
    static constexpr u32 THREADS = WARPGROUP;
    static __device__ __forceinline__ u32 thread() { return threadIdx.x % WARPGROUP; }
    static __device__ __forceinline__ void sync() { prim::named_barrier_sync(BARRIER_CONSUMER + int(threadIdx.x / WARPGROUP) - 1, WARPGROUP); }
};

// Classes of 64 of the chunk that there are, from first_class in it on.
__device__ __forceinline__ u32 classes_of(const Chunk& chunk, u32 first_class) {
    return first_class < chunk.classes ? smaller(SIDE, chunk.classes - first_class) : 0;
}

// dC of 64 classes and 256 columns, with what sparse rows give to it. Their sums want registers, and columns side by side: the tile lies in
// shared memory meanwhile, in the ring. The producer lends all stages, behind the item's own.
constexpr u32 MERGED_STRIDE = COLUMNS + 4;           // words of a row: not all rows in the same banks
static_assert(ROWS * MERGED_STRIDE * 4 <= sizeof(Ring::a) + sizeof(Ring::b), "a tile of dC in the ring's stages");

template <class T, u32 CLUSTER> __device__ __forceinline__ void store_merged_d_classifier(
    const LceArgs& a, Smem& smem, const Item& item, Cursor& at, const float (&acc)[ACCUMULATORS]
) {
    const Chunk& chunk = smem.work.chunk;
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, hidden = a.problem.hidden;
    const u32 in_chunk = item.row * CLASS_TILE + consumer * SIDE, classes = classes_of(chunk, in_chunk);
    const u32 first_class = chunk.first_tile * COLUMNS + in_chunk, begin = item.column * COLUMNS, end = smaller(begin + COLUMNS, hidden);
    const float factor = smem.work.scale.up * a.problem.logit_scale;
    float* tile = reinterpret_cast<float*>(&smem.ring) + consumer * SIDE * MERGED_STRIDE;
    for (u32 s = 0; s < STAGES; ++s, at.advance()) prim::mbarrier_wait(&smem.ring.full[at.stage], at.parity);

    float* own = tile + (thread / 32 * 16 + thread % 32 / 4) * MERGED_STRIDE + thread % 4 * 2;
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
#pragma unroll
        for (u32 c = 0; c < COLUMNS / 8; ++c)
            store_pair(own + 8 * h * MERGED_STRIDE + 8 * c, acc[4 * c + 2 * h] * factor, acc[4 * c + 2 * h + 1] * factor);
    column_sum::Order& order = sparse_smem(smem, consumer).order;
    if (gather::aligned(gather::embeddings<T>(a.problem)))
        column_sum::add_to_tile<T, true, COLUMNS, Consumer>(a, order, first_class, classes, begin, end, tile, MERGED_STRIDE, nullptr);
    else
        column_sum::add_to_tile<T, false, COLUMNS, Consumer>(a, order, first_class, classes, begin, end, tile, MERGED_STRIDE, nullptr);

    const u32 column = begin + thread % (COLUMNS / 4) * 4;
    for (u32 k = thread / (COLUMNS / 4); k < classes && column < hidden; k += WARPGROUP / (COLUMNS / 4)) {
        const Vec16 v = *reinterpret_cast<const Vec16*>(&tile[k * MERGED_STRIDE + column - begin]);
        const float values[4] = {prim::bits_f32(v.w[0]), prim::bits_f32(v.w[1]), prim::bits_f32(v.w[2]), prim::bits_f32(v.w[3])};
        sink::put<true>(a.d_classifier, u64(first_class + k) * hidden + column, values, hidden - column);
    }
    release_written<CLUSTER>(smem.ring);
}

// dbias of 64 classes: a thread sums 8 classes over every 16th row, then the sums are added in order. In a phase nothing but dbias comes after it.
template <class T>
__device__ __forceinline__ void store_d_bias(const LceArgs& a, Smem& smem, const Item& item) {
    const Chunk& chunk = smem.work.chunk;
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, eight = thread % 8, group = thread / 8;
    const u32 block = item.row * A_BLOCKS + consumer;
    constexpr u32 GROUPS = WARPGROUP / 8;
    float* sums = reinterpret_cast<float*>(smem.staging[consumer][0]);   // [GROUPS, SIDE]
    float sum[8] = {};
#pragma unroll 16
    for (u32 r = group; r < smem.work.pass.rows; r += GROUPS) {
        const u32 in_block = r % SIDE;
        const Vec16 v = prim::ld_global_16(gradient_block(a, smem.work, r / SIDE, block) + in_block * 128 + (eight ^ in_block % 8) * 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum[2 * i] += prim::unpack_lo<T>(v.w[i]);
            sum[2 * i + 1] += prim::unpack_hi<T>(v.w[i]);
        }
    }
    prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);       // nobody is at the item before any more
#pragma unroll
    for (u32 i = 0; i < 8; ++i) sums[group * SIDE + eight * 8 + i] = sum[i];
    prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
    const u32 classes = classes_of(chunk, block * SIDE), first_class = chunk.first_tile * COLUMNS + block * SIDE;
    SparseSmem& sparse = sparse_smem(smem, consumer);
    if (thread < SIDE) {
        float total = 0.0f;
        for (u32 g = 0; g < GROUPS; ++g) total += sums[g * SIDE + thread];
        sparse.bias[thread] = total * smem.work.scale.up;
    }
    if (smem.work.has_sparse_rows)
        column_sum::add_to_tile<T, true, COLUMNS, Consumer>(a, sparse.order, first_class, classes, 0, 0, nullptr, 0, sparse.bias);     // no columns
    if (thread < classes) sink::put_one(a.d_bias, first_class + thread, sparse.bias[thread]);
}

}  // namespace blocks
