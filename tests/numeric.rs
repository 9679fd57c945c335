//! NaN and infinite weights, in every dtype and on every path: the error is of kind Numeric and names the tensor and its file.

mod common;

use std::ffi::{CStr, CString, c_void};
use std::fs;
use std::ops::ControlFlow;
use std::ptr;

use common::{config, goldens, overwrite};
use half::{bf16, f16};
use mindskip::bundle::Bundle;
use mindskip::engine::{Draw, Engine, Options};
use mindskip::eval::perplexity::{Windows, perplexity};
use mindskip::eval::score::{Work, score};
use mindskip::eval::task::{Ask, Record};
use mindskip::generate::{Turn, generate, stream};
use mindskip::tensor::Bytes;
use mindskip::weights::Weights;
use mindskip::{Error, Kind};
use mindskip_capi::*;

fn is_named(what: &str, error: &Error, tensor: &str) {
    let text = error.to_string();
    assert_eq!(error.kind(), Kind::Numeric, "{what}: {text}");
    assert!(text.contains("model.safetensors: ") && text.contains(tensor) && text.contains("; "), "{what}: {text}");
}

#[test]
fn steps_name_the_tensor_in_every_dtype() {
    for (family, nan, infinity) in [
        ("llama-mha-f32-classic", f32::NAN.to_le_bytes().to_vec(), f32::INFINITY.to_le_bytes().to_vec()),
        ("llama-f16", f16::NAN.to_le_bytes().to_vec(), f16::INFINITY.to_le_bytes().to_vec()),
        ("qwen3-bf16", bf16::NAN.to_le_bytes().to_vec(), bf16::INFINITY.to_le_bytes().to_vec()),
    ] {
        let folder = goldens().join("families").join(family);
        for tensor in
            ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
        {
            for number in [&nan, &infinity] {
                let mut file = fs::read(folder.join("model.safetensors")).unwrap();
                overwrite(&mut file, tensor, 0, number);
                let weights = Weights::from_parts(vec![("model.safetensors".into(), Bytes::new(file))]).unwrap();
                let mut engine = Engine::new(config(&folder), weights, None, &common::options(1, 16)).unwrap();
                let seq = engine.open().unwrap();
                let draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 7 };
                for (what, result) in [
                    ("prefill", engine.prefill(&[(seq, &[1, 2, 3])]).map(drop)),
                    ("decode", engine.decode(&[(seq, 1)]).map(drop)),
                    ("sampling", engine.prefill_and_sample(&[(seq, &[1, 2, 3])], &[draw]).map(drop)),
                ] {
                    is_named(&format!("{family}, {what}"), &result.unwrap_err(), tensor);
                }
                assert_eq!(engine.position(seq), 0);
            }
        }
    }
}

/// The head is the embedding, so the logit of one token is NaN everywhere.
#[test]
fn texts_scores_and_calls_name_the_tensor() {
    const TENSOR: &str = "model.embed_tokens.weight";
    let dir = tempfile::tempdir().unwrap();
    common::with_nan(1000, dir.path());
    let bundle = Bundle::open(dir.path()).unwrap();
    let tokenizer = bundle.tokenizer().unwrap();
    let ids = tokenizer.encode("Once upon a time, there was", true).unwrap();
    assert!(!ids.contains(&1000));
    let record = Record {
        id: None,
        description: String::new(),
        ask: Ask::Choices { context: "Tom had".into(), choices: vec!["a ball".into(), "a dog".into()] },
        gold: 0,
    };
    let requests = record.requests("").iter().map(|r| r.encode(&tokenizer, 32).unwrap()).collect();
    let work = Work::new(&[(String::new(), requests)], None);
    let room = work.room();
    let options = Options { batch: room.batch, context: Some(32), rows: Some(room.rows), ..common::options(2, 32) };
    let mut engine = Engine::new(bundle.config, bundle.weights, None, &options).unwrap();
    let mut go_on = |_| ControlFlow::Continue(());

    let mut turns = [Turn::new(engine.open().unwrap(), ids.clone()).unwrap()];
    let made = generate(&mut engine, &tokenizer, &mut turns, &mut |_, _| ControlFlow::Continue(()));
    is_named("generate", &made.unwrap_err(), TENSOR);
    let first = stream(&mut engine, &tokenizer, &mut turns).next().unwrap();
    is_named("stream", &first.unwrap_err(), TENSOR);
    engine.close(turns[0].seq).unwrap();
    is_named("eval, of tasks", &score(&mut engine, &work, &mut go_on).unwrap_err(), TENSOR);
    let windows = Windows { length: 8, stride: 4 };
    let found = perplexity(&mut engine, "a", &ids, 20, windows, &mut go_on);
    is_named("eval, of texts", &found.unwrap_err(), TENSOR);

    let name = CString::new(dir.path().to_str().unwrap()).unwrap();
    let (mut model, mut engine, mut seq, mut logits) = (ptr::null_mut(), ptr::null_mut(), 0, ptr::null());
    // SAFETY: addresses of variables and of as many tokens as said; structs whose size is set, all zeros else.
    unsafe {
        let mut options: mindskip_options = std::mem::zeroed();
        (options.size, options.device, options.context) = (size_of::<mindskip_options>(), c"cpu".as_ptr(), 32);
        assert_eq!(mindskip_model_load(name.as_ptr(), &mut model), MINDSKIP_OK);
        assert_eq!(mindskip_engine_new(model, ptr::null_mut(), &options, &mut engine), MINDSKIP_OK);
        assert_eq!(mindskip_seq_open(engine, &mut seq), MINDSKIP_OK);
        let prompt = mindskip_prompt { seq, tokens: ids.as_ptr(), count: ids.len() };
        let mut turn: mindskip_turn = std::mem::zeroed();
        (turn.size, turn.seq, turn.prompt, turn.prompt_count) =
            (size_of::<mindskip_turn>(), seq, ids.as_ptr(), ids.len());
        let no_one: *mut c_void = ptr::null_mut();
        for status in [
            mindskip_prefill(engine, &prompt, 1, &mut logits),
            mindskip_decode(engine, &seq, ids.as_ptr(), 1, &mut logits),
            mindskip_generate(engine, &turn, 1, None, no_one, ptr::null_mut()),
        ] {
            assert_eq!((status, logits), (MINDSKIP_ERROR_NUMERIC, ptr::null()));
            let text = CStr::from_ptr(mindskip_error()).to_str().unwrap();
            assert!(text.contains(TENSOR) && text.contains("model.safetensors: "), "{text}");
        }
        assert_eq!((mindskip_engine_free(engine), mindskip_model_free(model)), (MINDSKIP_OK, MINDSKIP_OK));
    }
}
