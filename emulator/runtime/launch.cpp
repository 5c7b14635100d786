// A launch: blocks over OS threads, the scheduler of a block's fibers, what deadlock looks like.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "state.hpp"

namespace emu {

EMU_SIMD void vmax(uint32_t* __restrict a, const uint32_t* __restrict b, size_t n) { for (size_t i = 0; i < n; ++i) a[i] = a[i] > b[i] ? a[i] : b[i]; }
EMU_SIMD bool is_below(const uint32_t* a, const uint32_t* b, size_t n) {
    uint32_t above = 0;
    for (size_t i = 0; i < n; ++i) above |= a[i] > b[i];
    return !above;
}
EMU_SIMD void vmin(uint32_t* __restrict a, const uint32_t* __restrict b, size_t n) { for (size_t i = 0; i < n; ++i) a[i] = a[i] < b[i] ? a[i] : b[i]; }

void Counters::add(const Counters& o) {
    blocks += o.blocks; global_read += o.global_read; global_write += o.global_write; shared_read += o.shared_read;
    shared_write += o.shared_write; mma += o.mma; wgmma += o.wgmma; atomics += o.atomics;
    copy_read += o.copy_read; bulk_read += o.bulk_read; bulk_write += o.bulk_write;
    shared_phases += o.shared_phases; shared_wavefronts += o.shared_wavefronts;
}

namespace {
double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void report_deadlock(const char* kind) {
    std::string s;
    int exited = 0;
    for (int r = 0; r < me->worker->size; ++r) {
        const Block& block = *me->worker->blocks[r];
        const Cta& c = block.cta;
        std::map<std::string, int> at;
        for (int i = 0; i < c.threads; ++i) {
            const Fiber* f = block.pool[i].get();
            if (!f->done) ++at[std::string(f->what) + " at " + where(f->at)];
        }
        exited += c.threads - c.alive;
        std::string indent = "\n    ";
        if (me->worker->size > 1) {
            s += "\n    block (" + std::to_string(c.block.x) + "," + std::to_string(c.block.y) + "," + std::to_string(c.block.z) + ")" + (c.alive ? ":" : ": exited");
            indent = "\n      ";
        }
        for (auto& [k, v] : at) s += indent + std::to_string(v) + " threads in " + k;
        for (auto& bar : c.mbars)
            if (!bar.waiting.empty())
                s += indent + "mbarrier at smem+" + std::to_string(bar.addr - kSmemBase) + ": phase " + std::to_string(bar.phase) + ", " + std::to_string(bar.pending) +
                     " of " + std::to_string(bar.count) + " arrivals and " + std::to_string(bar.tx) + " bytes missing" +
                     (bar.tx < 0 ? " (more bytes came than were expected)" : "");
        for (auto& claim : c.claims)
            s += indent + "warpgroup " + std::to_string(claim.group) + " needs " + std::to_string(claim.regs * 128) + " registers more, " + std::to_string(c.pool) + " are free";
    }
    if (int n = me->worker->barrier.arrived) s += "\n    cluster barrier: " + std::to_string(n) + " of " + std::to_string(me->worker->alive) + " threads have arrived";
    report(kind, "the end", "%d threads can never run again (%d exited):%s", me->worker->alive, exited, s.c_str());
}
}  // namespace

void Block::start(int rank) {
    const Launch& L = *launch;
    const int n = L.block.x * L.block.y * L.block.z, warps = (n + 31) / 32;
    const unsigned c = worker->cluster, r = unsigned(rank);
    cta = Cta{};
    cta.block = {c % L.clusters.x * L.cluster.x + r % L.cluster.x, c / L.clusters.x % L.clusters.y * L.cluster.y + r / L.cluster.x % L.cluster.y,
                 c / (L.clusters.x * L.clusters.y) * L.cluster.z + r / (L.cluster.x * L.cluster.y)};
    cta.index = cta.block.x + L.grid.x * (cta.block.y + L.grid.y * cta.block.z);
    cta.rank = rank;
    cta.base = rank * L.logical;
    cta.threads = cta.alive = n;
    cta.clocks = L.logical * L.cluster_size;
    cta.warp_rv.resize(warps);
    cta.wgs.resize(n / 128);
    for (int g = 0; g < n / 128; ++g) { cta.wgs[g].who = cta.base + n + g; cta.wgs[g].entry.reset(cta.clocks); cta.wgs[g].regs = L.registers; }
    messages.clear();
    ++counters.blocks;
    std::memset(smem, 0xff, std::min(kSmemBase + L.smem + 1024, kSmemBase + kSmemMax));
    if (L.opt.check) {
        size_t want = L.smem / 2 + 64;
        if (cells.size() < want) cells.resize(want);
        for (size_t i = 0; i < want; ++i) {
            Cell& k = cells[i];
            k.init = k.by_async = k.atomic = false;
            k.inflight = k.w_who = 0;
            k.w_clk = 0;
            k.w_pc = nullptr;
            k.readers.clear();
        }
    }
    while ((int)pool.size() < n) pool.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < n; ++i) {
        Fiber* f = pool[i].get();
        prepare(f);
        f->home = this;
        f->id = i;
        f->who = cta.base + i;
        f->lane = i % 32;
        f->warp = i / 32;
        f->tid = {unsigned(i) % L.block.x, unsigned(i) / L.block.x % L.block.y, unsigned(i) / (L.block.x * L.block.y)};
        if (L.opt.check || int(f->clock.all.size()) != cta.clocks) f->clock.reset(cta.clocks);
        f->clock.all[f->who] = L.cluster_size > 1 ? 2 : 1;         // 1: that it runs, to the rest of the cluster
        worker->ready.push_back(f);
    }
}
void Block::finish() {
    if (!cta.loads.empty()) report("unwaited TMA load at exit", cta.loads[0]->at, "block exits with %zu loads in flight", cta.loads.size());
    for (auto& g : cta.wgs) if (!g.open.empty() || !g.groups.empty()) report("unwaited wgmma at exit", "the end", "block exits with wgmma in flight");
    for (auto& s : cta.stores) if (!s->read_done) finish_store(*s);
    if (worker->size > 1 && checking()) check_visits();
}

void Worker::run(uint64_t index) {
    Launch& L = *launch;
    blockDim = {L.block.x, L.block.y, L.block.z};
    gridDim = {L.grid.x, L.grid.y, L.grid.z};
    cluster = uint32_t(index);
    size = L.cluster_size;
    ready.clear();
    barrier = ClusterBarrier{};
    barrier.pend.reset(L.logical * size);
    barrier.done.reset(L.logical * size);
    for (int r = 0; r < size; ++r) {
        me = blocks[r].get();
        me->start(r);
    }
    me = blocks[0].get();
    if (L.opt.order == Schedule::Reverse) std::reverse(ready.begin(), ready.end());
    abandoned = false;
    alive = int(ready.size());
    polls = 0;
    uint64_t seen_progress = 0;
    double since = 0;
    while (alive && !L.stop) {
        if (ready.empty()) {
            polls = 0;
            if (engine_step(L.opt.async == Async::Random)) continue;
            report_deadlock("deadlock");
            break;
        }
        if (polls == 0) L.progress.fetch_add(1, std::memory_order_relaxed);
        if (polls > 2 * alive) {                        // nobody in this cluster does anything but poll
            if (engine_step(L.opt.async == Async::Random)) { polls = 0; continue; }
            if (L.progress.load(std::memory_order_relaxed) != seen_progress || since == 0) {
                seen_progress = L.progress.load(std::memory_order_relaxed);
                since = seconds();
            } else if (seconds() - since > L.opt.spin_seconds) {
                report_deadlock("deadlock (polling)");
                L.stop = true;
                break;
            }
            if (polls % 64 == 0) std::this_thread::yield();
        }
        if (L.opt.async == Async::Random && rng() % 8 == 0) engine_step(true);
        Fiber* f;
        if (L.opt.order == Schedule::Random) {
            size_t i = rng() % ready.size();
            f = ready[i];
            ready[i] = ready.back();
            ready.pop_back();
        } else {
            f = ready.front();
            ready.pop_front();
        }
        to_fiber(f);
        if (f->done) {
            --f->home->cta.alive;
            --alive;
            if (size > 1) cluster_left(f);
        }
        if (abandoned) { L.stop = true; break; }
    }
    for (int r = 0; r < size && !L.stop && !alive; ++r) {
        me = blocks[r].get();
        me->finish();
    }
}

// A wild access of a kernel becomes a report; anybody else's goes where it would have gone.
static struct sigaction previous;
static void segv(int sig, siginfo_t* info, void* context) {
    if (me && self()) {
#if defined(__x86_64__)
        const void* pc = (const void*)(((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1);
#else
        const void* pc = (const void*)(((ucontext_t*)context)->uc_mcontext.pc + 1);
#endif
        uintptr_t stack = (uintptr_t)self()->stack, a = (uintptr_t)info->si_addr;
        if (stack - a <= kPage) report("stack overflow", pc, "more than %zu KiB of locals", kStack / 1024);
        else report("illegal address", pc, "access at %p", info->si_addr);
        abandon();
    }
    if (previous.sa_flags & SA_SIGINFO) previous.sa_sigaction(sig, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) previous.sa_handler(sig);
    else sigaction(sig, &previous, nullptr);
}
static void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction sa{};
        sa.sa_sigaction = segv;
        sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &sa, &previous);
    });
    thread_local std::vector<char> mine;
    stack_t now{};
    sigaltstack(nullptr, &now);
    if (!(now.ss_flags & SS_DISABLE) && now.ss_size >= 64 * 1024) return;
    if (mine.empty()) {
        // never freed: the thread may fault after its destructors ran
        char* p = (char*)mmap(nullptr, 64 * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        stack_t ss{};
        ss.ss_size = 64 * 1024;
        ss.ss_sp = p;
        sigaltstack(&ss, nullptr);
        mine.resize(1);
    }
}

static std::unique_ptr<Block> new_block(Worker* w) {
    auto b = std::make_unique<Block>();
    size_t len = (kSmemBase + kSmemMax + kPage - 1) / kPage * kPage;
    char* p = (char*)mmap(nullptr, len + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(p, kPage, PROT_NONE);
    mprotect(p + kPage + len, kPage, PROT_NONE);
    b->smem = p + kPage;
    b->worker = w;
    return b;
}

static std::mutex kernels_mutex;
static std::map<std::string, Entry>& kernels() { static std::map<std::string, Entry> k; return k; }
void add_kernel(const char* name, void (*e)(void**), const size_t* sizes, size_t params, const int* bounds) {
    kernels()[name] = Entry{e, std::vector<size_t>(sizes, sizes + params), bounds[0], bounds[1]};
}
void add_cluster(const char* name, dim3 cluster) { kernels()[name].cluster = cluster; }
void add_entry(const char* name, Entry e) { std::lock_guard<std::mutex> lock(kernels_mutex); kernels()[name] = std::move(e); }
Entry find_kernel(const char* name) {
    std::lock_guard<std::mutex> lock(kernels_mutex);
    auto it = kernels().find(name);
    return it == kernels().end() ? Entry{} : it->second;
}
std::vector<std::string> kernel_names() {
    std::lock_guard<std::mutex> lock(kernels_mutex);
    std::vector<std::string> names;
    for (auto& [n, e] : kernels()) names.push_back(n);
    return names;
}

Report launch(const Options& opt, const Entry& entry, dim3 grid, dim3 block, size_t smem, void** params) {
    if (!entry) return {"[launch] no such kernel\n"};
    size_t n = size_t(block.x) * block.y * block.z;
    if (smem > kSmemMax) return {"[launch] " + std::to_string(smem) + " bytes of shared memory\n"};
    if (n == 0 || n > 1024) return {"[launch] " + std::to_string(n) + " threads per block\n"};
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return {"[launch] bad grid\n"};
    const dim3 cluster = opt.cluster.x ? opt.cluster : entry.cluster.x ? entry.cluster : dim3(1, 1, 1);
    const uint64_t cluster_size = uint64_t(cluster.x) * cluster.y * cluster.z;
    if (!cluster_size || cluster_size > 16 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) return {"[launch] bad cluster\n"};
    Launch L;
    L.grid = grid; L.block = block; L.smem = smem; L.entry = &entry; L.params = params; L.opt = opt;
    L.cluster = cluster;
    L.clusters = dim3(grid.x / cluster.x, grid.y / cluster.y, grid.z / cluster.z);
    L.cluster_size = int(cluster_size);
    L.logical = int(n) + kMaxWg + kMaxBars + 2 * kMaxStorers;
    L.registers = entry.launch_registers();
    L.id = begin_launch();
    const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster_size;
    auto work = [&](int index) {
        static std::mutex idle_mutex;
        static auto& idle = *new std::vector<std::unique_ptr<Worker>>;
        std::unique_ptr<Worker> cached;
        {
            std::lock_guard<std::mutex> lock(idle_mutex);
            if (!idle.empty()) { cached = std::move(idle.back()); idle.pop_back(); }
        }
        if (!cached) cached = std::make_unique<Worker>();
        catch_faults();
        Worker& w = *cached;
        w.launch = &L;
        while (w.blocks.size() < cluster_size) w.blocks.push_back(new_block(&w));
        for (auto& b : w.blocks) b->launch = &L;
        w.rng.state = opt.seed * 7919 + uint64_t(index);
        if (opt.cooperative) w.run(uint64_t(index));
        else for (uint64_t i; !L.stop && (i = L.next.fetch_add(1)) < clusters;) w.run(i);
        {
            std::lock_guard<std::mutex> lock(L.mutex);
            for (auto& b : w.blocks) {
                if (opt.banks) {
                    b->banks.flush();
                    for (auto& [k, v] : b->banks.by_pc) { auto& x = L.banks.by_pc[k]; x.phases += v.phases; x.wavefronts += v.wavefronts; }
                    for (auto& [k, v] : b->banks.by_site) { auto& x = L.banks.by_site[k]; x.phases += v.phases; x.wavefronts += v.wavefronts; }
                    b->banks = Banks{};
                }
                L.counters.add(b->counters);
                b->counters = Counters{};
            }
        }
        for (auto& b : w.blocks) { b->cta = Cta{}; b->launch = nullptr; }
        w.launch = nullptr;
        me = nullptr;
        std::lock_guard<std::mutex> lock(idle_mutex);
        idle.push_back(std::move(cached));
    };
    const int workers = opt.cooperative ? int(clusters) : std::max(1, opt.workers);
    if (workers <= 1) work(0);
    else {
        std::vector<std::thread> t;
        for (int i = 0; i < workers; ++i) t.emplace_back(work, i);
        for (auto& x : t) x.join();
    }
    end_launch();
    Report r{L.text};
    r.counters = L.counters;
    std::map<std::string, Banks::Line> lines;
    for (auto& [k, v] : L.banks.by_pc) { auto& x = lines[where(k)]; x.phases += v.phases; x.wavefronts += v.wavefronts; }
    for (auto& [k, v] : L.banks.by_site) { auto& x = lines[where(Site{k.first, k.second}) + " matrix"]; x.phases += v.phases; x.wavefronts += v.wavefronts; }
    for (auto& [k, v] : lines) {
        r.banks.push_back({k, v.phases, v.wavefronts});
        r.counters.shared_phases += v.phases;
        r.counters.shared_wavefronts += v.wavefronts;
    }
    return r;
}

}  // namespace emu
