//! The state of a run and the inputs of one step: which rows there are, how they are cut into chunks, what was active.
//!
//! In prefill the host reads the number of active rows once per routed layer, because it sizes the GEMMs and takes the K/V
//! pages. In decode it reads nothing: pages for one more row are taken beforehand, and the counts of a step are learned at
//! the beginning of the next ([`State::settle`]).

use std::ops::{ControlFlow, Range};

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Draw, Ints, Mat, Next, RowSet, Sample, StepKey, Take, UNDECIDED, mix};
use crate::error::{Error, Kind, Result};
use crate::kv::{KvCache, Slot};
use crate::memory::MemoryPlan;
use crate::model::{Gates, Model, Routing};
use crate::router::Level;

/// Whether a step reads prompts or makes one token for each sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Prefill,
    Decode,
}

/// Rows [start, end) of a step that pass a layer together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub start: usize,
    pub end: usize,
}

/// A sequence's part of a step.
#[derive(Debug, Clone, Copy)]
struct SeqRows {
    slot: Slot,
    /// Its rows of the step.
    start: usize,
    end: usize,
}

/// How much of the depth was used, since the engine was built or [`Engine::clear_counts`](crate::engine::Engine::clear_counts).
///
/// ```
/// use mindskip::engine::Activity;
///
/// let mut activity = Activity { tokens: 10, active: vec![10, 4, 6] }; // as Engine::activity gives it
/// assert_eq!((activity.capacity(1), activity.mean_capacity(&[1, 2])), (0.4, 0.5));
/// activity.add(&Activity { tokens: 10, active: vec![10, 0, 0] });
/// assert_eq!((activity.tokens, activity.capacity(1)), (20, 0.2));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Tokens that were processed.
    pub tokens: u64,
    /// By layer: the tokens that were active; all of them in a dense layer.
    pub active: Vec<u64>,
}

impl Activity {
    pub(crate) fn clear(&mut self) {
        self.tokens = 0;
        self.active.fill(0);
    }

    /// Counts those of another time as well.
    pub fn add(&mut self, other: &Activity) {
        self.tokens += other.tokens;
        self.active.resize(self.active.len().max(other.active.len()), 0);
        self.active.iter_mut().zip(&other.active).for_each(|(sum, own)| *sum += own);
    }

    /// The share of a layer's tokens that were active; 1 when there were none.
    pub fn capacity(&self, layer: usize) -> f64 {
        if self.tokens == 0 { 1.0 } else { self.active[layer] as f64 / self.tokens as f64 }
    }

    /// The share of (token, layer) pairs of the given layers that were active.
    pub fn mean_capacity(&self, layers: &[usize]) -> f64 {
        if layers.is_empty() {
            1.0
        } else {
            layers.iter().map(|&l| self.capacity(l)).sum::<f64>() / layers.len() as f64
        }
    }
}

/// Told how much of a prefill is done, as a share; breaks off when it says so.
pub type Watch = Box<dyn Fn(f64) -> ControlFlow<()> + Send + Sync>;

/// Everything that changes from step to step.
pub(crate) struct State {
    pub plan: MemoryPlan,
    pub kv: KvCache,
    pub activity: Activity,
    pub watch: Option<Watch>,
    phase: Phase,
    seqs: Vec<SeqRows>,
    /// Ends of sequences and chunks, ascending; the last is the number of rows.
    cuts: Vec<u32>,
    /// `[layers · cuts]`: active rows below each cut, as far as they are known.
    counts: Vec<u32>,
    /// `[layers · slots]`: sequence-level decisions: 0, 1 or `UNDECIDED`.
    decisions: Vec<u32>,
    /// `[layers · sequences]`: K/V rows before the step, to roll back to.
    before: Vec<usize>,
    /// A step has run whose counts or decisions are not known yet.
    unsettled: bool,
    scratch: Vec<u32>,
    floats: Vec<f32>,
}

impl State {
    pub fn new(plan: MemoryPlan) -> Self {
        let (layers, batch) = (plan.kv.layers, plan.kv.slots);
        State {
            kv: KvCache::new(plan.kv),
            activity: Activity { tokens: 0, active: vec![0; layers] },
            watch: None,
            phase: Phase::Prefill,
            seqs: Vec::with_capacity(batch),
            cuts: Vec::with_capacity(batch),
            counts: Vec::with_capacity(layers * batch),
            decisions: vec![UNDECIDED; layers * batch],
            before: Vec::with_capacity(layers * batch),
            unsettled: false,
            scratch: Vec::with_capacity(layers * batch),
            floats: Vec::new(),
            plan,
        }
    }

    /// Opens a sequence: empty, undecided everywhere.
    pub fn open(&mut self, be: &mut dyn Backend) -> Result<Slot> {
        let slot = self.kv.open()?;
        for layer in 0..self.plan.kv.layers {
            self.decisions[layer * self.plan.kv.slots + slot.index()] = UNDECIDED;
            be.kv_len(layer, slot.index(), 0)?;
        }
        Ok(slot)
    }

    /// Runs one step for sequences of (slot, position of the first token, tokens), and the head of each one's last row. With
    /// `draws`, one for each sequence, it also chooses the tokens that follow. On an error the K/V lengths are as before.
    pub fn run(
        &mut self,
        be: &mut dyn Backend,
        model: &Model,
        phase: Phase,
        seqs: &[(Slot, usize, &[u32])],
        draws: Option<&[Draw]>,
    ) -> Result<()> {
        self.settle(be, model)?;
        let next = match draws {
            None => Next::Logits,
            Some(draws) if draws.iter().all(Draw::is_greedy) => Next::Greedy,
            Some(_) => Next::Drawn,
        };
        let key = StepKey { rows: seqs.iter().map(|(_, _, ids)| ids.len()).sum(), next };
        let result = self.begin(be, model, phase, seqs, draws.filter(|_| next == Next::Drawn)).and_then(|()| {
            be.step((phase == Phase::Decode).then_some(key), &mut |be| {
                model.forward(be, self)?;
                model.head(be, self, self.sequences())?;
                self.sampling(next).map_or(Ok(()), |sample| be.sample(&sample))
            })
        });
        match result {
            Ok(()) => self.unsettled = true,
            Err(_) => self.undo(be)?,
        }
        result
    }

    fn begin(
        &mut self,
        be: &mut dyn Backend,
        model: &Model,
        phase: Phase,
        seqs: &[(Slot, usize, &[u32])],
        draws: Option<&[Draw]>,
    ) -> Result<()> {
        self.phase = phase;
        self.seqs.clear();
        let mut rows = 0;
        for &(slot, _, ids) in seqs {
            self.seqs.push(SeqRows { slot, start: rows, end: rows + ids.len() });
            rows += ids.len();
        }
        self.cuts.clear();
        self.cuts.extend(self.seqs.iter().map(|s| s.end as u32));
        self.cuts.extend(self.chunks().map(|c| c.end as u32));
        self.cuts.sort_unstable();
        self.cuts.dedup();
        let layers = self.plan.kv.layers;
        self.counts.clear();
        self.counts.resize(layers * self.cuts.len(), 0);
        self.before.clear();
        for layer in 0..layers {
            self.before.extend(self.seqs.iter().map(|s| self.kv.len(layer, s.slot)));
        }
        if phase == Phase::Decode {
            self.reserve_one(be, model)?;
        }
        self.write_inputs(be, seqs)?;
        if let Some(draws) = draws {
            self.scratch.clear();
            self.scratch.extend(draws.iter().flat_map(Draw::words));
            be.write_ints(self.plan.buffers.draws, &self.scratch)?;
        }
        if let Some(Routing { gates: Gates::Random { capacity, seed }, layers, settings }) = &model.routing {
            self.draw(be, layers, settings.granularity.level, *capacity, *seed, seqs)?;
        }
        Ok(())
    }

    /// How the tokens behind a step are chosen, if they are.
    fn sampling(&self, next: Next) -> Option<Sample> {
        let (b, n) = (&self.plan.buffers, self.sequences());
        let draws = match next {
            Next::Logits => return None,
            Next::Greedy => None,
            Next::Drawn => Some(b.draws.slice(0..n * Draw::WORDS)),
        };
        Some(Sample { logits: b.logits.rows(0..n), draws, tokens: self.tokens() })
    }

    /// The tokens that the step has chosen.
    pub fn tokens(&self) -> Ints {
        self.plan.buffers.tokens.slice(0..self.sequences())
    }

    fn write_inputs(&mut self, be: &mut dyn Backend, seqs: &[(Slot, usize, &[u32])]) -> Result<()> {
        let (b, rows) = (self.plan.buffers, self.rows());
        let v = &mut self.scratch;
        let mut write = |to: Ints, values: &mut dyn Iterator<Item = u32>| {
            v.clear();
            v.extend(values);
            be.write_ints(to, v)
        };
        write(b.ids, &mut seqs.iter().flat_map(|(_, _, ids)| ids.iter().copied()))?;
        write(b.pos, &mut seqs.iter().flat_map(|&(_, pos, ids)| (pos..pos + ids.len()).map(|p| p as u32)))?;
        write(b.row_slot, &mut seqs.iter().flat_map(|&(slot, _, ids)| std::iter::repeat_n(slot.0, ids.len())))?;
        write(b.all, &mut (0..rows as u32))?;
        write(b.seq_start, &mut std::iter::once(0).chain(self.seqs.iter().map(|s| s.end as u32)))?;
        write(b.slots, &mut self.seqs.iter().map(|s| s.slot.0))?;
        write(b.cuts, &mut self.cuts.iter().copied())?;
        write(b.head_rows, &mut self.seqs.iter().map(|s| s.end as u32 - 1))?;
        let (slots, seqs) = (self.plan.kv.slots, &self.seqs);
        let decisions = &self.decisions;
        write(
            b.decided,
            &mut (0..self.plan.kv.layers).flat_map(|l| seqs.iter().map(move |s| decisions[l * slots + s.slot.index()])),
        )
    }

    /// Draws logits far from zero: active with the probability `capacity`, by layer, position and token, so that a
    /// sequence is treated alike alone and in a batch.
    fn draw(
        &mut self,
        be: &mut dyn Backend,
        layers: &[usize],
        level: Level,
        capacity: f32,
        seed: u64,
        seqs: &[(Slot, usize, &[u32])],
    ) -> Result<()> {
        const FAR: f32 = 40.0;
        self.floats.clear();
        for &layer in layers {
            let start = mix(seed ^ mix(layer as u64));
            let logit = |hash: u64| if ((hash >> 40) as f32) < capacity * (1 << 24) as f32 { FAR } else { -FAR };
            for &(_, pos, ids) in seqs {
                match level {
                    Level::Token => self.floats.extend(
                        ids.iter()
                            .enumerate()
                            .map(|(i, &id)| logit(mix(start ^ mix(((pos + i) as u64) << 32 | id as u64)))),
                    ),
                    Level::Sequence => {
                        let hash = ids.iter().fold(start, |hash, &id| mix(hash ^ id as u64));
                        self.floats.extend(std::iter::repeat_n(logit(hash), ids.len()));
                    }
                }
            }
        }
        // All layers at once: on a GPU each copy takes microseconds.
        be.write_floats(self.plan.buffers.gate.rows(0..layers.len() * self.rows()), &self.floats)
    }

    /// Room for one more K/V row wherever the next token may write one.
    fn reserve_one(&mut self, be: &mut dyn Backend, model: &Model) -> Result<()> {
        for layer in 0..self.plan.kv.layers {
            for s in &self.seqs {
                if self.decisions[layer * self.plan.kv.slots + s.slot.index()] == 0
                    && model.routing.as_ref().is_some_and(|r| r.keys() == Take::Active)
                {
                    continue;
                }
                let rows = self.kv.len(layer, s.slot) + 1;
                let (first, pages) = self.kv.reserve(layer, s.slot, rows)?;
                if !pages.is_empty() {
                    be.kv_pages(layer, s.slot.index(), first, pages)?;
                }
            }
        }
        Ok(())
    }

    /// After a chunk of a layer: tells the watcher. Errors: Interrupted.
    pub fn passed(&mut self, layer: usize, chunk: Chunk) -> Result<()> {
        let rows = self.rows();
        let done = (layer * rows + chunk.end) as f64 / (self.plan.kv.layers * rows) as f64;
        match self.watch.as_ref().filter(|_| self.phase == Phase::Prefill).map(|watch| watch(done)) {
            Some(ControlFlow::Break(())) => Err(Error::new(Kind::Interrupted, "interrupted while reading the prompt")),
            _ => Ok(()),
        }
    }

    /// After [`Route`](crate::backend::Route) in prefill: learns the counts of a routed layer, and takes the pages that the
    /// kept rows need.
    pub fn keep_rows(&mut self, be: &mut dyn Backend, layer: usize, keys: Take, routed: bool) -> Result<()> {
        if self.phase == Phase::Decode {
            return Ok(());
        }
        let cuts = self.cuts.len();
        let (active_at, counts) = (self.active_at(layer), &mut self.counts[layer * cuts..(layer + 1) * cuts]);
        if routed {
            be.read_ints(active_at, counts)?
        } else {
            counts.copy_from_slice(&self.cuts)
        }
        for i in 0..self.seqs.len() {
            let SeqRows { slot, start, end } = self.seqs[i];
            let rows = self.kv.len(layer, slot) + self.taken(layer, start, end, keys);
            let (first, pages) = self.kv.reserve(layer, slot, rows)?;
            if !pages.is_empty() {
                be.kv_pages(layer, slot.index(), first, pages)?;
            }
            self.kv.set_len(layer, slot, rows);
        }
        Ok(())
    }

    /// Learns what the last step did: decisions, K/V lengths after decode, activity.
    pub fn settle(&mut self, be: &mut dyn Backend, model: &Model) -> Result<()> {
        if !self.unsettled {
            return Ok(());
        }
        let (layers, cuts, seqs) = (self.plan.kv.layers, self.cuts.len(), self.seqs.len());
        if self.phase == Phase::Decode {
            be.read_ints(self.plan.buffers.active_at.slice(0..layers * cuts), &mut self.counts)?;
            for layer in 0..layers {
                let keys = model.keys_of(layer);
                for i in 0..seqs {
                    let SeqRows { slot, start, end } = self.seqs[i];
                    let rows = self.kv.len(layer, slot) + self.taken(layer, start, end, keys);
                    self.kv.set_len(layer, slot, rows);
                    // The page that was taken for a row that was not written.
                    self.kv.truncate(layer, slot, rows);
                }
            }
        }
        if self.undecided(model) {
            self.scratch.resize(layers * seqs, 0);
            be.read_ints(self.plan.buffers.decided.slice(0..layers * seqs), &mut self.scratch)?;
            for layer in 0..layers {
                for (i, s) in self.seqs.iter().enumerate() {
                    self.decisions[layer * self.plan.kv.slots + s.slot.index()] = self.scratch[layer * seqs + i];
                }
            }
        }
        self.activity.tokens += self.rows() as u64;
        for layer in 0..layers {
            self.activity.active[layer] += u64::from(self.counts[(layer + 1) * cuts - 1]);
        }
        self.unsettled = false;
        Ok(())
    }

    /// Whether the step decides for a sequence as a whole: the decisions are kept for the steps that follow.
    fn undecided(&self, model: &Model) -> bool {
        let Some(routing) = model.routing.as_ref().filter(|r| r.settings.granularity.level == Level::Sequence) else {
            return false;
        };
        let undecided = |&l: &usize, s: &SeqRows| self.decisions[l * self.plan.kv.slots + s.slot.index()] == UNDECIDED;
        routing.layers.iter().any(|l| self.seqs.iter().any(|s| undecided(l, s)))
    }

    /// Makes the sequences what they were before the last step.
    pub fn undo(&mut self, be: &mut dyn Backend) -> Result<()> {
        self.unsettled = false;
        for layer in 0..self.plan.kv.layers {
            for (i, s) in self.seqs.iter().enumerate() {
                let rows = self.before[layer * self.seqs.len() + i];
                self.kv.truncate(layer, s.slot, rows);
                be.kv_len(layer, s.slot.index(), rows)?;
            }
        }
        self.seqs.clear();
        Ok(())
    }

    /// Gives up what a sequence holds behind `rows`, `[layers]`; an `emptied` one is undecided again.
    pub fn rewind(&mut self, be: &mut dyn Backend, slot: Slot, rows: &[usize], emptied: bool) -> Result<()> {
        for (layer, &rows) in rows.iter().enumerate() {
            self.kv.truncate(layer, slot, rows);
            be.kv_len(layer, slot.index(), rows)?;
            if emptied {
                self.decisions[layer * self.plan.kv.slots + slot.index()] = UNDECIDED;
            }
        }
        Ok(())
    }

    /// Forgets the last step, whose routing is another one's.
    pub fn forget(&mut self) {
        self.seqs.clear();
    }

    /// Active rows below a border of the step.
    fn active_below(&self, layer: usize, row: usize) -> usize {
        if row == 0 {
            return 0;
        }
        let cut = self.cuts.binary_search(&(row as u32)).expect("a border of a sequence or a chunk");
        self.counts[layer * self.cuts.len() + cut] as usize
    }

    /// How many of the rows [start, end) a part of the layer takes; both are borders.
    fn taken(&self, layer: usize, start: usize, end: usize, take: Take) -> usize {
        match take {
            Take::All => end - start,
            Take::Active => self.active_below(layer, end) - self.active_below(layer, start),
        }
    }

    /// Active rows of the whole step, once they are known.
    pub fn active_rows(&self, layer: usize) -> usize {
        self.active_below(layer, self.rows())
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn rows(&self) -> usize {
        self.seqs.last().map_or(0, |s| s.end)
    }

    pub fn sequences(&self) -> usize {
        self.seqs.len()
    }

    /// The step's rows, cut into chunks of whole multiples of [`Limits::chunk`](crate::memory::Limits).
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = Chunk> + use<> {
        let (rows, chunk) = (self.rows(), self.chunk_rows());
        (0..rows.div_ceil(chunk)).map(move |i| Chunk { start: i * chunk, end: ((i + 1) * chunk).min(rows) })
    }

    fn chunk_rows(&self) -> usize {
        self.plan.limits.chunk.max(self.plan.limits.batch)
    }

    pub fn cuts(&self) -> Ints {
        self.plan.buffers.cuts.slice(0..self.cuts.len())
    }

    /// The logits of the nth routed layer, by row. Those of a step stand together.
    pub fn gate(&self, nth: usize) -> Mat {
        let start = nth * self.rows();
        self.plan.buffers.gate.rows(start..start + self.rows())
    }

    pub fn active_list(&self, nth: usize) -> Ints {
        let start = nth * self.plan.limits.rows;
        self.plan.buffers.active.slice(start..start + self.rows())
    }

    pub fn active_at(&self, layer: usize) -> Ints {
        let cuts = self.cuts.len();
        self.plan.buffers.active_at.slice(layer * cuts..(layer + 1) * cuts)
    }

    pub fn decided(&self, layer: usize) -> Ints {
        let seqs = self.seqs.len();
        self.plan.buffers.decided.slice(layer * seqs..(layer + 1) * seqs)
    }

    /// All rows of a chunk.
    pub fn all(&self, chunk: Chunk) -> RowSet {
        let index = self.plan.buffers.all.slice(chunk.start..chunk.end);
        RowSet { run: Some(chunk.start), ..RowSet::exact(index) }
    }

    /// The active rows of a chunk, of those that `list` holds for the whole step.
    pub fn active(&self, layer: usize, chunk: Chunk, list: Ints) -> RowSet {
        let index = list.slice(self.part(layer, chunk, Take::Active));
        match self.phase {
            Phase::Prefill => RowSet::exact(index),
            Phase::Decode => {
                let counts = self.active_at(layer);
                let count = Some(counts.slice(counts.len - 1..counts.len));
                RowSet { count, ..RowSet::exact(index) }
            }
        }
    }

    /// Where a chunk's rows stand in the lists that `Route` wrote for the whole step.
    pub fn part(&self, layer: usize, chunk: Chunk, take: Take) -> Range<usize> {
        match (take, self.phase) {
            (Take::All, _) | (_, Phase::Decode) => chunk.start..chunk.end,
            (Take::Active, Phase::Prefill) => {
                self.active_below(layer, chunk.start)..self.active_below(layer, chunk.end)
            }
        }
    }
}
