//! Clusters, the register pool, bulk copies: kernels that are right, and what is said of each that is wrong in one line.
#![cfg(target_os = "linux")]

mod common;

use std::ffi::c_void;

use common::{Device, device, schedules};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, result, sys};
use cut_cross_entropy_emulator::{Config, counters, take_reports};

#[repr(C)]
#[derive(Clone, Copy)]
struct ClusterParams {
    x: u64,
    out: u64,
    mode: i32,
}
// SAFETY: plain data with the layout of example_cluster.cu.
unsafe impl DeviceRepr for ClusterParams {}

fn config(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 4096 }
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 200) as f32).collect()
}

/// The output, or the reports.
fn run(schedule: &Config, kernel: &str, mode: i32, config: LaunchConfig) -> Result<Vec<f32>, String> {
    let device = device(schedule);
    let stream = device.context.new_stream().unwrap();
    let x = stream.clone_htod(&numbers(1024)).unwrap();
    let out = stream.alloc_zeros::<f32>(1024).unwrap();
    let params = ClusterParams { x: x.device_ptr(&stream).0, out: out.device_ptr(&stream).0, mode };
    let function = device.function(kernel, 4096);
    // SAFETY: the parameters are the kernel's.
    unsafe { stream.launch_builder(&function).arg(&params).launch(config) }.unwrap();
    let got = stream.clone_dtoh(&out);
    let reports = take_reports();
    got.map_err(|_| reports.concat())
}

/// Every mode but 0 is wrong, and one of its kinds of report appears under every schedule.
fn wrong_in_one_line(kernel: &str, config: LaunchConfig, modes: &[&[&str]]) {
    for schedule in schedules() {
        for (kinds, mode) in modes.iter().zip(1..) {
            let report = run(&schedule, kernel, mode, config).expect_err(&format!("{kernel}, mode {mode}"));
            assert!(kinds.iter().any(|k| report.contains(k)), "{kernel}, mode {mode}: {report}");
        }
    }
}

const NOT_STARTED: &str = "[shared memory of a block not started]";
const EXITED: &str = "[shared memory of an exited block]";

#[test]
fn blocks_of_a_cluster_exchange_through_shared_memory() {
    let x = numbers(1024);
    for schedule in schedules() {
        let got = run(&schedule, "example_cluster_exchange", 0, config(4, 64)).unwrap();
        let want: Vec<f32> = (0..256).map(|i| x[i ^ 64]).collect();
        assert_eq!(got[..256], want);
    }
    wrong_in_one_line("example_cluster_exchange", config(4, 64), &[&[NOT_STARTED], &[EXITED], &["[shared race]"]]);
}

#[test]
fn an_arrival_at_another_block_hands_data_over() {
    let x = numbers(1024);
    for schedule in schedules() {
        let got = run(&schedule, "example_cluster_push", 0, config(4, 64)).unwrap();
        let want: Vec<f32> = (0..128).map(|i| x[i / 64 * 128 + 64 + 63 - i % 64]).collect();
        assert_eq!(got[..128], want);
    }
    let race: &[&str] = &["[shared race]"];
    wrong_in_one_line("example_cluster_push", config(4, 64), &[race, race, &[EXITED], &["[deadlock]"], race]);
    let report = run(&Config::default(), "example_cluster_push", 4, config(4, 64)).unwrap_err();
    assert!(report.contains("block (1,0,0): exited") && report.contains("64 of 64 arrivals"), "{report}");
}

#[test]
fn a_multicast_lands_in_every_block() {
    let x = numbers(512);
    for schedule in schedules() {
        let got = run(&schedule, "example_multicast", 0, config(4, 32)).unwrap();
        for (block, got) in got[..4].iter().enumerate() {
            let sum: f32 = x[block / 2 * 256..][..256].iter().sum();
            assert_eq!(*got, sum * (2 - block % 2) as f32);
        }
    }
    wrong_in_one_line(
        "example_multicast",
        config(4, 32),
        &[
            &["[shared race]", "[deadlock]"],
            &[EXITED, "[unwaited TMA load at exit]"],
            &["[missing fence.proxy.async]"],
            &[NOT_STARTED, "[mbarrier not initialised]"],
        ],
    );
}

#[test]
fn registers_come_from_what_the_block_was_launched_with() {
    for schedule in schedules() {
        assert!(run(&schedule, "example_registers", 0, config(2, 384)).is_ok());
    }
    let short: &[&str] = &["registers more"];
    wrong_in_one_line("example_registers", config(2, 384), &[short, &["[setmaxnreg over-subscription]"], short]);
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct BoxParams {
    x: sys::CUtensorMap,
    out: u64,
}

/// A launch with the cluster as an attribute.
fn launch_cluster(device: &Device, kernel: &str, blocks: u32, cluster: u32, params: *mut c_void) -> sys::CUresult {
    device.context.bind_to_thread().unwrap();
    let name = std::ffi::CString::new(kernel).unwrap();
    // SAFETY: the image is the emulated NVRTC's, the parameters are the kernel's, and all outlive the call.
    unsafe {
        let module = result::module::load_data(c"EMULATED NVRTC".as_ptr().cast()).unwrap();
        let function = result::module::get_function(module, name).unwrap();
        let mut attribute: sys::CUlaunchAttribute = std::mem::zeroed();
        attribute.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim.x = cluster;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 4096,
            hStream: std::ptr::null_mut(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        sys::cuLaunchKernelEx(&config, function, [params].as_mut_ptr(), std::ptr::null_mut())
    }
}

#[test]
fn boxes_are_multicast_in_clusters_of_every_size() {
    for schedule in schedules() {
        let device = device(&schedule);
        let stream = device.context.default_stream();
        let x = stream.clone_htod(&numbers(128 * 32)).unwrap();
        let out = stream.alloc_zeros::<f32>(8 * 512).unwrap();
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: every array has as many elements as the rank asks for.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                2,
                x.device_ptr(&stream).0 as *mut _,
                [32, 128].as_ptr(),
                [128].as_ptr(),
                [32, 2].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_NONE,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .unwrap();
        let mut params = BoxParams { x: map, out: out.device_ptr(&stream).0 };
        let params: *mut c_void = (&raw mut params).cast();
        for cluster in [1, 2, 4, 8] {
            launch_cluster(&device, "example_multicast_box", 8, cluster, params).result().unwrap();
            let got = stream.clone_dtoh(&out);
            let reports = take_reports();
            assert_eq!(reports, [""; 0]);
            let x = numbers(128 * 32);
            for (block, got) in got.unwrap().chunks(512).enumerate() {
                assert_eq!(got, &x[block / cluster as usize * 512..][..512], "block {block} of clusters of {cluster}");
            }
            // A multicast reads once, and writes into each block.
            let ran = counters("example_multicast_box").unwrap();
            assert_eq!((ran.bulk_read, ran.global_write), (8 / u64::from(cluster) * 2048, 8 * 2048));
            cut_cross_entropy_emulator::reset_counters();
        }
        let refused = sys::CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE;
        assert_eq!(launch_cluster(&device, "example_multicast_box", 8, 3, params), refused, "8 blocks, clusters of 3");
        assert_eq!(launch_cluster(&device, "example_multicast_box", 16, 16, params), refused, "more than is portable");
        assert_eq!(launch_cluster(&device, "example_multicast", 8, 4, params), refused, "not the kernel's own size");
    }
}

#[test]
fn clusters_are_refused_before_hopper() {
    let device = device(&Config { device: "sm_89".into(), ..Config::default() });
    let mut params = [0_u64; 32];
    let refused = launch_cluster(&device, "example_multicast_box", 8, 2, params.as_mut_ptr().cast());
    assert_eq!(refused, sys::CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BulkParams {
    x: u64,
    out: u64,
    sum: u64,
    sum_bf16: u64,
    sum_f16: u64,
    mode: i32,
}
// SAFETY: plain data with the layout of example_bulk.cu.
unsafe impl DeviceRepr for BulkParams {}

fn bulk(schedule: &Config, mode: i32) -> Result<[Vec<f32>; 4], String> {
    let device = device(schedule);
    let stream = device.context.new_stream().unwrap();
    let x = stream.clone_htod(&numbers(1024)).unwrap();
    let (out, sum) = (stream.alloc_zeros::<f32>(1024).unwrap(), stream.alloc_zeros::<f32>(256).unwrap());
    let sum_bf16: CudaSlice<half::bf16> = stream.alloc_zeros(256).unwrap();
    let sum_f16: CudaSlice<half::f16> = stream.alloc_zeros(256).unwrap();
    let params = BulkParams {
        x: x.device_ptr(&stream).0,
        out: out.device_ptr(&stream).0,
        sum: sum.device_ptr(&stream).0,
        sum_bf16: sum_bf16.device_ptr(&stream).0,
        sum_f16: sum_f16.device_ptr(&stream).0,
        mode,
    };
    let function = device.function("example_bulk", 4096);
    // SAFETY: the parameters are the kernel's.
    unsafe { stream.launch_builder(&function).arg(&params).launch(config(4, 64)) }.unwrap();
    let got = stream.clone_dtoh(&out);
    let reports = take_reports();
    let Ok(got) = got else { return Err(reports.concat()) };
    let bf16 = stream.clone_dtoh(&sum_bf16).unwrap().iter().map(|x| x.to_f32()).collect();
    let f16 = stream.clone_dtoh(&sum_f16).unwrap().iter().map(|x| x.to_f32()).collect();
    let sum = stream.clone_dtoh(&sum).unwrap();
    let ran = counters("example_bulk").unwrap();
    assert_eq!((ran.global_read, ran.bulk_read), (4096, 4096));
    assert_eq!((ran.global_write, ran.bulk_write), (4 * 3072, 4 * 3072));
    Ok([got, sum, bf16, f16])
}

#[test]
fn plain_ranges_are_copied_and_added() {
    let x = numbers(1024);
    let doubled: Vec<f32> = x.iter().map(|x| 2.0 * x).collect();
    let sums: Vec<f32> = (0..256).map(|i| (0..4).map(|block| doubled[block * 256 + i]).sum()).collect();
    for schedule in schedules() {
        let [out, sum, bf16, f16] = bulk(&schedule, 0).unwrap();
        assert_eq!((&out, &sum, &f16), (&doubled, &sums, &sums));
        assert!(
            bf16.iter().zip(&sums).all(|(got, want)| (got - want).abs() <= want / 64.0),
            "rounded at each addition"
        );
        for (mode, kinds) in [
            (1, ["[misaligned]", ""]),
            (2, ["[missing fence.proxy.async]", ""]),
            (3, ["[shared race]", "[uninitialised shared]"]),
            (4, ["[unwaited bulk store at exit]", ""]),
            (5, ["[shared race]", ""]),
            (6, ["[deadlock]", ""]),
        ] {
            let report = bulk(&schedule, mode).expect_err(&format!("mode {mode}"));
            assert!(kinds.iter().any(|k| !k.is_empty() && report.contains(k)), "mode {mode}: {report}");
        }
    }
}

#[test]
fn matrices_are_stored_in_every_form() {
    for schedule in schedules() {
        let device = device(&Config { banks: true, ..schedule });
        let stream = device.context.default_stream();
        let out = stream.alloc_zeros::<u16>(6 * 256).unwrap();
        let function = device.function("example_stmatrix", 4096);
        let address = out.device_ptr(&stream).0;
        // SAFETY: the parameter is the kernel's one pointer.
        unsafe { stream.launch_builder(&function).arg(&address).launch(config(1, 32)) }.unwrap();
        let got = stream.clone_dtoh(&out).unwrap();
        for (i, got) in got.iter().enumerate() {
            let (form, matrix, row, column) = (i / 256, i / 64 % 4, i / 8 % 8, i % 8);
            // Registers hold an 8x8 matrix row by row: two columns a lane, four lanes a row.
            let inside = if form % 2 == 1 { column * 8 + row } else { row * 8 + column };
            let want = if matrix < 1 << (form / 2) { 64 * matrix + inside } else { 0 };
            assert_eq!(usize::from(*got), want, "form {form}, matrix {matrix}, row {row}, column {column}");
        }
        let ran = counters("example_stmatrix").unwrap();
        assert!(ran.shared_phases > 0 && ran.shared_wavefronts == ran.shared_phases, "{ran:?}");
    }
}
