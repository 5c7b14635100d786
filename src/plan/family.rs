//! Which kernels compute, by name: `auto`, `portable`, `hopper`, `hopper:cluster=off,lead=3`.

use std::fmt;
use std::str::FromStr;

/// Which kernels compute the forward and, where every row takes it, the exact path; the others are the same everywhere. Parses from, and prints as, what `cce --kernels` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelFamily {
    /// Hopper's where the device is one and the inputs fit them, else the portable ones.
    #[default]
    Auto,
    /// `cp.async` and `mma.sync`: every GPU from Ampere on, every input.
    Portable,
    /// TMA and `wgmma`: compute capability 9.0; f16 or bf16, rows that start at multiples of 16 bytes, D > 0.
    Hopper,
    /// The same, not as the planner would have it: for measurements.
    HopperTuned(HopperTuning),
}

/// How the Hopper kernels run. No choice changes what they compute beyond the order of sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HopperTuning {
    /// `cluster=on` or `off`: pairs of blocks that share each tile of the classifier. `None`: by the planner's model of time.
    pub cluster: Option<bool>,
    /// `lead=0` to `3`: steps of the main loop by which the second consumer starts behind the first.
    pub lead: u32,
    /// `chunk=64`: MiB of logit gradients that the exact path keeps at a time, at least a tile of classes.
    pub chunk_mib: u32,
}

impl HopperTuning {
    /// Most steps of a lead: the stages of the ring less the one that both need.
    pub const MAX_LEAD: u32 = 3;
}

impl Default for HopperTuning {
    fn default() -> Self {
        HopperTuning { cluster: None, lead: 2, chunk_mib: 64 }
    }
}

impl KernelFamily {
    /// How the Hopper kernels run, where they do.
    pub fn tuning(self) -> HopperTuning {
        if let KernelFamily::HopperTuned(tuning) = self { tuning } else { HopperTuning::default() }
    }
}

impl FromStr for KernelFamily {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (family, tuning) = text.split_once(':').map_or((text, None), |(family, tuning)| (family, Some(tuning)));
        match (family, tuning) {
            ("auto", None) => Ok(KernelFamily::Auto),
            ("portable", None) => Ok(KernelFamily::Portable),
            ("hopper", None) => Ok(KernelFamily::Hopper),
            ("hopper", Some(tuning)) => parse_tuning(tuning).map(KernelFamily::HopperTuned),
            _ => Err(format!("`{text}` is none of auto, portable, hopper, hopper:cluster=on|off,lead=0..3,chunk=MIB")),
        }
    }
}

fn parse_tuning(text: &str) -> Result<HopperTuning, String> {
    let mut tuning = HopperTuning::default();
    for setting in text.split(',') {
        match setting.split_once('=') {
            Some(("cluster", "on")) => tuning.cluster = Some(true),
            Some(("cluster", "off")) => tuning.cluster = Some(false),
            Some(("lead", steps)) => {
                let steps = steps.parse().ok().filter(|steps| *steps <= HopperTuning::MAX_LEAD);
                tuning.lead =
                    steps.ok_or_else(|| format!("`{setting}`: a lead is 0 to {} steps", HopperTuning::MAX_LEAD))?;
            }
            Some(("chunk", mib)) => {
                tuning.chunk_mib = mib.parse().map_err(|_| format!("`{setting}`: a chunk is a number of MiB"))?;
            }
            _ => return Err(format!("`{setting}` is none of cluster=on|off, lead=0..3, chunk=MIB")),
        }
    }
    Ok(tuning)
}

impl fmt::Display for KernelFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelFamily::Auto => f.write_str("auto"),
            KernelFamily::Portable => f.write_str("portable"),
            KernelFamily::Hopper => f.write_str("hopper"),
            KernelFamily::HopperTuned(HopperTuning { cluster, lead, chunk_mib }) => {
                let cluster = cluster.map_or("", |on| if on { "cluster=on," } else { "cluster=off," });
                write!(f, "hopper:{cluster}lead={lead},chunk={chunk_mib}")
            }
        }
    }
}
