//! Runs of the trainer and of `mindskip tune` on the embedded model.
#![cfg(feature = "cli")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use mindskip::Kind;
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Options, training_backend};
use mindskip::router::{RouterSet, RouterSettings};
use mindskip::tune::data::{Dataset, Encoder};
use mindskip::tune::plan::StepLimits;
use mindskip::tune::train::{TrainSettings, Trainer};
use mindskip::tune::{Goal, Tuner};

const LAYERS: [usize; 5] = [3, 4, 5, 6, 7];

fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories")
}

/// The first stories of the held-out text: a sentence, and what follows.
fn write_data(dir: &Path, records: usize) -> PathBuf {
    let text = std::fs::read_to_string(stories().join("heldout.txt")).unwrap();
    let split = |story: &str| story.split_once(". ").map(|(a, b)| (format!("{a}."), format!(" {b}")));
    let lines = text.split("<|endoftext|>").filter_map(split).take(records);
    let lines = lines.map(|(prompt, completion)| serde_json::json!({"prompt": prompt, "completion": completion}));
    let path = dir.join("data.jsonl");
    std::fs::write(&path, lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    path
}

fn settings() -> TrainSettings {
    TrainSettings {
        router: RouterSettings::default(),
        goal: "lm",
        ste: "full",
        lr: 1e-2,
        target: 0.5,
        lambda: None,
        calibrate: true,
        batch: 4,
        steps: 5,
        seed: 3,
        val_split: 0.25,
    }
}

fn trainer(bundle: Bundle, data: &Path, settings: TrainSettings) -> mindskip::Result<Trainer> {
    let tokenizer = bundle.tokenizer().unwrap();
    let encoder = Encoder { tokenizer: &tokenizer, template: None, eos: bundle.eos(), max_length: 96 };
    let data = Dataset::open(data, &encoder)?;
    let routers = RouterSet {
        settings: settings.router,
        weights: LAYERS.map(|l| (l, vec![0.0; bundle.config.hidden])).into(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "here".into(),
    };
    let limits = StepLimits { rows: 256, samples: 8, chunk: 64, memory: None };
    let fingerprint = bundle.weights.fingerprint();
    let backend = training_backend(&Options { device: Device::Cpu, threads: Some(2), ..Options::default() })?;
    let tuner = Tuner::new(bundle.config, &bundle.weights, routers, Goal::Tokens, limits, backend)?;
    Trainer::new(tuner, settings, data, fingerprint)
}

fn embedded() -> Bundle {
    Bundle::embedded().unwrap()
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 12);
    let checkpoint = dir.path().join("checkpoint");
    let mut whole = trainer(embedded(), &data, settings()).unwrap();
    let mut reports = Vec::new();
    while !whole.is_done() {
        if whole.state.step == 2 {
            whole.save(&checkpoint).unwrap();
        }
        reports.push(whole.step().unwrap());
    }
    let mut second = trainer(embedded(), &data, settings()).unwrap();
    second.resume(&checkpoint).unwrap();
    assert_eq!(second.state.step, 2);
    for report in &reports[2..] {
        assert_eq!(&second.step().unwrap(), report);
    }
    assert_eq!(second.state, whole.state);
    assert!(whole.state.routers.iter().all(|w| w.is_finite()) && whole.state.routers.iter().any(|&w| w != 0.0));
    let sets = [&mut whole, &mut second].map(|trainer| trainer.finish(None).unwrap().0.to_bytes());
    assert_eq!(sets[0], sets[1]);

    let other = TrainSettings { lr: 1e-3, ..settings() };
    let error = trainer(embedded(), &data, other).unwrap().resume(&checkpoint).unwrap_err();
    assert_eq!(error.kind(), Kind::Mismatch, "{error}");
    std::fs::write(&checkpoint, b"nonsense").unwrap();
    assert_eq!(second.resume(&checkpoint).unwrap_err().kind(), Kind::Format);
}

/// `--target-capacity` alone: no lambda and no threshold were given.
#[test]
fn the_capacity_that_was_asked_for_is_reached_on_held_out_text() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 60);
    for target in [0.75, 0.4] {
        let settings = TrainSettings { target, steps: 10, ..settings() };
        let mut trainer = trainer(embedded(), &data, settings).unwrap();
        while !trainer.is_done() {
            trainer.step().unwrap();
        }
        let dense = trainer.evaluate(false).unwrap().unwrap();
        let (set, routed) = trainer.finish(Some(dense)).unwrap();
        let routed = routed.unwrap();
        assert!((routed.capacity - f64::from(target)).abs() <= 0.02, "{} for {target}", routed.capacity);
        assert_eq!(dense.capacity, 1.0);
        assert_eq!(set.metadata["heldout_capacity"], format!("{:.4}", routed.capacity));
    }
}

/// The embedded model with a NaN in the embedding of one token.
fn with_nan(token: u32, dir: &Path) -> Bundle {
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(stories().join(name), dir.join(name)).unwrap();
    }
    let mut bytes = std::fs::read(stories().join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let table: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = table["model.embed_tokens.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let at = 8 + header + start + token as usize * 128 * 2;
    bytes[at..at + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    Bundle::open(dir).unwrap()
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_record() {
    let dir = tempfile::tempdir().unwrap();
    let ids = embedded().tokenizer().unwrap().encode(" dog", false).unwrap();
    let line = serde_json::json!({"prompt": "Once upon a time", "completion": " there was a dog."});
    let data = dir.path().join("data.jsonl");
    std::fs::write(&data, format!("{line}\n").repeat(8)).unwrap();
    // Its embedding is also a row of the head, so every record has a loss that is none.
    let bundle = with_nan(ids[ids.len() - 1], dir.path());
    let settings = TrainSettings { val_split: 0.0, batch: 1, steps: 8, ..settings() };
    let mut trainer = trainer(bundle, &data, settings).unwrap();
    let error = loop {
        let before = trainer.state.clone();
        if let Err(error) = trainer.step() {
            assert_eq!(trainer.state, before, "the last good state is kept");
            break error;
        }
    };
    assert_eq!(error.kind(), Kind::Numeric);
    let text = error.to_string();
    assert!(text.contains("the loss of record ") && text.contains("(while taking step 1)"), "{text}");
}

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mindskip"));
    command.env("HF_HUB_OFFLINE", "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).args(args);
    command
}

fn text(output: &Output) -> (String, String) {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    (out, err)
}

#[test]
fn tune_makes_a_router_file_that_generate_uses() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 20);
    let out = dir.path().join("r.safetensors");
    let (data, out) = (data.to_str().unwrap(), out.to_str().unwrap());
    let args = ["tune", "--data", data, "-o", out, "--steps", "2", "--batch", "4", "--max-length", "64", "--json"];
    let output = program(&args).output().unwrap();
    let (json, err) = text(&output);
    assert!(output.status.success(), "{err}");
    assert!(err.contains("20 samples") && err.contains("step 2/2 loss"), "{err}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["dense"]["loss"].as_f64().unwrap() > 0.5);
    let set = RouterSet::open(Path::new(out)).unwrap();
    assert_eq!(set.weights.keys().copied().collect::<Vec<_>>(), [3, 4, 5, 6]);
    assert_eq!(set.fingerprint, Some(embedded().weights.fingerprint()));
    let log = std::fs::read_to_string(format!("{out}.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 3, "two steps and the end: {log}");
    let output = program(&["generate", "Tom had", "-n", "8", "--routers", out]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output).1);
}

#[test]
fn tune_refuses_what_it_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 4);
    let (data, out) = (data.to_str().unwrap(), dir.path().join("r.safetensors"));
    let out = out.to_str().unwrap();
    for (more, message) in [
        (vec!["--lr", "0"], "--lr is 0; give a positive number"),
        (vec!["--target-capacity", "1.5"], "--target-capacity is 1.5"),
        (vec!["--layers", "9"], "layer 9 of a model with the layers 0 to 7"),
        (vec!["--memory", "1M"], "lower --max-length"),
        (vec!["--resume"], "No such file"),
    ] {
        let args = [&["tune", "--data", data, "-o", out, "--max-length", "64"], &more[..]].concat();
        let output = program(&args).output().unwrap();
        let (_, err) = text(&output);
        let last = err.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{more:?}: {err}");
        assert!(last.starts_with("mindskip: error: ") && last.contains(message), "{more:?}: {err}");
        assert!(!Path::new(out).exists());
    }
}

/// ^C leaves a checkpoint, from which the run goes on to the file that it would have written.
#[cfg(unix)]
#[test]
fn an_interrupted_tune_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 24);
    let paths = ["whole.safetensors", "resumed.safetensors"].map(|name| dir.path().join(name));
    let [whole, resumed] = paths.each_ref().map(|path| path.to_str().unwrap());
    let with = |out: &str, more: &[&str]| {
        let fixed =
            ["tune", "--data", data.to_str().unwrap(), "--steps", "30", "--batch", "8", "--max-length", "64", "-o"];
        program(&[&fixed[..], &[out], more].concat())
    };
    assert!(with(whole, &[]).output().unwrap().status.success());
    let child = with(resumed, &[]).spawn().unwrap();
    let log = format!("{resumed}.jsonl");
    let start = Instant::now();
    while std::fs::read_to_string(&log).map_or(0, |log| log.lines().count()) < 3 {
        assert!(start.elapsed() < Duration::from_secs(120), "no steps");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let (_, err) = text(&output);
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("go on with --resume") && !Path::new(resumed).exists(), "{err}");
    let output = with(resumed, &["--resume"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output).1);
    assert_eq!(std::fs::read(whole).unwrap(), std::fs::read(resumed).unwrap());
    assert_eq!(std::fs::read_to_string(&log).unwrap(), std::fs::read_to_string(format!("{whole}.jsonl")).unwrap());
}
