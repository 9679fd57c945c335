//! What skipping buys, measured: dense and routed runs of one model in turns, beside what the machine could do at best.
//!
//! A [`Plan`] is a sweep. Each combination of its lists is a [`Point`] with an engine of its own, in which the ways to run
//! take turns: round by round, in another order each time, so that what slows the machine down falls on all of them. Each step
//! chooses the best next token, as a greedy generation does; what goes in are random token ids, the same for all ways.

mod compare;
mod curves;
mod format;
mod ideal;
mod ops;
mod paper;
mod record;
mod run;
mod shapes;
mod stats;

pub use compare::{Compared, Comparison, Saved, Verdict, What, compare};
pub use curves::charts;
pub(crate) use format::write_lines;
pub use format::{Cells, Format, Lines, save, write};
pub use ideal::{Ideal, Text, ideal};
pub use ops::{OpBench, OpsPlan, measure_ops};
pub use paper::{PaperPlan, PaperRow, measure_paper};
pub use record::{Head, OpRow, Phase, Row};
pub use run::{Progress, measure};
pub use shapes::{SHAPES, shape};

use crate::bundle::Bundle;
use crate::config::Config;
use crate::engine::{Device, Kernels, Options, Precision};
use crate::error::{Error, Kind, Result};
use crate::machine::Machine;
use crate::memory::Budget;
use crate::model::{Gates, Routing};
use crate::router::{Level, Target};
use crate::tensor::DType;
use crate::weights::Weights;

/// What is measured: a model, or the shape of one.
///
/// ```
/// use mindskip::bench::{Subject, shape};
/// use mindskip::bundle::Bundle;
///
/// let (small, large) = (Subject::model(Bundle::embedded()?), Subject::shape("an 8B", shape("llama-3-8b")?));
/// assert_eq!((small.name.as_str(), small.config.layers, large.config.layers), ("stories", 8, 32));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Subject {
    pub name: String,
    pub config: Config,
    /// None: random ones.
    weights: Option<Weights>,
}

impl Subject {
    /// With its own weights, dense but for the ways to run it.
    pub fn model(bundle: Bundle) -> Subject {
        Subject { name: bundle.name, config: bundle.config, weights: Some(bundle.weights) }
    }

    /// With random weights, which take no file and no upload.
    pub fn shape(name: &str, config: Config) -> Subject {
        Subject { name: name.into(), config, weights: None }
    }

    /// Its weights; random ones in `dtype`, or bf16.
    fn weights(&self, dtype: Option<DType>) -> Weights {
        let random = || Weights::random(&self.name, &self.config, dtype.unwrap_or(DType::BF16), 0);
        self.weights.clone().unwrap_or_else(random)
    }
}

/// A way to run a model.
///
/// ```
/// use mindskip::bench::Way;
/// use mindskip::model::{Gates, Routing};
/// use mindskip::router::RouterSettings;
///
/// let gates = Gates::Random { capacity: 0.25, seed: 0 };
/// let routing = Routing { settings: RouterSettings::default(), layers: vec![3, 4], gates };
/// let way = Way { routing: Some(routing) };
/// assert_eq!((way.name(), way.keys(), way.capacity()), ("attn_token".into(), Some("all".into()), Some(0.25)));
/// assert_eq!((Way::DENSE.name(), Way::DENSE.keys(), Way::DENSE.capacity()), ("dense".into(), None, None));
/// ```
#[derive(Debug, Clone)]
pub struct Way {
    /// None: dense.
    pub routing: Option<Routing>,
}

impl Way {
    /// The model as it is.
    pub const DENSE: Way = Way { routing: None };

    /// "attn_token", "dense".
    pub fn name(&self) -> String {
        self.routing.as_ref().map_or("dense".into(), |r| r.settings.granularity.to_string())
    }

    /// Whose K/V are kept, where that is a choice.
    pub fn keys(&self) -> Option<String> {
        let settings = &self.routing.as_ref()?.settings;
        let choice = settings.granularity.level == Level::Token && settings.granularity.target != Target::Mlp;
        choice.then(|| settings.keys.to_string())
    }

    /// The share of a random mask that is active; None with routers, and for the dense model.
    pub fn capacity(&self) -> Option<f64> {
        match self.routing.as_ref()?.gates {
            // 0.3 as it was written, not as f32 holds it.
            Gates::Random { capacity, .. } => Some((f64::from(capacity) * 1e6).round() / 1e6),
            Gates::Routers(_) => None,
        }
    }
}

/// A machine to measure on, and how.
#[derive(Debug, Clone, Default)]
pub struct Setting {
    pub device: Device,
    /// What weights are stored in; on a GPU also activations. None: as the model is.
    pub dtype: Option<DType>,
    /// What K/V are stored in; None: as the activations are.
    pub kv_dtype: Option<DType>,
    /// CPU threads; None: one for every core this process may use.
    pub threads: Option<usize>,
    /// On the CPU.
    pub precision: Precision,
    /// On a GPU.
    pub kernels: Kernels,
    /// For everything together; None: what the device has free.
    pub memory: Option<Budget>,
}

impl Setting {
    fn options(&self) -> Options {
        let Setting { device, dtype, kv_dtype, threads, precision, kernels, memory } = *self;
        Options { device, dtype, kv_dtype, threads, precision, kernels, memory, ..Options::default() }
    }

    /// The rates of the machine, and what is known of it, the subject and this program.
    ///
    /// Errors: Argument for another type than the model's on a CPU, which reads weights in place; those of
    /// [`rates`](crate::engine::rates).
    fn head(&self, subject: &Subject, weights: &Weights) -> Result<Head> {
        let stored = weights.main_dtype();
        let (info, rates) = crate::engine::rates(&self.options(), stored)?;
        let dtype = info.weights.unwrap_or(stored);
        if let Some(wanted) = self.dtype.filter(|&wanted| wanted != dtype) {
            let cause = format!("{} is stored in {stored}, and a CPU does not convert it to {wanted}", subject.name);
            let action = "leave --dtype out, or give a --shape, whose random weights are made in any type";
            return Err(Error::new(Kind::Argument, cause).action(action));
        }
        Ok(Head {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("MINDSKIP_COMMIT").map(str::to_owned),
            date: jiff::Timestamp::now().strftime("%FT%TZ").to_string(),
            cpu: Machine::look().cpu,
            driver: driver(info.weights.is_some()),
            device: info.name,
            model: subject.name.clone(),
            parameters: weights.parameters(),
            dtype: dtype.to_string(),
            kv_dtype: info.kv.to_string(),
            precision: match self.precision {
                Precision::F32 => "f32".into(),
                Precision::Bf16 => "bf16".into(),
            },
            threads: self.threads,
            kernels: info.weights.map(|_| {
                match self.kernels {
                    Kernels::Auto => "auto",
                    Kernels::Sm80 => "sm80",
                    Kernels::Hopper => "hopper",
                }
                .into()
            }),
            copy_rate: rates.copy,
            product_rate: rates.product,
        })
    }
}

#[cfg(feature = "cuda")]
fn driver(gpu: bool) -> Option<String> {
    crate::backend::cuda::driver::kernel_module().filter(|_| gpu)
}

#[cfg(not(feature = "cuda"))]
fn driver(_gpu: bool) -> Option<String> {
    None
}

/// A sweep: every combination of what is listed. [`measure`] runs it.
#[derive(Debug, Clone)]
pub struct Plan {
    pub subject: Subject,
    pub settings: Vec<Setting>,
    /// Sequences at a time.
    pub batches: Vec<usize>,
    /// Tokens of each sequence: in the cache before, read in one prefill, decoded.
    pub depths: Vec<usize>,
    pub prompts: Vec<usize>,
    pub generated: Vec<usize>,
    /// The first one is dense: what the others are compared with.
    pub ways: Vec<Way>,
    /// Rounds that are not counted, and that are.
    pub warmup: usize,
    pub reps: usize,
    /// Of token ids.
    pub seed: u64,
}

/// A combination of a sweep but for its setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Sequences at a time.
    pub batch: usize,
    /// Tokens of each: in the cache before, read in one prefill, decoded.
    pub depth: usize,
    pub prompt: usize,
    pub generated: usize,
}

impl Plan {
    /// Errors: Argument for a sweep that measures nothing, and for what no sequence can do.
    pub fn check(&self) -> Result<()> {
        let bad = |cause: String, action: &str| Err(Error::new(Kind::Argument, cause).action(action));
        for (name, list) in [("batch", &self.batches), ("prompt", &self.prompts), ("gen", &self.generated)] {
            if list.is_empty() || name == "batch" && list.contains(&0) {
                return bad(format!("--{name} names nothing to measure"), "give 1 or more");
            }
        }
        if self.reps == 0 {
            return bad("--reps is 0".into(), "give 1 or more");
        }
        for p in self.points() {
            if p.prompt + p.generated == 0 {
                return bad("--prompt 0 with --gen 0 measures nothing".into(), "give one of them");
            }
            let (length, most) = (run::context(&p), self.subject.config.context);
            if length > most {
                let cause = format!(
                    "--depth {} with --prompt {} and --gen {} come to {length} tokens, and {} takes {most}",
                    p.depth, p.prompt, p.generated, self.subject.name
                );
                return bad(cause, "lower one of them");
            }
        }
        Ok(())
    }

    /// What is measured on each setting, the generated lengths in turns first.
    pub fn points(&self) -> Vec<Point> {
        let mut points = Vec::new();
        for &batch in &self.batches {
            for &depth in &self.depths {
                for &prompt in &self.prompts {
                    points.extend(self.generated.iter().map(|&generated| Point { batch, depth, prompt, generated }));
                }
            }
        }
        points
    }
}
