//! The candle operation on CUDA tensors, on the emulated GPU: forward and candle's own backward against the same on the CPU.
//! `sh emulator/candle.sh` builds candle with CUDA and runs this.
#![cfg(target_os = "linux")]

use candle_core::{DType, Device, Result, Tensor, Var};
use cut_cross_entropy::candle::{linear_cross_entropy, linear_nll_and_lse};
use cut_cross_entropy::cuda::cudarc::driver::CudaContext;
use cut_cross_entropy::plan::{Group, LaunchPlan, Workload};
use cut_cross_entropy::{CceOptions, Cuda, GradientFilter, Reduction, Shape};
use cut_cross_entropy_emulator as emulator;
use std::sync::{Mutex, MutexGuard, PoisonError};

const TOKENS: usize = 37;
const HIDDEN: usize = 24;
const VOCAB: usize = 301;

/// Tests share the emulated device and its counters: one at a time.
fn device() -> Result<(MutexGuard<'static, ()>, Device)> {
    static ONE: Mutex<()> = Mutex::new(());
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    emulator::install().expect("the emulator is built with this test");
    emulator::configure(&emulator::Config::default());
    emulator::reset_counters();
    Ok((guard, Device::new_cuda(0)?))
}

/// Numbers in [-1, 1), the same on every run.
fn random(shape: &[usize], seed: u32) -> Result<Tensor> {
    let values = |i: usize| (i as u32 + seed * 7919).wrapping_mul(0x9E37_79B9) as i32 as f32 / 2.0_f32.powi(31);
    Tensor::from_vec((0..shape.iter().product()).map(values).collect::<Vec<f32>>(), shape, &Device::Cpu)
}

struct Operands {
    embeddings: Var,
    classifier: Var,
    bias: Var,
    targets: Tensor,
}

impl Operands {
    /// On the CPU, and the same numbers on the device.
    fn pair(dtype: DType, device: &Device) -> Result<[Operands; 2]> {
        let targets: Vec<i64> = (0..TOKENS as i64).map(|i| if i % 9 == 4 { -100 } else { i * 7919 % 301 }).collect();
        let on = |device: &Device| -> Result<Operands> {
            let var = |t: Tensor| Var::from_tensor(&t.to_dtype(dtype)?.to_device(device)?);
            Ok(Operands {
                embeddings: var(random(&[TOKENS, HIDDEN], 1)?)?,
                classifier: var(random(&[VOCAB, HIDDEN], 2)?)?,
                bias: var(random(&[VOCAB], 3)?)?,
                targets: Tensor::from_vec(targets.clone(), TOKENS, device)?,
            })
        };
        Ok([on(&Device::Cpu)?, on(device)?])
    }

    fn gradients(&self, loss: &Tensor) -> Result<Vec<Tensor>> {
        let store = loss.backward()?;
        [&self.embeddings, &self.classifier, &self.bias]
            .map(|var| store.get(var).expect("a gradient").to_device(&Device::Cpu)?.to_dtype(DType::F32))
            .into_iter()
            .collect()
    }
}

/// Relative Frobenius distance; NaN where either holds one.
fn assert_close(ours: &Tensor, theirs: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(ours.dims(), theirs.dims());
    let norm = |t: &Tensor| -> Result<f32> { t.sqr()?.sum_all()?.sqrt()?.to_scalar() };
    let distance = norm(&(ours - theirs)?)? / norm(theirs)?;
    assert!(distance <= tolerance, "relative distance {distance:e}, allowed {tolerance:e}");
    Ok(())
}

#[test]
fn loss_and_gradients_are_those_of_the_cpu() -> Result<()> {
    let (_one, cuda) = device()?;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let [host, device] = Operands::pair(dtype, &cuda)?;
        for filter in [GradientFilter::Exact, GradientFilter::Unbiased { eps: 1.0 / 64.0, seed: 5 }] {
            let options = CceOptions { filter, z_loss: 0.01, ..CceOptions::default() };
            let [ours, theirs] = [&device, &host]
                .map(|o| linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &options));
            let (ours, theirs) = (ours?, theirs?);
            assert_close(&ours.to_device(&Device::Cpu)?, &theirs, 1e-6)?;
            // Half a unit in the last place, twice: a GPU's exact path rounds logit gradients and their sums, the CPU the sums alone.
            let unit = match dtype {
                DType::F32 => 1e-6,
                DType::F16 => 2_f32.powi(-11),
                _ => 2_f32.powi(-8),
            };
            for (ours, theirs) in device.gradients(&ours)?.iter().zip(&host.gradients(&theirs)?) {
                assert_close(ours, theirs, 2.0 * unit)?;
            }
        }
    }
    for kernel in ["lce_d_classifier_f32", "lce_d_classifier_bf16", "lce_exact_f32", "badd_f16", "badd_bf16"] {
        assert!(emulator::counters(kernel).is_some(), "{kernel} did not run");
    }
    Ok(())
}

#[test]
fn upstream_gradients_of_every_output_stay_on_the_device() -> Result<()> {
    let (_one, cuda) = device()?;
    let operands = Operands::pair(DType::F32, &cuda)?;
    let exact = CceOptions { filter: GradientFilter::Exact, ..CceOptions::default() };
    let weights = random(&[TOKENS], 4)?;
    // candle's gradient of a vector is that of its sum. Its own kernels here: products, squares, sums of two tensors.
    let losses = |o: &Operands| -> Result<Tensor> {
        let options = CceOptions { reduction: Reduction::None, ..exact };
        let losses = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &options)?;
        losses * weights.to_device(o.targets.device())?
    };
    let scaled = |o: &Operands| -> Result<Tensor> {
        linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact)? * 3.0
    };
    let nll_and_lse = |o: &Operands| -> Result<Tensor> {
        let (nll, lse) = linear_nll_and_lse(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact)?;
        nll + lse.sqr()?
    };
    for loss_of in [&losses as &dyn Fn(&Operands) -> Result<Tensor>, &scaled, &nll_and_lse] {
        let [theirs, ours] = [0, 1].map(|i| operands[i].gradients(&loss_of(&operands[i])?));
        for (ours, theirs) in ours?.iter().zip(&theirs?) {
            assert_close(ours, theirs, 3e-6)?;
        }
    }
    Ok(())
}

#[test]
fn strided_operands_are_read_in_place_and_nothing_but_the_plan_is_allocated() -> Result<()> {
    let (_one, cuda) = device()?;
    let [host, device] = Operands::pair(DType::F32, &cuda)?;
    let wide = Tensor::cat(&[&random(&[VOCAB, 40], 6)?, host.classifier.as_tensor()], 1)?;
    let wide = Var::from_tensor(&wide.to_device(&cuda)?)?;
    let classifier = wide.narrow(1, 40, HIDDEN)?;
    let options = CceOptions::default();
    let used = || -> Result<usize> {
        cuda.synchronize()?;
        let (free, total) = CudaContext::new(0).expect("present").mem_get_info().expect("known");
        Ok(total - free)
    };
    let run = || linear_cross_entropy(&device.embeddings, &classifier, &device.targets, None, &options);
    run()?; // kernels are loaded
    let before = used()?;
    let loss = run()?;
    let info = Cuda::new(0).expect("present").device().clone();
    let shape = Shape { tokens: TOKENS, hidden: HIDDEN, vocab: VOCAB };
    let workload = Workload::of_shape(shape, cut_cross_entropy::DType::F32, options);
    let plan = LaunchPlan::new(&workload, &info).expect("fits");
    // Four vectors of N and the loss, which candle takes.
    let planned = plan.workspace.group_bytes(Group::Saved) + 4 * (4 * TOKENS + 1);
    let rounded = planned + 7 * 1024; // seven allocations, each a little larger; one is what the loss left behind
    let found = used()? - before;
    assert!((planned..rounded).contains(&found), "{found} bytes, planned {planned}");

    let dense = linear_cross_entropy(&host.embeddings, &host.classifier, &host.targets, None, &options)?;
    assert_close(&loss.to_device(&Device::Cpu)?, &dense, 1e-6)
}

#[test]
fn a_target_out_of_range_makes_the_loss_nan() -> Result<()> {
    let (_one, cuda) = device()?;
    let [_, o] = Operands::pair(DType::F32, &cuda)?;
    let targets = Tensor::from_vec(vec![VOCAB as u32; TOKENS], TOKENS, &cuda)?;
    let loss = linear_cross_entropy(&o.embeddings, &o.classifier, &targets, None, &CceOptions::default())?;
    assert!(loss.to_scalar::<f32>()?.is_nan());
    Ok(())
}

#[test]
fn tensors_on_different_devices_are_refused() -> Result<()> {
    let (_one, cuda) = device()?;
    let [host, device] = Operands::pair(DType::F32, &cuda)?;
    let options = CceOptions::default();
    let refused = |classifier: &Var, targets: &Tensor, expected: &str| {
        let error = linear_cross_entropy(&device.embeddings, classifier, targets, None, &options).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused(&host.classifier, &device.targets, "classifier is on Cpu and embeddings is on Cuda");
    refused(&device.classifier, &host.targets, "targets is on Cpu and embeddings is on Cuda");
    Ok(())
}
