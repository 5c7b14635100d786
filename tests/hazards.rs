//! What went wrong in other implementations of this operation, numbered H1 to H17, each as a test that would have
//! caught it. Hazards of devices, streams and vocabulary-parallel groups have no place on a CPU.

mod common;

use common::compare::bits;
use common::expected::{EPS, assert_within};
use common::suite::{check_one, filters, run, run_backward};
use common::{Expected, Logits, OwnedUpstream, Rng, Spec, Tensors, frobenius};
use cut_cross_entropy::{
    CceOptions, Cpu, DType, Error, GradientDType, GradientFilter, GradientRequest, HostBuffer, Inputs, Matrix, Problem,
    Reduction, cce_backward, cce_forward,
};

const EXACT: CceOptions = CceOptions {
    ignore_index: -100,
    reduction: Reduction::Mean,
    softcap: None,
    logit_scale: 1.0,
    label_smoothing: 0.0,
    z_loss: 0.0,
    shift: 0,
    filter: GradientFilter::Exact,
    gradients: GradientRequest { embeddings: true, classifier: true, bias: true, dtype: GradientDType::Input },
    capture: true,
    entropy: false,
    metrics: false,
};

/// Against the oracle under every filter.
#[track_caller]
fn check(tensors: &Tensors, options: &CceOptions, upstream: &OwnedUpstream) {
    for filter in filters() {
        if let Err(message) = check_one(&Cpu, tensors, &CceOptions { filter, ..*options }, upstream) {
            panic!("{filter:?}, {options:?}, {:?}: {message}", tensors.spec);
        }
    }
}

fn loss() -> OwnedUpstream {
    OwnedUpstream::loss(1.0)
}

/// Logits on a grid of 1/64 that are exact in `f32` with an offset of up to 2^17: classifier [V, 2], embeddings (1, 1).
fn grid(tokens: usize, vocab: usize, offset: f64) -> Tensors {
    let mut rng = Rng::new(vocab as u64);
    let classifier: Vec<f64> =
        (0..vocab).flat_map(|_| [offset, ((rng.normal() * 2.0) * 64.0).round() / 64.0]).collect();
    let targets: Vec<i64> = (0..tokens).map(|_| rng.below(vocab) as i64).collect();
    Tensors::dense(&vec![1.0; 2 * tokens], &classifier, 2, &targets)
}

#[test]
fn h01_padded_columns_do_not_leak_into_the_log_sum_exp() {
    // Logits about -30: a padded column's 0 would be the whole softmax.
    for vocab in [1, 255, 257, 513, 769] {
        let spec = Spec { logits: Logits::Offset(-30.0), bias: true, ..Spec::new(66, 16, vocab) };
        check(&spec.generate(), &EXACT, &loss());
        check(&spec.generate(), &CceOptions { softcap: Some(50.0), ..EXACT }, &loss());
    }
}

#[test]
fn h02_a_target_in_the_padding_of_the_last_tile_is_refused_or_ignored() {
    let mut tensors = Spec::new(9, 8, 257).generate();
    for value in [257, 258, 511, -1, i64::MAX, i64::MIN] {
        tensors.targets[4] = value;
        match cce_forward(&Cpu, &tensors.inputs(), &EXACT) {
            Err(Error::TargetOutOfRange { index: 4, value: found, .. }) => assert_eq!(found, value),
            other => panic!("{value}: {other:?}"),
        }
        // The same value as ignore_index is a padded column's number, and must not be looked up there.
        check(&tensors, &CceOptions { ignore_index: value, ..EXACT }, &loss());
    }
}

#[test]
fn h03_bias_and_scale_enter_once_however_long_the_contraction() {
    let mut spec = Spec { bias: true, ..Spec::new(5, 4097, 70) };
    check(&spec.generate(), &CceOptions { logit_scale: 0.5, ..EXACT }, &loss());
    spec.tokens = 70;
    check(&spec.generate(), &EXACT, &loss());
    // By hand: all products 0, so the bias is the logit.
    let mut tensors = Tensors::dense(&[0.0; 600], &[1.0; 1200], 600, &[1]);
    tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(vec![0.0, 2.0]));
    let forward = cce_forward(&Cpu, &tensors.inputs(), &EXACT).expect("legal");
    assert_within("loss", &[forward.loss], &[(1.0 + (-2.0_f64).exp()).ln()], 2.0, 1.0);
}

#[test]
fn h03_bias_gradient_does_not_go_through_the_scale() {
    // A legal scale so small that its product with any gradient is 0 in f32: dbias must not notice.
    let tensors = Spec { bias: true, ..Spec::new(70, 8, 300) }.generate();
    for filter in filters() {
        let options = CceOptions { filter, logit_scale: 1e-44, ..EXACT };
        let (_, got) = run(&Cpu, &tensors, &options, &loss());
        let inputs = tensors.inputs();
        let expected = Expected::new(&Problem::new(&inputs, &options).expect("legal"));
        let gradients = expected.gradients(&loss().widen(70), filter);
        gradients.check(8, None, None, got.d_bias.as_ref()).expect("dbias");
    }
}

#[test]
fn h04_common_offset_does_not_cancel() {
    let exact = grid(70, 300, 0.0);
    let exact = Expected::new(&Problem::new(&exact.inputs(), &EXACT).expect("legal")).forward;
    for offset in [0.0, 1e3, 1e4, 1e5, -1e5] {
        let tensors = grid(70, 300, offset);
        let forward = cce_forward(&Cpu, &tensors.inputs(), &EXACT).expect("legal");
        // An `lse - z_target` in f32 would be wrong by half an ulp of the offset: 4e-3 at 1e5.
        assert_within("nll", &forward.nll, &exact.nll, 4.0, 16.0);
        assert_within("loss", &[forward.loss], &[exact.loss], 4.0, 16.0);
    }
}

#[test]
fn h04_common_offset_does_not_cancel_in_the_gradients_either() {
    for filter in filters() {
        let options = CceOptions { filter, ..EXACT };
        let of = |offset| {
            let (_, got) = run(&Cpu, &grid(70, 300, offset), &options, &loss());
            // Column 1 of dE does not know the offset: Σ_v G_v c_v.
            got.d_embeddings.to_f32_vec().chunks(2).map(|row| row[1]).collect::<Vec<f32>>()
        };
        let exact: Vec<f64> = of(0.0).iter().map(|&x| x.into()).collect();
        for offset in [1e3, 1e5, -1e5] {
            assert_within("d_embeddings", &of(offset), &exact, 16.0, 8.0 / 70.0);
        }
    }
}

#[test]
fn h05_running_maximum_starts_below_everything() {
    for offset in [-200.0, -1000.0, 200.0] {
        let spec = Spec { logits: Logits::Offset(offset), ignored: 0.1, ..Spec::new(67, 16, 300) };
        check(&spec.generate(), &EXACT, &loss());
    }
    // The maximum rises with every tile, and falls with every tile.
    for slope in [0.05, -0.05] {
        let classifier: Vec<f64> = (0..1100).map(|v| slope * f64::from(v)).collect();
        let tensors = Tensors::dense(&vec![1.0; 66], &classifier, 1, &vec![7; 66]);
        check(&tensors, &EXACT, &loss());
    }
}

#[test]
fn h05_masked_classes_count_nothing() {
    let mut tensors = Spec { bias: true, ..Spec::new(68, 8, 600) }.generate();
    // A masked first tile: the running maximum stays -inf through it.
    let masked = |v: usize| v < 300 || v.is_multiple_of(3);
    let bias = (0..600).map(|v| if masked(v) { f32::NEG_INFINITY } else { 0.25 }).collect();
    tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(bias));
    tensors.targets.iter_mut().for_each(|t| *t = 301 + 3 * (*t % 99));
    check(&tensors, &EXACT, &loss());
    // A masked target: its loss is infinite, its gradients are not.
    tensors.targets[3] = 5;
    check(&tensors, &EXACT, &loss());
    // With smoothing every row has an infinite term: +inf, not the NaN of a difference of infinities.
    check(&tensors, &CceOptions { label_smoothing: 0.1, ..EXACT }, &loss());
}

#[test]
fn h05_all_masked_rows_give_nan_and_no_plausible_number() {
    let mut tensors = Spec { bias: true, ..Spec::new(66, 8, 300) }.generate();
    tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(vec![f32::NEG_INFINITY; 300]));
    check(&tensors, &EXACT, &loss());
}

#[test]
fn h05_broken_rows_stay_where_they_are() {
    let clean = Spec { ignored: 0.1, ..Spec::new(150, 8, 300) }.generate();
    for filter in filters() {
        let options = CceOptions { filter, entropy: true, ..EXACT };
        let (before, clean_gradients) = run(&Cpu, &clean, &options, &loss());
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut broken = clean.clone();
            let row = (60..).find(|&i| clean.targets[i] != -100).expect("not all ignored");
            broken.set_embedding(row, 3, poison);
            let (after, gradients) = run(&Cpu, &broken, &options, &loss());
            assert!(after.loss.is_nan() && after.lse[row].is_nan() && after.nll[row].is_nan());
            assert!(after.entropy.as_ref().expect("asked for")[row].is_nan());
            let others = |values: &[f32], columns: usize| {
                let mut values = values.to_vec();
                values.drain(row * columns..(row + 1) * columns);
                bits(&values)
            };
            assert_eq!(others(&before.nll, 1), others(&after.nll, 1), "nll of other rows");
            assert_eq!(others(&before.lse, 1), others(&after.lse, 1), "lse of other rows");
            let d_embeddings = gradients.d_embeddings.to_f32_vec();
            assert!(d_embeddings[row * 8..][..8].iter().all(|x| x.is_nan()));
            let expected = clean_gradients.d_embeddings.to_f32_vec();
            assert_eq!(others(&d_embeddings, 8), others(&expected, 8), "dE of other rows");
            // As in exact arithmetic, a row without probabilities makes every class's gradient unknown.
            assert!(gradients.d_classifier.to_f32_vec().iter().all(|x| x.is_nan()), "{filter:?} {poison}");
        }
        // In an ignored row it is never looked at.
        let mut ignored = clean.clone();
        let row = (0..).find(|&i| clean.targets[i] == -100).expect("some are ignored");
        ignored.set_embedding(row, 0, f32::NAN);
        let (after, gradients) = run(&Cpu, &ignored, &options, &loss());
        assert_eq!(bits(&after.nll), bits(&before.nll));
        assert_eq!(gradients.d_classifier, clean_gradients.d_classifier);
        assert_eq!(gradients.d_embeddings, clean_gradients.d_embeddings);
    }
}

#[test]
fn h06_long_sums_are_not_accumulated_in_16_bits() {
    // 8192 tokens add up in each row of dC, 32768 classes in each row of dE; bf16 partial sums lose 1e-2 and more.
    for (tokens, vocab) in [(8192, 40), (17, 32_768)] {
        for dtype in [DType::BF16, DType::F16] {
            let spec = Spec { dtype, ..Spec::new(tokens, 6, vocab) };
            let gradients = GradientRequest { dtype: GradientDType::F32, ..GradientRequest::default() };
            let options = CceOptions { gradients, ..EXACT };
            let tensors = spec.generate();
            let inputs = tensors.inputs();
            let forward = cce_forward(&Cpu, &inputs, &options).expect("legal");
            let ours = cce_backward(&Cpu, &inputs, &forward, &Default::default()).expect("its own forward");
            let expected = Expected::new(&Problem::new(&inputs, &options).expect("legal"));
            let exact = expected.gradients(&loss().widen(tokens), GradientFilter::Exact);
            let error = |ours: Option<cut_cross_entropy::HostBuffer>, exact: &[f64]| {
                frobenius(ours.expect("asked for").as_f32().expect("asked for in f32"), exact)
            };
            assert!(error(ours.d_classifier, &exact.d_classifier.exact) <= 16.0 * EPS);
            assert!(error(ours.d_embeddings, &exact.d_embeddings.exact) <= 16.0 * EPS);
        }
    }
    // Written in 16 bits, what is rounded once or twice on the way; with several columns of products, of D and of classes.
    for (tokens, hidden, vocab) in [(2500, 3, 300), (70, 520, 2500)] {
        let tensors = Spec { dtype: DType::BF16, ..Spec::new(tokens, hidden, vocab) }.generate();
        let inputs = tensors.inputs();
        let forward = cce_forward(&Cpu, &inputs, &EXACT).expect("legal");
        let ours = cce_backward(&Cpu, &inputs, &forward, &Default::default()).expect("its own forward");
        let expected = Expected::new(&Problem::new(&inputs, &EXACT).expect("legal"));
        let exact = expected.gradients(&loss().widen(tokens), GradientFilter::Exact);
        for (ours, exact) in [(ours.d_classifier, exact.d_classifier), (ours.d_embeddings, exact.d_embeddings)] {
            let mut wide = Vec::new();
            match ours.expect("asked for") {
                HostBuffer::BF16(rounded) => wide.extend(rounded.iter().map(|x| x.to_f32())),
                other => panic!("{other:?}"),
            }
            // Half a unit in the last place of bf16 is 2^-9 of an element.
            let error = frobenius(&wide, &exact.exact);
            assert!(error <= 2.0_f64.powi(-8), "{tokens} tokens, {vocab} classes: {error:e}");
        }
    }
}

#[test]
fn h07_f16_neither_underflows_in_the_mean_nor_overflows_under_a_loss_scale() {
    // 1/N = 6e-5 times p is below f16's smallest number for most entries; their sums are not.
    let tensors = Spec { dtype: DType::F16, ..Spec::new(16_384, 4, 24) }.generate();
    for scale in [1.0, 65_536.0] {
        check(&tensors, &EXACT, &OwnedUpstream::loss(scale));
    }
    let (_, got) = run(&Cpu, &tensors, &EXACT, &OwnedUpstream::loss(65_536.0));
    let norm: f32 = got.d_classifier.to_f32_vec().iter().map(|x| x.abs()).sum();
    assert!(norm.is_finite() && norm > 1.0, "{norm}");
}

#[test]
fn h08_a_filtered_rare_target_keeps_its_gradient() {
    // Class 0 is a target once and improbable everywhere: its row of dC must be the exact -E/N of that token.
    let mut tensors = Spec { bias: true, logits: Logits::Flat, ..Spec::new(64, 16, 900) }.generate();
    let bias = (0..900).map(|v| if v == 0 { -60.0 } else { 0.0 }).collect();
    tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(bias));
    tensors.targets.iter_mut().for_each(|t| *t = (*t).max(1));
    tensors.targets[9] = 0;
    for filter in filters() {
        let (_, got) = run(&Cpu, &tensors, &CceOptions { filter, ..EXACT }, &loss());
        let e = tensors.embeddings.to_f32_vec();
        let exact: Vec<f64> = e[9 * 16..][..16].iter().map(|&e| -f64::from(e) / 64.0).collect();
        assert_within("dC[0]", &got.d_classifier.to_f32_vec()[..16], &exact, 2.0, 0.1 / 64.0);
        assert_within("dbias[0]", &got.d_bias.expect("has a bias").to_f32_vec()[..1], &[-1.0 / 64.0], 2.0, 1.0 / 64.0);
    }
}

#[test]
fn h08_gradients_do_not_depend_on_which_others_are_asked_for() {
    let tensors = Spec { bias: true, ignored: 0.1, ..Spec::new(140, 12, 700) }.generate();
    for filter in filters() {
        let of = |embeddings, classifier, bias| {
            let gradients = GradientRequest { embeddings, classifier, bias, dtype: GradientDType::Input };
            let inputs = tensors.inputs();
            let forward = cce_forward(&Cpu, &inputs, &CceOptions { gradients, filter, ..EXACT }).expect("legal");
            cce_backward(&Cpu, &inputs, &forward, &Default::default()).expect("its own forward")
        };
        let all = of(true, true, true);
        for mask in 0..7 {
            let (e, c, b) = (mask & 1 == 1, mask & 2 == 2, mask & 4 == 4);
            let some = of(e, c, b);
            assert_eq!(some.d_embeddings, all.d_embeddings.clone().filter(|_| e), "{filter:?} {mask}");
            assert_eq!(some.d_classifier, all.d_classifier.clone().filter(|_| c), "{filter:?} {mask}");
            assert_eq!(some.d_bias, all.d_bias.clone().filter(|_| b), "{filter:?} {mask}");
            assert_eq!(some.telemetry.kept_entries, all.telemetry.kept_entries);
        }
    }
}

#[test]
fn h08_flat_softmax_is_not_dropped() {
    // V = 5000 > 1/ε: every p is below ε. A threshold keeps targets only; sampling keeps about 1/ε entries a row, and
    // with them the whole mass: Σ_v G_v stays near 0 instead of -1.
    let mut tensors = Spec { logits: Logits::Flat, ..Spec::new(64, 16, 5000) }.generate();
    tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(vec![0.0; 5000]));
    let sum = |filter| {
        let (_, got) = run(&Cpu, &tensors, &CceOptions { filter, ..EXACT }, &loss());
        got.d_bias.expect("has a bias").to_f32_vec().iter().sum::<f32>()
    };
    assert!(sum(GradientFilter::Threshold { eps: GradientFilter::DEFAULT_EPS }) < -0.99);
    // Spread-out sampling is far better than independent draws, whose deviation would be 4e-3.
    let unbiased = sum(GradientFilter::default());
    assert!(unbiased.abs() <= 4e-3, "{unbiased}");
}

#[test]
fn h09_probabilities_of_the_backward_sum_to_one() {
    for offset in [0.0, 1e4, 1e5] {
        let mut tensors = grid(1, 700, offset);
        tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(vec![0.0; 700]));
        let (_, got) = run(&Cpu, &tensors, &EXACT, &loss());
        let sum: f64 = got.d_bias.expect("has a bias").to_f32_vec().iter().map(|&g| f64::from(g)).sum();
        assert!(sum.abs() <= 8.0 * EPS, "offset {offset}: {sum}");
    }
}

#[test]
fn h10_softcap_derivative_order_and_masks() {
    let spec = Spec { bias: true, logits: Logits::Steep, ..Spec::new(70, 12, 400) };
    for (softcap, logit_scale) in [(30.0, 1.0), (2.0, 3.0), (1e-3, 1.0), (1e4, 0.2)] {
        check(&spec.generate(), &CceOptions { softcap: Some(softcap), logit_scale, ..EXACT }, &loss());
    }
    // A -inf bias under a softcap is the cap, as the formula says: tanh(-inf) = -1.
    let mut tensors = Spec { bias: true, ..Spec::new(70, 12, 400) }.generate();
    let bias = (0..400).map(|v| if v % 2 == 0 { f32::NEG_INFINITY } else { 0.5 }).collect();
    tensors.bias = Some(cut_cross_entropy::HostBuffer::F32(bias));
    check(&tensors, &CceOptions { softcap: Some(4.0), ..EXACT }, &loss());
}

#[test]
fn h11_z_loss_goes_with_every_reduction_and_other_upstreams() {
    let tensors = Spec { ignored: 0.3, token_weights: true, ..Spec::new(66, 12, 300) }.generate();
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
        for label_smoothing in [0.0, 0.1] {
            let options = CceOptions { reduction, label_smoothing, z_loss: 0.05, entropy: true, ..EXACT };
            check(&tensors, &options, &OwnedUpstream::everything(66, true, &mut Rng::new(3)));
            check(&tensors, &options, &loss());
        }
    }
}

#[test]
fn h12_mean_over_nothing_is_zero_with_zero_gradients() {
    for (tokens, ignored) in [(0, 0.0), (37, 1.0)] {
        let tensors = Spec { bias: true, ignored, ..Spec::new(tokens, 8, 300) }.generate();
        for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
            for filter in filters() {
                let options = CceOptions { reduction, filter, entropy: true, metrics: true, z_loss: 0.1, ..EXACT };
                let upstream = OwnedUpstream::everything(tokens, true, &mut Rng::new(1));
                let (forward, got) = run(&Cpu, &tensors, &options, &upstream);
                assert_eq!((forward.loss, forward.accuracy), (0.0, Some(0.0)));
                assert!(forward.nll.iter().chain(&forward.lse).chain(&forward.losses).all(|&x| x == 0.0));
                assert_eq!(forward.argmax, Some(vec![u32::MAX; tokens]));
                // The buffers held NaN: zeros were written.
                let zero = |b: &cut_cross_entropy::HostBuffer| b.to_f32_vec().iter().all(|&x| x == 0.0);
                assert!(zero(&got.d_embeddings) && zero(&got.d_classifier) && zero(&got.d_bias.expect("has a bias")));
                assert_eq!((got.telemetry.rows, got.telemetry.kept_entries), (0, 0));
            }
        }
    }
}

#[test]
fn h13_ignore_index_inside_the_vocabulary_and_every_target_type() {
    let tensors = Spec { ignored: 0.4, ignore_index: 7, ..Spec::new(66, 8, 300) }.generate();
    let options = CceOptions { ignore_index: 7, ..EXACT };
    check(&tensors, &options, &loss());
    let wide = cce_forward(&Cpu, &tensors.inputs(), &options).expect("legal");
    let as_i32: Vec<i32> = tensors.targets.iter().map(|&t| t as i32).collect();
    let as_u32: Vec<u32> = tensors.targets.iter().map(|&t| t as u32).collect();
    for targets in [(&as_i32).into(), (&as_u32).into()] {
        let forward = cce_forward(&Cpu, &Inputs { targets, ..tensors.inputs() }, &options).expect("legal");
        assert_eq!(bits(&forward.losses), bits(&wide.losses));
    }
    // The default -100 in u32 is 4294967196, which is no class.
    let wrapped: Vec<u32> = tensors.targets.iter().map(|_| -100_i32 as u32).collect();
    let result = cce_forward(&Cpu, &Inputs { targets: (&wrapped).into(), ..tensors.inputs() }, &EXACT);
    assert!(matches!(result, Err(Error::TargetOutOfRange { index: 0, value: 4_294_967_196, .. })));
}

#[test]
fn h14_products_of_sizes_beyond_32_bits() {
    // N·V = 3.3e9. All tokens but the last few are ignored, so that it takes no time.
    let mut tensors = Spec::new(65_536, 2, 50_257).generate();
    tensors.targets[..65_530].fill(-100);
    tensors.targets[65_535] = 50_256;
    let (forward, got) = run(&Cpu, &tensors, &EXACT, &loss());
    // The oracle would materialise N·V: it gets the last tokens alone.
    let tail = Tensors::dense(
        &tensors.embeddings.to_f32_vec()[2 * 65_530..].iter().map(|&x| x.into()).collect::<Vec<f64>>(),
        &tensors.classifier.to_f32_vec().iter().map(|&x| x.into()).collect::<Vec<f64>>(),
        2,
        &tensors.targets[65_530..],
    );
    let exact = Expected::new(&Problem::new(&tail.inputs(), &EXACT).expect("legal"));
    let gradients = exact.gradients(&loss().widen(6), GradientFilter::Exact);
    assert_within("nll", &forward.nll[65_530..], &exact.forward.nll, 4.0, 16.0);
    gradients.check(2, None, Some(&got.d_classifier), None).expect("dC");
    let d_embeddings = got.d_embeddings.to_f32_vec();
    assert!(d_embeddings[..2 * 65_530].iter().all(|&x| x == 0.0));
    let d_embeddings = cut_cross_entropy::HostBuffer::F32(d_embeddings[2 * 65_530..].to_vec());
    gradients.check(2, Some(&d_embeddings), None, None).expect("dE");
}

#[test]
fn h15_unaligned_bases_and_different_row_strides() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let tensors = Spec { dtype, ..Spec::new(70, 19, 290) }.generate();
        let (e, c) = (tensors.embeddings.to_f32_vec(), tensors.classifier.to_f32_vec());
        let spread = |values: &[f32], base: usize, stride: usize| {
            let mut out = vec![f64::NAN; base];
            for row in values.chunks(19) {
                out.extend(row.iter().map(|&x| f64::from(x)));
                out.resize(out.len() + stride - 19, f64::NAN);
            }
            out.truncate(out.len() - (stride - 19)); // nothing after the last row
            common::data::buffer(dtype, &out)
        };
        let (e, c) = (spread(&e, 1, 23), spread(&c, 3, 20));
        fn skip<'a>(buffer: &'a cut_cross_entropy::HostBuffer, n: usize) -> cut_cross_entropy::HostSlice<'a> {
            use cut_cross_entropy::HostBuffer::{BF16, F16, F32};
            match buffer {
                F32(v) => v[n..].into(),
                F16(v) => v[n..].into(),
                BF16(v) => v[n..].into(),
                _ => unreachable!("three float types"),
            }
        }
        let moved = Inputs {
            embeddings: Matrix::new(skip(&e, 1), 70, 19).with_row_stride(23),
            classifier: Matrix::new(skip(&c, 3), 290, 19).with_row_stride(20),
            ..tensors.inputs()
        };
        for filter in filters() {
            let options = CceOptions { filter, ..EXACT };
            let of = |inputs: &Inputs<'_>| {
                let forward = cce_forward(&Cpu, inputs, &options).expect("legal");
                let gradients = cce_backward(&Cpu, inputs, &forward, &Default::default()).expect("its own forward");
                (bits(&forward.losses), gradients.d_embeddings, gradients.d_classifier)
            };
            assert!(of(&moved) == of(&tensors.inputs()), "{dtype} {filter:?}");
        }
    }
}

#[test]
fn h16_per_token_upstream_enters_before_the_sum_over_tokens() {
    let tensors = Spec { ignored: 0.2, ..Spec::new(66, 12, 300) }.generate();
    let options = CceOptions { reduction: Reduction::None, ..EXACT };
    let mut upstream = OwnedUpstream::loss(0.0);
    upstream.losses = Some((0..66).map(|i| (i as f32 - 30.0) / 16.0).collect());
    check(&tensors, &options, &upstream);
    // A NaN belongs to its token.
    upstream.losses.as_mut().expect("set")[20] = f32::NAN;
    for filter in filters() {
        let (forward, got) = run(&Cpu, &tensors, &CceOptions { filter, ..options }, &upstream);
        let ignored = tensors.targets[20] == -100;
        assert!(forward.loss.is_finite());
        for (i, row) in got.d_embeddings.to_f32_vec().chunks(12).enumerate() {
            assert_eq!(row.iter().any(|x| x.is_nan()), i == 20 && !ignored, "row {i} under {filter:?}");
        }
    }
}

#[test]
fn h16_second_backward_zero_and_scaled_upstream() {
    let tensors = Spec { bias: true, ignored: 0.2, ..Spec::new(150, 12, 300) }.generate();
    for filter in filters() {
        let options = CceOptions { filter, ..EXACT };
        let (forward, first) = run(&Cpu, &tensors, &options, &loss());
        let again = run_backward(&Cpu, &tensors, &forward, &loss());
        assert_eq!((&first.d_embeddings, &first.d_classifier), (&again.d_embeddings, &again.d_classifier));
        let zero = run_backward(&Cpu, &tensors, &forward, &OwnedUpstream::loss(0.0));
        assert!(zero.d_embeddings.to_f32_vec().iter().chain(&zero.d_classifier.to_f32_vec()).all(|&x| x == 0.0));
        // A power of two is exact all the way through.
        let scaled = run_backward(&Cpu, &tensors, &forward, &OwnedUpstream::loss(-4.0));
        let times = |b: &cut_cross_entropy::HostBuffer| b.to_f32_vec().iter().map(|x| x * -4.0).collect::<Vec<_>>();
        assert_eq!(scaled.d_embeddings.to_f32_vec(), times(&first.d_embeddings), "{filter:?}");
        assert_eq!(scaled.d_classifier.to_f32_vec(), times(&first.d_classifier), "{filter:?}");
    }
}

#[test]
fn h17_shift_stays_inside_sequences_and_composes_with_ignored_tokens() {
    for (shift, seq_len) in [(1, None), (1, Some(11)), (3, Some(11)), (10, Some(11)), (1, Some(2)), (65, None)] {
        let spec = Spec { ignored: 0.2, token_weights: true, ..Spec::new(66, 8, 290) };
        let tensors = Tensors { seq_len, ..spec.generate() };
        check(&tensors, &CceOptions { shift, ..EXACT }, &loss());
        // The same by hand: targets moved, tails ignored.
        let (seq, mut moved) = (seq_len.unwrap_or(66), tensors.clone());
        for i in 0..66 {
            moved.targets[i] = if i % seq + shift < seq { tensors.targets[i + shift] } else { -100 };
        }
        let options = CceOptions { shift, ..EXACT };
        let (ours, ours_gradients) = run(&Cpu, &tensors, &options, &loss());
        let (hand, hand_gradients) = run(&Cpu, &moved, &EXACT, &loss());
        assert_eq!((ours.loss, bits(&ours.losses)), (hand.loss, bits(&hand.losses)));
        assert_eq!(ours_gradients.d_classifier, hand_gradients.d_classifier);
    }
    let tensors = Tensors { seq_len: Some(11), ..Spec::new(66, 8, 290).generate() };
    for shift in [11, 12, 66, usize::MAX] {
        let result = cce_forward(&Cpu, &tensors.inputs(), &CceOptions { shift, ..EXACT });
        assert!(matches!(result, Err(Error::Shift { .. })), "{shift}");
    }
}
