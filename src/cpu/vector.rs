//! Elementwise work on slices, written so that it vectorises, and compiled for the vector units of the machine at hand.

use crate::Element;

/// Runs `body`, compiled for AVX-512, AVX2 or NEON as the machine has it.
///
/// The closure and what it calls must be `#[inline(always)]`: a body that is called instead of inlined is compiled for
/// the baseline, where every `mul_add` is a call into libm (seen: the forward took 2.7 T in place of 1.1-1.2 T).
#[inline(always)]
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// `exp(x)` for `x <= 88`, within 2 ulp; 0 below -87.3 (no subnormals), NaN for NaN.
///
/// Cody-Waite reduction and the minimax polynomial of Cephes `expf` (Moshier 1989).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.3;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer, left in the low mantissa bits
    let clamped = if x < LOWEST { LOWEST } else { x };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = (-n).mul_add(0.693_359_4, clamped);
    let r = (-n).mul_add(-2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LOWEST { 0.0 } else { y * scale }
}

/// `tanh(x)` within 3 ulp: Cephes `tanhf`, a polynomial near 0, where the quotient of exponentials would cancel.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let (magnitude, square) = (x.abs(), x * x);
    let p = -5.704_988_7e-3_f32;
    let p = p.mul_add(square, 2.063_909e-2);
    let p = p.mul_add(square, -5.373_971_6e-2);
    let p = p.mul_add(square, 1.333_144_2e-1);
    let p = p.mul_add(square, -3.333_328e-1);
    let near = (p * square).mul_add(x, x);
    let e = exp(-2.0 * magnitude);
    let far = ((1.0 - e) / (1.0 + e)).copysign(x);
    if magnitude < 0.625 { near } else { far }
}

/// Largest element; NaNs are passed over, -inf for an empty slice.
#[inline(always)]
pub(crate) fn maximum(values: &[f32]) -> f32 {
    const LANES: usize = 64;
    let larger = |a: f32, x: f32| if x > a { x } else { a };
    let (chunks, tail) = values.as_chunks::<LANES>();
    // By value: lanes that are assigned to one by one became masked stores to memory (seen in a profile on Zen 4).
    let lanes = chunks
        .iter()
        .fold([f32::NEG_INFINITY; LANES], |lanes, chunk| std::array::from_fn(|k| larger(lanes[k], chunk[k])));
    let mut quarter: [f32; 16] =
        std::array::from_fn(|k| larger(larger(lanes[k], lanes[k + 16]), larger(lanes[k + 32], lanes[k + 48])));
    for half in [8, 4, 2, 1] {
        for k in 0..half {
            quarter[k] = larger(quarter[k], quarter[k + half]);
        }
    }
    tail.iter().fold(quarter[0], |a, &x| larger(a, x))
}

/// The sum of partial sums, in pairs of pairs.
#[inline(always)]
pub(crate) fn sum_of_lanes(lanes: &[f32; 64]) -> f64 {
    let wide = |k: usize| f64::from(lanes[k]);
    let mut sums: [f64; 16] = std::array::from_fn(|k| (wide(k) + wide(k + 16)) + (wide(k + 32) + wide(k + 48)));
    for half in [8, 4, 2, 1] {
        for k in 0..half {
            sums[k] += sums[k + half];
        }
    }
    sums[0]
}

/// `Σ a_k b_k` and `Σ |a_k b_k|`, each in 64 interleaved partial sums.
#[inline(always)]
pub(crate) fn dot_and_magnitude(a: &[f32], b: &[f32]) -> (f32, f32) {
    const LANES: usize = 64;
    let (mut sums, mut magnitudes) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for k in 0..LANES {
            let product = a[k] * b[k];
            sums[k] += product;
            magnitudes[k] += product.abs();
        }
    }
    for ((a, b), k) in a_tail.iter().zip(b_tail).zip(0..) {
        sums[k] += a * b;
        magnitudes[k] += (a * b).abs();
    }
    (sums.iter().sum(), magnitudes.iter().sum())
}

/// `acc += Σ_j coefficient_j · row_j`, four rows at a time: a quarter of the traffic on `acc`, four streams in flight.
///
/// `next` names the rows in order; each row has `acc.len()` elements.
#[inline(always)]
pub(crate) fn add_rows<'a, T: Element>(acc: &mut [f32], coefficients: &[f32], row: impl Fn(usize) -> &'a [T]) {
    let mut j = 0;
    while j + 4 <= coefficients.len() {
        let (r0, r1, r2, r3) = (row(j), row(j + 1), row(j + 2), row(j + 3));
        let [c0, c1, c2, c3] = [coefficients[j], coefficients[j + 1], coefficients[j + 2], coefficients[j + 3]];
        let n = acc.len();
        let (r0, r1, r2, r3) = (&r0[..n], &r1[..n], &r2[..n], &r3[..n]);
        for k in 0..n {
            let sum = c0.mul_add(r0[k].to_f32(), acc[k]);
            let sum = c1.mul_add(r1[k].to_f32(), sum);
            let sum = c2.mul_add(r2[k].to_f32(), sum);
            acc[k] = c3.mul_add(r3[k].to_f32(), sum);
        }
        j += 4;
    }
    for (j, &c) in coefficients.iter().enumerate().skip(j) {
        add_scaled(acc, c, row(j));
    }
}

/// `acc += coefficient · row`.
#[inline(always)]
pub(crate) fn add_scaled<T: Element>(acc: &mut [f32], coefficient: f32, row: &[T]) {
    for (a, x) in acc.iter_mut().zip(row) {
        *a = coefficient.mul_add(x.to_f32(), *a);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Error in units in the last place of the `f64` result rounded to `f32`.
    fn ulps(ours: f32, exact: f64) -> f64 {
        let rounded = exact as f32;
        let ulp = (f32::from_bits(rounded.abs().to_bits() + 1) - rounded.abs()) as f64;
        (ours as f64 - exact).abs() / ulp
    }

    #[test]
    fn exp_is_within_2_ulp_and_keeps_the_extremes() {
        let worst = (0..=2_000_000)
            .map(|i| -87.0 + 175.0 * i as f32 / 2_000_000.0)
            .map(|x| ulps(exp(x), (x as f64).exp()))
            .fold(0.0, f64::max);
        assert!(worst <= 2.0, "{worst} ulp");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_3_ulp_and_keeps_the_extremes() {
        let worst = (0..=2_000_000)
            .map(|i| -12.0 + 24.0 * i as f32 / 2_000_000.0)
            .filter(|x| *x != 0.0)
            .map(|x| ulps(tanh(x), (x as f64).tanh()))
            .fold(0.0, f64::max);
        assert!(worst <= 3.0, "{worst} ulp");
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn maximum_and_dot_treat_every_tail_length() {
        for len in 0..200 {
            let a: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let b: Vec<f32> = (0..len).map(|i| ((i * 53) % 89) as f32 - 44.0).collect();
            assert_eq!(maximum(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            // Small integers: every order of summation is exact.
            let products = || a.iter().zip(&b).map(|(a, b)| a * b);
            assert_eq!(dot_and_magnitude(&a, &b), (products().sum(), products().map(f32::abs).sum()));
            let mut acc = a.clone();
            let rows = [b.clone(), a.clone(), b.clone(), a.clone(), b.clone()];
            add_rows(&mut acc, &[1.0, 2.0, -1.0, 1.0, 3.0], |j| &rows[j][..]);
            assert!(acc.iter().zip(a.iter().zip(&b)).all(|(x, (a, b))| *x == 4.0 * a + 3.0 * b));
        }
    }
}
