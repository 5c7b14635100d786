//! The host's side of `kernels/abi.h`, field by field. `tests` compares sizes and offsets with the header.

use crate::plan::Tiles;
use crate::{DType, GradientFilter, Reduction};
use bytemuck::{Pod, Zeroable};

/// A device address; 0 where there is nothing.
pub(crate) type Address = u64;

/// No row, no class.
pub(crate) const NONE: u32 = u32::MAX;

macro_rules! mirror {
    ($($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        $($(#[$meta])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, PartialEq, Zeroable, Pod)]
        pub(crate) struct $name { $(pub $field: $type),* }

        #[cfg(test)]
        impl $name {
            /// Each field's name, offset and size.
            pub const FIELDS: &[(&str, usize, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$type>())),*];
        })*

        #[cfg(test)]
        pub(crate) const STRUCTS: &[(&str, usize, &[(&str, usize, usize)])] =
            &[$((stringify!($name), size_of::<$name>(), $name::FIELDS)),*];
    };
}

mirror! {
    LceProblem {
        embeddings: Address,
        classifier: Address,
        targets: Address,
        bias: Address,
        class_weights: Address,
        token_weights: Address,
        embeddings_stride: i64,
        classifier_stride: i64,
        ignore_index: i64,
        seed: u64,
        tokens: u32,
        vocab: u32,
        hidden: u32,
        seq_len: u32,
        shift: u32,
        target_type: u32,
        bias_type: u32,
        reduction: u32,
        filter: u32,
        eps: f32,
        softcap: f32,
        logit_scale: f32,
        label_smoothing: f32,
        z_loss: f32,
        entropy: u32,
        metrics: u32,
    }
    LceOutputs {
        loss: Address,
        losses: Address,
        nll: Address,
        lse: Address,
        target_logit: Address,
        entropy: Address,
        argmax: Address,
        accuracy: Address,
    }
    LceHeader {
        denominator: f64,
        class_weight_sum: f64,
        kept_mass: f64,
        candidates: u64,
        kept_entries: u64,
        bad_target: i64,
        bad_target_token: u32,
        num_rows: u32,
        exact_rows: u32,
        raised_rows: u32,
    }
    LceRowStatistics {
        max: f32,
        inverse_sum: f32,
        log_sum: f32,
        lse: f32,
        entropy: f32,
        target_logit: f32,
        argmax: u32,
        eps: f32,
    }
    LceSaved {
        header: Address,
        token_row: Address,
        row_token: Address,
        row_class: Address,
        statistics: Address,
        entries: Address,
        entry_begin: Address,
        entry_count: Address,
        exact_row: Address,
    }
    LceForwardScratch {
        seed_logit: Address,
        bound: Address,
        partial: Address,
        partial_argmax: Address,
        pools: Address,
        pool: Address,
        redo_count: Address,
        kept_mass: Address,
    }
    LceUpstream {
        loss_scale: Address,
        losses: Address,
        nll: Address,
        lse: Address,
        entropy: Address,
        loss: f32,
        padding: u32,
    }
    LceSink {
        data: Address,
        r#type: u32,
        mode: u32,
    }
    LceTileWork {
        active: u32,
        next_item: u32,
        crowded: u32,
        padding: u32,
    }
    LceBackwardScratch {
        coefficients: Address,
        column_begin: Address,
        popular_classes: Address,
        column_block_sum: Address,
        column_entries: Address,
        class_sum_parts: Address,
        class_sum: Address,
        spread_sum_parts: Address,
        spread_sum: Address,
        spread_total: Address,
        exact_scale: Address,
        barrier: Address,
        exact_gradients: Address,
        exact_d_embeddings: Address,
        exact_gradients_elements: u64,
        exact_panel_rows: u32,
        tile_use: u32,
        tile_work: Address,
        tile_sources: Address,
        active_blocks: Address,
        sources: Address,
        tile_begin: Address,
        tile_entries: Address,
        crowded_blocks: Address,
        crowded_next: Address,
        in_tile: Address,
    }
    /// The argument of every kernel.
    LceArgs {
        problem: LceProblem,
        outputs: LceOutputs,
        saved: LceSaved,
        forward: LceForwardScratch,
        upstream: LceUpstream,
        d_embeddings: LceSink,
        d_classifier: LceSink,
        d_bias: LceSink,
        backward: LceBackwardScratch,
        row_blocks: u32,
        block_entries: u32,
        capture: u32,
        partials: u32,
        first_partial: u32,
        splits: u32,
        first_tile: u32,
        num_tiles: u32,
        previous_tile: u32,
        round: u32,
        redo: u32,
        exact_slices: u32,
    }
}

/// `ElementType` of a floating-point type.
pub(crate) fn element_type(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    }
}

/// `TargetType` of an integer type.
pub(crate) fn target_type(dtype: DType) -> u32 {
    match dtype {
        DType::I32 => 1,
        DType::U32 => 2,
        _ => 0,
    }
}

/// `Reduction`.
pub(crate) fn reduction(reduction: Reduction) -> u32 {
    match reduction {
        Reduction::None => 0,
        Reduction::Mean => 1,
        Reduction::Sum => 2,
    }
}

/// `Filter`, ε and seed.
pub(crate) fn filter(filter: GradientFilter) -> (u32, f32, u64) {
    match filter {
        GradientFilter::Exact => (0, 0.0, 0),
        GradientFilter::Unbiased { eps, seed } => (1, eps, seed),
        GradientFilter::Threshold { eps } => (2, eps, 0),
    }
}

/// `TileUse`.
pub(crate) fn tile_use(tiles: Tiles) -> u32 {
    match tiles {
        Tiles::Off => 0,
        Tiles::WhereFaster => 1,
        Tiles::Everywhere => 2,
    }
}

/// `SinkMode`.
pub(crate) const SINK_SKIP: u32 = 0;
pub(crate) const SINK_OVERWRITE: u32 = 1;
pub(crate) const SINK_ACCUMULATE: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const HEADER: &str = include_str!("../../kernels/abi.h");

    /// The text between `open` and the next `close`.
    fn between<'a>(text: &'a str, open: &str, close: &str) -> &'a str {
        let start = text.find(open).unwrap_or_else(|| panic!("no `{open}` in abi.h")) + open.len();
        &text[start..][..text[start..].find(close).expect("closed")]
    }

    /// Size and alignment of a C++ type of the header.
    fn layout(ty: &str, structs: &HashMap<String, (usize, usize)>) -> (usize, usize) {
        match ty {
            t if t.ends_with('*') => (8, 8),
            "i64" | "u64" | "f64" => (8, 8),
            "u32" | "float" => (4, 4),
            other => structs[other],
        }
    }

    #[test]
    fn layouts_are_those_of_the_header() {
        let mut known = HashMap::new();
        for (name, size, ours) in STRUCTS {
            let aligned = [8, 16].map(|bytes| (bytes, format!("struct alignas({bytes}) {name} {{")));
            let aligned = aligned.into_iter().find(|(_, open)| HEADER.contains(open));
            let (least, open) = aligned.unwrap_or((1, format!("struct {name} {{")));
            let body = between(HEADER, &open, "}");
            let code: String = body.lines().map(|l| l.split("//").next().unwrap_or_default()).collect();
            let (mut offset, mut alignment, mut fields) = (0_usize, least, Vec::new());
            for declaration in code.split(';').map(str::trim).filter(|d| !d.is_empty()) {
                let declaration = declaration.strip_prefix("const ").unwrap_or(declaration);
                let (ty, names) = declaration.split_once(' ').expect("a type and names");
                let (bytes, align) = layout(ty, &known);
                for field in names.split(',').map(str::trim) {
                    offset = offset.next_multiple_of(align);
                    fields.push((field.to_string(), offset, bytes));
                    (offset, alignment) = (offset + bytes, alignment.max(align));
                }
            }
            let theirs = offset.next_multiple_of(alignment);
            let ours: Vec<_> = ours.iter().map(|(n, o, s)| (n.trim_start_matches("r#").to_string(), *o, *s)).collect();
            assert_eq!((*size, ours), (theirs, fields), "{name}");
            known.insert(name.to_string(), (theirs, alignment));
        }
    }

    #[test]
    fn constants_are_those_of_the_header() {
        use crate::plan;
        let constant = |name: &str| -> u32 {
            let value = between(HEADER, &format!("constexpr u32 {name} = "), ";");
            value.trim_end_matches('u').parse().unwrap_or_else(|_| {
                u32::from_str_radix(value.trim_start_matches("0x").trim_end_matches('u'), 16).expect("a number")
            })
        };
        assert_eq!(constant("BLOCK_N") as usize, plan::BLOCK_N);
        assert_eq!(constant("BLOCK_V") as usize, plan::BLOCK_V);
        assert_eq!(constant("MAX_PARTIALS") as usize, plan::MAX_PARTIALS);
        assert_eq!(1 << constant("CLASS_BITS"), plan::MAX_VOCAB);
        assert_eq!(constant("SUM_PARTS") as usize, plan::SUM_PARTS);
        assert_eq!(constant("MOST_CROWDED") as usize, plan::MOST_CROWDED);
        assert_eq!(constant("NONE"), NONE);
        let enumerator = |name: &str| between(HEADER, &format!("{name} = "), "}").split(',').next().map(str::trim);
        let ours = [
            ("TYPE_F32", element_type(DType::F32)),
            ("TYPE_F16", element_type(DType::F16)),
            ("TYPE_BF16", element_type(DType::BF16)),
            ("TARGET_I64", target_type(DType::I64)),
            ("TARGET_I32", target_type(DType::I32)),
            ("TARGET_U32", target_type(DType::U32)),
            ("REDUCTION_NONE", reduction(Reduction::None)),
            ("REDUCTION_MEAN", reduction(Reduction::Mean)),
            ("REDUCTION_SUM", reduction(Reduction::Sum)),
            ("FILTER_EXACT", filter(GradientFilter::Exact).0),
            ("FILTER_UNBIASED", filter(GradientFilter::default()).0),
            ("FILTER_THRESHOLD", filter(GradientFilter::Threshold { eps: 0.5 }).0),
            ("TILES_OFF", tile_use(Tiles::Off)),
            ("TILES_WHERE_FASTER", tile_use(Tiles::WhereFaster)),
            ("TILES_EVERYWHERE", tile_use(Tiles::Everywhere)),
            ("SINK_SKIP", SINK_SKIP),
            ("SINK_OVERWRITE", SINK_OVERWRITE),
            ("SINK_ACCUMULATE", SINK_ACCUMULATE),
        ];
        for (name, value) in ours {
            assert_eq!(enumerator(name), Some(value.to_string().as_str()), "{name}");
        }
    }
}
