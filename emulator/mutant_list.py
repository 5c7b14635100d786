"""What mutants.py seeds: name, file, replacements, translation units to compile again, test.

A test is `case/filter` of tests/common/cases.rs under the checker (filter: 0 exact, 1 unbiased with a large eps, 2 the default, 3 threshold), or
`kernels name` or `hopper name`, a test of emulator/tests, or `cuda_hopper name/cases`, a test of tests/cuda_hopper.rs with some of its cases.
"(legal)" in a name: no alarm may be raised. A replacement in another file names it.
"""

K = "kernels/"
G80, G90, LSE = "emulator/kernels/gemm_sm80.cuh", "emulator/kernels/gemm_sm90.cuh", "emulator/kernels/row_lse.cuh"


def mutant(name, file, old, new, units, test, *more):
    return (name, file, [(old, new), *more], units.split(), test)


# ---- the shipped kernels ---------------------------------------------------------------------------------------------
SHIPPED = [
    # lce_rows, block_scan
    mutant("no barrier of its own for the bad-target flag: the scan has some (legal)", K + "rows.cu",
           "smem.first_bad = NONE;\n    __syncthreads();", "smem.first_bad = NONE;", "rows", "one_token/1"),
    mutant("the scan's space used again without a barrier", K + "block_scan.cuh",
           "    __syncthreads();                         // the space may be used again\n", "", "filter", "large_token_block_plus_1/1"),
    mutant("no barrier before the warps' sums are read", K + "block_scan.cuh",
           "space.warp_sum[warp] = inclusive;\n    __syncthreads();", "space.warp_sum[warp] = inclusive;", "rows", "group_edge/1"),
    mutant("scan includes the thread's own value", K + "block_scan.cuh",
           "return before + inclusive - value;", "return before + inclusive;", "rows", "group_edge/1"),
    mutant("no barrier inside the tree sum", K + "block_scan.cuh",
           "space.value[threadIdx.x + half];\n        __syncthreads();", "space.value[threadIdx.x + half];", "rows", "group_edge/1"),
    mutant("last token of a round of four left out", K + "rows.cu",
           "if (token >= p.tokens) continue;\n            clear_outputs", "if (token + 1 >= p.tokens) continue;\n            clear_outputs", "rows", "one_token/1"),
    mutant("shift across the end of a sequence", K + "rows.cu",
           "p.shift < p.seq_len;", "p.shift <= p.seq_len;", "rows", "shift_in_two_sequences/1"),
    # lce_filter, lce_order_entries, lce_exact_rows
    mutant("wrong Weyl step in the final filter", K + "filter.cuh",
           "WEYL_STEP = 0x9E3779B9u", "WEYL_STEP = 0x7F4A7C15u", "filter", "two_tiles_plus_1/1"),
    mutant("filter: no barrier between count and scan", K + "filter.cu",
           "CLASS_BITS], 1u);\n        }\n    }\n    __syncthreads();", "CLASS_BITS], 1u);\n        }\n    }", "filter", "two_tiles_plus_1/1"),
    mutant("filter: no barrier before the scatter", K + "filter.cu",
           "if (overflowed || !fits) return;\n    __syncthreads();", "if (overflowed || !fits) return;", "filter", "two_tiles_plus_1/1"),
    mutant("filter: += in place of an atomic", K + "filter.cu",
           "prim::atomic_add(&smem.count[candidate.index >> CLASS_BITS], 1u);", "smem.count[candidate.index >> CLASS_BITS] += 1;", "filter", "two_tiles_plus_1/1"),
    mutant("filter: the target counted twice", K + "filter.cu",
           "if (smem.target[row] == NONE || smem.target[row] == v) return false;", "if (smem.target[row] == NONE) return false;", "filter", "two_tiles_plus_1/1"),
    mutant("filter: row bound off by one", K + "filter.cu",
           "const u32 rows = num_rows - first_row < BLOCK_N ? num_rows - first_row : BLOCK_N;",
           "const u32 rows = num_rows - first_row < BLOCK_N ? num_rows - first_row + 1 : BLOCK_N;", "filter", "group_edge/1"),
    mutant("order: no syncwarp between reading and writing the list", K + "filter.cu",
           "    prim::syncwarp();                        // all have read\n", "", "filter", "two_tiles_plus_1/1"),
    mutant("order: no barrier after the bitmap is cleared", K + "filter.cu",
           "smem.bitmap[w] = 0;\n        __syncthreads();", "smem.bitmap[w] = 0;", "filter", "flat/1"),
    mutant("order: bits set without an atomic", K + "filter.cu",
           "prim::atomic_or(&smem.bitmap[word_at(v / 32)], 1u << v % 32)", "smem.bitmap[word_at(v / 32)] |= 1u << v % 32", "filter", "flat/1"),
    mutant("order: a tie moves an entry (<=)", K + "filter.cu",
           "prim::shfl_idx(entry.index, int(k)) < entry.index", "prim::shfl_idx(entry.index, int(k)) <= entry.index", "filter", "two_tiles_plus_1/1"),
    mutant("exact rows: a row with a bad target counted", K + "filter.cu",
           "if (row < num_rows && a.saved.row_class[row] != NONE) {", "if (row <= num_rows && a.saved.row_class[row] != NONE) {", "filter", "group_edge/1"),
    # columns, dC, dE
    mutant("column scan: the last class left out", K + "columns.cu",
           "if (first + i < vocab) a.backward.column_begin", "if (first + i + 1 < vocab) a.backward.column_begin", "columns", "two_tiles_plus_1/1"),
    mutant("column scatter without an atomic", K + "columns.cu",
           "prim::atomic_add(&a.backward.column_begin[entry.index + 1], 1u)] = {token, g};", "a.backward.column_begin[entry.index + 1]++] = {token, g};", "columns", "two_tiles_plus_1/1"),
    mutant("column scatter: the row in place of its token", K + "columns.cu",
           "= {token, g};", "= {row, g};", "columns", "two_tiles_plus_1/1"),
    mutant("popular classes never listed", K + "columns.cu",
           "values[i] > column_sum::WARP_LIST", "values[i] > 100000u", "columns", "ignored_class_inside/1"),
    mutant("dC: no barrier before a segment is used again", K + "column_sum.cuh",
           "    __syncthreads();                             // the segment before this one has been used\n", "", "d_classifier", "long_batch/1"),
    mutant("dC: no barrier after the segment's bits", K + "column_sum.cuh",
           "prim::atomic_min(&order.next, least);\n    __syncthreads();", "prim::atomic_min(&order.next, least);", "d_classifier", "one_class/1"),
    mutant("dC: groups' sums added without a barrier", K + "column_sum.cuh",
           "order.bias[threadIdx.x / 32] = bias;\n    __syncthreads();", "order.bias[threadIdx.x / 32] = bias;", "d_classifier", "one_class/1"),
    mutant("dC: the short last batch forgotten", K + "column_sum.cuh",
           "    if (k >= count) return;\n    Vec16 v[BATCH];", "    if (k >= 0) return;\n    Vec16 v[BATCH];", "d_classifier", "ignored_class_inside/1"),
    mutant("dC: two warps own a class", K + "d_classifier.cu",
           "block * CLASSES + threadIdx.x / 32 * WARP_CLASSES;", "block * CLASSES + threadIdx.x / 64 * WARP_CLASSES;", "d_classifier", "group_edge/1"),
    mutant("dC: shuffle inside a branch of the lanes", K + "column_sum.cuh",
           "if (k + i >= count) break;\n#pragma unroll\n            for (u32 p = 0", "if (k + i >= count || threadIdx.x % 32 > 30) break;\n#pragma unroll\n            for (u32 p = 0", "d_classifier", "two_tiles_plus_1/1"),
    mutant("dE: no barrier before entries are staged again", K + "d_embeddings.cu",
           "        if (base != 0) __syncthreads();          // the entries before have been used\n", "", "d_embeddings", "flat/1"),
    mutant("dE: no barrier after entries are staged", K + "d_embeddings.cu",
           "* p.logit_scale;\n        }\n        __syncthreads();", "* p.logit_scale;\n        }", "d_embeddings", "group_edge/1"),
    mutant("dE: tail of a batch left out", K + "d_embeddings.cu",
           "        if (k < staged) add_batch<T, ALIGNED, true>", "        if (k + 1 < staged) add_batch<T, ALIGNED, true>", "d_embeddings", "group_edge/1"),
    mutant("a vector beyond the row's end", K + "gather.cuh",
           "if (column < end) v = prim::ld_global_nc_16(row + column);", "if (column <= end) v = prim::ld_global_nc_16(row + column);", "d_embeddings", "vocab_tile_plus_1/1"),
    mutant("unaligned row read beyond its end", K + "gather.cuh",
           "if (column + i < end) v.w[i] = prim::f32_bits", "if (column + i <= end) v.w[i] = prim::f32_bits", "d_embeddings", "ragged_hidden/1"),
    mutant("a store beyond the row's end", K + "sink.cuh",
           "if (i < count) to[i] = accumulate", "if (i <= count) to[i] = accumulate", "d_embeddings", "ragged_hidden/1"),
    # statistics, losses
    mutant("merge: the second share left out", K + "combine.cu",
           "for (u32 k = lane; k < a.partials; k += softmax::LANES) totals.add", "for (u32 k = lane; k + 1 < a.partials; k += softmax::LANES) totals.add", "combine", "two_tiles_plus_1/1"),
    mutant("merge: one row too many", K + "combine.cu",
           "if (row >= a.saved.header->num_rows) return;", "if (row > a.saved.header->num_rows) return;", "combine", "group_edge/1"),
    mutant("target's logit: a bound above the log-sum-exp", K + "target_logit.cu",
           "? logit - margin", "? logit + 16.0f * margin + 8.0f", "target_logit", "group_edge/1"),
    mutant("target's logit: one element beyond the row", K + "target_logit.cu",
           "for (u32 d = done + lane; d < hidden; d += 32)", "for (u32 d = done + lane; d <= hidden; d += 32)", "target_logit", "ragged_hidden/1"),
    mutant("target's logit: a lower bound (legal)", K + "target_logit.cu",
           "? logit - margin", "? logit - 2.0f * margin", "target_logit", "group_edge/1"),
    mutant("loss: stride of the sum", K + "reduce_loss.cu",
           "token < a.problem.tokens; token += THREADS", "token < a.problem.tokens; token += THREADS / 2", "reduce_loss", "long_batch/2"),
    mutant("smoothing: no barrier before the groups' sums", K + "rank_one.cu",
           "smem.sums[group][own + i] = sum[i];\n    __syncthreads();", "smem.sums[group][own + i] = sum[i];", "rank_one", "smoothing/1"),
    # the forward's main loop and epilogue
    mutant("forward: ring waits for one group too few", K + "logits_tile.cuh",
           "prim::cp_async_wait<STAGES - 2>();", "prim::cp_async_wait<STAGES - 1>();", "forward_sm80", "group_edge/1"),
    mutant("forward: no barrier of a step", K + "logits_tile.cuh",
           "            __syncthreads();                 // this step's copies", "            //", "forward_sm80", "group_edge/1"),
    mutant("forward: rows swizzled otherwise than read", K + "logits_tile.cuh",
           "rows = swizzled(warp / WARPS_V * WARP_N + lane % 16, lane / 16);", "rows = (warp / WARPS_V * WARP_N + lane % 16) * STEP_BYTES + lane / 16 * CHUNK_BYTES;", "forward_sm80", "group_edge/1"),
    mutant("forward: no commit of empty groups", K + "logits_tile.cuh",
           "            }\n        }\n        prim::cp_async_commit();", "            }\n        prim::cp_async_commit();\n        }", "forward_sm80", "group_edge/1"),
    mutant("forward: columns beyond V not masked", K + "logits_epilogue.cuh",
           "if (first_class + column(k) < p.vocab) continue;", "if (first_class + column(k) <= p.vocab) continue;", "forward_sm80", "group_edge/1"),
    mutant("forward: wrong Weyl step at capture", K + "logits_epilogue.cuh",
           "same_walk + filter::class_offset(column(begin + k))", "same_walk + filter::class_offset(k)", "forward_sm80", "two_tiles_plus_1/1"),
    mutant("forward: no syncwarp before maxima are raised", K + "logits_epilogue.cuh",
           "        prim::syncwarp();                    // all lanes have read the old maxima\n", "", "forward_sm80", "group_edge/1"),
    mutant("forward: no syncwarp before thresholds change", K + "logits_epilogue.cuh",
           "        prim::syncwarp();                    // all lanes have read the thresholds\n", "", "forward_sm80", "group_edge/1"),
    mutant("forward: an extra syncwarp (legal)", K + "logits_epilogue.cuh",
           "        if (prim::any(rises)) raise", "        prim::syncwarp();\n        if (prim::any(rises)) raise", "forward_sm80", "group_edge/1"),
    mutant("forward: another swizzle, its own inverse (legal)", K + "logits_tile.cuh",
           "(chunk ^ (row / 2 % 4))", "(chunk ^ (row / 4 % 2))", "forward_sm80", "group_edge/1"),
    # the exact path
    mutant("exact: no grid barrier between G and its products", K + "exact.cu",
           "        grid_barrier(a.backward.barrier);\n        products_of_chunk", "        __syncthreads();\n        products_of_chunk", "exact", "two_tiles_plus_1/0"),
    mutant("grid barrier: no release of the generation", K + "grid_barrier.cuh",
           "prim::st_release(generation, before + 1);", "prim::st_relaxed(generation, before + 1);", "exact", "two_tiles_plus_1/0",
           ("        prim::threadfence();\n        if", "        if"), ("        prim::threadfence();\n    }", "    }")),
    mutant("grid barrier: no barrier of the block after it", K + "grid_barrier.cuh",
           "    }\n    sync();\n}", "    }\n}", "exact", "two_tiles_plus_1/0"),
    mutant("exact: the tile's bias read past V", K + "exact.cu",
           "class_index >= p.vocab) return;", "class_index > p.vocab) return;", "exact", "bias/0"),
    mutant("exact: dC staged without a barrier", K + "exact.cu",
           "            else d_bias_tile<T>(a, smem, work);\n            __syncthreads();\n            add_sparse_rows<T>(a, smem, work);",
           "            else d_bias_tile<T>(a, smem, work);", "exact", "group_edge/0"),
    mutant("exact: wrong owner of an item", K + "exact.cu",
           "        if (threadIdx.x == 0) work.item += gridDim.x;\n        __syncthreads();\n    }\n}\n\n// ---- passes",
           "        if (threadIdx.x == 0) work.item += 1;\n        __syncthreads();\n    }\n}\n\n// ---- passes", "exact", "two_tiles_plus_1/0"),
]

# ---- Hopper --------------------------------------------------------------------------------------------------------------
RING, FORWARD90, CASES = K + "hopper_ring.cuh", K + "forward_sm90.cu", "cuda_hopper the_hopper_forward/bias,softcap"
CLUSTERS = "cuda_hopper clusters_match"
BLOCKS, EXACT90, EXACT = K + "hopper_blocks.cuh", K + "exact_sm90.cu", "cuda_hopper the_exact_path/bias,softcap"
EDGES = "cuda_hopper the_exact_path/tokens_with_gaps,odd_columns"
HOPPER = [
    mutant("cluster: a stage is free when one block has read it", K + "hopper_ring.cuh",
           "CLUSTER * CONSUMERS * WARPGROUP / 32", "CONSUMERS * WARPGROUP / 32", "forward_sm90", CLUSTERS),
    mutant("cluster: stages released in the own block alone", K + "hopper_ring.cuh",
           "if (lane >= CLUSTER) return;", "if (lane != prim::cluster_rank()) return;", "forward_sm90", CLUSTERS),
    mutant("cluster: both blocks load the same part of C", K + "hopper_ring.cuh",
           "for (u32 part = rank; part", "for (u32 part = 0; part", "forward_sm90", CLUSTERS),
    mutant("cluster: a block leaves while the other writes into it", K + "forward_sm90.cu",
           "        prim::syncwarp();\n        prim::cluster_sync();", "        prim::syncwarp();", "forward_sm90", CLUSTERS),
    mutant("cluster: row blocks of a unit exchanged for the producer", K + "forward_sm90.cu",
           "rank, item.unit * CLUSTER + rank, item.first_tile", "rank, item.unit * CLUSTER + (CLUSTER - 1 - rank), item.first_tile", "forward_sm90", CLUSTERS),
    mutant("a share that nobody has is not said to be none", K + "hopper_schedule.cuh",
           "tiles == last_tiles ? 1 : 0", "0", "forward_sm90", CLUSTERS),
    mutant("the tails of two units go to the first", K + "hopper_schedule.cuh",
           "body(Item{begin + unit, full", "body(Item{begin + unit / 2, full", "forward_sm90", CLUSTERS),
    mutant("a full share begins one tile late", K + "hopper_schedule.cuh",
           "first_tile + u32(u64(full_tiles) * share / full), end", "first_tile + u32(u64(full_tiles) * share / full) + (share > 0), end", "example_schedule", "cuda_hopper the_device_shares"),
    mutant("consumer 0 never says that it leads", K + "forward_sm90.cu",
           "step + 1 == smaller(lead, steps)", "step + 1 == smaller(lead + 9, steps + 9)", "forward_sm90", CLUSTERS),
    mutant("clusters: a block starts to load before the other has its barriers", FORWARD90, "rank = prim::cluster_rank();\n        prim::cluster_sync();", "rank = prim::cluster_rank();\n        __syncthreads();", "forward_sm90", CLUSTERS),
    mutant("exact: lane 0 announces a stage before all lanes have it", BLOCKS, "    if (threadIdx.x % 32 == 0) {\n        prim::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);\n", "    prim::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);\n    if (threadIdx.x % 32 == 0) {\n", "exact_sm90", "cuda_hopper the_exact_path"),
    mutant("exact: item read by lanes after lane 0 released its stage", BLOCKS, "    prim::syncwarp();                        // lane 0 may release the stage for all lanes\n", "", "exact_sm90", EXACT),
    mutant("exact: stage released before its products are done", BLOCKS, "        prim::wgmma_wait<1>(acc);\n        release", "        release", "exact_sm90", EXACT),
    mutant("exact: blocks of MN-major B too near", BLOCKS, "MAJOR == Major::K ? 0 : BYTES", "MAJOR == Major::K ? 0 : BYTES / 2", "exact_sm90", EDGES),
    mutant("exact: MN-major operands in steps of K-major ones", BLOCKS, "(MAJOR == Major::K ? 32 : 16 * 128) >> 4", "32 >> 4", "exact_sm90", EXACT),
    mutant("exact: rows that do not exist are the token behind the last", BLOCKS, "token_of(a.args, first + i, rows) : a.args.problem.tokens;", "token_of(a.args, first + i, rows) : token_of(a.args, rows - 1, rows) + 1;", "exact_sm90", "cuda_hopper what_an_ignored_token"),
    mutant("exact: eight tokens taken for a run by their first", BLOCKS, "token_of(a, first + 7, rows) - token == 7", "true", "exact_sm90", EDGES),
    mutant("exact: staging overwritten while it is copied", EXACT90, "prim::bulk_wait_read<1>();      // the copy", "prim::bulk_wait_read<2>();      // the copy", "exact_sm90", EXACT),
    mutant("exact: no proxy fence before G is copied", EXACT90, "        prim::fence_proxy_async();\n", "", "exact_sm90", EXACT),
    mutant("exact: no barrier before G is copied", EXACT90, "        prim::fence_proxy_async();\n        prim::named_barrier_sync(BARRIER_CONSUMER + int(consumer), WARPGROUP);\n", "        prim::fence_proxy_async();\n", "exact_sm90", EXACT),
    mutant("exact: G not waited for at the end of a phase", EXACT90, "    if (thread == 0) prim::bulk_wait<0>();       // G has been written\n", "    if (thread == 0) prim::bulk_wait_read<0>();\n", "exact_sm90", EXACT),
    mutant("exact: no barrier between the phases", EXACT90, "            next_phase(a);\n", "            if (phase == PRODUCTS) next_phase(a);\n", "exact_sm90", EXACT),
    mutant("exact: target's constant without the softcap's slope", EXACT90, "rows[h].coefficients.target * logit_map::softcap_slope(p, rows[h].statistics.target_logit)", "rows[h].coefficients.target", "exact_sm90", "cuda_hopper the_exact_path/tokens_with_gaps"),
    mutant("exact: dE of a middle chunk overwritten", EXACT90, "chunk.is_first ? SINK_OVERWRITE : SINK_ACCUMULATE", "SINK_OVERWRITE", "exact_sm90", EDGES),
    mutant("exact: items of a phase counted without those that are not there", EXACT90, "count_items(work, chunk, phase) + gridDim.x;", "count_items(work, chunk, phase);", "exact_sm90", EXACT),
    mutant("exact: the last column of an odd D left out", EXACT90, "begin != NO_ROW && column < columns", "begin != NO_ROW && column + 1 < columns", "exact_sm90", EDGES),
    mutant("stage released before its products are done", RING, "            prim::wgmma_wait<1>(acc);\n            release", "            release", "forward_sm90", CLUSTERS),
    mutant("descriptor: the next k16 too far", RING, "K16 = 32 >> 4", "K16 = 48 >> 4", "forward_sm90", CASES),
]

# ---- the emulator's example kernels: Ampere's ring, Hopper's pipeline ------------------------------------------------------
A, H, L = "kernels ampere_gemm_under_every_schedule", "kernels hopper_gemm_in_every_layout_under_every_schedule", "kernels row_log_sum_exp_under_every_schedule"
EXAMPLES = [
    mutant("missing __syncthreads", G80, "        __syncthreads();                       //", "        //", "example_sm80", A),
    mutant("prefetch before the barrier", G80, "        prefetch(step + kStages - 1);\n", "", "example_sm80", A,
           ("        prim::cp_async_wait<kStages - 2>();", "        prefetch(step + kStages - 1);\n        prim::cp_async_wait<kStages - 1>();")),
    mutant("row bound off by one, load", G80, "row0 + row < rows", "row0 + row <= rows", "example_sm80", A),
    mutant("divergent mma (half a warp skips)", G80, "prim::mma_m16n8k16<bf16>(acc", "if (lane < 16) prim::mma_m16n8k16<bf16>(acc", "example_sm80", A),
    mutant("overlapping output tiles", G80, "col0 = blockIdx.x * kTileN", "col0 = blockIdx.x / 2 * kTileN", "example_sm80", A),
    mutant("weaker swizzle: bank conflicts (legal)", G80, "(col / 8) ^ (row % 8)", "(col / 8) ^ (row % 4)", "example_sm80", A),
    mutant("no wgmma wait before the epilogue", G90, "        prim::wgmma_wait<0>(acc);\n", "", "example_sm90", H),
    mutant("stage released without waiting", G90, "            prim::wgmma_wait<1>(acc);                          // the previous step has been read\n", "", "example_sm90", H),
    mutant("producer's parity inverted", G90, "ring.parity ^ 1", "ring.parity", "example_sm90", H),
    mutant("parity never flips", G90, "stage = 0, parity ^= 1;", "stage = 0;", "example_sm90", H),
    mutant("expect_tx too small", G90, "(kTileM + kTileN) * kTileK * sizeof(bf16));", "kTileN * kTileK * sizeof(bf16));", "example_sm90", H),
    mutant("no fence.proxy.async", G90, "            prim::fence_proxy_async();\n", "", "example_sm90", H),
    mutant("fence.proxy.async after the barrier, in one thread", G90,
           "            prim::fence_proxy_async();\n            prim::named_barrier_sync(1 + consumer, 128);\n            if (thread == 0) {",
           "            prim::named_barrier_sync(1 + consumer, 128);\n            if (thread == 0) {\n                prim::fence_proxy_async();", "example_sm90", H),
    mutant("no barrier before the TMA store", G90, "            prim::fence_proxy_async();\n            prim::named_barrier_sync(1 + consumer, 128);\n", "            prim::fence_proxy_async();\n", "example_sm90", H),
    mutant("source of a TMA store reused too early", G90, "bulk_wait_read<1>", "bulk_wait_read<2>", "example_sm90", H),
    mutant("exit before the last store has read", G90, "    if (thread == 0) prim::bulk_wait_read<0>();\n", "", "example_sm90", H),
    mutant("no wgmma_fence", G90, "            prim::wgmma_fence();\n", "", "example_sm90", H),
    mutant("wrong stride byte offset", G90, "stride = kPattern", "stride = kPattern / 2", "example_sm90", H),
    mutant("wrong leading byte offset (rows contiguous)", G90, "major == Major::K ? 16 : kSlab", "major == Major::K ? 16 : kPattern", "example_sm90", H),
    mutant("64-byte swizzle in the descriptor", G90, "swizzle_128b = 1", "swizzle_128b = 2", "example_sm90", H),
    mutant("empty barrier expects too few", G90, "&smem.empty[s], kConsumers)", "&smem.empty[s], 1)", "example_sm90", H),
    mutant("no fence after mbarrier init", G90, "        prim::fence_mbarrier_init();\n", "", "example_sm90", H),
    mutant("only thread 0 waits for the load", G90, "            prim::mbarrier_wait(&smem.full[ring.stage], ring.parity);", "            if (thread == 0) prim::mbarrier_wait(&smem.full[ring.stage], ring.parity);", "example_sm90", H),
    mutant("last stage of a tile never released", G90, "        prim::wgmma_wait<0>(acc);\n        release(previous);", "        prim::wgmma_wait<0>(acc);", "example_sm90", H),
    mutant("accumulator read before the wait", G90, "        prim::wgmma_wait<0>(acc);\n", "        const float early = acc[0];\n        prim::wgmma_wait<0>(acc);\n        acc[0] = early;\n", "example_sm90", H),
    mutant("warpgroups share a named barrier", G90, "named_barrier_sync(1 + consumer, 128);\n            if", "named_barrier_sync(1, 128);\n            if", "example_sm90", H),
    mutant("another thread releases (legal)", G90, "        if (thread == 0) prim::mbarrier_arrive(&smem.empty[stage]);", "        if (thread == 96) prim::mbarrier_arrive(&smem.empty[stage]);", "example_sm90", H),
    mutant("missing __syncthreads", LSE, "    __syncthreads();\n", "", "example_sm80", L),
    mutant("shuffle under divergence", LSE, "        p = warp_merge(p);\n        if", "        if (lane < kWarps) p = warp_merge(p);\n        if", "example_sm80", L),
    mutant("+= in place of an atomic", LSE, "prim::atomic_add(total, l);", "*total += l;", "example_sm80", L),
    mutant("shared index out of bounds", LSE, "smem.sum[warp] = p.sum", "smem.sum[warp + 8] = p.sum", "example_sm80", L),
]

MUTANTS = SHIPPED + HOPPER + EXAMPLES

# ---- the wrappers in kernels/prim, seen only in what nvcc makes of them: one more field, the architecture -------------------
P80, P90, CLUSTER, BULK = "example_sm80", "example_sm90", "example_cluster", "example_bulk"
EXCHANGE, PUSH = "hopper blocks_of_a_cluster_exchange_through_shared_memory", "hopper an_arrival_at_another_block_hands_data_over"
MULTICAST, BOX = "hopper a_multicast_lands_in_every_block", "hopper boxes_are_multicast_in_clusters_of_every_size"
RANGES = "hopper plain_ranges_are_copied_and_added"
PRIM = K + "prim/"


def wrapper(name, file, old, new, units, test, arch):
    return (name, PRIM + file, [(old, new)], units.split(), test, arch)


PTX_MUTANTS = [
    wrapper("(no change)", "wgmma.cuh", "wgmma", "wgmma", P90, H, "90a"),
    wrapper("wgmma: major-ness immediates swapped", "wgmma.cuh", "acc, 1, 1, %\" #o3 \", %\" #o4 \"", "acc, 1, 1, %\" #o4 \", %\" #o3 \"", P90, H, "90a"),
    wrapper("wgmma: descriptors swapped", "wgmma.cuh", "\", %\" #o0 \", %\" #o1 \", acc", "\", %\" #o1 \", %\" #o0 \", acc", P90, H, "90a"),
    wrapper("wgmma: scale-d predicate inverted", "wgmma.cuh", "setp.ne.b32 acc", "setp.eq.b32 acc", P90, H, "90a"),
    wrapper("wgmma: two registers exchanged", "wgmma.cuh", "%12,%13,%14", "%13,%12,%14", P90, H, "90a"),
    wrapper("wgmma: a register twice", "wgmma.cuh", "%12,%13,%14", "%12,%12,%14", P90, H, "90a"),
    wrapper("TMA load: coordinates swapped", "tma.cuh", "[%1, {%3, %4}], [%2];", "[%1, {%4, %3}], [%2];", P90, H, "90a"),
    wrapper("TMA reduction emitted as a store", "tma.cuh", "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group", "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group", P90, H, "90a"),
    wrapper("mbarrier_wait: no loop", "tma.cuh", "@!done bra again;", "", P90, H, "90a"),
    wrapper("expect_tx on the wrong barrier", "tma.cuh", "_, [%0], %1;\" ::\"r\"(smem_addr(bar))", "_, [%0], %1;\" ::\"r\"(smem_addr(bar) + 8)", P90, H, "90a"),
    wrapper("fence.proxy.async forgotten", "tma.cuh", "asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");", "", P90, H, "90a"),
    wrapper("mma: accumulators exchanged", "mma.cuh", "f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};", "f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%1,%0,%2,%3};", P80, A, "80"),
    wrapper("ldmatrix: order of the results", "mma.cuh", "x4.shared.b16 {%0,%1,%2,%3}, [%4];", "x4.shared.b16 {%0,%2,%1,%3}, [%4];", P80, A, "80"),
    wrapper("cp.async: the filling inverted", "copy.cuh", "\"r\"(src_bytes)", "\"r\"(16 - src_bytes)", P80, A, "80"),
    wrapper("mapa: always block 0", "cluster.cuh", "mapa.u64 %0, %1, %2;", "mapa.u64 %0, %1, 0;", CLUSTER, EXCHANGE, "90a"),
    wrapper("cluster barrier: no wait", "cluster.cuh", "\\n\\tbarrier.cluster.wait.acquire.aligned;", "", CLUSTER, EXCHANGE, "90a"),
    wrapper("cluster barrier: a relaxed arrival", "cluster.cuh", "arrive.release.aligned;\\n", "arrive.relaxed.aligned;\\n", CLUSTER, EXCHANGE, "90a"),
    wrapper("cluster rank for its size", "cluster.cuh", "%%cluster_nctarank", "%%cluster_ctarank", CLUSTER, BOX, "90a"),
    wrapper("remote arrival without a release", "cluster.cuh", "arrive.release.cluster.shared", "arrive.shared", CLUSTER, PUSH, "90a"),
    wrapper("remote arrival at home", "cluster.cuh", "mapa.shared::cluster.u32 remote, %0, %1;", "mov.b32 remote, %0;", CLUSTER, PUSH, "90a"),
    wrapper("remote wait without an acquire", "cluster.cuh", "parity.acquire.cluster.shared", "parity.shared", CLUSTER, PUSH, "90a"),
    wrapper("multicast of a range to this block alone", "cluster.cuh", "bytes.multicast::cluster [%0], [%1], %2, [%3], %4;", "bytes [%0], [%1], %2, [%3];", CLUSTER, MULTICAST, "90a"),
    wrapper("copy between blocks on this block's barrier", "cluster.cuh", "[there], [%1], %2, [barrier];", "[there], [%1], %2, [%3];", CLUSTER, MULTICAST, "90a"),
    wrapper("copy between blocks into this block", "cluster.cuh", "[there], [%1], %2, [barrier];", "[%0], [%1], %2, [%3];", CLUSTER, MULTICAST, "90a"),
    wrapper("multicast of a box: coordinates swapped", "cluster.cuh", "[%1, {%3, %4}], [%2], %5, %6;", "[%1, {%4, %3}], [%2], %5, %6;", CLUSTER, BOX, "90a"),
    wrapper("bulk store: source and destination of another size", "tma.cuh", "bulk_group [%0], [%1], %2;\" ::\"l\"(gmem), \"r\"(smem_addr(smem)), \"r\"(bytes)",
            "bulk_group [%0], [%1], %2;\" ::\"l\"(gmem), \"r\"(smem_addr(smem)), \"r\"(bytes / 2)", BULK, RANGES, "90a"),
    wrapper("bulk reduction emitted as a store", "tma.cuh", "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32", "cp.async.bulk.global.shared::cta.bulk_group", BULK, RANGES, "90a"),
    wrapper("bulk reduction of bf16 as f16", "tma.cuh", "add.noftz.bf16", "add.noftz.f16", BULK, RANGES, "90a"),
    wrapper("bulk_commit forgotten", "tma.cuh", "asm volatile(\"cp.async.bulk.commit_group;\" ::: \"memory\");", "", BULK, RANGES, "90a"),
    wrapper("stmatrix: order of the registers", "mma.cuh", "x4.shared.b16 [%0], {%1,%2,%3,%4};", "x4.shared.b16 [%0], {%1,%3,%2,%4};", BULK, "hopper matrices_are_stored_in_every_form", "90a"),
]
