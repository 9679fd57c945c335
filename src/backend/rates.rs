//! What a device can do at best, measured: the yardstick of the bench.

use std::time::{Duration, Instant};

use super::{Cost, Meter};
use crate::error::Result;

/// How fast a device moves and multiplies numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Bytes a second, read and written together, of a large copy.
    pub copy: f64,
    /// FLOPs a second of a large product.
    pub product: f64,
}

impl Rates {
    /// Seconds that an op takes at best: it moves its bytes and makes its FLOPs at the same time.
    pub fn seconds(&self, cost: Cost) -> f64 {
        (cost.bytes as f64 / self.copy).max(cost.flops as f64 / self.product)
    }

    /// Seconds for all that a meter counted, one kind of op after the other.
    pub fn ideal(&self, meter: &Meter) -> f64 {
        meter.ops.iter().map(|op| self.seconds(op.cost)).sum()
    }
}

/// The shortest time that is measured, and for how long measuring goes on.
const SHORTEST: Duration = Duration::from_millis(10);
const WHILE: Duration = Duration::from_millis(200);

/// Seconds of a call at best, where `run(n)` makes n calls and waits for them.
pub(super) fn best(run: &mut dyn FnMut(u32) -> Result<()>) -> Result<f64> {
    run(1)?;
    let (start, mut calls, mut samples, mut best) = (Instant::now(), 1, 0, f64::INFINITY);
    while samples < 5 || start.elapsed() < WHILE {
        let begun = Instant::now();
        run(calls)?;
        let took = begun.elapsed();
        if took < SHORTEST && calls < 1 << 16 {
            calls *= 2;
            continue;
        }
        best = best.min(took.as_secs_f64() / f64::from(calls));
        samples += 1;
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::OpKind;

    /// 4 GB/s and 10 GFLOP/s: each op is bound by what takes longer, and they follow each other.
    #[test]
    fn ops_take_the_longer_of_bytes_and_flops() {
        let rates = Rates { copy: 4e9, product: 10e9 };
        let mut meter = Meter::default();
        meter.add(OpKind::Logits, Cost { bytes: 8_000_000_000, flops: 10_000_000_000 }); // 2 s of bytes, 1 s of FLOPs
        assert_eq!(rates.ideal(&meter), 2.0);
        meter.add(OpKind::Qkv, Cost { bytes: 4_000_000_000, flops: 30_000_000_000 }); // 1 s and 3 s
        assert_eq!(rates.ideal(&meter), 5.0);
        meter.add(OpKind::Qkv, Cost { bytes: 400_000_000, flops: 0 }); // 1.1 s and 3 s
        assert_eq!(rates.ideal(&meter), 5.0);
        assert_eq!(rates.ideal(&Meter::default()), 0.0);
    }

    #[test]
    fn the_best_of_many_calls_counts() {
        let mut calls = 0;
        let seconds = best(&mut |n| {
            calls += n;
            std::thread::sleep(Duration::from_millis(12) * n);
            Ok(())
        });
        let seconds = seconds.unwrap();
        assert!((0.012..0.5).contains(&seconds), "{seconds}");
        assert!(calls >= 6, "{calls}");
    }
}
