//! One step of Router-Tuning over a few packed samples: forward with the hard mask, then backward, layer by layer from
//! the top, down to the lowest routed layer.
//!
//! Straight through the mask, dL/dscore = dL/dm, and dL/dm_t = ⟨dL/dx'_t, what the sub-layer gave or would have given⟩.
//! A sub-layer ends in a frozen projection, so this product is taken in front of it: ⟨dL/dx'_t·W, its input⟩. Nothing
//! flows back through the sub-layer of a skipped row (its m is 0), so for [`Ste::Full`] skipped rows only go forward
//! once more.

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

/// How a layer treats the rows of a step.
#[derive(Debug, Clone, Copy)]
struct Treated {
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
        for (slot, sample) in samples.iter().enumerate() {
            let pages: Vec<u32> = (page..).take(sample.inputs().len().div_ceil(PAGE)).collect();
            page += pages.len() as u32;
            be.kv_pages(0, slot, 0, &pages)?;
        }
        be.rope_angles(&RopeAngles { pos: b.pos.slice(0..rows as usize), inv_freq: self.model.inv_freq, out: b.angles })
    }

    /// All layers, with the hard mask; the inputs of the layers from the first routed one on are kept when `save`.
    /// Returns the active rows of each routed layer.
    pub fn forward(&mut self, save: bool) -> Result<Vec<usize>> {
        let b = self.buffers();
        let ids = b.ids.slice(0..self.rows());
        self.be.embed(&Embed { table: self.model.embed, ids, out: b.x })?;
        self.layers(0, save)
    }

    /// The layers from one on; see [`forward`](Self::forward).
    fn layers(&mut self, from: usize, save: bool) -> Result<Vec<usize>> {
        let b = self.buffers();
        let mut active = Vec::new();
        for l in from..self.model.layers.len() {
            if let Some(out) = self.saved(l).filter(|_| save) {
                self.be.copy(&CopyRows { src: Some(self.part(b.x)), out })?;
            }
            let treated = self.attention(l)?;
            self.mlp(l, treated.mlp)?;
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
            Target::Attn => self.mlp(l, self.all())?,
            Target::Mlp => self.attention(l).map(drop)?,
            Target::Block => {}
        }
        self.layers(l + 1, false).map(drop)
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

    /// From the gradient behind the last layer to those of the routers.
    pub fn backward(&mut self, settings: &StepSettings) -> Result<()> {
        for l in (self.plan.first..self.model.layers.len()).rev() {
            self.layer_backward(l, settings)?;
        }
        Ok(())
    }

    // ---- forward ----

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
    fn attention(&mut self, l: usize) -> Result<Treated> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        self.input_norm(l)?;
        let treated = self.route(l)?;
        self.project(l, treated.queries.rows, treated.keys)?;
        self.rope(l, treated.queries.rows, treated.keys)?;
        self.attend(treated.queries)?;
        let rows = RowSet::exact(treated.queries.rows);
        self.be.project_add(&ProjectAdd { src: b.attn, weight: layer.o, bias: layer.o_bias, rows, x: b.x })?;
        Ok(treated)
    }

    /// Q, K and V of some rows.
    fn project(&mut self, l: usize, queries: Ints, keys: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        let (q_rows, kv_rows) = (RowSet::exact(queries), RowSet::exact(keys));
        let (weights, biases) = (layer.qkv, layer.qkv_bias);
        self.be.qkv(&Qkv { h: b.h, base: 0, q_rows, kv_rows, weights, biases, q: b.q, k: b.k, v: b.v })
    }

    fn rope(&mut self, l: usize, queries: Ints, keys: Ints) -> Result<()> {
        let b = self.buffers();
        self.rope_of(l, b.q, self.model.layers[l].q_norm, queries, keys, [b.k, b.v])
    }

    /// Turns the heads of `q`, and appends K and V.
    fn rope_of(
        &mut self,
        l: usize,
        q: Mat,
        q_norm: Option<Weight>,
        rows: Ints,
        keys: Ints,
        kv: [Mat; 2],
    ) -> Result<()> {
        let (b, c) = (self.buffers(), &self.model.config);
        self.be.rope_append(&RopeAppend {
            layer: 0,
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

    fn attend(&mut self, Queries { rows, first, end }: Queries) -> Result<()> {
        let (b, c) = (self.buffers(), &self.model.config);
        self.be.attend(&Attend {
            layer: 0,
            head_dim: c.head_dim,
            scale: self.scale(),
            rows: RowSet::exact(rows),
            row_slot: b.row_slot,
            first,
            end,
            q: b.q,
            out: b.attn,
            kv_heads: c.kv_heads,
            single: false,
        })
    }

    /// x += MLP(RMSNorm(x)) for some rows.
    fn mlp(&mut self, l: usize, rows: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        for part in chunks(rows, b.h2.rows) {
            self.activations(l, part)?;
            let rows = RowSet::exact(part);
            self.be.project_add(&ProjectAdd { src: b.act, weight: layer.down, bias: layer.down_bias, rows, x: b.x })?;
        }
        Ok(())
    }

    /// What the last projection of the MLP of some rows takes, into `act`.
    fn activations(&mut self, l: usize, rows: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        self.norm(b.x, rows, layer.post_norm, b.h2)?;
        self.be.swiglu(&SwiGlu {
            h: b.h2,
            rows: RowSet::exact(rows),
            gate: layer.gate,
            up: layer.up,
            gate_bias: layer.gate_bias,
            up_bias: layer.up_bias,
            out: b.act,
        })
    }

    /// Lets a layer decide, and lists which rows do what.
    fn route(&mut self, l: usize) -> Result<Treated> {
        let (b, n, sequences) = (self.buffers(), self.rows(), self.samples.len());
        let layer = &self.model.layers[l];
        let decide = self.routing(layer).map_or(Decide::All, |r| r.decide(l, Phase::Prefill));
        // Sequences do not see each other, so it does not matter what a skipped one writes.
        let apart = self.settings(layer).is_some_and(|s| {
            s.granularity.level == Level::Token && s.granularity.target != Target::Mlp && s.keys == Keys::Active
        });
        for slot in 0..sequences {
            self.be.kv_len(0, slot, 0)?;
        }
        self.be.write_ints(b.decided, &vec![UNDECIDED; sequences])?;
        self.be.route(&Route {
            layer: 0,
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
                Ok(Treated { queries: everyone, keys: self.all(), mlp: self.all(), skipped: nobody, apart })
            }
            Some(settings) => {
                let (active, skipped) = self.split(everyone, apart)?;
                let [queries, mlp] = match settings.granularity.target {
                    Target::Attn => [active, everyone],
                    Target::Mlp => [everyone, active],
                    Target::Block => [active, active],
                };
                let keys = if apart { active.rows } else { self.all() };
                Ok(Treated { queries, keys, mlp: mlp.rows, skipped, apart })
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

    // ---- backward ----

    /// Computes a layer again from its input, and turns the gradient behind it into the one before it and, where it is
    /// routed, into that of its router. The lowest layer passes on nothing.
    fn layer_backward(&mut self, l: usize, settings: &StepSettings) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        let (lowest, input) = (l == self.plan.first, self.saved(l).expect("its input was kept"));
        let target = self.settings(layer).map(|s| s.granularity.target);
        self.be.copy(&CopyRows { src: Some(input), out: self.part(b.x) })?;
        let treated = self.attention(l)?;
        if target.is_some() {
            self.be.copy(&CopyRows { src: None, out: self.part(b.d_mask) })?;
        }

        if target == Some(Target::Block) {
            self.attention_dots(l, treated.queries.rows)?;
        }
        match target {
            Some(Target::Mlp | Target::Block) if lowest => self.mlp_dots(l, treated.mlp)?,
            Some(Target::Mlp | Target::Block) => self.mlp_backward(l, treated.mlp, true)?,
            Some(Target::Attn) | None => self.mlp_backward(l, treated.mlp, false)?,
        }
        if target == Some(Target::Attn) {
            self.attention_dots(l, treated.queries.rows)?;
        }
        if !lowest {
            if target != Some(Target::Attn) {
                self.attention_gradient(l, treated.queries.rows)?;
            }
            self.attention_backward(l, &treated)?;
        }
        if let Some(target) = target {
            if settings.ste == Ste::Full {
                self.skipped_dots(l, target, &treated)?;
            }
            self.gate_backward(l, &treated, settings)?;
        }
        if !lowest {
            let gate = target.and(layer.router()).map(|router| (router, b.d_mask));
            self.norm_backward(input, self.all(), layer.input_norm, b.d_h, gate)?;
        }
        Ok(())
    }

    fn back(
        &mut self,
        rows: usize,
        (d_out, from): (Mat, Option<Ints>),
        weight: Weight,
        (d_in, to): (Mat, Option<Ints>),
        add: bool,
    ) -> Result<()> {
        self.be.back_project(&BackProject { rows, d_out, from, weight, d_in, to, add })
    }

    fn norm_backward(
        &mut self,
        x: Mat,
        rows: Ints,
        weight: Weight,
        d_h: Mat,
        gate: Option<(Weight, Mat)>,
    ) -> Result<()> {
        let (eps, d_x) = (self.model.config.norm_eps, self.buffers().d_x);
        self.be.norm_backward(&NormBackward { x, rows, weight, eps, d_h, gate, d_x })
    }

    /// The gradient of what attention gave some rows, into `d_attn`.
    fn attention_gradient(&mut self, l: usize, rows: Ints) -> Result<()> {
        let b = self.buffers();
        self.back(rows.len, (b.d_x, Some(rows)), self.model.layers[l].o, (b.d_attn, None), false)
    }

    /// The gradient of the mask in front of the attention of some rows, which `attn` holds; `d_attn` is left behind.
    fn attention_dots(&mut self, l: usize, rows: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        self.attention_gradient(l, rows)?;
        let bias = layer.o_bias.map(|bias| (b.d_x, bias));
        let (a, b, out) = (b.d_attn, b.attn, b.d_mask);
        self.be.row_dots(&RowDots { a: a.rows(0..rows.len), b: b.rows(0..rows.len), rows, bias, out })
    }

    /// The same for the MLP of some rows.
    fn mlp_dots(&mut self, l: usize, rows: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        for part in chunks(rows, b.h2.rows) {
            self.activations(l, part)?;
            self.back(part.len, (b.d_x, Some(part)), layer.down, (b.d_gate, None), false)?;
            let bias = layer.down_bias.map(|bias| (b.d_x, bias));
            let [d_act, act] = [b.d_gate, b.act].map(|m| m.rows(0..part.len));
            self.be.row_dots(&RowDots { a: d_act, b: act, rows: part, bias, out: b.d_mask })?;
        }
        Ok(())
    }

    /// Adds to `d_x` what comes through the MLP of some rows; `x` is what it read. With `dots`, also the gradient of
    /// the mask in front of it.
    fn mlp_backward(&mut self, l: usize, rows: Ints, dots: bool) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        for part in chunks(rows, b.h2.rows) {
            let n = part.len;
            let [h, d_h, d_act, d_gate, d_up] = [b.h2, b.d_h2, b.act, b.d_gate, b.d_up].map(|m| m.rows(0..n));
            self.norm(b.x, part, layer.post_norm, h)?;
            self.back(n, (b.d_x, Some(part)), layer.down, (d_act, None), false)?;
            if let Some(bias) = layer.down_bias.filter(|_| dots) {
                // Of no columns: only the bias.
                let none = Mat { cols: 0, ..d_act };
                self.be.row_dots(&RowDots {
                    a: none,
                    b: none,
                    rows: part,
                    bias: Some((b.d_x, bias)),
                    out: b.d_mask,
                })?;
            }
            self.be.swiglu_backward(&SwiGluBackward {
                h,
                gate: layer.gate,
                up: layer.up,
                gate_bias: layer.gate_bias,
                up_bias: layer.up_bias,
                d_act,
                d_gate,
                d_up,
                dots: dots.then_some((part, b.d_mask)),
            })?;
            self.back(n, (d_gate, None), layer.gate, (d_h, None), false)?;
            self.back(n, (d_up, None), layer.up, (d_h, None), true)?;
            self.norm_backward(b.x, part, layer.post_norm, d_h, None)?;
        }
        Ok(())
    }

    /// From `d_attn` to the gradient of what the layer's attention read, in `d_h`.
    fn attention_backward(&mut self, l: usize, treated: &Treated) -> Result<()> {
        let (b, layer, c) = (self.buffers(), &self.model.layers[l], &self.model.config);
        let (Queries { rows, first, end }, keys) = (treated.queries, treated.keys);
        let [d_k, d_v] = [b.d_k, b.d_v].map(|m| m.rows(0..keys.len));
        self.be.attend_backward(&AttendBackward {
            layer: 0,
            head_dim: c.head_dim,
            kv_heads: c.kv_heads,
            scale: self.scale(),
            rows,
            row_slot: b.row_slot,
            first,
            end,
            kv_start: b.kv_start.slice(0..self.samples.len() + 1),
            q: b.q,
            out: b.attn,
            d_out: b.d_attn,
            d_q: b.d_q.rows(0..rows.len),
            d_k,
            d_v,
        })?;
        if layer.q_norm.is_some() {
            self.project(l, rows, keys)?; // as they were before their norms
        }
        for (d, rows, norm, src) in [(b.d_q, rows, layer.q_norm, b.q), (d_k, keys, layer.k_norm, b.k)] {
            let norm = norm.map(|weight| HeadNorm { weight, eps: c.norm_eps, src: src.rows(0..rows.len) });
            let d = d.rows(0..rows.len);
            self.be.rope_backward(&RopeBackward { head_dim: c.head_dim, angles: b.angles, rows, d, norm })?;
        }
        self.be.copy(&CopyRows { src: None, out: self.part(b.d_h) })?;
        for (d, rows, weight) in [(b.d_q, rows, 0), (d_k, keys, 1), (d_v, keys, 2)] {
            self.back(rows.len, (d, None), layer.qkv[weight], (b.d_h, Some(rows)), true)?;
        }
        Ok(())
    }

    /// The gradients of the masks of the rows that were skipped: what their sub-layers would have given.
    fn skipped_dots(&mut self, l: usize, target: Target, treated: &Treated) -> Result<()> {
        let (b, layer, c) = (self.buffers(), &self.model.layers[l], &self.model.config);
        let Queries { rows, first, end } = treated.skipped;
        if rows.len == 0 {
            return Ok(());
        }
        if target != Target::Mlp {
            let (nobody, idle) = (rows.slice(0..0), [b.d_k, b.d_v]);
            self.project(l, rows, if treated.apart { rows } else { nobody })?;
            self.rope_of(l, b.q, layer.q_norm, rows, nobody, idle)?;
            if treated.apart {
                self.rope_of(l, b.k, layer.k_norm, rows, nobody, idle)?;
                self.be.attend_apart(&AttendApart {
                    layer: 0,
                    head_dim: c.head_dim,
                    kv_heads: c.kv_heads,
                    scale: self.scale(),
                    rows,
                    row_slot: b.row_slot,
                    first,
                    end,
                    q: b.q,
                    k: b.k,
                    v: b.v,
                    out: b.attn,
                })?;
            } else {
                self.attend(treated.skipped)?;
            }
            self.attention_dots(l, rows)?;
        }
        if target == Target::Block {
            let rows = RowSet::exact(rows);
            self.be.project_add(&ProjectAdd { src: b.attn, weight: layer.o, bias: layer.o_bias, rows, x: b.x })?;
        }
        if target != Target::Attn {
            self.mlp_dots(l, rows)?;
        }
        Ok(())
    }

    /// From the gradients of the masks to those of the router and of its logits, which take their place.
    fn gate_backward(&mut self, l: usize, treated: &Treated, settings: &StepSettings) -> Result<()> {
        let (b, n, layer) = (self.buffers(), self.rows(), &self.model.layers[l]);
        let (Some(routed), Some(of)) = (layer.routed, self.settings(layer)) else { return Ok(()) };
        let active = n - treated.skipped.rows.len;
        let above = active as f32 > settings.target * n as f32;
        let sequences = b.seq_start.slice(0..self.samples.len() + 1);
        self.be.gate_backward(&GateBackward {
            sequences: (of.granularity.level == Level::Sequence).then_some(sequences),
            logits: b.gate,
            d_mask: self.part(b.d_mask),
            penalty: if above { settings.lambda * settings.capacity_scale } else { 0.0 },
            h: b.h,
            d_router: b.d_routers.rows(routed.nth..routed.nth + 1),
        })
    }
}

/// Lists of at most `n` rows.
fn chunks(rows: Ints, n: usize) -> impl Iterator<Item = Ints> {
    (0..rows.len.div_ceil(n)).map(move |i| rows.slice(i * n..((i + 1) * n).min(rows.len)))
}
