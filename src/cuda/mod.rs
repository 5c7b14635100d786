//! The CUDA backend: [`LaunchPlan`] plus addresses into a stream, and nothing that waits.
//!
//! Where the build had no nvcc, or `CCE_JIT=1` is set, NVRTC compiles the kernels when they are first used, and keeps them on disk.
//!
//! ```no_run
//! use cut_cross_entropy::cuda::cudarc::driver::CudaContext;
//! use cut_cross_entropy::{CceOptions, Cuda, Inputs, Matrix, Upstream, cce_backward, cce_forward};
//!
//! let stream = CudaContext::new(0)?.default_stream();
//! let (tokens, hidden, vocab) = (4, 8, 100);
//! let embeddings = stream.clone_htod(&vec![0.5_f32; tokens * hidden])?;
//! let classifier = stream.clone_htod(&vec![0.1_f32; vocab * hidden])?;
//! let targets = stream.clone_htod(&[3_i64, 99, -100, 0])?;
//!
//! let cuda = Cuda::with_stream(stream)?;
//! let matrices = (Matrix::new(&embeddings, tokens, hidden), Matrix::new(&classifier, vocab, hidden));
//! let inputs = Inputs::new(matrices.0, matrices.1, &targets);
//! let forward = cce_forward(&cuda, &inputs, &CceOptions::default())?;
//! let gradients = cce_backward(&cuda, &inputs, &forward, &Upstream::default())?; // all of this is still in flight
//! println!("loss {}, {} entries kept", forward.loss.read()?, gradients.telemetry.read()?.kept_entries);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is promised
//! - No call of [`Cuda`]'s waits for the device; `read`, `check`, `row_eps` and [`Profile::take`] do, and all of [`CudaStaged`]'s. Work is ordered by the backend's stream; tensors that cudarc
//!   tracks on other streams are waited for, and wait, by its events.
//! - Workspace comes from the stream-ordered allocator, [`LaunchPlan::workspace`] says how much; what was not asked for
//!   allocates and launches nothing.
//! - Every output is bitwise the same from run to run on one kind of device.
//! - Nothing panics where CUDA is missing: [`Cuda::new`] says which part.

mod abi;
mod arguments;
mod buffers;
mod hopper;
mod launch;
mod module;
mod nvrtc;
mod probe;
mod profile;
mod raw;
mod staged;

pub use buffers::{DeviceBuffer, DeviceMemory, DeviceScalar, DeviceSlice, DeviceSliceMut, DeviceTelemetry};
pub use cudarc;
pub use probe::device_count;
pub use profile::{LaunchTime, Profile};
pub use raw::RawSlice;
pub use staged::CudaStaged;

use crate::plan::{DeviceInfo, Group, KernelChoice, LaunchPlan, Workload};
use crate::{Backend, DType, Error, Forward, GradientSinks, Memory, Problem, Result, Upstream};
use arguments::Addresses;
use buffers::TargetRange;
use cudarc::driver::{CudaSlice, CudaStream};
use module::Kernels;
use std::sync::Arc;

/// The CUDA backend on one stream of one device. Cheap to clone; several may be used at once, from any threads.
#[derive(Debug, Clone)]
pub struct Cuda {
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    choice: KernelChoice,
    room: Option<usize>,
    profile: Option<Arc<Profile>>,
}

impl Cuda {
    /// On the default stream of device `ordinal`, in its primary context.
    ///
    /// The first backend of a process on a device loads the kernels; where the build had no nvcc, the first one on a
    /// machine compiles them, which takes some seconds.
    ///
    /// # Errors
    /// [`Error::Device`] saying which of library, driver, device or function is missing, or why the kernels cannot be
    /// loaded. Never panics, whatever is missing.
    pub fn new(ordinal: usize) -> Result<Self> {
        Cuda::with_stream(raw::context(ordinal)?.default_stream())
    }

    /// On a stream of the caller's.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_stream(stream: Arc<CudaStream>) -> Result<Self> {
        let kernels = Kernels::of(stream.context())?;
        Ok(Cuda { stream, kernels, choice: KernelChoice::default(), room: None, profile: None })
    }

    /// The same with kernels chosen by the caller: a [`KernelFamily`](crate::plan::KernelFamily), or one and how it runs. What they
    /// cannot do is an [`Error::Device`].
    pub fn with_kernels(self, kernels: impl Into<KernelChoice>) -> Self {
        Cuda { choice: kernels.into(), ..self }
    }

    /// The same with room for `room` candidates a row, in place of as many as a list of 20 MiB holds for all rows (but 320 at least): 8
    /// bytes each, in two lists at a time. Where the softmax of 128 rows keeps more, the unbiased filter takes a larger ε: less memory, more variance.
    pub fn with_room(self, room: usize) -> Self {
        Cuda { room: Some(room), ..self }
    }

    /// The same, whose launches `profile` times.
    pub fn with_profile(self, profile: Arc<Profile>) -> Self {
        Cuda { profile: Some(profile), ..self }
    }

    /// The stream that everything is ordered by.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The device, as plans see it.
    pub fn device(&self) -> &DeviceInfo {
        self.kernels.device()
    }

    /// The plan for a workload on this device.
    ///
    /// # Errors
    /// Those of [`LaunchPlan::new`].
    pub fn plan(&self, workload: &Workload) -> Result<LaunchPlan> {
        LaunchPlan::new(workload, self.device())
    }
}

/// What a forward leaves for its backward.
#[derive(Debug)]
struct Saved {
    /// The plan's saved regions, the header first.
    memory: CudaSlice<u8>,
    plan: LaunchPlan,
    targets: TargetRange,
}

impl Saved {
    fn check(&self) -> Result<()> {
        self.targets.check(&raw::read_header(self.memory.stream(), &self.memory)?)
    }

    fn row_eps(&self) -> Result<Vec<f32>> {
        let memory = raw::download(self.memory.stream(), &self.memory)?;
        let region = |name: &str| self.plan.workspace.region(name).map_or(&[][..], |r| &memory[r.offset..][..r.bytes]);
        let rows = region("token_row").chunks_exact(4).map(bytemuck::pod_read_unaligned::<u32>);
        let statistics = region("statistics").chunks_exact(size_of::<abi::LceRowStatistics>());
        let eps: Vec<f32> = statistics.map(|s| bytemuck::pod_read_unaligned::<abi::LceRowStatistics>(s).eps).collect();
        let counts: Vec<u32> = region("entry_count").chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
        let is_exact = |row: &u32| counts.get(*row as usize) == Some(&abi::NONE);
        let of_row = |row: u32| eps.get(row as usize).copied().filter(|_| !is_exact(&row)).unwrap_or(0.0);
        Ok(rows.map(of_row).collect())
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        // Freeing works in the context of its thread, which may never have used the device; nobody to tell of an error.
        let context = self.memory.context().clone();
        context.record_err(context.bind_to_thread());
    }
}

/// What a forward computes.
struct Outputs {
    loss: CudaSlice<f32>,
    losses: CudaSlice<f32>,
    nll: CudaSlice<f32>,
    lse: CudaSlice<f32>,
    target_logit: CudaSlice<f32>,
    entropy: Option<CudaSlice<f32>>,
    argmax: Option<CudaSlice<u32>>,
    accuracy: Option<CudaSlice<f32>>,
}

impl Cuda {
    fn run_forward(&self, problem: &Problem<'_, DeviceMemory>, plan: LaunchPlan) -> Result<(Outputs, Saved)> {
        let (options, shape) = (problem.options(), problem.shape());
        let floats = |tensor, len| raw::allocate::<f32>(&self.stream, tensor, len);
        let n = shape.tokens;
        let mut outputs = Outputs {
            loss: floats("loss", 1)?,
            losses: floats("losses", n)?,
            nll: floats("nll", n)?,
            lse: floats("lse", n)?,
            target_logit: floats("target_logit", n)?,
            entropy: options.entropy.then(|| floats("entropy", n)).transpose()?,
            argmax: options.metrics.then(|| raw::allocate(&self.stream, "argmax", n)).transpose()?,
            accuracy: options.metrics.then(|| floats("accuracy", 1)).transpose()?,
        };
        let bytes = |group| plan.workspace.group_bytes(group);
        let mut saved = raw::allocate(&self.stream, "saved state", bytes(Group::Saved))?;
        let mut scratch = raw::allocate(&self.stream, "forward scratch", bytes(Group::Forward))?;
        launch::forward(self, problem, &plan, &mut outputs, &mut saved, &mut scratch)?;
        let targets = TargetRange { shift: options.shift, vocab: shape.vocab, ignore_index: options.ignore_index };
        Ok((outputs, Saved { memory: saved, plan, targets }))
    }

    fn workload(&self, problem: &Problem<'_, DeviceMemory>) -> Result<Workload> {
        Ok(self.chosen(problem, Addresses::new(&self.stream).rows_are_aligned(problem)?))
    }

    /// With what this backend was told to choose.
    fn chosen<M: Memory>(&self, problem: &Problem<'_, M>, aligned: bool) -> Workload {
        Workload::new(problem, aligned).with_kernels(self.choice).with_room(self.room)
    }
}

impl Backend for Cuda {
    type Memory = DeviceMemory;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<DeviceBuffer> {
        buffers::allocate(&self.stream, tensor, dtype, len)
    }

    fn borrow_mut<'a>(&self, owned: &'a mut DeviceBuffer) -> DeviceSliceMut<'a> {
        owned.as_mut()
    }

    fn forward(&self, problem: &Problem<'_, DeviceMemory>) -> Result<Forward<DeviceMemory>> {
        let plan = self.plan(&self.workload(problem)?)?;
        let (outputs, saved) = self.run_forward(problem, plan)?;
        Ok(Forward {
            loss: DeviceScalar(outputs.loss),
            losses: outputs.losses,
            nll: outputs.nll,
            lse: outputs.lse,
            target_logit: outputs.target_logit,
            entropy: outputs.entropy,
            argmax: outputs.argmax,
            accuracy: outputs.accuracy.map(DeviceScalar),
            options: *problem.options(),
            shape: problem.shape(),
            dtype: problem.dtype(),
            saved: Box::new(saved),
        })
    }

    fn backward(
        &self,
        problem: &Problem<'_, DeviceMemory>,
        forward: &Forward<DeviceMemory>,
        upstream: &Upstream<'_, DeviceMemory>,
        sinks: GradientSinks<'_, DeviceMemory>,
    ) -> Result<DeviceTelemetry> {
        let foreign = |reason: &str| Error::ForeignForward { reason: reason.into() };
        let saved = forward.saved.downcast_ref::<Saved>().ok_or_else(|| foreign("another backend computed it"))?;
        if saved.memory.context().cu_ctx() != self.stream.context().cu_ctx() {
            return Err(foreign("it was computed on another device"));
        }
        let wanted = [!sinks.embeddings.is_skip(), !sinks.classifier.is_skip(), !sinks.bias.is_skip()];
        let mut workload = self.workload(problem)?.with_gradients(wanted[0], wanted[1], wanted[2]);
        workload.options.capture = true;
        workload.room = saved.plan.workload.room; // its lists lie where its plan says
        let plan = self.plan(&workload)?;

        let again;
        let saved = if plan.capture && !saved.plan.capture {
            // The forward put no candidates aside: run it once more, for the lists alone.
            again = self.run_forward(problem, plan.clone())?.1;
            &again
        } else {
            saved
        };
        if wanted.contains(&true) {
            let bytes = plan.workspace.group_bytes(Group::Backward);
            let mut scratch = raw::allocate(&self.stream, "backward scratch", bytes)?;
            launch::backward(self, problem, &plan, saved, upstream, sinks, &mut scratch)?;
        }
        let header = raw::copy_header(&self.stream, &saved.memory)?;
        Ok(DeviceTelemetry { header, targets: saved.targets })
    }
}
