//! The cases on a user's own device: whether its kernels compute what they should, there and now.

use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::*;
use crate::backend::cuda::CudaBackend;
use crate::backend::cuda::device::{Device, Lent};
use crate::error::Result;

/// What became of the cases of an op in one type of activations.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub op: AnyKind,
    pub dtype: DType,
    pub kernels: Kernels,
    pub cases: usize,
    /// What is wrong, by case.
    pub failures: Vec<String>,
    /// What came nearest to its tolerance, in each type that the op writes.
    pub worst: Vec<String>,
}

/// Runs the cases of ops on a device, in f32, f16 and bf16 (the backward ones in f32), or one of `every` so many, and tells
/// `each` verdict as it comes. Ops with kernels for Hopper are run with these too where the device has compute capability
/// 9.0.
///
/// Errors: Device when a backend cannot be built there, or the device has failed for good, after the verdict on the op that
/// made it. What one case makes go wrong is a failure of its verdict.
pub fn verify(
    mut device: Box<dyn Device>,
    ops: &[AnyKind],
    every: usize,
    each: &mut dyn FnMut(&Verdict),
) -> Result<()> {
    // A build for other architectures has none of them.
    let is_hopper =
        device.description().compute_capability == (9, 0) && device.function("attend_hopper_bf16_64").is_ok();
    let device = Arc::new(Mutex::new(device));
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let weights: &'static [DType] = match dtype {
            DType::F32 => &[DType::F32, DType::F16, DType::BF16],
            DType::F16 => &[DType::F16],
            DType::BF16 => &[DType::BF16],
        };
        let types = Types { activations: dtype, kv: dtype, weights, held: Some(dtype), multiples: (8, 16) };
        for op in ops.iter().copied().filter(|&op| types.concern(op)) {
            // The twin takes longer than the device: all cores work on it.
            let cases: Vec<_> = cases::cases(op, types).into_iter().step_by(every.max(1)).collect();
            let expected: Vec<_> = cases
                .into_par_iter()
                .map(|case| {
                    let expected = Expected::of(&case, types);
                    (case, expected)
                })
                .collect();
            let hopper = is_hopper && types.kv != DType::F32 && has_hopper(op);
            for kernels in [Kernels::Sm80].into_iter().chain(hopper.then_some(Kernels::Hopper)) {
                let cases = expected.len();
                let mut verdict = Verdict { op, dtype, kernels, cases, failures: Vec::new(), worst: Vec::new() };
                let mut worst = Worsts::default();
                let mut ended = Ok(());
                for (case, expected) in &expected {
                    let backend = CudaBackend::new(Box::new(Lent::of(&device)), dtype, types.kv);
                    let mut backend = match backend.and_then(|backend| backend.with_kernels(kernels)) {
                        Ok(backend) => backend,
                        Err(error) => {
                            ended = Err(error);
                            break;
                        }
                    };
                    let result = perform(&mut backend, case).map_err(|e| e.to_string());
                    let result = result.and_then(|outcome| expected.compare(case, &outcome, &mut worst));
                    if let Err(text) = result {
                        verdict.failures.push(format!("{}: {text}", case.name));
                    }
                }
                verdict.worst = worst.lines(op).collect();
                each(&verdict);
                ended?;
            }
        }
    }
    Ok(())
}
