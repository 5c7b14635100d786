//! Checks a result in `f64` on a slice: some rows of everything that is per token and of dE, some rows of dC, and that ignored tokens
//! have zeros. The full oracle would take N·V·D scalar operations in `f64`; a slice of it is enough to refuse to time what is wrong.

use super::workload::Workload;
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{DType, GradientFilter, HostBuffer, filter};
use rayon::prelude::*;

/// Rows of dE and of the per-token outputs.
const ROWS: usize = 6;
/// Rows of dC.
const CLASSES: usize = 8;
/// How far, relative to its threshold, a probability may lie and still be kept by one and dropped by another.
const BORDERLINE: f64 = 1e-4;
/// Error of losses and of log-sum-exps beside that of the logits.
const PER_TOKEN: f64 = 1e-4;

/// The result of a forward and a backward of the mean loss.
#[derive(Clone, Copy)]
pub struct Outcome<'a> {
    pub loss: f32,
    pub nll: &'a [f32],
    pub lse: &'a [f32],
    /// dE and dC, where they were computed.
    pub gradients: Option<[&'a HostBuffer; 2]>,
    pub filter: GradientFilter,
    /// Rows that a sparse filter left to the exact path, in which case each row may be either.
    pub exact_rows: u64,
    /// ε of each token's entries, where it is not the filter's for all.
    pub row_eps: Option<&'a [f32]>,
    /// A baseline's softmax: the exponentials of a row are added up one after the other in f32.
    pub sums_plainly: bool,
    /// Logits by tensor cores in one sum of 16-bit products, which these do not round.
    pub cuts_off: bool,
}

/// Largest errors found, relative to the tolerance: all at most 1, or [`SliceOracle::check`] failed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Agreement {
    pub loss: f64,
    pub per_token: f64,
    pub d_embeddings: f64,
    pub d_classifier: f64,
}

/// Logits of a slice, in `f64`.
pub struct SliceOracle<'a> {
    workload: &'a Workload,
    /// The loss's derivative by the nll of a token that is not ignored.
    weight: f64,
    /// Some tokens that are.
    ignored: Vec<usize>,
    /// Token and its V logits.
    rows: Vec<(usize, Vec<f64>)>,
    /// Class and its N logits.
    classes: Vec<(usize, Vec<f64>)>,
}

impl<'a> SliceOracle<'a> {
    /// Computes the slice: first and last token and some between; frequent, rare and target classes.
    pub fn new(workload: &'a Workload) -> Self {
        let shape = workload.shape;
        let spread = |count: usize, of: usize| (0..count).map(move |k| k * of.saturating_sub(1) / (count - 1).max(1));
        let among = |tokens: &[usize]| -> Vec<usize> {
            spread(ROWS.min(tokens.len()), tokens.len()).map(|index| tokens[index]).collect()
        };
        let (with_target, without): (Vec<usize>, Vec<usize>) =
            (0..shape.tokens).partition(|&token| workload.target(token).is_some());
        let (mut rows, ignored) = (among(&with_target), among(&without));
        let mut classes: Vec<usize> = spread(CLASSES.min(shape.vocab), shape.vocab).collect();
        classes.extend(rows.iter().filter_map(|&i| workload.target(i)));
        for picked in [&mut rows, &mut classes] {
            picked.sort_unstable();
            picked.dedup();
        }
        let (e, c) = (workload.wide_embeddings(), workload.wide_classifier());
        let row = |matrix: &'a [f32], index: usize| &matrix[index * shape.hidden..][..shape.hidden];
        let logit = |i, v| workload.capped(dot(row(e, i), row(c, v)));
        let of_row = |i| (i, (0..shape.vocab).into_par_iter().map(|v| logit(i, v)).collect());
        let of_class = |v| (v, (0..shape.tokens).into_par_iter().map(|i| logit(i, v)).collect());
        let (rows, classes) = (rows.into_iter().map(of_row), classes.into_iter().map(of_class));
        let weight = 1.0 / with_target.len().max(1) as f64;
        SliceOracle { workload, weight, ignored, rows: rows.collect(), classes: classes.collect() }
    }

    /// By how much the sum behind a logit of this size may be off where tensor cores cut it off, after every 16 products on Hopper: each time
    /// by up to 2^-23 of the sum so far, always towards zero (Khattak and Mikaitis 2025, arXiv:2512.07004).
    fn cut_off(&self, outcome: &Outcome<'_>, logit: f64) -> f64 {
        let cuts = if outcome.cuts_off { self.workload.shape.hidden.div_ceil(16) } else { 0 };
        cuts as f64 * 2.0_f64.powi(-23) * logit.abs()
    }

    /// Size of the logits that matter to this log-sum-exp: those that are at least the mean of the exponentials.
    fn size_of(&self, lse: f64) -> f64 {
        lse.abs() + (self.workload.shape.vocab as f64).ln()
    }

    /// Compares; the message says what is wrong. NaN anywhere is wrong.
    pub fn check(&self, outcome: &Outcome<'_>) -> Result<Agreement, String> {
        let (workload, shape) = (self.workload, self.workload.shape);
        let mut worst = Agreement::default();
        // The softmax turns an absolute error of a logit into a relative one of the gradient.
        let dtype = workload.embeddings.as_slice().dtype();
        let gradient_tolerance = match dtype {
            DType::F32 => 2e-4,
            _ => 5e-3, // rounding of the result to 8 bits
        };
        let tolerance = |size: f64| PER_TOKEN + self.cut_off(outcome, size);
        let sizes = workload.survey.lse.iter().map(|&lse| self.size_of(lse));
        let mean = sizes.sum::<f64>() / workload.survey.lse.len().max(1) as f64;
        within(&mut worst.loss, "loss", f64::from(outcome.loss), workload.survey.loss, tolerance(mean))?;
        for (i, &lse) in workload.survey.lse.iter().enumerate() {
            let tolerance = tolerance(self.size_of(lse));
            within(&mut worst.per_token, &format!("lse[{i}]"), f64::from(outcome.lse[i]), lse, tolerance)?;
        }
        for (i, z) in &self.rows {
            let Some(target) = workload.target(*i) else { continue };
            let lse = log_sum_exp(z);
            let (nll, size) = (lse - z[target], self.size_of(lse));
            let (of_lse, of_nll) = (tolerance(size), tolerance(size.max(z[target].abs())));
            within(&mut worst.per_token, &format!("lse[{i}]"), f64::from(outcome.lse[*i]), lse, of_lse)?;
            within(&mut worst.per_token, &format!("nll[{i}]"), f64::from(outcome.nll[*i]), nll, of_nll)?;
            let Some([d_embeddings, _]) = outcome.gradients else { continue };
            let mut compare = |filter| {
                let entry = |v: usize| self.entry(outcome, filter, (*i, v), z[v], lse);
                let expected = combine(workload.wide_classifier(), shape.hidden, entry).rounded_to(dtype);
                let ours = row_of(d_embeddings, *i, shape.hidden);
                expected.compare(&mut worst.d_embeddings, &format!("d_embeddings[{i}]"), &ours, gradient_tolerance)
            };
            if outcome.exact_rows == 0 || compare(GradientFilter::Exact).is_err() {
                compare(outcome.filter)?;
            }
        }
        for &i in &self.ignored {
            let gradient = outcome.gradients.map(|[d_embeddings, _]| row_of(d_embeddings, i, shape.hidden));
            let values =
                [outcome.nll[i], outcome.lse[i]].map(f64::from).into_iter().chain(gradient.into_iter().flatten());
            // Written so that NaN fails.
            if let Some(value) = { values }.find(|&value| !(value == 0.0)) {
                return Err(format!("token {i} is ignored, but has {value:e}"));
            }
        }
        // Which rows took the exact path is not known here, so a class's sum over mixed rows cannot be predicted.
        let mixed = outcome.exact_rows > 0 && outcome.filter != GradientFilter::Exact;
        let Some([_, d_classifier]) = outcome.gradients.filter(|_| !mixed) else { return Ok(worst) };
        for (v, z) in &self.classes {
            let lse = &workload.survey.lse;
            let entry = |i: usize| self.entry(outcome, outcome.filter, (i, *v), z[i], lse[i]);
            let expected = combine(workload.wide_embeddings(), shape.hidden, entry).rounded_to(dtype);
            let ours = row_of(d_classifier, *v, shape.hidden);
            expected.compare(&mut worst.d_classifier, &format!("d_classifier[{v}]"), &ours, gradient_tolerance)?;
        }
        Ok(worst)
    }

    /// The loss's derivative by one product as the filter leaves it, and by how much it may differ if it lies on the threshold.
    fn entry(
        &self,
        outcome: &Outcome<'_>,
        filter: GradientFilter,
        (token, class): (usize, usize),
        z: f64,
        lse: f64,
    ) -> (f64, f64) {
        let Some(target) = self.workload.target(token) else { return (0.0, 0.0) };
        let p = (z - lse).exp();
        let weight = self.workload.capped_derivative(z) * self.weight;
        let is_target = target == class;
        let eps = f64::from(outcome.row_eps.map_or(filter.eps(), |eps| eps[token]));
        let (kept, threshold) = match filter {
            _ if is_target => (p - 1.0, 0.0),
            GradientFilter::Exact => (p, 0.0),
            GradientFilter::Threshold { .. } => (if p >= eps { p } else { 0.0 }, eps),
            GradientFilter::Unbiased { seed, .. } => {
                let u = f64::from(filter::entry_uniform(filter::row_start(seed, token), class as u32));
                (if p >= eps * u { p.max(eps) } else { 0.0 }, eps * u)
            }
        };
        let near = BORDERLINE + self.cut_off(outcome, z.abs().max(self.size_of(lse)));
        let borderline = threshold > 0.0 && (p - threshold).abs() <= near * threshold;
        let slack = match () {
            // p is rounded in f32 (exponential, sum, quotient) before 1 is taken off, and is wrong by the target's logit where that
            // was summed up apart from the others: absolute, however small p - 1 is. A plain sum of V terms also loses what is below
            // half a unit of 1.
            () if is_target => {
                let plain = (self.workload.shape.vocab as f64).sqrt();
                let units = 16.0 + 4.0 * z.abs() + if outcome.sums_plainly { plain } else { 0.0 };
                p * units * f64::from(f32::EPSILON) / 2.0
            }
            () if borderline => p.max(eps),
            () => 0.0,
        };
        (weight * kept, weight * slack)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn log_sum_exp(z: &[f64]) -> f64 {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln()
}

/// A gradient row, and the length that entries on the threshold may add to its error.
struct GradientRow {
    values: Vec<f64>,
    /// Root of the sum of the terms' squares, and the row's length: what its rounding errors are relative to.
    scale: f64,
    slack: f64,
}

/// `Σ entry · row` over the rows of `matrix`, by all threads: a GPU would wait for one.
fn combine(matrix: &[f32], hidden: usize, entry: impl Fn(usize) -> (f64, f64) + Sync) -> GradientRow {
    let nothing = || GradientRow { values: vec![0.0; hidden], scale: 0.0, slack: 0.0 };
    let add = |mut sum: GradientRow, (index, row): (usize, &[f32])| {
        let (value, slack) = entry(index);
        if value != 0.0 || slack != 0.0 {
            sum.values.iter_mut().zip(row).for_each(|(s, &x)| *s += value * f64::from(x));
            let length = dot(row, row).sqrt();
            sum.scale += (value * length).powi(2);
            sum.slack += slack * length;
        }
        sum
    };
    let merge = |mut a: GradientRow, b: GradientRow| {
        a.values.iter_mut().zip(&b.values).for_each(|(a, b)| *a += b);
        GradientRow { scale: a.scale + b.scale, slack: a.slack + b.slack, ..a }
    };
    let rows = matrix.par_chunks_exact(hidden.max(1)).enumerate().with_min_len(64);
    let mut sum = rows.fold(nothing, add).reduce(nothing, merge);
    sum.scale = sum.scale.sqrt() + sum.values.iter().map(|x| x * x).sum::<f64>().sqrt();
    sum
}

impl GradientRow {
    /// With the error of results that are subnormal in f16: half of their distance of 2^-24, whatever the scale.
    fn rounded_to(mut self, dtype: DType) -> Self {
        if dtype == DType::F16 {
            self.slack += 2.0_f64.powi(-25) * (self.values.len() as f64).sqrt();
        }
        self
    }

    fn compare(&self, worst: &mut f64, what: &str, ours: &[f64], tolerance: f64) -> Result<(), String> {
        let error = self.values.iter().zip(ours).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        within(worst, what, error, 0.0, tolerance * self.scale + self.slack + 1e-12)
    }
}

fn row_of(buffer: &HostBuffer, index: usize, hidden: usize) -> Vec<f64> {
    let range = index * hidden..(index + 1) * hidden;
    match buffer {
        HostBuffer::F32(b) => b[range].iter().map(|&x| f64::from(x)).collect(),
        HostBuffer::F16(b) => b[range].iter().map(|&x| f64::from(x)).collect(),
        HostBuffer::BF16(b) => b[range].iter().map(|&x| f64::from(x)).collect(),
        _ => vec![f64::NAN; hidden],
    }
}

fn within(worst: &mut f64, what: &str, ours: f64, expected: f64, tolerance: f64) -> Result<(), String> {
    let error = (ours - expected).abs();
    *worst = worst.max(error / tolerance);
    // Written so that NaN fails.
    if error <= tolerance {
        return Ok(());
    }
    Err(format!("{what} is off: {ours:e} against {expected:e}, error {error:.2e}, tolerance {tolerance:.2e}"))
}
