// The state of a launch, a block, a warpgroup, a thread.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <set>
#include <unordered_map>

#include "../include/host.hpp"
#include "banks.hpp"
#include "clock.hpp"

namespace emu {

constexpr size_t kSmemMax = 227 * 1024;      // opt-in limit per block, sm_90; a named device may allow less
constexpr uint32_t kSmemBase = 1024;         // the first KiB of the shared window belongs to the system
constexpr size_t kStack = 256 * 1024;
constexpr int kMaxBars = 64, kMaxWg = 8, kMaxStorers = 32;
constexpr size_t kPage = 4096;
extern bool instrumented;                    // the kernels were compiled with callbacks: every store is seen

// ---- shared memory -----------------------------------------------------------------------------------------------------
struct Reader { uint16_t who; uint32_t clk; const void* pc; };
struct Cell {                                // two bytes of shared memory
    uint32_t w_clk = 0;
    uint16_t w_who = 0;
    bool init = false, by_async = false, atomic = false;
    uint16_t inflight = 0;                   // an asynchronous copy is going to write here
    const void* w_pc = nullptr;
    std::vector<Reader> readers;
};

// ---- threads -----------------------------------------------------------------------------------------------------------
struct CopyOp { uint32_t dst; const void* src; uint32_t bytes; Site at; };
struct BulkOp;
struct Fiber {
    void* sp = nullptr;
    char* stack = nullptr;
    uint3 tid{};
    int id = 0, lane = 0, warp = 0;
    bool done = true, blocked = false;
    const char* what = "";
    Site at{"", 0};
    Clock clock;
    std::vector<CopyOp> copies;                      // cp.async since the last commit
    std::deque<std::vector<CopyOp>> copy_groups;
    std::vector<BulkOp*> bulk;                       // bulk stores since the last commit
    std::deque<std::vector<BulkOp*>> bulk_groups;
    int storer = -1;                                 // pseudo-thread of this thread's bulk stores: its reads of shared memory;
                                                     // kMaxStorers further on: its writes to global memory
    int regs = -1;
    const void* polled = nullptr;                    // address of the last atomic, and how often in a row
    int polls = 0;
};

struct Rendezvous { int kind; uint32_t mask, arrived; Site at; void* args[32]; };
struct Barrier { int expected = 0, arrived = 0; Clock clock; std::vector<Fiber*> waiting; uint8_t lanes[32] = {}; Site at[32]; };

// ---- copy engine -------------------------------------------------------------------------------------------------------
struct Map {                                         // what the emulated driver encodes into a CUtensorMap
    uint64_t magic, base, stride[4];                 // bytes from one to the next in dimensions 1 to 4
    uint32_t last[5];                                // a dimension's size less one: up to 2^32 elements
    uint16_t box[5];
    uint8_t rank, elem, type, swizzle, pad[46];
    uint64_t dim(int i) const { return uint64_t(last[i]) + 1; }
    uint32_t box_bytes() const { uint32_t n = elem; for (int i = 0; i < rank; ++i) n *= box[i]; return n; }
};
static_assert(sizeof(Map) == 128);
struct MBar {
    uint32_t addr = 0, count = 0, pending = 0;
    int64_t tx = 0;
    uint32_t phase = 0;
    uint64_t key = 0;                                // what the object's 8 bytes hold, so that an overwrite shows
    int who = 0;
    uint32_t op_clk = 0;
    bool visible_to_async = false;
    Clock pend, done;
    struct Waiter { Fiber* f; uint32_t parity; };
    std::vector<Waiter> waiting;
};
struct Coords { int at[5]; };                        // 0 beyond the rank
struct LoadOp { MBar* bar; Map map; uint32_t dst; Coords from; uint32_t bytes; uint16_t tag; Site at; };
struct BulkOp { Bulk kind; Map map; uint32_t src; Coords to; uint32_t bytes; uint32_t clk; Fiber* by; bool read_done = false; Site at; };

// ---- tensor cores ------------------------------------------------------------------------------------------------------
struct InFlightAcc { std::vector<float> value; int n; int uses; };
struct WgmmaOp {
    Format format; int n; float* d[128]; uint32_t a[128][4]; bool a_regs; uint64_t a_desc, b_desc; bool a_mn, b_mn, acc;
    bool done = false; uint32_t clk; Site at;
};
struct WarpGroup {
    int kind = -1, arrived = 0;                      // the collective under way
    Site at{};
    void* args[128];
    std::vector<std::unique_ptr<WgmmaOp>> open;
    std::deque<std::vector<std::unique_ptr<WgmmaOp>>> groups;
    std::map<float*, InFlightAcc> flying;
    bool fenced = false;
    uint32_t op_clk = 0, seen = 0;
    int who = 0;
    uint64_t entry_version = 0;
    Clock entry;                                     // meet of the 128 threads' clocks at the last issue
};

// ---- block, launch, OS thread ------------------------------------------------------------------------------------------
struct Cta {
    uint3 block{};
    uint32_t index = 0;
    int threads = 0, clocks = 0;
    std::vector<std::vector<Rendezvous>> warp_rv;
    std::deque<WarpGroup> wgs;
    Barrier bars[16];
    std::deque<MBar> mbars;
    std::vector<std::unique_ptr<LoadOp>> loads;
    std::vector<std::unique_ptr<BulkOp>> stores;
    int storers = 0;
    uint16_t next_tag = 0;
    int alive = 0;
};
struct Launch {
    Banks banks;
    dim3 grid, block;
    size_t smem;
    const Entry* entry;
    void** params;
    Options opt;
    std::atomic<uint64_t> next{0}, progress{0};
    std::atomic<bool> stop{false};
    std::mutex mutex;
    std::string text;
    int reports = 0;
    std::set<std::string> seen;
    Counters counters;
    uint32_t id;
    std::mutex message_mutex;                        // of global atomics, and what they carry
    std::unordered_map<uintptr_t, Message> messages;
};
struct Worker {
    Launch* launch = nullptr;
    void* sched_sp = nullptr;
    Fiber* current = nullptr;
    char* smem = nullptr;                            // kSmemBase + kSmemMax, guard pages at both ends
    std::vector<Cell> cells;
    std::vector<std::unique_ptr<Fiber>> pool;
    std::deque<Fiber*> ready;
    std::mt19937_64 rng;
    Cta cta;
    bool abandoned = false;
    int polls = 0;                                   // dispatches in a row that only polled
    std::unordered_map<uintptr_t, Message> messages; // of atomics on shared memory
    std::vector<float> wg_a, wg_b, wg_c;
    Banks banks;
    Counters counters;
    void run(uint64_t block);
    void wake(Fiber* f) { f->blocked = false; ready.push_back(f); }
};
extern thread_local Worker* me;

inline Fiber* self() { return me->current; }
inline Cell* cells_at(uint32_t addr) { return &me->cells[(addr - kSmemBase) / 2]; }
inline char* smem_ptr(uint32_t addr) { return me->smem + addr; }
inline bool checking() { return me->launch->opt.check; }
inline uint32_t now(Fiber* f) { return f->clock.all[f->id]; }
inline void tick(Fiber* f) { ++f->clock.all[f->id]; ++f->clock.version; }   // after what others may have learnt of us
inline Fiber* lane_fiber(int l) { return me->pool[self()->warp * 32 + l].get(); }

// ---- reports -----------------------------------------------------------------------------------------------------------
std::string where(const void* pc);
std::string where(Site);
struct Loc {
    Site site{"", 0};
    const void* pc = nullptr;
    Loc(Site s) : site(s) {}
    Loc(const void* p) : pc(p) {}
    Loc(const char* s) : site{s, 0} {}
    std::string str() const { return pc ? where(pc) : where(site); }
};
std::string who_name(int who);
[[gnu::format(printf, 3, 4)]] void report(const char* kind, const Loc&, const char* fmt, ...);

// ---- fibers ------------------------------------------------------------------------------------------------------------
void prepare(Fiber*);
void to_fiber(Fiber*);
void block(const char* what, Site at);               // until another thread wakes us
void yield_polling(const char* what, Site at);       // others first
[[noreturn]] void abandon();                         // the launch, after a report that leaves no way on
void finish_thread();

// ---- the checker -------------------------------------------------------------------------------------------------------
bool in_smem(const void* p, size_t n, const char* op, const Loc&);
// By logical thread `who` whose knowledge is `c`. `async`: through the async proxy.
void check_read(uint32_t addr, size_t n, int who, uint32_t clk, const Clock& c, bool async, bool atomic, const void* pc, const Loc&);
bool check_write(uint32_t addr, size_t n, int who, uint32_t clk, const Clock& c, bool async, bool atomic, uint16_t inflight, const void* pc, const Loc&);
void land(uint32_t addr, size_t n, int who, uint32_t clk, bool async);   // an in-flight copy arrives
bool in_heap(const void* p);
bool owned(uintptr_t a, size_t n);
void check_global(uintptr_t a, size_t n, bool write, bool atomic, int who, uint32_t clk, const Clock& c, const Loc&);
uint32_t begin_launch();
void end_launch();

// ---- units -------------------------------------------------------------------------------------------------------------
enum Kind { kShfl = 1, kBallot, kSyncWarp, kLdm, kStm, kMma, kWgmma, kWgFence, kWgCommit, kWgWait, kSetReg };
// True (not null) for the last lane to arrive, which acts for all and then calls finish_warp.
Rendezvous* warp_collective(int kind, uint32_t mask, void* args, Site at, const char* name);
void finish_warp(Rendezvous*);
bool engine_step(bool random);                       // lets one TMA load land
void finish_store(BulkOp&);
float to_float(Format, uint32_t bits);
uint32_t swizzle_addr(uint32_t a, int bits);
void absorb(Clock&, const Message&);                 // an acquire

}  // namespace emu
