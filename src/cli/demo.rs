//! What `mindskip` does without a command: the embedded model, dense and routed, side by side.

use std::io::{self, Write};
use std::ops::ControlFlow;

use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};
use mindskip::generate::{Answer, Timing, Turn, generate};
use mindskip::model::Routing;
use mindskip::router::{Keys, RouterSet, RouterSettings};

use super::progress::{catch_interrupts, interrupted};
use super::show::{Usage, settings_line};
use super::{Outcome, Ran};

const PROMPT: &str = "Once upon a time, there was a little girl named Lily. She";
const TOKENS: usize = 120;
/// Of which the median is shown; odd.
const RUNS: usize = 9;

pub fn run() -> Ran {
    let _noted = catch_interrupts();
    let bundle = Bundle::embedded()?;
    let (config, routers) = (bundle.config.clone(), bundle.routers.clone().expect("the embedded model has routers"));
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "The embedded model: {} layers, hidden {}, {:.1}M parameters; its routers skip the attention of single tokens in {} of them.",
        config.layers,
        config.hidden,
        bundle.weights.parameters() as f64 / 1e6,
        routers.weights.len(),
    )?;

    let dropping = RouterSettings { keys: Keys::Active, ..routers.settings };
    let runs = [None, Some(routers.settings), Some(dropping)];
    let mut rows = Vec::new();
    for settings in runs {
        let routing = settings.map(|settings| Routing::routers(RouterSet { settings, ..routers.clone() }));
        let title = settings.map_or("dense".into(), |s| format!("routed: {}", settings_line(&s)));
        let (answer, timing, usage, device) = tell(routing)?;
        writeln!(out, "\n— {title}\n{PROMPT}{}", answer.text)?;
        out.flush()?;
        rows.push((title, timing, usage));
        if interrupted() {
            return Ok(Outcome::Interrupted);
        }
        if rows.len() == runs.len() {
            writeln!(out, "\nOn {device}:")?;
        }
    }

    let width = rows.iter().map(|(title, ..)| title.len()).max().unwrap_or(0);
    writeln!(out, "{:width$}  prefill tok/s  decode tok/s  capacity  K/V saved", "")?;
    for (title, timing, usage) in &rows {
        writeln!(
            out,
            "{title:width$}  {:>13.0}  {:>12.0}  {:>7.1}%  {:>8.1}%",
            timing.prefill_rate(),
            timing.decode_rate(),
            usage.capacity() * 100.0,
            usage.kv_saved() * 100.0,
        )?;
    }
    writeln!(out, "\nCapacity by layer, {}:", rows[1].0)?;
    rows[1].2.print_layers(&mut out)?;
    writeln!(out, "\nNext: mindskip generate --stats \"Tom had a red ball.\"   or   mindskip --help")?;
    Ok(Outcome::Done)
}

/// Continues the prompt, greedily.
fn tell(routing: Option<Routing>) -> Result<(Answer, Timing, Usage, String)> {
    let bundle = Bundle::embedded()?;
    let tokenizer = bundle.tokenizer()?;
    let prompt = tokenizer.encode(PROMPT, true)?;
    let eos = bundle.eos().to_vec();
    let options = Options { context: Some(prompt.len() + TOKENS), ..Options::default() };
    let mut engine = Engine::new(bundle.config, bundle.weights, routing, &options)?;

    // The first run of anything is slow, and one of 20 ms is mostly noise: the rest are timed, and the middle one counts.
    let mut runs = Vec::new();
    for _ in 0..=RUNS {
        engine.clear_counts()?;
        let (seq, prompt) = (engine.open()?, prompt.clone());
        let turn = Turn { max_tokens: TOKENS, eos: eos.clone(), ..Turn::new(seq, prompt)? };
        let (mut answers, timing) = generate(&mut engine, &tokenizer, &mut [turn], &mut |_, _| match interrupted() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })?;
        runs.push((timing, answers.remove(0), Usage::of(&mut engine)?));
        engine.close(seq)?;
    }
    runs.remove(0);
    runs.sort_by_key(|(timing, ..)| timing.decode);
    let (mut timing, answer, usage) = runs.swap_remove(RUNS / 2);
    let mut prefills: Vec<_> = runs.iter().map(|(timing, ..)| timing.prefill).collect();
    prefills.sort();
    timing.prefill = prefills[prefills.len() / 2];
    Ok((answer, timing, usage, engine.device().name.clone()))
}
