//! Every backward op against finite differences of the naive forward function, in f64.

use half::{bf16, f16};

use super::*;
use crate::backend::cpu::levels;
use crate::tensor::{Bytes, DType};

/// Buffers and weights in the making.
#[derive(Default)]
struct Rig {
    floats: Vec<f32>,
    ints: Vec<u32>,
    tensors: Vec<Tensor>,
    state: u64,
}

impl Rig {
    /// Numbers from −1 to 1, always the same ones.
    fn random(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn mat(&mut self, rows: usize, cols: usize, values: &[f32]) -> Mat {
        assert_eq!(rows * cols, values.len());
        let offset = self.floats.len() * 4;
        self.floats.extend(values);
        self.floats.resize(self.floats.len().next_multiple_of(ALIGN / 4), f32::NAN);
        Mat { offset, rows, cols, dtype: DType::F32 }
    }

    fn filled(&mut self, rows: usize, cols: usize) -> Mat {
        let values = self.random(rows * cols);
        self.mat(rows, cols, &values)
    }

    fn empty(&mut self, rows: usize, cols: usize) -> Mat {
        self.mat(rows, cols, &vec![f32::NAN; rows * cols])
    }

    fn list(&mut self, values: &[u32]) -> Ints {
        let offset = self.ints.len();
        self.ints.extend(values);
        Ints { offset, len: values.len() }
    }

    fn weight(&mut self, rows: usize, cols: usize, dtype: DType) -> Weight {
        let values = self.random(rows * cols);
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        self.tensors.push(Tensor::new(dtype, rows, cols, Bytes::new(bytes)).unwrap());
        Weight { id: self.tensors.len() - 1, rows, cols, dtype }
    }

    fn of(&self, mat: Mat) -> Vec<f64> {
        self.floats[mat.offset / 4..][..mat.rows * mat.cols].iter().map(|&x| f64::from(x)).collect()
    }

    fn values(&self, weight: Weight) -> Vec<f64> {
        self.tensors[weight.id].to_f32().iter().map(|&x| f64::from(x)).collect()
    }

    /// Runs ops with every instruction set, on one thread and on three, which must agree; gives what they left behind.
    fn run(&self, kv: &KvLayout, ops: impl Fn(&mut dyn TrainingBackend) -> Result<()> + Sync) -> Rig {
        let mut outcome: Option<Vec<f32>> = None;
        for level in levels() {
            let mut first: Option<Vec<u32>> = None;
            for threads in [1, 3] {
                let mut be = CpuBackend::with_level(Some(threads), level, kv.dtype).unwrap();
                for tensor in &self.tensors {
                    be.upload(tensor).unwrap();
                }
                be.reserve(self.floats.len().max(1) * 4, self.ints.len(), 0, kv).unwrap();
                let all = Mat { offset: 0, rows: 1, cols: self.floats.len(), dtype: DType::F32 };
                be.write_floats(all, &self.floats).unwrap();
                be.write_ints(Ints { offset: 0, len: self.ints.len() }, &self.ints).unwrap();
                be.train(&mut |be| ops(be)).unwrap();
                let mut after = vec![0.0; self.floats.len()];
                be.read_floats(all, &mut after).unwrap();
                let bits: Vec<u32> = after.iter().map(|x| x.to_bits()).collect();
                assert_eq!(*first.get_or_insert_with(|| bits.clone()), bits, "threads change the result");
                outcome = Some(after);
            }
        }
        Rig { floats: outcome.expect("a level"), ints: self.ints.clone(), ..Rig::default() }
    }
}

fn no_kv() -> KvLayout {
    KvLayout { layers: 1, slots: 1, pages: 0, pages_per_seq: 0, kv_heads: 1, head_dim: 2, dtype: DType::F32 }
}

/// Central differences of f at x.
fn slopes(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = x.to_vec();
    let mut slope = |i: usize| {
        at[i] = x[i] + STEP;
        let above = f(&at);
        at[i] = x[i] - STEP;
        let below = f(&at);
        at[i] = x[i];
        (above - below) / (2.0 * STEP)
    };
    (0..x.len()).map(&mut slope).collect()
}

fn assert_close(what: &str, actual: &[f64], expected: &[f64]) {
    assert_within(what, actual, expected, 2e-6);
}

/// Fails, with the worst element, unless |a − b| <= tolerance·(1 + |b|) everywhere; NaN fails.
fn assert_within(what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let error = |(a, b): (&f64, &f64)| (a - b).abs() / (1.0 + b.abs());
    let errors: Vec<f64> = actual.iter().zip(expected).map(error).collect();
    if let Some(worst) = (0..errors.len()).max_by(|&a, &b| errors[a].total_cmp(&errors[b])) {
        let (a, b) = (actual[worst], expected[worst]);
        assert!(errors[worst] <= tolerance, "{what}: {a:e} at {worst}, not {b:e}");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `[rows, out]` for rows of `x`.
fn project(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    x.chunks(width).flat_map(|x| w.chunks(width).map(move |w| dot(x, w))).collect()
}

fn norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
    x.iter().zip(w).map(|(x, w)| x * scale * w).collect()
}

fn ln_softmax(row: &[f64]) -> Vec<f64> {
    let total = row.iter().map(|x| x.exp()).sum::<f64>().ln();
    row.iter().map(|x| x - total).collect()
}

#[test]
fn copies_and_clears() {
    let mut rig = Rig::default();
    let (src, out, cleared) = (rig.filled(3, 5), rig.empty(3, 5), rig.empty(2, 7));
    let after = rig.run(&no_kv(), |be| {
        be.copy(&CopyRows { src: Some(src), out })?;
        be.copy(&CopyRows { src: None, out: cleared })
    });
    assert_eq!(after.of(out), rig.of(src));
    assert_eq!(after.of(cleared), [0.0; 14]);
}

#[test]
fn losses_and_their_gradients() {
    for (rows, vocab) in [(0, 5), (1, 1), (3, 16), (4, 37), (2, 161)] {
        let mut rig = Rig::default();
        let scale = 0.37;
        let values: Vec<f32> = rig.random(rows * vocab).iter().map(|x| x * 4.0 + 1.0).collect();
        let (a, b) = (rig.mat(rows, vocab, &values), rig.mat(rows, vocab, &values));
        let (other, losses) = (rig.filled(rows, vocab), rig.empty(2 * rows, 1));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % vocab) as u32).collect();
        let list = rig.list(&targets);
        let after = rig.run(&no_kv(), |be| {
            be.loss(&Loss { logits: a, against: Against::Tokens(list), scale, losses: losses.rows(0..rows) })?;
            let losses = losses.rows(rows..2 * rows);
            be.loss(&Loss { logits: b, against: Against::Distribution(other), scale, losses })
        });
        let by_tokens = |x: &[f64]| -> Vec<f64> {
            x.chunks(vocab).zip(&targets).map(|(row, &t)| -ln_softmax(row)[t as usize]).collect()
        };
        let q = rig.of(other);
        let by_other = |x: &[f64]| -> Vec<f64> {
            let rows = x.chunks(vocab).zip(q.chunks(vocab)).map(|(p, q)| (ln_softmax(p), ln_softmax(q)));
            rows.map(|(p, q)| q.iter().zip(&p).map(|(q, p)| q.exp() * (q - p)).sum()).collect()
        };
        let x = rig.of(a);
        assert_close("losses", &after.of(losses), &[by_tokens(&x), by_other(&x)].concat());
        let total = |losses: Vec<f64>| losses.iter().sum::<f64>() * f64::from(scale);
        assert_close("tokens", &after.of(a), &slopes(&x, |x| total(by_tokens(x))));
        assert_close("distribution", &after.of(b), &slopes(&x, |x| total(by_other(x))));
    }
}

/// A linear map: its gradient is itself.
#[test]
fn projections_backward() {
    for (rows, from, to) in [(0, 3, 5), (1, 1, 1), (3, 47, 49), (11, 300, 97), (13, 16, 48), (7, 513, 150)] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut rig = Rig::default();
            let (weight, d_out) = (rig.weight(from, to, dtype), rig.filled(2 * rows, from));
            let (plain, listed) = (rig.empty(rows, to), rig.filled(3 * rows, to));
            let sources: Vec<u32> = (0..rows as u32).map(|i| 2 * i + 1).collect();
            let places: Vec<u32> = (0..rows as u32).map(|i| 3 * i + i % 2).collect();
            let (sources_at, places_at) = (rig.list(&sources), rig.list(&places));
            let after = rig.run(&no_kv(), |be| {
                let plain = BackProject { rows, d_out, from: None, weight, d_in: plain, to: None, add: false };
                be.back_project(&plain)?;
                be.back_project(&BackProject {
                    from: Some(sources_at),
                    d_in: listed,
                    to: Some(places_at),
                    add: true,
                    ..plain
                })
            });
            let (w, d) = (rig.values(weight), rig.of(d_out));
            let back = |row: usize| -> Vec<f64> {
                let d = &d[row * from..][..from];
                (0..to).map(|c| (0..from).map(|o| d[o] * w[o * to + c]).sum()).collect()
            };
            let what = format!("[{rows}, {from}] to {to}, {dtype}");
            // Sums of up to 513 terms of about 1, in f32.
            let tolerance = 8e-6;
            assert_within(&what, &after.of(plain), &(0..rows).flat_map(back).collect::<Vec<_>>(), tolerance);
            let mut expected = rig.of(listed);
            for (&source, &place) in sources.iter().zip(&places) {
                let sum = expected[place as usize * to..][..to].iter_mut().zip(back(source as usize));
                sum.for_each(|(x, y)| *x += y);
            }
            assert_within(&what, &after.of(listed), &expected, tolerance);
        }
    }
}

#[test]
fn norms_backward() {
    for (rows, hidden) in [(0, 4), (1, 1), (3, 15), (9, 57), (20, 64)] {
        let mut rig = Rig::default();
        let (weight, router) = (rig.weight(1, hidden, DType::BF16), rig.weight(1, hidden, DType::F32));
        let values: Vec<f32> = rig.random(2 * rows * hidden).iter().map(|x| x + 0.3).collect();
        let x = rig.mat(2 * rows, hidden, &values);
        let (d_h, d_logits) = (rig.filled(rows, hidden), rig.filled(2 * rows, 1));
        let (plain, gated) = (rig.filled(2 * rows, hidden), rig.filled(2 * rows, hidden));
        let picked: Vec<u32> = (0..rows as u32).map(|i| 2 * i + i % 2).collect();
        let list = rig.list(&picked);
        let eps = 1e-3;
        let after = rig.run(&no_kv(), |be| {
            let op = NormBackward { x, rows: list, weight, eps, d_h, gate: None, d_x: plain };
            be.norm_backward(&op)?;
            be.norm_backward(&NormBackward { gate: Some((router, d_logits)), d_x: gated, ..op })
        });
        let (w, r, d, dl) = (rig.values(weight), rig.values(router), rig.of(d_h), rig.of(d_logits));
        let f = |x: &[f64], gate: f64| -> f64 {
            let of = |(i, &row): (usize, &u32)| {
                let h = norm(&x[row as usize * hidden..][..hidden], &w, f64::from(eps));
                dot(&h, &d[i * hidden..][..hidden]) + gate * dl[row as usize] * dot(&h, &r)
            };
            picked.iter().enumerate().map(of).sum()
        };
        for (out, gate) in [(plain, 0.0), (gated, 1.0)] {
            let slopes = slopes(&rig.of(x), |x| f(x, gate));
            let expected: Vec<f64> = rig.of(out).iter().zip(slopes).map(|(a, b)| a + b).collect();
            assert_close("norm", &after.of(out), &expected);
        }
    }
}

#[test]
fn swiglu_backward() {
    for (rows, hidden, inter) in [(0, 3, 4), (1, 1, 1), (3, 17, 31), (5, 20, 64), (10, 8, 50)] {
        let mut rig = Rig::default();
        let [gate, up] = [DType::F32, DType::BF16].map(|dtype| rig.weight(inter, hidden, dtype));
        let [gate_bias, up_bias] = [(); 2].map(|()| Some(rig.weight(1, inter, DType::F32)));
        let (h, d_act) = (rig.filled(rows, hidden), rig.filled(rows, inter));
        let (d_gate, d_up, dots) = (rig.empty(rows, inter), rig.empty(rows, inter), rig.filled(rows + 1, 1));
        let list = rig.list(&(1..=rows as u32).collect::<Vec<_>>());
        let after = rig.run(&no_kv(), |be| {
            let dots = Some((list, dots));
            let again = Some(GateUp { h, gate, up, gate_bias, up_bias });
            be.swiglu_backward(&SwiGluBackward { again, d_act, d_gate, d_up, dots })
        });
        let with_bias = |w, b: Option<Weight>| -> Vec<f64> {
            let (product, bias) = (project(&rig.of(h), &rig.values(w), hidden), rig.values(b.unwrap()));
            product.iter().enumerate().map(|(i, x)| x + bias[i % inter]).collect()
        };
        let (g, u, d) = (with_bias(gate, gate_bias), with_bias(up, up_bias), rig.of(d_act));
        let act =
            |g: &[f64], u: &[f64]| -> Vec<f64> { g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect() };
        assert_close("gate", &after.of(d_gate), &slopes(&g, |g| dot(&act(g, &u), &d)));
        assert_close("up", &after.of(d_up), &slopes(&u, |u| dot(&act(&g, u), &d)));
        let mut expected = rig.of(dots);
        for (i, (a, d)) in act(&g, &u).chunks(inter).zip(d.chunks(inter)).enumerate() {
            expected[i + 1] += dot(a, d);
        }
        assert_close("dots", &after.of(dots), &expected);
    }
}

fn turned(head: &[f64], angles: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let at = |i: usize| (head[i], head[half + i], angles[i], angles[half + i]);
    let firsts = (0..half).map(&at).map(|(a, b, cos, sin)| a * cos - b * sin);
    firsts.chain((0..half).map(at).map(|(a, b, cos, sin)| b * cos + a * sin)).collect()
}

#[test]
fn rope_and_head_norms_backward() {
    for (rows, heads, d) in [(0, 1, 2), (1, 1, 2), (9, 3, 14), (5, 2, 64)] {
        let mut rig = Rig::default();
        let (weight, eps) = (rig.weight(1, d, DType::F32), 1e-2);
        let angles = rig.filled(2 * rows, d);
        let (src, bare, normed) =
            (rig.filled(rows, heads * d), rig.filled(rows, heads * d), rig.filled(rows, heads * d));
        let picked: Vec<u32> = (0..rows as u32).map(|i| 2 * i + i % 2).collect();
        let list = rig.list(&picked);
        let after = rig.run(&no_kv(), |be| {
            let op = RopeBackward { head_dim: d, angles, rows: list, d: bare, norm: None };
            be.rope_backward(&op)?;
            be.rope_backward(&RopeBackward { d: normed, norm: Some(HeadNorm { weight, eps, src }), ..op })
        });
        let (w, a) = (rig.values(weight), rig.of(angles));
        let f = |x: &[f64], grads: &[f64], with_norm: bool| -> f64 {
            let heads_of = x.chunks(d).enumerate().map(|(i, x)| {
                let x = if with_norm { norm(x, &w, f64::from(eps)) } else { x.to_vec() };
                turned(&x, &a[picked[i / heads] as usize * d..][..d])
            });
            dot(&heads_of.flatten().collect::<Vec<_>>(), grads)
        };
        for (out, with_norm) in [(bare, false), (normed, true)] {
            let grads = rig.of(out);
            assert_close("rope", &after.of(out), &slopes(&rig.of(src), |x| f(x, &grads, with_norm)));
        }
    }
}

/// Ragged sequences with K/V rows and the ranges that queries see: all keys, only some, windows.
struct Sequences {
    /// By sequence: tokens, and which of them keep K/V.
    kept: Vec<Vec<bool>>,
    window: usize,
}

impl Sequences {
    fn cases() -> Vec<Sequences> {
        let all = |n: usize| vec![true; n];
        let some = |n: usize, every: usize| (0..n).map(|i| i % every == 0).collect::<Vec<_>>();
        vec![
            Sequences { kept: vec![all(1)], window: usize::MAX },
            Sequences { kept: vec![all(3), all(70), all(5)], window: usize::MAX },
            Sequences { kept: vec![all(9), all(131)], window: 7 },
            Sequences { kept: vec![some(8, 3), vec![false; 4], some(150, 2)], window: usize::MAX },
            Sequences { kept: vec![some(140, 2), some(5, 5)], window: 9 },
        ]
    }

    /// (row, slot, first, end) of every row, or only of those that keep K/V or do not.
    fn queries(&self, of: impl Fn(bool) -> bool) -> Vec<[u32; 4]> {
        let (mut queries, mut row) = (Vec::new(), 0);
        for (slot, kept) in self.kept.iter().enumerate() {
            let places: Vec<usize> = (0..kept.len()).filter(|&i| kept[i]).collect();
            for (i, &keeps) in kept.iter().enumerate() {
                let first = places.iter().filter(|&&p| i >= self.window && p <= i - self.window).count();
                let end = places.iter().filter(|&&p| p <= i).count();
                if of(keeps) {
                    queries.push([row, slot as u32, first as u32, end as u32]);
                }
                row += 1;
            }
        }
        queries
    }
}

/// softmax(scale·q·Kᵀ)·V of one head.
fn attention(q: &[f64], keys: &[&[f64]], values: &[&[f64]], scale: f64) -> Vec<f64> {
    let weights = ln_softmax(&keys.iter().map(|k| scale * dot(q, k)).collect::<Vec<_>>());
    let column = |c: usize| weights.iter().zip(values).map(|(w, v)| w.exp() * v[c]).sum();
    (0..values[0].len()).map(column).collect()
}

#[test]
fn attention_backward() {
    for case in Sequences::cases() {
        for (heads, kv_heads, d) in [(1, 1, 2), (4, 2, 6), (3, 1, 16)] {
            check_attention(&case, heads, kv_heads, d);
        }
    }
}

fn check_attention(case: &Sequences, heads: usize, kv_heads: usize, d: usize) {
    let (mut rig, scale) = (Rig::default(), 0.8);
    let (own, apart) = (case.queries(|keeps| keeps), case.queries(|keeps| !keeps));
    let total: usize = case.kept.iter().map(Vec::len).sum();
    let slots = case.kept.len();
    let column = |queries: &[[u32; 4]], i: usize| queries.iter().map(|q| q[i]).collect::<Vec<_>>();
    let row_slot = rig.list(&(0..slots).flat_map(|s| vec![s as u32; case.kept[s].len()]).collect::<Vec<_>>());
    let [rows, first, end] = [0, 2, 3].map(|i| rig.list(&column(&own, i)));
    let [apart_rows, apart_first, apart_end] = [0, 2, 3].map(|i| rig.list(&column(&apart, i)));
    let mut starts = vec![0];
    let mut kv_row = Vec::new();
    for kept in &case.kept {
        let n = kept.iter().filter(|&&k| k).count() as u32;
        starts.push(starts[starts.len() - 1] + n);
        kv_row.extend(0..n);
    }
    let (kv_start, kv_row) = (rig.list(&starts), rig.list(&kv_row));
    let none = rig.list(&[]);
    let pos = rig.list(&vec![0; total]);
    let angles: Vec<f32> = (0..total * d).map(|i| if i % d < d / 2 { 1.0 } else { 0.0 }).collect();
    let angles = rig.mat(total, d, &angles);
    let (n, m) = (own.len(), apart.len());
    let (q, k, v) = (rig.filled(n, heads * d), rig.filled(n, kv_heads * d), rig.filled(n, kv_heads * d));
    // The op that appends leaves anything behind in its keys.
    let keys = rig.floats[k.offset / 4..][..n * kv_heads * d].to_vec();
    let k_in = rig.mat(n, kv_heads * d, &keys);
    let (d_out, out) = (rig.filled(n, heads * d), rig.empty(n, heads * d));
    let (d_q, d_k, d_v) = (rig.empty(n, heads * d), rig.empty(n, kv_heads * d), rig.empty(n, kv_heads * d));
    let (apart_q, apart_out) = (rig.filled(m, heads * d), rig.empty(m, heads * d));
    let (apart_k, apart_v) = (rig.filled(m, kv_heads * d), rig.filled(m, kv_heads * d));
    let pages_per_seq = case.kept.iter().map(Vec::len).max().unwrap().div_ceil(PAGE);
    let pages = slots * pages_per_seq;
    let kv = KvLayout { layers: 1, slots, pages, pages_per_seq, kv_heads, head_dim: d, dtype: DType::F32 };
    let set = |index| RowSet { bound: n, ..RowSet::exact(index) };
    let after = rig.run(&kv, |be| {
        for slot in 0..slots {
            // From the last page down: pages of a sequence need not ascend.
            let own: Vec<u32> = (0..pages_per_seq).map(|p| (pages - 1 - slot * pages_per_seq - p) as u32).collect();
            be.kv_pages(0, slot, 0, &own)?;
        }
        be.rope_append(&RopeAppend {
            layer: 0,
            head_dim: d,
            angles,
            pos,
            row_slot,
            q_rows: RowSet::exact(none),
            kv_rows: set(rows),
            kv_row,
            q,
            k: k_in,
            v,
            q_norm: None,
            k_norm: None,
            eps: 0.0,
        })?;
        let rows_of = set(rows);
        be.attend(&Attend {
            layer: 0,
            head_dim: d,
            scale,
            rows: rows_of,
            row_slot,
            first,
            end,
            q,
            out,
            kv_heads,
            single: false,
        })?;
        be.attend_backward(&AttendBackward {
            layer: 0,
            head_dim: d,
            kv_heads,
            scale,
            rows,
            row_slot,
            first,
            end,
            kv_start,
            q,
            out,
            d_out,
            d_q,
            d_k,
            d_v,
        })?;
        be.attend_apart(&AttendApart {
            layer: 0,
            head_dim: d,
            kv_heads,
            scale,
            rows: apart_rows,
            row_slot,
            first: apart_first,
            end: apart_end,
            q: apart_q,
            k: apart_k,
            v: apart_v,
            out: apart_out,
        })
    });

    let (group, scale) = (heads / kv_heads, f64::from(scale));
    let head = |of: &[f64], row: usize, heads: usize, head: usize| of[(row * heads + head) * d..][..d].to_vec();
    let attend = |q: &[f64], k: &[f64], v: &[f64]| -> Vec<f64> {
        let of = |i: usize, h: usize| {
            let [_, slot, first, end] = own[i].map(|x| x as usize);
            let range = || starts[slot] as usize + first..starts[slot] as usize + end;
            let rows = |of: &[f64]| range().map(|r| head(of, r, kv_heads, h / group)).collect::<Vec<_>>();
            let (keys, values) = (rows(k), rows(v));
            let (keys, values): (Vec<_>, Vec<_>) =
                (keys.iter().map(|k| &k[..]).collect(), values.iter().map(|v| &v[..]).collect());
            attention(&head(q, i, heads, h), &keys, &values, scale)
        };
        (0..n).flat_map(|i| (0..heads).flat_map(move |h| of(i, h))).collect()
    };
    let (q, k, v, d_out) = (rig.of(q), rig.of(k), rig.of(v), rig.of(d_out));
    assert_close("attention", &after.of(out), &attend(&q, &k, &v));
    // The loss is linear in the outputs, and most inputs reach few of them: directions tell as much as coordinates.
    let directions = Rig::default().random(3 * (q.len() + 2 * k.len()));
    let gradient = [after.of(d_q), after.of(d_k), after.of(d_v)].concat();
    assert!(gradient.iter().all(|x| x.is_finite()));
    let inputs = [&q[..], &k, &v].concat();
    for (i, direction) in directions.chunks(inputs.len()).enumerate() {
        // One by Q alone, one by Q and K, one by all.
        let upto = [q.len(), q.len() + k.len(), inputs.len()][i];
        let direction: Vec<f64> =
            direction.iter().enumerate().map(|(j, &x)| if j < upto { f64::from(x) } else { 0.0 }).collect();
        let f = |t: f64| {
            let x: Vec<f64> = inputs.iter().zip(&direction).map(|(x, d)| x + t * d).collect();
            dot(&attend(&x[..q.len()], &x[q.len()..][..k.len()], &x[q.len() + k.len()..]), &d_out)
        };
        let expected = (f(1e-5) - f(-1e-5)) / 2e-5;
        let scale = dot(&gradient, &gradient).sqrt() * dot(&direction, &direction).sqrt();
        let actual = dot(&gradient, &direction);
        assert!((actual - expected).abs() <= 1e-6 * (1.0 + scale), "direction {i}: {actual}, not {expected}");
    }

    let (q, own_k, own_v) = (rig.of(apart_q), rig.of(apart_k), rig.of(apart_v));
    let of = |i: usize, h: usize| {
        let [_, slot, first, end] = apart[i].map(|x| x as usize);
        let range = || starts[slot] as usize + first..starts[slot] as usize + end;
        let rows = |of: &[f64], own: &[f64]| -> Vec<Vec<f64>> {
            range().map(|r| head(of, r, kv_heads, h / group)).chain([head(own, i, kv_heads, h / group)]).collect()
        };
        let (keys, values) = (rows(&k, &own_k), rows(&v, &own_v));
        let (keys, values): (Vec<_>, Vec<_>) =
            (keys.iter().map(|k| &k[..]).collect(), values.iter().map(|v| &v[..]).collect());
        attention(&head(&q, i, heads, h), &keys, &values, scale)
    };
    let expected: Vec<f64> = (0..m).flat_map(|i| (0..heads).flat_map(move |h| of(i, h))).collect();
    assert_close("apart", &after.of(apart_out), &expected);
}

#[test]
fn gates_backward() {
    for (lens, width) in [(vec![], 3), (vec![1], 1), (vec![3, 1, 9], 17), (vec![20, 5], 40)] {
        let rows = lens.iter().sum::<usize>();
        let mut rig = Rig::default();
        let (a, b, c) = (rig.filled(rows, width), rig.filled(rows, width), rig.filled(rows, width + 1));
        let (bias, dots) = (rig.weight(1, width + 1, DType::BF16), rig.filled(rows, 1));
        let (h, logits) = (rig.filled(rows, width), rig.filled(rows, 1));
        let masks = [rig.filled(rows, 1), rig.filled(rows, 1)];
        let routers = [rig.filled(1, width), rig.filled(1, width)];
        let all = rig.list(&(0..rows as u32).collect::<Vec<_>>());
        let starts: Vec<u32> = std::iter::once(0)
            .chain(lens.iter().scan(0, |end, &n| {
                *end += n as u32;
                Some(*end)
            }))
            .collect();
        let seq_start = rig.list(&starts);
        let penalty = 0.25f32;
        let after = rig.run(&no_kv(), |be| {
            be.row_dots(&RowDots { a, b, rows: all, bias: Some((c, bias)), out: dots })?;
            for (i, sequences) in [None, Some(seq_start)].into_iter().enumerate() {
                let (d_mask, d_router) = (masks[i], routers[i]);
                be.gate_backward(&GateBackward { sequences, logits, d_mask, penalty, h, d_router })?;
            }
            Ok(())
        });
        let (a, b, c, bias) = (rig.of(a), rig.of(b), rig.of(c), rig.values(bias));
        let expected = rig.of(dots).into_iter().enumerate().map(|(i, x)| {
            x + dot(&a[i * width..][..width], &b[i * width..][..width]) + dot(&c[i * (width + 1)..][..width + 1], &bias)
        });
        assert_close("dots", &after.of(dots), &expected.collect::<Vec<_>>());
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (i, by_sequence) in [false, true].into_iter().enumerate() {
            let d_mask: Vec<f64> = rig.of(masks[i]).iter().map(|d| d + f64::from(penalty)).collect();
            let f = |logits: &[f64]| -> f64 {
                if !by_sequence {
                    return logits.iter().zip(&d_mask).map(|(&x, d)| d * sigmoid(x)).sum();
                }
                let of = |ends: &[u32]| {
                    let range = ends[0] as usize..ends[1] as usize;
                    let mean = logits[range.clone()].iter().sum::<f64>() / range.len() as f64;
                    sigmoid(mean) * d_mask[range].iter().sum::<f64>()
                };
                starts.windows(2).map(of).sum()
            };
            let d_logits = slopes(&rig.of(logits), f);
            assert_close("logits", &after.of(masks[i]), &d_logits);
            let mut expected = rig.of(routers[i]);
            for (h, d) in rig.of(h).chunks(width).zip(&d_logits) {
                expected.iter_mut().zip(h).for_each(|(sum, h)| *sum += d * h);
            }
            assert_close("router", &after.of(routers[i]), &expected);
        }
    }
}
