//! The `cce` command: linear cross-entropy on files, its proof and its speed.

/// `println!` without its panic where nobody reads any more.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($text)*)
    }};
}

mod args;
mod bench;
#[path = "../../../benches/common/mod.rs"]
mod common;
#[path = "../../../benches/common/heap.rs"]
mod heap;
mod info;
mod run;
mod system_memory;
mod tensors;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: heap::CountingAllocator = heap::CountingAllocator;

/// Linear cross-entropy for large vocabularies, without the logits.
///
/// Computes the loss of a language model's head, `cross_entropy(E · Cᵀ, targets)`, and its gradients on tensors in
/// safetensors files; proves its results against an f64 reference; measures them against a materialising baseline.
#[derive(Parser)]
#[command(name = "cce", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Info(info::InfoArgs),
    Run(run::RunArgs),
    Verify(verify::VerifyArgs),
    Bench(bench::BenchArgs),
    Generate(bench::GenerateArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Info(args) => info::run(&args).map(|()| true),
        Command::Run(args) => run::run(&args).map(|()| true),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Generate(args) => args.run().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if reader_is_gone(&error) => ExitCode::from(141), // 128 + SIGPIPE, as shells report it
        Err(error) => {
            // One line, whatever the causes look like.
            let chain: Vec<String> = error.chain().map(|cause| cause.to_string().replace('\n', " ")).collect();
            eprintln!("error: {}", chain.join(": "));
            ExitCode::from(2)
        }
    }
}

/// Whether standard output is a pipe whose reader has seen enough, as in `cce info | head -1`: nothing to complain of.
fn reader_is_gone(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
