//! The suite on a CUDA device whose rows have hardly any room for candidates: rows with a larger ε, and exact ones, in every case.

use super::cases::{self, Case};
use super::{Logits, Spec, Tensors, suite};
use cut_cross_entropy::{CudaStaged, DType, Forward, GradientFilter};

/// The ε of each token; see `Forward::row_eps`.
pub fn row_eps(forward: &Forward) -> Vec<f32> {
    CudaStaged::on_device(forward).expect("computed by it").row_eps().expect("readable")
}

/// Tokens whose softmax is flat, more of which passes than there is room for, and tokens whose target, one of the first `classes`, has this
/// logit beside others of about 0.
pub fn flat_and_sharp(spec: Spec, classes: usize, logit: f32, is_sharp: impl Fn(usize) -> bool) -> Tensors {
    let stride = spec.hidden + spec.padding;
    let mut tensors = Spec { logits: Logits::Flat, ..spec }.generate();
    let classifier = tensors.classifier.to_f32_vec();
    for i in 0..spec.tokens {
        if !is_sharp(i) || tensors.targets[i] == spec.ignore_index {
            continue;
        }
        let class = tensors.targets[i] as usize % classes;
        tensors.targets[i] = class as i64;
        let row = &classifier[class * stride..][..spec.hidden];
        let norm: f32 = row.iter().map(|c| c * c).sum();
        row.iter().enumerate().for_each(|(k, c)| tensors.set_embedding(i, k, logit * c / norm));
    }
    tensors
}

/// The cases of the suite that this is for. Of forwards without capture only the backward knows about rows.
pub fn cases() -> Vec<Case> {
    let mut all = [cases::dtypes(), cases::options(), cases::distributions(), cases::shapes()].concat();
    all.retain(|case| case.options.capture && case.spec.tokens * case.spec.vocab <= 200_000);
    all
}

/// The same in 16 bits, in turn bf16 and f16.
pub fn cases_in_16_bits() -> Vec<Case> {
    let mut all = cases();
    for (index, case) in all.iter_mut().enumerate().filter(|(_, case)| case.spec.dtype == DType::F32) {
        case.spec.dtype = [DType::BF16, DType::F16][index % 2];
    }
    all
}

/// Each case with room for six candidates a row. In how many a row had an ε of its own.
pub fn check(backend: &CudaStaged, cases: &[Case], eps: &[f32]) -> usize {
    let backend = backend.clone().with_room(6);
    let filters: Vec<_> =
        eps.iter().map(|&eps| GradientFilter::Unbiased { eps, seed: 0xDEAD_BEEF_0BAD_CAFE }).collect();
    let (mut raised, mut failures) = (0, Vec::new());
    for case in cases {
        match suite::check_case_by_row(&backend, case, &filters, Some(&row_eps)) {
            Ok(telemetry) => raised += usize::from(telemetry.iter().any(|telemetry| telemetry.raised_rows > 0)),
            Err(message) => failures.push(message),
        }
    }
    assert!(failures.is_empty(), "{} of {} cases\n{}", failures.len(), cases.len(), failures.join("\n"));
    raised
}
