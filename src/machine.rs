//! What this machine is: processor, instructions, threads, memory.

use fearless_simd::Level;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// What `mindskip doctor` tells and the memory planner counts on.
///
/// ```
/// use mindskip::machine::Machine;
///
/// let machine = Machine::look();
/// assert!(machine.threads >= 1 && machine.memory_free <= machine.memory_total);
/// println!("{}, {} threads, {}", machine.cpu, machine.threads, machine.instructions);
/// ```
#[derive(Debug, Clone)]
pub struct Machine {
    /// The processor's own name.
    pub cpu: String,
    /// The best vector instructions that there are and that are used: avx512, avx2, sse4.2, sse2, neon, fallback.
    pub instructions: String,
    /// Threads that this process may run at a time.
    pub threads: usize,
    /// Bytes; None when they cannot be found out.
    pub memory_total: Option<u64>,
    /// Bytes that can be had without swapping, within the limit of the control group if there is one.
    pub memory_free: Option<u64>,
}

impl Machine {
    /// This machine, as it is now.
    pub fn look() -> Machine {
        let system = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
        let cpu = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).filter(|name| !name.is_empty());
        let (memory_total, memory_free) = memory();
        Machine {
            cpu: cpu.unwrap_or_else(|| std::env::consts::ARCH.into()),
            instructions: instructions(Level::new()),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_total,
            memory_free,
        }
    }
}

/// Total and free bytes.
pub(crate) fn memory() -> (Option<u64>, Option<u64>) {
    let kind = MemoryRefreshKind::nothing().with_ram();
    let system = System::new_with_specifics(RefreshKind::nothing().with_memory(kind));
    let known = |n: u64| Some(n).filter(|&n| n > 0);
    let (mut total, mut free) = (known(system.total_memory()), known(system.available_memory()));
    if let Some(group) = system.cgroup_limits() {
        total = total.into_iter().chain([group.total_memory]).min();
        // Not `group.free_memory`: that counts the cache of files as used.
        free = free.into_iter().chain([group.total_memory.saturating_sub(group.rss)]).min();
    }
    (total, free)
}

/// The name of an instruction set.
pub(crate) fn instructions(level: Level) -> String {
    let text = format!("{level:?}").to_lowercase();
    text.split('(').next().unwrap_or_default().replace("sse4_2", "sse4.2")
}
