//! Flash attention backward over paged K/V by row ranges (Dao, arXiv 2307.08691).
//!
//! A task has the queries of one sequence that share a K/V head. Their log-sums are computed first; then the K/V are
//! walked page by page, and every query that sees some of a page adds to the gradients of its keys and values, and to
//! its own. So all sums run in one order, whoever runs them, and no probability is kept beyond its page.

use std::ops::Range;

use fearless_simd::dispatch;
use fearless_simd::prelude::*;
use rayon::prelude::*;

use crate::backend::PAGE;
use crate::backend::cpu::attention::Queries;
use crate::backend::cpu::kv_pool::KvPool;
use crate::backend::cpu::simd::{LANES, V, dot_f64, exp};
use crate::backend::cpu::threads::{Scratch, Threads};

/// What the forward pass made, by query row; see [`AttendBackward`](crate::backend::AttendBackward).
pub struct Forward<'a> {
    pub queries: Queries<'a>,
    /// `[rows, heads · head_dim]`
    pub out: &'a [f32],
    pub d_out: &'a [f32],
    /// `[slots + 1]`
    pub kv_start: &'a [u32],
}

/// What is to be filled.
pub struct Gradients<'o> {
    /// `[rows, heads · head_dim]`
    pub d_q: &'o mut [f32],
    /// `[kv_rows, kv_heads · head_dim]`
    pub d_k: &'o mut [f32],
    pub d_v: &'o mut [f32],
}

/// The queries of a slot and a K/V head, and the pieces of the gradients that are theirs.
#[derive(Default)]
struct Task<'o> {
    slot: usize,
    kv_head: usize,
    rows: Range<usize>,
    /// By row: the query heads of the K/V head.
    d_q: Vec<&'o mut [f32]>,
    /// By K/V row of the slot.
    d_k: Vec<&'o mut [f32]>,
    d_v: Vec<&'o mut [f32]>,
}

pub fn backward(
    threads: &Threads,
    kv: &KvPool,
    forward: &Forward,
    slot_of: impl Fn(usize) -> usize,
    gradients: Gradients,
) {
    let (heads, d, rows) = (kv.layout.kv_heads, kv.layout.head_dim, forward.queries.first.len());
    let slots = forward.kv_start.len() - 1;
    let make = |n| Task { slot: n / heads, kv_head: n % heads, ..Task::default() };
    let mut tasks: Vec<Task> = (0..slots * heads).map(make).collect();
    let mut pieces = gradients.d_q.chunks_exact_mut(forward.queries.heads / heads * d);
    for row in 0..rows {
        for task in &mut tasks[slot_of(row) * heads..][..heads] {
            if task.rows.is_empty() {
                task.rows = row..row;
            }
            task.rows.end = row + 1;
            task.d_q.push(pieces.next().expect("a piece for each row and K/V head"));
        }
    }
    let (mut keys, mut values) = (gradients.d_k.chunks_exact_mut(d), gradients.d_v.chunks_exact_mut(d));
    for slot in 0..slots {
        for _ in forward.kv_start[slot]..forward.kv_start[slot + 1] {
            for task in &mut tasks[slot * heads..][..heads] {
                task.d_k.push(keys.next().expect("a piece for each K/V row and head"));
                task.d_v.push(values.next().expect("a piece for each K/V row and head"));
            }
        }
    }
    let pairs: usize = forward.queries.first.iter().zip(forward.queries.end).map(|(f, e)| (e - f) as usize).sum();
    threads.each(5 * pairs * forward.queries.heads * d, tasks.into_par_iter(), |scratch, mut task| {
        dispatch!(threads.level, simd => run(simd, kv, forward, &mut task, scratch));
    });
}

#[inline(always)]
fn run<S: Simd>(simd: S, kv: &KvPool, forward: &Forward, task: &mut Task, scratch: &mut Scratch) {
    let (q, d, rows) = (&forward.queries, kv.layout.head_dim, task.rows.clone());
    let group = q.heads / kv.layout.kv_heads;
    for gradient in task.d_q.iter_mut().chain(&mut task.d_k).chain(&mut task.d_v) {
        gradient.fill(0.0);
    }
    let table = kv.table(q.layer, task.slot);
    let (room, rest) = scratch.floats(kv.room() + 2 * PAGE * d + 2 * rows.len() * group).split_at_mut(kv.room());
    let (turned, stats) = rest.split_at_mut(2 * PAGE * d);
    let (v_turned, keys) = turned.split_at_mut(PAGE * d);
    let (log_sums, deltas) = stats.split_at_mut(rows.len() * group);
    // Query i is head i % group of row i / group.
    let place = |i: usize| ((rows.start + i / group) * q.heads + task.kv_head * group + i % group) * d;
    let range = |i: usize| q.first[rows.start + i / group] as usize..q.end[rows.start + i / group] as usize;
    let seen = |i: usize, page: usize| {
        let within = |row: usize| row.saturating_sub(page * PAGE).min(PAGE);
        within(range(i).start)..within(range(i).end)
    };
    let pages = match rows.is_empty() {
        true => 0..0,
        false => range(0).start / PAGE..range(rows.len() * group - 1).end.div_ceil(PAGE),
    };

    for i in 0..log_sums.len() {
        deltas[i] = dot_f64(simd, &forward.d_out[place(i)..][..d], &forward.out[place(i)..][..d]) as f32;
        log_sums[i] = f32::NEG_INFINITY;
    }
    for page in pages.clone() {
        let (_, k_turned) = kv.head(table[page], task.kv_head, room).split_at(PAGE * d);
        for i in (0..log_sums.len()).filter(|&i| !seen(i, page).is_empty()) {
            let scores = scores(&q.q[place(i)..][..d], k_turned, seen(i, page), q.scale);
            log_sums[i] = with_more(simd, log_sums[i], &scores);
        }
    }
    for page in pages {
        let (values, k_turned) = kv.head(table[page], task.kv_head, room).split_at(PAGE * d);
        turn(values, d, v_turned);
        turn(k_turned, PAGE, keys);
        for i in (0..log_sums.len()).filter(|&i| !seen(i, page).is_empty()) {
            let (query, d_out, seen) = (&q.q[place(i)..][..d], &forward.d_out[place(i)..][..d], seen(i, page));
            let mut weights = scores(query, k_turned, seen.clone(), q.scale);
            exps(simd, &mut weights, log_sums[i]);
            let d_weights = scores(d_out, v_turned, seen.clone(), 1.0);
            let d_q = &mut task.d_q[i / group][i % group * d..][..d];
            for j in seen {
                let d_score = weights[j] * (d_weights[j] - deltas[i]) * q.scale;
                add_scaled(d_q, d_score, &keys[j * d..][..d]);
                add_scaled(task.d_k[page * PAGE + j], d_score, query);
                add_scaled(task.d_v[page * PAGE + j], weights[j], d_out);
            }
        }
    }
}

type PageRow = [f32; PAGE];

/// `scale · q·Kᵀ` for the rows of a page that are seen, −∞ for the others. `turned` is `[head_dim, PAGE]`.
#[inline(always)]
fn scores(q: &[f32], turned: &[f32], seen: Range<usize>, scale: f32) -> PageRow {
    let mut sums = [0.0; PAGE];
    for (&q, keys) in q.iter().zip(turned.as_chunks::<PAGE>().0) {
        add_scaled(&mut sums, q, keys);
    }
    std::array::from_fn(|j| if seen.contains(&j) { sums[j] * scale } else { f32::NEG_INFINITY })
}

/// e^(score − log_sum), in place.
#[inline(always)]
fn exps<S: Simd>(simd: S, scores: &mut PageRow, log_sum: f32) {
    for chunk in scores.as_chunks_mut::<LANES>().0 {
        exp(simd, V::from_slice(simd, chunk) - log_sum).store_slice(chunk);
    }
}

/// ln(e^log_sum + Σ e^scores)
#[inline(always)]
fn with_more<S: Simd>(simd: S, log_sum: f32, scores: &PageRow) -> f32 {
    let top = scores.iter().fold(log_sum, |top, &x| top.max(x));
    let zero = if top == f32::NEG_INFINITY { 0.0 } else { top };
    let mut weights = *scores;
    exps(simd, &mut weights, zero);
    let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    (f64::from(zero) + (sum + f64::from(log_sum - zero).exp()).ln()) as f32
}

/// `out[c, r] = rows[r, c]` for rows of `width`.
#[inline(always)]
fn turn(rows: &[f32], width: usize, out: &mut [f32]) {
    let count = rows.len() / width;
    for (r, row) in rows.chunks_exact(width).enumerate() {
        for (c, &x) in row.iter().enumerate() {
            out[c * count + r] = x;
        }
    }
}

#[inline(always)]
fn add_scaled(out: &mut [f32], scale: f32, row: &[f32]) {
    for (out, x) in out.iter_mut().zip(row) {
        *out += scale * x;
    }
}

/// Attention of rows over a range of K/V rows and their own K and V, `[rows, kv_heads · head_dim]`.
pub fn apart(
    threads: &Threads,
    kv: &KvPool,
    queries: &Queries,
    slot_of: impl Fn(usize) -> usize + Sync,
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
) {
    let (d, heads) = (kv.layout.head_dim, kv.layout.kv_heads);
    let rows = out.par_chunks_mut(queries.heads * d).enumerate();
    threads.each(usize::MAX, rows, |scratch, (row, out)| {
        let table = kv.table(queries.layer, slot_of(row));
        let range = queries.first[row] as usize..queries.end[row] as usize;
        let (room, rest) = scratch.floats(kv.room() + d).split_at_mut(kv.room());
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            let kv_head = head / (queries.heads / heads);
            let q = &queries.q[(row * queries.heads + head) * d..][..d];
            let own = (row * heads + kv_head) * d..(row * heads + kv_head + 1) * d;
            // Its own row comes first: its weight is 1, relative to the score that is the maximum so far.
            let mut max = dot(q, &k[own.clone()]) * queries.scale;
            let mut sum = 1.0;
            let acc = &mut rest[..d];
            acc.copy_from_slice(&v[own]);
            let pages = range.start / PAGE..range.end.div_ceil(PAGE);
            for (page, &place) in pages.clone().zip(&table[pages]) {
                let (values, turned) = kv.head(place, kv_head, room).split_at(PAGE * d);
                let within = |row: usize| row.saturating_sub(page * PAGE).min(PAGE);
                let seen = within(range.start)..within(range.end);
                let scores = dispatch!(threads.level, _ => scores(q, turned, seen.clone(), queries.scale));
                let top = scores.iter().fold(max, |top, &x| top.max(x));
                let shrink = (max - top).exp();
                (max, sum) = (top, sum * shrink);
                acc.iter_mut().for_each(|x| *x *= shrink);
                for j in seen {
                    let weight = (scores[j] - max).exp();
                    sum += weight;
                    add_scaled(acc, weight, &values[j * d..][..d]);
                }
            }
            out.iter_mut().zip(acc).for_each(|(out, x)| *out = *x / sum);
        }
    });
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}
