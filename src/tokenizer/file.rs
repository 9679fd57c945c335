//! The two files of a tokenizer, taken apart, checked and put together; see [`super`] for why.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::models::bpe::{self, BPE};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::normalizers::Precompiled;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizedString, Normalizer as _, NormalizerWrapper,
    PreTokenizerWrapper, Tokenizer as Pipeline,
};

use super::{Growth, Inner, broken, fenced, kind};
use crate::error::{Error, Kind, Result};

/// Ids are below this, as the vocabularies of models are; see [`crate::config::Config::vocab`].
const MAX_ID: u32 = 1 << 24;
/// Pieces of a unigram model are at most this long, in bytes: they are dropped recursively, a byte a call.
const MAX_PIECE: usize = 1 << 10;
/// Normalizers and their like nest at most this deep; real ones do twice.
const MAX_NESTING: usize = 8;
/// A text becomes at most so many times as long, by [`growth`]; real files come to 2112.
const MAX_GROWTH: f64 = 4096.0;

/// Reads a `tokenizer.json`, with what its `tokenizer_config.json` says.
///
/// Errors: Format, Unsupported.
pub(super) fn read(path: &Path, tokenizer: &[u8], settings: Settings) -> Result<Inner> {
    let file: File = serde_json::from_slice(tokenizer).map_err(|e| broken(format!("not a tokenizer: {e}")))?;
    file.build(path, settings)
}

/// `tokenizer.json`.
#[derive(Deserialize)]
struct File {
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedWithId>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    vocab: Vocab,
    merges: Option<Vec<Merge>>,
    unk_token: Option<String>,
    unk_id: Option<usize>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

enum Vocab {
    Ids(bpe::Vocab),
    Scores(Vec<(String, f64)>),
}

struct Merge(String, String);

#[derive(Deserialize)]
struct AddedWithId {
    id: u32,
    #[serde(flatten)]
    token: Added,
}

/// An added token, with the defaults that transformers gives its flags.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Added {
    pub content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
    normalized: Option<bool>,
}

impl Added {
    fn special(content: String) -> Added {
        Added { content, single_word: false, lstrip: false, rstrip: false, special: true, normalized: None }
    }
}

impl From<Added> for AddedToken {
    fn from(t: Added) -> AddedToken {
        let token = AddedToken::from(t.content, t.special).single_word(t.single_word).lstrip(t.lstrip).rstrip(t.rstrip);
        token.normalized(t.normalized.unwrap_or(!t.special))
    }
}

impl File {
    fn build(self, path: &Path, settings: Settings) -> Result<Inner> {
        if let Some(version) = self.version.filter(|v| v != "1.0") {
            return Err(unsupported(format!("version {version:?} of the format")));
        }
        let parts = [&self.normalizer, &self.pre_tokenizer, &self.decoder];
        if parts.into_iter().flatten().map(growth).product::<f64>() > MAX_GROWTH {
            return Err(broken(format!("parts that may make a text more than {MAX_GROWTH} times as long")));
        }
        let growth = Growth::of(self.decoder.as_ref());
        let (model, mut highest) = self.model.build()?;
        let mut pipeline = Pipeline::new(model);
        pipeline.with_pre_tokenizer(part::<PreTokenizerWrapper>("pre_tokenizer", self.pre_tokenizer)?);
        pipeline.with_decoder(part::<DecoderWrapper>("decoder", self.decoder)?);
        let normalizer = part::<NormalizerWrapper>("normalizer", self.normalizer)?;
        fenced(|| pipeline.with_normalizer(normalizer).map(drop)).map_err(broken)?;

        highest = add(&mut pipeline, self.added_tokens)?.max(highest);
        let extra =
            add(&mut pipeline, settings.added).map_err(|e| e.at(path.with_file_name("tokenizer_config.json")))?;
        highest = extra.max(highest);
        let named = settings.named.values().chain(&settings.extra);
        let special: Vec<AddedToken> = named
            .filter(|t| pipeline.token_to_id(&t.content).is_some())
            .filter(|t| !pipeline.get_added_vocabulary().get_vocab().contains_key(&t.content))
            .map(|t| Added { special: true, ..t.clone() }.into())
            .collect();
        add_tokens(&mut pipeline, special)?;

        let processor = self.post_processor.unwrap_or_default();
        let (prefix, suffix) = if processor.is_null() { Default::default() } else { surroundings(&processor, 0)? };
        if let Some(id) = prefix.iter().chain(&suffix).find(|id| pipeline.id_to_token(**id).is_none()) {
            return Err(broken(format!("the post-processor adds the token {id}, which there is not")));
        }
        let named = settings.named.into_iter().map(|(name, token)| (name, token.content)).collect();
        let vocab_size = highest as usize + 1;
        Ok(Inner { path: path.to_owned(), pipeline, prefix, suffix, named, vocab_size, growth })
    }
}

impl Model {
    /// The model and its highest id.
    fn build(self) -> Result<(ModelWrapper, u32)> {
        let guess = if matches!(self.vocab, Vocab::Ids(_)) { "BPE" } else { "Unigram" };
        // Asked here: the built model would answer with a copy of its vocabulary.
        let highest = match &self.vocab {
            Vocab::Ids(ids) => ids.values().max().copied(),
            Vocab::Scores(scores) => (scores.len() as u32).checked_sub(1),
        };
        let model = match (self.r#type.as_deref().unwrap_or(guess), self.vocab) {
            ("BPE", Vocab::Ids(vocab)) => {
                let prefix = self.continuing_subword_prefix.unwrap_or_default();
                let merges = self.merges.ok_or_else(|| broken("a BPE model without merges"))?;
                let longest = vocab.keys().map(String::len).max().unwrap_or(0);
                let mut pairs = Vec::with_capacity(merges.len());
                for Merge(a, b) in merges.into_iter().filter(|merge| !merge.0.starts_with("#version")) {
                    let fits = b.is_char_boundary(prefix.len()) && a.len() + b.len() - prefix.len() <= longest;
                    if !fits {
                        return Err(broken(format!("the merge of {a:?} and {b:?} makes no token")));
                    }
                    pairs.push((a, b));
                }
                let mut bpe = BPE::builder().vocab_and_merges(vocab, pairs);
                if !prefix.is_empty() {
                    bpe = bpe.continuing_subword_prefix(prefix);
                }
                if let Some(suffix) = self.end_of_word_suffix {
                    bpe = bpe.end_of_word_suffix(suffix);
                }
                if let Some(token) = self.unk_token {
                    bpe = bpe.unk_token(token);
                }
                let bpe =
                    bpe.fuse_unk(self.fuse_unk.unwrap_or(false)).byte_fallback(self.byte_fallback.unwrap_or(false));
                let bpe = bpe.ignore_merges(self.ignore_merges.unwrap_or(false));
                ModelWrapper::from(fenced(|| bpe.build()).map_err(broken)?)
            }
            ("WordLevel", Vocab::Ids(vocab)) => {
                let words = WordLevel::builder().vocab(vocab).unk_token(self.unk_token.unwrap_or_default());
                fenced(|| words.build()).map_err(broken)?.into()
            }
            ("Unigram", Vocab::Scores(scores)) => {
                if let Some((piece, _)) = scores.iter().find(|(piece, _)| piece.len() > MAX_PIECE) {
                    return Err(broken(format!("a piece of {} bytes", piece.len())));
                }
                let byte_fallback = self.byte_fallback.unwrap_or(false);
                fenced(|| Unigram::from(scores, self.unk_id, byte_fallback)).map_err(broken)?.into()
            }
            (kind @ ("BPE" | "WordLevel" | "Unigram"), _) => {
                return Err(broken(format!("the vocabulary is none of a {kind} model")));
            }
            (kind, _) => return Err(unsupported(format!("a model of type {kind:?}"))),
        };
        highest.map(|id| (model, id)).ok_or_else(|| broken("the vocabulary is empty"))
    }
}

/// Adds tokens to the vocabulary; gives the highest of their ids.
///
/// `tokenizers` numbers them by itself, behind the model's tokens, unless the model has them already. A file that says
/// otherwise would be read with other ids than it was made with.
fn add(pipeline: &mut Pipeline, tokens: Vec<AddedWithId>) -> Result<u32> {
    if let Some(t) = tokens.iter().find(|t| t.id >= MAX_ID) {
        return Err(broken(format!(
            "the added token {:?} has the id {}, beyond any vocabulary",
            t.token.content, t.id
        )));
    }
    let added: Vec<AddedToken> = tokens.iter().map(|t| t.token.clone().into()).collect();
    add_tokens(pipeline, added)?;
    for AddedWithId { id, token: Added { content, .. } } in &tokens {
        let actual = pipeline.token_to_id(content);
        if !content.is_empty() && actual != Some(*id) {
            let actual = actual.map_or("none".into(), |id| id.to_string());
            return Err(broken(format!(
                "the added token {content:?} has the id {id}, but its place gives it {actual}"
            )));
        }
    }
    Ok(tokens.iter().map(|t| t.id).max().unwrap_or(0))
}

fn add_tokens(pipeline: &mut Pipeline, tokens: Vec<AddedToken>) -> Result<()> {
    if let Some(normalizer) = pipeline.get_normalizer() {
        // Of a token that is nothing once it is normalized, tokenizers would find endlessly many in any text.
        for token in tokens.iter().filter(|t| t.normalized && !t.content.is_empty()) {
            let mut text = NormalizedString::from(token.content.as_str());
            fenced(|| normalizer.normalize(&mut text)).map_err(broken)?;
            if text.get().is_empty() {
                return Err(broken(format!("the added token {:?} is empty once it is normalized", token.content)));
            }
        }
    }
    fenced(|| pipeline.add_tokens(tokens)).map(drop).map_err(broken)
}

/// A normalizer, pre-tokenizer or decoder, from its JSON.
fn part<T: DeserializeOwned>(name: &str, json: Option<Value>) -> Result<Option<T>> {
    let Some(json) = json else { return Ok(None) };
    check_part(&json, 0)?;
    fenced(|| Ok(serde_json::from_value(json)?)).map(Some).map_err(|e| broken(format!("a bad {name}: {e}")))
}

/// Refuses what would panic in `tokenizers`, now or when it is used.
fn check_part(part: &Value, depth: usize) -> Result<()> {
    ensure_nesting(depth)?;
    for list in ["normalizers", "pretokenizers", "decoders"] {
        for inner in part[list].as_array().into_iter().flatten() {
            check_part(inner, depth + 1)?;
        }
    }
    match kind(part) {
        "Precompiled" => {
            replacements(part).ok_or_else(|| broken("a normalizer whose table is cut off"))?;
            let read: Result<Precompiled, _> = serde_json::from_str(&part.to_string());
            read.map(drop).map_err(|e| broken(format!("a bad normalizer: {e}")))
        }
        "Prepend" if part["prepend"] == "" => Err(broken("a normalizer that prepends nothing")),
        "Replace" if part["pattern"]["String"] == "" => Err(broken("a replacement of nothing")),
        "FixedLength" if part["length"] == 0 => Err(broken("a pre-tokenizer that splits into pieces of length 0")),
        "Strip" if part["stop"].as_u64().is_some_and(|n| n > 0) => {
            Err(unsupported("a decoder that strips the ends of tokens"))
        }
        _ => Ok(()),
    }
}

/// How many times as long a part may make a text, at most. Parts of a sequence multiply: each reads what the one before made.
fn growth(part: &Value) -> f64 {
    let inner = ["normalizers", "pretokenizers", "decoders"].iter().filter_map(|list| part[list].as_array());
    let length = |text: &Value| text.as_str().map_or(0, str::len) as f64;
    let own = match (kind(part), &part["pattern"]["String"]) {
        // An expression may match between any two bytes.
        ("Replace", Value::Null) => 1.0 + length(&part["content"]),
        ("Replace", old) => (length(&part["content"]) / length(old).max(1.0)).max(1.0),
        ("Prepend", _) => 1.0 + length(&part["prepend"]),
        ("Metaspace", _) => 1.0 + length(&part["replacement"]),
        ("Precompiled", _) => {
            let all = replacements(part).unwrap_or_default();
            all.split(|&b| b == 0).map(|one| one.len() as f64).fold(1.0, f64::max)
        }
        // Two bytes for one, a blank on either side, a blank between any two bytes.
        ("ByteLevel" | "BertNormalizer" | "BPEDecoder" | "CTC" | "WordPiece", _) => 2.0,
        _ => 1.0,
    };
    inner.flatten().map(growth).product::<f64>() * own
}

/// What a precompiled normalizer puts in place of characters, each ended by a 0: the bytes behind a table of as many bytes as
/// the first four say. `tokenizers` would allocate as much as these say.
fn replacements(part: &Value) -> Option<Vec<u8>> {
    let padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let base64 = GeneralPurpose::new(&STANDARD, padding);
    let bytes = base64.decode(part["precompiled_charsmap"].as_str()?).ok()?;
    let (size, rest) = bytes.split_first_chunk()?;
    Some(rest.get(u32::from_le_bytes(*size) as usize..)?.to_vec())
}

/// The ids that a post-processor puts before and behind a text.
fn surroundings(processor: &Value, depth: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    ensure_nesting(depth)?;
    let bad = || broken(format!("a bad post-processor of type {:?}", kind(processor)));
    let pair = |key: &str| processor[key][1].as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(bad);
    match kind(processor) {
        "ByteLevel" => Ok(Default::default()), // sees to the offsets of tokens
        "BertProcessing" | "RobertaProcessing" => Ok((vec![pair("cls")?], vec![pair("sep")?])),
        "Sequence" => {
            let mut sum = (Vec::new(), Vec::new());
            for inner in processor["processors"].as_array().ok_or_else(bad)? {
                let one = surroundings(inner, depth + 1)?;
                if one != Default::default() && sum != Default::default() {
                    return Err(unsupported("a sequence of post-processors that add tokens"));
                }
                sum = if one == Default::default() { sum } else { one };
            }
            Ok(sum)
        }
        "TemplateProcessing" => {
            let (mut before, mut after, mut texts) = (Vec::new(), Vec::new(), 0);
            for piece in processor["single"].as_array().ok_or_else(bad)? {
                if let Some(name) = piece["SpecialToken"]["id"].as_str() {
                    let ids = Vec::<u32>::deserialize(&processor["special_tokens"][name]["ids"]).map_err(|_| bad())?;
                    if texts == 0 { before.extend(ids) } else { after.extend(ids) }
                } else if piece["Sequence"]["id"] == "A" {
                    texts += 1;
                } else {
                    return Err(bad());
                }
            }
            if texts == 1 { Ok((before, after)) } else { Err(unsupported("a template without one place for the text")) }
        }
        other => Err(unsupported(format!("a post-processor of type {other:?}"))),
    }
}

/// What `tokenizer_config.json` says about special tokens, and its chat template.
#[derive(Default)]
pub(crate) struct Settings {
    /// `bos_token` and its like, by name.
    pub named: BTreeMap<&'static str, Added>,
    extra: Vec<Added>,
    added: Vec<AddedWithId>,
    pub chat_template: Option<Value>,
}

impl Settings {
    const NAMES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

    /// Errors: Format, without a path.
    pub fn parse(bytes: &[u8]) -> Result<Settings> {
        let mut json: serde_json::Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| broken(format!("not a tokenizer configuration: {e}")))?;
        let mut settings = Settings { chat_template: json.remove("chat_template"), ..Settings::default() };
        // A token is written as its text or as a table of its text and flags.
        let token = |key: &str, value: Value| match value {
            Value::String(content) => Ok(Added::special(content)),
            table => Added::deserialize(table).map_err(|e| broken(format!("a bad {key}: {e}"))),
        };
        for name in Self::NAMES {
            if let Some(value) = json.remove(name).filter(|v| !v.is_null()) {
                settings.named.insert(name, token(name, value)?);
            }
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            let values = match json.remove(key) {
                Some(Value::Array(list)) => list,
                Some(Value::Object(table)) => table.into_iter().map(|(_, value)| value).collect(),
                _ => Vec::new(),
            };
            for value in values {
                settings.extra.push(token(key, value)?);
            }
        }
        if let Some(Value::Object(table)) = json.remove("added_tokens_decoder") {
            for (id, value) in table {
                let id = id.parse().map_err(|e| broken(format!("{id:?} is no token id: {e}")))?;
                settings.added.push(AddedWithId { id, token: token("added_tokens_decoder", value)? });
            }
            settings.added.sort_by_key(|t| t.id);
        }
        Ok(settings)
    }
}

fn ensure_nesting(depth: usize) -> Result<()> {
    if depth < MAX_NESTING { Ok(()) } else { Err(broken(format!("parts nested more than {MAX_NESTING} deep"))) }
}

fn unsupported(what: impl fmt::Display) -> Error {
    Error::new(Kind::Unsupported, format!("{what} is not supported")).action("use another model")
}

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table;
        impl<'de> Visitor<'de> for Table {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut ids = bpe::Vocab::default();
                while let Some((token, id)) = map.next_entry::<String, u32>()? {
                    if id >= MAX_ID {
                        return Err(A::Error::custom(format!("{token:?} has the id {id}, beyond any vocabulary")));
                    }
                    ids.insert(token, id);
                }
                Ok(Vocab::Ids(ids))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocab, A::Error> {
                let mut scores = Vec::new();
                while let Some(piece) = list.next_element()? {
                    scores.push(piece);
                }
                Ok(Vocab::Scores(scores))
            }
        }
        deserializer.deserialize_any(Table)
    }
}

/// `"a b"`, or `["a", "b"]` in newer files.
impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a pair of tokens")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                let pair = text.split_once(' ').filter(|(_, b)| !b.contains(' '));
                pair.map(|(a, b)| Merge(a.into(), b.into())).ok_or_else(|| E::custom(format!("{text:?} is no merge")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merge, A::Error> {
                let (a, b, more) = (list.next_element()?, list.next_element()?, list.next_element::<String>()?);
                match (a, b, more) {
                    (Some(a), Some(b), None) => Ok(Merge(a, b)),
                    _ => Err(A::Error::custom("a merge has two tokens")),
                }
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;
    use super::*;
    use crate::tokenizer::Tokenizer;
    use serde_json::json;

    #[test]
    fn the_configuration_names_special_tokens() {
        let tokenizer = configured(json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "[PAD]", "unk_token": null,
            "add_bos_token": false, "add_eos_token": true, "additional_special_tokens": ["ab", {"content": "▁hi"}],
        }))
        .unwrap();
        assert_eq!((tokenizer.bos_token(), tokenizer.bos_id()), (Some("<s>"), Some(1)));
        assert_eq!((tokenizer.eos_token(), tokenizer.eos_id()), (Some("</s>"), Some(2)));
        assert_eq!((tokenizer.token_id("[PAD]"), tokenizer.vocab_size()), (None, 270), "nothing is invented");
        assert_eq!(tokenizer.encode("hi ab", true).unwrap(), [1, 267, 259, 268], "as in transformers");
        assert_eq!(tokenizer.decode(&[1, 267, 259, 268, 265], true).unwrap(), " a");
        let names: Vec<_> = tokenizer.named_tokens().collect();
        assert_eq!(names, [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "[PAD]")]);

        let tokenizer = configured(json!({"added_tokens_decoder": {
            "271": {"content": "<y>"}, "270": {"content": "<x>", "special": true}, "260": {"content": "a", "special": true},
        }}));
        let tokenizer = tokenizer.unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.bos_token()), (272, None));
        assert_eq!(tokenizer.encode("hi<x>a<y>", false).unwrap(), [267, 270, 260, 271]);
        assert!(tokenizer.is_special(270) && tokenizer.is_special(260) && !tokenizer.is_special(271));

        for (config, message) in [
            (json!({"bos_token": 1}), "a bad bos_token"),
            (json!({"eos_token": {"id": 1}}), "a bad eos_token: missing field `content`"),
            (json!({"added_tokens_decoder": {"x": {"content": "a"}}}), "\"x\" is no token id"),
            (
                json!({"added_tokens_decoder": {"7": {"content": "a"}}}),
                "\"a\" has the id 7, but its place gives it 260",
            ),
            (json!([]), "not a tokenizer configuration"),
        ] {
            let error = configured(config).unwrap_err();
            assert_eq!(error.kind(), Kind::Format);
            let text = error.to_string();
            assert!(text.starts_with("dir/tokenizer_config.json: ") && text.contains(message), "{text}");
        }
    }

    #[test]
    fn post_processors_surround_a_text() {
        let add =
            |processor: Value| parse(&with(json!({"post_processor": processor}))).map(|t| t.encode("a", true).unwrap());
        let template = llama()["post_processor"].clone();
        let bert = json!({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true});
        let both = |one: &Value, two: &Value| json!({"type": "Sequence", "processors": [one, two]});
        assert_eq!(add(Value::Null).unwrap(), [265]);
        assert_eq!(add(bytes.clone()).unwrap(), [265]);
        assert_eq!(add(bert.clone()).unwrap(), [1, 265, 2]);
        assert_eq!(add(both(&bytes, &template)).unwrap(), [1, 265], "as Llama 3 has it");
        let mut absent = template.clone();
        absent["special_tokens"]["<s>"]["ids"] = json!([270]);
        let mut nameless = template.clone();
        nameless["special_tokens"] = json!({});
        let mut textless = template.clone();
        textless["single"] = json!([]);
        for (processor, kind, message) in [
            (absent, Kind::Format, "adds the token 270, which there is not"),
            (nameless, Kind::Format, "a bad post-processor of type \"TemplateProcessing\""),
            (textless, Kind::Unsupported, "a template without one place for the text"),
            (both(&template, &bert), Kind::Unsupported, "a sequence of post-processors that add tokens"),
            (
                json!({"type": "New"}),
                Kind::Unsupported,
                "a post-processor of type \"New\" is not supported; use another",
            ),
        ] {
            let error = add(processor).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn what_is_no_tokenizer_is_refused() {
        let model = |changes: Value| {
            let mut file = llama();
            file["model"].as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            file.to_string()
        };
        let mut nested = json!({"type": "NFC"});
        for _ in 0..20 {
            nested = json!({"type": "Sequence", "normalizers": [nested]});
        }
        let part = |name: &str, part: Value| with(json!({name: part})).to_string();
        let deep = |open: &str| format!("{{\"model\": {}", open.repeat(200_000));
        for (file, message) in [
            (String::new(), "not a tokenizer: EOF"),
            ("[]".into(), "not a tokenizer"),
            (deep("["), "not a tokenizer"),
            (deep("{\"a\":"), "not a tokenizer"),
            (format!("{{\"decoder\": {}", "[".repeat(200_000)), "not a tokenizer: recursion limit"),
            ("{\"decoder\": {\"type\": ".into(), "not a tokenizer: EOF"),
            (r#"{"model_type": "llama"}"#.into(), "missing field `model`"),
            (with(json!({"version": "2.0"})).to_string(), "version \"2.0\" of the format is not supported"),
            (model(json!({"vocab": {"a": -1}})), "not a tokenizer: invalid value"),
            (model(json!({"vocab": {"a": u32::MAX}})), "\"a\" has the id 4294967295, beyond any vocabulary"),
            (model(json!({"vocab": [["a", 1.0]]})), "the vocabulary is none of a BPE model"),
            (model(json!({"vocab": {}, "merges": []})), "the vocabulary is empty"),
            (model(json!({"merges": null})), "a BPE model without merges"),
            (model(json!({"merges": ["a b c"]})), "\"a b c\" is no merge"),
            (model(json!({"merges": ["<unk> <unk>"]})), "the merge of \"<unk>\" and \"<unk>\" makes no token"),
            (model(json!({"merges": [["a", "▁"]], "continuing_subword_prefix": "x"})), "makes no token"),
            (model(json!({"merges": ["a x"]})), "`x` out of vocabulary"),
            (model(json!({"type": "WordPiece"})), "a model of type \"WordPiece\" is not supported"),
            (model(json!({"type": "Unigram", "vocab": [["a".repeat(100_000), 0.0]]})), "a piece of 100000 bytes"),
            (model(json!({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 3})), "`unk_id` is larger"),
            (
                part("added_tokens", json!([{"id": 300, "content": "<x>"}])),
                "\"<x>\" has the id 300, but its place gives it 270",
            ),
            (part("added_tokens", json!([{"id": u32::MAX, "content": "<x>"}])), "beyond any vocabulary"),
            (part("normalizer", nested), "parts nested more than 8 deep"),
            (
                part("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "////f2E="})),
                "a normalizer whose table is cut off",
            ),
            (
                part("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAD/"})),
                "a bad normalizer",
            ),
            (
                part(
                    "normalizer",
                    json!({"type": "Precompiled",
                    "precompiled_charsmap": format!("BAAAAAAAAABh{}", "YWFh".repeat(1400))}),
                ),
                "more than 4096 times as long",
            ),
            (
                part("normalizer", json!({"type": "Replace", "pattern": {"Regex": "("}, "content": ""})),
                "a bad normalizer",
            ),
            (part("normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})), "of nothing"),
            (part("normalizer", json!({"type": "Prepend", "prepend": ""})), "a normalizer that prepends nothing"),
            (
                with(json!({
                    "normalizer": {"type": "Strip", "strip_left": true, "strip_right": true},
                    "added_tokens": [{"id": 270, "content": " "}],
                }))
                .to_string(),
                "the added token \" \" is empty once it is normalized",
            ),
            (
                part(
                    "normalizer",
                    json!({"type": "Sequence", "normalizers": vec![
                        json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}); 7
                    ]}),
                ),
                "parts that may make a text more than 4096 times as long",
            ),
            (
                part(
                    "pre_tokenizer",
                    json!({"type": "Sequence", "pretokenizers": vec![json!({"type": "ByteLevel"}); 11]}),
                ),
                "more than 4096 times as long",
            ),
            (part("pre_tokenizer", json!({"type": "FixedLength", "length": 0})), "of length 0"),
            (part("pre_tokenizer", json!({"type": "None"})), "a bad pre_tokenizer"),
            (
                part("decoder", json!({"type": "Strip", "content": "a", "start": 0, "stop": 1})),
                "is not supported; use another",
            ),
            (part("decoder", json!(7)), "a bad decoder"),
        ] {
            let error = Tokenizer::from_bytes("a/tokenizer.json", file.as_bytes(), None).unwrap_err().to_string();
            assert!(error.starts_with("a/tokenizer.json: ") && error.contains("; "), "{error}");
            assert!(error.contains(message) && !error.contains("panicked"), "{error}, not {message:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::open(dir.path()).unwrap_err();
        assert!(
            error.kind() == Kind::Io && error.to_string().contains("no tokenizer.json; give the folder"),
            "{error}"
        );
    }

    #[test]
    fn a_panic_in_tokenizers_is_an_error() {
        // The blanks behind <x> are taken by it and looked for again before the blank.
        let added = json!([{"id": 270, "content": "<x>", "rstrip": true, "special": true}, {"id": 271, "content": "\n", "lstrip": true, "special": true}]);
        let tokenizer = parse(&with(json!({"added_tokens": added}))).unwrap();
        assert_eq!(tokenizer.encode("<x>a", false).unwrap(), [270, 265]);
        let error = tokenizer.encode("<x>\n\n", false).unwrap_err().to_string();
        assert!(error.starts_with("dir/tokenizer.json: tokenizers panicked: AddedVocabulary bad split"), "{error}");
        assert!(error.ends_with("(while encoding text); check that the tokenizer.json is the model's own"), "{error}");
    }

    /// Damaged files give an error or a tokenizer that works, and what is refused is refused before it can panic.
    #[test]
    fn damaged_files_do_not_panic() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |n: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % n.max(1) as u64) as usize
        };
        let compact: Value = serde_json::from_slice(STORIES).unwrap();
        let small = [compact.to_string().into_bytes(), llama().to_string().into_bytes()];
        let mut accepted = 0;
        for round in 0..600 {
            let mut bytes = small[round % 2].clone();
            // Half of the damage falls among the parts, which are small.
            let span = if below(2) == 0 { bytes.len() } else { bytes.len().min(1500) };
            for _ in 0..=below(3) {
                let at = below(span).min(bytes.len());
                let end = (at + below(40)).min(bytes.len());
                match below(6) {
                    0 => bytes.truncate(at),
                    1 => drop(bytes.drain(at..end)),
                    2 => bytes = [&bytes[..end], &bytes[at..]].concat(),
                    3 if at < bytes.len() => bytes[at] ^= 1 << below(8),
                    4 if at < bytes.len() => bytes[at] = b"0123456789{}[]\",:-truefalsnl"[below(28)],
                    _ => bytes[at..end].reverse(),
                }
            }
            let uses = Tokenizer::from_bytes("a/tokenizer.json", &bytes, None).and_then(|tokenizer| {
                accepted += 1;
                let ids = tokenizer.encode("Once upon a 🙂 time\n", true)?;
                chunks(&tokenizer, &ids, true);
                tokenizer.decode(&[0, 1, 5, 300, 1535, u32::MAX], false)
            });
            if let Err(error) = uses {
                let text = error.to_string();
                assert!(text.starts_with("a/tokenizer.json: ") && !text.contains("panicked"), "{text}");
            }
        }
        assert!((50..550).contains(&accepted), "{accepted} of 600: the damage is too much or too little");
    }
}
