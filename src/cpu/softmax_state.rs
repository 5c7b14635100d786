//! The online softmax of one row: what a stream of logit tiles leaves behind.

use super::vector;

/// Running maximum and sum of exponentials of one row, with what else was asked for.
///
/// Sums are `f64`: they are touched once a tile, and a vocabulary of 256k terms then costs no accuracy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SoftmaxState {
    /// Largest logit so far; -inf at the start.
    pub max: f32,
    /// `Σ exp(z - max)`.
    pub sum: f64,
    /// `Σ exp(z - max) · (z - max)`, for the entropy.
    pub weighted: f64,
    /// `Σ_v w_v (z_v - anchor)`, for label smoothing.
    pub smooth: f64,
    /// Near the target's logit, and finite: differences against it do not cancel under a common offset.
    pub anchor: f32,
    /// The target's logit once its tile has passed.
    pub target_logit: f32,
    /// The first class that reached `max`.
    pub argmax: u32,
    /// Below the target's logit, by a separate dot product: a bound of the final log-sum-exp from the first tile on.
    pub floor: f32,
    /// Whether the target's tile is still to come, so that `sum` does not hold its term.
    pub pending: bool,
}

impl SoftmaxState {
    /// The empty row, its target's logit known to be `seed` up to `margin`.
    pub fn new(seed: f32, margin: f32) -> Self {
        SoftmaxState {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            weighted: 0.0,
            smooth: 0.0,
            target_logit: f32::NAN,
            argmax: u32::MAX,
            anchor: if seed.is_finite() { seed } else { 0.0 },
            floor: seed - margin,
            pending: true,
        }
    }

    /// What exponents are taken against: the maximum, or 0 as long as that is -inf, so that `-inf - max` is not NaN.
    #[inline(always)]
    pub fn reference(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }

    /// Takes in a tile of logits, of classes from `first_class` on; leaves `exp(z - max)` in `exps`.
    #[inline(always)]
    pub fn push<const ENTROPY: bool>(&mut self, logits: &[f32], exps: &mut [f32], first_class: usize) {
        let tile_max = vector::maximum(logits);
        if tile_max > self.max {
            self.raise(tile_max);
            let at = logits.iter().position(|&z| z == tile_max).unwrap_or(0);
            self.argmax = (first_class + at) as u32;
        }
        let reference = self.reference();
        const LANES: usize = 64;
        let (mut sums, mut weighted) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let (chunks, tail) = logits.as_chunks::<LANES>();
        let (exp_chunks, exp_tail) = exps[..logits.len()].as_chunks_mut::<LANES>();
        for (chunk, exps) in chunks.iter().zip(exp_chunks) {
            for k in 0..LANES {
                let shifted = chunk[k] - reference;
                exps[k] = vector::exp(shifted);
                sums[k] += exps[k];
                if ENTROPY {
                    weighted[k] += plogp_term(exps[k], shifted);
                }
            }
        }
        for ((z, e), k) in tail.iter().zip(exp_tail).zip(0..) {
            let shifted = z - reference;
            *e = vector::exp(shifted);
            sums[k] += *e;
            if ENTROPY {
                weighted[k] += plogp_term(*e, shifted);
            }
        }
        self.sum += vector::sum_of_lanes(&sums);
        if ENTROPY {
            self.weighted += vector::sum_of_lanes(&weighted);
        }
    }

    /// Moves to a larger maximum.
    fn raise(&mut self, max: f32) {
        if self.max > f32::NEG_INFINITY {
            let step = self.max as f64 - max as f64;
            // exp(step) · step is 0 · -inf where the new maximum is +inf: that row is NaN, as it should be.
            let scale = step.exp();
            self.weighted = (self.weighted + self.sum * step) * scale;
            self.sum *= scale;
        }
        self.max = max;
    }

    /// A lower bound of the final `Σ exp(z - max)`: what has been summed, and the target's term if it is to come.
    #[inline(always)]
    pub fn sum_bound(&self) -> f32 {
        let target = if self.pending { vector::exp((self.floor - self.reference()).min(80.0)) } else { 0.0 };
        self.sum as f32 + target
    }

    /// Log-sum-exp relative to `max`.
    pub fn log_sum(&self) -> f64 {
        self.sum.ln()
    }

    /// `lse`; NaN if any logit was NaN or +inf, -inf if all were -inf.
    pub fn lse(&self) -> f32 {
        (self.max as f64 + self.log_sum()) as f32
    }

    /// `lse - z_target` without the cancellation of two large numbers.
    pub fn nll(&self) -> f32 {
        ((self.max as f64 - self.target_logit as f64) + self.log_sum()) as f32
    }

    /// `-Σ p ln p`.
    pub fn entropy(&self) -> f32 {
        (self.log_sum() - self.weighted / self.sum) as f32
    }
}

/// `e · shifted`, 0 where `e` is 0 (`shifted` may be -inf), NaN where it is NaN.
#[inline(always)]
fn plogp_term(e: f32, shifted: f32) -> f32 {
    if e == 0.0 { 0.0 } else { e * shifted }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(logits: &[f32], tile: usize) -> SoftmaxState {
        let mut state = SoftmaxState::new(0.0, 0.0);
        let mut exps = vec![f32::NAN; tile];
        for (i, tile_logits) in logits.chunks(tile).enumerate() {
            state.push::<true>(tile_logits, &mut exps, i * tile);
        }
        state
    }

    #[test]
    fn the_state_does_not_depend_on_tiles_or_on_a_common_offset() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1013) as f32 / 64.0 - 8.0).collect();
        let max = logits.iter().copied().fold(f32::MIN, f32::max) as f64;
        let sum: f64 = logits.iter().map(|&z| (z as f64 - max).exp()).sum();
        let entropy: f64 = logits.iter().map(|&z| z as f64 - max - sum.ln()).map(|l| -l * l.exp()).sum();
        for offset in [0.0_f32, -200.0, 512.0, 4096.0] {
            // Multiples of 1/64 up to 4096 are exact in f32: the offset must change nothing but the maximum.
            let shifted: Vec<f32> = logits.iter().map(|z| z + offset).collect();
            for tile in [1, 7, 64, 256, 1000] {
                let state = stream(&shifted, tile);
                assert_eq!(state.max as f64, max + offset as f64);
                assert!((state.log_sum() - sum.ln()).abs() <= 1e-6, "tile {tile}: {}", state.log_sum());
                assert!((state.entropy() as f64 - entropy).abs() <= 1e-5, "tile {tile}: {}", state.entropy());
            }
        }
    }

    #[test]
    fn masks_infinities_and_nan_come_out_as_they_should() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let masked = stream(&[-inf, 1.0, -inf, 1.0, -inf], 2);
        assert_eq!((masked.max, masked.sum), (1.0, 2.0));
        assert!((masked.entropy() - 2.0_f32.ln()).abs() <= 1e-6);
        assert_eq!(stream(&[-inf; 5], 2).lse(), -inf);
        assert!(stream(&[-inf, nan, -inf], 2).lse().is_nan());
        assert!(stream(&[0.0, nan, 1.0], 2).lse().is_nan());
        assert!(stream(&[0.0, inf, 1.0], 2).lse().is_nan());
        assert!(stream(&[0.0, inf, 1.0, nan], 1).lse().is_nan());
    }
}
