//! What a measurement is kept as. The same record is written as a table, CSV and JSON.

use serde::{Deserialize, Serialize};

use super::stats::{Stats, speedup};
use crate::backend::{Counters, Meter, Rates};

/// Of which program, model and machine a row is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Head {
    pub version: String,
    /// Of the sources, where MINDSKIP_COMMIT was set when the program was built.
    pub commit: Option<String>,
    /// UTC.
    pub date: String,
    pub cpu: String,
    pub device: String,
    /// Of NVIDIA, for a GPU.
    pub driver: Option<String>,
    pub model: String,
    pub parameters: usize,
    /// What the matrices are stored in.
    pub dtype: String,
    pub kv_dtype: String,
    /// What bf16 weights are multiplied with on a CPU.
    pub precision: String,
    pub threads: Option<usize>,
    /// Which were asked for, on a GPU.
    #[serde(default)]
    pub kernels: Option<String>,
    /// What the device does at best, see [`Rates`]: bytes and FLOPs a second.
    pub copy_rate: f64,
    pub product_rate: f64,
}

impl Head {
    /// What the device does at best: the yardstick of `of_ideal`.
    pub fn rates(&self) -> Rates {
        Rates { copy: self.copy_rate, product: self.product_rate }
    }
}

/// One way to run a model, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    #[serde(flatten)]
    pub head: Head,
    pub batch: usize,
    /// Tokens of each sequence that were in the cache before, were read in one prefill, and were decoded.
    pub depth: usize,
    pub prompt: usize,
    #[serde(rename = "gen")]
    pub generated: usize,
    /// `dense`, or the granularity.
    pub routing: String,
    /// Whose K/V a routed layer keeps, where that is a choice.
    pub keys: Option<String>,
    /// Of the random mask; None with routers.
    pub capacity: Option<f64>,
    pub routers: Option<String>,
    pub layers: Vec<usize>,
    pub seed: u64,
    pub warmup: usize,
    pub reps: usize,
    /// The share of (token, routed layer) pairs that were active.
    pub active: f64,
    /// Bytes of weights, buffers and the K/V pages held at the end.
    pub memory: u64,
    /// Bytes of the K/V pages held at the end, and of those that the dense model would hold besides.
    pub kv: u64,
    pub kv_saved: u64,
    /// From the prompt to its first token.
    pub first_token_ms: Option<f64>,
    pub prefill: Option<Phase>,
    pub decode: Option<Phase>,
}

/// Prefill, or decode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Of all sequences together, by the median.
    pub tokens_per_s: f64,
    /// From the lower to the upper quartile of the samples, as a share of the median.
    pub spread: f64,
    /// Of a prefill by its tokens, of a decode step as a whole.
    pub ms_per_token: f64,
    /// Of this way over the dense one: measured, by the ideals of both, and the first by the second.
    pub speedup: f64,
    pub ideal_speedup: f64,
    pub skip_efficiency: f64,
    /// The ideal time by the median.
    pub of_ideal: f64,
    /// What the ops needed.
    pub flops: u64,
    pub bytes: u64,
    /// What a GPU was asked for, on average: by the prefill, or by a decode step.
    pub launches: f64,
    pub replays: f64,
    pub syncs: f64,
    pub copied_bytes: f64,
    /// Seconds of each repetition.
    pub samples: Vec<f64>,
}

/// What the repetitions of a phase gave.
#[derive(Debug, Clone, Default)]
pub(super) struct Measured {
    /// Seconds.
    pub samples: Vec<f64>,
    /// Of one repetition; all do the same.
    pub meter: Meter,
    pub asked: Counters,
}

impl Phase {
    /// `steps` calls for `tokens` tokens in all.
    pub(super) fn new(own: &Measured, dense: &Measured, tokens: usize, steps: usize, rates: &Rates) -> Phase {
        let Stats { median, spread } = Stats::of(&own.samples);
        let (ideal, dense_ideal) = (rates.ideal(&own.meter), rates.ideal(&dense.meter));
        let (measured, ideal_speedup) = (speedup(&dense.samples, &own.samples), dense_ideal / ideal);
        let total = own.meter.total();
        let asked = &own.asked;
        let each = |n: u64| n as f64 / steps as f64;
        Phase {
            tokens_per_s: tokens as f64 / median,
            spread,
            ms_per_token: 1e3 * median / if steps == 1 { tokens } else { steps } as f64,
            speedup: measured,
            ideal_speedup,
            skip_efficiency: measured / ideal_speedup,
            of_ideal: ideal / median,
            flops: total.flops,
            bytes: total.bytes,
            launches: each(asked.launches),
            replays: each(asked.replays),
            syncs: each(asked.syncs),
            copied_bytes: each(asked.bytes_in + asked.bytes_out),
            samples: own.samples.clone(),
        }
    }
}

/// One op, measured by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpRow {
    #[serde(flatten)]
    pub head: Head,
    pub op: String,
    /// Rows of the step; `attend` sees `context` rows of K/V with them. Of logits there are at most 64, of draws one.
    pub rows: usize,
    pub context: usize,
    /// Microseconds of a call, by the median, and from the lower to the upper quartile as a share of it.
    pub us: f64,
    pub spread: f64,
    pub flops: u64,
    pub bytes: u64,
    pub bytes_per_s: f64,
    pub flops_per_s: f64,
    /// The ideal time by the median.
    pub of_ideal: f64,
    /// Seconds of a call.
    pub samples: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Cost, OpKind};

    /// 1 GB/s and 10 GFLOP/s. Dense: 2 s of bytes; own: 1 s of bytes, then 0.5 s of FLOPs.
    #[test]
    fn figures_follow_from_times_and_meters() {
        let rates = Rates { copy: 1e9, product: 1e10 };
        let mut dense = Measured { samples: vec![4.0, 8.0, 4.0], ..Measured::default() };
        dense.meter.add(OpKind::Logits, Cost { bytes: 2_000_000_000, flops: 1_000_000_000 });
        let mut own = Measured { samples: vec![2.0, 4.0, 2.5], ..Measured::default() };
        own.meter.add(OpKind::Logits, Cost { bytes: 1_000_000_000, flops: 1_000_000_000 });
        own.meter.add(OpKind::Attend, Cost { bytes: 0, flops: 5_000_000_000 });
        own.asked =
            Counters { launches: 10, replays: 5, syncs: 20, bytes_in: 100, bytes_out: 400, ..Counters::default() };
        let phase = Phase::new(&own, &dense, 10, 5, &rates);
        assert_eq!((phase.tokens_per_s, phase.ms_per_token), (4.0, 500.0));
        assert_eq!((phase.speedup, phase.ideal_speedup), (2.0, 2.0 / 1.5));
        assert_eq!(phase.skip_efficiency, 2.0 / (2.0 / 1.5));
        assert_eq!((phase.of_ideal, phase.spread), (1.5 / 2.5, 1.0 / 2.5));
        assert_eq!((phase.flops, phase.bytes), (6_000_000_000, 1_000_000_000));
        assert_eq!((phase.launches, phase.replays, phase.syncs, phase.copied_bytes), (2.0, 1.0, 4.0, 100.0));
        // A prefill is one step; its time is by token.
        assert_eq!(Phase::new(&own, &dense, 10, 1, &rates).ms_per_token, 250.0);
    }
}
