//! Linear cross-entropy for large vocabularies, without the logits.
//!
//! The loss at the end of a language model is a matrix product with the classifier followed by a log-sum-exp over the
//! vocabulary. Materialised, its N×V logits are the largest tensor of the training step. This crate fuses the two, and
//! its backward follows the sparsity of the softmax: the forward puts aside the few entries that matter, the gradients
//! are sums over those, and a random rounding of small probabilities keeps them unbiased.
//!
//! ```text
//! z_iv  = softcap(scale · E_i·C_v + bias_v)        softcap(x) = cap · tanh(x / cap)
//! lse_i = ln Σ_v exp z_iv      nll_i = lse_i - z_{i,y_i}      p_iv = exp(z_iv - lse_i)
//! G_iv  = ∂L/∂z_iv             dE = G C     dC = Gᵀ E     dbias_v = Σ_i G_iv
//! ```
//!
//! Tokens N, hidden D, vocab V; E [N, D] `embeddings`, C [V, D] `classifier`, y `[N]` `targets`.
//!
//! ```
//! use cut_cross_entropy::{CceOptions, Cpu, Inputs, Matrix, Upstream, cce_backward, cce_forward};
//!
//! let (tokens, hidden, vocab) = (4, 8, 100);
//! let embeddings: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32).sin()).collect();
//! let classifier: Vec<f32> = (0..vocab * hidden).map(|i| (i as f32).cos()).collect();
//! let targets = [3_i64, 99, -100, 0]; // the third token is ignored
//!
//! let inputs = Inputs::new(
//!     Matrix::new(&embeddings, tokens, hidden),
//!     Matrix::new(&classifier, vocab, hidden),
//!     &targets,
//! );
//! let forward = cce_forward(&Cpu, &inputs, &CceOptions::default())?;
//! let gradients = cce_backward(&Cpu, &inputs, &forward, &Upstream::default())?;
//! println!("loss {}, {} entries kept", forward.loss, gradients.telemetry.kept_entries);
//! # assert!(forward.loss > 0.0 && gradients.d_classifier.is_some());
//! # Ok::<(), cut_cross_entropy::Error>(())
//! ```
//!
//! # Features
//! | feature | what it adds |
//! |---|---|
//! | (none) | the operation, the `f64` [`mod@reference`], the [`Cpu`] backend |
//! | `cuda` | the CUDA backend, for GPUs from Ampere on; the crate still builds and runs without CUDA |
//! | `candle` | the loss as a differentiable candle operation |
//! | `candle-cuda` | the same on CUDA tensors; candle needs an nvcc to build |
//! | `cli` | the `cce` binary |
//! | `cublas` | with `cuda` and `cli`: `cce bench` on a GPU |

#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
pub mod cpu;
mod element;
mod error;
pub mod filter;
pub mod memory;
mod options;
mod outputs;
pub mod plan;
mod problem;
pub mod reference;

#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub mod cuda;

#[cfg(feature = "candle")]
#[cfg_attr(docsrs, doc(cfg(feature = "candle")))]
pub mod candle;

pub use backend::{Backend, cce_backward, cce_backward_into, cce_forward, cce_forward_backward};
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub use cuda::{Cuda, CudaStaged};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use memory::{Host, HostBuffer, HostSlice, HostSliceMut, Memory};
pub use options::{CceOptions, GradientDType, GradientFilter, GradientRequest, Reduction};
pub use outputs::{Forward, GradientSinks, Gradients, Sink, Telemetry, Upstream};
pub use problem::{Inputs, Matrix, Problem, Shape};

/// The README's example is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
