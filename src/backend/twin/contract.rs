//! What the argument structs promise by themselves: bad ones are refused, costs are those of the rows that were processed.

use super::setup::{Count, Setup};
use super::tests::implementations;
use crate::backend::*;
use crate::error::Kind;

fn mat(rows: usize, cols: usize) -> Mat {
    Mat { offset: 0, rows, cols, dtype: DType::F32 }
}

fn ints(len: usize) -> Ints {
    Ints { offset: 0, len }
}

fn weight(rows: usize, cols: usize) -> Weight {
    Weight { id: 0, rows, cols, dtype: DType::BF16 }
}

fn f32_vector(cols: usize) -> Weight {
    Weight { dtype: DType::F32, ..weight(1, cols) }
}

/// `bound` rows by an index, their number on the device.
fn set(bound: usize) -> RowSet {
    RowSet { count: Some(ints(1)), ..RowSet::exact(ints(bound)) }
}

/// A right one of each op: hidden 6, 3 query heads and 1 K/V head of 4, intermediate 10, vocabulary 9, 5 rows in 2 sequences.
fn right(kind: OpKind) -> Op {
    let (rows, hidden) = (5, 6);
    match kind {
        OpKind::Embed => Op::Embed(Embed { table: weight(9, hidden), ids: ints(rows), out: mat(rows, hidden) }),
        OpKind::RopeAngles => {
            Op::RopeAngles(RopeAngles { pos: ints(rows), inv_freq: f32_vector(2), out: mat(rows, 4) })
        }
        OpKind::NormGate => Op::NormGate(NormGate {
            x: mat(rows, hidden),
            rows: set(rows),
            weight: weight(1, hidden),
            eps: 1e-5,
            out: Some(mat(rows, hidden)),
            gate: Some(Gate { router: f32_vector(hidden), logits: mat(rows, 1) }),
        }),
        OpKind::Route => Op::Route(Route {
            layer: 0,
            decide: Decide::Sequence(0.5),
            queries: Take::Active,
            keys: Take::All,
            window: None,
            logits: mat(rows, 1),
            pos: ints(rows),
            seq_start: ints(3),
            slots: ints(2),
            decided: ints(2),
            cuts: ints(2),
            active: ints(rows),
            active_at: ints(2),
            first: ints(rows),
            end: ints(rows),
            kv_row: ints(rows),
        }),
        OpKind::Qkv => Op::Qkv(Qkv {
            h: mat(rows, hidden),
            base: 0,
            q_rows: set(rows),
            kv_rows: set(rows),
            weights: [weight(12, hidden), weight(4, hidden), weight(4, hidden)],
            biases: [Some(weight(1, 12)), Some(weight(1, 4)), None],
            q: mat(rows, 12),
            k: mat(rows, 4),
            v: mat(rows, 4),
        }),
        OpKind::RopeAppend => Op::RopeAppend(RopeAppend {
            layer: 0,
            head_dim: 4,
            angles: mat(rows, 4),
            pos: ints(rows),
            row_slot: ints(rows),
            q_rows: set(rows),
            kv_rows: set(rows),
            kv_row: ints(rows),
            q: mat(rows, 12),
            k: mat(rows, 4),
            v: mat(rows, 4),
            q_norm: Some(weight(1, 4)),
            k_norm: Some(weight(1, 4)),
            eps: 1e-5,
        }),
        OpKind::Attend => Op::Attend(Attend {
            layer: 0,
            head_dim: 4,
            scale: 0.5,
            rows: set(rows),
            row_slot: ints(rows),
            first: ints(rows),
            end: ints(rows),
            q: mat(rows, 12),
            out: mat(rows, 12),
            kv_heads: 1,
            single: false,
        }),
        OpKind::ProjectAdd => Op::ProjectAdd(ProjectAdd {
            src: mat(rows, 12),
            weight: weight(hidden, 12),
            bias: Some(weight(1, hidden)),
            rows: set(rows),
            x: mat(rows, hidden),
        }),
        OpKind::SwiGlu => Op::SwiGlu(SwiGlu {
            h: mat(rows, hidden),
            rows: set(rows),
            gate: weight(10, hidden),
            up: weight(10, hidden),
            gate_bias: Some(weight(1, 10)),
            up_bias: None,
            out: mat(rows, 10),
        }),
        OpKind::Logits => Op::Logits(Logits { h: mat(rows, hidden), weight: weight(9, hidden), out: mat(rows, 9) }),
        OpKind::LogProbs => Op::LogProbs(LogProbs { logits: mat(rows, 9), targets: ints(rows), out: mat(rows, 1) }),
        OpKind::Sample => {
            let draws = Some(ints(rows * Draw::WORDS));
            Op::Sample(Sample { logits: mat(rows, 9), draws, tokens: ints(rows) })
        }
    }
}

fn check(op: &Op) -> Result<()> {
    match op {
        Op::Embed(a) => a.check(),
        Op::RopeAngles(a) => a.check(),
        Op::NormGate(a) => a.check(),
        Op::Route(a) => a.check(),
        Op::Qkv(a) => a.check(),
        Op::RopeAppend(a) => a.check(),
        Op::Attend(a) => a.check(),
        Op::ProjectAdd(a) => a.check(),
        Op::SwiGlu(a) => a.check(),
        Op::Logits(a) => a.check(),
        Op::LogProbs(a) => a.check(),
        Op::Sample(a) => a.check(),
    }
}

fn cost(op: &Op, work: Work) -> Cost {
    match op {
        Op::Embed(a) => a.cost(work),
        Op::RopeAngles(a) => a.cost(work),
        Op::NormGate(a) => a.cost(work),
        Op::Route(a) => a.cost(work),
        Op::Qkv(a) => a.cost(work),
        Op::RopeAppend(a) => a.cost(work),
        Op::Attend(a) => a.cost(work),
        Op::ProjectAdd(a) => a.cost(work),
        Op::SwiGlu(a) => a.cost(work),
        Op::Logits(a) => a.cost(work),
        Op::LogProbs(a) => a.cost(work),
        Op::Sample(a) => a.cost(work),
    }
}

/// Refuses a right op after one change to it, by an error that names the op.
macro_rules! refused {
    ($($kind:ident { $($field:ident).+ = $value:expr }),+ $(,)?) => {
        $({
            let Op::$kind(mut args) = right(OpKind::$kind) else { unreachable!() };
            args.$($field).+ = $value;
            let name = concat!(stringify!($kind), " with ", stringify!($($field).+ = $value));
            let error = check(&Op::$kind(args)).expect_err(name);
            assert_eq!(error.kind(), Kind::Shape, "{name}");
            assert!(error.to_string().starts_with(OpKind::$kind.name()), "{name}: {error}");
        })+
    };
}

#[test]
fn wrong_arguments_are_refused() {
    for &kind in OpKind::ALL {
        check(&right(kind)).unwrap();
    }
    let half = |m: Mat| Mat { dtype: DType::F16, ..m };
    refused! {
        Embed { out = mat(4, 6) },
        Embed { out = mat(5, 7) },
        Embed { out = half(mat(5, 6)) },
        RopeAngles { out = mat(5, 2) },
        RopeAngles { out = mat(4, 4) },
        RopeAngles { inv_freq = Weight { rows: 2, ..f32_vector(2) } },
        RopeAngles { inv_freq = weight(1, 2) },
        NormGate { weight = weight(1, 5) },
        NormGate { weight = weight(6, 1) },
        NormGate { weight = weight(2, 6) },
        NormGate { x = half(mat(5, 6)) },
        NormGate { out = Some(mat(4, 6)) },
        NormGate { rows.index = ints(4) },
        NormGate { rows.count = Some(ints(0)) },
        NormGate { gate = Some(Gate { router: weight(1, 6), logits: mat(5, 1) }) },
        NormGate { gate = Some(Gate { router: f32_vector(5), logits: mat(5, 1) }) },
        NormGate { gate = Some(Gate { router: f32_vector(6), logits: mat(4, 1) }) },
        NormGate { gate = Some(Gate { router: f32_vector(6), logits: mat(5, 2) }) },
        NormGate { gate = Some(Gate { router: f32_vector(6), logits: half(mat(5, 1)) }) },
        Route { logits = mat(4, 1) },
        Route { logits = mat(5, 6) },
        Route { logits = half(mat(5, 1)) },
        Route { slots = ints(1) },
        Route { slots = ints(3) },
        Route { decided = ints(1) },
        Route { cuts = ints(3) },
        Route { cuts = ints(0) },
        Route { active = ints(4) },
        Route { first = ints(4) },
        Route { end = ints(4) },
        Route { kv_row = ints(4) },
        Qkv { h = mat(5, 7) },
        Qkv { h = mat(4, 6) },
        Qkv { q_rows.index = ints(3) },
        Qkv { kv_rows.count = Some(ints(0)) },
        Qkv { weights = [weight(12, 6), weight(4, 6), weight(4, 5)] },
        // A bias that stands in a column would be read as none.
        Qkv { biases = [Some(weight(12, 1)), None, None] },
        Qkv { biases = [None, Some(weight(1, 12)), None] },
        Qkv { q = mat(5, 4) },
        Qkv { v = mat(4, 4) },
        RopeAppend { head_dim = 3 },
        RopeAppend { head_dim = 0 },
        RopeAppend { angles = mat(5, 2) },
        RopeAppend { angles = half(mat(5, 4)) },
        RopeAppend { q = mat(5, 10) },
        RopeAppend { q = mat(4, 12) },
        RopeAppend { k = mat(4, 4) },
        RopeAppend { v = mat(5, 8) },
        RopeAppend { kv_row = ints(4) },
        RopeAppend { q_rows.index = ints(4) },
        RopeAppend { kv_rows.index = ints(4) },
        RopeAppend { q_norm = Some(weight(1, 12)) },
        RopeAppend { k_norm = Some(weight(4, 1)) },
        Attend { head_dim = 5 },
        Attend { head_dim = 0 },
        Attend { kv_heads = 0 },
        Attend { kv_heads = 2 },
        Attend { scale = 0.0 },
        Attend { scale = -0.5 },
        Attend { scale = f32::INFINITY },
        Attend { scale = f32::NAN },
        Attend { q = mat(5, 0) },
        Attend { q = mat(4, 12) },
        Attend { out = mat(5, 8) },
        Attend { first = ints(4) },
        Attend { end = ints(4) },
        Attend { rows.index = ints(4) },
        ProjectAdd { src = mat(5, 6) },
        ProjectAdd { src = mat(4, 12) },
        ProjectAdd { bias = Some(weight(1, 12)) },
        ProjectAdd { bias = Some(weight(6, 1)) },
        ProjectAdd { x = mat(5, 12) },
        ProjectAdd { x = mat(4, 6) },
        ProjectAdd { x = half(mat(5, 6)) },
        ProjectAdd { rows.index = ints(4) },
        SwiGlu { h = mat(5, 5) },
        SwiGlu { up = weight(9, 6) },
        SwiGlu { up_bias = Some(weight(10, 1)) },
        SwiGlu { out = mat(4, 10) },
        SwiGlu { rows.count = Some(ints(0)) },
        Logits { h = mat(4, 6) },
        Logits { weight = weight(9, 5) },
        Logits { out = mat(5, 8) },
        Logits { out = half(mat(5, 9)) },
        LogProbs { logits = mat(4, 9) },
        LogProbs { logits = half(mat(5, 9)) },
        LogProbs { out = mat(4, 1) },
        LogProbs { out = mat(5, 2) },
        Sample { logits = half(mat(5, 9)) },
        Sample { logits = mat(5, 0) },
        Sample { logits = mat(5, (1 << 24) + 1) },
        Sample { draws = Some(ints(5 * Draw::WORDS - 1)) },
        Sample { tokens = ints(4) },
    }
}

/// Dense layers have no logits: whatever stands there is not looked at.
#[test]
fn a_dense_layer_needs_no_logits() {
    let Op::Route(mut args) = right(OpKind::Route) else { unreachable!() };
    (args.decide, args.logits, args.decided) = (Decide::All, mat(0, 6), ints(0));
    args.check().unwrap();
}

#[test]
fn buffers_outside_the_arena_or_shared_are_refused() {
    for it in implementations() {
        let mut s = Setup::new(it.types);
        let h = s.activations(3, 4);
        s.fill(h, 0..3);
        let weight = s.weight("weight", 5, 4, it.types.weights[0]);
        let out = s.mat(3, 5, DType::F32);
        let rows = s.rows(&[0, 1, 2], Count::Host);
        let case = s.case(String::new(), Op::Logits(Logits { h, weight, out }));
        let beyond = Mat { offset: 2 * case.halves.len() - 4, ..out };
        let project = |x| Op::ProjectAdd(ProjectAdd { src: h, weight, bias: None, rows, x });
        let wrong = [
            Op::Logits(Logits { h, weight, out: beyond }),
            Op::Logits(Logits { h, weight, out: Mat { offset: h.offset, ..out } }),
            project(beyond),
            project(Mat { offset: h.offset + 16, ..out }),
        ];
        for op in wrong {
            let mut be = (it.make)();
            be.upload(&case.tensors[0].0).unwrap();
            be.reserve(2 * case.halves.len(), case.ints.len(), 0, &case.kv).unwrap();
            be.write_ints(Ints { offset: 0, len: case.ints.len() }, &case.ints).unwrap();
            let error = be.step(None, &mut |be| op.run(be)).expect_err(&it.name);
            assert_eq!(error.kind(), Kind::Shape, "{}: {error}", it.name);
        }
    }
}

#[test]
fn costs_are_those_of_the_rows_that_were_processed() {
    for &kind in OpKind::ALL {
        let op = right(kind);
        assert_eq!(cost(&op, Work::default()), Cost::default(), "{}: no rows, no weights, no bytes", kind.name());
        // Twice the rows: twice the FLOPs, and the weights once.
        let [one, two, three] = [1, 2, 3].map(|n| cost(&op, Work { rows: n, kv_rows: n, pairs: n as u64 }));
        assert_eq!((two.flops, three.flops), (2 * one.flops, 3 * one.flops), "{}", kind.name());
        assert_eq!(two.bytes - one.bytes, three.bytes - two.bytes, "{}", kind.name());
        let weights = match kind {
            OpKind::Qkv => 2 * 6 * (12 + 4 + 4),
            OpKind::ProjectAdd => 2 * 6 * 12,
            OpKind::SwiGlu => 2 * 2 * 6 * 10,
            OpKind::Logits => 2 * 6 * 9,
            // Vectors and tables do not count, or by the row.
            _ => 0,
        };
        assert_eq!(2 * one.bytes - two.bytes, weights, "{}", kind.name());
    }
    // Some in numbers, for 4-byte activations and 2-byte weights.
    let of = |kind, rows, kv_rows, pairs| {
        let Cost { flops, bytes } = cost(&right(kind), Work { rows, kv_rows, pairs });
        (flops, bytes)
    };
    assert_eq!(of(OpKind::Embed, 3, 0, 0), (0, 3 * 6 * (2 + 4)));
    assert_eq!(of(OpKind::NormGate, 3, 0, 0), (3 * 6 * 6, 3 * 6 * (4 + 4)));
    assert_eq!(of(OpKind::Logits, 3, 0, 0), (2 * 3 * 6 * 9, 2 * 6 * 9 + 3 * 4 * (6 + 9)));
    assert_eq!(of(OpKind::ProjectAdd, 3, 0, 0), (2 * 3 * 6 * 12, 2 * 6 * 12 + 3 * 4 * (12 + 6 + 6)));
    assert_eq!(of(OpKind::SwiGlu, 3, 0, 0), (2 * 2 * 3 * 6 * 10 + 4 * 3 * 10, 2 * 2 * 6 * 10 + 3 * 4 * (6 + 10)));
    // Only K/V are made where nobody queries, and no weight of Q is read.
    assert_eq!(of(OpKind::Qkv, 0, 3, 0), (2 * 2 * 3 * 6 * 4, 2 * (2 * 6 * 4 + 3 * 4 * (6 + 4))));
    assert_eq!(of(OpKind::Attend, 2, 7, 11), (4 * 11 * 12, 4 * (2 * 2 * 12 + 2 * 7 * 4)));
}

#[test]
fn a_meter_adds_up() {
    let mut meter = Meter::default();
    meter.add(OpKind::Attend, Cost { flops: 3, bytes: 5 });
    meter.add(OpKind::Attend, Cost { flops: 10, bytes: 20 });
    meter.add(OpKind::Embed, Cost { flops: 0, bytes: 100 });
    assert_eq!(meter.ops[OpKind::Attend as usize], OpCount { calls: 2, cost: Cost { flops: 13, bytes: 25 } });
    assert_eq!(meter.total(), Cost { flops: 13, bytes: 125 });
}
