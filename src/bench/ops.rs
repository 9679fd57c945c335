//! Every op by itself, at the sizes of a model.

mod backward;

use std::ops::ControlFlow;
use std::time::Instant;

use backward::GradientBuffers;

use super::record::OpRow;
use super::run::Progress;
use super::stats::Stats;
use super::{Head, Setting, Subject};
use crate::backend::*;
use crate::config::Config;
use crate::engine::{self, Precision};
use crate::error::{Error, Kind, Result};
use crate::memory::{Buffers, Limits, MemoryPlan, Placer, Routed, too_large};
use crate::tensor::{DType, Tensor};
use crate::weights::Weights;

/// Which sizes ops are measured at.
#[derive(Debug, Clone)]
pub struct OpsPlan {
    pub subject: Subject,
    pub setting: Setting,
    /// Rows at a time: 1 is a decode step, more are prompts.
    pub rows: Vec<usize>,
    /// K/V rows of the sequence, with those of the step.
    pub context: usize,
    pub reps: usize,
}

/// Layers that take turns have at least so many bytes together, as long as the model has so many: each part of them more than
/// caches hold.
const TURNS: usize = 1 << 30;

/// Seconds that a sample lasts at least, and the most calls that it is made of.
const SHORTEST: f64 = 5e-3;
const MOST_CALLS: usize = 1024;

/// How the one sequence's next token is drawn: the settings that most models come with.
const DRAW: Draw = Draw { temperature: 0.8, top_k: 50, top_p: 0.95, min_p: 0.0, random: 1 << 63 };

/// Runs every op at every size and hands over the rows of a size when it is done.
///
/// Errors: Argument for sizes that make no sense; what the backend refuses; Interrupted.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bench::{OpRow, OpsPlan, Setting, Subject, measure_ops};
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::Device;
///
/// let setting = Setting { device: Device::Cpu, ..Setting::default() };
/// let plan = OpsPlan { subject: Subject::model(Bundle::embedded()?), setting, rows: vec![1], context: 100, reps: 1 };
/// let mut rows = Vec::new();
/// measure_ops(&plan, &mut |_| ControlFlow::Continue(()), &mut |more| rows.extend(more))?;
/// let attend: &OpRow = rows.iter().find(|row| row.op == "attend").expect("every op is measured");
/// assert_eq!(attend.flops, 4 * 100 * 128, "two products, of 100 rows and two heads of 64");
/// assert!(attend.us > 0.0 && attend.of_ideal > 0.0);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn measure_ops(
    plan: &OpsPlan,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    each: &mut dyn FnMut(Vec<OpRow>),
) -> Result<()> {
    plan.check()?;
    let head = plan.setting.head(&plan.subject, &plan.subject.weights(plan.setting.dtype))?;
    let mut training = None;
    let (count, mut done) = (AnyKind::all().count(), 0);
    for &rows in &plan.rows {
        let mut bench = OpBench::new(plan, rows)?;
        if training.is_none() {
            training = Some(bench.training.head(&plan.subject, &bench.training_weights)?);
        }
        let mut measured = Vec::new();
        for kind in AnyKind::all() {
            let now = format!("{} of {rows} rows", kind.name());
            if progress(&Progress { done, all: plan.rows.len() * count, now }).is_break() {
                return Err(Error::new(Kind::Interrupted, "interrupted while measuring"));
            }
            let head = match kind {
                AnyKind::Forward(_) => &head,
                AnyKind::Backward(_) => training.as_ref().expect("just measured"),
            };
            measured.push(bench.row(head, kind, plan.reps)?);
            done += 1;
        }
        each(measured);
    }
    Ok(())
}

impl OpsPlan {
    /// Errors: Argument for sizes that make no sense.
    fn check(&self) -> Result<()> {
        let most = self.rows.iter().copied().max().unwrap_or(0).max(self.context);
        if self.rows.is_empty() || self.rows.contains(&0) || self.reps == 0 {
            return Err(
                Error::new(Kind::Argument, "--rows or --reps names nothing to measure").action("give 1 or more")
            );
        }
        let Subject { name, config, .. } = &self.subject;
        if most > config.context {
            let cause = format!("{most} tokens are more than the {} of {name}", config.context);
            return Err(Error::new(Kind::Argument, cause).action("lower --rows or --context"));
        }
        Ok(())
    }
}

/// Every op over one number of rows: those of [`Ops`] as an engine runs them, those of [`Gradients`] as training does, in f32
/// and over one sequence of these rows.
///
/// ```
/// use mindskip::backend::{AnyKind, OpKind};
/// use mindskip::bench::{OpBench, OpsPlan, Setting, Subject};
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::Device;
///
/// let setting = Setting { device: Device::Cpu, ..Setting::default() };
/// let plan = OpsPlan { subject: Subject::model(Bundle::embedded()?), setting, rows: vec![8], context: 8, reps: 1 };
/// let mut bench = OpBench::new(&plan, 8)?;
/// let cost = bench.prepare(AnyKind::Forward(OpKind::Embed))?;
/// assert!(cost.bytes >= 8 * 128 * 4, "eight rows are written in f32");
/// assert!(bench.seconds(AnyKind::Forward(OpKind::Embed), 10)? > 0.0);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct OpBench {
    forward: Bench,
    backward: Bench,
    training: Setting,
    training_weights: Weights,
}

impl OpBench {
    /// Errors: Argument for sizes that make no sense; what the backend refuses.
    pub fn new(plan: &OpsPlan, rows: usize) -> Result<OpBench> {
        plan.check()?;
        let OpsPlan { subject, setting, .. } = plan;
        let weights = subject.weights(setting.dtype);
        let mut forward = Bench::new(plan, setting, rows, plan.context.max(rows), &weights, false)?;
        forward.fill()?;
        // A CPU reads weights as they are stored, in training, too.
        let held = forward.backend.info().weights;
        let dtype = if held.is_some() { Some(DType::F32) } else { setting.dtype };
        let training = Setting { dtype, kv_dtype: Some(DType::F32), precision: Precision::F32, ..setting.clone() };
        let training_weights = subject.weights(dtype);
        let mut backward = Bench::new(plan, &training, rows, rows, &training_weights, true)?;
        backward.fill_gradients()?;
        Ok(OpBench { forward, backward, training, training_weights })
    }

    /// Gets ready to measure an op, on one layer after the other: what a call takes, in FLOPs and bytes. Errors: what the backend
    /// refuses.
    pub fn prepare(&mut self, kind: AnyKind) -> Result<Cost> {
        let bench = self.of(kind);
        for layer in 0..bench.layers.len() {
            bench.stand_at(layer, bench.context - bench.rows)?;
        }
        *bench.backend.meter() = Meter::default();
        bench.run(&[bench.any(kind, 0)], 1, None)?;
        Ok(bench.backend.meter().count_mut(kind).cost)
    }

    /// Seconds that so many calls take, behind [`prepare`](Self::prepare). Where steps are recorded, the launches of one do not wait
    /// for the host. Errors: what the backend refuses.
    pub fn seconds(&mut self, kind: AnyKind, calls: usize) -> Result<f64> {
        let bench = self.of(kind);
        bench.backend.forget()?;
        bench.recorded += 1;
        bench.again(kind, calls)?;
        bench.again(kind, calls)?;
        bench.again(kind, calls)
    }

    fn of(&mut self, kind: AnyKind) -> &mut Bench {
        match kind {
            AnyKind::Forward(_) => &mut self.forward,
            AnyKind::Backward(_) => &mut self.backward,
        }
    }

    fn row(&mut self, head: &Head, kind: AnyKind, reps: usize) -> Result<OpRow> {
        let cost = self.prepare(kind)?;
        let mut calls = 1;
        while self.seconds(kind, calls)? < SHORTEST && calls < MOST_CALLS {
            calls *= 2;
        }
        let bench = self.of(kind);
        let each = |seconds: f64| seconds / calls as f64;
        let samples = (0..reps).map(|_| bench.again(kind, calls).map(each)).collect::<Result<Vec<f64>>>()?;
        let Stats { median, spread } = Stats::of(&samples);
        Ok(OpRow {
            head: head.clone(),
            op: kind.name().into(),
            rows: bench.rows,
            context: bench.context,
            us: 1e6 * median,
            spread,
            flops: cost.flops,
            bytes: cost.bytes,
            bytes_per_s: cost.bytes as f64 / median,
            flops_per_s: cost.flops as f64 / median,
            of_ideal: head.rates().seconds(cost) / median,
            samples,
        })
    }
}

/// A few layers of a model on a backend, and a step of some rows.
struct Bench {
    backend: Box<dyn TrainingBackend>,
    config: Config,
    buffers: Buffers,
    gradients: GradientBuffers,
    layers: Vec<Layer>,
    /// `[vocab, hidden]`
    embed: Weight,
    head: Weight,
    inv_freq: Weight,
    router: Weight,
    rows: usize,
    context: usize,
    /// Steps that were recorded: each needs a key of its own.
    recorded: usize,
}

#[derive(Clone, Copy)]
struct Layer {
    norm: Weight,
    qkv: [Weight; 3],
    biases: [Option<Weight>; 3],
    gate: Weight,
    up: Weight,
    down: Weight,
}

impl Bench {
    fn new(
        plan: &OpsPlan,
        setting: &Setting,
        rows: usize,
        context: usize,
        weights: &Weights,
        training: bool,
    ) -> Result<Self> {
        let mut backend = if training {
            engine::training_backend(&setting.options())?
        } else {
            engine::open_backend(&setting.options(), weights.main_dtype(), &mut None)?
        };
        let be = backend.as_mut();
        let mut config = plan.subject.config.clone();
        let (q, kv, hidden, inter) = (config.q_rows(), config.kv_rows(), config.hidden, config.intermediate);
        let size = be.info().weights.unwrap_or(weights.main_dtype()).size();
        let layer_bytes = size * hidden * (q + 2 * kv + 3 * inter);
        config.layers = TURNS.div_ceil(layer_bytes).clamp(1, config.layers);
        let limits = Limits { context, batch: 1, rows, chunk: rows, kv_tokens: None, memory: setting.memory };
        let bytes = (config.layers * layer_bytes + 2 * size * config.vocab * hidden) as u64;
        let placed = MemoryPlan::new(&config, Routed { layers: 1, sparse_kv: 0 }, bytes, limits, be)?;

        let mut get = |name: &str, rows, cols| weights.load(name, rows, cols, be);
        let embed = get("model.embed_tokens.weight", config.vocab, hidden)?;
        let head = if config.tied { embed } else { get("lm_head.weight", config.vocab, hidden)? };
        let mut layers = Vec::new();
        for l in 0..config.layers {
            let mut get = |part: &str, rows, cols| get(&format!("model.layers.{l}.{part}"), rows, cols);
            let mut proj = |part: &str, rows| get(&format!("self_attn.{part}_proj.weight"), rows, hidden);
            let qkv = [proj("q", q)?, proj("k", kv)?, proj("v", kv)?];
            let mut biases = [None; 3];
            for (bias, (part, rows)) in biases.iter_mut().zip([("q", q), ("k", kv), ("v", kv)]) {
                let name = format!("self_attn.{part}_proj.bias");
                if weights.contains(&format!("model.layers.{l}.{name}")) {
                    *bias = Some(get(&name, 1, rows)?);
                }
            }
            layers.push(Layer {
                norm: get("input_layernorm.weight", 1, hidden)?,
                qkv,
                biases,
                gate: get("mlp.gate_proj.weight", inter, hidden)?,
                up: get("mlp.up_proj.weight", inter, hidden)?,
                down: get("mlp.down_proj.weight", hidden, inter)?,
            });
        }
        let inv_freq = be.upload(&Tensor::from_f32(&config.rope.inv_freq(config.head_dim)))?;
        let router = be.random(DType::F32, 1, hidden, Noise { seed: 1, mean: 0.0, scale: 1.0 / hidden as f32 })?;
        let mut at = Placer { bytes: placed.arena as usize, ints: placed.ints as usize / 4 };
        let (mut workspace, mut gradients) = (placed.workspace as usize, GradientBuffers::NONE);
        if training {
            gradients = GradientBuffers::place(&config, rows, placed.buffers.logits, &mut at).ok_or_else(too_large)?;
            let Config { hidden, intermediate, heads, vocab, .. } = config;
            let largest = Largest { rows, chunk: rows, hidden, intermediate, heads, vocab };
            workspace = workspace.max(be.training_workspace(&largest, &placed.kv)?);
        }
        be.reserve(at.bytes, at.ints, workspace, &placed.kv)?;
        for l in 0..config.layers {
            let pages: Vec<u32> =
                (0..placed.kv.pages_per_seq).map(|i| (l * placed.kv.pages_per_seq + i) as u32).collect();
            be.kv_pages(l, 0, 0, &pages)?;
        }
        let buffers = placed.buffers;
        Ok(Bench {
            backend,
            config,
            buffers,
            gradients,
            layers,
            embed,
            head,
            inv_freq,
            router,
            rows,
            context,
            recorded: 0,
        })
    }

    /// Writes K/V rows up to the step's, so that all numbers that ops read are some of a model's.
    fn fill(&mut self) -> Result<()> {
        let before = self.context - self.rows;
        for layer in 0..self.layers.len() {
            for from in (0..before).step_by(self.rows) {
                self.stand_at(layer, from.min(before.saturating_sub(self.rows)))?;
            }
        }
        Ok(())
    }

    /// A layer's K/V hold `from` rows, and the ops up to attention, in training with it, have run for the step behind them.
    fn stand_at(&mut self, layer: usize, from: usize) -> Result<()> {
        let (b, rows) = (self.buffers, self.rows);
        let vocab = self.config.vocab as u64;
        let ids: Vec<u32> = (from..from + rows).map(|i| (mix(i as u64) % vocab) as u32).collect();
        let count: Vec<u32> = (0..rows as u32).collect();
        let be = self.backend.as_mut();
        be.write_ints(b.ids, &ids)?;
        be.write_ints(b.pos, &count.iter().map(|i| i + from as u32).collect::<Vec<_>>())?;
        be.write_ints(b.row_slot, &vec![0; rows])?;
        be.write_ints(b.all, &count)?;
        be.write_ints(b.seq_start, &[0, rows as u32])?;
        be.write_ints(b.slots, &[0])?;
        be.write_ints(b.cuts, &[rows as u32])?;
        be.write_ints(b.draws, &DRAW.words())?;
        be.write_ints(b.targets, &ids[..b.targets.len.min(rows)])?;
        be.kv_len(layer, 0, from)?;
        let window = self.config.windows[layer];
        let dense = Op::Route(Route { decide: Decide::All, queries: Take::All, window, ..self.route(layer) });
        let chain = [OpKind::Embed, OpKind::RopeAngles, OpKind::NormGate].map(|kind| self.op(kind, layer));
        let mut rest = [OpKind::Qkv, OpKind::RopeAppend].map(|kind| self.op(kind, layer)).to_vec();
        if self.training() {
            rest.push(self.op(OpKind::Attend, layer));
        }
        let mut all = chain.iter().chain([&dense]).chain(&rest);
        self.backend.step(None, &mut |be| all.try_for_each(|op| op.run(be)))
    }

    /// Seconds of so many calls, in the same step as before.
    fn again(&mut self, kind: AnyKind, calls: usize) -> Result<f64> {
        let ops: Vec<AnyOp> = (0..self.layers.len()).map(|layer| self.any(kind, layer)).collect();
        for layer in 0..self.layers.len() {
            // Where routing is what is measured, each call has appended rows.
            let routes = kind == AnyKind::Forward(OpKind::Route);
            self.backend.kv_len(layer, 0, self.context - if routes { self.rows } else { 0 })?;
        }
        let mut wait = [0];
        self.backend.read_ints(self.buffers.cuts, &mut wait)?;
        let start = Instant::now();
        self.run(&ops, calls, Some(StepKey { rows: self.recorded, next: Next::Logits }))?;
        self.backend.read_ints(self.buffers.cuts, &mut wait)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Calls ops in turns, all forward or all backward.
    fn run(&mut self, ops: &[AnyOp], calls: usize, key: Option<StepKey>) -> Result<()> {
        let mut calls = ops.iter().cycle().take(calls);
        if let AnyOp::Backward(_) = ops[0] {
            return self.backend.train(&mut |be| calls.try_for_each(|op| op.run(be)));
        }
        self.backend.step(key, &mut |be| {
            calls.try_for_each(|op| match op {
                AnyOp::Forward(op) => op.run(be),
                AnyOp::Backward(_) => unreachable!("they are of one kind"),
            })
        })
    }

    fn any(&self, kind: AnyKind, layer: usize) -> AnyOp {
        match kind {
            AnyKind::Forward(kind) => self.op(kind, layer).into(),
            AnyKind::Backward(kind) => self.gradient(kind, layer).into(),
        }
    }

    fn all(&self) -> RowSet {
        RowSet { run: Some(0), ..RowSet::exact(self.buffers.all.slice(0..self.rows)) }
    }

    fn route(&self, layer: usize) -> Route {
        let (b, rows) = (&self.buffers, self.rows);
        Route {
            layer,
            decide: Decide::Threshold(0.5),
            queries: Take::Active,
            keys: Take::All,
            // Calls in a row move on beyond the K/V that are there, where a window would be looked for.
            window: None,
            logits: b.gate.rows(0..rows),
            pos: b.pos.slice(0..rows),
            seq_start: b.seq_start,
            slots: b.slots,
            decided: b.decided.slice(0..1),
            cuts: b.cuts.slice(0..1),
            active: b.active.slice(0..rows),
            active_at: b.active_at.slice(0..1),
            first: b.first,
            end: b.end,
            kv_row: b.kv_row,
        }
    }

    /// An op over all rows of the step. A new one does not compile without its size here.
    fn op(&self, kind: OpKind, layer: usize) -> Op {
        let (b, c, rows, all) = (&self.buffers, &self.config, self.rows, self.all());
        let Layer { norm, qkv, biases, gate, up, down } = self.layers[layer];
        let scored = rows.min(b.logits.rows);
        match kind {
            OpKind::Embed => Op::Embed(Embed { table: self.embed, ids: b.ids.slice(0..rows), out: b.x }),
            OpKind::RopeAngles => {
                Op::RopeAngles(RopeAngles { pos: b.pos.slice(0..rows), inv_freq: self.inv_freq, out: b.angles })
            }
            OpKind::NormGate => Op::NormGate(NormGate {
                x: b.x,
                rows: all,
                weight: norm,
                eps: c.norm_eps,
                out: Some(b.h),
                gate: Some(Gate { router: self.router, logits: b.gate.rows(0..rows) }),
            }),
            OpKind::Route => Op::Route(self.route(layer)),
            OpKind::Qkv => Op::Qkv(Qkv {
                h: b.h,
                base: 0,
                q_rows: all,
                kv_rows: all,
                weights: qkv,
                biases,
                q: b.q,
                k: b.k,
                v: b.v,
            }),
            OpKind::RopeAppend => Op::RopeAppend(RopeAppend {
                layer,
                head_dim: c.head_dim,
                angles: b.angles,
                pos: b.pos,
                row_slot: b.row_slot,
                q_rows: all,
                kv_rows: all,
                kv_row: b.kv_row.slice(0..rows),
                q: b.q,
                k: b.k,
                v: b.v,
                q_norm: None,
                k_norm: None,
                eps: c.norm_eps,
            }),
            OpKind::Attend => Op::Attend(Attend {
                layer,
                head_dim: c.head_dim,
                scale: (c.head_dim as f32).sqrt().recip(),
                rows: all,
                row_slot: b.row_slot,
                first: b.first.slice(0..rows),
                end: b.end.slice(0..rows),
                q: b.q,
                out: b.attn,
                kv_heads: c.kv_heads,
                single: rows == 1,
            }),
            OpKind::ProjectAdd => {
                Op::ProjectAdd(ProjectAdd { src: b.act, weight: down, bias: None, rows: all, x: b.x })
            }
            OpKind::SwiGlu => {
                Op::SwiGlu(SwiGlu { h: b.h, rows: all, gate, up, gate_bias: None, up_bias: None, out: b.act })
            }
            OpKind::Logits => Op::Logits(Logits { h: b.h, weight: self.head, out: b.logits.rows(0..scored) }),
            OpKind::LogProbs => Op::LogProbs(LogProbs {
                logits: b.logits.rows(0..scored),
                targets: b.targets.slice(0..scored),
                out: b.logprobs.rows(0..scored),
            }),
            OpKind::Sample => {
                Op::Sample(Sample { logits: b.logits.rows(0..1), draws: Some(b.draws), tokens: b.tokens })
            }
        }
    }
}
