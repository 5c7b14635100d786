//! Frequent classes, whose gradients are products by tensor cores, on the emulated GPU with the checker on, against the oracle: each
//! case in 16 bits that fits them, under one filter and one schedule in rotation (`CCE_CASES=bias,f16` picks some).
#![cfg(feature = "cuda")]

mod common;

use common::cases::{self, Case};
use common::suite::{self, Known};
use common::{Spec, picked};
use cut_cross_entropy::plan::{KernelChoice, KernelFamily, Tuning};
use cut_cross_entropy::{CceOptions, CudaStaged, DType, GradientFilter};
use cut_cross_entropy_emulator::{self as emulator, Async, Config, Order};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Classes are frequent that so many rows keep.
fn frequent(entries: u32) -> KernelChoice {
    KernelChoice { family: KernelFamily::Portable, tuning: Tuning { frequent: Some(entries), ..Tuning::default() } }
}

/// The case in 16 bits, in turn bf16 and f16; `None` where rows are not whole vectors, or many tiles of the same kind take long.
fn in_16_bits((index, case): (usize, Case)) -> Option<Case> {
    let Spec { tokens, hidden, vocab, padding, dtype, .. } = case.spec;
    let dtype = if dtype == DType::F32 { [DType::BF16, DType::F16][index % 2] } else { dtype };
    let fits = hidden > 0 && hidden % 8 == 0 && padding % 8 == 0 && tokens * vocab <= 60_000;
    fits.then_some(Case { spec: Spec { dtype, ..case.spec }, ..case })
}

/// Those of the cases of every backend that fit.
fn of_every_backend() -> Vec<Case> {
    let all = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()];
    let fitting: Vec<Case> = all.into_iter().flatten().enumerate().filter_map(in_16_bits).collect();
    assert!(fitting.len() >= 13, "{} cases", fitting.len());
    fitting
}

/// Several tiles of rows, of frequent classes and of columns, the last of each ragged; hardly any rows; ignored tokens between them.
fn of_tiles() -> Vec<Case> {
    let shapes = [
        ("several_tiles", (300, 264, 400), 0.05),
        ("ragged_columns", (130, 136, 200), 0.0),
        ("one_row", (1, 8, 300), 0.0),
        ("few_rows_left", (200, 72, 260), 0.9),
    ];
    let plain = cases::shapes()[0];
    let case = |(index, (name, (tokens, hidden, vocab), ignored)): (usize, (_, (usize, usize, usize), f64))| {
        let (bias, dtype) = (index % 2 == 0, [DType::BF16, DType::F16][index % 2]);
        let spec = Spec { ignored, bias, dtype, seed: 31, ..Spec::new(tokens, hidden, vocab) };
        let options = CceOptions { softcap: (index % 3 == 1).then_some(3.0), ..plain.options };
        Case { name, why: "rows, classes and columns that do not divide", spec, options, ..plain }
    };
    shapes.into_iter().enumerate().map(case).collect()
}

/// The settings of the emulator are those of the process: one test at a time.
fn emulated() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    emulator::install().expect("the emulator is built with this test");
    guard
}

/// In turn another order of threads and of asynchronous work.
fn configure(turn: usize) {
    emulator::configure(&Config {
        order: [Order::Forward, Order::Reverse, Order::Random][turn % 3],
        async_: [Async::Lazy, Async::Eager, Async::Random][turn / 3 % 3],
        seed: turn as u64,
        workers: 2,
        ..Config::default()
    });
}

fn sparse_filters() -> Vec<GradientFilter> {
    suite::filters().into_iter().filter(|filter| *filter != GradientFilter::Exact).collect()
}

#[test]
fn frequent_classes_match_the_oracle_under_every_schedule() {
    let _guard = emulated();
    emulator::reset_counters();
    let known = [of_tiles(), of_every_backend()].concat();
    let wanted = picked::picked("CCE_CASES", &known.iter().map(|case| case.name.to_string()).collect::<Vec<_>>());
    let is_wanted = |case: &Case| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| name == case.name));
    let (filters, backend) = (sparse_filters(), std::cell::OnceCell::new());
    let mut failures = Vec::new();
    for (turn, case) in known.iter().enumerate().filter(|(_, case)| is_wanted(case)) {
        configure(turn);
        let backend = backend.get_or_init(|| CudaStaged::new(0).expect("an emulated device"));
        // All classes that there are entries of, or those of a few.
        let (least, filter) = ([1, 1, 3][turn % 3], filters[turn / 3 % filters.len()]);
        let known = Known { least_frequent: Some(least), ..Known::default() };
        let backend = backend.clone().with_kernels(frequent(least));
        let failed = suite::check_case_knowing(&backend, case, &[filter], &known).err();
        failures.extend(failed.map(|failure| format!("from {least} entries on: {failure}")));
        failures.extend(emulator::take_reports());
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    if wanted.is_some() {
        println!("only what CCE_CASES picks has run");
        return;
    }
    for kernel in ["lce_frequent_bf16", "lce_frequent_f16"] {
        assert!(emulator::counters(kernel).is_some_and(|c| c.mma > 0), "{kernel} did not multiply");
    }
}
