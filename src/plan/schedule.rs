//! Who takes which tiles in the Hopper forward, as `kernels/hopper_schedule.cuh` has it: the same numbers on the host, to plan by.
//! `tests/cuda_hopper.rs` holds the two together.

use super::BLOCK_N;
use std::ops::Range;

/// One round of the Hopper forward, for blocks that stay until all is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Blocks or, with clusters, pairs of them.
    pub workers: u32,
    /// Row blocks that a worker takes at once: 1, or 2 in a cluster.
    pub cluster: u32,
    /// Units of `cluster` row blocks.
    pub units: u32,
    /// Most units that sweep the vocabulary together.
    pub units_of_group: u32,
    /// The round's first tile.
    pub first_tile: u32,
    /// The round's tiles.
    pub num_tiles: u32,
    /// Most shares that the tiles of a unit are cut into.
    pub most_shares: u32,
}

/// What a worker does at a stretch: a unit's row blocks past some tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The unit.
    pub unit: u32,
    /// Which of the unit's shares.
    pub share: u32,
    /// The tiles; may be none.
    pub tiles: Range<u32>,
    /// Shares of the unit that nobody has, of which this worker says so.
    pub unused: Range<u32>,
}

/// How a group of units is shared out.
struct Group {
    /// Workers of its own that each unit has.
    full: u32,
    /// Workers besides those, which share the last tiles of all units.
    left_over: u32,
    /// How many last tiles a unit has.
    last_tiles: u32,
}

impl Schedule {
    /// Row blocks of units, in groups that fit `sweep_blocks`; no most of shares yet, and no tiles.
    pub(super) fn new(blocks: u32, cluster: u32, row_blocks: u32, sweep_blocks: u32) -> Self {
        Schedule {
            workers: blocks / cluster,
            cluster,
            units: row_blocks.div_ceil(cluster),
            units_of_group: sweep_blocks.div_ceil(cluster),
            first_tile: 0,
            num_tiles: 0,
            most_shares: 0,
        }
    }

    /// Units of every group but the last, which may have fewer.
    pub fn group_units(&self) -> u32 {
        let groups = self.units.div_ceil(self.units_of_group.min(self.workers).max(1));
        self.units.div_ceil(groups.max(1)).max(1)
    }

    /// Shares that the units of the largest group can use: those of their own, and up to two for who is left over.
    pub fn useful_shares(&self) -> u32 {
        let (own, left_over) = (self.workers / self.group_units(), self.workers % self.group_units());
        own + 2 * left_over.min(1)
    }

    fn group(&self, here: u32) -> Group {
        let full = (self.workers / here).min(self.most_shares);
        let left_over = if full + 2 <= self.most_shares { self.workers - full * here } else { 0 };
        let last_tiles = part(self.num_tiles.into(), left_over, self.workers) as u32;
        Group { full, left_over, last_tiles }
    }

    /// What a worker does, in order.
    pub fn items(&self, worker: u32) -> Vec<Item> {
        let mut items = Vec::new();
        for begin in (0..self.units).step_by(self.group_units() as usize) {
            let here = self.group_units().min(self.units - begin);
            let Group { full, left_over, last_tiles } = self.group(here);
            let full_tiles = self.num_tiles - last_tiles;
            let share = worker / here;
            if share < full {
                let start = |share| self.first_tile + part(full_tiles.into(), share, full) as u32;
                let used = if last_tiles > 0 { full + 2 } else { full };
                let unused = used..if share == 0 { self.most_shares } else { used };
                items.push(Item { unit: begin + worker % here, share, tiles: start(share)..start(share + 1), unused });
                continue;
            }
            let which = worker - full * here;
            if last_tiles == 0 || which >= left_over {
                continue;
            }
            let start = |which| part(u64::from(here) * u64::from(last_tiles), which, left_over);
            let (mut at, end) = (start(which), start(which + 1));
            while at < end {
                let (unit, tile) = ((at / u64::from(last_tiles)) as u32, (at % u64::from(last_tiles)) as u32);
                let tiles = (end - at).min(u64::from(last_tiles - tile)) as u32;
                let first = self.first_tile + full_tiles + tile;
                let unused = full + 1..full + 1 + u32::from(tiles == last_tiles);
                items.push(Item {
                    unit: begin + unit,
                    share: full + u32::from(tile > 0),
                    tiles: first..first + tiles,
                    unused,
                });
                at += u64::from(tiles);
            }
        }
        items
    }

    /// Tiles that the busiest worker takes, if groups wait for each other: at most a few more than it does.
    pub fn busiest(&self) -> u64 {
        let of_group = |here: u32| {
            let Group { full, left_over, last_tiles } = self.group(here);
            let own = u64::from((self.num_tiles - last_tiles).div_ceil(full));
            let last = (u64::from(here) * u64::from(last_tiles)).div_ceil(u64::from(left_over.max(1)));
            own.max(last)
        };
        let of_most = self.group_units();
        let (whole, rest) = (self.units / of_most, self.units % of_most);
        u64::from(whole) * of_group(of_most) + if rest > 0 { of_group(rest) } else { 0 }
    }
}

/// Where part `which` of `parts` equal ones of `whole` begins.
fn part(whole: u64, which: u32, parts: u32) -> u64 {
    whole * u64::from(which) / u64::from(parts)
}

/// Most row blocks whose rows of E take `percent` of a cache of `bytes`.
pub(super) fn sweep_blocks(bytes: usize, percent: usize, row_bytes: usize) -> usize {
    (bytes * percent / 100 / (BLOCK_N * row_bytes).max(1)).clamp(1, u32::MAX as usize)
}
