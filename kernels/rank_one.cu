// Label smoothing's dense part of a gradient is rank one, -spread_i w_v: it costs two weighted sums of rows in place of a dense pass.
//
//     class_sum  = sum over v of w_v C_v                       (dE)
//     spread_sum = sum over sparse rows of spread_i E_i        (dC)       spread_total = sum over sparse rows of spread_i    (dbias)
//
// Cut into SUM_PARTS parts whatever their number, each summed in a fixed order. What bounds it: reading C (or E) once.
#include "abi.h"
#include "block_scan.cuh"
#include "gather.cuh"

namespace {

using gather::Rows;
using gather::VECTOR;
using prim::bf16;
using prim::f16;
using prim::Vec16;

constexpr u32 THREADS = 256;
constexpr u32 COLUMNS = 256;                     // of a block
constexpr u32 BATCH = 4;                         // rows that a thread has in flight

template <class T> constexpr u32 GROUP = COLUMNS / VECTOR<T>;        // threads that share a row
template <class T> constexpr u32 GROUPS = THREADS / GROUP<T>;        // rows at a time

template <class T> struct Smem { float sums[GROUPS<T>][COLUMNS]; };

// A term of a sum of rows; NONE: no term.
struct Term { u32 row; float factor; };

struct Classes {
    const float* weights;
    __device__ __forceinline__ Term operator()(u32 v) const { return {v, weights == nullptr ? 1.0f : weights[v]}; }
};

struct SparseRows {
    LceSaved saved;
    const LceCoefficients* coefficients;
    __device__ __forceinline__ Term operator()(u32 row) const {
        // A row with a bad target is poisoned in dE; its spread is 0.
        if (saved.entry_count[row] == NONE || saved.row_class[row] == NONE) return {NONE, 0.0f};
        return {saved.row_token[row], coefficients[row].spread};
    }
};

// Part blockIdx.x of the terms [0, count), columns blockIdx.y * COLUMNS on.
template <class T, bool ALIGNED, class Terms>
__device__ __forceinline__ void sum_part(const Rows<T>& rows, const Terms& terms, u32 count, float* parts) {
    Smem<T>& smem = prim::shared_memory<Smem<T>>();
    const u32 group = threadIdx.x / GROUP<T>, own = threadIdx.x % GROUP<T> * VECTOR<T>;
    const u32 column = blockIdx.y * COLUMNS + own;
    const u32 length = (count + SUM_PARTS - 1) / SUM_PARTS;
    const u64 begin = u64(blockIdx.x) * length;
    const u64 end = begin + length < count ? begin + length : count;

    float sum[VECTOR<T>] = {};
    for (u64 k = begin + group; k < end; k += GROUPS<T> * BATCH) {
        Term term[BATCH];
        Vec16 v[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            term[i] = {NONE, 0.0f};
            if (k + i * GROUPS<T> < end) term[i] = terms(u32(k + i * GROUPS<T>));
            v[i] = {};
            if (term[i].row != NONE) v[i] = gather::load<T, ALIGNED>(rows.data + i64(term[i].row) * rows.stride, column, rows.hidden);
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (term[i].row != NONE) gather::add_scaled<T>(sum, term[i].factor, v[i]);
    }

    // ---- the groups' sums, in order -----------------------------------------------------------------------------------------
#pragma unroll
    for (u32 i = 0; i < VECTOR<T>; ++i) smem.sums[group][own + i] = sum[i];
    __syncthreads();
    const u32 at = blockIdx.y * COLUMNS + threadIdx.x;
    if (at >= rows.hidden) return;
    float total = 0.0f;
#pragma unroll
    for (u32 g = 0; g < GROUPS<T>; ++g) total += smem.sums[g][threadIdx.x];
    parts[u64(blockIdx.x) * rows.hidden + at] = total;
}

template <class T, class Terms>
__device__ __forceinline__ void sum_rows(const Rows<T>& rows, const Terms& terms, u32 count, float* parts) {
    if (parts == nullptr) return;
    if (gather::aligned(rows)) sum_part<T, true>(rows, terms, count, parts);
    else sum_part<T, false>(rows, terms, count, parts);
}

template <class T> __device__ __forceinline__ void class_sum(const LceArgs& a) {
    sum_rows(gather::classifier<T>(a.problem), Classes{a.problem.class_weights}, a.problem.vocab, a.backward.class_sum_parts);
}

template <class T> __device__ __forceinline__ void spread_sum(const LceArgs& a) {
    const SparseRows rows = {a.saved, a.backward.coefficients};
    sum_rows(gather::embeddings<T>(a.problem), rows, a.saved.header->num_rows, a.backward.spread_sum_parts);
}

__device__ __forceinline__ void sum_parts(const float* parts, float* to, u32 hidden) {
    const u32 column = blockIdx.x * THREADS + threadIdx.x;
    if (to == nullptr || column >= hidden) return;
    f64 sum = 0.0;
#pragma unroll 8
    for (u32 part = 0; part < SUM_PARTS; ++part) sum += f64(parts[u64(part) * hidden + column]);
    to[column] = float(sum);
}

}  // namespace

// <(SUM_PARTS, ceil(D / 256)), 256>
extern "C" __global__ void __launch_bounds__(THREADS) lce_class_sum_f32(const __grid_constant__ LceArgs a) { class_sum<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_class_sum_f16(const __grid_constant__ LceArgs a) { class_sum<f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_class_sum_bf16(const __grid_constant__ LceArgs a) { class_sum<bf16>(a); }

extern "C" __global__ void __launch_bounds__(THREADS) lce_spread_sum_f32(const __grid_constant__ LceArgs a) { spread_sum<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_spread_sum_f16(const __grid_constant__ LceArgs a) { spread_sum<f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) lce_spread_sum_bf16(const __grid_constant__ LceArgs a) { spread_sum<bf16>(a); }

// <max(1, ceil(D / 256)), 256>: the parts of both sums, as far as they are there, and the total of the spreads.
extern "C" __global__ void __launch_bounds__(THREADS) lce_sum_parts(const __grid_constant__ LceArgs a) {
    sum_parts(a.backward.class_sum_parts, a.backward.class_sum, a.problem.hidden);
    sum_parts(a.backward.spread_sum_parts, a.backward.spread_sum, a.problem.hidden);

    if (blockIdx.x != 0 || a.backward.spread_total == nullptr) return;
    const SparseRows rows = {a.saved, a.backward.coefficients};
    f64 sum = 0.0;
#pragma unroll 4
    for (u32 row = threadIdx.x; row < a.saved.header->num_rows; row += THREADS) sum += f64(rows(row).factor);
    sum = block::sum<THREADS>(prim::shared_memory<block::SumSpace<THREADS>>(), sum);
    if (threadIdx.x == 0) a.backward.spread_total[0] = float(sum);
}
