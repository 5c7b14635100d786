//! The only place that launches: steps of a plan, with the addresses that they work on, into a stream.

use super::abi::{Address, LceArgs};
use super::arguments::{Addresses, planned};
use super::hopper::{LceHopperArgs, TensorMaps};
use super::module::driver;
use super::profile::Profile;
use super::{Cuda, DeviceMemory, Outputs, Saved};
use crate::plan::{Group, Kernel, LaunchPlan, Step};
use crate::{Error, GradientSinks, Problem, Result, Upstream};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, result, sys,
};

// SAFETY: plain data, laid out as the kernels declare it.
unsafe impl DeviceRepr for LceArgs {}

/// Where a region is: in the allocation of its group, 0 if the plan has none of this name.
fn locate(plan: &LaunchPlan, groups: &[(Group, Address)], name: &str) -> Address {
    let base = |group| groups.iter().find(|(g, _)| *g == group).map(|(_, base)| *base);
    plan.workspace.region(name).and_then(|r| Some(base(r.group)? + r.offset as u64)).unwrap_or(0)
}

/// The forward of `plan`, into `outputs` and `saved`.
pub(super) fn forward(
    cuda: &Cuda,
    problem: &Problem<'_, DeviceMemory>,
    plan: &LaunchPlan,
    outputs: &mut Outputs,
    saved: &mut CudaSlice<u8>,
    scratch: &mut CudaSlice<u8>,
) -> Result<()> {
    let mut addresses = Addresses::new(&cuda.stream);
    let groups = [(Group::Saved, addresses.write(saved)), (Group::Forward, addresses.write(scratch))];
    let region = |name: &str| locate(plan, &groups, name);
    let args =
        LceArgs { problem: addresses.problem(problem)?, outputs: addresses.outputs(outputs), ..planned(plan, &region) };
    // SAFETY: `saved` and `scratch` have the bytes of their groups, `outputs` N elements, all allocated on this stream and
    // borrowed mutably. The inputs have the sizes that `Problem::new` checked; cudarc orders what happens to them later
    // behind the guards in `addresses`, and for raw addresses the caller of `from_raw` does.
    unsafe { submit(cuda, plan, &plan.forward, &args, &region) }
}

/// The backward of `plan`, from `saved` into the sinks.
pub(super) fn backward(
    cuda: &Cuda,
    problem: &Problem<'_, DeviceMemory>,
    plan: &LaunchPlan,
    saved: &Saved,
    upstream: &Upstream<'_, DeviceMemory>,
    mut sinks: GradientSinks<'_, DeviceMemory>,
    scratch: &mut CudaSlice<u8>,
) -> Result<()> {
    let mut addresses = Addresses::new(&cuda.stream);
    let groups = [(Group::Saved, addresses.read(&saved.memory)), (Group::Backward, addresses.write(scratch))];
    // The forward may have been planned for other gradients; what it saved lies where its own plan says.
    let region = |name: &str| match saved.plan.workspace.region(name) {
        Some(r) if r.group == Group::Saved => locate(&saved.plan, &groups[..1], name),
        _ => locate(plan, &groups[1..], name),
    };
    let args = LceArgs {
        problem: addresses.problem(problem)?,
        upstream: addresses.upstream(upstream)?,
        d_embeddings: addresses.sink(&mut sinks.embeddings)?,
        d_classifier: addresses.sink(&mut sinks.classifier)?,
        d_bias: addresses.sink(&mut sinks.bias)?,
        ..planned(plan, &region)
    };
    // SAFETY: as in `forward`; the sinks have the lengths that `checked_backward` found, and are borrowed mutably. What a
    // forward of the same shape saved has the sizes of this plan too: they do not depend on the gradients.
    unsafe { submit(cuda, plan, &plan.backward, &args, &region) }
}

/// Gives the stream `steps` of `plan`, in order. Nothing is waited for.
///
/// # Safety
/// Until the stream has done them, every address in `args` must be of live memory on the stream's device, of the size
/// that the plan gives its region (`region` by name) or that the problem gives its tensor, and nobody else may use it.
unsafe fn submit(
    cuda: &Cuda,
    plan: &LaunchPlan,
    steps: &[Step],
    args: &LceArgs,
    region: &dyn Fn(&str) -> Address,
) -> Result<()> {
    let stream = &cuda.stream;
    stream.context().bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
    // First every entry point, so that an error leaves nothing half done.
    let function = |step: &Step| match step {
        Step::Fill { .. } => Ok(None),
        Step::Launch(launch) => cuda.kernels.function(&launch.entry_point, &launch.kernel).map(Some),
    };
    let functions = steps.iter().map(function).collect::<Result<Vec<_>>>()?;
    let mut maps: Option<TensorMaps> = None;
    let mut mark = cuda.profile.as_ref().map(|_| Profile::mark(stream)).transpose()?;
    for (step, function) in steps.iter().zip(&functions) {
        match (step, function) {
            (Step::Fill { region: name, byte }, _) => {
                let bytes = plan.workspace.region(name).map_or(0, |r| r.bytes);
                if bytes > 0 {
                    // SAFETY: the region has this size, by the caller's promise.
                    unsafe { result::memset_d8_async(region(name), *byte, bytes, stream.cu_stream()) }
                        .map_err(driver("cuMemsetD8Async"))?;
                }
            }
            (Step::Launch(launch), Some(function)) => {
                let round = launch.round;
                let args = LceArgs {
                    first_partial: round.first_partial,
                    splits: round.splits,
                    first_tile: round.first_tile,
                    num_tiles: round.num_tiles,
                    previous_tile: round.previous_tile,
                    round: round.index,
                    redo: launch.redo.into(),
                    ..*args
                };
                let config = LaunchConfig {
                    grid_dim: (launch.grid[0], launch.grid[1], 1),
                    block_dim: (launch.kernel.threads, 1, 1),
                    shared_mem_bytes: launch.kernel.shared,
                };
                if launch.kernel.is_hopper() && maps.is_none() {
                    maps = Some(TensorMaps::new(&args, plan, &launch.kernel)?);
                }
                let hopper =
                    maps.filter(|_| launch.kernel.is_hopper()).map(|maps| LceHopperArgs::new(args, plan, maps));
                let mut builder = stream.launch_builder(function);
                match &hopper {
                    Some(hopper) => builder.arg(hopper),
                    None => builder.arg(&args),
                };
                // SAFETY: the one argument is the one that the kernel declares, and its addresses are the caller's
                // promise; the grid of a cooperative kernel is at most what the device holds, that of clusters a multiple
                // of their blocks (the plan saw to it).
                let done = unsafe {
                    match (&hopper, launch.kernel) {
                        (Some(argument), Kernel { cluster: 2.., .. }) => {
                            launch_clusters(stream, function, config, &launch.kernel, argument)
                        }
                        (_, Kernel { cooperative: true, .. }) => builder.launch_cooperative(config).map(drop),
                        _ => builder.launch(config).map(drop),
                    }
                };
                done.map_err(|error| match driver("cuLaunchKernel")(error) {
                    Error::Device { reason, .. } => Error::Device { call: launch.entry_point.clone(), reason },
                    other => other,
                })?;
            }
            (Step::Launch(_), None) => {} // each launch has its function
        }
        if let (Some(profile), Some(start)) = (&cuda.profile, mark.take()) {
            mark = Some(profile.add(stream, step, start)?);
        }
    }
    Ok(())
}

/// A launch of clusters, which cudarc's builder does not know.
///
/// # Safety
/// As for any launch: `argument` is what the kernel declares, and what it points to is there until the kernel is done.
unsafe fn launch_clusters(
    stream: &CudaStream,
    function: &CudaFunction,
    config: LaunchConfig,
    kernel: &Kernel,
    argument: &LceHopperArgs,
) -> std::result::Result<(), DriverError> {
    // SAFETY: plain data, of whose unions only what the ids say is read.
    let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
    attributes[0].id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[0].value.clusterDim.x = kernel.cluster;
    attributes[0].value.clusterDim.y = 1;
    attributes[0].value.clusterDim.z = 1;
    attributes[1].id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attributes[1].value.cooperative = 1;
    let (grid, block) = (config.grid_dim, config.block_dim);
    let config = sys::CUlaunchConfig {
        gridDimX: grid.0,
        gridDimY: grid.1,
        gridDimZ: grid.2,
        blockDimX: block.0,
        blockDimY: block.1,
        blockDimZ: block.2,
        sharedMemBytes: config.shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: if kernel.cooperative { 2 } else { 1 },
    };
    let mut parameters = [std::ptr::from_ref(argument).cast_mut().cast()];
    // SAFETY: the driver reads the configuration, its attributes and one argument before it returns; the rest is the caller's.
    unsafe { sys::cuLaunchKernelEx(&config, function.cu_function(), parameters.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
}
