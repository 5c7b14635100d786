//! The processor or a GPU, as far as a benchmark tells them apart.

use super::cpu::CpuRunner;
#[cfg(feature = "cublas")]
use super::cuda::{self, CudaRunner, Device};
use super::methods::Runner;
use crate::args::{BackendArg, DTypeArg};
use crate::common::survey::{Survey, host_products, survey};
use crate::common::workload::Workload;
use crate::system_memory;
use anyhow::ensure;
use cut_cross_entropy::cpu::multiplies_bf16;
#[cfg(feature = "cublas")]
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{DType, Shape};

/// What is measured.
pub enum Machine {
    Cpu,
    #[cfg(feature = "cublas")]
    Cuda(Box<Device>),
}

impl Machine {
    /// Opens it; `auto` is the processor, as its times are compared most.
    pub fn open(backend: BackendArg) -> anyhow::Result<Self> {
        match backend {
            BackendArg::Cpu | BackendArg::Auto => Ok(Machine::Cpu),
            BackendArg::Cuda => Machine::open_cuda(),
        }
    }

    #[cfg(feature = "cublas")]
    fn open_cuda() -> anyhow::Result<Self> {
        Ok(Machine::Cuda(Box::new(Device::open()?)))
    }

    #[cfg(not(feature = "cublas"))]
    fn open_cuda() -> anyhow::Result<Self> {
        anyhow::bail!("this build cannot measure a GPU: rebuild with `--features cli,cublas`")
    }

    /// The backend for host tensors that computes there.
    pub fn backend(&self) -> BackendArg {
        match self {
            Machine::Cpu => BackendArg::Cpu,
            #[cfg(feature = "cublas")]
            Machine::Cuda(_) => BackendArg::Cuda,
        }
    }

    /// One line for people.
    pub fn describe(&self) -> anyhow::Result<String> {
        match self {
            Machine::Cpu => {
                let bf16 = if multiplies_bf16() { "multiplied as it is" } else { "widened to f32" };
                Ok(format!("{} threads; bf16 is {bf16}", rayon::current_num_threads()))
            }
            #[cfg(feature = "cublas")]
            Machine::Cuda(device) => device.describe(),
        }
    }

    /// For the record.
    pub fn name(&self) -> String {
        match self {
            Machine::Cpu => "cpu".into(),
            #[cfg(feature = "cublas")]
            Machine::Cuda(device) => device.name(),
        }
    }

    /// Driver and clocks right now, for the record.
    pub fn state(&self) -> String {
        match self {
            Machine::Cpu => String::new(),
            #[cfg(feature = "cublas")]
            Machine::Cuda(device) if device.is_emulated() => "emulated".into(),
            #[cfg(feature = "cublas")]
            Machine::Cuda(_) => cuda::state().unwrap_or_default(),
        }
    }

    /// Those asked for, or the ones that figures are drawn for.
    pub fn shapes(&self, asked: &[String]) -> Vec<String> {
        let default: &[&str] = match self {
            _ if !asked.is_empty() => return asked.to_vec(),
            Machine::Cpu => &["figure_64k", "figure_qwen"],
            #[cfg(feature = "cublas")]
            Machine::Cuda(_) => &["gemma2_2b", "llama3_8b", "qwen2_5_0_5b", "qwen2_5_7b"],
        };
        default.iter().map(|name| name.to_string()).collect()
    }

    /// Those asked for, or the usual ones.
    pub fn dtypes(&self, asked: &[DTypeArg]) -> Vec<DType> {
        match self {
            _ if !asked.is_empty() => asked.iter().map(|&dtype| dtype.into()).collect(),
            Machine::Cpu => vec![DType::F32, DType::BF16],
            #[cfg(feature = "cublas")]
            Machine::Cuda(_) => vec![DType::BF16],
        }
    }

    /// The shape with as many tokens as there is memory for; an error where there is too little.
    pub fn fitted(&self, asked: Shape, dtype: DType) -> anyhow::Result<Shape> {
        match self {
            Machine::Cpu => fitted(asked, dtype),
            #[cfg(feature = "cublas")]
            Machine::Cuda(device) => device.check(asked, dtype).map(|()| asked),
        }
    }

    /// What the softmax looks like, and the targets: drawn from it with a seed, else those of the workload.
    pub fn survey(&self, workload: &Workload, seed: Option<u64>) -> anyhow::Result<(Survey, Vec<i64>)> {
        match self {
            Machine::Cpu => survey(workload, seed, &mut host_products(workload)),
            #[cfg(feature = "cublas")]
            Machine::Cuda(device) => {
                device.check(workload.shape, workload.embeddings.as_slice().dtype())?;
                survey(workload, seed, &mut device.products(workload)?)
            }
        }
    }

    /// With the tensors of a workload.
    pub fn runner<'a>(&'a self, workload: &'a Workload) -> anyhow::Result<Box<dyn Runner + 'a>> {
        match self {
            Machine::Cpu => Ok(Box::new(CpuRunner::new(workload)?)),
            #[cfg(feature = "cublas")]
            Machine::Cuda(device) => Ok(Box::new(CudaRunner::new(device, workload)?)),
        }
    }
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
