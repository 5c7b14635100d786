//! Exact rows beside sparse ones, on the emulated GPU with the checker on, against the oracle: what both give to a class is one sum, and
//! more exact rows than accumulators come in panels. `CCE_CASES=popular,panels` picks some.
#![cfg(feature = "cuda")]

mod common;

use common::compare::bits;
use common::room::{self, row_eps};
use common::suite::{self, Got};
use common::{OwnedUpstream, Spec, Tensors, emulated, picked};
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::plan::{KernelChoice, KernelFamily, Tuning};
use cut_cross_entropy::{
    CceOptions, CudaStaged, DType, GradientFilter, GradientSinks, HostBuffer, Sink, cce_backward_into, cce_forward,
};
use cut_cross_entropy_emulator::{self as emulator, Config};

/// Candidates a row, and the threshold: a flat row has more until it has summed up 64 classes.
const ROOM: usize = 8;
const EPS: f32 = 1.0 / 64.0;
/// In turn; the Hopper kernels take the first two.
const TYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    spec: Spec,
    options: CceOptions,
    /// Of blocks of 128 tokens, those that are sure of their targets, and among how many classes these are.
    sharp_blocks: fn(usize) -> bool,
    classes: usize,
}

fn cases() -> Vec<Case> {
    let odd = |block: usize| block % 2 == 1;
    let plain = CceOptions { filter: GradientFilter::Threshold { eps: EPS }, ..CceOptions::default() };
    let with = |spec: Spec| Spec { seed: 41, ..spec };
    let case = |name, spec, options, classes| Case { name, spec: with(spec), options, sharp_blocks: odd, classes };
    vec![
        // Several tiles of rows, of classes and of columns, each with a ragged last one.
        case("ragged", Spec::new(400, 264, 700), plain, 100),
        // Lists longer than a warp holds, which a team of threads puts in order; tokens of exact rows that do not follow one another.
        Case {
            sharp_blocks: |block| matches!(block, 2 | 3), // of tokens: rows have moved forward
            ..case("popular", Spec { ignored: 0.1, ..Spec::new(520, 72, 600) }, plain, 3)
        },
        // Rows that end within a vector, the last token's among the sparse ones; and the dense part of label smoothing.
        Case {
            sharp_blocks: |block| block % 2 == 0,
            ..case(
                "odd_columns",
                Spec { padding: 9, ..Spec::new(300, 71, 520) },
                CceOptions { label_smoothing: 0.1, ..plain },
                2,
            )
        },
        case(
            "softcap",
            Spec { class_weights: true, ..Spec::new(300, 136, 300) },
            CceOptions { softcap: Some(50.0), ..plain },
            20,
        ),
        // More exact rows than the 1024 of a panel.
        Case { sharp_blocks: |block| block == 4, ..case("panels", Spec::new(1400, 72, 200), plain, 5) },
    ]
}

/// Sparse rows have a gradient to give: their targets have 0.6 of the probability. Nothing lies behind the last row.
fn tensors(case: &Case) -> Tensors {
    let logit = (case.spec.vocab as f32).ln() + 0.5;
    let mut tensors = room::flat_and_sharp(case.spec, case.classes, logit, |i| (case.sharp_blocks)(i / 128));
    let bias: Vec<f64> = (0..case.spec.vocab).map(|class| (class % 7) as f64 * 0.05).collect();
    tensors.bias = Some(common::data::buffer(DType::F32, &bias));
    for matrix in [&mut tensors.embeddings, &mut tensors.classifier] {
        let len = matrix.len() - case.spec.padding;
        match matrix {
            HostBuffer::F32(values) => values.truncate(len),
            HostBuffer::F16(values) => values.truncate(len),
            HostBuffer::BF16(values) => values.truncate(len),
            _ => panic!("no type of a matrix"),
        }
    }
    tensors
}

/// The case in this type, under the turn's schedule, for a backend of these kernels.
fn set_up(case: &Case, dtype: DType, turn: usize, kernels: KernelChoice) -> (Tensors, CudaStaged) {
    emulator::configure(&Config { device: "h100".into(), multiprocessors: 6, ..emulated::schedule(turn) });
    let backend = CudaStaged::new(0).expect("an emulated device").with_room(ROOM).with_kernels(kernels);
    (tensors(&Case { spec: Spec { dtype, ..case.spec }, ..*case }), backend)
}

fn hopper(cluster: Option<bool>, lead: u32) -> KernelChoice {
    KernelChoice { family: KernelFamily::Hopper, tuning: Tuning { cluster, lead, ..Tuning::default() } }
}

fn check(kernels: &[KernelChoice], entry_points: &[&str]) {
    let _guard = emulated::lock();
    emulator::reset_counters();
    let all = cases();
    let wanted = picked::picked("CCE_CASES", &all.iter().map(|case| case.name.to_string()).collect::<Vec<_>>());
    let is_wanted = |case: &Case| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| name == case.name));
    for (turn, case) in all.iter().enumerate().filter(|(_, case)| is_wanted(case)) {
        for (index, &kernels) in kernels.iter().enumerate() {
            let dtypes = if kernels.family == KernelFamily::Portable { &TYPES[..] } else { &TYPES[..2] };
            let (tensors, backend) = set_up(case, dtypes[turn % dtypes.len()], turn + index, kernels);
            let upstream = OwnedUpstream::loss(0.7);
            let checked = suite::check_one_by_row(&backend, &tensors, &case.options, &upstream, Some(&row_eps));
            let (_, got) = checked.unwrap_or_else(|message| panic!("{kernels}, {}: {message}", case.name));
            let exact = got.telemetry.exact_rows;
            let least = if case.name == "panels" { 1025 } else { 100 };
            assert!(exact >= least && exact < got.telemetry.rows, "{kernels}, {}: {exact} exact rows", case.name);
            assert_eq!(emulator::take_reports(), [""; 0], "{kernels}, {}", case.name);
        }
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

#[test]
fn hopper_kernels_match_the_oracle() {
    let names = ["lce_exact_sm90_f16", "lce_exact_sm90_bf16", "lce_exact_sm90_cluster_bf16"];
    check(&[hopper(None, 2), hopper(Some(true), 3)], &names);
}

/// The sinks that a backward has, all or one: a panel is the last pass where nothing but dE is wanted.
#[test]
fn each_gradient_alone_is_the_same() {
    let _guard = emulated::lock();
    let panels = cases().into_iter().find(|case| case.name == "panels").expect("a case");
    for kernels in [KernelFamily::Portable.into(), hopper(None, 2)] {
        let (tensors, backend) = set_up(&panels, DType::BF16, 0, kernels);
        let upstream = OwnedUpstream::loss(1.0);
        let (_, all) = suite::run(&backend, &tensors, &panels.options, &upstream);
        let Got { d_embeddings, d_classifier, d_bias, .. } = &all;
        let d_bias = d_bias.as_ref().expect("has a bias");
        for (which, expected) in [d_embeddings, d_classifier, d_bias].into_iter().enumerate() {
            let mut alone = HostBuffer::zeros("gradient", expected.dtype(), expected.len()).expect("fits");
            let forward = cce_forward(&backend, &tensors.inputs(), &panels.options).expect("a legal problem");
            let mut sinks = GradientSinks { embeddings: Sink::Skip, classifier: Sink::Skip, bias: Sink::Skip };
            *[&mut sinks.embeddings, &mut sinks.classifier, &mut sinks.bias][which] = Sink::Overwrite(alone.as_mut());
            cce_backward_into(&backend, &tensors.inputs(), &forward, &upstream.borrow(), sinks)
                .expect("its own forward");
            assert!(bits(&alone.to_f32_vec()) == bits(&expected.to_f32_vec()), "{kernels}, gradient {which}");
        }
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// Who draws which tile, and when, is nobody's business.
#[test]
fn results_are_the_same_bits_under_every_schedule() {
    let _guard = emulated::lock();
    let popular = cases().into_iter().find(|case| case.name == "popular").expect("a case");
    for kernels in [KernelFamily::Portable.into(), hopper(None, 2)] {
        let run = |turn| {
            let (tensors, backend) = set_up(&popular, DType::BF16, turn, kernels);
            let (forward, got) = suite::run(&backend, &tensors, &popular.options, &OwnedUpstream::loss(1.0));
            let d_bias = got.d_bias.as_ref().map(HostBuffer::to_f32_vec).unwrap_or_default();
            [row_eps(&forward), got.d_embeddings.to_f32_vec(), got.d_classifier.to_f32_vec(), d_bias].map(|v| bits(&v))
        };
        let first = run(0);
        assert!(run(4) == first && run(8) == first, "{kernels}");
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}
