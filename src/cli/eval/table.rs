//! `mindskip eval table`.

use std::env;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use mindskip::Result;
use mindskip::bench::{Format, Plan, Progress, Row, Setting, Subject, Way, measure};
use mindskip::engine::{Activity, Engine, Options};
use mindskip::eval::result::Right;
use mindskip::eval::table::{Quality, TableRow, save, write};
use mindskip::eval::{AnswerFile, Answers, Basis, Room, Work};
use mindskip::model::Routing;
use mindskip::router::RouterSet;

use super::super::args::{ModelArgs, RunArgs};
use super::super::progress::Bar;
use super::super::{Outcome, Ran, bad};
use super::{Asked, Prepared, room, stop, works};

/// Makes the paper's table: quality and measured speedup of the dense model and of routers
///
/// Scores are acc_norm where lm-evaluation-harness reports it, else acc, in percent. Speedups are those of `mindskip bench`: dense and
/// routed runs in turns over random tokens.
#[derive(Args)]
pub struct Table {
    #[command(flatten)]
    asked: Asked,
    /// Trained routers, a row for each.
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
    routers: Vec<PathBuf>,
    /// Keeps what is answered in this file, task by task, and takes from it what it has: a table that was broken off goes on.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    /// Tokens that are read in one prefill to measure the speed; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 256)]
    prompt: usize,
    /// Tokens that are decoded; 0 for none.
    #[arg(long = "gen", value_name = "N", default_value_t = 64)]
    generated: usize,
    /// Rounds that are measured, after one that is not.
    #[arg(long, value_name = "N", default_value_t = 5)]
    reps: usize,
    /// md, csv, json or jsonl.
    #[arg(long, default_value = "md")]
    format: Format,
    /// Written in place of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
}

impl Table {
    pub fn run(self) -> Ran {
        let command: Vec<_> = env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        if self.asked.files.is_empty() {
            return Ok(bad("there is nothing to score", "name task files")?);
        }
        let bundle = self.model.load()?;
        let mut ways = vec![None];
        for path in &self.routers {
            let set = RouterSet::open(path)?;
            set.check(&bundle.config, &bundle.weights.fingerprint())?;
            ways.push(Some(Routing::routers(set)));
        }
        let context = self.run.context.unwrap_or(bundle.config.context);
        let tasks = self.asked.prepare(&bundle.tokenizer()?, context)?;
        let mut known = self.answers.as_deref().map(AnswerFile::open).transpose()?;
        let model = bundle.weights.fingerprint();
        let plan = self.plan(Subject::model(self.model.load()?), &ways)?;
        plan.check()?;

        let largest = ways.iter().flatten().max_by_key(|routing| routing.layers.len()).cloned();
        let Room { batch, context, rows } = room(&works(&tasks, None));
        let mut engine = self.run.engine(bundle, largest, batch, context, rows)?;
        engine.watch(|_| stop());
        let mut quality = Vec::new();
        for way in &ways {
            engine.reroute(way.clone())?;
            quality.push(answer(&mut engine, &model, &tasks, known.as_mut())?);
        }
        drop(engine);
        let speeds = speeds(&plan)?;

        let command = command.join(" ");
        let mut table = Vec::new();
        for (i, (own, speed)) in quality.iter().zip(speeds).enumerate() {
            // The first one is dense.
            let routers = i.checked_sub(1).map(|i| self.routers[i].as_path());
            table.push(TableRow::new(&command, routers, own, &quality[0], speed));
        }
        if let Some(path) = &self.output {
            save(self.format, &table, path)?;
            return Ok(Outcome::Done);
        }
        let mut out = io::stdout().lock();
        write(self.format, &table, &mut out)?;
        out.flush()?;
        Ok(Outcome::Done)
    }

    fn plan(&self, subject: Subject, ways: &[Option<Routing>]) -> Result<Plan> {
        let Options { device, dtype, kv_dtype, threads, precision, kernels, memory, .. } = self.run.options(1, 1, 1)?;
        Ok(Plan {
            subject,
            settings: vec![Setting { device, dtype, kv_dtype, threads, precision, kernels, memory }],
            batches: vec![1],
            depths: vec![0],
            prompts: vec![self.prompt],
            generated: vec![self.generated],
            ways: ways.iter().map(|routing| Way { routing: routing.clone() }).collect(),
            warmup: 1,
            reps: self.reps,
            seed: 0,
        })
    }
}

/// Answers all tasks, as the engine is routed.
fn answer(engine: &mut Engine, model: &str, tasks: &[Prepared], mut known: Option<&mut AnswerFile>) -> Result<Quality> {
    let works = works(tasks, engine.routing());
    let mut quality = Quality { capacity: 1.0, scores: Vec::new(), right: Vec::new() };
    let mut activity = Activity::default();
    for (task, work) in tasks.iter().zip(&works) {
        let of = Basis::new(engine, model, &task.name, &task.encoded);
        let answers = match known.as_ref().and_then(|known| known.get(&of, &task.encoded, engine.config().layers)) {
            Some(answers) => answers.clone(),
            None => {
                let answers = ask(engine, of, task, work)?;
                known.as_mut().map_or(Ok(()), |known| known.add(answers.clone()))?;
                answers
            }
        };
        activity.add(&answers.activity);
        quality.scores.push(task.of(&answers.loglikelihoods));
        quality.right.push(Right::of(&task.records, &answers.loglikelihoods).main(&task.name));
    }
    quality.capacity = activity.mean_capacity(engine.routing().map_or(&[][..], |routing| &routing.layers));
    Ok(quality)
}

fn ask(engine: &mut Engine, of: Basis, task: &Prepared, work: &Work) -> Result<Answers> {
    engine.clear_counts()?;
    let loglikelihoods = task.score(engine, work)?;
    Ok(Answers { of, loglikelihoods, activity: engine.activity()?.clone() })
}

/// A row for each way.
fn speeds(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut bar = Bar::new("measuring {msg}", 0, 1);
    let told = &mut |progress: &Progress| {
        let message = format!("{} of {}: {}", progress.done, progress.all, progress.now);
        bar.show(progress.done, &message, false, || format!("measuring {message}"));
        stop()
    };
    measure(plan, told, &mut |more| rows.extend(more))?;
    Ok(rows)
}
