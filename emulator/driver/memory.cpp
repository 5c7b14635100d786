// Memory: device allocations (pools are the same heap), copies, sets.
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>

#include "driver.hpp"

using namespace drv;

// ---- allocation --------------------------------------------------------------------------------------------------------
static std::atomic<size_t> most_used;                                               // since it was last reset

static CUresult allocate(CUdeviceptr* p, size_t n) {
    if (!n) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult e = sticky()) return e;
    if (emu::device_used() + n > device().memory) return CUDA_ERROR_OUT_OF_MEMORY;
    *p = (CUdeviceptr)emu::device_alloc(n);
    const size_t used = emu::device_used();
    for (size_t most = most_used; most < used && !most_used.compare_exchange_weak(most, used);) {}
    return *p ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API cuMemAlloc_v2(CUdeviceptr* p, size_t n) { return capture_forbids() ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : allocate(p, n); }
API cuMemAllocAsync(CUdeviceptr* p, size_t n, void*) { return allocate(p, n); }    // while capturing: memory that the graph keeps
API cuMemAllocFromPoolAsync(CUdeviceptr* p, size_t n, void*, void*) { return allocate(p, n); }
API cuMemFree_v2(CUdeviceptr p) { return !p || emu::device_free((void*)p) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
API cuMemFreeAsync(CUdeviceptr p, void* s) {
    if (Stream* st = stream(s); st && st->capturing) return CUDA_SUCCESS;           // the graph still uses it
    return cuMemFree_v2(p);
}
API cuMemGetInfo_v2(size_t* free, size_t* total) { *total = device().memory; *free = *total - emu::device_used(); return CUDA_SUCCESS; }
API cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* n, CUdeviceptr p) {
    uintptr_t b; size_t bytes;
    if (!emu::device_range((void*)p, &b, &bytes)) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = b;
    if (n) *n = bytes;
    return CUDA_SUCCESS;
}
API cuPointerGetAttribute(void* data, int attribute, CUdeviceptr p) {
    uintptr_t b; size_t bytes;
    if (!emu::device_range((void*)p, &b, &bytes)) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case 2: *(unsigned*)data = 2; return CUDA_SUCCESS;                          // MEMORY_TYPE: device
        case 3: *(CUdeviceptr*)data = p; return CUDA_SUCCESS;                       // DEVICE_POINTER
        case 9: *(int*)data = 0; return CUDA_SUCCESS;                               // DEVICE_ORDINAL
        case 11: *(CUdeviceptr*)data = b; return CUDA_SUCCESS;                      // RANGE_START_ADDR
        case 12: *(size_t*)data = bytes; return CUDA_SUCCESS;                       // RANGE_SIZE
    }
    fprintf(stderr, "emulated driver: pointer attribute %d has no value here\n", attribute);
    return CUDA_ERROR_INVALID_VALUE;
}
API cuMemHostAlloc(void** p, size_t n, unsigned) { *p = nullptr; return posix_memalign(p, 4096, n ? n : 1) ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS; }
API cuMemAllocHost_v2(void** p, size_t n) { return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void* p) { free(p); return CUDA_SUCCESS; }
API cuMemHostRegister_v2(void*, size_t, unsigned) { return CUDA_SUCCESS; }
API cuMemHostUnregister(void*) { return CUDA_SUCCESS; }

static char pool;
API cuDeviceGetDefaultMemPool(void** p, CUdevice) { *p = &pool; return CUDA_SUCCESS; }
API cuDeviceGetMemPool(void** p, CUdevice) { *p = &pool; return CUDA_SUCCESS; }
API cuDeviceSetMemPool(CUdevice, void*) { return CUDA_SUCCESS; }
API cuMemPoolCreate(void** p, const void*) { *p = &pool; return CUDA_SUCCESS; }
API cuMemPoolDestroy(void*) { return CUDA_SUCCESS; }
API cuMemPoolTrimTo(void*, size_t) { return CUDA_SUCCESS; }
API cuMemPoolSetAttribute(void*, int attribute, void*) {
    if (attribute == 6 || attribute == 8) most_used = emu::device_used();           // a new RESERVED_MEM_HIGH, USED_MEM_HIGH
    return CUDA_SUCCESS;
}
API cuMemPoolGetAttribute(void*, int attribute, void* v) {
    if (attribute < 4) *(int*)v = 1;                                                // the reuse policies
    else if (attribute == 6 || attribute == 8) *(uint64_t*)v = most_used;
    else *(uint64_t*)v = attribute == 4 ? 0 : emu::device_used();                   // RELEASE_THRESHOLD; sizes
    return CUDA_SUCCESS;
}

// ---- copies and sets ---------------------------------------------------------------------------------------------------
static CUresult to_device(CUdeviceptr d, const void* s, size_t n) {
    if (CUresult e = sticky()) return e;
    if (n && !on_device(d, n)) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy((void*)d, s, n);
    emu::device_written((void*)d, n);
    return CUDA_SUCCESS;
}
static CUresult to_host(void* d, CUdeviceptr s, size_t n) {
    if (CUresult e = sticky()) return e;
    if (n && !on_device(s, n)) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(d, (const void*)s, n);
    return CUDA_SUCCESS;
}
static CUresult on_the_device(CUdeviceptr d, CUdeviceptr s, size_t n) {
    if (CUresult e = sticky()) return e;
    if (n && (!on_device(d, n) || !on_device(s, n))) return CUDA_ERROR_INVALID_VALUE;
    std::memmove((void*)d, (const void*)s, n);
    emu::device_moved((void*)d, (const void*)s, n);
    return CUDA_SUCCESS;
}
static CUresult anywhere(CUdeviceptr d, CUdeviceptr s, size_t n) {                  // unified addresses
    bool to = on_device(d, n), from = on_device(s, n);
    if (to && from) return on_the_device(d, s, n);
    if (to) return to_device(d, (const void*)s, n);
    if (from) return to_host((void*)d, s, n);
    std::memcpy((void*)d, (const void*)s, n);
    return CUDA_SUCCESS;
}
template <class T> static CUresult fill(CUdeviceptr d, T v, size_t n) {
    if (CUresult e = sticky()) return e;
    if (d % sizeof(T) || (n && !on_device(d, n * sizeof(T)))) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < n; ++i) ((T*)d)[i] = v;
    emu::device_written((void*)d, n * sizeof(T));
    return CUDA_SUCCESS;
}
#define SYNC(call) (capture_forbids() ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : (call))
API cuMemcpyHtoD_v2(CUdeviceptr d, const void* s, size_t n) { return SYNC(to_device(d, s, n)); }
API cuMemcpyDtoH_v2(void* d, CUdeviceptr s, size_t n) { return SYNC(to_host(d, s, n)); }
API cuMemcpyDtoD_v2(CUdeviceptr d, CUdeviceptr s, size_t n) { return SYNC(on_the_device(d, s, n)); }
API cuMemcpy(CUdeviceptr d, CUdeviceptr s, size_t n) { return SYNC(anywhere(d, s, n)); }
API cuMemsetD8_v2(CUdeviceptr d, unsigned char v, size_t n) { return SYNC(fill<uint8_t>(d, v, n)); }
API cuMemsetD16_v2(CUdeviceptr d, unsigned short v, size_t n) { return SYNC(fill<uint16_t>(d, v, n)); }
API cuMemsetD32_v2(CUdeviceptr d, unsigned v, size_t n) { return SYNC(fill<uint32_t>(d, v, n)); }
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void* s, size_t n, void* st) { return submit(st, [=] { return to_device(d, s, n); }); }
API cuMemcpyDtoHAsync_v2(void* d, CUdeviceptr s, size_t n, void* st) { return submit(st, [=] { return to_host(d, s, n); }); }
API cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, void* st) { return submit(st, [=] { return on_the_device(d, s, n); }); }
API cuMemcpyAsync(CUdeviceptr d, CUdeviceptr s, size_t n, void* st) { return submit(st, [=] { return anywhere(d, s, n); }); }
API cuMemcpyPeerAsync(CUdeviceptr d, void*, CUdeviceptr s, void*, size_t n, void* st) { return submit(st, [=] { return on_the_device(d, s, n); }); }
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, void* st) { return submit(st, [=] { return fill<uint8_t>(d, v, n); }); }
API cuMemsetD16Async(CUdeviceptr d, unsigned short v, size_t n, void* st) { return submit(st, [=] { return fill<uint16_t>(d, v, n); }); }
API cuMemsetD32Async(CUdeviceptr d, unsigned v, size_t n, void* st) { return submit(st, [=] { return fill<uint32_t>(d, v, n); }); }

// ---- tensor maps -------------------------------------------------------------------------------------------------------
API cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* p, const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* element_strides, int interleave, int swizzle, int l2, int oob) {
    if (device().major < 9) return CUDA_ERROR_NOT_SUPPORTED;
    return emu::tensor_map_encode_tiled(map, type, rank, p, dims, strides, box, element_strides, interleave, swizzle, l2, oob);
}
