//! Handles: numbers that look like pointers to C, and what they stand for. A number is never used twice, so one that was
//! freed is known to be so, and so is one of another kind.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use crate::failure::{Done, Failure};
use crate::types::{MINDSKIP_ERROR_BUSY, MINDSKIP_ERROR_HANDLE, MINDSKIP_ERROR_PANIC};

static NEXT: AtomicUsize = AtomicUsize::new(1);

/// The objects of type `T` that C knows as `*mut H`.
pub struct Table<H, T> {
    kind: &'static str,
    gone: &'static str,
    all: Mutex<BTreeMap<usize, Arc<T>>>,
    handle: PhantomData<fn(H)>,
}

impl<H, T> Table<H, T> {
    /// For messages, a `kind`, "a model", and why one may be `gone`, "freed".
    pub const fn new(kind: &'static str, gone: &'static str) -> Self {
        Table { kind, gone, all: Mutex::new(BTreeMap::new()), handle: PhantomData }
    }

    pub fn add(&self, object: T) -> *mut H {
        // Multiples of 16, as addresses are; no one reads there.
        let number = NEXT.fetch_add(1, Ordering::Relaxed) * 16;
        self.all().insert(number, Arc::new(object));
        ptr::without_provenance_mut(number)
    }

    /// The object, which stays while the result does. Errors: HANDLE.
    pub fn get(&self, handle: *mut H) -> Done<Arc<T>> {
        self.all().get(&handle.addr()).cloned().ok_or_else(|| self.unknown(handle))
    }

    /// Gives an object up; it goes with the last call that uses it. Errors: HANDLE, but not for NULL.
    pub fn free(&self, handle: *mut H) -> Done {
        if handle.is_null() {
            return Ok(());
        }
        let object = self.all().remove(&handle.addr());
        object.map(drop).ok_or_else(|| self.unknown(handle))
    }

    /// Gives an object that `check` agrees to back to Rust; its handle is as one that was freed. Errors: HANDLE; BUSY when a call
    /// has it.
    pub fn take(&self, handle: *mut H, check: impl FnOnce(&mut T) -> Done) -> Done<T> {
        let mut all = self.all();
        let object = all.get_mut(&handle.addr()).ok_or_else(|| self.unknown(handle))?;
        check(Arc::get_mut(object).ok_or_else(|| busy(self.kind))?)?;
        let object = all.remove(&handle.addr()).and_then(Arc::into_inner);
        Ok(object.expect("the table is locked, and no one else had it"))
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<usize, Arc<T>>> {
        // Nothing in here panics halfway.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, handle: *mut H) -> Failure {
        let text = match handle.is_null() {
            true => format!("NULL, where {} is needed", self.kind),
            false => format!("not {}, or {}; pass what the function that made it returned", self.kind, self.gone),
        };
        Failure::new(MINDSKIP_ERROR_HANDLE, text)
    }
}

/// The object for this call alone. Errors: BUSY when another has it; PANIC when one has panicked with it.
pub fn alone<'a, T>(object: &'a Mutex<T>, kind: &str) -> Done<MutexGuard<'a, T>> {
    object.try_lock().map_err(|e| match e {
        TryLockError::WouldBlock => busy(kind),
        TryLockError::Poisoned(_) => {
            Failure::new(MINDSKIP_ERROR_PANIC, format!("{kind} has failed by a bug of mindskip before; free it"))
        }
    })
}

fn busy(kind: &str) -> Failure {
    Failure::new(MINDSKIP_ERROR_BUSY, format!("{kind} is in another call; wait until that returns"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_wrong_and_null_handles_are_refused() {
        static NUMBERS: Table<u8, i32> = Table::new("a number", "freed");
        static TEXTS: Table<u8, String> = Table::new("a text", "freed");
        let (number, text) = (NUMBERS.add(7), TEXTS.add("seven".into()));
        assert_eq!((*NUMBERS.get(number).unwrap(), TEXTS.get(text).unwrap().as_str()), (7, "seven"));
        let held = NUMBERS.get(number).unwrap();
        NUMBERS.free(number).unwrap();
        assert_eq!(*held, 7, "as long as someone has it");
        for (failure, says) in [
            (NUMBERS.get(number).unwrap_err(), "not a number, or freed"),
            (NUMBERS.free(number).unwrap_err(), "not a number, or freed"),
            (NUMBERS.get(text).unwrap_err(), "not a number, or freed"),
            (TEXTS.get(ptr::null_mut()).unwrap_err(), "NULL, where a text is needed"),
        ] {
            assert_eq!(failure.status, MINDSKIP_ERROR_HANDLE);
            assert!(failure.text.contains(says), "{}", failure.text);
        }
        NUMBERS.free(ptr::null_mut()).unwrap();
        assert_ne!(NUMBERS.add(8), number);
    }

    #[test]
    fn only_what_no_call_has_is_taken() {
        static NUMBERS: Table<u8, i32> = Table::new("a number", "taken");
        let number = NUMBERS.add(7);
        let held = NUMBERS.get(number).unwrap();
        let failure = NUMBERS.take(number, |_| Ok(())).unwrap_err();
        assert_eq!((failure.status, failure.text.contains("a number is in another call")), (MINDSKIP_ERROR_BUSY, true));
        drop(held);
        NUMBERS.take(number, |_| Err(Failure::argument("no"))).unwrap_err();
        assert_eq!(NUMBERS.take(number, |_| Ok(())).unwrap(), 7);
        let failure = NUMBERS.take(number, |_| Ok(())).unwrap_err();
        assert_eq!((failure.status, failure.text.contains("not a number, or taken")), (MINDSKIP_ERROR_HANDLE, true));
    }

    #[test]
    fn one_call_at_a_time_and_none_after_a_panic() {
        let object = Mutex::new(7);
        let first = alone(&object, "it").unwrap();
        assert_eq!(alone(&object, "it").unwrap_err().status, MINDSKIP_ERROR_BUSY);
        drop(first);
        std::thread::scope(|scope| scope.spawn(|| panic!("{}", alone(&object, "it").unwrap())).join().unwrap_err());
        assert_eq!(alone(&object, "it").unwrap_err().status, MINDSKIP_ERROR_PANIC);
    }
}
