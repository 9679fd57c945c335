//! What skipping did, for people and as JSON.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use mindskip::Result;
use mindskip::engine::{Activity, Engine, KvUsage};
use mindskip::generate::Timing;
use mindskip::memory::Size;
use mindskip::model::{Gates, Routing};
use mindskip::router::{Keys, Level, RouterSettings, Select, Target};
use serde_json::{Value, json};

/// Depth and memory that a run used.
pub struct Usage {
    pub activity: Activity,
    pub kv: KvUsage,
    /// Routed layers; empty for a dense run.
    pub layers: Vec<usize>,
    /// Whether `--keys active` would save K/V.
    could_drop: bool,
}

impl Usage {
    /// Of everything since [`Engine::clear_counts`], with the sequences still open.
    pub fn of(engine: &mut Engine) -> Result<Usage> {
        let layers = engine.routing().map_or_else(Vec::new, |r| r.layers.clone());
        let dropping = |r: &Routing| RouterSettings { keys: Keys::Active, ..r.settings }.keeps_kv();
        let could_drop = engine.routing().is_some_and(|r| r.settings.keeps_kv() && !dropping(r));
        Ok(Usage { activity: engine.activity()?.clone(), kv: engine.kv_usage()?, layers, could_drop })
    }

    /// The share of (token, routed layer) pairs that were active.
    pub fn capacity(&self) -> f64 {
        self.activity.mean_capacity(&self.layers)
    }

    /// The share of K/V memory that the dense model would hold and this one does not. It goes by whole pages.
    pub fn kv_saved(&self) -> f64 {
        if self.kv.dense_bytes == 0 { 0.0 } else { 1.0 - self.kv.bytes as f64 / self.kv.dense_bytes as f64 }
    }

    /// A bar for each routed layer.
    pub fn print_layers(&self, out: &mut dyn Write) -> io::Result<()> {
        for &layer in &self.layers {
            let capacity = self.activity.capacity(layer);
            writeln!(out, "  layer {layer:>3}  {}  {:>4.0}%", bar(capacity, 30), capacity * 100.0)?;
        }
        Ok(())
    }

    /// One line about the K/V.
    pub fn kv_line(&self) -> String {
        let kv = &self.kv;
        let bytes = format!("{} of {}", Size(kv.bytes), Size(kv.dense_bytes));
        let held = format!("{} of {} rows, in pages {bytes}", kv.rows, kv.dense_rows);
        let why = match self.could_drop && self.capacity() < 1.0 {
            true => "; skipped tokens keep theirs, --keys active would drop them",
            false => "",
        };
        format!("{held}, {:.0}% saved{why}", self.kv_saved() * 100.0)
    }

    pub fn json(&self) -> Value {
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|&layer| json!({"layer": layer, "capacity": self.activity.capacity(layer)}))
            .collect();
        json!({
            "capacity": self.capacity(),
            "layers": layers,
            "kv": {
                "rows": self.kv.rows, "dense_rows": self.kv.dense_rows,
                "bytes": self.kv.bytes, "dense_bytes": self.kv.dense_bytes, "saved": self.kv_saved(),
            },
        })
    }
}

/// A share as a bar of `width` characters.
pub fn bar(share: f64, width: usize) -> String {
    let full = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
    "█".repeat(full) + &"░".repeat(width - full)
}

/// Layers as a user writes them: 3-7,9.
pub fn layer_list(layers: &[usize]) -> String {
    let runs = layers.chunk_by(|a, b| a + 1 == *b);
    let texts: Vec<_> = runs
        .map(|run| match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    texts.join(",")
}

/// How routing works, in one line.
pub fn settings_line(settings: &RouterSettings) -> String {
    let mut text = settings.granularity.to_string();
    if settings.granularity.level == Level::Token && settings.granularity.target != Target::Mlp {
        text += &format!(", keys {}", settings.keys);
    }
    text + &match (settings.granularity.level, settings.select) {
        (Level::Token, Select::TopK) => {
            format!(", top-k of a prompt at capacity {}, then threshold {}", settings.capacity, settings.threshold)
        }
        _ => format!(", threshold {}", settings.threshold),
    }
}

pub fn routing_line(routing: Option<&Routing>) -> String {
    let Some(routing) = routing else { return "dense".into() };
    let layers = layer_list(&routing.layers);
    match &routing.gates {
        Gates::Routers(_) => format!("{}, layers {layers}", settings_line(&routing.settings)),
        Gates::Random { capacity, .. } => {
            format!("{}, random mask of capacity {capacity}, layers {layers}", routing.settings.granularity)
        }
    }
}

/// Speeds, in one line.
pub fn timing_line(timing: &Timing) -> String {
    format!(
        "prefill {} tokens at {:.1}/s, decode {} at {:.1}/s, first token after {:.0} ms",
        timing.prompt_tokens,
        timing.prefill_rate(),
        timing.decoded_tokens,
        timing.decode_rate(),
        timing.first_token.as_secs_f64() * 1e3,
    )
}

/// Text for standard output: as it is, but visible where that is a terminal.
pub fn printable(text: &str) -> Cow<'_, str> {
    if io::stdout().is_terminal() { visible(text).into() } else { text.into() }
}

/// With what would do something in place of being seen written out: what controls a terminal, or turns the direction of a
/// text. Lines stay lines.
pub fn visible(text: &str) -> String {
    let turns =
        |c| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let hidden = |c: char| turns(c) || c.is_control() && !matches!(c, '\n' | '\t');
    text.chars().map(|c| if hidden(c) { c.escape_unicode().to_string() } else { c.into() }).collect()
}
