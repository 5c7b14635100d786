// DeepGEMM's kernel for bf16 on Hopper, in the forms of cases.h.
#include <deep_gemm/impls/sm90_bf16_gemm.cuh>

#include "cases.h"

namespace deep_gemm {
using bf16 = cutlass::bfloat16_t;
using f32 = float;
constexpr bool B = false, A = true;                  // which operand of a cluster is multicast
#define FORM(major_a, major_b, m, n, swizzle_a, swizzle_b, swizzle_d, stages, cluster, shared, add, type)                                      \
    template __global__ void sm90_bf16_gemm_impl<cute::UMMA::Major::major_a, cute::UMMA::Major::major_b, 0, 0, 0, 1, m, n, 64, swizzle_a,     \
                                                 swizzle_b, swizzle_d, stages, 128, 256, cluster, shared, 4, GemmType::Normal, add, type>(    \
        int*, uint32_t, uint32_t, uint32_t, const __grid_constant__ cute::TmaDescriptor, const __grid_constant__ cute::TmaDescriptor,         \
        const __grid_constant__ cute::TmaDescriptor);
DEEPGEMM_FORMS(FORM)
}  // namespace deep_gemm
