//! How the vocabulary is cut: into rounds, one launch after the other, and each round into splits, side by side.
//!
//! ```text
//!            vocabulary, in tiles of classes →
//!           │r0│  round 1  │            round 2                │
//!  row      ├──┼─────┬─────┼─────────────────┬─────────────────┤
//!  block 0  │  │split│split│     split 0     │     split 1     │   a block of threads each
//!  row      ├──┼─────┼─────┼─────────────────┼─────────────────┤
//!  block 1  │  │     │     │                 │                 │
//! ```
//!
//! Candidates are tested against a lower bound of the row's log-sum-exp. What earlier rounds have summed is such a bound,
//! so rounds grow: the first knows nothing but the target's logit and is a few tiles, the last is half of the vocabulary.
//! Between rounds pools drop what the new bound rules out, and row blocks whose pool has overflowed do the round again with a
//! larger ε. DESIGN.md, section 7, has the captured numbers of other choices.

use super::{MAX_PARTIALS, Schedule};

/// All rounds but the first and the last end at this many times the classes of the one before.
const GROWTH: usize = 4;

/// More rounds are worth this much more time, by the model below: a row block that overflows does a round twice, and a larger ε
/// costs variance.
const WORTH: f64 = 1.05;

/// Partial results that a forward may have anyway. More are for filling the device once: each is read again, and kept in memory.
const FEW_PARTIALS: usize = 64;

/// What a block does before its first tile and after its last, in tiles.
const OVERHEAD: f64 = 0.5;

/// One launch of the forward kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    /// Which one: 0 is the first.
    pub index: u32,
    /// Classes of a tile: 128, on Hopper 256.
    pub tile: u32,
    /// First tile.
    pub first_tile: u32,
    /// First tile of the round before, 0 for the first.
    pub previous_tile: u32,
    /// Number of tiles.
    pub num_tiles: u32,
    /// Index of the partial result of split 0.
    pub first_partial: u32,
    /// Number of splits: each takes an equal share of the tiles, up to one. On Hopper: partial results that each row block
    /// has room for; the kernel shares the tiles out among the blocks that it has.
    pub splits: u32,
}

impl Round {
    /// The tiles of one split, as the kernel computes them.
    pub fn tiles(&self, split: u32) -> std::ops::Range<u32> {
        let start = |s: u32| {
            self.first_tile + (u64::from(self.num_tiles) * u64::from(s) / u64::from(self.splits.max(1))) as u32
        };
        start(split)..start(split + 1)
    }
}

/// Who works on a round.
#[derive(Debug, Clone, Copy)]
pub(super) enum Workers {
    /// A block of threads for each row block and split; so many run at once.
    Splits { resident: u64 },
    /// Blocks that stay, and share out whatever there is.
    Persistent(Schedule),
}

/// The rounds for `vocab` classes in tiles of `tile`, and `row_blocks` row blocks, with the time that they take, in tiles.
///
/// Where rows have `room` for candidates, the largest number of rounds that is worth its time: a first round of no more classes
/// cannot overflow. It has two tiles at least: on Hopper 512 classes, which may.
pub(super) fn plan(
    vocab: usize,
    tile: usize,
    row_blocks: usize,
    workers: Workers,
    room: Option<usize>,
) -> (Vec<Round>, f64) {
    let tiles = vocab.div_ceil(tile);
    if tiles == 0 || row_blocks == 0 {
        return (Vec::new(), 0.0);
    }
    let ends = room.map_or_else(|| vec![tiles], |room| ends(tiles, room / tile));
    let candidates: Vec<(Vec<Round>, f64)> =
        (0..ends.len()).rev().map(|first| rounds(&ends[first..], tile, row_blocks as u64, workers)).collect();
    let best = candidates.iter().map(|c| c.1).fold(f64::INFINITY, f64::min);
    candidates.into_iter().rev().find(|c| c.1 <= WORTH * best).unwrap_or_default()
}

/// Where the rounds end, in tiles: at `first` or fewer, or 2; then at [`GROWTH`] times as many; at half; and at all.
fn ends(tiles: usize, first: usize) -> Vec<usize> {
    let mut ends = vec![tiles];
    let mut end = tiles.div_ceil(2);
    while end < ends[0] {
        ends.insert(0, end);
        if end <= first.max(2) {
            break;
        }
        end = end.div_ceil(GROWTH);
    }
    ends
}

/// The rounds that end at these tiles, and the time that they take, in tiles.
fn rounds(ends: &[usize], tile: usize, row_blocks: u64, workers: Workers) -> (Vec<Round>, f64) {
    let (mut out, mut time, mut start, mut first_partial): (Vec<Round>, _, _, _) = (Vec::new(), 0.0, 0, 0);
    for (index, &end) in ends.iter().enumerate() {
        let share = end - start;
        // What short rounds do not use is left for long ones.
        let of_rest = |partials: usize| partials.saturating_sub(first_partial) / (ends.len() - index);
        let most = of_rest(MAX_PARTIALS);
        let (splits, of_round) = match workers {
            Workers::Splits { resident } => {
                let once = resident.div_ceil(row_blocks) as usize;
                waves(share, row_blocks, resident, most.min(once.max(of_rest(FEW_PARTIALS))).min(share))
            }
            Workers::Persistent(schedule) => {
                let splits = (schedule.useful_shares() as usize).min(most.min(share));
                let round = Schedule { num_tiles: share as u32, most_shares: splits as u32, ..schedule };
                (splits, round.busiest() as f64 + OVERHEAD)
            }
        };
        time += of_round;
        out.push(Round {
            index: index as u32,
            previous_tile: out.last().map_or(0, |before| before.first_tile),
            tile: tile as u32,
            first_tile: start as u32,
            num_tiles: share as u32,
            first_partial: first_partial as u32,
            splits: splits as u32,
        });
        (start, first_partial) = (end, first_partial + splits);
    }
    (out, time)
}

/// The number of splits, up to `most`, that takes the least time: whole waves of blocks, each as long as its longest split.
fn waves(share: usize, row_blocks: u64, resident: u64, most: usize) -> (usize, f64) {
    let time_of = |splits: usize| {
        let waves = (row_blocks * splits as u64).div_ceil(resident);
        waves as f64 * (share.div_ceil(splits) as f64 + OVERHEAD)
    };
    let mut splits = 1;
    for more in 2..=most {
        if time_of(more) < time_of(splits) {
            splits = more;
        }
    }
    (splits, time_of(splits))
}
