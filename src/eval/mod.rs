//! Quality: multiple choice by log-likelihood and perplexity, in the conventions of lm-evaluation-harness 0.4.
//!
//! | | |
//! | --- | --- |
//! | [`task`] | files to [`Record`]s: the prompts of the known tasks, and a schema for any other |
//! | [`shots`] | solved records in front of the question |
//! | [`request`] | a context and what may follow it, as text and as tokens |
//! | [`score()`] | log-likelihoods of requests, with shared K/V |
//! | [`answers`] | what was found before, in a file |
//! | [`result`](mod@result) | accuracies, and what they may be off by |
//! | [`perplexity`] | windows over a long text |
//! | [`table`] | the paper's table: quality and speed of routers beside the dense model |

pub mod answers;
pub mod perplexity;
mod python;
pub mod request;
pub mod result;
pub mod score;
pub mod shots;
pub mod table;
pub mod task;

pub use answers::{AnswerFile, Answers, Basis};
pub use request::{Encoded, Request};
pub use result::{Mean, TaskScore};
pub use score::{Room, Work, score};
pub use shots::Shots;
pub use task::{Ask, Record, Task};
