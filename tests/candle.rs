//! The candle operation against candle's own materialised logits and autodiff.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::ops::log_softmax;
use cut_cross_entropy::candle::{linear_cross_entropy, linear_nll_and_lse};
use cut_cross_entropy::{CceOptions, GradientFilter, Reduction};

const TOKENS: usize = 37;
const HIDDEN: usize = 24;
const VOCAB: usize = 301;

fn exact() -> CceOptions {
    CceOptions { filter: GradientFilter::Exact, ..CceOptions::default() }
}

/// Numbers in about [-scale, scale], the same on every run.
fn random(shape: &[usize], scale: f32, seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    for _ in 0..8 {
        next();
    }
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| scale * next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

struct Operands {
    embeddings: Var,
    classifier: Var,
    bias: Var,
    targets: Tensor,
}

impl Operands {
    fn new(dtype: DType) -> Result<Self> {
        let targets: Vec<i64> = (0..TOKENS as i64).map(|i| i * 7919 % VOCAB as i64).collect();
        Ok(Operands {
            embeddings: Var::from_tensor(&random(&[TOKENS, HIDDEN], 1.0, 1)?.to_dtype(dtype)?)?,
            classifier: Var::from_tensor(&random(&[VOCAB, HIDDEN], 1.0, 2)?.to_dtype(dtype)?)?,
            bias: Var::from_tensor(&random(&[VOCAB], 0.5, 3)?.to_dtype(dtype)?)?,
            targets: Tensor::from_vec(targets, TOKENS, &Device::Cpu)?,
        })
    }

    fn vars(&self) -> [&Var; 3] {
        [&self.embeddings, &self.classifier, &self.bias]
    }

    /// Gradients of all three variables, `None` where candle has none.
    fn gradients(&self, loss: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let store = loss.backward()?;
        Ok(self.vars().map(|var| store.get(var).cloned()).into())
    }
}

/// nll and lse of each token, the logits materialised in `f32`.
fn materialised(embeddings: &Tensor, classifier: &Tensor, bias: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let logits = wide(embeddings)?.matmul(&wide(classifier)?.t()?)?.broadcast_add(&wide(bias)?)?;
    let nll = log_softmax(&logits, D::Minus1)?.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?;
    Ok((nll, logits.log_sum_exp(D::Minus1)?))
}

/// Relative Frobenius distance; NaN where either holds one.
fn distance(ours: &Tensor, theirs: &Tensor) -> Result<f32> {
    assert_eq!(ours.dims(), theirs.dims());
    let (ours, theirs) = (ours.to_dtype(DType::F32)?, theirs.to_dtype(DType::F32)?);
    let norm = |t: &Tensor| -> Result<f32> { t.sqr()?.sum_all()?.sqrt()?.to_scalar() };
    Ok(norm(&(ours - &theirs)?)? / norm(&theirs)?)
}

fn assert_close(ours: &Tensor, theirs: &Tensor, tolerance: f32) -> Result<()> {
    let distance = distance(ours, theirs)?;
    assert!(distance <= tolerance, "relative distance {distance:e}, allowed {tolerance:e}");
    Ok(())
}

fn assert_all_close(ours: &[Option<Tensor>], theirs: &[Option<Tensor>], tolerance: f32) -> Result<()> {
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_close(ours.as_ref().expect("our gradient"), theirs.as_ref().expect("candle's gradient"), tolerance)?;
    }
    Ok(())
}

#[test]
fn f32_loss_and_gradients_match_autodiff() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let loss = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact())?;
    assert_eq!((loss.dims(), loss.dtype()), (&[][..], DType::F32));
    let theirs = materialised(&o.embeddings, &o.classifier, &o.bias, &o.targets)?.0.mean_all()?;
    assert_close(&loss, &theirs, 1e-6)?;
    assert_all_close(&o.gradients(&loss)?, &o.gradients(&theirs)?, 2e-6)
}

#[test]
fn sixteen_bit_loss_and_gradients_match_autodiff_of_the_widened_operands() -> Result<()> {
    for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F16, 5e-4)] {
        let o = Operands::new(dtype)?;
        let loss = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact())?;
        let theirs = materialised(&o.embeddings, &o.classifier, &o.bias, &o.targets)?.0.mean_all()?;
        assert_close(&loss, &theirs, 1e-5)?;
        let ours = o.gradients(&loss)?;
        assert!(ours.iter().flatten().all(|g| g.dtype() == dtype));
        assert_all_close(&ours, &o.gradients(&theirs)?, tolerance)?;
    }
    Ok(())
}

#[test]
fn unreduced_losses_take_the_upstream_weights() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let weights = random(&[TOKENS], 2.0, 4)?;
    let options = CceOptions { reduction: Reduction::None, ..exact() };
    let losses = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &options)?;
    let theirs = materialised(&o.embeddings, &o.classifier, &o.bias, &o.targets)?.0;
    assert_close(&losses, &theirs, 1e-6)?;
    let (ours, theirs) = ((losses * &weights)?.sum_all()?, (theirs * &weights)?.sum_all()?);
    assert_all_close(&o.gradients(&ours)?, &o.gradients(&theirs)?, 2e-6)
}

#[test]
fn nll_and_lse_are_both_differentiable() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let combined = |(nll, lse): (Tensor, Tensor)| nll.mean_all()? + (lse.sqr()?.mean_all()? * 0.01)?;
    let (nll, lse) = linear_nll_and_lse(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact())?;
    let theirs = materialised(&o.embeddings, &o.classifier, &o.bias, &o.targets)?;
    assert_close(&nll, &theirs.0, 1e-6)?;
    assert_close(&lse, &theirs.1, 1e-6)?;
    let expected = o.gradients(&combined(theirs)?)?;
    assert_all_close(&o.gradients(&combined((nll, lse))?)?, &expected, 2e-6)?;

    let options = CceOptions { z_loss: 0.01, ..exact() };
    let z_loss = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &options)?;
    assert_all_close(&o.gradients(&z_loss)?, &expected, 2e-6)
}

#[test]
fn a_gradient_is_computed_for_what_candle_tracks() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let all = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact())?;
    let all = o.gradients(&all)?;
    for (frozen, _) in o.vars().iter().enumerate() {
        let [e, c, bias] =
            std::array::from_fn(|i| if i == frozen { o.vars()[i].detach() } else { o.vars()[i].as_tensor().clone() });
        let loss = linear_cross_entropy(&e, &c, &o.targets, Some(&bias), &exact())?;
        for (i, (ours, all)) in o.gradients(&loss)?.iter().zip(&all).enumerate() {
            match ours {
                None => assert_eq!(i, frozen),
                Some(ours) => assert_eq!(distance(ours, all.as_ref().unwrap())?, 0.0),
            }
        }
    }
    let (e, c) = (o.embeddings.detach(), o.classifier.detach());
    assert!(!linear_cross_entropy(&e, &c, &o.targets, None, &exact())?.track_op());
    Ok(())
}

#[test]
fn gradients_flow_on_into_what_computed_the_embeddings() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let body = Var::from_tensor(&random(&[HIDDEN, HIDDEN], 0.4, 5)?)?;
    let hidden = o.embeddings.matmul(&body)?.tanh()?;
    let ours = linear_cross_entropy(&hidden, &o.classifier, &o.targets, Some(&o.bias), &exact())?.backward()?;
    let theirs = materialised(&hidden, &o.classifier, &o.bias, &o.targets)?.0.mean_all()?.backward()?;
    assert_close(ours.get(&body).unwrap(), theirs.get(&body).unwrap(), 3e-6)
}

#[test]
fn strided_operands_are_read_as_they_lie() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let wide = Tensor::cat(&[&random(&[TOKENS, 5], 9.0, 6)?, o.embeddings.as_tensor()], 1)?;
    let tall = Tensor::cat(&[&random(&[3, HIDDEN], 9.0, 7)?, o.classifier.as_tensor()], 0)?;
    let transposed = o.classifier.t()?.contiguous()?.t()?; // columns contiguous: has to be copied
    let embeddings = Var::from_tensor(&wide)?.narrow(1, 5, HIDDEN)?;
    let bias = Tensor::cat(&[o.bias.as_tensor(), o.bias.as_tensor()], 0)?.narrow(0, VOCAB, VOCAB)?;
    let targets = Tensor::stack(&[&o.targets, &o.targets], 1)?.narrow(1, 1, 1)?.squeeze(1)?;
    assert!(!embeddings.is_contiguous() && !transposed.is_contiguous() && !targets.is_contiguous());

    let dense = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &exact())?;
    for classifier in [tall.narrow(0, 3, VOCAB)?, transposed] {
        let strided = linear_cross_entropy(&embeddings, &classifier, &targets, Some(&bias), &exact())?;
        assert_eq!(strided.to_scalar::<f32>()?, dense.to_scalar::<f32>()?);
    }

    // Gradients through both: the row-strided embeddings in place, the transposed classifier through its copy.
    let (wide, turned) = (Var::from_tensor(&wide)?, Var::from_tensor(&o.classifier.t()?.contiguous()?)?);
    let (e, c) = (wide.narrow(1, 5, HIDDEN)?, turned.t()?);
    let strided = linear_cross_entropy(&e, &c, &o.targets, Some(&o.bias), &exact())?.backward()?;
    let dense = dense.backward()?;
    let d_embeddings = strided.get(&wide).unwrap().narrow(1, 5, HIDDEN)?;
    assert_eq!(distance(&d_embeddings, dense.get(&o.embeddings).unwrap())?, 0.0);
    assert_eq!(distance(&strided.get(&turned).unwrap().t()?, dense.get(&o.classifier).unwrap())?, 0.0);
    Ok(())
}

#[test]
fn sequences_shift_each_on_their_own() -> Result<()> {
    let (batch, seq) = (3, 7);
    let embeddings = Var::from_tensor(&random(&[batch, seq, HIDDEN], 1.0, 8)?)?;
    let classifier = Var::from_tensor(&random(&[VOCAB, HIDDEN], 1.0, 9)?)?;
    let tokens: Vec<u32> = (0..(batch * seq) as u32).map(|i| i * 37 % VOCAB as u32).collect();
    let tokens = Tensor::from_vec(tokens, (batch, seq), &Device::Cpu)?;
    let shifted = CceOptions { shift: 1, ..exact() };
    let ours = linear_cross_entropy(&embeddings, &classifier, &tokens, None, &shifted)?;
    let (inputs, targets) = (embeddings.narrow(1, 0, seq - 1)?, tokens.narrow(1, 1, seq - 1)?);
    let sliced = linear_cross_entropy(&inputs, &classifier, &targets, None, &exact())?;
    assert_close(&ours, &sliced, 1e-6)?;
    let (ours, sliced) = (ours.backward()?, sliced.backward()?);
    for var in [&embeddings, &classifier] {
        assert_close(ours.get(var).unwrap(), sliced.get(var).unwrap(), 1e-6)?;
    }
    let unreduced = CceOptions { reduction: Reduction::None, ..shifted };
    let losses = linear_cross_entropy(&embeddings, &classifier, &tokens, None, &unreduced)?;
    assert_eq!(losses.dims(), [batch, seq]);
    assert_eq!(losses.narrow(1, seq - 1, 1)?.sum_all()?.to_scalar::<f32>()?, 0.0);
    Ok(())
}

#[test]
fn ignored_tokens_count_nowhere_in_any_target_dtype() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let half = TOKENS / 2;
    let kept = o.targets.narrow(0, 0, half)?;
    let expected: f32 =
        linear_cross_entropy(&o.embeddings.narrow(0, 0, half)?, &o.classifier, &kept, None, &exact())?.to_scalar()?;
    for (dtype, ignore_index) in [(DType::I64, -100_i64), (DType::U32, u32::MAX.into()), (DType::I32, -1)] {
        let marks = Tensor::full(ignore_index, TOKENS - half, &Device::Cpu)?;
        let targets = Tensor::cat(&[&kept, &marks], 0)?.to_dtype(dtype)?;
        let options = CceOptions { ignore_index, ..exact() };
        let loss: f32 = linear_cross_entropy(&o.embeddings, &o.classifier, &targets, None, &options)?.to_scalar()?;
        assert!((loss - expected).abs() <= 1e-6 * expected, "{dtype:?}: {loss} and {expected}");
    }
    Ok(())
}

#[test]
fn a_second_backward_gives_the_same_gradients() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let options = CceOptions::default();
    let loss = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, Some(&o.bias), &options)?;
    let (first, second) = (o.gradients(&loss)?, o.gradients(&loss)?);
    assert_all_close(&second, &first, 0.0)
}

#[test]
fn seeds_choose_the_sample_and_average_to_the_exact_gradient() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let d_classifier = |filter| -> Result<Tensor> {
        let options = CceOptions { filter, ..CceOptions::default() };
        let loss = linear_cross_entropy(&o.embeddings, &o.classifier, &o.targets, None, &options)?;
        Ok(loss.backward()?.get(&o.classifier).unwrap().clone())
    };
    let unbiased = |seed| d_classifier(GradientFilter::Unbiased { eps: 0.05, seed });
    let exact = d_classifier(GradientFilter::Exact)?;
    assert_eq!(distance(&unbiased(0)?, &unbiased(0)?)?, 0.0);
    assert!(distance(&unbiased(1)?, &unbiased(0)?)? > 1e-3);
    let seeds = 256;
    let mut mean = unbiased(0)?.zeros_like()?;
    for seed in 0..seeds {
        mean = (mean + (unbiased(seed)? / seeds as f64)?)?;
    }
    let (one, all) = (distance(&unbiased(0)?, &exact)?, distance(&mean, &exact)?);
    assert!(all <= one / 8.0, "error of one seed {one:e}, of the mean of {seeds} {all:e}");
    Ok(())
}

#[test]
fn errors_say_what_is_wrong() -> Result<()> {
    let o = Operands::new(DType::F32)?;
    let (e, c, y) = (o.embeddings.as_tensor(), o.classifier.as_tensor(), &o.targets);
    let message = |e: &Tensor, c: &Tensor, y: &Tensor, bias: Option<&Tensor>, options: &CceOptions| {
        linear_cross_entropy(e, c, y, bias, options).expect_err("must be refused").to_string()
    };
    let refused = |found: String, expected: &str| assert!(found.contains(expected), "{found:?} lacks {expected:?}");
    let default = CceOptions::default();
    refused(
        message(e, &c.narrow(1, 0, 8)?, y, None, &default),
        "embeddings is [37, 24] and classifier is [301, 8]; they must agree on hidden",
    );
    refused(message(e, c, &y.narrow(0, 0, 5)?, None, &default), "targets is [5] and embeddings is [37, 24]");
    refused(message(&e.flatten_all()?, c, y, None, &default), "expected [N, D] or [B, S, D]");
    refused(message(e, &c.unsqueeze(0)?, y, None, &default), "classifier is [1, 301, 24]");
    refused(message(e, c, y, Some(&o.bias.unsqueeze(0)?), &default), "bias is [1, 301]");
    refused(message(e, c, y, Some(&o.bias.narrow(0, 0, 9)?), &default), "they must agree on vocab");
    refused(message(&e.to_dtype(DType::F64)?, c, y, None, &default), "embeddings has dtype f64");
    refused(message(&e.to_dtype(DType::BF16)?, c, y, None, &default), "classifier has dtype f32");
    refused(message(e, c, &y.to_dtype(DType::F32)?, None, &default), "targets has dtype f32; expected i64, i32 or u32");
    refused(message(e, c, &(y + 300.0)?, None, &default), "targets[1] is 393, outside [0, 301)");
    let hot = CceOptions { logit_scale: 0.0, ..default };
    refused(message(e, c, y, None, &hot), "option logit_scale is 0");
    Ok(())
}
