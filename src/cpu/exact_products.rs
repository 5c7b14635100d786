//! The products of the exact path for a chunk of classes: `E Cᵀ` for the logits, `G C` for dE, `Gᵀ E` for dC. In f32 by `gemm`, to which
//! 16-bit operands are widened, or of bf16 where the processor multiplies it and gradients are written in bf16; then each logit gradient
//! is rounded to bf16 once.

use super::bf16::{self, CONTRACTION, Left, Right};
use super::matmul::{View, ViewMut, matmul};
use super::plan;
use super::rows::{Row, TypedMatrix};
use super::vector::vectorized;
use crate::Element;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The operands.
pub(crate) struct Products<'a, T> {
    embeddings: TypedMatrix<'a, T>,
    classifier: TypedMatrix<'a, T>,
    rows: Vec<Row>,
    /// The classes of the present chunk.
    chunk: Range<usize>,
    form: Form,
}

enum Form {
    Wide {
        /// [rows, D], padded.
        embeddings: Vec<f32>,
        /// The chunk's classes, [chunk, D], padded; empty where they are read as they lie.
        classifier: Vec<f32>,
    },
    Packed {
        embeddings: Left,
        /// As many as products run at a time.
        operands: Mutex<Vec<(Left, Right)>>,
    },
}

impl<'a, T: Element> Products<'a, T> {
    /// Of these rows, with chunks of at most `most_classes` classes. narrow: whether logit gradients may be rounded to bf16.
    pub fn new(
        embeddings: TypedMatrix<'a, T>,
        classifier: TypedMatrix<'a, T>,
        rows: Vec<Row>,
        most_classes: usize,
        narrow: bool,
    ) -> Self {
        let packed = || Left::of_embeddings(embeddings, &rows, rayon::current_num_threads());
        let form = match narrow.then(packed).flatten() {
            Some(embeddings) => Form::Packed { embeddings, operands: Mutex::default() },
            None => {
                let mut wide = vec![0.0_f32; rows.len() * plan::row_stride(embeddings.columns)];
                vectorized(
                    #[inline(always)]
                    || embeddings.widen_rows(rows.iter().map(|row| row.token as usize), &mut wide),
                );
                Form::Wide { embeddings: wide, classifier: vec![0.0_f32; classifier.copy_len(most_classes)] }
            }
        };
        Products { embeddings, classifier, rows, chunk: 0..0, form }
    }

    /// The next chunk, by all threads.
    pub fn load(&mut self, classes: Range<usize>) {
        if let Form::Wide { classifier: wide, .. } = &mut self.form
            && !wide.is_empty()
        {
            let share = classes.len().div_ceil(rayon::current_num_threads());
            let stride = plan::row_stride(self.classifier.columns);
            let part = |(index, to): (usize, &mut [f32])| {
                let begin = classes.start + index * share;
                vectorized(
                    #[inline(always)]
                    || self.classifier.widen_rows(begin..(begin + share).min(classes.end), to),
                );
            };
            wide[..classes.len() * stride].par_chunks_mut(share * stride).enumerate().for_each(part);
        }
        self.chunk = classes;
    }

    /// `dst = E Cᵀ` of some rows and some of the chunk's classes, both counted from the first.
    pub fn logits(&self, dst: &mut ViewMut<'_>, rows: Range<usize>, classes: Range<usize>) {
        match &self.form {
            Form::Wide { embeddings, classifier } => {
                let tile = self.wide_classes(classifier).rows(classes.start, classes.len());
                matmul(dst, false, self.wide_rows(embeddings).rows(rows.start, rows.len()), tile.transposed());
            }
            Form::Packed { embeddings, .. } => self.with_operands(|(_, right)| {
                let classes = self.chunk.start + classes.start..self.chunk.start + classes.end;
                right.classes(native(self.classifier), classes);
                bf16::multiply(dst, false, embeddings, rows, right);
            }),
        }
    }

    /// `dst += G C`, some columns of it. gradients: of some rows and all of the chunk's classes.
    pub fn add_d_embeddings(&self, dst: &mut ViewMut<'_>, gradients: View<'_>, columns: Range<usize>) {
        match &self.form {
            Form::Wide { classifier, .. } => {
                matmul(dst, true, gradients, self.wide_classes(classifier).columns(columns.start, columns.len()));
            }
            Form::Packed { .. } => self.with_operands(|(left, right)| {
                let classifier = native(self.classifier);
                left.gradients(gradients);
                right.columns(self.chunk.len(), |class| classifier.row(self.chunk.start + class), columns);
                bf16::multiply(dst, true, left, 0..gradients.size().0, right);
            }),
        }
    }

    /// `dst = Gᵀ E`, some columns of it. gradients: of all rows and some of the chunk's classes.
    pub fn d_classifier(&self, dst: &mut ViewMut<'_>, gradients: View<'_>, columns: Range<usize>) {
        match &self.form {
            Form::Wide { embeddings, .. } => {
                let embeddings = self.wide_rows(embeddings).columns(columns.start, columns.len());
                matmul(dst, false, gradients.transposed(), embeddings);
            }
            Form::Packed { .. } => self.with_operands(|(left, right)| {
                let (embeddings, (rows, classes)) = (native(self.embeddings), gradients.size());
                for first in (0..rows).step_by(CONTRACTION) {
                    let count = CONTRACTION.min(rows - first);
                    left.gradients_transposed(gradients.rows(first, count));
                    let row = |row: usize| embeddings.row(self.rows[first + row].token as usize);
                    right.columns(count, row, columns.clone());
                    bf16::multiply(dst, first > 0, left, 0..classes, right);
                }
            }),
        }
    }

    fn wide_rows<'b>(&self, embeddings: &'b [f32]) -> View<'b> {
        let columns = self.embeddings.columns;
        View::new(embeddings, self.rows.len(), columns, plan::row_stride(columns))
    }

    fn wide_classes<'b>(&self, classifier: &'b [f32]) -> View<'b>
    where
        'a: 'b,
    {
        self.classifier.view(self.chunk.start, self.chunk.len(), classifier)
    }

    /// With packed operands that nobody else uses, and that keep their memory.
    fn with_operands(&self, multiply: impl FnOnce(&mut (Left, Right))) {
        let Form::Packed { operands, .. } = &self.form else { unreachable!("asked by the packed form") };
        let lock = || operands.lock().unwrap_or_else(PoisonError::into_inner);
        let mut own = lock().pop().unwrap_or_default();
        multiply(&mut own);
        lock().push(own);
    }
}

fn native<T: Element>(matrix: TypedMatrix<'_, T>) -> TypedMatrix<'_, half::bf16> {
    bf16::native(matrix).expect("the embeddings have been packed, and the classifier has their type")
}
