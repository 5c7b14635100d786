//! Where finished gradient rows go: overwritten or added to, in the caller's element type, rounded once.

use crate::{Element, HostSliceMut, Sink};
use half::{bf16, f16};

/// A gradient buffer, or the part of it that one task owns.
#[derive(Debug)]
pub(crate) enum RowSink<'a> {
    Skip,
    Accumulate(&'a mut [f32]),
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    BF16(&'a mut [bf16]),
}

impl<'a> RowSink<'a> {
    pub fn new(sink: Sink<'a>) -> Self {
        match sink {
            Sink::Skip => RowSink::Skip,
            Sink::Accumulate(HostSliceMut::F32(s)) => RowSink::Accumulate(s),
            Sink::Overwrite(HostSliceMut::F32(s)) => RowSink::F32(s),
            // Only f32 can be accumulated into: checked before.
            Sink::Accumulate(HostSliceMut::F16(s)) | Sink::Overwrite(HostSliceMut::F16(s)) => RowSink::F16(s),
            Sink::Accumulate(HostSliceMut::BF16(s)) | Sink::Overwrite(HostSliceMut::BF16(s)) => RowSink::BF16(s),
        }
    }

    pub fn is_skip(&self) -> bool {
        matches!(self, RowSink::Skip)
    }

    /// Whether f32 values arrive as they are.
    pub fn is_f32(&self) -> bool {
        matches!(self, RowSink::Accumulate(_) | RowSink::F32(_))
    }

    /// Cuts the buffer into parts of `elements`, `parts` of them (the last may be shorter).
    pub fn split(self, elements: usize, parts: usize) -> Vec<RowSink<'a>> {
        let elements = elements.max(1);
        let mut out: Vec<RowSink<'a>> = match self {
            RowSink::Skip => Vec::new(),
            RowSink::Accumulate(s) => s.chunks_mut(elements).map(RowSink::Accumulate).collect(),
            RowSink::F32(s) => s.chunks_mut(elements).map(RowSink::F32).collect(),
            RowSink::F16(s) => s.chunks_mut(elements).map(RowSink::F16).collect(),
            RowSink::BF16(s) => s.chunks_mut(elements).map(RowSink::BF16).collect(),
        };
        // A skipped or empty buffer still has its parts, with nothing in them.
        out.resize_with(parts, || RowSink::Skip);
        out
    }

    /// A part of this buffer.
    pub fn part(&mut self, range: std::ops::Range<usize>) -> RowSink<'_> {
        match self {
            RowSink::Skip => RowSink::Skip,
            RowSink::Accumulate(s) => RowSink::Accumulate(&mut s[range]),
            RowSink::F32(s) => RowSink::F32(&mut s[range]),
            RowSink::F16(s) => RowSink::F16(&mut s[range]),
            RowSink::BF16(s) => RowSink::BF16(&mut s[range]),
        }
    }

    /// Writes or adds `values` at `offset`.
    #[inline(always)]
    pub fn put(&mut self, offset: usize, values: &[f32]) {
        let range = offset..offset + values.len();
        match self {
            RowSink::Skip => {}
            RowSink::Accumulate(s) => s[range].iter_mut().zip(values).for_each(|(s, v)| *s += v),
            RowSink::F32(s) => s[range].copy_from_slice(values),
            RowSink::F16(s) => f16::narrow(values, &mut s[range]),
            RowSink::BF16(s) => bf16::narrow(values, &mut s[range]),
        }
    }

    /// Writes zeros, or adds nothing, to `len` elements at `offset`.
    pub fn put_zeros(&mut self, offset: usize, len: usize) {
        let range = offset..offset + len;
        match self {
            RowSink::Skip | RowSink::Accumulate(_) => {}
            RowSink::F32(s) => s[range].fill(0.0),
            RowSink::F16(s) => s[range].fill(f16::ZERO),
            RowSink::BF16(s) => s[range].fill(bf16::ZERO),
        }
    }
}

/// The sinks of dC and dbias for the same classes.
#[derive(Debug)]
pub(crate) struct ColumnSinks<'a> {
    /// [classes, D].
    pub classifier: RowSink<'a>,
    /// `[classes]`.
    pub bias: RowSink<'a>,
    pub hidden: usize,
}

impl ColumnSinks<'_> {
    pub fn is_skip(&self) -> bool {
        self.classifier.is_skip() && self.bias.is_skip()
    }

    /// The sinks of some of the classes.
    pub fn part(&mut self, classes: std::ops::Range<usize>) -> ColumnSinks<'_> {
        ColumnSinks {
            classifier: self.classifier.part(classes.start * self.hidden..classes.end * self.hidden),
            bias: self.bias.part(classes),
            hidden: self.hidden,
        }
    }
}

impl<'a> ColumnSinks<'a> {
    /// Cuts into parts of `columns` classes, `parts` of them (the last may be smaller).
    pub fn split(self, columns: usize, parts: usize) -> Vec<ColumnSinks<'a>> {
        let hidden = self.hidden;
        let classifier = self.classifier.split(columns * hidden, parts);
        let bias = self.bias.split(columns, parts);
        let pair = |(classifier, bias)| ColumnSinks { classifier, bias, hidden };
        classifier.into_iter().zip(bias).map(pair).collect()
    }
}
