//! From tensors and regions to the argument block of the kernels.

use super::Outputs;
use super::abi::{self, Address, LceArgs, LceBackwardScratch, LceForwardScratch, LceOutputs, LceProblem, LceSaved};
use super::abi::{LceSink, LceUpstream, SINK_ACCUMULATE, SINK_OVERWRITE, SINK_SKIP};
use super::buffers::{self, DeviceMemory, DeviceSlice};
use crate::memory::Buffer;
use crate::plan::LaunchPlan;
use crate::{Matrix, Memory, Problem, Result, Sink, Upstream};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

/// Turns buffers into addresses for work on one stream, and keeps what tells cudarc, when dropped, that they were used.
pub(super) struct Addresses<'a> {
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Addresses<'a> {
    pub fn new(stream: &'a CudaStream) -> Self {
        Addresses { stream, guards: Vec::new() }
    }

    fn keep(&mut self, (address, guard): (Address, Option<SyncOnDrop<'a>>)) -> Address {
        self.guards.extend(guard);
        address
    }

    /// Of a buffer that is read.
    pub fn read<T>(&mut self, slice: &'a CudaSlice<T>) -> Address {
        let (address, guard) = slice.device_ptr(self.stream);
        self.keep((address, Some(guard)))
    }

    /// Of a buffer that is written.
    pub fn write<T>(&mut self, slice: &'a mut CudaSlice<T>) -> Address {
        let (address, guard) = slice.device_ptr_mut(self.stream);
        self.keep((address, Some(guard)))
    }

    fn tensor(&mut self, slice: &'a DeviceSlice<'_>) -> Result<Address> {
        let pair = slice.address(self.stream)?;
        Ok(self.keep(pair))
    }

    fn optional(&mut self, slice: &'a Option<DeviceSlice<'_>>) -> Result<Address> {
        slice.as_ref().map_or(Ok(0), |slice| self.tensor(slice))
    }

    /// Whether every row of both matrices starts at a multiple of 16 bytes.
    pub fn rows_are_aligned(&mut self, problem: &'a Problem<'_, DeviceMemory>) -> Result<bool> {
        let mut starts = |matrix: &'a Matrix<'_, DeviceMemory>| Ok(self.tensor(&matrix.data)?.is_multiple_of(16));
        let inputs = problem.inputs();
        Ok(starts(&inputs.embeddings)? & starts(&inputs.classifier)? & rows_stay_aligned(problem))
    }

    pub fn problem(&mut self, problem: &'a Problem<'_, DeviceMemory>) -> Result<LceProblem> {
        let (inputs, options, shape) = (problem.inputs(), problem.options(), problem.shape());
        let (filter, eps, seed) = abi::filter(options.filter);
        Ok(LceProblem {
            embeddings: self.tensor(&inputs.embeddings.data)?,
            classifier: self.tensor(&inputs.classifier.data)?,
            targets: self.tensor(&inputs.targets)?,
            bias: self.optional(&inputs.bias)?,
            class_weights: self.optional(&inputs.class_weights)?,
            token_weights: self.optional(&inputs.token_weights)?,
            embeddings_stride: inputs.embeddings.row_stride as i64,
            classifier_stride: inputs.classifier.row_stride as i64,
            ignore_index: options.ignore_index,
            seed,
            // The plan checked that these fit.
            tokens: shape.tokens as u32,
            vocab: shape.vocab as u32,
            hidden: shape.hidden as u32,
            seq_len: inputs.seq_len.unwrap_or(shape.tokens) as u32,
            shift: options.shift as u32,
            target_type: abi::target_type(inputs.targets.dtype()),
            bias_type: inputs.bias.map_or(0, |bias| abi::element_type(bias.dtype())),
            reduction: abi::reduction(options.reduction),
            filter,
            eps,
            softcap: options.softcap.unwrap_or(0.0),
            logit_scale: options.logit_scale,
            label_smoothing: options.label_smoothing,
            z_loss: options.z_loss,
            entropy: options.entropy.into(),
            metrics: options.metrics.into(),
        })
    }

    pub fn outputs(&mut self, outputs: &'a mut Outputs) -> LceOutputs {
        LceOutputs {
            loss: self.write(&mut outputs.loss),
            losses: self.write(&mut outputs.losses),
            nll: self.write(&mut outputs.nll),
            lse: self.write(&mut outputs.lse),
            target_logit: self.write(&mut outputs.target_logit),
            entropy: outputs.entropy.as_mut().map_or(0, |entropy| self.write(entropy)),
            argmax: outputs.argmax.as_mut().map_or(0, |argmax| self.write(argmax)),
            accuracy: outputs.accuracy.as_mut().map_or(0, |accuracy| self.write(accuracy)),
        }
    }

    pub fn upstream(&mut self, upstream: &'a Upstream<'_, DeviceMemory>) -> Result<LceUpstream> {
        Ok(LceUpstream {
            loss_scale: self.optional(&upstream.loss_scale)?,
            losses: self.optional(&upstream.losses)?,
            nll: self.optional(&upstream.nll)?,
            lse: self.optional(&upstream.lse)?,
            entropy: self.optional(&upstream.entropy)?,
            loss: upstream.loss,
            padding: 0,
        })
    }

    pub fn sink(&mut self, sink: &'a mut Sink<'_, DeviceMemory>) -> Result<LceSink> {
        let (buffer, mode) = match sink {
            Sink::Skip => return Ok(LceSink { data: 0, r#type: 0, mode: SINK_SKIP }),
            Sink::Overwrite(buffer) => (buffer, SINK_OVERWRITE),
            Sink::Accumulate(buffer) => (buffer, SINK_ACCUMULATE),
        };
        let r#type = abi::element_type(buffer.dtype());
        let pair = buffers::DeviceSliceMut::address(buffer, self.stream)?;
        Ok(LceSink { data: self.keep(pair), r#type, mode })
    }
}

/// Whether every row of both matrices starts at a multiple of 16 bytes where the first one does.
pub(super) fn rows_stay_aligned<M: Memory>(problem: &Problem<'_, M>) -> bool {
    let element = problem.dtype().size_in_bytes();
    let stays = |matrix: &Matrix<'_, M>| matrix.columns > 0 && (matrix.row_stride * element).is_multiple_of(16);
    stays(&problem.inputs().embeddings) && stays(&problem.inputs().classifier)
}

/// The parts of the argument block that follow from the plan, `region` giving the address of each region that is there.
pub(super) fn planned(plan: &LaunchPlan, region: &dyn Fn(&str) -> Address) -> LceArgs {
    LceArgs {
        saved: LceSaved {
            header: region("header"),
            token_row: region("token_row"),
            row_token: region("row_token"),
            row_class: region("row_class"),
            statistics: region("statistics"),
            entries: region("entries"),
            entry_begin: region("entry_begin"),
            entry_count: region("entry_count"),
            exact_row: region("exact_row"),
        },
        forward: LceForwardScratch {
            seed_logit: region("seed_logit"),
            bound: region("bound"),
            partial: region("partial"),
            partial_argmax: region("partial_argmax"),
            pools: region("pools"),
            pool: region("pool"),
            redo_count: region("redo_count"),
            kept_mass: region("kept_mass"),
        },
        backward: LceBackwardScratch {
            coefficients: region("coefficients"),
            column_begin: region("column_begin"),
            popular_classes: region("popular_classes"),
            column_block_sum: region("column_block_sum"),
            column_entries: region("column_entries"),
            class_sum_parts: region("class_sum_parts"),
            class_sum: region("class_sum"),
            spread_sum_parts: region("spread_sum_parts"),
            spread_sum: region("spread_sum"),
            spread_total: region("spread_total"),
            exact_scale: region("exact_scale"),
            barrier: region("barrier"),
            exact_gradients: region("exact_gradients"),
            exact_d_embeddings: region("exact_d_embeddings"),
            exact_gradients_elements: plan.exact_gradients_elements as u64,
            exact_panel_rows: plan.exact_panel_rows,
            tile_use: abi::tile_use(plan.tiles),
            tile_work: region("tile_work"),
            tile_sources: region("tile_sources"),
            active_blocks: region("active_blocks"),
            sources: region("sources"),
            tile_begin: region("tile_begin"),
            tile_entries: region("tile_entries"),
            crowded_blocks: region("crowded_blocks"),
            crowded_next: region("crowded_next"),
            in_tile: region("in_tile"),
        },
        row_blocks: plan.row_blocks,
        block_entries: plan.block_entries,
        capture: plan.capture.into(),
        partials: plan.rounds.iter().map(|round| round.splits).sum(),
        exact_slices: plan.exact_slices,
        ..LceArgs::default()
    }
}
