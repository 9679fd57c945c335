//! `config.json`: what a checkpoint says about its own shape, read and checked.
//!
//! Both spellings are read: `rope_theta` + `rope_scaling` + `torch_dtype` of transformers 4 and `rope_parameters` +
//! `dtype` of transformers 5. Where a key is absent, its value is the one transformers gives it.

use std::f64::consts::PI;
use std::fmt;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::{Error, Kind, Result};
use crate::tensor::DType;

/// The architectures that are known. SmolLM2 calls itself, and is, [`Family::Llama`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3, SmolLM2 and everything else that says `llama`.
    Llama,
    /// Llama with a sliding window in every layer, when it has one.
    Mistral,
    /// Llama with biases on q, k and v, and a window in some layers.
    Qwen2,
    /// Llama with an RMSNorm over every head of q and k, and a window in some layers.
    Qwen3,
}

impl Family {
    const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    /// The `model_type` of `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// Whether q and k are normalised per head before RoPE.
    pub(crate) const fn qk_norm(self) -> bool {
        matches!(self, Family::Qwen3)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How the rotary frequencies are stretched for contexts longer than those of pretraining.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Of the context; at least 1 in sane files.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, interpolated between.
    Llama3 {
        /// Of the context.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of pretraining, in tokens.
        original_context: usize,
    },
}

/// Rotary position embedding: head dimensions i and i + head_dim/2 turn together by `position * inv_freq[i]` radians.
///
/// ```
/// use mindskip::config::{Rope, Scaling};
///
/// let plain = Rope { theta: 10_000.0, scaling: Scaling::None };
/// let stretched = Rope { scaling: Scaling::Linear { factor: 2.0 }, ..plain };
/// assert_eq!((plain.inv_freq(4), stretched.inv_freq(4)), (vec![1.0, 0.01], vec![0.5, 0.005]));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// What was done to it for longer contexts.
    pub scaling: Scaling,
}

impl Rope {
    /// Radians per position, `[head_dim / 2]`.
    ///
    /// Every intermediate is rounded to f32 where the reference rounds it: positions reach 10^5, so the last bit of a
    /// frequency is visible in an angle. A quotient `c / x` is `c * (1 / x)` there, so it is here.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let theta = f64::from(self.theta as f32);
        let pow = |i: usize| theta.powf(f64::from(i as f32 / head_dim as f32)) as f32;
        (0..head_dim).step_by(2).map(|i| self.scale(1.0 / pow(i))).collect()
    }

    fn scale(&self, freq: f32) -> f32 {
        match self.scaling {
            Scaling::None => freq,
            Scaling::Linear { factor } => freq / factor as f32,
            Scaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
                let context = original_context as f64;
                let wavelength = (1.0 / freq) * (2.0 * PI) as f32;
                if wavelength > (context / low) as f32 {
                    return freq / factor as f32;
                }
                if wavelength < (context / high) as f32 {
                    return freq;
                }
                let smooth = ((1.0 / wavelength) * context as f32 - low as f32) / (high - low) as f32;
                (1.0 - smooth) * freq / factor as f32 + smooth * freq
            }
        }
    }
}

/// The shape of a model, checked: every number is in range and they fit together.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::config::{Config, Family};
///
/// let bundle = Bundle::embedded()?;
/// let config = Config::parse(&bundle.file("config.json")?.expect("it has one"))?;
/// assert_eq!((config.family, config.layers, config.hidden), (Family::Llama, 8, 128));
/// let layer = "model.layers.0.self_attn";
/// bundle.weights.tensor(&format!("{layer}.q_proj.weight"), config.q_rows(), config.hidden)?;
/// bundle.weights.tensor(&format!("{layer}.k_proj.weight"), config.kv_rows(), config.hidden)?;
/// assert_eq!((config.q_rows(), config.kv_rows(), config.family.name()), (2 * 64, 64, "llama"));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The architecture.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head, even. `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Rows of the embedding: token ids are below it.
    pub vocab: usize,
    /// Positions the model was made for (`max_position_embeddings`), in tokens.
    pub context: usize,
    /// Added to the mean square in every RMSNorm.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Per layer: with `Some(w)`, the token at position p sees the positions in (p - w, p]; with `None`, all up to p.
    pub windows: Vec<Option<usize>>,
    /// The output projection is the embedding.
    pub tied: bool,
    /// What the file says the weights are stored in. The weights' own headers decide.
    pub dtype: Option<DType>,
    /// Begin-of-sequence token.
    pub bos: Option<u32>,
    /// Tokens that end a generation; `generation_config.json` may name others.
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads the bytes of a `config.json`.
    ///
    /// Errors name no path; the caller adds it with [`Error::at`]. Format: not JSON, a value of the wrong type, absent or
    /// out of range. Unsupported: an architecture, activation, RoPE variant or quantization that is not known here.
    pub fn parse(bytes: &[u8]) -> Result<Config> {
        let raw: Raw = serde_json::from_slice(bytes).map_err(|e| {
            Error::new(Kind::Format, format!("not a model configuration: {e}"))
                .action("compare it with the config.json of the original model")
        })?;
        raw.check()
    }

    /// Rows of q_proj: `heads * head_dim`.
    pub const fn q_rows(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Rows of k_proj and of v_proj: `kv_heads * head_dim`.
    pub const fn kv_rows(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The keys of `config.json` that matter here, as they stand in the file. No aliases: real files have both spellings.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    hidden_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    original_max_position_embeddings: Option<u64>,
    #[serde(default = "default_window")] // absent is not null: null means none
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    #[serde(default = "default_max_window_layers")]
    max_window_layers: u64,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<IgnoredAny>,
}

const MAX_HEAD_DIM: usize = 1 << 12;

fn default_window() -> Option<u64> {
    Some(4096)
}

fn default_max_window_layers() -> u64 {
    28
}

#[derive(Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<u64>,
    partial_rotary_factor: Option<f64>,
    full_attention: Option<IgnoredAny>,
    sliding_attention: Option<IgnoredAny>,
}

/// Token ids are written as a number or as a list.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl From<Ids> for Vec<u32> {
    fn from(ids: Ids) -> Self {
        match ids {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

impl Raw {
    fn check(self) -> Result<Config> {
        let family = self.family()?;
        ensure_supported(self.quantization_config.is_none(), || "quantized weights (\"quantization_config\")".into())?;
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        ensure_supported(matches!(act, "silu" | "swish"), || format!("the activation {act:?} (only \"silu\" is)"))?;

        let hidden = size("hidden_size", self.hidden_size, 1 << 20)?;
        let layers = size("num_hidden_layers", self.num_hidden_layers, 1 << 12)?;
        let heads = size("num_attention_heads", self.num_attention_heads, 1 << 12)?;
        let kv_heads = size("num_key_value_heads", self.num_key_value_heads.or(Some(heads as u64)), 1 << 12)?;
        ensure_sane(heads % kv_heads == 0, || {
            format!("{heads} heads are not a multiple of {kv_heads} key/value heads")
        })?;
        let head_dim = match self.head_dim {
            Some(_) => size("head_dim", self.head_dim, MAX_HEAD_DIM)?,
            None if family == Family::Qwen3 => 128,
            None => {
                ensure_sane(hidden % heads == 0, || {
                    format!("hidden_size {hidden} is not a multiple of {heads} heads")
                })?;
                size("hidden_size / num_attention_heads", Some((hidden / heads) as u64), MAX_HEAD_DIM)?
            }
        };
        ensure_sane(head_dim % 2 == 0, || format!("head_dim is {head_dim}; RoPE needs an even one"))?;
        let context = size("max_position_embeddings", self.max_position_embeddings, 1 << 30)?;
        let norm_eps = self.rms_norm_eps.unwrap_or(1e-6) as f32;
        ensure_sane(norm_eps.is_finite() && norm_eps >= 0.0, || format!("rms_norm_eps is {norm_eps}"))?;

        Ok(Config {
            family,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            intermediate: size("intermediate_size", self.intermediate_size, 1 << 24)?,
            vocab: size("vocab_size", self.vocab_size, 1 << 24)?,
            context,
            norm_eps,
            rope: self.rope(context)?,
            windows: self.windows(family, layers)?,
            tied: self.tie_word_embeddings.unwrap_or(false),
            dtype: match self.dtype.or(self.torch_dtype).as_deref() {
                Some("float32") => Some(DType::F32),
                Some("float16") => Some(DType::F16),
                Some("bfloat16") => Some(DType::BF16),
                _ => None,
            },
            bos: self.bos_token_id,
            eos: self.eos_token_id.map_or_else(Vec::new, Vec::from),
        })
    }

    /// By `model_type`; the Router-Tuning code appends `_mod` or `_mindskip` to it.
    fn family(&self) -> Result<Family> {
        let known = Family::ALL.map(Family::name).join(", ");
        let name = self.model_type.as_deref().ok_or_else(|| {
            Error::new(Kind::Format, "no \"model_type\"")
                .action(format!("name one of the known architectures: {known}"))
        })?;
        let bare = name.strip_suffix("_mod").or(name.strip_suffix("_mindskip")).unwrap_or(name);
        let family = Family::ALL.into_iter().find(|f| f.name() == bare).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("unknown architecture {name:?}"))
                .action(format!("use a model of one of the known ones: {known}"))
        })?;
        for class in self.architectures.iter().flatten() {
            ensure_supported(class.ends_with("ForCausalLM"), || {
                format!("{class:?}, which is no causal language model,")
            })?;
        }
        Ok(family)
    }

    fn rope(&self, context: usize) -> Result<Rope> {
        let given = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref());
        let partial = given.and_then(|r| r.partial_rotary_factor).or(self.partial_rotary_factor);
        ensure_supported(partial.is_none_or(|f| f == 1.0), || "a partial rotary embedding".into())?;

        let theta = given.and_then(|r| r.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let theta = positive("rope_theta", Some(theta))?;
        let Some(given) = given else { return Ok(Rope { theta, scaling: Scaling::None }) };
        let nested = given.full_attention.is_some() || given.sliding_attention.is_some();
        ensure_supported(!nested, || "RoPE parameters that differ by layer type".into())?;

        let scaling = match given.rope_type.as_deref().or(given.r#type.as_deref()).unwrap_or("default") {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: positive("RoPE factor", given.factor)? },
            "llama3" => {
                let low_freq_factor = positive("low_freq_factor", given.low_freq_factor)?;
                let high_freq_factor = positive("high_freq_factor", given.high_freq_factor)?;
                ensure_sane(low_freq_factor < high_freq_factor, || {
                    format!("low_freq_factor {low_freq_factor} is not below high_freq_factor {high_freq_factor}")
                })?;
                let original = self.original_max_position_embeddings.or(given.original_max_position_embeddings);
                let original = original.or(Some(context as u64));
                Scaling::Llama3 {
                    factor: positive("RoPE factor", given.factor)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: size("original_max_position_embeddings", original, 1 << 30)?,
                }
            }
            other => {
                return Err(Error::new(Kind::Unsupported, format!("RoPE scaling of type {other:?} is not supported"))
                    .action("use a model with \"default\", \"linear\" or \"llama3\" RoPE"));
            }
        };
        Ok(Rope { theta, scaling })
    }

    /// Llama has no window whatever the file says. Mistral has it in all layers; Qwen in those that `layer_types` names or,
    /// in older files, from `max_window_layers` on.
    fn windows(&self, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
        let limit = 1 << 30;
        match family {
            Family::Llama => Ok(vec![None; layers]),
            Family::Mistral => {
                let window = self.sliding_window.map(|w| size("sliding_window", Some(w), limit)).transpose()?;
                Ok(vec![window; layers])
            }
            Family::Qwen2 | Family::Qwen3 => {
                let given = self.sliding_window.filter(|_| self.use_sliding_window.unwrap_or(false));
                let window = given.map(|w| size("sliding_window", Some(w), limit)).transpose()?;
                let Some(types) = &self.layer_types else {
                    return Ok((0..layers).map(|l| window.filter(|_| l as u64 >= self.max_window_layers)).collect());
                };
                ensure_sane(types.len() == layers, || format!("{} layer_types for {layers} layers", types.len()))?;
                let of_layer = |kind: &String| match kind.as_str() {
                    "full_attention" | "attention" => Ok(None),
                    "sliding_attention" => {
                        ensure_sane(window.is_some(), || {
                            "layer_types has sliding layers, but there is no window".into()
                        })?;
                        Ok(window)
                    }
                    other => Err(unsupported(format!("a layer of type {other:?}"))),
                };
                types.iter().map(of_layer).collect()
            }
        }
    }
}

fn size(key: &str, value: Option<u64>, max: usize) -> Result<usize> {
    let value = value.ok_or_else(|| insane(format!("no {key:?}")))?;
    ensure_sane((1..=max as u64).contains(&value), || format!("{key} is {value}, outside 1..={max}"))?;
    Ok(value as usize)
}

fn positive(key: &str, value: Option<f64>) -> Result<f64> {
    let value = value.ok_or_else(|| insane(format!("no {key:?}")))?;
    let fits = (f32::MIN_POSITIVE..=f32::MAX).contains(&(value as f32));
    ensure_sane(fits, || format!("{key} is {value}, not a positive number"))?;
    Ok(value)
}

fn unsupported(what: String) -> Error {
    Error::new(Kind::Unsupported, format!("{what} is not supported")).action("use another model")
}

fn insane(cause: String) -> Error {
    Error::new(Kind::Format, cause).action("compare it with the config.json of the original model")
}

fn ensure_supported(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(unsupported(what())) }
}

fn ensure_sane(holds: bool, cause: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(insane(cause())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 160,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 3],
        })
    }

    fn parse(changes: Value) -> Result<Config> {
        let mut config = llama();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Config::parse(config.to_string().as_bytes())
    }

    #[test]
    fn reads_both_spellings() {
        let c = parse(json!({})).unwrap();
        assert_eq!((c.family, c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim), (Family::Llama, 64, 3, 4, 2, 16));
        assert_eq!((c.rope, c.dtype), (Rope { theta: 10000.0, scaling: Scaling::None }, Some(DType::BF16)));
        assert_eq!((c.bos, c.eos), (Some(1), vec![2, 3]));

        let five = parse(json!({"rope_theta": null, "torch_dtype": null, "dtype": "float16",
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4}}));
        let c = five.unwrap();
        assert_eq!(c.rope, Rope { theta: 5e5, scaling: Scaling::Linear { factor: 4.0 } });
        assert_eq!(c.dtype, Some(DType::F16));

        let old = parse(json!({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}})).unwrap();
        assert_eq!(old.rope, Rope { theta: 10000.0, scaling: Scaling::Linear { factor: 2.0 } });
    }

    #[test]
    fn the_names_of_the_router_tuning_code_are_known() {
        let c = parse(json!({"model_type": "mistral_mindskip", "architectures": ["MistralMindSkipForCausalLM"]}));
        assert_eq!(c.unwrap().family, Family::Mistral);
        assert_eq!(parse(json!({"model_type": "qwen2_mod"})).unwrap().family, Family::Qwen2);
    }

    #[test]
    fn windows_are_those_of_transformers() {
        let windows = |changes| parse(changes).unwrap().windows;
        assert_eq!(windows(json!({"sliding_window": 8})), [None; 3], "Llama has none");
        let mistral = |w: Value| windows(json!({"model_type": "mistral", "sliding_window": w}));
        assert_eq!(mistral(json!(8)), [Some(8); 3]);
        assert_eq!(mistral(Value::Null), [None; 3]);
        assert_eq!(windows(json!({"model_type": "mistral"})), [Some(4096); 3], "absent is not null");
        let qwen = |on: bool| json!({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": on, "max_window_layers": 2});
        assert_eq!(windows(qwen(false)), [None; 3]);
        assert_eq!(windows(qwen(true)), [None, None, Some(8)]);
        let mut listed = qwen(true);
        listed["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention"]);
        assert_eq!(windows(listed), [Some(8), None, None]);
    }

    #[test]
    fn what_does_not_run_is_refused() {
        for (changes, kind, message) in [
            (json!({"model_type": "gpt2"}), Kind::Unsupported, "llama, mistral, qwen2, qwen3"),
            (json!({"model_type": null}), Kind::Format, "model_type"),
            (json!({"architectures": ["LlamaForSequenceClassification"]}), Kind::Unsupported, "causal"),
            (json!({"hidden_act": "gelu"}), Kind::Unsupported, "gelu"),
            (json!({"quantization_config": {"bits": 4}}), Kind::Unsupported, "quantized"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), Kind::Unsupported, "yarn"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), Kind::Unsupported, "dynamic"),
            (json!({"rope_parameters": {"full_attention": {}}}), Kind::Unsupported, "layer type"),
            (json!({"partial_rotary_factor": 0.5}), Kind::Unsupported, "partial"),
            (json!({"hidden_size": 0}), Kind::Format, "hidden_size is 0"),
            (json!({"hidden_size": (1u64 << 20) + 4}), Kind::Format, "hidden_size"),
            (json!({"hidden_size": u64::MAX}), Kind::Format, "hidden_size"),
            (json!({"hidden_size": -1}), Kind::Format, "-1"),
            (json!({"hidden_size": "64"}), Kind::Format, "line 1"),
            (json!({"num_hidden_layers": 5000}), Kind::Format, "num_hidden_layers"),
            (json!({"num_key_value_heads": 3}), Kind::Format, "multiple"),
            (json!({"num_attention_heads": 6}), Kind::Format, "multiple"),
            (json!({"head_dim": 15}), Kind::Format, "even"),
            (json!({"rope_theta": 0.0}), Kind::Format, "rope_theta"),
            (json!({"rope_theta": 1e300}), Kind::Format, "rope_theta"),
            (json!({"rms_norm_eps": 1e300}), Kind::Format, "rms_norm_eps"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), Kind::Format, "factor"),
            (json!({"model_type": "qwen3", "layer_types": ["full_attention"]}), Kind::Format, "layer_types"),
            (json!({"model_type": "qwen3", "layer_types": ["mamba", "mamba", "mamba"]}), Kind::Unsupported, "mamba"),
            (json!({"model_type": "mistral", "sliding_window": 0}), Kind::Format, "sliding_window"),
            (json!({"eos_token_id": -1}), Kind::Format, "not a model configuration"),
        ] {
            let error = parse(changes.clone()).expect_err(&changes.to_string());
            assert_eq!(error.kind(), kind, "{changes}: {error}");
            assert!(error.to_string().contains(message) && error.to_string().contains("; "), "{changes}: {error}");
        }
        let deep = "[".repeat(1 << 20);
        assert_eq!(Config::parse(deep.as_bytes()).unwrap_err().kind(), Kind::Format);
    }

    /// The bits of transformers 5.23 on torch 2.15.
    #[test]
    fn frequencies_are_those_of_transformers_to_the_bit() {
        let bits = |rope: Rope, head_dim| rope.inv_freq(head_dim).iter().map(|f| f.to_bits()).collect::<Vec<_>>();
        let plain = Rope { theta: 1e4, scaling: Scaling::None };
        let expected = [0x3f800000, 0x3ea1e89b, 0x3dcccccd, 0x3d0186e3, 0x3c23d70a, 0x3b4f3e38, 0x3a83126f, 0x39a5cb60];
        assert_eq!(bits(plain, 16), expected);
        let linear = Rope { theta: 1e4, scaling: Scaling::Linear { factor: 3.0 } };
        let expected = [0x3eaaaaab, 0x3dd7e0cf, 0x3d088889, 0x3c2cb3d9, 0x3b5a740d, 0x3a8a297b, 0x39aec33f, 0x38dd0f2b];
        assert_eq!(bits(linear, 16), expected);
        let scaling =
            Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        #[rustfmt::skip]
        let expected = [
            0x3f800000, 0x3f29e1c6, 0x3ee177bc, 0x3e959ee3, 0x3e4693b0, 0x3e03c6a0, 0x3daee4ad, 0x3d681e67,
            0x3d1a08c8, 0x3ccc6f49, 0x3c87a9c3, 0x3c340d6d, 0x3beef74f, 0x3b9e9402, 0x3b527720, 0x3ab3d11d,
            0x3a0995d2, 0x393b2dd2, 0x38a3418d, 0x3858ac81, 0x380fc8f8, 0x37bed4f4, 0x377d45c3, 0x3728126b,
            0x36df10c4, 0x369406cb, 0x36447610, 0x36025f34, 0x35ad07a7, 0x3565a54d, 0x351864a7, 0x34ca41b0,
        ];
        assert_eq!(bits(Rope { theta: 5e5, scaling }, 64), expected);
    }
}
