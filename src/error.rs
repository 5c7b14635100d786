//! Everything that can be wrong with a call, found before any work starts.

use crate::DType;
use std::borrow::Cow;

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused. Each message names the tensor at fault, both shapes, and the index and value.
///
/// No call of the operation panics on its inputs: whatever is wrong arrives here.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two tensors disagree on a dimension that they share.
    #[error(
        "shape mismatch: {left} is {left_shape:?} and {right} is {right_shape:?}; \
         they must agree on {dimension}"
    )]
    ShapeMismatch {
        /// The first tensor.
        left: &'static str,
        /// Its shape.
        left_shape: Vec<usize>,
        /// The second tensor.
        right: &'static str,
        /// Its shape.
        right_shape: Vec<usize>,
        /// The shared dimension: `tokens`, `hidden` or `vocab`.
        dimension: &'static str,
    },
    /// A buffer holds fewer elements than its shape and row stride reach.
    #[error("{tensor}: shape {shape:?} with row stride {row_stride} needs {needed} elements, the buffer holds {len}")]
    BufferTooShort {
        /// The tensor at fault.
        tensor: &'static str,
        /// Its declared shape.
        shape: [usize; 2],
        /// Its declared row stride, in elements.
        row_stride: usize,
        /// Elements that the shape and stride reach.
        needed: usize,
        /// Elements that are there.
        len: usize,
    },
    /// A row stride shorter than a row: rows would overlap.
    #[error("{tensor}: row stride {row_stride} is shorter than a row of {columns} elements")]
    RowStride {
        /// The tensor at fault.
        tensor: &'static str,
        /// Its row stride, in elements.
        row_stride: usize,
        /// Its columns.
        columns: usize,
    },
    /// A tensor of an element type that this argument does not take.
    #[error("{tensor} has dtype {found}; expected {expected}")]
    DType {
        /// The tensor at fault.
        tensor: &'static str,
        /// Its element type.
        found: DType,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A target that is neither a class nor `ignore_index`.
    #[error("targets[{index}] is {value}, outside [0, {vocab}) and different from ignore_index {ignore_index}")]
    TargetOutOfRange {
        /// Position in `targets`.
        index: usize,
        /// The value there.
        value: i64,
        /// Number of classes V.
        vocab: usize,
        /// The value that would have been skipped.
        ignore_index: i64,
    },
    /// A weight that is NaN, infinite, or negative where that has no meaning.
    #[error("{tensor}[{index}] is {value}; it must be {requirement}")]
    Weight {
        /// `class_weights` or `token_weights`.
        tensor: &'static str,
        /// Position.
        index: usize,
        /// The value there.
        value: f32,
        /// What it must be.
        requirement: &'static str,
    },
    /// An option outside its range.
    #[error("option {option} is {value}; it must be {requirement}")]
    Option {
        /// The option's name in [`CceOptions`](crate::CceOptions).
        option: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        requirement: &'static str,
    },
    /// Sequence length and shift that do not fit the tokens.
    #[error("shift {shift} with sequences of {seq_len} tokens does not fit {tokens} tokens: {requirement}")]
    Shift {
        /// [`CceOptions::shift`](crate::CceOptions).
        shift: usize,
        /// Tokens a sequence.
        seq_len: usize,
        /// Tokens in all, N.
        tokens: usize,
        /// What is required.
        requirement: &'static str,
    },
    /// A size that does not fit the machine's integers, or an index that does not fit 32 bits.
    #[error("{what} overflows: {factors:?}")]
    Overflow {
        /// What was computed.
        what: &'static str,
        /// The factors of the product.
        factors: Vec<usize>,
    },
    /// Memory for an output could not be had.
    #[error("cannot allocate {bytes} bytes for {tensor}")]
    Allocation {
        /// The output.
        tensor: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// `cce_backward` was given the result of a forward over another problem or by another backend.
    #[error("this forward does not belong to these inputs: {reason}")]
    ForeignForward {
        /// How they differ.
        reason: String,
    },
    /// A GPU, its driver, or what is asked of it: the call that failed and why.
    #[error("CUDA: {call}: {reason}")]
    Device {
        /// The call into the driver or the compiler, `plan` for what the kernels cannot do, `probe` for a missing part.
        call: Cow<'static, str>,
        /// What is missing, or what the driver says.
        reason: String,
    },
    /// A gradient that was asked for but does not exist.
    #[error("{gradient} was asked for, but {reason}")]
    NoSuchGradient {
        /// The gradient.
        gradient: &'static str,
        /// Why it does not exist.
        reason: &'static str,
    },
}
