//! A row gives the same bits in every company: alone, in a batch of any size, in any chunk of a longer run.
//!
//! Decode and prefill take different paths through an implementation; where this holds they agree to the last bit, and so
//! do a prompt in one piece and in several.

use super::Types;
use super::cases_kv::{Heads, History, attention, plain_values, write_history};
use super::setup::{Case, Count, Setup, activation, noise};
use super::tests::{Failures, attempt, implementations};
use crate::backend::*;

/// Rows of the whole run.
const ALL: usize = 64;

/// An op over some rows of the run, and where the outputs of each one stand.
struct Company {
    case: Case,
    outputs: Vec<Vec<Mat>>,
}

/// An op over the rows `ids`. Every row has its own inputs, whoever else is there.
fn company(kind: OpKind, types: Types, weights: DType, ids: &[usize]) -> Option<Company> {
    // Widths with a tail behind whole vectors, outputs that fill two blocks and a part.
    const K: usize = 83;
    const N: usize = 101;
    let n = ids.len();
    let mut s = Setup::new(types);
    let index: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    let name = format!("{} of rows {ids:?}, {weights}", kind.name());
    let each = |m: Mat| (0..n).map(move |i| m.rows(i..i + 1));
    let (op, outputs): (Op, Vec<Vec<Mat>>) = match kind {
        // Rows are looked up, or give no numbers in floating point.
        OpKind::Embed | OpKind::RopeAngles | OpKind::Route | OpKind::Sample => return None,
        OpKind::NormGate => {
            let x = s.mat(ALL, K, DType::F32);
            ids.iter().for_each(|&id| s.fill_row(x, id, |col| activation(id, col)));
            let rows = s.rows(&index, Count::Host);
            let (weight, router) = (s.vector("norm", K, weights), s.weight("router", 1, K, DType::F32));
            let (out, logits) = (s.activations(n, K), s.mat(ALL, 1, DType::F32));
            let op = NormGate { x, rows, weight, eps: 1e-5, out: Some(out), gate: Some(Gate { router, logits }) };
            (Op::NormGate(op), each(out).zip(ids).map(|(m, &id)| vec![m, logits.rows(id..id + 1)]).collect())
        }
        OpKind::Qkv => {
            let base = 7;
            let h = s.activations(ALL + 1, K);
            ids.iter().for_each(|&id| s.fill_row(h, id, |col| activation(id, col)));
            let index: Vec<u32> = index.iter().map(|i| i + base).collect();
            let (q_rows, kv_rows) = (s.rows(&index, Count::Host), s.rows(&index, Count::Device(1)));
            let dims = [N, 48, 48];
            let weights = std::array::from_fn(|i| s.weight(["q", "k", "v"][i], dims[i], K, weights));
            let biases = [Some(s.vector("bias", N, DType::F32)), None, None];
            let [q, k, v] = [(n, N), (n + 1, 48), (n + 1, 48)].map(|(rows, cols)| s.activations(rows, cols));
            let op = Qkv { h, base: base as usize, q_rows, kv_rows, weights, biases, q, k, v };
            (Op::Qkv(op), each(q).zip(each(k)).zip(each(v)).map(|((q, k), v)| vec![q, k, v]).collect())
        }
        OpKind::RopeAppend => {
            let heads = Heads { head_dim: 10, kv_heads: 1, group: 3 };
            s = heads.setup(types);
            let pos = s.ints(&(100..100 + ALL as u32).collect::<Vec<_>>());
            let row_slot = s.ints(&[0; ALL]);
            let inv_freq = s.tensor(1, 5, DType::F32, |_, j| 0.3f32.powi(j as i32));
            let angles = s.mat(ALL, 10, DType::F32);
            s.before.push(Op::RopeAngles(RopeAngles { pos, inv_freq, out: angles }));
            let q_rows = s.rows(&index, Count::Host);
            let kv_rows = s.rows(&[], Count::Host);
            let kv_row = s.room(1);
            let q = s.activations(n, heads.q_dim());
            ids.iter().enumerate().for_each(|(i, &id)| s.fill_row(q, i, |col| activation(id, col)));
            let [k, v] = [(); 2].map(|()| s.activations(0, 10));
            let q_norm = Some(s.vector("q norm", 10, weights));
            let (layer, head_dim, eps) = (1, 10, 1e-5);
            s.hold(layer, 0, 0, 1);
            #[rustfmt::skip]
            let op = RopeAppend {
                layer, head_dim, angles, pos, row_slot, q_rows, kv_rows, kv_row, q, k, v, q_norm, k_norm: None, eps,
            };
            (Op::RopeAppend(op), each(q).map(|m| vec![m]).collect())
        }
        OpKind::Attend => {
            // A chunk over two segments, and a short sequence: rows of the second one follow.
            let heads = Heads { head_dim: 24, kv_heads: 2, group: 3 };
            s = heads.setup(types);
            write_history(&mut s, heads, &[History::of(0, 560), History::of(3, 60)], plain_values);
            let query = |id: usize| match id {
                ..40 => (0, id * 2..500 + id + 1),
                _ => (3, 0..2 * (id - 39)),
            };
            let queries: Vec<_> = ids.iter().map(|&id| query(id)).collect();
            let value = |i: usize, col| 0.3 + 1.5 * noise("q", ids[i], col);
            let op = attention(&mut s, heads, &queries, Count::Host, 0.2, value);
            (Op::Attend(op), each(op.out).map(|m| vec![m]).collect())
        }
        OpKind::ProjectAdd => {
            let (src, x) = (s.activations(n, K), s.mat(ALL, N, DType::F32));
            for (i, &id) in ids.iter().enumerate() {
                s.fill_row(src, i, |col| activation(id, col));
                s.fill_row(x, id, |col| 3.0 * noise("residual", id, col));
            }
            let rows = s.rows(&index, Count::Host);
            let weight = s.weight("weight", N, K, weights);
            let bias = Some(s.vector("bias", N, weights));
            (
                Op::ProjectAdd(ProjectAdd { src, weight, bias, rows, x }),
                ids.iter().map(|&id| vec![x.rows(id..id + 1)]).collect(),
            )
        }
        OpKind::SwiGlu | OpKind::Logits => {
            let h = s.activations(n, K);
            ids.iter().enumerate().for_each(|(i, &id)| s.fill_row(h, i, |col| activation(id, col)));
            let rows = s.rows(&index, Count::Host);
            let [gate, up] = ["gate", "up"].map(|tag| s.weight(tag, N, K, weights));
            let out = s.mat(n, N, if kind == OpKind::Logits { DType::F32 } else { types.activations });
            let op = match kind {
                OpKind::Logits => Op::Logits(Logits { h, weight: gate, out }),
                _ => Op::SwiGlu(SwiGlu { h, rows, gate, up, gate_bias: None, up_bias: None, out }),
            };
            (op, each(out).map(|m| vec![m]).collect())
        }
        OpKind::LogProbs => {
            let logits = s.mat(n, N, DType::F32);
            ids.iter().enumerate().for_each(|(i, &id)| s.fill_row(logits, i, |col| 5.0 * activation(id, col)));
            let targets = s.ints(&ids.iter().map(|id| (id % N) as u32).collect::<Vec<_>>());
            let out = s.mat(n, 1, DType::F32);
            (Op::LogProbs(LogProbs { logits, targets, out }), each(out).map(|m| vec![m]).collect())
        }
    };
    Some(Company { case: s.case(name, op), outputs })
}

#[test]
fn a_row_gives_the_same_bits_in_every_company() {
    let sizes = (1..=7).chain([15, 16, 17, 33]);
    let mut companies: Vec<Vec<usize>> = sizes.map(|n| (3 * n % 29..3 * n % 29 + n).collect()).collect();
    companies.extend([0, 40, 63].map(|row| vec![row]));
    // A run of 64 in chunks of 5 and 59, and rows picked from it.
    companies.extend([(0..5).collect(), (5..ALL).collect(), (0..ALL).step_by(3).collect()]);
    let mut failures = Failures::default();
    for it in implementations().iter().filter(|it| it.rows_are_independent) {
        let bits = |outcome: &super::Outcome, mats: &[Mat]| -> Vec<u16> {
            mats.iter().flat_map(|m| outcome.halves[m.offset / 2..(m.offset + m.bytes()) / 2].to_vec()).collect()
        };
        for &kind in OpKind::ALL.iter().filter(|&&kind| it.types.concern(kind.into())) {
            for &weights in it.types.weights {
                let Some(all) = company(kind, it.types, weights, &(0..ALL).collect::<Vec<_>>()) else { continue };
                let whole = match attempt(it, &all.case) {
                    Ok(outcome) => outcome,
                    Err(text) => {
                        failures.check(&all.case.name, &it.name, Err(text));
                        continue;
                    }
                };
                for ids in &companies {
                    let some = company(kind, it.types, weights, ids).expect("as before");
                    let result = attempt(it, &some.case).and_then(|outcome| {
                        let differs =
                            |i: &usize| bits(&outcome, &some.outputs[*i]) != bits(&whole, &all.outputs[ids[*i]]);
                        (0..ids.len())
                            .find(differs)
                            .map_or(Ok(()), |i| Err(format!("row {} is not as in all 64", ids[i])))
                    });
                    failures.check(&some.case.name, &it.name, result);
                }
            }
        }
    }
    failures.report();
}
