//! Trains a small language model with this crate's loss as its head, and measures it against materialised logits.
//!
//! ```text
//! cargo run --release --features candle --example train_lm
//! cargo run --release --features candle --example train_lm -- --filter exact --baseline --steps 100
//! cargo run --release --features candle --example train_lm -- --help
//! ```

mod corpus;
mod data;
mod head;
#[path = "../../benches/common/heap.rs"]
mod heap;
mod model;
mod optimizer;
mod report;
mod sweep;
mod train;

use anyhow::{Result, ensure};
use clap::Parser;
use data::Batch;
use head::{Filter, Head};
use model::ModelConfig;
use report::{Curve, Row, Summary};
use std::path::PathBuf;
use train::{Budget, Schedule, Trainer, evaluation_head};

#[global_allocator]
static ALLOCATOR: heap::CountingAllocator = heap::CountingAllocator;

/// Trains a small transformer on text, with cut-cross-entropy as its head, and compares the head with materialised
/// logits: loss, time, peak memory.
#[derive(Parser)]
#[command(name = "train_lm")]
struct Args {
    /// Text file or folder of text files [default: Rust sources that cargo keeps of this crate's dependencies]
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
    /// Use at most this much text
    #[arg(long, default_value_t = 8.0, value_name = "MB")]
    max_mb: f64,
    /// Train for this many seconds [default: 120]
    #[arg(long, conflicts_with = "steps", value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Train for this many steps: reproducible, whatever the machine's speed
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Seed of the initial model, the batches and the unbiased filter
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Which entries of the softmax take part in the gradients
    #[arg(long, value_enum, default_value = "unbiased")]
    filter: Filter,
    /// Probability below which entries are rounded or dropped; `2^-10` and `0.001` are both understood
    #[arg(long, default_value = "2^-10", value_parser = parse_eps)]
    eps: f32,
    /// Train the same model with materialised logits too, step by step on the same batches
    #[arg(long)]
    baseline: bool,

    /// Size of the vocabulary
    #[arg(long, default_value_t = 16384, value_parser = clap::value_parser!(u32).range(512..=65536))]
    vocab: u32,
    /// Width of the model
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Number of transformer blocks
    #[arg(long, default_value_t = 3)]
    layers: usize,
    /// Attention heads a block
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 128)]
    seq_len: usize,
    /// Sequences a batch [default: 8, in a sweep 4]
    #[arg(long)]
    batch: Option<usize>,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,

    /// Where the loss curve goes [default: train_lm/loss.svg in cargo's target folder]
    #[arg(long, value_name = "SVG")]
    plot: Option<PathBuf>,
    /// Append a row a run to this file
    #[arg(long, value_name = "CSV")]
    record: Option<PathBuf>,
    /// Write hidden states of held-out text, classifier and targets of the trained model
    #[arg(long, value_name = "SAFETENSORS")]
    save_activations: Option<PathBuf>,
    /// Number of tokens to write
    #[arg(long, default_value_t = 2048, value_name = "N")]
    save_tokens: usize,

    /// Train with every filter instead, 200 steps each unless --steps says otherwise, and draw the record
    #[arg(long, conflicts_with_all = ["seconds", "baseline", "save_activations"])]
    sweep: bool,
    /// Seeds of each filter in a sweep
    #[arg(long, default_value_t = 3, value_name = "N")]
    seeds: u64,
    /// Only draw this record of a sweep, again
    #[arg(long, value_name = "CSV", exclusive = true)]
    draw_sweep: Option<PathBuf>,
}

fn parse_eps(text: &str) -> Result<f32, String> {
    let eps = match text.strip_prefix("2^") {
        Some(exponent) => exponent.parse().map(f32::exp2),
        None => text.parse(),
    };
    let eps = eps.map_err(|error| error.to_string())?;
    if eps > 0.0 && eps <= 1.0 { Ok(eps) } else { Err("must lie in (0, 1]".into()) }
}

/// Held-out batches that the reported loss is a mean of.
const HELD_OUT_BATCHES: usize = 24;
/// Held-out batches that a head is timed on.
const TIMED_BATCHES: usize = 7;

fn main() -> Result<()> {
    let args = Args::parse();
    let cache = data::cache_folder()?;
    if let Some(record) = &args.draw_sweep {
        return sweep::draw(record, &record.with_extension("svg"));
    }
    ensure!(args.heads > 0 && args.hidden % (2 * args.heads) == 0, "--hidden must be a multiple of twice --heads");
    let batch = args.batch.unwrap_or(if args.sweep { 4 } else { 8 });
    ensure!(batch > 0 && args.seq_len > 0, "--batch and --seq-len must be positive");

    let tokens = data::load(args.text.as_deref(), (args.max_mb * 1e6) as usize, args.vocab as usize)?;
    let config = ModelConfig {
        vocab: tokens.vocab,
        hidden: args.hidden,
        layers: args.layers,
        heads: args.heads,
        seq_len: args.seq_len,
    };
    let batch_tokens = batch * args.seq_len;
    let held_out = Batch::spread(&tokens.held_out, batch, args.seq_len, HELD_OUT_BATCHES * batch_tokens)?;
    let budget = match (args.steps, args.sweep) {
        (Some(steps), _) => Budget::Steps(steps),
        (None, true) => Budget::Steps(200),
        (None, false) => Budget::Seconds(args.seconds.unwrap_or(120.0)),
    };
    let schedule = Schedule { budget, batch, seq_len: args.seq_len, learning_rate: args.lr, seed: args.seed };
    if args.sweep {
        let record = args.record.unwrap_or_else(|| cache.join("sweep.csv"));
        sweep::run(config, &schedule, &tokens, &held_out, args.seeds, &record)?;
        return sweep::draw(&record, &args.plot.unwrap_or_else(|| record.with_extension("svg")));
    }

    let ours = Head::Fused { filter: args.filter, eps: args.eps, seed: args.seed };
    let heads = if args.baseline { vec![ours, Head::Materialised] } else { vec![ours] };
    let mut trainers = heads.iter().map(|&head| Trainer::new(config, head, args.seed)).collect::<Result<Vec<_>>>()?;
    println!(
        "model: {:.1} M parameters, {batch_tokens} tokens a step; head: {ours}",
        trainers[0].model.num_parameters() as f64 / 1e6
    );
    train::train(&mut trainers, &tokens.train, &schedule)?;
    compare_losses(&trainers);

    let timed = &held_out[..held_out.len().min(TIMED_BATCHES)];
    let mut summaries = Vec::new();
    for trainer in &trainers {
        let held_out_loss = trainer.held_out_loss(&evaluation_head(), &held_out)?;
        let cost = head::measure(&trainer.head, &trainer.model, timed)?;
        if let Some(record) = &args.record {
            Row::new(trainer, &schedule, held_out_loss, cost).append(record)?;
        }
        let trained = Some((trainer.losses.len(), trainer.train_loss(), held_out_loss));
        summaries.push(Summary { head: trainer.head, trained, step_ms: trainer.median_step_ms(), cost });
    }
    if !args.baseline {
        let cost = head::measure(&Head::Materialised, &trainers[0].model, timed)?;
        let step_ms = train::time_steps(config, Head::Materialised, &tokens.train, &schedule)?;
        summaries.push(Summary { head: Head::Materialised, trained: None, step_ms, cost });
    }
    report::print_table(&summaries);

    let plot = args.plot.unwrap_or_else(|| cache.join("loss.svg"));
    let curves: Vec<Curve> = trainers.iter().map(|trainer| Curve::smoothed(trainer, 10)).collect();
    report::plot(&plot, &curves)?;
    println!("loss curve: {}", plot.display());
    if let Some(path) = &args.save_activations {
        report::save_activations(path, &trainers[0], &tokens.held_out, args.seq_len, args.save_tokens)?;
    }
    Ok(())
}

/// How far the two curves are apart, where both were trained.
fn compare_losses(trainers: &[Trainer]) {
    let [ours, theirs] = trainers else { return };
    let difference = |(a, b): (&f32, &f32)| (a - b).abs();
    let differences: Vec<f32> = ours.losses.iter().zip(&theirs.losses).map(difference).collect();
    let largest = differences.iter().copied().fold(0.0, f32::max);
    let first = differences.first().copied().unwrap_or(0.0);
    println!("loss difference to materialised logits: {first:.1e} at the first step, {largest:.1e} at most");
}
