//! Sampling and generation.

use std::ffi::c_void;
use std::ops::ControlFlow;
use std::sync::Mutex;

use mindskip::batch::Request;
use mindskip::generate::{Answer, Finish, Turn, generate};
use mindskip::sample::{Sampler, SamplerSettings};

use crate::args::{Out, addresses, grown, list, list_grown, put, some_text};
use crate::engine::with;
use crate::failure::{Done, entry};
use crate::handles::{Table, alone};
use crate::model::MODELS;
use crate::types::*;

pub static SAMPLERS: Table<mindskip_sampler, Mutex<Sampler>> = Table::new("a sampler", "freed");

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_model_sampling(
    model: *mut mindskip_model,
    sampling: *mut mindskip_sampling,
) -> mindskip_status {
    entry(|| {
        let settings = MODELS.get(model)?.bundle.generation.settings(0);
        let value = mindskip_sampling {
            size: 0,
            temperature: settings.temperature,
            top_p: settings.top_p,
            min_p: settings.min_p,
            repetition_penalty: settings.repetition_penalty,
            top_k: settings.top_k.unwrap_or(0),
            seed: 0,
            sequence: 0,
        };
        // SAFETY: the header's rule.
        unsafe { put("sampling", sampling, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_sampler_new(
    sampling: *const mindskip_sampling,
    sampler: *mut *mut mindskip_sampler,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (s, out) = unsafe { (grown("sampling", sampling)?, Out::new("sampler", sampler)?) };
        let or_one = |number: f32| if number == 0.0 { 1.0 } else { number };
        let settings = SamplerSettings {
            temperature: s.temperature,
            top_k: Some(s.top_k).filter(|&k| k > 0),
            top_p: or_one(s.top_p),
            min_p: s.min_p,
            repetition_penalty: or_one(s.repetition_penalty),
            seed: s.seed,
        };
        out.set(SAMPLERS.add(Mutex::new(Sampler::for_sequence(settings, s.sequence)?)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_sampler_free(sampler: *mut mindskip_sampler) -> mindskip_status {
    entry(|| SAMPLERS.free(sampler))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_sample(
    sampler: *mut mindskip_sampler,
    logits: *const f32,
    vocab: usize,
    history: *const u32,
    count: usize,
    token: *mut u32,
) -> mindskip_status {
    entry(|| {
        let sampler = SAMPLERS.get(sampler)?;
        // SAFETY: the header's rule.
        let (logits, history, out) =
            unsafe { (list("logits", logits, vocab)?, list("history", history, count)?, Out::new("token", token)?) };
        out.set(alone(&sampler, "the sampler")?.sample(logits, history)?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_generate(
    engine: *mut mindskip_engine,
    turns: *const mindskip_turn,
    count: usize,
    on_text: mindskip_on_text,
    user: *mut c_void,
    answers: *mut mindskip_answer,
) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (turns, answers) = unsafe {
            let answers = if answers.is_null() { Vec::new() } else { addresses("answers", answers, count)? };
            (list_grown("turns", turns, count)?, answers)
        };
        with(engine, |session| {
            // The samplers are in use while the engine works, and keep the numbers that were drawn.
            let samplers: Done<Vec<_>> = turns
                .iter()
                .map(|turn| if turn.sampler.is_null() { Ok(None) } else { SAMPLERS.get(turn.sampler).map(Some) })
                .collect();
            let samplers = samplers?;
            let held: Done<Vec<_>> =
                samplers.iter().map(|sampler| sampler.as_ref().map(|s| alone(s, "the sampler")).transpose()).collect();
            let mut held = held?;

            let work: Done<Vec<_>> = turns
                .iter()
                .zip(&held)
                .map(|(turn, sampler)| {
                    let seq = session.seq(turn.seq)?;
                    // SAFETY: the header's rule.
                    let (request, history) = unsafe {
                        let request = to_request(turn, session.model.bundle.eos(), sampler.as_deref())?;
                        (request, list("history", turn.history, turn.history_count)?)
                    };
                    Ok(Turn { history: history.to_vec(), ..request.turn(seq) })
                })
                .collect();
            let mut work = work?;
            let tokenizer = session.model.tokenizer.clone();
            session.answers.clear();
            // A caller who said stop may have freed what the callback uses.
            let mut on_text = on_text;
            let made = generate(&mut session.engine, &tokenizer, &mut work, &mut |turn, text| {
                let Some(call) = on_text else { return ControlFlow::Continue(()) };
                let with_nul = [text.as_bytes(), b"\0"].concat();
                // SAFETY: the header has the caller give a function of this type, which does not unwind.
                if unsafe { call(user, turn, with_nul.as_ptr().cast(), text.len()) } == 0 {
                    return ControlFlow::Continue(());
                }
                on_text = None;
                ControlFlow::Break(())
            });
            for (sampler, turn) in held.iter_mut().zip(work) {
                if let Some(sampler) = sampler {
                    **sampler = turn.sampler;
                }
            }
            let (made, _) = made?;
            let results: Vec<_> = made.into_iter().map(|answer| keep(&mut session.answers, answer)).collect();
            for (at, answer) in answers.into_iter().zip(results) {
                // SAFETY: the header's rule.
                unsafe { put("answers", at, answer)? };
            }
            Ok(())
        })
    })
}

/// What a turn asks for, of whatever sequence.
///
/// # Safety
///
/// The rule of [`crate::args`].
pub unsafe fn to_request(turn: &mindskip_turn, eos: &[u32], sampler: Option<&Sampler>) -> Done<Request> {
    // SAFETY: the caller's.
    unsafe {
        let stop = list("stop", turn.stop, turn.stop_count)?;
        let stop: Done<Vec<_>> = stop.iter().map(|&text| Ok(some_text("stop", text)?.to_owned())).collect();
        let greedy = Request::new(list("prompt", turn.prompt, turn.prompt_count)?.to_vec())?;
        Ok(Request {
            sampler: sampler.unwrap_or(&greedy.sampler).clone(),
            max_tokens: if turn.max_tokens == 0 { usize::MAX } else { turn.max_tokens },
            eos: if turn.eos.is_null() && turn.eos_count == 0 {
                eos.to_vec()
            } else {
                list("eos", turn.eos, turn.eos_count)?.to_vec()
            },
            stop: stop?,
            ..greedy
        })
    }
}

/// Keeps an answer where C can read it.
pub fn keep(kept: &mut Vec<(Vec<u8>, Vec<u32>)>, answer: Answer) -> mindskip_answer {
    let text_length = answer.text.len();
    kept.push(([answer.text.as_bytes(), b"\0"].concat(), answer.tokens));
    let (text, tokens) = kept.last().expect("pushed");
    mindskip_answer {
        size: 0,
        text: text.as_ptr().cast(),
        text_length,
        tokens: tokens.as_ptr(),
        token_count: tokens.len(),
        read: answer.read,
        finish: match answer.finish {
            Finish::Eos => MINDSKIP_FINISH_EOS,
            Finish::Stop => MINDSKIP_FINISH_STOP,
            Finish::Length => MINDSKIP_FINISH_LENGTH,
            Finish::Context => MINDSKIP_FINISH_CONTEXT,
            Finish::Interrupted => MINDSKIP_FINISH_INTERRUPTED,
        },
    }
}
