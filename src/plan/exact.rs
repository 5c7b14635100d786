//! How the exact path cuts its rows and classes: panels, chunks, slices, clusters.

use super::workspace::padded_rows;
use super::{BLOCK_N, BLOCK_V, CLUSTER, CLUSTER_TIME, DeviceInfo, HOPPER_TILE, LaunchPlan, MIB, Workload};
use crate::Shape;

/// Most bytes of the logit gradients of a chunk of classes: where it is the only path (on Hopper [`Tuning::chunk_mib`](super::Tuning::chunk_mib)
/// alone says), and where it serves the rows that overflow.
const DENSE_CHUNK_BYTES: usize = 32 * MIB;
const OVERFLOW_CHUNK_BYTES: usize = 8 * MIB;
/// Rows of a panel where it serves the rows that overflow.
const OVERFLOW_PANEL: usize = 1024;
/// Most bytes of dE's accumulators where a chunk has several slices.
const SLICE_BYTES: usize = 16 * MIB;

/// Sizes of its workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Rows that dE has accumulators for.
    pub panel: usize,
    /// Of the logit gradients of a panel and a chunk.
    pub gradients_elements: usize,
    /// Of a chunk, each with accumulators of its own.
    pub slices: usize,
}

impl Sizes {
    pub fn new(workload: &Workload, device: &DeviceInfo, hopper: bool, dense: bool) -> Self {
        let Shape { tokens, vocab, .. } = workload.shape;
        let rows = padded_rows(tokens);
        let most = workload.kernels.tuning.chunk_mib as usize * MIB;
        let (panel, chunk_bytes) = match dense {
            true if hopper => (rows, most),
            true => (rows, DENSE_CHUNK_BYTES.min(most)),
            false => (rows.min(OVERFLOW_PANEL), OVERFLOW_CHUNK_BYTES.min(most)),
        };
        let tile = if hopper { HOPPER_TILE } else { BLOCK_V };
        let elements = chunk_bytes / workload.dtype.size_in_bytes();
        let slices = match (dense, hopper) {
            (false, _) => 1, // of how many rows, nobody knows
            (true, true) => slices(workload, HOPPER_TILE, device.sm_count),
            (true, false) => slices(workload, BLOCK_N, device.exact_grid(workload.dtype)),
        };
        Sizes { panel, gradients_elements: gradients_elements(rows, vocab, tile, panel, elements), slices }
    }
}

/// As many tiles of classes as fit `elements` for a panel of `panel` rows; at least a tile of them for all rows.
fn gradients_elements(rows: usize, vocab: usize, tile: usize, panel: usize, elements: usize) -> usize {
    let classes = (elements / panel.max(1) / tile).max(1) * tile;
    let chunk = classes.min(vocab.next_multiple_of(tile));
    (panel * chunk).max(rows * tile)
}

/// An item of dE, whose tiles have `columns`, for each of the blocks, as far as there is memory for the accumulators of all slices.
fn slices(workload: &Workload, columns: usize, blocks: u32) -> usize {
    let Shape { tokens, hidden, .. } = workload.shape;
    let tiles = tokens.div_ceil(BLOCK_N) * hidden.div_ceil(columns);
    let fitting = SLICE_BYTES / (4 * padded_rows(tokens) * hidden).max(1);
    (blocks as usize).div_ceil(tiles.max(1)).min(fitting).max(1)
}

impl LaunchPlan {
    /// Whether the exact path runs in clusters: what is asked for, else what takes less time by the forward's model. Two products of three
    /// go over an odd last row block twice, and multiprocessors that no cluster has are idle. Where only some rows are exact, they may be of a
    /// single block.
    pub(super) fn exact_in_clusters(&self) -> bool {
        let DeviceInfo { sm_count, exact_clusters, .. } = self.device;
        let twice = f64::from(self.row_blocks.next_multiple_of(CLUSTER)) / f64::from(self.row_blocks);
        let idle = f64::from(sm_count) / f64::from(CLUSTER * exact_clusters);
        let faster = self.dense && self.row_blocks >= CLUSTER && CLUSTER_TIME * idle * (2.0 * twice + 1.0) / 3.0 < 1.0;
        self.hopper && exact_clusters > 0 && self.workload.kernels.tuning.cluster.unwrap_or(faster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{KernelChoice, KernelFamily, Step, Tuning};
    use crate::{CceOptions, DType, Error, GradientFilter};

    /// Of Qwen2.5 0.5B with so many tokens, and of Llama 3 8B.
    #[test]
    fn de_of_few_rows_is_cut_into_slices_as_far_as_they_fit() {
        let slices = |tokens, hidden, filter, family: KernelFamily| {
            let options = CceOptions { filter, ..CceOptions::default() };
            let workload = Workload::of_shape(Shape { tokens, hidden, vocab: 151_936 }, DType::BF16, options);
            let plan = LaunchPlan::new(&workload.with_kernels(family), &DeviceInfo::H200).expect("fits");
            let bytes = plan.workspace.region("exact_d_embeddings").expect("dE is asked for").bytes;
            assert_eq!(bytes, 4 * plan.exact_slices as usize * plan.exact_panel_rows as usize * hidden);
            assert!(plan.exact_slices == 1 || bytes <= SLICE_BYTES);
            plan.exact_slices
        };
        let exact = |tokens, hidden| slices(tokens, hidden, GradientFilter::Exact, KernelFamily::Auto);
        assert_eq!([256, 1024, 2048, 4096, 8192].map(|tokens| exact(tokens, 896)), [17, 4, 2, 1, 1]);
        assert_eq!([128, 256, 512, 1024].map(|tokens| exact(tokens, 4096)), [8, 4, 2, 1]);
        assert_eq!(slices(1024, 896, GradientFilter::Exact, KernelFamily::Portable), 4);
        assert_eq!(
            slices(256, 896, GradientFilter::default(), KernelFamily::Auto),
            1,
            "of how many rows, nobody knows"
        );
    }

    /// Of Llama 3 8B: blocks of a cluster, and of the grid.
    #[test]
    fn clusters_are_chosen_where_they_take_less_time_and_the_device_holds_them() {
        let blocks = |tokens, filter, cluster, device: &DeviceInfo| {
            let options = CceOptions { filter, ..CceOptions::default() };
            let workload = Workload::of_shape(Shape { tokens, hidden: 4096, vocab: 128_256 }, DType::BF16, options);
            let tuning = Tuning { cluster, ..Tuning::default() };
            let plan =
                LaunchPlan::new(&workload.with_kernels(KernelChoice { tuning, ..KernelChoice::default() }), device)?;
            let cooperative = |step: &Step| match step {
                Step::Launch(launch) if launch.kernel.cooperative => Some((launch.kernel.cluster, launch.grid[0])),
                _ => None,
            };
            Ok::<_, Error>(plan.backward.iter().find_map(cooperative).expect("an exact kernel"))
        };
        let (exact, sparse, h200) = (GradientFilter::Exact, GradientFilter::default(), DeviceInfo::H200);
        let of_holding = |exact_clusters| DeviceInfo { exact_clusters, ..DeviceInfo::H200 };
        let by_default = |tokens| blocks(tokens, exact, None, &h200).expect("fits");
        assert_eq!([256, 512, 600, 8192, 8300].map(by_default), [(2, 132); 5]);
        assert_eq!([1, 128, 384].map(by_default), [(1, 132); 3], "a row block of nothing costs more than it gains");
        assert_eq!(blocks(8192, sparse, None, &h200), Ok((1, 132)), "what is left over may be a single row block");
        assert_eq!([128, 8192].map(|tokens| blocks(tokens, sparse, Some(true), &h200)), [Ok((2, 132)), Ok((2, 132))]);
        assert_eq!(blocks(8192, exact, Some(false), &h200), Ok((1, 132)));
        assert_eq!(blocks(8192, exact, None, &of_holding(62)), Ok((2, 124)), "as many as are resident at once");
        assert_eq!(blocks(8192, exact, None, &of_holding(50)), Ok((1, 132)), "32 idle multiprocessors cost more");
        assert_eq!(blocks(8192, exact, None, &of_holding(0)), Ok((1, 132)));
        let refused = blocks(8192, exact, Some(true), &of_holding(0));
        assert!(matches!(&refused, Err(Error::Device { reason, .. }) if reason.contains("clusters")), "{refused:?}");
    }
}
