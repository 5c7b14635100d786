//! Text to token ids, cached under the target folder, and batches of them.

use crate::corpus::{self, Document, fnv1a};
use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, TokenizerBuilder, TokenizerImpl};

type Tokenizer = TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, DecoderWrapper>;

/// Stands between documents; the first special token, hence id 0.
const END_OF_DOCUMENT: &str = "<|end|>";

/// Token ids of the corpus.
pub struct Tokens {
    pub vocab: usize,
    pub train: Vec<u32>,
    pub held_out: Vec<u32>,
}

/// Where this example keeps its files: `train_lm` in cargo's target folder, wherever that is.
pub fn cache_folder() -> Result<PathBuf> {
    let executable = std::env::current_exe()?; // <target>/<profile>/examples/train_lm
    let target = executable.ancestors().nth(3).context("the executable is not in a target folder")?;
    let folder = target.join("train_lm");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}

/// Token ids of the text, from the cache where the same text and vocabulary were there before.
pub fn load(text: Option<&Path>, max_bytes: usize, vocab: usize) -> Result<Tokens> {
    let documents = corpus::load(text, max_bytes)?;
    let fingerprint = documents.iter().fold(vocab as u64, |hash, d| {
        fnv1a(&[hash.to_le_bytes(), fnv1a(d.text.as_bytes()).to_le_bytes()].concat()) ^ u64::from(d.held_out)
    });
    let folder = cache_folder()?.join(format!("{fingerprint:016x}"));
    if !folder.is_dir() {
        let partial = folder.with_extension(format!("partial-{}", std::process::id()));
        std::fs::create_dir_all(&partial)?;
        tokenise(&documents, vocab, &partial)?;
        // Renamed when complete, so that an interrupted run leaves no half of a cache.
        if std::fs::rename(&partial, &folder).is_err() {
            std::fs::remove_dir_all(&partial)?; // another run was first
        }
    }
    let tokens = Tokens {
        vocab: read_ids(&folder.join("vocab.u32"))?[0] as usize,
        train: read_ids(&folder.join("train.u32"))?,
        held_out: read_ids(&folder.join("held_out.u32"))?,
    };
    println!(
        "corpus: {} files, {:.1} MB, {} tokens to train on, {} held out, vocabulary {}",
        documents.len(),
        documents.iter().map(|d| d.text.len()).sum::<usize>() as f64 / 1e6,
        tokens.train.len(),
        tokens.held_out.len(),
        tokens.vocab,
    );
    Ok(tokens)
}

/// Trains a byte-level BPE vocabulary on the training documents and writes the ids of all of them.
fn tokenise(documents: &[Document], vocab: usize, folder: &Path) -> Result<()> {
    println!("training a vocabulary of {vocab} (once; the next run starts at once)");
    let library = |error: tokenizers::Error| anyhow!("tokenizers: {error}");
    let byte_level = ByteLevel::new(false, false, true);
    let mut tokenizer: Tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(byte_level))
        .with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)))
        .build()
        .map_err(library)?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(true)
        .vocab_size(vocab)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
        .build();
    let training_text = documents.iter().filter(|d| !d.held_out).map(|d| d.text.as_str());
    tokenizer.train(&mut trainer, training_text).map_err(library)?;
    tokenizer.save(folder.join("tokenizer.json"), false).map_err(library)?;

    let bar = progress_bar(documents.len() as u64, "tokenising")?;
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for documents in documents.chunks(64) {
        let texts = documents.iter().map(|d| d.text.as_str()).collect();
        for (document, encoding) in documents.iter().zip(tokenizer.encode_batch_fast(texts, false).map_err(library)?) {
            let ids = if document.held_out { &mut held_out } else { &mut train };
            ids.push(0);
            ids.extend_from_slice(encoding.get_ids());
        }
        bar.inc(documents.len() as u64);
    }
    bar.finish_and_clear();
    write_ids(&folder.join("vocab.u32"), &[tokenizer.get_vocab_size(true) as u32])?;
    write_ids(&folder.join("train.u32"), &train)?;
    write_ids(&folder.join("held_out.u32"), &held_out)
}

fn write_ids(path: &Path, ids: &[u32]) -> Result<()> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|&id| u32::from_le_bytes(id)).collect())
}

/// A bar of `len` items on the terminal; nothing where there is no terminal.
pub fn progress_bar(len: u64, message: &'static str) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix}{msg:<24} {wide_bar} {pos}/{len} [{elapsed_precise}]")?;
    Ok(ProgressBar::new(len).with_style(style).with_message(message))
}

/// Token ids and the ids that follow them, both [B, S].
pub struct Batch {
    pub inputs: Tensor,
    pub targets: Tensor,
}

impl Batch {
    /// The windows of `seq_len + 1` ids that begin at `starts`.
    fn new(ids: &[u32], starts: &[usize], seq_len: usize) -> Result<Self> {
        let windows = |shift: usize| -> Vec<u32> {
            starts.iter().flat_map(|&start| &ids[start + shift..][..seq_len]).copied().collect()
        };
        let tensor = |ids| Tensor::from_vec(ids, (starts.len(), seq_len), &Device::Cpu);
        Ok(Batch { inputs: tensor(windows(0))?, targets: tensor(windows(1))? })
    }

    /// Windows at random places.
    pub fn random(ids: &[u32], batch: usize, seq_len: usize, rng: &mut Rng) -> Result<Self> {
        ensure!(ids.len() > seq_len + 1, "{} tokens are fewer than a sequence of {seq_len}", ids.len());
        let starts: Vec<usize> = (0..batch).map(|_| rng.below(ids.len() - seq_len - 1)).collect();
        Self::new(ids, &starts, seq_len)
    }

    /// Windows evenly spread over all ids: the same for every model, at most `tokens` tokens.
    pub fn spread(ids: &[u32], batch: usize, seq_len: usize, tokens: usize) -> Result<Vec<Self>> {
        let windows = (tokens / seq_len).min(ids.len().saturating_sub(1) / seq_len);
        ensure!(windows >= batch, "{} held-out tokens do not fill a batch of {batch} times {seq_len}", ids.len());
        let last = ids.len() - seq_len - 1;
        let starts: Vec<usize> = (0..windows).map(|w| w * last / windows.max(2)).collect();
        starts.chunks_exact(batch).map(|starts| Self::new(ids, starts, seq_len)).collect()
    }
}

/// SplitMix64: candle's CPU generator cannot be seeded.
pub struct Rng(pub u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }
    /// Uniform in [0, `end`).
    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }
    /// Uniform in (0, 1).
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 40) as f32 + 0.5) / (1 << 24) as f32
    }
    /// Standard normal (Box and Muller 1958).
    pub fn normal(&mut self) -> f32 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }
}
