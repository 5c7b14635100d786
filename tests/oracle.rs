//! Proof of the oracle: exact cases written out by hand, and finite differences of everything.
//!
//! Everything else is proven by the oracle, so nothing here may come from it or from a backend.

mod common;

use common::{Expected, OwnedUpstream, Rng, Spec, Tensors};
use cut_cross_entropy::reference::{Reference, ReferenceForward, ReferenceGradients, ReferenceUpstream};
use cut_cross_entropy::{CceOptions, GradientFilter, Problem, Reduction};

/// Logits ln 1, ln 2, ln 3, ln 4 by an identity classifier: p = 0.1, 0.2, 0.3, 0.4 and lse = ln 10, in every row.
fn tenths(targets: &[Option<usize>], options: CceOptions) -> Reference {
    Reference {
        embeddings: targets.iter().flat_map(|_| [1.0, 2.0, 3.0, 4.0].map(f64::ln)).collect(),
        classifier: (0..16).map(|i| f64::from(u8::from(i % 5 == 0))).collect(),
        bias: vec![0.0; 4],
        targets: targets.to_vec(),
        class_weights: vec![1.0; 4],
        token_weights: vec![1.0; targets.len()],
        hidden: 4,
        options,
    }
}

#[track_caller]
fn near(ours: f64, exact: f64) {
    assert!((ours - exact).abs() <= 1e-12 * exact.abs().max(1.0), "{ours} instead of {exact}");
}

fn with(reduction: Reduction) -> CceOptions {
    CceOptions { reduction, ..CceOptions::default() }
}

#[test]
fn outputs_of_a_softmax_of_tenths() {
    let out = tenths(&[Some(0), Some(3), None], CceOptions::default()).forward();
    near(out.nll[0], 10.0_f64.ln());
    near(out.nll[1], 2.5_f64.ln());
    near(out.lse[1], 10.0_f64.ln());
    near(out.target_logit[1], 4.0_f64.ln());
    let entropy: f64 = [0.1_f64, 0.2, 0.3, 0.4].iter().map(|p| -p * p.ln()).sum();
    near(out.entropy[0], entropy);
    assert_eq!(out.argmax, [Some(3), Some(3), None]);
    near(out.accuracy, 0.5);
    near(out.loss, (10.0_f64.ln() + 2.5_f64.ln()) / 2.0);
    assert_eq!((out.nll[2], out.lse[2], out.losses[2]), (0.0, 0.0, 0.0));
}

#[test]
fn gradients_of_a_softmax_of_tenths() {
    let reference = tenths(&[Some(1)], with(Reduction::Sum));
    let grads = reference.backward(&ReferenceUpstream::loss(1.0, 1));
    // With C = 1: dE = G = p - onehot, and dC[v] = G_v E.
    let g = [0.1, 0.2 - 1.0, 0.3, 0.4];
    for (v, g) in g.into_iter().enumerate() {
        near(grads.d_embeddings[v], g);
        near(grads.d_bias[v], g);
        for k in 0..4 {
            near(grads.d_classifier[v * 4 + k], g * (k as f64 + 1.0).ln());
        }
    }
}

/// PyTorch 2, `torch.nn.CrossEntropyLoss`: with weights w, l_i = -w_y ln p_y, the mean divides by Σ w_y, and label
/// smoothing ε gives (1-ε) l_i + ε/V Σ_v -w_v ln p_v, divided by the same Σ w_y.
#[test]
fn pytorch_definition_of_weights_smoothing_and_ignore_index() {
    let w = [0.5, 2.0, 0.0, 3.0];
    let log_p = [0.1_f64, 0.2, 0.3, 0.4].map(f64::ln);
    let hard = |y: usize| -w[y] * log_p[y];
    let smooth: f64 = (0..4).map(|v| -w[v] * log_p[v]).sum();
    let eps = 0.25_f32; // exact in both precisions
    let targets = [Some(1), None, Some(3), Some(0), Some(2)];
    let each: Vec<f64> = targets.iter().map(|y| y.map_or(0.0, |y| 0.75 * hard(y) + 0.25 / 4.0 * smooth)).collect();
    let total: f64 = each.iter().sum();
    let denominator = w[1] + w[3] + w[0] + w[2];

    for (reduction, loss) in [(Reduction::Sum, total), (Reduction::None, total), (Reduction::Mean, total / denominator)]
    {
        let options = CceOptions { label_smoothing: eps, ..with(reduction) };
        let out = Reference { class_weights: w.to_vec(), ..tenths(&targets, options) }.forward();
        near(out.loss, loss);
        for (ours, exact) in out.losses.iter().zip(&each) {
            near(*ours, *exact);
        }
    }
    // All weight on one class of weight 0: the denominator is 0, and so are loss and gradients, not NaN.
    let reference = Reference { class_weights: w.to_vec(), ..tenths(&[Some(2)], CceOptions::default()) };
    assert_eq!(reference.forward().loss, 0.0);
    assert!(reference.backward(&ReferenceUpstream::loss(1.0, 1)).d_bias.iter().all(|&g| g == 0.0));
}

#[test]
fn token_weights_and_z_loss_by_hand() {
    let options = CceOptions { z_loss: 0.5, ..CceOptions::default() };
    let out = Reference { token_weights: vec![2.0, -1.0, 7.0], ..tenths(&[Some(0), Some(3), None], options) }.forward();
    let (lse, nll) = (10.0_f64.ln(), [10.0_f64.ln(), 2.5_f64.ln()]);
    near(out.losses[0], 2.0 * (nll[0] + 0.5 * lse * lse));
    near(out.losses[1], -(nll[1] + 0.5 * lse * lse));
    near(out.loss, (out.losses[0] + out.losses[1]) / (2.0 - 1.0));
}

#[test]
fn scale_then_bias_then_softcap() {
    let options = CceOptions { logit_scale: 2.0, softcap: Some(3.0), ..CceOptions::default() };
    let out = Reference { bias: vec![-1.0, 0.5, 0.0, 1.0], ..tenths(&[Some(1)], options) }.forward();
    near(out.target_logit[0], 3.0 * ((2.0 * 2.0_f64.ln() + 0.5) / 3.0).tanh());
}

#[test]
fn shift_pairs_tokens_with_later_targets_inside_their_sequence() {
    let mut tensors = Spec::new(8, 3, 9).generate();
    tensors.targets = vec![0, 1, -100, 3, 4, 5, 6, 7];
    let of = |tensors: &Tensors, shift| {
        let options = CceOptions { shift, ..CceOptions::default() };
        let inputs = tensors.inputs();
        Reference::new(&Problem::new(&inputs, &options).expect("legal")).targets
    };
    let some = |classes: [i32; 8]| classes.map(|c| usize::try_from(c).ok());
    assert_eq!(of(&tensors, 0), some([0, 1, -1, 3, 4, 5, 6, 7]));
    assert_eq!(of(&tensors, 1), some([1, -1, 3, 4, 5, 6, 7, -1]));
    tensors.seq_len = Some(4);
    assert_eq!(of(&tensors, 1), some([1, -1, 3, -1, 5, 6, 7, -1]));
    assert_eq!(of(&tensors, 3), some([3, -1, -1, -1, 7, -1, -1, -1]));
}

#[test]
fn masked_classes_and_broken_rows() {
    let row = |bias: [f64; 4]| Reference { bias: bias.to_vec(), ..tenths(&[Some(1)], CceOptions::default()) };
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    // Class 3 masked: p = 1/6, 2/6, 3/6.
    let masked = row([0.0, 0.0, 0.0, -inf]);
    near(masked.forward().nll[0], 3.0_f64.ln());
    near(masked.backward(&ReferenceUpstream::loss(1.0, 1)).d_bias[2], 0.5);
    assert_eq!(masked.backward(&ReferenceUpstream::loss(1.0, 1)).d_bias[3], 0.0);
    // The target masked: an infinite loss, finite gradients.
    assert_eq!(row([0.0, -inf, 0.0, 0.0]).forward().loss, inf);
    // Nothing left, +inf, NaN: no plausible number comes out.
    assert_eq!(row([-inf; 4]).forward().lse[0], -inf);
    for bias in [[-inf; 4], [0.0, 0.0, inf, 0.0], [0.0, 0.0, 0.0, nan]] {
        let broken = row(bias);
        assert!(broken.forward().loss.is_nan());
        assert!(broken.backward(&ReferenceUpstream::loss(1.0, 1)).d_bias.iter().all(|g| g.is_nan()));
    }
}

/// `Σ upstream · outputs`, the scalar that a backward differentiates.
fn objective(out: &ReferenceForward, upstream: &ReferenceUpstream) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    upstream.loss * out.loss
        + dot(&upstream.losses, &out.losses)
        + dot(&upstream.nll, &out.nll)
        + dot(&upstream.lse, &out.lse)
        + dot(&upstream.entropy, &out.entropy)
}

/// Central differences in every operand; their error here is about 1e-9.
fn assert_finite_differences(reference: &Reference, upstream: &ReferenceUpstream, what: &str) {
    const STEP: f64 = 1e-5;
    let ReferenceGradients { d_embeddings, d_classifier, d_bias } = reference.backward(upstream);
    type Operand = fn(&mut Reference) -> &mut Vec<f64>;
    let operands: [(&str, Operand, &[f64]); 3] = [
        ("dE", |r| &mut r.embeddings, &d_embeddings),
        ("dC", |r| &mut r.classifier, &d_classifier),
        ("dbias", |r| &mut r.bias, &d_bias),
    ];
    let mut moved = reference.clone();
    for (name, operand, gradient) in operands {
        assert_eq!(operand(&mut moved).len(), gradient.len());
        for (k, &analytic) in gradient.iter().enumerate() {
            let original = operand(&mut moved)[k];
            operand(&mut moved)[k] = original + STEP;
            let up = objective(&moved.forward(), upstream);
            operand(&mut moved)[k] = original - STEP;
            let down = objective(&moved.forward(), upstream);
            operand(&mut moved)[k] = original;
            let numeric = (up - down) / (2.0 * STEP);
            assert!((numeric - analytic).abs() <= 1e-7, "{what}: {name}[{k}] is {analytic}, difference {numeric}");
        }
    }
}

/// The upstreams: each alone, then all together.
fn upstreams(tokens: usize) -> Vec<(&'static str, ReferenceUpstream)> {
    let all = OwnedUpstream::everything(tokens, true, &mut Rng::new(99)).widen(tokens);
    let none = ReferenceUpstream::loss(0.0, tokens);
    vec![
        ("loss", ReferenceUpstream::loss(1.75, tokens)),
        ("losses", ReferenceUpstream { losses: all.losses.clone(), ..none.clone() }),
        ("nll", ReferenceUpstream { nll: all.nll.clone(), ..none.clone() }),
        ("lse", ReferenceUpstream { lse: all.lse.clone(), ..none.clone() }),
        ("entropy", ReferenceUpstream { entropy: all.entropy.clone(), ..none }),
        ("all", all),
    ]
}

/// Every option in two or three settings, all combined: 1728 sets of options and tensors.
fn for_every_combination(mut test: impl FnMut(&str, &CceOptions, &Tensors)) {
    let mut seed = 0;
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
        for bits in 0..64 {
            for label_smoothing in [0.0, 0.3, 1.0] {
                for (shift, seq_len) in [(0, None), (1, Some(3)), (2, None)] {
                    let on = |bit: u32| bits >> bit & 1 == 1;
                    seed += 1;
                    let spec = Spec {
                        ignored: 0.2,
                        bias: on(0),
                        class_weights: on(1),
                        token_weights: on(2),
                        seed,
                        ..Spec::new(6, 3, 5)
                    };
                    let options = CceOptions {
                        reduction,
                        softcap: on(3).then_some(1.5),
                        logit_scale: if on(4) { 0.6 } else { 1.0 },
                        z_loss: if on(5) { 0.2 } else { 0.0 },
                        label_smoothing,
                        shift,
                        ..CceOptions::default()
                    };
                    let tensors = Tensors { seq_len, ..spec.generate() };
                    test(&format!("{options:?} {spec:?}"), &options, &tensors);
                }
            }
        }
    }
}

#[test]
fn finite_differences_of_every_option_and_every_upstream() {
    let upstreams = upstreams(6);
    let mut count = 0;
    for_every_combination(|what, options, tensors| {
        let inputs = tensors.inputs();
        let reference = Reference::new(&Problem::new(&inputs, options).expect("legal"));
        // One upstream alone in turn, and all of them always.
        let (alone, all) = (&upstreams[count % 5], &upstreams[5]);
        assert_finite_differences(&reference, &alone.1, &format!("{} alone: {what}", alone.0));
        assert_finite_differences(&reference, &all.1, what);
        count += 1;
    });
    assert_eq!(count, 1728);
}

#[test]
fn logit_gradients_sum_to_zero() {
    // Adding a constant to a row's logits changes neither nll, smoothed loss nor entropy; lse and z-loss are not in.
    let upstream =
        ReferenceUpstream { lse: vec![0.0; 6], ..OwnedUpstream::everything(6, true, &mut Rng::new(5)).widen(6) };
    for_every_combination(|what, options, tensors| {
        let options = CceOptions { softcap: None, z_loss: 0.0, ..*options };
        let inputs = tensors.inputs();
        let reference = Reference::new(&Problem::new(&inputs, &options).expect("legal"));
        let sum: f64 = reference.backward(&upstream).d_bias.iter().sum();
        assert!(sum.abs() <= 1e-12, "{what}: {sum}");
    });
}

/// The suite's entry-by-entry gradients are a second implementation: it must be the same function.
#[test]
fn entry_sums_agree_with_the_oracle() {
    let upstream = OwnedUpstream::everything(6, true, &mut Rng::new(6)).widen(6);
    for_every_combination(|what, options, tensors| {
        let inputs = tensors.inputs();
        let expected = Expected::new(&Problem::new(&inputs, options).expect("legal"));
        let oracle = expected.reference.backward(&upstream);
        let ours = expected.gradients(&upstream, GradientFilter::Exact);
        let pairs = [
            (&ours.d_embeddings.exact, &oracle.d_embeddings),
            (&ours.d_classifier.exact, &oracle.d_classifier),
            (&ours.d_bias.exact, &oracle.d_bias),
        ];
        for (ours, oracle) in pairs {
            assert_eq!(ours.len(), oracle.len());
            assert!(ours.iter().zip(oracle).all(|(a, b)| (a - b).abs() <= 1e-12), "{what}");
        }
    });
}
