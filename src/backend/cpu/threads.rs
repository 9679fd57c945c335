//! The threads of a CPU backend, the instruction set they use, and scratch memory for each.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fearless_simd::Level;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::bf16::Bf16;
use super::simd::{LANES, Line};
use crate::error::{Error, Kind, Result};

/// A fork wakes a thread in 2 to 5 µs, in which one does as many multiply-adds as this. The embedded model decodes 7.5k to
/// 8.7k tokens/s on 2 threads with it, 6.5k to 6.8k when everything forks, 5.8k to 7.2k with twice as much.
const WORTH_A_FORK: usize = 1 << 16;

/// A pool of threads. Cloning shares.
#[derive(Clone)]
pub struct Threads {
    pool: Arc<ThreadPool>,
    scratch: Arc<[Mutex<Scratch>]>,
    pub level: Level,
    /// Whether projections with bf16 weights round their inputs to bf16.
    pub bf16: Option<Bf16>,
}

/// Memory of one thread. Grows to what the largest op needs, and then no more.
#[derive(Default)]
pub struct Scratch(Vec<Line>);

impl Scratch {
    /// Some memory, holding anything.
    pub fn lines(&mut self, n: usize) -> &mut [Line] {
        if self.0.len() < n {
            // What was there is given back first, and no more is taken than asked for.
            self.0 = Vec::new();
            self.0 = vec![bytemuck::Zeroable::zeroed(); n];
        }
        &mut self.0[..n]
    }

    /// The same as numbers.
    pub fn floats(&mut self, n: usize) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(self.lines(n.div_ceil(LANES)))[..n]
    }
}

impl Threads {
    /// `count` threads, or one for every core that this process may use. Errors: Argument for 0 or more than 1024.
    pub fn new(count: Option<usize>, level: Level, bf16: Option<Bf16>) -> Result<Self> {
        let count = count.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        if !(1..=1024).contains(&count) {
            return Err(Error::new(Kind::Argument, format!("{count} threads")).action("give a number from 1 to 1024"));
        }
        let pool = ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("mindskip-{i}")).build();
        let pool = pool.map_err(|e| {
            Error::new(Kind::Memory, format!("{count} threads cannot be started: {e}"))
                .action("use fewer with --threads")
        })?;
        Ok(Threads { pool: Arc::new(pool), scratch: (0..count).map(|_| Mutex::default()).collect(), level, bf16 })
    }

    pub fn count(&self) -> usize {
        self.scratch.len()
    }

    /// Runs `body` on a thread of the pool, so that the forks within cost no change of threads.
    pub fn enter<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        self.pool.install(body)
    }

    /// Runs `work` on every task with the thread's scratch memory: on all threads, or on this one when the multiply-adds of
    /// all tasks together are so few that a fork costs more than it saves.
    pub fn each<T: Send>(
        &self,
        multiply_adds: usize,
        tasks: impl IndexedParallelIterator<Item = T>,
        work: impl Fn(&mut Scratch, T) + Send + Sync,
    ) {
        let at_once = if multiply_adds < WORTH_A_FORK { usize::MAX } else { 1 };
        let tasks = tasks.with_min_len(at_once).with_max_len(at_once);
        self.enter(|| tasks.for_each(|task| work(&mut self.own_scratch(), task)));
    }

    /// Nobody else takes it: a thread runs one task at a time. Poisoned memory is as good as any, it holds no promise.
    fn own_scratch(&self) -> MutexGuard<'_, Scratch> {
        let i = rayon::current_thread_index().expect("a thread of the pool");
        self.scratch[i].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
