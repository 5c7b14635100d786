//! The entries of the softmax that can matter for the gradient, put aside while their logits are at hand.
//!
//! A running log-sum-exp only grows, so `z - running_lse` over-estimates `ln p`: what passes the filter with the final
//! value also passed it with the running one. Entries that no longer pass are dropped when a row runs out of space and
//! once more at the end; what is left is the sparse gradient itself.

use super::softmax_state::SoftmaxState;
use super::vector::{self, vectorized};
use crate::GradientFilter;
use crate::filter;

/// A class and its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Entry {
    pub class: u32,
    pub logit: f32,
}

/// The filter as an entry test, for one row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowFilter {
    /// Keep `p >= eps · u(class)`.
    Unbiased { eps: f32, start: u32 },
    /// Keep `p >= eps`.
    Threshold { eps: f32 },
}

impl RowFilter {
    /// The test for token `token`; `None` for the exact filter, which keeps no list.
    pub fn new(filter: &GradientFilter, token: usize) -> Option<Self> {
        match *filter {
            GradientFilter::Exact => None,
            GradientFilter::Unbiased { eps, seed } => {
                Some(RowFilter::Unbiased { eps, start: filter::row_start(seed, token) })
            }
            GradientFilter::Threshold { eps } => Some(RowFilter::Threshold { eps }),
        }
    }

    /// What a kept probability counts as.
    #[inline(always)]
    pub fn value(&self, p: f32) -> f32 {
        match *self {
            RowFilter::Unbiased { eps, .. } => p.max(eps),
            RowFilter::Threshold { .. } => p,
        }
    }
}

/// Rounding in the running sum and in the exponentials must never drop an entry that the final test would keep.
const SLACK: f32 = 1.0 - 1e-4;

/// The candidates of one row, classes ascending.
#[derive(Debug, Clone)]
pub(crate) struct RowCandidates {
    pub entries: Vec<Entry>,
    pub filter: RowFilter,
    /// The target's entry is always kept.
    pub target: u32,
    /// The row ran out of space: it holds nothing and takes the exact path.
    pub overflowed: bool,
    /// Entries ever put aside.
    pub captured: u64,
}

impl RowCandidates {
    pub fn new(filter: RowFilter, target: u32) -> Self {
        RowCandidates { entries: Vec::new(), filter, target, overflowed: false, captured: 0 }
    }

    /// Takes the entries of a tile that may matter. `exps` are `exp(z - max)` under the state's present maximum.
    #[inline(always)]
    pub fn capture(
        &mut self,
        state: &SoftmaxState,
        logits: &[f32],
        exps: &[f32],
        offsets: &[u32],
        first_class: usize,
        space: usize,
    ) {
        if self.overflowed {
            return;
        }
        if self.entries.len() + logits.len() > space && self.entries.len() >= space / 2 {
            self.drop_beaten(state);
            // Still more than three quarters full: the next tiles would compact again and again.
            if self.entries.len() + logits.len() > space && self.entries.len() > space / 4 * 3 {
                *self =
                    RowCandidates { overflowed: true, captured: self.captured, ..Self::new(self.filter, self.target) };
                return;
            }
        }
        let bound = state.sum_bound() * SLACK;
        let target_at = (self.target as usize).wrapping_sub(first_class);
        const BLOCK: usize = 64;
        let (factor, start) = match self.filter {
            RowFilter::Unbiased { eps, start } => {
                (eps * bound, start.wrapping_add(filter::class_offset(first_class as u32)))
            }
            RowFilter::Threshold { eps } => (eps * bound, 0),
        };
        let unbiased = matches!(self.filter, RowFilter::Unbiased { .. });
        // One byte an entry, so that the tests vectorise and eight misses are skipped at a time.
        let mut flags = [0_u8; BLOCK];
        for base in (0..logits.len()).step_by(BLOCK) {
            let end = (base + BLOCK).min(logits.len());
            flags[end - base..].fill(0);
            let tested = flags.iter_mut().zip(&exps[base..end]);
            if unbiased {
                for ((flag, e), offset) in tested.zip(&offsets[base..end]) {
                    *flag = u8::from(*e >= factor * filter::uniform(start.wrapping_add(*offset)));
                }
            } else {
                tested.for_each(|(flag, e)| *flag = u8::from(*e >= factor));
            }
            if let Some(flag) = flags[..end - base].get_mut(target_at.wrapping_sub(base)) {
                *flag = 1;
            }
            for (word_at, word) in flags.as_chunks::<8>().0.iter().enumerate() {
                let mut word = u64::from_le_bytes(*word);
                while word != 0 {
                    let k = base + word_at * 8 + word.trailing_zeros() as usize / 8;
                    word &= word - 1; // a flag is one bit
                    self.captured += 1;
                    self.entries.push(Entry { class: (first_class + k) as u32, logit: logits[k] });
                }
            }
        }
    }

    /// Drops entries that fail with the sum as it is now.
    fn drop_beaten(&mut self, state: &SoftmaxState) {
        let (reference, bound) = (state.reference(), state.sum_bound() * SLACK);
        self.retain(|logit, least| vector::exp(logit - reference) >= bound * least);
    }

    /// Keeps the target and what passes, given its logit and the least `p` that its class is kept with; written so that the tests vectorise.
    #[inline(always)]
    fn retain(&mut self, passes: impl Fn(f32, f32) -> bool) {
        let target = self.target;
        match self.filter {
            RowFilter::Unbiased { eps, start } => retain(&mut self.entries, |e| {
                (e.class == target) | passes(e.logit, eps * filter::entry_uniform(start, e.class))
            }),
            RowFilter::Threshold { eps } => {
                retain(&mut self.entries, |e| (e.class == target) | passes(e.logit, eps));
            }
        }
    }
}

#[inline(always)]
fn retain(entries: &mut Vec<Entry>, passes: impl Fn(Entry) -> bool) {
    const BLOCK: usize = 64;
    let mut kept = 0;
    for first in (0..entries.len()).step_by(BLOCK) {
        let block = first..(first + BLOCK).min(entries.len());
        let mut passed = [false; BLOCK];
        passed.iter_mut().zip(&entries[block.clone()]).for_each(|(passed, entry)| *passed = passes(*entry));
        for (k, passed) in block.zip(passed) {
            entries[kept] = entries[k];
            kept += usize::from(passed);
        }
    }
    entries.truncate(kept);
}

/// Final statistics of one row: all that is needed to turn a logit into a probability.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowStatistics {
    /// Largest logit.
    pub max: f32,
    /// `1 / Σ exp(z - max)`.
    pub inverse_sum: f32,
    /// `ln Σ exp(z - max)`.
    pub log_sum: f32,
    /// Log-sum-exp.
    pub lse: f32,
    /// Entropy of the softmax, where it was asked for.
    pub entropy: f32,
}

impl RowStatistics {
    pub fn new(state: &SoftmaxState) -> Self {
        RowStatistics {
            max: state.max,
            inverse_sum: (1.0 / state.sum) as f32,
            log_sum: state.log_sum() as f32,
            lse: state.lse(),
            entropy: state.entropy(),
        }
    }

    /// `p` of a logit.
    #[inline(always)]
    pub fn probability(&self, logit: f32) -> f32 {
        vector::exp(logit - self.max) * self.inverse_sum
    }

    /// `ln p` of a logit.
    #[inline(always)]
    pub fn log_probability(&self, logit: f32) -> f32 {
        (logit - self.max) - self.log_sum
    }
}

/// Softmax mass of some entries of a row.
#[inline(always)]
fn mass(entries: &[Entry], row: &RowStatistics) -> f64 {
    let mut lanes = [0.0_f32; 64];
    for chunk in entries.chunks(lanes.len()) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, entry)| *lane += row.probability(entry.logit));
    }
    vector::sum_of_lanes(&lanes)
}

/// The kept entries of a block of rows, one list a row.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockEntries {
    /// Where each row's entries start; one more than rows.
    pub offsets: Vec<usize>,
    /// Entries, row by row, classes ascending.
    pub entries: Vec<Entry>,
    /// Rows that hold nothing and take the exact path.
    pub overflowed: Vec<bool>,
    /// Entries ever put aside.
    pub captured: u64,
    /// Softmax mass of the kept entries, summed over rows.
    pub mass: f64,
}

impl BlockEntries {
    /// Applies the filter with the final statistics.
    pub fn finish(rows: Vec<RowCandidates>, statistics: &[RowStatistics]) -> Self {
        // A row whose log-sum-exp is not finite has no sparse gradient.
        let sparse = |row: &RowCandidates, s: &RowStatistics| !row.overflowed && s.lse.is_finite();
        let mut rows = rows;
        vectorized(
            #[inline(always)]
            || {
                for (row, s) in rows.iter_mut().zip(statistics) {
                    row.overflowed = !sparse(row, s);
                    if row.overflowed {
                        row.entries = Vec::new();
                    }
                    row.retain(|logit, least| s.probability(logit) >= least);
                }
            },
        );
        let mut block = BlockEntries {
            offsets: Vec::with_capacity(rows.len() + 1),
            entries: Vec::with_capacity(rows.iter().map(|r| r.entries.len()).sum()),
            overflowed: rows.iter().map(|r| r.overflowed).collect(),
            captured: rows.iter().map(|r| r.captured).sum(),
            mass: 0.0,
        };
        block.offsets.push(0);
        for (row, s) in rows.iter_mut().zip(statistics) {
            // Row by row, so that the lists are not in memory twice.
            let entries = std::mem::take(&mut row.entries);
            block.mass += vectorized(
                #[inline(always)]
                || mass(&entries, s),
            );
            block.entries.extend_from_slice(&entries);
            block.offsets.push(block.entries.len());
        }
        block
    }

    /// The entries of row `row` of the block.
    pub fn row(&self, row: usize) -> &[Entry] {
        &self.entries[self.offsets[row]..self.offsets[row + 1]]
    }
}
