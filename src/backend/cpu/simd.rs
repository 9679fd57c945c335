//! The vector code that the CPU ops share, written once over [`Simd`] and compiled for AVX-512, AVX2, NEON and less.
//!
//! Everything counts in [`LANES`] of f32 whatever the registers hold, so the order of additions, and with FMA the result to
//! the last bit, is the same on every instruction set. A dot product has one such accumulator, fed in order, and is summed
//! as a fixed tree at the end: the result of a row never depends on which rows are computed beside it.

// Vectors stay in registers only in loops over constants, by index.
#![allow(clippy::needless_range_loop)]

use fearless_simd::prelude::*;
use fearless_simd::{f32x8, f32x16, f64x8, u16x16, u32x16};
use half::{bf16, f16};

/// Values in a vector.
pub const LANES: usize = 16;

/// [`LANES`] values of f32.
pub type V<S> = f32x16<S>;

/// A number that weights are stored in.
pub trait Element: bytemuck::Pod + Sync {
    /// The values of f32 that are stored.
    fn widen<S: Simd>(simd: S, stored: &[Self; LANES]) -> V<S>;
}

impl Element for f32 {
    #[inline(always)]
    fn widen<S: Simd>(simd: S, stored: &[Self; LANES]) -> V<S> {
        V::from_slice(simd, stored)
    }
}

impl Element for bf16 {
    /// The upper half of an f32.
    #[inline(always)]
    fn widen<S: Simd>(simd: S, stored: &[Self; LANES]) -> V<S> {
        (words(simd, bytemuck::cast_ref(stored)) << 16).bitcast()
    }
}

impl Element for f16 {
    /// The exponent is re-biased by a multiplication, which takes care of subnormal numbers.
    #[inline(always)]
    fn widen<S: Simd>(simd: S, stored: &[Self; LANES]) -> V<S> {
        let bits = words(simd, bytemuck::cast_ref(stored));
        let magnitude = (bits & 0x7fff) << 13;
        let scaled: V<S> = magnitude.bitcast::<V<S>>() * f32::from_bits((127 + 112) << 23);
        let special: V<S> = (magnitude | 0x7f80_0000).bitcast();
        let value: V<S> = magnitude.simd_ge(0x7c00 << 13).select(special, scaled);
        (value.bitcast::<u32x16<S>>() | ((bits & 0x8000) << 16)).bitcast()
    }
}

#[inline(always)]
fn words<S: Simd>(simd: S, halves: &[u16; LANES]) -> u32x16<S> {
    let (low, high) = u16x16::from_slice(simd, halves).widen();
    low.combine(high)
}

/// The last values of a row, fewer than [`LANES`], with zeros behind.
#[inline(always)]
pub fn tail<E: Element>(stored: &[E]) -> [E; LANES] {
    let mut full = [E::zeroed(); LANES];
    full[..stored.len()].copy_from_slice(stored);
    full
}

/// The sums of 16 vectors, each by the same tree: halves first.
#[inline(always)]
pub fn sums<S: Simd>(simd: S, v: [V<S>; LANES]) -> V<S> {
    let mut halves = [[f32x8::splat(simd, 0.0); LANES / 2]; 2];
    for i in 0..LANES {
        let (low, high) = v[i].split();
        halves[i / 8][i % 8] = low + high;
    }
    sums_of_halves(simd, halves[0]).combine(sums_of_halves(simd, halves[1]))
}

#[inline(always)]
fn sums_of_halves<S: Simd>(simd: S, v: [f32x8<S>; LANES / 2]) -> f32x8<S> {
    let mut quarters = [v[0]; 4];
    for i in 0..4 {
        let ((a, b), (c, d)) = (v[i].split(), v[i + 4].split());
        quarters[i] = a.combine(c) + b.combine(d);
    }
    let even = pairs(simd, quarters[0], quarters[2]);
    let odd = pairs(simd, quarters[1], quarters[3]);
    pairs(simd, even, odd)
}

/// Of each four lanes the upper two are added to the lower two; those of both vectors stand in turns.
#[inline(always)]
fn pairs<S: Simd>(simd: S, a: f32x8<S>, b: f32x8<S>) -> f32x8<S> {
    let ((a, c), (b, d)) = (a.split(), b.split());
    let low = simd.zip_low_f32x4(a, b).combine(simd.zip_low_f32x4(c, d));
    let high = simd.zip_high_f32x4(a, b).combine(simd.zip_high_f32x4(c, d));
    low + high
}

/// The sum of one vector, by a tree: halves first.
#[inline(always)]
pub fn sum<S: Simd>(v: V<S>) -> f32 {
    let (a, b) = v.split();
    let (a, b) = (a + b).split();
    let [a, b, c, d] = (a + b).to_array();
    (a + c) + (b + d)
}

/// The largest lane; a NaN may be passed over.
#[inline(always)]
pub fn max<S: Simd>(v: V<S>) -> f32 {
    let (a, b) = v.split();
    let (a, b) = a.max_precise(b).split();
    let [a, b, c, d] = a.max_precise(b).to_array();
    a.max(c).max(b.max(d))
}

/// e^x to within 2 ulp, after the Cephes library's expf: 0 below ln(2^-126), infinity above the largest f32, NaN for NaN.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: V<S>) -> V<S> {
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.722_83;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves an integer in the low bits
    let splat = |value| V::splat(simd, value);
    // Comparisons, not min and max: a NaN must come through.
    let (vanishes, overflows) = (x.simd_lt(LOWEST), x.simd_gt(HIGHEST));
    let shifted = x.mul_add(std::f32::consts::LOG2_E, splat(ROUND));
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = splat(1.987_569_1e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = p.mul_add(r, splat(coefficient));
    }
    let p = p.mul_add(r * r, r) + 1.0;
    let scaled = p.bitcast::<u32x16<S>>() + (shifted.bitcast::<u32x16<S>>() << 23);
    let value = vanishes.select(splat(0.0), x.is_nan().select(x, scaled.bitcast()));
    overflows.select(splat(f32::INFINITY), value)
}

/// x · sigmoid(x).
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: V<S>) -> V<S> {
    x / (exp(simd, -x) + 1.0)
}

/// Sums in f64: eight running sums over the products of two rows, of whole vectors and a tail.
#[inline(always)]
pub fn dot_f64<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f64 {
    let mut acc = [f64x8::splat(simd, 0.0); 2];
    let mut add = |a: &[f32; LANES], b: &[f32; LANES]| {
        let ((a0, a1), (b0, b1)) = (V::from_slice(simd, a).widen(), V::from_slice(simd, b).widen());
        acc = [a0.mul_add(b0, acc[0]), a1.mul_add(b1, acc[1])];
    };
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks(), b.as_chunks());
    for (a, b) in a.iter().zip(b) {
        add(a, b);
    }
    if !a_tail.is_empty() {
        add(&tail(a_tail), &tail(b_tail));
    }
    (acc[0] + acc[1]).to_array().iter().sum()
}

/// Memory for vectors, on cache lines.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Line(pub [f32; LANES]);

#[cfg(test)]
mod tests {
    use super::*;
    use fearless_simd::{Level, dispatch};

    /// Every instruction set that this machine has.
    fn levels() -> Vec<Level> {
        super::super::levels()
    }

    #[inline(always)]
    fn widened<S: Simd, E: Element>(simd: S, stored: &[E; LANES]) -> [f32; LANES] {
        E::widen(simd, stored).to_array()
    }

    #[test]
    fn every_half_widens_as_the_half_crate_says() {
        for level in levels() {
            for start in (0..=u16::MAX).step_by(LANES) {
                let bits: [u16; LANES] = std::array::from_fn(|i| start + i as u16);
                let halves = bits.map(f16::from_bits);
                let brains = bits.map(bf16::from_bits);
                let (a, b) = dispatch!(level, simd => (widened(simd, &halves), widened(simd, &brains)));
                for i in 0..LANES {
                    let (x, y) = (halves[i].to_f32(), brains[i].to_f32());
                    assert!(
                        a[i].to_bits() == x.to_bits() || x.is_nan() && a[i].is_nan(),
                        "f16 {:#x}: {}",
                        bits[i],
                        a[i]
                    );
                    assert!(
                        b[i].to_bits() == y.to_bits() || y.is_nan() && b[i].is_nan(),
                        "bf16 {:#x}: {}",
                        bits[i],
                        b[i]
                    );
                }
            }
        }
    }

    #[inline(always)]
    fn exps<S: Simd>(simd: S, x: &[f32; LANES]) -> [f32; LANES] {
        exp(simd, V::from_slice(simd, x)).to_array()
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for level in levels() {
            let of = |x: [f32; LANES]| dispatch!(level, simd => exps(simd, &x));
            for i in 0..200_000 {
                let x: [f32; LANES] = std::array::from_fn(|j| -87.3 + (i * LANES + j) as f32 * (176.02 / 3_200_000.0));
                for (x, y) in x.into_iter().zip(of(x)) {
                    let expected = f64::from(x).exp();
                    let ulp = f64::from(f32::EPSILON) * expected;
                    assert!((f64::from(y) - expected).abs() <= 2.0 * ulp, "exp({x}) = {y}, {expected}");
                }
            }
            let mut x = [0.0; LANES];
            x[..7].copy_from_slice(&[f32::NEG_INFINITY, -87.5, -1e30, f32::NAN, 0.0, 1e30, f32::INFINITY]);
            let y = of(x);
            assert_eq!((y[0], y[1], y[2], y[4]), (0.0, 0.0, 0.0, 1.0));
            assert!(y[3].is_nan() && y[5] == f32::INFINITY && y[6] == f32::INFINITY, "{y:?}");
        }
    }

    #[inline(always)]
    fn reductions<S: Simd>(simd: S, v: &[[f32; LANES]; LANES]) -> ([[f32; LANES]; 3], f64) {
        let vectors = v.map(|row| V::from_slice(simd, &row));
        let flat: &[f32] = v.as_flattened();
        let reduced = [sums(simd, vectors).to_array(), vectors.map(|v| sum(v)), vectors.map(|v| max(v))];
        (reduced, dot_f64(simd, &flat[..251], &flat[3..254]))
    }

    #[test]
    fn sums_and_maxima_are_those_of_the_rows() {
        for level in levels() {
            let mut v: [[f32; LANES]; LANES] =
                std::array::from_fn(|i| std::array::from_fn(|j| ((i * 37 + j * 11) % 29) as f32 - 14.0));
            v[3][5] = f32::NEG_INFINITY;
            let finite = v.map(|row| row.map(|x| x.max(-14.0)));
            let ([a, b, _], dot) = dispatch!(level, simd => reductions(simd, &finite));
            for (i, row) in finite.iter().enumerate() {
                let expected: f32 = row.iter().sum();
                assert_eq!((a[i], b[i]), (expected, expected), "sums of integers are exact");
            }
            let flat = finite.as_flattened();
            assert_eq!(dot, (0..251).map(|i| f64::from(flat[i]) * f64::from(flat[i + 3])).sum::<f64>());
            let ([.., maxima], _) = dispatch!(level, simd => reductions(simd, &v));
            for (i, row) in v.iter().enumerate() {
                assert_eq!(maxima[i], row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
    }
}
