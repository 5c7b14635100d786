//! What the CUDA backend says on a machine without CUDA. `cargo test` builds with unwinding; the paths hold no panic.
#![cfg(feature = "cuda")]

use cut_cross_entropy::{Cuda, CudaStaged, Error, cuda};

#[test]
fn a_missing_part_is_an_error_that_names_it() {
    let count = cuda::device_count();
    match &count {
        Ok(count) => {
            // There is CUDA here: then what is missing is one more device.
            let Err(Error::Device { call, reason }) = Cuda::new(*count) else { panic!("device {count} exists") };
            assert_eq!(call, "probe");
            assert!(reason.contains("there is no device"), "{reason}");
        }
        Err(Error::Device { call, reason }) => {
            assert_eq!(call, "probe");
            let parts = ["driver library", "has no function", "cuInit failed", "driver supports", "finds no device"];
            assert!(parts.iter().any(|part| reason.contains(part)), "{reason}");
            assert_eq!(Cuda::new(0).err(), count.clone().err());
            assert_eq!(CudaStaged::new(0).err(), count.err());
        }
        Err(other) => panic!("{other}"),
    }
}
