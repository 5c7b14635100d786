//! Exact rows beside sparse ones, on the emulated GPU with the checker on, against the oracle: what both give to a class is one sum, and
//! more exact rows than accumulators come in panels. `CCE_CASES=popular,panels` picks some. And chunks and slices of the portable kernels.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::cases::{self, Case};
use common::compare::bits;
use common::room::row_eps;
use common::suite::{self, Got};
use common::{OwnedUpstream, Spec, Tensors, beside, emulated, picked};
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::plan::{KernelChoice, KernelFamily, Tuning};
use cut_cross_entropy::{
    CceOptions, CudaStaged, DType, GradientFilter, GradientSinks, HostBuffer, HostSliceMut, Sink, Upstream,
    cce_backward_into, cce_forward,
};
use cut_cross_entropy_emulator::{self as emulator, Config};

/// In turn; the Hopper kernels take the first two.
const TYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// Under the turn's schedule, and with tensor cores that cut sums off in some turns, a backend of these kernels.
fn set_up(turn: usize, kernels: KernelChoice) -> CudaStaged {
    let cut = emulated::cuts(turn);
    configured(Config { device: "h100".into(), multiprocessors: 6, cut, ..emulated::schedule(turn) }, kernels)
}

fn configured(config: Config, kernels: KernelChoice) -> CudaStaged {
    emulator::configure(&config);
    CudaStaged::new(0).expect("an emulated device").with_room(beside::ROOM).with_kernels(kernels)
}

/// A case by its name, in bf16.
fn tensors(name: &str) -> (Tensors, CceOptions) {
    let mut case = beside::cases().into_iter().find(|case| case.name == name).expect("a case");
    case.spec.dtype = DType::BF16;
    (beside::tensors(&case), case.options)
}

/// chunk_mib: 0 for as many chunks as there are tiles of classes.
fn hopper(cluster: Option<bool>, lead: u32, chunk_mib: u32) -> KernelChoice {
    let tuning = Tuning { cluster, lead, chunk_mib, ..Tuning::default() };
    KernelChoice { family: KernelFamily::Hopper, tuning }
}

/// Each case by one of these, in turn.
fn check(kernels: &[KernelChoice], entry_points: &[&str]) {
    let _guard = emulated::lock();
    emulator::reset_counters();
    let all = beside::cases();
    let wanted = picked::picked("CCE_CASES", &all.iter().map(|case| case.name.to_string()).collect::<Vec<_>>());
    let is_wanted =
        |case: &beside::Case| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| name == case.name));
    for (turn, case) in all.iter().enumerate().filter(|(_, case)| is_wanted(case)) {
        let kernels = kernels[turn % kernels.len()];
        let dtypes = if kernels.family == KernelFamily::Portable { &TYPES[..] } else { &TYPES[..2] };
        beside::check(&set_up(turn, kernels), case, dtypes[turn / 2 % dtypes.len()]);
        assert_eq!(emulator::take_reports(), [""; 0], "{kernels}, {}", case.name);
    }
    if wanted.is_some() {
        println!("only what CCE_CASES picks has run");
        return;
    }
    for name in entry_points {
        assert!(emulator::counters(name).is_some_and(|c| c.wgmma + c.mma > 0), "{name} did not run");
    }
}

#[test]
fn portable_kernels_match_the_oracle() {
    let names = ["lce_exact_f32", "lce_exact_f16", "lce_exact_bf16"];
    check(&[KernelFamily::Portable.into()], &names);
}

/// Where all rows are exact: chunks of a tile of classes; one chunk, in slices; several, in slices, the last one shorter.
#[test]
fn portable_chunks_and_slices_match_the_oracle() {
    let _guard = emulated::lock();
    let shapes = [((150, 40, 700), 0), ((150, 40, 700), 64), ((20, 136, 300), 64), ((100, 24, 4300), 1)];
    for (turn, ((tokens, hidden, vocab), chunk_mib)) in shapes.into_iter().enumerate() {
        let dtype = TYPES[turn % TYPES.len()];
        let spec = Spec { dtype, bias: true, ignored: 0.05, ..Spec::new(tokens, hidden, vocab) };
        let case = Case { spec, ..cases::shapes()[0] };
        let tuning = Tuning { chunk_mib, ..Tuning::default() };
        let backend = set_up(turn, KernelChoice { family: KernelFamily::Portable, tuning });
        suite::check_case_under(&backend, &case, &[GradientFilter::Exact]).unwrap();
        assert_eq!(emulator::take_reports(), [""; 0], "{tokens} {hidden} {vocab}");
    }
}

#[test]
fn hopper_kernels_match_the_oracle() {
    let names =
        ["lce_exact_sm90_f16", "lce_exact_sm90_bf16", "lce_exact_sm90_cluster_bf16", "lce_exact_sm90_cluster_f16"];
    check(&[hopper(None, 2, 64), hopper(Some(true), 3, 0)], &names);
}

/// The sinks that a backward has, all or one: a panel is the last pass where nothing but dE is wanted. Without the checker, which has
/// seen all of this above.
#[test]
fn each_gradient_alone_is_the_same() {
    let _guard = emulated::lock();
    let (tensors, options) = tensors("panels");
    for kernels in [KernelFamily::Portable.into(), hopper(None, 2, 0)] {
        let config =
            Config { device: "h100".into(), multiprocessors: 6, workers: 2, check: false, ..Config::default() };
        let backend = configured(config, kernels);
        let upstream = OwnedUpstream::loss(1.0);
        let (_, all) = suite::run(&backend, &tensors, &options, &upstream);
        let Got { d_embeddings, d_classifier, d_bias, .. } = &all;
        let d_bias = d_bias.as_ref().expect("has a bias");
        for (which, expected) in [d_embeddings, d_classifier, d_bias].into_iter().enumerate() {
            let mut alone = HostBuffer::zeros("gradient", expected.dtype(), expected.len()).expect("fits");
            let forward = cce_forward(&backend, &tensors.inputs(), &options).expect("a legal problem");
            let mut sinks = GradientSinks { embeddings: Sink::Skip, classifier: Sink::Skip, bias: Sink::Skip };
            *[&mut sinks.embeddings, &mut sinks.classifier, &mut sinks.bias][which] = Sink::Overwrite(alone.as_mut());
            cce_backward_into(&backend, &tensors.inputs(), &forward, &upstream.borrow(), sinks)
                .expect("its own forward");
            assert!(bits(&alone.to_f32_vec()) == bits(&expected.to_f32_vec()), "{kernels}, gradient {which}");
        }
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// Who draws which tile, and when, is nobody's business. Without the checker, too.
#[test]
fn results_are_the_same_bits_under_every_schedule() {
    let _guard = emulated::lock();
    let (tensors, options) = tensors("popular");
    for kernels in [KernelFamily::Portable.into(), hopper(None, 2, 0)] {
        let run = |turn| {
            let config = Config { device: "h100".into(), multiprocessors: 6, check: false, ..emulated::schedule(turn) };
            let backend = configured(config, kernels);
            let (forward, got) = suite::run(&backend, &tensors, &options, &OwnedUpstream::loss(1.0));
            let d_bias = got.d_bias.as_ref().map(HostBuffer::to_f32_vec).unwrap_or_default();
            [row_eps(&forward), got.d_embeddings.to_f32_vec(), got.d_classifier.to_f32_vec(), d_bias].map(|v| bits(&v))
        };
        let first = run(0);
        assert!(run(4) == first && run(8) == first, "{kernels}");
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// An output that is added to, in f32, is what it was plus what it would have been.
#[test]
fn gradients_are_added_to_what_was_there() {
    let _guard = emulated::lock();
    let (tensors, options) = tensors("odd_columns");
    let inputs = tensors.inputs();
    for kernels in [KernelFamily::Portable.into(), hopper(None, 2, 0)] {
        let backend = set_up(0, kernels);
        let forward = cce_forward(&backend, &inputs, &options).expect("a legal problem");
        let sizes = [tensors.spec.tokens * tensors.spec.hidden, tensors.spec.vocab * tensors.spec.hidden];
        let run = |before: Option<f32>| {
            let [mut embeddings, mut classifier] = sizes.map(|len| vec![before.unwrap_or(f32::NAN); len]);
            let sink = if before.is_some() { Sink::Accumulate } else { Sink::Overwrite };
            let sinks = GradientSinks {
                embeddings: sink(HostSliceMut::F32(&mut embeddings)),
                classifier: sink(HostSliceMut::F32(&mut classifier)),
                bias: Sink::Skip,
            };
            cce_backward_into(&backend, &inputs, &forward, &Upstream::loss(1.0), sinks).expect("its own forward");
            [embeddings, classifier]
        };
        let (alone, added) = (run(None), run(Some(0.5)));
        for (which, (alone, added)) in alone.iter().zip(&added).enumerate() {
            let expected: Vec<f32> = alone.iter().map(|x| 0.5 + x).collect();
            assert!(bits(added) == bits(&expected), "{kernels}, gradient {which}");
        }
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}
