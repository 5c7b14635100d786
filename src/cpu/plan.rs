//! How the CPU cuts the N×V plane, and every byte it needs to do so: pure arithmetic.

use super::matmul::MIN_ROWS;
use crate::{CceOptions, DType, GradientFilter, Shape};
use std::ops::Range;

/// Columns of a logits tile in the forward.
///
/// Products of 256 to 2048 rows by 256 to 2048 columns at D = 1024 on an Ice Lake Xeon, GFLOP/s of one thread, best of
/// six: 1024×256 137-141, 512×256 112, 512×512 115-123, 512×1024 105-109, 256×256 97, 128×1024 60. In the whole
/// forward 192, 256 and 384 columns were within the noise of each other.
pub(crate) const VOCAB_TILE: usize = 256;

/// Distance between rows of a copy with `columns` columns: an odd number of cache lines, so that the rows of a tile, read
/// column by column when gemm packs it, are spread over all sets of the cache.
pub(crate) fn row_stride(columns: usize) -> usize {
    (columns.div_ceil(16) | 1) * 16
}

/// Most rows of a token block. gemm packs a classifier tile once a block: 1024 rows in place of 512 took the forward
/// from 1.06-1.23 T to 1.00-1.05 T at N=2048, V=32768, D=1024 (two runs each, CPU time, on a noisy machine).
pub(crate) const MAX_BLOCK_ROWS: usize = 1024;

/// Rows a thread from which it has token blocks of its own. With fewer, threads share blocks: gemm packs a tile of the classifier
/// once for all rows in place of once for a thread's few, and no thread is idle. CPU time of the forward at N=1024, V=32768,
/// D=1024 on two cores of a Zen 4, own blocks against a shared one: 0.98 T and 1.01 T for 4 threads, 1.04 T and 0.99 T for 8,
/// 1.25 T and 0.93 T for 16.
const MIN_OWN_ROWS: usize = 256;

/// Products that threads share in step, for each thread: more than one, for threads that are not equally fast.
const TASKS_PER_THREAD: usize = 2;

/// Columns of the classifier gradient that one task owns.
pub(crate) const COLUMN_GROUP: usize = 128;

/// Bytes that the logit gradients of one vocabulary chunk may take on the exact path, as long as a chunk of one
/// column group fits them; and most bytes of its copy in f32, where a chunk is wider than it need be.
const EXACT_CHUNK_BYTES: usize = 16 << 20;

/// Column groups of a chunk on the exact path: the fewest that the chunks of many rows have, and the most that those of few have.
const EXACT_GROUPS: (usize, usize) = (8, 16);

/// Most candidates a row may hold, whatever ε asks for: 64 KiB a token.
const MAX_CANDIDATES: usize = 8192;

/// Bytes that entries regrouped by column may take at a time.
pub(crate) const COLUMN_ENTRY_BYTES: usize = 16 << 20;

/// Bytes of a candidate: class `u32`, logit `f32`.
const CANDIDATE_BYTES: usize = 8;

/// A named part of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// What it holds.
    pub name: &'static str,
    /// The formula of its size.
    pub formula: &'static str,
    /// Its size at this shape.
    pub bytes: usize,
}

/// The plan of a forward and backward on the CPU. Print it with `Display`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuPlan {
    /// N, V, D.
    pub shape: Shape,
    /// Element type of embeddings and classifier.
    pub dtype: DType,
    /// Threads of the rayon pool that was asked.
    pub threads: usize,
    /// Number of token blocks; each is streamed past the whole vocabulary, by one thread or by all.
    pub token_blocks: usize,
    /// Tiles that each token block has in work at a time: 1 where a block is one thread's.
    pub tiles_at_once: usize,
    /// Rows of the largest token block.
    pub block_rows: usize,
    /// Columns of a logits tile.
    pub vocab_tile: usize,
    /// Most candidates of a row; a row that needs more takes the exact path. 0 where all rows take it.
    pub candidates_per_row: usize,
    /// Columns of a vocabulary chunk on the exact path, if all rows take it.
    pub exact_chunk: usize,
    /// Upper bounds of everything allocated beyond inputs and outputs, forward and backward together. Where the processor multiplies bf16
    /// ([`multiplies_bf16`](super::multiplies_bf16)), what is said to be in f32 is packed in 16 bits, and takes less.
    pub regions: Vec<Region>,
}

impl CpuPlan {
    /// The plan for one shape under the given options and number of threads.
    pub fn new(shape: Shape, dtype: DType, options: &CceOptions, threads: usize) -> Self {
        let Shape { tokens, hidden, vocab } = shape;
        let threads = threads.max(1);
        let Schedule { blocks: token_blocks, tiles: tiles_at_once } = Schedule::new(tokens, vocab, threads);
        let rows_of = |index| token_block(tokens, token_blocks, index).len();
        let block_rows = rows_of(0).max(rows_of(token_blocks - 1));
        let dense = options.is_dense();
        let candidates_per_row = if dense { 0 } else { candidates_per_row(&options.filter) };
        let exact_chunk = exact_chunk(tokens, hidden);
        let running = if tiles_at_once > 1 { token_blocks } else { threads.min(token_blocks) };
        let tile_columns = row_stride(tiles_at_once * VOCAB_TILE);

        let held = if candidates_per_row == 0 { 0 } else { candidates_per_row.min(vocab.max(1)) };
        let padded = row_stride(hidden);
        let exact = usize::from(dense);
        let regions = vec![
            Region {
                name: "logits tiles",
                formula: "4 · blocks · block_rows · (tiles · vocab_tile + 31)",
                bytes: 4 * running * block_rows * tile_columns,
            },
            Region {
                name: "embeddings blocks in f32",
                formula: "4 · blocks · block_rows · (D + 31)",
                bytes: 4 * running * block_rows * padded,
            },
            Region {
                name: "classifier tiles in f32",
                formula: "4 · threads · vocab_tile · (D + 31)",
                bytes: 4 * threads * VOCAB_TILE * padded,
            },
            Region {
                name: "packing inside gemm",
                formula: "threads · (4 · D · (block_rows + 1024) + 4 MiB)",
                bytes: threads * (4 * hidden * (block_rows + 1024) + (4 << 20)),
            },
            Region { name: "row state", formula: "256 · N", bytes: 256 * tokens },
            Region {
                name: "candidates of running blocks, most",
                formula: "8 · blocks · block_rows · min(2/ε, 8192, V)",
                bytes: CANDIDATE_BYTES * running * block_rows * if held == 0 { 0 } else { held.next_power_of_two() },
            },
            Region {
                name: "kept entries, most (1/ε expected on the flattest softmax)",
                formula: "8 · N · min(2/ε, 8192, V)",
                bytes: CANDIDATE_BYTES * tokens * held,
            },
            Region {
                name: "entries by column",
                formula: "32 MiB at most",
                bytes: (24 * tokens * held).min(2 * COLUMN_ENTRY_BYTES),
            },
            Region {
                name: "exact path: logit gradients of a chunk",
                formula: "4 · N · (exact_chunk + 31)",
                bytes: exact * 4 * tokens * row_stride(exact_chunk),
            },
            Region {
                name: "exact path: embeddings and their gradient in f32",
                formula: "8 · N · (D + 31)",
                bytes: exact * 8 * tokens * padded,
            },
            Region {
                name: "exact path: classifier chunk in f32",
                formula: "4 · exact_chunk · (D + 31)",
                bytes: exact * 4 * exact_chunk * padded,
            },
            Region {
                name: "exact path: classifier gradient of a chunk in f32",
                formula: "4 · exact_chunk · D",
                bytes: exact * 4 * exact_chunk * hidden,
            },
            Region {
                name: "gradient rows in the making",
                formula: "4 · threads · 160 · D",
                bytes: 4 * threads * (COLUMN_GROUP + 32) * hidden,
            },
        ];
        CpuPlan {
            shape,
            dtype,
            threads,
            token_blocks,
            tiles_at_once,
            block_rows,
            vocab_tile: VOCAB_TILE,
            candidates_per_row,
            exact_chunk,
            regions: regions.into_iter().filter(|r| r.bytes > 0).collect(),
        }
    }

    /// Upper bound of the bytes allocated beyond inputs and outputs. There is no N·V term in it.
    ///
    /// With a sparse filter, rows that overflow into the exact path add what the exact path's regions say, for their
    /// number in place of N.
    pub fn workspace_bytes(&self) -> usize {
        self.regions.iter().map(|r| r.bytes).sum()
    }
}

impl std::fmt::Display for CpuPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} {}, {} threads", self.shape, self.dtype, self.threads)?;
        let (blocks, rows, tile) = (self.token_blocks, self.block_rows, self.vocab_tile);
        let shared = format!(", {} at a time", self.tiles_at_once);
        let shared = if self.tiles_at_once > 1 { &shared } else { "" };
        writeln!(f, "  forward: {blocks} token blocks of at most {rows} rows, logits tiles of {tile} columns{shared}")?;
        match self.candidates_per_row {
            0 => writeln!(f, "  backward: exact, by chunks of {} columns", self.exact_chunk)?,
            most => writeln!(f, "  backward: at most {most} entries a row, then the exact path")?,
        }
        for region in &self.regions {
            let mib = region.bytes as f64 / (1 << 20) as f64;
            writeln!(f, "  {mib:9.2} MiB  {:<52} {}", region.name, region.formula)?;
        }
        write!(f, "  {:9.2} MiB  workspace, upper bound", self.workspace_bytes() as f64 / (1 << 20) as f64)
    }
}

/// How threads share the [rows, V] plane of the forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Token blocks: the rows of one product.
    pub blocks: usize,
    /// Tiles of the vocabulary that each block has in work at a time. 1: a block is one thread's, and its tile stays in that core's
    /// cache. More: all threads multiply all blocks with so many tiles, then scan them row by row, in step.
    pub tiles: usize,
}

impl Schedule {
    /// For `rows` rows. Every product has enough rows for results not to depend on how many they are ([`MIN_ROWS`]), or all rows.
    pub fn new(rows: usize, vocab: usize, threads: usize) -> Self {
        let blocks = rows.div_ceil(MAX_BLOCK_ROWS).max(1);
        if threads == 1 || rows / threads >= MIN_OWN_ROWS {
            return Schedule { blocks: blocks.next_multiple_of(threads), tiles: 1 };
        }
        let tiles = (TASKS_PER_THREAD * threads).div_ceil(blocks);
        Schedule { blocks, tiles: tiles.min(vocab.div_ceil(VOCAB_TILE)).max(1) }
    }

    /// The rows of some of the blocks, of `rows` in all, each block in `parts` parts: the first row, and ranges that begin there.
    pub fn rows_of(&self, rows: usize, blocks: Range<usize>, parts: usize) -> (usize, Vec<Range<usize>>) {
        let part = |index| token_block(rows, self.blocks * parts, index);
        let first = part(blocks.start * parts).start;
        let range = |index| part(index).start - first..part(index).end - first;
        (first, (blocks.start * parts..blocks.end * parts).map(range).collect())
    }
}

/// Token blocks of the exact path, whose products with `tiles` tiles of a chunk keep all threads busy.
pub(crate) fn exact_blocks(rows: usize, tiles: usize, threads: usize) -> usize {
    let most = (rows / (MIN_ROWS + 8)).max(1);
    rows.div_ceil(MAX_BLOCK_ROWS).max(threads.div_ceil(tiles.max(1))).clamp(1, most)
}

/// Rows of block `index` of `blocks`: equal up to 8 rows, starting at multiples of 8 (the width of gemm's kernels).
pub(crate) fn token_block(rows: usize, blocks: usize, index: usize) -> Range<usize> {
    let start = |index: usize| if index == blocks { rows } else { rows / 8 * index / blocks * 8 };
    start(index)..start(index + 1)
}

/// Candidates a row may hold: twice what it keeps in expectation on the flattest softmax.
pub(crate) fn candidates_per_row(filter: &GradientFilter) -> usize {
    match filter {
        GradientFilter::Exact => 0,
        _ => ((2.0 / filter.eps()) as usize).clamp(64, MAX_CANDIDATES),
    }
}

/// Columns of a vocabulary chunk on the exact path. Sums over chunks make results depend on it, so it must not depend on threads.
pub(crate) fn exact_chunk(rows: usize, hidden: usize) -> usize {
    let (few, many) = EXACT_GROUPS;
    let fit = |columns: usize| EXACT_CHUNK_BYTES / (4 * COLUMN_GROUP * columns.max(1));
    // Few rows give few products to share out, unless a chunk is wider; its copy and its gradient have D columns.
    let wider = (few * MAX_BLOCK_ROWS / rows.max(1)).min(fit(hidden)).clamp(few, many);
    COLUMN_GROUP * fit(rows).clamp(1, wider)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_blocks_cover_every_row_once_and_are_never_tiny() {
        for rows in (0..2000).chain([4095, 4096, 4097, 65_537]) {
            for threads in [1, 2, 3, 4, 7, 16, 64] {
                let schedule = Schedule::new(rows, 32_000, threads);
                for blocks in [schedule.blocks, exact_blocks(rows, 4, threads)] {
                    let mut next = 0;
                    for index in 0..blocks {
                        let block = token_block(rows, blocks, index);
                        assert_eq!(block.start, next);
                        assert!(blocks == 1 || block.len() > MIN_ROWS, "{rows} rows, {threads} threads: {block:?}");
                        assert!(block.len() <= MAX_BLOCK_ROWS + 16, "{rows} rows, {threads} threads: {block:?}");
                        next = block.end;
                    }
                    assert_eq!(next, rows);
                }
                assert!(schedule.blocks * schedule.tiles >= threads, "{rows} rows, {threads} threads: {schedule:?}");
                let parts = |of| schedule.rows_of(rows, 0..schedule.blocks, of);
                let ((first, blocks), (_, parts)) = (parts(1), parts(schedule.tiles));
                assert_eq!(first, 0);
                for (block, parts) in blocks.iter().zip(parts.chunks(schedule.tiles)) {
                    assert_eq!((block.start, block.end), (parts[0].start, parts[schedule.tiles - 1].end));
                }
            }
        }
    }

    #[test]
    fn chunks_of_the_exact_path_stay_within_their_bytes() {
        for (rows, hidden, columns) in [
            (2048, 1024, 1024),
            (1024, 896, 1024),
            (512, 896, 2048),
            (64, 1024, 2048),
            (64, 4096, 1024),
            (1, 16, 2048),
            (40_000, 64, 128),
        ] {
            assert_eq!(exact_chunk(rows, hidden), columns, "{rows} rows, D = {hidden}");
        }
    }

    #[test]
    fn gradients_without_a_sparse_form_are_planned_as_exact() {
        let plan =
            |options: &CceOptions| CpuPlan::new(Shape { tokens: 512, hidden: 64, vocab: 4096 }, DType::F32, options, 2);
        let smoothed = CceOptions { label_smoothing: 0.1, ..CceOptions::default() };
        let exact = CceOptions { filter: GradientFilter::Exact, ..CceOptions::default() };
        assert_eq!(plan(&CceOptions { softcap: Some(20.0), ..smoothed }), plan(&exact));
        assert_ne!(plan(&smoothed), plan(&exact));
        assert!(plan(&exact).to_string().contains("exact, by chunks of 2048 columns"), "{}", plan(&exact));
    }

    #[test]
    fn the_workspace_has_no_vocabulary_term() {
        let options = CceOptions::default();
        let at = |vocab| {
            CpuPlan::new(Shape { tokens: 2048, hidden: 1024, vocab }, DType::BF16, &options, 2).workspace_bytes()
        };
        assert_eq!(at(65_536), at(262_144));
    }
}
