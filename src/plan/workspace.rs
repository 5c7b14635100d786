//! Every byte of device memory that a forward and a backward need beyond inputs and outputs, by name and formula.

use super::{BLOCK_N, BLOCK_V, MIB, MOST_CROWDED, SUM_PARTS, exact};
use crate::{Error, Result, Shape};

/// When a region is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// From the forward to the end of its last backward.
    Saved,
    /// During the forward.
    Forward,
    /// During the backward, when that of the forward is free again.
    Backward,
}

/// A named part of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Its name in `kernels/abi.h`.
    pub name: &'static str,
    /// When it is in use.
    pub group: Group,
    /// The formula of its size, in bytes.
    pub formula: &'static str,
    /// Its size at this shape.
    pub bytes: usize,
    /// Where it starts in its group; a multiple of 256. Regions that are never in use at once may share their memory.
    pub offset: usize,
}

/// All regions. Groups are separate allocations; a region that a launch does not need is not there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Workspace {
    /// Group by group, in order of their offsets.
    pub regions: Vec<Region>,
}

/// What the sizes of the regions depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub shape: Shape,
    pub element: usize,
    pub row_blocks: usize,
    pub block_entries: usize,
    pub rounds: usize,
    pub partials: usize,
    /// Of the exact path.
    pub exact: exact::Sizes,
    /// The forward puts candidates aside.
    pub capture: bool,
    /// The forward needs the logits of the targets beforehand.
    pub seed: bool,
    /// Every row is exact.
    pub dense: bool,
    /// The rank-one part of label smoothing.
    pub spread: bool,
    pub d_embeddings: bool,
    /// dC or dbias.
    pub columns: bool,
    /// Sparse gradients may be products of tiles.
    pub tiles: bool,
}

const ALIGNMENT: usize = 256;

impl Workspace {
    pub(super) fn new(s: &Sizes) -> Result<Self> {
        let Shape { tokens: n, hidden: d, vocab: v } = s.shape;
        let lists = s.capture || s.dense;
        let any = s.d_embeddings || s.columns;
        let sparse = s.capture && s.columns;
        let (smooth_rows, smooth_columns) = (s.spread && s.d_embeddings, s.spread && s.columns);
        use Group::{Backward, Forward, Saved};
        let rows: [(&'static str, Group, bool, &'static str, &[usize]); 29] = [
            ("header", Saved, true, "64", &[64]),
            ("token_row", Saved, true, "4 N", &[4, n]),
            ("row_token", Saved, true, "4 N", &[4, n]),
            ("row_class", Saved, true, "4 N", &[4, n]),
            ("statistics", Saved, true, "32 N", &[32, n]),
            ("entries", Saved, s.capture, "8 row_blocks block_entries", &[8, s.row_blocks, s.block_entries]),
            ("entry_begin", Saved, lists, "4 N", &[4, n]),
            ("entry_count", Saved, lists, "4 N", &[4, n]),
            ("exact_row", Saved, lists, "4 N", &[4, n]),
            ("seed_logit", Forward, s.seed, "4 N", &[4, n]),
            ("bound", Forward, s.capture, "4 N", &[4, n]),
            ("partial", Forward, true, "16 partials N", &[16, s.partials, n]),
            ("partial_argmax", Forward, true, "4 partials N", &[4, s.partials, n]),
            ("pools", Forward, s.capture, "12 row_blocks", &[12, s.row_blocks]),
            ("pool", Forward, s.capture, "8 row_blocks block_entries", &[8, s.row_blocks, s.block_entries]),
            ("redo_count", Forward, s.capture, "4 rounds", &[4, s.rounds]),
            ("kept_mass", Forward, s.capture, "4 N", &[4, n]),
            ("coefficients", Backward, any, "16 N", &[16, n]),
            ("column_begin", Backward, sparse, "4 (V + 1)", &[4, v + 1]),
            ("popular_classes", Backward, sparse, "4 V", &[4, v]),
            ("column_block_sum", Backward, sparse, "4 (ceil(V / 4096) + 1)", &[4, v.div_ceil(4096) + 1]),
            ("column_entries", Backward, sparse, "8 row_blocks block_entries", &[8, s.row_blocks, s.block_entries]),
            ("class_sum_parts", Backward, smooth_rows, "4 * 64 D", &[4, SUM_PARTS, d]),
            ("class_sum", Backward, smooth_rows, "4 D", &[4, d]),
            ("spread_sum_parts", Backward, smooth_columns, "4 * 64 D", &[4, SUM_PARTS, d]),
            ("spread_sum", Backward, smooth_columns, "4 D", &[4, d]),
            ("spread_total", Backward, smooth_columns, "4", &[4]),
            ("exact_scale", Backward, any, "4", &[4]),
            ("barrier", Backward, any, "12", &[12]),
        ];
        let of_exact: [(&'static str, Group, bool, &'static str, &[usize]); 2] = [
            ("exact_gradients", Backward, any, "element * gradient elements", &[s.element, s.exact.gradients_elements]),
            (
                "exact_d_embeddings",
                Backward,
                s.d_embeddings,
                "4 slices panel D",
                &[4, s.exact.slices, s.exact.panel, d],
            ),
        ];
        // A block is 128 rows or 128 classes. E entries, of a block's n at most 2 n / 3 sources.
        let (blocks, e) = (s.row_blocks.max(v.div_ceil(BLOCK_V)), s.row_blocks.saturating_mul(s.block_entries));
        let (sources, begins) = ((e / 3).saturating_mul(2).saturating_add(4), (e / 128).saturating_add(2 * blocks + 2));
        let of_tiles: [(&'static str, Group, bool, &'static str, &[usize]); 9] = [
            ("tile_work", Backward, s.tiles, "16", &[16]),
            ("tile_sources", Backward, s.tiles, "4 blocks", &[4, blocks]),
            ("active_blocks", Backward, s.tiles, "4 blocks", &[4, blocks]),
            ("sources", Backward, s.tiles, "4 (2 (E / 3) + 4)", &[4, sources]),
            ("tile_begin", Backward, s.tiles, "4 (E / 128 + 2 blocks + 2)", &[4, begins]),
            ("tile_entries", Backward, s.tiles, "4 E", &[4, e]),
            ("crowded_blocks", Backward, s.tiles && s.columns, "4 * 1024", &[4, MOST_CROWDED]),
            ("crowded_next", Backward, s.tiles && s.columns, "4 * 1024", &[4, MOST_CROWDED]),
            (
                "in_tile",
                Backward,
                s.tiles && s.d_embeddings,
                "4 row_blocks ceil(block_entries / 32)",
                &[4, s.row_blocks, s.block_entries.div_ceil(32)],
            ),
        ];
        let mut workspace = Workspace::default();
        let mut place = |rows: &[(&'static str, Group, bool, &'static str, &[usize])], from: Option<usize>| {
            let mut next = from;
            for &(name, group, _, formula, factors) in rows.iter().filter(|row| row.2) {
                let overflow = || Error::Overflow { what: name, factors: factors.to_vec() };
                let product = factors.iter().try_fold(1_usize, |a, b| a.checked_mul(*b));
                let bytes = product.filter(|b| isize::try_from(*b).is_ok()).ok_or_else(overflow)?;
                let offset = next.unwrap_or_else(|| workspace.group_bytes(group));
                let end = offset.checked_add(bytes + ALIGNMENT).ok_or_else(overflow)?;
                next = next.map(|_| (end - ALIGNMENT).next_multiple_of(ALIGNMENT));
                workspace.regions.push(Region { name, group, formula, bytes, offset });
            }
            Ok(workspace.group_bytes(Backward))
        };
        // The exact path begins when tiles are done with: they share their memory.
        let shared = place(&rows, None)?;
        place(&of_exact, Some(shared))?;
        place(&of_tiles, Some(shared))?;
        Ok(workspace)
    }

    /// The region of this name, if a launch needs it.
    pub fn region(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|r| r.name == name)
    }

    /// Bytes of one group's allocation.
    pub fn group_bytes(&self, group: Group) -> usize {
        let ends = self.regions.iter().filter(|r| r.group == group).map(|r| r.offset + r.bytes);
        ends.max().map_or(0, |end| end.next_multiple_of(ALIGNMENT))
    }

    /// The most that is allocated at any time: what the forward saves, and the larger of the two scratch groups. A backward whose
    /// forward did not capture does that again, with as much to save once more.
    pub fn peak_bytes(&self) -> usize {
        let [saved, forward, backward] = [Group::Saved, Group::Forward, Group::Backward].map(|g| self.group_bytes(g));
        saved + forward.max(backward)
    }
}

impl std::fmt::Display for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: usize| bytes as f64 / MIB as f64;
        for (group, title) in [
            (Group::Saved, "kept from the forward to its backward"),
            (Group::Forward, "forward scratch"),
            (Group::Backward, "backward scratch"),
        ] {
            if self.group_bytes(group) == 0 {
                continue;
            }
            writeln!(f, "  {:9.3} MiB  {title}", mib(self.group_bytes(group)))?;
            for region in self.regions.iter().filter(|r| r.group == group) {
                writeln!(f, "    {:9.3} MiB  {:<20} {}", mib(region.bytes), region.name, region.formula)?;
            }
        }
        write!(f, "  {:9.3} MiB  workspace: kept and the larger scratch", mib(self.peak_bytes()))
    }
}

/// Rows of a matrix of row blocks.
pub(super) fn padded_rows(rows: usize) -> usize {
    rows.next_multiple_of(BLOCK_N)
}
