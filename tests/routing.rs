//! Routing gives the numbers of the masked reference (tests/goldens/routing), and skips what it says it skips.

mod common;

use std::path::PathBuf;

use common::*;
use mindskip::backend::{Meter, OpKind, PAGE};
use mindskip::engine::{Budget, Engine, Options};
use mindskip::model::Routing;
use mindskip::router::{Keys, Level, RouterSettings, Select, Target};
use serde::Deserialize;

const RTOL: f32 = 1e-4;

#[derive(Deserialize)]
struct Case {
    name: String,
    file: String,
    model: String,
    routers: String,
    granularity: String,
    keys: String,
    select: String,
    capacity: Option<f32>,
    threshold: f32,
    layers: Vec<usize>,
    prompts: usize,
}

impl Case {
    fn settings(&self) -> RouterSettings {
        RouterSettings {
            granularity: self.granularity.parse().unwrap(),
            keys: self.keys.parse().unwrap(),
            select: self.select.parse().unwrap(),
            threshold: self.threshold,
            capacity: self.capacity.unwrap_or(0.5),
        }
    }

    fn engine(&self, options: &Options) -> Engine {
        let routing = routing(&root().join(&self.routers), self.settings());
        assert_eq!(routing.layers, self.layers, "{}", self.name);
        engine(&root().join(&self.model), Some(routing), options)
    }
}

fn root() -> PathBuf {
    goldens().join("routing")
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&std::fs::read(root().join("cases.json")).unwrap()).unwrap()
}

/// A prompt's golden tensors.
struct Prompt<'a> {
    golden: &'a Golden,
    number: usize,
}

impl<'a> Prompt<'a> {
    fn ints(&self, name: &str) -> &'a [u32] {
        self.golden.ints(&format!("{}.{name}", self.number))
    }
    fn floats(&self, name: &str) -> &'a [f32] {
        self.golden.floats(&format!("{}.{name}", self.number))
    }
}

fn check_alone(case: &Case, prompt: &Prompt, options: &Options) {
    let name = format!("{}, prompt {}", case.name, prompt.number);
    let mut engine = case.engine(options);
    let vocab = engine.config().vocab;
    let (ids, logits, greedy) = (prompt.ints("ids"), prompt.floats("logits"), prompt.ints("greedy"));
    let seq = engine.open().unwrap();
    let last = engine.prefill(&[(seq, ids)]).unwrap().to_vec();
    assert_close(&name, &last, &logits[(ids.len() - 1) * vocab..], RTOL);

    let (scores, active) = (prompt.floats("scores"), prompt.ints("active"));
    let per_layer = scores.len() / case.layers.len();
    let traces = engine.trace().unwrap();
    assert_eq!(traces.iter().map(|t| t.layer).collect::<Vec<_>>(), case.layers, "{name}");
    for (i, trace) in traces.iter().enumerate() {
        let range = i * per_layer..(i + 1) * per_layer;
        assert_close(&format!("{name}, scores of layer {}", trace.layer), &trace.scores, &scores[range.clone()], 1e-4);
        let flags: Vec<u32> = trace.active.iter().map(|&a| a.into()).collect();
        assert_eq!(flags, active[range], "{name}, decisions of layer {}", trace.layer);
    }
    // The other rows' logits show in the log-probabilities of the prompt.
    let logprobs = engine.logprobs(&ids[1..]).unwrap();
    for (row, lp) in logprobs.iter().enumerate() {
        let l = &logits[row * vocab..][..vocab];
        let max = l.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = l.iter().map(|&x| f64::from(x - max).exp()).sum();
        let expected = f64::from(l[ids[row + 1] as usize] - max) - sum.ln();
        assert!((f64::from(*lp) - expected).abs() < 1e-3, "{name}: row {row} {lp} for {expected}");
    }

    let steps = prompt.floats("decode_logits");
    let mut token = argmax(&last);
    for (step, &expected) in greedy.iter().enumerate() {
        assert_eq!(token, expected, "{name}, token {step}");
        let logits = engine.decode(&[(seq, token)]).unwrap();
        assert_close(&format!("{name}, step {step}"), logits, &steps[step * vocab..][..vocab], RTOL);
        token = argmax(logits);
    }
    check_kv_rows(case, &name, prompt, &mut engine, ids.len() + greedy.len());
}

/// The K/V rows held are exactly those of the rows that the reference calls active, wherever skipping drops K/V.
fn check_kv_rows(case: &Case, name: &str, prompt: &Prompt, engine: &mut Engine, tokens: usize) {
    let g = case.settings().granularity;
    let dense = engine.config().layers - case.layers.len();
    let active = |name: &str| prompt.ints(name).iter().sum::<u32>() as usize;
    let routed = match (g.target, g.level, case.settings().keys) {
        (Target::Mlp, ..) | (_, Level::Token, Keys::All) => case.layers.len() * tokens,
        (_, Level::Token, Keys::Active) => active("active") + active("decode_active"),
        (_, Level::Sequence, _) => active("active") * tokens,
    };
    let usage = engine.kv_usage().unwrap();
    assert_eq!(usage.rows, dense * tokens + routed, "{name}: K/V rows");
    assert_eq!(usage.dense_rows, engine.config().layers * tokens, "{name}: dense K/V rows");
}

fn each_prompt(mut check: impl FnMut(&Case, &Prompt)) {
    let cases = cases();
    assert!(cases.len() >= 28, "the goldens are not complete");
    for case in cases {
        let golden = Golden::open(&root().join(&case.file));
        for number in 0..case.prompts {
            check(&case, &Prompt { golden: &golden, number });
        }
    }
}

#[test]
fn every_case_equals_the_masked_reference() {
    each_prompt(|case, prompt| check_alone(case, prompt, &options(1, 64)));
}

#[test]
fn chunked_prefill_equals_the_masked_reference() {
    each_prompt(|case, prompt| check_alone(case, prompt, &Options { chunk: Some(4), ..options(1, 64) }));
}

/// On the emulator all of them take minutes: only one of so many.
fn one_of(on_the_emulator: usize) -> usize {
    if std::env::var("MINDSKIP_TEST_DEVICE").as_deref() == Ok("emulate") { on_the_emulator } else { 1 }
}

/// A batch of uneven prompts gives every member the bits that it has alone, in prefill and decode, however it is chunked.
#[test]
fn a_batch_equals_its_members_alone() {
    for case in cases().into_iter().step_by(one_of(3)) {
        let golden = Golden::open(&root().join(&case.file));
        let prompts: Vec<_> = (0..case.prompts).map(|number| Prompt { golden: &golden, number }).collect();
        let mut alone = Vec::new();
        for prompt in &prompts {
            let mut engine = case.engine(&options(1, 64));
            let seq = engine.open().unwrap();
            let mut rows = vec![engine.prefill(&[(seq, prompt.ints("ids"))]).unwrap().to_vec()];
            rows.extend(prompt.ints("greedy").iter().map(|&id| engine.decode(&[(seq, id)]).unwrap().to_vec()));
            alone.push(rows);
        }
        for chunk in [8, 256, 3].into_iter().step_by(one_of(2)) {
            let mut engine = case.engine(&Options { chunk: Some(chunk), ..options(case.prompts, 64) });
            let vocab = engine.config().vocab;
            let seqs: Vec<_> = prompts.iter().map(|_| engine.open().unwrap()).collect();
            let batch: Vec<_> = seqs.iter().zip(&prompts).map(|(&seq, p)| (seq, p.ints("ids"))).collect();
            let logits = engine.prefill(&batch).unwrap().to_vec();
            for (i, rows) in alone.iter().enumerate() {
                assert_bits(&format!("{}, prompt {i}", case.name), &logits[i * vocab..][..vocab], &rows[0]);
            }
            for step in 0..prompts[0].ints("greedy").len() {
                let tokens: Vec<_> = seqs.iter().zip(&prompts).map(|(&seq, p)| (seq, p.ints("greedy")[step])).collect();
                let logits = engine.decode(&tokens).unwrap();
                for (i, rows) in alone.iter().enumerate() {
                    assert_bits(
                        &format!("{}, prompt {i}, step {step}", case.name),
                        &logits[i * vocab..][..vocab],
                        &rows[step + 1],
                    );
                }
            }
        }
    }
}

/// Prefill of T equals prefill of T − k and k decode steps, wherever the decisions are by token and threshold, and at
/// sequence level when the first part decides alike.
#[test]
fn prefill_equals_prefill_and_decode() {
    for case in cases().iter().filter(|case| case.select == "threshold") {
        let golden = Golden::open(&root().join(&case.file));
        let all = Prompt { golden: &golden, number: case.prompts - 1 }.ints("ids");
        let mut engine = case.engine(&options(1, 64));
        let seq = engine.open().unwrap();
        let whole = engine.prefill(&[(seq, all)]).unwrap().to_vec();
        let decisions = engine.trace().unwrap();
        engine.close(seq).unwrap();
        for k in [1, 5, 13].into_iter().step_by(one_of(2)) {
            let (head, tail) = all.split_at(all.len() - k);
            for by_decode in [true, false] {
                let seq = engine.open().unwrap();
                engine.prefill(&[(seq, head)]).unwrap();
                let same = engine.trace().unwrap().iter().zip(&decisions).all(|(a, b)| a.active[0] == b.active[0]);
                let mut logits = Vec::new();
                if by_decode {
                    for &id in tail {
                        logits = engine.decode(&[(seq, id)]).unwrap().to_vec();
                    }
                } else {
                    logits = engine.prefill(&[(seq, tail)]).unwrap().to_vec();
                }
                engine.close(seq).unwrap();
                if case.settings().granularity.level == Level::Sequence && !same {
                    continue;
                }
                assert_bits(&format!("{}, the last {k}, decode {by_decode}", case.name), &logits, &whole);
            }
        }
    }
}

const MODEL_LAYERS: [usize; 4] = [1, 2, 3, 4];

/// Every combination.
fn all_settings() -> Vec<RouterSettings> {
    let mut all = Vec::new();
    for name in mindskip::router::Granularity::NAMES {
        for keys in [Keys::All, Keys::Active] {
            for select in [Select::Threshold, Select::TopK] {
                let granularity = name.parse().unwrap();
                all.push(RouterSettings { granularity, keys, select, ..RouterSettings::default() });
            }
        }
    }
    all.into_iter().step_by(one_of(5)).collect()
}

/// Logits of a prompt and of some decode steps.
fn logits_of(engine: &mut Engine, prompt: &[u32], steps: &[u32]) -> Vec<Vec<f32>> {
    let seq = engine.open().unwrap();
    let mut rows = vec![engine.prefill(&[(seq, prompt)]).unwrap().to_vec()];
    rows.extend(steps.iter().map(|&id| engine.decode(&[(seq, id)]).unwrap().to_vec()));
    engine.close(seq).unwrap();
    rows
}

/// An engine that is routed anew computes what one that was built so does, also after it has run otherwise.
#[test]
fn a_rerouted_engine_is_like_a_new_one() {
    let model = root().join(&cases()[0].model);
    let layers = cases()[0].layers.clone();
    let build = |routing: Option<Routing>| engine(&model, routing, &options(2, 64));
    let room = random_gates(RouterSettings::default(), &layers, 1.0);
    let mut rerouted = build(Some(room));
    let vocab = rerouted.config().vocab;
    let (prompt, steps) = (ids(23, vocab, 1), ids(4, vocab, 2));
    let routers = cases().into_iter().find(|case| case.model == cases()[0].model).unwrap();
    let routers = || routing(&root().join(&routers.routers), RouterSettings::default());
    let mut ways: Vec<Option<Routing>> = vec![None, Some(routers()), None, Some(routers())];
    ways.extend(all_settings().into_iter().map(|settings| Some(random_gates(settings, &layers, 0.5))));
    for way in ways {
        rerouted.reroute(way.clone()).unwrap();
        rerouted.clear_counts().unwrap();
        let expected = logits_of(&mut build(way.clone()), &prompt, &steps);
        for (step, (actual, expected)) in logits_of(&mut rerouted, &prompt, &steps).iter().zip(&expected).enumerate() {
            assert_bits(&format!("{way:?}, step {step}"), actual, expected);
        }
    }

    let seq = rerouted.open().unwrap();
    let error = rerouted.reroute(None).unwrap_err();
    assert!(error.to_string().contains("sequences are open"), "{error}");
    rerouted.close(seq).unwrap();
    let all: Vec<usize> = (0..rerouted.config().layers).collect();
    let error = rerouted.reroute(Some(random_gates(RouterSettings::default(), &all, 0.5))).unwrap_err();
    assert!(error.to_string().contains("were planned for"), "{error}");
    assert!(rerouted.trace().is_err(), "the last step was another routing's");
}

#[test]
fn capacity_one_is_dense_bit_for_bit() {
    let folder = root().join("model");
    let (prompt, steps) = (ids(37, 192, 1), ids(5, 192, 2));
    let mut dense = engine(&folder, None, &options(1, 64));
    let expected = logits_of(&mut dense, &prompt, &steps);
    for settings in all_settings() {
        let everything = RouterSettings { threshold: 0.0, capacity: 1.0, ..settings };
        for gates in
            [routing(&root().join("routers/bare.safetensors"), everything), random_gates(settings, &MODEL_LAYERS, 1.0)]
        {
            let mut engine = engine(&folder, Some(gates), &options(1, 64));
            for (a, b) in logits_of(&mut engine, &prompt, &steps).iter().zip(&expected) {
                assert_bits(&format!("{settings:?}"), a, b);
            }
        }
    }
}

/// Capacity 0 equals a model whose sub-layer adds nothing: the same weights with o_proj, down_proj or both at zero.
#[test]
fn capacity_zero_is_the_model_without_the_sublayer() {
    let folder = root().join("model");
    let (prompt, steps) = (ids(37, 192, 3), ids(5, 192, 4));
    for settings in all_settings() {
        let silenced: &[&str] = match settings.granularity.target {
            Target::Attn => &["self_attn.o_proj"],
            Target::Mlp => &["mlp.down_proj"],
            Target::Block => &["self_attn.o_proj", "mlp.down_proj"],
        };
        let names: Vec<String> = MODEL_LAYERS
            .iter()
            .flat_map(|l| silenced.iter().map(move |part| format!("model.layers.{l}.{part}.weight")))
            .collect();
        let without = tempfile::tempdir().unwrap();
        zero(&folder, without.path(), &names);
        let expected = logits_of(&mut engine(without.path(), None, &options(1, 64)), &prompt, &steps);
        let gates = random_gates(settings, &MODEL_LAYERS, 0.0);
        let mut engine = engine(&folder, Some(gates), &options(1, 64));
        for (a, b) in logits_of(&mut engine, &prompt, &steps).iter().zip(&expected) {
            assert_close(&format!("{settings:?}"), a, b, 1e-6);
        }
    }
}

/// Copies a model with some tensors at zero.
fn zero(from: &std::path::Path, to: &std::path::Path, names: &[String]) {
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let (header_len, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    for name in names {
        let (start, end) = metadata.info(name).unwrap().data_offsets;
        bytes[8 + header_len + start..8 + header_len + end].fill(0);
    }
    std::fs::write(to.join("model.safetensors"), bytes).unwrap();
}

/// FLOPs and bytes fall exactly with the active rows: the meter of a routed run is the dense one less what was skipped.
#[test]
fn what_is_skipped_is_not_computed() {
    let folder = root().join("model");
    let (prompt, steps) = (ids(48, 192, 5), ids(6, 192, 6));
    let mut dense = engine(&folder, None, &options(1, 64));
    logits_of(&mut dense, &prompt, &steps);
    let full = dense.meter().clone();
    let config = dense.config().clone();
    let (tokens, routed) = (prompt.len() + steps.len(), MODEL_LAYERS.len());

    for settings in all_settings().into_iter().filter(|s| s.select == Select::Threshold) {
        for capacity in [0.0, 0.3, 0.7, 1.0] {
            let gates = random_gates(settings, &MODEL_LAYERS, capacity);
            let mut engine = engine(&folder, Some(gates), &options(1, 64));
            logits_of(&mut engine, &prompt, &steps);
            let activity = engine.activity().unwrap().clone();
            assert_eq!(activity.tokens as usize, tokens);
            let active: u64 = MODEL_LAYERS.iter().map(|&l| activity.active[l]).sum();
            let skipped = (tokens * routed) as u64 - active;
            let meter = engine.meter().clone();
            let what = format!("{settings:?} at {capacity}");
            let flops = |m: &Meter, op: OpKind| m.ops[op as usize].cost.flops;

            let attends = settings.granularity.target != Target::Mlp;
            let mlps = settings.granularity.target != Target::Attn;
            let drops_kv = attends && (settings.granularity.level == Level::Sequence || settings.keys == Keys::Active);
            let (h, i) = (config.hidden as u64, config.intermediate as u64);
            let (q_dim, kv_dim) = (config.q_rows() as u64, config.kv_rows() as u64);

            let saved_q = if attends { 2 * skipped * h * q_dim } else { 0 };
            let saved_kv = if drops_kv { 2 * skipped * h * 2 * kv_dim } else { 0 };
            assert_eq!(flops(&full, OpKind::Qkv) - flops(&meter, OpKind::Qkv), saved_q + saved_kv, "{what}: qkv");
            let saved_swiglu = if mlps { skipped * (2 * 2 * h * i + 4 * i) } else { 0 };
            assert_eq!(flops(&full, OpKind::SwiGlu) - flops(&meter, OpKind::SwiGlu), saved_swiglu, "{what}: swiglu");
            let saved_out = saved_q + if mlps { 2 * skipped * h * i } else { 0 };
            assert_eq!(
                flops(&full, OpKind::ProjectAdd) - flops(&meter, OpKind::ProjectAdd),
                saved_out,
                "{what}: projections"
            );
            let rows = full.kv_rows - meter.kv_rows;
            assert_eq!(rows, if drops_kv { skipped } else { 0 }, "{what}: K/V rows");
            let attend = |m: &Meter| flops(m, OpKind::Attend);
            if attends && skipped > 0 {
                assert!(attend(&meter) < attend(&full), "{what}: attention");
            } else {
                assert_eq!(attend(&meter), attend(&full), "{what}: attention");
            }
            if capacity == 0.0 && attends {
                let dense_layers = (config.layers - routed) as u64;
                assert_eq!(attend(&meter) * config.layers as u64, attend(&full) * dense_layers, "{what}: attention");
                // Weights that no row uses are not read either.
                let bytes = |m: &Meter| m.ops[OpKind::Attend as usize].cost.bytes;
                assert_eq!(bytes(&meter) * config.layers as u64, bytes(&full) * dense_layers, "{what}: bytes");
            }
        }
    }
}

/// FLOPs and bytes of attention and projections in a prefill, to the last one, from what the trace says was active.
#[test]
fn the_account_of_a_prefill_is_exact() {
    let folder = root().join("model");
    let prompt = ids(48, 192, 7);
    let account = |gates: Option<Routing>| {
        let mut engine = engine(&folder, gates, &options(1, 64));
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &prompt)]).unwrap();
        (engine.trace().unwrap(), engine.meter().clone(), engine.config().clone())
    };
    let (_, dense, config) = account(None);
    let (q_dim, kv_dim, hidden) = (config.q_rows() as u64, config.kv_rows() as u64, config.hidden as u64);
    let tokens = prompt.len() as u64;
    for settings in all_settings().into_iter().filter(|s| s.granularity.level == Level::Token) {
        let (traces, routed, _) = account(Some(random_gates(settings, &MODEL_LAYERS, 0.4)));
        let what = format!("{settings:?}");
        let (attends, mlps) = (settings.granularity.target != Target::Mlp, settings.granularity.target != Target::Attn);
        let drops_kv = attends && settings.keys == Keys::Active;
        // By layer: active tokens, and the pairs of query and key that they make.
        let counts = traces.iter().map(|t| {
            let active: Vec<u64> = (0..tokens).filter(|&i| t.active[i as usize]).collect();
            let pairs: u64 = active.iter().enumerate().map(|(n, i)| if drops_kv { n as u64 + 1 } else { i + 1 }).sum();
            (active.len() as u64, pairs)
        });
        let (active, pairs) = counts.fold((0, 0), |(a, p), (active, pairs)| (a + active, p + pairs));
        let skipped = MODEL_LAYERS.len() as u64 * tokens - active;
        let less = |op: OpKind| {
            let (full, part) = (dense.ops[op as usize].cost, routed.ops[op as usize].cost);
            (full.flops - part.flops, full.bytes - part.bytes)
        };

        let dense_pairs = MODEL_LAYERS.len() as u64 * tokens * (tokens + 1) / 2;
        let fewer_pairs = if attends { dense_pairs - pairs } else { 0 };
        let fewer_queries = if attends { skipped } else { 0 };
        // With `keys=all` the last active token of a layer still reads what stands before it, and no more.
        let reach = |t: &mindskip::engine::LayerTrace| t.active.iter().rposition(|&a| a).map_or(0, |i| i as u64 + 1);
        let fewer_keys = match (attends, drops_kv) {
            (false, _) => 0,
            (true, true) => skipped,
            (true, false) => traces.iter().map(|t| tokens - reach(t)).sum(),
        };
        let attend = (4 * fewer_pairs * q_dim, 4 * (2 * fewer_queries * q_dim + 2 * fewer_keys * kv_dim));
        assert_eq!(less(OpKind::Attend), attend, "{what}: attention");

        let kv = if drops_kv { skipped } else { 0 };
        let qkv_flops = 2 * hidden * (fewer_queries * q_dim + kv * 2 * kv_dim);
        let qkv_bytes = 4 * (fewer_queries * (hidden + q_dim) + kv * 2 * (hidden + kv_dim));
        assert_eq!(less(OpKind::Qkv), (qkv_flops, qkv_bytes), "{what}: qkv");
        let (m, i) = (if mlps { skipped } else { 0 }, config.intermediate as u64);
        assert_eq!(less(OpKind::SwiGlu), (m * (4 * hidden * i + 4 * i), 4 * m * (hidden + i)), "{what}: swiglu");
        // The residual is read and written.
        let out = |rows: u64, width: u64| (2 * rows * width * hidden, 4 * rows * (width + 2 * hidden));
        let ((af, ab), (mf, mb)) = (out(fewer_queries, q_dim), out(m, i));
        assert_eq!(less(OpKind::ProjectAdd), (af + mf, ab + mb), "{what}: projections");
        assert_eq!(dense.kv_rows - routed.kv_rows, kv, "{what}: K/V rows");
    }
}

/// Pages come back when a sequence ends or fails, and a skipped sequence takes none.
#[test]
fn pages_follow_the_sequences() {
    let folder = root().join("model");
    let settings = RouterSettings { granularity: "attn_sequence".parse().unwrap(), ..RouterSettings::default() };
    let gates = random_gates(settings, &MODEL_LAYERS, 0.0);
    let mut engine = engine(&folder, Some(gates), &Options { context: Some(150), ..options(2, 150) });
    let prompt = ids(130, 192, 8);
    for _ in 0..20 {
        let (a, b) = (engine.open().unwrap(), engine.open().unwrap());
        engine.prefill(&[(a, &prompt), (b, &prompt[..10])]).unwrap();
        let usage = engine.kv_usage().unwrap();
        let dense_layers = engine.config().layers - MODEL_LAYERS.len();
        assert_eq!(usage.pages, dense_layers * (130usize.div_ceil(PAGE) + 1));
        assert!(engine.open().is_err());
        engine.close(a).unwrap();
        assert_eq!(engine.kv_usage().unwrap().pages, dense_layers);
        engine.close(b).unwrap();
        assert_eq!(engine.kv_usage().unwrap(), Default::default());
    }
}

/// After a step that fails, everything is as before it: the next one gives the bits that it would have given.
#[test]
fn failed_steps_leave_no_trace() {
    let folder = root().join("model");
    for settings in all_settings() {
        let gates = routing(&root().join("routers/bare.safetensors"), settings);
        let mut engine = engine(&folder, Some(gates), &options(2, 64));
        let (prompt, more) = (ids(20, 192, 10), ids(30, 192, 11));
        let expected = {
            let seq = engine.open().unwrap();
            engine.prefill(&[(seq, &prompt)]).unwrap();
            engine.prefill(&[(seq, &more)]).unwrap();
            let logits = engine.decode(&[(seq, 5)]).unwrap().to_vec();
            engine.close(seq).unwrap();
            logits
        };
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &prompt)]).unwrap();
        let before = engine.kv_usage().unwrap();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let asked = stop.clone();
        engine.watch(move |done| {
            let stop = done > 0.5 && asked.load(std::sync::atomic::Ordering::Relaxed);
            if stop { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
        });
        let error = engine.prefill(&[(seq, &more)]).unwrap_err();
        assert_eq!(error.kind(), mindskip::Kind::Interrupted);
        assert!(engine.prefill(&[(seq, &ids(60, 192, 12))]).is_err(), "longer than the context");
        assert!(engine.decode(&[(seq, 192)]).is_err(), "no such token");
        assert_eq!((engine.position(seq), engine.kv_usage().unwrap()), (20, before), "{settings:?}");
        stop.store(false, std::sync::atomic::Ordering::Relaxed);
        engine.prefill(&[(seq, &more)]).unwrap();
        assert_bits(&format!("{settings:?}"), engine.decode(&[(seq, 5)]).unwrap(), &expected);
        engine.close(seq).unwrap();
    }
}

/// Routed by its own file, without overrides: metadata settings, bare files and the paper's folders.
#[test]
fn router_files_route_by_themselves() {
    use mindskip::router::RouterSet;
    let tagged = RouterSet::open(&root().join("routers/tagged.safetensors")).unwrap();
    let bare = RouterSet::open(&root().join("routers/bare.safetensors")).unwrap();
    assert_eq!((tagged.settings, &tagged.weights), (bare.settings, &bare.weights));
    for folder in ["published-is_mod", "published-is_mindskip"] {
        let set = RouterSet::open(&root().join("routers").join(folder)).unwrap();
        assert_eq!(set.settings.granularity.to_string(), "attn_sequence");
        assert_eq!(set.settings.keys, Keys::All);
        assert_eq!(set.weights.keys().copied().collect::<Vec<_>>(), MODEL_LAYERS);
        let mut engine = engine(&root().join("model"), Some(Routing::routers(set)), &options(1, 64));
        logits_of(&mut engine, &ids(9, 192, 9), &[1]);
    }
}

/// A sequence that begins with generated tokens is decided as a whole all the same, by its first one.
#[test]
fn sequences_are_decided_once_also_when_they_begin_with_decode() {
    let settings = RouterSettings { granularity: "attn_sequence".parse().unwrap(), ..RouterSettings::default() };
    let gates = routing(&root().join("routers/bare.safetensors"), settings);
    let mut engine = engine(&root().join("model"), Some(gates), &options(2, 64));
    let mut by_prefill: Vec<Vec<f32>> = Vec::new();
    for by_decode in [false, true] {
        for first in [3, 50, 90, 120, 150] {
            let seq = engine.open().unwrap();
            if by_decode {
                engine.decode(&[(seq, first)]).unwrap()
            } else {
                engine.prefill(&[(seq, &[first])]).unwrap()
            };
            let mut logits = Vec::new();
            for id in ids(12, 192, u64::from(first)) {
                logits = engine.decode(&[(seq, id)]).unwrap().to_vec();
            }
            let rows = engine.kv_usage().unwrap().rows;
            assert_eq!(rows % 13, 0, "a layer has all rows or none: {rows}");
            engine.close(seq).unwrap();
            if by_decode { assert_bits("by decode", &logits, &by_prefill.remove(0)) } else { by_prefill.push(logits) }
        }
    }
}

/// What is not written takes no page, also when decode had to make room for it; and a pool may be smaller than the dense
/// model's.
#[test]
fn skipped_rows_take_no_pages() {
    let folder = root().join("model");
    let settings = RouterSettings { keys: Keys::Active, ..RouterSettings::default() };
    let (layers, routed) = (config(&folder).layers, MODEL_LAYERS.len());
    let mut all = engine(&folder, Some(random_gates(settings, &MODEL_LAYERS, 0.0)), &options(4, 256));
    let full = all.plan().clone();
    let seq = all.open().unwrap();
    all.prefill(&[(seq, &ids(64, 192, 1))]).unwrap();
    for id in ids(3, 192, 2) {
        all.decode(&[(seq, id)]).unwrap();
        assert_eq!(all.kv_usage().unwrap().pages, 2 * (layers - routed));
    }

    let page = full.kv.page_bytes() as u64;
    let less = full.total() - page * (full.kv.pages as u64 / 4);
    let small = Options { memory: Some(Budget::Bytes(less)), ..options(4, 256) };
    let mut half = engine(&folder, Some(random_gates(settings, &MODEL_LAYERS, 0.25)), &small);
    assert!(half.plan().kv.pages < full.kv.pages && half.plan().total() <= less);
    let prompt = ids(250, 192, 3);
    let seqs: Vec<_> = (0..4).map(|_| half.open().unwrap()).collect();
    let prompts: Vec<_> = seqs.iter().map(|&seq| (seq, &prompt[..])).collect();
    half.prefill(&prompts).unwrap();
    // The dense model does not fit, and neither does this one when nothing is skipped.
    let weights = || mindskip::weights::Weights::open(&folder).unwrap();
    assert_eq!(Engine::new(config(&folder), weights(), None, &small).err().unwrap().kind(), mindskip::Kind::Memory);
    let mut none = engine(&folder, Some(random_gates(settings, &MODEL_LAYERS, 1.0)), &small);
    let seqs: Vec<_> = (0..4).map(|_| none.open().unwrap()).collect();
    let prompts: Vec<_> = seqs.iter().map(|&seq| (seq, &prompt[..])).collect();
    let error = none.prefill(&prompts).unwrap_err();
    assert!(error.to_string().contains("the KV cache is full") && error.kind() == mindskip::Kind::Memory, "{error}");
    assert_eq!(none.kv_usage().unwrap().pages, 0);
}

/// A handle stands for its sequence only, and in its engine only.
#[test]
fn handles_outlive_nothing() {
    let folder = root().join("model");
    let (mut small, mut large) = (engine(&folder, None, &options(1, 64)), engine(&folder, None, &options(3, 64)));
    let old = small.open().unwrap();
    small.close(old).unwrap();
    let new = small.open().unwrap();
    let others: Vec<_> = (0..3).map(|_| large.open().unwrap()).collect();
    for stale in others.into_iter().chain([old]) {
        let error = small.prefill(&[(stale, &[1, 2])]).unwrap_err();
        assert_eq!(error.kind(), mindskip::Kind::Argument, "{error}");
        small.close(stale).unwrap();
        assert_eq!(small.position(stale), 0);
    }
    small.prefill(&[(new, &[1, 2])]).unwrap();
    assert_eq!(small.position(new), 2);
}
