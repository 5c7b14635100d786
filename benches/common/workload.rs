//! Inputs that look like a trained language model's. Never `randn · randn`: its softmax is flat, its targets have no
//! head, and every conclusion about sparsity drawn from it is wrong.
//!
//! The logit of token i and class v is `prior_v + sharpness_i · context_iv`, where
//!
//! - `prior_v`: Zipf-Mandelbrot log-frequency `-ln(v + 4)` with some noise, carried by one hidden direction that all
//!   embeddings share, as trained classifiers do. Low ids are frequent, as byte-pair vocabularies are ordered.
//! - `context_iv`: dot product of a direction of the token, half of it shared by the [`TOPIC`] tokens around it (a
//!   document), with a direction of the class, half of it shared by its cluster. Neighbouring rows have much of their
//!   heads in common, and clusters of classes rise together.
//! - `sharpness_i`: log-normal over tokens. Rows differ widely in entropy, as they do in text.
//!
//! Targets are drawn from the resulting softmax, so the model is calibrated: its loss is its mean entropy, targets are
//! often in the head, and frequent classes are targets of many rows. [`Survey`] measures what came out. Some tokens may have no
//! target, each by a draw of its own.

use super::baseline::widen_into;
use super::matmul::{View, multiply};
use super::survey::Survey;
use cut_cross_entropy::{DType, HostBuffer, HostSlice, Inputs, Matrix, Shape};
use rayon::prelude::*;

/// Tokens that share a topic direction.
const TOPIC: usize = 128;
/// Clusters of classes.
const CLUSTERS: usize = 1024;
/// Median of the standard deviation of the context part of a row's logits.
///
/// Chosen for the loss of a trained model, 3 to 4 nats. Of 3.0, 3.5, 4.0 and 4.3 tried, 3.5 gave 4.36 nats at N=2048
/// V=65536 D=1024, with 300 entries a row kept at 2^-10; 4.3 gives 3.53 nats and 216 there, 3.51 and 217 at N=1024
/// V=151936 D=896. Sharper rows make a sparse backward faster: compare times only beside the survey's numbers.
const SHARPNESS: f32 = 4.3;
/// Standard deviation of its logarithm over rows.
const SHARPNESS_SPREAD: f32 = 0.35;
/// Length of the shared direction in the embeddings.
const PRIOR_SCALE: f32 = 8.0;
/// Multiplies the context part of the logits and, below 1, the prior, too: 0 makes every class equally probable.
pub const CONFIDENCE: f32 = 1.0;
/// Rows that [`confidence_keeping`] looks at.
const SAMPLE: usize = 32;
/// Standard deviation of the log-prior around Zipf's law.
const PRIOR_NOISE: f32 = 0.5;
/// The target of a token that has none: the default of `CceOptions::ignore_index`.
pub const IGNORED: i64 = -100;

/// A problem to time: mean loss, default options but for the filter and the softcap.
pub struct Workload {
    pub shape: Shape,
    pub softcap: Option<f32>,
    pub embeddings: HostBuffer,
    pub classifier: HostBuffer,
    /// Classes, or [`IGNORED`].
    pub targets: Vec<i64>,
    /// What the softmax looks like, and each row's log-sum-exp by a path that shares nothing with the backends.
    pub survey: Survey,
    /// Share of the tokens that get no target where targets are drawn.
    ignored: f64,
    wide_embeddings: Vec<f32>,
    wide_classifier: Vec<f32>,
}

impl Workload {
    /// Generated matrices of that shape and dtype, a pure function of the arguments; targets are yet to be drawn by
    /// [`survey`](super::survey::survey). `confidence` is [`CONFIDENCE`], or what [`confidence_keeping`] found.
    pub fn without_targets(shape: Shape, dtype: DType, softcap: Option<f32>, seed: u64, confidence: f32) -> Self {
        let (embeddings, wide_embeddings) =
            rounded(embeddings(shape, seed, [PRIOR_SCALE * confidence.min(1.0), SHARPNESS * confidence]), dtype);
        let (classifier, wide_classifier) = rounded(classifier(shape, seed), dtype);
        let (targets, survey, ignored) = (Vec::new(), Survey::default(), 0.0);
        Workload { shape, softcap, embeddings, classifier, targets, survey, ignored, wide_embeddings, wide_classifier }
    }

    /// With that share of the tokens, in [0, 1], to be left without a target.
    pub fn ignoring(self, share: f64) -> Self {
        Workload { ignored: share, ..self }
    }

    /// Given inputs, e.g. of a trained model, with every target in [0, V) or [`IGNORED`]; yet to be surveyed.
    pub fn from_parts(shape: Shape, embeddings: HostBuffer, classifier: HostBuffer, targets: Vec<i64>) -> Self {
        let widened = |buffer: &HostBuffer| {
            let mut wide = Vec::new();
            if buffer.as_f32().is_none() {
                widen_into(buffer.as_slice(), &mut wide);
            }
            wide
        };
        let (wide_embeddings, wide_classifier) = (widened(&embeddings), widened(&classifier));
        let (softcap, survey, ignored) = (None, Survey::default(), 0.0);
        Workload { shape, softcap, embeddings, classifier, targets, survey, ignored, wide_embeddings, wide_classifier }
    }

    /// With what [`survey`](super::survey::survey) found.
    pub fn surveyed(mut self, (survey, targets): (Survey, Vec<i64>)) -> Self {
        (self.survey, self.targets) = (survey, targets);
        self
    }

    /// The number in [0, 1) that chooses the target of a row out of its softmax, or `None` where it is to have none.
    pub fn draw(&self, seed: u64, row: usize) -> Option<f64> {
        let has_target = Random::new(seed, Stream::Ignored, row).unit() >= self.ignored;
        has_target.then(|| Random::new(seed, Stream::Targets, row).unit())
    }

    /// The class of a token, or `None` where it is ignored.
    pub fn target(&self, token: usize) -> Option<usize> {
        let target = self.targets[token];
        (target != IGNORED).then_some(target as usize)
    }

    /// Tokens that are not ignored.
    pub fn rows(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED).count()
    }

    /// The logit that a product becomes.
    pub fn capped(&self, product: f64) -> f64 {
        capped(self.softcap, product)
    }

    /// Derivative of [`Self::capped`], by the logit.
    pub fn capped_derivative(&self, logit: f64) -> f64 {
        self.softcap.map_or(1.0, |cap| 1.0 - (logit / f64::from(cap)).powi(2))
    }

    /// As the library takes it.
    pub fn inputs(&self) -> Inputs<'_> {
        let Shape { tokens, hidden, vocab } = self.shape;
        Inputs::new(
            Matrix::new(self.embeddings.as_slice(), tokens, hidden),
            Matrix::new(self.classifier.as_slice(), vocab, hidden),
            HostSlice::from(&self.targets),
        )
    }

    /// E in f32, [N, D].
    pub fn wide_embeddings(&self) -> &[f32] {
        self.embeddings.as_f32().unwrap_or(&self.wide_embeddings)
    }

    /// C in f32, [V, D].
    pub fn wide_classifier(&self) -> &[f32] {
        self.classifier.as_f32().unwrap_or(&self.wide_classifier)
    }
}

fn capped(softcap: Option<f32>, product: f64) -> f64 {
    softcap.map_or(product, |cap| f64::from(cap) * (product / f64::from(cap)).tanh())
}

/// The confidence with which a row keeps `kept` entries on average at `eps`, `Σ_v min(1, p / eps)`, by [`SAMPLE`] rows. `None`: even equal
/// probabilities keep fewer, or the sharpest rows more.
pub fn confidence_keeping(kept: f64, eps: f64, shape: Shape, softcap: Option<f32>, seed: u64) -> Option<f32> {
    let Shape { tokens, hidden, vocab } = shape;
    let sample: Vec<usize> = (0..SAMPLE.min(tokens)).map(|k| k * tokens / SAMPLE.min(tokens)).collect();
    let classifier = classifier(shape, seed);
    // Logits are linear in the embeddings: those of the prior, and those of the context.
    let [prior, context] = [[PRIOR_SCALE, 0.0], [0.0, SHARPNESS]].map(|scales| {
        let all = embeddings(shape, seed, scales);
        let rows: Vec<f32> = sample.iter().flat_map(|&i| &all[i * hidden..][..hidden]).copied().collect();
        let mut products = vec![0.0; sample.len() * vocab];
        let of_classes = View::new(&classifier, vocab, hidden).transposed();
        multiply(&mut products, View::new(&rows, sample.len(), hidden), of_classes);
        products
    });
    let kept_at = |confidence: f64| {
        let row = |(prior, context): (&[f32], &[f32])| {
            let logit = |(p, c): (&f32, &f32)| {
                capped(softcap, confidence.min(1.0) * f64::from(*p) + confidence * f64::from(*c))
            };
            let logits: Vec<f64> = prior.iter().zip(context).map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|z| (z - max).exp()).sum();
            logits.iter().map(|z| ((z - max).exp() / sum / eps).min(1.0)).sum::<f64>()
        };
        let rows = prior.par_chunks(vocab).zip(context.par_chunks(vocab));
        rows.map(row).sum::<f64>() / sample.len() as f64
    };
    let (mut low, mut high) = (0.0, 16.0);
    if !(kept_at(high)..=kept_at(low)).contains(&kept) {
        return None;
    }
    for _ in 0..24 {
        let middle = 0.5 * (low + high);
        if kept_at(middle) > kept { low = middle } else { high = middle }
    }
    Some(high as f32)
}

/// The values rounded to `dtype`, and for 16-bit types the rounded values in f32.
fn rounded(values: Vec<f32>, dtype: DType) -> (HostBuffer, Vec<f32>) {
    if dtype == DType::F32 {
        return (HostBuffer::F32(values), Vec::new());
    }
    let mut buffer = HostBuffer::zeros("workload", dtype, values.len()).expect("memory for the inputs");
    super::baseline::narrow(&values, &mut buffer);
    let mut wide = values;
    widen_into(buffer.as_slice(), &mut wide);
    (buffer, wide)
}

fn embeddings(shape: Shape, seed: u64, [prior_scale, sharpness]: [f32; 2]) -> Vec<f32> {
    let mut rows = vec![0.0; shape.tokens * shape.hidden];
    let prior = direction(shape.hidden, seed);
    rows.par_chunks_mut(shape.hidden.max(1)).enumerate().for_each(|(i, row)| {
        let mut topic = Random::new(seed, Stream::Topics, i / TOPIC);
        let mut own = Random::new(seed, Stream::Embeddings, i);
        let sharpness = sharpness * (SHARPNESS_SPREAD * own.normal()).exp();
        for (e, prior) in row.iter_mut().zip(&prior) {
            let context = (topic.normal() + own.normal()) * std::f32::consts::FRAC_1_SQRT_2;
            *e = prior_scale * prior + sharpness * context;
        }
    });
    rows
}

fn classifier(shape: Shape, seed: u64) -> Vec<f32> {
    let mut rows = vec![0.0; shape.vocab * shape.hidden];
    let prior = direction(shape.hidden, seed);
    let per_dim = (0.5 / shape.hidden as f32).sqrt();
    rows.par_chunks_mut(shape.hidden.max(1)).enumerate().for_each(|(v, row)| {
        let mut own = Random::new(seed, Stream::Classifier, v);
        let log_frequency = -(v as f32 + 4.0).ln() + PRIOR_NOISE * own.normal();
        let mut cluster = Random::new(seed, Stream::Clusters, own.next() as usize % CLUSTERS);
        for (c, prior) in row.iter_mut().zip(&prior) {
            *c = log_frequency / PRIOR_SCALE * prior + per_dim * (cluster.normal() + own.normal());
        }
    });
    rows
}

/// A unit vector with components ±1/√D.
fn direction(hidden: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed, Stream::Prior, 0);
    let length = 1.0 / (hidden as f32).sqrt();
    (0..hidden).map(|_| if random.next() & 1 == 0 { length } else { -length }).collect()
}

/// What a sequence of random numbers is for: keeps the sequences apart.
enum Stream {
    Prior = 1,
    Topics,
    Embeddings,
    Classifier,
    Clusters,
    Targets,
    Ignored,
}

/// SplitMix64, one sequence for each (seed, stream, index).
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: Stream, index: usize) -> Self {
        let mut random = Random(seed.wrapping_mul(0xA076_1D64_78BD_642F) ^ ((stream as u64) << 56) ^ index as u64);
        random.0 = random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Nearly normal with mean 0 and variance 1: the sum of four uniform numbers out of one draw.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|k| (bits >> (16 * k)) & 0xFFFF).sum();
        (sum as f32 / 65_536.0 - 2.0) * 1.732_050_8 // variance 4/12
    }
}
