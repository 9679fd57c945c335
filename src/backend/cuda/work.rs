//! The accounts of a device that nobody waits for: kernels add up what they really did, and the host makes FLOPs and bytes
//! of it when it is asked.
//!
//! An op whose rows the host does not know takes a slot of counters. As costs are linear in the rows but for the weights,
//! which are read when there are rows at all, the sums over many calls are enough.

use super::device::{Address, Device};
use super::kernels::WorkCount;
use crate::backend::{AnyKind, AnyOp, Cost, Meter, OpKind, Work};
use crate::error::{Result, ensure};

/// Slots of counters; when they are used up the host collects them, which waits for the device.
const SLOTS: usize = 4096;

pub struct Accounts {
    counts: Address,
    /// The op of each slot in use.
    ops: Vec<AnyOp>,
    /// Slots below this one belong to recorded steps. All of these issue the same ops in the same order, so they share them.
    kept: usize,
    /// While a step is recorded: its next slot.
    recording: Option<usize>,
    pub meter: Meter,
}

impl Accounts {
    pub fn new(device: &mut dyn Device) -> Result<Self> {
        let bytes = SLOTS * size_of::<WorkCount>();
        let counts = device.allocate(bytes)?;
        device.clear(counts, bytes)?;
        Ok(Accounts { counts, ops: Vec::with_capacity(SLOTS), kept: 0, recording: None, meter: Meter::default() })
    }

    /// Counters for a call of `op`, and the call itself noted.
    pub fn slot(&mut self, device: &mut dyn Device, op: AnyOp) -> Result<*mut WorkCount> {
        let slot = self.recording.unwrap_or(self.ops.len());
        if slot == SLOTS && self.recording.is_none() {
            self.collect(device)?;
        }
        let slot = self.recording.unwrap_or(self.ops.len());
        ensure!(slot < SLOTS, Memory, "a recorded step of more than {SLOTS} ops");
        match self.ops.get(slot) {
            Some(held) => ensure!(held.kind() == op.kind(), Shape, "a step that is not like the one recorded before"),
            None => self.ops.push(op),
        }
        if let Some(next) = &mut self.recording {
            *next += 1;
        }
        self.meter.add(op.kind(), Cost::default());
        Ok(self.counts.plus(slot * size_of::<WorkCount>()).0 as *mut WorkCount)
    }

    /// Slots are those of a recorded step from here on; what was counted so far is collected.
    pub fn begin_record(&mut self, device: &mut dyn Device) -> Result<()> {
        self.collect(device)?;
        self.recording = Some(0);
        Ok(())
    }

    pub fn end_record(&mut self, recorded: bool) {
        if let Some(used) = self.recording.take().filter(|_| recorded) {
            self.kept = self.kept.max(used);
        }
        self.ops.truncate(self.kept);
    }

    /// Collects, and gives up the slots of recorded steps, which are not sent again.
    pub fn forget(&mut self, device: &mut dyn Device) -> Result<()> {
        self.collect(device)?;
        self.ops.clear();
        self.kept = 0;
        Ok(())
    }

    /// Waits for the device and adds what its counters hold to the meter.
    pub fn collect(&mut self, device: &mut dyn Device) -> Result<()> {
        if self.ops.is_empty() {
            return Ok(());
        }
        let mut counts = vec![[0u64; 5]; self.ops.len()];
        device.copy_out(self.counts, bytemuck::cast_slice_mut(&mut counts))?;
        device.clear(self.counts, size_of_val(&counts[..]))?;
        for (op, &[row_calls, rows, kv_calls, kv_rows, pairs]) in self.ops.iter().zip(&counts) {
            let of = |rows, kv_rows, pairs| op.cost(Work { rows, kv_rows, pairs });
            let parts = [
                sum([of(1, 0, 0), of(2, 0, 0)], row_calls, rows),
                sum([of(0, 1, 0), of(0, 2, 0)], kv_calls, kv_rows),
                sum([of(0, 0, 1), of(0, 0, 2)], 0, pairs),
            ];
            let total = &mut self.meter.count_mut(op.kind()).cost;
            *total = parts.into_iter().fold(*total, |a, b| a + b);
            if op.kind() == AnyKind::Forward(OpKind::RopeAppend) {
                self.meter.kv_rows += kv_rows;
            }
        }
        self.ops.truncate(self.kept);
        Ok(())
    }
}

/// The cost of `calls` calls with `n` rows in all, from those of calls with one row and with two.
fn sum([one, two]: [Cost; 2], calls: u64, n: u64) -> Cost {
    let part = |one: u64, two: u64| {
        let each = two - one;
        calls * (one - each) + n * each
    };
    Cost { flops: part(one.flops, two.flops), bytes: part(one.bytes, two.bytes) }
}
