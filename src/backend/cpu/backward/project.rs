//! Gradients through frozen projections: rows of f32 times the columns of a weight that is read where it is stored.
//!
//! The forward product adds along the rows of a weight, this one along its columns, so the weight is taken in panels of a
//! few vectors of columns by [`DEPTH`] rows, widened into a cache, and a tile adds a multiple of every row.

// Accumulators stay in registers only in loops over constants, by index.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use fearless_simd::dispatch;
use fearless_simd::prelude::*;
use rayon::prelude::*;

use crate::backend::cpu::linear::{Blocks, Linear, Source};
use crate::backend::cpu::simd::{Element, LANES, Line, V, tail};
use crate::backend::cpu::threads::{Scratch, Threads};
use crate::tensor::Data;

/// Rows of a panel.
const DEPTH: usize = 256;

/// `out[i] = source[i]·W`, or added; `source` has the width of the weight's rows, `out` that of its columns.
pub fn back<'o>(
    threads: &Threads,
    source: Source,
    linear: Linear,
    add: bool,
    out: impl Iterator<Item = &'o mut [f32]>,
) {
    let width = linear.weight.len() / source.width;
    let mut blocks = Blocks::new(threads, &source, &linear, out);
    let tasks: Vec<_> = blocks.tasks().collect();
    threads.each(source.rows * linear.weight.len(), tasks.into_par_iter(), |scratch, (columns, out)| {
        if !add {
            out.iter_mut().for_each(|row| row.fill(0.0));
        }
        match linear.weight {
            Data::F32(w) => dispatch!(threads.level, simd => fit(simd, scratch, &source, w, width, columns, out)),
            Data::F16(w) => dispatch!(threads.level, simd => fit(simd, scratch, &source, w, width, columns, out)),
            Data::BF16(w) => dispatch!(threads.level, simd => fit(simd, scratch, &source, w, width, columns, out)),
        }
    });
}

/// The accumulators that the registers hold: 8 x 3 with AVX-512; with AVX2 6 x 1, whose panel of 16 KiB stays in the
/// first-level cache (one core of an EPYC 7003: 49 to 72 GFLOP/s, 2 x 3 33 to 36).
#[inline(always)]
fn fit<S: Simd, E: Element>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    weight: &[E],
    width: usize,
    columns: Range<usize>,
    out: &mut [&mut [f32]],
) {
    match S::f32s::LEN {
        LANES => block::<S, E, 8, 3>(simd, scratch, source, weight, width, columns, out),
        _ => block::<S, E, 6, 1>(simd, scratch, source, weight, width, columns, out),
    }
}

/// Adds some columns of a product to `out`, which holds these columns of each row.
#[inline(always)]
fn block<S: Simd, E: Element, const M: usize, const VECTORS: usize>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    weight: &[E],
    width: usize,
    columns: Range<usize>,
    out: &mut [&mut [f32]],
) {
    for first in columns.clone().step_by(VECTORS * LANES) {
        let n = (VECTORS * LANES).min(columns.end - first);
        for start in (0..source.width).step_by(DEPTH) {
            let depth = DEPTH.min(source.width - start);
            let panel = scratch.lines(depth * VECTORS);
            for (i, lines) in panel.chunks_exact_mut(VECTORS).enumerate() {
                let row = &weight[(start + i) * width + first..][..n];
                for (v, line) in lines.iter_mut().enumerate() {
                    let part = &row[n.min(v * LANES)..n.min((v + 1) * LANES)];
                    line.0 = E::widen(simd, &tail(part)).to_array();
                }
            }
            let at = first - columns.start..first - columns.start + n;
            let mut i = 0;
            while i < source.rows {
                i += match source.rows - i {
                    rows if rows >= M => tile::<S, M, VECTORS>(simd, source, i, start, panel, at.clone(), out),
                    4.. => tile::<S, 4, VECTORS>(simd, source, i, start, panel, at.clone(), out),
                    2.. => tile::<S, 2, VECTORS>(simd, source, i, start, panel, at.clone(), out),
                    _ => tile::<S, 1, VECTORS>(simd, source, i, start, panel, at.clone(), out),
                };
            }
        }
    }
}

/// Adds `M` source rows from `at` on, of them the values from `start` on, times a panel. Returns M.
#[inline(always)]
fn tile<S: Simd, const M: usize, const VECTORS: usize>(
    simd: S,
    source: &Source,
    at: usize,
    start: usize,
    panel: &[Line],
    columns: Range<usize>,
    out: &mut [&mut [f32]],
) -> usize {
    let depth = panel.len() / VECTORS;
    let mut rows: [&[f32]; M] = [&[]; M];
    let mut acc = [[V::splat(simd, 0.0); VECTORS]; M];
    for m in 0..M {
        rows[m] = &source.row(at + m)[start..][..depth];
    }
    for (i, lines) in panel.as_chunks::<VECTORS>().0.iter().enumerate() {
        for m in 0..M {
            let d = V::splat(simd, rows[m][i]);
            for v in 0..VECTORS {
                acc[m][v] = d.mul_add(V::from_slice(simd, &lines[v].0), acc[m][v]);
            }
        }
    }
    for m in 0..M {
        let out = &mut out[at + m][columns.clone()];
        for (v, out) in out.chunks_mut(LANES).enumerate() {
            let values = acc[m][v].to_array();
            out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
        }
    }
    M
}
