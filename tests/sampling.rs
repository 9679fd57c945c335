//! Tokens that the device chooses are those that the sampler chooses from its logits.

mod common;

use common::*;
use mindskip::Kind;
use mindskip::bundle::Bundle;
use mindskip::engine::{Draw, Engine};
use mindskip::model::Routing;
use mindskip::sample::{Sampler, SamplerSettings};

fn stories(batch: usize) -> Engine {
    let bundle = Bundle::embedded().unwrap();
    let routing = bundle.routers.clone().map(Routing::routers);
    Engine::new(bundle.config, bundle.weights, routing, &options(batch, 64)).unwrap()
}

fn samplers() -> Vec<Sampler> {
    let drawn = SamplerSettings { temperature: 1.0, seed: 7, ..SamplerSettings::default() };
    let settings = [
        SamplerSettings { temperature: 0.8, top_k: Some(40), top_p: 0.95, ..drawn },
        SamplerSettings::default(),
        drawn,
        SamplerSettings { temperature: 1.5, top_p: 0.9, min_p: 0.02, ..drawn },
    ];
    settings.into_iter().zip(0..).map(|(s, i)| Sampler::for_sequence(s, i).unwrap()).collect()
}

#[test]
fn the_device_chooses_what_the_sampler_chooses() {
    let prompts: Vec<Vec<u32>> = [5, 17, 30, 2].map(|n| ids(n, 1536, n as u64)).to_vec();
    // Of all, drawn and greedy; of the greedy one alone.
    for chosen in [&[0, 1, 2, 3][..], &[1]] {
        let (mut here, mut there) = (stories(4), stories(4));
        let (mut host, mut device) = (samplers(), samplers());
        let vocab = here.config().vocab;
        let open = |engine: &mut Engine| chosen.iter().map(|_| engine.open().unwrap()).collect::<Vec<_>>();
        let (here_seqs, there_seqs) = (open(&mut here), open(&mut there));
        let inputs = |seqs: &[_]| seqs.iter().copied().zip(chosen.iter().map(|&i| &prompts[i][..])).collect::<Vec<_>>();
        let mut draws = || chosen.iter().map(|&i| device[i].draw()).collect::<Vec<Draw>>();
        let mut logits = here.prefill(&inputs(&here_seqs)).unwrap().to_vec();
        let mut tokens = there.prefill_and_sample(&inputs(&there_seqs), &draws()).unwrap().to_vec();
        for step in 0..12 {
            let rows = chosen.iter().zip(logits.chunks_exact(vocab));
            let expected: Vec<u32> = rows.map(|(&i, logits)| host[i].sample(logits, &[]).unwrap()).collect();
            assert_eq!(tokens, expected, "step {step} of {chosen:?}");
            let next = |seqs: &[_]| seqs.iter().copied().zip(expected.iter().copied()).collect::<Vec<_>>();
            logits = here.decode(&next(&here_seqs)).unwrap().to_vec();
            tokens = there.decode_and_sample(&next(&there_seqs), &draws()).unwrap().to_vec();
        }
        assert_eq!(here.activity().unwrap(), there.activity().unwrap());
    }
}

#[test]
fn a_draw_for_each_sequence() {
    let mut engine = stories(1);
    let seq = engine.open().unwrap();
    let error = engine.prefill_and_sample(&[(seq, &[1, 2])], &[]).unwrap_err();
    assert_eq!(error.kind(), Kind::Argument);
    assert!(error.to_string().contains("0 draws for 1 sequences"), "{error}");
    let drawn = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };
    for (wrong, name) in [
        (Draw { temperature: f32::NAN, ..drawn }, "temperature is NaN"),
        (Draw { temperature: -1.0, ..drawn }, "temperature is -1"),
        (Draw { top_p: 1.5, ..drawn }, "top_p is 1.5"),
        (Draw { min_p: 2.0, ..drawn }, "min_p is 2"),
    ] {
        let error = engine.prefill_and_sample(&[(seq, &[1, 2])], &[wrong]).unwrap_err();
        assert_eq!(error.kind(), Kind::Argument);
        assert!(error.to_string().contains(name), "{error}");
    }
    assert_eq!(engine.position(seq), 0);
}
