//! The emulator as a device: host memory for device memory, a plain product for cuBLASLt, recordings as lists. It shows
//! logic, not speed.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use half::{bf16, f16};

use super::device::{Address, Boxed, Counters, Description, Device, Function, Gemm, Graph, Launch, keep};
use crate::error::{Error, Kind, Result, ensure};
use crate::tensor::DType;

#[rustfmt::skip]
unsafe extern "C" {
    fn emu_kernel(name: *const c_char) -> *const c_void;
    fn emu_launch(
        kernel: *const c_void, grid: *const u32, threads: u32, shared: u32,
        args: *const c_void, args_size: usize, error: *mut c_char, error_room: usize,
    ) -> c_int;
    fn emu_seed(seed: u64);
    fn emu_alloc(size: usize) -> *mut c_void;
    fn emu_free(buffer: *mut c_void);
    fn emu_tensor_map(
        map: *mut u64, base: *const c_void, rows: u64, columns: u64, element: u32, box_rows: u32, box_columns: u32,
    ) -> c_int;
}

pub struct Emulated {
    description: Description,
    counters: Counters,
    /// Handles of the emulator, as numbers.
    kernels: Vec<usize>,
    memory: Vec<Address>,
    recording: Option<Vec<Recorded>>,
    graphs: Vec<Option<Vec<Recorded>>>,
}

#[derive(Clone)]
enum Recorded {
    /// The argument struct as words.
    Launch(Function, Launch, Vec<u64>, usize),
    Gemm(Gemm),
}

impl Emulated {
    /// Threads of a block run in an order that is drawn from the seed.
    pub fn new(seed: u64) -> Self {
        Self::of(seed, (9, 0))
    }

    /// With a compute capability: 9.0 is (9, 0).
    pub fn of(seed: u64, compute_capability: (u32, u32)) -> Self {
        // SAFETY: takes a number.
        unsafe { emu_seed(seed) };
        Emulated {
            description: Description {
                name: "emulated GPU".into(),
                compute_capability,
                multiprocessors: 4,
                shared_per_block: 227 << 10,
                memory: 8 << 30,
                free_memory: 8 << 30,
            },
            counters: Counters::default(),
            kernels: Vec::new(),
            memory: Vec::new(),
            recording: None,
            graphs: Vec::new(),
        }
    }

    fn free(&mut self) {
        for address in self.memory.drain(..) {
            // SAFETY: comes from `emu_alloc` and is freed once.
            unsafe { emu_free(address.0 as *mut c_void) };
        }
    }

    fn run(&mut self, what: &Recorded) -> Result<()> {
        match what {
            Recorded::Launch(function, launch, args, size) => self.launch_now(*function, *launch, args, *size),
            Recorded::Gemm(gemm) => {
                product(gemm);
                Ok(())
            }
        }
    }

    fn launch_now(&mut self, function: Function, launch: Launch, args: &[u64], size: usize) -> Result<()> {
        let mut text = [0 as c_char; 1024];
        // SAFETY: the handle is the emulator's, `args` holds `size` bytes, the text ends within its room.
        let failed = unsafe {
            let (args, text) = (args.as_ptr().cast(), text.as_mut_ptr());
            let kernel = self.kernels[function.0] as *const c_void;
            emu_launch(kernel, launch.grid.as_ptr(), launch.threads, launch.shared, args, size, text, 1024)
        };
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: the emulator has written a text there, with its end.
        let text = unsafe { CStr::from_ptr(text.as_ptr()) };
        Err(Error::new(Kind::Device, text.to_string_lossy()))
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        self.free();
    }
}

impl Device for Emulated {
    fn description(&self) -> &Description {
        &self.description
    }

    fn function(&mut self, name: &str) -> Result<Function> {
        let name = CString::new(name).expect("a kernel's name");
        // SAFETY: the name ends.
        let kernel = unsafe { emu_kernel(name.as_ptr()) };
        ensure!(!kernel.is_null(), Device, "there is no kernel {name:?}");
        self.kernels.push(kernel as usize);
        Ok(Function(self.kernels.len() - 1))
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        self.counters.allocations += 1;
        // SAFETY: takes a number.
        let address = unsafe { emu_alloc(bytes.max(1)) } as u64;
        ensure!(address != 0, Memory, "{bytes} bytes cannot be had");
        self.memory.push(Address(address));
        Ok(Address(address))
    }

    fn tensor_map(&mut self, matrix: &Boxed) -> Result<[u64; 16]> {
        let &Boxed { at, rows, cols, dtype, of: [box_rows, box_cols] } = matrix;
        let mut map = [0; 16];
        // SAFETY: writes 128 bytes; a kernel looks at the matrix only while its memory is there.
        let refused = unsafe {
            let (base, size) = (at.0 as *const c_void, dtype.size() as u32);
            emu_tensor_map(map.as_mut_ptr(), base, rows as u64, cols as u64, size, box_rows, box_cols)
        };
        ensure!(refused == 0, Device, "no tensor map describes {matrix:?}");
        Ok(map)
    }

    fn copy_in(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        self.counters.copies_in += 1;
        self.counters.bytes_in += bytes.len() as u64;
        // SAFETY: the backend copies into what it has allocated.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    fn copy_out(&mut self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.counters.syncs += 1;
        self.counters.copies_out += 1;
        self.counters.bytes_out += bytes.len() as u64;
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&mut self, to: Address, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, bytes) };
        Ok(())
    }

    fn clear(&mut self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn launch(&mut self, function: Function, launch: Launch, args: *const c_void, size: usize) -> Result<()> {
        let mut words = vec![0u64; size.div_ceil(8)];
        // SAFETY: the caller's struct has that many bytes.
        unsafe { std::ptr::copy_nonoverlapping(args.cast::<u8>(), words.as_mut_ptr().cast(), size) };
        if let Some(recorded) = &mut self.recording {
            recorded.push(Recorded::Launch(function, launch, words, size));
            return Ok(());
        }
        self.counters.launches += 1;
        self.launch_now(function, launch, &words, size)
    }

    unsafe fn gemm(&mut self, gemm: &Gemm) -> Result<()> {
        if let Some(recorded) = &mut self.recording {
            recorded.push(Recorded::Gemm(*gemm));
            return Ok(());
        }
        self.counters.launches += 1;
        product(gemm);
        Ok(())
    }

    fn begin_record(&mut self) -> Result<()> {
        self.recording = Some(Vec::new());
        Ok(())
    }

    fn end_record(&mut self) -> Result<Graph> {
        Ok(keep(&mut self.graphs, self.recording.take().unwrap_or_default()))
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.counters.replays += 1;
        let recorded = self.graphs[graph.0].take().expect("a recording that is held");
        let result = recorded.iter().try_for_each(|what| self.run(what));
        self.graphs[graph.0] = Some(recorded);
        result
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.graphs[graph.0] = None;
        Ok(())
    }

    fn counters(&self) -> Counters {
        Counters { recordings: self.graphs.iter().flatten().count() as u64, ..self.counters }
    }

    fn release(&mut self) -> Result<()> {
        self.recording = None;
        self.graphs.clear();
        self.free();
        Ok(())
    }
}

/// What cuBLASLt does, in f64.
fn product(g: &Gemm) {
    let read = |at: Address, n: usize, dtype: DType| -> Vec<f64> {
        // SAFETY: the caller of `gemm` vouches for the sizes.
        unsafe {
            match dtype {
                DType::F32 => std::slice::from_raw_parts(at.0 as *const f32, n).iter().map(|&x| x.into()).collect(),
                DType::F16 => std::slice::from_raw_parts(at.0 as *const f16, n).iter().map(|x| x.to_f64()).collect(),
                DType::BF16 => std::slice::from_raw_parts(at.0 as *const bf16, n).iter().map(|x| x.to_f64()).collect(),
            }
        }
    };
    let (weight, src) = (read(g.weight, g.n * g.k, g.dtype), read(g.src, g.m * g.k, g.dtype));
    let before = if g.add { read(g.out, g.m * g.n, g.out_dtype) } else { vec![0.0; g.m * g.n] };
    for (i, before) in before.into_iter().enumerate() {
        let (row, column) = (i / g.n, i % g.n);
        let of = |i: usize| weight[if g.backward { i * g.n + column } else { column * g.k + i }];
        let sum = before + (0..g.k).map(|i| src[row * g.k + i] * of(i)).sum::<f64>();
        // SAFETY: as above.
        unsafe {
            match g.out_dtype {
                DType::F32 => *(g.out.0 as *mut f32).add(i) = sum as f32,
                DType::F16 => *(g.out.0 as *mut f16).add(i) = f16::from_f64(sum),
                DType::BF16 => *(g.out.0 as *mut bf16).add(i) = bf16::from_f64(sum),
            }
        }
    }
}
