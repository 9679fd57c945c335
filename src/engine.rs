//! Sequences of tokens in, logits out: the model, its state and a backend behind one handle.

use std::ops::{AddAssign, ControlFlow};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

pub use crate::backend::Draw;
use crate::backend::cpu::CpuBackend;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, CudaBackend};
use crate::backend::{
    Backend, Counters, DeviceInfo, KvLayout, Meter, PAGE, Rates, SAMPLE_NONE, Take, TrainingBackend, mean, sigmoid,
};
pub use crate::backend::{Kernels, Precision};
use crate::config::Config;
use crate::error::{Error, Kind, Result, ensure};
use crate::kv::Slot;
pub use crate::memory::Budget;
use crate::memory::{Limits, MemoryPlan, Routed};
use crate::model::{Gates, Model, Routing};
use crate::router::Level;
pub use crate::step::Activity;
use crate::step::{Phase, State};
use crate::tensor::DType;
use crate::weights::Weights;

/// What an engine runs on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The first GPU when this build has kernels and the machine a driver, else the CPU.
    #[default]
    Auto,
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
/// # assert_eq!(options.batch, 1);
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
    fn limits(&self, config: &Config, device: &DeviceInfo) -> Limits {
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
/// Errors: as of [`Engine::new`].
pub fn rates(options: &Options, dtype: DType) -> Result<(DeviceInfo, Rates)> {
    let mut backend = open_backend(options, dtype, &mut None)?;
    let rates = backend.rates(dtype)?;
    Ok((backend.info().clone(), rates))
}

/// To train on, in f32 throughout: of the options, what device and how many threads. Errors: as of [`Engine::new`].
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

fn plan(
    config: &Config,
    weights: &Weights,
    routing: Option<&Routing>,
    options: &Options,
    backend: &dyn Backend,
) -> Result<MemoryPlan> {
    let routed = routing.map_or(0, |r| r.layers.len());
    let sparse = routing.filter(|r| r.keys() == Take::Active).map_or(0, |r| r.layers.len());
    let device = backend.info();
    let weights = device.weights.map_or(weights.bytes(), |dtype| weights.parameters() * dtype.size()) as u64;
    let limits = options.limits(config, device);
    MemoryPlan::new(config, Routed { layers: routed, sparse_kv: sparse }, weights, limits, backend)
}

/// An open sequence of an [`Engine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seq {
    slot: Slot,
    /// A number of its own among all sequences of all engines: a handle outlives what it stands for.
    id: u64,
}

/// A place in a sequence, from [`Engine::mark`], to come back to with [`Engine::rewind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mark {
    seq: Seq,
    id: u64,
}

/// What a sequence held at a [`Mark`].
struct Held {
    id: u64,
    position: usize,
    /// `[layers]`: K/V rows.
    rows: Vec<usize>,
}

/// The next [`Seq::id`] or [`Mark::id`].
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// How one routed layer treated the last prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTrace {
    pub layer: usize,
    /// One entry for each token, or a single one where the sequence was decided as a whole.
    pub active: Vec<bool>,
    /// The sigmoid scores behind `active`.
    pub scores: Vec<f32>,
}

/// What the open sequences hold in the KV cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvUsage {
    /// K/V rows held, over all layers.
    pub rows: usize,
    /// K/V rows the dense model would hold for the same tokens.
    pub dense_rows: usize,
    /// Pages held, of [`KvLayout::pages`].
    pub pages: usize,
    /// Bytes of the pages held.
    pub bytes: u64,
    /// Bytes of the pages the dense model would hold.
    pub dense_bytes: u64,
}

impl AddAssign for KvUsage {
    fn add_assign(&mut self, other: KvUsage) {
        self.rows += other.rows;
        self.dense_rows += other.dense_rows;
        self.pages += other.pages;
        self.bytes += other.bytes;
        self.dense_bytes += other.dense_bytes;
    }
}

/// A model ready to run.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let options = Options { batch: 2, ..Options::default() };
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &options)?;
/// let (tom, dog) = (engine.open()?, engine.open()?);
/// let prompts = [tokenizer.encode("Tom had a", true)?, tokenizer.encode("The dog", true)?];
/// let logits = engine.prefill(&[(tom, &prompts[0]), (dog, &prompts[1])])?;
/// assert_eq!(logits.len(), 2 * 1536); // [sequences, vocab]
/// let logits = engine.decode(&[(dog, 17)])?;
/// assert_eq!(logits.len(), 1536);
/// assert_eq!(engine.position(dog), prompts[1].len() + 1);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Engine {
    model: Model,
    state: State,
    backend: Box<dyn Backend>,
    fallback: Option<Error>,
    /// Kept to name a NaN weight when logits turn out not to be finite.
    weights: Weights,
    /// `[slots]`: tokens processed so far.
    positions: Vec<usize>,
    /// `[slots]`: who has it.
    open: Vec<Option<Seq>>,
    /// `[slots]`: marks in order.
    marks: Vec<Vec<Held>>,
    /// `[sequences, vocab]` of the last step, unless it has chosen tokens.
    pub(crate) logits: Vec<f32>,
    /// `[sequences]`, when the last step has chosen them.
    pub(crate) tokens: Vec<u32>,
}

impl Engine {
    /// Plans the memory, loads the weights and allocates. Errors: Memory with the sizes when it does not fit; what
    /// [`Weights::tensor`] refuses.
    pub fn new(config: Config, weights: Weights, routing: Option<Routing>, options: &Options) -> Result<Self> {
        let mut fallback = None;
        let mut backend: Box<dyn Backend> = open_backend(options, weights.main_dtype(), &mut fallback)?;
        if let Some(Routing { gates: Gates::Routers(set), .. }) = &routing {
            set.check(&config, &weights.fingerprint())?;
        }
        let plan = plan(&config, &weights, routing.as_ref(), options, backend.as_ref())?;
        let model = Model::load(config, &weights, routing, backend.as_mut())?;
        backend.reserve(plan.arena as usize, plan.ints as usize / 4, plan.workspace as usize, &plan.kv)?;
        let slots = plan.kv.slots;
        let state = State::new(plan);
        Ok(Engine {
            model,
            state,
            backend,
            fallback,
            weights,
            positions: vec![0; slots],
            open: vec![None; slots],
            marks: (0..slots).map(|_| Vec::new()).collect(),
            logits: Vec::new(),
            tokens: Vec::new(),
        })
    }

    /// Routes otherwise from here on; None: not at all. Weights, plan and counts stay.
    ///
    /// Errors: Argument while a sequence is open, and for more routed layers than the engine was planned for; what
    /// [`RouterSet::check`](crate::router::RouterSet::check) refuses; the routing is as before then. What
    /// [`Model::load`] refuses of a routing; the model is dense then.
    pub fn reroute(&mut self, routing: Option<Routing>) -> Result<()> {
        ensure!(self.open.iter().all(Option::is_none), Argument, "sequences are open: they were routed otherwise");
        let (planned, wanted) = (self.state.plan.routed, routing.as_ref().map_or(0, |r| r.layers.len()));
        ensure!(wanted <= planned, Argument, "{wanted} layers are routed, {planned} were planned for");
        if let Some(Routing { gates: Gates::Routers(set), .. }) = &routing {
            set.check(&self.model.config, &self.weights.fingerprint())?;
        }
        self.backend.forget()?;
        self.state.forget();
        self.model.route(routing, self.backend.as_mut())
    }

    /// The memory that an engine would take, without building it. Errors: as of [`new`](Self::new).
    ///
    /// ```
    /// use mindskip::bundle::Bundle;
    /// use mindskip::engine::{Engine, Options};
    ///
    /// let bundle = Bundle::embedded()?;
    /// let plan = Engine::plan_for(&bundle.config, &bundle.weights, None, &Options::default())?;
    /// assert_eq!(plan.total(), plan.weights + plan.activations() + plan.kv_bytes());
    /// println!("{plan}");
    /// # Ok::<(), mindskip::Error>(())
    /// ```
    pub fn plan_for(
        config: &Config,
        weights: &Weights,
        routing: Option<&Routing>,
        options: &Options,
    ) -> Result<MemoryPlan> {
        plan(config, weights, routing, options, open_backend(options, weights.main_dtype(), &mut None)?.as_ref())
    }

    /// Opens a sequence. Errors: Memory when `batch` sequences are open.
    pub fn open(&mut self) -> Result<Seq> {
        let slot = self.state.open(self.backend.as_mut())?;
        let seq = Seq { slot, id: NEXT_ID.fetch_add(1, Ordering::Relaxed) };
        self.positions[slot.index()] = 0;
        self.open[slot.index()] = Some(seq);
        Ok(seq)
    }

    /// Ends a sequence and gives its pages back. One that is not open here is left as it is.
    pub fn close(&mut self, seq: Seq) -> Result<()> {
        if self.is_open(seq) {
            self.state.settle(self.backend.as_mut(), &self.model)?;
            self.state.kv.close(seq.slot);
            self.open[seq.slot.index()] = None;
            self.marks[seq.slot.index()].clear();
        }
        Ok(())
    }

    /// Remembers how far a sequence is: what follows can be given up by [`rewind`](Self::rewind), as often as one likes, so
    /// that several continuations share the K/V of what is before them. Errors: Argument for a closed sequence.
    pub fn mark(&mut self, seq: Seq) -> Result<Mark> {
        ensure!(self.is_open(seq), Argument, "a sequence that was closed, or is another engine's");
        self.state.settle(self.backend.as_mut(), &self.model)?;
        let rows = (0..self.kv_layout().layers).map(|l| self.state.kv.len(l, seq.slot)).collect();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let slot = seq.slot.index();
        self.marks[slot].push(Held { id, position: self.positions[slot], rows });
        Ok(Mark { seq, id })
    }

    /// Makes a sequence what it was at a mark, and gives the pages behind it back; marks that were made later are void. A
    /// sequence that is decided as a whole keeps its decisions, unless nothing is before the mark.
    ///
    /// Errors: Argument for a closed sequence and for a void mark.
    pub fn rewind(&mut self, mark: Mark) -> Result<()> {
        let (seq, slot) = (mark.seq, mark.seq.slot.index());
        ensure!(self.is_open(seq), Argument, "a sequence that was closed, or is another engine's");
        let found = self.marks[slot].iter().position(|held| held.id == mark.id);
        let Some(at) = found else {
            return Err(Error::new(Kind::Argument, "the sequence was rewound to before this mark"));
        };
        self.state.settle(self.backend.as_mut(), &self.model)?;
        self.marks[slot].truncate(at + 1);
        let held = &self.marks[slot][at];
        self.state.rewind(self.backend.as_mut(), seq.slot, &held.rows, held.position == 0)?;
        self.positions[slot] = held.position;
        Ok(())
    }

    fn is_open(&self, seq: Seq) -> bool {
        self.open.get(seq.slot.index()).is_some_and(|held| *held == Some(seq))
    }

    /// Reads prompts, or more of them: `tokens` follow what the sequence holds. Returns the logits behind the last token of
    /// each, `[sequences, vocab]` row-major.
    ///
    /// Errors: Argument for an empty prompt, an id beyond the vocabulary, a closed or repeated sequence, more tokens than
    /// the context or [`Options::rows`]; Memory when the KV cache is full; Numeric for logits with a NaN or +∞, or nothing but
    /// −∞. The sequences are as before then.
    pub fn prefill(&mut self, prompts: &[(Seq, &[u32])]) -> Result<&[f32]> {
        self.step(Phase::Prefill, prompts, None)?;
        Ok(&self.logits)
    }

    /// [`prefill`](Self::prefill) that chooses the token behind each prompt on the device, as the draws say: one for each
    /// prompt. The logits stay there. Errors as in `prefill`, and Argument for a draw that is out of range.
    pub fn prefill_and_sample(&mut self, prompts: &[(Seq, &[u32])], draws: &[Draw]) -> Result<&[u32]> {
        self.step(Phase::Prefill, prompts, Some(draws))?;
        Ok(&self.tokens)
    }

    /// Appends one token to each sequence and returns the logits behind it, `[sequences, vocab]`. Errors as in `prefill`.
    pub fn decode(&mut self, tokens: &[(Seq, u32)]) -> Result<&[f32]> {
        let steps: Vec<(Seq, &[u32])> = tokens.iter().map(|(seq, id)| (*seq, std::slice::from_ref(id))).collect();
        self.step(Phase::Decode, &steps, None)?;
        Ok(&self.logits)
    }

    /// [`decode`](Self::decode) that chooses the next token of each sequence on the device: a step reads back 4 bytes for
    /// each sequence, beside the counts of the step before. Errors as in `prefill_and_sample`.
    pub fn decode_and_sample(&mut self, tokens: &[(Seq, u32)], draws: &[Draw]) -> Result<&[u32]> {
        let steps: Vec<(Seq, &[u32])> = tokens.iter().map(|(seq, id)| (*seq, std::slice::from_ref(id))).collect();
        self.step(Phase::Decode, &steps, Some(draws))?;
        Ok(&self.tokens)
    }

    /// Any of the four above: what it gives stands in `tokens` with draws, in `logits` without.
    pub(crate) fn step(&mut self, phase: Phase, seqs: &[(Seq, &[u32])], draws: Option<&[Draw]>) -> Result<()> {
        self.check(seqs)?;
        let fits = draws.is_none_or(|draws| draws.len() == seqs.len());
        ensure!(fits, Argument, "{} draws for {} sequences", draws.map_or(0, <[_]>::len), seqs.len());
        draws.unwrap_or_default().iter().try_for_each(Draw::check)?;
        let steps: Vec<_> =
            seqs.iter().map(|&(Seq { slot, .. }, ids)| (slot, self.positions[slot.index()], ids)).collect();
        self.state.run(self.backend.as_mut(), &self.model, phase, &steps, draws)?;
        let read = if draws.is_some() { self.read_tokens() } else { self.read_logits() };
        if !matches!(read, Ok(true)) {
            let undone = self.state.undo(self.backend.as_mut());
            return Err(read.and(undone).err().unwrap_or_else(|| self.no_numbers()));
        }
        for &(Seq { slot, .. }, ids) in seqs {
            self.positions[slot.index()] += ids.len();
        }
        Ok(())
    }

    /// Whether a token could be chosen by each row: as [`SAMPLE_NONE`] says.
    fn read_logits(&mut self) -> Result<bool> {
        let logits = self.state.plan.buffers.logits.rows(0..self.state.sequences());
        self.logits.resize(logits.rows * logits.cols, 0.0);
        self.backend.read_floats(logits, &mut self.logits)?;
        let has_numbers = |row: &[f32]| row.iter().all(|x| *x < f32::INFINITY) && row.iter().any(|x| x.is_finite());
        Ok(self.logits.chunks_exact(logits.cols).all(has_numbers))
    }

    /// Whether one could be chosen for every sequence.
    fn read_tokens(&mut self) -> Result<bool> {
        let tokens = self.state.tokens();
        self.tokens.resize(tokens.len, 0);
        self.backend.read_ints(tokens, &mut self.tokens)?;
        Ok(!self.tokens.contains(&SAMPLE_NONE))
    }

    fn check(&self, seqs: &[(Seq, &[u32])]) -> Result<()> {
        ensure!(!seqs.is_empty(), Argument, "a step without sequences");
        self.check_rows(seqs.iter().map(|(_, ids)| ids.len()).sum())?;
        for (i, &(seq, ids)) in seqs.iter().enumerate() {
            ensure!(self.is_open(seq), Argument, "a sequence that was closed, or is another engine's");
            ensure!(seqs[..i].iter().all(|(other, _)| *other != seq), Argument, "a sequence stands twice in a step");
            self.check_tokens(self.positions[seq.slot.index()], ids)?;
        }
        Ok(())
    }

    /// Whether one prefill takes so many tokens.
    pub(crate) fn check_rows(&self, rows: usize) -> Result<()> {
        let most = self.state.plan.limits.rows;
        if rows > most {
            return Err(Error::new(Kind::Argument, format!("{rows} tokens at once, {most} were planned for"))
                .action("raise --context, or give fewer or shorter prompts"));
        }
        Ok(())
    }

    /// Whether a sequence of `before` tokens can read these.
    pub(crate) fn check_tokens(&self, before: usize, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::new(Kind::Argument, "the prompt is empty").action("give at least one token of text"));
        }
        let (end, context) = (before + ids.len(), self.state.plan.limits.context);
        if end > context {
            return Err(Error::new(Kind::Argument, format!("{end} tokens are longer than the context of {context}"))
                .action("shorten the prompt, or raise --context where the model allows it"));
        }
        let vocab = self.model.config.vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::new(Kind::Argument, format!("token id {id} is beyond the vocabulary of {vocab}"))
                .action(format!("use ids from 0 to {}", vocab - 1)));
        }
        Ok(())
    }

    /// Why logits are not numbers.
    fn no_numbers(&self) -> Error {
        match self.weights.find_non_finite() {
            Some((tensor, path)) => Error::new(Kind::Numeric, format!("tensor {tensor} holds a NaN or an infinity"))
                .at(path)
                .action("get the model again; its file is damaged"),
            None => Error::new(Kind::Numeric, "the logits are not finite, although all weights are")
                .action("the activations overflow: check the model's dtype and config.json"),
        }
    }

    /// After [`prefill`](Self::prefill) of one sequence: the natural log-probability of `targets[i]` behind its i-th
    /// token, for as many tokens as targets are given. Errors as in [`logprobs_at`](Self::logprobs_at), and Argument when
    /// there were several sequences.
    pub fn logprobs(&mut self, targets: &[u32]) -> Result<Vec<f32>> {
        let sequences = self.state.sequences();
        ensure!(sequences == 1, Argument, "targets of one sequence, the last step had {sequences}");
        self.logprobs_at(&(0..).zip(targets.iter().copied()).collect::<Vec<_>>())
    }

    /// After [`prefill`](Self::prefill): the natural log-probability of each target behind a row. Rows are the tokens of that
    /// step, those of its prompts one after the other.
    ///
    /// Errors: Argument when the last step was no prefill, for a row that it did not have, and for a target beyond the
    /// vocabulary; Numeric as in `prefill`.
    pub fn logprobs_at(&mut self, targets: &[(u32, u32)]) -> Result<Vec<f32>> {
        let (rows, vocab) = (self.state.rows(), self.model.config.vocab);
        ensure!(self.state.phase() == Phase::Prefill, Argument, "targets are of a prefill, the last step was none");
        for &(row, target) in targets {
            ensure!((row as usize) < rows, Argument, "a target behind token {row}, the last prefill had {rows}");
            ensure!((target as usize) < vocab, Argument, "a target beyond the vocabulary of {vocab}");
        }
        let (be, state, model) = (self.backend.as_mut(), &self.state, &self.model);
        let mut out = vec![0.0; targets.len()];
        be.step(None, &mut |be| model.logprobs(be, state, targets, &mut out))?;
        if out.iter().all(|x| x.is_finite()) { Ok(out) } else { Err(self.no_numbers()) }
    }

    /// Lets `watch` see how far each prefill is, and stop it: the prefill then fails as Interrupted, with the sequences as
    /// before.
    pub fn watch(&mut self, watch: impl Fn(f64) -> ControlFlow<()> + Send + Sync + 'static) {
        self.state.watch = Some(Box::new(watch));
    }

    /// How the routed layers treated the last prefill, which was of a single sequence. Sequences that are decided as a whole
    /// are so by their first prompt; the scores are those of the last one.
    ///
    /// Errors: Argument when the last step was another one.
    pub fn trace(&mut self) -> Result<Vec<LayerTrace>> {
        ensure!(
            self.state.phase() == Phase::Prefill && self.state.sequences() == 1,
            Argument,
            "a trace is of the prefill of one sequence"
        );
        let Some(routing) = &self.model.routing else { return Ok(Vec::new()) };
        let rows = self.state.rows();
        let mut traces = Vec::with_capacity(routing.layers.len());
        for (nth, &layer) in routing.layers.iter().enumerate() {
            let mut logits = vec![0.0; rows];
            self.backend.read_floats(self.state.gate(nth), &mut logits)?;
            let count = self.state.active_rows(layer);
            let mut list = vec![0; count];
            self.backend.read_ints(self.state.active_list(nth).slice(0..count), &mut list)?;
            traces.push(match routing.settings.granularity.level {
                Level::Token => {
                    let mut active = vec![false; rows];
                    list.iter().for_each(|&row| active[row as usize] = true);
                    LayerTrace { layer, active, scores: logits.into_iter().map(sigmoid).collect() }
                }
                Level::Sequence => LayerTrace { layer, active: vec![count > 0], scores: vec![sigmoid(mean(&logits))] },
            });
        }
        Ok(traces)
    }

    /// How much of the depth was used so far.
    pub fn activity(&mut self) -> Result<&Activity> {
        self.state.settle(self.backend.as_mut(), &self.model)?;
        Ok(&self.state.activity)
    }

    /// Starts [`activity`](Self::activity) and the [`meter`](Self::meter) anew.
    pub fn clear_counts(&mut self) -> Result<()> {
        self.state.settle(self.backend.as_mut(), &self.model)?;
        self.state.activity.clear();
        *self.backend.meter() = Meter::default();
        Ok(())
    }

    /// K/V held by the open sequences, and what the dense model would hold.
    pub fn kv_usage(&mut self) -> Result<KvUsage> {
        let mut usage = KvUsage::default();
        for seq in self.open.clone().into_iter().flatten() {
            usage += self.kv_usage_of(seq)?;
        }
        // By the books of the pool, whoever holds them.
        usage.pages = self.state.kv.pages_in_use();
        usage.bytes = usage.pages as u64 * self.kv_layout().page_bytes() as u64;
        Ok(usage)
    }

    /// K/V held by one sequence; nothing by one that is not open here.
    pub(crate) fn kv_usage_of(&mut self, seq: Seq) -> Result<KvUsage> {
        self.state.settle(self.backend.as_mut(), &self.model)?;
        let (KvLayout { layers, .. }, tokens) = (self.kv_layout(), self.position(seq));
        if tokens == 0 {
            return Ok(KvUsage::default());
        }
        let rows = || (0..layers).map(|l| self.state.kv.len(l, seq.slot));
        let (pages, page) = (rows().map(|n| n.div_ceil(PAGE)).sum(), self.kv_layout().page_bytes() as u64);
        Ok(KvUsage {
            rows: rows().sum(),
            dense_rows: layers * tokens,
            pages,
            bytes: pages as u64 * page,
            dense_bytes: (layers * tokens.div_ceil(PAGE)) as u64 * page,
        })
    }

    /// By layer: the share of tokens whose K/V were held so far; 1 where all are, or none was processed.
    pub(crate) fn kv_shares(&mut self) -> Result<Vec<f64>> {
        self.state.settle(self.backend.as_mut(), &self.model)?;
        let share = |layer| match self.model.keys_of(layer) {
            Take::All => 1.0,
            Take::Active => self.state.activity.capacity(layer),
        };
        Ok((0..self.kv_layout().layers).map(share).collect())
    }

    /// FLOPs, bytes and calls by op since the engine was built or [`clear_counts`](Self::clear_counts).
    pub fn meter(&mut self) -> &Meter {
        self.backend.meter()
    }

    /// Why [`Device::Auto`] is the CPU, in a build that has kernels for GPUs.
    pub fn fallback(&self) -> Option<&Error> {
        self.fallback.as_ref()
    }

    /// Launches, waits and copies of a GPU since the engine was built; zeros on the CPU.
    pub fn counters(&self) -> Counters {
        self.backend.counters()
    }

    /// Tokens that a sequence holds; 0 for one that is not open here.
    pub fn position(&self, seq: Seq) -> usize {
        if self.is_open(seq) { self.positions[seq.slot.index()] } else { 0 }
    }

    pub fn config(&self) -> &Config {
        &self.model.config
    }

    pub fn routing(&self) -> Option<&Routing> {
        self.model.routing.as_ref()
    }

    pub fn plan(&self) -> &MemoryPlan {
        &self.state.plan
    }

    pub fn device(&self) -> &DeviceInfo {
        self.backend.info()
    }

    fn kv_layout(&self) -> KvLayout {
        self.state.plan.kv
    }
}
