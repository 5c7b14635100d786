//! Forward: blocks of tokens go past the whole vocabulary, tile by tile, and leave a softmax state and a candidate list a row.
//! Where there are blocks enough, each is one thread's, and the logits of a tile never leave the core's cache:
//!
//! ```text
//!            vocabulary →
//! tokens  ┌──────┬──────┬──────┬─┐
//! block 0 │ tile │ tile │ tile │…│ → SoftmaxState, RowCandidates of each row
//!         ├──────┼──────┼──────┼─┤   (one task, one thread)
//! block 1 │      │      │      │ │
//!         └──────┴──────┴──────┴─┘
//! ```
//!
//! Where tokens are few, threads share each block: one multiplies it with one tile, another with the next, and when two
//! tiles a thread are done, each scans some of the rows. A row meets the same tiles in the same order either way.

use super::bf16::{self, Left, Right};
use super::candidates::{BlockEntries, RowCandidates, RowFilter, RowStatistics};
use super::matmul::{View, ViewMut, matmul};
use super::plan::{self, Schedule, VOCAB_TILE};
use super::rows::{Row, TypedMatrix};
use super::softmax_state::SoftmaxState;
use super::vector::{self, vectorized};
use crate::filter::class_offset;
use crate::{Element, GradientFilter, HostSlice, Problem};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// What the stream left of some rows, or of all: their states and statistics in the order of `rows`.
#[derive(Default)]
pub(crate) struct Pass {
    pub states: Vec<SoftmaxState>,
    pub statistics: Vec<RowStatistics>,
    /// The kept entries, one list of rows after the other; empty when nothing was captured.
    pub lists: Vec<BlockEntries>,
}

impl Pass {
    fn append(mut self, next: Pass) -> Pass {
        self.states.extend(next.states);
        self.statistics.extend(next.statistics);
        self.lists.extend(next.lists);
        self
    }
}

/// Streams every row past the vocabulary. With `filter`, captures candidates.
pub(crate) fn run<T: Element>(
    problem: &Problem<'_>,
    rows: &[Row],
    embeddings: TypedMatrix<'_, T>,
    classifier: TypedMatrix<'_, T>,
    filter: Option<GradientFilter>,
) -> Pass {
    let schedule = Schedule::new(rows.len(), problem.shape().vocab, rayon::current_num_threads());
    let stream = Stream { problem, rows, embeddings, classifier, filter, map: LogitMap::new(problem), schedule };
    let passes: Vec<Vec<Pass>> = if schedule.tiles == 1 {
        (0..schedule.blocks).into_par_iter().map(|block| stream.run(block..block + 1)).collect()
    } else {
        vec![stream.run(0..schedule.blocks)]
    };
    passes.into_iter().flatten().fold(Pass::default(), Pass::append)
}

/// Everything that the stream reads.
struct Stream<'a, 'p, T> {
    problem: &'a Problem<'p>,
    rows: &'a [Row],
    embeddings: TypedMatrix<'a, T>,
    classifier: TypedMatrix<'a, T>,
    filter: Option<GradientFilter>,
    map: LogitMap<'a>,
    schedule: Schedule,
}

/// A tile of the classifier as a product reads it.
#[derive(Default)]
struct Tile {
    wide: Vec<f32>,
    packed: Right,
}

/// Rows that one thread scans at a time, as far as they have come.
struct Stretch<'a> {
    rows: &'a [Row],
    states: Vec<SoftmaxState>,
    /// Empty without a filter.
    candidates: Vec<RowCandidates>,
}

impl<'a, T: Element> Stream<'a, '_, T> {
    /// Streams some of the blocks past the vocabulary, `schedule.tiles` tiles at a time. Where that is one tile of one block, all
    /// of it happens in the calling thread.
    fn run(&self, blocks: Range<usize>) -> Vec<Pass> {
        let (hidden, vocab, tiles) = (self.problem.shape().hidden, self.problem.shape().vocab, self.schedule.tiles);
        let (stride, logits_stride) = (plan::row_stride(hidden), plan::row_stride(tiles * VOCAB_TILE));
        let (first_row, block_rows) = self.schedule.rows_of(self.rows.len(), blocks.clone(), 1);
        let (_, part_rows) = self.schedule.rows_of(self.rows.len(), blocks, tiles);
        let count = block_rows.last().map_or(0, |last| last.end);
        let rows = &self.rows[first_row..first_row + count];

        let packed = Left::of_embeddings(self.embeddings, rows, part_rows.len());
        let mut wide = vec![0.0_f32; if packed.is_some() { 0 } else { count * stride }]; // [rows, D], padded
        if packed.is_none() {
            let cut = ViewMut::new(&mut wide, count, stride, stride).cut_rows(&part_rows);
            cut.into_par_iter().for_each(|part| self.widen(&rows[part.rows], part.values));
        }
        let mut stretches: Vec<Stretch<'a>> =
            part_rows.par_iter().map(|part| self.begin(&rows[part.clone()])).collect();

        let tiles_in_use = Mutex::new(Vec::new()); // as many as products run at a time
        let mut logits = vec![0.0_f32; count * logits_stride]; // [rows, tiles], padded
        for first_class in (0..vocab).step_by(tiles * VOCAB_TILE) {
            let width = (tiles * VOCAB_TILE).min(vocab - first_class);
            let columns: Vec<_> = (0..width).step_by(VOCAB_TILE).map(|k| k..(k + VOCAB_TILE).min(width)).collect();

            let products = ViewMut::new(&mut logits, count, width, logits_stride).cut(&block_rows, &columns);
            products.into_par_iter().with_max_len(1).for_each(|mut part| {
                let classes = first_class + part.columns.start..first_class + part.columns.end;
                let mut tile: Tile = lock(&tiles_in_use).pop().unwrap_or_default();
                match &packed {
                    Some(rows) => {
                        let classifier = bf16::native(self.classifier).expect("of the type of the embeddings");
                        tile.packed.classes(classifier, classes);
                        bf16::multiply(&mut part.values, false, rows, part.rows, &tile.packed);
                    }
                    None => {
                        let embeddings = View::new(&wide, count, hidden, stride);
                        let embeddings = embeddings.rows(part.rows.start, part.rows.len());
                        self.multiply_wide(&mut part.values, embeddings, classes, &mut tile.wide);
                    }
                }
                lock(&tiles_in_use).push(tile);
            });

            let scans = ViewMut::new(&mut logits, count, width, logits_stride).cut_rows(&part_rows);
            let work: Vec<_> = stretches.iter_mut().zip(scans).collect();
            work.into_par_iter().with_max_len(1).for_each(|(stretch, mut part)| {
                for columns in &columns {
                    vectorized(
                        #[inline(always)]
                        || self.scan(stretch, &mut part.values, columns, first_class + columns.start),
                    );
                }
            });
        }
        stretches.into_par_iter().map(|stretch| self.finish(stretch)).collect()
    }

    /// The embeddings of rows as `f32`.
    fn widen(&self, rows: &[Row], mut wide: ViewMut<'_>) {
        let hidden = self.problem.shape().hidden;
        vectorized(
            #[inline(always)]
            || {
                for (index, row) in rows.iter().enumerate() {
                    T::widen(self.embeddings.row(row.token as usize), &mut wide.row(index)[..hidden]);
                }
            },
        );
    }

    /// A tile of logits by `gemm`. copy: of the classifier's tile, where it needs one.
    fn multiply_wide(
        &self,
        logits: &mut ViewMut<'_>,
        embeddings: View<'_>,
        classes: Range<usize>,
        copy: &mut Vec<f32>,
    ) {
        copy.resize(self.classifier.copy_len(VOCAB_TILE), 0.0); // [tile, D], padded
        if !copy.is_empty() {
            vectorized(
                #[inline(always)]
                || self.classifier.widen_rows(classes.clone(), copy),
            );
        }
        let tile = self.classifier.view(classes.start, classes.len(), copy);
        matmul(logits, false, embeddings, tile.transposed());
    }

    /// Rows before their first tile.
    fn begin(&self, rows: &'a [Row]) -> Stretch<'a> {
        let hidden = self.problem.shape().hidden;
        let (mut own_row, mut target_row) = (vec![0.0_f32; hidden], vec![0.0_f32; hidden]);
        // Two sums of D terms in different orders differ by at most 2 · D · 2^-24 · Σ |terms| (Higham 2002, eq. 3.5); the
        // bias and the softcap, which is a contraction, round a few times more.
        let rounding = hidden as f32 * f32::EPSILON * self.map.scale();
        // An empty state, seeded with the logit of its target: the N·D dot products that make the capture's bound tight from
        // the first tile on.
        let mut seed = |row: &Row| {
            let (product, magnitude) = vectorized(
                #[inline(always)]
                || {
                    T::widen(self.embeddings.row(row.token as usize), &mut own_row);
                    T::widen(self.classifier.row(row.class as usize), &mut target_row);
                    vector::dot_and_magnitude(&own_row, &target_row)
                },
            );
            let logit = self.map.apply(product, row.class as usize);
            SoftmaxState::new(logit, 1e-3 + rounding * magnitude + 4.0 * f32::EPSILON * logit.abs())
        };
        let states = rows.iter().map(&mut seed).collect();
        let list = |row: &Row, filter| RowCandidates::new(filter, row.class);
        let filter = |row: &Row| self.filter.and_then(|filter| RowFilter::new(&filter, row.token as usize));
        Stretch { rows, states, candidates: rows.iter().filter_map(|row| Some(list(row, filter(row)?))).collect() }
    }

    /// One tile of `logits`, at `columns`, row by row; its classes begin at `first_class`.
    #[inline(always)]
    fn scan(&self, stretch: &mut Stretch<'_>, logits: &mut ViewMut<'_>, columns: &Range<usize>, first_class: usize) {
        let options = self.problem.options();
        let space = self.filter.map_or(0, |filter| plan::candidates_per_row(&filter));
        let mut exps = [0.0_f32; VOCAB_TILE];
        const { assert!(VOCAB_TILE.is_multiple_of(64), "offsets of a tile's start and of a place in it add up") };
        let mut offsets = [0_u32; VOCAB_TILE];
        for (k, offset) in offsets.iter_mut().enumerate() {
            *offset = class_offset(k as u32);
        }
        let mut bias = [0.0_f32; VOCAB_TILE];
        self.map.widen_bias(first_class, &mut bias[..columns.len()]);
        for (index, state) in stretch.states.iter_mut().enumerate() {
            let logits = &mut logits.row(index)[columns.clone()];
            self.map.apply_row(logits, &bias);
            if options.entropy {
                state.push::<true>(logits, &mut exps, first_class);
            } else {
                state.push::<false>(logits, &mut exps, first_class);
            }
            let target_at = (stretch.rows[index].class as usize).wrapping_sub(first_class);
            if target_at < columns.len() {
                state.target_logit = logits[target_at];
                state.pending = false;
            }
            if options.label_smoothing > 0.0 {
                let weight = |k| self.problem.class_weight(first_class + k);
                let weighted = |(k, z): (usize, &f32)| (weight(k) * (z - state.anchor)) as f64;
                state.smooth += logits.iter().enumerate().map(weighted).sum::<f64>();
            }
            if let Some(candidates) = stretch.candidates.get_mut(index) {
                candidates.capture(state, logits, &exps, &offsets, first_class, space);
            }
        }
    }

    /// Its rows when all tiles have gone by.
    fn finish(&self, stretch: Stretch<'_>) -> Pass {
        let statistics: Vec<_> = stretch.states.iter().map(RowStatistics::new).collect();
        let entries = self.filter.map(|_| BlockEntries::finish(stretch.candidates, &statistics));
        Pass { states: stretch.states, statistics, lists: entries.into_iter().collect() }
    }
}

/// What a panic of another thread left is of no use to anyone, but no reason for a second panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
