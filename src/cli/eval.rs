//! `mindskip eval`.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use mindskip::bench::{Format, write};
use mindskip::bundle::Bundle;
use mindskip::engine::Engine;
use mindskip::eval::perplexity::{TextScore, Windows, perplexity};
use mindskip::eval::result::{Sample, save_samples};
use mindskip::eval::score::can_share;
use mindskip::eval::{Encoded, Record, Request, Room, Shots, Task, TaskScore, Work, score, task};
use mindskip::model::Routing;
use mindskip::tokenizer::Tokenizer;
use mindskip::{Error, Result};
use serde_json::{Value, json};

use super::args::{ModelArgs, RoutingArgs, RunArgs};
use super::generate::read_text;
use super::progress::{Bar, catch_interrupts, interrupted};
use super::show::{Usage, routing_line};
use super::{Outcome, Ran, bad, print_json};

/// Scores answers of multiple choice by their log-likelihood, and long texts by perplexity
///
/// Prompts, tokens and scores are those of lm-evaluation-harness. A TASK is arc_challenge, arc_easy, boolq, hellaswag, mmlu,
/// openbookqa, piqa, rte or winogrande, as published; it can be left out where the file is named after it. Other files have their
/// prompts written out: docs/quality.md has the fields.
#[derive(Args)]
pub struct Eval {
    /// Records to answer, JSON lines.
    #[arg(value_name = "[TASK=]FILE", required_unless_present = "text", value_parser = named)]
    files: Vec<Named>,
    /// Answer only the first N records of each file.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Solved records in front of each question.
    #[arg(long, value_name = "N", default_value_t = 0)]
    shots: usize,
    /// Where they are from; the file itself, without the question, when nothing is given.
    #[arg(long, value_name = "FILE", requires = "shots")]
    shots_from: Option<PathBuf>,
    /// Draw them anew for each question, as the harness does with 1234; the first ones, as it does for MMLU, when nothing is
    /// given, which is faster: they are read once.
    #[arg(long, value_name = "SEED", requires = "shots")]
    shots_seed: Option<u32>,
    /// A text file whose perplexity is wanted.
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Tokens of a text that are read together; 1024, or what the model was made for when that is less.
    #[arg(long, value_name = "N", requires = "text")]
    window: Option<usize>,
    /// Tokens from the beginning of a window to that of the next; half a window when nothing is given.
    #[arg(long, value_name = "N", requires = "text")]
    stride: Option<usize>,
    /// Writes every request and its log-likelihood as JSON lines.
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// A file, and its task if that is known.
#[derive(Debug, Clone)]
struct Named {
    task: Option<Task>,
    path: PathBuf,
}

fn named(text: &str) -> Result<Named> {
    if let Some((name, path)) = text.split_once('=') {
        match name.parse() {
            Ok(task) => return Ok(Named { task: Some(task), path: path.into() }),
            Err(e) if !Path::new(text).exists() => return Err(e),
            Err(_) => {}
        }
    }
    let path = PathBuf::from(text);
    Ok(Named { task: Task::of(&path), path })
}

impl Named {
    fn name(&self) -> String {
        let stem = || self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        self.task.map_or_else(stem, |task| task.name().to_string())
    }
}

/// A task, ready to run.
struct Prepared {
    name: String,
    records: Vec<Record>,
    requests: Vec<Vec<Request>>,
    cut: usize,
    work: Work,
}

/// A text, ready to run.
struct Text {
    name: String,
    bytes: usize,
    ids: Vec<u32>,
}

impl Eval {
    pub fn run(self) -> Ran {
        let _noted = catch_interrupts();
        let bundle = self.model.load()?;
        let name = bundle.name.clone();
        let routing = self.routing.routing(&bundle)?;
        let (tasks, texts) = self.prepare(&bundle, routing.as_ref())?;
        if routing.as_ref().is_some_and(|routing| !can_share(routing)) && !tasks.is_empty() {
            eprintln!("whole prompts decide what is active: every choice is a prompt of its own, and shares no K/V");
        }
        let windows = self.windows(&bundle);
        let mut engine = self.engine(bundle, routing, &tasks, &texts, windows)?;
        let start = Instant::now();
        let mut samples = Vec::new();
        let tasks: Vec<TaskScore> =
            tasks.iter().map(|task| self.score(&mut engine, task, &mut samples)).collect::<Result<_>>()?;
        let texts: Vec<TextScore> =
            texts.iter().map(|text| read(&mut engine, text, windows, &mut samples)).collect::<Result<_>>()?;
        let seconds = start.elapsed().as_secs_f64();
        if let Some(path) = &self.samples {
            save_samples(path, &samples)?;
        }
        let usage = Usage::of(&mut engine)?;
        let routing = routing_line(engine.routing());
        if self.json {
            let mut value = json!({"model": name, "routing": routing, "tasks": tasks, "texts": texts});
            let rest = json!({"capacity": usage.capacity(), "tokens": usage.activity.tokens, "seconds": seconds});
            if let (Value::Object(value), Value::Object(rest)) = (&mut value, rest) {
                value.extend(rest);
            }
            print_json(&value)?;
            return Ok(Outcome::Done);
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{name}; {routing}")?;
        for cut in tasks.iter().filter(|task| task.cut > 0) {
            writeln!(out, "{}: {} requests lost the beginning of their context", cut.task, cut.cut)?;
        }
        write(Format::Md, &tasks, &mut out)?;
        write(Format::Md, &texts, &mut out)?;
        if !usage.layers.is_empty() {
            writeln!(out, "\ncapacity {:.1}% of the routed layers", usage.capacity() * 100.0)?;
            usage.print_layers(&mut out)?;
        }
        out.flush()?;
        eprintln!("{} tokens in {seconds:.1} s", usage.activity.tokens);
        Ok(Outcome::Done)
    }

    /// Reads and tokenises everything before anything runs.
    fn prepare(&self, bundle: &Bundle, routing: Option<&Routing>) -> Result<(Vec<Prepared>, Vec<Text>)> {
        if self.shots_from.is_some() && self.files.len() > 1 {
            return bad("--shots-from is for one task, there are several", "run them one by one");
        }
        if self.limit == Some(0) {
            return bad("--limit is 0", "give 1 or more");
        }
        let tokenizer = bundle.tokenizer()?;
        let room = self.run.context.unwrap_or(bundle.config.context);
        let tasks = self.files.iter().map(|file| self.task(file, &tokenizer, room, routing)).collect::<Result<_>>()?;
        let text = |path: &PathBuf| {
            let text = read_text(path)?;
            Ok(Text { name: path.display().to_string(), bytes: text.len(), ids: tokenizer.encode(&text, true)? })
        };
        Ok((tasks, self.text.iter().map(text).collect::<Result<_>>()?))
    }

    fn task(&self, file: &Named, tokenizer: &Tokenizer, room: usize, routing: Option<&Routing>) -> Result<Prepared> {
        let all = task::read(&file.path, file.task)?;
        let from = self.shots_from.as_deref().filter(|_| self.shots > 0);
        let others = from.map(|path| task::read(path, file.task)).transpose()?;
        let spare = others.is_none() || file.task.is_some_and(Task::is_drawn_with_spare);
        let mut shots = Shots::new(others.as_deref().unwrap_or(&all), self.shots, self.shots_seed, spare);
        let records: Vec<Record> = all.iter().take(self.limit.unwrap_or(usize::MAX)).cloned().collect();
        let (mut requests, mut encoded, mut cut) = (Vec::new(), Vec::new(), 0);
        for (number, record) in (1..).zip(&records) {
            let of = |e: Error| e.during(format!("reading record {number}")).at(&file.path);
            let before = shots.before(record).map_err(of)?;
            let asked = record.requests(&before);
            let ids: Vec<Encoded> =
                asked.iter().map(|request| request.encode(tokenizer, room)).collect::<Result<_>>().map_err(of)?;
            cut += ids.iter().filter(|ids| ids.cut).count();
            requests.push(asked);
            encoded.push((before, ids));
        }
        Ok(Prepared { name: file.name(), records, requests, cut, work: Work::new(encoded, routing) })
    }

    fn windows(&self, bundle: &Bundle) -> Windows {
        let length = self.window.unwrap_or(bundle.config.context.min(1024));
        Windows { length, stride: self.stride.unwrap_or(length / 2) }
    }

    /// With room for all that is to run.
    fn engine(
        &self,
        bundle: Bundle,
        routing: Option<Routing>,
        tasks: &[Prepared],
        texts: &[Text],
        windows: Windows,
    ) -> Result<Engine> {
        let mut room = Room { batch: 1, context: 1, rows: 1 };
        for text in texts {
            windows.of(text.ids.len()).map_err(|e| e.at(&text.name))?;
            let context = windows.length.min(text.ids.len());
            room = Room { context: room.context.max(context), rows: room.rows.max(context), ..room };
        }
        for Room { batch, context, rows } in tasks.iter().map(|task| task.work.room()) {
            room = Room { batch: room.batch.max(batch), context: room.context.max(context), rows: room.rows.max(rows) };
        }
        if self.run.context.is_some_and(|context| context < room.context) {
            return bad(format!("a window of {} tokens is longer than --context", windows.length), "lower --window");
        }
        let mut engine = self.run.engine(bundle, routing, room.batch, room.context, room.rows)?;
        engine.watch(|_| stop());
        Ok(engine)
    }

    fn score(&self, engine: &mut Engine, task: &Prepared, samples: &mut Vec<Sample>) -> Result<TaskScore> {
        let name = &task.name;
        let all = task.requests.iter().map(Vec::len).sum();
        let mut bar = Bar::new(&format!("{} {{wide_bar}} {{pos}}/{{len}} {{eta}} left", plain(name)), 0, all);
        let found = score(engine, &task.work, &mut |done| {
            bar.show(done, "", false, || format!("{name}: {done} of {all} choices"));
            stop()
        })?;
        drop(bar);
        for ((record, requests), found) in task.records.iter().zip(&task.requests).zip(&found) {
            for (choice, (request, &loglikelihood)) in requests.iter().zip(found).enumerate() {
                samples.push(Sample::choice(name, record, choice, request, loglikelihood));
            }
        }
        Ok(TaskScore::of(name, self.shots, task.cut, &task.records, &found))
    }
}

fn read(engine: &mut Engine, text: &Text, windows: Windows, samples: &mut Vec<Sample>) -> Result<TextScore> {
    let all = windows.of(text.ids.len())?.len();
    let mut bar = Bar::new(&format!("{} {{wide_bar}} {{pos}}/{{len}} {{eta}} left", plain(&text.name)), 0, all);
    let (score, found) = perplexity(engine, &text.name, &text.ids, text.bytes, windows, &mut |done| {
        bar.show(done, "", false, || format!("{}: {done} of {all} windows", text.name));
        stop()
    })?;
    samples.extend(found.into_iter().map(|window| Sample::Window { text: text.name.clone(), window }));
    Ok(score)
}

/// A name within a template.
fn plain(name: &str) -> String {
    name.replace(['{', '}'], "")
}

fn stop() -> ControlFlow<()> {
    if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}
