//! Every op of the contract against its naive twin: one test body, the same awkward cases, every implementation.
//!
//! A [`Case`] is data: the bytes of both arenas, weights, K/V pages, and ops to run. [`Reference`] runs it in f64 and notes
//! what it wrote. An implementation must give the same within [`tolerance`], have left alone every other byte of both
//! arenas (what is no input is poisoned before), and have done the work that the reference counts.

mod cases;
mod cases_gradients;
mod cases_kv;
#[cfg(test)]
mod contract;
mod reference;
#[cfg(test)]
mod rows;
mod setup;
#[cfg(test)]
mod tests;
#[cfg(feature = "cuda")]
mod verify;

use std::collections::HashMap;

use super::*;
use reference::{Reference, load};
use setup::Case;
#[cfg(feature = "cuda")]
pub use verify::{Verdict, verify};

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

    /// Whether an op has something to do with these types that it does not have where K/V are as the activations.
    fn concern(&self, op: AnyKind) -> bool {
        match op {
            AnyKind::Forward(op) => self.kv == self.activations || matches!(op, OpKind::RopeAppend | OpKind::Attend),
            AnyKind::Backward(_) => self.trains(),
        }
    }

    /// Whether the backward ops take them.
    fn trains(&self) -> bool {
        (self.activations, self.kv) == (DType::F32, DType::F32)
    }
}

/// Whether an op has kernels of its own with [`Kernels::Hopper`].
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn has_hopper(op: AnyKind) -> bool {
    op == AnyKind::Forward(OpKind::Attend)
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
fn tolerance(op: AnyKind, dtype: DType) -> Tolerance {
    let op = match op {
        AnyKind::Forward(op) => op,
        AnyKind::Backward(op) => {
            let error = gradient_error(op);
            return Tolerance { atol: error, rtol: error };
        }
    };
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
        OpKind::Logits => 1.5e-6, // 3.3e-7, at k = 577; tensor cores of an H100, which cut off what they add: 1.01e-6
        OpKind::LogProbs => 4e-7, // 1.0e-7
        OpKind::Sample => 0.0,    // the same tokens
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

/// The same for the backward ops, which write f32 alone; measured on the CPU and on the emulator.
fn gradient_error(op: GradientKind) -> f64 {
    match op {
        GradientKind::CopyRows => 0.0,        // 0: a copy
        GradientKind::Loss => 1e-6,           // 3.0e-7
        GradientKind::BackProject => 4e-6,    // 2.1e-6, at 513 rows of a weight, without FMA
        GradientKind::NormBackward => 1e-6,   // 2.4e-7
        GradientKind::SwiGluKept => 1e-6,     // as SwiGluBackward, which it is the beginning of
        GradientKind::SwiGluBackward => 1e-6, // 2.9e-7
        GradientKind::AttendBackward => 1e-5, // 3.8e-6: a difference of products, with scores about 10
        GradientKind::RopeBackward => 6e-7,   // 1.9e-7
        GradientKind::AttendApart => 1.5e-6,  // 4.1e-7
        GradientKind::RowDots => 6e-7,        // 1.6e-7
        GradientKind::GateBackward => 1e-6,   // 2.7e-7
    }
}

/// What a case left behind.
struct Outcome {
    halves: Vec<u16>,
    ints: Vec<u32>,
    meter: Meter,
}

/// Runs a case on a fresh backend.
fn perform(be: &mut dyn TrainingBackend, case: &Case) -> Result<Outcome> {
    for (id, (tensor, noise)) in case.tensors.iter().enumerate() {
        let held = be.info().weights.filter(|_| tensor.rows > 1).unwrap_or(tensor.dtype);
        let expected = Weight { id, rows: tensor.rows, cols: tensor.cols, dtype: held };
        let weight = match noise {
            None => be.upload(tensor)?,
            Some(noise) => be.random(tensor.dtype, tensor.rows, tensor.cols, *noise)?,
        };
        assert_eq!(weight, expected, "a backend numbers its weights from 0");
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
    be.train(&mut |be| case.ops().try_for_each(|op| op.run(be)))?;
    let mut after = vec![0; case.ints.len()];
    be.read_ints(ints, &mut after)?;
    be.read_floats(arena, &mut words)?;
    Ok(Outcome { halves: bytemuck::cast_slice::<f32, u16>(&words).to_vec(), ints: after, meter: be.meter().clone() })
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
                // Attention is as good as the K/V.
                let kv = case.kv.dtype;
                let narrow = op == AnyKind::Forward(OpKind::Attend) && kv.size() < mat.dtype.size();
                let Tolerance { atol, rtol } = tolerance(op, if narrow { kv } else { mat.dtype });
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
struct Worsts(HashMap<(AnyKind, DType), Worst>);

struct Worst {
    /// Of the tolerance.
    ratio: f64,
    actual: f64,
    expected: f64,
    case: String,
}

impl Worsts {
    fn note(&mut self, op: AnyKind, dtype: DType, ratio: f64, actual: f64, expected: f64, case: impl Fn() -> String) {
        let make = || Worst { ratio: -1.0, actual, expected, case: String::new() };
        let worst = self.0.entry((op, dtype)).or_insert_with(make);
        if ratio > worst.ratio {
            *worst = Worst { ratio, actual, expected, case: case() };
        }
    }

    /// A line for what an op has written in each type.
    fn lines(&self, op: AnyKind) -> impl Iterator<Item = String> {
        self.0.iter().filter(move |((o, _), _)| *o == op).map(|((op, dtype), w)| {
            let error = (w.actual - w.expected).abs();
            let Worst { ratio, expected, case, .. } = w;
            format!("{op:?} {dtype}: {ratio:.3} of the tolerance, |a - b| = {error:.2e} at b = {expected:.3e}, {case}")
        })
    }
}
