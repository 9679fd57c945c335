//! The program as users call it.

mod common;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Golden, goldens};
use serde_json::Value;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mindskip"));
    command.env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

/// Runs what must succeed; returns standard output.
fn ok(args: &[&str]) -> String {
    let output = run(args);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {err}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    let text = ok(args);
    assert_eq!(text.lines().count(), 1, "one line of JSON: {text}");
    serde_json::from_str(&text).unwrap()
}

/// Runs what must fail: exit code 1, nothing on standard output, one line of error that says all of `parts`.
fn fails(args: &[&str], parts: &[&str]) {
    let output = run(args);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {err}");
    assert!(output.stdout.is_empty(), "{args:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    for part in parts.iter().chain(&["mindskip: error: ", "; "]) {
        assert!(err.contains(part), "{args:?}: no {part:?} in {err:?}");
    }
}

fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories")
}

/// A copy of the embedded model's folder with one file changed.
fn changed(file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(stories().join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join(file);
    let bytes = change(std::fs::read(&path).unwrap_or_default());
    std::fs::write(path, bytes).unwrap();
    dir
}

fn replaced(file: &str, from: &str, to: &str) -> tempfile::TempDir {
    changed(file, |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(from));
        text.replace(from, to).into_bytes()
    })
}

fn path(dir: &tempfile::TempDir) -> &str {
    dir.path().to_str().unwrap()
}

#[test]
fn without_arguments_it_shows_what_skipping_does() {
    let start = Instant::now();
    let text = ok(&[]);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    for part in [
        "— dense\nOnce upon a time",
        "— routed: attn_token, keys all",
        "decode tok/s",
        "capacity",
        "K/V saved",
        "layer   7",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    // Two different stories, each of some length.
    let stories: Vec<_> = text.split("\n— ").skip(1).map(|s| s.split("\n\nOn ").next().unwrap()).collect();
    assert_eq!(stories.len(), 3);
    assert!(stories.iter().all(|s| s.split_whitespace().count() > 60), "{text}");
    assert_ne!(stories[0].split_once('\n').unwrap().1, stories[1].split_once('\n').unwrap().1);
}

#[test]
fn text_streams_as_json_says() {
    let args = ["generate", "Tom had a red ball.", "-n", "40"];
    let value = json(&[&args[..], &["--json"]].concat());
    let answer = &value["answers"][0];
    assert_eq!(ok(&args).trim_end(), answer["text"].as_str().unwrap().trim_end());
    assert_eq!(answer["ids"].as_array().unwrap().len(), 40);
    assert_eq!(answer["finish"], "length");
    assert!(value["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!(value["layers"].as_array().unwrap().len(), 5);
    let capacity = value["capacity"].as_f64().unwrap();
    assert!(capacity > 0.05 && capacity < 0.95, "{capacity}");

    // The same by ids, from a file, and from standard input.
    let scored = json(&["score", "--text", "Tom had a red ball.", "--json"]);
    let ids: Vec<String> = scored["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let by_ids = json(&["generate", "--ids", &ids.join(","), "-n", "40", "--json"]);
    assert_eq!(by_ids["answers"], value["answers"]);
    let dir = tempfile::tempdir().unwrap();
    let (ids_file, text_file) = (dir.path().join("ids"), dir.path().join("prompt.txt"));
    std::fs::write(&ids_file, ids.join("\n")).unwrap();
    std::fs::write(&text_file, "Tom had a red ball.").unwrap();
    let by_file = json(&["generate", "--ids-file", ids_file.to_str().unwrap(), "-n", "40", "--json"]);
    assert_eq!(by_file["answers"], value["answers"]);
    let by_text_file = json(&["generate", "--file", text_file.to_str().unwrap(), "-n", "40", "--json"]);
    assert_eq!(by_text_file["answers"], value["answers"]);
    let mut child = program()
        .args(["generate", "-n", "40", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Tom had a red ball.").unwrap();
    let by_stdin: Value = serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(by_stdin["answers"], value["answers"]);
}

#[test]
fn a_batch_says_what_its_members_say_alone() {
    let prompts = ["Tom had a red ball.", "One day, a dog", "The sun was hot. Anna"];
    for extra in [&[][..], &["-t", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "3"], &["--capacity", "0.5"]] {
        let batch = json(&[&["generate", "-n", "30", "--json"], extra, &prompts].concat());
        let alone = json(&[&["generate", "-n", "30", "--json", prompts[0]], extra].concat());
        assert_eq!(batch["answers"][0], alone["answers"][0], "{extra:?}");
        assert_eq!(batch["answers"].as_array().unwrap().len(), 3);
        // Two at a time, and pages for one of them.
        let few = ["generate", "-n", "30", "--json", "--batch", "2", "--kv-tokens", "64"];
        assert_eq!(json(&[&few, extra, &prompts].concat())["answers"], batch["answers"], "{extra:?}");
        let lines = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(lines.path(), prompts.join("\n\n") + "\n").unwrap();
        let by_lines = json(&[&few, extra, &["--lines", lines.path().to_str().unwrap()]].concat());
        assert_eq!(by_lines["answers"], batch["answers"], "{extra:?}");
    }
    let text = ok(&["generate", "-n", "5", prompts[0], prompts[1]]);
    assert!(text.starts_with("--- 1 ---\n") && text.contains("\n--- 2 ---\n"), "{text}");
}

#[test]
fn sampling_obeys_its_knobs() {
    let text = |extra: &[&str]| ok(&[&["generate", "Tom had a red ball.", "-n", "40"], extra].concat());
    let warm = ["-t", "1.0", "--seed", "1"];
    assert_eq!(text(&warm), text(&warm), "the same seed, the same text");
    assert_ne!(text(&warm), text(&["-t", "1.0", "--seed", "2"]));
    assert_eq!(text(&[]), text(&["-t", "1.0", "--top-k", "1"]), "one candidate is the best");
    assert_eq!(text(&["--greedy"]), text(&["-t", "0.7", "--min-p", "1"]));
    assert_ne!(text(&[]), text(&["--repetition-penalty", "1.5"]));
}

#[test]
fn stop_texts_and_ends_end_an_answer() {
    let whole = ok(&["generate", "Tom had a red ball.", "-n", "60"]);
    let (before, _) = whole.split_once("He would").expect("the model says so");
    let value =
        json(&["generate", "Tom had a red ball.", "-n", "60", "--stop", "He would", "--stop", "never said", "--json"]);
    assert_eq!(value["answers"][0]["text"].as_str().unwrap(), before);
    assert_eq!(value["answers"][0]["finish"], "stop");
    let all = json(&["generate", "Tom had a red ball.", "-n", "500", "--json"]);
    assert_eq!(all["answers"][0]["finish"], "eos", "the story ends before the context of 512 is full");
    let full = json(&["generate", "Tom had a red ball.", "-n", "10000", "--ignore-eos", "--json"]);
    assert_eq!(full["answers"][0]["finish"], "context");
    let tokens = full["answers"][0]["ids"].as_array().unwrap().len() as u64;
    assert_eq!(tokens + full["prompt_tokens"].as_u64().unwrap(), 513, "the last token needs no room");
}

#[test]
fn statistics_go_to_standard_error() {
    let output = run(&["generate", "Tom had a red ball.", "-n", "20", "--stats", "--keys", "active"]);
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(out, ok(&["generate", "Tom had a red ball.", "-n", "20", "--keys", "active"]));
    for part in ["keys active", "prefill", "decode", "first token after", "capacity", "█", "K/V", "saved"] {
        assert!(err.contains(part), "no {part:?} in {err}");
    }
}

/// The published contract of `score`, against the goldens of the independent reference.
#[test]
fn score_gives_the_numbers_of_the_reference() {
    let root = goldens().join("routing");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(root.join("cases.json")).unwrap()).unwrap();
    for case in cases {
        let golden = Golden::open(&root.join(case["file"].as_str().unwrap()));
        let text = |key: &str| case[key].as_str().unwrap().to_owned();
        let ids = golden.ints("0.ids");
        let list: Vec<_> = ids.iter().map(u32::to_string).collect();
        let (model, routers) = (root.join(text("model")), root.join(text("routers")));
        let threshold = case["threshold"].to_string();
        let capacity = case["capacity"].to_string();
        let (granularity, keys, select, ids_arg) = (text("granularity"), text("keys"), text("select"), list.join(","));
        let mut args = vec!["score", "--json", "--trace", "--ids", &ids_arg, "--model", model.to_str().unwrap()];
        args.extend(["--routers", routers.to_str().unwrap(), "--granularity", &granularity, "--keys", &keys]);
        args.extend(["--select", &select, "--threshold", &threshold]);
        if select == "topk" {
            args.extend(["--capacity", &capacity]);
        }
        let value = json(&args);

        let name = text("name");
        let logits = golden.floats("0.logits");
        let vocab = logits.len() / ids.len();
        let logprobs = value["logprobs"].as_array().unwrap();
        assert!(logprobs[0].is_null() && logprobs.len() == ids.len(), "{name}");
        for (row, lp) in logprobs.iter().skip(1).enumerate() {
            let l = &logits[row * vocab..][..vocab];
            let max = l.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = l.iter().map(|&x| f64::from(x - max).exp()).sum();
            let expected = f64::from(l[ids[row + 1] as usize] - max) - sum.ln();
            assert!((lp.as_f64().unwrap() - expected).abs() < 1e-3, "{name}: row {row}, {lp} for {expected}");
        }
        let layers = value["layers"].as_array().unwrap();
        let (scores, active) = (golden.floats("0.scores"), golden.ints("0.active"));
        let per_layer = scores.len() / layers.len();
        for (i, layer) in layers.iter().enumerate() {
            assert_eq!(layer["layer"], case["layers"][i], "{name}");
            let flags: Vec<_> =
                layer["active"].as_array().unwrap().iter().map(|a| a.as_u64().unwrap() as u32).collect();
            assert_eq!(flags, active[i * per_layer..(i + 1) * per_layer], "{name}, layer {i}");
            for (score, expected) in layer["scores"].as_array().unwrap().iter().zip(&scores[i * per_layer..]) {
                assert!(
                    (score.as_f64().unwrap() - f64::from(*expected)).abs() < 1e-4,
                    "{name}: {score} for {expected}"
                );
            }
        }
    }
}

/// What `explain` says of a text is what `score --trace` says; a page is written beside it.
#[test]
fn explain_shows_what_each_token_passed() {
    let text = "Tom <b>had</b> a \u{1b}[31m \u{1f469} ball.";
    let dir = tempfile::tempdir().unwrap();
    let page = dir.path().join("page.html");
    let value = json(&["explain", text, "--json", "--html", page.to_str().unwrap()]);
    let traced = json(&["score", "--text", text, "--json", "--trace"]);
    let tokens = value["tokens"].as_array().unwrap();
    let column = |name: &str| tokens.iter().map(|token| token[name].clone()).collect::<Vec<_>>();
    assert_eq!(column("id"), *traced["ids"].as_array().unwrap());
    let joined: String = column("text").iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(joined, format!("<|endoftext|>{text}"));
    let layers = traced["layers"].as_array().unwrap();
    for (i, passed) in column("passed").iter().enumerate() {
        let active = layers.iter().filter(|layer| layer["active"][i] == 1).count();
        assert_eq!(*passed, active, "token {i}");
    }
    for (layer, traced) in value["layers"].as_array().unwrap().iter().zip(layers) {
        assert_eq!((&layer["scores"], &layer["active"]), (&traced["scores"], &traced["active"]));
        let active: u64 = traced["active"].as_array().unwrap().iter().map(|a| a.as_u64().unwrap()).sum();
        let capacity = layer["capacity"].as_f64().unwrap();
        assert!((capacity - active as f64 / tokens.len() as f64).abs() < 1e-9, "{layer}");
    }
    let html = std::fs::read_to_string(&page).unwrap();
    let score = layers[1]["scores"][1].as_f64().unwrap();
    assert!(html.contains(&format!("data-t=\"Tom · layer 4 · score {score:.4} · ")), "{html}");
    assert!(!html.contains("<b>had"), "{html}");

    // No terminal: a line for each token, and no escapes. The same from a file, standard input and ids.
    let plain = ok(&["explain", text]);
    assert!(!plain.contains('\x1b') && plain.contains("  Tom\n") && plain.contains("layer   7"), "{plain}");
    assert_eq!(plain.lines().filter(|line| line.contains("/5  ")).count(), tokens.len());
    let file = dir.path().join("text");
    std::fs::write(&file, format!("{text}\n")).unwrap();
    assert_eq!(ok(&["explain", "--file", file.to_str().unwrap()]), plain);
    assert_eq!(ok(&["explain", "--text", text]), plain);
    let piped = program().arg("explain").stdin(std::fs::File::open(file).unwrap()).output().unwrap();
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), plain);
    let ids: Vec<_> = column("id").iter().map(Value::to_string).collect();
    assert_eq!(ok(&["explain", "--ids", &ids.join(",")]), plain);

    // A sequence that is decided as a whole: every token is.
    let whole = json(&["explain", text, "--json", "--granularity", "attn_sequence", "--threshold", "0.1"]);
    let layers = whole["layers"].as_array().unwrap();
    let passed = layers.iter().filter(|layer| layer["active"] == serde_json::json!([1])).count();
    assert!(whole["tokens"].as_array().unwrap().iter().all(|token| token["passed"] == passed), "{whole}");

    fails(&["explain", text, "--routers", "none"], &["every token passes", "--routers FILE"]);
    fails(&["explain", ""], &["nothing to explain"]);
    fails(&["explain", &"word ".repeat(2000)], &["longer than the context of 512"]);
    fails(&["explain", text, "--html", "/no/such/folder/page"], &["/no/such/folder"]);
}

#[test]
fn a_random_mask_needs_no_routers() {
    let model = goldens().join("routing/model");
    let ids: Vec<_> = (0..180).map(|i: u32| i.to_string()).collect();
    for (granularity, keys) in
        [("attn_token", "all"), ("attn_token", "active"), ("mlp_token", "all"), ("block_token", "active")]
    {
        let value = json(&[
            "score",
            "--json",
            "--trace",
            "--model",
            model.to_str().unwrap(),
            "--ids",
            &ids.join(","),
            "--capacity",
            "0.5",
            "--granularity",
            granularity,
            "--keys",
            keys,
            "--layers",
            "1-4",
        ]);
        let layers = value["layers"].as_array().unwrap();
        let active: u64 =
            layers.iter().flat_map(|l| l["active"].as_array().unwrap()).map(|a| a.as_u64().unwrap()).sum();
        assert_eq!(layers.len(), 4);
        assert!((290..430).contains(&active), "{active} of 720 at capacity 0.5");
    }
}

#[test]
fn bench_measures_what_was_listed() {
    let work = ["--prompt", "16", "--reps", "1", "--warmup", "0", "--device", "cpu", "--gen"];
    let bench = |more: &[&str]| ok(&[&["bench"], &work[..], more].concat());
    let lines = bench(&["2", "--capacity", "0.5,1", "--batch", "1,2", "--keys", "all,active", "--format", "jsonl"]);
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2 * (1 + 2 * 2), "by batch: dense, and each of keys and capacity");
    assert_eq!((&rows[0]["routing"], &rows[4]["keys"]), (&"dense".into(), &"active".into()));
    assert!(rows.iter().all(|row| row["decode"]["tokens_per_s"].as_f64().unwrap() > 0.0));

    let routed = bench(&["2", "--routers", "stories", "--format", "csv"]);
    assert_eq!(routed.lines().count(), 3);
    assert!(routed.lines().nth(2).unwrap().contains("stories (embedded)/routers.safetensors"), "{routed}");

    // Sequences are decided as a whole, so there is no choice of keys.
    let all = bench(&["0", "--granularity", "all", "--keys", "all,active", "--capacity", "0.5"]);
    let table = all.lines().filter(|line| line.starts_with('|')).count();
    assert_eq!(table, 2 + 1 + 6 + 2, "a line for each prefill: {all}");

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bench.json");
    assert_eq!(bench(&["2", "--capacity", "0", "--format", "json", "-o", file.to_str().unwrap()]), "");
    let saved: Vec<Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(saved[1]["active"], 0.0);

    let ops =
        ok(&["bench", "ops", "--rows", "1", "--reps", "1", "--context", "8", "--device", "cpu", "--format", "jsonl"]);
    assert!(ops.lines().count() > 10 && ops.contains("\"op\":\"attend\""), "{ops}");
    assert!(ops.contains("\"op\":\"attend_backward\""), "{ops}");

    let plot = dir.path().join("bench.svg");
    bench(&["2", "--capacity", "1,0", "--plot", plot.to_str().unwrap()]);
    let svg = std::fs::read_to_string(plot).unwrap();
    for text in ["speedup over dense", "capacity: active share", "attn_token, all", "ideal", "decode 2 behind 16"] {
        assert!(svg.contains(text), "no {text:?} in {svg}");
    }
}

#[test]
fn bench_compares_saved_results() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, slow, broken] = ["a.json", "b.jsonl", "slow.json", "broken.json"].map(|name| dir.path().join(name));
    let [a, b, slow, broken] = [&a, &b, &slow, &broken].map(|path| path.to_str().unwrap());
    let work = ["bench", "--prompt", "8", "--gen", "2", "--capacity", "0", "--device", "cpu", "--reps"];
    ok(&[&work[..], &["5", "--format", "json", "-o", a]].concat());
    ok(&[&work[..], &["2", "--format", "jsonl", "-o", b]].concat());
    let text = ok(&["bench", "compare", a, b]);
    assert!(text.contains("too few") && text.contains(" B/A |") && text.contains("decode 2 behind 8"), "{text}");

    // Times that say how they compare, whatever the machine did meanwhile.
    let mut rows: Value = serde_json::from_slice(&std::fs::read(a).unwrap()).unwrap();
    let took = |rows: &mut Value, seconds: f64| {
        let samples: Vec<f64> = (0..5).map(|i| seconds * (1.0 + 0.01 * f64::from(i))).collect();
        rows[1]["decode"]["samples"] = samples.into();
    };
    took(&mut rows, 0.1);
    std::fs::write(a, rows.to_string()).unwrap();
    took(&mut rows, 1.0);
    rows[0]["cpu"] = "another".into();
    rows[1]["cpu"] = "another".into();
    std::fs::write(slow, rows.to_string()).unwrap();
    let output = run(&["bench", "compare", a, slow, "--format", "json", "--fail-slower"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("warning: A and B differ in cpu: "));
    let compared: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let verdicts: Vec<&str> = compared.iter().map(|row| row["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["same", "same", "same", "slower"]);
    assert!(ok(&["bench", "compare", a, slow, "--format", "csv"]).starts_with("test,routing,keys,capacity"));
    assert!(run(&["bench", "compare", slow, a, "--fail-slower"]).status.success(), "faster");
    assert_eq!(run(&["bench", "compare", a, b, "--fail-slower"]).status.code(), Some(1), "nothing was compared");
    assert!(ok(&["bench", "compare", a, slow, "--least", "20"]).contains("change: same"));

    std::fs::write(broken, &std::fs::read(a).unwrap()[..200]).unwrap();
    fails(&["bench", "compare", a, broken], &["broken.json", "EOF while parsing"]);
    fails(&["bench", "compare", "/no/such/file", a], &["/no/such/file"]);
    fails(&["bench", "compare", a, b, "--least", "-1"], &["--least is -1"]);
}

#[test]
fn inspect_and_doctor_tell_what_there_is() {
    let text = ok(&["inspect"]);
    for part in ["stories (embedded)", "8 layers", "attn_token, keys all", "layers, 3-7", "memory", "K/V"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let value = json(&["inspect", "--json", "--plan"]);
    assert_eq!((&value["layers"], &value["vocab"]), (&8.into(), &1536.into()));
    let sum = ["weights", "activations", "kv"].map(|k| value["memory"][k].as_u64().unwrap()).iter().sum::<u64>();
    assert_eq!(value["memory"]["total"].as_u64().unwrap(), sum);
    assert!(ok(&["inspect", "--plan"]).contains("router logits"));
    let small = json(&["inspect", "--json", "--batch", "8", "--kv-tokens", "1000"]);
    assert_eq!((&small["memory"]["kv_tokens"], &small["memory"]["kv_pages"]), (&1024.into(), &(8 * 16).into()));
    assert!(ok(&["inspect", "--batch", "8", "--kv-tokens", "1000"]).contains("for 1024 tokens at a time"));
    let narrow = json(&["inspect", "--json", "--plan", "--device", "cpu", "--kv-dtype", "f16", "--gpu-memory", "90%"]);
    let bytes = |value: &Value| value["memory"]["kv_page_bytes"].as_u64().unwrap() - 256; // positions
    assert_eq!(2 * bytes(&narrow), bytes(&value));
    let routers = stories().join("routers.safetensors");
    assert!(ok(&["inspect", routers.to_str().unwrap()]).contains("5 layers, 3-7, hidden 128"));
    assert_eq!(json(&["inspect", "--json", routers.to_str().unwrap()])["granularity"], "attn_token");
    for folder in std::fs::read_dir(goldens().join("families")).unwrap() {
        ok(&["inspect", folder.unwrap().path().to_str().unwrap()]);
    }
    assert!(ok(&["doctor"]).contains("threads"));
    assert!(json(&["doctor", "--json"])["threads"].as_u64().unwrap() > 0);
}

#[test]
fn chat_remembers_and_ends() {
    let template = "{% for m in messages %}{{ m.content }} {% endfor %}";
    let dir = changed("chat_template.jinja", |_| template.as_bytes().to_vec());
    let talk = |lines: &str| {
        let mut child = program()
            .args(["chat", "--model", path(&dir), "-n", "8", "--stats"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{err}");
        (String::from_utf8(output.stdout).unwrap(), err)
    };
    let (one, _) = talk("Tom had a red ball.\n");
    let (two, err) = talk("Tom had a red ball.\nThe dog\n/stats\n");
    let second = two.strip_prefix(&one).expect("the first answer again");
    assert!(err.contains("K/V"), "{err}");
    // What was said is still known: the second answer is not that to the second message alone, unless it is forgotten.
    let (alone, _) = talk("The dog\n");
    assert_ne!(second, alone);
    let (fresh, _) = talk("Tom had a red ball.\n/clear\nThe dog\n/quit\nnever read\n");
    assert_eq!(fresh, one.clone() + &alone);
    // It is exactly the continuation of the whole conversation, token by token.
    let tokens = |text: &str| json(&["score", "--text", text, "--json"])["ids"].as_array().unwrap()[1..].to_vec();
    let continued = |ids: &[Value]| {
        let list: Vec<_> = ids.iter().map(Value::to_string).collect();
        json(&["generate", "--model", path(&dir), "-n", "8", "--json", "--ids", &list.join(",")])["answers"][0].take()
    };
    let mut ids = tokens("Tom had a red ball. ");
    let first = continued(&ids);
    assert_eq!(first["text"].as_str().unwrap(), one.strip_suffix('\n').unwrap());
    ids.extend(first["ids"].as_array().unwrap().iter().cloned().chain(tokens(" The dog ")));
    assert_eq!(continued(&ids)["text"].as_str().unwrap(), second.strip_suffix('\n').unwrap());
    let chat = ok(&["generate", "--chat", "--model", path(&dir), "-n", "8", "Tom had a red ball."]);
    assert_eq!(chat.trim(), one.trim());
}

#[test]
fn bad_input_gives_one_clear_error() {
    fails(&["generate", ""], &["prompt is empty"]);
    fails(&["generate", "x", "--model", "/no/such/folder"], &["/no/such/folder"]);
    fails(&["generate", "x", "--model", "org/model"], &["org/model", "HF_HUB_OFFLINE"]);
    fails(&["generate", "x", "--model", "model.gguf"], &["gguf"]);
    fails(&["generate", "x", "--threshold", "NaN"], &["threshold is NaN", "[0, 1]"]);
    fails(&["generate", "x", "--capacity", "1.5"], &["capacity is 1.5"]);
    fails(&["generate", "x", "--temperature", "-1"], &["temperature is -1"]);
    fails(&["generate", "x", "--threads", "0"], &["threads"]);
    fails(&["generate", "x", "--device", "cuda"], &["use the CPU"]);
    fails(&["generate", "x", "--device", "cpu", "--kernels", "hopper"], &["run on a GPU", "--kernels auto"]);
    fails(&["bench", "--capacity", "0.5,2"], &["capacity is 2"]);
    fails(&["bench", "--prompt", "500", "--gen", "64"], &["566 tokens", "stories takes 512"]);
    fails(&["bench", "--dtype", "f32", "--device", "cpu"], &["stored in bf16", "--shape"]);
    fails(&["bench", "--routers", "/no/such/file"], &["/no/such/file"]);
    fails(&["bench", "ops", "--rows", "0"], &["--rows"]);
    fails(&["generate", "x", "--memory", "1M"], &["weights", "activations", "K/V", "--memory"]);
    fails(&["generate", "x", "--context", "100000"], &["512"]);
    let full = ["generate", "x", "-n", "100", "--ignore-eos", "--json", "--kv-tokens", "64"];
    fails(&full, &["the KV cache is full", "raise --kv-tokens"]);
    fails(&["generate", "x", "--kv-tokens", "0"], &["kv_tokens is 0"]);
    fails(&["generate", "x", "--batch", "0"], &["batch is 0"]);
    fails(&["generate", "--file", "/no/such/file"], &["/no/such/file"]);
    fails(&["generate", "--ids", "1,2,1536"], &["1536", "0 to 1535"]);
    fails(&["generate", "x", "--routers", "/no/such/file"], &["/no/such/file"]);
    fails(&["generate", "x", "--layers", "1"], &["no router for layer 1", "3,4,5,6,7"]);
    fails(
        &["generate", "x", "--model", path(&replaced("config.json", "\"llama\"", "\"gpt2\""))],
        &["gpt2", "llama, mistral, qwen2, qwen3"],
    );
    let long = "word ".repeat(2000);
    fails(&["generate", &long], &["longer than the context of 512"]);
    fails(&["score", "--text", &long], &["longer than the context of 512"]);
    fails(&["score", "--text", ""], &["nothing to score"]);
    fails(&["inspect", "Cargo.toml"], &["Cargo.toml"]);
    let other = goldens().join("routing/routers/tagged.safetensors");
    fails(&["generate", "x", "--routers", other.to_str().unwrap()], &["tagged.safetensors", "width"]);

    let cut = changed("model.safetensors", |mut bytes| {
        bytes.truncate(bytes.len() / 2);
        bytes
    });
    fails(&["generate", "x", "--model", path(&cut)], &["model.safetensors", "truncated"]);
    let nan = changed("model.safetensors", |mut bytes| {
        let n = bytes.len();
        bytes[n - 2..].copy_from_slice(&[0xc0, 0x7f]);
        bytes
    });
    fails(&["generate", "x", "--model", path(&nan)], &["model.safetensors", "NaN"]);
    let empty = changed("config.json", |_| Vec::new());
    fails(&["generate", "x", "--model", path(&empty)], &["config.json"]);
    let absent = changed("config.json", |bytes| bytes);
    std::fs::remove_file(absent.path().join("model.safetensors")).unwrap();
    fails(&["generate", "x", "--model", path(&absent)], &["no model.safetensors"]);
    let small = replaced("config.json", "\"vocab_size\": 1536", "\"vocab_size\": 1000");
    fails(&["generate", "x", "--model", path(&small)], &["tokenizer.json", "1535", "1000"]);
}

/// Routers of another model of the same shape are known by their fingerprint.
#[test]
fn routers_of_another_model_are_refused() {
    let other = changed("model.safetensors", |mut bytes| {
        let n = bytes.len();
        bytes[n - 1] ^= 1;
        bytes
    });
    let routers = stories().join("routers.safetensors");
    let args = ["generate", "x", "--model", path(&other), "--routers", routers.to_str().unwrap()];
    fails(&args, &["routers.safetensors", "abaecfdd95d54bf36556c0a59251318c"]);
}

#[test]
fn two_processes_share_a_model() {
    let dir = changed("config.json", |bytes| bytes);
    let start = || {
        let mut command = program();
        command.args(["generate", "--model", path(&dir), "Tom had a red ball.", "-n", "100"]).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    let (a, b) = (start(), start());
    let (a, b) = (a.wait_with_output().unwrap(), b.wait_with_output().unwrap());
    assert!(a.status.success() && b.status.success());
    assert_eq!(a.stdout, b.stdout);
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_what_was_made() {
    // A context long enough that it would go on for a while.
    let dir = replaced("config.json", "\"max_position_embeddings\": 512", "\"max_position_embeddings\": 1000000");
    let mut child = program()
        .args(["generate", "--model", path(&dir), "Tom had", "-n", "900000", "--ignore-eos", "--stats"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 200];
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut first).unwrap();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{err}");
    assert!(rest.ends_with(b"\n") && err.contains("K/V"), "{err}");
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = program()
        .args(["generate", "Tom had", "-n", "500", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
