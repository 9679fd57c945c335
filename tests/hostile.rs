//! Files that are broken, by accident or on purpose: one clear error, no panic, no hang, no memory beyond their size.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::mutate::mutate;
use common::{goldens, stories};
use mindskip::config::Config;
use mindskip::engine::{Budget, Engine, Options};
use mindskip::generation::GenerationConfig;
use mindskip::model::Routing;
use mindskip::router::RouterSet;
use mindskip::tensor::Bytes;
use mindskip::tokenizer::Tokenizer;
use mindskip::weights::Weights;
use mindskip::{Kind, Result};
use peak_alloc::PeakAlloc;
use rand_pcg::Pcg64Dxsm;
use rand_pcg::rand_core::SeedableRng;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Mutated files in all; the numbers of cases below add up to it.
const CASES: usize = 10_000;

/// Runs `parse` on `cases` mutations of a file: it ends soon, without a panic, with a message that names the file and what to
/// do, and never holds more than a few times the file.
fn survive(name: &str, file: &Path, cases: usize, parse: impl Fn(&Path, Vec<u8>) -> Result<()>) {
    let original = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    parse(file, original.clone()).unwrap_or_else(|e| panic!("{name} unbroken: {e}"));
    let mut rng = Pcg64Dxsm::seed_from_u64(cases as u64);
    let mut refused = 0;
    for case in 0..cases {
        let bytes = mutate(&original, &mut rng);
        let (start, before) = (Instant::now(), MEMORY.current_usage());
        MEMORY.reset_peak_usage();
        let allowed = 100_000 + 40 * original.len().max(bytes.len());
        let result = catch_unwind(AssertUnwindSafe(|| parse(file, bytes)));
        let result = result.unwrap_or_else(|_| panic!("{name}, case {case}: panicked"));
        let took = MEMORY.peak_usage().saturating_sub(before);
        assert!(took <= allowed, "{name}, case {case}: held {took} bytes for a file of {}", original.len());
        assert!(start.elapsed() < Duration::from_secs(5), "{name}, case {case}: took {:?}", start.elapsed());
        if let Err(e) = result {
            refused += 1;
            let text = e.to_string();
            assert!(text.contains("; "), "{name}, case {case}: no next action in {text:?}");
            assert!(text.len() < 2000, "{name}, case {case}: {} bytes of message", text.len());
            if e.kind() != Kind::Argument {
                assert!(text.contains(file.file_name().unwrap().to_str().unwrap()), "{name}, case {case}: {text:?}");
            }
        }
    }
    eprintln!("{name}: {refused} of {cases} mutations refused");
    assert!(refused * 4 > cases, "{name}: only {refused} of {cases} mutations were refused");
}

fn model() -> PathBuf {
    goldens().join("routing/model")
}

// One test, because the memory counted is that of the whole process.
#[test]
fn ten_thousand_broken_files_are_survived() {
    let mut cases = CASES;
    let mut survive = |name: &str, file: &Path, n: usize, parse: &dyn Fn(&Path, Vec<u8>) -> Result<()>| {
        cases -= n;
        survive(name, file, n, parse);
    };
    survive("config", &model().join("config.json"), 2500, &|path, bytes| {
        Config::parse(&bytes).map(drop).map_err(|e| e.at(path))
    });
    survive("generation config", &stories().join("generation_config.json"), 1000, &|path, bytes| {
        GenerationConfig::parse(&bytes).map(drop).map_err(|e| e.at(path))
    });
    survive("weights", &model().join("model.safetensors"), 2000, &|path, bytes| {
        let weights = Weights::from_parts(vec![(path.into(), Bytes::new(bytes))])?;
        let names: Vec<String> = weights.names().map(String::from).collect();
        for name in names {
            let _ = weights.tensor(&name, 64, 64);
        }
        Ok(())
    });
    survive("routers", &stories().join("routers.safetensors"), 2000, &|path, bytes| {
        let set = RouterSet::from_bytes(path, Bytes::new(bytes))?;
        set.check(&common::config(&stories()), set.fingerprint.as_deref().unwrap_or_default())
    });
    survive("tokenizer", &stories().join("tokenizer.json"), 1000, &|path, bytes| {
        let tokenizer = Tokenizer::from_bytes(path, &bytes, None)?;
        let _ = tokenizer.encode("Once upon a time, ünïcode 🦀", true);
        let _ = tokenizer.decode(&[0, 1, 300, 1535, u32::MAX], false);
        Ok(())
    });

    // Whole models: whatever passes the parsers is loaded and run, if it fits.
    let run = |config: Config, weights: Weights, routing: Option<Routing>| -> Result<()> {
        let context = config.context.min(32);
        let options = Options {
            threads: Some(1),
            context: Some(context),
            memory: Some(Budget::Bytes(64 << 20)),
            ..Options::default()
        };
        let vocab = config.vocab as u32;
        let mut engine = Engine::new(config, weights, routing, &options)?;
        let seq = engine.open()?;
        engine.prefill(&[(seq, &[0, 1 % vocab, 2 % vocab][..context.min(3)])])?;
        if context > 3 {
            engine.decode(&[(seq, 0)])?;
        }
        Ok(())
    };
    let config = common::config(&model());
    survive("model with a broken config", &model().join("config.json"), 500, &|path, bytes| {
        let config = Config::parse(&bytes).map_err(|e| e.at(path))?;
        run(config, Weights::open(&model())?, None).map_err(|e| e.at(path))
    });
    survive("model with broken weights", &model().join("model.safetensors"), 500, &|path, bytes| {
        run(config.clone(), Weights::from_parts(vec![(path.into(), Bytes::new(bytes))])?, None).map_err(|e| e.at(path))
    });
    survive("model with broken routers", &goldens().join("routing/routers/tagged.safetensors"), 500, &|path, bytes| {
        let mut set = RouterSet::from_bytes(path, Bytes::new(bytes))?;
        set.fingerprint = None;
        run(config.clone(), Weights::open(&model())?, Some(Routing::routers(set))).map_err(|e| e.at(path))
    });
    assert_eq!(cases, 0, "the cases do not add up to {CASES}");
}
