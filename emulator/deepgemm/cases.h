// Forms of the kernel, on 4 multiprocessors, with 3 warpgroups:
//   what runs along the rows of A and of B in memory: K (as in E·Cᵀ) or MN (both of Gᵀ·E); the tile; bytes of the swizzles, of D 0 for none;
//   stages; blocks of a cluster, and the operand that they share; whether D is added to; its type
#pragma once

#define DEEPGEMM_FORMS(FORM)                                         \
    FORM(K, K, 128, 128, 128, 128, 128, 4, 1, B, false, bf16)        \
    FORM(K, K, 128, 128, 128, 128, 128, 4, 2, B, false, bf16)        \
    FORM(K, K, 128, 128, 128, 128, 128, 4, 2, A, false, bf16)        \
    FORM(K, K, 256, 128, 128, 128, 128, 2, 1, B, false, bf16)        \
    FORM(K, MN, 128, 256, 128, 128, 128, 3, 1, B, false, bf16)       \
    FORM(K, MN, 128, 128, 128, 128, 128, 4, 2, A, false, bf16)       \
    FORM(K, MN, 128, 48, 128, 32, 32, 4, 1, B, false, bf16)          \
    FORM(MN, K, 128, 96, 128, 128, 0, 4, 2, B, false, f32)           \
    FORM(MN, K, 128, 256, 128, 128, 128, 3, 2, B, false, bf16)       \
    FORM(MN, MN, 128, 128, 128, 128, 0, 4, 1, B, true, f32)          \
    FORM(MN, MN, 128, 160, 128, 64, 64, 3, 1, B, false, bf16)        \
    FORM(MN, MN, 128, 256, 128, 128, 128, 3, 2, A, false, bf16)
