//! bf16 inputs on the CPU: close to f32, and as consistent with themselves. Skipped where the processor lacks the instructions.

mod common;

use common::*;
use mindskip::Kind;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options, Precision};
use mindskip::model::Routing;

fn stories(options: Options) -> Option<Engine> {
    let bundle = Bundle::embedded().unwrap();
    let routing = bundle.routers.clone().map(Routing::routers);
    unless_unsupported(Engine::new(bundle.config, bundle.weights, routing, &options))
}

fn unless_unsupported(engine: mindskip::Result<Engine>) -> Option<Engine> {
    match engine {
        Ok(engine) => Some(engine),
        Err(e) if e.kind() == Kind::Unsupported => {
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn logits_stay_close_to_those_of_f32() {
    let prompt = ids(60, 1536, 1);
    let dense = |precision| {
        let bundle = Bundle::embedded().unwrap();
        let options = Options { precision, ..options(1, 64) };
        let mut engine = unless_unsupported(Engine::new(bundle.config, bundle.weights, None, &options))?;
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &prompt)]).unwrap();
        Some(engine.logprobs(&prompt[1..]).unwrap())
    };
    let Some(rounded) = dense(Precision::Bf16) else { return };
    let exact = dense(Precision::F32).unwrap();
    // Measured: 0.2%.
    assert_close("log-probabilities", &rounded, &exact, 0.01);
    assert_ne!(rounded, exact, "bf16 is really used");
}

#[test]
fn batches_chunks_and_decode_agree_to_the_bit() {
    agree_to_the_bit(|options| stories(Options { precision: Precision::Bf16, ..options }));
}

/// Weights in f32 are multiplied in f32 whatever is asked for.
#[test]
fn other_weights_are_not_touched() {
    let folder = goldens().join("routing/model");
    let prompt = ids(30, 192, 4);
    let logits = |precision| {
        let options = Options { precision, ..options(1, 64) };
        let weights = mindskip::weights::Weights::open(&folder).unwrap();
        let mut engine = unless_unsupported(Engine::new(config(&folder), weights, None, &options))?;
        let seq = engine.open().unwrap();
        Some(engine.prefill(&[(seq, &prompt)]).unwrap().to_vec())
    };
    if let Some(rounded) = logits(Precision::Bf16) {
        assert_bits("f32 weights", &rounded, &logits(Precision::F32).unwrap());
    }
}
