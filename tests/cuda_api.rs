//! The CUDA backend's own interface, on the emulated GPU with its checker on: device tensors, raw addresses, streams, graphs,
//! what it allocates and launches, and what it does with targets that nobody could check beforehand.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::compare::bits;
use common::{Expected, Logits, OwnedUpstream, Spec, Tensors};
use cut_cross_entropy::cuda::cudarc::driver::result;
use cut_cross_entropy::cuda::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUmemPool_attribute, CUstreamCaptureMode,
};
use cut_cross_entropy::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use cut_cross_entropy::cuda::{DeviceBuffer, DeviceMemory, DeviceSlice, DeviceSliceMut, Profile};
use cut_cross_entropy::plan::{Group, KernelChoice, LaunchPlan, Step, Workload};
use cut_cross_entropy::{
    CceOptions, Cpu, Cuda, CudaStaged, DType, Error, Forward, GradientFilter, GradientRequest, GradientSinks,
    Gradients, HostBuffer, Inputs, Matrix, Problem, Sink, Upstream, cce_backward, cce_backward_into, cce_forward,
};
use cut_cross_entropy_emulator as emulator;
use std::sync::{Arc, Mutex, MutexGuard};

/// Tests share the emulated device and its counters: one at a time. No report may be left by the test before.
fn device() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    emulator::install().expect("the emulator is built with this test");
    emulator::configure(&emulator::Config::default());
    emulator::take_reports();
    emulator::reset_counters();
    guard
}

fn launched(kernel: &str) -> bool {
    emulator::counters(kernel).is_some()
}

/// `f32` tensors on the device.
struct Uploaded {
    embeddings: CudaSlice<f32>,
    classifier: CudaSlice<f32>,
    targets: CudaSlice<i64>,
    spec: Spec,
}

impl Uploaded {
    fn new(stream: &Arc<CudaStream>, tensors: &Tensors) -> Self {
        Uploaded {
            embeddings: stream.clone_htod(tensors.embeddings.as_f32().expect("f32")).expect("memory"),
            classifier: stream.clone_htod(tensors.classifier.as_f32().expect("f32")).expect("memory"),
            targets: stream.clone_htod(&tensors.targets).expect("memory"),
            spec: tensors.spec,
        }
    }

    fn inputs(&self) -> Inputs<'_, DeviceMemory> {
        let Spec { tokens, hidden, vocab, .. } = self.spec;
        Inputs::new(
            Matrix::new(&self.embeddings, tokens, hidden),
            Matrix::new(&self.classifier, vocab, hidden),
            &self.targets,
        )
    }
}

fn tensors() -> Tensors {
    Spec { ignored: 0.1, ..Spec::new(70, 20, 300) }.generate()
}

fn options() -> CceOptions {
    CceOptions { filter: GradientFilter::Unbiased { eps: 1.0 / 64.0, seed: 3 }, ..CceOptions::default() }
}

fn floats(buffer: &Option<DeviceBuffer>) -> Vec<f32> {
    let slice = buffer.as_ref().and_then(DeviceBuffer::as_f32).expect("an f32 gradient");
    slice.stream().clone_dtoh(slice).expect("readable")
}

/// Bit patterns of the elements of a gradient, whatever their type.
fn element_bits(buffer: &HostBuffer) -> Vec<u32> {
    match buffer {
        HostBuffer::F32(v) => bits(v),
        HostBuffer::F16(v) => v.iter().map(|x| x.to_bits().into()).collect(),
        HostBuffer::BF16(v) => v.iter().map(|x| x.to_bits().into()).collect(),
        other => panic!("{other:?}"),
    }
}

/// Bit patterns of everything that a forward and a backward return.
fn all_bits(forward: &Forward<DeviceMemory>, gradients: &Gradients<DeviceMemory>) -> Vec<Vec<u32>> {
    let host = |slice: &CudaSlice<f32>| bits(&slice.stream().clone_dtoh(slice).expect("readable"));
    vec![
        vec![forward.loss.read().expect("readable").to_bits()],
        host(&forward.losses),
        host(&forward.nll),
        host(&forward.lse),
        host(&forward.target_logit),
        bits(&floats(&gradients.d_embeddings)),
        bits(&floats(&gradients.d_classifier)),
    ]
}

#[test]
fn device_tensors_give_what_the_oracle_says() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let tensors = tensors();
    let uploaded = Uploaded::new(cuda.stream(), &tensors);
    let forward = cce_forward(&cuda, &uploaded.inputs(), &options()).expect("legal");
    let gradients = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
    forward.check().expect("all targets are classes");

    let inputs = tensors.inputs();
    let expected = Expected::new(&Problem::new(&inputs, &options()).expect("legal"));
    let upstream = OwnedUpstream::loss(1.0).widen(tensors.spec.tokens);
    let exact = expected.gradients(&upstream, options().filter);
    exact.check_telemetry(&gradients.telemetry.read().expect("readable")).expect("telemetry");
    let [e, c] = [&gradients.d_embeddings, &gradients.d_classifier].map(|g| HostBuffer::F32(floats(g)));
    exact.check(tensors.spec.hidden, Some(&e), Some(&c), None).expect("gradients");
    assert!((f64::from(forward.loss.read().expect("readable")) - expected.forward.loss).abs() < 1e-5);
}

#[test]
fn outputs_are_bitwise_equal_whatever_the_schedule() {
    let _device = device();
    let cuda = CudaStaged::new(0).expect("an emulated device");
    let wide = |dtype, hidden| Spec { dtype, bias: true, ..Spec::new(140, hidden, 300) }.generate();
    let inputs = [wide(DType::F32, 20), wide(DType::BF16, 64), wide(DType::F16, 37)];
    let schedules = [
        (emulator::Order::Forward, emulator::Async::Lazy, 1),
        (emulator::Order::Forward, emulator::Async::Lazy, 1), // another run, the same schedule
        (emulator::Order::Reverse, emulator::Async::Eager, 2),
        (emulator::Order::Random, emulator::Async::Random, 3),
    ];
    let filters = [options().filter, GradientFilter::Exact];
    for (tensors, filter) in inputs.iter().flat_map(|t| filters.map(|f| (t, f))) {
        let options = CceOptions { filter, label_smoothing: 0.1, ..options() };
        let mut first = None;
        for (seed, (order, async_, workers)) in schedules.into_iter().enumerate() {
            let seed = seed as u64;
            emulator::configure(&emulator::Config { order, async_, seed, check: false, workers, ..Default::default() });
            let inputs = tensors.inputs();
            let forward = cce_forward(&cuda, &inputs, &options).expect("legal");
            let gradients = cce_backward(&cuda, &inputs, &forward, &Upstream::default()).expect("its own");
            let mut found = vec![vec![forward.loss.to_bits()], bits(&forward.losses), bits(&forward.lse)];
            for gradient in [gradients.d_embeddings, gradients.d_classifier, gradients.d_bias] {
                found.push(element_bits(&gradient.expect("asked for")));
            }
            assert_eq!(first.get_or_insert_with(|| found.clone()), &found, "{filter:?}, {order:?}, {workers} workers");
        }
    }
}

#[test]
fn a_target_out_of_range_poisons_its_row_alone_and_is_reported() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let good = Spec::new(70, 20, 300).generate();
    let mut bad = good.clone();
    (bad.targets[5], bad.targets[66]) = (300, -7);
    let (good, bad) = [good, bad].map(|t| Uploaded::new(cuda.stream(), &t)).into();
    for filter in [options().filter, GradientFilter::Exact] {
        let options = CceOptions { filter, reduction: cut_cross_entropy::Reduction::Sum, ..options() };
        let run = |uploaded: &Uploaded| {
            let forward = cce_forward(&cuda, &uploaded.inputs(), &options).expect("not known yet");
            let gradients = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
            (forward, gradients)
        };
        let ((forward, gradients), (right, right_gradients)) = (run(&bad), run(&good));
        let named = Error::TargetOutOfRange { index: 5, value: 300, vocab: 300, ignore_index: -100 };
        assert_eq!(forward.check(), Err(named.clone()));
        assert_eq!(gradients.telemetry.read(), Err(named));
        assert!(forward.loss.read().expect("readable").is_nan());
        let host = |slice: &CudaSlice<f32>| slice.stream().clone_dtoh(slice).expect("readable");
        let rows = [
            (host(&forward.losses), host(&right.losses), 1),
            (host(&forward.nll), host(&right.nll), 1),
            (floats(&gradients.d_embeddings), floats(&right_gradients.d_embeddings), 20),
        ];
        for (ours, right, columns) in rows {
            for (i, (ours, right)) in ours.chunks(columns).zip(right.chunks(columns)).enumerate() {
                match i {
                    5 | 66 => assert!(ours.iter().all(|x| x.is_nan()), "{i}"),
                    _ => assert_eq!(bits(ours), bits(right), "{i}"),
                }
            }
        }
    }
    // No target is a class: the mean has no denominator, and is not the mean over nothing.
    let mut none = Spec::new(3, 20, 300).generate();
    none.targets.fill(300);
    let none = Uploaded::new(cuda.stream(), &none);
    let forward = cce_forward(&cuda, &none.inputs(), &CceOptions::default()).expect("not known yet");
    assert!(forward.loss.read().expect("readable").is_nan());
    assert_eq!(emulator::take_reports(), Vec::<String>::new());
}

#[test]
fn what_is_not_asked_for_is_not_launched() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let uploaded = Uploaded::new(cuda.stream(), &tensors());
    let request = GradientRequest { classifier: false, ..GradientRequest::default() };
    let frozen = CceOptions { gradients: request, ..options() };
    let forward = cce_forward(&cuda, &uploaded.inputs(), &frozen).expect("legal");
    let gradients = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
    assert!(gradients.d_classifier.is_none() && gradients.d_embeddings.is_some());
    assert!(launched("lce_d_embeddings_f32") && launched("lce_filter"));
    assert!(!launched("lce_d_classifier_f32") && !launched("lce_column_count"));

    emulator::reset_counters();
    let nothing = GradientRequest { embeddings: false, classifier: false, bias: false, ..GradientRequest::default() };
    let evaluation = CceOptions { gradients: nothing, ..options() };
    let forward = cce_forward(&cuda, &uploaded.inputs(), &evaluation).expect("legal");
    assert!(!launched("lce_filter") && !launched("lce_target_logit_f32") && launched("lce_combine"));
    let none = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
    assert!(!launched("lce_coefficients") && !launched("lce_exact_f32"));
    assert_eq!(none.telemetry.read().expect("readable").kept_entries, 0);
}

#[test]
fn a_profile_has_every_step_of_the_plans_in_their_order_and_changes_nothing() {
    let _device = device();
    let plain = Cuda::new(0).expect("an emulated device");
    let profile = Arc::new(Profile::default());
    let cuda = plain.clone().with_profile(profile.clone());
    let uploaded = Uploaded::new(cuda.stream(), &tensors());
    let step = |cuda: &Cuda| {
        let forward = cce_forward(cuda, &uploaded.inputs(), &options()).expect("legal");
        let gradients = cce_backward(cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
        all_bits(&forward, &gradients)
    };
    let bits = step(&cuda);
    let times = profile.take().expect("launches that succeed");
    assert!(times.iter().all(|t| t.milliseconds >= 0.0), "{times:?}");
    assert!(times.iter().any(|t| t.milliseconds > 0.0), "{times:?}");
    let names: Vec<_> = times.into_iter().map(|t| (t.name, t.redo)).collect();

    let problem = Problem::new(&uploaded.inputs(), &options()).expect("legal");
    assert_eq!(names, planned(&cuda.plan(&Workload::new(&problem, true)).expect("a plan")));

    assert_eq!(step(&plain), bits);
    assert_eq!(profile.take(), Ok(Vec::new()), "taken, and the backend without it adds nothing");
}

/// What a profile calls the launches of a plan.
fn planned(plan: &LaunchPlan) -> Vec<(String, bool)> {
    let of_step = |step: &Step| match step {
        Step::Fill { region, .. } => (format!("fill {region}"), false),
        Step::Launch(launch) => (launch.entry_point.to_string(), launch.redo),
    };
    plan.forward.iter().chain(&plan.backward).map(of_step).collect()
}

#[test]
fn the_plan_of_host_tensors_is_the_one_that_runs() {
    let _device = device();
    let profile = Arc::new(Profile::default());
    let backend = CudaStaged::new(0).expect("an emulated device").with_profile(profile.clone());
    for (hidden, kernels, unaligned) in [(64, "auto", false), (64, "portable:tiles=all", false), (37, "auto", true)] {
        let backend = backend.clone().with_kernels(kernels.parse::<KernelChoice>().expect("a choice")).with_room(40);
        let tensors = Spec { dtype: DType::BF16, bias: true, ..Spec::new(140, hidden, 300) }.generate();
        let inputs = tensors.inputs();
        let forward = cce_forward(&backend, &inputs, &options()).expect("legal");
        cce_backward(&backend, &inputs, &forward, &Upstream::default()).expect("its own");
        let plan = backend.plan(&Problem::new(&inputs, &options()).expect("legal")).expect("fits");
        let names: Vec<_> =
            profile.take().expect("launches that succeed").into_iter().map(|t| (t.name, t.redo)).collect();
        assert_eq!(names, planned(&plan), "{kernels}");
        assert_eq!(plan.to_string().contains("unaligned"), unaligned, "{plan}");
        assert!(plan.block_entries == 128 * 41, "{plan}");
    }
}

#[test]
fn device_memory_is_what_the_plan_says() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let uploaded = Uploaded::new(cuda.stream(), &Spec::new(300, 16, 700).generate());
    let inputs = uploaded.inputs();
    let problem = Problem::new(&inputs, &options()).expect("legal");
    let plan = cuda.plan(&Workload::new(&problem, true)).expect("fits");
    let used = || {
        let (free, total) = cuda.stream().context().mem_get_info().expect("an emulated device");
        total - free
    };
    let before = used();
    let forward = cce_forward(&cuda, &inputs, &options()).expect("legal");
    let outputs = 4 * (4 * 300 + 1);
    let saved = used() - before - outputs;
    let planned = plan.workspace.group_bytes(Group::Saved);
    // Allocations may be rounded up, each a little; here are six.
    assert!((planned..planned + 6 * 1024).contains(&saved), "{saved} bytes, planned {planned}");
    let gradients = cce_backward(&cuda, &inputs, &forward, &Upstream::default()).expect("its own");
    drop((forward, gradients));
    assert_eq!(used(), before);

    // The most at any time of a pass: outputs, what is kept, and the scratch of the pass.
    let device = cuda.stream().context().cu_device();
    // SAFETY: the device of a live context.
    let pool = unsafe { result::device::get_default_mem_pool(device) }.expect("the device's");
    let high = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let most = |pass: &mut dyn FnMut()| {
        let mut zero = 0_u64;
        // SAFETY: the attribute is 64 bits, which these are.
        unsafe { result::mem_pool::set_attribute(pool, high, (&raw mut zero).cast()) }.expect("resets");
        pass();
        let mut most = 0_u64;
        // SAFETY: as above.
        unsafe { result::mem_pool::get_attribute(pool, high, (&raw mut most).cast()) }.expect("readable");
        most as usize - before
    };
    for filter in [options().filter, GradientFilter::Exact] {
        let options = CceOptions { filter, ..options() };
        let plan = cuda.plan(&Workload::new(&Problem::new(&inputs, &options).expect("legal"), true)).expect("fits");
        let bytes = |group| plan.workspace.group_bytes(group);
        let mut forward = None;
        let of_forward = most(&mut || forward = Some(cce_forward(&cuda, &inputs, &options).expect("legal")));
        let forward = forward.expect("it ran");
        let of_backward = most(&mut || {
            cce_backward(&cuda, &inputs, &forward, &Upstream::default()).expect("its own");
        });
        let gradients = 4 * (300 + 700) * 16;
        let kept = outputs + bytes(Group::Saved);
        for (found, planned) in
            [(of_forward, kept + bytes(Group::Forward)), (of_backward, kept + bytes(Group::Backward) + gradients)]
        {
            assert!((planned..planned + 10 * 1024).contains(&found), "{filter:?}: {found} bytes, planned {planned}");
        }
    }
}

#[test]
fn pools_drop_between_rounds_what_later_sums_rule_out() {
    let _device = device();
    // Every class has p = 1/6000, and a row room for 320 candidates. Rounds of 2, 4, 18 and 23 tiles put 256, 128, 192 and 61
    // aside, of which 64 are right: without the pools being cut, all rows would be exact.
    emulator::configure(&emulator::Config { multiprocessors: 1, ..emulator::Config::default() });
    let cuda = Cuda::new(0).expect("an emulated device");
    let tensors = Spec { logits: Logits::Flat, ..Spec::new(140, 16, 6000) }.generate();
    let uploaded = Uploaded::new(cuda.stream(), &tensors);
    for filter in [options().filter, GradientFilter::Unbiased { eps: 1.0 / 64.0, seed: 12345 }] {
        let options = CceOptions { filter, ..options() };
        let inputs = uploaded.inputs();
        let plan = cuda.plan(&Workload::new(&Problem::new(&inputs, &options).expect("legal"), true)).expect("fits");
        assert!(plan.rounds.len() > 2 && plan.block_entries == 128 * 321, "{plan}");
        let forward = cce_forward(&cuda, &inputs, &options).expect("legal");
        let gradients = cce_backward(&cuda, &inputs, &forward, &Upstream::default()).expect("its own");
        let inputs = tensors.inputs();
        let expected = Expected::new(&Problem::new(&inputs, &options).expect("legal"));
        let exact = expected.gradients(&OwnedUpstream::loss(1.0).widen(tensors.spec.tokens), filter);
        let telemetry = gradients.telemetry.read().expect("readable");
        assert_eq!(telemetry.exact_rows, 0);
        exact.check_telemetry(&telemetry).expect("telemetry");
        let [e, c] = [&gradients.d_embeddings, &gradients.d_classifier].map(|g| HostBuffer::F32(floats(g)));
        exact.check(tensors.spec.hidden, Some(&e), Some(&c), None).expect("gradients");
    }
}

/// A multiple of 16 row tiles: whoever looks for more work finds a group of row tiles that has none.
#[test]
fn the_exact_path_ends_where_row_tiles_are_whole_groups() {
    let _device = device();
    emulator::configure(&emulator::Config { check: false, ..emulator::Config::default() });
    let tensors = Spec::new(2048, 8, 200).generate();
    let options = CceOptions { filter: GradientFilter::Exact, ..CceOptions::default() };
    let backend = CudaStaged::new(0).expect("an emulated device");
    common::suite::check_one(&backend, &tensors, &options, &OwnedUpstream::loss(1.0)).expect("as the oracle says");
}

#[test]
fn a_stream_of_somebody_elses_is_worked_on() {
    let _device = device();
    let stream = CudaContext::new(0).expect("an emulated device").new_stream().expect("a stream");
    let uploaded = Uploaded::new(&stream, &tensors());
    let bits = |cuda: &Cuda| {
        let forward = cce_forward(cuda, &uploaded.inputs(), &options()).expect("legal");
        let gradients = cce_backward(cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
        all_bits(&forward, &gradients)
    };
    let own = Cuda::with_stream(stream.clone()).expect("a backend");
    // SAFETY: a live stream of device 0, which outlives the backend.
    let raw = unsafe { Cuda::from_raw_stream(0, stream.cu_stream().cast()) }.expect("a backend");
    assert_eq!(raw.stream().cu_stream(), stream.cu_stream());
    assert_eq!(bits(&raw), bits(&own));
    drop(raw);
    assert_eq!(bits(&own), bits(&own), "the stream is not destroyed with the backend");
}

#[test]
fn accumulating_sinks_add_in_f32() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let uploaded = Uploaded::new(cuda.stream(), &tensors());
    for filter in [options().filter, GradientFilter::Exact] {
        let options = CceOptions { filter, ..options() };
        let forward = cce_forward(&cuda, &uploaded.inputs(), &options).expect("legal");
        let once = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
        let mut e = cuda.stream().alloc_zeros::<f32>(70 * 20).expect("memory");
        let mut c = cuda.stream().alloc_zeros::<f32>(300 * 20).expect("memory");
        for _ in 0..2 {
            let sinks = GradientSinks {
                embeddings: Sink::Accumulate((&mut e).into()),
                classifier: Sink::Accumulate((&mut c).into()),
                bias: Sink::Skip,
            };
            cce_backward_into(&cuda, &uploaded.inputs(), &forward, &Upstream::default(), sinks).expect("its own");
        }
        for (sum, once) in [(&e, &once.d_embeddings), (&c, &once.d_classifier)] {
            let twice: Vec<f32> = floats(once).iter().map(|x| 2.0 * x).collect();
            assert_eq!(cuda.stream().clone_dtoh(sum).expect("readable"), twice, "{filter:?}");
        }
    }
}

#[test]
fn views_and_raw_addresses_of_any_alignment_are_the_same_tensors() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let tensors = tensors();
    let stream = cuda.stream();
    let uploaded = Uploaded::new(stream, &tensors);
    let forward = cce_forward(&cuda, &uploaded.inputs(), &options()).expect("legal");
    let right = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");

    // The same embeddings one element further on.
    let mut moved = vec![f32::NAN];
    moved.extend(tensors.embeddings.as_f32().expect("f32"));
    let moved = stream.clone_htod(&moved).expect("memory");
    let view = moved.slice(1..);
    let inputs = Inputs { embeddings: Matrix::new(&view, 70, 20), ..uploaded.inputs() };
    let unaligned = cce_forward(&cuda, &inputs, &options()).expect("legal");
    assert!(launched("lce_forward_sm80_f32_unaligned"));
    assert_eq!(unaligned.loss.read(), forward.loss.read());

    // And by address, into gradients by address.
    let mut e = stream.alloc_zeros::<f32>(70 * 20).expect("memory");
    {
        let (address, _guard) = uploaded.embeddings.device_ptr(stream);
        let (sink, _guard) = e.device_ptr_mut(stream);
        // SAFETY: both are of slices of these lengths, which outlive the calls on their own stream.
        let (raw, sink) = unsafe {
            (DeviceSlice::from_raw(address, 70 * 20, DType::F32), DeviceSliceMut::from_raw(sink, 70 * 20, DType::F32))
        };
        let inputs = Inputs { embeddings: Matrix::new(raw, 70, 20), ..uploaded.inputs() };
        let forward = cce_forward(&cuda, &inputs, &options()).expect("legal");
        let sinks = GradientSinks { embeddings: Sink::Overwrite(sink), ..GradientSinks::default() };
        cce_backward_into(&cuda, &inputs, &forward, &Upstream::default(), sinks).expect("its own");
    }
    assert_eq!(bits(&stream.clone_dtoh(&e).expect("readable")), bits(&floats(&right.d_embeddings)));
}

#[test]
fn a_captured_graph_does_it_again_with_new_values() {
    let _device = device();
    let context = CudaContext::new(0).expect("an emulated device");
    // SAFETY: one stream is all that this test uses.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let cuda = Cuda::with_stream(stream.clone()).expect("an emulated device");
    let (first, second) = (tensors(), Spec { seed: 99, ..tensors().spec }.generate());
    let mut uploaded = Uploaded::new(&stream, &first);
    let run = |uploaded: &Uploaded| {
        let forward = cce_forward(&cuda, &uploaded.inputs(), &options()).expect("legal");
        let gradients = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
        (forward, gradients)
    };
    run(&uploaded); // every kernel is loaded
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capturable");
    let (forward, gradients) = run(&uploaded);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).expect("capturable").expect("something was captured");
    stream.memcpy_htod(second.embeddings.as_f32().expect("f32"), &mut uploaded.embeddings).expect("copied");
    graph.launch().expect("runs");
    let captured = all_bits(&forward, &gradients);
    let (forward, gradients) = run(&uploaded);
    assert_eq!(captured, all_bits(&forward, &gradients));
}

#[test]
fn threads_with_streams_of_their_own_do_not_disturb_each_other() {
    let _device = device();
    emulator::configure(&emulator::Config { check: false, ..Default::default() });
    let context = CudaContext::new(0).expect("an emulated device");
    let of_seed = |seed: u64| {
        let stream = context.new_stream().expect("a stream");
        let cuda = Cuda::with_stream(stream.clone()).expect("an emulated device");
        let uploaded = Uploaded::new(&stream, &Spec { seed, ..tensors().spec }.generate());
        let forward = cce_forward(&cuda, &uploaded.inputs(), &options()).expect("legal");
        let gradients = cce_backward(&cuda, &uploaded.inputs(), &forward, &Upstream::default()).expect("its own");
        all_bits(&forward, &gradients)
    };
    let alone: Vec<_> = (0..3).map(of_seed).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|seed| scope.spawn(move || of_seed(seed))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn a_forward_belongs_to_its_backend_and_its_shape() {
    let _device = device();
    let staged = CudaStaged::new(0).expect("an emulated device");
    let tensors = tensors();
    let inputs = tensors.inputs();
    let by_cpu = cce_forward(&Cpu, &inputs, &options()).expect("legal");
    let refused = cce_backward(&staged, &inputs, &by_cpu, &Upstream::default()).err();
    assert!(matches!(refused, Some(Error::ForeignForward { .. })), "{refused:?}");
    let by_cuda = cce_forward(&staged, &inputs, &options()).expect("legal");
    let refused = cce_backward(&Cpu, &inputs, &by_cuda, &Upstream::default()).err();
    assert!(matches!(refused, Some(Error::ForeignForward { .. })), "{refused:?}");
    let other = Spec::new(70, 20, 301).generate();
    let refused = cce_backward(&staged, &other.inputs(), &by_cuda, &Upstream::default()).err();
    assert!(matches!(refused, Some(Error::ForeignForward { .. })), "{refused:?}");
}

#[test]
fn a_problem_that_the_kernels_cannot_index_is_an_error() {
    let _device = device();
    let cuda = Cuda::new(0).expect("an emulated device");
    let nothing = cuda.stream().alloc_zeros::<f32>(1).expect("memory");
    let targets = cuda.stream().alloc_zeros::<i64>(1).expect("memory");
    let view = targets.slice(0..0);
    let inputs = Inputs::new(Matrix::new(&nothing, 0, 0), Matrix::new(&nothing, (1 << 25) + 1, 0), &view);
    let refused = cce_forward(&cuda, &inputs, &CceOptions::default()).err();
    assert!(matches!(refused, Some(Error::Device { ref reason, .. }) if reason.contains("vocab")), "{refused:?}");
}
