//! What is timed: our backend under a filter, and the materialising baseline, behind one step.

use super::timing::{Clock, Seconds};
use crate::common::baseline::Baseline;
use crate::common::slice_oracle::Outcome;
use crate::common::workload::Workload;
use crate::heap;
use cut_cross_entropy::{
    CceOptions, Cpu, GradientFilter, GradientSinks, HostBuffer, Sink, Telemetry, Upstream, cce_backward_into,
    cce_forward,
};

/// A way to compute the loss and both gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    Ours(GradientFilter),
    Baseline,
}

impl Method {
    /// As in tables, files and charts.
    pub fn name(&self) -> String {
        let power = |eps: f32| match eps.log2() {
            exact if exact.fract() == 0.0 => format!("2^{exact}"),
            _ => eps.to_string(),
        };
        match self {
            Method::Ours(GradientFilter::Exact) => "exact".into(),
            Method::Ours(GradientFilter::Unbiased { eps, .. }) => format!("unbiased {}", power(*eps)),
            Method::Ours(GradientFilter::Threshold { eps }) => format!("threshold {}", power(*eps)),
            Method::Baseline => "materialising".into(),
        }
    }
}

/// Buffers that all methods share: outputs, and the baseline's own. Warm after the first step, so that no timing
/// contains the system's page faults.
pub struct Bench<'a> {
    pub workload: &'a Workload,
    pub baseline: Baseline,
    pub d_embeddings: HostBuffer,
    pub d_classifier: HostBuffer,
}

/// One forward and backward.
pub struct Step {
    pub forward: Seconds,
    pub backward: Seconds,
    /// Bytes beyond inputs and outputs.
    pub peak_bytes: usize,
    pub telemetry: Telemetry,
    pub loss: f32,
    nll: Vec<f32>,
    lse: Vec<f32>,
}

impl Bench<'_> {
    /// Runs the method once.
    pub fn step(&mut self, method: Method) -> anyhow::Result<Step> {
        match method {
            Method::Ours(filter) => self.ours(filter),
            Method::Baseline => Ok(self.materialising()),
        }
    }

    fn ours(&mut self, filter: GradientFilter) -> anyhow::Result<Step> {
        let inputs = self.workload.inputs();
        let options = CceOptions { filter, ..CceOptions::default() };
        let sinks = GradientSinks {
            embeddings: Sink::Overwrite(self.d_embeddings.as_mut()),
            classifier: Sink::Overwrite(self.d_classifier.as_mut()),
            bias: Sink::Skip,
        };
        let (step, peak_bytes, _) = heap::measure(|| {
            let clock = Clock::start();
            let forward = cce_forward(&Cpu, &inputs, &options)?;
            let forward_time = clock.stop();
            let clock = Clock::start();
            let telemetry = cce_backward_into(&Cpu, &inputs, &forward, &Upstream::default(), sinks)?;
            let backward = clock.stop();
            let cut_cross_entropy::Forward { loss, nll, lse, .. } = forward;
            anyhow::Ok(Step { forward: forward_time, backward, peak_bytes: 0, telemetry, loss, nll, lse })
        });
        let outputs = 4 * size_of::<f32>() * self.workload.shape.tokens; // losses, nll, lse, target_logit
        Ok(Step { peak_bytes: peak_bytes.saturating_sub(outputs), ..step? })
    }

    fn materialising(&mut self) -> Step {
        let (baseline, workload) = (&mut self.baseline, self.workload);
        let held_before = baseline.buffer_bytes();
        let ((forward, backward, loss), grown, _) = heap::measure(|| {
            let clock = Clock::start();
            let loss = baseline.forward(workload);
            let forward = clock.stop();
            let clock = Clock::start();
            baseline.backward(workload, &mut self.d_embeddings, &mut self.d_classifier);
            (forward, clock.stop(), loss)
        });
        Step {
            forward,
            backward,
            peak_bytes: held_before + grown,
            telemetry: Telemetry::default(),
            loss,
            nll: baseline.nll.clone(),
            lse: baseline.lse.clone(),
        }
    }

    /// What a step left, for the slice oracle.
    pub fn outcome<'a>(&'a self, method: Method, step: &'a Step) -> Outcome<'a> {
        Outcome {
            loss: step.loss,
            nll: &step.nll,
            lse: &step.lse,
            d_embeddings: &self.d_embeddings,
            d_classifier: &self.d_classifier,
            filter: match method {
                Method::Ours(filter) => filter,
                Method::Baseline => GradientFilter::Exact,
            },
            exact_rows: step.telemetry.exact_rows,
        }
    }

    /// The floor: one plain matmul of the size of the logits.
    pub fn matmul(&mut self) -> Seconds {
        let clock = Clock::start();
        self.baseline.multiply_only(self.workload);
        clock.stop()
    }
}
