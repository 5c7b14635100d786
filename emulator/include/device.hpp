// What a CUDA thread can do, as calls into the functional SM. No standard containers here: kernels are compiled with
// instrumentation and must not leave instrumented copies of shared templates to the linker's choice.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern thread_local uint3 threadIdx __attribute__((tls_model("initial-exec"))), blockIdx __attribute__((tls_model("initial-exec")));
extern thread_local uint3 blockDim __attribute__((tls_model("initial-exec"))), gridDim __attribute__((tls_model("initial-exec")));

namespace emu {

struct Site { const char* file; int line; };
constexpr Site here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) { return {f, l}; }

enum Format { kBf16 = 9, kF16 = 6, kF32 = 7, kTf32 = 11 };   // CUtensorMapDataType values

void* dynamic_smem();
// A 32-bit address of another block of the cluster has one more than its rank in the upper bits, as mapa gives it.
constexpr int kRankShift = 24;
uint32_t smem_addr(const void*);
void load_global(void* to, const void* from, size_t bytes, Site);
void store_global(void* to, const void* from, size_t bytes, Site);
void sync_threads(Site);
void sync_warp(uint32_t mask, Site);
void named_sync(int id, int threads, Site);
void named_arrive(int id, int threads, Site);
enum Shfl { kIdx, kUp, kDown, kXor };
uint64_t shuffle(Shfl, uint32_t mask, uint64_t v, int src, int width, Site);
uint32_t ballot(uint32_t mask, bool p, Site);

void cp_async_16(void* smem, const void* gmem, uint32_t src_bytes, Site);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* r, int count, bool trans, const void* row, Site);
void stmatrix(const uint32_t* r, int count, bool trans, void* row, Site);
void mma_m16n8(Format, float* d, const uint32_t* a, const uint32_t* b, Site);   // k16 of 16-bit types, k8 of tf32

// Atomics on shared or global memory. Relaxed ones carry an order between blocks only together with fences.
enum class Order { Relaxed, Acquire, Release, AcqRel };
enum class Rmw { Add, AddF32, Or, And, MaxU, MaxS, MinU, MinS, Exch, Cas };
uint64_t atomic_rmw(Rmw, Order, void* p, int bytes, uint64_t v, uint64_t expected, Site);
uint64_t atomic_load(Order, const void* p, int bytes, Site);
void atomic_store(Order, void* p, int bytes, uint64_t v, Site);
void thread_fence();
void nanosleep(Site);

void mbarrier_init(uint64_t*, uint32_t count, Site);
void mbarrier_arrive(uint64_t*, uint32_t tx_bytes, Site);
void mbarrier_wait(uint64_t*, uint32_t parity, Site);
bool mbarrier_test(uint64_t*, uint32_t parity, Site);          // without blocking
void fence_mbarrier_init();
// Of clusters. An arrival at another block's mbarrier orders plain accesses only if it releases to the cluster and the wait
// acquires from it; what copies and products have read it always hands back.
void mbarrier_arrive_cluster(uint64_t*, uint32_t tx_bytes, bool release, Site);
void mbarrier_wait_cluster(uint64_t*, uint32_t parity, bool acquire, Site);
bool mbarrier_test_cluster(uint64_t*, uint32_t parity, bool acquire, Site);
uint32_t cluster_rank();
uint32_t cluster_size();
uint3 cluster_dims();
void* map_shared(const void* p, uint32_t rank, Site);          // mapa: the same place in the shared memory of block `rank`
void cluster_arrive(bool release, bool aligned, Site);         // aligned: by whole warps
void cluster_wait(Site);
void fence_proxy_async();

// coords: one for each dimension of the map, innermost first
void tma_load(void* smem, const void* map, uint64_t* bar, const int* coords, int rank, Site);
void tma_load_multicast(void* smem, const void* map, uint64_t* bar, const int* coords, int rank, uint16_t blocks, Site);
enum class Bulk { Store, ReduceAdd };
void tma_store(Bulk, const void* map, const void* smem, const int* coords, int rank, Site);
// Plain ranges. blocks: a multicast, 0 for none. A copy between blocks: bar is in the block of the destination.
void bulk_load(void* smem, const void* gmem, uint32_t bytes, uint64_t* bar, uint16_t blocks, Site);
void bulk_store(Bulk, Format, void* gmem, const void* smem, uint32_t bytes, Site);
void bulk_copy_cluster(void* to, const void* from, uint32_t bytes, uint64_t* bar, Site);
void bulk_commit();
void bulk_wait(int pending, bool read_only);

void wgmma_fence(Site);
void wgmma(Format, int n, float* d, const uint32_t* a_regs, uint64_t a_desc, bool a_mn_major, uint64_t b_desc,
           bool b_mn_major, bool accumulate, Site);
void wgmma_commit(Site);
void wgmma_wait(int pending, Site);
void setmaxnreg(int regs, bool inc, Site);

// Plain accesses, told by the compiler's instrumentation or by a front end that executes them itself.
void touch(const void* p, size_t n, bool write, bool atomic, const void* pc);
void* smem_pointer(uint32_t addr);
bool wgmma_in_flight(float* d);
extern bool (*locate)(const void* pc, Site*);    // a front end other than the compiler explains its program counters
[[noreturn]] void trap(const char* what, Site);
void undefined(const char* what, const char* file, int line);

// Byte offset of element (mn, k) of a 16-bit wgmma operand, exactly as the tensor core would address it.
uint32_t wgmma_operand_addr(uint64_t desc, bool mn_major, int mn, int k);

}  // namespace emu
