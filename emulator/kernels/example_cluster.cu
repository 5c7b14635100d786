// Clusters of two blocks, right or wrong in one line: which is a parameter.
#include "prim/prim.cuh"
using prim::u32;
using prim::u64;

struct ClusterParams { const float* x; float* out; int mode; };

// Each thread reads what the same thread of the other block wrote, and all count in block 0.
// mode 1: no barrier before, 2: none after, 3: one that releases nothing.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(64) example_cluster_exchange(const __grid_constant__ ClusterParams p) {
    struct Smem { float x[64]; u32 count; };
    Smem& smem = prim::shared_memory<Smem>();
    const u32 rank = prim::cluster_rank(), other = (rank + 1) % prim::cluster_size(), at = blockIdx.x * 64 + threadIdx.x;
    smem.x[threadIdx.x] = p.x[at];
    if (threadIdx.x == 0) smem.count = 0;
    if (p.mode == 3) {
        prim::cluster_arrive_relaxed();
        prim::cluster_wait();
    } else if (p.mode != 1) {
        prim::cluster_sync();
    }
    p.out[at] = *prim::map_shared(&smem.x[threadIdx.x], other);
    prim::atomic_add(prim::map_shared(&smem.count, 0), 1u);
    if (p.mode != 2) prim::cluster_sync();
    else return;
    // What the other block wrote to global memory is there, too.
    if (rank == 0 && (smem.count != 128 || p.out[at + 64] != smem.x[threadIdx.x])) p.out[at] = -1;
}

// Block 1 writes into block 0's shared memory and arrives at its barrier; block 0 waits and reads.
// mode 1: an arrival without release, 2: a wait without acquire, 3: block 0 does not wait, 4: nobody arrives, 5: the barrier is
// initialised without the fence that a relaxed arrival needs.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(64) example_cluster_push(const __grid_constant__ ClusterParams p) {
    struct Smem { float x[64]; u64 full; };
    Smem& smem = prim::shared_memory<Smem>();
    if (threadIdx.x == 0) {
        prim::mbarrier_init(&smem.full, 64);
        if (p.mode != 5) prim::fence_mbarrier_init();
    }
    prim::syncwarp();
    prim::cluster_arrive_relaxed();
    prim::cluster_wait();
    if (prim::cluster_rank() == 1) {
        *prim::map_shared(&smem.x[threadIdx.x], 0) = p.x[blockIdx.x * 64 + threadIdx.x];
        if (p.mode == 1) prim::mbarrier_arrive_cluster(&smem.full, 0);
        else if (p.mode != 4) prim::mbarrier_arrive_cluster_release(&smem.full, 0);
    } else if (p.mode != 3) {
        if (p.mode == 2) prim::mbarrier_wait_cluster(&smem.full, 0);
        else prim::mbarrier_wait_cluster_acquire(&smem.full, 0);
        p.out[blockIdx.x / 2 * 64 + threadIdx.x] = smem.x[63 - threadIdx.x];
    }
}

// Half of 256 numbers a block, loaded into both, which then send each other their sums by a copy between their shared memories.
// mode 1: block 1 expects no bytes, 2: it does not wait for them, 3: the copy's source is written without a proxy fence,
// 4: block 1 loads before block 0 has initialised its barrier.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32) example_multicast(const __grid_constant__ ClusterParams p) {
    struct Smem { alignas(128) float x[256]; float sum[4], others[4]; u64 full, sent; };
    Smem& smem = prim::shared_memory<Smem>();
    const u32 rank = prim::cluster_rank();
    if (threadIdx.x == 0) {
        prim::mbarrier_init(&smem.full, 1);
        prim::mbarrier_init(&smem.sent, 1);
        prim::fence_mbarrier_init();
    }
    prim::syncwarp();
    if (p.mode != 4) prim::cluster_sync();
    if (threadIdx.x == 0) {
        if (p.mode != 1 || rank == 0) prim::mbarrier_arrive_expect_tx(&smem.full, sizeof(smem.x));
        else prim::mbarrier_arrive(&smem.full);
        prim::bulk_load_multicast(&smem.x[rank * 128], p.x + blockIdx.x / 2 * 256 + rank * 128, 512, &smem.full, 3);
    }
    if (p.mode == 2 && rank == 1) return;
    prim::mbarrier_wait(&smem.full, 0);
    float sum = 0;
    for (u32 i = threadIdx.x; i < 256; i += 32) sum += smem.x[i] * float(rank + 1);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += prim::shfl_xor(sum, lanes);
    if (threadIdx.x == 0) {
        for (float& s : smem.sum) s = sum;
        if (p.mode != 3) prim::fence_proxy_async();
        prim::mbarrier_arrive_expect_tx(&smem.sent, 16);
        prim::bulk_copy_cluster(smem.others, smem.sum, 16, &smem.sent, 1 - rank);
    }
    prim::syncwarp();
    prim::mbarrier_wait(&smem.sent, 0);
    if (threadIdx.x == 0) p.out[blockIdx.x] = smem.others[3];
    prim::syncwarp();
    prim::cluster_sync();
}

// Registers pass from the producer to the consumers. mode 1: more than there are, 2: all ask for more than there can be, 3: the
// producer keeps its own.
extern "C" __global__ void __launch_bounds__(384, 1) example_registers(const __grid_constant__ ClusterParams p) {
    if (p.mode == 2) {
        prim::setmaxnreg_inc<200>();
    } else if (threadIdx.x < 128) {
        if (p.mode != 3) prim::setmaxnreg_dec<40>();
    } else if (p.mode == 1) {
        prim::setmaxnreg_inc<240>();
    } else {
        prim::setmaxnreg_inc<232>();
    }
    __syncthreads();
    p.out[blockIdx.x * 384 + threadIdx.x] = p.x[threadIdx.x];
}

// 16 rows of 32 numbers into every block of a cluster of any size: each loads its share of boxes of two rows into all.
struct BoxParams { prim::TensorMap x; float* out; };
extern "C" __global__ void __launch_bounds__(32) example_multicast_box(const __grid_constant__ BoxParams p) {
    struct Smem { alignas(128) float x[16][32]; u64 full; };
    Smem& smem = prim::shared_memory<Smem>();
    const u32 rank = prim::cluster_rank(), size = prim::cluster_size();
    if (threadIdx.x == 0) {
        prim::mbarrier_init(&smem.full, 1);
        prim::fence_mbarrier_init();
    }
    prim::syncwarp();
    prim::cluster_sync();
    if (threadIdx.x == 0) {
        prim::mbarrier_arrive_expect_tx(&smem.full, sizeof(smem.x));
        for (u32 box = rank; box < 8; box += size)
            prim::tma_load_2d_multicast(smem.x[box * 2], &p.x, &smem.full, 0, int(blockIdx.x / size * 16 + box * 2), prim::u16((1u << size) - 1), prim::L2::Normal);
    }
    prim::syncwarp();
    prim::mbarrier_wait(&smem.full, 0);
    for (u32 row = 0; row < 16; ++row) p.out[blockIdx.x * 512 + row * 32 + threadIdx.x] = smem.x[row][threadIdx.x];
    prim::cluster_sync();
}
