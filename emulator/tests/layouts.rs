//! Fragments, swizzles and descriptors against an independent source: the layouts that CuTe publishes, as shape:stride facts.
//! NVIDIA/cutlass, `include/cute/`, each at the commit that was read:
//!
//! | file | commit |
//! |---|---|
//! | `atom/mma_traits_sm80.hpp` | 468e0ea |
//! | `atom/mma_traits_sm90_gmma.hpp` | 082a375 |
//! | `arch/mma_sm90_desc.hpp` | 19e8990 |
//! | `atom/copy_traits_sm75.hpp` | 474c1fd |
//! | `atom/copy_traits_sm90.hpp` | 8c69ea3 |
//! | `atom/copy_traits_sm90_tma_swizzle.hpp` | 1842253 |
//!
//! One thing no product can show: an order of k that A and B share.
#![cfg(target_os = "linux")]

mod common;

use common::{Device, device, schedules};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, sys};
use cut_cross_entropy_emulator::take_reports;
use half::{bf16, f16};

/// A flat layout: (shape, stride) of each mode, the first runs fastest.
type Modes = [(usize, usize)];

fn offset(modes: &Modes, mut index: usize) -> usize {
    let mut sum = 0;
    for (shape, stride) in modes {
        sum += index % shape * stride;
        index /= shape;
    }
    assert_eq!(index, 0, "an index beyond its layout");
    sum
}
fn size(modes: &Modes) -> usize {
    modes.iter().map(|(shape, _)| shape).product()
}

/// (thread, value) to row + `rows` * column.
struct Fragment {
    threads: &'static Modes,
    values: &'static Modes,
    rows: usize,
}

impl Fragment {
    /// What thread `t` holds as its value `v`.
    fn place(&self, t: usize, v: usize) -> (usize, usize) {
        let at = offset(self.threads, t) + offset(self.values, v);
        (at % self.rows, at / self.rows)
    }
    /// Registers of all threads; 16-bit values in pairs, the first low.
    fn pack(&self, bits: impl Fn((usize, usize)) -> u32, wide: bool) -> Vec<u32> {
        let pairs = if wide { 1 } else { 2 };
        (0..size(self.threads))
            .flat_map(|t| (0..size(self.values) / pairs).map(move |r| (t, r)))
            .map(|(t, r)| (0..pairs).map(|half| bits(self.place(t, r * pairs + half)) << (16 * half)).sum())
            .collect()
    }
    /// The matrix of `columns` that registers hold.
    fn unpack(&self, registers: &[f32], columns: usize) -> Vec<f32> {
        let (values, mut matrix) = (size(self.values), vec![f32::NAN; self.rows * columns]);
        assert_eq!(registers.len(), size(self.threads) * values);
        for (i, x) in registers.iter().enumerate() {
            let (row, column) = self.place(i / values, i % values);
            matrix[row * columns + column] = *x;
        }
        matrix
    }
}

// SM80_16x8x16 of 16 bits.
const A_16X16: Fragment = Fragment { threads: &[(4, 32), (8, 1)], values: &[(2, 16), (2, 8), (2, 128)], rows: 16 };
const B_8X16: Fragment = Fragment { threads: &[(4, 16), (8, 1)], values: &[(2, 8), (2, 64)], rows: 8 };
// SM80_16x8x8 of tf32.
const A_16X8: Fragment = Fragment { threads: &[(4, 16), (8, 1)], values: &[(2, 8), (2, 64)], rows: 16 };
const B_8X8: Fragment = Fragment { threads: &[(4, 8), (8, 1)], values: &[(2, 32)], rows: 8 };
// Of both: SM80_16x8_Row.
const C_16X8: Fragment = Fragment { threads: &[(4, 32), (8, 1)], values: &[(2, 16), (2, 8)], rows: 16 };
// GMMA::ALayout_64x16, CLayout_64x128, CLayout_64x256.
const A_64X16: Fragment =
    Fragment { threads: &[(4, 128), (8, 1), (4, 16)], values: &[(2, 64), (2, 8), (2, 512)], rows: 64 };
const C_64X128: Fragment =
    Fragment { threads: &[(4, 128), (8, 1), (4, 16)], values: &[(2, 64), (2, 8), (16, 512)], rows: 64 };
const C_64X256: Fragment =
    Fragment { threads: &[(4, 128), (8, 1), (4, 16)], values: &[(2, 64), (2, 8), (32, 512)], rows: 64 };

/// Swizzle<bits, 4, 3>: 0 none, 1 for 32, 2 for 64, 3 for 128 bytes.
fn swizzled(byte: usize, bits: usize) -> usize {
    byte ^ (byte >> 3 & ((1 << bits) - 1) << 4)
}

/// Small integers, whose products and sums every format holds exactly.
fn integers(rows: usize, columns: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..rows * columns)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as f32 % 9.0 - 4.0
        })
        .collect()
}
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    a.chunks(k).flat_map(|x| b.chunks(k).map(|y| x.iter().zip(y).map(|(x, y)| x * y).sum())).collect()
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LayoutParams {
    a: u64,
    b: u64,
    out: u64,
    d: u64,
    a_descriptor: u64,
    b_descriptor: u64,
    mode: i32,
}
// SAFETY: plain data with the layout of example_layout.cu.
unsafe impl DeviceRepr for LayoutParams {}

struct Run<'a> {
    a: &'a [u32],
    b: &'a [u32],
    descriptors: [u64; 2],
    mode: i32,
    outputs: usize,
}

fn launch(device: &Device, kernel: &str, threads: u32, shared: u32, run: &Run) -> (Vec<u32>, Vec<f32>) {
    let stream = device.context.default_stream();
    let (a, b) = (stream.clone_htod(run.a).unwrap(), stream.clone_htod(run.b).unwrap());
    let out: CudaSlice<u32> = stream.alloc_zeros(run.outputs).unwrap();
    let d: CudaSlice<f32> = stream.alloc_zeros(run.outputs).unwrap();
    let params = LayoutParams {
        a: a.device_ptr(&stream).0,
        b: b.device_ptr(&stream).0,
        out: out.device_ptr(&stream).0,
        d: d.device_ptr(&stream).0,
        a_descriptor: run.descriptors[0],
        b_descriptor: run.descriptors[1],
        mode: run.mode,
    };
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: shared };
    let function = device.function(kernel, shared as i32);
    // SAFETY: the parameters are the kernel's.
    unsafe { stream.launch_builder(&function).arg(&params).launch(config) }.unwrap();
    let got = (stream.clone_dtoh(&out), stream.clone_dtoh(&d));
    let reports = take_reports();
    assert_eq!(reports, [""; 0]);
    (got.0.unwrap(), got.1.unwrap())
}

#[test]
fn products_of_a_warp_hold_their_fragments_as_cute_has_them() {
    let encode: [fn(f32) -> u32; 3] =
        [|x| bf16::from_f32(x).to_bits().into(), |x| f16::from_f32(x).to_bits().into(), f32::to_bits];
    for schedule in schedules() {
        let device = device(&schedule);
        for (mode, encode) in encode.iter().enumerate() {
            let (k, fragments) = if mode == 2 { (8, (&A_16X8, &B_8X8)) } else { (16, (&A_16X16, &B_8X16)) };
            let (a, b) = (integers(16, k, 1), integers(8, k, 2));
            let packed_a = fragments.0.pack(|(m, k_)| encode(a[m * k + k_]), mode == 2);
            let packed_b = fragments.1.pack(|(n, k_)| encode(b[n * k + k_]), mode == 2);
            let run = Run { a: &packed_a, b: &packed_b, descriptors: [0; 2], mode: mode as i32, outputs: 128 };
            let (_, d) = launch(&device, "example_layout_mma", 32, 0, &run);
            assert_eq!(C_16X8.unpack(&d, 8), product(&a, &b, k), "mode {mode}");
        }
    }
}

/// Bit of the 32 rows of 128 bits that lane `t` has as bit `b` of its registers: SM75_U32x4_LDSM_N, SM75_U16x8_LDSM_T; their x2 forms
/// are the same with two registers.
fn matrix_bit(transposed: bool, t: usize, b: usize) -> usize {
    let threads: &Modes = if transposed { &[(4, 256), (8, 16)] } else { &[(32, 32)] };
    let values: &Modes = if transposed { &[(16, 1), (2, 128), (4, 1024)] } else { &[(32, 1), (4, 1024)] };
    offset(threads, t) + offset(values, b)
}
fn get(words: &[u32], bit: usize) -> u32 {
    words[bit / 32] >> (bit % 32) & 1
}

#[test]
fn matrices_move_between_rows_and_registers_as_cute_has_them() {
    let words: Vec<u32> = (0..128_u32).map(|i| (2 * i) | (2 * i + 1) << 16).collect();
    for schedule in schedules() {
        let device = device(&schedule);
        for mode in 0..6 {
            let run = Run { a: &words, b: &words, descriptors: [0; 2], mode, outputs: 128 };
            let (got, _) = launch(&device, "example_layout_matrix", 32, 512, &run);
            let bits = if mode / 2 == 1 { 64 } else { 128 };
            for (t, b) in (0..32).flat_map(|t| (0..bits).map(move |b| (t, b))) {
                let (row_bit, register_bit) = (matrix_bit(mode % 2 == 1, t, b), t * 128 + b);
                // SM90_U32x4_STSM_N and SM90_U16x8_STSM_T are the same with source and destination exchanged.
                let (to, from) = if mode < 4 { (register_bit, row_bit) } else { (row_bit, register_bit) };
                assert_eq!(get(&got, to), get(&words, from), "mode {mode}, lane {t}, bit {b}");
            }
        }
    }
}

const A_BYTES: usize = 16384;
const B_BYTES: usize = 65536;

/// An operand of a warpgroup's product in shared memory.
#[derive(Clone, Copy, Debug)]
struct Operand {
    swizzle: usize,
    mn_major: bool,
    stride: usize, // bytes
    leading: usize,
}

impl Operand {
    /// Offsets that leave room between the atoms, and that cannot be taken for one another.
    fn new(swizzle: usize, mn_major: bool, rows: usize) -> Operand {
        let atom = 128 << swizzle;
        let (stride, leading) = match (swizzle, mn_major) {
            (0, true) => (384, 128),
            (0, false) => (256, rows / 8 * 256 + 128),
            (_, true) => (atom, 3 * atom),
            (_, false) => (2 * atom, 16),
        };
        Operand { swizzle, mn_major, stride, leading }
    }
    /// GmmaDescriptor without the start address.
    fn descriptor(&self) -> u64 {
        let layout_type = [0, 3, 2, 1][self.swizzle];
        (self.leading as u64 >> 4) << 16 | (self.stride as u64 >> 4) << 32 | layout_type << 62
    }
    /// The canonical layouts of make_gmma_desc, in elements of 16 bits: T is 8.
    fn byte(&self, rows: usize, mn: usize, k: usize) -> usize {
        let (w, sbo, lbo) = (1 << self.swizzle, self.stride / 2, self.leading / 2);
        let element = match (self.mn_major, self.swizzle) {
            (true, 0) => offset(&[(8, 1), (1, 8), (rows / 8, sbo)], mn) + offset(&[(8, 8), (2, lbo)], k),
            (true, _) => offset(&[(8, 1), (w, 8), (rows / (8 * w), lbo)], mn) + offset(&[(8, 8 * w), (2, sbo)], k),
            (false, 0) => offset(&[(8, 8), (rows / 8, sbo)], mn) + offset(&[(8, 1), (2, lbo)], k),
            (false, _) => offset(&[(8, 8 * w), (rows / 8, sbo)], mn) + offset(&[(8, 1), (2, 8)], k),
        };
        swizzled(2 * element, self.swizzle)
    }
    /// Shared memory with the matrix [rows, 16] in it, and NaN everywhere else.
    fn image(&self, matrix: &[f32], bytes: usize) -> Vec<u32> {
        let (rows, mut halves) = (matrix.len() / 16, vec![0xffff_u16; bytes / 2]);
        for (i, x) in matrix.iter().enumerate() {
            let half = &mut halves[self.byte(rows, i / 16, i % 16) / 2];
            assert_eq!(*half, 0xffff, "two elements in one place");
            *half = bf16::from_f32(*x).to_bits();
        }
        halves.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect()
    }
}

struct Wgmma<'a> {
    a: Option<Operand>, // None: from registers
    b: Operand,
    columns: usize,
    device: &'a Device,
}

impl Wgmma<'_> {
    /// The product, by the kernel and by plain sums.
    fn run(&self, lie: bool) -> (Vec<f32>, Vec<f32>) {
        let (a, b) = (integers(64, 16, 3), integers(self.columns, 16, 4));
        let image_a = match &self.a {
            Some(operand) => operand.image(&a, A_BYTES),
            None => A_64X16.pack(|(m, k)| bf16::from_f32(a[m * 16 + k]).to_bits().into(), false),
        };
        let mode = match (&self.a, self.columns) {
            (Some(a), _) => i32::from(a.mn_major) * 2 + i32::from(self.b.mn_major),
            (None, 128) => 4 + i32::from(self.b.mn_major),
            (None, _) => 6,
        };
        let exchanged = Operand { stride: self.b.leading, leading: self.b.stride, ..self.b };
        let b_descriptor = if lie { &exchanged } else { &self.b }.descriptor();
        let run = Run {
            a: &image_a,
            b: &self.b.image(&b, B_BYTES),
            descriptors: [self.a.map_or(0, |a| a.descriptor()), b_descriptor],
            mode,
            outputs: 64 * self.columns,
        };
        let (_, d) = launch(self.device, "example_layout_wgmma", 128, (A_BYTES + B_BYTES) as u32, &run);
        let c = if self.columns == 256 { &C_64X256 } else { &C_64X128 };
        (c.unpack(&d, self.columns), product(&a, &b, 16))
    }
}

#[test]
fn products_of_a_warpgroup_read_their_operands_as_cute_has_them() {
    for schedule in schedules().take(2) {
        let device = &device(&schedule);
        for swizzle in 0..4 {
            for (a_mn, b_mn) in [(false, false), (false, true), (true, false), (true, true)] {
                let (a, b) = (Operand::new(swizzle, a_mn, 64), Operand::new(swizzle, b_mn, 128));
                let (got, want) = Wgmma { a: Some(a), b, columns: 128, device }.run(false);
                assert_eq!(got, want, "{a:?}, {b:?}");
            }
            for b_mn in [false, true] {
                let b = Operand::new(swizzle, b_mn, 128);
                let (got, want) = Wgmma { a: None, b, columns: 128, device }.run(false);
                assert_eq!(got, want, "registers, {b:?}");
            }
        }
        let b = Operand::new(3, false, 256);
        let (got, want) = Wgmma { a: None, b, columns: 256, device }.run(false);
        assert_eq!(got, want, "256 columns, {b:?}");
    }
}

/// The test above can fail: with the two offsets of the descriptor exchanged, every layout that has both goes wrong.
#[test]
fn exchanged_offsets_give_another_product() {
    let device = &device(&schedules().next().unwrap());
    for (swizzle, mn_major) in [(0, false), (0, true), (1, true), (2, true), (3, true)] {
        let b = Operand::new(swizzle, mn_major, 128);
        let (got, want) = Wgmma { a: None, b, columns: 128, device }.run(true);
        assert_ne!(got, want, "{b:?}");
    }
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct BoxParams {
    x: sys::CUtensorMap,
    out: u64,
    bytes: u32,
}
// SAFETY: plain data with the layout of example_layout.cu.
unsafe impl DeviceRepr for BoxParams {}

#[test]
fn boxes_are_swizzled_as_cute_has_it() {
    use sys::CUtensorMapSwizzle_enum::*;
    let kinds =
        [CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B];
    for schedule in schedules() {
        let device = device(&schedule);
        let stream = device.context.default_stream();
        for (bits, kind) in kinds.into_iter().enumerate() {
            let columns = 4 << bits; // as wide as the swizzle
            let x: Vec<u32> = (0..16 * columns).collect();
            let (x_dev, out) = (stream.clone_htod(&x).unwrap(), stream.alloc_zeros::<u32>(x.len()).unwrap());
            let mut map = sys::CUtensorMap { opaque: [0; 16] };
            // SAFETY: every array has as many elements as the rank asks for.
            unsafe {
                sys::cuTensorMapEncodeTiled(
                    &mut map,
                    sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_UINT32,
                    2,
                    x_dev.device_ptr(&stream).0 as *mut _,
                    [columns.into(), 16].as_ptr(),
                    [u64::from(columns) * 4].as_ptr(),
                    [columns, 16].as_ptr(),
                    [1, 1].as_ptr(),
                    sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    kind,
                    sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                    sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            }
            .result()
            .unwrap();
            let params = BoxParams { x: map, out: out.device_ptr(&stream).0, bytes: x.len() as u32 * 4 };
            let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 3072 };
            let function = device.function("example_layout_box", 3072);
            // SAFETY: the parameters are the kernel's.
            unsafe { stream.launch_builder(&function).arg(&params).launch(config) }.unwrap();
            let got = stream.clone_dtoh(&out).unwrap();
            for i in 0..x.len() {
                assert_eq!(got[swizzled(4 * i, bits) / 4], x[i], "swizzle of {bits} bits, word {i}");
            }
        }
    }
}
