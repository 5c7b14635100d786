//! What is wrong, fails or changes, and that none of it is taken for right.

use super::*;
use crate::common::slice_oracle::Outcome;
use cpu::CpuRunner;
use cut_cross_entropy::{DType, HostBuffer, Shape};
use methods::Last;

/// The processor, or what is wrong with it.
struct Off<'a> {
    cpu: CpuRunner<'a>,
    /// What its evaluation's loss is off by.
    loss: f32,
    /// Its evaluation fails.
    fails: bool,
    /// What it says that the last step left.
    last: Option<Last>,
}

impl<'a> Off<'a> {
    fn new(workload: &'a Workload, loss: f32, fails: bool) -> Self {
        Off { cpu: CpuRunner::new(workload).expect("fits"), loss, fails, last: None }
    }
}

impl Runner for Off<'_> {
    fn step(&mut self, method: Method) -> anyhow::Result<Step> {
        ensure!(!self.fails || !matches!(method, Method::Evaluation(_)), "no such launch");
        self.cpu.step(method)
    }
    fn matmul(&mut self) -> anyhow::Result<Seconds> {
        self.cpu.matmul()
    }
    fn poison(&mut self) -> anyhow::Result<()> {
        self.cpu.poison()
    }
    fn last(&self) -> &Last {
        self.last.as_ref().unwrap_or(self.cpu.last())
    }
    fn outcome(&mut self, method: Method) -> anyhow::Result<Outcome<'_>> {
        let off = if matches!(method, Method::Evaluation(_)) { self.loss } else { 0.0 };
        let outcome = self.cpu.outcome(method)?;
        Ok(Outcome { loss: outcome.loss + off, ..outcome })
    }
    fn planned_bytes(&self, method: Method, problem: &Problem<'_>) -> anyhow::Result<usize> {
        self.cpu.planned_bytes(method, problem)
    }
}

fn tiny(ignored: f64) -> Workload {
    let shape = Shape { tokens: 40, hidden: 16, vocab: 300 };
    let recipe = Recipe { softcap: 0.0, kept: None, ignored, seed: 1 };
    workloads::generate(&Machine::Cpu, shape, DType::F32, recipe).expect("fits")
}

#[test]
fn an_ignored_token_has_zeros_or_the_method_is_wrong() {
    let workload = tiny(0.5);
    let shape = workload.shape;
    let ignored = (0..shape.tokens).find(|&token| workload.target(token).is_none()).expect("half of them are");
    let oracle = SliceOracle::new(&workload);
    let mut runner = CpuRunner::new(&workload).expect("fits");
    for method in [Method::Ours(GradientFilter::Exact, KernelChoice::default()), Method::Baseline] {
        runner.poison().expect("memory");
        runner.step(method).expect("runs");
        let right = runner.outcome(method).expect("ran");
        oracle.check(&right).expect("right");
        let [d_embeddings, d_classifier] = right.gradients.expect("both");
        let off = |value: f32| {
            let (mut nll, mut d_embeddings) = (right.nll.to_vec(), d_embeddings.as_f32().expect("f32").to_vec());
            nll[ignored] = value;
            let by_nll = oracle.check(&Outcome { nll: &nll, ..right });
            d_embeddings[ignored * shape.hidden + 3] = value;
            let gradients = Some([&HostBuffer::F32(d_embeddings), d_classifier]);
            let by_gradient = oracle.check(&Outcome { gradients, ..right });
            [by_nll, by_gradient]
        };
        assert!(off(0.0).iter().all(Result::is_ok));
        assert!(off(1e-30).iter().all(Result::is_err));
        assert!(off(f32::NAN).iter().all(Result::is_err));
    }
}

#[test]
fn a_wrong_method_is_left_out_and_the_others_are_not() {
    let workload = tiny(0.0);
    let kernels = KernelChoice::default();
    let methods = [Method::Ours(GradientFilter::Exact, kernels), Method::Evaluation(kernels), Method::Baseline];
    for (off, fails, right, why) in [
        (0.0, false, vec![0, 1, 2], ""),
        (1e-3, false, vec![0, 2], "loss is off"),
        (f32::NAN, false, vec![0, 2], "loss is off"),
        (0.0, true, vec![0, 2], "failed: no such launch"),
    ] {
        let mut runner = Off::new(&workload, off, fails);
        let mut wrong = Vec::new();
        let mut note = |method, how: String| wrong.push((method, how));
        let (found, reports) =
            verify(&mut runner, &workload, &methods, &ProgressBar::hidden(), &mut note).expect("it goes on");
        assert_eq!(found, right.iter().map(|&index| methods[index]).collect::<Vec<_>>(), "off by {off}");
        assert_eq!(reports.len(), right.len());
        assert_eq!(wrong.len(), methods.len() - right.len());
        assert!(wrong.iter().all(|(method, how)| *method == methods[1] && how.contains(why)), "{wrong:?}");
    }
}

/// As `cce bench` takes them.
fn three_rounds() -> BenchArgs {
    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: BenchArgs,
    }
    <Command as clap::Parser>::parse_from(["bench", "--rounds", "3"]).args
}

#[test]
fn what_was_timed_before_something_fails_counts() {
    let workload = tiny(0.0);
    let kernels = KernelChoice::default();
    let methods = [Method::Ours(GradientFilter::Exact, kernels), Method::Evaluation(kernels)];
    let (mut runner, mut wrong, hidden) = (Off::new(&workload, 0.0, false), Vec::new(), ProgressBar::hidden());
    let mut note = |method, how: String| wrong.push((method, how));
    let (_, mut reports) = verify(&mut runner, &workload, &methods, &hidden, &mut note).expect("right");
    runner.fails = true;
    let measured = measure(&mut runner, &methods, &three_rounds(), &mut reports, &hidden, &mut note);
    let rounds: Vec<usize> = measured.expect("what there is").rounds.iter().map(Vec::len).collect();
    assert_eq!(rounds, [1, 0]);
    assert_eq!(wrong, [(methods[1], "fails in round 0: no such launch".into())]);
}

#[test]
fn nothing_timed_is_no_chart() {
    let directory = tempfile::tempdir().expect("a directory");
    let chart = directory.path().join("chart.svg");
    chart::write(&chart, &[]).expect("nothing to do");
    assert!(!chart.exists());
}

#[test]
fn a_round_that_does_not_repeat_what_was_verified_is_reported() {
    let args = three_rounds();
    let workload = tiny(0.0);
    let methods = [Method::Ours(GradientFilter::Exact, KernelChoice::default()), Method::Baseline];
    let hidden = ProgressBar::hidden();
    for changed in [false, true] {
        let mut runner = Off::new(&workload, 0.0, false);
        let mut wrong = Vec::new();
        let mut note = |method, how: String| wrong.push((method, how));
        let (_, mut reports) = verify(&mut runner, &workload, &methods, &hidden, &mut note).expect("right");
        runner.last = changed.then(Last::default);
        let measured = measure(&mut runner, &methods, &args, &mut reports, &hidden, &mut note).expect("it goes on");
        assert!(measured.rounds.iter().all(|rounds| rounds.len() == 3));
        // Said once, and not of the baseline, which promises nothing.
        let said = wrong.iter().map(|(method, how)| (*method, how.contains("round 0"))).collect::<Vec<_>>();
        assert_eq!(said, if changed { vec![(methods[0], true)] } else { Vec::new() });
    }
}
