//! Arguments that several commands share, and what they come to: a model, its routing, an engine.

use std::path::PathBuf;

use clap::Args;
use mindskip::Result;
use mindskip::bundle::{Bundle, EMBEDDED};
use mindskip::engine::{Device, Engine, Kernels, Options, Precision};
use mindskip::memory::{Budget, parse_budget};
use mindskip::model::{Gates, Routing};
use mindskip::router::{Granularity, Keys, LayerSpec, Overrides, RouterSet, RouterSettings, Select};
use mindskip::sample::SamplerSettings;
use mindskip::tensor::DType;

use super::bad;
use super::progress;

#[derive(Args)]
pub struct ModelArgs {
    /// The embedded model, the folder of a Hugging Face model, or its id on the hub (org/name).
    #[arg(short, long, default_value = EMBEDDED, value_name = "NAME")]
    pub model: String,
}

impl ModelArgs {
    pub fn load(&self) -> Result<Bundle> {
        Bundle::load(&self.model)
    }
}

/// Routing. Whatever is given overrides what the router file says.
#[derive(Args)]
#[command(next_help_heading = "Routing")]
pub struct RoutingArgs {
    /// Trained routers; "none" for the dense model. The embedded model uses its own when nothing is given.
    #[arg(long, value_name = "FILE")]
    routers: Option<PathBuf>,
    /// What is skipped, and what decides: attn, mlp or block, by token or sequence (attn_token …).
    #[arg(long, value_name = "NAME")]
    granularity: Option<Granularity>,
    /// Whose keys and values a routed layer holds: all, active.
    #[arg(long, value_name = "WHOSE")]
    keys: Option<Keys>,
    /// How scores decide: threshold, or topk of each prompt (Mixture-of-Depths).
    #[arg(long, value_name = "HOW")]
    select: Option<Select>,
    /// Active from this score on, 0 to 1.
    #[arg(long, value_name = "SCORE", allow_negative_numbers = true)]
    threshold: Option<f32>,
    /// Routed layers: last:N (before the final one), all, 3-9, 1,2,5. Of a router file, only these.
    #[arg(long)]
    layers: Option<LayerSpec>,
    /// The share that --select topk takes; else a random mask with this share active, which needs no routers.
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    capacity: Option<f32>,
    /// Of the random mask.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    mask_seed: u64,
}

impl RoutingArgs {
    /// What differs from a router file.
    pub fn overrides(&self) -> Overrides {
        Overrides {
            granularity: self.granularity,
            keys: self.keys,
            select: self.select,
            threshold: self.threshold,
            capacity: self.capacity,
        }
    }

    /// The routing that was asked for; None: dense. Errors: Argument for settings without routers, those of
    /// [`RouterSet::open`] and [`RouterSet::check`].
    pub fn routing(&self, bundle: &Bundle) -> Result<Option<Routing>> {
        let overrides = self.overrides();
        let set = match &self.routers {
            Some(path) if path.as_os_str() == "none" => None,
            Some(path) => Some(RouterSet::open(path)?),
            None => bundle.routers.clone(),
        };
        let select = self.select.or(set.as_ref().map(|set| set.settings.select));
        let top_k = select == Some(Select::TopK);
        if let Some(capacity) = self.capacity.filter(|_| !(top_k && set.is_some())) {
            return self.random(bundle, set, overrides, capacity).map(Some);
        }
        let Some(mut set) = set else {
            if overrides == Overrides::default() && self.layers.is_none() {
                return Ok(None);
            }
            return bad(
                "routing was asked for, but there are no routers",
                "give --routers FILE, or --capacity for a random mask",
            );
        };
        set.check(&bundle.config, &bundle.weights.fingerprint())?;
        set.apply(&overrides)?;
        if let Some(spec) = &self.layers {
            set.keep(&spec.resolve(bundle.config.layers)?)?;
        }
        Ok(Some(Routing::routers(set)))
    }

    /// A random mask: over the layers that were asked for, or those of the routers, or the upper half.
    fn random(&self, bundle: &Bundle, set: Option<RouterSet>, overrides: Overrides, capacity: f32) -> Result<Routing> {
        if !(0.0..=1.0).contains(&capacity) {
            return bad(format!("--capacity is {capacity}"), "give a share from 0 to 1");
        }
        let base = set.as_ref().map_or_else(RouterSettings::default, |set| set.settings);
        let settings = Overrides { select: Some(Select::Threshold), capacity: None, ..overrides }.apply(base)?;
        let layers = match (&self.layers, set) {
            (Some(spec), _) => spec.resolve(bundle.config.layers)?,
            (None, Some(set)) => set.weights.into_keys().collect(),
            (None, None) => LayerSpec::Last(bundle.config.layers.div_ceil(2).min(bundle.config.layers - 1).max(1))
                .resolve(bundle.config.layers)?,
        };
        Ok(Routing { settings, layers, gates: Gates::Random { capacity, seed: self.mask_seed } })
    }
}

#[derive(Args)]
#[command(next_help_heading = "Machine")]
pub struct RunArgs {
    /// Where to run: cpu, cuda, cuda:N, or auto, which is the first GPU if there is one.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// On a GPU: f32, f16 or bf16 for weights and activations; as the model is stored when nothing is given.
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<DType>,
    /// f32, f16 or bf16 for K/V; as the activations when nothing is given, which are f32 on the CPU.
    #[arg(long, value_name = "DTYPE")]
    kv_dtype: Option<DType>,
    /// On a GPU, where an op has several kernels: auto, sm80, or hopper, attention by wgmma and TMA on compute capability 9.0.
    /// auto is hopper there and sm80 elsewhere.
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    kernels: Kernels,
    /// CPU threads; as many as there are cores when nothing is given.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// On the CPU, what bf16 weights are multiplied with: f32 inputs, or inputs rounded to bf16 (twice as fast where the
    /// processor has AVX512-BF16).
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// What weights, activations and K/V may take together on the device, such as 8G or 90%; all that is free when nothing is
    /// given.
    #[arg(long, visible_alias = "gpu-memory", value_name = "SIZE", value_parser = parse_budget)]
    memory: Option<Budget>,
    /// Tokens of a sequence, prompt and answer together; no more than needed when nothing is given.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Tokens that pass a layer together while a prompt is read; as many as suit the device when nothing is given.
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// Tokens whose keys and values are held at a time, of all sequences together; each its whole context when nothing is given.
    #[arg(long, value_name = "N")]
    kv_tokens: Option<usize>,
}

impl RunArgs {
    /// An engine for `batch` sequences of `context` tokens, `rows` of which are read in one prefill.
    pub fn engine(
        &self,
        bundle: Bundle,
        routing: Option<Routing>,
        batch: usize,
        context: usize,
        rows: usize,
    ) -> Result<Engine> {
        let mut engine = Engine::new(bundle.config, bundle.weights, routing, &self.options(batch, context, rows)?)?;
        if let Some(why) = engine.fallback() {
            eprintln!("mindskip: on the CPU: {why}");
        }
        engine.watch(progress::reading());
        Ok(engine)
    }

    pub fn options(&self, batch: usize, context: usize, rows: usize) -> Result<Options> {
        let Self { device, dtype, kv_dtype, kernels, precision, threads, memory, chunk, kv_tokens, .. } = *self;
        Ok(Options {
            device,
            dtype,
            kv_dtype,
            threads,
            precision,
            kernels,
            context: Some(self.context.unwrap_or(context)),
            batch,
            rows: Some(rows),
            chunk,
            kv_tokens,
            memory,
        })
    }
}

/// Sampling. What is not given is as generation_config.json says, or greedy.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SampleArgs {
    /// 0 takes the best token always; higher is more varied.
    #[arg(short, long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Only the K best tokens; 0 for all. Where generation_config.json says nothing: 50, as in transformers.
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<usize>,
    /// Only the best tokens that together have this probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Only tokens at least this probable, relative to the best.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Above 1, tokens that occurred become less likely.
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The same as --temperature 0.
    #[arg(long, conflicts_with = "temperature")]
    greedy: bool,
}

impl SampleArgs {
    pub fn settings(&self, bundle: &Bundle) -> Result<SamplerSettings> {
        let base = bundle.generation.settings(self.seed);
        let settings = SamplerSettings {
            temperature: if self.greedy { 0.0 } else { self.temperature.unwrap_or(base.temperature) },
            top_k: self.top_k.map_or(base.top_k, |k| Some(k).filter(|&k| k > 0)),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            seed: self.seed,
        };
        settings.check()?;
        Ok(settings)
    }
}
