//! Calls to the C library, with arguments of which the bytes choose the right ones and wrong ones.
//!
//! Addresses are always those of as many values as they claim, as include/mindskip.h asks; all else may be wrong: handles that are
//! NULL, freed, of another kind or made up, sizes, counts, ids, words, the order of calls.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use mindskip_capi::*;

use super::draw::Draw;

/// Loads the model and its routers, makes an engine, opens two sequences, reads, decodes, generates, and frees.
pub const SEED: &[u8] = include_bytes!("calls.seed");

/// Makes routers, an engine and a batch of it, submits, steps, cancels, looks, and frees.
pub const BATCH_SEED: &[u8] = include_bytes!("batch.seed");

/// What calls have returned, live or freed.
#[derive(Default)]
struct Pool {
    models: Vec<*mut mindskip_model>,
    routers: Vec<*mut mindskip_routers>,
    engines: Vec<*mut mindskip_engine>,
    samplers: Vec<*mut mindskip_sampler>,
    batches: Vec<*mut mindskip_batch>,
    seqs: Vec<mindskip_seq>,
    requests: Vec<mindskip_request>,
}

/// The number of a model that stays from one run to the next, unless one frees it: loading takes longer than all else.
static MODEL: AtomicUsize = AtomicUsize::new(0);

fn kept_model() -> *mut mindskip_model {
    let mut model = ptr::without_provenance_mut(MODEL.load(Ordering::Relaxed));
    // SAFETY: all zeros are a value of it; then a struct of the size that it says, and a text and room for a handle.
    unsafe {
        let mut info: mindskip_model_info = std::mem::zeroed();
        info.size = size_of::<mindskip_model_info>();
        if mindskip_model_get_info(model, &mut info) != MINDSKIP_OK {
            assert!(ended(mindskip_model_load(c"stories".as_ptr(), &mut model)));
            MODEL.store(model.addr(), Ordering::Relaxed);
        }
    }
    model
}

/// Calls until the bytes are used up; frees everything but one model.
pub fn run(draw: &mut Draw) {
    let mut pool = Pool { models: vec![kept_model()], ..Pool::default() };
    for _ in 0..48 {
        if draw.is_over() {
            break;
        }
        pool.call(draw);
    }
    // Those that were freed before are refused, as are engines that were given to a batch.
    let batches = pool.batches.iter().map(|&batch| mindskip_batch_free(batch));
    let engines = pool.engines.iter().map(|&engine| mindskip_engine_free(engine));
    let samplers = pool.samplers.iter().map(|&sampler| mindskip_sampler_free(sampler));
    let routers = pool.routers.iter().map(|&routers| mindskip_routers_free(routers));
    let models = pool.models[1..].iter().map(|&model| mindskip_model_free(model));
    let statuses: Vec<i32> = batches.chain(engines).chain(samplers).chain(routers).chain(models).collect();
    assert!(statuses.iter().all(|status| [MINDSKIP_OK, MINDSKIP_ERROR_HANDLE].contains(status)), "{statuses:?}");
}

/// A call ends with a status that the header knows and, when it fails, a text.
fn ended(status: mindskip_status) -> bool {
    // SAFETY: a text of this thread, which calls nothing meanwhile.
    let text = unsafe { CStr::from_ptr(mindskip_error()) }.to_str().expect("UTF-8");
    assert!((MINDSKIP_OK..MINDSKIP_ERROR_PANIC).contains(&status), "status {status}: {text}");
    assert!(status == MINDSKIP_OK || !text.is_empty(), "status {status} without a text");
    status == MINDSKIP_OK
}

/// Mostly one of `own`, else one of another kind, NULL or none at all.
fn handle<T>(draw: &mut Draw, own: &[*mut T], others: &[usize]) -> *mut T {
    match draw.byte() {
        0..232 if !own.is_empty() => draw.pick(own),
        232..240 if !others.is_empty() => ptr::without_provenance_mut(draw.pick(others)),
        240..246 => ptr::without_provenance_mut(draw.pick(&[1, 15, 16, usize::MAX, 1 << 40])),
        _ => ptr::null_mut(),
    }
}

/// A size that says too much would have the library read what is not there, so none above that of the struct.
fn size<T>(draw: &mut Draw) -> usize {
    if draw.rarely() { draw.pick(&[0, 1, 7, 8, size_of::<T>() - 8, size_of::<T>() - 1]) } else { size_of::<T>() }
}

fn number(draw: &mut Draw) -> usize {
    draw.pick(&[0, 1, 2, 3, 7, 8, 60, 64, 65, 100, 1 << 20, 1 << 40, usize::MAX / 2, usize::MAX])
}

fn float(draw: &mut Draw) -> f32 {
    draw.pick(&[0.0, 0.5, 1.0, 0.25, -1.0, 2.0, 1e-30, 1e30, f32::NAN, f32::INFINITY, f32::NEG_INFINITY])
}

fn id(draw: &mut Draw) -> u32 {
    match draw.byte() {
        byte @ 0..250 => u32::from(byte) * 6,
        _ => draw.pick(&[1535, 1536, u32::MAX]),
    }
}

fn ids(draw: &mut Draw) -> Vec<u32> {
    (0..draw.below(10)).map(|_| id(draw)).collect()
}

/// A word of a list, or NULL, or one that is none.
fn word(draw: &mut Draw, words: &[&'static CStr]) -> *const c_char {
    match draw.byte() {
        0..128 => ptr::null(),
        128..240 => draw.pick(words).as_ptr(),
        240..248 => c"\xff".as_ptr(),
        _ => c"none".as_ptr(),
    }
}

/// Room for results, of which the library is told.
fn room(draw: &mut Draw) -> usize {
    draw.pick(&[0, 1, 4, 64, 4096])
}

/// How many there are, or rarely more than there can be.
fn count(draw: &mut Draw, n: usize) -> usize {
    if draw.byte() >= 248 { usize::MAX } else { n }
}

/// An address, or rarely NULL.
fn out<T>(draw: &mut Draw, at: &mut T) -> *mut T {
    if draw.byte() >= 248 { ptr::null_mut() } else { at }
}

impl Pool {
    /// The numbers of all handles.
    fn all(&self) -> Vec<usize> {
        let models = self.models.iter().map(|h| h.addr());
        let routers = self.routers.iter().map(|h| h.addr());
        let engines = self.engines.iter().map(|h| h.addr());
        let (samplers, batches) = (self.samplers.iter().map(|h| h.addr()), self.batches.iter().map(|h| h.addr()));
        models.chain(routers).chain(engines).chain(samplers).chain(batches).collect()
    }

    fn model(&self, draw: &mut Draw) -> *mut mindskip_model {
        handle(draw, &self.models, &self.all())
    }

    fn router(&self, draw: &mut Draw) -> *mut mindskip_routers {
        if draw.rarely() { ptr::null_mut() } else { handle(draw, &self.routers, &self.all()) }
    }

    fn engine(&self, draw: &mut Draw) -> *mut mindskip_engine {
        handle(draw, &self.engines, &self.all())
    }

    fn sampler(&self, draw: &mut Draw) -> *mut mindskip_sampler {
        if draw.rarely() { ptr::null_mut() } else { handle(draw, &self.samplers, &self.all()) }
    }

    fn batch(&self, draw: &mut Draw) -> *mut mindskip_batch {
        handle(draw, &self.batches, &self.all())
    }

    fn seq(&self, draw: &mut Draw) -> mindskip_seq {
        if draw.byte() < 248 && !self.seqs.is_empty() { draw.pick(&self.seqs) } else { draw.pick(&[0, 1, u64::MAX]) }
    }

    fn call(&mut self, draw: &mut Draw) {
        match draw.below(34) {
            0 | 1 => self.load(draw),
            2 => self.load_routers(draw),
            3 | 4 => self.make_engine(draw),
            5 | 6 => self.open(draw),
            7 | 8 => self.prefill(draw),
            9 | 10 => self.decode(draw),
            11 | 12 => self.generate(draw),
            13 => self.free(draw),
            14 => self.make_sampler(draw),
            15 => self.sample(draw),
            16 => self.tokenize(draw),
            17 => self.chat(draw),
            18 => self.plan(draw),
            19 => self.logprobs(draw),
            20 => self.stats(draw),
            21 => drop(ended(mindskip_engine_route(self.engine(draw), self.router(draw)))),
            22 => drop(ended(mindskip_seq_close(self.engine(draw), self.seq(draw)))),
            23 => drop(ended(mindskip_clear_stats(self.engine(draw)))),
            24 => self.describe(draw),
            25 => self.info(draw),
            26 => self.make_batch(draw),
            27 | 28 => self.submit(draw),
            29..32 => self.step(draw),
            32 => {
                let request = if draw.rarely() || self.requests.is_empty() { 0 } else { draw.pick(&self.requests) };
                ended(mindskip_batch_cancel(self.batch(draw), request));
            }
            _ => self.look(draw),
        }
    }

    fn load(&mut self, draw: &mut Draw) {
        if self.models.len() > 1 {
            return;
        }
        let name = match draw.byte() {
            0..240 => c"stories".as_ptr(),
            240..244 => c"".as_ptr(),
            244..248 => c"/no/such/folder".as_ptr(),
            248..252 => c"\xff".as_ptr(),
            _ => ptr::null(),
        };
        let mut model = ptr::null_mut();
        // SAFETY: a text, and room for a handle, or NULL.
        if ended(unsafe { mindskip_model_load(name, out(draw, &mut model)) }) {
            self.models.push(model);
        }
    }

    fn load_routers(&mut self, draw: &mut Draw) {
        let routing = mindskip_routing {
            size: size::<mindskip_routing>(draw),
            granularity: word(
                draw,
                &[c"attn_token", c"attn_sequence", c"mlp_token", c"block_token", c"block_sequence"],
            ),
            keys: word(draw, &[c"all", c"active"]),
            select: word(draw, &[c"threshold", c"topk"]),
            layers: word(draw, &[c"all", c"last:2", c"3,5", c"3-6", c"last:99", c"auto:2"]),
            threshold: float(draw),
            capacity: float(draw),
        };
        let routing = if draw.rarely() { ptr::null() } else { &raw const routing };
        let path = word(draw, &[c"/no/such/file", c"/", c"/dev/null"]);
        let mut routers = ptr::null_mut();
        // SAFETY: texts, a struct of the size that it says, and room for a handle, or NULL.
        if ended(unsafe { mindskip_routers_load(self.model(draw), path, routing, out(draw, &mut routers)) }) {
            self.routers.push(routers);
        }
    }

    /// Small, so that a call takes no more memory than the test allows.
    fn options(draw: &mut Draw) -> mindskip_options {
        mindskip_options {
            size: size::<mindskip_options>(draw),
            device: word(draw, &[c"cpu", c"auto", c"cuda", c"cuda:99"]),
            dtype: word(draw, &[c"f32", c"bf16"]),
            kv_dtype: word(draw, &[c"f32", c"f16", c"bf16"]),
            kernels: word(draw, &[c"auto", c"sm80", c"hopper"]),
            precision: word(draw, &[c"f32", c"bf16"]),
            memory: if draw.rarely() {
                draw.pick(&[c"0", c"5M", c"-1", c"G", c"1e99G"]).as_ptr()
            } else {
                c"16M".as_ptr()
            },
            threads: draw.pick(&[1, 2]),
            context: number(draw),
            batch: number(draw),
            rows: number(draw),
            chunk: number(draw),
            kv_tokens: number(draw),
        }
    }

    fn make_engine(&mut self, draw: &mut Draw) {
        if self.engines.len() > 2 {
            return;
        }
        let mut options = Self::options(draw);
        if !draw.rarely() {
            (options.context, options.batch) = (draw.pick(&[8, 64, 100]), 2);
            (options.rows, options.chunk) = (0, draw.pick(&[0, 1, 7]));
        }
        let mut engine = ptr::null_mut();
        // SAFETY: a struct of the size that it says, and room for a handle, or NULL.
        let status =
            unsafe { mindskip_engine_new(self.model(draw), self.router(draw), &options, out(draw, &mut engine)) };
        if ended(status) {
            self.engines.push(engine);
        }
    }

    fn open(&mut self, draw: &mut Draw) {
        let mut seq = 0;
        // SAFETY: room for a number, or NULL.
        if ended(unsafe { mindskip_seq_open(self.engine(draw), out(draw, &mut seq)) }) {
            assert!(!self.seqs.contains(&seq), "{seq} again");
            self.seqs.push(seq);
        }
    }

    fn prefill(&self, draw: &mut Draw) {
        let prompts: Vec<_> = (0..draw.below(3)).map(|_| (self.seq(draw), ids(draw))).collect();
        let list: Vec<_> = prompts
            .iter()
            .map(|(seq, ids)| mindskip_prompt { seq: *seq, tokens: ids.as_ptr(), count: ids.len() })
            .collect();
        let mut logits = ptr::dangling();
        let (engine, count, out) = (self.engine(draw), count(draw, list.len()), out(draw, &mut logits));
        // SAFETY: as many prompts and tokens as said, or more than there can be, and room for an address, or NULL.
        let status = unsafe { mindskip_prefill(engine, list.as_ptr(), count, out) };
        check_logits(ended(status), out, count);
    }

    fn decode(&self, draw: &mut Draw) {
        let steps: (Vec<_>, Vec<_>) = (0..draw.below(3)).map(|_| (self.seq(draw), id(draw))).unzip();
        let mut logits = ptr::dangling();
        let (engine, count, out) = (self.engine(draw), count(draw, steps.0.len()), out(draw, &mut logits));
        // SAFETY: as many sequences and tokens as said, or more than there can be, and room for an address, or NULL.
        let status = unsafe { mindskip_decode(engine, steps.0.as_ptr(), steps.1.as_ptr(), count, out) };
        check_logits(ended(status), out, count);
    }

    fn generate(&self, draw: &mut Draw) {
        let work: Vec<_> =
            (0..draw.below(3)).map(|_| (self.seq(draw), ids(draw), ids(draw), self.sampler(draw))).collect();
        let stop = stop_texts();
        let turns: Vec<_> =
            work.iter().map(|(seq, prompt, more, sampler)| turn(draw, *seq, prompt, more, *sampler, &stop)).collect();
        let engine = self.engine(draw);
        let mut caller = Caller { engine, left: draw.below(8) };
        let nothing = mindskip_answer {
            size: size::<mindskip_answer>(draw),
            text: ptr::null(),
            text_length: 0,
            tokens: ptr::null(),
            token_count: 0,
            read: 0,
            finish: -1,
        };
        let mut answers = vec![nothing; turns.len()];
        let on_text: mindskip_on_text = if draw.rarely() { None } else { Some(on_text) };
        let wanted = if draw.rarely() { ptr::null_mut() } else { answers.as_mut_ptr() };
        // SAFETY: as many turns and answers as said, with all they point to; the callback is given what it takes.
        let status = unsafe {
            mindskip_generate(engine, turns.as_ptr(), turns.len(), on_text, (&raw mut caller).cast::<c_void>(), wanted)
        };
        if ended(status) && !wanted.is_null() {
            for answer in &answers {
                // SAFETY: the library's, until the next call with the engine.
                let text = unsafe { CStr::from_ptr(answer.text) };
                assert!(text.to_bytes().len() <= answer.text_length && (0..5).contains(&answer.finish), "{text:?}");
                assert!(answer.read <= answer.token_count + 1);
            }
        }
    }

    fn make_batch(&mut self, draw: &mut Draw) {
        let mut batch = ptr::null_mut();
        let queue = draw.pick(&[0, 1, 3, usize::MAX]);
        // SAFETY: room for a handle, or NULL.
        if ended(unsafe { mindskip_batch_new(self.engine(draw), queue, out(draw, &mut batch)) }) {
            self.batches.push(batch);
        }
    }

    fn submit(&mut self, draw: &mut Draw) {
        let (prompt, more, stop) = (ids(draw), ids(draw), stop_texts());
        let sampler = self.sampler(draw);
        let mut turn = turn(draw, 0, &prompt, &more, sampler, &stop);
        if draw.rarely() {
            turn.seq = self.seq(draw);
        } else {
            turn.history_count = 0;
        }
        let mut request = 0;
        // SAFETY: a turn with all it points to, and room for a number, or NULL.
        if ended(unsafe { mindskip_batch_submit(self.batch(draw), &turn, out(draw, &mut request)) }) {
            assert!(!self.requests.contains(&request), "{request} again");
            self.requests.push(request);
        }
    }

    fn step(&self, draw: &mut Draw) {
        let batch = self.batch(draw);
        let (mut caller, mut left) = (Stepper { batch, unwanted: draw.below(8) }, 0);
        let call: mindskip_on_event = if draw.byte() >= 248 { None } else { Some(on_event) };
        for _ in 0..draw.below(6) {
            // SAFETY: the callback is given what it takes; room for a number, or NULL.
            let status = unsafe {
                let user = (&raw mut caller).cast::<c_void>();
                mindskip_batch_step(batch, call, user, out(draw, &mut left))
            };
            if ended(status) {
                assert!(left <= self.requests.len(), "{left} of {}", self.requests.len());
            }
        }
    }

    fn look(&self, draw: &mut Draw) {
        // SAFETY: all zeros are a value of it.
        let mut info: mindskip_batch_info = unsafe { std::mem::zeroed() };
        info.size = size::<mindskip_batch_info>(draw);
        // SAFETY: a struct of the size that it says, or NULL.
        if ended(unsafe { mindskip_batch_get_info(self.batch(draw), out(draw, &mut info)) }) {
            assert!(info.running + info.waiting <= self.requests.len() && info.kv_pages_used <= info.kv_pages);
            assert!(info.kv_rows <= info.kv_dense_rows && (0.0..=1.0).contains(&info.capacity));
        }
    }

    fn free(&self, draw: &mut Draw) {
        ended(match draw.below(5) {
            0 => mindskip_model_free(self.model(draw)),
            1 => mindskip_routers_free(self.router(draw)),
            2 => mindskip_engine_free(self.engine(draw)),
            3 => mindskip_batch_free(self.batch(draw)),
            _ => mindskip_sampler_free(self.sampler(draw)),
        });
    }

    fn make_sampler(&mut self, draw: &mut Draw) {
        let mut sampling = mindskip_sampling {
            size: size::<mindskip_sampling>(draw),
            temperature: 1.0,
            top_p: 0.0,
            min_p: 0.0,
            repetition_penalty: 0.0,
            top_k: draw.pick(&[0, 1, 5, usize::MAX]),
            seed: 7,
            sequence: u64::from(draw.byte()),
        };
        if draw.rarely() {
            (sampling.temperature, sampling.top_p) = (float(draw), float(draw));
            (sampling.min_p, sampling.repetition_penalty) = (float(draw), float(draw));
        }
        let mut sampler = ptr::null_mut();
        // SAFETY: a struct of the size that it says, and room for a handle, or NULL.
        if ended(unsafe { mindskip_sampler_new(&sampling, out(draw, &mut sampler)) }) {
            self.samplers.push(sampler);
        }
    }

    fn sample(&self, draw: &mut Draw) {
        let logits: Vec<f32> =
            (0..draw.below(12)).map(|_| if draw.rarely() { float(draw) } else { f32::from(draw.byte()) }).collect();
        let history: Vec<u32> = ids(draw).iter().map(|id| id / 60).collect();
        let mut token = u32::MAX;
        // SAFETY: as many numbers as said, and room for a token, or NULL.
        let status = unsafe {
            let (token, count) = (out(draw, &mut token), history.len());
            mindskip_sample(self.sampler(draw), logits.as_ptr(), logits.len(), history.as_ptr(), count, token)
        };
        if ended(status) {
            assert!(
                (token as usize) < logits.len() && logits[token as usize] > f32::NEG_INFINITY,
                "{token} of {logits:?}"
            );
        }
    }

    fn tokenize(&self, draw: &mut Draw) {
        let text = CString::new([b'O', b'n', b'c', b'e', b' ', draw.byte().max(1), draw.byte().max(1)]).unwrap();
        let (mut ids, mut length, capacity) = (vec![0u32; 4096], 0, room(draw));
        let model = self.model(draw);
        // SAFETY: a text, room for at least as many as said, and for the length, or NULL.
        let status = unsafe {
            mindskip_tokenize(
                model,
                text.as_ptr(),
                draw.byte().into(),
                ids.as_mut_ptr(),
                capacity,
                out(draw, &mut length),
            )
        };
        let mut count = 0;
        if ended(status) {
            assert!(length <= capacity);
            count = length;
        }
        ids[count] = id(draw);
        let mut text = vec![0 as c_char; 4096];
        // SAFETY: as many numbers as said, room for at least as many bytes, and for the length, or NULL.
        let status = unsafe {
            let (at, length) = (text.as_mut_ptr(), out(draw, &mut length));
            mindskip_detokenize(model, ids.as_ptr(), count + 1, draw.byte().into(), at, capacity, length)
        };
        if ended(status) {
            assert!(length < capacity && text[length] == 0);
        }
    }

    fn chat(&self, draw: &mut Draw) {
        let role = word(draw, &[c"user", c"assistant"]);
        let messages = [mindskip_message { role, content: word(draw, &[c"Hi", c""]) }];
        let (mut text, mut length, capacity) = (vec![0 as c_char; 4096], 0, room(draw));
        // SAFETY: a message, room for at least as many bytes as said, and for the length, or NULL.
        ended(unsafe {
            let (at, length) = (text.as_mut_ptr(), out(draw, &mut length));
            mindskip_chat(self.model(draw), messages.as_ptr(), draw.below(2), 1, at, capacity, length)
        });
    }

    fn plan(&self, draw: &mut Draw) {
        let options = Self::options(draw);
        let options = if draw.rarely() { ptr::null() } else { &raw const options };
        // SAFETY: all zeros are a value of it.
        let mut plan: mindskip_plan = unsafe { std::mem::zeroed() };
        plan.size = size::<mindskip_plan>(draw);
        let (mut text, mut length, capacity) = (vec![0 as c_char; 4096], 0, room(draw));
        let (plan, text, length) = (out(draw, &mut plan), text.as_mut_ptr(), out(draw, &mut length));
        // SAFETY: structs of the size that they say, room for as many bytes as said, and for the length, or NULL.
        ended(unsafe {
            if draw.rarely() {
                mindskip_engine_plan(self.engine(draw), plan, text, capacity, length)
            } else {
                mindskip_plan_for(self.model(draw), self.router(draw), options, plan, text, capacity, length)
            }
        });
    }

    fn logprobs(&self, draw: &mut Draw) {
        let (rows, targets): (Vec<_>, Vec<_>) =
            (0..draw.below(6)).map(|_| (u32::from(draw.byte() % 12), id(draw))).unzip();
        let mut logprobs = vec![f32::NAN; targets.len()];
        let rows = if draw.rarely() { ptr::null() } else { rows.as_ptr() };
        // SAFETY: as many numbers, and room for as many, as said.
        let status = unsafe {
            mindskip_logprobs(self.engine(draw), rows, targets.as_ptr(), targets.len(), logprobs.as_mut_ptr())
        };
        assert!(!ended(status) || logprobs.iter().all(|p| *p <= 0.0), "{logprobs:?}");
    }

    fn stats(&self, draw: &mut Draw) {
        // SAFETY: all zeros are a value of it.
        let mut stats: mindskip_stats = unsafe { std::mem::zeroed() };
        stats.size = size::<mindskip_stats>(draw);
        let engine = self.engine(draw);
        // SAFETY: a struct of the size that it says, or NULL.
        if ended(unsafe { mindskip_get_stats(engine, out(draw, &mut stats)) }) {
            assert!(
                (0.0..=1.0).contains(&stats.capacity) && stats.kv_rows <= stats.kv_dense_rows,
                "{}",
                stats.capacity
            );
        }
        let mut capacities = [f64::NAN; 64];
        let layers = draw.pick(&[8, 8, 0, 1, 64]);
        // SAFETY: room for at least as many.
        if ended(unsafe { mindskip_layer_capacities(engine, capacities.as_mut_ptr(), layers) }) {
            assert!(capacities[..layers].iter().all(|c| (0.0..=1.0).contains(c)), "{capacities:?}");
        }
    }

    fn describe(&self, draw: &mut Draw) {
        let engine = self.engine(draw);
        let (mut text, mut length, mut position) = (vec![0 as c_char; 4096], 0, 0);
        // SAFETY: room for at least as many bytes as said, and for the numbers, or NULL.
        unsafe {
            ended(mindskip_engine_device(engine, text.as_mut_ptr(), room(draw), out(draw, &mut length)));
            ended(mindskip_seq_position(engine, self.seq(draw), out(draw, &mut position)));
        }
    }

    fn info(&self, draw: &mut Draw) {
        let model = self.model(draw);
        // SAFETY: all zeros are a value of them.
        let (mut info, mut sampling): (mindskip_model_info, mindskip_sampling) = unsafe { std::mem::zeroed() };
        (info.size, sampling.size) = (size::<mindskip_model_info>(draw), size::<mindskip_sampling>(draw));
        // SAFETY: structs of the size that they say, or NULL.
        unsafe {
            ended(mindskip_model_get_info(model, out(draw, &mut info)));
            ended(mindskip_model_sampling(model, out(draw, &mut sampling)));
        }
    }
}

fn stop_texts() -> [*const c_char; 3] {
    [c"a".as_ptr(), c"Lily".as_ptr(), ptr::null()]
}

fn turn(
    draw: &mut Draw,
    seq: mindskip_seq,
    prompt: &[u32],
    more: &[u32],
    sampler: *mut mindskip_sampler,
    stop: &[*const c_char; 3],
) -> mindskip_turn {
    mindskip_turn {
        size: size::<mindskip_turn>(draw),
        seq,
        prompt: prompt.as_ptr(),
        prompt_count: prompt.len(),
        history: more.as_ptr(),
        history_count: more.len(),
        sampler,
        max_tokens: draw.pick(&[0, 1, 2, 5, usize::MAX]),
        eos: if draw.rarely() { more.as_ptr() } else { ptr::null() },
        eos_count: 0,
        stop: stop.as_ptr(),
        stop_count: draw.pick(&[0, 0, 1, 2, 3]),
    }
}

/// What the callback of steps is given.
struct Stepper {
    batch: *mut mindskip_batch,
    /// Events until one is cancelled; 0: none is.
    unwanted: usize,
}

unsafe extern "C" fn on_event(user: *mut c_void, event: *const mindskip_event) -> i32 {
    // SAFETY: what `step` gave, and the library's event, whose text ends with NUL, until this returns.
    let (caller, event, text, answer) = unsafe {
        let event = &*event;
        (&mut *user.cast::<Stepper>(), event, CStr::from_ptr(event.text), event.answer.as_ref())
    };
    let status = mindskip_batch_cancel(caller.batch, event.request);
    let fits = match event.kind {
        MINDSKIP_EVENT_TEXT => event.text_length > 0 && answer.is_none() && event.status == MINDSKIP_OK,
        MINDSKIP_EVENT_DONE => answer.is_some_and(|a| a.read <= a.token_count + 1) && event.status == MINDSKIP_OK,
        MINDSKIP_EVENT_FAILED => event.text_length > 0 && answer.is_none() && event.status > MINDSKIP_OK,
        _ => false,
    };
    // It must not unwind, so a wrong answer ends the process.
    if status != MINDSKIP_ERROR_BUSY || text.to_bytes().len() > event.text_length || !fits {
        eprintln!("an event of kind {}, status {}, and a call from the callback: {status}", event.kind, event.status);
        std::process::abort();
    }
    let unwanted = caller.unwanted == 1;
    caller.unwanted = caller.unwanted.saturating_sub(1);
    i32::from(unwanted)
}

/// What the callback is given.
struct Caller {
    engine: *mut mindskip_engine,
    /// Calls until it breaks off.
    left: usize,
}

unsafe extern "C" fn on_text(user: *mut c_void, _turn: usize, text: *const c_char, length: usize) -> i32 {
    // SAFETY: what `generate` gave, and the library's text.
    let (caller, text) = unsafe { (&mut *user.cast::<Caller>(), CStr::from_ptr(text)) };
    let mut seq = 0;
    // SAFETY: room for a number.
    let status = unsafe { mindskip_seq_open(caller.engine, &mut seq) };
    // It must not unwind, so a wrong answer ends the process.
    if status != MINDSKIP_ERROR_BUSY || text.to_bytes().len() > length {
        eprintln!("a call from the callback: status {status}");
        std::process::abort();
    }
    caller.left = caller.left.saturating_sub(1);
    i32::from(caller.left == 0)
}

/// The model's vocabulary has 1536 tokens.
fn check_logits(is_ok: bool, out: *mut *const f32, count: usize) {
    if out.is_null() {
        return;
    }
    // SAFETY: the caller's variable.
    let at = unsafe { *out };
    if !is_ok {
        assert!(at.is_null(), "logits after a failure");
        return;
    }
    // SAFETY: the library's, until the next call with the engine.
    let logits = unsafe { std::slice::from_raw_parts(at, count * 1536) };
    assert!(logits.iter().all(|x| x.is_finite()));
}
