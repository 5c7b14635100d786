//! What the Hopper kernels take besides the common arguments: tensor maps, by which the copy engine finds tiles of E and C.
//! The host's side of `kernels/abi_sm90.h`.

use super::abi::LceArgs;
use super::module::driver;
use crate::plan::{Kernel, LaunchPlan, Tuning};
use crate::{DType, Result};
use cudarc::driver::{DeviceRepr, sys};

/// A `CUtensorMap`. cudarc's own has the alignment of the CUDA version of its bindings; kernels want 64.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
struct TensorMap([u64; 16]);

/// How the copy engine finds tiles of E and C.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorMaps {
    /// E [N, D] in boxes of 128 rows (exact path: 64).
    embeddings: TensorMap,
    /// C [V, D], the same.
    classifier: TensorMap,
}

/// Argument of `lce_forward_sm90_*` and `lce_exact_sm90_*`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub(super) struct LceHopperArgs {
    args: LceArgs,
    maps: TensorMaps,
    sweep_blocks: u32,
    lead: u32,
    gather: u32,
    padding: [u32; 13],
}

// SAFETY: plain data, laid out as the kernel declares it.
unsafe impl DeviceRepr for LceHopperArgs {}

/// Columns of every box: 128 bytes, the span of the swizzle.
const BOX_COLUMNS: u32 = 64;

impl TensorMaps {
    /// For a plan that chose the Hopper kernels, so that base and row strides of E and C are multiples of 16 bytes. The same for all
    /// launches of a forward, or of a backward, whose one Hopper kernel is the exact path's.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the driver refuses a tensor map.
    pub fn new(args: &LceArgs, plan: &LaunchPlan, kernel: &Kernel) -> Result<Self> {
        let (p, dtype) = (&args.problem, plan.workload.dtype);
        let box_rows = if kernel.cooperative { 64 } else { 128 };
        Ok(TensorMaps {
            embeddings: encode(dtype, p.embeddings, [p.hidden, p.tokens], p.embeddings_stride, box_rows)?,
            classifier: encode(dtype, p.classifier, [p.hidden, p.vocab], p.classifier_stride, box_rows)?,
        })
    }
}

impl LceHopperArgs {
    pub fn new(args: LceArgs, plan: &LaunchPlan, maps: TensorMaps) -> Self {
        let Tuning { lead, gather, .. } = plan.workload.kernels.tuning;
        LceHopperArgs { args, maps, sweep_blocks: plan.sweep_blocks, lead, gather: gather.into(), padding: [0; 13] }
    }
}

/// A row-major matrix of `[columns, rows]`, rows `stride` elements apart, in boxes of `box_rows` rows; zeros outside.
fn encode(dtype: DType, address: u64, size: [u32; 2], stride: i64, box_rows: u32) -> Result<TensorMap> {
    use sys::CUtensorMapDataType_enum::{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
    let data_type =
        if dtype == DType::F16 { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 } else { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
    let sizes = size.map(u64::from);
    let stride_bytes = stride as u64 * dtype.size_in_bytes() as u64;
    let (box_sizes, steps) = ([BOX_COLUMNS, box_rows], [1_u32; 2]);
    let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::zeroed();
    // SAFETY: the driver reads two numbers behind each pointer, one stride, and writes the map; it only notes the address.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            data_type,
            2,
            address as *mut _,
            sizes.as_ptr(),
            &stride_bytes,
            box_sizes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
        .map_err(driver("cuTensorMapEncodeTiled"))?;
    }
    // SAFETY: both are 128 bytes of plain data, which the driver has written.
    Ok(unsafe { std::mem::transmute_copy::<sys::CUtensorMap, TensorMap>(map.assume_init_ref()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    /// The offsets that a C++ compiler gives the fields of `kernels/abi_sm90.h`: `LceArgs` padded to 64, then 128 bytes a map.
    #[test]
    fn fields_lie_where_the_header_puts_them() {
        assert_eq!(size_of::<sys::CUtensorMap>(), size_of::<TensorMap>());
        let maps = size_of::<LceArgs>().next_multiple_of(64);
        assert_eq!(offset_of!(LceHopperArgs, maps), maps);
        assert_eq!(offset_of!(TensorMaps, classifier), 128);
        assert_eq!(offset_of!(LceHopperArgs, sweep_blocks), maps + 2 * 128);
        assert_eq!(offset_of!(LceHopperArgs, lead), maps + 2 * 128 + 4);
        assert_eq!(offset_of!(LceHopperArgs, gather), maps + 2 * 128 + 8);
        assert_eq!(size_of::<LceHopperArgs>(), maps + 3 * 128 - 64);
        assert!(size_of::<LceHopperArgs>() <= 4096, "the most that a launch's arguments may take before CUDA 12.1");
    }
}
