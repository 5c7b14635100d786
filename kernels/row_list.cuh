// The kept entries of a row, as its backward takes them.
#pragma once

#include "gradient.cuh"

struct RowList { const LceEntry* entries; u32 count; };

// Nothing for rows that there are not, that take the exact path, that have a bad target, or to which nothing comes from upstream.
__device__ __forceinline__ RowList row_list(const LceArgs& a, u32 row) {
    if (row >= a.saved.header->num_rows) return {nullptr, 0};
    const u32 count = a.saved.entry_count[row];
    if (count == NONE || count == 0 || gradient::is_zero(a.backward.coefficients[row])) return {nullptr, 0};
    return {a.saved.entries + u64(row / BLOCK_N) * a.block_entries + a.saved.entry_begin[row], count};
}
