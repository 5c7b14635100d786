// Bulk copies of plain ranges: a multiple of 16 bytes from one multiple of 16 to another.
#include "copy_engine.hpp"
#include "mbarrier.hpp"

namespace emu {

static void check_line(const void* smem, const void* other, uint32_t bytes, const char* name, Site at) {
    if (!bytes || bytes % 16 || (uintptr_t)smem % 16 || (uintptr_t)other % 16) {
        report("misaligned", at, "%s of %u bytes at smem+%u and %p: all three have to be multiples of 16", name, bytes, smem_addr(smem) - kSmemBase, other);
        abandon();
    }
}
static void check_range(const void* gmem, uint32_t bytes, const char* name, Site at) {
    if (owned((uintptr_t)gmem, bytes)) return;
    report("global out of bounds", at, "%s of %u bytes at %p", name, bytes, gmem);
    abandon();
}
void line_in(const LoadOp& op) { std::memcpy(smem_ptr(op.dst), op.linear, op.bytes); }
void line_out(const BulkOp& op) {
    const uint32_t size = op.kind == Bulk::Store ? 16 : op.format == kF32 ? 4 : 2;
    for (uint32_t i = 0; i < op.bytes; i += size) put(op.kind, op.format, op.linear + i, smem_ptr(op.src + i), size);
    if (checking()) wrote(op, (uintptr_t)op.linear, op.bytes);
}

void bulk_load(void* smem, const void* gmem, uint32_t bytes, uint64_t* bar, uint16_t blocks, Site at) {
    check_line(smem, gmem, bytes, "bulk load", at);
    if (const Block* to = blocks ? nullptr : block_of(smem)) blocks = uint16_t(1u << to->cta.rank);
    check_range(gmem, bytes, "bulk load", at);
    if (checking()) fetched(self(), (uintptr_t)gmem, bytes, at);
    issue_load(LoadOp{nullptr, nullptr, Map{}, (const char*)gmem, smem_addr(smem), Coords{}, bytes, 0, at}, smem, bar, blocks, "bulk load");
}
void bulk_store(Bulk kind, Format format, void* gmem, const void* smem, uint32_t bytes, Site at) {
    check_line(smem, gmem, bytes, "bulk store", at);
    check_range(gmem, bytes, "bulk store", at);
    if (!in_smem(smem, bytes, "bulk store", at)) abandon();
    issue_store(BulkOp{kind, Map{}, (char*)gmem, format, smem_addr(smem), Coords{}, bytes, 0, self(), false, at});
}
// From this block's shared memory to another's, on a barrier there. The source is read until that barrier's phase ends.
void bulk_copy_cluster(void* to, const void* from, uint32_t bytes, uint64_t* bar, Site at) {
    Fiber* f = self();
    check_line(from, to, bytes, "bulk copy", at);
    Block* block = block_of(to);
    if (!block || block_of(bar) != block) { report("bulk copy", at, "the mbarrier is not in the block of the destination"); abandon(); }
    if (!in_smem(from, bytes, "bulk copy", at)) abandon();
    if (checking()) {
        int who;
        uint32_t clk;
        {
            In in(block);
            MBar& b = bar_at(bar, "bulk copy", at);
            who = b.who;
            clk = b.op_clk + 1;
        }
        check_read(smem_addr(from), bytes, who, clk, f->clock, true, false, nullptr, at);
    }
    issue_load(LoadOp{nullptr, nullptr, Map{}, (const char*)from, 0, Coords{}, bytes, 0, at}, to, bar, 1u << block->cta.rank, "bulk copy");
}

}  // namespace emu
