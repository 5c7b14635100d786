//! The forward of Hopper on the emulated GPU with the checker on, against the oracle: every case that fits it, in 16 bits, each
//! under one filter, one schedule and one tuning in rotation; and who does what, on the device and in the plan.
#![cfg(feature = "cuda")]

mod common;

use common::cases::{self, Case};
use common::{Spec, suite};
use cut_cross_entropy::cuda::cudarc::driver::{CudaContext, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};
use cut_cross_entropy::cuda::cudarc::nvrtc::Ptx;
use cut_cross_entropy::plan::{DeviceInfo, HopperTuning, KernelFamily, LaunchPlan, Workload};
use cut_cross_entropy::{CceOptions, CudaStaged, DType, Error, Shape};
use cut_cross_entropy_emulator::{self as emulator, Async, Config, Order};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The case in 16 bits, in turn bf16 and f16; `None` where the Hopper kernels do not take it.
fn in_16_bits((index, case): (usize, Case)) -> Option<Case> {
    let Spec { tokens, hidden, vocab, padding, dtype, .. } = case.spec;
    let dtype = if dtype == DType::F32 { [DType::BF16, DType::F16][index % 2] } else { dtype };
    // Rows of 16-byte multiples. Many blocks of the same kind teach nothing new for the time that they take.
    let fits = tokens > 0 && hidden > 0 && (hidden + padding) % 8 == 0 && tokens * vocab <= 60_000;
    fits.then_some(Case { spec: Spec { dtype, ..case.spec }, ..case })
}

/// Shapes at the edges of this forward: three row blocks, of which a cluster has one without rows; one, of which it has another;
/// a ragged step, more steps than stages, rounds of several tiles with a ragged last one.
fn of_clusters() -> Vec<Case> {
    let shapes = [
        ("three_row_blocks", (290, 72, 260)),
        ("one_row_block", (100, 328, 1300)),
        ("four_row_blocks", (400, 40, 600)),
    ];
    let plain = cases::shapes()[0];
    let case = |(name, (tokens, hidden, vocab))| {
        let spec = Spec { ignored: 0.02, seed: 5, dtype: DType::BF16, ..Spec::new(tokens, hidden, vocab) };
        Case { name, why: "row blocks and tiles that do not divide", spec, ..plain }
    };
    shapes.into_iter().map(case).collect()
}

fn tuned(cluster: bool, lead: u32) -> KernelFamily {
    KernelFamily::HopperTuned(HopperTuning { cluster: Some(cluster), lead })
}

/// The settings of the emulator are those of the process: one test at a time.
fn emulated() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    emulator::install().expect("the emulator is built with this test");
    guard
}

/// Each case under one filter, one order of threads and one of asynchronous work, and one tuning, in rotation; `kernels` must have
/// multiplied in them.
fn check(cases: &[Case], tunings: &[KernelFamily], kernels: &[&str]) {
    let _guard = emulated();
    emulator::reset_counters();
    let backend = std::cell::OnceCell::new();
    let mut failures = Vec::new();
    for (turn, case) in cases.iter().enumerate() {
        let order = [Order::Forward, Order::Reverse, Order::Random][turn % 3];
        let async_ = [Async::Lazy, Async::Eager, Async::Random][turn / 3 % 3];
        emulator::configure(&Config {
            device: "h100".into(),
            order,
            async_,
            seed: turn as u64,
            workers: 2,
            // Three clusters and one that is idle: of two units, the third cluster takes what is left over.
            multiprocessors: 7,
            ..Config::default()
        });
        let backend = backend.get_or_init(|| CudaStaged::new(0).expect("an emulated device"));
        let (tuning, filter) = (tunings[turn % tunings.len()], suite::filters()[turn % 4]);
        let failed = suite::check_case_under(&backend.clone().with_kernels(tuning), case, &[filter]).err();
        failures.extend(failed.map(|failure| format!("{tuning}: {failure}")));
        failures.extend(emulator::take_reports());
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    for kernel in kernels {
        assert!(emulator::counters(kernel).is_some_and(|c| c.wgmma > 0), "{kernel} did not run");
    }
}

#[test]
fn the_hopper_forward_matches_the_oracle_under_every_schedule_and_tuning() {
    let all = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()];
    let fitting: Vec<Case> = all.into_iter().flatten().enumerate().filter_map(in_16_bits).collect();
    assert!(fitting.len() >= 13, "{} cases", fitting.len());
    // Five, so that each meets every filter, order and asynchrony.
    let tunings = [KernelFamily::Hopper, tuned(true, 2), tuned(true, 0), tuned(false, 2), tuned(true, 3)];
    let [alone, clusters] = ["lce_forward_sm90", "lce_forward_sm90_cluster"];
    let kernels = [alone, clusters].map(|kernel| [format!("{kernel}_bf16"), format!("{kernel}_f16")]).concat();
    check(&fitting, &tunings, &kernels.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn clusters_match_the_oracle_where_row_blocks_and_tiles_do_not_divide() {
    check(&of_clusters(), &[tuned(true, 2)], &["lce_forward_sm90_cluster_bf16"]);
}

/// Asked for by name, the Hopper kernels are not replaced by others in silence.
#[test]
fn refuses_what_it_cannot_do() {
    let _guard = emulated();
    emulator::configure(&Config { device: "h100".into(), ..Config::default() });
    let tensors = Spec::new(4, 8, 16).generate(); // f32
    let hopper = CudaStaged::new(0).expect("an emulated device").with_kernels(KernelFamily::Hopper);
    let error = cut_cross_entropy::cce_forward(&hopper, &tensors.inputs(), &CceOptions::default()).expect_err("f32");
    assert!(matches!(&error, Error::Device { reason, .. } if reason.contains("f32")), "{error}");
}

/// Argument of `example_schedule`: `hopper::Schedule`, and where the items go.
#[repr(C)]
#[derive(Clone, Copy)]
struct ScheduleParams {
    worker: u32,
    workers: u32,
    units: u32,
    units_of_group: u32,
    first_tile: u32,
    num_tiles: u32,
    most_shares: u32,
    room: u32,
    items: u64,
    counts: u64,
}
// SAFETY: plain data, laid out as the kernel declares it.
unsafe impl DeviceRepr for ScheduleParams {}

/// Unit, share, first and last tile, first and last unused share.
type FlatItem = [u32; 6];

/// `kernels/hopper_schedule.cuh`, run for each round of plans, against `plan::Schedule::items`.
#[test]
fn the_device_shares_the_work_out_as_planned() {
    let _guard = emulated();
    emulator::configure(&Config { device: "h100".into(), ..Config::default() });
    let stream = CudaContext::new(0).expect("an emulated device").default_stream();
    // The emulated driver finds kernels by name, whatever the image.
    let module = stream.context().load_module(Ptx::from_binary(b"EMULATED NVRTC\0".to_vec())).expect("loads");
    let function = module.load_function("example_schedule").expect("among the emulator's examples");
    let room = 64_u32;
    let items = stream.alloc_zeros::<u32>(132 * room as usize * 6).expect("fits");
    let counts = stream.alloc_zeros::<u32>(132).expect("fits");
    let mut several = 0;
    for (row_blocks, l2_bytes, kernels) in (1..=40).flat_map(|n| {
        [(n, 50 << 20, tuned(false, 2)), (n, 50 << 20, tuned(true, 2)), (n, 2 << 20, tuned(n % 2 == 0, 2))]
    }) {
        let workload = Workload {
            shape: Shape { tokens: 128 * row_blocks, hidden: 512, vocab: 20_000 },
            dtype: DType::BF16,
            bias: false,
            aligned: true,
            options: CceOptions::default(),
            kernels,
        };
        let device = DeviceInfo { l2_bytes, ..DeviceInfo::H100 };
        let plan = LaunchPlan::new(&workload, &device).expect("fits");
        for round in &plan.rounds {
            let planned = plan.schedule(round);
            let params = ScheduleParams {
                worker: 0,
                workers: planned.workers,
                units: planned.units,
                units_of_group: planned.units_of_group,
                first_tile: planned.first_tile,
                num_tiles: planned.num_tiles,
                most_shares: planned.most_shares,
                room,
                items: items.device_ptr(&stream).0,
                counts: counts.device_ptr(&stream).0,
            };
            let config = LaunchConfig { grid_dim: (5, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
            // SAFETY: the parameters are the kernel's; there is room for the items of 132 workers.
            unsafe { stream.launch_builder(&function).arg(&params).launch(config) }.expect("launches");
            let (found, counts) = (stream.clone_dtoh(&items).expect("ran"), stream.clone_dtoh(&counts).expect("ran"));
            let (found, _) = found.as_chunks::<6>();
            for worker in 0..planned.workers as usize {
                let here = &found[worker * room as usize..][..counts[worker] as usize];
                let flat = |item: cut_cross_entropy::plan::Item| -> FlatItem {
                    [item.unit, item.share, item.tiles.start, item.tiles.end, item.unused.start, item.unused.end]
                };
                let expected: Vec<FlatItem> = planned.items(worker as u32).into_iter().map(flat).collect();
                assert_eq!(here, expected, "worker {worker} of {plan}");
                several += usize::from(expected.len() > 1);
            }
        }
    }
    assert!(several > 100, "{several} workers with several items");
    assert_eq!(emulator::take_reports(), [""; 0]);
}
