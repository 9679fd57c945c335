//! What happens to rows one by one: norms, rotations, log-probabilities.

use fearless_simd::f64x8;
use fearless_simd::prelude::*;

use super::simd::{LANES, V, dot_f64, exp, tail};

/// `out = x / sqrt(mean(x²) + eps) ⊙ weight`; the mean square is summed in f64.
#[inline(always)]
pub fn rms_norm<S: Simd>(simd: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = dot_f64(simd, x, x) / x.len() as f64;
    let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * scale * w;
    }
}

/// RMSNorm of a head in place (Qwen3's q/k norm).
#[inline(always)]
pub fn rms_norm_in_place<S: Simd>(simd: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = dot_f64(simd, x, x) / x.len() as f64;
    let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}

/// RoPE of one head in place: its halves are rotated against each other. `angles` are cosines, then sines.
#[inline(always)]
pub fn rotate<S: Simd>(_: S, head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let ((a, b), (cos, sin)) = (head.split_at_mut(half), angles.split_at(half));
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// Cosines, then sines, of `position · inv_freq`. The product is rounded to f32, as the reference rounds it.
pub fn angles(position: u32, inv_freq: &[f32], out: &mut [f32]) {
    let (cos, sin) = out.split_at_mut(inv_freq.len());
    for ((f, cos), sin) in inv_freq.iter().zip(cos).zip(sin) {
        let (s, c) = f64::from(position as f32 * f).sin_cos();
        (*cos, *sin) = (c as f32, s as f32);
    }
}

/// `row[target] − ln Σ e^row`, summed in f64.
#[inline(always)]
pub fn log_prob<S: Simd>(simd: S, row: &[f32], target: usize) -> f32 {
    let top = row.iter().fold(f32::NEG_INFINITY, |top, &x| if x > top { x } else { top });
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut acc = f64x8::splat(simd, 0.0);
    let mut add = |x: &[f32; LANES]| {
        let (low, high) = exp(simd, V::from_slice(simd, x) - top).widen();
        acc += low + high;
    };
    chunks.iter().for_each(&mut add);
    if !rest.is_empty() {
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(&tail(rest)[..rest.len()]);
        add(&last);
    }
    let total: f64 = acc.to_array().iter().sum();
    (f64::from(row[target]) - f64::from(top) - total.ln()) as f32
}
