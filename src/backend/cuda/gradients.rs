//! The backward ops as launches. Gradients are f32, so a backend that trains has activations, K/V and matrices in f32, and
//! products are in f32 throughout: [`Gemm`].

use std::ptr::{null, null_mut};

use super::device::{Function, Gemm, Launch};
use super::kernels::*;
use super::ops::a_row_a_block;
use super::*;
use crate::backend as ops;

/// The kernels of the backward ops.
pub struct Backward {
    norm: Function,
    rope: Function,
    swiglu: Function,
    row_dots: Function,
    gate: [Function; 3],
    loss_tokens: Function,
    loss_distribution: Function,
    attend_apart: Function,
    /// By the padded head_dim: see [`HEADS`].
    attend_q: [Function; 3],
    attend_kv: [Function; 3],
}

/// Values of head_dim that attend_backward_* are compiled for; others are padded to the next.
const HEADS: [usize; 3] = [64, 128, 256];
/// BACKWARD_ROWS of attention_backward.cu, and rows of a tile of attend_apart.
const TILE: usize = 32;

impl Backward {
    /// Errors: Device when one is missing.
    pub fn find(find: &mut dyn FnMut(&str) -> Result<Function>) -> Result<Self> {
        let (mut attend_q, mut attend_kv) = ([Function(0); 3], [Function(0); 3]);
        for (i, head_dim) in HEADS.into_iter().enumerate() {
            attend_q[i] = find(&format!("attend_backward_q_{head_dim}"))?;
            attend_kv[i] = find(&format!("attend_backward_kv_{head_dim}"))?;
        }
        Ok(Backward {
            norm: find("norm_backward")?,
            rope: find("rope_backward")?,
            swiglu: find("swiglu_backward")?,
            row_dots: find("row_dots")?,
            gate: [find("gate_slopes")?, find("gate_partial")?, find("gate_sum")?],
            loss_tokens: find("loss_tokens")?,
            loss_distribution: find("loss_distribution")?,
            attend_apart: find("attend_apart")?,
            attend_q,
            attend_kv,
        })
    }
}

impl TrainingBackend for CudaBackend {
    fn train(&mut self, body: &mut (dyn FnMut(&mut dyn TrainingBackend) -> Result<()> + Send)) -> Result<()> {
        body(self)
    }

    fn training_workspace(&self, largest: &Largest, kv: &KvLayout) -> Result<usize> {
        let Largest { rows, hidden, heads, .. } = *largest;
        // Rows that are gathered for a product, or scattered behind it, or passed on by attention, or summed for a router.
        let together = self.workspace(&Largest { chunk: rows, intermediate: 0, ..*largest }, kv)?;
        let stats = stats_bytes(rows, heads) + bounds_bytes(kv.slots);
        let partial = 4 * rows.div_ceil(GATE_ROWS as usize) * hidden;
        Ok(self.workspace(largest, kv)?.max(together).max(stats.max(partial) + books(kv)))
    }

    fn replace(&mut self, vector: Weight, values: &[f32]) -> Result<()> {
        ensure!((1, values.len()) == (vector.rows, vector.cols), Shape, "{} values for {vector:?}", values.len());
        let Stored { matrix, vector } = self.weights[vector.id];
        self.device.copy_in(vector, bytemuck::cast_slice(values))?;
        self.device.copy_in(matrix, &bytes_in(self.info.activations, &Tensor::from_f32(values)))
    }
}

/// See `AttendBackwardArgs`.
fn stats_bytes(rows: usize, heads: usize) -> usize {
    16 * rows * heads
}

fn bounds_bytes(slots: usize) -> usize {
    8 * slots
}

fn rows_only(rows: usize) -> Option<Work> {
    Some(Work { rows, ..Work::default() })
}

fn pointer(mat: Option<Mat>, at: *mut c_void) -> *mut f32 {
    if mat.is_some() { at.cast() } else { null_mut() }
}

/// Blocks of 256 threads.
fn threads(n: usize) -> Launch {
    Launch { grid: [n.div_ceil(256) as u32, 1, 1], threads: 256, shared: 0 }
}

impl CudaBackend {
    /// Errors: Unsupported on a backend that does not train.
    fn in_f32(&self, op: GradientKind) -> Result<()> {
        let types = (self.info.activations, self.info.kv);
        ensure!(types == (DType::F32, DType::F32), Unsupported, "{}: activations and K/V in {types:?}", op.name());
        Ok(())
    }

    /// g and u of many rows of a SwiGLU, in the type of activations.
    pub(super) fn gate_up(&mut self, op: AnyKind, of: &GateUp, rows: usize, to: [*mut c_void; 2]) -> Result<()> {
        let [h] = self.mats(op, [of.h])?;
        for (weight, bias, to) in [(of.gate, of.gate_bias, to[0]), (of.up, of.up_bias, to[1])] {
            self.inner_matrix(op, weight)?;
            let gemm = self.product(weight, Address(h as u64), rows, Address(to as u64), self.info.activations);
            self.bias(op, bias, &gemm)?;
            self.gemm(op, &Gemm { add: bias.is_some(), ..gemm })?;
        }
        Ok(())
    }

    fn no_mat() -> Mat {
        Mat { offset: 0, rows: 0, cols: 0, dtype: DType::F32 }
    }

    /// What attention ran with.
    fn attention(
        &mut self,
        op: Gradient,
        [rows, row_slot, first, end]: [Ints; 4],
        (q, out): (Mat, Mat),
        (layer, head_dim, scale): (usize, usize, f32),
    ) -> Result<AttendArgs> {
        let kind = op.kind();
        let [q_at, out_at] = self.mats(kind, [q, out])?;
        let set = self.set(kind, &ops::RowSet::exact(rows))?;
        let [row_slot, first, end] = self.int(kind, [row_slot, first, end])?;
        ensure!(head_dim == self.kv().layout.head_dim, Shape, "{}: heads of {head_dim} for another cache", kind.name());
        Ok(AttendArgs {
            q: q_at,
            out: out_at,
            rows: set,
            row_slot,
            first,
            end,
            kv: self.layer(layer),
            heads: (q.cols / head_dim) as u32,
            type_: TYPE_F32,
            scale,
            blocks: 0,
            partial: null_mut(),
            tickets: null_mut(),
            work: self.account(op, None)?,
        })
    }
}

impl Gradients for CudaBackend {
    fn copy(&mut self, a: &CopyRows) -> Result<()> {
        a.check()?;
        self.best_of = None;
        let (out, bytes) = (self.place(a.out)?, a.out.bytes());
        match a.src.filter(|_| bytes > 0) {
            Some(src) => {
                let [from, to] = self.mats(GradientKind::CopyRows, [src, a.out])?;
                self.device.copy(Address(to as u64), Address(from as u64), bytes)?;
            }
            None => self.device.clear(out, bytes)?,
        }
        self.account(Gradient::CopyRows(*a), rows_only(a.out.rows)).map(drop)
    }

    fn loss(&mut self, a: &Loss) -> Result<()> {
        const OP: GradientKind = GradientKind::Loss;
        a.check()?;
        let Mat { rows, cols: vocab, .. } = a.logits;
        let (targets, other) = match a.against {
            Against::Tokens(targets) => (Some(targets), Self::no_mat()),
            Against::Distribution(other) => (None, other),
        };
        let [logits, losses, other] = self.mats(OP, [a.logits, a.losses, other])?;
        let [at] = self.int(OP, [targets.unwrap_or(Ints { offset: 0, len: 0 })])?;
        let args = LossArgs {
            logits: logits.cast(),
            targets: if targets.is_some() { at } else { null() },
            other: other.cast(),
            losses: losses.cast(),
            scale: a.scale,
            vocab: vocab as u32,
        };
        self.account(Gradient::Loss(*a), rows_only(rows))?;
        let Backward { loss_tokens, loss_distribution, .. } = self.functions.backward;
        let function = if targets.is_some() { loss_tokens } else { loss_distribution };
        let threads = vocab.next_multiple_of(32).clamp(32, 512) as u32;
        self.launch(OP, function, Launch { grid: [rows as u32, 1, 1], threads, shared: 0 }, &args)
    }

    fn back_project(&mut self, a: &BackProject) -> Result<()> {
        const OP: GradientKind = GradientKind::BackProject;
        a.check()?;
        self.in_f32(OP)?;
        let [d_out, d_in] = self.mats(OP, [a.d_out, a.d_in])?.map(|at| Address(at as u64));
        let Weight { rows: k, cols: n, .. } = a.weight;
        self.inner_matrix(OP, a.weight)?;
        self.account(Gradient::BackProject(*a), rows_only(a.rows))?;
        if a.rows == 0 {
            return Ok(());
        }
        let list = |ints: Ints| ops::RowSet::exact(ints.slice(0..a.rows));
        let gathered = if a.from.is_some() { 4 * a.rows * k } else { 0 };
        let scattered = if a.to.is_some() { 4 * a.rows * n } else { 0 };
        let scratch = self.scratch(gathered + scattered)?;
        let src = match a.from {
            Some(from) => self.gathered(OP, d_out, a.d_out, &list(from), 0)?,
            None => d_out,
        };
        let out = if a.to.is_some() { scratch.plus(gathered) } else { d_in };
        let add = a.add && a.to.is_none();
        let product = self.product(a.weight, src, a.rows, out, DType::F32);
        self.gemm(OP, &Gemm { n, k, add, backward: true, ..product })?;
        let Some(to) = a.to else { return Ok(()) };
        let rows = self.set(OP, &list(to))?;
        let args = ScatterArgs {
            src: out.0 as *const f32,
            bias: null(),
            rows,
            width: n as u32,
            add: a.add.into(),
            x: d_in.0 as *mut f32,
        };
        self.launch(OP, self.functions.scatter, a_row_a_block(a.rows, n), &args)
    }

    fn norm_backward(&mut self, a: &NormBackward) -> Result<()> {
        const OP: GradientKind = GradientKind::NormBackward;
        a.check()?;
        let width = a.x.cols;
        ensure!(width.is_multiple_of(8), Unsupported, "norm_backward: rows of {width}, which is no multiple of 8");
        let logits = a.gate.map_or(Self::no_mat(), |(_, logits)| logits);
        let [x, d_h, d_x, d_logits] = self.mats(OP, [a.x, a.d_h, a.d_x, logits])?;
        let [rows] = self.int(OP, [a.rows])?;
        let args = NormBackwardArgs {
            x: x.cast(),
            rows,
            weight: self.vector(a.weight),
            d_h: d_h.cast(),
            router: self.vector_or_null(a.gate.map(|(router, _)| router)),
            d_logits: d_logits.cast(),
            d_x: d_x.cast(),
            eps: a.eps,
            width: width as u32,
        };
        self.account(Gradient::NormBackward(*a), rows_only(a.rows.len))?;
        self.launch(OP, self.functions.backward.norm, a_row_a_block(a.rows.len, width), &args)
    }

    fn swiglu_kept(&mut self, a: &SwiGluKept) -> Result<()> {
        const OP: GradientKind = GradientKind::SwiGluKept;
        a.check()?;
        self.in_f32(OP)?;
        let Mat { rows, cols: width, .. } = a.out;
        self.account(Gradient::SwiGluKept(*a), rows_only(rows))?;
        if rows == 0 {
            return Ok(());
        }
        let [gate, up, out] = self.mats(OP, [a.gate, a.up, a.out])?;
        self.gate_up(OP.into(), &a.of, rows, [gate, up])?;
        let args = SiluMulArgs { gate, up, out, rows: rows as u32, width: width as u32 };
        self.launch(OP, self.functions.silu_mul, a_row_a_block(rows, width), &args)
    }

    fn swiglu_backward(&mut self, a: &SwiGluBackward) -> Result<()> {
        const OP: GradientKind = GradientKind::SwiGluBackward;
        a.check()?;
        self.in_f32(OP)?;
        let (Mat { rows, cols: width, .. }, dots) = (a.d_act, a.dots.map(|(_, dots)| dots));
        let mats = [a.d_act, a.d_gate, a.d_up, dots.unwrap_or(Self::no_mat())];
        let [d_act, gate, up, dots_at] = self.mats(OP, mats)?;
        let [index] = self.int(OP, [a.dots.map_or(Ints { offset: 0, len: 0 }, |(at, _)| at)])?;
        self.account(Gradient::SwiGluBackward(*a), rows_only(rows))?;
        if rows == 0 {
            return Ok(());
        }
        if let Some(of) = &a.again {
            self.gate_up(OP.into(), of, rows, [gate, up])?;
        }
        let args = SwiGluBackwardArgs {
            d_act: d_act.cast(),
            gate: gate.cast(),
            up: up.cast(),
            index: if dots.is_some() { index } else { null() },
            dots: pointer(dots, dots_at),
            width: width as u32,
        };
        self.launch(OP, self.functions.backward.swiglu, a_row_a_block(rows, width), &args)
    }

    fn attend_backward(&mut self, a: &AttendBackward) -> Result<()> {
        const OP: GradientKind = GradientKind::AttendBackward;
        a.check()?;
        self.in_f32(OP)?;
        let mats = [a.q, a.out, a.d_out, a.d_q, a.d_k, a.d_v];
        let [_, _, d_out, d_q, d_k, d_v] = self.mats(OP, mats)?;
        let [kv_start] = self.int(OP, [a.kv_start])?;
        let (rows, d, slots) = (a.rows.len, a.head_dim, a.kv_start.len - 1);
        let heads = a.q.cols / d;
        let ints = [a.rows, a.row_slot, a.first, a.end];
        let op = Gradient::AttendBackward(*a);
        let attend = self.attention(op, ints, (a.q, a.out), (a.layer, d, a.scale))?;
        let stats = self.scratch(stats_bytes(rows, heads) + bounds_bytes(slots))?;
        let bounds = stats.plus(stats_bytes(rows, heads));
        self.device.clear(bounds, bounds_bytes(slots))?;
        let args = AttendBackwardArgs {
            attend,
            d_out: d_out.cast(),
            d_q: d_q.cast(),
            d_k: d_k.cast(),
            d_v: d_v.cast(),
            kv_start,
            slots: slots as u32,
            stats: stats.0 as *mut f32,
            bounds: bounds.0 as *mut u32,
        };
        let padded = HEADS.iter().position(|&padded| d <= padded).expect("256 at most");
        // Rows of the tile that walks by; of Q and its gradient there are two where there is room.
        let (others, tiles) = if HEADS[padded] > 128 { (16, 1) } else { (32, 2) };
        let shared = |tiles: usize, weights: usize| {
            4 * ((2 * TILE + tiles * others) * (d + 4) + weights * TILE * (others + 4)) as u32
        };
        let kv_heads = a.kv_heads as u32;
        let Backward { attend_q, attend_kv, .. } = self.functions.backward;
        let blocks = (rows * heads / a.kv_heads).div_ceil(TILE) as u32;
        let launch = Launch { grid: [blocks, kv_heads, 1], threads: 128, shared: shared(1, 1) };
        self.launch(OP, attend_q[padded], launch, &args)?;
        // The K/V rows of each slot begin a tile of their own.
        let blocks = (a.d_k.rows.div_ceil(TILE) + slots) as u32;
        let launch = Launch { grid: [blocks, kv_heads, 1], threads: 128, shared: shared(tiles, 2) };
        self.launch(OP, attend_kv[padded], launch, &args)
    }

    fn rope_backward(&mut self, a: &RopeBackward) -> Result<()> {
        const OP: GradientKind = GradientKind::RopeBackward;
        a.check()?;
        let (d, rows) = (a.head_dim, a.rows.len);
        ensure!(d.is_multiple_of(16), Unsupported, "rope_backward: heads of {d}, which is no multiple of 16");
        let norm_src = a.norm.map_or(Self::no_mat(), |norm| norm.src);
        let [angles, grads, src] = self.mats(OP, [a.angles, a.d, norm_src])?;
        let [index] = self.int(OP, [a.rows])?;
        let heads = a.d.cols / d;
        let args = RopeBackwardArgs {
            angles: angles.cast(),
            index,
            d: grads.cast(),
            norm: self.vector_or_null(a.norm.map(|norm| norm.weight)),
            src: src.cast(),
            eps: a.norm.map_or(0.0, |norm| norm.eps),
            rows: rows as u32,
            heads: heads as u32,
            head_dim: d as u32,
        };
        self.account(Gradient::RopeBackward(*a), rows_only(rows))?;
        let lanes = (d / 16).next_power_of_two();
        self.launch(OP, self.functions.backward.rope, threads(rows * heads * lanes), &args)
    }

    fn attend_apart(&mut self, a: &AttendApart) -> Result<()> {
        const OP: GradientKind = GradientKind::AttendApart;
        a.check()?;
        self.in_f32(OP)?;
        let [_, k, v, _] = self.mats(OP, [a.q, a.k, a.v, a.out])?;
        let (d, ints) = (a.head_dim, [a.rows, a.row_slot, a.first, a.end]);
        let attend = self.attention(Gradient::AttendApart(*a), ints, (a.q, a.out), (a.layer, d, a.scale))?;
        let args = AttendApartArgs { attend, k: k.cast(), v: v.cast() };
        let blocks = (a.rows.len * a.q.cols / d / a.kv_heads).div_ceil(TILE) as u32;
        let shared = 4 * (2 * TILE * (d + 4) + TILE * (TILE + 4)) as u32;
        let launch = Launch { grid: [blocks, a.kv_heads as u32, 1], threads: 128, shared };
        self.launch(OP, self.functions.backward.attend_apart, launch, &args)
    }

    fn row_dots(&mut self, args: &RowDots) -> Result<()> {
        const OP: GradientKind = GradientKind::RowDots;
        args.check()?;
        let (width, c) = (args.a.cols, args.bias.map_or(Self::no_mat(), |(c, _)| c));
        ensure!(
            width.is_multiple_of(8) && c.cols.is_multiple_of(8),
            Unsupported,
            "row_dots: rows of {width} and {}, which are no multiples of 8",
            c.cols
        );
        let [a, b, c_at, out] = self.mats(OP, [args.a, args.b, c, args.out])?;
        let [index] = self.int(OP, [args.rows])?;
        let launched = RowDotsArgs {
            a: a.cast(),
            b: b.cast(),
            index,
            c: c_at.cast(),
            bias: self.vector_or_null(args.bias.map(|(_, bias)| bias)),
            out: out.cast(),
            width: width as u32,
            bias_width: c.cols as u32,
        };
        self.account(Gradient::RowDots(*args), rows_only(args.rows.len))?;
        let launch = a_row_a_block(args.rows.len, width.max(c.cols));
        self.launch(OP, self.functions.backward.row_dots, launch, &launched)
    }

    fn gate_backward(&mut self, a: &GateBackward) -> Result<()> {
        const OP: GradientKind = GradientKind::GateBackward;
        a.check()?;
        let (rows, width) = (a.d_mask.rows, a.h.cols);
        let [logits, d_mask, h, d_router] = self.mats(OP, [a.logits, a.d_mask, a.h, a.d_router])?;
        let [sequences] = self.int(OP, [a.sequences.unwrap_or(Ints { offset: 0, len: 0 })])?;
        let chunks = rows.div_ceil(GATE_ROWS as usize);
        let args = GateBackwardArgs {
            sequences: if a.sequences.is_some() { sequences } else { null() },
            logits: logits.cast(),
            d_mask: d_mask.cast(),
            h: h.cast(),
            partial: self.scratch(4 * chunks * width)?.0 as *mut f32,
            d_router: d_router.cast(),
            penalty: a.penalty,
            rows: rows as u32,
            width: width as u32,
        };
        self.account(Gradient::GateBackward(*a), rows_only(rows))?;
        let [slopes, partial, sum] = self.functions.backward.gate;
        let launch = match a.sequences {
            None => threads(rows),
            Some(starts) => Launch { grid: [starts.len.saturating_sub(1) as u32, 1, 1], threads: 256, shared: 0 },
        };
        self.launch(OP, slopes, launch, &args)?;
        let columns = threads(width);
        let grid = [columns.grid[0], chunks as u32, 1];
        self.launch(OP, partial, Launch { grid, ..columns }, &args)?;
        self.launch(OP, sum, columns, &args)
    }
}
