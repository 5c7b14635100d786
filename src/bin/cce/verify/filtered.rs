//! The gradients as a sparse filter leaves them, in `f64`: which entries are kept is part of the specification.

use cut_cross_entropy::reference::{Reference, ReferenceGradients, ReferenceUpstream};
use cut_cross_entropy::{GradientFilter, Reduction, filter};

/// How far, relative to its threshold, a probability may lie and still be kept by one and dropped by another.
const BORDERLINE: f64 = 1e-4;

/// dE, dC, dbias, and for each two bounds of its elements' errors: the most by which entries on the threshold may move one,
/// and the most by which logit gradients that are each wrong by a part `rounding` of themselves may.
pub fn backward(
    reference: &Reference,
    upstream: &ReferenceUpstream,
    rounding: f64,
) -> (ReferenceGradients, [f64; 3], [f64; 3]) {
    let (options, hidden, vocab) = (reference.options, reference.hidden, reference.bias.len());
    let forward = reference.forward();
    let mut gradients = ReferenceGradients {
        d_embeddings: vec![0.0; reference.embeddings.len()],
        d_classifier: vec![0.0; reference.classifier.len()],
        d_bias: vec![0.0; vocab],
    };
    let mut slack = 0.0;
    let (mut of_rows, mut of_columns) = (vec![0.0; reference.targets.len()], vec![0.0; vocab]); // sums of magnitudes
    let active = |(i, y): (usize, &Option<usize>)| y.map(|y| (i, y));
    let denominator: f64 = match options.reduction {
        Reduction::Mean => {
            reference.targets.iter().enumerate().filter_map(active).map(|(i, y)| weight(reference, i, y)).sum()
        }
        Reduction::None | Reduction::Sum => 1.0,
    };
    let d_loss = if denominator == 0.0 { 0.0 } else { upstream.loss / denominator };
    let smoothing = f64::from(options.label_smoothing);
    for (i, y) in reference.targets.iter().enumerate().filter_map(active) {
        let (lse, entropy) = (forward.lse[i], forward.entropy[i]);
        let d_losses = (d_loss + upstream.losses[i]) * reference.token_weights[i];
        let d_hard = d_losses * (1.0 - smoothing) * reference.class_weights[y] + upstream.nll[i];
        let d_smooth = d_losses * smoothing / vocab as f64;
        let d_lse = d_hard
            + d_smooth * reference.class_weights.iter().sum::<f64>()
            + 2.0 * d_losses * f64::from(options.z_loss) * lse
            + upstream.lse[i];
        for (v, of_column) in of_columns.iter_mut().enumerate() {
            let p = forward.probabilities[i * vocab + v];
            let (counted, borderline) = if v == y { (p, false) } else { count(options.filter, i, v, p) };
            let of_p = match upstream.entropy[i] {
                d_entropy if d_entropy != 0.0 && p > 0.0 => d_lse - d_entropy * (p.ln() + entropy),
                _ => d_lse,
            };
            let through = match options.softcap {
                Some(cap) if p > 0.0 => 1.0 - ((lse + p.ln()) / f64::from(cap)).powi(2),
                _ => 1.0,
            };
            let target = if v == y { d_hard } else { 0.0 };
            let mut g = (counted * of_p - d_smooth * reference.class_weights[v] - target) * through;
            gradients.d_bias[v] += g;
            of_rows[i] += g.abs();
            *of_column += g.abs();
            g *= f64::from(options.logit_scale);
            if borderline {
                slack += (p.max(f64::from(options.filter.eps())) * of_p).abs();
            }
            let rows = (i * hidden..(i + 1) * hidden).zip(v * hidden..(v + 1) * hidden);
            rows.filter(|_| g != 0.0).for_each(|(e, c)| {
                gradients.d_embeddings[e] += g * reference.classifier[c];
                gradients.d_classifier[c] += g * reference.embeddings[e];
            });
        }
    }
    let largest = |values: &[f64]| values.iter().fold(0.0_f64, |a, &b| a.max(b.abs()));
    let scale = f64::from(options.logit_scale);
    let (e, c) = (scale * largest(&reference.embeddings), scale * largest(&reference.classifier));
    let (row, column) = (rounding * largest(&of_rows), rounding * largest(&of_columns));
    (gradients, [slack * c, slack * e, slack], [row * c, column * e, column])
}

fn weight(reference: &Reference, token: usize, class: usize) -> f64 {
    reference.token_weights[token] * reference.class_weights[class]
}

/// What `p` counts as, and whether that is decided by rounding.
fn count(filter: GradientFilter, token: usize, class: usize, p: f64) -> (f64, bool) {
    let eps = f64::from(filter.eps());
    let threshold = match filter {
        GradientFilter::Exact => return (p, false),
        GradientFilter::Threshold { .. } => eps,
        GradientFilter::Unbiased { seed, .. } => {
            eps * f64::from(filter::entry_uniform(filter::row_start(seed, token), class as u32))
        }
    };
    let kept = match filter {
        GradientFilter::Unbiased { .. } => p.max(eps),
        _ => p,
    };
    (if p >= threshold { kept } else { 0.0 }, (p - threshold).abs() <= BORDERLINE * threshold)
}
