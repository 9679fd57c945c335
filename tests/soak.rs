//! Many generations in one engine, one after the other and as requests that come and go: all K/V pages come back, nothing is
//! lost, and the process does not grow.
//!
//! `MINDSKIP_SOAK=5000 cargo test --release --test soak -- --nocapture` runs that many and prints how large it is on the way.

mod common;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use common::*;
use mindskip::Kind;
use mindskip::batch::{Batch, Event, Id, Request};
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options, Seq};
use mindskip::generate::Finish;
use mindskip::model::Routing;
use mindskip::router::{Keys, RouterSettings};
use mindskip::sample::{Sampler, SamplerSettings};
use sysinfo::{Pid, ProcessesToUpdate, System};

const SEQUENCES: usize = 3;
const CONTEXT: usize = 192;
const DEFAULT: u64 = 200;
/// Bytes that the process may grow by, however many generations there are.
const GROWTH: u64 = 4 << 20;

/// One test at a time: they look at the memory of the process.
static PROCESS: Mutex<()> = Mutex::new(());

/// How many generations.
fn amount() -> u64 {
    std::env::var("MINDSKIP_SOAK").map_or(DEFAULT, |n| n.parse().expect("MINDSKIP_SOAK is a number"))
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let own = Pid::from_u32(std::process::id());
    let mut system = System::new();
    system.refresh_processes(ProcessesToUpdate::Some(&[own]), true);
    system.process(own).expect("this process").memory()
}

/// Dense, and routed in several ways over all layers but the outer ones; and a routing that has room for all of these.
fn ways(layers: usize) -> ([Option<Routing>; 5], Option<Routing>) {
    let layers: Vec<usize> = (1..layers - 1).collect();
    let routed = |name: &str, keys, capacity| {
        let settings = RouterSettings { granularity: name.parse().unwrap(), keys, ..RouterSettings::default() };
        Some(random_gates(settings, &layers, capacity))
    };
    let ways = [
        None,
        routed("attn_token", Keys::Active, 0.3),
        routed("block_sequence", Keys::All, 0.5),
        routed("attn_token", Keys::All, 0.0),
        routed("mlp_token", Keys::All, 0.6),
    ];
    (ways, routed("attn_token", Keys::All, 1.0))
}

/// Some sequences at a time, each with a prompt of its own length, as long as `lengths` says; they end in a random order.
fn generate(engine: &mut Engine, number: u64, lengths: &[(usize, usize)]) {
    let vocab = engine.config().vocab;
    let seqs: Vec<Seq> = lengths.iter().map(|_| engine.open().unwrap()).collect();
    let prompts: Vec<Vec<u32>> = lengths.iter().map(|(prompt, _)| ids(*prompt, vocab, number)).collect();
    let inputs: Vec<(Seq, &[u32])> = seqs.iter().copied().zip(prompts.iter().map(Vec::as_slice)).collect();
    let logits = engine.prefill(&inputs).unwrap();
    let mut next: Vec<u32> = logits.chunks(vocab).map(argmax).collect();
    let mut open: Vec<usize> = (0..seqs.len()).collect();
    for step in 0.. {
        let (done, left) = open.iter().partition::<Vec<usize>, _>(|&&i| lengths[i].1 <= step);
        done.into_iter().for_each(|i| engine.close(seqs[i]).unwrap());
        open = left;
        if open.is_empty() {
            break;
        }
        let tokens: Vec<(Seq, u32)> = open.iter().map(|&i| (seqs[i], next[i])).collect();
        let logits = engine.decode(&tokens).unwrap();
        open.iter().zip(logits.chunks(vocab)).for_each(|(&i, logits)| next[i] = argmax(logits));
    }
}

#[test]
fn many_generations_take_no_more_memory_than_a_few() {
    let _alone = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    let all = amount();
    let Bundle { config, weights, .. } = Bundle::embedded().unwrap();
    let (ways, room) = ways(config.layers);
    let mut engine = Engine::new(config, weights, room, &options(SEQUENCES, CONTEXT)).unwrap();

    // Everything that is used is touched once: buffers, every page, threads.
    for way in &ways {
        engine.reroute(way.clone()).unwrap();
        generate(&mut engine, 0, &[(CONTEXT - 8, 8); SEQUENCES]);
    }
    let before = resident();
    println!("generation {:>6}: {:.1} MiB", 0, before as f64 / (1 << 20) as f64);
    for number in 1..=all {
        let drawn = ids(2 + 2 * SEQUENCES, 1 << 30, number);
        let random = |i: usize| drawn[i] as usize;
        engine.reroute(ways[random(0) % ways.len()].clone()).unwrap();
        let length = |i: usize| (1 + random(2 * i + 2) % 60, random(2 * i + 3) % 20);
        let lengths: Vec<_> = (0..1 + random(1) % SEQUENCES).map(length).collect();
        generate(&mut engine, number, &lengths);
        let usage = engine.kv_usage().unwrap();
        assert_eq!((usage.pages, usage.rows, usage.bytes), (0, 0, 0), "generation {number}: {lengths:?}");
        if number % all.div_ceil(10).max(1) == 0 {
            println!("generation {number:>6}: {:.1} MiB", resident() as f64 / (1 << 20) as f64);
        }
    }
    let after = resident();
    assert!(after <= before + GROWTH, "{before} bytes before, {after} after {all} generations");
}

/// A request with a prompt, a length and a way to sample that follow from its number.
fn request(number: u64) -> Request {
    let drawn = ids(3, 1 << 20, number);
    let temperature = if drawn[2].is_multiple_of(3) { 0.0 } else { 1.1 };
    let repetition_penalty = if drawn[2].is_multiple_of(5) { 1.1 } else { 1.0 };
    let settings = SamplerSettings { temperature, repetition_penalty, seed: number, ..SamplerSettings::default() };
    Request {
        sampler: Sampler::new(settings).unwrap(),
        max_tokens: 1 + drawn[1] as usize % 16,
        ..Request::new(ids(1 + drawn[0] as usize % 100, 1536, number)).unwrap()
    }
}

/// Requests arrive at random and are broken off at random; some are refused, as the queue is short or they cannot run, some give
/// their pages back and begin again. Each of the others ends once, with the answer that it gets alone, and no page is left.
#[test]
fn requests_that_come_and_go_lose_nothing() {
    let _alone = PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    let all = amount();
    let bundle = Bundle::embedded().unwrap();
    let (tokenizer, (ways, room)) = (bundle.tokenizer().unwrap(), ways(bundle.config.layers));
    let build = |options: Options| {
        let (config, weights) = (bundle.config.clone(), bundle.weights.clone());
        Engine::new(config, weights, room.clone(), &options).unwrap()
    };
    let mut lone = build(options(1, CONTEXT));
    // Pages for one context and a half, where five may run.
    let small = Options { kv_tokens: Some(320), rows: Some(150), ..options(5, CONTEXT) };
    let mut batch = Batch::new(build(small), &tokenizer).queue(4);
    let (mut refused, mut cancelled, mut ended, mut again, mut before) = (0, 0, 0, 0, 0);
    for round in 0..all.div_ceil(4) {
        let mut random = ids(400, 1 << 20, round).into_iter().cycle().map(|n| n as usize);
        let mut random = |n: usize| random.next().expect("without end") % n;
        let way = &ways[random(ways.len())];
        lone.reroute(way.clone()).unwrap();
        batch.engine().reroute(way.clone()).unwrap();
        let (mut open, mut left): (BTreeMap<Id, Request>, _) = (BTreeMap::new(), random(14));
        let mut read = batch.timing().prompt_tokens;
        while left > 0 || !batch.is_idle() {
            for _ in 0..random(4).min(left) {
                left -= 1;
                let mut wanted = request(round << 8 | left as u64);
                if random(9) == 0 {
                    wanted.prompt.truncate(0);
                }
                let full = batch.waiting() == 4;
                match batch.submit(wanted.clone()) {
                    Ok(id) => drop(open.insert(id, wanted)),
                    Err(e) => {
                        let expected = if wanted.prompt.is_empty() { Kind::Argument } else { Kind::Memory };
                        assert!(e.kind() == expected && (full || wanted.prompt.is_empty()), "{e}");
                        refused += 1;
                    }
                }
            }
            if random(20) == 0 && !open.is_empty() {
                let id = *open.keys().nth(random(open.len())).unwrap();
                cancelled += usize::from(batch.cancel(id).unwrap());
            }
            for event in batch.step().unwrap() {
                let (id, answer) = match event {
                    Event::Text(id, _) => {
                        assert!(open.contains_key(&id));
                        continue;
                    }
                    Event::Done(id, answer) => (id, answer),
                    Event::Failed(id, error) => panic!("{id:?}: {error}"),
                };
                let wanted = open.remove(&id).expect("it ends once");
                read += wanted.prompt.len();
                let (expected, _) = alone(&mut lone, &tokenizer, &wanted);
                if answer.finish == Finish::Interrupted {
                    assert!(expected.tokens.starts_with(&answer.tokens), "{id:?} in round {round}");
                } else {
                    assert_eq!(answer, expected, "{id:?} in round {round}");
                }
                ended += 1;
            }
        }
        assert!(open.is_empty(), "round {round}: {:?}", open.keys());
        assert_eq!((batch.running(), batch.waiting()), (0, 0));
        assert_eq!(batch.engine().kv_usage().unwrap(), Default::default(), "round {round}");
        again += usize::from(batch.timing().prompt_tokens > read);
        // Every buffer and page has been used by then.
        if round == all.div_ceil(4) / 4 {
            before = resident();
        }
    }
    let after = resident();
    let counts =
        format!("{ended} ended, {cancelled} of them broken off, {refused} refused, {again} rounds ran out of pages");
    println!("{counts}: {:.1} MiB, then {:.1} MiB", before as f64 / (1 << 20) as f64, after as f64 / (1 << 20) as f64);
    assert!(refused > 0 && cancelled > 0 && again > 0, "{counts}");
    assert!(after <= before + GROWTH, "{before} bytes before, {after} after; {counts}");
}
