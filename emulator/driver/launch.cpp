// Launches, with the limits of the named device; reports; settings.
#include <cstdlib>
#include <map>

#include "driver.hpp"

namespace drv {

static std::mutex mutex;
static Settings configured;
static bool is_configured = false;
static std::vector<std::string> reports;
static std::map<std::string, emu::Counters> counters;
static std::atomic<int> sticky_error{0};

Settings settings() {
    std::lock_guard<std::mutex> lock(mutex);
    if (is_configured) return configured;
    Settings s;
    if (const char* e = getenv("EMU_DEVICE")) s.device = e;
    s.sms = emu::multiprocessors_from_env();
    s.options = emu::options_from_env();
    return s;
}
CUresult sticky() { return sticky_error; }
void failed(const std::string& kernel, const std::string& report) {
    sticky_error = CUDA_ERROR_LAUNCH_FAILED;
    fprintf(stderr, "emulated launch of %s:\n%s", kernel.c_str(), report.c_str());
    std::lock_guard<std::mutex> lock(mutex);
    reports.push_back(kernel + ":\n" + report);
}
void add_counters(const std::string& kernel, const emu::Counters& c) {
    std::lock_guard<std::mutex> lock(mutex);
    counters[kernel].add(c);
}
CUresult unimplemented(const char* name) {
    fprintf(stderr, "emulated driver: %s is not implemented\n", name);
    return CUDA_ERROR_NOT_SUPPORTED;
}

// Copies of a launch's parameters: the caller's may be gone when a graph runs.
struct Params {
    std::vector<std::unique_ptr<char[]>> raw;
    std::vector<void*> at;
    Params(const Function& f, void** params) {
        for (size_t i = 0; i < f.entry.param_sizes.size(); ++i) {
            size_t n = f.entry.param_sizes[i];
            raw.emplace_back(new char[n + 64]);
            at.push_back((void*)(((uintptr_t)raw.back().get() + 63) & ~uintptr_t(63)));
            std::memcpy(at.back(), params[i], n);
        }
        at.push_back(nullptr);
    }
};

static CUresult launch(void* handle, dim3 grid, dim3 block, size_t smem, void* stream_handle, void** params, void** extra, dim3 cluster, bool cooperative) {
    auto* f = (Function*)handle;
    if (!f) return CUDA_ERROR_INVALID_HANDLE;
    if (CUresult e = sticky()) return e;
    if (extra) return unimplemented("a launch with `extra` parameters");
    if (!params && !f->entry.param_sizes.empty()) return CUDA_ERROR_INVALID_VALUE;
    const Device& d = device();
    const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (!threads || !blocks || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (smem > size_t(f->max_dynamic) || smem > size_t(d.smem_per_block)) return CUDA_ERROR_INVALID_VALUE;
    if (f->entry.max_threads && threads > uint64_t(f->entry.max_threads)) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (const dim3& c = f->entry.cluster; c.x) {
        if (cluster.x && (cluster.x != c.x || cluster.y != c.y || cluster.z != c.z)) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
        cluster = c;
    }
    if (!cluster.x && !cluster.y && !cluster.z) cluster = dim3(1, 1, 1);
    const uint64_t cluster_blocks = uint64_t(cluster.x) * cluster.y * cluster.z;
    if (cluster_blocks != 1) {
        if (d.major < 9 || !cluster_blocks || cluster_blocks > (f->wide_clusters ? 16u : 8u) || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
            return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    }
    if (cooperative && blocks > uint64_t(device_sms()) * blocks_per_sm(*f, int(threads), smem)) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    auto copies = std::make_shared<Params>(*f, params);
    return submit(stream_handle, [=] {
        if (CUresult e = sticky()) return e;
        emu::Options options = settings().options;
        options.cluster = cluster;
        options.cooperative = cooperative;
        options.cut_group = device().major >= 9 ? 16 : 8;
        emu::Report r = emu::launch(options, f->entry, grid, block, smem, copies->at.data());
        add_counters(f->name, r.counters);
        for (auto& b : r.banks)
            fprintf(stderr, "%s: %-32s %8llu phases, %.2f wavefronts each\n", f->name.c_str(), b.where.c_str(), (unsigned long long)b.phases, double(b.wavefronts) / double(b.phases));
        if (!r.ok()) failed(f->name, r.text);          // asynchronous: the next call that synchronises fails
        return CUresult(CUDA_SUCCESS);
    });
}

}  // namespace drv
using namespace drv;

API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned smem, void* s, void** params, void** extra) {
    return launch(f, dim3(gx, gy, gz), dim3(bx, by, bz), smem, s, params, extra, dim3(0, 0, 0), false);
}
API cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned smem, void* s, void** params) {
    return launch(f, dim3(gx, gy, gz), dim3(bx, by, bz), smem, s, params, nullptr, dim3(0, 0, 0), true);
}
struct LaunchAttribute { int id; char pad[4]; union { char raw[64]; unsigned dims[3]; int value; }; };       // CUlaunchAttribute
static_assert(sizeof(LaunchAttribute) == 72);
struct LaunchConfig { unsigned grid[3], block[3], smem; void* stream; LaunchAttribute* attributes; unsigned count; };   // CUlaunchConfig
static_assert(sizeof(LaunchConfig) == 56);
API cuLaunchKernelEx(const LaunchConfig* c, void* f, void** params, void** extra) {
    dim3 cluster(0, 0, 0);
    bool cooperative = false;
    for (unsigned i = 0; i < c->count; ++i) {
        const LaunchAttribute& a = c->attributes[i];
        switch (a.id) {
            case 0: case 1: case 5: case 8: break;      // IGNORE; ACCESS_POLICY_WINDOW, CLUSTER_SCHEDULING, PRIORITY: speed only
            case 2: cooperative = a.value; break;       // COOPERATIVE
            case 4: cluster = dim3(a.dims[0], a.dims[1], a.dims[2]); break;   // CLUSTER_DIMENSION
            default: fprintf(stderr, "emulated driver: launch attribute %d is not implemented\n", a.id); return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return launch(f, dim3(c->grid[0], c->grid[1], c->grid[2]), dim3(c->block[0], c->block[1], c->block[2]), c->smem, c->stream, params, extra, cluster, cooperative);
}

// One cluster beside the other on whichever multiprocessors there are: of a GPU some may be left over.
API cuOccupancyMaxActiveClusters(int* n, void* handle, const LaunchConfig* c) {
    auto* f = (Function*)handle;
    if (!f || !c) return CUDA_ERROR_INVALID_HANDLE;
    dim3 cluster = f->entry.cluster;
    for (unsigned i = 0; i < c->count; ++i)
        if (c->attributes[i].id == 4) cluster = dim3(c->attributes[i].dims[0], c->attributes[i].dims[1], c->attributes[i].dims[2]);
    const unsigned blocks = cluster.x * cluster.y * cluster.z, threads = c->block[0] * c->block[1] * c->block[2];
    if (!blocks || !threads || device().major < 9) return CUDA_ERROR_INVALID_VALUE;
    if (c->smem > size_t(f->max_dynamic)) return CUDA_ERROR_INVALID_VALUE;
    *n = int(device_sms() * blocks_per_sm(*f, int(threads), c->smem) / blocks);
    return CUDA_SUCCESS;
}

// ---- what the crate calls ----------------------------------------------------------------------------------------------
#define CONTROL extern "C" __attribute__((visibility("default")))
struct EmuConfig { const char* device; int sms, order, async_, check, banks, cut, workers, spin_seconds; uint64_t seed; };
CONTROL void emu_configure(const EmuConfig* c) {
    std::lock_guard<std::mutex> lock(mutex);
    configured.device = c->device;
    configured.sms = c->sms;
    auto& o = configured.options;
    o.order = emu::Schedule(c->order);
    o.async = emu::Async(c->async_);
    o.check = c->check;
    o.banks = c->banks;
    o.cut = c->cut;
    o.workers = c->workers;
    o.spin_seconds = c->spin_seconds;
    o.seed = c->seed;
    is_configured = true;
}
// The oldest report in malloc'ed memory, null if there is none; with the last one the context works again.
CONTROL char* emu_take_report() {
    std::lock_guard<std::mutex> lock(mutex);
    if (reports.empty()) { sticky_error = 0; return nullptr; }
    char* s = strdup(reports.front().c_str());
    reports.erase(reports.begin());
    return s;
}
CONTROL int emu_counters(const char* kernel, uint64_t out[13]) {
    std::lock_guard<std::mutex> lock(mutex);
    auto it = counters.find(kernel);
    if (it == counters.end()) return 0;
    const auto& c = it->second;
    const uint64_t all[13] = {c.blocks, c.global_read, c.global_write, c.shared_read, c.shared_write, c.mma, c.wgmma, c.atomics,
                              c.copy_read, c.bulk_read, c.bulk_write, c.shared_phases, c.shared_wavefronts};
    std::memcpy(out, all, sizeof all);
    return 1;
}
CONTROL void emu_reset_counters() { std::lock_guard<std::mutex> lock(mutex); counters.clear(); }
