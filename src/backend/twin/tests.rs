//! The tests: every implementation that this machine has, or is told to have.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::reference::{Reference, load};
use super::setup::Case;
use super::*;
use crate::backend::cpu::{CpuBackend, levels};

/// A backend to be tested.
pub(super) struct Implementation {
    pub name: String,
    pub types: Types,
    /// Implementations of one family agree to the last bit.
    family: &'static str,
    /// Whether a row gives the same bits in every company.
    pub rows_are_independent: bool,
    /// Ops that it has not in common with another implementation: only their cases are run.
    only: fn(AnyKind) -> bool,
    pub make: Box<dyn Fn() -> Box<dyn TrainingBackend>>,
}

/// All that there are on this machine.
pub(super) fn implementations() -> Vec<Implementation> {
    const ALL: &[DType] = &[DType::F32, DType::F16, DType::BF16];
    let mut all = Vec::new();
    for kv in [DType::F32, DType::F16, DType::BF16] {
        let types = Types { activations: DType::F32, kv, weights: ALL, held: None, multiples: (1, 2) };
        for level in if kv == DType::F32 { levels() } else { vec![levels()[0]] } {
            for threads in [1, 3] {
                let make = move || CpuBackend::with_level(Some(threads), level, kv).expect("a CPU");
                let name = format!("{}, K/V in {kv}", make().info().name);
                // `cpu::simd` promises the same bits wherever there is FMA; the SSE levels have none.
                let family = if name.contains("sse") { "cpu without FMA" } else { "cpu" };
                let make = Box::new(move || Box::new(make()) as Box<dyn TrainingBackend>);
                all.push(Implementation { name, types, family, rows_are_independent: true, only: |_| true, make });
            }
        }
    }
    // Whatever order threads run in, the bits are the same.
    #[cfg(feature = "emulate")]
    for (dtype, kv, kernels, weights) in [
        (DType::F32, DType::F32, Kernels::Sm80, ALL),
        (DType::F16, DType::F16, Kernels::Sm80, &ALL[1..2]),
        (DType::F16, DType::F16, Kernels::Hopper, &ALL[1..2]),
        (DType::BF16, DType::BF16, Kernels::Sm80, &ALL[2..]),
        (DType::BF16, DType::BF16, Kernels::Hopper, &ALL[2..]),
        (DType::F32, DType::BF16, Kernels::Sm80, &ALL[..1]),
        (DType::F32, DType::BF16, Kernels::Hopper, &ALL[..1]),
        (DType::BF16, DType::F16, Kernels::Sm80, &ALL[2..]),
        (DType::BF16, DType::F16, Kernels::Hopper, &ALL[2..]),
    ] {
        use crate::backend::cuda::{CudaBackend, emulated::Emulated};
        for seed in [1, 2] {
            let make = move || {
                let backend = CudaBackend::new(Box::new(Emulated::new(seed)), dtype, kv).expect("an emulator");
                backend.with_kernels(kernels).expect("all kernels")
            };
            let name = format!("{}, {kernels:?}, seed {seed}, K/V in {kv}", make().info().name);
            let types = Types { activations: dtype, kv, weights, held: Some(dtype), multiples: (8, 16) };
            let (family, only): (_, fn(AnyKind) -> bool) = match kernels {
                Kernels::Hopper => ("cuda, Hopper", has_hopper),
                _ => ("cuda", |_| true),
            };
            let make = Box::new(move || Box::new(make()) as Box<dyn TrainingBackend>);
            all.push(Implementation { name, types, family, rows_are_independent: false, only, make });
        }
    }
    all
}

/// The same, with a panic as an error.
pub(super) fn attempt(implementation: &Implementation, case: &Case) -> Result<Outcome, String> {
    let run = || perform(&mut *(implementation.make)(), case);
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or("panicked".into()))
        }
    }
}

/// Collects what fails, so that one run shows all of it: by case and what is wrong, who has it wrong.
#[derive(Default)]
pub(super) struct Failures(Vec<(String, Vec<String>)>);

impl Failures {
    pub fn check(&mut self, case: &str, implementation: &str, result: Result<(), String>) {
        let Err(text) = result else { return };
        let text = format!("{case}: {text}");
        match self.0.iter_mut().find(|(known, _)| *known == text) {
            Some((_, who)) => who.push(implementation.into()),
            None => self.0.push((text, vec![implementation.into()])),
        }
    }

    pub fn report(self) {
        let lines: Vec<_> = self.0.iter().map(|(text, who)| format!("{text} ({})", who.join("; "))).collect();
        assert!(lines.is_empty(), "{} failures:\n{}", lines.len(), lines[..lines.len().min(40)].join("\n"));
    }
}

/// Runs the cases of an op on every implementation.
fn agree(kinds: &[AnyKind]) {
    let implementations = implementations();
    let (mut failures, mut worst) = (Failures::default(), Worsts::default());
    let mut types: Vec<Types> = implementations.iter().map(|i| i.types).collect();
    types.dedup();
    for types in types {
        for &kind in kinds.iter().filter(|&&kind| types.concern(kind)) {
            let cases = cases::cases(kind, types);
            assert!(!cases.is_empty() && cases.iter().all(|case| case.op.kind() == kind), "the cases of {kind:?}");
            for case in cases {
                let expected = Expected::of(&case, types);
                let mut families: HashMap<&str, (&str, Outcome)> = HashMap::new();
                for it in implementations.iter().filter(|i| i.types == types && (i.only)(kind)) {
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
    AnyKind::all().flat_map(|op| worst.lines(op)).for_each(|line| println!("{line}"));
    failures.report();
}

#[test]
fn every_op_agrees_with_its_twin() {
    agree(&OpKind::ALL.iter().map(|&op| op.into()).collect::<Vec<_>>());
}

#[test]
fn every_backward_op_agrees_with_its_twin() {
    agree(&GradientKind::ALL.iter().map(|&op| op.into()).collect::<Vec<_>>());
}

/// The cases can be made for backends that store 16 bits, and the reference rounds as it reads back.
#[test]
fn the_reference_agrees_with_itself_in_16_bits() {
    for dtype in [DType::F16, DType::BF16] {
        let weights = &[DType::BF16, DType::F16];
        let types = Types { activations: dtype, kv: dtype, weights, held: None, multiples: (1, 2) };
        let mut failures = Failures::default();
        for case in OpKind::ALL.iter().flat_map(|&kind| cases::cases(kind.into(), types)) {
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
    let forward = [OpKind::NormGate, OpKind::Route, OpKind::ProjectAdd, OpKind::Attend].map(AnyKind::from);
    let backward = [GradientKind::SwiGluBackward, GradientKind::AttendBackward].map(AnyKind::from);
    for kind in forward.into_iter().chain(backward) {
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
        assert!(spoiled(&|o| o.meter.count_mut(kind).cost.bytes += 1).is_err(), "{}: the meter", case.name);
    }
}
