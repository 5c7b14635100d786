//! A safe face for the one `gemm` call: what T is measured with and what the baseline is made of.

use gemm::Parallelism;

/// A borrowed f32 matrix, element (i, j) at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// A dense row-major matrix.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        View { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// The same elements, transposed.
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

/// `target = a · b`, row-major, on all rayon threads.
pub fn multiply(target: &mut [f32], a: View<'_>, b: View<'_>) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(b.rows, k);
    assert_eq!(target.len(), m * n);
    debug_assert!(a.data.len() == m * k && b.data.len() == k * n);
    let stride = |s: usize| isize::try_from(s).expect("a slice has at most isize::MAX elements");
    // SAFETY: a View is dense, so each of its strided elements lies within `data`; `target` is dense, row-major, of
    // m * n elements (asserted) and exclusively borrowed, so it overlaps neither operand. With `read_dst` false its
    // old content has no effect.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            target.as_mut_ptr(),
            1,
            stride(n),
            false,
            a.data.as_ptr(),
            stride(a.column_stride),
            stride(a.row_stride),
            b.data.as_ptr(),
            stride(b.column_stride),
            stride(b.row_stride),
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}
