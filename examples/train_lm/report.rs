//! What a run leaves behind: the table, the curve, a row of the record, activations.

use crate::data::Batch;
use crate::head::{Head, HeadCost};
use crate::train::{Schedule, Trainer};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use plotters::prelude::*;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// One line of the table.
pub struct Summary {
    pub head: Head,
    /// Steps, training loss and held-out loss; `None` where only times were taken.
    pub trained: Option<(usize, f64, f64)>,
    pub step_ms: f64,
    pub cost: HeadCost,
}

/// Prints the comparison as a Markdown table.
pub fn print_table(summaries: &[Summary]) {
    println!("\n| head | steps | train loss | held-out loss | ms/step | head ms | head peak MB |");
    println!("|---|---|---|---|---|---|---|");
    for s in summaries {
        let [steps, train, held_out] = match s.trained {
            Some((steps, train, held_out)) => [steps.to_string(), format!("{train:.4}"), format!("{held_out:.4}")],
            None => ["-", "-", "-"].map(String::from),
        };
        let (cost, step_ms) = (s.cost, s.step_ms);
        println!(
            "| {} | {steps} | {train} | {held_out} | {step_ms:.0} | {:.0} | {:.1} |",
            s.head, cost.ms, cost.peak_mb
        );
    }
    if let [ours, theirs] = summaries {
        println!(
            "\nhead: {:.2} times the speed of materialised logits, {:.1} times less memory",
            theirs.cost.ms / ours.cost.ms,
            theirs.cost.peak_mb / ours.cost.peak_mb
        );
    }
}

/// One run in the record.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub date: String,
    pub filter: String,
    /// 0 where the filter has none.
    pub eps: f64,
    pub seed: u64,
    pub steps: usize,
    pub batch_tokens: usize,
    pub train_loss: f64,
    pub held_out_loss: f64,
    pub step_ms: f64,
    pub head_ms: f64,
    pub head_peak_mb: f64,
    /// Training losses, each the mean of [`CURVE_STEPS`] steps.
    pub curve: Vec<f64>,
}

/// Steps that one point of a recorded curve covers.
pub const CURVE_STEPS: usize = 10;
const HEADER: &str =
    "date,filter,eps,seed,steps,batch_tokens,train_loss,held_out_loss,step_ms,head_ms,head_peak_mb,curve";

impl Row {
    /// The row of a finished run.
    pub fn new(trainer: &Trainer, schedule: &Schedule, held_out_loss: f64, cost: HeadCost) -> Self {
        let mean = |losses: &[f32]| losses.iter().map(|&l| f64::from(l)).sum::<f64>() / losses.len() as f64;
        Row {
            date: today(),
            filter: trainer.head.filter_name().into(),
            eps: trainer.head.eps().map_or(0.0, f64::from),
            seed: schedule.seed,
            steps: trainer.losses.len(),
            batch_tokens: schedule.batch * schedule.seq_len,
            train_loss: trainer.train_loss(),
            held_out_loss,
            step_ms: trainer.median_step_ms(),
            head_ms: cost.ms,
            head_peak_mb: cost.peak_mb,
            curve: trainer.losses.chunks(CURVE_STEPS).map(mean).collect(),
        }
    }

    /// Appends to a CSV file, with a header where the file is new.
    pub fn append(&self, path: &Path) -> Result<()> {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
        if file.metadata()?.len() == 0 {
            writeln!(file, "{HEADER}")?;
        }
        let curve: Vec<String> = self.curve.iter().map(|loss| format!("{loss:.5}")).collect();
        writeln!(
            file,
            "{},{},{},{},{},{},{:.6},{:.6},{:.1},{:.1},{:.2},{}",
            self.date,
            self.filter,
            self.eps,
            self.seed,
            self.steps,
            self.batch_tokens,
            self.train_loss,
            self.held_out_loss,
            self.step_ms,
            self.head_ms,
            self.head_peak_mb,
            curve.join(";")
        )?;
        Ok(())
    }

    /// All rows of a CSV file that [`Row::append`] wrote.
    pub fn read_all(path: &Path) -> Result<Vec<Self>> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let mut lines = text.lines();
        if lines.next() != Some(HEADER) {
            bail!("{} does not begin with the header {HEADER}", path.display());
        }
        let row = |line| Row::parse(line).with_context(|| format!("{}: row {line:?}", path.display()));
        lines.map(row).collect()
    }

    fn parse(line: &str) -> Result<Self> {
        let fields: Vec<&str> = line.split(',').collect();
        let [date, filter, eps, seed, steps, batch_tokens, train_loss, held_out_loss, step_ms, head_ms, peak, curve] =
            fields[..]
        else {
            bail!("{} fields", fields.len());
        };
        Ok(Row {
            date: date.into(),
            filter: filter.into(),
            eps: eps.parse()?,
            seed: seed.parse()?,
            steps: steps.parse()?,
            batch_tokens: batch_tokens.parse()?,
            train_loss: train_loss.parse()?,
            held_out_loss: held_out_loss.parse()?,
            step_ms: step_ms.parse()?,
            head_ms: head_ms.parse()?,
            head_peak_mb: peak.parse()?,
            curve: curve.split(';').map(str::parse).collect::<Result<_, _>>()?,
        })
    }

    /// `unbiased 2^-10`: what rows of the same configuration share.
    pub fn label(&self) -> String {
        if self.eps == 0.0 { self.filter.clone() } else { format!("{} 2^{}", self.filter, self.eps.log2()) }
    }
}

/// Year-month-day in UTC, from the days since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn today() -> String {
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() / 86_400) + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * from_march + 2) / 5 + 1, (from_march + 2) % 12 + 1);
    format!("{}-{month:02}-{day:02}", era * 400 + year_of_era + u64::from(month <= 2))
}

/// A line of a chart.
pub struct Curve {
    pub label: String,
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// The training losses of each step, and their mean over the last `window` steps.
    pub fn smoothed(trainer: &Trainer, window: usize) -> Self {
        let losses = &trainer.losses;
        let mean = |i: usize| {
            let recent = &losses[(i + 1).saturating_sub(window)..=i];
            recent.iter().map(|&l| f64::from(l)).sum::<f64>() / recent.len() as f64
        };
        let points = (0..losses.len()).map(|i| (i as f64, mean(i))).collect();
        Curve { label: trainer.head.to_string(), points }
    }
}

/// Draws curves of loss over steps into one area.
pub fn draw_curves<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    title: &str,
    curves: &[Curve],
) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let points = || curves.iter().flat_map(|c| &c.points);
    let end = points().map(|p| p.0).fold(1.0, f64::max);
    let (low, high) = range(points().map(|p| p.1));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..end, low..high)?;
    chart.configure_mesh().x_desc("step").y_desc("loss, nats per token").light_line_style(WHITE).draw()?;
    for (i, curve) in curves.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    Ok(())
}

/// Lowest and highest value with a margin.
pub fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let margin = 0.05 * (high - low).max(1e-3);
    (low - margin, high + margin)
}

/// The loss curves of a run as an SVG.
pub fn plot(path: &Path, curves: &[Curve]) -> Result<()> {
    let area = SVGBackend::new(path, (860, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    draw_curves(&area, "training loss, mean of 10 steps", curves)?;
    area.present().with_context(|| format!("writing {}", path.display()))
}

/// Writes `embeddings` [N, D], `classifier` [V, D] and `targets` [N] of held-out text: input for the `cce` binary.
pub fn save_activations(path: &Path, trainer: &Trainer, ids: &[u32], seq_len: usize, tokens: usize) -> Result<()> {
    let (mut embeddings, mut targets) = (Vec::new(), Vec::new());
    let windows = tokens.div_ceil(seq_len);
    for batch in Batch::spread(ids, 1, seq_len, windows * seq_len)? {
        embeddings.push(trainer.model.hidden_states(&batch.inputs)?.squeeze(0)?.detach());
        targets.push(batch.targets.squeeze(0)?);
    }
    let rows = tokens.min(embeddings.len() * seq_len);
    let tensors = HashMap::from([
        ("embeddings", Tensor::cat(&embeddings, 0)?.narrow(0, 0, rows)?.contiguous()?),
        ("classifier", trainer.model.classifier.detach()),
        ("targets", Tensor::cat(&targets, 0)?.narrow(0, 0, rows)?.to_dtype(DType::I64)?),
    ]);
    candle_core::safetensors::save(&tensors, path).with_context(|| format!("writing {}", path.display()))?;
    println!("activations of {rows} held-out tokens: {}", path.display());
    Ok(())
}
