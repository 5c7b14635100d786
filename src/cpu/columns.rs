//! dC and dbias: kept entries regrouped by class, each column of the classifier finished by one owner.

use super::candidates::RowStatistics;
use super::coefficients::RowCoefficients;
use super::forward::LogitMap;
use super::plan::COLUMN_GROUP;
use super::rows::{Row, TypedMatrix};
use super::sink::ColumnSinks;
use super::vector::{self, vectorized};
use crate::{Element, Problem};
use rayon::prelude::*;
use std::ops::Range;

/// The gradient of one logit, `∂L/∂z` times the softcap's derivative.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ColumnEntry {
    pub class: u32,
    pub row: u32,
    pub gradient: f32,
}

/// The entries of one token block in a range of column groups, group by group, rows ascending within a group.
#[derive(Debug)]
pub(crate) struct GroupedEntries {
    first_group: usize,
    offsets: Vec<u32>,
    entries: Vec<ColumnEntry>,
}

impl GroupedEntries {
    /// Counting sort by column group of `entries`, which belong to `groups` alone.
    pub fn new(groups: Range<usize>, entries: &[ColumnEntry]) -> Self {
        let position = |entry: &ColumnEntry| entry.class as usize / COLUMN_GROUP - groups.start;
        let mut offsets = vec![0_u32; groups.len() + 1];
        for entry in entries {
            offsets[position(entry) + 1] += 1;
        }
        for g in 0..groups.len() {
            offsets[g + 1] += offsets[g];
        }
        let mut next = offsets.clone();
        let mut sorted = vec![ColumnEntry::default(); offsets[groups.len()] as usize];
        for entry in entries {
            let at = &mut next[position(entry)];
            sorted[*at as usize] = *entry;
            *at += 1;
        }
        GroupedEntries { first_group: groups.start, offsets, entries: sorted }
    }

    fn group(&self, group: usize) -> &[ColumnEntry] {
        let at = group - self.first_group;
        &self.entries[self.offsets[at] as usize..self.offsets[at + 1] as usize]
    }
}

/// The dense part of label smoothing over the sparse rows: rank one, so it costs one vector.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spread {
    /// `Σ_i b_i E_i` `[D]`; empty without smoothing.
    pub embeddings: Vec<f32>,
    /// `Σ_i b_i`.
    pub sum: f32,
}

/// Everything a column needs to be finished.
pub(crate) struct Columns<'a, 'p, T> {
    pub problem: &'a Problem<'p>,
    pub rows: &'a [Row],
    pub embeddings: TypedMatrix<'a, T>,
    pub map: LogitMap<'a>,
    pub spread: &'a Spread,
}

/// Columns that one task works on when a group is so full that several threads should share it.
const SHARED_COLUMNS: usize = 8;

/// Entries from which a group is worth sharing: some tens of microseconds of work.
const SHARED_FROM: usize = 2048;

impl<T: Element> Columns<'_, '_, T> {
    /// Number of groups in a vocabulary.
    pub fn groups(vocab: usize) -> usize {
        vocab.div_ceil(COLUMN_GROUP)
    }

    /// Classes of group `group`.
    pub fn classes(vocab: usize, group: usize) -> Range<usize> {
        group * COLUMN_GROUP..((group + 1) * COLUMN_GROUP).min(vocab)
    }

    /// Finishes the columns of one group from `entries` of a range that holds it. `dense` and `dense_bias` hold what the rows of the exact path contribute:
    /// [columns, D] and `[columns]`, empty where there are none.
    pub fn finish_group(
        &self,
        group: usize,
        entries: &[GroupedEntries],
        dense: &[f32],
        dense_bias: &[f32],
        sinks: ColumnSinks<'_>,
    ) {
        let classes = Self::classes(self.problem.shape().vocab, group);
        let (first, hidden) = (classes.start, self.problem.shape().hidden);
        let (offsets, entries) = self.by_class(group, entries);

        let parts = classes.len().div_ceil(SHARED_COLUMNS);
        let finish_part = |(part, sinks): (usize, ColumnSinks<'_>)| {
            let ColumnSinks { classifier: mut d_classifier, bias: mut d_bias, .. } = sinks;
            let start = part * SHARED_COLUMNS;
            let end = (start + SHARED_COLUMNS).min(classes.len());
            let mut row = vec![0.0_f32; if d_classifier.is_skip() { 0 } else { hidden }];
            for column in start..end {
                let entries = &entries[offsets[column] as usize..offsets[column + 1] as usize];
                let at = column - start;
                if !d_bias.is_skip() {
                    let exact = dense_bias.get(column).copied().unwrap_or(0.0);
                    d_bias.put(at, &[exact + self.bias_gradient(first + column, entries)]);
                }
                if d_classifier.is_skip() {
                    continue;
                }
                if entries.is_empty() && dense.is_empty() && self.spread.embeddings.is_empty() {
                    d_classifier.put_zeros(at * hidden, hidden);
                    continue;
                }
                match dense.get(column * hidden..(column + 1) * hidden) {
                    Some(exact) if !dense.is_empty() => row.copy_from_slice(exact),
                    _ => row.fill(0.0),
                }
                vectorized(
                    #[inline(always)]
                    || {
                        self.add_entries(&mut row, first + column, entries);
                        d_classifier.put(at * hidden, &row);
                    },
                );
            }
        };
        let work: Vec<_> = sinks.split(SHARED_COLUMNS, parts).into_iter().enumerate().collect();
        if entries.len() >= SHARED_FROM {
            work.into_par_iter().for_each(finish_part);
        } else {
            work.into_iter().for_each(finish_part);
        }
    }

    /// The group's entries sorted by class, rows ascending, and where each class starts.
    fn by_class(&self, group: usize, blocks: &[GroupedEntries]) -> (Vec<u32>, Vec<ColumnEntry>) {
        let classes = Self::classes(self.problem.shape().vocab, group);
        let all = || blocks.iter().flat_map(|b| b.group(group));
        let mut offsets = vec![0_u32; classes.len() + 1];
        for entry in all() {
            offsets[entry.class as usize - classes.start + 1] += 1;
        }
        for k in 0..classes.len() {
            offsets[k + 1] += offsets[k];
        }
        let mut next = offsets.clone();
        let mut sorted = vec![ColumnEntry::default(); offsets[classes.len()] as usize];
        for entry in all() {
            let at = &mut next[entry.class as usize - classes.start];
            sorted[*at as usize] = *entry;
            *at += 1;
        }
        (offsets, sorted)
    }

    fn bias_gradient(&self, class: usize, entries: &[ColumnEntry]) -> f32 {
        let sum: f64 = entries.iter().map(|e| e.gradient as f64).sum();
        let spread = if self.spread.sum == 0.0 { 0.0 } else { self.spread.sum * self.problem.class_weight(class) };
        sum as f32 - spread
    }

    #[inline(always)]
    fn add_entries(&self, row: &mut [f32], class: usize, entries: &[ColumnEntry]) {
        const BATCH: usize = 64;
        let mut coefficients = [0.0_f32; BATCH];
        for batch in entries.chunks(BATCH) {
            for (c, e) in coefficients.iter_mut().zip(batch) {
                *c = e.gradient * self.map.scale();
            }
            let embedding = |j: usize| self.embeddings.row(self.rows[batch[j].row as usize].token as usize);
            vector::add_rows(row, &coefficients[..batch.len()], embedding);
        }
        if !self.spread.embeddings.is_empty() {
            let weight = -self.problem.class_weight(class) * self.map.scale();
            vector::add_scaled(row, weight, &self.spread.embeddings);
        }
    }
}

/// The gradient of a kept entry's logit.
#[inline(always)]
pub(crate) fn entry_gradient(
    logit: f32,
    is_target: bool,
    value: impl Fn(f32) -> f32,
    statistics: &RowStatistics,
    coefficients: &RowCoefficients,
    map: &LogitMap<'_>,
) -> f32 {
    let p = statistics.probability(logit);
    let log_p = statistics.log_probability(logit);
    let gradient = if is_target {
        coefficients.of_probability(p, log_p, statistics) - coefficients.target
    } else {
        coefficients.of_probability(value(p), log_p, statistics)
    };
    gradient * map.softcap_derivative(logit)
}
