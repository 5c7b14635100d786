// The pipeline of the Hopper kernels: a ring of stages in shared memory, between a producer whose four warps fill one stage each, through the
// copy engine where they can, and two warpgroups that multiply with wgmma. What a stage holds is the kernel's; a ring has besides
//
//     full[s]     the bytes of stage s have landed
//     empty[s]    every warp of both consumers has done with it. In a cluster, where blocks load parts of an operand into each other's rings,
//                 the warps of all blocks
#pragma once

#include "abi_sm90.h"

namespace hopper {

constexpr u32 STAGES = 4;
constexpr u32 CONSUMERS = 2;
constexpr u32 WARPGROUP = 128, THREADS = WARPGROUP * (1 + CONSUMERS);
static_assert(STAGES == WARPGROUP / 32, "a warp of the producer a stage");

// Where a thread is in the ring: the stage, and the parity of the current lap.
struct Cursor {
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// By one thread, before a barrier of the block or cluster.
template <u32 CLUSTER, class Ring> __device__ __forceinline__ void initialise(Ring& ring) {
    static_assert(CLUSTER <= 2, "a block has one other");
    for (u32 s = 0; s < STAGES; ++s) {
        prim::mbarrier_init(&ring.full[s], 1);
        prim::mbarrier_init(&ring.empty[s], CLUSTER * CONSUMERS * WARPGROUP / 32);
    }
    prim::fence_mbarrier_init();
}

// Until the stage is empty; by the producer. written: consumers may have written there (release_written).
template <u32 CLUSTER, class Ring> __device__ __forceinline__ void wait_empty(Ring& ring, const Cursor& at, bool written) {
    if constexpr (CLUSTER == 1) prim::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
    else if (written) prim::mbarrier_wait_cluster_acquire(&ring.empty[at.stage], at.parity ^ 1);
    else prim::mbarrier_wait_cluster(&ring.empty[at.stage], at.parity ^ 1);
}

// By a warp of a consumer, when all its lanes have read the stage. In a cluster its own block is told first: where a stage has nothing from this
// block's copies (no bytes, or gathered ones) the other block may be a lap ahead at once, and its arrival must not be counted in the place of this
// one. The other way round it may: by then all warps of both blocks have read the stage.
template <u32 CLUSTER, class Ring> __device__ __forceinline__ void release(Ring& ring, u32 stage) {
    if (threadIdx.x % 32 != 0) return;
    prim::mbarrier_arrive(&ring.empty[stage]);
    if constexpr (CLUSTER > 1) prim::mbarrier_arrive_cluster(&ring.empty[stage], prim::cluster_rank() ^ 1);
}

// All stages, by a warp whose lanes have written there. Nobody's copies, not another block's either, must meet what they wrote.
template <u32 CLUSTER, class Ring> __device__ __forceinline__ void release_written(Ring& ring) {
    prim::fence_proxy_async();
    prim::syncwarp();
    if (threadIdx.x % 32 != 0) return;
    for (u32 stage = 0; stage < STAGES; ++stage) {
        prim::mbarrier_arrive(&ring.empty[stage]);
        if constexpr (CLUSTER > 1) prim::mbarrier_arrive_cluster_release(&ring.empty[stage], prim::cluster_rank() ^ 1);
    }
}

// Matrix descriptor of an operand at a multiple of 1024 bytes whose eight rows of 128 bytes are one pattern, under the 128-byte swizzle. MN-major,
// `leading` bytes go from one block of 64 columns to the next.
template <prim::Major MAJOR> __device__ __forceinline__ u64 descriptor(const prim::u8* operand, u32 leading) {
    return u64(prim::smem_addr(operand) & 0x3ffff) >> 4 | u64(MAJOR == prim::Major::K ? 0 : leading) >> 4 << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

}  // namespace hopper
