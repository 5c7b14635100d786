//! What a plan needs to know of a GPU.

use crate::DType;
use std::borrow::Cow;

/// The properties of a GPU that decide how a problem is cut. Constants for well-known ones, so that a plan can be made,
/// printed and tested on a machine without a GPU; the CUDA backend asks the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: Cow<'static, str>,
    /// Compute capability, e.g. (9, 0).
    pub compute_capability: (u32, u32),
    /// Number of multiprocessors.
    pub sm_count: u32,
    /// Most bytes of shared memory that a block may ask for.
    pub shared_per_block: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_sm: usize,
    /// Bytes of the last cache before memory.
    pub l2_bytes: usize,
    /// 32-bit registers of a multiprocessor.
    pub registers_per_sm: u32,
    /// Blocks of the exact kernel that a multiprocessor holds at once, for 16-bit inputs and for `f32`: it synchronises its
    /// whole grid, so no more than these may be launched. 0 where the device cannot do that.
    pub exact_blocks_per_sm: [u32; 2],
    /// Clusters of two blocks of Hopper's exact kernel that the device holds at once. It synchronises its whole grid, too. 0 where there
    /// is no such kernel, or the driver does not say.
    pub exact_clusters: u32,
}

/// Shared memory that the driver takes of each block.
pub(super) const RESERVED_SHARED: usize = 1024;

impl DeviceInfo {
    /// NVIDIA A100, 80 GB.
    pub const A100: DeviceInfo = known("A100", (8, 0), 108, 164, 40);
    /// NVIDIA A10.
    pub const A10: DeviceInfo = known("A10", (8, 6), 72, 100, 6);
    /// NVIDIA GeForce RTX 3090.
    pub const RTX_3090: DeviceInfo = known("RTX 3090", (8, 6), 82, 100, 6);
    /// NVIDIA L4.
    pub const L4: DeviceInfo = known("L4", (8, 9), 58, 100, 48);
    /// NVIDIA GeForce RTX 4090.
    pub const RTX_4090: DeviceInfo = known("RTX 4090", (8, 9), 128, 100, 72);
    /// NVIDIA H100 SXM.
    pub const H100: DeviceInfo = known("H100", (9, 0), 132, 228, 50);
    /// NVIDIA H200, whose driver reports 60 MiB of L2.
    pub const H200: DeviceInfo = known("H200", (9, 0), 132, 228, 60);
    /// NVIDIA GeForce RTX 5090.
    pub const RTX_5090: DeviceInfo = known("RTX 5090", (12, 0), 170, 100, 96);

    /// Every constant above.
    pub const KNOWN: [DeviceInfo; 8] =
        [Self::A100, Self::A10, Self::RTX_3090, Self::L4, Self::RTX_4090, Self::H100, Self::H200, Self::RTX_5090];

    /// The known device of this name, in any case and with or without its spaces: `h200`, `rtx4090`.
    pub fn known(name: &str) -> Option<DeviceInfo> {
        let plain = |s: &str| s.replace([' ', '-', '_'], "").to_lowercase();
        Self::KNOWN.into_iter().find(|d| plain(&d.name) == plain(name))
    }

    /// The grid of the exact kernel.
    pub(super) fn exact_grid(&self, dtype: DType) -> u32 {
        self.sm_count * self.exact_blocks_per_sm[usize::from(dtype == DType::F32)]
    }

    /// Blocks that run at once when each takes `shared` bytes and may have `most` on a multiprocessor; at least one a
    /// multiprocessor.
    pub(super) fn resident_blocks(&self, shared: usize, most: u32) -> u32 {
        let fit = u32::try_from(self.shared_per_sm / (shared + RESERVED_SHARED)).unwrap_or(most);
        self.sm_count * fit.clamp(1, most)
    }
}

const fn known(
    name: &'static str,
    compute_capability: (u32, u32),
    sm_count: u32,
    shared_kib: usize,
    l2_mib: usize,
) -> DeviceInfo {
    DeviceInfo {
        name: Cow::Borrowed(name),
        compute_capability,
        sm_count,
        shared_per_block: (shared_kib - 1) << 10,
        shared_per_sm: shared_kib << 10,
        l2_bytes: l2_mib << 20,
        registers_per_sm: 65_536,
        // By shared memory and, for f32, registers.
        exact_blocks_per_sm: [if shared_kib >= 164 { 2 } else { 1 }, 1],
        // Multiprocessors come in pairs, which are never parted.
        exact_clusters: if matches!(compute_capability, (9, 0)) { sm_count / 2 } else { 0 },
    }
}

impl std::fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.compute_capability;
        write!(
            f,
            "{} (sm_{major}{minor}, {} SMs, {} KiB shared memory a block, {} MiB L2)",
            self.name,
            self.sm_count,
            self.shared_per_block >> 10,
            self.l2_bytes >> 20
        )
    }
}
