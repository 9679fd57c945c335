//! How a call ends: its status, and the text of its error by thread.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mindskip::{Error, Kind};

use crate::types::*;

/// Why a call failed.
#[derive(Debug)]
pub struct Failure {
    pub status: mindskip_status,
    pub text: String,
}

pub type Done<T = ()> = Result<T, Failure>;

impl Failure {
    pub fn new(status: mindskip_status, text: impl Into<String>) -> Self {
        Failure { status, text: text.into() }
    }

    pub fn argument(text: impl Into<String>) -> Self {
        Self::new(MINDSKIP_ERROR_ARGUMENT, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            Kind::Io => MINDSKIP_ERROR_IO,
            Kind::Format => MINDSKIP_ERROR_FORMAT,
            Kind::Unsupported => MINDSKIP_ERROR_UNSUPPORTED,
            Kind::Argument => MINDSKIP_ERROR_ARGUMENT,
            Kind::Shape => MINDSKIP_ERROR_SHAPE,
            Kind::Memory => MINDSKIP_ERROR_MEMORY,
            Kind::Numeric => MINDSKIP_ERROR_NUMERIC,
            Kind::Mismatch => MINDSKIP_ERROR_MISMATCH,
            Kind::Device => MINDSKIP_ERROR_DEVICE,
            Kind::Interrupted => MINDSKIP_ERROR_INTERRUPTED,
            _ => MINDSKIP_ERROR_OTHER,
        };
        Failure::new(status, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// The text of the last failure on this thread; empty when there was none, and when the thread is ending.
pub fn last() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of a function of the header. A panic ends here.
pub fn entry(body: impl FnOnce() -> Done) -> mindskip_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return MINDSKIP_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(MINDSKIP_ERROR_PANIC, format!("a bug of mindskip: {}", said(panic.as_ref()))),
    };
    let text = CString::new(failure.text.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending keeps no text.
    let _ = LAST.try_with(|last| last.replace(text));
    failure.status
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn text() -> String {
        // SAFETY: a text of this thread, which has not failed meanwhile.
        unsafe { CStr::from_ptr(last()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_and_errors_become_a_status_and_a_text_of_their_thread() {
        assert_eq!((entry(|| Ok(())), text().as_str()), (MINDSKIP_OK, ""));
        assert_eq!(entry(|| panic!("no {}", 7)), MINDSKIP_ERROR_PANIC);
        assert_eq!(text(), "a bug of mindskip: no 7");
        assert_eq!(entry(|| std::panic::panic_any(7)), MINDSKIP_ERROR_PANIC);
        assert_eq!(text(), "a bug of mindskip: a panic without words");
        let error = Error::new(Kind::Memory, "a\0b").action("buy more");
        assert_eq!(entry(|| Err(error.into())), MINDSKIP_ERROR_MEMORY);
        assert_eq!(text(), "a b; buy more");
        assert_eq!((entry(|| Ok(())), text().as_str()), (MINDSKIP_OK, "a b; buy more"), "the last failure");
        assert_eq!(std::thread::spawn(text).join().unwrap(), "");
    }
}
