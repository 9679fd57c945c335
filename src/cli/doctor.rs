//! `mindskip doctor`.

use std::io::{self, Write};

use clap::Args;
use mindskip::machine::Machine;
use mindskip::memory::Size;
use serde_json::json;

use super::{Outcome, Ran, print_json};

/// What this program finds on this machine, and what to do about what is missing
#[derive(Args)]
pub struct Doctor {
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// One line of the table.
struct Row {
    name: String,
    /// "ok", "slow", "missing", "unusable" or "too old".
    state: &'static str,
    text: String,
}

impl Row {
    fn new(name: impl Into<String>, state: &'static str, text: impl Into<String>) -> Row {
        Row { name: name.into(), state, text: text.into() }
    }
}

impl Doctor {
    pub fn run(self) -> Ran {
        let m = Machine::look();
        let (cuda_rows, cuda) = cuda::look();
        if self.json {
            print_json(&json!({
                "version": env!("CARGO_PKG_VERSION"), "features": features(),
                "cpu": m.cpu, "instructions": m.instructions, "threads": m.threads,
                "memory_total": m.memory_total, "memory_free": m.memory_free,
                "cuda": cuda,
            }))?;
            return Ok(Outcome::Done);
        }
        let free = m.memory_free.map_or("not known".into(), |n| Size(n).to_string());
        let total = m.memory_total.map_or(String::new(), |n| format!(" of {}", Size(n)));
        let instructions = if ["avx512", "avx2", "neon"].contains(&m.instructions.as_str()) {
            Row::new("instructions", "ok", m.instructions)
        } else {
            let text = format!("{}; a CPU with AVX2, AVX-512 or NEON is several times faster", m.instructions);
            Row::new("instructions", "slow", text)
        };
        let version = format!("{} for {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
        let mut rows = vec![
            Row::new("mindskip", "ok", version),
            Row::new("features", "ok", features().join(", ")),
            Row::new("cpu", "ok", m.cpu),
            instructions,
            Row::new("threads", "ok", format!("{}; --threads N takes fewer", m.threads)),
            Row::new("memory", "ok", format!("{free} free{total}; --memory SIZE takes less")),
        ];
        rows.extend(cuda_rows);
        let mut out = io::stdout().lock();
        for Row { name, state, text } in rows {
            writeln!(out, "  {name:<13} {state:<8} {text}")?;
        }
        Ok(Outcome::Done)
    }
}

/// What was compiled in.
fn features() -> Vec<&'static str> {
    let all = [
        ("cli", true),
        ("cuda", cfg!(feature = "cuda")),
        ("emulate", cfg!(feature = "emulate")),
        ("hub", cfg!(feature = "hub")),
    ];
    all.into_iter().filter(|&(_, on)| on).map(|(name, _)| name).collect()
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use serde_json::Value;

    use super::Row;

    pub fn look() -> (Vec<Row>, Value) {
        let text = "this program was built for the CPU only; build it with --features cuda";
        (vec![Row::new("cuda", "missing", text)], Value::Null)
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use mindskip::backend::cuda::device::Description;
    use mindskip::backend::cuda::{ARCHITECTURES, driver};
    use mindskip::memory::Size;
    use mindskip::{Error, Result};
    use serde_json::{Value, json};

    use super::Row;

    /// The kernels in this program, the driver, its GPUs, cuBLASLt.
    pub fn look() -> (Vec<Row>, Value) {
        let dotted = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        let nvcc = driver::nvcc().map(dotted);
        let found = driver::look();
        let cublaslt = driver::cublaslt().map(driver::version_text);
        let json = json!({
            "architectures": ARCHITECTURES.split(';').filter(|name| !name.is_empty()).collect::<Vec<_>>(),
            "nvcc": nvcc,
            "driver": found.as_ref().map_or_else(|_| driver::kernel_module(), |found| found.driver.clone()),
            "version": found.as_ref().ok().map(|found| dotted(found.cuda)),
            "devices": found.iter().flat_map(|found| &found.devices).map(|device| json!({
                "name": device.name, "compute_capability": dotted(device.compute_capability),
                "memory_total": device.memory, "memory_free": device.free_memory,
            })).collect::<Vec<_>>(),
            "cublaslt": cublaslt.as_ref().ok(),
            "error": found.as_ref().err().or(cublaslt.as_ref().err()).map(Error::to_string),
        });
        let driver = found.as_ref().map_err(Error::clone).map(|found| {
            let version = found.driver.as_ref().map_or(String::new(), |version| format!("{version}, "));
            format!("{version}CUDA {}", dotted(found.cuda))
        });
        let mut rows = vec![match nvcc {
            Some(nvcc) => Row::new("cuda", "ok", format!("kernels for {ARCHITECTURES}, made by nvcc {nvcc}")),
            None => {
                Row::new("cuda", "missing", "no kernels, as there was no nvcc; run scripts/get-cuda.sh and build again")
            }
        }];
        rows.push(row("driver", driver));
        for (i, device) in found.iter().flat_map(|found| &found.devices).enumerate() {
            rows.push(gpu(i, device));
        }
        rows.push(row("cublaslt", cublaslt));
        (rows, json)
    }

    fn row(name: &str, found: Result<String>) -> Row {
        match found {
            Ok(text) => Row::new(name, "ok", text),
            // A driver that the kernel has is there, and something else is wrong.
            Err(error) if name == "driver" && driver::kernel_module().is_some() => {
                Row::new(name, "unusable", error.to_string())
            }
            Err(error) => Row::new(name, "missing", error.to_string()),
        }
    }

    fn gpu(i: usize, device: &Description) -> Row {
        let (major, minor) = device.compute_capability;
        let free = match device.free_memory {
            0 => ", in use: see nvidia-smi".into(), // no context could be had
            n => format!(", {} free", Size(n)),
        };
        let text = format!("{}, compute capability {major}.{minor}, {}{free}", device.name, Size(device.memory));
        if (major, minor) < driver::OLDEST_GPU {
            return Row::new(format!("gpu {i}"), "too old", format!("{text}; the kernels need 8.0, use the CPU"));
        }
        if driver::nvcc().is_some() && !driver::covers(ARCHITECTURES, device.compute_capability) {
            let action = "this program has no kernels for it; build again with it in MINDSKIP_CUDA_ARCH";
            return Row::new(format!("gpu {i}"), "missing", format!("{text}; {action}"));
        }
        Row::new(format!("gpu {i}"), "ok", text)
    }
}
