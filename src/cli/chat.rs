//! `mindskip chat`.

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;

use clap::Args;
use mindskip::chat::{ChatTemplate, Message};
use mindskip::engine::{Engine, Seq};
use mindskip::generate::{Finish, Turn, generate};
use mindskip::sample::Sampler;
use mindskip::tokenizer::Tokenizer;
use mindskip::{Result, memory::Size};

use super::args::{ModelArgs, RoutingArgs, RunArgs, SampleArgs};
use super::generate::{template, too_long};
use super::progress::{catch_interrupts, interrupted};
use super::show::{Usage, printable, routing_line, timing_line};
use super::{Failure, Outcome, Ran};

/// A conversation with a model that has a chat template
///
/// One line is one message; /clear begins anew, /stats shows what was skipped, /quit or the end of input leaves. ^C ends an
/// answer, or the conversation while nothing is being answered.
#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    /// What the system message says.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// A text that ends an answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Shows speed and depth after every answer.
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    sampling: SampleArgs,
    #[command(flatten)]
    run: RunArgs,
}

impl Chat {
    pub fn run(self) -> Ran {
        let bundle = self.model.load()?;
        let routing = self.routing.routing(&bundle)?;
        let (tokenizer, template) = (bundle.tokenizer()?, template(&bundle)?);
        let sampler = Sampler::new(self.sampling.settings(&bundle)?)?;
        let (name, eos) = (bundle.name.clone(), bundle.eos().to_vec());
        let context = self.run.context.unwrap_or(bundle.config.context.min(4096));
        let mut engine = self.run.engine(bundle, routing, 1, context, context)?;
        eprintln!("{name}: {}; {}. /clear, /stats, /quit.", routing_line(engine.routing()), engine.device().name);

        let messages = self.system.iter().map(|text| Message::new("system", text.as_str())).collect();
        let mut talk = Talk {
            seq: engine.open()?,
            messages,
            read: String::new(),
            history: Vec::new(),
            unread: Vec::new(),
            sampler,
        };
        while let Some(line) = ask()? {
            match line.trim() {
                "" => continue,
                "/quit" | "/exit" => break,
                "/stats" => {
                    show(&mut engine)?;
                    continue;
                }
                "/clear" => {
                    talk.messages.retain(|m| m.role == "system");
                    talk.restart(&mut engine)?;
                    engine.clear_counts()?;
                    continue;
                }
                text if text.starts_with('/') && !text.contains(' ') => {
                    eprintln!("no such command: {text}; there are /clear, /stats and /quit");
                    continue;
                }
                text => talk.messages.push(Message::new("user", text)),
            }
            let answering = catch_interrupts();
            match self.answer(&mut engine, &tokenizer, &template, &eos, &mut talk) {
                Ok(()) => {}
                Err(Failure::Error(e)) => {
                    eprintln!("mindskip: error: {e}");
                    talk.messages.pop();
                    talk.restart(&mut engine)?;
                }
                Err(e) => return Err(e),
            }
            drop(answering);
        }
        Ok(Outcome::Done)
    }

    fn answer(
        &self,
        engine: &mut Engine,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        eos: &[u32],
        talk: &mut Talk,
    ) -> std::result::Result<(), Failure> {
        let text = template.render(&talk.messages, true, &Default::default())?;
        // Only what is new is read, unless the template rewrites what was said.
        if !text.starts_with(&talk.read) {
            talk.restart(engine)?;
        }
        let mut prompt = std::mem::take(&mut talk.unread);
        prompt.extend(tokenizer.encode(&text[talk.read.len()..], false)?);
        let room = engine.plan().limits.context;
        if talk.history.len() + prompt.len() > room {
            return Err(too_long(talk.history.len() + prompt.len(), room).into());
        }
        let mut turn = [Turn {
            seq: talk.seq,
            prompt,
            history: std::mem::take(&mut talk.history),
            sampler: talk.sampler.clone(),
            max_tokens: self.max_tokens,
            eos: eos.to_vec(),
            stop: self.stop.clone(),
        }];
        let mut failed = None;
        let (answers, timing) = generate(engine, tokenizer, &mut turn, &mut |_, text| {
            let mut out = io::stdout().lock();
            failed = out.write_all(printable(text).as_bytes()).and_then(|()| out.flush()).err();
            if failed.is_some() || interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(e) = failed {
            return Err(e.into());
        }
        writeln!(io::stdout())?;
        let ([turn], answer) = (turn, answers.into_iter().next().expect("one turn"));
        talk.sampler = turn.sampler;
        talk.history = turn.history;
        talk.unread = talk.history.split_off(talk.history.len() - (answer.tokens.len() - answer.read));
        talk.read = text + &answer.text;
        if answer.finish == Finish::Stop {
            // The sequence has read more than the text shows.
            talk.restart(engine)?;
        }
        talk.messages.push(Message::new("assistant", answer.text));
        match answer.finish {
            Finish::Length => eprintln!("(cut off after {} tokens; raise --max-tokens)", answer.tokens.len()),
            Finish::Context => {
                eprintln!("(the context of {} tokens is full; /clear begins anew)", engine.plan().limits.context)
            }
            Finish::Interrupted => eprintln!("(interrupted)"),
            Finish::Eos | Finish::Stop => {}
        }
        if self.stats {
            eprintln!("{}", timing_line(&timing));
            show(engine)?;
        }
        Ok(())
    }
}

/// A conversation and what of it the engine has read.
struct Talk {
    seq: Seq,
    messages: Vec<Message>,
    /// The text that `history` and `unread` come from.
    read: String,
    /// Tokens in the sequence.
    history: Vec<u32>,
    /// A token that was made, but not read yet.
    unread: Vec<u32>,
    sampler: Sampler,
}

impl Talk {
    /// Forgets what was read; the messages stay.
    fn restart(&mut self, engine: &mut Engine) -> Result<()> {
        engine.close(self.seq)?;
        self.seq = engine.open()?;
        self.read.clear();
        self.history.clear();
        self.unread.clear();
        Ok(())
    }
}

/// The next line; None at the end.
fn ask() -> std::result::Result<Option<String>, Failure> {
    if io::stdin().is_terminal() {
        let mut err = io::stderr().lock();
        write!(err, "> ")?;
        err.flush()?;
    }
    let mut line = String::new();
    let read = io::stdin().read_line(&mut line).map_err(|e| mindskip::Error::io("standard input", e))?;
    Ok((read > 0).then_some(line))
}

fn show(engine: &mut Engine) -> Result<()> {
    let usage = Usage::of(engine)?;
    let mut err = io::stderr().lock();
    if !usage.layers.is_empty() {
        let _ = writeln!(err, "capacity {:.1}% of the routed layers", usage.capacity() * 100.0);
        let _ = usage.print_layers(&mut err);
    }
    let _ = writeln!(err, "K/V {} (pool {})", usage.kv_line(), Size(engine.plan().kv_bytes()));
    Ok(())
}
