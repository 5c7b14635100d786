//! An emulated CUDA driver: after [`install`], a process that loads `libcuda` and `libnvrtc` (as cudarc does) runs this project's
//! kernels on the CPU, under a checker. The folder's README says what is modelled and how to read a report.
//!
//! Call [`install`] before the first CUDA call of the process. Without it, `LD_LIBRARY_PATH` set to [`library_dir`] does the same for a
//! program that does not know of the emulator.
#![cfg(target_os = "linux")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Which runnable thread of a block goes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Ascending.
    #[default]
    Forward = 0,
    /// Descending at first.
    Reverse = 1,
    /// Drawn with the seed.
    Random = 2,
}

/// When asynchronous copies and products take effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Async {
    /// As late as a wait allows.
    #[default]
    Lazy = 0,
    /// At once.
    Eager = 1,
    /// Drawn with the seed.
    Random = 2,
}

/// How launches run from now on; replaces what the `EMU_*` variables said.
#[derive(Clone, Debug)]
pub struct Config {
    /// `a100`, `sm_86`, `sm_89`, `h100`, `h200` or `sm_120`: capability, limits and attributes.
    pub device: String,
    /// Multiprocessors of the device.
    pub multiprocessors: u32,
    /// Which thread runs next.
    pub order: Order,
    /// When asynchronous effects land.
    pub async_: Async,
    /// Of the random choices.
    pub seed: u64,
    /// The checker; without it only results can be wrong.
    pub check: bool,
    /// Print the shared-memory wavefronts of each source line.
    pub banks: bool,
    /// Tensor cores cut their sums off, as those of the device do; else each product and sum is rounded.
    pub cut: bool,
    /// OS threads over the blocks of a launch.
    pub workers: u32,
    /// Nothing but polling for so long is a deadlock.
    pub spin_seconds: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            device: "h100".into(),
            multiprocessors: 4,
            order: Order::Forward,
            async_: Async::Lazy,
            seed: 1,
            check: true,
            banks: false,
            cut: false,
            workers: 1,
            spin_seconds: 10,
        }
    }
}

/// What launches of a kernel did, summed since the last [`reset_counters`]. Bytes count only under the checker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks that ran.
    pub blocks: u64,
    /// Bytes of global memory read, by whatever means. What a multicast reads counts once.
    pub global_read: u64,
    /// Bytes of global memory written; an atomic or a reduction counts here only.
    pub global_write: u64,
    /// Bytes of shared memory read, by threads, products and copies.
    pub shared_read: u64,
    /// Bytes of shared memory written; what a multicast writes counts in each block.
    pub shared_write: u64,
    /// Products of warps.
    pub mma: u64,
    /// Products of warpgroups.
    pub wgmma: u64,
    /// Atomics, of threads.
    pub atomics: u64,
    /// Of `global_read`: by `cp.async`.
    pub copy_read: u64,
    /// Of `global_read`: by the copy engine, boxes and plain ranges.
    pub bulk_read: u64,
    /// Of `global_write`: by the copy engine.
    pub bulk_write: u64,
    /// Wavefronts that shared accesses of warps would have taken without bank conflicts; counted where [`Config::banks`] is set.
    pub shared_phases: u64,
    /// Wavefronts that they took.
    pub shared_wavefronts: u64,
}

/// The folder with the emulated `libcuda.so.1`, `libnvrtc.so.13` and their other names: the one that was built with this crate, or
/// `EMU_LIBRARY_DIR`.
pub fn library_dir() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        std::env::var_os("EMU_LIBRARY_DIR").map_or_else(|| env!("EMULATOR_LIBRARY_DIR").into(), PathBuf::from)
    })
}

#[link(name = "dl")]
unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
    fn free(p: *mut c_void);
}
const RTLD_NOW: c_int = 2;
const RTLD_NOLOAD: c_int = 4;
const RTLD_GLOBAL: c_int = 0x100;

struct Library(*mut c_void);
// SAFETY: a handle of dlopen may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

fn open(name: &str, flags: c_int) -> Result<Library, String> {
    let c_name = CString::new(name).map_err(|e| e.to_string())?;
    // SAFETY: a valid C string; the libraries' initialisers only fill tables.
    let handle = unsafe { dlopen(c_name.as_ptr(), flags) };
    if handle.is_null() {
        // SAFETY: after a failure dlerror returns a C string or null.
        let why = unsafe { dlerror() };
        if why.is_null() {
            return Err(format!("cannot load {name}"));
        }
        // SAFETY: as above.
        return Err(unsafe { CStr::from_ptr(why) }.to_string_lossy().into());
    }
    Ok(Library(handle))
}

/// Loads the emulated driver into this process, under every name that a loader asks for. A driver that is loaded already is an error.
pub fn install() -> Result<(), String> {
    driver().map(|_| ())
}

fn driver() -> Result<&'static Library, String> {
    static DRIVER: OnceLock<Result<Library, String>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            let ours = |name: &str| library_dir().join(name).display().to_string();
            if open("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD).is_ok()
                && open(&ours("libcuda.so.1"), RTLD_NOW | RTLD_NOLOAD).is_err()
            {
                return Err(
                    "another libcuda.so.1 is loaded already: install the emulator before the first CUDA call".into()
                );
            }
            // Whoever asks for one of these names from now on gets the library that is there: the loader compares SONAMEs.
            let driver = open(&ours("libcuda.so.1"), RTLD_NOW | RTLD_GLOBAL)?;
            for name in ["libcuda.so", "libnvrtc.so.13", "libnvrtc.so", "libnvrtc.so.12"] {
                open(&ours(name), RTLD_NOW | RTLD_GLOBAL)?;
            }
            Ok(driver)
        })
        .as_ref()
        .map_err(Clone::clone)
}

fn symbol(name: &CStr) -> *mut c_void {
    let driver = driver().expect("the emulated driver is built with this crate");
    // SAFETY: a live handle and a C string.
    let found = unsafe { dlsym(driver.0, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?} is not in the emulated driver");
    found
}

/// Sets how launches run from now on.
pub fn configure(config: &Config) {
    #[repr(C)]
    struct Raw {
        device: *const c_char,
        sms: c_int,
        order: c_int,
        async_: c_int,
        check: c_int,
        banks: c_int,
        cut: c_int,
        workers: c_int,
        spin_seconds: c_int,
        seed: u64,
    }
    let device = CString::new(config.device.as_str()).expect("a device's name");
    let raw = Raw {
        device: device.as_ptr(),
        sms: config.multiprocessors as c_int,
        order: config.order as c_int,
        async_: config.async_ as c_int,
        check: config.check.into(),
        banks: config.banks.into(),
        cut: config.cut.into(),
        workers: config.workers as c_int,
        spin_seconds: config.spin_seconds as c_int,
        seed: config.seed,
    };
    // SAFETY: launch.cpp defines it with this signature; the name is copied.
    unsafe {
        let call: unsafe extern "C" fn(*const Raw) = std::mem::transmute(symbol(c"emu_configure"));
        call(&raw);
    }
}

/// The reports of failed launches since the last call, oldest first. The context, which such a failure leaves unusable as on a real
/// device, works again afterwards.
pub fn take_reports() -> Vec<String> {
    let mut reports = Vec::new();
    // SAFETY: launch.cpp defines it with this signature; it returns null or a C string from malloc.
    unsafe {
        let call: unsafe extern "C" fn() -> *mut c_char = std::mem::transmute(symbol(c"emu_take_report"));
        loop {
            let report = call();
            if report.is_null() {
                return reports;
            }
            reports.push(CStr::from_ptr(report).to_string_lossy().into_owned());
            free(report.cast());
        }
    }
}

/// What launches of this kernel did; `None` if there were none.
pub fn counters(kernel: &str) -> Option<Counters> {
    let name = CString::new(kernel).ok()?;
    let mut raw = [0_u64; 13];
    // SAFETY: launch.cpp defines it with this signature and writes thirteen numbers.
    let found = unsafe {
        let call: unsafe extern "C" fn(*const c_char, *mut u64) -> c_int = std::mem::transmute(symbol(c"emu_counters"));
        call(name.as_ptr(), raw.as_mut_ptr())
    };
    (found != 0).then_some(Counters {
        blocks: raw[0],
        global_read: raw[1],
        global_write: raw[2],
        shared_read: raw[3],
        shared_write: raw[4],
        mma: raw[5],
        wgmma: raw[6],
        atomics: raw[7],
        copy_read: raw[8],
        bulk_read: raw[9],
        bulk_write: raw[10],
        shared_phases: raw[11],
        shared_wavefronts: raw[12],
    })
}

/// Forgets all counters.
pub fn reset_counters() {
    // SAFETY: launch.cpp defines it with this signature.
    unsafe {
        let call: unsafe extern "C" fn() = std::mem::transmute(symbol(c"emu_reset_counters"));
        call();
    }
}
