// cp.async: destinations are poisoned at the issue and arrive at this thread's wait (at once in eager mode).
#include "state.hpp"

namespace emu {

static void arrive(const CopyOp& op) {
    char* d = smem_ptr(op.dst);
    std::memcpy(d, op.src, op.bytes);
    std::memset(d + op.bytes, 0, 16 - op.bytes);
}
void cp_async_16(void* smem, const void* gmem, uint32_t bytes, Site at) {
    Fiber* f = self();
    if (!in_smem(smem, 16, "cp.async", at)) abandon();
    if ((uintptr_t)smem % 16 || (uintptr_t)gmem % 16) { report("misaligned", at, "cp.async needs 16-byte alignment"); abandon(); }
    if (bytes > 16) { report("cp.async", at, "%u source bytes of at most 16", bytes); abandon(); }
    CopyOp op{smem_addr(smem), gmem, bytes, at};
    if (bytes) {
        if (checking()) me->counters.copy_read += bytes;
        if (checking()) check_global((uintptr_t)gmem, bytes, false, false, f->who, now(f), f->clock, at);
        if (!owned((uintptr_t)gmem, bytes)) abandon();
    }
    if (checking()) check_write(op.dst, 16, f->who, now(f), f->clock, false, false, uint16_t(f->who + 1), nullptr, at);
    std::memset(smem, 0xff, 16);
    if (me->launch->opt.async == Async::Eager) arrive(op);
    f->copies.push_back(op);
}
void cp_async_commit() {
    Fiber* f = self();
    f->copy_groups.push_back(std::move(f->copies));
    f->copies.clear();
}
void cp_async_wait(int pending) {
    Fiber* f = self();
    while ((int)f->copy_groups.size() > pending) {
        for (auto& op : f->copy_groups.front()) {
            if (me->launch->opt.async != Async::Eager) arrive(op);
            if (checking()) land(op.dst, 16, f->who, now(f), false);
        }
        f->copy_groups.pop_front();
    }
}

}  // namespace emu
