// Shared-memory wavefronts per source line. Lanes run one after the other here, so a warp's access is put back together from
// its lanes: the n-th time lane l executes an instruction belongs to the warp's n-th execution.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <vector>

namespace emu {

struct Banks {
    struct Access { uint32_t addr[32]; uint32_t mask = 0; uint8_t size = 4; };
    struct Line { uint64_t phases = 0, wavefronts = 0; };
    std::map<std::pair<const void*, int>, std::pair<std::vector<uint32_t>, std::deque<Access>>> open;   // (pc, warp)
    std::map<const void*, Line> by_pc;
    std::map<std::pair<const char*, int>, Line> by_site;

    // `lanes` addresses of `size` bytes each; hardware serves 128 bytes per wavefront, 32 banks of 4 bytes
    static void count(Line& l, const uint32_t* addr, uint32_t mask, int size) {
        int per = 128 / (size < 4 ? 4 : size);
        for (int first = 0; first < 32; first += per) {
            std::set<uint32_t> words[32];
            size_t worst = 0;
            for (int i = first; i < first + per; ++i)
                if (mask >> i & 1)
                    for (uint32_t w = addr[i] / 4; w <= (addr[i] + size - 1) / 4; ++w) {
                        words[w % 32].insert(w);
                        worst = std::max(worst, words[w % 32].size());
                    }
            if (worst) { ++l.phases; l.wavefronts += worst; }
        }
    }
    void note(const void* pc, int warp, int lane, uint32_t addr, int size) {
        auto& [seen, queue] = open[{pc, warp}];
        if (seen.empty()) seen.assign(33, 0);
        uint32_t n = seen[lane]++ - seen[32];       // seen[32]: executions already counted
        if (n >= queue.size()) queue.resize(n + 1);
        Access& a = queue[n];
        a.addr[lane] = addr;
        a.mask |= 1u << lane;
        a.size = uint8_t(size);
        while (!queue.empty() && queue.front().mask == ~0u) {
            count(by_pc[pc], queue.front().addr, ~0u, size);
            queue.pop_front();
            ++seen[32];
        }
    }
    void flush() {
        for (auto& [k, v] : open) for (auto& a : v.second) count(by_pc[k.first], a.addr, a.mask, a.size);
        open.clear();
    }
};

}  // namespace emu
