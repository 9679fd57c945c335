//! Two stories at once, piece by piece: `cargo run --release --example generate`.

use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};
use mindskip::generate::{Turn, stream};
use mindskip::model::Routing;
use mindskip::sample::{Sampler, SamplerSettings};

fn main() -> Result<()> {
    let bundle = Bundle::embedded()?;
    let (tokenizer, eos) = (bundle.tokenizer()?, bundle.eos().to_vec());
    let routing = bundle.routers.clone().map(Routing::routers);
    let options = Options { batch: 2, context: Some(256), ..Options::default() };
    let mut engine = Engine::new(bundle.config, bundle.weights, routing, &options)?;

    let settings = SamplerSettings { temperature: 0.7, top_p: 0.95, seed: 7, ..SamplerSettings::default() };
    let mut turns = Vec::new();
    for (i, prompt) in (0..).zip(["Tom had a red ball.", "The dog"]) {
        let (sampler, eos) = (Sampler::for_sequence(settings, i)?, eos.clone());
        let ids = tokenizer.encode(prompt, true)?;
        turns.push(Turn { sampler, eos, max_tokens: 60, ..Turn::new(engine.open()?, ids)? });
    }
    let mut pieces = stream(&mut engine, &tokenizer, &mut turns);
    for piece in &mut pieces {
        let (turn, text) = piece?;
        println!("{turn}: {text:?}");
    }
    let (answers, timing) = pieces.finish()?;
    for answer in answers {
        println!("\n[{}]{}", answer.finish.name(), answer.text);
    }
    println!("\n{:.0} tokens/s", timing.decode_rate());
    Ok(())
}
