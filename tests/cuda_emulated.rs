//! The CUDA backend, unchanged, on the emulated GPU, against the oracle: the whole suite, without the emulator's checker,
//! which takes three times as long. `cuda_checked.rs` runs part of it with the checker on.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

use cut_cross_entropy::CudaStaged;
use cut_cross_entropy_emulator::{self as emulator, Config};

fn emulated() -> Result<CudaStaged, String> {
    emulator::install()?;
    emulator::configure(&Config { check: false, ..Config::default() });
    CudaStaged::new(0).map_err(|error| error.to_string())
}

conformance!(emulated_cuda, emulated());
