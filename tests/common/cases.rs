//! The conformance cases, each with the reason why its numbers are what they are.
//!
//! A backend cuts tokens into blocks (of up to 512 or 1024 rows) and the vocabulary into tiles (of 256 or 512 columns), owns
//! classifier gradients by groups (of 128 columns), works in vectors of up to 64 elements, and takes another matrix
//! product below 64 rows. Sizes sit on these edges and one to either side of them. Contractions D are aligned, ragged,
//! shorter than a vector, and long enough to be cut.

use super::data::{Logits, Spec};
use cut_cross_entropy::{CceOptions, DType, Reduction};

/// One problem.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    /// What goes wrong in which kind of implementation if this one fails.
    pub why: &'static str,
    pub spec: Spec,
    pub options: CceOptions,
    /// Tokens a sequence, where the options shift.
    pub seq_len: Option<usize>,
    /// Every output gets an upstream gradient; otherwise only the loss.
    pub every_upstream: bool,
}

impl Case {
    fn new(name: &'static str, why: &'static str, (tokens, hidden, vocab): (usize, usize, usize)) -> Self {
        let seed = name.bytes().fold(7, |h, b| h * 31 % 65_521 + u64::from(b));
        Case {
            name,
            why,
            spec: Spec { ignored: 0.1, seed, ..Spec::new(tokens, hidden, vocab) },
            options: CceOptions::default(),
            seq_len: None,
            every_upstream: false,
        }
    }
    fn spec(mut self, change: impl FnOnce(&mut Spec)) -> Self {
        change(&mut self.spec);
        self
    }
    fn options(mut self, change: impl FnOnce(&mut CceOptions)) -> Self {
        change(&mut self.options);
        self
    }
    fn every_upstream(mut self) -> Self {
        self.every_upstream = true;
        self
    }
}

/// Shapes, with the options at their defaults.
pub fn shapes() -> Vec<Case> {
    let case = Case::new;
    // Ignored tokens leave before blocks are cut: on an edge of the blocks there are none.
    let full = |name, why, shape| Case::new(name, why, shape).spec(|s| s.ignored = 0.0);
    vec![
        case("aligned", "the plain case: whole blocks, whole tiles, whole vectors", (64, 64, 512)),
        case("one_of_everything", "V = 1: p = 1, the loss and every gradient are 0", (1, 1, 1))
            .spec(|s| s.ignored = 0.0),
        case("one_class", "V = 1 with many tokens: log-sum-exp of a single logit", (70, 9, 1)),
        case("one_token", "N = 1: a matrix-vector product, a block of one row", (1, 48, 300)).spec(|s| s.ignored = 0.0),
        case("no_tokens", "N = 0: an empty grid, a mean over nothing", (0, 16, 40)),
        case("no_hidden", "D = 0: every logit is 0, the softmax is uniform", (6, 0, 11)),
        case("one_hidden", "D = 1: shorter than any vector or k-step", (33, 1, 65)),
        case("all_ignored", "the mean has no denominator", (20, 16, 40)).spec(|s| s.ignored = 1.0),
        case("vocab_tile_minus_1", "the only tile is one column short", (65, 32, 255)),
        case("vocab_tile", "exactly one tile", (63, 32, 256)),
        case("vocab_tile_plus_1", "a last tile of a single column: its padding must not count", (64, 32, 257)),
        case("two_tiles_minus_1", "the second tile is one column short", (129, 24, 511)),
        case("two_tiles_plus_1", "edge of 512-column tiles, one column over", (127, 24, 513)),
        case("group_edge", "classifier gradient by groups of 128 columns: one column over", (40, 16, 129)),
        full("token_block", "exactly one full block of 512 rows", (512, 8, 130)),
        full("token_block_plus_1", "a second block of a single row", (513, 8, 130)),
        full("token_block_minus_1", "a block one row short", (511, 8, 130)),
        full("large_token_block", "exactly one full block of 1024 rows", (1024, 8, 130)),
        full("large_token_block_plus_1", "a second block of a single row", (1025, 8, 130)),
        case("uneven_blocks", "N not a multiple of 8 over several blocks", (1031, 5, 67)),
        case("ragged_everything", "no size is a multiple of anything", (77, 61, 787)),
        case("ragged_hidden", "D one over a vector width", (66, 129, 301)),
        case("long_contraction", "D far longer than a k-block: bias and scale only once", (66, 1025, 131))
            .spec(|s| s.bias = true),
        case("real_vocabulary", "GPT-2's 50257: 196 tiles and a last one of 81 columns", (5, 16, 50_257)),
        case("long_batch", "far more tokens than classes", (2050, 8, 33)),
    ]
}

/// Shapes of logits.
pub fn distributions() -> Vec<Case> {
    let case = Case::new;
    let with = |name, why, logits| case(name, why, (70, 24, 521)).spec(|s| s.logits = logits);
    vec![
        with("flat", "every p is about 1/V: what a threshold drops is nearly all of it", Logits::Flat),
        with("confident", "p of the target is 1: gradients are differences of equals", Logits::Confident),
        with("steep", "σ = 25: the maximum jumps from tile to tile, most exponentials are 0", Logits::Steep),
        with(
            "offset_down",
            "all logits about -200: a running maximum that starts at 0 gives lse = -inf",
            Logits::Offset(-200.0),
        ),
        with("offset_up", "all logits about +200: exp overflows without the maximum", Logits::Offset(200.0)),
        with("ties", "the maximum is shared by a third of the classes", Logits::Ties),
    ]
}

/// Options, on a shape with two ragged tiles and two token blocks.
pub fn options() -> Vec<Case> {
    let case = |name, why| Case::new(name, why, (146, 24, 389)).spec(|s| s.bias = true);
    vec![
        case("bias", "added once, after the scale"),
        case("scale", "an inverse temperature, before the bias").options(|o| o.logit_scale = 0.37),
        case("softcap", "its derivative in every gradient").options(|o| o.softcap = Some(5.0)),
        case("saturated_softcap", "1 - (z/cap)² nearly 0").options(|o| {
            o.softcap = Some(0.75);
            o.logit_scale = 2.0;
        }),
        case("smoothing", "the dense rank-one part").options(|o| o.label_smoothing = 0.1),
        case("full_smoothing", "the target counts like any class").options(|o| o.label_smoothing = 1.0),
        case("smoothing_and_softcap", "the dense part is not rank one: the exact path").options(|o| {
            o.label_smoothing = 0.2;
            o.softcap = Some(4.0);
        }),
        case("z_loss", "its part of dlse scales with lse").options(|o| o.z_loss = 0.01),
        case("class_weights", "in the mean's denominator too; some are 0").spec(|s| s.class_weights = true),
        case("token_weights", "in the mean's denominator too; some are 0").spec(|s| s.token_weights = true),
        case("sum", "no denominator").options(|o| o.reduction = Reduction::Sum),
        case("none", "one upstream gradient a token").options(|o| o.reduction = Reduction::None).every_upstream(),
        case("entropy_and_metrics", "a second statistic of the same stream")
            .options(|o| {
                o.entropy = true;
                o.metrics = true;
            })
            .every_upstream(),
        case("without_capture", "the backward runs the forward once more").options(|o| o.capture = false),
        Case { seq_len: Some(73), ..case("shift_in_two_sequences", "the last token of each has no target") }
            .options(|o| o.shift = 1),
        case("shift_by_three", "one sequence, the mean over what is left").options(|o| o.shift = 3),
        case("ignored_class_inside", "ignore_index is a class, and the most popular one")
            .spec(|s| s.ignore_index = 3)
            .options(|o| o.ignore_index = 3),
        case("everything", "all options at once, softcap but no smoothing")
            .spec(|s| {
                s.class_weights = true;
                s.token_weights = true;
                s.padding = 3;
            })
            .options(|o| {
                o.softcap = Some(8.0);
                o.logit_scale = 1.5;
                o.z_loss = 0.003;
                o.shift = 1;
                o.entropy = true;
                o.metrics = true;
            })
            .every_upstream(),
        case("everything_smoothed", "all options at once, smoothing but no softcap")
            .spec(|s| {
                s.class_weights = true;
                s.token_weights = true;
                s.padding = 1;
            })
            .options(|o| {
                o.label_smoothing = 0.15;
                o.logit_scale = 0.8;
                o.z_loss = 0.003;
                o.entropy = true;
                o.metrics = true;
            })
            .every_upstream(),
    ]
}

/// 16-bit inputs: on a ragged shape, with row strides, with everything on, and with rows at multiples of 16 bytes, which
/// have kernels of their own.
pub fn dtypes() -> Vec<Case> {
    let mut cases = Vec::new();
    for (dtype, names) in [
        (DType::F16, ["f16", "f16_strided", "f16_everything", "f16_aligned", "f16_aligned_ragged"]),
        (DType::BF16, ["bf16", "bf16_strided", "bf16_everything", "bf16_aligned", "bf16_aligned_ragged"]),
    ] {
        let case = |name, why| Case::new(name, why, (133, 37, 387)).spec(|s| s.dtype = dtype);
        cases.push(case(names[0], "inputs widened exactly, gradients rounded once"));
        cases.push(case(names[1], "odd strides: rows are not aligned").spec(|s| s.padding = 5));
        cases.push(
            Case::new(names[3], "vectors, whole steps of a tile's columns", (133, 64, 387))
                .spec(|s| (s.dtype, s.bias) = (dtype, true))
                .every_upstream(),
        );
        cases.push(
            Case::new(names[4], "vectors, rows with a distance, a last step of a quarter", (66, 72, 261))
                .spec(|s| (s.dtype, s.padding) = (dtype, 8))
                .options(|o| o.softcap = Some(6.0)),
        );
        cases.push(
            case(names[2], "a 16-bit bias, softcap, and all upstream gradients")
                .spec(|s| {
                    s.bias = true;
                    s.class_weights = true;
                })
                .options(|o| {
                    o.softcap = Some(6.0);
                    o.entropy = true;
                    o.z_loss = 0.01;
                })
                .every_upstream(),
        );
    }
    cases.push(Case::new("f32_strided", "NaN between the rows is never read", (133, 37, 387)).spec(|s| s.padding = 7));
    cases
}
