//! candle as a worker of scripts/compare-engines, which builds it: `compare-candle MODEL_FOLDER` answers a request, a line, by a
//! line.

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use serde::Deserialize;
use serde_json::{Value, json};

/// Products of bf16 are not there on a CPU.
const DTYPE: DType = DType::F32;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Deserialize)]
struct Request {
    ids: Vec<u32>,
    /// Tokens, of which the prefill gives the first.
    generate: usize,
}

fn main() -> Result<()> {
    let folder = PathBuf::from(env::args().nth(1).ok_or("give the folder of a model")?);
    let mut json: Value = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
    if let Some(theta) = json["rope_parameters"].get("rope_theta").cloned() {
        json["rope_theta"] = theta; // as transformers 5 writes it
    }
    let config = serde_json::from_value::<LlamaConfig>(json)?.into_config(false);
    let model = load(&folder, &config)?;
    println!("{}", json!({"candle": "0.11.1"}));
    for line in stdin().lock().lines() {
        let reply = measure(&model, &config, &serde_json::from_str(&line?)?)?;
        println!("{reply}");
        stdout().flush()?;
    }
    Ok(())
}

fn load(folder: &Path, config: &Config) -> Result<Llama> {
    let path = folder.join("model.safetensors");
    // SAFETY: the script that starts this writes the file before, and nobody changes it then.
    let tensors = unsafe { VarBuilder::from_mmaped_safetensors(&[path], DTYPE, &Device::Cpu)? };
    Ok(Llama::load(tensors, config)?)
}

/// Tokens a second of both phases, and the first token.
fn measure(model: &Llama, config: &Config, request: &Request) -> Result<Value> {
    let mut cache = Cache::new(true, DTYPE, config, &Device::Cpu)?;
    let mut forward = |ids: &[u32], position: usize| -> Result<u32> {
        let logits = model.forward(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, position, &mut cache)?;
        Ok(logits.flatten_all()?.argmax(0)?.to_scalar()?)
    };
    let start = Instant::now();
    let first = forward(&request.ids, 0)?;
    let prefill = request.ids.len() as f64 / start.elapsed().as_secs_f64();
    let (mut token, start) = (first, Instant::now());
    for i in 1..request.generate {
        token = forward(&[token], request.ids.len() + i - 1)?;
    }
    let decode = (request.generate - 1) as f64 / start.elapsed().as_secs_f64();
    Ok(json!({"prefill": prefill, "decode": decode, "token": first}))
}
