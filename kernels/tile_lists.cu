// Which sources a block multiplies, and the lists of its tiles (tiles.cuh). A block of threads a block of owners.
//
//     lce_row_tiles      of rows: the classes that two of its 128 rows keep, or more. What is left of a row is gathered
//     lce_class_tiles    of 128 consecutive classes: all tokens that keep one of them, where these have 1.5 entries each, or more;
//                        where there are 4 entries for each row, "crowded", it is all rows, and their lists are left to
//     lce_crowded_tiles  a block of threads a row block: the head of a vocabulary has a tenth of all entries, too many for one
//
// The rule for classes leaves nothing to gather, since their lists are in no order. Both are near the best of a model of time: to
// gather a row costs as long as to multiply it with 0.7 of a tile's columns (DESIGN.md, section 4). The order of a tile's list is a matter
// of chance: every entry has its own place in its tile.
#include "block_scan.cuh"
#include "column_sum.cuh"
#include "gradient_scale.cuh"
#include "row_list.cuh"
#include "tiles.cuh"

namespace tiles {

constexpr u32 LIST_THREADS = 1024;
constexpr u32 MOST_SOURCES = 1u << 18;       // sources beyond these are gathered, and a block of classes that has such ones multiplies none
constexpr u32 WORDS = MOST_SOURCES / 32, RUN = WORDS / LIST_THREADS;
constexpr u32 LEAST_SOURCES = 32;            // fewer are not worth a tile
constexpr u32 MOST_TILES = MOST_SOURCES / TILE;
constexpr u32 CROWD = 4;                     // entries a row

struct ListSmem {
    u32 once[WORDS + LIST_THREADS];          // sources that are there; a word of padding after each run of RUN
    u32 twice[WORDS + LIST_THREADS];         // and those that are there again
    u32 run_begin[LIST_THREADS];             // sources that are multiplied, before a thread's run
    u32 next[MOST_TILES + 1];                // of a tile: its entries; then where the next one goes
    block::ScanSpace<LIST_THREADS> scan;
};
static_assert(sizeof(ListSmem) <= 96 * 1024, "devices with 99 KB of shared memory run one block");

// Threads walk their runs side by side, in different banks.
__device__ __forceinline__ u32 word_at(u32 word) { return word + word / RUN; }

// ---- owners and their entries -------------------------------------------------------------------------------------------------
// Calls use(k, entry) for a warp's share of a list, each lane waiting for two entries at once: three or more spill on sm_80, 86 or 100
// (ptxas 13.0).
template <class Use> __device__ __forceinline__ void for_each_of(const LceEntry* entries, u32 count, Use use) {
    constexpr u32 BATCH = 2;
    for (u32 base = threadIdx.x % 32; base < count; base += 32 * BATCH) {
        LceEntry own[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (base + 32 * i < count) own[i] = entries[base + 32 * i];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (base + 32 * i < count) use(base + 32 * i, own[i]);
    }
}

struct RowOwners {
    const LceArgs& a;
    u32 row_block;

    __device__ __forceinline__ Block block() const { return of_rows(a, row_block); }
    __device__ __forceinline__ float gradient(u32 row, LceEntry entry) const {
        const bool is_target = entry.index == a.saved.row_class[row];
        return gradient::of_entry(a.problem, a.saved.statistics[row], a.backward.coefficients[row], entry.value, is_target);
    }
    // Calls use(owner, source, place in the block's lists, its gradient by a function, its logit); a warp an owner.
    template <class Use> __device__ __forceinline__ void for_each_entry(Use use) const {
        for (u32 owner = threadIdx.x / 32; owner < TILE; owner += LIST_THREADS / 32) {
            const u32 row = row_block * TILE + owner;
            const RowList list = row_list(a, row);
            const u32 place = list.count == 0 ? 0 : a.saved.entry_begin[row];
            for_each_of(list.entries, list.count, [&](u32 k, LceEntry entry) {
                use(owner, entry.index, place + k, [&] { return gradient(row, entry); }, entry.value);
            });
        }
    }
};

struct ClassOwners {
    const LceArgs& a;
    u32 tile;

    __device__ __forceinline__ Block block() const { return of_classes(a, tile); }
    __device__ __forceinline__ u32 count() const {
        const u32 end = (tile + 1) * TILE < a.problem.vocab ? (tile + 1) * TILE : a.problem.vocab;
        return a.backward.column_begin[end] - a.backward.column_begin[tile * TILE];
    }
    template <class Use> __device__ __forceinline__ void for_each_entry(Use use) const {
        for (u32 owner = threadIdx.x / 32; owner < TILE && tile * TILE + owner < a.problem.vocab; owner += LIST_THREADS / 32) {
            const column_sum::List list = column_sum::list_of(a, tile * TILE + owner);
            for_each_of(list.entries, list.count, [&](u32, LceEntry entry) { use(owner, entry.index, 0u, [&] { return entry.value; }, 0.0f); });
        }
    }
};

// ---- which sources --------------------------------------------------------------------------------------------------------------
// A target's logit may be -inf, and with it its row of C: that is for its own row to bear, not for all of the block, times zero.
__device__ __forceinline__ bool may_be_shared(u32 source, float logit) { return source < MOST_SOURCES && softmax::is_finite(logit); }

// Marks the sources that are there, and, with AGAIN, those that are there again. Both have been cleared, and are complete behind a barrier
// to come.
template <bool AGAIN, class Owners> __device__ __forceinline__ void mark(ListSmem& smem, const Owners& owners) {
    owners.for_each_entry([&](u32, u32 source, u32, auto, float logit) {
        if (!may_be_shared(source, logit)) return;
        const u32 at = word_at(source / 32), bit = 1u << source % 32;
        if ((prim::atomic_or(&smem.once[at], bit) & bit) != 0 && AGAIN) prim::atomic_or(&smem.twice[at], bit);
    });
}

// How many sources `chosen` has; block-wide. Where runs begin is complete behind a barrier to come.
__device__ __forceinline__ u32 count_sources(ListSmem& smem, const u32* chosen, u32 words) {
    const u32 t = threadIdx.x;
    u32 own = 0, total;
    for (u32 word = t * RUN; word < t * RUN + RUN && word < words; ++word) own += u32(prim::popc(chosen[word_at(word)]));
    smem.run_begin[t] = block::exclusive_scan<LIST_THREADS>(smem.scan, own, total);
    return total;
}

// The source's number among the chosen ones, NONE if it is none.
__device__ __forceinline__ u32 rank_of(const ListSmem& smem, const u32* chosen, u32 source, float logit) {
    if (!may_be_shared(source, logit)) return NONE;
    const u32 word = source / 32, bit = 1u << source % 32, own = chosen[word_at(word)];
    if ((own & bit) == 0) return NONE;
    u32 rank = smem.run_begin[word / RUN] + u32(prim::popc(own & (bit - 1)));
    for (u32 before = word / RUN * RUN; before < word; ++before) rank += u32(prim::popc(chosen[word_at(before)]));
    return rank;
}

// ---- lists ------------------------------------------------------------------------------------------------------------------------
template <class T> __device__ __forceinline__ u32 entry_of(u32 owner, u32 source_in_tile, float value) {
    return (owner * TILE + source_in_tile) << 16 | prim::from_f32<T>(value).bits;
}

// Of the tiles of `count` chosen sources. in_tile: a bit for each entry that is in one, cleared before; or null.
template <class T, class Owners>
__device__ __forceinline__ void write_lists(
    const LceArgs& a, ListSmem& smem, const Owners& owners, const u32* chosen, u32 words, u32 count, u32* in_tile
) {
    const Block block = owners.block();
    const u32 t = threadIdx.x, num_tiles = (count + TILE - 1) / TILE;
    u32* sources = sources_of(a, block);
    u32* begin = tile_begin_of(a, block);
    u32* entries = entries_of(a, block);

    u32 rank = smem.run_begin[t];
    for (u32 word = t * RUN; word < t * RUN + RUN && word < words; ++word)
        for (u32 left = chosen[word_at(word)]; left != 0; left &= left - 1) sources[rank++] = word * 32 + u32(prim::ffs(left)) - 1;
    for (u32 tile = t; tile < num_tiles; tile += LIST_THREADS) smem.next[tile] = 0;
    __syncthreads();

    owners.for_each_entry([&](u32, u32 source, u32, auto, float logit) {
        const u32 in_order = rank_of(smem, chosen, source, logit);
        if (in_order != NONE) prim::atomic_add(&smem.next[in_order / TILE], 1u);
    });
    __syncthreads();
    u32 before_all = 0;
    for (u32 base = 0; base < num_tiles; base += LIST_THREADS) {
        const u32 own = base + t < num_tiles ? smem.next[base + t] : 0;
        u32 total;
        const u32 before = before_all + block::exclusive_scan<LIST_THREADS>(smem.scan, own, total);
        if (base + t < num_tiles) smem.next[base + t] = begin[base + t] = before;
        before_all += total;
    }
    if (t == 0) begin[num_tiles] = before_all;
    __syncthreads();

    const float down = gradient::scale_of<T>(a.backward.exact_scale[0]).down;
    owners.for_each_entry([&](u32 owner, u32 source, u32 place, auto gradient, float logit) {
        const u32 in_order = rank_of(smem, chosen, source, logit);
        if (in_order == NONE) return;
        const u32 slot = prim::atomic_add(&smem.next[in_order / TILE], 1u);
        entries[slot] = entry_of<T>(owner, in_order % TILE, gradient() * down);
        if (in_tile != nullptr) prim::atomic_or(&in_tile[place / 32], 1u << place % 32);
    });
}

// The block multiplies, from `count` sources, or gathers.
__device__ __forceinline__ void note(const LceArgs& a, u32 block, u32 count) {
    a.backward.tile_sources[block] = count;
    if (count > 0) a.backward.active_blocks[prim::atomic_add(&a.backward.tile_work->active, 1u)] = block;
}

template <class T> __device__ __forceinline__ void row_tiles(const LceArgs& a) {
    ListSmem& smem = prim::shared_memory<ListSmem>();
    const RowOwners owners = {a, blockIdx.x};
    const u32 t = threadIdx.x, classes = a.problem.vocab < MOST_SOURCES ? a.problem.vocab : MOST_SOURCES, words = (classes + 31) / 32;
    u32* in_tile = in_tile_of(a, blockIdx.x);
    for (u32 word = t; word < words; word += LIST_THREADS) smem.once[word_at(word)] = smem.twice[word_at(word)] = 0;
    for (u32 word = t; word < (a.block_entries + 31) / 32; word += LIST_THREADS) prim::st_relaxed(&in_tile[word], 0);
    __syncthreads();
    mark<true>(smem, owners);
    __syncthreads();
    u32 count = count_sources(smem, smem.twice, words);
    if (count < (a.backward.tile_use == TILES_EVERYWHERE ? 1 : LEAST_SOURCES)) count = 0;
    if (t == 0) note(a, blockIdx.x, count);
    if (count > 0) write_lists<T>(a, smem, owners, smem.twice, words, count, in_tile);
}

template <class T> __device__ __forceinline__ void class_tiles(const LceArgs& a) {
    ListSmem& smem = prim::shared_memory<ListSmem>();
    const ClassOwners owners = {a, blockIdx.x};
    const u32 t = threadIdx.x, entries = owners.count(), words = (a.problem.tokens + 31) / 32, num_rows = a.saved.header->num_rows;
    const u32 least = a.backward.tile_use == TILES_EVERYWHERE ? 1 : LEAST_SOURCES;
    // With exact rows lce_exact writes every class, from lists.
    if (2 * u64(entries) < 3 * u64(least) || a.saved.header->exact_rows > 0 || a.problem.tokens > MOST_SOURCES) {
        if (t == 0) note(a, blockIdx.x, 0);
        return;
    }
    if (entries >= CROWD * u64(num_rows) && num_rows >= least) {
        if (t == 0) {
            const u32 slot = prim::atomic_add(&a.backward.tile_work->crowded, 1u);
            smem.next[0] = slot;
            if (slot < MOST_CROWDED) {
                a.backward.crowded_blocks[slot] = blockIdx.x;
                a.backward.crowded_next[slot] = 0;
                note(a, blockIdx.x, slot | CROWDED);
            }
        }
        __syncthreads();
        const u32 slot = smem.next[0];
        if (slot < MOST_CROWDED) return;
        __syncthreads();                         // `next` is used again
    }
    for (u32 word = t; word < words; word += LIST_THREADS) smem.once[word_at(word)] = 0;
    __syncthreads();
    mark<false>(smem, owners);
    __syncthreads();
    u32 count = count_sources(smem, smem.once, words);
    if (count < least || 3 * u64(count) > 2 * u64(entries)) count = 0;
    if (t == 0) note(a, blockIdx.x, count);
    if (count > 0) write_lists<T>(a, smem, owners, smem.once, words, count, nullptr);
}

// ---- crowded blocks of classes: the part of a row block --------------------------------------------------------------------------
struct CrowdedSmem {
    u32 next[MOST_CROWDED];                  // of a crowded block: entries of these rows; then where the next one goes
};

template <class T> __device__ __forceinline__ void crowded_tiles(const LceArgs& a) {
    CrowdedSmem& smem = prim::shared_memory<CrowdedSmem>();
    const RowOwners owners = {a, blockIdx.x};
    const u32 t = threadIdx.x, first_row = blockIdx.x * TILE, num_rows = a.saved.header->num_rows;
    const u32 found = a.backward.tile_work->crowded, crowded = found < MOST_CROWDED ? found : MOST_CROWDED;
    if (crowded == 0 || first_row >= num_rows) return;
    // Of a crowded block, NONE for others.
    const auto slot_of = [&](u32 block) {
        const u32 found_sources = a.backward.tile_sources[block];
        return found_sources & CROWDED ? found_sources & ~CROWDED : NONE;
    };
    for (u32 slot = t; slot < crowded; slot += LIST_THREADS) smem.next[slot] = 0;
    __syncthreads();
    owners.for_each_entry([&](u32, u32 class_index, u32, auto, float) {
        const u32 slot = slot_of(class_index / TILE);
        if (slot != NONE) prim::atomic_add(&smem.next[slot], 1u);
    });
    __syncthreads();
    for (u32 slot = t; slot < crowded; slot += LIST_THREADS) {
        const Block block = of_classes(a, a.backward.crowded_blocks[slot]);
        const u32 own = smem.next[slot], first = prim::atomic_add(&a.backward.crowded_next[slot], own);
        u32* begin = tile_begin_of(a, block) + 2 * blockIdx.x;
        begin[0] = smem.next[slot] = first;
        begin[1] = first + own;
    }
    // The rows of the row block are sources whatever they have; what a row without entries holds must not count, even times zero.
    for (u32 k = t; k < crowded * TILE; k += LIST_THREADS) {
        const u32 row = first_row + k % TILE;
        if (row >= num_rows) continue;
        const bool counts = row_list(a, row).count > 0;
        sources_of(a, of_classes(a, a.backward.crowded_blocks[k / TILE]))[row] = counts ? a.saved.row_token[row] : NONE;
    }
    __syncthreads();
    const float down = gradient::scale_of<T>(a.backward.exact_scale[0]).down;
    owners.for_each_entry([&](u32 row, u32 class_index, u32, auto gradient, float) {
        const u32 slot = slot_of(class_index / TILE);
        if (slot == NONE) return;
        const u32 place = prim::atomic_add(&smem.next[slot], 1u);
        entries_of(a, of_classes(a, class_index / TILE))[place] = entry_of<T>(class_index % TILE, row, gradient() * down);
    });
}

}  // namespace tiles

// <row_blocks, 1024>
extern "C" __global__ void __launch_bounds__(tiles::LIST_THREADS) lce_row_tiles_f16(const __grid_constant__ LceArgs a) { tiles::row_tiles<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(tiles::LIST_THREADS) lce_row_tiles_bf16(const __grid_constant__ LceArgs a) { tiles::row_tiles<prim::bf16>(a); }
// <ceil(V / 128), 1024>
extern "C" __global__ void __launch_bounds__(tiles::LIST_THREADS) lce_class_tiles_f16(const __grid_constant__ LceArgs a) { tiles::class_tiles<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(tiles::LIST_THREADS) lce_class_tiles_bf16(const __grid_constant__ LceArgs a) { tiles::class_tiles<prim::bf16>(a); }
// <row_blocks, 1024>, behind lce_class_tiles
extern "C" __global__ void __launch_bounds__(tiles::LIST_THREADS) lce_crowded_tiles_f16(const __grid_constant__ LceArgs a) { tiles::crowded_tiles<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(tiles::LIST_THREADS) lce_crowded_tiles_bf16(const __grid_constant__ LceArgs a) { tiles::crowded_tiles<prim::bf16>(a); }
