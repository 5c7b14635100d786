//! The table of cases and their data.

use cut_cross_entropy::{
    CceOptions, DType, GradientDType, GradientFilter, GradientRequest, HostBuffer, HostSlice, Inputs, Matrix,
    Reduction, Shape,
};

/// One case.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    pub shape: Shape,
    pub dtype: DType,
    pub options: CceOptions,
    pub bias: Bias,
    pub weights: bool,
    pub seq_len: Option<usize>,
    /// Elements between rows beyond the columns; they hold NaN.
    pub padding: usize,
    /// Every how manyeth token is ignored; 1 ignores all.
    pub ignore_every: Option<usize>,
    /// Upstream gradients of nll and lse too.
    pub every_upstream: bool,
}

/// The bias of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    Absent,
    Finite,
    /// Every fifth class is masked by -inf, no target among them.
    Masking,
}

const EXACT: GradientFilter = GradientFilter::Exact;
/// Coarse enough that both filters drop something at these vocabularies.
const UNBIASED: GradientFilter = GradientFilter::Unbiased { eps: 1.0 / 64.0, seed: 7 };
const THRESHOLD: GradientFilter = GradientFilter::Threshold { eps: 1.0 / 64.0 };
const FILTERS: [(&str, GradientFilter); 3] = [("exact", EXACT), ("unbiased", UNBIASED), ("threshold", THRESHOLD)];

/// Tokens, vocabulary, hidden: nothing, one of each, ragged everywhere, more than one token block and column group,
/// more classes than a logits tile has columns.
const SHAPES: [(usize, usize, usize); 8] =
    [(0, 10, 4), (1, 1, 1), (1, 7, 5), (5, 129, 33), (64, 256, 64), (67, 1000, 31), (300, 515, 40), (9, 5000, 17)];

/// All cases: each shape with each dtype and filter, then each option with each filter.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for (tokens, vocab, hidden) in SHAPES {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (filter_name, filter) in FILTERS {
                let shape = Shape { tokens, hidden, vocab };
                cases.push(Case {
                    name: format!("{shape} {dtype} {filter_name}"),
                    shape,
                    dtype,
                    options: CceOptions { filter, ..CceOptions::default() },
                    bias: Bias::Absent,
                    weights: false,
                    seq_len: None,
                    padding: 0,
                    ignore_every: None,
                    every_upstream: false,
                });
            }
        }
    }
    let shape = Shape { tokens: 72, hidden: 24, vocab: 400 };
    for (filter_name, filter) in FILTERS {
        for (name, edit) in variants() {
            let mut case = Case {
                name: format!("{name} {filter_name}"),
                shape,
                dtype: DType::F32,
                options: CceOptions { filter, ..CceOptions::default() },
                bias: Bias::Absent,
                weights: false,
                seq_len: None,
                padding: 0,
                ignore_every: None,
                every_upstream: false,
            };
            edit(&mut case);
            cases.push(case);
        }
    }
    cases
}

type Edit = fn(&mut Case);

fn variants() -> Vec<(&'static str, Edit)> {
    vec![
        ("reduction sum", |c| c.options.reduction = Reduction::Sum),
        ("reduction none", |c| c.options.reduction = Reduction::None),
        ("bias", |c| c.bias = Bias::Finite),
        ("bias -inf", |c| c.bias = Bias::Masking),
        ("softcap", |c| c.options.softcap = Some(5.0)),
        ("softcap bias", |c| (c.options.softcap, c.bias) = (Some(5.0), Bias::Finite)),
        ("logit scale", |c| c.options.logit_scale = 0.4),
        ("label smoothing", |c| c.options.label_smoothing = 0.2),
        ("label smoothing 1", |c| c.options.label_smoothing = 1.0),
        ("label smoothing softcap", |c| (c.options.label_smoothing, c.options.softcap) = (0.2, Some(5.0))),
        ("z-loss", |c| c.options.z_loss = 1e-2),
        ("weights", |c| c.weights = true),
        ("weights label smoothing", |c| (c.weights, c.options.label_smoothing) = (true, 0.2)),
        ("ignored tokens", |c| c.ignore_every = Some(3)),
        ("all ignored", |c| c.ignore_every = Some(1)),
        ("shift 1", |c| c.options.shift = 1),
        ("shift 2 in sequences of 12", |c| (c.options.shift, c.seq_len) = (2, Some(12))),
        ("entropy", |c| c.options.entropy = true),
        ("entropy softcap bf16", |c| {
            (c.options.entropy, c.options.softcap, c.dtype) = (true, Some(5.0), DType::BF16);
        }),
        ("metrics", |c| c.options.metrics = true),
        ("row stride", |c| c.padding = 3),
        ("row stride bf16", |c| (c.padding, c.dtype) = (3, DType::BF16)),
        ("upstream of nll and lse", |c| c.every_upstream = true),
        ("no capture", |c| c.options.capture = false),
        ("no d_embeddings", |c| c.options.gradients.embeddings = false),
        ("no d_classifier", |c| c.options.gradients.classifier = false),
        ("f32 gradients of bf16", |c| {
            c.dtype = DType::BF16;
            c.options.gradients = GradientRequest { dtype: GradientDType::F32, ..GradientRequest::default() };
        }),
        ("everything", |c| {
            c.options = CceOptions {
                reduction: Reduction::None,
                logit_scale: 0.7,
                label_smoothing: 0.1,
                z_loss: 1e-3,
                shift: 1,
                entropy: true,
                metrics: true,
                ..c.options
            };
            (c.bias, c.weights, c.seq_len, c.padding) = (Bias::Finite, true, Some(24), 2);
            (c.ignore_every, c.every_upstream, c.dtype) = (Some(5), true, DType::F16);
        }),
    ]
}

/// The tensors of a case.
pub struct Data {
    case: Case,
    embeddings: HostBuffer,
    classifier: HostBuffer,
    targets: Vec<i64>,
    bias: Vec<f32>,
    class_weights: Vec<f32>,
    token_weights: Vec<f32>,
}

impl Data {
    /// A pure function of the case.
    pub fn new(case: &Case) -> Self {
        let Shape { tokens, hidden, vocab } = case.shape;
        // Logits with a standard deviation of about 2.5: a head, a tail, and a few classes that matter.
        let scale = (2.5 / (hidden.max(1) as f32).sqrt()).sqrt();
        let matrix = |rows: usize, seed: u64| {
            let values = (0..rows * (hidden + case.padding)).map(|k| match k % (hidden + case.padding) {
                column if column < hidden => scale * 1.7 * signed(seed, k),
                _ => f32::NAN,
            });
            buffer(case.dtype, values)
        };
        let target = |i: usize| match case.ignore_every {
            Some(every) if i.is_multiple_of(every) => case.options.ignore_index,
            _ => {
                let class = (signed(3, i).abs() * vocab as f32) as usize % vocab.max(1);
                // Classes that the masking bias masks are multiples of 5, but for class 0.
                let masked = case.bias == Bias::Masking && class > 0 && class.is_multiple_of(5);
                (class - usize::from(masked)) as i64
            }
        };
        let bias = |v: usize| match case.bias {
            Bias::Masking if v > 0 && v.is_multiple_of(5) => f32::NEG_INFINITY,
            _ => signed(4, v),
        };
        Data {
            embeddings: matrix(tokens, 1),
            classifier: matrix(vocab, 2),
            targets: (0..tokens).map(target).collect(),
            bias: (0..vocab).map(bias).collect(),
            class_weights: (0..vocab).map(|v| signed(5, v) + 1.25).collect(),
            token_weights: (0..tokens).map(|i| signed(6, i) + 0.75).collect(),
            case: case.clone(),
        }
    }

    /// As the library takes them.
    pub fn inputs(&self) -> Inputs<'_> {
        let Shape { tokens, hidden, vocab } = self.case.shape;
        let stride = hidden + self.case.padding;
        let weights = |values| self.case.weights.then_some(HostSlice::F32(values));
        Inputs {
            bias: (self.case.bias != Bias::Absent).then_some(HostSlice::F32(&self.bias)),
            class_weights: weights(&self.class_weights),
            token_weights: weights(&self.token_weights),
            seq_len: self.case.seq_len,
            ..Inputs::new(
                Matrix::new(self.embeddings.as_slice(), tokens, hidden).with_row_stride(stride),
                Matrix::new(self.classifier.as_slice(), vocab, hidden).with_row_stride(stride),
                &self.targets,
            )
        }
    }

    /// One number a token.
    pub fn per_token(&self, seed: u64) -> Vec<f32> {
        (0..self.case.shape.tokens).map(|i| signed(seed, i)).collect()
    }
}

fn buffer(dtype: DType, values: impl Iterator<Item = f32>) -> HostBuffer {
    match dtype {
        DType::F16 => HostBuffer::F16(values.map(half::f16::from_f32).collect()),
        DType::BF16 => HostBuffer::BF16(values.map(half::bf16::from_f32).collect()),
        _ => HostBuffer::F32(values.collect()),
    }
}

/// Uniform in [-1, 1), a function of seed and index.
fn signed(seed: u64, index: usize) -> f32 {
    let mut x = (index as u64).wrapping_add(seed << 40).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((x ^ (x >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
