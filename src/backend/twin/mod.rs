//! Every op of the contract against its naive twin: one test body, the same awkward cases, every implementation.
//!
//! A [`Case`] is data: the bytes of both arenas, weights, K/V pages, and ops to run. [`Reference`] runs it in f64 and notes
//! what it wrote. An implementation must give the same within [`tolerance`], have left alone every other byte of both
//! arenas (what is no input is poisoned before), and have done the work that the reference counts.

mod cases;
mod cases_kv;
mod contract;
mod reference;
mod rows;
mod setup;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::backend::cpu::{CpuBackend, levels};
use crate::error::Result;
use reference::{Reference, load};
use setup::Case;

/// The types a case is made for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Types {
    /// Storage of normalised rows, projections and MLP activations, and of K/V: see [`DeviceInfo`].
    activations: DType,
    kv: DType,
    /// Types that weights may be stored in.
    weights: &'static [DType],
    /// What matrices are converted to.
    held: Option<DType>,
    /// What widths that are summed over, and head_dim, must be multiples of.
    multiples: (usize, usize),
}

impl Types {
    /// The next width that it takes.
    fn width(&self, width: usize) -> usize {
        width.next_multiple_of(self.multiples.0)
    }

    fn head_dim(&self, head_dim: usize) -> usize {
        head_dim.next_multiple_of(self.multiples.1)
    }
}

/// A backend to be tested.
struct Implementation {
    name: String,
    types: Types,
    /// Implementations of one family agree to the last bit.
    family: &'static str,
    /// Whether a row gives the same bits in every company.
    rows_are_independent: bool,
    make: Box<dyn Fn() -> Box<dyn Backend>>,
}

/// All that there are on this machine.
fn implementations() -> Vec<Implementation> {
    const ALL: &[DType] = &[DType::F32, DType::F16, DType::BF16];
    let types = Types { activations: DType::F32, kv: DType::F32, weights: ALL, held: None, multiples: (1, 2) };
    let mut all = Vec::new();
    for level in levels() {
        for threads in [1, 3] {
            let make = move || CpuBackend::with_level(Some(threads), level).expect("a CPU");
            let name = make().info().name.clone();
            // `cpu::simd` promises the same bits wherever there is FMA; the SSE levels have none.
            let family = if name.contains("sse") { "cpu without FMA" } else { "cpu" };
            let make = Box::new(move || Box::new(make()) as Box<dyn Backend>);
            all.push(Implementation { name, types, family, rows_are_independent: true, make });
        }
    }
    // Whatever order threads run in, the bits are the same.
    #[cfg(feature = "emulate")]
    for (dtype, weights, family) in
        [(DType::F32, ALL, "cuda f32"), (DType::F16, &ALL[1..2], "cuda f16"), (DType::BF16, &ALL[2..], "cuda bf16")]
    {
        use crate::backend::cuda::{CudaBackend, emulated::Emulated};
        for seed in [1, 2] {
            let make = move || CudaBackend::new(Box::new(Emulated::new(seed)), dtype).expect("an emulator");
            let name = format!("{}, seed {seed}", make().info().name);
            let types = Types { activations: dtype, kv: dtype, weights, held: Some(dtype), multiples: (8, 16) };
            let make = Box::new(move || Box::new(make()) as Box<dyn Backend>);
            all.push(Implementation { name, types, family, rows_are_independent: false, make });
        }
    }
    all
}

/// A comparison passes when |a − b| <= atol + rtol·|b|.
#[derive(Debug, Clone, Copy)]
struct Tolerance {
    atol: f64,
    rtol: f64,
}

/// The tolerance of what an op writes in a dtype. Inputs and outputs of the cases are about 1, sums have up to 1100 terms.
///
/// Beside each number, for f32, what it rests on: the worst |a − b| / (1 + |b|) of all cases, threads and instruction sets
/// of the CPU backend. `cargo test --release --lib twin -- --nocapture` prints them anew.
fn tolerance(op: OpKind, dtype: DType) -> Tolerance {
    let f32_error = match op {
        OpKind::Embed => 0.0,         // 0: a look-up
        OpKind::RopeAngles => 1.2e-7, // 0: computed in f64; one unit in the last place
        OpKind::NormGate => 4e-7,     // 1.0e-7
        OpKind::Route => 0.0,         // integers only
        OpKind::Qkv => 1e-6,          // 3.0e-7, at k = 577
        OpKind::RopeAppend => 5e-7,   // 1.5e-7
        OpKind::Attend => 1.5e-6,     // 5.2e-7
        OpKind::ProjectAdd => 1e-6,   // 3.6e-7, at k = 576
        OpKind::SwiGlu => 1.5e-6,     // 5.1e-7, at k = 576
        OpKind::Logits => 1e-6,       // 3.3e-7, at k = 577
        OpKind::LogProbs => 4e-7,     // 1.0e-7
    };
    // What an error of f32 can make of a rounding to less: one unit in the last place.
    let unit = match dtype {
        DType::F32 => return Tolerance { atol: f32_error, rtol: f32_error },
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
    };
    match op {
        // Tensor cores take the weights of attention rounded, too.
        OpKind::Attend => Tolerance { atol: unit, rtol: unit },
        // With many rows, both products are rounded before they are multiplied.
        OpKind::SwiGlu => Tolerance { atol: f32_error, rtol: 2.0 * unit },
        _ => Tolerance { atol: f32_error, rtol: unit },
    }
}

/// What a case left behind.
struct Outcome {
    halves: Vec<u16>,
    ints: Vec<u32>,
    meter: Meter,
}

/// Runs a case on a fresh backend.
fn perform(be: &mut dyn Backend, case: &Case) -> Result<Outcome> {
    for (id, tensor) in case.tensors.iter().enumerate() {
        let held = be.info().weights.filter(|_| tensor.rows > 1).unwrap_or(tensor.dtype);
        let expected = Weight { id, rows: tensor.rows, cols: tensor.cols, dtype: held };
        assert_eq!(be.upload(tensor)?, expected, "a backend numbers its weights from 0");
    }
    be.reserve(2 * case.halves.len(), case.ints.len(), 0, &case.kv)?;
    let arena = Mat { offset: 0, rows: 1, cols: case.halves.len() / 2, dtype: DType::F32 };
    let ints = Ints { offset: 0, len: case.ints.len() };
    let mut words = vec![0f32; arena.cols];
    bytemuck::cast_slice_mut(&mut words).copy_from_slice(&case.halves);
    be.write_floats(arena, &words)?;
    be.write_ints(ints, &case.ints)?;
    for held in &case.held {
        // In two goes, as pages come in the course of a run.
        let (first, rest) = held.pages.split_at(held.pages.len() / 2);
        be.kv_pages(held.layer, held.slot, 0, first)?;
        be.kv_pages(held.layer, held.slot, first.len(), rest)?;
        be.kv_len(held.layer, held.slot, held.rows)?;
    }
    be.step(None, &mut |be| case.ops().try_for_each(|op| op.run(be)))?;
    let mut after = vec![0; case.ints.len()];
    be.read_ints(ints, &mut after)?;
    be.read_floats(arena, &mut words)?;
    Ok(Outcome { halves: bytemuck::cast_slice::<f32, u16>(&words).to_vec(), ints: after, meter: be.meter().clone() })
}

/// The same, with a panic as an error.
fn attempt(implementation: &Implementation, case: &Case) -> Result<Outcome, String> {
    let run = || perform(&mut *(implementation.make)(), case);
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or("panicked".into()))
        }
    }
}

/// What the reference made of a case.
struct Expected {
    outcome: Outcome,
    reference: Reference,
}

impl Expected {
    fn of(case: &Case, types: Types) -> Self {
        let mut reference = Reference::new(types);
        let outcome = perform(&mut reference, case).expect(&case.name);
        Expected { outcome, reference }
    }

    /// Compares; the errors that came nearest to their tolerance go into `worst`.
    fn compare(&self, case: &Case, actual: &Outcome, worst: &mut Worsts) -> Result<(), String> {
        for (i, (a, b)) in actual.ints.iter().zip(&self.outcome.ints).enumerate() {
            if a != b {
                let who = self.reference.ints_written[i].map_or("nobody".into(), |op| format!("{op:?}"));
                let buffer = case.int_buffers.iter().rfind(|b| b.offset <= i).expect("a buffer");
                return Err(format!(
                    "integer {} of {buffer:?}, {who} writes it: {a:#x}, not {b:#x}",
                    i - buffer.offset
                ));
            }
        }
        let scratch = |at: usize| case.scratch.iter().any(|m| m.offset / 2 <= at && at < (m.offset + m.bytes()) / 2);
        for at in 0..case.halves.len() {
            if self.reference.written[at].is_none() && actual.halves[at] != case.halves[at] && !scratch(at) {
                let mat = case.mats.iter().rfind(|m| m.offset / 2 <= at).expect("a buffer");
                let i = (2 * at - mat.offset) / mat.dtype.size();
                let (row, col) = (i / mat.cols.max(1), i % mat.cols.max(1));
                return Err(format!("row {row}, column {col} of {mat:?} was written; nobody writes there"));
            }
        }
        let mut failed: Option<(f64, String)> = None;
        for (n, &mat) in case.mats.iter().enumerate() {
            for i in 0..mat.rows * mat.cols {
                let Some(op) = self.reference.written[(mat.offset + i * mat.dtype.size()) / 2] else { continue };
                let (a, b) = (load(&actual.halves, mat, i), load(&self.outcome.halves, mat, i));
                let Tolerance { atol, rtol } = tolerance(op, mat.dtype);
                let ratio = match (a.is_finite(), b.is_finite()) {
                    (true, true) => (a - b).abs() / (atol + rtol * b.abs()),
                    _ if a == b || a.is_nan() && b.is_nan() => 0.0,
                    _ => f64::INFINITY,
                };
                // 0/0 where a tolerance of nothing is kept.
                let ratio = if ratio.is_nan() { 0.0 } else { ratio };
                worst.note(op, mat.dtype, ratio, a, b, || case.name.clone());
                if ratio > 1.0 && failed.as_ref().is_none_or(|(worst, _)| ratio > *worst) {
                    let (row, col) = (i / mat.cols, i % mat.cols);
                    let text = format!("buffer {n}, {op:?} writes it, row {row}, column {col}: {a:e}, not {b:e}");
                    failed = Some((ratio, text));
                }
            }
        }
        if let Some((ratio, text)) = failed {
            return Err(format!("{text}, {ratio:.1} of the tolerance"));
        }
        if actual.meter != self.outcome.meter {
            return Err(format!("metered {:?}, not {:?}", actual.meter, self.outcome.meter));
        }
        Ok(())
    }
}

/// The worst errors by op and dtype: what the numbers of [`tolerance`] rest on.
#[derive(Default)]
struct Worsts(HashMap<(OpKind, DType), Worst>);

struct Worst {
    /// Of the tolerance.
    ratio: f64,
    actual: f64,
    expected: f64,
    case: String,
}

impl Worsts {
    fn note(&mut self, op: OpKind, dtype: DType, ratio: f64, actual: f64, expected: f64, case: impl Fn() -> String) {
        let make = || Worst { ratio: -1.0, actual, expected, case: String::new() };
        let worst = self.0.entry((op, dtype)).or_insert_with(make);
        if ratio > worst.ratio {
            *worst = Worst { ratio, actual, expected, case: case() };
        }
    }

    fn print(&self) {
        for op in OpKind::ALL {
            for ((_, dtype), w) in self.0.iter().filter(|((o, _), _)| o == op) {
                let error = (w.actual - w.expected).abs();
                let Worst { ratio, expected, case, .. } = w;
                println!(
                    "{op:?} {dtype}: {ratio:.3} of the tolerance, |a - b| = {error:.2e} at b = {expected:.3e}, {case}"
                );
            }
        }
    }
}

/// Collects what fails, so that one run shows all of it: by case and what is wrong, who has it wrong.
#[derive(Default)]
struct Failures(Vec<(String, Vec<String>)>);

impl Failures {
    fn check(&mut self, case: &str, implementation: &str, result: Result<(), String>) {
        let Err(text) = result else { return };
        let text = format!("{case}: {text}");
        match self.0.iter_mut().find(|(known, _)| *known == text) {
            Some((_, who)) => who.push(implementation.into()),
            None => self.0.push((text, vec![implementation.into()])),
        }
    }

    fn report(self) {
        let lines: Vec<_> = self.0.iter().map(|(text, who)| format!("{text} ({})", who.join("; "))).collect();
        assert!(lines.is_empty(), "{} failures:\n{}", lines.len(), lines[..lines.len().min(40)].join("\n"));
    }
}

/// Runs the cases of an op on every implementation.
fn agree(kinds: &[OpKind]) {
    let implementations = implementations();
    let (mut failures, mut worst) = (Failures::default(), Worsts::default());
    let mut types: Vec<Types> = implementations.iter().map(|i| i.types).collect();
    types.dedup();
    for types in types {
        for &kind in kinds {
            let cases = cases::cases(kind, types);
            assert!(!cases.is_empty() && cases.iter().all(|case| case.op.kind() == kind), "the cases of {kind:?}");
            for case in cases {
                let expected = Expected::of(&case, types);
                let mut families: HashMap<&str, (&str, Outcome)> = HashMap::new();
                for it in implementations.iter().filter(|i| i.types == types) {
                    let outcome = match attempt(it, &case) {
                        Ok(outcome) => outcome,
                        Err(text) => {
                            failures.check(&case.name, &it.name, Err(text));
                            continue;
                        }
                    };
                    failures.check(&case.name, &it.name, expected.compare(&case, &outcome, &mut worst));
                    match families.get(it.family) {
                        None => _ = families.insert(it.family, (&it.name, outcome)),
                        Some((name, first)) => {
                            let same =
                                if first.halves == outcome.halves { Ok(()) } else { Err(format!("not as {name}")) };
                            failures.check(&case.name, &it.name, same);
                        }
                    }
                }
            }
        }
    }
    worst.print();
    failures.report();
}

#[test]
fn every_op_agrees_with_its_twin() {
    agree(OpKind::ALL);
}

/// The cases can be made for backends that store 16 bits, and the reference rounds as it reads back.
#[test]
fn the_reference_agrees_with_itself_in_16_bits() {
    for dtype in [DType::F16, DType::BF16] {
        let weights = &[DType::BF16, DType::F16];
        let types = Types { activations: dtype, kv: dtype, weights, held: None, multiples: (1, 2) };
        let mut failures = Failures::default();
        for case in OpKind::ALL.iter().flat_map(|&kind| cases::cases(kind, types)) {
            let outcome = perform(&mut Reference::new(types), &case).expect(&case.name);
            let result = Expected::of(&case, types).compare(&case, &outcome, &mut Worsts::default());
            failures.check(&case.name, "reference", result);
        }
        failures.report();
    }
}

/// A comparison that cannot fail proves nothing.
#[test]
fn comparisons_notice_what_is_wrong() {
    let types = implementations()[0].types;
    for kind in [OpKind::NormGate, OpKind::Route, OpKind::ProjectAdd, OpKind::Attend] {
        let cases = cases::cases(kind, types);
        // Of those with something to get wrong.
        let case = cases
            .iter()
            .filter(|case| !case.name.contains("NaN") && !case.name.contains("Special"))
            .nth(cases.len() / 2)
            .expect("a case");
        let expected = Expected::of(case, types);
        let spoiled = |spoil: &dyn Fn(&mut Outcome)| {
            let Outcome { halves, ints, meter } = &expected.outcome;
            let mut outcome = Outcome { halves: halves.clone(), ints: ints.clone(), meter: meter.clone() };
            spoil(&mut outcome);
            expected.compare(case, &outcome, &mut Worsts::default())
        };
        assert_eq!(spoiled(&|_| {}), Ok(()), "{}", case.name);
        let is_scratch = |at| case.scratch.iter().any(|m| (m.offset / 2..(m.offset + m.bytes()) / 2).contains(&at));
        for at in (0..case.halves.len()).filter(|&at| expected.reference.written[at].is_none() && !is_scratch(at)) {
            // All of them, but few at a time.
            if at % 97 == 0 {
                assert!(spoiled(&|o| o.halves[at] ^= 1).is_err(), "{}: half {at} was written", case.name);
            }
        }
        for at in (0..case.ints.len()).step_by(7) {
            assert!(spoiled(&|o| o.ints[at] ^= 1).is_err(), "{}: integer {at} is wrong", case.name);
        }
        for mat in case.mats.iter().filter(|m| m.rows * m.cols > 0) {
            let first = mat.offset / 2;
            if expected.reference.written[first].is_some() && !is_scratch(first) {
                let store = |value: f64| {
                    spoiled(&|o| _ = reference::store(&mut o.halves, *mat, 0, value)).expect_err(&case.name)
                };
                let value = load(&expected.outcome.halves, *mat, 0);
                store(f64::NAN);
                store(f64::INFINITY);
                store(value + 1e-4);
            }
        }
        assert!(spoiled(&|o| o.meter.ops[kind as usize].cost.bytes += 1).is_err(), "{}: the meter", case.name);
    }
}
