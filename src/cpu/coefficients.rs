//! From upstream gradients to the few numbers a row's logit gradients are made of.

use super::candidates::RowStatistics;
use super::rows::Row;
use crate::{Problem, Upstream};

/// `∂L/∂z_v = p_v · (softmax - entropy · (ln p_v + H)) - [v = y] · target - spread · w_v` for one row.
///
/// From `L = Σ_i a_i nll_i + b_i Σ_v w_v (lse_i - z_iv) + c_i lse_i² + l_i lse_i + h_i H_i` and
/// `∂H/∂z_v = -p_v (ln p_v + H)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowCoefficients {
    /// Factor of `p_v`: `a + b · Σ_v w_v + 2 c lse + l`.
    pub softmax: f32,
    /// What the target's logit gives back: `a`.
    pub target: f32,
    /// Factor of the class weights, the dense part of label smoothing: `b`.
    pub spread: f32,
    /// Upstream of the entropy: `h`.
    pub entropy: f32,
}

impl RowCoefficients {
    /// Whether the row's logit gradients are all 0, whatever its logits are.
    pub fn is_zero(&self) -> bool {
        [self.softmax, self.target, self.spread, self.entropy].iter().all(|&x| x == 0.0)
    }

    /// The part of the gradient that goes with `p`, where `p` counts as `counted`.
    #[inline(always)]
    pub fn of_probability(&self, counted: f32, log_probability: f32, statistics: &RowStatistics) -> f32 {
        if self.entropy == 0.0 {
            counted * self.softmax
        } else if counted == 0.0 {
            0.0 // p ln p at p = 0
        } else {
            counted * (self.softmax - self.entropy * (log_probability + statistics.entropy))
        }
    }
}

/// The coefficients of every row. Scale factors such as 1/N stay in `f32` until the last rounding.
pub(crate) fn row_coefficients(
    problem: &Problem<'_>,
    rows: &[Row],
    statistics: &[RowStatistics],
    upstream: &Upstream<'_>,
) -> Vec<RowCoefficients> {
    let options = problem.options();
    let (smoothing, vocab) = (options.label_smoothing as f64, problem.shape().vocab);
    let denominator = super::denominator(problem, rows);
    let scale = upstream.loss_scale.map_or(1.0, |scale| scale.float_at(0) as f64);
    let d_loss = if denominator == 0.0 { 0.0 } else { upstream.loss as f64 * scale / denominator };
    let class_weight_sum: f64 =
        if smoothing > 0.0 { (0..vocab).map(|v| problem.class_weight(v) as f64).sum() } else { 0.0 };
    let of = |(row, s): (&Row, &RowStatistics)| {
        let token = row.token as usize;
        let at = |vector: &Option<crate::HostSlice<'_>>| vector.map_or(0.0, |v| v.float_at(token) as f64);
        let d_losses = (d_loss + at(&upstream.losses)) * problem.token_weight(token) as f64;
        let target = d_losses * (1.0 - smoothing) * problem.class_weight(row.class as usize) as f64 + at(&upstream.nll);
        let spread = if smoothing > 0.0 { d_losses * smoothing / vocab as f64 } else { 0.0 };
        let mut softmax = target + spread * class_weight_sum + at(&upstream.lse);
        if options.z_loss > 0.0 {
            softmax += d_losses * 2.0 * options.z_loss as f64 * s.lse as f64;
        }
        RowCoefficients {
            softmax: softmax as f32,
            target: target as f32,
            spread: spread as f32,
            entropy: at(&upstream.entropy) as f32,
        }
    };
    rows.iter().zip(statistics).map(of).collect()
}
