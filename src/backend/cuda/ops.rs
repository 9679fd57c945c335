//! The ops as launches: which kernel, of which geometry, with which arguments.

use std::ptr::null;

use super::device::{Function, Gemm, Launch};
use super::gradients::Backward;
use super::kernels::RowSet; // the kernels', not the contract's
use super::kernels::*;
use super::*;
use crate::backend as ops;

/// The kernels, found once: for one type of activations, and one of K/V.
pub struct Functions {
    embed: Function,
    rope_angles: Function,
    norm_gate: Function,
    gather: Function,
    pub scatter: Function,
    pub(super) silu_mul: Function,
    bias: Function,
    bias_f32: Function,
    logprobs: Function,
    noise: Function,
    sample_groups: Function,
    sample_select: Function,
    sample_weigh: Function,
    sample_draw: Function,
    put_ints: Function,
    route: Function,
    rope_append: Function,
    /// By the least number of rows of a tile that holds them: see [`TILES`].
    store: [Function; 4],
    add: [Function; 4],
    logits: [Function; 4],
    swiglu: [Function; 4],
    /// By the padded head_dim: see [`HEADS`].
    prefill: [Function; 6],
    decode: [Function; 6],
    pub backward: Backward,
}

/// Rows of the tiles of the streaming products.
const TILES: [usize; 4] = [8, 16, 32, 64];
/// Rows from which on products go through cuBLASLt: to there, weights are what counts.
const MANY_ROWS: usize = 64;
/// Values of head_dim that attention is compiled for; others are padded to the next.
const HEADS: [usize; 6] = [32, 64, 80, 96, 128, 256];
/// Values of head_dim that attend_hopper is compiled for.
pub const HOPPER_HEADS: [usize; 2] = [64, 128];
/// Blocks for each multiprocessor that the K/V of a decode step are dealt out to: as many as it holds. An H100, 8192 rows of
/// K/V: 19.8 us, with 4 of them 25.0, with 1 23.2.
const BLOCKS_EACH: usize = 2;

const _: () = assert!(SAMPLE_DRAW as usize == Draw::WORDS && super::kernels::SAMPLE_NONE == ops::SAMPLE_NONE);

impl Functions {
    /// Errors: Device when one is missing.
    pub fn find(device: &mut dyn Device, dtype: DType, kv: DType) -> Result<Self> {
        let mut find = |name: &str| device.function(name);
        macro_rules! of_type {
            ($name:literal) => {
                find(&format!("{}_{dtype}", $name))?
            };
        }
        let mut set = [Function(0); 4];
        let mut tiles = |name: &str, find: &mut dyn FnMut(&str) -> Result<Function>| -> Result<[Function; 4]> {
            for (function, rows) in set.iter_mut().zip(TILES) {
                let tile = if dtype == DType::F32 { String::new() } else { format!("_{rows}") };
                *function = find(&format!("{name}_{dtype}{tile}"))?;
            }
            Ok(set)
        };
        let mut set = [Function(0); 6];
        let mut heads = |name: &str, find: &mut dyn FnMut(&str) -> Result<Function>| -> Result<[Function; 6]> {
            for (function, head_dim) in set.iter_mut().zip(HEADS) {
                let padded = if kv == DType::F32 { String::new() } else { format!("_{head_dim}") };
                *function = find(&format!("{name}_{kv}{padded}"))?;
            }
            Ok(set)
        };
        Ok(Functions {
            embed: of_type!("embed"),
            rope_angles: find("rope_angles")?,
            norm_gate: of_type!("norm_gate"),
            gather: find("gather")?,
            scatter: find("scatter")?,
            silu_mul: of_type!("silu_mul"),
            bias: of_type!("bias"),
            bias_f32: find("bias_f32")?,
            logprobs: find("logprobs")?,
            noise: of_type!("noise"),
            sample_groups: find("sample_groups")?,
            sample_select: find("sample_select")?,
            sample_weigh: find("sample_weigh")?,
            sample_draw: find("sample_draw")?,
            put_ints: find("put_ints")?,
            route: find("route")?,
            rope_append: of_type!("rope_append"),
            store: tiles("skinny_store", &mut find)?,
            add: tiles("skinny_add", &mut find)?,
            logits: tiles("skinny_logits", &mut find)?,
            swiglu: tiles("skinny_swiglu", &mut find)?,
            prefill: heads("attend_prefill", &mut find)?,
            decode: heads("attend_decode", &mut find)?,
            backward: Backward::find(&mut find)?,
        })
    }
}

pub(super) fn type_of(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => TYPE_F32,
        DType::F16 => TYPE_F16,
        DType::BF16 => TYPE_BF16,
    }
}

/// A block a row, with a thread for 8 numbers of it.
pub(super) fn a_row_a_block(rows: usize, width: usize) -> Launch {
    let threads = width.div_ceil(8).next_multiple_of(32).clamp(32, 256) as u32;
    Launch { grid: [rows as u32, 1, 1], threads, shared: 0 }
}

impl CudaBackend {
    /// Where a matrix stands. Errors: Shape when it lies outside the arena.
    pub(super) fn place(&self, m: Mat) -> Result<Address> {
        let end = m.offset.checked_add(m.bytes()).filter(|&end| end <= self.arena.bytes);
        ensure!(end.is_some(), Shape, "buffers outside the arena: {m:?} of {} bytes", self.arena.bytes);
        Ok(self.arena.start.plus(m.offset))
    }

    /// The matrices of an op, which do not overlap.
    pub(super) fn mats<const N: usize>(&self, op: impl Into<AnyKind>, mats: [Mat; N]) -> Result<[*mut c_void; N]> {
        let op = op.into();
        for (i, a) in mats.iter().enumerate() {
            self.place(*a).map_err(|e| e.during(op.name()))?;
            for b in &mats[..i] {
                let shared = a.offset < b.offset + b.bytes() && b.offset < a.offset + a.bytes();
                ensure!(!shared, Shape, "{}: buffers that are shared: {a:?} and {b:?}", op.name());
            }
        }
        Ok(mats.map(|m| self.arena.start.plus(m.offset).0 as *mut c_void))
    }

    /// Integers of an op, which lie in the arena.
    pub(super) fn int<const N: usize>(&self, op: impl Into<AnyKind>, ints: [Ints; N]) -> Result<[*mut u32; N]> {
        let op = op.into();
        for i in ints {
            let end = i.offset.checked_add(i.len).filter(|&end| 4 * end <= self.ints.bytes);
            ensure!(end.is_some(), Shape, "{}: integers outside the arena: {i:?}", op.name());
        }
        Ok(ints.map(|i| self.ints.start.plus(4 * i.offset).0 as *mut u32))
    }

    pub(super) fn set(&self, op: impl Into<AnyKind>, rows: &ops::RowSet) -> Result<RowSet> {
        let none = Ints { offset: 0, len: 0 };
        let [index, count] = self.int(op, [rows.index, rows.count.unwrap_or(none)])?;
        let count = if rows.count.is_some() { count.cast_const() } else { null() };
        Ok(RowSet { index, count, bound: rows.bound as u32 })
    }

    fn matrix(&self, op: impl Into<AnyKind>, w: Weight) -> Result<*const c_void> {
        let (op, aligned) = (op.into(), w.cols.is_multiple_of(8));
        ensure!(aligned, Unsupported, "{}: a [{}, {}] weight: rows are multiples of 8 long", op.name(), w.rows, w.cols);
        Ok(self.weights[w.id].matrix.0 as *const c_void)
    }

    /// A weight whose products other ops read.
    pub(super) fn inner_matrix(&self, op: impl Into<AnyKind>, w: Weight) -> Result<*const c_void> {
        let (op, aligned) = (op.into(), w.rows.is_multiple_of(8));
        ensure!(aligned, Unsupported, "{}: {} columns, which is no multiple of 8", op.name(), w.rows);
        self.matrix(op, w)
    }

    pub(super) fn vector(&self, w: Weight) -> *const f32 {
        self.weights[w.id].vector.0 as *const f32
    }

    pub(super) fn vector_or_null(&self, w: Option<Weight>) -> *const f32 {
        w.map_or(null(), |w| self.vector(w))
    }

    pub(super) fn layer(&self, layer: usize) -> KvLayer {
        let Pool { layout, data, positions, tables, lens, .. } = self.kv();
        let int = |at: usize| self.ints.start.plus(4 * at).0 as *mut u32;
        KvLayer {
            data: data.0 as *mut c_void,
            positions: positions.0 as *mut u32,
            tables: int(tables + layer * layout.slots * layout.pages_per_seq),
            lens: int(lens + layer * layout.slots),
            pages_per_seq: layout.pages_per_seq as u32,
            kv_heads: layout.kv_heads as u32,
            head_dim: layout.head_dim as u32,
            type_: type_of(layout.dtype),
        }
    }

    /// Sends what the host has written.
    pub(super) fn send(&mut self) -> Result<()> {
        if self.starts.is_empty() {
            return Ok(());
        }
        let runs = self.starts.len();
        self.words.clear();
        self.words.extend_from_slice(&self.starts);
        self.words.extend_from_slice(&self.runs);
        self.device.copy_in(self.staged, bytemuck::cast_slice(&self.words))?;
        let starts = self.staged.0 as *const u32;
        let args = PutIntsArgs {
            runs: self.staged.plus(4 * runs).0 as *const u32,
            starts,
            ints: self.ints.start.0 as *mut u32,
        };
        let launch = Launch { grid: [runs as u32, 1, 1], threads: 64, shared: 0 };
        self.launch_only(self.functions.put_ints, launch, &args)?;
        self.starts.clear();
        self.runs.clear();
        self.pending.clear();
        Ok(())
    }

    pub(super) fn launch<A>(
        &mut self,
        op: impl Into<AnyKind>,
        function: Function,
        launch: Launch,
        args: &A,
    ) -> Result<()> {
        let op = op.into();
        if !matches!(op, AnyKind::Forward(OpKind::Logits | OpKind::Sample)) {
            self.best_of = None;
        }
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.send()?;
        self.launch_only(function, launch, args).map_err(|e| e.during(op.name()))
    }

    fn launch_only<A>(&mut self, function: Function, launch: Launch, args: &A) -> Result<()> {
        // SAFETY: each op gives the struct of its kernel, with addresses of buffers that `check` and `mats`, `int` and
        // `scratch` have found large enough.
        unsafe { self.device.launch(function, launch, (&raw const *args).cast(), size_of::<A>()) }
    }

    pub(super) fn gemm(&mut self, op: impl Into<AnyKind>, gemm: &Gemm) -> Result<()> {
        self.send()?;
        // SAFETY: as for `launch_only`.
        unsafe { self.device.gemm(gemm) }.map_err(|e| e.during(op.into().name()))
    }

    /// Counters for an op whose rows only the device knows; null when `known`, and the meter has it then.
    pub(super) fn account(&mut self, op: impl Into<AnyOp>, known: Option<Work>) -> Result<*mut WorkCount> {
        let op = op.into();
        match known {
            Some(work) => {
                self.accounts.meter.add(op.kind(), op.cost(work));
                if op.kind() == AnyKind::Forward(OpKind::RopeAppend) {
                    self.accounts.meter.kv_rows += work.kv_rows as u64;
                }
                Ok(std::ptr::null_mut())
            }
            None => self.accounts.slot(self.device.as_mut(), op),
        }
    }

    /// Few rows, or nobody here knows how many.
    fn is_skinny(rows: &ops::RowSet) -> bool {
        rows.count.is_some() || rows.bound <= MANY_ROWS
    }

    /// The kernel for so many rows, and its launch over the columns of some products.
    fn skinny(&self, op: OpKind, bound: usize, columns: &[usize]) -> (Function, Launch) {
        // As STAGES_OF in skinny_gemm.cu.
        let (kernels, parts, stages) = match op {
            OpKind::Qkv => (self.functions.store, 1, 6),
            OpKind::Logits => (self.functions.logits, 1, 6),
            OpKind::SwiGlu => (self.functions.swiglu, 2, 4),
            _ => (self.functions.add, 1, 4), // ProjectAdd
        };
        let tile = TILES.iter().position(|&rows| bound <= rows).unwrap_or(3);
        let (rows, wide, shared) = match self.info.activations {
            DType::F32 => (8, 8, 0),
            _ => {
                let bands = if tile >= 2 && parts == 1 { 2 } else { 1 };
                let sources = if tile < 2 { tile + 1 } else { 0 };
                let stages = if tile == 0 { stages } else { 4 };
                (TILES[tile], 16 * bands, stages * 256 * 16 * (2 * bands * parts + sources))
            }
        };
        let blocks = columns.iter().map(|n| n.div_ceil(wide)).sum::<usize>();
        let grid = [blocks as u32, bound.div_ceil(rows) as u32, 1];
        (kernels[tile], Launch { grid, threads: 256, shared: shared as u32 })
    }

    pub(super) fn product(&self, weight: Weight, src: Address, m: usize, out: Address, out_dtype: DType) -> Gemm {
        Gemm {
            weight: self.weights[weight.id].matrix,
            src,
            out,
            m,
            n: weight.rows,
            k: weight.cols,
            dtype: self.info.activations,
            out_dtype,
            add: false,
            backward: false,
        }
    }

    /// `out = bias`, or `out += bias`, where there is one: before the product, which is added to it.
    pub(super) fn bias(&mut self, op: impl Into<AnyKind>, bias: Option<Weight>, gemm: &Gemm) -> Result<()> {
        let Some(bias) = bias else { return Ok(()) };
        let (out, rows) = (gemm.out, gemm.m);
        let f32s = gemm.out_dtype == DType::F32;
        let function = if f32s { self.functions.bias_f32 } else { self.functions.bias };
        let width = bias.cols;
        let args = BiasArgs {
            out: out.0 as *mut c_void,
            bias: self.vector(bias),
            rows: rows as u32,
            width: width as u32,
            add: gemm.add.into(),
        };
        self.launch(op, function, a_row_a_block(rows, width), &args)
    }

    /// Blocks that keep the device busy.
    fn decode_blocks(&self) -> usize {
        BLOCKS_EACH * self.device.description().multiprocessors as usize
    }

    /// Blocks for each K/V head that up to so many rows may ask for, whatever their lengths: each row for one, and all of
    /// them for [`decode_blocks`](Self::decode_blocks) more.
    fn units(&self, rows: usize, kv_heads: usize, pages_per_seq: usize) -> usize {
        let longest = rows * pages_per_seq.div_ceil(DECODE_PAGES as usize).max(1);
        longest.min(rows + self.decode_blocks().div_ceil(kv_heads.max(1)))
    }

    /// What the largest op needs.
    pub(super) fn scratch_for(&self, l: &Largest, kv: &KvLayout) -> usize {
        let size = self.info.activations.size();
        let gathered = l.chunk * l.hidden * size;
        let scattered = l.chunk * l.hidden * 4;
        let up = l.chunk * l.intermediate * size;
        let route = (l.rows + 1) * 4;
        let partial = self.units(kv.slots, kv.kv_heads, kv.pages_per_seq) * l.heads * (kv.head_dim + 2) * 4;
        // A batch is drawn from; more logits than that have their best noted, too.
        let sample = Sampling::of(kv.slots, l.vocab).bytes.max(Sampling::of(MANY_ROWS, l.vocab).keys);
        [gathered, scattered, up, route, partial, sample].into_iter().max().unwrap_or(0)
    }
}

impl Ops for CudaBackend {
    fn embed(&mut self, a: &Embed) -> Result<()> {
        const OP: OpKind = OpKind::Embed;
        a.check()?;
        let ([out], [ids]) = (self.mats(OP, [a.out])?, self.int(OP, [a.ids])?);
        let (rows, width) = (a.ids.len, a.table.cols);
        let table = self.matrix(OP, a.table)?;
        let args = EmbedArgs { table, ids, out: out.cast(), rows: rows as u32, width: width as u32 };
        self.account(Op::Embed(*a), Some(Work { rows, ..Work::default() }))?;
        self.launch(OP, self.functions.embed, a_row_a_block(rows, width), &args)
    }

    fn rope_angles(&mut self, a: &RopeAngles) -> Result<()> {
        const OP: OpKind = OpKind::RopeAngles;
        a.check()?;
        let ([out], [pos]) = (self.mats(OP, [a.out])?, self.int(OP, [a.pos])?);
        let (rows, half) = (a.pos.len, a.inv_freq.cols);
        let inv_freq = self.vector(a.inv_freq);
        let args = RopeAnglesArgs { pos, inv_freq, out: out.cast(), rows: rows as u32, half: half as u32 };
        self.account(Op::RopeAngles(*a), Some(Work { rows, ..Work::default() }))?;
        self.launch(OP, self.functions.rope_angles, a_row_a_block(rows, 8 * half), &args)
    }

    fn norm_gate(&mut self, a: &NormGate) -> Result<()> {
        const OP: OpKind = OpKind::NormGate;
        a.check()?;
        let none = a.x.rows(0..0);
        let wanted = [a.x, a.out.unwrap_or(none), a.gate.map_or(none, |gate| gate.logits)];
        let [x, out, logits] = self.mats(OP, wanted)?;
        let width = a.x.cols;
        ensure!(width.is_multiple_of(8), Unsupported, "norm_gate: rows of {width}, which is no multiple of 8");
        let rows = self.set(OP, &a.rows)?;
        let known = a.rows.count.is_none().then_some(Work { rows: a.rows.bound, ..Work::default() });
        let args = NormGateArgs {
            x: x.cast(),
            rows,
            weight: self.vector(a.weight),
            eps: a.eps,
            width: width as u32,
            out: if a.out.is_some() { out } else { std::ptr::null_mut() },
            router: a.gate.map_or(null(), |gate| self.vector(gate.router)),
            logits: logits.cast(),
            work: self.account(Op::NormGate(*a), known)?,
        };
        self.launch(OP, self.functions.norm_gate, a_row_a_block(a.rows.bound, width), &args)
    }

    fn route(&mut self, a: &Route) -> Result<()> {
        const OP: OpKind = OpKind::Route;
        a.check()?;
        let [logits] = self.mats(OP, [a.logits])?;
        let inputs = [a.pos, a.seq_start, a.slots, a.decided, a.cuts];
        let [pos, seq_start, slots, decided, cut_rows] = self.int(OP, inputs)?;
        let outputs = [a.active, a.active_at, a.first, a.end, a.kv_row];
        let [active, active_at, first, end, kv_row] = self.int(OP, outputs)?;
        let rows = a.pos.len;
        let (decide, share) = match a.decide {
            Decide::All => (ROUTE_ALL, 0.0),
            Decide::Threshold(threshold) => (ROUTE_THRESHOLD, threshold),
            Decide::TopK(share) => (ROUTE_TOP_K, share),
            Decide::Sequence(threshold) => (ROUTE_SEQUENCE, threshold),
        };
        let args = RouteArgs {
            logits: logits.cast_const().cast(),
            pos,
            seq_start,
            slots,
            decided,
            cut_rows,
            active,
            active_at,
            first,
            end,
            kv_row,
            scratch: self.scratch(4 * (rows + 1))?.0 as *mut u32,
            kv: self.layer(a.layer),
            rows: rows as u32,
            seqs: a.slots.len as u32,
            cuts: a.cuts.len as u32,
            decide,
            share,
            // A window that no position reaches is none.
            window: a.window.and_then(|w| u32::try_from(w).ok()).unwrap_or(0),
            queries_active: u32::from(a.queries == Take::Active),
            keys_active: u32::from(a.keys == Take::Active),
        };
        self.account(Op::Route(*a), Some(Work { rows, ..Work::default() }))?;
        let threads = rows.next_multiple_of(32).clamp(32, 1024) as u32;
        self.launch(OP, self.functions.route, Launch { grid: [1, 1, 1], threads, shared: 0 }, &args)
    }

    fn qkv(&mut self, a: &Qkv) -> Result<()> {
        const OP: OpKind = OpKind::Qkv;
        a.check()?;
        let [h, q, k, v] = self.mats(OP, [a.h, a.q, a.k, a.v])?;
        let sets = [a.q_rows, a.kv_rows];
        let known = sets.iter().all(|set| set.count.is_none());
        let work = Work { rows: a.q_rows.bound, kv_rows: a.kv_rows.bound, pairs: 0 };
        let work = self.account(Op::Qkv(*a), known.then_some(work))?;
        let outs = [(a.q, q), (a.k, k), (a.v, v)];
        if sets.iter().any(|set| set.count.is_some()) || sets.iter().all(Self::is_skinny) {
            let rows = [self.set(OP, &a.q_rows)?, self.set(OP, &a.kv_rows)?];
            let mut of = [Product { weight: null(), bias: null(), out: q, n: 0, set: 0 }; 3];
            for (i, product) in of.iter_mut().enumerate() {
                *product = Product {
                    weight: self.inner_matrix(OP, a.weights[i])?,
                    bias: self.vector_or_null(a.biases[i]),
                    out: outs[i].1,
                    n: a.weights[i].rows as u32,
                    set: u32::from(i > 0),
                };
            }
            let args = SkinnyArgs {
                src: h,
                k: a.h.cols as u32,
                base: a.base as u32,
                rows,
                of,
                best: std::ptr::null_mut(),
                work,
            };
            let bound = a.q_rows.bound.max(a.kv_rows.bound);
            let columns = a.weights.map(|w| w.rows);
            let (function, launch) = self.skinny(OP, bound, &columns);
            return self.launch(OP, function, launch, &args);
        }
        let mut gathered: Option<(usize, Address)> = None;
        for (i, (_, out)) in outs.into_iter().enumerate() {
            let (set, weight) = (&sets[usize::from(i > 0)], a.weights[i]);
            self.inner_matrix(OP, weight)?;
            if set.bound == 0 {
                continue;
            }
            let src = match (set.run, gathered) {
                (Some(run), _) => Address(h as u64).plus((run - a.base) * a.h.cols * a.h.dtype.size()),
                (None, Some((which, at))) if which == usize::from(i > 0) => at,
                _ => {
                    let at = self.gathered(OP, Address(h as u64), a.h, set, a.base)?;
                    gathered = Some((usize::from(i > 0), at));
                    at
                }
            };
            let out = Address(out as u64);
            let gemm = self.product(weight, src, set.bound, out, self.info.activations);
            self.bias(OP, a.biases[i], &gemm)?;
            self.gemm(OP, &Gemm { add: a.biases[i].is_some(), ..gemm })?;
        }
        Ok(())
    }

    fn rope_append(&mut self, a: &RopeAppend) -> Result<()> {
        const OP: OpKind = OpKind::RopeAppend;
        a.check()?;
        let [angles, q, k, v] = self.mats(OP, [a.angles, a.q, a.k, a.v])?;
        let [pos, row_slot, kv_row] = self.int(OP, [a.pos, a.row_slot, a.kv_row])?;
        let known = a.q_rows.count.is_none() && a.kv_rows.count.is_none();
        let work = Work { rows: a.q_rows.bound, kv_rows: a.kv_rows.bound, pairs: 0 };
        let (d, heads, kv_heads) = (a.head_dim, a.q.cols / a.head_dim, a.k.cols / a.head_dim);
        ensure!(d == self.kv().layout.head_dim, Shape, "rope_append: heads of {d} for another cache");
        let args = RopeAppendArgs {
            angles: angles.cast(),
            pos,
            row_slot,
            q_rows: self.set(OP, &a.q_rows)?,
            kv_rows: self.set(OP, &a.kv_rows)?,
            kv_row,
            q,
            k,
            v,
            q_norm: self.vector_or_null(a.q_norm),
            k_norm: self.vector_or_null(a.k_norm),
            eps: a.eps,
            heads: heads as u32,
            kv: self.layer(a.layer),
            work: self.account(Op::RopeAppend(*a), known.then_some(work))?,
        };
        let lanes = (d / 16).next_power_of_two();
        let threads = (a.q_rows.bound * heads + a.kv_rows.bound * kv_heads) * lanes;
        let launch = Launch { grid: [threads.div_ceil(256) as u32, 1, 1], threads: 256, shared: 0 };
        self.launch(OP, self.functions.rope_append, launch, &args)
    }

    fn attend(&mut self, a: &Attend) -> Result<()> {
        const OP: OpKind = OpKind::Attend;
        a.check()?;
        let [q, out] = self.mats(OP, [a.q, a.out])?;
        let [row_slot, first, end] = self.int(OP, [a.row_slot, a.first, a.end])?;
        let (d, heads) = (a.head_dim, a.q.cols / a.head_dim);
        let (group, bound) = (heads / a.kv_heads, a.rows.bound);
        let pages_per_seq = self.kv().layout.pages_per_seq;
        ensure!(d == self.kv().layout.head_dim, Shape, "attend: heads of {d} for another cache");
        // Rows are known to have no work only when there are none.
        let work = self.account(Op::Attend(*a), (bound == 0).then(Work::default))?;
        let padded = HEADS.iter().position(|&padded| d <= padded).expect("256 at most");
        let f32s = self.info.kv == DType::F32;
        // One row shares its K/V with nobody either.
        let decode = a.single || bound == 1;
        let units = if decode { self.units(bound, a.kv_heads, pages_per_seq) } else { 0 };
        let tickets = 4 * bound * a.kv_heads;
        if decode && tickets > self.tickets.bytes {
            ensure!(!self.recording, Memory, "a step of more rows than were planned");
            self.tickets = self.region(tickets)?;
            self.device.clear(self.tickets.start, tickets)?;
        }
        let partial = if units > bound { self.scratch(units * heads * (d + 2) * 4)? } else { Address(0) };
        let args = AttendArgs {
            q,
            out,
            rows: self.set(OP, &a.rows)?,
            row_slot,
            first,
            end,
            kv: self.layer(a.layer),
            heads: heads as u32,
            type_: type_of(self.info.activations),
            scale: a.scale,
            blocks: self.decode_blocks() as u32,
            partial: partial.0 as *mut f32,
            tickets: self.tickets.start.0 as *mut u32,
            work,
        };
        let kv_heads = a.kv_heads as u32;
        let hopper = HOPPER_HEADS.iter().position(|&head_dim| d == head_dim);
        if let (false, Some(pool), Some(kernels), Some(which)) = (decode, self.kv().map, self.hopper, hopper) {
            let grid = [(bound * group).div_ceil(128) as u32, kv_heads, 1];
            let launch = Launch { grid, threads: 384, shared: ((4 * 128 + 128) * d * 2 + 2 * 1024) as u32 };
            return self.launch(OP, kernels[which], launch, &AttendHopperArgs { pool, attend: args });
        }
        let (function, grid, shared) = if decode {
            let shared = 4 * group.min(16) * (d + 2) * 4;
            (self.functions.decode[padded], [units as u32, kv_heads, 1], shared)
        } else {
            let rows = if f32s { 32 } else { 64 };
            let hd = HEADS[padded];
            let shared = match (f32s, hd) {
                (true, _) => ((32 + 32) * (d + 4) + 32 * 36) * 4,
                (false, 256) => (4 * 32 + 64) * (256 + 8) * 2,
                (false, _) => 4 * 64 * (hd + 8) * 2,
            };
            (self.functions.prefill[padded], [(bound * group).div_ceil(rows) as u32, kv_heads, 1], shared)
        };
        self.launch(OP, function, Launch { grid, threads: 128, shared: shared as u32 }, &args)
    }

    fn project_add(&mut self, a: &ProjectAdd) -> Result<()> {
        const OP: OpKind = OpKind::ProjectAdd;
        a.check()?;
        let [src, x] = self.mats(OP, [a.src, a.x])?;
        let (n, bound) = (a.weight.rows, a.rows.bound);
        let known = a.rows.count.is_none().then_some(Work { rows: bound, ..Work::default() });
        let work = self.account(Op::ProjectAdd(*a), known)?;
        let (weight, bias) = (self.inner_matrix(OP, a.weight)?, self.vector_or_null(a.bias));
        let rows = self.set(OP, &a.rows)?;
        if Self::is_skinny(&a.rows) {
            let of = Product { weight, bias, out: x, n: n as u32, set: 0 };
            let (function, launch) = self.skinny(OP, bound, &[n]);
            return self.launch(OP, function, launch, &one_product(src, a.src.cols, rows, of, work));
        }
        let src = Address(src as u64);
        if let Some(run) = a.rows.run {
            let out = Address(x as u64).plus(run * n * 4);
            let gemm = Gemm { add: true, ..self.product(a.weight, src, bound, out, DType::F32) };
            self.bias(OP, a.bias, &gemm)?;
            return self.gemm(OP, &gemm);
        }
        let made = self.scratch(bound * n * 4)?;
        let gemm = self.product(a.weight, src, bound, made, DType::F32);
        self.gemm(OP, &gemm)?;
        let args = ScatterArgs { src: made.0 as *const f32, bias, rows, width: n as u32, add: 1, x: x.cast() };
        self.launch(OP, self.functions.scatter, a_row_a_block(bound, n), &args)
    }

    fn swiglu(&mut self, a: &SwiGlu) -> Result<()> {
        const OP: OpKind = OpKind::SwiGlu;
        a.check()?;
        let [h, out] = self.mats(OP, [a.h, a.out])?;
        let (n, bound) = (a.gate.rows, a.rows.bound);
        let known = a.rows.count.is_none().then_some(Work { rows: bound, ..Work::default() });
        let work = self.account(Op::SwiGlu(*a), known)?;
        let weights = [self.inner_matrix(OP, a.gate)?, self.inner_matrix(OP, a.up)?];
        if Self::is_skinny(&a.rows) {
            let biases = [a.gate_bias, a.up_bias].map(|bias| self.vector_or_null(bias));
            let rows = self.set(OP, &a.rows)?;
            let of = |i: usize| Product { weight: weights[i], bias: biases[i], out, n: n as u32, set: 0 };
            let mut args = one_product(h, a.h.cols, rows, of(0), work);
            args.of[1] = of(1);
            let (function, launch) = self.skinny(OP, bound, &[n]);
            return self.launch(OP, function, launch, &args);
        }
        let up = self.scratch(bound * n * self.info.activations.size())?.0 as *mut c_void;
        let of = GateUp { h: a.h, gate: a.gate, up: a.up, gate_bias: a.gate_bias, up_bias: a.up_bias };
        self.gate_up(OP.into(), &of, bound, [out, up])?;
        let args = SiluMulArgs { gate: out, up, out, rows: bound as u32, width: n as u32 };
        self.launch(OP, self.functions.silu_mul, a_row_a_block(bound, n), &args)
    }

    fn logits(&mut self, a: &ops::Logits) -> Result<()> {
        const OP: OpKind = OpKind::Logits;
        a.check()?;
        let [h, out] = self.mats(OP, [a.h, a.out])?;
        let (rows, n) = (a.out.rows, a.weight.rows);
        let weight = self.matrix(OP, a.weight)?;
        self.account(Op::Logits(*a), Some(Work { rows, ..Work::default() }))?;
        if rows <= MANY_ROWS {
            let set = RowSet { index: null(), count: null(), bound: rows as u32 };
            let of = Product { weight, bias: null(), out, n: n as u32, set: 0 };
            let (function, launch) = self.skinny(OP, rows, &[n]);
            let room = Sampling::of(rows, n);
            // Where they may be drawn from, the best stay where they are.
            let wanted = if rows <= self.kv().layout.slots { room.bytes } else { room.keys };
            let best = self.scratch(wanted)?.0 as *mut u64;
            let args = SkinnyArgs { best, ..one_product(h, a.h.cols, set, of, std::ptr::null_mut()) };
            self.launch(OP, function, launch, &args)?;
            self.best_of = Some(a.out).filter(|_| self.info.activations != DType::F32);
            return Ok(());
        }
        self.best_of = None;
        let gemm = self.product(a.weight, Address(h as u64), rows, Address(out as u64), DType::F32);
        self.gemm(OP, &gemm)
    }

    fn logprobs(&mut self, a: &LogProbs) -> Result<()> {
        const OP: OpKind = OpKind::LogProbs;
        a.check()?;
        let ([logits, out], [targets]) = (self.mats(OP, [a.logits, a.out])?, self.int(OP, [a.targets])?);
        let (rows, vocab) = (a.targets.len, a.logits.cols);
        let args =
            LogProbsArgs { logits: logits.cast(), targets, out: out.cast(), rows: rows as u32, vocab: vocab as u32 };
        self.account(Op::LogProbs(*a), Some(Work { rows, ..Work::default() }))?;
        self.launch(OP, self.functions.logprobs, a_row_a_block(rows, vocab), &args)
    }

    fn sample(&mut self, a: &Sample) -> Result<()> {
        const OP: OpKind = OpKind::Sample;
        a.check()?;
        let none = Ints { offset: 0, len: 0 };
        let ([logits], [draws, tokens]) =
            (self.mats(OP, [a.logits])?, self.int(OP, [a.draws.unwrap_or(none), a.tokens])?);
        let Mat { rows, cols: vocab, .. } = a.logits;
        self.account(Op::Sample(*a), Some(Work { rows, ..Work::default() }))?;
        let room = Sampling::of(rows, vocab);
        let scratch = self.scratch(room.bytes)?;
        let known = self.best_of == Some(a.logits);
        let args = SampleArgs {
            logits: logits.cast(),
            draws: if a.draws.is_some() { draws } else { null() },
            best: scratch.0 as *mut u64,
            bounds: scratch.plus(room.bounds).0 as *mut SampleBounds,
            keys: scratch.plus(room.keys).0 as *mut u64,
            sums: scratch.plus(room.sums).0 as *mut u64,
            counts: scratch.plus(room.counts).0 as *mut u32,
            tokens,
            vocab: vocab as u32,
            groups: room.groups as u32,
            chunks: room.chunks as u32,
        };
        let over =
            |blocks: usize, rows: usize, threads| Launch { grid: [blocks as u32, rows as u32, 1], threads, shared: 0 };
        if !known {
            self.launch(OP, self.functions.sample_groups, over(room.groups.div_ceil(256), rows, 256), &args)?;
        }
        self.best_of = Some(a.logits);
        self.launch(OP, self.functions.sample_select, over(rows, 1, 1024), &args)?;
        if a.draws.is_none() {
            return Ok(());
        }
        self.launch(OP, self.functions.sample_weigh, over(room.chunks, rows, 256), &args)?;
        self.launch(OP, self.functions.sample_draw, over(rows, 1, 1024), &args)
    }
}

/// Where the parts of [`SampleArgs`] stand in the workspace, in bytes.
struct Sampling {
    groups: usize,
    chunks: usize,
    keys: usize,
    sums: usize,
    counts: usize,
    bounds: usize,
    bytes: usize,
}

impl Sampling {
    fn of(rows: usize, vocab: usize) -> Self {
        let (groups, chunks) = (vocab.div_ceil(SAMPLE_GROUP as usize), vocab.div_ceil(SAMPLE_CHUNK as usize));
        let keys = rows * groups * size_of::<u64>();
        let sums = keys + rows * chunks * SAMPLE_CHUNK as usize * size_of::<u64>();
        let counts = sums + rows * chunks * size_of::<u64>();
        let bounds = counts + rows * chunks * size_of::<u32>();
        Sampling { groups, chunks, keys, sums, counts, bounds, bytes: bounds + rows * size_of::<SampleBounds>() }
    }
}

impl CudaBackend {
    /// Fills n numbers of the activations' type with noise.
    pub(super) fn draw(&mut self, out: Address, n: usize, noise: Noise) -> Result<()> {
        let Noise { seed, mean, scale } = noise;
        let args = NoiseArgs { out: out.0 as *mut c_void, n: n as u64, seed, mean, scale };
        let blocks = n.div_ceil(8 * 256).min(4096) as u32;
        self.launch_only(self.functions.noise, Launch { grid: [blocks, 1, 1], threads: 256, shared: 0 }, &args)
    }

    /// Copies the rows of a set together.
    pub(super) fn gathered(
        &mut self,
        op: impl Into<AnyKind>,
        src: Address,
        of: Mat,
        set: &ops::RowSet,
        base: usize,
    ) -> Result<Address> {
        let (op, bytes) = (op.into(), of.cols * of.dtype.size());
        let out = self.scratch(set.bound * bytes)?;
        let args = GatherArgs {
            src: src.0 as *const c_void,
            rows: self.set(op, set)?,
            base: base as u32,
            width: (bytes / 16) as u32,
            out: out.0 as *mut c_void,
        };
        self.launch(op, self.functions.gather, a_row_a_block(set.bound, bytes / 2), &args)?;
        Ok(out)
    }
}

fn one_product(src: *const c_void, k: usize, rows: RowSet, of: Product, work: *mut WorkCount) -> SkinnyArgs {
    let none = RowSet { index: null(), count: null(), bound: 0 };
    SkinnyArgs { src, k: k as u32, base: 0, rows: [rows, none], of: [of; 3], best: std::ptr::null_mut(), work }
}
