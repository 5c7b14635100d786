//! What is timed, whatever times it.

use super::timing::Seconds;
use crate::common::slice_oracle::Outcome;
use cut_cross_entropy::plan::KernelFamily;
use cut_cross_entropy::{CceOptions, GradientFilter, Telemetry};

/// A way to compute the loss and both gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// This library, by these kernels where they are a GPU's.
    Ours(GradientFilter, KernelFamily),
    /// This library's forward without capture: the loss alone.
    Evaluation(KernelFamily),
    /// Logits in memory.
    Baseline,
}

impl Method {
    /// As in tables, files and charts.
    pub fn name(&self) -> String {
        let power = |eps: f32| match eps.log2() {
            exact if exact.fract() == 0.0 => format!("2^{exact}"),
            _ => eps.to_string(),
        };
        let method = match self {
            Method::Ours(GradientFilter::Exact, _) => "exact".into(),
            Method::Ours(GradientFilter::Unbiased { eps, .. }, _) => format!("unbiased {}", power(*eps)),
            Method::Ours(GradientFilter::Threshold { eps }, _) => format!("threshold {}", power(*eps)),
            Method::Evaluation(_) => "evaluation".into(),
            Method::Baseline => "materialising".into(),
        };
        match self.kernels() {
            KernelFamily::Auto => method,
            // A comma would be a column of its own in the record.
            kernels => format!("{method} {}", kernels.to_string().replace(',', " ")),
        }
    }

    /// Which kernels a GPU computes it by.
    pub fn kernels(&self) -> KernelFamily {
        match self {
            Method::Ours(_, kernels) | Method::Evaluation(kernels) => *kernels,
            Method::Baseline => KernelFamily::Auto,
        }
    }

    /// Whether it has a backward.
    pub fn has_backward(&self) -> bool {
        !matches!(self, Method::Evaluation(_))
    }

    /// What the gradients are of.
    pub fn filter(&self) -> GradientFilter {
        if let Method::Ours(filter, _) = self { *filter } else { GradientFilter::Exact }
    }

    /// As the library takes it.
    pub fn options(&self, softcap: Option<f32>) -> CceOptions {
        CceOptions { filter: self.filter(), softcap, capture: self.has_backward(), ..CceOptions::default() }
    }
}

/// One forward and backward.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    pub forward: Seconds,
    pub backward: Seconds,
    /// Bytes beyond inputs and outputs.
    pub peak_bytes: usize,
    pub telemetry: Telemetry,
    pub loss: f32,
}

/// A machine with the tensors of one workload. All methods share its output buffers.
pub trait Runner {
    /// Runs the method once.
    fn step(&mut self, method: Method) -> anyhow::Result<Step>;

    /// The floor: one plain matmul of the size of the logits.
    fn matmul(&mut self) -> anyhow::Result<Seconds>;

    /// The same with f32 inputs rounded to TF32, where the machine has that; for information.
    fn tf32_matmul(&mut self) -> anyhow::Result<Option<Seconds>> {
        Ok(None)
    }

    /// Makes outputs that are not written show as NaN.
    fn poison(&mut self) -> anyhow::Result<()>;

    /// What the last step left, for the slice oracle.
    fn outcome(&mut self, method: Method) -> anyhow::Result<Outcome<'_>>;

    /// Workspace by the backend's plan.
    fn planned_bytes(&self, method: Method) -> anyhow::Result<Option<usize>>;

    /// Why the machine cannot run the method at this shape.
    fn obstacle(&self, _: Method) -> Option<String> {
        None
    }
}
