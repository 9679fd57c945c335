//! `generation_config.json`: how the makers of a model want it sampled.

use serde::Deserialize;

use crate::config::Ids;
use crate::error::{Error, Kind, Result};
use crate::sample::SamplerSettings;

/// The file's content. What it leaves out is transformers' default.
///
/// ```
/// use mindskip::generation::GenerationConfig;
///
/// let config = GenerationConfig::parse(br#"{"do_sample": true, "temperature": 0.6, "eos_token_id": [1, 2]}"#)?;
/// let settings = config.settings(7);
/// assert_eq!((settings.temperature, settings.top_k, settings.seed), (0.6, Some(50), 7));
/// assert_eq!(config.eos, [1, 2]);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Whether to sample; otherwise greedy.
    pub do_sample: bool,
    /// [`SamplerSettings::temperature`]; 1 by default.
    pub temperature: f32,
    /// [`SamplerSettings::top_k`]; 50 by default, also in files that only name `top_p`.
    pub top_k: Option<usize>,
    /// [`SamplerSettings::top_p`]; 1 by default.
    pub top_p: f32,
    /// [`SamplerSettings::min_p`]; 0 by default.
    pub min_p: f32,
    /// [`SamplerSettings::repetition_penalty`]; 1 by default.
    pub repetition_penalty: f32,
    /// Begin-of-sequence token.
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        GenerationConfig {
            do_sample: false,
            temperature: 1.0,
            top_k: Some(50),
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            bos: None,
            eos: Vec::new(),
        }
    }
}

/// The keys that matter here; null is as good as absent.
#[derive(Deserialize)]
struct Raw {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<i64>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
}

impl GenerationConfig {
    /// Reads the bytes of a `generation_config.json`.
    ///
    /// Errors name no path; the caller adds it with [`Error::at`]. Format: not JSON, a value of the wrong type or out of
    /// range.
    pub fn parse(bytes: &[u8]) -> Result<GenerationConfig> {
        let broken = |cause: String| {
            Error::new(Kind::Format, format!("not a generation configuration: {cause}"))
                .action("compare it with the generation_config.json of the original model, or remove it")
        };
        let raw: Raw = serde_json::from_slice(bytes).map_err(|e| broken(e.to_string()))?;
        let default = GenerationConfig::default();
        let config = GenerationConfig {
            do_sample: raw.do_sample.unwrap_or(default.do_sample),
            temperature: raw.temperature.unwrap_or(default.temperature),
            top_k: match raw.top_k {
                None => default.top_k,
                Some(-1 | 0) => None, // vLLM's and transformers' way to say all
                Some(k) => Some(usize::try_from(k).map_err(|_| broken(format!("top_k is {k}")))?),
            },
            top_p: raw.top_p.unwrap_or(default.top_p),
            min_p: raw.min_p.unwrap_or(default.min_p),
            repetition_penalty: raw.repetition_penalty.unwrap_or(default.repetition_penalty),
            bos: raw.bos_token_id,
            eos: raw.eos_token_id.map_or_else(Vec::new, Vec::from),
        };
        SamplerSettings { temperature: config.temperature, ..config.settings(0) }
            .check()
            .map_err(|e| broken(e.to_string()))?;
        Ok(config)
    }

    /// The settings the file asks for.
    pub fn settings(&self, seed: u64) -> SamplerSettings {
        SamplerSettings {
            temperature: if self.do_sample { self.temperature } else { 0.0 },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_configs_are_read_as_transformers_reads_them() {
        let parse = |text: &str| GenerationConfig::parse(text.as_bytes());
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
        let llama = parse(
            r#"{"bos_token_id": 128000, "do_sample": true, "eos_token_id": [128001, 128009], "temperature": 0.6,
                "top_p": 0.9, "pad_token_id": 5, "transformers_version": "4.40.0", "max_length": 4096}"#,
        )
        .unwrap();
        assert_eq!((llama.bos, &llama.eos[..]), (Some(128_000), &[128_001, 128_009][..]));
        let expected =
            SamplerSettings { temperature: 0.6, top_k: Some(50), top_p: 0.9, seed: 7, ..SamplerSettings::default() };
        assert_eq!(llama.settings(7), expected);

        let plain =
            parse(r#"{"eos_token_id": 2, "temperature": 0.6, "top_k": 0, "min_p": null, "repetition_penalty": 1.05}"#);
        let plain = plain.unwrap();
        assert_eq!(plain.eos, [2]);
        let expected = SamplerSettings { repetition_penalty: 1.05, ..SamplerSettings::default() };
        assert_eq!(plain.settings(0), expected, "greedy unless do_sample says otherwise");

        for (text, message) in [
            ("", "EOF"),
            ("[1]", "not a generation configuration"),
            (r#"{"temperature": "hot"}"#, "line 1"),
            (r#"{"temperature": -1}"#, "temperature is -1"),
            (r#"{"top_p": 1.5, "do_sample": true}"#, "top_p is 1.5"),
            (r#"{"top_k": -2}"#, "top_k is -2"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty is 0"),
            (r#"{"eos_token_id": -1}"#, "not a generation configuration"),
            (r#"{"do_sample": 1}"#, "line 1"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), Kind::Format);
            assert!(error.to_string().contains(message) && error.to_string().contains("; compare"), "{error}");
        }
    }
}
