//! The benchmark's table and its CSV file.

use super::machine::Machine;
use super::methods::Round;
use super::profile::Profile;
use super::timing::{Summary, median};
use anyhow::Context;
use cut_cross_entropy::{DType, Shape, Telemetry};
use std::io::Write;
use std::path::Path;

/// Everything measured at one shape and dtype.
pub struct ShapeReport {
    pub name: String,
    pub shape: Shape,
    pub dtype: DType,
    pub softcap: Option<f32>,
    pub matmul_ms: Vec<f64>,
    /// With f32 inputs rounded to TF32; empty where that is not measured.
    pub tf32_matmul_ms: Vec<f64>,
    /// Driver and clocks right after the rounds, where there are some.
    pub state: String,
    pub methods: Vec<MethodReport>,
    /// Of the methods whose launches were timed one by one.
    pub profiles: Vec<Profile>,
}

/// Everything measured of one method.
pub struct MethodReport {
    pub name: String,
    pub has_backward: bool,
    pub forward: Summary,
    pub backward: Summary,
    pub both: Summary,
    pub peak_bytes: usize,
    /// Workspace by the backend's plan, where the method has one.
    pub planned_bytes: Option<usize>,
    pub telemetry: Telemetry,
    pub loss: f32,
    /// Of what each step must repeat, [`Last::bits`](super::methods::Last::bits).
    pub results: u64,
    pub rounds: Vec<Round>,
}

impl MethodReport {
    pub fn phases(&self) -> Vec<(&'static str, Summary)> {
        match self.has_backward {
            true => vec![("forward", self.forward), ("backward", self.backward), ("both", self.both)],
            false => vec![("forward", self.forward)],
        }
    }
}

impl ShapeReport {
    fn matmul_min_ms(&self) -> f64 {
        self.matmul_ms.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// `name dtype`, for headings.
    pub fn title(&self) -> String {
        let cap = self.softcap.map_or(String::new(), |cap| format!(" cap {cap}"));
        format!("{} {}{cap}", self.name, self.dtype)
    }
}

/// Mebibytes, for people.
pub fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// Prints the table of one shape.
pub fn print_table(report: &ShapeReport) -> std::io::Result<()> {
    let flops = 2.0 * report.shape.tokens as f64 * report.shape.vocab as f64 * report.shape.hidden as f64;
    let (typical, shortest) = (median(report.matmul_ms.clone()), report.matmul_min_ms());
    say!(
        "T = one plain matmul: median {typical:.3} ms, shortest {shortest:.3} ms ({:.0} GFLOP/s), {} runs",
        flops / shortest * 1e-6,
        report.matmul_ms.len(),
    )?;
    if !report.tf32_matmul_ms.is_empty() {
        say!("for information, with TF32: median {:.3} ms", median(report.tf32_matmul_ms.clone()))?;
    }
    if !report.state.is_empty() {
        say!("after the rounds: {}", report.state)?;
    }
    let width = report.methods.iter().map(|method| method.name.len() + 1).max().unwrap_or(0).max(18);
    say!(
        "{:<width$}{:<10}{:>9}{:>9}{:>9}{:>12}{:>12}{:>13}{:>11}{:>10}",
        "method",
        "phase",
        "median/T",
        "min/T",
        "cpu/T",
        "median ms",
        "min ms",
        "tokens/s",
        "peak MiB",
        "kept/row"
    )?;
    for method in &report.methods {
        for (phase, summary) in method.phases() {
            let cpu = summary.cpu_ratio.map_or("-".into(), |r| format!("{r:.3}"));
            let (peak, kept) = match phase == "both" || !method.has_backward {
                true => (format!("{:.1}", mib(method.peak_bytes)), kept(method)),
                false => (String::new(), String::new()),
            };
            say!(
                "{:<width$}{phase:<10}{:>9.3}{:>9.3}{cpu:>9}{:>12.3}{:>12.3}{:>13.0}{peak:>11}{kept:>10}",
                if phase == "forward" { &method.name } else { "" },
                summary.median_ratio,
                summary.min_ratio,
                summary.median_ms,
                summary.min_ms,
                report.shape.tokens as f64 / summary.median_ms * 1e3,
            )?;
        }
    }
    Ok(())
}

/// Kept entries a row, where the method keeps some.
fn kept(method: &MethodReport) -> String {
    match method.telemetry {
        Telemetry { rows, exact_rows, .. } if rows == exact_rows => "-".into(),
        telemetry => format!("{:.1}", telemetry.kept_per_row()),
    }
}

/// One line for each method and phase.
pub fn write_csv(path: &Path, reports: &[ShapeReport], machine: &Machine, revision: &str) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
        writeln!(
            file,
            "shape,tokens,vocab,hidden,dtype,method,phase,median_ratio,min_ratio,cpu_ratio,median_ms,min_ms,\
             matmul_median_ms,matmul_min_ms,rounds_matmul,peak_bytes,kept_per_row,kept_mass,loss,threads,\
             softcap,planned_bytes,device,state,tf32_matmul_ms,revision"
        )?;
        for report in reports {
            let Shape { tokens, hidden, vocab } = report.shape;
            for method in &report.methods {
                for (phase, s) in method.phases() {
                    let cpu = s.cpu_ratio.map_or(String::new(), |r| format!("{r:.4}"));
                    let tf32 = match report.tf32_matmul_ms.is_empty() {
                        true => String::new(),
                        false => format!("{:.3}", median(report.tf32_matmul_ms.clone())),
                    };
                    writeln!(
                        file,
                        "{},{tokens},{vocab},{hidden},{},{},{phase},{:.4},{:.4},{cpu},{:.4},{:.4},{:.4},{:.4},{},{},\
                         {:.2},{:.6},{:.6},{},{},{},{},{},{tf32},{revision}",
                        report.name,
                        report.dtype,
                        method.name,
                        s.median_ratio,
                        s.min_ratio,
                        s.median_ms,
                        s.min_ms,
                        median(report.matmul_ms.clone()),
                        report.matmul_min_ms(),
                        report.matmul_ms.len(),
                        method.peak_bytes,
                        method.telemetry.kept_per_row(),
                        method.telemetry.kept_mass,
                        method.loss,
                        rayon::current_num_threads(),
                        report.softcap.unwrap_or(0.0),
                        method.planned_bytes.map_or(String::new(), |bytes| bytes.to_string()),
                        machine.name(),
                        report.state.replace(',', " "),
                    )?;
                }
            }
        }
        file.flush()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// One line for each method and round; no file where nothing was timed.
pub fn write_rounds_csv(path: &Path, reports: &[ShapeReport], device: &str, revision: &str) -> anyhow::Result<()> {
    if reports.is_empty() {
        return Ok(());
    }
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
        writeln!(
            file,
            "shape,tokens,vocab,hidden,dtype,softcap,method,round,forward_ms,backward_ms,matmul_before_ms,\
             matmul_after_ms,device,revision"
        )?;
        for report in reports {
            let (Shape { tokens, hidden, vocab }, dtype) = (report.shape, report.dtype);
            let softcap = report.softcap.unwrap_or(0.0);
            for method in &report.methods {
                for (index, round) in method.rounds.iter().enumerate() {
                    let [before, after] = round.matmul;
                    let [forward, backward, before, after] =
                        [round.forward, round.backward, before, after].map(|seconds| seconds.wall * 1e3);
                    writeln!(
                        file,
                        "{},{tokens},{vocab},{hidden},{dtype},{softcap},{},{index},{forward:.5},{backward:.5},{before:.5},\
                         {after:.5},{device},{revision}",
                        report.name, method.name,
                    )?;
                }
            }
        }
        file.flush()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
