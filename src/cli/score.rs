//! `mindskip score`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use mindskip::engine::LayerTrace;
use serde_json::{Value, json};

use super::args::{ModelArgs, RoutingArgs, RunArgs};
use super::generate::{read_text, too_long};
use super::progress::catch_interrupts;
use super::show::{Usage, routing_line};
use super::{Outcome, Ran, bad, print_json};

/// The log-probability of every token of a text
#[derive(Args)]
pub struct Score {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: Input,
    /// With --json: also what each routed layer decided, and the scores behind it.
    #[arg(long, requires = "json")]
    trace: bool,
    /// One JSON object: ids, logprobs and, with --trace, layers.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Token ids: 1,2,3.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
    /// A text.
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// A text file.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Score {
    pub fn run(self) -> Ran {
        let _noted = catch_interrupts();
        let bundle = self.model.load()?;
        let routing = self.routing.routing(&bundle)?;
        let ids = match &self.input {
            Input { ids: Some(ids), .. } => ids.clone(),
            Input { text: Some(text), .. } => bundle.tokenizer()?.encode(text, true)?,
            Input { file: Some(path), .. } => bundle.tokenizer()?.encode(&read_text(path)?, true)?,
            _ => unreachable!("clap asks for one"),
        };
        let given = self.input.text.as_deref().unwrap_or("some");
        if ids.is_empty() || given.is_empty() {
            return Ok(bad("there is nothing to score", "give at least one token")?);
        }
        let room = self.run.context.unwrap_or(bundle.config.context);
        if ids.len() > room {
            return Err(too_long(ids.len(), room).into());
        }
        let mut engine = self.run.engine(bundle, routing, 1, ids.len(), ids.len())?;
        let seq = engine.open()?;
        engine.prefill(&[(seq, &ids)])?;
        let logprobs = engine.logprobs(&ids[1..])?;
        let logprobs: Vec<Option<f32>> = std::iter::once(None).chain(logprobs.into_iter().map(Some)).collect();

        if self.json {
            let mut value = json!({"ids": ids, "logprobs": logprobs});
            if self.trace {
                value["layers"] = engine.trace()?.into_iter().map(trace_json).collect();
            }
            print_json(&value)?;
            return Ok(Outcome::Done);
        }
        let known: Vec<f64> = logprobs.iter().flatten().map(|&x| f64::from(x)).collect();
        let loss = -known.iter().sum::<f64>() / known.len() as f64;
        let usage = Usage::of(&mut engine)?;
        let mut out = io::stdout().lock();
        writeln!(out, "{} tokens; {}", ids.len(), routing_line(engine.routing()))?;
        if !known.is_empty() {
            writeln!(out, "loss {loss:.4} per token, perplexity {:.3}", loss.exp())?;
        }
        if !usage.layers.is_empty() {
            writeln!(out, "capacity {:.1}% of the routed layers", usage.capacity() * 100.0)?;
            usage.print_layers(&mut out)?;
        }
        writeln!(out, "K/V {}", usage.kv_line())?;
        Ok(Outcome::Done)
    }
}

pub fn trace_json(trace: LayerTrace) -> Value {
    let active: Vec<u8> = trace.active.into_iter().map(u8::from).collect();
    json!({"layer": trace.layer, "active": active, "scores": trace.scores})
}
