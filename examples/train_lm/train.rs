//! The training loop.

use crate::data::{Batch, Rng, progress_bar};
use crate::head::{Filter, Head, median};
use crate::model::{Model, ModelConfig};
use crate::optimizer::AdamW;
use anyhow::{Result, ensure};
use std::time::Instant;

/// A model, its head and its optimizer, and how they have done.
pub struct Trainer {
    pub model: Model,
    pub head: Head,
    pub losses: Vec<f32>,
    pub step_ms: Vec<f64>,
    optimizer: AdamW,
}

impl Trainer {
    /// The same seed gives the same initial model whatever the head.
    pub fn new(config: ModelConfig, head: Head, seed: u64) -> Result<Self> {
        let model = Model::new(config, seed)?;
        let optimizer = AdamW::new(model.vars());
        Ok(Trainer { model, head, losses: Vec::new(), step_ms: Vec::new(), optimizer })
    }

    /// One step of the optimizer.
    pub fn step(&mut self, batch: &Batch, learning_rate: f64) -> Result<()> {
        let start = Instant::now();
        let hidden = self.model.hidden_states(&batch.inputs)?;
        let loss = self.head.loss(&hidden, &self.model.classifier, &batch.targets, self.losses.len())?;
        let gradients = loss.backward()?;
        self.optimizer.step(&gradients, learning_rate)?;
        self.losses.push(loss.to_scalar()?);
        self.step_ms.push(start.elapsed().as_secs_f64() * 1e3);
        Ok(())
    }

    /// Mean loss over `batches`, the logits computed by `head`.
    pub fn held_out_loss(&self, head: &Head, batches: &[Batch]) -> Result<f64> {
        let mut sum = 0.0;
        for batch in batches {
            let hidden = self.model.hidden_states(&batch.inputs)?.detach();
            let loss = head.loss(&hidden, &self.model.classifier.detach(), &batch.targets, 0)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
        }
        Ok(sum / batches.len() as f64)
    }

    /// Mean of the last 20 training losses.
    pub fn train_loss(&self) -> f64 {
        let last = &self.losses[self.losses.len().saturating_sub(20)..];
        last.iter().map(|&loss| f64::from(loss)).sum::<f64>() / last.len() as f64
    }

    /// Median milliseconds a step.
    pub fn median_step_ms(&self) -> f64 {
        median(&mut self.step_ms.clone())
    }

    fn seconds(&self) -> f64 {
        self.step_ms.iter().sum::<f64>() / 1e3
    }
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub enum Budget {
    /// Seconds of the first trainer's own time, the others' not counted.
    Seconds(f64),
    Steps(usize),
}

impl Budget {
    /// Share of the budget that is used up; 1 or more: stop.
    fn used(self, trainer: &Trainer) -> f64 {
        match self {
            Budget::Seconds(seconds) => trainer.seconds() / seconds,
            Budget::Steps(steps) => trainer.losses.len() as f64 / steps as f64,
        }
    }
}

/// What all trainers of a run share.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    pub budget: Budget,
    pub batch: usize,
    pub seq_len: usize,
    pub learning_rate: f64,
    pub seed: u64,
}

impl Schedule {
    /// Linear warm-up over the first 5 %, then a half cosine down to 5 % of the peak.
    fn learning_rate_at(&self, used: f64) -> f64 {
        let warmup = (used / 0.05).clamp(0.05, 1.0);
        self.learning_rate * warmup * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * used).cos()))
    }
}

/// Steps all trainers in turn on the same batches at the same learning rates, until the first is out of budget.
pub fn train(trainers: &mut [Trainer], ids: &[u32], schedule: &Schedule) -> Result<()> {
    let len = match schedule.budget {
        Budget::Seconds(seconds) => seconds as u64,
        Budget::Steps(steps) => steps as u64,
    };
    let bar = progress_bar(len, "")?;
    let unit = if let Budget::Seconds(_) = schedule.budget { " s" } else { " steps" };
    bar.set_prefix(format!("training ({}{unit}) ", len));
    let mut rng = Rng(schedule.seed ^ 0x5EED);
    let mut next_report = 0.1;
    loop {
        let used = schedule.budget.used(&trainers[0]);
        if used >= next_report {
            let losses: Vec<String> = trainers.iter().map(|t| format!("{} {:.4}", t.head, t.train_loss())).collect();
            let step = trainers[0].losses.len();
            bar.suspend(|| println!("step {step:>4}  {:>3.0} %  {}", 100.0 * used.min(1.0), losses.join("  ")));
            next_report = (used * 10.0).floor() / 10.0 + 0.1;
        }
        if used >= 1.0 {
            break;
        }
        let batch = Batch::random(ids, schedule.batch, schedule.seq_len, &mut rng)?;
        for trainer in trainers.iter_mut() {
            trainer.step(&batch, schedule.learning_rate_at(used))?;
        }
        let loss = trainers[0].losses.last().copied().unwrap_or(f32::NAN);
        ensure!(loss.is_finite(), "the loss is {loss} at step {}: lower --lr", trainers[0].losses.len());
        bar.set_message(format!("loss {loss:.3}"));
        bar.set_position((schedule.budget.used(&trainers[0]) * len as f64) as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Median milliseconds of a few steps with another head: what a run with it would take.
pub fn time_steps(config: ModelConfig, head: Head, ids: &[u32], schedule: &Schedule) -> Result<f64> {
    let mut trainer = [Trainer::new(config, head, schedule.seed)?];
    let short = Schedule { budget: Budget::Steps(4), ..*schedule };
    let mut rng = Rng(schedule.seed);
    for _ in 0..4 {
        trainer[0].step(&Batch::random(ids, short.batch, short.seq_len, &mut rng)?, short.learning_rate)?;
    }
    Ok(median(&mut trainer[0].step_ms[1..])) // the first step meets cold memory
}

/// The head whose loss is reported on held-out text: the forward is the same for every filter.
pub fn evaluation_head() -> Head {
    Head::Fused { filter: Filter::Exact, eps: 1.0, seed: 0 }
}
