//! mindskip: a transformer runtime whose depth is dynamic.
#![deny(unsafe_code)]

pub mod backend;
pub mod bundle;
pub mod chat;
pub mod config;
pub mod engine;
mod error;
mod files;
pub mod generate;
pub mod generation;
#[cfg(feature = "hub")]
pub mod hub;
mod kv;
pub mod machine;
pub mod memory;
pub mod model;
pub mod router;
pub mod sample;
mod step;
pub mod tensor;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Kind, Result};
