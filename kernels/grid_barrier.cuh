// A barrier of all blocks of a cooperative grid.
#pragma once

#include "abi.h"

// Returns once every block of the grid has called it. What any thread of any block wrote before is then visible to every thread of
// every block, by plain loads too (not by ld_global_nc: its cache is not told). All threads of all blocks call it equally often; all
// blocks must be resident at once, which a cooperative launch makes sure of.
//
// `barrier` is {arrivals, generation}, zero before the launch; arrivals are back at zero after each barrier.
//
// Why it is enough under the PTX memory model: __syncthreads orders the writes of a block before its thread 0, whose fence and
// release-arrival are cumulative: they carry those writes along. The arrivals form one chain of read-modify-writes, so the last
// to arrive has acquired all the others'; it releases the generation, every waiting thread 0 acquires it, and the second
// __syncthreads hands on what that one has seen.
//
// sync: a barrier of the block's threads, for kernels whose warps have parted and cannot meet in __syncthreads.
template <class Sync> __device__ __forceinline__ void grid_barrier(u32* barrier, Sync sync) {
    sync();
    if (threadIdx.x == 0) {
        u32* arrivals = barrier;
        u32* generation = barrier + 1;
        const u32 blocks = gridDim.x * gridDim.y * gridDim.z;
        const u32 before = prim::ld_acquire(generation);   // before arriving: it cannot move on without this block
        prim::threadfence();
        if (prim::atomic_add_acq_rel(arrivals, 1u) == blocks - 1) {
            prim::atomic_exch(arrivals, 0u);               // nobody else touches it until the generation moves on
            prim::st_release(generation, before + 1);
        } else {
            while (prim::ld_acquire(generation) == before) prim::nanosleep(64);
        }
        prim::threadfence();
    }
    sync();
}

__device__ __forceinline__ void grid_barrier(u32* barrier) {
    grid_barrier(barrier, [] { __syncthreads(); });
}
