//! The CUDA backend on the GPU of this machine, against the oracle. `REQUIRE_CUDA=1` makes its absence a failure.
#![cfg(feature = "cuda")]

#[macro_use]
mod common;

use common::{beside, room, suite};
use cut_cross_entropy::DType;
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

/// By the kernels that the planner takes, in pairs of blocks on Hopper, and by the portable ones.
#[test]
fn exact_rows_beside_sparse_ones_match_the_oracle() {
    match cut_cross_entropy::CudaStaged::new(0) {
        Ok(backend) => {
            let mut choices = vec![KernelFamily::Auto.into(), KernelFamily::Portable.into()];
            if backend.device().compute_capability == (9, 0) {
                let tuning = Tuning { cluster: Some(true), ..Tuning::default() };
                choices.push(KernelChoice { family: KernelFamily::Hopper, tuning });
            }
            for kernels in choices {
                for (index, case) in beside::cases().iter().enumerate() {
                    let dtype = [DType::BF16, DType::F16][index % 2];
                    beside::check(&backend.clone().with_kernels(kernels), case, dtype);
                }
            }
        }
        Err(error) => common::conformance::skip("cuda", error.to_string()),
    }
}
