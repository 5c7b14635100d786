//! What any backend must do with a case. `conformance.rs` turns this into tests, one set a backend.

use super::cases::Case;
use super::data::{Rng, Tensors, buffer};
use super::expected::Expected;
use super::naive::naive;
use super::{OwnedUpstream, compare::frobenius};
use cut_cross_entropy::{
    Backend, CceOptions, DType, GradientDType, GradientFilter, GradientSinks, Host, HostBuffer, Problem, Sink,
    Telemetry, cce_backward_into, cce_forward,
};

/// A backend of host memory, whichever.
pub type HostBackend = dyn Backend<Memory = Host>;

/// The three gradients, in buffers that held NaN before.
#[derive(Debug)]
pub struct Got {
    pub d_embeddings: HostBuffer,
    pub d_classifier: HostBuffer,
    pub d_bias: Option<HostBuffer>,
    pub telemetry: Telemetry,
}

/// Runs forward and backward; gradients overwrite NaN, so that an element that nobody wrote shows.
pub fn run(
    backend: &HostBackend,
    tensors: &Tensors,
    options: &CceOptions,
    upstream: &OwnedUpstream,
) -> (cut_cross_entropy::Forward, Got) {
    let inputs = tensors.inputs();
    let forward = cce_forward(backend, &inputs, options).expect("a legal problem");
    let got = run_backward(backend, tensors, &forward, upstream);
    (forward, got)
}

/// The backward half of [`run`].
pub fn run_backward(
    backend: &HostBackend,
    tensors: &Tensors,
    forward: &cut_cross_entropy::Forward,
    upstream: &OwnedUpstream,
) -> Got {
    let spec = tensors.spec;
    let poison = |dtype, len| buffer(dtype, &vec![f64::NAN; len]);
    let mut d_embeddings = poison(spec.dtype, spec.tokens * spec.hidden);
    let mut d_classifier = poison(spec.dtype, spec.vocab * spec.hidden);
    let mut d_bias = tensors.bias.as_ref().map(|_| poison(DType::F32, spec.vocab));
    let sinks = GradientSinks {
        embeddings: Sink::Overwrite(d_embeddings.as_mut()),
        classifier: Sink::Overwrite(d_classifier.as_mut()),
        bias: d_bias.as_mut().map_or(Sink::Skip, |b| Sink::Overwrite(b.as_mut())),
    };
    let telemetry =
        cce_backward_into(backend, &tensors.inputs(), forward, &upstream.borrow(), sinks).expect("its own forward");
    Got { d_embeddings, d_classifier, d_bias, telemetry }
}

/// The filters that every case runs under. ε is chosen so that on small vocabularies too, some entries are kept for
/// sure, some by chance, and some are not.
pub fn filters() -> [GradientFilter; 4] {
    [
        GradientFilter::Exact,
        GradientFilter::Unbiased { eps: 1.0 / 256.0, seed: 0xDEAD_BEEF_0BAD_CAFE },
        GradientFilter::default(),
        GradientFilter::Threshold { eps: 1.0 / 512.0 },
    ]
}

/// The case's tensors.
pub fn tensors(case: &Case) -> Tensors {
    Tensors { seq_len: case.seq_len, ..case.spec.generate() }
}

/// The case's upstream gradients.
pub fn upstream(case: &Case) -> OwnedUpstream {
    let mut rng = Rng::new(case.spec.seed ^ 0x5EED);
    match case.every_upstream {
        true => OwnedUpstream::everything(case.spec.tokens, case.options.entropy, &mut rng),
        false => OwnedUpstream::loss(1.0),
    }
}

/// Forward outputs, gradients and telemetry of one problem, against `f64`.
///
/// For vocabularies that fit the room for candidates: no row may overflow into the exact path.
pub fn check_one(
    backend: &HostBackend,
    tensors: &Tensors,
    options: &CceOptions,
    upstream: &OwnedUpstream,
) -> Result<(cut_cross_entropy::Forward, Got), String> {
    check_one_by_row(backend, tensors, options, upstream, None)
}

/// The same for a backend whose rows may each have an ε of their own, or be exact.
pub fn check_one_by_row(
    backend: &HostBackend,
    tensors: &Tensors,
    options: &CceOptions,
    upstream: &OwnedUpstream,
    row_eps: Option<&RowEps>,
) -> Result<(cut_cross_entropy::Forward, Got), String> {
    let inputs = tensors.inputs();
    let problem = Problem::new(&inputs, options).map_err(|e| e.to_string())?;
    check_against(backend, tensors, options, upstream, &expected(backend, &problem), row_eps)
}

/// The ε with which a backend kept each token's entries, 0 where it computed them exactly.
pub type RowEps = dyn Fn(&cut_cross_entropy::Forward) -> Vec<f32>;

/// What this backend should return: GPUs feed their matrix units the type of the inputs, and so does a processor that has some.
fn expected(backend: &HostBackend, problem: &Problem<'_>) -> Expected {
    let expected = Expected::new(problem);
    let in_bf16 = problem.dtype() == DType::BF16 && problem.options().gradients.dtype == GradientDType::Input;
    if backend.name() == "cuda" || in_bf16 && cut_cross_entropy::cpu::multiplies_bf16() {
        expected.stored_as(problem.dtype())
    } else {
        expected
    }
}

fn check_against(
    backend: &HostBackend,
    tensors: &Tensors,
    options: &CceOptions,
    upstream: &OwnedUpstream,
    expected: &Expected,
    row_eps: Option<&RowEps>,
) -> Result<(cut_cross_entropy::Forward, Got), String> {
    let (forward, got) = run(backend, tensors, options, upstream);
    expected.check_forward(&forward)?;
    let upstream = upstream.widen(tensors.spec.tokens);
    let tiles = has_tiles(&forward);
    let gradients = match row_eps.map(|row_eps| row_eps(&forward)) {
        None => expected.gradients_by_row(&upstream, options.filter, tiles, |_| Some(options.filter.eps().into())),
        Some(eps) => {
            let own = |i: usize| Some(eps[i].into()).filter(|&eps| eps > 0.0);
            expected.gradients_by_row(&upstream, options.filter, tiles, own)
        }
    };
    gradients.check_telemetry(&got.telemetry)?;
    let hidden = tensors.spec.hidden;
    gradients.check(hidden, Some(&got.d_embeddings), Some(&got.d_classifier), got.d_bias.as_ref())?;
    Ok((forward, got))
}

/// Whether sparse gradients may be products of tiles on the device that computed this.
#[cfg(feature = "cuda")]
fn has_tiles(forward: &cut_cross_entropy::Forward) -> bool {
    use cut_cross_entropy::{CudaStaged, plan::Tiles};
    CudaStaged::on_device(forward).and_then(|forward| forward.tiles()).is_some_and(|tiles| tiles != Tiles::Off)
}
#[cfg(not(feature = "cuda"))]
fn has_tiles(_forward: &cut_cross_entropy::Forward) -> bool {
    false
}

/// One case under every filter.
pub fn check_case(backend: &HostBackend, case: &Case) -> Result<(), String> {
    check_case_under(backend, case, &filters())
}

/// One case under some filters.
pub fn check_case_under(backend: &HostBackend, case: &Case, filters: &[GradientFilter]) -> Result<(), String> {
    check_case_by_row(backend, case, filters, None).map(drop)
}

/// As [`check_one_by_row`]. What became of the rows, filter by filter.
pub fn check_case_by_row(
    backend: &HostBackend,
    case: &Case,
    filters: &[GradientFilter],
    row_eps: Option<&RowEps>,
) -> Result<Vec<Telemetry>, String> {
    let (tensors, upstream) = (tensors(case), upstream(case));
    let inputs = tensors.inputs();
    let expected = expected(backend, &Problem::new(&inputs, &case.options).map_err(|e| e.to_string())?);
    let under = |&filter: &GradientFilter| {
        let options = CceOptions { filter, ..case.options };
        check_against(backend, &tensors, &options, &upstream, &expected, row_eps)
            .map(|(_, got)| got.telemetry)
            .map_err(|message| format!("{} under {filter:?}: {message} ({})", case.name, case.why))
    };
    filters.iter().map(under).collect()
}

/// Every case, all failures together.
pub fn check_cases(backend: &HostBackend, cases: &[Case]) {
    assert!(!cases.is_empty());
    let failures: Vec<String> = cases.iter().filter_map(|case| check_case(backend, case).err()).collect();
    assert!(
        failures.is_empty(),
        "{}: {} of {} cases\n{}",
        backend.name(),
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

/// Under the exact filter the error in the large is no worse than that of the textbook computation in `f32`.
pub fn check_no_worse_than_naive(backend: &HostBackend, case: &Case) {
    let (tensors, upstream) = (tensors(case), OwnedUpstream::loss(1.0));
    let inputs = tensors.inputs();
    let options = CceOptions { filter: GradientFilter::Exact, ..case.options };
    let problem = Problem::new(&inputs, &options).expect("legal");
    let wide = upstream.widen(case.spec.tokens);
    let exact = Expected::new(&problem);
    let gradients = exact.reference.backward(&wide);
    let naive = naive(&problem, &wide);
    let (forward, got) = run(backend, &tensors, &options, &upstream);
    let pairs = [
        ("nll", &forward.nll, &naive.nll, &exact.forward.nll),
        ("d_embeddings", &got.d_embeddings.to_f32_vec(), &naive.d_embeddings, &gradients.d_embeddings),
        ("d_classifier", &got.d_classifier.to_f32_vec(), &naive.d_classifier, &gradients.d_classifier),
    ];
    for (what, ours, theirs, exact) in pairs {
        let (ours, theirs) = (frobenius(ours, exact), frobenius(theirs, exact));
        // Two orders of summation scatter around each other; an ulp on top for errors that are tiny by luck.
        let allowed = 3.0 * theirs + f64::from(f32::EPSILON);
        assert!(ours <= allowed, "{}: {what}: relative error {ours:e}, naive {theirs:e}", case.name);
    }
}
