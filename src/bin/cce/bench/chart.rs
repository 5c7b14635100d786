//! The benchmark's figure: times as multiples of T, and memory, for every shape.

use super::report::{ShapeReport, mib};
use anyhow::Context;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(225, 225, 225);
/// One for each method, in order.
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
];
/// Width of a group of bars; a bar has 1.
const GAP: f64 = 1.0;

/// Writes the figure as SVG; no file where nothing was timed.
pub fn write(path: &Path, reports: &[ShapeReport]) -> anyhow::Result<()> {
    if reports.is_empty() {
        return Ok(());
    }
    let bars: usize = reports.iter().map(|r| r.methods.len() + 1).sum();
    let width = (180 + 46 * bars as u32).max(720);
    let svg = {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (width, 760)).into_drawing_area();
            draw(&root, reports).map_err(|e| anyhow::anyhow!("cannot draw the chart: {e}"))?;
        }
        svg
    };
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn draw(root: &Area<'_>, reports: &[ShapeReport]) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(430);
    let times = |r: &ShapeReport| r.methods.iter().map(|m| (m.forward.median_ratio, m.both.median_ratio)).collect();
    panel(&upper, reports, "loss and both gradients, multiples of one plain matmul (dark: forward)", &times)?;
    let bytes = |r: &ShapeReport| r.methods.iter().map(|m| (0.0, mib(m.peak_bytes))).collect();
    log_panel(&lower, reports, "memory beyond inputs and outputs, MiB", &bytes)?;
    root.present()?;
    Ok(())
}

type Values<'a> = dyn Fn(&ShapeReport) -> Vec<(f64, f64)> + 'a;

/// x of the first bar of each group, and the end of the axis.
fn group_starts(reports: &[ShapeReport]) -> (Vec<f64>, f64) {
    let mut x = GAP / 2.0;
    let mut starts = Vec::new();
    for report in reports {
        starts.push(x);
        x += report.methods.len() as f64 + GAP;
    }
    (starts, x - GAP / 2.0)
}

fn panel(
    area: &Area<'_>,
    reports: &[ShapeReport],
    title: &str,
    values: &Values<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    let (starts, end) = group_starts(reports);
    let top = reports.iter().flat_map(values).map(|v| v.1).fold(1.0, f64::max) * 1.25;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(56)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart.configure_mesh().disable_x_mesh().disable_x_axis().light_line_style(WHITE).bold_line_style(GRID).draw()?;
    for (report, start) in reports.iter().zip(starts) {
        for (k, (lower, upper)) in values(report).into_iter().enumerate() {
            let (left, right) = (start + k as f64 + 0.06, start + k as f64 + 0.94);
            let color = COLORS[k % COLORS.len()];
            chart.draw_series([
                Rectangle::new([(left, 0.0), (right, lower)], color.filled()),
                Rectangle::new([(left, lower), (right, upper)], color.mix(0.55).filled()),
            ])?;
            let label = Text::new(format!("{upper:.2}"), (start + k as f64 + 0.5, upper + top * 0.015), above());
            chart.draw_series([label])?;
        }
        name_group(&chart, area, report, start)?;
    }
    chart.draw_series([PathElement::new([(0.0, 1.0), (end, 1.0)], INK.stroke_width(1))])?;
    legend(area, reports)
}

fn log_panel(
    area: &Area<'_>,
    reports: &[ShapeReport],
    title: &str,
    values: &Values<'_>,
) -> Result<(), Box<dyn std::error::Error>> {
    let (starts, end) = group_starts(reports);
    let all: Vec<f64> = reports.iter().flat_map(values).map(|v| v.1.max(1e-3)).collect();
    let low = all.iter().copied().fold(f64::INFINITY, f64::min) / 3.0;
    let high = all.iter().copied().fold(1.0, f64::max) * 5.0;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(56)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..end, (low..high).log_scale())?;
    chart.configure_mesh().disable_x_mesh().disable_x_axis().light_line_style(WHITE).bold_line_style(GRID).draw()?;
    for (report, start) in reports.iter().zip(starts) {
        for (k, (_, upper)) in values(report).into_iter().enumerate() {
            let (left, right) = (start + k as f64 + 0.06, start + k as f64 + 0.94);
            let upper = upper.max(low);
            chart.draw_series([Rectangle::new([(left, low), (right, upper)], COLORS[k % COLORS.len()].filled())])?;
            chart.draw_series([Text::new(format!("{upper:.0}"), (start + k as f64 + 0.5, upper * 1.1), above())])?;
        }
        name_group(&chart, area, report, start)?;
    }
    Ok(())
}

fn above() -> TextStyle<'static> {
    TextStyle::from(("sans-serif", 12).into_font()).color(&INK).pos(Pos::new(HPos::Center, VPos::Bottom))
}

/// Writes name, dtype and sizes under a group of bars.
fn name_group<C: plotters::coord::ranged1d::Ranged<ValueType = f64>>(
    chart: &ChartContext<'_, SVGBackend<'_>, Cartesian2d<plotters::coord::types::RangedCoordf64, C>>,
    area: &Area<'_>,
    report: &ShapeReport,
    start: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let plot = chart.plotting_area();
    let range = plot.get_pixel_range();
    let share = (start + report.methods.len() as f64 / 2.0) / plot.get_x_range().end;
    let x = range.0.start + (share * f64::from(range.0.end - range.0.start)) as i32 - area.get_pixel_range().0.start;
    let y = range.1.end - area.get_pixel_range().1.start;
    let style = TextStyle::from(("sans-serif", 12).into_font()).color(&INK).pos(Pos::new(HPos::Center, VPos::Top));
    area.draw_text(&report.title(), &style, (x, y + 8))?;
    area.draw_text(&report.shape.to_string(), &style, (x, y + 26))?;
    Ok(())
}

/// Names of the methods, in their colours, under the caption.
fn legend(area: &Area<'_>, reports: &[ShapeReport]) -> Result<(), Box<dyn std::error::Error>> {
    let Some(first) = reports.first() else { return Ok(()) };
    let mut x = 76;
    for (k, method) in first.methods.iter().enumerate() {
        area.draw(&Rectangle::new([(x, 44), (x + 12, 56)], COLORS[k % COLORS.len()].filled()))?;
        let style = TextStyle::from(("sans-serif", 13).into_font()).color(&INK);
        area.draw_text(&method.name, &style, (x + 17, 44))?;
        x += 40 + 8 * method.name.len() as i32;
    }
    Ok(())
}
