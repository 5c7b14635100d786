//! The Hopper kernels on the emulated GPU with the checker on, against the oracle: every case that fits it, in 16 bits, each
//! under one filter, one schedule and one tuning in rotation (`CCE_CASES=bias,f16` picks some); and who does what, on the device and in the plan.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::cases::{self, Case};
use common::{OwnedUpstream, Spec, Tensors, emulated, picked, room, suite};
use cut_cross_entropy::cuda::cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cut_cross_entropy::cuda::cudarc::nvrtc::Ptx;
use cut_cross_entropy::plan::{DeviceInfo, KernelChoice, KernelFamily, LaunchPlan, Tuning, Workload};
use cut_cross_entropy::{CceOptions, Cuda, CudaStaged, DType, Error, GradientFilter, HostBuffer, Shape};
use cut_cross_entropy_emulator::{self as emulator, Config};
use std::sync::Arc;

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
        ("three_row_blocks", (290, 72, 260), 0.02),
        ("one_row_block", (100, 328, 1300), 0.1), // gathered, once around the ring and again
        ("four_row_blocks", (400, 40, 600), 0.02),
    ];
    let plain = cases::shapes()[0];
    let case = |(name, (tokens, hidden, vocab), ignored)| {
        let spec = Spec { ignored, seed: 5, dtype: DType::BF16, ..Spec::new(tokens, hidden, vocab) };
        Case { name, why: "row blocks and tiles that do not divide", spec, ..plain }
    };
    shapes.into_iter().map(case).collect()
}

fn tuned(cluster: bool, lead: u32) -> KernelChoice {
    KernelChoice { family: KernelFamily::Hopper, tuning: Tuning { cluster: Some(cluster), lead, ..Tuning::default() } }
}

/// All rows of E gathered, by blocks alone.
fn gathering(lead: u32) -> KernelChoice {
    let choice = tuned(false, lead);
    KernelChoice { tuning: Tuning { gather: true, ..choice.tuning }, ..choice }
}

/// Shapes at the edges of the exact path: several tiles of rows, of classes and of D, each with a ragged last one; tokens that
/// follow one another, with gaps, and hardly any; an odd D.
fn of_the_exact_path() -> Vec<Case> {
    let shapes = [
        ("runs_of_tokens", (260, 264, 600), 0.0),
        ("tokens_with_gaps", (260, 72, 600), 0.1),
        ("mostly_gaps", (130, 72, 600), 0.3),
        ("few_tokens_left", (129, 520, 300), 0.9),
        ("odd_columns", (140, 71, 520), 0.05),
        ("a_gap_or_two", (460, 72, 300), 0.005), // blocks of 64 rows: some are boxes, some are gathered
        ("uneven_slices", (301, 72, 2000), 0.0), // in chunks of 1 MiB two, each of three slices, the last one shorter; an odd row
    ];
    let plain = cases::shapes()[0];
    let case = |(index, (name, (tokens, hidden, vocab), ignored)): (usize, (_, (usize, usize, usize), f64))| {
        let (padding, bias) = (8 + (8 - hidden % 8) % 8, index % 2 == 0);
        let dtype = [DType::BF16, DType::F16][index % 2];
        let spec = Spec { ignored, padding, bias, dtype, seed: 77, ..Spec::new(tokens, hidden, vocab) };
        let options = CceOptions { softcap: (index % 3 == 1).then_some(3.0), ..plain.options };
        Case { name, why: "rows, classes and columns that do not divide", spec, options, ..plain }
    };
    shapes.into_iter().enumerate().map(case).collect()
}

/// Those of the cases of every backend that fit.
fn of_every_backend() -> Vec<Case> {
    let all = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()];
    let fitting: Vec<Case> = all.into_iter().flatten().enumerate().filter_map(in_16_bits).collect();
    assert!(fitting.len() >= 13, "{} cases", fitting.len());
    fitting
}

/// Under the turn's schedule; tensor cores cut sums off, as those of an H100, or round them.
fn configure(turn: usize, cut: bool) {
    emulator::configure(&Config {
        device: "h100".into(),
        // Three clusters and one block that is idle: of two units, the third cluster takes what is left over. Now and then one cluster, or
        // two blocks, that do everything in the order in which it is handed out.
        multiprocessors: if turn % 5 == 4 { 2 } else { 7 },
        cut,
        ..emulated::schedule(turn)
    });
}

/// Each case, of those that `CCE_CASES` picks, under one filter, one schedule and one tuning, in rotation; `kernels` must have
/// multiplied in them.
fn check(cases: &[Case], tunings: &[KernelChoice], filters: &[GradientFilter], kernels: &[&str]) {
    let _guard = emulated::lock();
    emulator::reset_counters();
    let known = [of_every_backend(), of_clusters(), of_the_exact_path()].concat();
    let wanted = picked::picked("CCE_CASES", &known.iter().map(|case| case.name.to_string()).collect::<Vec<_>>());
    let is_wanted = |case: &Case| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| name == case.name));
    let mut failures = Vec::new();
    for (turn, case) in cases.iter().enumerate().filter(|(_, case)| is_wanted(case)) {
        configure(turn, emulated::cuts(turn));
        let backend = CudaStaged::new(0).expect("an emulated device");
        let (tuning, filter) = (tunings[turn % tunings.len()], filters[turn % filters.len()]);
        let failed = suite::check_case_under(&backend.with_kernels(tuning), case, &[filter]).err();
        failures.extend(failed.map(|failure| format!("{tuning}: {failure}")));
        failures.extend(emulator::take_reports());
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    if wanted.is_some() {
        println!("only what CCE_CASES picks has run");
        return;
    }
    for kernel in kernels {
        assert!(emulator::counters(kernel).is_some_and(|c| c.wgmma > 0), "{kernel} did not run");
    }
}

#[test]
fn the_hopper_forward_matches_the_oracle_under_every_schedule_and_tuning() {
    // Five, so that each meets every filter, order and asynchrony.
    let tunings = [KernelFamily::Hopper.into(), tuned(true, 2), tuned(true, 0), gathering(2), tuned(true, 3)];
    let [alone, clusters] = ["lce_forward_sm90", "lce_forward_sm90_cluster"];
    let kernels = [alone, clusters].map(|kernel| [format!("{kernel}_bf16"), format!("{kernel}_f16")]).concat();
    let kernels: Vec<&str> = kernels.iter().map(String::as_str).collect();
    check(&of_every_backend(), &tunings, &suite::filters(), &kernels);
}

#[test]
fn the_hopper_forward_matches_the_oracle_with_hardly_any_room() {
    let _guard = emulated::lock();
    let mut raised = 0;
    for (turn, case) in [of_clusters(), of_every_backend()].concat().into_iter().enumerate() {
        if !case.options.capture {
            continue; // the backward alone knows of its rows
        }
        configure(turn, emulated::cuts(turn));
        let backend = CudaStaged::new(0).expect("an emulated device").with_kernels(tuned(turn % 2 == 0, 2));
        raised += room::check(&backend, &[case], &[1.0 / 256.0]);
        assert_eq!(emulator::take_reports(), Vec::<String>::new(), "{}", case.name);
    }
    assert!(raised >= 8, "{raised} cases had a row with an ε of its own");
}

#[test]
fn clusters_match_the_oracle_where_row_blocks_and_tiles_do_not_divide() {
    check(&of_clusters(), &[tuned(true, 2)], &suite::filters(), &["lce_forward_sm90_cluster_bf16"]);
}

#[test]
fn the_exact_path_matches_the_oracle_whatever_the_chunk_and_the_lead() {
    // A chunk of 0 MiB is one tile of classes.
    let tuning = |(lead, chunk_mib, gather)| KernelChoice {
        family: KernelFamily::Hopper,
        tuning: Tuning { cluster: Some(false), lead, chunk_mib, gather, ..Tuning::default() },
    };
    let tunings = [(2, 0, false), (0, 64, false), (3, 1, true), (1, 0, false)].map(tuning);
    let kernels = ["lce_exact_sm90_bf16", "lce_exact_sm90_f16"];
    check(&of_every_backend(), &tunings, &[GradientFilter::Exact], &kernels);
    check(&of_the_exact_path(), &tunings, &[GradientFilter::Exact], &kernels);
}

/// Three row tiles, of which the last pair has one: in one chunk and in several; one row tile, of which all pairs have one.
#[test]
fn clusters_of_the_exact_path_match_the_oracle() {
    let tuning = |(lead, chunk_mib)| {
        let choice = tuned(true, lead);
        KernelChoice { tuning: Tuning { chunk_mib, ..choice.tuning }, ..choice }
    };
    let tunings = [(2, 0), (0, 64), (3, 1), (1, 64)].map(tuning);
    let kernels = ["lce_exact_sm90_cluster_bf16", "lce_exact_sm90_cluster_f16"];
    // The one row block meets all of its tiles in one chunk: there a block's items follow one another without a barrier between.
    let [three, one, four] = of_clusters().try_into().expect("three cases");
    check(&[of_the_exact_path(), vec![one, four, three]].concat(), &tunings, &[GradientFilter::Exact], &kernels);
}

#[test]
fn results_are_the_same_bits_under_every_schedule() {
    let _guard = emulated::lock();
    configure(0, false);
    let tuning = Tuning { cluster: Some(false), chunk_mib: 0, ..Tuning::default() };
    let backend = CudaStaged::new(0)
        .expect("an emulated device")
        .with_kernels(KernelChoice { family: KernelFamily::Hopper, tuning });
    let spec = Spec { ignored: 0.05, dtype: DType::BF16, bias: true, ..Spec::new(140, 72, 600) };
    let case = Case { spec, options: CceOptions::default(), ..cases::shapes()[0] };
    let (tensors, upstream) = (suite::tensors(&case), suite::upstream(&case));
    for filter in [GradientFilter::Exact, GradientFilter::default()] {
        let run = |turn| {
            configure(turn, false); // another order of threads, of copies, and of who draws which item
            bits(&backend, &tensors, &CceOptions { filter, ..case.options }, &upstream)
        };
        let first = run(0);
        for turn in [1, 8] {
            assert!(run(turn) == first, "{filter:?}, turn {turn}");
        }
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// Loss, dE, dC and dbias, to the bit.
fn bits(backend: &CudaStaged, tensors: &Tensors, options: &CceOptions, upstream: &OwnedUpstream) -> [Vec<u32>; 4] {
    let (forward, got) = suite::run(backend, tensors, options, upstream);
    let bits = |buffer: &HostBuffer| buffer.to_f32_vec().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let bias = got.d_bias.as_ref().map_or(Vec::new(), bits);
    [vec![forward.loss.to_bits()], bits(&got.d_embeddings), bits(&got.d_classifier), bias]
}

/// dC sums over rows of E, in boxes or gathered: what lies behind the last row, and between rows, is not in the sum, not even times zero.
#[test]
fn what_an_ignored_token_holds_does_not_matter() {
    let _guard = emulated::lock();
    configure(1, false);
    let backend = CudaStaged::new(0).expect("an emulated device").with_kernels(KernelFamily::Hopper);
    // Gathered, the first token among the ignored; and a run, whose box would have the ignored last one too.
    for ignored in [0.1, 0.0] {
        let spec = Spec { ignored, dtype: DType::BF16, ..Spec::new(70, 72, 300) };
        let case = Case { spec, options: CceOptions::default(), ..cases::shapes()[0] };
        let (mut tensors, upstream) = (suite::tensors(&case), suite::upstream(&case));
        tensors.targets[69] = spec.ignore_index;
        if ignored > 0.0 {
            tensors.targets[0] = spec.ignore_index;
        }
        let mut poisoned = tensors.clone();
        for token in (0..70).filter(|&token| tensors.targets[token] == spec.ignore_index) {
            poisoned.set_embedding(token, 0, f32::NAN);
            poisoned.set_embedding(token, 71, f32::INFINITY);
        }
        for filter in [GradientFilter::Exact, GradientFilter::default()] {
            let run = |tensors| bits(&backend, tensors, &CceOptions { filter, ..case.options }, &upstream);
            assert!(run(&poisoned) == run(&tensors), "{ignored}, {filter:?}");
        }
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// The planner goes by it: the driver refuses a launch that waits for itself if it does not fit.
#[test]
fn the_device_says_how_many_clusters_it_holds() {
    let _guard = emulated::lock();
    for (device, multiprocessors, clusters) in [("h100", 7, 3), ("h100", 132, 66), ("h100", 1, 0), ("a100", 4, 0)] {
        emulator::configure(&Config { device: device.into(), multiprocessors, ..Config::default() });
        let cuda = Cuda::new(0).expect("an emulated device");
        assert_eq!(cuda.device().exact_clusters, clusters, "{device} with {multiprocessors} multiprocessors");
    }
}

/// Asked for by name, the Hopper kernels are not replaced by others in silence.
#[test]
fn refuses_what_it_cannot_do() {
    let _guard = emulated::lock();
    emulator::configure(&Config { device: "h100".into(), ..Config::default() });
    let tensors = Spec::new(4, 8, 16).generate(); // f32
    let hopper = CudaStaged::new(0).expect("an emulated device").with_kernels(KernelFamily::Hopper);
    let error = cut_cross_entropy::cce_forward(&hopper, &tensors.inputs(), &CceOptions::default()).expect_err("f32");
    assert!(matches!(&error, Error::Device { reason, .. } if reason.contains("f32")), "{error}");
}

/// One of the emulator's example kernels: the emulated driver finds them by name, whatever the image.
fn example(name: &str) -> (Arc<CudaStream>, CudaFunction) {
    let stream = CudaContext::new(0).expect("an emulated device").default_stream();
    let module = stream.context().load_module(Ptx::from_binary(b"EMULATED NVRTC\0".to_vec())).expect("loads");
    let function = module.load_function(name).expect("among the emulator's examples");
    (stream, function)
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
    let _guard = emulated::lock();
    emulator::configure(&Config { device: "h100".into(), ..Config::default() });
    let (stream, function) = example("example_schedule");
    let room = 64_u32;
    let items = stream.alloc_zeros::<u32>(132 * room as usize * 6).expect("fits");
    let counts = stream.alloc_zeros::<u32>(132).expect("fits");
    let mut several = 0;
    for (row_blocks, l2_bytes, kernels) in (1..=40).flat_map(|n| {
        [(n, 50 << 20, tuned(false, 2)), (n, 50 << 20, tuned(true, 2)), (n, 2 << 20, tuned(n % 2 == 0, 2))]
    }) {
        let shape = Shape { tokens: 128 * row_blocks, hidden: 512, vocab: 20_000 };
        let workload = Workload::of_shape(shape, DType::BF16, CceOptions::default()).with_kernels(kernels);
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

/// Argument of `example_deal`: `share::Deal`, and where the items go.
#[repr(C)]
#[derive(Clone, Copy)]
struct DealParams {
    worker: u32,
    workers: u32,
    longs: u32,
    long_steps: u32,
    other_steps: u32,
    turns: u32,
    items: u64,
}
// SAFETY: plain data, laid out as the kernel declares it.
unsafe impl DeviceRepr for DealParams {}

/// `kernels/deal.cuh` against items that each worker draws when it is done with the one before: no item twice, none left out, and the
/// last worker is done at the same time.
#[test]
fn items_are_dealt_out_as_evenly_as_drawn() {
    let _guard = emulated::lock();
    emulator::configure(&Config { device: "h100".into(), ..Config::default() });
    let (stream, function) = example("example_deal");
    let turns = 40_usize;
    let items = stream.alloc_zeros::<u32>(66 * turns).expect("fits");
    let counts = [0_u32, 1, 2, 5, 65, 66, 67, 131, 144, 288];
    let lists = counts.into_iter().flat_map(|longs| counts.map(|others| (longs, others)));
    for (longs, others) in lists {
        for (workers, long_steps, other_steps) in
            [(66_u32, 128, 64), (66, 128, 128), (66, 100, 17), (8, 3, 1), (1, 2, 1)]
        {
            let total = longs + others;
            if total.div_ceil(workers) as usize + 8 > turns {
                continue;
            }
            let params = DealParams {
                worker: 0,
                workers,
                longs,
                long_steps,
                other_steps,
                turns: turns as u32,
                items: items.device_ptr(&stream).0,
            };
            let config = LaunchConfig { grid_dim: (3, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
            // SAFETY: the parameters are the kernel's; there is room for the turns of 66 workers.
            unsafe { stream.launch_builder(&function).arg(&params).launch(config) }.expect("launches");
            let dealt = stream.clone_dtoh(&items).expect("ran");
            let steps = |item: u32| u64::from(if item < longs { long_steps } else { other_steps });
            let (mut taken, mut busiest) = (vec![0; total as usize], 0);
            for of_worker in dealt.chunks(turns).take(workers as usize) {
                let own = of_worker.iter().take_while(|&&item| item < total);
                assert!(of_worker.iter().skip(own.clone().count()).all(|&item| item >= total), "{of_worker:?}");
                own.clone().for_each(|&item| taken[item as usize] += 1);
                busiest = busiest.max(own.map(|&item| steps(item)).sum::<u64>());
            }
            let what = format!("{longs} of {long_steps}, {others} of {other_steps}, {workers} workers");
            assert!(taken.iter().all(|&times| times == 1), "{what}: {taken:?}");
            let mut drawn = vec![0; workers as usize];
            (0..total).for_each(|item| *drawn.iter_mut().min().expect("a worker") += steps(item));
            assert_eq!(Some(&busiest), drawn.iter().max(), "{what}");
        }
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}
