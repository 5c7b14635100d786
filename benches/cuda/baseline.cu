// The materialising baseline between its matmuls: log-sum-exp of each row of stored logits, their gradient, the mean loss. One read of
// the logits each way, one write of the gradient; a block a row, whose threads read neighbouring logits.
#include "block_scan.cuh"

// Mirrored in src/bin/cce/bench/cuda/baseline.rs.
struct BaselineArgs {
    const float* logits;                     // [N, V]; products alone, before the softcap
    const i64* targets;                      // [N] classes; negative: the token is ignored
    void* gradient;                          // [N, V] dL/d(product) without the factor 1/rows; of f32 the logits themselves
    float* nll;                              // [N], 0 where ignored, as lse
    float* lse;                              // [N]
    float* loss;                             // [1]
    u32 tokens;
    u32 vocab;
    u32 rows;                                // tokens that are not ignored
    float softcap;                           // 0: none
};

namespace {

constexpr u32 THREADS = 512;

struct Smem { float max[THREADS]; block::SumSpace<THREADS> sum; };

__device__ __forceinline__ float capped(float product, float cap) { return cap > 0.0f ? cap * prim::tanhf(product / cap) : product; }

template <class T> __device__ __forceinline__ void gradient_of_row(const BaselineArgs& a) {
    const u32 row = blockIdx.x;
    const u64 first = u64(row) * a.vocab;
    T* gradient = static_cast<T*>(a.gradient) + first;
    if (a.targets[row] < 0) {
        for (u32 v = threadIdx.x; v < a.vocab; v += THREADS) gradient[v] = prim::from_f32<T>(0.0f);
        return;
    }
    const u32 target = u32(a.targets[row]);
    const float lse = a.lse[row];
#pragma unroll 4
    for (u32 v = threadIdx.x; v < a.vocab; v += THREADS) {
        const float z = capped(a.logits[first + v], a.softcap);
        float g = prim::expf_accurate(z - lse) - (v == target ? 1.0f : 0.0f);
        if (a.softcap > 0.0f) g *= 1.0f - (z / a.softcap) * (z / a.softcap);
        gradient[v] = prim::from_f32<T>(g);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) baseline_log_sum_exp(const __grid_constant__ BaselineArgs a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 row = blockIdx.x;
    const u64 first = u64(row) * a.vocab;
    if (a.targets[row] < 0) {
        if (threadIdx.x == 0) a.lse[row] = a.nll[row] = 0.0f;
        return;
    }
    float max = -3.4e38f, sum = 0.0f;
#pragma unroll 4
    for (u32 v = threadIdx.x; v < a.vocab; v += THREADS) {
        const float z = capped(a.logits[first + v], a.softcap);
        if (z > max) {
            sum = sum * prim::expf_accurate(max - z) + 1.0f;
            max = z;
        } else {
            sum += prim::expf_accurate(z - max);
        }
    }
    smem.max[threadIdx.x] = max;
    __syncthreads();
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) smem.max[threadIdx.x] = prim::fmax(smem.max[threadIdx.x], smem.max[threadIdx.x + half]);
        __syncthreads();
    }
    const float all = smem.max[0];
    const float log_sum = prim::logf(float(block::sum<THREADS>(smem.sum, f64(sum * prim::expf_accurate(max - all)))));
    if (threadIdx.x == 0) {
        const float z = capped(a.logits[first + u64(a.targets[row])], a.softcap);
        a.lse[row] = all + log_sum;
        a.nll[row] = (all - z) + log_sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) baseline_mean(const __grid_constant__ BaselineArgs a) {
    Smem& smem = prim::shared_memory<Smem>();
    f64 sum = 0;
    for (u32 row = threadIdx.x; row < a.tokens; row += THREADS) sum += a.nll[row];
    sum = block::sum<THREADS>(smem.sum, sum);
    if (threadIdx.x == 0) *a.loss = float(sum / f64(a.rows > 0 ? a.rows : 1));
}

extern "C" __global__ void __launch_bounds__(THREADS) baseline_gradient_f32(const __grid_constant__ BaselineArgs a) { gradient_of_row<float>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) baseline_gradient_f16(const __grid_constant__ BaselineArgs a) { gradient_of_row<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) baseline_gradient_bf16(const __grid_constant__ BaselineArgs a) { gradient_of_row<prim::bf16>(a); }
