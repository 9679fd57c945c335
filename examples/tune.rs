//! Router-Tuning in a few steps, on a handful of sentences: `cargo run --release --example tune`.

use std::collections::BTreeMap;

use mindskip::Result;
use mindskip::bundle::Bundle;
use mindskip::engine::{Options, training_backend};
use mindskip::router::{RouterSet, RouterSettings};
use mindskip::tune::data::Dataset;
use mindskip::tune::plan::StepLimits;
use mindskip::tune::train::{TrainSettings, Trainer};
use mindskip::tune::{Goal, Sample, Ste, Tuner};

const TEXTS: [&str; 4] = [
    "Tom had a red ball. He liked to throw it high and catch it again.",
    "Lily saw a little bird in the garden. The bird was hungry, so she gave it some bread.",
    "The dog ran to the park. He wanted to play with his friends all day.",
    "Once upon a time, there was a small cat. She slept in the sun and dreamed of fish.",
];

fn main() -> Result<()> {
    let bundle = Bundle::embedded()?;
    let tokenizer = bundle.tokenizer()?;
    let mut samples = Vec::new();
    for (record, text) in (1..).zip(TEXTS) {
        let ids = tokenizer.encode(text, true)?;
        samples.push(Sample { counts: vec![true; ids.len()], ids, record });
    }
    let longest = samples.iter().map(|sample| sample.ids.len()).max().unwrap_or(0);
    let data = Dataset { samples, truncated: 0, dropped: 0, hash: String::new(), path: "sentences".into() };

    let zeros = |layer| (layer, vec![0.0; bundle.config.hidden]);
    let routers = RouterSet {
        settings: RouterSettings::default(),
        weights: (3..8).map(zeros).collect(),
        thresholds: BTreeMap::new(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "new routers".into(),
    };
    let limits = StepLimits { rows: 2 * longest, samples: 2, chunk: 64, recompute: false, memory: None };
    let backend = training_backend(&Options::default())?;
    let tuner = Tuner::new(bundle.config.clone(), &bundle.weights, routers, Goal::Tokens, limits, backend)?;
    let settings = TrainSettings {
        router: RouterSettings::default(),
        goal: Goal::Tokens.name(),
        ste: Ste::Full.name(),
        lr: 0.02,
        target: 0.6,
        lambda: None,
        calibrate: true,
        batch: 2,
        steps: 20,
        seed: 0,
        val_split: 0.0,
    };
    let mut trainer = Trainer::new(tuner, settings, data, bundle.weights.fingerprint())?;
    while !trainer.is_done() {
        let report = trainer.step()?;
        println!("step {:2}: loss {:.3}, capacity {:.0}%", report.step, report.loss, report.capacity * 100.0);
    }
    let (routers, _) = trainer.finish(None)?;
    println!("thresholds by layer: {:?}", routers.thresholds);
    Ok(())
}
