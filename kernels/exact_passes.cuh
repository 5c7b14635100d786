// The exact path's passes over its rows: all at once; or, with more rows than dE has accumulators (exact_panel_rows), panel by panel for dE,
// then once more with all rows for dC and dbias. Each computes G anew.
#pragma once

#include "abi.h"

namespace exact {

struct Pass {
    u32 first, rows;                         // exact rows, by their position in exact_row
    u32 d_embeddings, d_classifier, d_bias;  // 0 or 1: what it is for
    u32 is_last;                             // 0 or 1
};

__device__ __forceinline__ bool wants_d_embeddings(const LceArgs& a) { return a.d_embeddings.mode != SINK_SKIP && a.problem.hidden > 0; }
__device__ __forceinline__ bool wants_d_classifier(const LceArgs& a) { return a.d_classifier.mode != SINK_SKIP && a.problem.hidden > 0; }
__device__ __forceinline__ bool wants_columns(const LceArgs& a) { return wants_d_classifier(a) || a.d_bias.mode != SINK_SKIP; }

// Whether there is no pass.
__device__ __forceinline__ bool nothing_to_do(const LceArgs& a) {
    return a.saved.header->exact_rows == 0 || !(wants_d_embeddings(a) || wants_columns(a));
}

// done: rows that panels have had.
__device__ __forceinline__ Pass pass_after(const LceArgs& a, u32 done) {
    const u32 exact_rows = a.saved.header->exact_rows, panel_rows = a.backward.exact_panel_rows;
    const bool d_embeddings = wants_d_embeddings(a), together = !d_embeddings || exact_rows <= panel_rows;
    if (!together && done < exact_rows) {
        const u32 left = exact_rows - done;
        return {done, left < panel_rows ? left : panel_rows, 1, 0, 0, left <= panel_rows && !wants_columns(a)};
    }
    return {0, exact_rows, together && d_embeddings, wants_d_classifier(a), a.d_bias.mode != SINK_SKIP, 1};
}
__device__ __forceinline__ Pass first_pass(const LceArgs& a) { return pass_after(a, 0); }
__device__ __forceinline__ Pass next_pass(const LceArgs& a, const Pass& before) { return pass_after(a, before.first + before.rows); }

// Whether sparse rows give anything to dC and dbias besides.
__device__ __forceinline__ bool has_sparse_rows(const LceArgs& a) { return a.backward.column_begin != nullptr || a.backward.spread_total != nullptr; }

}  // namespace exact
