//! Prompts in, text out: the loop over prefill, sampling and decode for one or many sequences.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::engine::{Draw, Engine, Seq};
use crate::error::Result;
use crate::sample::{Sampler, SamplerSettings};
use crate::step::Phase;
use crate::tokenizer::{TextStream, Tokenizer};

/// What one sequence is asked for. The sequence stays open afterwards: a further turn with the same [`Seq`] goes on from
/// there.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::generate::{Answer, Finish, Timing, Turn, generate};
/// use mindskip::sample::{Sampler, SamplerSettings};
///
/// let bundle = Bundle::embedded()?;
/// let (tokenizer, eos) = (bundle.tokenizer()?, bundle.eos().to_vec());
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let prompt = tokenizer.encode("Tom had a red ball.", true)?;
/// let sampler = Sampler::new(SamplerSettings { temperature: 0.5, seed: 1, ..SamplerSettings::default() })?;
/// let turn = Turn { sampler, eos, stop: vec![".".into()], ..Turn::new(engine.open()?, prompt)? };
/// let (answers, timing): (Vec<Answer>, Timing) =
///     generate(&mut engine, &tokenizer, &mut [turn], &mut |_, _| std::ops::ControlFlow::Continue(()))?;
/// assert_eq!((answers[0].finish, answers[0].finish.name()), (Finish::Stop, "stop"));
/// assert!(answers[0].text.len() > 5 && !answers[0].text.contains('.'));
/// assert_eq!(timing.decoded_tokens + 1, answers[0].tokens.len());
/// assert!(timing.prefill_rate() > 0.0 && timing.decode_rate() > 0.0);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Turn {
    pub seq: Seq,
    /// Tokens to read first; at least one.
    pub prompt: Vec<u32>,
    /// Tokens that the sequence had read before this turn, for the repetition penalty.
    pub history: Vec<u32>,
    pub sampler: Sampler,
    /// Tokens to make at most.
    pub max_tokens: usize,
    /// Tokens that end the answer; they are not part of its text.
    pub eos: Vec<u32>,
    /// Texts that end the answer; it is cut off before the first of them.
    pub stop: Vec<String>,
}

impl Turn {
    /// A prompt for a new sequence: greedy, 256 tokens, until the context is full. Errors: none, as the sampler's settings are in
    /// range.
    pub fn new(seq: Seq, prompt: Vec<u32>) -> Result<Turn> {
        let sampler = Sampler::new(SamplerSettings::default())?;
        Ok(Turn { seq, prompt, history: Vec::new(), sampler, max_tokens: 256, eos: Vec::new(), stop: Vec::new() })
    }
}

/// What became of a [`Turn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Without what ended it.
    pub text: String,
    /// The tokens that were made, without the one that ended it.
    pub tokens: Vec<u32>,
    /// How many of them the sequence has read: all but the last, unless it was ended.
    pub read: usize,
    pub finish: Finish,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Eos,
    /// A stop text.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller broke off.
    Interrupted,
}

impl Finish {
    /// In lower case: `eos`, `length`.
    pub const fn name(self) -> &'static str {
        match self {
            Finish::Eos => "eos",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Context => "context",
            Finish::Interrupted => "interrupted",
        }
    }
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// Tokens read in prefill, of all sequences.
    pub prompt_tokens: usize,
    pub prefill: Duration,
    /// From the start to the first token of text.
    pub first_token: Duration,
    /// Tokens that went through a decode step, of all sequences.
    pub decoded_tokens: usize,
    pub decode: Duration,
}

impl Timing {
    /// Prompt tokens by seconds of prefill.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Tokens by seconds of decode.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decoded_tokens, self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// Reads all prompts in one prefill, then decodes all sequences together until each has come to its end.
///
/// `on_text` gets the text of a turn as it becomes certain, with every token, so it may be empty: no broken characters,
/// nothing of a stop text. It may break off; what was made until then is the answer.
///
/// Errors: those of [`Engine::prefill`] and [`Engine::decode`]; Numeric when logits cannot be sampled.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::generate::{Finish, Turn, generate};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let turn = Turn { max_tokens: 40, ..Turn::new(engine.open()?, tokenizer.encode("Tom had a", true)?)? };
/// let mut text = String::new();
/// let (answers, timing) = generate(&mut engine, &tokenizer, &mut [turn], &mut |_, piece| {
///     text += piece;
///     if text.len() > 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
/// })?;
/// assert_eq!((&answers[0].text, answers[0].finish), (&text, Finish::Interrupted));
/// println!("{:.0} tokens/s", timing.decode_rate());
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    turns: &mut [Turn],
    on_text: &mut dyn FnMut(usize, &str) -> ControlFlow<()>,
) -> Result<(Vec<Answer>, Timing)> {
    let mut stream = stream(engine, tokenizer, turns);
    let mut interrupted = false;
    while !interrupted && stream.step()? {
        for (turn, text) in stream.ready.drain(..) {
            interrupted |= on_text(turn, &text).is_break();
        }
    }
    stream.interrupt()?;
    for (turn, text) in stream.ready.drain(..) {
        let _ = on_text(turn, &text);
    }
    Ok(stream.answers())
}

/// [`generate`] as an iterator over (turn, text): pieces as they become certain. Nothing runs before the first is asked for.
/// After an error it ends.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::generate::{Stream, Turn, stream};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let mut turns = [Turn { max_tokens: 8, ..Turn::new(engine.open()?, tokenizer.encode("Tom had a", true)?)? }];
/// let mut pieces: Stream = stream(&mut engine, &tokenizer, &mut turns);
/// let first = pieces.by_ref().take(3).map(|piece| Ok(piece?.1)).collect::<mindskip::Result<String>>()?;
/// let (answers, _) = pieces.finish()?;
/// assert_eq!(answers[0].tokens.len(), 3);
/// assert!(answers[0].text.starts_with(&first));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn stream<'a>(engine: &'a mut Engine, tokenizer: &Tokenizer, turns: &'a mut [Turn]) -> Stream<'a> {
    let running = turns.iter().map(|turn| Running::new(tokenizer, turn.max_tokens)).collect();
    let (phase, ready, timing) = (Phase::Prefill, VecDeque::new(), Timing::default());
    Stream { engine, turns, running, active: true, phase, ready, timing }
}

/// Answers at work, from [`stream`].
pub struct Stream<'a> {
    engine: &'a mut Engine,
    turns: &'a mut [Turn],
    running: Vec<Running>,
    /// Whether a turn goes on.
    active: bool,
    phase: Phase,
    ready: VecDeque<(usize, String)>,
    timing: Timing,
}

impl Iterator for Stream<'_> {
    type Item = Result<(usize, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(e) => {
                    self.active = false;
                    self.ready.clear();
                    return Some(Err(e));
                }
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

impl Stream<'_> {
    /// What was made until now. A turn that has not come to its end is interrupted. Errors: Format when a decoder of text fails.
    pub fn finish(mut self) -> Result<(Vec<Answer>, Timing)> {
        self.interrupt()?;
        Ok(self.answers())
    }

    /// Reads what is to be read and takes a token for each turn that goes on; false when none does.
    fn step(&mut self) -> Result<bool> {
        if !std::mem::take(&mut self.active) || self.turns.is_empty() {
            return Ok(false);
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Decode);
        let (mut numbers, mut works) = (Vec::new(), Vec::new());
        for (i, (turn, run)) in self.turns.iter_mut().zip(&mut self.running).enumerate() {
            if phase == Phase::Prefill || run.finish.is_none() {
                let count = run.unread(turn).len();
                numbers.push(i);
                works.push(Work { turn, run, count });
            }
        }
        for (i, text) in numbers.into_iter().zip(advance(self.engine, &mut self.timing, phase, &mut works)?) {
            self.ready.push_back((i, text?));
        }
        self.active = self.running.iter().any(|run| run.finish.is_none());
        Ok(true)
    }

    /// Ends the turns that go on, with the text that was held back.
    fn interrupt(&mut self) -> Result<()> {
        self.active = false;
        for (i, run) in self.running.iter_mut().enumerate().filter(|(_, run)| run.finish.is_none()) {
            let rest = run.interrupt()?;
            if !rest.is_empty() {
                self.ready.push_back((i, rest));
            }
        }
        Ok(())
    }

    fn answers(self) -> (Vec<Answer>, Timing) {
        let answers = self.turns.iter().zip(self.running).map(|(turn, run)| run.answer(turn.prompt.len()));
        (answers.collect(), self.timing)
    }
}

/// What a turn has come to.
pub(crate) struct Running {
    /// Tokens that the sequence has read: of the prompt, then of those that were made.
    pub read: usize,
    pub tokens: Vec<u32>,
    pub finish: Option<Finish>,
    stream: TextStream,
    /// Text that is out, and text that may turn out to begin a stop text.
    text: String,
    held: String,
}

/// A turn's part of a step.
pub(crate) struct Work<'a> {
    pub turn: &'a mut Turn,
    pub run: &'a mut Running,
    /// How many tokens it reads, of those that are unread.
    pub count: usize,
}

impl Work<'_> {
    /// Whether a token is chosen behind what it reads.
    fn chooses(&self) -> bool {
        let Running { read, tokens, finish, .. } = &*self.run;
        finish.is_none() && read + self.count == self.turn.prompt.len() + tokens.len()
    }
}

/// Reads, and chooses the token behind each turn that has then read all: on the device, unless a penalty needs the logits
/// here. Returns the text that is certain now.
///
/// Errors: those of [`Engine::prefill`] and [`Engine::decode`], with everything as before; within, those of a single turn.
pub(crate) fn advance(
    engine: &mut Engine,
    timing: &mut Timing,
    phase: Phase,
    works: &mut [Work],
) -> Result<Vec<Result<String>>> {
    let start = Instant::now();
    let here = works.iter().any(|work| work.chooses() && work.turn.sampler.needs_logits());
    let draw = |work: &mut Work| if work.chooses() { work.turn.sampler.draw() } else { Draw::GREEDY };
    let draws: Option<Vec<_>> = (!here).then(|| works.iter_mut().map(draw).collect());
    let reads: Vec<_> = works.iter().map(|work| (work.turn.seq, &work.run.unread(work.turn)[..work.count])).collect();
    if let Err(e) = engine.step(phase, &reads, draws.as_deref()) {
        if !here {
            works.iter_mut().filter(|work| work.chooses()).for_each(|work| work.turn.sampler.undraw());
        }
        return Err(e);
    }
    let (context, vocab) = (engine.plan().limits.context, engine.config().vocab);
    let take = |(i, work): (usize, &mut Work)| {
        let chooses = work.chooses();
        let Work { turn, run, count } = work;
        if run.read == 0 {
            turn.history.extend(turn.prompt.iter().chain(&run.tokens));
        }
        run.read += *count;
        if !chooses {
            return Ok(String::new());
        }
        let token = match here {
            true => turn.sampler.sample(&engine.logits[i * vocab..][..vocab], &turn.history)?,
            false => engine.tokens[i],
        };
        run.take(turn, token, engine.position(turn.seq) == context)
    };
    let texts = works.iter_mut().enumerate().map(take).collect();
    let (taken, rows) = (start.elapsed(), works.iter().map(|work| work.count).sum::<usize>());
    match phase {
        Phase::Prefill => {
            (timing.prefill, timing.prompt_tokens) = (timing.prefill + taken, timing.prompt_tokens + rows)
        }
        Phase::Decode => (timing.decode, timing.decoded_tokens) = (timing.decode + taken, timing.decoded_tokens + rows),
    }
    if timing.first_token.is_zero() {
        timing.first_token = taken;
    }
    Ok(texts)
}

impl Running {
    pub fn new(tokenizer: &Tokenizer, max_tokens: usize) -> Running {
        Running {
            read: 0,
            tokens: Vec::new(),
            finish: (max_tokens == 0).then_some(Finish::Length),
            stream: tokenizer.stream(true),
            text: String::new(),
            held: String::new(),
        }
    }

    /// What is to be read next: the prompt; when that is read, what was made.
    pub fn unread<'a>(&'a self, turn: &'a Turn) -> &'a [u32] {
        match self.read.checked_sub(turn.prompt.len()) {
            None => &turn.prompt[self.read..],
            Some(made) => &self.tokens[made..],
        }
    }

    /// Takes a new token, for which there is no room where the context is `full`; returns the text that is certain now.
    fn take(&mut self, turn: &mut Turn, token: u32, full: bool) -> Result<String> {
        let mut text = self.push(turn, token)?;
        if self.finish.is_none() && full {
            self.finish = Some(Finish::Context);
        }
        if self.finish.is_some() {
            text += &self.rest()?;
        }
        self.text.push_str(&text);
        Ok(text)
    }

    fn push(&mut self, turn: &mut Turn, token: u32) -> Result<String> {
        if turn.eos.contains(&token) {
            self.finish = Some(Finish::Eos);
            return Ok(String::new());
        }
        self.tokens.push(token);
        turn.history.push(token);
        if self.tokens.len() == turn.max_tokens {
            self.finish = Some(Finish::Length);
        }
        self.held.push_str(&self.stream.push(token)?);
        if let Some(at) = first_of(&self.held, &turn.stop) {
            self.finish = Some(Finish::Stop);
            self.held.truncate(at);
            return Ok(std::mem::take(&mut self.held));
        }
        let certain = self.held.len() - undecided(&self.held, &turn.stop);
        let rest = self.held.split_off(certain);
        Ok(std::mem::replace(&mut self.held, rest))
    }

    /// The text that was held back; none where a stop text has cut it off.
    fn rest(&mut self) -> Result<String> {
        if self.finish == Some(Finish::Stop) {
            return Ok(String::new());
        }
        Ok(std::mem::take(&mut self.held) + &self.stream.finish()?)
    }

    /// Ends it here; returns the text that was held back.
    pub fn interrupt(&mut self) -> Result<String> {
        self.finish = Some(Finish::Interrupted);
        let rest = self.rest()?;
        self.text.push_str(&rest);
        Ok(rest)
    }

    /// After a prompt of so many tokens.
    pub fn answer(self, prompt: usize) -> Answer {
        Answer {
            text: self.text,
            tokens: self.tokens,
            read: self.read.saturating_sub(prompt),
            finish: self.finish.unwrap_or(Finish::Interrupted),
        }
    }
}

/// Where the first stop text begins.
fn first_of(text: &str, stop: &[String]) -> Option<usize> {
    stop.iter().filter(|s| !s.is_empty()).filter_map(|s| text.find(s.as_str())).min()
}

/// Bytes at the end of the text that may be the beginning of a stop text.
fn undecided(text: &str, stop: &[String]) -> usize {
    let begins = |s: &String| {
        let ends = s.char_indices().map(|(i, _)| i).filter(|&i| i > 0 && i <= text.len());
        ends.filter(|&i| text.ends_with(&s[..i])).max().unwrap_or(0)
    };
    stop.iter().map(begins).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Piece by piece, exactly the text before the first stop text comes out, and nothing that has to be taken back.
        #[test]
        fn stop_texts_cut_however_the_text_arrives(
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
            stop in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let whole = pieces.concat();
            let (mut out, mut held, mut stopped) = (String::new(), String::new(), false);
            for piece in &pieces {
                held.push_str(piece);
                if let Some(at) = first_of(&held, &stop) {
                    out.push_str(&held[..at]);
                    stopped = true;
                    break;
                }
                let certain = held.len() - undecided(&held, &stop);
                out.push_str(&held[..certain]);
                held.drain(..certain);
                prop_assert!(whole.starts_with(&out));
            }
            if !stopped {
                out.push_str(&held);
            }
            // Of two stop texts that end in different pieces, the one that ends first counts, so look piece by piece.
            let expected = (0..=pieces.len()).find_map(|n| {
                let seen = pieces[..n].concat();
                first_of(&seen, &stop).map(|at| seen[..at].to_owned())
            });
            prop_assert_eq!(out, expected.unwrap_or(whole));
        }
    }
}
