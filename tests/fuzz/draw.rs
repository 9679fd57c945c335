//! Files that are nearly right, by choices that are read off bytes.

use serde_json::{Value, json};

/// Choices, until the bytes are used up; zeros from there on.
pub struct Draw<'a>(&'a [u8]);

impl<'a> Draw<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Draw(bytes)
    }

    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    /// At most 256 choices.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n
    }

    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// True for one in four.
    pub fn rarely(&mut self) -> bool {
        self.byte() >= 192
    }

    fn flag(&mut self) -> bool {
        self.byte() % 2 == 1
    }

    fn text(&mut self) -> String {
        const PIECES: [&str; 20] = [
            "a", "b", "ab", "é", "e\u{301}", " ", "▁", "Ġ", "\n", "🦀", "ﷺ", "<0x41>", "<0xE2>", "##", "</w>", "<unk>",
            "0", "aaaa", "ß", "\0",
        ];
        (0..self.below(4)).map(|_| self.pick(&PIECES)).collect()
    }
}

/// A `config.json` with some values that are others.
pub fn config_file(fine: &[u8], choices: &[u8]) -> Vec<u8> {
    const KEYS: [&str; 32] = [
        "model_type",
        "architectures",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "quantization_config",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "do_sample",
    ];
    let mut draw = Draw::new(choices);
    let mut file: Value = serde_json::from_slice(fine).unwrap();
    while !draw.is_over() {
        let key = draw.pick(&KEYS);
        let value = config_value(&mut draw);
        if key.starts_with("rope_") && !draw.rarely() {
            const ROPE: [&str; 6] = [
                "rope_type",
                "rope_theta",
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ];
            let inner = draw.pick(&ROPE);
            if !file[key].is_object() {
                file[key] = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
            }
            file[key][inner] = value;
        } else if value == "absent" {
            file.as_object_mut().unwrap().remove(key);
        } else {
            file[key] = value;
        }
    }
    file.to_string().into_bytes()
}

fn config_value(draw: &mut Draw) -> Value {
    const NUMBERS: [u64; 20] = [
        0,
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        64,
        96,
        128,
        1 << 12,
        1 << 16,
        1 << 20,
        1 << 24,
        1 << 30,
        1 << 31,
        1 << 32,
        u64::MAX / 2,
        u64::MAX,
    ];
    const FLOATS: [f64; 10] = [0.0, -1.0, 0.5, 1.0, 1e-300, 1e-38, 1e38, 1e300, 10_000.0, f64::MIN_POSITIVE];
    const WORDS: [&str; 16] = [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_mod",
        "gpt2",
        "LlamaForCausalLM",
        "silu",
        "gelu",
        "bfloat16",
        "float32",
        "linear",
        "llama3",
        "default",
        "full_attention",
        "absent",
    ];
    match draw.below(8) {
        0..=2 => draw.pick(&NUMBERS).into(),
        3 => draw.pick(&FLOATS).into(),
        4 => draw.pick(&WORDS).into(),
        5 => draw.flag().into(),
        6 => (0..draw.below(8)).map(|_| draw.pick(&["full_attention", "sliding_attention", "attention"])).collect(),
        _ => draw.pick(&[Value::Null, json!([1, 2]), json!({}), json!(-1)].each_ref()).clone(),
    }
}

/// A `tokenizer.json` and a text for it.
pub fn tokenizer_file(choices: &[u8]) -> (Vec<u8>, String) {
    let mut draw = Draw::new(choices);
    let model = model(&mut draw);
    let mut file = json!({"version": "1.0", "model": model});
    for (name, part) in [
        ("normalizer", normalizer as fn(&mut Draw, u8) -> Value),
        ("pre_tokenizer", pre_tokenizer),
        ("decoder", decoder),
        ("post_processor", post_processor),
    ] {
        if draw.flag() {
            file[name] = part(&mut draw, 0);
        }
    }
    let flags = ["single_word", "lstrip", "rstrip", "normalized", "special"];
    let added = (0..draw.below(4)).map(|i| {
        let mut token = json!({"id": usize::from(draw.rarely()) * draw.below(20) + i, "content": draw.text()});
        flags.iter().filter(|_| draw.flag()).for_each(|&flag| token[flag] = true.into());
        token
    });
    file["added_tokens"] = added.collect();
    let text = (0..draw.below(24)).map(|_| draw.text()).collect();
    (file.to_string().into_bytes(), text)
}

fn model(draw: &mut Draw) -> Value {
    let mut pieces =
        vec!["<unk>".to_string(), "a".into(), "b".into(), "ab".into(), "▁".into(), "Ġ".into(), "<0x41>".into()];
    pieces.extend((0..draw.below(6)).map(|_| draw.text()));
    let mut ids = serde_json::Map::new();
    for piece in &pieces {
        let id = if draw.rarely() { draw.below(40) } else { ids.len() };
        ids.entry(piece.clone()).or_insert(id.into());
    }
    let scores: Vec<Value> = pieces.iter().map(|piece| json!([piece, -f64::from(draw.byte()) / 8.0])).collect();
    let mut model = match draw.below(4) {
        0 => json!({"type": "WordLevel", "vocab": ids}),
        1 => json!({"type": "Unigram", "vocab": scores, "unk_id": draw.below(9)}),
        _ => json!({"type": "BPE", "vocab": ids, "merges": [["a", "b"]]}),
    };
    for (key, text) in [("unk_token", "<unk>"), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>")] {
        if draw.rarely() {
            model[key] = text.into();
        }
    }
    for key in ["fuse_unk", "byte_fallback", "ignore_merges"] {
        model[key] = draw.flag().into();
    }
    model
}

fn pattern(draw: &mut Draw) -> Value {
    const REGEXES: [&str; 12] =
        [r"\s+", r"", r".", r"a*", r"(a|b)*c", r"(?=a)", r"\p{L}+|\s", r"^", r"$", r"(a+)+$", r"(?<!a)b", r"\s+(?!\S)"];
    if draw.flag() { json!({"String": draw.text()}) } else { json!({"Regex": draw.pick(&REGEXES)}) }
}

/// Several parts in a list, or one.
fn sequence(draw: &mut Draw, depth: u8, list: &str, part: fn(&mut Draw, u8) -> Value) -> Value {
    let parts: Vec<Value> = (0..draw.below(6)).map(|_| part(draw, depth + 1)).collect();
    json!({"type": "Sequence", list: parts})
}

fn normalizer(draw: &mut Draw, depth: u8) -> Value {
    const PLAIN: [&str; 8] = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel"];
    match draw.below(9) {
        0..=1 if depth < 3 => sequence(draw, depth, "normalizers", normalizer),
        8 => {
            // One unit of the table, and replacements.
            let size = draw.pick(&["BAAA", "BAAA", "CAAA", "////"]);
            let charsmap =
                size.to_string() + draw.pick(&["AAAA", "AAQA", "AAH/"]) + draw.pick(&["AABh", "AGEA", "YWFh"]);
            json!({"type": "Precompiled", "precompiled_charsmap": charsmap})
        }
        2 => json!({"type": "Strip", "strip_left": draw.flag(), "strip_right": draw.flag()}),
        3 => json!({"type": "Prepend", "prepend": draw.text()}),
        4..=5 => json!({"type": "Replace", "pattern": pattern(draw), "content": draw.text()}),
        6 => json!({"type": "BertNormalizer", "clean_text": draw.flag(), "handle_chinese_chars": draw.flag(),
            "strip_accents": null, "lowercase": draw.flag()}),
        _ => json!({"type": draw.pick(&PLAIN)}),
    }
}

fn pre_tokenizer(draw: &mut Draw, depth: u8) -> Value {
    const PLAIN: [&str; 4] = ["Whitespace", "WhitespaceSplit", "UnicodeScripts", "BertPreTokenizer"];
    const BEHAVIORS: [&str; 5] = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"];
    match draw.below(9) {
        0..=1 if depth < 3 => sequence(draw, depth, "pretokenizers", pre_tokenizer),
        2 => byte_level(draw),
        3 => metaspace(draw),
        4 => json!({"type": "Punctuation", "behavior": draw.pick(&BEHAVIORS)}),
        5 => json!({"type": "Digits", "individual_digits": draw.flag()}),
        6 => {
            json!({"type": "Split", "pattern": pattern(draw), "behavior": draw.pick(&BEHAVIORS), "invert": draw.flag()})
        }
        7 => json!({"type": "FixedLength", "length": draw.byte()}),
        _ => json!({"type": draw.pick(&PLAIN)}),
    }
}

fn decoder(draw: &mut Draw, depth: u8) -> Value {
    match draw.below(11) {
        0..=1 if depth < 3 => sequence(draw, depth, "decoders", decoder),
        2 => byte_level(draw),
        3 => metaspace(draw),
        4 => json!({"type": "ByteFallback"}),
        5 => {
            json!({"type": "Strip", "content": draw.pick(&["a", " ", "▁"]), "start": draw.below(3), "stop": draw.below(2)})
        }
        6 => json!({"type": "Replace", "pattern": pattern(draw), "content": draw.text()}),
        7 => json!({"type": "WordPiece", "prefix": draw.text(), "cleanup": draw.flag()}),
        8 => json!({"type": "BPEDecoder", "suffix": draw.text()}),
        9 => {
            json!({"type": "CTC", "pad_token": draw.text(), "word_delimiter_token": draw.text(), "cleanup": draw.flag()})
        }
        _ => json!({"type": "Fuse"}),
    }
}

fn byte_level(draw: &mut Draw) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": draw.flag(), "trim_offsets": draw.flag(), "use_regex": draw.flag()})
}

fn metaspace(draw: &mut Draw) -> Value {
    let schemes = ["always", "never", "first"];
    json!({"type": "Metaspace", "replacement": draw.pick(&["▁", "a", " "]), "prepend_scheme": draw.pick(&schemes), "split": draw.flag()})
}

fn post_processor(draw: &mut Draw, depth: u8) -> Value {
    let id = draw.below(12);
    match draw.below(5) {
        0 if depth < 3 => sequence(draw, depth, "processors", post_processor),
        1 => json!({"type": "BertProcessing", "sep": ["a", id], "cls": ["b", draw.below(12)]}),
        2 => byte_level(draw),
        _ => {
            let text = json!({"Sequence": {"id": "A", "type_id": 0}});
            let token = json!({"SpecialToken": {"id": "t", "type_id": 0}});
            let single: Vec<&Value> = (0..draw.below(4)).map(|_| if draw.flag() { &text } else { &token }).collect();
            json!({"type": "TemplateProcessing", "single": single, "pair": [],
                "special_tokens": {"t": {"id": "t", "ids": [id], "tokens": ["a"]}}})
        }
    }
}
