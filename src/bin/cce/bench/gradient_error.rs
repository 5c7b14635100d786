//! How far filtered gradients are from the exact one, and whether the distance has a direction.

use crate::common::workload::Workload;
use cut_cross_entropy::{
    Backend, CceOptions, GradientDType, GradientFilter, GradientRequest, Host, Upstream, cce_forward_backward,
};
use indicatif::ProgressBar;

/// Thresholds that are compared.
const EPS_EXPONENTS: [i32; 3] = [-8, -10, -12];

struct Flat {
    d_embeddings: Vec<f32>,
    d_classifier: Vec<f32>,
    kept_per_row: f64,
}

type HostBackend<'a> = dyn Backend<Memory = Host> + 'a;

fn gradients(backend: &HostBackend<'_>, workload: &Workload, filter: GradientFilter) -> anyhow::Result<Flat> {
    let gradients = GradientRequest { dtype: GradientDType::F32, ..GradientRequest::default() };
    let options = CceOptions { filter, gradients, softcap: workload.softcap, ..CceOptions::default() };
    let (_, result) = cce_forward_backward(backend, &workload.inputs(), &options, &Upstream::default())?;
    let flat = |g: Option<cut_cross_entropy::HostBuffer>| match g {
        Some(cut_cross_entropy::HostBuffer::F32(values)) => values,
        _ => Vec::new(),
    };
    Ok(Flat {
        d_embeddings: flat(result.d_embeddings),
        d_classifier: flat(result.d_classifier),
        kept_per_row: result.telemetry.kept_per_row(),
    })
}

/// What is known of one gradient after some seeds.
struct Errors<'a> {
    exact: &'a [f32],
    /// Sum over seeds of (filtered - exact).
    sum: Vec<f32>,
    /// Relative Frobenius error of each seed.
    relative: Vec<f64>,
    /// `<filtered - exact, exact> / |exact|²` of each seed: the error along the gradient itself.
    along: Vec<f64>,
}

impl<'a> Errors<'a> {
    fn new(exact: &'a [f32]) -> Self {
        Errors { exact, sum: vec![0.0; exact.len()], relative: Vec::new(), along: Vec::new() }
    }

    fn add(&mut self, filtered: &[f32]) {
        let (mut square, mut along, mut norm) = (0.0, 0.0, 0.0);
        for ((sum, &g), &exact) in self.sum.iter_mut().zip(filtered).zip(self.exact) {
            let error = f64::from(g) - f64::from(exact);
            *sum += error as f32;
            square += error * error;
            along += error * f64::from(exact);
            norm += f64::from(exact) * f64::from(exact);
        }
        self.relative.push((square / norm).sqrt());
        self.along.push(along / norm);
    }

    /// Error of a seed, error of the mean over seeds, its ratio to error/√K, z-score along the gradient.
    fn summary(&self) -> (f64, f64, f64, f64) {
        let seeds = self.relative.len() as f64;
        let error = (self.relative.iter().map(|r| r * r).sum::<f64>() / seeds).sqrt();
        let norm: f64 = self.exact.iter().map(|&x| f64::from(x).powi(2)).sum();
        let sum: f64 = self.sum.iter().map(|&x| f64::from(x).powi(2)).sum();
        let of_mean = (sum / norm).sqrt() / seeds;
        let mean = self.along.iter().sum::<f64>() / seeds;
        let variance = self.along.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / (seeds - 1.0).max(1.0);
        (error, of_mean, of_mean / (error / seeds.sqrt()), mean / (variance / seeds).sqrt())
    }
}

/// Prints the table for one workload.
pub fn print(backend: &HostBackend<'_>, workload: &Workload, seeds: u64, progress: &ProgressBar) -> anyhow::Result<()> {
    progress.set_message("gradient error");
    progress.set_length(1 + EPS_EXPONENTS.len() as u64 * (seeds + 1));
    let exact = gradients(backend, workload, GradientFilter::Exact)?;
    progress.inc(1);
    let mut lines = Vec::new();
    for exponent in EPS_EXPONENTS {
        let eps = 2.0_f32.powi(exponent);
        let mut errors = [Errors::new(&exact.d_embeddings), Errors::new(&exact.d_classifier)];
        let mut kept = 0.0;
        for seed in 1..=seeds {
            let filtered = gradients(backend, workload, GradientFilter::Unbiased { eps, seed })?;
            errors[0].add(&filtered.d_embeddings);
            errors[1].add(&filtered.d_classifier);
            kept += filtered.kept_per_row / seeds as f64;
            progress.inc(1);
        }
        for (gradient, errors) in ["dE", "dC"].iter().zip(&errors) {
            let (error, of_mean, shrink, z) = errors.summary();
            lines.push(format!(
                "{:<18}{kept:>9.1}  {gradient}{error:>12.3e}{of_mean:>15.3e}{shrink:>17.3}{z:>10.2}",
                format!("unbiased 2^{exponent}")
            ));
        }
        let biased = gradients(backend, workload, GradientFilter::Threshold { eps })?;
        progress.inc(1);
        for (gradient, exact, biased_gradient) in
            [("dE", &exact.d_embeddings, &biased.d_embeddings), ("dC", &exact.d_classifier, &biased.d_classifier)]
        {
            let mut errors = Errors::new(exact);
            errors.add(biased_gradient);
            let error = errors.relative[0];
            lines.push(format!(
                "{:<18}{:>9.1}  {gradient}{error:>12.3e}{:>15}{:>17}{:>10}",
                format!("threshold 2^{exponent}"),
                biased.kept_per_row,
                "same",
                "(biased)",
                "-"
            ));
        }
    }
    progress.suspend(|| {
        println!(
            "gradient error against the exact path in f32 (checked against f64 on a slice above), {seeds} seeds;\n\
             error of the mean over error/√seeds is 1 without bias and grows to √seeds = {:.2} with it",
            (seeds as f64).sqrt()
        );
        println!(
            "{:<18}{:>9}  {:<2}{:>12}{:>15}{:>17}{:>10}",
            "filter", "kept/row", "", "error", "error of mean", "mean/(err/√K)", "z along"
        );
        lines.iter().for_each(|line| println!("{line}"));
    });
    Ok(())
}
