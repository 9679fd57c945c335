//! Prompts in, text out: the loop over prefill, sampling and decode for one or many sequences.

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
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    turns: &mut [Turn],
    on_text: &mut dyn FnMut(usize, &str) -> ControlFlow<()>,
) -> Result<(Vec<Answer>, Timing)> {
    let start = Instant::now();
    let before: Vec<_> = turns.iter().map(|t| engine.position(t.seq) + t.prompt.len()).collect();
    let mut timing = Timing { prompt_tokens: turns.iter().map(|t| t.prompt.len()).sum(), ..Timing::default() };
    turns.iter_mut().for_each(|turn| turn.history.extend(&turn.prompt));
    let mut running: Vec<_> = turns
        .iter()
        .map(|turn| Running {
            tokens: Vec::new(),
            stream: tokenizer.stream(true),
            text: String::new(),
            held: String::new(),
            finish: (turn.max_tokens == 0).then_some(Finish::Length),
        })
        .collect();
    // The turns that go on, and the token behind each.
    let mut active: Vec<usize> = (0..turns.len()).collect();
    let mut tokens = advance(engine, turns, &active, None)?;
    timing.prefill = start.elapsed();
    let mut interrupted = false;
    loop {
        let mut next = Vec::with_capacity(active.len());
        for (&i, &token) in active.iter().zip(&tokens) {
            let (turn, run) = (&mut turns[i], &mut running[i]);
            if run.finish.is_none() {
                let text = run.take(turn, token)?;
                interrupted |= on_text(i, &text).is_break();
                run.text.push_str(&text);
                let full = engine.position(turn.seq) + 1 > engine.plan().limits.context;
                if run.finish.is_none() && full {
                    run.finish = Some(Finish::Context);
                }
            }
            if timing.first_token.is_zero() {
                timing.first_token = start.elapsed();
            }
            if run.finish.is_none() {
                next.push((i, (turn.seq, token)));
            }
        }
        active.clear();
        active.extend(next.iter().map(|(i, _)| *i));
        if active.is_empty() || interrupted {
            break;
        }
        let step = Instant::now();
        let read: Vec<_> = next.into_iter().map(|(_, token)| token).collect();
        tokens = advance(engine, turns, &active, Some(&read))?;
        timing.decode += step.elapsed();
        timing.decoded_tokens += tokens.len();
    }

    let mut answers = Vec::with_capacity(turns.len());
    for (i, (turn, mut run)) in turns.iter_mut().zip(running).enumerate() {
        let finish = run.finish.unwrap_or(Finish::Interrupted);
        if finish != Finish::Stop {
            let rest = std::mem::take(&mut run.held) + &run.stream.finish()?;
            if !rest.is_empty() {
                let _ = on_text(i, &rest);
                run.text.push_str(&rest);
            }
        }
        let read = engine.position(turn.seq) - before[i];
        answers.push(Answer { text: run.text, tokens: run.tokens, read, finish });
    }
    Ok((answers, timing))
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
