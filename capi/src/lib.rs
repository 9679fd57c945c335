//! The C library: what `include/mindskip.h` declares, and documents. Names and types are those of the header; a test compares
//! them.
//!
//! Every function reads its arguments by [`args`], works in safe code, and returns through [`failure::entry`], which keeps the
//! text of an error and lets no panic out. Handles are numbers ([`handles`]), so a wrong one is an error and no more.
#![allow(non_camel_case_types)]
#![allow(clippy::missing_safety_doc)] // include/mindskip.h says what each function asks

mod args;
mod batch;
mod engine;
mod failure;
mod generate;
mod handles;
mod model;
mod types;

use std::ffi::{CStr, c_char};

// For capi/rlib.
pub use batch::*;
pub use engine::*;
pub use generate::*;
pub use model::*;
pub use types::*;

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_abi_version() -> u32 {
    types::MINDSKIP_ABI_VERSION
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version with a NUL"),
    };
    VERSION.as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_error() -> *const c_char {
    failure::last()
}
