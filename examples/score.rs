//! Which ending fits a sentence best, all in one step: `cargo run --release --example score`.

use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};

fn main() -> Result<()> {
    let bundle = Bundle::embedded()?;
    let tokenizer = bundle.tokenizer()?;
    let beginning = "Lily was thirsty, so she";
    let endings = [" drank some water.", " ate the big red car.", " went to sleep."];

    let options = Options { batch: endings.len(), context: Some(64), rows: Some(256), ..Options::default() };
    let mut engine = Engine::new(bundle.config, bundle.weights, None, &options)?;
    let shared = tokenizer.encode(beginning, true)?.len();
    let mut prompts = Vec::new();
    for ending in endings {
        prompts.push((engine.open()?, tokenizer.encode(&format!("{beginning}{ending}"), true)?));
    }
    // The last token is only predicted. A row is a token of the step, those of one prompt after those of the other.
    let inputs: Vec<_> = prompts.iter().map(|(seq, ids)| (*seq, &ids[..ids.len() - 1])).collect();
    engine.prefill(&inputs)?;
    let mut row = 0;
    for ((_, ids), ending) in prompts.iter().zip(endings) {
        let targets: Vec<_> = (shared..ids.len()).map(|i| ((row + i - 1) as u32, ids[i])).collect();
        let logprobs = engine.logprobs_at(&targets)?;
        let mean = logprobs.iter().sum::<f32>() / logprobs.len() as f32;
        println!("{mean:7.3} a token  {beginning}{ending}");
        row += ids.len() - 1;
    }
    Ok(())
}
