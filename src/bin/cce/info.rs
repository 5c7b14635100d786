//! `cce info`: what this build and this machine have, and the plan for a shape.

use crate::args::{DTypeArg, FilterArg, ShapeArgs, parse_eps};
use crate::common::shapes::NAMED_SHAPES;
use crate::system_memory;
use anyhow::Context;
use clap::Args;
use cut_cross_entropy::cpu::{CpuPlan, multiplies_bf16};
use cut_cross_entropy::plan::{DeviceInfo, Entries, KernelChoice, LaunchPlan, TileEntries, Tiles, Workload};
use cut_cross_entropy::{Backend, CceOptions, Cpu, DType, Shape};

/// Version, backends, devices, named shapes, and the plan for one shape.
#[derive(Args)]
pub struct InfoArgs {
    #[command(flatten)]
    shape: ShapeArgs,
    /// Element type of embeddings and classifier.
    #[arg(long, value_enum, default_value_t = DTypeArg::Bf16)]
    dtype: DTypeArg,
    /// Which entries of the softmax take part in the gradients.
    #[arg(long, value_enum, default_value_t = FilterArg::Unbiased)]
    filter: FilterArg,
    /// Threshold on probabilities of the unbiased and threshold filters; `2^-10` is understood.
    #[arg(long, value_parser = parse_eps, default_value = "2^-10")]
    eps: f32,
    /// Also print the CUDA backend's plan for this GPU, which need not be there: a100, a10, rtx3090, l4, rtx4090, h100, h200
    /// or rtx5090.
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Which CUDA kernels to plan with: auto, portable, hopper, or `hopper:cluster=off,lead=3` to measure what the planner
    /// would not choose.
    #[arg(long, default_value_t = KernelChoice::default())]
    kernels: KernelChoice,
    /// Candidates that a row has room for in the CUDA plan. Rows that keep more take a larger ε, or are exact under a threshold.
    #[arg(long, value_name = "ENTRIES")]
    room: Option<usize>,
}

/// Runs the subcommand.
pub fn run(args: &InfoArgs) -> anyhow::Result<()> {
    say!("cut-cross-entropy {}", env!("CARGO_PKG_VERSION"))?;
    let bf16 = if multiplies_bf16() { "multiplied as it is" } else { "widened to f32" };
    say!("backend {}: {}, {} threads; bf16 is {bf16}", Cpu.name(), processor(), rayon::current_num_threads())?;
    let present = cuda_device();
    match &present {
        Ok(device) => say!("backend cuda: {device}")?,
        Err(reason) => say!("backend cuda: {reason}")?,
    }
    if let Some(bytes) = system_memory::available_bytes() {
        say!("memory: {:.1} GiB free", bytes as f64 / (1 << 30) as f64)?;
    }
    let custom = args.shape.is_custom();
    if args.shape.shape.is_none() && !custom {
        say!("\nshapes for --shape:")?;
        for named in NAMED_SHAPES {
            say!("  {:<14} {}", named.name, named.shape)?;
        }
    }
    let shape = args.shape.sizes()?;
    let dtype = DType::from(args.dtype);
    let options = CceOptions { filter: args.filter.filter(args.eps, 0), ..CceOptions::default() };
    let label = if custom { "given shape" } else { args.shape.name() };
    say!("\nplan for {label}: {}", CpuPlan::new(shape, dtype, &options, rayon::current_num_threads()))?;
    let device = match &args.device {
        Some(name) => {
            let names = DeviceInfo::KNOWN.map(|d| d.name.to_string()).join(", ");
            Some(DeviceInfo::known(name).with_context(|| format!("no device is named `{name}`; known: {names}"))?)
        }
        None => present.ok(),
    };
    if let Some(device) = device {
        let workload = Workload::of_shape(shape, dtype, options).with_kernels(args.kernels).with_room(args.room);
        let plan = LaunchPlan::new(&workload, &device)?;
        say!("\nplan for {label}: {plan}")?;
        let ([of_16_bits, of_f32], clusters) = (device.exact_blocks_per_sm, device.exact_clusters);
        say!("  exact kernels at once: {of_16_bits} blocks a multiprocessor (f32: {of_f32}), or {clusters} clusters")?;
        print_traffic(&plan)?;
    }
    let gib = |bytes: f64| bytes / (1_u64 << 30) as f64;
    let Shape { tokens, hidden, vocab } = shape;
    say!(
        "  for comparison: the f32 logits alone {:.2} GiB, inputs and gradients {:.2} GiB",
        gib(4.0 * tokens as f64 * vocab as f64),
        gib(2.0 * (tokens as f64 + vocab as f64) * hidden as f64 * dtype.size_in_bytes() as f64),
    )?;
    Ok(())
}

/// What the kernels read and multiply where each row keeps so many entries: as many as a trained model's.
fn print_traffic(plan: &LaunchPlan) -> std::io::Result<()> {
    const KEPT: u64 = 200;
    let Shape { tokens, vocab, .. } = plan.workload.shape;
    let (rows, kept_a_row) = (tokens as u64, KEPT.min(vocab as u64));
    let kept = rows * kept_a_row;
    let exact_rows = if plan.dense { rows } else { 0 };
    let [row_tiles, class_tiles] = match plan.tiles {
        Tiles::Off => [TileEntries::default(); 2],
        _ => zipf(kept_a_row as f64, tokens, vocab),
    };
    say!("  read from L2 and multiplied, with {KEPT} entries kept a row, of classes as popular as Zipf's law has it:")?;
    let entries = Entries { rows, candidates: kept, kept, exact_rows, row_tiles, class_tiles };
    for (entry_point, traffic) in plan.traffic(&entries) {
        let (products, of) = if traffic.wgmma > 0 { (traffic.wgmma, "wgmma") } else { (traffic.mma, "mma") };
        say!("    {entry_point:<34} {:9.3} GB  {products:>14} {of}", traffic.read as f64 / 1e9)?;
    }
    Ok(())
}

/// What blocks of rows and of classes multiply where a row keeps the class of popularity rank v by the chance min(1, c / v), whatever other
/// rows keep, and `kept` of `vocab` classes in all: c (1 + ln(vocab / c)) = kept.
fn zipf(kept: f64, tokens: usize, vocab: usize) -> [TileEntries; 2] {
    let (mut low, mut high) = (0.0, vocab as f64);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if middle * (1.0 + (vocab as f64 / middle).ln()) < kept { low = middle } else { high = middle }
    }
    let chance = |rank: usize| (high / (rank + 1) as f64).min(1.0);
    let (rows, blocks) = (tokens.min(128) as f64, tokens.div_ceil(128) as f64);
    let [mut row_tiles, mut class_tiles] = [TileEntries::default(); 2];
    // Of 128 rows: classes that two of them keep, or more. Counts are nearly those of Poisson's law.
    let of_block = |rank| if rows < 2.0 { 0.0 } else { rows * chance(rank) };
    let sources: f64 = (0..vocab).map(|v| 1.0 - (-of_block(v)).exp() * (1.0 + of_block(v))).sum();
    let entries: f64 = (0..vocab).map(|v| of_block(v) * (1.0 - (-of_block(v)).exp())).sum();
    row_tiles.tiles = (blocks * (sources / 128.0).ceil()) as u64;
    row_tiles.sources = (blocks * sources) as u64;
    row_tiles.of_blocks = (tokens as f64 * kept) as u64;
    row_tiles.entries = ((blocks * entries) as u64).min(row_tiles.of_blocks);
    // Of 128 classes: tokens that keep one of them, where these have 1.5 of them each, or more.
    for first in (0..vocab).step_by(128) {
        let of_row: f64 = (first..vocab.min(first + 128)).map(chance).sum();
        let sources = tokens as f64 * (1.0 - (-of_row).exp());
        if sources >= 32.0 && 1.5 * sources <= tokens as f64 * of_row {
            class_tiles.tiles += (sources / 128.0).ceil() as u64;
            class_tiles.sources += sources as u64;
            class_tiles.entries += (tokens as f64 * of_row) as u64;
        }
    }
    class_tiles.entries = class_tiles.entries.min(row_tiles.of_blocks);
    class_tiles.of_blocks = class_tiles.entries;
    [row_tiles, class_tiles]
}

/// The GPU, or why there is none.
#[cfg(feature = "cuda")]
fn cuda_device() -> Result<DeviceInfo, String> {
    cut_cross_entropy::Cuda::new(0).map(|cuda| cuda.device().clone()).map_err(|error| error.to_string())
}
#[cfg(not(feature = "cuda"))]
fn cuda_device() -> Result<DeviceInfo, String> {
    Err("not in this build".into())
}

/// The processor's name, where the system tells.
fn processor() -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    });
    name.unwrap_or_else(|| std::env::consts::ARCH.into())
}
