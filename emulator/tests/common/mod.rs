//! The emulated device for one test at a time: settings, reports and the context are the process's.

#![allow(dead_code)] // each test uses a part

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DeviceRepr, sys};
use cudarc::nvrtc::compile_ptx;
use cut_cross_entropy_emulator::{Async, Config, Order, configure, install, reset_counters, take_reports};

pub struct Device {
    pub context: Arc<CudaContext>,
    pub module: Arc<CudaModule>,
    _one_at_a_time: MutexGuard<'static, ()>,
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn device(config: &Config) -> Device {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    install().unwrap();
    configure(config);
    take_reports();
    reset_counters();
    let context = CudaContext::new(0).unwrap();
    // The emulated NVRTC compiles nothing: kernels are found by name among those that the emulator was built with.
    let module = context.load_module(compile_ptx("").unwrap()).unwrap();
    Device { context, module, _one_at_a_time: guard }
}

impl Device {
    pub fn function(&self, name: &str, shared: i32) -> CudaFunction {
        let function = self.module.load_function(name).unwrap();
        function
            .set_attribute(sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            .unwrap();
        function
    }
}

/// Settings under which every kernel must give the same.
pub fn schedules() -> impl Iterator<Item = Config> {
    let all = [
        (Order::Forward, Async::Lazy),
        (Order::Reverse, Async::Eager),
        (Order::Random, Async::Random),
        (Order::Forward, Async::Eager),
        (Order::Random, Async::Lazy),
    ];
    all.into_iter().zip(1..).map(|((order, async_), seed)| Config { order, async_, seed, ..Config::default() })
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct OrderParams {
    pub data: u64,
    pub flags: u64,
    pub out: u64,
    pub mode: i32,
}
// SAFETY: plain data with the layout of example_order.cu.
unsafe impl DeviceRepr for OrderParams {}

/// Numbers in (-1, 1), and what of them a bf16 holds.
pub fn noise(seed: u32, n: usize) -> (Vec<half::bf16>, Vec<f32>) {
    let mut state = seed;
    let bits: Vec<half::bf16> = (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            half::bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        })
        .collect();
    let values = bits.iter().map(|x| x.to_f32()).collect();
    (bits, values)
}

pub fn worst_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0, |worst, e| if e.is_nan() { f32::INFINITY } else { e.max(worst) })
}
