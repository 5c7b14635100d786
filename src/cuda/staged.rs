//! Host tensors on a GPU: uploaded, computed, downloaded. For the command line and for tests, which so hold every backend
//! to the same suite; a training loop keeps its tensors on the device.

use super::arguments::rows_stay_aligned;
use super::buffers::{self, DeviceBuffer, DeviceMemory, DeviceSlice};
use super::{Cuda, Profile, raw};
use crate::memory::Buffer;
use crate::plan::{DeviceInfo, KernelChoice, LaunchPlan};
use crate::{
    Backend, DType, Error, Forward, GradientSinks, Host, HostBuffer, HostSlice, HostSliceMut, Inputs, Matrix, Problem,
    Result, Sink, Telemetry, Upstream,
};
use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use std::sync::Arc;

/// The CUDA backend for tensors in host memory. Every call copies its tensors to the device and back, and waits.
#[derive(Debug, Clone)]
pub struct CudaStaged {
    cuda: Cuda,
}

/// A device copy of any host tensor.
enum Uploaded {
    F32(CudaSlice<f32>),
    F16(CudaSlice<f16>),
    BF16(CudaSlice<bf16>),
    I64(CudaSlice<i64>),
    I32(CudaSlice<i32>),
    U32(CudaSlice<u32>),
}

impl Uploaded {
    fn new(stream: &Arc<CudaStream>, tensor: &'static str, host: HostSlice<'_>) -> Result<Self> {
        Ok(match host {
            HostSlice::F32(s) => Uploaded::F32(raw::upload(stream, tensor, s)?),
            HostSlice::F16(s) => Uploaded::F16(raw::upload(stream, tensor, s)?),
            HostSlice::BF16(s) => Uploaded::BF16(raw::upload(stream, tensor, s)?),
            HostSlice::I64(s) => Uploaded::I64(raw::upload(stream, tensor, s)?),
            HostSlice::I32(s) => Uploaded::I32(raw::upload(stream, tensor, s)?),
            HostSlice::U32(s) => Uploaded::U32(raw::upload(stream, tensor, s)?),
        })
    }

    fn slice(&self) -> DeviceSlice<'_> {
        match self {
            Uploaded::F32(s) => s.into(),
            Uploaded::F16(s) => s.into(),
            Uploaded::BF16(s) => s.into(),
            Uploaded::I64(s) => s.into(),
            Uploaded::I32(s) => s.into(),
            Uploaded::U32(s) => s.into(),
        }
    }
}

/// All tensors of a problem.
struct UploadedInputs {
    embeddings: Uploaded,
    classifier: Uploaded,
    targets: Uploaded,
    bias: Option<Uploaded>,
    class_weights: Option<Uploaded>,
    token_weights: Option<Uploaded>,
}

impl UploadedInputs {
    fn new(stream: &Arc<CudaStream>, inputs: &Inputs<'_>) -> Result<Self> {
        let upload = |tensor, host: HostSlice<'_>| Uploaded::new(stream, tensor, host);
        let optional = |tensor, host: Option<HostSlice<'_>>| host.map(|host| upload(tensor, host)).transpose();
        Ok(UploadedInputs {
            embeddings: upload("embeddings", inputs.embeddings.data)?,
            classifier: upload("classifier", inputs.classifier.data)?,
            targets: upload("targets", inputs.targets)?,
            bias: optional("bias", inputs.bias)?,
            class_weights: optional("class_weights", inputs.class_weights)?,
            token_weights: optional("token_weights", inputs.token_weights)?,
        })
    }

    fn inputs(&self, host: &Inputs<'_>) -> Inputs<'_, DeviceMemory> {
        fn matrix<'a>(host: &Matrix<'_>, data: &'a Uploaded) -> Matrix<'a, DeviceMemory> {
            Matrix { data: data.slice(), rows: host.rows, columns: host.columns, row_stride: host.row_stride }
        }
        Inputs {
            embeddings: matrix(&host.embeddings, &self.embeddings),
            classifier: matrix(&host.classifier, &self.classifier),
            targets: self.targets.slice(),
            bias: self.bias.as_ref().map(Uploaded::slice),
            class_weights: self.class_weights.as_ref().map(Uploaded::slice),
            token_weights: self.token_weights.as_ref().map(Uploaded::slice),
            seq_len: host.seq_len,
        }
    }
}

impl CudaStaged {
    /// On the default stream of device `ordinal`.
    ///
    /// # Errors
    /// Those of [`Cuda::new`].
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(CudaStaged { cuda: Cuda::new(ordinal)? })
    }

    /// See [`Cuda::with_kernels`].
    pub fn with_kernels(self, kernels: impl Into<KernelChoice>) -> Self {
        CudaStaged { cuda: self.cuda.with_kernels(kernels) }
    }

    /// See [`Cuda::with_room`].
    pub fn with_room(self, room: usize) -> Self {
        CudaStaged { cuda: self.cuda.with_room(room) }
    }

    /// See [`Cuda::with_profile`].
    pub fn with_profile(self, profile: Arc<Profile>) -> Self {
        CudaStaged { cuda: self.cuda.with_profile(profile) }
    }

    /// The plan of a problem, on the device: copies keep the rows' stride, and start at multiples of 256 bytes.
    ///
    /// # Errors
    /// Those of [`LaunchPlan::new`].
    pub fn plan(&self, problem: &Problem<'_>) -> Result<LaunchPlan> {
        self.cuda.plan(&self.cuda.chosen(problem, rows_stay_aligned(problem)))
    }

    /// The backend that computes.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// The forward on the device behind one that this backend has computed. For tests.
    #[doc(hidden)]
    pub fn on_device(forward: &Forward) -> Option<&Forward<DeviceMemory>> {
        forward.saved.downcast_ref()
    }

    /// The device.
    pub fn device(&self) -> &DeviceInfo {
        self.cuda.device()
    }

    /// The device's counterpart of a host sink: what it held is only uploaded where it is added to.
    fn stage(&self, tensor: &'static str, sink: &Sink<'_>) -> Result<Option<DeviceBuffer>> {
        let stream = self.cuda.stream();
        Ok(match sink {
            Sink::Skip => None,
            Sink::Accumulate(HostSliceMut::F32(s)) => Some(DeviceBuffer::F32(raw::upload(stream, tensor, s)?)),
            Sink::Accumulate(s) | Sink::Overwrite(s) => Some(buffers::allocate(stream, tensor, s.dtype(), s.len())?),
        })
    }
}

fn device_sink<'a>(host: &Sink<'_>, device: &'a mut Option<DeviceBuffer>) -> Sink<'a, DeviceMemory> {
    match (host, device) {
        (Sink::Accumulate(_), Some(device)) => Sink::Accumulate(device.as_mut()),
        (Sink::Overwrite(_), Some(device)) => Sink::Overwrite(device.as_mut()),
        _ => Sink::Skip,
    }
}

fn fetch(host: Sink<'_>, device: Option<DeviceBuffer>) -> Result<()> {
    let (Sink::Accumulate(host) | Sink::Overwrite(host), Some(device)) = (host, device) else { return Ok(()) };
    match (host, &device) {
        (HostSliceMut::F32(to), DeviceBuffer::F32(from)) => to.copy_from_slice(&raw::download(from.stream(), from)?),
        (HostSliceMut::F16(to), DeviceBuffer::F16(from)) => to.copy_from_slice(&raw::download(from.stream(), from)?),
        (HostSliceMut::BF16(to), DeviceBuffer::BF16(from)) => to.copy_from_slice(&raw::download(from.stream(), from)?),
        _ => {} // allocated with the host's type
    }
    Ok(())
}

impl Backend for CudaStaged {
    type Memory = Host;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<HostBuffer> {
        HostBuffer::zeros(tensor, dtype, len)
    }

    fn borrow_mut<'a>(&self, owned: &'a mut HostBuffer) -> HostSliceMut<'a> {
        owned.as_mut()
    }

    fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
        let uploaded = UploadedInputs::new(self.cuda.stream(), problem.inputs())?;
        let device = self.cuda.forward(&Problem::new(&uploaded.inputs(problem.inputs()), problem.options())?)?;
        device.check()?;
        let argmax = device.argmax.as_ref().map(|argmax| raw::download(argmax.stream(), argmax));
        Ok(Forward {
            loss: device.loss.read()?,
            losses: buffers::to_host(&device.losses)?,
            nll: buffers::to_host(&device.nll)?,
            lse: buffers::to_host(&device.lse)?,
            target_logit: buffers::to_host(&device.target_logit)?,
            entropy: device.entropy.as_ref().map(buffers::to_host).transpose()?,
            argmax: argmax.transpose()?,
            accuracy: device.accuracy.as_ref().map(|accuracy| accuracy.read()).transpose()?,
            options: device.options,
            shape: device.shape,
            dtype: device.dtype,
            saved: Box::new(device),
        })
    }

    fn backward(
        &self,
        problem: &Problem<'_>,
        forward: &Forward,
        upstream: &Upstream<'_>,
        sinks: GradientSinks<'_>,
    ) -> Result<Telemetry> {
        let foreign = || Error::ForeignForward { reason: "another backend computed it".into() };
        let saved = forward.saved.downcast_ref::<Forward<DeviceMemory>>().ok_or_else(foreign)?;
        let stream = self.cuda.stream();
        let uploaded = UploadedInputs::new(stream, problem.inputs())?;
        let inputs = uploaded.inputs(problem.inputs());
        let vector = |host: Option<HostSlice<'_>>| host.map(|host| Uploaded::new(stream, "upstream", host)).transpose();
        let Upstream { loss, loss_scale, losses, nll, lse, entropy } = *upstream;
        let vectors = [vector(loss_scale)?, vector(losses)?, vector(nll)?, vector(lse)?, vector(entropy)?];
        let [loss_scale, losses, nll, lse, entropy] = vectors.each_ref().map(|v| v.as_ref().map(Uploaded::slice));
        let upstream = Upstream { loss, loss_scale, losses, nll, lse, entropy };

        let mut embeddings = self.stage("d_embeddings", &sinks.embeddings)?;
        let mut classifier = self.stage("d_classifier", &sinks.classifier)?;
        let mut bias = self.stage("d_bias", &sinks.bias)?;
        let device_sinks = GradientSinks {
            embeddings: device_sink(&sinks.embeddings, &mut embeddings),
            classifier: device_sink(&sinks.classifier, &mut classifier),
            bias: device_sink(&sinks.bias, &mut bias),
        };
        let telemetry =
            self.cuda.backward(&Problem::new(&inputs, problem.options())?, saved, &upstream, device_sinks)?;
        fetch(sinks.embeddings, embeddings)?;
        fetch(sinks.classifier, classifier)?;
        fetch(sinks.bias, bias)?;
        telemetry.read()
    }
}
