//! Tensors on a CUDA device: candle's memory on candle's stream. Only nll and lse are copied, 2 N numbers, and nothing waits.

use super::{LinearCrossEntropy, OptionalGradients, Output, Saved};
use crate::cuda::cudarc::driver::{CudaSlice, CudaView, DriverError};
use crate::cuda::{DeviceBuffer, DeviceMemory, DeviceSlice};
use crate::{Backend, Cuda, DType, Inputs, Matrix, Upstream, cce_backward, cce_forward};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A tensor's elements and how they lie, as candle hands them to an operation.
pub(super) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// The backend on candle's stream of this device.
fn backend(device: &CudaDevice) -> Result<Cuda> {
    // Kernels are loaded for as long as somebody uses them: here, until the process ends, not anew at each step.
    static FIRST: Mutex<Vec<Cuda>> = Mutex::new(Vec::new());
    let cuda = Cuda::with_stream(device.cuda_stream()).map_err(Error::wrap)?;
    let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    if !first.iter().any(|other| other.stream().context() == cuda.stream().context()) {
        first.push(cuda.clone());
    }
    Ok(cuda)
}

/// A part of a storage.
enum View<'a> {
    F32(CudaView<'a, f32>),
    F16(CudaView<'a, f16>),
    BF16(CudaView<'a, bf16>),
    I64(CudaView<'a, i64>),
    I32(CudaView<'a, i32>),
    U32(CudaView<'a, u32>),
}

impl<'a> View<'a> {
    fn new(name: &str, storage: &'a CudaStorage, range: Range<usize>) -> Result<Self> {
        Ok(match &storage.slice {
            CudaStorageSlice::F32(s) => View::F32(s.slice(range)),
            CudaStorageSlice::F16(s) => View::F16(s.slice(range)),
            CudaStorageSlice::BF16(s) => View::BF16(s.slice(range)),
            CudaStorageSlice::I64(s) => View::I64(s.slice(range)),
            CudaStorageSlice::I32(s) => View::I32(s.slice(range)),
            CudaStorageSlice::U32(s) => View::U32(s.slice(range)),
            _ => return super::unexpected_dtype(name, storage),
        })
    }

    /// All elements of a tensor that is a vector, or has only its rows apart.
    fn of(name: &str, (storage, layout): Operand<'a>) -> Result<Self> {
        let start = layout.start_offset();
        let elements = match *layout.dims() {
            [rows, columns] if rows > 0 => (rows - 1) * super::row_stride(layout) + columns,
            _ => layout.shape().elem_count(),
        };
        View::new(name, storage, start..start + elements)
    }

    fn slice(&self) -> DeviceSlice<'_> {
        match self {
            View::F32(v) => v.into(),
            View::F16(v) => v.into(),
            View::BF16(v) => v.into(),
            View::I64(v) => v.into(),
            View::I32(v) => v.into(),
            View::U32(v) => v.into(),
        }
    }

    fn matrix(&self, layout: &Layout) -> Result<Matrix<'_, DeviceMemory>> {
        let (rows, columns) = layout.shape().dims2()?;
        Ok(Matrix::new(self.slice(), rows, columns).with_row_stride(super::row_stride(layout)))
    }
}

fn cuda_storage(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("a tensor of this operation is not on the CUDA device of the others"),
    }
}

impl LinearCrossEntropy {
    fn with_cuda_inputs<T>(
        &self,
        embeddings: Operand<'_>,
        classifier: Operand<'_>,
        bias: Option<Operand<'_>>,
        f: impl FnOnce(&Inputs<'_, DeviceMemory>) -> Result<T>,
    ) -> Result<T> {
        let (targets, targets_layout) = self.targets.storage_and_layout();
        let targets = View::of("targets", (cuda_storage(&targets)?, targets_layout))?;
        let e = View::of("embeddings", embeddings)?;
        let c = View::of("classifier", classifier)?;
        let bias = bias.map(|bias| View::of("bias", bias)).transpose()?;
        let mut inputs = Inputs::new(e.matrix(embeddings.1)?, c.matrix(classifier.1)?, targets.slice());
        inputs.bias = bias.as_ref().map(View::slice);
        inputs.seq_len = self.seq_len;
        f(&inputs)
    }

    pub(super) fn cuda_forward(
        &self,
        e: Operand<'_>,
        c: Operand<'_>,
        bias: Option<Operand<'_>>,
    ) -> Result<(CudaStorage, Shape)> {
        let device = &e.0.device;
        let cuda = backend(device)?;
        let mut forward =
            self.with_cuda_inputs(e, c, bias, |inputs| cce_forward(&cuda, inputs, &self.options).map_err(Error::wrap))?;
        let output = match self.output {
            Output::Loss => take(&cuda, &mut forward.loss.0).map_err(Error::wrap)?,
            Output::Losses => take(&cuda, &mut forward.losses).map_err(Error::wrap)?,
            Output::NllAndLse => stacked(&cuda, &forward.nll, &forward.lse).w()?,
        };
        self.forward.set(Saved::Cuda(Box::new(forward))).map_err(|_| Error::msg("this operation has already run"))?;
        Ok((CudaStorage::wrap_cuda_slice(output, device.clone()), self.output_shape.clone()))
    }

    pub(super) fn cuda_backward(
        &self,
        e: &Tensor,
        c: &Tensor,
        bias: Option<&Tensor>,
        d_output: &Tensor,
    ) -> Result<OptionalGradients> {
        let Some(Saved::Cuda(forward)) = self.forward.get() else { bail!("this operation has not run on this device") };
        let device = e.device().as_cuda_device()?;
        let cuda = backend(device)?;
        let d_output = d_output.flatten_all()?.contiguous()?;
        let (d_storage, d_layout) = d_output.storage_and_layout();
        let (d_storage, start, n) = (cuda_storage(&d_storage)?, d_layout.start_offset(), d_output.elem_count());
        let part = |range: Range<usize>| View::new("upstream", d_storage, start + range.start..start + range.end);
        let (first, second) = match self.output {
            Output::Loss | Output::Losses => (part(0..n)?, None),
            Output::NllAndLse => (part(0..n / 2)?, Some(part(n / 2..n)?)),
        };
        let upstream: Upstream<'_, DeviceMemory> = match self.output {
            Output::Loss => Upstream { loss_scale: Some(first.slice()), ..Upstream::loss(1.0) },
            Output::Losses => Upstream::losses(first.slice()),
            Output::NllAndLse => {
                Upstream { nll: Some(first.slice()), lse: second.as_ref().map(View::slice), ..Upstream::loss(0.0) }
            }
        };
        let ((e_storage, e_layout), (c_storage, c_layout)) = (e.storage_and_layout(), c.storage_and_layout());
        let bias_parts = bias.map(Tensor::storage_and_layout);
        let gradients = self.with_cuda_inputs(
            (cuda_storage(&e_storage)?, e_layout),
            (cuda_storage(&c_storage)?, c_layout),
            bias_parts
                .as_ref()
                .map(|(storage, layout)| Ok::<_, Error>((cuda_storage(storage)?, *layout)))
                .transpose()?,
            |inputs| cce_backward(&cuda, inputs, forward, &upstream).map_err(Error::wrap),
        )?;
        let tensor = |gradient: Option<DeviceBuffer>, like: Option<&Tensor>| {
            gradient.zip(like).map(|(gradient, like)| to_tensor(gradient, like, device))
        };
        Ok((
            tensor(gradients.d_embeddings, Some(e)),
            tensor(gradients.d_classifier, Some(c)),
            tensor(gradients.d_bias, bias),
        ))
    }
}

/// Takes an output away from a forward: its backward reads none of them.
fn take(cuda: &Cuda, output: &mut CudaSlice<f32>) -> crate::Result<CudaSlice<f32>> {
    let DeviceBuffer::F32(nothing) = cuda.allocate("nothing", DType::F32, 0)? else { unreachable!("it is f32") };
    Ok(std::mem::replace(output, nothing))
}

/// One after the other, copied: candle operations have one result, and these are two allocations.
fn stacked(cuda: &Cuda, a: &CudaSlice<f32>, b: &CudaSlice<f32>) -> std::result::Result<CudaSlice<f32>, DriverError> {
    let n = a.len();
    let mut both = cuda.stream().alloc_zeros(2 * n)?;
    cuda.stream().memcpy_dtod(a, &mut both.slice_mut(..n))?;
    cuda.stream().memcpy_dtod(b, &mut both.slice_mut(n..))?;
    Ok(both)
}

/// The gradient as a tensor of the shape of `like`, without a copy.
fn to_tensor(gradient: DeviceBuffer, like: &Tensor, device: &CudaDevice) -> Tensor {
    let storage = match gradient {
        DeviceBuffer::F32(s) => CudaStorage::wrap_cuda_slice(s, device.clone()),
        DeviceBuffer::F16(s) => CudaStorage::wrap_cuda_slice(s, device.clone()),
        DeviceBuffer::BF16(s) => CudaStorage::wrap_cuda_slice(s, device.clone()),
    };
    Tensor::from_storage(Storage::Cuda(storage), like.shape(), BackpropOp::none(), false)
}
