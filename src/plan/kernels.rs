//! The entry points of `kernels/`: their names, threads and shared memory. The only list of them on the host.

use crate::DType;
use std::borrow::Cow;

/// Which compiled copies of a kernel there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variants {
    /// One for all inputs.
    One,
    /// One an element type: `_f32`, `_f16`, `_bf16`.
    Types,
    /// One a 16-bit type: `_f16`, `_bf16`.
    HalfTypes,
    /// One an element type, and each again as `_unaligned` for rows that do not start at multiples of 16 bytes.
    TypesAndAlignments,
}

/// One kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Name without the suffix of its variant.
    pub stem: &'static str,
    /// Its variants.
    pub variants: Variants,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory: `sizeof` of its `Smem`.
    pub shared: u32,
    /// Synchronises its whole grid.
    pub cooperative: bool,
    /// Blocks of a cluster; 1: there are none.
    pub cluster: u32,
}

macro_rules! kernels {
    ($($name:ident = $stem:literal $variants:ident $threads:literal $shared:literal;)*) => {
        $(pub(super) const $name: Kernel = Kernel {
            stem: $stem,
            variants: Variants::$variants,
            threads: $threads,
            shared: $shared,
            cooperative: matches!(stringify!($name).as_bytes(), b"EXACT" | b"EXACT_HOPPER" | b"EXACT_HOPPER_CLUSTER"),
            cluster: if matches!(stringify!($name).as_bytes(), b"FORWARD_HOPPER_CLUSTER" | b"EXACT_HOPPER_CLUSTER") { 2 } else { 1 },
        };)*
        /// Every kernel.
        pub const KERNELS: &[Kernel] = &[$($name),*];
    };
}

// Threads as in the kernels' launch bounds, shared memory as `sizeof` their `Smem`, the largest of the
// variants: `tests/plan_kernels.rs` compares.
kernels! {
    ROWS = "lce_rows" One 1024 8328;
    TARGET_LOGIT = "lce_target_logit" Types 256 0;
    BOUND = "lce_bound" One 1024 1152;
    FORWARD = "lce_forward_sm80" TypesAndAlignments 256 82560;
    FORWARD_HOPPER = "lce_forward_sm90" HalfTypes 384 216064;
    FORWARD_HOPPER_CLUSTER = "lce_forward_sm90_cluster" HalfTypes 384 216064;
    COMBINE = "lce_combine" One 256 0;
    REDUCE_LOSS = "lce_reduce_loss" One 1024 8192;
    FILTER = "lce_filter" One 1024 3712;
    ORDER_ENTRIES = "lce_order_entries" One 128 34320;
    EXACT_ROWS = "lce_exact_rows" One 1024 8320;
    COEFFICIENTS = "lce_coefficients" One 256 0;
    D_EMBEDDINGS = "lce_d_embeddings" Types 128 1536;
    COLUMN_COUNT = "lce_column_count" One 256 0;
    COLUMN_SCAN_A = "lce_column_scan_a" One 256 32;
    COLUMN_SCAN_B = "lce_column_scan_b" One 256 32;
    COLUMN_SCAN_C = "lce_column_scan_c" One 256 32;
    COLUMN_SCATTER = "lce_column_scatter" One 256 0;
    ROW_TILES = "lce_row_tiles" HalfTypes 1024 86148;
    D_EMBEDDINGS_TILES = "lce_d_embeddings_tiles" HalfTypes 256 75904;
    CLASS_TILES = "lce_class_tiles" HalfTypes 1024 86148;
    CROWDED_TILES = "lce_crowded_tiles" HalfTypes 1024 4096;
    D_CLASSIFIER_TILES = "lce_d_classifier_tiles" HalfTypes 256 75904;
    D_CLASSIFIER = "lce_d_classifier" Types 256 13072;
    CLASS_SUM = "lce_class_sum" Types 256 8192;
    SPREAD_SUM = "lce_spread_sum" Types 256 8192;
    SUM_PARTS = "lce_sum_parts" One 256 2048;
    EXACT = "lce_exact" TypesAndAlignments 256 81408;
    EXACT_HOPPER = "lce_exact_sm90" HalfTypes 384 232448;
    EXACT_HOPPER_CLUSTER = "lce_exact_sm90_cluster" HalfTypes 384 232448;
}

impl Kernel {
    /// The entry point for inputs of this element type, whose rows are 16-byte aligned or not.
    pub fn entry_point(&self, dtype: DType, aligned: bool) -> Cow<'static, str> {
        match (self.variants, aligned) {
            (Variants::One, _) => Cow::Borrowed(self.stem),
            (Variants::Types | Variants::HalfTypes, _) | (_, true) => Cow::Owned(format!("{}_{dtype}", self.stem)),
            (Variants::TypesAndAlignments, false) => Cow::Owned(format!("{}_{dtype}_unaligned", self.stem)),
        }
    }

    /// Whether it runs on compute capability 9.0 alone.
    pub fn is_hopper(&self) -> bool {
        self.stem.contains("_sm90")
    }

    /// Every entry point that must exist.
    pub fn entry_points(&self) -> Vec<Cow<'static, str>> {
        let types = [DType::F32, DType::F16, DType::BF16];
        let alignments: &[bool] = if self.variants == Variants::TypesAndAlignments { &[true, false] } else { &[true] };
        let types = match self.variants {
            Variants::One => &types[..1],
            Variants::HalfTypes => &types[1..],
            Variants::Types | Variants::TypesAndAlignments => &types,
        };
        types.iter().flat_map(|t| alignments.iter().map(|a| self.entry_point(*t, *a))).collect()
    }
}
