//! A training run: batches, AdamW, the capacity controller, checkpoints.
//!
//! Everything that a run depends on is in its settings, its data and the state that a checkpoint holds, so a run that
//! was interrupted goes on to the same bits.

use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checkpoint;
use super::data::Dataset;
use super::{Goal, Sample, Ste, StepSettings, Tuner};
use crate::backend::mix;
use crate::error::{Error, Kind, Result, check_range, ensure};
use crate::router::{RouterSet, RouterSettings, Select};

/// Part of the steps in which the learning rate rises.
const WARM_UP: f64 = 0.03;
/// Of AdamW; there is no weight decay.
const BETAS: (f32, f32) = (0.9, 0.999);
const EPSILON: f32 = 1e-8;
/// The first lambda, its bounds, and how fast it moves: by e^(GAIN · (capacity − target)) a step.
///
/// The first step moves every router by the whole rate, and with any penalty nearly all rows fall below the threshold. That
/// is a good start: what is worth its attention is told by what comes back. Of SmolLM2-135M, layers 2 to 16, 28 steps of 16
/// samples at capacity 0.45, a batch then has a loss of 1.24; 1.50 when thresholds hold the capacity from the first step on,
/// and more when they lead it down from 1.
const LAMBDA: f64 = 0.2;
const LAMBDAS: (f64, f64) = (1e-3, 10.0);
const GAIN: f64 = 0.2;
/// Samples whose scores place the thresholds at the end, how often at most, and how near the capacity has to come: what a
/// layer decides changes the scores of those above it.
const CALIBRATION: usize = 128;
const CALIBRATIONS: usize = 6;
const NEAR: f64 = 0.004;

/// What a run is to do.
///
/// ```
/// use mindskip::router::RouterSettings;
/// use mindskip::tune::train::TrainSettings;
/// use mindskip::tune::{Goal, Sample, Ste};
///
/// let settings = TrainSettings {
///     router: RouterSettings::default(),
///     goal: Goal::Dense.name(),
///     ste: Ste::Full.name(),
///     lr: 0.01,
///     target: 0.6,
///     lambda: None,
///     calibrate: true,
///     batch: 4,
///     steps: 100,
///     seed: 0,
///     val_split: 0.25,
/// };
/// settings.check()?;
/// assert!(settings.goal() == Goal::Dense && TrainSettings { lr: -1.0, ..settings.clone() }.check().is_err());
/// let sample = |record| Sample { ids: vec![1, 2], counts: vec![true; 2], record };
/// let (training, held_out) = settings.split((1..=8).map(sample).collect())?;
/// assert_eq!((training.len(), held_out.len()), (6, 2));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, Serialize)]
pub struct TrainSettings {
    #[serde(skip)]
    /// How the routers are used.
    pub router: RouterSettings,
    /// The names of a [`Goal`] and a [`Ste`].
    pub goal: &'static str,
    pub ste: &'static str,
    /// Of AdamW, at its highest.
    pub lr: f32,
    /// The capacity that is wanted.
    pub target: f32,
    /// Of the penalty; None: it moves with the capacity.
    pub lambda: Option<f32>,
    /// Whether thresholds are placed at the end, so that the capacity of every layer is the one that was asked for.
    pub calibrate: bool,
    /// Samples of a batch.
    pub batch: usize,
    pub steps: usize,
    pub seed: u64,
    /// Part of the samples that is held out.
    pub val_split: f64,
}

impl TrainSettings {
    /// What the loss compares with, by its name. Panics on a name that is none.
    pub fn goal(&self) -> Goal {
        self.goal.parse().expect("a name")
    }

    fn ste(&self) -> Ste {
        self.ste.parse().expect("a name")
    }

    /// Whether lambda moves with the capacity. With top-k the capacity is what it is.
    fn moves_lambda(&self) -> bool {
        self.lambda.is_none() && self.router.select == Select::Threshold
    }

    /// The samples for training and those that are held out, in an order of the seed. Errors: Argument when none is left
    /// to train with.
    pub fn split(&self, mut samples: Vec<Sample>) -> Result<(Vec<Sample>, Vec<Sample>)> {
        shuffle(&mut samples, mix(self.seed ^ 0x5eed));
        let held = (samples.len() as f64 * self.val_split).round() as usize;
        if held == samples.len() {
            return Err(
                Error::new(Kind::Argument, format!("all {held} samples are held out")).action("lower --val-split")
            );
        }
        let held_out = samples.split_off(samples.len() - held);
        Ok((samples, held_out))
    }

    /// Errors: Argument, naming the number that is out of range.
    pub fn check(&self) -> Result<()> {
        let (lr, target) = (f64::from(self.lr), f64::from(self.target));
        check_range("--lr", lr, lr > 0.0 && lr.is_finite(), "a positive number")?;
        check_range("--target-capacity", target, (0.0..=1.0).contains(&target), "a share from 0 to 1")?;
        let lambda = f64::from(self.lambda.unwrap_or(0.0));
        check_range("--lambda", lambda, lambda >= 0.0 && lambda.is_finite(), "0 or a positive number")?;
        check_range("--batch", self.batch as f64, self.batch > 0, "1 or more")?;
        check_range("--val-split", self.val_split, (0.0..1.0).contains(&self.val_split), "a share from 0 to below 1")?;
        self.router.check()
    }
}

/// What changes from step to step.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// Steps that were taken.
    pub step: usize,
    /// `[routed layers, hidden]`: the routers, and AdamW's running means of their gradients and of the squares.
    pub routers: Vec<f32>,
    pub means: Vec<f32>,
    pub squares: Vec<f32>,
    /// Of the capacity penalty in the next step.
    pub lambda: f64,
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// From 1.
    pub step: usize,
    /// Of an answer token, in nats.
    pub loss: f64,
    /// The share of active (token, routed layer) pairs, and by routed layer.
    pub capacity: f64,
    pub capacities: Vec<f64>,
    /// Of the capacity penalty, and of AdamW.
    pub lambda: f64,
    pub lr: f64,
    /// Tokens that passed the layers.
    pub tokens: usize,
    /// How far the kept text's distributions are from the dense model's, and its capacity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Evaluation>,
}

/// How good a model is on some samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Of an answer token, in nats.
    pub loss: f64,
    /// The share of active (token, routed layer) pairs.
    pub capacity: f64,
}

/// A run, from its first step or from a checkpoint.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Device, Options, training_backend};
/// use mindskip::router::{RouterSet, RouterSettings};
/// use mindskip::tune::data::Dataset;
/// use mindskip::tune::plan::StepLimits;
/// use mindskip::tune::train::{Evaluation, StepReport, TrainSettings, TrainState, Trainer};
/// use mindskip::tune::{Goal, Sample, Ste, Tuner};
///
/// let bundle = Bundle::embedded()?;
/// let (tokenizer, routers) = (bundle.tokenizer()?, bundle.routers.expect("it comes with some"));
/// let mut samples = Vec::new();
/// for text in ["Tom had a red ball.", "The dog ran to the park.", "Lily saw a bird.", "Once upon a time"] {
///     let ids = tokenizer.encode(text, true)?;
///     samples.push(Sample { counts: vec![true; ids.len()], ids, record: samples.len() + 1 });
/// }
/// let data = Dataset { samples, truncated: 0, dropped: 0, hash: String::new(), path: "texts".into() };
/// let (router, goal, ste) = (RouterSettings::default(), Goal::Tokens.name(), Ste::Full.name());
/// let (lr, target, lambda, calibrate) = (0.02, 0.5, None, false);
/// let settings =
///     TrainSettings { router, goal, ste, lr, target, lambda, calibrate, batch: 2, steps: 2, seed: 0, val_split: 0.25 };
/// let new = || -> mindskip::Result<Trainer> {
///     let limits = StepLimits { rows: 64, samples: 2, chunk: 64, recompute: false, memory: None };
///     let backend = training_backend(&Options { device: Device::Cpu, ..Options::default() })?;
///     // With room for the dense model's distributions, as the text that is kept needs them.
///     let (config, set) = (bundle.config.clone(), routers.clone());
///     let tuner = Tuner::new(config, &bundle.weights, set, Goal::Dense, limits, backend)?;
///     let mut trainer = Trainer::new(tuner, settings.clone(), data.clone(), bundle.weights.fingerprint())?;
///     trainer.keep(data.clone());
///     trainer.start_from(&routers)?; // or from zeros
///     Ok(trainer)
/// };
///
/// let mut trainer = new()?;
/// assert_eq!((trainer.held_out().len(), trainer.settings().steps), (1, 2));
/// let dense: Option<Evaluation> = trainer.evaluate(false)?;
/// let first: StepReport = trainer.step()?;
/// assert!(first.kept.is_some() && !trainer.is_done());
///
/// // Another process goes on to the same bits.
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("checkpoint.safetensors");
/// trainer.save(&path)?;
/// let mut other = new()?;
/// other.resume(&path)?;
/// let state: &TrainState = &other.state;
/// assert_eq!((state.step, other.step()?), (1, trainer.step()?));
///
/// let other_text = trainer.held_out().to_vec();
/// trainer.hold_out(data.samples[..2].to_vec());
/// let loss = trainer.evaluate_on(&other_text, true)?.loss;
/// assert!(loss.is_finite() && trainer.tuner().layers() == [3, 4, 5, 6, 7]);
/// let (set, routed): (RouterSet, Option<Evaluation>) = trainer.finish(dense)?;
/// assert!(trainer.is_done() && routed.is_some_and(|routed| routed.capacity < 1.0));
/// assert_eq!((set.weights.len(), set.metadata["steps"].as_str()), (5, "2"));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Trainer {
    tuner: Tuner,
    settings: TrainSettings,
    training: Vec<Sample>,
    held_out: Vec<Sample>,
    kept: Vec<Sample>,
    /// From which score on a row is active while it trains, by routed layer.
    thresholds: Vec<f32>,
    pub state: TrainState,
    /// Of this run: what a checkpoint must agree with.
    identity: String,
    fingerprint: String,
    hash: String,
}

impl Trainer {
    /// A run of a tuner over some data; `fingerprint` is that of its model ([`Weights::fingerprint`](crate::weights::Weights::fingerprint)).
    ///
    /// Errors: Argument for settings out of range, or when nothing is left to train with.
    pub fn new(tuner: Tuner, settings: TrainSettings, data: Dataset, fingerprint: String) -> Result<Self> {
        settings.check()?;
        let hash = data.hash;
        let (training, held_out) = settings.split(data.samples)?;
        let values = tuner.layers().len() * tuner.config().hidden;
        let zeros = vec![0.0; values];
        let state = TrainState {
            step: 0,
            routers: zeros.clone(),
            means: zeros.clone(),
            squares: zeros,
            lambda: settings.lambda.map_or(if settings.moves_lambda() { LAMBDA } else { 0.0 }, f64::from),
        };
        let thresholds = vec![settings.router.threshold; tuner.layers().len()];
        let identity = serde_json::json!({
            "settings": settings,
            "router": format!("{:?}", settings.router),
            "layers": tuner.layers(),
            "rows": tuner.plan().limits.rows,
            "data": hash,
            "model": fingerprint,
        });
        let identity = identity.to_string();
        Ok(Trainer {
            tuner,
            settings,
            training,
            held_out,
            kept: Vec::new(),
            thresholds,
            state,
            identity,
            fingerprint,
            hash,
        })
    }

    /// What the run is to do.
    pub fn settings(&self) -> &TrainSettings {
        &self.settings
    }

    /// What computes its steps.
    pub fn tuner(&mut self) -> &mut Tuner {
        &mut self.tuner
    }

    /// The samples that it is evaluated with.
    pub fn held_out(&self) -> &[Sample] {
        &self.held_out
    }

    /// Evaluates with these samples, instead of what was split off.
    pub fn hold_out(&mut self, samples: Vec<Sample>) {
        self.held_out = samples;
    }

    /// Text that the model shall continue as it did before: half as many of its samples as of the data pass with every
    /// batch, to be compared with the dense model. The capacity is not theirs. The tuner needs room for
    /// [`Goal::Dense`].
    pub fn keep(&mut self, data: Dataset) {
        self.identity += &data.hash;
        self.kept = data.samples;
    }

    /// Begins with other routers than zeros. Errors: Shape for other layers.
    pub fn start_from(&mut self, set: &RouterSet) -> Result<()> {
        let layers: Vec<usize> = set.weights.keys().copied().collect();
        ensure!(layers == self.tuner.layers(), Shape, "routers of layers {layers:?} for {:?}", self.tuner.layers());
        self.state.routers = set.weights.values().flatten().copied().collect();
        self.thresholds = layers.iter().map(|&layer| set.threshold(layer)).collect();
        Ok(())
    }

    /// Whether all steps were taken.
    pub fn is_done(&self) -> bool {
        self.state.step >= self.settings.steps
    }

    /// The next step: the gradients of a batch, and AdamW. On an error the state is as before.
    ///
    /// Errors: Numeric, naming the step and the record, for a loss that is not finite.
    pub fn step(&mut self) -> Result<StepReport> {
        let (s, step) = (&self.settings, self.state.step);
        self.tuner.set_routers(&self.state.routers)?;
        let batch = self.batch();
        let batch: Vec<&Sample> = batch.iter().map(|&i| &self.training[i]).collect();
        self.tuner.set_thresholds(&self.thresholds);
        let answers: usize = batch.iter().map(|s| s.answers().count()).sum();
        let rows: usize = batch.iter().map(|s| s.inputs().len()).sum();
        let settings = StepSettings {
            goal: s.goal(),
            ste: s.ste(),
            loss_scale: 1.0 / answers as f32,
            lambda: self.state.lambda as f32,
            target: s.target,
            capacity_scale: 1.0 / rows as f32,
        };
        let mut sum = Sum::new(self.tuner.layers().len());
        for part in pack(&batch, &self.tuner) {
            let outcome = self.tuner.step(part, &settings).map_err(|e| e.during(format!("taking step {}", step + 1)));
            match outcome {
                Ok(outcome) => sum.add(&outcome),
                Err(e) => {
                    self.tuner.take_gradients()?;
                    return Err(e);
                }
            }
        }
        let kept = match self.step_kept() {
            Ok(kept) => kept,
            Err(e) => {
                self.tuner.take_gradients()?;
                return Err(e);
            }
        };
        let gradients = self.tuner.take_gradients()?;
        if let Some(i) = gradients.iter().position(|g| !g.is_finite()) {
            let layer = self.tuner.layers()[i / self.tuner.config().hidden];
            let cause = format!("the gradient of the router of layer {layer} is {} in step {}", gradients[i], step + 1);
            return Err(Error::new(Kind::Numeric, cause).action("check the records of the batch, or lower --lr"));
        }
        let lr = self.learning_rate();
        self.adamw(&gradients, lr as f32);
        let report = StepReport {
            step: step + 1,
            loss: sum.loss(),
            capacity: sum.capacity(),
            capacities: sum.capacities(),
            lambda: self.state.lambda,
            lr,
            tokens: rows,
            kept,
        };
        self.state.step += 1;
        if self.settings.moves_lambda() {
            let lambda = self.state.lambda * (GAIN * (report.capacity - f64::from(self.settings.target))).exp();
            self.state.lambda = lambda.clamp(LAMBDAS.0, LAMBDAS.1);
        }
        Ok(report)
    }

    /// The gradients of the text that is kept.
    fn step_kept(&mut self) -> Result<Option<Evaluation>> {
        if self.kept.is_empty() {
            return Ok(None);
        }
        let (s, step, n) = (&self.settings, self.state.step, self.settings.batch.div_ceil(2));
        let samples: Vec<&Sample> = (step * n..(step + 1) * n).map(|i| &self.kept[i % self.kept.len()]).collect();
        let answers: usize = samples.iter().map(|s| s.answers().count()).sum();
        let settings = StepSettings {
            goal: Goal::Dense,
            ste: s.ste(),
            loss_scale: 1.0 / answers as f32,
            lambda: 0.0,
            target: 1.0,
            capacity_scale: 0.0,
        };
        let mut sum = Sum::new(self.tuner.layers().len());
        for part in pack(&samples, &self.tuner) {
            let outcome = self.tuner.step(part, &settings);
            sum.add(&outcome.map_err(|e| e.during(format!("taking step {} with the text to keep", step + 1)))?);
        }
        Ok(Some(Evaluation { loss: sum.loss(), capacity: sum.capacity() }))
    }

    /// The samples of the next batch: every epoch has an order of its own.
    fn batch(&self) -> Vec<usize> {
        let (n, start) = (self.training.len(), self.state.step * self.settings.batch);
        let mut batch = Vec::with_capacity(self.settings.batch);
        let mut order = (usize::MAX, Vec::new());
        for k in start..start + self.settings.batch {
            let epoch = k / n;
            if order.0 != epoch {
                let mut all: Vec<usize> = (0..n).collect();
                shuffle(&mut all, mix(self.settings.seed ^ mix(epoch as u64 + 1)));
                order = (epoch, all);
            }
            batch.push(order.1[k % n]);
        }
        batch
    }

    /// Rises in the first steps, then half a cosine down to 0.
    fn learning_rate(&self) -> f64 {
        let (step, steps) = (self.state.step as f64, self.settings.steps as f64);
        let warm = (steps * WARM_UP).ceil();
        let share = match step < warm {
            true => (step + 1.0) / warm,
            false => 0.5 * (1.0 + (PI * (step - warm) / (steps - warm)).cos()),
        };
        f64::from(self.settings.lr) * share
    }

    /// On the host: the gradients are read anyway, to be checked, and are a few KiB.
    fn adamw(&mut self, gradients: &[f32], lr: f32) {
        let TrainState { step, routers, means, squares, .. } = &mut self.state;
        let steps = *step as i32 + 1;
        let (mean_scale, square_scale) = (1.0 - BETAS.0.powi(steps), 1.0 - BETAS.1.powi(steps));
        for (i, &g) in gradients.iter().enumerate() {
            means[i] += (1.0 - BETAS.0) * (g - means[i]);
            squares[i] += (1.0 - BETAS.1) * (g * g - squares[i]);
            routers[i] -= lr * (means[i] / mean_scale) / ((squares[i] / square_scale).sqrt() + EPSILON);
        }
    }

    /// The thresholds with which the capacity on training samples is the target, found from a first guess on.
    fn calibrate(&mut self) -> Result<Vec<f32>> {
        let target = f64::from(self.settings.target);
        let samples: Vec<&Sample> = self.training.iter().take(CALIBRATION).collect();
        let mut thresholds = self.thresholds.clone();
        let mut best = (f64::INFINITY, thresholds.clone());
        for _ in 0..CALIBRATIONS {
            let scores = scores(&mut self.tuner, &samples, &thresholds)?;
            let shares = scores.iter().zip(&thresholds).map(|(scores, &threshold)| share(scores, threshold));
            let error = shares.map(|share| (share - target).abs()).fold(0.0, f64::max);
            if error < best.0 {
                best = (error, thresholds.clone());
            }
            if error < NEAR {
                break;
            }
            thresholds = scores.iter().map(|scores| quantile(scores, target)).collect();
        }
        Ok(best.1)
    }

    /// The loss of an answer token, in nats, and the capacity; None without samples. `routed`: with the routers, or the dense
    /// model. Errors: as of [`Tuner::evaluate`].
    pub fn evaluate(&mut self, routed: bool) -> Result<Option<Evaluation>> {
        let held_out = std::mem::take(&mut self.held_out);
        let found = match held_out.is_empty() {
            true => Ok(None),
            false => self.evaluate_on(&held_out, routed).map(Some),
        };
        self.held_out = held_out;
        found
    }

    /// The same on other samples, one or more. Errors: as of [`Tuner::evaluate`].
    pub fn evaluate_on(&mut self, samples: &[Sample], routed: bool) -> Result<Evaluation> {
        self.tuner.set_routers(&self.state.routers)?;
        let samples: Vec<&Sample> = samples.iter().collect();
        let mut sum = Sum::new(if routed { self.tuner.layers().len() } else { 0 });
        for part in pack(&samples, &self.tuner) {
            // What users see is the loss of the text, whatever was trained for.
            sum.add(&self.tuner.evaluate(part, Goal::Tokens, routed)?);
        }
        Ok(Evaluation { loss: sum.loss(), capacity: sum.capacity() })
    }

    /// Ends a run: the threshold, what the routers do on the held-out samples, and the set to be saved. `dense` is what
    /// the dense model does there. Errors: as of [`Tuner::evaluate`].
    pub fn finish(&mut self, dense: Option<Evaluation>) -> Result<(RouterSet, Option<Evaluation>)> {
        self.tuner.set_routers(&self.state.routers)?;
        let settings = self.settings.router;
        let mut thresholds = self.thresholds.clone();
        if self.settings.calibrate && settings.select == Select::Threshold {
            thresholds = self.calibrate()?;
        }
        self.tuner.set_thresholds(&thresholds);
        let routed = self.evaluate(true)?;
        let s = &self.settings;
        let mut metadata: BTreeMap<String, String> = [
            ("data_hash", self.hash.clone()),
            ("goal", s.goal.into()),
            ("ste", s.ste.into()),
            ("lr", s.lr.to_string()),
            ("lambda", s.lambda.map_or("moved".into(), |l| l.to_string())),
            ("target_capacity", s.target.to_string()),
            ("batch", s.batch.to_string()),
            ("steps", self.state.step.to_string()),
            ("seed", s.seed.to_string()),
            ("val_split", s.val_split.to_string()),
        ]
        .map(|(key, value)| (key.to_string(), value))
        .into();
        if let (Some(dense), Some(routed)) = (dense, routed) {
            metadata.insert("heldout_loss_dense".into(), format!("{:.4}", dense.loss));
            metadata.insert("heldout_loss_routed".into(), format!("{:.4}", routed.loss));
            metadata.insert("heldout_capacity".into(), format!("{:.4}", routed.capacity));
        }
        let hidden = self.tuner.config().hidden;
        let layers = self.tuner.layers().iter().copied();
        let weights = layers.clone().zip(self.state.routers.chunks(hidden).map(<[f32]>::to_vec));
        let set = RouterSet {
            settings,
            weights: weights.collect(),
            thresholds: layers.zip(thresholds).filter(|(_, own)| *own != settings.threshold).collect(),
            fingerprint: Some(self.fingerprint.clone()),
            metadata,
            path: "".into(),
        };
        Ok((set, routed))
    }

    /// Writes the state, all or nothing. Errors: Io.
    pub fn save(&self, path: &Path) -> Result<()> {
        checkpoint::save(&self.state, &self.identity, path)
    }

    /// Goes on from a checkpoint. Errors: Io; Format; Mismatch when it is of a run with other settings, data or model.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        self.state = checkpoint::open(path, &self.identity, self.state.routers.len())?;
        Ok(())
    }
}

/// The scores of some samples' rows by routed layer, the highest first.
fn scores(tuner: &mut Tuner, samples: &[&Sample], thresholds: &[f32]) -> Result<Vec<Vec<f32>>> {
    tuner.set_thresholds(thresholds);
    let mut scores = vec![Vec::<f32>::new(); thresholds.len()];
    for part in pack(samples, tuner) {
        let rows: usize = part.iter().map(|s| s.inputs().len()).sum();
        let found = tuner.scores(part)?;
        scores.iter_mut().zip(found.chunks(rows)).for_each(|(all, found)| all.extend(found));
    }
    scores.iter_mut().for_each(|scores| scores.sort_by(|a, b| b.total_cmp(a)));
    Ok(scores)
}

/// How many of the scores, highest first, are active.
fn share(scores: &[f32], threshold: f32) -> f64 {
    scores.partition_point(|&s| s >= threshold) as f64 / scores.len() as f64
}

/// The threshold that so many of the scores, highest first, reach.
fn quantile(scores: &[f32], share: f64) -> f32 {
    let n = ((share * scores.len() as f64).round() as usize).min(scores.len() - 1);
    scores[n.saturating_sub(1)].midpoint(scores[n]).clamp(0.0, 1.0)
}

/// Orders by a hash of the places.
fn shuffle<T>(items: &mut Vec<T>, seed: u64) {
    let mut keyed: Vec<(u64, T)> = (0u64..).zip(items.drain(..)).map(|(i, item)| (mix(seed ^ mix(i)), item)).collect();
    keyed.sort_by_key(|(key, _)| *key);
    items.extend(keyed.into_iter().map(|(_, item)| item));
}

/// Cuts samples into parts that fit a step, in their order.
pub(super) fn pack<'s, 'a>(samples: &'s [&'a Sample], tuner: &Tuner) -> Vec<&'s [&'a Sample]> {
    let limits = tuner.plan().limits;
    let (mut parts, mut start, mut rows) = (Vec::new(), 0, 0);
    for (i, sample) in samples.iter().enumerate() {
        let more = sample.inputs().len();
        if i > start && (rows + more > limits.rows || i - start == limits.samples) {
            parts.push(&samples[start..i]);
            (start, rows) = (i, 0);
        }
        rows += more;
    }
    parts.push(&samples[start..]);
    parts
}

/// Sums over the steps of a batch.
struct Sum {
    loss: f64,
    answers: usize,
    rows: usize,
    active: Vec<usize>,
}

impl Sum {
    fn new(layers: usize) -> Self {
        Sum { loss: 0.0, answers: 0, rows: 0, active: vec![0; layers] }
    }

    fn add(&mut self, outcome: &super::StepOutcome) {
        self.loss += outcome.losses.iter().sum::<f64>();
        self.answers += outcome.answers;
        self.rows += outcome.rows;
        self.active.iter_mut().zip(&outcome.active).for_each(|(sum, n)| *sum += n);
    }

    fn loss(&self) -> f64 {
        self.loss / self.answers as f64
    }

    fn capacities(&self) -> Vec<f64> {
        self.active.iter().map(|&n| n as f64 / self.rows as f64).collect()
    }

    fn capacity(&self) -> f64 {
        if self.active.is_empty() { 1.0 } else { self.capacities().iter().sum::<f64>() / self.active.len() as f64 }
    }
}
