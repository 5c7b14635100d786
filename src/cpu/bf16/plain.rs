//! The three products of whole matrices, logits in memory: what `cce bench` takes for one plain matmul, and for the materialising
//! baseline. All matrices are dense and row-major. Panics where [`super::multiplies_bf16`] is false or lengths disagree.

use super::{CONTRACTION, Left, Right, multiply};
use crate::Shape;
use crate::cpu::matmul::{View, ViewMut};
use crate::cpu::plan::{MAX_BLOCK_ROWS, VOCAB_TILE};
use crate::cpu::rows::{Row, TypedMatrix};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

fn typed(data: &[bf16], rows: usize, columns: usize) -> TypedMatrix<'_, bf16> {
    assert_eq!(data.len(), rows * columns);
    TypedMatrix { data, columns, row_stride: columns }
}

/// 0..`len` in ranges of `most`.
fn ranges(len: usize, most: usize) -> Vec<Range<usize>> {
    (0..len).step_by(most).map(|first| first..(first + most).min(len)).collect()
}

/// `logits = E Cᵀ`.
pub fn logits(logits: &mut [f32], embeddings: &[bf16], classifier: &[bf16], shape: Shape) {
    let Shape { tokens, hidden, vocab } = shape;
    let (embeddings, classifier) = (typed(embeddings, tokens, hidden), typed(classifier, vocab, hidden));
    let rows: Vec<Row> = (0..tokens).map(|token| Row { token: token as u32, class: 0 }).collect();
    let left = Left::of_embeddings(embeddings, &rows, rayon::current_num_threads());
    let left = left.expect("the processor multiplies bf16");
    let parts = ViewMut::new(logits, tokens, vocab, vocab);
    let parts = parts.cut(&ranges(tokens, MAX_BLOCK_ROWS), &ranges(vocab, VOCAB_TILE));
    parts.into_par_iter().for_each_init(Right::default, |right, mut part| {
        right.classes(classifier, part.columns);
        multiply(&mut part.values, false, &left, part.rows, right);
    });
}

/// `d_embeddings = G C` of logit gradients G, each rounded to bf16.
pub fn d_embeddings(d_embeddings: &mut [f32], gradients: &[f32], classifier: &[bf16], shape: Shape) {
    let Shape { tokens, hidden, vocab } = shape;
    let classifier = typed(classifier, vocab, hidden);
    let gradients = View::new(gradients, tokens, vocab, vocab);
    let share = tokens.div_ceil(rayon::current_num_threads()).clamp(1, MAX_BLOCK_ROWS);
    let parts = ViewMut::new(d_embeddings, tokens, hidden, hidden).cut_rows(&ranges(tokens, share));
    parts.into_par_iter().for_each_init(<(Left, Right)>::default, |(left, right), mut part| {
        for classes in ranges(vocab, CONTRACTION) {
            let own = gradients.rows(part.rows.start, part.rows.len());
            left.gradients(own.columns(classes.start, classes.len()));
            right.columns(classes.len(), |k| classifier.row(classes.start + k), 0..hidden);
            multiply(&mut part.values, classes.start > 0, left, 0..part.rows.len(), right);
        }
    });
}

/// `d_classifier = Gᵀ E`, the same.
pub fn d_classifier(d_classifier: &mut [f32], gradients: &[f32], embeddings: &[bf16], shape: Shape) {
    let Shape { tokens, hidden, vocab } = shape;
    let embeddings = typed(embeddings, tokens, hidden);
    let gradients = View::new(gradients, tokens, vocab, vocab);
    let parts = ViewMut::new(d_classifier, vocab, hidden, hidden).cut_rows(&ranges(vocab, CONTRACTION));
    parts.into_par_iter().for_each_init(<(Left, Right)>::default, |(left, right), mut part| {
        for tokens in ranges(tokens, CONTRACTION) {
            let own = gradients.rows(tokens.start, tokens.len());
            left.gradients_transposed(own.columns(part.rows.start, part.rows.len()));
            right.columns(tokens.len(), |k| embeddings.row(tokens.start + k), 0..hidden);
            multiply(&mut part.values, tokens.start > 0, left, 0..part.rows.len(), right);
        }
    });
}
