//! A context and what may follow it.

use super::python::is_space;
use super::task::{Ask, Record};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Tokenizer;

/// What stands between a context and a choice.
const DELIMITER: &str = " ";

/// How likely is this text behind that one?
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::eval::{Encoded, Request};
///
/// let tokenizer = Bundle::embedded()?.tokenizer()?;
/// let request = Request { context: "Tom had a red".into(), continuation: " ball".into() };
/// let encoded: Encoded = request.encode(&tokenizer, 512)?;
/// assert_eq!(encoded.ids, tokenizer.encode("Tom had a red ball", true)?);
/// let last = encoded.ids.len() - 1;
/// assert_eq!(encoded.inputs(), &encoded.ids[..last]);
/// assert_eq!(encoded.targets().collect::<Vec<_>>(), [(last - 1, encoded.ids[last])], "behind which row, and what");
/// assert!(request.encode(&tokenizer, 3)?.cut);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// May be empty.
    pub context: String,
    /// With the space in front of it.
    pub continuation: String,
}

/// A request in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The context's, then the continuation's.
    pub ids: Vec<u32>,
    /// Tokens of the context; at least one, and fewer than `ids`.
    pub context: usize,
    /// Whether the context was cut on the left to fit.
    pub cut: bool,
}

impl Record {
    /// One for each choice, behind what stands in front of the question.
    pub fn requests(&self, before: &str) -> Vec<Request> {
        let request = |context: &String, continuation: &String| Request {
            context: format!("{before}{context}"),
            continuation: format!("{DELIMITER}{continuation}"),
        };
        match &self.ask {
            Ask::Choices { context, choices } => choices.iter().map(|choice| request(context, choice)).collect(),
            Ask::Contexts { contexts, continuation } => {
                contexts.iter().map(|context| request(context, continuation)).collect()
            }
        }
    }
}

impl Request {
    /// The continuation's tokens are those by which the tokens of both texts together are more than the context's. Spaces at
    /// the end of the context belong to the continuation. An empty context is the beginning-of-sequence token, or the one
    /// that ends a text. What is longer than `room` tokens, of which the last is not read, loses its beginning.
    ///
    /// Errors: Argument when there is nothing to score, when the continuation alone is too long, and when an empty context
    /// has no token; those of the tokenizer.
    pub fn encode(&self, tokenizer: &Tokenizer, room: usize) -> Result<Encoded> {
        let start = tokenizer.bos_id().or_else(|| tokenizer.eos_id());
        let begun = tokenizer.bos_token().or_else(|| tokenizer.eos_token());
        // A text that begins with that token gets no second one.
        let encode = |text: &str| tokenizer.encode(text, !begun.is_some_and(|begun| text.starts_with(begun)));
        let context = self.context.trim_end_matches(is_space);
        let (mut ids, mut context) = if self.context.is_empty() {
            let start = start.ok_or_else(|| {
                Error::new(Kind::Argument, "the context is empty, and the tokenizer has no token to begin with")
                    .action("write a context, or name a bos_token in tokenizer_config.json")
            })?;
            let ids = tokenizer.encode(&self.continuation, false)?;
            (if ids.first() == Some(&start) { ids } else { [&[start], &ids[..]].concat() }, 1)
        } else {
            let whole = format!("{}{}", self.context, self.continuation);
            (encode(&whole)?, encode(context)?.len())
        };
        if context == 0 || ids.len() <= context {
            let cause = format!("{:?} behind {:?} has no token to score", self.continuation, tail(&self.context));
            return Err(Error::new(Kind::Argument, cause).action("give both a context and choices with a visible text"));
        }
        let cut = ids.len().saturating_sub(room + 1);
        if cut >= context {
            let cause = format!("a choice of {} tokens does not fit into {room}", ids.len() - context);
            return Err(Error::new(Kind::Argument, cause).action("raise --context where the model allows it"));
        }
        ids.drain(..cut);
        context -= cut;
        Ok(Encoded { ids, context, cut: cut > 0 })
    }
}

impl Encoded {
    /// What the model reads: all but the last token.
    pub fn inputs(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }

    /// The continuation's tokens, and the row behind which each stands.
    pub fn targets(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        (self.context..self.ids.len()).map(|i| (i - 1, self.ids[i]))
    }
}

/// The end of a text, for messages.
fn tail(text: &str) -> &str {
    text.char_indices().rev().nth(39).map_or(text, |(at, _)| &text[at..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;

    fn request(context: &str, continuation: &str) -> Request {
        Request { context: context.into(), continuation: continuation.into() }
    }

    /// The embedded model's tokenizer begins every text with a token.
    #[test]
    fn tokens_are_parted_as_the_harness_parts_them() {
        let tokenizer = Bundle::embedded().unwrap().tokenizer().unwrap();
        let ids = |text: &str| tokenizer.encode(text, true).unwrap();
        let start = tokenizer.bos_id().unwrap();
        let encode =
            |context: &str, continuation: &str| request(context, continuation).encode(&tokenizer, 100).unwrap();

        let plain = encode("Tom had", " a red ball");
        assert_eq!((&plain.ids, plain.context, plain.cut), (&ids("Tom had a red ball"), ids("Tom had").len(), false));
        assert_eq!(plain.inputs(), &plain.ids[..plain.ids.len() - 1]);
        let targets: Vec<(usize, u32)> = plain.targets().collect();
        assert_eq!(targets[0], (plain.context - 1, plain.ids[plain.context]));
        assert_eq!(targets.len(), plain.ids.len() - plain.context);

        // Spaces belong to what follows, and a word that goes on is parted by how many tokens the context has alone.
        let spaces = encode("Tom had \n", " a");
        assert_eq!((&spaces.ids, spaces.context), (&ids("Tom had \n a"), ids("Tom had").len()));
        let within = encode("Tom had a re", "d ball");
        assert_eq!((&within.ids, within.context), (&ids("Tom had a red ball"), ids("Tom had a re").len()));

        let empty = encode("", " a ball");
        assert_eq!((&empty.ids, empty.context), (&ids(" a ball"), 1));
        let begun = encode("<|endoftext|>", "<|endoftext|> a");
        assert_eq!((begun.ids[..2].to_vec(), begun.context), (vec![start; 2], 1));
        let begun = encode("", "<|endoftext|> a");
        assert_eq!((&begun.ids, begun.context), (&ids(" a"), 1));
    }

    #[test]
    fn what_is_too_long_loses_its_beginning() {
        let tokenizer = Bundle::embedded().unwrap().tokenizer().unwrap();
        let whole = request("Tom had a red", " ball").encode(&tokenizer, 100).unwrap();
        // The last token is not read.
        assert!(!request("Tom had a red", " ball").encode(&tokenizer, whole.ids.len() - 1).unwrap().cut);
        let cut = request("Tom had a red", " ball").encode(&tokenizer, whole.ids.len() - 3).unwrap();
        assert_eq!((&cut.ids[..], cut.context, cut.cut), (&whole.ids[2..], whole.context - 2, true));
        for (context, continuation, room, message) in [
            ("Tom", " had a red ball and a green ball", 5, "does not fit into 5; raise --context"),
            ("Tom", "", 100, "has no token to score; give"),
        ] {
            let error = request(context, continuation).encode(&tokenizer, room).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
