//! Continuous batching: requests of any length share an engine; each begins as soon as there is room, and leaves at once.
//!
//! A request waits, oldest first, for a slot and for K/V pages (`batch` and `kv_tokens` of
//! [`Options`](crate::engine::Options)). A step reads at most `rows` tokens of prompts, longer ones in parts, so that the others go
//! on meanwhile; only where [whole prompts decide](crate::model::Routing::is_causal) each is read at once. When pages run out on
//! the way, the youngest gives its own back and waits again; later it reads its prompt and what it has made once more, and goes
//! on. On the CPU every request makes the tokens that it would make alone, to the bit of their logits.

use std::collections::VecDeque;
use std::slice;

use crate::backend::PAGE;
use crate::engine::{Engine, KvUsage, Seq};
use crate::error::{Error, Kind, Result};
use crate::generate::{Answer, Running, Timing, Turn, Work, advance};
use crate::model::Routing;
use crate::router::Select;
use crate::sample::{Sampler, SamplerSettings};
use crate::step::Phase;
use crate::tokenizer::Tokenizer;

/// What is asked for: a [`Turn`] of a sequence that the batch opens and closes.
///
/// ```
/// use mindskip::batch::Request;
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::generate::stream;
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let request = Request { max_tokens: 3, ..Request::new(tokenizer.encode("Tom had", true)?)? };
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let mut turns = [request.turn(engine.open()?)]; // without a batch
/// assert_eq!(stream(&mut engine, &tokenizer, &mut turns).count(), 3);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Request {
    /// Tokens to read; at least one.
    pub prompt: Vec<u32>,
    pub sampler: Sampler,
    /// Tokens to make at most.
    pub max_tokens: usize,
    /// Tokens that end the answer; they are not part of its text.
    pub eos: Vec<u32>,
    /// Texts that end the answer; it is cut off before the first of them.
    pub stop: Vec<String>,
}

impl Request {
    /// Greedy, 256 tokens, until the context is full. Errors: none, as the sampler's settings are in range.
    pub fn new(prompt: Vec<u32>) -> Result<Request> {
        let sampler = Sampler::new(SamplerSettings::default())?;
        Ok(Request { prompt, sampler, max_tokens: 256, eos: Vec::new(), stop: Vec::new() })
    }

    /// The same of an open sequence, without a batch.
    pub fn turn(self, seq: Seq) -> Turn {
        let Request { prompt, sampler, max_tokens, eos, stop } = self;
        Turn { seq, prompt, history: Vec::new(), sampler, max_tokens, eos, stop }
    }
}

impl From<Turn> for Request {
    fn from(turn: Turn) -> Request {
        let Turn { prompt, sampler, max_tokens, eos, stop, .. } = turn;
        Request { prompt, sampler, max_tokens, eos, stop }
    }
}

/// A request of a [`Batch`]; those that came later are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(u64);

/// What became of a request in a step. Its texts, joined, are that of its answer; after its answer or error nothing comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A piece that is certain, never empty: no broken characters, nothing of a stop text.
    Text(Id, String),
    /// It has come to its end.
    Done(Id, Answer),
    /// It cannot go on, which is no matter of the others: Memory when it does not fit into the KV cache by itself, Numeric when
    /// its logits are not numbers, Format when its tokens cannot be decoded, Argument when the engine was rerouted since and
    /// cannot read it any more.
    Failed(Id, Error),
}

/// Without a sequence, as it has not begun yet or gave it back.
struct Waiting {
    id: Id,
    request: Request,
    run: Running,
}

/// With a sequence.
struct Job {
    id: Id,
    turn: Turn,
    run: Running,
}

/// Serves requests with one engine; see the [module](self).
///
/// ```
/// use mindskip::batch::{Batch, Event, Request};
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let options = Options { batch: 2, kv_tokens: Some(512), ..Options::default() };
/// let mut batch = Batch::new(Engine::new(bundle.config, bundle.weights, None, &options)?, &tokenizer);
/// for text in ["Tom had a", "The dog", "Once upon a time"] {
///     batch.submit(Request { max_tokens: 20, ..Request::new(tokenizer.encode(text, true)?)? })?;
/// }
/// let mut answers = 0;
/// while !batch.is_idle() {
///     for event in batch.step()? {
///         match event {
///             Event::Text(id, text) => println!("{id:?}: {text}"),
///             Event::Done(_, answer) => answers += answer.tokens.len() / 20,
///             Event::Failed(_, error) => return Err(error),
///         }
///     }
/// }
/// assert_eq!(answers, 3);
/// # Ok::<(), mindskip::Error>(())
/// ```
///
/// Requests can be taken back:
///
/// ```
/// use mindskip::batch::{Batch, Event, Id, Request};
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
///
/// let bundle = Bundle::embedded()?;
/// let tokenizer = bundle.tokenizer()?;
/// let prompt = tokenizer.encode("Tom had a", true)?;
/// let engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let mut batch = Batch::new(engine, &tokenizer).queue(2);
/// let first: Id = batch.submit(Request::new(prompt.clone())?)?;
/// batch.submit(Request { max_tokens: 5, ..Request::new(prompt.clone())? })?;
/// assert!(batch.submit(Request::new(prompt.clone())?).is_err(), "two are waiting");
/// batch.step()?;
/// assert_eq!((batch.running(), batch.waiting()), (1, 1), "a batch of one");
/// assert!(batch.cancel(first)? && !batch.cancel(first)?);
/// let is_it = |event: &Event| matches!(event, Event::Done(id, answer) if *id == first && answer.tokens.len() == 1);
/// assert!(batch.step()?.iter().any(is_it));
/// while !batch.is_idle() {
///     batch.step()?;
/// }
/// assert_eq!((batch.timing().prompt_tokens, batch.engine().kv_usage()?.rows), (2 * prompt.len(), 0));
/// assert_eq!(batch.kv_usage().rows, 8 * (2 * prompt.len() + 4), "in eight layers, at their ends");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Batch {
    engine: Engine,
    tokenizer: Tokenizer,
    /// Oldest first, and all younger than those that run.
    waiting: VecDeque<Waiting>,
    /// Oldest first.
    running: Vec<Job>,
    /// What the next step reports.
    events: Vec<Event>,
    queue: usize,
    submitted: u64,
    /// Pages ran out: nobody begins before one ends.
    full: bool,
    timing: Timing,
    kv: KvUsage,
}

impl Batch {
    /// Serves with an engine in which no sequence is open; 1024 requests may wait.
    pub fn new(engine: Engine, tokenizer: &Tokenizer) -> Batch {
        Batch {
            engine,
            tokenizer: tokenizer.clone(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
            queue: 1024,
            submitted: 0,
            full: false,
            timing: Timing::default(),
            kv: KvUsage::default(),
        }
    }

    /// Lets so many requests wait.
    pub fn queue(self, most: usize) -> Batch {
        Batch { queue: most, ..self }
    }

    /// Takes a request; it begins in a later [`step`](Self::step).
    ///
    /// Errors: Argument for one that cannot run at all, an empty prompt, an id beyond the vocabulary, more tokens than the
    /// context takes, or than one prefill where prompts are read as a whole; Memory while as many wait as may.
    pub fn submit(&mut self, request: Request) -> Result<Id> {
        self.check_rows(request.prompt.len())?;
        self.engine.check_tokens(0, &request.prompt)?;
        if self.waiting.len() >= self.queue {
            return Err(Error::new(Kind::Memory, format!("{} requests are waiting", self.waiting.len()))
                .action("submit it again after some steps, or let more wait (Batch::queue)"));
        }
        let id = Id(self.submitted);
        self.submitted += 1;
        let run = Running::new(&self.tokenizer, request.max_tokens);
        self.waiting.push_back(Waiting { id, request, run });
        Ok(id)
    }

    /// Ends a request where it is, waiting or running, and gives its pages back: what was made is its answer, which the next
    /// step reports. False when it had ended before. Errors: Device.
    pub fn cancel(&mut self, id: Id) -> Result<bool> {
        if let Some(at) = self.waiting.iter().position(|waiting| waiting.id == id) {
            let Waiting { request, run, .. } = self.waiting.remove(at).expect("found there");
            self.interrupt(id, run, request.prompt.len());
            return Ok(true);
        }
        let Some(at) = self.running.iter().position(|job| job.id == id) else { return Ok(false) };
        let Job { turn, run, .. } = self.leave(at)?;
        self.interrupt(id, run, turn.prompt.len());
        Ok(true)
    }

    /// Takes a token for every request that runs and lets as many begin as there is room for. Returns what became of them.
    ///
    /// Errors: those that are not a single request's, such as Device, and Interrupted from [`Engine::watch`]. Nothing is lost:
    /// a further step goes on from there.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let decode: Vec<_> =
            self.running.iter().filter(|job| self.prefill_rows(job) == 0).map(|job| (job.id, 1)).collect();
        self.advance(Phase::Decode, &decode)?;
        self.admit()?;
        let mut prefill = Vec::new();
        let mut left = self.engine.plan().limits.rows;
        for job in &self.running {
            let wanted = self.prefill_rows(job);
            let whole = job.run.read == 0 && !self.reads_parts();
            let count = if whole && wanted > left { 0 } else { wanted.min(left) };
            left -= count;
            prefill.extend((count > 0).then_some((job.id, count)));
        }
        self.advance(Phase::Prefill, &prefill)?;
        Ok(std::mem::take(&mut self.events))
    }

    /// Whether no request is left, and nothing to report.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.events.is_empty()
    }

    /// Requests that wait for room.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that have a sequence.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// For its plan, its routing and what it counts. Sequences that are opened here take slots and pages from the batch.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Of all steps so far. What is read once more counts once more.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// What the requests that have ended held in the KV cache at their ends, together.
    pub fn kv_usage(&self) -> KvUsage {
        self.kv
    }

    /// Tokens that a request reads by prefill next; 0: it decodes.
    fn prefill_rows(&self, job: &Job) -> usize {
        let unread = job.run.unread(&job.turn).len();
        // Top-k treats a token differently in prefill and in decode: what was made is read again as it was made.
        let top_k = self.engine.routing().is_some_and(|routing| routing.settings.select == Select::TopK);
        let in_prompt = job.run.read < job.turn.prompt.len();
        if in_prompt || (unread > 1 && !top_k) { unread } else { 0 }
    }

    /// Whether a prompt may be read in parts: what is decided by it as a whole is decided once.
    fn reads_parts(&self) -> bool {
        self.engine.routing().is_none_or(Routing::is_causal)
    }

    /// Whether a prompt of so many tokens can be read.
    fn check_rows(&self, prompt: usize) -> Result<()> {
        if self.reads_parts() { Ok(()) } else { self.engine.check_rows(prompt) }
    }

    /// Lets requests begin, the oldest first, as long as there is room.
    fn admit(&mut self) -> Result<()> {
        if self.waiting.is_empty() || self.running.len() == self.engine.plan().limits.batch {
            return Ok(());
        }
        let shares = self.engine.kv_shares()?;
        let pages = |tokens: usize| -> usize {
            shares.iter().map(|share| ((tokens as f64 * share).ceil() as usize).div_ceil(PAGE)).sum()
        };
        let mut free = self.engine.plan().kv.pages - self.engine.kv_usage()?.pages;
        for job in &self.running {
            let (held, next) = (self.engine.position(job.turn.seq), job.turn.prompt.len() + job.run.tokens.len());
            free = free.saturating_sub(pages(next) - pages(held));
        }
        while let Some(next) = self.waiting.front() {
            let (id, prompt, made) = (next.id, next.request.prompt.len(), next.run.tokens.len());
            if let Err(e) = self.check_rows(prompt) {
                // The engine was rerouted since it came.
                self.waiting.pop_front();
                self.events.push(Event::Failed(id, e));
                continue;
            }
            let needed = pages(prompt + made + 1);
            // One alone is let in whatever it may need.
            if !self.running.is_empty() && (self.full || needed > free) {
                break;
            }
            let seq = match self.engine.open() {
                // No slot is left.
                Err(e) if e.kind() == Kind::Memory && !self.running.is_empty() => break,
                seq => seq?,
            };
            let Waiting { id, request, run } = self.waiting.pop_front().expect("the front one");
            self.running.push(Job { id, turn: request.turn(seq), run });
            free = free.saturating_sub(needed);
        }
        Ok(())
    }

    /// One step of those in `group`, by request and tokens to read, that run.
    fn advance(&mut self, phase: Phase, group: &[(Id, usize)]) -> Result<()> {
        loop {
            let (mut ids, mut works) = (Vec::new(), Vec::new());
            for Job { id, turn, run } in &mut self.running {
                if let Ok(at) = group.binary_search_by_key(id, |(id, _)| *id) {
                    ids.push(*id);
                    works.push(Work { turn, run, count: group[at].1 });
                }
            }
            if works.is_empty() {
                return Ok(());
            }
            match advance(&mut self.engine, &mut self.timing, phase, &mut works) {
                Ok(texts) => return ids.into_iter().zip(texts).try_for_each(|(id, text)| self.take(id, text)),
                Err(e) => match e.kind() {
                    Kind::Memory if self.running.len() > 1 => self.put_back()?,
                    // Whose logits they are shows when each runs by itself.
                    Kind::Numeric if ids.len() > 1 => {
                        return group.iter().try_for_each(|one| self.advance(phase, slice::from_ref(one)));
                    }
                    Kind::Memory | Kind::Numeric => self.fail(ids[0], e)?,
                    _ => return Err(e),
                },
            }
        }
    }

    /// Takes what a request made in a step.
    fn take(&mut self, id: Id, text: Result<String>) -> Result<()> {
        let text = match text {
            Ok(text) => text,
            Err(e) => return self.fail(id, e),
        };
        self.say(id, text);
        let at = self.find(id);
        if self.running[at].run.finish.is_some() {
            let Job { turn, run, .. } = self.leave(at)?;
            self.events.push(Event::Done(id, run.answer(turn.prompt.len())));
        }
        Ok(())
    }

    /// The youngest gives its pages back, and waits again.
    fn put_back(&mut self) -> Result<()> {
        let Job { id, turn, mut run } = self.running.pop().expect("several run");
        self.engine.close(turn.seq)?;
        run.read = 0;
        self.waiting.push_front(Waiting { id, request: turn.into(), run });
        self.full = true;
        Ok(())
    }

    fn fail(&mut self, id: Id, error: Error) -> Result<()> {
        self.leave(self.find(id))?;
        self.events.push(Event::Failed(id, error));
        Ok(())
    }

    fn find(&self, id: Id) -> usize {
        self.running.binary_search_by_key(&id, |job| job.id).expect("it runs")
    }

    /// A request that has ended gives its slot and its pages back.
    fn leave(&mut self, at: usize) -> Result<Job> {
        let seq = self.running[at].turn.seq;
        self.kv += self.engine.kv_usage_of(seq)?;
        self.engine.close(seq)?;
        self.full = false;
        Ok(self.running.remove(at))
    }

    fn interrupt(&mut self, id: Id, mut run: Running, prompt: usize) {
        match run.interrupt() {
            Ok(rest) => {
                self.say(id, rest);
                self.events.push(Event::Done(id, run.answer(prompt)));
            }
            Err(e) => self.events.push(Event::Failed(id, e)),
        }
    }

    fn say(&mut self, id: Id, text: String) {
        if !text.is_empty() {
            self.events.push(Event::Text(id, text));
        }
    }
}
