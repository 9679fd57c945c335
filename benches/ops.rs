//! Every op at the sizes of SmolLM2-135M, by criterion: the cases of `mindskip bench ops`. On a GPU where there is one.
//!
//! `cargo bench` runs all, `cargo bench -- attend` those with the name; `-- --save-baseline a` and `-- --baseline a` compare.

use std::time::Duration;

use criterion::Criterion;
use mindskip::backend::AnyKind;
use mindskip::bench::{OpBench, OpsPlan, Setting, Subject, shape};

const SHAPE: &str = "smollm2-135m";
/// A decode step, and a prompt.
const ROWS: [usize; 2] = [1, 256];
/// Calls of one sample at most: each is a launch of a step that is recorded on a GPU.
const MOST_CALLS: u64 = 1024;

fn main() {
    let quick = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(300))
        .without_plots();
    let mut criterion = quick.configure_from_args();
    let subject = Subject::shape(SHAPE, shape(SHAPE).expect("a known shape"));
    let plan = OpsPlan { subject, setting: Setting::default(), rows: ROWS.to_vec(), context: 512, reps: 1 };
    for rows in ROWS {
        let mut bench = OpBench::new(&plan, rows).unwrap_or_else(|e| panic!("{e}"));
        let mut group = criterion.benchmark_group(format!("{rows} rows"));
        for kind in AnyKind::all() {
            // Only what the filter lets through is made ready.
            let mut ready = false;
            group.bench_function(kind.name(), |bencher| {
                bencher.iter_custom(|wanted| {
                    let calls = wanted.min(MOST_CALLS);
                    let measured = if ready { Ok(()) } else { bench.prepare(kind).map(drop) };
                    ready = true;
                    let seconds = measured.and_then(|()| bench.seconds(kind, calls as usize));
                    let seconds = seconds.unwrap_or_else(|e| panic!("{}: {e}", kind.name()));
                    Duration::from_secs_f64(seconds * wanted as f64 / calls as f64)
                });
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
