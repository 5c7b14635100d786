//! Values of command line options that several subcommands share.

use crate::common::shapes;
use anyhow::Context;
use clap::{Args, ValueEnum};
use cut_cross_entropy::plan::KernelChoice;
use cut_cross_entropy::{Backend, Cpu, DType, GradientDType, GradientFilter, Host, Problem, Reduction, Shape};

/// One shape.
#[derive(Args)]
pub struct ShapeArgs {
    /// A named model shape (`cce info` lists them); by default gemma2_2b.
    #[arg(long)]
    pub shape: Option<String>,
    /// Tokens N, in place of the shape's.
    #[arg(long)]
    pub tokens: Option<usize>,
    /// Vocabulary V, in place of the shape's.
    #[arg(long)]
    pub vocab: Option<usize>,
    /// Hidden size D, in place of the shape's.
    #[arg(long)]
    pub hidden: Option<usize>,
}

impl ShapeArgs {
    /// The name of the shape that sizes are taken from.
    pub fn name(&self) -> &str {
        self.shape.as_deref().unwrap_or("gemma2_2b")
    }

    /// The sizes of the named shape, with others in their place.
    pub fn sizes(&self) -> anyhow::Result<Shape> {
        let name = self.name();
        let named = shapes::find(name).with_context(|| format!("no shape is named `{name}`; `cce info` lists them"))?;
        Ok(Shape {
            tokens: self.tokens.unwrap_or(named.shape.tokens),
            hidden: self.hidden.unwrap_or(named.shape.hidden),
            vocab: self.vocab.unwrap_or(named.shape.vocab),
        })
    }

    /// Whether a size was given in place of the named shape's.
    pub fn is_custom(&self) -> bool {
        self.tokens.or(self.vocab).or(self.hidden).is_some()
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// The fastest that this build and this machine have.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl BackendArg {
    /// The backend, or why there is none.
    pub fn open(self, kernels: KernelChoice) -> anyhow::Result<AnyBackend> {
        match self {
            BackendArg::Cpu => Ok(AnyBackend::Cpu(Cpu)),
            BackendArg::Cuda => AnyBackend::cuda(kernels),
            BackendArg::Auto => AnyBackend::cuda(kernels).or(Ok(AnyBackend::Cpu(Cpu))),
        }
    }
}

/// A backend for host tensors.
pub enum AnyBackend {
    /// The processor.
    Cpu(Cpu),
    /// The first GPU.
    #[cfg(feature = "cuda")]
    Cuda(cut_cross_entropy::CudaStaged),
}

impl AnyBackend {
    /// The first GPU, or why there is none.
    #[cfg(feature = "cuda")]
    pub fn cuda(kernels: KernelChoice) -> anyhow::Result<Self> {
        Ok(AnyBackend::Cuda(cut_cross_entropy::CudaStaged::new(0)?.with_kernels(kernels)))
    }
    /// The first GPU, or why there is none.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(_kernels: KernelChoice) -> anyhow::Result<Self> {
        anyhow::bail!("this build has no CUDA backend: rebuild with `--features cli,cuda`, or use --backend cpu")
    }

    /// What computes.
    pub fn host(&self) -> &dyn Backend<Memory = Host> {
        match self {
            AnyBackend::Cpu(cpu) => cpu,
            #[cfg(feature = "cuda")]
            AnyBackend::Cuda(cuda) => cuda,
        }
    }

    /// Workspace by the backend's plan; for a GPU that on the device.
    pub fn planned_workspace_bytes(&self, problem: &Problem<'_>) -> anyhow::Result<usize> {
        match self {
            AnyBackend::Cpu(cpu) => Ok(cpu.plan(problem).workspace_bytes()),
            #[cfg(feature = "cuda")]
            AnyBackend::Cuda(cuda) => Ok(cuda.plan(problem)?.workspace.peak_bytes()),
        }
    }
}

/// How per-token losses become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReductionArg {
    /// They do not: gradients are those of `Σ d_losses_i · losses_i`.
    None,
    /// Weighted mean over tokens that are not ignored.
    Mean,
    /// Sum.
    Sum,
}

impl From<ReductionArg> for Reduction {
    fn from(arg: ReductionArg) -> Reduction {
        match arg {
            ReductionArg::None => Reduction::None,
            ReductionArg::Mean => Reduction::Mean,
            ReductionArg::Sum => Reduction::Sum,
        }
    }
}

/// Element type of gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GradientDTypeArg {
    /// That of the tensor which the gradient belongs to.
    Input,
    /// f32.
    F32,
}

impl From<GradientDTypeArg> for GradientDType {
    fn from(arg: GradientDTypeArg) -> GradientDType {
        match arg {
            GradientDTypeArg::Input => GradientDType::Input,
            GradientDTypeArg::F32 => GradientDType::F32,
        }
    }
}

/// Element type of embeddings and classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl From<DTypeArg> for DType {
    fn from(arg: DTypeArg) -> DType {
        match arg {
            DTypeArg::F32 => DType::F32,
            DTypeArg::F16 => DType::F16,
            DTypeArg::Bf16 => DType::BF16,
        }
    }
}

/// Which entries of the softmax take part in the gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FilterArg {
    /// All of them.
    Exact,
    /// Small probabilities are rounded at random to 0 or eps; right in expectation.
    Unbiased,
    /// Probabilities below eps are dropped; biased, for comparison.
    Threshold,
}

impl FilterArg {
    /// The library's filter.
    pub fn filter(self, eps: f32, seed: u64) -> GradientFilter {
        match self {
            FilterArg::Exact => GradientFilter::Exact,
            FilterArg::Unbiased => GradientFilter::Unbiased { eps, seed },
            FilterArg::Threshold => GradientFilter::Threshold { eps },
        }
    }
}

/// A number, also as a power of two: `0.001` or `2^-10`.
pub fn parse_eps(text: &str) -> Result<f32, String> {
    let number = |text: &str| text.parse::<f32>().map_err(|_| format!("`{text}` is not a number"));
    match text.split_once('^') {
        Some((base, exponent)) => Ok(number(base)?.powf(number(exponent)?)),
        None => number(text),
    }
}
