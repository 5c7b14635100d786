//! How the CUDA backend cuts a problem: rounds, splits, every launch with its grid, every byte of workspace. Pure
//! arithmetic, without a GPU; `cce info --device h200` prints it.

mod device;
mod exact;
mod family;
mod kernels;
mod rounds;
mod schedule;
mod traffic;
mod workspace;

pub use device::DeviceInfo;
pub use family::{KernelChoice, KernelFamily, Tiles, Tuning};
pub use kernels::{KERNELS, Kernel, Variants};
pub use rounds::Round;
use rounds::Workers;
pub use schedule::{Item, Schedule};
pub use traffic::{Entries, TileEntries, Traffic};
pub use workspace::{Group, Region, Workspace};

use crate::memory::Buffer;
use crate::{CceOptions, DType, Error, GradientFilter, GradientRequest, Memory, Problem, Result, Shape};
use std::borrow::Cow;
use workspace::{Sizes, padded_rows};

/// Rows of a row block: of a tile of logits, and of a pool of candidates. As in `kernels/abi.h`, like the next four.
pub const BLOCK_N: usize = 128;
/// Classes of a tile of logits.
pub const BLOCK_V: usize = 128;
/// Most (round, split) pairs of a forward: room for every block of a device in each round, where there is one row block.
pub const MAX_PARTIALS: usize = 1024;
/// A candidate packs its class below its row in the block.
pub const MAX_VOCAB: usize = 1 << 25;
/// Parts into which sums over all rows or classes are cut.
pub const SUM_PARTS: usize = 64;
/// Blocks of classes whose tiles' lists are made row block by row block.
pub const MOST_CROWDED: usize = 1024;

const MIB: usize = 1 << 20;

/// Bytes that the lists of candidates may take, as long as each row has room for [`LEAST_ROOM`].
const CANDIDATE_BYTES: usize = 20 * MIB;
/// Room for candidates that each row has at least: a small trained model keeps 247 at ε = 2^-10
/// (measured: DESIGN.md, section 6). Rows share the room of their block.
const LEAST_ROOM: usize = 320;
/// Splits of a round that is done again, as a multiple of the round's own: it may be for a few row blocks only.
const REDO_SPLITS: u32 = 8;

/// Classes of a tile of the Hopper kernels.
const HOPPER_TILE: usize = 256;
/// Blocks of a cluster of the Hopper kernels, and the time that it takes for a tile next to a block by itself: predicted, see DESIGN.md,
/// section 4. With it the forward has clusters for even numbers of row blocks, and for odd ones from 9 on.
const CLUSTER: u32 = 2;
const CLUSTER_TIME: f64 = 0.86;

/// What a plan depends on, besides the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workload {
    /// N, V, D.
    pub shape: Shape,
    /// Element type of embeddings and classifier.
    pub dtype: DType,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether the rows of both matrices start at multiples of 16 bytes.
    pub aligned: bool,
    /// Options of the loss. `gradients` says which gradients the backward writes.
    pub options: CceOptions,
    /// Which kernels to take.
    pub kernels: KernelChoice,
    /// Candidates that each row has room for; `None`: as many as 20 MiB hold for all rows, but 320 at least.
    pub room: Option<usize>,
}

impl Workload {
    /// Of a problem whose matrices are `aligned` or not.
    pub fn new<M: Memory>(problem: &Problem<'_, M>, aligned: bool) -> Self {
        let bias = problem.inputs().bias.is_some_and(|b| b.len() > 0);
        Workload { bias, aligned, ..Workload::of_shape(problem.shape(), problem.dtype(), *problem.options()) }
    }

    /// Of tensors that need not be there: without a bias, and aligned.
    pub fn of_shape(shape: Shape, dtype: DType, options: CceOptions) -> Self {
        Workload { shape, dtype, bias: false, aligned: true, options, kernels: KernelChoice::default(), room: None }
    }

    /// The same by other kernels.
    pub fn with_kernels(self, kernels: impl Into<KernelChoice>) -> Self {
        Workload { kernels: kernels.into(), ..self }
    }

    /// The same with room for other numbers of candidates.
    pub fn with_room(self, room: Option<usize>) -> Self {
        Workload { room, ..self }
    }

    /// Why the Hopper kernels cannot do this on `device`, if they cannot.
    fn unfit_for_hopper(&self, device: &DeviceInfo) -> Option<&'static str> {
        let Shape { tokens, hidden, vocab } = self.shape;
        let reasons = [
            (device.compute_capability != (9, 0), "the device has not compute capability 9.0"),
            (
                device.shared_per_block < kernels::EXACT_HOPPER.shared.max(kernels::FORWARD_HOPPER.shared) as usize,
                "the device has too little shared memory",
            ),
            (self.dtype == DType::F32, "the inputs are f32"),
            (!self.aligned, "rows do not start at multiples of 16 bytes"),
            (tokens == 0 || hidden == 0 || vocab == 0, "there is nothing to multiply"),
        ];
        reasons.into_iter().find(|(unfit, _)| *unfit).map(|(_, reason)| reason)
    }

    /// The same with other gradients.
    pub fn with_gradients(self, embeddings: bool, classifier: bool, bias: bool) -> Self {
        let gradients = GradientRequest { embeddings, classifier, bias, ..self.options.gradients };
        Workload { options: CceOptions { gradients, ..self.options }, ..self }
    }

    /// Gradients without a sparse form: every row takes the exact path.
    pub fn is_dense(&self) -> bool {
        self.options.is_dense()
    }
}

/// One launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Entry point.
    pub entry_point: Cow<'static, str>,
    /// Which kernel it is a variant of.
    pub kernel: Kernel,
    /// Blocks.
    pub grid: [u32; 2],
    /// The round of the forward kernels; of others the default.
    pub round: Round,
    /// The round once more, for the row blocks alone whose pools overflowed in it.
    pub redo: bool,
}

/// One thing that a stream is given to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Fills a region of the workspace with a byte.
    Fill {
        /// The region's name.
        region: &'static str,
        /// The byte.
        byte: u8,
    },
    /// Launches a kernel.
    Launch(Launch),
}

/// The plan of a forward and its backward. Print it with `Display`.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchPlan {
    /// What it is for.
    pub workload: Workload,
    /// Where it runs.
    pub device: DeviceInfo,
    /// The forward puts candidates aside.
    pub capture: bool,
    /// Every row takes the exact path.
    pub dense: bool,
    /// Blocks of [`BLOCK_N`] tokens.
    pub row_blocks: u32,
    /// Candidates that the rows of a block have room for, together, their targets included. With more, the unbiased filter
    /// raises the block's ε; under a threshold its rows take the exact path. `128 (room + 1)`, at most
    /// `min(128, N) (V + 1)`; `room` is [`Workload::room`], or 20 MiB / (8 N) but at least 320 and at most 2 / ε; at most V.
    pub block_entries: u32,
    /// Rows of a panel of the exact path.
    pub exact_panel_rows: u32,
    /// Elements of its logit gradients.
    pub exact_gradients_elements: usize,
    /// Most slices of a chunk of classes that the exact path has dE's sums of by themselves: where dE has few tiles, more items of work.
    pub exact_slices: u32,
    /// Which blocks of rows and of classes are products of tensor cores in a backward that gathers.
    pub tiles: Tiles,
    /// The forward is Hopper's, and so is the exact path.
    pub hopper: bool,
    /// Most row blocks that go through the vocabulary together in Hopper's forward: their rows of E stay in the last cache.
    pub sweep_blocks: u32,
    /// Blocks of a cluster of Hopper's forward: 2, or 1 for none.
    pub cluster: u32,
    /// Rounds of the forward.
    pub rounds: Vec<Round>,
    /// The forward, in order.
    pub forward: Vec<Step>,
    /// The backward, in order; for the gradients that `workload.options.gradients` asks for.
    pub backward: Vec<Step>,
    /// Device memory.
    pub workspace: Workspace,
}

impl LaunchPlan {
    /// The plan for a workload on a device.
    ///
    /// # Errors
    /// [`Error::Device`] where the kernels cannot run on this device or the problem is beyond what they index.
    pub fn new(workload: &Workload, device: &DeviceInfo) -> Result<Self> {
        let Shape { tokens, hidden, vocab } = workload.shape;
        let options = &workload.options;
        check(workload, device)?;
        let wanted = options.gradients;
        let gradients = [wanted.embeddings, wanted.classifier, wanted.bias && workload.bias];
        let columns = gradients[1] || gradients[2];
        let dense = workload.is_dense();
        let capture = options.capture && !dense && gradients.contains(&true);
        let smoothing = options.label_smoothing > 0.0;

        let row_blocks = tokens.div_ceil(BLOCK_N);
        let hopper = match (workload.kernels.family, workload.unfit_for_hopper(device)) {
            (KernelFamily::Portable, _) | (KernelFamily::Auto, Some(_)) => false,
            (_, None) => true,
            (KernelFamily::Hopper, Some(reason)) => {
                let reason = format!("the Hopper kernels were asked for, but {reason}");
                return Err(Error::Device { call: "plan".into(), reason });
            }
        };
        if hopper && workload.kernels.tuning.cluster == Some(true) && device.exact_clusters == 0 {
            let reason = format!("clusters were asked for, but {device} holds none of the exact kernel");
            return Err(Error::Device { call: "plan".into(), reason });
        }
        let row_bytes = hidden * workload.dtype.size_in_bytes();
        let sweep_blocks =
            schedule::sweep_blocks(device.l2_bytes, workload.kernels.tuning.sweep as usize, row_bytes) as u32;
        let room = room(workload);
        let candidates = capture.then_some(room);
        let (rounds, cluster) = match hopper {
            true => hopper_rounds(workload, device, sweep_blocks, candidates),
            false => {
                // Two blocks a multiprocessor, by their launch bounds; f32 needs the registers of both.
                let most = if workload.dtype == DType::F32 { 1 } else { 2 };
                let resident = device.resident_blocks(kernels::FORWARD.shared as usize, most);
                let workers = Workers::Splits { resident: resident.into() };
                (rounds::plan(vocab, BLOCK_V, row_blocks, workers, candidates).0, 1)
            }
        };
        let partials = rounds.iter().map(|r| r.splits as usize).sum();
        let block_entries = if capture { block_entries(tokens, vocab, room) } else { 0 };
        let element = workload.dtype.size_in_bytes();
        let exact = exact::Sizes::new(workload, device, hopper, dense);
        let tiles = if dense { Tiles::Off } else { tiles(workload, device) };
        let workspace = Workspace::new(&Sizes {
            shape: workload.shape,
            element,
            row_blocks,
            block_entries,
            rounds: rounds.len(),
            partials,
            exact,
            capture,
            seed: capture || smoothing,
            dense,
            spread: smoothing && !dense,
            d_embeddings: gradients[0],
            columns,
            tiles: capture && tiles != Tiles::Off,
        })?;
        let too_large = |what| move |_| limit(what, row_blocks.saturating_mul(block_entries), u32::MAX as usize);
        // Lists by class index all entries of all blocks in 32 bits.
        u32::try_from(row_blocks.saturating_mul(block_entries)).map_err(too_large("entries of all row blocks"))?;
        let mut plan = LaunchPlan {
            workload: *workload,
            device: device.clone(),
            capture,
            dense,
            row_blocks: row_blocks as u32,
            block_entries: block_entries as u32,
            exact_panel_rows: exact.panel as u32,
            exact_gradients_elements: exact.gradients_elements,
            exact_slices: exact.slices as u32,
            tiles,
            hopper,
            sweep_blocks,
            cluster,
            rounds,
            forward: Vec::new(),
            backward: Vec::new(),
            workspace,
        };
        plan.plan_forward(smoothing);
        if gradients.contains(&true) {
            plan.plan_backward([gradients[0], gradients[1]], columns, smoothing && !dense, hidden);
        }
        Ok(plan)
    }

    /// Who takes which tiles of a round, in Hopper's forward.
    pub fn schedule(&self, round: &Round) -> Schedule {
        let Round { first_tile, num_tiles, splits, .. } = *round;
        let all = Schedule::new(self.device.sm_count, self.cluster, self.row_blocks, self.sweep_blocks);
        let workers = all.workers.min(all.units.saturating_mul(splits));
        Schedule { workers, first_tile, num_tiles, most_shares: splits, ..all }
    }

    /// Share of the time of Hopper's forward that its multiprocessors have a tile to work on, were they all equally fast: the
    /// rest is what does not divide, and the second row block of a cluster where there is none.
    pub fn utilisation(&self) -> f64 {
        let busiest: u64 = self.rounds.iter().map(|round| self.schedule(round).busiest()).sum();
        let tiles: u64 = self.rounds.iter().map(|round| u64::from(round.num_tiles)).sum();
        (u64::from(self.row_blocks) * tiles) as f64 / (u64::from(self.device.sm_count) * busiest) as f64
    }

    fn plan_forward(&mut self, smoothing: bool) {
        let tokens = self.workload.shape.tokens;
        let rows = |per_block: usize| [tokens.div_ceil(per_block) as u32, 1];
        let mut steps = Steps { workload: self.workload, steps: Vec::new() };
        if self.capture {
            steps.fill("pools", 0);
            steps.fill("redo_count", 0);
        }
        steps.launch(kernels::ROWS, [1, 1]);
        if self.capture || smoothing {
            steps.launch(kernels::TARGET_LOGIT, rows(8));
        }
        let most_rows = tokens.min(BLOCK_N) as u64;
        let all_fit =
            |round: &Round| most_rows * (u64::from(round.num_tiles * round.tile) + 1) <= self.block_entries.into();
        let raises = self.capture && matches!(self.workload.options.filter, GradientFilter::Unbiased { .. });
        for (index, round) in self.rounds.iter().enumerate() {
            if self.capture && index > 0 {
                steps.launch_round(kernels::BOUND, [self.row_blocks, 1], *round, false);
            }
            if self.hopper {
                let clusters = self.cluster > 1;
                let kernel = if clusters { kernels::FORWARD_HOPPER_CLUSTER } else { kernels::FORWARD_HOPPER };
                steps.launch_round(kernel, [self.cluster * self.schedule(round).workers, 1], *round, false);
            } else {
                steps.launch_round(kernels::FORWARD, [self.row_blocks, round.splits], *round, false);
            }
            // Each class that there is fits.
            let fits = index == 0 && all_fit(round);
            if raises && !fits {
                steps.launch_round(kernels::BOUND, [self.row_blocks, 1], *round, true);
                let (kernel, grid) = match self.hopper {
                    true => (kernels::FORWARD_HOPPER, [self.device.sm_count, 1]),
                    false => (kernels::FORWARD, [self.row_blocks, round.num_tiles.min(REDO_SPLITS * round.splits)]),
                };
                steps.launch_round(kernel, grid, *round, true);
            }
        }
        steps.launch(kernels::COMBINE, rows(32));
        steps.launch(kernels::REDUCE_LOSS, [1, 1]);
        if self.capture {
            steps.launch(kernels::FILTER, [self.row_blocks, 1]);
            // One wave of blocks, each over many rows.
            let resident = self.device.resident_blocks(kernels::ORDER_ENTRIES.shared as usize, 16);
            steps.launch(kernels::ORDER_ENTRIES, [rows(4)[0].min(resident), 1]);
        } else if self.dense {
            steps.fill("entry_count", 0xFF);
        }
        if self.capture || self.dense {
            steps.launch(kernels::EXACT_ROWS, [1, 1]);
        }
        self.forward = steps.steps;
    }

    fn plan_backward(&mut self, [d_embeddings, d_classifier]: [bool; 2], columns: bool, spread: bool, hidden: usize) {
        let Shape { tokens, vocab, .. } = self.workload.shape;
        let rows = |per_block: usize| [tokens.div_ceil(per_block) as u32, 1];
        let classes = |per_block: usize| [vocab.div_ceil(per_block) as u32, 1];
        let parts = [SUM_PARTS as u32, hidden.div_ceil(256) as u32];
        let mut steps = Steps { workload: self.workload, steps: Vec::new() };
        steps.fill("exact_scale", 0);
        steps.fill("barrier", 0);
        steps.launch(kernels::COEFFICIENTS, rows(256));
        if spread {
            if d_embeddings {
                steps.launch(kernels::CLASS_SUM, parts);
            }
            if columns {
                steps.launch(kernels::SPREAD_SUM, parts);
            }
            steps.launch(kernels::SUM_PARTS, [hidden.div_ceil(256).max(1) as u32, 1]);
        }
        let tiles = self.capture && self.tiles != Tiles::Off;
        let resident = self.device.resident_blocks(kernels::D_EMBEDDINGS_TILES.shared as usize, 2);
        if d_embeddings {
            if tiles {
                steps.fill("tile_work", 0);
                steps.launch(kernels::ROW_TILES, [self.row_blocks, 1]);
                steps.launch(kernels::D_EMBEDDINGS_TILES, [resident, 1]);
            }
            // What no tiles have: ignored and poisoned tokens, and rows of blocks that gather.
            steps.launch(kernels::D_EMBEDDINGS, [tokens as u32, hidden.div_ceil(1024) as u32]);
        }
        if columns {
            if self.capture {
                steps.fill("column_begin", 0);
                steps.launch(kernels::COLUMN_COUNT, rows(8));
                steps.launch(kernels::COLUMN_SCAN_A, classes(4096));
                steps.launch(kernels::COLUMN_SCAN_B, [1, 1]);
                steps.launch(kernels::COLUMN_SCAN_C, classes(4096));
                steps.launch(kernels::COLUMN_SCATTER, rows(8));
            }
            if tiles && d_classifier {
                steps.fill("tile_work", 0);
                steps.launch(kernels::CLASS_TILES, classes(BLOCK_V));
                steps.launch(kernels::CROWDED_TILES, [self.row_blocks, 1]);
                steps.launch(kernels::D_CLASSIFIER_TILES, [resident, 1]);
            }
            // Some blocks for the popular classes besides those that own 16 classes each.
            let [owners, _] = classes(16);
            steps.launch(kernels::D_CLASSIFIER, [if owners > 0 { owners + 3 * self.device.sm_count } else { 0 }, 1]);
        }
        // Also where lists are kept: rows may overflow, and rows whose log-sum-exp is not finite are always exact.
        if self.exact_in_clusters() {
            steps.launch(kernels::EXACT_HOPPER_CLUSTER, [CLUSTER * self.device.exact_clusters, 1]);
        } else if self.hopper {
            steps.launch(kernels::EXACT_HOPPER, [self.device.sm_count, 1]);
        } else {
            steps.launch(kernels::EXACT, [self.device.exact_grid(self.workload.dtype), 1]);
        }
        self.backward = steps.steps;
    }
}

/// Collects steps; empty grids are left out.
struct Steps {
    workload: Workload,
    steps: Vec<Step>,
}

impl Steps {
    fn fill(&mut self, region: &'static str, byte: u8) {
        self.steps.push(Step::Fill { region, byte });
    }
    fn launch(&mut self, kernel: Kernel, grid: [u32; 2]) {
        self.launch_round(kernel, grid, Round::default(), false);
    }
    fn launch_round(&mut self, kernel: Kernel, grid: [u32; 2], round: Round, redo: bool) {
        if !grid.contains(&0) {
            let entry_point = kernel.entry_point(self.workload.dtype, self.workload.aligned);
            self.steps.push(Step::Launch(Launch { entry_point, kernel, grid, round, redo }));
        }
    }
}

/// Rounds of Hopper's forward, and the blocks of a cluster: what is asked for, else what takes less time.
fn hopper_rounds(
    workload: &Workload,
    device: &DeviceInfo,
    sweep_blocks: u32,
    room: Option<usize>,
) -> (Vec<Round>, u32) {
    let Shape { tokens, vocab, .. } = workload.shape;
    let row_blocks = tokens.div_ceil(BLOCK_N);
    let rounds = |cluster| {
        let schedule = Schedule::new(device.sm_count, cluster, row_blocks as u32, sweep_blocks);
        rounds::plan(vocab, HOPPER_TILE, row_blocks, Workers::Persistent(schedule), room)
    };
    let (alone, time_alone) = rounds(1);
    let asked = workload.kernels.tuning.cluster;
    if device.sm_count < CLUSTER || asked == Some(false) {
        return (alone, 1);
    }
    let (paired, time_paired) = rounds(CLUSTER);
    let faster = row_blocks >= CLUSTER as usize && CLUSTER_TIME * time_paired < time_alone;
    if asked == Some(true) || faster { (paired, CLUSTER) } else { (alone, 1) }
}

fn limit(what: &str, found: usize, most: usize) -> Error {
    Error::Device { call: "plan".into(), reason: format!("{what}: {found}, at most {most}") }
}

fn check(workload: &Workload, device: &DeviceInfo) -> Result<()> {
    let unfit = |reason: String| Err(Error::Device { call: "plan".into(), reason });
    if device.compute_capability < (8, 0) {
        return unfit(format!("{device} is older than sm_80, which the kernels need"));
    }
    if device.exact_grid(workload.dtype) == 0 {
        return unfit(format!("{device} cannot launch cooperative kernels"));
    }
    if let Some(kernel) = KERNELS.iter().find(|k| !k.is_hopper() && k.shared as usize > device.shared_per_block) {
        return unfit(format!("{} needs {} bytes of shared memory on {device}", kernel.stem, kernel.shared));
    }
    let Shape { tokens, hidden, vocab } = workload.shape;
    // A grid has at most 2^31 - 1 blocks along x and 65535 along y.
    let limits = [
        ("vocab", vocab, MAX_VOCAB),
        ("tokens", tokens, i32::MAX as usize),
        ("hidden", hidden, u16::MAX as usize * 256),
    ];
    match limits.into_iter().find(|(_, found, most)| found > most) {
        Some((what, found, most)) => Err(limit(what, found, most)),
        None => Ok(()),
    }
}

/// Candidates that a row of a full block has room for.
fn room(workload: &Workload) -> usize {
    let Shape { tokens, vocab, .. } = workload.shape;
    // 2 / ε: twice what a row keeps in expectation on the flattest softmax. A tiny ε saturates.
    let most = ((2.0 / workload.options.filter.eps()) as usize).max(LEAST_ROOM);
    let fitting = (CANDIDATE_BYTES / (8 * padded_rows(tokens).max(1))).clamp(LEAST_ROOM, most);
    workload.room.unwrap_or(fitting).clamp(1, vocab.max(1))
}

/// See [`LaunchPlan::tiles`]. Tensor cores take 16-bit inputs whose rows are whole vectors of 16 bytes. With less work than half of the
/// multiprocessors take, gathers by row are faster, which are for all of them.
fn tiles(workload: &Workload, device: &DeviceInfo) -> Tiles {
    let Shape { tokens, hidden, vocab } = workload.shape;
    let blocks = tokens.div_ceil(BLOCK_N) * hidden.div_ceil(BLOCK_N);
    let fits = workload.dtype != DType::F32 && workload.aligned && hidden > 0 && hidden.is_multiple_of(8);
    match workload.kernels.tuning.tiles {
        _ if !fits || tokens == 0 || vocab == 0 => Tiles::Off,
        Tiles::WhereFaster if 2 * blocks < device.sm_count as usize => Tiles::Off,
        tiles => tiles,
    }
}

/// See [`LaunchPlan::block_entries`].
fn block_entries(tokens: usize, vocab: usize, room: usize) -> usize {
    // A block of few rows has the room of a full one, as far as there are classes to fill it.
    (BLOCK_N * (room + 1)).min(tokens.min(BLOCK_N) * (vocab + 1))
}

impl std::fmt::Display for LaunchPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Workload { shape, dtype, aligned, .. } = self.workload;
        writeln!(f, "{shape} {dtype}{} on {}", if aligned { "" } else { ", unaligned rows" }, self.device)?;
        for (index, round) in self.rounds.iter().enumerate() {
            writeln!(
                f,
                "  round {index}: {} tiles of {} classes from {}, {} row blocks x {}{} splits",
                round.num_tiles,
                round.tile,
                round.first_tile,
                self.row_blocks,
                if self.hopper { "up to " } else { "" },
                round.splits
            )?;
        }
        if self.hopper {
            let lead = self.workload.kernels.tuning.lead;
            let clusters = if self.cluster > 1 { "clusters of 2" } else { "no clusters" };
            let busy = 100.0 * self.utilisation();
            writeln!(f, "  hopper: {clusters}, lead {lead}, {busy:.1} % of the multiprocessors' time has a tile")?;
        }
        match (self.capture, self.dense) {
            (true, _) => writeln!(f, "  candidates: room for {} in each row block", self.block_entries)?,
            (_, true) => writeln!(f, "  every row takes the exact path")?,
            _ => writeln!(f, "  no candidates; a backward runs the forward once more")?,
        }
        if self.capture && self.tiles != Tiles::Off {
            writeln!(f, "  sparse gradients: products of tiles, and gathers of what they leave")?;
        }
        for (title, steps) in [("forward", &self.forward), ("backward", &self.backward)] {
            for step in steps {
                match step {
                    Step::Fill { region, byte } => writeln!(f, "  {title:<8}  fill {region} with {byte:#04x}")?,
                    Step::Launch(Launch { entry_point, kernel, grid: [x, y], redo, .. }) => writeln!(
                        f,
                        "  {title:<8}  {entry_point:<34} grid {x:>6} x {y:<3} block {:>4}  shared {:>6} B{}",
                        kernel.threads,
                        kernel.shared,
                        if *redo { ", where candidates outgrew their room" } else { "" }
                    )?,
                }
            }
        }
        write!(f, "{}", self.workspace)
    }
}
