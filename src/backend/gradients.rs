//! The ops of a backward pass that ends in the routers. Weights are frozen, so there is none that makes a gradient for
//! one: only activations have gradients, and they are f32 everywhere.
//!
//! What holds for [`Ops`](super::Ops) holds for these: buffers do not overlap, sums accumulate in f32 or wider, and the
//! same inputs give the same bits whatever the number of threads. The host knows every count, so rows are plain lists.

use std::fmt;

use super::ops::{check_f32, check_len, check_linear, check_out, check_rows, check_vector, linear};
use super::{Cost, Ints, Mat, Op, OpKind, TrainingBackend, Weight, Work};
use crate::error::{Result, ensure};
use crate::tensor::DType;

macro_rules! gradients {
    ($($(#[$doc:meta])* $method:ident($args:ident)),+ $(,)?) => {
        /// The ops that training needs besides [`Ops`](super::Ops).
        pub trait Gradients {
            $($(#[$doc])* fn $method(&mut self, args: &$args) -> Result<()>;)+
        }

        /// The name of an op of [`Gradients`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum GradientKind { $(#[allow(missing_docs)] $args),+ }

        impl GradientKind {
            pub const ALL: &[GradientKind] = &[$(GradientKind::$args),+];
            pub const COUNT: usize = GradientKind::ALL.len();

            pub fn name(self) -> &'static str {
                match self { $(GradientKind::$args => stringify!($method)),+ }
            }
        }

        /// An op of [`Gradients`] with its arguments.
        #[derive(Debug, Clone, Copy)]
        pub enum Gradient { $(#[allow(missing_docs)] $args($args)),+ }

        impl Gradient {
            pub fn kind(&self) -> GradientKind {
                match self { $(Gradient::$args(_) => GradientKind::$args),+ }
            }

            /// What it takes when it does `work`.
            pub fn cost(&self, work: Work) -> Cost {
                match self { $(Gradient::$args(args) => args.cost(work)),+ }
            }

            pub fn run(&self, ops: &mut (impl Gradients + ?Sized)) -> Result<()> {
                match self { $(Gradient::$args(args) => ops.$method(args)),+ }
            }
        }
    };
}

/// An op of either trait.
#[derive(Debug, Clone, Copy)]
pub enum AnyOp {
    Forward(Op),
    Backward(Gradient),
}

/// Its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum AnyKind {
    Forward(OpKind),
    Backward(GradientKind),
}

impl AnyOp {
    pub fn kind(&self) -> AnyKind {
        match self {
            AnyOp::Forward(op) => op.kind().into(),
            AnyOp::Backward(op) => op.kind().into(),
        }
    }

    pub fn cost(&self, work: Work) -> Cost {
        match self {
            AnyOp::Forward(op) => op.cost(work),
            AnyOp::Backward(op) => op.cost(work),
        }
    }

    pub fn run(&self, be: &mut dyn TrainingBackend) -> Result<()> {
        match self {
            AnyOp::Forward(op) => op.run(be),
            AnyOp::Backward(op) => op.run(be),
        }
    }
}

impl AnyKind {
    pub fn all() -> impl Iterator<Item = AnyKind> {
        OpKind::ALL.iter().map(|&op| op.into()).chain(GradientKind::ALL.iter().map(|&op| op.into()))
    }

    pub fn name(self) -> &'static str {
        match self {
            AnyKind::Forward(op) => op.name(),
            AnyKind::Backward(op) => op.name(),
        }
    }
}

impl From<OpKind> for AnyKind {
    fn from(op: OpKind) -> Self {
        AnyKind::Forward(op)
    }
}

impl From<GradientKind> for AnyKind {
    fn from(op: GradientKind) -> Self {
        AnyKind::Backward(op)
    }
}

impl From<Op> for AnyOp {
    fn from(op: Op) -> Self {
        AnyOp::Forward(op)
    }
}

impl From<Gradient> for AnyOp {
    fn from(op: Gradient) -> Self {
        AnyOp::Backward(op)
    }
}

impl fmt::Debug for AnyKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            AnyKind::Forward(op) => op.fmt(f),
            AnyKind::Backward(op) => op.fmt(f),
        }
    }
}

gradients! {
    /// Copies rows, or clears them.
    copy(CopyRows),
    /// Cross-entropy of rows of logits, which become their own gradient.
    loss(Loss),
    /// The gradient of the input of a frozen projection: `d_in = d_out·W`.
    back_project(BackProject),
    /// RMSNorm backward into the gradient of the residual stream, and with it what a router's logit adds.
    norm_backward(NormBackward),
    /// SwiGLU whose two projections are kept for the way back.
    swiglu_kept(SwiGluKept),
    /// SwiGLU backward up to its two projections, which are computed again where they were not kept.
    swiglu_backward(SwiGluBackward),
    /// Flash attention backward over row ranges, with probabilities that are computed again.
    attend_backward(AttendBackward),
    /// RoPE and q/k-norm backward, in place.
    rope_backward(RopeBackward),
    /// Attention of rows that keep no K/V: over the kept rows before them, and themselves.
    attend_apart(AttendApart),
    /// Dot products of rows: how the loss changes with a mask in front of what they stand for.
    row_dots(RowDots),
    /// From the gradient of a mask, straight through it, to those of the router and of its logits.
    gate_backward(GateBackward),
}

/// See [`Gradients::copy`].
#[derive(Debug, Clone, Copy)]
pub struct CopyRows {
    /// `[rows, cols]`; None: zeros
    pub src: Option<Mat>,
    /// `[rows, cols]`
    pub out: Mat,
}

impl CopyRows {
    pub fn check(&self) -> Result<()> {
        let Some(src) = self.src else { return Ok(()) };
        ensure!(src.dtype == self.out.dtype, Shape, "copy: {} into {}", src.dtype, self.out.dtype);
        ensure!(src.rows == self.out.rows, Shape, "copy: {} rows into {}", src.rows, self.out.rows);
        check_out("copy", self.out, src.rows, src.cols)
    }

    pub fn cost(&self, _: Work) -> Cost {
        Cost { flops: 0, bytes: (self.out.bytes() + self.src.map_or(0, Mat::bytes)) as u64 }
    }
}

/// What a [`Loss`] compares with.
#[derive(Debug, Clone, Copy)]
pub enum Against {
    /// `[rows]`, each below vocab: −ln p(target)
    Tokens(Ints),
    /// `[rows, vocab]`, f32, logits of a distribution q: the sum of q·(ln q − ln p)
    Distribution(Mat),
}

/// See [`Gradients::loss`]. With `p = softmax(logits[i])`, the gradient is `scale·(p − target)`.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    /// `[rows, vocab]`, f32: logits, then the gradient of scale times the sum of the losses
    pub logits: Mat,
    pub against: Against,
    pub scale: f32,
    /// `[rows, 1]`, f32: not scaled; NaN for a row with a NaN or +∞
    pub losses: Mat,
}

impl Loss {
    pub fn check(&self) -> Result<()> {
        let Mat { rows, cols, .. } = self.logits;
        check_f32("loss", "logits", self.logits)?;
        check_f32("loss", "losses", self.losses)?;
        check_out("loss", self.losses, rows, 1)?;
        match self.against {
            Against::Tokens(targets) => check_len("loss", "targets", targets, rows),
            Against::Distribution(logits) => {
                check_f32("loss", "the other logits", logits)?;
                check_out("loss", logits, rows, cols)
            }
        }
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.logits.cols) as u64;
        let read = if let Against::Distribution(_) = self.against { 3 } else { 2 };
        Cost { flops: 4 * values, bytes: 4 * read * values }
    }
}

/// See [`Gradients::back_project`]: `d_in[to[i]] = d_out[from[i]]·W`, or added.
#[derive(Debug, Clone, Copy)]
pub struct BackProject {
    pub rows: usize,
    /// `[*, out]`, f32
    pub d_out: Mat,
    /// `[rows]`; None: 0, 1, 2, …
    pub from: Option<Ints>,
    /// `[out, in]`
    pub weight: Weight,
    /// `[*, in]`, f32
    pub d_in: Mat,
    /// `[rows]`, ascending; None: 0, 1, 2, …
    pub to: Option<Ints>,
    /// To what `d_in` holds.
    pub add: bool,
}

impl BackProject {
    pub fn check(&self) -> Result<()> {
        check_f32("back_project", "a gradient", self.d_out)?;
        check_f32("back_project", "a gradient", self.d_in)?;
        let Weight { rows, cols, .. } = self.weight;
        let (from, to) = (self.d_out.cols, self.d_in.cols);
        ensure!((from, to) == (rows, cols), Shape, "back_project: {from} to {to} through a [{rows}, {cols}] weight");
        match self.from {
            Some(from) => check_len("back_project", "source rows", from, self.rows)?,
            None => check_rows("back_project", "source", self.d_out, self.rows)?,
        }
        match self.to {
            Some(to) => check_len("back_project", "output rows", to, self.rows),
            None => check_rows("back_project", "output", self.d_in, self.rows),
        }
    }

    pub fn cost(&self, work: Work) -> Cost {
        let turned = Weight { rows: self.weight.cols, cols: self.weight.rows, ..self.weight };
        let again = if self.add { (work.rows * self.d_in.cols * 4) as u64 } else { 0 };
        linear(turned, work.rows, self.d_out.dtype, self.d_in.dtype) + Cost { flops: 0, bytes: again }
    }
}

/// See [`Gradients::norm_backward`]. With h = x·s ⊙ w, s = 1/sqrt(mean(x²) + eps), g = d_h ⊙ w and n = hidden:
/// `d_x += s·(g − x·s²·(g·x)/n)`.
#[derive(Debug, Clone, Copy)]
pub struct NormBackward {
    /// `[*, hidden]`, f32: what was normalised
    pub x: Mat,
    /// Ascending
    pub rows: Ints,
    /// `[1, hidden]`
    pub weight: Weight,
    pub eps: f32,
    /// `[rows, hidden]`, f32
    pub d_h: Mat,
    /// A router `[1, hidden]` and the gradients of its logits `[*, 1]` by row of `x`: d_logit·r is added to d_h.
    pub gate: Option<(Weight, Mat)>,
    /// `[*, hidden]`, f32: added to at `rows`
    pub d_x: Mat,
}

impl NormBackward {
    pub fn check(&self) -> Result<()> {
        let hidden = self.x.cols;
        check_vector("norm_backward", "norm", self.weight, hidden)?;
        for (what, m) in [("residual stream", self.x), ("gradient", self.d_x), ("gradient of the norm", self.d_h)] {
            check_f32("norm_backward", what, m)?;
            ensure!(m.cols == hidden, Shape, "norm_backward: a {what} of {} columns, not {hidden}", m.cols);
        }
        if let Some((router, logits)) = self.gate {
            check_vector("norm_backward", "router", router, hidden)?;
            check_f32("norm_backward", "logits", logits)?;
        }
        check_rows("norm_backward", "gradient", self.d_h, self.rows.len)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.x.cols) as u64;
        Cost { flops: values * if self.gate.is_some() { 11 } else { 9 }, bytes: 16 * values }
    }
}

/// The two projections of a SwiGLU: g = h·Gᵀ and u = h·Uᵀ, for a = silu(g) ⊙ u.
#[derive(Debug, Clone, Copy)]
pub struct GateUp {
    /// `[*, hidden]`
    pub h: Mat,
    /// `[intermediate, hidden]`
    pub gate: Weight,
    pub up: Weight,
    pub gate_bias: Option<Weight>,
    pub up_bias: Option<Weight>,
}

impl GateUp {
    fn check(&self, op: &str, rows: usize, width: usize) -> Result<()> {
        check_linear(op, self.gate, self.h, self.gate_bias, rows)?;
        check_linear(op, self.up, self.h, self.up_bias, rows)?;
        let same = self.gate.rows == width && self.up.rows == width;
        ensure!(same, Shape, "{op}: gate of {}, up of {} for {width}", self.gate.rows, self.up.rows);
        Ok(())
    }

    fn cost(&self, work: Work) -> Cost {
        let product = linear(self.gate, work.rows, self.h.dtype, DType::F32);
        product + product
    }
}

/// See [`Gradients::swiglu_kept`]. Everything is f32.
#[derive(Debug, Clone, Copy)]
pub struct SwiGluKept {
    pub of: GateUp,
    /// `[rows, intermediate]`: g and u
    pub gate: Mat,
    pub up: Mat,
    /// `[rows, intermediate]`: a
    pub out: Mat,
}

impl SwiGluKept {
    pub fn check(&self) -> Result<()> {
        let Mat { rows, cols: width, .. } = self.out;
        self.of.check("swiglu_kept", rows, width)?;
        [self.gate, self.up, self.out].into_iter().try_for_each(|m| {
            check_f32("swiglu_kept", "an output", m)?;
            check_out("swiglu_kept", m, rows, width)
        })
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.out.cols) as u64;
        self.of.cost(work) + Cost { flops: 5 * values, bytes: 12 * values }
    }
}

/// See [`Gradients::swiglu_backward`].
#[derive(Debug, Clone, Copy)]
pub struct SwiGluBackward {
    /// What is computed again; None when `d_gate` and `d_up` hold g and u.
    pub again: Option<GateUp>,
    /// `[rows, intermediate]`, f32
    pub d_act: Mat,
    /// `[rows, intermediate]`, f32: the gradients of g and u
    pub d_gate: Mat,
    pub d_up: Mat,
    /// Row numbers `[rows]`, ascending, and `[*, 1]`, f32: `d_act·a` is added at each.
    pub dots: Option<(Ints, Mat)>,
}

impl SwiGluBackward {
    pub fn check(&self) -> Result<()> {
        let Mat { rows, cols: width, .. } = self.d_act;
        self.again.map_or(Ok(()), |of| of.check("swiglu_backward", rows, width))?;
        for m in [self.d_act, self.d_gate, self.d_up] {
            check_f32("swiglu_backward", "a gradient", m)?;
            check_out("swiglu_backward", m, rows, width)?;
        }
        self.dots.map_or(Ok(()), |(at, out)| check_dots("swiglu_backward", at, out, rows))
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.d_act.cols) as u64;
        let products = self.again.map_or(Cost { flops: 0, bytes: 8 * values }, |of| of.cost(work));
        products + Cost { flops: 12 * values, bytes: 4 * values }
    }
}

/// See [`Gradients::attend_backward`], and [`Attend`](super::Attend) for the fields that it shares. K/V rows are
/// counted from the first row of each slot, which begins the step empty.
#[derive(Debug, Clone, Copy)]
pub struct AttendBackward {
    pub layer: usize,
    pub head_dim: usize,
    pub kv_heads: usize,
    /// Above 0
    pub scale: f32,
    /// `[rows]`: rows of the residual stream that queried, by sequence
    pub rows: Ints,
    /// `[*]`
    pub row_slot: Ints,
    /// `[rows]`
    pub first: Ints,
    pub end: Ints,
    /// `[slots + 1]`: where the K/V rows of each slot begin in `d_k` and `d_v`, and the end
    pub kv_start: Ints,
    /// `[rows, heads·head_dim]`, rotated
    pub q: Mat,
    /// `[rows, heads·head_dim]`: what attention gave, and its gradient
    pub out: Mat,
    pub d_out: Mat,
    /// `[rows, heads·head_dim]`, f32
    pub d_q: Mat,
    /// `[kv_rows, kv_heads·head_dim]`, f32; the gradient of K is that of the rotated keys
    pub d_k: Mat,
    pub d_v: Mat,
}

impl AttendBackward {
    pub fn check(&self) -> Result<()> {
        check_heads("attend_backward", self.q, self.head_dim, self.kv_heads, self.scale)?;
        for (what, ints) in [("first", self.first), ("end", self.end)] {
            check_len("attend_backward", what, ints, self.rows.len)?;
        }
        ensure!(self.kv_start.len > 1, Shape, "attend_backward: no slots");
        for m in [self.out, self.d_out, self.d_q] {
            check_out("attend_backward", m, self.rows.len, self.q.cols)?;
        }
        let kv = self.kv_heads * self.head_dim;
        check_out("attend_backward", self.d_k, 0, kv)?;
        check_out("attend_backward", self.d_v, self.d_k.rows, kv)
    }

    /// Five products where attention has two: the scores again, and the gradients of the probabilities, Q, K and V.
    pub fn cost(&self, work: Work) -> Cost {
        let kv = (self.kv_heads * self.head_dim) as u64;
        let (rows, kv_rows) = (work.rows as u64, work.kv_rows as u64);
        Cost {
            flops: 10 * work.pairs * self.q.cols as u64,
            bytes: 4 * (4 * rows * self.q.cols as u64 + 4 * kv_rows * kv),
        }
    }
}

/// See [`Gradients::rope_backward`].
#[derive(Debug, Clone, Copy)]
pub struct RopeBackward {
    pub head_dim: usize,
    /// `[*, head_dim]`, f32, by row of the residual stream
    pub angles: Mat,
    pub rows: Ints,
    /// `[rows, heads·head_dim]`, f32: the gradient of rotated heads, then of what was projected
    pub d: Mat,
    pub norm: Option<HeadNorm>,
}

/// The RMSNorm of every head before it was rotated (Qwen3).
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm {
    /// `[1, head_dim]`
    pub weight: Weight,
    pub eps: f32,
    /// `[rows, heads·head_dim]`, as projected
    pub src: Mat,
}

impl RopeBackward {
    pub fn check(&self) -> Result<()> {
        let d = self.head_dim;
        ensure!(d > 0 && d.is_multiple_of(2), Shape, "rope_backward: head_dim {d} is odd");
        ensure!(self.angles.cols == d, Shape, "rope_backward: angles of {}, head_dim {d}", self.angles.cols);
        ensure!(self.d.cols.is_multiple_of(d), Shape, "rope_backward: not whole heads");
        check_f32("rope_backward", "angles", self.angles)?;
        check_f32("rope_backward", "a gradient", self.d)?;
        check_rows("rope_backward", "gradient", self.d, self.rows.len)?;
        let Some(norm) = self.norm else { return Ok(()) };
        check_vector("rope_backward", "norm", norm.weight, d)?;
        check_out("rope_backward", norm.src, self.rows.len, self.d.cols)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.d.cols) as u64;
        let norm = if self.norm.is_some() { (9, 4) } else { (0, 0) };
        Cost { flops: (3 + norm.0) * values, bytes: (8 + norm.1) * values }
    }
}

/// See [`Gradients::attend_apart`]: what [`Attend`](super::Attend) would give a row if it kept its K/V.
#[derive(Debug, Clone, Copy)]
pub struct AttendApart {
    pub layer: usize,
    pub head_dim: usize,
    pub kv_heads: usize,
    pub scale: f32,
    pub rows: Ints,
    /// `[*]`
    pub row_slot: Ints,
    /// `[rows]`: the K/V rows [first, end) before it; none where they are equal
    pub first: Ints,
    pub end: Ints,
    /// `[rows, heads·head_dim]`, rotated
    pub q: Mat,
    /// `[rows, kv_heads·head_dim]`: its own, rotated
    pub k: Mat,
    pub v: Mat,
    /// `[rows, heads·head_dim]`
    pub out: Mat,
}

impl AttendApart {
    pub fn check(&self) -> Result<()> {
        check_heads("attend_apart", self.q, self.head_dim, self.kv_heads, self.scale)?;
        for (what, ints) in [("first", self.first), ("end", self.end)] {
            check_len("attend_apart", what, ints, self.rows.len)?;
        }
        check_out("attend_apart", self.out, self.rows.len, self.q.cols)?;
        for own in [self.k, self.v] {
            check_out("attend_apart", own, self.rows.len, self.kv_heads * self.head_dim)?;
        }
        check_rows("attend_apart", "q", self.q, self.rows.len)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let kv = (self.kv_heads * self.head_dim) as u64;
        Cost {
            flops: 4 * work.pairs * self.q.cols as u64,
            bytes: 4 * (2 * (work.rows * self.q.cols) as u64 + 2 * (work.rows + work.kv_rows) as u64 * kv),
        }
    }
}

/// See [`Gradients::row_dots`]: `out[rows[i]] += a[i]·b[i] + c[rows[i]]·bias`.
#[derive(Debug, Clone, Copy)]
pub struct RowDots {
    /// `[rows, n]`, f32; n may be 0
    pub a: Mat,
    pub b: Mat,
    /// Ascending
    pub rows: Ints,
    /// `[*, m]`, f32, and `[1, m]`
    pub bias: Option<(Mat, Weight)>,
    /// `[*, 1]`, f32
    pub out: Mat,
}

impl RowDots {
    pub fn check(&self) -> Result<()> {
        check_out("row_dots", self.a, self.rows.len, self.b.cols)?;
        check_rows("row_dots", "source", self.b, self.rows.len)?;
        if let Some((c, bias)) = self.bias {
            check_vector("row_dots", "bias", bias, c.cols)?;
        }
        check_dots("row_dots", self.rows, self.out, self.rows.len)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * (self.a.cols + self.bias.map_or(0, |(c, _)| c.cols))) as u64;
        Cost { flops: 2 * values, bytes: 8 * values }
    }
}

/// See [`Gradients::gate_backward`]. The mask is hard in the forward pass; backward it is the score: dL/dscore = dL/dm.
#[derive(Debug, Clone, Copy)]
pub struct GateBackward {
    /// `[sequences + 1]`, first row of each sequence, and the end: the score is that of the mean logit of a sequence.
    /// None: every row has its own.
    pub sequences: Option<Ints>,
    /// `[rows, 1]`, f32
    pub logits: Mat,
    /// `[rows, 1]`, f32: dL/dm of each row, then dL/dlogit
    pub d_mask: Mat,
    /// Added to dL/dm of every row: what the penalty on the capacity asks for
    pub penalty: f32,
    /// `[rows, hidden]`, f32: what the router read
    pub h: Mat,
    /// `[1, hidden]`, f32: the sum of dL/dlogit·h is added
    pub d_router: Mat,
}

impl GateBackward {
    pub fn check(&self) -> Result<()> {
        let rows = self.d_mask.rows;
        for m in [self.logits, self.d_mask, self.h, self.d_router] {
            check_f32("gate_backward", "a buffer", m)?;
        }
        check_out("gate_backward", self.d_mask, rows, 1)?;
        check_out("gate_backward", self.logits, rows, 1)?;
        check_out("gate_backward", self.d_router, 1, self.h.cols)?;
        check_rows("gate_backward", "h", self.h, rows)
    }

    pub fn cost(&self, work: Work) -> Cost {
        let values = (work.rows * self.h.cols) as u64;
        Cost { flops: 2 * values, bytes: 4 * values }
    }
}

fn check_dots(op: &str, rows: Ints, out: Mat, bound: usize) -> Result<()> {
    check_f32(op, "dot products", out)?;
    check_len(op, "row numbers", rows, bound)?;
    check_out(op, out, 0, 1)
}

fn check_heads(op: &str, q: Mat, head_dim: usize, kv_heads: usize, scale: f32) -> Result<()> {
    let heads = q.cols.checked_div(head_dim).unwrap_or(0);
    let fits = heads > 0 && heads * head_dim == q.cols && kv_heads > 0 && heads.is_multiple_of(kv_heads);
    ensure!(fits, Shape, "{op}: {} columns are not query heads of {head_dim} for {kv_heads} K/V heads", q.cols);
    ensure!(scale > 0.0 && scale.is_finite(), Shape, "{op}: a scale of {scale}, not above 0");
    Ok(())
}
