// The exact path on Hopper: as in exact.cu the logits once more, a chunk of the vocabulary at a time, the logit gradients G of the chunk in a
// bounded workspace, then dE += G C and dC = G^T E. One cooperative launch of one block a multiprocessor:
//
//     for each chunk of classes      GRADIENTS       G = gradient of the logits of E C^T        tiles of 128 rows x 256 classes
//         grid barrier               PRODUCTS        dE += G C, dC = G^T E, dbias               tiles of 128 rows or classes x 256 of D
//         grid barrier
//     where there are slices         SUMS            dE = their sum                             rows (exact_slices.cuh)
//
// and that once more for each pass (exact_passes.cuh).
//
//   warps 0 to 3        producer: each keeps a stage of the ring filled with blocks of the items of work, across items; thread 0 draws these
//   warpgroups 1, 2     consumers: 64 rows each of the same tile; products, then their epilogue, by themselves
//
// Items are drawn from one counter, longest first, so that a phase ends evenly; who computes a tile changes nothing in it. Every output
// element has one owner, one order of additions and one rounding: dE waits in f32 accumulators for the last chunk, a column of dC is
// complete with its chunk, what the sparse rows give to it included. dbias sums G as stored.
//
// Clusters of two blocks take two tiles of rows or classes at once, of the same columns, and load B once for both. Both must know of an
// item, so theirs are dealt out, not drawn (deal.cuh).
//
// G is stored in the input type, divided by a power of two (gradient_scale.cuh), as the image of the stages' blocks: block (r, c) of 64
// rows x 64 classes at r * blocks of the chunk + c, swizzled. So one G, once written, is K-major for dE and MN-major for dC, and
// copies of 8 KiB need no tensor map. Rows and classes of a tile that do not exist are 0 in it: the products need no masks.
#include "exact_outputs.cuh"
#include "gradient.cuh"
#include "grid_barrier.cuh"

namespace {

using namespace blocks;
using prim::bf16;
using prim::f16;

// ---- producer -----------------------------------------------------------------------------------------------------------------
// The rows of E of a tile of G: two blocks, whose tokens are in the ring's table if either is gathered.
struct TileRows {
    Rows block[A_BLOCKS];

    // By all warps of the producer.
    __device__ __forceinline__ TileRows(const LceHopperArgs& a, const exact::Pass& pass, Ring& ring, u32 first_row)
        : block{{a, pass, first_row}, {a, pass, first_row + SIDE}} {
        if (!block[0].gathered && !block[1].gathered) return;
        prim::named_barrier_sync(BARRIER_PRODUCER, WARPGROUP);       // the tile before has been gathered
        ring.token[threadIdx.x] = Rows::token_or_last(a.args, pass, first_row + threadIdx.x);
        prim::named_barrier_sync(BARRIER_PRODUCER, WARPGROUP);
    }
};
static_assert(A_BLOCKS == 2 && ROWS == WARPGROUP, "a row a thread");

// A step of a tile of G: E [rows, D], C [classes, D].
template <u32 CLUSTER> __device__ __forceinline__ void load_gradient_step(
    const LceHopperArgs& a, const Work& work, const Item& item, const TileRows& rows, Ring& ring, const Cursor& at, u32 step, u32 rank
) {
    constexpr u32 PART = B_BLOCKS / CLUSTER;
    const u32 lane = threadIdx.x % 32, b = rank * PART + lane;
    u64* full = &ring.full[at.stage];
    const bool gathers[A_BLOCKS] = {rows.block[0].gathered, rows.block[1].gathered};
    const u32 gathered = gathers[0] + gathers[1];
    begin_stage<CLUSTER>(ring, at, item, work.has_sparse_rows);
    if (gathered == 0) expect(ring, at.stage, STAGE_BYTES);
    if (lane < PART) load_box<CLUSTER>(ring.b[at.stage][b], &a.classifier, full, step * SIDE, (work.chunk.first_tile + item.column) * COLUMNS + b * SIDE);
#pragma unroll
    for (u32 k = 0; k < A_BLOCKS; ++k)
        if (lane == 0 && !gathers[k]) load_box<1>(ring.a[at.stage][k], &a.embeddings, full, step * SIDE, rows.block[k].first_token);
    if (gathered == 0) return;
#pragma unroll 1
    for (u32 k = 0; k < A_BLOCKS; ++k)
        if (k == 0 ? gathers[0] : gathers[1]) hopper::gather_rows<SIDE, 1>(a.args.problem, ring.a[at.stage][k], ring.token + k * SIDE, step * SIDE);
    hopper::hand_on(full, STAGE_BYTES - gathered * BYTES);
}

// A step of a tile of dE: G [rows, classes], C [classes, D]; or of dC: G [rows, classes], E [rows, D].
template <u32 CLUSTER> __device__ __forceinline__ void load_product_step(
    const LceHopperArgs& a, const Work& work, const Item& item, Ring& ring, const Cursor& at, u32 step, u32 rank
) {
    constexpr u32 PART = B_BLOCKS / CLUSTER;
    const u32 lane = threadIdx.x % 32, b = rank * PART + lane, column = item.column * COLUMNS, first_row = step * SIDE;
    u64* full = &ring.full[at.stage];
    if (item.kind == D_EMBEDDINGS) {
        const u32 row = item.row % work.row_span, tile = CLUSTER == 1 ? row : smaller(row, work.row_tiles - 1);
        const u32 at_step = item.row / work.row_span * work.slice_steps + step;          // of the chunk
        begin_stage<CLUSTER>(ring, at, item, work.has_sparse_rows);
        expect(ring, at.stage, STAGE_BYTES);
        if (lane < PART) load_box<CLUSTER>(ring.b[at.stage][b], &a.classifier, full, column + b * SIDE, work.chunk.first_tile * COLUMNS + at_step * SIDE);
        if (lane < A_BLOCKS) prim::bulk_load(ring.a[at.stage][lane], gradient_block(a.args, work, tile * A_BLOCKS + lane, at_step), BYTES, full);
        return;
    }
    const Rows rows(a, work.pass, first_row);       // before the wait: two dependent loads, and those of the table
    u32* table = ring.token + at.stage * SIDE;
    if (rows.gathered) {
        for (u32 row = lane; row < SIDE; row += 32) table[row] = Rows::token_or_last(a.args, work.pass, first_row + row);
    }
    begin_stage<CLUSTER>(ring, at, item, work.has_sparse_rows);
    if (!rows.gathered) expect(ring, at.stage, STAGE_BYTES);
    if (lane < A_BLOCKS) prim::bulk_load(ring.a[at.stage][lane], gradient_block(a.args, work, step, item.row * A_BLOCKS + lane), BYTES, full);
    if (!rows.gathered) {
        if (lane < PART) load_box<CLUSTER>(ring.b[at.stage][b], &a.embeddings, full, column + b * SIDE, rows.first_token);
        return;
    }
    // What is gathered is this block's alone: all of B.
    hopper::gather_rows<SIDE, B_BLOCKS>(a.args.problem, ring.b[at.stage][0], table, column);
    hopper::hand_on(full, A_BLOCKS * BYTES);
}

// A phase.
template <u32 CLUSTER> __device__ __forceinline__ void produce(const LceHopperArgs& a, Smem& smem, u32 rank, Cursor& at) {
    const Work& work = smem.work;
    Ring& ring = smem.ring;
    const u32 warp = threadIdx.x / 32;
    const auto draw = [&](u32 turn) {
        if (CLUSTER == 1 && threadIdx.x == 0) smem.drawn[turn % 2] = prim::atomic_add(a.args.backward.barrier + 2, 1u) - work.drawn;
    };
    draw(0);
    for (u32 turn = 0;; ++turn) {
        u32 index;
        if constexpr (CLUSTER == 1) {
            prim::named_barrier_sync(BARRIER_PRODUCER, WARPGROUP);
            index = smem.drawn[turn % 2];
        } else {
            index = dealt_item<CLUSTER>(work, turn);
        }
        const Item item = own_item<CLUSTER>(a.args.problem, work, index, rank);
        if (item.steps == 0) {               // nothing to load
            if (at.stage == warp) {
                begin_stage<CLUSTER>(ring, at, item, work.has_sparse_rows);
                expect(ring, at.stage, 0);
            }
            at.advance();
            if (item.kind == NONE_LEFT) return;
            draw(turn + 1);
            continue;
        }
        // A lap before it is wanted: the memory's answer takes a step's time.
        const u32 draws_at = item.steps < STAGES ? 0 : item.steps - STAGES;
        if (work.phase == GRADIENTS) {
            const TileRows rows(a, work.pass, ring, item.row * ROWS);
            for (u32 step = 0; step < item.steps; ++step, at.advance()) {
                if (step == draws_at) draw(turn + 1);
                if (at.stage == warp) load_gradient_step<CLUSTER>(a, work, item, rows, ring, at, step, rank);
            }
        } else {
            const u32 stages = item.steps + (is_merged(work, item) ? STAGES : 0);
            for (u32 step = 0; step < stages; ++step, at.advance()) {
                if (step == draws_at) draw(turn + 1);
                if (at.stage != warp) continue;
                if (step < item.steps) {
                    load_product_step<CLUSTER>(a, work, item, ring, at, step, rank);
                } else {
                    begin_stage<CLUSTER>(ring, at, item, work.has_sparse_rows);
                    expect(ring, at.stage, 0);
                }
            }
        }
    }
}

// ---- consumers: logit gradients -------------------------------------------------------------------------------------------------
constexpr float LOG2_E = 1.4426950408889634f;

// Of one of a thread's two rows what every logit needs, and where the rest is.
struct RowState {
    float max, factor;                       // the softmax's, and of exp(logit - max)
    u32 target, row;                         // NONE: no such row

    __device__ __forceinline__ void load(const LceArgs& a, const exact::Pass& pass, float down, u32 index) {
        const u32 any = a.saved.exact_row[index < pass.rows ? pass.first + index : 0];
        row = index < pass.rows ? any : NONE;
        max = a.saved.statistics[any].max;
        factor = a.saved.statistics[any].inverse_sum * (a.backward.coefficients[any].softmax * down);
        target = a.saved.row_class[any];
    }
};

// Bias of a thread's classes among 64, first_class on.
template <class B> __device__ __forceinline__ void load_bias_of(const void* data, u32 first_class, float (&bias)[SIDE / 4]) {
    const B* from = static_cast<const B*>(data) + first_class + threadIdx.x % 4 * 2;
#pragma unroll
    for (u32 k = 0; k < SIDE / 4; ++k) bias[k] = prim::to_f32(from[k / 2 * 8 + k % 2]);
}
__device__ __forceinline__ void load_bias(const LceProblem& p, u32 first_class, float (&bias)[SIDE / 4]) {
    if (p.bias_type == TYPE_F32) load_bias_of<float>(p.bias, first_class, bias);
    else if (p.bias_type == TYPE_F16) load_bias_of<f16>(p.bias, first_class, bias);
    else load_bias_of<bf16>(p.bias, first_class, bias);
}

// Accumulators of 64 classes become G, where G is p times a factor, less a constant at the target. Straight code: branches would leave
// the latencies of a chain of five bare.
template <bool BIASED, bool CAPPED>
__device__ __forceinline__ void simple_gradients(const LceArgs& a, float down, const RowState (&rows)[2], u32 first_class, float* acc) {
    const LceProblem& p = a.problem;
    float bias[SIDE / 4] = {};
    if (BIASED) load_bias(p, first_class, bias);
    const float inverse_cap = CAPPED ? prim::div_rn(1.0f, p.softcap) : 1.0f, cap = CAPPED ? p.softcap : 1.0f;
    bool any_large = false;
#pragma unroll
    for (u32 i = 0; i < SIDE / 2; ++i) {
        acc[i] = prim::fma(acc[i], p.logit_scale, BIASED ? bias[i / 4 * 2 + i % 2] : 0.0f);
        if (CAPPED) acc[i] *= inverse_cap, any_large |= logit_map::is_large(acc[i]);
    }
    if (CAPPED && any_large) {
#pragma unroll
        for (u32 i = 0; i < SIDE / 2; ++i) acc[i] = logit_map::tanh(acc[i]);
    } else if (CAPPED) {
#pragma unroll
        for (u32 i = 0; i < SIDE / 2; ++i) acc[i] = logit_map::tanh_of_small(acc[i]);
    }
    u32 target[2];                           // from first_class
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        target[h] = rows[h].target - first_class;
#pragma unroll
        for (u32 k = 0; k < SIDE / 4; ++k) {
            float& value = acc[k / 2 * 4 + 2 * h + k % 2];
            const float slope = prim::fma(-value, value, 1.0f);      // of the softcap, where value is the tanh
            value = prim::ex2(((CAPPED ? cap * value : value) - rows[h].max) * LOG2_E) * rows[h].factor;
            if (CAPPED) value *= slope;
        }
    }
    if (!prim::any(target[0] < SIDE || target[1] < SIDE)) return;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 row = rows[h].row;
        const float at_target = down * a.backward.coefficients[row].target * logit_map::softcap_slope(p, a.saved.statistics[row].target_logit);
#pragma unroll
        for (u32 k = 0; k < SIDE / 4; ++k)
            if (target[h] == k / 2 * 8 + threadIdx.x % 4 * 2 + k % 2) acc[k / 2 * 4 + 2 * h + k % 2] -= at_target;
    }
}

// The same with every option, and at the edges: 0 for what does not exist. In a loop, through shared memory of the thread's own, since
// registers have no index: unrolled it would be most of the kernel. own[i * WARPGROUP] is a value's place.
__device__ __forceinline__ void any_gradients(const LceArgs& a, float down, const RowState (&rows)[2], u32 first_class, float* acc, float* own) {
    const LceProblem& p = a.problem;
#pragma unroll
    for (u32 i = 0; i < SIDE / 2; ++i) own[i * WARPGROUP] = acc[i];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 row = rows[h].row, any = row == NONE ? 0 : row;
        const LceRowStatistics statistics = a.saved.statistics[any];
        const LceCoefficients coefficients = a.backward.coefficients[any];
#pragma unroll 1
        for (u32 k = 0; k < SIDE / 4; ++k) {
            const u32 class_index = first_class + k / 2 * 8 + threadIdx.x % 4 * 2 + k % 2;
            float& value = own[(k / 2 * 4 + 2 * h + k % 2) * WARPGROUP];
            float g = 0.0f;
            if (row != NONE && class_index < p.vocab) {
                const float logit = logit_map::apply(p, value, logit_map::bias(p, class_index));
                const float weight = logit_map::class_weight(p, class_index);
                g = down * gradient::of_logit(p, statistics, coefficients, logit, weight, rows[h].target == class_index);
            }
            value = g;
        }
    }
#pragma unroll
    for (u32 i = 0; i < SIDE / 2; ++i) acc[i] = own[i * WARPGROUP];
}

// A block of G from registers to shared memory.
template <class T> __device__ __forceinline__ void stage_gradients(u8* staging, const float* acc, u32 thread) {
    const u32 lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (u32 pair = 0; pair < SIDE / 16; ++pair) {
        u32 packed[4];
#pragma unroll
        for (u32 j = 0; j < 2; ++j)
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                const float* from = acc + 4 * (2 * pair + j) + 2 * h;
                packed[2 * j + h] = prim::pack2<T>(from[0], from[1]);
            }
        prim::stmatrix_x4(staging + row * 128 + ((2 * pair + lane / 16) ^ row % 8) * 16, packed);
    }
}

template <class T> __device__ __forceinline__ void store_gradients(
    const LceArgs& a, Smem& smem, const Item& item, const RowState (&rows)[2], float (&acc)[ACCUMULATORS]
) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    const LceProblem& p = a.problem;
    const float down = smem.work.scale.down;
    const u32 tile_class = (smem.work.chunk.first_tile + item.column) * COLUMNS;
    // p times a factor, less a constant at the target: without entropy's gradient and smoothing, in a tile that is full.
    const bool simple = a.upstream.entropy == nullptr && p.label_smoothing == 0.0f && smem.work.pass.rows - item.row * ROWS >= ROWS && p.vocab - tile_class >= COLUMNS;
#pragma unroll
    for (u32 block = 0; block < B_BLOCKS; ++block) {
        float* own = acc + block * (SIDE / 2);
        const u32 first_class = tile_class + block * SIDE;
        if (!simple) {                           // in all of the consumer's staging
            if (thread == 0) prim::bulk_wait_read<0>();
            prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
            any_gradients(a, down, rows, first_class, own, reinterpret_cast<float*>(smem.staging[consumer]) + thread);
        } else if (p.softcap > 0.0f) {
            if (p.bias) simple_gradients<true, true>(a, down, rows, first_class, own);
            else simple_gradients<false, true>(a, down, rows, first_class, own);
        } else {
            if (p.bias) simple_gradients<true, false>(a, down, rows, first_class, own);
            else simple_gradients<false, false>(a, down, rows, first_class, own);
        }

        u8* staging = smem.staging[consumer][block % 2];
        if (thread == 0) prim::bulk_wait_read<1>();      // the copy that used this buffer is done with it
        prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
        stage_gradients<T>(staging, own, thread);
        prim::fence_proxy_async();
        prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
        if (thread == 0) {
            prim::bulk_store(gradient_block(a, smem.work, item.row * A_BLOCKS + consumer, item.column * B_BLOCKS + block), staging, BYTES);
            prim::bulk_commit();
        }
    }
}

// ---- consumers: a phase ---------------------------------------------------------------------------------------------------------
// ahead: steps that consumer 1 begins behind and stays behind, so that one's epilogue falls into the other's products; below STAGES. Merged
// tiles of dC are epilogues of both at once.
template <class T, u32 CLUSTER> __device__ __forceinline__ void consume(const LceArgs& a, u32 ahead, Smem& smem, Cursor& at) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    Ring& ring = smem.ring;
    // Consumer 1 begins when consumer 0 is `ahead` steps ahead, and stays behind: both have the same work.
    const auto begin = [&] {
        if (ahead > 0 && consumer == 1) prim::named_barrier_sync(BARRIER_LEAD, 2 * WARPGROUP);
    };
    const auto lead = [&](u32 step, u32 steps) {
        if (ahead > 0 && consumer == 0 && step + 1 == smaller(ahead, steps)) prim::named_barrier_arrive(BARRIER_LEAD, 2 * WARPGROUP);
    };
    for (;;) {
        const Item item = next_item(ring, at);
        if (item.steps == 0) {
            release<CLUSTER>(ring, at.stage);
            at.advance();
            if (item.kind == NONE_LEFT) break;
            if (item.kind == D_BIAS) store_d_bias<T>(a, smem, item);
            else store_sum_of_slices(a, smem, item);
            continue;
        }
        begin();
        const auto meanwhile = [&](u32 step) { lead(step, item.steps); };
        float acc[ACCUMULATORS];
        if (smem.work.phase == GRADIENTS) {
            RowState rows[2];
            const auto load_rows = [&] {
#pragma unroll
                for (u32 h = 0; h < 2; ++h)
                    rows[h].load(a, smem.work.pass, smem.work.scale.down, item.row * ROWS + consumer * SIDE + thread / 32 * 16 + thread % 32 / 4 + 8 * h);
            };
            multiply<T, CLUSTER, Major::K, Major::K>(acc, ring, at, item.steps, consumer, load_rows, meanwhile);
            if (CLUSTER == 1 || item.row < smem.work.row_tiles) store_gradients<T>(a, smem, item, rows, acc);
        } else if (item.kind == D_EMBEDDINGS) {
            multiply<T, CLUSTER, Major::K, Major::MN>(acc, ring, at, item.steps, consumer, [] {}, meanwhile);
            store_d_embeddings(a, smem, item, acc);
        } else {
            multiply<T, CLUSTER, Major::MN, Major::MN>(acc, ring, at, item.steps, consumer, [] {}, meanwhile);
            if (is_merged(smem.work, item)) store_merged_d_classifier<T, CLUSTER>(a, smem, item, at, acc);
            else store_d_classifier(a, smem, item, acc);
        }
        ahead = 0;                           // once begun, it is kept
    }
    if (thread == 0) prim::bulk_wait<0>();       // G has been written
}

// ---- the launch -----------------------------------------------------------------------------------------------------------------
// body() for every phase, by all threads, and what lies between. G is written and read by the copy engine: what has been written is handed
// on to it by a fence on either side of the barrier.
template <u32 CLUSTER, class Body> __device__ __forceinline__ void for_each_phase(const LceArgs& a, Work& work, Body body) {
    for (;;) {
        body();
        if (is_last_phase(work)) return;
        prim::named_barrier_sync(BARRIER_BLOCK, THREADS);            // nobody works on this phase any more
        if (threadIdx.x == 0) begin_next_phase<CLUSTER>(a, work);
        prim::fence_proxy_async_global();
        grid_barrier(a.backward.barrier, [] { prim::named_barrier_sync(BARRIER_BLOCK, THREADS); });
        prim::fence_proxy_async_global();
    }
}

template <class T, u32 CLUSTER> __device__ __forceinline__ void run(const LceHopperArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    if (exact::nothing_to_do(a.args)) return;
    if (threadIdx.x == 0) {
        initialise<CLUSTER>(smem.ring);
        begin<T, CLUSTER>(a.args, smem.work);
    }
    u32 rank = 0;
    if constexpr (CLUSTER == 1) {
        __syncthreads();
    } else {
        rank = prim::cluster_rank();
        prim::cluster_sync();
    }

    // Registers: 168 x 384 at the launch, 72 x 128 + 216 x 256 from here on.
    Cursor at;
    if (threadIdx.x < WARPGROUP) {
        prim::setmaxnreg_dec<72>();
        for_each_phase<CLUSTER>(a.args, smem.work, [&] { produce<CLUSTER>(a, smem, rank, at); });
    } else {
        prim::setmaxnreg_inc<216>();
        for_each_phase<CLUSTER>(a.args, smem.work, [&] { consume<T, CLUSTER>(a.args, a.lead, smem, at); });
    }
    // No block leaves while another may still write into its shared memory.
    if constexpr (CLUSTER > 1) {
        prim::syncwarp();
        prim::cluster_sync();
    }
}

}  // namespace

#define EXACT(name, type) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ LceHopperArgs a) { run<type, 1>(a); }
// Grids of an even number of blocks.
#define EXACT_CLUSTER(name, type) \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) name(const __grid_constant__ LceHopperArgs a) { run<type, 2>(a); }

EXACT(lce_exact_sm90_f16, f16)
EXACT(lce_exact_sm90_bf16, bf16)
EXACT_CLUSTER(lce_exact_sm90_cluster_f16, f16)
EXACT_CLUSTER(lce_exact_sm90_cluster_bf16, bf16)
