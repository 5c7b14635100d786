//! The exact path: logits once more, a vocabulary chunk at a time, their gradients in a bounded workspace, two products.
//!
//! It serves the exact filter (all rows) and the rows that the sparse path cannot hold.

use super::candidates::RowStatistics;
use super::coefficients::RowCoefficients;
use super::columns::{Columns, GroupedEntries};
use super::exact_products::Products;
use super::forward::LogitMap;
use super::matmul::{MIN_ROWS, Part, View, ViewMut};
use super::plan::{self, COLUMN_GROUP, VOCAB_TILE};
use super::rows::{Row, TypedMatrix};
use super::sink::{ColumnSinks, RowSink};
use super::vector::vectorized;
use crate::{Element, Problem};
use rayon::prelude::*;
use std::ops::Range;

/// The rows on the exact path, gathered.
pub(crate) struct ExactRows {
    /// Positions in the list of active rows, ascending.
    pub indices: Vec<usize>,
    /// Their gradients in f32, [rows, D]; empty when not asked for.
    pub d_embeddings: Vec<f32>,
    /// Whether dE and dC are written in 16 bits, so that logit gradients may be.
    pub narrow: bool,
}

impl ExactRows {
    pub fn new(indices: Vec<usize>, d_embeddings: &RowSink<'_>, columns: &ColumnSinks<'_>) -> Self {
        let elements = if d_embeddings.is_skip() { 0 } else { indices.len() * columns.hidden };
        let narrow = !d_embeddings.is_f32() && !columns.classifier.is_f32();
        ExactRows { indices, d_embeddings: vec![0.0_f32; elements], narrow }
    }
}

/// Per-row numbers, indexed like the active rows.
#[derive(Clone, Copy)]
pub(crate) struct RowNumbers<'a> {
    pub rows: &'a [Row],
    pub statistics: &'a [RowStatistics],
    pub coefficients: &'a [RowCoefficients],
}

/// Streams the vocabulary past the exact rows: adds to `exact.d_embeddings`, and finishes every column, the sparse
/// rows' entries (`entries_of` a range of column groups) included.
pub(crate) fn run<T: Element>(
    problem: &Problem<'_>,
    numbers: RowNumbers<'_>,
    exact: &mut ExactRows,
    classifier: TypedMatrix<'_, T>,
    columns: &Columns<'_, '_, T>,
    entries_of: impl Fn(Range<usize>) -> Vec<GroupedEntries>,
    mut sinks: ColumnSinks<'_>,
) {
    let (vocab, hidden) = (problem.shape().vocab, problem.shape().hidden);
    let rows = exact.indices.len();
    let chunk = plan::exact_chunk(rows, hidden);
    let threads = rayon::current_num_threads();
    let blocks = plan::exact_blocks(rows, chunk.min(vocab).div_ceil(VOCAB_TILE), threads);
    let block_rows: Vec<Range<usize>> = (0..blocks).map(|b| plan::token_block(rows, blocks, b)).collect();
    let (no_classifier, no_bias) = (sinks.classifier.is_skip(), sinks.bias.is_skip());
    let map = LogitMap::new(problem);
    let stride = plan::row_stride(chunk.min(vocab));
    let mut gradients = vec![0.0_f32; rows * stride]; // [rows, chunk], padded
    let mut dense = vec![0.0_f32; if no_classifier { 0 } else { chunk.min(vocab) * hidden }]; // [chunk, D]
    let own_rows = exact.indices.iter().map(|&index| numbers.rows[index]).collect();
    let mut products = Products::new(columns.embeddings, classifier, own_rows, chunk.min(vocab), exact.narrow);

    for first in (0..vocab).step_by(chunk) {
        let classes = first..(first + chunk).min(vocab);
        let width = classes.len();
        products.load(classes.clone());

        // As in the forward: a tile becomes gradients while it is in the core's cache.
        let tiles: Vec<Range<usize>> = (0..width).step_by(VOCAB_TILE).map(|k| k..(k + VOCAB_TILE).min(width)).collect();
        let logits = ViewMut::new(&mut gradients, rows, width, stride).cut(&block_rows, &tiles);
        logits.into_par_iter().for_each(|Part { rows, columns, mut values }| {
            products.logits(&mut values, rows.clone(), columns.clone());
            let (indices, classes) = (&exact.indices[rows], first + columns.start..first + columns.end);
            vectorized(
                #[inline(always)]
                || logits_to_gradients(problem, numbers, indices, &map, &mut values, classes),
            );
        });

        let gradients = &gradients[..];
        if !exact.d_embeddings.is_empty() {
            let slices = shares(hidden, threads.div_ceil(blocks));
            let d_embeddings = ViewMut::new(&mut exact.d_embeddings, rows, hidden, hidden).cut(&block_rows, &slices);
            d_embeddings.into_par_iter().for_each(|Part { rows, columns, mut values }| {
                let own = View::new(&gradients[rows.start * stride..], rows.len(), width, stride);
                products.add_d_embeddings(&mut values, own, columns);
            });
        }

        if no_classifier && no_bias {
            continue;
        }
        if !no_classifier {
            let class_shares = shares(width, threads);
            let slices = shares(hidden, threads.div_ceil(class_shares.len()));
            let dense = ViewMut::new(&mut dense, width, hidden, hidden).cut(&class_shares, &slices);
            dense.into_par_iter().for_each(|Part { rows: classes, columns, mut values }| {
                let own = View::new(&gradients[classes.start..], rows, classes.len(), stride);
                products.d_classifier(&mut values, own, columns);
            });
        }
        let groups = first / COLUMN_GROUP..classes.end.div_ceil(COLUMN_GROUP);
        let entries = entries_of(groups.clone());
        let group_sinks = sinks.part(classes.clone()).split(COLUMN_GROUP, groups.len());
        let dense = if no_classifier { &mut [][..] } else { &mut dense[..width * hidden] };
        let mut dense_groups: Vec<&mut [f32]> = dense.chunks_mut((COLUMN_GROUP * hidden).max(1)).collect();
        dense_groups.resize_with(groups.len(), Default::default);
        group_sinks.into_par_iter().zip(dense_groups).enumerate().for_each(|(k, (sinks, dense))| {
            let in_chunk = k * COLUMN_GROUP..((k + 1) * COLUMN_GROUP).min(width);
            if map.scale() != 1.0 {
                dense.iter_mut().for_each(|g| *g *= map.scale());
            }
            let dense_bias = if no_bias { Vec::new() } else { bias_sums(gradients, stride, &in_chunk) };
            columns.finish_group(groups.start + k, &entries, dense, &dense_bias, sinks);
        });
    }
    if map.scale() != 1.0 {
        exact.d_embeddings.iter_mut().for_each(|g| *g *= map.scale());
    }
}

/// `width` columns cut into `parts` at most, each of which is a product of its own that packs the other operand anew;
/// at column groups, and none so small that its sums would be formed differently.
fn shares(width: usize, parts: usize) -> Vec<Range<usize>> {
    let share = width.div_ceil(COLUMN_GROUP).div_ceil(parts).max(1) * COLUMN_GROUP;
    let count = (width / share + usize::from(width % share > MIN_ROWS)).max(1);
    (0..count).map(|k| k * share..if k + 1 == count { width } else { (k + 1) * share }).collect()
}

/// Sums of the logit gradients of columns `own` of a chunk over all rows.
fn bias_sums(gradients: &[f32], stride: usize, own: &Range<usize>) -> Vec<f32> {
    let mut sums = vec![0.0_f64; own.len()];
    for row in gradients.chunks_exact(stride) {
        for (sum, g) in sums.iter_mut().zip(&row[own.clone()]) {
            *sum += *g as f64;
        }
    }
    sums.iter().map(|&s| s as f32).collect()
}

/// From products to `∂L/∂x`, in place; the logit scale comes later, to the finished sums.
#[inline(always)]
fn logits_to_gradients(
    problem: &Problem<'_>,
    numbers: RowNumbers<'_>,
    indices: &[usize],
    map: &LogitMap<'_>,
    tile: &mut ViewMut<'_>,
    classes: Range<usize>,
) {
    let (mut bias, mut class_weights) = ([0.0_f32; VOCAB_TILE], [0.0_f32; VOCAB_TILE]);
    map.widen_bias(classes.start, &mut bias[..classes.len()]);
    for (class, w) in classes.clone().zip(&mut class_weights) {
        *w = problem.class_weight(class);
    }
    for (k, &index) in indices.iter().enumerate() {
        let row = tile.row(k);
        map.apply_row(row, &bias);
        let (statistics, coefficients) = (&numbers.statistics[index], &numbers.coefficients[index]);
        let target = (numbers.rows[index].class as usize).wrapping_sub(classes.start);
        let target_logit = row.get(target).copied();
        if coefficients.entropy == 0.0 && coefficients.spread == 0.0 && !map.has_softcap() {
            // The common case, kept free of branches so that it vectorises.
            row.iter_mut().for_each(|z| *z = statistics.probability(*z) * coefficients.softmax);
        } else {
            for (z, w) in row.iter_mut().zip(&class_weights) {
                let (p, log_p) = (statistics.probability(*z), statistics.log_probability(*z));
                let gradient = coefficients.of_probability(p, log_p, statistics) - coefficients.spread * w;
                *z = gradient * map.softcap_derivative(*z);
            }
        }
        if let Some(logit) = target_logit {
            row[target] -= coefficients.target * map.softcap_derivative(logit);
        }
    }
}
