//! Engines: memory, sequences, steps and what was skipped.

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mindskip::engine::{Engine, Options, Seq};
use mindskip::memory::{MemoryPlan, parse_budget};

use crate::args::{Buffer, Out, grown, list, list_mut, put, text, word};
use crate::failure::{Done, Failure, entry};
use crate::handles::{Table, alone};
use crate::model::{MODELS, Model, routing};
use crate::types::*;

/// An engine with what C sees of it.
pub struct Session {
    pub engine: Engine,
    pub model: Arc<Model>,
    seqs: BTreeMap<mindskip_seq, Seq>,
    /// What `mindskip_answer`s point to: text with a NUL, and tokens.
    pub answers: Vec<(Vec<u8>, Vec<u32>)>,
}

static ENGINES: Table<mindskip_engine, Mutex<Session>> = Table::new("an engine", "freed or given to a batch");
static NEXT_SEQ: AtomicU64 = AtomicU64::new(1);

impl Session {
    pub fn seq(&self, number: mindskip_seq) -> Done<Seq> {
        let seq = self.seqs.get(&number).copied();
        seq.ok_or_else(|| Failure::argument(format!("sequence {number} is not open in this engine")))
    }
}

/// Works with an engine that no other call has.
pub fn with<R>(engine: *mut mindskip_engine, work: impl FnOnce(&mut Session) -> Done<R>) -> Done<R> {
    let engine = ENGINES.get(engine)?;
    work(&mut *alone(&engine, "the engine")?)
}

/// An engine for a batch; its handle is none from here on. Errors: HANDLE, BUSY; ARGUMENT while a sequence is open.
pub fn take(engine: *mut mindskip_engine) -> Done<Session> {
    let taken = ENGINES.take(engine, |session| match alone(session, "the engine")?.seqs.len() {
        0 => Ok(()),
        open => {
            Err(Failure::argument(format!("{open} sequences are open: close them before a batch takes the engine")))
        }
    })?;
    Ok(taken.into_inner().expect("not poisoned, as it was locked"))
}

/// The options of a pointer, which may be NULL.
///
/// # Safety
///
/// The rule of [`crate::args`].
unsafe fn options(at: *const mindskip_options) -> Done<Options> {
    if at.is_null() {
        return Ok(Options::default());
    }
    let given = |number: usize| Some(number).filter(|&number| number > 0);
    // SAFETY: the caller's.
    unsafe {
        let o = grown("options", at)?;
        Ok(Options {
            device: word("device", o.device)?.unwrap_or_default(),
            dtype: word("dtype", o.dtype)?,
            kv_dtype: word("kv_dtype", o.kv_dtype)?,
            kernels: word("kernels", o.kernels)?.unwrap_or_default(),
            precision: word("precision", o.precision)?.unwrap_or_default(),
            memory: text("memory", o.memory)?.map(parse_budget).transpose()?,
            threads: given(o.threads),
            context: given(o.context),
            batch: o.batch.max(1),
            rows: given(o.rows),
            chunk: given(o.chunk),
            kv_tokens: given(o.kv_tokens),
        })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_engine_new(
    model: *mut mindskip_model,
    routers: *mut mindskip_routers,
    options: *const mindskip_options,
    engine: *mut *mut mindskip_engine,
) -> mindskip_status {
    entry(|| {
        let (model, routing) = (MODELS.get(model)?, routing(routers)?);
        // SAFETY: the header's rule.
        let (options, out) = unsafe { (self::options(options)?, Out::new("engine", engine)?) };
        let (config, weights) = (model.bundle.config.clone(), model.bundle.weights.clone());
        let engine = Engine::new(config, weights, routing, &options)?;
        out.set(ENGINES.add(Mutex::new(Session { engine, model, seqs: BTreeMap::new(), answers: Vec::new() })));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_engine_free(engine: *mut mindskip_engine) -> mindskip_status {
    entry(|| ENGINES.free(engine))
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_engine_route(
    engine: *mut mindskip_engine,
    routers: *mut mindskip_routers,
) -> mindskip_status {
    entry(|| with(engine, |session| Ok(session.engine.reroute(routing(routers)?)?)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_engine_device(
    engine: *mut mindskip_engine,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let out = unsafe { Buffer::new("text", text, capacity, length)? };
        with(engine, |session| out.fill_text(&session.engine.device().name))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_plan_for(
    model: *mut mindskip_model,
    routers: *mut mindskip_routers,
    options: *const mindskip_options,
    plan: *mut mindskip_plan,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mindskip_status {
    entry(|| {
        let (model, routing) = (MODELS.get(model)?, routing(routers)?);
        // SAFETY: the header's rule.
        let options = unsafe { self::options(options)? };
        let (config, weights) = (&model.bundle.config, &model.bundle.weights);
        let made = Engine::plan_for(config, weights, routing.as_ref(), &options)?;
        // SAFETY: the header's rule.
        unsafe { put_plan(&made, plan, text, capacity, length) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_engine_plan(
    engine: *mut mindskip_engine,
    plan: *mut mindskip_plan,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mindskip_status {
    // SAFETY: the header's rule.
    entry(|| with(engine, |session| unsafe { put_plan(session.engine.plan(), plan, text, capacity, length) }))
}

/// # Safety
///
/// The rule of [`crate::args`].
unsafe fn put_plan(
    made: &MemoryPlan,
    plan: *mut mindskip_plan,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Done {
    let limits = &made.limits;
    let value = mindskip_plan {
        size: 0,
        total: made.total(),
        weights: made.weights,
        activations: made.activations(),
        kv: made.kv_bytes(),
        kv_pages: made.kv.pages as u64,
        kv_page_bytes: made.kv.page_bytes() as u64,
        available: made.available.unwrap_or(u64::MAX),
        context: limits.context,
        batch: limits.batch,
        rows: limits.rows,
        chunk: limits.chunk,
    };
    // SAFETY: the caller's.
    unsafe {
        if !plan.is_null() {
            put("plan", plan, value)?;
        }
        if !text.is_null() || !length.is_null() {
            Buffer::new("text", text, capacity, length)?.fill_text(&made.to_string())?;
        }
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_seq_open(engine: *mut mindskip_engine, seq: *mut mindskip_seq) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let out = unsafe { Out::new("seq", seq)? };
        with(engine, |session| {
            let (number, opened) = (NEXT_SEQ.fetch_add(1, Ordering::Relaxed), session.engine.open()?);
            session.seqs.insert(number, opened);
            out.set(number);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_seq_close(engine: *mut mindskip_engine, seq: mindskip_seq) -> mindskip_status {
    entry(|| {
        with(engine, |session| {
            session.engine.close(session.seq(seq)?)?;
            session.seqs.remove(&seq);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_seq_position(
    engine: *mut mindskip_engine,
    seq: mindskip_seq,
    position: *mut usize,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let out = unsafe { Out::new("position", position)? };
        with(engine, |session| {
            out.set(session.engine.position(session.seq(seq)?));
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_prefill(
    engine: *mut mindskip_engine,
    prompts: *const mindskip_prompt,
    count: usize,
    logits: *mut *const f32,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (out, prompts) = unsafe {
            let out = to_logits(logits)?;
            let prompts: Done<Vec<_>> = list("prompts", prompts, count)?
                .iter()
                .map(|prompt| Ok((prompt.seq, list("tokens", prompt.tokens, prompt.count)?)))
                .collect();
            (out, prompts?)
        };
        with(engine, |session| {
            let steps: Done<Vec<_>> = prompts.iter().map(|&(seq, ids)| Ok((session.seq(seq)?, ids))).collect();
            set_logits(out, session.engine.prefill(&steps?)?);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_decode(
    engine: *mut mindskip_engine,
    seqs: *const mindskip_seq,
    tokens: *const u32,
    count: usize,
    logits: *mut *const f32,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (out, seqs, tokens) =
            unsafe { (to_logits(logits)?, list("seqs", seqs, count)?, list("tokens", tokens, count)?) };
        with(engine, |session| {
            let steps: Done<Vec<_>> = seqs.iter().zip(tokens).map(|(&s, &id)| Ok((session.seq(s)?, id))).collect();
            set_logits(out, session.engine.decode(&steps?)?);
            Ok(())
        })
    })
}

/// Where the address of logits goes, if anywhere; NULL until there are any.
///
/// # Safety
///
/// The rule of [`crate::args`].
unsafe fn to_logits(at: *mut *const f32) -> Done<Option<Out<*const f32>>> {
    if at.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's.
    unsafe {
        Out::new("logits", at)?.set(ptr::null());
        Out::new("logits", at).map(Some)
    }
}

/// The engine keeps them until its next step.
fn set_logits(out: Option<Out<*const f32>>, logits: &[f32]) {
    if let Some(out) = out {
        out.set(logits.as_ptr());
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_logprobs(
    engine: *mut mindskip_engine,
    rows: *const u32,
    targets: *const u32,
    count: usize,
    logprobs: *mut f32,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (rows, targets, out) = unsafe {
            let rows = if rows.is_null() { None } else { Some(list("rows", rows, count)?) };
            (rows, list("targets", targets, count)?, list_mut("logprobs", logprobs, count)?)
        };
        let row = |i: usize| rows.map_or(i as u32, |rows| rows[i]);
        let wanted: Vec<_> = targets.iter().enumerate().map(|(i, &target)| (row(i), target)).collect();
        with(engine, |session| {
            write(out, session.engine.logprobs_at(&wanted)?);
            Ok(())
        })
    })
}

fn write<T: Copy>(out: &mut [MaybeUninit<T>], values: impl IntoIterator<Item = T>) {
    for (out, value) in out.iter_mut().zip(values) {
        out.write(value);
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_get_stats(
    engine: *mut mindskip_engine,
    stats: *mut mindskip_stats,
) -> mindskip_status {
    entry(|| {
        with(engine, |session| {
            let layers = session.engine.routing().map_or_else(Vec::new, |routing| routing.layers.clone());
            let (activity, kv) = (session.engine.activity()?.clone(), session.engine.kv_usage()?);
            let value = mindskip_stats {
                size: 0,
                tokens: activity.tokens,
                routed_layers: layers.len(),
                capacity: activity.mean_capacity(&layers),
                kv_rows: kv.rows as u64,
                kv_dense_rows: kv.dense_rows as u64,
                kv_bytes: kv.bytes,
                kv_dense_bytes: kv.dense_bytes,
                kv_saved_bytes: kv.dense_bytes.saturating_sub(kv.bytes),
            };
            // SAFETY: the header's rule.
            unsafe { put("stats", stats, value) }
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_layer_capacities(
    engine: *mut mindskip_engine,
    capacities: *mut f64,
    layers: usize,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let out = unsafe { list_mut("capacities", capacities, layers)? };
        with(engine, |session| {
            let activity = session.engine.activity()?;
            if layers != activity.active.len() {
                let text = format!("{layers} layers, where the model has {}", activity.active.len());
                return Err(Failure::argument(text));
            }
            write(out, (0..layers).map(|layer| activity.capacity(layer)));
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_clear_stats(engine: *mut mindskip_engine) -> mindskip_status {
    entry(|| with(engine, |session| Ok(session.engine.clear_counts()?)))
}
