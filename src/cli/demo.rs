//! What `mindskip` does without a command: the embedded model, dense and routed, side by side.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};
use mindskip::generate::{Answer, Timing, Turn, generate};
use mindskip::model::Routing;
use mindskip::router::{Keys, RouterSet, RouterSettings};
use mindskip::tokenizer::Tokenizer;

use super::progress::{catch_interrupts, interrupted};
use super::show::{Usage, settings_line};
use super::{Outcome, Ran};

const PROMPT: &str = "Once upon a time, there was a little girl named Lily. She";
const TOKENS: usize = 120;
/// Of which the median is shown; odd. The ways to run take turns, so that what disturbs one disturbs all.
const RUNS: usize = 11;

/// A way to run the model.
struct Way {
    title: String,
    engine: Engine,
    eos: Vec<u32>,
    runs: Vec<(Answer, Timing, Usage)>,
}

pub fn run() -> Ran {
    let _noted = catch_interrupts();
    let bundle = Bundle::embedded()?;
    let tokenizer = bundle.tokenizer()?;
    let prompt = tokenizer.encode(PROMPT, true)?;
    let routers = bundle.routers.clone().expect("the embedded model has routers");
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "The embedded model: {} layers, hidden {}, {:.1}M parameters; its routers skip the attention of single tokens in {} of them.",
        bundle.config.layers,
        bundle.config.hidden,
        bundle.weights.parameters() as f64 / 1e6,
        routers.weights.len(),
    )?;

    let dropping = RouterSettings { keys: Keys::Active, ..routers.settings };
    let mut ways = Vec::new();
    for settings in [None, Some(routers.settings), Some(dropping)] {
        ways.push(Way::new(settings, &routers, prompt.len())?);
    }
    for _ in 0..=RUNS {
        for way in &mut ways {
            way.tell(&tokenizer, &prompt)?;
            if interrupted() {
                return Ok(Outcome::Interrupted);
            }
        }
    }

    for way in &ways {
        writeln!(out, "\n— {}\n{PROMPT}{}", way.title, way.runs[0].0.text)?;
    }
    writeln!(out, "\nOn {}, medians of {RUNS} runs in turns:", ways[0].engine.device().name)?;
    let width = ways.iter().map(|way| way.title.len()).max().unwrap_or(0);
    writeln!(out, "{:width$}  prefill tok/s  decode tok/s  capacity  K/V saved", "")?;
    for way in &ways {
        let timing = way.median();
        let (title, usage) = (&way.title, &way.runs[0].2);
        writeln!(
            out,
            "{title:width$}  {:>13.0}  {:>12.0}  {:>7.1}%  {:>8.1}%",
            timing.prefill_rate(),
            timing.decode_rate(),
            usage.capacity() * 100.0,
            usage.kv_saved() * 100.0,
        )?;
    }
    writeln!(out, "\nCapacity by layer, {}:", ways[1].title)?;
    ways[1].runs[0].2.print_layers(&mut out)?;
    writeln!(out, "\nNext: mindskip generate --stats \"Tom had a red ball.\"   or   mindskip --help")?;
    Ok(Outcome::Done)
}

impl Way {
    fn new(settings: Option<RouterSettings>, routers: &RouterSet, prompt: usize) -> Result<Way> {
        let bundle = Bundle::embedded()?;
        let eos = bundle.eos().to_vec();
        let options = Options { context: Some(prompt + TOKENS), ..Options::default() };
        let routing = settings.map(|settings| Routing::routers(RouterSet { settings, ..routers.clone() }));
        let title = settings.map_or("dense".into(), |s| format!("routed: {}", settings_line(&s)));
        let engine = Engine::new(bundle.config, bundle.weights, routing, &options)?;
        Ok(Way { title, engine, eos, runs: Vec::new() })
    }

    /// Continues the prompt, greedily.
    fn tell(&mut self, tokenizer: &Tokenizer, prompt: &[u32]) -> Result<()> {
        self.engine.clear_counts()?;
        let seq = self.engine.open()?;
        let turn = Turn { max_tokens: TOKENS, eos: self.eos.clone(), ..Turn::new(seq, prompt.to_vec())? };
        let (mut answers, timing) =
            generate(&mut self.engine, tokenizer, &mut [turn], &mut |_, _| match interrupted() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })?;
        let usage = Usage::of(&mut self.engine)?;
        self.engine.close(seq)?;
        self.runs.push((answers.remove(0), timing, usage));
        Ok(())
    }

    /// The median times of all runs but the first, in which everything is touched for the first time.
    fn median(&self) -> Timing {
        let middle = |time: fn(&Timing) -> Duration| {
            let mut times: Vec<_> = self.runs[1..].iter().map(|(_, timing, _)| time(timing)).collect();
            times.sort();
            times[times.len() / 2]
        };
        Timing { prefill: middle(|t| t.prefill), decode: middle(|t| t.decode), ..self.runs[0].1 }
    }
}
