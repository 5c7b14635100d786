//! The rows that take part: ignored tokens are gone before any product is formed.

use crate::{Element, Matrix, Problem};

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

    /// Rows `rows` as `f32`, dense in `target`.
    #[inline(always)]
    pub fn widen_rows(&self, rows: impl Iterator<Item = usize>, target: &mut [f32]) {
        if self.columns == 0 {
            return;
        }
        for (row, target) in rows.zip(target.chunks_exact_mut(self.columns)) {
            T::widen(self.row(row), target);
        }
    }
}
