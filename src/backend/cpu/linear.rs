//! Products with weight matrices: rows of f32 times the rows of a weight that is read where it is stored.
//!
//! Both operands have their inner dimension contiguous, so an output is a dot product of two rows as they stand: nothing is
//! packed or transposed, and gathering source rows through an index is free. Few rows (decode) stream the weight once, row
//! by row. Many rows (prefill) widen six weight rows at a time into the first-level cache and pass all source rows over
//! them in tiles of 4 x 6 accumulators. Both add up in the same order, so that prefill and decode agree to the last bit.

// Accumulators stay in registers only in loops over constants, by index.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use fearless_simd::dispatch;
use fearless_simd::prelude::*;
use rayon::prelude::*;

use super::FEW_ROWS;
use super::bf16::{Rounded, STEP};
use super::simd::{Element, LANES, Line, V, silu, sums, sums_of_8, tail};
use super::threads::{Scratch, Threads};
use crate::tensor::Data;

/// Up to so many rows the weight is streamed, one of its rows after the other: 24 to 29 GB/s on one core of an EPYC 9004.
/// Interleaving 4 weight rows reached 14 GB/s, because the prefetcher loses the streams.
const STREAMED: usize = 4;

/// Floats of source rows that pass over a panel before the next one: they stay in the second-level cache. On one core of an
/// EPYC 7003, 888 rows of 576 values: 65 GFLOP/s, 43 when all of them pass.
const PASSED: usize = 1 << 15;

/// At least so many rows pass over a panel, which is widened for them: 128 rows of 8192 values 33 to 40 GFLOP/s, 15 to 19 with
/// the four that [`PASSED`] leaves of them; 256 of 4096 33 to 41, 27 to 30 with eight.
const PASSING: usize = 32;

/// Outputs of a task are a multiple of this: whole tiles in either way of computing, whole cache lines.
const BLOCK: usize = 48;

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
    let mut of = of.map(|(i, linear, out)| (i, linear, Blocks::new(threads, &sources[i], &linear, out)));
    let tasks: Vec<_> = of
        .iter_mut()
        .flat_map(|(i, linear, blocks)| blocks.tasks().map(|(columns, out)| (*i, *linear, columns, out)))
        .collect();
    threads.each(work, tasks.into_par_iter(), |scratch, (i, linear, columns, out)| {
        product(threads, scratch, &sources[i], rounded.get(i), &linear, columns, put, out);
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
    let mut blocks = Blocks::new(threads, &source, &gate, out);
    let tasks: Vec<_> = blocks.tasks().collect();
    let work = 2 * source.rows * gate.weight.len();
    threads.each(work, tasks.into_par_iter(), |scratch, (columns, out)| {
        product(threads, scratch, &source, rounded.first(), &gate, columns.clone(), Put::StoreSilu, out);
        product(threads, scratch, &source, rounded.first(), &up, columns, Put::Multiply, out);
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

/// Rows of outputs cut into blocks of columns, as tasks for threads: the pieces of a block stand together, one for each row.
pub struct Blocks<'o> {
    pieces: Vec<&'o mut [f32]>,
    rows: usize,
    width: usize,
    block: usize,
}

impl<'o> Blocks<'o> {
    pub fn new(threads: &Threads, source: &Source, linear: &Linear, out: impl Iterator<Item = &'o mut [f32]>) -> Self {
        let (rows, width) = (source.rows, linear.weight.len() / source.width);
        // Four blocks for each thread even out their speeds; 480 outputs are long enough to amortise a task's start.
        let block = width.div_ceil(4 * threads.count()).next_multiple_of(BLOCK).clamp(BLOCK, 10 * BLOCK);
        let mut pieces = Vec::new();
        pieces.resize_with(rows * width.div_ceil(block), Default::default);
        for (i, row) in out.take(rows).enumerate() {
            for (b, piece) in row.chunks_mut(block).enumerate() {
                pieces[b * rows + i] = piece;
            }
        }
        Blocks { pieces, rows, width, block }
    }

    /// The columns of each block and its pieces.
    pub fn tasks<'p>(&'p mut self) -> impl Iterator<Item = (Range<usize>, &'p mut [&'o mut [f32]])> + use<'p, 'o> {
        let (block, width) = (self.block, self.width);
        let blocks = self.pieces.chunks_mut(self.rows.max(1)).enumerate();
        blocks.map(move |(b, pieces)| (b * block..((b + 1) * block).min(width), pieces))
    }
}

/// Some columns of a product on the calling thread; `out[i]` are those of row i.
#[allow(clippy::too_many_arguments)] // they are what a task consists of
fn product(
    threads: &Threads,
    scratch: &mut Scratch,
    source: &Source,
    rounded: Option<&Rounded>,
    linear: &Linear,
    columns: Range<usize>,
    put: Put,
    out: &mut [&mut [f32]],
) {
    let mut out = Out { rows: out, first: columns.start, bias: linear.bias, put };
    match linear.weight {
        Data::BF16(w) if let (Some(bf16), Some(rounded)) = (threads.bf16, rounded) => {
            bf16.product(scratch, rounded, w, source.width, columns, &mut out);
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
        1 => stream::<S, E, 1>(simd, source, weight, columns, out),
        2 => stream::<S, E, 2>(simd, source, weight, columns, out),
        3 => stream::<S, E, 3>(simd, source, weight, columns, out),
        STREAMED => stream::<S, E, STREAMED>(simd, source, weight, columns, out),
        // The most accumulators that the registers hold: 104 of 117 GFLOP/s on one core of an EPYC 9004 with AVX-512
        // (4 x 4: 91), 81 with AVX2 (4 x 6: 57).
        _ if S::f32s::LEN == LANES => tiles::<S, E, 4, 6>(simd, scratch, source, weight, columns, out),
        _ => tiles::<S, E, 2, 3>(simd, scratch, source, weight, columns, out),
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

    /// Puts the sums of a tile of accumulators, at most 24: source rows from `at` on, and columns.
    #[inline(always)]
    pub fn put_tile<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        acc: &[[V<S>; N]; M],
        at: usize,
        columns: Range<usize>,
    ) {
        let zero = V::splat(simd, 0.0);
        // Sixteen accumulators, if there are so many, then eight, in the order of their outputs.
        let mut values = [0.0; LANES + LANES / 2];
        let mut low = [zero; LANES];
        let mut high = [zero; LANES / 2];
        let whole = if M * N > LANES / 2 { LANES } else { 0 };
        for m in 0..M {
            for n in 0..N {
                match m * N + n {
                    i if i < whole => low[i] = acc[m][n],
                    i => high[i - whole] = acc[m][n],
                }
            }
        }
        if whole > 0 {
            self.finish::<S, N>(simd, sums(simd, low), columns.start, 0).store_slice(&mut values[..LANES]);
        }
        if M * N > whole {
            let last = self.finish::<S, N>(simd, sums_of_8(simd, high), columns.start, whole);
            values[whole..whole + LANES / 2].copy_from_slice(&last.to_array()[..LANES / 2]);
        }
        for m in 0..M {
            self.put::<N>(at + m, columns.start, &values[m * N..], columns.len());
        }
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

/// Few rows: every weight row is read once, in order, and multiplied with all of them.
#[inline(always)]
fn stream<S: Simd, E: Element, const M: usize>(
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
    for first in columns.clone().step_by(LANES) {
        let n = LANES.min(columns.end - first);
        let mut acc = [[V::splat(simd, 0.0); LANES]; M];
        for j in 0..n {
            let (w, w_tail) = weight[(first + j) * width..][..width].as_chunks();
            let mut sums = [V::splat(simd, 0.0); M];
            for (i, w) in w[..whole].iter().enumerate() {
                let w = E::widen(simd, w);
                for m in 0..M {
                    sums[m] = V::from_slice(simd, &rows[m][i]).mul_add(w, sums[m]);
                }
            }
            if !w_tail.is_empty() {
                let w = E::widen(simd, &tail(w_tail));
                for m in 0..M {
                    sums[m] = V::from_slice(simd, &tails[m]).mul_add(w, sums[m]);
                }
            }
            for m in 0..M {
                acc[m][j] = sums[m];
            }
        }
        for (m, acc) in acc.into_iter().enumerate() {
            let values = out.finish::<S, LANES>(simd, sums(simd, acc), first, 0);
            out.put::<LANES>(m, first, &values.to_array(), n);
        }
    }
}

/// Many rows: `N` weight rows at a time are widened into a panel, and the source rows pass over it, `M` at a time.
#[inline(always)]
fn tiles<S: Simd, E: Element, const M: usize, const N: usize>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    weight: &[E],
    columns: Range<usize>,
    out: &mut Out,
) {
    let width = source.width;
    let steps = width.div_ceil(LANES);
    let panel = scratch.lines(N * steps);
    let pass = (PASSED / width.max(1)).max(PASSING).next_multiple_of(M);
    for start in (0..source.rows).step_by(pass) {
        let end = source.rows.min(start + pass);
        for first in columns.clone().step_by(N) {
            let n = N.min(columns.end - first);
            for (j, panel) in panel.chunks_mut(steps).enumerate() {
                // Rows that are missing in the last panel are those of its last one again; their results go nowhere.
                let (w, w_tail) = weight[(first + j.min(n - 1)) * width..][..width].as_chunks();
                for (line, w) in panel.iter_mut().zip(w) {
                    line.0 = E::widen(simd, w).to_array();
                }
                if !w_tail.is_empty() {
                    panel[steps - 1].0 = E::widen(simd, &tail(w_tail)).to_array();
                }
            }
            let columns = first..first + n;
            let mut at = start;
            while at < end {
                at += match end - at {
                    1 => tile::<S, 1, N>(simd, source, at, panel, columns.clone(), out),
                    2 => tile::<S, 2, N>(simd, source, at, panel, columns.clone(), out),
                    3 if M > 3 => tile::<S, 3, N>(simd, source, at, panel, columns.clone(), out),
                    _ => tile::<S, M, N>(simd, source, at, panel, columns.clone(), out),
                };
            }
        }
    }
}

/// `M` source rows from `at` on times the `N` rows of a panel. Returns M.
#[inline(always)]
fn tile<S: Simd, const M: usize, const N: usize>(
    simd: S,
    source: &Source,
    at: usize,
    panel: &[Line],
    columns: Range<usize>,
    out: &mut Out,
) -> usize {
    // Loops over constants, not array::map: its closures are not always inlined, and accumulators must not touch memory.
    let steps = panel.len() / N;
    let whole = source.width / LANES;
    let mut rows: [&[[f32; LANES]]; M] = [&[]; M];
    let mut weights: [&[Line]; N] = [&[]; N];
    for m in 0..M {
        rows[m] = &source.row(at + m).as_chunks().0[..whole];
    }
    for n in 0..N {
        weights[n] = &panel[n * steps..][..whole];
    }
    let zero = V::splat(simd, 0.0);
    let mut acc = [[zero; N]; M];
    let mut a = [zero; M];
    for i in 0..whole {
        for m in 0..M {
            a[m] = V::from_slice(simd, &rows[m][i]);
        }
        for n in 0..N {
            let w = V::from_slice(simd, &weights[n][i].0);
            for m in 0..M {
                acc[m][n] = a[m].mul_add(w, acc[m][n]);
            }
        }
    }
    if steps > whole {
        for m in 0..M {
            a[m] = V::from_slice(simd, &tail(&source.row(at + m)[whole * LANES..]));
        }
        for n in 0..N {
            let w = V::from_slice(simd, &panel[n * steps + whole].0);
            for m in 0..M {
                acc[m][n] = a[m].mul_add(w, acc[m][n]);
            }
        }
    }
    out.put_tile(simd, &acc, at, columns);
    M
}
