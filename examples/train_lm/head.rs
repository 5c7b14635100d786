//! The two heads: this crate's loss, and the same loss with the logits materialised by candle. And what each costs.

use crate::data::Batch;
use crate::heap;
use crate::model::Model;
use anyhow::Result;
use candle_core::{Tensor, Var};
use cut_cross_entropy::candle::linear_cross_entropy;
use cut_cross_entropy::{CceOptions, GradientFilter};
use std::fmt;
use std::time::Instant;

/// How the gradients of our head are filtered, without the seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Filter {
    /// All entries of the softmax
    Exact,
    /// Random rounding of small probabilities: no bias
    Unbiased,
    /// Small probabilities dropped: biased, for comparison
    Threshold,
}

/// What computes the loss from hidden states and classifier.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Head {
    /// This crate.
    Fused { filter: Filter, eps: f32, seed: u64 },
    /// candle's matmul, log_softmax and gather, all [N, V].
    Materialised,
}

impl Head {
    /// The mean loss of hidden states [B, S, D] against targets [B, S].
    pub fn loss(&self, hidden: &Tensor, classifier: &Tensor, targets: &Tensor, step: usize) -> Result<Tensor> {
        let Head::Fused { filter, eps, seed } = *self else {
            let logits = hidden.flatten(0, 1)?.matmul(&classifier.t()?)?;
            return Ok(candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?);
        };
        let filter = match filter {
            Filter::Exact => GradientFilter::Exact,
            // Another sample each step, so that what one step rounds down the next may round up.
            Filter::Unbiased => GradientFilter::Unbiased { eps, seed: (seed << 32) + step as u64 },
            Filter::Threshold => GradientFilter::Threshold { eps },
        };
        let options = CceOptions { filter, ..CceOptions::default() };
        Ok(linear_cross_entropy(hidden, classifier, targets, None, &options)?)
    }

    /// `exact`, `unbiased`, `threshold` or `materialised`, for tables.
    pub fn filter_name(&self) -> &'static str {
        match self {
            Head::Fused { filter: Filter::Exact, .. } => "exact",
            Head::Fused { filter: Filter::Unbiased, .. } => "unbiased",
            Head::Fused { filter: Filter::Threshold, .. } => "threshold",
            Head::Materialised => "materialised",
        }
    }

    /// The threshold on probabilities, where there is one.
    pub fn eps(&self) -> Option<f32> {
        match *self {
            Head::Fused { filter: Filter::Unbiased | Filter::Threshold, eps, .. } => Some(eps),
            _ => None,
        }
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.eps() {
            None => f.write_str(self.filter_name()),
            Some(eps) if eps.log2().fract() == 0.0 => write!(f, "{} 2^{}", self.filter_name(), eps.log2()),
            Some(eps) => write!(f, "{} {eps}", self.filter_name()),
        }
    }
}

/// What one forward and backward of a head costs.
#[derive(Debug, Clone, Copy)]
pub struct HeadCost {
    /// Median milliseconds.
    pub ms: f64,
    /// The most memory above what was allocated before, in MB (10^6 bytes): logits, workspace, both gradients.
    pub peak_mb: f64,
}

/// Measures the head alone, on the hidden states of `model`: candle's autodiff around it included, the body not.
pub fn measure(head: &Head, model: &Model, batches: &[Batch]) -> Result<HeadCost> {
    let (mut times, mut peak) = (Vec::new(), 0);
    for (step, batch) in batches.iter().enumerate() {
        let hidden = Var::from_tensor(&model.hidden_states(&batch.inputs)?.detach())?;
        let start = Instant::now();
        let (gradients, bytes, _) = heap::measure(|| {
            head.loss(&hidden, &model.classifier, &batch.targets, step).and_then(|loss| Ok(loss.backward()?))
        });
        times.push(start.elapsed().as_secs_f64() * 1e3);
        peak = peak.max(bytes);
        drop(gradients?);
    }
    Ok(HeadCost { ms: median(&mut times), peak_mb: peak as f64 / 1e6 })
}

/// The middle value, the upper one of two.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
