//! `cce run`: the loss and its gradients of tensors in a file.

use crate::args::{AnyBackend, BackendArg, FilterArg, GradientDTypeArg, ReductionArg, parse_eps};
use crate::heap;
use crate::system_memory;
use crate::tensors::{self, Output, Tensor, TensorFile};
use anyhow::ensure;
use clap::Args;
use cut_cross_entropy::plan::KernelChoice;
use cut_cross_entropy::{
    Backend, CceOptions, Forward, GradientRequest, Gradients, Host, HostBuffer, HostSlice, Inputs, Matrix, Problem,
    Reduction, Upstream, cce_backward, cce_forward,
};
use std::path::PathBuf;
use std::time::Instant;

/// Loss and gradients of the tensors in a safetensors file.
///
/// Reads `embeddings` [N, D], `classifier` [V, D] and `targets` `[N]` (i64, i32 or u32); where present also `bias` `[V]`,
/// `class_weights` `[V]`, `token_weights` `[N]` and `d_losses` `[N]`, the upstream gradient of `--reduction none` (ones where
/// absent). Writes `loss`, `losses` `[N]`, `lse` `[N]`, `d_embeddings` [N, D], `d_classifier` [V, D], and as asked `d_bias`
/// `[V]`, `entropy` `[N]`, `argmax` `[N]`. The output file is complete or not there.
#[derive(Args)]
pub struct RunArgs {
    /// File with the input tensors.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// File for the results; replaced if it exists.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// What computes.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    backend: BackendArg,
    /// Which CUDA kernels compute: auto, portable, hopper, or `hopper:cluster=off,lead=3` to measure what the planner
    /// would not choose.
    #[arg(long, default_value_t = KernelChoice::default())]
    kernels: KernelChoice,
    /// Which entries of the softmax take part in the gradients.
    #[arg(long, value_enum, default_value_t = FilterArg::Unbiased)]
    filter: FilterArg,
    /// Threshold on probabilities of the unbiased and threshold filters; `2^-10` is understood.
    #[arg(long, value_parser = parse_eps, default_value = "2^-10")]
    eps: f32,
    /// Seed of the unbiased filter.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Target value that marks a token to skip.
    #[arg(long, default_value_t = -100, allow_negative_numbers = true)]
    ignore_index: i64,
    /// How per-token losses become one.
    #[arg(long, value_enum, default_value_t = ReductionArg::Mean)]
    reduction: ReductionArg,
    /// Caps logits: `cap * tanh(x / cap)`.
    #[arg(long, value_name = "CAP", allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// Factor on the products of embeddings and classifier.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    logit_scale: f32,
    /// Share of the target's probability that is spread over all classes, in [0, 1].
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    label_smoothing: f32,
    /// Adds this times the squared log-sum-exp to each token's loss.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    z_loss: f32,
    /// Pairs each position with the target this many positions later; 1 predicts the next token.
    #[arg(long, default_value_t = 0)]
    shift: usize,
    /// Tokens a sequence, for `--shift`; by default all tokens are one sequence.
    #[arg(long)]
    seq_len: Option<usize>,
    /// Also write the entropy of each token's softmax.
    #[arg(long)]
    entropy: bool,
    /// Also write each token's most probable class, and report the accuracy.
    #[arg(long)]
    metrics: bool,
    /// Element type of the gradients.
    #[arg(long, value_enum, default_value_t = GradientDTypeArg::Input)]
    grad_dtype: GradientDTypeArg,
    /// Do not compute the gradient of the embeddings.
    #[arg(long)]
    no_d_embeddings: bool,
    /// Do not compute the gradient of the classifier.
    #[arg(long)]
    no_d_classifier: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    fn options(&self) -> CceOptions {
        CceOptions {
            ignore_index: self.ignore_index,
            reduction: self.reduction.into(),
            softcap: self.softcap,
            logit_scale: self.logit_scale,
            label_smoothing: self.label_smoothing,
            z_loss: self.z_loss,
            shift: self.shift,
            filter: self.filter.filter(self.eps, self.seed),
            gradients: GradientRequest {
                embeddings: !self.no_d_embeddings,
                classifier: !self.no_d_classifier,
                bias: true,
                dtype: self.grad_dtype.into(),
            },
            capture: true,
            entropy: self.entropy,
            metrics: self.metrics,
        }
    }
}

/// What the file holds.
struct Loaded {
    embeddings: Tensor,
    classifier: Tensor,
    targets: Tensor,
    bias: Option<Tensor>,
    class_weights: Option<Tensor>,
    token_weights: Option<Tensor>,
    d_losses: Option<Tensor>,
}

impl Loaded {
    fn read(file: &mut TensorFile) -> anyhow::Result<Self> {
        let loaded = Loaded {
            embeddings: file.require("embeddings")?,
            classifier: file.require("classifier")?,
            targets: file.require("targets")?,
            bias: file.read("bias")?,
            class_weights: file.read("class_weights")?,
            token_weights: file.read("token_weights")?,
            d_losses: file.read("d_losses")?,
        };
        let vectors = [
            ("targets", Some(&loaded.targets)),
            ("bias", loaded.bias.as_ref()),
            ("class_weights", loaded.class_weights.as_ref()),
            ("token_weights", loaded.token_weights.as_ref()),
            ("d_losses", loaded.d_losses.as_ref()),
        ];
        for (name, tensor) in vectors {
            tensor.map_or(Ok(()), |tensor| tensor.require_vector(name))?;
        }
        Ok(loaded)
    }

    fn inputs(&self, seq_len: Option<usize>) -> anyhow::Result<Inputs<'_>> {
        let matrix = |name, tensor: &'_ Tensor| tensor.matrix(name);
        let [tokens, e_columns] = matrix("embeddings", &self.embeddings)?;
        let [vocab, c_columns] = matrix("classifier", &self.classifier)?;
        fn slice(tensor: &Option<Tensor>) -> Option<HostSlice<'_>> {
            tensor.as_ref().map(Tensor::slice)
        }
        Ok(Inputs {
            bias: slice(&self.bias),
            class_weights: slice(&self.class_weights),
            token_weights: slice(&self.token_weights),
            seq_len,
            ..Inputs::new(
                Matrix::new(self.embeddings.slice(), tokens, e_columns),
                Matrix::new(self.classifier.slice(), vocab, c_columns),
                self.targets.slice(),
            )
        })
    }
}

/// Results with what they cost.
struct Outcome {
    forward: Forward,
    gradients: Option<Gradients>,
    forward_ms: f64,
    backward_ms: Option<f64>,
    /// On the CPU measured: peak of live heap bytes beyond inputs and outputs. On a GPU what the plan allocates.
    workspace_bytes: usize,
}

/// Runs the subcommand.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let backend = args.backend.open(args.kernels)?;
    tensors::check_writable(&args.output)?;
    let loaded = Loaded::read(&mut TensorFile::open(&args.input)?)?;
    ensure!(
        loaded.d_losses.is_none() || args.reduction == ReductionArg::None,
        "d_losses is the upstream gradient of --reduction none; with another reduction it has no meaning"
    );
    let inputs = loaded.inputs(args.seq_len)?;
    let options = args.options();
    let problem = Problem::new(&inputs, &options)?;
    let ones;
    let upstream = match &loaded.d_losses {
        Some(d_losses) => Upstream::losses(d_losses.slice()),
        None if options.reduction == Reduction::None => {
            ones = vec![1.0; problem.shape().tokens];
            Upstream::losses(&ones)
        }
        None => Upstream::default(),
    };
    let planned = backend.planned_workspace_bytes(&problem)?;
    let mut outcome = compute(backend.host(), &inputs, &options, &upstream)?;
    if !matches!(backend, AnyBackend::Cpu(_)) {
        outcome.workspace_bytes = planned;
    }
    tensors::write(&args.output, &outputs(&outcome)?)?;
    report(args, backend.host(), planned, &problem, &outcome)
}

fn compute(
    backend: &dyn Backend<Memory = Host>,
    inputs: &Inputs<'_>,
    options: &CceOptions,
    upstream: &Upstream<'_>,
) -> anyhow::Result<Outcome> {
    let wanted = options.gradients;
    let any = wanted.embeddings || wanted.classifier || inputs.bias.is_some();
    let (outcome, peak, _) = heap::measure(|| {
        let clock = Instant::now();
        let forward = cce_forward(backend, inputs, options)?;
        let forward_ms = clock.elapsed().as_secs_f64() * 1e3;
        let clock = Instant::now();
        let gradients = any.then(|| cce_backward(backend, inputs, &forward, upstream)).transpose()?;
        let backward_ms = any.then(|| clock.elapsed().as_secs_f64() * 1e3);
        anyhow::Ok(Outcome { forward, gradients, forward_ms, backward_ms, workspace_bytes: 0 })
    });
    let outcome = outcome?;
    let output_bytes: usize = outputs(&outcome)?.iter().map(Output::byte_len).sum();
    Ok(Outcome { workspace_bytes: peak.saturating_sub(output_bytes), ..outcome })
}

fn outputs(outcome: &Outcome) -> anyhow::Result<Vec<Output<'_>>> {
    let forward = &outcome.forward;
    let shape = forward.shape();
    let tokens = [shape.tokens];
    let mut outputs = vec![
        Output::floats("loss", &[], std::slice::from_ref(&forward.loss)),
        Output::floats("losses", &tokens, &forward.losses),
        Output::floats("lse", &tokens, &forward.lse),
    ];
    outputs.extend(forward.entropy.as_ref().map(|e| Output::floats("entropy", &tokens, e)));
    outputs.extend(forward.argmax.as_ref().map(|a| Output::indices("argmax", &tokens, a)));
    let Some(Gradients { d_embeddings, d_classifier, d_bias, .. }) = &outcome.gradients else { return Ok(outputs) };
    let gradients: [(_, &[usize], &Option<HostBuffer>); 3] = [
        ("d_embeddings", &[shape.tokens, shape.hidden], d_embeddings),
        ("d_classifier", &[shape.vocab, shape.hidden], d_classifier),
        ("d_bias", &[shape.vocab], d_bias),
    ];
    for (name, shape, gradient) in gradients {
        if let Some(gradient) = gradient {
            outputs.push(Output::gradient(name, shape, gradient)?);
        }
    }
    Ok(outputs)
}

fn report(
    args: &RunArgs,
    backend: &dyn Backend<Memory = Host>,
    planned: usize,
    problem: &Problem<'_, Host>,
    outcome: &Outcome,
) -> anyhow::Result<()> {
    let (forward, shape) = (&outcome.forward, problem.shape());
    let telemetry = outcome.gradients.as_ref().map(|g| g.telemetry);
    let resident = system_memory::peak_resident_bytes();
    if args.json {
        // Numbers that are not finite become null.
        let object = serde_json::json!({
            "backend": backend.name(),
            "tokens": shape.tokens,
            "vocab": shape.vocab,
            "hidden": shape.hidden,
            "dtype": problem.dtype().to_string(),
            "loss": forward.loss,
            "accuracy": forward.accuracy,
            "forward_ms": outcome.forward_ms,
            "backward_ms": outcome.backward_ms,
            "workspace_bytes": outcome.workspace_bytes,
            "planned_workspace_bytes": planned,
            "peak_rss_bytes": resident,
            "kept_entries": telemetry.map(|t| t.kept_entries),
            "kept_mass": telemetry.map(|t| t.kept_mass),
            "exact_rows": telemetry.map(|t| t.exact_rows),
            "raised_rows": telemetry.map(|t| t.raised_rows),
        });
        return Ok(say!("{object}")?);
    }
    say!("{shape} {}, backend {}", problem.dtype(), backend.name())?;
    say!("loss {}", forward.loss)?;
    if let Some(accuracy) = forward.accuracy {
        say!("accuracy {accuracy}")?;
    }
    say!("forward {:.3} ms", outcome.forward_ms)?;
    if let Some((ms, telemetry)) = outcome.backward_ms.zip(telemetry) {
        say!(
            "backward {ms:.3} ms; {} entries kept ({:.1} a row, {:.2} % of the mass), {} of {} rows exact, {} with a larger ε",
            telemetry.kept_entries,
            telemetry.kept_per_row(),
            100.0 * telemetry.kept_mass,
            telemetry.exact_rows,
            telemetry.rows,
            telemetry.raised_rows,
        )?;
    }
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    let resident = resident.map_or(String::new(), |bytes| format!(", at most {:.1} MiB resident in all", mib(bytes)));
    Ok(say!("workspace {:.2} MiB{resident}", mib(outcome.workspace_bytes as u64))?)
}
