//! The portable kernels, by the unchanged host code, on the emulated GPU, against the oracle: the whole suite, without the checker,
//! which takes three times as long. `cuda_checked.rs` runs part of it with the checker on.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

use cut_cross_entropy::CudaStaged;
use cut_cross_entropy::plan::KernelFamily;
use cut_cross_entropy_emulator::{self as emulator, Config};

fn emulated() -> Result<CudaStaged, String> {
    emulator::install()?;
    emulator::configure(&Config { check: false, ..Config::default() });
    let backend = CudaStaged::new(0).map_err(|error| error.to_string())?;
    Ok(backend.with_kernels(KernelFamily::Portable))
}

conformance!(emulated_cuda, emulated());
