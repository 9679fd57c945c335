//! What is fuzzed: for each target, what it does with bytes and what to begin with. By libFuzzer in fuzz/, and for a moment in
//! tests/fuzz.rs.
//!
//! A body may refuse its bytes, with a message that says what to do. A panic, a result that contradicts another one, or more
//! memory than its input warrants is a finding.

#[path = "calls.rs"]
mod calls;
#[path = "draw.rs"]
mod draw;

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use draw::{Draw, tokenizer_file};
use mindskip::bundle::Bundle;
use mindskip::chat::{ChatTemplate, Message};
use mindskip::config::Config;
use mindskip::engine::{Budget, Device, Engine, Options};
use mindskip::eval::task::{self, Task};
use mindskip::generation::GenerationConfig;
use mindskip::router::{RouterSet, Select};
use mindskip::tensor::Bytes;
use mindskip::tokenizer::Tokenizer;
use mindskip::tune::data::{Dataset, Encoder};
use mindskip::weights::Weights;
use mindskip::{Error, Result};
use peak_alloc::PeakAlloc;
use serde_json::{Value, json};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

pub struct Target {
    pub name: &'static str,
    pub body: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($body:ident: $seeds:expr),+ $(,)?) => {
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($body), body: $body, seeds: $seeds }),+];
    };
}
targets! {
    safetensors: safetensors_seeds,
    index: index_seeds,
    config: config_seeds,
    tokenizer: tokenizer_seeds,
    routers: routers_seeds,
    records: records_seeds,
    tasks: tasks_seeds,
    template: template_seeds,
    calls: calls_seeds,
}

const STORIES: &[u8] = include_bytes!("../../assets/stories/config.json");
const GENERATION: &[u8] = include_bytes!("../../assets/stories/generation_config.json");
const ROUTERS: &[u8] = include_bytes!("../../assets/stories/routers.safetensors");

/// Runs `body`, which may hold some bytes and so many times what it is given.
///
/// Panics: when it holds more.
pub fn bounded<T>(data: &[u8], some: usize, times: usize, body: impl FnOnce() -> T) -> T {
    let (before, allowed) = (MEMORY.current_usage(), some + times * data.len());
    MEMORY.reset_peak_usage();
    let result = body();
    let held = MEMORY.peak_usage().saturating_sub(before);
    assert!(held <= allowed, "held {held} bytes for {} of input, where {allowed} are allowed", data.len());
    result
}

/// An error says what to do, briefly.
fn checked<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(check_message).ok()
}

fn check_message(error: &Error) {
    let text = error.to_string();
    assert!(text.contains("; "), "no next action in {text:?}");
    assert!(text.len() < 4000, "a message of {} bytes", text.len());
    assert!(!text.contains("panicked"), "{text}");
}

/// What begins with a brace is the header of a safetensors file, to which its length and data are added; other bytes are a file.
fn with_header(data: &[u8]) -> Vec<u8> {
    if data.first() != Some(&b'{') {
        return data.to_vec();
    }
    // The data is as long as the largest small number says, which mostly is where the last tensor ends.
    let numbers = data.split(|b| !b.is_ascii_digit()).filter_map(|n| str::from_utf8(n).ok()?.parse::<usize>().ok());
    let length = numbers.filter(|&n| n <= 1 << 14).max().unwrap_or(0);
    let values = (0..length).map(|i| (i * 7) as u8);
    (data.len() as u64).to_le_bytes().into_iter().chain(data.iter().copied()).chain(values).collect()
}

pub fn safetensors(data: &[u8]) {
    let file = with_header(data);
    bounded(&file, 100_000, 40, || {
        let Some(weights) = checked(Weights::from_parts(vec![("a.safetensors".into(), Bytes::new(file.clone()))]))
        else {
            return;
        };
        for name in weights.names().map(String::from).collect::<Vec<_>>() {
            for (rows, columns) in [(1, 4), (2, 2), (64, 64)] {
                if let Some(tensor) = checked(weights.tensor(&name, rows, columns)) {
                    assert_eq!(tensor.to_f32().len(), rows * columns);
                }
            }
        }
        assert!(weights.bytes() <= file.len() && weights.parameters() <= 8 * file.len());
        assert_eq!(weights.dtypes().values().sum::<usize>(), weights.bytes());
        assert_eq!(weights.fingerprint(), weights.clone().fingerprint());
        let _ = (weights.main_dtype(), weights.find_non_finite(), weights.metadata());
    });
}

/// Headers, and a file as it is.
fn safetensors_seeds() -> Vec<Vec<u8>> {
    let header = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]},"c":{"dtype":"I64","shape":[0,3],"data_offsets":[24,24]},"d":{"dtype":"F4","shape":[3,2],"data_offsets":[24,27]}}"#;
    vec![header.to_vec(), with_header(header), ROUTERS.to_vec()]
}

pub fn index(data: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    for (file, tensor) in [("1.safetensors", "a"), ("2.safetensors", "b")] {
        let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        fs::write(dir.path().join(file), with_header(header.as_bytes())).unwrap();
    }
    fs::write(dir.path().join("model.safetensors.index.json"), data).unwrap();
    bounded(data, 100_000, 40, || {
        if let Some(weights) = checked(Weights::open(dir.path())) {
            assert!(weights.files().iter().all(|file| file.starts_with(dir.path())), "{:?}", weights.files());
        }
    });
}

fn index_seeds() -> Vec<Vec<u8>> {
    let fine = br#"{"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
    let outside = br#"{"weight_map": {"a": "../1.safetensors", "b": "/etc/passwd", "c": "./\u0000"}}"#;
    vec![fine.to_vec(), outside.to_vec()]
}

/// JSON, or choices of what to change in a file that is right.
pub fn config(data: &[u8]) {
    let text = if data.first() == Some(&b'{') { data.to_vec() } else { draw::config_file(STORIES, data) };
    if let Some(generation) = checked(GenerationConfig::parse(&text)) {
        generation.settings(7).check().unwrap();
    }
    let Some(config) = bounded(&text, 300_000, 100, || checked(Config::parse(&text))) else { return };
    bounded(&text, 16 << 20, 100, || {
        let frequencies = config.rope.inv_freq(config.head_dim);
        assert_eq!(frequencies.len(), config.head_dim / 2);
        let budget = Some(Budget::Bytes(8 << 20));
        for context in [Some(8), None, Some(config.context)] {
            let options =
                Options { device: Device::Cpu, threads: Some(1), context, memory: budget, ..Options::default() };
            let bundle = Bundle::embedded().unwrap();
            checked(Engine::plan_for(&config, &bundle.weights, None, &options));
            if context == Some(8) && config.context >= 8 {
                let Some(mut engine) = checked(Engine::new(config.clone(), bundle.weights, None, &options)) else {
                    continue;
                };
                let seq = engine.open().unwrap();
                checked(engine.prefill(&[(seq, &[0, 1, 2])]).map(<[f32]>::to_vec));
            }
        }
    });
}

fn config_seeds() -> Vec<Vec<u8>> {
    let llama3 = br#"{"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 192, "max_position_embeddings": 256,
        "use_sliding_window": true, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}, "eos_token_id": [1, 2], "torch_dtype": "bfloat16"}"#;
    vec![STORIES.to_vec(), GENERATION.to_vec(), llama3.to_vec(), vec![0], (0..40).collect()]
}

/// JSON, or choices of parts to put together; the text behind the last NUL is encoded besides.
pub fn tokenizer(data: &[u8]) {
    let (file, own) = match data.iter().rposition(|&b| b == 0) {
        Some(at) if data.first() == Some(&b'{') => {
            (data[..at].to_vec(), String::from_utf8_lossy(&data[at + 1..]).into())
        }
        None if data.first() == Some(&b'{') => (data.to_vec(), String::new()),
        _ => tokenizer_file(data),
    };
    bounded(data, 256 << 20, 4000, || {
        let read = Tokenizer::from_bytes("a/tokenizer.json", &file, None);
        let Some(tokenizer) = fenced(read) else { return };
        for text in ["Once upon a time, ünïcode 🦀\n\n", "", &own] {
            let Some(ids) = fenced(tokenizer.encode(text, true)) else { continue };
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
            let Some(whole) = fenced(tokenizer.decode(&ids, true)) else { continue };
            let mut stream = tokenizer.stream(true);
            let pieces: Option<String> = ids.iter().map(|&id| fenced(stream.push(id))).collect();
            if let (Some(pieces), Some(rest)) = (pieces, fenced(stream.finish())) {
                assert_eq!(pieces + &rest, whole, "what the stream gives is what the whole decodes to");
            }
        }
        fenced(tokenizer.decode(&[0, 1, 300, 1535, u32::MAX], false));
    });
}

/// What panics within `tokenizers` is an error, and no finding: it is the fence's to keep.
fn fenced<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(|error| assert!(error.to_string().contains("; "), "{error}")).ok()
}

fn tokenizer_seeds() -> Vec<Vec<u8>> {
    let mut bytes: Value = serde_json::from_slice(include_bytes!("../../assets/stories/tokenizer.json")).unwrap();
    bytes["model"]["vocab"] = json!({"<|endoftext|>": 0, "O": 1, "n": 2, "c": 3, "e": 4, "Ġ": 5, "on": 6});
    bytes["model"]["merges"] = json!([["o", "n"]]);
    let unigram = json!({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0], ["b", -2.5]]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}});
    let drawn = (0..6).map(|seed| (0..120).map(|i: u32| (i.wrapping_mul(seed * 2 + 7) >> 1) as u8).collect());
    [bytes, unigram].iter().map(|json| json.to_string().into_bytes()).chain(drawn).collect()
}

/// A router file, or behind a `C` the `config.json` beside one.
pub fn routers(data: &[u8]) {
    let file = with_header(data);
    if let Some(config) = data.strip_prefix(b"C") {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        fs::write(&path, include_bytes!("../goldens/routing/routers/published-is_mod/model.safetensors")).unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        bounded(data, 100_000, 40, || checked(RouterSet::open(&path)));
        return;
    }
    bounded(&file, 200_000, 80, || {
        let path = Path::new("r.safetensors");
        let Some(set) = checked(RouterSet::from_bytes(path, Bytes::new(file.clone()))) else { return };
        set.settings.check().unwrap();
        let again = RouterSet::from_bytes(path, Bytes::new(set.to_bytes())).expect("what was saved is read");
        let parts = |set: &RouterSet| {
            let bits = |router: &Vec<f32>| router.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
            let layers = set.weights.iter().map(|(&layer, router)| (layer, bits(router), set.threshold(layer)));
            // A capacity is saved for topk, which needs it.
            let capacity = Some(set.settings.capacity).filter(|_| set.settings.select == Select::TopK);
            (set.settings.granularity, set.settings.keys, capacity, layers.collect::<Vec<_>>())
        };
        assert_eq!(parts(&again), parts(&set));
        let config = Config::parse(STORIES).unwrap();
        if checked(set.check(&config, set.fingerprint.as_deref().unwrap_or_default())).is_some() {
            assert!(set.weights.values().flatten().all(|w| w.is_finite()));
        }
    });
}

fn routers_seeds() -> Vec<Vec<u8>> {
    let header = br#"{"__metadata__":{"format":"mindskip-routers-1","granularity":"attn_token","keys":"all","select":"topk","threshold":"0.5","capacity":"0.25","layers":"1,3","thresholds":"0.4,0.6","fingerprint":"ab"},"model.layers.1.router.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"model.layers.3.router.weight":{"dtype":"F16","shape":[4],"data_offsets":[8,16]}}"#;
    let published = [b"C", &include_bytes!("../goldens/routing/routers/published-is_mod/config.json")[..]].concat();
    let short =
        br#"C{"is_mod": [false, true], "granularity": "mlp_sequence", "threshold": 0.25, "mod_capacity": null}"#;
    vec![header.to_vec(), ROUTERS.to_vec(), published, short.to_vec()]
}

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Bundle::embedded().unwrap().tokenizer().unwrap());

const CHATML: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}!\n{% endfor %}\
                      {% if add_generation_prompt %}<|assistant|>{% endif %}";
static TEMPLATE: LazyLock<ChatTemplate> = LazyLock::new(|| ChatTemplate::new("t.jinja", CHATML).unwrap());

/// The first byte chooses how records are read.
pub fn records(data: &[u8]) {
    let Some((&how, file)) = data.split_first() else { return };
    let (tokenizer, template) = (&*TOKENIZER, &*TEMPLATE);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    fs::write(&path, file).unwrap();
    let template = (how % 2 == 0).then_some(template);
    let encoder =
        Encoder { tokenizer, template, eos: &[0, 5][..usize::from(how / 2 % 3)], max_length: usize::from(how) };
    bounded(file, 1 << 20, 4000, || {
        let Some(data) = checked(Dataset::open(&path, &encoder)) else { return };
        for sample in &data.samples {
            assert_eq!(sample.ids.len(), sample.counts.len());
            assert!(sample.ids.len() <= encoder.max_length && sample.answers().count() > 0);
        }
    });
}

fn records_seeds() -> Vec<Vec<u8>> {
    let forms = [
        r#"{"messages": [{"role": "user", "content": "Tom had"}, {"role": "assistant", "content": "a red ball"}]}"#,
        r#"{"prompt": "Tom had", "completion": "a red ball"}"#,
        r#"{"instruction": "Tom had", "input": "", "output": "a red ball"}"#,
        r#"{"text": "Once upon a time"}"#,
    ];
    let array = format!("[{}]", forms.join(",\n"));
    [(100, forms.join("\n")), (101, forms[1..].join("\n\n")), (40, array)]
        .map(|(how, text)| [&[how], text.as_bytes()].concat())
        .to_vec()
}

/// The first byte chooses the task and the form of the file.
pub fn tasks(data: &[u8]) {
    let Some((&how, file)) = data.split_first() else { return };
    let task = Task::ALL.get(usize::from(how) % 10).copied();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(["a_test.jsonl", "a_test.csv", "a_test.tsv"][usize::from(how) / 10 % 3]);
    fs::write(&path, file).unwrap();
    bounded(file, 200_000, 200, || {
        for record in checked(task::read(&path, task)).unwrap_or_default() {
            let choices = match &record.ask {
                task::Ask::Choices { choices, .. } => choices.len(),
                task::Ask::Contexts { contexts, .. } => contexts.len(),
            };
            assert!(choices > 1 && record.gold < choices, "{record:?}");
        }
    });
}

fn tasks_seeds() -> Vec<Vec<u8>> {
    [
        (0, r#"{"id": "M", "question": "Why?", "choices": {"text": ["As.", "So."], "label": ["1", "2"]}, "answerKey": "2"}"#),
        (1, r#"{"id": "M", "question": {"stem": "Why?", "choices": [{"text": "As.", "label": "A"}, {"text": "So.", "label": "B"}]}, "answerKey": "B"}"#),
        (2, r#"{"question": "is it so", "passage": "It is.", "idx": 3, "label": 1}"#),
        (3, r#"{"activity_label": "B", "ctx_a": "[header] How [title] Mix.", "ctx_b": "then", "endings": ["e [s].", " s"], "label": "1"}"#),
        (4, r#"{"question": " Which?\n", "subject": "high_school_x", "choices": ["a", "b", "c", "d"], "answer": 2}"#),
        (14, "\"Which \"\"q\"\"?\",a,b,c,d,C\n"),
        (6, r#"{"goal": "To go", "sol1": "run", "sol2": "walk", "label": 1}"#),
        (7, r#"{"premise": "It \"is\".", "hypothesis": "It was.", "label": "not_entailment", "idx": 0}"#),
        (27, "index\tsentence1\tsentence2\tlabel\n0\tIt \"is\".\tIt was.\tnot_entailment\n"),
        (8, r#"{"sentence": "Ann saw Bo as _ left. ", "option1": "Ann", "option2": "Bo", "answer": "2"}"#),
        (9, "{\"context\": \"C\", \"choices\": [\"a\", \"b\"], \"gold\": 0}\n\n{\"contexts\": [\"a\", \"b\"], \"continuation\": \"d\", \"gold\": 1}"),
    ]
    .map(|(how, text)| [&[how], text.as_bytes()].concat())
    .to_vec()
}

/// A template; what stands behind a NUL is what the user says.
pub fn template(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (source, content) = text.split_once('\0').unwrap_or((&text, "Hi"));
    bounded(data, 64 << 20, 4000, || {
        let Some(template) = checked(ChatTemplate::new("a/chat_template.jinja", source)) else { return };
        let messages =
            [Message::new("user", content), Message::new("assistant", "Yes?"), Message::new("user", content)];
        checked(template.render(&messages, true, &Default::default()));
    });
}

fn template_seeds() -> Vec<Vec<u8>> {
    [
        CHATML,
        "{%- for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ bos_token }}{% elif loop.last %}{% break %}{% endif %}{{ m.content | trim | upper }}{% endfor -%}",
        "{% macro f(x, n=3) %}{% if n > 0 %}{{ f(x ~ x, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f('a') }}{% set ns = namespace(a=[1, 2]) %}{{ ns.a | tojson(indent=2) }}{{ strftime_now('%d %b %Y') }}",
        "{% generation %}{{ 'abc'.split('b')[-1].title().removeprefix('C') }}{% endgeneration %}{{ range(3) | list }}{{ raise_exception('no') }}",
    ]
    .map(|source| source.as_bytes().to_vec())
    .to_vec()
}

/// A sequence of calls to the C library.
pub fn calls(data: &[u8]) {
    bounded(data, 128 << 20, 0, || calls::run(&mut Draw::new(data)));
}

fn calls_seeds() -> Vec<Vec<u8>> {
    let mixed = (1..8)
        .map(|seed: u32| (0..160u32).map(move |i| (i.wrapping_mul(2_654_435_769).wrapping_mul(seed) >> 21) as u8));
    mixed.map(Iterator::collect).chain([calls::SEED.to_vec(), calls::BATCH_SEED.to_vec()]).collect()
}
