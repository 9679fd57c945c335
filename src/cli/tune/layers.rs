//! `--layers auto:N`: the layers that are missed the least.

use std::env;
use std::ops::ControlFlow;
use std::path::PathBuf;

use mindskip::tune::layers::{LayerCosts, Measurement};
use mindskip::{Result, plot};
use serde_json::{Value, json};

use super::super::bad;
use super::super::progress::{Bar, interrupted};
use super::{Base, Tune, beside, list};

/// Rows that pass together; few are slow, and the inputs of all layers are kept.
const AT_ONCE: usize = 512;

/// What the layers cost, and which of them were chosen.
pub struct Measured {
    costs: LayerCosts,
    pub layers: Vec<usize>,
}

impl Tune {
    /// The `n` layers of a model that are missed the least, as was measured before or is now.
    pub(super) fn measure(&self, base: &Base, n: usize) -> Result<Measured> {
        if self.what.calibration == 0 {
            return bad("--calibration is 0", "give 1 or more");
        }
        let mut samples = base.settings.split(base.data.samples.clone())?.0;
        samples.truncate(self.what.calibration);
        let (target, goal) = (self.what.granularity.target, self.how.loss);
        let of = Measurement::new(&base.bundle.weights.fingerprint(), target, goal, &samples);
        let (path, count) = (of.path(&cache()), base.bundle.config.layers);
        let costs = if let Some(costs) = of.kept(&path, count) {
            eprintln!("layers were measured before: {}", path.display());
            costs
        } else {
            let rows = samples.iter().map(|s| s.inputs().len()).max().unwrap_or(1).max(AT_ONCE.min(base.max_length));
            let mut tuner = self.tuner(base, 0..count, rows, true)?;
            let mut bar = Bar::new("measuring layers {wide_bar} {pos}/{len} {eta} left", 0, samples.len());
            let costs = LayerCosts::measure(&mut tuner, &samples, goal, &mut |done| {
                bar.show(done, "", false, || format!("measuring layers: {done} of {} samples", samples.len()));
                if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            drop(bar);
            // The next run has to measure again; this one can go on.
            if let Err(e) = of.keep(&costs, &path) {
                eprintln!("mindskip: {e}");
            }
            costs
        };
        let layers = costs.cheapest(n);
        let measured = Measured { costs, layers };
        measured.tell();
        let title = format!("{target} of {} left out, {} samples", base.bundle.name, samples.len());
        let chart = measured.costs.chart(&title, &measured.layers);
        plot::save(&plot::bars(&chart)?, &beside(&self.output, "layers.svg"))?;
        Ok(measured)
    }
}

impl Measured {
    fn tell(&self) {
        eprintln!("layer    loss when skipped");
        for (layer, loss) in self.costs.skipped.iter().enumerate() {
            let chosen = if self.layers.contains(&layer) { "   routed" } else { "" };
            eprintln!("{layer:>5}   {loss:8.4}   {:+8.4}{chosen}", self.costs.added(layer));
        }
        eprintln!("dense   {:8.4}   layers {}", self.costs.dense, list(&self.layers));
    }

    pub fn json(&self) -> Value {
        let of = |layer: usize| {
            let (loss, chosen) = (self.costs.skipped[layer], self.layers.contains(&layer));
            json!({"layer": layer, "loss": loss, "added": self.costs.added(layer), "routed": chosen})
        };
        json!({"dense": self.costs.dense, "layers": (0..self.costs.skipped.len()).map(of).collect::<Vec<_>>()})
    }
}

/// Where measurements are kept.
fn cache() -> PathBuf {
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    base.unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".cache")).join("mindskip/layers")
}
