// sm_90a: products of a warpgroup (128 threads), asynchronous. d += a b for a 64 x 16 slice of A and N columns of B; A from
// shared memory by descriptor, or from registers (fragments as of mma_m16n8k16, warp w has rows 16w to 16w+15).
// Thread t of the warpgroup holds row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2 in d[i].
#pragma once
#include "memory.cuh"

namespace prim {

// Before the first product after registers were touched.
PRIM void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PRIM void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Takes the accumulators so that no use of them can be scheduled above the wait.
template <int Pending, int R> PRIM void wgmma_wait(float (&d)[R]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define PRIM_ACC8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PRIM_ACC32(i) PRIM_ACC8(i), PRIM_ACC8(i + 8), PRIM_ACC8(i + 16), PRIM_ACC8(i + 24)
#define PRIM_REGS64 \
    "{" \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" \
    "}"
#define PRIM_REGS96 \
    "{" \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73," \
    "%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
    "}"
#define PRIM_REGS128 \
    "{" \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
    "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73," \
    "%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97," \
    "%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
    "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127" \
    "}"
#define PRIM_ACC64 PRIM_ACC32(0), PRIM_ACC32(32)
#define PRIM_ACC96 PRIM_ACC32(0), PRIM_ACC32(32), PRIM_ACC32(64)
#define PRIM_ACC128 PRIM_ACC32(0), PRIM_ACC32(32), PRIM_ACC32(64), PRIM_ACC32(96)

template <class T, int N> struct Wgmma;          // N = 128, 192, 256
// The numbers are those of the operands that follow the accumulators: R, R + 1, ...
#define PRIM_WGMMA(T, N, R, o0, o1, o2, o3, o4, o5, o6)                                                                          \
    template <> struct Wgmma<T, N> {                                                                                         \
        template <Major A, Major B> static PRIM void ss(float (&d)[R], u64 a, u64 b, bool accumulate) {                      \
            asm volatile("{\n\t.reg .pred acc;\n\tsetp.ne.b32 acc, %" #o2 ", 0;\n\t"                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " " PRIM_REGS##R                        \
                         ", %" #o0 ", %" #o1 ", acc, 1, 1, %" #o3 ", %" #o4 ";\n\t}"                                         \
                         : PRIM_ACC##R : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A)), "n"(int(B)));                    \
        }                                                                                                                    \
        template <Major B> static PRIM void rs(float (&d)[R], const u32 (&a)[4], u64 b, bool accumulate) {                   \
            asm volatile("{\n\t.reg .pred acc;\n\tsetp.ne.b32 acc, %" #o5 ", 0;\n\t"                                        \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #T "." #T " " PRIM_REGS##R                        \
                         ", {%" #o0 ",%" #o1 ",%" #o2 ",%" #o3 "}, %" #o4 ", acc, 1, 1, %" #o6 ";\n\t}"                      \
                         : PRIM_ACC##R : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(B))); \
        }                                                                                                                    \
    };
PRIM_WGMMA(bf16, 128, 64, 64, 65, 66, 67, 68, 69, 70)
PRIM_WGMMA(bf16, 192, 96, 96, 97, 98, 99, 100, 101, 102)
PRIM_WGMMA(bf16, 256, 128, 128, 129, 130, 131, 132, 133, 134)
PRIM_WGMMA(f16, 128, 64, 64, 65, 66, 67, 68, 69, 70)
PRIM_WGMMA(f16, 192, 96, 96, 97, 98, 99, 100, 101, 102)
PRIM_WGMMA(f16, 256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef PRIM_WGMMA
#undef PRIM_ACC8
#undef PRIM_ACC32
#undef PRIM_ACC64
#undef PRIM_REGS64
#undef PRIM_ACC96
#undef PRIM_REGS96
#undef PRIM_ACC128
#undef PRIM_REGS128

template <class T, int N, Major A, Major B> PRIM void wgmma_m64k16(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    Wgmma<T, N>::template ss<A, B>(d, a, b, accumulate);
}
template <class T, int N, Major B> PRIM void wgmma_m64k16(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool accumulate) {
    Wgmma<T, N>::template rs<B>(d, a, b, accumulate);
}

}  // namespace prim
