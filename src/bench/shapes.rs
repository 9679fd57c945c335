//! Well-known models by their shapes, to be measured with random weights.

use serde_json::{Value, json};

use crate::config::Config;
use crate::error::{Error, Kind, Result};

/// The shapes that have a name.
pub const SHAPES: [&str; 6] =
    ["llama-3-8b", "mistral-7b", "qwen2.5-7b", "qwen2.5-1.5b", "smollm2-135m", "llama-3.2-1b"];

/// The shape of that name, as the `config.json` of its base model gives it. Errors: Argument for a name that is none.
///
/// ```
/// use mindskip::bench::{SHAPES, shape};
///
/// assert_eq!((shape("llama-3-8b")?.layers, shape("smollm2-135m")?.hidden), (32, 576));
/// assert!(SHAPES.iter().all(|name| shape(name).is_ok()) && shape("gpt-2").is_err());
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn shape(name: &str) -> Result<Config> {
    let json = config(name).ok_or_else(|| {
        let cause = format!("no shape is called {name:?}");
        Error::new(Kind::Argument, cause).action(format!("give one of {}", SHAPES.join(", ")))
    })?;
    Config::parse(json.to_string().as_bytes())
}

fn config(name: &str) -> Option<Value> {
    Some(match name {
        // meta-llama/Meta-Llama-3-8B
        "llama-3-8b" => json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": false,
        }),
        // mistralai/Mistral-7B-v0.1
        "mistral-7b" => json!({
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000, "sliding_window": 4096,
            "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": false,
        }),
        // Qwen/Qwen2.5-7B
        "qwen2.5-7b" => json!({
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064, "use_sliding_window": false,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": false,
        }),
        // Qwen/Qwen2.5-1.5B
        "qwen2.5-1.5b" => json!({
            "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936, "use_sliding_window": false,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true,
        }),
        // HuggingFaceTB/SmolLM2-135M
        "smollm2-135m" => json!({
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": true,
        }),
        // meta-llama/Llama-3.2-1B
        "llama-3.2-1b" => json!({
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": true,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;
    use crate::weights::Weights;

    /// The numbers of parameters that the models' makers publish.
    #[test]
    fn shapes_have_the_parameters_of_the_models() {
        let published = [8_030_261_248, 7_241_732_096, 7_615_616_512, 1_543_714_304, 134_515_008, 1_235_814_400usize];
        for (name, expected) in SHAPES.iter().zip(published) {
            let config = shape(name).unwrap();
            assert_eq!(Weights::random(name, &config, DType::BF16, 0).parameters(), expected, "{name}");
        }
        let error = shape("llama-3").unwrap_err();
        assert!(error.to_string().contains("; give one of llama-3-8b, "), "{error}");
    }
}
