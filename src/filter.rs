//! The random numbers of the unbiased filter: part of the specification, the same on every backend.
//!
//! Entry (token i, class v) is kept iff `p >= eps * u(i, v)`. `u` walks along a row as a Weyl sequence with golden-ratio
//! step from one hashed start a row, so that a kernel spends one integer addition a logit, and the numbers of a row are
//! better spread than independent ones (lower variance). Over seeds, each `u(i, v)` is uniform.
//!
//! The walk takes the classes of each 64 in bit-reversed order: u of the sequence's places k and k + 8, or any other
//! Fibonacci number, nearly agree, and in the order of a tokenizer so do those classes' probabilities. They would be kept
//! or dropped together (measured, DESIGN.md section 6).

/// 2^32 / golden ratio, rounded to odd: the step of the sequence along a row. Odd, so its period is 2^32.
pub const WEYL_STEP: u32 = 0x9E37_79B9;

/// How far class `class` lies along every row's sequence. The offset of `a | b` is the sum of the offsets of `a` and `b` where
/// no bit is set in both: a tile's start and a place in it can be added.
#[inline(always)]
pub const fn class_offset(class: u32) -> u32 {
    ((class & !63) | ((class & 63).reverse_bits() >> 26)).wrapping_mul(WEYL_STEP)
}

/// Start of token `token`'s sequence: the upper half of SplitMix64's output function (Steele et al. 2014) over both.
#[inline]
pub fn row_start(seed: u64, token: usize) -> u32 {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    let key = mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15));
    (mix(key ^ (token as u64).wrapping_mul(0xD1B5_4A32_D192_ED03)) >> 32) as u32
}

/// A 32-bit state as a number in (0, 1]: exact near 0, where small probabilities are decided.
#[inline(always)]
pub fn uniform(state: u32) -> f32 {
    (state as f32 + 0.5) * (1.0 / 4_294_967_296.0)
}

/// `u(token, class)` for the row that starts at `start`.
#[inline(always)]
pub fn entry_uniform(start: u32, class: u32) -> f32 {
    uniform(start.wrapping_add(class_offset(class)))
}
