//! Where an engine runs and how large it may become.

use std::str::FromStr;

use crate::backend::cpu::CpuBackend;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, CudaBackend};
use crate::backend::{DeviceInfo, Kernels, Precision, Rates, TrainingBackend};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::memory::{Budget, Limits};
use crate::tensor::DType;

/// What an engine runs on.
///
/// ```
/// use mindskip::engine::Device;
///
/// assert_eq!(("cuda:1".parse(), "auto".parse()), (Ok(Device::Cuda(1)), Ok(Device::default())));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The first GPU when this build has kernels and the machine a driver, else the CPU.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by its number.
    Cuda(usize),
    /// The emulator of a GPU, to test the kernels; threads run in an order drawn from the seed.
    #[cfg(feature = "emulate")]
    Emulated(u64),
}

impl FromStr for Device {
    type Err = Error;
    /// `auto`, `cpu`, `cuda`, which is the first GPU, `cuda:N`. Errors: Argument.
    fn from_str(text: &str) -> Result<Self> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Device::Auto),
            ("cpu", _) => Ok(Device::Cpu),
            ("cuda", _) => Ok(Device::Cuda(0)),
            (_, Some(Ok(number))) => Ok(Device::Cuda(number)),
            #[cfg(feature = "emulate")]
            ("emulate", _) => Ok(Device::Emulated(0)),
            _ => {
                Err(Error::new(Kind::Argument, format!("no such device: {text}"))
                    .action("give cpu, cuda, cuda:N or auto"))
            }
        }
    }
}

/// Where an engine runs and how large it may become.
///
/// ```
/// use mindskip::engine::{Budget, Device, Options};
/// use mindskip::tensor::DType;
///
/// let options = Options {
///     device: Device::Cpu,
///     kv_dtype: Some(DType::BF16),
///     memory: Some(Budget::Bytes(4 << 30)),
///     context: Some(1024),
///     ..Options::default()
/// };
/// assert_eq!((options.batch, options.rows), (1, None), "one sequence, its context in one go");
/// ```
#[derive(Debug, Clone)]
pub struct Options {
    pub device: Device,
    /// On a GPU, what matrices and activations are stored in; None: what most of the model is in.
    pub dtype: Option<DType>,
    /// What K/V are stored in; None: the type of the activations, which is f32 on the CPU. Nothing wider than that.
    pub kv_dtype: Option<DType>,
    /// CPU threads; None: one for every core this process may use.
    pub threads: Option<usize>,
    /// On the CPU.
    pub precision: Precision,
    /// On a GPU.
    pub kernels: Kernels,
    /// Tokens of a sequence, prompt and answer together; None: what the model was made for, at most 4096.
    pub context: Option<usize>,
    /// Sequences open at a time.
    pub batch: usize,
    /// Tokens of one prefill call, all prompts together; None: `context`. [`Batch`](crate::batch::Batch) reads longer prompts in parts.
    pub rows: Option<usize>,
    /// Rows that go through a layer at a time in prefill; None: as many as suit the device.
    pub chunk: Option<usize>,
    /// Tokens whose K/V are held at a time, of all sequences together, when none is skipped; None: `batch` whole contexts.
    /// What [`Batch`](crate::batch::Batch) serves seldom needs as many.
    pub kv_tokens: Option<usize>,
    /// For everything together; None: what the device has free.
    pub memory: Option<Budget>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            device: Device::Auto,
            dtype: None,
            kv_dtype: None,
            threads: None,
            precision: Precision::F32,
            kernels: Kernels::Auto,
            context: None,
            batch: 1,
            rows: None,
            chunk: None,
            kv_tokens: None,
            memory: None,
        }
    }
}

impl Options {
    pub(super) fn limits(&self, config: &Config, device: &DeviceInfo) -> Limits {
        let context = self.context.unwrap_or(config.context.min(4096));
        Limits {
            context,
            batch: self.batch,
            rows: self.rows.unwrap_or(context).max(self.batch),
            chunk: self.chunk.unwrap_or(device.chunk),
            kv_tokens: self.kv_tokens,
            memory: self.memory,
        }
    }
}

/// What a device can do at best, measured there with products of weights in `dtype`, and what it calls itself.
/// Errors: as of [`Engine::new`](super::Engine::new).
///
/// ```
/// use mindskip::engine::{Device, Options, rates};
/// use mindskip::tensor::DType;
///
/// let (device, rates) = rates(&Options { device: Device::Cpu, ..Options::default() }, DType::BF16)?;
/// println!("{}: {:.0} GB/s, {:.0} GFLOP/s", device.name, rates.copy / 1e9, rates.product / 1e9);
/// assert!(rates.copy > 1e7 && rates.product > 1e7);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn rates(options: &Options, dtype: DType) -> Result<(DeviceInfo, Rates)> {
    let mut backend = open_backend(options, dtype, &mut None)?;
    let rates = backend.rates(dtype)?;
    Ok((backend.info().clone(), rates))
}

/// To train on, in f32 throughout: of the options, what device and how many threads. Errors: as of [`Engine::new`](super::Engine::new).
///
/// ```
/// use mindskip::engine::{Device, Options, training_backend};
/// use mindskip::tensor::DType;
///
/// let backend = training_backend(&Options { device: Device::Cpu, threads: Some(2), ..Options::default() })?;
/// assert_eq!((backend.info().activations, backend.info().kv), (DType::F32, DType::F32));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn training_backend(options: &Options) -> Result<Box<dyn TrainingBackend>> {
    let f32s =
        Options { dtype: Some(DType::F32), kv_dtype: Some(DType::F32), precision: Precision::F32, ..options.clone() };
    open_backend(&f32s, DType::F32, &mut None)
}

/// For a model whose matrices are in `dtype`. Errors: Device and Unsupported when what was asked for is not there.
/// `fallback`: why there is no GPU for Auto.
pub(crate) fn open_backend(
    options: &Options,
    dtype: DType,
    fallback: &mut Option<Error>,
) -> Result<Box<dyn TrainingBackend>> {
    #[cfg(not(feature = "cuda"))]
    let _ = (dtype, fallback);
    let hopper = options.kernels == Kernels::Hopper;
    let cpu = || {
        if hopper {
            let error = Error::new(Kind::Unsupported, "the kernels for Hopper run on a GPU, and this would be the CPU");
            return Err(error.action("use --device cuda, or --kernels auto"));
        }
        let kv = options.kv_dtype.unwrap_or(DType::F32);
        Ok(Box::new(CpuBackend::new(options.threads, options.precision, kv)?) as Box<dyn TrainingBackend>)
    };
    #[cfg(feature = "cuda")]
    let gpu = |device| {
        let dtype = options.dtype.unwrap_or(dtype);
        let backend = CudaBackend::new(device, dtype, options.kv_dtype.unwrap_or(dtype))?;
        Ok(Box::new(backend.with_kernels(options.kernels)?) as _)
    };
    match options.device {
        Device::Cpu => cpu(),
        #[cfg(feature = "cuda")]
        Device::Auto if !cuda::MODULES.is_empty() => match cuda::driver::Driver::open(0, cuda::MODULES) {
            Ok(driver) => gpu(Box::new(driver)),
            Err(e) if e.kind() == Kind::Device && !hopper => {
                *fallback = Some(e);
                cpu()
            }
            Err(e) => Err(e),
        },
        Device::Auto => cpu(),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => gpu(Box::new(cuda::driver::Driver::open(ordinal, cuda::MODULES)?)),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => Err(Error::new(Kind::Unsupported, "this program was built without the feature `cuda`")
            .action("build it with the feature, or use the CPU")),
        #[cfg(feature = "emulate")]
        Device::Emulated(seed) => gpu(Box::new(cuda::emulated::Emulated::new(seed))),
    }
}
