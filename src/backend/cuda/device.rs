//! What the CUDA backend asks of a device: memory, launches on one stream, products, recorded steps. A GPU's driver does it
//! (`driver`), or the emulator (`emulated`); the backend does not know which.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use crate::backend::Counters;
use crate::error::Result;
use crate::tensor::DType;

/// An address in the device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Address {
    pub fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// A kernel that was found by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function(pub usize);

/// A recorded run of launches and products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Graph(pub usize);

/// Puts a recording into the first free place of a device's.
pub fn keep<T>(graphs: &mut Vec<Option<T>>, recording: T) -> Graph {
    let free = graphs.iter().position(Option::is_none).unwrap_or_else(|| {
        graphs.push(None);
        graphs.len() - 1
    });
    graphs[free] = Some(recording);
    Graph(free)
}

/// The geometry of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks; a launch with a 0 among them does nothing.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// A product of dense rows: `out = src · weightᵀ`, or added to what `out` holds. Row-major without gaps, f32 accumulation.
/// Backward it is `src · weight`: from the gradient behind a projection to the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemm {
    /// `[n, k]`; backward `[k, n]`
    pub weight: Address,
    /// `[m, k]`
    pub src: Address,
    /// `[m, n]`
    pub out: Address,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Of `weight` and `src`.
    pub dtype: DType,
    /// Of `out`: `dtype` or f32.
    pub out_dtype: DType,
    pub add: bool,
    pub backward: bool,
}

/// A row-major matrix of 16-bit numbers in the device's memory, and the box of it that a TMA copy takes, swizzled within 128
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boxed {
    pub at: Address,
    pub rows: usize,
    pub cols: usize,
    /// F16 or BF16.
    pub dtype: DType,
    /// `[rows, cols]` of the box.
    pub of: [u32; 2],
}

/// What stands in a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// "NVIDIA H200".
    pub name: String,
    /// 9.0 is (9, 0).
    pub compute_capability: (u32, u32),
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub shared_per_block: u32,
    /// Bytes in all, and free when the device was opened.
    pub memory: u64,
    pub free_memory: u64,
}

/// A device with one stream: what is asked of it happens in order. What runs there may fail later; the next call that
/// waits reports it.
pub trait Device: Send {
    fn description(&self) -> &Description;

    /// Errors: Device when no module has it.
    fn function(&mut self, name: &str) -> Result<Function>;

    /// Memory that is freed with the device. Errors: Memory.
    fn allocate(&mut self, bytes: usize) -> Result<Address>;

    /// A tensor map for TMA, as a kernel's arguments hold it. Errors: Device for what the hardware does not take.
    fn tensor_map(&mut self, matrix: &Boxed) -> Result<[u64; 16]>;

    /// Copies from the host; `bytes` may be changed when this returns.
    fn copy_in(&mut self, to: Address, bytes: &[u8]) -> Result<()>;

    /// Waits for all that was asked for so far and copies to the host.
    fn copy_out(&mut self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Copies within the device, between places that do not overlap.
    fn copy(&mut self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Fills with zeros.
    fn clear(&mut self, at: Address, bytes: usize) -> Result<()>;

    /// Launches `function` with the argument struct at `args` of `size` bytes, which is copied.
    ///
    /// # Safety
    /// `args` points to the argument struct of this kernel, and its addresses to memory of this device that is as large
    /// as the kernel takes it to be.
    #[allow(unsafe_code)]
    unsafe fn launch(&mut self, function: Function, launch: Launch, args: *const c_void, size: usize) -> Result<()>;

    /// # Safety
    /// The addresses point to memory of this device that is large enough.
    #[allow(unsafe_code)]
    unsafe fn gemm(&mut self, gemm: &Gemm) -> Result<()>;

    /// From here on launches and products are recorded instead of run, until [`end_record`](Self::end_record).
    fn begin_record(&mut self) -> Result<()>;

    /// What was recorded; nothing of it has run yet.
    fn end_record(&mut self) -> Result<Graph>;

    /// Runs a recording.
    fn replay(&mut self, graph: Graph) -> Result<()>;

    /// Frees a recording, which may still run. Its number may be that of another one afterwards.
    fn forget(&mut self, graph: Graph) -> Result<()>;

    fn counters(&self) -> Counters;

    /// Waits, and frees all memory and recordings that were handed out: what comes next starts anew. Kernels stay found.
    fn release(&mut self) -> Result<()>;
}

/// A device that is used by one backend after the other, without being opened anew. It is released with its user.
pub struct Lent {
    device: Arc<Mutex<Box<dyn Device>>>,
    description: Description,
}

impl Lent {
    pub fn of(device: &Arc<Mutex<Box<dyn Device>>>) -> Self {
        let description = device.lock().unwrap_or_else(PoisonError::into_inner).description().clone();
        Lent { device: device.clone(), description }
    }

    fn device(&self) -> MutexGuard<'_, Box<dyn Device>> {
        // A panic elsewhere has broken nothing that the device would not report itself.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // The next user is told of what is broken.
        let _ = self.device().release();
    }
}

impl Device for Lent {
    fn description(&self) -> &Description {
        &self.description
    }

    fn function(&mut self, name: &str) -> Result<Function> {
        self.device().function(name)
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        self.device().allocate(bytes)
    }

    fn tensor_map(&mut self, matrix: &Boxed) -> Result<[u64; 16]> {
        self.device().tensor_map(matrix)
    }

    fn copy_in(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        self.device().copy_in(to, bytes)
    }

    fn copy_out(&mut self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.device().copy_out(from, bytes)
    }

    fn copy(&mut self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.device().copy(to, from, bytes)
    }

    fn clear(&mut self, at: Address, bytes: usize) -> Result<()> {
        self.device().clear(at, bytes)
    }

    #[allow(unsafe_code)]
    unsafe fn launch(&mut self, function: Function, launch: Launch, args: *const c_void, size: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device().launch(function, launch, args, size) }
    }

    #[allow(unsafe_code)]
    unsafe fn gemm(&mut self, gemm: &Gemm) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device().gemm(gemm) }
    }

    fn begin_record(&mut self) -> Result<()> {
        self.device().begin_record()
    }

    fn end_record(&mut self) -> Result<Graph> {
        self.device().end_record()
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.device().replay(graph)
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.device().forget(graph)
    }

    fn counters(&self) -> Counters {
        self.device().counters()
    }

    fn release(&mut self) -> Result<()> {
        self.device().release()
    }
}
