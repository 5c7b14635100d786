//! Element types, and the one place where 16-bit floats become `f32`.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of an `f32`.
    BF16,
    /// Signed 64-bit integer (targets).
    I64,
    /// Signed 32-bit integer (targets).
    I32,
    /// Unsigned 32-bit integer (targets).
    U32,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size_in_bytes(self) -> usize {
        match self {
            DType::F16 | DType::BF16 => 2,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::I64 => 8,
        }
    }

    /// Whether this is one of the floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U32 => "u32",
        })
    }
}

/// A floating-point element of embeddings, classifier or gradients.
///
/// Sealed: `f32`, `f16` and `bf16` are all there is. Arithmetic happens in `f32`; this trait only widens and rounds.
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {
    /// The type's name at run time.
    const DTYPE: DType;
    /// The value as `f32`, exactly.
    fn to_f32(self) -> f32;
    /// The nearest value of this type, ties to even; overflow becomes an infinity.
    fn from_f32(value: f32) -> Self;
    /// Widens a slice exactly. Lengths must agree.
    fn widen(source: &[Self], target: &mut [f32]);
    /// Rounds a slice to nearest, ties to even. Lengths must agree.
    fn narrow(source: &[f32], target: &mut [Self]);
    /// The elements of a buffer that holds this type.
    fn slice(buffer: crate::HostSlice<'_>) -> Option<&[Self]>;
    /// The elements themselves where they are `f32` already.
    fn as_f32(_source: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The elements themselves where they are `bf16`.
    fn as_bf16(_source: &[Self]) -> Option<&[bf16]> {
        None
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    fn slice(buffer: crate::HostSlice<'_>) -> Option<&[Self]> {
        if let crate::HostSlice::F32(s) = buffer { Some(s) } else { None }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn widen(source: &[Self], target: &mut [f32]) {
        target.copy_from_slice(source);
    }
    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [Self]) {
        target.copy_from_slice(source);
    }
    fn as_f32(source: &[Self]) -> Option<&[f32]> {
        Some(source)
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    fn slice(buffer: crate::HostSlice<'_>) -> Option<&[Self]> {
        if let crate::HostSlice::F16(s) = buffer { Some(s) } else { None }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    #[inline(always)]
    fn widen(source: &[Self], target: &mut [f32]) {
        source.convert_to_f32_slice(target);
    }
    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [Self]) {
        target.convert_from_f32_slice(source);
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    fn slice(buffer: crate::HostSlice<'_>) -> Option<&[Self]> {
        if let crate::HostSlice::BF16(s) = buffer { Some(s) } else { None }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn widen(source: &[Self], target: &mut [f32]) {
        assert_eq!(source.len(), target.len());
        for (t, s) in target.iter_mut().zip(source) {
            *t = Element::to_f32(*s);
        }
    }
    fn as_bf16(source: &[Self]) -> Option<&[bf16]> {
        Some(source)
    }
    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [Self]) {
        assert_eq!(source.len(), target.len());
        // Branch-free round to nearest even, so that it vectorises; a NaN keeps its sign and becomes quiet.
        for (t, s) in target.iter_mut().zip(source) {
            let bits = s.to_bits();
            let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
            let kept = if s.is_nan() { bits | 0x0040_0000 } else { rounded };
            *t = bf16::from_bits((kept >> 16) as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_like_the_half_crate_on_every_exponent() {
        let mut bits: u32 = 1;
        let mut source = Vec::new();
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            source.push(f32::from_bits(bits));
        }
        source.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE]);
        let mut ours = vec![bf16::ZERO; source.len()];
        <bf16 as Element>::narrow(&source, &mut ours);
        for (s, o) in source.iter().zip(&ours) {
            let theirs = bf16::from_f32(*s);
            assert!(o.to_bits() == theirs.to_bits() || (s.is_nan() && o.is_nan()), "{s:e}: {o:?} {theirs:?}");
        }
        let mut wide = vec![0.0; ours.len()];
        <bf16 as Element>::widen(&ours, &mut wide);
        assert!(wide.iter().zip(&ours).all(|(w, o)| w.to_bits() == o.to_f32().to_bits() || o.is_nan()));
    }
}
