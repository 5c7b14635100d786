//! A small decoder-only transformer up to its last hidden state; the head is in `head.rs`.

use crate::data::Rng;
use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::ops::{rms_norm_slow, softmax}; // the fused versions have no backward
use candle_nn::rotary_emb::rope_slow;

/// Sizes of the model.
#[derive(Debug, Clone, Copy)]
pub struct ModelConfig {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub seq_len: usize,
}

const RMS_EPS: f32 = 1e-5;
const ROPE_BASE: f32 = 10_000.0;

/// Pre-norm block: attention, then a squared-ReLU MLP of four times the width.
struct Block {
    attention_norm: Var, // [D]
    qkv: Var,            // [D, 3 D]
    attention_out: Var,  // [D, D]
    mlp_norm: Var,       // [D]
    mlp_up: Var,         // [D, 4 D]
    mlp_down: Var,       // [4 D, D]
}

/// Embedding, blocks, final norm, and the classifier, which is not tied to the embedding.
pub struct Model {
    config: ModelConfig,
    embedding: Var, // [V, D]
    blocks: Vec<Block>,
    final_norm: Var,     // [D]
    pub classifier: Var, // [V, D]
    cos: Tensor,         // [S, D / heads / 2]
    sin: Tensor,         // [S, D / heads / 2]
    mask: Tensor,        // [S, S], 0 on and below the diagonal, -inf above
}

impl Model {
    /// A model of random weights, the same for the same seed.
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self> {
        let ModelConfig { vocab, hidden, layers, heads, seq_len } = config;
        let mut rng = Rng(seed);
        let mut normal = |rows: usize, columns: usize, deviation: f32| {
            let values: Vec<f32> = (0..rows * columns).map(|_| deviation * rng.normal()).collect();
            Var::from_vec(values, (rows, columns), &Device::Cpu)
        };
        let ones = || Var::ones(hidden, candle_core::DType::F32, &Device::Cpu);
        let deviation = (hidden as f32).powf(-0.5);
        let into_residual = deviation / (2.0 * layers as f32).sqrt(); // keeps the residual's variance at any depth
        let block = |_| {
            Ok(Block {
                attention_norm: ones()?,
                qkv: normal(hidden, 3 * hidden, deviation)?,
                attention_out: normal(hidden, hidden, into_residual)?,
                mlp_norm: ones()?,
                mlp_up: normal(hidden, 4 * hidden, deviation)?,
                mlp_down: normal(4 * hidden, hidden, into_residual / 2.0)?,
            })
        };
        let blocks = (0..layers).map(block).collect::<Result<_>>()?;
        let (embedding, classifier) = (normal(vocab, hidden, 0.5)?, normal(vocab, hidden, 0.02)?);

        let half = hidden / heads / 2;
        let angle = |i: usize| (i / half) as f32 * ROPE_BASE.powf(-((i % half) as f32) / half as f32);
        let angles = Tensor::from_iter((0..seq_len * half).map(angle), &Device::Cpu)?.reshape((seq_len, half))?;
        let masked = |i: usize| if i % seq_len > i / seq_len { f32::NEG_INFINITY } else { 0.0 };
        let mask = Tensor::from_iter((0..seq_len * seq_len).map(masked), &Device::Cpu)?.reshape((seq_len, seq_len))?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        Ok(Model { config, embedding, blocks, final_norm: ones()?, classifier, cos, sin, mask })
    }

    /// Everything that is trained.
    pub fn vars(&self) -> Vec<Var> {
        let of_block = |b: &Block| {
            [&b.attention_norm, &b.qkv, &b.attention_out, &b.mlp_norm, &b.mlp_up, &b.mlp_down].map(Var::clone)
        };
        let blocks = self.blocks.iter().flat_map(of_block);
        [&self.embedding, &self.final_norm, &self.classifier].into_iter().cloned().chain(blocks).collect()
    }

    /// Number of trained numbers.
    pub fn num_parameters(&self) -> usize {
        self.vars().iter().map(|v| v.elem_count()).sum()
    }

    /// Ids [B, S] to the last hidden states [B, S, D], which the head multiplies with the classifier.
    pub fn hidden_states(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, seq_len) = ids.dims2()?;
        let mut x = self.embedding.index_select(&ids.flatten_all()?, 0)?; // [B S, D]
        for block in &self.blocks {
            x = (&x + self.attention(block, &rms_norm_slow(&x, &block.attention_norm, RMS_EPS)?, batch)?)?;
            let up = rms_norm_slow(&x, &block.mlp_norm, RMS_EPS)?.matmul(&block.mlp_up)?;
            x = (x + up.relu()?.sqr()?.matmul(&block.mlp_down)?)?;
        }
        rms_norm_slow(&x, &self.final_norm, RMS_EPS)?.reshape((batch, seq_len, self.config.hidden))
    }

    /// [B S, D] to [B S, D].
    fn attention(&self, block: &Block, x: &Tensor, batch: usize) -> Result<Tensor> {
        let ModelConfig { hidden, heads, .. } = self.config;
        let (seq_len, head_dim) = (x.dim(0)? / batch, hidden / heads);
        let qkv = x.matmul(&block.qkv)?.reshape((batch, seq_len, 3, heads, head_dim))?;
        let part = |i| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous(); // [B, heads, S, D / heads]
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let (q, k) = (rope_slow(&q, &self.cos, &self.sin)?, rope_slow(&k, &self.cos, &self.sin)?);
        let scores = (q.matmul(&k.t()?)? * (head_dim as f64).powf(-0.5))?;
        let weights = softmax(&scores.broadcast_add(&self.mask)?, D::Minus1)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((batch * seq_len, hidden))?.matmul(&block.attention_out)
    }
}
