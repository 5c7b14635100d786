// sm_80: asynchronous copies from global to shared memory.
#pragma once
#include "memory.cuh"

namespace prim {

// 16 bytes, of which the first src_bytes (0..16) come from global memory and the rest are zero. gmem is a valid address
// that is a multiple of 16, also where src_bytes is 0.
PRIM void cp_async_16(void* smem, const void* gmem, u32 src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(smem)), "l"(gmem), "r"(src_bytes) : "memory");
}
PRIM void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most Pending of this thread's groups are in flight; other threads' copies need a barrier after their wait.
template <int Pending> PRIM void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"); }

}  // namespace prim
