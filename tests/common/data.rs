//! Seeded inputs that look like the end of a language model, and adversarial ones.
//!
//! Products of two Gaussian matrices are not enough: their softmax is either flat or one-hot at random, so a leaking
//! padded column or a wrong small probability drowns. Here classes have a Zipf popularity, rows differ in confidence,
//! and logits spread by σ ≈ 1-3 around it.

use cut_cross_entropy::{DType, HostBuffer, Inputs, Matrix};
use half::{bf16, f16};

/// SplitMix64 (Steele et al. 2014): small, seeded, the same everywhere.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1))
    }
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }
    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
    /// In [0, n).
    pub fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }
}

/// The shape of the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Logits {
    /// Zipf popularity, σ = 1.5, rows from undecided to sure of their target.
    Realistic,
    /// σ = 0.02: every probability is about 1 / V, as at random initialisation.
    Flat,
    /// The target's probability is 1 within 1e-8.
    Confident,
    /// σ = 25: one-hot at a random class, most probabilities underflow.
    Steep,
    /// Realistic, all logits moved by this much.
    Offset(f64),
    /// Three different classifier rows, repeated: every maximum is shared by a third of the vocabulary.
    Ties,
}

/// What to generate.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    pub tokens: usize,
    pub hidden: usize,
    pub vocab: usize,
    pub dtype: DType,
    pub logits: Logits,
    /// Share of the tokens whose target is `ignore_index`.
    pub ignored: f64,
    pub ignore_index: i64,
    pub bias: bool,
    pub class_weights: bool,
    pub token_weights: bool,
    /// Elements between the rows of both matrices, filled with NaN.
    pub padding: usize,
    pub seed: u64,
}

impl Spec {
    pub fn new(tokens: usize, hidden: usize, vocab: usize) -> Self {
        Spec {
            tokens,
            hidden,
            vocab,
            dtype: DType::F32,
            logits: Logits::Realistic,
            ignored: 0.0,
            ignore_index: -100,
            bias: false,
            class_weights: false,
            token_weights: false,
            padding: 0,
            seed: 1,
        }
    }

    pub fn generate(&self) -> Tensors {
        Tensors::new(*self)
    }
}

/// Owned tensors.
#[derive(Debug, Clone)]
pub struct Tensors {
    pub spec: Spec,
    pub embeddings: HostBuffer,
    pub classifier: HostBuffer,
    pub targets: Vec<i64>,
    pub bias: Option<HostBuffer>,
    pub class_weights: Option<Vec<f32>>,
    pub token_weights: Option<Vec<f32>>,
    pub seq_len: Option<usize>,
}

/// A buffer of `dtype`, each value rounded to it.
pub fn buffer(dtype: DType, values: &[f64]) -> HostBuffer {
    match dtype {
        DType::F16 => HostBuffer::F16(values.iter().map(|&x| f16::from_f64(x)).collect()),
        DType::BF16 => HostBuffer::BF16(values.iter().map(|&x| bf16::from_f64(x)).collect()),
        _ => HostBuffer::F32(values.iter().map(|&x| x as f32).collect()),
    }
}

/// `values` [rows, columns] with `padding` NaNs after every row, the last included.
fn padded(values: Vec<f64>, columns: usize, padding: usize) -> Vec<f64> {
    if padding == 0 || columns == 0 {
        return values;
    }
    values.chunks(columns).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f64::NAN, padding))).collect()
}

impl Tensors {
    fn new(spec: Spec) -> Self {
        let Spec { tokens, hidden, vocab, .. } = spec;
        let mut rng = Rng::new(spec.seed);
        let mut rank: Vec<usize> = (0..vocab).collect();
        for v in (1..vocab).rev() {
            rank.swap(v, rng.below(v + 1));
        }
        // Column 0 carries the popularity (the embedding there is 1), column 1 a common offset.
        let zipf = hidden >= 2 && matches!(spec.logits, Logits::Realistic | Logits::Offset(_));
        let offset = if let Logits::Offset(o) = spec.logits { Some(o).filter(|_| hidden >= 3) } else { None };
        let sigma = match spec.logits {
            Logits::Flat => 0.02,
            Logits::Steep => 25.0,
            _ => 1.5,
        };

        let unit = 1.0 / (hidden.max(1) as f64).sqrt();
        let mut classifier: Vec<f64> = (0..vocab * hidden).map(|_| unit * rng.normal()).collect();
        for v in 0..vocab {
            if zipf {
                classifier[v * hidden] = 1.0 - 0.7 * (1.0 + rank[v] as f64).ln();
            }
            if let Some(offset) = offset {
                classifier[v * hidden + 1] = offset;
            }
            if spec.logits == Logits::Ties && v >= 3 {
                classifier.copy_within((v % 3) * hidden..(v % 3 + 1) * hidden, v * hidden);
            }
        }

        let by_rank = {
            let mut by_rank = vec![0; vocab];
            rank.iter().enumerate().for_each(|(v, &r)| by_rank[r] = v);
            by_rank
        };
        let free = usize::from(zipf) + usize::from(offset.is_some());
        let mut targets = Vec::with_capacity(tokens);
        let mut embeddings: Vec<f64> = (0..tokens * hidden).map(|_| sigma * rng.normal()).collect();
        for i in 0..tokens {
            // Zipf with exponent about 1: the logarithm of the rank is uniform.
            let rank = ((vocab as f64 + 1.0).powf(rng.uniform()) - 1.0) as usize;
            let target = by_rank.get(rank.min(vocab.saturating_sub(1))).copied().unwrap_or(0);
            let peak = match spec.logits {
                Logits::Realistic | Logits::Offset(_) => [0.0, 2.0, 5.0, 9.0][rng.below(4)],
                Logits::Confident => 40.0,
                _ => 0.0,
            };
            if vocab > 0 {
                let row = &classifier[target * hidden..][..hidden];
                let norm: f64 = row[free.min(hidden)..].iter().map(|c| c * c).sum::<f64>().max(0.25);
                for (e, c) in embeddings[i * hidden..][..hidden].iter_mut().zip(row).skip(free) {
                    *e += peak * c / norm;
                }
            }
            if zipf {
                embeddings[i * hidden] = 1.0;
            }
            if offset.is_some() {
                embeddings[i * hidden + 1] = 1.0;
            }
            targets.push(if rng.uniform() < spec.ignored || vocab == 0 { spec.ignore_index } else { target as i64 });
        }

        let bias = spec.bias.then(|| (0..vocab).map(|_| rng.normal()).collect::<Vec<f64>>());
        let class_weights = spec.class_weights.then(|| {
            // One class in seven does not count at all.
            (0..vocab).map(|v| if v % 7 == 3 { 0.0 } else { 0.25 + 1.5 * rng.uniform() as f32 }).collect()
        });
        let token_weights = spec
            .token_weights
            .then(|| (0..tokens).map(|i| if i % 5 == 4 { 0.0 } else { 0.5 + rng.uniform() as f32 }).collect());
        Tensors {
            spec,
            embeddings: buffer(spec.dtype, &padded(embeddings, hidden, spec.padding)),
            classifier: buffer(spec.dtype, &padded(classifier, hidden, spec.padding)),
            targets,
            bias: bias.map(|b| buffer(spec.dtype, &b)),
            class_weights,
            token_weights,
            seq_len: None,
        }
    }

    /// Dense `f32` tensors written out by a test.
    pub fn dense(embeddings: &[f64], classifier: &[f64], hidden: usize, targets: &[i64]) -> Self {
        let spec = Spec::new(targets.len(), hidden, classifier.len() / hidden.max(1));
        Tensors {
            spec,
            embeddings: buffer(DType::F32, embeddings),
            classifier: buffer(DType::F32, classifier),
            targets: targets.to_vec(),
            bias: None,
            class_weights: None,
            token_weights: None,
            seq_len: None,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        let Spec { tokens, hidden, vocab, padding, .. } = self.spec;
        let stride = if hidden == 0 { 0 } else { hidden + padding };
        Inputs {
            bias: self.bias.as_ref().map(|b| b.as_slice()),
            class_weights: self.class_weights.as_ref().map(Into::into),
            token_weights: self.token_weights.as_ref().map(Into::into),
            seq_len: self.seq_len,
            ..Inputs::new(
                Matrix::new(self.embeddings.as_slice(), tokens, hidden).with_row_stride(stride),
                Matrix::new(self.classifier.as_slice(), vocab, hidden).with_row_stride(stride),
                &self.targets,
            )
        }
    }

    /// Writes one embedding.
    pub fn set_embedding(&mut self, token: usize, column: usize, value: f32) {
        let at = token * (self.spec.hidden + self.spec.padding) + column;
        set(&mut self.embeddings, at, value);
    }

    pub fn set_classifier(&mut self, class: usize, column: usize, value: f32) {
        let at = class * (self.spec.hidden + self.spec.padding) + column;
        set(&mut self.classifier, at, value);
    }
}

fn set(buffer: &mut HostBuffer, at: usize, value: f32) {
    match buffer {
        HostBuffer::F32(v) => v[at] = value,
        HostBuffer::F16(v) => v[at] = f16::from_f32(value),
        HostBuffer::BF16(v) => v[at] = bf16::from_f32(value),
        _ => unreachable!("three float types"),
    }
}
