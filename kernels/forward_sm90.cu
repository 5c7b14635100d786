// The forward on Hopper: blocks that stay take 128 rows past shares of the vocabulary, tile by tile; the logits never leave the
// registers of the warpgroup that multiplied them.
//
//   warpgroup 0     producer: each warp keeps a stage of the ring filled, across tiles and items
//   warpgroup 1, 2  consumers: 64 rows each of the same tile; products, then its epilogue, by itself
//
// Consumer 1 starts `lead` steps behind consumer 0, so that one's epilogue falls into the other's products: products of either
// alone can keep the tensor cores busy, as long as the ring holds what the one behind still needs.
#include "hopper_ring.cuh"
#include "logits_epilogue.cuh"

namespace {

using namespace hopper;

constexpr int BARRIER_LEAD = 1, BARRIER_CONSUMER = 2;   // named barriers

using Rows = epilogue::Epilogue<1, MMA_V, 1, CONSUMER_ROWS>;

struct Smem {
    Ring ring;
    struct {
        epilogue::State<1, TILE_V, CONSUMER_ROWS> state;
        epilogue::Sums<1, CONSUMER_ROWS> sums;
    } consumer[CONSUMERS];
};
static_assert(sizeof(Smem) <= 227 * 1024, "shared memory of lce_forward_sm90");

// Which row block a unit is: of a round that is done again, the unit-th of those that do it.
template <u32 CLUSTER> __device__ __forceinline__ u32 row_block_of(const LceArgs& a, const Item& item, u32 rank) {
    if (!a.redo) return item.unit * CLUSTER + rank;
    u32 row_block = 0;
    for (u32 before = 0;; ++row_block) {
        if (a.forward.pools[row_block].redone == a.round + 1 && before++ == item.unit) return row_block;
    }
}

// Partials [begin, end) of the round, which nobody has a share for.
__device__ __forceinline__ void clear_partials(const LceArgs& a, u32 block, u32 begin, u32 end, u32 thread) {
    const u32 row = block * CONSUMER_ROWS + thread;
    if (thread >= CONSUMER_ROWS || row >= a.saved.header->num_rows) return;
    for (u32 k = begin; k < end; ++k) {
        const u64 at = u64(a.first_partial + k) * a.problem.tokens + row;
        a.forward.partial[at] = {softmax::negative_infinity(), 0.0f, 0.0f, 0.0f};
        a.forward.partial_argmax[at] = NONE;
    }
}

// lead: below STAGES; 0: both consumers in step.
template <class T, u32 CLUSTER>
__device__ __forceinline__ void consume(const LceArgs& a, Smem& smem, const Schedule& schedule, u32 rank, u32 lead) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, steps = div_up(a.problem.hidden, TILE_D);
    auto& state = smem.consumer[consumer].state;
    const auto barrier = [&] { prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP); };
    Cursor at;
    bool waiting = lead > 0;                 // consumer 1 for consumer 0, once
    schedule.for_each_item([&](const Item& item) {
        const u32 row_block = row_block_of<CLUSTER>(a, item, rank), block = row_block * CONSUMERS + consumer;
        Rows::initialise(a, state, block, thread, WARPGROUP);
        Rows rows(a, state, 0, thread / 32 * 16, 0);
        for (u32 tile = item.first_tile; tile < item.end_tile; ++tile) {
            if (waiting && consumer == 1) prim::named_barrier_sync(BARRIER_LEAD, 2 * WARPGROUP);
            float acc[1][MMA_V][4];
            multiply_tile<T, CLUSTER>(reinterpret_cast<float(&)[4 * MMA_V]>(acc), smem.ring, at, steps, consumer, [&](u32 step) {
                if (step == 0) {
                    // Of the item's first tile: the state has been written. Of the others: all warps are done with the tile before.
                    barrier();
                    rows.flush(block, epilogue::STAGING / 2, thread, WARPGROUP, barrier);
                    rows.load_bias(tile, thread, WARPGROUP);
                    barrier();
                }
                if (waiting && consumer == 0 && step + 1 == smaller(lead, steps)) prim::named_barrier_arrive(BARRIER_LEAD, 2 * WARPGROUP);
            });
            waiting = false;
            rows.take(block, tile, acc);
        }
        barrier();
        rows.flush(block, 0, thread, WARPGROUP, barrier);
        rows.finish(smem.consumer[consumer].sums, block, item.share, thread, WARPGROUP, barrier);
        if (!a.redo) clear_partials(a, block, item.unused_begin, item.unused_end, thread);
    });
}

template <class T, u32 CLUSTER> __device__ __forceinline__ void forward(const LceHopperArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    const u32 row_blocks = a.args.redo ? a.args.forward.redo_count[a.args.round] : div_up(a.args.saved.header->num_rows, BLOCK_N);
    if (row_blocks == 0) return;
    u32 rank = 0;
    if (threadIdx.x == 0) initialise<CLUSTER>(smem.ring);
    if constexpr (CLUSTER == 1) {
        __syncthreads();
    } else {
        rank = prim::cluster_rank();
        prim::cluster_sync();
    }

    Schedule schedule;
    schedule.worker = blockIdx.x / CLUSTER;
    schedule.workers = gridDim.x / CLUSTER;
    schedule.units = div_up(row_blocks, CLUSTER);
    schedule.units_of_group = div_up(a.sweep_blocks, CLUSTER);
    schedule.first_tile = a.args.first_tile;
    schedule.num_tiles = a.args.num_tiles;
    schedule.most_shares = a.args.redo ? schedule.workers : a.args.splits;

    // Registers: 168 x 384 at the launch, 56 x 128 + 224 x 256 from here on.
    if (threadIdx.x < WARPGROUP) {
        prim::setmaxnreg_dec<56>();
        Cursor at;
        schedule.for_each_item([&](const Item& item) {
            load_tiles<CLUSTER>(a, smem.ring, at, rank, row_block_of<CLUSTER>(a.args, item, rank), item.first_tile, item.end_tile);
        });
    } else {
        prim::setmaxnreg_inc<224>();
        consume<T, CLUSTER>(a.args, smem, schedule, rank, a.lead);
    }
    // No block leaves while another may still write into its shared memory.
    if constexpr (CLUSTER > 1) {
        prim::syncwarp();
        prim::cluster_sync();
    }
}

}  // namespace

#define FORWARD(name, type) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ LceHopperArgs a) { forward<type, 1>(a); }
// Grids of an even number of blocks. For two row blocks and more.
#define FORWARD_CLUSTER(name, type) \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) name(const __grid_constant__ LceHopperArgs a) { forward<type, 2>(a); }

FORWARD(lce_forward_sm90_f16, prim::f16)
FORWARD(lce_forward_sm90_bf16, prim::bf16)
FORWARD_CLUSTER(lce_forward_sm90_cluster_f16, prim::f16)
FORWARD_CLUSTER(lce_forward_sm90_cluster_bf16, prim::bf16)
