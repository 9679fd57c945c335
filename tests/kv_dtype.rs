//! K/V in 16 bits: half the memory, and close to f32.

mod common;

use common::*;
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Engine, Options};
use mindskip::model::Routing;
use mindskip::tensor::DType;

fn stories(routed: bool, options: &Options) -> Engine {
    let bundle = Bundle::embedded().unwrap();
    let routing = bundle.routers.clone().map(Routing::routers).filter(|_| routed);
    Engine::new(bundle.config, bundle.weights, routing, options).unwrap()
}

#[test]
fn batches_chunks_and_decode_agree_to_the_bit() {
    for kv in [DType::F16, DType::BF16] {
        let on_cpu = |options| Options { device: Device::Cpu, dtype: None, kv_dtype: Some(kv), ..options };
        agree_to_the_bit(|options| Some(stories(true, &on_cpu(options))));
    }
}

/// Log-probabilities that are as far from those of f32 as roundings make them.
#[test]
fn narrow_kv_stay_close_to_f32() {
    let prompt = ids(200, 1536, 1);
    let score = |kv_dtype| {
        let mut engine = stories(false, &Options { kv_dtype, ..options(1, 256) });
        let seq = engine.open().unwrap();
        // In two pieces: the second one reads back what the first has stored.
        engine.prefill(&[(seq, &prompt[..100])]).unwrap();
        engine.prefill(&[(seq, &prompt[100..])]).unwrap();
        (engine.logprobs(&prompt[101..]).unwrap(), engine.plan().kv.page_bytes())
    };
    let (exact, bytes) = score(None);
    // Measured: 7e-5 and 7e-4 of the largest on the CPU, 1.1e-4 and 1.3e-3 on the emulator.
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
        let (rounded, narrow) = score(Some(dtype));
        assert_close(&format!("{dtype}"), &rounded, &exact, tolerance);
        // Beside K and V a row holds its position.
        assert_eq!((narrow - 256) * 4 / dtype.size(), bytes - 256, "{dtype}");
        assert_eq!(rounded != exact, dtype != DType::F32, "{dtype} is really used");
    }
}
