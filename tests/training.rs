//! Runs of the trainer and of `mindskip tune` on the embedded model.
#![cfg(feature = "cli")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::stories;
use mindskip::Kind;
use mindskip::backend::Rates;
use mindskip::bench::{Ideal, Text, ideal};
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Engine, Options, training_backend};
use mindskip::model::{Gates, Routing};
use mindskip::router::{RouterSet, RouterSettings};
use mindskip::tune::data::{Dataset, Encoder};
use mindskip::tune::plan::StepLimits;
use mindskip::tune::train::{TrainSettings, Trainer};
use mindskip::tune::{Goal, Tuner};

const LAYERS: [usize; 5] = [3, 4, 5, 6, 7];

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
        thresholds: BTreeMap::new(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "here".into(),
    };
    let limits = StepLimits { rows: 256, samples: 8, chunk: 64, recompute: false, memory: None };
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

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_record() {
    let dir = tempfile::tempdir().unwrap();
    let ids = embedded().tokenizer().unwrap().encode(" dog", false).unwrap();
    let line = serde_json::json!({"prompt": "Once upon a time", "completion": " there was a dog."});
    let data = dir.path().join("data.jsonl");
    std::fs::write(&data, format!("{line}\n").repeat(8)).unwrap();
    // Its embedding is also a row of the head, so every record has a loss that is none.
    common::with_nan(ids[ids.len() - 1], dir.path());
    let bundle = Bundle::open(dir.path()).unwrap();
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
    command.env("HF_HUB_OFFLINE", "1").env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).args(args);
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
    let args = [
        "tune",
        "--data",
        data,
        "-o",
        out,
        "--steps",
        "2",
        "--batch",
        "4",
        "--max-length",
        "64",
        "--layers",
        "last:4",
        "--json",
    ];
    let output = program(&args).output().unwrap();
    let (json, err) = text(&output);
    assert!(output.status.success(), "{err}");
    assert!(err.contains("20 samples") && err.contains("step 2/2 loss"), "{err}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["held_out"][0]["dense"]["loss"].as_f64().unwrap() > 0.5);
    assert_eq!(json["thresholds"].as_array().unwrap().len(), 4);
    let set = RouterSet::open(Path::new(out)).unwrap();
    assert_eq!(set.weights.keys().copied().collect::<Vec<_>>(), [3, 4, 5, 6]);
    assert_eq!(set.fingerprint, Some(embedded().weights.fingerprint()));
    let log = std::fs::read_to_string(format!("{out}.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 3, "two steps and the end: {log}");
    let svg = std::fs::read_to_string(format!("{out}.svg")).unwrap();
    assert!(["loss", "capacity", "layer 3", "layer 6"].iter().all(|text| svg.contains(text)), "{svg}");
    let output = program(&["generate", "Tom had", "-n", "8", "--routers", out]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output).1);
}

/// What is to be kept is in the log; what is evaluated afterwards is what the run has found.
#[test]
fn tune_keeps_text_and_evaluates_routers() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 16);
    let [text_path, out, again] = ["text.jsonl", "r.safetensors", "s.safetensors"].map(|name| dir.path().join(name));
    let stories = std::fs::read_to_string(stories().join("heldout.txt")).unwrap();
    let lines = stories.split("<|endoftext|>").skip(40).take(3).map(|text| serde_json::json!({"text": text}));
    std::fs::write(&text_path, lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let [data, text_path, out, again] = [&data, &text_path, &out, &again].map(|path| path.to_str().unwrap());
    let run = |out: &str, more: &[&str]| {
        let fixed =
            ["tune", "--data", data, "--val", data, "--val", text_path, "--max-length", "64", "--json", "-o", out];
        let output = program(&[&fixed[..], more].concat()).output().unwrap();
        let (json, err) = text(&output);
        assert!(output.status.success(), "{err}");
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    let trained = run(out, &["--keep", text_path, "--steps", "4", "--batch", "4", "--lr", "1e-2", "--layers", "4-6"]);
    let log = std::fs::read_to_string(format!("{out}.jsonl")).unwrap();
    let steps: Vec<serde_json::Value> = log.lines().take(4).map(|line| serde_json::from_str(line).unwrap()).collect();
    let divergence = |step: usize| steps[step]["kept"]["loss"].as_f64().unwrap();
    assert!(divergence(0).abs() < 1e-6 && divergence(3) > 1e-4, "none while all is active: {log}");
    assert_eq!(trained["held_out"].as_array().unwrap().len(), 2);
    assert_eq!(trained["held_out"][1]["data"], text_path);
    let evaluated = run(again, &["--routers", out, "--steps", "0"]);
    for key in ["held_out", "thresholds", "layers"] {
        assert_eq!(evaluated[key], trained[key], "{key}");
    }
    let less = run(again, &["--routers", out, "--steps", "0", "--target-capacity", "0.25"]);
    let capacity = less["held_out"][0]["routed"]["capacity"].as_f64().unwrap();
    assert!((capacity - 0.25).abs() < 0.02, "{capacity}");
}

#[test]
fn tune_refuses_what_it_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 4);
    let (data, out) = (data.to_str().unwrap(), dir.path().join("r.safetensors"));
    let out = out.to_str().unwrap();
    for (more, message) in [
        (vec!["--lr", "0"], "--lr is 0; give a positive number"),
        (vec!["--steps", "0"], "--steps is 0; give 1 or more, or --routers to evaluate"),
        (vec!["--target-capacity", "1.5"], "--target-capacity is 1.5"),
        (vec!["--layers", "9"], "layer 9 of a model with the layers 0 to 7"),
        (vec!["--layers", "auto:9"], "auto:9 of a model with 8 layers; name layers that the model has"),
        (vec!["--layers", "auto:2", "--calibration", "0"], "--calibration is 0; give 1 or more"),
        (vec!["--sweep", "0.9,0.5", "--val-split", "0"], "no samples are held out to compare on; raise --val-split"),
        (vec!["--sweep", "0.9,0.5", "--resume", "--val-split", "0.5"], "r-0.9.safetensors.checkpoint: No such file"),
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
    for (more, message) in [
        (vec!["--layers", "auto:0"], "names no layers; write last:N"),
        (vec!["--sweep", "0.9,NaN"], "\"NaN\" is no capacity; give shares from 0 to 1"),
        (vec!["--sweep", "0.9,1.5"], "\"1.5\" is no capacity"),
        (vec!["--sweep", "0.5,0.9,0.50"], "0.5 is there twice; give each capacity once"),
        (vec!["--sweep", ""], "is no capacity"),
        (vec!["--sweep", "0.5", "--target-capacity", "0.5"], "cannot be used with"),
    ] {
        let output = program(&[&["tune", "--data", data, "-o", out], &more[..]].concat()).output().unwrap();
        let (_, err) = text(&output);
        assert!(output.status.code() == Some(1) && err.contains(message), "{more:?}: {err}");
    }
}

/// What cannot be written is named, and what was written before stays.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_error_and_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (write_data(dir.path(), 8), dir.path().join("r.safetensors"));
    let (data, out) = (data.to_str().unwrap(), out.to_str().unwrap());
    let args = ["tune", "--data", data, "-o", out, "--layers", "all", "--batch", "2", "--max-length", "48"];
    let with = |more: &[&'static str]| [&args[..], &["--steps", "2"], more].concat();
    let refused = |mut command: Command, message: &str| {
        let output = command.output().unwrap();
        let (_, err) = text(&output);
        let last = err.lines().last().unwrap_or_default();
        assert!(output.status.code() == Some(1) && last.starts_with("mindskip: error: "), "{err}");
        assert!(last.contains(message) && last.contains("; check the "), "{message}: {err}");
    };
    let [log, checkpoint] = ["jsonl", "checkpoint"].map(|name| format!("{out}.{name}"));
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    refused(program(&with(&[])), "r.safetensors.jsonl: the log cannot be written: No space left on device");
    assert!(!Path::new(&checkpoint).exists() && !Path::new(out).exists());
    std::fs::remove_file(&log).unwrap();

    // In the place of the routers there is what cannot be replaced; the run is done, though.
    std::fs::create_dir(out).unwrap();
    refused(program(&with(&[])), "r.safetensors: ");
    std::fs::remove_dir(out).unwrap();
    let done = read(&checkpoint);
    let output = program(&with(&["--resume"])).output().unwrap();
    assert!(output.status.success() && Path::new(out).exists(), "{}", text(&output).1);

    // Files end at 4 KB or 8 KB, as the shell counts; those of the checkpoint are more.
    let mut limited = Command::new("sh");
    let script = r#"trap "" XFSZ; ulimit -f 8; exec "$0" "$@""#;
    limited.args(["-c", script, env!("CARGO_BIN_EXE_mindskip")]).args(with(&["--seed", "1"]));
    limited.stdin(Stdio::null());
    refused(limited, "r.safetensors.checkpoint: File too large");
    assert_eq!(read(&checkpoint), done);
    let left = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.ends_with(".tmp")).collect::<Vec<_>>(), [""; 0]);
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
        let fixed = [
            "tune",
            "--data",
            data.to_str().unwrap(),
            "--steps",
            "30",
            "--batch",
            "8",
            "--max-length",
            "64",
            "--layers",
            "3-6",
            "-o",
        ];
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
    let same = |name: &str| assert_eq!(read(&format!("{whole}.{name}")), read(&format!("{resumed}.{name}")), "{name}");
    ["jsonl", "svg", "checkpoint"].iter().for_each(|name| same(name));
}

fn read(path: &str) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// ^C in a sweep leaves the targets that are done and a checkpoint; it goes on to the same bits, which are those of runs
/// for one target.
#[cfg(unix)]
#[test]
fn an_interrupted_sweep_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let data = write_data(dir.path(), 24);
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let with = |out: &str, more: &[&str]| {
        let fixed = ["--steps", "12", "--batch", "4", "--max-length", "48", "--json"];
        program(&[&["tune", "--data", data.to_str().unwrap(), "-o", &at(out)], &fixed[..], more].concat())
    };
    let run = |mut command: Command| -> serde_json::Value {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output).1);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let whole = run(with("whole.safetensors", &["--sweep", "0.5,0.8"]));
    let child = with("r.safetensors", &["--sweep", "0.8,0.5"]).spawn().unwrap();
    let (log, start) = (at("r-0.5.safetensors.jsonl"), Instant::now());
    while std::fs::read_to_string(&log).map_or(0, |log| log.lines().count()) < 2 {
        assert!(start.elapsed() < Duration::from_secs(120), "no steps");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output).1);
    let exists = |name: &str| Path::new(&at(name)).exists();
    assert!(exists("r-0.8.safetensors") && exists("r-0.5.safetensors.checkpoint") && !exists("r-0.5.safetensors"));

    let resumed = run(with("r.safetensors", &["--sweep", "0.8,0.5", "--resume"]));
    for name in ["0.8.safetensors", "0.5.safetensors", "0.8.safetensors.jsonl", "0.5.safetensors.jsonl"] {
        assert_eq!(read(&at(&format!("r-{name}"))), read(&at(&format!("whole-{name}"))), "{name}");
    }
    run(with("lone.safetensors", &["--target-capacity", "0.5"]));
    assert_eq!(read(&at("lone.safetensors")), read(&at("r-0.5.safetensors")));

    assert_eq!((&whole["dense"], whole["points"].as_array().unwrap().len()), (&resumed["dense"], 2));
    for (n, target) in [0.8, 0.5].into_iter().enumerate() {
        let [a, b] = [&whole, &resumed].map(|json| &json["points"][n]);
        for key in ["target", "threshold", "capacity", "loss", "change"] {
            assert_eq!(a[key], b[key], "{key}");
        }
        assert_eq!(a["target"], target);
        for key in ["prefill_speedup", "decode_speedup"] {
            assert!((0.9..2.0).contains(&a[key].as_f64().unwrap()), "{key}: {a}");
        }
    }
    let file: serde_json::Value = serde_json::from_slice(&read(&at("r.safetensors.json"))).unwrap();
    assert_eq!(file, resumed);
    let svg = String::from_utf8(read(&at("r.safetensors.svg"))).unwrap();
    assert!(["dense", "routed", "prefill", "decode"].iter().all(|name| svg.contains(name)), "{svg}");
}

/// The ideal of a text is that of its ops: nothing for no text, less where layers are skipped, more for more tokens.
#[test]
fn ideals_count_what_is_computed() {
    let bundle = embedded();
    let ids = bundle.tokenizer().unwrap().encode("Once upon a time there was a dog who had a red ball", false).unwrap();
    let settings = RouterSettings { granularity: "block_token".parse().unwrap(), ..RouterSettings::default() };
    let of =
        |capacity| Some(Routing { settings, layers: (0..8).collect(), gates: Gates::Random { capacity, seed: 1 } });
    let options = Options { device: Device::Cpu, context: Some(64), threads: Some(1), ..Options::default() };
    let mut engine = Engine::new(bundle.config, bundle.weights, of(1.0), &options).unwrap();
    let rates = Rates { copy: 1e9, product: 1e10 };
    let mut seconds = |capacity: Option<f32>, decoded: usize| {
        engine.reroute(capacity.and_then(of)).unwrap();
        let text = Text { ids: &ids, prompt: 4, decoded };
        ideal(&mut engine, &rates, &[text]).unwrap()
    };
    let (dense, none) = (seconds(None, 4), seconds(Some(0.0), 4));
    assert!(none.prefill < 0.6 * dense.prefill && none.decode < 0.6 * dense.decode, "{none:?}, {dense:?}");
    let one = seconds(None, 1);
    assert_eq!(one.prefill, dense.prefill);
    assert!((3.9..4.2).contains(&(dense.decode / one.decode)), "{dense:?}, {one:?}");
    assert_eq!(seconds(None, 0).decode, 0.0);
    assert_eq!(ideal(&mut engine, &rates, &[]).unwrap(), Ideal::default());
}

/// `auto:N` measures once, and again when what it kept is broken.
#[test]
fn tune_measures_which_layers_are_missed_the_least() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (write_data(dir.path(), 12), dir.path().join("r.safetensors"));
    let (data, out) = (data.to_str().unwrap(), out.to_str().unwrap());
    let args = ["tune", "--data", data, "-o", out, "--layers", "auto:3", "--calibration", "4", "--granularity"];
    let tune = |granularity: &str| {
        let fixed = ["--steps", "1", "--batch", "2", "--max-length", "48", "--json"];
        let mut command = program(&[&args[..], &[granularity], &fixed].concat());
        let output = command.env("XDG_CACHE_HOME", dir.path()).output().unwrap();
        let (json, err) = text(&output);
        assert!(output.status.success(), "{err}");
        (serde_json::from_str::<serde_json::Value>(&json).unwrap(), err)
    };
    let kept = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir.path().join("mindskip/layers")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let (first, err) = tune("attn_token");
    assert!(err.contains("measuring layers") && err.contains("loss when skipped"), "{err}");
    let layers = first["measured"]["layers"].as_array().unwrap();
    let mut order: Vec<usize> = (0..8).collect();
    order.sort_by(|&a, &b| layers[a]["loss"].as_f64().unwrap().total_cmp(&layers[b]["loss"].as_f64().unwrap()));
    let mut cheapest = order[..3].to_vec();
    cheapest.sort_unstable();
    assert_eq!(first["layers"], serde_json::json!(cheapest));
    let routed = (0..8).filter(|&l| layers[l]["routed"] == true).collect::<Vec<_>>();
    assert_eq!(routed, cheapest);
    assert_eq!(RouterSet::open(Path::new(out)).unwrap().weights.into_keys().collect::<Vec<_>>(), cheapest);
    assert!(std::fs::read_to_string(format!("{out}.layers.svg")).unwrap().contains("not routed"));

    let table = |err: &str| err.lines().filter(|line| line.contains(" +")).map(str::to_owned).collect::<Vec<_>>();
    let measured = table(&err);
    let (second, err) = tune("attn_sequence");
    assert!(err.contains("layers were measured before: ") && !err.contains("measuring layers"), "{err}");
    assert_eq!((second["layers"].clone(), table(&err)), (first["layers"].clone(), measured));
    tune("mlp_token");
    assert_eq!(kept().len(), 2);
    kept().iter().for_each(|path| std::fs::write(path, "{").unwrap());
    let (third, err) = tune("attn_token");
    assert!(err.contains("measuring layers") && third == first, "{err}");
}
