//! What a workload's softmax looks like. Sparsity decides the speed of the backward, so no timing means anything
//! without these numbers beside it.

use super::matmul::{View, multiply};
use super::workload::{IGNORED, Workload};
use rayon::prelude::*;

/// Thresholds at which kept entries are counted.
pub const SURVEY_EPS: [f64; 2] = [1.0 / 1024.0, 1.0 / 4096.0];
/// Rows of logits that are in memory at a time.
const BLOCK: usize = 64;

/// Statistics over the tokens that have a target; logits by plain f32 matmuls, sums in f64.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Tokens without a target.
    pub ignored: usize,
    /// Mean negative log-likelihood of the targets, nats.
    pub loss: f64,
    /// Entropy of the rows at the 5th, 25th, 50th, 75th and 95th percentile, nats.
    pub entropy: [f64; 5],
    /// Mean over rows of `Σ_v min(1, p / eps)`, for each of [`SURVEY_EPS`]: what the unbiased filter keeps.
    pub kept_per_row: [f64; 2],
    /// Share of rows whose target is among the ten most probable classes.
    pub target_in_top_10: f64,
    /// Log-sum-exp of each token, 0 where it is ignored.
    pub lse: Vec<f64>,
}

impl Survey {
    /// One line for people.
    pub fn describe(&self, vocab: usize) -> String {
        let share = |kept: f64| 100.0 * kept / vocab.max(1) as f64;
        let [p5, p25, p50, p75, p95] = self.entropy;
        let ignored = match self.ignored {
            0 => String::new(),
            ignored => format!("; {ignored} of {} tokens ignored", self.lse.len()),
        };
        format!(
            "loss {:.2} nats; entropy {p5:.2} {p25:.2} {p50:.2} {p75:.2} {p95:.2} (5, 25, 50, 75, 95 %); target in \
             top 10: {:.0} %; expected kept entries a row: {:.0} ({:.2} %) at 2^-10, {:.0} ({:.2} %) at \
             2^-12{ignored}",
            self.loss,
            100.0 * self.target_in_top_10,
            self.kept_per_row[0],
            share(self.kept_per_row[0]),
            self.kept_per_row[1],
            share(self.kept_per_row[1]),
        )
    }
}

struct Row {
    lse: f64,
    entropy: f64,
    kept: [f64; 2],
    target: usize,
    nll: f64,
    in_top_10: bool,
}

/// Writes the products of the classifier with some tokens' embeddings, the first of which is given, into rows of V.
pub type Products<'a> = dyn FnMut(usize, &mut [f32]) -> anyhow::Result<()> + 'a;

/// On the host.
pub fn host_products(workload: &Workload) -> impl FnMut(usize, &mut [f32]) -> anyhow::Result<()> + '_ {
    let shape = workload.shape;
    move |first, products| {
        let tokens = products.len() / shape.vocab;
        let e = &workload.wide_embeddings()[first * shape.hidden..][..tokens * shape.hidden];
        let classifier = View::new(workload.wide_classifier(), shape.vocab, shape.hidden).transposed();
        multiply(products, View::new(e, tokens, shape.hidden), classifier);
        Ok(())
    }
}

/// Surveys all tokens that have a target. With a seed, targets are sampled from the softmax; without, they are the workload's.
pub fn survey(
    workload: &Workload,
    seed: Option<u64>,
    products: &mut Products<'_>,
) -> anyhow::Result<(Survey, Vec<i64>)> {
    let shape = workload.shape;
    let mut logits = vec![0.0; BLOCK.min(shape.tokens) * shape.vocab];
    let mut tokens: Vec<Option<Row>> = Vec::with_capacity(shape.tokens);
    for first in (0..shape.tokens).step_by(BLOCK) {
        let logits = &mut logits[..BLOCK.min(shape.tokens - first) * shape.vocab];
        products(first, logits)?;
        tokens.par_extend(logits.par_chunks_mut(shape.vocab).enumerate().map(|(i, z)| {
            if workload.softcap.is_some() {
                z.iter_mut().for_each(|z| *z = workload.capped(f64::from(*z)) as f32);
            }
            let i = first + i;
            let target = match seed {
                Some(seed) => Target::Drawn(workload.draw(seed, i)?),
                None => Target::Given(workload.target(i)?),
            };
            Some(survey_row(z, target))
        }));
    }
    let rows: Vec<&Row> = tokens.iter().flatten().collect();
    let mean = |value: &dyn Fn(&Row) -> f64| rows.iter().map(|row| value(row)).sum::<f64>() / rows.len().max(1) as f64;
    let mut entropies: Vec<f64> = rows.iter().map(|r| r.entropy).collect();
    entropies.sort_by(f64::total_cmp);
    let quantile = |q: f64| entropies.get((q * (entropies.len().max(1) - 1) as f64) as usize).copied().unwrap_or(0.0);
    let survey = Survey {
        ignored: tokens.len() - rows.len(),
        loss: mean(&|r| r.nll),
        entropy: [0.05, 0.25, 0.5, 0.75, 0.95].map(quantile),
        kept_per_row: [mean(&|r| r.kept[0]), mean(&|r| r.kept[1])],
        target_in_top_10: mean(&|r| f64::from(u8::from(r.in_top_10))),
        lse: tokens.iter().map(|token| token.as_ref().map_or(0.0, |row| row.lse)).collect(),
    };
    Ok((survey, tokens.iter().map(|token| token.as_ref().map_or(IGNORED, |row| row.target as i64)).collect()))
}

/// Where a row's target comes from.
enum Target {
    /// Of its softmax, where the probabilities of the classes before it and its own reach this.
    Drawn(f64),
    Given(usize),
}

fn survey_row(z: &[f32], target: Target) -> Row {
    let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let p: Vec<f32> = z.iter().map(|z| (z - max).exp()).collect();
    let sum: f64 = p.iter().map(|&p| f64::from(p)).sum();
    let lse = f64::from(max) + sum.ln();
    let (mut weighted, mut kept, mut reached, mut drawn) = (0.0, [0.0; 2], 0.0, None);
    for (v, (&p, &z)) in p.iter().zip(z).enumerate() {
        let p = f64::from(p) / sum;
        weighted += p * f64::from(z);
        for (kept, eps) in kept.iter_mut().zip(SURVEY_EPS) {
            *kept += (p / eps).min(1.0);
        }
        reached += p;
        if drawn.is_none() && matches!(target, Target::Drawn(u) if u < reached) {
            drawn = Some(v);
        }
    }
    let target = match target {
        Target::Drawn(_) => drawn.unwrap_or(z.len() - 1),
        Target::Given(class) => class,
    };
    let target_logit = z[target];
    Row {
        lse,
        entropy: lse - weighted,
        kept,
        target,
        nll: lse - f64::from(target_logit),
        in_top_10: z.iter().filter(|&&z| z > target_logit).count() < 10,
    }
}
