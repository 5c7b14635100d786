// Kernels that are right or wrong in one line, to show what the checker says: which of the two is a parameter.
#include "prim/prim.cuh"

struct OrderParams { float* data; prim::u32* flags; float* out; int mode; };

// Blocks hand data to the block that finishes last. mode 0: fenced; 1: no fence before the count; 2: none after it.
extern "C" __global__ void __launch_bounds__(64) example_last_block(const __grid_constant__ OrderParams p) {
    struct Smem { prim::u32 last; };
    Smem& smem = prim::shared_memory<Smem>();
    p.data[blockIdx.x * 64 + threadIdx.x] = float(blockIdx.x + 1);
    if (p.mode != 1) prim::threadfence();
    __syncthreads();
    if (threadIdx.x == 0) smem.last = prim::atomic_add(p.flags, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!smem.last) return;
    if (p.mode != 2) prim::threadfence();
    float sum = 0;
    for (prim::u32 b = 0; b < gridDim.x; ++b) sum += p.data[b * 64 + threadIdx.x];
    p.out[threadIdx.x] = sum;
}

// All blocks meet, then read their neighbour's part: a cooperative launch. mode 1: the arrival releases nothing.
extern "C" __global__ void __launch_bounds__(64) example_grid_barrier(const __grid_constant__ OrderParams p) {
    p.data[blockIdx.x * 64 + threadIdx.x] = float(blockIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) {
        if (p.mode == 1) prim::atomic_add(p.flags, 1u);
        else prim::atomic_add_acq_rel(p.flags, 1u);
        while (prim::ld_acquire(p.flags) < gridDim.x) prim::nanosleep(20);
    }
    __syncthreads();
    p.out[blockIdx.x * 64 + threadIdx.x] = p.data[(blockIdx.x + 1) % gridDim.x * 64 + threadIdx.x];
}

// The block's threads pass a value on through shared memory. mode 1: without a barrier.
extern "C" __global__ void __launch_bounds__(64) example_neighbour(const __grid_constant__ OrderParams p) {
    struct Smem { float x[64]; };
    Smem& smem = prim::shared_memory<Smem>();
    smem.x[threadIdx.x] = float(threadIdx.x);
    if (p.mode != 1) __syncthreads();
    p.out[blockIdx.x * 64 + threadIdx.x] = smem.x[(threadIdx.x + 1) % 64];
}
