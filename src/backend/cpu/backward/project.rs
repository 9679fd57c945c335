//! Gradients through frozen projections: rows of f32 times the columns of a weight that is read where it is stored.
//!
//! The forward product adds along the rows of a weight, this one along its columns, so the weight is taken in panels of a
//! few vectors of columns by [`DEPTH`] rows, widened into the first-level cache, and a tile adds a multiple of every row.
//! The source is packed, so that a tile reads both one after the other.

// Accumulators stay in registers only in loops over constants, by index.
#![allow(clippy::needless_range_loop)]

use std::ops::{Range, RangeInclusive};

use fearless_simd::dispatch;
use fearless_simd::prelude::*;
use rayon::prelude::*;

use crate::backend::cpu::linear::{Linear, Source};
use crate::backend::cpu::simd::{Element, LANES, Line, V, tail};
use crate::backend::cpu::threads::{Scratch, Threads};
use crate::tensor::Data;

/// Rows of a panel, at most.
const DEPTH: usize = 288;

/// Source rows of a task: their packed values stay in the second-level cache, and widening a panel counts for little.
const ROWS: RangeInclusive<usize> = 24..=192;

/// `out[i] = source[i]·W`, or added; `source` has the width of the weight's rows, `out` that of its columns.
pub fn back<'o>(
    threads: &Threads,
    source: Source,
    linear: Linear,
    add: bool,
    out: impl Iterator<Item = &'o mut [f32]>,
) {
    let width = linear.weight.len() / source.width;
    let mut out: Vec<_> = out.take(source.rows).collect();
    // As many tasks for each thread, and as large as they may be.
    let each = source.rows.div_ceil(threads.count() * ROWS.end()).max(1);
    let rows = source.rows.div_ceil(threads.count() * each).clamp(*ROWS.start(), *ROWS.end());
    let tasks = out.par_chunks_mut(rows).enumerate();
    threads.each(source.rows * linear.weight.len(), tasks, |scratch, (i, out)| {
        if !add {
            out.iter_mut().for_each(|row| row.fill(0.0));
        }
        let first = i * rows;
        match linear.weight {
            Data::F32(w) => dispatch!(threads.level, simd => fit(simd, scratch, &source, first, w, width, out)),
            Data::F16(w) => dispatch!(threads.level, simd => fit(simd, scratch, &source, first, w, width, out)),
            Data::BF16(w) => dispatch!(threads.level, simd => fit(simd, scratch, &source, first, w, width, out)),
        }
    });
}

/// The accumulators that the registers hold: 8 x 3 with AVX-512; with AVX2 6 x 1, whose panel of 18 KiB stays in the
/// first-level cache. One core of an EPYC 7003, 888 rows of 576 values: 76 GFLOP/s, 45 when the source is not packed.
#[inline(always)]
fn fit<S: Simd, E: Element>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    first: usize,
    weight: &[E],
    width: usize,
    out: &mut [&mut [f32]],
) {
    match S::f32s::LEN {
        LANES => block::<S, E, 8, 3>(simd, scratch, source, first, weight, width, out),
        _ => block::<S, E, 6, 1>(simd, scratch, source, first, weight, width, out),
    }
}

/// Adds the product of some source rows, from `first` on, to `out`.
#[inline(always)]
fn block<S: Simd, E: Element, const M: usize, const VECTORS: usize>(
    simd: S,
    scratch: &mut Scratch,
    source: &Source,
    first: usize,
    weight: &[E],
    width: usize,
    out: &mut [&mut [f32]],
) {
    let blocks = source.width.div_ceil(DEPTH).max(1);
    let deepest = source.width.div_ceil(blocks);
    let tiles = out.len().div_ceil(M);
    let (panel, packed) =
        scratch.lines(deepest * VECTORS + (tiles * deepest * M).div_ceil(LANES)).split_at_mut(deepest * VECTORS);
    let packed: &mut [f32] = bytemuck::cast_slice_mut(packed);
    for start in (0..source.width).step_by(deepest) {
        let depth = deepest.min(source.width - start);
        for (t, packed) in packed.as_chunks_mut::<M>().0.chunks_mut(depth).take(tiles).enumerate() {
            // Rows that are missing in the last tile are its first one again; their results go nowhere.
            let mut rows: [&[f32]; M] = [&[]; M];
            for m in 0..M {
                let row = if t * M + m < out.len() { t * M + m } else { t * M };
                rows[m] = &source.row(first + row)[start..][..depth];
            }
            for (i, values) in packed.iter_mut().enumerate() {
                for m in 0..M {
                    values[m] = rows[m][i];
                }
            }
        }
        for column in (0..width).step_by(VECTORS * LANES) {
            let n = (VECTORS * LANES).min(width - column);
            let panel = &mut panel[..depth * VECTORS];
            for (i, lines) in panel.chunks_exact_mut(VECTORS).enumerate() {
                let row = &weight[(start + i) * width + column..][..n];
                for (v, line) in lines.iter_mut().enumerate() {
                    let part = &row[n.min(v * LANES)..n.min((v + 1) * LANES)];
                    line.0 = match part.first_chunk() {
                        Some(whole) => E::widen(simd, whole).to_array(),
                        None => E::widen(simd, &tail(part)).to_array(),
                    };
                }
            }
            for (packed, out) in packed.as_chunks::<M>().0.chunks(depth).zip(out.chunks_mut(M)) {
                tile::<S, M, VECTORS>(simd, packed, panel, column..column + n, out);
            }
        }
    }
}

/// Adds packed rows times a panel to at most `M` rows of outputs.
#[inline(always)]
fn tile<S: Simd, const M: usize, const VECTORS: usize>(
    simd: S,
    packed: &[[f32; M]],
    panel: &[Line],
    columns: Range<usize>,
    out: &mut [&mut [f32]],
) {
    let mut acc = [[V::splat(simd, 0.0); VECTORS]; M];
    for (values, lines) in packed.iter().zip(panel.as_chunks::<VECTORS>().0) {
        for m in 0..M {
            let value = V::splat(simd, values[m]);
            for v in 0..VECTORS {
                acc[m][v] = value.mul_add(V::from_slice(simd, &lines[v].0), acc[m][v]);
            }
        }
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        for (out, sum) in out[columns.clone()].chunks_mut(LANES).zip(acc) {
            match <&mut [f32; LANES]>::try_from(&mut *out) {
                Ok(whole) => (sum + V::from_slice(simd, whole)).store_slice(whole),
                Err(_) => out.iter_mut().zip(sum.to_array()).for_each(|(out, value)| *out += value),
            }
        }
    }
}
