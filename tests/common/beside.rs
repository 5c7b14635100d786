//! Exact rows beside sparse ones: what both give to a class is one sum, and more exact rows than accumulators come in panels.

use super::room::{self, row_eps};
use super::suite::{self, Got};
use super::{OwnedUpstream, Spec, Tensors, data};
use cut_cross_entropy::memory::Buffer;
use cut_cross_entropy::{CceOptions, CudaStaged, DType, GradientFilter, HostBuffer};

/// Candidates a row, and the threshold: a flat row has more until it has summed up 64 classes.
pub const ROOM: usize = 8;
pub const EPS: f32 = 1.0 / 64.0;

#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub spec: Spec,
    pub options: CceOptions,
    /// Of blocks of 128 tokens, those that are sure of their targets, and among how many classes these are.
    sharp_blocks: fn(usize) -> bool,
    classes: usize,
}

pub fn cases() -> Vec<Case> {
    let odd = |block: usize| block % 2 == 1;
    let plain = CceOptions { filter: GradientFilter::Threshold { eps: EPS }, ..CceOptions::default() };
    let with = |spec: Spec| Spec { seed: 41, ..spec };
    let case = |name, spec, options, classes| Case { name, spec: with(spec), options, sharp_blocks: odd, classes };
    vec![
        // Several tiles of rows, of classes and of columns, each with a ragged last one.
        case("ragged", Spec::new(400, 264, 700), plain, 100),
        // Lists longer than a warp holds, which a team of threads puts in order; tokens of exact rows that do not follow one another.
        Case {
            sharp_blocks: |block| matches!(block, 2 | 3), // of tokens: rows have moved forward
            ..case("popular", Spec { ignored: 0.1, ..Spec::new(520, 72, 600) }, plain, 3)
        },
        // Rows that end within a vector, the last token's among the sparse ones; and the dense part of label smoothing.
        Case {
            sharp_blocks: |block| block % 2 == 0,
            ..case(
                "odd_columns",
                Spec { padding: 9, ..Spec::new(300, 71, 520) },
                CceOptions { label_smoothing: 0.1, ..plain },
                2,
            )
        },
        case(
            "softcap",
            Spec { class_weights: true, ..Spec::new(300, 136, 300) },
            CceOptions { softcap: Some(50.0), ..plain },
            20,
        ),
        // More exact rows than the 1024 of a panel, some gathered; and two chunks of the vocabulary where all rows are in a pass.
        Case {
            sharp_blocks: |block| matches!(block, 4 | 5),
            ..case("panels", Spec { ignored: 0.03, ..Spec::new(1500, 72, 300) }, plain, 5)
        },
    ]
}

/// Sparse rows have a gradient to give: their targets have 0.6 of the probability. Nothing lies behind the last row.
pub fn tensors(case: &Case) -> Tensors {
    let logit = (case.spec.vocab as f32).ln() + 0.5;
    let mut tensors = room::flat_and_sharp(case.spec, case.classes, logit, |i| (case.sharp_blocks)(i / 128));
    let bias: Vec<f64> = (0..case.spec.vocab).map(|class| (class % 7) as f64 * 0.05).collect();
    tensors.bias = Some(data::buffer(DType::F32, &bias));
    for matrix in [&mut tensors.embeddings, &mut tensors.classifier] {
        let len = matrix.len() - case.spec.padding;
        match matrix {
            HostBuffer::F32(values) => values.truncate(len),
            HostBuffer::F16(values) => values.truncate(len),
            HostBuffer::BF16(values) => values.truncate(len),
            _ => panic!("no type of a matrix"),
        }
    }
    tensors
}

/// Runs the case in this type, and compares everything with the oracle.
pub fn check(backend: &CudaStaged, case: &Case, dtype: DType) -> Got {
    let tensors = tensors(&Case { spec: Spec { dtype, ..case.spec }, ..*case });
    let backend = backend.clone().with_room(ROOM);
    let upstream = OwnedUpstream::loss(0.7);
    let checked = suite::check_one_by_row(&backend, &tensors, &case.options, &upstream, Some(&row_eps));
    let (_, got) = checked.unwrap_or_else(|message| panic!("{} in {dtype}: {message}", case.name));
    let (exact, least) = (got.telemetry.exact_rows, if case.name == "panels" { 1025 } else { 100 });
    assert!(exact >= least && exact < got.telemetry.rows, "{} in {dtype}: {exact} exact rows", case.name);
    got
}
