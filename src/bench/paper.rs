//! The speed column of the paper's table of granularities, beside ours.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use super::format::{Cells, Lines, or_dash, short};
use super::{Phase, Plan, Progress, Row, Setting, Subject, Way, measure, shape};
use crate::error::{Error, Kind, Result};
use crate::model::{Gates, Routing};
use crate::router::{Granularity, Keys, LayerSpec, RouterSettings, Target};

/// Speedups of Llama-3-8B with 16 skippable layers at an overall capacity of 50%. The table names what is skipped, not whether
/// tokens or sequences are, nor the lengths and the device.
const PUBLISHED: [(Target, f64); 3] = [(Target::Attn, 1.21), (Target::Mlp, 1.06), (Target::Block, 1.27)];
const SOURCE: &str = "He et al., arXiv 2410.13184v1, Table 1: Llama-3-8B, by what is skipped";
const SHAPE: &str = "llama-3-8b";
const ROUTED: usize = 16;
const CAPACITY: f32 = 0.5;
/// Divisors of the widths, and of the numbers of heads; layers and heads stay as large as they are.
const SCALES: [usize; 4] = [1, 2, 4, 8];

/// The table on some machines.
#[derive(Debug, Clone)]
pub struct PaperPlan {
    pub settings: Vec<Setting>,
    /// Divisor of the widths; None: the least that fits into the memory of all machines.
    pub scale: Option<usize>,
    /// Sequences at a time.
    pub batch: usize,
    /// Tokens of each: in the cache before, read in one prefill, decoded.
    pub depth: usize,
    pub prompt: usize,
    pub generated: usize,
    /// Rounds that are not counted, and that are.
    pub warmup: usize,
    pub reps: usize,
    pub seed: u64,
}

/// A granularity, measured, and the figure of the paper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PaperRow {
    #[serde(flatten)]
    pub row: Row,
    /// Divisor of the widths of Llama-3-8B.
    pub scale: usize,
    /// Speedup over dense; None for the dense model.
    pub published: Option<f64>,
    pub source: String,
}

/// Measures all six granularities; a row for each, behind that of the dense model.
///
/// Errors: Memory when no scale fits; those of [`measure`].
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bench::{PaperPlan, PaperRow, Setting, measure_paper};
/// use mindskip::engine::Device;
///
/// let plan = PaperPlan {
///     settings: vec![Setting { device: Device::Cpu, ..Setting::default() }],
///     scale: Some(8),
///     batch: 1,
///     depth: 0,
///     prompt: 2,
///     generated: 0,
///     warmup: 0,
///     reps: 1,
///     seed: 0,
/// };
/// let mut rows: Vec<PaperRow> = Vec::new();
/// measure_paper(&plan, &mut |_| ControlFlow::Continue(()), &mut |more| rows.extend(more))?;
/// assert_eq!((rows.len(), rows[1].row.routing.as_str(), rows[1].published), (7, "attn_token", Some(1.21)));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn measure_paper(
    plan: &PaperPlan,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    each: &mut dyn FnMut(Vec<PaperRow>),
) -> Result<()> {
    let (scale, sweep) = plan.sweep()?;
    let of = |row: Row| {
        let target = row.routing.parse::<Granularity>().map(|granularity| granularity.target);
        let published = PUBLISHED.iter().find(|(published, _)| target.as_ref() == Ok(published));
        PaperRow { row, scale, published: published.map(|(_, speedup)| *speedup), source: SOURCE.into() }
    };
    measure(&sweep, progress, &mut |rows| each(rows.into_iter().map(of).collect()))
}

impl PaperPlan {
    /// The largest sweep that fits, and its scale.
    fn sweep(&self) -> Result<(usize, Plan)> {
        let tried = SCALES.iter().copied().filter(|&scale| self.scale.is_none_or(|wanted| wanted == scale));
        let mut refused = None;
        for scale in tried {
            let plan = self.at(scale)?;
            plan.check()?;
            match plan.fits() {
                Err(e) if e.kind() == Kind::Memory => refused = Some(e),
                fits => return fits.map(|()| (scale, plan)),
            }
        }
        Err(refused.unwrap_or_else(|| {
            let cause = format!("--scale is {}", self.scale.unwrap_or(0));
            Error::new(Kind::Argument, cause).action("give 1, 2, 4 or 8")
        }))
    }

    fn at(&self, scale: usize) -> Result<Plan> {
        let mut config = shape(SHAPE)?;
        for size in
            [&mut config.hidden, &mut config.intermediate, &mut config.heads, &mut config.kv_heads, &mut config.vocab]
        {
            *size /= scale;
        }
        let layers = LayerSpec::Last(ROUTED).resolve(config.layers)?;
        let mut ways = vec![Way::DENSE];
        for name in Granularity::NAMES {
            // As in the paper's code: every token writes K/V.
            let settings = RouterSettings { granularity: name.parse()?, keys: Keys::All, ..RouterSettings::default() };
            let gates = Gates::Random { capacity: CAPACITY, seed: self.seed };
            ways.push(Way { routing: Some(Routing { settings, layers: layers.clone(), gates }) });
        }
        let name = if scale == 1 { SHAPE.into() } else { format!("{SHAPE}, all widths by {scale}") };
        Ok(Plan {
            subject: Subject::shape(&name, config),
            settings: self.settings.clone(),
            batches: vec![self.batch],
            depths: vec![self.depth],
            prompts: vec![self.prompt],
            generated: vec![self.generated],
            ways,
            warmup: self.warmup,
            reps: self.reps,
            seed: self.seed,
        })
    }
}

impl Lines for PaperRow {
    const TOGETHER: &[&str] = &["device", "weights", "K/V", "kernels"];

    fn lines(&self) -> Vec<Cells> {
        let Row { head, batch, depth, prompt, generated, routing, reps, active, prefill, decode, .. } = &self.row;
        let of = |phase: &Option<Phase>, number: fn(&Phase) -> String| or_dash(&phase.as_ref().map(number));
        let rate: fn(&Phase) -> String = |phase| short(phase.tokens_per_s);
        let ours: fn(&Phase) -> String = |phase| format!("{:.2}", phase.speedup);
        let ideal: fn(&Phase) -> String = |phase| format!("{:.2}", phase.ideal_speedup);
        let mut cells = head.cells();
        cells.extend([
            ("published", self.source.clone()),
            ("routed", format!("the {ROUTED} layers before the last, capacity {CAPACITY}, random masks, keys all")),
            ("repetitions", reps.to_string()),
            ("batch", batch.to_string()),
            ("depth", depth.to_string()),
            ("prefill", format!("{prompt} tokens")),
            ("decode", format!("{generated} tokens")),
            ("granularity", routing.clone()),
            ("active", format!("{:.1}%", 100.0 * active)),
            (
                "paper",
                self.published
                    .map_or(if routing == "dense" { "1.00".into() } else { String::new() }, |x| format!("{x:.2}")),
            ),
            ("prefill speedup", of(prefill, ours)),
            ("prefill ideal", of(prefill, ideal)),
            ("prefill tok/s", of(prefill, rate)),
            ("decode speedup", of(decode, ours)),
            ("decode ideal", of(decode, ideal)),
            ("decode tok/s", of(decode, rate)),
        ]);
        vec![cells]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;
    use crate::weights::Weights;

    /// Every scale is a model of the same proportions: widths and parameters of a layer shrink alike.
    #[test]
    fn scales_keep_proportions() {
        let plan = PaperPlan {
            settings: Vec::new(),
            scale: None,
            batch: 1,
            depth: 0,
            prompt: 8,
            generated: 1,
            warmup: 0,
            reps: 1,
            seed: 0,
        };
        let full = plan.at(1).unwrap();
        for scale in SCALES {
            let own = plan.at(scale).unwrap();
            let (c, f) = (&own.subject.config, &full.subject.config);
            assert_eq!((c.layers, c.head_dim, c.q_rows()), (f.layers, f.head_dim, c.hidden));
            for (own, of_full) in [(c.hidden, f.hidden), (c.intermediate, f.intermediate), (c.kv_rows(), f.kv_rows())] {
                assert_eq!(own * scale, of_full, "{scale}");
            }
            let parameters = |c: &crate::config::Config| Weights::random("", c, DType::BF16, 0).parameters() as f64;
            let ratio = parameters(f) / parameters(c) / (scale * scale) as f64;
            assert!((0.99..1.01).contains(&ratio), "{scale}: {ratio}");
            assert_eq!(own.ways.len(), 7);
            let layers = &own.ways[1].routing.as_ref().unwrap().layers;
            assert_eq!(*layers, (15..31).collect::<Vec<_>>());
        }
    }
}
