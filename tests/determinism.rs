//! Bitwise equality of every output and gradient, from run to run and for every number of threads.

mod common;

use common::suite::{filters, run};
use common::{Logits, OwnedUpstream, Rng, Spec, Tensors};
use cut_cross_entropy::{CceOptions, Cpu, DType, GradientFilter, HostBuffer, Reduction};

/// Everything that comes out, as bits.
fn fingerprint(tensors: &Tensors, options: &CceOptions, upstream: &OwnedUpstream) -> Vec<Vec<u32>> {
    let (forward, got) = run(&Cpu, tensors, options, upstream);
    let bits = |values: &[f32]| common::compare::bits(values);
    let gradient = |buffer: &HostBuffer| bits(&buffer.to_f32_vec());
    vec![
        bits(&[forward.loss, forward.accuracy.unwrap_or(0.0)]),
        bits(&forward.losses),
        bits(&forward.nll),
        bits(&forward.lse),
        bits(&forward.target_logit),
        forward.entropy.as_deref().map_or(Vec::new(), bits),
        forward.argmax.unwrap_or_default(),
        gradient(&got.d_embeddings),
        gradient(&got.d_classifier),
        got.d_bias.as_ref().map_or(Vec::new(), gradient),
        vec![got.telemetry.kept_entries as u32, got.telemetry.candidates as u32, got.telemetry.exact_rows as u32],
        vec![(got.telemetry.kept_mass as f32).to_bits()],
    ]
}

#[track_caller]
fn assert_deterministic(tensors: &Tensors, options: &CceOptions, upstream: &OwnedUpstream) {
    let in_pool = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| fingerprint(tensors, options, upstream))
    };
    let reference = in_pool(1);
    for threads in [1, 2, 3, 5, 2, 5] {
        let other = in_pool(threads);
        for (name, (a, b)) in NAMES.iter().zip(reference.iter().zip(&other)) {
            let differ = a.iter().zip(b).filter(|(a, b)| a != b).count();
            assert!(a == b, "{name}: {differ} of {} differ with {threads} threads: {:?}", a.len(), tensors.spec);
        }
    }
}

const NAMES: [&str; 12] = [
    "loss",
    "losses",
    "nll",
    "lse",
    "target_logit",
    "entropy",
    "argmax",
    "d_embeddings",
    "d_classifier",
    "d_bias",
    "counters",
    "kept mass",
];

#[test]
fn every_output_is_bitwise_equal_on_ragged_sizes() {
    // On both sides of where one block becomes two (72 rows a block at least), and far beyond.
    for tokens in [1, 7, 63, 71, 72, 73, 143, 144, 145, 289, 577, 1037] {
        let spec = Spec { bias: true, ignored: 0.1, seed: tokens as u64, ..Spec::new(tokens, 37, 389) };
        let upstream = OwnedUpstream::loss(1.0);
        for filter in filters() {
            let options = CceOptions { filter, metrics: true, ..CceOptions::default() };
            assert_deterministic(&spec.generate(), &options, &upstream);
        }
    }
}

/// Matrix libraries sum a contraction in another order when both other sizes are small, and cut a long one: here the
/// last tile has 1 to 44 columns, so that a block of few rows would be such a product.
#[test]
fn every_output_is_bitwise_equal_on_long_contractions_and_narrow_last_tiles() {
    let shapes = [(100, 1037, 300), (145, 2049, 257), (217, 1037, 290), (330, 700, 44)];
    // On both sides of 256 elements in all, where it has kernels of its own for products of rows by rows.
    let narrow = [(300, 1037, 257), (300, 1037, 258), (600, 1037, 259), (200, 1037, 2), (300, 1037, 1)];
    for (tokens, hidden, vocab) in shapes.into_iter().chain(narrow) {
        let tensors = Spec { ignored: 0.05, ..Spec::new(tokens, hidden, vocab) }.generate();
        for filter in [GradientFilter::Exact, GradientFilter::default()] {
            let options = CceOptions { filter, ..CceOptions::default() };
            assert_deterministic(&tensors, &options, &OwnedUpstream::loss(1.0));
        }
    }
}

#[test]
fn every_output_is_bitwise_equal_with_every_option_and_dtype() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let spec = Spec {
            dtype,
            bias: true,
            class_weights: true,
            token_weights: true,
            padding: 3,
            ignored: 0.1,
            ..Spec::new(217, 29, 700)
        };
        let upstream = OwnedUpstream::everything(217, true, &mut Rng::new(4));
        for (softcap, label_smoothing) in [(None, 0.1), (Some(5.0), 0.0), (Some(5.0), 0.1)] {
            for filter in [GradientFilter::Exact, GradientFilter::Unbiased { eps: 1.0 / 128.0, seed: 9 }] {
                let options = CceOptions {
                    softcap,
                    label_smoothing,
                    filter,
                    reduction: Reduction::None,
                    z_loss: 0.01,
                    shift: 1,
                    entropy: true,
                    metrics: true,
                    ..CceOptions::default()
                };
                assert_deterministic(&spec.generate(), &options, &upstream);
            }
        }
    }
}

#[test]
fn every_output_is_bitwise_equal_when_rows_overflow_into_the_exact_path() {
    let mut tensors = Spec { logits: Logits::Flat, bias: true, ..Spec::new(197, 5, 17_000) }.generate();
    // No bias to speak of, or the rows would not be flat; a few rows with a sharp target stay sparse.
    tensors.bias = Some(HostBuffer::F32(vec![0.25; 17_000]));
    for i in (0..197).step_by(7) {
        let class = tensors.targets[i] as usize;
        let row: Vec<f32> = tensors.classifier.to_f32_vec()[class * 5..][..5].to_vec();
        let norm: f32 = row.iter().map(|c| c * c).sum();
        row.iter().enumerate().for_each(|(k, c)| tensors.set_embedding(i, k, 60.0 * c / norm));
    }
    let filter = GradientFilter::Unbiased { eps: 1.0 / 65_536.0, seed: 2 };
    let options = CceOptions { filter, ..CceOptions::default() };
    let (_, got) = run(&Cpu, &tensors, &options, &OwnedUpstream::loss(1.0));
    let exact = got.telemetry.exact_rows;
    assert!(exact > 100 && exact < 197, "{exact} rows overflow: both kinds are wanted");
    assert_deterministic(&tensors, &options, &OwnedUpstream::loss(1.0));
}

#[test]
fn a_backward_may_run_in_another_pool_than_its_forward() {
    let tensors = Spec { ignored: 0.1, ..Spec::new(650, 12, 500) }.generate();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let upstream = OwnedUpstream::loss(1.0);
    for capture in [true, false] {
        let options = CceOptions { capture, ..CceOptions::default() };
        let (_, reference) = pool(1).install(|| run(&Cpu, &tensors, &options, &upstream));
        let forward = pool(5).install(|| run(&Cpu, &tensors, &options, &upstream).0);
        let other = pool(2).install(|| common::suite::run_backward(&Cpu, &tensors, &forward, &upstream));
        assert_eq!(reference.d_embeddings, other.d_embeddings);
        assert_eq!(reference.d_classifier, other.d_classifier);
    }
}
