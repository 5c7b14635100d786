// From candidates to the sparse gradient: the filter with the final statistics, each row's list in order of class, and the
// list of the rows that have none and take the exact path.
#include "block_scan.cuh"
#include "filter.cuh"
#include "softmax_state.cuh"

// ---- lce_filter: a block a row block --------------------------------------------------------------------------------
namespace {

constexpr u32 FILTER_THREADS = 1024;         // a block for each row block is few: each step of it waits for memory

struct FilterSmem {
    float max[BLOCK_N], inverse_sum[BLOCK_N], eps[BLOCK_N];
    u32 start[BLOCK_N];                      // of the row's walk of random numbers
    u32 target[BLOCK_N];                     // NONE: the row keeps nothing
    u32 count[BLOCK_N], next[BLOCK_N];       // entries of a row; where its next one goes
    block::ScanSpace<FILTER_THREADS> scan;
};

constexpr u32 CLASS_MASK = (1u << CLASS_BITS) - 1;

// Whether the filter keeps a candidate; the target's entry is added apart, whatever its p.
__device__ __forceinline__ bool keeps(const LceArgs& a, const FilterSmem& smem, LceEntry candidate) {
    const u32 row = candidate.index >> CLASS_BITS, v = candidate.index & CLASS_MASK;
    if (smem.target[row] == NONE || smem.target[row] == v) return false;
    return softmax::probability(smem.max[row], smem.inverse_sum[row], candidate.value) >= filter::least(a.problem, smem.eps[row], smem.start[row], v);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(FILTER_THREADS) lce_filter(const __grid_constant__ LceArgs a) {
    FilterSmem& smem = prim::shared_memory<FilterSmem>();
    const u32 first_row = blockIdx.x * BLOCK_N, num_rows = a.saved.header->num_rows, t = threadIdx.x;
    if (first_row >= num_rows) return;
    const u32 rows = num_rows - first_row < BLOCK_N ? num_rows - first_row : BLOCK_N;
    const u32 captured = a.forward.pools[blockIdx.x].count;
    const bool overflowed = captured > a.block_entries;
    const LceEntry* pool = a.forward.pool + u64(blockIdx.x) * a.block_entries;
    LceEntry* entries = a.saved.entries + u64(blockIdx.x) * a.block_entries;

    // ---- rows: one that is exact has no finite log-sum-exp, or candidates of its block were lost ---------------------
    bool exact = false, poisoned = false;    // of row t
    if (t < rows) {
        const LceRowStatistics& s = a.saved.statistics[first_row + t];
        smem.max[t] = s.max;
        smem.inverse_sum[t] = s.inverse_sum;
        smem.eps[t] = s.eps;
        smem.target[t] = a.saved.row_class[first_row + t];
        smem.start[t] = filter::row_start(a.problem.seed, a.saved.row_token[first_row + t]);
        poisoned = smem.target[t] == NONE;
        exact = !poisoned && (overflowed || !softmax::is_finite(s.lse));
        if (exact) smem.target[t] = NONE;
        smem.count[t] = poisoned || exact ? 0 : 1;       // the target's entry
    }
    __syncthreads();

    // ---- count, and room for each row's list, in order ------------------------------------------------------------------
    if (!overflowed) {
        for (u32 i = t; i < captured; i += FILTER_THREADS) {
            const LceEntry candidate = pool[i];
            if (keeps(a, smem, candidate)) prim::atomic_add(&smem.count[candidate.index >> CLASS_BITS], 1u);
        }
    }
    __syncthreads();
    u32 total;
    const u32 begin = block::exclusive_scan<FILTER_THREADS>(smem.scan, t < rows ? smem.count[t] : 0, total);
    const bool fits = total <= a.block_entries;
    if (t < rows) {
        exact |= !fits && !poisoned;
        a.saved.entry_begin[first_row + t] = fits ? begin : 0;
        a.saved.entry_count[first_row + t] = exact ? NONE : poisoned ? 0 : smem.count[t];
        smem.next[t] = begin;
    }
    if (overflowed || !fits) return;
    __syncthreads();

    // ---- scatter, in any order within a row: lce_order_entries puts them in order of class ------------------------------
    if (t < rows && smem.target[t] != NONE) {
        entries[prim::atomic_add(&smem.next[t], 1u)] = {smem.target[t], a.saved.statistics[first_row + t].target_logit};
    }
    for (u32 i = t; i < captured; i += FILTER_THREADS) {
        const LceEntry candidate = pool[i];
        if (!keeps(a, smem, candidate)) continue;
        const u32 slot = prim::atomic_add(&smem.next[candidate.index >> CLASS_BITS], 1u);
        entries[slot] = {candidate.index & CLASS_MASK, candidate.value};
    }
}

// ---- lce_order_entries: a warp a short list, a block a long one -------------------------------------------------------
namespace {

constexpr u32 ORDER_THREADS = 128, ORDER_WARPS = ORDER_THREADS / 32;
constexpr u32 PASS_CLASSES = 1u << 18;       // of one bitmap
constexpr u32 WORDS = PASS_CLASSES / 32, RUN = WORDS / ORDER_THREADS;

struct OrderSmem {
    u32 bitmap[WORDS + ORDER_THREADS];       // classes that are there; a word of padding after each run of RUN: see word_at
    u32 run_begin[ORDER_THREADS];            // set bits before a thread's run
    float mass[ORDER_THREADS];
    block::ScanSpace<ORDER_THREADS> scan;
};
static_assert(sizeof(OrderSmem) <= 48 * 1024, "shared memory of lce_order_entries");

// Threads walk their runs side by side, in different banks.
__device__ __forceinline__ u32 word_at(u32 word) { return word + word / RUN; }

__device__ __forceinline__ void order_in_warp(const LceArgs& a, u32 row, LceEntry* list, u32 count) {
    const u32 lane = threadIdx.x % 32;
    LceEntry entry = {NONE, 0.0f};
    if (lane < count) entry = list[lane];
    u32 rank = 0;
    for (u32 k = 0; k < count; ++k) rank += prim::shfl_idx(entry.index, int(k)) < entry.index;
    prim::syncwarp();                        // all have read
    if (lane < count) list[rank] = entry;
    prim::syncwarp();
    const LceRowStatistics s = a.saved.statistics[row];
    float mass = lane < count ? softmax::probability(s, list[lane].value) : 0.0f;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) mass += prim::shfl_xor(mass, lanes);
    prim::syncwarp();                        // all have read the statistics
    if (lane == 0) a.forward.kept_mass[row] = mass;
}

__device__ __forceinline__ void order_in_block(const LceArgs& a, OrderSmem& smem, u32 row, LceEntry* list, LceEntry* ordered, u32 count) {
    const u32 t = threadIdx.x;
    u32 smaller = 0;                         // entries of earlier passes
    for (u32 first = 0; first < a.problem.vocab; first += PASS_CLASSES) {
        for (u32 w = t; w < WORDS + ORDER_THREADS; w += ORDER_THREADS) smem.bitmap[w] = 0;
        __syncthreads();
        for (u32 i = t; i < count; i += ORDER_THREADS) {
            const u32 v = list[i].index - first;
            if (v < PASS_CLASSES) prim::atomic_or(&smem.bitmap[word_at(v / 32)], 1u << v % 32);
        }
        __syncthreads();
        u32 in_run = 0, in_pass;
        for (u32 w = 0; w < RUN; ++w) in_run += u32(prim::popc(smem.bitmap[word_at(t * RUN + w)]));
        smem.run_begin[t] = smaller + block::exclusive_scan<ORDER_THREADS>(smem.scan, in_run, in_pass);
        __syncthreads();
        for (u32 i = t; i < count; i += ORDER_THREADS) {
            const LceEntry entry = list[i];
            const u32 v = entry.index - first;
            if (v >= PASS_CLASSES) continue;
            const u32 word = v / 32, run = word / RUN;
            u32 rank = smem.run_begin[run] + u32(prim::popc(smem.bitmap[word_at(word)] & ((1u << v % 32) - 1)));
            for (u32 w = run * RUN; w < word; ++w) rank += u32(prim::popc(smem.bitmap[word_at(w)]));
            ordered[rank] = entry;
        }
        smaller += in_pass;
        __syncthreads();
    }
    const LceRowStatistics s = a.saved.statistics[row];
    float mass = 0.0f;
    for (u32 i = t; i < count; i += ORDER_THREADS) {
        const LceEntry entry = ordered[i];
        list[i] = entry;
        mass += softmax::probability(s, entry.value);
    }
    smem.mass[t] = mass;
    __syncthreads();
    for (u32 half = ORDER_THREADS / 2; half > 0; half /= 2) {
        if (t < half) smem.mass[t] += smem.mass[t + half];
        __syncthreads();
    }
    if (t == 0) a.forward.kept_mass[row] = smem.mass[0];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(ORDER_THREADS) lce_order_entries(const __grid_constant__ LceArgs a) {
    OrderSmem& smem = prim::shared_memory<OrderSmem>();
    const u32 num_rows = a.saved.header->num_rows, warp = threadIdx.x / 32;
    const auto count_of = [&](u32 row) {     // 0 for a row of the exact path
        const u32 count = row < num_rows ? a.saved.entry_count[row] : NONE;
        return count == NONE ? 0 : count;
    };
    const auto begin_of = [&](u32 row) { return u64(row / BLOCK_N) * a.block_entries + a.saved.entry_begin[row]; };
    for (u64 first = u64(blockIdx.x) * ORDER_WARPS; first < num_rows; first += u64(gridDim.x) * ORDER_WARPS) {
        const u32 own = u32(first) + warp, own_count = count_of(own);
        if (own_count > 0 && own_count <= 32) order_in_warp(a, own, a.saved.entries + begin_of(own), own_count);
        for (u32 k = 0; k < ORDER_WARPS; ++k) {
            const u32 row = u32(first) + k, count = count_of(row);
            if (count > 32) order_in_block(a, smem, row, a.saved.entries + begin_of(row), a.forward.pool + begin_of(row), count);
        }
    }
}

// ---- lce_exact_rows: one block --------------------------------------------------------------------------------------
namespace {

constexpr u32 EXACT_THREADS = 1024;

struct ExactSmem {
    block::SumSpace<EXACT_THREADS> sum;
    block::ScanSpace<EXACT_THREADS> scan;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(EXACT_THREADS) lce_exact_rows(const __grid_constant__ LceArgs a) {
    ExactSmem& smem = prim::shared_memory<ExactSmem>();
    const u32 num_rows = a.saved.header->num_rows, t = threadIdx.x;
    u32 exact_rows = 0;
    f64 candidates = 0, kept = 0, mass = 0, raised = 0;      // whole numbers below 2^53 are exact
    for (u32 first = 0; first < num_rows; first += EXACT_THREADS) {
        const u32 row = first + t;
        bool exact = false;
        if (row < num_rows && a.saved.row_class[row] != NONE) {
            const u32 count = a.saved.entry_count[row];
            exact = count == NONE;
            if (exact) {
                mass += 1.0;
            } else {
                candidates += 1.0;           // the target's entry, which is not from the pool
                kept += count;
                raised += a.saved.statistics[row].eps > a.problem.eps;
                mass += a.forward.kept_mass[row];
            }
        }
        u32 total;
        const u32 before = exact_rows + block::exclusive_scan<EXACT_THREADS>(smem.scan, exact, total);
        if (exact) a.saved.exact_row[before] = row;
        exact_rows += total;
    }
    if (a.capture) {
        const u32 blocks = (num_rows + BLOCK_N - 1) / BLOCK_N;
        for (u32 b = t; b < blocks; b += EXACT_THREADS) {
            const u32 captured = a.forward.pools[b].count;
            candidates += captured < a.block_entries ? captured : a.block_entries;
        }
    }
    candidates = block::sum<EXACT_THREADS>(smem.sum, candidates);
    kept = block::sum<EXACT_THREADS>(smem.sum, kept);
    mass = block::sum<EXACT_THREADS>(smem.sum, mass);
    raised = block::sum<EXACT_THREADS>(smem.sum, raised);
    if (t == 0) {
        a.saved.header->exact_rows = exact_rows;
        a.saved.header->raised_rows = u32(raised);
        a.saved.header->candidates = u64(candidates);
        a.saved.header->kept_entries = u64(kept);
        a.saved.header->kept_mass = mass;
    }
}
