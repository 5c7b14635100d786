//! The driver's own behaviour: limits, failures, graphs, streams of several threads.
#![cfg(target_os = "linux")]

mod common;

use common::{OrderParams, device};
use cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, result, sys};
use cut_cross_entropy_emulator::{Config, take_reports};

const CONFIG: LaunchConfig = LaunchConfig { grid_dim: (8, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 256 };

fn named(name: &str) -> Config {
    Config { device: name.into(), ..Config::default() }
}

#[test]
fn devices_have_their_limits() {
    for (name, capability, shared) in [
        ("a100", (8, 0), 163),
        ("sm_86", (8, 6), 99),
        ("sm_89", (8, 9), 99),
        ("h200", (9, 0), 227),
        ("sm_120", (12, 0), 99),
    ] {
        let device = device(&named(name));
        assert_eq!(device.context.compute_capability().unwrap(), capability);
        let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        assert_eq!(device.context.attribute(attribute).unwrap(), shared << 10);
        let function = device.module.load_function("example_neighbour").unwrap();
        let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(limit, shared << 10).unwrap();
        assert!(function.set_attribute(limit, (shared << 10) + 1).is_err());
    }
}

#[test]
fn launches_beyond_a_limit_are_refused() {
    let device = device(&named("sm_86"));
    let stream = device.context.default_stream();
    let function = device.module.load_function("example_neighbour").unwrap();
    let out = stream.alloc_zeros::<f32>(8 * 64).unwrap();
    let params = OrderParams { data: 0, flags: 0, out: out.device_ptr(&stream).0, mode: 0 };
    let launch = |config: LaunchConfig, cooperative: bool| {
        let mut launch = stream.launch_builder(&function);
        launch.arg(&params);
        // SAFETY: the parameters are the kernel's.
        unsafe { if cooperative { launch.launch_cooperative(config) } else { launch.launch(config) } }
            .map(|_| ())
            .map_err(|e| e.0)
    };
    assert_eq!(launch(CONFIG, false), Ok(()));
    let too_much = LaunchConfig { shared_mem_bytes: 48 * 1024 + 1, ..CONFIG };
    assert_eq!(
        launch(too_much, false),
        Err(sys::CUresult::CUDA_ERROR_INVALID_VALUE),
        "more than 48 KiB without the attribute"
    );
    let beyond_bounds = LaunchConfig { block_dim: (128, 1, 1), ..CONFIG };
    assert_eq!(launch(beyond_bounds, false), Err(sys::CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
    let too_many = LaunchConfig { grid_dim: (4 * 16 + 1, 1, 1), ..CONFIG };
    assert_eq!(launch(too_many, true), Err(sys::CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE));
    let empty = LaunchConfig { grid_dim: (0, 1, 1), ..CONFIG };
    assert_eq!(launch(empty, false), Err(sys::CUresult::CUDA_ERROR_INVALID_VALUE));
}

#[test]
fn a_failure_sticks_until_its_report_is_taken() {
    let device = device(&Config::default());
    let stream = device.context.default_stream();
    let out = stream.alloc_zeros::<f32>(8 * 64).unwrap();
    let function = device.function("example_neighbour", 256);
    let params = OrderParams { data: 0, flags: 0, out: out.device_ptr(&stream).0, mode: 1 };
    // SAFETY: the parameters are the kernel's, which is wrong on purpose.
    unsafe { stream.launch_builder(&function).arg(&params).launch(CONFIG) }.unwrap();
    let failed = sys::CUresult::CUDA_ERROR_LAUNCH_FAILED;
    assert_eq!(stream.synchronize().unwrap_err().0, failed);
    assert_eq!(stream.alloc_zeros::<f32>(1).unwrap_err().0, failed);
    assert_eq!(take_reports().len(), 1);
    stream.synchronize().unwrap();
}

#[test]
fn captured_work_runs_at_every_launch_of_the_graph() {
    let device = device(&Config::default());
    // SAFETY: one stream.
    unsafe { device.context.disable_event_tracking() };
    let stream = device.context.new_stream().unwrap();
    let function = device.function("example_last_block", 256);
    let data = stream.alloc_zeros::<f32>(8 * 64).unwrap();
    let mut flags = stream.alloc_zeros::<u32>(1).unwrap();
    let out = stream.alloc_zeros::<f32>(64).unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    stream.memset_zeros(&mut flags).unwrap();
    {
        let params = OrderParams {
            data: data.device_ptr(&stream).0,
            flags: flags.device_ptr(&stream).0,
            out: out.device_ptr(&stream).0,
            mode: 0,
        };
        // SAFETY: the parameters are the kernel's.
        unsafe { stream.launch_builder(&function).arg(&params).launch(CONFIG) }.unwrap();
    }
    // Parameters and host memory of the capture are gone by now; the graph has copies.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), [0.0; 64]);
    for _ in 0..2 {
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), [36.0; 64]);
        assert_eq!(stream.clone_dtoh(&flags).unwrap(), [8]);
    }
}

#[test]
fn memory_is_checked_against_its_allocation() {
    let device = device(&Config::default());
    let stream = device.context.new_stream().unwrap();
    let (free, total) = device.context.mem_get_info().unwrap();
    let x = stream.clone_htod(&[1_u32, 2, 3]).unwrap();
    let y = stream.clone_dtod(&x).unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [1, 2, 3]);
    assert_eq!(device.context.mem_get_info().unwrap(), (free - 512, total));
    let address = x.device_ptr(&stream).0;
    // SAFETY: the emulator refuses what lies outside.
    let beyond = unsafe { result::memset_d8_async(address, 0, 13, stream.cu_stream()) };
    assert_eq!(beyond.unwrap_err().0, sys::CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn ptx_of_kernels_that_the_emulator_was_not_built_with_is_interpreted() {
    let device = device(&Config::default());
    let ptx = ".version 8.0\n.target sm_80\n.address_size 64\n
        .visible .entry stranger(.param .u64 to, .param .u32 value)\n{\n
        .reg .b64 %rd<3>;\n.reg .b32 %r<2>;\n
        ld.param.u64 %rd1, [to];\nld.param.u32 %r1, [value];\n
        cvta.to.global.u64 %rd2, %rd1;\nst.global.u32 [%rd2], %r1;\nret;\n}\n";
    let function = device.context.load_module(ptx.into()).unwrap().load_function("stranger").unwrap();
    let stream = device.context.default_stream();
    let mut to = stream.alloc_zeros::<u32>(1).unwrap();
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the parameters are the kernel's.
    unsafe { stream.launch_builder(&function).arg(&mut to).arg(&7_u32).launch(config) }.unwrap();
    assert_eq!(stream.clone_dtoh(&to).unwrap(), [7]);
}

#[test]
fn events_tell_time_and_order() {
    let device = device(&Config::default());
    let stream = device.context.new_stream().unwrap();
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let (start, end) = (device.context.new_event(timed).unwrap(), device.context.new_event(timed).unwrap());
    start.record(&stream).unwrap();
    end.record(&stream).unwrap();
    assert!(end.is_complete());
    assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
    device.context.per_thread_stream().wait(&end).unwrap();
}

#[test]
fn streams_of_several_threads_run_at_once() {
    let device = device(&Config::default());
    let function = device.function("example_neighbour", 256);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let stream = device.context.new_stream().unwrap();
                for _ in 0..5 {
                    let out = stream.alloc_zeros::<f32>(8 * 64).unwrap();
                    let params = OrderParams { data: 0, flags: 0, out: out.device_ptr(&stream).0, mode: 0 };
                    // SAFETY: the parameters are the kernel's.
                    unsafe { stream.launch_builder(&function).arg(&params).launch(CONFIG) }.unwrap();
                    assert_eq!(stream.clone_dtoh(&out).unwrap()[..3], [1.0, 2.0, 3.0]);
                }
            });
        }
    });
}

#[test]
fn what_is_not_there_says_its_name() {
    let device = device(&Config::default());
    let missing = device.module.load_function("no_such_kernel").unwrap_err();
    assert_eq!(missing.0, sys::CUresult::CUDA_ERROR_NOT_FOUND);
    let mut array = std::ptr::null_mut();
    // SAFETY: the call fails before it looks at anything.
    let call = unsafe { sys::cuArrayCreate_v2(&mut array, std::ptr::null()) };
    assert_eq!(call, sys::CUresult::CUDA_ERROR_NOT_SUPPORTED);
}
