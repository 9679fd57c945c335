//! What the statuses of the driver mean to a user.

use std::ffi::CStr;
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Kind};

/// A handle that is given back when dropped. The status of that is not looked at: after a fault every call reports the
/// fault once more, and a drop has nobody to tell.
pub(super) struct Owned<T: Copy, S = CUresult>(pub T, pub unsafe fn(T) -> S);

impl<T: Copy, S> Drop for Owned<T, S> {
    fn drop(&mut self) {
        // SAFETY: the handle was made by the call that this one undoes, and `Owned` is neither `Copy` nor `Clone`, so it
        // is given back once. `Driver` makes its context current before its handles drop.
        unsafe { (self.1)(self.0) };
    }
}

/// Turns a status into an error that says what was being done.
pub(super) fn check(status: CUresult, doing: &str) -> Result<(), Error> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        _ => Err(error(status).during(doing)),
    }
}

pub(super) fn error(status: CUresult) -> Error {
    let error = Error::new(Kind::Device, name(status));
    match action(status) {
        Some(action) => error.action(action),
        None => error,
    }
}

/// "CUDA_ERROR_ILLEGAL_ADDRESS, an illegal memory access was encountered".
pub(super) fn name(status: CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: `text` is written with a pointer to a string that the driver keeps for ever, or with null.
    let told = unsafe { sys::cuGetErrorString(status, &mut text) };
    if told != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("{status:?}");
    }
    // SAFETY: not null, so a string with a NUL at its end, see above.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{status:?}, {}", text.to_string_lossy())
}

/// Whether the status tells of something that ran earlier and has broken the context: nothing runs on it any more.
pub(super) fn is_fault(status: CUresult) -> bool {
    use CUresult::*;
    matches!(
        status,
        CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_EXTERNAL_DEVICE
    )
}

/// What a user can do about a status; None where nothing better is known than to report it.
fn action(status: CUresult) -> Option<&'static str> {
    use CUresult::*;
    Some(match status {
        CUDA_ERROR_NO_DEVICE => {
            "check that nvidia-smi lists a GPU, that CUDA_VISIBLE_DEVICES does not hide it, and that a container was \
             started with it (--gpus all)"
        }
        CUDA_ERROR_STUB_LIBRARY => {
            "the libcuda that was found is the toolkit's stub: take its folder out of LD_LIBRARY_PATH and install \
             NVIDIA's driver"
        }
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => "restart the machine: the driver's library and its kernel module differ",
        CUDA_ERROR_SYSTEM_NOT_READY => "start the service nvidia-fabricmanager",
        CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "take the folder of CUDA's forward compatibility package out of LD_LIBRARY_PATH"
        }
        CUDA_ERROR_DEVICE_UNAVAILABLE => "see with nvidia-smi who holds the GPU, or choose another",
        CUDA_ERROR_OPERATING_SYSTEM | CUDA_ERROR_UNKNOWN | CUDA_ERROR_NOT_INITIALIZED => {
            "run nvidia-smi: when it fails too, load or install NVIDIA's kernel module again"
        }
        CUDA_ERROR_OUT_OF_MEMORY => "see with nvidia-smi what else uses the GPU's memory, or choose a smaller model",
        CUDA_ERROR_NO_BINARY_FOR_GPU => {
            "build again with this GPU's architecture in MINDSKIP_CUDA_ARCH (9.0 is 90a, 8.0 is 80)"
        }
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUDA_ERROR_INVALID_IMAGE | CUDA_ERROR_INVALID_PTX => {
            "the kernels were built by a newer CUDA than the driver knows: update NVIDIA's driver, or build again with \
             this GPU's architecture in MINDSKIP_CUDA_ARCH or with an older nvcc"
        }
        CUDA_ERROR_JIT_COMPILER_NOT_FOUND => {
            "build again with this GPU's architecture in MINDSKIP_CUDA_ARCH, or install the driver's \
             libnvidia-ptxjitcompiler"
        }
        _ => return None,
    })
}
