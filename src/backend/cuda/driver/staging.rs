//! Pinned host memory that every copy passes through: the device reads and writes only such memory on its own time.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

use super::status::{Owned, check};
use crate::error::Result;

/// Bytes of one half of the way in. While the device reads one half the host fills the other.
pub(super) const HALF: usize = 8 << 20;
/// Bytes of the way out: the logits of a few rows.
pub(super) const LANDING: usize = 2 << 20;
/// Pieces start at multiples of this, as the copy engines like it.
const STEP: usize = 256;

/// The way in is two halves that are filled in turns, the way out a landing place behind them.
pub(super) struct Staging {
    memory: Owned<*mut c_void>,
    /// Recorded when a half was full: the device has read it once the event is over.
    read: [Owned<CUevent>; 2],
    /// The half being filled, and how much of it is.
    half: usize,
    used: usize,
}

impl Staging {
    /// In the current context.
    pub fn new() -> Result<Staging> {
        let mut memory = ptr::null_mut();
        // SAFETY: writes one pointer; the memory is given back by `Owned`.
        check(unsafe { sys::cuMemHostAlloc(&mut memory, 2 * HALF + LANDING, 0) }, "allocating pinned memory")?;
        let memory = Owned(memory, sys::cuMemFreeHost as unsafe fn(*mut c_void) -> CUresult);
        Ok(Staging { memory, read: [event()?, event()?], half: 0, used: 0 })
    }

    /// Takes as much of `bytes` as there is room for; returns where it stands, how much it is, and whether the host had to
    /// wait for the device. `Err` is the status of a call that failed.
    pub fn take(&mut self, bytes: &[u8], stream: CUstream) -> Result<(*const c_void, usize, bool), CUresult> {
        let mut waited = false;
        if self.used == HALF {
            // SAFETY: events and stream belong to the current context. An event that was never recorded counts as over.
            unsafe {
                ok(sys::cuEventRecord(self.read[self.half].0, stream))?;
                self.half = 1 - self.half;
                match sys::cuEventQuery(self.read[self.half].0) {
                    CUresult::CUDA_SUCCESS => {}
                    CUresult::CUDA_ERROR_NOT_READY => {
                        waited = true;
                        ok(sys::cuEventSynchronize(self.read[self.half].0))?;
                    }
                    status => return Err(status),
                }
            }
            self.used = 0;
        }
        let len = bytes.len().min(HALF - self.used);
        // SAFETY: `half * HALF + used + len` lies within the way in, no reference to that memory exists, and the device no
        // longer reads this part: it was waited for when this half's turn came.
        let at = unsafe {
            let at = self.memory.0.cast::<u8>().add(self.half * HALF + self.used);
            ptr::copy_nonoverlapping(bytes.as_ptr(), at, len);
            at
        };
        self.used = (self.used + len).next_multiple_of(STEP);
        Ok((at.cast_const().cast(), len, waited))
    }

    /// Nothing that was taken is still being read: the stream was waited for.
    pub fn all_read(&mut self) {
        self.used = 0;
    }

    /// Where `LANDING` bytes from the device may be put.
    pub fn landing(&self) -> *mut c_void {
        // SAFETY: the landing place lies behind the two halves, in the same allocation.
        unsafe { self.memory.0.cast::<u8>().add(2 * HALF).cast() }
    }

    /// Copies what has landed. The stream must have been waited for.
    pub fn landed(&self, to: &mut [u8]) {
        assert!(to.len() <= LANDING);
        // SAFETY: the landing place has `LANDING` bytes, pinned memory comes from the driver and is initialised, and the
        // device does not write to it any more.
        unsafe { ptr::copy_nonoverlapping(self.landing().cast::<u8>(), to.as_mut_ptr(), to.len()) };
    }
}

fn event() -> Result<Owned<CUevent>> {
    let mut event = ptr::null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: writes one handle, which is given back by `Owned`.
    check(unsafe { sys::cuEventCreate(&mut event, flags) }, "making an event")?;
    Ok(Owned(event, sys::cuEventDestroy_v2))
}

fn ok(status: CUresult) -> Result<(), CUresult> {
    if status == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(status) }
}
