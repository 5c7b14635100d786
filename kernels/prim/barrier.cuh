// Named barriers of a block: id 1 to 15 (0 is __syncthreads), threads a multiple of 32.
#pragma once
#include "types.cuh"

namespace prim {

PRIM void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
PRIM void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace prim
