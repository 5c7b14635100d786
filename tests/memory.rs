//! Memory is a tested promise: the peak of the heap beyond inputs and outputs, measured by a counting allocator.
//!
//! One test function, because the allocator counts for the whole process.

mod common;
#[path = "../benches/common/heap.rs"]
mod heap;

use common::{Logits, OwnedUpstream, Spec, Tensors};
use cut_cross_entropy::cpu::CpuPlan;
use cut_cross_entropy::{
    CceOptions, Cpu, DType, GradientDType, GradientFilter, GradientRequest, Problem, cce_backward, cce_forward,
};

#[global_allocator]
static ALLOCATOR: heap::CountingAllocator = heap::CountingAllocator;

/// What a step of forward and backward took beyond its outputs.
#[derive(Debug, Clone, Copy)]
struct Step {
    workspace: usize,
    outputs: usize,
    /// Live after the forward, beyond the per-token outputs: captured candidates.
    captured: usize,
}

fn step(tensors: &Tensors, options: &CceOptions) -> Step {
    let Spec { tokens, hidden, vocab, dtype, .. } = tensors.spec;
    let inputs = tensors.inputs();
    let upstream = OwnedUpstream::loss(1.0);
    let request = options.gradients;
    let element = if request.dtype == GradientDType::F32 { 4 } else { dtype.size_in_bytes() };
    let gradient_bytes = element
        * (if request.embeddings { tokens * hidden } else { 0 } + if request.classifier { vocab * hidden } else { 0 });
    let per_token = 4 * 4 * tokens;
    let outputs = gradient_bytes + per_token;
    let (forward, forward_peak, kept) = heap::measure(|| cce_forward(&Cpu, &inputs, options).expect("legal"));
    let (gradients, backward_peak, _) =
        heap::measure(|| cce_backward(&Cpu, &inputs, &forward, &upstream.borrow()).expect("its own forward"));
    assert_eq!(gradients.d_embeddings.is_some(), request.embeddings);
    assert_eq!(gradients.d_classifier.is_some(), request.classifier);
    let (captured, peak) = (kept.saturating_sub(per_token), forward_peak.max(kept + backward_peak));
    Step { workspace: peak.saturating_sub(outputs), outputs, captured }
}

/// Not proportional to any size: thread-local scratch, work lists, hash tables of the pool.
const SLACK: usize = 512 << 10;

const MIB: usize = 1 << 20;

#[test]
fn memory_is_what_the_plan_says() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    // What is allocated once in a process (gemm's kernels and blocking, thread-local packing) is not the step's.
    let warm_up = || _ = step(&Spec::new(300, 64, 1000).generate(), &CceOptions::default());
    pool(2).install(|| {
        warm_up();
        stays_within_the_plan();
        has_no_vocabulary_term();
        frozen_tensors_cost_nothing();
        evaluation_captures_nothing();
    });
    // Here threads share token blocks, whatever the shape.
    pool(7).install(|| {
        warm_up();
        stays_within_the_plan();
        has_no_vocabulary_term();
    });
}

fn stays_within_the_plan() {
    for (tokens, hidden, vocab) in [(700, 48, 4000), (1500, 32, 1000), (64, 128, 9000), (1, 16, 300)] {
        for dtype in [DType::F32, DType::BF16] {
            for logits in [Logits::Realistic, Logits::Flat] {
                let tensors = Spec { dtype, logits, ..Spec::new(tokens, hidden, vocab) }.generate();
                for filter in common::suite::filters() {
                    let options = CceOptions { filter, ..CceOptions::default() };
                    let inputs = tensors.inputs();
                    let problem = Problem::new(&inputs, &options).expect("legal");
                    let plan: CpuPlan = Cpu.plan(&problem);
                    let took = step(&tensors, &options);
                    assert!(
                        took.workspace <= plan.workspace_bytes() + SLACK,
                        "{filter:?} {logits:?} {dtype}: {took:?}, planned {} for\n{plan}",
                        plan.workspace_bytes()
                    );
                }
            }
        }
    }
}

fn has_no_vocabulary_term() {
    let (tokens, hidden) = (512, 16);
    for filter in [GradientFilter::Exact, GradientFilter::default()] {
        let options = CceOptions { filter, ..CceOptions::default() };
        let at =
            |vocab| step(&Spec { logits: Logits::Confident, ..Spec::new(tokens, hidden, vocab) }.generate(), &options);
        let (small, large) = (at(8192), at(32_768));
        // Logits in memory would add 4 · 512 · 24,576 bytes = 48 MiB.
        let grown = large.workspace.saturating_sub(small.workspace);
        assert!(grown <= 2 * MIB, "{filter:?}: {small:?} at V = 8192, {large:?} at V = 32768");
        assert!(large.workspace < 4 * tokens * 32_768 / 4, "{large:?}");
    }
}

fn frozen_tensors_cost_nothing() {
    for filter in [GradientFilter::Exact, GradientFilter::default()] {
        let of = |spec: Spec, embeddings, classifier| {
            let gradients = GradientRequest { embeddings, classifier, ..GradientRequest::default() };
            let took = step(&spec.generate(), &CceOptions { gradients, filter, ..CceOptions::default() });
            took.workspace + took.outputs
        };
        // All of forward and backward together take less than the one gradient would.
        let large_classifier = Spec::new(128, 64, 60_000);
        let without = of(large_classifier, true, false);
        assert!(without < 4 * 60_000 * 64 / 2, "{filter:?}: {without} bytes with a frozen classifier");
        // Here the workspace has terms in N: the gradient must at least be missing from the peak.
        let many_tokens = Spec { ignored: 0.5, ..Spec::new(16_000, 128, 64) };
        let (with, without) = (of(many_tokens, true, true), of(many_tokens, false, true));
        assert!(with >= without + 4 * 16_000 * 128 - SLACK, "{filter:?}: {with}, {without} with frozen embeddings");
    }
}

fn evaluation_captures_nothing() {
    let tensors = Spec { logits: Logits::Flat, ..Spec::new(600, 16, 3000) }.generate();
    let inputs = tensors.inputs();
    let training = CceOptions::default();
    let evaluation = CceOptions { capture: false, ..training };
    let (with, without) = (step(&tensors, &training), step(&tensors, &evaluation));
    // Flat rows at ε = 2^-10 hold about 1000 entries of 8 bytes each.
    assert!(with.captured > 600 * 800 * 8, "{with:?}");
    assert!(without.captured < 600 * 256, "{without:?}");
    let none = GradientRequest { embeddings: false, classifier: false, bias: false, ..GradientRequest::default() };
    let frozen = step(&tensors, &CceOptions { gradients: none, ..training });
    assert!(frozen.captured < 600 * 256, "nothing is captured for gradients that nobody asks for: {frozen:?}");

    let of = |options| {
        let forward = cce_forward(&Cpu, &inputs, options).expect("legal");
        let gradients = cce_backward(&Cpu, &inputs, &forward, &Default::default()).expect("its own forward");
        (forward.loss.to_bits(), gradients.d_embeddings, gradients.d_classifier, gradients.telemetry)
    };
    assert!(of(&training) == of(&evaluation), "the same gradients, bit by bit");
}
