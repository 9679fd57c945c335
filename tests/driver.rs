//! What goes wrong with a GPU is one clear error, leaves nothing behind and panics nowhere. In the place of NVIDIA's
//! libraries stand fakes (driver/fake.c) that fail where they are told to; as a process loads such a library once, each
//! case is a process of its own.

use std::path::Path;
use std::process::Command;

use mindskip::backend::cuda::device::{Device, Launch};
use mindskip::backend::cuda::driver::Driver;
use mindskip::{Error, Result};

/// Uses a GPU, and tells what comes of it: what a process of its own does.
fn use_gpu() {
    fn tell(what: &str, result: Result<()>) {
        println!("{what}: {}", result.err().map_or("fine".into(), |e: Error| format!("{:?}, {e}", e.kind())));
    }
    let mut gpu = match Driver::open(0, &[("one", b"its code"), ("other", b"more of it")]) {
        Ok(gpu) => gpu,
        Err(error) => return tell("open", Err(error)),
    };
    let launch = Launch { grid: [3, 1, 1], threads: 32, shared: 0 };
    let kernel = gpu.function("some_kernel").unwrap();
    let at = gpu.allocate(64).unwrap();
    tell("allocate", gpu.allocate(1 << 20).map(drop));
    tell("copy in", gpu.copy_in(at, &[7; 64]));
    // SAFETY: the fake's kernels take 8 bytes and read nothing.
    let run = |gpu: &mut Driver| unsafe { gpu.launch(kernel, launch, [0u64].as_ptr().cast(), 8) };
    tell("launch", run(&mut gpu));
    let mut bytes = [0; 64];
    tell("copy out", gpu.copy_out(at, &mut bytes));
    tell("record", gpu.begin_record().and_then(|()| run(&mut gpu)).and_then(|()| gpu.end_record()).map(drop));
    tell("copy out again", gpu.copy_out(at, &mut bytes));
    println!("bytes: {}", bytes[63]);
    drop(gpu);
    println!("dropped");
}

/// What a process tells with fakes that were compiled so and do as `fake` says.
fn told(driver: Option<&[&str]>, blas: bool, fake: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let compile = |name: &str, flags: &[&str]| {
        let to = folder.path().join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/fake.c");
        let run = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(to).args(flags).arg(source).status();
        assert!(run.expect("a C compiler").success());
    };
    if let Some(flags) = driver {
        compile("libcuda.so", &[&["-DFAKE_DRIVER"], flags].concat());
    }
    if blas {
        compile("libcublasLt.so", &[]);
    }
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "all_is_well", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env("FAKE", fake)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{fake}: {out}{err}");
    let left: Vec<_> = err.lines().filter_map(|line| line.strip_prefix("handles left: ")).collect();
    assert!((driver.is_none() || !left.is_empty()) && left.iter().all(|n| *n == "0"), "{fake}: {err}");
    out.into_owned()
}

/// The line of a step is there, and says all of `words`.
#[track_caller]
fn says(told: &str, step: &str, words: &[&str]) {
    let line = told.lines().find_map(|line| line.split_once(&format!("{step}: ")).map(|(_, rest)| rest));
    let line = line.unwrap_or_else(|| panic!("no {step:?} in {told}"));
    for word in words {
        assert!(line.contains(word), "{word:?} is not in {line:?}");
    }
}

#[test]
fn all_is_well() {
    if std::env::var_os("FAKE").is_some() {
        return use_gpu(); // a process that one of these tests has started
    }
    let all = told(Some(&[]), true, "");
    for step in ["allocate", "copy in", "launch", "copy out", "record", "copy out again"] {
        says(&all, step, &["fine"]);
    }
    says(&all, "bytes", &["7"]);
    assert!(all.contains("dropped"));
}

#[test]
fn a_gpu_that_cannot_be_opened_is_one_error() {
    let refused = |driver, blas, fake, words| says(&told(driver, blas, fake), "open", words);
    let here: Option<&[&str]> = Some(&[]);
    if !Path::new("/proc/driver/nvidia").exists() {
        refused(None, true, "", &["Device", "driver was not found", "use the CPU"]);
    }
    refused(here, true, "version=11080", &["Device", "knows CUDA 11.8 only", "update NVIDIA's driver"]);
    refused(Some(&["-DFAKE_OLD"]), true, "", &["Device", "no cuFuncGetParamInfo", "update NVIDIA's driver"]);
    refused(here, true, "cuInit=100", &["Device", "CUDA_ERROR_NO_DEVICE", "nvidia-smi"]);
    refused(here, true, "gpus=0", &["Device", "CUDA_ERROR_NO_DEVICE", "nvidia-smi"]);
    refused(here, true, "major=7", &["Device", "Fake GPU has compute capability 7.0"]);
    refused(here, true, "cuDevicePrimaryCtxRetain=46", &["Device", "CUDA_ERROR_DEVICE_UNAVAILABLE"]);
    // The second module is of another architecture: the first one is given back.
    let words = &["Device", "module other", "CUDA_ERROR_NO_BINARY_FOR_GPU", "MINDSKIP_CUDA_ARCH"];
    refused(here, true, "cuModuleLoadData@2=209", words);
    let blas = told(here, false, "");
    if !blas.contains("allocate: ") {
        says(&blas, "open", &["Device", "cuBLASLt was not found", "LD_LIBRARY_PATH"]); // and none is installed
    }
    refused(here, true, "cublasLtCreate=1", &["Device", "CUBLAS_STATUS_NOT_INITIALIZED", "opening cuBLASLt"]);
    refused(here, true, "cuMemHostAlloc=2", &["CUDA_ERROR_OUT_OF_MEMORY", "pinned memory"]);
}

/// The first piece of memory is cuBLASLt's, the third the one that is too large.
#[test]
fn memory_that_is_used_up_is_one_error_and_no_more() {
    let all = told(Some(&[]), true, "cuMemAlloc_v2@3=2");
    says(&all, "allocate", &["Memory", "no 1048576 bytes in one piece", "--memory"]);
    for step in ["copy in", "launch", "copy out", "record", "copy out again"] {
        says(&all, step, &["fine"]);
    }
    assert!(all.contains("dropped"));
}

/// A kernel's fault comes out at the next call that waits, with the kernel's name, and stays.
#[test]
fn a_fault_is_told_with_the_kernel_and_stays() {
    let all = told(Some(&[]), true, "cuStreamSynchronize=700");
    says(&all, "launch", &["fine"]);
    for step in ["copy out", "record", "copy out again"] {
        says(&all, step, &["Device", "CUDA_ERROR_ILLEGAL_ADDRESS", "some_kernel", "start the program again"]);
    }
    assert!(all.contains("dropped"));
}

/// What fails while a step is recorded ends the recording, and only that.
#[test]
fn a_recording_that_fails_is_given_up() {
    for call in ["cuLaunchKernelEx@2=1", "cuGraphInstantiateWithFlags=2", "cuStreamEndCapture@1=901"] {
        let all = told(Some(&[]), true, call);
        says(&all, "record", &["Device", "CUDA_ERROR"]);
        says(&all, "copy out again", &["fine"]);
        assert!(all.contains("dropped"), "{call}");
    }
}
