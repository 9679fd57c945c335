//! The backward ops, as the derivatives that their docs name.

use super::{Reference, dot, largest, score};
use crate::backend::*;
use crate::error::Result;

fn rows_only(rows: usize) -> Work {
    Work { rows, ..Work::default() }
}

/// ln softmax; NaN where there is none.
fn ln_softmax(row: &[f64]) -> Vec<f64> {
    let top = largest(row);
    let total = top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
    row.iter().map(|x| if total.is_nan() { total } else { x - total }).collect()
}

/// The gradient of x, of that of x / sqrt(mean(x²) + eps).
fn norm_slope(x: &[f64], g: &[f64], eps: f32) -> Vec<f64> {
    let n = x.len() as f64;
    let scale = (dot(x, x) / n + f64::from(eps)).sqrt().recip();
    let along = scale * scale * dot(g, x) / n;
    x.iter().zip(g).map(|(x, g)| scale * (g - x * along)).collect()
}

impl Reference {
    fn list(&self, ints: Ints) -> Vec<usize> {
        (0..ints.len).map(|i| self.int(ints, i) as usize).collect()
    }

    fn place(&self, list: Option<Ints>, i: usize) -> usize {
        list.map_or(i, |list| self.int(list, i) as usize)
    }

    /// One head's K or V of the rows [first, end) of a slot.
    fn held(&self, layer: usize, slot: usize, range: Range<usize>, head: usize, of_k: bool) -> Vec<Vec<f64>> {
        let d = self.layout.expect("reserved").head_dim;
        let rows = self.kv.get(&(layer, slot)).map_or(&[][..], |rows| &rows[range.start..range.end]);
        let of = |row: &Option<super::KvRow>| {
            let row = row.as_ref().expect("a row that was appended");
            (if of_k { &row.k } else { &row.v })[head * d..][..d].to_vec()
        };
        rows.iter().map(of).collect()
    }

    fn done(&mut self, op: Gradient, work: Work) -> Result<()> {
        self.meter.add(op.kind(), op.cost(work));
        Ok(())
    }
}

impl TrainingBackend for Reference {
    fn train(&mut self, body: &mut (dyn FnMut(&mut dyn TrainingBackend) -> Result<()> + Send)) -> Result<()> {
        body(self)
    }

    fn replace(&mut self, vector: Weight, values: &[f32]) -> Result<()> {
        self.weights[vector.id] = vec![values.iter().map(|&x| x.into()).collect()];
        Ok(())
    }
}

impl Gradients for Reference {
    fn copy(&mut self, a: &CopyRows) -> Result<()> {
        a.check()?;
        for row in 0..a.out.rows {
            for col in 0..a.out.cols {
                let value = a.src.map_or(0.0, |src| self.get(src, row, col));
                self.put(GradientKind::CopyRows, a.out, row, col, value);
            }
        }
        self.done(Gradient::CopyRows(*a), rows_only(a.out.rows))
    }

    fn loss(&mut self, a: &Loss) -> Result<()> {
        a.check()?;
        const OP: GradientKind = GradientKind::Loss;
        for row in 0..a.logits.rows {
            let ln_p = ln_softmax(&self.row(a.logits, row));
            let (target, loss) = match a.against {
                Against::Tokens(targets) => {
                    let token = self.int(targets, row) as usize;
                    let target = (0..ln_p.len()).map(|i| f64::from(u8::from(i == token))).collect();
                    (target, -ln_p[token])
                }
                Against::Distribution(other) => {
                    let ln_q = ln_softmax(&self.row(other, row));
                    let q: Vec<f64> = ln_q.iter().map(|x| x.exp()).collect();
                    let term = |i: usize| if q[i] == 0.0 { 0.0 } else { q[i] * (ln_q[i] - ln_p[i]) };
                    let loss = (0..q.len()).map(term).sum();
                    (q, loss)
                }
            };
            self.put(OP, a.losses, row, 0, loss);
            for (col, (ln_p, target)) in ln_p.iter().zip(&target).enumerate() {
                self.put(OP, a.logits, row, col, f64::from(a.scale) * (ln_p.exp() - target));
            }
        }
        self.done(Gradient::Loss(*a), rows_only(a.logits.rows))
    }

    fn back_project(&mut self, a: &BackProject) -> Result<()> {
        a.check()?;
        for i in 0..a.rows {
            let d_out = self.row(a.d_out, self.place(a.from, i));
            let row = self.place(a.to, i);
            for col in 0..a.weight.cols {
                let product: f64 = d_out.iter().zip(&self.weights[a.weight.id]).map(|(d, w)| d * w[col]).sum();
                let before = if a.add { self.get(a.d_in, row, col) } else { 0.0 };
                self.put(GradientKind::BackProject, a.d_in, row, col, before + product);
            }
        }
        self.done(Gradient::BackProject(*a), rows_only(a.rows))
    }

    fn norm_backward(&mut self, a: &NormBackward) -> Result<()> {
        a.check()?;
        let rows = self.list(a.rows);
        for (i, &row) in rows.iter().enumerate() {
            let mut g = self.row(a.d_h, i);
            if let Some((router, logits)) = a.gate {
                let d_logit = self.get(logits, row, 0);
                g.iter_mut().zip(self.vector(router)).for_each(|(g, r)| *g += d_logit * r);
            }
            g.iter_mut().zip(self.vector(a.weight)).for_each(|(g, w)| *g *= w);
            for (col, d) in norm_slope(&self.row(a.x, row), &g, a.eps).into_iter().enumerate() {
                self.put(GradientKind::NormBackward, a.d_x, row, col, self.get(a.d_x, row, col) + d);
            }
        }
        self.done(Gradient::NormBackward(*a), rows_only(rows.len()))
    }

    fn swiglu_kept(&mut self, a: &SwiGluKept) -> Result<()> {
        a.check()?;
        const OP: GradientKind = GradientKind::SwiGluKept;
        for i in 0..a.out.rows {
            let h = self.row(a.of.h, i);
            let (g, u) = (self.linear(&h, a.of.gate, a.of.gate_bias), self.linear(&h, a.of.up, a.of.up_bias));
            for (col, (g, u)) in g.into_iter().zip(u).enumerate() {
                self.put(OP, a.gate, i, col, g);
                self.put(OP, a.up, i, col, u);
                self.put(OP, a.out, i, col, g * score(g) * u);
            }
        }
        self.done(Gradient::SwiGluKept(*a), rows_only(a.out.rows))
    }

    fn swiglu_backward(&mut self, a: &SwiGluBackward) -> Result<()> {
        a.check()?;
        const OP: GradientKind = GradientKind::SwiGluBackward;
        for i in 0..a.d_act.rows {
            let d_act = self.row(a.d_act, i);
            let (g, u) = match a.again {
                Some(of) => {
                    let h = self.row(of.h, i);
                    (self.linear(&h, of.gate, of.gate_bias), self.linear(&h, of.up, of.up_bias))
                }
                None => (self.row(a.d_gate, i), self.row(a.d_up, i)),
            };
            let mut dots = 0.0;
            for (col, ((g, u), d)) in g.into_iter().zip(u).zip(d_act).enumerate() {
                let share = score(g);
                dots += d * g * share * u;
                self.put(OP, a.d_gate, i, col, d * u * (share + g * share * (1.0 - share)));
                self.put(OP, a.d_up, i, col, d * g * share);
            }
            if let Some((at, out)) = a.dots {
                let row = self.int(at, i) as usize;
                self.put(OP, out, row, 0, self.get(out, row, 0) + dots);
            }
        }
        self.done(Gradient::SwiGluBackward(*a), rows_only(a.d_act.rows))
    }

    fn attend_backward(&mut self, a: &AttendBackward) -> Result<()> {
        a.check()?;
        const OP: GradientKind = GradientKind::AttendBackward;
        let (d, heads, rows) = (a.head_dim, a.q.cols / a.head_dim, self.list(a.rows));
        let starts = self.list(a.kv_start);
        let (group, scale) = (heads / a.kv_heads, f64::from(a.scale));
        let kv_rows = starts[starts.len() - 1] - starts[0];
        let mut d_k = vec![vec![0.0; a.kv_heads * d]; a.d_k.rows];
        let mut d_v = d_k.clone();
        let mut pairs = 0;
        for (i, &row) in rows.iter().enumerate() {
            let slot = self.int(a.row_slot, row) as usize;
            let range = self.int(a.first, i) as usize..self.int(a.end, i) as usize;
            pairs += range.len() as u64;
            for head in 0..heads {
                let part = |m: Mat| self.row(m, i)[head * d..][..d].to_vec();
                let (q, out, d_out, own) = (part(a.q), part(a.out), part(a.d_out), head / group);
                let keys = self.held(a.layer, slot, range.clone(), own, true);
                let values = self.held(a.layer, slot, range.clone(), own, false);
                let weights = ln_softmax(&keys.iter().map(|k| scale * dot(&q, k)).collect::<Vec<_>>());
                let mut d_q = vec![0.0; d];
                for (j, (k, v)) in keys.iter().zip(&values).enumerate() {
                    let weight = weights[j].exp();
                    let d_score = scale * weight * (dot(&d_out, v) - dot(&d_out, &out));
                    let at = starts[slot] + range.start + j;
                    for c in 0..d {
                        d_q[c] += d_score * k[c];
                        d_k[at][own * d + c] += d_score * q[c];
                        d_v[at][own * d + c] += weight * d_out[c];
                    }
                }
                d_q.into_iter().enumerate().for_each(|(c, x)| self.put(OP, a.d_q, i, head * d + c, x));
            }
        }
        for row in starts[0]..starts[0] + kv_rows {
            for (m, values) in [(a.d_k, &d_k[row]), (a.d_v, &d_v[row])] {
                values.iter().enumerate().for_each(|(col, &x)| self.put(OP, m, row, col, x));
            }
        }
        self.done(Gradient::AttendBackward(*a), Work { rows: rows.len(), kv_rows, pairs })
    }

    fn rope_backward(&mut self, a: &RopeBackward) -> Result<()> {
        a.check()?;
        let (d, rows) = (a.head_dim, self.list(a.rows));
        for (i, &row) in rows.iter().enumerate() {
            let (grads, angles) = (self.row(a.d, i), self.row(a.angles, row));
            for (head, g) in grads.chunks(d).enumerate() {
                let (cos, sin) = angles.split_at(d / 2);
                let low = (0..d / 2).map(|j| g[j] * cos[j] + g[d / 2 + j] * sin[j]);
                let high = (0..d / 2).map(|j| g[d / 2 + j] * cos[j] - g[j] * sin[j]);
                let mut g: Vec<f64> = low.chain(high).collect();
                if let Some(norm) = a.norm {
                    g.iter_mut().zip(self.vector(norm.weight)).for_each(|(g, w)| *g *= w);
                    g = norm_slope(&self.row(norm.src, i)[head * d..][..d], &g, norm.eps);
                }
                g.into_iter().enumerate().for_each(|(c, x)| {
                    self.put(GradientKind::RopeBackward, a.d, i, head * d + c, x);
                });
            }
        }
        self.done(Gradient::RopeBackward(*a), rows_only(rows.len()))
    }

    fn attend_apart(&mut self, a: &AttendApart) -> Result<()> {
        a.check()?;
        let (d, heads, rows) = (a.head_dim, a.q.cols / a.head_dim, self.list(a.rows));
        let mut seen = 0;
        for (i, &row) in rows.iter().enumerate() {
            let slot = self.int(a.row_slot, row) as usize;
            let range = self.int(a.first, i) as usize..self.int(a.end, i) as usize;
            seen += range.len();
            for head in 0..heads {
                let own = head / (heads / a.kv_heads);
                let q = self.row(a.q, i)[head * d..][..d].to_vec();
                let with = |m: Mat, of_k| {
                    let mut all = self.held(a.layer, slot, range.clone(), own, of_k);
                    all.push(self.row(m, i)[own * d..][..d].to_vec());
                    all
                };
                let (keys, values) = (with(a.k, true), with(a.v, false));
                let weights = ln_softmax(&keys.iter().map(|k| f64::from(a.scale) * dot(&q, k)).collect::<Vec<_>>());
                for c in 0..d {
                    let x = weights.iter().zip(&values).map(|(w, v)| w.exp() * v[c]).sum();
                    self.put(GradientKind::AttendApart, a.out, i, head * d + c, x);
                }
            }
        }
        let pairs = (seen + rows.len()) as u64;
        self.done(Gradient::AttendApart(*a), Work { rows: rows.len(), kv_rows: seen, pairs })
    }

    fn row_dots(&mut self, args: &RowDots) -> Result<()> {
        args.check()?;
        let rows = self.list(args.rows);
        for (i, &row) in rows.iter().enumerate() {
            let mut sum = self.get(args.out, row, 0) + dot(&self.row(args.a, i), &self.row(args.b, i));
            if let Some((c, bias)) = args.bias {
                sum += dot(&self.row(c, row), self.vector(bias));
            }
            self.put(GradientKind::RowDots, args.out, row, 0, sum);
        }
        self.done(Gradient::RowDots(*args), rows_only(rows.len()))
    }

    fn gate_backward(&mut self, a: &GateBackward) -> Result<()> {
        a.check()?;
        const OP: GradientKind = GradientKind::GateBackward;
        let rows = a.d_mask.rows;
        // Rows that share a score.
        let shared: Vec<Range<usize>> = match a.sequences {
            None => (0..rows).map(|row| row..row + 1).collect(),
            Some(starts) => self.list(starts).windows(2).map(|ends| ends[0]..ends[1]).collect(),
        };
        let mut router: Vec<f64> = self.row(a.d_router, 0);
        for range in shared {
            let n = range.len() as f64;
            let of = |m: Mat| range.clone().map(|row| self.get(m, row, 0)).sum::<f64>();
            let mean = score(of(a.logits) / n);
            let each = (of(a.d_mask) + n * f64::from(a.penalty)) * mean * (1.0 - mean) / n;
            for row in range {
                router.iter_mut().zip(self.row(a.h, row)).for_each(|(sum, h)| *sum += each * h);
                self.put(OP, a.d_mask, row, 0, each);
            }
        }
        router.into_iter().enumerate().for_each(|(col, x)| self.put(OP, a.d_router, 0, col, x));
        self.done(Gradient::GateBackward(*a), rows_only(rows))
    }
}
