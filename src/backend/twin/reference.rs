//! The naive twin of every op: loops as the contract in `ops.rs` reads, f64 in between, one rounding at the end.
//!
//! It shares no code with any implementation. It also remembers which op wrote each value last, so that a comparison knows
//! what must have been left alone and which tolerance applies.

mod gradients;

use std::collections::{HashMap, HashSet};

use half::{bf16, f16};

use super::Types;
use crate::backend::*;
use crate::tensor::Tensor;

/// A backend in f64.
pub struct Reference {
    info: DeviceInfo,
    /// [rows][cols]
    weights: Vec<Vec<Vec<f64>>>,
    /// The arena in halves of 16 bits, the size of its smallest element, and who wrote each one.
    pub halves: Vec<u16>,
    pub written: Vec<Option<AnyKind>>,
    pub ints: Vec<u32>,
    pub ints_written: Vec<Option<AnyKind>>,
    layout: Option<KvLayout>,
    /// By (layer, slot): rows that were appended, and how many are held.
    kv: HashMap<(usize, usize), Vec<Option<KvRow>>>,
    lens: HashMap<(usize, usize), usize>,
    meter: Meter,
}

/// One row of K/V, of all heads, in the precision that the cache stores.
#[derive(Clone)]
struct KvRow {
    position: u32,
    k: Vec<f64>,
    v: Vec<f64>,
}

impl Reference {
    /// Rounds what it stores as a backend of these types does.
    pub fn new(types: Types) -> Self {
        Reference {
            info: DeviceInfo {
                name: "reference".into(),
                free_memory: None,
                activations: types.activations,
                kv: types.kv,
                weights: types.held,
                chunk: 256,
            },
            weights: Vec::new(),
            halves: Vec::new(),
            written: Vec::new(),
            ints: Vec::new(),
            ints_written: Vec::new(),
            layout: None,
            kv: HashMap::new(),
            lens: HashMap::new(),
            meter: Meter::default(),
        }
    }

    fn get(&self, m: Mat, row: usize, col: usize) -> f64 {
        assert!(row < m.rows && col < m.cols, "({row}, {col}) of [{}, {}]", m.rows, m.cols);
        load(&self.halves, m, row * m.cols + col)
    }

    fn row(&self, m: Mat, row: usize) -> Vec<f64> {
        (0..m.cols).map(|col| self.get(m, row, col)).collect()
    }

    /// Rounds and stores a value, and notes who did it.
    fn put(&mut self, op: impl Into<AnyKind>, m: Mat, row: usize, col: usize, value: f64) {
        assert!(row < m.rows && col < m.cols, "({row}, {col}) of [{}, {}]", m.rows, m.cols);
        let at = store(&mut self.halves, m, row * m.cols + col, value);
        self.written[at].fill(Some(op.into()));
    }

    fn int(&self, ints: Ints, i: usize) -> u32 {
        assert!(i < ints.len);
        self.ints[ints.offset + i]
    }

    fn put_int(&mut self, op: OpKind, ints: Ints, i: usize, value: u32) {
        assert!(i < ints.len);
        self.ints[ints.offset + i] = value;
        self.ints_written[ints.offset + i] = Some(op.into());
    }

    fn rows(&self, rows: RowSet) -> Vec<usize> {
        (0..self.count(rows)).map(|i| self.int(rows.index, i) as usize).collect()
    }

    fn count(&self, rows: RowSet) -> usize {
        let n = rows.count.map_or(rows.bound, |count| self.int(count, 0) as usize);
        assert!(n <= rows.bound);
        n
    }

    /// `source·Wᵀ + bias`.
    fn linear(&self, source: &[f64], weight: Weight, bias: Option<Weight>) -> Vec<f64> {
        let bias = |n: usize| bias.map_or(0.0, |b| self.weights[b.id][0][n]);
        self.weights[weight.id].iter().enumerate().map(|(n, w)| dot(source, w) + bias(n)).collect()
    }

    fn vector(&self, weight: Weight) -> &[f64] {
        &self.weights[weight.id][0]
    }

    /// Position of a row that the K/V holds.
    fn position(&self, layer: usize, slot: usize, row: usize) -> u32 {
        self.kv[&(layer, slot)][row].as_ref().expect("a row that was appended").position
    }
}

/// Where an element stands, in halves.
fn place(m: Mat, i: usize) -> Range<usize> {
    let size = m.dtype.size() / 2;
    m.offset / 2 + i * size..m.offset / 2 + (i + 1) * size
}

/// Element i of a matrix.
pub fn load(halves: &[u16], m: Mat, i: usize) -> f64 {
    match (m.dtype, &halves[place(m, i)]) {
        (DType::F32, &[low, high]) => f64::from(f32::from_bits(u32::from(high) << 16 | u32::from(low))),
        (DType::F16, &[bits]) => f16::from_bits(bits).to_f64(),
        (DType::BF16, &[bits]) => bf16::from_bits(bits).to_f64(),
        _ => unreachable!(),
    }
}

/// Rounds and stores element i of a matrix. Returns where it stands.
pub fn store(halves: &mut [u16], m: Mat, i: usize, value: f64) -> Range<usize> {
    let at = place(m, i);
    match m.dtype {
        DType::F32 => {
            let bits = (value as f32).to_bits();
            halves[at.clone()].copy_from_slice(&[bits as u16, (bits >> 16) as u16]);
        }
        DType::F16 => halves[at.start] = f16::from_f64(value).to_bits(),
        DType::BF16 => halves[at.start] = bf16::from_f64(value).to_bits(),
    }
    at
}

fn round(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::BF16 => bf16::from_f64(value).to_f64(),
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / scale * w).collect()
}

fn score(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

/// The largest number; NaNs are passed over, they show in the sums.
fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// The token of [`Sample`], from tokens in order of preference, with weights in units of 2^-39 of the best.
fn choice(draw: &Draw, logits: &[f64]) -> u32 {
    let one = 2f64.powi(39);
    let top = largest(logits);
    if !top.is_finite() || logits.iter().any(|x| x.is_nan()) {
        return SAMPLE_NONE;
    }
    if draw.is_greedy() {
        return logits.iter().position(|x| *x == top).expect("the largest") as u32;
    }
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let kth = *draw.top_k.checked_sub(1).and_then(|i| sorted.get(i as usize)).unwrap_or(&f64::NEG_INFINITY);
    let weight = |x: f64| ((x - top) / f64::from(draw.temperature)).exp() * one;
    let mut tokens: Vec<(u64, u32)> =
        logits.iter().zip(0..).filter(|(x, _)| **x >= kth).map(|(&x, id)| (weight(x).round() as u64, id)).collect();
    tokens.sort_by_key(|&(weight, id)| (std::cmp::Reverse(weight), id));
    if draw.top_p < 1.0 {
        let total: u64 = tokens.iter().map(|(weight, _)| weight).sum();
        let wanted = ((f64::from(draw.top_p) * total as f64).ceil() as u64).max(1);
        let mut before = 0;
        tokens.retain(|(weight, _)| {
            before += weight;
            before - weight < wanted
        });
    }
    tokens.retain(|(weight, _)| *weight as f64 >= f64::from(draw.min_p) * one);
    tokens.sort_by_key(|&(_, id)| id);
    let total: u64 = tokens.iter().map(|(weight, _)| weight).sum();
    let mut left = ((u128::from(draw.random) * u128::from(total)) >> 64) as u64;
    for (weight, id) in tokens {
        if left < weight {
            return id;
        }
        left -= weight;
    }
    unreachable!("less than the sum of the weights")
}

impl Backend for Reference {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn upload(&mut self, tensor: &Tensor) -> Result<Weight> {
        let values = tensor.to_f32();
        let rows =
            (0..tensor.rows).map(|r| values[r * tensor.cols..][..tensor.cols].iter().map(|&x| x.into()).collect());
        self.weights.push(rows.collect());
        let held = self.info.weights.filter(|_| tensor.rows > 1).unwrap_or(tensor.dtype);
        Ok(Weight { id: self.weights.len() - 1, rows: tensor.rows, cols: tensor.cols, dtype: held })
    }

    fn reserve(&mut self, arena_bytes: usize, ints: usize, _workspace: usize, kv: &KvLayout) -> Result<()> {
        (self.halves, self.written) = (vec![0; arena_bytes / 2], vec![None; arena_bytes / 2]);
        (self.ints, self.ints_written) = (vec![0; ints], vec![None; ints]);
        self.layout = Some(*kv);
        Ok(())
    }

    fn write_ints(&mut self, to: Ints, values: &[u32]) -> Result<()> {
        self.ints[to.offset..][..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn write_floats(&mut self, to: Mat, values: &[f32]) -> Result<()> {
        let to = &mut self.halves[to.offset / 2..][..2 * values.len()];
        to.copy_from_slice(bytemuck::cast_slice(values));
        Ok(())
    }

    fn read_ints(&mut self, from: Ints, to: &mut [u32]) -> Result<()> {
        to.copy_from_slice(&self.ints[from.offset..][..to.len()]);
        Ok(())
    }

    fn read_floats(&mut self, from: Mat, to: &mut [f32]) -> Result<()> {
        let from = &self.halves[from.offset / 2..][..2 * to.len()];
        bytemuck::cast_slice_mut(to).copy_from_slice(from);
        Ok(())
    }

    /// Rows stand in a vector, whatever page they would be in.
    fn kv_pages(&mut self, layer: usize, slot: usize, first: usize, pages: &[u32]) -> Result<()> {
        let kv = self.layout.expect("reserved");
        assert!(layer < kv.layers && slot < kv.slots && first + pages.len() <= kv.pages_per_seq);
        assert!(pages.iter().all(|&page| (page as usize) < kv.pages));
        Ok(())
    }

    fn kv_len(&mut self, layer: usize, slot: usize, rows: usize) -> Result<()> {
        self.lens.insert((layer, slot), rows);
        Ok(())
    }

    fn step(
        &mut self,
        _key: Option<StepKey>,
        body: &mut (dyn FnMut(&mut dyn Backend) -> Result<()> + Send),
    ) -> Result<()> {
        body(self)
    }

    fn rates(&mut self, _dtype: DType) -> Result<Rates> {
        unreachable!("nobody asks how fast the reference is")
    }

    fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }
}

impl Ops for Reference {
    fn embed(&mut self, a: &Embed) -> Result<()> {
        a.check()?;
        for i in 0..a.ids.len {
            let id = self.int(a.ids, i) as usize;
            for col in 0..a.table.cols {
                self.put(OpKind::Embed, a.out, i, col, self.weights[a.table.id][id][col]);
            }
        }
        self.meter.add(OpKind::Embed, a.cost(Work { rows: a.ids.len, ..Work::default() }));
        Ok(())
    }

    fn rope_angles(&mut self, a: &RopeAngles) -> Result<()> {
        a.check()?;
        let half = a.inv_freq.cols;
        for i in 0..a.pos.len {
            for j in 0..half {
                let angle = f64::from(self.int(a.pos, i) as f32 * self.vector(a.inv_freq)[j] as f32);
                self.put(OpKind::RopeAngles, a.out, i, j, angle.cos());
                self.put(OpKind::RopeAngles, a.out, i, half + j, angle.sin());
            }
        }
        self.meter.add(OpKind::RopeAngles, a.cost(Work { rows: a.pos.len, ..Work::default() }));
        Ok(())
    }

    fn norm_gate(&mut self, a: &NormGate) -> Result<()> {
        a.check()?;
        let rows = self.rows(a.rows);
        for (i, &row) in rows.iter().enumerate() {
            let h = rms_norm(&self.row(a.x, row), self.vector(a.weight), a.eps);
            if let Some(out) = a.out {
                h.iter().enumerate().for_each(|(col, &h)| self.put(OpKind::NormGate, out, i, col, h));
            }
            if let Some(gate) = a.gate {
                self.put(OpKind::NormGate, gate.logits, row, 0, dot(&h, self.vector(gate.router)));
            }
        }
        self.meter.add(OpKind::NormGate, a.cost(Work { rows: rows.len(), ..Work::default() }));
        Ok(())
    }

    fn route(&mut self, a: &Route) -> Result<()> {
        a.check()?;
        const OP: OpKind = OpKind::Route;
        let (rows, seqs) = (a.pos.len, a.slots.len);
        let seq_rows = |r: &Self, seq| r.int(a.seq_start, seq) as usize..r.int(a.seq_start, seq + 1) as usize;

        let mut active = vec![false; rows];
        for seq in 0..seqs {
            let range = seq_rows(self, seq);
            let logit = |row| self.get(a.logits, row, 0);
            match a.decide {
                Decide::All => active[range].fill(true),
                Decide::Threshold(t) => range.for_each(|row| active[row] = score(logit(row)) >= f64::from(t)),
                Decide::TopK(share) => {
                    let wanted = top_count(share, range.len());
                    for row in range.clone() {
                        // Rows that go first: better ones, and equal ones that stand earlier.
                        let key = |row| if logit(row).is_nan() { f64::NEG_INFINITY } else { logit(row) };
                        let before = range.clone().filter(|&r| key(r) > key(row) || key(r) == key(row) && r < row);
                        active[row] = before.count() < wanted;
                    }
                }
                Decide::Sequence(t) => {
                    if self.int(a.decided, seq) == UNDECIDED {
                        let mean = range.clone().map(logit).sum::<f64>() / range.len() as f64;
                        let decision = u32::from(score(mean) >= f64::from(t));
                        self.put_int(OP, a.decided, seq, decision);
                    }
                    active[range].fill(self.int(a.decided, seq) == 1);
                }
            }
        }
        for (i, row) in (0..rows).filter(|&row| active[row]).enumerate() {
            self.put_int(OP, a.active, i, row as u32);
        }
        for cut in 0..a.cuts.len {
            let below = (0..self.int(a.cuts, cut) as usize).filter(|&row| active[row]).count();
            self.put_int(OP, a.active_at, cut, below as u32);
        }

        let taken = |take, row: usize| take == Take::All || active[row];
        let (mut query, mut kept) = (0, 0);
        for seq in 0..seqs {
            let slot = self.int(a.slots, seq) as usize;
            let mut len = self.lens.get(&(a.layer, slot)).copied().unwrap_or(0);
            // What the rows of this step are, behind those that are held.
            let old = len;
            let mut new = Vec::new();
            for row in seq_rows(self, seq) {
                let position = self.int(a.pos, row);
                if taken(a.keys, row) {
                    self.put_int(OP, a.kv_row, kept, len as u32);
                    new.push(position);
                    (len, kept) = (len + 1, kept + 1);
                }
                if taken(a.queries, row) {
                    let at = |r| if r < old { self.position(a.layer, slot, r) } else { new[r - old] };
                    let visible = |r| a.window.is_none_or(|window| at(r) as usize + window > position as usize);
                    let first = (0..len).find(|&r| visible(r)).unwrap_or(len);
                    self.put_int(OP, a.first, query, first as u32);
                    self.put_int(OP, a.end, query, len as u32);
                    query += 1;
                }
            }
            self.lens.insert((a.layer, slot), len);
        }
        self.meter.add(OP, a.cost(Work { rows, ..Work::default() }));
        Ok(())
    }

    fn qkv(&mut self, a: &Qkv) -> Result<()> {
        a.check()?;
        let (q_rows, kv_rows) = (self.rows(a.q_rows), self.rows(a.kv_rows));
        let of = [(&q_rows, a.q), (&kv_rows, a.k), (&kv_rows, a.v)];
        for (part, (rows, out)) in of.into_iter().enumerate() {
            for (i, row) in rows.iter().enumerate() {
                let y = self.linear(&self.row(a.h, row - a.base), a.weights[part], a.biases[part]);
                for (col, y) in y.into_iter().enumerate() {
                    self.put(OpKind::Qkv, out, i, col, y);
                }
            }
        }
        self.meter.add(OpKind::Qkv, a.cost(Work { rows: q_rows.len(), kv_rows: kv_rows.len(), pairs: 0 }));
        Ok(())
    }

    fn rope_append(&mut self, a: &RopeAppend) -> Result<()> {
        a.check()?;
        const OP: OpKind = OpKind::RopeAppend;
        let (d, kv_dtype) = (a.head_dim, self.layout.expect("reserved").dtype);
        let (q_rows, kv_rows) = (self.rows(a.q_rows), self.rows(a.kv_rows));
        let turned = |r: &Self, heads: Vec<f64>, row: usize, norm: Option<Weight>| -> Vec<f64> {
            let turn = |head: &[f64]| {
                let x = norm.map_or_else(|| head.to_vec(), |w| rms_norm(head, r.vector(w), a.eps));
                let angle = |i| (r.get(a.angles, row, i), r.get(a.angles, row, d / 2 + i));
                let low = (0..d / 2).map(|i| x[i] * angle(i).0 - x[d / 2 + i] * angle(i).1);
                let high = (0..d / 2).map(|i| x[d / 2 + i] * angle(i).0 + x[i] * angle(i).1);
                low.chain(high).collect::<Vec<_>>()
            };
            heads.chunks(d).flat_map(turn).collect()
        };
        for (i, &row) in q_rows.iter().enumerate() {
            for (col, x) in turned(self, self.row(a.q, i), row, a.q_norm).into_iter().enumerate() {
                self.put(OP, a.q, i, col, x);
            }
        }
        for (i, &row) in kv_rows.iter().enumerate() {
            let store = |values: Vec<f64>| values.into_iter().map(|x| round(x, kv_dtype)).collect();
            let k = store(turned(self, self.row(a.k, i), row, a.k_norm));
            let v = store(self.row(a.v, i));
            let position = self.int(a.pos, row);
            let (slot, at) = (self.int(a.row_slot, row) as usize, self.int(a.kv_row, i) as usize);
            let held = self.kv.entry((a.layer, slot)).or_default();
            held.resize(held.len().max(at + 1), None);
            held[at] = Some(KvRow { position, k, v });
        }
        self.meter.kv_rows += kv_rows.len() as u64;
        self.meter.add(OP, a.cost(Work { rows: q_rows.len(), kv_rows: kv_rows.len(), pairs: 0 }));
        Ok(())
    }

    fn attend(&mut self, a: &Attend) -> Result<()> {
        a.check()?;
        let (d, heads) = (a.head_dim, a.q.cols / a.head_dim);
        let rows = self.rows(a.rows);
        let (mut seen, mut pairs) = (HashSet::new(), 0);
        for (i, &row) in rows.iter().enumerate() {
            let slot = self.int(a.row_slot, row) as usize;
            let range = self.int(a.first, i) as usize..self.int(a.end, i) as usize;
            seen.extend(range.clone().map(|r| (slot, r)));
            pairs += range.len() as u64;
            for head in 0..heads {
                let query = &self.row(a.q, i)[head * d..][..d];
                let own = head / (heads / a.kv_heads) * d;
                let held: Vec<&KvRow> =
                    self.kv[&(a.layer, slot)][range.clone()].iter().map(|r| r.as_ref().expect("appended")).collect();
                let scores: Vec<f64> = held.iter().map(|r| f64::from(a.scale) * dot(query, &r.k[own..][..d])).collect();
                let top = largest(&scores);
                let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let out: Vec<f64> = (0..d)
                    .map(|c| weights.iter().zip(&held).map(|(w, r)| w * r.v[own + c]).sum::<f64>() / sum)
                    .collect();
                for (c, x) in out.into_iter().enumerate() {
                    self.put(OpKind::Attend, a.out, i, head * d + c, x);
                }
            }
        }
        self.meter.add(OpKind::Attend, a.cost(Work { rows: rows.len(), kv_rows: seen.len(), pairs }));
        Ok(())
    }

    fn project_add(&mut self, a: &ProjectAdd) -> Result<()> {
        a.check()?;
        let rows = self.rows(a.rows);
        for (i, &row) in rows.iter().enumerate() {
            let y = self.linear(&self.row(a.src, i), a.weight, a.bias);
            for (col, y) in y.into_iter().enumerate() {
                self.put(OpKind::ProjectAdd, a.x, row, col, self.get(a.x, row, col) + y);
            }
        }
        self.meter.add(OpKind::ProjectAdd, a.cost(Work { rows: rows.len(), ..Work::default() }));
        Ok(())
    }

    fn swiglu(&mut self, a: &SwiGlu) -> Result<()> {
        a.check()?;
        let rows = self.count(a.rows);
        for i in 0..rows {
            let h = self.row(a.h, i);
            let (gate, up) = (self.linear(&h, a.gate, a.gate_bias), self.linear(&h, a.up, a.up_bias));
            for (col, (g, u)) in gate.into_iter().zip(up).enumerate() {
                self.put(OpKind::SwiGlu, a.out, i, col, g / (1.0 + (-g).exp()) * u);
            }
        }
        self.meter.add(OpKind::SwiGlu, a.cost(Work { rows, ..Work::default() }));
        Ok(())
    }

    fn logits(&mut self, a: &Logits) -> Result<()> {
        a.check()?;
        for i in 0..a.out.rows {
            for (col, y) in self.linear(&self.row(a.h, i), a.weight, None).into_iter().enumerate() {
                self.put(OpKind::Logits, a.out, i, col, y);
            }
        }
        self.meter.add(OpKind::Logits, a.cost(Work { rows: a.out.rows, ..Work::default() }));
        Ok(())
    }

    fn logprobs(&mut self, a: &LogProbs) -> Result<()> {
        a.check()?;
        for i in 0..a.targets.len {
            let row = self.row(a.logits, i);
            let top = largest(&row);
            let sum: f64 = row.iter().map(|x| (x - top).exp()).sum();
            let target = row[self.int(a.targets, i) as usize];
            self.put(OpKind::LogProbs, a.out, i, 0, target - top - sum.ln());
        }
        self.meter.add(OpKind::LogProbs, a.cost(Work { rows: a.targets.len, ..Work::default() }));
        Ok(())
    }

    fn sample(&mut self, a: &Sample) -> Result<()> {
        a.check()?;
        for i in 0..a.logits.rows {
            let words = |draws| std::array::from_fn(|word| self.int(draws, i * Draw::WORDS + word));
            let draw = Draw::from_words(a.draws.map_or([0; Draw::WORDS], words));
            self.put_int(OpKind::Sample, a.tokens, i, choice(&draw, &self.row(a.logits, i)));
        }
        self.meter.add(OpKind::Sample, a.cost(Work { rows: a.logits.rows, ..Work::default() }));
        Ok(())
    }
}
