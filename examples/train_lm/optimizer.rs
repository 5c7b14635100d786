//! AdamW (Loshchilov and Hutter, 2019) in one pass over each parameter, in place.
//!
//! candle-nn's has 16 passes a parameter, each into a new tensor: with the two [V, D] matrices of this model that took a
//! fifth to a quarter of the step, measured on a loaded machine.

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Var, bail};
use rayon::prelude::*;
use std::sync::Mutex;

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.98;
const EPS: f32 = 1e-8;
const WEIGHT_DECAY: f32 = 0.05;
/// Numbers a task updates: four such pieces fit a core's second-level cache.
const CHUNK: usize = 1 << 14;

/// The optimizer's state.
pub struct AdamW {
    parameters: Vec<(Var, Mutex<Moments>)>,
    steps: i32,
}

/// Running means of a parameter's gradient and of its square.
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl AdamW {
    pub fn new(vars: Vec<Var>) -> Self {
        let moments = |len| Mutex::new(Moments { first: vec![0.0; len], second: vec![0.0; len] });
        let parameters = vars.into_iter().map(|var| (var.clone(), moments(var.elem_count()))).collect();
        AdamW { parameters, steps: 0 }
    }

    /// One update of every parameter that has a gradient.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<()> {
        self.steps += 1;
        let learning_rate = learning_rate as f32;
        let second_correction = (1.0 - BETA2.powi(self.steps)).sqrt();
        let step_size = learning_rate * second_correction / (1.0 - BETA1.powi(self.steps));
        for (var, moments) in &self.parameters {
            let Some(gradient) = gradients.get(var) else { continue };
            let update =
                Update { moments, keep: 1.0 - learning_rate * WEIGHT_DECAY, step_size, eps: EPS * second_correction };
            var.inplace_op2(&gradient.contiguous()?, &update)?;
        }
        Ok(())
    }
}

/// One step of one parameter.
struct Update<'a> {
    moments: &'a Mutex<Moments>,
    keep: f32,
    step_size: f32,
    eps: f32,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, theta: &mut CpuStorage, _: &Layout, gradient: &CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(theta), CpuStorage::F32(gradient)) = (theta, gradient) else {
            bail!("adamw: parameters must be f32");
        };
        let gradient = &gradient[layout.start_offset()..][..theta.len()];
        let mut moments = self.moments.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Moments { first, second } = &mut *moments;
        let chunks = theta.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK))).for_each(
            |((theta, gradient), (first, second))| {
                for (((t, &g), m), v) in theta.iter_mut().zip(gradient).zip(first).zip(second) {
                    *m = BETA1 * *m + (1.0 - BETA1) * g;
                    *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                    *t = self.keep * *t - self.step_size * *m / (v.sqrt() + self.eps);
                }
            },
        );
        Ok(())
    }
}
