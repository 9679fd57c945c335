//! Perplexity of a long text: windows that overlap, so that no token but the first ones has little before it.
//!
//! As in "Perplexity of fixed-length models" of transformers' documentation: a window begins every `stride` tokens, and
//! counts the tokens that no window before it has counted. Every token but the first counts once; the code there weighs
//! what a window counted by one token less.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::engine::Engine;
use crate::error::{Error, Kind, Result, check_range};

/// How a text is cut.
///
/// ```
/// use mindskip::eval::perplexity::Windows;
///
/// let windows = Windows { length: 4, stride: 3 };
/// assert_eq!(windows.of(8)?, [(0, 4, 3), (3, 7, 3), (6, 8, 1)]);
/// assert!(Windows { stride: 4, ..windows }.of(8).is_err());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window, at least 2.
    pub length: usize,
    /// Tokens from the beginning of one to the next; below `length`, or the last token of a window would have no successor.
    pub stride: usize,
}

/// A window of a text, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Tokens `[begin, end)` of the text.
    pub begin: usize,
    pub end: usize,
    /// How many of the last tokens count.
    pub counted: usize,
    /// Of these together, in nats.
    pub loglikelihood: f64,
}

/// A text's score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScore {
    /// Its name.
    pub text: String,
    /// All, and those that count: all but the first.
    pub tokens: usize,
    pub counted: usize,
    /// See [`Windows`].
    pub window: usize,
    pub stride: usize,
    /// Mean negative log-likelihood of a token, in nats.
    pub loss: f64,
    /// `exp(loss)`
    pub perplexity: f64,
    /// By the bytes of the text.
    pub bits_per_byte: f64,
}

impl Windows {
    /// Begin, end and how many tokens count, of each window. Errors: Argument for windows that make no sense, and for fewer than two
    /// tokens.
    pub fn of(self, tokens: usize) -> Result<Vec<(usize, usize, usize)>> {
        let Windows { length, stride } = self;
        check_range("--window", length, length >= 2, "2 or more")?;
        check_range(
            "--stride",
            stride,
            (1..length).contains(&stride),
            &format!("1 to {}, less than a window", length - 1),
        )?;
        if tokens < 2 {
            return Err(Error::new(Kind::Argument, format!("a text of {tokens} tokens")).action("give at least two"));
        }
        let mut windows: Vec<(usize, usize, usize)> = Vec::new();
        // The first token is nobody's next.
        let mut counted = 1;
        for begin in (0..).step_by(stride) {
            let end = (begin + length).min(tokens);
            windows.push((begin, end, end - counted));
            counted = end;
            if end == tokens {
                break;
            }
        }
        Ok(windows)
    }
}

/// Scores a text that was tokenised as a whole; `bytes` are the text's. The engine has room for a window. `progress` is told
/// how many windows are done and may break off.
///
/// Errors: Argument for windows that make no sense; Interrupted; those of [`Engine::prefill`].
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::eval::perplexity::{TextScore, Window, Windows, perplexity};
///
/// let text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine.";
/// let bundle = Bundle::embedded()?;
/// let ids = bundle.tokenizer()?.encode(text, true)?;
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let windows = Windows { length: 16, stride: 8 };
/// let (score, each): (TextScore, Vec<Window>) =
///     perplexity(&mut engine, "lily", &ids, text.len(), windows, &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!(each.iter().map(|window| window.counted).sum::<usize>(), ids.len() - 1);
/// assert!(score.perplexity < 5.0 && score.bits_per_byte < 1.0, "{score:?}");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn perplexity(
    engine: &mut Engine,
    name: &str,
    ids: &[u32],
    bytes: usize,
    windows: Windows,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<(TextScore, Vec<Window>)> {
    let mut found = Vec::new();
    for (begin, end, counted) in windows.of(ids.len())? {
        if progress(found.len()).is_break() {
            return Err(Error::new(Kind::Interrupted, "interrupted while scoring"));
        }
        // The last token is read by nobody.
        let inputs = &ids[begin..end - 1];
        let targets: Vec<(u32, u32)> = (end - counted..end).map(|i| ((i - 1 - begin) as u32, ids[i])).collect();
        let seq = engine.open()?;
        let read = engine.prefill(&[(seq, inputs)]).map(drop);
        let logprobs = read.and_then(|()| engine.logprobs_at(&targets).map(|found| found.to_vec()));
        engine.close(seq)?;
        let loglikelihood = logprobs?.into_iter().map(f64::from).sum();
        found.push(Window { begin, end, counted, loglikelihood });
    }
    // Whoever breaks off now has all of it.
    let _ = progress(found.len());
    let sum: f64 = found.iter().map(|window| window.loglikelihood).sum();
    let counted = ids.len() - 1;
    let loss = -sum / counted as f64;
    let score = TextScore {
        text: name.into(),
        tokens: ids.len(),
        counted,
        window: windows.length,
        stride: windows.stride,
        loss,
        perplexity: loss.exp(),
        bits_per_byte: -sum / bytes as f64 / std::f64::consts::LN_2,
    };
    Ok((score, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_counts_once() {
        let of = |length, stride, tokens| Windows { length, stride }.of(tokens).unwrap();
        assert_eq!(of(4, 2, 9), [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 9, 1)]);
        assert_eq!(of(4, 3, 7), [(0, 4, 3), (3, 7, 3)]);
        assert_eq!(of(10, 1, 5), [(0, 5, 4)]);
        for (length, stride, tokens) in [(2, 1, 2), (5, 4, 103), (64, 7, 64), (64, 63, 65), (7, 3, 50)] {
            let windows = of(length, stride, tokens);
            assert_eq!(windows.iter().map(|w| w.2).sum::<usize>(), tokens - 1);
            assert!(windows.iter().all(|&(begin, end, counted)| counted < end - begin && end - begin <= length));
        }
    }

    #[test]
    fn windows_that_make_no_sense_are_refused() {
        for (length, stride, tokens, message) in
            [(1, 1, 9, "--window is 1"), (4, 0, 9, "--stride is 0"), (4, 4, 9, "--stride is 4"), (4, 2, 1, "1 tokens")]
        {
            let error = Windows { length, stride }.of(tokens).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("; give"), "{error}");
        }
    }
}
