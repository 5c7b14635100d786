#pragma once
#include "state.hpp"

namespace emu {
// op, with everything but its destination filled in, into the same place of every block whose bit is set.
void issue_load(LoadOp op, void* dst, uint64_t* bar, uint32_t blocks, const char* name);
void issue_store(BulkOp op);
void put(Bulk kind, Format, char* global, const char* shared, uint32_t bytes);   // one element
void fetched(Fiber*, uintptr_t global, size_t bytes, Site);                      // for the checker and the counters
void wrote(const BulkOp&, uintptr_t global, size_t bytes);
void box_in(const LoadOp&);
void box_out(const BulkOp&);
void line_in(const LoadOp&);
void line_out(const BulkOp&);
}  // namespace emu
