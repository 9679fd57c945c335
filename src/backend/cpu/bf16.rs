//! Products of bf16 with bf16, where the processor multiplies them itself (AVX512-BF16).
//!
//! The source rows are rounded to bf16, as PyTorch and llama.cpp do with bf16 weights; products are exact and added in f32.
//! This is a choice of the user's ([`Precision::Bf16`](crate::engine::Precision)): twice as fast, 212 against 106 GFLOP/s on
//! one core of an EPYC 9004, and each input is off by up to 2^-9 of itself. Sums have one order here, too: a row's result does
//! not depend on the rows beside it.

/// bf16 values in a step: what one instruction multiplies.
pub const STEP: usize = 32;

/// The proof that this processor multiplies bf16.
#[derive(Clone, Copy)]
pub struct Bf16(instructions::Token);

impl Bf16 {
    pub fn detect() -> Option<Bf16> {
        instructions::detect().map(Bf16)
    }
}

/// Rows rounded to bf16, each padded with zeros to whole steps.
#[derive(Clone, Copy)]
pub struct Rounded<'a> {
    /// `[rows · steps]`
    pub data: &'a [[u16; STEP]],
    pub steps: usize,
    pub rows: usize,
}

impl Rounded<'_> {
    /// Some of the rows.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Self {
        Rounded { data: &self.data[rows.start * self.steps..], rows: rows.len(), ..*self }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod instructions {
    #[derive(Clone, Copy)]
    pub enum Token {}

    pub fn detect() -> Option<Token> {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Bf16 {
    pub fn round(self, _: &[f32], _: &mut [[u16; STEP]]) {
        match self.0 {}
    }

    pub fn product(
        self,
        _: &mut super::threads::Scratch,
        _: &Rounded,
        _: &[half::bf16],
        _: usize,
        _: std::ops::Range<usize>,
        _: &mut super::linear::Out,
    ) {
        match self.0 {}
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
// Accumulators stay in registers only in loops over constants, by index.
#[allow(clippy::needless_range_loop)]
mod instructions {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps};
    use std::ops::Range;

    use fearless_simd::prelude::*;
    use fearless_simd::{Avx512, Level, f32x16};
    use half::bf16;

    use super::{Bf16, Rounded, STEP};
    use crate::backend::cpu::linear::Out;
    use crate::backend::cpu::simd::{LANES, V, sums};
    use crate::backend::cpu::threads::Scratch;

    /// The processor has what `Avx512` stands for, and avx512bf16.
    #[derive(Clone, Copy)]
    pub struct Token(Avx512);

    pub fn detect() -> Option<Token> {
        let has = std::arch::is_x86_feature_detected!("avx512bf16");
        Level::new().as_avx512().filter(|_| has).map(Token)
    }

    /// Functions that may use what a [`Token`] proves: the features of `Avx512`, so that its operations are inlined, and
    /// avx512bf16.
    macro_rules! with_bf16 {
        ($($item:item)*) => { $(
            #[target_feature(enable = "fxsr,adx,aes,avx512bitalg,avx512bw,avx512cd,avx512dq,avx512f,avx512ifma,avx512vbmi,avx512vbmi2,avx512vl,avx512vnni,avx512vpopcntdq,bmi1,bmi2,cmpxchg16b,fma,gfni,lzcnt,movbe,pclmulqdq,popcnt,rdrand,rdseed,sha,vaes,vpclmulqdq,xsave,xsavec,xsaveopt,xsaves,avx512bf16")]
            $item
        )* };
    }

    impl Bf16 {
        /// Rounds a row, to nearest, ties to even; zeros fill the last step.
        pub fn round(self, row: &[f32], out: &mut [[u16; STEP]]) {
            // SAFETY: as below.
            unsafe { round(row, out) }
        }

        /// Some columns of `source·Wᵀ`, for a weight of `width` columns.
        pub fn product(
            self,
            scratch: &mut Scratch,
            source: &Rounded,
            weight: &[bf16],
            width: usize,
            columns: Range<usize>,
            out: &mut Out,
        ) {
            let (Token(simd), weight) = (self.0, bytemuck::cast_slice(weight));
            // SAFETY: the token is made by `detect` only, when the processor has all features that these functions enable.
            unsafe {
                match source.rows {
                    0 => {}
                    1 => stream::<1>(simd, source, weight, width, columns, out),
                    2 => stream::<2>(simd, source, weight, width, columns, out),
                    3 => stream::<3>(simd, source, weight, width, columns, out),
                    4 => stream::<4>(simd, source, weight, width, columns, out),
                    _ => tiles(simd, scratch, source, weight, width, columns, out),
                }
            }
        }
    }

    const M: usize = 4;
    const N: usize = 6;

    with_bf16! {
        fn round(row: &[f32], out: &mut [[u16; STEP]]) {
            let (steps, rest) = row.as_chunks::<STEP>();
            let mut last = [0.0; STEP];
            last[..rest.len()].copy_from_slice(rest);
            for (x, out) in steps.iter().chain((!rest.is_empty()).then_some(&last)).zip(out) {
                // SAFETY: all are plain bits, of 512 and 1024.
                *out = unsafe {
                    let [low, high] = std::mem::transmute::<[f32; STEP], [__m512; 2]>(*x);
                    std::mem::transmute::<__m512bh, [u16; STEP]>(_mm512_cvtne2ps_pbh(high, low))
                };
            }
        }

        /// acc + a·b: each lane takes two products.
        #[inline]
        fn dot(simd: Avx512, acc: V<Avx512>, a: &[u16; STEP], b: &[u16; STEP]) -> V<Avx512> {
            // SAFETY: both are 512 bits, of which any are valid.
            let [a, b] = [*a, *b].map(|x| unsafe { std::mem::transmute::<[u16; STEP], __m512bh>(x) });
            _mm512_dpbf16_ps(acc.into(), a, b).simd_into(simd)
        }

        /// Few rows: every weight row is read once, in order, as the f32 path does it.
        fn stream<const R: usize>(
            simd: Avx512,
            source: &Rounded,
            weight: &[u16],
            width: usize,
            columns: Range<usize>,
            out: &mut Out,
        ) {
            let whole = width / STEP;
            let mut rows: [&[[u16; STEP]]; R] = [&[]; R];
            for r in 0..R {
                rows[r] = &source.data[r * source.steps..][..source.steps];
            }
            for first in columns.clone().step_by(LANES) {
                let n = LANES.min(columns.end - first);
                let mut acc = [[f32x16::splat(simd, 0.0); LANES]; R];
                for j in 0..n {
                    let (w, w_tail) = weight[(first + j) * width..][..width].as_chunks();
                    let mut sums = [f32x16::splat(simd, 0.0); R];
                    for (i, w) in w.iter().enumerate() {
                        for r in 0..R {
                            sums[r] = dot(simd, sums[r], &rows[r][i], w);
                        }
                    }
                    if !w_tail.is_empty() {
                        let mut w = [0; STEP];
                        w[..w_tail.len()].copy_from_slice(w_tail);
                        for r in 0..R {
                            sums[r] = dot(simd, sums[r], &rows[r][whole], &w);
                        }
                    }
                    for r in 0..R {
                        acc[r][j] = sums[r];
                    }
                }
                for (r, acc) in acc.into_iter().enumerate() {
                    let values = out.finish::<Avx512, LANES>(simd, sums(simd, acc), first, 0);
                    out.put::<LANES>(r, first, &values.to_array(), n);
                }
            }
        }

        /// Many rows: `N` weight rows at a time are copied into the first-level cache, one after the other because the
        /// prefetcher loses interleaved streams, and the source rows pass over them, `M` at a time.
        fn tiles(
            simd: Avx512,
            scratch: &mut Scratch,
            source: &Rounded,
            weight: &[u16],
            width: usize,
            columns: Range<usize>,
            out: &mut Out,
        ) {
            let steps = source.steps;
            let panel: &mut [[u16; STEP]] = bytemuck::cast_slice_mut(scratch.lines(N * steps));
            for first in columns.clone().step_by(N) {
                let n = N.min(columns.end - first);
                for (j, panel) in panel.chunks_mut(steps).enumerate() {
                    // Rows that are missing in the last panel are those of its last one again; their results go nowhere.
                    let row = &weight[(first + j.min(n - 1)) * width..][..width];
                    let panel = panel.as_flattened_mut();
                    panel[..width].copy_from_slice(row);
                    panel[width..].fill(0);
                }
                let columns = first..first + n;
                let mut at = 0;
                while at < source.rows {
                    at += match source.rows - at {
                        1 => tile::<1>(simd, source, at, panel, columns.clone(), out),
                        2 => tile::<2>(simd, source, at, panel, columns.clone(), out),
                        3 => tile::<3>(simd, source, at, panel, columns.clone(), out),
                        _ => tile::<M>(simd, source, at, panel, columns.clone(), out),
                    };
                }
            }
        }

        /// Puts the sums of a tile: source rows from `at` on, and columns.
        fn put_tile<const R: usize>(
            simd: Avx512,
            acc: &[[V<Avx512>; N]; R],
            at: usize,
            columns: Range<usize>,
            out: &mut Out,
        ) {
            // Two vectors, in the order of their outputs.
            let mut vectors = [[f32x16::splat(simd, 0.0); LANES]; 2];
            for r in 0..R {
                for n in 0..N {
                    let i = r * N + n;
                    vectors[i / LANES][i % LANES] = acc[r][n];
                }
            }
            let mut values = [0.0; 2 * LANES];
            for (i, values) in values.chunks_exact_mut(LANES).enumerate() {
                if i * LANES < R * N {
                    out.finish::<Avx512, N>(simd, sums(simd, vectors[i]), columns.start, i * LANES).store_slice(values);
                }
            }
            for r in 0..R {
                out.put::<N>(at + r, columns.start, &values[r * N..], columns.len());
            }
        }

        /// `R` source rows from `at` on times the rows of a panel. Returns R.
        fn tile<const R: usize>(
            simd: Avx512,
            source: &Rounded,
            at: usize,
            panel: &[[u16; STEP]],
            columns: Range<usize>,
            out: &mut Out,
        ) -> usize {
            let steps = source.steps;
            let mut rows: [&[[u16; STEP]]; R] = [&[]; R];
            let mut weights: [&[[u16; STEP]]; N] = [&[]; N];
            for r in 0..R {
                rows[r] = &source.data[(at + r) * steps..][..steps];
            }
            for n in 0..N {
                weights[n] = &panel[n * steps..][..steps];
            }
            let zero = f32x16::splat(simd, 0.0);
            let mut acc = [[zero; N]; R];
            for i in 0..steps {
                for n in 0..N {
                    for r in 0..R {
                        acc[r][n] = dot(simd, acc[r][n], &rows[r][i], &weights[n][i]);
                    }
                }
            }
            put_tile(simd, &acc, at, columns, out);
            R
        }
    }
}

#[cfg(test)]
mod tests {
    use fearless_simd::Level;
    use half::bf16;

    use super::Bf16;
    use crate::backend::cpu::linear::{Halves, Linear, Put, Source, products};
    use crate::backend::cpu::numbers;
    use crate::backend::cpu::threads::Threads;
    use crate::tensor::Data;

    /// Products equal those in f64 of inputs rounded to bf16, and a row's do not depend on the rows beside it.
    #[test]
    fn products_are_those_of_rounded_inputs() {
        let Some(token) = Bf16::detect() else {
            return eprintln!("skipped: this processor does not multiply bf16");
        };
        let threads = Threads::new(Some(2), Level::new(), Some(token)).unwrap();
        let run = |x: &[f32], width, w: &[bf16], bias: Option<&[f32]>, put| {
            let (rows, outputs) = (x.len() / width, w.len() / width);
            let mut out = vec![0.5; rows * outputs];
            let source = Source { data: x, width, index: None, rows };
            let linear = Linear { weight: Data::BF16(w), bias };
            products(&threads, &mut Halves::default(), put, &[source], [(0, linear, out.chunks_exact_mut(outputs))]);
            out
        };
        for width in [1, 2, 31, 32, 33, 100, 576] {
            for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 23] {
                for outputs in [1, 5, 6, 7, 16, 17, 50, 700] {
                    let x = numbers(rows * width, (rows * width) as u32);
                    let w: Vec<bf16> =
                        numbers(outputs * width, outputs as u32).into_iter().map(bf16::from_f32).collect();
                    let bias = numbers(outputs, 3);
                    let out = run(&x, width, &w, Some(&bias), Put::Add);
                    for (i, out) in out.chunks_exact(outputs).enumerate() {
                        let x = &x[i * width..][..width];
                        for (j, out) in out.iter().enumerate() {
                            let terms = x.iter().zip(&w[j * width..][..width]);
                            let terms = terms.map(|(x, w)| bf16::from_f32(*x).to_f64() * w.to_f64());
                            let expected = terms.sum::<f64>() + f64::from(bias[j]) + 0.5;
                            // Measured: 3e-7 of 1 + |expected|.
                            let error = (f64::from(*out) - expected).abs();
                            assert!(
                                error <= 1e-6 * (1.0 + expected.abs()),
                                "{rows}x{width} on {outputs}: {out}, {expected}"
                            );
                        }
                        let alone = run(x, width, &w, Some(&bias), Put::Add);
                        assert!(
                            alone.iter().zip(out).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{rows}x{width} row {i}"
                        );
                    }
                }
            }
        }
        // What rounds up to infinity, NaN, and ties to even.
        let x = [f32::NAN, f32::MAX, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0];
        let out = run(&x, 1, &[bf16::ONE], None, Put::Store);
        assert!(out[0].is_nan() && out[1] == f32::INFINITY, "{out:?}");
        assert_eq!(out[2..], [1.0, 1.0 + 4.0 / 256.0]);
    }
}
