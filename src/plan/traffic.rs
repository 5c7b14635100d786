//! What the kernels that do the work read and multiply, by formula. `tests/cuda_traffic.rs` holds the emulated GPU's counts
//! to it; `cce info --device` prints it.

use super::{BLOCK_N, BLOCK_V, CLUSTER, HOPPER_TILE, LaunchPlan, kernels};
use crate::{DType, Shape};
use std::borrow::Cow;

/// What the softmax decides: how many entries there are. After a backward [`Telemetry`](crate::Telemetry) has rows, kept entries, exact
/// rows and, with one target for each sparse row among them, candidates; what is in tiles it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entries {
    /// Tokens that are not ignored.
    pub rows: u64,
    /// Entries that the forward put aside, the targets' not among them.
    pub candidates: u64,
    /// Entries that the filter kept, the targets' among them.
    pub kept: u64,
    /// Rows of the exact path.
    pub exact_rows: u64,
    /// Of the blocks of 128 rows that multiply tiles.
    pub row_tiles: TileEntries,
    /// Of the blocks of 128 classes that multiply tiles.
    pub class_tiles: TileEntries,
}

/// What the blocks have together that multiply tiles, of rows or of classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TileEntries {
    /// Tiles of 128 owners and up to 128 sources.
    pub tiles: u64,
    /// Sources: classes of a block of rows, tokens of a block of classes.
    pub sources: u64,
    /// Entries in tiles.
    pub entries: u64,
    /// All entries of these blocks.
    pub of_blocks: u64,
}

/// What the launches of a kernel do in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes that multiprocessors read of E, of C, of logit gradients and of lists of entries: from L2, or from memory where
    /// it is not there. What is read once a row, such as its statistics, does not count; a multicast counts once.
    pub read: u64,
    /// Of these: by asynchronous copies into shared memory, where rows are aligned.
    pub copied: u64,
    /// Products of warps: m16n8k16 of 16 bits, or m16n8k8 of TF32.
    pub mma: u64,
    /// Products of warpgroups: m64n256k16.
    pub wgmma: u64,
}

/// A pass over exact rows, and what it is for.
#[derive(Debug, Clone, Copy)]
struct Pass {
    rows: u64,
    d_embeddings: bool,
    d_classifier: bool,
    d_bias: bool,
}

/// Bytes of a row in a stage of shared memory, and warps of a block, of all products.
const STEP_BYTES: u64 = 64;
const WARPS: u64 = 8;
/// Side of the tiles of the exact path.
const TILE: u64 = BLOCK_N as u64;
/// Of Hopper's kernels: warpgroups that multiply, columns of D of a step, and columns of a product.
const CONSUMERS: u64 = 2;
const STEP_COLUMNS: u64 = 64;
const WGMMA_COLUMNS: u64 = 16;

impl LaunchPlan {
    /// Entry points of the kernels with the work, and what they claim. What sparse rows add to the exact path's classes does not count.
    pub fn traffic(&self, entries: &Entries) -> Vec<(Cow<'static, str>, Traffic)> {
        let gradients = self.workload.options.gradients;
        let bias = gradients.bias && self.workload.bias;
        let columns = gradients.classifier || bias;
        let any = gradients.embeddings || columns;
        let Shape { tokens, hidden, .. } = self.workload.shape;
        let exact_rows = entries.exact_rows.min(tokens as u64);
        let row_bytes = (hidden * self.workload.dtype.size_in_bytes()) as u64;
        let (row_tiles, class_tiles) = (&entries.row_tiles, &entries.class_tiles);
        let gathered_by_row = entries.kept.saturating_sub(row_tiles.of_blocks);
        let gathered_by_class = entries.kept.saturating_sub(class_tiles.of_blocks);
        // dbias is summed from lists in any case.
        let lists = if bias { entries.kept } else { gathered_by_class };
        let parts = hidden.div_ceil(1024) as u64;
        let none = Traffic::default();
        let (exact, pairs) = (any && exact_rows > 0, self.exact_in_clusters());
        let claims = [
            (kernels::FORWARD, !self.hopper, self.forward_traffic(entries.rows)),
            (kernels::FORWARD_HOPPER, self.hopper && self.cluster == 1, self.hopper_traffic(entries.rows)),
            (kernels::FORWARD_HOPPER_CLUSTER, self.hopper && self.cluster > 1, self.hopper_traffic(entries.rows)),
            (kernels::FILTER, self.capture, Traffic { read: 2 * 8 * entries.candidates, ..none }),
            (
                kernels::D_EMBEDDINGS,
                self.capture && gradients.embeddings && hidden > 0,
                Traffic { read: gathered_by_row * (row_bytes + 8 * parts), ..none },
            ),
            (kernels::D_EMBEDDINGS_TILES, row_tiles.tiles > 0, self.tile_traffic(row_tiles, true)),
            (
                kernels::D_CLASSIFIER,
                self.capture && columns,
                Traffic { read: gathered_by_class * row_bytes + 8 * lists, ..none },
            ),
            (kernels::D_CLASSIFIER_TILES, class_tiles.tiles > 0, self.tile_traffic(class_tiles, false)),
            (kernels::EXACT, exact && !self.hopper, self.exact_traffic(exact_rows)),
            (kernels::EXACT_HOPPER, exact && self.hopper && !pairs, self.hopper_exact_traffic(exact_rows, 1)),
            (kernels::EXACT_HOPPER_CLUSTER, exact && pairs, self.hopper_exact_traffic(exact_rows, CLUSTER.into())),
        ];
        let entry_point = |kernel: kernels::Kernel| kernel.entry_point(self.workload.dtype, self.workload.aligned);
        claims.into_iter().filter(|c| c.1).map(|(kernel, _, traffic)| (entry_point(kernel), traffic)).collect()
    }

    /// Each source's row once, and for each 128 columns of D the lists of the tiles, 4 bytes an entry. Rows besides: their own lists, 8
    /// bytes an entry, and the rows of the entries that are in no tile.
    fn tile_traffic(&self, of: &TileEntries, gathers: bool) -> Traffic {
        let hidden = self.workload.shape.hidden as u64;
        let row_bytes = hidden * self.workload.dtype.size_in_bytes() as u64;
        let (column_tiles, copied) = (hidden.div_ceil(TILE), of.sources * row_bytes);
        let rest = if gathers { column_tiles * 8 * of.of_blocks + (of.of_blocks - of.entries) * row_bytes } else { 0 };
        let steps_of_tile = TILE * self.workload.dtype.size_in_bytes() as u64 / STEP_BYTES;
        Traffic {
            read: copied + column_tiles * 4 * of.entries + rest,
            copied,
            mma: of.tiles * column_tiles * steps_of_tile * self.mma_per_step(),
            ..Traffic::default()
        }
    }

    /// Every row block reads each tile of C, and for each its own rows of E: whole tiles, whose edges repeat other rows.
    fn forward_traffic(&self, rows: u64) -> Traffic {
        self.logits(rows.div_ceil(TILE), self.rounds.iter().map(|round| u64::from(round.num_tiles)).sum())
    }

    /// A unit of row blocks reads each tile of C once, and for each its own rows of E: nothing outside of either matrix. What
    /// fills up a row block that is not full, tokens that are ignored or the last row again, does not count.
    fn hopper_traffic(&self, rows: u64) -> Traffic {
        let Shape { hidden, vocab, .. } = self.workload.shape;
        let (hidden, vocab, cluster) = (hidden as u64, vocab as u64, u64::from(self.cluster));
        let tiles: u64 = self.rounds.iter().map(|round| u64::from(round.num_tiles)).sum();
        let units = rows.div_ceil(TILE).div_ceil(cluster);
        let read = (units * vocab + tiles * rows) * hidden * self.workload.dtype.size_in_bytes() as u64;
        let steps = hidden.div_ceil(STEP_COLUMNS) * (STEP_COLUMNS / WGMMA_COLUMNS);
        Traffic { read, copied: read, wgmma: tiles * units * cluster * CONSUMERS * steps, ..Traffic::default() }
    }

    fn logits(&self, row_tiles: u64, class_tiles: u64) -> Traffic {
        let row_bytes = (self.workload.shape.hidden * self.workload.dtype.size_in_bytes()) as u64;
        let steps = row_bytes.div_ceil(STEP_BYTES).max(2);
        let tiles = row_tiles * class_tiles;
        let read = tiles * 2 * TILE * row_bytes;
        Traffic { read, copied: read, mma: tiles * steps * self.mma_per_step(), ..Traffic::default() }
    }

    /// Of a step of a tile of 128 by 128: by each warp two of k, four by four products; f32 takes three of TF32.
    fn mma_per_step(&self) -> u64 {
        WARPS * 32 * if self.workload.dtype == DType::F32 { 3 } else { 1 }
    }

    /// Passes over the exact rows, as `kernels/exact_passes.cuh` has them.
    fn exact_passes(&self, exact_rows: u64) -> Vec<Pass> {
        let (gradients, hidden) = (self.workload.options.gradients, self.workload.shape.hidden);
        let panel = u64::from(self.exact_panel_rows);
        let all = Pass {
            rows: exact_rows,
            d_embeddings: gradients.embeddings && hidden > 0,
            d_classifier: gradients.classifier && hidden > 0,
            d_bias: gradients.bias && self.workload.bias,
        };
        if exact_rows == 0 || self.workload.shape.vocab == 0 {
            return Vec::new();
        }
        if !all.d_embeddings || exact_rows <= panel {
            return vec![all];
        }
        let of_panel = |rows| Pass { rows, d_embeddings: true, d_classifier: false, d_bias: false };
        let full = (0..exact_rows / panel).map(|_| panel);
        let mut passes: Vec<Pass> = full.chain(Some(exact_rows % panel)).filter(|r| *r > 0).map(of_panel).collect();
        passes.extend((all.d_classifier || all.d_bias).then_some(Pass { d_embeddings: false, ..all }));
        passes
    }

    /// Chunks of the vocabulary in a pass, in tiles of `tile` classes.
    fn exact_chunks(&self, row_tiles: u64, tile: u64) -> Vec<u64> {
        let tiles = (self.workload.shape.vocab as u64).div_ceil(tile);
        let most = self.exact_gradients_elements as u64 / (row_tiles * TILE * tile);
        let of_chunk = tiles.div_ceil(tiles.div_ceil(most.max(1)).max(1)).max(1);
        (0..tiles).step_by(of_chunk as usize).map(|first| of_chunk.min(tiles - first)).collect()
    }

    /// Slices of a chunk as long as the first, and their length in the unit of its `classes`: `kernels/exact_slices.cuh`.
    fn exact_slices(&self, classes: u64) -> (u64, u64) {
        let length = classes.div_ceil(self.exact_slices.into());
        (classes.div_ceil(length), length)
    }

    fn exact_traffic(&self, exact_rows: u64) -> Traffic {
        let Shape { hidden, vocab, .. } = self.workload.shape;
        let (hidden, vocab, element) = (hidden as u64, vocab as u64, self.workload.dtype.size_in_bytes() as u64);
        let (class_tiles, column_tiles) = (vocab.div_ceil(BLOCK_V as u64), hidden.div_ceil(TILE));
        let steps_of_tile = TILE * element / STEP_BYTES;
        let mut total = Traffic::default();
        for pass in self.exact_passes(exact_rows) {
            let row_tiles = pass.rows.div_ceil(TILE);
            let of_logits = self.logits(row_tiles, class_tiles);
            let cells = row_tiles * class_tiles * TILE * TILE * element; // of the logit gradients
            let products = row_tiles * class_tiles * column_tiles * steps_of_tile * self.mma_per_step();
            total.copied += of_logits.copied;
            total.mma += of_logits.mma;
            if pass.d_embeddings {
                let chunks = self.exact_chunks(row_tiles, BLOCK_V as u64);
                let (slices, length) = self.exact_slices(chunks[0]);
                let before: u64 = chunks[1..].iter().map(|tiles| tiles.div_ceil(length)).sum();
                let added = if slices > 1 { slices } else { 0 };
                total.read += (before + added) * pass.rows * hidden * 4; // sums over the chunks before, and of the slices
                total.copied += column_tiles * cells + row_tiles * vocab * hidden * element;
                total.mma += products;
            }
            if pass.d_classifier {
                total.copied += column_tiles * cells + class_tiles * pass.rows * hidden * element;
                total.mma += products;
            }
            if pass.d_bias {
                total.read += class_tiles * pass.rows * TILE * element;
            }
        }
        Traffic { read: total.read + total.copied, ..total }
    }

    /// As [`Self::exact_traffic`], in tiles of 128 rows or classes by 256 columns, a pair of them a cluster. Blocks of the logit gradients are
    /// read whole, E and C within their bounds; in a cluster each block loads its own tile and both have one copy of what they share. Where
    /// rows of E are gathered, the last again in place of those that are not there, and in a cluster by both blocks, that does not count.
    fn hopper_exact_traffic(&self, exact_rows: u64, cluster: u64) -> Traffic {
        let Shape { hidden, vocab, .. } = self.workload.shape;
        let (hidden, vocab, element) = (hidden as u64, vocab as u64, self.workload.dtype.size_in_bytes() as u64);
        let (columns, steps_of_columns) = (hidden.div_ceil(HOPPER_TILE as u64), hidden.div_ceil(STEP_COLUMNS));
        let block = STEP_COLUMNS * STEP_COLUMNS * element;
        let mut total = Traffic::default();
        // Of items in units of `cluster` tiles; each step has two blocks of G, for a product.
        let products = |total: &mut Traffic, units: u64, steps: u64, per_unit: u64| {
            let steps = units * cluster * columns * steps;
            total.copied += steps * CONSUMERS * block + units * per_unit;
            total.wgmma += steps * CONSUMERS * (STEP_COLUMNS / WGMMA_COLUMNS);
        };
        for pass in self.exact_passes(exact_rows) {
            let row_tiles = pass.rows.div_ceil(TILE);
            let units = row_tiles.div_ceil(cluster);
            let chunks = self.exact_chunks(row_tiles, HOPPER_TILE as u64);
            let class_tiles: u64 = chunks.iter().sum();
            total.copied += (units * vocab + class_tiles * pass.rows) * hidden * element;
            total.wgmma +=
                units * cluster * class_tiles * CONSUMERS * steps_of_columns * (STEP_COLUMNS / WGMMA_COLUMNS);
            if pass.d_embeddings {
                let steps = (chunks[0] * HOPPER_TILE as u64).min(vocab).div_ceil(STEP_COLUMNS);
                let (slices, _) = self.exact_slices(steps);
                let sums = if slices > 1 || chunks.len() > 1 { slices } else { 0 }; // chunks between add in memory
                total.read += sums * pass.rows * hidden * 4;
                products(&mut total, units, vocab.div_ceil(STEP_COLUMNS), vocab * hidden * element);
            }
            // Of the last tile of classes the second half may be beyond the vocabulary.
            let class_units = (vocab.div_ceil(TILE)).div_ceil(cluster);
            if pass.d_classifier {
                products(&mut total, class_units, pass.rows.div_ceil(STEP_COLUMNS), pass.rows * hidden * element);
            }
            if pass.d_bias {
                total.read += class_units * cluster * TILE * pass.rows * element;
            }
        }
        Traffic { read: total.read + total.copied, ..total }
    }
}
