// One fiber per CUDA thread; it runs until the hardware could make it wait.
#include <sys/mman.h>

#include "state.hpp"

extern "C" void emu_switch(void** save_sp, void* load_sp);     // switch.S

thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

thread_local Block* me = nullptr;

void to_fiber(Fiber* f) {
    Worker* w = f->home->worker;
    me = f->home;
    w->current = f;
    blockIdx = me->cta.block;
    threadIdx = f->tid;
    emu_switch(&w->sched_sp, f->sp);
    w->current = nullptr;
}
static void to_scheduler() { emu_switch(&me->worker->current->sp, me->worker->sched_sp); }
void block(const char* what, Site at) {
    Fiber* f = self();
    f->blocked = true;
    f->what = what;
    f->at = at;
    me->worker->polls = 0;
    to_scheduler();
}
void yield_polling(const char* what, Site at) {
    Fiber* f = self();
    f->what = what;
    f->at = at;
    ++me->worker->polls;
    me->worker->ready.push_back(f);
    to_scheduler();
}
void abandon() {
    me->worker->abandoned = true;
    self()->blocked = true;
    to_scheduler();
    __builtin_unreachable();
}

extern "C" void emu_fiber_main() {
    me->launch->entry->run(me->launch->params);
    finish_thread();
    self()->done = true;
    me->worker->polls = 0;
    to_scheduler();
    __builtin_unreachable();
}

void prepare(Fiber* f) {
    if (!f->stack) {
        char* p = (char*)mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(p, kPage, PROT_NONE);
        f->stack = p + kPage;
    }
    uintptr_t top = (uintptr_t)(f->stack + kStack) & ~uintptr_t(15);
#if defined(__x86_64__)
    void** sp = (void**)(top - 64);
    std::memset(sp, 0, 64);
    sp[6] = (void*)&emu_fiber_main;      // return address; rsp is then 8 mod 16, as at a call
#else
    void** sp = (void**)(top - 176);
    std::memset(sp, 0, 176);
    sp[11] = (void*)&emu_fiber_main;     // x30
#endif
    f->sp = sp;
    f->done = f->blocked = false;
    f->copies.clear();
    f->copy_groups.clear();
    f->bulk.clear();
    f->bulk_groups.clear();
    f->storer = -1;
    f->cluster_arrived = false;
    f->known_blocks = 0;
    f->bars_fenced = Clock{};
    f->polled = nullptr;
    f->polls = 0;
}

void finish_thread() {
    Fiber* f = self();
    if (!f->copies.empty()) report("unwaited cp.async at exit", f->copies[0].at, "thread exits with an uncommitted cp.async");
    else
        for (auto& g : f->copy_groups)
            if (!g.empty()) { report("unwaited cp.async at exit", g[0].at, "thread exits with cp.async groups in flight"); break; }
    for (auto& g : f->bulk_groups)
        if (!g.empty()) { report("unwaited bulk store at exit", g[0]->at, "shared memory may vanish before the copy has read it"); break; }
    if (!f->bulk.empty()) report("uncommitted bulk store at exit", f->bulk[0]->at, "no bulk_commit before the thread exits");
}

}  // namespace emu
