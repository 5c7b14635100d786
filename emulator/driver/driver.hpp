// The driver API's types as far as they are used here, and the state behind its handles.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../include/host.hpp"

#define API extern "C" __attribute__((visibility("default"))) CUresult

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = uint64_t;
enum : int {
    CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_DEVICE = 101, CUDA_ERROR_INVALID_IMAGE = 200, CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209, CUDA_ERROR_UNSUPPORTED_LIMIT = 215, CUDA_ERROR_FILE_NOT_FOUND = 301,
    CUDA_ERROR_INVALID_HANDLE = 400, CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701, CUDA_ERROR_LAUNCH_FAILED = 719, CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    CUDA_ERROR_NOT_SUPPORTED = 801, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903, CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905, CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904, CUDA_ERROR_CAPTURED_EVENT = 907, CUDA_ERROR_INVALID_CLUSTER_SIZE = 912,
};

namespace drv {

struct Device {
    const char* option;                       // EMU_DEVICE
    const char* name;
    int major, minor, sms;                    // SMs of the real device; fewer are emulated
    int smem_per_sm, smem_per_block;          // bytes; per block: with the opt-in attribute
    int threads_per_sm, blocks_per_sm;
    size_t memory;
    int l2, clock_khz, memory_clock_khz, bus_bits;
};
const Device& device();
int device_sms();
int attribute(int id, int* value);            // false: unknown

// What emu_configure and the environment say.
struct Settings { std::string device; int sms = 0; emu::Options options; };
Settings settings();

// Reports and the sticky error that they leave in the context, as a real launch failure does.
CUresult sticky();
void failed(const std::string& kernel, const std::string& report);
CUresult unimplemented(const char* name);     // says so on stderr
void add_counters(const std::string& kernel, const emu::Counters&);

// A recorded operation of a graph. Host order is a topological order, so a graph is a list.
struct Graph { std::vector<std::function<CUresult()>> ops; bool invalid = false; };
struct Stream { Graph* capturing = nullptr; bool origin = false; int mode = 0; int priority = 0; unsigned flags = 0; };
Stream* stream(void* handle);                 // null, 1 (legacy), 2 (per thread) included
// Runs op now, or records it if the stream is being captured.
CUresult submit(void* stream, std::function<CUresult()> op);
bool capture_forbids();                       // does a capture of this thread forbid calls that may synchronise?

struct Module { std::string origin; std::vector<std::string> names; };   // names: where the image lists them
struct Function { std::string name; emu::Entry entry; int max_dynamic = 48 * 1024; int carveout = -1; bool wide_clusters = false; };
int registers(const Function&);
int blocks_per_sm(const Function&, int threads, size_t dynamic_smem);

inline bool on_device(CUdeviceptr p, size_t n) { return emu::device_owns((const void*)p, n); }

}  // namespace drv
