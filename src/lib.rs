//! mindskip: a transformer runtime whose depth is dynamic.
#![deny(unsafe_code)]

pub mod backend;
mod error;
pub mod tensor;

pub use error::{Error, Kind, Result};
