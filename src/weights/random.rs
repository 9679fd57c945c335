//! Weights of a model's shape without the model: to measure it.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use safetensors::Dtype;

use super::{Content, Entry, Weights};
use crate::backend::{Noise, mix};
use crate::config::{Config, Family};
use crate::tensor::DType;

impl Weights {
    /// Random weights for all that a model of this shape has, in one type. They are made where they are used, on the device
    /// where there is one. Norms are near 1 and matrices keep the size of what goes through them, so that activations stay
    /// what they are in a trained model: around 1.
    ///
    /// ```
    /// use mindskip::bench::shape;
    /// use mindskip::tensor::DType;
    /// use mindskip::weights::Weights;
    ///
    /// let weights = Weights::random("an 8B", &shape("llama-3-8b")?, DType::BF16, 0); // nothing is made yet
    /// assert_eq!(weights.parameters(), 8_030_261_248);
    /// # Ok::<(), mindskip::Error>(())
    /// ```
    pub fn random(name: &str, config: &Config, dtype: DType, seed: u64) -> Weights {
        let stored = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
        };
        let entry = |(name, rows, cols): (String, usize, usize)| {
            let data = Content::Random(noise(config, &name, cols, seed), Arc::new(OnceLock::new()));
            let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
            (name, Entry { file: 0, dtype: stored, shape, data })
        };
        let tensors = shapes(config).into_iter().map(entry).collect();
        let files = vec![PathBuf::from(format!("{name} (random weights)"))];
        Weights { files, tensors, metadata: Default::default() }
    }
}

/// Name, rows and columns of every tensor.
fn shapes(c: &Config) -> Vec<(String, usize, usize)> {
    let (q, kv) = (c.q_rows(), c.kv_rows());
    let mut all =
        vec![("model.embed_tokens.weight".into(), c.vocab, c.hidden), ("model.norm.weight".into(), 1, c.hidden)];
    if !c.tied {
        all.push(("lm_head.weight".into(), c.vocab, c.hidden));
    }
    let mut layer = vec![
        ("input_layernorm.weight", 1, c.hidden),
        ("post_attention_layernorm.weight", 1, c.hidden),
        ("self_attn.q_proj.weight", q, c.hidden),
        ("self_attn.k_proj.weight", kv, c.hidden),
        ("self_attn.v_proj.weight", kv, c.hidden),
        ("self_attn.o_proj.weight", c.hidden, q),
        ("mlp.gate_proj.weight", c.intermediate, c.hidden),
        ("mlp.up_proj.weight", c.intermediate, c.hidden),
        ("mlp.down_proj.weight", c.hidden, c.intermediate),
    ];
    if c.family == Family::Qwen2 {
        layer.extend([
            ("self_attn.q_proj.bias", 1, q),
            ("self_attn.k_proj.bias", 1, kv),
            ("self_attn.v_proj.bias", 1, kv),
        ]);
    }
    if c.family.qk_norm() {
        layer.extend([("self_attn.q_norm.weight", 1, c.head_dim), ("self_attn.k_norm.weight", 1, c.head_dim)]);
    }
    for l in 0..c.layers {
        all.extend(layer.iter().map(|&(part, rows, cols)| (format!("model.layers.{l}.{part}"), rows, cols)));
    }
    all
}

/// What a tensor is drawn from. A sum of n products with numbers of variance 1/n keeps the variance; what is added to the
/// residual stream 2·layers times is as much smaller.
fn noise(config: &Config, name: &str, cols: usize, seed: u64) -> Noise {
    let seed = name.bytes().fold(mix(seed), |hash, byte| mix(hash ^ u64::from(byte)));
    let unit = (3.0 / cols as f32).sqrt();
    let (mean, scale) = match name.rsplit('.').nth(1).unwrap_or_default() {
        _ if name.ends_with("bias") => (0.0, 0.1),
        part if part.ends_with("norm") => (1.0, 0.25),
        "embed_tokens" => (0.0, 1.0),
        "o_proj" | "down_proj" => (0.0, unit / ((2 * config.layers) as f32).sqrt()),
        _ => (0.0, unit),
    };
    Noise { seed, mean, scale }
}
