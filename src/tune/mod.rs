//! Router-Tuning (He et al., arXiv 2410.13184, section 3.2): the model is frozen, only its routers learn.
//!
//! | | |
//! | --- | --- |
//! | [`data`] | text files to samples: tokens, and which of them are answers |
//! | [`layers`] | which layers are missed the least |
//! | [`train`] | a run: batches, AdamW, the capacity controller, checkpoints |
//! | [`log`] | what a run did, step by step, and its plot |
//! | [`Tuner`] | one step over some samples: losses, capacities, gradients of the routers |
//! | [`plan`] | the memory of a step |

mod checkpoint;
pub mod data;
pub mod layers;
pub mod log;
mod pass;
pub mod plan;
pub mod train;

use std::fmt;
use std::str::FromStr;

use crate::backend::{Counters, Meter, TrainingBackend};
use crate::config::Config;
use crate::error::{Error, Kind, Result, ensure};
use crate::model::{Gates, Layer, Model, Routing};
use crate::router::{RouterSet, named, no_choice};
use crate::weights::Weights;
use pass::{Lists, Pass, Save};
pub use pass::{StepOutcome, StepSettings};
use plan::{StepLimits, StepPlan};

named! {
    /// What the loss compares the answers' distributions with.
    Goal {
        /// The answers.
        Tokens = "lm",
        /// The dense model's distributions.
        Dense = "kl",
    }
}

named! {
    /// Whose masks have a gradient (the straight-through estimator).
    Ste {
        /// Everyone's: for skipped rows, too, the sub-layer is computed.
        Full = "full",
        /// The active rows'.
        Active = "active",
    }
}

/// A tokenised text.
///
/// ```
/// use mindskip::tune::Sample;
///
/// let sample = Sample { ids: vec![7, 8, 9, 10], counts: vec![false, false, true, true], record: 1 };
/// assert_eq!(sample.inputs(), [7, 8, 9]);
/// assert_eq!(sample.answers().collect::<Vec<_>>(), [(1, 9), (2, 10)], "9 is right behind row 1");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// At least two tokens.
    pub ids: Vec<u32>,
    /// By token: whether the loss counts it.
    pub counts: Vec<bool>,
    /// Where it is from: the number of its record, from 1.
    pub record: usize,
}

impl Sample {
    /// The tokens that pass the model: all but the last.
    pub fn inputs(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }

    /// The rows whose next token counts, and that token.
    pub fn answers(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        (0u32..)
            .zip(self.ids[1..].iter().zip(&self.counts[1..]))
            .filter(|(_, (_, counts))| **counts)
            .map(|(i, (&id, _))| (i, id))
    }
}

/// A frozen model and its routers, with the memory of a step.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Device, Options, training_backend};
/// use mindskip::tune::plan::StepLimits;
/// use mindskip::tune::{Goal, Sample, Ste, StepOutcome, StepSettings, Tuner};
///
/// let bundle = Bundle::embedded()?;
/// let ids = bundle.tokenizer()?.encode("Once upon a time, there was a little girl named Lily.", true)?;
/// let (sample, rows) = (Sample { counts: vec![true; ids.len()], ids: ids.clone(), record: 1 }, ids.len() - 1);
/// let limits = StepLimits { rows, samples: 1, chunk: 64, recompute: false, memory: None };
/// let backend = training_backend(&Options { device: Device::Cpu, ..Options::default() })?;
/// let routers = bundle.routers.expect("it comes with some");
/// let mut values: Vec<f32> = routers.weights.values().flatten().copied().collect();
/// let mut tuner = Tuner::new(bundle.config, &bundle.weights, routers, Goal::Tokens, limits, backend)?;
/// assert_eq!((tuner.layers(), tuner.config().hidden), (&[3, 4, 5, 6, 7][..], 128));
/// assert_eq!((tuner.plan().first, tuner.plan().limits), (3, limits));
///
/// // Gradient descent without a trainer: all rows of all layers shall become active.
/// let scale = 1.0 / rows as f32;
/// let (loss_scale, capacity_scale) = (scale, scale);
/// let settings =
///     StepSettings { goal: Goal::Tokens, ste: Ste::Full, loss_scale, lambda: 1.0, target: 0.0, capacity_scale };
/// let before: StepOutcome = tuner.step(&[&sample], &settings)?;
/// let gradients = tuner.take_gradients()?; // [routed layers, hidden]
/// values.iter_mut().zip(&gradients).for_each(|(value, gradient)| *value -= 0.5 * gradient);
/// tuner.set_routers(&values)?;
/// let after = tuner.evaluate(&[&sample], Goal::Tokens, true)?;
/// assert!(after.active.iter().sum::<usize>() < before.active.iter().sum(), "the penalty is on what is active");
///
/// let scores = tuner.scores(&[&sample])?;
/// assert!(scores.len() == 5 * rows && scores.iter().all(|score| (0.0..1.0).contains(score)));
/// tuner.set_thresholds(&[0.0; 5]);
/// let all = tuner.evaluate(&[&sample], Goal::Tokens, true)?;
/// let dense = tuner.evaluate(&[&sample], Goal::Tokens, false)?;
/// assert_eq!((all.active, all.losses), (vec![rows; 5], dense.losses));
/// assert!(tuner.meter().total().flops > 0 && tuner.counters().launches == 0, "no GPU");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Tuner {
    model: Model,
    backend: Box<dyn TrainingBackend>,
    plan: StepPlan,
    lists: Lists,
}

impl Tuner {
    /// Plans the memory and loads the weights; the routers are those of the set. The backend is one that
    /// [`training_backend`](crate::engine::training_backend) makes; `goal` says whether there must be room for the dense
    /// model's distributions.
    ///
    /// Errors: Argument for no routers, and for limits of nothing; Memory when it does not fit, with the sizes and the knob; Unsupported
    /// for shapes that the backend does not take; those of [`RouterSet::check`] and [`Weights::tensor`].
    pub fn new(
        config: Config,
        weights: &Weights,
        routers: RouterSet,
        goal: Goal,
        limits: StepLimits,
        mut backend: Box<dyn TrainingBackend>,
    ) -> Result<Self> {
        routers.check(&config, &weights.fingerprint())?;
        let first = *routers.weights.keys().next().ok_or_else(|| Error::new(Kind::Argument, "no layer is routed"))?;
        let held = backend.info().weights;
        let bytes = held.map_or(weights.bytes(), |dtype| weights.parameters() * dtype.size()) as u64;
        let distill = goal == Goal::Dense;
        let plan = StepPlan::new(&config, first, routers.weights.len(), distill, bytes, limits, backend.as_ref())?;
        let model = Model::load(config, weights, Some(Routing::routers(routers)), backend.as_mut())?;
        backend.reserve(plan.arena as usize, plan.ints as usize / 4, plan.workspace as usize, &plan.kv)?;
        let mut tuner = Tuner { model, backend, plan, lists: Lists::default() };
        tuner.clear_gradients()?;
        Ok(tuner)
    }

    /// Forward and backward over some samples. The gradients of the routers add up until they are read.
    ///
    /// Errors: Argument for no samples, or more and longer ones than were planned for; Numeric when a loss is not
    /// finite.
    pub fn step(&mut self, samples: &[&Sample], settings: &StepSettings) -> Result<StepOutcome> {
        self.run(samples, settings.goal == Goal::Dense, |pass| {
            let active = pass.forward(Save::Activations)?;
            let losses = pass.head(settings, true)?;
            pass.backward(settings)?;
            Ok((active, losses))
        })
    }

    /// Forward alone, with the routers or as the dense model; what it finds.
    ///
    /// Errors: as of [`step`](Self::step).
    pub fn evaluate(&mut self, samples: &[&Sample], goal: Goal, routed: bool) -> Result<StepOutcome> {
        self.run(samples, goal == Goal::Dense, |pass| {
            pass.routed = routed;
            Ok((pass.forward(Save::Nothing)?, pass.head(&StepSettings::forward(goal), false)?))
        })
    }

    /// What the dense model finds, and the sums of the losses, by layer, when that layer's sub-layer is left out for every
    /// row. A layer below is computed once, so all of it takes about half as many forward passes as there are layers.
    ///
    /// Errors: as of [`step`](Self::step); Argument when the inputs of some layers are not kept, as layer 0 is not a
    /// routed one.
    pub fn without_each(&mut self, samples: &[&Sample], goal: Goal) -> Result<(StepOutcome, Vec<f64>)> {
        let target =
            self.model.routing.as_ref().filter(|_| self.plan.first == 0).map(|r| r.settings.granularity.target);
        let target = target.ok_or_else(|| Error::new(Kind::Argument, "layer 0 is not routed"))?;
        let mut sums = Vec::new();
        let dense = self.run(samples, goal == Goal::Dense, |pass| {
            pass.routed = false;
            pass.forward(Save::Inputs)?;
            let losses = pass.head(&StepSettings::forward(goal), false)?;
            for l in 0..pass.model.layers.len() {
                pass.forward_without(l, target)?;
                let losses = pass.head(&StepSettings::forward(goal), false)?;
                sums.push(losses.into_iter().map(f64::from).sum());
            }
            Ok((Vec::new(), losses))
        })?;
        Ok((dense, sums))
    }

    fn run(
        &mut self,
        samples: &[&Sample],
        distill: bool,
        mut body: impl FnMut(&mut Pass) -> Result<(Vec<usize>, Vec<f32>)> + Send,
    ) -> Result<StepOutcome> {
        let StepLimits { rows: limit, samples: most, .. } = self.plan.limits;
        let rows: usize = samples.iter().map(|s| s.inputs().len()).sum();
        ensure!(!samples.is_empty(), Argument, "a step without samples");
        ensure!(
            rows <= limit && samples.len() <= most,
            Argument,
            "{} samples of {rows} tokens in a step for {most} of {limit}",
            samples.len()
        );
        let vocab = self.model.config.vocab;
        let known = samples.iter().all(|s| s.ids.iter().all(|&id| (id as usize) < vocab));
        ensure!(known, Argument, "a token beyond the vocabulary of {vocab}");
        let Tuner { model, backend, plan, lists } = self;
        let mut found = (Vec::new(), Vec::new());
        backend.train(&mut |be| {
            let mut pass = Pass { be, model, plan, samples, routed: false, scores: None, lists: &mut *lists };
            pass.begin()?;
            if distill {
                pass.forward(Save::Nothing)?;
                pass.keep_dense()?;
            }
            pass.routed = true;
            found = body(&mut pass)?;
            Ok(())
        })?;
        let (active, losses) = found;
        let mut each = losses.into_iter();
        let of = |sample: &&Sample| each.by_ref().take(sample.answers().count()).map(f64::from).sum();
        let losses: Vec<f64> = samples.iter().map(of).collect();
        if let Some(i) = losses.iter().position(|loss| !loss.is_finite()) {
            let cause = format!("the loss of record {} is {}", samples[i].record, losses[i]);
            return Err(Error::new(Kind::Numeric, cause).action("leave the record out, or lower --lr"));
        }
        Ok(StepOutcome { losses, active, rows, answers: samples.iter().map(|s| s.answers().count()).sum() })
    }

    /// The scores that the routers give the rows of some samples, of all routed layers; at sequence level each row has
    /// its sequence's. Errors: as of [`step`](Self::step).
    pub fn scores(&mut self, samples: &[&Sample]) -> Result<Vec<f32>> {
        let mut scores = Vec::new();
        self.run(samples, false, |pass| {
            pass.scores = Some(Vec::new());
            let active = pass.forward(Save::Nothing)?;
            scores = pass.scores.take().expect("just put there");
            Ok((active, Vec::new()))
        })?;
        Ok(scores)
    }

    /// The sums of the routers' gradients since they were read last, `[routed layers, hidden]`. Errors: Device.
    pub fn take_gradients(&mut self) -> Result<Vec<f32>> {
        let from = self.plan.buffers.d_routers;
        let mut values = vec![0.0; from.rows * from.cols];
        self.backend.read_floats(from, &mut values)?;
        self.clear_gradients()?;
        Ok(values)
    }

    fn clear_gradients(&mut self) -> Result<()> {
        let to = self.plan.buffers.d_routers;
        self.backend.write_floats(to, &vec![0.0; to.rows * to.cols])
    }

    /// Gives the routers other values, `[routed layers, hidden]`. Errors: Shape when there are more or fewer.
    pub fn set_routers(&mut self, values: &[f32]) -> Result<()> {
        let hidden = self.model.config.hidden;
        let routers: Vec<_> = self.model.layers.iter().filter_map(Layer::router).collect();
        ensure!(values.len() == routers.len() * hidden, Shape, "{} values for the routers", values.len());
        routers.iter().zip(values.chunks(hidden)).try_for_each(|(&r, values)| self.backend.replace(r, values))
    }

    /// From which score on a row is active, by routed layer.
    pub fn set_thresholds(&mut self, thresholds: &[f32]) {
        if let Some(Routing { layers, gates: Gates::Routers(set), .. }) = &mut self.model.routing {
            set.thresholds = layers.iter().copied().zip(thresholds.iter().copied()).collect();
        }
    }

    /// The routed layers, ascending.
    pub fn layers(&self) -> &[usize] {
        self.model.routing.as_ref().map_or(&[], |r| &r.layers)
    }

    /// The shape of its model.
    pub fn config(&self) -> &Config {
        &self.model.config
    }

    /// The memory of its steps.
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// What the device was asked for; nothing on the CPU.
    pub fn counters(&self) -> Counters {
        self.backend.counters()
    }

    /// FLOPs, bytes and calls by op.
    pub fn meter(&mut self) -> &mut Meter {
        self.backend.meter()
    }
}
