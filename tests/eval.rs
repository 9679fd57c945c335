//! Multiple choice and perplexity: what is shared changes nothing, the program says what lm-evaluation-harness says.

mod common;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::{Command, Output};

use common::*;
use mindskip::Kind;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};
use mindskip::eval::{Encoded, Work, score};
use mindskip::model::Routing;
use mindskip::router::{Keys, RouterSettings, Select};
use serde_json::Value;

fn settings(granularity: &str, keys: Keys, select: Select) -> RouterSettings {
    RouterSettings { granularity: granularity.parse().unwrap(), keys, select, ..RouterSettings::default() }
}

/// The embedded model's routers, put to other uses.
fn routed(granularity: &str, keys: Keys, select: Select) -> Option<Routing> {
    let mut set = Bundle::embedded().unwrap().routers.unwrap();
    set.settings = settings(granularity, keys, select);
    Some(Routing::routers(set))
}

fn stories(routing: Option<Routing>, options: &Options) -> Engine {
    let bundle = Bundle::embedded().unwrap();
    Engine::new(bundle.config, bundle.weights, routing, options).unwrap()
}

/// Records that begin alike, more of them than sequences, some of whose choices begin alike, over the borders of pages.
fn records() -> Vec<(String, Vec<Encoded>)> {
    let shots = ids(40, 1536, 1);
    let record = |n: u64| {
        let question = [&shots[..], &ids(18 + (n as usize) % 9, 1536, 100 + n)].concat();
        let choice = |i: u64| {
            let mut ids = [&question[..], &ids(1 + ((n + 3 * i) % 11) as usize, 1536, 1000 + 10 * n + i)].concat();
            // Of one record the contexts differ, too.
            if n == 8 {
                ids[50] = i as u32;
            }
            Encoded { ids, context: question.len(), cut: false }
        };
        ("shots".to_string(), (0..2 + n % 3).map(choice).collect())
    };
    let mut records: Vec<_> = (0..34).map(record).collect();
    records.push(("other".into(), vec![Encoded { ids: ids(9, 1536, 5), context: 1, cut: false }]));
    records
}

/// Every so many records, each of whose requests is a prompt of its own in `alone`; the rest takes too long.
const SOME: usize = 4;

/// Each request as a prompt of its own.
fn alone(engine: &mut Engine, records: &[(String, Vec<Encoded>)]) -> Vec<f32> {
    let mut found = Vec::new();
    for request in records.iter().step_by(SOME).flat_map(|(_, requests)| requests) {
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, request.inputs())]).unwrap();
        let targets: Vec<(u32, u32)> = request.targets().map(|(row, id)| (row as u32, id)).collect();
        found.push(engine.logprobs_at(&targets).unwrap().into_iter().map(f64::from).sum::<f64>() as f32);
        engine.close(seq).unwrap();
    }
    found
}

#[test]
fn shared_beginnings_change_nothing() {
    let drawn =
        |granularity| Some(random_gates(settings(granularity, Keys::Active, Select::Threshold), &[2, 3, 6], 0.5));
    for (name, routing, shares) in [
        ("dense", None, true),
        ("attn_token, keys active", routed("attn_token", Keys::Active, Select::Threshold), true),
        ("block_token, keys active", routed("block_token", Keys::Active, Select::Threshold), true),
        ("a random mask", drawn("block_token"), true),
        ("attn_sequence", routed("attn_sequence", Keys::All, Select::Threshold), false),
        ("top-k", routed("attn_token", Keys::All, Select::TopK), false),
    ] {
        let records = records();
        let work = Work::new(&records, routing.as_ref());
        let room = work.room();
        let options = Options { rows: Some(room.rows), ..options(room.batch, room.context) };
        let mut engine = stories(routing, &options);
        let mut done = 0;
        let found = score(&mut engine, &work, &mut |n| {
            done = n;
            ControlFlow::Continue(())
        })
        .unwrap();
        let tokens = engine.activity().unwrap().tokens;
        assert_eq!(engine.kv_usage().unwrap().pages, 0, "{name}: all is given back");
        let counts: Vec<usize> = found.iter().map(Vec::len).collect();
        assert_eq!(counts, records.iter().map(|(_, requests)| requests.len()).collect::<Vec<_>>());
        let all: usize = records.iter().map(|(_, requests)| requests.len()).sum();
        assert_eq!(done, all, "progress is told to the end");

        let found: Vec<f32> = found.into_iter().step_by(SOME).flatten().map(|x| x as f32).collect();
        assert_bits(name, &found, &alone(&mut engine, &records));
        let all: usize = records.iter().flat_map(|(_, requests)| requests).map(|r| r.inputs().len()).sum();
        if shares {
            assert!(tokens < all as u64 * 6 / 10, "{name}: {tokens} tokens of {all} were read");
        } else {
            assert_eq!(tokens, all as u64, "{name}: decisions are each request's own");
        }
    }
}

#[test]
fn scoring_can_be_broken_off() {
    let work = Work::new(&records(), None);
    let mut engine = stories(None, &options(4, work.room().context));
    let error = score(&mut engine, &work, &mut |done| {
        if done > 8 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(error.unwrap_err().kind(), Kind::Interrupted);
    assert_eq!(engine.kv_usage().unwrap().rows, 0);
    let mut small = stories(None, &options(4, 64));
    assert_eq!(score(&mut small, &work, &mut |_| ControlFlow::Continue(())).unwrap_err().kind(), Kind::Argument);
}

#[test]
fn a_sequence_returns_to_its_marks() {
    for routing in [
        None,
        routed("block_token", Keys::Active, Select::Threshold),
        routed("attn_sequence", Keys::All, Select::Threshold),
    ] {
        let mut engine = stories(routing, &options(2, 256));
        let (a, b) = (ids(100, 1536, 1), ids(60, 1536, 2));
        let seq = engine.open().unwrap();
        let start = engine.mark(seq).unwrap();
        engine.prefill(&[(seq, &a)]).unwrap();
        let behind = engine.mark(seq).unwrap();
        let usage = engine.kv_usage().unwrap();
        let first = engine.prefill(&[(seq, &b)]).unwrap().to_vec();
        let later = engine.mark(seq).unwrap();
        for _ in 0..70 {
            engine.decode(&[(seq, 3)]).unwrap();
        }
        engine.rewind(behind).unwrap();
        assert_eq!((engine.position(seq), engine.kv_usage().unwrap()), (100, usage), "pages are given back");
        assert_bits("the same continuation", engine.prefill(&[(seq, &b)]).unwrap(), &first);
        let error = engine.rewind(later).unwrap_err();
        assert_eq!((error.kind(), engine.position(seq)), (Kind::Argument, 160));

        // Another prompt, for which a sequence is decided anew.
        engine.rewind(start).unwrap();
        let other = engine.open().unwrap();
        let fresh = engine.prefill(&[(other, &b)]).unwrap().to_vec();
        assert_bits("as in a new sequence", engine.prefill(&[(seq, &b)]).unwrap(), &fresh);
        engine.close(seq).unwrap();
        assert!(engine.rewind(start).is_err() && engine.mark(seq).is_err());
        let again = engine.open().unwrap();
        assert!(engine.rewind(start).is_err() && engine.mark(again).is_ok(), "a mark outlives no sequence");
    }
}

#[test]
fn targets_are_of_rows_that_were_read() {
    let mut engine = stories(None, &options(2, 32));
    let (a, b) = (ids(5, 1536, 1), ids(7, 1536, 2));
    let (x, y) = (engine.open().unwrap(), engine.open().unwrap());
    engine.prefill(&[(x, &a), (y, &b)]).unwrap();
    let both = engine.logprobs_at(&[(11, 9), (2, 8), (4, 7)]).unwrap();
    assert!(engine.logprobs_at(&[(12, 9)]).is_err() && engine.logprobs_at(&[(0, 1536)]).is_err());
    assert!(engine.logprobs(&[1]).is_err(), "two sequences");
    engine.decode(&[(x, 1)]).unwrap();
    assert!(engine.logprobs_at(&[(0, 1)]).is_err());
    engine.close(x).unwrap();
    let x = engine.open().unwrap();
    engine.prefill(&[(x, &a)]).unwrap();
    let own = engine.logprobs(&[0, 0, 8, 0, 7]).unwrap();
    assert_bits("in a batch", &both[1..], &[own[2], own[4]]);
}

fn eval(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mindskip")).arg("eval").args(args).env("HF_HUB_OFFLINE", "1").output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let output = eval(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn file(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    path
}

const PIQA: &str = r#"{"question": "How do I throw a ball?", "choices": ["Take it in your hand, and let it go.", "Eat it."], "gold": 0}
{"question": "Tom was hungry, so", "choices": ["he ate an apple.", "he was an apple. It was red, and it was very big."], "gold": 0}
{"question": "What is wet?", "choices": ["The water.", "The sun."], "gold": 1}
"#;
const WINOGRANDE: &str = r#"{"question": "Lily gave the ball to Tom because _ wanted to play.", "choices": ["Tom", "Lily"], "gold": 0}
{"question": "The cat could not jump over the box because the _ was big.", "choices": ["cat", "box"], "gold": 1}
"#;

/// lm-evaluation-harness 0.4.13 with transformers 5.23 in f32, of these files by the embedded model, dense, without and with a
/// shot: `scripts/compare-eval`.
const HARNESS: [[f64; 10]; 2] = [
    [
        -53.631527, -39.812660, -20.866722, -50.006302, -30.921438, -25.484512, -7.309217, -7.037674, -5.822138,
        -4.826118,
    ],
    [
        -55.217640, -39.177750, -25.135090, -56.482864, -30.376060, -23.954193, -6.073042, -4.725031, -3.794169,
        -3.612473,
    ],
];
/// Of PIQA, normalised by length, and of WinoGrande.
const ACCURACIES: [(f64, f64, f64); 2] = [(2.0 / 3.0, 1.0 / 3.0, 0.5), (2.0 / 3.0, 2.0 / 3.0, 0.5)];

#[test]
fn the_program_scores_as_the_harness_does() {
    let dir = tempfile::tempdir().unwrap();
    let (piqa, winogrande) = (file(&dir, "piqa.jsonl", PIQA), file(&dir, "w.jsonl", WINOGRANDE));
    let samples = dir.path().join("samples.jsonl");
    let winogrande = format!("winogrande={}", winogrande.display());
    let args = [
        piqa.to_str().unwrap(),
        &winogrande,
        "--routers",
        "none",
        "--device",
        "cpu",
        "--samples",
        samples.to_str().unwrap(),
    ];
    for (shots, expected) in HARNESS.iter().enumerate() {
        let value = json(&[&args[..], &["--shots", &shots.to_string()]].concat());
        let lines: Vec<Value> = std::fs::read_to_string(&samples)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let found: Vec<f64> = lines.iter().map(|line| line["loglikelihood"].as_f64().unwrap()).collect();
        assert_eq!(found.len(), expected.len());
        for (line, (found, expected)) in lines.iter().zip(found.iter().zip(expected)) {
            assert!((found - expected).abs() < 1e-3, "{line}, the harness: {expected}");
        }
        let accuracy = |i: usize, name: &str| value["tasks"][i][name]["mean"].as_f64();
        let (piqa, norm, winogrande) = ACCURACIES[shots];
        let means = (accuracy(0, "acc"), accuracy(0, "acc_norm"), accuracy(1, "acc"), accuracy(1, "acc_norm"));
        assert_eq!(means, (Some(piqa), Some(norm), Some(winogrande), None));
        assert_eq!(
            (value["tasks"][1]["task"].as_str(), value["tasks"][1]["records"].as_u64()),
            (Some("winogrande"), Some(2))
        );
    }
    let lines = std::fs::read_to_string(&samples).unwrap();
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(
        last["context"],
        concat!(
            "Lily gave the ball to Tom because Tom wanted to play.\n\n",
            "The cat could not jump over the box because the box"
        )
    );
    assert_eq!((&last["continuation"], &last["gold"], &last["choice"]), (&" was big.".into(), &true.into(), &1.into()));
}

#[test]
fn tables_are_for_people() {
    let dir = tempfile::tempdir().unwrap();
    let (piqa, text) = (file(&dir, "piqa.jsonl", PIQA), file(&dir, "story.txt", &"Tom had a red ball. ".repeat(30)));
    let output = eval(&[piqa.to_str().unwrap(), "--limit", "2", "--text", text.to_str().unwrap(), "--window", "64"]);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{err}");
    for part in [
        "stories; attn_token",
        "acc_norm %",
        "| piqa |       2 |     0 |",
        "perplexity",
        "bits/byte",
        "capacity",
        "layer   7",
    ] {
        assert!(out.contains(part), "no {part:?} in {out}");
    }
    assert!(err.contains(" tokens in "), "{err}");

    // A text in one window is what `score` says of it.
    let whole = json(&["--text", text.to_str().unwrap(), "--window", "512"]);
    let scored = Command::new(env!("CARGO_BIN_EXE_mindskip"))
        .args(["score", "--json", "--file", text.to_str().unwrap()])
        .output()
        .unwrap();
    let scored: Value = serde_json::from_slice(&scored.stdout).unwrap();
    let logprobs: Vec<f64> = scored["logprobs"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
    let loss = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
    let text = &whole["texts"][0];
    assert!((text["loss"].as_f64().unwrap() - loss).abs() < 1e-5, "{text}, {loss}");
    assert!((text["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-3);
    let bits = loss * logprobs.len() as f64 / 600.0 / std::f64::consts::LN_2;
    assert!((text["bits_per_byte"].as_f64().unwrap() - bits).abs() < 1e-5);
}

#[test]
fn the_table_has_a_row_for_each_routers() {
    let dir = tempfile::tempdir().unwrap();
    let piqa = file(&dir, "piqa.jsonl", PIQA).display().to_string();
    let winogrande = format!("winogrande={}", file(&dir, "w.jsonl", WINOGRANDE).display());
    let routers = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/stories/routers.safetensors");
    let twice = format!("{routers},{routers}");
    let out = dir.path().join("table.json");
    let args = ["table", &piqa, &winogrande, "--prompt", "32", "--gen", "8", "--reps", "1", "--device", "cpu"];
    let made = |routers: &str, rest: &[&str]| {
        let output = eval(&[&args[..], &["--routers", routers], rest].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(made(&twice, &["--format", "json", "-o", out.to_str().unwrap()]), "");
    let rows: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 3);
    for (i, routers) in ["none", routers, routers].into_iter().enumerate() {
        let own = json(&[&piqa, &winogrande, "--routers", routers]);
        let (row, mean) = (&rows[i], |value: &Value| value["mean"].as_f64().unwrap());
        let (piqa, winogrande) = (mean(&own["tasks"][0]["acc_norm"]), mean(&own["tasks"][1]["acc"]));
        assert_eq!((mean(&row["scores"]["piqa"]), mean(&row["scores"]["winogrande"])), (piqa, winogrande));
        assert_eq!(row["average"].as_f64().unwrap(), (piqa + winogrande) / 2.0);
        let delta = row["average"].as_f64().unwrap() - rows[0]["average"].as_f64().unwrap();
        assert_eq!((mean(&row["delta"]), row["capacity"].as_f64()), (delta, own["capacity"].as_f64()));
        assert!(row["speed"]["prefill"]["speedup"].as_f64().unwrap() > 0.0);
    }
    assert_eq!((&rows[0]["routing"], &rows[1]["routing"]), (&"dense".into(), &"attn_token".into()));
    let text = made(routers, &[]);
    for part in ["command: ", "prefill 32", "decode 8", "winogrande", "routers.safetensors", "average", "delta"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert_eq!(made(routers, &["--format", "csv"]).lines().count(), 3);
    let output = eval(&["table", &piqa, "--routers", &piqa]);
    assert!(!output.status.success() && output.stdout.is_empty());
}

/// What is in the file of answers is taken from there, and only that.
#[test]
fn a_table_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let piqa = file(&dir, "piqa.jsonl", PIQA).display().to_string();
    let routers = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/stories/routers.safetensors");
    let kept = dir.path().join("answers.jsonl");
    let made = |piqa: &str, more: &[&str]| {
        let args =
            ["table", piqa, "--routers", routers, "--prompt", "8", "--gen", "0", "--reps", "1", "--device", "cpu"];
        let output = eval(&[&args[..], &["--format", "json"], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
        [0, 1].map(|i| (rows[i]["scores"].clone(), rows[i]["capacity"].clone()))
    };
    let answers = ["--answers", kept.to_str().unwrap()];
    let lines = || std::fs::read_to_string(&kept).unwrap();
    let first = made(&piqa, &[]);
    assert_eq!(made(&piqa, &answers), first);
    assert_eq!(lines().lines().count(), 2);
    // The second half is lost.
    let whole = lines();
    std::fs::write(&kept, whole.lines().next().unwrap()).unwrap();
    assert_eq!((made(&piqa, &answers), lines()), (first.clone(), whole.clone()));
    // With other answers all is right: they were taken from there.
    let right = |line: &str| {
        let mut answers: Value = serde_json::from_str(line).unwrap();
        answers["loglikelihoods"] = serde_json::json!([[-1.0, -99.0], [-1.0, -99.0], [-99.0, -1.0]]);
        answers.to_string()
    };
    let turned: Vec<String> = whole.lines().map(right).collect();
    std::fs::write(&kept, turned.join("\n")).unwrap();
    let other = made(&piqa, &answers);
    assert_eq!([&other[0].0, &other[1].0].map(|scores| scores["piqa"]["mean"].as_f64()), [Some(1.0); 2]);
    assert!(first[0].0["piqa"]["mean"].as_f64() < Some(1.0), "{first:?}");
    // Other requests, or what does not fit them, are answered anew.
    std::fs::write(&kept, whole.replace("\"active\":[", "\"active\":[1,")).unwrap();
    assert_eq!(made(&piqa, &answers), first);
    let fewer = format!("piqa={}", file(&dir, "fewer.jsonl", PIQA.lines().next().unwrap()).display());
    let before = lines().lines().count();
    made(&fewer, &answers);
    assert_eq!(lines().lines().count(), before + 2);
    std::fs::write(&kept, "{\"of\": 1}").unwrap();
    let output = eval(&[&["table", &piqa, "--routers", routers][..], &answers].concat());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("answers.jsonl") && error.contains("delete it"), "{error}");
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let piqa = file(&dir, "piqa.jsonl", PIQA).display().to_string();
    let broken =
        file(&dir, "broken.jsonl", &format!("{PIQA}{{\"question\": \"q\", \"gold\": 0}}\n")).display().to_string();
    let long = file(&dir, "long.jsonl", &PIQA.replace("Eat it.", &"Eat it. ".repeat(200))).display().to_string();
    let text = file(&dir, "a.txt", "a").display().to_string();
    let piqa_is = |path: &str| format!("piqa={path}");
    for (args, parts) in [
        (&[&broken[..]][..], &["broken.jsonl: line 1: no `context`; name the task"][..]),
        (&[&piqa_is(&broken)], &["broken.jsonl: line 4: no `sol1`"]),
        (&[&piqa_is(&long)], &["long.jsonl: a choice of ", "(while reading record 1); raise --context"]),
        (&["absent.jsonl"], &["absent.jsonl: ", "; check the path"]),
        (&["what=absent.jsonl"], &["\"what\" is not one of arc_challenge"]),
        (&[], &["there is nothing to score; name task files"]),
        (&[&piqa, "--limit", "0"], &["--limit is 0; give 1"]),
        (&[&piqa, "--shots", "3"], &["there are 2 to take them from", "; lower --shots"]),
        (&[&piqa, &piqa, "--shots", "1", "--shots-from", &piqa], &["--shots-from is for one task"]),
        (&["--text", &text, "--window", "1"], &["a.txt: --window is 1; give 2 or more"]),
        (&["--text", &piqa, "--stride", "64", "--window", "64"], &["--stride is 64; give 1 to 63"]),
        (&["--text", &piqa, "--window", "64", "--context", "32"], &["longer than --context; lower --window"]),
    ] {
        let output = eval(args);
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{args:?}: {err}");
        for part in parts {
            assert!(err.contains(part), "{args:?}: no {part:?} in {err:?}");
        }
    }
}
