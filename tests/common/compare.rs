//! A comparison that cannot be fooled by NaN, by infinities, or by a missing tail.
//!
//! The classic mistake is `if error > tolerance { fail }`, which NaN passes. Here: lengths first, then the positions of
//! NaN and of both infinities, then `error <= tolerance` element by element.

use cut_cross_entropy::DType;
use half::{bf16, f16};

/// What a value is, before how large it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Finite,
    Nan,
    PositiveInfinity,
    NegativeInfinity,
}

fn kind(value: f64) -> Kind {
    match value {
        x if x.is_nan() => Kind::Nan,
        f64::INFINITY => Kind::PositiveInfinity,
        f64::NEG_INFINITY => Kind::NegativeInfinity,
        _ => Kind::Finite,
    }
}

/// `exact` in the range of `dtype`: a gradient of 1e6 is an infinity in f16, and rightly so.
fn in_range(dtype: DType, exact: f64) -> f64 {
    let narrowed = match dtype {
        DType::F16 => f16::from_f64(exact).to_f64(),
        DType::BF16 => bf16::from_f64(exact).to_f64(),
        _ => f64::from(exact as f32),
    };
    if narrowed.is_finite() { exact } else { narrowed }
}

/// Half a unit in the last place of `value` in `dtype`: the one rounding that an output may have.
pub fn rounding(dtype: DType, value: f64) -> f64 {
    let (bits, smallest) = match dtype {
        DType::F16 => (11, 2.0_f64.powi(-25)),
        DType::BF16 => (8, 2.0_f64.powi(-134)),
        _ => (24, 2.0_f64.powi(-150)),
    };
    (value.abs() * 2.0_f64.powi(-bits)).max(smallest)
}

/// `‖ours - exact‖ / ‖exact‖` over the finite elements; 0 where both are 0.
pub fn frobenius(ours: &[f32], exact: &[f64]) -> f64 {
    let finite = || ours.iter().zip(exact).filter(|(o, e)| o.is_finite() && e.is_finite());
    let error: f64 = finite().map(|(&o, &e)| (f64::from(o) - e).powi(2)).sum();
    let norm: f64 = finite().map(|(_, &e)| e * e).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// Compares `ours`, which was rounded to `dtype`, with `exact`, rows of `columns`, each element within its tolerance
/// plus that rounding. Returns the relative Frobenius error.
pub fn check_close(
    what: &str,
    dtype: DType,
    columns: usize,
    ours: &[f32],
    exact: &[f64],
    tolerance: &[f64],
) -> Result<f64, String> {
    if ours.len() != exact.len() || ours.len() != tolerance.len() {
        return Err(format!(
            "{what}: {} elements, expected {} with {} tolerances",
            ours.len(),
            exact.len(),
            tolerance.len()
        ));
    }
    let place = |i: usize| format!("[{}, {}]", i / columns.max(1), i % columns.max(1));
    let differs = |i: &usize| kind(ours[*i].into()) != kind(in_range(dtype, exact[*i]));
    if let Some(i) = (0..ours.len()).find(differs) {
        let count = (0..ours.len()).filter(differs).count();
        return Err(format!(
            "{what}{}: ours is {:e}, the oracle {:e}; NaN or infinity differ at {count} of {} places",
            place(i),
            ours[i],
            exact[i],
            ours.len()
        ));
    }
    let mut worst: Option<(f64, usize, f64)> = None;
    let mut failed = 0;
    for i in 0..ours.len() {
        if kind(ours[i].into()) != Kind::Finite {
            continue;
        }
        let error = (f64::from(ours[i]) - exact[i]).abs();
        // The rounding of any value within the tolerance.
        let allowed = tolerance[i] + rounding(dtype, exact[i].abs() + tolerance[i].max(0.0));
        let passes = error <= allowed; // false for a NaN on either side
        failed += usize::from(!passes);
        let ratio = if passes && error == 0.0 { 0.0 } else { error / allowed };
        if worst.is_none_or(|(w, ..)| ratio.is_nan() || ratio > w) {
            worst = Some((ratio, i, allowed));
        }
    }
    let relative = frobenius(ours, exact);
    match worst {
        Some((ratio, i, allowed)) if failed > 0 => Err(format!(
            "{what}{}: ours {:e}, oracle {:e}, error {:e} = {ratio:.2} x allowed {allowed:e}; \
             {failed} of {} elements fail, relative Frobenius error {relative:e}",
            place(i),
            ours[i],
            exact[i],
            (f64::from(ours[i]) - exact[i]).abs(),
            ours.len()
        )),
        _ => Ok(relative),
    }
}

/// [`check_close`], or a failed test.
#[track_caller]
pub fn assert_close(what: &str, dtype: DType, columns: usize, ours: &[f32], exact: &[f64], tolerance: &[f64]) -> f64 {
    check_close(what, dtype, columns, ours, exact, tolerance).unwrap_or_else(|message| panic!("{message}"))
}

/// Bit patterns, for claims of exact equality: tells 0 from -0 and compares NaNs.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
