//! The ops: one argument struct each, with its shape check and its cost. [`ops!`] makes the trait, the list that tests and
//! benches iterate over, and the boxed form from the same lines.
//!
//! What holds for all of them, and what `twin` tests:
//! - Buffers of an op do not overlap. An op writes what its fields say and nothing else. Rows beyond the count of a
//!   [`RowSet`], and rows that it does not list, are neither read nor written; its index is not read beyond the count.
//! - Sums accumulate in f32 or wider; a result is rounded once, to the dtype of its buffer.
//! - A NaN or an infinity in a source row shows in that row's outputs and in those of no other row; in K or V it shows in
//!   the queries that see it.

use super::{Cost, Ints, Mat, RowSet, Weight};
use crate::error::{Result, check_range, ensure};
use crate::tensor::DType;

macro_rules! ops {
    ($($(#[$doc:meta])* $method:ident($args:ident)),+ $(,)?) => {
        /// The fused ops that a backend implements.
        pub trait Ops {
            $($(#[$doc])* fn $method(&mut self, args: &$args) -> Result<()>;)+
        }

        /// The name of an op.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum OpKind { $(#[allow(missing_docs)] $args),+ }

        impl OpKind {
            pub const ALL: &[OpKind] = &[$(OpKind::$args),+];
            pub const COUNT: usize = OpKind::ALL.len();

            pub fn name(self) -> &'static str {
                match self { $(OpKind::$args => stringify!($method)),+ }
            }
        }

        /// An op with its arguments.
        #[derive(Debug, Clone, Copy)]
        pub enum Op { $(#[allow(missing_docs)] $args($args)),+ }

        impl Op {
            pub fn kind(&self) -> OpKind {
                match self { $(Op::$args(_) => OpKind::$args),+ }
            }

            /// What it takes when it does `work`.
            pub fn cost(&self, work: Work) -> Cost {
                match self { $(Op::$args(args) => args.cost(work)),+ }
            }

            pub fn run(&self, ops: &mut (impl Ops + ?Sized)) -> Result<()> {
                match self { $(Op::$args(args) => ops.$method(args)),+ }
            }
        }
    };
}

ops! {
    /// Looks up token embeddings: `out[i] = table[ids[i]]`.
    embed(Embed),
    /// Cosines and sines of the rotary angles: `out[i] = [cos(p·f) | sin(p·f)]`, computed once a step for all layers. The
    /// products p·f are rounded to f32 first, as Hugging Face rounds them.
    rope_angles(RopeAngles),
    /// RMSNorm of some rows of the residual stream, compacted, and in the same pass the router's dot product.
    norm_gate(NormGate),
    /// Decides which rows are active, compacts them in order, and gives every query row the K/V rows it may see.
    route(Route),
    /// Q of the active rows, K and V of the rows that are kept.
    qkv(Qkv),
    /// q/k norm and RoPE at the original positions; K and V go into their pages.
    rope_append(RopeAppend),
    /// Flash attention of compacted queries over paged K/V by row ranges.
    attend(Attend),
    /// A projection scattered into the residual stream: `x[rows[i]] += src[i]·Wᵀ + b`.
    project_add(ProjectAdd),
    /// `out = silu(h·Gᵀ) ⊙ (h·Uᵀ)`.
    swiglu(SwiGlu),
    /// `out = h·Wᵀ`, the logits.
    logits(Logits),
    /// Log-probabilities of given tokens: `out[i] = logits[i, targets[i]] − logsumexp(logits[i])`.
    logprobs(LogProbs),
    /// Chooses a token by each row of logits.
    sample(Sample),
}

/// What an op really processed, known when it has run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Rows (for [`Qkv`] and [`RopeAppend`]: query rows).
    pub rows: usize,
    /// K/V rows ([`Qkv`], [`RopeAppend`]); distinct K/V rows read ([`Attend`]).
    pub kv_rows: usize,
    /// Sum of `end − first` over the query rows ([`Attend`]).
    pub pairs: u64,
}

fn weight_bytes(w: Weight) -> u64 {
    (w.rows * w.cols * w.dtype.size()) as u64
}

/// The cost of `rows` rows through a weight; nothing is read when there are none.
pub(super) fn linear(w: Weight, rows: usize, src: DType, out: DType) -> Cost {
    if rows == 0 {
        return Cost::default();
    }
    let (m, n, k) = (rows as u64, w.rows as u64, w.cols as u64);
    Cost { flops: 2 * m * n * k, bytes: weight_bytes(w) + m * (k * src.size() as u64 + n * out.size() as u64) }
}

impl std::ops::Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

pub(super) fn check_linear(op: &str, w: Weight, src: Mat, bias: Option<Weight>, bound: usize) -> Result<()> {
    ensure!(src.cols == w.cols, Shape, "{op}: rows of {} do not fit a [{}, {}] weight", src.cols, w.rows, w.cols);
    if let Some(bias) = bias {
        check_vector(op, "bias", bias, w.rows)?;
    }
    check_rows(op, "source", src, bound)
}

pub(super) fn check_vector(op: &str, what: &str, w: Weight, len: usize) -> Result<()> {
    ensure!((w.rows, w.cols) == (1, len), Shape, "{op}: a {what} of [{}, {}], not [1, {len}]", w.rows, w.cols);
    Ok(())
}

pub(super) fn check_f32(op: &str, what: &str, m: Mat) -> Result<()> {
    ensure!(m.dtype == DType::F32, Shape, "{op}: {what} of {}, not f32", m.dtype);
    Ok(())
}

fn check_set(op: &str, rows: RowSet) -> Result<()> {
    check_len(op, "row index", rows.index, rows.bound)?;
    rows.count.map_or(Ok(()), |count| check_len(op, "row count", count, 1))
}

pub(super) fn check_rows(op: &str, what: &str, m: Mat, bound: usize) -> Result<()> {
    ensure!(m.rows >= bound, Shape, "{op}: {what} holds {} rows, {bound} are needed", m.rows);
    Ok(())
}

pub(super) fn check_out(op: &str, out: Mat, bound: usize, cols: usize) -> Result<()> {
    ensure!(out.cols == cols, Shape, "{op}: output of {} columns, {cols} are made", out.cols);
    check_rows(op, "output", out, bound)
}

pub(super) fn check_len(op: &str, what: &str, ints: Ints, len: usize) -> Result<()> {
    ensure!(ints.len >= len, Shape, "{op}: {what} holds {}, {len} are needed", ints.len);
    Ok(())
}

/// See [`Ops::embed`].
#[derive(Debug, Clone, Copy)]
pub struct Embed {
    /// `[vocab, hidden]`
    pub table: Weight,
    /// `[rows]`, each below vocab
    pub ids: Ints,
    /// `[rows, hidden]`, f32
    pub out: Mat,
}

impl Embed {
    pub fn check(&self) -> Result<()> {
        check_f32("embed", "output", self.out)?;
        check_out("embed", self.out, self.ids.len, self.table.cols)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let row = self.table.cols * (self.table.dtype.size() + self.out.dtype.size());
        Cost { flops: 0, bytes: (work.rows * row) as u64 }
    }
}

/// See [`Ops::rope_angles`].
#[derive(Debug, Clone, Copy)]
pub struct RopeAngles {
    /// `[rows]`, original positions
    pub pos: Ints,
    /// `[1, head_dim/2]`, f32: radians per position, scaling applied
    pub inv_freq: Weight,
    /// `[rows, head_dim]`, f32: cosines, then sines
    pub out: Mat,
}

impl RopeAngles {
    pub fn check(&self) -> Result<()> {
        check_vector("rope_angles", "vector of frequencies", self.inv_freq, self.inv_freq.cols)?;
        ensure!(self.inv_freq.dtype == DType::F32, Shape, "rope_angles: frequencies are f32");
        check_f32("rope_angles", "output", self.out)?;
        check_out("rope_angles", self.out, self.pos.len, 2 * self.inv_freq.cols)
    }

    pub fn cost(&self, work: Work) -> Cost {
        Cost { flops: (work.rows * 2 * self.out.cols) as u64, bytes: (work.rows * self.out.cols * 4) as u64 }
    }
}

/// See [`Ops::norm_gate`]. `h = x / sqrt(mean(x²) + eps) ⊙ weight`, in f32.
#[derive(Debug, Clone, Copy)]
pub struct NormGate {
    /// `[*, hidden]`, f32: the residual stream
    pub x: Mat,
    pub rows: RowSet,
    /// `[1, hidden]`
    pub weight: Weight,
    pub eps: f32,
    /// `[rows, hidden]`: `out[i]` is the norm of `x[rows[i]]`; None when only the gate is wanted
    pub out: Option<Mat>,
    pub gate: Option<Gate>,
}

/// The router's part of [`NormGate`].
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    /// `[1, hidden]`, f32
    pub router: Weight,
    /// `[*, 1]`, f32: `logits[rows[i]] = h·r`. The score is its sigmoid.
    pub logits: Mat,
}

impl NormGate {
    pub fn check(&self) -> Result<()> {
        let hidden = self.x.cols;
        check_vector("norm_gate", "norm", self.weight, hidden)?;
        check_f32("norm_gate", "a residual stream", self.x)?;
        check_set("norm_gate", self.rows)?;
        ensure!(self.out.is_some() || self.gate.is_some(), Shape, "norm_gate: neither rows nor logits are wanted");
        if let Some(gate) = self.gate {
            check_vector("norm_gate", "router", gate.router, hidden)?;
            ensure!(gate.router.dtype == DType::F32, Shape, "norm_gate: routers are f32");
            check_f32("norm_gate", "logits", gate.logits)?;
            check_out("norm_gate", gate.logits, self.rows.bound, 1)?;
        }
        self.out.map_or(Ok(()), |out| check_out("norm_gate", out, self.rows.bound, hidden))
    }

    pub fn cost(&self, work: Work) -> Cost {
        let (rows, hidden) = (work.rows as u64, self.x.cols as u64);
        let gate = if self.gate.is_some() { 2 } else { 0 };
        let out = self.out.map_or(0, |out| out.dtype.size() as u64);
        Cost { flops: rows * hidden * (4 + gate), bytes: rows * hidden * (4 + out) }
    }
}

/// How [`Route`] decides. The score of a row is the sigmoid of its logit; a NaN reaches no threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decide {
    /// Every row is active: a dense layer.
    All,
    /// A row is active when its score reaches the threshold.
    Threshold(f32),
    /// The ceil(share·T) best scores of each sequence of T rows (see [`top_count`](super::top_count)), compared by their
    /// logits: of equals, and those are +0 and −0 too, the earlier row; a NaN is like −∞.
    TopK(f32),
    /// A sequence is active when the sigmoid of its mean logit (see [`mean`](super::mean)) reaches the threshold; once decided
    /// it stays.
    Sequence(f32),
}

/// Which rows a part of a layer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    All,
    Active,
}

/// In [`Route::decided`]: the sequence has not been routed yet.
pub const UNDECIDED: u32 = 2;

/// See [`Ops::route`]. Rows stand by sequence, at least one in each; positions ascend within one, also over what it holds.
///
/// Also advances the K/V length of (layer, slot) by the rows that are kept; [`RopeAppend`] then fills them.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    pub layer: usize,
    pub decide: Decide,
    /// The rows that query, and the rows that write K/V.
    pub queries: Take,
    pub keys: Take,
    /// Sliding window in original positions: position p sees those above p − window.
    pub window: Option<usize>,
    /// `[rows, 1]`, f32; not read by [`Decide::All`]
    pub logits: Mat,
    /// `[rows]`
    pub pos: Ints,
    /// `[sequences + 1]`, first row of each sequence, and the end
    pub seq_start: Ints,
    /// `[sequences]`, KV slot of each
    pub slots: Ints,
    /// `[sequences]`, for [`Decide::Sequence`]: 0 skipped, 1 active, [`UNDECIDED`]; written when decided
    pub decided: Ints,
    /// `[cuts]`, ascending row numbers, the last one is the number of rows
    pub cuts: Ints,
    /// out `[rows]`: active rows, ascending
    pub active: Ints,
    /// out `[cuts]`: active rows below each cut
    pub active_at: Ints,
    /// out `[rows]`, for the i-th querying row: the K/V rows [first, end) of its sequence that it sees. Both ascend within a
    /// sequence. A row that keeps no K/V of its own may see none: first = end.
    pub first: Ints,
    pub end: Ints,
    /// out `[rows]`, for the i-th kept row: its row number in the K/V of (layer, sequence)
    pub kv_row: Ints,
}

impl Route {
    pub fn check(&self) -> Result<()> {
        let rows = self.pos.len;
        if self.decide != Decide::All {
            check_f32("route", "logits", self.logits)?;
            ensure!(self.logits.cols == 1, Shape, "route: logits of {} columns, not 1", self.logits.cols);
            check_rows("route", "logits", self.logits, rows)?;
        }
        let (seqs, starts) = (self.slots.len, self.seq_start.len);
        ensure!(starts == seqs + 1, Shape, "route: {starts} starts for {seqs} sequences, one more is needed");
        ensure!(self.cuts.len > 0, Shape, "route: no cuts; the last one is the number of rows");
        check_len("route", "active counts", self.active_at, self.cuts.len)?;
        for (what, ints) in [("active", self.active), ("first", self.first), ("end", self.end), ("kv_row", self.kv_row)]
        {
            check_len("route", what, ints, rows)?;
        }
        if let Decide::Sequence(_) = self.decide {
            check_len("route", "decisions", self.decided, self.slots.len)?;
        }
        Ok(())
    }

    pub fn cost(&self, work: Work) -> Cost {
        Cost { flops: 0, bytes: (work.rows * 4 * 5) as u64 }
    }
}

/// See [`Ops::qkv`]: `q[i] = h[q_rows[i] − base]·Wqᵀ + bq`, and K, V likewise for `kv_rows`.
#[derive(Debug, Clone, Copy)]
pub struct Qkv {
    /// `[rows, hidden]`; row 0 is the row `base` of the residual stream
    pub h: Mat,
    pub base: usize,
    pub q_rows: RowSet,
    pub kv_rows: RowSet,
    /// `[heads·head_dim, hidden]`, `[kv_heads·head_dim, hidden]` twice
    pub weights: [Weight; 3],
    pub biases: [Option<Weight>; 3],
    /// `[q_rows, heads·head_dim]`
    pub q: Mat,
    /// `[kv_rows, kv_heads·head_dim]`
    pub k: Mat,
    pub v: Mat,
}

impl Qkv {
    pub fn check(&self) -> Result<()> {
        let rows = [self.q_rows, self.kv_rows, self.kv_rows];
        for (((w, b), rows), out) in self.weights.into_iter().zip(self.biases).zip(rows).zip([self.q, self.k, self.v]) {
            check_linear("qkv", w, self.h, b, rows.bound)?;
            check_set("qkv", rows)?;
            check_out("qkv", out, rows.bound, w.rows)?;
        }
        Ok(())
    }

    pub fn cost(&self, work: Work) -> Cost {
        let [q, k, v] = self.weights;
        let cost = |w, rows| linear(w, rows, self.h.dtype, self.q.dtype);
        cost(q, work.rows) + cost(k, work.kv_rows) + cost(v, work.kv_rows)
    }
}

/// See [`Ops::rope_append`]. RoPE rotates the halves of a head against each other, as Hugging Face does. `q` is changed in
/// place, the rows of `k` hold anything afterwards, `v` is only read.
#[derive(Debug, Clone, Copy)]
pub struct RopeAppend {
    pub layer: usize,
    pub head_dim: usize,
    /// `[*, head_dim]`, f32: by row of the residual stream, from [`RopeAngles`]
    pub angles: Mat,
    /// `[*]`, original position, and KV slot, of each row of the residual stream
    pub pos: Ints,
    pub row_slot: Ints,
    pub q_rows: RowSet,
    pub kv_rows: RowSet,
    /// `[kv_rows]`, from [`Route::kv_row`]
    pub kv_row: Ints,
    /// `[q_rows, heads·head_dim]`, rotated in place
    pub q: Mat,
    /// `[kv_rows, kv_heads·head_dim]`
    pub k: Mat,
    pub v: Mat,
    /// `[1, head_dim]`: RMSNorm of every query and key head (Qwen3)
    pub q_norm: Option<Weight>,
    pub k_norm: Option<Weight>,
    pub eps: f32,
}

impl RopeAppend {
    pub fn check(&self) -> Result<()> {
        let d = self.head_dim;
        ensure!(d > 0 && d.is_multiple_of(2), Shape, "rope_append: head_dim {d} is odd");
        ensure!(self.angles.cols == d, Shape, "rope_append: angles of {}, head_dim {d}", self.angles.cols);
        check_f32("rope_append", "angles", self.angles)?;
        for norm in [self.q_norm, self.k_norm].into_iter().flatten() {
            check_vector("rope_append", "norm", norm, d)?;
        }
        ensure!(self.q.cols.is_multiple_of(d) && self.k.cols.is_multiple_of(d), Shape, "rope_append: not whole heads");
        ensure!(self.k.cols == self.v.cols, Shape, "rope_append: K of {}, V of {}", self.k.cols, self.v.cols);
        check_set("rope_append", self.q_rows)?;
        check_set("rope_append", self.kv_rows)?;
        check_len("rope_append", "K/V rows", self.kv_row, self.kv_rows.bound)?;
        check_rows("rope_append", "q", self.q, self.q_rows.bound)?;
        check_rows("rope_append", "k", self.k, self.kv_rows.bound)?;
        check_rows("rope_append", "v", self.v, self.kv_rows.bound)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let (q, kv) = ((work.rows * self.q.cols) as u64, (work.kv_rows * self.k.cols) as u64);
        let size = self.q.dtype.size() as u64;
        Cost { flops: 3 * (q + kv), bytes: 2 * size * q + 4 * size * kv }
    }
}

/// See [`Ops::attend`]: `out[i] = softmax(scale · q[i]·Kᵀ)·V` over the K/V rows `first[i]..end[i]` of the row's sequence.
/// No range is empty, and both ends ascend (may stay) from row to row of a sequence, whose rows stand together.
#[derive(Debug, Clone, Copy)]
pub struct Attend {
    pub layer: usize,
    pub head_dim: usize,
    /// Above 0, finite.
    pub scale: f32,
    pub rows: RowSet,
    /// `[*]`, KV slot of each row of the residual stream
    pub row_slot: Ints,
    /// `[rows]`, from [`Route`]
    pub first: Ints,
    pub end: Ints,
    /// `[rows, heads·head_dim]`
    pub q: Mat,
    /// `[rows, heads·head_dim]`
    pub out: Mat,
    /// Heads that share their K/V among q.cols / head_dim / kv_heads query heads.
    pub kv_heads: usize,
    /// Each row is the only one of its sequence, as in decode: no two share K/V.
    pub single: bool,
}

impl Attend {
    pub fn check(&self) -> Result<()> {
        let heads = self.q.cols.checked_div(self.head_dim).unwrap_or(0);
        ensure!(
            heads > 0
                && heads * self.head_dim == self.q.cols
                && self.kv_heads > 0
                && heads.is_multiple_of(self.kv_heads),
            Shape,
            "attend: {} columns are not query heads of {} for {} K/V heads",
            self.q.cols,
            self.head_dim,
            self.kv_heads
        );
        // Maxima are taken before scaling.
        ensure!(self.scale > 0.0 && self.scale.is_finite(), Shape, "attend: a scale of {}, not above 0", self.scale);
        check_set("attend", self.rows)?;
        check_len("attend", "first", self.first, self.rows.bound)?;
        check_len("attend", "end", self.end, self.rows.bound)?;
        check_rows("attend", "q", self.q, self.rows.bound)?;
        check_out("attend", self.out, self.rows.bound, self.q.cols)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let size = self.q.dtype.size() as u64;
        let kv = (self.kv_heads * self.head_dim) as u64;
        Cost {
            flops: 4 * work.pairs * self.q.cols as u64,
            bytes: size * (2 * (work.rows * self.q.cols) as u64 + 2 * work.kv_rows as u64 * kv),
        }
    }
}

/// See [`Ops::project_add`].
#[derive(Debug, Clone, Copy)]
pub struct ProjectAdd {
    /// `[rows, in]`
    pub src: Mat,
    /// `[hidden, in]`
    pub weight: Weight,
    pub bias: Option<Weight>,
    pub rows: RowSet,
    /// `[*, hidden]`, f32: the residual stream
    pub x: Mat,
}

impl ProjectAdd {
    pub fn check(&self) -> Result<()> {
        check_linear("project_add", self.weight, self.src, self.bias, self.rows.bound)?;
        check_set("project_add", self.rows)?;
        check_f32("project_add", "a residual stream", self.x)?;
        check_out("project_add", self.x, self.rows.bound, self.weight.rows)
    }

    pub fn cost(&self, work: Work) -> Cost {
        // The residual is read and written.
        linear(self.weight, work.rows, self.src.dtype, self.x.dtype)
            + Cost { flops: 0, bytes: (work.rows * self.x.cols * 4) as u64 }
    }
}

/// See [`Ops::swiglu`].
#[derive(Debug, Clone, Copy)]
pub struct SwiGlu {
    /// `[rows, hidden]`
    pub h: Mat,
    /// How many rows; the index is not read.
    pub rows: RowSet,
    /// `[intermediate, hidden]`
    pub gate: Weight,
    pub up: Weight,
    pub gate_bias: Option<Weight>,
    pub up_bias: Option<Weight>,
    /// `[rows, intermediate]`
    pub out: Mat,
}

impl SwiGlu {
    pub fn check(&self) -> Result<()> {
        check_set("swiglu", self.rows)?;
        check_linear("swiglu", self.gate, self.h, self.gate_bias, self.rows.bound)?;
        check_linear("swiglu", self.up, self.h, self.up_bias, self.rows.bound)?;
        ensure!(self.gate.rows == self.up.rows, Shape, "swiglu: gate of {}, up of {}", self.gate.rows, self.up.rows);
        check_out("swiglu", self.out, self.rows.bound, self.gate.rows)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let up = linear(self.up, work.rows, self.h.dtype, self.out.dtype);
        let Cost { flops, bytes } = linear(self.gate, work.rows, self.h.dtype, self.out.dtype);
        // The input is read and the output written once for both.
        let once = (work.rows * (self.h.cols * self.h.dtype.size() + self.out.cols * self.out.dtype.size())) as u64;
        up + Cost { flops: flops + 4 * (work.rows * self.out.cols) as u64, bytes: bytes - once }
    }
}

/// See [`Ops::logits`].
#[derive(Debug, Clone, Copy)]
pub struct Logits {
    /// `[rows, hidden]`
    pub h: Mat,
    /// `[vocab, hidden]`
    pub weight: Weight,
    /// `[rows, vocab]`, f32
    pub out: Mat,
}

impl Logits {
    pub fn check(&self) -> Result<()> {
        check_linear("logits", self.weight, self.h, None, self.out.rows)?;
        check_f32("logits", "output", self.out)?;
        check_out("logits", self.out, self.out.rows, self.weight.rows)
    }

    pub fn cost(&self, work: Work) -> Cost {
        linear(self.weight, work.rows, self.h.dtype, self.out.dtype)
    }
}

/// See [`Ops::logprobs`].
#[derive(Debug, Clone, Copy)]
pub struct LogProbs {
    /// `[rows, vocab]`, f32
    pub logits: Mat,
    /// `[rows]`, each below vocab
    pub targets: Ints,
    /// `[rows, 1]`, f32, natural logarithms; NaN for a row that holds a NaN or +∞, or nothing but −∞
    pub out: Mat,
}

impl LogProbs {
    pub fn check(&self) -> Result<()> {
        check_f32("logprobs", "logits", self.logits)?;
        check_f32("logprobs", "output", self.out)?;
        check_rows("logprobs", "logits", self.logits, self.targets.len)?;
        check_out("logprobs", self.out, self.targets.len, 1)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.logits.cols) as u64;
        Cost { flops: 2 * values, bytes: 4 * values }
    }
}

/// How the token of a row is drawn: see [`SamplerSettings`](crate::sample::SamplerSettings) for what the fields mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 0: the best token, of equals the lowest id.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    /// 64 random bits.
    pub random: u64,
}

impl Draw {
    /// The number of [`words`](Self::words).
    pub const WORDS: usize = 6;

    /// The best token.
    pub const GREEDY: Draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };

    /// Errors: Argument when a number is out of its range.
    pub fn check(&self) -> Result<()> {
        let Draw { temperature: t, top_p, min_p, .. } = *self;
        check_range("temperature", t, t >= 0.0 && t.is_finite(), "0 (greedy) or a finite number above it")?;
        check_range("top_p", top_p, (0.0..=1.0).contains(&top_p), "a number in [0, 1]; 1 keeps all")?;
        check_range("min_p", min_p, (0.0..=1.0).contains(&min_p), "a number in [0, 1]; 0 keeps all")
    }

    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// As integers, for [`Sample::draws`].
    pub fn words(&self) -> [u32; Draw::WORDS] {
        let Draw { temperature, top_k, top_p, min_p, random } = *self;
        [temperature.to_bits(), top_k, top_p.to_bits(), min_p.to_bits(), random as u32, (random >> 32) as u32]
    }

    pub fn from_words(words: [u32; Draw::WORDS]) -> Self {
        let [temperature, top_k, top_p, min_p, low, high] = words;
        let [temperature, top_p, min_p] = [temperature, top_p, min_p].map(f32::from_bits);
        Draw { temperature, top_k, top_p, min_p, random: u64::from(high) << 32 | u64::from(low) }
    }
}

/// In [`Sample::tokens`]: no token can be chosen, as a logit is NaN or +∞, or all are −∞.
pub const SAMPLE_NONE: u32 = u32::MAX;

/// See [`Ops::sample`]. Every backend chooses the same token from the same logits.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// `[rows, vocab]`, f32, vocab at most 2^24
    pub logits: Mat,
    /// `[rows · Draw::WORDS]`, the words of a [`Draw`] for each row; None: all rows are greedy
    pub draws: Option<Ints>,
    /// out `[rows]`: a token, or [`SAMPLE_NONE`]
    pub tokens: Ints,
}

impl Sample {
    pub fn check(&self) -> Result<()> {
        let Mat { rows, cols, .. } = self.logits;
        check_f32("sample", "logits", self.logits)?;
        ensure!((1..=1 << 24).contains(&cols), Shape, "sample: a vocabulary of {cols}, not of 1 to 2^24");
        if let Some(draws) = self.draws {
            check_len("sample", "draws", draws, rows * Draw::WORDS)?;
        }
        check_len("sample", "tokens", self.tokens, rows)
    }

    pub fn cost(&self, work: Work) -> Cost {
        Cost { flops: 0, bytes: (work.rows * self.logits.cols * 4) as u64 }
    }
}
