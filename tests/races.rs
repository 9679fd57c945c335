//! What nothing orders is found by file and line on the emulator that cuda/emulator/races.h describes, and the kernels have
//! none of it.

mod common;

use common::emulator::*;
use mindskip::backend::AnyKind;
use mindskip::backend::cuda::{emulated::Emulated, verify};

/// The lines of a kernel that race: those that end in `// race`, of the function that its line calls or of itself.
fn marked(file: &str, kernel: &str) -> Vec<String> {
    let path = format!("cuda/emulator/tests/{file}");
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().position(|line| line.starts_with(&format!("KERNEL({kernel},"))).expect(kernel);
    let called = lines[at].split("{ ").nth(1).and_then(|body| body.split('<').next());
    let begin = match called {
        Some(function) => lines.iter().position(|line| line.contains(&format!("void {function}("))).expect(function),
        None => at,
    };
    let body = lines[begin..].iter().take_while(|line| **line != "}");
    let raced = body.enumerate().filter(|(_, line)| line.ends_with("// race"));
    raced.map(|(i, _)| format!("{path}:{}", begin + i + 1)).collect()
}

fn run(kernel: &str, seed: u64, blocks: u32, threads: u32) -> Result<(), String> {
    let _guard = seeded(seed);
    let (x, out) = (Buffer::of(&numbers(4 * 256)), Buffer::of(&[0f32; 256]));
    launch(kernel, [blocks, 1, 1], threads, 0, args(&x, &out, 0))
}

/// In each of some orders of threads the kernel fails, with every line that races.
#[track_caller]
fn is_found(file: &str, kernel: &str, blocks: u32, threads: u32) {
    let lines = marked(file, kernel);
    assert!(!lines.is_empty(), "{kernel} marks no line");
    for seed in 0..5 {
        let error = run(kernel, seed, blocks, threads).expect_err(kernel);
        if seed == 0 {
            println!("{error}");
        }
        for word in ["data race", kernel].into_iter().chain(lines.iter().map(String::as_str)) {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
}

#[test]
fn what_nothing_orders_is_found_by_file_and_line() {
    for (pair, blocks, threads) in [
        ("warp", 1, 32),
        ("block", 1, 64),
        ("twice", 1, 64),
        ("matrices", 1, 32),
        ("copies", 1, 64),
        ("last", 9, 64),
        ("sum", 9, 64),
    ] {
        for seed in 0..5 {
            run(&format!("emu_{pair}_right"), seed, blocks, threads).unwrap();
        }
        is_found("races.cu", &format!("emu_{pair}_wrong"), blocks, threads);
    }
    is_found("faults.cu", "emu_no_barrier", 1, 256);
    is_found("faults.cu", "emu_no_second_barrier", 1, 256);
    is_found("faults.cu", "emu_no_barrier_in_sum", 1, 256);
    is_found("faults.cu", "emu_no_syncwarp", 1, 32);
    is_found("faults.cu", "emu_wait_without_barrier", 1, 64);
}

/// Every op in every type, a few of its cases: nothing of the kernels races.
#[test]
fn the_kernels_have_no_races() {
    let _guard = seeded(1);
    let mut failures = Vec::new();
    let start = std::time::Instant::now();
    let ops: Vec<_> = AnyKind::all().collect();
    verify(Box::new(Emulated::new(1)), &ops, 14, &mut |verdict| {
        println!("{:?} {}: {} cases, at {:.0?}", verdict.op, verdict.dtype, verdict.cases, start.elapsed());
        failures.extend(verdict.failures.iter().cloned());
    })
    .unwrap();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
