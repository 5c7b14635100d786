// Conversions, approximations of the special function unit, and the compiler's own accurate functions.
#pragma once
#include "types.cuh"

namespace prim {

// x, of which the compiler knows nothing any more: what depends on it is computed where it stands.
PRIM u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}
PRIM u32 f32_bits(float x) { return __float_as_uint(x); }
PRIM float bits_f32(u32 x) { return __uint_as_float(x); }

PRIM float to_f32(float x) { return x; }
PRIM float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
PRIM float to_f32(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}

// Round to nearest even; NaN stays NaN.
template <class T> PRIM T from_f32(float x);
template <> PRIM float from_f32<float>(float x) { return x; }
template <> PRIM bf16 from_f32<bf16>(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
template <> PRIM f16 from_f32<f16>(float x) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
template <class T> PRIM u32 pack2(float lo, float hi);          // lo in bits 0-15
template <> PRIM u32 pack2<bf16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <> PRIM u32 pack2<f16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <class T> PRIM float unpack_lo(u32 x) { return to_f32(T{u16(x & 0xffffu)}); }
template <class T> PRIM float unpack_hi(u32 x) { return to_f32(T{u16(x >> 16)}); }
PRIM u32 to_tf32(float x) {
    u32 r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

PRIM float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
PRIM float lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
PRIM float rcp(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
PRIM float tanh_approx(float x) {                               // 2^-11 relative: not for results, for bounds
    float r;
    asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
PRIM float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PRIM double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
// Each its own rounding: the compiler may not contract them into a fused multiply-add.
PRIM float mul_rn(float a, float b) { return __fmul_rn(a, b); }
PRIM float add_rn(float a, float b) { return __fadd_rn(a, b); }
PRIM float sub_rn(float a, float b) { return __fsub_rn(a, b); }
PRIM float div_rn(float a, float b) { return __fdiv_rn(a, b); }
PRIM float fmax(float a, float b) { return ::fmaxf(a, b); }     // a NaN loses against a number
PRIM float fmin(float a, float b) { return ::fminf(a, b); }
PRIM float fabs(float x) { return ::fabsf(x); }

PRIM float expf_accurate(float x) { return ::expf(x); }
PRIM float tanhf(float x) { return ::tanhf(x); }
PRIM float logf(float x) { return ::logf(x); }
PRIM float log1pf(float x) { return ::log1pf(x); }
PRIM float expm1f(float x) { return ::expm1f(x); }
PRIM float sqrtf(float x) { return ::sqrtf(x); }
PRIM double exp(double x) { return ::exp(x); }
PRIM double log(double x) { return ::log(x); }

PRIM i32 popc(u32 x) { return __popc(x); }
PRIM i32 ffs(u32 x) { return __ffs(int(x)); }                   // 1 + index of the lowest set bit, 0 if there is none
PRIM i32 clz(u32 x) { return __clz(int(x)); }
PRIM u32 brev(u32 x) { return __brev(x); }
PRIM u32 mul_hi(u32 a, u32 b) { return __umulhi(a, b); }
PRIM u64 mul_hi(u64 a, u64 b) { return __umul64hi(a, b); }

}  // namespace prim
