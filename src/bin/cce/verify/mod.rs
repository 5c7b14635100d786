//! `cce verify`: every backend of this machine against the f64 oracle, case by case.

mod cases;
mod compare;
mod filtered;

use crate::args::AnyBackend;
use cases::{Case, Data};
use clap::Args;
use compare::{Comparison, worse};
use cut_cross_entropy::plan::KernelChoice;
use cut_cross_entropy::reference::{Reference, ReferenceUpstream};
use cut_cross_entropy::{
    Backend, Cpu, DType, Forward, GradientFilter, Gradients, Host, Problem, Reduction, Upstream, cce_backward,
    cce_forward,
};

/// Parity of every backend of this machine with the f64 reference.
///
/// Runs a table of shapes, element types, options and filters. Each line shows the error of a case that is largest
/// relative to its tolerance, that tolerance, and the tensor; NaN is wrong. Exits with 1 if any case is wrong.
#[derive(Args)]
pub struct VerifyArgs {
    /// Run only cases whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Which CUDA kernels to verify: auto, portable, hopper, or `hopper:cluster=off,lead=3` to measure what the planner
    /// would not choose.
    #[arg(long, default_value_t = KernelChoice::default())]
    kernels: KernelChoice,
    /// Print only the cases that are wrong.
    #[arg(long)]
    quiet: bool,
}

/// Runs the subcommand; whether everything was right.
pub fn run(args: &VerifyArgs) -> anyhow::Result<bool> {
    let cuda = AnyBackend::cuda(args.kernels);
    let backends: Vec<&AnyBackend> = [Some(&AnyBackend::Cpu(Cpu)), cuda.as_ref().ok()].into_iter().flatten().collect();
    let all = cases::all();
    let wanted: Vec<_> = all.iter().filter(|c| c.name.contains(&args.only)).collect();
    let (mut wrong, mut total) = (0, 0);
    for (backend, case) in backends.iter().flat_map(|b| wanted.iter().map(|case| (b.host(), *case))) {
        let outcome = verify(backend, case);
        let right = outcome.as_ref().is_ok_and(Comparison::passes);
        total += 1;
        wrong += u32::from(!right);
        if args.quiet && right {
            continue;
        }
        let verdict = if right { "ok  " } else { "FAIL" };
        let detail = match outcome {
            Ok(worst) => worst.to_string(),
            Err(error) => format!("{error:#}"),
        };
        say!("{verdict} {} {:<52} {detail}", backend.name(), case.name)?;
    }
    if let Err(reason) = &cuda {
        say!("skip cuda: {reason:#}")?;
    }
    say!("{} of {total} cases right", total - wrong)?;
    Ok(wrong == 0 && total > 0)
}

/// The comparison that is worst relative to its tolerance.
fn verify<B: Backend<Memory = Host> + ?Sized>(backend: &B, case: &Case) -> anyhow::Result<Comparison> {
    let data = Data::new(case);
    let inputs = data.inputs();
    let problem = Problem::new(&inputs, &case.options)?;
    let forward = cce_forward(backend, &inputs, &case.options)?;
    let vector = |on: bool, seed: u64| on.then(|| data.per_token(seed));
    let none = case.options.reduction == Reduction::None;
    let d_loss = if none { 0.0 } else { 0.75 };
    let d_losses = vector(none, 11);
    let [d_nll, d_lse] = [12, 13].map(|seed| vector(case.every_upstream, seed));
    let d_entropy = vector(case.options.entropy, 14);
    let upstream = Upstream {
        loss: d_loss,
        loss_scale: None,
        losses: d_losses.as_ref().map(Into::into),
        nll: d_nll.as_ref().map(Into::into),
        lse: d_lse.as_ref().map(Into::into),
        entropy: d_entropy.as_ref().map(Into::into),
    };
    let gradients = cce_backward(backend, &inputs, &forward, &upstream)?;

    let reference = Reference::new(&problem);
    let wide = |vector: &Option<Vec<f32>>| match vector {
        Some(vector) => vector.iter().map(|&x| f64::from(x)).collect(),
        None => vec![0.0; case.shape.tokens],
    };
    let reference_upstream = ReferenceUpstream {
        loss: d_loss.into(),
        losses: wide(&d_losses),
        nll: wide(&d_nll),
        lse: wide(&d_lse),
        entropy: wide(&d_entropy),
    };
    let unit = compare::logit_unit(&reference.forward());
    let of_forward = compare_forward(&reference, &forward, unit);
    // A GPU rounds logit gradients of the exact path, and of frequent classes, once to the type of its matrix units: that of the inputs.
    // A processor that multiplies bf16 does the former.
    let cuda = backend.name() == "cuda";
    let rounding = match case.dtype {
        DType::F16 if cuda => 2.0_f64.powi(-11),
        DType::BF16 if cuda || cut_cross_entropy::cpu::multiplies_bf16() => 2.0_f64.powi(-8),
        _ => 0.0,
    };
    let of_gradients = compare_gradients(&reference, &reference_upstream, &gradients, unit, rounding)?;
    Ok(worse(of_forward, of_gradients))
}

fn compare_forward(reference: &Reference, forward: &Forward, unit: f64) -> Comparison {
    let expected = reference.forward();
    let largest = |values: &[f64]| values.iter().fold(1.0_f64, |a, &b| a.max(b.abs()));
    // Weights and z-loss enlarge a loss and its error alike.
    let weights = largest(&reference.class_weights) * largest(&reference.token_weights);
    let loss_unit = unit * weights * (1.0 + 2.0 * f64::from(reference.options.z_loss) * largest(&expected.lse));
    let sum_unit = match reference.options.reduction {
        Reduction::Mean => loss_unit,
        Reduction::None | Reduction::Sum => loss_unit * (reference.targets.len().max(1) as f64),
    };
    let mut worst = [
        compare::vector("loss", &[forward.loss], &[expected.loss], sum_unit),
        compare::vector("losses", &forward.losses, &expected.losses, loss_unit),
        compare::vector("nll", &forward.nll, &expected.nll, unit),
        compare::vector("lse", &forward.lse, &expected.lse, unit),
        compare::vector("target_logit", &forward.target_logit, &expected.target_logit, unit),
    ]
    .into_iter()
    .fold(Comparison::default(), worse);
    if let Some(entropy) = &forward.entropy {
        // Its derivative by a logit is p times a distance from the mean logit.
        worst = worse(worst, compare::vector("entropy", entropy, &expected.entropy, 10.0 * unit));
    }
    if let (Some(argmax), Some(accuracy)) = (&forward.argmax, forward.accuracy) {
        worst = worse(worst, compare::argmax(argmax, &expected, unit));
        let one_row = 1.0 / reference.targets.len().max(1) as f64; // a near tie may go either way
        worst = worse(worst, compare::vector("accuracy", &[accuracy], &[expected.accuracy], one_row));
    }
    worst
}

fn compare_gradients(
    reference: &Reference,
    upstream: &ReferenceUpstream,
    gradients: &Gradients,
    unit: f64,
    rounding: f64,
) -> anyhow::Result<Comparison> {
    let telemetry = gradients.telemetry;
    let exact = reference.options.filter == GradientFilter::Exact || telemetry.exact_rows == telemetry.rows;
    anyhow::ensure!(
        exact || telemetry.exact_rows == 0,
        "{} of {} rows outgrew their candidates, which none of these cases should make them do",
        telemetry.exact_rows,
        telemetry.rows
    );
    let (filtered, borderline, rounded) = filtered::backward(reference, upstream, rounding);
    let expected = if exact { reference.backward(upstream) } else { filtered };
    let slack = std::array::from_fn::<_, 3, _>(|k| borderline[k] + rounded[k]); // of an exact filter nothing is borderline
    let hidden = reference.hidden;
    let tensors = [
        ("d_embeddings", &gradients.d_embeddings, &expected.d_embeddings, hidden, slack[0]),
        ("d_classifier", &gradients.d_classifier, &expected.d_classifier, hidden, slack[1]),
        ("d_bias", &gradients.d_bias, &expected.d_bias, 1, slack[2]),
    ];
    let compared = tensors.into_iter().filter_map(|(name, ours, expected, columns, slack)| {
        ours.as_ref().map(|ours| compare::gradient(name, ours, expected, columns, unit, slack))
    });
    Ok(compared.fold(Comparison::default(), worse))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cut_cross_entropy::{GradientSinks, HostBuffer, HostSliceMut, Result, Sink, Telemetry};

    /// The CPU backend with one number changed.
    #[derive(Clone, Copy)]
    enum Broken {
        Nowhere,
        LossIsNan,
        OneLse,
        OneClassifierElement,
        EmbeddingsNotWritten,
    }

    impl Backend for Broken {
        type Memory = Host;
        fn name(&self) -> &'static str {
            "broken"
        }
        fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<HostBuffer> {
            Cpu.allocate(tensor, dtype, len)
        }
        fn borrow_mut<'a>(&self, owned: &'a mut HostBuffer) -> HostSliceMut<'a> {
            Cpu.borrow_mut(owned)
        }
        fn forward(&self, problem: &Problem<'_>) -> Result<Forward> {
            let mut forward = Cpu.forward(problem)?;
            match self {
                Broken::LossIsNan => forward.loss = f32::NAN,
                Broken::OneLse => forward.lse[1] += 1e-3,
                _ => {}
            }
            Ok(forward)
        }
        fn backward(
            &self,
            problem: &Problem<'_>,
            forward: &Forward,
            upstream: &Upstream<'_>,
            sinks: GradientSinks<'_>,
        ) -> Result<Telemetry> {
            let mut right = cce_backward(&Cpu, problem.inputs(), forward, upstream)?;
            match (self, &mut right.d_embeddings, &mut right.d_classifier) {
                (Broken::OneClassifierElement, _, Some(HostBuffer::F32(g))) => {
                    if let Some(largest) = g.iter_mut().max_by(|a, b| a.abs().total_cmp(&b.abs())) {
                        *largest *= 1.01;
                    }
                }
                (Broken::EmbeddingsNotWritten, Some(HostBuffer::F32(g)), _) => g.fill(0.0),
                _ => {}
            }
            for (sink, gradient) in [(sinks.embeddings, right.d_embeddings), (sinks.classifier, right.d_classifier)] {
                if let (Sink::Overwrite(HostSliceMut::F32(to)), Some(HostBuffer::F32(from))) = (sink, gradient) {
                    to.copy_from_slice(&from);
                }
            }
            Ok(right.telemetry)
        }
    }

    #[test]
    fn every_kind_of_error_is_found() {
        let cases = cases::all();
        for name in ["N=64 V=256 D=64 f32 exact", "N=64 V=256 D=64 f32 unbiased"] {
            let case = cases.iter().find(|c| c.name == name).expect("in the table");
            let passes = |backend| verify(&backend, case).is_ok_and(|worst| worst.passes());
            assert!(passes(Broken::Nowhere));
            for broken in
                [Broken::LossIsNan, Broken::OneLse, Broken::OneClassifierElement, Broken::EmbeddingsNotWritten]
            {
                assert!(!passes(broken), "{name}");
            }
        }
    }
}
