//! Tile products by the `gemm` crate, behind checked views. Beside them the `unsafe` of the CPU backend is in `bf16/simd.rs`.

use super::vector::{dot_and_magnitude, vectorized};
use std::marker::PhantomData;
use std::ops::Range;

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

    /// Rows and columns.
    pub fn size(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// A row, whose elements are neighbours.
    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(row < self.rows && self.column_stride == 1);
        &self.data[row * self.row_stride..][..self.columns]
    }

    /// `count` rows from `first` on.
    pub fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows);
        let start = (first * self.row_stride).min(self.data.len());
        View { data: &self.data[start..], rows: count, ..self }
    }

    /// `count` columns from `first` on.
    pub fn columns(self, first: usize, count: usize) -> Self {
        self.transposed().rows(first, count).transposed()
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

/// A mutably borrowed row-major matrix that can be cut along both dimensions, so that threads fill parts of the same rows.
#[derive(Debug)]
pub(crate) struct ViewMut<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for the `&mut f32` of its elements, which no other view has (`new` borrows them, cutting shares them out).
unsafe impl Send for ViewMut<'_> {}

impl<'a> ViewMut<'a> {
    /// Rows `row_stride` apart.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(columns <= row_stride || rows <= 1);
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len());
        ViewMut { data: data.as_mut_ptr(), rows, columns, row_stride, borrow: PhantomData }
    }

    /// Rows and columns.
    pub fn size(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: `new` checked that the row's `columns` elements lie inside the slice; they are this view's alone, and `self` is
        // borrowed for as long as they are.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.columns) }
    }

    /// Cuts out ranges of rows.
    pub fn cut_rows(self, rows: &[Range<usize>]) -> Vec<Part<'a>> {
        let all = 0..self.columns;
        self.cut(rows, std::slice::from_ref(&all))
    }

    /// Cuts out parts, each with its rows and columns: all pairs of a range of rows and a range of columns, by rows first.
    ///
    /// # Panics
    ///
    /// If ranges of one kind overlap or do not ascend: parts would share elements.
    pub fn cut(self, rows: &[Range<usize>], columns: &[Range<usize>]) -> Vec<Part<'a>> {
        for (ranges, end) in [(rows, self.rows), (columns, self.columns)] {
            assert!(ranges.iter().all(|range| range.start <= range.end && range.end <= end));
            assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
        let part = |rows: &Range<usize>, columns: &Range<usize>| {
            let empty = rows.is_empty() || columns.is_empty();
            let offset = if empty { 0 } else { rows.start * self.row_stride + columns.start };
            // SAFETY: what is not empty has its first element inside the slice.
            let data = unsafe { self.data.add(offset) };
            let values = ViewMut { data, rows: rows.len(), columns: columns.len(), ..self };
            Part { rows: rows.clone(), columns: columns.clone(), values }
        };
        rows.iter().flat_map(|rows| columns.iter().map(move |columns| part(rows, columns))).collect()
    }
}

/// A part of a matrix, and where it lies.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    pub values: ViewMut<'a>,
}

/// `dst = a · b`, or `dst += a · b`; `dst` is [a.rows, b.columns].
///
/// Single-threaded: parallelism is over tiles. The value of an element depends on the contraction alone, not on how
/// the other two dimensions are cut, as long as each cut leaves more than [`MIN_ROWS`] rows.
pub(crate) fn matmul(dst: &mut ViewMut<'_>, accumulate: bool, a: View<'_>, b: View<'_>) {
    assert_eq!(a.columns, b.rows);
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!((dst.rows, dst.columns), (m, n));
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            (0..m).for_each(|row| dst.row(row).fill(0.0));
        }
        return;
    }
    if n * MIN_ROWS < ROWS_BY_ROWS && !accumulate && (a.column_stride, b.row_stride) == (1, 1) {
        return dots(dst, a, b);
    }
    let strides = |v: &View<'_>| (v.column_stride as isize, v.row_stride as isize);
    let ((a_columns, a_rows), (b_columns, b_rows)) = (strides(&a), strides(&b));
    let scale_dst = if accumulate { 1.0 } else { 0.0 };
    // SAFETY: `View::new` and `ViewMut::new` checked that their rows lie inside their slices, transposing permutes the same
    // elements, and `dst` alone has its elements, which so overlap neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.data,
            1,
            dst.row_stride as isize,
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
fn dots(dst: &mut ViewMut<'_>, a: View<'_>, b: View<'_>) {
    vectorized(
        #[inline(always)]
        || {
            for i in 0..a.rows {
                let a = &a.data[i * a.row_stride..][..a.columns];
                for (j, element) in dst.row(i).iter_mut().enumerate() {
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
