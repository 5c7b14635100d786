//! Tile products by the `gemm` crate, behind checked views: the only `unsafe` of the CPU backend.

use super::vector::{dot_and_magnitude, vectorized};

/// A borrowed matrix with arbitrary strides, in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major, rows `row_stride` apart.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len());
        View { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// `count` rows from `first` on.
    pub fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows);
        let start = (first * self.row_stride).min(self.data.len());
        View { data: &self.data[start..], rows: count, ..self }
    }

    /// The transpose, without moving anything.
    pub fn transposed(self) -> Self {
        View {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// `dst = a · b`, or `dst += a · b`; `dst` is [a.rows, b.columns], row-major, rows `dst_stride` apart.
///
/// Single-threaded: parallelism is over tiles. The value of an element depends on the contraction alone, not on how
/// the other two dimensions are cut, as long as each cut leaves more than [`MIN_ROWS`] rows.
pub(crate) fn matmul(dst: &mut [f32], dst_stride: usize, accumulate: bool, a: View<'_>, b: View<'_>) {
    assert_eq!(a.columns, b.rows);
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if m == 0 || n == 0 {
        return;
    }
    assert!(dst_stride >= n && (m - 1) * dst_stride + n <= dst.len());
    if k == 0 {
        if !accumulate {
            dst.chunks_mut(dst_stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    if n * MIN_ROWS < ROWS_BY_ROWS && !accumulate && (a.column_stride, b.row_stride) == (1, 1) {
        return dots(dst, dst_stride, a, b);
    }
    let strides = |v: &View<'_>| (v.column_stride as isize, v.row_stride as isize);
    let ((a_columns, a_rows), (b_columns, b_rows)) = (strides(&a), strides(&b));
    let scale_dst = if accumulate { 1.0 } else { 0.0 };
    // SAFETY: `View::new` checked that its rows lie inside its slice, transposing permutes the same elements, and the
    // assertion above checked `dst`, which is borrowed mutably and so overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a_columns,
            a_rows,
            b.data.as_ptr(),
            b_columns,
            b_rows,
            scale_dst,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Each element by itself, for the few last columns of a vocabulary.
fn dots(dst: &mut [f32], dst_stride: usize, a: View<'_>, b: View<'_>) {
    vectorized(
        #[inline(always)]
        || {
            for (i, row) in dst.chunks_mut(dst_stride).take(a.rows).enumerate() {
                let a = &a.data[i * a.row_stride..][..a.columns];
                for (j, element) in row[..b.columns].iter_mut().enumerate() {
                    *element = dot_and_magnitude(a, &b.data[j * b.column_stride..][..b.rows]).0;
                }
            }
        },
    );
}

/// Up to so many elements, `gemm` 0.19 multiplies rows by rows in kernels that sum in an order of their own.
const ROWS_BY_ROWS: usize = 256;

/// `gemm` 0.19 cuts the contraction differently when both other dimensions are at most 64, and sums in another order
/// when one of them is 1. Blocks of more rows than this make results independent of the number of threads.
pub(crate) const MIN_ROWS: usize = 64;
