//! Plans of the CUDA backend, for GPUs that need not be there: what is cut is covered once, and every byte has its formula.

use cut_cross_entropy::plan::{
    BLOCK_N, BLOCK_V, DeviceInfo, Entries, Group, KERNELS, KernelChoice, KernelFamily, Launch, LaunchPlan,
    MAX_PARTIALS, MAX_VOCAB, Step, Tiles, Tuning, Workload,
};
use cut_cross_entropy::{CceOptions, DType, Error, GradientFilter, Shape};

fn workload(tokens: usize, vocab: usize, hidden: usize) -> Workload {
    Workload::of_shape(Shape { tokens, hidden, vocab }, DType::BF16, CceOptions::default())
}

fn auto() -> KernelChoice {
    KernelChoice::default()
}

const GEMMA2_2B: (usize, usize, usize) = (8192, 256_000, 2304);

/// Shapes at and around the edges of row blocks and tiles, models' shapes, and empty ones.
fn workloads() -> Vec<Workload> {
    let shapes = [
        GEMMA2_2B,
        (8192, 128_256, 4096),
        (8192, 151_936, 896),
        (1, 1, 1),
        (1, 256_000, 2304),
        (127, 129, 8),
        (128, 128, 64),
        (129, 127, 7),
        (2050, 33, 8),
        (5, 50_257, 16),
        (65_537, 32_000, 1024),
        (0, 1000, 64),
        (100, 1000, 0),
        (300_000, 1 << 25, 64),
    ];
    let mut all = Vec::new();
    for (tokens, vocab, hidden) in shapes {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let filters = [
                GradientFilter::default(),
                GradientFilter::Exact,
                GradientFilter::Threshold { eps: 0.5 },
                GradientFilter::Unbiased { eps: 1e-30, seed: 1 },
            ];
            for filter in filters {
                for (label_smoothing, softcap, capture) in
                    [(0.0, None, true), (0.1, None, true), (0.1, Some(30.0), true), (0.0, Some(30.0), false)]
                {
                    let options = CceOptions { filter, label_smoothing, softcap, capture, ..CceOptions::default() };
                    all.push(Workload { dtype, options, bias: true, ..workload(tokens, vocab, hidden) });
                }
            }
        }
    }
    all
}

/// Plans of all these workloads on all known devices. Entries of rows by the million do not fit their 32-bit indices.
fn plans() -> impl Iterator<Item = LaunchPlan> {
    workloads()
        .into_iter()
        .flat_map(|w| DeviceInfo::KNOWN.into_iter().filter_map(move |d| LaunchPlan::new(&w, &d).ok()))
}

fn launches(plan: &LaunchPlan) -> impl Iterator<Item = &Launch> {
    plan.forward.iter().chain(&plan.backward).filter_map(|step| match step {
        Step::Launch(launch) => Some(launch),
        Step::Fill { .. } => None,
    })
}

#[test]
fn every_tile_of_every_row_block_is_covered_once() {
    let mut plans_with_rounds = 0;
    for plan in plans().filter(|p| !p.rounds.is_empty()) {
        let tile = if plan.hopper { 256 } else { BLOCK_V };
        assert!(plan.rounds.iter().all(|r| r.tile as usize == tile));
        let tiles = plan.workload.shape.vocab.div_ceil(tile);
        let mut next = 0;
        for round in &plan.rounds {
            assert!(round.splits >= 1 && round.splits <= round.num_tiles);
            for split in 0..round.splits {
                let range = round.tiles(split);
                assert_eq!(range.start, next, "{plan}");
                assert!(!range.is_empty(), "{plan}");
                next = range.end;
            }
        }
        assert_eq!(next as usize, tiles, "{plan}");
        // Each forward launch is one round, over all row blocks and splits; on Hopper by blocks that stay.
        let forwards =
            |redo| launches(&plan).filter(move |l| l.kernel.stem.starts_with("lce_forward_sm") && l.redo == redo);
        let grids: Vec<_> = forwards(false).collect();
        assert_eq!(grids.len(), plan.rounds.len());
        // And once more for the row blocks that overflow: by blocks for each tile at most, on Hopper without clusters.
        for launch in forwards(true) {
            let round = &plan.rounds[launch.round.index as usize];
            assert_eq!((launch.round, launch.kernel.cluster), (*round, 1));
            assert!(plan.hopper || (round.splits..=round.num_tiles).contains(&launch.grid[1]), "{plan}");
        }
        let unbiased = matches!(plan.workload.options.filter, GradientFilter::Unbiased { .. });
        let first = &plan.rounds[0];
        let rows = plan.workload.shape.tokens.min(BLOCK_N);
        let fits = rows * (first.num_tiles as usize * tile + 1) <= plan.block_entries as usize;
        let again = if plan.capture && unbiased { plan.rounds.len() - usize::from(fits) } else { 0 };
        assert_eq!(forwards(true).count(), again, "{plan}");
        for (launch, round) in grids.iter().zip(&plan.rounds) {
            assert_eq!(launch.round, *round);
            let row_blocks = plan.workload.shape.tokens.div_ceil(BLOCK_N) as u32;
            match plan.hopper {
                true => {
                    assert_eq!(launch.kernel.cluster, plan.cluster);
                    assert!(launch.grid[0] <= plan.device.sm_count && launch.grid[0] % plan.cluster == 0);
                    assert_eq!(launch.grid, [plan.schedule(round).workers * plan.cluster, 1]);
                }
                false => assert_eq!(launch.grid, [row_blocks, round.splits]),
            }
        }
        plans_with_rounds += 1;
    }
    assert!(plans_with_rounds > 1000, "{plans_with_rounds}");
}

fn tuned(cluster: bool) -> KernelChoice {
    KernelChoice { family: KernelFamily::Hopper, tuning: Tuning { cluster: Some(cluster), ..Tuning::default() } }
}

/// Every (row block, tile) once, and every partial result once: computed, or said to be none.
fn check_schedule(plan: &LaunchPlan) {
    for round in &plan.rounds {
        let schedule = plan.schedule(round);
        let mut by_unit = vec![Vec::new(); schedule.units as usize];
        let (mut busiest, mut shares) = (0, vec![vec![0; round.splits as usize]; schedule.units as usize]);
        for worker in 0..schedule.workers {
            let items = schedule.items(worker);
            busiest = busiest.max(items.iter().map(|item| u64::from(item.tiles.end - item.tiles.start)).sum());
            for item in items {
                let of_unit = &mut shares[item.unit as usize];
                of_unit[item.share as usize] += 1;
                item.unused.for_each(|share| of_unit[share as usize] += 1);
                by_unit[item.unit as usize].push(item.tiles);
            }
        }
        assert!(shares.iter().flatten().all(|&owners| owners == 1), "{plan}");
        for mut tiles in by_unit {
            tiles.sort_by_key(|t| (t.start, t.end));
            let end = tiles.iter().fold(round.first_tile, |end, t| {
                assert_eq!(t.start, end, "{plan}");
                t.end
            });
            assert_eq!(end, round.first_tile + round.num_tiles, "{plan}");
        }
        assert!(busiest <= schedule.busiest() && schedule.units * plan.cluster >= plan.row_blocks, "{plan}");
    }
}

#[test]
fn hopper_schedules_cover_every_row_block_and_tile_once() {
    let mut clusters = [0, 0];
    let alone_and_paired = |w: Workload| [w, w.with_kernels(tuned(false)), w.with_kernels(tuned(true))];
    let odd = DeviceInfo { sm_count: 113, ..DeviceInfo::H100 };
    let few = DeviceInfo { sm_count: 7, l2_bytes: 1 << 20, ..DeviceInfo::H100 };
    for device in [DeviceInfo::H100, odd, few] {
        for workload in workloads().into_iter().flat_map(alone_and_paired) {
            if let Some(plan) = LaunchPlan::new(&workload, &device).ok().filter(|plan| plan.hopper) {
                clusters[plan.cluster as usize - 1] += 1;
                check_schedule(&plan);
            }
        }
        for row_blocks in 1..=128 {
            for cluster in [false, true] {
                let workload = workload(row_blocks * BLOCK_N, 30_001, 1024).with_kernels(tuned(cluster));
                check_schedule(&LaunchPlan::new(&workload, &device).expect("fits"));
            }
        }
    }
    assert!(clusters.iter().all(|&plans| plans > 200), "{clusters:?}");
}

#[test]
fn a_sweep_takes_as_much_of_the_cache_as_asked() {
    // Row blocks of 1 MiB, and 60 MiB of cache.
    for (sweep, blocks) in [(80, 48), (40, 24), (20, 12), (100, 60)] {
        let tuning = Tuning { sweep, ..Tuning::default() };
        let kernels = KernelChoice { family: KernelFamily::Hopper, tuning };
        let plan = LaunchPlan::new(&workload(8192, 128_256, 4096).with_kernels(kernels), &DeviceInfo::H200);
        let plan = plan.expect("fits");
        assert_eq!(plan.sweep_blocks, blocks, "{sweep} %");
        check_schedule(&plan);
    }
}

#[test]
fn clusters_are_chosen_where_they_take_less_time() {
    let cluster = |tokens, kernels| {
        let workload = workload(tokens, 128_256, 4096).with_kernels(kernels);
        LaunchPlan::new(&workload, &DeviceInfo::H200).expect("fits").cluster
    };
    let auto = auto();
    assert_eq!([1, 128].map(|tokens| cluster(tokens, auto)), [1, 1], "nobody to share with");
    assert_eq!([129, 256, 8192, 16_384].map(|tokens| cluster(tokens, auto)), [2; 4], "an even number of row blocks");
    assert_eq!(
        [384, 640, 896].map(|tokens| cluster(tokens, auto)),
        [1; 3],
        "a row block of nothing costs more than it gains"
    );
    assert_eq!([1152, 16_384 - 128].map(|tokens| cluster(tokens, auto)), [2; 2], "that costs less than it gains");
    assert_eq!([128, 384].map(|tokens| cluster(tokens, tuned(true))), [2; 2]);
    assert_eq!(cluster(8192, tuned(false)), 1);
    let one = DeviceInfo { sm_count: 1, ..DeviceInfo::H100 };
    let plan = LaunchPlan::new(&workload(256, 1000, 64).with_kernels(tuned(true)), &one).expect("fits");
    assert_eq!(plan.cluster, 1, "a cluster needs two multiprocessors");
}

/// `cargo test --test plan waves -- --nocapture` prints the table.
#[test]
fn waves_of_the_hopper_forward_fill_the_device_at_every_number_of_tokens() {
    for (vocab, hidden) in [(128_256, 4096), (256_000, 2304), (151_936, 896), (32_000, 4096)] {
        println!("V={vocab} D={hidden}: tokens, cluster, rounds, share of the time with a tile");
        for row_blocks in 1..=128 {
            let tokens = row_blocks * BLOCK_N;
            let planned = |kernels: KernelChoice| {
                let workload = workload(tokens, vocab, hidden).with_kernels(kernels);
                LaunchPlan::new(&workload, &DeviceInfo::H200).expect("fits")
            };
            let plan = planned(auto());
            let busy = plan.utilisation();
            println!("{tokens:>6} {} {} {:.1} %", plan.cluster, plan.rounds.len(), 100.0 * busy);
            // The price of rounds that grow: few tiles divide badly.
            let least = if tokens >= 1024 && vocab > 100_000 { 0.93 } else { 0.89 };
            assert!(busy <= 1.0);
            if plan.row_blocks.is_multiple_of(plan.cluster) {
                assert!(busy >= least, "{busy} at {plan}");
            } else {
                // A pair has a row block of nothing: still less time than blocks alone take, which are all busy.
                let alone = planned(tuned(false)).utilisation();
                assert!(alone >= least && 0.86 / busy <= 1.0 / alone, "{busy}, alone {alone}, at {plan}");
            }
        }
    }
}

#[test]
fn every_round_and_split_has_a_partial_result_of_its_own() {
    for plan in plans() {
        let mut next = 0;
        // A merge reads them all again.
        let most = plan.rounds.len() as u32 * (2 * plan.device.sm_count / plan.row_blocks.max(1) + 2);
        for round in &plan.rounds {
            assert_eq!(round.first_partial, next);
            next += round.splits;
        }
        assert!(next as usize <= MAX_PARTIALS && next <= most.max(64), "{plan}");
        if !plan.rounds.is_empty() {
            let partial = plan.workspace.region("partial").expect("a forward has partial results");
            assert_eq!(partial.bytes, 16 * next as usize * plan.workload.shape.tokens);
        }
    }
}

#[test]
fn the_last_round_of_a_capture_is_half_of_the_vocabulary_and_the_first_fits_a_row_or_is_two_tiles() {
    let gemma = workload(8192, 256_000, 2304);
    let tiles = |workload: &Workload| -> Vec<u32> {
        LaunchPlan::new(workload, &DeviceInfo::H200).expect("fits").rounds.iter().map(|r| r.num_tiles).collect()
    };
    assert_eq!(tiles(&gemma.with_kernels(KernelFamily::Portable)), [1, 3, 12, 47, 187, 750, 1000]);
    assert_eq!(tiles(&gemma), [2, 6, 24, 93, 375, 500], "tiles of 256 classes on Hopper");
    let plan = LaunchPlan::new(&gemma, &DeviceInfo::H200).expect("fits");
    let without = CceOptions { capture: false, ..CceOptions::default() };
    let plan = LaunchPlan::new(&Workload { options: without, ..plan.workload }, &DeviceInfo::H200).expect("fits");
    assert_eq!(plan.rounds.len(), 1);
}

#[test]
fn the_device_is_full_where_there_is_work_for_it() {
    for device in DeviceInfo::KNOWN {
        let portable = workload(8192, 256_000, 2304).with_kernels(KernelFamily::Portable);
        let plan = LaunchPlan::new(&portable, &device).expect("fits");
        let blocks_per_sm = if device.shared_per_sm >= 164 << 10 { 2 } else { 1 };
        let resident = (device.sm_count * blocks_per_sm) as f64;
        let last = plan.rounds.last().expect("rounds");
        let blocks = f64::from(plan.row_blocks * last.splits);
        let waves = (blocks / resident).ceil();
        assert!(blocks / (waves * resident) > 0.9, "{plan}");
    }
}

#[test]
fn launches_are_within_the_limits_of_their_device() {
    for plan in plans() {
        for launch in launches(&plan) {
            let kernel = launch.kernel;
            assert!(kernel.shared as usize <= plan.device.shared_per_block, "{}", launch.entry_point);
            assert!(kernel.threads <= 1024 && kernel.threads % 32 == 0);
            assert!(launch.grid[0] >= 1 && launch.grid[0] <= i32::MAX as u32);
            assert!(launch.grid[1] >= 1 && launch.grid[1] <= 65_535);
            assert!(kernel.entry_points().contains(&launch.entry_point));
            if kernel.cooperative {
                let of_dtype = usize::from(plan.workload.dtype == DType::F32);
                let blocks = match (kernel.is_hopper(), kernel.cluster) {
                    (true, 1) => plan.device.sm_count,
                    (true, blocks) => blocks * plan.device.exact_clusters,
                    (false, _) => plan.device.sm_count * plan.device.exact_blocks_per_sm[of_dtype],
                };
                assert_eq!(launch.grid, [blocks, 1]);
            }
        }
    }
}

#[test]
fn regions_are_aligned_do_not_overlap_and_add_up() {
    for plan in plans() {
        let mut sums = Vec::new();
        for group in [Group::Saved, Group::Forward, Group::Backward] {
            let mut end = 0;
            for region in plan.workspace.regions.iter().filter(|r| r.group == group && !is_of_tiles(r.name)) {
                assert_eq!(region.offset % 256, 0);
                assert!(region.offset >= end && region.offset < end + 256, "{} in {plan}", region.name);
                end = region.offset + region.bytes;
            }
            let tiles = plan.workspace.regions.iter().filter(|r| r.group == group && is_of_tiles(r.name));
            let end = tiles.map(|r| r.offset + r.bytes).fold(end, usize::max);
            assert_eq!(plan.workspace.group_bytes(group), end.next_multiple_of(256));
            sums.push(plan.workspace.group_bytes(group));
        }
        assert_eq!(plan.workspace.peak_bytes(), sums[0] + sums[1].max(sums[2]));
        let names: std::collections::HashSet<_> = plan.workspace.regions.iter().map(|r| r.name).collect();
        assert_eq!(names.len(), plan.workspace.regions.len());
    }
}

#[test]
fn sizes_are_their_formulas() {
    for plan in plans() {
        let Shape { tokens: n, hidden: d, vocab: v } = plan.workload.shape;
        let (row_blocks, block_entries) = (n.div_ceil(BLOCK_N), plan.block_entries as usize);
        let partials: usize = plan.rounds.iter().map(|r| r.splits as usize).sum();
        let element = plan.workload.dtype.size_in_bytes();
        let exact = |region: &cut_cross_entropy::plan::Region| match region.formula {
            "4" => 4,
            "12" => 12,
            "64" => 64,
            "4 N" => 4 * n,
            "16 N" => 16 * n,
            "32 N" => 32 * n,
            "4 V" => 4 * v,
            "4 (V + 1)" => 4 * (v + 1),
            "4 (ceil(V / 4096) + 1)" => 4 * (v.div_ceil(4096) + 1),
            "16" => 16,
            "4 * 1024" => 4096,
            "4 blocks" => 4 * row_blocks.max(v.div_ceil(128)),
            "4 E" => 4 * row_blocks * block_entries,
            "4 (2 (E / 3) + 4)" => 4 * (2 * (row_blocks * block_entries / 3) + 4),
            "4 (E / 128 + 2 blocks + 2)" => {
                4 * (row_blocks * block_entries / 128 + 2 * row_blocks.max(v.div_ceil(128)) + 2)
            }
            "4 row_blocks ceil(block_entries / 32)" => 4 * row_blocks * block_entries.div_ceil(32),
            "4 D" => 4 * d,
            "4 * 64 D" => 256 * d,
            "12 row_blocks" => 12 * row_blocks,
            "4 rounds" => 4 * plan.rounds.len(),
            "8 row_blocks block_entries" => 8 * row_blocks * block_entries,
            "16 partials N" => 16 * partials * n,
            "4 partials N" => 4 * partials * n,
            "4 slices panel D" => 4 * (plan.exact_slices * plan.exact_panel_rows) as usize * d,
            "element * gradient elements" => element * plan.exact_gradients_elements,
            other => panic!("no such formula: {other}"),
        };
        for region in &plan.workspace.regions {
            assert_eq!(region.bytes, exact(region), "{} = {}", region.name, region.formula);
        }
        // The exact kernel needs a tile of classes for every row that may come to it.
        let rows = n.next_multiple_of(BLOCK_N);
        assert!(plan.exact_gradients_elements >= rows * if plan.hopper { 256 } else { BLOCK_V });
        assert_eq!(plan.exact_panel_rows as usize % BLOCK_N, 0);
        assert!(!plan.dense || plan.exact_panel_rows as usize >= n);
        // Every row's target fits, whatever else.
        assert!(!plan.capture || block_entries >= n.min(BLOCK_N));
    }
}

#[test]
fn workspace_at_gemma_2_2b_is_at_most_64_mib() {
    let (tokens, vocab, hidden) = GEMMA2_2B;
    for device in DeviceInfo::KNOWN {
        let plan = LaunchPlan::new(&workload(tokens, vocab, hidden), &device).expect("fits");
        assert!(plan.workspace.peak_bytes() <= 64 << 20, "{plan}");
    }
}

#[test]
fn the_workspace_has_no_product_of_tokens_and_vocabulary() {
    let at = |vocab| {
        let plan = LaunchPlan::new(&workload(8192, vocab, 1024), &DeviceInfo::H200).expect("fits");
        plan.workspace.peak_bytes() as f64
    };
    // Two lists of 4 bytes a class, and of 16 a 128 classes, and their rounding: far from 8192 bytes a class.
    assert!((at(256_000) - at(128_000)) / 128_000.0 <= 8.3);
}

#[test]
fn what_is_not_asked_for_is_neither_allocated_nor_launched() {
    let all = workload(1024, 32_000, 512);
    let plan = |embeddings, classifier, bias| {
        LaunchPlan::new(&all.with_gradients(embeddings, classifier, bias), &DeviceInfo::H100).expect("fits")
    };
    let stems = |plan: &LaunchPlan| launches(plan).map(|l| l.kernel.stem).collect::<Vec<_>>();
    let frozen_classifier = plan(true, false, false);
    assert!(frozen_classifier.workspace.region("column_entries").is_none());
    assert!(stems(&frozen_classifier).iter().all(|s| !s.contains("column") && !s.contains("class")));
    let frozen_embeddings = plan(false, true, false);
    assert!(frozen_embeddings.workspace.region("exact_d_embeddings").is_none());
    assert!(stems(&frozen_embeddings).iter().all(|s| !s.contains("d_embeddings") && *s != "lce_row_tiles"));
    let nothing = plan(false, false, false);
    assert!(nothing.backward.is_empty() && !nothing.capture);
    assert_eq!(nothing.workspace.group_bytes(Group::Backward), 0);
    assert!(nothing.workspace.region("pool").is_none() && nothing.workspace.region("entries").is_none());
    // A gradient of a bias that is not there is none.
    assert!(plan(false, false, true).backward.is_empty());
}

#[test]
fn what_a_forward_saves_does_not_depend_on_the_gradients_of_the_backward() {
    for workload in workloads() {
        let saved = |w: &Workload| {
            let plan = LaunchPlan::new(w, &DeviceInfo::L4).ok()?;
            let of_group = plan.workspace.regions.into_iter().filter(|r| r.group == Group::Saved);
            Some(of_group.map(|r| (r.name, r.offset, r.bytes)).collect::<Vec<_>>())
        };
        if workload.options.capture {
            let [all, one] =
                [(true, true, true), (false, true, false)].map(|(e, c, b)| saved(&workload.with_gradients(e, c, b)));
            assert_eq!(all, one);
        }
    }
}

#[test]
fn impossible_problems_and_devices_are_errors() {
    let plan = |w: &Workload, d: &DeviceInfo| match LaunchPlan::new(w, d) {
        Err(Error::Device { call, reason }) => format!("{call}: {reason}"),
        other => panic!("{other:?}"),
    };
    let ok = workload(128, 1000, 64);
    let h100 = DeviceInfo::H100;
    assert!(plan(&workload(128, MAX_VOCAB + 1, 64), &h100).contains("vocab: 33554433, at most 33554432"));
    assert!(plan(&workload(1 << 31, 1, 1), &h100).contains("tokens"));
    assert!(plan(&workload(20_000_000, 1 << 20, 1), &h100).contains("entries of all row blocks"));
    assert!(plan(&ok, &DeviceInfo { compute_capability: (7, 5), ..h100.clone() }).contains("older than sm_80"));
    assert!(plan(&ok, &DeviceInfo { exact_blocks_per_sm: [0, 1], ..h100.clone() }).contains("cooperative"));
    assert!(plan(&ok, &DeviceInfo { shared_per_block: 48 << 10, ..h100 }).contains("shared memory"));
}

#[test]
fn plans_are_equal_where_their_inputs_are_and_print_themselves() {
    let (tokens, vocab, hidden) = GEMMA2_2B;
    let plan = || LaunchPlan::new(&workload(tokens, vocab, hidden), &DeviceInfo::known("h200").expect("known"));
    assert_eq!(plan(), plan());
    let text = plan().expect("fits").to_string();
    let wanted = [
        "N=8192 V=256000 D=2304 bf16 on H200",
        "round 5: 500 tiles of 256 classes",
        "lce_forward_sm90_cluster_bf16",
        "hopper: clusters of 2, lead 2, ",
        "lce_exact_sm90_bf16",
        "fill pools",
        "MiB  workspace",
    ];
    for part in wanted {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
    assert_eq!(DeviceInfo::known("rtx4090"), Some(DeviceInfo::RTX_4090));
    assert_eq!(DeviceInfo::known("abacus"), None);
}

#[test]
fn the_hopper_kernels_are_chosen_where_they_fit_and_refused_where_they_do_not() {
    let bf16 = workload(1024, 4096, 64);
    let hopper = |workload: &Workload, device: &DeviceInfo| LaunchPlan::new(workload, device).map(|plan| plan.hopper);
    assert_eq!(hopper(&bf16, &DeviceInfo::H100), Ok(true));
    assert_eq!(hopper(&bf16.with_kernels(KernelFamily::Portable), &DeviceInfo::H100), Ok(false));
    let unfit = [
        (bf16, DeviceInfo::A100, "9.0"),
        (bf16, DeviceInfo::RTX_5090, "9.0"),
        (Workload { dtype: DType::F32, ..bf16 }, DeviceInfo::H100, "f32"),
        (Workload { aligned: false, ..bf16 }, DeviceInfo::H100, "16 bytes"),
        (bf16, DeviceInfo { shared_per_block: 99 << 10, ..DeviceInfo::H100 }, "shared memory"),
    ];
    for (workload, device, reason) in unfit {
        assert_eq!(hopper(&workload, &device), Ok(false), "{reason}");
        let error = hopper(&workload.with_kernels(KernelFamily::Hopper), &device).expect_err(reason);
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn the_exact_path_is_hoppers_where_the_forward_is() {
    let exact = |workload: &Workload, kernels| {
        let plan = LaunchPlan::new(&workload.with_kernels(kernels), &DeviceInfo::H200).expect("fits");
        let launch = launches(&plan).find(|launch| launch.kernel.cooperative).expect("an exact kernel").clone();
        (launch.entry_point.into_owned(), plan.exact_gradients_elements)
    };
    let sparse = workload(8192, 256_000, 2304);
    let dense = Workload { options: CceOptions { filter: GradientFilter::Exact, ..sparse.options }, ..sparse };
    let chunk =
        |chunk_mib| KernelChoice { family: KernelFamily::Hopper, tuning: Tuning { chunk_mib, ..Tuning::default() } };
    assert_eq!(exact(&dense, KernelFamily::Auto.into()), ("lce_exact_sm90_cluster_bf16".into(), 32 << 20)); // 64 MiB
    assert_eq!(exact(&dense, chunk(16)), ("lce_exact_sm90_cluster_bf16".into(), 8 << 20));
    assert_eq!(exact(&dense, chunk(0)), ("lce_exact_sm90_cluster_bf16".into(), 8192 * 256)); // a tile
    assert_eq!(exact(&dense, KernelFamily::Portable.into()).0, "lce_exact_bf16");
    // For rows that overflow: 8 MiB at most.
    assert_eq!(exact(&sparse, KernelFamily::Auto.into()), ("lce_exact_sm90_bf16".into(), 4 << 20));
    assert_eq!(exact(&sparse, chunk(16)), ("lce_exact_sm90_bf16".into(), 4 << 20));
    assert_eq!(exact(&sparse, chunk(0)), ("lce_exact_sm90_bf16".into(), 8192 * 256));
    assert_eq!(exact(&sparse, KernelFamily::Portable.into()).0, "lce_exact_bf16");
}

#[test]
fn what_claims_traffic_is_launched() {
    let entries = Entries { rows: 100, candidates: 900, kept: 700, exact_rows: 50, ..Entries::default() };
    let exact = CceOptions { filter: GradientFilter::Exact, ..CceOptions::default() };
    let dense = Workload { options: exact, ..workload(8192, 256_000, 2304) };
    let dense = LaunchPlan::new(&dense, &DeviceInfo::H200).expect("fits");
    let shape = |plan: &LaunchPlan| plan.workload.shape;
    // Without tokens or classes there are no such entries.
    let some = |plan: &LaunchPlan| shape(plan).tokens > 0 && shape(plan).vocab > 0;
    for plan in plans().chain([dense]).filter(some) {
        for (entry_point, _) in plan.traffic(&entries) {
            assert!(launches(&plan).any(|launch| launch.entry_point == entry_point), "{entry_point} in {plan}");
        }
    }
}

#[test]
fn kernels_have_names_of_their_own() {
    let names: Vec<_> = KERNELS.iter().flat_map(|k| k.entry_points()).collect();
    let different: std::collections::HashSet<_> = names.iter().collect();
    assert_eq!(names.len(), different.len());
}

#[test]
fn tiles_are_for_16_bit_rows_of_whole_vectors() {
    let tiles = |workload: &Workload| LaunchPlan::new(workload, &DeviceInfo::H200).expect("fits").tiles;
    let gemma = workload(8192, 256_000, 2304);
    assert_eq!(tiles(&gemma), Tiles::WhereFaster);
    assert_eq!(tiles(&gemma.with_kernels(KernelFamily::Portable)), Tiles::WhereFaster);
    let set = |tiles| KernelChoice { tuning: Tuning { tiles, ..Tuning::default() }, ..auto() };
    assert_eq!(tiles(&gemma.with_kernels(set(Tiles::Everywhere))), Tiles::Everywhere);
    let dense = Workload { options: CceOptions { filter: GradientFilter::Exact, ..gemma.options }, ..gemma };
    for without in [
        Workload { dtype: DType::F32, ..gemma },
        Workload { aligned: false, ..gemma },
        workload(8192, 256_000, 2300),
        gemma.with_kernels(set(Tiles::Off)),
        workload(256, 151_936, 896), // 14 blocks of 128 by 128: too few
        dense,
    ] {
        assert_eq!(tiles(&without), Tiles::Off, "{without:?}");
    }
}

fn is_of_tiles(name: &str) -> bool {
    name.contains("tile") || ["active_blocks", "sources", "crowded_blocks", "crowded_next"].contains(&name)
}

/// What tiles need lies where the exact path's gradients do, which is in use when tiles are done with; nothing else shares its memory.
#[test]
fn only_tiles_and_the_exact_path_share_memory() {
    let mut shared = 0;
    for plan in plans() {
        let regions = &plan.workspace.regions;
        for (index, a) in regions.iter().enumerate() {
            assert!(a.offset.is_multiple_of(256) && a.offset + a.bytes <= plan.workspace.group_bytes(a.group));
            for b in regions[index + 1..].iter().filter(|b| b.group == a.group) {
                let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
                let may_overlap = is_of_tiles(b.name) && a.name.starts_with("exact_") && a.name != "exact_scale";
                assert!(apart || may_overlap, "{} and {} in {plan}", a.name, b.name);
                shared += usize::from(!apart);
            }
        }
    }
    assert!(shared > 0);
}
