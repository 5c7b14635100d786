//! Forward, backward and both on the CPU, beside one plain matmul (T) and the materialising baseline.
//!
//! Small shapes, for regressions. For multiples of T on a noisy machine, memory and large shapes: `cce bench`.

// `cce bench` uses the rest of it.
#[allow(dead_code)]
mod common;

use common::baseline::Baseline;
use common::slice_oracle::{Outcome, SliceOracle};
use common::survey::{host_products, survey};
use common::workload::{CONFIDENCE, Workload};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use cut_cross_entropy::{
    CceOptions, Cpu, DType, GradientFilter, GradientSinks, HostBuffer, Shape, Sink, Telemetry, Upstream,
    cce_backward_into, cce_forward,
};
use std::time::{Duration, Instant};

/// A slice of GPT-2's vocabulary, and one with more classes than anything else.
const SHAPES: [Shape; 2] =
    [Shape { tokens: 512, hidden: 256, vocab: 16_384 }, Shape { tokens: 256, hidden: 128, vocab: 65_536 }];

const FILTERS: [(&str, GradientFilter); 2] = [
    ("unbiased", GradientFilter::Unbiased { eps: GradientFilter::DEFAULT_EPS, seed: 0 }),
    ("exact", GradientFilter::Exact),
];

struct Gradients {
    d_embeddings: HostBuffer,
    d_classifier: HostBuffer,
}

impl Gradients {
    fn new(shape: Shape, dtype: DType) -> Self {
        let buffer = |rows| HostBuffer::zeros("gradient", dtype, rows * shape.hidden).expect("memory");
        Gradients { d_embeddings: buffer(shape.tokens), d_classifier: buffer(shape.vocab) }
    }

    fn sinks(&mut self) -> GradientSinks<'_> {
        GradientSinks {
            embeddings: Sink::Overwrite(self.d_embeddings.as_mut()),
            classifier: Sink::Overwrite(self.d_classifier.as_mut()),
            bias: Sink::Skip,
        }
    }
}

fn benches(criterion: &mut Criterion) {
    for shape in SHAPES {
        for dtype in [DType::F32, DType::BF16] {
            let workload = generate(shape, dtype);
            let oracle = SliceOracle::new(&workload);
            let mut group = criterion.benchmark_group(format!("{shape} {dtype}"));
            group.throughput(Throughput::Elements(shape.tokens as u64)).sampling_mode(SamplingMode::Flat);
            group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
            let mut gradients = Gradients::new(shape, dtype);
            materialising(&mut group, &workload, &oracle, &mut gradients);
            for (name, filter) in FILTERS {
                ours(&mut group, &workload, &oracle, &mut gradients, name, filter);
            }
            group.finish();
        }
    }
}

fn generate(shape: Shape, dtype: DType) -> Workload {
    const SEED: u64 = 1;
    let workload = Workload::without_targets(shape, dtype, None, SEED, CONFIDENCE);
    let found = survey(&workload, Some(SEED), &mut host_products(&workload));
    workload.surveyed(found.expect("a matmul on the host does not fail"))
}

type Group<'a> = BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn materialising(
    group: &mut Group<'_>,
    workload: &Workload,
    oracle: &SliceOracle<'_>,
    Gradients { d_embeddings, d_classifier }: &mut Gradients,
) {
    let mut baseline = Baseline::default();
    let loss = baseline.forward(workload);
    baseline.backward(workload, d_embeddings, d_classifier);
    let (nll, lse, filter) = (&baseline.nll[..], &baseline.lse[..], GradientFilter::Exact);
    let gradients = Some([&*d_embeddings, &*d_classifier]);
    verify(
        oracle,
        &Outcome {
            loss,
            nll,
            lse,
            gradients,
            filter,
            exact_rows: 0,
            row_eps: None,
            sums_plainly: true,
            cuts_off: false,
        },
    );

    group.bench_function("one plain matmul", |b| b.iter(|| baseline.multiply_only(workload)));
    group.bench_function(BenchmarkId::new("forward", "materialising"), |b| b.iter(|| baseline.forward(workload)));
    group.bench_function(BenchmarkId::new("backward", "materialising"), |b| {
        // It consumes what the forward left in place, so each needs its own forward, outside the clock.
        b.iter_custom(|iterations| {
            let mut elapsed = Duration::ZERO;
            for _ in 0..iterations {
                baseline.forward(workload);
                let clock = Instant::now();
                baseline.backward(workload, d_embeddings, d_classifier);
                elapsed += clock.elapsed();
            }
            elapsed
        });
    });
    group.bench_function(BenchmarkId::new("both", "materialising"), |b| {
        b.iter(|| {
            baseline.forward(workload);
            baseline.backward(workload, d_embeddings, d_classifier);
        });
    });
}

fn ours(
    group: &mut Group<'_>,
    workload: &Workload,
    oracle: &SliceOracle<'_>,
    gradients: &mut Gradients,
    name: &str,
    filter: GradientFilter,
) {
    let (inputs, options) = (workload.inputs(), CceOptions { filter, ..CceOptions::default() });
    let forward = || cce_forward(&Cpu, &inputs, &options).expect("a legal problem");
    let backward = |forward: &cut_cross_entropy::Forward, sinks: GradientSinks<'_>| -> Telemetry {
        cce_backward_into(&Cpu, &inputs, forward, &Upstream::default(), sinks).expect("a legal problem")
    };
    let result = forward();
    let Telemetry { exact_rows, .. } = backward(&result, gradients.sinks());
    let (nll, lse) = (&result.nll[..], &result.lse[..]);
    let computed = Some([&gradients.d_embeddings, &gradients.d_classifier]);
    verify(
        oracle,
        &Outcome {
            loss: result.loss,
            nll,
            lse,
            gradients: computed,
            filter,
            exact_rows,
            row_eps: None,
            sums_plainly: false,
            cuts_off: false,
        },
    );

    group.bench_function(BenchmarkId::new("forward", name), |b| b.iter(forward));
    group.bench_function(BenchmarkId::new("backward", name), |b| b.iter(|| backward(&result, gradients.sinks())));
    group.bench_function(BenchmarkId::new("both", name), |b| b.iter(|| backward(&forward(), gradients.sinks())));
}

/// What is wrong is not timed.
fn verify(oracle: &SliceOracle<'_>, outcome: &Outcome<'_>) {
    if let Err(wrong) = oracle.check(outcome) {
        panic!("{wrong}");
    }
}

criterion_group!(cpu, benches);
criterion_main!(cpu);
