//! Where the inputs come from: the generator, or a file.

use super::machine::Machine;
use crate::args::{BackendArg, DTypeArg, ShapeArgs};
use crate::common::workload::{CONFIDENCE, IGNORED, Workload, confidence_keeping};
use crate::tensors::{self, Output, TensorFile};
use anyhow::{Context, ensure};
use clap::Args;
use cut_cross_entropy::{CceOptions, DType, Inputs, Matrix, Problem, Shape};
use std::path::{Path, PathBuf};

/// Write inputs like a trained model's to a safetensors file, for other programs to be measured on the same.
///
/// Tensors `embeddings` [N, D], `classifier` [V, D] and `targets` [N], by the generator of `cce bench`: a peaked softmax with
/// Zipf's law over the classes, targets drawn from it.
#[derive(Args)]
pub struct GenerateArgs {
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Element type of embeddings and classifier.
    #[arg(long, value_enum, default_value_t = DTypeArg::Bf16)]
    dtype: DTypeArg,
    /// Softcap of the logits that targets are drawn from; 0: none.
    #[arg(long, default_value_t = 0.0)]
    softcap: f32,
    /// Entries that a row keeps on average at 2^-10: sharpens or flattens the softmax. Without it, as a trained model's.
    #[arg(long, value_name = "ENTRIES")]
    kept: Option<u32>,
    /// Share of the tokens that are ignored, each by a draw of its own: their targets are -100.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    ignored: f64,
    /// Seed of the generator.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What multiplies: `cpu` or `cuda`.
    #[arg(long, value_enum, default_value_t = BackendArg::Cpu)]
    backend: BackendArg,
}

impl GenerateArgs {
    /// Runs the subcommand.
    pub fn run(&self) -> anyhow::Result<()> {
        tensors::check_writable(&self.output)?;
        let machine = Machine::open(self.backend)?;
        let shape = self.shape.sizes()?;
        let GenerateArgs { softcap, kept, ignored, seed, .. } = *self;
        let recipe = Recipe { softcap, kept, ignored, seed };
        let workload = generate(&machine, shape, self.dtype.into(), recipe)?;
        let Shape { tokens, hidden, vocab } = shape;
        let outputs = [
            Output::gradient("embeddings", &[tokens, hidden], &workload.embeddings)?,
            Output::gradient("classifier", &[vocab, hidden], &workload.classifier)?,
            Output::targets("targets", &[tokens], &workload.targets),
        ];
        tensors::write(&self.output, &outputs)?;
        Ok(say!("{shape} {}\n{}", DType::from(self.dtype), workload.survey.describe(vocab))?)
    }
}

/// What generated inputs are like, beside their shape and type.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// 0: none.
    pub softcap: f32,
    /// Entries that a row keeps on average at 2^-10; `None`: as a trained model's.
    pub kept: Option<u32>,
    /// Share of the tokens that are ignored.
    pub ignored: f64,
    pub seed: u64,
}

impl Recipe {
    /// The name of a shape, with what is unusual.
    pub fn label(&self, name: &str) -> String {
        let kept = self.kept.map_or(String::new(), |kept| format!(" kept {kept}"));
        let ignored = if self.ignored > 0.0 { format!(" ignored {}", self.ignored) } else { String::new() };
        format!("{name}{kept}{ignored}")
    }
}

/// Generated inputs, with targets drawn from their softmax.
pub fn generate(machine: &Machine, shape: Shape, dtype: DType, recipe: Recipe) -> anyhow::Result<Workload> {
    let Recipe { softcap, kept, ignored, seed } = recipe;
    ensure!(shape.tokens > 0 && shape.hidden > 0 && shape.vocab > 0, "a benchmark needs sizes above 0: {shape}");
    ensure!((0.0..1.0).contains(&ignored), "the share of ignored tokens is at least 0 and below 1; this is {ignored}");
    let softcap = some(softcap)?;
    let confidence = match kept {
        None => CONFIDENCE,
        Some(kept) => confidence_keeping(kept.into(), 2.0_f64.powi(-10), shape, softcap, seed)
            .with_context(|| format!("the generator cannot make rows that keep {kept} entries of {shape}"))?,
    };
    let workload = Workload::without_targets(shape, dtype, softcap, seed, confidence).ignoring(ignored);
    let found = machine.survey(&workload, Some(seed))?;
    Ok(workload.surveyed(found))
}

fn some(softcap: f32) -> anyhow::Result<Option<f32>> {
    ensure!(softcap >= 0.0 && softcap.is_finite(), "a softcap is a positive number, or 0 for none; this is {softcap}");
    Ok((softcap > 0.0).then_some(softcap))
}

/// Tensors of a trained model; some tokens may have no target.
pub fn from_file(machine: &Machine, path: &Path, softcap: f32) -> anyhow::Result<Workload> {
    let mut file = TensorFile::open(path)?;
    let (embeddings, classifier) = (file.require("embeddings")?, file.require("classifier")?);
    let targets = file.require("targets")?.to_indices()?;
    let [tokens, hidden] = embeddings.matrix("embeddings")?;
    let [vocab, _] = classifier.matrix("classifier")?;
    let inputs: Inputs<'_> = Inputs::new(
        Matrix::new(embeddings.slice(), tokens, hidden),
        Matrix::new(classifier.slice(), vocab, hidden),
        &targets,
    );
    Problem::new(&inputs, &CceOptions::default())?;
    let has_rows = targets.iter().any(|&target| target != IGNORED);
    ensure!(has_rows && vocab > 0 && hidden > 0, "a benchmark needs tokens with targets, classes and columns");
    let shape = Shape { tokens, hidden, vocab };
    let (embeddings, classifier) = (embeddings.into_buffer("embeddings")?, classifier.into_buffer("classifier")?);
    let mut workload = Workload::from_parts(shape, embeddings, classifier, targets);
    workload.softcap = some(softcap)?;
    let found = machine.survey(&workload, None)?;
    Ok(workload.surveyed(found))
}
