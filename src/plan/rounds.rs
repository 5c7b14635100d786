//! How the vocabulary is cut: into rounds, one launch after the other, and each round into splits, side by side.
//!
//! ```text
//!            vocabulary, tiles of 128 classes →
//!           │r0│  round 1  │            round 2                │
//!  row      ├──┼─────┬─────┼─────────────────┬─────────────────┤
//!  block 0  │  │split│split│     split 0     │     split 1     │   a block of threads each
//!  row      ├──┼─────┼─────┼─────────────────┼─────────────────┤
//!  block 1  │  │     │     │                 │                 │
//! ```
//!
//! Candidates are tested against a lower bound of the row's log-sum-exp. What earlier rounds have summed is such a bound,
//! so rounds grow: the first is short, and the last, which is most of the vocabulary, is tested well.

use super::{BLOCK_V, MAX_PARTIALS};

/// Where the rounds of a forward that captures end, in sixteenths of the vocabulary.
const ROUND_ENDS: [usize; 3] = [1, 4, 16];

/// More rounds are worth this much more time, by the model below.
const WORTH: f64 = 1.05;

/// What a block does before its first tile and after its last, in tiles.
const OVERHEAD: f64 = 0.5;

/// One launch of the forward kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// First tile of [`BLOCK_V`] classes.
    pub first_tile: u32,
    /// Number of tiles.
    pub num_tiles: u32,
    /// Index of the partial result of split 0.
    pub first_partial: u32,
    /// Number of splits: each takes an equal share of the tiles, up to one.
    pub splits: u32,
}

impl Round {
    /// The tiles of one split, as the kernel computes them.
    pub fn tiles(&self, split: u32) -> std::ops::Range<u32> {
        let start =
            |s: u32| self.first_tile + (u64::from(self.num_tiles) * u64::from(s) / u64::from(self.splits)) as u32;
        start(split)..start(split + 1)
    }
}

/// The rounds for `vocab` classes and `row_blocks` row blocks on a device that runs `resident` blocks at once.
///
/// With capture, the largest number of rounds that is not slower than fewer rounds by more than five percent.
pub(super) fn plan(vocab: usize, row_blocks: usize, resident: u32, capture: bool) -> Vec<Round> {
    let tiles = vocab.div_ceil(BLOCK_V);
    if tiles == 0 || row_blocks == 0 {
        return Vec::new();
    }
    let most = if capture { ROUND_ENDS.len() } else { 1 };
    let candidates: Vec<(Vec<Round>, f64)> =
        (1..=most).map(|count| rounds(tiles, count, row_blocks as u64, resident.into())).collect();
    let best = candidates.iter().map(|c| c.1).fold(f64::INFINITY, f64::min);
    let chosen = candidates.into_iter().rev().find(|c| c.1 <= WORTH * best);
    chosen.map(|c| c.0).unwrap_or_default()
}

/// The last `count` of the rounds, and the time that they take, in tiles.
fn rounds(tiles: usize, count: usize, row_blocks: u64, resident: u64) -> (Vec<Round>, f64) {
    let ends = &ROUND_ENDS[ROUND_ENDS.len() - count..];
    let most = MAX_PARTIALS / count;
    let (mut out, mut time, mut start, mut first_partial) = (Vec::new(), 0.0, 0, 0);
    for sixteenths in ends {
        let end = (tiles * sixteenths).div_ceil(16).max(start + 1).min(tiles);
        let share = end - start;
        if share == 0 {
            continue; // fewer tiles than rounds
        }
        // Whole waves of blocks, each as long as its longest split.
        let time_of = |splits: usize| {
            let waves = (row_blocks * splits as u64).div_ceil(resident);
            waves as f64 * (share.div_ceil(splits) as f64 + OVERHEAD)
        };
        let mut splits = 1;
        for more in 2..=most.min(share) {
            if time_of(more) < time_of(splits) {
                splits = more;
            }
        }
        time += time_of(splits);
        out.push(Round {
            first_tile: start as u32,
            num_tiles: share as u32,
            first_partial: first_partial as u32,
            splits: splits as u32,
        });
        (start, first_partial) = (end, first_partial + splits);
    }
    (out, time)
}
