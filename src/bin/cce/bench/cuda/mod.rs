//! A GPU as a machine to be timed: events on one stream, the L2 cache flushed before every measured phase, T and the baseline
//! by cuBLAS in the same process.

mod baseline;
mod blas;

use super::methods::{Last, Launch, Method, Runner, Step};
use super::timing::Seconds;
use crate::common::slice_oracle::Outcome;
use crate::common::workload::Workload;
use anyhow::{Context, bail, ensure};
use baseline::{Baseline, Tensors};
use blas::{Blas, Precision, View};
use cut_cross_entropy::cuda::cudarc::driver::sys::{CUevent_flags, CUmemPool_attribute as PoolAttribute, CUmemoryPool};
use cut_cross_entropy::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, result};
use cut_cross_entropy::cuda::{DeviceBuffer, DeviceMemory, DeviceSlice, LaunchTime, Profile};
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{
    Backend, Cuda, DType, GradientSinks, HostBuffer, Inputs, Matrix, Problem, Shape, Sink, Telemetry, Upstream,
    cce_backward_into, cce_forward, plan,
};
use std::process::Command;
use std::sync::Arc;

/// N·V·D beyond which the emulated device would take minutes.
const EMULATED_LIMIT: usize = 1 << 26;
/// Least bytes that are written to flush the cache.
const FLUSH_BYTES: usize = 128 << 20;
/// How often: for as long as the host takes to plan, allocate and launch, by estimate 0.1 ms, the device must not be done, or it would wait
/// between the events. By estimate this takes it 1 ms.
const HEAD_START: usize = 25;

/// An open device.
pub struct Device {
    cuda: Cuda,
    blas: Blas,
    flush: std::cell::RefCell<CudaSlice<u8>>,
    pool: CUmemoryPool,
}

impl Device {
    /// The first GPU.
    pub fn open() -> anyhow::Result<Self> {
        let cuda = Cuda::new(0)?;
        let blas = Blas::new(cuda.stream().clone())?;
        let emulated = cuda.device().name.contains("emulated");
        let bytes = if emulated { 1 << 16 } else { FLUSH_BYTES.max(2 * cuda.device().l2_bytes) };
        let flush = std::cell::RefCell::new(cuda.stream().alloc_zeros(bytes)?);
        // SAFETY: the device of a live context and its default pool; the attribute is 64 bits wide. Memory that was freed
        // stays in the pool, as in a training loop: otherwise every wait would give it back to the system.
        let pool = unsafe {
            let pool = result::device::get_default_mem_pool(cuda.stream().context().cu_device())?;
            let mut all = u64::MAX;
            let threshold = PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast())?;
            pool
        };
        Ok(Device { cuda, blas, flush, pool })
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.cuda.stream()
    }

    /// Whether kernels run on the processor, for checking.
    pub fn is_emulated(&self) -> bool {
        self.cuda.device().name.contains("emulated")
    }

    /// Name, versions, and what the driver's tool says of clocks.
    pub fn describe(&self) -> anyhow::Result<String> {
        let state = match self.is_emulated() {
            true => "times are of the emulator and say nothing of a GPU".into(),
            false => state().unwrap_or("nvidia-smi does not answer: clocks unknown".into()),
        };
        Ok(format!("{}; cuBLAS {}; {state}", self.cuda.device(), self.blas.version()?))
    }

    /// For the record.
    pub fn name(&self) -> String {
        self.cuda.device().name.replace(',', " ")
    }

    /// Refuses what does not fit.
    pub fn check(&self, shape: Shape, dtype: DType) -> anyhow::Result<()> {
        let work = shape.tokens.saturating_mul(shape.vocab).saturating_mul(shape.hidden);
        ensure!(
            !self.is_emulated() || work <= EMULATED_LIMIT,
            "the emulated GPU is for checking, not for {shape}: N·V·D is {work}, of at most {EMULATED_LIMIT}; try --tokens 64 \
             --vocab 2000 --hidden 64"
        );
        let free = self.free_bytes()?;
        let plane = shape.tokens * shape.vocab * dtype.size_in_bytes(); // of T
        let needed = 2 * (shape.tokens + shape.vocab) * shape.hidden * dtype.size_in_bytes() + plane;
        let gib = |bytes: usize| bytes as f64 / (1 << 30) as f64;
        ensure!(
            needed < free / 100 * 95,
            "{shape} in {dtype} needs {:.1} GiB for inputs, gradients and the plain matmul, of {:.1} GiB free",
            gib(needed),
            gib(free)
        );
        Ok(())
    }

    /// Bytes that nobody uses, after the pool gave back what earlier work left in it.
    fn free_bytes(&self) -> anyhow::Result<usize> {
        self.stream().synchronize()?;
        // SAFETY: the device's default pool.
        unsafe { result::mem_pool::trim_to(self.pool, 0) }?;
        Ok(self.stream().context().mem_get_info()?.0)
    }

    /// Runs the work between two events, after a flush of the cache that also gives the host a head start.
    fn timed<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, Seconds)> {
        for _ in 0..HEAD_START {
            self.stream().memset_zeros(&mut *self.flush.borrow_mut())?;
        }
        let start = self.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        let value = work()?;
        let end = self.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        let milliseconds = start.elapsed_ms(&end).context("a kernel failed")?;
        Ok((value, Seconds { wall: f64::from(milliseconds) * 1e-3, cpu: None }))
    }

    fn pool_bytes(&self, attribute: PoolAttribute) -> anyhow::Result<usize> {
        let mut bytes = 0_u64;
        // SAFETY: the device's default pool, and the 64 bits that both attributes asked for here have.
        unsafe { result::mem_pool::get_attribute(self.pool, attribute, (&raw mut bytes).cast()) }?;
        Ok(usize::try_from(bytes)?)
    }

    /// The highest number of bytes in use during the work, beyond those before it.
    fn peak<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, usize)> {
        self.stream().synchronize()?;
        let mut reset = 0_u64;
        // SAFETY: the device's default pool; the attribute is 64 bits wide, and 0 resets it.
        unsafe {
            let high = PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
            result::mem_pool::set_attribute(self.pool, high, (&raw mut reset).cast())?;
        }
        let before = self.pool_bytes(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        let value = work()?;
        let high = self.pool_bytes(PoolAttribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
        Ok((value, high.saturating_sub(before)))
    }

    fn upload(&self, tensor: &'static str, host: &HostBuffer) -> anyhow::Result<DeviceBuffer> {
        let mut device = self.cuda.allocate(tensor, host.as_slice().dtype(), host.as_slice().len())?;
        match (host, &mut device) {
            (HostBuffer::F32(from), DeviceBuffer::F32(to)) => self.stream().memcpy_htod(from, to)?,
            (HostBuffer::F16(from), DeviceBuffer::F16(to)) => self.stream().memcpy_htod(from, to)?,
            (HostBuffer::BF16(from), DeviceBuffer::BF16(to)) => self.stream().memcpy_htod(from, to)?,
            _ => bail!("{tensor} is of a type that no device buffer has"),
        }
        Ok(device)
    }

    fn download(&self, device: &DeviceBuffer, host: &mut HostBuffer) -> anyhow::Result<()> {
        match (device, host) {
            (DeviceBuffer::F32(from), HostBuffer::F32(to)) => self.stream().memcpy_dtoh(from, to)?,
            (DeviceBuffer::F16(from), HostBuffer::F16(to)) => self.stream().memcpy_dtoh(from, to)?,
            (DeviceBuffer::BF16(from), HostBuffer::BF16(to)) => self.stream().memcpy_dtoh(from, to)?,
            _ => bail!("a gradient is not of its tensor's type"),
        }
        Ok(self.stream().synchronize()?)
    }

    fn address(&self, buffer: &DeviceBuffer) -> u64 {
        match buffer {
            DeviceBuffer::F32(s) => s.device_ptr(self.stream()).0,
            DeviceBuffer::F16(s) => s.device_ptr(self.stream()).0,
            DeviceBuffer::BF16(s) => s.device_ptr(self.stream()).0,
            _ => 0,
        }
    }

    /// Products for the survey of a workload, by cuBLAS: 2·N·V·D operations would take the host minutes.
    pub fn products(
        &self,
        workload: &Workload,
    ) -> anyhow::Result<impl FnMut(usize, &mut [f32]) -> anyhow::Result<()> + '_> {
        let shape = workload.shape;
        let dtype = workload.embeddings.as_slice().dtype();
        let embeddings = self.upload("embeddings", &workload.embeddings)?;
        let classifier = self.upload("classifier", &workload.classifier)?;
        let mut plane: CudaSlice<f32> = self.stream().alloc_zeros(shape.vocab)?;
        Ok(move |first: usize, products: &mut [f32]| {
            let tokens = products.len() / shape.vocab;
            if plane.len() < products.len() {
                plane = self.stream().alloc_zeros(products.len())?;
            }
            let row = self.address(&embeddings) + (first * shape.hidden * dtype.size_in_bytes()) as u64;
            let e = View::new(row, dtype, tokens, shape.hidden);
            let c = View::new(self.address(&classifier), dtype, shape.vocab, shape.hidden);
            let z = View::new(plane.device_ptr(self.stream()).0, DType::F32, tokens, shape.vocab);
            // SAFETY: the rows asked for are among the N of the embeddings; the plane has room for their products.
            unsafe { self.blas.multiply(1.0, e, c.transposed(), z, Precision::Full) }?;
            let filled = plane.slice(..products.len());
            self.stream().memcpy_dtoh(&filled, products)?;
            Ok(self.stream().synchronize()?)
        })
    }
}

/// Driver, clocks in MHz, power limit and temperature, by the driver's tool.
pub fn state() -> Option<String> {
    let fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu";
    let output = Command::new("nvidia-smi").args(["-i", "0", "--format=csv,noheader", "--query-gpu", fields]).output();
    let values = String::from_utf8(output.ok().filter(|o| o.status.success())?.stdout).ok()?;
    let values: Vec<&str> = values.lines().next()?.split(',').map(str::trim).collect();
    let [driver, sm, memory, most, power, temperature] = values[..] else { return None };
    Some(format!("driver {driver}; SM at {sm} of {most}; memory at {memory}; limit {power}; {temperature} °C"))
}

/// Tensors of one workload on the device.
pub struct CudaRunner<'a> {
    device: &'a Device,
    workload: &'a Workload,
    dtype: DType,
    embeddings: DeviceBuffer,
    classifier: DeviceBuffer,
    targets: CudaSlice<i64>,
    d_embeddings: DeviceBuffer,
    d_classifier: DeviceBuffer,
    baseline: Baseline,
    last: Last,
    /// Copies of the gradients, made for the oracle alone.
    host: Option<[HostBuffer; 2]>,
}

fn slice(buffer: &DeviceBuffer) -> anyhow::Result<DeviceSlice<'_>> {
    match buffer {
        DeviceBuffer::F32(s) => Ok(s.into()),
        DeviceBuffer::F16(s) => Ok(s.into()),
        DeviceBuffer::BF16(s) => Ok(s.into()),
        _ => bail!("no matrix is of this type"),
    }
}

impl<'a> CudaRunner<'a> {
    /// Uploads the workload.
    pub fn new(device: &'a Device, workload: &'a Workload) -> anyhow::Result<Self> {
        let (shape, dtype) = (workload.shape, workload.embeddings.as_slice().dtype());
        Ok(CudaRunner {
            device,
            workload,
            dtype,
            embeddings: device.upload("embeddings", &workload.embeddings)?,
            classifier: device.upload("classifier", &workload.classifier)?,
            targets: device.stream().clone_htod(&workload.targets)?,
            d_embeddings: device.cuda.allocate("d_embeddings", dtype, shape.tokens * shape.hidden)?,
            d_classifier: device.cuda.allocate("d_classifier", dtype, shape.vocab * shape.hidden)?,
            baseline: Baseline::new(device, workload)?,
            last: Last::default(),
            host: None,
        })
    }

    fn tensors(&self) -> Tensors {
        Tensors {
            embeddings: self.device.address(&self.embeddings),
            classifier: self.device.address(&self.classifier),
            targets: self.targets.device_ptr(self.device.stream()).0,
            d_embeddings: self.device.address(&self.d_embeddings),
            d_classifier: self.device.address(&self.d_classifier),
        }
    }

    fn ours(&mut self, method: Method, profile: Option<Arc<Profile>>) -> anyhow::Result<Step> {
        let (device, Shape { tokens, hidden, vocab }) = (self.device, self.workload.shape);
        let inputs: Inputs<'_, DeviceMemory> = Inputs::new(
            Matrix::new(slice(&self.embeddings)?, tokens, hidden),
            Matrix::new(slice(&self.classifier)?, vocab, hidden),
            &self.targets,
        );
        let options = method.options(self.workload.softcap);
        let mut cuda = device.cuda.clone().with_kernels(method.kernels());
        if let Some(profile) = profile {
            cuda = cuda.with_profile(profile);
        }
        let sinks = GradientSinks {
            embeddings: Sink::Overwrite(self.d_embeddings.as_mut()),
            classifier: Sink::Overwrite(self.d_classifier.as_mut()),
            bias: Sink::Skip,
        };
        let (step, peak_bytes) = device.peak(|| {
            let (forward, forward_time) = device.timed(|| Ok(cce_forward(&cuda, &inputs, &options)?))?;
            let (mut backward, mut telemetry) = (Seconds::default(), Telemetry::default());
            if method.has_backward() {
                let upstream = Upstream::default();
                let run = || Ok(cce_backward_into(&cuda, &inputs, &forward, &upstream, sinks)?);
                let (counters, time) = device.timed(run)?;
                (backward, telemetry) = (time, counters.read()?);
            }
            forward.check()?;
            let (nll, lse) = (device.stream().clone_dtoh(&forward.nll)?, device.stream().clone_dtoh(&forward.lse)?);
            let loss = forward.loss.read()?;
            let row_eps = (telemetry.raised_rows > 0).then(|| forward.row_eps()).transpose()?;
            self.last = Last { loss, nll, lse, exact_rows: telemetry.exact_rows, row_eps };
            Ok(Step { forward: forward_time, backward, peak_bytes: 0, telemetry, loss })
        })?;
        Ok(step.with_peak(peak_bytes, tokens))
    }

    fn materialising(&mut self) -> anyhow::Result<Step> {
        let tensors = self.tensors();
        self.baseline.reserve(self.device)?;
        let ((), forward) = self.device.timed(|| self.baseline.forward(self.device, &tensors))?;
        let ((), backward) = self.device.timed(|| self.baseline.backward(self.device, &tensors))?;
        let (loss, nll, lse) = self.baseline.results(self.device)?;
        self.last = Last { loss, nll, lse, exact_rows: 0, row_eps: None };
        let peak_bytes = Baseline::bytes(self.workload.shape, self.dtype);
        Ok(Step { forward, backward, peak_bytes, telemetry: Telemetry::default(), loss })
    }
}

impl Runner for CudaRunner<'_> {
    fn step(&mut self, method: Method) -> anyhow::Result<Step> {
        match method {
            Method::Baseline => self.materialising(),
            _ => self.ours(method, None),
        }
    }

    fn launches(&mut self, method: Method) -> anyhow::Result<Vec<Launch>> {
        ensure!(method != Method::Baseline, "the baseline's launches are cuBLAS's own");
        let profile = Arc::new(Profile::default());
        self.ours(method, Some(profile.clone()))?;
        let launch = |time: LaunchTime| {
            let milliseconds = f64::from(time.milliseconds);
            Launch { name: time.name, redo: time.redo, milliseconds }
        };
        Ok(profile.take()?.into_iter().map(launch).collect())
    }

    fn matmul(&mut self) -> anyhow::Result<Seconds> {
        let tensors = self.tensors();
        Ok(self.device.timed(|| self.baseline.matmul(self.device, &tensors, Precision::Full))?.1)
    }

    fn tf32_matmul(&mut self) -> anyhow::Result<Option<Seconds>> {
        let tensors = self.tensors();
        if self.dtype != DType::F32 {
            return Ok(None);
        }
        Ok(Some(self.device.timed(|| self.baseline.matmul(self.device, &tensors, Precision::Tf32))?.1))
    }

    fn poison(&mut self) -> anyhow::Result<()> {
        for gradient in [&mut self.d_embeddings, &mut self.d_classifier] {
            let stream = self.device.stream();
            let (bytes, address) = match gradient {
                DeviceBuffer::F32(s) => (s.num_bytes(), s.device_ptr_mut(stream).0),
                DeviceBuffer::F16(s) => (s.num_bytes(), s.device_ptr_mut(stream).0),
                DeviceBuffer::BF16(s) => (s.num_bytes(), s.device_ptr_mut(stream).0),
                _ => continue,
            };
            // SAFETY: all bytes of a live buffer of this stream, borrowed mutably; any bits are floats, these are NaN.
            unsafe { result::memset_d8_async(address, 0xFF, bytes, stream.cu_stream()) }?;
        }
        Ok(())
    }

    fn last(&self) -> &Last {
        &self.last
    }

    fn outcome(&mut self, method: Method) -> anyhow::Result<Outcome<'_>> {
        if method.has_backward() {
            let zeros = |tensor, rows| HostBuffer::zeros(tensor, self.dtype, rows * self.workload.shape.hidden);
            let [d_embeddings, d_classifier] = match self.host.take() {
                Some(host) => host,
                None => [
                    zeros("d_embeddings", self.workload.shape.tokens)?,
                    zeros("d_classifier", self.workload.shape.vocab)?,
                ],
            };
            let host = self.host.insert([d_embeddings, d_classifier]);
            self.device.download(&self.d_embeddings, &mut host[0])?;
            self.device.download(&self.d_classifier, &mut host[1])?;
        }
        let gradients = self.host.as_ref().filter(|_| method.has_backward()).map(|[e, c]| [e, c]);
        // In f32 cuBLAS has no tensor cores, and ours adds what they give it in plain f32.
        Ok(Outcome { cuts_off: self.dtype != DType::F32, ..self.last.outcome(method, gradients) })
    }

    fn planned_bytes(&self, method: Method, problem: &Problem<'_>) -> anyhow::Result<usize> {
        let aligned = (self.workload.shape.hidden * self.dtype.size_in_bytes()).is_multiple_of(16);
        let mut workload = plan::Workload::new(problem, aligned).with_kernels(method.kernels());
        if !method.has_backward() {
            workload = workload.with_gradients(false, false, false);
        }
        Ok(self.device.cuda.plan(&workload)?.workspace.peak_bytes())
    }

    fn obstacle(&self, method: Method) -> Option<String> {
        if method != Method::Baseline {
            return None;
        }
        if !Baseline::has_kernels() {
            return Some("built without nvcc, so without the baseline's kernels".into());
        }
        let free = self.device.free_bytes().ok()?;
        let needed = Baseline::bytes(self.workload.shape, self.dtype);
        let gib = |bytes: usize| bytes as f64 / (1 << 30) as f64;
        (needed > free).then(|| format!("needs {:.1} GiB, of {:.1} GiB free", gib(needed), gib(free)))
    }
}
