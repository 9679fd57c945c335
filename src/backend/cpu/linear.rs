//! Products with weight matrices: rows of f32 times the rows of a weight that is read where it is stored.
//!
//! Both operands have their inner dimension contiguous, so an output is a dot product of two rows as they stand, and
//! gathering source rows through an index is free. Few rows (decode) stream the weight once, and nothing is
//! packed. Many rows (prefill) are packed once for each task, sixteen weight rows at a time are widened into the first-level
//! cache, and tiles of both add up in registers. Either way adds up in the same order, so that prefill and decode agree to
//! the last bit.

// Accumulators stay in registers only in loops over constants, by index.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use fearless_simd::dispatch;
use fearless_simd::prelude::*;
use rayon::prelude::*;

use super::FEW_ROWS;
use super::bf16::{Rounded, STEP};
use super::simd::{Element, LANES, Line, V, silu, sums, tail};
use super::threads::{Scratch, Threads};
use crate::tensor::Data;

/// Up to so many rows the weight is streamed, in two or three places at a time: the prefetcher begins anew with every page of
/// 4 KiB and waits for it, unless there are other streams to go on with. A row times 8192 rows of 2048 bf16 on one core of an
/// EPYC 7003: 8 GB/s with one stream, 10 with two, 12 with three or four; on two cores 14, 17, 19, 18.
const STREAMED: usize = 4;

/// Weights with shorter rows are read in one place: those of such a model are in a cache. 1536 rows of 128 values on one core of
/// an EPYC 7003: 17 GB/s, 11 with three streams.
const NARROW: usize = 512;

/// Floats of source rows that a task packs: with their sums they stay in the second-level cache, and widening weights for them
/// counts for little. On one core of an EPYC 7003, 888 rows of 576 values: 63 GFLOP/s, 55 with half as many.
const PACKED: usize = 1 << 16;

/// At most so many rows, however narrow: each has 1 KiB of sums besides, which is memory that no plan states.
const MOST: usize = 90;

/// At least so many rows, however wide: with half as many, widening weights counts and they are read twice as often. Two cores
/// of an EPYC 7003, 512 rows of 2048 values: 48 to 55 GFLOP/s a core, 43 to 47 with 32 rows and all weights (see [`LARGEST`]).
const LEAST: usize = 64;

/// Weights of a task, at most: 2 MiB in bf16, so that they are still in the last-level cache for the rows that follow.
const LARGEST: usize = 1 << 20;

/// Lines of a tile, at most: those of sixteen widened weight rows take 18 KiB of the first-level cache. Half as many made 46
/// instead of 56 GFLOP/s, because tiles begin and end more often; twice as many were no faster.
const DEPTH: usize = 18;

/// Outputs of a task are a multiple of this: whole vectors of sums in either way of computing, whole cache lines.
const BLOCK: usize = 48;

/// Outputs of a task, at most, and so many more as there are tasks by rows: 960 are long enough to amortise its start, and few
/// enough to even out the speeds of threads.
const LONGEST: usize = 20 * BLOCK;

/// Rows of a task are a multiple of this: whole tiles on every instruction set.
const TILE: usize = 6;

/// The rows that go into a product: `data[index[i] − base]`, or `data[i]`.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// `[*, width]`
    pub data: &'a [f32],
    pub width: usize,
    pub index: Option<(&'a [u32], usize)>,
    pub rows: usize,
}

impl<'a> Source<'a> {
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        let at = self.index.map_or(i, |(index, base)| index[i] as usize - base);
        &self.data[at * self.width..][..self.width]
    }

    /// Some of the rows.
    fn part(&self, rows: Range<usize>) -> Self {
        match self.index {
            Some((index, base)) => Source { index: Some((&index[rows.clone()], base)), rows: rows.len(), ..*self },
            None => Source { data: &self.data[rows.start * self.width..], rows: rows.len(), ..*self },
        }
    }
}

/// A weight with its bias.
#[derive(Clone, Copy)]
pub struct Linear<'a> {
    /// `[outputs, width]`
    pub weight: Data<'a>,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
}

/// What becomes of a result v at the output o.
#[derive(Clone, Copy, PartialEq)]
pub enum Put {
    /// o = v
    Store,
    /// o = silu(v)
    StoreSilu,
    /// o += v
    Add,
    /// o *= v
    Multiply,
}

/// `out[i] = source[i]·Wᵀ + bias` for several weights at once, put as asked. Each has the number of its source and the rows
/// of its output.
pub fn products<'o, const N: usize, O>(
    threads: &Threads,
    halves: &mut Halves,
    put: Put,
    sources: &[Source],
    of: [(usize, Linear, O); N],
) where
    O: Iterator<Item = &'o mut [f32]>,
{
    let rounded = halves.round(threads, sources, of.iter().map(|(_, linear, _)| linear));
    let work = of.iter().map(|(i, linear, _)| sources[*i].rows * linear.weight.len()).sum();
    let mut of =
        of.map(|(i, linear, out)| (i, linear, Blocks::new(threads, &sources[i], rounded.is_empty(), &linear, out)));
    let tasks: Vec<_> = of
        .iter_mut()
        .flat_map(|(i, linear, blocks)| blocks.tasks().map(|(rows, columns, out)| (*i, *linear, rows, columns, out)))
        .collect();
    threads.each(work, tasks.into_par_iter(), |scratch, (i, linear, rows, columns, out)| {
        let (source, rounded) = (sources[i].part(rows.clone()), rounded.get(i).map(|rounded| rounded.part(rows)));
        product(threads, scratch, &source, rounded, &linear, columns, put, out);
    });
}

/// `out[i] = silu(source[i]·Gᵀ + bg) ⊙ (source[i]·Uᵀ + bu)`.
pub fn swiglu<'o>(
    threads: &Threads,
    halves: &mut Halves,
    source: Source,
    gate: Linear,
    up: Linear,
    out: impl Iterator<Item = &'o mut [f32]>,
) {
    let rounded = halves.round(threads, &[source], [&gate, &up]);
    let mut blocks = Blocks::new(threads, &source, rounded.is_empty(), &gate, out);
    let tasks: Vec<_> = blocks.tasks().collect();
    let work = 2 * source.rows * gate.weight.len();
    threads.each(work, tasks.into_par_iter(), |scratch, (rows, columns, out)| {
        let (source, rounded) = (source.part(rows.clone()), rounded.first().map(|rounded| rounded.part(rows)));
        product(threads, scratch, &source, rounded, &gate, columns.clone(), Put::StoreSilu, out);
        product(threads, scratch, &source, rounded, &up, columns, Put::Multiply, out);
    });
}

/// Memory for source rows in bf16, used again by every op.
#[derive(Default)]
pub struct Halves(Vec<[u16; STEP]>);

impl Halves {
    /// The sources in bf16, where that is what the weights are multiplied in; otherwise none.
    fn round<'l>(
        &mut self,
        threads: &Threads,
        sources: &[Source],
        linears: impl IntoIterator<Item = &'l Linear<'l>>,
    ) -> Vec<Rounded<'_>> {
        let Some(bf16) = threads.bf16 else { return Vec::new() };
        if !linears.into_iter().all(|linear| matches!(linear.weight, Data::BF16(_))) {
            return Vec::new();
        }
        let steps = |source: &Source| source.width.div_ceil(STEP);
        let total = sources.iter().map(|source| source.rows * steps(source)).sum();
        self.0.resize(self.0.len().max(total), [0; STEP]);
        let mut rest = &mut self.0[..];
        let mut rounded = Vec::with_capacity(sources.len());
        for source in sources {
            let (own, behind) = rest.split_at_mut(source.rows * steps(source));
            rest = behind;
            let rows = own.par_chunks_mut(steps(source)).with_min_len(FEW_ROWS).enumerate();
            threads.enter(|| rows.for_each(|(i, out)| bf16.round(source.row(i), out)));
            rounded.push(Rounded { data: own, steps: steps(source), rows: source.rows });
        }
        rounded
    }
}

/// Rows of outputs cut into blocks of columns and of rows, as tasks for threads: the pieces of a block stand together, one
/// for each row.
pub struct Blocks<'o> {
    pieces: Vec<&'o mut [f32]>,
    rows: usize,
    width: usize,
    /// Columns and rows of a task.
    block: (usize, usize),
}

impl<'o> Blocks<'o> {
    /// Cut by rows as well when these are to be packed.
    pub fn new(
        threads: &Threads,
        source: &Source,
        packed: bool,
        linear: &Linear,
        out: impl Iterator<Item = &'o mut [f32]>,
    ) -> Self {
        let (rows, width) = (source.rows, linear.weight.len() / source.width);
        let most = if packed { (PACKED / source.width).clamp(LEAST, MOST) } else { usize::MAX };
        let passes = rows.div_ceil(most).max(1);
        // Four tasks for each thread even out their speeds.
        let blocks = (4 * threads.count()).div_ceil(passes);
        let longest = (LONGEST * passes).min(LARGEST / source.width / BLOCK * BLOCK).max(BLOCK);
        let columns = width.div_ceil(blocks).next_multiple_of(BLOCK).clamp(BLOCK, longest);
        let mut pieces = Vec::new();
        pieces.resize_with(rows * width.div_ceil(columns), Default::default);
        for (i, row) in out.take(rows).enumerate() {
            for (b, piece) in row.chunks_mut(columns).enumerate() {
                pieces[b * rows + i] = piece;
            }
        }
        Blocks { pieces, rows, width, block: (columns, rows.div_ceil(passes).next_multiple_of(TILE).max(1)) }
    }

    /// The rows and columns of each task and its pieces.
    pub fn tasks<'p>(
        &'p mut self,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>, &'p mut [&'o mut [f32]])> + use<'p, 'o> {
        let ((columns, rows), width) = (self.block, self.width);
        self.pieces.chunks_mut(self.rows.max(1)).enumerate().flat_map(move |(b, pieces)| {
            let columns = b * columns..((b + 1) * columns).min(width);
            let parts = pieces.chunks_mut(rows).enumerate();
            parts.map(move |(i, pieces)| (i * rows..i * rows + pieces.len(), columns.clone(), pieces))
        })
    }
}

/// Some columns of a product on the calling thread; `out[i]` are those of row i.
#[allow(clippy::too_many_arguments)] // they are what a task consists of
fn product(
    threads: &Threads,
    scratch: &mut Scratch,
    source: &Source,
    rounded: Option<Rounded>,
    linear: &Linear,
    columns: Range<usize>,
    put: Put,
    out: &mut [&mut [f32]],
) {
    let mut out = Out { rows: out, first: columns.start, bias: linear.bias, put };
    match linear.weight {
        Data::BF16(w) if let (Some(bf16), Some(rounded)) = (threads.bf16, rounded) => {
            bf16.product(scratch, &rounded, w, source.width, columns, &mut out);
        }
        Data::F32(w) => dispatch!(threads.level, simd => block(simd, scratch, source, w, columns, &mut out)),
        Data::F16(w) => dispatch!(threads.level, simd => block(simd, scratch, source, w, columns, &mut out)),
        Data::BF16(w) => dispatch!(threads.level, simd => block(simd, scratch, source, w, columns, &mut out)),
    }
}

#[inline(always)]
fn block<S: Simd, E: Element>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    weight: &[E],
    columns: Range<usize>,
    out: &mut Out,
) {
    match source.rows {
        0 => {}
        // As many streams as the registers have room for.
        1 => streams::<S, E, 1, 3>(simd, source, weight, columns, out),
        2 => streams::<S, E, 2, 3>(simd, source, weight, columns, out),
        3 => streams::<S, E, 3, 2>(simd, source, weight, columns, out),
        STREAMED => streams::<S, E, STREAMED, 2>(simd, source, weight, columns, out),
        // The most accumulators that they hold.
        _ => match S::f32s::LEN {
            LANES => tiles::<S, E, 1, 6, 3, 4>(simd, scratch, source, weight, columns, out),
            8 => tiles::<S, E, 2, 3, 2, 4>(simd, scratch, source, weight, columns, out),
            _ => tiles::<S, E, 4, 3, 2, 4>(simd, scratch, source, weight, columns, out),
        },
    }
}

/// Where the results of a task go.
pub struct Out<'t, 'o, 'a> {
    /// By source row: the task's columns.
    rows: &'t mut [&'o mut [f32]],
    /// The number of the first one in the weight.
    first: usize,
    bias: Option<&'a [f32]>,
    put: Put,
}

impl Out<'_, '_, '_> {
    /// Adds biases and applies silu where it is asked for. The sums are from the `first` on of those of a tile: rows of `N`
    /// columns from `column` on.
    #[inline(always)]
    pub fn finish<S: Simd, const N: usize>(&self, simd: S, mut sums: V<S>, column: usize, first: usize) -> V<S> {
        if let Some(bias) = self.bias {
            // Beyond the weight's last column there is nothing to finish.
            sums += V::from_fn(simd, |i| bias.get(column + (first + i) % N).copied().unwrap_or(0.0));
        }
        if self.put == Put::StoreSilu { silu(simd, sums) } else { sums }
    }

    /// Puts the first `n` values at a source row, from a column on.
    #[inline(always)]
    pub fn put<const N: usize>(&mut self, row: usize, column: usize, values: &[f32], n: usize) {
        let row = &mut self.rows[row][column - self.first..][..n];
        match <&mut [f32; N]>::try_from(&mut *row) {
            Ok(whole) => Self::combine(self.put, whole, &values[..N]),
            Err(_) => Self::combine(self.put, row, values),
        }
    }

    #[inline(always)]
    fn combine(put: Put, row: &mut [f32], values: &[f32]) {
        let pairs = row.iter_mut().zip(values);
        match put {
            Put::Store | Put::StoreSilu => pairs.for_each(|(o, v)| *o = *v),
            Put::Add => pairs.for_each(|(o, v)| *o += v),
            Put::Multiply => pairs.for_each(|(o, v)| *o *= v),
        }
    }
}

/// Few rows: every weight row is read once and multiplied with all of them, in `N` streams as far as the columns make as many
/// parts of whole vectors.
#[inline(always)]
fn streams<S: Simd, E: Element, const M: usize, const N: usize>(
    simd: S,
    source: &Source,
    weight: &[E],
    columns: Range<usize>,
    out: &mut Out,
) {
    let parts = if source.width < NARROW { 0 } else { columns.len() / (N * LANES) };
    let cut = columns.start + parts * N * LANES;
    stream::<S, E, M, N>(simd, source, weight, columns.start..cut, out);
    stream::<S, E, M, 1>(simd, source, weight, cut..columns.end, out);
}

/// The columns in `N` equal parts that are read side by side, each in order.
#[inline(always)]
fn stream<S: Simd, E: Element, const M: usize, const N: usize>(
    simd: S,
    source: &Source,
    weight: &[E],
    columns: Range<usize>,
    out: &mut Out,
) {
    let width = source.width;
    let whole = width / LANES;
    let mut rows: [&[[f32; LANES]]; M] = [&[]; M];
    let mut tails = [[0.0; LANES]; M];
    for m in 0..M {
        rows[m] = &source.row(m).as_chunks().0[..whole];
        tails[m] = tail(&source.row(m)[whole * LANES..]);
    }
    let part = columns.len() / N;
    for first in (0..part).step_by(LANES) {
        let count = LANES.min(part - first);
        let mut acc = [[[V::splat(simd, 0.0); LANES]; M]; N];
        for j in 0..count {
            let mut w: [&[[E; LANES]]; N] = [&[]; N];
            let mut w_tails: [&[E]; N] = [&[]; N];
            for n in 0..N {
                let column = columns.start + n * part + first + j;
                let (blocks, rest) = weight[column * width..][..width].as_chunks();
                (w[n], w_tails[n]) = (&blocks[..whole], rest);
            }
            let mut sums = [[V::splat(simd, 0.0); M]; N];
            for i in 0..whole {
                for n in 0..N {
                    let w = E::widen(simd, &w[n][i]);
                    for m in 0..M {
                        sums[n][m] = V::from_slice(simd, &rows[m][i]).mul_add(w, sums[n][m]);
                    }
                }
            }
            if whole * LANES < width {
                for n in 0..N {
                    let w = E::widen(simd, &tail(w_tails[n]));
                    for m in 0..M {
                        sums[n][m] = V::from_slice(simd, &tails[m]).mul_add(w, sums[n][m]);
                    }
                }
            }
            for n in 0..N {
                for m in 0..M {
                    acc[n][m][j] = sums[n][m];
                }
            }
        }
        for (n, acc) in acc.into_iter().enumerate() {
            let column = columns.start + n * part + first;
            for (m, acc) in acc.into_iter().enumerate() {
                let values = out.finish::<S, LANES>(simd, sums(simd, acc), column, 0);
                out.put::<LANES>(m, column, &values.to_array(), count);
            }
        }
    }
}

/// Many rows: sixteen weight rows at a time are widened into panels of `N`, and the source rows pass over them in tiles of
/// `M`, or of `FEW` at the end, so that `M` x `N` registers add up. Where a vector takes `PARTS` of them, its first part is
/// added up in all tiles before the second one: so much less has to stay in the first-level cache.
#[inline(always)]
fn tiles<S: Simd, E: Element, const PARTS: usize, const M: usize, const FEW: usize, const N: usize>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    weight: &[E],
    columns: Range<usize>,
    out: &mut Out,
) {
    let width = source.width;
    let steps = width.div_ceil(LANES).next_multiple_of(PARTS);
    let depth = steps.div_ceil(steps.div_ceil(DEPTH * PARTS).max(1)).next_multiple_of(PARTS).max(PARTS);
    let tiles = source.rows.div_ceil(M);
    // Whole chunks of the width, packed once, each `[part][tile][line][row]`; sums as `[part][tile][panel][row][column]`.
    let (packed, rest) = scratch.lines(tiles * M * (steps + LANES) + LANES * depth).split_at_mut(tiles * M * steps);
    let (panels, sums) = rest.split_at_mut(LANES * depth);
    let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
    let tile = M * LANES * S::f32s::LEN;
    let chunks = (0..steps).step_by(depth).map(|from| from..steps.min(from + depth));
    for chunk in chunks.clone() {
        let packed = packed[tiles * M * chunk.start..][..tiles * M * chunk.len()].as_chunks_mut::<M>().0;
        for i in 0..source.rows {
            pack::<S, f32, PARTS, M>(simd, source.row(i), &chunk, i, packed);
        }
    }
    for first in columns.clone().step_by(LANES) {
        let n = LANES.min(columns.end - first);
        for chunk in chunks.clone() {
            let packed = packed[tiles * M * chunk.start..][..tiles * M * chunk.len()].as_chunks::<M>().0;
            let panels = panels[..LANES * chunk.len()].as_chunks_mut::<N>().0;
            for j in 0..n {
                pack::<S, E, PARTS, N>(simd, &weight[(first + j) * width..][..width], &chunk, j, panels);
            }
            let lines = chunk.len() / PARTS;
            let parts = packed.chunks_exact(tiles * lines).zip(panels.chunks_exact(LANES / N * lines));
            for (part, (packed, panels)) in parts.enumerate() {
                let panels = &panels[..n.div_ceil(N) * lines];
                for (t, packed) in packed.chunks_exact(lines).enumerate() {
                    let own = sums[(part * tiles + t) * tile..][..tile].chunks_exact_mut(tile / (LANES / N));
                    for (panel, own) in panels.chunks_exact(lines).zip(own) {
                        if source.rows - t * M > FEW {
                            self::tile::<S, M, M, N>(simd, packed, panel, own, chunk.start > 0);
                        } else {
                            self::tile::<S, FEW, M, N>(simd, packed, panel, own, chunk.start > 0);
                        }
                    }
                    // At once, so that the tiles that follow hide the stores.
                    if part + 1 == PARTS && chunk.end == steps {
                        put_tile::<S, PARTS, M, N>(simd, sums, t, tiles, source.rows, first..first + n, out);
                    }
                }
            }
        }
    }
}

/// Some steps of the `i`th row, as tiles of `K` rows read them: `[part][tile][line][row]`. A line holds a part of `PARTS`
/// steps. Zeros fill the last ones.
#[inline(always)]
fn pack<S: Simd, E: Element, const PARTS: usize, const K: usize>(
    simd: S,
    row: &[E],
    steps: &Range<usize>,
    i: usize,
    packed: &mut [[Line; K]],
) {
    let lines = steps.len() / PARTS;
    let mut parts: [&mut [[Line; K]]; PARTS] = std::array::from_fn(|_| Default::default());
    let each = packed.len() / PARTS;
    for (part, packed) in parts.iter_mut().zip(packed.chunks_exact_mut(each)) {
        *part = &mut packed[i / K * lines..][..lines];
    }
    let (blocks, rest) = row[steps.start * LANES..row.len().min(steps.end * LANES)].as_chunks::<LANES>();
    let (blocks, last) = blocks.as_chunks::<PARTS>();
    let blocks = &blocks[..lines.min(blocks.len())];
    for (line, block) in blocks.iter().enumerate() {
        put(simd, block, line, i % K, &mut parts);
    }
    if blocks.len() < lines {
        let mut block = [[E::zeroed(); LANES]; PARTS];
        block[..last.len()].copy_from_slice(last);
        if !rest.is_empty() {
            block[last.len()][..rest.len()].copy_from_slice(rest);
        }
        put(simd, &block, blocks.len(), i % K, &mut parts);
    }
}

#[inline(always)]
fn put<S: Simd, E: Element, const PARTS: usize, const K: usize>(
    simd: S,
    block: &[[E; LANES]; PARTS],
    line: usize,
    k: usize,
    parts: &mut [&mut [[Line; K]]; PARTS],
) {
    let len = S::f32s::LEN;
    for s in 0..PARTS {
        let values = E::widen(simd, &block[s]).to_array();
        for p in 0..PARTS {
            parts[p][line][k].0[s * len..][..len].copy_from_slice(&values[p * len..][..len]);
        }
    }
}

/// Sums a part of `R` of `M` source rows times a panel, on top of what is there if asked: `[M · N]` registers.
#[inline(always)]
fn tile<S: Simd, const R: usize, const M: usize, const N: usize>(
    simd: S,
    rows: &[[Line; M]],
    panel: &[[Line; N]],
    sums: &mut [f32],
    add: bool,
) {
    let len = S::f32s::LEN;
    let sums = &mut sums[..M * N * len];
    let zero = S::f32s::splat(simd, 0.0);
    let mut acc = [[zero; N]; R];
    let mut a = [zero; R];
    if add {
        for m in 0..R {
            for n in 0..N {
                acc[m][n] = S::f32s::from_slice(simd, &sums[(m * N + n) * len..][..len]);
            }
        }
    }
    for (rows, panel) in rows.iter().zip(panel) {
        for s in 0..LANES / len {
            for m in 0..R {
                a[m] = S::f32s::from_slice(simd, &rows[m].0[s * len..][..len]);
            }
            for n in 0..N {
                let w = S::f32s::from_slice(simd, &panel[n].0[s * len..][..len]);
                for m in 0..R {
                    acc[m][n] = a[m].mul_add(w, acc[m][n]);
                }
            }
        }
    }
    for m in 0..R {
        for n in 0..N {
            acc[m][n].store_slice(&mut sums[(m * N + n) * len..][..len]);
        }
    }
}

/// Puts the sums of tile `t` of `tiles`: at most [`LANES`] columns of the rows that there are.
#[inline(always)]
fn put_tile<S: Simd, const PARTS: usize, const M: usize, const N: usize>(
    simd: S,
    sums: &[f32],
    t: usize,
    tiles: usize,
    rows: usize,
    columns: Range<usize>,
    out: &mut Out,
) {
    let len = S::f32s::LEN;
    let mut parts: [&[f32]; PARTS] = [&[]; PARTS];
    for p in 0..PARTS {
        parts[p] = &sums[(p * tiles + t) * M * LANES * len..][..M * LANES * len];
    }
    for m in 0..M {
        let row = t * M + m;
        if row < rows {
            let mut acc = [V::splat(simd, 0.0); LANES];
            // By panel and column, not by column alone, where vectors leave their registers: 60 and 45 GFLOP/s at 576 values.
            for g in 0..LANES / N {
                for n in 0..N {
                    let at = ((g * M + m) * N + n) * len;
                    let mut values = [0.0; LANES];
                    for p in 0..PARTS {
                        values[p * len..][..len].copy_from_slice(&parts[p][at..][..len]);
                    }
                    acc[g * N + n] = V::from_slice(simd, &values);
                }
            }
            let values = out.finish::<S, LANES>(simd, super::simd::sums(simd, acc), columns.start, 0);
            out.put::<LANES>(row, columns.start, &values.to_array(), columns.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{levels, numbers};

    /// Rows that are cut into several tasks, widths of several chunks and with a rest: as in f64, and the same bits for a row
    /// among others, gathered, as alone.
    #[test]
    fn a_row_is_the_same_alone_and_in_any_task() {
        const SHAPES: [(usize, usize, usize); 11] = [
            (2, 600, 150),
            (3, 513, 90),
            (4, 777, 70),
            (5, 1, 5),
            (6, 33, 17),
            (7, 100, 48),
            (40, 1201, 19),
            (70, 2049, 16),
            (115, 577, 49),
            (250, 577, 5),
            (33, 2500, 3),
        ];
        for level in levels() {
            let threads = Threads::new(Some(2), level, None).unwrap();
            for (rows, width, outputs) in SHAPES {
                let x = numbers(rows * width, 1);
                let w: Vec<half::bf16> = numbers(outputs * width, 2).into_iter().map(half::bf16::from_f32).collect();
                let bias = numbers(outputs, 3);
                let index: Vec<u32> = (0..rows as u32).rev().map(|i| i + 9).collect();
                let linear = Linear { weight: Data::BF16(&w), bias: Some(&bias) };
                let run = |source: Source| {
                    let mut out = vec![0.0; source.rows * outputs];
                    let of = [(0, linear, out.chunks_exact_mut(outputs))];
                    products(&threads, &mut Halves::default(), Put::Store, &[source], of);
                    out
                };
                let all = run(Source { data: &x, width, index: Some((&index, 9)), rows });
                for (i, out) in all.chunks_exact(outputs).enumerate() {
                    let x = &x[(rows - 1 - i) * width..][..width];
                    let alone = run(Source { data: x, width, index: None, rows: 1 });
                    for (j, (a, b)) in out.iter().zip(alone).enumerate() {
                        assert_eq!(a.to_bits(), b.to_bits(), "{level:?}: {rows}x{width} at {i}, {j}");
                        let terms = x.iter().zip(&w[j * width..][..width]);
                        let expected = terms.map(|(x, w)| f64::from(*x) * w.to_f64()).sum::<f64>() + f64::from(bias[j]);
                        let error = (f64::from(*a) - expected).abs() / (1.0 + expected.abs());
                        assert!(error <= 1e-6, "{level:?}: {rows}x{width} at {i}, {j}: {a}, {expected}");
                    }
                }
            }
        }
    }
}
