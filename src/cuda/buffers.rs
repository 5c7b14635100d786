//! Tensors in device memory: cudarc's slices and views, of any element type that the operation takes.

use super::raw::{self, RawSlice};
use crate::memory::{Buffer, Memory, Values};
use crate::{DType, Error, Forward, Result, Telemetry};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, SyncOnDrop};
use half::{bf16, f16};
use std::fmt;

/// Memory of a CUDA device.
///
/// Values are not read before a kernel reads them: a target out of range makes its token's outputs NaN, and
/// [`Forward::check`](crate::Forward) says where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory;

impl Memory for DeviceMemory {
    type Slice<'a> = DeviceSlice<'a>;
    type SliceMut<'a> = DeviceSliceMut<'a>;
    type Owned = DeviceBuffer;
    type Floats = CudaSlice<f32>;
    type Indices = CudaSlice<u32>;
    type Scalar = DeviceScalar;
    type Counters = DeviceTelemetry;

    fn check_values(_: &Values<'_, Self>) -> Result<()> {
        Ok(()) // the kernels look
    }
}

/// A borrowed device buffer of any [`DType`]. Made by `From` out of `&CudaSlice<T>` or `&CudaView<T>`; out of an address
/// by [`DeviceSlice::from_raw`].
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum DeviceSlice<'a> {
    /// `f32` elements.
    F32(&'a (dyn DevicePtr<f32> + 'a)),
    /// `f16` elements.
    F16(&'a (dyn DevicePtr<f16> + 'a)),
    /// `bf16` elements.
    BF16(&'a (dyn DevicePtr<bf16> + 'a)),
    /// `i64` elements.
    I64(&'a (dyn DevicePtr<i64> + 'a)),
    /// `i32` elements.
    I32(&'a (dyn DevicePtr<i32> + 'a)),
    /// `u32` elements.
    U32(&'a (dyn DevicePtr<u32> + 'a)),
    /// Elements at an address.
    Raw(RawSlice<'a>),
}

/// A writable device buffer of floating-point elements. Made by `From` out of `&mut CudaSlice<T>` or
/// `&mut CudaViewMut<T>`; out of an address by [`DeviceSliceMut::from_raw`].
#[non_exhaustive]
pub enum DeviceSliceMut<'a> {
    /// `f32` elements.
    F32(&'a mut (dyn DevicePtrMut<f32> + 'a)),
    /// `f16` elements.
    F16(&'a mut (dyn DevicePtrMut<f16> + 'a)),
    /// `bf16` elements.
    BF16(&'a mut (dyn DevicePtrMut<bf16> + 'a)),
    /// Elements at an address, which nothing else uses.
    Raw(RawSlice<'a>),
}

/// An owned device buffer of floating-point elements: a gradient.
#[derive(Debug)]
#[non_exhaustive]
pub enum DeviceBuffer {
    /// `f32` elements.
    F32(CudaSlice<f32>),
    /// `f16` elements.
    F16(CudaSlice<f16>),
    /// `bf16` elements.
    BF16(CudaSlice<bf16>),
}

impl Buffer for DeviceSlice<'_> {
    fn len(&self) -> usize {
        match self {
            DeviceSlice::F32(s) => s.len(),
            DeviceSlice::F16(s) => s.len(),
            DeviceSlice::BF16(s) => s.len(),
            DeviceSlice::I64(s) => s.len(),
            DeviceSlice::I32(s) => s.len(),
            DeviceSlice::U32(s) => s.len(),
            DeviceSlice::Raw(s) => s.len(),
        }
    }
    fn dtype(&self) -> DType {
        match self {
            DeviceSlice::F32(_) => DType::F32,
            DeviceSlice::F16(_) => DType::F16,
            DeviceSlice::BF16(_) => DType::BF16,
            DeviceSlice::I64(_) => DType::I64,
            DeviceSlice::I32(_) => DType::I32,
            DeviceSlice::U32(_) => DType::U32,
            DeviceSlice::Raw(s) => s.dtype(),
        }
    }
}

impl Buffer for DeviceSliceMut<'_> {
    fn len(&self) -> usize {
        match self {
            DeviceSliceMut::F32(s) => s.len(),
            DeviceSliceMut::F16(s) => s.len(),
            DeviceSliceMut::BF16(s) => s.len(),
            DeviceSliceMut::Raw(s) => s.len(),
        }
    }
    fn dtype(&self) -> DType {
        match self {
            DeviceSliceMut::F32(_) => DType::F32,
            DeviceSliceMut::F16(_) => DType::F16,
            DeviceSliceMut::BF16(_) => DType::BF16,
            DeviceSliceMut::Raw(s) => s.dtype(),
        }
    }
}

impl Buffer for DeviceBuffer {
    fn len(&self) -> usize {
        match self {
            DeviceBuffer::F32(s) => s.len(),
            DeviceBuffer::F16(s) => s.len(),
            DeviceBuffer::BF16(s) => s.len(),
        }
    }
    fn dtype(&self) -> DType {
        match self {
            DeviceBuffer::F32(_) => DType::F32,
            DeviceBuffer::F16(_) => DType::F16,
            DeviceBuffer::BF16(_) => DType::BF16,
        }
    }
}

impl DeviceSlice<'_> {
    /// The address, for work on `stream`; whoever writes the buffer next, through cudarc, waits for the guard's drop.
    pub(super) fn address<'s>(&'s self, stream: &'s CudaStream) -> Result<(u64, Option<SyncOnDrop<'s>>)> {
        let (address, guard) = match self {
            DeviceSlice::F32(s) => on_device(stream, s.stream()).map(|()| s.device_ptr(stream))?,
            DeviceSlice::F16(s) => on_device(stream, s.stream()).map(|()| s.device_ptr(stream))?,
            DeviceSlice::BF16(s) => on_device(stream, s.stream()).map(|()| s.device_ptr(stream))?,
            DeviceSlice::I64(s) => on_device(stream, s.stream()).map(|()| s.device_ptr(stream))?,
            DeviceSlice::I32(s) => on_device(stream, s.stream()).map(|()| s.device_ptr(stream))?,
            DeviceSlice::U32(s) => on_device(stream, s.stream()).map(|()| s.device_ptr(stream))?,
            DeviceSlice::Raw(s) => return Ok((s.address(), None)),
        };
        Ok((address, Some(guard)))
    }
}

impl DeviceSliceMut<'_> {
    /// The address, for work on `stream`; whoever uses the buffer next, through cudarc, waits for the guard's drop.
    pub(super) fn address<'s>(&'s mut self, stream: &'s CudaStream) -> Result<(u64, Option<SyncOnDrop<'s>>)> {
        let (address, guard) = match self {
            DeviceSliceMut::F32(s) => on_device(stream, s.stream()).map(|()| s.device_ptr_mut(stream))?,
            DeviceSliceMut::F16(s) => on_device(stream, s.stream()).map(|()| s.device_ptr_mut(stream))?,
            DeviceSliceMut::BF16(s) => on_device(stream, s.stream()).map(|()| s.device_ptr_mut(stream))?,
            DeviceSliceMut::Raw(s) => return Ok((s.address(), None)),
        };
        Ok((address, Some(guard)))
    }
}

fn on_device(ours: &CudaStream, theirs: &CudaStream) -> Result<()> {
    let (ours, theirs) = (ours.context().ordinal(), theirs.context().ordinal());
    if ours == theirs {
        return Ok(());
    }
    Err(Error::Device {
        call: "inputs".into(),
        reason: format!("a tensor is on device {theirs}, the backend on {ours}"),
    })
}

impl DeviceBuffer {
    /// Its elements, for writing.
    pub fn as_mut(&mut self) -> DeviceSliceMut<'_> {
        match self {
            DeviceBuffer::F32(s) => s.into(),
            DeviceBuffer::F16(s) => s.into(),
            DeviceBuffer::BF16(s) => s.into(),
        }
    }

    /// Its elements, where they are `f32`.
    pub fn as_f32(&self) -> Option<&CudaSlice<f32>> {
        if let DeviceBuffer::F32(s) = self { Some(s) } else { None }
    }
}

macro_rules! from_slices {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a CudaSlice<$element>> for DeviceSlice<'a> {
            fn from(slice: &'a CudaSlice<$element>) -> Self { DeviceSlice::$variant(slice) }
        }
        impl<'a> From<&'a CudaView<'a, $element>> for DeviceSlice<'a> {
            fn from(view: &'a CudaView<'a, $element>) -> Self { DeviceSlice::$variant(view) }
        }
    )*};
}
from_slices!(f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u32 => U32);

macro_rules! from_slices_mut {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a mut CudaSlice<$element>> for DeviceSliceMut<'a> {
            fn from(slice: &'a mut CudaSlice<$element>) -> Self { DeviceSliceMut::$variant(slice) }
        }
        impl<'a, 'v: 'a> From<&'a mut CudaViewMut<'v, $element>> for DeviceSliceMut<'a> {
            fn from(view: &'a mut CudaViewMut<'v, $element>) -> Self { DeviceSliceMut::$variant(view) }
        }
    )*};
}
from_slices_mut!(f32 => F32, f16 => F16, bf16 => BF16);

macro_rules! debug {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({}, {})"), self.dtype(), self.len())
            }
        }
    )*};
}
debug!(DeviceSlice, DeviceSliceMut);

/// One `f32` in device memory, perhaps still being computed.
#[derive(Debug)]
pub struct DeviceScalar(pub(crate) CudaSlice<f32>);

impl DeviceScalar {
    /// The value; waits for the stream to get there.
    ///
    /// # Errors
    /// [`Error::Device`], also for what an earlier launch did wrong.
    pub fn read(&self) -> Result<f32> {
        Ok(raw::download(self.0.stream(), &self.0)?[0])
    }

    /// Where it is: a slice of one element.
    pub fn as_slice(&self) -> &CudaSlice<f32> {
        &self.0
    }
}

/// Counters of a backward pass in device memory, perhaps still being computed.
#[derive(Debug)]
pub struct DeviceTelemetry {
    pub(super) header: CudaSlice<u8>,
    pub(super) targets: TargetRange,
}

/// What a report of a target out of range says besides its position.
#[derive(Debug, Clone, Copy)]
pub(super) struct TargetRange {
    pub shift: usize,
    pub vocab: usize,
    pub ignore_index: i64,
}

impl DeviceTelemetry {
    /// The counters; waits for the stream to get there.
    ///
    /// # Errors
    /// [`Error::TargetOutOfRange`] where a target was neither a class nor the value to skip; [`Error::Device`].
    pub fn read(&self) -> Result<Telemetry> {
        let header = raw::read_header(self.header.stream(), &self.header)?;
        self.targets.check(&header)?;
        Ok(Telemetry {
            rows: header.num_rows.into(),
            candidates: header.candidates,
            kept_entries: header.kept_entries,
            kept_mass: header.kept_mass / f64::from(header.num_rows.max(1)),
            exact_rows: header.exact_rows.into(),
            raised_rows: header.raised_rows.into(),
        })
    }
}

impl TargetRange {
    pub fn check(&self, header: &super::abi::LceHeader) -> Result<()> {
        if header.bad_target_token == super::abi::NONE {
            return Ok(());
        }
        Err(Error::TargetOutOfRange {
            index: header.bad_target_token as usize + self.shift,
            value: header.bad_target,
            vocab: self.vocab,
            ignore_index: self.ignore_index,
        })
    }
}

impl Forward<DeviceMemory> {
    /// Waits for the forward, and says whether every target was a class or the value to skip. Where one was not, its
    /// token's outputs, and with them the loss, are NaN.
    ///
    /// # Errors
    /// [`Error::TargetOutOfRange`] for the first such target; [`Error::ForeignForward`]; [`Error::Device`].
    pub fn check(&self) -> Result<()> {
        self.own()?.check()
    }

    /// The ε that each token's entries are kept with: the filter's, or a larger one where [`Telemetry::raised_rows`] counts the
    /// row; 0 for tokens that are exact or ignored. Without capture it is the filter's: no row has been tested. Waits for the forward.
    ///
    /// # Errors
    /// [`Error::ForeignForward`]; [`Error::Device`].
    pub fn row_eps(&self) -> Result<Vec<f32>> {
        self.own()?.row_eps()
    }

    /// What this backend left for its backward.
    fn own(&self) -> Result<&super::Saved> {
        let saved = self.saved.downcast_ref::<super::Saved>();
        saved.ok_or_else(|| Error::ForeignForward { reason: "another backend computed it".into() })
    }

    /// What is a product of tiles in a backward by the same kernels. For tests.
    #[doc(hidden)]
    pub fn tiles(&self) -> Option<crate::plan::Tiles> {
        Some(self.saved.downcast_ref::<super::Saved>()?.plan.tiles)
    }
}

/// A new buffer with undefined contents.
pub(super) fn allocate(
    stream: &std::sync::Arc<CudaStream>,
    tensor: &'static str,
    dtype: DType,
    len: usize,
) -> Result<DeviceBuffer> {
    Ok(match dtype {
        DType::F32 => DeviceBuffer::F32(raw::allocate(stream, tensor, len)?),
        DType::F16 => DeviceBuffer::F16(raw::allocate(stream, tensor, len)?),
        DType::BF16 => DeviceBuffer::BF16(raw::allocate(stream, tensor, len)?),
        found => return Err(Error::DType { tensor, found, expected: "f32, f16 or bf16" }),
    })
}

/// Copies a float vector to the host, and waits.
pub(super) fn to_host(vector: &CudaSlice<f32>) -> Result<Vec<f32>> {
    raw::download(vector.stream(), vector)
}
