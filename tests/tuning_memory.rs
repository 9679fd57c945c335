//! A step of Router-Tuning takes no more memory than its plan states.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{config, goldens, ids};
use mindskip::engine::{Device, Options, training_backend};
use mindskip::router::{RouterSet, RouterSettings};
use mindskip::tune::plan::{StepLimits, StepPlan};
use mindskip::tune::{Goal, Sample, Ste, StepSettings, Tuner};
use mindskip::weights::Weights;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const ROWS: usize = 1024;

/// The plan, and the peak of what was allocated beside it from before the tuner was built until after two steps. Buffers and K/V are
/// one mapping each, of the size that the plan states, as are the weights: none of them is allocated.
fn peak(folder: &Path, settings: RouterSettings, goal: Goal, recompute: bool) -> (StepPlan, usize) {
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
        weights: (1..config.layers).map(|l| (l, vec![0.0; config.hidden])).collect(),
        thresholds: BTreeMap::new(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "here".into(),
    };
    let limits = StepLimits { rows: ROWS, samples: 8, chunk: 64, recompute, memory: None };
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
    let backend = training_backend(&Options { device: Device::Cpu, threads: Some(2), ..Options::default() }).unwrap();
    let mut tuner = Tuner::new(config, &weights, routers, goal, limits, backend).unwrap();
    for _ in 0..2 {
        tuner.step(&samples, &step).unwrap();
    }
    (tuner.plan().clone(), MEMORY.peak_usage() - before)
}

#[test]
fn a_step_takes_no_more_than_its_plan_states() {
    let folder = goldens().join("routing/model");
    for (name, goal) in [("attn_token", Goal::Tokens), ("block_token", Goal::Dense), ("mlp_sequence", Goal::Tokens)] {
        let settings = RouterSettings { granularity: name.parse().unwrap(), ..RouterSettings::default() };
        let recompute = name == "attn_token";
        let (plan, peak) = peak(&folder, settings, goal, recompute);
        let (stated, layer) = ((plan.arena + plan.kv_bytes()) as usize, ROWS * config(&folder).hidden * 4);
        assert_eq!(plan.inputs() as usize, 5 * layer, "the inputs of the layers 1 to 5");
        assert_eq!((plan.kept, plan.kv.layers), if recompute { (0, 1) } else { (5, 6) });
        // Integers, which the plan states as well; lists of rows on the host; what threads work in.
        assert!(peak < 2 * layer && peak < stated / 8, "{name}: {peak} bytes beside {stated}");
    }
}
