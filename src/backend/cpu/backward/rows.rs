//! What happens to gradients row by row. Sums over a row are in f64.

use fearless_simd::f64x8;
use fearless_simd::prelude::*;

use crate::backend::cpu::simd::{LANES, V, dot_f64, exp, silu, tail};

/// The largest value of a row, and ln Σ e^(row − largest).
#[inline(always)]
fn log_sum<S: Simd>(simd: S, row: &[f32]) -> (f32, f64) {
    let top = row.iter().fold(f32::NEG_INFINITY, |top, &x| if x > top { x } else { top });
    let mut acc = f64x8::splat(simd, 0.0);
    let mut add = |x: V<S>| {
        let (low, high) = exp(simd, x - top).widen();
        acc += low + high;
    };
    let (chunks, rest) = row.as_chunks::<LANES>();
    chunks.iter().for_each(|x| add(V::from_slice(simd, x)));
    if !rest.is_empty() {
        let n = rest.len();
        add(V::from_fn(simd, |i| if i < n { rest[i] } else { f32::NEG_INFINITY }));
    }
    (top, acc.to_array().iter().sum::<f64>().ln())
}

/// Applies `f` to whole vectors of a row in place; what stands behind its end is anything.
#[inline(always)]
fn map<S: Simd>(simd: S, row: &mut [f32], mut f: impl FnMut(usize, V<S>) -> V<S>) {
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let whole = chunks.len() * LANES;
    for (i, chunk) in chunks.iter_mut().enumerate() {
        f(i * LANES, V::from_slice(simd, chunk)).store_slice(chunk);
    }
    if !rest.is_empty() {
        let last = f(whole, V::from_slice(simd, &tail(rest))).to_array();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// The vector of a row from `at` on, with zeros behind its end.
#[inline(always)]
fn load<S: Simd>(simd: S, row: &[f32], at: usize) -> V<S> {
    match row[at..].first_chunk::<LANES>() {
        Some(whole) => V::from_slice(simd, whole),
        None => V::from_slice(simd, &tail(&row[at..])),
    }
}

/// −ln softmax(row)[target]; the row becomes scale·(softmax(row) − onehot).
#[inline(always)]
pub fn cross_entropy<S: Simd>(simd: S, row: &mut [f32], target: usize, scale: f32) -> f32 {
    let (top, ln) = log_sum(simd, row);
    let loss = ln - (f64::from(row[target]) - f64::from(top));
    let total = ln as f32;
    map(simd, row, |_, x| exp(simd, x - top - total) * scale);
    row[target] -= scale;
    loss as f32
}

/// Σ q·(ln q − ln p), p = softmax(row) and q = softmax(other); the row becomes scale·(p − q).
#[inline(always)]
pub fn divergence<S: Simd>(simd: S, row: &mut [f32], other: &[f32], scale: f32) -> f32 {
    let ((top, ln), (other_top, other_ln)) = (log_sum(simd, row), log_sum(simd, other));
    let (ln_p, ln_q) = (f64::from(top) + ln, f64::from(other_top) + other_ln);
    let (total, other_total) = (ln as f32, other_ln as f32);
    // ln q − ln p = (other − row) − (ln_q − ln_p); the weights q sum to 1.
    let mut acc = f64x8::splat(simd, 0.0);
    map(simd, row, |at, x| {
        let y = load(simd, other, at);
        let n = other.len() - at;
        let q = exp(simd, y - other_top - other_total);
        let q = if n < LANES { V::from_fn(simd, |i| if i < n { q.to_array()[i] } else { 0.0 }) } else { q };
        // What has no weight in q adds nothing, however small its p and q are.
        let term = q.simd_gt(0.0).select(q * (y - x), V::splat(simd, 0.0));
        let (low, high) = term.widen();
        acc += low + high;
        (exp(simd, x - top - total) - q) * scale
    });
    (acc.to_array().iter().sum::<f64>() - (ln_q - ln_p)) as f32
}

/// Adds what RMSNorm makes of `d_h` (and of a logit's gradient, through the router) to the gradient of its input.
#[inline(always)]
pub fn rms_norm<S: Simd>(
    simd: S,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    d_h: &[f32],
    gate: Option<(&[f32], f32)>,
    d_x: &mut [f32],
) {
    let n = x.len() as f64;
    let scale = 1.0 / (dot_f64(simd, x, x) / n + f64::from(eps)).sqrt();
    let grad = |i: usize| match gate {
        Some((router, d_logit)) => (d_h[i] + router[i] * d_logit) * weight[i],
        None => d_h[i] * weight[i],
    };
    let along: f64 = (0..x.len()).map(|i| f64::from(grad(i)) * f64::from(x[i])).sum();
    let (scale, along) = (scale as f32, (along * scale * scale / n) as f32);
    for (i, d_x) in d_x.iter_mut().enumerate() {
        *d_x += scale * (grad(i) - x[i] * along);
    }
}

/// RoPE and the norm of a head backward, in place. `norm` is what was normalised, its weight and eps.
#[inline(always)]
pub fn head<S: Simd>(simd: S, d: &mut [f32], angles: &[f32], norm: Option<(&[f32], &[f32], f32)>) {
    let half = d.len() / 2;
    let ((a, b), (cos, sin)) = (d.split_at_mut(half), angles.split_at(half));
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos + *b * sin, *b * cos - *a * sin);
    }
    let Some((x, weight, eps)) = norm else { return };
    let n = x.len() as f64;
    let scale = 1.0 / (dot_f64(simd, x, x) / n + f64::from(eps)).sqrt();
    d.iter_mut().zip(weight).for_each(|(d, w)| *d *= w);
    let along = dot_f64(simd, d, x) * scale * scale / n;
    for (d, x) in d.iter_mut().zip(x) {
        *d = scale as f32 * (*d - x * along as f32);
    }
}

/// The gradients of g and u in their places, for a = silu(g)·u; returns d_act·a.
#[inline(always)]
pub fn swiglu<S: Simd>(simd: S, gate: &mut [f32], up: &mut [f32], d_act: &[f32]) -> f32 {
    let mut dot = f64x8::splat(simd, 0.0);
    map(simd, gate, |at, g| {
        let (u, d) = (load(simd, up, at), load(simd, d_act, at));
        let sigmoid = V::splat(simd, 1.0) / (exp(simd, -g) + 1.0);
        let silu = silu(simd, g);
        let (low, high) = (d * silu * u).widen();
        dot += low + high;
        let d_up = (d * silu).to_array();
        let n = LANES.min(up.len() - at);
        up[at..at + n].copy_from_slice(&d_up[..n]);
        d * u * sigmoid * (g * (V::splat(simd, 1.0) - sigmoid) + 1.0)
    });
    dot.to_array().iter().sum::<f64>() as f32
}

/// a·b and, of a bias, c·bias.
#[inline(always)]
pub fn dots<S: Simd>(simd: S, a: &[f32], b: &[f32], bias: Option<(&[f32], &[f32])>) -> f32 {
    (dot_f64(simd, a, b) + bias.map_or(0.0, |(c, bias)| dot_f64(simd, c, bias))) as f32
}
