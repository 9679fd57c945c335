//! `tokenizer.json`: text to token ids and back, by Hugging Face's own `tokenizers`.
//!
//! That crate trusts its files: broken JSON in the wrong place, a merge that is longer than any token, a template that
//! names an absent token and more of the kind end in a panic. So the file is taken apart here, what would panic is
//! refused with a message, and the pieces are put together again; calls into the crate are fenced besides. Three things
//! in the file have no say: truncation and padding, which transformers switches off as well, and the dropout of merges,
//! which is for training.
//!
//! Of `tokenizer_config.json` the special tokens are read (`bos_token` and its like, `additional_special_tokens`,
//! `added_tokens_decoder`). `add_bos_token` and `add_eos_token` are not: transformers 5 drops them where there is a
//! `tokenizer.json`, whose post-processor says what is added. Nor is `clean_up_tokenization_spaces`, which transformers
//! 5 ignores for BPE, as it corrupts text. A special token that the vocabulary lacks gets no id (transformers invents
//! one, past the end of the model's embedding).

mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer as Pipeline;

pub(crate) use self::file::Settings;
use crate::error::{Error, Kind, Result};
use crate::files;

/// A tokenizer. Clones share everything and may be used from any thread.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::tokenizer::Tokenizer;
///
/// let tokenizer = Tokenizer::open(Path::new("assets/stories"))?;
/// let ids = tokenizer.encode("Tom had a red ball.", true)?;
/// assert_eq!(tokenizer.decode(&ids, true)?, "Tom had a red ball.");
/// assert_eq!(tokenizer.decode(&ids[..1], false)?, "<|endoftext|>");
///
/// assert_eq!((tokenizer.bos_token(), tokenizer.bos_id()), (Some("<|endoftext|>"), Some(ids[0])));
/// assert_eq!((tokenizer.eos_token(), tokenizer.eos_id()), (Some("<|endoftext|>"), Some(ids[0])));
/// assert!(tokenizer.is_special(ids[0]) && !tokenizer.is_special(ids[1]));
/// assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
/// assert!(tokenizer.named_tokens().any(|named| named == ("pad_token", "<|endoftext|>")));
///
/// let file = std::fs::read("assets/stories/tokenizer.json").unwrap();
/// let bare = Tokenizer::from_bytes("memory", &file, None)?;
/// assert_eq!((bare.bos_id(), bare.vocab_size()), (None, tokenizer.vocab_size()));
/// assert!(bare.check(1536).is_ok() && bare.check(1000).is_err());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    /// The `tokenizer.json`, for messages.
    path: PathBuf,
    pipeline: Pipeline,
    /// What the post-processor puts before and behind a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// Named special tokens, by name: `bos_token`.
    named: BTreeMap<&'static str, String>,
    vocab_size: usize,
    growth: Growth,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, if present, `tokenizer_config.json` in `dir`.
    ///
    /// Errors: Io, and those of [`Tokenizer::from_bytes`].
    pub fn open(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let Some(tokenizer) = files::read_if_exists(&path)? else {
            return Err(Error::new(Kind::Io, "no tokenizer.json").at(dir).action(
                "give the folder of a model with one; transformers writes it with AutoTokenizer.from_pretrained(..).save_pretrained(..)",
            ));
        };
        let config = files::read_if_exists(&dir.join("tokenizer_config.json"))?;
        Self::from_bytes(&path, &tokenizer, config.as_deref())
    }

    /// Reads a tokenizer from memory; the path is for messages only, in which `tokenizer_config.json` lies beside it.
    ///
    /// Errors: Format for what is broken, Unsupported for what is not known here.
    pub fn from_bytes(path: impl AsRef<Path>, tokenizer: &[u8], config: Option<&[u8]>) -> Result<Tokenizer> {
        let path = path.as_ref();
        let settings_path = path.with_file_name("tokenizer_config.json");
        let settings = config.map(|bytes| Settings::parse(bytes).map_err(|e| e.at(&settings_path))).transpose()?;
        let settings = settings.unwrap_or_default();
        let inner = file::read(path, tokenizer, settings).map_err(|e| e.at(path))?;
        Ok(Tokenizer(Arc::new(inner)))
    }

    /// The ids of a text. Special tokens that are spelled out in it count as such, as in transformers.
    ///
    /// `add_special_tokens` adds what the file's post-processor adds, such as the beginning-of-sequence token.
    ///
    /// Errors: Format, when the tokenizer cannot spell the text and has no token for the unknown.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.fenced("encoding text", |pipeline| pipeline.encode_fast(text, false))?;
        if !add_special_tokens {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([&self.0.prefix[..], encoding.get_ids(), &self.0.suffix].concat())
    }

    /// The text of ids, without the special tokens when `skip_special`. Ids that stand for nothing are passed over, and
    /// bytes that are no text become U+FFFD, both as in transformers.
    ///
    /// Errors: Format, when the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if !ids.iter().any(|&id| self.visible(id, skip_special).is_some()) {
            return Ok(String::new()); // a decoder may count on a first token
        }
        self.fenced("decoding tokens", |pipeline| pipeline.decode(ids, skip_special))
    }

    /// Text as it grows, token by token; see [`TextStream`].
    pub fn stream(&self, skip_special: bool) -> TextStream {
        TextStream { tokenizer: self.clone(), skip_special, bytes: Vec::new(), pending: Vec::new(), anchor: None }
    }

    /// The id of a token by its text, special or not.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.pipeline.token_to_id(token)
    }

    /// Whether the id is a special token's: one that `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.pipeline.id_to_token(id).is_some() && self.visible(id, true).is_none()
    }

    /// The special tokens that `tokenizer_config.json` names, by name: `("bos_token", "<s>")`.
    pub fn named_tokens(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.named.iter().map(|(name, token)| (*name, token.as_str()))
    }

    /// The beginning-of-sequence token, if `tokenizer_config.json` names one.
    pub fn bos_token(&self) -> Option<&str> {
        self.0.named.get("bos_token").map(String::as_str)
    }

    /// The end-of-sequence token, if `tokenizer_config.json` names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.0.named.get("eos_token").map(String::as_str)
    }

    /// The id of [`Tokenizer::bos_token`], if the vocabulary has it.
    pub fn bos_id(&self) -> Option<u32> {
        self.token_id(self.bos_token()?)
    }

    /// The id of [`Tokenizer::eos_token`], if the vocabulary has it.
    pub fn eos_id(&self) -> Option<u32> {
        self.token_id(self.eos_token()?)
    }

    /// The highest id, added tokens included, plus 1.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    /// Whether every id is below a model's vocabulary. A smaller tokenizer is ordinary: embeddings are often padded.
    ///
    /// Errors: Mismatch.
    pub fn check(&self, vocab: usize) -> Result<()> {
        let size = self.0.vocab_size;
        if size <= vocab {
            return Ok(());
        }
        let cause = format!("has token ids up to {}, but the model has {vocab} tokens", size - 1);
        Err(Error::new(Kind::Mismatch, cause)
            .at(&self.0.path)
            .action("use the tokenizer.json that came with the model"))
    }

    /// What a token is called, unless it is unknown or left out.
    fn visible(&self, id: u32, skip_special: bool) -> Option<String> {
        let pipeline = &self.0.pipeline;
        let special = |token: &str| pipeline.get_added_vocabulary().is_special_token(token);
        pipeline.id_to_token(id).filter(|token| !(skip_special && special(token)))
    }

    fn fenced<T>(&self, op: &str, call: impl FnOnce(&Pipeline) -> tokenizers::Result<T>) -> Result<T> {
        fenced(|| call(&self.0.pipeline)).map_err(|cause| {
            let error = Error::new(Kind::Format, cause).during(op).at(&self.0.path);
            error.action("check that the tokenizer.json is the model's own")
        })
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { path, vocab_size, growth, .. } = &*self.0;
        f.debug_struct("Tokenizer").field("path", path).field("vocab_size", vocab_size).field("growth", growth).finish()
    }
}

/// Text as it grows, token by token: what [`TextStream::push`] and [`TextStream::finish`] return, joined, is what
/// [`Tokenizer::decode`] makes of all ids. The cost of a token does not depend on how many there were.
///
/// Nothing is given out that a later token could change: an unfinished UTF-8 sequence and, where tokens like `<0xE2>`
/// stand for bytes, the whole run of them, since one bad byte makes all of it U+FFFD in [`Tokenizer::decode`].
///
/// ```
/// use std::path::Path;
///
/// use mindskip::tokenizer::{TextStream, Tokenizer};
///
/// let tokenizer = Tokenizer::open(Path::new("assets/stories"))?;
/// let ids = tokenizer.encode("Tom 🐶", false)?; // the dog is several tokens
/// let mut stream: TextStream = tokenizer.stream(true);
/// let pieces = ids.iter().map(|&id| stream.push(id)).collect::<mindskip::Result<Vec<_>>>()?;
/// assert!(pieces.contains(&String::new()) && !pieces.concat().contains('\u{fffd}'));
/// assert_eq!(pieces.concat() + &stream.finish()?, "Tom 🐶");
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// [`Growth::Bytes`]: the beginning of a character, at most 3 bytes.
    bytes: Vec<u8>,
    /// Otherwise: ids whose text is not out yet.
    pending: Vec<u32>,
    /// The last id before `pending`, and its text when it stands alone.
    anchor: Option<(u32, String)>,
}

impl TextStream {
    /// Takes the next id; gives the text that became certain by it, often one word, sometimes none.
    ///
    /// Errors: as [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        let Some(token) = self.tokenizer.visible(id, self.skip_special) else { return Ok(String::new()) };
        match self.tokenizer.0.growth {
            Growth::Bytes => {
                push_bytes(&token, &mut self.bytes);
                Ok(take_text(&mut self.bytes))
            }
            Growth::Pairs { skip_empty: true, .. } if token.is_empty() => Ok(String::new()),
            Growth::Pairs { byte_runs, .. } => {
                self.pending.push(id);
                if byte_runs && is_byte_token(&token) { Ok(String::new()) } else { self.flush() }
            }
            Growth::Whole => {
                self.pending.push(id);
                Ok(String::new())
            }
        }
    }

    /// Ends the text: gives what was held back, bytes that never became a character as U+FFFD. The stream is as new then.
    ///
    /// Errors: as [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = match self.tokenizer.0.growth {
            Growth::Bytes => String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned(),
            _ if self.pending.is_empty() => String::new(),
            _ => self.flush()?,
        };
        self.anchor = None;
        Ok(text)
    }

    /// The text of `pending`. What it reads like depends on whether it is the beginning (a leading space is dropped
    /// there), so the id before it is decoded with it and its text cut off again.
    fn flush(&mut self) -> Result<String> {
        let Some(&last) = self.pending.last() else { return Ok(String::new()) };
        let before = self.anchor.as_ref().map_or("", |(_, text)| text);
        let ids: Vec<u32> = self.anchor.iter().map(|(id, _)| *id).chain(self.pending.drain(..)).collect();
        let text = self.tokenizer.decode(&ids, false)?;
        debug_assert!(text.starts_with(before), "{text:?} does not begin with {before:?}");
        let fresh = text.strip_prefix(before).unwrap_or_default().to_owned();
        self.anchor = Some((last, self.tokenizer.decode(&[last], false)?));
        Ok(fresh)
    }
}

/// How the text grows with the tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Growth {
    /// Tokens are bytes, the text is their UTF-8: GPT-2, Llama 3, Qwen, SmolLM2.
    Bytes,
    /// A token's text depends on itself, on whether it is the first and, with `byte_runs`, on the bytes around it if it is
    /// a byte: Llama 2, Mistral, TinyLlama. With `skip_empty`, a token without text does not count as the first.
    Pairs { byte_runs: bool, skip_empty: bool },
    /// Nothing is known: all text comes at the end.
    Whole,
}

impl Growth {
    fn of(decoder: Option<&Value>) -> Growth {
        let mut steps = Vec::new();
        let Some(decoder) = decoder else { return Growth::Pairs { byte_runs: false, skip_empty: false } };
        flatten(decoder, &mut steps);
        if matches!(&steps[..], [first, rest @ ..] if kind(first) == "ByteLevel" && rest.iter().all(|s| kind(s) == "Fuse"))
        {
            return Growth::Bytes;
        }
        let (mut byte_runs, mut first_differs, mut fused, mut stripped) = (false, false, false, false);
        for step in steps {
            match kind(step) {
                "Replace" if !fused && step["pattern"]["String"] == "▁" && step["content"] == " " => {}
                "ByteFallback" if !fused && !first_differs => byte_runs = true,
                "Metaspace" if !fused => first_differs = true,
                "Fuse" => fused = true,
                // More than one character could reach into the second token.
                "Strip" if fused && !first_differs && step["start"] == 1 && step["content"] == " " => {
                    (first_differs, stripped) = (true, true);
                }
                _ => return Growth::Whole,
            }
        }
        Growth::Pairs { byte_runs, skip_empty: stripped }
    }
}

/// The steps of a decoder, sequences within sequences laid out flat.
fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder["decoders"].as_array() {
        Some(inner) if kind(decoder) == "Sequence" => inner.iter().for_each(|step| flatten(step, steps)),
        _ => steps.push(decoder),
    }
}

fn kind(part: &Value) -> &str {
    part["type"].as_str().unwrap_or_default()
}

/// Whether a token stands for a byte, `<0xE2>`: exactly those that `tokenizers` takes for one.
fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}

/// Appends what a byte-level token stands for; a token with other characters in it stands for itself.
fn push_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for c in token.chars() {
        let Some(byte) = byte_of(c) else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        };
        bytes.push(byte);
    }
}

/// GPT-2's alphabet: printable Latin-1 stands for itself, the 68 other bytes for U+0100 and following, in order.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Takes the text from the front of `bytes`, as `String::from_utf8_lossy` reads it, and leaves an unfinished character.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let (mut text, mut done) = (String::new(), 0);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let bad = chunk.invalid();
        let unfinished = std::str::from_utf8(bad).is_err_and(|e| e.error_len().is_none());
        if bad.is_empty() || (unfinished && done + bad.len() == bytes.len()) {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        done += bad.len();
    }
    bytes.drain(..done);
    text
}

/// Runs a call into `tokenizers`; what would be a panic there is an error here. (The panic is still reported on standard
/// error, by its hook: it is a bug, if one that a damaged file wakes.)
fn fenced<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(format!("tokenizers panicked: {}", text.unwrap_or("no message")))
        }
    }
}

fn broken(cause: impl Into<String>) -> Error {
    Error::new(Kind::Format, cause).action("download the file again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    pub(super) const STORIES: &[u8] = include_bytes!("../assets/stories/tokenizer.json");
    const STORIES_CONFIG: &[u8] = include_bytes!("../assets/stories/tokenizer_config.json");

    fn stories() -> Tokenizer {
        Tokenizer::from_bytes("stories/tokenizer.json", STORIES, Some(STORIES_CONFIG)).unwrap()
    }

    /// A tokenizer as Llama 2 has it, small: 3 special tokens, 256 bytes, then these.
    pub(super) fn llama() -> Value {
        let mut vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2});
        for byte in 0..=255 {
            vocab[format!("<0x{byte:02X}>")] = (3 + byte).into();
        }
        for (i, token) in ["▁", "a", "b", "c", "h", "i", "▁a", "▁h", "▁hi", "ab", "é"].iter().enumerate() {
            vocab[token] = (259 + i).into();
        }
        json!({
            "version": "1.0", "truncation": {"max_length": 1}, "padding": null,
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true},
                {"id": 2, "content": "</s>", "special": true},
            ],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing", "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            },
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {
                "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                "merges": [["▁", "a"], ["▁", "h"], ["▁h", "i"], ["a", "b"]],
            },
        })
    }

    pub(super) fn with(changes: Value) -> Value {
        let mut file = llama();
        file.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        file
    }

    pub(super) fn parse(file: &Value) -> Result<Tokenizer> {
        Tokenizer::from_bytes("dir/tokenizer.json", file.to_string().as_bytes(), None)
    }

    pub(super) fn configured(config: Value) -> Result<Tokenizer> {
        Tokenizer::from_bytes("dir/tokenizer.json", llama().to_string().as_bytes(), Some(config.to_string().as_bytes()))
    }

    pub(super) fn chunks(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut stream = tokenizer.stream(skip_special);
        let mut chunks: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        chunks.push(stream.finish().unwrap());
        chunks
    }

    /// The ids and texts of tokenizers 0.23.3 in Python.
    #[test]
    fn llama_is_as_in_python() {
        let tokenizer = parse(&llama()).unwrap();
        for (text, ids, decoded) in [
            ("hi a", &[1, 267, 265][..], "<s> hi a"),
            ("  hi", &[1, 259, 259, 267], "<s>   hi"),
            ("é🙂ab", &[1, 259, 269, 243, 162, 156, 133, 268], "<s> é🙂ab"),
            ("</s>hi", &[1, 2, 267], "<s></s> hi"),
            ("", &[1], "<s>"),
            ("a</s> b", &[1, 265, 2, 259, 259, 261], "<s> a</s>  b"),
        ] {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids[1..], "{text:?}");
            assert_eq!(tokenizer.decode(ids, false).unwrap(), decoded);
            assert_eq!(chunks(&tokenizer, ids, false).concat(), decoded);
        }
        for (ids, decoded) in
            [(&[259, 259, 266][..], "  h"), (&[0x64, 0xe8], "��"), (&[1, 0xe8, 0x92, 260], "��a"), (&[], "")]
        {
            assert_eq!(tokenizer.decode(ids, true).unwrap(), decoded);
            assert_eq!(chunks(&tokenizer, ids, true).concat(), decoded);
        }
        assert!(tokenizer.is_special(2) && !tokenizer.is_special(267) && !tokenizer.is_special(270));
        assert_eq!((tokenizer.token_id("▁hi"), tokenizer.token_id("hi")), (Some(267), None));
    }

    /// Runs when `scripts/get-smollm2` has made the model.
    #[test]
    fn smollm2_is_as_in_transformers() {
        let folder = std::env::var_os("MINDSKIP_SMOLLM2")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct"), PathBuf::from);
        if !folder.join("tokenizer.json").exists() {
            eprintln!("skipped: {} is not there, scripts/get-smollm2 makes it", folder.display());
            return;
        }
        #[derive(serde::Deserialize)]
        struct Case {
            text: String,
            ids: Vec<u32>,
        }
        let cases = include_str!("../tests/goldens/smollm2/tokenizer-cases.json");
        let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
        assert!(cases.len() > 30);
        let tokenizer = Tokenizer::open(&folder).unwrap();
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_token()), (Some(1), Some("<|im_end|>")));
        assert!(tokenizer.is_special(2) && tokenizer.check(49152).is_ok() && tokenizer.check(49151).is_err());
        for Case { text, ids } in cases {
            assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "nothing is added");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            assert_eq!(chunks(&tokenizer, &ids, false).concat(), text);
        }
    }

    #[test]
    fn the_embedded_tokenizer_begins_a_story() {
        let tokenizer = stories();
        let ids = tokenizer.encode("Once upon a time<|endoftext|>", true).unwrap();
        assert_eq!((ids[0], *ids.last().unwrap()), (0, 0));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Once upon a time");
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.vocab_size()), (Some(0), Some(0), 1536));
        let error = tokenizer.check(1535).unwrap_err();
        assert_eq!(error.kind(), Kind::Mismatch);
        let text = "stories/tokenizer.json: has token ids up to 1535, but the model has 1535 tokens; use";
        assert!(error.to_string().starts_with(text), "{error}");
        assert!(tokenizer.check(1536).is_ok() && tokenizer.check(2000).is_ok() && tokenizer.check(0).is_err());
    }

    #[test]
    fn characters_are_held_back_until_they_are_whole() {
        let tokenizer = stories();
        let ids = tokenizer.encode("a🙂b", false).unwrap();
        assert_eq!(chunks(&tokenizer, &ids, false), ["a", "", "", "", "🙂", "b", ""]);
        assert_eq!(chunks(&tokenizer, &ids[..4], false), ["a", "", "", "", "�"], "only the end is lossy");
        assert_eq!(
            chunks(&tokenizer, &[ids[1], ids[0], ids[2]], false),
            ["", "�a", "�", ""],
            "or what cannot be mended"
        );

        let llama = parse(&llama()).unwrap();
        let ids = llama.encode("hi 🙂a a", true).unwrap();
        let expected = ["", "hi", " ", "", "", "", "", "🙂a", " a", ""];
        assert_eq!(chunks(&llama, &ids, true), expected, "a run of bytes is all or nothing");
        let mut stream = llama.stream(true);
        for _ in 0..2 {
            assert_eq!((stream.push(267).unwrap(), stream.push(267).unwrap()), ("hi".into(), " hi".into()));
            assert_eq!(stream.finish().unwrap(), "", "and as new");
        }
    }

    fn decoders() -> Vec<(Tokenizer, Growth)> {
        let pairs = |byte_runs, skip_empty| Growth::Pairs { byte_runs, skip_empty };
        let meta = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let (runs, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let two = json!({"type": "Strip", "content": " ", "start": 2, "stop": 0});
        let ctc = json!({"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "▁", "cleanup": true});
        let cases = [
            (llama()["decoder"].clone(), pairs(true, true)),
            (Value::Null, pairs(false, false)),
            (meta.clone(), pairs(false, false)),
            (json!({"type": "Sequence", "decoders": [runs, meta]}), pairs(true, false)),
            (json!({"type": "Sequence", "decoders": [runs, fuse]}), pairs(true, false)),
            (
                json!({"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [meta]}, fuse, two]}),
                Growth::Whole,
            ),
            (json!({"type": "BPEDecoder", "suffix": "a"}), Growth::Whole),
            (json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), Growth::Whole),
            (ctc, Growth::Whole),
            (json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true}), Growth::Bytes),
        ];
        let parse = |(decoder, growth)| (parse(&with(json!({"decoder": decoder}))).unwrap(), growth);
        cases.into_iter().map(parse).chain([(stories(), Growth::Bytes)]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_text_survives(text in any::<String>()) {
            let ids = stories().encode(&text, false).unwrap();
            prop_assert_eq!(stories().decode(&ids, false).unwrap(), text);
        }

        /// Also ids that stand for nothing, and bytes that are no text.
        #[test]
        fn streams_join_to_what_decode_says(ids in prop::collection::vec(prop_oneof![0..275u32, 0..1600u32, Just(0xc6u32), Just(0x85u32)], 0..24)) {
            for (tokenizer, growth) in decoders() {
                prop_assert_eq!(tokenizer.0.growth, growth);
                for skip_special in [false, true] {
                    let text = tokenizer.decode(&ids, skip_special).unwrap();
                    prop_assert_eq!(chunks(&tokenizer, &ids, skip_special).concat(), text, "{:?}", tokenizer);
                }
            }
        }
    }
}
