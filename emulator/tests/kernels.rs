//! The example kernels through cudarc, unchanged, against the emulated driver.
#![cfg(target_os = "linux")]

mod common;

use common::{device, noise, schedules, worst_error};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, sys};
use cut_cross_entropy_emulator::{Config, counters, take_reports};

fn config(grid: (u32, u32, u32), threads: u32, shared: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: grid, block_dim: (threads, 1, 1), shared_mem_bytes: shared }
}

/// sum_k a[row, k] b[col, k]
fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    for row in 0..m {
        for col in 0..n {
            c[row * n + col] = (0..k).map(|i| a[row * k + i] * b[col * k + i]).sum();
        }
    }
    c
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Gemm80 {
    a: u64,
    b: u64,
    c: u64,
    m: i32,
    n: i32,
    k: i32,
}
// SAFETY: plain data with the layout of example_sm80.cu.
unsafe impl DeviceRepr for Gemm80 {}

#[test]
fn ampere_gemm_under_every_schedule() {
    const SHARED: u32 = 3 * 2 * 128 * 64 * 2;
    for (schedule, (m, n, k)) in
        schedules().zip([(256, 1024, 256), (130, 200, 72), (128, 128, 64), (1, 1, 8), (140, 136, 264)])
    {
        let device = device(&Config { device: "a100".into(), ..schedule });
        let stream = device.context.new_stream().unwrap();
        let ((a_bits, a), (b_bits, b)) = (noise(1, m * k), noise(2, n * k));
        let (a_dev, b_dev) = (stream.clone_htod(&a_bits).unwrap(), stream.clone_htod(&b_bits).unwrap());
        // SAFETY: the kernel writes all of it.
        let c_dev: CudaSlice<f32> = unsafe { stream.alloc(m * n) }.unwrap();
        let function = device.function("example_gemm_sm80", SHARED as i32);
        let params = Gemm80 {
            a: a_dev.device_ptr(&stream).0,
            b: b_dev.device_ptr(&stream).0,
            c: c_dev.device_ptr(&stream).0,
            m: m as i32,
            n: n as i32,
            k: k as i32,
        };
        let grid = (n.div_ceil(128) as u32, m.div_ceil(128) as u32, 1);
        // SAFETY: the parameters are the kernel's.
        unsafe { stream.launch_builder(&function).arg(&params).launch(config(grid, 128, SHARED)) }.unwrap();
        let got = stream.clone_dtoh(&c_dev).unwrap();
        assert!(worst_error(&got, &product(&a, &b, m, n, k)) < 1e-3);
        let ran = counters("example_gemm_sm80").unwrap();
        assert_eq!(ran.mma, (grid.0 * grid.1) as u64 * k.div_ceil(64) as u64 * 4 * 4 * 4 * 8);
        assert_eq!(ran.global_write, 4 * (m * n) as u64);
    }
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Gemm90 {
    a: sys::CUtensorMap,
    b: sys::CUtensorMap,
    c: sys::CUtensorMap,
    tiles_m: i32,
    tiles_n: i32,
    steps: i32,
    splits: i32,
}
// SAFETY: plain data with the layout of example_sm90.cu.
unsafe impl DeviceRepr for Gemm90 {}

/// A [outer, inner] matrix under the 128-byte swizzle.
fn tensor_map(
    address: u64,
    float: bool,
    inner: usize,
    outer: usize,
    boxes: [u32; 2],
) -> Result<sys::CUtensorMap, cudarc::driver::DriverError> {
    use sys::CUtensorMapDataType_enum::{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let size = if float { 4 } else { 2 };
    // SAFETY: every array has as many elements as the rank asks for.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            if float { CU_TENSOR_MAP_DATA_TYPE_FLOAT32 } else { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 },
            2,
            address as *mut _,
            [inner as u64, outer as u64].as_ptr(),
            [(inner * size) as u64].as_ptr(),
            boxes.as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map(|()| map)
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
}

struct HopperCase {
    sizes: (usize, usize, usize),
    rows_contiguous: (bool, bool),
    splits: usize,
    claim_more_rows: usize,
}

const HOPPER_SHARED: u32 = 4 * 3 * 128 * 64 * 2 + 2 * 2 * 64 * 32 * 4 + 1024;

fn hopper_gemm(schedule: &Config, case: &HopperCase) -> Result<f32, String> {
    let device = device(schedule);
    let stream = device.context.new_stream().unwrap();
    let HopperCase { sizes: (m, n, k), rows_contiguous: (a_mn, b_mn), splits, claim_more_rows } = *case;
    let ((a_bits, a), (b_bits, b)) = (noise(1, m * k), noise(2, n * k));
    let (a_dev, b_dev) = (stream.clone_htod(&a_bits).unwrap(), stream.clone_htod(&b_bits).unwrap());
    let c_dev = stream.alloc_zeros::<f32>(m * n).unwrap();
    let operand = |address, mn: bool, rows: usize, rows_per_tile| {
        if mn {
            tensor_map(address, false, rows, k, [64, 64])
        } else {
            tensor_map(address, false, k, rows, [64, rows_per_tile])
        }
        .unwrap()
    };
    let params = Gemm90 {
        a: operand(a_dev.device_ptr(&stream).0, a_mn, m + claim_more_rows, 128),
        b: operand(b_dev.device_ptr(&stream).0, b_mn, n, 256),
        c: tensor_map(c_dev.device_ptr(&stream).0, true, n, m, [32, 64]).unwrap(),
        tiles_m: m.div_ceil(128) as i32,
        tiles_n: n.div_ceil(256) as i32,
        steps: k.div_ceil(64) as i32,
        splits: splits as i32,
    };
    let layouts = [a_mn, b_mn].map(|mn| if mn { "m" } else { "k" }).concat();
    let function = device.function(&format!("example_gemm_{layouts}"), HOPPER_SHARED as i32);
    // SAFETY: the parameters are the kernel's.
    unsafe { stream.launch_builder(&function).arg(&params).launch(config((3, 1, 1), 384, HOPPER_SHARED)) }.unwrap();
    let got = stream.clone_dtoh(&c_dev);
    let reports = take_reports();
    let Ok(got) = got else { return Err(reports.concat()) };
    let a = if a_mn { transposed(&a, k, m) } else { a };
    let b = if b_mn { transposed(&b, k, n) } else { b };
    Ok(worst_error(&got, &product(&a, &b, m, n, k)))
}

#[test]
fn hopper_gemm_in_every_layout_under_every_schedule() {
    let cases = [
        ((256, 1024, 256), (false, false), 1),
        ((256, 512, 320), (false, true), 1),
        ((128, 512, 320), (true, false), 1),
        ((256, 256, 384), (true, true), 2),
        ((136, 264, 200), (false, false), 1),
    ];
    for (schedule, (sizes, rows_contiguous, splits)) in schedules().zip(cases) {
        let error = hopper_gemm(&schedule, &HopperCase { sizes, rows_contiguous, splits, claim_more_rows: 0 }).unwrap();
        assert!(error < 1e-3, "{sizes:?}: {error}");
    }
}

#[test]
fn a_tensor_map_larger_than_its_buffer_is_reported() {
    let lie = HopperCase { sizes: (136, 264, 200), rows_contiguous: (false, false), splits: 1, claim_more_rows: 8 };
    let report = hopper_gemm(&Config::default(), &lie).unwrap_err();
    assert!(report.contains("global out of bounds"), "{report}");
}

#[test]
fn wrong_tensor_maps_are_refused() {
    let device = device(&Config::default());
    let stream = device.context.default_stream();
    let x = stream.alloc_zeros::<f32>(64 * 64).unwrap();
    let address = x.device_ptr(&stream).0;
    assert!(tensor_map(address, true, 64, 64, [32, 64]).is_ok());
    assert!(tensor_map(address + 4, true, 64, 63, [32, 64]).is_err(), "an address that is no multiple of 16");
    assert!(tensor_map(address, true, 61, 64, [32, 64]).is_err(), "a stride that is no multiple of 16");
    assert!(tensor_map(address, true, 64, 64, [64, 64]).is_err(), "a box wider than the swizzle");
    assert!(tensor_map(address, true, 64, 64, [32, 257]).is_err(), "a box of more than 256");
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Lse {
    x: u64,
    out: u64,
    total: u64,
    cols: i32,
}
// SAFETY: plain data with the layout of example_sm80.cu.
unsafe impl DeviceRepr for Lse {}

#[test]
fn row_log_sum_exp_under_every_schedule() {
    for schedule in schedules() {
        let device = device(&schedule);
        let stream = device.context.default_stream();
        let (rows, cols) = (16, 1000);
        let (_, x) = noise(3, rows * cols);
        let x_dev = stream.clone_htod(&x).unwrap();
        // SAFETY: the kernel writes all of it.
        let out: CudaSlice<f32> = unsafe { stream.alloc(rows) }.unwrap();
        let total = stream.alloc_zeros::<f32>(1).unwrap();
        let function = device.function("example_row_lse", 64);
        let params = Lse {
            x: x_dev.device_ptr(&stream).0,
            out: out.device_ptr(&stream).0,
            total: total.device_ptr(&stream).0,
            cols: cols as i32,
        };
        // SAFETY: the parameters are the kernel's.
        unsafe { stream.launch_builder(&function).arg(&params).launch(config((rows as u32, 1, 1), 256, 64)) }.unwrap();
        let want: Vec<f32> =
            x.chunks(cols).map(|row| row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln() as f32).collect();
        assert!(worst_error(&stream.clone_dtoh(&out).unwrap(), &want) < 1e-4);
        assert!((stream.clone_dtoh(&total).unwrap()[0] - want.iter().sum::<f32>()).abs() < 1e-2);
        assert_eq!(counters("example_row_lse").unwrap().global_read, (4 * rows * cols) as u64);
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Mma {
    a: u64,
    b: u64,
    d: u64,
    format: i32,
}
// SAFETY: plain data with the layout of example_mma.cu.
unsafe impl DeviceRepr for Mma {}

/// A [16, k] times B [8, k] of a format of `Mma`, which holds all of their elements.
fn mma(config_: &Config, format: i32, a: &[f32], b: &[f32]) -> Vec<f32> {
    let device = device(config_);
    let stream = device.context.default_stream();
    let upload = |x: &[f32]| {
        let bytes: Vec<u8> = match format {
            0 => x.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
            1 => x.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            _ => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        stream.clone_htod(&bytes).unwrap()
    };
    let (a, b) = (upload(a), upload(b));
    let d = stream.alloc_zeros::<f32>(16 * 8).unwrap();
    let function = device.function("example_mma", 1024);
    let [a, b] = [&a, &b].map(|x| x.device_ptr(&stream).0);
    let params = Mma { a, b, d: d.device_ptr(&stream).0, format };
    // SAFETY: the parameters are the kernel's.
    unsafe { stream.launch_builder(&function).arg(&params).launch(config((1, 1, 1), 32, 1024)) }.unwrap();
    stream.clone_dtoh(&d).unwrap()
}

#[test]
fn fragments_of_every_format_multiply() {
    let cut = |schedule: Config| [false, true].map(|cut| Config { cut, ..schedule.clone() });
    for schedule in schedules().flat_map(cut) {
        for format in 0..3 {
            let k = if format == 2 { 8 } else { 16 };
            // What a bf16 holds, an f16 of this range and a tf32 hold too.
            let ((_, a), (_, b)) = (noise(5, 16 * k), noise(6, 8 * k));
            let got = mma(&schedule, format, &a, &b);
            assert!(worst_error(&got, &product(&a, &b, 16, 8, k)) < 1e-4, "format {format}");
        }
    }
}

/// A sum of 1 and small products, whose places say what is added together: what is left of these by arXiv:2512.07004, in units of 2^-23.
#[test]
fn sums_are_cut_off_as_the_device_does() {
    // (device, format) and products besides the first, (place, power of two).
    let left = |device: &str, format: i32, sign: f32, small: &[(usize, i32)]| {
        let k = if format == 2 { 8 } else { 16 };
        let config = Config { device: device.into(), cut: true, ..Config::default() };
        let row = |of: &dyn Fn(i32) -> i32| {
            let mut row = vec![0.0; k];
            row[0] = 1.0;
            small.iter().for_each(|&(place, power)| row[place] = 2.0_f32.powi(of(power)));
            row
        };
        // 2^-25 is no f16, but a product of two.
        let a: Vec<f32> = row(&|power| power / 2).into_iter().cycle().take(16 * k).map(|x| sign * x).collect();
        let b: Vec<f32> = row(&|power| power - power / 2).into_iter().cycle().take(8 * k).collect();
        let got = mma(&config, format, &a, &b);
        assert!(got.iter().all(|x| *x == got[0]), "{got:?}");
        (got[0] * sign - 1.0) * 2.0_f32.powi(23)
    };
    for format in 0..3 {
        let group_of_an_a100 = if format == 2 { 4 } else { 8 };
        for sign in [1.0, -1.0] {
            let left = |device, small: &[(usize, i32)]| left(device, format, sign, small);
            // Halves of a unit make one where they are added together, and none where a sum is cut off between them.
            let (together, apart) = ([(1, -24), (2, -24)], [(1, -24), (group_of_an_a100, -24)]);
            assert_eq!([left("h100", &together), left("h100", &apart)], [1.0, 1.0], "format {format}");
            assert_eq!([left("a100", &together), left("a100", &apart)], [1.0, 0.0], "format {format}");
            // One more bit than an f32 has on the A100, two on the H100.
            let (quarters, eighths) = ([1, 2, 3].map(|place| (place, -25)), [1, 2, 3].map(|place| (place, -26)));
            let and_a_quarter = |small: [(usize, i32); 3]| [&small[..], &[(5, -25)]].concat();
            assert_eq!(left("h100", &and_a_quarter(quarters)), 1.0, "format {format}");
            assert_eq!(left("a100", &quarters), 0.0, "format {format}");
            assert_eq!(left("h100", &and_a_quarter(eighths)), 0.0, "format {format}");
        }
    }
}
