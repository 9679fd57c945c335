//! What a model takes on some text at best: its ops are counted, no time is taken.

use serde::Serialize;

use crate::backend::{Draw, Rates};
use crate::engine::Engine;
use crate::error::Result;

/// Seconds, by the rates of a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Ideal {
    /// Reading each text, one by one.
    pub prefill: f64,
    /// Going on with it from its prompt, token by token.
    pub decode: f64,
}

/// A text, and how much of it is prompt: at least one token.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// All of it.
    pub ids: &'a [u32],
    /// Tokens of `ids`.
    pub prompt: usize,
    /// Tokens behind the prompt that are decoded at most.
    pub decoded: usize,
}

/// The ideal of an engine, as it is routed. Errors: as of [`Engine::prefill`].
///
/// ```
/// use mindskip::backend::Rates;
/// use mindskip::bench::{Ideal, Text, ideal};
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::model::Routing;
///
/// let bundle = Bundle::embedded()?;
/// let routing = bundle.routers.map(Routing::routers);
/// let mut engine = Engine::new(bundle.config, bundle.weights, routing, &Options::default())?;
/// let rates = Rates { copy: 1e10, product: 1e11 }; // or those that engine::rates measures
/// let text = Text { ids: &[5; 60], prompt: 50, decoded: 10 };
/// let routed: Ideal = ideal(&mut engine, &rates, &[text])?;
/// engine.reroute(None)?;
/// let dense = ideal(&mut engine, &rates, &[text])?;
/// assert!(routed.prefill < dense.prefill && routed.decode < dense.decode);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn ideal(engine: &mut Engine, rates: &Rates, texts: &[Text]) -> Result<Ideal> {
    let mut sum = Ideal::default();
    for text in texts {
        sum.prefill += seconds(engine, rates, |engine| {
            let seq = engine.open()?;
            engine.prefill_and_sample(&[(seq, text.ids)], &[Draw::GREEDY])?;
            engine.close(seq)
        })?;
        let seq = engine.open()?;
        let (prompt, behind) = text.ids.split_at(text.prompt);
        engine.prefill_and_sample(&[(seq, prompt)], &[Draw::GREEDY])?;
        sum.decode += seconds(engine, rates, |engine| {
            let mut decoded = behind.iter().take(text.decoded);
            decoded.try_for_each(|&id| engine.decode_and_sample(&[(seq, id)], &[Draw::GREEDY]).map(drop))
        })?;
        engine.close(seq)?;
    }
    Ok(sum)
}

fn seconds(engine: &mut Engine, rates: &Rates, run: impl FnOnce(&mut Engine) -> Result<()>) -> Result<f64> {
    engine.clear_counts()?;
    run(engine)?;
    engine.activity()?; // the counts of the last step are known then
    Ok(rates.ideal(engine.meter()))
}
