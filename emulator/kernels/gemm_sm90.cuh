// C += op(A) · op(B)ᵀ on Hopper: a persistent, warp-specialised kernel. One thread feeds a ring of
// shared-memory stages through TMA, two warpgroups multiply with wgmma and add their tiles to C with
// TMA reductions. Either operand may be stored with K contiguous ([rows, K]) or rows contiguous ([K, rows]).
#pragma once
#include "prim/prim.cuh"

namespace sm90 {
using prim::bf16;
using prim::TensorMap;
using prim::u32;
using prim::u64;
using prim::Major;

constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kStages = 4;
constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kStoreCols = 32;                                // one 128-byte row of floats

struct Smem {
    alignas(1024) bf16 a[kStages][kTileM * kTileK];
    alignas(1024) bf16 b[kStages][kTileN * kTileK];
    alignas(1024) float out[kConsumers][2][64 * kStoreCols];  // double-buffered slices on their way to C
    u64 full[kStages], empty[kStages];
};

// A ring position: which stage, and the parity of the current lap.
struct Cursor {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// Both layouts are stacks of 64-element (128-byte) rows under the 128-byte swizzle. K-major: a row per
// matrix row, eight rows per swizzle pattern. MN-major: a row per k, one 64-row slab after the other.
constexpr u32 kPattern = 1024, kSlab = 64 * kTileK * sizeof(bf16);
template <Major m> constexpr u32 kStepK16 = m == Major::K ? 16 * sizeof(bf16) : 16 * 128;   // bytes from one k16 slice to the next

__device__ __forceinline__ u64 descriptor(const bf16* tile, Major major) {
    const u64 leading = major == Major::K ? 16 : kSlab, stride = kPattern, swizzle_128b = 1;
    return u64(prim::smem_addr(tile) & 0x3ffff) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle_128b << 62;
}

template <Major major, int Rows>
__device__ __forceinline__ void load_tile(bf16* tile, const TensorMap* map, u64* full, int row0, int k0) {
    if constexpr (major == Major::K) {
        prim::tma_load_2d(tile, map, full, k0, row0);
    } else {
        for (int slab = 0; slab < Rows / 64; ++slab) prim::tma_load_2d(tile + slab * 64 * kTileK, map, full, row0 + slab * 64, k0);
    }
}

template <Major MajorA, Major MajorB>
__device__ __forceinline__ void gemm(const TensorMap& map_a, const TensorMap& map_b, const TensorMap& map_c,
                                     int tiles_m, int tiles_n, int steps, int splits) {
    Smem& smem = prim::shared_memory<Smem>();
    const int group = threadIdx.x / 128, steps_per_split = (steps + splits - 1) / splits;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            prim::mbarrier_init(&smem.full[s], 1);
            prim::mbarrier_init(&smem.empty[s], kConsumers);
        }
        prim::fence_mbarrier_init();
    }
    __syncthreads();

    struct Work { int row0, col0, first, last; };
    auto work = [&](int tile) {
        int split = tile / (tiles_m * tiles_n), mn = tile % (tiles_m * tiles_n), first = split * steps_per_split;
        return Work{mn % tiles_m * kTileM, mn / tiles_m * kTileN, first, min(first + steps_per_split, steps)};
    };
    const int tiles = tiles_m * tiles_n * splits;

    Cursor ring;
    if (group == 0) {
        prim::setmaxnreg_dec<40>();
        if (threadIdx.x != 0) return;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Work w = work(tile);
            for (int step = w.first; step < w.last; ++step, ring.advance()) {
                u64* full = &smem.full[ring.stage];
                prim::mbarrier_wait(&smem.empty[ring.stage], ring.parity ^ 1);
                prim::mbarrier_arrive_expect_tx(full, (kTileM + kTileN) * kTileK * sizeof(bf16));
                load_tile<MajorA, kTileM>(smem.a[ring.stage], &map_a, full, w.row0, step * kTileK);
                load_tile<MajorB, kTileN>(smem.b[ring.stage], &map_b, full, w.col0, step * kTileK);
            }
        }
        return;
    }

    prim::setmaxnreg_inc<232>();
    const int consumer = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const int row = thread / 32 * 16 + lane / 4;              // this thread's first row of the 64-row slice
    auto release = [&](int stage) {
        if (thread == 0) prim::mbarrier_arrive(&smem.empty[stage]);
    };

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Work w = work(tile);
        float acc[128];
        int previous = -1;
        for (int step = w.first; step < w.last; ++step, ring.advance()) {
            prim::mbarrier_wait(&smem.full[ring.stage], ring.parity);
            const u64 a = descriptor(smem.a[ring.stage] + consumer * 64 * kTileK, MajorA);
            const u64 b = descriptor(smem.b[ring.stage], MajorB);
            prim::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k)
                prim::wgmma_m64k16<bf16, kTileN, MajorA, MajorB>(acc, a + k * kStepK16<MajorA> / 16, b + k * kStepK16<MajorB> / 16, step > w.first || k > 0);
            prim::wgmma_commit();
            prim::wgmma_wait<1>(acc);                          // the previous step has been read
            if (previous >= 0) release(previous);
            previous = ring.stage;
        }
        prim::wgmma_wait<0>(acc);
        release(previous);

        // 32 columns at a time: registers → swizzled shared memory → added to C by the copy engine.
#pragma unroll
        for (int slice = 0; slice < kTileN / kStoreCols; ++slice) {
            float* out = smem.out[consumer][slice % 2];
            if (thread == 0) prim::bulk_wait_read<1>();        // the copy that used this buffer is done with it
            prim::named_barrier_sync(1 + consumer, 128);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int r = row + h * 8, c = n * 8 + lane % 4 * 2;
                    float* to = &out[r * kStoreCols + ((c / 4) ^ (r % 8)) * 4 + c % 4];
                    const int i = (slice * 4 + n) * 4 + h * 2;
                    *reinterpret_cast<float2*>(to) = make_float2(acc[i], acc[i + 1]);
                }
            prim::fence_proxy_async();
            prim::named_barrier_sync(1 + consumer, 128);
            if (thread == 0) {
                prim::tma_reduce_add_2d(&map_c, out, w.col0 + slice * kStoreCols, w.row0 + consumer * 64);
                prim::bulk_commit();
            }
        }
    }
    if (thread == 0) prim::bulk_wait_read<0>();
}

}  // namespace sm90
