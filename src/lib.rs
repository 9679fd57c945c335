//! mindskip: a transformer runtime whose depth is dynamic.
#![warn(missing_docs)]
#![deny(unsafe_code)]

mod error;
pub mod tensor;

pub use error::{Error, Kind, Result};
