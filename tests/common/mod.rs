//! What the integration tests share: golden files and engines over the tiny models.
#![allow(dead_code)] // each test binary uses a part

#[cfg(feature = "emulate")]
pub mod emulator;
pub mod mutate;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mindskip::batch::Request;
use mindskip::config::Config;
use mindskip::engine::{Device, Engine, KvUsage, Options};
use mindskip::generate::{Answer, generate};
use mindskip::model::{Gates, Routing};
use mindskip::router::{RouterSet, RouterSettings};
use mindskip::tensor::DType;
use mindskip::tokenizer::Tokenizer;
use mindskip::weights::Weights;
use safetensors::{Dtype, SafeTensors};

pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// The tensors of a golden file, integers as f32 values would lose nothing here but are kept apart.
pub struct Golden {
    floats: HashMap<String, (Vec<usize>, Vec<f32>)>,
    ints: HashMap<String, (Vec<usize>, Vec<u32>)>,
}

impl Golden {
    pub fn open(path: &Path) -> Golden {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut golden = Golden { floats: HashMap::new(), ints: HashMap::new() };
        for (name, t) in file.tensors() {
            let words = || t.data().chunks_exact(4).map(|c| <[u8; 4]>::try_from(c).unwrap());
            let shape = t.shape().to_vec();
            match t.dtype() {
                Dtype::F32 => drop(golden.floats.insert(name, (shape, words().map(f32::from_le_bytes).collect()))),
                Dtype::I32 => drop(golden.ints.insert(name, (shape, words().map(u32::from_le_bytes).collect()))),
                Dtype::U8 => drop(golden.ints.insert(name, (shape, t.data().iter().map(|&b| b.into()).collect()))),
                other => panic!("{name}: {other:?}"),
            }
        }
        golden
    }

    pub fn floats(&self, name: &str) -> &[f32] {
        &self.floats[name].1
    }

    pub fn ints(&self, name: &str) -> &[u32] {
        &self.ints[name].1
    }

    pub fn has(&self, name: &str) -> bool {
        self.floats.contains_key(name) || self.ints.contains_key(name)
    }
}

pub fn config(folder: &Path) -> Config {
    Config::parse(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

pub fn engine(folder: &Path, routing: Option<Routing>, options: &Options) -> Engine {
    Engine::new(config(folder), Weights::open(folder).unwrap(), routing, options).unwrap()
}

/// For `batch` sequences of up to `context` tokens.
pub fn options(batch: usize, context: usize) -> Options {
    let (device, dtype) = match std::env::var("MINDSKIP_TEST_DEVICE").as_deref() {
        #[cfg(feature = "emulate")]
        Ok("emulate") => (Device::Emulated(1), Some(DType::F32)),
        Ok("cuda") => (Device::Cuda(0), Some(DType::F32)),
        Ok(other) => panic!("MINDSKIP_TEST_DEVICE is {other}"),
        Err(_) => (Device::Cpu, None),
    };
    let (context, rows, threads) = (Some(context), Some(batch * context), Some(2));
    Options { device, dtype, batch, context, rows, threads, ..Options::default() }
}

/// The emulator, in an order of threads that follows from the seed; with MINDSKIP_TEST_DEVICE=cuda the first GPU.
#[cfg(feature = "emulate")]
pub fn gpu(seed: u64) -> Device {
    match options(1, 1).device {
        Device::Cuda(ordinal) => Device::Cuda(ordinal),
        _ => Device::Emulated(seed),
    }
}

pub fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories")
}

/// Writes the bytes of a number over one in a safetensors file.
pub fn overwrite(file: &mut [u8], tensor: &str, index: usize, number: &[u8]) {
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let table: serde_json::Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    let start = table[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    let at = 8 + header + start + index * number.len();
    file[at..at + number.len()].copy_from_slice(number);
}

/// Makes `dir` the folder of the embedded model with a NaN in the embedding of one token.
pub fn with_nan(token: u32, dir: &Path) {
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(stories().join(name), dir.join(name)).unwrap();
    }
    let mut bytes = std::fs::read(stories().join("model.safetensors")).unwrap();
    overwrite(&mut bytes, "model.embed_tokens.weight", token as usize * 128, &half::bf16::NAN.to_le_bytes());
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
}

/// Routing by a router file, with settings of the caller's.
pub fn routing(path: &Path, settings: RouterSettings) -> Routing {
    let mut set = RouterSet::open(path).unwrap();
    set.settings = settings;
    set.fingerprint = None;
    Routing::routers(set)
}

pub fn random_gates(settings: RouterSettings, layers: &[usize], capacity: f32) -> Routing {
    Routing { settings, layers: layers.to_vec(), gates: Gates::Random { capacity, seed: 7 } }
}

pub fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// Fails, with the worst element, unless |a − b| <= rtol · max|b| everywhere; NaN fails.
pub fn assert_close(what: &str, actual: &[f32], expected: &[f32], rtol: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let bad = |i: usize| (actual[i] - expected[i]).abs();
    let worst = (0..actual.len()).max_by(|&i, &j| {
        let key = |d: f32| if d.is_nan() { f32::INFINITY } else { d };
        key(bad(i)).total_cmp(&key(bad(j)))
    });
    if let Some(i) = worst {
        assert!(
            bad(i) <= rtol * scale,
            "{what}: element {i} is {}, expected {} (error {:.1e} of the largest, allowed {rtol:.0e})",
            actual[i],
            expected[i],
            bad(i) / scale
        );
    }
}

/// Same numbers to the last bit; NaN fails. GPUs multiply few rows and many by different kernels, which are close.
pub fn assert_bits(what: &str, actual: &[f32], expected: &[f32]) {
    if options(1, 1).device != Device::Cpu {
        return assert_close(what, actual, expected, 1e-5);
    }
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    for (i, (a, b)) in actual.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == b.to_bits() && a.is_finite(), "{what}: element {i} is {a:?}, expected {b:?}");
    }
}

/// Token ids from a small generator, below `vocab`.
pub fn ids(n: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % vocab as u64) as u32
        })
        .collect()
}

/// A prompt gives the same bits alone, in a batch, token by token and in chunks, on engines over the embedded model. None:
/// this machine cannot.
pub fn agree_to_the_bit(stories: impl Fn(Options) -> Option<Engine>) {
    let (a, b) = (ids(37, 1536, 2), ids(11, 1536, 3));
    let Some(mut engine) = stories(options(2, 64)) else { return };
    let seq = engine.open().unwrap();
    let alone = engine.prefill(&[(seq, &a)]).unwrap().to_vec();
    engine.close(seq).unwrap();

    let (x, y) = (engine.open().unwrap(), engine.open().unwrap());
    let together = engine.prefill(&[(y, &b), (x, &a)]).unwrap()[1536..].to_vec();
    assert_bits("in a batch", &together, &alone);
    engine.close(x).unwrap();
    engine.close(y).unwrap();

    let seq = engine.open().unwrap();
    engine.prefill(&[(seq, &a[..20])]).unwrap();
    let mut logits = Vec::new();
    for &id in &a[20..] {
        logits = engine.decode(&[(seq, id)]).unwrap().to_vec();
    }
    assert_bits("by decode", &logits, &alone);

    let mut chunked = stories(Options { chunk: Some(7), ..options(1, 64) }).unwrap();
    let seq = chunked.open().unwrap();
    assert_bits("in chunks", chunked.prefill(&[(seq, &a)]).unwrap(), &alone);
}

/// What a request comes to by itself, and what it holds then.
pub fn alone(engine: &mut Engine, tokenizer: &Tokenizer, request: &Request) -> (Answer, KvUsage) {
    let seq = engine.open().unwrap();
    let mut turns = [request.clone().turn(seq)];
    let (mut answers, _) = generate(engine, tokenizer, &mut turns, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let usage = engine.kv_usage().unwrap();
    engine.close(seq).unwrap();
    (answers.remove(0), usage)
}
