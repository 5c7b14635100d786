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
bool is_below(const uint32_t* a, const uint32_t* b, size_t n);       // or equal, each of a to each of b

// What is known of other blocks' threads, and what a release carries. Almost always null: only atomics with fences make one.
using BlockClocks = std::map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>>;
using Message = std::shared_ptr<const BlockClocks>;
Message merged(const Message& a, const Message& b);

// A number for each logical thread, copied when it changes: most clocks share theirs, so that joining them is a look at a pointer. Without a
// vector all are 0.
class Shared {
    std::shared_ptr<std::vector<uint32_t>> numbers;
    std::vector<uint32_t>& own(size_t n) {
        if (!numbers) numbers = std::make_shared<std::vector<uint32_t>>(n, 0);
        else if (numbers.use_count() > 1) numbers = std::make_shared<std::vector<uint32_t>>(*numbers);
        return *numbers;
    }
public:
    uint32_t operator[](size_t i) const { return numbers ? (*numbers)[i] : 0; }
    void clear() { numbers.reset(); }
    void set(size_t i, uint32_t value, size_t n) { own(n)[i] = value; }
    void join(const Shared& o) {
        if (!o.numbers || o.numbers == numbers) return;
        if (!numbers || is_below(numbers->data(), o.numbers->data(), numbers->size())) numbers = o.numbers;
        else if (!is_below(o.numbers->data(), numbers->data(), numbers->size())) vmax(own(0).data(), o.numbers->data(), numbers->size());
    }
    void join(const Shared& o, size_t first, size_t count, size_t n) {
        if (o.numbers && o.numbers != numbers) vmax(own(n).data() + first, o.numbers->data() + first, count);
    }
    void meet(const Shared& o) {
        if (!numbers || o.numbers == numbers) return;
        if (!o.numbers || is_below(o.numbers->data(), numbers->data(), numbers->size())) numbers = o.numbers;
        else if (!is_below(numbers->data(), o.numbers->data(), numbers->size())) vmin(own(0).data(), o.numbers->data(), numbers->size());
    }
};

// Every CUDA thread, each mbarrier's copy engine, each warpgroup's tensor core and each thread that issues bulk stores is a
// logical thread of its block. `all` is what happened before us, `fenced` the part of it that a proxy fence has made visible
// to the async proxy.
struct Clock {
    std::vector<uint32_t> all;
    Shared fenced;
    Message others;
    // Made visible to the device by fences, and read from atomics but not yet fenced. Both travel through the block's barriers:
    // every thread fences, one of them counts; one reads the count, every thread fences.
    Message released, acquirable;
    uint64_t version = 0;
    void reset(int n) { all.assign(n, 0); fenced.clear(); forget(); ++version; }
    void forget() { others.reset(); released.reset(); acquirable.reset(); }
    void clear() { std::fill(all.begin(), all.end(), 0); fenced.clear(); forget(); ++version; }
    void join(const Clock& o) {
        vmax(all.data(), o.all.data(), all.size());
        fenced.join(o.fenced);
        if (o.others && o.others != others) others = merged(others, o.others);
        if (o.released && o.released != released) released = merged(released, o.released);
        if (o.acquirable && o.acquirable != acquirable) acquirable = merged(acquirable, o.acquirable);
        ++version;
    }
    void meet(const Clock& o) { vmin(all.data(), o.all.data(), all.size()); fenced.meet(o.fenced); forget(); ++version; }
};

}  // namespace emu
