//! mindskip: a transformer runtime whose depth is dynamic.
#![deny(unsafe_code)]

pub mod backend;
pub mod chat;
pub mod config;
pub mod engine;
mod error;
mod files;
mod kv;
pub mod memory;
pub mod model;
pub mod router;
mod step;
pub mod tensor;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Kind, Result};
