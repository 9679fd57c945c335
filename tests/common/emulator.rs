//! Launches of kernels on the emulator, as Rust sees it through cuda/emulator/emulator.h.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mindskip as _; // brings the library of kernels

unsafe extern "C" {
    fn emu_kernel(name: *const c_char) -> *const c_void;
    fn emu_launch(
        kernel: *const c_void,
        grid: *const u32,
        threads: u32,
        shared: u32,
        args: *const c_void,
        args_size: usize,
        error: *mut c_char,
        error_room: usize,
    ) -> c_int;
    fn emu_seed(seed: u64);
    fn emu_alloc(size: usize) -> *mut c_void;
    fn emu_free(buffer: *mut c_void);
    fn emu_tensor_map(
        map: *mut u64,
        base: *const c_void,
        rows: u64,
        columns: u64,
        element: u32,
        box_rows: u32,
        box_columns: u32,
    ) -> c_int;
}

/// Numbers in device memory.
pub struct Buffer<T: Copy>(*mut T, usize);

impl<T: Copy> Buffer<T> {
    pub fn new(len: usize) -> Self {
        // SAFETY: any size may be asked for.
        let at = unsafe { emu_alloc(len * size_of::<T>()) };
        assert!(!at.is_null() && at.addr().is_multiple_of(256));
        Buffer(at.cast(), len)
    }
    pub fn of(values: &[T]) -> Self {
        let buffer = Self::new(values.len());
        // SAFETY: the buffer is as long.
        unsafe { buffer.0.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        buffer
    }
    /// Of numbers only, for which unwritten memory is a value too.
    pub fn get(&self) -> &[T] {
        // SAFETY: emu_alloc has filled all of it.
        unsafe { std::slice::from_raw_parts(self.0, self.1) }
    }
}

impl<T: Copy> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: it came from emu_alloc and is freed once.
        unsafe { emu_free(self.0.cast()) }
    }
}

/// What the kernels take that copy boxes of [64, 64] from rows of 64 numbers of 16 bits.
#[repr(C, align(64))]
pub struct BoxArgs {
    map: [u64; 16],
    out: *mut c_void,
    n: u32,
}

pub fn box_args<O: Copy>(x: &Buffer<u16>, out: &Buffer<O>, n: usize) -> BoxArgs {
    let (mut map, base) = ([0; 16], x.0.cast_const().cast());
    // SAFETY: the map has 128 bytes; kernels look at the buffer only while it is there.
    let refused = unsafe { emu_tensor_map(map.as_mut_ptr(), base, (x.1 / 64) as u64, 64, 2, 64, 64) };
    assert_eq!(refused, 0);
    BoxArgs { map, out: out.0.cast(), n: n as u32 }
}

/// What the other kernels of these tests take.
#[repr(C)]
pub struct Args {
    x: *const c_void,
    out: *mut c_void,
    n: u32,
}

pub fn args<X: Copy, O: Copy>(x: &Buffer<X>, out: &Buffer<O>, n: usize) -> Args {
    Args { x: x.0.cast_const().cast(), out: out.0.cast(), n: n as u32 }
}

pub fn launch<A>(name: &str, grid: [u32; 3], threads: u32, shared: u32, args: A) -> Result<(), String> {
    let name = CString::new(name).unwrap();
    let mut error = [0 as c_char; 1024];
    // SAFETY: the strings end in 0, the arguments are what the kernel takes, and its pointers are of device memory.
    unsafe {
        let kernel = emu_kernel(name.as_ptr());
        let (args, size) = ((&raw const args).cast(), size_of::<A>());
        match emu_launch(kernel, grid.as_ptr(), threads, shared, args, size, error.as_mut_ptr(), error.len()) {
            0 => Ok(()),
            _ => Err(CStr::from_ptr(error.as_ptr()).to_str().unwrap().to_owned()),
        }
    }
}

pub fn block(name: &str, threads: u32, args: Args) -> Result<(), String> {
    launch(name, [1, 1, 1], threads, 0, args)
}

/// The seed belongs to the process, and a launch looks at all buffers: one test at a time.
pub fn seeded(seed: u64) -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no other condition.
    unsafe { emu_seed(seed) };
    guard
}

/// Small integers, so that sums are exact.
pub fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * i * 7 + i * 3) % 17) as f32 - 5.0).collect()
}
