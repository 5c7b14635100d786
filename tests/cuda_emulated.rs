//! The CUDA backend, unchanged, on the emulated GPU, against the oracle. The emulator's checker is on: a race, a read of
//! memory that nobody wrote, or an access out of bounds fails the launch, and with it the case.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

use cut_cross_entropy::CudaStaged;
use cut_cross_entropy_emulator as emulator;

fn emulated() -> Result<CudaStaged, String> {
    emulator::install()?;
    CudaStaged::new(0).map_err(|error| error.to_string())
}

conformance!(emulated_cuda, emulated());
