// C[M,N] = A[M,K] · B[N,K]ᵀ on Ampere: cp.async ring, swizzled tiles, ldmatrix, mma.sync.
#pragma once
#include "prim/prim.cuh"

namespace sm80 {
using prim::bf16;
using prim::u32;

constexpr int kTileM = 128, kTileN = 128, kTileK = 64, kStages = 3, kThreads = 128;

struct Smem {
    alignas(128) bf16 a[kStages][kTileM * kTileK];
    alignas(128) bf16 b[kStages][kTileN * kTileK];
};

// A row is 128 bytes, eight 16-byte chunks; chunk c of row r is stored in place c ^ (r % 8), so that the
// eight rows an ldmatrix reads fall into different banks.
__device__ __forceinline__ int swizzled(int row, int col) { return row * kTileK + ((col / 8) ^ (row % 8)) * 8 + col % 8; }

// Starts copying rows [row0, row0+128) × columns [k0, k0+64) of a row-major [rows, K] matrix.
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* matrix, int rows, int K, int row0, int k0) {
#pragma unroll
    for (int i = 0; i < kTileM * kTileK / 8 / kThreads; ++i) {
        int chunk = i * kThreads + threadIdx.x, row = chunk / 8, col = chunk % 8 * 8;
        bool inside = row0 + row < rows && k0 + col < K;
        const bf16* from = inside ? matrix + size_t(row0 + row) * K + k0 + col : matrix;
        prim::cp_async_16(&tile[swizzled(row, col)], from, inside ? 16 : 0);
    }
}

__device__ __forceinline__ void gemm(const bf16* A, const bf16* B, float* C, int M, int N, int K) {
    Smem& smem = prim::shared_memory<Smem>();
    const int row0 = blockIdx.y * kTileM, col0 = blockIdx.x * kTileN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp / 2 * 64, warp_n = warp % 2 * 64;
    const int steps = (K + kTileK - 1) / kTileK;

    auto prefetch = [&](int step) {
        if (step < steps) {
            load_tile(smem.a[step % kStages], A, M, K, row0, step * kTileK);
            load_tile(smem.b[step % kStages], B, N, K, col0, step * kTileK);
        }
        prim::cp_async_commit();   // also when empty, so that the wait below can count groups
    };
    for (int s = 0; s < kStages - 1; ++s) prefetch(s);

    float acc[4][8][4] = {};
    for (int step = 0; step < steps; ++step) {
        prim::cp_async_wait<kStages - 2>();
        __syncthreads();                       // everyone's copies of this step have landed, the oldest stage is free
        prefetch(step + kStages - 1);
        const bf16 *a_tile = smem.a[step % kStages], *b_tile = smem.b[step % kStages];
#pragma unroll
        for (int k = 0; k < kTileK; k += 16) {
            u32 a[4][4], b[4][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) prim::ldmatrix_x4(a[m], &a_tile[swizzled(warp_m + m * 16 + lane % 16, k + lane / 16 * 8)]);
#pragma unroll
            for (int n = 0; n < 4; ++n) prim::ldmatrix_x4(b[n], &b_tile[swizzled(warp_n + n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8)]);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const u32 half[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    prim::mma_m16n8k16<bf16>(acc[m][n], a[m], half);
                }
        }
    }

#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int row = row0 + warp_m + m * 16 + lane / 4 + h * 8, col = col0 + warp_n + n * 8 + lane % 4 * 2;
                if (row < M && col < N) C[size_t(row) * N + col] = acc[m][n][h * 2];
                if (row < M && col + 1 < N) C[size_t(row) * N + col + 1] = acc[m][n][h * 2 + 1];
            }
}

}  // namespace sm80
