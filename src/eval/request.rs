//! A context and what may follow it.

use super::python::is_space;
use super::task::{Ask, Record};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Tokenizer;

/// What stands between a context and a choice.
const DELIMITER: &str = " ";

/// How likely is this text behind that one?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub context: String,
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
