//! The CPU backend: rayon over token blocks and vocabulary chunks, the `gemm` crate for tile products.

mod backward;
mod bf16;
mod candidates;
mod coefficients;
mod columns;
mod exact;
mod exact_products;
mod forward;
mod matmul;
mod plan;
mod rows;
mod sink;
mod softmax_state;
mod vector;

pub use bf16::multiplies_bf16;
#[doc(hidden)]
pub use bf16::plain as plain_bf16;
pub use plan::{CpuPlan, Region};

use crate::{
    Backend, DType, Element, Error, Forward, GradientSinks, Host, HostBuffer, HostSlice, HostSliceMut, Problem,
    Reduction, Result, Telemetry, Upstream,
};
use candidates::{BlockEntries, RowStatistics};
use rows::{Row, TypedMatrix, active_rows};
use softmax_state::SoftmaxState;

/// The CPU backend, on the rayon pool it is called in.
///
/// Every output is bitwise the same from run to run and for every number of threads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Cpu {
    /// How this problem would be cut up in the present rayon pool, and its workspace. Pure arithmetic.
    pub fn plan(&self, problem: &Problem<'_>) -> CpuPlan {
        CpuPlan::new(problem.shape(), problem.dtype(), problem.options(), rayon::current_num_threads())
    }
}

/// What a forward leaves for its backward.
struct Saved {
    rows: Vec<Row>,
    statistics: Vec<RowStatistics>,
    /// One a token block; empty when the forward captured nothing.
    blocks: Vec<BlockEntries>,
}

/// The sum of all losses is divided by this: PyTorch's weighted mean, 1 for the other reductions.
fn denominator(problem: &Problem<'_>, rows: &[Row]) -> f64 {
    match problem.options().reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean => rows
            .iter()
            .map(|r| problem.token_weight(r.token as usize) as f64 * problem.class_weight(r.class as usize) as f64)
            .sum(),
    }
}

impl Backend for Cpu {
    type Memory = Host;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<HostBuffer> {
        HostBuffer::zeros(tensor, dtype, len)
    }

    fn borrow_mut<'a>(&self, owned: &'a mut HostBuffer) -> HostSliceMut<'a> {
        owned.as_mut()
    }

    fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
        match problem.inputs().embeddings.data {
            HostSlice::F32(e) => forward::<f32>(problem, e),
            HostSlice::F16(e) => forward::<half::f16>(problem, e),
            HostSlice::BF16(e) => forward::<half::bf16>(problem, e),
            other => Err(not_a_float(other)),
        }
    }

    fn backward(
        &self,
        problem: &Problem<'_>,
        forward: &Forward,
        upstream: &Upstream<'_>,
        sinks: GradientSinks<'_>,
    ) -> Result<Telemetry> {
        let Some(saved) = forward.saved.downcast_ref::<Saved>() else {
            return Err(Error::ForeignForward { reason: "another backend computed it".into() });
        };
        if !saved.rows.iter().map(|r| (r.token, r.class)).eq(active_rows(problem).iter().map(|r| (r.token, r.class))) {
            return Err(Error::ForeignForward { reason: "it was computed for other targets".into() });
        }
        match problem.inputs().embeddings.data {
            HostSlice::F32(e) => backward::run::<f32>(problem, e, saved, upstream, sinks),
            HostSlice::F16(e) => backward::run::<half::f16>(problem, e, saved, upstream, sinks),
            HostSlice::BF16(e) => backward::run::<half::bf16>(problem, e, saved, upstream, sinks),
            other => Err(not_a_float(other)),
        }
    }
}

/// Validation lets no integer matrix through; this keeps the match total without a panic.
fn not_a_float(slice: HostSlice<'_>) -> Error {
    use crate::memory::Buffer;
    Error::DType { tensor: "embeddings", found: slice.dtype(), expected: "f32, f16 or bf16" }
}

/// Embeddings and classifier with their element type.
fn matrices<'a, 'p: 'a, T: Element>(
    problem: &Problem<'p>,
    embeddings: &'a [T],
) -> Result<(TypedMatrix<'a, T>, TypedMatrix<'a, T>)> {
    let inputs = problem.inputs();
    let classifier = T::slice(inputs.classifier.data).ok_or_else(|| not_a_float(inputs.classifier.data))?;
    Ok((TypedMatrix::new(&inputs.embeddings, embeddings), TypedMatrix::new(&inputs.classifier, classifier)))
}

fn forward<T: Element>(problem: &Problem<'_>, embeddings: &[T]) -> Result<Forward> {
    let (embeddings, classifier) = matrices(problem, embeddings)?;
    let options = *problem.options();
    let gradients = options.gradients;
    let any_gradient = gradients.embeddings || gradients.classifier || gradients.bias;
    let capture = options.capture && any_gradient && !options.is_dense();
    let rows = active_rows(problem);
    let pass = forward::run(problem, &rows, embeddings, classifier, capture.then_some(options.filter));

    let tokens = problem.shape().tokens;
    let scatter = |value: &dyn Fn(usize) -> f32| {
        let mut out = vec![0.0; tokens];
        rows.iter().enumerate().for_each(|(index, row)| out[row.token as usize] = value(index));
        out
    };
    let class_weight_sum: f64 = match options.label_smoothing > 0.0 {
        true => (0..problem.shape().vocab).map(|v| problem.class_weight(v) as f64).sum(),
        false => 0.0,
    };
    let loss_of = |index: usize| row_loss(problem, &rows[index], &pass.states[index], class_weight_sum);
    let losses = scatter(&loss_of);
    let denominator = denominator(problem, &rows);
    let sum: f64 = losses.iter().map(|&l| l as f64).sum();
    let correct = rows.iter().zip(&pass.states).filter(|(r, s)| r.class == s.argmax).count();
    let argmax = || {
        let mut out = vec![u32::MAX; tokens];
        rows.iter().zip(&pass.states).for_each(|(row, state)| out[row.token as usize] = state.argmax);
        out
    };
    Ok(Forward {
        loss: if denominator == 0.0 { 0.0 } else { (sum / denominator) as f32 },
        nll: scatter(&|i| pass.states[i].nll()),
        lse: scatter(&|i| pass.statistics[i].lse),
        target_logit: scatter(&|i| pass.states[i].target_logit),
        entropy: options.entropy.then(|| scatter(&|i| pass.statistics[i].entropy)),
        argmax: options.metrics.then(argmax),
        accuracy: options.metrics.then(|| correct as f32 / rows.len().max(1) as f32),
        losses,
        options,
        shape: problem.shape(),
        dtype: T::DTYPE,
        saved: Box::new(Saved { statistics: pass.statistics, blocks: pass.lists, rows }),
    })
}

/// `t_i · ((1 - s) · w_y · nll + s/V · Σ_v w_v (lse - z_v) + z_loss · lse²)`.
fn row_loss(problem: &Problem<'_>, row: &Row, state: &SoftmaxState, class_weight_sum: f64) -> f32 {
    let options = problem.options();
    let (smoothing, z_loss) = (options.label_smoothing as f64, options.z_loss as f64);
    let (max, log_sum) = (state.max as f64, state.log_sum());
    let nll = (max - state.target_logit as f64) + log_sum;
    let mut loss = (1.0 - smoothing) * problem.class_weight(row.class as usize) as f64 * nll;
    if smoothing > 0.0 {
        let spread = class_weight_sum * ((max - state.anchor as f64) + log_sum) - state.smooth;
        loss += smoothing / problem.shape().vocab as f64 * spread;
    }
    if z_loss > 0.0 {
        loss += z_loss * (max + log_sum).powi(2);
    }
    (problem.token_weight(row.token as usize) as f64 * loss) as f32
}
