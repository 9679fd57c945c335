//! Many generations in one engine: all K/V pages come back, and the process does not grow.
//!
//! `MINDSKIP_SOAK=5000 cargo test --release --test soak -- --nocapture` runs that many and prints how large it is on the way.

mod common;

use common::*;
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Seq};
use mindskip::router::{Keys, RouterSettings};
use sysinfo::{Pid, ProcessesToUpdate, System};

const SEQUENCES: usize = 3;
const CONTEXT: usize = 192;
const DEFAULT: u64 = 200;
/// Bytes that the process may grow by, however many generations there are.
const GROWTH: u64 = 4 << 20;

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let own = Pid::from_u32(std::process::id());
    let mut system = System::new();
    system.refresh_processes(ProcessesToUpdate::Some(&[own]), true);
    system.process(own).expect("this process").memory()
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
    let all = std::env::var("MINDSKIP_SOAK").map_or(DEFAULT, |n| n.parse().expect("MINDSKIP_SOAK is a number"));
    let Bundle { config, weights, .. } = Bundle::embedded().unwrap();
    let layers: Vec<usize> = (1..config.layers - 1).collect();
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
    let room = routed("attn_token", Keys::All, 1.0);
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
