//! The contract between the model and the machine: a dozen fused ops over plain buffer handles.
//!
//! `model.rs` is written against [`Backend`]; a backend is chosen once, when the engine is built. Every op takes one
//! plain struct whose fields state shapes, whose `check` refuses wrong ones before anything runs, and whose `cost` says
//! how many FLOPs and bytes the op needs for the rows it really processed. Buffers are offsets into arenas that the
//! memory planner has placed (`memory.rs`): a step allocates no buffers, and handles are `Copy`.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod gradients;
mod noise;
mod ops;
mod rates;
#[cfg(any(test, feature = "cuda"))]
mod twin;

use std::ops::Range;
use std::str::FromStr;

use crate::error::{Error, Kind, Result};
use crate::tensor::{DType, Tensor};

pub use gradients::*;
pub use noise::Noise;
pub(crate) use noise::mix;
pub use ops::*;
pub use rates::Rates;

/// A weight held by a backend: matrices as `[out, in]`, row-major, in their stored dtype; vectors as `[1, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    /// The index that the backend gave it: 0, 1, 2, … in the order of the uploads.
    pub id: usize,
    pub rows: usize,
    pub cols: usize,
    pub dtype: DType,
}

/// A row-major matrix `[rows, cols]` in the activation arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mat {
    /// Bytes from the start of the arena, a multiple of [`ALIGN`] for whole buffers.
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
    pub dtype: DType,
}

/// Alignment of buffers in the arenas, in bytes: a cache line, and what 16-byte vector access and TMA ask for.
pub const ALIGN: usize = 128;

impl Mat {
    /// The rows `range` of this matrix.
    pub fn rows(self, range: Range<usize>) -> Mat {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let offset = self.offset + range.start * self.cols * self.dtype.size();
        Mat { offset, rows: range.len(), ..self }
    }

    pub fn bytes(self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }
}

/// A run of u32 values in the integer arena: token ids, positions, row indices, counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ints {
    /// Elements from the start of the arena.
    pub offset: usize,
    pub len: usize,
}

impl Ints {
    pub fn slice(self, range: Range<usize>) -> Ints {
        assert!(range.start <= range.end && range.end <= self.len, "ints {range:?} of {}", self.len);
        Ints { offset: self.offset + range.start, len: range.len() }
    }
}

/// The rows an op works on: `index[0..n]`, ascending row numbers of the residual stream.
///
/// In prefill the host knows n, it is `bound`. In decode it stays on the device: n is read there from `count` and the host
/// only knows that n <= bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSet {
    /// `[bound]`
    pub index: Ints,
    pub bound: usize,
    /// `[1]`, or None when n is `bound`.
    pub count: Option<Ints>,
    /// Where the host knows that the rows are `run`, `run + 1`, …: products then need no gathering and scattering.
    pub run: Option<usize>,
}

impl RowSet {
    /// All of `index`.
    pub fn exact(index: Ints) -> RowSet {
        RowSet { index, bound: index.len, count: None, run: None }
    }
}

/// Rows of one page of the KV cache.
pub const PAGE: usize = 64;

/// The shape of the KV pool: pages of [`PAGE`] rows shared by all layers and sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    pub layers: usize,
    /// Sequences that can be open at a time.
    pub slots: usize,
    /// Pages in the pool.
    pub pages: usize,
    /// Longest page table of a (layer, sequence).
    pub pages_per_seq: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: DType,
}

impl KvLayout {
    /// Bytes of one page: K, V and the original position (u32) of [`PAGE`] rows.
    pub fn page_bytes(&self) -> usize {
        PAGE * (2 * self.kv_heads * self.head_dim * self.dtype.size() + 4)
    }
}

/// The largest steps of a run: what a backend needs room for beside the buffers of the plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Largest {
    /// Rows of a step, and rows that pass an op together.
    pub rows: usize,
    pub chunk: usize,
    pub hidden: usize,
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    pub vocab: usize,
}

/// What a backend runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// For people: "cpu, 2 threads, avx512".
    pub name: String,
    /// Bytes free for weights, activations and K/V; None when it could not be found out.
    pub free_memory: Option<u64>,
    /// Storage of normalised rows, projections and MLP activations. The residual stream is f32 everywhere.
    pub activations: DType,
    /// Storage of the KV cache.
    pub kv: DType,
    /// What matrices are stored in when they are not read in place, as they are.
    pub weights: Option<DType>,
    /// Rows that should pass a layer together in prefill.
    pub chunk: usize,
}

/// What the CPU multiplies bf16 weights with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Inputs in f32.
    #[default]
    F32,
    /// Inputs rounded to bf16, as PyTorch and llama.cpp do: twice as fast on processors that multiply bf16 themselves.
    /// Weights in f16 and f32 are multiplied in f32 all the same.
    Bf16,
}

impl FromStr for Precision {
    type Err = Error;
    /// `f32`, `bf16`. Errors: Argument.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err(Error::new(Kind::Argument, format!("no such precision: {text}")).action("give f32 or bf16")),
        }
    }
}

/// Which kernels a GPU runs where there are several for an op.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Kernels {
    /// [`Hopper`](Self::Hopper) on compute capability 9.0, [`Sm80`](Self::Sm80) elsewhere.
    #[default]
    Auto,
    /// For compute capability 8.0 and up.
    Sm80,
    /// Attention of many rows by wgmma and TMA, on compute capability 9.0, in f16 and bf16 with a head_dim of 64 or 128;
    /// the others for the rest.
    Hopper,
}

impl FromStr for Kernels {
    type Err = Error;
    /// `auto`, `sm80`, `hopper`. Errors: Argument.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Kernels::Auto),
            "sm80" => Ok(Kernels::Sm80),
            "hopper" => Ok(Kernels::Hopper),
            _ => {
                Err(Error::new(Kind::Argument, format!("no such kernels: {text}")).action("give auto, sm80 or hopper"))
            }
        }
    }
}

/// FLOPs and bytes an op needs: multiply-adds count two, every operand is moved once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    pub flops: u64,
    pub bytes: u64,
}

/// What an op did, for a step's accounts: calls, FLOPs and bytes by op, rows appended to the KV cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meter {
    pub ops: [OpCount; OpKind::COUNT],
    pub gradients: [OpCount; GradientKind::COUNT],
    pub kv_rows: u64,
}

/// One op's share of a [`Meter`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpCount {
    pub calls: u64,
    pub cost: Cost,
}

impl OpCount {
    fn add(&mut self, cost: Cost) {
        self.calls += 1;
        self.cost = self.cost + cost;
    }
}

impl Meter {
    pub fn add(&mut self, op: impl Into<AnyKind>, cost: Cost) {
        self.count_mut(op.into()).add(cost);
    }

    pub fn count_mut(&mut self, op: AnyKind) -> &mut OpCount {
        match op {
            AnyKind::Forward(op) => &mut self.ops[op as usize],
            AnyKind::Backward(op) => &mut self.gradients[op as usize],
        }
    }

    pub fn total(&self) -> Cost {
        self.ops.iter().chain(&self.gradients).fold(Cost::default(), |sum, op| sum + op.cost)
    }
}

/// What a device was asked for since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Kernels and products that were sent one by one.
    pub launches: u64,
    /// Recorded runs that were sent again, and recordings that are held.
    pub replays: u64,
    pub recordings: u64,
    /// Times the host waited for the device.
    pub syncs: u64,
    /// Copies from and to the host, and their bytes.
    pub copies_in: u64,
    pub bytes_in: u64,
    pub copies_out: u64,
    pub bytes_out: u64,
    pub allocations: u64,
}

/// A device with memory, a KV pool and the [`Ops`].
pub trait Backend: Ops + Send {
    fn info(&self) -> &DeviceInfo;

    /// Takes a weight over. The CPU reads it in place; a GPU copies it.
    fn upload(&mut self, tensor: &Tensor) -> Result<Weight>;

    /// Makes a weight of random numbers, which is what `upload` of [`Noise::tensor`] gives, bit for bit.
    /// Errors: Unsupported for a matrix in another type than the device's.
    fn random(&mut self, dtype: DType, rows: usize, cols: usize, noise: Noise) -> Result<Weight> {
        self.upload(&noise.tensor(dtype, rows, cols)?)
    }

    /// Bytes that the ops need beside their buffers, for steps up to the largest.
    /// Errors: Unsupported for shapes that it does not take.
    fn workspace(&self, largest: &Largest, kv: &KvLayout) -> Result<usize> {
        let _ = (largest, kv);
        Ok(0)
    }

    /// Allocates the arenas (bytes of activations, u32 elements), the workspace and the KV pool. Called once.
    /// Errors: Memory when they cannot be had.
    fn reserve(&mut self, arena_bytes: usize, ints: usize, workspace: usize, kv: &KvLayout) -> Result<()>;

    /// Copies host values into the integer arena; `values` fill `to` from its start.
    fn write_ints(&mut self, to: Ints, values: &[u32]) -> Result<()>;

    /// Copies f32 values into an f32 matrix, from its start.
    fn write_floats(&mut self, to: Mat, values: &[f32]) -> Result<()>;

    /// Waits for the ops so far and copies `from` to the host.
    fn read_ints(&mut self, from: Ints, to: &mut [u32]) -> Result<()>;

    /// Waits for the ops so far and copies an f32 matrix to the host.
    fn read_floats(&mut self, from: Mat, to: &mut [f32]) -> Result<()>;

    /// Sets the pages of (layer, slot) from `first` on.
    fn kv_pages(&mut self, layer: usize, slot: usize, first: usize, pages: &[u32]) -> Result<()>;

    /// Sets the number of rows that (layer, slot) holds. Ops advance it by themselves ([`Route`]); the host sets it when a
    /// sequence opens or is rolled back.
    fn kv_len(&mut self, layer: usize, slot: usize, rows: usize) -> Result<()>;

    /// Runs the ops of one step. A backend may record `body` the first time and replay it for the same key, so `body`
    /// only issues ops and reads nothing back, unless `key` is None.
    fn step(
        &mut self,
        key: Option<StepKey>,
        body: &mut (dyn FnMut(&mut dyn Backend) -> Result<()> + Send),
    ) -> Result<()>;

    /// Forgets the steps that were recorded: what a step does has changed.
    fn forget(&mut self) -> Result<()> {
        Ok(())
    }

    /// Measures what the device can do at best, with products of `dtype`. Takes memory for it that is only given back with
    /// the backend, so this asks for a backend of its own.
    fn rates(&mut self, dtype: DType) -> Result<Rates>;

    fn meter(&mut self) -> &mut Meter;

    /// What a device was asked for; nothing on the CPU.
    fn counters(&self) -> Counters {
        Counters::default()
    }
}

/// A backend that also goes backward.
pub trait TrainingBackend: Backend + Gradients {
    /// Runs the ops of one training step; see [`Backend::step`].
    fn train(&mut self, body: &mut (dyn FnMut(&mut dyn TrainingBackend) -> Result<()> + Send)) -> Result<()>;

    /// [`Backend::workspace`] of training steps, in which all rows pass attention together and chunks of them the rest.
    fn training_workspace(&self, largest: &Largest, kv: &KvLayout) -> Result<usize> {
        self.workspace(largest, kv)
    }

    /// Gives an f32 vector that was uploaded other values: the routers, between two steps.
    fn replace(&mut self, vector: Weight, values: &[f32]) -> Result<()>;
}

/// The score behind a router logit.
pub fn sigmoid(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

/// The logit of a sequence: the mean over its tokens, as mean(h)·r = mean(h·r). Summed in f64.
pub fn mean(logits: &[f32]) -> f32 {
    (logits.iter().map(|&x| f64::from(x)).sum::<f64>() / logits.len() as f64) as f32
}

/// How many of `rows` rows a share takes: ceil(share·rows), where what the rounding of the share to f32 adds does not count,
/// so that 0.3 of 10 are 3.
pub fn top_count(share: f32, rows: usize) -> usize {
    let wanted = f64::from(share) * (1.0 - f64::from(f32::EPSILON)) * rows as f64;
    (wanted.ceil() as usize).min(rows)
}

/// What makes two steps issue the same ops over the same buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepKey {
    /// Rows of the step, one for each sequence.
    pub rows: usize,
    pub next: Next,
}

/// What a step leaves behind for each sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Next {
    Logits,
    /// The best token, too.
    Greedy,
    /// A token that was drawn, too.
    Drawn,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A share that was written as p/q takes p of q rows: rounding it to f32 adds no row.
    #[test]
    fn shares_of_rows_are_exact() {
        for q in 1..=200usize {
            for p in 0..=q {
                for times in [1, 2, 3, 7, 50] {
                    let share = (p as f64 / q as f64) as f32;
                    assert_eq!(top_count(share, q * times), p * times, "{p}/{q} of {}", q * times);
                }
            }
        }
        assert_eq!([0.01, 0.34, 0.5, 1.0, 2.0].map(|share| top_count(share, 3)), [1, 2, 2, 3, 3]);
        assert_eq!(top_count(0.5, 0), 0);
        assert_eq!(top_count(-0.5, 3), 0);
    }
}
