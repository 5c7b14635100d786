//! The textbook computation in `f32` with every logit in memory: what the backends must not be worse than.

use cut_cross_entropy::reference::{Reference, ReferenceUpstream};
use cut_cross_entropy::{Problem, Reduction};

/// nll [N], dE [N, D] and dC [V, D].
#[derive(Debug)]
pub struct Naive {
    pub nll: Vec<f32>,
    pub d_embeddings: Vec<f32>,
    pub d_classifier: Vec<f32>,
}

/// Cross-entropy with bias, scale and softcap, gradient of `upstream.loss`; other options are not here.
pub fn naive(problem: &Problem<'_>, upstream: &ReferenceUpstream) -> Naive {
    let wide = Reference::new(problem); // only to read the operands
    let narrow = |values: &[f64]| values.iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let (e, c, bias) = (narrow(&wide.embeddings), narrow(&wide.classifier), narrow(&wide.bias));
    let (n, v, d) = (wide.targets.len(), bias.len(), wide.hidden);
    let options = wide.options;
    let rows = wide.targets.iter().flatten().count() as f32;
    let weight = upstream.loss as f32 * if options.reduction == Reduction::Mean { 1.0 / rows } else { 1.0 };

    let mut out = Naive { nll: vec![0.0; n], d_embeddings: vec![0.0; n * d], d_classifier: vec![0.0; v * d] };
    for i in 0..n {
        let Some(y) = wide.targets[i] else { continue };
        let row = &e[i * d..][..d];
        let z: Vec<f32> = (0..v)
            .map(|class| {
                let dot: f32 = row.iter().zip(&c[class * d..][..d]).map(|(e, c)| e * c).sum();
                let x = options.logit_scale * dot + bias[class];
                options.softcap.map_or(x, |cap| cap * (x / cap).tanh())
            })
            .collect();
        let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = z.iter().map(|z| (z - max).exp()).sum();
        out.nll[i] = max - z[y] + sum.ln();
        for class in 0..v {
            let slope = options.softcap.map_or(1.0, |cap| 1.0 - (z[class] / cap).powi(2));
            let p = (z[class] - max).exp() / sum - f32::from(u8::from(class == y));
            let g = weight * p * slope * options.logit_scale;
            for k in 0..d {
                out.d_embeddings[i * d + k] += g * c[class * d + k];
                out.d_classifier[class * d + k] += g * row[k];
            }
        }
    }
    out
}
