//! The backward ops on the CPU.

mod attention;
mod project;
mod rows;
#[cfg(test)]
mod tests;

use fearless_simd::dispatch;
use rayon::prelude::*;

use super::attention::Queries;
use super::linear::{Put, Source};
use super::{CpuBackend, FEW_ROWS, Stored, linear, listed, of};
use crate::backend::*;
use crate::error::{Result, ensure};
use crate::tensor::Tensor;

impl TrainingBackend for CpuBackend {
    fn train(&mut self, body: &mut (dyn FnMut(&mut dyn TrainingBackend) -> Result<()> + Send)) -> Result<()> {
        self.threads.clone().enter(|| body(self))
    }

    fn replace(&mut self, vector: Weight, values: &[f32]) -> Result<()> {
        ensure!((1, values.len()) == (vector.rows, vector.cols), Shape, "{} values for {vector:?}", values.len());
        self.weights[vector.id] = Stored { tensor: Tensor::from_f32(values), vector: values.to_vec() };
        Ok(())
    }
}

impl CpuBackend {
    fn count(&mut self, kind: GradientKind, cost: Cost) -> Result<()> {
        self.meter.add(kind, cost);
        Ok(())
    }

    /// g and u of a SwiGLU.
    fn gate_up(&mut self, kind: GradientKind, of: &GateUp, gate: Mat, up: Mat) -> Result<()> {
        let [h, to_gate, to_up] = Self::floats(&mut self.arena, kind.name(), [of.h, gate, up])?;
        let source = Source { data: h, width: of.h.cols, index: None, rows: gate.rows };
        let products = [
            (0, linear(&self.weights, of.gate, of.gate_bias), to_gate.chunks_exact_mut(gate.cols)),
            (0, linear(&self.weights, of.up, of.up_bias), to_up.chunks_exact_mut(up.cols)),
        ];
        linear::products(&self.threads, &mut self.halves, Put::Store, &[source], products);
        Ok(())
    }

    /// [`CpuBackend::arena`] for a backward op.
    fn buffers<const N: usize>(&mut self, kind: GradientKind, mats: [Mat; N]) -> Result<[&mut [f32]; N]> {
        Self::floats(&mut self.arena, kind.name(), mats)
    }
}

fn rows_only(rows: usize) -> Work {
    Work { rows, ..Work::default() }
}

impl Gradients for CpuBackend {
    fn copy(&mut self, args: &CopyRows) -> Result<()> {
        args.check()?;
        match args.src {
            Some(src) => {
                let [src, out] = self.buffers(GradientKind::CopyRows, [src, args.out])?;
                out.copy_from_slice(src);
            }
            None => {
                let [out] = self.buffers(GradientKind::CopyRows, [args.out])?;
                out.fill(0.0);
            }
        }
        self.count(GradientKind::CopyRows, args.cost(rows_only(args.out.rows)))
    }

    fn loss(&mut self, args: &Loss) -> Result<()> {
        args.check()?;
        let (rows, vocab, level, scale) = (args.logits.rows, args.logits.cols, self.threads.level, args.scale);
        match args.against {
            Against::Tokens(targets) => {
                let mats = [args.logits, args.losses.rows(0..rows)];
                let [logits, losses] = Self::floats(&mut self.arena, "loss", mats)?;
                let rows = logits.par_chunks_mut(vocab).zip(losses).zip(of(&self.ints, targets));
                rows.for_each(|((row, loss), &target)| {
                    *loss = dispatch!(level, simd => rows::cross_entropy(simd, row, target as usize, scale));
                });
            }
            Against::Distribution(other) => {
                let mats = [args.logits, args.losses.rows(0..rows), other.rows(0..rows)];
                let [logits, losses, other] = self.buffers(GradientKind::Loss, mats)?;
                let rows = logits.par_chunks_mut(vocab).zip(losses).zip(other.par_chunks(vocab));
                rows.for_each(|((row, loss), other)| {
                    *loss = dispatch!(level, simd => rows::divergence(simd, row, other, scale));
                });
            }
        }
        self.count(GradientKind::Loss, args.cost(rows_only(rows)))
    }

    fn back_project(&mut self, args: &BackProject) -> Result<()> {
        args.check()?;
        let [d_out, d_in] = Self::floats(&mut self.arena, "back_project", [args.d_out, args.d_in])?;
        let index = args.from.map(|from| (&of(&self.ints, from)[..args.rows], 0));
        let source = Source { data: d_out, width: args.d_out.cols, index, rows: args.rows };
        let (weight, width) = (linear(&self.weights, args.weight, None), args.d_in.cols);
        match args.to {
            None => project::back(&self.threads, source, weight, args.add, d_in.chunks_exact_mut(width)),
            Some(to) => {
                let out = listed(d_in, width, &of(&self.ints, to)[..args.rows]);
                project::back(&self.threads, source, weight, args.add, out);
            }
        }
        self.count(GradientKind::BackProject, args.cost(rows_only(args.rows)))
    }

    fn norm_backward(&mut self, args: &NormBackward) -> Result<()> {
        args.check()?;
        let (width, level) = (args.x.cols, self.threads.level);
        let weight = &self.weights[args.weight.id].vector;
        let rows = of(&self.ints, args.rows);
        let (router, d_logits) = args.gate.map_or((None, args.x.rows(0..0)), |(router, logits)| (Some(router), logits));
        let router = router.map(|r| &self.weights[r.id].vector[..]);
        let mats = [args.x, args.d_h, args.d_x, d_logits];
        let [x, d_h, d_x, d_logits] = Self::floats(&mut self.arena, "norm_backward", mats)?;
        let d_logits: &[f32] = d_logits;
        let out: Vec<_> = rows.iter().zip(listed(d_x, width, rows)).collect();
        let out = out.into_par_iter().with_min_len(FEW_ROWS);
        out.zip(d_h.par_chunks(width)).for_each(|((&row, d_x), d_h)| {
            let row = row as usize;
            let gate = router.map(|router| (router, d_logits[row]));
            let x = &x[row * width..][..width];
            dispatch!(level, simd => rows::rms_norm(simd, x, weight, args.eps, d_h, gate, d_x));
        });
        self.count(GradientKind::NormBackward, args.cost(rows_only(args.rows.len)))
    }

    fn swiglu_kept(&mut self, args: &SwiGluKept) -> Result<()> {
        args.check()?;
        let (width, level) = (args.out.cols, self.threads.level);
        self.gate_up(GradientKind::SwiGluKept, &args.of, args.gate, args.up)?;
        let [gate, up, out] = self.buffers(GradientKind::SwiGluKept, [args.gate, args.up, args.out])?;
        let rows = out.par_chunks_mut(width).zip(gate.par_chunks(width)).zip(up.par_chunks(width));
        rows.with_min_len(FEW_ROWS).for_each(|((out, gate), up)| {
            dispatch!(level, simd => rows::swiglu(simd, gate, up, out));
        });
        self.count(GradientKind::SwiGluKept, args.cost(rows_only(args.out.rows)))
    }

    fn swiglu_backward(&mut self, args: &SwiGluBackward) -> Result<()> {
        args.check()?;
        let (rows, width, level) = (args.d_act.rows, args.d_act.cols, self.threads.level);
        if let Some(of) = &args.again {
            self.gate_up(GradientKind::SwiGluBackward, of, args.d_gate, args.d_up)?;
        }
        let (at, dots) = args.dots.map_or((None, args.d_act.rows(0..0)), |(at, dots)| (Some(at), dots));
        let mats = [args.d_act, args.d_gate, args.d_up, dots];
        let [d_act, d_gate, d_up, dots] = Self::floats(&mut self.arena, "swiglu_backward", mats)?;
        let mut none = vec![0.0; if at.is_none() { rows } else { 0 }];
        let dots: Vec<&mut f32> = match at {
            Some(at) => listed(dots, 1, &of(&self.ints, at)[..rows]).map(|dot| &mut dot[0]).collect(),
            None => none.iter_mut().collect(),
        };
        let rows_of = d_gate.par_chunks_mut(width).zip(d_up.par_chunks_mut(width)).zip(d_act.par_chunks(width));
        rows_of.zip(dots).with_min_len(FEW_ROWS).for_each(|(((gate, up), d_act), dot)| {
            *dot += dispatch!(level, simd => rows::swiglu_backward(simd, gate, up, d_act));
        });
        self.count(GradientKind::SwiGluBackward, args.cost(rows_only(rows)))
    }

    fn attend_backward(&mut self, args: &AttendBackward) -> Result<()> {
        args.check()?;
        let mats = [args.q, args.out, args.d_out, args.d_q, args.d_k, args.d_v];
        let [q, out, d_out, d_q, d_k, d_v] = Self::floats(&mut self.arena, "attend_backward", mats)?;
        let n = args.rows.len;
        let ints = |part| of(&self.ints, part);
        let (rows, slots) = (ints(args.rows), ints(args.row_slot));
        let queries = Queries {
            q,
            first: &ints(args.first)[..n],
            end: &ints(args.end)[..n],
            heads: args.q.cols / args.head_dim,
            layer: args.layer,
            scale: args.scale,
        };
        let kv_start = ints(args.kv_start);
        let work = Work {
            rows: n,
            kv_rows: (kv_start[kv_start.len() - 1] - kv_start[0]) as usize,
            pairs: queries.first.iter().zip(queries.end).map(|(first, end)| u64::from(end - first)).sum(),
        };
        let forward = attention::Forward { queries, out, d_out, kv_start };
        let gradients = attention::Gradients { d_q, d_k, d_v };
        let kv = self.kv.as_ref().expect("reserved");
        attention::backward(&self.threads, kv, &forward, |i| slots[rows[i] as usize] as usize, gradients);
        self.count(GradientKind::AttendBackward, args.cost(work))
    }

    fn rope_backward(&mut self, args: &RopeBackward) -> Result<()> {
        args.check()?;
        let (d, width, level) = (args.head_dim, args.d.cols, self.threads.level);
        let rows = of(&self.ints, args.rows);
        let src = args.norm.map_or(args.d.rows(0..0), |norm| norm.src);
        let [angles, grads, src] = Self::floats(&mut self.arena, "rope_backward", [args.angles, args.d, src])?;
        let norm = args.norm.map(|norm| (&self.weights[norm.weight.id].vector[..], norm.eps));
        let (angles, src): (&[f32], &[f32]) = (angles, src);
        let grads = grads.par_chunks_mut(width).with_min_len(FEW_ROWS).zip(rows).enumerate();
        grads.for_each(|(i, (grads, &row))| {
            let angles = &angles[row as usize * d..][..d];
            for (head, grads) in grads.chunks_exact_mut(d).enumerate() {
                let norm = norm.map(|(weight, eps)| (&src[i * width + head * d..][..d], weight, eps));
                dispatch!(level, simd => rows::head(simd, grads, angles, norm));
            }
        });
        self.count(GradientKind::RopeBackward, args.cost(rows_only(rows.len())))
    }

    fn attend_apart(&mut self, args: &AttendApart) -> Result<()> {
        args.check()?;
        let [q, k, v, out] = Self::floats(&mut self.arena, "attend_apart", [args.q, args.k, args.v, args.out])?;
        let n = args.rows.len;
        let ints = |part| of(&self.ints, part);
        let (rows, slots) = (ints(args.rows), ints(args.row_slot));
        let queries = Queries {
            q,
            first: &ints(args.first)[..n],
            end: &ints(args.end)[..n],
            heads: args.q.cols / args.head_dim,
            layer: args.layer,
            scale: args.scale,
        };
        let seen: usize = queries.first.iter().zip(queries.end).map(|(first, end)| (end - first) as usize).sum();
        let work = Work { rows: n, kv_rows: seen, pairs: (seen + n) as u64 };
        let kv = self.kv.as_ref().expect("reserved");
        let slot_of = |i: usize| slots[rows[i] as usize] as usize;
        attention::apart(&self.threads, kv, &queries, slot_of, k, v, &mut out[..n * args.q.cols]);
        self.count(GradientKind::AttendApart, args.cost(work))
    }

    fn row_dots(&mut self, args: &RowDots) -> Result<()> {
        args.check()?;
        let (width, level) = (args.a.cols, self.threads.level);
        let rows = of(&self.ints, args.rows);
        let (c, bias) = args.bias.map_or((args.a.rows(0..0), None), |(c, bias)| (c, Some(bias)));
        let bias = bias.map(|b| &self.weights[b.id].vector[..]);
        let [a, b, c, out] = Self::floats(&mut self.arena, "row_dots", [args.a, args.b, c, args.out])?;
        let c: &[f32] = c;
        let out: Vec<_> = rows.iter().zip(listed(out, 1, rows)).collect();
        out.into_par_iter().with_min_len(FEW_ROWS).enumerate().for_each(|(i, (&row, out))| {
            let [a, b] = [&*a, &*b].map(|m| &m[i * width..][..width]);
            let bias = bias.map(|bias| (&c[row as usize * bias.len()..][..bias.len()], bias));
            out[0] += dispatch!(level, simd => rows::dots(simd, a, b, bias));
        });
        self.count(GradientKind::RowDots, args.cost(rows_only(rows.len())))
    }

    fn gate_backward(&mut self, args: &GateBackward) -> Result<()> {
        args.check()?;
        let rows = args.d_mask.rows;
        let mats = [args.logits.rows(0..rows), args.d_mask, args.h.rows(0..rows), args.d_router];
        let [logits, d_mask, h, d_router] = Self::floats(&mut self.arena, "gate_backward", mats)?;
        d_mask.iter_mut().for_each(|d| *d += args.penalty);
        match args.sequences {
            None => d_mask.iter_mut().zip(&*logits).for_each(|(d, &logit)| *d *= slope(logit)),
            Some(starts) => {
                for range in of(&self.ints, starts).windows(2).map(|ends| ends[0] as usize..ends[1] as usize) {
                    let whole: f64 = d_mask[range.clone()].iter().map(|&d| f64::from(d)).sum();
                    let logit = mean(&logits[range.clone()]);
                    let each = whole * f64::from(slope(logit)) / range.len() as f64;
                    d_mask[range].fill(each as f32);
                }
            }
        }
        let width = d_router.len();
        let mut sum = vec![0f64; width];
        for (h, &d) in h.chunks_exact(width).zip(&*d_mask) {
            sum.iter_mut().zip(h).for_each(|(sum, &h)| *sum += f64::from(d) * f64::from(h));
        }
        d_router.iter_mut().zip(sum).for_each(|(d, sum)| *d = (f64::from(*d) + sum) as f32);
        self.count(GradientKind::GateBackward, args.cost(rows_only(rows)))
    }
}

/// The derivative of the sigmoid.
fn slope(logit: f32) -> f32 {
    let score = sigmoid(logit);
    score * (1.0 - score)
}
