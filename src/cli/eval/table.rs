//! `mindskip eval table`.

use std::env;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use mindskip::Result;
use mindskip::bench::{Format, Plan, Progress, Row, Setting, Subject, Way, measure};
use mindskip::engine::{Engine, Options};
use mindskip::eval::table::{TableRow, save, set_deltas, write};
use mindskip::eval::{Room, TaskScore};
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
    #[arg(long, default_value = "md", value_parser = format)]
    format: Format,
    /// Written in place of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
}

fn format(text: &str) -> Result<Format> {
    text.parse()
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
        let plan = self.plan(Subject::model(self.model.load()?), &ways)?;
        plan.check()?;

        let largest = ways.iter().flatten().max_by_key(|routing| routing.layers.len()).cloned();
        let Room { batch, context, rows } = room(&works(&tasks, None));
        let mut engine = self.run.engine(bundle, largest, batch, context, rows)?;
        engine.watch(|_| stop());
        let quality = ways.iter().map(|way| answer(&mut engine, way, &tasks)).collect::<Result<Vec<_>>>()?;
        drop(engine);
        let speeds = speeds(&plan)?;

        let command = command.join(" ");
        let mut table = Vec::new();
        for (i, ((capacity, scores), speed)) in quality.into_iter().zip(speeds).enumerate() {
            // The first one is dense.
            let routers = i.checked_sub(1).map(|i| self.routers[i].as_path());
            table.push(TableRow::new(&command, routers, capacity, &scores, speed));
        }
        set_deltas(&mut table);
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

/// The capacity that a way had over all tasks, and their scores.
fn answer(engine: &mut Engine, way: &Option<Routing>, tasks: &[Prepared]) -> Result<(f64, Vec<TaskScore>)> {
    engine.reroute(way.clone())?;
    engine.clear_counts()?;
    let works = works(tasks, way.as_ref());
    let scores = tasks.iter().zip(&works).map(|(task, work)| Ok(task.score(engine, work)?.0)).collect::<Result<_>>()?;
    let layers = way.as_ref().map_or(&[][..], |routing| &routing.layers);
    Ok((engine.activity()?.mean_capacity(layers), scores))
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
