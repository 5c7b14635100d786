//! What the plan claims that the kernels read and multiply, against what the emulated GPU counts.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::{Expected, Spec, Tensors};
use cut_cross_entropy::filter;
use cut_cross_entropy::plan::{Entries, KernelChoice, KernelFamily, LaunchPlan, TileEntries, Tiles, Tuning, Workload};
use cut_cross_entropy::{
    Backend, CceOptions, CudaStaged, DType, GradientFilter, Problem, Telemetry, Upstream, cce_backward, cce_forward,
};
use cut_cross_entropy_emulator::{self as emulator, Config, Counters};
use std::collections::BTreeMap;

struct Case {
    name: &'static str,
    spec: Spec,
    filter: GradientFilter,
    /// Rows that start at multiples of 16 bytes.
    aligned: bool,
    kernels: KernelChoice,
}

fn cases() -> Vec<Case> {
    let sparse = GradientFilter::Unbiased { eps: 1.0 / 256.0, seed: 3 };
    let case = |name, (tokens, hidden, vocab), dtype, filter| Case {
        name,
        // Rows that are ignored leave gaps that the formulas know of by their number alone.
        spec: Spec { dtype, ignored: 0.1, seed: 11, ..Spec::new(tokens, hidden, vocab) },
        filter,
        aligned: true,
        kernels: KernelFamily::Portable.into(),
    };
    let padded = |case: Case| Case { spec: Spec { padding: 2, ..case.spec }, aligned: false, ..case };
    let biased = |case: Case| Case { spec: Spec { bias: true, ..case.spec }, ..case };
    let without_gaps = |case: Case| Case { spec: Spec { ignored: 0.0, ..case.spec }, ..case };
    let hopper = |cluster, case: Case| {
        let tuning = Tuning { cluster: Some(cluster), ..Tuning::default() };
        Case { kernels: KernelChoice { family: KernelFamily::Hopper, tuning }, ..case }
    };
    let tiles = |tiles, case: Case| {
        let tuning = Tuning { tiles, ..case.kernels.tuning };
        Case { kernels: KernelChoice { tuning, ..case.kernels }, ..case }
    };
    vec![
        tiles(Tiles::Off, case("sparse, 16 bits", (150, 640, 700), DType::BF16, sparse)),
        tiles(Tiles::Everywhere, biased(case("tiles, ragged in every way", (150, 328, 700), DType::BF16, sparse))),
        case("tiles and gathers", (290, 136, 700), DType::F16, sparse),
        case("sparse, 32 bits, a last step of half the columns", (40, 1032, 300), DType::F32, sparse),
        case("exact, 16 bits, ragged tiles", (150, 200, 389), DType::F16, GradientFilter::Exact),
        biased(case("exact, 32 bits, one step of columns", (40, 12, 300), DType::F32, GradientFilter::Exact)),
        padded(case("exact, rows anywhere", (40, 61, 150), DType::BF16, GradientFilter::Exact)),
        hopper(false, case("Hopper, a ragged step and a ragged tile", (150, 328, 700), DType::BF16, sparse)),
        hopper(false, biased(case("Hopper exact, gathered", (150, 328, 700), DType::F16, GradientFilter::Exact))),
        hopper(
            true,
            without_gaps(biased(case("Hopper exact, clusters", (290, 72, 600), DType::BF16, GradientFilter::Exact))),
        ),
        hopper(true, case("Hopper, a cluster of which one block has no rows", (290, 72, 260), DType::F16, sparse)),
    ]
}

/// The plan, what the backward counted, and what is in tiles.
fn run(case: &Case) -> (LaunchPlan, Telemetry, [TileEntries; 2]) {
    let options = CceOptions { filter: case.filter, ..CceOptions::default() };
    let tensors: Tensors = case.spec.generate();
    let inputs = tensors.inputs();
    let problem = Problem::new(&inputs, &options).expect("legal");
    let staged = CudaStaged::new(0).expect("an emulated device").with_kernels(case.kernels);
    let workload = Workload::new(&problem, case.aligned).with_kernels(case.kernels);
    let plan = staged.cuda().plan(&workload).expect("fits");
    emulator::reset_counters();
    let forward = cce_forward(&staged, &inputs, &options).expect("legal");
    let gradients = cce_backward(&staged, &inputs, &forward, &Upstream::default()).expect("its own");
    assert_eq!(staged.name(), "cuda");
    let tiles = tiles(&problem, plan.tiles, gradients.telemetry.kept_entries);
    (plan, gradients.telemetry, tiles)
}

/// What blocks of rows and of classes have in tiles, by the definitions of the filter and of `kernels/tile_lists.cu`.
fn tiles(problem: &Problem<'_>, tiles: Tiles, kept: u64) -> [TileEntries; 2] {
    let GradientFilter::Unbiased { eps, seed } = problem.options().filter else { return Default::default() };
    let expected = Expected::new(problem);
    let targets = expected.reference.targets.iter().enumerate().filter_map(|(i, y)| Some((i, (*y)?)));
    let mut entries = Vec::new(); // (row, class)
    for (row, (i, target)) in targets.enumerate() {
        let start = filter::row_start(seed, i);
        entries.extend((0..expected.vocab()).filter_map(|class| {
            let least = f64::from(eps) * f64::from(filter::entry_uniform(start, class as u32));
            let p = expected.forward.probabilities[i * expected.vocab() + class];
            (class == target || p >= least).then_some((row, class))
        }));
    }
    assert_eq!(entries.len() as u64, kept);
    let least = if tiles == Tiles::Everywhere { 1 } else { 32 };
    let rows = expected.reference.targets.iter().flatten().count() as u64;
    let side = |owner: fn(&(usize, usize)) -> usize, source: fn(&(usize, usize)) -> usize, is_rows: bool| {
        let mut blocks = BTreeMap::<usize, BTreeMap<usize, u64>>::new(); // block, source: entries
        for entry in &entries {
            *blocks.entry(owner(entry) / 128).or_default().entry(source(entry)).or_default() += 1;
        }
        let mut all = TileEntries::default();
        for block in blocks.values().filter(|_| tiles != Tiles::Off) {
            let of_block: u64 = block.values().sum();
            let shared: Vec<u64> = block.values().copied().filter(|&n| n >= 2 || !is_rows).collect();
            let sources = shared.len() as u64;
            let crowded = !is_rows && of_block >= 4 * rows && rows >= least;
            let sources = if crowded { rows } else { sources };
            if sources < least || (!is_rows && 3 * sources > 2 * of_block) {
                continue;
            }
            all.tiles += sources.div_ceil(128);
            all.sources += sources;
            all.entries += shared.iter().sum::<u64>();
            all.of_blocks += of_block;
        }
        all
    };
    [side(|e| e.0, |e| e.1, true), side(|e| e.1, |e| e.0, false)]
}

/// What a kernel may copy that is not claimed: where Hopper's gather the rows of a block that is not full, they repeat the last. The exact
/// path does so for each tile of 256 classes, and for dC for each of 128; a block without any row is not gathered.
fn repeated(case: &Case, plan: &LaunchPlan, entry_point: &str, entries: &Entries) -> u64 {
    let row_bytes = (case.spec.hidden * case.spec.dtype.size_in_bytes()) as u64;
    let tiles: u64 = plan.rounds.iter().map(|round| u64::from(round.num_tiles)).sum();
    let classes = case.spec.vocab as u64;
    let (times, block) = match entry_point {
        e if e.starts_with("lce_forward_sm90") => (tiles, 128),
        e if e.starts_with("lce_exact_sm90") => (classes.div_ceil(256) + classes.div_ceil(128), 64),
        _ => return 0,
    };
    times * (entries.rows.next_multiple_of(block) - entries.rows) * row_bytes
}

/// What a kernel may read that is not claimed: of its rows and classes, not of their elements.
fn beyond(case: &Case, plan: &LaunchPlan, entry_point: &str, claimed: u64, entries: &Entries) -> u64 {
    let row_bytes = (case.spec.hidden * case.spec.dtype.size_in_bytes()) as u64;
    let parts = case.spec.hidden.div_ceil(1024) as u64;
    let a_row_of_a_tile = |bytes| claimed * bytes / row_bytes;
    match entry_point {
        e if e.starts_with("lce_forward") => a_row_of_a_tile(32),
        // Each of 1024 threads of a row block: two numbers; and of each row seven.
        e if e.starts_with("lce_filter") => 1024 * 8 * case.spec.tokens.div_ceil(128) as u64 + 28 * entries.rows,
        // Each of 128 threads: the token's row; its statistics and coefficients, 48 bytes, and six numbers.
        e if e.starts_with("lce_d_embeddings_bf16") || e.starts_with("lce_d_embeddings_f") => {
            128 * parts * (4 * case.spec.tokens as u64 + 72 * entries.rows)
        }
        // Each of 256 threads, of each tile: where lists begin. Numbers of the rows that the products gather, 8 bytes a chunk of 16 and of
        // a step ahead, also of chunks beyond D. Each of 32 threads, of each row and 128 columns: a bit an entry, and 27 numbers.
        e if e.contains("_tiles") => {
            let columns = case.spec.hidden.div_ceil(128) as u64;
            let tiles = if e.contains("embeddings") { entries.row_tiles } else { entries.class_tiles };
            let blocks = (case.spec.tokens.div_ceil(128) + case.spec.vocab.div_ceil(128)) as u64;
            columns
                * (tiles.tiles * (256 * 8 + 5 * 32 * 16 * 4)
                    + 4 * tiles.of_blocks
                    + 32 * 128 * entries.rows
                    + blocks * 256 * 40)
        }
        // Each of 256 threads: begin and end of a class's list, for each span of columns, and whether it is in tiles.
        e if e.starts_with("lce_d_classifier") => 256 * 20 * case.spec.vocab as u64,
        // Numbers of the rows that the products gather, 8 bytes a chunk of 16, also of chunks beyond D, and what a tile of logits needs. Where
        // slices are added, each of 256 threads: the token of each row.
        e if e.starts_with("lce_exact") => {
            let sums = if plan.exact_slices > 1 { 256 * 8 * entries.rows } else { 0 };
            claimed * 2 / 5 + a_row_of_a_tile(96) + sums
        }
        _ => unreachable!("{entry_point}"),
    }
}

#[test]
fn what_the_plan_claims_is_what_is_read_and_multiplied() {
    emulator::install().expect("the emulator is built with this test");
    emulator::configure(&Config { device: "h100".into(), workers: 2, ..Config::default() });
    for case in cases() {
        let (plan, telemetry, [row_tiles, class_tiles]) = run(&case);
        let targets = telemetry.rows - telemetry.exact_rows;
        let entries = Entries {
            rows: telemetry.rows,
            candidates: telemetry.candidates - targets,
            kept: telemetry.kept_entries,
            exact_rows: telemetry.exact_rows,
            row_tiles,
            class_tiles,
        };
        let claims = plan.traffic(&entries);
        assert!(claims.len() >= 2, "{}", case.name);
        for (entry_point, claim) in claims {
            let Counters { global_read, copy_read, bulk_read, mma, wgmma, .. } =
                emulator::counters(&entry_point).expect("launched");
            let copied = copy_read + bulk_read;
            let of =
                format!("{}: {entry_point}: {claim:?}, counted {global_read}, {copied}, {mma}, {wgmma}", case.name);
            println!("{:.3}  {of}", global_read as f64 / claim.read as f64);
            assert_eq!((mma, wgmma), (claim.mma, claim.wgmma), "{of}");
            let repeated = repeated(&case, &plan, &entry_point, &entries);
            assert!(!case.aligned || [claim.copied, claim.copied + repeated].contains(&copied), "{of}");
            let most = claim.read + repeated + beyond(&case, &plan, &entry_point, claim.read, &entries);
            assert!((claim.read..=most).contains(&global_read), "{of}, at most {most}");
        }
    }
}
