//! What the test binaries share: data, expected values with their tolerances, the comparison, and the case table.

#![allow(dead_code, unused_imports)] // each test binary uses its own part

#[cfg(feature = "cuda")]
pub mod beside;
pub mod cases;
pub mod compare;
#[macro_use]
pub mod conformance;
pub mod data;
#[cfg(all(feature = "cuda", target_os = "linux"))]
pub mod emulated;
pub mod expected;
pub mod naive;
pub mod picked;
#[cfg(feature = "cuda")]
pub mod room;
pub mod suite;

pub use compare::{assert_close, check_close, frobenius};
pub use data::{Logits, Rng, Spec, Tensors};
pub use expected::Expected;

use cut_cross_entropy::Upstream;
use cut_cross_entropy::reference::ReferenceUpstream;

/// Owned upstream gradients, for both the crate and the oracle.
#[derive(Debug, Clone, Default)]
pub struct OwnedUpstream {
    pub loss: f32,
    pub loss_scale: Option<[f32; 1]>,
    pub losses: Option<Vec<f32>>,
    pub nll: Option<Vec<f32>>,
    pub lse: Option<Vec<f32>>,
    pub entropy: Option<Vec<f32>>,
}

impl OwnedUpstream {
    pub fn loss(loss: f32) -> Self {
        OwnedUpstream { loss, ..Default::default() }
    }

    /// Every output has an upstream gradient of its own size and sign.
    pub fn everything(tokens: usize, entropy: bool, rng: &mut Rng) -> Self {
        let mut vector = || Some((0..tokens).map(|_| rng.normal() as f32).collect::<Vec<f32>>());
        OwnedUpstream {
            loss: 1.75,
            loss_scale: Some([0.625]),
            losses: vector(),
            nll: vector(),
            lse: vector(),
            entropy: if entropy { vector() } else { None },
        }
    }

    pub fn borrow(&self) -> Upstream<'_> {
        Upstream {
            loss: self.loss,
            loss_scale: self.loss_scale.as_ref().map(|scale| scale[..].into()),
            losses: self.losses.as_ref().map(Into::into),
            nll: self.nll.as_ref().map(Into::into),
            lse: self.lse.as_ref().map(Into::into),
            entropy: self.entropy.as_ref().map(Into::into),
        }
    }

    pub fn widen(&self, tokens: usize) -> ReferenceUpstream {
        let wide = |v: &Option<Vec<f32>>| match v {
            Some(v) => v.iter().map(|&x| x.into()).collect(),
            None => vec![0.0; tokens],
        };
        ReferenceUpstream {
            loss: f64::from(self.loss) * f64::from(self.loss_scale.map_or(1.0, |[scale]| scale)),
            losses: wide(&self.losses),
            nll: wide(&self.nll),
            lse: wide(&self.lse),
            entropy: wide(&self.entropy),
        }
    }
}
