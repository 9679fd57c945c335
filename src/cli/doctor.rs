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
    /// Runs every kernel on the GPU and compares it with what it should compute; exit code 1 when one fails.
    #[cfg(feature = "cuda")]
    #[arg(long)]
    verify: bool,
    /// One case of so many, for tools that make kernels slow.
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "N", default_value_t = 1, requires = "verify")]
    every: usize,
    /// These ops only: all.
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "OP,…", value_delimiter = ',', value_parser = cuda::op(), requires = "verify")]
    ops: Vec<String>,
    /// The GPU to verify: cuda or cuda:N.
    #[cfg(feature = "cuda")]
    #[arg(long, default_value = "cuda", requires = "verify")]
    device: mindskip::engine::Device,
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
        #[cfg(feature = "cuda")]
        if self.verify {
            return cuda::verify(self.device, &self.ops, self.every, self.json);
        }
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
    use std::io::{self, Write};
    use std::time::Instant;

    use clap::builder::PossibleValuesParser;
    use mindskip::backend::AnyKind;
    use mindskip::backend::cuda::device::{self, Description};
    #[cfg(feature = "emulate")]
    use mindskip::backend::cuda::emulated;
    use mindskip::backend::cuda::{self, ARCHITECTURES, MODULES, driver};
    use mindskip::engine::{Device, Kernels};
    use mindskip::memory::Size;
    use mindskip::{Error, Kind, Result};
    use serde_json::{Value, json};

    use super::super::{Outcome, Ran, bad};
    use super::Row;

    /// The name of an op.
    pub fn op() -> PossibleValuesParser {
        PossibleValuesParser::new(AnyKind::all().map(AnyKind::name))
    }

    /// Ops, all when none is named, on the device against their twins.
    pub fn verify(device: Device, ops: &[String], every: usize, as_json: bool) -> Ran {
        let named = |op: &AnyKind| ops.is_empty() || ops.iter().any(|name| name == op.name());
        let ops: Vec<_> = AnyKind::all().filter(named).collect();
        let device: Box<dyn device::Device> = match device {
            Device::Cuda(ordinal) => Box::new(driver::Driver::open(ordinal, MODULES)?),
            #[cfg(feature = "emulate")]
            Device::Emulated(seed) => Box::new(emulated::Emulated::new(seed)),
            _ => return Err(bad::<()>("kernels are verified on a GPU", "give --device cuda").unwrap_err().into()),
        };
        let name = device.description().name.clone();
        let start = Instant::now();
        let mut failed: Vec<(String, usize)> = Vec::new();
        let mut written = Ok(());
        let mut out = io::stdout().lock();
        cuda::verify(device, &ops, every, &mut |verdict| {
            let (dtype, wrong) = (verdict.dtype, verdict.failures.len());
            let hopper = if verdict.kernels == Kernels::Hopper { ", hopper" } else { "" };
            let op = format!("{}{hopper}", verdict.op.name());
            if wrong > 0 {
                failed.push((format!("{op} in {dtype}"), wrong));
            }
            let line = if as_json {
                let (cases, worst, failures) = (verdict.cases, &verdict.worst, &verdict.failures);
                json!({"op": op, "dtype": dtype.to_string(), "cases": cases, "worst": worst, "failures": failures})
                    .to_string()
            } else {
                let state = if wrong == 0 { "ok".into() } else { format!("{wrong} WRONG") };
                let first = verdict.failures.first().map_or(String::new(), |text| format!("\n      {text}"));
                format!("  {op:<14} {dtype:<5} {state:<9} {} cases{first}", verdict.cases)
            };
            if written.is_ok() {
                written = writeln!(out, "{line}");
            }
        })?;
        written?;
        eprintln!("{name}: {:.1} s", start.elapsed().as_secs_f64());
        if failed.is_empty() {
            return Ok(Outcome::Done);
        }
        let list: Vec<_> = failed.iter().map(|(what, n)| format!("{what} ({n} cases)")).collect();
        let error = Error::new(Kind::Device, format!("wrong results: {}", list.join(", ")));
        Err(error.action("use --device cpu, and report the lines above with what mindskip doctor prints").into())
    }

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
            "ops": AnyKind::all().map(AnyKind::name).collect::<Vec<_>>(),
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
