//! `mindskip eval`.

mod table;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand};
use mindskip::bench::{Format, write};
use mindskip::bundle::Bundle;
use mindskip::engine::Engine;
use mindskip::eval::perplexity::{TextScore, Windows, perplexity};
use mindskip::eval::result::{Sample, save_samples};
use mindskip::eval::{Encoded, Record, Request, Room, Shots, Task, TaskScore, Work, score, task};
use mindskip::model::Routing;
use mindskip::tokenizer::Tokenizer;
use mindskip::{Error, Result};
use serde_json::json;

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
#[command(args_conflicts_with_subcommands = true)]
pub struct Eval {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    scored: Scored,
}

#[derive(Subcommand)]
enum What {
    Table(table::Table),
}

/// What is to be answered.
#[derive(Args)]
struct Asked {
    /// Records to answer, JSON lines.
    #[arg(value_name = "[TASK=]FILE", value_parser = named)]
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
}

#[derive(Args)]
struct Scored {
    #[command(flatten)]
    asked: Asked,
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
    /// By record: what stands in front of it, and its requests.
    encoded: Vec<(String, Vec<Encoded>)>,
    shots: usize,
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
        match self.what {
            Some(What::Table(table)) => table.run(),
            None => self.scored.run(),
        }
    }
}

impl Asked {
    /// Reads and tokenises everything. A request has room for as many tokens.
    fn prepare(&self, tokenizer: &Tokenizer, room: usize) -> Result<Vec<Prepared>> {
        if self.shots_from.is_some() && self.files.len() > 1 {
            return bad("--shots-from is for one task, there are several", "run them one by one");
        }
        if self.limit == Some(0) {
            return bad("--limit is 0", "give 1 or more");
        }
        let names: Vec<String> = self.files.iter().map(Named::name).collect();
        if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
            let cause = format!("{} is the second file of the task {name}", self.files[i].path.display());
            return bad(cause, "put the records into one file, or run them one by one");
        }
        self.files.iter().map(|file| self.task(file, tokenizer, room)).collect()
    }

    fn task(&self, file: &Named, tokenizer: &Tokenizer, room: usize) -> Result<Prepared> {
        let all = task::read(&file.path, file.task)?;
        let others = self.shots_from.as_deref().map(|path| task::read(path, file.task)).transpose()?;
        let spare = others.is_none() || file.task.is_some_and(Task::is_drawn_with_spare);
        let mut shots = Shots::new(others.as_deref().unwrap_or(&all), self.shots, self.shots_seed, spare);
        let records: Vec<Record> = all.iter().take(self.limit.unwrap_or(usize::MAX)).cloned().collect();
        let (mut requests, mut encoded) = (Vec::new(), Vec::new());
        for (number, record) in (1..).zip(&records) {
            let of = |e: Error| e.during(format!("reading record {number}")).at(&file.path);
            let before = shots.before(record).map_err(of)?;
            let asked = record.requests(&before);
            let ids = asked.iter().map(|request| request.encode(tokenizer, room)).collect::<Result<_>>().map_err(of)?;
            requests.push(asked);
            encoded.push((before, ids));
        }
        Ok(Prepared { name: file.name(), records, requests, encoded, shots: self.shots })
    }
}

impl Prepared {
    fn of(&self, found: &[Vec<f64>]) -> TaskScore {
        let cut = self.encoded.iter().flat_map(|(_, requests)| requests).filter(|request| request.cut).count();
        TaskScore::of(&self.name, self.shots, cut, &self.records, found)
    }

    fn score(&self, engine: &mut Engine, work: &Work) -> Result<Vec<Vec<f64>>> {
        let name = &self.name;
        let all = self.requests.iter().map(Vec::len).sum();
        let mut bar = Bar::new(&format!("{} {{wide_bar}} {{pos}}/{{len}} {{eta}} left", plain(name)), 0, all);
        score(engine, work, &mut |done| {
            bar.show(done, "", false, || format!("{name}: {done} of {all} choices"));
            stop()
        })
    }

    fn samples(&self, found: &[Vec<f64>]) -> Vec<Sample> {
        let mut samples = Vec::new();
        for ((record, requests), found) in self.records.iter().zip(&self.requests).zip(found) {
            let asked = requests.iter().zip(found).enumerate();
            samples.extend(asked.map(|(i, (request, &found))| Sample::choice(&self.name, record, i, request, found)));
        }
        samples
    }
}

/// What all of some work needs.
fn room<'a>(works: impl IntoIterator<Item = &'a Work>) -> Room {
    works.into_iter().map(Work::room).fold(Room { batch: 1, context: 1, rows: 1 }, |sum, own| Room {
        batch: sum.batch.max(own.batch),
        context: sum.context.max(own.context),
        rows: sum.rows.max(own.rows),
    })
}

fn works(tasks: &[Prepared], routing: Option<&Routing>) -> Vec<Work> {
    if routing.is_some_and(|routing| !routing.is_causal()) && !tasks.is_empty() {
        eprintln!("whole prompts decide what is active: every choice is a prompt of its own, and shares no K/V");
    }
    tasks.iter().map(|task| Work::new(&task.encoded, routing)).collect()
}

impl Scored {
    fn run(self) -> Ran {
        if self.asked.files.is_empty() && self.text.is_empty() {
            return Ok(bad("there is nothing to score", "name task files, or a text with --text")?);
        }
        let bundle = self.model.load()?;
        let name = bundle.name.clone();
        let routing = self.routing.routing(&bundle)?;
        let tokenizer = bundle.tokenizer()?;
        let tasks = self.asked.prepare(&tokenizer, self.run.context.unwrap_or(bundle.config.context))?;
        let text = |path: &PathBuf| {
            let text = read_text(path)?;
            Ok(Text { name: path.display().to_string(), bytes: text.len(), ids: tokenizer.encode(&text, true)? })
        };
        let texts: Vec<Text> = self.text.iter().map(text).collect::<Result<_>>()?;
        let windows = self.windows(&bundle);
        let works = works(&tasks, routing.as_ref());
        let mut engine = self.engine(bundle, routing, room(&works), &texts, windows)?;
        let start = Instant::now();
        let (mut scores, mut samples) = (Vec::new(), Vec::new());
        for (task, work) in tasks.iter().zip(&works) {
            let found = task.score(&mut engine, work)?;
            scores.push(task.of(&found));
            if self.samples.is_some() {
                samples.extend(task.samples(&found));
            }
        }
        let texts: Vec<TextScore> =
            texts.iter().map(|text| read(&mut engine, text, windows, &mut samples)).collect::<Result<_>>()?;
        let seconds = start.elapsed().as_secs_f64();
        let usage = Usage::of(&mut engine)?;
        let routing = routing_line(engine.routing());
        if self.json {
            let (capacity, tokens) = (usage.capacity(), usage.activity.tokens);
            print_json(&json!({
                "model": name, "routing": routing, "tasks": scores, "texts": texts,
                "capacity": capacity, "tokens": tokens, "seconds": seconds,
            }))?;
            return self.save(&samples);
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{name}; {routing}")?;
        for cut in scores.iter().filter(|task| task.cut > 0) {
            writeln!(out, "{}: {} requests lost the beginning of their context", cut.task, cut.cut)?;
        }
        write(Format::Md, &scores, &mut out)?;
        write(Format::Md, &texts, &mut out)?;
        if !usage.layers.is_empty() {
            writeln!(out, "\ncapacity {:.1}% of the routed layers", usage.capacity() * 100.0)?;
            usage.print_layers(&mut out)?;
        }
        out.flush()?;
        eprintln!("{} tokens in {seconds:.1} s", usage.activity.tokens);
        self.save(&samples)
    }

    /// After the scores were printed, so that they are not lost with a full disk.
    fn save(&self, samples: &[Sample]) -> Ran {
        self.samples.as_ref().map_or(Ok(()), |path| save_samples(path, samples))?;
        Ok(Outcome::Done)
    }

    fn windows(&self, bundle: &Bundle) -> Windows {
        let length = self.window.unwrap_or(bundle.config.context.min(1024));
        Windows { length, stride: self.stride.unwrap_or(length / 2) }
    }

    /// With room for the tasks and for a window of each text.
    fn engine(
        &self,
        bundle: Bundle,
        routing: Option<Routing>,
        mut room: Room,
        texts: &[Text],
        windows: Windows,
    ) -> Result<Engine> {
        for text in texts {
            windows.of(text.ids.len()).map_err(|e| e.at(&text.name))?;
            let window = windows.length.min(text.ids.len());
            room = Room { rows: room.rows.max(window), ..room.with_context(room.context.max(window)) };
        }
        if self.run.context.is_some_and(|context| context < room.context) {
            return bad(format!("a window of {} tokens is longer than --context", windows.length), "lower --window");
        }
        let room = room.with_context(self.run.context.unwrap_or(room.context));
        let mut engine = self.run.engine(bundle, routing, room.batch, room.context, room.rows)?;
        engine.watch(|_| stop());
        Ok(engine)
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
