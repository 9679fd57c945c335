//! The CUDA backend.

pub mod device;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod driver;

/// What build.rs has made of cuda/: MODULES, ARCHITECTURES and NVCC.
#[cfg(mindskip_cuda)]
mod built {
    include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));
}
#[cfg(not(mindskip_cuda))]
mod built {
    pub static MODULES: &[(&str, &[u8])] = &[];
    pub const ARCHITECTURES: &str = "";
    pub const NVCC: &str = "";
}
pub use built::*;
