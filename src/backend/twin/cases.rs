//! The cases of the ops that have nothing to do with K/V, and the list of all.

use super::Types;
use super::cases_gradients;
use super::cases_kv;
use super::setup::{Case, Count, Setup, activation, noise, spread};
use crate::backend::*;

/// The cases of an op. A new op does not compile without some.
pub fn cases(kind: AnyKind, types: Types) -> Vec<Case> {
    let kind = match kind {
        AnyKind::Forward(op) => op,
        AnyKind::Backward(op) => return cases_gradients::cases(op, types),
    };
    match kind {
        OpKind::Embed => embed(types),
        OpKind::RopeAngles => rope_angles(types),
        OpKind::NormGate => norm_gate(types),
        OpKind::Route => cases_kv::route(types),
        OpKind::Qkv => linear_variants(types).map(|v| qkv(types, v)).collect(),
        OpKind::RopeAppend => cases_kv::rope_append(types),
        OpKind::Attend => cases_kv::attend(types),
        OpKind::ProjectAdd => linear_variants(types).map(|v| project_add(types, v)).collect(),
        OpKind::SwiGlu => linear_variants(types).map(|v| swiglu(types, v)).collect(),
        OpKind::Logits => linear_variants(types).map(|v| logits(types, v)).collect(),
        OpKind::LogProbs => logprobs(types),
        OpKind::Sample => sample(types).chain(sample_of_product(types)).collect(),
    }
}

fn embed(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in types.weights {
        for (rows, vocab, hidden) in
            [(0, 3, 4), (1, 1, 1), (2, 5, 15), (7, 97, 17), (8, 11, 56), (9, 11, 576), (67, 31, 16), (64, 3, 2)]
        {
            let hidden = types.width(hidden);
            let mut s = Setup::new(types);
            let table = s.weight("table", vocab, hidden, dtype);
            // The first and the last entry, and repetitions.
            let ids: Vec<u32> = (0..rows).map(|i| [0, vocab - 1, i % vocab, i * 7 % vocab][i % 4] as u32).collect();
            let ids = s.ints(&ids);
            let out = s.mat(rows + 2, hidden, DType::F32);
            cases.push(
                s.case(format!("embed {rows} of [{vocab}, {hidden}] {dtype}"), Op::Embed(Embed { table, ids, out })),
            );
        }
    }
    // Tables that the backend draws itself: more numbers than a launch has threads, and few.
    let noise = Noise { seed: 0x0123_4567_89ab_cdef, mean: 0.25, scale: 3.0 };
    for &dtype in types.weights.iter().filter(|&&dtype| types.held.is_none_or(|held| dtype == held)) {
        for (rows, hidden) in [(2, 8), (5, 24), (300, 64)] {
            let mut s = Setup::new(types);
            let table = s.random(rows, hidden, dtype, noise);
            let ids = s.ints(&(0..rows as u32).collect::<Vec<_>>());
            let out = s.mat(rows, hidden, DType::F32);
            cases.push(
                s.case(format!("embed a random [{rows}, {hidden}] {dtype}"), Op::Embed(Embed { table, ids, out })),
            );
        }
    }
    cases
}

fn rope_angles(types: Types) -> Vec<Case> {
    let mut cases = Vec::new();
    for head_dim in [2, 8, 10, 64, 80, 96, 128, 256] {
        for rows in [0, 1, 7, 8, 9, 65] {
            let mut s = Setup::new(types);
            let half = head_dim / 2;
            let inv_freq = s.tensor(1, half, DType::F32, |_, j| 10000f32.powf(-(j as f32) / half as f32));
            // From 0 to beyond what f32 counts in ones.
            let pos: Vec<u32> = (0..rows).map(|i| [i, 4095 + i, 131_071, (1 << 24) + 1][i % 4] as u32).collect();
            let pos = s.ints(&pos);
            let out = s.mat(rows + 1, head_dim, DType::F32);
            let op = Op::RopeAngles(RopeAngles { pos, inv_freq, out });
            cases.push(s.case(format!("angles of {rows} rows, head of {head_dim}"), op));
        }
    }
    cases
}

/// What a row of the residual stream looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rows {
    Plain,
    /// Times 1e15, and 2e-3, where eps counts.
    Large,
    Small,
    /// Some are zero, some hold a NaN or an infinity.
    Special,
}

fn norm_gate(types: Types) -> Vec<Case> {
    use Count::{Device, Host};
    let mut cases = Vec::new();
    let sets: [(&str, Vec<u32>, Count); 9] = [
        ("none", vec![], Host),
        ("none on the device", vec![], Device(4)),
        ("one", vec![66], Host),
        ("the first", vec![0], Device(0)),
        ("all", (0..67).collect(), Host),
        ("all on the device", (0..67).collect(), Device(0)),
        ("some", spread(8), Host),
        ("some more", spread(17), Device(3)),
        ("a few", spread(7), Device(60)),
    ];
    let styles = [Rows::Plain, Rows::Special, Rows::Large, Rows::Small];
    for (i, width) in [1, 2, 15, 16, 17, 56, 100, 576, 2049, 8200].into_iter().enumerate() {
        let width = types.width(width);
        for (j, (name, index, count)) in sets.iter().enumerate() {
            for (gated, kept) in [(false, true), (true, true), (true, false)] {
                let dtype = types.weights[(i + j) % types.weights.len()];
                let style = styles[(i * 2 + j + usize::from(gated)) % 4];
                // Without it a row of zeros is 0/0; with it, small rows come out smaller.
                let eps = if i % 3 == 2 && style != Rows::Small { 0.0 } else { 1e-5 };
                let mut s = Setup::new(types);
                let x = s.mat(67, width, DType::F32);
                for &row in index {
                    let special = if style == Rows::Special { row % 5 } else { 0 };
                    s.fill_row(x, row as usize, |col| match (special, style) {
                        (1, _) => 0.0,
                        (2, _) if col == width - 1 => f32::NAN,
                        (3, _) if col == width / 2 => f32::NEG_INFINITY,
                        (_, Rows::Large) => activation(row as usize, col) * 1e15,
                        (_, Rows::Small) => activation(row as usize, col) * 2e-3,
                        _ => activation(row as usize, col),
                    });
                }
                let rows = s.rows(index, *count);
                let weight = s.vector("norm", width, dtype);
                let out = s.activations(rows.bound + 1, width);
                let out = kept.then_some(out);
                let gate = gated.then(|| {
                    let router = s.weight("router", 1, width, DType::F32);
                    Gate { router, logits: s.mat(67, 1, DType::F32) }
                });
                let op = Op::NormGate(NormGate { x, rows, weight, eps, out, gate });
                let text =
                    format!("norm of {name}, width {width}, {style:?}, {dtype}, eps {eps}, gate {gated}, rows {kept}");
                cases.push(s.case(text, op));
            }
        }
    }
    cases
}

/// A case of an op that multiplies with a weight.
#[derive(Debug, Clone, Copy)]
struct Linear {
    rows: usize,
    count: Count,
    k: usize,
    n: usize,
    weights: DType,
    bias: bool,
    /// Source row 1 of each 3 holds a NaN, row 2 an infinity.
    special: bool,
    /// Factor of the source.
    scale: f32,
}

impl Linear {
    fn text(&self, op: &str) -> String {
        let Linear { rows, count, k, n, weights, bias, special, scale } = self;
        let special = if *special { ", NaN and inf" } else { "" };
        format!("{op} {rows} rows ({count:?}) x [{n}, {k}] {weights}, bias {bias}, scale {scale}{special}")
    }

    fn fill(&self, s: &mut Setup, mat: Mat, ids: impl IntoIterator<Item = usize>) {
        for (i, id) in ids.into_iter().enumerate() {
            s.fill_row(mat, i, |col| match i % 3 {
                1 if self.special && col == self.k - 1 => f32::NAN,
                2 if self.special && col == self.k / 2 => f32::INFINITY,
                _ => activation(id, col) * self.scale,
            });
        }
    }

    fn bias(&self, s: &mut Setup, tag: &str) -> Option<Weight> {
        self.bias.then(|| s.vector(tag, self.n, self.weights))
    }
}

/// Every number of rows with every shape; types, biases and counts take turns.
fn linear_variants(types: Types) -> impl Iterator<Item = Linear> {
    const ROWS: [usize; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 17, 33, 64, 70];
    // Inner widths around the vector of 16, outputs around vectors of 16 and blocks of 48; the largest is worth a fork for a single
    // row.
    const SHAPES: [(usize, usize); 13] = [
        (1, 1),
        (2, 3),
        (15, 17),
        (16, 48),
        (17, 47),
        (56, 49),
        (64, 97),
        (97, 6),
        (33, 5),
        (576, 145),
        (31, 531),
        (5, 2003),
        (577, 290),
    ];
    const COUNTS: [Count; 3] = [Count::Host, Count::Device(0), Count::Device(3)];
    let grid = (0..ROWS.len()).flat_map(|i| (0..SHAPES.len()).map(move |j| (i, j)));
    let grid = grid.map(move |(i, j)| Linear {
        rows: ROWS[i],
        count: COUNTS[(2 * i + j) % 3],
        k: types.width(SHAPES[j].0),
        n: SHAPES[j].1,
        weights: types.weights[(i + j) % types.weights.len()],
        // cuBLASLt 13.1 rounds some products of narrow rows to 16 bits before it adds them to what is there: with k 8 and 56
        // up to 4e-3 off in bf16 on an H100.
        bias: (i + j / 3) % 2 == 0 && (types.activations == DType::F32 || ROWS[i] <= 64 || SHAPES[j].0 >= 64),
        special: false,
        scale: 1.0,
    });
    // Large values with a single product: nothing cancels.
    let more = [(3, 33, true, 1.0), (7, 33, true, 1.0), (64, 33, true, 1.0), (3, 1, false, 80.0), (17, 1, false, 80.0)];
    let more = more.into_iter().enumerate().map(move |(i, (rows, k, special, scale))| Linear {
        rows,
        count: COUNTS[i % 3],
        k,
        n: 19,
        weights: types.weights[i % types.weights.len()],
        bias: i % 2 == 0,
        special,
        scale,
    });
    // Products that are not sums there are only where widths of 1 are.
    grid.chain(
        more.filter(move |v| v.k == types.width(v.k) || v.scale == 1.0)
            .map(move |v| Linear { k: types.width(v.k), ..v }),
    )
}

fn qkv(types: Types, v: Linear) -> Case {
    let mut s = Setup::new(types);
    let base = 5;
    // K/V of the given number of rows, Q of every second one; and the other way round.
    let (all, some) = (spread(v.rows), spread(v.rows).into_iter().step_by(2).collect::<Vec<_>>());
    let (q_index, kv_index) = if v.k.is_multiple_of(2) { (&all, &some) } else { (&some, &all) };
    let [q_index, kv_index] = [q_index, kv_index].map(|index| index.iter().map(|i| i + base).collect::<Vec<_>>());
    let h = s.activations(3 * v.rows / 2 + 8, v.k);
    for (i, &row) in all.iter().enumerate() {
        s.fill_row(h, row as usize, |col| match i % 3 {
            1 if v.special && col == v.k - 1 => f32::NAN,
            2 if v.special && col == v.k / 2 => f32::INFINITY,
            _ => activation(row as usize, col) * v.scale,
        });
    }
    let q_rows = s.rows(&q_index, v.count);
    let kv_rows = s.rows(&kv_index, v.count);
    let v = Linear { n: types.width(v.n), ..v };
    let kv_dim = types.width(v.n.div_ceil(3));
    let dims = [v.n, kv_dim, kv_dim];
    let weights = [("q", dims[0]), ("k", dims[1]), ("v", dims[2])].map(|(tag, n)| s.weight(tag, n, v.k, v.weights));
    let biases = std::array::from_fn(|i| {
        (v.bias && (i != 1 || v.rows.is_multiple_of(2))).then(|| s.vector(["bq", "bk", "bv"][i], dims[i], v.weights))
    });
    let q = s.activations(q_rows.bound + 1, dims[0]);
    let [k, v_out] = [(); 2].map(|()| s.activations(kv_rows.bound + 1, kv_dim));
    let op = Qkv { h, base: base as usize, q_rows, kv_rows, weights, biases, q, k, v: v_out };
    s.case(v.text("qkv"), Op::Qkv(op))
}

fn project_add(types: Types, v: Linear) -> Case {
    let v = Linear { n: types.width(v.n), ..v };
    let mut s = Setup::new(types);
    let rows = s.rows(&spread(v.rows), v.count);
    let src = s.activations(rows.bound + 1, v.k);
    v.fill(&mut s, src, 0..v.rows);
    let x = s.mat(rows.bound * 3 / 2 + 4, v.n, DType::F32);
    for row in spread(v.rows) {
        s.fill_row(x, row as usize, |col| noise("residual", row as usize, col) * 3.0 + 1.0);
    }
    let weight = s.weight("weight", v.n, v.k, v.weights);
    let bias = v.bias(&mut s, "bias");
    s.case(v.text("project_add"), Op::ProjectAdd(ProjectAdd { src, weight, bias, rows, x }))
}

fn swiglu(types: Types, v: Linear) -> Case {
    // What it makes is summed over next.
    let v = Linear { n: types.width(v.n), ..v };
    let mut s = Setup::new(types);
    let mut rows = s.rows(&spread(v.rows), v.count);
    // The index is not read: poison.
    rows.index = s.room(rows.bound);
    let h = s.activations(rows.bound + 1, v.k);
    v.fill(&mut s, h, 0..v.rows);
    let [gate, up] = ["gate", "up"].map(|tag| s.weight(tag, v.n, v.k, v.weights));
    let gate_bias = v.bias(&mut s, "gate bias");
    let up_bias = v.bias(&mut s, "up bias").filter(|_| v.rows % 2 == 1);
    let out = s.activations(rows.bound + 1, v.n);
    s.case(v.text("swiglu"), Op::SwiGlu(SwiGlu { h, rows, gate, up, gate_bias, up_bias, out }))
}

fn logits(types: Types, v: Linear) -> Case {
    let mut s = Setup::new(types);
    let h = s.activations(v.rows + 2, v.k);
    v.fill(&mut s, h, 0..v.rows);
    let weight = s.weight("head", v.n, v.k, v.weights);
    let out = s.mat(v.rows + 1, v.n, DType::F32).rows(0..v.rows);
    s.case(v.text("logits"), Op::Logits(Logits { h, weight, out }))
}

/// A logit by row and column, of a random number.
pub type Pattern = fn(usize, usize, f32) -> f32;

fn logprobs(types: Types) -> Vec<Case> {
    const INF: f32 = f32::INFINITY;
    let mut cases = Vec::new();
    let patterns: [(&str, Pattern); 9] = [
        ("plain", |_, _, x| 1.0 + 4.0 * x),
        ("wide", |_, _, x| 80.0 * x),
        ("two sides", |_, col, _| if col % 2 == 0 { 80.0 } else { -80.0 }),
        ("equal", |_, _, _| -3.25),
        ("masked", |row, col, x| if (row + col) % 3 == 1 { -INF } else { x }),
        ("one left", |row, col, _| if col == row { 2.0 } else { -INF }),
        ("huge", |row, col, x| if col == row { 1e30 } else { x }),
        ("nothing", |row, _, x| if row % 2 == 0 { -INF } else { x }),
        ("special", |row, col, x| match (row % 4, col == row % 3) {
            (1, true) => f32::NAN,
            (2, true) => INF,
            _ => x,
        }),
    ];
    for (i, vocab) in [1, 2, 15, 16, 17, 100, 1009, 4099].into_iter().enumerate() {
        for (j, (name, value)) in patterns.iter().enumerate() {
            let rows = [0, 1, 2, 7, 64, 3][(i + j) % 6];
            let mut s = Setup::new(types);
            let logits = s.mat(rows + 1, vocab, DType::F32);
            for row in 0..rows {
                s.fill_row(logits, row, |col| value(row, col, noise("logits", row, col)));
            }
            let targets: Vec<u32> = (0..rows).map(|row| (row * 7 % vocab) as u32).collect();
            let targets = s.ints(&targets);
            let out = s.mat(rows + 3, 1, DType::F32);
            let op = Op::LogProbs(LogProbs { logits, targets, out });
            cases.push(s.case(format!("logprobs of {rows} rows of {vocab}, {name}"), op));
        }
    }
    cases
}

/// Ways to draw; the random bits are added.
fn draws() -> Vec<Option<Draw>> {
    let plain = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };
    let drawn = [
        plain,
        Draw { temperature: 0.0, top_k: 3, ..plain },
        Draw { temperature: 0.3, top_k: 1, ..plain },
        Draw { top_k: 7, ..plain },
        Draw { temperature: 2.0, top_k: 40, top_p: 0.9, ..plain },
        Draw { top_k: 3000, top_p: 0.97, min_p: 0.01, ..plain },
        Draw { temperature: 0.7, top_p: 0.5, ..plain },
        Draw { temperature: 5.0, top_p: 0.999, ..plain },
        Draw { top_p: 0.0, ..plain },
        Draw { top_k: u32::MAX, min_p: 0.1, ..plain },
        Draw { min_p: 1.0, ..plain },
        Draw { temperature: 1e-40, ..plain },
    ];
    std::iter::once(None).chain(drawn.map(Some)).collect()
}

/// Of a few rows: all drawn in one way, or each in another, or none.
fn sample_draws(s: &mut Setup, rows: usize, draw: Option<Draw>, mixed: bool) -> Option<Ints> {
    let all: Vec<Draw> = draws().into_iter().flatten().collect();
    let words: Vec<u32> = (0..rows)
        .flat_map(|row| {
            // Both ends and what lies between.
            let bits = (f64::from(noise("draw", rows, row)) * 2f64.powi(63)) as i64 as u64;
            let random = [0, u64::MAX, bits, bits ^ (bits << 7)][row % 4];
            Draw { random, ..if mixed { all[row % all.len()] } else { draw.unwrap_or(all[0]) } }.words()
        })
        .collect();
    draw.map(|_| s.ints(&words))
}

fn sample(types: Types) -> impl Iterator<Item = Case> {
    const INF: f32 = f32::INFINITY;
    let patterns: [(&str, Pattern); 8] = [
        ("plain", |_, _, x| 1.0 + 6.0 * x),
        ("wide", |_, _, x| 60.0 * x),
        ("ties", |_, _, x| (5.0 * x).round()),
        ("equal", |row, _, _| if row % 2 == 0 { 0.0 } else { -3.25 }),
        ("both zeros", |_, col, x| {
            if x > 0.4 {
                -1.0
            } else if col % 2 == 0 {
                0.0
            } else {
                -0.0
            }
        }),
        ("masked", |row, col, x| if (row + col) % 3 == 1 { -INF } else { 8.0 * x }),
        ("one left", |row, col, _| if col == row { 2.0 } else { -INF }),
        ("special", |row, col, x| match (row % 4, col == row % 3) {
            (1, true) => f32::NAN,
            (2, true) => INF,
            (3, _) => -INF,
            _ => x,
        }),
    ];
    let vocabularies = [1, 2, 15, 16, 17, 500, 2047, 2049, 4099];
    draws().into_iter().enumerate().flat_map(move |(i, draw)| {
        patterns.into_iter().enumerate().map(move |(j, (name, value))| {
            let (vocab, rows) = (vocabularies[(4 * i + j) % 9], [1, 5, 2, 0, 4, 13][(i + j) % 6]);
            let mut s = Setup::new(types);
            let logits = s.mat(rows + 1, vocab, DType::F32).rows(0..rows);
            for row in 0..rows {
                s.fill_row(logits, row, |col| value(row, col, noise("sampled", row, col)));
            }
            let draws = sample_draws(&mut s, rows, draw, j % 3 == 2);
            let tokens = s.room(rows + 2);
            let op = Op::Sample(Sample { logits, draws, tokens });
            s.case(format!("{rows} of {vocab}, {name}, {draw:?}"), op)
        })
    })
}

/// Behind the product that makes the logits, of whole numbers, so that they are the same everywhere.
fn sample_of_product(types: Types) -> impl Iterator<Item = Case> {
    let sizes = [(1, 17), (1, 2049), (7, 100), (9, 16), (33, 500), (64, 31), (65, 90)];
    sizes.into_iter().zip(draws()).map(move |((rows, vocab), draw)| {
        // As many sequences as rows: tokens are chosen for all of them.
        let mut s = Setup::with_kv(types, 1, rows, 1, types.head_dim(2));
        let k = types.width(32);
        let h = s.activations(rows, k);
        let whole = |tag, row, col| (2.0 * noise(tag, row, col)).round();
        (0..rows).for_each(|row| s.fill_row(h, row, |col| whole("whole activation", row, col)));
        let weight = s.tensor(vocab, k, types.weights[0], |row, col| whole("whole weight", row, col));
        let out = s.mat(rows, vocab, DType::F32);
        s.before.push(Op::Logits(Logits { h, weight, out }));
        let draws = sample_draws(&mut s, rows, draw, true);
        let tokens = s.room(rows);
        let op = Op::Sample(Sample { logits: out, draws, tokens });
        s.case(format!("{rows} of {vocab} behind the product, {draw:?}"), op)
    })
}
