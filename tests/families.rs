//! Every family gives the numbers of transformers: tests/goldens/families, and the real SmolLM2 where it is present.

mod common;

use std::path::{Path, PathBuf};

use common::*;
use mindskip::engine::Options;

/// The reference widens the weights to f32 and computes in f32, and so do we.
const RTOL: f32 = 1e-3;

fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<_> =
        std::fs::read_dir(goldens().join("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 12, "the goldens are not complete");
    cases
}

fn check(folder: &Path, golden: &Golden, options: &Options) {
    let name = folder.file_name().unwrap().to_str().unwrap();
    let mut engine = engine(folder, None, options);
    let (prompt, logits, greedy) = (golden.ints("ids"), golden.floats("logits"), golden.ints("greedy"));
    let vocab = engine.config().vocab;

    // All positions that the golden has, each by a prefill up to there: the last row's logits are what an engine gives.
    let known = logits.len() / vocab;
    for row in 0..known {
        let seq = engine.open().unwrap();
        let end = prompt.len() - known + row + 1;
        let actual = engine.prefill(&[(seq, &prompt[..end])]).unwrap();
        assert_close(&format!("{name}, position {}", end - 1), actual, &logits[row * vocab..][..vocab], RTOL);
        engine.close(seq).unwrap();
    }

    let seq = engine.open().unwrap();
    let mut token = argmax(engine.prefill(&[(seq, prompt)]).unwrap());
    let mut tokens = vec![token];
    while tokens.len() < greedy.len() {
        token = argmax(engine.decode(&[(seq, token)]).unwrap());
        tokens.push(token);
    }
    assert_eq!(tokens, greedy, "{name}: greedy tokens");

    // Log-probabilities agree with the logits they come from.
    let scored = engine.open().unwrap();
    engine.prefill(&[(scored, prompt)]).unwrap();
    let logprobs = engine.logprobs(&prompt[1..]).unwrap();
    for (row, lp) in logprobs.iter().enumerate().skip(prompt.len() - known) {
        let l = &logits[(row + known - prompt.len()) * vocab..][..vocab];
        let max = l.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = l.iter().map(|&x| f64::from(x - max).exp()).sum();
        let expected = f64::from(l[prompt[row + 1] as usize] - max) - sum.ln();
        assert!((f64::from(*lp) - expected).abs() < 5e-3 * (1.0 + expected.abs()), "{name}: {lp} for {expected}");
    }
}

#[test]
fn every_family_equals_transformers() {
    for folder in cases() {
        let golden = Golden::open(&folder.join("golden.safetensors"));
        check(&folder, &golden, &options(2, golden.ints("ids").len() + 64));
    }
}

/// Chunks smaller than the prompt and than the window change nothing.
#[test]
fn chunked_prefill_equals_transformers() {
    for folder in cases() {
        let golden = Golden::open(&folder.join("golden.safetensors"));
        check(&folder, &golden, &Options { chunk: Some(5), ..options(2, golden.ints("ids").len() + 64) });
    }
}

/// Runs when `scripts/get-smollm2` has made the model.
#[test]
fn smollm2_equals_transformers() {
    let folder = std::env::var_os("MINDSKIP_SMOLLM2")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct"), PathBuf::from);
    if !folder.join("model.safetensors").exists() {
        eprintln!("skipped: {} is not there, scripts/get-smollm2 makes it", folder.display());
        return;
    }
    if std::env::var("MINDSKIP_TEST_DEVICE").is_ok_and(|device| device == "emulate") {
        eprintln!("skipped: 135 million parameters take hours on the emulator");
        return;
    }
    let golden = Golden::open(&goldens().join("smollm2/golden.safetensors"));
    check(&folder, &golden, &options(2, golden.ints("ids").len() + 64));
}
