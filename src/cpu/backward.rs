//! Backward: which row takes which path, then dE by token and dC by column, every output row written once by one owner.

use super::candidates::{BlockEntries, RowFilter};
use super::coefficients::{RowCoefficients, row_coefficients};
use super::columns::{ColumnEntry, Columns, GroupedEntries, Spread, entry_gradient};
use super::exact::{self, ExactRows, RowNumbers};
use super::forward::{self, LogitMap};
use super::plan::{self, COLUMN_GROUP};
use super::rows::TypedMatrix;
use super::sink::{ColumnSinks, RowSink};
use super::vector::{self, vectorized};
use super::{Saved, matrices};
use crate::{Element, GradientSinks, Problem, Result, Telemetry, Upstream};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens whose dE one task owns.
const TOKEN_GROUP: usize = 16;

/// Parts into which sums over all tokens or classes are cut, whatever their number: partial sums in a fixed order.
const SUM_PARTS: usize = 64;

pub(super) fn run<T: Element>(
    problem: &Problem<'_>,
    embeddings: &[T],
    saved: &Saved,
    upstream: &Upstream<'_>,
    sinks: GradientSinks<'_>,
) -> Result<Telemetry> {
    let (embeddings, classifier) = matrices(problem, embeddings)?;
    let d_embeddings = RowSink::new(sinks.embeddings);
    let column_sinks = ColumnSinks {
        classifier: RowSink::new(sinks.classifier),
        bias: RowSink::new(sinks.bias),
        hidden: embeddings.columns,
    };
    let rows = &saved.rows[..];
    let dense = problem.options().is_dense();

    let recomputed;
    let blocks: &[BlockEntries] = if dense || !saved.blocks.is_empty() {
        &saved.blocks
    } else {
        // The forward captured nothing: run it once more, for the entries alone.
        recomputed = forward::run(problem, rows, embeddings, classifier, Some(problem.options().filter)).lists;
        &recomputed
    };
    let coefficients = row_coefficients(problem, rows, &saved.statistics, upstream);
    let numbers = RowNumbers { rows, statistics: &saved.statistics, coefficients: &coefficients };
    let sparse = SparseRows { problem, numbers, blocks, map: LogitMap::new(problem) };

    let exact_indices: Vec<usize> = (0..rows.len()).filter(|&i| sparse.is_exact(i)).collect();
    let telemetry = telemetry(rows.len(), exact_indices.len(), blocks);
    let mut exact = ExactRows::new(exact_indices, &d_embeddings, &column_sinks);
    let smoothing = problem.options().label_smoothing > 0.0 && !dense;

    let wanted = !column_sinks.is_skip();
    if wanted || !exact.d_embeddings.is_empty() {
        let spread = if smoothing && wanted { sparse.spread(embeddings) } else { Spread::default() };
        let columns = Columns { problem, rows, embeddings, map: LogitMap::new(problem), spread: &spread };
        if exact.indices.is_empty() {
            sparse_columns(&sparse, &columns, telemetry.kept_entries as usize, column_sinks);
        } else {
            let entries_of = |groups| if wanted { sparse.by_column_group(groups) } else { Vec::new() };
            exact::run(problem, numbers, &mut exact, classifier, &columns, entries_of, column_sinks);
        }
    }
    if !d_embeddings.is_skip() {
        let class_sum = if smoothing { weighted_class_sum(problem, classifier) } else { Vec::new() };
        sparse.write_embeddings(classifier, &class_sum, &exact, d_embeddings);
    }
    Ok(telemetry)
}

/// dC and dbias where every row is sparse: as many column groups at a time as their regrouped entries fit the space.
fn sparse_columns<T: Element>(
    sparse: &SparseRows<'_, '_>,
    columns: &Columns<'_, '_, T>,
    kept_entries: usize,
    mut sinks: ColumnSinks<'_>,
) {
    let vocab = sparse.problem.shape().vocab;
    let groups = Columns::<T>::groups(vocab);
    let passes = (kept_entries * size_of::<ColumnEntry>()).div_ceil(plan::COLUMN_ENTRY_BYTES).clamp(1, groups.max(1));
    for pass in 0..passes {
        let range = groups * pass / passes..groups * (pass + 1) / passes;
        let classes = range.start * COLUMN_GROUP..(range.end * COLUMN_GROUP).min(vocab);
        let entries = sparse.by_column_group(range.clone());
        let parts = sinks.part(classes).split(COLUMN_GROUP, range.len());
        let work: Vec<_> = range.zip(parts).collect();
        work.into_par_iter().for_each(|(group, sinks)| {
            columns.finish_group(group, &entries, &[], &[], sinks);
        });
    }
}

fn telemetry(rows: usize, exact_rows: usize, blocks: &[BlockEntries]) -> Telemetry {
    let mass: f64 = blocks.iter().map(|b| b.mass).sum();
    Telemetry {
        rows: rows as u64,
        candidates: blocks.iter().map(|b| b.captured).sum(),
        kept_entries: blocks.iter().map(|b| b.entries.len() as u64).sum(),
        kept_mass: (mass + exact_rows as f64) / rows.max(1) as f64,
        exact_rows: exact_rows as u64,
        raised_rows: 0,
    }
}

/// `Σ_v w_v C_v` `[D]`.
fn weighted_class_sum<T: Element>(problem: &Problem<'_>, classifier: TypedMatrix<'_, T>) -> Vec<f32> {
    sum_rows(problem.shape().vocab, problem.shape().hidden, |v| Some((problem.class_weight(v), classifier.row(v))))
}

/// `Σ_k factor_k row_k`, in a fixed order of additions.
fn sum_rows<'a, T: Element>(
    count: usize,
    hidden: usize,
    term: impl Fn(usize) -> Option<(f32, &'a [T])> + Sync,
) -> Vec<f32> {
    let part = count.div_ceil(SUM_PARTS).max(1);
    let partial = |start: usize| {
        let mut acc = vec![0.0_f32; hidden];
        vectorized(
            #[inline(always)]
            || {
                for k in start..(start + part).min(count) {
                    if let Some((factor, row)) = term(k) {
                        vector::add_scaled(&mut acc, factor, row);
                    }
                }
            },
        );
        acc
    };
    let partials: Vec<Vec<f32>> = (0..count).into_par_iter().step_by(part).map(partial).collect();
    let column = |k: usize| partials.iter().map(|p| p[k] as f64).sum::<f64>() as f32;
    (0..hidden).map(column).collect()
}

/// The kept entries of all blocks, with what turns them into gradients.
struct SparseRows<'a, 'p> {
    problem: &'a Problem<'p>,
    numbers: RowNumbers<'a>,
    blocks: &'a [BlockEntries],
    map: LogitMap<'a>,
}

impl SparseRows<'_, '_> {
    /// Block and position in it of row `index`.
    fn locate(&self, index: usize) -> (usize, usize) {
        let (rows, blocks) = (self.numbers.rows.len(), self.blocks.len());
        // Blocks are equal up to 8 rows: the quotient is right or one off.
        let mut block = index * blocks / rows;
        loop {
            let range = plan::token_block(rows, blocks, block);
            match index {
                i if i < range.start => block -= 1,
                i if i >= range.end => block += 1,
                i => return (block, i - range.start),
            }
        }
    }

    fn is_exact(&self, index: usize) -> bool {
        if self.blocks.is_empty() {
            return true;
        }
        let (block, at) = self.locate(index);
        self.blocks[block].overflowed[at]
    }

    /// Kept entries of a row with classes in a range, as (class, gradient of its logit).
    #[inline(always)]
    fn gradients(
        &self,
        index: usize,
        block: usize,
        at: usize,
        classes: &Range<u32>,
    ) -> impl Iterator<Item = (u32, f32)> {
        let row = self.numbers.rows[index];
        let (statistics, coefficients) = (self.numbers.statistics[index], self.numbers.coefficients[index]);
        let filter = RowFilter::new(&self.problem.options().filter, row.token as usize);
        // Nothing upstream: exactly nothing to give back.
        let entries = if coefficients.is_zero() { &[] } else { self.blocks[block].row(at) };
        let first = entries.partition_point(|e| e.class < classes.start);
        let count = entries[first..].partition_point(|e| e.class < classes.end);
        let entries = &entries[first..first + count];
        let map = self.map;
        entries.iter().map(move |e| {
            let value = |p| filter.map_or(p, |f| f.value(p));
            (e.class, entry_gradient(e.logit, e.class == row.class, value, &statistics, &coefficients, &map))
        })
    }

    /// The entries of some column groups with their gradients, one list a token block.
    fn by_column_group(&self, groups: Range<usize>) -> Vec<GroupedEntries> {
        let rows = self.numbers.rows.len();
        let classes = (groups.start * COLUMN_GROUP) as u32..(groups.end * COLUMN_GROUP).min(u32::MAX as usize) as u32;
        let group_block = |block: usize| {
            let range = plan::token_block(rows, self.blocks.len(), block);
            let mut entries = Vec::new();
            vectorized(
                #[inline(always)]
                || {
                    for (at, index) in range.enumerate() {
                        for (class, gradient) in self.gradients(index, block, at, &classes) {
                            entries.push(ColumnEntry { class, row: index as u32, gradient });
                        }
                    }
                },
            );
            GroupedEntries::new(groups.clone(), &entries)
        };
        (0..self.blocks.len()).into_par_iter().map(group_block).collect()
    }

    /// `Σ_i b_i E_i` and `Σ_i b_i` over the sparse rows.
    fn spread<T: Element>(&self, embeddings: TypedMatrix<'_, T>) -> Spread {
        let rows = self.numbers.rows;
        let sparse: Vec<usize> = (0..rows.len()).filter(|&i| !self.is_exact(i)).collect();
        let factor = |i: usize| self.numbers.coefficients[i].spread;
        let term = |k: usize| Some((factor(sparse[k]), embeddings.row(rows[sparse[k]].token as usize)));
        Spread {
            embeddings: sum_rows(sparse.len(), embeddings.columns, term),
            sum: sparse.iter().map(|&i| factor(i) as f64).sum::<f64>() as f32,
        }
    }

    /// dE of every token: zeros for ignored ones, the exact path's rows, and sums over kept entries for the others.
    fn write_embeddings<T: Element>(
        &self,
        classifier: TypedMatrix<'_, T>,
        class_sum: &[f32],
        exact: &ExactRows,
        sink: RowSink<'_>,
    ) {
        let (tokens, hidden) = (self.problem.shape().tokens, self.problem.shape().hidden);
        let groups = tokens.div_ceil(TOKEN_GROUP);
        let parts: Vec<_> = sink.split(TOKEN_GROUP * hidden, groups).into_iter().enumerate().collect();
        parts.into_par_iter().for_each(|(group, mut sink)| {
            let mut acc = vec![0.0_f32; hidden];
            let mut coefficients = Vec::new();
            let mut classes = Vec::new();
            for (at, token) in (group * TOKEN_GROUP..((group + 1) * TOKEN_GROUP).min(tokens)).enumerate() {
                let rows = self.numbers.rows;
                let Ok(index) = rows.binary_search_by_key(&(token as u32), |r| r.token) else {
                    sink.put_zeros(at * hidden, hidden);
                    continue;
                };
                if let Ok(at_exact) = exact.indices.binary_search(&index) {
                    sink.put(at * hidden, &exact.d_embeddings[at_exact * hidden..][..hidden]);
                    continue;
                }
                let (block, at_block) = self.locate(index);
                let row: RowCoefficients = self.numbers.coefficients[index];
                vectorized(
                    #[inline(always)]
                    || {
                        classes.clear();
                        coefficients.clear();
                        for (class, gradient) in self.gradients(index, block, at_block, &(0..u32::MAX)) {
                            classes.push(class as usize);
                            coefficients.push(gradient * self.map.scale());
                        }
                        acc.fill(0.0);
                        vector::add_rows(&mut acc, &coefficients, |j| classifier.row(classes[j]));
                        if !class_sum.is_empty() {
                            vector::add_scaled(&mut acc, -row.spread * self.map.scale(), class_sum);
                        }
                        sink.put(at * hidden, &acc);
                    },
                );
            }
        });
    }
}
