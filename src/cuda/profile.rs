//! How long each step of a plan takes on the device, by events on its stream.

use super::module::{driver, lock};
use super::probe::times_events;
use crate::Result;
use crate::plan::Step;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaEvent, CudaStream};
use std::sync::{Arc, Mutex};

/// Collects the times of everything that the backends launch that have it ([`Cuda::with_profile`](super::Cuda::with_profile)).
///
/// Events stand between launches, which they keep some microseconds apart; what the device waits for the host counts for the launch
/// after. Not for streams that are being captured into a graph.
#[derive(Debug, Default)]
pub struct Profile(Mutex<Vec<Span>>);

/// What one launch took.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchTime {
    /// The kernel's entry point, or `fill` and the region that was filled.
    pub name: String,
    /// Whether it was for row blocks alone whose candidates outgrew their room. Where there is none it returns at once.
    pub redo: bool,
    /// From the end of the launch before to the end of this one.
    pub milliseconds: f32,
}

#[derive(Debug)]
struct Span {
    name: String,
    redo: bool,
    start: Arc<CudaEvent>,
    end: Arc<CudaEvent>,
}

impl Profile {
    /// Times of all launches since the last call, in their order. Waits for them.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if one of them failed, or if the driver is older than CUDA 12.8.
    pub fn take(&self) -> Result<Vec<LaunchTime>> {
        times_events()?;
        let time = |span: Span| {
            let milliseconds = span.start.elapsed_ms(&span.end).map_err(driver("cuEventElapsedTime"))?;
            Ok(LaunchTime { name: span.name, redo: span.redo, milliseconds })
        };
        std::mem::take(&mut *lock(&self.0)).into_iter().map(time).collect()
    }

    /// An event at the stream's present end.
    pub(super) fn mark(stream: &CudaStream) -> Result<Arc<CudaEvent>> {
        stream.record_event(Some(CU_EVENT_DEFAULT)).map(Arc::new).map_err(driver("cuEventRecord"))
    }

    /// `step` is what the stream does after `start`; what comes next does so after the event that is returned.
    pub(super) fn add(&self, stream: &CudaStream, step: &Step, start: Arc<CudaEvent>) -> Result<Arc<CudaEvent>> {
        let end = Profile::mark(stream)?;
        let (name, redo) = match step {
            Step::Fill { region, .. } => (format!("fill {region}"), false),
            Step::Launch(launch) => (launch.entry_point.to_string(), launch.redo),
        };
        let span = Span { name, redo, start, end: end.clone() };
        lock(&self.0).push(span);
        Ok(end)
    }
}
