// Bulk copies and stmatrix, right or wrong in one line: which is a parameter.
#include "prim/prim.cuh"
using prim::u32;
using prim::u64;

struct BulkParams { const float* x; float *out, *sum; prim::bf16* sum_bf16; prim::f16* sum_f16; int mode; };

// A block takes 256 numbers, doubles them, and adds them up over the blocks, in three formats.
// mode 1: an address that is no multiple of 16, 2: no proxy fence before the copies out, 3: no wait before the numbers are used,
// 4: an exit before the copies have read, 5: a source overwritten too early, 6: more bytes than the barrier expects.
extern "C" __global__ void __launch_bounds__(64) example_bulk(const __grid_constant__ BulkParams p) {
    struct Smem { alignas(16) float x[256]; alignas(16) prim::bf16 bf16[256]; alignas(16) prim::f16 f16[256]; u64 full; };
    Smem& smem = prim::shared_memory<Smem>();
    if (threadIdx.x == 0) {
        prim::mbarrier_init(&smem.full, 1);
        prim::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        prim::mbarrier_arrive_expect_tx(&smem.full, p.mode == 6 ? 512 : 1024);
        prim::bulk_load(smem.x, p.x + blockIdx.x * 256 + (p.mode == 1), 1024, &smem.full);
    }
    if (p.mode != 3) prim::mbarrier_wait(&smem.full, 0);
    for (u32 i = threadIdx.x; i < 256; i += 64) {
        const float x = smem.x[i] * 2;
        smem.x[i] = x;
        smem.bf16[i] = prim::from_f32<prim::bf16>(x);
        smem.f16[i] = prim::from_f32<prim::f16>(x);
    }
    if (p.mode != 2) prim::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        prim::bulk_store(p.out + blockIdx.x * 256, smem.x, sizeof(smem.x));
        prim::bulk_reduce_add(p.sum, smem.x, sizeof(smem.x));
        prim::bulk_reduce_add(p.sum_bf16, smem.bf16, sizeof(smem.bf16));
        prim::bulk_reduce_add(p.sum_f16, smem.f16, sizeof(smem.f16));
        prim::bulk_commit();
        if (p.mode == 5) smem.x[0] = 0;
        if (p.mode != 4) prim::bulk_wait_read<0>();
    }
}

// All six forms, one after the other, of registers that hold 64 i + 2 lane and the number after it for matrix i.
struct StmatrixParams { prim::u16* out; };
extern "C" __global__ void __launch_bounds__(32) example_stmatrix(const __grid_constant__ StmatrixParams p) {
    struct Smem { alignas(16) prim::u16 x[6][4][8][8]; };
    Smem& smem = prim::shared_memory<Smem>();
    const u32 lane = threadIdx.x;
    u32 r[4];
    for (u32 i = 0; i < 4; ++i) r[i] = (64 * i + 2 * lane) | (64 * i + 2 * lane + 1) << 16;
    for (u32 i = lane; i < sizeof(smem.x) / 4; i += 32) reinterpret_cast<u32*>(smem.x)[i] = 0;
    prim::syncwarp();
    const u32 one[1] = {r[0]}, two[2] = {r[0], r[1]};
    prim::stmatrix_x1(smem.x[0][0][lane % 8], one);
    prim::stmatrix_x1_trans(smem.x[1][0][lane % 8], one);
    prim::stmatrix_x2(smem.x[2][lane / 8 % 2][lane % 8], two);
    prim::stmatrix_x2_trans(smem.x[3][lane / 8 % 2][lane % 8], two);
    prim::stmatrix_x4(smem.x[4][lane / 8][lane % 8], r);
    prim::stmatrix_x4_trans(smem.x[5][lane / 8][lane % 8], r);
    prim::syncwarp();
    for (u32 i = lane; i < sizeof(smem.x) / 2; i += 32) p.out[i] = reinterpret_cast<prim::u16*>(smem.x)[i];
}
