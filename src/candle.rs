//! The loss as a differentiable candle operation.
//!
//! [`linear_cross_entropy`] stands where a candle model has `classifier.forward(x)` and `loss::cross_entropy`: it takes
//! the hidden states and the classifier matrix, and `backward()` of its result reaches both, the N×V logits never being
//! a tensor. [`linear_nll_and_lse`] returns what a loss of your own is made of.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use cut_cross_entropy::{CceOptions, GradientFilter, candle::linear_cross_entropy};
//!
//! let (batch, seq, hidden, vocab) = (2, 8, 16, 1000);
//! let embeddings = Var::randn(0_f32, 1.0, (batch, seq, hidden), &Device::Cpu)?; // what your model computed
//! let classifier = Var::randn(0_f32, 0.2, (vocab, hidden), &Device::Cpu)?;
//! let tokens = Tensor::arange(0_u32, (batch * seq) as u32, &Device::Cpu)?.reshape((batch, seq))?;
//!
//! for step in 0..3 {
//!     let filter = GradientFilter::Unbiased { eps: GradientFilter::DEFAULT_EPS, seed: step }; // another one each step
//!     let options = CceOptions { shift: 1, filter, ..CceOptions::default() }; // each position predicts the next token
//!     let loss = linear_cross_entropy(&embeddings, &classifier, &tokens, None, &options)?;
//!     let gradients = loss.backward()?;
//!     assert_eq!(gradients.get(&classifier).unwrap().dims(), [vocab, hidden]);
//!     println!("loss {}", loss.to_scalar::<f32>()?);
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Tensors
//! | argument | shape | dtype |
//! |---|---|---|
//! | `embeddings` | [N, D] or [B, S, D] | `f32`, `f16`, `bf16` |
//! | `classifier` | [V, D] | the same |
//! | `targets` | `[N]` or `[B, S]`, as the embeddings | `i64`, `u32`, `i32` |
//! | `bias` | `[V]` | `f32`, `f16`, `bf16` |
//!
//! Outputs are `f32`; gradients have the dtype of their tensor, accumulated in `f32` and rounded once. Tensors are read
//! in place where the elements of a row are contiguous, whatever the distance of the rows, and copied otherwise.
//! With [B, S, D], `options.shift` stays inside each of the B sequences.
//!
//! # On a GPU
//! With the feature `candle-cuda` all tensors may be on one CUDA device. Kernels run on candle's stream, in order with
//! candle's own; inputs and gradients are candle's memory, and nothing waits for the device. Targets are not looked at by
//! the host: one that is no class makes its token's loss NaN, and with it the reduced loss.
//!
//! # What it shares with candle's autodiff, and what not
//! - A gradient is computed for exactly those arguments that candle tracks ([`Tensor::track_op`]), so `options.gradients`
//!   has no say, nor have `entropy` and `metrics`; to freeze an argument, pass `detach()` of it. With nothing tracked nothing is captured.
//! - `backward()` may be called more than once; the captured entries live as long as the result.
//! - The backward reads the tensors again: update variables after it, not between the two.
//! - Gradients are not differentiable in turn.
//! - Class and token weights: take [`Reduction::None`] and multiply.

use crate::{
    CceOptions, Cpu, Forward, GradientDType, GradientRequest, HostBuffer, HostSlice, Inputs, Matrix, Reduction,
    Upstream, cce_backward, cce_forward,
};
#[cfg(feature = "candle-cuda")]
mod cuda;

#[cfg(feature = "candle-cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Storage, Tensor, bail};
use std::sync::OnceLock;

/// Cross-entropy of `embeddings · classifierᵀ + bias` against `targets`, reduced as `options` say: a scalar, or with
/// [`Reduction::None`] one loss a token in the shape of `targets`.
///
/// Shapes, dtypes and gradients: see the [module](self).
///
/// # Errors
/// What [`Problem::new`](crate::Problem::new) finds, in its words; a tensor of another rank; tensors on several devices, or
/// on one that this build has no kernels for.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use cut_cross_entropy::{CceOptions, candle::linear_cross_entropy};
/// let embeddings = Tensor::new(&[[1_f32, 0.0]], &Device::Cpu)?;
/// let classifier = Tensor::new(&[[2_f32, 0.0], [0.0, 5.0]], &Device::Cpu)?;
/// let targets = Tensor::new(&[0_i64], &Device::Cpu)?;
/// let loss = linear_cross_entropy(&embeddings, &classifier, &targets, None, &CceOptions::default())?;
/// assert!((loss.to_scalar::<f32>()? - (1.0 + (-2.0_f32).exp()).ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_cross_entropy(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    bias: Option<&Tensor>,
    options: &CceOptions,
) -> Result<Tensor> {
    let output = if options.reduction == Reduction::None { Output::Losses } else { Output::Loss };
    apply(embeddings, classifier, targets, bias, options, output)
}

/// Negative log-likelihood and log-sum-exp of each token, both differentiable, each in the shape of `targets`.
///
/// For losses that [`CceOptions`] cannot say. `options.reduction`, `label_smoothing` and `z_loss` have no effect;
/// ignored tokens are 0 in both. Shapes, dtypes and gradients: see the [module](self).
///
/// # Errors
/// Those of [`linear_cross_entropy`].
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use cut_cross_entropy::{CceOptions, candle::linear_nll_and_lse};
/// let embeddings = Var::randn(0_f32, 1.0, (4, 8), &Device::Cpu)?;
/// let classifier = Var::randn(0_f32, 1.0, (100, 8), &Device::Cpu)?;
/// let targets = Tensor::new(&[3_u32, 99, 0, 7], &Device::Cpu)?;
/// let (nll, lse) = linear_nll_and_lse(&embeddings, &classifier, &targets, None, &CceOptions::default())?;
/// let focal = ((1.0 - nll.neg()?.exp()?)?.sqr()? * &nll)?.mean_all()?; // (1 - p)² weighs hard tokens up
/// let gradients = (focal + (lse.sqr()?.mean_all()? * 1e-4)?)?.backward()?;
/// # assert!(gradients.get(&embeddings).is_some() && gradients.get(&classifier).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_nll_and_lse(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    bias: Option<&Tensor>,
    options: &CceOptions,
) -> Result<(Tensor, Tensor)> {
    let stacked = apply(embeddings, classifier, targets, bias, options, Output::NllAndLse)?;
    Ok((stacked.get(0)?, stacked.get(1)?))
}

/// What the operation returns.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Output {
    /// The reduced loss, a scalar.
    Loss,
    /// Each token's loss, shaped as the tokens.
    Losses,
    /// nll and lse, stacked along a new first dimension: candle operations have one result.
    NllAndLse,
}

/// One call of the operation, shared between its forward and its backward.
struct LinearCrossEntropy {
    targets: Tensor, // [N], contiguous
    options: CceOptions,
    seq_len: Option<usize>,
    output: Output,
    output_shape: Shape,
    /// What the forward left for the backward.
    forward: OnceLock<Saved>,
}

/// A forward, by where it ran.
enum Saved {
    Cpu(Box<Forward>),
    #[cfg(feature = "candle-cuda")]
    Cuda(Box<Forward<crate::cuda::DeviceMemory>>),
}

fn apply(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    bias: Option<&Tensor>,
    options: &CceOptions,
    output: Output,
) -> Result<Tensor> {
    for (name, tensor) in [("embeddings", Some(embeddings)), ("classifier", Some(classifier)), ("bias", bias)]
        .into_iter()
        .chain([("targets", Some(targets))])
    {
        let Some(tensor) = tensor else { continue };
        let device = tensor.device();
        if !(device.is_cpu() || device.is_cuda() && cfg!(feature = "candle-cuda")) {
            bail!("{name} is on {device:?}; this build computes on the CPU only (feature `candle-cuda`: CUDA devices)");
        }
        if !device.same_device(embeddings.device()) {
            bail!("{name} is on {device:?} and embeddings is on {:?}", embeddings.device());
        }
    }
    let seq_len = match *embeddings.dims() {
        [_, _] => None,
        [_, seq_len, _] => Some(seq_len).filter(|&s| s > 0), // without tokens there is nothing to shift
        _ => bail!("embeddings is {:?}; expected [N, D] or [B, S, D]", embeddings.dims()),
    };
    let (tokens, hidden) = embeddings.dims().split_at(embeddings.rank() - 1);
    if classifier.rank() != 2 {
        bail!("classifier is {:?}; expected [V, D]", classifier.dims());
    }
    if targets.dims() != tokens {
        bail!("targets is {:?} and embeddings is {:?}; expected targets {tokens:?}", targets.dims(), embeddings.dims());
    }
    if let Some(bias) = bias.filter(|b| b.rank() != 1) {
        bail!("bias is {:?}; expected [V]", bias.dims());
    }

    let tracked = [Some(embeddings), Some(classifier), bias].map(|t| t.is_some_and(Tensor::track_op));
    let gradients = GradientRequest {
        embeddings: tracked[0],
        classifier: tracked[1],
        bias: tracked[2],
        dtype: GradientDType::Input,
    };
    let capture = options.capture && tracked.contains(&true);
    let output_shape = match output {
        Output::Loss => Shape::from(()),
        Output::Losses => Shape::from(tokens),
        Output::NllAndLse => Shape::from([&[2], tokens].concat()),
    };
    let op = LinearCrossEntropy {
        targets: targets.flatten_all()?.contiguous()?,
        options: CceOptions { gradients, capture, entropy: false, metrics: false, ..*options },
        seq_len,
        output,
        output_shape,
        forward: OnceLock::new(),
    };
    let embeddings = rows_contiguous(&embeddings.reshape((tokens.iter().product::<usize>(), hidden[0]))?)?;
    let classifier = rows_contiguous(classifier)?;
    match bias {
        None => embeddings.apply_op2(&classifier, op),
        Some(bias) => embeddings.apply_op3(&classifier, &bias.contiguous()?, op),
    }
}

/// The matrix itself where the backend can read it, else a contiguous copy, which candle differentiates through.
fn rows_contiguous(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    let stride = matrix.stride();
    let readable = (columns <= 1 || stride[1] == 1) && (rows <= 1 || stride[0] >= columns);
    if readable { Ok(matrix.clone()) } else { matrix.contiguous() }
}

/// A tensor's elements and how they lie, as candle hands them to an operation.
type Operand<'a> = (&'a CpuStorage, &'a Layout);
type OptionalGradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl LinearCrossEntropy {
    fn with_inputs<T>(
        &self,
        embeddings: Operand<'_>,
        classifier: Operand<'_>,
        bias: Option<Operand<'_>>,
        f: impl FnOnce(&Inputs<'_>) -> crate::Result<T>,
    ) -> Result<T> {
        let (targets, targets_layout) = self.targets.storage_and_layout();
        let mut inputs = Inputs::new(
            matrix("embeddings", embeddings)?,
            matrix("classifier", classifier)?,
            vector("targets", (cpu_storage(&targets)?, targets_layout))?,
        );
        inputs.bias = bias.map(|bias| vector("bias", bias)).transpose()?;
        inputs.seq_len = self.seq_len;
        f(&inputs).map_err(Error::wrap)
    }

    fn forward(&self, e: Operand<'_>, c: Operand<'_>, bias: Option<Operand<'_>>) -> Result<(CpuStorage, Shape)> {
        let mut forward = self.with_inputs(e, c, bias, |inputs| cce_forward(&Cpu, inputs, &self.options))?;
        let output = match self.output {
            Output::Loss => vec![forward.loss],
            Output::Losses => std::mem::take(&mut forward.losses), // the backward reads no output
            Output::NllAndLse => [&forward.nll[..], &forward.lse].concat(),
        };
        self.forward.set(Saved::Cpu(Box::new(forward))).map_err(|_| Error::msg("this operation has already run"))?;
        Ok((CpuStorage::F32(output), self.output_shape.clone()))
    }

    fn backward(&self, e: &Tensor, c: &Tensor, bias: Option<&Tensor>, d_output: &Tensor) -> Result<OptionalGradients> {
        #[cfg(feature = "candle-cuda")]
        if e.device().is_cuda() {
            return self.cuda_backward(e, c, bias, d_output);
        }
        let forward = match self.forward.get() {
            Some(Saved::Cpu(forward)) => forward,
            _ => bail!("this operation has not run on this device"),
        };
        let d_output = d_output.flatten_all()?.to_vec1::<f32>()?;
        let upstream = match self.output {
            Output::Loss => Upstream::loss(d_output[0]),
            Output::Losses => Upstream::losses(&d_output),
            Output::NllAndLse => {
                let (nll, lse) = d_output.split_at(d_output.len() / 2);
                Upstream { nll: Some(nll.into()), lse: Some(lse.into()), ..Upstream::loss(0.0) }
            }
        };
        let ((e_storage, e_layout), (c_storage, c_layout)) = (e.storage_and_layout(), c.storage_and_layout());
        let bias_parts = bias.map(Tensor::storage_and_layout);
        let gradients = self.with_inputs(
            (cpu_storage(&e_storage)?, e_layout),
            (cpu_storage(&c_storage)?, c_layout),
            bias_parts
                .as_ref()
                .map(|(storage, layout)| Ok::<_, Error>((cpu_storage(storage)?, *layout)))
                .transpose()?,
            |inputs| cce_backward(&Cpu, inputs, forward, &upstream),
        )?;
        let tensor = |gradient: Option<HostBuffer>, like: Option<&Tensor>| {
            gradient.zip(like).map(|(gradient, like)| to_tensor(gradient, like)).transpose()
        };
        Ok((
            tensor(gradients.d_embeddings, Some(e))?,
            tensor(gradients.d_classifier, Some(c))?,
            tensor(gradients.d_bias, bias)?,
        ))
    }
}

impl CustomOp2 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }
    fn cpu_fwd(&self, e: &CpuStorage, el: &Layout, c: &CpuStorage, cl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((e, el), (c, cl), None)
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, e: &CudaStorage, el: &Layout, c: &CudaStorage, cl: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda_forward((e, el), (c, cl), None)
    }
    fn bwd(
        &self,
        e: &Tensor,
        c: &Tensor,
        _output: &Tensor,
        d_output: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_embeddings, d_classifier, _) = self.backward(e, c, None, d_output)?;
        Ok((d_embeddings, d_classifier))
    }
}

impl CustomOp3 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }
    fn cpu_fwd(
        &self,
        e: &CpuStorage,
        el: &Layout,
        c: &CpuStorage,
        cl: &Layout,
        bias: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((e, el), (c, cl), Some((bias, bl)))
    }
    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        e: &CudaStorage,
        el: &Layout,
        c: &CudaStorage,
        cl: &Layout,
        bias: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda_forward((e, el), (c, cl), Some((bias, bl)))
    }
    fn bwd(
        &self,
        e: &Tensor,
        c: &Tensor,
        bias: &Tensor,
        _output: &Tensor,
        d_output: &Tensor,
    ) -> Result<OptionalGradients> {
        self.backward(e, c, Some(bias), d_output)
    }
}

fn cpu_storage(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("a tensor of this operation is not on the CPU, as the others are"),
    }
}

/// The elements from the tensor's first to the end of its storage.
fn elements<'a>(name: &str, (storage, layout): Operand<'a>) -> Result<HostSlice<'a>> {
    let start = layout.start_offset();
    Ok(match storage {
        CpuStorage::F32(v) => HostSlice::F32(&v[start..]),
        CpuStorage::F16(v) => HostSlice::F16(&v[start..]),
        CpuStorage::BF16(v) => HostSlice::BF16(&v[start..]),
        CpuStorage::I64(v) => HostSlice::I64(&v[start..]),
        CpuStorage::I32(v) => HostSlice::I32(&v[start..]),
        CpuStorage::U32(v) => HostSlice::U32(&v[start..]),
        _ => return unexpected_dtype(name, storage),
    })
}

fn unexpected_dtype<T>(name: &str, storage: &impl BackendStorage) -> Result<T> {
    let expected = if name == "targets" { "i64, i32 or u32" } else { "f32, f16 or bf16" };
    bail!("{name} has dtype {}; expected {expected}", storage.dtype().as_str())
}

/// Elements from a row of a matrix to the next.
fn row_stride(layout: &Layout) -> usize {
    let (rows, columns) = (layout.dims()[0], layout.dims()[1]);
    if rows > 1 { layout.stride()[0] } else { columns }
}

fn matrix<'a>(name: &str, operand: Operand<'a>) -> Result<Matrix<'a>> {
    let (rows, columns) = operand.1.shape().dims2()?;
    Ok(Matrix::new(elements(name, operand)?, rows, columns).with_row_stride(row_stride(operand.1)))
}

fn vector<'a>(name: &str, operand: Operand<'a>) -> Result<HostSlice<'a>> {
    let len = operand.1.shape().elem_count();
    Ok(match elements(name, operand)? {
        HostSlice::F32(v) => HostSlice::F32(&v[..len]),
        HostSlice::F16(v) => HostSlice::F16(&v[..len]),
        HostSlice::BF16(v) => HostSlice::BF16(&v[..len]),
        HostSlice::I64(v) => HostSlice::I64(&v[..len]),
        HostSlice::I32(v) => HostSlice::I32(&v[..len]),
        HostSlice::U32(v) => HostSlice::U32(&v[..len]),
    })
}

/// The gradient as a tensor of the shape of `like`, without a copy.
fn to_tensor(gradient: HostBuffer, like: &Tensor) -> Result<Tensor> {
    match gradient {
        HostBuffer::F32(v) => Tensor::from_vec(v, like.shape(), like.device()),
        HostBuffer::F16(v) => Tensor::from_vec(v, like.shape(), like.device()),
        HostBuffer::BF16(v) => Tensor::from_vec(v, like.shape(), like.device()),
    }
}
