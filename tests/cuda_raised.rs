//! Row blocks whose candidates outgrow their room, on the emulated GPU: with the unbiased filter they do the round again with
//! a larger ε, and are exact only where that does not help; with a threshold they are exact.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::compare::bits;
use common::room::{self, row_eps};
use common::suite::{self, Got};
use common::{OwnedUpstream, Spec, Tensors};
use cut_cross_entropy::plan::{KernelFamily, Workload};
use cut_cross_entropy::{CceOptions, CudaStaged, DType, GradientFilter, Shape};
use cut_cross_entropy_emulator::{self as emulator, Async, Config, Order};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Candidates a row: less than half of what a flat softmax keeps at [`EPS`].
const ROOM: usize = 28;
const EPS: f32 = 1.0 / 64.0;
const VOCAB: usize = 3000;

/// The settings of the emulator are those of the process: one test at a time.
fn emulated(config: &Config) -> (MutexGuard<'static, ()>, CudaStaged) {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    emulator::install().expect("the emulator is built with this test");
    emulator::configure(config);
    let backend = CudaStaged::new(0).expect("an emulated device").with_room(ROOM);
    (guard, backend)
}

/// One multiprocessor, which is busy for long enough that the planner finds three rounds worth their time.
fn checked() -> Config {
    Config { device: "h100".into(), multiprocessors: 1, ..Config::default() }
}

fn unchecked() -> Config {
    Config { check: false, ..checked() }
}

/// Both forwards, with the type of their inputs.
const KERNELS: [(KernelFamily, DType); 2] = [(KernelFamily::Portable, DType::F32), (KernelFamily::Hopper, DType::BF16)];

/// Of few columns, some tokens sure of their target.
fn flat_and_sharp(tokens: usize, is_sharp: impl Fn(usize) -> bool, dtype: DType) -> Tensors {
    room::flat_and_sharp(Spec { dtype, ..Spec::new(tokens, 8, VOCAB) }, 100, 40.0, is_sharp)
}

fn workload(dtype: DType, kernels: KernelFamily) -> Workload {
    let shape = Shape { tokens: 150, hidden: 8, vocab: VOCAB };
    Workload::of_shape(shape, dtype, unbiased(EPS, 5)).with_kernels(kernels).with_room(Some(ROOM))
}

fn unbiased(eps: f32, seed: u64) -> CceOptions {
    CceOptions { filter: GradientFilter::Unbiased { eps, seed }, ..CceOptions::default() }
}

/// Runs, and compares everything with the oracle under each row's own ε.
fn check(backend: &CudaStaged, tensors: &Tensors, options: &CceOptions) -> (Got, Vec<f32>) {
    let checked = suite::check_one_by_row(backend, tensors, options, &OwnedUpstream::loss(1.0), Some(&row_eps));
    let (forward, got) = checked.unwrap_or_else(|message| panic!("{message}"));
    (got, row_eps(&forward))
}

#[test]
fn blocks_that_overflow_are_kept_with_a_larger_eps_beside_others_that_are_not() {
    for (family, dtype) in KERNELS {
        let (_guard, backend) = emulated(&checked());
        let backend = backend.with_kernels(family);
        let plan = backend.cuda().plan(&workload(dtype, family)).expect("a plan");
        assert_eq!(plan.rounds.len(), 3, "{plan}");
        let tensors = flat_and_sharp(150, |i| i >= 128, dtype);
        for label_smoothing in [0.0, 0.1] {
            let options = CceOptions { label_smoothing, ..unbiased(EPS, 5) };
            let (got, rows) = check(&backend, &tensors, &options);
            assert_eq!((got.telemetry.exact_rows, got.telemetry.raised_rows), (0, 128), "{family}");
            // The flattest softmax keeps 1 / ε: what there is room for, but for what the forecasts were wrong about.
            let least = 1.0 / ROOM as f32;
            assert!(rows[..128].iter().all(|row| (least..3.0 * least).contains(row)), "{family}: {rows:?}");
            assert!(rows[128..].iter().all(|&row| row == EPS), "{family}: {rows:?}");
        }
        assert_eq!(emulator::take_reports(), Vec::<String>::new());
    }
}

#[test]
fn a_raised_eps_is_unbiased() {
    // Over seeds the mean's error must be that of independent draws, 1 / sqrt(seeds).
    let (_guard, backend) = emulated(&unchecked());
    let tensors = flat_and_sharp(128, |i| i >= 128, DType::F32);
    let upstream = OwnedUpstream::loss(1.0);
    let run = |filter| suite::run(&backend, &tensors, &CceOptions { filter, ..CceOptions::default() }, &upstream).1;
    let exact = run(GradientFilter::Exact);
    let error = |ours: &[f64], exact: &[f32]| {
        let square = |x: f64| x * x;
        ours.iter().zip(exact).map(|(x, e)| square(x - f64::from(*e))).sum::<f64>()
    };
    const SEEDS: u64 = 24;
    let (mut sums, mut of_one) = ([vec![0.0; 128 * 8], vec![0.0; VOCAB * 8]], [0.0; 2]);
    for seed in 0..SEEDS {
        let got = run(GradientFilter::Unbiased { eps: EPS, seed });
        assert_eq!((got.telemetry.exact_rows, got.telemetry.raised_rows), (0, 128));
        for (k, (ours, exact)) in
            [(&got.d_embeddings, &exact.d_embeddings), (&got.d_classifier, &exact.d_classifier)].iter().enumerate()
        {
            let ours: Vec<f64> = ours.to_f32_vec().into_iter().map(f64::from).collect();
            of_one[k] += error(&ours, &exact.to_f32_vec()) / SEEDS as f64;
            sums[k].iter_mut().zip(&ours).for_each(|(sum, x)| *sum += x / SEEDS as f64);
        }
    }
    for (k, exact) in [&exact.d_embeddings, &exact.d_classifier].iter().enumerate() {
        let ratio = error(&sums[k], &exact.to_f32_vec()) / (of_one[k] / SEEDS as f64);
        assert!((0.7..1.3).contains(&ratio), "gradient {k}: {ratio} of an unbiased mean's squared error");
    }
}

#[test]
fn a_raised_eps_depends_on_nothing_but_the_tensors_and_the_seed() {
    for (family, dtype) in KERNELS {
        // Sharp are also the last 64 rows of each block, which put nothing aside when the others do a round again.
        let tensors = flat_and_sharp(650, |i| i % 128 >= 64 || i >= 640, dtype);
        let run = |turn: usize| {
            let (_guard, backend) = emulated(&Config {
                check: turn == 0,
                order: [Order::Forward, Order::Reverse, Order::Random][turn % 3],
                async_: [Async::Lazy, Async::Eager, Async::Random][turn % 3],
                seed: turn as u64,
                workers: 1 + turn as u32 % 2,
                // Row blocks of a round that is done again have shares, and come in any order.
                multiprocessors: 7,
                device: "h100".into(),
                ..Config::default()
            });
            let (forward, got) =
                suite::run(&backend.with_kernels(family), &tensors, &unbiased(EPS, 9), &OwnedUpstream::loss(1.0));
            (
                bits(&row_eps(&forward)),
                bits(&got.d_embeddings.to_f32_vec()),
                bits(&got.d_classifier.to_f32_vec()),
                got.telemetry,
            )
        };
        let first = run(0);
        assert!(first.3.raised_rows >= 320 && first.3.exact_rows == 0, "{family}: {:?}", first.3);
        for turn in 1..4 {
            let other = run(turn);
            assert_eq!((&other.0, &other.1, &other.2), (&first.0, &first.1, &first.2), "{family}, turn {turn}");
            assert_eq!(other.3.kept_entries, first.3.kept_entries);
        }
    }
}

/// A worker of the Hopper forward that does two row blocks again, of which half the rows put nothing aside: without anything to store at
/// the end of the first, one barrier alone keeps its warps from meeting those that have begun the second.
#[test]
fn row_blocks_that_are_done_again_by_one_worker_do_not_meet() {
    let (_guard, backend) = emulated(&checked());
    let mut tensors = flat_and_sharp(256, |_| false, DType::BF16);
    // One column is nothing but for the first 100 classes, and for the rows that are sure of these.
    (0..VOCAB).for_each(|class| tensors.set_classifier(class, 0, if class < 100 { 1.0 } else { 0.0 }));
    for i in 0..256 {
        let is_sharp = i % 128 >= 64;
        (0..8).filter(|&k| k == 0 || is_sharp).for_each(|k| tensors.set_embedding(i, k, 0.0));
        if is_sharp {
            tensors.set_embedding(i, 0, 60.0);
            tensors.targets[i] %= 100;
        }
    }
    let (got, _) = check(&backend.with_kernels(KernelFamily::Hopper), &tensors, &unbiased(EPS, 5));
    assert_eq!((got.telemetry.exact_rows, got.telemetry.raised_rows), (0, 256));
    assert_eq!(emulator::take_reports(), Vec::<String>::new());
}

#[test]
fn blocks_that_overflow_under_a_threshold_are_exact_beside_others_that_are_sparse() {
    // Until a row has summed up 64 equal classes, each of them may reach the threshold.
    for (family, dtype) in KERNELS {
        let (_guard, backend) = emulated(&checked());
        let tensors = flat_and_sharp(150, |i| i >= 128, dtype);
        let options = CceOptions { filter: GradientFilter::Threshold { eps: EPS }, ..CceOptions::default() };
        let (got, rows) = check(&backend.with_kernels(family), &tensors, &options);
        assert_eq!((got.telemetry.exact_rows, got.telemetry.raised_rows), (128, 0), "{family}");
        let is_exact = |&eps: &f32| eps == 0.0;
        assert!(rows[..128].iter().all(is_exact) && rows[128..].iter().all(|&eps| eps == EPS), "{family}: {rows:?}");
        assert_eq!(emulator::take_reports(), Vec::<String>::new());
    }
}

#[test]
fn a_block_that_no_eps_helps_is_exact() {
    // 36 classes with a little more than the ε that the last round tries, and others that are nothing.
    for (family, dtype) in KERNELS {
        let (_guard, backend) = emulated(&checked());
        let mut tensors = flat_and_sharp(150, |i| i >= 128, dtype);
        let bias = |v: usize| if v.is_multiple_of(83) && v < 36 * 83 { (v % 7) as f64 * 0.01 } else { -30.0 };
        tensors.bias = Some(common::data::buffer(DType::F32, &(0..VOCAB).map(bias).collect::<Vec<_>>()));
        tensors.targets.iter_mut().for_each(|target| *target = *target % 36 * 83);
        let options = unbiased(EPS, 3);
        let backend = backend.with_kernels(family);
        let (got, _) = check(&backend, &tensors, &options);
        assert_eq!((got.telemetry.exact_rows, got.telemetry.raised_rows), (128, 0), "{family}");
        assert_eq!(emulator::take_reports(), Vec::<String>::new());
    }
}

#[test]
fn every_case_matches_the_oracle_with_hardly_any_room() {
    let (_guard, backend) = emulated(&Config { workers: 2, ..unchecked() });
    let backend = backend.with_kernels(KernelFamily::Portable);
    let raised = room::check(&backend, &room::cases(), &[1.0 / 256.0, 1.0 / 1024.0]);
    assert!(raised >= 20, "{raised} cases had a row with an ε of its own");
}
