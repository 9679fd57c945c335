//! The emulator of CUDA kernels: that it computes what a GPU would, and that it finds faults. The kernels stand in
//! cuda/emulator/tests/.

mod common;

use common::emulator::*;
use half::{bf16, f16};

#[test]
fn sums_over_blocks() {
    let _guard = seeded(1);
    for (n, threads, blocks) in [(0, 32, 1), (1, 64, 3), (1000, 256, 1), (54321, 1024, 7)] {
        let x = numbers(n);
        let out = Buffer::<f32>::new(blocks);
        launch("emu_block_sum", [blocks as u32, 1, 1], threads, 0, args(&Buffer::of(&x), &out, n)).unwrap();
        assert_eq!(out.get().iter().sum::<f32>(), x.iter().sum::<f32>(), "{n} numbers");
    }
}

#[test]
fn scans() {
    let _guard = seeded(1);
    for (n, threads) in [(1, 32), (33, 64), (1000, 128), (5000, 1024)] {
        let x: Vec<u32> = (0..n).map(|i| i * 7 % 13).collect();
        let out = Buffer::<u32>::new(x.len());
        let shared = threads / 32 * 4;
        launch("emu_scan", [1, 1, 1], threads, shared, args(&Buffer::of(&x), &out, x.len())).unwrap();
        let sums = x.iter().scan(0, |sum, x| {
            *sum += x;
            Some(*sum)
        });
        assert!(out.get().iter().copied().eq(sums), "{n} numbers");
    }
}

#[test]
fn lanes_exchange() {
    let _guard = seeded(1);
    let sum = |lanes: std::ops::Range<u32>| lanes.map(|i| 100 + i).sum::<u32>();
    let ballot = (0..32).filter(|i| i % 3 == 0).fold(0, |bits, i| bits | 1 << i);
    let expected: [&dyn Fn(u32) -> u32; 15] = [
        &|_| 105,
        &|i| 100 + i / 8 * 8 + (i + 1) % 8,
        &|i| 100 + (i ^ 3),
        &|i| 100 + if i < 16 { i } else { i - 16 }, // lanes of earlier parts can be read, of later ones not
        &|i| 100 + if i < 2 { i } else { i - 2 },
        &|i| 100 + if i % 4 < 2 { i } else { i - 2 },
        &|i| 100 + if i < 30 { i + 2 } else { i },
        &|i| 100 + if i % 4 < 2 { i + 2 } else { i },
        &|_| 101,
        &|_| ballot,
        &|_| 1,
        &|_| 0,
        &|_| sum(0..32),
        &|_| 131,
        &|i| if i < 12 { sum(0..12) } else { sum(12..32) },
    ];
    let out = Buffer::<u32>::new(expected.len() * 32);
    block("emu_lanes", 32, args(&out, &out, 0)).unwrap();
    for (op, row) in expected.iter().zip(out.get().chunks(32)).enumerate() {
        let all: Vec<u32> = (0..32).map(row.0).collect();
        assert_eq!(row.1, all, "op {op}");
    }
}

#[test]
fn exited_threads_are_not_waited_for() {
    let _guard = seeded(1);
    for threads in [4, 96, 100, 1024] {
        let out = Buffer::<i32>::new(3 * threads);
        block("emu_votes", threads as u32, args(&out, &out, 0)).unwrap();
        for (thread, row) in out.get().chunks(3).enumerate() {
            let expected = if thread % 4 == 3 { [-1; 3] } else { [threads as i32 / 4, 1, 1] };
            assert_eq!(row, expected, "thread {thread}");
        }
    }
}

#[test]
fn atomics_and_grids() {
    let _guard = seeded(1);
    let out = Buffer::of(&[0u32; 7]);
    launch("emu_atomics", [5, 3, 2], 64, 0, args(&out, &out, 9)).unwrap();
    assert_eq!(out.get(), [1920, 1919, u32::MAX, 0, 960f32.to_bits(), 1, 7]);
}

#[test]
fn numbers_of_16_bits() {
    let _guard = seeded(1);
    // Every f16 and bf16, what stands between two, and what stands a little beside it.
    let mut x = Vec::new();
    for bits in 0..=u16::MAX {
        for at in [f16::from_bits(bits).to_f32().to_bits(), u32::from(bits) << 16] {
            x.extend(
                [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001]
                    .map(|more| f32::from_bits(at.wrapping_add(more))),
            );
        }
    }
    let out = Buffer::<[u32; 4]>::new(x.len());
    launch("emu_convert", [x.len().div_ceil(256) as u32, 1, 1], 256, 0, args(&Buffer::of(&x), &out, x.len())).unwrap();
    for (&x, &[a, b, a32, b32]) in x.iter().zip(out.get()) {
        let (a16, b16) = (f16::from_f32(x), bf16::from_f32(x));
        if x.is_nan() {
            assert_eq!([a, b], [0x7fff_7fff; 2]);
            assert!(f32::from_bits(a32).is_nan() && f32::from_bits(b32).is_nan());
        } else {
            let twice = |bits: u16| u32::from(bits) * 0x10001;
            assert_eq!([a, b], [twice(a16.to_bits()), twice(b16.to_bits())], "{x:e}");
            assert_eq!([a32, b32], [a16.to_f32().to_bits(), b16.to_f32().to_bits()], "{x:e}");
        }
    }
}

#[test]
fn matrices() {
    let _guard = seeded(1);
    let x: Vec<u16> = (0..256).collect(); // number 64 m + 8 row + column
    let out = Buffer::<u32>::new(256);
    block("emu_matrices", 32, args(&Buffer::of(&x), &out, 0)).unwrap();
    for lane in 0..32 {
        for m in 0..4 {
            let (g, t) = (lane / 4, lane % 4);
            let at = |row, column| x[64 * m + 8 * row + column] as u32;
            assert_eq!(out.get()[4 * lane + m], at(g, 2 * t) | at(g, 2 * t + 1) << 16);
            assert_eq!(out.get()[128 + 4 * lane + m], at(2 * t, g) | at(2 * t + 1, g) << 16);
        }
    }
}

#[test]
fn products() {
    let _guard = seeded(1);
    let x = numbers(256 + 128);
    let expected = |row: usize, column: usize| (0..16).map(|k| x[16 * row + k] * x[256 + 8 * k + column]).sum::<f32>();
    let as_f16: Vec<u16> = x.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
    let as_bf16: Vec<u16> = x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    for (kernel, x) in [("emu_multiply_f16", as_f16), ("emu_multiply_bf16", as_bf16)] {
        let out = Buffer::<f32>::new(128);
        block(kernel, 32, args(&Buffer::of(&x), &out, 0)).unwrap();
        for (i, &y) in out.get().iter().enumerate() {
            assert_eq!(y, expected(i / 8, i % 8), "{kernel}, number {i}");
        }
    }
}

#[test]
fn product_with_copies_under_way() {
    let _guard = seeded(1);
    for n in [64, 256] {
        let x = numbers(2 * n * n);
        let bits: Vec<u16> = x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
        let (bits, out) = (Buffer::of(&bits), Buffer::<f32>::new(n * n));
        let grid = [n as u32 / 64, n as u32 / 64, 1];
        let start = std::time::Instant::now();
        launch("emu_gemm_bf16", grid, 128, 2 * 2 * 64 * 40 * 2, args(&bits, &out, n)).unwrap();
        println!("{n} x {n} x {n}: {:?}", start.elapsed());
        for (i, &y) in out.get().iter().enumerate() {
            let (row, column) = (i / n, n + i % n);
            let expected: f32 = (0..n).map(|k| x[row * n + k] * x[column * n + k]).sum();
            assert_eq!(y, expected, "n {n}, number {i}");
        }
    }
}

#[test]
#[cfg(not(feature = "races"))] // there these launches fail
fn the_seed_decides() {
    // A race ends the same with the same seed, and differently with some other.
    let run = |seed| {
        let _guard = seeded(seed);
        let (x, out) = (Buffer::of(&numbers(256)), Buffer::<f32>::new(256));
        block("emu_no_barrier", 256, args(&x, &out, 0)).unwrap();
        out.get().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3), run(4));
}

/// In how many of 100 orders of threads a kernel writes something else than `expected`.
#[cfg(not(feature = "races"))]
fn found(kernel: &str, threads: u32, expected: impl Fn(&[f32], usize) -> f32, outputs: usize) -> usize {
    let x = numbers(4 * threads as usize);
    let in_memory = Buffer::of(&x);
    let wrong = |seed| {
        let _guard = seeded(seed);
        let out = Buffer::<f32>::new(outputs);
        block(kernel, threads, args(&in_memory, &out, 0)).unwrap();
        (0..outputs).any(|i| out.get()[i] != expected(&x, i))
    };
    let count = (0..100).filter(|&seed| wrong(seed)).count();
    println!("{kernel}: {count} of 100");
    count
}

#[test]
#[cfg(not(feature = "races"))] // there these launches fail
fn finds_missing_barriers() {
    let neighbour = |n: usize| move |x: &[f32], i: usize| x[(i + 1) % n];
    assert_eq!(found("emu_no_barrier", 256, neighbour(256), 256), 100);
    assert_eq!(found("emu_no_second_barrier", 256, neighbour(256), 256), 100);
    assert_eq!(found("emu_no_syncwarp", 32, neighbour(32), 32), 100);
    // Warp 0 has to be ahead of another of n warps: 1 - 1/n.
    let sum = |n: usize| move |x: &[f32], _: usize| x[..n].iter().sum::<f32>();
    assert!(found("emu_no_barrier_in_sum", 256, sum(256), 1) > 70);
    assert!(found("emu_no_barrier_in_sum", 64, sum(64), 1) > 30);
}

#[test]
#[cfg(not(feature = "races"))] // there these launches fail
fn finds_copies_that_were_not_waited_for() {
    let neighbour = |x: &[f32], i: usize| x[4 * ((i + 1) % 256)];
    assert_eq!(found("emu_copied", 256, neighbour, 256), 0);
    assert_eq!(found("emu_no_wait", 256, neighbour, 256), 100);
    assert_eq!(found("emu_wait_without_barrier", 256, neighbour, 256), 100);
    assert_eq!(found("emu_no_commit", 256, |x, i| x[4 * i], 256), 100);
}

#[test]
fn finds_what_was_not_written() {
    let _guard = seeded(1);
    let (x, out) = (Buffer::of(&numbers(64)), Buffer::<f32>::new(64));
    block("emu_unwritten", 64, args(&x, &out, 0)).unwrap();
    let unwritten: Vec<usize> = (0..64).filter(|&i| out.get()[i].is_nan()).collect();
    assert_eq!(unwritten, [3]);
}

/// The kernel fails, whatever the order, and says all of `words`; another runs well afterwards.
#[track_caller]
fn fails(kernel: &str, threads: u32, shared: u32, n: usize, words: &[&str]) {
    for seed in 0..20 {
        let guard = seeded(seed);
        let (x, out) = (Buffer::of(&numbers(1024)), Buffer::<f32>::new(250));
        let error = launch(kernel, [3, 1, 1], threads, shared, args(&x, &out, n)).expect_err(kernel);
        if seed == 0 {
            println!("{error}");
        }
        for word in [kernel, "block (", "thread ("].iter().chain(words) {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
        drop((x, out, guard));
    }
    sums_over_blocks();
}

#[test]
fn finds_threads_that_part() {
    fails("emu_divergent_barrier", 256, 0, 0, &["divergent barrier", "faults.cu:"]);
    fails("emu_barrier_and_warp", 64, 0, 0, &["deadlock", "__syncthreads at", "__shfl_xor_sync at", "faults.cu:"]);
    fails("emu_exited_lane", 64, 0, 0, &["deadlock", "lanes 00000020 have exited"]);
    fails("emu_exited_lane", 16, 0, 0, &["deadlock", "lanes ffff0000 are not there"]);
    fails("emu_two_primitives", 32, 0, 0, &["__shfl_xor_sync at", "__any_sync at"]);
}

#[test]
#[cfg(not(feature = "races"))] // ThreadSanitizer crashes when a signal handler is left for another stack
fn finds_what_is_out_of_bounds() {
    fails("emu_dynamic_overrun", 64, 128, 0, &["dynamic shared memory"]);
    fails("emu_static_index", 9, 0, 0, &["no element 8", "faults.cu:"]);
    fails("emu_register_index", 64, 0, 0, &["no element", "faults.cu:"]);
    fails("emu_misaligned", 64, 0, 0, &["misaligned", "faults.cu:"]);
    fails("emu_null", 64, 0, 5, &["0x14"]);
    fails("emu_deep", 64, 0, 1000, &["stack"]);
    fails("emu_global_overrun", 64, 0, 256, &["behind the end of a buffer of 1000"]);
}

#[test]
fn finds_overruns_that_fault_no_page_behind_the_kernel() {
    let _guard = seeded(1);
    let out = Buffer::<f32>::new(250);
    let error = block("emu_static_overrun", 9, args(&out, &out, 0)).unwrap_err();
    assert!(error.contains("behind the shared variables of") && error.contains("faults.cu:"), "{error}");
    let error = launch("emu_global_overrun", [1, 1, 1], 64, 0, args(&out, &out, 250)).unwrap_err();
    assert!(error.contains("wrote behind the end of a buffer of 1000"), "{error}");
    let error = launch("emu_dynamic_overrun", [1, 1, 1], 32, 124, args(&out, &out, 0)).unwrap_err();
    assert!(error.contains("wrote behind its 124 bytes of dynamic shared memory"), "{error}");
}

/// Sums over boxes of 64 rows: an error, or whether all numbers are right. Shared memory holds two boxes.
fn box_sum(kernel: &str, seed: u64, boxes: usize) -> Result<bool, String> {
    let _guard = seeded(seed);
    let x = numbers(boxes * 64 * 64);
    let bits: Vec<u16> = x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    let (bits, out) = (Buffer::of(&bits), Buffer::<f32>::new(boxes * 64 * 64));
    launch(kernel, [1, 1, 1], 160, 2 * 8192 + 2048, box_args(&bits, &out, boxes))?;
    Ok(out.get().iter().enumerate().all(|(i, &y)| {
        let (at, column) = (i / 4096, i % 64);
        y == (0..64).map(|row| x[(64 * at + row) * 64 + column]).sum::<f32>()
    }))
}

#[test]
fn copies_of_boxes_and_products_of_warpgroups() {
    for seed in 0..50 {
        assert_eq!(box_sum("emu_box_sum", seed, 1 + seed as usize % 5), Ok(true), "seed {seed}");
    }
    let x = numbers(192 * 64);
    let expected =
        |row: usize, column: usize| (0..64).map(|k| x[64 * row + k] * x[64 * (64 + column) + k]).sum::<f32>();
    let as_f16: Vec<u16> = x.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
    let as_bf16: Vec<u16> = x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    for (kernel, bits) in [("emu_operands_f16", &as_f16), ("emu_operands_bf16", &as_bf16)] {
        let _guard = seeded(1);
        let out = Buffer::<f32>::new(64 * 128);
        launch(kernel, [1, 1, 1], 128, 192 * 128 + 1024, args(&Buffer::of(bits), &out, 0)).unwrap();
        for (i, &y) in out.get().iter().enumerate() {
            assert_eq!(y, expected(i / 128, i % 128), "{kernel}, number {i}");
        }
    }
    for seed in 0..20 {
        let _guard = seeded(seed);
        let out = Buffer::<f32>::new(97);
        block("emu_turns", 96, args(&out, &out, 0)).unwrap();
        assert!(out.get()[..96].iter().all(|&wrong| wrong == 0.0) && out.get()[96] == 1.0, "seed {seed}");
    }
}

/// Faults that the emulator sees, whatever the order.
#[test]
fn finds_faults_of_copies_and_products() {
    for (kernel, words) in [
        ("emu_box_no_products_fence", "without products_fence"),
        ("emu_box_touched", "touched while it was under way"),
        ("emu_box_never_released", "deadlock: "),
        ("emu_box_too_many_arrivals", "all 1 have arrived"),
        ("emu_box_no_barrier", "is no barrier"),
        ("emu_box_misaligned", "no multiple of 128"),
        ("emu_box_overlapping", "another copy to that place"),
        ("emu_box_left_out", "warps of a warpgroup multiply different things"),
        ("emu_box_different_counts", "of which others come as to one of"),
    ] {
        for seed in 0..20 {
            let error = box_sum(kernel, seed, 5).expect_err(kernel);
            if seed == 0 {
                println!("{error}");
            }
            assert!(error.contains(words), "{kernel}: {words:?} is not in {error:?}");
        }
    }
    let _guard = seeded(1);
    let (x, out) = (Buffer::of(&[0u16; 192 * 64]), Buffer::<f32>::new(64 * 128));
    let error =
        launch("emu_operands_no_fence", [1, 1, 1], 128, 192 * 128 + 1024, args(&x, &out, 0)).expect_err("no fence");
    assert!(error.contains("without an async_fence"), "{error}");
}

/// Faults that show in some orders: as an error, or in the results.
#[test]
fn finds_copies_and_products_that_were_not_waited_for() {
    let found = |kernel: &str| {
        let count = (0..50).filter(|&seed| box_sum(kernel, seed, 5) != Ok(true)).count();
        println!("{kernel}: {count} of 50");
        count
    };
    assert_eq!(found("emu_box_sum"), 0);
    assert_eq!(found("emu_box_no_wait_for_copy"), 50);
    assert_eq!(found("emu_box_no_wait_for_product"), 50);
    assert!(found("emu_box_released_early") > 15);
    let left = |seed: &u64| {
        let result = box_sum("emu_box_left_under_way", *seed, 3);
        result.is_err_and(|error| error.contains("ended while copy_box was under way"))
    };
    assert!((0..50).filter(left).count() > 25);
}

#[test]
fn refuses_launches() {
    let _guard = seeded(1);
    let out = Buffer::<f32>::new(0);
    let refused = |name: &str, grid, threads, shared, word: &str| {
        let error = launch(name, grid, threads, shared, args(&out, &out, 0)).unwrap_err();
        assert!(error.contains(word), "{error}");
    };
    refused("emu_none", [1, 1, 1], 32, 0, "no such kernel");
    refused("emu_atomics", [1, 1, 1], 257, 0, "257 threads");
    refused("emu_atomics", [1, 1, 1], 0, 0, "0 threads");
    refused("emu_atomics", [1, 0, 1], 32, 0, "1 x 0 x 1");
    refused("emu_atomics", [1, 1, 1], 32, 227 * 1024 + 1, "232449 bytes of dynamic shared memory");
    refused("embed_f32", [1, 1, 1], 32, 0, "bytes of arguments");
}
