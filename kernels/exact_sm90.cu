// The exact path on Hopper, where every row takes it: as in exact.cu the logits once more, a chunk of the vocabulary at a time, the logit
// gradients G of the chunk in a bounded workspace, then dE += G C and dC = G^T E. One cooperative launch of one block a multiprocessor:
//
//     for each chunk of classes      GRADIENTS       G = gradient of the logits of E C^T        tiles of 128 rows x 256 classes
//         grid barrier               PRODUCTS        dE += G C, dC = G^T E, dbias               tiles of 128 rows or classes x 256 of D
//         grid barrier
//
//   warp 0              producer: draws the next item of work and feeds its blocks to the ring, across items
//   warpgroups 1, 2     consumers: 64 rows each of the same tile; products, then their epilogue, by themselves
//
// Items are drawn from one counter, longest first, so that a phase ends evenly; who computes a tile changes nothing in it. Every output
// element has one owner, one order of additions and one rounding: dE waits in f32 accumulators for the last chunk, a column of dC is
// complete with its chunk. dbias sums G as stored.
//
// G is stored in the input type, divided by a power of two (gradient_scale.cuh), as the image of the stages' blocks: block (r, c) of 64
// rows x 64 classes at r * blocks of the chunk + c, swizzled. So one G, once written, is K-major for dE and MN-major for dC, and
// copies of 8 KiB need no tensor map. Rows and classes of a tile that do not exist are 0 in it: the products need no masks.
#include "gradient.cuh"
#include "gradient_scale.cuh"
#include "grid_barrier.cuh"
#include "hopper_blocks.cuh"
#include "sink.cuh"

namespace {

using namespace blocks;
using prim::bf16;
using prim::f16;
using prim::Vec16;

// ---- sizes and shared memory ------------------------------------------------------------------------------------------------
constexpr u32 LEAD = 2;                      // steps that consumer 1 stays behind: one's epilogue falls into the other's products; below STAGES
constexpr u32 GROUP_ROWS = 16;               // row tiles that the grid works on at a time, so that their E stays in L2
constexpr u32 CLASS_TILE = ROWS;             // classes of a tile of dC
enum Barrier { BARRIER_LEAD = 1, BARRIER_CONSUMER, BARRIER_BLOCK = BARRIER_CONSUMER + CONSUMERS };   // named barriers
enum Phase : u32 { GRADIENTS, PRODUCTS, PHASES };
enum Kind : u32 { GRADIENT_TILE, D_EMBEDDINGS, D_CLASSIFIER, D_BIAS, NONE_LEFT };

// What there is to do, in shared memory, where it costs no registers.
struct Work {
    gradient::Scale scale;
    u32 rows, row_tiles;                     // exact rows
    u32 vocab_tiles, chunk_tiles;            // of COLUMNS classes: in all, in a chunk
    u32 column_tiles;                        // of COLUMNS of D
    u32 d_embeddings, d_classifier, d_bias;  // 0 or 1
};

struct Smem {
    Ring ring;
    alignas(1024) u8 staging[CONSUMERS][2][BYTES];   // blocks of G on their way out
    Work work;
};
static_assert(sizeof(Smem) <= 227 * 1024, "shared memory of lce_exact_sm90");

struct Chunk {
    u32 first_tile, tiles;                   // of COLUMNS classes
    u32 classes;
    bool is_first, is_last;
};

__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return a / b + (a % b != 0); }
__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

template <class T> __device__ __forceinline__ Work work_of(const LceArgs& a) {
    Work w;
    w.scale = gradient::scale_of<T>(a.backward.exact_scale[0]);
    w.rows = a.saved.header->exact_rows;
    w.row_tiles = div_up(w.rows, ROWS);
    w.vocab_tiles = div_up(a.problem.vocab, COLUMNS);
    const u32 most_tiles = u32(a.backward.exact_gradients_elements / (u64(w.row_tiles) * ROWS * COLUMNS));
    w.chunk_tiles = div_up(w.vocab_tiles, div_up(w.vocab_tiles, most_tiles));    // equal chunks
    w.column_tiles = div_up(a.problem.hidden, COLUMNS);
    w.d_embeddings = a.d_embeddings.mode != SINK_SKIP;
    w.d_classifier = a.d_classifier.mode != SINK_SKIP;
    w.d_bias = a.d_bias.mode != SINK_SKIP;
    return w;
}

__device__ __forceinline__ Chunk chunk_of(const LceProblem& p, const Work& work, u32 first_tile) {
    const u32 tiles = smaller(work.chunk_tiles, work.vocab_tiles - first_tile);
    return {first_tile, tiles, smaller(tiles * COLUMNS, p.vocab - first_tile * COLUMNS), first_tile == 0, first_tile + tiles == work.vocab_tiles};
}

// Block (r, c) of the chunk's G.
__device__ __forceinline__ u8* gradient_block(const LceArgs& a, const Work& work, u32 r, u32 c) {
    return static_cast<u8*>(a.backward.exact_gradients) + (u64(r) * (work.chunk_tiles * B_BLOCKS) + c) * BYTES;
}

// ---- items ------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ u32 class_tiles(const Chunk& chunk) { return div_up(chunk.classes, CLASS_TILE); }

__device__ __forceinline__ u32 count_items(const Work& work, const Chunk& chunk, u32 phase) {
    if (phase == GRADIENTS) return work.row_tiles * chunk.tiles;
    return (work.d_embeddings * work.row_tiles + work.d_classifier * class_tiles(chunk)) * work.column_tiles + work.d_bias * class_tiles(chunk);
}

// Row tiles in groups, in a group all tiles of classes, in those the group's row tiles: what the grid works on at a time is a near square.
__device__ __forceinline__ Item gradient_item(const LceProblem& p, const Work& work, const Chunk& chunk, u32 index) {
    const u32 group = index / (GROUP_ROWS * chunk.tiles), in_group = index % (GROUP_ROWS * chunk.tiles);
    const u32 height = smaller(GROUP_ROWS, work.row_tiles - group * GROUP_ROWS);
    return {GRADIENT_TILE, group * GROUP_ROWS + in_group % height, in_group / height, div_up(p.hidden, SIDE)};
}

// The longer sums come first; all columns of a tile in a row, so that they find its G in L2.
__device__ __forceinline__ Item product_item(const Work& work, const Chunk& chunk, u32 index) {
    const u32 columns = work.column_tiles;
    const u32 row_steps = div_up(work.rows, SIDE), class_steps = div_up(chunk.classes, SIDE);
    const u32 d_embeddings = work.d_embeddings * work.row_tiles * columns, d_classifier = work.d_classifier * class_tiles(chunk) * columns;
    const bool classifier_first = row_steps >= class_steps;
    const u32 first = classifier_first ? d_classifier : d_embeddings;
    if (index >= d_embeddings + d_classifier) return {D_BIAS, index - d_embeddings - d_classifier, 0, 0};
    const bool classifier = (index < first) == classifier_first;
    const u32 at = index < first ? index : index - first;
    if (classifier) return {D_CLASSIFIER, at / columns, at % columns, row_steps};
    return {D_EMBEDDINGS, at / columns, at % columns, class_steps};
}

__device__ __forceinline__ Item item_of(const LceProblem& p, const Work& work, const Chunk& chunk, u32 phase, u32 index) {
    if (index >= count_items(work, chunk, phase)) return {NONE_LEFT, 0, 0, 0};
    return phase == GRADIENTS ? gradient_item(p, work, chunk, index) : product_item(work, chunk, index);
}

// ---- between phases -----------------------------------------------------------------------------------------------------------
// All threads of all blocks. G is written and read by the copy engine: what has been written is handed on to it by a fence on either side.
__device__ __forceinline__ void next_phase(const LceArgs& a) {
    prim::fence_proxy_async_global();
    grid_barrier(a.backward.barrier, [] { prim::named_barrier_sync(BARRIER_BLOCK, THREADS); });
    prim::fence_proxy_async_global();
}

// ---- producer -----------------------------------------------------------------------------------------------------------------
// One step of an item, by the whole warp: lanes 0 to 15 load what lies 8 rows a lane, the others whole blocks. rows: of E.
__device__ __forceinline__ void load_step(
    const LceHopperArgs& a, const Work& work, const Chunk& chunk, const Item& item, const Rows& rows, Ring& ring, u32 stage, u32 step
) {
    const u32 lane = threadIdx.x % 32, first_class = chunk.first_tile * COLUMNS;
    u64* full = &ring.full[stage];
    if (item.kind == GRADIENT_TILE) {        // E [rows, D], C [classes, D]
        rows.load(a, ring.a[stage][lane / 8 % A_BLOCKS], full, step * SIDE, work.rows);
        if (lane >= 16 && lane < 16 + B_BLOCKS) {
            const u32 class_index = first_class + item.column * COLUMNS + (lane - 16) * SIDE;
            prim::tma_load_2d(ring.b[stage][lane - 16], &a.classifier, full, int(step * SIDE), int(class_index), prim::L2::Normal);
        }
    } else if (item.kind == D_EMBEDDINGS) {  // G [rows, classes], C [classes, D]
        if (lane >= 16 && lane < 16 + B_BLOCKS)
            prim::tma_load_2d(ring.b[stage][lane - 16], &a.classifier, full, int(item.column * COLUMNS + (lane - 16) * SIDE), int(first_class + step * SIDE), prim::L2::Normal);
        else if (lane < A_BLOCKS)
            prim::bulk_load(ring.a[stage][lane], gradient_block(a.args, work, item.row * A_BLOCKS + lane, step), BYTES, full);
    } else {                                 // G [rows, classes], E [rows, D]
        for (u32 block = 0; block < B_BLOCKS; ++block)
            rows.load(a, ring.b[stage][block], full, item.column * COLUMNS + block * SIDE, work.rows);
        if (lane >= 16 && lane < 16 + A_BLOCKS)
            prim::bulk_load(ring.a[stage][lane - 16], gradient_block(a.args, work, step, item.row * A_BLOCKS + lane - 16), BYTES, full);
    }
}

// drawn: items that all blocks together have drawn before this phase.
__device__ __forceinline__ void produce(const LceHopperArgs& a, Smem& smem, const Chunk& chunk, u32 phase, u32 drawn, Cursor& at) {
    const Work& work = smem.work;
    u32* counter = a.args.backward.barrier + 2;
    for (;;) {
        const u32 index = prim::shfl_idx(threadIdx.x == 0 ? prim::atomic_add(counter, 1u) - drawn : 0, 0);
        const Item item = item_of(a.args.problem, work, chunk, phase, index);
        if (item.steps == 0) {               // nothing to load
            begin_stage(smem.ring, at, item, 0);
            at.advance();
            if (item.kind == NONE_LEFT) return;
            continue;
        }
        // Rows of E: of the tile, or of this step of the sum. Those of the next step are looked up while the ring is full.
        Rows rows(a.args, item.kind == GRADIENT_TILE ? item.row * ROWS : 0, work.rows, item.kind == GRADIENT_TILE ? ROWS / 8 : SIDE / 8);
        for (u32 step = 0; step < item.steps; ++step, at.advance()) {
            begin_stage(smem.ring, at, item, STAGE_BYTES);
            load_step(a, work, chunk, item, rows, smem.ring, at.stage, step);
            if (item.kind == D_CLASSIFIER) rows = Rows(a.args, (step + 1) * SIDE, work.rows, SIDE / 8);
        }
    }
}

// ---- consumers: logit gradients -------------------------------------------------------------------------------------------------
constexpr float LOG2_E = 1.4426950408889634f;

struct RowState {                            // of one of a thread's two rows
    LceRowStatistics statistics;
    LceCoefficients coefficients;
    u32 target;
    bool exists;

    __device__ __forceinline__ void load(const LceArgs& a, u32 index, u32 rows) {
        exists = index < rows;
        const u32 row = a.saved.exact_row[exists ? index : 0];
        statistics = a.saved.statistics[row];
        coefficients = a.backward.coefficients[row];
        target = a.saved.row_class[row];
    }
};

// Accumulators of 64 classes become G, where G is p times a factor, less a constant at the target.
template <bool CAPPED>
__device__ __forceinline__ void simple_gradients(const LceProblem& p, float down, const RowState (&rows)[2], u32 first_class, float* acc) {
    const float inverse_cap = CAPPED ? prim::div_rn(1.0f, p.softcap) : 0.0f;
    float factor[2];
    u32 target[2];                           // from first_class
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        factor[h] = rows[h].statistics.inverse_sum * (rows[h].coefficients.softmax * down);
        target[h] = rows[h].target - first_class;
    }
#pragma unroll
    for (u32 c = 0; c < SIDE / 8; ++c)
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const float bias = p.bias ? logit_map::bias(p, first_class + 8 * c + threadIdx.x % 4 * 2 + i) : 0.0f;
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                float& value = acc[4 * c + 2 * h + i];
                float z = prim::fma(value, p.logit_scale, bias), slope = 1.0f;
                if (CAPPED) {
                    const float t = logit_map::tanh(z * inverse_cap);
                    z = p.softcap * t;
                    slope = prim::fma(-t, t, 1.0f);
                }
                value = prim::ex2((z - rows[h].statistics.max) * LOG2_E) * factor[h];
                if (CAPPED) value *= slope;
            }
        }
    if (!prim::any(target[0] < SIDE || target[1] < SIDE)) return;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const float at_target = down * rows[h].coefficients.target * logit_map::softcap_slope(p, rows[h].statistics.target_logit);
#pragma unroll
        for (u32 c = 0; c < SIDE / 8; ++c)
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                if (target[h] == 8 * c + threadIdx.x % 4 * 2 + i) acc[4 * c + 2 * h + i] -= at_target;
    }
}

// The same with every option, and at the edges: 0 for what does not exist. In a loop, through shared memory of the thread's own, since
// registers have no index: unrolled it would be most of the kernel. own[i * WARPGROUP] is a value's place.
__device__ __forceinline__ void any_gradients(const LceProblem& p, float down, const RowState (&rows)[2], u32 first_class, float* acc, float* own) {
#pragma unroll
    for (u32 i = 0; i < SIDE / 2; ++i) own[i * WARPGROUP] = acc[i];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const RowState& row = rows[h];
#pragma unroll 1
        for (u32 k = 0; k < SIDE / 4; ++k) {
            const u32 class_index = first_class + k / 2 * 8 + threadIdx.x % 4 * 2 + k % 2;
            float& value = own[(k / 2 * 4 + 2 * h + k % 2) * WARPGROUP];
            float g = 0.0f;
            if (row.exists && class_index < p.vocab) {
                const float logit = logit_map::apply(p, value, logit_map::bias(p, class_index));
                const float weight = logit_map::class_weight(p, class_index);
                g = down * gradient::of_logit(p, row.statistics, row.coefficients, logit, weight, row.target == class_index);
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
    const LceArgs& a, Smem& smem, const Chunk& chunk, const Item& item, const RowState (&rows)[2], float (&acc)[ACCUMULATORS]
) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    const LceProblem& p = a.problem;
    const float down = smem.work.scale.down;
    const u32 tile_class = (chunk.first_tile + item.column) * COLUMNS;
    // p times a factor, less a constant at the target: without entropy's gradient and smoothing, in a tile that is full.
    const bool simple = a.upstream.entropy == nullptr && p.label_smoothing == 0.0f && smem.work.rows - item.row * ROWS >= ROWS && p.vocab - tile_class >= COLUMNS;
#pragma unroll
    for (u32 block = 0; block < B_BLOCKS; ++block) {
        float* own = acc + block * (SIDE / 2);
        const u32 first_class = tile_class + block * SIDE;
        if (!simple) {                           // in all of the consumer's staging
            if (thread == 0) prim::bulk_wait_read<0>();
            prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
            any_gradients(p, down, rows, first_class, own, reinterpret_cast<float*>(smem.staging[consumer]) + thread);
        } else if (p.softcap > 0.0f) simple_gradients<true>(p, down, rows, first_class, own);
        else simple_gradients<false>(p, down, rows, first_class, own);

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

// ---- consumers: outputs ---------------------------------------------------------------------------------------------------------
// dE of 64 exact rows and 256 columns: added to the accumulators, or with the last chunk written.
__device__ __forceinline__ void store_d_embeddings(
    const LceArgs& a, const Work& work, const Chunk& chunk, const Item& item, const float (&acc)[ACCUMULATORS]
) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = thread % 32, hidden = a.problem.hidden;
    const float factor = work.scale.up * a.problem.logit_scale;
    const LceSink accumulators = {a.backward.exact_d_embeddings, TYPE_F32, chunk.is_first ? SINK_OVERWRITE : SINK_ACCUMULATE};
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 r = item.row * ROWS + consumer * SIDE + thread / 32 * 16 + lane / 4 + 8 * h;
        if (r >= work.rows) continue;
        const u64 row = u64(r) * hidden, token_row = chunk.is_last ? u64(Rows::token_of(a, r)) * hidden : 0;
#pragma unroll
        for (u32 c = 0; c < COLUMNS / 8; ++c) {
            const u32 column = item.column * COLUMNS + 8 * c + lane % 4 * 2;
            if (column >= hidden) break;
            const bool both = column + 1 < hidden;
            float first = acc[4 * c + 2 * h], second = acc[4 * c + 2 * h + 1];
            if (!chunk.is_last) {
                sink::put_pair(accumulators, row + column, first, second, both);
                continue;
            }
            if (!chunk.is_first) {
                first += a.backward.exact_d_embeddings[row + column];
                if (both) second += a.backward.exact_d_embeddings[row + column + 1];
            }
            sink::put_pair(a.d_embeddings, token_row + column, first * factor, second * factor, both);
        }
    }
}

// dC of 64 classes and 256 columns.
__device__ __forceinline__ void store_d_classifier(
    const LceArgs& a, const Work& work, const Chunk& chunk, const Item& item, const float (&acc)[ACCUMULATORS]
) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = thread % 32, hidden = a.problem.hidden;
    const float factor = work.scale.up * a.problem.logit_scale;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 in_chunk = item.row * CLASS_TILE + consumer * SIDE + thread / 32 * 16 + lane / 4 + 8 * h;
        if (in_chunk >= chunk.classes) continue;
        const u64 row = u64(chunk.first_tile * COLUMNS + in_chunk) * hidden;
#pragma unroll
        for (u32 c = 0; c < COLUMNS / 8; ++c) {
            const u32 column = item.column * COLUMNS + 8 * c + lane % 4 * 2;
            if (column >= hidden) break;
            sink::put_pair(a.d_classifier, row + column, acc[4 * c + 2 * h] * factor, acc[4 * c + 2 * h + 1] * factor, column + 1 < hidden);
        }
    }
}

// dbias of 64 classes: a thread sums 8 classes over every 16th row, then the sums are added in order.
template <class T>
__device__ __forceinline__ void store_d_bias(const LceArgs& a, Smem& smem, const Chunk& chunk, const Item& item) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, eight = thread % 8, group = thread / 8;
    const u32 block = item.row * A_BLOCKS + consumer;
    constexpr u32 GROUPS = WARPGROUP / 8;
    float* sums = reinterpret_cast<float*>(smem.staging[consumer][0]);   // [GROUPS, SIDE]
    float sum[8] = {};
    for (u32 r = group; r < smem.work.rows; r += GROUPS) {
        const u32 in_block = r % SIDE;
        const Vec16 v = prim::ld_global_16(gradient_block(a, smem.work, r / SIDE, block) + in_block * 128 + (eight ^ in_block % 8) * 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            sum[2 * i] += prim::unpack_lo<T>(v.w[i]);
            sum[2 * i + 1] += prim::unpack_hi<T>(v.w[i]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i) sums[group * SIDE + eight * 8 + i] = sum[i];
    prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
    if (thread < SIDE && block * SIDE + thread < chunk.classes) {
        float total = 0.0f;
        for (u32 g = 0; g < GROUPS; ++g) total += sums[g * SIDE + thread];
        sink::put_one(a.d_bias, chunk.first_tile * COLUMNS + block * SIDE + thread, total * smem.work.scale.up);
    }
    prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);
}

// ---- consumers: a phase ---------------------------------------------------------------------------------------------------------
template <class T> __device__ __forceinline__ void consume(const LceArgs& a, Smem& smem, const Chunk& chunk, u32 phase, Cursor& at) {
    const u32 consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    Ring& ring = smem.ring;
    bool started = false;
    // Consumer 1 begins when consumer 0 is LEAD steps ahead, and stays behind: both have the same work.
    const auto begin = [&] {
        if (LEAD > 0 && !started && consumer == 1) prim::named_barrier_sync(BARRIER_LEAD, 2 * WARPGROUP);
    };
    const auto lead = [&](u32 step, u32 steps) {
        if (LEAD > 0 && !started && consumer == 0 && step + 1 == smaller(LEAD, steps)) prim::named_barrier_arrive(BARRIER_LEAD, 2 * WARPGROUP);
    };
    for (;;) {
        const Item item = next_item(ring, at);
        if (item.steps == 0) {
            release(ring, at.stage);
            at.advance();
            if (item.kind == NONE_LEFT) break;
            store_d_bias<T>(a, smem, chunk, item);
            continue;
        }
        begin();
        const auto meanwhile = [&](u32 step) { lead(step, item.steps); };
        float acc[ACCUMULATORS];
        if (phase == GRADIENTS) {
            RowState rows[2];
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                rows[h].load(a, item.row * ROWS + consumer * SIDE + thread / 32 * 16 + thread % 32 / 4 + 8 * h, smem.work.rows);
            multiply<T, Major::K, Major::K>(acc, ring, at, item.steps, consumer, meanwhile);
            store_gradients<T>(a, smem, chunk, item, rows, acc);
        } else if (item.kind == D_EMBEDDINGS) {
            multiply<T, Major::K, Major::MN>(acc, ring, at, item.steps, consumer, meanwhile);
            store_d_embeddings(a, smem.work, chunk, item, acc);
        } else {
            multiply<T, Major::MN, Major::MN>(acc, ring, at, item.steps, consumer, meanwhile);
            store_d_classifier(a, smem.work, chunk, item, acc);
        }
        started = true;
    }
    if (thread == 0) prim::bulk_wait<0>();       // G has been written
}

// ---- the launch -----------------------------------------------------------------------------------------------------------------
// body(chunk, phase, items drawn before) for every phase of every chunk, by all threads, and the barrier after each.
template <class Body> __device__ __forceinline__ void for_each_phase(const LceArgs& a, const Work& work, Body body) {
    u32 drawn = 0;
    for (u32 first_tile = 0; first_tile < work.vocab_tiles; first_tile += work.chunk_tiles) {
        const Chunk chunk = chunk_of(a.problem, work, first_tile);
        for (u32 phase = GRADIENTS; phase < PHASES; ++phase) {
            body(chunk, phase, drawn);
            drawn += count_items(work, chunk, phase) + gridDim.x;    // each block draws one that is not there
            next_phase(a);
        }
    }
}

template <class T> __device__ __forceinline__ void run(const LceHopperArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    if (a.args.saved.header->exact_rows == 0) return;
    if (threadIdx.x == 0) {
        initialise(smem.ring);
        smem.work = work_of<T>(a.args);
    }
    __syncthreads();

    // Registers: 168 x 384 at the launch, 72 x 128 + 216 x 256 from here on.
    Cursor at;
    if (threadIdx.x < WARPGROUP) {
        prim::setmaxnreg_dec<72>();
        for_each_phase(a.args, smem.work, [&](const Chunk& chunk, u32 phase, u32 drawn) {
            if (threadIdx.x < 32) produce(a, smem, chunk, phase, drawn, at);
        });
    } else {
        prim::setmaxnreg_inc<216>();
        for_each_phase(a.args, smem.work, [&](const Chunk& chunk, u32 phase, u32) { consume<T>(a.args, smem, chunk, phase, at); });
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1) lce_exact_sm90_f16(const __grid_constant__ LceHopperArgs a) { run<prim::f16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) lce_exact_sm90_bf16(const __grid_constant__ LceHopperArgs a) { run<prim::bf16>(a); }
