// Atomics, on shared or global memory, and the order between threads of different blocks. Plain atomics order nothing by
// themselves: data reaches another block through writes, threadfence, atomic; atomic, threadfence, reads; or through the
// release and acquire forms. Every function returns the old value.
#pragma once
#include "types.cuh"

namespace prim {

PRIM u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
PRIM i32 atomic_add(i32* p, i32 v) { return atomicAdd(p, v); }
PRIM u64 atomic_add(u64* p, u64 v) { return atomicAdd(p, v); }
PRIM float atomic_add(float* p, float v) { return atomicAdd(p, v); }
PRIM u32 atomic_or(u32* p, u32 v) { return atomicOr(p, v); }
PRIM u32 atomic_and(u32* p, u32 v) { return atomicAnd(p, v); }
PRIM u32 atomic_max(u32* p, u32 v) { return atomicMax(p, v); }
PRIM i32 atomic_max(i32* p, i32 v) { return atomicMax(p, v); }
PRIM u64 atomic_max(u64* p, u64 v) { return atomicMax(p, v); }
PRIM u32 atomic_min(u32* p, u32 v) { return atomicMin(p, v); }
PRIM i32 atomic_min(i32* p, i32 v) { return atomicMin(p, v); }
PRIM u64 atomic_min(u64* p, u64 v) { return atomicMin(p, v); }
PRIM u32 atomic_exch(u32* p, u32 v) { return atomicExch(p, v); }
PRIM u64 atomic_exch(u64* p, u64 v) { return atomicExch(p, v); }
PRIM u32 atomic_cas(u32* p, u32 expected, u32 v) { return atomicCAS(p, expected, v); }
PRIM u64 atomic_cas(u64* p, u64 expected, u64 v) { return atomicCAS(p, expected, v); }

PRIM void threadfence() { __threadfence(); }
PRIM u32 ld_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
PRIM u32 ld_relaxed(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
PRIM void st_release(u32* p, u32 v) { asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
PRIM void st_relaxed(u32* p, u32 v) { asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
PRIM u32 atomic_add_acq_rel(u32* p, u32 v) {
    u32 r;
    asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(r) : "l"(p), "r"(v) : "memory");
    return r;
}
#if __CUDA_ARCH__ >= 900
// Adds to two floats of global memory, whose address is a multiple of 8, and does not wait.
PRIM void reduce_add_2(float* p, float first, float second) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(first), "f"(second) : "memory");
}
#endif
PRIM void nanosleep(u32 ns) { __nanosleep(ns); }

}  // namespace prim
