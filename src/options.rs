//! What to compute: [`CceOptions`] and its parts.

use crate::{Error, Result};

/// How the per-token losses become one number. Named and defined as in PyTorch's `cross_entropy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// No reduction: the result is `losses` `[N]`; `loss` is their sum, for logging.
    None,
    /// `Σ losses_i / Σ token_weight_i · class_weight[target_i]` over tokens that are not ignored.
    ///
    /// Where that denominator is 0 (every token ignored, N = 0, all weights 0) the loss is **0** and so is every
    /// gradient. PyTorch returns NaN there, which one padded micro-batch turns into a lost run.
    #[default]
    Mean,
    /// `Σ losses_i`.
    Sum,
}

/// Which entries of the softmax take part in the gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GradientFilter {
    /// All of them: two more matmuls of the size of the logits, and a third to compute them again.
    Exact,
    /// Stochastic rounding of small probabilities onto {0, `eps`}: an entry of probability `p` is kept with
    /// probability `min(1, p / eps)` and then counts as `max(p, eps)`.
    ///
    /// The gradient's expectation over seeds is the exact gradient; a row keeps at most `1 / eps` entries in
    /// expectation, whatever its softmax looks like (Wangni et al. 2018, arXiv:1710.09854, show that keeping in
    /// proportion to magnitude has the least variance for its size). Give every training step another seed.
    Unbiased {
        /// Probability below which entries are sampled; a normal number in (0, 1].
        eps: f32,
        /// Seed of this step's choice. The kept set is a function of the problem and the seed alone; on a GPU, where rows
        /// whose entries outgrow their room take a larger `eps`, of the launch plan too.
        seed: u64,
    },
    /// Keep entries with `p >= eps`, drop the others. Biased: dropped mass is lost, on flat softmax nearly all of it.
    /// For comparison with other implementations; do not train with it.
    Threshold {
        /// Probability below which entries are dropped; a normal number in (0, 1].
        eps: f32,
    },
}

impl GradientFilter {
    /// ε of the default filter, 2^-10: trains like the exact gradient (see DESIGN.md) at a few hundred entries a row.
    pub const DEFAULT_EPS: f32 = 1.0 / 1024.0;

    /// The threshold on probabilities; 0 for [`GradientFilter::Exact`].
    pub fn eps(&self) -> f32 {
        match *self {
            GradientFilter::Exact => 0.0,
            GradientFilter::Unbiased { eps, .. } | GradientFilter::Threshold { eps } => eps,
        }
    }
}

impl Default for GradientFilter {
    fn default() -> Self {
        GradientFilter::Unbiased { eps: Self::DEFAULT_EPS, seed: 0 }
    }
}

/// Element type of gradients that the library allocates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GradientDType {
    /// The type of the tensor that the gradient belongs to.
    #[default]
    Input,
    /// `f32`, whatever the inputs are.
    F32,
}

/// Which gradients [`cce_backward`](crate::cce_backward) returns. What is not asked for costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientRequest {
    /// dE [N, D]; `false` when what is below the head is frozen.
    pub embeddings: bool,
    /// dC [V, D]; `false` when the classifier is frozen.
    pub classifier: bool,
    /// dbias `[V]`; has no effect without a bias.
    pub bias: bool,
    /// Element type of the returned buffers.
    pub dtype: GradientDType,
}

impl Default for GradientRequest {
    fn default() -> Self {
        GradientRequest { embeddings: true, classifier: true, bias: true, dtype: GradientDType::Input }
    }
}

/// Everything about the loss that is not a tensor.
///
/// The default is PyTorch's: mean over tokens, `ignore_index` -100, nothing else switched on; gradients by the
/// unbiased filter at ε = 2^-10.
///
/// ```
/// use cut_cross_entropy::{CceOptions, Reduction};
/// let options = CceOptions { reduction: Reduction::Sum, softcap: Some(30.0), ..CceOptions::default() };
/// # assert_eq!(options.ignore_index, -100);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CceOptions {
    /// Tokens with this target are removed before any work: outputs 0, gradients 0. May lie inside [0, V).
    pub ignore_index: i64,
    /// How per-token losses are reduced.
    pub reduction: Reduction,
    /// `z = cap · tanh(x / cap)` on the scaled and biased logits `x`, as in Gemma 2. Finite and positive.
    pub softcap: Option<f32>,
    /// Factor on `E · C`, before the bias: an inverse temperature. Finite and positive.
    pub logit_scale: f32,
    /// Share of the target's probability spread over all classes, in [0, 1], as in PyTorch.
    pub label_smoothing: f32,
    /// Adds `z_loss · lse²` to each token's loss (PaLM, arXiv:2204.02311). Finite, not negative.
    pub z_loss: f32,
    /// Pairs position `t` of each sequence with the target of position `t + shift`; the last `shift` positions of a
    /// sequence have no target and are ignored. 1 for next-token prediction on unshifted data. See
    /// [`Inputs::seq_len`](crate::Inputs).
    pub shift: usize,
    /// Which entries take part in the gradients.
    pub filter: GradientFilter,
    /// Which gradients will be asked for.
    pub gradients: GradientRequest,
    /// Keep candidates during the forward, so that the backward need not compute logits again. Switch off for
    /// evaluation: nothing is stored, and `cce_backward` still works by running the forward once more.
    pub capture: bool,
    /// Return the entropy of each token's softmax.
    pub entropy: bool,
    /// Return each token's most probable class and the share of tokens where that is the target.
    pub metrics: bool,
}

impl Default for CceOptions {
    fn default() -> Self {
        CceOptions {
            ignore_index: -100,
            reduction: Reduction::Mean,
            softcap: None,
            logit_scale: 1.0,
            label_smoothing: 0.0,
            z_loss: 0.0,
            shift: 0,
            filter: GradientFilter::default(),
            gradients: GradientRequest::default(),
            capture: true,
            entropy: false,
            metrics: false,
        }
    }
}

impl CceOptions {
    /// Gradients without a sparse form: every row takes the exact path. Those of label smoothing under a softcap have a dense part that
    /// is not rank one.
    pub(crate) fn is_dense(&self) -> bool {
        self.filter == GradientFilter::Exact || (self.label_smoothing > 0.0 && self.softcap.is_some())
    }

    /// Checks every option against its range.
    pub(crate) fn check(&self) -> Result<()> {
        let require = |legal: bool, option, value: f32, requirement| {
            if legal { Ok(()) } else { Err(Error::Option { option, value: value.into(), requirement }) }
        };
        let positive = |x: f32| x.is_finite() && x > 0.0;
        require(positive(self.logit_scale), "logit_scale", self.logit_scale, "finite and positive")?;
        if let Some(cap) = self.softcap {
            require(positive(cap), "softcap", cap, "finite and positive")?;
        }
        require((0.0..=1.0).contains(&self.label_smoothing), "label_smoothing", self.label_smoothing, "in [0, 1]")?;
        require(self.z_loss.is_finite() && self.z_loss >= 0.0, "z_loss", self.z_loss, "finite and not negative")?;
        if self.filter != GradientFilter::Exact {
            let eps = self.filter.eps();
            // Its reciprocal is finite.
            require(eps.is_normal() && eps > 0.0 && eps <= 1.0, "filter.eps", eps, "a normal number in (0, 1]")?;
        }
        Ok(())
    }
}
