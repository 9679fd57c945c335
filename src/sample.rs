//! From logits to a token: the settings, the random numbers of a sequence, and the repetition penalty.
//!
//! The order and the edge rules are those of transformers: repetition penalty over the ids of the history, then, unless
//! greedy, temperature, `top_k`, `top_p`, `min_p`, and one draw from what is left. A backend chooses the token, the same one
//! on every device ([`Sample`](crate::backend::Sample)).

use fearless_simd::Level;
use rand_pcg::Pcg64Dxsm;
use rand_pcg::rand_core::{Rng, SeedableRng};

use crate::backend::Draw;
use crate::backend::cpu::Chooser;
use crate::error::{Error, Kind, Result, check_range, ensure};

/// How tokens are chosen. The default is greedy.
///
/// ```
/// use mindskip::sample::SamplerSettings;
///
/// let settings = SamplerSettings { temperature: 0.7, top_p: 0.95, seed: 7, ..SamplerSettings::default() };
/// assert!(settings.check().is_ok());
/// let error = SamplerSettings { top_p: 1.5, ..settings }.check().unwrap_err();
/// assert!(error.to_string().starts_with("top_p is 1.5; give"));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerSettings {
    /// Logits are divided by it; 0: the best token, always, and nothing below but the penalty matters.
    pub temperature: f32,
    /// Only the k best tokens, and those equal to the k-th; at least 1. None: all.
    pub top_k: Option<usize>,
    /// Only the best tokens that together reach this probability, in `[0, 1]`; 1: all.
    pub top_p: f32,
    /// Only tokens at least this probable relative to the best, in `[0, 1]`; 0: all.
    pub min_p: f32,
    /// Positive logits of tokens in the history are divided by it, negative ones multiplied, once a token; positive; 1: none.
    pub repetition_penalty: f32,
    /// Where the random numbers start.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        SamplerSettings { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl SamplerSettings {
    /// Errors: Argument when a number is out of its range.
    pub fn check(&self) -> Result<()> {
        self.draw(0).check()?;
        if self.top_k == Some(0) {
            return Err(Error::new(Kind::Argument, "top_k is 0").action("give 1 or more, or leave it out for all"));
        }
        let penalty = self.repetition_penalty;
        let fits = penalty > 0.0 && penalty.is_finite();
        check_range("repetition_penalty", penalty, fits, "a finite number above 0; 1 is no penalty")
    }

    fn draw(&self, random: u64) -> Draw {
        let SamplerSettings { temperature, top_k, top_p, min_p, .. } = *self;
        // More than any vocabulary holds is all of it.
        let top_k = top_k.map_or(0, |k| u32::try_from(k).unwrap_or(u32::MAX));
        Draw { temperature, top_k, top_p, min_p, random }
    }
}

/// Chooses the tokens of one sequence. After the first token it allocates nothing.
///
/// ```
/// use mindskip::sample::{Sampler, SamplerSettings};
///
/// let mut greedy = Sampler::new(SamplerSettings::default())?;
/// assert_eq!(greedy.sample(&[0.1, 2.5, -1.0], &[])?, 1);
/// let penalty = SamplerSettings { repetition_penalty: 30.0, ..SamplerSettings::default() };
/// let mut sampler = Sampler::new(penalty)?;
/// assert!(sampler.needs_logits() && !greedy.needs_logits());
/// assert_eq!(sampler.sample(&[0.1, 2.5, -1.0], &[1])?, 0);
///
/// // For a device: the random numbers of the fourth sequence of a batch are its own, and the same every time.
/// let settings = SamplerSettings { temperature: 1.0, seed: 7, ..SamplerSettings::default() };
/// let mut fourth = Sampler::for_sequence(settings, 3)?;
/// let draws = [fourth.draw(), fourth.draw()];
/// assert_ne!(draws[0], draws[1]);
/// assert_eq!(Sampler::for_sequence(settings, 3)?.draw(), draws[0]);
/// assert_ne!(Sampler::for_sequence(settings, 4)?.draw(), draws[0]);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: SamplerSettings,
    rng: Pcg64Dxsm,
    /// `[vocab]`: the logits after the penalty, when there is one.
    scores: Vec<f32>,
    /// `[vocab bits]`: the ids of the history; zero between calls.
    seen: Vec<u64>,
    chooser: Chooser,
}

impl Sampler {
    /// A sampler for a sequence on its own. Errors: Argument, see [`SamplerSettings::check`].
    pub fn new(settings: SamplerSettings) -> Result<Sampler> {
        Self::for_sequence(settings, 0)
    }

    /// A sampler for a sequence of a batch. Every sequence has its own random numbers, which only the seed and the index
    /// determine: it samples the same whoever else is in the batch. Sequence 0 is [`Sampler::new`].
    ///
    /// Errors: Argument, see [`SamplerSettings::check`].
    pub fn for_sequence(settings: SamplerSettings, sequence: u64) -> Result<Sampler> {
        settings.check()?;
        // Sequence i is seeded with the i-th 32 bytes of a generator seeded with `seed`.
        let mut parent = Pcg64Dxsm::seed_from_u64(settings.seed);
        parent.advance(4 * u128::from(sequence));
        let mut seed = [0; 32];
        parent.fill_bytes(&mut seed);
        let rng = Pcg64Dxsm::from_seed(seed);
        Ok(Sampler { settings, rng, scores: Vec::new(), seen: Vec::new(), chooser: Chooser::new(Level::new()) })
    }

    /// How the next token is to be drawn, for a backend. Takes one random number, a greedy one none. The repetition penalty
    /// is not in it: see [`needs_logits`](Self::needs_logits).
    pub fn draw(&mut self) -> Draw {
        let greedy = self.settings.temperature == 0.0;
        self.settings.draw(if greedy { 0 } else { self.rng.next_u64() })
    }

    /// Takes the last draw back: the step that it was for has failed.
    pub(crate) fn undraw(&mut self) {
        if self.settings.temperature != 0.0 {
            // The period is 2^128.
            self.rng.advance(u128::MAX);
        }
    }

    /// Whether the tokens depend on more than the logits of the moment, so that [`sample`](Self::sample) must choose them.
    pub fn needs_logits(&self) -> bool {
        self.settings.repetition_penalty != 1.0
    }

    /// The token after `history`, prompt and answer so far; `logits` are `[vocab]`. Of equal best tokens, greedy takes the
    /// lowest id. A call takes one random number, a greedy one none.
    ///
    /// Linear in the vocabulary: nothing is sorted. Errors: Numeric when a logit is NaN or infinite, or all are negative
    /// infinity (one alone means that its token is ruled out); Argument for no logits or an id beyond them.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        ensure!(!logits.is_empty(), Argument, "no logits to choose from");
        let draw = self.draw();
        let penalty = self.settings.repetition_penalty;
        let scores = penalise(logits, history, penalty, &mut self.seen, &mut self.scores)?;
        self.chooser.choose(&draw, scores)
    }
}

/// The logits after the penalty: as they are without one, else copied to `scores`. An id counts once however often it
/// occurs.
fn penalise<'a>(
    logits: &'a [f32],
    history: &[u32],
    penalty: f32,
    seen: &mut Vec<u64>,
    scores: &'a mut Vec<f32>,
) -> Result<&'a [f32]> {
    if penalty == 1.0 || history.is_empty() {
        return Ok(logits);
    }
    if let Some(&id) = history.iter().find(|&&id| id as usize >= logits.len()) {
        return Err(beyond(id, logits.len()));
    }
    scores.clear();
    scores.extend_from_slice(logits);
    seen.resize(logits.len().div_ceil(64), 0);
    for id in history.iter().map(|&id| id as usize) {
        let bit = 1 << (id % 64);
        if seen[id / 64] & bit == 0 {
            seen[id / 64] |= bit;
            let x = &mut scores[id];
            *x = if *x < 0.0 { *x * penalty } else { *x / penalty };
        }
    }
    for &id in history {
        seen[id as usize / 64] = 0;
    }
    Ok(scores)
}

fn beyond(id: u32, vocab: usize) -> Error {
    Error::new(Kind::Argument, format!("token id {id} is beyond the {vocab} logits"))
        .action("use the ids of the model's own vocabulary")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLING: SamplerSettings =
        SamplerSettings { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// What may be drawn, and how likely.
    fn distribution(settings: SamplerSettings, logits: &[f32], history: &[u32]) -> Result<Vec<f64>> {
        let mut sampler = Sampler::new(settings)?;
        let (draw, penalty) = (sampler.draw(), settings.repetition_penalty);
        let scores = penalise(logits, history, penalty, &mut sampler.seen, &mut sampler.scores)?;
        let total = sampler.chooser.candidates(&draw, scores)?;
        let mut probabilities = vec![0.0; logits.len()];
        sampler.chooser.keys.iter().for_each(|key| probabilities[key.id as usize] = key.weight as f64 / total as f64);
        Ok(probabilities)
    }

    /// The logits processors of transformers, one after the other, each over the whole vocabulary, in f64 from the
    /// temperature on. None when a
    /// token lies on the edge of the nucleus, where rounding may decide.
    fn naive(s: &SamplerSettings, logits: &[f32], history: &[u32]) -> Option<Vec<f64>> {
        let penalised = |(id, &x): (usize, &f32)| match history.contains(&(id as u32)) {
            true if x < 0.0 => x * s.repetition_penalty,
            true => x / s.repetition_penalty,
            false => x,
        };
        let mut scores: Vec<f64> = logits.iter().enumerate().map(penalised).map(f64::from).collect();
        scores.iter_mut().for_each(|x| *x /= f64::from(s.temperature));
        let softmax = |scores: &[f64]| {
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
            let sum: f64 = exps.iter().sum();
            exps.into_iter().map(|e| e / sum).collect::<Vec<f64>>()
        };
        if let Some(k) = s.top_k {
            let mut sorted = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let kth = sorted[k.min(sorted.len()) - 1];
            scores.iter_mut().filter(|x| **x < kth).for_each(|x| *x = f64::NEG_INFINITY);
        }
        if s.top_p < 1.0 {
            let probs = softmax(&scores);
            let mut ascending: Vec<usize> = (0..scores.len()).collect();
            ascending.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
            let mut sum = 0.0;
            for &id in &ascending[..scores.len() - 1] {
                sum += probs[id];
                let edge = 1.0 - f64::from(s.top_p);
                if probs[id] > 0.0 && (sum - edge).abs() < 1e-9 && s.top_p > 0.0 {
                    return None;
                }
                if sum <= edge || s.top_p == 0.0 {
                    scores[id] = f64::NEG_INFINITY;
                }
            }
        }
        let probs = softmax(&scores);
        let most = probs.iter().copied().fold(0.0, f64::max);
        let least = f64::from(s.min_p) * most;
        if s.min_p < 1.0 && s.min_p > 0.0 && probs.iter().any(|p| (p / least - 1.0).abs() < 1e-9) {
            return None;
        }
        scores
            .iter_mut()
            .zip(&probs)
            .filter(|(_, p)| **p < least * (1.0 - 1e-12))
            .for_each(|(x, _)| *x = f64::NEG_INFINITY);
        Some(softmax(&scores))
    }

    fn assert_close(found: &[f64], expected: &[f64], case: &dyn std::fmt::Debug) {
        for (id, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f - e).abs() < 1e-9, "token {id}: {f} where {e} is right, for {case:?}");
            assert!((*f > 0.0) == (*e > 0.0) || *e < 1e-11, "token {id}: {f} where {e} is right, for {case:?}");
        }
    }

    fn settings() -> impl Strategy<Value = SamplerSettings> {
        let edged = |inner: std::ops::Range<f32>| prop_oneof![2 => Just(0.0f32), 2 => Just(1.0), 6 => inner];
        let penalty = prop_oneof![Just(1.0f32), 0.5f32..2.0];
        (0.05f32..3.0, prop::option::of(1usize..80), edged(0.01..0.999), edged(0.001..0.9), penalty).prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty)| SamplerSettings {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                seed: 0,
            },
        )
    }

    fn logit() -> impl Strategy<Value = f32> {
        // Coarse values make ties; ruled out tokens are common, too.
        prop_oneof![5 => -12.0f32..12.0, 3 => (-6i8..6).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn distributions_are_those_of_transformers(
            s in settings(),
            logits in prop::collection::vec(logit(), 1..150),
            seen in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            prop_assume!(logits.iter().any(|x| x.is_finite()));
            let history: Vec<u32> = seen.iter().map(|i| i.index(logits.len()) as u32).collect();
            if let Some(expected) = naive(&s, &logits, &history) {
                assert_close(&distribution(s, &logits, &history).unwrap(), &expected, &(s, &logits, &history));
            }
        }

        #[test]
        fn greedy_takes_the_first_of_the_best(
            logits in prop::collection::vec((-3i8..3).prop_map(f32::from), 1..100),
            penalty in 0.5f32..2.0,
            seen in prop::collection::vec(any::<prop::sample::Index>(), 0..9),
        ) {
            let history: Vec<u32> = seen.iter().map(|i| i.index(logits.len()) as u32).collect();
            let penalised = |id: usize| {
                let x = logits[id];
                if !history.contains(&(id as u32)) { x } else if x < 0.0 { x * penalty } else { x / penalty }
            };
            let best = (0..logits.len()).rev().max_by(|&a, &b| penalised(a).total_cmp(&(penalised(b) + 0.0))).unwrap();
            let s = SamplerSettings { repetition_penalty: penalty, top_k: Some(3), top_p: 0.1, ..Default::default() };
            prop_assert_eq!(Sampler::new(s).unwrap().sample(&logits, &history).unwrap() as usize, best);
        }
    }

    /// A vocabulary of ordinary size, in which pool, skipped blocks and nucleus are put to use.
    fn large(seed: u64, spread: f32) -> Vec<f32> {
        let mut rng = Pcg64Dxsm::seed_from_u64(seed);
        (0..151_936)
            .map(|_| (0..4).map(|_| rng.next_u32() as f32 / 2f32.powi(31) - 1.0).sum::<f32>() * spread)
            .collect()
    }

    #[test]
    fn large_vocabularies_are_cut_where_a_sort_cuts_them() {
        let mut case = 0;
        for spread in [0.1, 3.0, 8.0] {
            for (top_k, top_p, min_p) in [
                (Some(1), 1.0, 0.0),
                (Some(50), 1.0, 0.0),
                (Some(5000), 0.9, 0.0),
                (Some(151_935), 0.5, 0.0),
                (None, 0.3, 0.0),
                (None, 0.99, 0.01),
                (None, 1.0, 0.05),
            ] {
                case += 1;
                let logits = large(case, spread);
                let s = SamplerSettings { temperature: 0.8, top_k, top_p, min_p, ..SAMPLING };
                let expected = naive(&s, &logits, &[]).expect("no token on the edge");
                assert_close(&distribution(s, &logits, &[]).unwrap(), &expected, &s);
            }
        }
    }

    #[test]
    fn only_the_first_token_allocates() {
        let s =
            SamplerSettings { temperature: 2.0, top_k: Some(1000), top_p: 0.95, repetition_penalty: 1.1, ..SAMPLING };
        let mut sampler = Sampler::new(s).unwrap();
        let capacities = |s: &Sampler| {
            let Chooser { pool, keys, order, .. } = &s.chooser;
            [s.scores.capacity(), s.seen.capacity(), pool.capacity(), keys.capacity(), order.capacity()]
        };
        sampler.sample(&large(0, 8.0), &[1]).unwrap();
        let first = capacities(&sampler);
        assert!(!first.contains(&0));
        let mut ascending = large(2, 0.1);
        ascending.sort_by(f32::total_cmp);
        for logits in [large(1, 0.0), large(1, 0.1), ascending] {
            sampler.sample(&logits, &(0..151_936).collect::<Vec<_>>()).unwrap();
            assert_eq!(capacities(&sampler), first);
        }
    }

    /// Pearson's statistic over tokens with an expected count of at least 5.
    fn chi_squared(counts: &[usize], probabilities: &[f64]) -> f64 {
        let draws: usize = counts.iter().sum();
        let terms = counts.iter().zip(probabilities).map(|(&count, p)| {
            let expected = p * draws as f64;
            assert!(if *p == 0.0 { count == 0 } else { expected >= 5.0 }, "{counts:?} of {probabilities:?}");
            if *p == 0.0 { 0.0 } else { (count as f64 - expected).powi(2) / expected }
        });
        terms.sum()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [1.0, 0.5, -0.5, 2.0, 2.0, f32::NEG_INFINITY, 0.0, 1.5, -3.0, 0.25];
        for (s, kept) in [
            (SamplerSettings { temperature: 0.7, ..SAMPLING }, 9),
            (SamplerSettings { top_k: Some(4), ..SAMPLING }, 4),
            (SamplerSettings { temperature: 1.5, top_p: 0.8, repetition_penalty: 1.3, ..SAMPLING }, 5),
            (SamplerSettings { min_p: 0.2, ..SAMPLING }, 5),
        ] {
            let history = [3, 2, 3];
            let expected = naive(&s, &logits, &history).unwrap();
            assert_eq!(expected.iter().filter(|p| **p > 0.0).count(), kept, "{s:?}: {expected:?}");
            // One sequence that draws often, and often a sequence that draws once. 33.7: exceeded once in 10^4 for 9 of
            // freedom.
            let mut counts = [[0; 10]; 2];
            let mut one = Sampler::new(SamplerSettings { seed: 3, ..s }).unwrap();
            for sequence in 0..20_000 {
                counts[0][one.sample(&logits, &history).unwrap() as usize] += 1;
                let mut other = Sampler::for_sequence(SamplerSettings { seed: 4, ..s }, sequence).unwrap();
                counts[1][other.sample(&logits, &history).unwrap() as usize] += 1;
            }
            for counts in counts {
                let statistic = chi_squared(&counts, &expected);
                assert!(statistic < 33.7, "{statistic} for {s:?}: {counts:?}");
            }
        }
    }

    #[test]
    fn edges() {
        let kept = |s: SamplerSettings, logits: &[f32], history: &[u32]| {
            let probs = distribution(s, logits, history).unwrap();
            (0..probs.len()).filter(|&id| probs[id] > 0.0).collect::<Vec<_>>()
        };
        let none = f32::NEG_INFINITY;
        let logits = [1.0, 3.0, 3.0, 0.0, 3.0];
        assert_eq!(kept(SamplerSettings { top_k: Some(2), ..SAMPLING }, &logits, &[]), [1, 2, 4], "ties with the k-th");
        assert_eq!(kept(SamplerSettings { top_k: Some(99), ..SAMPLING }, &logits, &[]), [0, 1, 2, 3, 4]);
        assert_eq!(kept(SamplerSettings { top_k: Some(3), ..SAMPLING }, &[none, 5.0, none, none], &[]), [1]);
        assert_eq!(kept(SamplerSettings { top_p: 0.0, ..SAMPLING }, &logits, &[]), [1], "the first of the best");
        assert_eq!(kept(SamplerSettings { top_p: f32::MIN_POSITIVE, ..SAMPLING }, &logits, &[]), [1]);
        assert_eq!(kept(SamplerSettings { top_p: 0.5, ..SAMPLING }, &[0.0; 4], &[]), [0, 1], "exactly half");
        assert_eq!(kept(SamplerSettings { min_p: 1.0, ..SAMPLING }, &logits, &[]), [1, 2, 4]);
        assert_eq!(kept(SAMPLING, &logits, &[]), [0, 1, 2, 3, 4]);
        assert_eq!(kept(SamplerSettings { temperature: 1e-40, ..SAMPLING }, &logits, &[]), [1, 2, 4]);
        assert_eq!(kept(SAMPLING, &[none, none, -1e30], &[]), [2]);
        assert_eq!(kept(SAMPLING, &[3e38, -3e38], &[0, 1]), [0]);

        let penalty = SamplerSettings { repetition_penalty: 2.0, ..SAMPLING };
        let doubled = distribution(penalty, &[-1.0, 4.0, -1.0, none], &[0, 1, 1, 0, 1, 3]).unwrap();
        let by_hand = distribution(SAMPLING, &[-2.0, 2.0, -1.0, none], &[]).unwrap();
        assert_eq!(doubled, by_hand, "an id counts once, up to the size of the vocabulary");
        assert_eq!(distribution(penalty, &logits, &[]).unwrap(), distribution(SAMPLING, &logits, &[]).unwrap());

        let mut greedy = Sampler::new(SamplerSettings { repetition_penalty: 2.0, ..Default::default() }).unwrap();
        assert_eq!(greedy.sample(&[4.0, 3.0, 3.0], &[0]).unwrap(), 1);
        assert_eq!(greedy.sample(&[4.0, 3.0, 3.0], &[]).unwrap(), 0, "the history of the call before is forgotten");
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let logits = |at: usize, x: f32| {
            let mut logits = vec![1.0; 40];
            logits[at] = x;
            logits
        };
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(SamplerSettings { temperature, ..SAMPLING }).unwrap();
            for at in [0, 20, 31, 32, 39] {
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                    let error = sampler.sample(&logits(at, bad), &[]).unwrap_err();
                    assert_eq!(error.kind(), Kind::Numeric);
                    assert!(error.to_string().contains(&format!("token {at} is {bad}")), "{error}");
                }
                assert!(sampler.sample(&logits(at, f32::NEG_INFINITY), &[]).is_ok());
            }
            let error = sampler.sample(&[f32::NEG_INFINITY; 20], &[]).unwrap_err();
            assert_eq!(error.kind(), Kind::Numeric, "{error}");
            assert_eq!(sampler.sample(&[], &[]).unwrap_err().kind(), Kind::Argument);
        }
        let penalty = SamplerSettings { repetition_penalty: 1.5, ..SAMPLING };
        let error = Sampler::new(penalty).unwrap().sample(&[1.0, 2.0], &[2]).unwrap_err();
        assert!(error.to_string().contains("token id 2 is beyond the 2 logits; "), "{error}");
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        let d = SamplerSettings::default();
        assert!(d.check().is_ok());
        for (s, name) in [
            (SamplerSettings { temperature: -0.1, ..d }, "temperature is -0.1; give 0"),
            (SamplerSettings { temperature: f32::NAN, ..d }, "temperature is NaN"),
            (SamplerSettings { temperature: f32::INFINITY, ..d }, "temperature is inf"),
            (SamplerSettings { top_k: Some(0), ..d }, "top_k is 0; "),
            (SamplerSettings { top_p: 1.1, ..d }, "top_p is 1.1; give a number in [0, 1]"),
            (SamplerSettings { top_p: f32::NAN, ..d }, "top_p is NaN"),
            (SamplerSettings { min_p: -0.1, ..d }, "min_p is -0.1; give a number in [0, 1]"),
            (SamplerSettings { min_p: f32::NAN, ..d }, "min_p is NaN"),
            (SamplerSettings { repetition_penalty: 0.0, ..d }, "repetition_penalty is 0; give a finite number above 0"),
            (SamplerSettings { repetition_penalty: f32::NAN, ..d }, "repetition_penalty is NaN"),
        ] {
            let error = Sampler::new(s).unwrap_err();
            assert_eq!(error.kind(), Kind::Argument);
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_tokens_everywhere() {
        let logits: Vec<f32> = (0..1000u32).map(|i| (i * 37 % 101) as f32 / 20.0).collect();
        let s = SamplerSettings { temperature: 0.9, top_p: 0.9, repetition_penalty: 1.2, seed: 42, ..SAMPLING };
        let run = |samplers: &mut [Sampler]| {
            let mut texts = vec![vec![7]; samplers.len()];
            for _ in 0..8 {
                for (sampler, text) in samplers.iter_mut().zip(&mut texts) {
                    let token = sampler.sample(&logits, text).unwrap();
                    text.push(token);
                }
            }
            texts
        };
        let batch = run(&mut [0, 1, 2].map(|i| Sampler::for_sequence(s, i).unwrap()));
        assert_eq!(batch[1..2], run(&mut [Sampler::for_sequence(s, 1).unwrap()]), "alone as in the batch");
        assert_eq!(batch[..1], run(&mut [Sampler::new(s).unwrap()]));
        assert!(batch[0] != batch[1] && batch[1] != batch[2]);
        assert_ne!(batch[..1], run(&mut [Sampler::new(SamplerSettings { seed: 43, ..s }).unwrap()]));
        let written_down = [
            [7, 838, 865, 518, 305, 952, 687, 494, 767],
            [7, 8, 876, 79, 131, 838, 988, 969, 204],
            [7, 636, 764, 120, 218, 827, 603, 483, 838],
        ];
        assert_eq!(batch, written_down, "on x86-64; the same on every platform");
    }
}
