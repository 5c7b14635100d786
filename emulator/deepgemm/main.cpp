// main PTX: runs DeepGEMM's kernels through the driver API and compares with f64. Sizes are no multiples of a tile.
#include <cuda.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cases.h"

enum Major { K, MN };
enum Shared { B, A };
enum Type { bf16 = 2, f32 = 4 };                     // bytes
struct Form {
    Major major_a, major_b;
    int m, n, swizzle_a, swizzle_b, swizzle_d, stages, cluster;
    Shared shared;
    bool add;
    Type type;
    const char* text;
};
#define FORM(...) Form{__VA_ARGS__, #__VA_ARGS__},
static const Form kForms[] = {DEEPGEMM_FORMS(FORM)};
constexpr int kTileK = 64, kThreads = 384, kMultiprocessors = 4;

#define CHECK(call)                                                              \
    do {                                                                         \
        if (CUresult e_ = (call)) { printf("%s: error %d\n", #call, int(e_)); exit(1); } \
    } while (0)

static uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Of a matrix of rows whose elements are neighbours, in boxes that are no wider than the swizzle.
static CUtensorMap map(Type type, CUdeviceptr at, int columns, int rows, int box_columns, int box_rows, int swizzle) {
    const CUtensorMapSwizzle mode = swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : swizzle == 32  ? CU_TENSOR_MAP_SWIZZLE_32B  : CU_TENSOR_MAP_SWIZZLE_NONE;
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride = cuuint64_t(columns) * type;
    const cuuint32_t box[2] = {cuuint32_t(swizzle ? swizzle / type : box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
    CUtensorMap out;
    CHECK(cuTensorMapEncodeTiled(&out, type == f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void*)at, sizes, &stride, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return out;
}
template <class T> static CUdeviceptr upload(const std::vector<T>& host) {
    CUdeviceptr at;
    CHECK(cuMemAlloc(&at, host.size() * sizeof(T)));
    CHECK(cuMemcpyHtoD(at, host.data(), host.size() * sizeof(T)));
    return at;
}
// rows x k values, and as they lie in memory
struct Operand {
    std::vector<float> value;
    std::vector<uint16_t> memory;
    Operand(Major major, int rows, int k, std::mt19937& random) : value(size_t(rows) * k), memory(value.size()) {
        std::uniform_real_distribution<float> uniform(-1, 1);
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < k; ++j) {
                const uint16_t x = rounded(uniform(random));
                value[size_t(i) * k + j] = widened(x);
                memory[major == K ? size_t(i) * k + j : size_t(j) * rows + i] = x;
            }
    }
};

// By the template's arguments in its mangled name.
static std::string entry(const std::string& ptx, const Form& f) {
    auto number = [](int x) { return "Lj" + std::to_string(x) + "E"; };
    const std::string majors = "5MajorE" + std::to_string(f.major_a) + "ELS3_" + std::to_string(f.major_b) + "E";
    std::string numbers = number(1);
    for (int x : {f.m, f.n, kTileK, f.swizzle_a, f.swizzle_b, f.swizzle_d, f.stages, 128, 256, f.cluster}) numbers += number(x);
    numbers += "Lb" + std::to_string(f.shared) + "E" + number(kMultiprocessors);
    const std::string last = "Lb" + std::to_string(f.add) + (f.type == f32 ? "EfE" : "EN");
    for (size_t at = 0; (at = ptx.find(".entry ", at)) != std::string::npos;) {
        at += strlen(".entry ");
        const std::string name = ptx.substr(at, ptx.find_first_of("( \n", at) - at);
        if (name.find(majors) != std::string::npos && name.find(numbers) != std::string::npos && name.find(last) != std::string::npos) return name;
    }
    printf("%s: no such kernel\n", f.text);
    exit(1);
}

static bool run(const std::string& ptx, CUmodule module, const Form& f, unsigned seed) {
    std::mt19937 random(seed);
    int m = (f.cluster == 2 && f.shared == B ? 4 : 3) * f.m - 40, n = 2 * f.n + 8, k = 5 * kTileK - 16;
    const Operand a(f.major_a, m, k, random), b(f.major_b, n, k, random);
    std::vector<float> before(size_t(m) * n, NAN);
    if (f.add) for (float& x : before) x = float(random()) / 4294967296.f;
    std::vector<char> d(before.size() * f.type);
    for (size_t i = 0; i < before.size(); ++i) {
        const uint16_t half = rounded(before[i]);
        memcpy(&d[i * f.type], f.type == f32 ? (const void*)&before[i] : &half, f.type);
    }
    const CUdeviceptr at_a = upload(a.memory), at_b = upload(b.memory), at_d = upload(d);
    CUtensorMap map_a = f.major_a == K ? map(bf16, at_a, k, m, kTileK, f.m, f.swizzle_a) : map(bf16, at_a, m, k, f.m, kTileK, f.swizzle_a);
    CUtensorMap map_b = f.major_b == K ? map(bf16, at_b, k, n, kTileK, f.n, f.swizzle_b) : map(bf16, at_b, n, k, f.n, kTileK, f.swizzle_b);
    CUtensorMap map_d = map(f.type, at_d, n, m, f.n, f.m, f.swizzle_d);

    CUfunction function;
    CHECK(cuModuleGetFunction(&function, module, entry(ptx, f).c_str()));
    const unsigned tile = unsigned(f.m * f.n * f.type + 1023) / 1024 * 1024, shared = tile + unsigned(f.stages * ((f.m + f.n) * kTileK * 2 + 16));
    CHECK(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int(shared)));
    void *groups = nullptr, *arguments[] = {&groups, &m, &n, &k, &map_a, &map_b, &map_d};
    CUlaunchAttribute cluster{};
    cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim = {unsigned(f.cluster), 1, 1};
    CUlaunchConfig config{};
    config.gridDimX = kMultiprocessors, config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = kThreads, config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = shared, config.attrs = &cluster, config.numAttrs = 1;
    CHECK(cuLaunchKernelEx(&config, function, arguments, nullptr));
    CHECK(cuCtxSynchronize());
    CHECK(cuMemcpyDtoH(d.data(), at_d, d.size()));
    for (CUdeviceptr at : {at_a, at_b, at_d}) CHECK(cuMemFree(at));

    size_t wrong = 0;
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
            const size_t at = size_t(i) * n + j;
            double sum = f.add ? before[at] : 0;
            for (int x = 0; x < k; ++x) sum += double(a.value[size_t(i) * k + x]) * b.value[size_t(j) * k + x];
            float got;
            uint16_t half;
            if (f.type == f32) memcpy(&got, &d[at * 4], 4);
            else memcpy(&half, &d[at * 2], 2), got = widened(half);
            wrong += !(std::fabs(got - sum) <= 1e-4 + (f.type == f32 ? 0 : std::fabs(sum) / 256));
        }
    printf("%s: %s, %zu of %zu elements wrong\n", f.text, wrong ? "FAILED" : "ok", wrong, before.size());
    return wrong == 0;
}

int main(int, char** arguments) {
    std::stringstream text;
    text << std::ifstream(arguments[1]).rdbuf();
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, text.str().c_str()));
    bool good = true;
    unsigned seed = 0;
    for (const Form& form : kForms) good &= run(text.str(), module, form, ++seed);
    return !good;
}
