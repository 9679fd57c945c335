//! The memory of a training step, computed and checked before anything is allocated.

use crate::backend::{Ints, KvLayout, Largest, Mat, PAGE, TrainingBackend};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::memory::{Budget, Placer, Size, allowed, too_large};
use crate::tensor::DType;

/// How large a step may become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepLimits {
    /// Rows of a step, all samples together; also the longest sample.
    pub rows: usize,
    /// Samples of a step.
    pub samples: usize,
    /// Rows that pass an MLP, or the head, at a time.
    pub chunk: usize,
    /// Keeps nothing of a layer but its input, and computes it again on the way back.
    pub recompute: bool,
    /// What weights, buffers and K/V may take; None: what is free, and half of what a step leaves of it for activations.
    pub memory: Option<Budget>,
}

/// The buffers of a training step, with R = `StepLimits::rows`, C = rows of a chunk, S = samples. Everything is f32.
///
/// One layer is at work at a time: what attention makes is kept for the whole step, what an MLP makes for a chunk. Of
/// the other layers nothing is kept but the inputs of those from the first routed one on, and, as far as memory allows, what
/// the way back needs besides: see [`Kept`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepBuffers {
    /// `[R, hidden]`: the residual stream, and its gradient
    pub x: Mat,
    pub d_x: Mat,
    /// `[saved layers · R, hidden]`
    pub saved: Mat,
    pub kept: Kept,
    /// `[R, hidden]`: the input norm of the layer at work, and its gradient
    pub h: Mat,
    pub d_h: Mat,
    /// `[R, head_dim]`
    pub angles: Mat,
    /// `[R, 1]`: logits of the router at work, and the gradients of its mask
    pub gate: Mat,
    pub d_mask: Mat,
    /// `[R, heads·head_dim]`
    pub q: Mat,
    pub d_q: Mat,
    pub attn: Mat,
    pub d_attn: Mat,
    /// `[R, kv_heads·head_dim]`
    pub k: Mat,
    pub v: Mat,
    pub d_k: Mat,
    pub d_v: Mat,
    /// `[C, hidden]`: the norm in front of an MLP or the head, and its gradient
    pub h2: Mat,
    pub d_h2: Mat,
    /// `[C, intermediate]`
    pub act: Mat,
    pub d_gate: Mat,
    pub d_up: Mat,
    /// `[C, vocab]`
    pub logits: Mat,
    /// `[C, vocab]` and `[R, hidden]`: logits of the dense model, and the norms they are from; empty for the loss of
    /// tokens
    pub other: Mat,
    pub dense: Mat,
    /// `[C, 1]`
    pub losses: Mat,
    /// `[routed layers, hidden]`: the gradients of the routers, of all steps since they were read
    pub d_routers: Mat,
    /// `[R]`
    pub ids: Ints,
    pub pos: Ints,
    pub row_slot: Ints,
    pub all: Ints,
    /// `[S + 1]`, `[S]`, `[S]`
    pub seq_start: Ints,
    pub slots: Ints,
    pub decided: Ints,
    /// `[1]` each
    pub cuts: Ints,
    pub active_at: Ints,
    /// `[R]`, from `Route`
    pub active: Ints,
    pub first: Ints,
    pub end: Ints,
    pub kv_row: Ints,
    /// `[R]`: ranges of the active rows, the skipped rows and their ranges
    pub active_first: Ints,
    pub active_end: Ints,
    pub skipped: Ints,
    pub skipped_first: Ints,
    pub skipped_end: Ints,
    /// `[S + 1]`
    pub kv_start: Ints,
    /// `[R]`: rows whose next token counts, and these tokens
    pub answers: Ints,
    pub targets: Ints,
}

/// What the last layers keep besides their inputs and K/V, n of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    /// `[n · R, hidden]`: the residual stream behind attention
    pub x: Mat,
    /// `[n · R, heads·head_dim]`: queries, and what attention gave them
    pub q: Mat,
    pub attn: Mat,
    /// `[n · R, intermediate]`: the projections of the MLP, then their gradients
    pub gate: Mat,
    pub up: Mat,
}

/// What a training run takes, in bytes, and where its buffers stand.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Options, training_backend};
/// use mindskip::tune::plan::{StepLimits, StepPlan};
/// use mindskip::tune::{Goal, Tuner};
///
/// let bundle = Bundle::embedded()?;
/// let (routers, backend) = (bundle.routers.expect("it comes with some"), training_backend(&Options::default())?);
/// let limits = StepLimits { rows: 100, samples: 2, chunk: 64, recompute: true, memory: None };
/// let tuner = Tuner::new(bundle.config, &bundle.weights, routers, Goal::Tokens, limits, backend)?;
/// let plan: &StepPlan = tuner.plan();
/// assert_eq!(plan.inputs(), 5 * 100 * 128 * 4, "layers 3 to 7, f32");
/// assert_eq!(plan.total(), plan.weights + plan.arena + plan.ints + plan.workspace + plan.kv_bytes());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StepPlan {
    pub limits: StepLimits,
    /// As the backend holds them.
    pub weights: u64,
    /// The activation and integer arenas.
    pub arena: u64,
    pub ints: u64,
    /// What the backend needs beside its buffers.
    pub workspace: u64,
    /// K/V of the layer at work, and of each that keeps its activations.
    pub kv: KvLayout,
    /// The first layer whose input is kept.
    pub first: usize,
    /// How many layers, the last ones, keep their activations.
    pub kept: usize,
    pub(crate) buffers: StepBuffers,
}

impl StepPlan {
    /// For a model whose lowest routed layer is `first` of `routed`; `distill` when the dense model's distribution is
    /// the goal. Errors: Argument for limits of nothing; Memory when it does not fit, with the sizes and the knob;
    /// Unsupported for shapes that the backend does not take.
    pub(crate) fn new(
        config: &Config,
        first: usize,
        routed: usize,
        distill: bool,
        weights: u64,
        limits: StepLimits,
        backend: &dyn TrainingBackend,
    ) -> Result<Self> {
        let StepLimits { rows, samples, chunk, recompute, memory } = limits;
        for (name, value) in [("rows", rows), ("samples", samples), ("chunk", chunk)] {
            if !(1..1 << 31).contains(&value) {
                return Err(Error::new(Kind::Argument, format!("{name} of a step: {value}")).action("give 1 or more"));
            }
        }
        let largest = Largest {
            rows,
            chunk: chunk.min(rows),
            hidden: config.hidden,
            intermediate: config.intermediate,
            heads: config.heads,
            vocab: config.vocab,
        };
        let with = |kept: usize| -> Result<StepPlan> {
            let kv = KvLayout {
                layers: 1 + kept,
                slots: samples,
                // A sample ends within a page.
                pages: (1 + kept) * (rows / PAGE + samples),
                pages_per_seq: rows.div_ceil(PAGE),
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                dtype: DType::F32,
            };
            let mut at = Placer::default();
            let buffers =
                StepBuffers::place(config, first, routed, kept, distill, limits, &mut at).ok_or_else(too_large)?;
            let (arena, ints) = (at.bytes as u64, (at.ints * 4) as u64);
            let workspace = backend.training_workspace(&largest, &kv)? as u64;
            Ok(StepPlan { limits, weights, arena, ints, workspace, kv, first, kept, buffers })
        };
        let plan = with(0)?;
        let available = allowed(memory, backend.info().free_memory);
        match available.filter(|&n| plan.total() > n) {
            None => {
                let spare = available.map_or(0, |n| n - plan.total());
                let most = plan.total() + if memory.is_some() { spare } else { spare / 2 };
                let layers = if recompute { 0 } else { config.layers - first };
                let larger = (1..=layers).rev().find_map(|kept| with(kept).ok().filter(|plan| plan.total() <= most));
                Ok(larger.unwrap_or(plan))
            }
            Some(available) => Err(Error::new(
                Kind::Memory,
                format!(
                    "{} are needed, {} may be used: {} weights, {} for a step of {rows} tokens, {} of them inputs of \
                     the layers {first} to {}",
                    Size(plan.total()),
                    Size(available),
                    Size(weights),
                    Size(plan.total() - weights),
                    Size(plan.inputs()),
                    config.layers - 1,
                ),
            )
            .action("raise --memory, or lower --max-length")),
        }
    }

    /// Bytes of the K/V.
    pub fn kv_bytes(&self) -> u64 {
        self.kv.pages as u64 * self.kv.page_bytes() as u64
    }

    /// Bytes of the layers' inputs that a step keeps, those from `first` on; a part of `arena`.
    pub fn inputs(&self) -> u64 {
        self.buffers.saved.bytes() as u64
    }

    /// Bytes of everything together.
    pub fn total(&self) -> u64 {
        let parts = [self.arena, self.ints, self.workspace, self.kv_bytes()];
        parts.into_iter().fold(self.weights, u64::saturating_add)
    }
}

impl StepBuffers {
    /// Sizes and places the buffers; None when a size overflows.
    fn place(
        c: &Config,
        first: usize,
        routed: usize,
        kept: usize,
        distill: bool,
        limits: StepLimits,
        at: &mut Placer,
    ) -> Option<Self> {
        let StepLimits { rows, samples, chunk, .. } = limits;
        let chunk = chunk.min(rows);
        let distilled = |n: usize| if distill { n } else { 0 };
        let mut mat = |rows: usize, cols: usize| at.mat(rows, cols, DType::F32);
        let (x, d_x) = (mat(rows, c.hidden)?, mat(rows, c.hidden)?);
        let saved = mat((c.layers - first).checked_mul(rows)?, c.hidden)?;
        let all = kept.checked_mul(rows)?;
        let kept = Kept {
            x: mat(all, c.hidden)?,
            q: mat(all, c.q_rows())?,
            attn: mat(all, c.q_rows())?,
            gate: mat(all, c.intermediate)?,
            up: mat(all, c.intermediate)?,
        };
        let (h, d_h) = (mat(rows, c.hidden)?, mat(rows, c.hidden)?);
        let angles = mat(rows, c.head_dim)?;
        let (gate, d_mask) = (mat(rows, 1)?, mat(rows, 1)?);
        let (q, d_q) = (mat(rows, c.q_rows())?, mat(rows, c.q_rows())?);
        let (attn, d_attn) = (mat(rows, c.q_rows())?, mat(rows, c.q_rows())?);
        let (k, v) = (mat(rows, c.kv_rows())?, mat(rows, c.kv_rows())?);
        let (d_k, d_v) = (mat(rows, c.kv_rows())?, mat(rows, c.kv_rows())?);
        let (h2, d_h2) = (mat(chunk, c.hidden)?, mat(chunk, c.hidden)?);
        let (act, d_gate, d_up) =
            (mat(chunk, c.intermediate)?, mat(chunk, c.intermediate)?, mat(chunk, c.intermediate)?);
        let (logits, other) = (mat(chunk, c.vocab)?, mat(distilled(chunk), c.vocab)?);
        let (dense, losses) = (mat(distilled(rows), c.hidden)?, mat(chunk, 1)?);
        let d_routers = mat(routed, c.hidden)?;
        let mut ints = |len: usize| at.ints(len);
        Some(StepBuffers {
            x,
            d_x,
            saved,
            kept,
            h,
            d_h,
            angles,
            gate,
            d_mask,
            q,
            d_q,
            attn,
            d_attn,
            k,
            v,
            d_k,
            d_v,
            h2,
            d_h2,
            act,
            d_gate,
            d_up,
            logits,
            other,
            dense,
            losses,
            d_routers,
            ids: ints(rows)?,
            pos: ints(rows)?,
            row_slot: ints(rows)?,
            all: ints(rows)?,
            seq_start: ints(samples.checked_add(1)?)?,
            slots: ints(samples)?,
            decided: ints(samples)?,
            cuts: ints(1)?,
            active_at: ints(1)?,
            active: ints(rows)?,
            first: ints(rows)?,
            end: ints(rows)?,
            kv_row: ints(rows)?,
            active_first: ints(rows)?,
            active_end: ints(rows)?,
            skipped: ints(rows)?,
            skipped_first: ints(rows)?,
            skipped_end: ints(rows)?,
            kv_start: ints(samples + 1)?,
            answers: ints(rows)?,
            targets: ints(rows)?,
        })
    }
}
