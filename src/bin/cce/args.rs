//! Values of command line options that several subcommands share.

use clap::ValueEnum;
use cut_cross_entropy::{DType, GradientFilter};

/// Element type of embeddings and classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl From<DTypeArg> for DType {
    fn from(arg: DTypeArg) -> DType {
        match arg {
            DTypeArg::F32 => DType::F32,
            DTypeArg::F16 => DType::F16,
            DTypeArg::Bf16 => DType::BF16,
        }
    }
}

/// Which entries of the softmax take part in the gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FilterArg {
    /// All of them.
    Exact,
    /// Small probabilities are rounded at random to 0 or eps; right in expectation.
    Unbiased,
    /// Probabilities below eps are dropped; biased, for comparison.
    Threshold,
}

impl FilterArg {
    /// The library's filter.
    pub fn filter(self, eps: f32, seed: u64) -> GradientFilter {
        match self {
            FilterArg::Exact => GradientFilter::Exact,
            FilterArg::Unbiased => GradientFilter::Unbiased { eps, seed },
            FilterArg::Threshold => GradientFilter::Threshold { eps },
        }
    }
}

/// A number, also as a power of two: `0.001` or `2^-10`.
pub fn parse_eps(text: &str) -> Result<f32, String> {
    let number = |text: &str| text.parse::<f32>().map_err(|_| format!("`{text}` is not a number"));
    match text.split_once('^') {
        Some((base, exponent)) => Ok(number(base)?.powf(number(exponent)?)),
        None => number(text),
    }
}
