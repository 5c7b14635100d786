//! Products of bf16 where the processor has an instruction for them (`vdpbf16ps` of AVX512_BF16: AMD from Zen 4 on, Intel's Xeons from
//! Sapphire Rapids on): two products a lane, summed in f32, twice the speed of f32, to which bf16 is widened elsewhere.
//!
//! Both operands are packed by pairs of neighbours along the contraction, K. A step multiplies 8 rows by 32 columns of pairs:
//!
//! ```text
//!   panel of Left, [K/2][8]     panel of Right, [K/2][32]
//!    row 0 … row 7               column 0 … column 31
//!   ┌─────────────┐             ┌────────────────────┐
//!   │ broadcast   │ pair 0      │ two vectors        │ pair 0
//!   │ one by one  │ pair 1      │                    │ pair 1
//! ```
//!
//! An element is one sum over the contraction, in order, whatever the tile it lies in: results depend on neither threads nor tiles. A
//! product is exact in f32 and each addition rounds once. Subnormal numbers, sums included, count as 0.

#[doc(hidden)]
pub mod plain;
#[cfg_attr(not(target_arch = "x86_64"), path = "none.rs")]
mod simd;

use super::matmul::{View, ViewMut};
use super::rows::{Row, TypedMatrix};
use super::vector::vectorized;
use crate::Element;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a left panel: the least unit that blocks of tokens are cut into.
const LEFT: usize = 8;
/// Columns of a right panel.
const RIGHT: usize = 32;
/// Right panels that all left ones go past before the next: 256 columns of 1024 rows are 512 KiB, which stay in a core's cache.
const GROUP: usize = 8;
/// Rows that a contraction over tokens takes at a time, for the same reason.
pub(crate) const CONTRACTION: usize = 1024;

/// Whether this processor multiplies bf16 itself (AVX512_BF16), twice as fast as f32; elsewhere bf16 is widened. The exact path then rounds each
/// logit gradient to bf16, as on a GPU, unless gradients are written in `f32`.
pub fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// The matrix where its elements are bf16 and the processor multiplies these.
pub(crate) fn native<'a, T: Element>(matrix: TypedMatrix<'a, T>) -> Option<TypedMatrix<'a, bf16>> {
    matrix.as_bf16().filter(|_| multiplies_bf16())
}

/// Rows of a product's result.
#[derive(Default)]
pub(crate) struct Left {
    pairs: Vec<u32>,
    rows: usize,
    steps: usize,
}

/// Columns of a product's result.
#[derive(Default)]
pub(crate) struct Right {
    pairs: Vec<u32>,
    columns: usize,
    steps: usize,
}

/// `dst = left · right`, or `dst += left · right`, of some rows of `left`, the first of which begins a panel. In the calling thread.
pub(crate) fn multiply(dst: &mut ViewMut<'_>, accumulate: bool, left: &Left, rows: Range<usize>, right: &Right) {
    assert!(multiplies_bf16(), "whoever packs operands asks before");
    assert!(rows.start.is_multiple_of(LEFT) && rows.end <= left.rows && left.steps == right.steps);
    assert_eq!(dst.size(), (rows.len(), right.columns));
    let steps = left.steps;
    if steps == 0 {
        return if !accumulate {
            (0..rows.len()).for_each(|row| dst.row(row).fill(0.0))
        };
    }
    let mut sums = [0.0_f32; LEFT * RIGHT];
    for (group, panels) in right.pairs.chunks(GROUP * RIGHT * steps).enumerate() {
        for first_row in (0..rows.len()).step_by(LEFT) {
            let left = &left.pairs[(rows.start + first_row) * steps..][..LEFT * steps];
            for (k, panel) in panels.chunks_exact(RIGHT * steps).enumerate() {
                simd::multiply(&mut sums, left, panel);
                let first = (group * GROUP + k) * RIGHT;
                let columns = first..(first + RIGHT).min(right.columns);
                for (row, sums) in (first_row..rows.len()).zip(sums.chunks_exact(RIGHT)) {
                    let (dst, sums) = (&mut dst.row(row)[columns.clone()], &sums[..columns.len()]);
                    if accumulate {
                        dst.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
                    } else if let (Ok(dst), Ok(sums)) =
                        (<&mut [f32; RIGHT]>::try_from(&mut *dst), <&[f32; RIGHT]>::try_from(sums))
                    {
                        *dst = *sums; // two vectors, where a slice is a call
                    } else {
                        dst.copy_from_slice(sums);
                    }
                }
            }
        }
    }
}

impl Left {
    /// The embeddings of `rows`, [rows, D], packed by as many tasks. None where there is no product of bf16.
    pub fn of_embeddings<T: Element>(embeddings: TypedMatrix<'_, T>, rows: &[Row], tasks: usize) -> Option<Self> {
        let embeddings = native(embeddings)?;
        let mut packed = Left::default();
        packed.resize(rows.len(), embeddings.columns);
        let share = rows.len().div_ceil(tasks.max(1)).next_multiple_of(LEFT);
        let parts = packed.pairs.par_chunks_mut((share * packed.steps).max(1)).zip(rows.par_chunks(share.max(1)));
        let panel_len = (LEFT * packed.steps).max(1);
        parts.for_each(|(panels, rows)| {
            for (panel, rows) in panels.chunks_exact_mut(panel_len).zip(rows.chunks(LEFT)) {
                for (k, row) in rows.iter().enumerate() {
                    pack_row(&mut panel[k..], embeddings.row(row.token as usize));
                }
            }
        });
        Some(packed)
    }

    /// Logit gradients G [rows, classes], each rounded to bf16.
    pub fn gradients(&mut self, gradients: View<'_>) {
        let (rows, classes) = gradients.size();
        self.resize(rows, classes);
        let mut narrow = vec![bf16::ZERO; classes];
        for row in 0..rows {
            rounded(gradients.row(row), &mut narrow);
            pack_row(&mut self.pairs[row / LEFT * LEFT * self.steps + row % LEFT..], &narrow);
        }
    }

    /// Their transpose, [classes, rows].
    pub fn gradients_transposed(&mut self, gradients: View<'_>) {
        let (rows, classes) = gradients.size();
        self.resize(classes, rows);
        let mut narrow = [vec![bf16::ZERO; classes], vec![bf16::ZERO; classes]];
        for step in 0..self.steps {
            for (k, narrow) in narrow.iter_mut().enumerate() {
                match 2 * step + k {
                    row if row < rows => rounded(gradients.row(row), narrow),
                    _ => narrow.fill(bf16::ZERO),
                }
            }
            let [low, high] = &narrow;
            let panels = self.pairs.chunks_exact_mut(LEFT * self.steps);
            for (panel, (low, high)) in panels.zip(low.chunks(LEFT).zip(high.chunks(LEFT))) {
                interleave(&mut panel[step * LEFT..], low, high);
            }
        }
    }

    fn resize(&mut self, rows: usize, columns: usize) {
        (self.rows, self.steps) = (rows, columns.div_ceil(2));
        self.pairs.clear();
        self.pairs.resize(rows.next_multiple_of(LEFT) * self.steps, 0);
    }
}

impl Right {
    /// Classes as columns: the classifier's rows, transposed, [D, classes].
    pub fn classes(&mut self, classifier: TypedMatrix<'_, bf16>, classes: Range<usize>) {
        assert!(multiplies_bf16(), "whoever packs operands asks before");
        self.resize(classifier.columns, classes.len());
        let steps = self.steps;
        for (k, panel) in self.pairs.chunks_exact_mut((RIGHT * steps).max(1)).enumerate() {
            for half in 0..RIGHT / 16 {
                let first = classes.start + k * RIGHT + half * 16;
                let rows: [&[bf16]; 16] = std::array::from_fn(|i| match first + i < classes.end {
                    true => classifier.row(first + i),
                    false => &[],
                });
                simd::pack_16(&mut panel[half * 16..], &rows, steps);
            }
        }
    }

    /// Some columns of rows of a matrix as they are, [rows, columns].
    pub fn columns<'a>(&mut self, rows: usize, row: impl Fn(usize) -> &'a [bf16], columns: Range<usize>) {
        self.resize(rows, columns.len());
        let steps = self.steps;
        let no_row = vec![bf16::ZERO; columns.len()];
        for step in 0..steps {
            let low = &row(2 * step)[columns.clone()];
            let high = if 2 * step + 1 < rows { &row(2 * step + 1)[columns.clone()] } else { &no_row };
            let panels = self.pairs.chunks_exact_mut(RIGHT * steps);
            for (panel, (low, high)) in panels.zip(low.chunks(RIGHT).zip(high.chunks(RIGHT))) {
                interleave(&mut panel[step * RIGHT..], low, high);
            }
        }
    }

    fn resize(&mut self, contraction: usize, columns: usize) {
        (self.columns, self.steps) = (columns, contraction.div_ceil(2));
        self.pairs.resize(columns.next_multiple_of(RIGHT) * self.steps, 0);
    }
}

/// A row of a left panel; a last element without a neighbour is beside 0.
fn pack_row(panel: &mut [u32], row: &[bf16]) {
    let bits = |x: &bf16| u32::from(x.to_bits());
    let (pairs, last) = row.as_chunks::<2>();
    let pairs = pairs.iter().map(|[low, high]| bits(low) | bits(high) << 16);
    panel.iter_mut().step_by(LEFT).zip(pairs.chain(last.iter().map(bits))).for_each(|(place, pair)| *place = pair);
}

/// Pairs of neighbours above each other.
fn interleave(pairs: &mut [u32], low: &[bf16], high: &[bf16]) {
    let bits = |x: &bf16| u32::from(x.to_bits());
    pairs.iter_mut().zip(low).zip(high).for_each(|((pair, low), high)| *pair = bits(low) | bits(high) << 16);
}

fn rounded(from: &[f32], to: &mut [bf16]) {
    vectorized(
        #[inline(always)]
        || <bf16 as Element>::narrow(from, to),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [-1, 1) by a hash of their places.
    fn matrix(rows: usize, stride: usize, seed: u32) -> Vec<bf16> {
        let number = |i: usize| ((i as u32 ^ seed).wrapping_mul(0x9E37_79B1) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        (0..rows * stride).map(|i| bf16::from_f32(number(i))).collect()
    }

    /// `got` against the sums of `term(row, column, k)`, k < `contraction`, within the rounding of as many additions.
    fn assert_product(
        got: &[f32],
        rows: usize,
        columns: usize,
        contraction: usize,
        term: impl Fn(usize, usize, usize) -> f64,
    ) {
        for row in 0..rows {
            for column in 0..columns {
                let terms = || (0..contraction).map(|k| term(row, column, k));
                let (exact, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                let error = (f64::from(got[row * columns + column]) - exact).abs();
                let bound = (contraction + 1) as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
                assert!(error <= bound, "({row}, {column}) of {rows} x {columns} over {contraction}: off by {error:e}");
            }
        }
    }

    const SHAPES: [(usize, usize, usize); 8] =
        [(8, 32, 2), (1, 1, 1), (9, 33, 31), (16, 64, 33), (23, 257, 64), (40, 31, 129), (17, 300, 7), (64, 8, 1025)];

    #[test]
    fn embeddings_times_classes() {
        if !multiplies_bf16() {
            return eprintln!("skipped: this processor does not multiply bf16");
        }
        for (rows, classes, columns) in SHAPES {
            let stride = columns + 3;
            let (e, c) = (matrix(rows + 1, stride, 1), matrix(classes + 2, stride, 2));
            let typed = |data| TypedMatrix { data, columns, row_stride: stride };
            // Tokens backwards, and a part of the classes.
            let order: Vec<Row> = (0..rows).map(|row| Row { token: (rows - row) as u32, class: 0 }).collect();
            let left = Left::of_embeddings(typed(&e[..]), &order, 3).expect("bf16, and the processor multiplies it");
            let mut right = Right { pairs: vec![u32::MAX; 7], columns: 0, steps: 0 };
            right.classes(typed(&c[..]), 1..1 + classes);
            let first = if rows > 8 { 8 } else { 0 };
            let mut got = vec![f32::NAN; (rows - first) * classes];
            fn times(got: &mut [f32], accumulate: bool, left: &Left, rows: Range<usize>, right: &Right) {
                let mut dst = ViewMut::new(got, rows.len(), right.columns, right.columns);
                multiply(&mut dst, accumulate, left, rows, right);
            }
            times(&mut got, false, &left, first..rows, &right);
            let of = |matrix: &[bf16], row: usize, k: usize| f64::from(matrix[row * stride + k].to_f32());
            let term = |row, class, k| of(&e, rows - first - row, k) * of(&c, class + 1, k);
            assert_product(&got, rows - first, classes, columns, term);
            // Added to itself.
            times(&mut got, true, &left, first..rows, &right);
            assert_product(&got, rows - first, classes, columns, |row, class, k| 2.0 * term(row, class, k));
        }
    }

    #[test]
    fn gradients_times_rows() {
        if !multiplies_bf16() {
            return eprintln!("skipped: this processor does not multiply bf16");
        }
        for (rows, columns, classes) in SHAPES {
            let (stride, hidden) = (classes + 5, columns + 4);
            let g: Vec<f32> = matrix(rows, stride, 3).iter().map(|x| x.to_f32() * 1.0009).collect();
            let gradients = View::new(&g, rows, classes, stride);
            let rounded = |row: usize, class: usize| f64::from(bf16::from_f32(g[row * stride + class]).to_f32());
            let (mut left, mut right) = (Left::default(), Right::default());

            let c = matrix(classes, hidden, 4);
            let mut got = vec![f32::NAN; rows * columns];
            left.gradients(gradients);
            right.columns(classes, |class| &c[class * hidden..][..hidden], 3..3 + columns);
            multiply(&mut ViewMut::new(&mut got, rows, columns, columns), false, &left, 0..rows, &right);
            let of = |matrix: &[bf16], row: usize, column: usize| f64::from(matrix[row * hidden + 3 + column].to_f32());
            assert_product(&got, rows, columns, classes, |row, column, k| rounded(row, k) * of(&c, k, column));

            let e = matrix(rows, hidden, 5);
            let mut got = vec![f32::NAN; classes * columns];
            left.gradients_transposed(gradients);
            right.columns(rows, |row| &e[row * hidden..][..hidden], 3..3 + columns);
            multiply(&mut ViewMut::new(&mut got, classes, columns, columns), false, &left, 0..classes, &right);
            assert_product(&got, classes, columns, rows, |class, column, k| rounded(k, class) * of(&e, k, column));
        }
    }

    #[test]
    fn infinities_and_nan_come_through() {
        if !multiplies_bf16() {
            return eprintln!("skipped: this processor does not multiply bf16");
        }
        let product = |x: f32, y: f32| {
            let (e, c) = ([bf16::from_f32(x), bf16::ONE], [bf16::from_f32(y), bf16::ONE]);
            let typed = |data| TypedMatrix { data, columns: 2, row_stride: 2 };
            let left = Left::of_embeddings(typed(&e[..]), &[Row { token: 0, class: 0 }], 1).expect("as above");
            let (mut right, mut got) = (Right::default(), [0.0]);
            right.classes(typed(&c[..]), 0..1);
            multiply(&mut ViewMut::new(&mut got, 1, 1, 1), false, &left, 0..1, &right);
            got[0]
        };
        assert_eq!(product(f32::INFINITY, 2.0), f32::INFINITY);
        assert_eq!(product(f32::NEG_INFINITY, 2.0), f32::NEG_INFINITY);
        assert_eq!(product(3e38, 2.0), f32::INFINITY);
        assert!(product(f32::INFINITY, 0.0).is_nan() && product(f32::NAN, 0.0).is_nan());
        assert_eq!(product(2.0, 3.0), 7.0);
    }
}
