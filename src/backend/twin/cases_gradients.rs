//! The cases of the backward ops. All activations are f32; buffers are a row longer than what is used of them.

use super::Types;
use super::cases_kv::write_history;
use super::cases_kv::{Heads, History, LAYER, Query, Values, attention, causal, plain_values, query_value, scale};
use super::setup::{Case, Count, Setup, activation, noise, spread};
use crate::backend::*;

pub fn cases(kind: GradientKind, types: Types) -> Vec<Case> {
    match kind {
        GradientKind::CopyRows => copy(types),
        GradientKind::Loss => loss(types),
        GradientKind::BackProject => back_project(types),
        GradientKind::NormBackward => norm_backward(types),
        GradientKind::SwiGluKept => swiglu_kept(types),
        GradientKind::SwiGluBackward => swiglu_backward(types),
        GradientKind::AttendBackward => attend_backward(types),
        GradientKind::RopeBackward => rope_backward(types),
        GradientKind::AttendApart => attend_apart(types),
        GradientKind::RowDots => row_dots(types),
        GradientKind::GateBackward => gate_backward(types),
    }
}

/// `[rows, cols]`, and a row of poison behind.
fn filled(s: &mut Setup, tag: &str, rows: usize, cols: usize) -> Mat {
    let mat = s.mat(rows + 1, cols, DType::F32);
    (0..rows).for_each(|row| s.fill_row(mat, row, |col| 0.2 + noise(tag, row, col)));
    mat.rows(0..rows)
}

/// The same with poison between the rows that are listed.
fn scattered(s: &mut Setup, tag: &str, list: &[u32], cols: usize) -> Mat {
    let mat = s.mat(list.last().map_or(1, |last| *last as usize + 2), cols, DType::F32);
    list.iter().for_each(|&row| s.fill_row(mat, row as usize, |col| 0.2 + noise(tag, row as usize, col)));
    mat
}

fn empty(s: &mut Setup, rows: usize, cols: usize) -> Mat {
    s.mat(rows + 1, cols, DType::F32).rows(0..rows)
}

fn copy(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols) in [(0, 5), (1, 1), (3, 17), (67, 40)] {
        for clears in [false, true] {
            let mut s = Setup::new(types);
            let src = filled(&mut s, "copied", rows, cols);
            let op = CopyRows { src: (!clears).then_some(src), out: empty(&mut s, rows, cols) };
            cases.push(s.case(format!("copy {rows} of {cols}, zeros {clears}"), Gradient::CopyRows(op)));
        }
    }
    cases
}

fn loss(types: Types) -> Vec<Case> {
    const INF: f32 = f32::INFINITY;
    let patterns: [(&str, super::cases::Pattern); 6] = [
        ("plain", |_, _, x| 1.0 + 4.0 * x),
        ("wide", |_, _, x| 80.0 * x),
        ("equal", |_, _, _| -3.25),
        ("masked", |row, col, x| if col > 0 && (row + col) % 3 == 1 { -INF } else { x }),
        ("huge", |row, col, x| if col == row { 1e30 } else { x }),
        ("special", |row, col, x| match (row % 4, col == row % 3) {
            (1, true) => f32::NAN,
            (2, true) => INF,
            (3, _) => -INF,
            _ => x,
        }),
    ];
    let mut cases = Vec::new();
    for (i, vocab) in [1, 2, 31, 100, 513, 4099].into_iter().enumerate() {
        for (j, (name, value)) in patterns.into_iter().enumerate() {
            let rows = [1, 2, 0, 7, 3][(i + j) % 5];
            let tokens = (i + j / 2) % 2 == 0;
            let mut s = Setup::new(types);
            let mut logits = |tag: &str| {
                let mat = s.mat(rows + 1, vocab, DType::F32).rows(0..rows);
                (0..rows).for_each(|row| s.fill_row(mat, row, |col| value(row, col, noise(tag, row, col))));
                mat
            };
            let (logits, other) = (logits("logits"), logits("other"));
            let against = match tokens {
                true => Against::Tokens(s.ints(&(0..rows).map(|row| (row * 7 % vocab) as u32).collect::<Vec<_>>())),
                false => Against::Distribution(other),
            };
            let op = Loss { logits, against, scale: 0.37, losses: s.mat(rows + 1, 1, DType::F32) };
            let text = format!("loss of {rows} rows of {vocab}, {name}, tokens {tokens}");
            cases.push(s.case(text, Gradient::Loss(op)));
        }
    }
    cases
}

fn back_project(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [(1, 1), (3, 47), (56, 49), (97, 6), (513, 33), (300, 145)];
    for (i, rows) in [0, 1, 2, 7, 33, 70].into_iter().enumerate() {
        for (j, (from, to)) in shapes.into_iter().enumerate() {
            let (from, to) = (types.width(from), types.width(to));
            let (gathers, scatters, add) = ((i + j) % 2 == 0, (i + j / 2) % 2 == 0, (i / 2 + j) % 2 == 0);
            let dtype = types.weights[(i + j) % types.weights.len()];
            let mut s = Setup::new(types);
            let (index, all): (Vec<u32>, Vec<u32>) = (spread(rows), (0..rows as u32).collect());
            let weight = s.weight("weight", from, to, dtype);
            let d_out = scattered(&mut s, "d_out", if gathers { &index } else { &all }, from);
            let d_in = scattered(&mut s, "d_in", if scatters { &index } else { &all }, to);
            let [from, to] = [gathers, scatters].map(|listed| listed.then(|| s.ints(&index)));
            let text = format!(
                "back_project {rows} rows x [{}, {}] {dtype}, gathers {gathers}, scatters {scatters}, adds {add}",
                weight.rows, weight.cols
            );
            let op = BackProject { rows, d_out, from, weight, d_in, to, add };
            cases.push(s.case(text, Gradient::BackProject(op)));
        }
    }
    cases
}

fn norm_backward(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, width) in [1, 15, 56, 576, 2049, 8200].into_iter().enumerate() {
        let width = types.width(width);
        for (j, index) in [vec![], vec![66], (0..33).collect(), spread(7)].into_iter().enumerate() {
            let (gated, dtype) = ((i + j) % 2 == 0, types.weights[(i + j) % types.weights.len()]);
            let mut s = Setup::new(types);
            let [x, d_x] = ["x", "d_x"].map(|tag| scattered(&mut s, tag, &index, width));
            let d_h = filled(&mut s, "d_h", index.len(), width);
            let (weight, router) = (s.vector("norm", width, dtype), s.weight("router", 1, width, DType::F32));
            let logits = scattered(&mut s, "d_logits", &index, 1);
            let rows = s.ints(&index);
            let gate = gated.then_some((router, logits));
            let op = NormBackward { x, rows, weight, eps: 1e-5, d_h, gate, d_x };
            let text = format!("norm_backward of {} rows of {width}, {dtype}, gate {gated}", index.len());
            cases.push(s.case(text, Gradient::NormBackward(op)));
        }
    }
    cases
}

/// The projections of a SwiGLU for some rows; the second bias where there is a first one and `both`.
fn gate_up(s: &mut Setup, rows: usize, n: usize, hidden: usize, dtype: DType, biased: bool, both: bool) -> GateUp {
    let h = s.mat(rows + 1, hidden, DType::F32);
    (0..rows).for_each(|row| s.fill_row(h, row, |col| activation(row, col)));
    let [gate, up] = ["gate", "up"].map(|tag| s.weight(tag, n, hidden, dtype));
    let [gate_bias, up_bias] =
        [("gate bias", biased), ("up bias", biased && both)].map(|(tag, is)| is.then(|| s.vector(tag, n, dtype)));
    GateUp { h, gate, up, gate_bias, up_bias }
}

const SWIGLU_ROWS: [usize; 4] = [0, 1, 7, 33];
const SWIGLU_SHAPES: [(usize, usize); 4] = [(1, 1), (17, 31), (64, 97), (145, 300)];

fn swiglu_kept(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, rows) in SWIGLU_ROWS.into_iter().enumerate() {
        for (j, (hidden, n)) in SWIGLU_SHAPES.into_iter().enumerate() {
            let (hidden, n, biased) = (types.width(hidden), types.width(n), (i + j) % 2 == 0);
            let dtype = types.weights[(i + j) % types.weights.len()];
            let mut s = Setup::new(types);
            let of = gate_up(&mut s, rows, n, hidden, dtype, biased, i % 2 == 0);
            let [gate, up, out] = [(); 3].map(|()| empty(&mut s, rows, n));
            let text = format!("swiglu_kept {rows} rows x [{n}, {hidden}] {dtype}, biases {biased}");
            cases.push(s.case(text, Gradient::SwiGluKept(SwiGluKept { of, gate, up, out })));
        }
    }
    cases
}

fn swiglu_backward(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, rows) in SWIGLU_ROWS.into_iter().enumerate() {
        for (j, (hidden, n)) in SWIGLU_SHAPES.into_iter().enumerate() {
            let (hidden, n) = (types.width(hidden), types.width(n));
            let (biased, dotted, kept) = ((i + j) % 2 == 0, (i + j / 2) % 2 == 1, j == 3);
            let dtype = types.weights[(i + j) % types.weights.len()];
            let mut s = Setup::new(types);
            let index = spread(rows);
            let d_act = filled(&mut s, "d_act", rows, n);
            let again = (!kept).then(|| gate_up(&mut s, rows, n, hidden, dtype, biased, i % 2 == 0));
            let [d_gate, d_up] = ["g", "u"].map(|tag| match kept {
                true => filled(&mut s, tag, rows, n),
                false => empty(&mut s, rows, n),
            });
            let out = scattered(&mut s, "dots", &index, 1);
            let dots = dotted.then(|| (s.ints(&index), out));
            let op = SwiGluBackward { again, d_act, d_gate, d_up, dots };
            let text = match kept {
                true => format!("swiglu_backward {rows} rows of {n}, kept, dots {dotted}"),
                false => {
                    format!("swiglu_backward {rows} rows x [{n}, {hidden}] {dtype}, biases {biased}, dots {dotted}")
                }
            };
            cases.push(s.case(text, Gradient::SwiGluBackward(op)));
        }
    }
    cases
}

fn rope_backward(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, head_dim) in [2, 10, 64, 80, 128, 256].into_iter().enumerate() {
        let head_dim = types.head_dim(head_dim);
        for (j, index) in [vec![], vec![3], spread(9), (0..17).collect()].into_iter().enumerate() {
            let (heads, normed) = (1 + (i + j) % 3, (i + j) % 2 == 0);
            let dtype = types.weights[(i + j) % types.weights.len()];
            let mut s = Setup::new(types);
            let angles = scattered(&mut s, "angles", &index, head_dim);
            let rows = s.ints(&index);
            let [d, src] = ["d", "src"].map(|tag| filled(&mut s, tag, index.len(), heads * head_dim));
            let weight = s.vector("head norm", head_dim, dtype);
            let norm = normed.then_some(HeadNorm { weight, eps: 1e-6, src });
            let op = RopeBackward { head_dim, angles, rows, d, norm };
            let text = format!("rope_backward {} rows of {heads} x {head_dim}, {dtype}, norm {normed}", index.len());
            cases.push(s.case(text, Gradient::RopeBackward(op)));
        }
    }
    cases
}

fn row_dots(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, (n, m)) in [(0, 5), (1, 1), (17, 40), (576, 0), (2049, 33)].into_iter().enumerate() {
        let (n, m) = (types.width(n), types.width(m));
        for (j, index) in [vec![], vec![5], spread(9), (0..33).collect()].into_iter().enumerate() {
            let dtype = types.weights[(i + j) % types.weights.len()];
            let mut s = Setup::new(types);
            let [a, b] = ["a", "b"].map(|tag| filled(&mut s, tag, index.len(), n));
            let c = scattered(&mut s, "c", &index, m);
            let bias = (m > 0 && (n == 0 || j % 2 == 0)).then(|| (c, s.vector("bias", m, dtype)));
            let out = scattered(&mut s, "dots", &index, 1);
            let rows = s.ints(&index);
            let text = format!("row_dots of {} rows of {n}, bias {:?}", index.len(), bias.map(|_| m));
            cases.push(s.case(text, Gradient::RowDots(RowDots { a, b, rows, bias, out })));
        }
    }
    cases
}

fn gate_backward(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    let batches: [&[usize]; 6] = [&[], &[1], &[31], &[3, 1, 29], &[70, 5], &[300]];
    for (i, lens) in batches.into_iter().enumerate() {
        for by_sequence in [false, true] {
            let (rows, width) = (lens.iter().sum(), types.width([1, 40, 576][i % 3]));
            let mut s = Setup::new(types);
            let ends = lens.iter().scan(0, |end, n| {
                *end += *n as u32;
                Some(*end)
            });
            let starts: Vec<u32> = std::iter::once(0).chain(ends).collect();
            let sequences = by_sequence.then(|| s.ints(&starts));
            let [logits, d_mask] = ["logits", "d_mask"].map(|tag| filled(&mut s, tag, rows, 1));
            let h = s.mat(rows + 1, width, DType::F32);
            (0..rows).for_each(|row| s.fill_row(h, row, |col| activation(row, col)));
            let d_router = filled(&mut s, "d_router", 1, width);
            let op = GateBackward { sequences, logits, d_mask, penalty: 0.25, h, d_router };
            let text = format!("gate_backward {lens:?} of {width}, by sequence {by_sequence}");
            cases.push(s.case(text, Gradient::GateBackward(op)));
        }
    }
    cases
}

/// K/V of some slots, and who queries them: names, heads, (slot, rows), queries.
type Scene = (&'static str, Heads, Vec<(usize, usize)>, Vec<Query>);

/// Of one head, of several that share K/V, and of many; odd, usual and large.
fn scenes() -> Vec<Scene> {
    let of = |head_dim, kv_heads, group| Heads { head_dim, kv_heads, group };
    let window = |(slot, range): Query, width: usize| (slot, range.end.saturating_sub(width)..range.end);
    let uneven = [(3, 3), (0, 17), (4, 40), (1, 1)];
    let mut scenes: Vec<Scene> = vec![
        ("nobody", of(16, 1, 1), vec![(2, 5)], vec![]),
        ("nothing", of(16, 1, 1), vec![], vec![]),
        ("one row", of(2, 1, 1), vec![(3, 1)], vec![(3, 0..1)]),
        ("one of many", of(64, 2, 2), vec![(3, 70)], vec![(3, 0..70)]),
        (
            "uneven sequences",
            of(10, 3, 1),
            uneven.to_vec(),
            uneven.iter().flat_map(|&(slot, n)| causal(slot, 0, n)).collect(),
        ),
        ("windows", of(64, 1, 3), vec![(0, 67)], causal(0, 0, 67).map(|q| window(q, 7)).collect()),
        // What keys=all leaves: rows between the active queries only hold K/V.
        ("jumps", of(64, 1, 2), vec![(1, 135), (4, 2)], [1, 2, 40, 41, 64, 65, 66, 130].map(|end| (1, 0..end)).into()),
        ("many heads", of(80, 2, 7), vec![(0, 9), (2, 2)], causal(0, 0, 9).chain(causal(2, 0, 2)).collect()),
        ("large heads", of(256, 1, 2), vec![(1, 19)], causal(1, 0, 19).collect()),
        ("large heads, long", of(200, 1, 1), vec![(1, 67)], causal(1, 40, 27).collect()),
    ];
    for (i, n) in [31, 32, 33, 64, 65].into_iter().enumerate() {
        let heads = [of(128, 1, 1), of(96, 2, 1), of(64, 1, 1)][i % 3];
        scenes.push(("causal", heads, vec![(2, n)], causal(2, 0, n).collect()));
    }
    scenes
}

/// Rows beyond what a scene's queries see are no numbers.
fn with_poison(slot: usize, row: usize, col: usize) -> (f32, f32) {
    if row >= 130 { (f32::NAN, f32::INFINITY) } else { plain_values(slot, row, col) }
}

fn attend_backward(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut case = |(name, heads, lens, queries): Scene, values: Values, factor: f32| {
        let heads = heads.on(types);
        let mut s = heads.setup(types);
        let histories: Vec<_> = lens.iter().map(|&(slot, rows)| History::of(slot, rows)).collect();
        write_history(&mut s, heads, &histories, values);
        let attend =
            attention(&mut s, heads, &queries, Count::Host, scale(heads), |i, col| factor * query_value(i, col));
        s.before.push(Op::Attend(attend));
        let rows = |slot: usize| lens.iter().find(|l| l.0 == slot).map_or(0, |l| l.1 as u32);
        let ends = (0..5).scan(0, |end, slot| {
            *end += rows(slot);
            Some(*end)
        });
        let starts: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let (n, kv_rows) = (queries.len(), starts[5] as usize);
        let kv_start = s.ints(&starts);
        let d_out = filled(&mut s, "d_out", n, heads.q_dim());
        let d_q = empty(&mut s, n, heads.q_dim());
        let [d_k, d_v] = [(); 2].map(|()| empty(&mut s, kv_rows, heads.kv_dim()));
        let Attend { row_slot, first, end, q, out, .. } = attend;
        let op = AttendBackward {
            layer: LAYER,
            head_dim: heads.head_dim,
            kv_heads: heads.kv_heads,
            scale: attend.scale,
            rows: attend.rows.index,
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
        };
        cases.push(s.case(format!("attend_backward, {name}, {heads:?}, {n} queries"), Gradient::AttendBackward(op)));
    };
    for (i, scene) in scenes().into_iter().enumerate() {
        let values = if scene.0 == "jumps" { with_poison } else { plain_values };
        // Weights that are nearly equal, and some that are nearly one.
        case(scene, values, [1.0, 2.5][i % 2]);
    }
    cases
}

fn attend_apart(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, heads, lens, queries) in scenes() {
        let heads = heads.on(types);
        let mut s = heads.setup(types);
        let histories: Vec<_> = lens.iter().map(|&(slot, rows)| History::of(slot, rows)).collect();
        write_history(&mut s, heads, &histories, if name == "jumps" { with_poison } else { plain_values });
        // They do not see the last of the rows; the first one sees nothing else.
        let queries: Vec<Query> = queries.into_iter().map(|(slot, r)| (slot, r.start..r.end - 1)).collect();
        let Attend { rows, row_slot, first, end, q, out, scale, .. } =
            attention(&mut s, heads, &queries, Count::Host, scale(heads), query_value);
        let [k, v] = ["own k", "own v"].map(|tag| filled(&mut s, tag, queries.len(), heads.kv_dim()));
        let (head_dim, kv_heads, rows) = (heads.head_dim, heads.kv_heads, rows.index);
        let op = AttendApart { layer: LAYER, head_dim, kv_heads, scale, rows, row_slot, first, end, q, k, v, out };
        cases.push(s.case(format!("attend_apart, {name}, {heads:?}, {}", queries.len()), Gradient::AttendApart(op)));
    }
    cases
}
