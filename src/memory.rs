//! Where tensors live. [`Host`] is ordinary memory; a device backend brings its own [`Memory`].

use crate::{DType, Element, Error, Result};
use half::{bf16, f16};
use std::fmt::Debug;

/// A kind of memory: what a borrowed tensor, an owned tensor and a number look like in it.
///
/// Every public type of this crate that holds data is generic over it and defaults to [`Host`], so a program that
/// stays on the CPU never names it.
pub trait Memory: Sized + Debug + 'static {
    /// A borrowed, read-only, contiguous buffer of any [`DType`].
    type Slice<'a>: Buffer + Copy + Debug;
    /// A borrowed, writable, contiguous buffer of a floating-point [`DType`].
    type SliceMut<'a>: Buffer + Debug;
    /// An owned buffer of a floating-point [`DType`]: a gradient.
    type Owned: Buffer + Debug;
    /// An owned vector of `f32`: a per-token output.
    type Floats: Debug;
    /// An owned vector of `u32`: class indices.
    type Indices: Debug;
    /// One `f32`: the loss. On a device it may still be in flight.
    type Scalar: Debug;
    /// Counters of a backward pass. On a device they may still be in flight.
    type Counters: Debug;

    /// Checks values that this memory can read without waiting: targets in range, weights finite.
    ///
    /// Memories that cannot (devices) return `Ok` and leave the check to their kernels.
    ///
    /// # Errors
    /// [`Error::TargetOutOfRange`], [`Error::Weight`].
    fn check_values(values: &Values<'_, Self>) -> Result<()>;
}

/// What [`Memory::check_values`] looks at.
#[derive(Debug)]
pub struct Values<'a, M: Memory> {
    /// Class indices, `[N]`.
    pub targets: M::Slice<'a>,
    /// Number of classes V.
    pub vocab: usize,
    /// Target value that marks a token to skip.
    pub ignore_index: i64,
    /// Weight of each class, `[V]`.
    pub class_weights: Option<M::Slice<'a>>,
    /// Weight of each token, `[N]`.
    pub token_weights: Option<M::Slice<'a>>,
}

/// What validation needs to know of a buffer, wherever it lives.
pub trait Buffer {
    /// Number of elements.
    fn len(&self) -> usize;
    /// Element type.
    fn dtype(&self) -> DType;
    /// Whether there are no elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Ordinary memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host;

impl Memory for Host {
    type Slice<'a> = HostSlice<'a>;
    type SliceMut<'a> = HostSliceMut<'a>;
    type Owned = HostBuffer;
    type Floats = Vec<f32>;
    type Indices = Vec<u32>;
    type Scalar = f32;
    type Counters = crate::Telemetry;

    fn check_values(values: &Values<'_, Self>) -> Result<()> {
        for index in 0..values.targets.len() {
            let value = values.targets.index_at(index);
            if value != values.ignore_index && usize::try_from(value).map_or(true, |t| t >= values.vocab) {
                return Err(Error::TargetOutOfRange {
                    index,
                    value,
                    vocab: values.vocab,
                    ignore_index: values.ignore_index,
                });
            }
        }
        let check = |tensor, weights: Option<HostSlice<'_>>, legal: fn(f32) -> bool, requirement| {
            let Some(weights) = weights else { return Ok(()) };
            match (0..weights.len()).find(|&i| !legal(weights.float_at(i))) {
                None => Ok(()),
                Some(index) => Err(Error::Weight { tensor, index, value: weights.float_at(index), requirement }),
            }
        };
        check("class_weights", values.class_weights, |w| w.is_finite() && w >= 0.0, "finite and not negative")?;
        check("token_weights", values.token_weights, f32::is_finite, "finite")
    }
}

/// A borrowed host buffer of any [`DType`]. Made by `From` out of a slice.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum HostSlice<'a> {
    /// `f32` elements.
    F32(&'a [f32]),
    /// `f16` elements.
    F16(&'a [f16]),
    /// `bf16` elements.
    BF16(&'a [bf16]),
    /// `i64` elements.
    I64(&'a [i64]),
    /// `i32` elements.
    I32(&'a [i32]),
    /// `u32` elements.
    U32(&'a [u32]),
}

/// A writable host buffer of floating-point elements. Made by `From` out of a slice.
#[derive(Debug)]
#[non_exhaustive]
pub enum HostSliceMut<'a> {
    /// `f32` elements.
    F32(&'a mut [f32]),
    /// `f16` elements.
    F16(&'a mut [f16]),
    /// `bf16` elements.
    BF16(&'a mut [bf16]),
}

/// An owned host buffer of floating-point elements.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum HostBuffer {
    /// `f32` elements.
    F32(Vec<f32>),
    /// `f16` elements.
    F16(Vec<f16>),
    /// `bf16` elements.
    BF16(Vec<bf16>),
}

macro_rules! per_variant {
    ($value:expr, [$($variant:ident),*], $slice:ident => $body:expr) => {
        match $value { $(Self::$variant($slice) => $body),* }
    };
}

impl Buffer for HostSlice<'_> {
    fn len(&self) -> usize {
        per_variant!(self, [F32, F16, BF16, I64, I32, U32], s => s.len())
    }
    fn dtype(&self) -> DType {
        match self {
            HostSlice::F32(_) => DType::F32,
            HostSlice::F16(_) => DType::F16,
            HostSlice::BF16(_) => DType::BF16,
            HostSlice::I64(_) => DType::I64,
            HostSlice::I32(_) => DType::I32,
            HostSlice::U32(_) => DType::U32,
        }
    }
}

impl Buffer for HostSliceMut<'_> {
    fn len(&self) -> usize {
        per_variant!(self, [F32, F16, BF16], s => s.len())
    }
    fn dtype(&self) -> DType {
        match self {
            HostSliceMut::F32(_) => DType::F32,
            HostSliceMut::F16(_) => DType::F16,
            HostSliceMut::BF16(_) => DType::BF16,
        }
    }
}

impl Buffer for HostBuffer {
    fn len(&self) -> usize {
        self.as_slice().len()
    }
    fn dtype(&self) -> DType {
        self.as_slice().dtype()
    }
}

impl HostSlice<'_> {
    /// The element at `index` as an integer; floating-point buffers are never asked (validation saw to it).
    pub(crate) fn index_at(&self, index: usize) -> i64 {
        match self {
            HostSlice::I64(s) => s[index],
            HostSlice::I32(s) => s[index].into(),
            HostSlice::U32(s) => s[index].into(),
            HostSlice::F32(_) | HostSlice::F16(_) | HostSlice::BF16(_) => i64::MIN,
        }
    }

    /// The element at `index` as `f32`; integer buffers are never asked (validation saw to it).
    pub(crate) fn float_at(&self, index: usize) -> f32 {
        match self {
            HostSlice::F32(s) => s[index],
            HostSlice::F16(s) => s[index].to_f32(),
            HostSlice::BF16(s) => s[index].to_f32(),
            HostSlice::I64(_) | HostSlice::I32(_) | HostSlice::U32(_) => f32::NAN,
        }
    }
}

impl HostBuffer {
    /// A zeroed buffer.
    ///
    /// # Errors
    /// [`Error::Allocation`] where memory is short, [`Error::DType`] for an integer type.
    pub fn zeros(tensor: &'static str, dtype: DType, len: usize) -> Result<Self> {
        fn zeroed<T: Clone>(tensor: &'static str, zero: T, len: usize) -> Result<Vec<T>> {
            let bytes = len.saturating_mul(size_of::<T>());
            // A probing reservation turns an allocation failure into an error; `vec!` then gets lazily zeroed pages.
            Vec::<T>::new().try_reserve_exact(len).map_err(|_| Error::Allocation { tensor, bytes })?;
            Ok(vec![zero; len])
        }
        Ok(match dtype {
            DType::F32 => HostBuffer::F32(zeroed(tensor, 0.0, len)?),
            DType::F16 => HostBuffer::F16(zeroed(tensor, f16::ZERO, len)?),
            DType::BF16 => HostBuffer::BF16(zeroed(tensor, bf16::ZERO, len)?),
            found => return Err(Error::DType { tensor, found, expected: "f32, f16 or bf16" }),
        })
    }

    /// The elements, borrowed.
    pub fn as_slice(&self) -> HostSlice<'_> {
        match self {
            HostBuffer::F32(v) => HostSlice::F32(v),
            HostBuffer::F16(v) => HostSlice::F16(v),
            HostBuffer::BF16(v) => HostSlice::BF16(v),
        }
    }

    /// The elements, borrowed for writing.
    pub fn as_mut(&mut self) -> HostSliceMut<'_> {
        match self {
            HostBuffer::F32(v) => HostSliceMut::F32(v),
            HostBuffer::F16(v) => HostSliceMut::F16(v),
            HostBuffer::BF16(v) => HostSliceMut::BF16(v),
        }
    }

    /// The elements where they are `f32`.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if let HostBuffer::F32(v) = self { Some(v) } else { None }
    }

    /// A copy widened to `f32`, exactly.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        fn widened<T: Element>(source: &[T]) -> Vec<f32> {
            let mut target = vec![0.0; source.len()];
            T::widen(source, &mut target);
            target
        }
        match self {
            HostBuffer::F32(v) => v.clone(),
            HostBuffer::F16(v) => widened(v),
            HostBuffer::BF16(v) => widened(v),
        }
    }
}

macro_rules! from_slices {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a [$element]> for HostSlice<'a> {
            fn from(slice: &'a [$element]) -> Self { HostSlice::$variant(slice) }
        }
        impl<'a> From<&'a Vec<$element>> for HostSlice<'a> {
            fn from(vec: &'a Vec<$element>) -> Self { HostSlice::$variant(vec) }
        }
        impl<'a, const N: usize> From<&'a [$element; N]> for HostSlice<'a> {
            fn from(array: &'a [$element; N]) -> Self { HostSlice::$variant(array) }
        }
    )*};
}
from_slices!(f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u32 => U32);

macro_rules! from_slices_mut {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a mut [$element]> for HostSliceMut<'a> {
            fn from(slice: &'a mut [$element]) -> Self { HostSliceMut::$variant(slice) }
        }
        impl<'a> From<&'a mut Vec<$element>> for HostSliceMut<'a> {
            fn from(vec: &'a mut Vec<$element>) -> Self { HostSliceMut::$variant(vec) }
        }
    )*};
}
from_slices_mut!(f32 => F32, f16 => F16, bf16 => BF16);
