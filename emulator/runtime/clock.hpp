// Vector clocks: who knows of whose actions. The checker's only notion of order.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMU_SIMD __attribute__((target_clones("arch=haswell", "default"), optimize("O3")))
#else
#define EMU_SIMD
#endif

namespace emu {

void vmax(uint32_t* __restrict a, const uint32_t* __restrict b, size_t n);
void vmin(uint32_t* __restrict a, const uint32_t* __restrict b, size_t n);

// What is known of other blocks' threads, and what a release carries. Almost always null: only atomics with fences make one.
using BlockClocks = std::map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>>;
using Message = std::shared_ptr<const BlockClocks>;
Message merged(const Message& a, const Message& b);

// Every CUDA thread, each mbarrier's copy engine, each warpgroup's tensor core and each thread that issues bulk stores is a
// logical thread of its block. `all` is what happened before us, `fenced` the part of it that a proxy fence has made visible
// to the async proxy.
struct Clock {
    std::vector<uint32_t> all, fenced;
    Message others;
    // Made visible to the device by fences, and read from atomics but not yet fenced. Both travel through the block's barriers:
    // every thread fences, one of them counts; one reads the count, every thread fences.
    Message released, acquirable;
    uint64_t version = 0;
    void reset(int n) { all.assign(n, 0); fenced.assign(n, 0); forget(); ++version; }
    void forget() { others.reset(); released.reset(); acquirable.reset(); }
    void clear() { std::fill(all.begin(), all.end(), 0); std::fill(fenced.begin(), fenced.end(), 0); forget(); ++version; }
    void join(const Clock& o) {
        vmax(all.data(), o.all.data(), all.size());
        vmax(fenced.data(), o.fenced.data(), all.size());
        if (o.others && o.others != others) others = merged(others, o.others);
        if (o.released && o.released != released) released = merged(released, o.released);
        if (o.acquirable && o.acquirable != acquirable) acquirable = merged(acquirable, o.acquirable);
        ++version;
    }
    void meet(const Clock& o) { vmin(all.data(), o.all.data(), all.size()); vmin(fenced.data(), o.fenced.data(), all.size()); forget(); ++version; }
};

}  // namespace emu
