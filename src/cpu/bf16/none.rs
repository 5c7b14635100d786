//! For processors other than x86-64: [`super::multiplies_bf16`] is false, so that nobody has anything packed.

use super::{LEFT, RIGHT};
use half::bf16;

pub fn multiply(_: &mut [f32; LEFT * RIGHT], _: &[u32], _: &[u32]) {
    unreachable!("no packed operand")
}

pub fn pack_16(_: &mut [u32], _: &[&[bf16]; 16], _: usize) {
    unreachable!("no packed operand")
}
