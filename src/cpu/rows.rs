//! The rows that take part: ignored tokens are gone before any product is formed.

use super::matmul::View;
use super::plan;
use crate::{DType, Element, Matrix, Problem};
use half::bf16;

/// A token that is not ignored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub token: u32,
    pub class: u32,
}

/// All rows of the problem, tokens ascending.
pub(crate) fn active_rows(problem: &Problem<'_>) -> Vec<Row> {
    (0..problem.shape().tokens)
        .filter_map(|token| problem.target(token).map(|class| Row { token: token as u32, class: class as u32 }))
        .collect()
}

/// A matrix whose element type is known at compile time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TypedMatrix<'a, T> {
    pub data: &'a [T],
    pub columns: usize,
    pub row_stride: usize,
}

impl<'a, T: Element> TypedMatrix<'a, T> {
    /// `data` must be `matrix.data`.
    pub fn new(matrix: &Matrix<'_>, data: &'a [T]) -> Self {
        TypedMatrix { data, columns: matrix.columns, row_stride: matrix.row_stride }
    }

    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.row_stride..][..self.columns]
    }

    /// Rows `rows` as `f32` in `target`, [`plan::row_stride`] apart.
    #[inline(always)]
    pub fn widen_rows(&self, rows: impl Iterator<Item = usize>, target: &mut [f32]) {
        for (row, target) in rows.zip(target.chunks_exact_mut(plan::row_stride(self.columns))) {
            T::widen(self.row(row), &mut target[..self.columns]);
        }
    }

    /// The same where its elements are bf16.
    pub fn as_bf16(self) -> Option<TypedMatrix<'a, bf16>> {
        let TypedMatrix { columns, row_stride, .. } = self;
        T::as_bf16(self.data).map(|data| TypedMatrix { data, columns, row_stride })
    }

    /// Length of the copy that products read in place of `rows` rows; 0 where they read the rows themselves.
    ///
    /// 16-bit rows are widened, and rows at multiples of 1 KiB copied all the same: their columns lie in a few sets of the cache,
    /// which gemm's packing of a tile then misses at every element.
    pub fn copy_len(&self, rows: usize) -> usize {
        let copied = T::DTYPE != DType::F32 || self.row_stride.is_multiple_of(256);
        if copied { rows * plan::row_stride(self.columns) } else { 0 }
    }

    /// Rows `first..first + rows`: themselves, or their copy unless that is empty.
    pub fn view<'b>(&self, first: usize, rows: usize, copy: &'b [f32]) -> View<'b>
    where
        'a: 'b,
    {
        let start = (first * self.row_stride).min(self.data.len());
        match T::as_f32(&self.data[start..]) {
            Some(data) if copy.is_empty() => View::new(data, rows, self.columns, self.row_stride),
            _ => View::new(copy, rows, self.columns, plan::row_stride(self.columns)),
        }
    }
}
