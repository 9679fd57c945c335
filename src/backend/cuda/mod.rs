//! The CUDA backend: the ops as launches of our kernels, and of cuBLASLt's products where there are many rows.
//!
//! What the host writes is gathered and sent with the next launch. What it does not know, the number of active rows in
//! decode, stays on the device: kernels read it there, and add up what they did (`work.rs`). A decode step is recorded once
//! for each number of sequences and then sent as a whole.

pub mod device;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod driver;
#[cfg(feature = "emulate")]
#[allow(unsafe_code)]
pub mod emulated;
#[allow(unsafe_code)]
mod gradients;
#[allow(missing_docs, clippy::all)]
mod kernels;
#[allow(unsafe_code)]
mod ops;
#[allow(unsafe_code)]
mod rates;
mod work;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::time::Duration;

use half::{bf16, f16};

use super::rates::best;
use super::*;
use crate::error::{Error, Kind, ensure};
use crate::tensor::{DType, Tensor};
use device::{Address, Boxed, Description, Device, Function, Gemm, Graph};
use ops::Functions;
use work::Accounts;

pub use super::twin::{Verdict, verify};

/// What build.rs has made of cuda/: MODULES, ARCHITECTURES and NVCC.
#[cfg(mindskip_cuda)]
mod built {
    include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));
}
#[cfg(not(mindskip_cuda))]
mod built {
    pub static MODULES: &[(&str, &[u8])] = &[];
    pub const ARCHITECTURES: &str = "";
    pub const NVCC: &str = "";
}
pub use built::*;

const _: () = assert!(PAGE == kernels::KV_PAGE as usize);

/// Bytes that the plan leaves alone: recorded steps, what the driver loads later, the rounding of allocations.
const KEPT_FREE: u64 = 512 << 20;

/// Elements of the buffer that takes what the host writes.
const STAGED: usize = 1 << 16;

/// Steps that are remembered; each recorded one takes some of the device's memory.
const STEPS: usize = 16;

/// Runs the ops on a GPU, or on the emulator.
pub struct CudaBackend {
    device: Box<dyn Device>,
    info: DeviceInfo,
    functions: Functions,
    /// Where they run, by head_dim: see [`ops::HOPPER_HEADS`].
    hopper: Option<[Function; 2]>,
    weights: Vec<Stored>,
    arena: Region,
    ints: Region,
    workspace: Region,
    /// `[slots, kv_heads]`, zero between launches: see `AttendArgs::tickets`.
    tickets: Region,
    kv: Option<Pool>,
    accounts: Accounts,
    /// What the host has written and not sent: runs of [offset, length, values...], and where each begins.
    runs: Vec<u32>,
    starts: Vec<u32>,
    /// The same runs: ends by offset.
    pending: BTreeMap<usize, usize>,
    words: Vec<u32>,
    staged: Address,
    /// Steps that were met, the latest at the end: None after the first time, as many are met only once.
    steps: Vec<(StepKey, Option<Recorded>)>,
    recording: bool,
    /// The logits whose best by groups stand in the workspace.
    best_of: Option<Mat>,
}

/// A recorded step, and what the host knows of its work.
struct Recorded {
    graph: Graph,
    meter: Meter,
}

/// A piece of the device's memory.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: Address,
    bytes: usize,
}

impl Region {
    const NONE: Region = Region { start: Address(0), bytes: 0 };
}

/// A weight on the device: matrices in the type of the activations, vectors in f32, and what is a row may be either.
struct Stored {
    matrix: Address,
    vector: Address,
}

/// The KV cache. Page tables and lengths stand in the integer arena, behind what the plan has placed there.
struct Pool {
    layout: KvLayout,
    data: Address,
    positions: Address,
    /// Elements from the start of the integer arena: `[layers, slots, pages_per_seq]`, `[layers, slots]`.
    tables: usize,
    lens: usize,
    /// Of the data, for the kernels that take it, where there are such for its shape.
    map: Option<kernels::TensorMap>,
}

/// The numbers of a tensor in another type, where it is another.
fn bytes_in(dtype: DType, tensor: &Tensor) -> Cow<'_, [u8]> {
    let floats = || tensor.to_f32().into_iter();
    match dtype {
        _ if tensor.dtype == dtype => Cow::Borrowed(tensor.bytes()),
        DType::F32 => bytemuck::cast_slice(&floats().collect::<Vec<_>>()).to_vec().into(),
        DType::F16 => bytemuck::cast_slice(&floats().map(f16::from_f32).collect::<Vec<_>>()).to_vec().into(),
        DType::BF16 => bytemuck::cast_slice(&floats().map(bf16::from_f32).collect::<Vec<_>>()).to_vec().into(),
    }
}

/// Bytes of page tables, lengths and tickets.
fn books(kv: &KvLayout) -> usize {
    4 * kv.layers * kv.slots * (kv.pages_per_seq + 1) + 4 * kv.slots * kv.kv_heads
}

/// The kernels for compute capability 9.0, by head_dim; None where there are none for the type.
///
/// Errors: Unsupported on another GPU, Device when one is missing.
fn find_hopper(device: &mut dyn Device, dtype: DType) -> Result<Option<[Function; 2]>> {
    let &Description { ref name, compute_capability: (major, minor), .. } = device.description();
    if (major, minor) != (9, 0) {
        let text = format!("{name} has compute capability {major}.{minor}; the kernels for Hopper need 9.0");
        return Err(Error::new(Kind::Unsupported, text).action("use --kernels auto"));
    }
    if dtype == DType::F32 {
        return Ok(None);
    }
    let mut functions = [Function(0); 2];
    for (function, head_dim) in functions.iter_mut().zip(ops::HOPPER_HEADS) {
        *function = device.function(&format!("attend_hopper_{dtype}_{head_dim}"))?;
    }
    Ok(Some(functions))
}

impl CudaBackend {
    /// On a device, with activations in `dtype`, which should be that of the model's matrices: others are converted when
    /// they are uploaded. K/V are stored in `kv`.
    ///
    /// Errors: Device when a kernel is missing; Unsupported for K/V that are wider than the activations.
    pub fn new(mut device: Box<dyn Device>, dtype: DType, kv: DType) -> Result<Self> {
        if kv.size() > dtype.size() {
            return Err(Error::new(
                Kind::Unsupported,
                format!("K/V in {kv} of activations in {dtype} are nowhere better"),
            )
            .action(format!("give --kv-dtype {dtype}, or --dtype {kv}")));
        }
        let functions = Functions::find(device.as_mut(), dtype, kv)?;
        let accounts = Accounts::new(device.as_mut())?;
        let staged = device.allocate(4 * STAGED)?;
        let described = device.description();
        let (major, minor) = described.compute_capability;
        let info = DeviceInfo {
            name: format!("{} (compute capability {major}.{minor}), {dtype}", described.name),
            free_memory: Some(described.free_memory.saturating_sub(KEPT_FREE.max(described.free_memory / 50))),
            activations: dtype,
            kv,
            weights: Some(dtype),
            // Products of 4096 rows are long enough for cuBLASLt's best rate (expected).
            chunk: 4096,
        };
        Ok(CudaBackend {
            device,
            info,
            functions,
            hopper: None,
            weights: Vec::new(),
            arena: Region::NONE,
            ints: Region::NONE,
            workspace: Region::NONE,
            tickets: Region::NONE,
            kv: None,
            accounts,
            runs: Vec::new(),
            starts: Vec::new(),
            pending: BTreeMap::new(),
            words: Vec::new(),
            staged,
            steps: Vec::new(),
            recording: false,
            best_of: None,
        })
    }

    /// The same with other kernels than those for every GPU.
    ///
    /// Errors: Unsupported for [`Kernels::Hopper`] on a GPU that has none of its instructions; Device when this build has
    /// none of its kernels.
    pub fn with_kernels(mut self, kernels: Kernels) -> Result<Self> {
        self.hopper = match kernels {
            Kernels::Sm80 => None,
            // Another GPU, or a build for other architectures, has none.
            Kernels::Auto => find_hopper(self.device.as_mut(), self.info.kv).unwrap_or(None),
            Kernels::Hopper => find_hopper(self.device.as_mut(), self.info.kv)?,
        };
        Ok(self)
    }

    fn region(&mut self, bytes: usize) -> Result<Region> {
        Ok(Region { start: self.device.allocate(bytes.max(1))?, bytes })
    }

    /// Room for one op, as large as it asks for.
    fn scratch(&mut self, bytes: usize) -> Result<Address> {
        if bytes > self.workspace.bytes {
            ensure!(!self.recording, Memory, "a step needs {bytes} bytes that were not planned");
            self.workspace = self.region(bytes)?;
            self.best_of = None;
        }
        Ok(self.workspace.start)
    }

    /// Notes integers to be sent with the next launch.
    fn put(&mut self, offset: usize, values: &[u32]) -> Result<()> {
        for (i, values) in values.chunks(STAGED / 4).enumerate() {
            let offset = offset + i * (STAGED / 4);
            // Runs are written at the same time: none may overlap another.
            let before = self.pending.range(..offset + values.len()).next_back();
            if before.is_some_and(|(_, &end)| end > offset)
                || self.starts.len() + 1 + self.runs.len() + 2 + values.len() > STAGED
            {
                self.send()?;
            }
            self.pending.insert(offset, offset + values.len());
            self.starts.push(self.runs.len() as u32);
            self.runs.extend([offset as u32, values.len() as u32]);
            self.runs.extend_from_slice(values);
        }
        Ok(())
    }

    fn put_in(&mut self, to: Ints, values: &[u32]) -> Result<()> {
        let fits = values.len() <= to.len && 4 * (to.offset + to.len) <= self.ints.bytes;
        ensure!(fits, Shape, "{} integers do not fit {to:?}", values.len());
        self.put(to.offset, values)
    }

    fn kv(&self) -> &Pool {
        self.kv.as_ref().expect("reserved")
    }

    fn record(&mut self, body: &mut (dyn FnMut(&mut dyn Backend) -> Result<()> + Send)) -> Result<Recorded> {
        self.accounts.begin_record(self.device.as_mut())?;
        let graph = self.device.begin_record().and_then(|()| {
            let before = std::mem::take(&mut self.accounts.meter);
            self.recording = true;
            let result = body(self);
            self.recording = false;
            let meter = std::mem::replace(&mut self.accounts.meter, before);
            let graph = self.device.end_record()?;
            match result {
                Ok(()) => Ok(Recorded { graph, meter }),
                Err(error) => self.device.forget(graph).and(Err(error)),
            }
        });
        self.accounts.end_record(graph.is_ok());
        graph
    }

    /// Notes a step as the latest; the one that was not met for longest is forgotten.
    fn remember(&mut self, key: StepKey, recorded: Option<Recorded>) -> Result<()> {
        self.steps.push((key, recorded));
        if self.steps.len() <= STEPS {
            return Ok(());
        }
        let (_, oldest) = self.steps.remove(0);
        oldest.map_or(Ok(()), |recorded| self.device.forget(recorded.graph))
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn upload(&mut self, tensor: &Tensor) -> Result<Weight> {
        let dtype = self.info.activations;
        let mut put = |bytes: &[u8]| -> Result<Address> {
            let at = self.device.allocate(bytes.len())?;
            self.device.copy_in(at, bytes)?;
            Ok(at)
        };
        let nothing = Address(0);
        let vector = if tensor.rows == 1 { put(bytemuck::cast_slice(&tensor.to_f32()))? } else { nothing };
        let matrix = put(&bytes_in(dtype, tensor))?;
        self.weights.push(Stored { matrix, vector });
        // A row is held in f32 as well, for the ops that take a vector.
        let held = if tensor.rows == 1 { tensor.dtype } else { dtype };
        Ok(Weight { id: self.weights.len() - 1, rows: tensor.rows, cols: tensor.cols, dtype: held })
    }

    fn random(&mut self, dtype: DType, rows: usize, cols: usize, noise: Noise) -> Result<Weight> {
        if rows == 1 {
            return self.upload(&noise.tensor(dtype, rows, cols)?);
        }
        ensure!(dtype == self.info.activations, Unsupported, "random weights in {dtype}, where others are not held");
        ensure!((rows * cols).is_multiple_of(8), Unsupported, "a random [{rows}, {cols}] matrix: no multiple of 8");
        let matrix = self.device.allocate(rows * cols * dtype.size())?;
        self.draw(matrix, rows * cols, noise)?;
        self.weights.push(Stored { matrix, vector: Address(0) });
        Ok(Weight { id: self.weights.len() - 1, rows, cols, dtype })
    }

    fn workspace(&self, largest: &Largest, kv: &KvLayout) -> Result<usize> {
        let refused = |cause: String| Err(Error::new(Kind::Unsupported, cause).action("use --device cpu"));
        if !kv.head_dim.is_multiple_of(16) || kv.head_dim > 256 {
            return refused(format!("heads of {}: the kernels take multiples of 16, up to 256", kv.head_dim));
        }
        let widths = [largest.hidden, largest.intermediate];
        if let Some(width) = widths.into_iter().find(|width| !width.is_multiple_of(8)) {
            return refused(format!("rows of {width}: the kernels take multiples of 8"));
        }
        Ok(self.scratch_for(largest, kv) + books(kv))
    }

    fn reserve(&mut self, arena_bytes: usize, ints: usize, workspace: usize, kv: &KvLayout) -> Result<()> {
        ensure!(kv.dtype == self.info.kv, Unsupported, "K/V in {}, on a device that stores {}", kv.dtype, self.info.kv);
        let entries = kv.layers * kv.slots;
        let (tables, lens) = (ints, ints + entries * kv.pages_per_seq);
        self.arena = self.region(arena_bytes)?;
        self.ints = self.region(4 * (lens + entries))?;
        self.workspace = self.region(workspace.saturating_sub(books(kv)))?;
        self.tickets = self.region(4 * kv.slots * kv.kv_heads)?;
        self.device.clear(self.tickets.start, self.tickets.bytes)?;
        self.device.clear(self.ints.start.plus(4 * tables), 4 * (lens + entries - tables))?;
        let values = PAGE * 2 * kv.kv_heads * kv.head_dim * kv.dtype.size();
        let data = self.device.allocate((kv.pages * values).max(1))?;
        let positions = self.device.allocate((kv.pages * PAGE * 4).max(1))?;
        let map = match self.hopper {
            Some(_) if ops::HOPPER_HEADS.contains(&kv.head_dim) && kv.pages > 0 => {
                let rows = kv.pages * kv.kv_heads * 2 * PAGE;
                let of = [PAGE as u32, 64];
                let pool = Boxed { at: data, rows, cols: kv.head_dim, dtype: kv.dtype, of };
                Some(kernels::TensorMap { words: self.device.tensor_map(&pool)? })
            }
            _ => None,
        };
        self.kv = Some(Pool { layout: *kv, data, positions, tables, lens, map });
        Ok(())
    }

    fn write_ints(&mut self, to: Ints, values: &[u32]) -> Result<()> {
        self.put_in(to, values)
    }

    fn write_floats(&mut self, to: Mat, values: &[f32]) -> Result<()> {
        let at = self.place(to)?;
        self.best_of = None;
        ensure!(4 * values.len() <= to.bytes(), Shape, "{} numbers do not fit {to:?}", values.len());
        self.device.copy_in(at, bytemuck::cast_slice(values))
    }

    fn read_ints(&mut self, from: Ints, to: &mut [u32]) -> Result<()> {
        ensure!(
            to.len() <= from.len && 4 * (from.offset + from.len) <= self.ints.bytes,
            Shape,
            "{} integers of {from:?}",
            to.len()
        );
        self.send()?;
        self.device.copy_out(self.ints.start.plus(4 * from.offset), bytemuck::cast_slice_mut(to))
    }

    fn read_floats(&mut self, from: Mat, to: &mut [f32]) -> Result<()> {
        let at = self.place(from)?;
        ensure!(4 * to.len() <= from.bytes(), Shape, "{} numbers of {from:?}", to.len());
        self.device.copy_out(at, bytemuck::cast_slice_mut(to))
    }

    fn kv_pages(&mut self, layer: usize, slot: usize, first: usize, pages: &[u32]) -> Result<()> {
        let Pool { layout, tables, .. } = self.kv();
        let fits = layer < layout.layers && slot < layout.slots && first + pages.len() <= layout.pages_per_seq;
        ensure!(fits && pages.iter().all(|&p| (p as usize) < layout.pages), Shape, "pages beyond the pool");
        let at = tables + (layer * layout.slots + slot) * layout.pages_per_seq + first;
        self.put(at, pages)
    }

    fn kv_len(&mut self, layer: usize, slot: usize, rows: usize) -> Result<()> {
        let Pool { layout, lens, .. } = self.kv();
        ensure!(layer < layout.layers && slot < layout.slots, Shape, "a length beyond the pool");
        let at = lens + layer * layout.slots + slot;
        self.put(at, &[rows as u32])
    }

    fn step(
        &mut self,
        key: Option<StepKey>,
        body: &mut (dyn FnMut(&mut dyn Backend) -> Result<()> + Send),
    ) -> Result<()> {
        let Some(key) = key else { return body(self) };
        self.send()?;
        let met = self.steps.iter().position(|(met, _)| *met == key).map(|at| self.steps.remove(at).1);
        let recorded = match met {
            None => {
                body(self)?;
                return self.remember(key, None);
            }
            Some(None) => self.record(body)?,
            Some(Some(recorded)) => recorded,
        };
        self.remember(key, Some(recorded))?;
        let recorded = self.steps.last().and_then(|(_, recorded)| recorded.as_ref()).expect("just remembered");
        self.best_of = None;
        self.device.replay(recorded.graph)?;
        for (to, from) in self.accounts.meter.ops.iter_mut().zip(&recorded.meter.ops) {
            to.calls += from.calls;
            to.cost = to.cost + from.cost;
        }
        self.accounts.meter.kv_rows += recorded.meter.kv_rows;
        Ok(())
    }

    fn forget(&mut self) -> Result<()> {
        self.accounts.forget(self.device.as_mut())?;
        self.steps.drain(..).filter_map(|(_, recorded)| recorded).try_for_each(|r| self.device.forget(r.graph))
    }

    fn rates(&mut self, _dtype: DType) -> Result<Rates> {
        self.measure()
    }

    /// Waits for the device. What cannot be read, because the device has failed, is missing.
    fn meter(&mut self) -> &mut Meter {
        let _ = self.accounts.collect(self.device.as_mut());
        &mut self.accounts.meter
    }

    fn counters(&self) -> Counters {
        self.device.counters()
    }
}
