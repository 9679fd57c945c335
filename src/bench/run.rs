//! The rounds of a sweep.

use std::ops::ControlFlow;
use std::time::Instant;

use rayon::prelude::*;

use super::record::Measured;
use super::stats::Stats;
use super::{Head, Phase, Plan, Point, Row, Setting, Way};
use crate::backend::{Counters, Draw, mix};
use crate::engine::{Activity, Engine, KvUsage, Options, Seq};
use crate::error::{Error, Kind, Result};
use crate::model::{Gates, Routing};
use crate::router::{Keys, RouterSettings};
use crate::weights::Weights;

/// How far a sweep is.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Runs, those that do not count included.
    pub done: usize,
    pub all: usize,
    /// "attn_token 0.5, prompt 512, gen 64".
    pub now: String,
}

/// Decode steps before those that are measured: a GPU records the second one and replays it from then on.
const SETTLE: usize = 2;

/// Tokens that fill the cache in one prefill.
const FILL: usize = 4096;

/// Bytes that are passed over between two runs on a CPU, so that none finds in the caches what the one before left there.
const EVICT: usize = 128 << 20;

/// Tokens of a sequence at its end.
pub(super) fn context(p: &Point) -> usize {
    p.depth + p.prompt + if p.generated > 0 { SETTLE + p.generated } else { 0 }
}

/// Runs a sweep and hands over the rows of each point when it is done; `progress` is told of every run and may break off.
///
/// Errors: what [`Plan::check`] and [`Engine::new`] refuse; Interrupted.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bench::{Head, Phase, Plan, Point, Progress, Row, Setting, Subject, Way, measure};
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::Device;
/// use mindskip::model::Routing;
///
/// let bundle = Bundle::embedded()?;
/// let routed = Way { routing: bundle.routers.clone().map(Routing::routers) };
/// let plan = Plan {
///     subject: Subject::model(bundle),
///     settings: vec![Setting { device: Device::Cpu, threads: Some(1), ..Setting::default() }],
///     batches: vec![2],
///     depths: vec![0],
///     prompts: vec![32],
///     generated: vec![4],
///     ways: vec![Way::DENSE, routed],
///     warmup: 0,
///     reps: 1,
///     seed: 0,
/// };
/// plan.check()?;
/// assert_eq!(plan.points(), [Point { batch: 2, depth: 0, prompt: 32, generated: 4 }]);
/// let mut rows = Vec::new();
/// let mut progress = |Progress { done, all, now }: &Progress| {
///     eprintln!("{done} of {all}: {now}");
///     ControlFlow::Continue(())
/// };
/// measure(&plan, &mut progress, &mut |more| rows.extend(more))?;
/// let [Row { decode: Some(dense), .. }, Row { head, active, decode: Some(Phase { flops, samples, .. }), .. }] = &rows[..]
/// else {
///     panic!("{rows:?}")
/// };
/// assert!(*active < 1.0 && *flops < dense.flops && samples.len() == 1);
/// let head: &Head = head;
/// assert!(head.rates().copy > 0.0, "bytes a second of a large copy");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn measure(
    plan: &Plan,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    each: &mut dyn FnMut(Vec<Row>),
) -> Result<()> {
    plan.check()?;
    let points = plan.points();
    let all = plan.settings.len() * points.len() * plan.ways.len() * (plan.warmup + plan.reps);
    let mut done = 0;
    let mut tell = |now: String, step: usize| match progress(&Progress { done, all, now }) {
        ControlFlow::Continue(()) => {
            done += step;
            Ok(())
        }
        ControlFlow::Break(()) => Err(Error::new(Kind::Interrupted, "interrupted while measuring")),
    };
    for setting in &plan.settings {
        tell("what the machine can do".into(), 0)?;
        let weights = plan.subject.weights(setting.dtype);
        let head = setting.head(&plan.subject, &weights)?;
        for point in &points {
            tell("weights".into(), 0)?;
            let mut bench = Bench::new(plan, *point, setting, &weights)?;
            let mut taken: Vec<Taken> = plan.ways.iter().map(|_| Taken::default()).collect();
            for round in 0..plan.warmup + plan.reps {
                for i in 0..plan.ways.len() {
                    let which = (i + round) % plan.ways.len();
                    let way = &plan.ways[which];
                    let share = way.capacity().map_or(String::new(), |capacity| format!(" {capacity}"));
                    tell(format!("{}{share}, prompt {}, gen {}", way.name(), point.prompt, point.generated), 1)?;
                    bench.run(way, &mut taken[which], round >= plan.warmup)?;
                }
            }
            each(plan.ways.iter().zip(&taken).map(|(way, own)| bench.row(&head, way, own, &taken[0])).collect());
        }
    }
    Ok(())
}

impl Plan {
    /// Errors: Memory when an engine of the sweep would not fit; those of [`Engine::plan_for`].
    pub(super) fn fits(&self) -> Result<()> {
        let points = self.points();
        self.settings.iter().flat_map(|setting| points.iter().map(move |point| (setting, point))).try_for_each(
            |(setting, point)| {
                let (config, weights) = (&self.subject.config, self.subject.weights(setting.dtype));
                Engine::plan_for(config, &weights, self.room().as_ref(), &options(point, setting)).map(drop)
            },
        )
    }

    /// Room for all ways: the most routed layers, and K/V for every row.
    fn room(&self) -> Option<Routing> {
        let most = self.ways.iter().filter_map(|way| way.routing.as_ref()).max_by_key(|r| r.layers.len());
        most.map(|routing| Routing {
            settings: RouterSettings { keys: Keys::All, ..RouterSettings::default() },
            layers: routing.layers.clone(),
            gates: Gates::Random { capacity: 1.0, seed: 0 },
        })
    }
}

fn options(point: &Point, setting: &Setting) -> Options {
    Options {
        context: Some(context(point)),
        batch: point.batch,
        rows: Some(point.batch * point.prompt.max(point.depth.min(FILL)).max(1)),
        ..setting.options()
    }
}

/// An engine for one point of a sweep.
struct Bench<'a> {
    plan: &'a Plan,
    point: Point,
    engine: Engine,
    /// On a CPU.
    evict: Vec<u64>,
}

/// What the runs of one way gave.
#[derive(Default)]
struct Taken {
    prefill: Measured,
    decode: Measured,
    /// Of the last run; all do the same.
    active: f64,
    kv: KvUsage,
}

impl<'a> Bench<'a> {
    fn new(plan: &'a Plan, point: Point, setting: &Setting, weights: &Weights) -> Result<Self> {
        let options = options(&point, setting);
        let engine = Engine::new(plan.subject.config.clone(), weights.clone(), plan.room(), &options)?;
        let on_cpu = engine.device().weights.is_none();
        let evict = if on_cpu { vec![1; EVICT / 8] } else { Vec::new() };
        Ok(Bench { plan, point, engine, evict })
    }

    /// Random token ids of a sequence from a position on.
    fn ids(&self, sequence: usize, from: usize, n: usize) -> Vec<u32> {
        let start = mix(self.plan.seed ^ mix(sequence as u64));
        let vocab = self.plan.subject.config.vocab as u64;
        (from..from + n).map(|position| (mix(start ^ position as u64) % vocab) as u32).collect()
    }

    /// One run. Its times are kept when they count.
    fn run(&mut self, way: &Way, taken: &mut Taken, counts: bool) -> Result<()> {
        let Point { batch, depth, prompt, generated } = self.point;
        self.engine.reroute(way.routing.clone())?;
        let seqs = (0..batch).map(|_| self.engine.open()).collect::<Result<Vec<Seq>>>()?;
        for from in (0..depth).step_by(FILL) {
            self.prefill(&seqs, from, FILL.min(depth - from))?;
        }
        self.evict.par_iter_mut().for_each(|x| *x = x.wrapping_mul(3));
        let mut activity = Activity::default();
        if prompt > 0 {
            self.engine.clear_counts()?;
            let before = self.engine.counters();
            let took = self.prefill(&seqs, depth, prompt)?;
            taken.prefill.asked = since(before, self.engine.counters());
            taken.prefill.meter = self.engine.meter().clone();
            add(&mut activity, self.engine.activity()?);
            if counts {
                taken.prefill.samples.push(took);
            }
        }
        if generated > 0 {
            let from = depth + prompt;
            let inputs: Vec<Vec<u32>> = (0..batch).map(|s| self.ids(s, from, SETTLE + generated)).collect();
            let steps: Vec<Vec<(Seq, u32)>> = (0..SETTLE + generated)
                .map(|step| seqs.iter().zip(&inputs).map(|(&seq, ids)| (seq, ids[step])).collect())
                .collect();
            let greedy = vec![Draw::GREEDY; batch];
            for step in &steps[..SETTLE] {
                self.engine.decode_and_sample(step, &greedy)?;
            }
            self.engine.clear_counts()?;
            let (before, start) = (self.engine.counters(), Instant::now());
            for step in &steps[SETTLE..] {
                self.engine.decode_and_sample(step, &greedy)?;
            }
            let took = start.elapsed().as_secs_f64();
            taken.decode.asked = since(before, self.engine.counters());
            taken.decode.meter = self.engine.meter().clone();
            add(&mut activity, self.engine.activity()?);
            if counts {
                taken.decode.samples.push(took);
            }
        }
        taken.active = activity.mean_capacity(way.routing.as_ref().map_or(&[], |r| &r.layers));
        taken.kv = self.engine.kv_usage()?;
        seqs.into_iter().try_for_each(|seq| self.engine.close(seq))
    }

    /// Reads `n` tokens of each sequence; seconds until the next token of each is known.
    fn prefill(&mut self, seqs: &[Seq], from: usize, n: usize) -> Result<f64> {
        let prompts: Vec<Vec<u32>> = (0..seqs.len()).map(|s| self.ids(s, from, n)).collect();
        let inputs: Vec<(Seq, &[u32])> = seqs.iter().copied().zip(prompts.iter().map(Vec::as_slice)).collect();
        let start = Instant::now();
        self.engine.prefill_and_sample(&inputs, &vec![Draw::GREEDY; seqs.len()])?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn row(&self, head: &Head, way: &Way, own: &Taken, dense: &Taken) -> Row {
        let Point { batch, depth, prompt, generated } = self.point;
        let plan = self.engine.plan();
        let rates = head.rates();
        let routing = way.routing.as_ref();
        Row {
            head: head.clone(),
            batch,
            depth,
            prompt,
            generated,
            routing: way.name(),
            keys: way.keys(),
            capacity: way.capacity(),
            routers: routing.and_then(|r| match &r.gates {
                Gates::Routers(set) => Some(set.path.display().to_string()),
                Gates::Random { .. } => None,
            }),
            layers: routing.map_or_else(Vec::new, |r| r.layers.clone()),
            seed: self.plan.seed,
            warmup: self.plan.warmup,
            reps: self.plan.reps,
            active: own.active,
            memory: plan.weights + plan.activations() + own.kv.bytes,
            kv: own.kv.bytes,
            kv_saved: own.kv.dense_bytes - own.kv.bytes,
            first_token_ms: (prompt > 0).then(|| 1e3 * Stats::of(&own.prefill.samples).median),
            prefill: (prompt > 0).then(|| Phase::new(&own.prefill, &dense.prefill, batch * prompt, 1, &rates)),
            decode: (generated > 0)
                .then(|| Phase::new(&own.decode, &dense.decode, batch * generated, generated, &rates)),
        }
    }
}

fn add(sum: &mut Activity, more: &Activity) {
    sum.tokens += more.tokens;
    sum.active.resize(more.active.len(), 0);
    sum.active.iter_mut().zip(&more.active).for_each(|(a, b)| *a += b);
}

/// What was asked for in between.
fn since(before: Counters, after: Counters) -> Counters {
    Counters {
        launches: after.launches - before.launches,
        replays: after.replays - before.replays,
        recordings: after.recordings,
        syncs: after.syncs - before.syncs,
        copies_in: after.copies_in - before.copies_in,
        bytes_in: after.bytes_in - before.bytes_in,
        copies_out: after.copies_out - before.copies_out,
        bytes_out: after.bytes_out - before.bytes_out,
        allocations: after.allocations - before.allocations,
    }
}
