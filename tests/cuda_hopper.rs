//! The forward of Hopper on the emulated GPU with the checker on, against the oracle: every case that fits it, in 16 bits, each
//! under one filter and one schedule in rotation. `CCE_CASES=bias,f16` picks some of them.
#![cfg(feature = "cuda")]

mod common;

use common::cases::{self, Case};
use common::{Spec, picked, suite};
use cut_cross_entropy::plan::KernelFamily;
use cut_cross_entropy::{CudaStaged, DType, Error};
use cut_cross_entropy_emulator::{self as emulator, Async, Config, Order};

/// The case in 16 bits, in turn bf16 and f16; `None` where the Hopper kernels do not take it.
fn in_16_bits((index, case): (usize, Case)) -> Option<Case> {
    let Spec { tokens, hidden, vocab, padding, dtype, .. } = case.spec;
    let dtype = if dtype == DType::F32 { [DType::BF16, DType::F16][index % 2] } else { dtype };
    // Rows of 16-byte multiples. Many blocks of the same kind teach nothing new for the time that they take.
    let fits = tokens > 0 && hidden > 0 && (hidden + padding) % 8 == 0 && tokens * vocab <= 60_000;
    fits.then_some(Case { spec: Spec { dtype, ..case.spec }, ..case })
}

#[test]
fn the_hopper_forward_matches_the_oracle_under_every_schedule() {
    emulator::install().expect("the emulator is built with this test");
    let backend = std::cell::OnceCell::new();
    let all = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()];
    let fitting: Vec<Case> = all.into_iter().flatten().enumerate().filter_map(in_16_bits).collect();
    assert!(fitting.len() >= 13, "{} cases", fitting.len());
    let names: Vec<String> = fitting.iter().map(|case| case.name.to_string()).collect();
    let wanted = picked::picked("CCE_CASES", &names).unwrap_or(names);
    let mut failures = Vec::new();
    for (turn, case) in fitting.iter().enumerate().filter(|(_, case)| wanted.iter().any(|name| name == case.name)) {
        let order = [Order::Forward, Order::Reverse, Order::Random][turn % 3];
        let async_ = [Async::Lazy, Async::Eager, Async::Random][turn / 3 % 3];
        emulator::configure(&Config {
            device: "h100".into(),
            order,
            async_,
            seed: turn as u64,
            workers: 2,
            ..Config::default()
        });
        let backend =
            backend.get_or_init(|| CudaStaged::new(0).expect("an emulated device").with_kernels(KernelFamily::Hopper));
        let filter = suite::filters()[turn % 4];
        failures.extend(suite::check_case_under(backend, case, &[filter]).err());
        failures.extend(emulator::take_reports());
    }
    let ran = |kernel| emulator::counters(kernel).is_some_and(|c| c.wgmma > 0);
    let kernels = ["lce_forward_sm90_bf16", "lce_forward_sm90_f16"];
    if wanted.len() == fitting.len() {
        assert!(kernels.into_iter().all(ran), "one of {kernels:?} did not run");
    }
    assert!(kernels.into_iter().any(ran), "none of {kernels:?} ran");
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    refuses_what_it_cannot_do(backend.get().expect("made above"));
}

/// Asked for by name, the Hopper kernels are not replaced by others in silence.
fn refuses_what_it_cannot_do(backend: &CudaStaged) {
    use cut_cross_entropy::{CceOptions, cce_forward};
    let tensors = Spec::new(4, 8, 16).generate(); // f32
    let error = cce_forward(backend, &tensors.inputs(), &CceOptions::default()).expect_err("f32");
    assert!(matches!(&error, Error::Device { reason, .. } if reason.contains("f32")), "{error}");
}
