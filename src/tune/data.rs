//! Text files to samples.
//!
//! A file has a record a line, or is one JSON array of records. A record is a conversation (`messages`), a `prompt`
//! with its `completion`, or an `instruction`, perhaps with `input`, and its `output`. It is written as the model's
//! chat template writes it; what the assistant says, up to the token that ends it, is what the loss counts. Without a
//! template a prompt and its answer stand behind each other, and an end-of-sequence token behind them. A `text` stands for
//! itself: all of it counts.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Map;

use super::Sample;
use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::tokenizer::Tokenizer;

/// The records of a file, tokenised.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::tune::data::{Dataset, Encoder};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("data.jsonl");
/// std::fs::write(&path, r#"{"prompt": "Tom had", "completion": " a red ball."}"#).unwrap();
/// let encoder = Encoder { tokenizer: &tokenizer, template: None, eos: bundle.eos(), max_length: 256 };
/// let data = Dataset::open(&path, &encoder)?;
/// let prompt = tokenizer.encode("Tom had", true)?.len();
/// assert_eq!(data.samples[0].counts.iter().position(|&counts| counts), Some(prompt), "the answer counts");
/// assert_eq!((data.samples[0].ids.last(), data.truncated, data.dropped), (Some(&0), 0, 0));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    pub samples: Vec<Sample>,
    /// Records that were cut to the greatest length.
    pub truncated: usize,
    /// Records without an answer token, or of which none was left.
    pub dropped: usize,
    /// 32 hex digits of the file's SHA-256.
    pub hash: String,
    pub path: PathBuf,
}

/// How text becomes tokens.
pub struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    /// Tokens that end an answer.
    pub eos: &'a [u32],
    /// Tokens of a sample at most.
    pub max_length: usize,
}

/// One record, in any of its forms.
#[derive(Deserialize)]
struct Record {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    completion: Option<String>,
    instruction: Option<String>,
    input: Option<String>,
    output: Option<String>,
    text: Option<String>,
}

/// Text, and whether the loss counts it.
type Part = (String, bool);

impl Dataset {
    /// Reads a file. Errors: Io; Format, with the line, for what is no record; Argument when no sample is left; those
    /// of the template.
    pub fn open(path: &Path, encoder: &Encoder) -> Result<Dataset> {
        let bytes = files::read(path)?;
        let mut data =
            Dataset { samples: Vec::new(), truncated: 0, dropped: 0, hash: files::digest(&bytes), path: path.into() };
        for (number, record) in (1..).zip(records(&bytes).map_err(|e| e.at(path))?) {
            let of = |e: Error| e.during(format!("reading record {number}")).at(path);
            let parts = encoder.parts(&record).map_err(of)?;
            data.add(number, encoder.encode(&parts).map_err(of)?, encoder.max_length);
        }
        if data.samples.is_empty() {
            let cause = match data.dropped {
                0 => "no records".to_string(),
                n => format!("none of the {n} records has an answer within {} tokens", encoder.max_length),
            };
            let action = "give JSON lines as docs/tuning.md describes them, or raise --max-length";
            return Err(Error::new(Kind::Argument, cause).at(path).action(action));
        }
        Ok(data)
    }

    fn add(&mut self, record: usize, (mut ids, mut counts): (Vec<u32>, Vec<bool>), max_length: usize) {
        if ids.len() > max_length {
            ids.truncate(max_length);
            counts.truncate(max_length);
            self.truncated += 1;
        }
        // The first token is nobody's next.
        if counts.iter().skip(1).any(|&counts| counts) {
            self.samples.push(Sample { ids, counts, record });
        } else {
            self.dropped += 1;
        }
    }
}

fn records(bytes: &[u8]) -> Result<Vec<Record>> {
    let fail = |line: usize, e: serde_json::Error| {
        Error::new(Kind::Format, format!("line {line}: {e}")).action("give one JSON object a line, or an array of them")
    };
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return serde_json::from_slice(bytes).map_err(|e| fail(e.line(), e));
    }
    let lines = (1..).zip(bytes.split(|&b| b == b'\n')).filter(|(_, line)| !line.trim_ascii().is_empty());
    lines.map(|(number, line)| serde_json::from_slice(line).map_err(|e| fail(number, e))).collect()
}

impl Encoder<'_> {
    /// The text of a record in its order.
    fn parts(&self, record: &Record) -> Result<Vec<Part>> {
        let messages = match record {
            Record { messages: Some(messages), .. } => messages.clone(),
            Record { prompt: Some(prompt), completion: Some(completion), .. } => {
                if self.template.is_none() {
                    return Ok(vec![(prompt.clone(), false), (completion.clone(), true)]);
                }
                vec![Message::new("user", prompt.as_str()), Message::new("assistant", completion.as_str())]
            }
            Record { instruction: Some(instruction), input, output: Some(output), .. } => {
                let input = input.as_deref().filter(|text| !text.is_empty());
                let prompt = input.map_or(instruction.clone(), |input| format!("{instruction}\n\n{input}"));
                if self.template.is_none() {
                    return Ok(vec![(format!("{prompt}\n\n"), false), (output.clone(), true)]);
                }
                vec![Message::new("user", prompt), Message::new("assistant", output.as_str())]
            }
            Record { text: Some(text), .. } => return Ok(vec![(text.clone(), true)]),
            _ => {
                let cause = "neither messages, nor prompt and completion, nor instruction and output, nor text";
                return Err(Error::new(Kind::Format, cause).action("see docs/tuning.md for the forms of a record"));
            }
        };
        let Some(template) = self.template else {
            return Err(Error::new(Kind::Argument, "messages, but the model has no chat template")
                .action("give prompt and completion"));
        };
        conversation(template, &messages)
    }

    /// Tokens, and which of them count. Parts are encoded apart: an answer begins where a prompt ends when it is
    /// generated, too.
    fn encode(&self, parts: &[Part]) -> Result<(Vec<u32>, Vec<bool>)> {
        let (mut ids, mut counts) = (Vec::new(), Vec::new());
        for (n, (text, answer)) in parts.iter().enumerate() {
            let special = n == 0 && self.template.is_none();
            let mut new =
                if text.is_empty() && !special { Vec::new() } else { self.tokenizer.encode(text, special)? };
            if *answer && n > 0 && self.template.is_none() {
                new.extend(self.eos.first());
            }
            // What a template writes behind the token that ends an answer, nobody has to say.
            let last = new.iter().rposition(|id| self.template.is_some() && self.eos.contains(id));
            let end = last.map_or(new.len(), |last| last + 1);
            counts.extend((0..new.len()).map(|i| *answer && i < end));
            ids.append(&mut new);
        }
        Ok((ids, counts))
    }
}

/// A conversation as its template writes it, cut around what the assistant says.
///
/// Errors: Format when the template does not write a beginning as it writes the whole.
fn conversation(template: &ChatTemplate, messages: &[Message]) -> Result<Vec<Part>> {
    let render = |n: usize, prompt: bool| template.render(&messages[..n], prompt, &Map::new());
    let mut parts = Vec::new();
    let mut done = 0;
    let turns = (0..messages.len()).filter(|&i| messages[i].role == "assistant");
    for turn in turns {
        let (before, after) = (render(turn, true)?, render(turn + 1, false)?);
        if before.len() < done || !after.starts_with(&before) {
            return Err(Error::new(Kind::Format, "the chat template writes an answer unlike the prompt for it")
                .action("give one answer a record, or another chat_template.jinja"));
        }
        parts.push((before[done..].to_string(), false));
        parts.push((after[before.len()..].to_string(), true));
        done = after.len();
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use std::fs;

    const CHATML: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}!\n{% endfor %}\
                          {% if add_generation_prompt %}<|assistant|>{% endif %}";

    fn read(text: &str, template: Option<&str>, max_length: usize) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.jsonl");
        fs::write(&path, text).unwrap();
        let tokenizer = Bundle::embedded().unwrap().tokenizer().unwrap();
        let template = template.map(|source| ChatTemplate::new("t.jinja", source).unwrap());
        let eos = tokenizer.encode("!", false).unwrap();
        Dataset::open(&path, &Encoder { tokenizer: &tokenizer, template: template.as_ref(), eos: &eos, max_length })
    }

    fn counted(sample: &Sample) -> String {
        let tokenizer = Bundle::embedded().unwrap().tokenizer().unwrap();
        let ids: Vec<u32> = sample.answers().map(|(_, id)| id).collect();
        tokenizer.decode(&ids, false).unwrap()
    }

    #[test]
    fn every_form_gives_its_answer() {
        let forms = [
            r#"{"messages": [{"role": "user", "content": "Tom had"}, {"role": "assistant", "content": "a red ball"}]}"#,
            r#"{"prompt": "Tom had", "completion": "a red ball"}"#,
            r#"{"instruction": "Tom had", "input": "", "output": "a red ball"}"#,
        ];
        let lines = read(&forms.join("\n"), Some(CHATML), 100).unwrap();
        let array = read(&format!("[{}]", forms.join(",\n")), Some(CHATML), 100).unwrap();
        assert_eq!(lines.samples, array.samples);
        assert_ne!(lines.hash, array.hash);
        for sample in &lines.samples {
            assert_eq!((counted(sample), &sample.ids), ("a red ball!".to_string(), &lines.samples[0].ids));
        }
        let bare = read(forms[1], None, 100).unwrap();
        assert_eq!(counted(&bare.samples[0]), "a red ball!");
        let error = read(forms[0], None, 100).unwrap_err().to_string();
        assert!(error.contains("no chat template (while reading record 1); give prompt"), "{error}");
    }

    #[test]
    fn every_answer_of_a_conversation_counts() {
        let text = r#"{"messages": [{"role": "user", "content": "One"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]}"#;
        let data = read(&text.replace('\n', " "), Some(CHATML), 100).unwrap();
        assert_eq!(counted(&data.samples[0]), "two!four!");
    }

    #[test]
    fn what_is_too_long_or_says_nothing_is_counted() {
        let long = "word ".repeat(40);
        let lines = [
            format!(r#"{{"prompt": "A", "completion": "{long}"}}"#),
            format!(r#"{{"prompt": "{long}", "completion": "B"}}"#),
            r#"{"messages": [{"role": "user", "content": "nothing follows"}]}"#.into(),
        ];
        let data = read(&lines.join("\n\n"), Some(CHATML), 30).unwrap();
        assert_eq!((data.samples.len(), data.truncated, data.dropped), (1, 2, 2));
        assert_eq!((data.samples[0].ids.len(), data.samples[0].record), (30, 1));
    }

    #[test]
    fn broken_files_are_refused() {
        for (text, message) in [
            ("", "no records; give JSON lines"),
            ("\n\n", "no records"),
            ("[]", "no records"),
            ("{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\":", "line 2: EOF"),
            ("{\"prompt\": 3, \"completion\": \"b\"}", "line 1: invalid type"),
            ("{\"story\": \"a\"}", "neither messages"),
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "none of the 1 records has an answer"),
        ] {
            let error = read(text, Some(CHATML), 50).unwrap_err().to_string();
            assert!(error.contains("data.jsonl: ") && error.contains(message), "{text}: {error}");
        }
    }
}
