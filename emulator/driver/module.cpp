// Modules, functions, occupancy. Whatever the image is, its kernels run by name: the ones g++ compiled, or the PTX that
// EMU_PTX names. PTX with other kernels, a library's, is interpreted.
#include <algorithm>
#include <cstdlib>

#include "driver.hpp"

namespace drv {

// What ptxas might have needed: what the launch bounds leave, at most 128.
int registers(const Function& f) {
    if (f.entry.registers) return f.entry.registers;
    const int bound = f.entry.launch_registers();
    return bound ? std::min(128, bound) : 128;
}
int blocks_per_sm(const Function& f, int threads, size_t dynamic) {
    const Device& d = device();
    if (threads <= 0 || threads > 1024 || (f.entry.max_threads && threads > f.entry.max_threads) || dynamic > size_t(f.max_dynamic)) return 0;
    int warps = (threads + 31) / 32;
    int by_smem = d.smem_per_sm / int((dynamic + 1024 + 127) / 128 * 128);          // 1 KiB a block is the system's
    int by_registers = 65536 / (warps * ((registers(f) * 32 + 255) / 256 * 256));
    return std::min(std::min(d.threads_per_sm / (warps * 32), d.blocks_per_sm), std::min(by_smem, by_registers));
}

static CUresult load_ptx_of_environment() {
    static const CUresult done = [] {
        const char* list = getenv("EMU_PTX");
        while (list && *list) {
            std::string path(list, strcspn(list, ":"));
            list += path.size() + (list[path.size()] == ':');
            std::string text;
            FILE* f = fopen(path.c_str(), "r");
            for (int c; f && (c = fgetc(f)) != EOF;) text += char(c);
            if (f) fclose(f);
            if (emu::load_ptx(text.c_str()) <= 0) {
                fprintf(stderr, "emulated driver: EMU_PTX: no kernel could be loaded from %s\n", path.c_str());
                return CUresult(CUDA_ERROR_INVALID_IMAGE);
            }
        }
        return CUresult(CUDA_SUCCESS);
    }();
    return done;
}
static int architecture(const char* text, const char* before) {                     // "sm_90a" behind a word
    const char* at = strstr(text, before);
    at = at ? strstr(at, "_") : nullptr;
    return at ? atoi(at + 1) : 0;
}

}  // namespace drv
using namespace drv;

API cuModuleLoadData(void** out, const void* image) {
    if (!image) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult e = sticky()) return e;
    if (CUresult e = load_ptx_of_environment()) return e;
    auto m = std::make_unique<Module>();
    const int here = device().major * 10 + device().minor;
    uint32_t magic;
    std::memcpy(&magic, image, 4);
    const char* text = (const char*)image;
    if (!std::memcmp(text, "EMULATED NVRTC", 14)) {                                 // of nvrtc.cpp, followed by the options
        m->origin = "nvrtc";
        int arch = architecture(text, "--gpu-architecture=");
        if (!arch) arch = architecture(text, "-arch=");
        if (arch > here) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    } else if (magic == 0xba55ed50 || magic == 0x466243b1) m->origin = "fatbin";
    else if (magic == 0x464c457f) m->origin = "cubin";
    else if (strstr(text, ".version") && strstr(text, ".target")) {
        m->origin = "ptx";
        if (architecture(text, ".target") > here) return CUDA_ERROR_NO_BINARY_FOR_GPU;
        for (const char* e = text; (e = strstr(e, ".entry ")); e += 7) m->names.emplace_back(e + 7, strcspn(e + 7, "( \n\t"));
        const auto unknown = [](const std::string& name) { return !emu::find_kernel(name.c_str()); };
        if (std::any_of(m->names.begin(), m->names.end(), unknown)) emu::load_ptx(text);
    } else return CUDA_ERROR_INVALID_IMAGE;
    *out = m.release();
    return CUDA_SUCCESS;
}
API cuModuleLoadDataEx(void** m, const void* image, unsigned, int*, void**) { return cuModuleLoadData(m, image); }
API cuModuleLoadFatBinary(void** m, const void* image) { return cuModuleLoadData(m, image); }
API cuModuleLoad(void** m, const char* path) {
    FILE* f = fopen(path, "rb");
    if (!f) return CUDA_ERROR_FILE_NOT_FOUND;
    std::string text;
    for (int c; (c = fgetc(f)) != EOF;) text += char(c);
    fclose(f);
    return cuModuleLoadData(m, text.c_str());
}
API cuModuleUnload(void* m) { delete (Module*)m; return CUDA_SUCCESS; }
API cuModuleGetFunction(void** out, void* module, const char* name) {
    auto* m = (Module*)module;
    if (!m || !name) return CUDA_ERROR_INVALID_HANDLE;
    bool listed = m->names.empty() || std::find(m->names.begin(), m->names.end(), name) != m->names.end();
    emu::Entry entry = emu::find_kernel(name);
    if (!listed) return CUDA_ERROR_NOT_FOUND;
    if (!entry) {
        fprintf(stderr, "emulated driver: kernel %s is in the %s image but the emulator was built without it\n", name, m->origin.c_str());
        return CUDA_ERROR_NOT_FOUND;
    }
    if (!entry.interpreted && getenv("EMU_PTX")) {
        fprintf(stderr, "emulated driver: EMU_PTX is set, but none of its files has kernel %s\n", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    *out = new Function{name, std::move(entry)};                                    // lives as long as the process
    return CUDA_SUCCESS;
}
API cuFuncGetName(const char** name, void* f) { *name = ((Function*)f)->name.c_str(); return CUDA_SUCCESS; }

API cuFuncGetAttribute(int* v, int attribute, void* handle) {
    auto* f = (Function*)handle;
    auto is = [&](int x) { *v = x; return CUDA_SUCCESS; };
    switch (attribute) {
        case 0: return is(f->entry.max_threads ? f->entry.max_threads : 1024);      // MAX_THREADS_PER_BLOCK
        case 1: case 2: case 3: return is(0);                                       // SHARED, CONST, LOCAL_SIZE_BYTES
        case 4: return is(registers(*f));
        case 5: case 6: return is(device().major * 10 + device().minor);            // PTX_VERSION, BINARY_VERSION
        case 7: return is(0);                                                       // CACHE_MODE_CA
        case 8: return is(f->max_dynamic);
        case 9: return is(f->carveout);
        case 10: return is(0);                                                      // CLUSTER_SIZE_MUST_BE_SET: by an attribute of the launch
        case 11: return is(int(f->entry.cluster.x));                                // REQUIRED_CLUSTER_WIDTH, HEIGHT, DEPTH
        case 12: return is(int(f->entry.cluster.y));
        case 13: return is(int(f->entry.cluster.z));
        case 15: return is(0);                                                      // scheduling policy preference
        case 14: return is(f->wide_clusters);
    }
    fprintf(stderr, "emulated driver: function attribute %d has no value here\n", attribute);
    return CUDA_ERROR_INVALID_VALUE;
}
API cuFuncSetAttribute(void* handle, int attribute, int v) {
    auto* f = (Function*)handle;
    if (!f) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == 8 && v >= 0 && v <= device().smem_per_block) { f->max_dynamic = v; return CUDA_SUCCESS; }
    if (attribute == 9 && v >= -1 && v <= 100) { f->carveout = v; return CUDA_SUCCESS; }
    if (attribute == 14) { f->wide_clusters = v; return CUDA_SUCCESS; }
    return CUDA_ERROR_INVALID_VALUE;
}
API cuFuncSetCacheConfig(void*, int) { return CUDA_SUCCESS; }

API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, void* f, int threads, size_t dynamic, unsigned) {
    if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    *n = blocks_per_sm(*(Function*)f, threads, dynamic);
    return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void* f, int threads, size_t dynamic) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, dynamic, 0);
}
API cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, void* handle, size_t (*dynamic_of)(int), size_t dynamic, int limit, unsigned) {
    auto* f = (Function*)handle;
    int most = std::min(f->entry.max_threads ? f->entry.max_threads : 1024, limit > 0 ? limit : 1024), best = 0;
    for (int t = 32; t <= most; t += 32) {
        int blocks = blocks_per_sm(*f, t, dynamic_of ? dynamic_of(t) : dynamic);
        if (blocks * t >= best) { best = blocks * t; *block = t; *grid = blocks * device_sms(); }
    }
    return CUDA_SUCCESS;
}
API cuOccupancyMaxPotentialBlockSize(int* grid, int* block, void* f, size_t (*dynamic_of)(int), size_t dynamic, int limit) {
    return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, f, dynamic_of, dynamic, limit, 0);
}
API cuOccupancyAvailableDynamicSMemPerBlock(size_t* n, void*, int blocks, int) {
    if (blocks <= 0) return CUDA_ERROR_INVALID_VALUE;
    int share = device().smem_per_sm / blocks - 1024;
    *n = size_t(std::max(0, std::min(share, device().smem_per_block)));
    return CUDA_SUCCESS;
}
