//! The CUDA backend on the GPU of this machine, against the oracle. `REQUIRE_CUDA=1` makes its absence a failure.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

conformance!(cuda, cut_cross_entropy::CudaStaged::new(0).map_err(|error| error.to_string()));
