//! Random small problems against the oracle, and the algebra of the backward: sinks, linearity, repetition.

mod common;

use common::suite::{check_one, run, run_backward};
use common::{Logits, OwnedUpstream, Rng, Spec, Tensors};
use cut_cross_entropy::{
    CceOptions, Cpu, DType, GradientFilter, GradientSinks, HostBuffer, HostSliceMut, Reduction, Sink,
    cce_backward_into, cce_forward,
};
use proptest::prelude::*;

fn filter() -> impl Strategy<Value = GradientFilter> {
    let eps = (0..14_i32).prop_map(|k| 2.0_f32.powi(-k));
    prop_oneof![
        Just(GradientFilter::Exact),
        (eps.clone(), any::<u64>()).prop_map(|(eps, seed)| GradientFilter::Unbiased { eps, seed }),
        eps.prop_map(|eps| GradientFilter::Threshold { eps }),
    ]
}

fn logits() -> impl Strategy<Value = Logits> {
    prop_oneof![
        6 => Just(Logits::Realistic),
        1 => Just(Logits::Flat),
        1 => Just(Logits::Confident),
        1 => Just(Logits::Steep),
        1 => Just(Logits::Ties),
        2 => (-300.0..300.0_f64).prop_map(Logits::Offset),
    ]
}

prop_compose! {
    /// Shapes weighted towards tiny ones and the edges of tiles and blocks.
    fn spec()(
        tokens in prop_oneof![0..12_usize, 60..80_usize, 140..150_usize],
        hidden in prop_oneof![0..9_usize, 30..36_usize, 63..66_usize],
        vocab in prop_oneof![1..9_usize, 60..66_usize, 125..131_usize, 250..262_usize, 510..516_usize],
        dtype in prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)],
        logits in logits(),
        ignored in prop_oneof![Just(0.0), Just(0.3), Just(1.0)],
        flags in prop::array::uniform3(any::<bool>()),
        padding in 0..4_usize,
        seed in any::<u64>(),
    ) -> Spec {
        // A logit of 300 has an ulp of 0.25 in 16 bits: that tests the input, not the operation.
        let logits = if dtype != DType::F32 && matches!(logits, Logits::Offset(_)) { Logits::Realistic } else { logits };
        let [bias, class_weights, token_weights] = flags;
        Spec {
            dtype, logits, ignored, bias, class_weights, token_weights, padding, seed,
            ..Spec::new(tokens, hidden, vocab)
        }
    }
}

prop_compose! {
    fn options()(
        reduction in prop_oneof![Just(Reduction::Mean), Just(Reduction::Sum), Just(Reduction::None)],
        softcap in prop::option::of(0.5..50.0_f32),
        logit_scale in prop_oneof![Just(1.0_f32), 0.1..3.0_f32],
        label_smoothing in prop_oneof![3 => Just(0.0_f32), 1 => 0.0..=1.0_f32],
        z_loss in prop_oneof![Just(0.0_f32), 0.0..0.1_f32],
        shift in prop_oneof![3 => Just(0_usize), 1 => Just(1_usize)],
        flags in prop::array::uniform3(any::<bool>()),
        filter in filter(),
    ) -> CceOptions {
        let [capture, entropy, metrics] = flags;
        CceOptions {
            reduction, softcap, logit_scale, label_smoothing, z_loss, shift, filter, capture, entropy, metrics,
            ..CceOptions::default()
        }
    }
}

proptest! {
    // 300 problems, others in every run; PROPTEST_CASES asks for more, a failure prints the smallest problem it finds.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn any_small_problem_matches_the_oracle(spec in spec(), options in options(), every in any::<bool>()) {
        let shift = if spec.tokens > options.shift { options.shift } else { 0 };
        let options = CceOptions { shift, ..options };
        let upstream = if every {
            OwnedUpstream::everything(spec.tokens, options.entropy, &mut Rng::new(spec.seed))
        } else {
            OwnedUpstream::loss(-0.75)
        };
        if let Err(message) = check_one(&Cpu, &spec.generate(), &options, &upstream) {
            return Err(TestCaseError::fail(message));
        }
    }
}

fn filters() -> [GradientFilter; 3] {
    [GradientFilter::Exact, GradientFilter::default(), GradientFilter::Threshold { eps: 1e-2 }]
}

fn problem() -> Tensors {
    Spec { bias: true, ignored: 0.2, ..Spec::new(150, 12, 300) }.generate()
}

#[test]
fn accumulating_sinks_add_and_overwriting_sinks_forget() {
    for dtype in [DType::F32, DType::BF16] {
        let tensors = Spec { dtype, ..problem().spec }.generate();
        for (filter, label_smoothing) in filters().into_iter().zip([0.1, 0.0, 0.1]) {
            let options = CceOptions { filter, label_smoothing, ..CceOptions::default() };
            let inputs = tensors.inputs();
            let forward = cce_forward(&Cpu, &inputs, &options).expect("legal");
            let mut rng = Rng::new(8);
            let mut random = |len: usize| (0..len).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
            let before = [random(150 * 12), random(300 * 12), random(300)];
            let backward = |buffers: &mut [Vec<f32>; 3], accumulate: bool| {
                let [e, c, b] = buffers.each_mut().map(HostSliceMut::from);
                let sink = |buffer| if accumulate { Sink::Accumulate(buffer) } else { Sink::Overwrite(buffer) };
                let sinks = GradientSinks { embeddings: sink(e), classifier: sink(c), bias: sink(b) };
                cce_backward_into(&Cpu, &inputs, &forward, &Default::default(), sinks).expect("its own forward");
            };
            let mut alone = [150 * 12, 300 * 12, 300].map(|len| vec![f32::NAN; len]);
            backward(&mut alone, false);
            let mut added = before.clone();
            backward(&mut added, true);
            for ((before, alone), added) in before.iter().zip(&alone).zip(&added) {
                // One f32 addition an element, so this is an equality.
                let sum: Vec<f32> = before.iter().zip(alone).map(|(b, a)| b + a).collect();
                assert_eq!(&sum, added, "{filter:?}");
            }
            backward(&mut added, true);
            backward(&mut added, false);
            assert_eq!(added, alone, "{filter:?}: what was there before is gone");
        }
    }
}

#[test]
fn gradients_are_linear_in_the_upstream() {
    let tensors = problem();
    for filter in filters() {
        let options = CceOptions { filter, entropy: true, z_loss: 0.01, ..CceOptions::default() };
        let mut rng = Rng::new(12);
        let [a, b] = [(); 2].map(|()| OwnedUpstream::everything(150, true, &mut rng));
        let sum = |x: &Option<Vec<f32>>, y: &Option<Vec<f32>>| {
            Some(x.iter().flatten().zip(y.iter().flatten()).map(|(x, y)| x + 2.0 * y).collect())
        };
        let both = OwnedUpstream {
            loss: a.loss + 2.0 * b.loss,
            loss_scale: a.loss_scale, // that of b, too
            losses: sum(&a.losses, &b.losses),
            nll: sum(&a.nll, &b.nll),
            lse: sum(&a.lse, &b.lse),
            entropy: sum(&a.entropy, &b.entropy),
        };
        let (forward, of_a) = run(&Cpu, &tensors, &options, &a);
        let [of_b, of_both] = [&b, &both].map(|upstream| run_backward(&Cpu, &tensors, &forward, upstream));
        let check = |what, a: &HostBuffer, b: &HostBuffer, both: &HostBuffer| {
            let exact: Vec<f64> =
                a.to_f32_vec().iter().zip(b.to_f32_vec()).map(|(&a, b)| f64::from(a) + 2.0 * f64::from(b)).collect();
            let relative = common::frobenius(&both.to_f32_vec(), &exact);
            assert!(relative <= 1e-6, "{what} under {filter:?}: {relative:e}");
        };
        check("dE", &of_a.d_embeddings, &of_b.d_embeddings, &of_both.d_embeddings);
        check("dC", &of_a.d_classifier, &of_b.d_classifier, &of_both.d_classifier);
    }
}

#[test]
fn an_upstream_of_losses_is_the_upstream_of_their_sum() {
    let tensors = problem();
    for filter in filters() {
        let options = CceOptions { filter, reduction: Reduction::Sum, ..CceOptions::default() };
        let ones = OwnedUpstream { losses: Some(vec![0.5; 150]), ..OwnedUpstream::loss(0.0) };
        let (forward, by_token) = run(&Cpu, &tensors, &options, &ones);
        let by_sum = run_backward(&Cpu, &tensors, &forward, &OwnedUpstream::loss(0.5));
        assert_eq!(by_token.d_embeddings, by_sum.d_embeddings);
        assert_eq!(by_token.d_classifier, by_sum.d_classifier);
    }
}

/// Identity classifier and powers of two: no rounding anywhere, so equality instead of tolerance.
#[test]
fn exact_arithmetic_gives_exact_results() {
    let identity: Vec<f64> = (0..64).map(|i| f64::from(u8::from(i % 9 == 0))).collect();
    // Equal logits: p = 1/8 exactly, lse = z + ln 8.
    let tensors = Tensors::dense(&[0.5; 32], &identity, 8, &[0, 3, 7, 3]);
    for filter in [GradientFilter::Exact, GradientFilter::Threshold { eps: 0.125 }] {
        let options = CceOptions { filter, metrics: true, ..CceOptions::default() };
        let (forward, got) = run(&Cpu, &tensors, &options, &OwnedUpstream::loss(1.0));
        assert_eq!(forward.argmax, Some(vec![0; 4]), "the lowest of equals");
        assert_eq!((forward.accuracy, forward.nll[2]), (Some(0.25), 8.0_f32.ln()));
        for (i, row) in got.d_embeddings.to_f32_vec().chunks(8).enumerate() {
            for (v, &g) in row.iter().enumerate() {
                let one_hot = f32::from(u8::from(v as i64 == tensors.targets[i]));
                assert_eq!(g, (0.125 - one_hot) / 4.0, "({i}, {v}) under {filter:?}");
            }
        }
        // dC_v = Σ_i G_iv / 2: class 3 is a target twice.
        let d_classifier = got.d_classifier.to_f32_vec();
        assert_eq!(d_classifier[3 * 8], (4.0 * 0.125 - 2.0) / 4.0 * 0.5);
        assert_eq!(d_classifier[8 + 5], 4.0 * 0.125 / 4.0 * 0.5);
    }
}
