//! Comparisons that NaN cannot pass.

use cut_cross_entropy::HostBuffer;
use cut_cross_entropy::reference::ReferenceForward;

/// An error, how large it may be, and where it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Comparison {
    pub error: f64,
    pub tolerance: f64,
    pub tensor: &'static str,
}

impl Comparison {
    /// Written so that NaN fails.
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Comparison { error, tolerance, tensor } = self;
        write!(f, "error {error:.2e} tolerance {tolerance:.2e} ({tensor})")
    }
}

/// The one that is worse relative to its tolerance; NaN is worse than anything.
pub fn worse(a: Comparison, b: Comparison) -> Comparison {
    let relative = |c: &Comparison| match c.error / c.tolerance {
        _ if c.error == 0.0 => 0.0,
        r if r.is_nan() => f64::INFINITY,
        r => r,
    };
    if relative(&b) > relative(&a) || a.tensor.is_empty() { b } else { a }
}

/// The error of an f32 dot product that makes a logit, for the largest logit there is; a generous few ulps.
pub fn logit_unit(forward: &ReferenceForward) -> f64 {
    let vocab = forward.probabilities.len().checked_div(forward.lse.len()).unwrap_or(0);
    let logits = forward.probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0);
    let largest = logits.fold(0.0_f64, |a, (k, p)| a.max((forward.lse[k / vocab] + p.ln()).abs()));
    2e-6 * (8.0 + largest)
}

/// Elements against elements, with an error of `unit`, or as much relative to the element.
pub fn vector(tensor: &'static str, ours: &[f32], expected: &[f64], unit: f64) -> Comparison {
    if ours.len() != expected.len() {
        return Comparison { error: f64::NAN, tolerance: unit, tensor };
    }
    let pairs = ours.iter().zip(expected);
    pairs.map(|(&a, &b)| element(tensor, f64::from(a), b, unit * b.abs().max(1.0))).fold(none(tensor, unit), worse)
}

/// A gradient by rows: an error is judged against its row's largest element, in a row of small ones against a
/// hundredth of the tensor's largest.
pub fn gradient(
    tensor: &'static str,
    ours: &HostBuffer,
    expected: &[f64],
    columns: usize,
    unit: f64,
    slack: f64,
) -> Comparison {
    let (rounding, smallest) = match ours {
        HostBuffer::F32(_) => (0.0, 1e-30),
        HostBuffer::F16(_) => (2.0_f64.powi(-11), 2.0_f64.powi(-24)),
        _ => (2.0_f64.powi(-8), 1e-30),
    };
    let ours = ours.to_f32_vec();
    if ours.len() != expected.len() {
        return Comparison { error: f64::NAN, tolerance: unit, tensor };
    }
    let largest = |row: &[f64]| row.iter().fold(0.0_f64, |a, &b| a.max(b.abs()));
    let floor = largest(expected) / 100.0;
    let columns = columns.max(1);
    let rows = ours.chunks(columns).zip(expected.chunks(columns));
    let rows = rows.flat_map(|(ours, expected)| {
        let tolerance = (2.0 * unit + rounding) * largest(expected).max(floor) + slack + smallest;
        ours.iter().zip(expected).map(move |(&a, &b)| element(tensor, f64::from(a), b, tolerance))
    });
    rows.fold(none(tensor, unit), worse)
}

/// Most probable classes; one of nearly the same probability is as good.
pub fn argmax(ours: &[u32], expected: &ReferenceForward, unit: f64) -> Comparison {
    let vocab = expected.probabilities.len().checked_div(ours.len()).unwrap_or(0);
    let rows = ours.iter().zip(&expected.argmax).enumerate().map(|(i, (&ours, best))| {
        let p = |class: usize| expected.probabilities.get(i * vocab + class).copied().unwrap_or(f64::NAN);
        let error = match best {
            None => f64::from(u8::from(ours != u32::MAX)),
            Some(best) => p(*best).ln() - p(ours as usize).ln(),
        };
        Comparison { error, tolerance: unit, tensor: "argmax" }
    });
    rows.fold(none("argmax", unit), worse)
}

fn none(tensor: &'static str, tolerance: f64) -> Comparison {
    Comparison { error: 0.0, tolerance, tensor }
}

/// Equal infinities agree.
fn element(tensor: &'static str, ours: f64, expected: f64, tolerance: f64) -> Comparison {
    let error = if ours == expected { 0.0 } else { (ours - expected).abs() };
    Comparison { error, tolerance: if tolerance.is_finite() { tolerance } else { 0.0 }, tensor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_never_passes() {
        assert!(!vector("x", &[f32::NAN], &[0.0], 1.0).passes());
        assert!(!vector("x", &[0.0, f32::NAN, 0.0], &[0.0; 3], 1.0).passes());
        assert!(!vector("x", &[0.0], &[f64::NAN], 1.0).passes());
        assert!(!vector("x", &[0.0], &[f64::INFINITY], 1.0).passes());
        let buffer = HostBuffer::F32(vec![1.0, f32::NAN]);
        assert!(!gradient("x", &buffer, &[1.0, 0.0], 2, 1e-3, 0.0).passes());
    }

    #[test]
    fn a_missing_tail_and_a_swapped_row_do_not_pass() {
        assert!(!vector("x", &[1.0], &[1.0, 2.0], 1e-3).passes());
        let buffer = HostBuffer::F32(vec![3.0, 4.0, 1.0, 2.0]);
        assert!(!gradient("x", &buffer, &[1.0, 2.0, 3.0, 4.0], 2, 1e-3, 0.0).passes());
        assert!(gradient("x", &buffer, &[3.0, 4.0, 1.0, 2.0], 2, 1e-3, 0.0).passes());
    }

    #[test]
    fn worse_prefers_nan_and_keeps_the_larger() {
        let at = |error| Comparison { error, tolerance: 1.0, tensor: "x" };
        assert!(worse(at(0.5), at(f64::NAN)).error.is_nan());
        assert!(worse(at(f64::NAN), at(0.5)).error.is_nan());
        assert_eq!(worse(at(0.5), at(0.7)).error, 0.7);
    }
}
