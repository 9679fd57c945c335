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

impl Doctor {
    pub fn run(self) -> Ran {
        let m = Machine::look();
        let slow = !["avx512", "avx2", "neon"].contains(&m.instructions.as_str());
        if self.json {
            print_json(&json!({
                "version": env!("CARGO_PKG_VERSION"),
                "cpu": m.cpu, "instructions": m.instructions, "threads": m.threads,
                "memory_total": m.memory_total, "memory_free": m.memory_free,
                "cuda": null,
            }))?;
            return Ok(Outcome::Done);
        }
        let mut out = io::stdout().lock();
        let mut line = |name: &str, state: &str, text: String| writeln!(out, "  {name:<13} {state:<8} {text}");
        line("mindskip", "ok", format!("{} for {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH))?;
        line("cpu", "ok", m.cpu)?;
        if slow {
            let text = format!("{}; a CPU with AVX2, AVX-512 or NEON is several times faster", m.instructions);
            line("instructions", "slow", text)?;
        } else {
            line("instructions", "ok", m.instructions)?;
        }
        line("threads", "ok", format!("{}; --threads N takes fewer", m.threads))?;
        let free = m.memory_free.map_or("not known".into(), |n| Size(n).to_string());
        let total = m.memory_total.map_or(String::new(), |n| format!(" of {}", Size(n)));
        line("memory", "ok", format!("{free} free{total}; --memory SIZE takes less"))?;
        line("cuda", "missing", "this version has the CPU backend only".into())?;
        Ok(Outcome::Done)
    }
}
