// Who does which part of a round: row blocks x tiles of classes, for thread blocks that stay until all is done.
//
// A worker is a thread block, or a cluster of them that takes as many row blocks at once: a unit. Units sweep the vocabulary in
// groups, so that the group's rows of E stay in L2 while C streams through it once a group. Within a group every unit has
// `full` workers of its own, each with an equal share of the tiles; the workers that are left over take a last, smaller
// share of several units one after another, sized so that all end together. 132 workers and 64 units of 1000 tiles:
//
//               tiles →
//   unit  0  │ worker 0 (485) │ worker 64 (485) │ worker 128 (30) │   full shares of a unit go past the same tiles at the
//   unit  1  │ worker 1       │ worker 65       │ worker 129      │   same time as those of all other units
//   unit  4  │ worker 4       │ worker 68       │ worker 128      │
#pragma once

#include "abi.h"

namespace hopper {

__device__ __forceinline__ u32 smaller(u32 x, u32 y) { return x < y ? x : y; }
__device__ __forceinline__ u32 div_up(u32 x, u32 y) { return x / y + (x % y != 0); }

struct Item {
    u32 unit, share, shares;                 // share 0 .. shares of this unit
    u32 first_tile, end_tile;                // may be none
};

struct Schedule {
    u32 worker, workers;
    u32 units, units_of_group;
    u32 first_tile, num_tiles;
    u32 most_shares;

    template <class Body> __device__ __forceinline__ void for_each_item(Body body) const {
        if (units == 0) return;
        const u32 groups = div_up(units, smaller(units_of_group, workers)), of_group = div_up(units, groups);
        for (u32 begin = 0; begin < units; begin += of_group) {
            const u32 here = smaller(of_group, units - begin);
            const u32 full = smaller(workers / here, most_shares);
            const u32 left_over = full < most_shares ? workers - full * here : 0;
            // `turns` units one after another take a left-over worker as long as a full share takes its own.
            const u32 turns = left_over > 0 ? div_up(here, left_over) : 0;
            const u32 last_tiles = left_over > 0 ? num_tiles / (full * turns + 1) : 0, full_tiles = num_tiles - last_tiles;
            const u32 share = smaller(worker / here, full);
            if (share == full && last_tiles == 0) continue;
            for (u32 unit = worker - share * here; unit < here; unit += share < full ? here : left_over) {
                Item item;
                item.unit = begin + unit;
                item.share = share;
                item.shares = full + (last_tiles > 0 ? 1 : 0);
                item.first_tile = first_tile + (share < full ? full_tiles * share / full : full_tiles);
                item.end_tile = first_tile + (share < full ? full_tiles * (share + 1) / full : num_tiles);
                body(item);
            }
        }
    }
};

}  // namespace hopper
