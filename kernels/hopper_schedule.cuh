// Who does which part of a round: row blocks x tiles of classes, for thread blocks that stay until all is done.
//
// A worker is a thread block, or a cluster of them that takes as many row blocks at once: a unit. Units sweep the vocabulary in
// groups, so that the group's rows of E stay in L2 while C streams through it once a group. Within a group every unit has
// `full` workers of its own, each with an equal share of the tiles but the last; the last tiles of all units, in a row, are
// shared out equally among the workers that are left over, so many that all end together. 132 workers and 64 units of 1000 tiles:
//
//               tiles →
//   unit  0  │ worker 0 (485) │ worker 64 (485) │ worker 128 (30)        │   full shares of a unit go past the same tiles at the
//   unit  1  │ worker 1       │ worker 65       │ worker 128             │   same time as those of all other units
//   unit 16  │ worker 16      │ worker 80       │ worker 128, worker 129 │   the tail of a unit has one worker or two
#pragma once

#include "abi.h"

namespace hopper {

template <class T> __device__ __forceinline__ T smaller(T x, T y) { return x < y ? x : y; }
__device__ __forceinline__ u32 div_up(u32 x, u32 y) { return x / y + (x % y != 0); }

struct Item {
    u32 unit, share;
    u32 first_tile, end_tile;                // may be none
    u32 unused_begin, unused_end;            // shares of this unit that nobody has; who takes the item says so
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
            const u32 left_over = full + 2 <= most_shares ? workers - full * here : 0;
            const u32 last_tiles = u32(u64(num_tiles) * left_over / workers), full_tiles = num_tiles - last_tiles;
            const u32 share = worker / here;
            if (share < full) {
                const u32 first = first_tile + u32(u64(full_tiles) * share / full), end = first_tile + u32(u64(full_tiles) * (share + 1) / full);
                const u32 used = last_tiles > 0 ? full + 2 : full;
                body(Item{begin + worker - share * here, share, first, end, used, share == 0 ? most_shares : used});
                continue;
            }
            // At least last_tiles for each, as there are more units than workers left over: a unit's are cut once at most.
            const u64 all = u64(here) * last_tiles;
            const u32 part = worker - full * here;
            if (last_tiles == 0 || part >= left_over) continue;
            const u64 end = all * (part + 1) / left_over;
            for (u64 at = all * part / left_over; at < end;) {
                const u32 unit = u32(at / last_tiles), tile = u32(at % last_tiles);
                const u32 tiles = u32(smaller(end - at, u64(last_tiles - tile)));
                const u32 first = first_tile + full_tiles + tile, uncut = tiles == last_tiles ? 1 : 0;
                body(Item{begin + unit, full + (tile > 0 ? 1 : 0), first, first + tiles, full + 1, full + 1 + uncut});
                at += tiles;
            }
        }
    }
};

}  // namespace hopper
