//! The CUDA backend on the emulated GPU with the checker on, under schedules that a real GPU would rarely show: a race, a read
//! of memory that nobody wrote, an access out of bounds or a deadlock fails the launch, and with it the case.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::cases::{self, Case};
use common::{picked, suite};
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

/// What `CCE_CASES` and `CCE_FILTERS` pick; long cases, too.
struct Picked {
    cases: Option<Vec<String>>,
    filters: Option<Vec<String>>,
}

impl Picked {
    fn from_environment(tables: &[Vec<Case>]) -> Picked {
        let cases: Vec<String> = tables.iter().flatten().map(|case| case.name.to_string()).collect();
        let filters: Vec<String> = (0..suite::filters().len()).map(|n| n.to_string()).collect();
        Picked { cases: picked::picked("CCE_CASES", &cases), filters: picked::picked("CCE_FILTERS", &filters) }
    }
}

/// Each case under one filter and one schedule, in rotation; the rotation starts elsewhere for each table. What is picked runs under
/// each of the picked filters, or under all.
fn check(device: &str, cases: &[Case], start: usize, picked: &Picked) {
    emulator::install().expect("the emulator is built with this test");
    let backend = std::cell::OnceCell::new();
    let mut failures = Vec::new();
    let wanted = |case: &Case| match &picked.cases {
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
        let filters = match (&picked.filters, &picked.cases) {
            (Some(numbers), _) => {
                numbers.iter().map(|n| suite::filters()[n.parse::<usize>().expect("known")]).collect()
            }
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
    let tables = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()];
    let picked = Picked::from_environment(&tables);
    for (start, table) in tables.iter().enumerate() {
        check("sm_86", table, start, &picked);
    }
}

#[test]
fn a_misspelt_case_or_filter_is_an_error() {
    let known = ["bias".to_string(), "f16".to_string()];
    assert_eq!(picked::parse("CCE_CASES", "f16, bias", &known).unwrap(), ["f16", "bias"]);
    for misspelt in ["", "biass", "bias,", "bias,f61"] {
        let error = picked::parse("CCE_CASES", misspelt, &known).unwrap_err();
        assert!(
            error.starts_with(&format!("CCE_CASES={misspelt}: `")) && error.ends_with("is none of bias f16"),
            "{error}"
        );
    }
}
