//! The portable kernels, by the unchanged host code, on the emulated GPU, against the oracle: the whole suite, without the checker,
//! which takes three times as long. `cuda_checked.rs` runs part of it with the checker on. All gradients are gathered here; products
//! of tiles are those of `cuda_tiles.rs`.
#![cfg(all(feature = "cuda", target_os = "linux"))]

#[macro_use]
mod common;

use cut_cross_entropy::CudaStaged;
use cut_cross_entropy::plan::{KernelChoice, KernelFamily, Tiles, Tuning};
use cut_cross_entropy_emulator::{self as emulator, Config};

fn emulated() -> Result<CudaStaged, String> {
    emulator::install().expect("the emulator is built with this test");
    // An A100's tensor cores cut sums off after every eight products: more of an error than those of later devices make.
    emulator::configure(&Config { device: "a100".into(), cut: true, check: false, workers: 2, ..Config::default() });
    let backend = CudaStaged::new(0).map_err(|error| error.to_string())?;
    let tuning = Tuning { tiles: Tiles::Off, ..Tuning::default() };
    Ok(backend.with_kernels(KernelChoice { family: KernelFamily::Portable, tuning }))
}

/// Edges of the CPU's blocks of 512 and 1024 rows: to kernels that work in blocks of 128 they are more of the same, and
/// they take half of the time of all.
const MORE_OF_THE_SAME: [&str; 7] = [
    "token_block_minus_1",
    "token_block_plus_1",
    "large_token_block",
    "large_token_block_plus_1",
    "uneven_blocks",
    "real_vocabulary",
    "long_batch",
];

conformance!(emulated_cuda, emulated(), |case| !MORE_OF_THE_SAME.contains(&case.name));
