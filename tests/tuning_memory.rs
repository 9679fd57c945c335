//! A step of Router-Tuning takes no more memory than its plan states.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{config, goldens, ids};
use mindskip::router::{Granularity, RouterSet, RouterSettings};
use mindskip::tune::plan::{StepLimits, StepPlan};
use mindskip::tune::{Goal, Sample, Ste, StepSettings, Tuner};
use mindskip::weights::Weights;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const ROWS: usize = 1024;
/// Beside the plan: the model's own lists, those of a step's rows on the host, what threads work in.
const BESIDE: usize = 1 << 20;

/// The plan, and the peak of what was allocated from before the tuner was built until after two steps: the weights are mapped,
/// so they are not in it.
fn peak(folder: &Path, settings: RouterSettings, first: usize, goal: Goal) -> (StepPlan, usize) {
    let (config, weights) = (config(folder), Weights::open(folder).unwrap());
    let samples: Vec<Sample> = (0..8)
        .map(|i| Sample {
            ids: ids(ROWS / 8 + 1, config.vocab, i),
            counts: vec![true; ROWS / 8 + 1],
            record: i as usize,
        })
        .collect();
    let samples: Vec<&Sample> = samples.iter().collect();
    let routers = RouterSet {
        settings,
        weights: (first..config.layers).map(|l| (l, vec![0.0; config.hidden])).collect(),
        thresholds: BTreeMap::new(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "here".into(),
    };
    let limits = StepLimits { rows: ROWS, samples: 8, chunk: 64, memory: None };
    let step = StepSettings {
        goal,
        ste: Ste::Full,
        loss_scale: 1.0 / ROWS as f32,
        lambda: 0.1,
        target: 0.5,
        capacity_scale: 1.0 / ROWS as f32,
    };
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let mut tuner = Tuner::new(config, &weights, routers, goal, limits, Some(2)).unwrap();
    for _ in 0..2 {
        tuner.step(&samples, &step).unwrap();
    }
    (tuner.plan().clone(), MEMORY.peak_usage() - before)
}

#[test]
fn a_step_takes_what_its_plan_states() {
    let folder = goldens().join("routing/model");
    for (n, name) in Granularity::NAMES.iter().enumerate() {
        let granularity = name.parse().unwrap();
        let settings = RouterSettings { granularity, ..RouterSettings::default() };
        let goal = Goal::ALL[n % 2];
        let measured = [1, 4].map(|first| peak(&folder, settings, first, goal));
        for (plan, peak) in &measured {
            let stated = (plan.total() - plan.weights) as usize;
            println!("{name} {goal}: stated {stated}, peak {peak}");
            assert!((stated..stated + BESIDE).contains(peak), "{name}: {stated} bytes are stated, {peak} were taken");
        }
        // One layer is at work; of the others only inputs are kept, of those from the lowest routed one on.
        let [(low, low_peak), (high, high_peak)] = measured;
        let inputs = 3 * ROWS * config(&folder).hidden * 4;
        assert_eq!((low.buffers.saved.rows, high.buffers.saved.rows), (5 * ROWS, 2 * ROWS));
        assert!(
            (low_peak - high_peak).abs_diff(inputs) < inputs / 20,
            "{name}: {} bytes for 3 layers",
            low_peak - high_peak
        );
    }
}
