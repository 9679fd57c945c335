//! `mindskip generate`.

use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;

use clap::Args;
use mindskip::batch::{Batch, Event, Id, Request};
use mindskip::bundle::Bundle;
use mindskip::chat::{ChatTemplate, Message};
use mindskip::generate::{Answer, Finish};
use mindskip::sample::Sampler;
use mindskip::tokenizer::Tokenizer;
use mindskip::{Error, Kind, Result};
use serde_json::{Value, json};

use super::args::{ModelArgs, RoutingArgs, RunArgs, SampleArgs};
use super::progress::{catch_interrupts, interrupted};
use super::show::{Usage, printable, routing_line, timing_line, visible};
use super::{Failure, Outcome, Ran, bad, print_json};

/// Continues prompts, or answers them with --chat
///
/// The text goes to standard output as it is made, that of several prompts in their order; everything else to standard error.
#[derive(Args)]
pub struct Generate {
    /// Several run together. Without any, the prompt is what standard input gives.
    prompts: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// A file that holds a prompt; may be given several times.
    #[arg(short, long = "file", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A file with a prompt in every line that is not empty; - is standard input.
    #[arg(long, value_name = "FILE")]
    lines: Option<PathBuf>,
    /// A prompt of token ids: 1,2,3.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompts", "files", "lines", "chat"])]
    ids: Vec<u32>,
    /// A file of token ids, separated by commas or white space.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompts", "files", "lines", "chat", "ids"])]
    ids_file: Option<PathBuf>,
    /// The prompt is a message to the model, put into its chat template.
    #[arg(long)]
    chat: bool,
    /// With --chat: what the system message says.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Prompts that run at a time; the next one begins when one has ended.
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// Tokens to make at most, for each prompt.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// A text that ends the answer, and is left out; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Goes on when the model wants to end.
    #[arg(long)]
    ignore_eos: bool,
    /// Shows speed, the capacity of every routed layer and the K/V saved.
    #[arg(long)]
    stats: bool,
    /// One JSON object with texts, ids and figures, at the end.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    sampling: SampleArgs,
    #[command(flatten)]
    run: RunArgs,
}

impl Generate {
    pub fn run(self) -> Ran {
        let bundle = self.model.load()?;
        let routing = self.routing.routing(&bundle)?;
        let tokenizer = bundle.tokenizer()?;
        let sampling = self.sampling.settings(&bundle)?;
        let prompts = self.prompts(&bundle, &tokenizer)?;
        // From here on; until now ^C ends the program, also while it waits for standard input.
        let _noted = catch_interrupts();
        let (model, eos) = (bundle.name.clone(), if self.ignore_eos { Vec::new() } else { bundle.eos().to_vec() });

        let mut lengths: Vec<_> = prompts.iter().map(Vec::len).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let room = bundle.config.context;
        if longest > self.run.context.unwrap_or(room) {
            return Err(too_long(longest, self.run.context.unwrap_or(room)).into());
        }
        let context = longest.saturating_add(self.max_tokens).min(room);
        let slots = self.batch.min(prompts.len());
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let rows = lengths[..slots].iter().sum();
        let engine = self.run.engine(bundle, routing, slots, context, rows)?;
        if self.stats && !self.json {
            eprintln!("{model}: {}; {}", routing_line(engine.routing()), engine.device().name);
        }

        let mut batch = Batch::new(engine, &tokenizer).queue(prompts.len());
        let mut asked = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.into_iter().enumerate() {
            let (sampler, tokens) = (Sampler::for_sequence(sampling, i as u64)?, prompt.len());
            let (max_tokens, eos, stop) = (self.max_tokens, eos.clone(), self.stop.clone());
            let id = batch.submit(Request { prompt, sampler, max_tokens, eos, stop })?;
            asked.push(Asked { id, tokens, answer: None });
        }
        self.answer(&mut batch, &mut asked)?;
        self.show(&model, &mut batch, &asked)?;
        let broken_off = asked.iter().any(|asked| asked.finish() == Some(Finish::Interrupted));
        match asked.iter().any(|asked| asked.finish().is_none()) {
            true => Ok(Outcome::Failed),
            false if broken_off => Ok(Outcome::Interrupted),
            false => Ok(Outcome::Done),
        }
    }

    /// Runs until every prompt has its answer. The text of one is written as it is made, of several in order, as soon as those
    /// before have ended.
    fn answer(&self, batch: &mut Batch, asked: &mut [Asked]) -> std::result::Result<(), Failure> {
        let (alone, mut written) = (asked.len() == 1, 0);
        while !batch.is_idle() {
            if interrupted() {
                asked.iter().try_for_each(|asked| batch.cancel(asked.id).map(drop))?;
            }
            let events = batch.step()?;
            let mut out = io::stdout().lock();
            for event in events {
                let (id, answer) = match event {
                    Event::Done(id, answer) => (id, Ok(answer)),
                    Event::Failed(_, error) if alone => return Err(error.into()),
                    Event::Failed(id, error) => (id, Err(error)),
                    Event::Text(_, text) => {
                        if alone && !self.json {
                            out.write_all(printable(&text).as_bytes())?;
                            out.flush()?;
                        }
                        continue;
                    }
                };
                let at = asked.binary_search_by_key(&id, |asked| asked.id).expect("a prompt's");
                if let Err(error) = &answer {
                    eprintln!("mindskip: error: prompt {}: {}", at + 1, visible(&error.to_string()));
                }
                asked[at].answer = Some(answer);
            }
            while let Some(answer) = asked.get(written).and_then(|asked| asked.answer.as_ref()) {
                written += 1;
                let text = answer.as_ref().map_or("", |answer| &answer.text);
                match (self.json, alone) {
                    (true, _) => {}
                    (_, true) if text.ends_with('\n') => {}
                    (_, true) => writeln!(out)?,
                    _ => writeln!(out, "--- {written} ---\n{}", printable(text.trim_end_matches('\n')))?,
                }
            }
            out.flush()?;
        }
        Ok(())
    }

    /// The prompts as tokens.
    fn prompts(&self, bundle: &Bundle, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
        if !self.ids.is_empty() {
            return Ok(vec![self.ids.clone()]);
        }
        if let Some(path) = &self.ids_file {
            return Ok(vec![read_ids(path)?]);
        }
        let mut texts = self.prompts.clone();
        for path in &self.files {
            texts.push(without_last_newline(read_text(path)?));
        }
        if let Some(path) = &self.lines {
            let text = if path.as_os_str() == "-" { read_stdin()? } else { read_text(path)? };
            texts.extend(text.lines().filter(|line| !line.is_empty()).map(String::from));
            if texts.is_empty() {
                return bad("no prompt", "give a file with a prompt in every line");
            }
        }
        if texts.is_empty() {
            texts.push(without_last_newline(read_stdin()?));
        }
        let template = if self.chat { Some(template(bundle)?) } else { None };
        texts.iter().map(|text| self.encode(text, template.as_ref(), tokenizer)).collect()
    }

    fn encode(&self, text: &str, template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        if text.is_empty() {
            return bad("the prompt is empty", "give some text");
        }
        let Some(template) = template else { return tokenizer.encode(text, true) };
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<_> = system.chain([Message::new("user", text)]).collect();
        // The template writes the special tokens itself.
        tokenizer.encode(&template.render(&messages, true, &Default::default())?, false)
    }

    fn show(&self, model: &str, batch: &mut Batch, asked: &[Asked]) -> std::result::Result<(), Failure> {
        let timing = batch.timing();
        let mut usage = Usage::of(batch.engine())?;
        usage.kv = batch.kv_usage();
        let engine = batch.engine();
        if self.json {
            let mut value = json!({
                "model": model,
                "device": engine.device().name,
                "routing": routing_line(engine.routing()),
                "answers": asked.iter().map(Asked::json).collect::<Vec<_>>(),
                "prompt_tokens": timing.prompt_tokens,
                "prefill_tokens_per_s": timing.prefill_rate(),
                "decoded_tokens": timing.decoded_tokens,
                "decode_tokens_per_s": timing.decode_rate(),
                "time_to_first_token_s": timing.first_token.as_secs_f64(),
            });
            let (value_map, usage) = (value.as_object_mut().expect("an object"), usage.json());
            value_map.extend(usage.as_object().expect("an object").clone());
            print_json(&value)?;
        } else if self.stats {
            let mut err = io::stderr().lock();
            let _ = writeln!(err, "\n{}", timing_line(&timing));
            if !usage.layers.is_empty() {
                let _ = writeln!(err, "capacity {:.1}% of the routed layers", usage.capacity() * 100.0);
                let _ = usage.print_layers(&mut err);
            }
            let _ = writeln!(err, "K/V {}", usage.kv_line());
        }
        Ok(())
    }
}

/// A prompt and what came of it.
struct Asked {
    id: Id,
    /// Of the prompt.
    tokens: usize,
    answer: Option<Result<Answer>>,
}

impl Asked {
    fn finish(&self) -> Option<Finish> {
        Some(self.answer.as_ref()?.as_ref().ok()?.finish)
    }

    fn json(&self) -> Value {
        match &self.answer {
            Some(Ok(answer)) => json!({
                "prompt_tokens": self.tokens, "text": answer.text, "ids": answer.tokens, "finish": answer.finish.name(),
            }),
            Some(Err(error)) => json!({"prompt_tokens": self.tokens, "error": error.to_string()}),
            None => json!({"prompt_tokens": self.tokens}),
        }
    }
}

/// The model's chat template. Errors: Argument when it has none.
pub fn template(bundle: &Bundle) -> Result<ChatTemplate> {
    match bundle.chat_template()? {
        Some(template) => Ok(template),
        None => bad(format!("{} has no chat template", bundle.name), "use a model that was made for chat"),
    }
}

pub fn too_long(tokens: usize, context: usize) -> Error {
    Error::new(Kind::Argument, format!("the prompt has {tokens} tokens, longer than the context of {context}"))
        .action("shorten it, or raise --context where the model allows it")
}

/// Token ids from a file. Errors: Io; Argument.
pub fn read_ids(path: &PathBuf) -> Result<Vec<u32>> {
    let text = read_text(path)?;
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    words
        .map(|word| {
            word.parse().map_err(|_| {
                Error::new(Kind::Argument, format!("{word:?} is no token id"))
                    .at(path)
                    .action("give numbers, separated by commas or white space")
            })
        })
        .collect()
}

/// A prompt does not end in the newline that ends a file, or what `echo` writes.
pub fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        text.truncate(text.strip_suffix('\r').unwrap_or(&text).len());
    }
    text
}

/// A text file. Errors: Io; Argument when it is not UTF-8.
pub fn read_text(path: &PathBuf) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes)
        .map_err(|_| Error::new(Kind::Argument, "not UTF-8 text").at(path).action("convert it to UTF-8"))
}

pub fn read_stdin() -> Result<String> {
    if io::stdin().is_terminal() {
        return bad("no prompt", "give one as an argument, with --file, or on standard input");
    }
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(|e| Error::io("standard input", e))?;
    String::from_utf8(bytes)
        .map_err(|_| Error::new(Kind::Argument, "standard input is not UTF-8 text").action("convert it to UTF-8"))
}
