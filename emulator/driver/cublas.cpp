// As much of cuBLAS as the benchmark's baseline calls: plain loops over column-major matrices, for checking which operand is
// transposed and how, not for speed. The emulated device's memory is the host's, and its streams run work when it is submitted.
#include <cstdint>
#include <cstring>
#include <vector>

#include "../include/binary16.hpp"

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum : int { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum : int { F32 = 0, F16 = 2, BF16 = 14 };                                         // cudaDataType

float load(const void* p, int type, size_t i) {
    if (type == F32) return ((const float*)p)[i];
    const uint16_t bits = ((const uint16_t*)p)[i];
    if (type == F16) { emu::Binary16 x; std::memcpy(&x, &bits, 2); return float(x); }
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}
void store(void* p, int type, size_t i, float x) {
    if (type == F32) { ((float*)p)[i] = x; return; }
    if (type == F16) { const emu::Binary16 h = emu::Binary16(x); std::memcpy((uint16_t*)p + i, &h, 2); return; }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x == x) bits += 0x7fff + (bits >> 16 & 1);
    ((uint16_t*)p)[i] = uint16_t(bits >> 16);
}
bool known(int type) { return type == F32 || type == F16 || type == BF16; }

}  // namespace

API cublasCreate_v2(void** handle) { *handle = new char; return SUCCESS; }
API cublasDestroy_v2(void* handle) { delete (char*)handle; return SUCCESS; }
API cublasSetStream_v2(void*, void*) { return SUCCESS; }
API cublasGetVersion_v2(void*, int* version) { *version = 0; return SUCCESS; }

API cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda, const void* b,
                 int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int, int) {
    if (!handle || m < 0 || n < 0 || k < 0 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return INVALID_VALUE;
    if (!known(a_type) || !known(b_type) || !known(c_type) || ta > 1 || tb > 1) return NOT_SUPPORTED;
    const float scale = *(const float*)alpha, keep = *(const float*)beta;
    std::vector<float> column(k);
    for (int j = 0; j < n; ++j) {
        for (int l = 0; l < k; ++l) column[l] = load(b, b_type, tb ? j + size_t(l) * ldb : l + size_t(j) * ldb);
        for (int i = 0; i < m; ++i) {
            float sum = 0;
            for (int l = 0; l < k; ++l) sum += load(a, a_type, ta ? l + size_t(i) * lda : i + size_t(l) * lda) * column[l];
            const size_t at = i + size_t(j) * ldc;
            store(c, c_type, at, scale * sum + (keep ? keep * load(c, c_type, at) : 0.0f));
        }
    }
    return SUCCESS;
}
