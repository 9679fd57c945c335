//! What happens to gradients row by row. Sums over a row are in f64.

use fearless_simd::f64x8;
use fearless_simd::prelude::*;

use crate::backend::cpu::simd::{LANES, V, dot_f64, exp, silu};

/// The vector of a row from `at` on, with something else behind its end.
#[inline(always)]
fn load<S: Simd>(simd: S, row: &[f32], at: usize, behind: f32) -> V<S> {
    let rest = &row[at..];
    match rest.first_chunk::<LANES>() {
        Some(whole) => V::from_slice(simd, whole),
        None => {
            let mut last = [behind; LANES];
            last[..rest.len()].copy_from_slice(rest);
            V::from_slice(simd, &last)
        }
    }
}

/// Puts the vector back; what stands behind the row's end goes nowhere.
#[inline(always)]
fn store<S: Simd>(v: V<S>, row: &mut [f32], at: usize) {
    let rest = &mut row[at..];
    match rest.first_chunk_mut::<LANES>() {
        Some(whole) => v.store_slice(whole),
        None => rest.copy_from_slice(&v.to_array()[..rest.len()]),
    }
}

// Loops, not maps over closures: a closure is compiled without the instructions of its caller unless it is inlined, and
// took 11% of a step.

/// The largest value of a row, and ln Σ e^(row − largest).
#[inline(always)]
fn log_sum<S: Simd>(simd: S, row: &[f32]) -> (f32, f64) {
    let mut top = f32::NEG_INFINITY;
    for &x in row {
        top = if x > top { x } else { top };
    }
    let mut acc = f64x8::splat(simd, 0.0);
    for at in (0..row.len()).step_by(LANES) {
        let (low, high) = exp(simd, load(simd, row, at, f32::NEG_INFINITY) - top).widen();
        acc += low + high;
    }
    (top, acc.to_array().iter().sum::<f64>().ln())
}

/// −ln softmax(row)[target]; the row becomes scale·(softmax(row) − onehot).
#[inline(always)]
pub fn cross_entropy<S: Simd>(simd: S, row: &mut [f32], target: usize, scale: f32) -> f32 {
    let (top, ln) = log_sum(simd, row);
    let loss = ln - (f64::from(row[target]) - f64::from(top));
    let total = ln as f32;
    for at in (0..row.len()).step_by(LANES) {
        store(exp(simd, load(simd, row, at, 0.0) - top - total) * scale, row, at);
    }
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
    for at in (0..row.len()).step_by(LANES) {
        // Finite, and of no weight behind the end.
        let (x, y) = (load(simd, row, at, 0.0), load(simd, other, at, f32::MIN));
        let q = exp(simd, y - other_top - other_total);
        // What has no weight in q adds nothing, however small its p and q are.
        let term = q.simd_gt(0.0).select(q * (y - x), V::splat(simd, 0.0));
        let (low, high) = term.widen();
        acc += low + high;
        store((exp(simd, x - top - total) - q) * scale, row, at);
    }
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
    let (router, d_logit) = gate.unwrap_or((weight, 0.0));
    let mut acc = f64x8::splat(simd, 0.0);
    for at in (0..x.len()).step_by(LANES) {
        let grad = (load(simd, d_h, at, 0.0) + load(simd, router, at, 0.0) * d_logit) * load(simd, weight, at, 0.0);
        let ((a, b), (c, d)) = (grad.widen(), load(simd, x, at, 0.0).widen());
        acc += a * c + b * d;
    }
    let along = acc.to_array().iter().sum::<f64>();
    let (scale, along) = (scale as f32, (along * scale * scale / n) as f32);
    for at in (0..x.len()).step_by(LANES) {
        let grad = (load(simd, d_h, at, 0.0) + load(simd, router, at, 0.0) * d_logit) * load(simd, weight, at, 0.0);
        let x = load(simd, x, at, 0.0);
        store(load(simd, d_x, at, 0.0) + (grad - x * along) * scale, d_x, at);
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

/// silu(g)·u.
#[inline(always)]
pub fn swiglu<S: Simd>(simd: S, gate: &[f32], up: &[f32], out: &mut [f32]) {
    for at in (0..gate.len()).step_by(LANES) {
        store(silu(simd, load(simd, gate, at, 0.0)) * load(simd, up, at, 0.0), out, at);
    }
}

/// The gradients of g and u in their places, for a = silu(g)·u; returns d_act·a.
#[inline(always)]
pub fn swiglu_backward<S: Simd>(simd: S, gate: &mut [f32], up: &mut [f32], d_act: &[f32]) -> f32 {
    let mut dot = f64x8::splat(simd, 0.0);
    let one = V::splat(simd, 1.0);
    for at in (0..gate.len()).step_by(LANES) {
        let (g, u, d) = (load(simd, gate, at, 0.0), load(simd, up, at, 0.0), load(simd, d_act, at, 0.0));
        let sigmoid = one / (exp(simd, -g) + 1.0);
        let d_silu = d * (g * sigmoid);
        let (low, high) = (d_silu * u).widen();
        dot += low + high;
        store(d_silu, up, at);
        store(d * u * sigmoid * (g * (one - sigmoid) + 1.0), gate, at);
    }
    dot.to_array().iter().sum::<f64>() as f32
}

/// a·b and, of a bias, c·bias.
#[inline(always)]
pub fn dots<S: Simd>(simd: S, a: &[f32], b: &[f32], bias: Option<(&[f32], &[f32])>) -> f32 {
    (dot_f64(simd, a, b) + bias.map_or(0.0, |(c, bias)| dot_f64(simd, c, bias))) as f32
}
