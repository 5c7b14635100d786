//! Forward: each task streams one block of tokens past the whole vocabulary, tile by tile, and keeps a softmax state
//! and a candidate list a row. The logits of a tile never leave the core's cache.
//!
//! ```text
//!            vocabulary →
//! tokens  ┌──────┬──────┬──────┬─┐
//! block 0 │ tile │ tile │ tile │…│ → SoftmaxState, RowCandidates of each row
//!         ├──────┼──────┼──────┼─┤   (one task, one thread)
//! block 1 │      │      │      │ │
//!         └──────┴──────┴──────┴─┘
//! ```

use super::candidates::{BlockEntries, RowCandidates, RowFilter, RowStatistics};
use super::matmul::{View, matmul};
use super::plan::{self, VOCAB_TILE};
use super::rows::{Row, TypedMatrix};
use super::softmax_state::SoftmaxState;
use super::vector::{self, vectorized};
use crate::filter::class_offset;
use crate::{CceOptions, Element, GradientFilter, HostSlice, Problem};
use rayon::prelude::*;

/// From `E · C` to a logit: scale, bias, softcap, in this order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogitMap<'a> {
    scale: f32,
    bias: Option<HostSlice<'a>>,
    softcap: Option<f32>,
}

impl<'a> LogitMap<'a> {
    pub fn new(problem: &Problem<'a>) -> Self {
        let options = problem.options();
        LogitMap { scale: options.logit_scale, bias: problem.inputs().bias, softcap: options.softcap }
    }

    /// One logit.
    pub fn apply(&self, product: f32, class: usize) -> f32 {
        let x = product * self.scale + self.bias.map_or(0.0, |b| b.float_at(class));
        self.softcap.map_or(x, |cap| cap * vector::tanh(x / cap))
    }

    /// The biases of a tile's columns as `f32`; nothing to do without a bias.
    #[inline(always)]
    pub fn widen_bias(&self, first_class: usize, bias: &mut [f32]) {
        if let Some(values) = self.bias {
            bias.iter_mut().enumerate().for_each(|(k, b)| *b = values.float_at(first_class + k));
        }
    }

    /// One row of a tile in place; `bias` from [`LogitMap::widen_bias`].
    #[inline(always)]
    pub fn apply_row(&self, row: &mut [f32], bias: &[f32]) {
        if self.bias.is_some() {
            row.iter_mut().zip(bias).for_each(|(z, b)| *z = z.mul_add(self.scale, *b));
        } else if self.scale != 1.0 {
            row.iter_mut().for_each(|z| *z *= self.scale);
        }
        if let Some(cap) = self.softcap {
            let inverse = 1.0 / cap;
            row.iter_mut().for_each(|z| *z = cap * vector::tanh(*z * inverse));
        }
    }

    /// `dz/dx` of the softcap at a logit `z`: `1 - (z / cap)²`.
    #[inline(always)]
    pub fn softcap_derivative(&self, z: f32) -> f32 {
        self.softcap.map_or(1.0, |cap| 1.0 - (z / cap) * (z / cap))
    }

    pub fn scale(&self) -> f32 {
        self.scale
    }

    pub fn has_softcap(&self) -> bool {
        self.softcap.is_some()
    }
}

/// What the stream left of each row, in the order of `rows`, and the kept entries of each block.
pub(crate) struct Pass {
    pub states: Vec<SoftmaxState>,
    pub statistics: Vec<RowStatistics>,
    /// One a token block; empty when nothing was captured.
    pub blocks: Vec<BlockEntries>,
}

/// Streams every block past the vocabulary. With `filter`, captures candidates.
pub(crate) fn run<T: Element>(
    problem: &Problem<'_>,
    rows: &[Row],
    embeddings: TypedMatrix<'_, T>,
    classifier: TypedMatrix<'_, T>,
    filter: Option<GradientFilter>,
) -> Pass {
    let blocks = plan::num_token_blocks(rows.len(), rayon::current_num_threads());
    let done: Vec<(Vec<SoftmaxState>, Vec<RowStatistics>, Option<BlockEntries>)> = (0..blocks)
        .into_par_iter()
        .map(|index| {
            let block = &rows[plan::token_block(rows.len(), blocks, index)];
            let (states, candidates) = stream_block(problem, block, embeddings, classifier, filter);
            let statistics: Vec<_> = states.iter().map(RowStatistics::new).collect();
            let entries = candidates.map(|c| BlockEntries::finish(c, &statistics));
            (states, statistics, entries)
        })
        .collect();
    let mut pass = Pass { states: Vec::new(), statistics: Vec::new(), blocks: Vec::new() };
    for (states, statistics, entries) in done {
        pass.states.extend(states);
        pass.statistics.extend(statistics);
        pass.blocks.extend(entries);
    }
    pass
}

fn stream_block<T: Element>(
    problem: &Problem<'_>,
    rows: &[Row],
    embeddings: TypedMatrix<'_, T>,
    classifier: TypedMatrix<'_, T>,
    filter: Option<GradientFilter>,
) -> (Vec<SoftmaxState>, Option<Vec<RowCandidates>>) {
    let (hidden, vocab) = (problem.shape().hidden, problem.shape().vocab);
    let map = LogitMap::new(problem);
    let stride = plan::row_stride(hidden);
    let mut block = vec![0.0_f32; rows.len() * stride]; // [rows, D], padded
    let mut wide = vec![0.0_f32; classifier.copy_len(VOCAB_TILE)]; // [tile, D], padded
    let mut tile = vec![0.0_f32; rows.len() * VOCAB_TILE]; // [rows, tile]
    vectorized(
        #[inline(always)]
        || embeddings.widen_rows(rows.iter().map(|r| r.token as usize), &mut block),
    );

    let mut states = seed_states(rows, &block, classifier, &map);
    let space = filter.map_or(0, |f| plan::candidates_per_row(&f));
    let mut candidates: Option<Vec<_>> = filter.map(|f| {
        let list = |r: &Row| RowFilter::new(&f, r.token as usize).map(|filter| RowCandidates::new(filter, r.class));
        rows.iter().filter_map(list).collect()
    });

    for first_class in (0..vocab).step_by(VOCAB_TILE) {
        let columns = VOCAB_TILE.min(vocab - first_class);
        if !wide.is_empty() {
            vectorized(
                #[inline(always)]
                || classifier.widen_rows(first_class..first_class + columns, &mut wide),
            );
        }
        let view = classifier.view(first_class, columns, &wide);
        let logits = &mut tile[..rows.len() * columns];
        matmul(logits, columns, false, View::new(&block, rows.len(), hidden, stride), view.transposed());
        let scan = TileScan { first_class, columns, space, options: problem.options(), map: &map };
        vectorized(
            #[inline(always)]
            || scan.run(problem, rows, logits, &mut states, candidates.as_deref_mut()),
        );
    }
    (states, candidates)
}

/// An empty state a row, seeded with the logit of its target: the N·D dot products that make the capture's bound tight
/// from the first tile on.
fn seed_states<T: Element>(
    rows: &[Row],
    block: &[f32],
    classifier: TypedMatrix<'_, T>,
    map: &LogitMap<'_>,
) -> Vec<SoftmaxState> {
    let (hidden, stride) = (classifier.columns, plan::row_stride(classifier.columns));
    let mut target_row = vec![0.0_f32; hidden];
    // Two sums of D terms in different orders differ by at most 2 · D · 2^-24 · Σ |terms| (Higham 2002, eq. 3.5); the
    // bias and the softcap, which is a contraction, round a few times more.
    let rounding = hidden as f32 * f32::EPSILON * map.scale();
    let mut seed = |(index, row): (usize, &Row)| {
        let (product, magnitude) = vectorized(
            #[inline(always)]
            || {
                T::widen(classifier.row(row.class as usize), &mut target_row);
                vector::dot_and_magnitude(&block[index * stride..][..hidden], &target_row)
            },
        );
        let logit = map.apply(product, row.class as usize);
        SoftmaxState::new(logit, 1e-3 + rounding * magnitude + 4.0 * f32::EPSILON * logit.abs())
    };
    rows.iter().enumerate().map(&mut seed).collect()
}

/// One logits tile, row by row.
struct TileScan<'a> {
    first_class: usize,
    columns: usize,
    space: usize,
    options: &'a CceOptions,
    map: &'a LogitMap<'a>,
}

impl TileScan<'_> {
    #[inline(always)]
    fn run(
        &self,
        problem: &Problem<'_>,
        rows: &[Row],
        logits: &mut [f32],
        states: &mut [SoftmaxState],
        mut candidates: Option<&mut [RowCandidates]>,
    ) {
        let (first_class, columns) = (self.first_class, self.columns);
        let mut exps = [0.0_f32; VOCAB_TILE];
        const { assert!(VOCAB_TILE.is_multiple_of(64), "offsets of a tile's start and of a place in it add up") };
        let mut offsets = [0_u32; VOCAB_TILE];
        for (k, offset) in offsets.iter_mut().enumerate() {
            *offset = class_offset(k as u32);
        }
        let mut bias = [0.0_f32; VOCAB_TILE];
        self.map.widen_bias(first_class, &mut bias[..columns]);
        for (index, (logits, state)) in logits.chunks_exact_mut(columns).zip(states).enumerate() {
            self.map.apply_row(logits, &bias);
            if self.options.entropy {
                state.push::<true>(logits, &mut exps, first_class);
            } else {
                state.push::<false>(logits, &mut exps, first_class);
            }
            let target_at = (rows[index].class as usize).wrapping_sub(first_class);
            if target_at < columns {
                state.target_logit = logits[target_at];
                state.pending = false;
            }
            if self.options.label_smoothing > 0.0 {
                let weighted =
                    |(k, z): (usize, &f32)| (problem.class_weight(first_class + k) * (z - state.anchor)) as f64;
                state.smooth += logits.iter().enumerate().map(weighted).sum::<f64>();
            }
            if let Some(candidates) = candidates.as_deref_mut() {
                candidates[index].capture(state, logits, &exps, &offsets, first_class, self.space);
            }
        }
    }
}
