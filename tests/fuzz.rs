//! What is fuzzed at length by scripts/fuzz, for a moment: the seeds, mutations of them, and what was once a finding.

mod common;
#[path = "fuzz/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use common::mutate::{below, mutate};
use rand_pcg::Pcg64Dxsm;
use rand_pcg::rand_core::SeedableRng;
use targets::TARGETS;

/// How long a target is fed.
const CASES: usize = 300;

/// What a body says to its bytes: nothing, or why they are a finding.
fn finding(body: impl Fn(&[u8]), data: &[u8]) -> Option<String> {
    let start = Instant::now();
    let panic = catch_unwind(AssertUnwindSafe(|| body(data))).err();
    let said = panic.map(|panic| match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(text), _) => text.clone(),
        (_, Some(text)) => text.to_string(),
        _ => "a panic".into(),
    });
    said.or_else(|| (start.elapsed() > Duration::from_secs(20)).then(|| format!("took {:?}", start.elapsed())))
}

/// Mutations of the seeds, and of one followed by the end of another.
fn fed(seeds: &[Vec<u8>], cases: usize, mut feed: impl FnMut(&[u8])) {
    let mut rng = Pcg64Dxsm::seed_from_u64(7);
    seeds.iter().for_each(|seed| feed(seed));
    for _ in 0..cases {
        let one = &seeds[below(&mut rng, seeds.len())];
        let mut bytes = mutate(one, &mut rng);
        if below(&mut rng, 4) == 0 {
            let other = &seeds[below(&mut rng, seeds.len())];
            bytes.truncate(below(&mut rng, bytes.len() + 1));
            bytes.extend(&other[below(&mut rng, other.len())..]);
        }
        feed(&bytes);
    }
}

// One test, because the memory counted is that of the whole process.
#[test]
fn no_target_has_a_finding() {
    for planted in [planted_panic as fn(&[u8]), planted_allocation] {
        let mut found = 0;
        fed(&[b"{\"a\": 1}".to_vec()], CASES, |data| found += usize::from(finding(planted, data).is_some()));
        assert!(found > 0, "what was planted is not found");
    }
    for target in TARGETS {
        let start = Instant::now();
        let mut check = |data: &[u8]| {
            if let Some(said) = finding(target.body, data) {
                panic!("{}: {said}\n{:?}", target.name, String::from_utf8_lossy(data));
            }
        };
        fed(&(target.seeds)(), CASES, &mut check);
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/findings").join(target.name);
        let kept: Vec<_> = fs::read_dir(kept).into_iter().flatten().map(|file| file.unwrap().path()).collect();
        kept.iter().for_each(|file| check(&fs::read(file).unwrap()));
        eprintln!("{}: {CASES} mutations and {} findings of before, {:.1?}", target.name, kept.len(), start.elapsed());
    }
}

fn planted_panic(data: &[u8]) {
    assert!(!data.windows(4).any(|window| window == b"null"), "planted");
}

/// As a parser would that trusts a number.
fn planted_allocation(data: &[u8]) {
    targets::bounded(data, 100_000, 40, || {
        let digits = data.iter().skip_while(|b| !b.is_ascii_digit()).take_while(|b| b.is_ascii_digit());
        let size: u64 = String::from_utf8(digits.copied().collect()).unwrap().parse().unwrap_or(0);
        std::hint::black_box(Vec::<u8>::with_capacity(size.min(1 << 32) as usize));
    });
}
