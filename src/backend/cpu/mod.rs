//! The CPU backend: f32 activations, K/V in f32 or 16 bits, weights in place in whatever they are stored, all cores.

mod attention;
mod backward;
mod bf16;
mod kv_pool;
mod linear;
mod pointwise;
mod rates;
mod route;
mod sample;
mod simd;
mod threads;

use fearless_simd::{Level, dispatch};
use memmap2::MmapMut;
use rayon::prelude::*;

use super::*;
use crate::error::{Error, Kind, ensure};
use crate::machine::{self, instructions};
use crate::tensor::{DType, Data, Tensor};
use attention::Queries;
use bf16::Bf16;
use kv_pool::{KvPool, zeroed};
use linear::{Halves, Linear, Put, Source};
pub(crate) use sample::Chooser;
use threads::Threads;

/// Rows that a thread takes at least in the ops that only pass over them; a fork costs as much as some rows.
const FEW_ROWS: usize = 8;

/// Runs the ops on the cores of this machine.
pub struct CpuBackend {
    info: DeviceInfo,
    threads: Threads,
    weights: Vec<Stored>,
    /// Activations, f32.
    arena: MmapMut,
    ints: Vec<u32>,
    kv: Option<KvPool>,
    meter: Meter,
    /// Reused by [`Ops::route`] and [`Ops::attend`].
    active: Vec<bool>,
    order: Vec<u32>,
    partial: Vec<f32>,
    /// Reused by the products.
    halves: Halves,
    chooser: Chooser,
}

/// A weight; a vector also in f32, which costs nothing and spares the ops a case distinction.
struct Stored {
    tensor: Tensor,
    vector: Vec<f32>,
}

/// Every instruction set that this machine has, best first.
#[cfg(test)]
pub(crate) fn levels() -> Vec<Level> {
    use fearless_simd::Simd;
    let best = Level::new();
    #[cfg(target_arch = "x86_64")]
    let others = [
        best.as_avx2().map(|simd| simd.level()),
        best.as_sse4_2().map(|simd| simd.level()),
        best.as_sse2().map(|simd| simd.level()),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let others: [Option<Level>; 0] = [];
    let mut levels = vec![best];
    for level in others.into_iter().flatten() {
        if instructions(level) != instructions(best) {
            levels.push(level);
        }
    }
    levels
}

/// Numbers with a mean, a spread and no pattern.
#[cfg(test)]
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.4
        })
        .collect()
}

impl CpuBackend {
    /// With so many threads, or one for every core, and the best instructions there are. K/V are stored in `kv`.
    ///
    /// Errors: Argument for a number of threads that makes no sense; Unsupported for bf16 on a processor without it.
    pub fn new(threads: Option<usize>, precision: Precision, kv: DType) -> Result<Self> {
        let bf16 = match precision {
            Precision::F32 => None,
            Precision::Bf16 => Some(Bf16::detect().ok_or_else(|| {
                Error::new(Kind::Unsupported, "this processor does not multiply bf16 itself (AVX512-BF16)")
                    .action("leave --precision out, or give f32")
            })?),
        };
        Self::over(Threads::new(threads, Level::new(), bf16)?, kv)
    }

    /// With given instructions, to test those that this machine would not choose.
    #[cfg(test)]
    pub(crate) fn with_level(threads: Option<usize>, level: Level, kv: DType) -> Result<Self> {
        Self::over(Threads::new(threads, level, None)?, kv)
    }

    fn over(threads: Threads, kv: DType) -> Result<Self> {
        let s = if threads.count() == 1 { "" } else { "s" };
        let bf16 = if threads.bf16.is_some() { " and bf16" } else { "" };
        Ok(CpuBackend {
            info: DeviceInfo {
                name: format!("cpu, {} thread{s}, {}{bf16}", threads.count(), instructions(threads.level)),
                free_memory: machine::memory().1,
                activations: DType::F32,
                kv,
                weights: None,
                // The activations of 256 rows of a 135M model stay in the caches.
                chunk: 256,
            },
            chooser: Chooser::new(threads.level),
            threads,
            weights: Vec::new(),
            arena: zeroed(0)?,
            ints: Vec::new(),
            kv: None,
            meter: Meter::default(),
            active: Vec::new(),
            order: Vec::new(),
            partial: Vec::new(),
            halves: Halves::default(),
        })
    }
}

impl CpuBackend {
    /// The matrices of an op, as disjoint parts of the arena. Errors: Shape when they overlap or are not f32.
    fn arena<const N: usize>(arena: &mut MmapMut, op: OpKind, mats: [Mat; N]) -> Result<[&mut [f32]; N]> {
        Self::floats(arena, op.name(), mats)
    }

    fn floats<'a, const N: usize>(arena: &'a mut MmapMut, op: &str, mats: [Mat; N]) -> Result<[&'a mut [f32]; N]> {
        for mat in mats {
            ensure!(mat.dtype == DType::F32, Shape, "{op}: the CPU computes in f32, not {}", mat.dtype);
        }
        let floats: &mut [f32] = bytemuck::cast_slice_mut(arena);
        let ranges = mats.map(|m| m.offset / 4..m.offset / 4 + m.rows * m.cols);
        floats
            .get_disjoint_mut(ranges)
            .map_err(|e| Error::new(Kind::Shape, format!("{op}: buffers outside the arena or shared: {e}")))
    }

    /// The row numbers of a set.
    fn rows<'a>(ints: &'a [u32], rows: &RowSet) -> &'a [u32] {
        let n = rows.count.map_or(rows.bound, |count| ints[count.offset] as usize);
        &of(ints, rows.index)[..n]
    }
}

/// A weight and its bias.
fn linear(weights: &[Stored], weight: Weight, bias: Option<Weight>) -> Linear<'_> {
    Linear { weight: weights[weight.id].tensor.data(), bias: bias.map(|b| &weights[b.id].vector[..]) }
}

/// The part of an arena of integers.
fn of(ints: &[u32], part: Ints) -> &[u32] {
    &ints[part.offset..part.offset + part.len]
}

/// The rows of a matrix that are listed, ascending.
fn listed<'a>(data: &'a mut [f32], width: usize, index: &'a [u32]) -> impl Iterator<Item = &'a mut [f32]> {
    let mut rows = data.chunks_exact_mut(width).enumerate();
    index.iter().map(move |&wanted| rows.by_ref().find(|(i, _)| *i == wanted as usize).expect("ascending rows").1)
}

impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn upload(&mut self, tensor: &Tensor) -> Result<Weight> {
        let vector = if tensor.rows == 1 { tensor.to_f32() } else { Vec::new() };
        self.weights.push(Stored { tensor: tensor.clone(), vector });
        Ok(Weight { id: self.weights.len() - 1, rows: tensor.rows, cols: tensor.cols, dtype: tensor.dtype })
    }

    fn reserve(&mut self, arena_bytes: usize, ints: usize, _workspace: usize, kv: &KvLayout) -> Result<()> {
        self.arena = zeroed(arena_bytes)?;
        self.ints = vec![0; ints];
        self.kv = Some(KvPool::new(*kv)?);
        Ok(())
    }

    fn write_ints(&mut self, to: Ints, values: &[u32]) -> Result<()> {
        ensure!(values.len() <= to.len, Shape, "{} integers into room for {}", values.len(), to.len);
        self.ints[to.offset..to.offset + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn write_floats(&mut self, to: Mat, values: &[f32]) -> Result<()> {
        ensure!(values.len() <= to.rows * to.cols, Shape, "{} numbers into [{}, {}]", values.len(), to.rows, to.cols);
        let start = to.offset / 4;
        bytemuck::cast_slice_mut(&mut self.arena)[start..start + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read_ints(&mut self, from: Ints, to: &mut [u32]) -> Result<()> {
        ensure!(to.len() <= from.len, Shape, "{} integers out of {}", to.len(), from.len);
        to.copy_from_slice(&of(&self.ints, from)[..to.len()]);
        Ok(())
    }

    fn read_floats(&mut self, from: Mat, to: &mut [f32]) -> Result<()> {
        ensure!(to.len() <= from.rows * from.cols, Shape, "{} numbers out of [{}, {}]", to.len(), from.rows, from.cols);
        to.copy_from_slice(&bytemuck::cast_slice(&self.arena)[from.offset / 4..][..to.len()]);
        Ok(())
    }

    fn kv_pages(&mut self, layer: usize, slot: usize, first: usize, pages: &[u32]) -> Result<()> {
        self.kv.as_mut().expect("reserved").set_pages(layer, slot, first, pages);
        Ok(())
    }

    fn kv_len(&mut self, layer: usize, slot: usize, rows: usize) -> Result<()> {
        self.kv.as_mut().expect("reserved").set_len(layer, slot, rows);
        Ok(())
    }

    fn step(
        &mut self,
        _key: Option<StepKey>,
        body: &mut (dyn FnMut(&mut dyn Backend) -> Result<()> + Send),
    ) -> Result<()> {
        self.threads.clone().enter(|| body(self))
    }

    fn rates(&mut self, dtype: DType) -> Result<Rates> {
        self.measure(dtype)
    }

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }
}

impl Ops for CpuBackend {
    fn embed(&mut self, args: &Embed) -> Result<()> {
        args.check()?;
        let [out] = Self::arena(&mut self.arena, OpKind::Embed, [args.out])?;
        let (ids, table, width) = (of(&self.ints, args.ids), &self.weights[args.table.id].tensor, args.table.cols);
        out.par_chunks_mut(width).with_min_len(FEW_ROWS).zip(ids).for_each(|(out, &id)| {
            let row = id as usize * width..(id as usize + 1) * width;
            match table.data() {
                Data::F32(t) => out.copy_from_slice(&t[row]),
                Data::F16(t) => out.iter_mut().zip(&t[row]).for_each(|(o, x)| *o = x.to_f32()),
                Data::BF16(t) => out.iter_mut().zip(&t[row]).for_each(|(o, x)| *o = x.to_f32()),
            }
        });
        self.meter.add(OpKind::Embed, args.cost(Work { rows: args.ids.len, ..Work::default() }));
        Ok(())
    }

    fn rope_angles(&mut self, args: &RopeAngles) -> Result<()> {
        args.check()?;
        let [out] = Self::arena(&mut self.arena, OpKind::RopeAngles, [args.out])?;
        let inv_freq = &self.weights[args.inv_freq.id].vector;
        out.par_chunks_mut(2 * inv_freq.len())
            .with_min_len(FEW_ROWS)
            .zip(of(&self.ints, args.pos))
            .for_each(|(out, &pos)| pointwise::angles(pos, inv_freq, out));
        self.meter.add(OpKind::RopeAngles, args.cost(Work { rows: args.pos.len, ..Work::default() }));
        Ok(())
    }

    fn norm_gate(&mut self, args: &NormGate) -> Result<()> {
        args.check()?;
        let width = args.x.cols;
        let weight = &self.weights[args.weight.id].vector;
        let rows = Self::rows(&self.ints, &args.rows);
        let level = self.threads.level;
        let norm = |x: &[f32], out: &mut [f32]| {
            dispatch!(level, simd => pointwise::rms_norm(simd, x, weight, args.eps, out));
        };
        // What is not wanted is an empty matrix.
        let none = args.x.rows(0..0);
        let (out, logits) = (args.out.unwrap_or(none), args.gate.map_or(none, |gate| gate.logits));
        let [x, out, logits] = Self::arena(&mut self.arena, OpKind::NormGate, [args.x, out, logits])?;
        let from = |row: u32| &x[row as usize * width..][..width];
        let Some(gate) = args.gate else {
            let out = out.par_chunks_mut(width).with_min_len(FEW_ROWS);
            out.zip(rows).for_each(|(out, &row)| norm(from(row), out));
            let work = Work { rows: rows.len(), ..Work::default() };
            self.meter.add(OpKind::NormGate, args.cost(work));
            return Ok(());
        };
        let router = &self.weights[gate.router.id].vector;
        let score = |row: u32, logit: &mut [f32], out: &mut [f32]| {
            norm(from(row), out);
            logit[0] = dispatch!(level, simd => simd::dot_f64(simd, out, router)) as f32;
        };
        let mut scored: Vec<_> = rows.iter().zip(listed(logits, 1, rows)).collect();
        if args.out.is_some() {
            let out = out.par_chunks_mut(width).with_min_len(FEW_ROWS);
            out.zip(scored).for_each(|(out, (&row, logit))| score(row, logit, out));
        } else {
            scored.par_chunks_mut(FEW_ROWS).for_each_init(
                || vec![0.0; width],
                |out, scored| scored.iter_mut().for_each(|(row, logit)| score(**row, logit, out)),
            );
        }
        let work = Work { rows: rows.len(), ..Work::default() };
        self.meter.add(OpKind::NormGate, args.cost(work));
        Ok(())
    }

    fn route(&mut self, args: &Route) -> Result<()> {
        args.check()?;
        let [logits] = Self::arena(&mut self.arena, OpKind::Route, [args.logits])?;
        let kv = self.kv.as_mut().expect("reserved");
        let (active, order) = (&mut self.active, &mut self.order);
        route::route(args, route::Inputs { ints: &mut self.ints, logits, kv, active, order });
        self.meter.add(OpKind::Route, args.cost(Work { rows: args.pos.len, ..Work::default() }));
        Ok(())
    }

    fn qkv(&mut self, args: &Qkv) -> Result<()> {
        args.check()?;
        let [h, q, k, v] = Self::arena(&mut self.arena, OpKind::Qkv, [args.h, args.q, args.k, args.v])?;
        let (q_rows, kv_rows) = (Self::rows(&self.ints, &args.q_rows), Self::rows(&self.ints, &args.kv_rows));
        let (data, width, weights): (&[f32], _, _) = (h, args.h.cols, &self.weights);
        let [wq, wk, wv] = std::array::from_fn(|i| linear(weights, args.weights[i], args.biases[i]));
        let of = [
            (0, wq, q.chunks_exact_mut(args.q.cols)),
            (1, wk, k.chunks_exact_mut(args.k.cols)),
            (1, wv, v.chunks_exact_mut(args.v.cols)),
        ];
        let sources =
            [q_rows, kv_rows].map(|index| Source { data, width, index: Some((index, args.base)), rows: index.len() });
        linear::products(&self.threads, &mut self.halves, Put::Store, &sources, of);
        let work = Work { rows: q_rows.len(), kv_rows: kv_rows.len(), pairs: 0 };
        self.meter.add(OpKind::Qkv, args.cost(work));
        Ok(())
    }

    fn rope_append(&mut self, args: &RopeAppend) -> Result<()> {
        args.check()?;
        let d = args.head_dim;
        let mats = [args.angles, args.q, args.k, args.v];
        let [angles, q, k, v] = Self::arena(&mut self.arena, OpKind::RopeAppend, mats)?;
        let (angles, ints, level): (&[f32], &[u32], _) = (angles, &self.ints, self.threads.level);
        let (q_rows, kv_rows) = (Self::rows(ints, &args.q_rows), Self::rows(ints, &args.kv_rows));
        let [q_norm, k_norm] = [args.q_norm, args.k_norm].map(|norm| norm.map(|w| &self.weights[w.id].vector[..]));
        let turn = |row: u32, heads: &mut [f32], norm: Option<&[f32]>| {
            let angles = &angles[row as usize * d..][..d];
            dispatch!(level, simd => {
                for head in heads.chunks_exact_mut(d) {
                    if let Some(norm) = norm {
                        pointwise::rms_norm_in_place(simd, head, norm, args.eps);
                    }
                    pointwise::rotate(simd, head, angles);
                }
            });
        };
        let kv = self.kv.as_mut().expect("reserved");
        let mut append = || {
            let (places, width) = (of(ints, args.kv_row), args.k.cols);
            for (i, (&row, k)) in kv_rows.iter().zip(k.chunks_exact_mut(width)).enumerate() {
                turn(row, k, k_norm);
                let slot = ints[args.row_slot.offset + row as usize] as usize;
                let position = ints[args.pos.offset + row as usize];
                kv.write(args.layer, slot, places[i] as usize, position, k, &v[i * width..][..width]);
            }
        };
        let mut queries = || q.chunks_exact_mut(args.q.cols).zip(q_rows).for_each(|(q, &row)| turn(row, q, q_norm));
        if q_rows.len() < FEW_ROWS {
            queries();
            append();
        } else {
            self.threads.enter(|| rayon::join(queries, append));
        }
        let work = Work { rows: q_rows.len(), kv_rows: kv_rows.len(), pairs: 0 };
        self.meter.kv_rows += kv_rows.len() as u64;
        self.meter.add(OpKind::RopeAppend, args.cost(work));
        Ok(())
    }

    fn attend(&mut self, args: &Attend) -> Result<()> {
        args.check()?;
        let [q, out] = Self::arena(&mut self.arena, OpKind::Attend, [args.q, args.out])?;
        let rows = Self::rows(&self.ints, &args.rows);
        let (first, end) = (&of(&self.ints, args.first)[..rows.len()], &of(&self.ints, args.end)[..rows.len()]);
        let slots = of(&self.ints, args.row_slot);
        let slot_of = |i: usize| slots[rows[i] as usize] as usize;
        let queries =
            Queries { q, first, end, heads: args.q.cols / args.head_dim, layer: args.layer, scale: args.scale };
        let kv = self.kv.as_ref().expect("reserved");
        let out = &mut out[..rows.len() * args.q.cols];
        attention::attend(&self.threads, kv, &queries, slot_of, out, &mut self.partial);

        let mut work = Work { rows: rows.len(), ..Work::default() };
        let mut run: Option<(usize, u32)> = None; // the sequence and how far its K/V were counted
        for i in 0..rows.len() {
            work.pairs += u64::from(end[i] - first[i]);
            let counted =
                run.filter(|(slot, _)| *slot == slot_of(i)).map_or(first[i], |(_, counted)| counted.max(first[i]));
            work.kv_rows += (end[i] - counted) as usize;
            run = Some((slot_of(i), end[i]));
        }
        self.meter.add(OpKind::Attend, args.cost(work));
        Ok(())
    }

    fn project_add(&mut self, args: &ProjectAdd) -> Result<()> {
        args.check()?;
        let [src, x] = Self::arena(&mut self.arena, OpKind::ProjectAdd, [args.src, args.x])?;
        let rows = Self::rows(&self.ints, &args.rows);
        let linear = linear(&self.weights, args.weight, args.bias);
        let source = Source { data: src, width: args.src.cols, index: None, rows: rows.len() };
        let of = [(0, linear, listed(x, args.x.cols, rows))];
        linear::products(&self.threads, &mut self.halves, Put::Add, &[source], of);
        self.meter.add(OpKind::ProjectAdd, args.cost(Work { rows: rows.len(), ..Work::default() }));
        Ok(())
    }

    fn swiglu(&mut self, args: &SwiGlu) -> Result<()> {
        args.check()?;
        let [h, out] = Self::arena(&mut self.arena, OpKind::SwiGlu, [args.h, args.out])?;
        let rows = Self::rows(&self.ints, &args.rows).len();
        let source = Source { data: h, width: args.h.cols, index: None, rows };
        let gate = linear(&self.weights, args.gate, args.gate_bias);
        let up = linear(&self.weights, args.up, args.up_bias);
        linear::swiglu(&self.threads, &mut self.halves, source, gate, up, out.chunks_exact_mut(args.out.cols));
        self.meter.add(OpKind::SwiGlu, args.cost(Work { rows, ..Work::default() }));
        Ok(())
    }

    fn logits(&mut self, args: &Logits) -> Result<()> {
        args.check()?;
        let [h, out] = Self::arena(&mut self.arena, OpKind::Logits, [args.h, args.out])?;
        let rows = args.out.rows;
        let source = Source { data: h, width: args.h.cols, index: None, rows };
        let linear = linear(&self.weights, args.weight, None);
        let of = [(0, linear, out.chunks_exact_mut(args.out.cols))];
        linear::products(&self.threads, &mut self.halves, Put::Store, &[source], of);
        self.meter.add(OpKind::Logits, args.cost(Work { rows, ..Work::default() }));
        Ok(())
    }

    fn logprobs(&mut self, args: &LogProbs) -> Result<()> {
        args.check()?;
        let [logits, out] = Self::arena(&mut self.arena, OpKind::LogProbs, [args.logits, args.out])?;
        let (vocab, level) = (args.logits.cols, self.threads.level);
        let targets = of(&self.ints, args.targets);
        out.par_iter_mut().zip(logits.par_chunks(vocab)).zip(targets).for_each(|((out, row), &target)| {
            *out = dispatch!(level, simd => pointwise::log_prob(simd, row, target as usize));
        });
        self.meter.add(OpKind::LogProbs, args.cost(Work { rows: args.targets.len, ..Work::default() }));
        Ok(())
    }

    fn sample(&mut self, args: &Sample) -> Result<()> {
        args.check()?;
        let [logits] = Self::arena(&mut self.arena, OpKind::Sample, [args.logits])?;
        for (i, row) in logits.chunks_exact(args.logits.cols).enumerate() {
            let words = args.draws.map_or([0; Draw::WORDS], |draws| {
                std::array::from_fn(|word| of(&self.ints, draws)[i * Draw::WORDS + word])
            });
            // Its error is found again from the logits.
            let token = self.chooser.choose(&Draw::from_words(words), row).unwrap_or(SAMPLE_NONE);
            self.ints[args.tokens.offset + i] = token;
        }
        self.meter.add(OpKind::Sample, args.cost(Work { rows: args.logits.rows, ..Work::default() }));
        Ok(())
    }
}
