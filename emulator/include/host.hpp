// What the host can do: allocate device memory, encode tensor maps, launch.
#pragma once
#include <functional>
#include <string>
#include <vector>
#include "device.hpp"

namespace emu {

enum class Schedule { Forward, Reverse, Random };   // which runnable thread goes next
enum class Async { Lazy, Eager, Random };           // when asynchronous effects land
struct Options {
    Schedule order = Schedule::Forward;
    Async async = Async::Lazy;
    uint64_t seed = 1;
    int workers = 1;         // OS threads that run blocks
    dim3 cluster = dim3(0, 0, 0);   // blocks of a cluster; 0: as the kernel says
    bool cooperative = false; // every block has an OS thread of its own, all at once
    bool check = true;
    bool banks = false;      // count shared-memory wavefronts per source line
    bool cut = false;        // tensor cores cut sums off as the device's do; else each is rounded
    int cut_group = 16;      // products of 16 bits that they add at once
    int max_reports = 8;
    int spin_seconds = 10;   // nothing but polling for so long is a deadlock
};
Options options_from_env();
int multiprocessors_from_env();                    // 0: unsaid
struct BankLine { std::string where; uint64_t phases = 0, wavefronts = 0; };   // conflict-free: equal
// What went through. Plain accesses count only in a checked launch.
struct Counters {
    uint64_t blocks = 0, global_read = 0, global_write = 0, shared_read = 0, shared_write = 0;   // bytes
    uint64_t mma = 0, wgmma = 0, atomics = 0;                                                    // instructions: warps, warpgroups, threads
    uint64_t copy_read = 0, bulk_read = 0, bulk_write = 0;      // of the global bytes: by cp.async; by TMA and bulk copies
    uint64_t shared_phases = 0, shared_wavefronts = 0;          // of accesses by threads and matrix loads, where banks are counted
    void add(const Counters& o);
};
struct Report {
    std::string text;
    std::vector<BankLine> banks = {};
    Counters counters = {};
    bool ok() const { return text.empty(); }
};

struct Entry {
    std::function<void(void** params)> run;
    std::vector<size_t> param_sizes = {};
    int max_threads = 0, min_blocks = 0;                       // of __launch_bounds__; 0: unsaid
    dim3 cluster = dim3(0, 0, 0);                              // of __cluster_dims__; 0: unsaid
    int registers = 0;                                         // of a thread, where the compiler's output says so
    int launch_registers() const;                              // that, or what the launch bounds leave; 0: unknown
    bool interpreted = false;                                  // PTX
    explicit operator bool() const { return bool(run); }
};
void add_entry(const char* name, Entry);                       // replaces one of that name
int load_ptx(const char* text);                                // adds every .entry that can run; returns how many; says why of the others
Entry find_kernel(const char* name);
std::vector<std::string> kernel_names();
Report launch(const Options&, const Entry&, dim3 grid, dim3 block, size_t smem, void** params);
template <class... A> Report launch(const Options& o, const char* name, dim3 grid, dim3 block, size_t smem, A... args) {
    void* params[] = {&args..., nullptr};
    return launch(o, find_kernel(name), grid, block, smem, params);
}

// Device memory: guarded, poisoned with 0xff, registered for the checker.
void* device_alloc(size_t bytes);
bool device_free(void*);                         // false: not the start of an allocation
bool device_owns(const void* p, size_t n);
bool device_range(const void* p, uintptr_t* base, size_t* bytes);
size_t device_used();
void device_written(const void* p, size_t n);    // host copied or set it: initialised
void device_moved(void* to, const void* from, size_t n);       // device to device: initialised where the source was
template <class T> T* device_alloc_n(size_t n) { return static_cast<T*>(device_alloc(n * sizeof(T))); }

// The contract and the argument checks of cuTensorMapEncodeTiled.
int tensor_map_encode_tiled(void* map, int type, uint32_t rank, void* gaddr, const uint64_t* dims, const uint64_t* strides,
                            const uint32_t* box, const uint32_t* elem_strides, int interleave, int swizzle, int l2, int oob);

}  // namespace emu
