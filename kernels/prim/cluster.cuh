// sm_90: clusters of thread blocks, which reach each other's shared memory.
#pragma once
#include "memory.cuh"

namespace prim {

PRIM u32 cluster_rank() {                                       // of this block in its cluster
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
PRIM u32 cluster_size() {
    u32 n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}
// All threads of all blocks of the cluster; what was written before is seen after, also in the others' shared memory.
PRIM void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Its two halves, each by whole warps. A relaxed arrival hands on nothing but fence_mbarrier_init.
PRIM void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
PRIM void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
PRIM void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of block `rank`: for loads, stores and atomics, between two barriers of the cluster.
template <class T> PRIM T* map_shared(T* p, u32 rank) {
    u64 r;
    asm("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(p), "r"(rank));
    return reinterpret_cast<T*>(r);
}
// At the barrier in the same place of the shared memory of block `rank`. It hands back what wgmma or the copy engine has read, and
// orders no plain accesses of the cluster's blocks but those whose writing wgmma has read: release at cluster scope would be a fence of the
// whole GPU's memory.
PRIM void mbarrier_arrive_cluster(u64* bar, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(smem_addr(bar)), "r"(rank) : "memory");
}
// One that does order plain accesses, for a wait that acquires.
PRIM void mbarrier_arrive_cluster_release(u64* bar, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n\t}" ::"r"(smem_addr(bar)), "r"(rank) : "memory");
}
PRIM void mbarrier_wait_cluster_acquire(u64* bar, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(smem_addr(bar)), "r"(parity) : "memory");
}
// mbarrier_wait, where threads of other blocks arrive by mbarrier_arrive_cluster.
PRIM void mbarrier_wait_cluster(u64* bar, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(smem_addr(bar)), "r"(parity) : "memory");
}
// tma_load_2d into the same place of every block whose bit in `blocks` is set, on each one's own barrier.
PRIM void tma_load_2d_multicast(void* smem, const TensorMap* map, u64* bar, int x, int y, u16 blocks, L2 keep) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
                 " [%0], [%1, {%3, %4}], [%2], %5, %6;"
                 ::"r"(smem_addr(smem)), "l"(map), "r"(smem_addr(bar)), "r"(x), "r"(y), "h"(blocks), "l"(u64(keep)) : "memory");
}
// bulk_load in the same way.
PRIM void bulk_load_multicast(void* smem, const void* gmem, u32 bytes, u64* bar, u16 blocks) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(smem_addr(smem)), "l"(gmem), "r"(bytes), "r"(smem_addr(bar)), "h"(blocks) : "memory");
}
// From this block's shared memory to the same place as `to` in block `rank`, on the barrier there.
PRIM void bulk_copy_cluster(void* to, const void* from, u32 bytes, u64* bar, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 there, barrier;\n\t"
        "mapa.shared::cluster.u32 there, %0, %4;\n\t"
        "mapa.shared::cluster.u32 barrier, %3, %4;\n\t"
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [barrier];\n\t}"
        ::"r"(smem_addr(to)), "r"(smem_addr(from)), "r"(bytes), "r"(smem_addr(bar)), "r"(rank) : "memory");
}

}  // namespace prim
