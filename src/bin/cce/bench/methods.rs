//! What is timed, whatever times it.

use super::timing::Seconds;
use crate::common::slice_oracle::Outcome;
use cut_cross_entropy::plan::KernelChoice;
use cut_cross_entropy::{CceOptions, GradientFilter, HostBuffer, Problem, Telemetry};
use std::hash::{Hash, Hasher};

/// A way to compute the loss and both gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// This library, by these kernels where they are a GPU's.
    Ours(GradientFilter, KernelChoice),
    /// This library's forward without capture: the loss alone.
    Evaluation(KernelChoice),
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
            choice if choice == KernelChoice::default() => method,
            // A comma would be a column of its own in the record.
            kernels => format!("{method} {}", kernels.to_string().replace(',', " ")),
        }
    }

    /// Which kernels a GPU computes it by.
    pub fn kernels(&self) -> KernelChoice {
        match self {
            Method::Ours(_, kernels) | Method::Evaluation(kernels) => *kernels,
            Method::Baseline => KernelChoice::default(),
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

impl Step {
    /// With a peak of `bytes`, the per-token outputs among them: losses, nll, lse, target_logit.
    pub fn with_peak(self, bytes: usize, tokens: usize) -> Self {
        Step { peak_bytes: bytes.saturating_sub(4 * size_of::<f32>() * tokens), ..self }
    }
}

/// What a step leaves beside its gradients.
#[derive(Default)]
pub struct Last {
    pub loss: f32,
    pub nll: Vec<f32>,
    pub lse: Vec<f32>,
    pub exact_rows: u64,
    /// ε of each token's entries, where it is not the filter's for all.
    pub row_eps: Option<Vec<f32>>,
}

impl Last {
    /// A number for the loss and what there is of each token, all bits of it.
    pub fn bits(&self) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        let all = std::iter::once(&self.loss).chain(&self.nll).chain(&self.lse);
        all.for_each(|value| value.to_bits().hash(&mut hasher));
        hasher.finish()
    }

    /// With the gradients: what the slice oracle checks.
    pub fn outcome<'a>(&'a self, method: Method, gradients: Option<[&'a HostBuffer; 2]>) -> Outcome<'a> {
        Outcome {
            loss: self.loss,
            nll: &self.nll,
            lse: &self.lse,
            gradients,
            filter: method.filter(),
            exact_rows: self.exact_rows,
            row_eps: self.row_eps.as_deref(),
            sums_plainly: method == Method::Baseline,
            cuts_off: false,
        }
    }
}

/// One step and the matmuls around it.
#[derive(Clone, Copy)]
pub struct Round {
    pub forward: Seconds,
    pub backward: Seconds,
    pub matmul: [Seconds; 2],
}

/// What one launch of a step took.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel.
    pub name: String,
    /// For row blocks alone whose candidates outgrew their room.
    pub redo: bool,
    pub milliseconds: f64,
}

/// A machine with the tensors of one workload. All methods share its output buffers.
pub trait Runner {
    /// Runs the method once.
    fn step(&mut self, method: Method) -> anyhow::Result<Step>;

    /// Runs a method of ours once more and times its launches one by one, in their order.
    fn launches(&mut self, _: Method) -> anyhow::Result<Vec<Launch>> {
        anyhow::bail!("only a GPU has launches to time")
    }

    /// The floor: one plain matmul of the size of the logits.
    fn matmul(&mut self) -> anyhow::Result<Seconds>;

    /// The same with f32 inputs rounded to TF32, where the machine has that; for information.
    fn tf32_matmul(&mut self) -> anyhow::Result<Option<Seconds>> {
        Ok(None)
    }

    /// Makes outputs that are not written show as NaN.
    fn poison(&mut self) -> anyhow::Result<()>;

    /// What the last step left beside its gradients.
    fn last(&self) -> &Last;

    /// What the last step left, for the slice oracle.
    fn outcome(&mut self, method: Method) -> anyhow::Result<Outcome<'_>>;

    /// Workspace by the backend's plan for a method of ours.
    fn planned_bytes(&self, method: Method, problem: &Problem<'_>) -> anyhow::Result<usize>;

    /// Why the machine cannot run the method at this shape.
    fn obstacle(&self, _: Method) -> Option<String> {
        None
    }
}
