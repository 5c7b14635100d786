//! Whether CUDA can be used here at all, found out without cudarc, which panics where the driver is missing.

use crate::{Error, Result};
use libloading::{Library, Symbol};
use std::ffi::c_int;
use std::sync::OnceLock;

/// The least version of the driver's interface: 12.0.
const LEAST_VERSION: c_int = 12_000;

/// Where the driver's library is looked for.
const NAMES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// Functions that the backend calls, the younger ones among them: with any of these missing cudarc would panic later.
const SYMBOLS: &[&str] = &[
    "cuDevicePrimaryCtxRetain",
    "cuModuleLoadData",
    "cuLaunchKernel",
    "cuLaunchCooperativeKernel",
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuFuncSetAttribute",
    "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "cuOccupancyMaxActiveClusters",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Whether the driver tells the time between events as this build asks: since 12.8. cudarc would panic.
pub(super) fn times_events() -> Result<()> {
    let symbol = "cuEventElapsedTime_v2";
    device_count()?;
    match has(&load()?, symbol) {
        true => Ok(()),
        false => Err(missing(format!("the driver has no function {symbol}; it is older than CUDA 12.8"))),
    }
}

/// Number of CUDA devices, asked once.
///
/// # Errors
/// [`Error::Device`] naming what is missing: the driver's library, a function of it, a new enough version, a device.
pub fn device_count() -> Result<usize> {
    static COUNT: OnceLock<Result<usize>> = OnceLock::new();
    COUNT.get_or_init(probe).clone()
}

fn missing(reason: String) -> Error {
    Error::Device { call: "probe".into(), reason }
}

fn probe() -> Result<usize> {
    let library = load()?;
    if let Some(symbol) = SYMBOLS.iter().find(|s| !has(&library, s)) {
        return Err(missing(format!("the driver has no function {symbol}; it is older than CUDA 12")));
    }
    let code = call0(&library, "cuInit")?;
    if code != 0 {
        let why = match code {
            100 => ": no device",
            999 | 3 => ": the kernel module is not loaded or its version differs",
            _ => "",
        };
        return Err(missing(format!("cuInit failed with {code}{why}")));
    }
    let version = call1(&library, "cuDriverGetVersion")?;
    if version < LEAST_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(missing(format!("the driver supports CUDA {major}.{minor}; 12.0 is the least")));
    }
    let count = call1(&library, "cuDeviceGetCount")?;
    if count <= 0 {
        return Err(missing("the driver finds no device".into()));
    }
    // cudarc opens the same library again; unloading it in between would run its finalisers for nothing.
    std::mem::forget(library);
    Ok(count as usize)
}

fn load() -> Result<Library> {
    let mut reasons = Vec::new();
    for name in NAMES {
        // SAFETY: the initialisers of NVIDIA's driver library may run at any time and on any thread.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(library),
            Err(error) => {
                let why = std::error::Error::source(&error).map(|source| format!(" ({source})")).unwrap_or_default();
                reasons.push(format!("{error}{why}"));
            }
        }
    }
    Err(missing(format!("no driver library: {}", reasons.join("; "))))
}

fn has(library: &Library, symbol: &str) -> bool {
    // SAFETY: the symbol is only looked up, not called.
    unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_ok()
}

fn no_symbol(name: &str) -> impl FnOnce(libloading::Error) -> Error + '_ {
    move |_| missing(format!("the driver has no function {name}"))
}

/// A function of the driver that takes flags.
fn call0(library: &Library, name: &str) -> Result<c_int> {
    // SAFETY: `cuInit` has this signature in every version of the driver, and 0 is its only legal argument.
    unsafe {
        let function: Symbol<'_, unsafe extern "C" fn(u32) -> c_int> =
            library.get(name.as_bytes()).map_err(no_symbol(name))?;
        Ok(function(0))
    }
}

/// A function of the driver that writes one number.
fn call1(library: &Library, name: &str) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: `cuDriverGetVersion` and `cuDeviceGetCount` have this signature and write one `int`.
    let code = unsafe {
        let function: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
            library.get(name.as_bytes()).map_err(no_symbol(name))?;
        function(&mut value)
    };
    if code == 0 { Ok(value) } else { Err(missing(format!("{name} failed with {code}"))) }
}
