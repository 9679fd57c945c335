//! The CUDA backend on the emulator, beyond what MINDSKIP_TEST_DEVICE=emulate runs on it: 16 bits, recorded steps, faults.
//! With MINDSKIP_TEST_DEVICE=cuda all of it on the first GPU.

mod common;

use common::*;
use std::ops::ControlFlow;

use mindskip::Kind;
use mindskip::backend::cuda::{CudaBackend, emulated::Emulated};
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Engine, Kernels, Options, Seq, training_backend};
use mindskip::generate::{Turn, generate};
use mindskip::memory::Budget;
use mindskip::model::Routing;
use mindskip::router::{Keys, RouterSet, RouterSettings};
use mindskip::sample::{Sampler, SamplerSettings};
use mindskip::tensor::DType;
use mindskip::tune::plan::StepLimits;
use mindskip::tune::{Goal, Sample, Ste, StepSettings, Tuner};
use mindskip::weights::Weights;

fn stories(options: Options, settings: impl Fn(RouterSettings) -> RouterSettings) -> mindskip::Result<Engine> {
    let bundle = Bundle::embedded()?;
    let mut routers = bundle.routers.clone().expect("routers");
    routers.settings = settings(routers.settings);
    Engine::new(bundle.config, bundle.weights, Some(Routing::routers(routers)), &options)
}

fn emulated(dtype: DType, batch: usize) -> Options {
    Options { device: gpu(3), dtype: Some(dtype), ..options(batch, 128) }
}

/// In 16 bits, log-probabilities of the embedded model are as far from those of f32 as roundings make them.
#[test]
fn sixteen_bits_stay_close_to_f32() {
    let prompt = ids(40, 1536, 1);
    let score = |options: Options| {
        let bundle = Bundle::embedded().unwrap();
        let mut engine = Engine::new(bundle.config, bundle.weights, None, &options).unwrap();
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &prompt)]).unwrap();
        engine.logprobs(&prompt[1..]).unwrap()
    };
    let exact = score(Options { device: Device::Cpu, dtype: None, ..options(1, 128) });
    // Measured: 1.9e-7, 2.8e-4 and 1.6e-3 of the largest.
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
        assert_close(&format!("{dtype}"), &score(emulated(dtype, 1)), &exact, tolerance);
    }
}

/// The tokens that a batch makes, and what each of the steps asked of the device.
fn decode(engine: &mut Engine, prompts: &[Vec<u32>], steps: usize) -> Vec<Vec<u32>> {
    let seqs: Vec<Seq> = prompts.iter().map(|_| engine.open().unwrap()).collect();
    let vocab = engine.config().vocab;
    let inputs: Vec<_> = seqs.iter().zip(prompts).map(|(&seq, prompt)| (seq, &prompt[..])).collect();
    let mut logits = engine.prefill(&inputs).unwrap().to_vec();
    let mut made = vec![Vec::new(); seqs.len()];
    for _ in 0..steps {
        let next: Vec<_> = logits.chunks(vocab).map(argmax).collect();
        made.iter_mut().zip(&next).for_each(|(made, &id)| made.push(id));
        let inputs: Vec<_> = seqs.iter().copied().zip(next).collect();
        logits = engine.decode(&inputs).unwrap().to_vec();
    }
    seqs.into_iter().for_each(|seq| engine.close(seq).unwrap());
    made
}

/// A recorded step gives what the CPU computes, also when it is used again by other sequences, of other lengths, in other
/// slots, with other decisions; and a step is one recording, with what the host writes before it and reads after it.
#[test]
fn recorded_steps_are_replayed_with_new_inputs() {
    for keys in [Keys::All, Keys::Active] {
        let settings = |s: RouterSettings| RouterSettings { keys, ..s };
        let mut cpu = stories(Options { device: Device::Cpu, dtype: None, ..options(3, 128) }, settings).unwrap();
        let mut gpu = stories(emulated(DType::F32, 3), settings).unwrap();
        let prompts: Vec<Vec<u32>> = [5, 17, 61].map(|n| ids(n, 1536, n as u64)).to_vec();
        for batch in [&prompts[..1], &prompts[1..], &prompts[..], &prompts[2..]] {
            assert_eq!(decode(&mut gpu, batch, 6), decode(&mut cpu, batch, 6), "keys {keys}");
        }
        assert_eq!(gpu.activity().unwrap(), cpu.activity().unwrap(), "keys {keys}");
        assert_eq!(gpu.meter().kv_rows, cpu.meter().kv_rows);

        let seq = gpu.open().unwrap();
        gpu.prefill(&[(seq, &prompts[1])]).unwrap();
        // Only what is met twice is recorded.
        gpu.decode(&[(seq, 3)]).unwrap();
        gpu.decode(&[(seq, 3)]).unwrap();
        for step in 0..5 {
            let before = gpu.counters();
            gpu.decode(&[(seq, 3 + step)]).unwrap();
            let after = gpu.counters();
            let what = format!("step {step}: {before:?} {after:?}");
            assert_eq!(after.replays - before.replays, 1, "{what}");
            assert_eq!(after.allocations, before.allocations, "{what}");
            // The inputs are one copy and one launch, the counts of the step before and the logits are one copy each.
            assert_eq!(after.launches - before.launches, 1, "{what}");
            assert_eq!((after.copies_in - before.copies_in, after.copies_out - before.copies_out), (1, 2), "{what}");
        }
        // With the choice of a token in it, a step reads the counts and 4 bytes for the sequence.
        let draw = Sampler::new(SamplerSettings { temperature: 1.0, ..Default::default() }).unwrap().draw();
        for step in 0..5 {
            let before = gpu.counters();
            gpu.decode_and_sample(&[(seq, 3 + step)], &[draw]).unwrap();
            let after = gpu.counters();
            if step >= 2 {
                let what = format!("step {step}: {before:?} {after:?}");
                assert_eq!((after.replays - before.replays, after.launches - before.launches), (1, 1), "{what}");
                assert_eq!(after.copies_out - before.copies_out, 2, "{what}");
                let layers = gpu.config().layers as u64;
                assert_eq!(after.bytes_out - before.bytes_out, 4 * layers + 4, "{what}");
            }
        }
    }
}

/// Drawn masks cost a decode step one copy in, and no wait.
#[test]
fn random_masks_add_one_copy_to_a_step() {
    let bundle = Bundle::embedded().unwrap();
    let routing = random_gates(RouterSettings::default(), &[3, 4, 5], 0.5);
    let mut engine = Engine::new(bundle.config, bundle.weights, Some(routing), &emulated(DType::BF16, 2)).unwrap();
    let seqs = [engine.open().unwrap(), engine.open().unwrap()];
    engine.prefill(&[(seqs[0], &ids(9, 1536, 1)), (seqs[1], &ids(4, 1536, 2))]).unwrap();
    for step in 0..6 {
        let before = engine.counters();
        engine.decode(&[(seqs[0], step), (seqs[1], 7 * step)]).unwrap();
        let after = engine.counters();
        if step >= 2 {
            assert_eq!(
                (after.copies_in - before.copies_in, after.syncs - before.syncs),
                (2, 2),
                "{before:?} {after:?}"
            );
        }
    }
}

/// Random weights are made on the device, and are those of the CPU.
#[test]
fn random_weights_are_the_same_everywhere() {
    let config = config(&goldens().join("routing/model"));
    let prompt = ids(20, config.vocab, 4);
    let mut logits = Vec::new();
    for options in [Options { device: Device::Cpu, dtype: None, ..options(1, 64) }, emulated(DType::F32, 1)] {
        let weights = Weights::random("tiny", &config, DType::F32, 9);
        let bytes = weights.bytes() as u64;
        let mut engine = Engine::new(config.clone(), weights, None, &options).unwrap();
        assert!(engine.counters().bytes_in < bytes / 10, "{} of {bytes} were copied", engine.counters().bytes_in);
        let seq = engine.open().unwrap();
        logits.push(engine.prefill(&[(seq, &prompt)]).unwrap().to_vec());
    }
    assert_close("logits", &logits[1], &logits[0], 1e-5);
}

/// A training step gives the losses and router gradients of the CPU, the same bits each time, in the memory that was planned.
#[test]
fn training_steps_agree_with_the_cpu() {
    let folder = goldens().join("routing/model");
    let config = config(&folder);
    let weights = Weights::open(&folder).unwrap();
    // One that takes the products of many rows.
    let samples: Vec<Sample> = [3, 61, 2, 9]
        .map(|n| Sample {
            ids: ids(n, config.vocab, n as u64),
            counts: (0..n).map(|t| t >= n / 2 && t % 3 != 1).collect(),
            record: n,
        })
        .into();
    let samples: Vec<&Sample> = samples.iter().collect();
    for (name, keys, ste, goal) in [
        ("attn_token", Keys::All, Ste::Full, Goal::Tokens),
        ("attn_token", Keys::Active, Ste::Full, Goal::Dense),
        ("block_token", Keys::Active, Ste::Full, Goal::Tokens),
        ("block_sequence", Keys::All, Ste::Active, Goal::Dense),
        ("mlp_token", Keys::All, Ste::Full, Goal::Tokens),
    ] {
        let router = |l: usize| (l, ids(64, 2001, l as u64).iter().map(|&x| (x as f32 - 1000.0) / 4000.0).collect());
        let routers = || RouterSet {
            settings: RouterSettings { granularity: name.parse().unwrap(), keys, ..RouterSettings::default() },
            weights: [1, 2, 4].map(router).into(),
            thresholds: Default::default(),
            fingerprint: None,
            metadata: Default::default(),
            path: "here".into(),
        };
        let tuner = |device, recompute| {
            let memory = Some(Budget::Bytes(1 << 30));
            let limits = StepLimits { rows: 96, samples: 5, chunk: 70, recompute, memory };
            let backend = training_backend(&Options { device, threads: Some(2), ..Options::default() }).unwrap();
            Tuner::new(config.clone(), &weights, routers(), goal, limits, backend).unwrap()
        };
        let settings =
            StepSettings { goal, ste, loss_scale: 0.125, lambda: 0.75, target: 0.25, capacity_scale: 1.0 / 71.0 };
        let step = |tuner: &mut Tuner| {
            let outcome = tuner.step(&samples, &settings).unwrap();
            (outcome, tuner.take_gradients().unwrap())
        };
        let (expected, gradients) = step(&mut tuner(Device::Cpu, true));
        let what = format!("{name}, keys {keys}, {ste:?}, {goal:?}");
        let active: usize = expected.active.iter().sum();
        assert!((1..3 * expected.rows).contains(&active), "{what}: {active} active of {}", 3 * expected.rows);
        let recompute = keys == Keys::Active;
        let mut gpu = tuner(gpu(3), recompute);
        assert_eq!(gpu.plan().kept, if recompute { 0 } else { config.layers - 1 });
        let allocations = gpu.counters().allocations;
        let (outcome, first) = step(&mut gpu);
        assert_eq!(outcome.active, expected.active, "{what}");
        let losses = |of: &[f64]| of.iter().map(|&x| x as f32).collect::<Vec<_>>();
        assert_close(&what, &losses(&outcome.losses), &losses(&expected.losses), 1e-5);
        assert_close(&what, &first, &gradients, 2e-5);
        let (again, second) = step(&mut gpu);
        assert_eq!((bits(&second), again.losses), (bits(&first), outcome.losses), "{what}");
        assert_eq!(gpu.counters().allocations, allocations, "{what}: memory that was not planned");
    }
}

/// Steps of many sizes leave no more than a few recordings, and one that was given up is made anew.
#[test]
fn recordings_are_few() {
    let run = |options: Options| {
        let mut engine = stories(Options { context: Some(64), ..options }, |s| s).unwrap();
        let seqs: Vec<Seq> = (0..20).map(|_| engine.open().unwrap()).collect();
        let inputs: Vec<_> = seqs.iter().map(|&seq| (seq, &[5, 6][..])).collect();
        engine.prefill(&inputs).unwrap();
        let (mut logits, mut held) = (Vec::new(), Vec::new());
        for n in (1..=20).chain([1, 1]) {
            for token in [7, 8] {
                let inputs: Vec<_> = seqs[..n].iter().map(|&seq| (seq, token)).collect();
                logits.extend_from_slice(engine.decode(&inputs).unwrap());
            }
            held.push(engine.counters().recordings);
        }
        (logits, held)
    };
    let cpu = run(Options { device: Device::Cpu, dtype: None, ..options(20, 64) });
    let gpu = run(emulated(DType::F32, 20));
    assert_close("logits", &gpu.0, &cpu.0, 1e-5);
    let expected: Vec<u64> = (1..=20).chain([20, 20]).map(|met| met.min(16)).collect();
    assert_eq!(gpu.1, expected);
}

/// A prefill reads back 4 bytes for each routed layer, and the logits.
#[test]
fn prefill_reads_one_count_for_each_routed_layer() {
    let mut engine = stories(emulated(DType::F32, 1), |s| s).unwrap();
    let (vocab, routed) = (engine.config().vocab as u64, engine.routing().unwrap().layers.len() as u64);
    let seq = engine.open().unwrap();
    let before = engine.counters();
    engine.prefill(&[(seq, &ids(30, 1536, 1))]).unwrap();
    let after = engine.counters();
    assert_eq!(after.bytes_out - before.bytes_out, 4 * routed + 4 * vocab);
    assert_eq!(after.copies_out - before.copies_out, routed + 1);
}

/// Orders of threads, and of the blocks of a launch, change nothing.
#[test]
fn the_order_of_threads_does_not_matter() {
    let prompt = ids(33, 1536, 9);
    let logits = |seed| {
        let options = Options { device: gpu(seed), ..emulated(DType::BF16, 1) };
        let mut engine = stories(options, |s| s).unwrap();
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &prompt)]).unwrap().to_vec()
    };
    let first = logits(1);
    for seed in 2..5 {
        assert_eq!(logits(seed), first, "seed {seed}");
    }
}

#[test]
fn what_the_kernels_do_not_take_is_refused() {
    let folder = goldens().join("routing/model");
    let mut small = config(&folder);
    (small.heads, small.kv_heads, small.head_dim) = (8, 4, 8);
    let weights = Weights::open(&folder).unwrap();
    let options = Options { device: gpu(1), ..options(1, 64) };
    let error = Engine::new(small, weights, None, &options).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert!(error.to_string().ends_with("use --device cpu"), "{error}");
}

#[test]
fn kv_wider_than_the_activations_are_refused() {
    let options = Options { kv_dtype: Some(DType::F32), ..emulated(DType::BF16, 1) };
    let error = stories(options, |s| s).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    assert!(error.to_string().contains("--kv-dtype bf16"), "{error}");
}

/// More sequences than the streaming products take at a time, and fewer from step to step.
#[test]
fn large_batches_shrink() {
    let settings = |s: RouterSettings| RouterSettings { keys: Keys::Active, ..s };
    let prompts: Vec<Vec<u32>> = (0..70).map(|i| ids(1 + i % 3, 1536, i as u64)).collect();
    let run = |options: Options| {
        let mut engine = stories(Options { context: Some(16), ..options }, settings).unwrap();
        let mut seqs: Vec<Seq> = prompts.iter().map(|_| engine.open().unwrap()).collect();
        let inputs: Vec<_> = seqs.iter().zip(&prompts).map(|(&seq, prompt)| (seq, &prompt[..])).collect();
        engine.prefill(&inputs).unwrap();
        let mut logits = Vec::new();
        for drop in [0, 0, 3, 0, 0, 60, 0, 0] {
            seqs.drain(..drop).for_each(|seq| engine.close(seq).unwrap());
            let inputs: Vec<_> = seqs.iter().map(|&seq| (seq, 7)).collect();
            logits = engine.decode(&inputs).unwrap().to_vec();
        }
        (logits, engine.activity().unwrap().clone(), engine.kv_usage().unwrap())
    };
    let cpu = run(Options { device: Device::Cpu, dtype: None, ..options(70, 16) });
    let gpu = run(emulated(DType::F32, 70));
    assert_close("logits", &gpu.0, &cpu.0, 1e-5);
    assert_eq!((gpu.1, gpu.2), (cpu.1, cpu.2));
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The kernels for Hopper give the logits of the others but for roundings, and not to the last bit, so they did run.
#[test]
fn kernels_for_hopper_agree_with_the_others() {
    let prompt = ids(150, 1536, 5);
    let logits = |kernels, dtype, keys: Option<Keys>| {
        let bundle = Bundle::embedded().unwrap();
        let settings = |keys| RouterSettings { keys, ..RouterSettings::default() };
        let routing = keys.map(|keys| random_gates(settings(keys), &[2, 3, 5, 6], 0.5));
        let options = Options { kernels, chunk: Some(130), ..emulated(dtype, 1) };
        let options = Options { context: Some(160), rows: Some(160), ..options };
        let mut engine = Engine::new(bundle.config, bundle.weights, routing, &options).unwrap();
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &prompt)]).unwrap().to_vec()
    };
    for (dtype, tolerance) in [(DType::F16, 1e-3), (DType::BF16, 8e-3)] {
        for keys in [None, Some(Keys::All), Some(Keys::Active)] {
            let [hopper, others] = [Kernels::Hopper, Kernels::Sm80].map(|kernels| logits(kernels, dtype, keys));
            let what = format!("{dtype}, keys {keys:?}");
            assert_close(&what, &hopper, &others, tolerance);
            assert_ne!(bits(&hopper), bits(&others), "{what}");
        }
    }
    // There are none for f32: the others do it.
    let [hopper, auto] = [Kernels::Hopper, Kernels::Auto].map(|kernels| logits(kernels, DType::F32, None));
    assert_eq!(bits(&hopper), bits(&auto));
}

#[test]
fn kernels_for_hopper_generate() {
    let answer = |kernels| {
        let bundle = Bundle::embedded().unwrap();
        let tokenizer = bundle.tokenizer().unwrap();
        let options = Options { kernels, ..emulated(DType::BF16, 1) };
        let mut engine = Engine::new(bundle.config, bundle.weights, None, &options).unwrap();
        let prompt = tokenizer.encode("Tom had a red ball.", true).unwrap();
        let turn = Turn { max_tokens: 8, ..Turn::new(engine.open().unwrap(), prompt).unwrap() };
        let (answers, _) =
            generate(&mut engine, &tokenizer, &mut [turn], &mut |_, _| ControlFlow::Continue(())).unwrap();
        answers[0].tokens.clone()
    };
    let tokens = answer(Kernels::Hopper);
    assert_eq!(tokens.len(), 8);
    assert_eq!(tokens, answer(Kernels::Auto));
}

#[test]
fn kernels_for_hopper_are_refused_elsewhere() {
    let older = CudaBackend::new(Box::new(Emulated::of(1, (8, 9))), DType::BF16, DType::BF16).unwrap();
    let error = older.with_kernels(Kernels::Hopper).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported);
    let text = error.to_string();
    assert!(text.contains("compute capability 8.9") && text.ends_with("use --kernels auto"), "{text}");

    let on_cpu = Options { device: Device::Cpu, kernels: Kernels::Hopper, ..Options::default() };
    let error = stories(on_cpu, |s| s).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().ends_with("use --device cuda, or --kernels auto"), "{error}");
}
