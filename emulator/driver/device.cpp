// Devices, contexts, limits, error names.
#include <cstdlib>

#include "driver.hpp"

namespace drv {

// CUDA programming guide, "Compute Capabilities" (shared memory, threads, blocks); data sheets for the rest.
static const Device kDevices[] = {
    {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 164 << 10, 163 << 10, 2048, 32, size_t(80) << 30, 40 << 20, 1410000, 1593000, 5120},
    {"sm_86", "NVIDIA GeForce RTX 3090", 8, 6, 82, 100 << 10, 99 << 10, 1536, 16, size_t(24) << 30, 6 << 20, 1695000, 9751000, 384},
    {"sm_89", "NVIDIA GeForce RTX 4090", 8, 9, 128, 100 << 10, 99 << 10, 1536, 24, size_t(24) << 30, 72 << 20, 2520000, 10501000, 384},
    {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 228 << 10, 227 << 10, 2048, 32, size_t(80) << 30, 50 << 20, 1980000, 2619000, 5120},
    {"h200", "NVIDIA H200", 9, 0, 132, 228 << 10, 227 << 10, 2048, 32, size_t(141) << 30, 60 << 20, 1980000, 3201000, 6144},
    {"sm_120", "NVIDIA GeForce RTX 5090", 12, 0, 170, 100 << 10, 99 << 10, 1536, 24, size_t(32) << 30, 96 << 20, 2407000, 14001000, 512},
};
static const Device& find_device(std::string name) {
    if (name == "sm_80") name = "a100";
    if (name == "sm_90" || name == "sm_90a" || name.empty()) name = "h100";
    if (name == "rtx3090") name = "sm_86";
    if (name == "rtx4090") name = "sm_89";
    if (name == "rtx5090") name = "sm_120";
    for (auto& d : kDevices) if (name == d.option) return d;
    fprintf(stderr, "emulator: EMU_DEVICE=%s: one of a100 sm_86 sm_89 h100 h200 sm_120 is wanted\n", name.c_str());
    exit(1);
}
const Device& device() { return find_device(settings().device); }
// Also where a test configures the device itself: the variable is then a mistake, or meant for something else.
static void check_environment() {
    if (const char* name = getenv("EMU_DEVICE")) find_device(name);
    emu::multiprocessors_from_env();
    emu::options_from_env();
}
int device_sms() {
    int n = settings().sms;
    return n > 0 ? n : 4;
}

int attribute(int id, int* v) {
    const Device& d = device();
    auto is = [&](int x) { *v = x; return true; };
    switch (id) {
        case 1: return is(1024);                 // MAX_THREADS_PER_BLOCK
        case 2: case 3: return is(1024);         // MAX_BLOCK_DIM_X, Y
        case 4: return is(64);                   // MAX_BLOCK_DIM_Z
        case 5: return is(2147483647);           // MAX_GRID_DIM_X
        case 6: case 7: return is(65535);        // MAX_GRID_DIM_Y, Z
        case 8: return is(48 << 10);             // MAX_SHARED_MEMORY_PER_BLOCK
        case 9: return is(64 << 10);             // TOTAL_CONSTANT_MEMORY
        case 10: return is(32);                  // WARP_SIZE
        case 11: return is(2147483647);          // MAX_PITCH
        case 12: return is(65536);               // MAX_REGISTERS_PER_BLOCK
        case 13: return is(d.clock_khz);         // CLOCK_RATE
        case 14: return is(512);                 // TEXTURE_ALIGNMENT
        case 15: return is(1);                   // GPU_OVERLAP
        case 16: return is(device_sms());        // MULTIPROCESSOR_COUNT
        case 17: case 18: return is(0);          // KERNEL_EXEC_TIMEOUT, INTEGRATED
        case 19: return is(1);                   // CAN_MAP_HOST_MEMORY
        case 20: return is(0);                   // COMPUTE_MODE
        case 31: return is(1);                   // CONCURRENT_KERNELS
        case 32: return is(d.smem_per_sm > 160 << 10);   // ECC_ENABLED
        case 33: return is(1);                   // PCI_BUS_ID
        case 34: case 35: case 50: return is(0); // PCI_DEVICE_ID, TCC_DRIVER, PCI_DOMAIN_ID
        case 36: return is(d.memory_clock_khz);
        case 37: return is(d.bus_bits);
        case 38: return is(d.l2);
        case 39: return is(d.threads_per_sm);
        case 40: return is(3);                   // ASYNC_ENGINE_COUNT
        case 41: return is(1);                   // UNIFIED_ADDRESSING
        case 75: return is(d.major);
        case 76: return is(d.minor);
        case 78: case 79: case 80: return is(1); // STREAM_PRIORITIES, GLOBAL_L1, LOCAL_L1
        case 81: return is(d.smem_per_sm);
        case 82: return is(65536);               // MAX_REGISTERS_PER_MULTIPROCESSOR
        case 83: return is(0);                   // MANAGED_MEMORY
        case 84: return is(0);                   // MULTI_GPU_BOARD
        case 88: case 89: return is(0);          // PAGEABLE_MEMORY_ACCESS, CONCURRENT_MANAGED_ACCESS
        case 90: return is(1);                   // COMPUTE_PREEMPTION
        case 91: return is(0);                   // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        case 95: return is(1);                   // COOPERATIVE_LAUNCH
        case 97: return is(d.smem_per_block);    // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 102: case 103: return is(0);        // VIRTUAL_MEMORY_MANAGEMENT, POSIX_FILE_DESCRIPTOR
        case 106: return is(d.blocks_per_sm);
        case 107: return is(0);                  // GENERIC_COMPRESSION
        case 108: case 109: return is(d.l2 / 4 * 3);     // MAX_PERSISTING_L2_CACHE_SIZE, MAX_ACCESS_POLICY_WINDOW_SIZE
        case 111: return is(1 << 10);            // RESERVED_SHARED_MEMORY_PER_BLOCK
        case 115: return is(1);                  // MEMORY_POOLS_SUPPORTED
        case 116: return is(0);                  // GPU_DIRECT_RDMA
        case 120: case 127: return is(d.major >= 9);     // CLUSTER_LAUNCH, TENSOR_MAP_ACCESS
    }
    return false;
}

static std::atomic<bool> initialised{false};
static std::atomic<int> retained{0};
static char primary;                                  // its address is the primary context
static thread_local std::vector<void*> current;

}  // namespace drv
using namespace drv;

API cuInit(unsigned flags) {
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (!initialised) check_environment();
    initialised = true;
    return CUDA_SUCCESS;
}
API cuDriverGetVersion(int* v) { *v = 13000; return CUDA_SUCCESS; }
API cuDeviceGetCount(int* n) { *n = 1; return initialised ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED; }
API cuDeviceGet(CUdevice* d, int ordinal) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (ordinal) return CUDA_ERROR_INVALID_DEVICE;
    *d = 0;
    return CUDA_SUCCESS;
}
API cuDeviceGetName(char* name, int len, CUdevice) { snprintf(name, len, "%s (emulated)", device().name); return CUDA_SUCCESS; }
API cuDeviceGetUuid_v2(char* uuid, CUdevice) { std::memcpy(uuid, "emulated device", 16); return CUDA_SUCCESS; }
API cuDeviceGetUuid(char* uuid, CUdevice d) { return cuDeviceGetUuid_v2(uuid, d); }
API cuDeviceTotalMem_v2(size_t* n, CUdevice) { *n = device().memory; return CUDA_SUCCESS; }
API cuDeviceComputeCapability(int* major, int* minor, CUdevice) { *major = device().major; *minor = device().minor; return CUDA_SUCCESS; }
API cuDeviceGetAttribute(int* v, int id, CUdevice d) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (d) return CUDA_ERROR_INVALID_DEVICE;
    if (attribute(id, v)) return CUDA_SUCCESS;
    fprintf(stderr, "emulated driver: device attribute %d has no value here\n", id);
    return CUDA_ERROR_INVALID_VALUE;
}
API cuDeviceGetPCIBusId(char* id, int len, CUdevice) { snprintf(id, len, "0000:01:00.0"); return CUDA_SUCCESS; }
API cuDevicePrimaryCtxRetain(void** c, CUdevice d) { if (d) return CUDA_ERROR_INVALID_DEVICE; ++retained; *c = &primary; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(CUdevice) { if (retained <= 0) return CUDA_ERROR_INVALID_CONTEXT; --retained; return CUDA_SUCCESS; }
API cuDevicePrimaryCtxSetFlags_v2(CUdevice, unsigned) { return CUDA_SUCCESS; }
API cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = retained > 0; return CUDA_SUCCESS; }
API cuCtxSetCurrent(void* c) { current.assign(c ? 1 : 0, c); return CUDA_SUCCESS; }
API cuCtxGetCurrent(void** c) { *c = current.empty() ? nullptr : current.back(); return CUDA_SUCCESS; }
API cuCtxPushCurrent_v2(void* c) { current.push_back(c); return CUDA_SUCCESS; }
API cuCtxPopCurrent_v2(void** c) {
    if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (c) *c = current.back();
    current.pop_back();
    return CUDA_SUCCESS;
}
API cuCtxGetDevice(CUdevice* d) { *d = 0; return current.empty() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS; }
API cuCtxGetApiVersion(void*, unsigned* v) { *v = 13000; return CUDA_SUCCESS; }
API cuCtxSynchronize() {
    if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (capture_forbids()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return sticky();
}
API cuCtxSetFlags(unsigned) { return CUDA_SUCCESS; }
API cuCtxGetFlags(unsigned* f) { *f = 0; return CUDA_SUCCESS; }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return CUDA_SUCCESS; }
API cuCtxGetLimit(size_t* v, int limit) { if (limit) return CUDA_ERROR_UNSUPPORTED_LIMIT; *v = 1024; return CUDA_SUCCESS; }   // CU_LIMIT_STACK_SIZE
API cuCtxSetCacheConfig(int) { return CUDA_SUCCESS; }
API cuCtxGetCacheConfig(int* c) { *c = 0; return CUDA_SUCCESS; }

#define ERRORS(X)                                                                                                          \
    X(0, CUDA_SUCCESS, "no error") X(1, CUDA_ERROR_INVALID_VALUE, "invalid argument") X(2, CUDA_ERROR_OUT_OF_MEMORY, "out of memory") \
    X(3, CUDA_ERROR_NOT_INITIALIZED, "initialization error") X(100, CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")        \
    X(101, CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal") X(200, CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")      \
    X(201, CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                                                               \
    X(209, CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device")                           \
    X(215, CUDA_ERROR_UNSUPPORTED_LIMIT, "limit is not supported on this architecture")                                        \
    X(218, CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed") X(301, CUDA_ERROR_FILE_NOT_FOUND, "file not found")         \
    X(400, CUDA_ERROR_INVALID_HANDLE, "invalid resource handle") X(401, CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state") \
    X(500, CUDA_ERROR_NOT_FOUND, "named symbol not found") X(600, CUDA_ERROR_NOT_READY, "device not ready")                    \
    X(700, CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                                             \
    X(701, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch")                                      \
    X(716, CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address")                                                                \
    X(719, CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure (the emulator's report is on stderr)")                        \
    X(720, CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "too many blocks in cooperative launch")                                   \
    X(801, CUDA_ERROR_NOT_SUPPORTED, "operation not supported (the emulator says which on stderr)")                            \
    X(900, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")                          \
    X(901, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")                   \
    X(903, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began")                        \
    X(904, CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work")                                           \
    X(905, CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream")                     \
    X(907, CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream")               \
    X(912, CUDA_ERROR_INVALID_CLUSTER_SIZE, "cluster misconfiguration") X(999, CUDA_ERROR_UNKNOWN, "unknown error")
API cuGetErrorName(int e, const char** s) {
    switch (e) {
#define X(n, name, text) case n: *s = #name; return CUDA_SUCCESS;
        ERRORS(X)
#undef X
    }
    *s = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}
API cuGetErrorString(int e, const char** s) {
    switch (e) {
#define X(n, name, text) case n: *s = text; return CUDA_SUCCESS;
        ERRORS(X)
#undef X
    }
    *s = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}
