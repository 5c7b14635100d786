//! Clocks and statistics for machines whose neighbours steal time.

use std::time::Instant;

/// A measured interval.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seconds {
    pub wall: f64,
    /// Processor time of all threads of this process, where the system tells: unmoved by other processes, except
    /// through shared caches and memory.
    pub cpu: Option<f64>,
}

impl std::ops::Add for Seconds {
    type Output = Seconds;
    fn add(self, other: Seconds) -> Seconds {
        let cpu = self.cpu.zip(other.cpu).map(|(a, b)| a + b);
        Seconds { wall: self.wall + other.wall, cpu }
    }
}

/// A running measurement.
pub struct Clock {
    wall: Instant,
    cpu: Option<f64>,
}

impl Clock {
    pub fn start() -> Self {
        let cpu = processor_seconds();
        Clock { wall: Instant::now(), cpu }
    }

    pub fn stop(self) -> Seconds {
        let wall = self.wall.elapsed().as_secs_f64();
        Seconds { wall, cpu: processor_seconds().zip(self.cpu).map(|(now, start)| now - start) }
    }
}

/// Nanosecond counters of the scheduler, summed over threads. None of ours ends during a measurement.
fn processor_seconds() -> Option<f64> {
    let mut nanoseconds = 0_u64;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let schedstat = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        nanoseconds += schedstat.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    Some(nanoseconds as f64 * 1e-9)
}

/// A phase of one method in one round, with the plain matmul timed right before and right after it.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    pub time: Seconds,
    pub matmul: [Seconds; 2],
}

/// A phase of one method over all rounds.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// Median over rounds of the time over its neighbouring matmuls' mean.
    pub median_ratio: f64,
    /// Shortest time over shortest matmul.
    pub min_ratio: f64,
    /// Median ratio of processor times, where the system tells.
    pub cpu_ratio: Option<f64>,
    pub median_ms: f64,
    pub min_ms: f64,
}

/// Condenses the rounds. `shortest_matmul` is over everything that was measured at this shape.
pub fn summarize(pairs: &[Pair], shortest_matmul: f64) -> Summary {
    let over = |value: &dyn Fn(&Pair) -> f64| pairs.iter().map(value).collect::<Vec<f64>>();
    let wall = over(&|p| p.time.wall);
    let shortest = wall.iter().copied().fold(f64::INFINITY, f64::min);
    let cpu = pairs.iter().map(|p| {
        let [before, after] = p.matmul;
        Some(p.time.cpu? / ((before.cpu? + after.cpu?) / 2.0))
    });
    Summary {
        median_ratio: median(over(&|p| p.time.wall / ((p.matmul[0].wall + p.matmul[1].wall) / 2.0))),
        min_ratio: shortest / shortest_matmul,
        cpu_ratio: cpu.collect::<Option<Vec<f64>>>().map(median),
        median_ms: median(wall) * 1e3,
        min_ms: shortest * 1e3,
    }
}

/// The middle value, the mean of the two middle ones; NaN of nothing.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    (values[last / 2] + values[last.div_ceil(2)]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_even_odd_and_none() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }
}
