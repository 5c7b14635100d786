//! Where the inputs come from: the generator, or a file.

use super::machine::Machine;
use crate::args::{BackendArg, DTypeArg, ShapeArgs};
use crate::common::workload::{CONFIDENCE, Workload, confidence_keeping};
use crate::tensors::{self, Output, TensorFile};
use anyhow::{Context, ensure};
use clap::Args;
use cut_cross_entropy::{CceOptions, DType, HostBuffer, Inputs, Matrix, Problem, Shape};
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
        let workload = generate(&machine, shape, self.dtype.into(), self.softcap, self.seed, self.kept)?;
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

/// Generated inputs, with targets drawn from their softmax, of which a row keeps `kept` entries on average at 2^-10.
pub fn generate(
    machine: &Machine,
    shape: Shape,
    dtype: DType,
    softcap: f32,
    seed: u64,
    kept: Option<u32>,
) -> anyhow::Result<Workload> {
    ensure!(shape.tokens > 0 && shape.hidden > 0 && shape.vocab > 0, "a benchmark needs sizes above 0: {shape}");
    let softcap = some(softcap)?;
    let confidence = match kept {
        None => CONFIDENCE,
        Some(kept) => confidence_keeping(kept.into(), 2.0_f64.powi(-10), shape, softcap, seed)
            .with_context(|| format!("the generator cannot make rows that keep {kept} entries of {shape}"))?,
    };
    let workload = Workload::without_targets(shape, dtype, softcap, seed, confidence);
    let found = machine.survey(&workload, Some(seed))?;
    Ok(workload.surveyed(found))
}

fn some(softcap: f32) -> anyhow::Result<Option<f32>> {
    ensure!(softcap >= 0.0 && softcap.is_finite(), "a softcap is a positive number, or 0 for none; this is {softcap}");
    Ok((softcap > 0.0).then_some(softcap))
}

/// Tensors of a trained model, without the tokens that have no target.
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
    let kept: Vec<usize> = (0..tokens).filter(|&i| targets[i] >= 0).collect();
    ensure!(!kept.is_empty() && vocab > 0 && hidden > 0, "a benchmark needs tokens with targets, classes and columns");
    let embeddings = rows(embeddings.into_buffer("embeddings")?, hidden, &kept);
    let targets = kept.iter().map(|&i| targets[i]).collect();
    let shape = Shape { tokens: kept.len(), hidden, vocab };
    let mut workload = Workload::from_parts(shape, embeddings, classifier.into_buffer("classifier")?, targets);
    workload.softcap = some(softcap)?;
    let found = machine.survey(&workload, None)?;
    Ok(workload.surveyed(found))
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
