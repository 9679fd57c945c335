//! The memory planner: what a model, a batch and a context need, computed and checked before anything is allocated.

use std::fmt;

use crate::backend::{ALIGN, Backend, Draw, Ints, KvLayout, Largest, Mat, PAGE};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::tensor::DType;

/// How much memory a run may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// So many.
    Bytes(u64),
    /// Of what the device has free, from 0 to 1.
    Share(f64),
}

/// How large a run may become; the knobs of the plan.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::memory::Limits;
///
/// let bundle = Bundle::embedded()?;
/// let options = Options { batch: 4, rows: Some(64), ..Options::default() };
/// let Limits { context, batch, rows, .. } =
///     Engine::plan_for(&bundle.config, &bundle.weights, None, &options)?.limits;
/// assert_eq!((context, batch, rows), (512, 4, 64), "the context is what the model was made for");
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Tokens of one sequence, prompt and answer together.
    pub context: usize,
    /// Sequences open at a time.
    pub batch: usize,
    /// Rows of one prefill step: the prompts of a batch together.
    pub rows: usize,
    /// Rows that go through a layer at a time in prefill.
    pub chunk: usize,
    /// Tokens whose K/V are held at a time, of all sequences together, when none is skipped; None: `batch` whole contexts.
    pub kv_tokens: Option<usize>,
    /// What everything together may take; None: what the device has free.
    pub memory: Option<Budget>,
}

impl Limits {
    /// K/V pages of a layer, where `whole` are those of all contexts.
    fn kv_pages(&self, whole: usize) -> usize {
        self.kv_tokens.map_or(whole, |tokens| whole.min(tokens.div_ceil(PAGE)))
    }
}

/// What routing means for the memory of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Routed {
    /// Routed layers: their logits and active rows are kept.
    pub layers: usize,
    /// Of these, the layers whose skipped rows write no K/V.
    pub sparse_kv: usize,
}

/// The activation buffers of a step, with R = `Limits::rows`, C = rows of a chunk, S = `Limits::batch`, L = layers, Lr =
/// routed layers, cuts = sequence and chunk borders of a step.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// `[R, hidden]`, f32: the residual stream
    pub(crate) x: Mat,
    /// `[R, head_dim]`, f32: cosines and sines of each row's position
    pub(crate) angles: Mat,
    /// `[Lr·R, 1]`, f32: router logits by layer, those of a step together; kept so that a trace can read them afterwards
    pub(crate) gate: Mat,
    /// `[C, hidden]`: normalised rows
    pub(crate) h: Mat,
    /// `[C, heads·head_dim]`
    pub(crate) q: Mat,
    /// `[C, kv_heads·head_dim]`
    pub(crate) k: Mat,
    pub(crate) v: Mat,
    /// `[C, heads·head_dim]`
    pub(crate) attn: Mat,
    /// `[C, intermediate]`; lies over q, k, v, attn, which are dead by then
    pub(crate) act: Mat,
    /// [max(S, HEAD_ROWS), vocab], f32
    pub(crate) logits: Mat,
    /// `[logits rows, 1]`, f32
    pub(crate) logprobs: Mat,
    /// `[R]`
    pub(crate) ids: Ints,
    pub(crate) pos: Ints,
    pub(crate) row_slot: Ints,
    /// `[R]`: 0, 1, 2, …
    pub(crate) all: Ints,
    /// `[S + 1]`
    pub(crate) seq_start: Ints,
    /// `[S]`
    pub(crate) slots: Ints,
    /// `[cuts]`
    pub(crate) cuts: Ints,
    /// `[L·S]`: sequence-level decisions
    pub(crate) decided: Ints,
    /// `[L·cuts]`: active rows below each cut
    pub(crate) active_at: Ints,
    /// [(Lr + 1)·R]: active rows by routed layer; the last is for dense layers
    pub(crate) active: Ints,
    /// `[R]`
    pub(crate) first: Ints,
    pub(crate) end: Ints,
    pub(crate) kv_row: Ints,
    /// `[logits rows]`: the rows whose logits are wanted, and the tokens to score them for
    pub(crate) head_rows: Ints,
    pub(crate) targets: Ints,
    /// `[S · Draw::WORDS]`, and the tokens that were chosen, `[S]`
    pub(crate) draws: Ints,
    pub(crate) tokens: Ints,
}

/// Logits computed at a time when every position of a prompt is scored: enough rows to read the head's weight once for many.
const HEAD_ROWS: usize = 64;

/// What a run takes, in bytes, and where its buffers stand.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::memory::{Buffers, MemoryPlan, Size};
///
/// let bundle = Bundle::embedded()?;
/// let options = Options { batch: 4, context: Some(256), ..Options::default() };
/// let plan: MemoryPlan = Engine::plan_for(&bundle.config, &bundle.weights, None, &options)?;
/// assert_eq!((plan.limits.context, plan.kv_tokens(0, 1.0)), (256, Some(4 * 256)));
/// assert_eq!(plan.kv_tokens(4, 0.5), Some(4 * 256 * 8 / 6), "four of eight layers hold half");
/// assert_eq!(plan.total(), plan.weights + plan.activations() + plan.kv_bytes());
///
/// let buffers: Buffers = plan.buffers;
/// assert!(buffers.list().iter().map(|(_, bytes)| *bytes as u64).sum::<u64>() <= plan.activations());
/// buffers.list().iter().for_each(|(name, bytes)| println!("{name}: {}", Size(*bytes as u64)));
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    pub limits: Limits,
    /// Layers that may be routed.
    pub routed: usize,
    /// Bytes that may be used: by [`Limits::memory`], or what the device has free; None when that is not known.
    pub available: Option<u64>,
    pub weights: u64,
    /// The weights are pages of the mapped files.
    pub in_place: bool,
    /// The activation and integer arenas.
    pub arena: u64,
    pub ints: u64,
    /// What the backend needs besides.
    pub workspace: u64,
    pub kv: KvLayout,
    pub buffers: Buffers,
}

impl MemoryPlan {
    /// Sizes and places everything. The K/V pool holds a context for each sequence, or [`Limits::kv_tokens`] if that is less;
    /// where skipped rows write no K/V, one that does not fit at capacity 1 is made as large as there is room for.
    ///
    /// Errors: Argument for limits that make no sense; Memory when it does not fit, with the
    /// sizes and the knobs.
    pub(crate) fn new(config: &Config, routed: Routed, weights: u64, limits: Limits, be: &dyn Backend) -> Result<Self> {
        let device = be.info();
        let Limits { context, batch, rows, chunk, kv_tokens, memory } = limits;
        let kv_tokens = kv_tokens.unwrap_or(context);
        let sizes =
            [("context", context), ("batch", batch), ("rows", rows), ("chunk", chunk), ("kv_tokens", kv_tokens)];
        for (name, value) in sizes {
            if !(1..1 << 31).contains(&value) {
                return Err(
                    Error::new(Kind::Argument, format!("{name} is {value}")).action("give 1 or more, below 2^31")
                );
            }
        }
        if context > config.context {
            let cause = format!("a context of {context} tokens is longer than the model's {}", config.context);
            return Err(Error::new(Kind::Argument, cause).action("lower --context"));
        }
        let pages_per_seq = context.div_ceil(PAGE);
        let whole = batch.checked_mul(pages_per_seq);
        let pages = whole.and_then(|n| config.layers.checked_mul(limits.kv_pages(n)));
        let kv = KvLayout {
            layers: config.layers,
            slots: batch,
            // Page numbers are u32, and the books of an absurd pool would not fit either.
            pages: pages.filter(|&n| n < 1 << 31).ok_or_else(too_large)?,
            pages_per_seq,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            dtype: device.kv,
        };
        let mut place = Placer::default();
        let buffers =
            Buffers::place(config, routed.layers, limits, device.activations, &mut place).ok_or_else(too_large)?;
        let available = allowed(memory, device.free_memory);
        let (arena, ints) = (place.bytes as u64, (place.ints * 4) as u64);
        let largest = Largest {
            rows,
            chunk: buffers.h.rows,
            hidden: config.hidden,
            intermediate: config.intermediate,
            heads: config.heads,
            vocab: config.vocab,
        };
        let workspace = be.workspace(&largest, &kv)? as u64;
        let mut plan = MemoryPlan {
            limits,
            routed: routed.layers,
            available,
            weights,
            in_place: device.weights.is_none(),
            arena,
            ints,
            workspace,
            kv,
            buffers,
        };
        if let Some(available) = available {
            // Room for all that the dense layers keep, and the first page of the others; how much more they need is known
            // when they have decided.
            let full = (config.layers - routed.sparse_kv) * limits.kv_pages(batch * pages_per_seq);
            let least = full + routed.sparse_kv * batch;
            let room = available.saturating_sub(plan.total() - plan.kv_bytes()) / kv.page_bytes() as u64;
            if room >= least as u64 {
                plan.kv.pages = kv.pages.min(room as usize);
            }
        }
        if let Some(available) = available.filter(|&n| plan.total() > n) {
            return Err(Error::new(
                Kind::Memory,
                format!(
                    "{} are needed, {} may be used: {} weights, {} activations, {} K/V for {batch} x {context} tokens",
                    Size(plan.total()),
                    Size(available),
                    Size(plan.weights),
                    Size(plan.activations()),
                    Size(plan.kv_bytes()),
                ),
            )
            .action("raise --memory, or lower --context, --max-tokens, --kv-tokens, --chunk, --batch or the number of prompts"));
        }
        Ok(plan)
    }

    /// Bytes of the KV pool at capacity 1.
    pub fn kv_bytes(&self) -> u64 {
        self.kv.pages as u64 * self.kv.page_bytes() as u64
    }

    /// Tokens that the K/V pool holds when `routed` layers keep a share of their rows, all of them together; None: any number.
    pub fn kv_tokens(&self, routed: usize, capacity: f64) -> Option<u64> {
        let layers = self.kv.layers as f64 - routed as f64 * (1.0 - capacity);
        (layers > 0.0).then(|| ((self.kv.pages * PAGE) as f64 / layers) as u64)
    }

    /// Bytes of the arenas and the workspace.
    pub fn activations(&self) -> u64 {
        self.arena + self.ints + self.workspace
    }

    /// Bytes of everything together.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.activations()).saturating_add(self.kv_bytes())
    }
}

/// For people: what it takes on the first line, then what of.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits { context, batch, rows, chunk, .. } = self.limits;
        write!(f, "{} for {batch} x {context} tokens", Size(self.total()))?;
        if let Some(available) = self.available {
            write!(f, ", {} may be used", Size(available))?;
        }
        let mut line = |bytes: u64, what: &str| write!(f, "\n{:>9}  {what}", Size(bytes).to_string());
        line(self.weights, if self.in_place { "weights, in place in the mapped file" } else { "weights" })?;
        let rows = format!("activations, {rows} rows at once in chunks of {chunk}");
        line(self.activations() - self.workspace, &rows)?;
        if self.workspace > 0 {
            line(self.workspace, "workspace")?;
        }
        let (pages, page) = (self.kv.pages, Size(self.kv.page_bytes() as u64));
        let held = match self.limits.kv_tokens.and(self.kv_tokens(0, 1.0)) {
            Some(tokens) => format!(", for {tokens} tokens at a time"),
            None => String::new(),
        };
        line(self.kv_bytes(), &format!("K/V, {pages} pages of {page} in {}{held}", self.kv.dtype))
    }
}

/// Bytes that may be used, of those that are free; None: any number.
pub(crate) fn allowed(budget: Option<Budget>, free: Option<u64>) -> Option<u64> {
    match budget {
        Some(Budget::Bytes(bytes)) => Some(bytes),
        Some(Budget::Share(share)) => free.map(|free| (free as f64 * share) as u64),
        None => free,
    }
}

pub(crate) fn too_large() -> Error {
    Error::new(Kind::Memory, "the buffers of this run are too large to address")
        .action("lower --context, --chunk or the number of prompts")
}

/// Hands out places in the arenas, one after the other.
#[derive(Default)]
pub(crate) struct Placer {
    pub bytes: usize,
    pub ints: usize,
}

impl Placer {
    pub fn mat(&mut self, rows: usize, cols: usize, dtype: DType) -> Option<Mat> {
        let offset = self.bytes;
        let bytes = rows.checked_mul(cols)?.checked_mul(dtype.size())?.checked_next_multiple_of(ALIGN)?;
        self.bytes = offset.checked_add(bytes)?;
        Some(Mat { offset, rows, cols, dtype })
    }

    pub fn ints(&mut self, len: usize) -> Option<Ints> {
        let offset = self.ints;
        self.ints = offset.checked_add(len.checked_next_multiple_of(ALIGN / 4)?)?;
        Some(Ints { offset, len })
    }
}

impl Buffers {
    /// Sizes and places the buffers; None when a size overflows.
    fn place(c: &Config, routed: usize, limits: Limits, dtype: DType, at: &mut Placer) -> Option<Self> {
        let Limits { rows, batch, .. } = limits;
        let chunk = limits.chunk.min(rows).max(batch);
        let head_rows = batch.max(HEAD_ROWS.min(rows));
        let chunk = chunk.max(head_rows);
        let cuts = rows.div_ceil(limits.chunk).checked_add(batch)?;
        let (q_dim, kv_dim) = (c.q_rows(), c.kv_rows());

        let x = at.mat(rows, c.hidden, DType::F32)?;
        let angles = at.mat(rows, c.head_dim, DType::F32)?;
        let gate = at.mat(routed.checked_mul(rows)?, 1, DType::F32)?;
        let h = at.mat(chunk, c.hidden, dtype)?;
        let attention = at.bytes;
        let (q, k) = (at.mat(chunk, q_dim, dtype)?, at.mat(chunk, kv_dim, dtype)?);
        let (v, attn) = (at.mat(chunk, kv_dim, dtype)?, at.mat(chunk, q_dim, dtype)?);
        let end = std::mem::replace(&mut at.bytes, attention);
        let act = at.mat(chunk, c.intermediate, dtype)?;
        at.bytes = at.bytes.max(end);
        let logits = at.mat(head_rows, c.vocab, DType::F32)?;
        let logprobs = at.mat(head_rows, 1, DType::F32)?;
        Some(Buffers {
            x,
            angles,
            gate,
            h,
            q,
            k,
            v,
            attn,
            act,
            logits,
            logprobs,
            ids: at.ints(rows)?,
            pos: at.ints(rows)?,
            row_slot: at.ints(rows)?,
            all: at.ints(rows)?,
            seq_start: at.ints(batch + 1)?,
            slots: at.ints(batch)?,
            cuts: at.ints(cuts)?,
            decided: at.ints(c.layers.checked_mul(batch)?)?,
            active_at: at.ints(c.layers.checked_mul(cuts)?)?,
            active: at.ints((routed + 1).checked_mul(rows)?)?,
            first: at.ints(rows)?,
            end: at.ints(rows)?,
            kv_row: at.ints(rows)?,
            head_rows: at.ints(head_rows)?,
            targets: at.ints(head_rows)?,
            draws: at.ints(batch.checked_mul(Draw::WORDS)?)?,
            tokens: at.ints(batch)?,
        })
    }
}

impl Buffers {
    /// Names and bytes, for people. What shares its place is named together.
    pub fn list(&self) -> Vec<(&'static str, usize)> {
        let attention = [self.q, self.k, self.v, self.attn].map(Mat::bytes).iter().sum();
        let mats = [
            ("x", self.x),
            ("rope angles", self.angles),
            ("router logits", self.gate),
            ("h", self.h),
            ("logits", self.logits),
            ("logprobs", self.logprobs),
        ];
        let ints = [
            ("ids", self.ids),
            ("positions", self.pos),
            ("slots of rows", self.row_slot),
            ("row numbers", self.all),
            ("active rows", self.active),
            ("active counts", self.active_at),
            ("K/V ranges", Ints { offset: 0, len: self.first.len + self.end.len + self.kv_row.len }),
        ];
        let mut list: Vec<_> = mats.map(|(name, mat)| (name, mat.bytes())).to_vec();
        list.push(("q, k, v, attention / MLP", self.act.bytes().max(attention)));
        list.extend(ints.map(|(name, ints)| (name, ints.len * 4)));
        list
    }
}

/// A number of bytes, for people.
///
/// ```
/// assert_eq!(mindskip::memory::Size(3 << 29).to_string(), "1.5 GiB");
/// ```
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 999.5 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            _ if value < 9.95 => write!(f, "{value:.1} {}", UNITS[unit]),
            _ => write!(f, "{value:.0} {}", UNITS[unit]),
        }
    }
}

/// Parses a size, or a share of what is free: "90%".
///
/// ```
/// use mindskip::memory::{Budget, parse_budget};
///
/// assert_eq!(parse_budget("1.5G")?, Budget::Bytes(3 << 29));
/// assert_eq!(parse_budget("80%")?, Budget::Share(0.8));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn parse_budget(text: &str) -> Result<Budget> {
    let Some(percent) = text.trim().strip_suffix('%') else { return parse_size(text).map(Budget::Bytes) };
    match percent.trim().parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Budget::Share(percent / 100.0)),
        _ => Err(Error::new(Kind::Argument, format!("\"{text}\" is not a share of memory")).action("write 0% to 100%")),
    }
}

/// Parses "8GiB", "500M", "2g" or a plain number of bytes; K, M, G, T are powers of 1024.
fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::new(Kind::Argument, format!("\"{text}\" is not a size"))
            .action("write bytes, or a number with K, M, G or T: 8G")
    };
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let value: f64 = text[..split].trim().parse().map_err(|_| bad())?;
    let unit = text[split..].to_ascii_lowercase();
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    let limit = if shift == 0 { 1.8e19 } else { 1e9 };
    if !(0.0..limit).contains(&value) {
        return Err(bad());
    }
    Ok((value * (1u64 << shift) as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        assert_eq!(parse_size("8GiB").unwrap(), 8 << 30);
        assert_eq!(parse_size("1.5k").unwrap(), 1536);
        assert_eq!(parse_size("123456789012").unwrap(), 123456789012);
        for bad in ["", "x", "1Q", "-1", "nan", "inf", "1e30G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_budget("90 %").unwrap(), Budget::Share(0.9));
        assert_eq!(parse_budget("2k").unwrap(), Budget::Bytes(2048));
        for bad in ["%", "-1%", "101%", "nan%"] {
            assert!(parse_budget(bad).is_err(), "{bad}");
        }
        assert_eq!(Size(100).to_string(), "100 B");
        assert_eq!(Size(1536).to_string(), "1.5 KiB");
        assert_eq!(Size(270 << 20).to_string(), "270 MiB");
    }
}
