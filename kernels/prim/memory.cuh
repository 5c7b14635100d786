// Shared memory and 16-byte accesses to global memory. Addresses are multiples of 16.
#pragma once
#include "types.cuh"

namespace prim {

// The block's dynamic shared memory as one struct.
template <class T> PRIM T& shared_memory() {
    extern __shared__ __align__(1024) unsigned char dynamic_smem[];
    return *reinterpret_cast<T*>(dynamic_smem);
}
PRIM u32 smem_addr(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

PRIM Vec16 ld_global_16(const void* p) {
    Vec16 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
    return v;
}
// Through the read-only cache: only for what no thread writes during the launch.
PRIM Vec16 ld_global_nc_16(const void* p) {
    Vec16 v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
PRIM void st_global_16(void* p, Vec16 v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
PRIM void st_global_cs_16(void* p, Vec16 v) {                   // streaming: evicted first
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}

}  // namespace prim
