//! What the kernels that do the work read and multiply, by formula. `tests/cuda_traffic.rs` holds the emulated GPU's counts
//! to it; `cce info --device` prints it.

use super::{BLOCK_N, BLOCK_V, LaunchPlan, kernels};
use crate::{DType, Shape};
use std::borrow::Cow;

/// What the softmax decides: how many entries there are. Telemetry has these numbers after a backward.
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

/// Bytes of a row in a stage of shared memory, and warps of a block, of all products.
const STEP_BYTES: u64 = 64;
const WARPS: u64 = 8;
/// Side of the tiles of the exact path.
const TILE: u64 = BLOCK_N as u64;
/// Of Hopper's forward: warpgroups that multiply, columns of D of a step, and columns of a product.
const CONSUMERS: u64 = 2;
const STEP_COLUMNS: u64 = 64;
const WGMMA_COLUMNS: u64 = 16;

impl LaunchPlan {
    /// Entry points of the kernels with the work, and what they claim. Nothing of Hopper's exact path.
    pub fn traffic(&self, entries: &Entries) -> Vec<(Cow<'static, str>, Traffic)> {
        let gradients = self.workload.options.gradients;
        let bias = gradients.bias && self.workload.bias;
        let columns = gradients.classifier || bias;
        let any = gradients.embeddings || columns;
        let Shape { tokens, hidden, .. } = self.workload.shape;
        let exact_rows = entries.exact_rows.min(tokens as u64);
        let row_bytes = (hidden * self.workload.dtype.size_in_bytes()) as u64;
        let (row_tiles, class_tiles) = (&entries.row_tiles, &entries.class_tiles);
        let gathered_by_row = entries.kept - row_tiles.of_blocks;
        let gathered_by_class = entries.kept - class_tiles.of_blocks;
        // dbias is summed from lists in any case.
        let lists = if bias { entries.kept } else { gathered_by_class };
        let parts = hidden.div_ceil(1024) as u64;
        let none = Traffic::default();
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
            (kernels::EXACT, any && exact_rows > 0 && !self.hopper, self.exact_traffic(exact_rows)),
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

    fn exact_traffic(&self, exact_rows: u64) -> Traffic {
        let Shape { hidden, vocab, .. } = self.workload.shape;
        let gradients = self.workload.options.gradients;
        let (hidden, vocab, element) = (hidden as u64, vocab as u64, self.workload.dtype.size_in_bytes() as u64);
        let bias = gradients.bias && self.workload.bias;
        let panel = u64::from(self.exact_panel_rows);
        let d_embeddings = gradients.embeddings && hidden > 0;
        let columns = gradients.classifier && hidden > 0 || bias;
        // All rows at once; or panels of them for dE, and then one pass over all for dC and dbias.
        let together = !d_embeddings || exact_rows <= panel;
        if exact_rows == 0 {
            return Traffic::default();
        }
        let mut passes = Vec::new();
        if together {
            passes.push((exact_rows, d_embeddings, columns));
        } else {
            let full = (0..exact_rows / panel).map(|_| panel);
            passes.extend(full.chain(Some(exact_rows % panel)).filter(|r| *r > 0).map(|r| (r, true, false)));
            passes.extend(columns.then_some((exact_rows, false, true)));
        }
        let (class_tiles, column_tiles) = (vocab.div_ceil(BLOCK_V as u64), hidden.div_ceil(TILE));
        let steps_of_tile = TILE * element / STEP_BYTES;
        let mut total = Traffic::default();
        for (rows, d_embeddings, columns) in passes {
            let row_tiles = rows.div_ceil(TILE);
            let of_logits = self.logits(row_tiles, class_tiles);
            let cells = row_tiles * class_tiles * TILE * TILE * element; // of the logit gradients
            let products = row_tiles * class_tiles * column_tiles * steps_of_tile * self.mma_per_step();
            total.copied += of_logits.copied;
            total.mma += of_logits.mma;
            if d_embeddings {
                let most_tiles = self.exact_gradients_elements as u64 / (row_tiles * TILE * TILE);
                let chunks = class_tiles.div_ceil(most_tiles.max(1));
                total.read += chunks.saturating_sub(1) * rows * hidden * 4; // sums over the chunks before
                total.copied += column_tiles * cells + row_tiles * vocab * hidden * element;
                total.mma += products;
            }
            if columns && gradients.classifier && hidden > 0 {
                total.copied += column_tiles * cells + class_tiles * rows * hidden * element;
                total.mma += products;
            }
            if columns && bias {
                total.read += class_tiles * rows * TILE * element;
            }
        }
        Traffic { read: total.read + total.copied, ..total }
    }
}
