//! The CUDA backend on the GPU of this machine, against the oracle. `REQUIRE_CUDA=1` makes its absence a failure.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

use common::{room, suite};
use cut_cross_entropy::plan::{KernelChoice, KernelFamily, Tiles, Tuning};

conformance!(cuda, cut_cross_entropy::CudaStaged::new(0).map_err(|error| error.to_string()));

#[test]
fn matches_the_oracle_with_hardly_any_room() {
    match cut_cross_entropy::CudaStaged::new(0) {
        Ok(backend) => {
            let raised = [room::cases(), room::cases_in_16_bits()]
                .map(|cases| room::check(&backend, &cases, &[1.0 / 256.0, 1.0 / 1024.0]));
            assert!(raised.iter().all(|&raised| raised >= 20), "{raised:?} cases had a row with an ε of its own");
        }
        Err(error) => common::conformance::skip("cuda", error.to_string()),
    }
}

/// All that there is to share is a product of tiles; and nothing is, so that all is gathered.
#[test]
fn matches_the_oracle_whatever_is_a_product_of_tiles() {
    match cut_cross_entropy::CudaStaged::new(0) {
        Ok(backend) => {
            for tiles in [Tiles::Everywhere, Tiles::Off] {
                let tuning = Tuning { tiles, ..Tuning::default() };
                let kernels = KernelChoice { family: KernelFamily::Auto, tuning };
                suite::check_cases(&backend.clone().with_kernels(kernels), &room::cases_in_16_bits());
            }
        }
        Err(error) => common::conformance::skip("cuda", error.to_string()),
    }
}
