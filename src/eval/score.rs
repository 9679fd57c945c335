//! Log-likelihoods of requests. What requests have in common at their beginning is read once: the engine returns to it.
//!
//! Records take turns in a number of sequences, and a step reads the next choice of all of them. Where the router decides
//! for a whole prompt (by sequence, or by top-k), a decision would depend on what stands behind the common beginning, so
//! nothing is shared there: each request is a prompt of its own.

use std::ops::ControlFlow;

use super::request::Encoded;
use crate::engine::{Engine, Mark, Seq};
use crate::error::{Error, Kind, Result, ensure};
use crate::model::Routing;

/// What an engine must have room for.
///
/// ```
/// use mindskip::eval::Room;
///
/// let room = Room { batch: 32, context: 100, rows: 2048 };
/// assert_eq!(room.with_context(4096), Room { batch: 4, context: 4096, rows: 2048 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Sequences open at a time.
    pub batch: usize,
    /// Tokens of the longest request.
    pub context: usize,
    /// Tokens of a step.
    pub rows: usize,
}

impl Room {
    /// For longer prompts as well: fewer of them side by side, when they would take more K/V than was meant.
    pub fn with_context(self, context: usize) -> Room {
        Room { batch: self.batch.min((HELD / context.max(1)).max(1)), context, ..self }
    }
}

/// Beginnings of fewer tokens are not worth a step of their own.
const LEAST: usize = 8;
/// Tokens of a step; more are not faster.
const ROWS: usize = 2048;
/// Tokens that all sequences may hold together, and how many sequences there are at most.
const HELD: usize = 16_384;
const BATCH: usize = 32;

/// Requests, by what they have in common.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::eval::{Request, Work};
///
/// let tokenizer = Bundle::embedded()?.tokenizer()?;
/// let request = Request { context: "Tom had a red".into(), continuation: " ball".into() };
/// let encoded = request.encode(&tokenizer, 512)?;
/// let context = encoded.inputs().len();
/// let work = Work::new(&[("no description".into(), vec![encoded])], None);
/// assert_eq!(work.room().context, context, "what an engine must have room for");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Work {
    families: Vec<Family>,
    room: Room,
}

/// Records that begin alike, with the same description and shots.
struct Family {
    prefix: Vec<u32>,
    groups: Vec<Group>,
}

/// The requests of a record.
struct Group {
    /// Behind the family's.
    prefix: Vec<u32>,
    tails: Vec<Tail>,
}

/// What a request has for itself.
struct Tail {
    ids: Vec<u32>,
    /// Rows of `ids`, and the tokens behind them.
    targets: Vec<(usize, u32)>,
}

impl Work {
    /// Of the requests of each record. Consecutive records whose `before` is the same are taken for a family. `routing`
    /// decides whether anything may be shared.
    pub fn new(records: &[(String, Vec<Encoded>)], routing: Option<&Routing>) -> Work {
        let context = records.iter().flat_map(|(_, requests)| requests).map(|r| r.inputs().len()).max().unwrap_or(1);
        let room = Room { batch: (HELD / context).clamp(1, BATCH), context, rows: ROWS.max(context) };
        let shares = routing.is_none_or(Routing::is_causal);
        let families = records
            .chunk_by(|a, b| a.0 == b.0)
            .map(|records| {
                let groups: Vec<&[Encoded]> = records.iter().map(|(_, requests)| &requests[..]).collect();
                // Every sequence reads the family's beginning once.
                let worth = shares && groups.len() > room.batch;
                let prefix = if worth { common(groups.iter().copied().flatten()) } else { &[] };
                Family {
                    prefix: prefix.to_vec(),
                    groups: groups.iter().map(|g| Group::new(g, prefix.len(), shares)).collect(),
                }
            })
            .collect();
        Work { families, room }
    }

    /// What an engine must have room for.
    pub fn room(&self) -> Room {
        self.room
    }
}

/// The tokens with which all requests begin, as far as they are context of all, without the last of it, which the first
/// target stands behind. None if they are not worth it.
fn common<'a>(mut requests: impl Iterator<Item = &'a Encoded>) -> &'a [u32] {
    let Some(first) = requests.next() else { return &[] };
    let own = &first.ids[..first.context - 1];
    let same = |r: &Encoded, n: usize| own[..n].iter().zip(&r.ids[..r.context - 1]).take_while(|(a, b)| a == b).count();
    let n = requests.fold(own.len(), |n, r| same(r, n));
    if n < LEAST { &[] } else { &own[..n] }
}

impl Group {
    /// `done` tokens are the family's.
    fn new(requests: &[Encoded], done: usize, shares: bool) -> Group {
        let several = shares && requests.len() > 1;
        let shared = if several { common(requests.iter()).len().max(done) } else { done };
        let prefix = requests.first().map_or(Vec::new(), |first| first.ids[done..shared].to_vec());
        let tail = |r: &Encoded| Tail {
            ids: r.inputs()[shared..].to_vec(),
            targets: r.targets().map(|(row, id)| (row - shared, id)).collect(),
        };
        Group { prefix, tails: requests.iter().map(tail).collect() }
    }

    /// Rows that it adds to a step at most.
    fn rows(&self) -> usize {
        self.tails.iter().map(|tail| tail.ids.len()).chain([self.prefix.len()]).max().unwrap_or(0)
    }
}

/// The log-likelihood of every request, by record. `progress` is told how many requests are done and may break off.
///
/// Errors: Argument when the engine was built for less than [`Work::room`]; Interrupted; those of [`Engine::prefill`].
///
/// ```
/// use std::ops::ControlFlow;
///
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::eval::{Ask, Record, Room, TaskScore, Work, score};
///
/// let choices = vec!["went to the park.".into(), "was made of seven equations.".into()];
/// let ask = Ask::Choices { context: "Tom and his dog".into(), choices };
/// let records = [Record { id: None, description: String::new(), ask, gold: 0 }];
///
/// let bundle = Bundle::embedded()?;
/// let (tokenizer, room) = (bundle.tokenizer()?, bundle.config.context);
/// let encode = |record: &Record| {
///     let requests = record.requests("").into_iter().map(|request| request.encode(&tokenizer, room));
///     Ok((String::new(), requests.collect::<mindskip::Result<Vec<_>>>()?))
/// };
/// let requests = records.iter().map(encode).collect::<mindskip::Result<Vec<_>>>()?;
/// let work = Work::new(&requests, None);
/// let Room { batch, context, rows } = work.room();
/// let options = Options { batch, context: Some(context), rows: Some(rows), ..Options::default() };
/// let mut engine = Engine::new(bundle.config, bundle.weights, None, &options)?;
/// let found = score(&mut engine, &work, &mut |_| ControlFlow::Continue(()))?;
/// assert!(found[0][0] > found[0][1] + 10.0, "{found:?}");
/// assert_eq!(TaskScore::of("dogs", 0, 0, &records, &found).acc.mean, 1.0);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn score(
    engine: &mut Engine,
    work: &Work,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Vec<f64>>> {
    let limits = engine.plan().limits;
    let fits = limits.context >= work.room.context && limits.rows >= work.room.context;
    ensure!(fits, Argument, "requests of {} tokens, the engine has room for {}", work.room.context, limits.context);
    let mut found = Vec::new();
    let mut done = 0;
    for family in &work.families {
        let mut rest = &family.groups[..];
        let mut seqs = Vec::new();
        let result = loop {
            if rest.is_empty() {
                break Ok(());
            }
            let (wave, more) = rest.split_at(wave(rest, limits.batch, limits.rows));
            rest = more;
            let scored = open(engine, &mut seqs, wave.len(), &family.prefix)
                .and_then(|()| score_wave(engine, wave, &seqs, &mut done, progress));
            match scored {
                Ok(scored) => found.extend(scored),
                Err(e) => break Err(e),
            }
        };
        seqs.into_iter().try_for_each(|(seq, _)| engine.close(seq))?;
        result?;
    }
    Ok(found)
}

/// How many groups go together: no more than there are sequences, and than a step has rows for.
fn wave(groups: &[Group], batch: usize, rows: usize) -> usize {
    let mut sum = 0;
    let fits = |group: &&Group| {
        sum += group.rows();
        sum <= rows
    };
    groups.iter().take(batch).take_while(fits).count().max(1)
}

/// Opens sequences until there are `n`, each of which begins with a prefix.
fn open(engine: &mut Engine, seqs: &mut Vec<(Seq, Mark)>, n: usize, prefix: &[u32]) -> Result<()> {
    while seqs.len() < n {
        let seq = engine.open()?;
        seqs.push((seq, engine.mark(seq)?));
        if !prefix.is_empty() {
            engine.prefill(&[(seq, prefix)])?;
            seqs.last_mut().expect("pushed").1 = engine.mark(seq)?;
        }
    }
    Ok(())
}

/// Groups side by side, each in a sequence of its own, which are left as they were.
fn score_wave(
    engine: &mut Engine,
    wave: &[Group],
    seqs: &[(Seq, Mark)],
    done: &mut usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Vec<f64>>> {
    let begun: Vec<(Seq, &[u32])> = wave
        .iter()
        .zip(seqs)
        .filter(|(g, _)| !g.prefix.is_empty())
        .map(|(g, (seq, _))| (*seq, &g.prefix[..]))
        .collect();
    if !begun.is_empty() {
        engine.prefill(&begun)?;
    }
    let marks = seqs.iter().take(wave.len()).map(|(seq, _)| engine.mark(*seq)).collect::<Result<Vec<_>>>()?;
    let mut found: Vec<Vec<f64>> = wave.iter().map(|_| Vec::new()).collect();
    for choice in 0..wave.iter().map(|group| group.tails.len()).max().unwrap_or(0) {
        if progress(*done).is_break() {
            return Err(Error::new(Kind::Interrupted, "interrupted while scoring"));
        }
        let tails: Vec<_> = (0..wave.len()).filter_map(|i| Some((i, wave[i].tails.get(choice)?))).collect();
        let step: Vec<(Seq, &[u32])> = tails.iter().map(|(i, tail)| (seqs[*i].0, &tail.ids[..])).collect();
        engine.prefill(&step)?;
        let mut targets = Vec::new();
        let mut row = 0;
        for (_, tail) in &tails {
            targets.extend(tail.targets.iter().map(|&(at, id)| ((row + at) as u32, id)));
            row += tail.ids.len();
        }
        let logprobs = engine.logprobs_at(&targets)?;
        let mut rest = &logprobs[..];
        for (i, tail) in &tails {
            let (own, more) = rest.split_at(tail.targets.len());
            found[*i].push(own.iter().map(|&x| f64::from(x)).sum());
            rest = more;
            engine.rewind(marks[*i])?;
        }
        *done += tails.len();
    }
    // Whoever breaks off now has these.
    let _ = progress(*done);
    seqs.iter().take(wave.len()).try_for_each(|(_, mark)| engine.rewind(*mark))?;
    Ok(found)
}
