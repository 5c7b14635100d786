//! `cce bench`: how long and how much memory, as multiples of one plain matmul, against the materialising baseline.

mod chart;
mod cpu;
#[cfg(feature = "cublas")]
mod cuda;
mod gradient_error;
mod machine;
mod methods;
mod profile;
mod report;
#[cfg(test)]
mod tests;
mod timing;
mod workloads;

use crate::args::{BackendArg, DTypeArg, ShapeArgs, parse_eps};
use crate::common::slice_oracle::{Agreement, SliceOracle};
use crate::common::workload::Workload;
use anyhow::ensure;
use clap::{Args, ValueEnum};
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::plan::KernelChoice;
use cut_cross_entropy::{GradientFilter, Problem, Telemetry};
use indicatif::{ProgressBar, ProgressStyle};
use machine::Machine;
use methods::{Method, Round, Runner, Step};
use report::{MethodReport, ShapeReport};
use std::io::Write;
use std::path::PathBuf;
use timing::{Pair, Seconds};
pub use workloads::GenerateArgs;
use workloads::Recipe;

/// Time and memory of forward and backward, against the materialising baseline.
///
/// Times are multiples of T, one plain matmul of the size of the logits, run right before and right after each
/// measured step. Results are verified against f64 on a slice first; what is wrong or fails is not timed. Each round must give the
/// same loss and log-sum-exps again, bit by bit. On a GPU, T and the baseline are cuBLAS, times are those of events, and the L2 cache is flushed before each.
#[derive(Args)]
pub struct BenchArgs {
    /// What computes: `cpu` or `cuda`.
    #[arg(long, value_enum, default_value_t = BackendArg::Cpu)]
    backend: BackendArg,
    /// Named shapes (`cce info` lists them), separated by commas. By default figure_64k,figure_qwen on the processor and
    /// gemma2_2b,llama3_8b,qwen2_5_0_5b,qwen2_5_7b on a GPU.
    #[arg(long, value_delimiter = ',')]
    shape: Vec<String>,
    /// Tokens N, in place of the shape's; several are separated by commas.
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Vocabulary V, in place of the shape's.
    #[arg(long)]
    vocab: Option<usize>,
    /// Hidden size D, in place of the shape's.
    #[arg(long)]
    hidden: Option<usize>,
    /// Element types of embeddings and classifier, separated by commas. By default f32,bf16 on the processor and bf16 on a
    /// GPU.
    #[arg(long, value_enum, value_delimiter = ',')]
    dtype: Vec<DTypeArg>,
    /// Softcaps of the logits, separated by commas; 0: none.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    softcap: Vec<f32>,
    /// What to time, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "unbiased,exact,baseline")]
    methods: Vec<MethodArg>,
    /// CUDA kernels to time the methods by: auto, portable, hopper, `hopper:cluster=off,lead=3`. Given several times, each method
    /// is timed by each, in turn within a round.
    #[arg(long, default_value = "auto")]
    kernels: Vec<KernelChoice>,
    /// Threshold on probabilities of the unbiased and threshold filters; `2^-10` is understood.
    #[arg(long, value_parser = parse_eps, default_value = "2^-10")]
    eps: f32,
    /// Entries that generated rows keep on average at 2^-10, separated by commas: sharper and flatter softmaxes in turn. Without it,
    /// as a trained model's.
    #[arg(long, value_name = "ENTRIES", value_delimiter = ',', conflicts_with = "input")]
    kept: Vec<u32>,
    /// Shares of the tokens that are ignored in generated inputs, each by a draw of its own, separated by commas. T and the baseline's
    /// products are those of all tokens.
    #[arg(long, value_name = "SHARE", value_delimiter = ',', default_value = "0", conflicts_with = "input")]
    ignored: Vec<f64>,
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
    /// Also time every launch of each method on a GPU, in rounds of their own. With --csv they are in FILE-launches.csv beside it.
    #[arg(long)]
    profile: bool,
    /// Seeds of the unbiased filter for `--gradient-error`.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..))]
    seeds: u64,
    /// Print `ready` after verifying and `done` after each round, and wait for a line of standard input before each round:
    /// for scripts that alternate between programs. Where standard input ends, the rounds do.
    #[arg(long)]
    paced: bool,
    /// Write all numbers to this file after each shape, those of every single round to FILE-rounds.csv beside it, and gradient errors to
    /// FILE-gradient-error.csv
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
    /// The forward alone, without capture: as for a validation loss.
    Evaluation,
    /// Logits in memory: a matmul, a softmax, two matmuls.
    Baseline,
}

impl MethodArg {
    fn method(self, eps: f32, kernels: KernelChoice) -> Method {
        match self {
            MethodArg::Unbiased => Method::Ours(GradientFilter::Unbiased { eps, seed: 0 }, kernels),
            MethodArg::Exact => Method::Ours(GradientFilter::Exact, kernels),
            MethodArg::Threshold => Method::Ours(GradientFilter::Threshold { eps }, kernels),
            MethodArg::Evaluation => Method::Evaluation(kernels),
            MethodArg::Baseline => Method::Baseline,
        }
    }
}

/// Each method by each choice of kernels; the baseline has none.
fn methods(args: &BenchArgs) -> Vec<Method> {
    let mut methods = Vec::new();
    for &kernels in &args.kernels {
        for method in args.methods.iter().map(|method| method.method(args.eps, kernels)) {
            if !methods.contains(&method) {
                methods.push(method);
            }
        }
    }
    methods
}

/// Every softcap with every number of kept entries and every share of ignored tokens.
fn recipes(args: &BenchArgs) -> Vec<Recipe> {
    let kept: Vec<_> = if args.kept.is_empty() { vec![None] } else { args.kept.iter().copied().map(Some).collect() };
    let mut recipes = Vec::new();
    for &softcap in &args.softcap {
        for &kept in &kept {
            for &ignored in &args.ignored {
                recipes.push(Recipe { softcap, kept, ignored, seed: args.seed });
            }
        }
    }
    recipes
}

/// Runs the subcommand; whether everything that was timed, or was to be, is right.
pub fn run(args: &BenchArgs) -> anyhow::Result<bool> {
    let by_default = args.kernels.iter().all(|kernels| *kernels == KernelChoice::default());
    ensure!(by_default || args.backend == BackendArg::Cuda, "--kernels is for --backend cuda");
    ensure!(!args.profile || args.backend == BackendArg::Cuda, "--profile is for --backend cuda");
    ensure!(!args.profile || args.rounds > 0, "--profile needs a round at least, for T");
    let machine = Machine::open(args.backend)?;
    let revision = option_env!("CCE_REVISION").unwrap_or("unknown");
    say!("{}; cce {}, revision {revision}", machine.describe()?, env!("CARGO_PKG_VERSION"))?;
    let methods = methods(args);
    let progress = progress_bar();
    let mut findings = Findings::default();
    let bench = |name: &str, workload: &Workload, findings: &mut Findings| -> anyhow::Result<()> {
        let report = bench(name, &machine, workload, &methods, args, &progress, findings)?;
        findings.reports.extend(report);
        // After each shape: a GPU that is lost at the next one does not take this one's figures with it.
        findings.write(args, &machine, revision)
    };
    let done = each_workload(args, &machine, &progress, |name, workload| bench(name, workload, &mut findings));
    progress.finish_and_clear();
    // Also where something else ended the run.
    for wrong in &findings.wrong {
        eprintln!("wrong: {wrong}");
    }
    done.map(|()| findings.wrong.is_empty())
}

/// Hands on the file's tensors, or every shape, type and recipe that was asked for, under its name.
fn each_workload(
    args: &BenchArgs,
    machine: &Machine,
    progress: &ProgressBar,
    mut bench: impl FnMut(&str, &Workload) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if let Some(path) = &args.input {
        let name = path.file_stem().map_or("input".into(), |stem| stem.to_string_lossy().replace(',', "_"));
        for &softcap in &args.softcap {
            progress.set_message(format!("reading {}", path.display()));
            let workload = workloads::from_file(machine, path, softcap)?;
            bench(&name, &workload)?;
        }
    }
    let named = if args.input.is_some() { Vec::new() } else { machine.shapes(&args.shape) };
    let given: Vec<_> = args.tokens.iter().copied().map(Some).collect();
    let tokens = if given.is_empty() { vec![None] } else { given };
    for name in &named {
        for &tokens in &tokens {
            let shape = Some(name.clone());
            let asked = ShapeArgs { shape, tokens, vocab: args.vocab, hidden: args.hidden }.sizes()?;
            for dtype in machine.dtypes(&args.dtype) {
                let shape = machine.fitted(asked, dtype)?;
                if shape != asked {
                    say!("{name}: {asked} does not fit half of the free memory; scaled to {shape}")?;
                }
                for recipe in recipes(args) {
                    progress.set_message(format!("generating {shape} {dtype}"));
                    let workload = workloads::generate(machine, shape, dtype, recipe)?;
                    bench(&recipe.label(name), &workload)?;
                }
            }
        }
    }
    Ok(())
}

/// What is found.
#[derive(Default)]
struct Findings {
    reports: Vec<ShapeReport>,
    errors: gradient_error::Table,
    /// Methods at shapes where they are wrong, fail, or give something else in a later round.
    wrong: Vec<String>,
}

impl Findings {
    /// Writes the files that were asked for.
    fn write(&self, args: &BenchArgs, machine: &Machine, revision: &str) -> anyhow::Result<()> {
        if let Some(path) = &args.csv {
            report::write_csv(path, &self.reports, machine, revision)?;
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let beside = |what| path.with_file_name(format!("{stem}-{what}.csv"));
            report::write_rounds_csv(&beside("rounds"), &self.reports, &machine.name(), revision)?;
            self.errors.write_csv(&beside("gradient-error"), args.seeds, revision)?;
            profile::write_csv(&beside("launches"), &self.reports, &machine.name(), revision)?;
        }
        args.chart.as_ref().map_or(Ok(()), |path| chart::write(path, &self.reports))
    }
}

/// Verifies, then times all methods on one workload.
fn bench(
    name: &str,
    machine: &Machine,
    workload: &Workload,
    methods: &[Method],
    args: &BenchArgs,
    progress: &ProgressBar,
    findings: &mut Findings,
) -> anyhow::Result<Option<ShapeReport>> {
    let (shape, dtype) = (workload.shape, workload.embeddings.as_slice().dtype());
    let cap = workload.softcap.map_or(String::new(), |cap| format!(", softcap {cap}"));
    let survey = workload.survey.describe(shape.vocab);
    progress.suspend(|| say!("\n{name}: {shape} {dtype}{cap}\n{survey}"))?;
    let mut runner = machine.runner(workload)?;
    let runner = &mut *runner;
    let mut possible = Vec::new();
    for &method in methods {
        match runner.obstacle(method) {
            Some(obstacle) => progress.suspend(|| say!("skipped {}: {obstacle}", method.name()))?,
            None => possible.push(method),
        }
    }
    progress.set_message(format!("{name} {dtype}: verifying"));
    let mut note = |method: Method, wrong: String| {
        findings.wrong.push(format!("{} at {name} {shape} {dtype}{cap} {wrong}", method.name()));
    };
    let (possible, mut reports) = verify(runner, workload, &possible, progress, &mut note)?;
    if args.gradient_error {
        let backend = machine.backend().open(KernelChoice::default())?;
        findings.errors.add(name, backend.host(), workload, args.seeds, progress)?;
    }
    if args.rounds == 0 || possible.is_empty() {
        return Ok(None);
    }
    progress.set_message(format!("{name} {dtype}: timing"));
    let measured = measure(runner, &possible, args, &mut reports, progress, &mut note)?;
    let tf32: Vec<f64> = (0..3).filter_map(|_| Some(runner.tf32_matmul().ok()??.wall * 1e3)).collect();
    let shortest = measured.matmul.iter().map(|t| t.wall).fold(f64::INFINITY, f64::min);
    for (report, rounds) in reports.iter_mut().zip(measured.rounds) {
        let phase = |time: fn(&Round) -> Seconds| {
            let pairs: Vec<Pair> = rounds.iter().map(|r| Pair { time: time(r), matmul: r.matmul }).collect();
            timing::summarize(&pairs, shortest)
        };
        report.forward = phase(|round| round.forward);
        report.backward = phase(|round| round.backward);
        report.both = phase(|round| round.forward + round.backward);
        report.rounds = rounds;
    }
    reports.retain(|report| !report.rounds.is_empty());
    if reports.is_empty() {
        return Ok(None);
    }
    let mut profiles = Vec::new();
    if args.profile {
        for &method in possible.iter().filter(|&&method| method != Method::Baseline) {
            progress.set_message(format!("{name} {dtype}: launches of {}", method.name()));
            match profile::profile(runner, method, args.rounds) {
                Ok(profile) => profiles.push(profile),
                Err(error) => note(method, format!("fails where its launches are timed: {error:#}")),
            }
        }
    }
    let report = ShapeReport {
        name: name.into(),
        shape,
        dtype,
        softcap: workload.softcap,
        matmul_ms: measured.matmul.iter().map(|t| t.wall * 1e3).collect(),
        tf32_matmul_ms: tf32,
        state: machine.state(),
        methods: reports,
        profiles,
    };
    progress.suspend(|| report::print_table(&report).and_then(|()| profile::print(&report)))?;
    Ok(Some(report))
}

/// Runs a method once and checks it, or says what is wrong with it.
fn attempt(runner: &mut dyn Runner, oracle: &SliceOracle<'_>, method: Method) -> Result<(Step, Agreement), String> {
    let failed = |error: anyhow::Error| format!("failed: {error:#}");
    runner.poison().map_err(failed)?;
    let step = runner.step(method).map_err(failed)?;
    let agreement = oracle.check(&runner.outcome(method).map_err(failed)?);
    Ok((step, agreement.map_err(|how| format!("disagrees with the f64 slice: {how}"))?))
}

/// Runs each method once and checks it; also warms every buffer. Returns those that are right.
fn verify(
    runner: &mut dyn Runner,
    workload: &Workload,
    methods: &[Method],
    progress: &ProgressBar,
    wrong: &mut dyn FnMut(Method, String),
) -> anyhow::Result<(Vec<Method>, Vec<MethodReport>)> {
    let oracle = SliceOracle::new(workload);
    let nothing = timing::summarize(&[], f64::NAN);
    let (mut right, mut reports) = (Vec::new(), Vec::new());
    for &method in methods {
        let (step, agreement) = match attempt(runner, &oracle, method) {
            Ok(right) => right,
            Err(how) => {
                progress.suspend(|| say!("LEFT OUT {:<18} {how}", method.name()))?;
                wrong(method, how);
                continue;
            }
        };
        let (inputs, options) = (workload.inputs(), method.options(workload.softcap));
        let planned = || runner.planned_bytes(method, &Problem::new(&inputs, &options)?);
        let planned_bytes = (method != Method::Baseline).then(planned).transpose()?;
        let Agreement { loss, per_token, d_embeddings, d_classifier } = agreement;
        let Telemetry { rows, exact_rows, raised_rows, .. } = step.telemetry;
        let mut line = format!("loss {loss:.3}, per token {per_token:.3}");
        if method.has_backward() {
            line += &format!(", dE {d_embeddings:.3}, dC {d_classifier:.3}");
        }
        if exact_rows > 0 && exact_rows < rows {
            line += &format!("; {exact_rows} of {rows} rows took the exact path");
        }
        if raised_rows > 0 {
            line += &format!("; {raised_rows} of {rows} rows took a larger ε");
        }
        if let Some(bytes) = planned_bytes {
            line += &format!("; planned workspace {:.1} MiB", report::mib(bytes));
        }
        progress.suspend(|| say!("verified {:<18} error/tolerance: {line}", method.name()))?;
        reports.push(MethodReport {
            name: method.name(),
            has_backward: method.has_backward(),
            forward: nothing,
            backward: nothing,
            both: nothing,
            peak_bytes: step.peak_bytes,
            planned_bytes,
            telemetry: step.telemetry,
            loss: step.loss,
            results: runner.last().bits(),
            rounds: Vec::new(),
        });
        right.push(method);
    }
    Ok((right, reports))
}

struct Measured {
    matmul: Vec<Seconds>,
    /// Of each method, its rounds.
    rounds: Vec<Vec<Round>>,
}

/// T A T B T C T, in rounds. What was measured before something fails counts.
fn measure(
    runner: &mut dyn Runner,
    methods: &[Method],
    args: &BenchArgs,
    reports: &mut [MethodReport],
    progress: &ProgressBar,
    wrong: &mut dyn FnMut(Method, String),
) -> anyhow::Result<Measured> {
    progress.set_position(0);
    progress.set_length((args.rounds * methods.len()) as u64);
    runner.matmul()?;
    let mut measured = Measured { matmul: vec![runner.matmul()?], rounds: vec![Vec::new(); methods.len()] };
    pace(args, "ready")?;
    for index in 0..args.rounds {
        if !wait(args)? {
            ensure!(index > 0, "standard input ended before the first round");
            break;
        }
        if args.paced {
            // Others have worked meanwhile: the last T is of long ago, and clocks and caches are theirs.
            runner.matmul()?;
            measured.matmul.push(runner.matmul()?);
        }
        for ((&method, rounds), report) in methods.iter().zip(&mut measured.rounds).zip(&mut *reports) {
            let before = measured.matmul[measured.matmul.len() - 1];
            let (step, after) = match runner.step(method).and_then(|step| Ok((step, runner.matmul()?))) {
                Ok(done) => done,
                Err(error) => {
                    let how = format!("fails in round {index}: {error:#}");
                    progress.suspend(|| say!("ENDED    {:<18} {how}", method.name()))?;
                    wrong(method, how);
                    return Ok(measured);
                }
            };
            measured.matmul.push(after);
            rounds.push(Round { forward: step.forward, backward: step.backward, matmul: [before, after] });
            report.peak_bytes = report.peak_bytes.max(step.peak_bytes);
            if method != Method::Baseline && runner.last().bits() != report.results {
                let how = format!("gives another loss or log-sum-exps in round {index} than when it was verified");
                progress.suspend(|| say!("CHANGED  {:<18} {how}", method.name()))?;
                wrong(method, how);
                report.results = runner.last().bits();
            }
            progress.inc(1);
        }
        pace(args, "done")?;
    }
    Ok(measured)
}

fn pace(args: &BenchArgs, word: &str) -> anyhow::Result<()> {
    if args.paced {
        say!("{word}")?;
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Whether there is a next round.
fn wait(args: &BenchArgs) -> anyhow::Result<bool> {
    Ok(!args.paced || std::io::stdin().read_line(&mut String::new())? > 0)
}

/// Hidden where standard error is no terminal.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} eta {eta}") {
        bar.set_style(style);
    }
    bar
}
