// The state of a launch, a block, a warpgroup, a thread.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <unordered_map>

#include "../include/binary16.hpp"
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

// ---- shared memory -----------------------------------------------------------------------------------------------------
struct Reader { uint16_t who; bool async; uint32_t clk; const void* pc; };
struct Cell {                                // two bytes of shared memory
    uint32_t w_clk = 0;
    uint16_t w_who = 0;
    bool init = false, by_async = false, atomic = false;
    uint16_t inflight = 0;                   // an asynchronous copy is going to write here
    uint32_t room = 8;                       // readers, before those that no longer matter are forgotten
    const void* w_pc = nullptr;
    std::vector<Reader> readers;
};

// ---- threads -----------------------------------------------------------------------------------------------------------
struct CopyOp { uint32_t dst; const void* src; uint32_t bytes; Site at; };
struct BulkOp;
struct Block;
struct Fiber {
    void* sp = nullptr;
    char* stack = nullptr;
    uint3 tid{};
    Block* home = nullptr;
    int id = 0, lane = 0, warp = 0;
    int who = 0;                                     // the logical thread: id, past those of the cluster's earlier blocks
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
    const void* polled = nullptr;                    // address of the last atomic, and how often in a row
    int polls = 0;
    bool cluster_arrived = false;                    // at the cluster's barrier, and not waited for it yet
    uint32_t cluster_phase = 0, known_blocks = 0;    // blocks of the cluster that are known to have started
    Clock bars_fenced;                               // what a fence.mbarrier_init has made visible to the cluster
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
    Clock pend, done;                                // ordered within the block
    Clock cluster_pend, cluster_done;                // by arrivals that release to the cluster
    uint32_t completed = 0, seen = 0;                // phases, and how many of them somebody has waited for
    struct { uint32_t phase = 0, clk = 0; int who = -1; Site at{"", 0}; } remote;   // the last arrival from another block
    struct Waiter { Fiber* f; uint32_t parity; bool cluster; };
    std::vector<Waiter> waiting;
};
struct Coords { int at[5]; };                        // 0 beyond the rank
// linear: a plain range of bytes, of global memory or of a block's shared memory, instead of a box
struct LoadOp { Block* to; MBar* bar; Map map; const char* linear; uint32_t dst; Coords from; uint32_t bytes; uint16_t tag; Site at; };
struct BulkOp { Bulk kind; Map map; char* linear; Format format; uint32_t src; Coords to; uint32_t bytes; uint32_t clk; Fiber* by; bool read_done = false; Site at; };

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
    int who = 0, regs = 0;                           // regs: of each thread, by setmaxnreg
    uint64_t entry_version = 0;
    Clock entry;                                     // meet of the 128 threads' clocks at the last issue
};

// ---- block, launch, OS thread ------------------------------------------------------------------------------------------
struct Cta {
    uint3 block{};
    uint32_t index = 0;                              // of the block in the grid
    int rank = 0, base = 0;                          // in the cluster; its first logical thread
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
    // Accesses of other blocks, the last of each logical thread: the block has to outlive them.
    struct Visit { uint32_t clk; Loc at; };
    std::map<int, Visit> visits;
    Site cluster_at[32];                             // where each warp is at the cluster's barrier
    int pool = 0;                                    // registers that setmaxnreg has to give
    struct Claim { int group, regs; };
    std::deque<Claim> claims;                        // warpgroups that wait for registers
};
struct Launch {
    Banks banks;
    dim3 grid, block, cluster, clusters;             // clusters: of the grid, in each dimension
    int cluster_size = 1, logical = 0;               // logical threads of a block
    int registers = 0;                               // of a thread at the launch; 0: unknown
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
struct Worker;
struct Block {                                       // a block that runs, and its shared memory
    Launch* launch = nullptr;
    Worker* worker = nullptr;
    char* smem = nullptr;                            // kSmemBase + kSmemMax, guard pages at both ends
    std::vector<Cell> cells;
    std::vector<std::unique_ptr<Fiber>> pool;
    Cta cta;
    std::unordered_map<uintptr_t, Message> messages; // of atomics on shared memory
    std::vector<float> wg_a, wg_b, wg_c;
    Banks banks;
    Counters counters;
    void start(int rank);
    void finish();
    void wake(Fiber* f);
};
struct Rng {                                         // SplitMix64
    uint64_t state = 0;
    uint64_t operator()() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
};
struct ClusterBarrier { int arrived = 0; uint32_t phase = 0; Clock pend, done; std::vector<Fiber*> waiting; };
struct Worker {                                      // an OS thread: the fibers of all blocks of a cluster
    Launch* launch = nullptr;
    void* sched_sp = nullptr;
    Fiber* current = nullptr;
    std::deque<Fiber*> ready;
    Rng rng;
    std::vector<std::unique_ptr<Block>> blocks;      // the cluster's come first
    uint32_t cluster = 0;                            // which
    int size = 1, alive = 0;
    ClusterBarrier barrier;
    bool abandoned = false;
    int polls = 0;                                   // dispatches in a row that only polled
    void run(uint64_t cluster);
};
extern thread_local Block* me;                       // the block whose thread runs, or whose memory is looked at

inline Fiber* self() { return me->worker->current; }
inline void Block::wake(Fiber* f) { f->blocked = false; worker->ready.push_back(f); }
struct In {                                          // looks at another block for a while
    Block* before = me;
    explicit In(Block* b) { me = b; }
    ~In() { me = before; }
    In(const In&) = delete;
};
inline Cell* cells_at(uint32_t addr) { return &me->cells[(addr - kSmemBase) / 2]; }
inline char* smem_ptr(uint32_t addr) { return me->smem + addr; }
inline bool checking() { return me->launch->opt.check; }
inline uint32_t now(Fiber* f) { return f->clock.all[f->who]; }
inline void tick(Fiber* f) { ++f->clock.all[f->who]; ++f->clock.version; }   // after what others may have learnt of us
inline Fiber* lane_fiber(int l) { return me->pool[self()->warp * 32 + l].get(); }

// ---- fibers ------------------------------------------------------------------------------------------------------------
void prepare(Fiber*);
void to_fiber(Fiber*);
void block(const char* what, Site at);               // until another thread wakes us
void yield_polling(const char* what, Site at);       // others first
[[noreturn]] void abandon();                         // the launch, after a report that leaves no way on
void finish_thread();

// ---- clusters ----------------------------------------------------------------------------------------------------------
Block* block_of(const void* p);                      // the block of the cluster in whose shared memory p lies, or null
// Logical thread `who` uses the shared memory of another block: that runs already, and outlives it.
void reach(Block* to, int who, uint32_t clk, Fiber* by, const Loc&);
void meet(Block* to, Fiber* by, const Loc&);          // the first half of that alone
void cluster_left(Fiber*);                           // a thread has exited
void check_visits();                                 // a block is through
Block* block_of_thread(int who);
void async_part(Clock& to, const Clock& from);       // joins what is known of copies and products, but of no thread

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
bool warpgroup_collective(int kind, void* args, Site at, const char* name);   // true for the last thread to arrive
void wake_warpgroup(int);
bool engine_step(bool random);                       // lets one load of the cluster land
void finish_store(BulkOp&);
float to_float(Format, uint32_t bits);
uint32_t swizzle_addr(uint32_t a, int bits);
void absorb(Clock&, const Message&);                 // an acquire

}  // namespace emu
