//! A GPU behind NVIDIA's driver.
//!
//! Plain calls of the driver's API on one stream of the device's primary context. A fault of a kernel is reported by
//! whichever call comes next, and breaks the context: from then on every call returns that fault again, and names what was
//! sent since the host had last waited, for one of these it was.
//!
//! A call that fails while steps are recorded ends the recording, and so the next call runs at once again.

mod blas;
mod probe;
mod staging;
mod status;

use std::collections::VecDeque;
use std::ffi::{CString, c_int, c_void};
use std::ptr;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUresult, CUstream,
};

use super::device::{Address, Boxed, Counters, Description, Device, Function, Gemm, Graph, Launch, keep};
use crate::error::{Error, Kind, Result, ensure};
use crate::tensor::DType;
pub use blas::version_text;
use blas::{Blas, Failure};
pub use probe::{Found, OLDEST_GPU, covers, cublaslt, kernel_module, look, nvcc, split};
use staging::{LANDING, Staging};
use status::{Owned, check};

/// A GPU that was opened.
pub struct Driver {
    description: Description,
    counters: Counters,
    fault: Option<Error>,
    sent: Sent,
    recording: bool,
    kernels: Vec<Kernel>,
    // From here on in the order in which they must be dropped.
    graphs: Vec<Option<Owned<CUgraphExec>>>,
    blas: Blas,
    staging: Staging,
    memory: Vec<Owned<u64>>,
    modules: Vec<Owned<CUmodule>>,
    stream: Owned<CUstream>,
    context: CUcontext,
    _primary: Owned<CUdevice>,
}

// SAFETY: the driver's handles may be used by any thread on which their context is current, which `enter` sees to at each
// call; that two threads never call at a time follows from `&mut self`.
#[allow(clippy::non_send_fields_in_send_ty)]
unsafe impl Send for Driver {}

struct Kernel {
    name: String,
    handle: CUfunction,
    /// Bytes of its argument struct.
    args: usize,
    /// Whether it waits itself for the kernel before it.
    waits: bool,
}

/// What was sent since the host last waited: the newest few, and how many.
#[derive(Default)]
struct Sent {
    newest: VecDeque<What>,
    count: u64,
}

#[derive(Clone, Copy)]
enum What {
    Kernel(usize),
    Product(Gemm),
    Graph(usize),
}

impl Sent {
    const KEPT: usize = 8;

    fn push(&mut self, what: What) {
        if self.newest.len() == Self::KEPT {
            self.newest.pop_front();
        }
        self.newest.push_back(what);
        self.count += 1;
    }

    fn clear(&mut self) {
        self.newest.clear();
        self.count = 0;
    }
}

impl Driver {
    /// Opens a device and loads the modules, each a name and a fatbin. Errors: Device.
    pub fn open(ordinal: usize, modules: &'static [(&'static str, &'static [u8])]) -> Result<Driver> {
        if modules.is_empty() {
            let error = Error::new(Kind::Device, "this program was built without CUDA kernels, as there was no nvcc");
            return Err(error.action("run scripts/get-cuda.sh and build again, or use the CPU"));
        }
        probe::initialise()?;
        let count = probe::count()?;
        if ordinal >= count {
            let error = Error::new(Kind::Device, format!("there is no GPU {ordinal}: there are {count}, from 0 on"));
            return Err(error.action("choose one that mindskip doctor lists"));
        }
        let device = probe::device(ordinal)?;
        let mut description = probe::properties(device)?;
        let (major, minor) = description.compute_capability;
        if (major, minor) < OLDEST_GPU {
            let text = format!("{} has compute capability {major}.{minor}; the kernels need 8.0", description.name);
            return Err(
                Error::new(Kind::Device, text).action("use a GPU of the Ampere generation or newer, or the CPU")
            );
        }
        let (context, primary) = probe::context(device)?;
        let stream = stream()?;
        let modules =
            modules.iter().map(|&(name, image)| module(name, image, &description)).collect::<Result<Vec<_>>>()?;
        let workspace_bytes = if major == 9 { 64 << 20 } else { 32 << 20 };
        let workspace = allocate(workspace_bytes)?;
        let blas = Blas::new(Address(workspace.0), workspace_bytes)?;
        let staging = Staging::new()?;
        // After all that this itself takes, so that what is free is free.
        description.free_memory = probe::memory()?.0;
        Ok(Driver {
            description,
            counters: Counters::default(),
            fault: None,
            sent: Sent::default(),
            recording: false,
            kernels: Vec::new(),
            graphs: Vec::new(),
            blas,
            staging,
            memory: vec![workspace],
            modules,
            stream,
            context,
            _primary: primary,
        })
    }

    /// At the start of each call: makes the context this thread's, unless a fault has broken it.
    fn enter(&mut self) -> Result<()> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        // SAFETY: the context lives as long as `_primary`.
        self.check(unsafe { sys::cuCtxSetCurrent(self.context) }, || "entering the GPU's context".into())
    }

    /// Turns a status into an error, and remembers a fault.
    fn check(&mut self, status: CUresult, doing: impl FnOnce() -> String) -> Result<()> {
        if status == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        self.drop_recording();
        if !status::is_fault(status) {
            return Err(status::error(status).during(doing()));
        }
        let fault = Error::new(Kind::Device, format!("the GPU failed: {}", status::name(status)))
            .during(self.suspects())
            .action("start the program again, with CUDA_LAUNCH_BLOCKING=1 to learn which kernel it was");
        self.fault = Some(fault.clone());
        Err(fault)
    }

    /// "one of 12 ran, the newest: rms_norm_bf16, product 1x4096x4096, …".
    fn suspects(&self) -> String {
        let names = self.sent.newest.iter().map(|what| match what {
            What::Kernel(i) => self.kernels[*i].name.clone(),
            What::Product(g) => format!("product {}x{}x{} {}", g.m, g.n, g.k, g.dtype),
            What::Graph(i) => format!("recording {i}"),
        });
        match self.sent.count {
            0 => "nothing of this program was running".into(),
            1 => format!("running {}", names.collect::<String>()),
            n => format!("one of {n} was running, the last of them {}", names.collect::<Vec<_>>().join(", ")),
        }
    }

    /// Ends a recording of which nothing is kept.
    fn drop_recording(&mut self) {
        if std::mem::take(&mut self.recording) {
            let mut graph: CUgraph = ptr::null_mut();
            // SAFETY: the stream lives; the graph is null when the recording was broken, and else given back.
            unsafe {
                sys::cuStreamEndCapture(self.stream.0, &mut graph);
                if !graph.is_null() {
                    sys::cuGraphDestroy(graph);
                }
            }
        }
    }

    /// Errors: Device, and the recording ends, when one is under way: what the host does cannot be recorded.
    fn not_recording(&mut self, what: &str) -> Result<()> {
        if self.recording {
            self.drop_recording();
            let error = Error::new(Kind::Device, format!("{what} cannot be recorded"));
            return Err(error.action("report it: this is a fault of the program"));
        }
        Ok(())
    }

    /// Waits for all that was sent.
    fn wait(&mut self) -> Result<()> {
        self.counters.syncs += 1;
        // SAFETY: the stream lives.
        let status = unsafe { sys::cuStreamSynchronize(self.stream.0) };
        self.check(status, || "waiting for the GPU".into())?;
        self.sent.clear();
        self.staging.all_read();
        Ok(())
    }
}

impl Device for Driver {
    fn description(&self) -> &Description {
        &self.description
    }

    fn function(&mut self, name: &str) -> Result<Function> {
        if let Some(known) = self.kernels.iter().position(|kernel| kernel.name == name) {
            return Ok(Function(known));
        }
        self.enter()?;
        let text = CString::new(name).unwrap_or_default();
        for i in 0..self.modules.len() {
            let mut handle: CUfunction = ptr::null_mut();
            // SAFETY: the module lives, `text` ends in NUL; writes one handle, which lives as long as the module.
            let status = unsafe { sys::cuModuleGetFunction(&mut handle, self.modules[i].0, text.as_ptr()) };
            if status == CUresult::CUDA_ERROR_NOT_FOUND {
                continue;
            }
            let doing = || format!("preparing the kernel {name}");
            self.check(status, doing)?;
            let (mut fixed, mut ptx, mut offset, mut args) = (0, 0, 0, 0);
            let shared = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the handle was found above; each call writes what it is given room for.
            unsafe {
                self.check(sys::cuFuncGetAttribute(&mut fixed, shared, handle), doing)?;
                let version = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
                self.check(sys::cuFuncGetAttribute(&mut ptx, version, handle), doing)?;
                let dynamic = (self.description.shared_per_block as c_int).saturating_sub(fixed);
                self.check(sys::cuFuncSetAttribute(handle, most, dynamic), doing)?;
                self.check(sys::cuFuncGetParamInfo(handle, 0, &mut offset, &mut args), doing)?;
            }
            // What was compiled for less does not wait, see wait_for_previous in cuda/mma.cuh.
            let waits = ptx >= 90;
            self.kernels.push(Kernel { name: name.into(), handle, args, waits });
            return Ok(Function(self.kernels.len() - 1));
        }
        let error = Error::new(Kind::Device, format!("no CUDA module has the kernel {name}"));
        Err(error.action("build again: the kernels are of another version than the program"))
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: writes one address.
        let status = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) };
        if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.drop_recording();
            return Err(out_of_memory(bytes));
        }
        self.check(status, || format!("allocating {bytes} bytes"))?;
        self.memory.push(Owned(address, sys::cuMemFree_v2));
        self.counters.allocations += 1;
        Ok(Address(address))
    }

    fn tensor_map(&mut self, matrix: &Boxed) -> Result<[u64; 16]> {
        self.enter()?;
        let &Boxed { at, rows, cols, dtype, of: [box_rows, box_cols] } = matrix;
        let kind = match dtype {
            DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // The driver's order is columns, then rows.
        let (dims, strides) = ([cols as u64, rows as u64], [(cols * dtype.size()) as u64]);
        // SAFETY: a map is written, arrays of as many numbers as there are dimensions are read, of strides one less. The
        // matrix is not touched here.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                kind,
                2,
                at.0 as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                [box_cols, box_rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        self.check(status, || format!("describing {matrix:?} to TMA"))?;
        Ok(map.opaque)
    }

    fn copy_in(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        self.not_recording("a copy from the host")?;
        self.enter()?;
        let doing = || format!("copying {} bytes to the GPU", bytes.len());
        let mut done = 0;
        while done < bytes.len() {
            let taken = self.staging.take(&bytes[done..], self.stream.0);
            let (from, len, waited) = match taken {
                Ok(taken) => taken,
                Err(status) => return self.check(status, doing),
            };
            self.counters.syncs += u64::from(waited);
            // SAFETY: `from` is pinned and stays as it is until the device has read it, see `Staging`. Whether `to` has
            // the room the driver checks against its allocations.
            let status = unsafe { sys::cuMemcpyHtoDAsync_v2(to.plus(done).0, from, len, self.stream.0) };
            self.check(status, doing)?;
            done += len;
        }
        self.counters.copies_in += 1;
        self.counters.bytes_in += bytes.len() as u64;
        Ok(())
    }

    fn copy_out(&mut self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.not_recording("a copy to the host")?;
        self.enter()?;
        let whole = bytes.len();
        if bytes.is_empty() {
            self.wait()?;
        }
        for (i, piece) in bytes.chunks_mut(LANDING).enumerate() {
            let at = from.plus(i * LANDING).0;
            // SAFETY: the landing place has room for a piece, and nothing else uses it before `landed`.
            let status = unsafe { sys::cuMemcpyDtoHAsync_v2(self.staging.landing(), at, piece.len(), self.stream.0) };
            self.check(status, || format!("copying {whole} bytes from the GPU"))?;
            self.wait()?;
            self.staging.landed(piece);
        }
        self.counters.copies_out += 1;
        self.counters.bytes_out += whole as u64;
        Ok(())
    }

    fn copy(&mut self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: whether both places have the room the driver checks against its allocations.
        let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.stream.0) };
        self.check(status, || format!("copying {bytes} bytes within the GPU"))
    }

    fn clear(&mut self, at: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: whether the memory is there the driver checks against its allocations.
        let status = unsafe { sys::cuMemsetD8Async(at.0, 0, bytes, self.stream.0) };
        self.check(status, || format!("clearing {bytes} bytes"))
    }

    unsafe fn launch(&mut self, function: Function, launch: Launch, args: *const c_void, size: usize) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.enter()?;
        let kernel = &self.kernels[function.0];
        if kernel.args != size {
            let text = format!("the kernel {} takes {} bytes of arguments, not {size}", kernel.name, kernel.args);
            self.drop_recording();
            let error = Error::new(Kind::Device, text);
            return Err(error.action("build again: the kernels are of another version than the program"));
        }
        let mut params = [args.cast_mut()];
        // It may begin while the kernel before it ends. Decode on an H100, with it and without: SmolLM2-135M 1251 and 958
        // tokens/s, Llama-3-8B 155 and 152.
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream.0,
            attrs: &mut early,
            numAttrs: kernel.waits.into(),
        };
        // SAFETY: the kernel has one parameter of `size` bytes, which the driver copies before it returns, as it does the
        // attribute; that what it points to fits the kernel is what the caller promises.
        let status = unsafe { sys::cuLaunchKernelEx(&config, kernel.handle, params.as_mut_ptr(), ptr::null_mut()) };
        if status != CUresult::CUDA_SUCCESS {
            let Launch { grid, threads, shared } = launch;
            let geometry = format!("a grid of {grid:?}, {threads} threads, {shared} bytes of shared memory");
            let doing = format!("launching {} with {geometry}", kernel.name);
            return self.check(status, || doing);
        }
        self.note(What::Kernel(function.0));
        Ok(())
    }

    unsafe fn gemm(&mut self, gemm: &Gemm) -> Result<()> {
        let &Gemm { m, n, k, dtype, out_dtype, backward, .. } = gemm;
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.enter()?;
        let refused = if k == 0 || (out_dtype != dtype && out_dtype != DType::F32) {
            "such products are not made"
        } else {
            // SAFETY: the caller promises that the matrices are there; the stream is the context's.
            match unsafe { self.blas.multiply(gemm, self.stream.0.cast()) } {
                Ok(()) => {
                    self.note(What::Product(*gemm));
                    return Ok(());
                }
                Err(Failure(status, doing)) => &format!("{status:?} when {doing}"),
            }
        };
        // cuBLASLt hides an earlier kernel's fault behind a status of its own; the stream tells, when it is not recorded.
        self.drop_recording();
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.stream.0) } {
            status if status::is_fault(status) => self.check(status, String::new),
            _ => {
                let error = Error::new(Kind::Device, format!("cuBLASLt refused a product: {refused}"));
                let weight = if backward { format!("{k}x{n}") } else { format!("{n}x{k} transposed") };
                let error = error.during(format!("multiplying {m}x{k} by {weight}, {dtype} to {out_dtype}"));
                Err(error.action("report it with the output of mindskip doctor"))
            }
        }
    }

    fn begin_record(&mut self) -> Result<()> {
        self.not_recording("a recording")?;
        self.enter()?;
        // Relaxed, so that what cuBLASLt does at the first use of one of its kernels does not break the recording.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives and is not the legacy one, which cannot be captured.
        let status = unsafe { sys::cuStreamBeginCapture_v2(self.stream.0, mode) };
        self.check(status, || "beginning to record".into())?;
        self.recording = true;
        Ok(())
    }

    fn end_record(&mut self) -> Result<Graph> {
        self.enter()?;
        ensure!(std::mem::take(&mut self.recording), Device, "nothing is being recorded: a call before has failed");
        let doing = || "ending a recording".into();
        let (mut graph, mut exec): (CUgraph, CUgraphExec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: stream and context live; the graph is not used by the executable one that is made from it.
        unsafe {
            let status = sys::cuStreamEndCapture(self.stream.0, &mut graph);
            self.check(status, doing)?;
            let graph = Owned(graph, sys::cuGraphDestroy as unsafe fn(CUgraph) -> CUresult);
            self.check(sys::cuGraphInstantiateWithFlags(&mut exec, graph.0, 0), doing)?;
            let exec = Owned(exec, sys::cuGraphExecDestroy as unsafe fn(CUgraphExec) -> CUresult);
            self.check(sys::cuGraphUpload(exec.0, self.stream.0), doing)?;
            Ok(keep(&mut self.graphs, exec))
        }
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.not_recording("a replay")?;
        self.enter()?;
        let exec = self.graphs[graph.0].as_ref().expect("a recording that is held").0;
        // SAFETY: graph and stream live; what the graph's kernels use is freed after it.
        let status = unsafe { sys::cuGraphLaunch(exec, self.stream.0) };
        self.check(status, || format!("replaying recording {}", graph.0))?;
        self.sent.push(What::Graph(graph.0));
        self.counters.replays += 1;
        Ok(())
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.enter()?;
        // One that still runs is freed by the driver when it is done.
        self.graphs[graph.0] = None;
        Ok(())
    }

    fn counters(&self) -> Counters {
        Counters { recordings: self.graphs.iter().flatten().count() as u64, ..self.counters }
    }

    fn release(&mut self) -> Result<()> {
        self.drop_recording();
        self.enter()?;
        self.wait()?;
        self.graphs.clear();
        // The first piece is cuBLASLt's.
        self.memory.truncate(1);
        Ok(())
    }
}

impl Driver {
    /// Keeps account of what was sent; what is recorded is not sent yet.
    fn note(&mut self, what: What) {
        if !self.recording {
            self.sent.push(what);
            self.counters.launches += 1;
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The handles are given back after this, in this context. After a fault each of these calls fails, and so what.
        // SAFETY: context and stream live.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            self.drop_recording();
            sys::cuStreamSynchronize(self.stream.0);
        }
    }
}

/// A stream that does not wait for the legacy one.
fn stream() -> Result<Owned<CUstream>> {
    let mut stream = ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: a context is current; writes one handle, which is given back by `Owned`.
    check(unsafe { sys::cuStreamCreate(&mut stream, flags) }, "making a stream")?;
    Ok(Owned(stream, sys::cuStreamDestroy_v2))
}

/// Loads the fatbin `image`, of which the driver takes the code that fits the device best.
fn module(name: &str, image: &[u8], gpu: &Description) -> Result<Owned<CUmodule>> {
    // A fatbin is read in words of 8 bytes; where `include_bytes!` puts it is not known to be a multiple of that.
    let mut aligned = vec![0u64; image.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut aligned)[..image.len()].copy_from_slice(image);
    let mut module = ptr::null_mut();
    // SAFETY: a context is current; the driver reads the image, whose header tells its length, and copies what it keeps.
    let status = unsafe { sys::cuModuleLoadData(&mut module, aligned.as_ptr().cast()) };
    let (major, minor) = gpu.compute_capability;
    check(status, &format!("loading the CUDA module {name} for {}, compute capability {major}.{minor}", gpu.name))?;
    Ok(Owned(module, sys::cuModuleUnload))
}

fn allocate(bytes: usize) -> Result<Owned<u64>> {
    let mut address = 0;
    // SAFETY: a context is current; writes one address, which is given back by `Owned`.
    match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(out_of_memory(bytes)),
        status => {
            check(status, "allocating memory").map(|()| Owned(address, sys::cuMemFree_v2 as unsafe fn(u64) -> CUresult))
        }
    }
}

fn out_of_memory(bytes: usize) -> Error {
    let free = probe::memory().map_or(String::new(), |(free, _)| format!("; {free} are free"));
    let error = Error::new(Kind::Memory, format!("the GPU has no {bytes} bytes in one piece{free}"));
    error.action("see with nvidia-smi what else uses its memory, or take less with --memory or a smaller model")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Every symbol that is called is looked for before, as cudarc panics when it does not find one; and no other is.
    #[test]
    fn the_probe_knows_every_symbol() {
        let sources = [include_str!("mod.rs"), include_str!("blas.rs"), include_str!("probe.rs")]
            .into_iter()
            .chain([include_str!("staging.rs"), include_str!("status.rs")]);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let called: BTreeSet<&str> = sources
            .flat_map(|text| text.split("sys::").chain(text.split("lt::")))
            .map(|rest| &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())])
            .filter(|name| {
                let rest = name.strip_prefix("cublasLt").or_else(|| name.strip_prefix("cu"));
                rest.is_some_and(|rest| rest.starts_with(char::is_uppercase)) && !name.ends_with("_t")
            })
            .collect();
        let known: BTreeSet<&str> = probe::DRIVER_SYMBOLS.iter().chain(probe::BLAS_SYMBOLS).copied().collect();
        assert!(called.len() > 50);
        assert_eq!(called.difference(&known).collect::<Vec<_>>(), Vec::<&&str>::new(), "called, but not probed for");
        let unused = known.difference(&called).filter(|name| !name.ends_with("Attribute")).collect::<Vec<_>>();
        assert_eq!(unused, Vec::<&&str>::new(), "probed for, but not called");
    }

    #[test]
    fn the_newest_few_are_remembered() {
        let mut sent = Sent::default();
        (0..20).for_each(|i| sent.push(What::Kernel(i)));
        let kept = sent.newest.iter().map(|what| if let What::Kernel(i) = what { *i } else { 99 });
        assert_eq!((kept.collect::<Vec<_>>(), sent.count), ((12..20).collect(), 20));
        sent.clear();
        assert_eq!((sent.newest.len(), sent.count), (0, 0));
    }

    #[test]
    fn a_build_without_kernels_says_what_to_do() {
        let error = Driver::open(0, &[]).err().unwrap();
        assert_eq!(error.kind(), Kind::Device);
        assert!(error.to_string().contains("get-cuda.sh"), "{error}");
    }
}
