//! One step of Router-Tuning over a few packed samples: forward with the hard mask, then backward, layer by layer from
//! the top, down to the lowest routed layer.
//!
//! Straight through the mask, dL/dscore = dL/dm, and dL/dm_t = ⟨dL/dx'_t, what the sub-layer gave or would have given⟩.
//! A sub-layer ends in a frozen projection, so this product is taken in front of it: ⟨dL/dx'_t·W, its input⟩. Nothing
//! flows back through the sub-layer of a skipped row (its m is 0), so for [`Ste::Full`] skipped rows only go forward
//! once more.

mod backward;

use crate::backend::*;
use crate::error::Result;
use crate::model::{Layer, Model, Routing};
use crate::router::{Keys, Level, RouterSettings, Target};
use crate::step::Phase;

use super::plan::{StepBuffers, StepPlan};
use super::{Goal, Sample, Ste};

/// What one step is to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSettings {
    pub goal: Goal,
    pub ste: Ste,
    /// What a token's loss counts: 1 over all answer tokens of the batch that the step belongs to.
    pub loss_scale: f32,
    /// The penalty `lambda·relu(capacity − target)` of each routed layer, by the capacity of this step's samples, as when
    /// gradients add up over steps.
    pub lambda: f32,
    pub target: f32,
    /// What a row's mask counts in it: 1 over all rows of the batch.
    pub capacity_scale: f32,
}

impl StepSettings {
    /// Of a step that goes forward only.
    pub(super) fn forward(goal: Goal) -> Self {
        StepSettings { goal, ste: Ste::Active, loss_scale: 0.0, lambda: 0.0, target: 1.0, capacity_scale: 0.0 }
    }
}

/// What a step has found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutcome {
    /// By sample: the sum of its answer tokens' losses, natural logarithms.
    pub losses: Vec<f64>,
    /// By routed layer: active rows.
    pub active: Vec<usize>,
    /// Rows that passed the layers.
    pub rows: usize,
    /// Answer tokens.
    pub answers: usize,
}

/// Some rows that query attention, and the K/V rows that each may see.
#[derive(Debug, Clone, Copy)]
struct Queries {
    rows: Ints,
    first: Ints,
    end: Ints,
}

/// What a forward pass leaves for the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Save {
    Nothing,
    /// The inputs of the layers from the first routed one on.
    Inputs,
    /// Also what the plan keeps of layers.
    Activations,
}

/// Where a layer leaves its activations.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Its number in the K/V.
    kv: usize,
    q: Mat,
    attn: Mat,
    /// What is only there when they are kept.
    kept: Option<Between>,
}

/// The activations between a layer's sub-layers, and within its MLP.
#[derive(Debug, Clone, Copy)]
struct Between {
    x: Mat,
    gate: Mat,
    up: Mat,
}

/// How a layer treats the rows of a step.
#[derive(Debug, Clone, Copy)]
struct Treated {
    at: Place,
    queries: Queries,
    /// Rows that write K/V.
    keys: Ints,
    /// Rows that pass the MLP.
    mlp: Ints,
    /// The rows that its router leaves out.
    skipped: Queries,
    /// These write no K/V either, though they see those of others.
    apart: bool,
}

/// The handles of one step: everything is `Copy` but the backend.
pub(super) struct Pass<'a> {
    pub be: &'a mut dyn TrainingBackend,
    pub model: &'a Model,
    pub plan: &'a StepPlan,
    pub samples: &'a [&'a Sample],
    /// Whether routers are at work.
    pub routed: bool,
    /// Where the scores are kept, when they are wanted.
    pub scores: Option<Vec<f32>>,
    /// To reuse.
    pub lists: &'a mut Lists,
}

/// What the host reads of a routed layer, and makes of it.
#[derive(Default)]
pub(super) struct Lists {
    active: Vec<u32>,
    first: Vec<u32>,
    end: Vec<u32>,
    scratch: Vec<u32>,
}

impl Pass<'_> {
    fn buffers(&self) -> StepBuffers {
        self.plan.buffers
    }

    fn rows(&self) -> usize {
        self.samples.iter().map(|s| s.inputs().len()).sum()
    }

    /// The first `rows` of a buffer for as many rows as there can be.
    fn part(&self, mat: Mat) -> Mat {
        mat.rows(0..self.rows())
    }

    fn all(&self) -> Ints {
        self.buffers().all.slice(0..self.rows())
    }

    fn saved(&self, layer: usize) -> Option<Mat> {
        let start = layer.checked_sub(self.plan.first)? * self.plan.limits.rows;
        Some(self.buffers().saved.rows(start..start + self.rows()))
    }

    /// The buffers of the layer at work, which the next one takes.
    fn shared(&self) -> Place {
        let b = self.buffers();
        Place { kv: 0, q: b.q, attn: b.attn, kept: None }
    }

    fn place(&self, layer: usize, save: Save) -> Place {
        let kept_from = self.model.layers.len() - self.plan.kept;
        let Some(nth) = layer.checked_sub(kept_from).filter(|_| save == Save::Activations) else {
            return self.shared();
        };
        let (kept, start) = (self.buffers().kept, nth * self.plan.limits.rows);
        let [x, q, attn, gate, up] =
            [kept.x, kept.q, kept.attn, kept.gate, kept.up].map(|m| m.rows(start..start + self.rows()));
        Place { kv: 1 + nth, q, attn, kept: Some(Between { x, gate, up }) }
    }

    fn routing(&self, layer: &Layer) -> Option<&Routing> {
        self.model.routing.as_ref().filter(|_| self.routed && layer.routed.is_some())
    }

    fn settings(&self, layer: &Layer) -> Option<RouterSettings> {
        self.routing(layer).map(|r| r.settings)
    }

    /// Tells the device about the samples. Errors: Shape when they are more than was planned for.
    pub fn begin(&mut self) -> Result<()> {
        let (b, samples) = (self.buffers(), self.samples);
        let be = &mut *self.be;
        let v = &mut self.lists.scratch;
        let mut write = |to: Ints, values: &mut dyn Iterator<Item = u32>| {
            v.clear();
            v.extend(values);
            be.write_ints(to, v)
        };
        let mut starts = vec![0];
        starts.extend(samples.iter().scan(0, |end, s| {
            *end += s.inputs().len() as u32;
            Some(*end)
        }));
        let rows = starts[samples.len()];
        write(b.ids, &mut samples.iter().flat_map(|s| s.inputs().iter().copied()))?;
        write(b.pos, &mut samples.iter().flat_map(|s| 0..s.inputs().len() as u32))?;
        write(b.row_slot, &mut (0u32..).zip(samples).flat_map(|(n, s)| std::iter::repeat_n(n, s.inputs().len())))?;
        write(b.all, &mut (0..rows))?;
        write(b.seq_start, &mut starts.iter().copied())?;
        write(b.slots, &mut (0..samples.len() as u32))?;
        write(b.cuts, &mut std::iter::once(rows))?;
        let answers =
            || samples.iter().zip(&starts).flat_map(|(s, &start)| s.answers().map(move |(i, t)| (start + i, t)));
        write(b.answers, &mut answers().map(|(row, _)| row))?;
        write(b.targets, &mut answers().map(|(_, target)| target))?;
        let mut page = 0;
        for layer in 0..self.plan.kv.layers {
            for (slot, sample) in samples.iter().enumerate() {
                let pages: Vec<u32> = (page..).take(sample.inputs().len().div_ceil(PAGE)).collect();
                page += pages.len() as u32;
                be.kv_pages(layer, slot, 0, &pages)?;
            }
        }
        be.rope_angles(&RopeAngles { pos: b.pos.slice(0..rows as usize), inv_freq: self.model.inv_freq, out: b.angles })
    }

    /// All layers, with the hard mask. Returns the active rows of each routed layer.
    pub fn forward(&mut self, save: Save) -> Result<Vec<usize>> {
        let b = self.buffers();
        let ids = b.ids.slice(0..self.rows());
        self.be.embed(&Embed { table: self.model.embed, ids, out: b.x })?;
        self.layers(0, save)
    }

    /// The layers from one on; see [`forward`](Self::forward).
    fn layers(&mut self, from: usize, save: Save) -> Result<Vec<usize>> {
        let b = self.buffers();
        let mut active = Vec::new();
        for l in from..self.model.layers.len() {
            let x = Some(self.part(b.x));
            if let Some(out) = self.saved(l).filter(|_| save != Save::Nothing) {
                self.be.copy(&CopyRows { src: x, out })?;
            }
            let treated = self.attention(l, self.place(l, save))?;
            if let Some(Between { x: out, .. }) = treated.at.kept {
                self.be.copy(&CopyRows { src: x, out })?;
            }
            self.mlp(l, treated.mlp, treated.at.kept)?;
            if self.routing(&self.model.layers[l]).is_some() {
                self.keep_scores(l)?;
                active.push(self.rows() - treated.skipped.rows.len);
            }
        }
        Ok(active)
    }

    /// Again from a layer on whose input was kept, with its sub-layer left out for every row.
    pub fn forward_without(&mut self, l: usize, target: Target) -> Result<()> {
        let input = self.saved(l).expect("its input was kept");
        self.be.copy(&CopyRows { src: Some(input), out: self.part(self.buffers().x) })?;
        match target {
            Target::Attn => self.mlp(l, self.all(), None)?,
            Target::Mlp => self.attention(l, self.shared()).map(drop)?,
            Target::Block => {}
        }
        self.layers(l + 1, Save::Nothing).map(drop)
    }

    /// The scores of a routed layer, where they are wanted; its router's logits are those that were computed last.
    fn keep_scores(&mut self, l: usize) -> Result<()> {
        if self.scores.is_none() {
            return Ok(());
        }
        let mut logits = vec![0.0; self.rows()];
        self.be.read_floats(self.plan.buffers.gate, &mut logits)?;
        let by_sequence = self.settings(&self.model.layers[l]).is_some_and(|s| s.granularity.level == Level::Sequence);
        let scores = self.scores.as_mut().expect("wanted");
        let mut rest = &logits[..];
        for sample in self.samples {
            let (own, behind) = rest.split_at(sample.inputs().len());
            rest = behind;
            match by_sequence {
                true => scores.extend(std::iter::repeat_n(sigmoid(mean(own)), own.len())),
                false => scores.extend(own.iter().map(|&logit| sigmoid(logit))),
            }
        }
        Ok(())
    }

    /// The loss of the answers behind the last layer, by answer; with `gradient`, `d_x` becomes that of the residual
    /// stream there.
    pub fn head(&mut self, settings: &StepSettings, gradient: bool) -> Result<Vec<f32>> {
        let (b, model) = (self.buffers(), self.model);
        let count: usize = self.samples.iter().map(|s| s.answers().count()).sum();
        let mut losses = vec![0.0; count];
        if gradient {
            self.be.copy(&CopyRows { src: None, out: self.part(b.d_x) })?;
        }
        let step = b.h2.rows;
        for (i, out) in losses.chunks_mut(step).enumerate() {
            let (start, n) = (i * step, out.len());
            let rows = b.answers.slice(start..start + n);
            let (h2, logits, d_h) = (b.h2.rows(0..n), b.logits.rows(0..n), b.d_h2.rows(0..n));
            self.norm(b.x, rows, model.norm, h2)?;
            self.be.logits(&Logits { h: h2, weight: model.head, out: logits })?;
            let against = match settings.goal {
                Goal::Tokens => Against::Tokens(b.targets.slice(start..start + n)),
                Goal::Dense => {
                    let other = b.other.rows(0..n);
                    self.be.logits(&Logits { h: b.dense.rows(start..start + n), weight: model.head, out: other })?;
                    Against::Distribution(other)
                }
            };
            let found = b.losses.rows(0..n);
            self.be.loss(&Loss { logits, against, scale: settings.loss_scale, losses: found })?;
            self.be.read_floats(found, out)?;
            if gradient {
                self.back(n, (logits, None), model.head, (d_h, None), false)?;
                self.norm_backward(b.x, rows, model.norm, d_h, None)?;
            }
        }
        Ok(losses)
    }

    /// Keeps the final norms of the answers: what the dense model's distributions are made from.
    pub fn keep_dense(&mut self) -> Result<()> {
        let b = self.buffers();
        let count: usize = self.samples.iter().map(|s| s.answers().count()).sum();
        self.norm(b.x, b.answers.slice(0..count), self.model.norm, b.dense)
    }

    /// `out[i] = RMSNorm(x[rows[i]])`
    fn norm(&mut self, x: Mat, rows: Ints, weight: Weight, out: Mat) -> Result<()> {
        let eps = self.model.config.norm_eps;
        self.be.norm_gate(&NormGate { x, rows: RowSet::exact(rows), weight, eps, out: Some(out), gate: None })
    }

    /// The norm in front of a layer, into `h`, and the logits of its router.
    fn input_norm(&mut self, l: usize) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        let router = self.routing(layer).and_then(|_| layer.router());
        self.be.norm_gate(&NormGate {
            x: b.x,
            rows: RowSet::exact(self.all()),
            weight: layer.input_norm,
            eps: self.model.config.norm_eps,
            out: Some(b.h),
            gate: router.map(|router| Gate { router, logits: b.gate }),
        })
    }

    /// x += m·Attn(h).
    fn attention(&mut self, l: usize, at: Place) -> Result<Treated> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        self.input_norm(l)?;
        let treated = self.route(l, at)?;
        let Treated { queries, keys, .. } = treated;
        self.project(l, at.q, queries.rows, keys)?;
        self.rope(l, at.kv, (at.q, layer.q_norm), queries.rows, keys, [b.k, b.v])?;
        self.attend(at, queries)?;
        let rows = RowSet::exact(queries.rows);
        self.be.project_add(&ProjectAdd { src: at.attn, weight: layer.o, bias: layer.o_bias, rows, x: b.x })?;
        Ok(treated)
    }

    /// Q, K and V of some rows.
    fn project(&mut self, l: usize, q: Mat, queries: Ints, keys: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        let (q_rows, kv_rows) = (RowSet::exact(queries), RowSet::exact(keys));
        let (weights, biases) = (layer.qkv, layer.qkv_bias);
        self.be.qkv(&Qkv { h: b.h, base: 0, q_rows, kv_rows, weights, biases, q, k: b.k, v: b.v })
    }

    /// Turns the heads of `q`, and appends K and V to the layer `to` of the cache.
    fn rope(
        &mut self,
        l: usize,
        to: usize,
        (q, q_norm): (Mat, Option<Weight>),
        rows: Ints,
        keys: Ints,
        kv: [Mat; 2],
    ) -> Result<()> {
        let (b, c) = (self.buffers(), &self.model.config);
        self.be.rope_append(&RopeAppend {
            layer: to,
            head_dim: c.head_dim,
            angles: b.angles,
            pos: b.pos,
            row_slot: b.row_slot,
            q_rows: RowSet::exact(rows),
            kv_rows: RowSet::exact(keys),
            kv_row: b.kv_row.slice(0..keys.len),
            q,
            k: kv[0],
            v: kv[1],
            q_norm,
            k_norm: self.model.layers[l].k_norm,
            eps: c.norm_eps,
        })
    }

    fn scale(&self) -> f32 {
        (self.model.config.head_dim as f32).sqrt().recip()
    }

    fn attend(&mut self, at: Place, Queries { rows, first, end }: Queries) -> Result<()> {
        let (b, c) = (self.buffers(), &self.model.config);
        self.be.attend(&Attend {
            layer: at.kv,
            head_dim: c.head_dim,
            scale: self.scale(),
            rows: RowSet::exact(rows),
            row_slot: b.row_slot,
            first,
            end,
            q: at.q,
            out: at.attn,
            kv_heads: c.kv_heads,
            single: false,
        })
    }

    /// x += MLP(RMSNorm(x)) for some rows.
    fn mlp(&mut self, l: usize, rows: Ints, kept: Option<Between>) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        for (start, part) in chunks(rows, b.h2.rows) {
            match kept {
                None => self.activations(l, part)?,
                Some(kept) => {
                    self.norm(b.x, part, layer.post_norm, b.h2)?;
                    let [gate, up] = [kept.gate, kept.up].map(|m| m.rows(start..start + part.len));
                    let (of, out) = (self.gate_up(l), b.act.rows(0..part.len));
                    self.be.swiglu_kept(&SwiGluKept { of, gate, up, out })?;
                }
            }
            let rows = RowSet::exact(part);
            self.be.project_add(&ProjectAdd { src: b.act, weight: layer.down, bias: layer.down_bias, rows, x: b.x })?;
        }
        Ok(())
    }

    /// The projections of the MLP of the rows whose norms `h2` holds.
    fn gate_up(&self, l: usize) -> GateUp {
        let layer = &self.model.layers[l];
        GateUp {
            h: self.buffers().h2,
            gate: layer.gate,
            up: layer.up,
            gate_bias: layer.gate_bias,
            up_bias: layer.up_bias,
        }
    }

    /// What the last projection of the MLP of some rows takes, into `act`.
    fn activations(&mut self, l: usize, rows: Ints) -> Result<()> {
        let b = self.buffers();
        self.norm(b.x, rows, self.model.layers[l].post_norm, b.h2)?;
        let GateUp { h, gate, up, gate_bias, up_bias } = self.gate_up(l);
        self.be.swiglu(&SwiGlu { h, rows: RowSet::exact(rows), gate, up, gate_bias, up_bias, out: b.act })
    }

    /// Lets a layer decide, and lists which rows do what.
    fn route(&mut self, l: usize, at: Place) -> Result<Treated> {
        let (b, n, sequences) = (self.buffers(), self.rows(), self.samples.len());
        let layer = &self.model.layers[l];
        let decide = self.routing(layer).map_or(Decide::All, |r| r.decide(l, Phase::Prefill));
        // Sequences do not see each other, so it does not matter what a skipped one writes.
        let apart = self.settings(layer).is_some_and(|s| {
            s.granularity.level == Level::Token && s.granularity.target != Target::Mlp && s.keys == Keys::Active
        });
        for slot in 0..sequences {
            self.be.kv_len(at.kv, slot, 0)?;
        }
        self.be.write_ints(b.decided, &vec![UNDECIDED; sequences])?;
        self.be.route(&Route {
            layer: at.kv,
            decide,
            queries: Take::All,
            keys: if apart { Take::Active } else { Take::All },
            window: layer.window,
            logits: b.gate.rows(0..n),
            pos: b.pos.slice(0..n),
            seq_start: b.seq_start.slice(0..sequences + 1),
            slots: b.slots.slice(0..sequences),
            decided: b.decided.slice(0..sequences),
            cuts: b.cuts,
            active: b.active,
            active_at: b.active_at,
            first: b.first,
            end: b.end,
            kv_row: b.kv_row,
        })?;
        let everyone = Queries { rows: self.all(), first: b.first.slice(0..n), end: b.end.slice(0..n) };
        let nobody =
            Queries { rows: b.skipped.slice(0..0), first: b.skipped_first.slice(0..0), end: b.skipped_end.slice(0..0) };
        match self.settings(layer) {
            None => {
                let starts: Vec<u32> = self.starts().collect();
                self.be.write_ints(b.kv_start, &starts)?;
                Ok(Treated { at, queries: everyone, keys: self.all(), mlp: self.all(), skipped: nobody, apart })
            }
            Some(settings) => {
                let (active, skipped) = self.split(everyone, apart)?;
                let [queries, mlp] = match settings.granularity.target {
                    Target::Attn => [active, everyone],
                    Target::Mlp => [everyone, active],
                    Target::Block => [active, active],
                };
                let keys = if apart { active.rows } else { self.all() };
                Ok(Treated { at, queries, keys, mlp: mlp.rows, skipped, apart })
            }
        }
    }

    /// The first row of each sample, and the end.
    fn starts(&self) -> impl Iterator<Item = u32> {
        let ends = self.samples.iter().scan(0, |end, s| {
            *end += s.inputs().len() as u32;
            Some(*end)
        });
        std::iter::once(0).chain(ends)
    }

    /// Active and skipped rows with their ranges, from what `Route` wrote for all. With `apart` only active rows have
    /// K/V.
    fn split(&mut self, all: Queries, apart: bool) -> Result<(Queries, Queries)> {
        let (b, n) = (self.buffers(), all.rows.len);
        let Lists { active, first, end, scratch } = &mut *self.lists;
        scratch.resize(1, 0);
        self.be.read_ints(b.active_at, scratch)?;
        active.resize(scratch[0] as usize, 0);
        first.resize(n, 0);
        end.resize(n, 0);
        self.be.read_ints(b.active.slice(0..active.len()), active)?;
        self.be.read_ints(all.first, first)?;
        self.be.read_ints(all.end, end)?;
        let mut of = active.iter().peekable();
        let skipped: Vec<u32> = (0..n as u32).filter(|row| of.next_if_eq(&row).is_none()).collect();
        let mut write = |to: Ints, values: &mut dyn Iterator<Item = u32>| {
            scratch.clear();
            scratch.extend(values);
            self.be.write_ints(to, scratch).map(|()| to.slice(0..scratch.len()))
        };
        let mut ranges = |rows: &[u32], at: [Ints; 3]| -> Result<Queries> {
            Ok(Queries {
                rows: write(at[0], &mut rows.iter().copied())?,
                first: write(at[1], &mut rows.iter().map(|&row| first[row as usize]))?,
                end: write(at[2], &mut rows.iter().map(|&row| end[row as usize]))?,
            })
        };
        let queries = ranges(active, [b.active, b.active_first, b.active_end])?;
        let skipped = ranges(&skipped, [b.skipped, b.skipped_first, b.skipped_end])?;
        let mut row = 0;
        let starts = std::iter::once(0).chain(self.samples.iter().map(|sample| {
            row += sample.inputs().len() as u32;
            if apart { active.partition_point(|&a| a < row) as u32 } else { row }
        }));
        let starts: Vec<u32> = starts.collect();
        self.be.write_ints(b.kv_start, &starts)?;
        Ok((queries, skipped))
    }
}

/// Lists of at most `n` rows, and where each begins.
fn chunks(rows: Ints, n: usize) -> impl Iterator<Item = (usize, Ints)> {
    (0..rows.len.div_ceil(n)).map(move |i| (i * n, rows.slice(i * n..((i + 1) * n).min(rows.len))))
}
