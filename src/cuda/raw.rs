//! The unsafe core: addresses instead of borrows, and the few operations on device memory that cudarc leaves unsafe.
//!
//! Programs whose tensors are not cudarc's (burn, tch, C) wrap addresses with [`DeviceSlice::from_raw`] and
//! [`DeviceSliceMut::from_raw`], and their stream with [`Cuda::from_raw_stream`]; everything else is the same safe API.
//!
//! ```no_run
//! use cut_cross_entropy::cuda::{DeviceSlice, Cuda};
//! use cut_cross_entropy::{CceOptions, DType, Inputs, Matrix, cce_forward};
//! # let (stream, e, c, y, tokens, hidden, vocab) = (std::ptr::null_mut(), 0, 0, 0, 4, 8, 100);
//! // SAFETY: the addresses are of tensors of these sizes on device 0, which live until the stream has run the forward.
//! let (cuda, inputs) = unsafe {
//!     let embeddings = DeviceSlice::from_raw(e, tokens * hidden, DType::BF16);
//!     let classifier = DeviceSlice::from_raw(c, vocab * hidden, DType::BF16);
//!     let targets = DeviceSlice::from_raw(y, tokens, DType::I64);
//!     let matrices = (Matrix::new(embeddings, tokens, hidden), Matrix::new(classifier, vocab, hidden));
//!     (Cuda::from_raw_stream(0, stream)?, Inputs::new(matrices.0, matrices.1, targets))
//! };
//! let forward = cce_forward(&cuda, &inputs, &CceOptions::default())?;
//! println!("loss {}", forward.loss.read()?);
//! # Ok::<(), cut_cross_entropy::Error>(())
//! ```

use super::abi::LceHeader;
use super::buffers::{DeviceSlice, DeviceSliceMut};
use super::module::driver;
use super::{Cuda, probe};
use crate::{DType, Error, Result};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits, result,
};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

/// Elements at a device address. Made by [`DeviceSlice::from_raw`] and [`DeviceSliceMut::from_raw`].
#[derive(Debug, Clone, Copy)]
pub struct RawSlice<'a> {
    address: u64,
    len: usize,
    dtype: DType,
    lifetime: PhantomData<&'a ()>,
}

impl RawSlice<'_> {
    /// The address.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// Number of elements.
    #[allow(clippy::len_without_is_empty, reason = "`Buffer` has it")]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

impl DeviceSlice<'_> {
    /// `len` elements of type `dtype` at `address`.
    ///
    /// # Safety
    /// Until the backend's stream has done what it is given with this slice: the address, aligned for the type, must be
    /// of that many readable elements on the backend's device, and nobody may write them.
    pub unsafe fn from_raw(address: u64, len: usize, dtype: DType) -> Self {
        DeviceSlice::Raw(RawSlice { address, len, dtype, lifetime: PhantomData })
    }
}

impl DeviceSliceMut<'_> {
    /// `len` elements of type `dtype` at `address`.
    ///
    /// # Safety
    /// Until the backend's stream has done what it is given with this slice: the address, aligned for the type, must be
    /// of that many writable elements on the backend's device, and nobody else may use them.
    pub unsafe fn from_raw(address: u64, len: usize, dtype: DType) -> Self {
        DeviceSliceMut::Raw(RawSlice { address, len, dtype, lifetime: PhantomData })
    }
}

impl Cuda {
    /// The backend on somebody else's stream (a `CUstream` or `cudaStream_t`; null: the default stream) in the primary
    /// context of device `ordinal`, where PyTorch, candle and the CUDA runtime work too.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    ///
    /// # Safety
    /// The stream must belong to that context and outlive the backend and everything made with it; tensors that others
    /// use on other streams are the caller's to order.
    pub unsafe fn from_raw_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        let context = context(ordinal)?;
        // SAFETY: the caller's promise.
        Cuda::with_stream(unsafe { context.wrap_borrowed_stream(stream.cast()) })
    }
}

/// The primary context of a device, after making sure that asking for it does not panic.
pub(super) fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    let count = probe::device_count()?;
    if ordinal >= count {
        let reason = format!("there is no device {ordinal}; the driver finds {count}");
        return Err(Error::Device { call: "probe".into(), reason });
    }
    CudaContext::new(ordinal).map_err(driver("cuDevicePrimaryCtxRetain"))
}

/// Elements with undefined contents, ordered on `stream`. Kernels write them before anything reads them.
pub(super) fn allocate<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    tensor: &'static str,
    len: usize,
) -> Result<CudaSlice<T>> {
    let bytes = len.saturating_mul(size_of::<T>());
    let short = |error: cudarc::driver::DriverError| match error.0 {
        cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::Allocation { tensor, bytes },
        _ => driver("cuMemAllocAsync")(error),
    };
    // SAFETY: nothing of this crate reads the elements before a kernel or a copy wrote them.
    let slice = unsafe { stream.alloc::<T>(len.max(1)) }.map_err(short)?;
    if len > 0 {
        return Ok(slice);
    }
    // The driver allocates nothing of size 0: an allocation of one element that shows none.
    let address = slice.leak();
    // SAFETY: the allocation was just given up by its only owner, and 0 elements fit it.
    Ok(unsafe { stream.upgrade_device_ptr(address, 0) })
}

/// A copy of `host` in device memory.
pub(super) fn upload<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    tensor: &'static str,
    host: &[T],
) -> Result<CudaSlice<T>> {
    let mut slice = allocate(stream, tensor, host.len())?;
    if !host.is_empty() {
        stream.memcpy_htod(host, &mut slice).map_err(driver("cuMemcpyHtoDAsync"))?;
    }
    Ok(slice)
}

/// A copy of `slice` in host memory; waits for it.
pub(super) fn download<T: DeviceRepr + ValidAsZeroBits + Default + Clone>(
    stream: &Arc<CudaStream>,
    slice: &CudaSlice<T>,
) -> Result<Vec<T>> {
    let mut host = vec![T::default(); slice.len()];
    if !host.is_empty() {
        stream.memcpy_dtoh(slice, &mut host).map_err(driver("cuMemcpyDtoHAsync"))?;
    }
    stream.synchronize().map_err(driver("cuStreamSynchronize"))?;
    Ok(host)
}

/// The header at the start of `memory`; waits for it.
pub(super) fn read_header(stream: &Arc<CudaStream>, memory: &CudaSlice<u8>) -> Result<LceHeader> {
    let mut header = LceHeader::default();
    let bytes = bytemuck::bytes_of_mut(&mut header);
    let view = memory.slice(..bytes.len());
    stream.memcpy_dtoh(&view, bytes).map_err(driver("cuMemcpyDtoHAsync"))?;
    stream.synchronize().map_err(driver("cuStreamSynchronize"))?;
    Ok(header)
}

/// A copy of the header at the start of `memory`, without waiting.
pub(super) fn copy_header(stream: &Arc<CudaStream>, memory: &CudaSlice<u8>) -> Result<CudaSlice<u8>> {
    let bytes = size_of::<LceHeader>();
    let mut copy = allocate::<u8>(stream, "telemetry", bytes)?;
    {
        let (from, _read) = memory.device_ptr(stream);
        let (to, _written) = copy.device_ptr_mut(stream);
        // SAFETY: both hold at least a header; the guards order the copy with other uses.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
            .map_err(driver("cuMemcpyDtoDAsync"))?;
    }
    Ok(copy)
}
