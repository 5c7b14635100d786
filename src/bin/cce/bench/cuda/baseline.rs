//! The materialising baseline on the device: cuBLAS to N×V f32 logits, one kernel for their log-sum-exp, one for their
//! gradient in the inputs' type, two more calls of cuBLAS. f32 logits, as 16 bits would not pass the check; the mean's factor
//! goes into the last products, so that 16-bit gradients stay in range. Buffers are allocated once.

use super::Device;
use super::blas::{Precision, View};
use crate::common::workload::Workload;
use anyhow::{Context, ensure};
use cut_cross_entropy::cuda::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cut_cross_entropy::cuda::cudarc::nvrtc::Ptx;
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{DType, Shape};
use std::sync::Arc;

// IMAGE: machine code of benches/cuda/baseline.cu, where the build had an nvcc.
include!(concat!(env!("OUT_DIR"), "/baseline.rs"));

/// Threads of a block, and its shared memory: as in `baseline.cu`.
const THREADS: u32 = 512;
const SHARED: u32 = THREADS * (4 + 8);

/// As in `baseline.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BaselineArgs {
    logits: u64,
    targets: u64,
    gradient: u64,
    nll: u64,
    lse: u64,
    loss: u64,
    tokens: u32,
    vocab: u32,
    rows: u32,
    softcap: f32,
}

// SAFETY: plain data, laid out as the kernels declare it.
unsafe impl DeviceRepr for BaselineArgs {}

/// Buffers and kernels.
pub struct Baseline {
    module: Option<Arc<CudaModule>>,
    shape: Shape,
    dtype: DType,
    /// Tokens that are not ignored.
    rows: usize,
    softcap: f32,
    /// Of f32 inputs the gradients replace the logits.
    logits: Option<CudaSlice<f32>>,
    gradients: Option<CudaSlice<u16>>,
    nll: CudaSlice<f32>,
    lse: CudaSlice<f32>,
    loss: CudaSlice<f32>,
}

/// Addresses that a step works on.
#[derive(Clone, Copy)]
pub struct Tensors {
    pub embeddings: u64,
    pub classifier: u64,
    pub targets: u64,
    pub d_embeddings: u64,
    pub d_classifier: u64,
}

impl Baseline {
    /// Bytes that it needs beyond inputs and outputs.
    pub fn bytes(shape: Shape, dtype: DType) -> usize {
        let plane = shape.tokens * shape.vocab;
        plane * 4 + if dtype == DType::F32 { 0 } else { plane * 2 } + 8 * shape.tokens
    }

    /// Without its large buffers, which come with the first step that needs them.
    pub fn new(device: &Device, workload: &Workload) -> anyhow::Result<Self> {
        let (shape, dtype) = (workload.shape, workload.embeddings.as_slice().dtype());
        let stream = device.stream();
        let load = |image: &[u8]| stream.context().load_module(Ptx::from_binary(image.to_vec()));
        Ok(Baseline {
            module: IMAGE.map(load).transpose().context("the baseline's kernels")?,
            shape,
            dtype,
            rows: workload.rows(),
            softcap: workload.softcap.unwrap_or(0.0),
            logits: None,
            gradients: None,
            nll: stream.alloc_zeros(shape.tokens)?,
            lse: stream.alloc_zeros(shape.tokens)?,
            loss: stream.alloc_zeros(1)?,
        })
    }

    /// Whether the build had a compiler for its kernels.
    pub fn has_kernels() -> bool {
        IMAGE.is_some()
    }

    /// Allocates the plane that the plain matmul writes.
    fn reserve_plane(&mut self, device: &Device) -> anyhow::Result<()> {
        let elements = self.shape.tokens * self.shape.vocab;
        if self.dtype == DType::F32 && self.logits.is_none() {
            self.logits = Some(device.stream().alloc_zeros(elements)?);
        }
        if self.dtype != DType::F32 && self.gradients.is_none() {
            self.gradients = Some(device.stream().alloc_zeros(elements)?);
        }
        Ok(())
    }

    /// Allocates what a step needs.
    pub fn reserve(&mut self, device: &Device) -> anyhow::Result<()> {
        self.reserve_plane(device)?;
        if self.logits.is_none() {
            self.logits = Some(device.stream().alloc_zeros(self.shape.tokens * self.shape.vocab)?);
        }
        Ok(())
    }

    fn plane(&self, device: &Device) -> View {
        let address = match (&self.gradients, &self.logits) {
            (Some(slice), _) => slice.device_ptr(device.stream()).0,
            (None, Some(slice)) => slice.device_ptr(device.stream()).0,
            (None, None) => 0,
        };
        View::new(address, self.dtype, self.shape.tokens, self.shape.vocab)
    }

    /// The plain matmul: inputs and output of one type.
    pub fn matmul(&mut self, device: &Device, tensors: &Tensors, precision: Precision) -> anyhow::Result<()> {
        self.reserve_plane(device)?;
        let Shape { tokens, hidden, vocab } = self.shape;
        let e = View::new(tensors.embeddings, self.dtype, tokens, hidden);
        let c = View::new(tensors.classifier, self.dtype, vocab, hidden);
        // SAFETY: inputs of that shape live as long as the runner, and the plane was just allocated for N·V elements.
        unsafe { device.blas.multiply(1.0, e, c.transposed(), self.plane(device), precision) }
    }

    fn launch(&self, device: &Device, kernel: &str, blocks: usize, args: &BaselineArgs) -> anyhow::Result<()> {
        let module = self.module.as_ref().context("built without nvcc, so without the baseline's kernels")?;
        let function: CudaFunction = module.load_function(kernel).with_context(|| kernel.to_string())?;
        let config = LaunchConfig {
            grid_dim: (u32::try_from(blocks)?, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: SHARED,
        };
        // SAFETY: the kernels read and write what `args` points to, buffers of this runner of the sizes in `args`.
        unsafe { device.stream().launch_builder(&function).arg(args).launch(config) }.context("launch")?;
        Ok(())
    }

    fn args(&self, device: &Device, tensors: &Tensors) -> anyhow::Result<BaselineArgs> {
        let stream = device.stream();
        let logits = self.logits.as_ref().context("the baseline's logits")?.device_ptr(stream).0;
        Ok(BaselineArgs {
            logits,
            targets: tensors.targets,
            gradient: self.plane(device).address,
            nll: self.nll.device_ptr(stream).0,
            lse: self.lse.device_ptr(stream).0,
            loss: self.loss.device_ptr(stream).0,
            tokens: u32::try_from(self.shape.tokens)?,
            vocab: u32::try_from(self.shape.vocab)?,
            rows: u32::try_from(self.rows)?,
            softcap: self.softcap,
        })
    }

    /// Logits, log-sum-exp and loss.
    pub fn forward(&mut self, device: &Device, tensors: &Tensors) -> anyhow::Result<()> {
        ensure!(self.logits.is_some(), "the baseline's buffers are reserved before it is timed");
        let Shape { tokens, hidden, vocab } = self.shape;
        let args = self.args(device, tensors)?;
        let e = View::new(tensors.embeddings, self.dtype, tokens, hidden);
        let c = View::new(tensors.classifier, self.dtype, vocab, hidden);
        let logits = View::new(args.logits, DType::F32, tokens, vocab);
        // SAFETY: inputs of that shape live as long as the runner; the logits are N·V elements.
        unsafe { device.blas.multiply(1.0, e, c.transposed(), logits, Precision::Full) }?;
        self.launch(device, "baseline_log_sum_exp", tokens, &args)?;
        self.launch(device, "baseline_mean", 1, &args)
    }

    /// Both gradients; to be called once after each forward.
    pub fn backward(&mut self, device: &Device, tensors: &Tensors) -> anyhow::Result<()> {
        let Shape { tokens, hidden, vocab } = self.shape;
        let args = self.args(device, tensors)?;
        self.launch(device, &format!("baseline_gradient_{}", self.dtype), tokens, &args)?;
        let matrix = |address, rows| View::new(address, self.dtype, rows, hidden);
        let gradient = View::new(args.gradient, self.dtype, tokens, vocab);
        let weight = 1.0 / self.rows.max(1) as f32;
        let (e, c) = (matrix(tensors.embeddings, tokens), matrix(tensors.classifier, vocab));
        // SAFETY: inputs and outputs of these shapes live as long as the runner, as does the plane of N·V elements.
        unsafe {
            device.blas.multiply(weight, gradient, c, matrix(tensors.d_embeddings, tokens), Precision::Full)?;
            device.blas.multiply(weight, gradient.transposed(), e, matrix(tensors.d_classifier, vocab), Precision::Full)
        }
    }

    /// Loss, nll and lse of the last forward.
    pub fn results(&self, device: &Device) -> anyhow::Result<(f32, Vec<f32>, Vec<f32>)> {
        let stream = device.stream();
        let loss = stream.clone_dtoh(&self.loss)?;
        let (nll, lse) = (stream.clone_dtoh(&self.nll)?, stream.clone_dtoh(&self.lse)?);
        stream.synchronize()?;
        Ok((loss[0], nll, lse))
    }
}
