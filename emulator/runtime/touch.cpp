// Plain loads and stores. Kernels compiled with -fsanitize=thread,undefined call these on every one; no sanitizer library
// is linked, the callbacks feed the emulator's own checker.
#include "state.hpp"

namespace emu {

void touch(const void* p, size_t n, bool write, bool atomic, const void* pc) {
    Block* w = me;
    if (!w || !w->worker->current || !w->launch->opt.check) return;
    Fiber* f = w->worker->current;
    uintptr_t a = (uintptr_t)p;
    if (a - (uintptr_t)f->stack < kStack) return;
    bool shared = a - (uintptr_t)w->smem < kSmemBase + kSmemMax + kPage;
    const bool global = in_heap(p);
    if (!shared && !global && w->worker->size > 1)
        if (Block* owner = block_of(p)) { w = owner; shared = true; }
    if ((n == 2 || n == 4 || n == 8 || n == 16) && a % n && (shared || global)) {
        report("misaligned", pc, "%s of %zu bytes at an address that is %zu modulo %zu", write ? "write" : "read", n, size_t(a % n), n);
        abandon();
    }
    if (shared) {
        uintptr_t off = a - (uintptr_t)w->smem;
        if (off < kSmemBase || off + n > kSmemBase + w->launch->smem) {
            report("shared out of bounds", pc, "%s of %zu bytes at offset %ld of %zu", write ? "write" : "read", n, (long)off - (long)kSmemBase, w->launch->smem);
            abandon();
        }
        uint32_t addr = uint32_t(off);
        In in(w);
        if (w != f->home) reach(w, f->who, now(f), f, pc);
        if (w->launch->opt.banks && w == f->home) w->banks.note(pc, f->warp, f->lane, addr, int(n));
        if (write) check_write(addr, n, f->who, now(f), f->clock, false, atomic, 0, pc, pc);
        else check_read(addr, n, f->who, now(f), f->clock, false, atomic, pc, pc);
        return;
    }
    if (global) {
        check_global(a, n, write, atomic, f->who, now(f), f->clock, pc);
        if (!owned(a, n)) abandon();
        return;
    }
    if (!write) return;                                                          // constants, by-value kernel parameters
    report("host memory", pc, "write of %zu bytes at %p", n, p);
    abandon();
}

// aggregates: by words, since their own alignment may be no more than that
static void range(void* p, size_t n, bool write, const void* pc) {
    for (char* c = static_cast<char*>(p); n;) {
        size_t k = n >= 4 && reinterpret_cast<uintptr_t>(c) % 4 == 0 ? 4 : n >= 2 && reinterpret_cast<uintptr_t>(c) % 2 == 0 ? 2 : 1;
        touch(c, k, write, false, pc);
        c += k;
        n -= k;
    }
}

}  // namespace emu

#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() { emu::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(n)                                                                               \
    void __tsan_read##n(void* p) { emu::touch(p, n, false, false, PC); }                        \
    void __tsan_write##n(void* p) { emu::touch(p, n, true, false, PC); }                        \
    void __tsan_volatile_read##n(void* p) { emu::touch(p, n, false, false, PC); }               \
    void __tsan_volatile_write##n(void* p) { emu::touch(p, n, true, false, PC); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
#define UNALIGNED(n)                                                                            \
    void __tsan_unaligned_read##n(void* p) { emu::range(p, n, false, PC); }                     \
    void __tsan_unaligned_write##n(void* p) { emu::range(p, n, true, PC); }
UNALIGNED(2) UNALIGNED(4) UNALIGNED(8) UNALIGNED(16)
void __tsan_read_range(void* p, size_t n) { emu::range(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { emu::range(p, n, true, PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// -fsanitize=undefined: every handler's data starts with the source location
struct UbLocation { const char* file; uint32_t line, column; };
#define UB(name, what)                                                                                              \
    void __ubsan_handle_##name(UbLocation* at, void*, void*) { emu::undefined(what, at->file, int(at->line)); }     \
    void __ubsan_handle_##name##_abort(UbLocation* at, void*, void*) { emu::undefined(what, at->file, int(at->line)); }
UB(type_mismatch_v1, "misaligned or null pointer")
UB(pointer_overflow, "pointer overflow")
UB(out_of_bounds, "array index out of bounds")
UB(shift_out_of_bounds, "shift out of bounds")
UB(add_overflow, "signed overflow")
UB(sub_overflow, "signed overflow")
UB(mul_overflow, "signed overflow")
UB(negate_overflow, "signed overflow")
UB(divrem_overflow, "division overflow")
UB(float_cast_overflow, "float to integer overflow")
UB(load_invalid_value, "invalid bool or enum value")
UB(vla_bound_not_positive, "array bound")
UB(nonnull_arg, "null argument")
UB(nonnull_return_v1, "null returned")
UB(alignment_assumption, "alignment assumption")
UB(invalid_builtin, "builtin of zero")
UB(builtin_unreachable, "unreachable code")
UB(missing_return, "missing return")
}
