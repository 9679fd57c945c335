//! A routing policy of one's own: the deeper a layer, the fewer tokens pass it. Thresholds are placed by the scores of a text:
//! `cargo run --release --example policy`.

use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};
use mindskip::model::Routing;

const TEXT: &str = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One day, \
                    she saw a big, dark cloud in the sky. Her mom came outside and said that rain was coming.";

/// Reads the text; returns the scores of its tokens by routed layer, and the share that was active.
fn read(engine: &mut Engine, ids: &[u32]) -> Result<Vec<(usize, Vec<f32>, f64)>> {
    engine.clear_counts()?;
    let seq = engine.open()?;
    engine.prefill(&[(seq, ids)])?;
    let traces = engine.trace()?;
    engine.close(seq)?;
    let activity = engine.activity()?;
    Ok(traces.into_iter().map(|t| (t.layer, t.scores, activity.capacity(t.layer))).collect())
}

fn main() -> Result<()> {
    let bundle = Bundle::embedded()?;
    let ids = bundle.tokenizer()?.encode(TEXT, true)?;
    let mut routers = bundle.routers.clone().expect("the embedded model has routers");
    let routing = Routing::routers(routers.clone());
    let mut engine = Engine::new(bundle.config, bundle.weights, Some(routing), &Options::default())?;

    let layers = read(&mut engine, &ids)?;
    for (nth, (layer, mut scores, _)) in layers.iter().cloned().enumerate() {
        let share = 1.0 - (nth + 1) as f64 / (layers.len() + 1) as f64;
        scores.sort_by(|a, b| b.total_cmp(a));
        routers.thresholds.insert(layer, scores[(share * scores.len() as f64) as usize]);
    }
    engine.reroute(Some(Routing::routers(routers)))?;
    for ((layer, _, before), (.., after)) in layers.iter().zip(read(&mut engine, &ids)?) {
        println!("layer {layer}: {:3.0}% of the tokens were active, now {:3.0}%", before * 100.0, after * 100.0);
    }
    Ok(())
}
