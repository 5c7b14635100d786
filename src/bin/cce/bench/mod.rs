//! `cce bench`: how long and how much memory, as multiples of one plain matmul, against the materialising baseline.

mod chart;
mod gradient_error;
mod methods;
mod report;
mod timing;

use crate::args::{DTypeArg, parse_eps};
use crate::common::baseline::Baseline;
use crate::common::shapes;
use crate::common::slice_oracle::{Agreement, SliceOracle};
use crate::common::workload::Workload;
use crate::system_memory;
use crate::tensors::TensorFile;
use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{CceOptions, DType, GradientFilter, HostBuffer, Inputs, Matrix, Problem, Shape};
use indicatif::{ProgressBar, ProgressStyle};
use methods::{Bench, Method};
use report::{MethodReport, ShapeReport};
use std::path::{Path, PathBuf};
use timing::{Pair, Seconds};

/// Time and memory of forward and backward, against the materialising baseline.
///
/// Times are multiples of T, one plain matmul of the size of the logits, run right before and right after each
/// measured step. Results are verified against f64 on a slice first; what is wrong is not timed.
#[derive(Args)]
pub struct BenchArgs {
    /// Named shapes (`cce info` lists them), separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "figure_64k,figure_qwen")]
    shape: Vec<String>,
    /// Tokens N, in place of the shape's.
    #[arg(long)]
    tokens: Option<usize>,
    /// Vocabulary V, in place of the shape's.
    #[arg(long)]
    vocab: Option<usize>,
    /// Hidden size D, in place of the shape's.
    #[arg(long)]
    hidden: Option<usize>,
    /// Element types of embeddings and classifier, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32,bf16")]
    dtype: Vec<DTypeArg>,
    /// What to time, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "unbiased,exact,baseline")]
    methods: Vec<MethodArg>,
    /// Threshold on probabilities of the unbiased and threshold filters; `2^-10` is understood.
    #[arg(long, value_parser = parse_eps, default_value = "2^-10")]
    eps: f32,
    /// Rounds over all methods. 0 only verifies.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tensors `embeddings`, `classifier`, `targets` of a trained model, in place of generated ones.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "tokens", "vocab", "hidden", "dtype"])]
    input: Option<PathBuf>,
    /// Seed of the generated inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also measure the error of filtered gradients against the exact one, and look for bias.
    #[arg(long)]
    gradient_error: bool,
    /// Seeds of the unbiased filter for `--gradient-error`.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..))]
    seeds: u64,
    /// Write all numbers to this file.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw them into this SVG file.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
}

/// What can be timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    /// The default: sparse unbiased gradients.
    Unbiased,
    /// Exact gradients in bounded memory.
    Exact,
    /// Sparse gradients without the probabilities below eps.
    Threshold,
    /// Logits in memory: a matmul, a softmax in place, two matmuls.
    Baseline,
}

impl MethodArg {
    fn method(self, eps: f32) -> Method {
        match self {
            MethodArg::Unbiased => Method::Ours(GradientFilter::Unbiased { eps, seed: 0 }),
            MethodArg::Exact => Method::Ours(GradientFilter::Exact),
            MethodArg::Threshold => Method::Ours(GradientFilter::Threshold { eps }),
            MethodArg::Baseline => Method::Baseline,
        }
    }
}

/// Runs the subcommand.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    println!("{} threads; cce {}", rayon::current_num_threads(), env!("CARGO_PKG_VERSION"));
    let methods: Vec<Method> = args.methods.iter().map(|m| m.method(args.eps)).collect();
    let progress = progress_bar();
    let mut reports = Vec::new();
    if let Some(path) = &args.input {
        progress.set_message(format!("reading {}", path.display()));
        let (workload, dtype) = from_file(path)?;
        let name = path.file_stem().map_or("input".into(), |stem| stem.to_string_lossy().replace(',', "_"));
        reports.extend(bench(&name, &workload, dtype, &methods, args, &progress)?);
    }
    for name in args.shape.iter().filter(|_| args.input.is_none()) {
        let named = shapes::find(name).with_context(|| format!("no shape is named `{name}`; `cce info` lists them"))?;
        let asked = Shape {
            tokens: args.tokens.unwrap_or(named.shape.tokens),
            hidden: args.hidden.unwrap_or(named.shape.hidden),
            vocab: args.vocab.unwrap_or(named.shape.vocab),
        };
        ensure!(asked.tokens > 0 && asked.hidden > 0 && asked.vocab > 0, "a benchmark needs sizes above 0: {asked}");
        for &dtype in &args.dtype {
            let dtype = DType::from(dtype);
            let shape = fitted(asked, dtype)?;
            if shape != asked {
                println!("{name}: {asked} does not fit half of the free memory; scaled to {shape}");
            }
            progress.set_message(format!("generating {shape} {dtype}"));
            let workload = Workload::generate(shape, dtype, args.seed);
            reports.extend(bench(name, &workload, dtype, &methods, args, &progress)?);
        }
    }
    progress.finish_and_clear();
    if let Some(path) = &args.csv {
        report::write_csv(path, &reports)?;
    }
    if let Some(path) = &args.chart {
        chart::write(path, &reports)?;
    }
    Ok(())
}

/// Tensors of a trained model, without the tokens that have no target.
fn from_file(path: &Path) -> anyhow::Result<(Workload, DType)> {
    let mut file = TensorFile::open(path)?;
    let (embeddings, classifier) = (file.require("embeddings")?, file.require("classifier")?);
    let targets = file.require("targets")?.to_indices()?;
    let [tokens, hidden] = embeddings.matrix("embeddings")?;
    let [vocab, _] = classifier.matrix("classifier")?;
    let dtype = embeddings.slice().dtype();
    let inputs: Inputs<'_> = Inputs::new(
        Matrix::new(embeddings.slice(), tokens, hidden),
        Matrix::new(classifier.slice(), vocab, hidden),
        &targets,
    );
    Problem::new(&inputs, &CceOptions::default())?;
    let kept: Vec<usize> = (0..tokens).filter(|&i| targets[i] >= 0).collect();
    ensure!(!kept.is_empty() && vocab > 0 && hidden > 0, "a benchmark needs tokens with targets, classes and columns");
    let embeddings = rows(embeddings.into_buffer("embeddings")?, hidden, &kept);
    let targets = kept.iter().map(|&i| targets[i]).collect();
    let shape = Shape { tokens: kept.len(), hidden, vocab };
    Ok((Workload::from_parts(shape, embeddings, classifier.into_buffer("classifier")?, targets), dtype))
}

fn rows(matrix: HostBuffer, columns: usize, kept: &[usize]) -> HostBuffer {
    fn pick<T: Copy>(matrix: &[T], columns: usize, kept: &[usize]) -> Vec<T> {
        kept.iter().flat_map(|&i| &matrix[i * columns..][..columns]).copied().collect()
    }
    match matrix {
        HostBuffer::F32(m) => HostBuffer::F32(pick(&m, columns, kept)),
        HostBuffer::F16(m) => HostBuffer::F16(pick(&m, columns, kept)),
        HostBuffer::BF16(m) => HostBuffer::BF16(pick(&m, columns, kept)),
        other => other,
    }
}

/// Verifies, then times all methods on one workload.
fn bench(
    name: &str,
    workload: &Workload,
    dtype: DType,
    methods: &[Method],
    args: &BenchArgs,
    progress: &ProgressBar,
) -> anyhow::Result<Option<ShapeReport>> {
    let shape = workload.shape;
    progress.suspend(|| println!("\n{name}: {shape} {dtype}\n{}", workload.survey.describe(shape.vocab)));
    let mut bench = Bench {
        workload,
        baseline: Baseline::default(),
        d_embeddings: HostBuffer::zeros("d_embeddings", dtype, shape.tokens * shape.hidden)?,
        d_classifier: HostBuffer::zeros("d_classifier", dtype, shape.vocab * shape.hidden)?,
    };
    progress.set_message(format!("{name} {dtype}: verifying"));
    let mut reports = verify(&mut bench, methods, progress)?;
    if args.gradient_error {
        gradient_error::print(workload, args.seeds, progress)?;
    }
    if args.rounds == 0 {
        return Ok(None);
    }
    let measured = measure(&mut bench, methods, args.rounds, &mut reports, progress, &format!("{name} {dtype}"))?;
    let shortest = measured.matmul.iter().map(|t| t.wall).fold(f64::INFINITY, f64::min);
    for (report, rounds) in reports.iter_mut().zip(&measured.rounds) {
        let phase = |time: fn(&Round) -> Seconds| {
            let pairs: Vec<Pair> = rounds.iter().map(|r| Pair { time: time(r), matmul: r.matmul }).collect();
            timing::summarize(&pairs, shortest)
        };
        report.forward = phase(|round| round.forward);
        report.backward = phase(|round| round.backward);
        report.both = phase(|round| round.forward + round.backward);
    }
    let report = ShapeReport {
        name: name.into(),
        shape,
        dtype,
        matmul_ms: measured.matmul.iter().map(|t| t.wall * 1e3).collect(),
        methods: reports,
    };
    progress.suspend(|| report::print_table(&report));
    Ok(Some(report))
}

/// Runs each method once and checks it; also warms every buffer.
fn verify(bench: &mut Bench<'_>, methods: &[Method], progress: &ProgressBar) -> anyhow::Result<Vec<MethodReport>> {
    let oracle = SliceOracle::new(bench.workload);
    let nothing = timing::summarize(&[], f64::NAN);
    let mut reports = Vec::new();
    for &method in methods {
        poison(&mut bench.d_embeddings);
        poison(&mut bench.d_classifier);
        let step = bench.step(method)?;
        let agreement = match oracle.check(&bench.outcome(method, &step)) {
            Ok(agreement) => agreement,
            Err(wrong) => bail!("{} disagrees with the f64 slice, so it is not timed: {wrong}", method.name()),
        };
        let Agreement { loss, per_token, d_embeddings, d_classifier } = agreement;
        progress.suspend(|| {
            println!(
                "verified {:<18} error/tolerance: loss {loss:.3}, per token {per_token:.3}, dE {d_embeddings:.3}, dC \
                 {d_classifier:.3}",
                method.name()
            );
        });
        reports.push(MethodReport {
            name: method.name(),
            forward: nothing,
            backward: nothing,
            both: nothing,
            peak_bytes: step.peak_bytes,
            telemetry: step.telemetry,
            loss: step.loss,
        });
    }
    Ok(reports)
}

/// What is not written shows as NaN.
fn poison(buffer: &mut HostBuffer) {
    match buffer {
        HostBuffer::F32(b) => b.fill(f32::NAN),
        HostBuffer::F16(b) => b.fill(half::f16::NAN),
        HostBuffer::BF16(b) => b.fill(half::bf16::NAN),
        _ => {}
    }
}

struct Measured {
    matmul: Vec<Seconds>,
    /// Of each method, its rounds.
    rounds: Vec<Vec<Round>>,
}

/// One step and the matmuls around it.
#[derive(Clone, Copy)]
struct Round {
    forward: Seconds,
    backward: Seconds,
    matmul: [Seconds; 2],
}

/// T A T B T C T, `rounds` times.
fn measure(
    bench: &mut Bench<'_>,
    methods: &[Method],
    rounds: usize,
    reports: &mut [MethodReport],
    progress: &ProgressBar,
    name: &str,
) -> anyhow::Result<Measured> {
    progress.set_message(format!("{name}: timing"));
    progress.set_position(0);
    progress.set_length((rounds * methods.len()) as u64);
    bench.matmul();
    let mut measured = Measured { matmul: vec![bench.matmul()], rounds: vec![Vec::new(); methods.len()] };
    for _ in 0..rounds {
        for ((&method, rounds), report) in methods.iter().zip(&mut measured.rounds).zip(&mut *reports) {
            let before = measured.matmul[measured.matmul.len() - 1];
            let step = bench.step(method)?;
            let after = bench.matmul();
            measured.matmul.push(after);
            rounds.push(Round { forward: step.forward, backward: step.backward, matmul: [before, after] });
            report.peak_bytes = report.peak_bytes.max(step.peak_bytes);
            progress.inc(1);
        }
    }
    Ok(measured)
}

/// The shape with as many tokens as half of the free memory has room for.
fn fitted(asked: Shape, dtype: DType) -> anyhow::Result<Shape> {
    let Some(available) = system_memory::available_bytes() else { return Ok(asked) };
    let budget = available as f64 / 2.0;
    let widened = if dtype == DType::F32 { 0 } else { 4 };
    let row = asked.hidden as f64 * (2 * dtype.size_in_bytes() + 2 * widened) as f64; // input, gradient, two copies
    let fixed = asked.vocab as f64 * row;
    let per_token = 4.0 * asked.vocab as f64 + row + 8.0 * asked.hidden as f64;
    let most = ((budget - fixed) / per_token).max(0.0) as usize;
    let rounded = if most >= 256 { most / 256 * 256 } else { most };
    ensure!(
        rounded > 0,
        "{asked} in {dtype} needs {:.1} GiB for the classifier alone; half of the free memory is {:.1} GiB",
        fixed / (1 << 30) as f64,
        budget / (1 << 30) as f64
    );
    Ok(Shape { tokens: asked.tokens.min(rounded), ..asked })
}

/// Hidden where standard error is no terminal.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} eta {eta}") {
        bar.set_style(style);
    }
    bar
}
