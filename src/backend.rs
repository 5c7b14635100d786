//! The contract between the operation and what computes it. The conformance suite speaks to nothing else.

use crate::memory::Buffer;
use crate::problem::check_vector;
use crate::{
    CceOptions, DType, Error, Forward, GradientDType, GradientSinks, Gradients, Inputs, Memory, Problem, Result, Sink,
    Upstream,
};

/// Something that computes the loss and its gradients: [`Cpu`](crate::Cpu) or, with the feature `cuda`, `Cuda` and `CudaStaged`.
///
/// Implementations may rely on everything that [`Problem::new`] checks, and on sinks of the right length and dtype.
pub trait Backend {
    /// Where its tensors live.
    type Memory: Memory;

    /// Short name, as printed by `cce info`.
    fn name(&self) -> &'static str;

    /// A buffer for a gradient.
    ///
    /// # Errors
    /// [`Error::Allocation`]; on a GPU [`Error::Device`]; [`Error::DType`] for a type that is no gradient's.
    fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<<Self::Memory as Memory>::Owned>;

    /// An owned buffer, borrowed for writing.
    fn borrow_mut<'a>(&self, owned: &'a mut <Self::Memory as Memory>::Owned) -> <Self::Memory as Memory>::SliceMut<'a>;

    /// Computes the outputs.
    ///
    /// # Errors
    /// Those of the machine, [`Error::Allocation`] and [`Error::Device`]; what is wrong with the problem was found before.
    fn forward(&self, problem: &Problem<'_, Self::Memory>) -> Result<Forward<Self::Memory>>;

    /// Computes the gradients whose sink is not [`Sink::Skip`].
    ///
    /// # Errors
    /// [`Error::ForeignForward`] when `forward` is not its own; those of the machine.
    fn backward(
        &self,
        problem: &Problem<'_, Self::Memory>,
        forward: &Forward<Self::Memory>,
        upstream: &Upstream<'_, Self::Memory>,
        sinks: GradientSinks<'_, Self::Memory>,
    ) -> Result<<Self::Memory as Memory>::Counters>;
}

/// Loss, per-token outputs, and what the backward needs; the logits never exist in memory.
///
/// # Errors
/// Whatever [`Problem::new`] finds, and the backend's own.
///
/// ```
/// use cut_cross_entropy::{CceOptions, Cpu, Inputs, Matrix, cce_forward};
/// let (embeddings, classifier) = ([1.0_f32, 0.0], [2.0_f32, 0.0, 0.0, 5.0]);
/// let inputs = Inputs::new(Matrix::new(&embeddings, 1, 2), Matrix::new(&classifier, 2, 2), &[0_i64]);
/// let forward = cce_forward(&Cpu, &inputs, &CceOptions::default())?;
/// assert!((forward.loss - (1.0 + (-2.0_f32).exp()).ln()).abs() < 1e-6);
/// # Ok::<(), cut_cross_entropy::Error>(())
/// ```
pub fn cce_forward<B: Backend + ?Sized>(
    backend: &B,
    inputs: &Inputs<'_, B::Memory>,
    options: &CceOptions,
) -> Result<Forward<B::Memory>> {
    backend.forward(&Problem::new(inputs, options)?)
}

/// The gradients that `options.gradients` of the forward asks for, in new buffers.
///
/// # Errors
/// Whatever [`Problem::new`] finds; [`Error::ForeignForward`] when `forward` was computed over other inputs or by another backend;
/// [`Error::ShapeMismatch`], [`Error::DType`] and [`Error::NoSuchGradient`] for a wrong `upstream`;
/// [`Error::Allocation`]; on a GPU [`Error::Device`].
///
/// ```
/// use cut_cross_entropy::{CceOptions, Cpu, Inputs, Matrix, Upstream, cce_backward, cce_forward};
/// let (embeddings, classifier) = ([1.0_f32, 0.0], [2.0_f32, 0.0, 0.0, 5.0]);
/// let inputs = Inputs::new(Matrix::new(&embeddings, 1, 2), Matrix::new(&classifier, 2, 2), &[0_i64]);
/// let forward = cce_forward(&Cpu, &inputs, &CceOptions::default())?;
/// let gradients = cce_backward(&Cpu, &inputs, &forward, &Upstream::default())?;
/// let d_embeddings = gradients.d_embeddings.expect("asked for by default");
/// let p1 = 1.0 / (1.0 + 2.0_f32.exp()); // probability of class 1
/// assert!((d_embeddings.as_f32().unwrap()[0] - (-p1 * 2.0)).abs() < 1e-6);
/// # Ok::<(), cut_cross_entropy::Error>(())
/// ```
pub fn cce_backward<B: Backend + ?Sized>(
    backend: &B,
    inputs: &Inputs<'_, B::Memory>,
    forward: &Forward<B::Memory>,
    upstream: &Upstream<'_, B::Memory>,
) -> Result<Gradients<B::Memory>> {
    let problem = Problem::new(inputs, &forward.options)?;
    let (shape, request) = (problem.shape(), forward.options.gradients);
    let allocate = |wanted: bool, tensor, input: DType, rows: usize, columns: usize| {
        let dtype = if request.dtype == GradientDType::F32 { DType::F32 } else { input };
        wanted.then(|| backend.allocate(tensor, dtype, rows * columns)).transpose()
    };
    let input = problem.dtype();
    let mut d_embeddings = allocate(request.embeddings, "d_embeddings", input, shape.tokens, shape.hidden)?;
    let mut d_classifier = allocate(request.classifier, "d_classifier", input, shape.vocab, shape.hidden)?;
    let bias_dtype = inputs.bias.map(|b| b.dtype());
    let mut d_bias =
        allocate(request.bias && bias_dtype.is_some(), "d_bias", bias_dtype.unwrap_or(input), shape.vocab, 1)?;

    let sink = |owned| match owned {
        Some(owned) => Sink::Overwrite(backend.borrow_mut(owned)),
        None => Sink::Skip,
    };
    let sinks = GradientSinks {
        embeddings: sink(d_embeddings.as_mut()),
        classifier: sink(d_classifier.as_mut()),
        bias: sink(d_bias.as_mut()),
    };
    let telemetry = checked_backward(backend, &problem, forward, upstream, sinks)?;
    Ok(Gradients { d_embeddings, d_classifier, d_bias, telemetry })
}

/// The gradients whose sink is not [`Sink::Skip`], written or added to the caller's buffers.
///
/// `options.gradients` of the forward has no say here.
///
/// # Errors
/// As [`cce_backward`]; [`Error::ShapeMismatch`] and [`Error::DType`] for a wrong sink.
pub fn cce_backward_into<B: Backend + ?Sized>(
    backend: &B,
    inputs: &Inputs<'_, B::Memory>,
    forward: &Forward<B::Memory>,
    upstream: &Upstream<'_, B::Memory>,
    sinks: GradientSinks<'_, B::Memory>,
) -> Result<<B::Memory as Memory>::Counters> {
    checked_backward(backend, &Problem::new(inputs, &forward.options)?, forward, upstream, sinks)
}

/// [`cce_forward`] and [`cce_backward`] in one call.
///
/// # Errors
/// Those of the two.
#[allow(clippy::type_complexity, reason = "a pair is what it is")]
pub fn cce_forward_backward<B: Backend + ?Sized>(
    backend: &B,
    inputs: &Inputs<'_, B::Memory>,
    options: &CceOptions,
    upstream: &Upstream<'_, B::Memory>,
) -> Result<(Forward<B::Memory>, Gradients<B::Memory>)> {
    let forward = cce_forward(backend, inputs, options)?;
    let gradients = cce_backward(backend, inputs, &forward, upstream)?;
    Ok((forward, gradients))
}

fn checked_backward<B: Backend + ?Sized>(
    backend: &B,
    problem: &Problem<'_, B::Memory>,
    forward: &Forward<B::Memory>,
    upstream: &Upstream<'_, B::Memory>,
    sinks: GradientSinks<'_, B::Memory>,
) -> Result<<B::Memory as Memory>::Counters> {
    let shape = problem.shape();
    if forward.shape != shape || forward.dtype != problem.dtype() {
        return Err(Error::ForeignForward {
            reason: format!(
                "it was computed for {} in {}, the inputs are {shape} in {}",
                forward.shape,
                forward.dtype,
                problem.dtype()
            ),
        });
    }
    check_upstream(problem, upstream)?;
    if !sinks.bias.is_skip() && problem.inputs().bias.is_none() {
        return Err(Error::NoSuchGradient { gradient: "d_bias", reason: "the inputs have no bias" });
    }
    check_sink("d_embeddings", &sinks.embeddings, [shape.tokens, shape.hidden])?;
    check_sink("d_classifier", &sinks.classifier, [shape.vocab, shape.hidden])?;
    check_sink("d_bias", &sinks.bias, [shape.vocab, 1])?;
    backend.backward(problem, forward, upstream, sinks)
}

fn check_upstream<M: Memory>(problem: &Problem<'_, M>, upstream: &Upstream<'_, M>) -> Result<()> {
    let owner = ("embeddings", problem.inputs().embeddings.shape());
    let is_f32 = |tensor, slice: &M::Slice<'_>| match slice.dtype() {
        DType::F32 => Ok(()),
        found => Err(Error::DType { tensor, found, expected: "f32" }),
    };
    if let Some(scale) = &upstream.loss_scale {
        check_vector("upstream.loss_scale", Some(scale), ("loss", [1, 1]), "number of elements")?;
        is_f32("upstream.loss_scale", scale)?;
    }
    let vectors = [
        ("upstream.losses", &upstream.losses),
        ("upstream.nll", &upstream.nll),
        ("upstream.lse", &upstream.lse),
        ("upstream.entropy", &upstream.entropy),
    ];
    for (tensor, vector) in vectors {
        let Some(vector) = vector else { continue };
        check_vector(tensor, Some(vector), owner, "tokens")?;
        is_f32(tensor, vector)?;
    }
    if upstream.entropy.is_some() && !problem.options().entropy {
        return Err(Error::NoSuchGradient { gradient: "upstream.entropy", reason: "options.entropy is off" });
    }
    Ok(())
}

fn check_sink<M: Memory>(tensor: &'static str, sink: &Sink<'_, M>, shape: [usize; 2]) -> Result<()> {
    let Some(buffer) = sink.buffer() else { return Ok(()) };
    if buffer.len() != shape[0] * shape[1] {
        return Err(Error::ShapeMismatch {
            left: tensor,
            left_shape: vec![buffer.len()],
            right: "its gradient",
            right_shape: shape.into(),
            dimension: "number of elements",
        });
    }
    if matches!(sink, Sink::Accumulate(_)) && buffer.dtype() != DType::F32 {
        return Err(Error::DType { tensor, found: buffer.dtype(), expected: "f32 to accumulate into" });
    }
    Ok(())
}
