//! Which kernels compute, by name: `auto`, `portable`, `hopper`, `hopper:cluster=off,lead=3`, `auto:tiles=off`.

use std::fmt;
use std::str::FromStr;

/// Which kernels compute the forward and the exact path; the others are the same everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelFamily {
    /// Hopper's where the device is one and the inputs fit them, else the portable ones.
    #[default]
    Auto,
    /// `cp.async` and `mma.sync`: every GPU from Ampere on, every input.
    Portable,
    /// TMA and `wgmma`: compute capability 9.0; f16 or bf16, rows that start at multiples of 16 bytes, D > 0.
    Hopper,
}

/// A family and how its kernels run. Parses from, and prints as, what `cce --kernels` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelChoice {
    /// Which kernels.
    pub family: KernelFamily,
    /// How they run.
    pub tuning: Tuning,
}

/// How kernels run where the planner is not to decide: for measurements. No choice changes what they compute beyond the order of
/// sums, for `tiles` one rounding of logit gradients to the inputs' type and, where candidates outgrow their room, the ε that they are
/// kept with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Hopper: `cluster=on` or `off`, pairs of blocks that share each tile of the classifier, on the exact path one operand of each product.
    /// `None`: by the planner's model of time, on the exact path only where every row takes it.
    pub cluster: Option<bool>,
    /// Hopper: `lead=0` to `3`, steps of the main loop by which the second consumer starts behind the first.
    pub lead: u32,
    /// `chunk=64`, most MiB of logit gradients that the exact path keeps at a time, at least a tile of classes: by the portable kernels 32
    /// at most and, where only some rows take it, 8.
    pub chunk_mib: u32,
    /// Hopper: `sweep=80`, percent of the last cache that the rows of E of a sweep over the classifier may take; the classifier streams
    /// through the rest. The cache is two halves, and a row that multiprocessors of both read may be in either: 40 would be safe.
    pub sweep: u32,
    /// Hopper: `gather=on`, rows of E gathered by 16 bytes also where the copy engine could fetch them, as it is where tokens between are ignored.
    pub gather: bool,
    /// `tiles=auto`, `off` or `all`: what the sparse gradients multiply, in 16-bit types, in place of gathering it.
    pub tiles: Tiles,
}

/// Which of the sparse gradients' blocks of 128 rows, and of 128 classes, are products of tensor cores in place of gathers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tiles {
    /// None.
    Off,
    /// Those that have enough entries to share. The device decides, block by block.
    #[default]
    WhereFaster,
    /// All that have any: for tests.
    Everywhere,
}

impl Tuning {
    /// Most steps of a lead: the stages of the ring less the one that both need.
    pub const MAX_LEAD: u32 = 3;
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning { cluster: None, lead: 2, chunk_mib: 64, sweep: 80, gather: false, tiles: Tiles::WhereFaster }
    }
}

impl From<KernelFamily> for KernelChoice {
    fn from(family: KernelFamily) -> Self {
        KernelChoice { family, ..KernelChoice::default() }
    }
}

impl FromStr for KernelChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (family, settings) =
            text.split_once(':').map_or((text, None), |(family, settings)| (family, Some(settings)));
        let family = match family {
            "auto" => KernelFamily::Auto,
            "portable" => KernelFamily::Portable,
            "hopper" => KernelFamily::Hopper,
            _ => {
                let settings = "tiles=auto|off|all, chunk=MIB and, for hopper, cluster=on|off, lead=0..3, sweep=PERCENT, gather=on|off";
                return Err(format!("`{text}` is none of auto, portable, hopper, with or without :{settings}"));
            }
        };
        let mut tuning = Tuning::default();
        for setting in settings.into_iter().flat_map(|settings| settings.split(',')) {
            set(&mut tuning, family, setting)?;
        }
        Ok(KernelChoice { family, tuning })
    }
}

fn set(tuning: &mut Tuning, family: KernelFamily, setting: &str) -> Result<(), String> {
    let number = |value: &str, what: &str| value.parse().map_err(|_| format!("`{setting}`: {what}"));
    let hopper = family == KernelFamily::Hopper;
    match setting.split_once('=') {
        Some(("tiles", "auto")) => tuning.tiles = Tiles::WhereFaster,
        Some(("tiles", "off")) => tuning.tiles = Tiles::Off,
        Some(("tiles", "all")) => tuning.tiles = Tiles::Everywhere,
        Some(("cluster", "on")) if hopper => tuning.cluster = Some(true),
        Some(("cluster", "off")) if hopper => tuning.cluster = Some(false),
        Some(("lead", steps)) if hopper => {
            let lead = format!("a lead is 0 to {} steps", Tuning::MAX_LEAD);
            tuning.lead = number(steps, &lead)?;
            if tuning.lead > Tuning::MAX_LEAD {
                return Err(format!("`{setting}`: {lead}"));
            }
        }
        Some(("chunk", mib)) => tuning.chunk_mib = number(mib, "a chunk is a number of MiB")?,
        Some(("sweep", percent)) if hopper => {
            tuning.sweep = number(percent, "a sweep is a percentage")?;
            if !(1..=100).contains(&tuning.sweep) {
                return Err(format!("`{setting}`: a sweep is 1 to 100 percent"));
            }
        }
        Some(("gather", "on")) if hopper => tuning.gather = true,
        Some(("gather", "off")) if hopper => tuning.gather = false,
        _ if hopper => {
            let settings = "cluster=on|off, lead=0..3, chunk=MIB, sweep=PERCENT, gather=on|off, tiles=auto|off|all";
            return Err(format!("`{setting}` is none of {settings}"));
        }
        _ => {
            return Err(format!(
                "`{setting}` is neither tiles=auto|off|all nor chunk=MIB; other settings are for hopper"
            ));
        }
    }
    Ok(())
}

impl fmt::Display for KernelFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KernelFamily::Auto => "auto",
            KernelFamily::Portable => "portable",
            KernelFamily::Hopper => "hopper",
        })
    }
}

impl fmt::Display for KernelChoice {
    /// What is not as by default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Tuning { cluster, lead, chunk_mib, sweep, gather, tiles }, default) = (self.tuning, Tuning::default());
        write!(f, "{}", self.family)?;
        let settings = [
            cluster.map(|on| format!("cluster={}", if on { "on" } else { "off" })),
            (lead != default.lead).then(|| format!("lead={lead}")),
            (chunk_mib != default.chunk_mib).then(|| format!("chunk={chunk_mib}")),
            (sweep != default.sweep).then(|| format!("sweep={sweep}")),
            gather.then(|| "gather=on".to_string()),
            (tiles != default.tiles).then(|| if tiles == Tiles::Off { "tiles=off".into() } else { "tiles=all".into() }),
        ];
        for (index, setting) in settings.into_iter().flatten().enumerate() {
            write!(f, "{}{setting}", if index == 0 { ':' } else { ',' })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_printed() {
        let clusters =
            KernelChoice { family: KernelFamily::Hopper, tuning: Tuning { cluster: Some(true), ..Tuning::default() } };
        let tuning = |cluster, lead, chunk_mib| KernelChoice {
            family: KernelFamily::Hopper,
            tuning: Tuning { cluster, lead, chunk_mib, sweep: chunk_mib + 1, gather: lead == 3, ..Tuning::default() },
        };
        let [some, others] = [tuning(Some(false), 3, 64), tuning(None, 0, 7)];
        let mut all = vec![some, others];
        for family in [KernelFamily::Auto, KernelFamily::Portable, KernelFamily::Hopper] {
            for tiles in [Tiles::Off, Tiles::WhereFaster, Tiles::Everywhere] {
                all.push(KernelChoice { family, tuning: Tuning { tiles, ..Tuning::default() } });
            }
        }
        for kernels in all {
            assert_eq!(kernels.to_string().parse(), Ok(kernels));
        }
        assert_eq!("hopper:cluster=on".parse(), Ok(clusters));
        for wrong in [
            "",
            "hoper",
            "hopper:",
            "hopper:lead=4",
            "hopper:lead=-1",
            "hopper:cluster",
            "hopper:chunk=x",
            "hopper:sweep=0",
            "hopper:sweep=101",
            "hopper:gather",
            "auto:gather=on",
            "portable:lead=1",
            "auto:cluster=on",
            "auto:tiles",
            "auto:tiles=some",
        ] {
            assert!(wrong.parse::<KernelChoice>().is_err(), "{wrong}");
        }
    }
}
