//! The cases of the ops around K/V: routing, appending, attention.
//!
//! What stands in the K/V cannot be read, so it is written by [`RopeAppend`] and shown by [`Attend`] and [`Route`].

use super::Types;
use super::setup::{Case, Count, Setup, noise, spread};
use crate::backend::*;

/// The layer that everything happens in; there is one below and one above.
pub const LAYER: usize = 1;

/// The heads of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub head_dim: usize,
    pub kv_heads: usize,
    /// Query heads that share a K/V head.
    pub group: usize,
}

impl Heads {
    pub fn q_dim(self) -> usize {
        self.kv_dim() * self.group
    }

    pub fn kv_dim(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// With a head_dim that there is.
    pub fn on(self, types: Types) -> Self {
        Heads { head_dim: types.head_dim(self.head_dim), ..self }
    }

    pub fn setup(self, types: Types) -> Setup {
        Setup::with_kv(types, 3, 5, self.kv_heads, self.head_dim)
    }
}

/// K/V that a step finds: (layer, slot, row) of it.
#[derive(Debug, Clone)]
pub struct History {
    pub slot: usize,
    /// By row.
    pub positions: Vec<u32>,
    /// Rows that count as held; the same in most cases.
    pub len: usize,
}

impl History {
    /// Rows at ascending positions with gaps.
    pub fn of(slot: usize, rows: usize) -> Self {
        History { slot, positions: (0..rows as u32).map(|r| 2 * r + r / 5).collect(), len: rows }
    }

    fn next_position(&self) -> u32 {
        self.positions.last().map_or(0, |p| p + 3)
    }
}

/// What stands in the K/V: K, V by slot, row and column.
pub type Values = fn(usize, usize, usize) -> (f32, f32);

pub fn plain_values(slot: usize, row: usize, col: usize) -> (f32, f32) {
    (0.2 + noise("k", row + slot * 10_000, col), 0.4 + noise("v", row + slot * 10_000, col))
}

/// Appends histories without rotating them: the K/V hold exactly these values.
pub fn write_history(s: &mut Setup, heads: Heads, histories: &[History], values: Values) {
    let n: usize = histories.iter().map(|h| h.positions.len()).sum();
    let each = || histories.iter().flat_map(|h| (0..h.positions.len()).map(move |r| (h, r)));
    let angles = s.mat(n, heads.head_dim, DType::F32);
    let [k, v] = [(); 2].map(|()| s.activations(n, heads.kv_dim()));
    for (i, (h, r)) in each().enumerate() {
        s.fill_row(angles, i, |col| f32::from(u8::from(col < heads.head_dim / 2)));
        s.fill_row(k, i, |col| values(h.slot, r, col).0);
        s.fill_row(v, i, |col| values(h.slot, r, col).1);
    }
    let column = |value: fn(&History, usize) -> u32| each().map(|(h, r)| value(h, r)).collect::<Vec<_>>();
    let pos = s.ints(&column(|h, r| h.positions[r]));
    let row_slot = s.ints(&column(|h, _| h.slot as u32));
    let kv_row = s.ints(&column(|_, r| r as u32));
    let q_rows = s.rows(&[], Count::Host);
    let kv_rows = s.rows(&(0..n as u32).collect::<Vec<_>>(), Count::Host);
    let q = s.activations(0, heads.q_dim());
    s.scratch.push(k);
    for h in histories {
        s.hold(LAYER, h.slot, h.len, h.positions.len().max(h.len));
        // The same slot in other layers, which nothing should touch.
        s.hold(0, h.slot, 0, 1);
        s.hold(2, h.slot, 0, 1);
    }
    s.before.push(Op::RopeAppend(RopeAppend {
        layer: LAYER,
        head_dim: heads.head_dim,
        angles,
        pos,
        row_slot,
        q_rows,
        kv_rows,
        kv_row,
        q,
        k,
        v,
        q_norm: None,
        k_norm: None,
        eps: 1e-6,
    }));
}

/// A query: a slot and the K/V rows that it sees.
pub type Query = (usize, Range<usize>);

/// Attention of some queries; the i-th one is filled with `value(i, column)`. Rows of the residual stream are spread.
pub fn attention(
    s: &mut Setup,
    heads: Heads,
    queries: &[Query],
    count: Count,
    scale: f32,
    value: impl Fn(usize, usize) -> f32,
) -> Attend {
    let n = queries.len();
    let index = spread(n);
    let rows = s.rows(&index, count);
    let row_slot = s.room(index.last().map_or(0, |last| *last as usize + 2));
    let [first, end] = [(); 2].map(|()| s.room(rows.bound + 1));
    let [q, out] = [(); 2].map(|()| s.activations(rows.bound + 1, heads.q_dim()));
    for (i, (slot, range)) in queries.iter().enumerate() {
        s.set_int(row_slot, index[i] as usize, *slot as u32);
        s.set_int(first, i, range.start as u32);
        s.set_int(end, i, range.end as u32);
        s.fill_row(q, i, |col| value(i, col));
    }
    let (layer, head_dim, kv_heads) = (LAYER, heads.head_dim, heads.kv_heads);
    let single = queries.iter().enumerate().all(|(i, (slot, _))| queries[..i].iter().all(|(other, _)| other != slot));
    Attend { layer, head_dim, scale, rows, row_slot, first, end, q, out, kv_heads, single }
}

pub fn query_value(i: usize, col: usize) -> f32 {
    0.3 + 1.5 * noise("q", i, col)
}

pub fn scale(heads: Heads) -> f32 {
    1.0 / (heads.head_dim as f32).sqrt()
}

/// Queries of `n` new rows, causal, behind those that the slot holds.
pub fn causal(slot: usize, old: usize, n: usize) -> impl Iterator<Item = Query> {
    (0..n).map(move |i| (slot, 0..old + i + 1))
}

pub fn attend(types: Types) -> Vec<Case> {
    const COUNTS: [Count; 3] = [Count::Host, Count::Device(0), Count::Device(3)];
    let mut cases = Vec::new();
    let mut case = |name: &str, heads: Heads, lens: &[(usize, usize)], queries: &[Query], values: Values| {
        let heads = heads.on(types);
        let count = COUNTS[cases.len() % 3];
        let slots = lens.iter().map(|&(slot, _)| slot + 1).max().unwrap_or(0).max(5);
        let mut s = Setup::with_kv(types, 3, slots, heads.kv_heads, heads.head_dim);
        let histories: Vec<_> = lens.iter().map(|&(slot, rows)| History::of(slot, rows)).collect();
        write_history(&mut s, heads, &histories, values);
        let op = Op::Attend(attention(&mut s, heads, queries, count, scale(heads), query_value));
        cases.push(s.case(format!("attend {name}, {heads:?}, {} queries, {count:?}", queries.len()), op));
    };

    let decode = |slots: &[(usize, usize)]| slots.iter().map(|&(slot, len)| (slot, 0..len)).collect::<Vec<_>>();
    let window = |(slot, range): Query, width| (slot, range.end.saturating_sub(width)..range.end);
    for (i, head_dim) in [2, 8, 10, 64, 80, 96, 128, 256].into_iter().enumerate() {
        for (j, group) in [1, 3, 4, 7].into_iter().enumerate() {
            let heads = Heads { head_dim, kv_heads: 1 + (i + j) % 3, group };
            match (i + 2 * j) % 4 {
                0 => case("prefill", heads, &[(2, 37)], &causal(2, 0, 37).collect::<Vec<_>>(), plain_values),
                1 => case(
                    "prefill of a chunk",
                    heads,
                    &[(1, 133)],
                    &causal(1, 100, 33).collect::<Vec<_>>(),
                    plain_values,
                ),
                2 => {
                    let lens = [(3, 3), (0, 17), (4, 80), (1, 1)];
                    let queries: Vec<_> =
                        lens.iter().flat_map(|&(slot, n)| causal(slot, n - n.min(18), n.min(18))).collect();
                    case("uneven sequences", heads, &lens, &queries, plain_values);
                }
                _ => {
                    let queries: Vec<_> = causal(0, 60, 40).map(|q| window(q, 7)).collect();
                    case("sliding windows", heads, &[(0, 100)], &queries, plain_values);
                }
            }
            let lens = [(4, 65), (0, 1), (2, 200), (1, 63), (3, 64)];
            case("decode", heads, &lens, &decode(&lens), plain_values);
        }
    }
    // Borders of pages and segments, for few queries and for many.
    for (i, len) in [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 577, 1025, 1100].into_iter().enumerate() {
        let heads = [
            Heads { head_dim: 8, kv_heads: 2, group: 3 },
            Heads { head_dim: 64, kv_heads: 1, group: 4 },
            Heads { head_dim: 10, kv_heads: 3, group: 1 },
        ][i % 3];
        case("of one row", heads, &[(3, len)], &[(3, 0..len)], plain_values);
        let last = len.min(19);
        case("of the last rows", heads, &[(3, len)], &causal(3, len - last, last).collect::<Vec<_>>(), plain_values);
        let first = len.saturating_sub(66);
        case("of one row's window", heads, &[(3, len)], &[(3, first..len)], plain_values);
    }
    // One row among short ones is long; many rows, of all lengths.
    for (kv_heads, group, head_dim) in [(2, 3, 64), (1, 2, 16), (3, 1, 128)] {
        let heads = Heads { head_dim, kv_heads, group };
        let uneven = [(0, 1), (3, 2500), (1, 70), (4, 1300), (2, 5)];
        case("decode, uneven", heads, &uneven, &decode(&uneven), plain_values);
        let windows: Vec<_> = uneven.iter().map(|&(slot, len)| window((slot, 0..len), 900)).collect();
        case("decode, uneven windows", heads, &uneven, &windows, plain_values);
    }
    let many: Vec<_> = (0..41).map(|slot| (slot, if slot == 37 { 1500 } else { slot * 53 % 331 + 1 })).collect();
    let heads = Heads { head_dim: 16, kv_heads: 2, group: 2 };
    case("decode of many rows", heads, &many, &decode(&many), plain_values);
    // Rows of several sequences in one block, each with much K/V, and blocks that are full.
    for heads in [Heads { head_dim: 64, kv_heads: 1, group: 2 }, Heads { head_dim: 128, kv_heads: 2, group: 1 }] {
        let lens = [(0, 700), (2, 500), (1, 130)];
        let queries: Vec<_> = lens.iter().flat_map(|&(slot, n)| causal(slot, n - 40, 40)).collect();
        case("long uneven sequences", heads, &lens, &queries, plain_values);
        case("long prefill", heads, &[(1, 330)], &causal(1, 30, 300).collect::<Vec<_>>(), plain_values);
    }
    for heads in [Heads { head_dim: 16, kv_heads: 2, group: 2 }, Heads { head_dim: 64, kv_heads: 1, group: 3 }] {
        for (first, end) in [(511, 512), (511, 513), (512, 513), (512, 576), (64, 128), (63, 65), (500, 1030)] {
            case(&format!("of [{first}, {end})"), heads, &[(0, 1100)], &[(0, first..end)], plain_values);
        }
        let windows: Vec<_> = causal(0, 480, 70).map(|q| window(q, 90)).collect();
        case("windows over a segment's border", heads, &[(0, 550)], &windows, plain_values);
        // What keys=all leaves: active queries with rows between them that only hold K/V.
        let jumps: Vec<_> = [1, 2, 40, 41, 64, 65, 66, 130, 513, 514].map(|end| (1, 0..end)).to_vec();
        case("with jumps", heads, &[(1, 520)], &jumps, plain_values);
        // Neighbours in a tile that see nothing in common.
        let apart: Vec<_> = [3..5, 7..20, 30..31, 31..62, 64..65, 100..190, 190..200].map(|r| (1, r)).to_vec();
        case("of ranges apart", heads, &[(1, 200)], &apart, plain_values);
        case("of nothing", heads, &[(0, 3)], &[], plain_values);
        case("of nothing", heads, &[(0, 3)], &[], plain_values);

        // K and V that are no numbers, in rows that only some of the queries see.
        let rows: Vec<_> = causal(0, 0, 40).chain(causal(2, 0, 3)).collect();
        let lens = [(0, 40), (2, 3)];
        case("NaN in V", heads, &lens, &rows, |slot, row, col| {
            let (k, v) = plain_values(slot, row, col);
            (k, if (slot, row, col % 5) == (0, 23, 1) { f32::NAN } else { v })
        });
        case("inf in V", heads, &lens, &rows, |slot, row, col| {
            let (k, v) = plain_values(slot, row, col);
            (k, if (slot, row, col % 5) == (0, 23, 1) { f32::INFINITY } else { v })
        });
        case("NaN in K", heads, &lens, &rows, |slot, row, col| {
            let (k, v) = plain_values(slot, row, col);
            (if (slot, row, col) == (0, 23, 1) { f32::NAN } else { k }, v)
        });
        case("inf in K", heads, &lens, &rows, |slot, row, col| {
            let (k, v) = plain_values(slot, row, col);
            (if (slot, row, col) == (0, 23, 1) { f32::INFINITY } else { k }, v)
        });
        // A segment in which the only score is NaN.
        let ends: Vec<_> = [(0, 511..512), (0, 511..513), (0, 511..600), (0, 512..600)].to_vec();
        case("NaN in K, alone in its segment", heads, &[(0, 600)], &ends, |slot, row, col| {
            let (k, v) = plain_values(slot, row, col);
            (if row == 511 { f32::NAN } else { k }, v)
        });
    }

    // Scores that are exact: the first column of q is 1, the others are 0, the scale is 1.
    let scores: [(&str, Values); 5] = [
        ("+-80", |slot, row, col| (160.0 * (row * 7 % 41) as f32 / 40.0 - 80.0, plain_values(slot, row, col).1)),
        ("+-1e30", |slot, row, col| (if row % 3 == 1 { 1e30 } else { -1e30 }, plain_values(slot, row, col).1)),
        ("equal", |slot, row, col| (-7.5, plain_values(slot, row, col).1)),
        ("-inf beside numbers", |slot, row, col| {
            (if row % 3 == 0 { f32::NEG_INFINITY } else { row as f32 }, plain_values(slot, row, col).1)
        }),
        ("falling", |slot, row, col| (-0.5 * row as f32, plain_values(slot, row, col).1)),
    ];
    for ((name, values), head_dim) in scores.into_iter().flat_map(|scores| [(scores, 2), (scores, 64)]) {
        let heads = Heads { head_dim, kv_heads: 2, group: 2 }.on(types);
        let queries: Vec<_> = causal(1, 0, 21).chain([(1, 0..600), (1, 0..601)]).chain([(4, 0..70)]).collect();
        let mut s = heads.setup(types);
        write_history(&mut s, heads, &[History::of(1, 601), History::of(4, 70)], values);
        let q = |_, col| f32::from(u8::from(col % heads.head_dim == 0));
        let mut op = attention(&mut s, heads, &queries, Count::Host, 1.0, q);
        op.scale = 1.0;
        cases.push(s.case(format!("attend, scores {name}, head of {head_dim}"), Op::Attend(op)));
    }
    // Queries that are no numbers.
    for head_dim in [10, 64] {
        let heads = Heads { head_dim, kv_heads: 2, group: 3 }.on(types);
        let mut s = heads.setup(types);
        write_history(&mut s, heads, &[History::of(0, 30)], plain_values);
        let queries: Vec<_> = causal(0, 0, 30).collect();
        let q = |i, col| match (i, col) {
            (5, 17) => f32::NAN,
            (11, 0) => f32::INFINITY,
            _ => query_value(i, col),
        };
        let op = Op::Attend(attention(&mut s, heads, &queries, Count::Device(0), scale(heads), q));
        cases.push(s.case(format!("attend, NaN and inf in q, head of {head_dim}"), op));
    }
    cases
}

/// Shows what the K/V of some slots hold behind the op: from which row on, to which.
fn show(s: &mut Setup, heads: Heads, histories: &[History], new: &[Vec<u32>]) {
    let lens = || histories.iter().zip(new).map(|(h, new)| (h.slot, h.positions.len(), h.positions.len() + new.len()));
    // V of each row; K of each beside the one before it; all together.
    let single: Vec<_> = lens().flat_map(|(slot, old, len)| (old..len).map(move |r| (slot, r..r + 1))).collect();
    let pairs: Vec<_> =
        lens().flat_map(|(slot, old, len)| (old..len).map(move |r| (slot, r.saturating_sub(1)..r + 1))).collect();
    let whole: Vec<_> =
        lens().filter(|l| l.2 > 0).flat_map(|(slot, _, len)| [(slot, 0..len), (slot, 0..len)]).collect();
    for queries in [single, pairs, whole] {
        let op = attention(s, heads, &queries, Count::Host, scale(heads), query_value);
        s.after.push(Op::Attend(op));
    }
    // Positions: a query `WINDOW` behind a row no longer sees it, but the next one.
    const WINDOW: usize = 5000;
    let pos: Vec<u32> = new.iter().flatten().map(|p| p + WINDOW as u32).collect();
    let ends = new.iter().scan(0, |end, new| {
        *end += new.len() as u32;
        Some(*end)
    });
    let seq_start: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let slots: Vec<u32> = histories.iter().map(|h| h.slot as u32).collect();
    let route = routing(s, Decide::All, Take::All, Take::All, Some(WINDOW), &seq_start, &pos, &slots);
    s.after.push(Op::Route(route));
}

/// Whether a row is taken.
type Taken = fn(usize) -> bool;

pub fn rope_append(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    // (slot, rows held, new rows), and which of the new rows query and are kept.
    let batches: [&[(usize, usize, usize)]; 6] = [
        &[(0, 0, 1)],
        &[(2, 60, 9), (0, 0, 1), (3, 127, 3)],
        &[(1, 63, 1), (0, 64, 1), (4, 0, 1), (2, 128, 1)],
        &[(3, 0, 67)],
        &[(1, 5, 17), (4, 0, 2)],
        &[(4, 510, 5)],
    ];
    let takes: [(&str, Taken, Taken); 5] = [
        ("all", |_| true, |_| true),
        ("some query, all are kept", |row| row % 3 == 1, |_| true),
        ("some of both", |row| row % 4 < 2, |row| row % 4 < 2),
        ("none", |_| false, |_| false),
        ("none query", |_| false, |_| true),
    ];
    let shapes = [(2, 1, 1), (8, 2, 3), (10, 3, 1), (64, 1, 4), (80, 2, 1), (96, 1, 3), (128, 2, 2), (256, 1, 7)];
    for (i, (head_dim, kv_heads, group)) in shapes.into_iter().enumerate() {
        let head_dim = types.head_dim(head_dim);
        let heads = Heads { head_dim, kv_heads, group };
        for (j, batch) in batches.iter().enumerate() {
            let (name, queries, kept) = takes[(i + 2 * j) % takes.len()];
            let count = [Count::Host, Count::Device(0), Count::Device(2)][(i + j) % 3];
            let norms = types.weights.get((i + j) % (types.weights.len() + 1)).copied();
            let mut s = heads.setup(types);
            let histories: Vec<_> = batch.iter().map(|&(slot, old, _)| History::of(slot, old)).collect();
            // Rows of the step in the residual stream, some of which are kept.
            let (mut pos, mut row_slot, mut kv_row) = (Vec::new(), Vec::new(), Vec::new());
            let (mut q_index, mut kv_index) = (Vec::new(), Vec::new());
            let mut new = Vec::new();
            for (&(slot, old, n), history) in batch.iter().zip(&histories) {
                let mut positions = Vec::new();
                for i in 0..n {
                    let (row, position) = (pos.len(), history.next_position() + i as u32);
                    pos.push(position);
                    row_slot.push(slot as u32);
                    if queries(row) {
                        q_index.push(row as u32);
                    }
                    if kept(row) {
                        kv_index.push(row as u32);
                        kv_row.push((old + positions.len()) as u32);
                        positions.push(position);
                    }
                }
                new.push(positions);
            }
            // In some, rows stand behind those that count: a sequence was rolled back.
            let stale = [0, 9][i % 2];
            let held: Vec<_> = batch
                .iter()
                .zip(&new)
                .map(|(&(slot, old, _), new)| History { len: old + new.len(), ..History::of(slot, old + stale) })
                .collect();
            write_history(&mut s, heads, &held, plain_values);

            let rows = pos.len();
            let (pos, row_slot) = (s.ints(&pos), s.ints(&row_slot));
            let inv_freq =
                s.tensor(1, head_dim / 2, DType::F32, |_, j| 500f32.powf(-(2.0 * j as f32) / head_dim as f32));
            let angles = s.mat(rows + 1, head_dim, DType::F32);
            s.before.push(Op::RopeAngles(RopeAngles { pos, inv_freq, out: angles }));
            let (q_rows, kv_rows) = (s.rows(&q_index, count), s.rows(&kv_index, count));
            let q = s.activations(q_rows.bound + 1, heads.q_dim());
            let [k, v] = [(); 2].map(|()| s.activations(kv_rows.bound + 1, heads.kv_dim()));
            let special = (i + j) % 4 == 3;
            for i in 0..q_index.len() {
                let nan = |col| special && (i, col) == (1, heads.q_dim() - 1);
                s.fill_row(q, i, |col| if nan(col) { f32::NAN } else { query_value(i + 77, col) });
            }
            for i in 0..kv_index.len() {
                let nan = |at, col| special && (i, col) == (at, 0);
                s.fill_row(k, i, |col| if nan(2, col) { f32::NAN } else { 0.3 + noise("new k", i, col) });
                s.fill_row(v, i, |col| if nan(4, col) { f32::INFINITY } else { 0.5 + noise("new v", i, col) });
            }
            let places = s.room(kv_rows.bound + 1);
            kv_row.iter().enumerate().for_each(|(i, &r)| s.set_int(places, i, r));
            s.scratch.push(k.rows(0..kv_index.len()));
            let [q_norm, k_norm] = ["q norm", "k norm"].map(|tag| norms.map(|dtype| s.vector(tag, head_dim, dtype)));
            show(&mut s, heads, &histories, &new);
            let op = RopeAppend {
                layer: LAYER,
                head_dim,
                angles,
                pos,
                row_slot,
                q_rows,
                kv_rows,
                kv_row: places,
                q,
                k,
                v,
                q_norm,
                k_norm: k_norm.filter(|_| j != 3),
                eps: 1e-6,
            };
            let special = if special { ", NaN and inf" } else { "" };
            let text = format!("rope_append {batch:?}, {name}, {heads:?}, norm {norms:?}, {count:?}{special}");
            cases.push(s.case(text, Op::RopeAppend(op)));
        }
    }
    cases
}

/// Routing into fresh buffers; logits and decisions are poison.
#[allow(clippy::too_many_arguments)]
fn routing(
    s: &mut Setup,
    decide: Decide,
    queries: Take,
    keys: Take,
    window: Option<usize>,
    seq_start: &[u32],
    pos: &[u32],
    slots: &[u32],
) -> Route {
    let rows = pos.len() as u32;
    // Ends of sequences and of chunks of 16 rows.
    let mut cuts: Vec<u32> = seq_start.iter().copied().chain((0..rows).step_by(16)).chain([rows]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts.retain(|&cut| cut > 0 || rows == 0);
    let out = |s: &mut Setup| s.room(rows as usize + 1);
    Route {
        layer: LAYER,
        decide,
        queries,
        keys,
        window,
        logits: s.mat(rows as usize, 1, DType::F32),
        pos: s.ints(pos),
        seq_start: s.ints(seq_start),
        slots: s.ints(slots),
        decided: s.room(slots.len()),
        active_at: s.room(cuts.len()),
        cuts: s.ints(&cuts),
        active: out(s),
        first: out(s),
        end: out(s),
        kv_row: out(s),
    }
}

/// How logits are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Drawn {
    /// They are not read.
    Poison,
    /// Off the thresholds by a margin, sequences as a whole too.
    Apart,
    /// Whole numbers, many of them equal, zeros of both signs.
    Ties,
    /// NaN, infinities and what saturates among them.
    Special,
    /// Zeros only, negative ones first.
    Zeros,
    /// The mean of a sequence is exactly zero.
    Balanced,
}

/// The logit of the i-th of n rows of a sequence.
fn logit(drawn: Drawn, seq: usize, i: usize, n: usize) -> f32 {
    let x = 3.0 * noise("logit", seq * 1000 + i, n);
    match drawn {
        Drawn::Poison => unreachable!("not written"),
        // Thresholds are 0.5 and 0.73, of the logits 0 and 0.9946.
        Drawn::Apart if [0.0, 0.9946].iter().any(|t| (x - t).abs() < 0.02) => x + 0.05,
        Drawn::Apart => x,
        Drawn::Ties => match (x.round(), i % 2) {
            (0.0, odd) => [0.0, -0.0][odd],
            (x, _) => x,
        },
        Drawn::Special => match i % 7 {
            1 => f32::NAN,
            2 => f32::NEG_INFINITY,
            4 => f32::INFINITY,
            5 => -120.0,
            6 => 120.0,
            _ => x + 4.0 * (x.signum()),
        },
        Drawn::Zeros => [-0.0, 0.0][i % 2],
        Drawn::Balanced if i == n - 1 && n % 2 == 1 => 0.0,
        Drawn::Balanced => [1.0, -1.0][i % 2] * (1.0 + (i / 2) as f32),
    }
}

pub fn route(types: Types) -> Vec<Case> {
    use Decide::{All, Sequence, Threshold, TopK};
    let decides = [
        (All, Drawn::Poison),
        (Threshold(0.5), Drawn::Apart),
        (Threshold(0.73), Drawn::Apart),
        // A logit of zero reaches 0.5.
        (Threshold(0.5), Drawn::Ties),
        (Threshold(0.5), Drawn::Special),
        (Threshold(0.0), Drawn::Special),
        (Threshold(1.5), Drawn::Special),
        (TopK(0.0), Drawn::Ties),
        (TopK(0.3), Drawn::Ties),
        (TopK(0.1), Drawn::Apart),
        (TopK(0.3), Drawn::Zeros),
        (TopK(0.5), Drawn::Special),
        (TopK(0.9), Drawn::Special),
        (TopK(1.0), Drawn::Special),
        (Sequence(0.5), Drawn::Apart),
        (Sequence(0.5), Drawn::Balanced),
        (Sequence(0.5), Drawn::Special),
    ];
    // (slot, rows held, new rows)
    let batches: [&[(usize, usize, usize)]; 6] = [
        &[],
        &[(3, 0, 1)],
        &[(0, 0, 67)],
        &[(2, 63, 1), (0, 64, 1), (1, 0, 1), (3, 130, 1), (4, 1, 1)],
        &[(1, 0, 3), (0, 65, 1), (3, 10, 40), (2, 0, 64), (4, 200, 20)],
        &[(4, 7, 10), (2, 0, 20)],
    ];
    let heads = Heads { head_dim: 2, kv_heads: 1, group: 1 }.on(types);
    let windows = [None, Some(1), Some(7), Some(64), Some(100_000)];
    let mut cases = Vec::new();
    for (d, (decide, drawn)) in decides.into_iter().enumerate() {
        for (b, batch) in batches.iter().enumerate() {
            for (t, (queries, keys)) in [
                (Take::All, Take::All),
                (Take::Active, Take::All),
                (Take::Active, Take::Active),
                (Take::All, Take::Active),
            ]
            .into_iter()
            .enumerate()
            {
                let window = windows[(d + b + t) % 5];
                let mut s = heads.setup(types);
                let histories: Vec<_> = batch.iter().map(|&(slot, old, _)| History::of(slot, old)).collect();
                write_history(&mut s, heads, &histories, plain_values);
                let (mut pos, mut seq_start, mut slots, mut logits) = (vec![], vec![0], vec![], vec![]);
                for (seq, (&(slot, _, n), history)) in batch.iter().zip(&histories).enumerate() {
                    for i in 0..n {
                        pos.push(history.next_position() + i as u32);
                        if drawn != Drawn::Poison {
                            // Sequences as a whole are off the threshold by one, too.
                            let shift = match decide {
                                Sequence(_) if drawn == Drawn::Apart => [4.0, -4.0][(seq + b) % 2],
                                // Leaves a −0 as it is, which 0 would not.
                                _ => -0.0,
                            };
                            logits.push(logit(drawn, seq, i, n) + shift);
                        }
                    }
                    seq_start.push(pos.len() as u32);
                    slots.push(slot as u32);
                }
                let op = routing(&mut s, decide, queries, keys, window, &seq_start, &pos, &slots);
                logits.iter().enumerate().for_each(|(row, &x)| s.set(op.logits, row, 0, x));
                if let Sequence(_) = decide {
                    (0..slots.len()).for_each(|seq| {
                        let state = [UNDECIDED, UNDECIDED, 0, 1, UNDECIDED][(seq + t) % 5];
                        s.set_int(op.decided, seq, state);
                    });
                }
                // How many rows are held now.
                let next: Vec<u32> = (0..slots.len() as u32).collect();
                let starts: Vec<u32> = (0..=slots.len() as u32).collect();
                let shown = routing(&mut s, All, Take::All, Take::All, None, &starts, &next, &slots);
                s.after.push(Op::Route(shown));
                let text = format!(
                    "route {decide:?} of {drawn:?}, {batch:?}, queries {queries:?}, keys {keys:?}, window {window:?}"
                );
                cases.push(s.case(text, Op::Route(op)));
            }
        }
    }
    cases
}
