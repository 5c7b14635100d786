//! The specification: the whole operation in `f64`, every logit materialised, closed-form gradients.
//!
//! It shares no code with the backends. Finite differences prove it, and it proves them.

use crate::{CceOptions, Host, Problem, Reduction};

/// The operands in `f64`, dense. All fields are open so that a test can perturb any number.
#[derive(Debug, Clone)]
pub struct Reference {
    /// E [N, D].
    pub embeddings: Vec<f64>,
    /// C [V, D].
    pub classifier: Vec<f64>,
    /// bias `[V]`, zeros where none is given.
    pub bias: Vec<f64>,
    /// Class of each token, `None` for ignored ones; the shift is already applied.
    pub targets: Vec<Option<usize>>,
    /// Weight of each class `[V]`, ones where none are given.
    pub class_weights: Vec<f64>,
    /// Weight of each token `[N]`, ones where none are given.
    pub token_weights: Vec<f64>,
    /// D.
    pub hidden: usize,
    /// Options; the gradient filter and the requests have no meaning here.
    pub options: CceOptions,
}

/// The outputs, as in [`Forward`](crate::Forward).
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct ReferenceForward {
    pub loss: f64,
    pub losses: Vec<f64>,
    pub nll: Vec<f64>,
    pub lse: Vec<f64>,
    pub target_logit: Vec<f64>,
    pub entropy: Vec<f64>,
    pub argmax: Vec<Option<usize>>,
    pub accuracy: f64,
    /// p [N, V].
    pub probabilities: Vec<f64>,
}

/// Upstream gradients, as in [`Upstream`](crate::Upstream); vectors of length N.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct ReferenceUpstream {
    pub loss: f64,
    pub losses: Vec<f64>,
    pub nll: Vec<f64>,
    pub lse: Vec<f64>,
    pub entropy: Vec<f64>,
}

impl ReferenceUpstream {
    /// The gradient of `d_loss · loss` over `tokens` tokens.
    pub fn loss(d_loss: f64, tokens: usize) -> Self {
        let zeros = vec![0.0; tokens];
        ReferenceUpstream {
            loss: d_loss,
            losses: zeros.clone(),
            nll: zeros.clone(),
            lse: zeros.clone(),
            entropy: zeros,
        }
    }
}

/// dE [N, D], dC [V, D], dbias `[V]`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct ReferenceGradients {
    pub d_embeddings: Vec<f64>,
    pub d_classifier: Vec<f64>,
    pub d_bias: Vec<f64>,
}

impl Reference {
    /// The operands of `problem`, widened.
    pub fn new(problem: &Problem<'_, Host>) -> Self {
        let (inputs, options, shape) = (problem.inputs(), *problem.options(), problem.shape());
        let dense = |m: &crate::Matrix<'_>| -> Vec<f64> {
            let at = |i: usize| m.data.float_at(i / m.columns * m.row_stride + i % m.columns) as f64;
            (0..m.rows * m.columns).map(at).collect()
        };
        let vector = |v: Option<crate::HostSlice<'_>>, len: usize, missing: f64| -> Vec<f64> {
            (0..len).map(|i| v.map_or(missing, |v| v.float_at(i) as f64)).collect()
        };
        let seq_len = inputs.seq_len.unwrap_or(shape.tokens);
        let target = |i: usize| {
            let inside = i / seq_len == (i + options.shift) / seq_len;
            let value = if inside { inputs.targets.index_at(i + options.shift) } else { options.ignore_index };
            (value != options.ignore_index).then_some(value as usize)
        };
        Reference {
            embeddings: dense(&inputs.embeddings),
            classifier: dense(&inputs.classifier),
            bias: vector(inputs.bias, shape.vocab, 0.0),
            targets: (0..shape.tokens).map(target).collect(),
            class_weights: vector(inputs.class_weights, shape.vocab, 1.0),
            token_weights: vector(inputs.token_weights, shape.tokens, 1.0),
            hidden: shape.hidden,
            options,
        }
    }

    fn vocab(&self) -> usize {
        self.bias.len()
    }

    /// z of token `i`, `[V]`.
    fn logits(&self, i: usize) -> Vec<f64> {
        let e = &self.embeddings[i * self.hidden..][..self.hidden];
        let logit = |v: usize| {
            let c = &self.classifier[v * self.hidden..][..self.hidden];
            let dot: f64 = e.iter().zip(c).map(|(e, c)| e * c).sum();
            let x = self.options.logit_scale as f64 * dot + self.bias[v];
            self.options.softcap.map_or(x, |cap| cap as f64 * (x / cap as f64).tanh())
        };
        (0..self.vocab()).map(logit).collect()
    }

    /// Denominator of the mean, 1 for the other reductions.
    fn denominator(&self) -> f64 {
        if self.options.reduction != Reduction::Mean {
            return 1.0;
        }
        let weight = |(y, t): (&Option<usize>, &f64)| y.map_or(0.0, |y| t * self.class_weights[y]);
        self.targets.iter().zip(&self.token_weights).map(weight).sum()
    }

    /// All outputs.
    pub fn forward(&self) -> ReferenceForward {
        let (n, v) = (self.targets.len(), self.vocab());
        let zeros = vec![0.0; n];
        let mut out = ReferenceForward {
            loss: 0.0,
            losses: zeros.clone(),
            nll: zeros.clone(),
            lse: zeros.clone(),
            target_logit: zeros.clone(),
            entropy: zeros,
            argmax: vec![None; n],
            accuracy: 0.0,
            probabilities: vec![0.0; n * v],
        };
        let (smoothing, z_loss) = (self.options.label_smoothing as f64, self.options.z_loss as f64);
        for i in 0..n {
            let Some(y) = self.targets[i] else { continue };
            let z = self.logits(i);
            let (best, max) =
                z.iter().enumerate().fold((0, f64::NEG_INFINITY), |b, (v, &z)| if z > b.1 { (v, z) } else { b });
            let max = if max == f64::NEG_INFINITY { 0.0 } else { max }; // every class masked: lse = ln 0 = -inf
            let sum: f64 = z.iter().map(|z| (z - max).exp()).sum();
            let lse = max + sum.ln();
            out.lse[i] = lse;
            out.target_logit[i] = z[y];
            out.nll[i] = max - z[y] + sum.ln();
            out.argmax[i] = Some(best);
            out.accuracy += f64::from(best == y);
            let mut smooth = 0.0; // Σ_v w_v (lse - z_v)
            for (v, &z) in z.iter().enumerate() {
                let p = (z - max).exp() / sum;
                out.probabilities[i * self.vocab() + v] = p;
                out.entropy[i] -= if p > 0.0 { p * (z - lse) } else { p };
                smooth += if smoothing > 0.0 { self.class_weights[v] * (lse - z) } else { 0.0 };
            }
            let hard = self.class_weights[y] * out.nll[i];
            let cross_entropy = (1.0 - smoothing) * hard + smoothing / v as f64 * smooth;
            out.losses[i] = self.token_weights[i] * (cross_entropy + z_loss * lse * lse);
        }
        let rows = self.targets.iter().flatten().count();
        out.accuracy /= rows.max(1) as f64;
        let denominator = self.denominator();
        out.loss = if denominator == 0.0 { 0.0 } else { out.losses.iter().sum::<f64>() / denominator };
        out
    }

    /// All gradients of `Σ upstream · outputs`.
    pub fn backward(&self, upstream: &ReferenceUpstream) -> ReferenceGradients {
        let (n, v, d) = (self.targets.len(), self.vocab(), self.hidden);
        let forward = self.forward();
        let mut grads =
            ReferenceGradients { d_embeddings: vec![0.0; n * d], d_classifier: vec![0.0; v * d], d_bias: vec![0.0; v] };
        let (smoothing, denominator) = (self.options.label_smoothing as f64, self.denominator());
        let d_loss = if denominator == 0.0 { 0.0 } else { upstream.loss / denominator };
        for i in 0..n {
            let Some(y) = self.targets[i] else { continue };
            let (z, lse, entropy) = (self.logits(i), forward.lse[i], forward.entropy[i]);
            let d_losses = (d_loss + upstream.losses[i]) * self.token_weights[i];
            let d_hard = d_losses * (1.0 - smoothing) * self.class_weights[y] + upstream.nll[i];
            let d_smooth = d_losses * smoothing / v as f64;
            let mut d_lse = d_hard + d_losses * 2.0 * self.options.z_loss as f64 * lse + upstream.lse[i];
            if smoothing > 0.0 {
                d_lse += d_smooth * self.class_weights.iter().sum::<f64>();
            }
            for (class, &z) in z.iter().enumerate() {
                let p = forward.probabilities[i * v + class];
                let mut g = d_lse * p - d_smooth * self.class_weights[class];
                if class == y {
                    g -= d_hard;
                }
                if upstream.entropy[i] != 0.0 && p > 0.0 {
                    g -= upstream.entropy[i] * p * (z - lse + entropy);
                }
                g *= self.options.softcap.map_or(1.0, |cap| 1.0 - (z / cap as f64).powi(2));
                grads.d_bias[class] += g;
                g *= self.options.logit_scale as f64;
                for k in 0..d {
                    grads.d_embeddings[i * d + k] += g * self.classifier[class * d + k];
                    grads.d_classifier[class * d + k] += g * self.embeddings[i * d + k];
                }
            }
        }
        grads
    }
}
