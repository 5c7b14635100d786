//! The CUDA backend on the emulated GPU with the checker on, under schedules that a real GPU would rarely show: a race, a read
//! of memory that nobody wrote, an access out of bounds or a deadlock fails the launch, and with it the case.
#![cfg(feature = "cuda")]

mod common;

use common::cases::{self, Case};
use common::suite;
use cut_cross_entropy::CudaStaged;
use cut_cross_entropy_emulator::{self as emulator, Async, Config, Order};

/// Cases that the checker learns nothing new from for their time: more of the same blocks, tiles or rows.
const LONG: [&str; 7] = [
    "token_block_plus_1",
    "token_block_minus_1",
    "large_token_block",
    "large_token_block_plus_1",
    "uneven_blocks",
    "real_vocabulary",
    "long_batch",
];

/// `CCE_CASES=bias,f16` picks cases, long ones too, and `CCE_FILTERS=0,1` filters: each of them then, or all.
fn picked(variable: &str) -> Option<Vec<String>> {
    std::env::var(variable).ok().map(|names| names.split(',').map(String::from).collect())
}

/// Each case under one filter and one schedule, in rotation; the rotation starts elsewhere for each table.
fn check(device: &str, cases: &[Case], start: usize) {
    emulator::install().expect("the emulator is built with this test");
    let backend = std::cell::OnceCell::new();
    let mut failures = Vec::new();
    let names = picked("CCE_CASES");
    let numbers: Option<Vec<usize>> =
        picked("CCE_FILTERS").map(|all| all.iter().map(|n| n.parse().expect("numbers of filters")).collect());
    let wanted = |case: &Case| match &names {
        Some(names) => names.iter().any(|n| n == case.name),
        None => !LONG.contains(&case.name),
    };
    for (index, case) in cases.iter().filter(|c| wanted(c)).enumerate() {
        let turn = start + index;
        let order = [Order::Forward, Order::Reverse, Order::Random][turn % 3];
        let async_ = [Async::Lazy, Async::Eager, Async::Random][turn / 3 % 3];
        emulator::configure(&Config {
            device: device.into(),
            order,
            async_,
            seed: turn as u64,
            workers: 2,
            ..Config::default()
        });
        let backend = backend.get_or_init(|| CudaStaged::new(0).expect("an emulated device"));
        let filters = match (&numbers, &names) {
            (Some(numbers), _) => numbers.iter().map(|n| suite::filters()[*n]).collect(),
            (None, Some(_)) => suite::filters().to_vec(),
            (None, None) => vec![suite::filters()[turn % 4]],
        };
        failures.extend(suite::check_case_under(backend, case, &filters).err());
        failures.extend(emulator::take_reports());
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

// One test: the settings of the emulator are those of the process.
#[test]
fn every_mechanism_is_free_of_races_under_every_schedule() {
    check("sm_86", &cases::dtypes(), 0);
    check("sm_86", &cases::options(), 1);
    check("sm_86", &cases::distributions(), 2);
    check("sm_86", &cases::shapes(), 3);
}
