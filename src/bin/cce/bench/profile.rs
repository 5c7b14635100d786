//! Where a step's time goes: its launches one by one, added up by kernel.

use super::methods::{Launch, Method, Runner};
use super::report::ShapeReport;
use super::timing::median;
use anyhow::{Context, ensure};
use cut_cross_entropy::Shape;
use std::io::Write;
use std::path::Path;

/// A method's kernels, in the order of their first launches.
pub struct Profile {
    method: String,
    kernels: Vec<KernelTime>,
}

struct KernelTime {
    name: String,
    redo: bool,
    launches: usize,
    /// Sum over its launches of each one's median over rounds.
    milliseconds: f64,
}

/// Runs a method `rounds` times, at least once.
pub fn profile(runner: &mut dyn Runner, method: Method, rounds: usize) -> anyhow::Result<Profile> {
    let rounds = (0..rounds.max(1)).map(|_| runner.launches(method)).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Profile { method: method.name(), kernels: by_kernel(&rounds)? })
}

/// Launches of the same steps in every round, by kernel.
fn by_kernel(rounds: &[Vec<Launch>]) -> anyhow::Result<Vec<KernelTime>> {
    let mut kernels: Vec<KernelTime> = Vec::new();
    for (index, launch) in rounds.first().into_iter().flatten().enumerate() {
        let same = |round: &Vec<Launch>| {
            let found = round.get(index).filter(|l| (&l.name, l.redo) == (&launch.name, launch.redo));
            found.map(|l| l.milliseconds)
        };
        let times = rounds.iter().map(same).collect::<Option<Vec<f64>>>();
        let milliseconds = median(times.context("a step launched other kernels than the one before")?);
        let of_kernel = |k: &&mut KernelTime| k.name == launch.name && k.redo == launch.redo;
        match kernels.iter_mut().find(of_kernel) {
            Some(kernel) => {
                kernel.launches += 1;
                kernel.milliseconds += milliseconds;
            }
            None => {
                let (name, redo) = (launch.name.clone(), launch.redo);
                kernels.push(KernelTime { name, redo, launches: 1, milliseconds });
            }
        }
    }
    ensure!(!kernels.is_empty(), "a step launched nothing");
    Ok(kernels)
}

/// Prints one table a method.
pub fn print(report: &ShapeReport) -> std::io::Result<()> {
    let matmul = median(report.matmul_ms.clone());
    for profile in &report.profiles {
        let sum: f64 = profile.kernels.iter().map(|k| k.milliseconds).sum();
        say!("launches of {}, {sum:.3} ms in all; times are to the end of the launch before", profile.method)?;
        say!("{:<44}{:>9}{:>12}{:>9}", "kernel", "launches", "ms", "/T")?;
        for KernelTime { name, redo, launches, milliseconds } in &profile.kernels {
            let again = if *redo { ", again" } else { "" };
            say!("{:<44}{launches:>9}{milliseconds:>12.4}{:>9.4}", format!("{name}{again}"), milliseconds / matmul)?;
        }
    }
    Ok(())
}

/// One line for each method and kernel; no file where nothing was profiled.
pub fn write_csv(path: &Path, reports: &[ShapeReport], device: &str, revision: &str) -> anyhow::Result<()> {
    if reports.iter().all(|report| report.profiles.is_empty()) {
        return Ok(());
    }
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
        writeln!(file, "shape,tokens,vocab,hidden,dtype,softcap,method,kernel,redo,launches,ms,ratio,device,revision")?;
        for report in reports {
            let (Shape { tokens, hidden, vocab }, dtype) = (report.shape, report.dtype);
            let (matmul, softcap) = (median(report.matmul_ms.clone()), report.softcap.unwrap_or(0.0));
            for Profile { method, kernels } in &report.profiles {
                for KernelTime { name, redo, launches, milliseconds } in kernels {
                    writeln!(
                        file,
                        "{},{tokens},{vocab},{hidden},{dtype},{softcap},{method},{name},{redo},{launches},{milliseconds:.5},\
                         {:.5},{device},{revision}",
                        report.name,
                        milliseconds / matmul,
                    )?;
                }
            }
        }
        file.flush()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(name: &str, redo: bool, milliseconds: f64) -> Launch {
        Launch { name: name.into(), redo, milliseconds }
    }

    #[test]
    fn launches_add_up_by_kernel_with_the_median_of_the_rounds() {
        let round = |scale: f64| {
            vec![launch("a", false, scale), launch("b", false, 5.0), launch("a", false, 2.0), launch("a", true, 0.5)]
        };
        let kernels = by_kernel(&[round(1.0), round(100.0), round(3.0)]).expect("the same launches");
        let got: Vec<_> = kernels.iter().map(|k| (k.name.as_str(), k.redo, k.launches, k.milliseconds)).collect();
        assert_eq!(got, [("a", false, 2, 5.0), ("b", false, 1, 5.0), ("a", true, 1, 0.5)]);
        assert!(by_kernel(&[round(1.0), round(1.0)[..3].to_vec()]).is_err(), "a launch is missing");
        assert!(by_kernel(&[Vec::new()]).is_err());
    }
}
