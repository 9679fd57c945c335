//! What there is to run on. Nothing here panics or waits long, and all of it works on a machine without a GPU.
//!
//! cudarc opens libcuda at its first call and looks each symbol up when it is first called; both panic when they fail. So
//! the library and every symbol that this crate uses are looked for here first, and nothing of cudarc's own layers is
//! called, only `sys`. The API level that Cargo.toml names then decides about two things alone: the names of error codes
//! (the newest level knows most) and which cuBLASLt is looked for (a level of CUDA 13: libcublasLt.so.13, then .12).

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::OnceLock;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUresult};

use super::status::{Owned, check};
use crate::backend::cuda::{NVCC, device::Description};
use crate::error::{Error, Kind, Result, ensure};

/// The CUDA version of the oldest driver that is used, as the driver writes it: 12.4, the first that tells the size of a
/// kernel's parameters (cuFuncGetParamInfo).
pub const OLDEST: u32 = 12040;

/// Compute capability of the oldest GPU: bf16 tensor cores and cp.async come with 8.0.
pub const OLDEST_GPU: (u32, u32) = (8, 0);

/// All symbols of libcuda that are called. A test compares this list with the calls.
#[rustfmt::skip]
pub(super) const DRIVER_SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetCount", "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2", "cuDevicePrimaryCtxRetain", "cuDeviceTotalMem_v2", "cuDriverGetVersion",
    "cuEventCreate", "cuEventDestroy_v2", "cuEventQuery", "cuEventRecord", "cuEventSynchronize", "cuFuncGetAttribute",
    "cuFuncGetParamInfo", "cuFuncSetAttribute", "cuGetErrorString", "cuGraphDestroy", "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags", "cuGraphLaunch", "cuGraphUpload", "cuInit", "cuLaunchKernelEx", "cuMemAlloc_v2",
    "cuMemFreeHost", "cuMemFree_v2", "cuMemGetInfo_v2", "cuMemHostAlloc", "cuMemcpyDtoDAsync_v2", "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2", "cuMemsetD8Async", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload",
    "cuStreamBeginCapture_v2", "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamEndCapture", "cuStreamQuery",
    "cuStreamSynchronize", "cuTensorMapEncodeTiled",
];

/// All symbols of cuBLASLt that are called; compared by the same test.
#[rustfmt::skip]
pub(super) const BLAS_SYMBOLS: &[&str] = &[
    "cublasLtCreate", "cublasLtDestroy", "cublasLtGetVersion", "cublasLtMatmul", "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute", "cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute", "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
];

/// What `mindskip doctor` tells of the GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// "580.82.07"; None where the kernel does not tell.
    pub driver: Option<String>,
    /// 13.0 is (13, 0).
    pub cuda: (u32, u32),
    pub devices: Vec<Description>,
}

/// The driver and its devices. Errors: Device when there is no driver, or none that works.
pub fn look() -> Result<Found> {
    let version = initialise()?;
    let devices = (0..count()?).map(describe).collect::<Result<_>>()?;
    Ok(Found { driver: kernel_module(), cuda: split(version), devices })
}

/// The version of cuBLASLt as it writes it: 130000 is 13.0. Errors: Device when it is missing.
pub fn cublaslt() -> Result<usize> {
    static SYMBOLS: OnceLock<Result<()>> = OnceLock::new();
    SYMBOLS.get_or_init(find_cublaslt).clone()?;
    // SAFETY: the library is there and has the symbol.
    Ok(unsafe { lt::cublasLtGetVersion() })
}

/// The version of NVIDIA's kernel module, which is the driver's.
pub fn kernel_module() -> Option<String> {
    let text = std::fs::read_to_string("/sys/module/nvidia/version").ok()?;
    Some(text.trim().to_owned())
}

/// 13020 is (13, 2).
pub fn split(version: u32) -> (u32, u32) {
    (version / 1000, version % 1000 / 10)
}

fn find_cublaslt() -> Result<()> {
    const ACTION: &str = "install CUDA's cuBLAS 12 or 13, which comes with the toolkit and as PyPI's nvidia-cublas, and \
                          name the folder of libcublasLt.so in LD_LIBRARY_PATH";
    // SAFETY: loading NVIDIA's library has no effect on this process but its own set-up.
    let found = unsafe { lt::is_culib_present() };
    if !found {
        return Err(Error::new(Kind::Device, "the library cuBLASLt was not found").action(ACTION));
    }
    // SAFETY: as above. The type of the symbols does not matter: none is called here.
    let missing = BLAS_SYMBOLS.iter().find(|name| unsafe { lt::culib().get::<*const ()>(name.as_bytes()).is_err() });
    match missing {
        Some(name) => Err(Error::new(Kind::Device, format!("cuBLASLt has no {name}: it is too old")).action(ACTION)),
        None => Ok(()),
    }
}

/// Starts the driver, once for the process; returns its CUDA version. Errors: Device.
pub(super) fn initialise() -> Result<u32> {
    static DRIVER: OnceLock<Result<u32>> = OnceLock::new();
    DRIVER.get_or_init(start).clone()
}

fn start() -> Result<u32> {
    // SAFETY: loading NVIDIA's library has no effect on this process but its own set-up.
    let found = unsafe { sys::is_culib_present() };
    if !found {
        let error = Error::new(Kind::Device, "NVIDIA's driver was not found: there is no libcuda");
        return Err(error.action("install the driver, start the container with a GPU (--gpus all), or use the CPU"));
    }
    let has = |name: &str| unsafe {
        // SAFETY: as above. The type of the symbol does not matter: it is not called here.
        sys::culib().get::<*const ()>(name.as_bytes()).is_ok()
    };
    let too_old = |what: String| {
        let (major, minor) = split(oldest());
        let rebuild = if oldest() > OLDEST { ", or build again with an older nvcc" } else { "" };
        let action = format!("update NVIDIA's driver to one of CUDA {major}.{minor} or newer{rebuild}");
        Error::new(Kind::Device, what).action(action)
    };
    ensure!(has("cuDriverGetVersion"), Device, "the libcuda that was found is not NVIDIA's; check LD_LIBRARY_PATH");
    let mut version: c_int = 0;
    // SAFETY: the symbol is there; it may be called before cuInit and writes one int.
    let told = unsafe { sys::cuDriverGetVersion(&mut version) };
    let version = if told == CUresult::CUDA_SUCCESS { version as u32 } else { 0 };
    if version < oldest() && version > 0 {
        let (major, minor) = split(version);
        return Err(too_old(format!("NVIDIA's driver knows CUDA {major}.{minor} only, which is too old")));
    }
    if let Some(name) = DRIVER_SYMBOLS.iter().find(|name| !has(name)) {
        return Err(too_old(format!("NVIDIA's driver has no {name}: it is too old")));
    }
    // SAFETY: the symbol is there; cuInit takes no pointers and may be called many times.
    check(unsafe { sys::cuInit(0) }, "starting NVIDIA's driver")?;
    Ok(version)
}

/// The oldest driver that this build works with: drivers load what an nvcc of their own major version or before has made.
fn oldest() -> u32 {
    nvcc().map_or(OLDEST, |(major, _)| OLDEST.max(major * 1000))
}

/// The version of the nvcc that made the kernels; None without kernels.
pub fn nvcc() -> Option<(u32, u32)> {
    // "Cuda compilation tools, release 13.0, V13.0.88"
    let (major, minor) = NVCC.split_once("release ")?.1.split_once(',')?.0.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Whether one of the kernels' architectures, `80;90a`, runs on a GPU. The lowest is there as PTX too, which later GPUs
/// compile for themselves; one with a letter runs on its own GPU only.
pub fn covers(architectures: &str, (major, minor): (u32, u32)) -> bool {
    architectures.split(';').any(|name| {
        let digits = name.trim_end_matches(char::is_alphabetic);
        let gpu = major * 10 + minor;
        digits.parse().is_ok_and(|number: u32| if digits == name { number <= gpu } else { number == gpu })
    })
}

/// How many devices there are, at least one. Errors: Device.
pub(super) fn count() -> Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: called after `initialise`; writes one int.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }, "counting the GPUs")?;
    if count < 1 {
        return Err(super::status::error(CUresult::CUDA_ERROR_NO_DEVICE));
    }
    Ok(count as usize)
}

/// The device of an ordinal below `count`. Errors: Device.
pub(super) fn device(ordinal: usize) -> Result<CUdevice> {
    let mut device = 0;
    // SAFETY: called after `initialise`; writes one handle.
    check(unsafe { sys::cuDeviceGet(&mut device, ordinal as c_int) }, "opening a GPU")?;
    Ok(device)
}

pub(super) fn attribute(device: CUdevice, attribute: Attribute) -> Result<u32> {
    let mut value: c_int = 0;
    // SAFETY: `device` comes from `device()`; writes one int.
    check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) }, "asking what a GPU can do")?;
    Ok(value as u32)
}

/// Makes the device's primary context (or finds it) and makes it current on this thread. Errors: Device.
pub(super) fn context(device: CUdevice) -> Result<(sys::CUcontext, Owned<CUdevice>)> {
    let mut context = ptr::null_mut();
    // SAFETY: `device` comes from `device()`; the context is given back by `Owned`.
    check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) }, "opening a GPU")?;
    let owned = Owned(device, sys::cuDevicePrimaryCtxRelease_v2 as unsafe fn(CUdevice) -> CUresult);
    // SAFETY: the context was made above.
    check(unsafe { sys::cuCtxSetCurrent(context) }, "opening a GPU")?;
    Ok((context, owned))
}

/// Free and total bytes of the current context's device.
pub(super) fn memory() -> Result<(u64, u64)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: a context is current; writes two sizes.
    check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "asking for free memory")?;
    Ok((free as u64, total as u64))
}

/// What the device is. `free_memory` is left at 0.
pub(super) fn properties(device: CUdevice) -> Result<Description> {
    let mut name = [0u8; 128];
    // SAFETY: `name` has the room that is stated.
    let status = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device) };
    check(status, "asking for a GPU's name")?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
    let mut memory = 0;
    // SAFETY: `device` comes from `device()`; writes one size.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut memory, device) }, "asking for a GPU's memory")?;
    let get = |what| attribute(device, what);
    Ok(Description {
        name,
        compute_capability: (
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory: memory as u64,
        free_memory: 0,
    })
}

/// What the device is, and the memory that is free now: 0 when no context can be had, as others hold the device.
fn describe(ordinal: usize) -> Result<Description> {
    let device = device(ordinal)?;
    let mut description = properties(device)?;
    if let Ok((_, _owned)) = context(device) {
        description.free_memory = memory().map_or(0, |(free, _)| free);
        // SAFETY: null takes the context from this thread, before it is given back.
        let _ = unsafe { sys::cuCtxSetCurrent(ptr::null_mut()) };
    }
    Ok(description)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_cover_gpus() {
        let with = |gpu| ["80;90a", "90a", "80", "", "86;89"].map(|list| covers(list, gpu));
        assert_eq!(with((8, 0)), [true, false, true, false, false]);
        assert_eq!(with((8, 9)), [true, false, true, false, true]);
        assert_eq!(with((9, 0)), [true, true, true, false, true]);
        assert_eq!(with((12, 0)), [true, false, true, false, true]);
    }
}
