//! The materialising baseline: the best simple implementation. One matmul to N×V f32 logits, softmax in place by rows
//! in parallel, two matmuls for the gradients; every buffer allocated once and reused.
//!
//! 16-bit inputs are widened first, as a caller of an f32 matmul has to; the f32 dC then takes the place of the widened
//! classifier, so that nothing is larger than it must be. Where the processor multiplies bf16, all three products are of bf16, as the
//! library's are. One exponential a logit: the forward leaves `exp(z - max)`
//! behind, the backward only scales it.

use super::matmul::{View, multiply};
use super::workload::Workload;
use cut_cross_entropy::cpu::{multiplies_bf16, plain_bf16};
use cut_cross_entropy::{Element, HostBuffer, HostSlice, HostSliceMut};
use half::bf16;
use rayon::prelude::*;

/// Buffers of the baseline, warm after the first step.
#[derive(Default)]
pub struct Baseline {
    /// Logits [N, V]; after the forward `exp(z - max)`, after the backward dL/dz.
    plane: Vec<f32>,
    /// Widened inputs and f32 gradients; empty for f32.
    embeddings: Vec<f32>,
    classifier: Vec<f32>,
    d_embeddings: Vec<f32>,
    inverse_sums: Vec<f32>,
    /// Negative log-likelihood of each token, 0 where it is ignored.
    pub nll: Vec<f32>,
    /// Log-sum-exp of each token, 0 where it is ignored.
    pub lse: Vec<f32>,
}

impl Baseline {
    /// Bytes that it holds between calls, beyond inputs and outputs.
    pub fn buffer_bytes(&self) -> usize {
        let buffers = [&self.plane, &self.embeddings, &self.classifier, &self.d_embeddings, &self.inverse_sums];
        buffers.iter().map(|b| b.len() * size_of::<f32>()).sum()
    }

    /// The plain matmul of the size of the logits that every other time is a multiple of; destroys the forward's state.
    pub fn multiply_only(&mut self, workload: &Workload) {
        let shape = workload.shape;
        self.plane.resize(shape.tokens * shape.vocab, 0.0);
        if let Some((e, c)) = native(workload) {
            return plain_bf16::logits(&mut self.plane, e, c, shape);
        }
        multiply(
            &mut self.plane,
            View::new(workload.wide_embeddings(), shape.tokens, shape.hidden),
            View::new(workload.wide_classifier(), shape.vocab, shape.hidden).transposed(),
        );
    }

    /// Mean loss over the tokens that are not ignored. Their rows alone need a softmax, but the matmul has all.
    pub fn forward(&mut self, workload: &Workload) -> f32 {
        let shape = workload.shape;
        self.plane.resize(shape.tokens * shape.vocab, 0.0);
        for per_token in [&mut self.inverse_sums, &mut self.nll, &mut self.lse] {
            per_token.resize(shape.tokens, 0.0);
        }
        if let Some((e, c)) = native(workload) {
            plain_bf16::logits(&mut self.plane, e, c, shape);
        } else {
            let e = widened(&workload.embeddings, &mut self.embeddings);
            let c = widened(&workload.classifier, &mut self.classifier);
            multiply(
                &mut self.plane,
                View::new(e, shape.tokens, shape.hidden),
                View::new(c, shape.vocab, shape.hidden).transposed(),
            );
        }
        self.plane
            .par_chunks_mut(shape.vocab)
            .zip(&mut self.inverse_sums)
            .zip(&mut self.nll)
            .zip(&mut self.lse)
            .enumerate()
            .for_each(|(token, (((row, inverse_sum), nll), lse))| {
                let Some(target) = workload.target(token) else {
                    (*inverse_sum, *nll, *lse) = (0.0, 0.0, 0.0);
                    return;
                };
                if workload.softcap.is_some() {
                    row.iter_mut().for_each(|z| *z = workload.capped(f64::from(*z)) as f32);
                }
                let target_logit = row[target];
                let (max, sum) = exponentials(row);
                *inverse_sum = 1.0 / sum;
                *lse = max + sum.ln();
                *nll = max - target_logit + sum.ln();
            });
        (self.nll.iter().map(|&l| f64::from(l)).sum::<f64>() / workload.rows().max(1) as f64) as f32
    }

    /// Gradients of the mean loss; to be called once after each forward.
    pub fn backward(&mut self, workload: &Workload, d_embeddings: &mut HostBuffer, d_classifier: &mut HostBuffer) {
        let shape = workload.shape;
        let weight = 1.0 / workload.rows().max(1) as f32;
        let rows = self.plane.par_chunks_mut(shape.vocab).zip(&self.inverse_sums).zip(&self.lse).zip(&self.nll);
        rows.enumerate().for_each(|(token, (((row, &inverse_sum), &lse), &nll))| {
            let Some(target) = workload.target(token) else { return row.fill(0.0) };
            let factor = weight * inverse_sum;
            row.iter_mut().for_each(|p| *p *= factor);
            if workload.softcap.is_none() {
                row[target] -= weight;
                return;
            }
            // The logit back from its probability: the plane no longer has it.
            for (v, g) in row.iter_mut().enumerate() {
                let is_target = v == target;
                let z = if is_target { lse - nll } else { lse + (*g / weight).ln() };
                let entry = if is_target { *g - weight } else { *g };
                *g = if entry == 0.0 { 0.0 } else { entry * workload.capped_derivative(f64::from(z)) as f32 };
            }
        });
        if let Some((e, c)) = native(workload) {
            self.d_embeddings.resize(shape.tokens * shape.hidden, 0.0);
            self.classifier.resize(shape.vocab * shape.hidden, 0.0); // dC
            plain_bf16::d_embeddings(&mut self.d_embeddings, &self.plane, c, shape);
            plain_bf16::d_classifier(&mut self.classifier, &self.plane, e, shape);
            narrow(&self.d_embeddings, d_embeddings);
            narrow(&self.classifier, d_classifier);
            return;
        }
        let plane = View::new(&self.plane, shape.tokens, shape.vocab);
        let e = View::new(
            workload.embeddings.as_f32().unwrap_or(&self.embeddings), // widened by the forward
            shape.tokens,
            shape.hidden,
        );
        match (workload.classifier.as_f32(), d_embeddings, d_classifier) {
            (Some(c), HostBuffer::F32(d_embeddings), HostBuffer::F32(d_classifier)) => {
                multiply(d_embeddings, plane, View::new(c, shape.vocab, shape.hidden));
                multiply(d_classifier, plane.transposed(), e);
            }
            (_, d_embeddings, d_classifier) => {
                self.d_embeddings.resize(shape.tokens * shape.hidden, 0.0);
                multiply(&mut self.d_embeddings, plane, View::new(&self.classifier, shape.vocab, shape.hidden));
                multiply(&mut self.classifier, plane.transposed(), e);
                narrow(&self.d_embeddings, d_embeddings);
                narrow(&self.classifier, d_classifier);
            }
        }
    }
}

/// Embeddings and classifier where the processor multiplies them as they are.
fn native(workload: &Workload) -> Option<(&[bf16], &[bf16])> {
    match (workload.embeddings.as_slice(), workload.classifier.as_slice()) {
        (HostSlice::BF16(e), HostSlice::BF16(c)) if multiplies_bf16() => Some((e, c)),
        _ => None,
    }
}

/// Replaces each logit by `exp(z - max)`; the maximum and the sum.
fn exponentials(row: &mut [f32]) -> (f32, f32) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            const LANES: usize = 16;
            let mut max = [f32::NEG_INFINITY; LANES];
            let mut chunks = row.chunks_exact(LANES);
            for chunk in &mut chunks {
                max.iter_mut().zip(chunk).for_each(|(m, &z)| *m = if z > *m { z } else { *m });
            }
            let max = max.iter().chain(chunks.remainder()).copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sums = [0.0_f32; LANES];
            let mut chunks = row.chunks_exact_mut(LANES);
            for chunk in &mut chunks {
                for (s, z) in sums.iter_mut().zip(chunk) {
                    *z = exp(*z - max);
                    *s += *z;
                }
            }
            let mut sum: f32 = sums.iter().sum();
            for z in chunks.into_remainder() {
                *z = exp(*z - max);
                sum += *z;
            }
            (max, sum)
        },
    )
}

/// `e^x` for `x <= 0`, relative error below 3e-7, written so that it vectorises: 2^n by the exponent bits, the rest by
/// Taylor's polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
#[inline(always)]
fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4; // ln 2 in two parts
    let mut y = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + c;
    }
    y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000))
}

/// The elements as f32: themselves, or widened into `scratch`.
fn widened<'a>(source: &'a HostBuffer, scratch: &'a mut Vec<f32>) -> &'a [f32] {
    if let Some(already) = source.as_f32() {
        return already;
    }
    widen_into(source.as_slice(), scratch);
    scratch
}

const CHUNK: usize = 1 << 16;

/// Widens a floating-point slice, in parallel.
pub fn widen_into(source: HostSlice<'_>, target: &mut Vec<f32>) {
    fn widen<T: Element>(source: &[T], target: &mut Vec<f32>) {
        target.resize(source.len(), 0.0);
        source.par_chunks(CHUNK).zip(target.par_chunks_mut(CHUNK)).for_each(|(s, t)| T::widen(s, t));
    }
    match source {
        HostSlice::F32(s) => widen(s, target),
        HostSlice::F16(s) => widen(s, target),
        HostSlice::BF16(s) => widen(s, target),
        _ => panic!("not a floating-point slice"),
    }
}

/// Rounds to the target's dtype, in parallel.
pub fn narrow(source: &[f32], target: &mut HostBuffer) {
    fn round<T: Element>(source: &[f32], target: &mut [T]) {
        source.par_chunks(CHUNK).zip(target.par_chunks_mut(CHUNK)).for_each(|(s, t)| T::narrow(s, t));
    }
    match target.as_mut() {
        HostSliceMut::F32(t) => round(source, t),
        HostSliceMut::F16(t) => round(source, t),
        HostSliceMut::BF16(t) => round(source, t),
        _ => panic!("not a floating-point buffer"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_within_its_error_bound() {
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(super::exp(x)) - exact).abs() / exact;
            assert!(error <= 3e-7, "exp({x}): relative error {error:e}");
        }
    }
}
