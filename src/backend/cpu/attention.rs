//! Flash attention over paged K/V by row ranges (Dao, arXiv 2307.08691): running maximum and sum, no `[T, T]` anywhere.
//!
//! K/V rows are taken in segments of [`SEGMENT`] at fixed borders. Within a segment the softmax runs page by page; segments
//! are merged in order. In prefill a thread takes some query rows and walks their segments, in decode every segment is a
//! task of its own; the additions are the same, so the results are, to the last bit and for any number of threads.

// Accumulators stay in registers only in loops over constants, by index.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use fearless_simd::prelude::*;
use fearless_simd::{dispatch, u32x16};
use rayon::prelude::*;

use super::kv_pool::KvPool;
use super::simd::{LANES, V, exp, max, sum};
use super::threads::Threads;
use crate::backend::PAGE;

/// K/V rows attended to in one go: short enough to occupy several threads in decode, long enough that merging is free.
const SEGMENT: usize = 8 * PAGE;

/// Query rows of a task: their heads share every K/V page while it is in the first-level cache.
const QUERY_ROWS: usize = 16;

/// The inputs of attention, by query row.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// `[rows, heads · head_dim]`
    pub q: &'a [f32],
    /// `[rows]`: the K/V rows [first, end) that a row sees
    pub first: &'a [u32],
    pub end: &'a [u32],
    /// Query heads.
    pub heads: usize,
    pub layer: usize,
    pub scale: f32,
}

/// The query rows of one sequence, and the query heads of one K/V head, that a task takes.
#[derive(Clone)]
struct Share {
    slot: usize,
    rows: Range<usize>,
    kv_head: usize,
}

/// `out[i] = softmax(scale · q[i]·Kᵀ)·V` for all rows. `slots` are ascending runs, `partial` is memory to reuse.
pub fn attend(
    threads: &Threads,
    kv: &KvPool,
    queries: &Queries,
    slot_of: impl Fn(usize) -> usize,
    out: &mut [f32],
    partial: &mut Vec<f32>,
) {
    let (rows, kv_heads) = (queries.first.len(), kv.layout.kv_heads);
    let width = queries.heads / kv_heads * kv.layout.head_dim;
    let shares = shares(rows, kv_heads, &slot_of);

    // The part of every output row that belongs to a K/V head, in the order of the shares.
    let mut pieces: Vec<&mut [f32]> = Vec::new();
    pieces.resize_with(rows * kv_heads, Default::default);
    let mut of_row = out.chunks_mut(width);
    for block in shares.chunks(kv_heads) {
        let Range { start, end } = block[0].rows;
        for row in start..end {
            for kv_head in 0..kv_heads {
                pieces[start * kv_heads + kv_head * (end - start) + row - start] = of_row.next().expect("all rows");
            }
        }
    }
    let mut tasks = Vec::with_capacity(shares.len());
    let mut rest = &mut pieces[..];
    for share in &shares {
        let (own, behind) = rest.split_at_mut(share.rows.len());
        rest = behind;
        tasks.push((share, own));
    }

    if tasks.len() >= 2 * threads.count() {
        threads.each(usize::MAX, tasks.into_par_iter(), |scratch, (share, out)| {
            let work = Work::new(kv, queries, share);
            let (memory, room) = scratch.floats(2 * work.floats() + kv.room()).split_at_mut(2 * work.floats());
            let mut memory = memory.chunks_exact_mut(work.floats());
            let mut states = std::iter::from_fn(|| memory.next().map(|m| work.state(m)));
            let (mut total, mut part) = (states.next().expect("two"), states.next().expect("two"));
            total.clear();
            for segment in work.segments() {
                part.clear();
                dispatch!(threads.level, simd => work.see(simd, segment, &mut part, room));
                total.merge(&part);
            }
            work.finish(&total, out);
        });
        return;
    }

    // Few tasks: their segments apart, then together.
    let works: Vec<_> = tasks.iter().map(|(share, _)| Work::new(kv, queries, share)).collect();
    let floats: usize = works.iter().map(|w| (1 + w.segments().len()) * w.floats()).sum();
    partial.resize(partial.len().max(floats), 0.0);
    let mut rest = &mut partial[..];
    let mut parts = Vec::new();
    let mut totals = Vec::new();
    for work in &works {
        let mut own = std::iter::from_fn(|| {
            let (own, behind) = std::mem::take(&mut rest).split_at_mut(work.floats());
            rest = behind;
            Some(work.state(own))
        });
        totals.push(own.next().expect("memory"));
        parts.extend(work.segments().zip(own).map(|(segment, state)| (work, segment, state)));
    }
    let rows: usize = parts.iter().map(|(work, ..)| work.len() * SEGMENT.min(work.range(work.len() - 1).len())).sum();
    threads.each(2 * rows * kv.layout.head_dim, parts.par_iter_mut(), |scratch, (work, segment, state)| {
        state.clear();
        let room = scratch.floats(kv.room());
        dispatch!(threads.level, simd => work.see(simd, *segment, state, room));
    });
    let mut parts = parts.iter();
    for ((work, mut total), (_, out)) in works.iter().zip(totals).zip(tasks) {
        total.clear();
        for _ in work.segments() {
            total.merge(&parts.next().expect("a part for each segment").2);
        }
        work.finish(&total, out);
    }
}

/// Blocks of rows of one sequence, by K/V head.
fn shares(rows: usize, kv_heads: usize, slot_of: impl Fn(usize) -> usize) -> Vec<Share> {
    let mut shares = Vec::new();
    let mut start = 0;
    while start < rows {
        let slot = slot_of(start);
        let end = (start..rows.min(start + QUERY_ROWS)).find(|&row| slot_of(row) != slot);
        let end = end.unwrap_or(rows.min(start + QUERY_ROWS));
        shares.extend((0..kv_heads).map(|kv_head| Share { slot, rows: start..end, kv_head }));
        start = end;
    }
    shares
}

/// The softmax state of some queries.
struct State<'s> {
    /// `[queries]`: the highest score seen
    max: &'s mut [f32],
    /// `[queries]`: sum of e^(score − max)
    sum: &'s mut [f32],
    /// `[queries, padded head_dim]`: sum of e^(score − max)·V
    out: &'s mut [f32],
}

impl State<'_> {
    /// Of nothing seen.
    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }

    /// Adds what another state has seen.
    fn merge(&mut self, other: &State) {
        let d = self.out.len() / self.max.len();
        for i in 0..self.max.len() {
            let top = self.max[i].max(other.max[i]);
            // Where no score counts, so far, sums are 0, or NaN, and that must stay.
            let zero = if top == f32::NEG_INFINITY { 0.0 } else { top };
            let (a, b) = ((self.max[i] - zero).exp(), (other.max[i] - zero).exp());
            self.max[i] = top;
            self.sum[i] = self.sum[i] * a + other.sum[i] * b;
            for (x, y) in self.out[i * d..][..d].iter_mut().zip(&other.out[i * d..][..d]) {
                *x = *x * a + y * b;
            }
        }
    }
}

/// A share with all that is needed to work on it.
#[derive(Clone, Copy)]
struct Work<'a> {
    kv: &'a KvPool,
    queries: &'a Queries<'a>,
    share: &'a Share,
    table: &'a [u32],
    /// Query heads of the K/V head.
    group: usize,
    head_dim: usize,
}

/// Scores or weights of one query for the keys of a page.
type PageRow = [f32; PAGE];

impl<'a> Work<'a> {
    fn new(kv: &'a KvPool, queries: &'a Queries<'a>, share: &'a Share) -> Self {
        let table = kv.table(queries.layer, share.slot);
        let group = queries.heads / kv.layout.kv_heads;
        Work { kv, queries, share, table, group, head_dim: kv.layout.head_dim }
    }

    /// Queries: rows times query heads.
    fn len(&self) -> usize {
        self.share.rows.len() * self.group
    }

    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Memory of a state.
    fn floats(&self) -> usize {
        self.len() * (2 + self.padded())
    }

    fn state<'s>(&self, memory: &'s mut [f32]) -> State<'s> {
        let (out, rest) = memory.split_at_mut(self.len() * self.padded());
        let (max, sum) = rest.split_at_mut(self.len());
        State { max, sum, out }
    }

    fn query(&self, i: usize) -> &'a [f32] {
        let (row, head) = (self.share.rows.start + i / self.group, self.share.kv_head * self.group + i % self.group);
        &self.queries.q[(row * self.queries.heads + head) * self.head_dim..][..self.head_dim]
    }

    /// K/V rows that a query sees.
    fn range(&self, i: usize) -> Range<usize> {
        let row = self.share.rows.start + i / self.group;
        self.queries.first[row] as usize..self.queries.end[row] as usize
    }

    /// Numbers of the segments in which some query sees something. Ranges ascend with the rows.
    fn segments(&self) -> impl ExactSizeIterator<Item = usize> + use<> {
        self.range(0).start / SEGMENT..self.range(self.len() - 1).end.div_ceil(SEGMENT)
    }

    /// Divides by the sums. `out` are the rows' parts.
    fn finish(&self, state: &State, out: &mut [&mut [f32]]) {
        for (i, out) in out.iter_mut().flat_map(|row| row.chunks_exact_mut(self.head_dim)).enumerate() {
            for (o, x) in out.iter_mut().zip(&state.out[i * self.padded()..]) {
                *o = x / state.sum[i];
            }
        }
    }

    /// Lets all queries see a segment.
    #[inline(always)]
    fn see<S: Simd>(&self, simd: S, segment: usize, state: &mut State, room: &mut [f32]) {
        let seen = self.range(0).start..self.range(self.len() - 1).end;
        let first = (segment * SEGMENT).max(seen.start) / PAGE;
        let end = ((segment + 1) * SEGMENT).min(seen.end).div_ceil(PAGE);
        for page in first..end {
            let head = self.kv.head(self.table[page], self.share.kv_head, room);
            let mut i = 0;
            while i < self.len() {
                // As many accumulators as the registers hold: 6 queries by 4 vectors, or 6 by 1, which reads fewer keys
                // for each than 3 by 2: SmolLM2-135M reads 2048 tokens at 303 tokens/s on 2 cores, 265 before.
                i += match (self.len() - i, S::f32s::LEN) {
                    (6.., LANES) => self.tile::<S, 6, 4>(simd, page, head, i, state),
                    (4.., LANES) => self.tile::<S, 4, 4>(simd, page, head, i, state),
                    (3, LANES) => self.tile::<S, 3, 4>(simd, page, head, i, state),
                    (2, LANES) => self.tile::<S, 2, 4>(simd, page, head, i, state),
                    (_, LANES) => self.tile::<S, 1, 4>(simd, page, head, i, state),
                    (6.., _) => self.tile::<S, 6, 1>(simd, page, head, i, state),
                    (3.., _) => self.tile::<S, 3, 2>(simd, page, head, i, state),
                    (2, _) => self.tile::<S, 2, 2>(simd, page, head, i, state),
                    _ => self.tile::<S, 1, 2>(simd, page, head, i, state),
                };
            }
        }
    }

    /// Lets `M` queries from `at` on see a page, of which they have `head`, `N` vectors at a time. Returns M.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        page: usize,
        head: &[f32],
        at: usize,
        state: &mut State,
    ) -> usize {
        let start = page * PAGE;
        let within = |row: usize| row.saturating_sub(start).min(PAGE);
        let seen = |m| within(self.range(at + m).start)..within(self.range(at + m).end);
        let (low, high) = (seen(0).start, seen(M - 1).end);
        if low >= high {
            return M;
        }
        let (_, keys) = head.split_at(PAGE * self.head_dim);
        let mut queries: [&[f32]; M] = [&[]; M];
        for m in 0..M {
            queries[m] = self.query(at + m);
        }
        let mut weights = [[f32::NEG_INFINITY; PAGE]; M];
        for block in (0..PAGE).step_by(N * LANES).filter(|&b| b < high && b + N * LANES > low) {
            scores::<S, M, N>(simd, keys, &queries, self.queries.scale, block, &mut weights);
        }
        for (m, weights) in weights.iter_mut().enumerate() {
            self.softmax(simd, seen(m), weights, at + m, state);
        }
        // Rows that all of them see are read once. Those that only some see are not multiplied by 0 for the others: they may
        // hold a NaN or an infinity.
        let common = (0..M).fold(0..PAGE, |all, m| all.start.max(seen(m).start)..all.end.min(seen(m).end));
        let common = if common.is_empty() { high..high } else { common };
        let outs = &mut state.out[at * self.padded()..(at + M) * self.padded()];
        let edges = |outs: &mut [f32], before: bool| {
            for (m, out) in outs.chunks_exact_mut(self.padded()).enumerate() {
                let Range { start, end } = seen(m);
                let rows = if before { start..end.min(common.start) } else { start.max(common.end)..end };
                if !rows.is_empty() {
                    self.weigh::<S, 1, N>(simd, head, std::array::from_ref(&weights[m]), rows, out);
                }
            }
        };
        if low < common.start {
            edges(outs, true);
        }
        self.weigh::<S, M, N>(simd, head, &weights, common.clone(), outs);
        if common.end < high {
            edges(outs, false);
        }
        M
    }

    /// Adds weights times V over some rows of a page to the outputs of `M` queries.
    #[inline(always)]
    fn weigh<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        head: &[f32],
        weights: &[PageRow; M],
        rows: Range<usize>,
        outs: &mut [f32],
    ) {
        let (padded, d) = (self.padded(), self.head_dim);
        let mut column = 0;
        while column < padded {
            column += LANES
                * match (padded - column) / LANES {
                    n if n >= N => values::<S, M, N>(simd, head, d, weights, rows.clone(), column, outs),
                    3 if N > 3 => values::<S, M, 3>(simd, head, d, weights, rows.clone(), column, outs),
                    2 if N > 2 => values::<S, M, 2>(simd, head, d, weights, rows.clone(), column, outs),
                    _ => values::<S, M, 1>(simd, head, d, weights, rows.clone(), column, outs),
                };
        }
    }

    /// Turns the scores of query i into weights, 0 outside `range`, and rescales its state to the new maximum.
    #[inline(always)]
    fn softmax<S: Simd>(&self, simd: S, range: Range<usize>, scores: &mut PageRow, i: usize, state: &mut State) {
        let lanes = u32x16::from_fn(simd, |lane| lane as u32);
        let nothing = V::splat(simd, f32::NEG_INFINITY);
        let mut vectors = [nothing; PAGE / LANES];
        for (n, v) in vectors.iter_mut().enumerate() {
            let key = lanes + (n * LANES) as u32;
            let seen = key.simd_ge(range.start as u32) & key.simd_lt(range.end as u32);
            *v = seen.select(V::from_slice(simd, &scores[n * LANES..][..LANES]), nothing);
        }
        let [a, b, c, d] = vectors;
        let top = state.max[i].max(max(a.max(b).max(c.max(d))));
        if top > state.max[i] {
            let shrink = (state.max[i] - top).exp();
            state.max[i] = top;
            state.sum[i] *= shrink;
            for x in &mut state.out[i * self.padded()..][..self.padded()] {
                *x *= shrink;
            }
        }
        // Where nothing is seen all scores are −inf, and so is the maximum, perhaps.
        let top = if top == f32::NEG_INFINITY { 0.0 } else { top };
        for (n, v) in vectors.iter_mut().enumerate() {
            *v = exp(simd, *v - top);
            v.store_slice(&mut scores[n * LANES..][..LANES]);
        }
        let [a, b, c, d] = vectors;
        state.sum[i] += sum((a + b) + (c + d));
    }
}

/// `weights[m][block..] = scale · q[m]·Kᵀ` for `N` vectors of keys.
#[inline(always)]
fn scores<S: Simd, const M: usize, const N: usize>(
    simd: S,
    keys: &[f32],
    queries: &[&[f32]; M],
    scale: f32,
    block: usize,
    weights: &mut [PageRow; M],
) {
    let mut acc = [[V::splat(simd, 0.0); N]; M];
    let d = queries[0].len();
    let mut q: [&[f32]; M] = [&[]; M];
    for m in 0..M {
        q[m] = &queries[m][..d];
    }
    let mut k = [V::splat(simd, 0.0); N];
    for (c, keys) in keys.as_chunks::<PAGE>().0[..d].iter().enumerate() {
        let keys = &keys[block..][..N * LANES];
        for n in 0..N {
            k[n] = V::from_slice(simd, &keys[n * LANES..][..LANES]);
        }
        for m in 0..M {
            let q = V::splat(simd, q[m][c]);
            for n in 0..N {
                acc[m][n] = q.mul_add(k[n], acc[m][n]);
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            (acc[m][n] * scale).store_slice(&mut weights[m][block + n * LANES..][..LANES]);
        }
    }
}

/// `outs[m][column..] += weights[m]·V` for `N` vectors of columns, over the given rows of the page. Returns N.
///
/// The last vector may reach beyond the head into whatever stands behind a row; those columns are padding of `outs`.
#[inline(always)]
fn values<S: Simd, const M: usize, const N: usize>(
    simd: S,
    head: &[f32],
    head_dim: usize,
    weights: &[PageRow; M],
    rows: Range<usize>,
    column: usize,
    outs: &mut [f32],
) -> usize {
    let padded = outs.len() / M;
    let mut acc = [[V::splat(simd, 0.0); N]; M];
    for m in 0..M {
        for n in 0..N {
            acc[m][n] = V::from_slice(simd, &outs[m * padded + column + n * LANES..][..LANES]);
        }
    }
    let mut v = [V::splat(simd, 0.0); N];
    for row in rows {
        let values = &head[row * head_dim + column..][..N * LANES];
        for n in 0..N {
            v[n] = V::from_slice(simd, &values[n * LANES..][..LANES]);
        }
        for m in 0..M {
            let w = V::splat(simd, weights[m][row]);
            for n in 0..N {
                acc[m][n] = w.mul_add(v[n], acc[m][n]);
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            acc[m][n].store_slice(&mut outs[m * padded + column + n * LANES..][..LANES]);
        }
    }
    N
}
