//! Router gradients against central differences, in f64, of the smooth function that the straight-through estimator
//! differentiates: the mask is replaced by stopgrad(hard − score) + score. The model here is a naive one of its own,
//! which treats every sample alone.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use common::*;
use mindskip::backend::{GradientKind, OpKind};
use mindskip::config::Config;
use mindskip::engine::training_backend;
use mindskip::memory::Budget;
use mindskip::router::{Granularity, Keys, Level, RouterSet, RouterSettings, Select, Target};
use mindskip::tune::plan::StepLimits;
use mindskip::tune::{Goal, Sample, Ste, StepSettings, Tuner};
use mindskip::weights::Weights;

type Rows = Vec<Vec<f64>>;

/// The hard decisions of a routed layer about a sample, and the scores behind them.
type Decision = (Vec<bool>, Vec<f64>);

/// By sample and routed layer.
type Decisions = Vec<Vec<Decision>>;

struct Reference {
    config: Config,
    tensors: HashMap<String, Vec<f64>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + eps).sqrt();
    x.iter().zip(w).map(|(x, w)| x * scale * w).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn ln_softmax(row: &[f64]) -> Vec<f64> {
    let top = row.iter().copied().fold(f64::MIN, f64::max);
    let total = top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
    row.iter().map(|x| x - total).collect()
}

impl Reference {
    fn open(folder: &Path) -> Reference {
        let (config, weights) = (config(folder), Weights::open(folder).unwrap());
        let shape = |name: &str| match () {
            () if name.contains("embed_tokens") || name.contains("lm_head") => (config.vocab, config.hidden),
            () if name.contains("q_proj") => (config.q_rows(), config.hidden),
            () if name.contains("k_proj") || name.contains("v_proj") => (config.kv_rows(), config.hidden),
            () if name.contains("o_proj") => (config.hidden, config.q_rows()),
            () if name.contains("gate_proj") || name.contains("up_proj") => (config.intermediate, config.hidden),
            () if name.contains("down_proj") => (config.hidden, config.intermediate),
            () if name.contains("q_norm") || name.contains("k_norm") => (config.head_dim, 1),
            () => (config.hidden, 1),
        };
        let read = |name: &str| {
            let (rows, cols) = shape(name);
            let vector = name.ends_with(".bias") || name.contains("norm");
            let tensor = weights.tensor(name, if vector { 1 } else { rows }, if vector { rows } else { cols }).unwrap();
            tensor.to_f32().into_iter().map(f64::from).collect()
        };
        let tensors = weights.names().filter(|n| !n.contains("router")).map(|n| (n.to_string(), read(n))).collect();
        Reference { config, tensors }
    }

    fn layer(&self, l: usize, part: &str) -> Option<&[f64]> {
        self.tensors.get(&format!("model.layers.{l}.{part}")).map(|t| &t[..])
    }

    fn project(&self, l: usize, part: &str, x: &[f64]) -> Vec<f64> {
        let (w, bias) = (self.layer(l, &format!("{part}.weight")).unwrap(), self.layer(l, &format!("{part}.bias")));
        let product = w.chunks(x.len()).map(|w| dot(x, w));
        product.enumerate().map(|(i, y)| y + bias.map_or(0.0, |b| b[i])).collect()
    }

    /// The heads of a projection, normed where the family does, turned to their position.
    fn heads(&self, l: usize, part: &str, norm_part: &str, h: &[f64], position: usize) -> Rows {
        let d = self.config.head_dim;
        let freqs = self.config.rope.inv_freq(d);
        let of = |head: &[f64]| {
            let head = match self.layer(l, norm_part) {
                Some(w) => norm(head, w, f64::from(self.config.norm_eps)),
                None => head.to_vec(),
            };
            let angle = |i: usize| f64::from(position as f32 * freqs[i % (d / 2)]);
            let pair = |i: usize| if i < d / 2 { -head[i + d / 2] } else { head[i - d / 2] };
            (0..d).map(|i| head[i] * angle(i).cos() + pair(i) * angle(i).sin()).collect()
        };
        self.project(l, part, h).chunks(d).map(of).collect()
    }

    /// What attention gives every row; of the others, row i sees those for which `visible`.
    fn attention(&self, l: usize, h: &Rows, visible: impl Fn(usize) -> bool) -> Rows {
        let (c, d) = (&self.config, self.config.head_dim);
        let each = |part: &str, norm: &str| -> Vec<Rows> {
            h.iter().enumerate().map(|(i, h)| self.heads(l, part, norm, h, i)).collect()
        };
        let (q, k) =
            (each("self_attn.q_proj", "self_attn.q_norm.weight"), each("self_attn.k_proj", "self_attn.k_norm.weight"));
        let v: Rows = h.iter().map(|h| self.project(l, "self_attn.v_proj", h)).collect();
        let of = |i: usize| {
            let sees = |j: &usize| c.windows[l].is_none_or(|w| j + w > i) && (*j == i || visible(*j));
            let keys: Vec<usize> = (0..=i).filter(sees).collect();
            let mut out = Vec::new();
            for (head, q) in q[i].iter().enumerate() {
                let own = head / (c.heads / c.kv_heads);
                let scores: Vec<f64> = keys.iter().map(|&j| dot(q, &k[j][own]) / (d as f64).sqrt()).collect();
                let weights = ln_softmax(&scores);
                out.extend(
                    (0..d).map(|x| keys.iter().zip(&weights).map(|(&j, w)| w.exp() * v[j][own * d + x]).sum::<f64>()),
                );
            }
            self.project(l, "self_attn.o_proj", &out)
        };
        (0..h.len()).map(of).collect()
    }

    fn mlp(&self, l: usize, x: &[f64]) -> Vec<f64> {
        let h = norm(x, self.layer(l, "post_attention_layernorm.weight").unwrap(), f64::from(self.config.norm_eps));
        let (g, u) = (self.project(l, "mlp.gate_proj", &h), self.project(l, "mlp.up_proj", &h));
        let act: Vec<f64> = g.iter().zip(u).map(|(g, u)| g * sigmoid(*g) * u).collect();
        self.project(l, "mlp.down_proj", &act)
    }

    /// ln p of every row of a sample, and what its routers decided; with `frozen` they have decided already, and the
    /// mask follows the scores. The masks that the penalty sees are added to `masks`.
    fn forward(
        &self,
        ids: &[u32],
        case: &Case,
        routers: &Routers,
        frozen: Option<&[Decision]>,
        masks: &mut [f64],
    ) -> (Rows, Vec<Decision>) {
        let (hidden, eps) = (self.config.hidden, f64::from(self.config.norm_eps));
        let embed = &self.tensors["model.embed_tokens.weight"];
        let mut x: Rows = ids.iter().map(|&id| embed[id as usize * hidden..][..hidden].to_vec()).collect();
        let mut decisions = Vec::new();
        for l in 0..self.config.layers {
            let h: Rows = x.iter().map(|x| norm(x, self.layer(l, "input_layernorm.weight").unwrap(), eps)).collect();
            let Some(router) = routers.get(&l) else {
                let attention = self.attention(l, &h, |_| true);
                x.iter_mut().zip(attention).for_each(|(x, a)| add(x, 1.0, &a));
                x.iter_mut().for_each(|x| {
                    let m = self.mlp(l, x);
                    add(x, 1.0, &m)
                });
                continue;
            };
            let logits: Vec<f64> = h.iter().map(|h| dot(h, router)).collect();
            let s = &case.settings;
            let scores: Vec<f64> = match s.granularity.level {
                Level::Token => logits.iter().map(|&x| sigmoid(x)).collect(),
                Level::Sequence => vec![sigmoid(logits.iter().sum::<f64>() / logits.len() as f64); logits.len()],
            };
            let (hard, base) = match frozen {
                Some(frozen) => frozen[decisions.len()].clone(),
                None => (decide(s, &scores), scores.clone()),
            };
            let smooth = |i: usize| f64::from(u8::from(hard[i])) + scores[i] - base[i];
            let m: Vec<f64> =
                (0..ids.len()).map(|i| if case.ste == Ste::Full || hard[i] { smooth(i) } else { 0.0 }).collect();
            masks[decisions.len()] += (0..ids.len()).map(smooth).sum::<f64>();
            let hides =
                s.granularity.level == Level::Token && s.keys == Keys::Active && s.granularity.target != Target::Mlp;
            let attention = self.attention(l, &h, |j| !hides || hard[j]);
            for (i, x) in x.iter_mut().enumerate() {
                let a = &attention[i];
                match s.granularity.target {
                    Target::Attn => {
                        add(x, m[i], a);
                        let mlp = self.mlp(l, x);
                        add(x, 1.0, &mlp);
                    }
                    Target::Mlp => {
                        add(x, 1.0, a);
                        let mlp = self.mlp(l, x);
                        add(x, m[i], &mlp);
                    }
                    Target::Block => {
                        let mut inner = x.clone();
                        add(&mut inner, 1.0, a);
                        let mlp = self.mlp(l, &inner);
                        add(x, m[i], a);
                        add(x, m[i], &mlp);
                    }
                }
            }
            decisions.push((hard, base));
        }
        let head = self.tensors.get("lm_head.weight").filter(|_| !self.config.tied).unwrap_or(embed);
        let last = |x: &Vec<f64>| {
            let h = norm(x, &self.tensors["model.norm.weight"], eps);
            ln_softmax(&head.chunks(hidden).map(|w| dot(w, &h)).collect::<Vec<_>>())
        };
        (x.iter().map(last).collect(), decisions)
    }

    /// The loss of a step, the sums of each sample, and the decisions.
    fn loss(
        &self,
        case: &Case,
        samples: &[Sample],
        routers: &Routers,
        frozen: Option<&Decisions>,
    ) -> (f64, Vec<f64>, Decisions) {
        let rows: usize = samples.iter().map(|s| s.inputs().len()).sum();
        let mut masks = vec![0.0; routers.len()];
        let (mut losses, mut decisions) = (Vec::new(), Vec::new());
        for (i, sample) in samples.iter().enumerate() {
            let frozen = frozen.map(|f| &f[i][..]);
            let (ln_p, decided) = self.forward(sample.inputs(), case, routers, frozen, &mut masks);
            losses.push(match case.goal {
                Goal::Tokens => sample.answers().map(|(row, id)| -ln_p[row as usize][id as usize]).sum(),
                Goal::Dense => {
                    let (ln_q, _) = self.forward(sample.inputs(), case, &Routers::new(), None, &mut []);
                    let of =
                        |row: usize| -> f64 { ln_q[row].iter().zip(&ln_p[row]).map(|(q, p)| q.exp() * (q - p)).sum() };
                    sample.answers().map(|(row, _)| of(row as usize)).sum()
                }
            });
            decisions.push(decided);
        }
        let excess = |m: &f64| (m / rows as f64 - TARGET).max(0.0);
        let total = SCALE * losses.iter().sum::<f64>() + LAMBDA * masks.iter().map(excess).sum::<f64>();
        (total, losses, decisions)
    }
}

fn add(x: &mut [f64], m: f64, y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += m * y);
}

fn decide(s: &RouterSettings, scores: &[f64]) -> Vec<bool> {
    if s.granularity.level == Level::Token && s.select == Select::TopK {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let wanted = (f64::from(s.capacity) * scores.len() as f64).ceil() as usize;
        return (0..scores.len()).map(|i| order[..wanted].contains(&i)).collect();
    }
    scores.iter().map(|&x| x >= f64::from(s.threshold)).collect()
}

const SCALE: f64 = 0.125;
const LAMBDA: f64 = 0.75;
const TARGET: f64 = 0.25;

type Routers = BTreeMap<usize, Vec<f64>>;

#[derive(Debug, Clone, Copy)]
struct Case {
    settings: RouterSettings,
    ste: Ste,
    goal: Goal,
}

/// Every granularity, with the key policies and ways to select that it has, and both estimators; goals in turns.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for name in Granularity::NAMES {
        let granularity: Granularity = name.parse().unwrap();
        let token = granularity.level == Level::Token;
        for &keys in Keys::ALL.iter().filter(|&&k| k == Keys::All || token && granularity.target != Target::Mlp) {
            for &select in Select::ALL.iter().filter(|&&s| s == Select::Threshold || token) {
                for &ste in Ste::ALL {
                    let settings = RouterSettings { granularity, keys, select, capacity: 0.5, threshold: 0.5 };
                    let goal = Goal::ALL[cases.len() / 2 % 2];
                    cases.push(Case { settings, ste, goal });
                }
            }
        }
    }
    cases
}

/// Samples of uneven lengths, of which the last tokens count.
fn samples(vocab: usize, seed: u64) -> Vec<Sample> {
    let of = |(i, &n): (usize, &usize)| Sample {
        ids: ids(n, vocab, seed + i as u64),
        counts: (0..n).map(|t| t >= n / 2 && t % 3 != 1).collect(),
        record: i + 1,
    };
    [9, 2, 14, 5].iter().enumerate().map(of).collect()
}

fn random(n: usize, seed: u64) -> Vec<f64> {
    ids(n, 2001, seed).into_iter().map(|x| f64::from(x) / 1000.0 - 1.0).collect()
}

/// Routers that are far enough from the threshold for both arithmetics to decide alike, and decide differently for
/// different rows.
fn routers(reference: &Reference, case: &Case, samples: &[Sample], layers: &[usize]) -> Routers {
    for seed in 0.. {
        let router = |&l: &usize| {
            let values = random(reference.config.hidden, 100 * seed + l as u64);
            (l, values.iter().map(|x| f64::from((x * 0.4) as f32)).collect())
        };
        let routers: Routers = layers.iter().map(router).collect();
        let (.., decisions) = reference.loss(case, samples, &routers, None);
        let rows = || decisions.iter().flatten().flat_map(|(hard, scores)| hard.iter().zip(scores));
        let share = rows().filter(|(hard, _)| **hard).count() as f64 / rows().count() as f64;
        let edge = |of: bool, d: &Decision| -> f64 {
            let scores = d.0.iter().zip(&d.1).filter(|(hard, _)| **hard == of).map(|(_, &score)| score);
            if of { scores.fold(1.0, f64::min) } else { scores.fold(0.0, f64::max) }
        };
        let apart = decisions.iter().flatten().all(|d| edge(true, d) - edge(false, d) > 1e-4);
        let clear = apart && rows().all(|(_, score)| (score - 0.5).abs() > 1e-4);
        if clear && (0.3..0.8).contains(&share) {
            return routers;
        }
        assert!(seed < 100, "no routers for {case:?}");
    }
    unreachable!()
}

fn tuner(folder: &Path, case: &Case, routers: &Routers, limits: StepLimits) -> Tuner {
    let set = RouterSet {
        settings: case.settings,
        weights: routers.iter().map(|(&l, r)| (l, r.iter().map(|&x| x as f32).collect())).collect(),
        thresholds: BTreeMap::new(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "here".into(),
    };
    let backend = training_backend(&options(1, 1)).unwrap();
    Tuner::new(config(folder), &Weights::open(folder).unwrap(), set, case.goal, limits, backend).unwrap()
}

/// Chunks that are smaller than the step, and not a divisor of it.
const LIMITS: StepLimits = StepLimits { rows: 64, samples: 5, chunk: 7, recompute: true, memory: None };

/// Tuners that keep the activations of all layers, and of all but one, and how many these are; `least` is the memory of
/// one that keeps none.
fn kept_layers(folder: &Path, case: &Case, routers: &Routers, least: u64) -> Vec<(Tuner, usize)> {
    let of = |memory| tuner(folder, case, routers, StepLimits { recompute: false, memory, ..LIMITS });
    let all = of(None);
    let layers = all.config().layers - routers.keys().next().unwrap();
    let less = of(Some(Budget::Bytes(all.plan().total() - 1)));
    assert!(less.plan().total() >= least && less.plan().total() < all.plan().total());
    vec![(all, layers), (less, layers - 1)]
}

fn settings(case: &Case, rows: usize) -> StepSettings {
    StepSettings {
        goal: case.goal,
        ste: case.ste,
        loss_scale: SCALE as f32,
        lambda: LAMBDA as f32,
        target: TARGET as f32,
        capacity_scale: 1.0 / rows as f32,
    }
}

fn check(model: &str, case: &Case, layers: &[usize]) {
    let folder = goldens().join(model);
    let reference = Reference::open(&folder);
    let samples = samples(reference.config.vocab, 5);
    let routers = routers(&reference, case, &samples, layers);
    let mut tuner = tuner(&folder, case, &routers, LIMITS);
    let refs: Vec<&Sample> = samples.iter().collect();
    let rows = samples.iter().map(|s| s.inputs().len()).sum();
    let outcome = tuner.step(&refs, &settings(case, rows)).unwrap();
    let gradient = tuner.take_gradients().unwrap();

    let what = format!("{model} {layers:?} {case:?}");
    let least = tuner.plan().total();
    for (mut tuner, kept) in kept_layers(&folder, case, &routers, least) {
        assert_eq!(tuner.plan().kept, kept, "{what}");
        assert_eq!(tuner.step(&refs, &settings(case, rows)).unwrap(), outcome, "{what}: {kept} layers kept");
        assert_eq!(tuner.take_gradients().unwrap(), gradient, "{what}: {kept} layers kept");
    }
    let gradient: Vec<f64> = gradient.into_iter().map(f64::from).collect();
    let (_, losses, decisions) = reference.loss(case, &samples, &routers, None);
    let count = |nth: usize| decisions.iter().map(|d| d[nth].0.iter().filter(|&&hard| hard).count()).sum();
    assert_eq!(outcome.active, (0..layers.len()).map(count).collect::<Vec<usize>>(), "{what}: active rows");
    for (i, (a, b)) in outcome.losses.iter().zip(&losses).enumerate() {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b), "{what}: the loss of sample {i} is {a}, not {b}");
    }
    let flat: Vec<f64> = routers.values().flatten().copied().collect();
    let hidden = reference.config.hidden;
    // Along each router alone, twice, and along all of them.
    for n in 0..2 * layers.len() + 2 {
        let mut direction = random(flat.len(), 900 + n as u64);
        if n < 2 * layers.len() {
            direction.iter_mut().enumerate().filter(|(i, _)| i / hidden != n / 2).for_each(|(_, x)| *x = 0.0);
        }
        let at = |t: f64| {
            let moved: Vec<f64> = flat.iter().zip(&direction).map(|(x, d)| x + t * d).collect();
            let routers = routers.keys().copied().zip(moved.chunks(hidden).map(<[f64]>::to_vec)).collect();
            reference.loss(case, &samples, &routers, Some(&decisions)).0
        };
        let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
        let length = |of: &dyn Fn(usize) -> f64| (0..flat.len()).map(|i| of(i).powi(2)).sum::<f64>().sqrt();
        let along = |i: usize| if direction[i] == 0.0 { 0.0 } else { gradient[i] };
        let scale = length(&along) * length(&|i| direction[i]);
        let actual = dot(&gradient, &direction);
        assert!(scale > 1e-6, "{what}: no gradient along direction {n}");
        assert!((actual - expected).abs() <= 2e-5 * scale, "{what}, direction {n}: {actual:e}, not {expected:e}");
    }
}

#[test]
fn router_gradients_are_those_of_the_surrogate() {
    for case in cases() {
        check("routing/model", &case, &[1, 2, 4]);
    }
}

#[test]
fn router_gradients_of_other_families() {
    let cases = cases();
    for name in ["attn_token", "block_token", "mlp_token", "block_sequence"] {
        for case in cases.iter().filter(|c| c.settings.granularity.to_string() == name && c.ste == Ste::Full) {
            check("routing/model-window", case, &[0, 2]);
            check("families/qwen3-untied-f32-classic", case, &[0, 1]);
            check("families/llama-biases-bf16", case, &[0, 1]);
            check("families/llama-f16", case, &[1]);
        }
    }
}

/// Goldens of scripts/goldens/tuning.py.
#[test]
fn router_gradients_are_those_of_autograd() {
    let (folder, layers) = (goldens().join("routing/model"), [1, 2, 4]);
    let golden = Golden::open(&goldens().join("tuning.safetensors"));
    for case in cases() {
        let s = case.settings;
        for &goal in Goal::ALL {
            let case = Case { goal, ..case };
            let [target, level] =
                s.granularity.to_string().split('_').map(String::from).collect::<Vec<_>>().try_into().unwrap();
            let name = [&target, &level, s.keys.name(), s.select.name(), case.ste.name(), goal.name()].join("-");
            let floats = |what: &str| golden.floats(&format!("{name}.{what}"));
            let ints = |what: &str| golden.ints(&format!("{name}.{what}"));
            let mut ids = ints("ids").iter().copied();
            let mut samples = samples(1, 0);
            samples.iter_mut().flat_map(|s| &mut s.ids).for_each(|id| *id = ids.next().unwrap());
            let router = |(&l, values): (&usize, &[f32])| (l, values.iter().map(|&x| x.into()).collect());
            let routers: Routers = layers.iter().zip(floats("routers").chunks(64)).map(router).collect();
            let mut tuner = tuner(&folder, &case, &routers, LIMITS);
            let refs: Vec<&Sample> = samples.iter().collect();
            let rows = samples.iter().map(|s| s.inputs().len()).sum();
            let outcome = tuner.step(&refs, &settings(&case, rows)).unwrap();
            let active: Vec<u32> = outcome.active.iter().map(|&n| n as u32).collect();
            assert_eq!(active, ints("active"), "{name}");
            let losses: Vec<f32> = outcome.losses.iter().map(|&x| x as f32).collect();
            assert_close(&format!("{name}: losses"), &losses, floats("losses"), 2e-5);
            assert_close(&format!("{name}: gradients"), &tuner.take_gradients().unwrap(), floats("gradients"), 2e-5);
        }
    }
}

/// A step gives the sum of the gradients of its samples alone: packing changes nothing but the penalty, which is left
/// out.
#[test]
fn packed_samples_do_not_see_each_other() {
    let folder = goldens().join("routing/model");
    let reference = Reference::open(&folder);
    let samples = samples(reference.config.vocab, 50);
    for case in cases() {
        let routers = routers(&reference, &case, &samples, &[2, 3]);
        let mut tuner = tuner(&folder, &case, &routers, LIMITS);
        let settings = StepSettings { lambda: 0.0, ..settings(&case, 1) };
        let refs: Vec<&Sample> = samples.iter().collect();
        let together = tuner.step(&refs, &settings).unwrap();
        let packed = tuner.take_gradients().unwrap();
        let mut losses = Vec::new();
        for sample in &refs {
            losses.extend(tuner.step(&[sample], &settings).unwrap().losses);
        }
        for (sample, (a, b)) in together.losses.iter().zip(&losses).enumerate() {
            assert_bits(&format!("{case:?}, sample {sample}"), &[*a as f32], &[*b as f32]);
        }
        assert_close(&format!("{case:?}"), &tuner.take_gradients().unwrap(), &packed, 1e-5);
    }
}

/// There is no op for the gradient of a weight, and what runs backward is exactly the layers above the lowest routed
/// one: the FLOPs of the gradients through projections are those of the projections.
#[test]
fn nothing_runs_below_the_lowest_routed_layer() {
    let folder = goldens().join("routing/model");
    let c = config(&folder);
    let samples = samples(c.vocab, 7);
    let refs: Vec<&Sample> = samples.iter().collect();
    let rows: u64 = samples.iter().map(|s| s.inputs().len() as u64).sum();
    let answers: u64 = samples.iter().map(|s| s.answers().count() as u64).sum();
    let (h, q, kv, i) = (c.hidden as u64, c.q_rows() as u64, c.kv_rows() as u64, c.intermediate as u64);
    for name in Granularity::NAMES {
        for first in [1, 4] {
            let granularity: Granularity = name.parse().unwrap();
            // Everyone is active.
            let settings_of = RouterSettings { granularity, threshold: 0.0, ..RouterSettings::default() };
            let case = Case { settings: settings_of, ste: Ste::Full, goal: Goal::Tokens };
            let routers: Routers = [(first, vec![0.0; c.hidden])].into();
            let mut tuner = tuner(&folder, &case, &routers, LIMITS);
            tuner.step(&refs, &settings(&case, rows as usize)).unwrap();
            let (layers, above) = (c.layers as u64, (c.layers - 1 - first) as u64);
            let meter = tuner.meter().clone();
            let forward = |op: OpKind| meter.ops[op as usize];
            let backward = |op: GradientKind| meter.gradients[op as usize];

            let mlp = 2 * rows * 3 * h * i;
            let attention = 2 * rows * (2 * h * q + 2 * h * kv);
            let (o, down) = (2 * rows * h * q, 2 * rows * h * i);
            // Of the lowest layer: what lies between its mask and its output.
            let lowest = match granularity.target {
                Target::Attn => mlp + o,
                Target::Mlp => down,
                Target::Block => o + down,
            };
            let head = 2 * answers * h * c.vocab as u64;
            let expected = above * (mlp + attention) + lowest + head;
            assert_eq!(backward(GradientKind::BackProject).cost.flops, expected, "{name}, {first}");
            assert_eq!(backward(GradientKind::AttendBackward).calls, above, "{name}, {first}");
            assert_eq!(backward(GradientKind::GateBackward).calls, 1, "{name}, {first}");
            // Forward once, and from the routed layer on once more.
            let again = 2 * layers - first as u64;
            assert_eq!(forward(OpKind::Qkv).calls, again, "{name}, {first}");
            assert_eq!(forward(OpKind::Qkv).cost.flops, again * 2 * rows * h * (q + 2 * kv), "{name}, {first}");
            assert_eq!(forward(OpKind::Logits).cost.flops, head, "{name}, {first}");
        }
    }
}

/// Forward 1, once more for the upper half 0.5, and the gradients of its activations 0.5.
#[test]
fn a_step_costs_about_two_forward_passes() {
    let folder = goldens().join("routing/model");
    let samples = samples(config(&folder).vocab, 7);
    let refs: Vec<&Sample> = samples.iter().collect();
    for name in Granularity::NAMES {
        let granularity = name.parse().unwrap();
        let of = RouterSettings { granularity, threshold: 0.0, ..RouterSettings::default() };
        let case = Case { settings: of, ste: Ste::Full, goal: Goal::Tokens };
        let routers: Routers = [3, 4, 5].map(|l| (l, vec![0.0; 64])).into();
        let mut tuner = tuner(&folder, &case, &routers, LIMITS);
        tuner.evaluate(&refs, Goal::Tokens, true).unwrap();
        let forward = std::mem::take(tuner.meter()).total().flops;
        tuner.step(&refs, &settings(&case, 26)).unwrap();
        let step = tuner.meter().total().flops;
        assert!(step as f64 <= 2.1 * forward as f64, "{name}: {step} FLOPs, {forward} forward");
    }
}

/// The plan says what is kept: one layer, and the inputs of those from the lowest routed one on.
#[test]
fn the_plan_is_of_one_layer_and_the_saved_inputs() {
    let folder = goldens().join("routing/model");
    let case = cases()[0];
    let router = |l: usize| Routers::from([(l, vec![0.0; 64])]);
    let sizes = [1, 4].map(|l| tuner(&folder, &case, &router(l), LIMITS).plan().total());
    assert_eq!(sizes[0] - sizes[1], 3 * 64 * 64 * 4, "three more inputs of [64, 64]");
    let plan = tuner(&folder, &case, &router(1), LIMITS).plan().clone();
    assert_eq!(plan.kv.layers, 1);
    let less = StepLimits { memory: Some(Budget::Bytes(plan.total() - 1)), ..LIMITS };
    let set = RouterSet {
        settings: case.settings,
        weights: [(1, vec![0.0; 64])].into(),
        thresholds: BTreeMap::new(),
        fingerprint: None,
        metadata: BTreeMap::new(),
        path: "here".into(),
    };
    let weights = Weights::open(&folder).unwrap();
    let backend = training_backend(&options(1, 1)).unwrap();
    let error = Tuner::new(config(&folder), &weights, set, case.goal, less, backend).err().unwrap();
    assert!(error.kind() == mindskip::Kind::Memory && error.to_string().contains("--max-length"), "{error}");
}

/// What is measured without a layer is what a router does there that keeps nobody; and a layer below is computed once.
#[test]
fn a_layer_left_out_is_one_that_all_rows_skip() {
    let folder = goldens().join("routing/model");
    let c = config(&folder);
    let samples = samples(c.vocab, 11);
    let refs: Vec<&Sample> = samples.iter().collect();
    let zeros = |layers: &[usize]| layers.iter().map(|&l| (l, vec![0.0; c.hidden])).collect::<Routers>();
    let every: Vec<usize> = (0..c.layers).collect();
    for (name, &goal) in Granularity::NAMES.iter().zip(Goal::ALL.iter().cycle()) {
        // A score of 1/2 does not reach 1.
        let of = RouterSettings { granularity: name.parse().unwrap(), threshold: 1.0, ..RouterSettings::default() };
        let case = Case { settings: of, ste: Ste::Full, goal };
        let mut all = tuner(&folder, &case, &zeros(&every), LIMITS);
        let (dense, sums) = all.without_each(&refs, goal).unwrap();
        if of.granularity.target == Target::Attn {
            let forward = c.layers * if goal == Goal::Dense { 2 } else { 1 };
            let again = c.layers * (c.layers - 1) / 2;
            assert_eq!(all.meter().ops[OpKind::Qkv as usize].calls as usize, forward + again, "{name}");
        }
        assert_eq!(dense, all.evaluate(&refs, goal, false).unwrap());
        for &l in &every {
            let found = tuner(&folder, &case, &zeros(&[l]), LIMITS).evaluate(&refs, goal, true).unwrap();
            assert_eq!(found.active, [0], "{name}");
            let sum: f64 = found.losses.iter().sum();
            assert!((sums[l] - sum).abs() <= 1e-12 * sum, "{name} without layer {l}: {}, not {sum}", sums[l]);
        }
        let error = tuner(&folder, &case, &zeros(&[1]), LIMITS).without_each(&refs, goal).unwrap_err();
        assert_eq!(error.kind(), mindskip::Kind::Argument);
    }
}
