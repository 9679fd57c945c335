//! A transformer runtime whose depth is dynamic: a router in front of a layer decides which tokens, or which whole
//! sequences, skip its attention, its MLP or both, and what is skipped is not computed (He et al., arXiv 2410.13184).
//!
//! From the bottom up:
//!
//! | layer | modules |
//! | --- | --- |
//! | what everything rests on | [`Error`], [`tensor`], [`machine`] |
//! | the machine | [`backend`]: a dozen fused ops as one trait, and the CPU's implementation |
//! | bytes in, checked tables out | [`config`], [`weights`], [`tokenizer`], [`chat`], [`generation`], [`memory`], [`hub`], [`bundle`] |
//! | the method | [`router`], [`model`], [`sample`] |
//! | sequences and batches | [`engine`], [`generate`](mod@generate), [`batch`] |
//! | Router-Tuning | [`tune`] |
//! | measuring | [`bench`](mod@bench), [`eval`], [`plot`] |
//!
//! A program of ten lines that generates stands in the README. [`model`] reads like the paper; start there.
#![deny(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod bench;
pub mod bundle;
pub mod chat;
pub mod config;
pub mod engine;
mod error;
pub mod eval;
mod files;
pub mod generate;
pub mod generation;
#[cfg(feature = "hub")]
pub mod hub;
mod kv;
pub mod machine;
pub mod memory;
pub mod model;
pub mod plot;
pub mod router;
pub mod sample;
mod step;
pub mod tensor;
pub mod tokenizer;
pub mod tune;
pub mod weights;

pub use error::{Error, Kind, Result};

/// What may move to other threads, and what several may use at once.
const _: () = {
    const fn send<T: Send>() {}
    const fn sync<T: Send + Sync>() {}
    send::<engine::Engine>();
    send::<generate::Turn>();
    send::<batch::Batch>();
    send::<tune::Tuner>();
    sync::<bundle::Bundle>();
    sync::<tokenizer::Tokenizer>();
    sync::<chat::ChatTemplate>();
    sync::<router::RouterSet>();
    sync::<Error>();
};

/// The code in the README runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
