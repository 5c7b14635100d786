//! The CUDA backend, unchanged, on the emulated GPU, against the oracle: the whole suite, without the emulator's checker,
//! which takes three times as long. `cuda_checked.rs` runs part of it with the checker on.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

use cut_cross_entropy::CudaStaged;
use cut_cross_entropy_emulator::{self as emulator, Config};

fn emulated() -> Result<CudaStaged, String> {
    emulator::install().expect("the emulator is built with this test");
    emulator::configure(&Config { check: false, ..Config::default() });
    CudaStaged::new(0).map_err(|error| error.to_string())
}

/// Edges of the CPU's blocks of 512 and 1024 rows: to kernels that work in blocks of 128 they are more of the same, and
/// they take half of the time of all.
const MORE_OF_THE_SAME: [&str; 4] =
    ["token_block_minus_1", "large_token_block", "large_token_block_plus_1", "uneven_blocks"];

conformance!(emulated_cuda, emulated(), |case| !MORE_OF_THE_SAME.contains(&case.name));
