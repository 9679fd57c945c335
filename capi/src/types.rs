//! The types and numbers of the header, field by field.

use std::ffi::{c_char, c_void};
use std::mem::offset_of;

pub const MINDSKIP_ABI_VERSION: u32 = 1;

pub type mindskip_status = i32;
pub type mindskip_seq = u64;
pub type mindskip_request = u64;
pub type mindskip_on_text =
    Option<unsafe extern "C" fn(user: *mut c_void, turn: usize, text: *const c_char, length: usize) -> i32>;
pub type mindskip_on_event = Option<unsafe extern "C" fn(user: *mut c_void, event: *const mindskip_event) -> i32>;

pub const MINDSKIP_OK: mindskip_status = 0;
pub const MINDSKIP_ERROR_IO: mindskip_status = 1;
pub const MINDSKIP_ERROR_FORMAT: mindskip_status = 2;
pub const MINDSKIP_ERROR_UNSUPPORTED: mindskip_status = 3;
pub const MINDSKIP_ERROR_ARGUMENT: mindskip_status = 4;
pub const MINDSKIP_ERROR_SHAPE: mindskip_status = 5;
pub const MINDSKIP_ERROR_MEMORY: mindskip_status = 6;
pub const MINDSKIP_ERROR_NUMERIC: mindskip_status = 7;
pub const MINDSKIP_ERROR_MISMATCH: mindskip_status = 8;
pub const MINDSKIP_ERROR_DEVICE: mindskip_status = 9;
pub const MINDSKIP_ERROR_INTERRUPTED: mindskip_status = 10;
pub const MINDSKIP_ERROR_HANDLE: mindskip_status = 11;
pub const MINDSKIP_ERROR_BUSY: mindskip_status = 12;
pub const MINDSKIP_ERROR_SPACE: mindskip_status = 13;
pub const MINDSKIP_ERROR_PANIC: mindskip_status = 14;
pub const MINDSKIP_ERROR_OTHER: mindskip_status = 15;

pub const MINDSKIP_FINISH_EOS: i32 = 0;
pub const MINDSKIP_FINISH_STOP: i32 = 1;
pub const MINDSKIP_FINISH_LENGTH: i32 = 2;
pub const MINDSKIP_FINISH_CONTEXT: i32 = 3;
pub const MINDSKIP_FINISH_INTERRUPTED: i32 = 4;

pub const MINDSKIP_EVENT_TEXT: i32 = 0;
pub const MINDSKIP_EVENT_DONE: i32 = 1;
pub const MINDSKIP_EVENT_FAILED: i32 = 2;

/// What handles point to, as far as C sees.
macro_rules! opaque {
    ($($name:ident)+) => {$(
        #[repr(C)]
        pub struct $name {
            _nothing: [u8; 0],
        }
    )+};
}
opaque!(mindskip_model mindskip_routers mindskip_engine mindskip_sampler mindskip_batch);

/// A struct that begins with its size and may grow.
///
/// # Safety
///
/// It is `repr(C)`, its first field is `size: usize`, and all zeros are a value of it.
pub unsafe trait Growing: Copy {
    /// Bytes that it had when it was first published.
    const LEAST: usize;
}

/// Structs, each with the last field that it was first published with.
macro_rules! growing {
    ($($name:ident $last:ident: $type:ty),+) => {$(
        // SAFETY: below; the other fields are numbers and pointers.
        unsafe impl Growing for $name {
            const LEAST: usize = (offset_of!($name, $last) + size_of::<$type>()).next_multiple_of(align_of::<$name>());
        }
    )+};
}
growing!(
    mindskip_model_info has_chat_template: i32,
    mindskip_routing capacity: f32,
    mindskip_options chunk: usize,
    mindskip_plan chunk: usize,
    mindskip_sampling sequence: u64,
    mindskip_turn stop_count: usize,
    mindskip_answer finish: i32,
    mindskip_batch_info capacity: f64,
    mindskip_stats kv_saved_bytes: u64
);

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_model_info {
    pub size: usize,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub context: usize,
    pub parameters: u64,
    pub weight_bytes: u64,
    pub eos: *const u32,
    pub eos_count: usize,
    pub has_routers: i32,
    pub has_chat_template: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_message {
    pub role: *const c_char,
    pub content: *const c_char,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_routing {
    pub size: usize,
    pub granularity: *const c_char,
    pub keys: *const c_char,
    pub select: *const c_char,
    pub layers: *const c_char,
    pub threshold: f32,
    pub capacity: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_options {
    pub size: usize,
    pub device: *const c_char,
    pub dtype: *const c_char,
    pub kv_dtype: *const c_char,
    pub kernels: *const c_char,
    pub precision: *const c_char,
    pub memory: *const c_char,
    pub threads: usize,
    pub context: usize,
    pub batch: usize,
    pub rows: usize,
    pub chunk: usize,
    pub kv_tokens: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_plan {
    pub size: usize,
    pub total: u64,
    pub weights: u64,
    pub activations: u64,
    pub kv: u64,
    pub kv_pages: u64,
    pub kv_page_bytes: u64,
    pub available: u64,
    pub context: usize,
    pub batch: usize,
    pub rows: usize,
    pub chunk: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_prompt {
    pub seq: mindskip_seq,
    pub tokens: *const u32,
    pub count: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_sampling {
    pub size: usize,
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub top_k: usize,
    pub seed: u64,
    pub sequence: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_turn {
    pub size: usize,
    pub seq: mindskip_seq,
    pub prompt: *const u32,
    pub prompt_count: usize,
    pub history: *const u32,
    pub history_count: usize,
    pub sampler: *mut mindskip_sampler,
    pub max_tokens: usize,
    pub eos: *const u32,
    pub eos_count: usize,
    pub stop: *const *const c_char,
    pub stop_count: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_answer {
    pub size: usize,
    pub text: *const c_char,
    pub text_length: usize,
    pub tokens: *const u32,
    pub token_count: usize,
    pub read: usize,
    pub finish: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_stats {
    pub size: usize,
    pub tokens: u64,
    pub routed_layers: usize,
    pub capacity: f64,
    pub kv_rows: u64,
    pub kv_dense_rows: u64,
    pub kv_bytes: u64,
    pub kv_dense_bytes: u64,
    pub kv_saved_bytes: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_event {
    pub size: usize,
    pub request: mindskip_request,
    pub kind: i32,
    pub status: mindskip_status,
    pub text: *const c_char,
    pub text_length: usize,
    pub answer: *const mindskip_answer,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct mindskip_batch_info {
    pub size: usize,
    pub running: usize,
    pub waiting: usize,
    pub kv_pages: u64,
    pub kv_pages_used: u64,
    pub kv_rows: u64,
    pub kv_dense_rows: u64,
    pub prompt_tokens: u64,
    pub decoded_tokens: u64,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    pub capacity: f64,
}
