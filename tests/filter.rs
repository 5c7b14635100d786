//! The unbiased filter: what it promises about expectations, counts, and what the kept set may depend on.

mod common;

use common::compare::bits;
use common::suite::{Got, run};
use common::{Expected, Logits, OwnedUpstream, Spec, Tensors, frobenius};
use cut_cross_entropy::filter::{class_offset, entry_uniform, row_start};
use cut_cross_entropy::{CceOptions, Cpu, GradientFilter, Problem, cce_forward};

fn unbiased(eps: f32, seed: u64) -> CceOptions {
    CceOptions { filter: GradientFilter::Unbiased { eps, seed }, entropy: true, ..CceOptions::default() }
}

fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(work)
}

/// Upstreams of loss and entropy: the estimator has a term for each.
fn upstream(tokens: usize) -> OwnedUpstream {
    let entropy = Some((0..tokens).map(|i| 0.01 * (i % 3) as f32).collect());
    OwnedUpstream { entropy, ..OwnedUpstream::loss(1.0) }
}

/// Mean over seeds `0..seeds` of dE and dC.
fn mean_over_seeds(tensors: &Tensors, eps: f32, seeds: u64) -> [Vec<f32>; 2] {
    let spec = tensors.spec;
    let (mut e, mut c) = (vec![0.0_f64; spec.tokens * spec.hidden], vec![0.0_f64; spec.vocab * spec.hidden]);
    let upstream = upstream(spec.tokens);
    for seed in 0..seeds {
        let (_, got) = run(&Cpu, tensors, &unbiased(eps, seed), &upstream);
        let add = |mean: &mut [f64], got: Vec<f32>| {
            mean.iter_mut().zip(got).for_each(|(m, g)| *m += f64::from(g) / seeds as f64);
        };
        add(&mut e, got.d_embeddings.to_f32_vec());
        add(&mut c, got.d_classifier.to_f32_vec());
    }
    [e, c].map(|mean| mean.iter().map(|&x| x as f32).collect())
}

#[test]
fn mean_over_seeds_converges_to_the_exact_gradient_at_the_square_root_rate() {
    for logits in [Logits::Realistic, Logits::Flat] {
        let tensors = Spec { logits, ..Spec::new(16, 8, 600) }.generate();
        let inputs = tensors.inputs();
        let expected = Expected::new(&Problem::new(&inputs, &unbiased(1.0, 0)).expect("legal"));
        let exact = expected.gradients(&upstream(16).widen(16), GradientFilter::Exact);
        let eps = 1.0 / 64.0;
        let of = |seeds| {
            let [e, c] = mean_over_seeds(&tensors, eps, seeds);
            [frobenius(&e, &exact.d_embeddings.exact), frobenius(&c, &exact.d_classifier.exact)]
        };
        let (few, many) = (of(16), of(1024));
        for (few, many) in few.into_iter().zip(many) {
            // √(1024 / 16) = 8 times smaller; a bias of a twentieth of the error at 16 seeds would show as 6 or less.
            let rate = few / many;
            assert!((6.0..=10.5).contains(&rate), "{logits:?}: {few:e} over 16 seeds, {many:e} over 1024: {rate}");
        }
        // And what a single seed gives is far from exact: the test is about sampling, not about keeping everything.
        assert!(of(1)[0] > 20.0 * many[0], "{logits:?}");
    }
}

#[test]
fn a_row_keeps_at_most_one_over_eps_entries_in_expectation_on_any_softmax() {
    for logits in [Logits::Flat, Logits::Realistic, Logits::Confident, Logits::Ties, Logits::Steep] {
        for eps in [1.0 / 16.0, 1.0 / 256.0, 1.0 / 1024.0] {
            let tensors = Spec { logits, ..Spec::new(64, 8, 3000) }.generate();
            let (_, got) = run(&Cpu, &tensors, &unbiased(eps, 11), &OwnedUpstream::loss(1.0));
            assert_eq!(got.telemetry.exact_rows, 0);
            // 64 rows of at most 1/ε ± √(1/ε), and the target of each.
            let most = 1.0 / f64::from(eps);
            let allowed = most + 1.0 + 5.0 * (most / 64.0).sqrt();
            let kept = got.telemetry.kept_per_row();
            assert!((1.0..=allowed).contains(&kept), "{logits:?} at {eps}: {kept} a row");
            if logits == Logits::Flat && eps * 3000.0 > 2.0 {
                assert!(kept >= 0.9 * most, "a flat softmax keeps about 1/ε: {kept}");
            }
        }
    }
}

/// Marks kept entries: with the identity as classifier, dE_i is G_i itself.
fn kept_entries(tokens: usize, vocab: usize, options: &CceOptions, classes_from: usize) -> (Vec<f32>, Got) {
    let identity: Vec<f64> = (0..vocab * vocab).map(|i| f64::from(u8::from(i % (vocab + 1) == 0))).collect();
    let logits: Vec<f64> =
        (0..tokens * vocab).map(|i| (((i * 2_654_435_761) >> 7) % 512) as f64 / 128.0 - 2.0).collect();
    let targets: Vec<i64> = (0..tokens).map(|i| if i < classes_from { -100 } else { (i * 5 % vocab) as i64 }).collect();
    let tensors = Tensors::dense(&logits, &identity, vocab, &targets);
    let (_, got) = run(&Cpu, &tensors, options, &OwnedUpstream::loss(1.0));
    (got.d_embeddings.to_f32_vec(), got)
}

#[test]
fn kept_entries_are_those_of_the_definition_with_the_value_of_the_definition() {
    let (tokens, vocab, eps) = (30, 300, 1.0 / 32.0_f32);
    let options = CceOptions { reduction: cut_cross_entropy::Reduction::Sum, ..unbiased(eps, 0x1234_5678_9ABC_DEF0) };
    let (g, got) = kept_entries(tokens, vocab, &options, 0);
    let (exact, _) = kept_entries(tokens, vocab, &CceOptions { filter: GradientFilter::Exact, ..options }, 0);
    let (mut kept, mut dropped) = (0, 0);
    for i in 0..tokens {
        let start = row_start(0x1234_5678_9ABC_DEF0, i);
        for v in 0..vocab {
            let (g, p) = (g[i * vocab + v], exact[i * vocab + v]);
            if v == i * 5 % vocab {
                assert!((g - p).abs() <= 1e-6, "the target's entry is exact: {g} {p}");
                kept += 1;
                continue;
            }
            let threshold = eps * entry_uniform(start, v as u32);
            if (p / threshold - 1.0).abs() < 1e-4 {
                kept += u64::from(g != 0.0); // within rounding of the threshold: either way
            } else if p >= threshold {
                assert!((g - p.max(eps)).abs() <= 1e-5 * p.max(eps), "({i}, {v}) counts {g}, p {p}");
                kept += 1;
            } else {
                assert_eq!(g, 0.0, "({i}, {v}) has p {p} under {threshold}");
                dropped += 1;
            }
        }
    }
    assert_eq!(got.telemetry.kept_entries, kept);
    assert!(kept > 20 * tokens as u64 && dropped > 20 * tokens, "{kept} {dropped}");
}

#[test]
fn kept_set_does_not_depend_on_threads_or_on_the_batch_around_a_token() {
    let (tokens, vocab) = (200, 290);
    let options = unbiased(1.0 / 32.0, 3);
    let reference = in_pool(1, || kept_entries(tokens, vocab, &options, 0));
    for threads in [2, 3, 4] {
        let other = in_pool(threads, || kept_entries(tokens, vocab, &options, 0));
        assert_eq!(bits(&other.0), bits(&reference.0), "{threads} threads");
        assert_eq!(other.1.telemetry, reference.1.telemetry);
    }
    // Tokens before it ignored: token 150 sits elsewhere in its block, in another block, and keeps the same entries.
    let pattern = |g: &[f32]| g[150 * vocab..].iter().map(|&g| g != 0.0).collect::<Vec<_>>();
    for ignored in [1, 7, 64, 149] {
        let other = kept_entries(tokens, vocab, &options, ignored);
        assert_eq!(pattern(&other.0), pattern(&reference.0), "{ignored} tokens ignored before it");
    }
}

#[test]
fn seed_and_token_choose_the_kept_set() {
    let kept =
        |seed| kept_entries(8, 290, &unbiased(1.0 / 32.0, seed), 0).0.iter().map(|&g| g != 0.0).collect::<Vec<_>>();
    let reference = kept(0);
    assert_eq!(kept(0), reference);
    // Also seeds that differ in one high bit.
    for seed in [1, 2, 1 << 32, 1 << 63] {
        let differ = kept(seed).iter().zip(&reference).filter(|(a, b)| a != b).count();
        assert!(differ > 200, "seed {seed}: only {differ} of {} entries differ", reference.len());
    }
    // Rows of one batch are not sampled alike, though their logits be: u differs.
    let starts: std::collections::HashSet<u32> = (0..10_000).map(|token| row_start(7, token)).collect();
    assert!(starts.len() > 9_990);
}

/// χ² of counts against a uniform distribution over the bins.
fn chi_square(values: impl Iterator<Item = f32>, bins: usize) -> f64 {
    let mut counts = vec![0.0_f64; bins];
    let mut total = 0.0;
    for u in values {
        assert!(u > 0.0 && u <= 1.0);
        counts[((f64::from(u) * bins as f64) as usize).min(bins - 1)] += 1.0;
        total += 1.0;
    }
    let expected = total / bins as f64;
    counts.iter().map(|c| (c - expected).powi(2) / expected).sum()
}

#[test]
fn every_entry_is_uniform_over_seeds_and_over_tokens() {
    // 63 degrees of freedom: χ² is below 120 in all but 1 of 50,000 draws, and 36 fixed ones are looked at.
    for (token, class) in [(0, 0), (0, 1), (1, 0), (12_345, 50_256), (65_535, 255_999), (3, u32::MAX)] {
        for stride in [1, 1 << 20, 0x9E37_79B9_7F4A_7C15_u64] {
            let over_seeds = (0..20_000_u64).map(|s| entry_uniform(row_start(s.wrapping_mul(stride), token), class));
            let chi = chi_square(over_seeds, 64);
            assert!(chi <= 120.0, "({token}, {class}), seeds {stride} apart: {chi}");
            let over_tokens = (0..20_000).map(|t| entry_uniform(row_start(stride, t), class));
            let chi = chi_square(over_tokens, 64);
            assert!(chi <= 120.0, "class {class}, seed {stride}: {chi}");
        }
    }
}

#[test]
fn small_numbers_are_uniform_too_and_pairs_are_not_locked_across_seeds() {
    // Small p are decided by small u: the lowest 1/64 must itself be uniform, down to where f32 has no gaps.
    let low = |s: u64| Some(entry_uniform(row_start(s, 5), 77)).filter(|&u| u < 1.0 / 64.0).map(|u| u * 64.0);
    let chi = chi_square((0..400_000).filter_map(low), 32);
    assert!(chi <= 75.0, "{chi}"); // 31 degrees of freedom
    // Two tokens of one step are independent: all four quadrants alike.
    let quadrant = |s: u64| {
        let half = |token| u8::from(entry_uniform(row_start(s, token), 9) >= 0.5);
        (f32::from(half(1) * 2 + half(2)) + 0.5) / 4.0
    };
    let chi = chi_square((0..40_000).map(quadrant), 4);
    assert!(chi <= 20.0, "{chi}");
}

#[test]
fn a_row_is_better_spread_than_independent_numbers() {
    // Largest distance between the empirical distribution and the uniform one: √n noise would give 1.4e-2 to 4e-2.
    for token in 0..20 {
        let start = row_start(1, token);
        let mut u: Vec<f32> = (0..4096).map(|v| entry_uniform(start, v)).collect();
        u.sort_by(f32::total_cmp);
        let distance = |(k, u): (usize, &f32)| (f64::from(*u) - (k as f64 + 0.5) / 4096.0).abs();
        let worst = u.iter().enumerate().map(distance).fold(0.0, f64::max);
        assert!(worst <= 2e-3, "token {token}: {worst}");
    }
}

#[test]
fn neighbours_in_the_vocabulary_are_not_kept_or_dropped_together() {
    // Offsets of a tile's start and of places in it add up, as the kernels' immediates need it.
    for (start, place) in [(64, 63), (192, 17), (0xFFFF_FF00, 255), (1 << 20, 65)] {
        assert_eq!(
            class_offset(start | place),
            class_offset(start).wrapping_add(class_offset(place)),
            "{start} {place}"
        );
    }
    // Classes d apart whose numbers lie within 1/32 of each other: 1/16 of them by chance. In plain order all of them at
    // d = 21, 34 and 55, Fibonacci numbers.
    for d in 1..=64 {
        let apart = |v: u32| class_offset(v + d).wrapping_sub(class_offset(v));
        let near = (0..4096).filter(|&v| apart(v).min(apart(v).wrapping_neg()) < 1 << 27).count();
        assert!(near <= 4096 / 3, "{near} of 4096 pairs {d} apart");
    }
}

#[test]
fn threshold_keeps_what_reaches_it_and_its_mass_is_reported() {
    let tensors = Spec::new(64, 12, 700).generate();
    let mut before = (0, 0.0);
    for eps in [1.0, 0.1, 1e-2, 1e-3, 1e-5] {
        let options = CceOptions { filter: GradientFilter::Threshold { eps }, ..CceOptions::default() };
        let (_, got) = run(&Cpu, &tensors, &options, &OwnedUpstream::loss(1.0));
        let now = (got.telemetry.kept_entries, got.telemetry.kept_mass);
        assert!(now.0 >= before.0 && now.1 >= before.1 && now.1 <= 1.0 + 1e-5, "{eps}: {now:?} after {before:?}");
        before = now;
    }
    assert!(before.1 > 0.999 && before.0 > 64 * 300, "{before:?}");
}

#[test]
fn a_row_that_outgrows_its_space_is_exact_not_wrong() {
    // V = 20,000 about equal classes at ε = 2^-14: 13,000 kept entries a row are more than a row may hold.
    let tensors = Spec { logits: Logits::Flat, bias: false, ..Spec::new(9, 4, 20_000) }.generate();
    let options = CceOptions { entropy: false, ..unbiased(1.0 / 16_384.0, 5) };
    let (forward, got) = run(&Cpu, &tensors, &options, &OwnedUpstream::loss(1.0));
    assert_eq!((got.telemetry.exact_rows, got.telemetry.kept_entries), (9, 0));
    let inputs = tensors.inputs();
    let expected = Expected::new(&Problem::new(&inputs, &options).expect("legal"));
    expected.check_forward(&forward).expect("forward");
    let exact = expected.gradients(&OwnedUpstream::loss(1.0).widen(9), GradientFilter::Exact);
    exact.check(4, Some(&got.d_embeddings), Some(&got.d_classifier), None).expect("exact gradients");
}

#[test]
fn rows_that_overflow_and_rows_that_do_not_share_a_batch() {
    // Every third row is sharp and stays sparse; the others are flat and overflow. Smoothing puts a rank-one part in both.
    let mut tensors = Spec { logits: Logits::Flat, ..Spec::new(150, 6, 20_000) }.generate();
    for i in (0..150).step_by(3) {
        let class = tensors.targets[i] as usize;
        let row: Vec<f32> = tensors.classifier.to_f32_vec()[class * 6..][..6].to_vec();
        let norm: f32 = row.iter().map(|c| c * c).sum();
        row.iter().enumerate().for_each(|(k, c)| tensors.set_embedding(i, k, 40.0 * c / norm));
    }
    let eps = 1.0 / 16_384.0;
    for label_smoothing in [0.0, 0.1] {
        let options = CceOptions { label_smoothing, entropy: false, ..unbiased(eps, 5) };
        let (forward, got) = run(&Cpu, &tensors, &options, &OwnedUpstream::loss(1.0));
        let exact_rows = got.telemetry.exact_rows;
        assert!((90..=120).contains(&exact_rows), "{exact_rows} exact rows");
        let inputs = tensors.inputs();
        let expected = Expected::new(&Problem::new(&inputs, &options).expect("legal"));
        expected.check_forward(&forward).expect("forward");
        // A flat row's largest p is far below that of any sharp one.
        let flat = |i: usize| {
            let row = &expected.forward.probabilities[i * 20_000..][..20_000];
            row.iter().filter(|&&p| p >= f64::from(eps) / 2.0).count() > 5000
        };
        assert_eq!((0..150).filter(|&i| flat(i)).count() as u64, exact_rows);
        let upstream = OwnedUpstream::loss(1.0).widen(150);
        let gradients =
            expected.gradients_by_row(&upstream, options.filter, false, |i| (!flat(i)).then_some(eps.into()));
        gradients.check_telemetry(&got.telemetry).expect("telemetry");
        gradients.check(6, Some(&got.d_embeddings), Some(&got.d_classifier), None).expect("gradients");
    }
}

#[test]
fn the_forward_does_not_depend_on_the_filter() {
    let tensors = Spec { ignored: 0.1, ..Spec::new(140, 12, 700) }.generate();
    let of = |filter, capture| {
        let options = CceOptions { filter, capture, ..CceOptions::default() };
        bits(&cce_forward(&Cpu, &tensors.inputs(), &options).expect("legal").losses)
    };
    let exact = of(GradientFilter::Exact, true);
    for filter in common::suite::filters() {
        assert_eq!(of(filter, true), exact);
        assert_eq!(of(filter, false), exact);
    }
}
