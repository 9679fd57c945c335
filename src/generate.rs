//! Prompts in, text out: the loop over prefill, sampling and decode for one or many sequences.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::engine::{Engine, Seq};
use crate::error::Result;
use crate::sample::{Sampler, SamplerSettings};
use crate::tokenizer::{TextStream, Tokenizer};

/// What one sequence is asked for. The sequence stays open afterwards: a further turn with the same [`Seq`] goes on from
/// there.
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
    /// A prompt for a new sequence: greedy, 256 tokens, until the context is full.
    pub fn new(seq: Seq, prompt: Vec<u32>) -> Result<Turn> {
        let sampler = Sampler::new(SamplerSettings::default())?;
        Ok(Turn { seq, prompt, history: Vec::new(), sampler, max_tokens: 256, eos: Vec::new(), stop: Vec::new() })
    }
}

/// What became of a [`Turn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
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

/// A turn at work.
struct Running {
    /// Tokens of the sequence when the prompt is read.
    before: usize,
    tokens: Vec<u32>,
    stream: TextStream,
    /// Text that is out, and text that may turn out to begin a stop text.
    text: String,
    held: String,
    finish: Option<Finish>,
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
/// use mindskip::generate::{Turn, stream};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let mut turns = [Turn { max_tokens: 8, ..Turn::new(engine.open()?, tokenizer.encode("Tom had a", true)?)? }];
/// let mut pieces = stream(&mut engine, &tokenizer, &mut turns);
/// let first = pieces.by_ref().take(3).map(|piece| Ok(piece?.1)).collect::<mindskip::Result<String>>()?;
/// let (answers, _) = pieces.finish()?;
/// assert_eq!(answers[0].tokens.len(), 3);
/// assert!(answers[0].text.starts_with(&first));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn stream<'a>(engine: &'a mut Engine, tokenizer: &Tokenizer, turns: &'a mut [Turn]) -> Stream<'a> {
    let running = turns
        .iter()
        .map(|turn| Running {
            before: engine.position(turn.seq) + turn.prompt.len(),
            tokens: Vec::new(),
            stream: tokenizer.stream(true),
            text: String::new(),
            held: String::new(),
            finish: (turn.max_tokens == 0).then_some(Finish::Length),
        })
        .collect();
    let (active, next) = ((0..turns.len()).collect(), None);
    Stream { engine, turns, running, active, next, ready: VecDeque::new(), timing: Timing::default() }
}

/// Answers at work, from [`stream`].
pub struct Stream<'a> {
    engine: &'a mut Engine,
    turns: &'a mut [Turn],
    running: Vec<Running>,
    /// The turns that go on.
    active: Vec<usize>,
    /// The token that each of them reads next; None before the prompts are read.
    next: Option<Vec<(Seq, u32)>>,
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
                    self.active.clear();
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
        if self.active.is_empty() {
            return Ok(false);
        }
        let (start, read) = (Instant::now(), self.next.take());
        if read.is_none() {
            self.timing.prompt_tokens = self.turns.iter().map(|t| t.prompt.len()).sum();
            self.turns.iter_mut().for_each(|turn| turn.history.extend(&turn.prompt));
        }
        let tokens = advance(self.engine, self.turns, &self.active, read.as_deref())?;
        match read {
            None => self.timing.prefill = start.elapsed(),
            Some(read) => {
                self.timing.decode += start.elapsed();
                self.timing.decoded_tokens += read.len();
            }
        }
        let mut next = Vec::with_capacity(tokens.len());
        for (i, token) in std::mem::take(&mut self.active).into_iter().zip(tokens) {
            let (turn, run) = (&mut self.turns[i], &mut self.running[i]);
            if run.finish.is_none() {
                let mut text = run.take(turn, token)?;
                if run.finish.is_none() && self.engine.position(turn.seq) + 1 > self.engine.plan().limits.context {
                    run.finish = Some(Finish::Context);
                }
                if run.finish.is_some() {
                    text += &run.rest()?;
                }
                run.text.push_str(&text);
                self.ready.push_back((i, text));
            }
            if run.finish.is_none() {
                self.active.push(i);
                next.push((turn.seq, token));
            }
        }
        if self.timing.first_token.is_zero() {
            self.timing.first_token = start.elapsed();
        }
        self.next = Some(next);
        Ok(true)
    }

    /// Ends the turns that go on, with the text that was held back.
    fn interrupt(&mut self) -> Result<()> {
        self.active.clear();
        for (i, run) in self.running.iter_mut().enumerate().filter(|(_, run)| run.finish.is_none()) {
            run.finish = Some(Finish::Interrupted);
            let rest = run.rest()?;
            if !rest.is_empty() {
                run.text.push_str(&rest);
                self.ready.push_back((i, rest));
            }
        }
        Ok(())
    }

    fn answers(self) -> (Vec<Answer>, Timing) {
        let answer = |(turn, run): (&Turn, Running)| Answer {
            text: run.text,
            tokens: run.tokens,
            read: self.engine.position(turn.seq).saturating_sub(run.before),
            finish: run.finish.unwrap_or(Finish::Interrupted),
        };
        (self.turns.iter().zip(self.running).map(answer).collect(), self.timing)
    }
}

/// Reads the prompts, or a token each, and chooses the token behind each of the turns `active`: on the device, unless a
/// penalty needs the logits here.
fn advance(engine: &mut Engine, turns: &mut [Turn], active: &[usize], read: Option<&[(Seq, u32)]>) -> Result<Vec<u32>> {
    let vocab = engine.config().vocab;
    if active.iter().any(|&i| turns[i].sampler.needs_logits()) {
        let logits = match read {
            None => engine.prefill(&prompts(turns))?,
            Some(tokens) => engine.decode(tokens)?,
        };
        let rows = active.iter().zip(logits.chunks_exact(vocab));
        return rows
            .map(|(&i, logits)| {
                let Turn { sampler, history, .. } = &mut turns[i];
                sampler.sample(logits, history)
            })
            .collect();
    }
    let draws: Vec<_> = active.iter().map(|&i| turns[i].sampler.draw()).collect();
    let tokens = match read {
        None => engine.prefill_and_sample(&prompts(turns), &draws)?,
        Some(tokens) => engine.decode_and_sample(tokens, &draws)?,
    };
    Ok(tokens.to_vec())
}

fn prompts(turns: &[Turn]) -> Vec<(Seq, &[u32])> {
    turns.iter().map(|turn| (turn.seq, &turn.prompt[..])).collect()
}

impl Running {
    /// Takes a new token; returns the text that is certain now.
    fn take(&mut self, turn: &mut Turn, token: u32) -> Result<String> {
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
