//! What a backend should return, in `f64`, with the error that `f32` arithmetic may make.
//!
//! The gradients are built entry by entry, G = sparse part + one-hot part + smoothing part, so that the sparse filters
//! can be applied exactly as `filter.rs` defines them. With every entry kept this must agree with the oracle; the test
//! `entry_sums_agree_with_the_oracle` in `oracle.rs` holds the two together.
//!
//! Tolerances are running error bounds, not numbers that happened to pass: a logit of row i is wrong by at most a few
//! ulps of `a_i = max_v (|scale| Σ_d |E_id C_vd| + |bias_v|)` (or of its partial sums' random walk, if larger), an exponential by that times itself, and a sum by a few
//! ulps of the sum of its terms' magnitudes. [`ULPS`] is "a few". Everything else follows by the chain rule.

use super::compare::{assert_close, check_close, rounding};
use cut_cross_entropy::reference::{Reference, ReferenceForward, ReferenceUpstream};
use cut_cross_entropy::{
    CceOptions, DType, Forward, GradientFilter, HostBuffer, Problem, Reduction, Telemetry, filter,
};

/// "A few": covers an `exp` of two ulps, the products around it, and a dot product's random walk of roundings.
pub const ULPS: f64 = 4.0;
/// Long sums of terms of one sign lose more than a few ulps in any plain `f32` order. How much they may lose is
/// measured, not assumed: the same terms are also added up naively, one by one in `f32`, and an element may be wrong
/// by this many times what that made of the worst element, relative to the size of its terms.
pub const NAIVE: f64 = 2.0;
/// Relative rounding unit of these bounds: an ulp of 1 in `f32`, also for 16-bit inputs, whose products are exact.
pub const EPS: f64 = f32::EPSILON as f64;

/// An exact value for each element and how far an honest `f32` result may be from it.
#[derive(Debug, Clone)]
pub struct Bounded {
    pub exact: Vec<f64>,
    pub tolerance: Vec<f64>,
    /// The same sums, one term after the other in `f32`.
    naive: Vec<f32>,
    /// Sums of the terms' magnitudes.
    size: Vec<f64>,
}

impl Bounded {
    fn zeros(len: usize) -> Self {
        Bounded { exact: vec![0.0; len], tolerance: vec![0.0; len], naive: vec![0.0; len], size: vec![0.0; len] }
    }
    /// Adds `g * x`, where `g` may be wrong by `tolerance`.
    fn add(&mut self, at: usize, g: f64, x: f64, tolerance: f64) {
        self.exact[at] += g * x;
        self.tolerance[at] += tolerance * x.abs();
        self.naive[at] += g as f32 * x as f32;
        self.size[at] += (g * x).abs();
    }
    /// Allows each element [`NAIVE`] times the worst that the naive sums did anywhere, relative to their terms.
    fn allow_naive_error(&mut self) {
        let error = |((e, &n), size): ((&f64, &f32), &f64)| (e - f64::from(n)).abs() / size;
        let errors = self.exact.iter().zip(&self.naive).zip(&self.size).map(error);
        let worst = errors.filter(|e| e.is_finite()).fold(0.0, f64::max);
        self.tolerance.iter_mut().zip(&self.size).for_each(|(t, size)| *t += NAIVE * worst * size);
    }

    /// Compares a gradient with this; returns its relative Frobenius error.
    pub fn check(&self, what: &str, columns: usize, ours: &HostBuffer) -> Result<f64, String> {
        let dtype = match ours {
            HostBuffer::F16(_) => DType::F16,
            HostBuffer::BF16(_) => DType::BF16,
            _ => DType::F32,
        };
        check_close(what, dtype, columns, &ours.to_f32_vec(), &self.exact, &self.tolerance)
    }
}

/// The gradients, and how many entries the filter keeps: entries within rounding of their threshold may go either way.
#[derive(Debug, Clone)]
pub struct ExpectedGradients {
    pub d_embeddings: Bounded,
    pub d_classifier: Bounded,
    pub d_bias: Bounded,
    pub kept: std::ops::RangeInclusive<u64>,
    /// Mean kept mass over rows, and what the undecided entries may change.
    pub kept_mass: (f64, f64),
    pub rows: u64,
    pub exact_rows: u64,
    pub raised_rows: u64,
}

/// The forward in `f64`, and what the error bounds need.
#[derive(Debug, Clone)]
pub struct Expected {
    pub reference: Reference,
    pub forward: ReferenceForward,
    /// z [N, V].
    pub logits: Vec<f64>,
    /// a_i, the size of what cancels in the logits of row i.
    pub scale: Vec<f64>,
    /// The 16-bit type, if any, to which a backend rounds the logit gradients of exact rows, and of tiles, before it multiplies them.
    pub stored: Option<DType>,
}

impl Expected {
    pub fn new(problem: &Problem<'_>) -> Self {
        let reference = Reference::new(problem);
        let (n, v, d) = (reference.targets.len(), reference.bias.len(), reference.hidden);
        let (mut logits, mut scale) = (vec![0.0; n * v], vec![0.0_f64; n]);
        let options = &reference.options;
        for i in 0..n {
            if reference.targets[i].is_none() {
                continue;
            }
            let e = &reference.embeddings[i * d..][..d];
            for class in 0..v {
                let c = &reference.classifier[class * d..][..d];
                let (mut dot, mut size, mut walk) = (0.0, 0.0, 0.0);
                for (e, c) in e.iter().zip(c) {
                    dot += e * c;
                    size += (e * c).abs();
                    walk += dot * dot;
                }
                let x = f64::from(options.logit_scale) * dot + reference.bias[class];
                logits[i * v + class] = options.softcap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh());
                // Each partial sum is rounded. Where they are all large, because a large term came early, those
                // roundings add up as a random walk: five deviations of it, times √2 for `z - lse`.
                let size = f64::max(size, 0.5 * walk.sqrt());
                let size = f64::from(options.logit_scale) * size + reference.bias[class].abs();
                if size.is_finite() {
                    scale[i] = scale[i].max(size);
                }
            }
        }
        Expected { forward: reference.forward(), reference, logits, scale, stored: None }
    }

    /// For a backend whose exact path feeds 16-bit matrix units: it rounds logit gradients once, to the inputs' type.
    pub fn stored_as(self, dtype: DType) -> Self {
        Expected { stored: Some(dtype).filter(|&dtype| dtype != DType::F32), ..self }
    }

    /// What storing the logit gradient `g` may cost, where the largest of the problem is `largest`:
    /// half a unit in the last place, also of numbers that are subnormal beside the largest. Gradients are stored as
    /// multiples of a power of two that is at least `largest` and at most twice that; in f16 the largest become 2^14,
    /// so that the small ones keep their digits.
    fn storing(&self, g: f64, largest: f64) -> f64 {
        let Some(dtype) = self.stored else { return 0.0 };
        let unit = 2.0 * largest / if dtype == DType::F16 { 16384.0 } else { 1.0 };
        if unit > 0.0 { unit * rounding(dtype, g / unit) } else { 0.0 }
    }

    /// An upper bound of the logit gradients' magnitudes: that of each of their parts. A kept p counts for ε at least.
    fn largest_gradient(
        &self,
        upstream: &ReferenceUpstream,
        d_loss: f64,
        eps_of: impl Fn(usize) -> Option<f64>,
    ) -> f64 {
        let (r, v) = (&self.reference, self.vocab() as f64);
        let smoothing = f64::from(self.options().label_smoothing);
        let weight_sum: f64 = r.class_weights.iter().sum();
        let of_row = |(i, y): (usize, &Option<usize>)| {
            let d_losses = (d_loss + upstream.losses[i]) * r.token_weights[i];
            let target = d_losses * (1.0 - smoothing) * r.class_weights[(*y)?] + upstream.nll[i];
            let spread = (d_losses * smoothing / v).abs() * weight_sum;
            let squared = d_losses * 2.0 * f64::from(self.options().z_loss) * self.forward.lse[i];
            let eps = eps_of(i).unwrap_or(0.0);
            let entropy = upstream.entropy[i].abs() * (0.37 + v.ln() + 23.0 * eps);
            Some((2.0 * (target.abs() + spread) + squared.abs() + upstream.lse[i].abs() + entropy) * eps.max(1.0))
        };
        r.targets.iter().enumerate().filter_map(of_row).filter(|x| x.is_finite()).fold(0.0, f64::max)
    }

    pub fn options(&self) -> &CceOptions {
        &self.reference.options
    }
    pub fn tokens(&self) -> usize {
        self.reference.targets.len()
    }
    pub fn vocab(&self) -> usize {
        self.reference.bias.len()
    }

    fn denominator(&self) -> f64 {
        let r = &self.reference;
        match r.options.reduction {
            Reduction::Mean => {
                (0..self.tokens()).filter_map(|i| Some(r.token_weights[i] * r.class_weights[r.targets[i]?])).sum()
            }
            _ => 1.0,
        }
    }

    /// Compares every output of a forward.
    pub fn check_forward(&self, ours: &Forward) -> Result<(), String> {
        let (r, f, options) = (&self.reference, &self.forward, self.options());
        let (n, v) = (self.tokens(), self.vocab());
        let (smoothing, z_loss) = (f64::from(options.label_smoothing), f64::from(options.z_loss));
        let zeros = vec![0.0; n];
        let [mut lse, mut target, mut nll, mut losses, mut entropy] =
            [zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone(), zeros];
        for i in 0..n {
            let Some(y) = r.targets[i] else { continue };
            let a = self.scale[i];
            let unit = ULPS * EPS;
            target[i] = unit * a;
            lse[i] = unit * (a + f.lse[i].abs() + 1.0);
            // Not `lse - z_target`: a common offset of the logits may cost no more than its own rounding in them.
            nll[i] = unit * (2.0 * a + f.nll[i].abs() + (v as f64).ln() + 1.0);
            entropy[i] = unit * (1.0 + a) * (2.0 + f.entropy[i].abs());
            let (mut smooth, mut smooth_tolerance) = (0.0, 0.0);
            if smoothing > 0.0 {
                for class in 0..v {
                    smooth += r.class_weights[class] * (f.lse[i] - self.logits[i * v + class]).abs();
                    smooth_tolerance += r.class_weights[class] * (lse[i] + unit * a);
                }
            }
            let share = smoothing / v as f64;
            let weight = (1.0 - smoothing) * r.class_weights[y];
            let size = weight * f.nll[i].abs() + share * smooth + z_loss * f.lse[i] * f.lse[i];
            let tolerance =
                weight * nll[i] + share * smooth_tolerance + z_loss * 2.0 * f.lse[i].abs() * lse[i] + unit * size;
            losses[i] = r.token_weights[i].abs() * tolerance;
        }
        let denominator = self.denominator();
        let loss_tolerance = if denominator == 0.0 {
            0.0
        } else {
            let size: f64 = f.losses.iter().map(|l| l.abs()).sum();
            (losses.iter().sum::<f64>() + ULPS * EPS * size) / denominator.abs()
        };
        let f32s = |what, ours: &[f32], exact: &[f64], tolerance: &[f64]| {
            check_close(what, DType::F32, 1, ours, exact, tolerance).map(drop)
        };
        f32s("target_logit", &ours.target_logit, &f.target_logit, &target)?;
        f32s("lse", &ours.lse, &f.lse, &lse)?;
        f32s("nll", &ours.nll, &f.nll, &nll)?;
        f32s("losses", &ours.losses, &f.losses, &losses)?;
        f32s("loss", &[ours.loss], &[f.loss], &[loss_tolerance])?;
        match &ours.entropy {
            Some(ours) if options.entropy => f32s("entropy", ours, &f.entropy, &entropy)?,
            None if !options.entropy => {}
            _ => return Err("entropy is there without being asked for, or the reverse".into()),
        }
        if ours.argmax.is_some() != options.metrics || ours.accuracy.is_some() != options.metrics {
            return Err("metrics are there without being asked for, or the reverse".into());
        }
        if let (Some(argmax), Some(accuracy)) = (&ours.argmax, ours.accuracy) {
            self.check_metrics(argmax, accuracy)?;
        }
        Ok(())
    }

    /// The class of `argmax` must be maximal within rounding, and `accuracy` must follow from `argmax` exactly.
    fn check_metrics(&self, argmax: &[u32], accuracy: f32) -> Result<(), String> {
        let (r, v) = (&self.reference, self.vocab());
        if argmax.len() != self.tokens() {
            return Err(format!("argmax has {} elements for {} tokens", argmax.len(), self.tokens()));
        }
        let mut hits = 0;
        for (i, &best) in argmax.iter().enumerate() {
            let Some(y) = r.targets[i] else {
                if best != u32::MAX {
                    return Err(format!("argmax[{i}] is {best} for an ignored token"));
                }
                continue;
            };
            hits += usize::from(best as usize == y);
            if !self.forward.lse[i].is_finite() {
                continue; // no class is the most probable one
            }
            let row = &self.logits[i * v..][..v];
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let slack = 2.0 * ULPS * EPS * self.scale[i];
            if !row.get(best as usize).is_some_and(|&z| z >= max - slack) {
                return Err(format!("argmax[{i}] is {best}, the oracle says {:?}", self.forward.argmax[i]));
            }
        }
        let rows = r.targets.iter().flatten().count();
        let expected = hits as f32 / rows.max(1) as f32;
        if (accuracy - expected).abs() <= f32::EPSILON {
            Ok(())
        } else {
            Err(format!("accuracy {accuracy}: {expected}"))
        }
    }

    /// Whether this row's gradient is not sparse, so that it is computed exactly whatever the filter says.
    pub fn takes_exact_path(&self, i: usize) -> bool {
        let options = self.options();
        !self.forward.lse[i].is_finite() || (options.label_smoothing > 0.0 && options.softcap.is_some())
    }

    /// All gradients under `filter`.
    pub fn gradients(&self, upstream: &ReferenceUpstream, filter: GradientFilter) -> ExpectedGradients {
        self.gradients_by_row(upstream, filter, false, |_| Some(filter.eps().into()))
    }

    /// As [`Self::gradients`], by a backend that may multiply tiles of sparse gradients in [`Self::stored`], with rows that it kept with
    /// another ε, or (`None`) computed exactly, for a reason of its own.
    pub fn gradients_by_row(
        &self,
        upstream: &ReferenceUpstream,
        filter: GradientFilter,
        tiles: bool,
        eps_of: impl Fn(usize) -> Option<f64>,
    ) -> ExpectedGradients {
        let (r, f, options) = (&self.reference, &self.forward, *self.options());
        let (n, v, d) = (self.tokens(), self.vocab(), r.hidden);
        let (smoothing, z_loss) = (f64::from(options.label_smoothing), f64::from(options.z_loss));
        let denominator = self.denominator();
        let d_loss = if denominator == 0.0 { 0.0 } else { upstream.loss / denominator };
        let weight_sum: f64 = r.class_weights.iter().sum();
        let own_eps = |i| eps_of(i).filter(|_| filter != GradientFilter::Exact && !self.takes_exact_path(i));
        let largest = self.largest_gradient(upstream, d_loss, own_eps);

        let (mut d_embeddings, mut d_classifier, mut d_bias) =
            (Bounded::zeros(n * d), Bounded::zeros(v * d), Bounded::zeros(v));
        let (mut certain, mut undecided, mut rows, mut exact_rows, mut raised_rows) = (0, 0, 0, 0, 0);
        let (mut mass, mut undecided_mass) = (0.0, 0.0);
        for i in 0..n {
            let Some(y) = r.targets[i] else { continue };
            let own_eps = own_eps(i);
            let (exact_row, eps) = (own_eps.is_none(), own_eps.unwrap_or(0.0));
            raised_rows += u64::from(eps > f64::from(filter.eps()));
            rows += 1;
            exact_rows += u64::from(exact_row);
            let (a, lse, h) = (self.scale[i], f.lse[i], f.entropy[i]);
            let d_losses = (d_loss + upstream.losses[i]) * r.token_weights[i];
            let hard = d_losses * (1.0 - smoothing) * r.class_weights[y];
            let smooth = d_losses * smoothing / v as f64;
            let squared = d_losses * 2.0 * z_loss * lse;
            let (d_h, d_hard) = (upstream.entropy[i], hard + upstream.nll[i]);
            let mut d_lse = d_hard + squared + upstream.lse[i];
            let mut d_lse_size = hard.abs() + upstream.nll[i].abs() + squared.abs() + upstream.lse[i].abs();
            if smoothing > 0.0 {
                d_lse += smooth * weight_sum;
                d_lse_size += smooth.abs() * weight_sum;
            }
            if exact_row {
                mass += 1.0;
            }
            let start = match filter {
                GradientFilter::Unbiased { seed, .. } => filter::row_start(seed, i),
                _ => 0,
            };
            for class in 0..v {
                let p = f.probabilities[i * v + class];
                let z = self.logits[i * v + class];
                // Relative error of p, as a multiple of a unit: that of exp(z - lse).
                let p_error = 1.0 + a;
                let (p_hat, doubt) = if exact_row {
                    (p, false)
                } else if class == y {
                    // The target's entry is always there, with its exact p.
                    certain += 1;
                    mass += p;
                    (p, false)
                } else {
                    let threshold = match filter {
                        GradientFilter::Unbiased { .. } => eps * f64::from(filter::entry_uniform(start, class as u32)),
                        _ => eps,
                    };
                    let doubt = (p - threshold).abs() <= 4.0 * ULPS * EPS * p_error * threshold;
                    let kept = p >= threshold;
                    certain += u64::from(kept && !doubt);
                    undecided += u64::from(doubt);
                    mass += if kept { p } else { 0.0 };
                    undecided_mass += if doubt { p } else { 0.0 };
                    (if kept || doubt { p.max(eps) } else { 0.0 }, doubt)
                };
                let entropy_term = if d_h != 0.0 && p > 0.0 { d_h * (z - lse + h) } else { 0.0 };
                let entropy_size =
                    if d_h != 0.0 && p > 0.0 { d_h.abs() * ((z - lse).abs() + h.abs() + 1.0) } else { 0.0 };
                let sparse = p_hat * (d_lse - entropy_term);
                let one_hot = if class == y { d_hard } else { 0.0 };
                let rank_one = smooth * r.class_weights[class];

                let mut size = p_hat * (d_lse_size + entropy_size) + rank_one.abs();
                size += if class == y { hard.abs() + upstream.nll[i].abs() } else { 0.0 };
                let cap = options.softcap.map(f64::from);
                let slope = cap.map_or(1.0, |cap| 1.0 - (z / cap).powi(2));
                // The softcap's slope 1 - t² changes by 2t/cap of itself with the error of the logit, and at saturation it
                // is a difference of equals, which doubles the few ulps of the tanh.
                let (bend, cancels) = cap.map_or((0.0, 0.0), |cap| (2.0 * a / cap, 2.0));
                let unit = ULPS * EPS * (slope * (p_error + bend) + cancels);
                let mut g = (sparse - one_hot - rank_one) * slope;
                // Probabilities below the normal range of f32 may count as 0.
                let flushed = 2.0 * f64::from(f32::MIN_POSITIVE) * (d_lse_size + entropy_size);
                let mut tolerance = size * unit + if p_hat < 1e-30 { flushed } else { 0.0 };
                if doubt {
                    tolerance += sparse.abs() * slope;
                }
                if g == 0.0 && p_hat == 0.0 && tolerance <= flushed {
                    continue;
                }
                if exact_row {
                    tolerance += self.storing(g.abs() + tolerance, largest);
                }
                d_bias.add(class, g, 1.0, tolerance); // which gathers what is sparse
                if !exact_row && tiles {
                    tolerance += self.storing(g.abs() + tolerance, largest);
                }
                g *= f64::from(options.logit_scale);
                tolerance *= f64::from(options.logit_scale);
                for k in 0..d {
                    let (e, c) = (r.embeddings[i * d + k], r.classifier[class * d + k]);
                    d_embeddings.add(i * d + k, g, c, tolerance);
                    d_classifier.add(class * d + k, g, e, tolerance);
                }
            }
        }
        d_embeddings.allow_naive_error();
        d_classifier.allow_naive_error();
        d_bias.allow_naive_error();
        let share = |x: f64| if rows == 0 { 0.0 } else { x / rows as f64 };
        ExpectedGradients {
            d_embeddings,
            d_classifier,
            d_bias,
            kept: certain..=certain + undecided,
            kept_mass: (share(mass), share(undecided_mass) + 1e-4),
            rows,
            exact_rows,
            raised_rows,
        }
    }
}

impl ExpectedGradients {
    /// Compares all three gradients; those that are `None` are not there to compare.
    pub fn check(
        &self,
        hidden: usize,
        d_embeddings: Option<&HostBuffer>,
        d_classifier: Option<&HostBuffer>,
        d_bias: Option<&HostBuffer>,
    ) -> Result<[f64; 3], String> {
        let check = |what, expected: &Bounded, columns, ours: Option<&HostBuffer>| {
            ours.map_or(Ok(0.0), |ours| expected.check(what, columns, ours))
        };
        Ok([
            check("d_embeddings", &self.d_embeddings, hidden, d_embeddings)?,
            check("d_classifier", &self.d_classifier, hidden, d_classifier)?,
            check("d_bias", &self.d_bias, 1, d_bias)?,
        ])
    }

    /// Compares what a sparse filter reports.
    pub fn check_telemetry(&self, ours: &Telemetry) -> Result<(), String> {
        let (mass, slack) = self.kept_mass;
        if ours.rows == self.rows
            && ours.exact_rows == self.exact_rows
            && ours.raised_rows == self.raised_rows
            && self.kept.contains(&ours.kept_entries)
            && ours.candidates >= ours.kept_entries
            && (ours.kept_mass - mass).abs() <= slack
        {
            return Ok(());
        }
        Err(format!(
            "{ours:?}; expected rows {}, exact rows {}, raised rows {}, kept {:?}, mass {mass} +- {slack}",
            self.rows, self.exact_rows, self.raised_rows, self.kept
        ))
    }
}

/// Compares `f32` values with `exact`, within `ulps` of `size`.
#[track_caller]
pub fn assert_within(what: &str, ours: &[f32], exact: &[f64], ulps: f64, size: f64) {
    assert_close(what, DType::F32, 1, ours, exact, &vec![ulps * EPS * size; exact.len()]);
}
