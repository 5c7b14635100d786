//! Sparse gradients as products of tiles by tensor cores, on the emulated GPU with the checker on, against the oracle: each case in 16
//! bits that fits them, under one filter and one schedule in rotation (`CCE_CASES=bias,f16` picks some).
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod common;

use common::cases::{self, Case};
use common::compare::bits;
use common::{Logits, Spec, Tensors, emulated, picked, suite};
use cut_cross_entropy::cuda::DeviceBuffer;
use cut_cross_entropy::plan::{KernelChoice, KernelFamily, Tiles, Tuning};
use cut_cross_entropy::{
    CceOptions, Cuda, CudaStaged, DType, GradientFilter, GradientSinks, HostBuffer, Inputs, Matrix, Reduction, Sink,
    Telemetry, Upstream, cce_backward, cce_backward_into, cce_forward,
};
use cut_cross_entropy_emulator::{self as emulator, Config};

fn tuned(tiles: Tiles) -> KernelChoice {
    KernelChoice { family: KernelFamily::Portable, tuning: Tuning { tiles, ..Tuning::default() } }
}

/// The case in 16 bits, in turn bf16 and f16; `None` where rows are not whole vectors, or many tiles of the same kind take long.
fn in_16_bits((index, case): (usize, Case)) -> Option<Case> {
    let Spec { tokens, hidden, vocab, padding, dtype, .. } = case.spec;
    let dtype = if dtype == DType::F32 { [DType::BF16, DType::F16][index % 2] } else { dtype };
    let fits = hidden > 0 && hidden % 8 == 0 && padding % 8 == 0 && tokens * vocab <= 60_000;
    fits.then_some(Case { spec: Spec { dtype, ..case.spec }, ..case })
}

/// Those of the cases of every backend that fit.
fn of_every_backend() -> Vec<Case> {
    let all = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()];
    let fitting: Vec<Case> = all.into_iter().flatten().enumerate().filter_map(in_16_bits).collect();
    assert!(fitting.len() >= 13, "{} cases", fitting.len());
    fitting
}

/// Several tiles of rows, of classes and of columns, the last of each ragged; hardly any rows; ignored tokens between them; more
/// entries of a row that are in no tile than a warp looks at at a time.
fn of_tiles() -> Vec<Case> {
    let shapes = [
        ("several_tiles", (300, 264, 400), 0.05, Logits::Realistic),
        ("ragged_columns", (130, 136, 200), 0.0, Logits::Realistic),
        ("long_rows", (3, 40, 900), 0.0, Logits::Flat),
        ("one_row", (1, 8, 300), 0.0, Logits::Realistic),
        ("few_rows_left", (200, 72, 260), 0.9, Logits::Realistic),
    ];
    let plain = cases::shapes()[0];
    let case =
        |(index, (name, (tokens, hidden, vocab), ignored, logits)): (usize, (_, (usize, usize, usize), f64, _))| {
            let (bias, dtype) = (index % 2 == 0, [DType::BF16, DType::F16][index % 2]);
            let spec = Spec { ignored, bias, dtype, logits, seed: 31, ..Spec::new(tokens, hidden, vocab) };
            let options = CceOptions { softcap: (index % 3 == 1).then_some(3.0), ..plain.options };
            Case { name, why: "rows, classes and columns that do not divide", spec, options, ..plain }
        };
    shapes.into_iter().enumerate().map(case).collect()
}

fn sparse_filters() -> Vec<GradientFilter> {
    suite::filters().into_iter().filter(|filter| *filter != GradientFilter::Exact).collect()
}

#[test]
fn tiles_match_the_oracle_under_every_schedule() {
    let _guard = emulated::lock();
    emulator::reset_counters();
    let known = [of_tiles(), of_every_backend()].concat();
    let wanted = picked::picked("CCE_CASES", &known.iter().map(|case| case.name.to_string()).collect::<Vec<_>>());
    let is_wanted = |case: &Case| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| name == case.name));
    let (filters, backend) = (sparse_filters(), std::cell::OnceCell::new());
    let mut failures = Vec::new();
    for (turn, case) in known.iter().enumerate().filter(|(_, case)| is_wanted(case)) {
        emulator::configure(&Config { cut: emulated::cuts(turn), ..emulated::schedule(turn) });
        let backend = backend.get_or_init(|| CudaStaged::new(0).expect("an emulated device"));
        // All that there is to share, or what the device takes for faster.
        let tiles = [Tiles::Everywhere, Tiles::WhereFaster][usize::from(turn % 3 == 1)];
        let filter = filters[turn / 3 % filters.len()];
        let failed = suite::check_case_under(&backend.clone().with_kernels(tuned(tiles)), case, &[filter]).err();
        failures.extend(failed.map(|failure| format!("{tiles:?}: {failure}")));
        failures.extend(emulator::take_reports());
    }
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
    if wanted.is_some() {
        println!("only what CCE_CASES picks has run");
        return;
    }
    for kernel in KERNELS {
        assert!(emulator::counters(kernel).is_some_and(|c| c.mma > 0), "{kernel} did not multiply");
    }
}

/// Two blocks of rows, of classes, and of columns, the last of each ragged.
fn several_tiles(dtype: DType) -> Tensors {
    Spec { ignored: 0.05, bias: true, dtype, seed: 9, ..Spec::new(150, 136, 140) }.generate()
}

fn options() -> CceOptions {
    CceOptions { filter: GradientFilter::Unbiased { eps: 1.0 / 256.0, seed: 3 }, ..CceOptions::default() }
}

/// Bit patterns of dE, dC and dbias in f32: into sinks that hold `before`, where it is given, else overwriting NaN; of those that are asked for.
fn gradients(
    backend: &CudaStaged,
    tensors: &Tensors,
    asked: [bool; 3],
    before: Option<f32>,
) -> ([Vec<u32>; 3], Telemetry) {
    let Spec { tokens, hidden, vocab, .. } = tensors.spec;
    let mut buffers = [tokens * hidden, vocab * hidden, vocab].map(|len| vec![before.unwrap_or(f32::NAN); len]);
    let mut sinks = buffers.iter_mut().zip(asked).map(|(buffer, asked)| match asked {
        false => Sink::Skip,
        true if before.is_some() => Sink::Accumulate(buffer.into()),
        true => Sink::Overwrite(buffer.into()),
    });
    let mut next = || sinks.next().expect("three");
    let sinks = GradientSinks { embeddings: next(), classifier: next(), bias: next() };
    let forward = cce_forward(backend, &tensors.inputs(), &options()).expect("legal");
    let telemetry =
        cce_backward_into(backend, &tensors.inputs(), &forward, &Upstream::default(), sinks).expect("its own");
    (buffers.map(|buffer| bits(&buffer)), telemetry)
}

const KERNELS: [&str; 4] = [
    "lce_d_embeddings_tiles_bf16",
    "lce_d_embeddings_tiles_f16",
    "lce_d_classifier_tiles_bf16",
    "lce_d_classifier_tiles_f16",
];

/// Which of these have multiplied.
fn multiplied() -> [bool; 4] {
    KERNELS.map(|kernel| emulator::counters(kernel).is_some_and(|c| c.mma > 0))
}

#[test]
fn gradients_are_the_same_bits_under_every_schedule_and_by_themselves() {
    let _guard = emulated::lock();
    for dtype in [DType::BF16, DType::F16] {
        let tensors = several_tiles(dtype);
        emulator::configure(&emulated::schedule(0));
        let backend = CudaStaged::new(0).expect("an emulated device").with_kernels(tuned(Tiles::Everywhere));
        emulator::reset_counters();
        let (first, _) = gradients(&backend, &tensors, [true; 3], None);
        assert_eq!(multiplied().to_vec(), [dtype == DType::BF16, dtype == DType::F16].repeat(2));
        if dtype == DType::F16 {
            continue; // differs by its rounding alone
        }
        for turn in [4, 8] {
            emulator::configure(&emulated::schedule(turn)); // another order of threads, of atomics, of copies, and of who draws which item
            assert!(gradients(&backend, &tensors, [true; 3], None).0 == first, "{dtype}, turn {turn}");
        }
        for alone in 0..3 {
            let (ours, _) = gradients(&backend, &tensors, [0, 1, 2].map(|k| k == alone), None);
            assert!(ours[alone] == first[alone], "{dtype}, gradient {alone} by itself");
        }
        let (added, _) = gradients(&backend, &tensors, [true; 3], Some(0.25));
        let sums =
            first.map(|of| of.into_iter().map(|bits| (0.25 + f32::from_bits(bits)).to_bits()).collect::<Vec<_>>());
        assert!(added == sums, "{dtype}, added to what was there");
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// Exact rows write every class, from lists of the sparse ones; dE of the others is a product all the same.
#[test]
fn classes_are_no_product_where_a_row_is_exact() {
    let _guard = emulated::lock();
    emulator::configure(&emulated::schedule(2));
    let mut tensors = several_tiles(DType::BF16);
    tensors.set_embedding(7, 3, f32::NAN);
    let backend = CudaStaged::new(0).expect("an emulated device");
    let run = |tiles| gradients(&backend.clone().with_kernels(tuned(tiles)), &tensors, [true; 3], None);
    emulator::reset_counters();
    let [on, off] = [Tiles::Everywhere, Tiles::Off].map(run);
    assert_eq!((on.1.exact_rows, off.1.exact_rows), (1, 1));
    assert_eq!(multiplied(), [true, false, false, false]);
    assert!(on.0[1..] == off.0[1..]);
    let [on, off] = [&on.0[0], &off.0[0]].map(|bits| bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>());
    for (row, (on, off)) in on.chunks(136).zip(off.chunks(136)).enumerate() {
        let close = |(on, off): (&f32, &f32)| (on - off).abs() <= 0.02 * off.abs().max(1e-3);
        let is_right = if row == 7 { on.iter().all(|x| x.is_nan()) } else { on.iter().zip(off).all(close) };
        assert!(is_right, "row {row}");
    }
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// What a token without entries holds is in no product, not even times zero.
#[test]
fn what_rows_without_entries_hold_does_not_matter() {
    let _guard = emulated::lock();
    emulator::configure(&emulated::schedule(1));
    let mut good = several_tiles(DType::BF16);
    // Out of range, which only the device sees; and ignored.
    (good.targets[5], good.targets[140]) = (140, good.spec.ignore_index);
    let mut poisoned = good.clone();
    for (token, value) in [(5, f32::NAN), (140, f32::INFINITY)] {
        (0..136).for_each(|k| poisoned.set_embedding(token, k, value));
    }
    let cuda = Cuda::new(0).expect("an emulated device").with_kernels(tuned(Tiles::Everywhere));
    let options = CceOptions { reduction: Reduction::Sum, ..options() };
    let run = |tensors: &Tensors| {
        let (HostBuffer::BF16(e), HostBuffer::BF16(c)) = (&tensors.embeddings, &tensors.classifier) else {
            panic!("bf16")
        };
        let stream = cuda.stream();
        let (e, c) = (stream.clone_htod(e).expect("memory"), stream.clone_htod(c).expect("memory"));
        let targets = stream.clone_htod(&tensors.targets).expect("memory");
        let Spec { tokens, hidden, vocab, .. } = tensors.spec;
        let inputs = Inputs::new(Matrix::new(&e, tokens, hidden), Matrix::new(&c, vocab, hidden), &targets);
        let forward = cce_forward(&cuda, &inputs, &options).expect("not known yet");
        let gradients = cce_backward(&cuda, &inputs, &forward, &Upstream::default()).expect("its own");
        let read = |buffer: Option<DeviceBuffer>| match buffer {
            Some(DeviceBuffer::BF16(buffer)) => stream.clone_dtoh(&buffer).expect("readable"),
            other => panic!("{other:?}"),
        };
        [read(gradients.d_embeddings), read(gradients.d_classifier)]
            .map(|gradient| gradient.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    emulator::reset_counters();
    let [ours, expected] = [run(&poisoned), run(&good)];
    assert_eq!(multiplied(), [true, false, true, false]);
    assert!(ours == expected);
    let [d_embeddings, d_classifier] =
        ours.map(|of| of.into_iter().map(|x| half::bf16::from_bits(x).is_nan()).collect::<Vec<_>>());
    assert!(d_embeddings.iter().enumerate().all(|(at, &is_nan)| is_nan == (at / 136 == 5)));
    assert!(!d_classifier.contains(&true));
    assert_eq!(emulator::take_reports(), [""; 0]);
}

/// Nor does a row of C that is no number: two rows of the block have a target whose logit is -inf, and bear it by themselves.
#[test]
fn a_masked_target_spoils_the_rows_that_have_it_alone() {
    let _guard = emulated::lock();
    emulator::configure(&emulated::schedule(2));
    let mut tensors = several_tiles(DType::BF16);
    tensors.bias = None;
    tensors.spec.bias = false;
    (0..150).for_each(|token| tensors.set_embedding(token, 0, 1.0));
    (0..140).for_each(|class| tensors.set_classifier(class, 0, if class == 77 { f32::NEG_INFINITY } else { 0.0 }));
    let spoiled = [3, 90];
    tensors.targets.iter_mut().for_each(|target| *target = if *target == 77 { 78 } else { *target });
    spoiled.iter().for_each(|&token| tensors.targets[token] = 77);
    let backend = CudaStaged::new(0).expect("an emulated device");
    emulator::reset_counters();
    let run = |tiles| gradients(&backend.clone().with_kernels(tuned(tiles)), &tensors, [true, true, false], None).0;
    let [tiles, gathers] = [Tiles::Everywhere, Tiles::Off].map(run);
    assert_eq!(multiplied(), [true, false, true, false]);
    for (row, (ours, other)) in tiles[0].chunks(136).zip(gathers[0].chunks(136)).enumerate() {
        let is_finite = |bits: &[u32]| bits.iter().all(|&bits| f32::from_bits(bits).is_finite());
        assert_eq!(
            (is_finite(ours), is_finite(other)),
            [(true, true), (false, false)][usize::from(spoiled.contains(&row))]
        );
    }
    assert!(tiles[1].iter().all(|&bits| f32::from_bits(bits).is_finite()));
    assert_eq!(emulator::take_reports(), [""; 0]);
}
