//! What C hands over, checked and as Rust types.
//!
//! The functions are unsafe by one rule, that of the header: an address is NULL, or that of as many values as it says, of
//! the type it says, which nobody writes (reads, for results) during the call. NULL, misalignment, sizes and what is not
//! UTF-8 are found here.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::slice;

use crate::failure::{Done, Failure};
use crate::types::{Growing, MINDSKIP_ERROR_SPACE, MINDSKIP_ERROR_UNSUPPORTED};

/// Larger than any struct will be: a size beyond it was not set.
const MOST: usize = 4096;

fn check_address<T>(name: &str, at: *const T) -> Done {
    if at.is_null() {
        return Err(Failure::argument(format!("{name} is NULL")));
    }
    if !at.is_aligned() {
        return Err(Failure::argument(format!("{name} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// A text; None for NULL. Errors: ARGUMENT.
///
/// # Safety
///
/// The rule above: NULL, or the address of bytes up to a NUL.
pub unsafe fn text<'a>(name: &str, at: *const c_char) -> Done<Option<&'a str>> {
    if at.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, so by the rule there is a NUL behind it.
    let text = unsafe { CStr::from_ptr(at) }.to_str();
    text.map(Some).map_err(|e| Failure::argument(format!("{name} is not UTF-8: {e}")))
}

/// A text that must be there.
///
/// # Safety
///
/// That of [`text`].
pub unsafe fn some_text<'a>(name: &str, at: *const c_char) -> Done<&'a str> {
    // SAFETY: the caller's.
    unsafe { text(name, at) }?.ok_or_else(|| Failure::argument(format!("{name} is NULL")))
}

/// What a word stands for; None for NULL. Errors: ARGUMENT.
///
/// # Safety
///
/// That of [`text`].
pub unsafe fn word<T: std::str::FromStr<Err = mindskip::Error>>(name: &str, at: *const c_char) -> Done<Option<T>> {
    // SAFETY: the caller's.
    Ok(unsafe { text(name, at) }?.map(str::parse).transpose()?)
}

/// `count` values; the address may be NULL when there are none.
///
/// # Safety
///
/// The rule above.
pub unsafe fn list<'a, T>(name: &str, at: *const T, count: usize) -> Done<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check_count::<T>(name, count)?;
    check_address(name, at)?;
    // SAFETY: aligned, not NULL, no longer than an object can be; by the rule there are as many.
    Ok(unsafe { slice::from_raw_parts(at, count) })
}

/// Room for `count` values; the address may be NULL when there are none.
///
/// # Safety
///
/// The rule above.
pub unsafe fn list_mut<'a, T: Copy>(name: &str, at: *mut T, count: usize) -> Done<&'a mut [MaybeUninit<T>]> {
    if count == 0 {
        return Ok(&mut []);
    }
    check_count::<T>(name, count)?;
    check_address(name, at)?;
    // SAFETY: as in `list`; what was not written yet may lie there.
    Ok(unsafe { slice::from_raw_parts_mut(at.cast(), count) })
}

fn check_count<T>(name: &str, count: usize) -> Done {
    let fits = count.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok());
    if fits { Ok(()) } else { Err(Failure::argument(format!("{count} values of {name}"))) }
}

/// A struct that goes in; what the caller's header does not have is zero.
///
/// Errors: ARGUMENT for a size that no header has; UNSUPPORTED for fields that this library does not know.
///
/// # Safety
///
/// The rule above, for as many bytes as the first field says.
pub unsafe fn grown<T: Growing>(name: &str, at: *const T) -> Done<T> {
    // SAFETY: the caller's.
    let size = unsafe { size_of_grown(name, at) }?;
    let (bytes, known) = (at.cast::<u8>(), size.min(size_of::<T>()));
    // SAFETY: by the rule there are `size` bytes, all of which the header has the caller write.
    let news = unsafe { slice::from_raw_parts(bytes.add(known), size - known) };
    if news.iter().any(|&byte| byte != 0) {
        let text =
            format!("{name} has fields that this library, mindskip {}, does not know", env!("CARGO_PKG_VERSION"));
        return Err(Failure::new(MINDSKIP_ERROR_UNSUPPORTED, text));
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `known` bytes are there on either side, which do not overlap; `Growing` says that what results is a value.
    unsafe {
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(bytes, known);
        Ok(value.assume_init())
    }
}

/// `count` structs that go in, each as large as the first.
///
/// # Safety
///
/// That of [`grown`], for each.
pub unsafe fn list_grown<T: Growing>(name: &str, at: *const T, count: usize) -> Done<Vec<T>> {
    // SAFETY: the caller's, for the first and then each.
    unsafe {
        let at_each = addresses(name, at.cast_mut(), count)?;
        at_each.into_iter().map(|at| grown(name, at)).collect()
    }
}

/// Where each of `count` structs is, as large as the first.
///
/// # Safety
///
/// That of [`grown`], for each.
pub unsafe fn addresses<T: Growing>(name: &str, at: *mut T, count: usize) -> Done<Vec<*mut T>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the caller's.
    let size = unsafe { size_of_grown(name, at) }?;
    if count > isize::MAX as usize / MOST {
        return Err(Failure::argument(format!("{count} values of {name}")));
    }
    let mut all = Vec::with_capacity(count);
    for i in 0..count {
        // SAFETY: the caller has `count` structs of this size.
        let (this, its) = unsafe {
            let this = at.byte_add(i * size);
            (this, size_of_grown(name, this)?)
        };
        if its != size {
            return Err(Failure::argument(format!("{name}[{i}].size is {its}, that of the first {size}")));
        }
        all.push(this);
    }
    Ok(all)
}

/// Writes a struct that goes out, as much of it as the caller's header has. Its size stays.
///
/// # Safety
///
/// The rule above, for as many bytes as the first field says.
pub unsafe fn put<T: Growing>(name: &str, at: *mut T, value: T) -> Done {
    // SAFETY: the caller's.
    let known = unsafe { size_of_grown(name, at) }?.min(size_of::<T>());
    let (from, to, head) = ((&raw const value).cast::<u8>(), at.cast::<u8>(), size_of::<usize>());
    // SAFETY: `known` bytes are there on either side, which do not overlap.
    unsafe { to.add(head).copy_from_nonoverlapping(from.add(head), known - head) };
    Ok(())
}

/// # Safety
///
/// The rule above, for the first field.
unsafe fn size_of_grown<T: Growing>(name: &str, at: *const T) -> Done<usize> {
    check_address(name, at)?;
    // SAFETY: not NULL, aligned, and `Growing` begins with its size.
    let size = unsafe { at.cast::<usize>().read() };
    if !(T::LEAST..=MOST).contains(&size) || size % align_of::<T>() != 0 {
        let text = format!("{name}.size is {size}; set it to the size of the struct, {} here", size_of::<T>());
        return Err(Failure::argument(text));
    }
    Ok(size)
}

/// Where a result goes.
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Errors: ARGUMENT.
    ///
    /// # Safety
    ///
    /// The rule above, while the result lives.
    pub unsafe fn new(name: &str, at: *mut T) -> Done<Self> {
        check_address(name, at).map(|()| Out(at))
    }

    pub fn set(self, value: T) {
        // SAFETY: checked by `new`, whose caller keeps to the rule.
        unsafe { self.0.write(value) }
    }
}

/// Where a text or a list goes, and its length.
pub struct Buffer<T> {
    at: *mut T,
    capacity: usize,
    length: Out<usize>,
}

impl<T: Copy> Buffer<T> {
    /// Errors: ARGUMENT.
    ///
    /// # Safety
    ///
    /// The rule above, while the result lives.
    pub unsafe fn new(name: &str, at: *mut T, capacity: usize, length: *mut usize) -> Done<Self> {
        if capacity > 0 {
            check_count::<T>(name, capacity)?;
            check_address(name, at)?;
        }
        // SAFETY: the caller's.
        Ok(Buffer { at, capacity, length: unsafe { Out::new("length", length) }? })
    }

    /// Errors: SPACE, with nothing written but the length.
    pub fn fill(self, values: &[T]) -> Done {
        self.write(values, values.len())
    }

    fn write(self, values: &[T], length: usize) -> Done {
        self.length.set(length);
        if values.len() > self.capacity {
            let text = format!("{} values do not fit into a buffer of {}", values.len(), self.capacity);
            return Err(Failure::new(MINDSKIP_ERROR_SPACE, text));
        }
        if !values.is_empty() {
            // SAFETY: checked by `new`, whose caller keeps to the rule: `capacity` values, which are not ours.
            unsafe { self.at.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
        Ok(())
    }
}

impl Buffer<c_char> {
    /// The text and a NUL. Errors: SPACE, with nothing written but the length.
    pub fn fill_text(self, text: &str) -> Done {
        let with_nul: Vec<c_char> = text.bytes().chain([0]).map(|byte| byte as c_char).collect();
        self.write(&with_nul, text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{MINDSKIP_ERROR_ARGUMENT, mindskip_stats};
    use std::ptr;

    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Old {
        size: usize,
        a: u64,
    }
    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(C)]
    struct New {
        size: usize,
        a: u64,
        b: f64,
        c: u64,
    }
    // SAFETY: numbers, the first of which is the size.
    unsafe impl Growing for New {
        const LEAST: usize = size_of::<Old>();
    }

    #[test]
    fn structs_of_older_and_newer_headers_are_read_and_written() {
        let mut old = [Old { size: 16, a: 7 }, Old { size: 16, a: 8 }];
        // SAFETY: as many bytes as `size` says, here and below.
        let read = unsafe { list_grown::<New>("x", (&raw const old).cast(), 2) }.unwrap();
        assert_eq!(read, [7, 8].map(|a| New { size: 16, a, b: 0.0, c: 0 }));
        let [_, second] = &mut old;
        // SAFETY: see above.
        unsafe { put("x", (&raw mut *second).cast(), New { size: 0, a: 9, b: 1.0, c: 2 }) }.unwrap();
        assert_eq!((second.size, second.a), (16, 9));

        let mut newer = [40usize, 7, 0, 5, 0];
        let at = (&raw mut newer).cast::<New>();
        // SAFETY: see above.
        assert_eq!(unsafe { grown("x", at) }.unwrap(), New { size: 40, a: 7, b: 0.0, c: 5 });
        newer[4] = 1;
        // SAFETY: see above.
        let failure = unsafe { grown("x", at) }.unwrap_err();
        assert_eq!(failure.status, MINDSKIP_ERROR_UNSUPPORTED);
        assert!(failure.text.starts_with("x has fields that this library"), "{}", failure.text);
        // SAFETY: see above.
        unsafe { put("x", at, New { size: 0, a: 1, b: 0.0, c: 3 }) }.unwrap();
        assert_eq!(newer, [40, 1, 0, 3, 1]);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let refused = |result: Done, says: &str| {
            let failure = result.unwrap_err();
            assert_eq!(failure.status, MINDSKIP_ERROR_ARGUMENT);
            assert!(failure.text.contains(says), "{}", failure.text);
        };
        let (numbers, bytes) = ([3u64, 0, 0], *b"\xff\0");
        // SAFETY: nothing is read where the address is wrong, and of the sizes only the first number.
        unsafe {
            refused(text("name", bytes.as_ptr().cast()).map(drop), "name is not UTF-8");
            refused(some_text("name", ptr::null()).map(drop), "name is NULL");
            refused(word::<mindskip::engine::Device>("device", c"tpu".as_ptr()).map(drop), "no such device: tpu");
            refused(list::<u32>("ids", ptr::null(), 1).map(drop), "ids is NULL");
            refused(list("ids", numbers.as_ptr().byte_add(1).cast::<u32>(), 1).map(drop), "ids is not aligned to 4");
            refused(list("ids", numbers.as_ptr(), usize::MAX / 8).map(drop), "values of ids");
            refused(list_mut::<f64>("out", ptr::null_mut(), 1).map(drop), "out is NULL");
            for size in [0, 3, size_of::<mindskip_stats>() - 8, size_of::<mindskip_stats>() + 1, usize::MAX] {
                let at = [size];
                refused(grown::<mindskip_stats>("stats", at.as_ptr().cast()).map(drop), "stats.size is");
            }
            refused(Out::<u32>::new("token", ptr::null_mut()).map(drop), "token is NULL");
            refused(Buffer::<u32>::new("ids", ptr::null_mut(), 0, ptr::null_mut()).map(drop), "length is NULL");
            assert!(list::<u32>("ids", ptr::null(), 0).unwrap().is_empty());
        }
    }

    #[test]
    fn buffers_say_what_they_need() {
        let (mut room, mut length) = ([1; 6], 0);
        let (at, length) = (room.as_mut_ptr(), &raw mut length);
        let fill = |capacity, text| {
            // SAFETY: there is room for six.
            unsafe { Buffer::<c_char>::new("text", at, capacity, length).unwrap().fill_text(text) }
        };
        assert_eq!(fill(5, "seven").unwrap_err().status, MINDSKIP_ERROR_SPACE);
        // SAFETY: the room and the length from above.
        let (is, filled) = unsafe { (*length, *at) };
        assert_eq!((is, filled), (5, 1), "nothing but the length");
        fill(6, "seven").unwrap();
        assert_eq!(room.map(|c| c as u8), *b"seven\0");
    }
}
