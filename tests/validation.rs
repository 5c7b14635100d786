//! Every variant of `Error` is reached, with a message that names tensor, shapes, index and value; nothing panics.

mod common;

use common::{Spec, Tensors};
use cut_cross_entropy::{
    Backend, CceOptions, Cpu, DType, Error, Forward, GradientFilter, GradientSinks, Host, HostBuffer, HostSliceMut,
    Inputs, Matrix, Problem, Result, Sink, Telemetry, Upstream, cce_backward, cce_backward_into, cce_forward,
    cce_forward_backward,
};
use half::f16;
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

fn tensors() -> Tensors {
    Spec { bias: true, class_weights: true, token_weights: true, ..Spec::new(6, 4, 9) }.generate()
}

/// The error of a forward over changed inputs.
fn refused<'a>(change: impl FnOnce(&mut Inputs<'a>)) -> Error {
    let tensors: &'a Tensors = Box::leak(Box::new(tensors())); // lives as long as what the test puts in its place
    let mut inputs = tensors.inputs();
    change(&mut inputs);
    cce_forward(&Cpu, &inputs, &CceOptions::default()).expect_err("must be refused")
}

fn refused_option(options: CceOptions) -> Error {
    cce_forward(&Cpu, &tensors().inputs(), &options).expect_err("must be refused")
}

#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

static FLOATS: [f32; 64] = [0.5; 64];
static HALVES: [f16; 64] = [f16::ONE; 64];
static INTEGERS: [i64; 64] = [1; 64];

#[test]
fn shape_mismatches_name_both_tensors_and_both_shapes() {
    let hidden = refused(|i| i.classifier = Matrix::new(&FLOATS, 9, 5));
    says(&hidden, &["embeddings", "[6, 4]", "classifier", "[9, 5]", "hidden"]);
    assert!(matches!(hidden, Error::ShapeMismatch { .. }));
    says(&refused(|i| i.targets = INTEGERS[..7].into()), &["targets", "[7]", "embeddings", "[6, 4]", "tokens"]);
    says(&refused(|i| i.bias = Some(FLOATS[..8].into())), &["bias", "[8]", "classifier", "[9, 4]", "vocab"]);
    says(&refused(|i| i.class_weights = Some(FLOATS[..10].into())), &["class_weights", "[10]", "[9, 4]", "vocab"]);
    says(&refused(|i| i.token_weights = Some(FLOATS[..0].into())), &["token_weights", "[0]", "[6, 4]", "tokens"]);
}

#[test]
fn short_buffers_and_row_strides() {
    let short = refused(|i| i.embeddings = Matrix::new(&FLOATS[..23], 6, 4));
    says(&short, &["embeddings", "[6, 4]", "needs 24", "holds 23"]);
    assert!(matches!(short, Error::BufferTooShort { needed: 24, len: 23, .. }));
    let strided = refused(|i| i.classifier = Matrix::new(&FLOATS[..51], 9, 4).with_row_stride(6));
    says(&strided, &["classifier", "row stride 6", "needs 52", "holds 51"]);
    let overlapping = refused(|i| i.classifier = Matrix::new(&FLOATS, 9, 4).with_row_stride(3));
    says(&overlapping, &["classifier", "row stride 3", "4 elements"]);
    assert!(matches!(overlapping, Error::RowStride { .. }));
    says(&refused(|i| i.embeddings = i.embeddings.with_row_stride(0)), &["embeddings", "row stride 0"]);
    // The last row needs no padding after it.
    let tensors = tensors();
    let inputs = Inputs { classifier: Matrix::new(&FLOATS[..52], 9, 4).with_row_stride(6), ..tensors.inputs() };
    cce_forward(&Cpu, &inputs, &CceOptions::default()).expect("52 elements are enough");
}

#[test]
fn dtypes() {
    let integers = refused(|i| i.embeddings = Matrix::new(&INTEGERS, 6, 4));
    says(&integers, &["embeddings", "i64", "f32, f16 or bf16"]);
    assert!(matches!(integers, Error::DType { found: DType::I64, .. }));
    says(&refused(|i| i.classifier = Matrix::new(&HALVES, 9, 4)), &["classifier", "f16", "dtype of embeddings"]);
    says(&refused(|i| i.targets = FLOATS[..6].into()), &["targets", "f32", "i64, i32 or u32"]);
    says(&refused(|i| i.bias = Some(INTEGERS[..9].into())), &["bias", "i64"]);
    says(&refused(|i| i.class_weights = Some(HALVES[..9].into())), &["class_weights", "f16", "f32"]);
    says(&refused(|i| i.token_weights = Some(HALVES[..6].into())), &["token_weights", "f16", "f32"]);
    // A bias of another float type is legal.
    let tensors = tensors();
    let inputs = Inputs { bias: Some(HALVES[..9].into()), ..tensors.inputs() };
    cce_forward(&Cpu, &inputs, &CceOptions::default()).expect("an f16 bias with f32 matrices");
}

#[test]
fn targets_and_weights_name_index_and_value() {
    let bad = [0_i64, 1, 2, 9, 4, 5];
    let error = refused(|i| i.targets = (&bad).into());
    says(&error, &["targets[3]", "is 9", "[0, 9)", "-100"]);
    assert!(matches!(error, Error::TargetOutOfRange { index: 3, value: 9, vocab: 9, ignore_index: -100 }));
    let negative = [0_i32, -1, 2, 3, 4, 5];
    says(&refused(|i| i.targets = (&negative).into()), &["targets[1]", "is -1"]);

    for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-0.5, "-0.5")] {
        let mut weights = [1.0_f32; 9];
        weights[7] = value;
        let error = refused(|i| i.class_weights = Some((&weights).into()));
        says(&error, &["class_weights[7]", text, "finite and not negative"]);
        assert!(matches!(error, Error::Weight { index: 7, .. }));
    }
    let weights = [1.0, 1.0, f32::NEG_INFINITY, 1.0, 1.0, 1.0];
    says(&refused(|i| i.token_weights = Some((&weights).into())), &["token_weights[2]", "-inf", "finite"]);
    let tensors = tensors();
    let legal = Inputs { token_weights: Some((&[-1.0_f32, 1.0, 1.0, 1.0, 1.0, 1.0]).into()), ..tensors.inputs() };
    cce_forward(&Cpu, &legal, &CceOptions::default()).expect("token weights may be negative");
}

#[test]
fn options_out_of_range_name_themselves() {
    let default = CceOptions::default();
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for bad in [0.0, -1.0, nan, inf] {
        says(&refused_option(CceOptions { logit_scale: bad, ..default }), &["logit_scale", "finite and positive"]);
        says(&refused_option(CceOptions { softcap: Some(bad), ..default }), &["softcap", "finite and positive"]);
    }
    for bad in [-0.01, 1.01, nan, inf] {
        says(&refused_option(CceOptions { label_smoothing: bad, ..default }), &["label_smoothing", "in [0, 1]"]);
    }
    for bad in [-1e-9, nan, inf] {
        says(&refused_option(CceOptions { z_loss: bad, ..default }), &["z_loss", "finite and not negative"]);
    }
    for eps in [0.0, -0.5, 1.5, 1e-40, nan] {
        for filter in [GradientFilter::Unbiased { eps, seed: 0 }, GradientFilter::Threshold { eps }] {
            let error = refused_option(CceOptions { filter, ..default });
            says(&error, &["filter.eps", "in (0, 1]"]);
            assert!(matches!(error, Error::Option { .. }));
        }
    }
}

#[test]
fn shifts_that_do_not_fit() {
    let with = |shift, seq_len| {
        let tensors = Tensors { seq_len, ..tensors() };
        cce_forward(&Cpu, &tensors.inputs(), &CceOptions { shift, ..CceOptions::default() }).map(drop)
    };
    for (shift, seq_len) in [(6, None), (7, None), (3, Some(3)), (usize::MAX, Some(2)), (0, Some(4)), (1, Some(0))] {
        let error = with(shift, seq_len).expect_err("must be refused");
        assert!(matches!(error, Error::Shift { tokens: 6, .. }), "{error:?}");
    }
    says(&with(3, Some(3)).unwrap_err(), &["shift 3", "3 tokens", "6 tokens", "smaller"]);
    says(&with(1, Some(4)).unwrap_err(), &["divide"]);
    assert_eq!(with(5, None), Ok(()));
    assert_eq!(with(2, Some(3)), Ok(()));
}

#[test]
fn huge_declared_shapes_over_tiny_buffers() {
    let huge = [usize::MAX, usize::MAX / 4, isize::MAX as usize, 1 << 62, 1 << 40, u32::MAX as usize + 1];
    for rows in huge {
        for columns in [0, 1, 4, usize::MAX, 1 << 33] {
            let error = refused(|i| {
                i.embeddings = Matrix::new(&FLOATS, 6, columns);
                i.classifier = Matrix::new(&FLOATS, rows, columns);
            });
            assert!(
                matches!(error, Error::Overflow { .. } | Error::BufferTooShort { .. }),
                "{rows} x {columns}: {error:?}"
            );
            let error = refused(|i| {
                i.embeddings = Matrix::new(&FLOATS, rows, columns);
                i.classifier = Matrix::new(&FLOATS, 9, columns);
            });
            assert!(!error.to_string().is_empty());
        }
        let error = refused(|i| i.classifier = i.classifier.with_row_stride(rows));
        assert!(matches!(error, Error::Overflow { .. } | Error::BufferTooShort { .. }), "{rows}: {error:?}");
    }
    let overflow = refused(|i| {
        i.embeddings = Matrix::new(&FLOATS, 6, 0);
        i.classifier = Matrix::new(&FLOATS, u32::MAX as usize, 0);
    });
    says(&overflow, &["overflows", "4294967295"]);
    assert!(matches!(overflow, Error::Overflow { .. }));
}

#[test]
fn upstream_of_wrong_length_dtype_or_of_an_output_that_is_not_there() {
    let tensors = tensors();
    let inputs = tensors.inputs();
    let forward = cce_forward(&Cpu, &inputs, &CceOptions::default()).expect("legal");
    let backward = |upstream: Upstream<'_>| cce_backward(&Cpu, &inputs, &forward, &upstream).map(drop).unwrap_err();
    let none = Upstream::loss(1.0);
    let five = Some(FLOATS[..5].into());
    says(&backward(Upstream { losses: five, ..none }), &["upstream.losses", "[5]", "[6, 4]", "tokens"]);
    says(&backward(Upstream { nll: five, ..none }), &["upstream.nll", "[5]"]);
    says(&backward(Upstream { lse: five, ..none }), &["upstream.lse", "[5]"]);
    says(&backward(Upstream { entropy: five, ..none }), &["upstream.entropy", "[5]"]);
    says(&backward(Upstream { nll: Some(HALVES[..6].into()), ..none }), &["upstream.nll", "f16", "f32"]);
    says(&backward(Upstream { lse: Some(INTEGERS[..6].into()), ..none }), &["upstream.lse", "i64"]);
    says(&backward(Upstream { loss_scale: five, ..none }), &["upstream.loss_scale", "[5]", "loss is [1, 1]"]);
    says(&backward(Upstream { loss_scale: Some(HALVES[..1].into()), ..none }), &["upstream.loss_scale", "f16"]);
    let missing = backward(Upstream { entropy: Some(FLOATS[..6].into()), ..none });
    says(&missing, &["upstream.entropy", "options.entropy is off"]);
    assert!(matches!(missing, Error::NoSuchGradient { .. }));
}

#[test]
fn sinks_of_wrong_length_or_dtype_and_a_bias_that_is_not_there() {
    let mut tensors = tensors();
    let into = |tensors: &Tensors, sinks: GradientSinks<'_>| {
        let inputs = tensors.inputs();
        let forward = cce_forward(&Cpu, &inputs, &CceOptions::default()).expect("legal");
        cce_backward_into(&Cpu, &inputs, &forward, &Upstream::default(), sinks).unwrap_err()
    };
    let (mut short, mut halves) = ([0.0_f32; 35], [f16::ZERO; 36]);
    let sinks = GradientSinks { classifier: Sink::Overwrite((&mut short[..]).into()), ..Default::default() };
    says(&into(&tensors, sinks), &["d_classifier", "[35]", "[9, 4]"]);
    let sinks = GradientSinks { embeddings: Sink::Overwrite((&mut short[..25]).into()), ..Default::default() };
    says(&into(&tensors, sinks), &["d_embeddings", "[25]", "[6, 4]"]);
    let sinks = GradientSinks { bias: Sink::Accumulate((&mut short[..8]).into()), ..Default::default() };
    says(&into(&tensors, sinks), &["d_bias", "[8]"]);
    let sinks = GradientSinks { classifier: Sink::Accumulate((&mut halves[..]).into()), ..Default::default() };
    let error = into(&tensors, sinks);
    says(&error, &["d_classifier", "f16", "f32"]);
    assert!(matches!(error, Error::DType { .. }));
    tensors.bias = None;
    let sinks = GradientSinks { bias: Sink::Overwrite((&mut short[..9]).into()), ..Default::default() };
    says(&into(&tensors, sinks), &["d_bias", "no bias"]);
}

/// A backend whose forwards are not the CPU's, though they look alike.
struct Foreign;

impl Backend for Foreign {
    type Memory = Host;
    fn name(&self) -> &'static str {
        "foreign"
    }
    fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<HostBuffer> {
        HostBuffer::zeros(tensor, dtype, len)
    }
    fn borrow_mut<'a>(&self, owned: &'a mut HostBuffer) -> HostSliceMut<'a> {
        owned.as_mut()
    }
    fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
        Cpu.forward(problem)
    }
    fn backward(&self, _: &Problem<'_>, _: &Forward, _: &Upstream<'_>, _: GradientSinks<'_>) -> Result<Telemetry> {
        Err(Error::ForeignForward { reason: "another backend computed it".into() })
    }
}

#[test]
fn forwards_over_other_inputs_are_refused() {
    let tensors = tensors();
    let forward = cce_forward(&Cpu, &tensors.inputs(), &CceOptions::default()).expect("legal");
    let with = |other: &Tensors| cce_backward(&Cpu, &other.inputs(), &forward, &Upstream::default()).map(drop);
    for (tokens, hidden, vocab) in [(7, 4, 9), (6, 5, 9), (6, 4, 10)] {
        let error = with(&Spec::new(tokens, hidden, vocab).generate()).unwrap_err();
        says(&error, &["N=6 V=9 D=4", &format!("N={tokens} V={vocab} D={hidden}")]);
        assert!(matches!(error, Error::ForeignForward { .. }));
    }
    says(&with(&Spec { dtype: DType::BF16, ..Spec::new(6, 4, 9) }.generate()).unwrap_err(), &["f32", "bf16"]);
    let mut moved = tensors.clone();
    moved.targets.rotate_left(1);
    says(&with(&moved).unwrap_err(), &["does not belong", "targets"]);
    assert!(cce_backward(&Foreign, &tensors.inputs(), &forward, &Upstream::default()).is_err());
    assert_eq!(with(&tensors), Ok(()));
}

#[test]
fn allocations_that_cannot_be_had_are_errors() {
    let error = Cpu.allocate("d_classifier", DType::F32, usize::MAX / 8).expect_err("no such memory");
    says(&error, &["d_classifier", "cannot allocate"]);
    assert!(matches!(error, Error::Allocation { .. }));
    says(&Cpu.allocate("d_bias", DType::I32, 4).unwrap_err(), &["d_bias", "i32"]);
}

static ACCEPTED: AtomicUsize = AtomicUsize::new(0);

#[test]
fn nothing_panics() {
    throw_anything();
    // Both kinds must have been there, or nothing was tested.
    let accepted = ACCEPTED.load(Ordering::Relaxed);
    assert!((150..=1350).contains(&accepted), "{accepted} of 1500 problems were legal");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is thrown at the entry points: an error or a result, never a panic.
    fn throw_anything(
        shapes in prop::array::uniform4(prop_oneof![8 => 0..9_usize, 1 => Just(usize::MAX), 1 => Just(1 << 33)]),
        strides in prop::array::uniform2(prop_oneof![5 => Just(None), 3 => (0..12_usize).prop_map(Some), 1 => Just(Some(usize::MAX))]),
        lengths in prop::array::uniform5(0..12_usize),
        kinds in prop::array::uniform6(0..5_u8),
        targets in prop::collection::vec(-2..9_i64, 0..9),
        numbers in prop::array::uniform4(prop_oneof![
            20 => 0.01..1.0_f32, 1 => Just(0.0), 1 => Just(-1.0), 1 => Just(f32::NAN), 1 => Just(f32::INFINITY), 1 => Just(1e30)
        ]),
        (shift, seq_len, ignore_index) in (0..4_usize, prop::option::of(0..5_usize), -2..9_i64),
        consistent in any::<bool>(),
    ) {
        let floats: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin() * numbers[0]).collect();
        let halves: Vec<f16> = floats.iter().map(|&x| f16::from_f32(x)).collect();
        let integers: Vec<i32> = (0..64).collect();
        let slice = |kind: u8, len: usize| -> cut_cross_entropy::HostSlice<'_> {
            match kind {
                0 => halves[..len].into(),
                1 => integers[..len].into(),
                _ => floats[..len].into(),
            }
        };
        let [mut n, mut d, mut v, other] = shapes;
        let mut targets = targets;
        if consistent {
            // Half of the cases get past the shape checks.
            (n, d, v) = (targets.len(), d % 7, v % 9);
            targets.iter_mut().for_each(|t| *t = if *t < v as i64 && *t >= 0 { *t } else { ignore_index });
        }
        let seq_len = seq_len.filter(|_| !consistent);
        let matrix = |kind: u8, rows: usize, columns: usize, stride: Option<usize>| {
            let m = Matrix::<'_, Host>::new(slice(kind, 64), rows, columns);
            stride.map_or(m, |s| m.with_row_stride(s))
        };
        let strides = if consistent { [None; 2] } else { strides };
        let kind = |i: usize| if consistent { 3 } else { kinds[i] };
        let vector = |i: usize, len: usize| {
            if kinds[i] == 4 { None } else { Some(slice(kind(i), if consistent { len } else { lengths[i] })) }
        };
        let inputs = Inputs {
            bias: vector(2, v.min(64)),
            class_weights: vector(3, v.min(64)),
            token_weights: vector(4, n.min(64)),
            seq_len,
            ..Inputs::new(
                matrix(kind(0), n, d, strides[0]),
                matrix(kind(1), v, if consistent { d } else { other }, strides[1]),
                &targets,
            )
        };
        let options = CceOptions {
            logit_scale: numbers[1],
            softcap: (kinds[5] == 0).then_some(numbers[2]),
            label_smoothing: if kinds[5] == 1 { numbers[3] } else { 0.0 },
            z_loss: if kinds[5] == 2 { numbers[3] } else { 0.0 },
            filter: match kinds[5] {
                3 => GradientFilter::Exact,
                4 => GradientFilter::Threshold { eps: numbers[2] },
                _ => GradientFilter::Unbiased { eps: numbers[2], seed: 1 },
            },
            shift,
            ignore_index,
            entropy: kinds[0] == 1,
            metrics: true,
            ..CceOptions::default()
        };
        let upstream = Upstream {
            loss: numbers[3],
            losses: if kinds[4] == 0 { Some(slice(kind(3), lengths[3])) } else { None },
            ..Upstream::loss(0.0)
        };
        let _ = cce_forward_backward(&Cpu, &inputs, &options, &upstream);
        if let Ok(forward) = cce_forward(&Cpu, &inputs, &options) {
            ACCEPTED.fetch_add(1, Ordering::Relaxed);
            let mut out = vec![0.0_f32; 64];
            let (a, rest) = out.split_at_mut(lengths[0]);
            let sinks = GradientSinks {
                embeddings: Sink::Accumulate(a.into()),
                bias: Sink::Overwrite((&mut rest[..lengths[1]]).into()),
                ..Default::default()
            };
            let _ = cce_backward_into(&Cpu, &inputs, &forward, &upstream, sinks);
        }
    }
}
