//! The processor as a machine to be timed.

use super::methods::{Last, Method, Runner, Step};
use super::timing::{Clock, Seconds};
use crate::common::baseline::Baseline;
use crate::common::slice_oracle::Outcome;
use crate::common::workload::Workload;
use crate::heap;
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{
    Cpu, Forward, GradientSinks, HostBuffer, Problem, Sink, Telemetry, Upstream, cce_backward_into, cce_forward,
};

/// Buffers are warm after the first step, so that no timing contains the system's page faults.
pub struct CpuRunner<'a> {
    workload: &'a Workload,
    baseline: Baseline,
    d_embeddings: HostBuffer,
    d_classifier: HostBuffer,
    last: Last,
}

impl<'a> CpuRunner<'a> {
    /// With gradients of the inputs' type.
    pub fn new(workload: &'a Workload) -> anyhow::Result<Self> {
        let (shape, dtype) = (workload.shape, workload.embeddings.as_slice().dtype());
        Ok(CpuRunner {
            workload,
            baseline: Baseline::default(),
            d_embeddings: HostBuffer::zeros("d_embeddings", dtype, shape.tokens * shape.hidden)?,
            d_classifier: HostBuffer::zeros("d_classifier", dtype, shape.vocab * shape.hidden)?,
            last: Last::default(),
        })
    }

    fn ours(&mut self, method: Method) -> anyhow::Result<Step> {
        let inputs = self.workload.inputs();
        let options = method.options(self.workload.softcap);
        let sinks = GradientSinks {
            embeddings: Sink::Overwrite(self.d_embeddings.as_mut()),
            classifier: Sink::Overwrite(self.d_classifier.as_mut()),
            bias: Sink::Skip,
        };
        let (step, peak_bytes, _) = heap::measure(|| {
            let clock = Clock::start();
            let forward = cce_forward(&Cpu, &inputs, &options)?;
            let forward_time = clock.stop();
            let (mut backward, mut telemetry) = (Seconds::default(), Telemetry::default());
            if method.has_backward() {
                let clock = Clock::start();
                telemetry = cce_backward_into(&Cpu, &inputs, &forward, &Upstream::default(), sinks)?;
                backward = clock.stop();
            }
            let Forward { loss, nll, lse, .. } = forward;
            self.last = Last { loss, nll, lse, exact_rows: telemetry.exact_rows, row_eps: None };
            anyhow::Ok(Step { forward: forward_time, backward, peak_bytes: 0, telemetry, loss })
        });
        Ok(step?.with_peak(peak_bytes, self.workload.shape.tokens))
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
        self.last = Last { loss, nll: baseline.nll.clone(), lse: baseline.lse.clone(), exact_rows: 0, row_eps: None };
        Step { forward, backward, peak_bytes: held_before + grown, telemetry: Telemetry::default(), loss }
    }
}

impl Runner for CpuRunner<'_> {
    fn step(&mut self, method: Method) -> anyhow::Result<Step> {
        match method {
            Method::Baseline => Ok(self.materialising()),
            _ => self.ours(method),
        }
    }

    fn matmul(&mut self) -> anyhow::Result<Seconds> {
        let clock = Clock::start();
        self.baseline.multiply_only(self.workload);
        Ok(clock.stop())
    }

    fn poison(&mut self) -> anyhow::Result<()> {
        for buffer in [&mut self.d_embeddings, &mut self.d_classifier] {
            match buffer {
                HostBuffer::F32(b) => b.fill(f32::NAN),
                HostBuffer::F16(b) => b.fill(half::f16::NAN),
                HostBuffer::BF16(b) => b.fill(half::bf16::NAN),
                _ => {}
            }
        }
        Ok(())
    }

    fn last(&self) -> &Last {
        &self.last
    }

    fn outcome(&mut self, method: Method) -> anyhow::Result<Outcome<'_>> {
        let gradients = method.has_backward().then_some([&self.d_embeddings, &self.d_classifier]);
        Ok(self.last.outcome(method, gradients))
    }

    fn planned_bytes(&self, _: Method, problem: &Problem<'_>) -> anyhow::Result<usize> {
        Ok(Cpu.plan(problem).workspace_bytes())
    }
}
