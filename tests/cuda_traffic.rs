//! What the plan claims that the kernels read and multiply, against what the emulated GPU counts.
#![cfg(feature = "cuda")]

mod common;

use common::{Spec, Tensors};
use cut_cross_entropy::plan::{Entries, KernelFamily, LaunchPlan, Workload};
use cut_cross_entropy::{
    Backend, CceOptions, Cuda, CudaStaged, DType, GradientFilter, Problem, Telemetry, Upstream, cce_backward,
    cce_forward,
};
use cut_cross_entropy_emulator::{self as emulator, Config, Counters};

struct Case {
    name: &'static str,
    spec: Spec,
    filter: GradientFilter,
    /// Rows that start at multiples of 16 bytes.
    aligned: bool,
}

fn cases() -> Vec<Case> {
    let sparse = GradientFilter::Unbiased { eps: 1.0 / 256.0, seed: 3 };
    let case = |name, (tokens, hidden, vocab), dtype, filter| Case {
        name,
        // Rows that are ignored leave gaps that the formulas know of by their number alone.
        spec: Spec { dtype, ignored: 0.1, seed: 11, ..Spec::new(tokens, hidden, vocab) },
        filter,
        aligned: true,
    };
    let padded = |case: Case| Case { spec: Spec { padding: 2, ..case.spec }, aligned: false, ..case };
    let biased = |case: Case| Case { spec: Spec { bias: true, ..case.spec }, ..case };
    vec![
        case("sparse, 16 bits", (150, 640, 700), DType::BF16, sparse),
        case("sparse, 32 bits, a last step of half the columns", (40, 1032, 300), DType::F32, sparse),
        case("exact, 16 bits, ragged tiles", (150, 200, 389), DType::F16, GradientFilter::Exact),
        biased(case("exact, 32 bits, one step of columns", (40, 12, 300), DType::F32, GradientFilter::Exact)),
        padded(case("exact, rows anywhere", (40, 61, 150), DType::BF16, GradientFilter::Exact)),
    ]
}

/// The plan, and what the backward counted.
fn run(case: &Case) -> (LaunchPlan, Telemetry) {
    let options = CceOptions { filter: case.filter, ..CceOptions::default() };
    let tensors: Tensors = case.spec.generate();
    let inputs = tensors.inputs();
    let cuda = Cuda::new(0).expect("an emulated device").with_kernels(KernelFamily::Portable);
    let problem = Problem::new(&inputs, &options).expect("legal");
    let workload = Workload::new(&problem, case.aligned).with_kernels(KernelFamily::Portable);
    let plan = cuda.plan(&workload).expect("fits");
    let staged = CudaStaged::new(0).expect("an emulated device");
    emulator::reset_counters();
    let forward = cce_forward(&staged, &inputs, &options).expect("legal");
    let gradients = cce_backward(&staged, &inputs, &forward, &Upstream::default()).expect("its own");
    assert_eq!(staged.name(), "cuda");
    (plan, gradients.telemetry)
}

#[test]
fn what_the_plan_claims_is_what_is_read_and_multiplied() {
    emulator::install().expect("the emulator is built with this test");
    emulator::configure(&Config { device: "a100".into(), workers: 2, ..Config::default() });
    for case in cases() {
        let (plan, telemetry) = run(&case);
        let targets = telemetry.rows - telemetry.exact_rows;
        let entries = Entries {
            rows: telemetry.rows,
            candidates: telemetry.candidates - targets,
            kept: telemetry.kept_entries,
            exact_rows: telemetry.exact_rows,
        };
        let claims = plan.traffic(&entries);
        assert!(claims.len() >= 2, "{}", case.name);
        for (entry_point, claim) in claims {
            let Counters { global_read, copy_read, mma, .. } = emulator::counters(&entry_point).expect("launched");
            let of = format!("{}: {entry_point}: {claim:?}, counted {global_read}, {copy_read}, {mma}", case.name);
            println!("{:.3}  {of}", global_read as f64 / claim.read as f64);
            assert_eq!(mma, claim.mma, "{of}");
            assert!(!case.aligned || copy_read == claim.copied, "{of}");
            // Beyond the claim: statistics of rows, and on the exact path the numbers of the rows that it gathers, 8 bytes a
            // chunk of 16. Where rows are short that is not little.
            let most = match (case.spec.hidden >= 128, entry_point.starts_with("lce_exact")) {
                (true, true) => 1.4,
                (true, false) => 1.1,
                (false, _) => f64::INFINITY,
            };
            assert!(global_read >= claim.read && global_read as f64 <= most * claim.read as f64, "{of}");
        }
    }
}
