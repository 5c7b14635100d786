//! `--sweep`: every filter from the same initial models on the same batches.

use crate::data::{Batch, Tokens};
use crate::head::{self, Filter, Head};
use crate::model::ModelConfig;
use crate::report::{CURVE_STEPS, Curve, Row, draw_curves, range};
use crate::train::{Schedule, Trainer, evaluation_head, train};
use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use std::path::Path;

/// Filter and log2 ε of each configuration.
const CONFIGURATIONS: [(Filter, i32); 5] = [
    (Filter::Exact, 0),
    (Filter::Unbiased, -8),
    (Filter::Unbiased, -10),
    (Filter::Unbiased, -12),
    (Filter::Threshold, -10),
];

/// Trains every configuration from `seeds` seeds; each run is a row of `record` as soon as it ends.
pub fn run(
    config: ModelConfig,
    schedule: &Schedule,
    tokens: &Tokens,
    held_out: &[Batch],
    seeds: u64,
    record: &Path,
) -> Result<()> {
    for seed in schedule.seed..schedule.seed + seeds {
        for (filter, log2_eps) in CONFIGURATIONS {
            let schedule = Schedule { seed, ..*schedule };
            let head = Head::Fused { filter, eps: f32::exp2(log2_eps as f32), seed };
            println!("{head}, seed {seed}");
            let mut trainer = [Trainer::new(config, head, seed)?];
            train(&mut trainer, &tokens.train, &schedule)?;
            let [trainer] = trainer;
            let loss = trainer.held_out_loss(&evaluation_head(), held_out)?;
            let cost = head::measure(&head, &trainer.model, &held_out[..held_out.len().min(5)])?;
            println!("{head}, seed {seed}: held-out loss {loss:.4}, {:.0} ms/step", trainer.median_step_ms());
            Row::new(&trainer, &schedule, loss, cost).append(record)?;
        }
    }
    println!("record: {}", record.display());
    Ok(())
}

/// Draws all rows of a record as one SVG: mean training curves of each configuration, and the held-out loss of each run.
pub fn draw(record: &Path, path: &Path) -> Result<()> {
    let rows = Row::read_all(record)?;
    ensure!(!rows.is_empty(), "{} has no rows", record.display());
    let mut groups: Vec<(String, Vec<&Row>)> = Vec::new();
    for row in &rows {
        match groups.iter_mut().find(|(label, _)| *label == row.label()) {
            Some((_, group)) => group.push(row),
            None => groups.push((row.label(), vec![row])),
        }
    }
    let curve = |(label, group): &(String, Vec<&Row>)| {
        let len = group.iter().map(|row| row.curve.len()).min().unwrap_or(0);
        let mean = |i: usize| group.iter().map(|row| row.curve[i]).sum::<f64>() / group.len() as f64;
        let points = (0..len).map(|i| ((i as f64 + 0.5) * CURVE_STEPS as f64, mean(i))).collect();
        Curve { label: label.clone(), points }
    };
    let curves: Vec<Curve> = groups.iter().map(curve).collect();

    let area = SVGBackend::new(path, (1200, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(620);
    draw_curves(&left, "training loss, mean over seeds", &curves)?;
    draw_held_out(&right, &groups)?;
    area.present().with_context(|| format!("writing {}", path.display()))?;
    println!("sweep: {}", path.display());
    Ok(())
}

/// One column a configuration, one dot a seed.
fn draw_held_out<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    groups: &[(String, Vec<&Row>)],
) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let (low, high) = range(groups.iter().flat_map(|(_, rows)| rows).map(|row| row.held_out_loss));
    let mut chart = ChartBuilder::on(area)
        .caption("held-out loss of each seed", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(-0.5..groups.len() as f64 - 0.5, low..high)?;
    let label = |x: &f64| {
        let nearest = x.round();
        let on_column = (x - nearest).abs() < 1e-6 && nearest >= 0.0;
        if on_column { groups.get(nearest as usize).map_or(String::new(), |g| g.0.clone()) } else { String::new() }
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(2 * groups.len() + 1)
        .x_label_formatter(&label)
        .draw()?;
    for (i, (_, rows)) in groups.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        let dot = |row: &&Row| Circle::new((i as f64, row.held_out_loss), 5, colour.filled());
        chart.draw_series(rows.iter().map(dot))?;
    }
    Ok(())
}
