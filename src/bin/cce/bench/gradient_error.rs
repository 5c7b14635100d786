//! How far filtered gradients are from the exact one, and whether the distance has a direction.

use crate::common::workload::Workload;
use anyhow::Context;
use cut_cross_entropy::{
    Backend, CceOptions, GradientDType, GradientFilter, GradientRequest, Host, Shape, Upstream, cce_forward_backward,
};
use indicatif::ProgressBar;
use std::path::Path;

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

/// One gradient under one filter.
struct Row {
    filter: String,
    kept_per_row: f64,
    gradient: &'static str,
    error: f64,
    /// Of the unbiased filter, over seeds: error of the mean, its ratio to error/√K, z-score along the gradient.
    of_seeds: Option<(f64, f64, f64)>,
}

/// What was measured, of all workloads.
#[derive(Default)]
pub struct Table(Vec<(String, Row)>);

impl Table {
    /// Measures one workload and prints what it found.
    pub fn add(
        &mut self,
        name: &str,
        backend: &HostBackend<'_>,
        workload: &Workload,
        seeds: u64,
        progress: &ProgressBar,
    ) -> anyhow::Result<()> {
        let rows = measure(backend, workload, seeds, progress)?;
        progress.suspend(|| print(&rows, seeds))?;
        let Shape { tokens, hidden, vocab } = workload.shape;
        self.0.extend(rows.into_iter().map(|row| (format!("{name},{tokens},{vocab},{hidden}"), row)));
        Ok(())
    }

    /// One line a gradient and filter; nothing where nothing was measured.
    ///
    /// # Errors
    /// Of the file system.
    pub fn write_csv(&self, path: &Path, seeds: u64, revision: &str) -> anyhow::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut text = "shape,tokens,vocab,hidden,filter,kept_per_row,gradient,error,error_of_mean,mean_ratio,z_along,seeds,revision\n".to_string();
        for (shape, row) in &self.0 {
            let of_seeds =
                row.of_seeds.map_or(",,".into(), |(of_mean, shrink, z)| format!("{of_mean:.4e},{shrink:.4},{z:.3}"));
            let Row { filter, kept_per_row, gradient, error, .. } = row;
            text +=
                &format!("{shape},{filter},{kept_per_row:.2},{gradient},{error:.4e},{of_seeds},{seeds},{revision}\n");
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn measure(
    backend: &HostBackend<'_>,
    workload: &Workload,
    seeds: u64,
    progress: &ProgressBar,
) -> anyhow::Result<Vec<Row>> {
    progress.set_message("gradient error");
    progress.set_length(1 + EPS_EXPONENTS.len() as u64 * (seeds + 1));
    let exact = gradients(backend, workload, GradientFilter::Exact)?;
    progress.inc(1);
    let mut rows = Vec::new();
    for exponent in EPS_EXPONENTS {
        let eps = 2.0_f32.powi(exponent);
        let mut errors = [Errors::new(&exact.d_embeddings), Errors::new(&exact.d_classifier)];
        let mut kept_per_row = 0.0;
        for seed in 1..=seeds {
            let filtered = gradients(backend, workload, GradientFilter::Unbiased { eps, seed })?;
            errors[0].add(&filtered.d_embeddings);
            errors[1].add(&filtered.d_classifier);
            kept_per_row += filtered.kept_per_row / seeds as f64;
            progress.inc(1);
        }
        for (gradient, errors) in ["dE", "dC"].into_iter().zip(&errors) {
            let (error, of_mean, shrink, z) = errors.summary();
            let filter = format!("unbiased 2^{exponent}");
            rows.push(Row { filter, kept_per_row, gradient, error, of_seeds: Some((of_mean, shrink, z)) });
        }
        let biased = gradients(backend, workload, GradientFilter::Threshold { eps })?;
        progress.inc(1);
        for (gradient, exact, filtered) in
            [("dE", &exact.d_embeddings, &biased.d_embeddings), ("dC", &exact.d_classifier, &biased.d_classifier)]
        {
            let mut errors = Errors::new(exact);
            errors.add(filtered);
            let (filter, error) = (format!("threshold 2^{exponent}"), errors.relative[0]);
            rows.push(Row { filter, kept_per_row: biased.kept_per_row, gradient, error, of_seeds: None });
        }
    }
    Ok(rows)
}

fn print(rows: &[Row], seeds: u64) -> std::io::Result<()> {
    say!(
        "gradient error against the exact path in f32 (checked against f64 on a slice above), {seeds} seeds;\n\
         error of the mean over error/√seeds is 1 without bias and grows to √seeds = {:.2} with it",
        (seeds as f64).sqrt()
    )?;
    say!(
        "{:<18}{:>9}  {:<2}{:>12}{:>15}{:>17}{:>10}",
        "filter",
        "kept/row",
        "",
        "error",
        "error of mean",
        "mean/(err/√K)",
        "z along"
    )?;
    for Row { filter, kept_per_row, gradient, error, of_seeds } in rows {
        let of_seeds = match of_seeds {
            Some((of_mean, shrink, z)) => format!("{of_mean:>15.3e}{shrink:>17.3}{z:>10.2}"),
            None => format!("{:>15}{:>17}{:>10}", "same", "(biased)", "-"),
        };
        say!("{filter:<18}{kept_per_row:>9.1}  {gradient}{error:>12.3e}{of_seeds}")?;
    }
    Ok(())
}
