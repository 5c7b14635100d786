// The exact path: rows without a list of kept entries. Their logits once more, a chunk of the vocabulary at a time; the logit gradients G
// of the chunk in a bounded workspace; then the products dE += G C and dC = G^T E. One cooperative launch:
//
//     for each chunk of classes      (a)  G = gradient of the logits of E C^T          tiles of 128 rows x 128 classes
//         grid barrier               (b)  dE += G C, dC = G^T E, dbias = column sums of G      tiles of 128 x 128 of D
//         grid barrier
//     where there are slices         (c)  dE = their sum                               rows (exact_slices.cuh)
//
// Every output element has one owner, one order of additions and one rounding: dE waits in f32 accumulators for the last chunk, and a
// column of dC is complete with its chunk, what the sparse rows give to it included. With more rows than accumulators there are several
// passes (exact_passes.cuh).
//
// G is stored in the input type, divided by a power of two so that |G| <= 1 (f16: 2^14), and is 0 for rows and classes of a tile that
// do not exist: the products need no masks. The host provides round_up(X, 128) * 128 elements of workspace at least, X the number of
// exact rows, and at least round_up(min(X, exact_panel_rows), 128) * 128 follows from it.
#include "column_sum.cuh"
#include "deal.cuh"
#include "exact_passes.cuh"
#include "exact_slices.cuh"
#include "gradient.cuh"
#include "gradient_product.cuh"
#include "gradient_scale.cuh"
#include "grid_barrier.cuh"
#include "logit_map.cuh"
#include "logits_tile.cuh"
#include "sink.cuh"

namespace exact {

using prim::bf16;
using prim::f16;
using prim::Vec16;

// ---- sizes and shared memory ----------------------------------------------------------------------------------------------
constexpr u32 THREADS = 256;
// f32 in two parts needs more than 128 registers. Where a multiprocessor has 100 KiB of shared memory it holds one block anyway.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
template <class T> constexpr u32 BLOCKS_PER_SM = 1;
#else
template <class T> constexpr u32 BLOCKS_PER_SM = sizeof(T) == 4 ? 1 : 2;
#endif
constexpr u32 TILE = 128;                    // rows, classes or columns of D
constexpr u32 SEGMENT_TILES = 4;             // tiles of G that a block computes in a row, the copies running on across them
constexpr u32 GROUP_ROWS = 16;               // row tiles that the grid works on at a time, so that their E stays in L2
constexpr u32 STAGED_STRIDE = TILE + 4;      // words of a row of a staged tile: not all rows in the same banks
static_assert(THREADS == logits::THREADS && THREADS == gradient_product::THREADS, "one block does all phases");
static_assert(TILE == BLOCK_N && TILE == BLOCK_V && TILE == gradient_product::TILE, "one tile size in all phases");

struct GradientSmem {                        // phase (a)
    logits::Ring ring;
    LceRowStatistics statistics[TILE];
    LceCoefficients coefficients[TILE];
    u32 row_class[TILE];                     // NONE: no such row
    float bias[TILE];
    float class_weight[TILE];
};

struct ProductSmem {                         // phase (b)
    union {
        gradient_product::Ring ring;
        float staged[TILE * STAGED_STRIDE];  // a finished tile of dC, in f32
    };
    column_sum::Order order;
    float bias[TILE];
};

// ---- which rows, which classes --------------------------------------------------------------------------------------------
struct Chunk {
    u32 first;                               // class
    u32 tiles;
    u32 is_first, is_last;                   // 0 or 1
};

struct Segment {                             // of tiles of G that the block computes in a row
    u32 row0, rows;                          // from the pass's first row
    u32 first_tile, end_tile;                // of the vocabulary
};

enum class Product : u32 { D_EMBEDDINGS, D_CLASSIFIER, D_BIAS, NONE_LEFT };
struct Item {                                // a product
    Product kind;
    u32 tile, column0;                       // of rows or of classes; of D
    u32 slice;                               // of the chunk, for dE
};

// What the block is working on: in shared memory, where it costs the main loops no registers.
struct Work {
    gradient::Scale scale;
    Pass pass;
    u32 row_tiles;                           // of the pass
    u32 width;                               // classes of a chunk and row length of G, a multiple of TILE
    Chunk chunk;
    u32 slices, slice_tiles;                 // of a chunk as long as the first
    u32 segment_tiles;                       // most tiles of a segment
    Segment segment;
    u32 item;                                // of phase (a): this block's share is every gridDim.x-th
    u32 turn;                                // of phase (b): items that this block has had before
    Item product;
    u32 more;                                // 0: all is done
};

struct Smem {
    union {
        GradientSmem gradients;
        ProductSmem products;
    };
    Work work;
};
static_assert(sizeof(Smem) <= 96 * 1024, "devices with 99 KB of shared memory run one block");

__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return a / b + (a % b != 0); }
__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

// ---- phase (a): logit gradients of a chunk ----------------------------------------------------------------------------------
__device__ __forceinline__ void store_pair(float* to, float first, float second) {
    *reinterpret_cast<u64*>(to) = prim::f32_bits(first) | u64(prim::f32_bits(second)) << 32;
}
template <class T> __device__ __forceinline__ void store_pair(T* to, float first, float second) {
    *reinterpret_cast<u32*>(to) = prim::pack2<T>(first, second);
}

// What the 128 rows of a tile need beside their logits; before a barrier that for_each_tile has.
__device__ __forceinline__ void load_rows(const LceArgs& a, GradientSmem& smem, u32 first, u32 rows) {
    const u32 r = threadIdx.x;
    if (r >= rows || r >= TILE) return;
    const u32 row = a.saved.exact_row[first + r];
    smem.statistics[r] = a.saved.statistics[row];
    smem.coefficients[r] = a.backward.coefficients[row];
    smem.row_class[r] = a.saved.row_class[row];
}

__device__ __forceinline__ void load_classes(const LceProblem& p, GradientSmem& smem, u32 tile) {
    const u32 c = threadIdx.x, class_index = tile * TILE + c;
    if (c >= TILE || class_index >= p.vocab) return;
    smem.bias[c] = logit_map::bias(p, class_index);
    smem.class_weight[c] = logit_map::class_weight(p, class_index);
}

// One tile from products to G.
template <class T>
__device__ __forceinline__ void store_gradients(const LceArgs& a, const Smem& smem, u32 tile, const gradient_product::Accumulators& acc) {
    const LceProblem& p = a.problem;
    const GradientSmem& own = smem.gradients;
    const Segment segment = smem.work.segment;
    const u32 first_class = tile * TILE, classes = smaller(TILE, p.vocab - first_class), width = smem.work.width;
    const float down = smem.work.scale.down;
    const u32 thread = gradient_product::own_thread();
    T* to = static_cast<T*>(a.backward.exact_gradients) + u64(segment.row0) * width + (first_class - smem.work.chunk.first);
#pragma unroll
    for (u32 m = 0; m < 4; ++m)
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            const u32 r = gradient_product::row_of(thread, m, h);
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                const u32 c = gradient_product::column_of(thread, n);
                float g[2] = {};                 // 0 for what does not exist
#pragma unroll
                for (u32 i = 0; i < 2; ++i)
                    if (r < segment.rows && c + i < classes) {
                        const float logit = logit_map::apply(p, acc[m][n][2 * h + i], own.bias[c + i]);
                        const bool is_target = own.row_class[r] == first_class + c + i;
                        g[i] = down * gradient::of_logit(p, own.statistics[r], own.coefficients[r], logit, own.class_weight[c + i], is_target);
                    }
                store_pair(to + u64(r) * width + c, g[0], g[1]);
            }
        }
}

// Row tiles in groups, in a group all segments of classes, in a segment the group's row tiles: what the grid works on at a time is a
// near square of the plane.
__device__ __forceinline__ Segment segment_of(const Work& work, u32 item) {
    const u32 segments = div_up(work.chunk.tiles, work.segment_tiles);
    const u32 group = item / (GROUP_ROWS * segments), in_group = item % (GROUP_ROWS * segments);
    if (group * GROUP_ROWS >= work.row_tiles) return {work.pass.rows, 0, 0, 0};   // none is left
    const u32 height = smaller(GROUP_ROWS, work.row_tiles - group * GROUP_ROWS);
    const u32 row0 = (group * GROUP_ROWS + in_group % height) * TILE, tile = in_group / height * work.segment_tiles;
    const u32 first_tile = work.chunk.first / TILE;
    return {row0, smaller(TILE, work.pass.rows - row0), first_tile + tile,
            first_tile + smaller(tile + work.segment_tiles, work.chunk.tiles)};
}

template <class T, bool ALIGNED> __device__ __forceinline__ void gradients_of_chunk(const LceArgs& a, Smem& smem) {
    Work& work = smem.work;
    for (;;) {
        const Segment segment = segment_of(work, work.item);
        if (segment.row0 >= work.pass.rows) return;
        if (threadIdx.x == 0) work.segment = segment;
        load_rows(a, smem.gradients, work.pass.first + segment.row0, segment.rows);
        const u32* exact_row = a.saved.exact_row + work.pass.first + segment.row0;
        logits::for_each_tile<T, ALIGNED>(
            a.problem, smem.gradients.ring, segment.first_tile, segment.end_tile,
            [&](u32 r) { return a.saved.row_token[exact_row[r < segment.rows ? r : 0]]; },
            [&](u32 tile) { load_classes(a.problem, smem.gradients, tile); },
            [&](u32 tile, const gradient_product::Accumulators& acc) { store_gradients<T>(a, smem, tile, acc); });
        if (threadIdx.x == 0) work.item += gridDim.x;
        __syncthreads();
    }
}

// ---- phase (b): products ----------------------------------------------------------------------------------------------------
// This block's, dealt out beforehand. The longest work comes first: dE sums over the classes of a slice, dC over the rows.
__device__ __forceinline__ Item item_of(const LceProblem& p, const Work& work) {
    const u32 column_tiles = div_up(p.hidden, TILE), slices = div_up(work.chunk.tiles, work.slice_tiles);
    const u32 of_slice = work.row_tiles * column_tiles, d_embeddings = work.pass.d_embeddings * slices * of_slice;
    const u32 d_classifier = work.pass.d_classifier * work.chunk.tiles * column_tiles, d_bias = work.pass.d_bias * work.chunk.tiles;
    const bool classifier_first = work.row_tiles >= work.slice_tiles;
    const u32 longs = classifier_first ? d_classifier : d_embeddings;
    const u32 long_tiles = classifier_first ? work.row_tiles : work.slice_tiles, other_tiles = classifier_first ? work.slice_tiles : work.row_tiles;
    u32 at = share::Deal{blockIdx.x, gridDim.x, longs, long_tiles, other_tiles}.item(work.turn);
    if (at >= d_embeddings + d_classifier) {
        at -= d_embeddings + d_classifier;
        return {at < d_bias ? Product::D_BIAS : Product::NONE_LEFT, at, 0, 0};
    }
    const bool classifier = (at < longs) == classifier_first;
    if (at >= longs) at -= longs;
    if (classifier) return {Product::D_CLASSIFIER, at / column_tiles, at % column_tiles * TILE, 0};
    return {Product::D_EMBEDDINGS, at % of_slice / column_tiles, at % column_tiles * TILE, at / of_slice};
}

// By one thread.
__device__ __forceinline__ void begin_product(const LceProblem& p, Work& work, u32 turn) {
    work.turn = turn;
    work.product = item_of(p, work);
}

// dE of 128 exact rows and 128 columns: added to the slice's accumulators, or with the last chunk written where it has the only slice.
template <class T, bool ALIGNED> __device__ __forceinline__ void d_embeddings_tile(const LceArgs& a, ProductSmem& smem, const Work& work) {
    const LceProblem& p = a.problem;
    gradient_product::Accumulators acc;
    const Item& item = work.product;
    {
        const u32 before = item.slice * work.slice_tiles, tiles = smaller(work.slice_tiles, work.chunk.tiles - before);
        const gradient_product::Right<T, gradient_product::ClassRows> right = {
            static_cast<const T*>(p.classifier), p.classifier_stride, {work.chunk.first + before * TILE, p.vocab}, item.column0, p.hidden};
        const T* left = static_cast<const T*>(a.backward.exact_gradients) + u64(item.tile) * TILE * work.width + before * TILE;
        const u32 steps = tiles * (TILE / gradient_product::STEP<T>);
        gradient_product::multiply<T, false, ALIGNED>(acc, smem.ring, left, work.width, right, steps);
    }
    const float factor = work.scale.up * p.logit_scale;
    const u32 thread = gradient_product::own_thread();
#pragma unroll 1
    for (u32 m = 0; m < 4; ++m, gradient_product::shift_rows(acc))
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            const u32 r = item.tile * TILE + gradient_product::row_of(thread, m, h);
            if (r >= work.pass.rows) continue;
            float* sums = slice_sums(a, item.slice) + u64(r) * p.hidden;
            const bool writes = work.chunk.is_last && work.slices == 1;
            const u64 token = writes ? a.saved.row_token[a.saved.exact_row[work.pass.first + r]] : 0;
#pragma unroll
            for (u32 n = 0; n < 4; ++n)
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    const u32 column = item.column0 + gradient_product::column_of(thread, n) + i;
                    if (column >= p.hidden) continue;
                    float sum = acc[0][n][2 * h + i];
                    if (!work.chunk.is_first) sum += sums[column];
                    if (writes) sink::put_one(a.d_embeddings, token * p.hidden + column, sum * factor);
                    else sums[column] = sum;
                }
        }
}

// dC of 128 classes and 128 columns, staged.
template <class T, bool ALIGNED> __device__ __forceinline__ void d_classifier_tile(const LceArgs& a, ProductSmem& smem, const Work& work) {
    const LceProblem& p = a.problem;
    gradient_product::Accumulators acc;
    const Item& item = work.product;
    {
        const gradient_product::Right<T, gradient_product::ExactTokens> right = {      // a pass for dC begins with the first row
            static_cast<const T*>(p.embeddings), p.embeddings_stride, {a.saved.exact_row, a.saved.row_token, work.pass.rows}, item.column0, p.hidden};
        const T* left = static_cast<const T*>(a.backward.exact_gradients) + item.tile * TILE;
        const u32 steps = work.row_tiles * (TILE / gradient_product::STEP<T>);
        gradient_product::multiply<T, true, ALIGNED>(acc, smem.ring, left, work.width, right, steps);
    }
    gradient_product::stage<STAGED_STRIDE>(smem.staged, acc, work.scale.up * p.logit_scale);
}

// dbias of 128 classes, in smem.bias: a thread sums 16 bytes of columns over every GROUPS-th row, then the groups are added in order.
template <class T>
__device__ __forceinline__ void d_bias_tile(const LceArgs& a, ProductSmem& smem, const Work& work) {
    const u32 tile = work.product.tile, thread = gradient_product::own_thread();
    constexpr u32 VECTOR = 16 / sizeof(T), GROUPS = THREADS / (TILE / VECTOR);
    const u32 c = thread % (TILE / VECTOR) * VECTOR, group = thread / (TILE / VECTOR);
    const T* from = static_cast<const T*>(a.backward.exact_gradients) + tile * TILE + c;
    float sum[VECTOR] = {};
#pragma unroll 4
    for (u32 r = group; r < work.pass.rows; r += GROUPS)
        gather::add_scaled<T>(sum, 1.0f, prim::ld_global_16(from + u64(r) * work.width));
#pragma unroll
    for (u32 i = 0; i < VECTOR; ++i) smem.staged[group * TILE + c + i] = sum[i];
    __syncthreads();
    if (thread < TILE) {
        float total = 0.0f;
        for (u32 g = 0; g < GROUPS; ++g) total += smem.staged[g * TILE + thread];
        smem.bias[thread] = total * work.scale.up;
    }
}

// What the sparse rows give to the staged tile, or to smem.bias. Not inlined: what it derives from the thread's index would be computed
// at the kernel's start and take the main loops' registers.
template <class T, bool ALIGNED>
__device__ __attribute__((noinline)) void add_sparse_rows(const LceArgs& a, ProductSmem& smem, const Work& work) {
    if (!has_sparse_rows(a)) return;
    const Item& item = work.product;
    const bool bias = item.kind == Product::D_BIAS;
    const u32 first_class = work.chunk.first + item.tile * TILE, classes = smaller(TILE, a.problem.vocab - first_class);
    const u32 end = bias ? 0 : smaller(item.column0 + TILE, a.problem.hidden);
    float* to_bias = bias ? smem.bias : nullptr;
    // Rows of D elements may end within a vector though they begin at multiples of 16 bytes.
    if (ALIGNED && gather::aligned(gather::embeddings<T>(a.problem)))
        column_sum::add_to_tile<T, ALIGNED, TILE, column_sum::Block<THREADS>>(a, smem.order, first_class, classes, item.column0, end, smem.staged, STAGED_STRIDE, to_bias);
    else
        column_sum::add_to_tile<T, false, TILE, column_sum::Block<THREADS>>(a, smem.order, first_class, classes, item.column0, end, smem.staged, STAGED_STRIDE, to_bias);
}

__device__ __forceinline__ void write_columns(const LceArgs& a, const ProductSmem& smem, const Work& work) {
    const LceProblem& p = a.problem;
    const Item& item = work.product;
    const u32 first_class = work.chunk.first + item.tile * TILE, classes = smaller(TILE, p.vocab - first_class);
    const u32 thread = gradient_product::own_thread();
    if (item.kind == Product::D_BIAS) {
        if (thread < classes) sink::put_one(a.d_bias, first_class + thread, smem.bias[thread]);
        return;
    }
    const u32 c = thread % 32 * 4, column = item.column0 + c;
    for (u32 k = thread / 32; k < classes && column < p.hidden; k += THREADS / 32) {
        const Vec16 v = *reinterpret_cast<const Vec16*>(&smem.staged[k * STAGED_STRIDE + c]);
        const float values[4] = {prim::bits_f32(v.w[0]), prim::bits_f32(v.w[1]), prim::bits_f32(v.w[2]), prim::bits_f32(v.w[3])};
        sink::put<true>(a.d_classifier, u64(first_class + k) * p.hidden + column, values, p.hidden - column);
    }
}

template <class T, bool ALIGNED> __device__ __forceinline__ void products_of_chunk(const LceArgs& a, ProductSmem& smem, Work& work) {
    for (;;) {
        const Item& item = work.product;
        if (item.kind == Product::NONE_LEFT) return;
        if (item.kind == Product::D_EMBEDDINGS) {
            d_embeddings_tile<T, ALIGNED>(a, smem, work);
        } else {
            if (item.kind == Product::D_CLASSIFIER) d_classifier_tile<T, ALIGNED>(a, smem, work);
            else d_bias_tile<T>(a, smem, work);
            __syncthreads();
            add_sparse_rows<T, ALIGNED>(a, smem, work);
            write_columns(a, smem, work);
        }
        __syncthreads();
        if (threadIdx.x == 0) begin_product(a.problem, work, work.turn + 1);
        __syncthreads();
    }
}

// ---- phase (c): dE that was summed in slices ---------------------------------------------------------------------------------
__device__ __forceinline__ bool has_sums(const Work& work) { return work.pass.d_embeddings && work.slices > 1; }

__device__ __forceinline__ void sums_of_slices(const LceArgs& a, const Work& work) {
    for (u32 row = blockIdx.x; row < work.pass.rows; row += gridDim.x) {
        const u32 token = a.saved.row_token[a.saved.exact_row[work.pass.first + row]];
        add_slices(a, work.slices, row, token, work.scale.up * a.problem.logit_scale, threadIdx.x, THREADS);
    }
}

// ---- passes and chunks ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void begin_chunk(const LceArgs& a, Work& work, u32 first) {
    const u32 vocab_tiles = div_up(a.problem.vocab, TILE);
    Chunk& chunk = work.chunk;
    chunk.first = first;
    chunk.is_first = first == 0;
    chunk.is_last = a.problem.vocab - first <= work.width;
    chunk.tiles = chunk.is_last ? vocab_tiles - first / TILE : work.width / TILE;
    work.segment_tiles = work.row_tiles * chunk.tiles / gridDim.x >= 4 * SEGMENT_TILES ? SEGMENT_TILES : 1;    // few tiles: shared evenly
    work.item = blockIdx.x;
}

// The first chunk of work.pass, by one thread.
__device__ __forceinline__ void begin_pass(const LceArgs& a, Work& work) {
    const u32 vocab_tiles = div_up(a.problem.vocab, TILE);
    work.row_tiles = div_up(work.pass.rows, TILE);
    const u32 most_tiles = u32(a.backward.exact_gradients_elements / (TILE * TILE)) / work.row_tiles;
    work.width = div_up(vocab_tiles, div_up(vocab_tiles, most_tiles)) * TILE;      // equal chunks
    begin_chunk(a, work, 0);
    const Slices slices(work.chunk.tiles, a.exact_slices);
    work.slices = slices.count;
    work.slice_tiles = slices.length;
}

// The chunk after the present one, of the same pass or the next; false where there is none. By one thread.
__device__ __forceinline__ bool next(const LceArgs& a, Work& work) {
    if (!work.chunk.is_last) {
        begin_chunk(a, work, work.chunk.first + work.width);
        return true;
    }
    if (work.pass.is_last) return false;
    work.pass = next_pass(a, work.pass);
    begin_pass(a, work);
    return true;
}

template <class T, bool ALIGNED> __device__ __forceinline__ void run(const LceArgs& a) {
    Smem& smem = prim::shared_memory<Smem>();
    if (nothing_to_do(a)) return;
    if (threadIdx.x == 0) {
        smem.work.scale = gradient::scale_of<T>(a.backward.exact_scale[0]);
        smem.work.pass = first_pass(a);
        smem.work.more = 1;
        begin_pass(a, smem.work);
    }
    __syncthreads();
    while (smem.work.more) {
        gradients_of_chunk<T, ALIGNED>(a, smem);
        __syncthreads();
        if (threadIdx.x == 0) begin_product(a.problem, smem.work, 0);
        grid_barrier(a.backward.barrier);
        products_of_chunk<T, ALIGNED>(a, smem.products, smem.work);
        const bool sums = smem.work.chunk.is_last && has_sums(smem.work);    // before thread 0 goes on to the next chunk
        __syncthreads();
        if (sums) {
            grid_barrier(a.backward.barrier);    // all slices are there
            sums_of_slices(a, smem.work);
            __syncthreads();
        }
        if (threadIdx.x == 0) smem.work.more = next(a, smem.work);
        grid_barrier(a.backward.barrier);        // the products have read their G
    }
}

}  // namespace exact

// ---- entry points: base pointers and row strides of E and C multiples of 16 bytes and D > 0, or _unaligned ---------------------
extern "C" __global__ void __launch_bounds__(exact::THREADS, exact::BLOCKS_PER_SM<float>)
lce_exact_f32(const __grid_constant__ LceArgs a) { exact::run<float, true>(a); }
extern "C" __global__ void __launch_bounds__(exact::THREADS, exact::BLOCKS_PER_SM<prim::f16>)
lce_exact_f16(const __grid_constant__ LceArgs a) { exact::run<prim::f16, true>(a); }
extern "C" __global__ void __launch_bounds__(exact::THREADS, exact::BLOCKS_PER_SM<prim::bf16>)
lce_exact_bf16(const __grid_constant__ LceArgs a) { exact::run<prim::bf16, true>(a); }
extern "C" __global__ void __launch_bounds__(exact::THREADS, exact::BLOCKS_PER_SM<float>)
lce_exact_f32_unaligned(const __grid_constant__ LceArgs a) { exact::run<float, false>(a); }
extern "C" __global__ void __launch_bounds__(exact::THREADS, exact::BLOCKS_PER_SM<prim::f16>)
lce_exact_f16_unaligned(const __grid_constant__ LceArgs a) { exact::run<prim::f16, false>(a); }
extern "C" __global__ void __launch_bounds__(exact::THREADS, exact::BLOCKS_PER_SM<prim::bf16>)
lce_exact_bf16_unaligned(const __grid_constant__ LceArgs a) { exact::run<prim::bf16, false>(a); }
