//! `mindskip inspect`.

use std::io::{self, Write};
use std::path::Path;

use clap::Args;
use mindskip::bundle::{Bundle, EMBEDDED};
use mindskip::config::{Config, Rope, Scaling};
use mindskip::engine::Engine;
use mindskip::memory::{MemoryPlan, Size};
use mindskip::model::{Gates, Routing};
use mindskip::router::RouterSet;
use mindskip::{Error, Result};
use serde_json::{Map, Value, json};

use super::args::{RoutingArgs, RunArgs};
use super::show::{layer_list, routing_line, settings_line};
use super::{Outcome, Ran, print_json};

/// What a model or a router file is, and what memory a run would take
#[derive(Args)]
pub struct Inspect {
    /// The embedded model, a model folder, an id on the hub, or a router file.
    #[arg(default_value = EMBEDDED)]
    name: String,
    /// Sequences that run together.
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Lists every buffer of the memory plan.
    #[arg(long)]
    plan: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    run: RunArgs,
}

impl Inspect {
    pub fn run(self) -> Ran {
        let path = Path::new(&self.name);
        if self.name != EMBEDDED && path.is_file() && path.extension().is_some_and(|e| e == "safetensors") {
            let mut set = RouterSet::open(path)?;
            set.apply(&self.routing.overrides())?;
            if self.json {
                print_json(&routers_json(&set))?;
            } else {
                let mut out = io::stdout().lock();
                writeln!(out, "{}", path.display())?;
                print_routers(&mut out, &set)?;
            }
            return Ok(Outcome::Done);
        }
        let bundle = Bundle::load(&self.name)?;
        let routing = self.routing.routing(&bundle)?;
        let context = bundle.config.context.min(4096);
        let context = self.run.context.unwrap_or(context);
        let options = self.run.options(self.batch, context, context)?;
        let plan = Engine::plan_for(&bundle.config, &bundle.weights, routing.as_ref(), &options);
        if self.json {
            print_json(&model_json(&bundle, routing.as_ref(), &plan))?;
        } else {
            self.print(&bundle, routing.as_ref(), &plan)?;
        }
        plan?;
        Ok(Outcome::Done)
    }

    fn print(&self, bundle: &Bundle, routing: Option<&Routing>, plan: &Result<MemoryPlan>) -> io::Result<()> {
        let (c, weights) = (&bundle.config, &bundle.weights);
        let mut out = io::stdout().lock();
        let place = bundle.dir.as_ref().map_or("embedded".into(), |dir| dir.display().to_string());
        writeln!(out, "{} ({place})", bundle.name)?;
        let mut line = |name: &str, text: String| writeln!(out, "  {name:<13} {text}");
        line(
            "architecture",
            format!("{}, {} layers, hidden {}, MLP {}", c.family, c.layers, c.hidden, c.intermediate),
        )?;
        line("attention", format!("{} heads of {} on {} K/V heads{}", c.heads, c.head_dim, c.kv_heads, windows(c)))?;
        line("positions", format!("{} tokens, {}", c.context, rope(&c.rope)))?;
        let head = if c.tied { "tied to the embedding" } else { "of its own" };
        line("vocabulary", format!("{} tokens, output head {head}", c.vocab))?;
        let dtypes: Vec<_> = weights.dtypes().iter().map(|(d, n)| format!("{} {d}", Size(*n as u64))).collect();
        let parameters = weights.parameters() as f64 / 1e6;
        line(
            "weights",
            format!("{parameters:.1}M parameters, {}, {} file(s)", dtypes.join(" + "), weights.files().len()),
        )?;
        line(
            "tokenizer",
            match bundle.tokenizer() {
                Ok(t) => format!(
                    "{} ids{}",
                    t.vocab_size(),
                    if t.vocab_size() < c.vocab { ", fewer than the model has" } else { "" }
                ),
                Err(e) => format!("none: {e}"),
            },
        )?;
        line(
            "chat template",
            match bundle.chat_template() {
                Ok(Some(_)) => "yes".into(),
                Ok(None) => "none".into(),
                Err(e) => format!("broken: {e}"),
            },
        )?;
        line("fingerprint", weights.fingerprint())?;
        match routing {
            None => line("routers", "none; --routers FILE looks at some".into())?,
            Some(Routing { gates: Gates::Routers(set), .. }) => print_routers(&mut out, set)?,
            Some(_) => line("routers", routing_line(routing))?,
        }
        match plan {
            Err(e) => writeln!(out, "  {:<13} {e}", "memory"),
            Ok(plan) => print_plan(&mut out, plan, routing, self.plan),
        }
    }
}

fn windows(c: &Config) -> String {
    match (c.windows.iter().flatten().next(), c.windows.iter().flatten().count()) {
        (Some(w), n) if n == c.layers => format!(", sliding window of {w}"),
        (Some(w), n) => format!(", sliding window of {w} in {n} layers"),
        (None, _) => String::new(),
    }
}

fn rope(rope: &Rope) -> String {
    match rope.scaling {
        Scaling::None => format!("rope_theta {}", rope.theta),
        Scaling::Linear { factor } => format!("rope_theta {}, linear scaling by {factor}", rope.theta),
        Scaling::Llama3 { factor, original_context, .. } => {
            format!("rope_theta {}, llama3 scaling by {factor} from {original_context}", rope.theta)
        }
    }
}

fn print_routers(out: &mut dyn Write, set: &RouterSet) -> io::Result<()> {
    let layers: Vec<_> = set.weights.keys().copied().collect();
    let width = set.weights.values().next().map_or(0, Vec::len);
    writeln!(out, "  {:<13} {}", "routers", settings_line(&set.settings))?;
    writeln!(out, "  {:<13} {} layers, {}, hidden {width}", "", layers.len(), layer_list(&layers))?;
    if let Some(fingerprint) = &set.fingerprint {
        writeln!(out, "  {:<13} for the model {fingerprint}", "")?;
    }
    for (name, value) in set.metadata.iter().filter(|(name, _)| *name != "format") {
        writeln!(out, "  {:<13} {name}: {value}", "")?;
    }
    Ok(())
}

fn print_plan(out: &mut dyn Write, plan: &MemoryPlan, routing: Option<&Routing>, all: bool) -> io::Result<()> {
    for (i, line) in plan.to_string().lines().enumerate() {
        writeln!(out, "  {:<13} {line}", if i == 0 { "memory" } else { "" })?;
    }
    let mut line = |name: &str, bytes: u64, what: String| {
        writeln!(out, "  {:<13} {:>9}  {name}{what}", "", Size(bytes).to_string())
    };
    if let Some(routing) = routing.filter(|r| !r.settings.keeps_kv()) {
        let held = |capacity| match plan.kv_tokens(routing.layers.len(), capacity) {
            Some(tokens) => format!("{tokens} tokens at capacity {capacity}"),
            None => format!("any number at {capacity}"),
        };
        let held: Vec<_> = [1.0, 0.5, 0.0].map(held).into();
        line("K/V", plan.kv_bytes(), format!(", room for {}", held.join(", ")))?;
    }
    if all {
        for (name, bytes) in plan.buffers.list() {
            line(name, bytes as u64, String::new())?;
        }
    }
    Ok(())
}

fn routers_json(set: &RouterSet) -> Value {
    json!({
        "granularity": set.settings.granularity.to_string(),
        "keys": set.settings.keys.name(),
        "select": set.settings.select.name(),
        "threshold": set.settings.threshold,
        "thresholds": set.thresholds,
        "capacity": set.settings.capacity,
        "layers": set.weights.keys().collect::<Vec<_>>(),
        "hidden": set.weights.values().next().map_or(0, Vec::len),
        "fingerprint": set.fingerprint,
        "metadata": set.metadata,
    })
}

fn model_json(bundle: &Bundle, routing: Option<&Routing>, plan: &Result<MemoryPlan>) -> Value {
    let (c, weights) = (&bundle.config, &bundle.weights);
    let dtypes: Map<String, Value> = weights.dtypes().into_iter().map(|(d, n)| (d, n.into())).collect();
    json!({
        "name": bundle.name,
        "dir": bundle.dir,
        "family": c.family.name(),
        "layers": c.layers, "hidden": c.hidden, "intermediate": c.intermediate,
        "heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim,
        "vocab": c.vocab, "context": c.context, "tied": c.tied, "rope_theta": c.rope.theta,
        "windows": c.windows,
        "parameters": weights.parameters(),
        "weight_bytes_by_dtype": dtypes,
        "fingerprint": weights.fingerprint(),
        "routing": routing_line(routing),
        "routers": match routing {
            Some(Routing { gates: Gates::Routers(set), .. }) => routers_json(set),
            _ => Value::Null,
        },
        "memory": match plan {
            Ok(plan) => plan_json(plan),
            Err(e) => json!({"error": Error::to_string(e)}),
        },
    })
}

fn plan_json(plan: &MemoryPlan) -> Value {
    json!({
        "batch": plan.limits.batch, "context": plan.limits.context,
        "weights": plan.weights, "activations": plan.activations(), "kv": plan.kv_bytes(), "total": plan.total(),
        "free": plan.available,
        "kv_dtype": plan.kv.dtype.to_string(), "kv_pages": plan.kv.pages, "kv_page_bytes": plan.kv.page_bytes(),
        "kv_tokens": plan.kv_tokens(0, 1.0),
        "buffers": plan.buffers.list().into_iter().map(|(n, b)| (n.to_owned(), b.into())).collect::<Map<_, _>>(),
    })
}
