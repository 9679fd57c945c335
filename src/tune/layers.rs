//! Which layers to route: those that are missed the least, one at a time, on some text.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::train::pack;
use super::{Goal, Sample, Tuner};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::plot::Bars;
use crate::router::Target;

/// Of an answer token: the loss of the dense model, and those without the sub-layer of one layer, for every row.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Device, Options, training_backend};
/// use mindskip::tune::layers::LayerCosts;
/// use mindskip::tune::plan::StepLimits;
/// use mindskip::tune::{Goal, Sample, Tuner};
///
/// let bundle = Bundle::embedded()?;
/// let ids = bundle.tokenizer()?.encode("Once upon a time, there was a little girl named Lily.", true)?;
/// let sample = Sample { counts: vec![true; ids.len()], ids, record: 1 };
/// let mut routers = bundle.routers.expect("it comes with some");
/// routers.weights = (0..8).map(|layer| (layer, vec![0.0; 128])).collect(); // all layers
/// let limits = StepLimits { rows: 64, samples: 1, chunk: 64, recompute: true, memory: None };
/// let backend = training_backend(&Options { device: Device::Cpu, ..Options::default() })?;
/// let mut tuner = Tuner::new(bundle.config, &bundle.weights, routers, Goal::Tokens, limits, backend)?;
/// let samples = [sample];
/// let costs = LayerCosts::measure(&mut tuner, &samples, Goal::Tokens, &mut |_| ControlFlow::Continue(()))?;
/// let best = costs.cheapest(3);
/// assert!(!best.contains(&0) && costs.added(0) > costs.added(best[0]), "the first layer is needed");
/// assert_eq!(costs.chart("stories", &best).bars.iter().filter(|(_, marked)| *marked).count(), 3);
///
/// let (dense, sums) = tuner.without_each(&[&samples[0]], Goal::Tokens)?; // what it rests on
/// let answers = dense.answers as f64;
/// assert_eq!((costs.dense, costs.skipped[4]), (dense.losses[0] / answers, sums[4] / answers));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerCosts {
    /// In nats, as all of them.
    pub dense: f64,
    /// By layer.
    pub skipped: Vec<f64>,
}

/// What a measurement rests on; where it is kept is named by it.
///
/// ```
/// use mindskip::router::Target;
/// use mindskip::tune::layers::{LayerCosts, Measurement};
/// use mindskip::tune::{Goal, Sample};
///
/// let sample = Sample { ids: vec![1, 2, 3], counts: vec![true; 3], record: 1 };
/// let of = |fingerprint| Measurement::new(fingerprint, Target::Attn, Goal::Tokens, &[sample.clone()]);
/// let (measurement, folder) = (of("this model"), tempfile::tempdir().unwrap());
/// let path = measurement.path(folder.path());
/// assert_eq!(measurement.kept(&path, 2), None);
/// let costs = LayerCosts { dense: 2.0, skipped: vec![4.5, 2.125] };
/// measurement.keep(&costs, &path)?;
/// assert_eq!(measurement.kept(&path, 2), Some(costs));
/// assert_ne!(of("another model").path(folder.path()), path);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    format: String,
    model: String,
    target: String,
    goal: String,
    /// Of the samples: their tokens, and which of them count.
    samples: String,
}

/// A measurement, as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    of: Measurement,
    costs: LayerCosts,
}

const FORMAT: &str = "mindskip-layers-1";
/// Bars of a plot end at so many times the highest of the chosen layers: the first layers of many models are far above.
const HIGHEST: f64 = 4.0;

impl LayerCosts {
    /// Measures what a tuner's target costs; all layers must be routed, and the samples fit its steps one by one.
    /// `progress` is told of the samples that are done and may break off.
    ///
    /// Errors: as of [`Tuner::without_each`]; Numeric, naming the layer, when a loss is not finite; Interrupted.
    pub fn measure(
        tuner: &mut Tuner,
        samples: &[Sample],
        goal: Goal,
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<LayerCosts> {
        let samples: Vec<&Sample> = samples.iter().collect();
        let mut costs = LayerCosts { dense: 0.0, skipped: vec![0.0; tuner.config().layers] };
        let (mut answers, mut done) = (0, 0);
        for part in pack(&samples, tuner) {
            if progress(done).is_break() {
                return Err(Error::new(Kind::Interrupted, "interrupted while measuring layers"));
            }
            let (dense, sums) = tuner.without_each(part, goal)?;
            costs.dense += dense.losses.iter().sum::<f64>();
            costs.skipped.iter_mut().zip(sums).for_each(|(sum, more)| *sum += more);
            answers += dense.answers;
            done += part.len();
        }
        costs.dense /= answers as f64;
        costs.skipped.iter_mut().for_each(|sum| *sum /= answers as f64);
        match costs.skipped.iter().position(|loss| !loss.is_finite()) {
            None => Ok(costs),
            Some(layer) => {
                let cause = format!("the loss without layer {layer} is {}", costs.skipped[layer]);
                Err(Error::new(Kind::Numeric, cause).action("name the layers"))
            }
        }
    }

    /// The `n` layers that cost the least, ascending; of equal ones the lower.
    pub fn cheapest(&self, n: usize) -> Vec<usize> {
        let mut layers: Vec<usize> = (0..self.skipped.len()).collect();
        layers.sort_by(|&a, &b| self.skipped[a].total_cmp(&self.skipped[b]));
        layers.truncate(n);
        layers.sort_unstable();
        layers
    }

    /// What a layer adds to the loss when it is skipped.
    pub fn added(&self, layer: usize) -> f64 {
        self.skipped[layer] - self.dense
    }

    /// What each layer adds to the loss, the chosen ones marked.
    pub fn chart(&self, title: &str, chosen: &[usize]) -> Bars {
        let highest = chosen.iter().map(|&layer| self.added(layer)).fold(0.0, f64::max);
        Bars {
            title: title.into(),
            x: "layer".into(),
            y: "loss added when it is skipped".into(),
            bars: (0..self.skipped.len()).map(|layer| (self.added(layer), chosen.contains(&layer))).collect(),
            names: ["routed".into(), "not routed".into()],
            top: if highest > 0.0 { HIGHEST * highest } else { f64::INFINITY },
        }
    }
}

impl Measurement {
    /// Of a model by its fingerprint, with these samples.
    pub fn new(fingerprint: &str, target: Target, goal: Goal, samples: &[Sample]) -> Measurement {
        let mut bytes = Vec::new();
        for sample in samples {
            bytes.extend((sample.ids.len() as u64).to_le_bytes());
            bytes.extend(sample.ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(sample.counts.iter().map(|&counts| u8::from(counts)));
        }
        Measurement {
            format: FORMAT.into(),
            model: fingerprint.into(),
            target: target.name().into(),
            goal: goal.name().into(),
            samples: files::digest(&bytes),
        }
    }

    /// Its file in a folder.
    pub fn path(&self, folder: &Path) -> PathBuf {
        let own = serde_json::to_vec(self).expect("texts");
        folder.join(format!("{}.json", files::digest(&own)))
    }

    /// What was kept of this measurement for a model of so many layers; None when nothing was, or nothing that can be
    /// used.
    pub fn kept(&self, path: &Path, layers: usize) -> Option<LayerCosts> {
        let Kept { of, costs } = serde_json::from_slice(&files::read(path).ok()?).ok()?;
        (of == *self && costs.skipped.len() == layers).then_some(costs)
    }

    /// Keeps it. Errors: Io.
    pub fn keep(&self, costs: &LayerCosts, path: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(&Kept { of: self.clone(), costs: costs.clone() }).expect("texts and numbers");
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        files::write_atomically(path, |file| file.write_all(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_layers_are_chosen() {
        let costs = LayerCosts { dense: 1.0, skipped: vec![9.0, 1.5, 0.75, 1.25, 1.25, 2.0] };
        assert_eq!(costs.cheapest(1), [2]);
        assert_eq!(costs.cheapest(2), [2, 3]);
        assert_eq!(costs.cheapest(4), [1, 2, 3, 4]);
        assert_eq!(costs.cheapest(6).len(), 6);
        let chart = costs.chart("t", &[2, 3]);
        assert_eq!((chart.bars[0], chart.bars[2], chart.top), ((8.0, false), (-0.25, true), 1.0));
    }

    /// Whatever is in the file, it is measured again or it is what was kept.
    #[test]
    fn what_was_kept_comes_back_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let sample = Sample { ids: vec![1, 2, 3], counts: vec![false, true, true], record: 1 };
        let of =
            |fingerprint: &str, target, goal, samples: &[Sample]| Measurement::new(fingerprint, target, goal, samples);
        let own = of("ab", Target::Attn, Goal::Tokens, std::slice::from_ref(&sample));
        let costs = LayerCosts { dense: 1.5, skipped: vec![0.1, 2.25] };
        let path = own.path(&dir.path().join("new"));
        assert_eq!(own.kept(&path, 2), None);
        own.keep(&costs, &path).unwrap();
        assert_eq!(own.kept(&path, 2), Some(costs));
        assert_eq!(own.kept(&path, 3), None);

        let other = Sample { counts: vec![false, false, true], ..sample.clone() };
        let samples = [sample.clone()];
        for different in [
            of("cd", Target::Attn, Goal::Tokens, &samples),
            of("ab", Target::Mlp, Goal::Tokens, &samples),
            of("ab", Target::Attn, Goal::Dense, &samples),
            of("ab", Target::Attn, Goal::Tokens, &[other]),
            of("ab", Target::Attn, Goal::Tokens, &[]),
        ] {
            assert_ne!(different.path(dir.path()), own.path(dir.path()));
            assert_eq!(different.kept(&path, 2), None);
        }
        let whole = std::fs::read(&path).unwrap();
        for broken in [&b""[..], b"{}", b"\xff\x00", &whole[..whole.len() - 3]] {
            std::fs::write(&path, broken).unwrap();
            assert_eq!(own.kept(&path, 2), None);
        }
    }
}
