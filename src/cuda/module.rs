//! The compiled kernels of one device: embedded machine code where it fits the device, else NVRTC's.

use super::nvrtc::Program;
use crate::plan::{DeviceInfo, KERNELS, Kernel};
use crate::{Error, Result};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, LaunchConfig};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

// SOURCES, HEADERS and IMAGES: the files of `kernels/` by name.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Shared memory that a kernel may use without being asked for more.
const DEFAULT_SHARED: u32 = 48 << 10;

/// A failed call into the driver.
pub(crate) fn driver(call: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Device { call: call.into(), reason: describe(&error) }
}

/// Name and explanation, without the debug formatting.
fn describe(error: &DriverError) -> String {
    let text = |s: std::result::Result<&std::ffi::CStr, DriverError>| s.map(|s| s.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(why)) => format!("{name}: {why}"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// A mutex whose holder panicked guards nothing that a panic could have broken here.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernels in one context.
pub(crate) struct Kernels {
    modules: Vec<(&'static str, Arc<CudaModule>)>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    device: DeviceInfo,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").field("device", &self.device.name).finish_non_exhaustive()
    }
}

impl Kernels {
    /// Those of a context, loaded once for all backends that use it.
    pub fn of(context: &Arc<CudaContext>) -> Result<Arc<Kernels>> {
        // What looks up functions and asks about them does so in the context of its thread, which may have none.
        context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        static LOADED: Mutex<Vec<(usize, Weak<Kernels>)>> = Mutex::new(Vec::new());
        let key = context.cu_ctx() as usize;
        // Held while loading, so that two threads do not compile the same.
        let mut loaded = lock(&LOADED);
        loaded.retain(|(_, kernels)| kernels.strong_count() > 0);
        if let Some(kernels) = loaded.iter().find(|(k, _)| *k == key).and_then(|(_, kernels)| kernels.upgrade()) {
            return Ok(kernels);
        }
        let kernels = Arc::new(Kernels::load(context)?);
        loaded.push((key, Arc::downgrade(&kernels)));
        Ok(kernels)
    }

    fn load(context: &Arc<CudaContext>) -> Result<Kernels> {
        let mut device = query(context)?;
        let (major, minor) = device.compute_capability;
        if major < 8 {
            let reason = format!("{device} is older than sm_80, which the kernels need");
            return Err(Error::Device { call: "Cuda::new".into(), reason });
        }
        let wanted = |name: &str| !name.contains("_sm90") || (major, minor) == (9, 0);
        let sources: Vec<_> = SOURCES.iter().filter(|(name, _)| wanted(name)).collect();
        let modules = std::thread::scope(|scope| {
            let load = |(name, source): &'static (&str, &str)| {
                scope.spawn(move || Ok((*name, load_module(context, name, source, major * 10 + minor)?)))
            };
            let threads: Vec<_> = sources.into_iter().map(load).collect();
            let panicked = |_| Err(Error::Device { call: "load".into(), reason: "a thread panicked".into() });
            threads.into_iter().map(|t| t.join().unwrap_or_else(panicked)).collect::<Result<Vec<_>>>()
        })?;
        let cooperative = device.exact_blocks_per_sm != [0; 2];
        let mut kernels = Kernels { modules, functions: Mutex::default(), device: device.clone() };
        if cooperative {
            device.exact_blocks_per_sm = kernels.exact_occupancy()?;
            device.exact_clusters = kernels.exact_clusters(&context.default_stream());
        }
        kernels.device = device;
        Ok(kernels)
    }

    /// The device, as plans want to know it.
    pub fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// The entry point of this name, allowed to use the shared memory that its kernel needs.
    pub fn function(&self, entry_point: &str, kernel: &Kernel) -> Result<CudaFunction> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(entry_point) {
            return Ok(function.clone());
        }
        // An emulated module has every kernel; one for Hopper is not there on another device, whoever asks.
        let fits = !kernel.is_hopper() || self.device.compute_capability == (9, 0);
        let mut why = String::new();
        let mut named = |(_, module): &(_, Arc<CudaModule>)| {
            module.load_function(entry_point).map_err(|error| why = describe(&error)).ok()
        };
        let found = if fits { self.modules.iter().find_map(&mut named) } else { None };
        let Some(function) = found else {
            let reason = format!("no kernel is named {entry_point}; {why}");
            return Err(Error::Device { call: "cuModuleGetFunction".into(), reason });
        };
        if kernel.shared > DEFAULT_SHARED {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, kernel.shared as i32).map_err(driver("cuFuncSetAttribute"))?;
        }
        functions.insert(entry_point.to_string(), function.clone());
        Ok(function)
    }

    /// Blocks of the portable exact kernel that a multiprocessor holds, for 16-bit inputs and for `f32`. Hopper's takes a whole one.
    fn exact_occupancy(&self) -> Result<[u32; 2]> {
        let mut least = [u32::MAX; 2];
        for kernel in KERNELS.iter().filter(|k| k.cooperative && !k.is_hopper()) {
            for entry_point in kernel.entry_points() {
                let blocks = self
                    .function(&entry_point, kernel)?
                    .occupancy_max_active_blocks_per_multiprocessor(kernel.threads, kernel.shared as usize, None)
                    .map_err(driver("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"))?;
                let of_type = &mut least[usize::from(entry_point.contains("f32"))];
                *of_type = blocks.min(*of_type);
            }
        }
        Ok(least)
    }

    /// Clusters of Hopper's exact kernel that the device holds. 0, for none, where it has no such kernel or the driver will not say.
    fn exact_clusters(&self, stream: &CudaStream) -> u32 {
        let kernels = KERNELS.iter().filter(|k| k.cooperative && k.cluster > 1);
        let entry_points = kernels.flat_map(|kernel| kernel.entry_points().into_iter().map(move |name| (kernel, name)));
        let clusters = |(kernel, name): (&Kernel, std::borrow::Cow<'static, str>)| {
            let config = LaunchConfig {
                grid_dim: (kernel.cluster, 1, 1),
                block_dim: (kernel.threads, 1, 1),
                shared_mem_bytes: kernel.shared,
            };
            // The kernel itself says how many blocks a cluster has.
            self.function(&name, kernel).ok()?.occupancy_max_active_clusters(config, stream).ok()
        };
        entry_points.map(|entry_point| clusters(entry_point).unwrap_or(0)).min().unwrap_or(0)
    }
}

/// Machine code, the first of these that the driver takes: embedded, kept on disk, compiled now.
fn load_module(context: &Arc<CudaContext>, name: &str, source: &str, arch: u32) -> Result<Arc<CudaModule>> {
    let load = |code: Vec<u8>| context.load_module(Ptx::from_binary(code)).map_err(driver("cuModuleLoadData"));
    let compile_always = std::env::var_os("CCE_JIT").is_some_and(|value| !value.is_empty() && value != "0");
    let image = IMAGES.iter().find(|(n, _)| *n == name && !compile_always);
    let refused = match image.map(|(_, image)| load(image.to_vec())) {
        Some(Ok(module)) => return Ok(module),
        Some(Err(error)) => format!("; before it: the machine code of this build, {error}"),
        None => String::new(),
    };
    let because = |error| match error {
        Error::Device { call, reason } => Error::Device { call, reason: reason + &refused },
        other => other,
    };
    let program = Program { name, source, headers: HEADERS };
    let cached = program.cached(arch).map_err(because)?;
    if let Some(module) = cached.read().and_then(|code| load(code).ok()) {
        return Ok(module);
    }
    let code = program.compile(arch).map_err(because)?;
    cached.write(&code);
    load(code)
}

fn query(context: &Arc<CudaContext>) -> Result<DeviceInfo> {
    let attribute = |attribute| context.attribute(attribute).map_err(driver("cuDeviceGetAttribute"));
    let number = |which| attribute(which).map(|value| value.max(0) as u32);
    Ok(DeviceInfo {
        name: context.name().map_err(driver("cuDeviceGetName"))?.into(),
        compute_capability: (
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sm_count: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        shared_per_sm: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as usize,
        l2_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        registers_per_sm: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
        exact_blocks_per_sm: [number(Attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)?; 2],
        exact_clusters: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs NVRTC but no GPU. `REQUIRE_NVRTC=1` makes its absence a failure.
    #[test]
    fn every_kernel_compiles_with_nvrtc() {
        use rayon::prelude::*;
        let compiled = |(name, source): &(&str, &str)| {
            let program = Program { name, source, headers: HEADERS };
            match program.compile(if name.contains("_sm90") { 90 } else { 80 }) {
                Ok(code) => assert!(code.starts_with(b"\x7fELF"), "{name}"),
                Err(Error::Device { call, reason }) if call == "nvrtc" => return Some(reason),
                Err(error) => panic!("{error}"),
            }
            None
        };
        assert!(!SOURCES.is_empty());
        if let Some(reason) = SOURCES.par_iter().filter_map(compiled).find_any(|_| true) {
            assert!(std::env::var_os("REQUIRE_NVRTC").is_none(), "REQUIRE_NVRTC is set, but: {reason}");
            eprintln!("skipped: {reason}");
        }
    }
}
