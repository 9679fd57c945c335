//! Batches: requests that come and go in one engine.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mindskip::batch::{Batch, Event, Id};

use crate::args::{Out, grown, put};
use crate::engine::{Session, take};
use crate::failure::{Done, Failure, entry};
use crate::generate::{SAMPLERS, keep, to_request};
use crate::handles::{Table, alone};
use crate::model::Model;
use crate::types::*;

/// A batch with what C sees of it.
struct Served {
    batch: Batch,
    model: Arc<Model>,
    /// Requests whose end was not reported yet.
    open: BTreeMap<Id, mindskip_request>,
}

static BATCHES: Table<mindskip_batch, Mutex<Served>> = Table::new("a batch", "freed");
static NEXT_REQUEST: AtomicU64 = AtomicU64::new(1);

/// Works with a batch that no other call has.
fn with<R>(batch: *mut mindskip_batch, work: impl FnOnce(&mut Served) -> Done<R>) -> Done<R> {
    let batch = BATCHES.get(batch)?;
    work(&mut *alone(&batch, "the batch")?)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_batch_new(
    engine: *mut mindskip_engine,
    queue: usize,
    batch: *mut *mut mindskip_batch,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let out = unsafe { Out::new("batch", batch)? };
        let Session { engine, model, .. } = take(engine)?;
        let made = Batch::new(engine, &model.tokenizer);
        let batch = if queue == 0 { made } else { made.queue(queue) };
        out.set(BATCHES.add(Mutex::new(Served { batch, model, open: BTreeMap::new() })));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_batch_free(batch: *mut mindskip_batch) -> mindskip_status {
    entry(|| BATCHES.free(batch))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_batch_submit(
    batch: *mut mindskip_batch,
    turn: *const mindskip_turn,
    request: *mut mindskip_request,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (turn, out) = unsafe { (grown("turn", turn)?, Out::new("request", request)?) };
        if turn.seq != 0 || turn.history_count != 0 {
            return Err(Failure::argument("a batch opens its sequences itself: turn.seq and turn.history_count are 0"));
        }
        with(batch, |served| {
            let sampler = if turn.sampler.is_null() { None } else { Some(SAMPLERS.get(turn.sampler)?) };
            let sampler = sampler.as_ref().map(|sampler| alone(sampler, "the sampler")).transpose()?;
            // SAFETY: the header's rule.
            let request = unsafe { to_request(&turn, served.model.bundle.eos(), sampler.as_deref())? };
            let (id, number) = (served.batch.submit(request)?, NEXT_REQUEST.fetch_add(1, Ordering::Relaxed));
            served.open.insert(id, number);
            out.set(number);
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_batch_cancel(batch: *mut mindskip_batch, request: mindskip_request) -> mindskip_status {
    entry(|| {
        with(batch, |served| {
            let found = served.open.iter().find(|(_, number)| **number == request);
            let Some((&id, _)) = found else {
                return Err(Failure::argument(format!("request {request} has ended, or is not of this batch")));
            };
            served.batch.cancel(id)?;
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_batch_step(
    batch: *mut mindskip_batch,
    on_event: mindskip_on_event,
    user: *mut c_void,
    left: *mut usize,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let out = unsafe { Out::new("left", left)? };
        let Some(call) = on_event else { return Err(Failure::argument("on_event is NULL")) };
        with(batch, |served| {
            let mut unwanted = Vec::new();
            for event in served.batch.step()? {
                let (id, goes_on) = served.report(event, |event| {
                    // SAFETY: the header has the caller give a function of this type, which does not unwind.
                    unsafe { call(user, event) == 0 }
                });
                if !goes_on {
                    unwanted.push(id);
                }
            }
            // When all has been reported: nothing is lost if one cannot be ended.
            for id in unwanted {
                served.batch.cancel(id)?;
            }
            out.set(served.open.len());
            Ok(())
        })
    })
}

impl Served {
    /// Calls with an event as C sees it. Returns whose it is, and what was said to it.
    fn report(&mut self, event: Event, call: impl FnOnce(&mindskip_event) -> bool) -> (Id, bool) {
        let (id, kind, status, text, answer) = match event {
            Event::Text(id, text) => (id, MINDSKIP_EVENT_TEXT, MINDSKIP_OK, text, None),
            Event::Done(id, answer) => (id, MINDSKIP_EVENT_DONE, MINDSKIP_OK, String::new(), Some(answer)),
            Event::Failed(id, error) => {
                let Failure { status, text } = error.into();
                (id, MINDSKIP_EVENT_FAILED, status, text, None)
            }
        };
        let number = self.open[&id];
        if kind != MINDSKIP_EVENT_TEXT {
            self.open.remove(&id);
        }
        let mut kept = Vec::new();
        let size = size_of::<mindskip_answer>();
        let answer = answer.map(|answer| mindskip_answer { size, ..keep(&mut kept, answer) });
        let with_nul = [text.as_bytes(), b"\0"].concat();
        let goes_on = call(&mindskip_event {
            size: size_of::<mindskip_event>(),
            request: number,
            kind,
            status,
            text: with_nul.as_ptr().cast(),
            text_length: text.len(),
            answer: answer.as_ref().map_or(ptr::null(), ptr::from_ref),
        });
        (id, goes_on)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_batch_get_info(
    batch: *mut mindskip_batch,
    info: *mut mindskip_batch_info,
) -> mindskip_status {
    entry(|| {
        with(batch, |served| {
            let batch = &mut served.batch;
            let (running, waiting, timing, ended) =
                (batch.running(), batch.waiting(), batch.timing(), batch.kv_usage());
            let engine = batch.engine();
            let layers = engine.routing().map_or_else(Vec::new, |routing| routing.layers.clone());
            let value = mindskip_batch_info {
                size: 0,
                running,
                waiting,
                kv_pages: engine.plan().kv.pages as u64,
                kv_pages_used: engine.kv_usage()?.pages as u64,
                kv_rows: ended.rows as u64,
                kv_dense_rows: ended.dense_rows as u64,
                prompt_tokens: timing.prompt_tokens as u64,
                decoded_tokens: timing.decoded_tokens as u64,
                prefill_seconds: timing.prefill.as_secs_f64(),
                decode_seconds: timing.decode.as_secs_f64(),
                capacity: engine.activity()?.mean_capacity(&layers),
            };
            // SAFETY: the header's rule.
            unsafe { put("info", info, value) }
        })
    })
}
