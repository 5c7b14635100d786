//! What the checker says of kernels that are wrong in one line, and that it says nothing where they are right.
#![cfg(target_os = "linux")]

mod common;

use common::{OrderParams, device, schedules};
use cudarc::driver::{CudaFunction, DevicePtr, DriverError, LaunchConfig, PushKernelArg};
use cut_cross_entropy_emulator::{Config, take_reports};

const CONFIG: LaunchConfig = LaunchConfig { grid_dim: (8, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 256 };

/// The output, or the reports.
fn run(schedule: &Config, kernel: &str, mode: i32, cooperative: bool) -> Result<Vec<f32>, String> {
    let device = device(schedule);
    let stream = device.context.new_stream().unwrap();
    let data = stream.alloc_zeros::<f32>(8 * 64).unwrap();
    let out = stream.alloc_zeros::<f32>(8 * 64).unwrap();
    let flags = stream.alloc_zeros::<u32>(1).unwrap();
    let params = OrderParams {
        data: data.device_ptr(&stream).0,
        flags: flags.device_ptr(&stream).0,
        out: out.device_ptr(&stream).0,
        mode,
    };
    let function: CudaFunction = device.function(kernel, 256);
    let mut launch = stream.launch_builder(&function);
    launch.arg(&params);
    // SAFETY: the parameters are the kernel's.
    unsafe { if cooperative { launch.launch_cooperative(CONFIG) } else { launch.launch(CONFIG) } }.unwrap();
    let got: Result<Vec<f32>, DriverError> = stream.clone_dtoh(&out);
    let reports = take_reports();
    got.map_err(|_| reports.concat())
}

#[test]
fn a_race_in_shared_memory_is_reported() {
    for schedule in schedules() {
        assert_eq!(run(&schedule, "example_neighbour", 0, false).unwrap()[..2], [1.0, 2.0]);
        let report = run(&schedule, "example_neighbour", 1, false).unwrap_err();
        assert!(report.contains("[shared race]") || report.contains("[uninitialised shared]"), "{report}");
        assert!(report.contains("example_order.cu:"), "{report}");
    }
}

#[test]
fn the_last_block_needs_both_fences() {
    for schedule in schedules() {
        assert_eq!(run(&schedule, "example_last_block", 0, false).unwrap()[..64], [36.0; 64]);
        for mode in [1, 2] {
            let report = run(&schedule, "example_last_block", mode, false).unwrap_err();
            assert!(report.contains("[cross-block read]"), "{report}");
        }
    }
}

#[test]
fn a_grid_barrier_needs_a_release() {
    for schedule in schedules() {
        let got = run(&schedule, "example_grid_barrier", 0, true).unwrap();
        assert_eq!([got[0], got[7 * 64]], [1.0, 0.0]);
        let report = run(&schedule, "example_grid_barrier", 1, true).unwrap_err();
        assert!(report.contains("[cross-block read]"), "{report}");
    }
}

#[test]
fn a_grid_barrier_of_blocks_that_do_not_run_together_is_a_deadlock() {
    let report = run(&Config { spin_seconds: 1, ..Config::default() }, "example_grid_barrier", 0, false).unwrap_err();
    assert!(report.contains("[deadlock (polling)]"), "{report}");
}
