//! Requests that share an engine get what they get alone, whoever comes and goes, and whatever runs out.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::*;
use mindskip::batch::{Batch, Event, Id, Request};
use mindskip::bundle::Bundle;
use mindskip::engine::{KvUsage, Options, Seq};
use mindskip::generate::{Answer, Finish};
use mindskip::model::Routing;
use mindskip::router::{Granularity, Keys, RouterSettings, Select};
use mindskip::sample::{Sampler, SamplerSettings};
use mindskip::tokenizer::Tokenizer;
use mindskip::{Error, Kind};

const VOCAB: usize = 192;
const CONTEXT: usize = 96;

fn folder() -> PathBuf {
    goldens().join("routing/model")
}

fn tokenizer() -> Tokenizer {
    Bundle::embedded().unwrap().tokenizer().unwrap()
}

/// Routers that divide tokens and sequences.
fn routed(granularity: &str, keys: Keys, select: Select) -> Routing {
    let granularity = granularity.parse().unwrap();
    let settings = RouterSettings { granularity, keys, select, ..RouterSettings::default() };
    routing(&goldens().join("routing/routers/bare.safetensors"), settings)
}

/// In every way.
fn all_routings() -> Vec<Routing> {
    let mut all = Vec::new();
    for name in Granularity::NAMES {
        for keys in [Keys::All, Keys::Active] {
            all.extend([Select::Threshold, Select::TopK].map(|select| routed(name, keys, select)));
        }
    }
    all
}

/// Lengths, sampling and, for one in four, a penalty that the logits have to come to the host for.
fn request(number: u64) -> Request {
    let drawn = ids(2, 1 << 20, number);
    let repetition_penalty = if number % 4 == 3 { 1.2 } else { 1.0 };
    let settings = SamplerSettings { temperature: 1.2, repetition_penalty, seed: number, ..SamplerSettings::default() };
    Request {
        sampler: Sampler::for_sequence(settings, number).unwrap(),
        max_tokens: 1 + drawn[1] as usize % 40,
        eos: vec![7],
        ..Request::new(ids(1 + drawn[0] as usize % 55, VOCAB, number + 100)).unwrap()
    }
}

/// What came of the requests of a batch: each ends once, and its pieces are the text of its answer.
#[derive(Default)]
struct Ended {
    answers: BTreeMap<Id, Result<Answer, Error>>,
    texts: BTreeMap<Id, String>,
}

impl Ended {
    fn take(&mut self, events: Vec<Event>) {
        for event in events {
            let (id, answer) = match event {
                Event::Text(id, text) => {
                    assert!(!text.is_empty() && !self.answers.contains_key(&id), "{id:?}: {text:?}");
                    self.texts.entry(id).or_default().push_str(&text);
                    continue;
                }
                Event::Done(id, answer) => {
                    assert_eq!(self.texts.remove(&id).unwrap_or_default(), answer.text, "{id:?}");
                    (id, Ok(answer))
                }
                Event::Failed(id, error) => (id, Err(error)),
            };
            assert!(self.answers.insert(id, answer).is_none(), "{id:?} ends twice");
        }
    }
}

fn run(batch: &mut Batch) -> Ended {
    let mut ended = Ended::default();
    run_on(batch, &mut ended);
    ended
}

fn run_on(batch: &mut Batch, ended: &mut Ended) {
    for step in 0.. {
        if batch.is_idle() {
            break;
        }
        assert!(step < 1000, "{} requests run and {} wait without an end", batch.running(), batch.waiting());
        ended.take(batch.step().unwrap());
    }
}

/// Requests that arrive over time, at four slots and half the pages that they would take, so that some give theirs back and
/// begin again: the same tokens, text and K/V as alone.
#[test]
fn every_answer_is_that_of_running_alone() {
    let tokenizer = tokenizer();
    let mut routings: Vec<_> = all_routings().into_iter().map(Some).collect();
    routings.push(None);
    let requests: Vec<_> = (0..12).map(request).collect();
    let small = Options { kv_tokens: Some(192), rows: Some(70), chunk: Some(16), ..options(4, CONTEXT) };
    let mut again = 0;
    for routing in routings {
        let what = format!("{:?}", routing.as_ref().map(|r| r.settings));
        let mut lone = engine(&folder(), routing.clone(), &options(1, CONTEXT));
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut lone, &tokenizer, request)).collect();

        let mut batch = Batch::new(engine(&folder(), routing, &small), &tokenizer);
        let (mut ended, mut asked) = (Ended::default(), Vec::new());
        for step in 0.. {
            if step % 3 == 0 && asked.len() < requests.len() {
                let count = (1 + step % 4).min(requests.len() - asked.len());
                asked.extend(requests[asked.len()..][..count].iter().map(|r| batch.submit(r.clone()).unwrap()));
            }
            ended.take(batch.step().unwrap());
            assert!(batch.running() <= 4);
            if asked.len() == requests.len() && batch.is_idle() {
                break;
            }
        }
        let mut held = KvUsage::default();
        for (i, (id, (answer, usage))) in asked.iter().zip(&expected).enumerate() {
            assert_eq!(ended.answers[id].as_ref(), Ok(answer), "{what}, request {i}");
            held += *usage;
        }
        assert_eq!(batch.kv_usage(), held, "{what}");
        assert_eq!(batch.engine().kv_usage().unwrap(), KvUsage::default(), "{what}");
        again += batch.timing().prompt_tokens - requests.iter().map(|r| r.prompt.len()).sum::<usize>();
    }
    assert!(again > 1000, "pages are to run out, so that requests begin again: {again}");
}

/// Sequences that come and go between steps have the logits of each alone, to the bit.
#[test]
fn logits_do_not_tell_who_else_is_there() {
    for routing in all_routings() {
        let what = format!("{:?}", routing.settings);
        let prompts: Vec<_> = (0..9).map(|i| ids(1 + (i * 29) % 60, VOCAB, i as u64)).collect();
        let steps: Vec<_> = (0..9).map(|i| ids(2 + (i * 5) % 9, VOCAB, 50 + i as u64)).collect();
        let mut lone = engine(&folder(), Some(routing.clone()), &options(1, CONTEXT));
        let expected: Vec<Vec<Vec<f32>>> = prompts
            .iter()
            .zip(&steps)
            .map(|(prompt, steps)| {
                let seq = lone.open().unwrap();
                let mut rows = vec![lone.prefill(&[(seq, prompt)]).unwrap().to_vec()];
                rows.extend(steps.iter().map(|&id| lone.decode(&[(seq, id)]).unwrap().to_vec()));
                lone.close(seq).unwrap();
                rows
            })
            .collect();

        let mut shared = engine(&folder(), Some(routing), &Options { chunk: Some(16), ..options(4, CONTEXT) });
        // Of each: its sequence, and how many steps it has made.
        let mut open: Vec<(usize, Seq, usize)> = Vec::new();
        let mut waiting = 0..prompts.len();
        while !waiting.is_empty() || !open.is_empty() {
            let count = (1 + waiting.start % 2).min(4 - open.len()).min(waiting.len());
            let new: Vec<_> = waiting.by_ref().take(count).map(|i| (i, shared.open().unwrap(), 0)).collect();
            if !open.is_empty() {
                let tokens: Vec<_> = open.iter().map(|&(i, seq, made)| (seq, steps[i][made])).collect();
                let logits = shared.decode(&tokens).unwrap().to_vec();
                for ((i, _, made), logits) in open.iter_mut().zip(logits.chunks(VOCAB)) {
                    *made += 1;
                    assert_bits(&format!("{what}, sequence {i}, step {made}"), logits, &expected[*i][*made]);
                }
            }
            if !new.is_empty() {
                let inputs: Vec<_> = new.iter().map(|&(i, seq, _)| (seq, &prompts[i][..])).collect();
                let logits = shared.prefill(&inputs).unwrap().to_vec();
                for (&(i, ..), logits) in new.iter().zip(logits.chunks(VOCAB)) {
                    assert_bits(&format!("{what}, prompt {i}"), logits, &expected[i][0]);
                }
            }
            open.extend(new);
            open.retain(|&(i, seq, made)| {
                let goes_on = made < steps[i].len();
                if !goes_on {
                    shared.close(seq).unwrap();
                }
                goes_on
            });
        }
        assert_eq!(shared.kv_usage().unwrap(), KvUsage::default(), "{what}");
    }
}

/// A prompt that is longer than a step reads comes in parts, and those that decode make a token meanwhile in every step. Behind each of
/// its tokens are the logits of reading it alone and at once, to the bit.
#[test]
fn a_long_prompt_is_read_beside_those_that_decode() {
    let tokenizer = tokenizer();
    let mut routings = vec![None];
    for name in ["attn_token", "block_token"] {
        routings.extend([Keys::All, Keys::Active].map(|keys| Some(routed(name, keys, Select::Threshold))));
    }
    let greedy =
        |prompt: usize, max_tokens| Request { max_tokens, ..Request::new(ids(prompt, VOCAB, prompt as u64)).unwrap() };
    let targets = |rows: usize| (0..rows as u32).map(|row| (row, 3)).collect::<Vec<_>>();
    let small = Options { rows: Some(16), chunk: Some(8), ..options(3, CONTEXT) };
    for routing in routings {
        let what = format!("{:?}", routing.as_ref().map(|r| r.settings));
        let requests = [greedy(5, 30), greedy(9, 25), greedy(65, 6)];
        let long = &requests[2].prompt;
        let mut lone = engine(&folder(), routing.clone(), &options(1, CONTEXT));
        let seq = lone.open().unwrap();
        lone.prefill(&[(seq, long)]).unwrap();
        let expected = lone.logprobs_at(&targets(long.len())).unwrap();
        lone.close(seq).unwrap();

        let mut batch = Batch::new(engine(&folder(), routing, &small), &tokenizer);
        let mut ended = Ended::default();
        let mut asked: Vec<_> = requests[..2].iter().map(|request| batch.submit(request.clone()).unwrap()).collect();
        ended.take(batch.step().unwrap());
        asked.push(batch.submit(requests[2].clone()).unwrap());
        let mut read = 0;
        while read < long.len() {
            let before = batch.timing();
            ended.take(batch.step().unwrap());
            let now = batch.timing();
            let (part, decoded) =
                (now.prompt_tokens - before.prompt_tokens, now.decoded_tokens - before.decoded_tokens);
            assert_eq!((part, decoded), (16.min(long.len() - read), 2), "{what}");
            let logprobs = batch.engine().logprobs_at(&targets(part)).unwrap();
            assert_bits(&format!("{what} from {read}"), &logprobs, &expected[read..][..part]);
            read += part;
        }
        run_on(&mut batch, &mut ended);
        for (id, request) in asked.iter().zip(&requests) {
            assert_eq!(ended.answers[id].as_ref(), Ok(&alone(&mut lone, &tokenizer, request).0), "{what}");
        }
    }
}

/// One that waits while the engine is rerouted, and is too long to be decided as a whole, fails by itself.
#[test]
fn what_cannot_run_any_more_fails_by_itself() {
    let tokenizer = tokenizer();
    let by_sequence = routed("attn_sequence", Keys::All, Select::Threshold);
    let mut lone = engine(&folder(), Some(by_sequence.clone()), &options(1, CONTEXT));
    let small = Options { rows: Some(60), ..options(1, CONTEXT) };
    let mut batch = Batch::new(engine(&folder(), Some(by_sequence.clone()), &small), &tokenizer);
    batch.engine().reroute(None).unwrap();
    let requests = [61, 60].map(|n| Request { max_tokens: 4, ..Request::new(ids(n, VOCAB, n as u64)).unwrap() });
    let [long, fits] = requests.each_ref().map(|request| batch.submit(request.clone()).unwrap());
    batch.engine().reroute(Some(by_sequence)).unwrap();
    let ended = run(&mut batch);
    assert_eq!(ended.answers[&long].as_ref().unwrap_err().kind(), Kind::Argument);
    assert_eq!(ended.answers[&fits].as_ref(), Ok(&alone(&mut lone, &tokenizer, &requests[1]).0));
}

/// What cannot run is refused at once, in the engine's words, and so is what the queue has no room for.
#[test]
fn what_cannot_run_is_refused_at_once() {
    let options = Options { rows: Some(60), ..options(2, CONTEXT) };
    let whole = Some(routed("attn_token", Keys::All, Select::TopK));
    let mut lone = engine(&folder(), whole.clone(), &options);
    let seq = lone.open().unwrap();
    let mut batch = Batch::new(engine(&folder(), whole, &options), &tokenizer()).queue(3);
    for prompt in [vec![], vec![1, VOCAB as u32], ids(61, VOCAB, 1), ids(CONTEXT + 1, VOCAB, 1)] {
        let expected = lone.prefill(&[(seq, &prompt)]).unwrap_err();
        assert_eq!(batch.submit(Request::new(prompt).unwrap()).unwrap_err(), expected);
    }
    assert!(batch.is_idle());
    for number in 0..3 {
        batch.submit(request(number)).unwrap();
    }
    let error = batch.submit(request(3)).unwrap_err();
    assert!(error.kind() == Kind::Memory && error.to_string().contains("3 requests are waiting"), "{error}");
    let mut ended = Ended::default();
    ended.take(batch.step().unwrap());
    let late = batch.submit(request(3)).unwrap();
    run_on(&mut batch, &mut ended);
    assert!(ended.answers.len() == 4 && ended.answers[&late].is_ok());
}

/// One that is broken off, before it began or on the way, ends with what it has made, and those behind it move up.
#[test]
fn a_cancelled_request_makes_room() {
    let tokenizer = tokenizer();
    let mut lone = engine(&folder(), None, &options(1, CONTEXT));
    let requests: Vec<_> = (0..4).map(|n| Request { max_tokens: 20, eos: vec![], ..request(n) }).collect();
    let expected: Vec<_> = requests.iter().map(|request| alone(&mut lone, &tokenizer, request).0).collect();
    let mut batch = Batch::new(engine(&folder(), None, &options(1, CONTEXT)), &tokenizer);
    let asked: Vec<_> = requests.iter().map(|request| batch.submit(request.clone()).unwrap()).collect();
    let mut ended = Ended::default();
    for _ in 0..5 {
        ended.take(batch.step().unwrap());
    }
    assert_eq!((batch.running(), batch.waiting()), (1, 3));
    assert!(batch.cancel(asked[0]).unwrap() && batch.cancel(asked[2]).unwrap());
    assert_eq!(batch.engine().kv_usage().unwrap(), KvUsage::default());
    assert!(!batch.cancel(asked[0]).unwrap() && !batch.is_idle());
    ended.take(batch.step().unwrap());
    assert_eq!((batch.running(), batch.waiting()), (1, 1));
    run_on(&mut batch, &mut ended);
    let answer = |i: usize| ended.answers[&asked[i]].as_ref().unwrap();
    assert_eq!((&answer(0).tokens[..], answer(0).finish), (&expected[0].tokens[..5], Finish::Interrupted));
    assert_eq!((answer(2).tokens.len(), answer(2).finish), (0, Finish::Interrupted));
    assert_eq!((answer(1), answer(3)), (&expected[1], &expected[3]));

    let last = batch.submit(requests[0].clone()).unwrap();
    assert!(batch.cancel(last).unwrap() && !batch.is_idle(), "its end is to be reported");
    run_on(&mut batch, &mut ended);
    assert_eq!(ended.answers[&last].as_ref().unwrap().finish, Finish::Interrupted);
}

/// Nobody begins before there are pages for its prompt, beside those that begin with it, and for the next tokens of those that run.
#[test]
fn requests_begin_when_their_pages_are_free() {
    let tokenizer = tokenizer();
    // Two pages for each layer.
    let pages = Options { kv_tokens: Some(128), ..options(4, CONTEXT) };
    let ask = |batch: &mut Batch, prompt: usize, max_tokens| {
        let request = Request::new(ids(prompt, VOCAB, prompt as u64)).unwrap();
        batch.submit(Request { max_tokens, ..request }).unwrap();
    };
    let one_by_one = Options { rows: Some(10), ..pages.clone() };
    let mut batch = Batch::new(engine(&folder(), None, &one_by_one), &tokenizer);
    for prompt in [10, 9, 8] {
        ask(&mut batch, prompt, 5);
    }
    let mut ended = Ended::default();
    ended.take(batch.step().unwrap());
    assert_eq!((batch.running(), batch.waiting()), (2, 1));
    run_on(&mut batch, &mut ended);

    // One that needs its second page with its next token but one.
    let mut batch = Batch::new(engine(&folder(), None, &pages), &tokenizer);
    let mut ended = Ended::default();
    ask(&mut batch, 63, 8);
    ended.take(batch.step().unwrap());
    ask(&mut batch, 10, 4);
    run_on(&mut batch, &mut ended);
    assert_eq!((batch.timing().prompt_tokens, ended.answers.len()), (63 + 10, 2), "nothing is read again");
}

/// Where more rows are kept than were expected, a request learns by reading that pages run out; it does not try again before
/// another one ends.
#[test]
fn what_ran_out_is_not_tried_again_before_one_ends() {
    let tokenizer = tokenizer();
    let settings = RouterSettings { keys: Keys::Active, ..RouterSettings::default() };
    let routing = Some(random_gates(settings, &[2, 3], 0.1));
    let mut lone = engine(&folder(), routing.clone(), &options(1, CONTEXT));
    // By position: a token that neither layer keeps and, nearly everywhere, one that both do.
    let (mut skipped, mut kept) = ([0; 90], [0; 90]);
    for id in 0..VOCAB as u32 {
        let seq = lone.open().unwrap();
        lone.prefill(&[(seq, &[id; 90])]).unwrap();
        let trace = lone.trace().unwrap();
        for at in 0..90 {
            match [trace[0].active[at], trace[1].active[at]] {
                [false, false] => skipped[at] = id,
                [true, true] => kept[at] = id,
                _ => {}
            }
        }
        lone.close(seq).unwrap();
    }
    let requests = [(&skipped[..80], 12), (&kept[..], 4)]
        .map(|(prompt, max_tokens)| Request { max_tokens, ..Request::new(prompt.to_vec()).unwrap() });
    let small = Options { kv_tokens: Some(192), ..options(2, CONTEXT) };
    let mut batch = Batch::new(engine(&folder(), routing, &small), &tokenizer);
    let passed = Arc::new(AtomicUsize::new(0));
    let counter = passed.clone();
    batch.engine().watch(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        ControlFlow::Continue(())
    });
    let mut ended = Ended::default();
    let first = batch.submit(requests[0].clone()).unwrap();
    ended.take(batch.step().unwrap());
    let before = passed.load(Ordering::Relaxed);
    let second = batch.submit(requests[1].clone()).unwrap();
    ended.take(batch.step().unwrap());
    let tried = passed.load(Ordering::Relaxed);
    assert!(tried > before && batch.waiting() == 1, "it begins, and gives its pages back");
    while ended.answers.is_empty() {
        assert_eq!(passed.load(Ordering::Relaxed), tried);
        ended.take(batch.step().unwrap());
    }
    run_on(&mut batch, &mut ended);
    for (id, request) in [first, second].iter().zip(&requests) {
        assert_eq!(ended.answers[id].as_ref(), Ok(&alone(&mut lone, &tokenizer, request).0));
    }
}

/// One that does not fit into the KV cache by itself fails by itself; the others get their answers.
#[test]
fn a_request_that_is_too_large_fails_by_itself() {
    let tokenizer = tokenizer();
    let mut lone = engine(&folder(), None, &options(1, CONTEXT));
    let small = Options { kv_tokens: Some(64), ..options(3, CONTEXT) };
    let mut batch = Batch::new(engine(&folder(), None, &small), &tokenizer);
    let ask = |batch: &mut Batch, prompt, max_tokens| {
        let request = Request { max_tokens, ..Request::new(ids(prompt, VOCAB, prompt as u64)).unwrap() };
        (batch.submit(request.clone()).unwrap(), request)
    };
    let small: Vec<_> = [20, 5].map(|prompt| ask(&mut batch, prompt, 10)).into();
    let grows = ask(&mut batch, 60, 20).0;
    let large = ask(&mut batch, 70, 20).0;
    let last = ask(&mut batch, 30, 10);
    let ended = run(&mut batch);
    for (id, request) in small.iter().chain([&last]) {
        assert_eq!(ended.answers[id].as_ref(), Ok(&alone(&mut lone, &tokenizer, request).0));
    }
    for id in [grows, large] {
        let error = ended.answers[&id].as_ref().unwrap_err();
        assert!(error.kind() == Kind::Memory && error.to_string().contains("--kv-tokens"), "{error}");
    }
    assert!(!ended.texts[&grows].is_empty(), "what it had made is out");
    assert_eq!(batch.engine().kv_usage().unwrap(), KvUsage::default());
}

/// Copies a model with NaNs for what token 5 is embedded as.
fn damaged(to: &Path) {
    let from = goldens().join("families/llama-mha-f32-classic");
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensor = metadata.info("model.embed_tokens.weight").unwrap();
    let width = tensor.shape[1] * 4;
    let row = 8 + header + tensor.data_offsets.0 + 5 * width;
    bytes[row..row + width].fill(0xff);
    std::fs::write(to.join("model.safetensors"), bytes).unwrap();
}

/// One whose logits are no numbers fails by itself, also where a step has made it out for all.
#[test]
fn a_request_without_numbers_fails_by_itself() {
    let (tokenizer, model) = (tokenizer(), tempfile::tempdir().unwrap());
    damaged(model.path());
    let sound = |prompt: &[u32], seed| {
        let settings = SamplerSettings { temperature: 1.0, seed, ..SamplerSettings::default() };
        let sampler = Sampler::new(settings).unwrap();
        Request { sampler, max_tokens: 12, ..Request::new(prompt.to_vec()).unwrap() }
    };
    let mut lone = engine(model.path(), None, &options(1, 64));
    // Numbers after the penalty only: an error of the sampler, not of the step.
    let tiny = SamplerSettings { repetition_penalty: 1e-40, ..SamplerSettings::default() };
    let overflows = Request { sampler: Sampler::new(tiny).unwrap(), ..sound(&[8, 9, 10], 0) };
    let requests = [sound(&[1, 2, 3], 1), sound(&[4, 5, 6], 2), overflows, sound(&[7; 20], 3)];
    let mut batch = Batch::new(engine(model.path(), None, &options(4, 64)), &tokenizer);
    let asked: Vec<_> = requests.iter().map(|request| batch.submit(request.clone()).unwrap()).collect();
    let ended = run(&mut batch);
    for i in [0, 3] {
        let expected = alone(&mut lone, &tokenizer, &requests[i]).0;
        assert!(!expected.tokens.contains(&5));
        assert_eq!(ended.answers[&asked[i]].as_ref(), Ok(&expected), "request {i}");
    }
    for i in [1, 2] {
        assert_eq!(ended.answers[&asked[i]].as_ref().unwrap_err().kind(), Kind::Numeric, "request {i}");
    }
    assert_eq!(batch.engine().kv_usage().unwrap(), KvUsage::default());
}

/// A step that is broken off loses nothing: the next one goes on.
#[test]
fn a_step_that_fails_is_made_again() {
    let tokenizer = tokenizer();
    let mut lone = engine(&folder(), None, &options(1, CONTEXT));
    let mut batch = Batch::new(engine(&folder(), None, &options(2, CONTEXT)), &tokenizer);
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    batch.engine().watch(move |_| match asked.load(Ordering::Relaxed) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    let requests: Vec<_> = (0..5).map(request).collect();
    let ids: Vec<_> = requests.iter().map(|request| batch.submit(request.clone()).unwrap()).collect();
    let (mut ended, mut failed) = (Ended::default(), 0);
    for step in 0.. {
        stop.store(step % 3 < 2, Ordering::Relaxed);
        match batch.step() {
            Ok(events) => ended.take(events),
            Err(e) => {
                assert_eq!(e.kind(), Kind::Interrupted);
                failed += 1;
            }
        }
        if batch.is_idle() {
            break;
        }
    }
    assert!(failed > 2, "{failed} steps were broken off");
    for (id, request) in ids.iter().zip(&requests) {
        assert_eq!(ended.answers[id].as_ref(), Ok(&alone(&mut lone, &tokenizer, request).0));
    }
}

/// On the kernels: three requests, two slots, prompts in parts, and pages for one and a half, so that one begins again; the CPU's
/// tokens.
#[cfg(feature = "emulate")]
#[test]
fn kernels_serve_a_batch() {
    use mindskip::tensor::DType;

    let tokenizer = tokenizer();
    let settings = RouterSettings { keys: Keys::Active, ..RouterSettings::default() };
    let routing = Some(random_gates(settings, &[2, 3], 0.5));
    let requests: Vec<_> =
        [60, 61, 9].map(|n| Request { max_tokens: 7, ..Request::new(ids(n, VOCAB, n as u64)).unwrap() }).into();
    let mut lone = engine(&folder(), routing.clone(), &options(1, CONTEXT));
    let small = Options { rows: Some(40), kv_tokens: Some(128), ..options(2, CONTEXT) };
    let on = Options { device: gpu(5), dtype: Some(DType::F32), ..small };
    let mut batch = Batch::new(engine(&folder(), routing, &on), &tokenizer);
    let asked: Vec<_> = requests.iter().map(|request| batch.submit(request.clone()).unwrap()).collect();
    let ended = run(&mut batch);
    for (id, request) in asked.iter().zip(&requests) {
        assert_eq!(ended.answers[id].as_ref(), Ok(&alone(&mut lone, &tokenizer, request).0));
    }
    assert!(batch.timing().prompt_tokens > 60 + 61 + 9);
    assert_eq!(batch.engine().kv_usage().unwrap(), KvUsage::default());
}
