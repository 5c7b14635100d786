//! What comes out: [`Forward`], [`Gradients`], [`Telemetry`]; and what goes into a backward: [`Upstream`], [`Sink`].

use crate::{CceOptions, DType, Host, Memory, Shape};
use std::any::Any;

/// The result of [`cce_forward`](crate::cce_forward): outputs, and what the backward needs.
///
/// Per-token outputs have length N and are 0 for ignored tokens. Products accumulate in `f32`, log-sum-exps in a
/// running (maximum, sum) pair; on one machine every output is bitwise equal from run to run.
pub struct Forward<M: Memory = Host> {
    /// The reduced loss; with [`Reduction::None`](crate::Reduction::None) the sum of `losses`, for logging.
    pub loss: M::Scalar,
    /// Each token's loss before reduction: smoothing, z-loss, class and token weight included.
    pub losses: M::Floats,
    /// Negative log-likelihood `lse - z_target` of each token: no weights, no smoothing, no z-loss.
    pub nll: M::Floats,
    /// Log-sum-exp of each token's logits.
    pub lse: M::Floats,
    /// Logit of each token's target, after scale, bias and softcap.
    pub target_logit: M::Floats,
    /// Entropy `-Σ p ln p` of each token's softmax, in nats; with `options.entropy`.
    pub entropy: Option<M::Floats>,
    /// Most probable class of each token, the lowest of equals, `u32::MAX` for ignored tokens; with `options.metrics`.
    pub argmax: Option<M::Indices>,
    /// Share of not ignored tokens whose `argmax` is their target, 0 where there are none; with `options.metrics`.
    pub accuracy: Option<M::Scalar>,
    pub(crate) options: CceOptions,
    pub(crate) shape: Shape,
    pub(crate) dtype: DType,
    /// The backend's own state, e.g. captured candidates.
    pub(crate) saved: Box<dyn Any + Send + Sync>,
}

impl<M: Memory> Forward<M> {
    /// The options it was computed with; the backward uses the same.
    pub fn options(&self) -> &CceOptions {
        &self.options
    }
    /// N, D and V.
    pub fn shape(&self) -> Shape {
        self.shape
    }
}

impl<M: Memory> std::fmt::Debug for Forward<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forward")
            .field("loss", &self.loss)
            .field("shape", &self.shape)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// Gradients of some scalar with respect to the outputs of the forward. What is `None` counts as 0.
///
/// Entries that belong to ignored tokens have no effect. The default is the gradient of `loss` itself.
#[derive(Debug)]
pub struct Upstream<'a, M: Memory = Host> {
    /// With respect to `loss`.
    pub loss: f32,
    /// What `loss` is multiplied by, one `f32` in the backend's memory: an upstream gradient that another kernel computes
    /// need not be read by the host.
    pub loss_scale: Option<M::Slice<'a>>,
    /// With respect to `losses`, `[N]` `f32`: the upstream gradient of `Reduction::None`.
    pub losses: Option<M::Slice<'a>>,
    /// With respect to `nll`, `[N]` `f32`.
    pub nll: Option<M::Slice<'a>>,
    /// With respect to `lse`, `[N]` `f32`.
    pub lse: Option<M::Slice<'a>>,
    /// With respect to `entropy`, `[N]` `f32`; needs `options.entropy`.
    pub entropy: Option<M::Slice<'a>>,
}

impl<M: Memory> Clone for Upstream<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for Upstream<'_, M> {}

impl<M: Memory> Default for Upstream<'_, M> {
    fn default() -> Self {
        Upstream::loss(1.0)
    }
}

impl<'a, M: Memory> Upstream<'a, M> {
    /// `d_loss` for the scalar loss, e.g. 1, a loss scale, or 1 / accumulation steps.
    pub fn loss(d_loss: f32) -> Self {
        Upstream { loss: d_loss, loss_scale: None, losses: None, nll: None, lse: None, entropy: None }
    }
    /// One value for each token's loss: what a caller of `Reduction::None` has. `[N]` `f32`.
    pub fn losses(d_losses: impl Into<M::Slice<'a>>) -> Self {
        Upstream { losses: Some(d_losses.into()), ..Upstream::loss(0.0) }
    }
}

/// The result of [`cce_backward`](crate::cce_backward). What was not asked for is `None` and cost nothing.
#[derive(Debug)]
pub struct Gradients<M: Memory = Host> {
    /// dE [N, D], dense. Accumulated in `f32`, rounded once.
    pub d_embeddings: Option<M::Owned>,
    /// dC [V, D], dense. Accumulated in `f32`, rounded once.
    pub d_classifier: Option<M::Owned>,
    /// dbias `[V]`.
    pub d_bias: Option<M::Owned>,
    /// What the filter did.
    pub telemetry: M::Counters,
}

/// Where one gradient goes, in [`cce_backward_into`](crate::cce_backward_into).
#[derive(Debug, Default)]
pub enum Sink<'a, M: Memory = Host> {
    /// Nowhere: it is not computed.
    #[default]
    Skip,
    /// Into this buffer, whatever it held.
    Overwrite(M::SliceMut<'a>),
    /// Added to this `f32` buffer (β = 1): gradient accumulation without another buffer.
    Accumulate(M::SliceMut<'a>),
}

impl<'a, M: Memory> Sink<'a, M> {
    /// Whether nothing is to be computed.
    pub fn is_skip(&self) -> bool {
        matches!(self, Sink::Skip)
    }
    /// The buffer, if there is one.
    pub fn buffer(&self) -> Option<&M::SliceMut<'a>> {
        match self {
            Sink::Skip => None,
            Sink::Overwrite(buffer) | Sink::Accumulate(buffer) => Some(buffer),
        }
    }
}

/// Where all gradients go.
#[derive(Debug)]
pub struct GradientSinks<'a, M: Memory = Host> {
    /// dE, N·D elements.
    pub embeddings: Sink<'a, M>,
    /// dC, V·D elements.
    pub classifier: Sink<'a, M>,
    /// dbias, V elements.
    pub bias: Sink<'a, M>,
}

impl<M: Memory> Default for GradientSinks<'_, M> {
    fn default() -> Self {
        GradientSinks { embeddings: Sink::Skip, classifier: Sink::Skip, bias: Sink::Skip }
    }
}

/// What the gradient filter did: the speed and the variance of the backward depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Telemetry {
    /// Tokens that were not ignored.
    pub rows: u64,
    /// Entries of the softmax that the forward put aside, the targets' among them: on CUDA less those that it dropped again between
    /// its rounds, on the CPU all.
    pub candidates: u64,
    /// Entries that took part in the sparse gradients: the candidates that passed with the final log-sum-exp.
    pub kept_entries: u64,
    /// Mean over rows of the softmax mass of their kept entries, in [0, 1]; a row on the exact path counts 1.
    pub kept_mass: f64,
    /// Rows that were computed exactly: all with [`Exact`](crate::GradientFilter::Exact), else rows whose candidates
    /// outgrew their space, whose log-sum-exp is not finite, or whose gradient is not sparse.
    pub exact_rows: u64,
    /// Rows that were kept with a larger ε than asked for, so that their candidates fit (CUDA, unbiased filter): their
    /// gradients are unbiased too, with more variance.
    pub raised_rows: u64,
}

impl Telemetry {
    /// Mean number of kept entries over the rows of the sparse path.
    pub fn kept_per_row(&self) -> f64 {
        self.kept_entries as f64 / (self.rows - self.exact_rows).max(1) as f64
    }
}
