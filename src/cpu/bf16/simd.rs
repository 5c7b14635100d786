//! The instructions themselves. Their callers, [`super::multiply`] and [`super::Right::classes`], assert [`super::multiplies_bf16`].

use super::{LEFT, RIGHT};
use half::bf16;
use std::arch::x86_64::*;

/// `sums[r][c] = Σ_k left[k][r] · right[k][c]`, a sum of two products a pair.
pub fn multiply(sums: &mut [f32; LEFT * RIGHT], left: &[u32], right: &[u32]) {
    assert_eq!(left.len() / LEFT, right.len() / RIGHT);
    // SAFETY: the caller has asserted that the processor has these instructions.
    unsafe { multiply_panels(sums, left, right) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_panels(sums: &mut [f32; LEFT * RIGHT], left: &[u32], right: &[u32]) {
    let mut acc = [[_mm512_setzero_ps(); RIGHT / 16]; LEFT];
    for (left, right) in left.as_chunks::<LEFT>().0.iter().zip(right.as_chunks::<RIGHT>().0) {
        let columns: [__m512bh; RIGHT / 16] = std::array::from_fn(|j| pairs(load(&right[j * 16..])));
        for (acc, row) in acc.iter_mut().zip(left) {
            let row = pairs(_mm512_set1_epi32(*row as i32));
            for (acc, columns) in acc.iter_mut().zip(columns) {
                *acc = _mm512_dpbf16_ps(*acc, row, columns);
            }
        }
    }
    for (acc, sums) in acc.iter().flatten().zip(sums.as_chunks_mut::<16>().0) {
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *acc) };
    }
}

/// Sixteen columns of a right panel, [steps][32], from as many rows of a matrix; empty rows are zeros.
pub fn pack_16(panel: &mut [u32], rows: &[&[bf16]; 16], steps: usize) {
    assert!(panel.len() >= (steps - 1) * RIGHT + 16 && rows.iter().all(|row| row.len() <= 2 * steps));
    // SAFETY: as above.
    unsafe { transpose_rows(panel, rows, steps) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn transpose_rows(panel: &mut [u32], rows: &[&[bf16]; 16], steps: usize) {
    for first in (0..steps).step_by(16) {
        let pairs: [__m512i; 16] = std::array::from_fn(|i| load_pairs(rows[i], first));
        let places = panel[first * RIGHT..].chunks_mut(RIGHT).take(steps - first);
        for (vector, places) in transposed(pairs).into_iter().zip(places) {
            store(&mut places[..16], vector);
        }
    }
}

/// Sixteen pairs of a row from pair `first` on; zeros where it has ended.
#[target_feature(enable = "avx512f,avx512bw")]
fn load_pairs(row: &[bf16], first: usize) -> __m512i {
    let rest = row.get(2 * first..).unwrap_or(&[]);
    let mask = if rest.len() >= 32 { u32::MAX } else { (1 << rest.len()) - 1 };
    // SAFETY: elements beyond the mask are not read.
    unsafe { _mm512_maskz_loadu_epi16(mask, rest.as_ptr().cast()) }
}

/// Column `j` of sixteen rows: first blocks of 4 x 4 within the vectors' four lanes, then the lanes.
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut blocks = rows;
    for (four, rows) in blocks.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let [a, b, c, d] = *rows;
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low_2, high_2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        *four = [
            _mm512_unpacklo_epi64(low, low_2),
            _mm512_unpackhi_epi64(low, low_2),
            _mm512_unpacklo_epi64(high, high_2),
            _mm512_unpackhi_epi64(high, high_2),
        ];
    }
    // Vector 4 i + j has of rows 4 i to 4 i + 3 the columns j, j + 4, j + 8, j + 12, one a lane.
    let mut columns = blocks;
    for j in 0..4 {
        let [a, b, c, d] = [blocks[j], blocks[4 + j], blocks[8 + j], blocks[12 + j]];
        let (even, even_2) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let (odd, odd_2) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even, even_2);
        columns[j + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_2);
        columns[j + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even_2);
        columns[j + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_2);
    }
    columns
}

#[target_feature(enable = "avx512f")]
fn load(values: &[u32]) -> __m512i {
    assert!(values.len() >= 16);
    // SAFETY: sixteen numbers.
    unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn store(values: &mut [u32], vector: __m512i) {
    assert!(values.len() >= 16);
    // SAFETY: sixteen numbers.
    unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), vector) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(vector: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits.
    unsafe { std::mem::transmute(vector) }
}
