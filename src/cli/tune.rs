//! `mindskip tune`.

mod layers;
mod sweep;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use layers::Measured;
use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Options, training_backend};
use mindskip::memory::{Budget, Size, parse_budget};
use mindskip::plot;
use mindskip::router::{Granularity, Keys, LayerSpec, RouterSet, RouterSettings, Select};
use mindskip::tune::data::{Dataset, Encoder};
use mindskip::tune::log::{Log, charts};
use mindskip::tune::plan::StepLimits;
use mindskip::tune::train::{Evaluation, StepReport, TrainSettings, Trainer};
use mindskip::tune::{Goal, Ste, Tuner};
use serde_json::json;
use sweep::Targets;

use super::args::ModelArgs;
use super::progress::{Bar, catch_interrupts, interrupted};
use super::{Outcome, Ran, bad, print_json};

/// Trains routers for a model, which itself stays as it is (Router-Tuning)
#[derive(Args)]
pub struct Tune {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON lines, or one JSON array: records with messages, prompt and completion, or instruction, input and output.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Records that the model shall answer as it did before, such as {"text": …}: they are compared with the dense model,
    /// and the capacity is not theirs.
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Records to evaluate with, instead of a part of the data that is held out; may be given again.
    #[arg(long, value_name = "FILE")]
    val: Vec<PathBuf>,
    /// Routers to begin with, instead of zeros; layers, granularity, keys and select are theirs. With --steps 0 they are
    /// evaluated as they are, or with other thresholds for a --target-capacity.
    #[arg(long, value_name = "FILE")]
    routers: Option<PathBuf>,
    /// Where the routers go. Beside it: the log FILE.jsonl, its plot FILE.svg, and FILE.checkpoint. Those of a sweep have
    /// the capacity in their names: routers-0.75.safetensors.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    how: How,
    /// Go on from the checkpoint, to the bits of a run that was not interrupted.
    #[arg(long)]
    resume: bool,
    /// The result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Where to run: cpu, cuda, cuda:N, auto.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// CPU threads; as many as there are cores when nothing is given.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// What weights and buffers may take together, such as 8G or 90%; all that is free when nothing is given.
    #[arg(long, value_name = "SIZE", value_parser = parse_budget)]
    memory: Option<Budget>,
}

#[derive(Args)]
#[command(next_help_heading = "Routing")]
struct What {
    /// What is skipped, and what decides: attn, mlp or block, by token or sequence (attn_token …).
    #[arg(long, value_name = "NAME", default_value = "attn_token")]
    granularity: Granularity,
    /// Routed layers: last:N (before the final one), auto:N (which are missed the least, as measured), all, 3-9, 1,2,5.
    /// As auto:N half of them when nothing is given.
    #[arg(long)]
    layers: Option<LayerSpec>,
    /// Training samples that auto:N measures with.
    #[arg(long, value_name = "N", default_value_t = 64)]
    calibration: usize,
    /// The share of a routed layer's tokens that shall be active; 0.5 when nothing is given.
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    target_capacity: Option<f32>,
    /// Several target capacities, such as 0.9,0.75,0.5: routers for each, and a table, FILE.json and FILE.svg of what they cost
    /// and buy.
    #[arg(long, value_name = "LIST", conflicts_with = "target_capacity", allow_negative_numbers = true)]
    sweep: Option<Targets>,
    /// Whose keys and values a routed layer holds: all, active.
    #[arg(long, value_name = "WHOSE", default_value = "all")]
    keys: Keys,
    /// How scores decide: threshold, or topk: the target capacity of each sample.
    #[arg(long, value_name = "HOW", default_value = "threshold")]
    select: Select,
    /// Active from this score on; when nothing is given 0.5 while it trains, and then what the target capacity asks
    /// for.
    #[arg(long, value_name = "SCORE", allow_negative_numbers = true)]
    threshold: Option<f32>,
}

#[derive(Args)]
#[command(next_help_heading = "Training")]
struct How {
    /// What answers are compared with: lm, the text; kl, the dense model's own distribution.
    #[arg(long, default_value = "lm")]
    loss: Goal,
    /// Whose masks have a gradient: full, everyone's; active, the active rows'.
    #[arg(long, default_value = "full")]
    ste: Ste,
    /// Weight of the penalty on the capacity; found by a controller when nothing is given.
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda: Option<f32>,
    /// Learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 3e-4, allow_negative_numbers = true)]
    lr: f32,
    /// Samples of a batch.
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch: usize,
    /// Times that the data are gone through.
    #[arg(long, value_name = "N", default_value_t = 1.0, conflicts_with = "steps")]
    epochs: f64,
    /// Batches to train on, instead of epochs.
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Tokens of a sample; what is longer is cut. Also the tokens of a packed step.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    max_length: usize,
    /// Keep nothing of a layer but its input, and compute it again on the way back: the least memory. When it is not given
    /// as many layers are kept as --memory allows, or as half of what is free.
    #[arg(long)]
    recompute: bool,
    /// The share of the data that is held out to evaluate.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, allow_negative_numbers = true)]
    val_split: f64,
    /// Of the order of the data.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Steps between two checkpoints.
const CHECKPOINT: usize = 10;
/// Samples of a step at most.
const SAMPLES: usize = 64;

/// What a run begins with.
struct Base {
    bundle: Bundle,
    data: Dataset,
    keep: Option<Dataset>,
    /// What to evaluate with, instead of a part of the data.
    val: Vec<Dataset>,
    /// What the routers begin with, instead of zeros.
    start: Option<RouterSet>,
    settings: TrainSettings,
    /// Tokens of a sample at most, and of a step.
    max_length: usize,
    layers: Vec<usize>,
    /// When the layers were asked for as auto:N.
    measured: Option<Measured>,
}

/// What a run ends with.
struct Trained {
    set: RouterSet,
    routed: Option<Evaluation>,
}

impl Tune {
    pub fn run(self) -> Ran {
        let _noted = catch_interrupts();
        let base = self.base()?;
        if let Some(targets) = &self.what.sweep {
            return self.sweep(&base, targets);
        }
        let mut trainer = self.trainer(&base, base.settings.clone())?;
        if self.resume {
            trainer.resume(&beside(&self.output, "checkpoint"))?;
        }
        let dense = self.dense(&mut trainer)?;
        let Some(trained) = self.train(&mut trainer, &self.output, dense)? else {
            return Ok(Outcome::Interrupted);
        };
        let others = base.val.iter().skip(1).map(|data| {
            let [dense, routed] = [false, true].map(|routed| trainer.evaluate_on(&data.samples, routed));
            Ok((&*data.path, dense?, routed?))
        });
        let found = dense.zip(trained.routed).map(|(dense, routed)| {
            let path = self.val.first().map_or(Path::new("held out"), |path| path);
            Ok((path, dense, routed))
        });
        let found: Vec<_> = found.into_iter().chain(others).collect::<Result<_>>()?;
        self.show(&trained.set, &found, base.measured.as_ref())?;
        Ok(Outcome::Done)
    }

    fn base(&self) -> Result<Base> {
        let bundle = self.model.load()?;
        let (tokenizer, template) = (bundle.tokenizer()?, bundle.chat_template()?);
        let max_length = self.how.max_length.min(bundle.config.context);
        let encoder = Encoder { tokenizer: &tokenizer, template: template.as_ref(), eos: bundle.eos(), max_length };
        let open = |path: &PathBuf| {
            let data = Dataset::open(path, &encoder)?;
            let (path, samples, cut, dropped) = (path.display(), data.samples.len(), data.truncated, data.dropped);
            eprintln!(
                "{path}: {samples} samples, {cut} cut to {max_length} tokens, {dropped} dropped without an answer"
            );
            Ok(data)
        };
        let data = open(&self.data)?;
        let keep = self.keep.as_ref().map(open).transpose()?;
        let val = self.val.iter().map(open).collect::<Result<_>>()?;
        let start = self.routers.as_ref().map(|path| RouterSet::open(path)).transpose()?;
        if let Some(set) = &start {
            set.check(&bundle.config, &bundle.weights.fingerprint())?;
        }
        let settings = self.settings(data.samples.len(), start.as_ref())?;
        let mut base =
            Base { bundle, data, keep, val, start, settings, max_length, layers: Vec::new(), measured: None };
        let count = base.bundle.config.layers;
        let half = count.div_ceil(2).min(count - 1).max(1);
        match (&base.start, self.what.layers.clone().unwrap_or(LayerSpec::Auto(half))) {
            (Some(set), _) => base.layers = set.weights.keys().copied().collect(),
            (None, LayerSpec::Auto(n)) if n <= count => {
                let measured = self.measure(&base, n)?;
                base.layers.clone_from(&measured.layers);
                base.measured = Some(measured);
            }
            (None, spec) => base.layers = spec.resolve(count)?,
        }
        Ok(base)
    }

    fn settings(&self, samples: usize, start: Option<&RouterSet>) -> Result<TrainSettings> {
        let (what, how) = (&self.what, &self.how);
        if !(how.epochs > 0.0 && how.epochs.is_finite()) {
            return bad(format!("--epochs is {}", how.epochs), "give a positive number");
        }
        if how.steps == Some(0) && start.is_none() {
            return bad("--steps is 0", "give 1 or more, or --routers to evaluate");
        }
        let val_split = if self.val.is_empty() { how.val_split } else { 0.0 };
        let training = samples as f64 * (1.0 - val_split);
        let steps = (training * how.epochs / how.batch.max(1) as f64).ceil() as usize;
        let target = what.target_capacity.unwrap_or(0.5);
        let evaluates = start.is_some() && how.steps == Some(0) && what.target_capacity.is_none();
        let own = RouterSettings {
            granularity: what.granularity,
            keys: what.keys,
            select: what.select,
            ..RouterSettings::default()
        };
        let mut router = start.map_or(own, |set| set.settings);
        router.threshold = what.threshold.unwrap_or(router.threshold);
        if router.select == Select::TopK && !evaluates {
            router.capacity = target;
        }
        let settings = TrainSettings {
            router,
            goal: how.loss.name(),
            ste: how.ste.name(),
            lr: how.lr,
            target,
            lambda: how.lambda,
            calibrate: what.threshold.is_none() && !evaluates,
            batch: how.batch,
            steps: how.steps.unwrap_or(steps),
            seed: how.seed,
            val_split,
        };
        settings.check()?;
        Ok(settings)
    }

    fn trainer(&self, base: &Base, settings: TrainSettings) -> Result<Trainer> {
        let Base { bundle, data, max_length, layers, .. } = base;
        let tuner = self.tuner(base, layers.clone(), *max_length, self.how.recompute)?;
        let plan = tuner.plan();
        eprintln!(
            "layers {}; {} for a step of {max_length} tokens beside {} of weights, activations of {} of {} layers kept",
            list(tuner.layers()),
            Size(plan.total() - plan.weights),
            Size(plan.weights),
            plan.kept,
            tuner.config().layers - plan.first,
        );
        let mut trainer = Trainer::new(tuner, settings, data.clone(), bundle.weights.fingerprint())?;
        if let Some(set) = &base.start {
            trainer.start_from(set)?;
        }
        if let Some(data) = &base.keep {
            trainer.keep(data.clone());
        }
        if let Some(data) = base.val.first() {
            trainer.hold_out(data.samples.clone());
        }
        Ok(trainer)
    }

    /// A model with routers that are zero: everything is active.
    fn tuner(
        &self,
        base: &Base,
        layers: impl IntoIterator<Item = usize>,
        rows: usize,
        recompute: bool,
    ) -> Result<Tuner> {
        let Base { bundle, settings, .. } = base;
        let routers = RouterSet {
            settings: settings.router,
            weights: layers.into_iter().map(|l| (l, vec![0.0; bundle.config.hidden])).collect(),
            thresholds: Default::default(),
            fingerprint: None,
            metadata: Default::default(),
            path: self.output.clone(),
        };
        let limits = StepLimits { rows, samples: SAMPLES, chunk: 256, recompute, memory: self.memory };
        let goal = if self.keep.is_some() { Goal::Dense } else { self.how.loss };
        let backend = training_backend(&Options { device: self.device, threads: self.threads, ..Options::default() })?;
        Tuner::new(bundle.config.clone(), &bundle.weights, routers, goal, limits, backend)
    }

    /// What the dense model does on the held-out samples.
    fn dense(&self, trainer: &mut Trainer) -> Result<Option<Evaluation>> {
        let dense = trainer.evaluate(false)?;
        if let Some(dense) = dense {
            eprintln!("held out: {} samples, dense loss {:.4}", trainer.held_out().len(), dense.loss);
        }
        Ok(dense)
    }

    /// The steps that are left, and the files of the result; None when ^C came before the end.
    fn train(&self, trainer: &mut Trainer, output: &Path, dense: Option<Evaluation>) -> Result<Option<Trained>> {
        let [checkpoint, log_path, plot_path] = ["checkpoint", "jsonl", "svg"].map(|name| beside(output, name));
        let mut log = Log::open(&log_path, trainer.state.step)?;
        let mut progress = Progress::new(trainer.state.step, trainer.settings().steps);
        while !trainer.is_done() {
            if interrupted() {
                trainer.save(&checkpoint)?;
                eprintln!("mindskip: stopped after step {}; go on with --resume", trainer.state.step);
                return Ok(None);
            }
            let report = match trainer.step() {
                Ok(report) => report,
                Err(e) => {
                    // The cause is told even when the steps before it cannot be kept.
                    if let Err(other) = trainer.save(&checkpoint) {
                        eprintln!("mindskip: {other}");
                    }
                    return Err(e);
                }
            };
            log.write(&report)?;
            progress.show(&report);
            if trainer.state.step.is_multiple_of(CHECKPOINT) {
                trainer.save(&checkpoint)?;
            }
        }
        drop(progress);
        trainer.save(&checkpoint)?;
        let (set, routed) = trainer.finish(dense)?;
        set.save(output)?;
        log.write(&json!({"dense": dense, "routed": routed, "thresholds": each_threshold(&set)}))?;
        let title = format!("{}, capacity {}", set.settings.granularity, trainer.settings().target);
        let charts = charts(&title, trainer.tuner().layers(), &Log::steps(&log_path)?);
        plot::save(&plot::lines(&charts)?, &plot_path)?;
        Ok(Some(Trained { set, routed }))
    }

    /// `found`: by data, what the dense model does there and what the routed one does.
    fn show(
        &self,
        set: &RouterSet,
        found: &[(&Path, Evaluation, Evaluation)],
        measured: Option<&Measured>,
    ) -> io::Result<()> {
        if self.json {
            let of = |(path, dense, routed): &_| json!({"data": path, "dense": dense, "routed": routed});
            return print_json(&json!({
                "routers": self.output,
                "layers": set.weights.keys().collect::<Vec<_>>(),
                "measured": measured.map(Measured::json),
                "thresholds": each_threshold(set),
                "held_out": found.iter().map(of).collect::<Vec<_>>(),
            }));
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{}: {}", self.output.display(), set.settings.granularity)?;
        let width = found.iter().map(|(path, ..)| path.as_os_str().len()).max().unwrap_or(0);
        if !found.is_empty() {
            writeln!(out, "{:width$}     dense   routed    change   capacity", "loss")?;
        }
        for (path, dense, routed) in found {
            let (change, capacity, path) = (routed.loss - dense.loss, routed.capacity * 100.0, path.display());
            writeln!(
                out,
                "{path:width$}    {:.4}   {:.4}   {change:+.4}     {capacity:5.1}%",
                dense.loss, routed.loss
            )?;
        }
        Ok(())
    }
}

/// By routed layer.
fn each_threshold(set: &RouterSet) -> Vec<f32> {
    set.weights.keys().map(|&layer| set.threshold(layer)).collect()
}

/// `FILE.extension`
fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

fn list(layers: &[usize]) -> String {
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// How far a run is.
struct Progress {
    bar: Bar,
    start: Instant,
    first: usize,
    steps: usize,
    tokens: usize,
}

impl Progress {
    fn new(first: usize, steps: usize) -> Progress {
        let bar = Bar::new("{wide_bar} {pos}/{len} {msg} {eta} left", first, steps);
        Progress { bar, start: Instant::now(), first, steps, tokens: 0 }
    }

    fn show(&mut self, report: &StepReport) {
        self.tokens += report.tokens;
        let seconds = self.start.elapsed().as_secs_f64();
        let rate = self.tokens as f64 / seconds;
        let text = format!("loss {:.4} capacity {:.3} {rate:.0} tok/s", report.loss, report.capacity);
        self.bar.show(report.step, &text, report.step == self.steps, || {
            let left = seconds / (report.step - self.first) as f64 * (self.steps - report.step) as f64;
            format!("step {}/{} {text}, {left:.0} s left", report.step, self.steps)
        });
    }
}
