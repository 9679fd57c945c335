//! `mindskip tune`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Options, training_backend};
use mindskip::memory::{Budget, Size, parse_budget};
use mindskip::router::{Granularity, Keys, LayerSpec, RouterSet, RouterSettings, Select};
use mindskip::tune::data::{Dataset, Encoder};
use mindskip::tune::plan::StepLimits;
use mindskip::tune::train::{Evaluation, StepReport, TrainSettings, Trainer};
use mindskip::tune::{Goal, Ste, Tuner};
use mindskip::{Error, Kind, Result};
use serde_json::json;

use super::args::{self, ModelArgs};
use super::progress::{catch_interrupts, interrupted};
use super::{Outcome, Ran, bad, print_json};

/// Trains routers for a model, which itself stays as it is (Router-Tuning)
#[derive(Args)]
pub struct Tune {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON lines, or one JSON array: records with messages, prompt and completion, or instruction, input and output.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where the routers go. Its log is FILE.jsonl, its checkpoint FILE.checkpoint.
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
    #[arg(long, default_value = "cpu", value_parser = args::device)]
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
    #[arg(long, value_name = "NAME", default_value = "attn_token", value_parser = str::parse::<Granularity>)]
    granularity: Granularity,
    /// Routed layers: last:N (before the final one), all, 3-9, 1,2,5. The upper half when nothing is given.
    #[arg(long, value_parser = str::parse::<LayerSpec>)]
    layers: Option<LayerSpec>,
    /// The share of (token, routed layer) pairs that shall be active.
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, allow_negative_numbers = true)]
    target_capacity: f32,
    /// Whose keys and values a routed layer holds: all, active.
    #[arg(long, value_name = "WHOSE", default_value = "all", value_parser = str::parse::<Keys>)]
    keys: Keys,
    /// How scores decide: threshold, or topk: the target capacity of each sample.
    #[arg(long, value_name = "HOW", default_value = "threshold", value_parser = str::parse::<Select>)]
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
    #[arg(long, default_value = "lm", value_parser = str::parse::<Goal>)]
    loss: Goal,
    /// Whose masks have a gradient: full, everyone's; active, the active rows'.
    #[arg(long, default_value = "full", value_parser = str::parse::<Ste>)]
    ste: Ste,
    /// Weight of the penalty on the capacity; found by a controller when nothing is given.
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda: Option<f32>,
    /// Learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 1e-3, allow_negative_numbers = true)]
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
/// Between two lines where there is no terminal.
const LINES: Duration = Duration::from_secs(5);

impl Tune {
    pub fn run(self) -> Ran {
        let _noted = catch_interrupts();
        let checkpoint = beside(&self.output, "checkpoint");
        let mut trainer = self.trainer()?;
        if self.resume {
            trainer.resume(&checkpoint)?;
        }
        let mut record = Record::open(&beside(&self.output, "jsonl"), trainer.state.step)?;
        let dense = trainer.evaluate(false)?;
        if let Some(dense) = dense {
            eprintln!("held out: {} samples, dense loss {:.4}", trainer.held_out().len(), dense.loss);
        }
        let mut progress = Progress::new(trainer.state.step, trainer.settings().steps);
        while !trainer.is_done() {
            if interrupted() {
                trainer.save(&checkpoint)?;
                eprintln!("mindskip: stopped after step {}; go on with --resume", trainer.state.step);
                return Ok(Outcome::Interrupted);
            }
            let report = match trainer.step() {
                Ok(report) => report,
                Err(e) => {
                    trainer.save(&checkpoint)?;
                    return Err(e.into());
                }
            };
            record.write(&json!(report))?;
            progress.show(&report);
            if trainer.state.step.is_multiple_of(CHECKPOINT) {
                trainer.save(&checkpoint)?;
            }
        }
        progress.finish();
        trainer.save(&checkpoint)?;
        let (set, routed) = trainer.finish(dense)?;
        set.save(&self.output)?;
        record.write(&json!({"dense": dense, "routed": routed, "threshold": set.settings.threshold}))?;
        self.show(&set, dense, routed)?;
        Ok(Outcome::Done)
    }

    fn trainer(&self) -> Result<Trainer> {
        let bundle = self.model.load()?;
        let (tokenizer, template) = (bundle.tokenizer()?, bundle.chat_template()?);
        let max_length = self.how.max_length.min(bundle.config.context);
        let encoder = Encoder { tokenizer: &tokenizer, template: template.as_ref(), eos: bundle.eos(), max_length };
        let data = Dataset::open(&self.data, &encoder)?;
        eprintln!(
            "{}: {} samples, {} cut to {max_length} tokens, {} dropped without an answer",
            self.data.display(),
            data.samples.len(),
            data.truncated,
            data.dropped
        );
        let settings = self.settings(data.samples.len())?;
        let fingerprint = bundle.weights.fingerprint();
        let tuner = self.tuner(bundle, settings.router, max_length)?;
        eprintln!(
            "layers {}; {} for a step of {max_length} tokens beside {} of weights",
            list(tuner.layers()),
            Size(tuner.plan().total() - tuner.plan().weights),
            Size(tuner.plan().weights)
        );
        Trainer::new(tuner, settings, data, fingerprint)
    }

    fn settings(&self, samples: usize) -> Result<TrainSettings> {
        let (what, how) = (&self.what, &self.how);
        if !(how.epochs > 0.0 && how.epochs.is_finite()) {
            return bad(format!("--epochs is {}", how.epochs), "give a positive number");
        }
        let training = samples as f64 * (1.0 - how.val_split);
        let steps = (training * how.epochs / how.batch.max(1) as f64).ceil() as usize;
        let router = RouterSettings {
            granularity: what.granularity,
            keys: what.keys,
            select: what.select,
            threshold: what.threshold.unwrap_or(0.5),
            capacity: if what.select == Select::TopK { what.target_capacity } else { 0.5 },
        };
        let settings = TrainSettings {
            router,
            goal: how.loss.name(),
            ste: how.ste.name(),
            lr: how.lr,
            target: what.target_capacity,
            lambda: how.lambda,
            calibrate: what.threshold.is_none(),
            batch: how.batch,
            steps: how.steps.unwrap_or(steps),
            seed: how.seed,
            val_split: how.val_split,
        };
        settings.check()?;
        Ok(settings)
    }

    /// A model with routers that are zero: everything is active.
    fn tuner(&self, bundle: Bundle, router: RouterSettings, max_length: usize) -> Result<Tuner> {
        let half = bundle.config.layers.div_ceil(2).min(bundle.config.layers - 1).max(1);
        let layers = self.what.layers.clone().unwrap_or(LayerSpec::Last(half)).resolve(bundle.config.layers)?;
        let routers = RouterSet {
            settings: router,
            weights: layers.into_iter().map(|l| (l, vec![0.0; bundle.config.hidden])).collect(),
            fingerprint: None,
            metadata: Default::default(),
            path: self.output.clone(),
        };
        let limits = StepLimits { rows: max_length, samples: SAMPLES, chunk: 256, memory: self.memory };
        let backend = training_backend(&Options { device: self.device, threads: self.threads, ..Options::default() })?;
        Tuner::new(bundle.config, &bundle.weights, routers, self.how.loss, limits, backend)
    }

    fn show(&self, set: &RouterSet, dense: Option<Evaluation>, routed: Option<Evaluation>) -> io::Result<()> {
        let settings = set.settings;
        if self.json {
            return print_json(&json!({
                "routers": self.output,
                "layers": set.weights.keys().collect::<Vec<_>>(),
                "threshold": settings.threshold,
                "dense": dense,
                "routed": routed,
            }));
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{}: {}, threshold {}", self.output.display(), settings.granularity, settings.threshold)?;
        if let (Some(dense), Some(routed)) = (dense, routed) {
            let change = routed.loss - dense.loss;
            writeln!(out, "held out      loss   capacity")?;
            writeln!(out, "dense       {:.4}     100.0%", dense.loss)?;
            writeln!(out, "routed      {:.4}     {:5.1}%   ({change:+.4})", routed.loss, routed.capacity * 100.0)?;
        }
        Ok(())
    }
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

/// The log: one JSON object a step.
struct Record {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Record {
    /// With the steps that were taken before: those up to `taken` of the log that is there.
    fn open(path: &Path, taken: usize) -> Result<Record> {
        let old = if taken > 0 { std::fs::read_to_string(path).map_err(|e| failed(path, &e))? } else { String::new() };
        let is_kept = |line: &&str| {
            let step = serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v["step"].as_u64());
            step.is_some_and(|step| step <= taken as u64)
        };
        let file = File::create(path).map_err(|e| failed(path, &e))?;
        let mut record = Record { path: path.into(), file: BufWriter::new(file) };
        old.lines().filter(is_kept).try_for_each(|line| record.line(line))?;
        Ok(record)
    }

    fn write(&mut self, value: &serde_json::Value) -> Result<()> {
        self.line(&value.to_string())
    }

    fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.file, "{line}").and_then(|()| self.file.flush()).map_err(|e| failed(&self.path, &e))
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::new(Kind::Io, format!("the log cannot be written: {error}")).at(path).action("check the path and the disk")
}

/// A bar on a terminal, now and then a line elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
    said: Option<Instant>,
    first: usize,
    steps: usize,
    tokens: usize,
}

impl Progress {
    fn new(first: usize, steps: usize) -> Progress {
        let target = ProgressDrawTarget::stderr();
        let bar = (!target.is_hidden()).then(|| {
            let style =
                ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {eta} left").expect("a fixed template");
            let bar = ProgressBar::with_draw_target(Some(steps as u64), target).with_style(style);
            bar.with_position(first as u64)
        });
        Progress { bar, start: Instant::now(), said: None, first, steps, tokens: 0 }
    }

    fn show(&mut self, report: &StepReport) {
        self.tokens += report.tokens;
        let seconds = self.start.elapsed().as_secs_f64();
        let rate = self.tokens as f64 / seconds;
        let text = format!("loss {:.4} capacity {:.3} {rate:.0} tok/s", report.loss, report.capacity);
        if let Some(bar) = &self.bar {
            bar.set_position(report.step as u64);
            bar.set_message(text);
        } else if report.step == self.steps || self.said.is_none_or(|said| said.elapsed() > LINES) {
            let left = seconds / (report.step - self.first) as f64 * (self.steps - report.step) as f64;
            eprintln!("step {}/{} {text}, {left:.0} s left", report.step, self.steps);
            self.said = Some(Instant::now());
        }
    }

    fn finish(&mut self) {
        self.bar.take().inspect(ProgressBar::finish_and_clear);
    }
}
