//! The model: weights by layer, and the forward pass with its routed layers (He et al., arXiv 2410.13184, section 3).
//!
//! For the residual stream x and h = RMSNorm(x), a routed layer scores every row with sigmoid(h·r). Only active rows query
//! attention (target `attn`), pass the MLP (`mlp`) or both (`block`); what is skipped is not computed. RoPE and windows
//! go by original positions, never by compacted indices.

use std::collections::BTreeMap;

use crate::backend::*;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::router::{Level, RouterSet, RouterSettings, Select, Target};
use crate::step::{Chunk, Phase, State};
use crate::tensor::Tensor;
use crate::weights::Weights;

/// A decoder-only language model whose weights a backend holds.
#[derive(Debug)]
pub(crate) struct Model {
    pub config: Config,
    pub routing: Option<Routing>,
    /// `[vocab, hidden]`
    pub(crate) embed: Weight,
    pub(crate) layers: Vec<Layer>,
    /// `[1, hidden]`
    pub(crate) norm: Weight,
    /// `[vocab, hidden]`; the embedding when tied
    pub(crate) head: Weight,
    /// `[1, head_dim/2]`: radians per position
    pub(crate) inv_freq: Weight,
    /// The routers that were handed over last, and where they are held.
    routers: Option<(RouterSet, BTreeMap<usize, Weight>)>,
}

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    /// `[1, hidden]`
    pub(crate) input_norm: Weight,
    /// Q `[heads·head_dim, hidden]`, K and V `[kv_heads·head_dim, hidden]`
    pub(crate) qkv: [Weight; 3],
    pub(crate) qkv_bias: [Option<Weight>; 3],
    /// `[1, head_dim]`
    pub(crate) q_norm: Option<Weight>,
    pub(crate) k_norm: Option<Weight>,
    /// `[hidden, heads·head_dim]`
    pub(crate) o: Weight,
    pub(crate) o_bias: Option<Weight>,
    /// `[1, hidden]`
    pub(crate) post_norm: Weight,
    /// `[intermediate, hidden]`
    pub(crate) gate: Weight,
    pub(crate) gate_bias: Option<Weight>,
    pub(crate) up: Weight,
    pub(crate) up_bias: Option<Weight>,
    /// `[hidden, intermediate]`
    pub(crate) down: Weight,
    pub(crate) down_bias: Option<Weight>,
    /// Sliding window in tokens.
    pub(crate) window: Option<usize>,
    pub(crate) routed: Option<Routed>,
}

/// What makes a layer a routed one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Routed {
    /// Its number among the routed layers: where its logits and active rows are kept.
    pub(crate) nth: usize,
    /// `[1, hidden]`, f32; None when the host draws the logits ([`Gates::Random`])
    pub(crate) router: Option<Weight>,
}

/// What is wanted of the norm in front of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Norm {
    Rows,
    Scores,
    RowsAndScores,
}

/// Which layers are routed, how, and by what.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::model::{Gates, Routing};
/// use mindskip::router::{LayerSpec, RouterSettings};
///
/// let bundle = Bundle::embedded()?;
/// let trained = Routing::routers(bundle.routers.expect("it comes with some"));
/// assert_eq!(trained.layers, [3, 4, 5, 6, 7]);
///
/// // Without routers: three of ten tokens pass the MLPs of the upper half, whichever they are.
/// let settings = RouterSettings { granularity: "mlp_token".parse()?, ..RouterSettings::default() };
/// let layers = LayerSpec::Last(4).resolve(bundle.config.layers)?;
/// let random = Routing { settings, layers, gates: Gates::Random { capacity: 0.3, seed: 1 } };
/// let mut engine = Engine::new(bundle.config, bundle.weights, Some(random), &Options::default())?;
/// let seq = engine.open()?;
/// engine.prefill(&[(seq, &[1; 500])])?;
/// let activity = engine.activity()?;
/// assert!((activity.mean_capacity(&[3, 4, 5, 6]) - 0.3).abs() < 0.05);
/// assert_eq!(activity.capacity(7), 1.0);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Routing {
    /// What is skipped, and how.
    pub settings: RouterSettings,
    /// The routed layers, ascending.
    pub layers: Vec<usize>,
    pub gates: Gates,
}

/// Where the router logits come from.
#[derive(Debug, Clone)]
pub enum Gates {
    /// Trained routers.
    Routers(RouterSet),
    /// Each (token, layer), or each (sequence, layer), is active with this probability: to measure without routers.
    Random { capacity: f32, seed: u64 },
}

impl Routing {
    /// Routing by the routers of a set, with its settings.
    pub fn routers(set: RouterSet) -> Self {
        Routing { settings: set.settings, layers: set.weights.keys().copied().collect(), gates: Gates::Routers(set) }
    }

    /// Whether what is decided about a token does not depend on the tokens behind it: a prompt may be read in parts then, and
    /// prompts share their beginnings.
    ///
    /// ```
    /// use mindskip::bundle::Bundle;
    /// use mindskip::model::Routing;
    ///
    /// let mut routing = Routing::routers(Bundle::embedded()?.routers.expect("it comes with some"));
    /// assert!(routing.is_causal());
    /// routing.settings.granularity = "attn_sequence".parse()?;
    /// assert!(!routing.is_causal());
    /// # Ok::<(), mindskip::Error>(())
    /// ```
    pub fn is_causal(&self) -> bool {
        self.settings.granularity.level == Level::Token && self.settings.select == Select::Threshold
    }

    /// The part that decides in a layer, in prefill or in decode (top-k is a matter of whole prompts).
    pub(crate) fn decide(&self, layer: usize, phase: Phase) -> Decide {
        let s = &self.settings;
        let threshold = match &self.gates {
            // A drawn logit is far on either side of any threshold's logit but those of 0 and 1.
            Gates::Random { .. } => 0.5,
            Gates::Routers(set) => set.threshold(layer),
        };
        match (s.granularity.level, s.select, phase, &self.gates) {
            (Level::Sequence, ..) => Decide::Sequence(threshold),
            (Level::Token, Select::TopK, Phase::Prefill, Gates::Routers(_)) => Decide::TopK(s.capacity),
            (Level::Token, ..) => Decide::Threshold(threshold),
        }
    }

    /// Rows that query attention.
    fn queries(&self) -> Take {
        match self.settings.granularity.target {
            Target::Attn | Target::Block => Take::Active,
            Target::Mlp => Take::All,
        }
    }

    /// Rows that write K/V.
    pub(crate) fn keys(&self) -> Take {
        if self.settings.keeps_kv() { Take::All } else { Take::Active }
    }

    /// Rows that pass the MLP.
    fn mlp(&self) -> Take {
        match self.settings.granularity.target {
            Target::Attn => Take::All,
            Target::Mlp | Target::Block => Take::Active,
        }
    }
}

impl Model {
    /// Hands the weights to the backend, checking every shape. Nothing is converted.
    pub fn load(config: Config, weights: &Weights, routing: Option<Routing>, be: &mut dyn Backend) -> Result<Self> {
        let (hidden, inter, d) = (config.hidden, config.intermediate, config.head_dim);
        let (q_dim, kv_dim) = (config.q_rows(), config.kv_rows());
        let mut get = |name: &str, rows, cols| weights.load(name, rows, cols, be);

        let embed = get("model.embed_tokens.weight", config.vocab, hidden)?;
        let head = if config.tied { embed } else { get("lm_head.weight", config.vocab, hidden)? };
        let norm = get("model.norm.weight", 1, hidden)?;
        let mut layers = Vec::with_capacity(config.layers);
        for (l, &window) in config.windows.iter().enumerate() {
            let mut get = |part: &str, rows, cols| get(&format!("model.layers.{l}.{part}"), rows, cols);
            let mut bias = |part: &str, wanted: bool, n| wanted.then(|| get(&format!("{part}.bias"), 1, n)).transpose();
            let has = |part: &str| weights.contains(&format!("model.layers.{l}.{part}"));
            let qkv_bias = [
                bias("self_attn.q_proj", has("self_attn.q_proj.bias"), q_dim)?,
                bias("self_attn.k_proj", has("self_attn.k_proj.bias"), kv_dim)?,
                bias("self_attn.v_proj", has("self_attn.v_proj.bias"), kv_dim)?,
            ];
            let o_bias = bias("self_attn.o_proj", has("self_attn.o_proj.bias"), hidden)?;
            let gate_bias = bias("mlp.gate_proj", has("mlp.gate_proj.bias"), inter)?;
            let up_bias = bias("mlp.up_proj", has("mlp.up_proj.bias"), inter)?;
            let down_bias = bias("mlp.down_proj", has("mlp.down_proj.bias"), hidden)?;
            let mut head_norm = |part: &str| config.family.qk_norm().then(|| get(part, 1, d)).transpose();
            layers.push(Layer {
                q_norm: head_norm("self_attn.q_norm.weight")?,
                k_norm: head_norm("self_attn.k_norm.weight")?,
                input_norm: get("input_layernorm.weight", 1, hidden)?,
                qkv: [
                    get("self_attn.q_proj.weight", q_dim, hidden)?,
                    get("self_attn.k_proj.weight", kv_dim, hidden)?,
                    get("self_attn.v_proj.weight", kv_dim, hidden)?,
                ],
                qkv_bias,
                o: get("self_attn.o_proj.weight", hidden, q_dim)?,
                o_bias,
                post_norm: get("post_attention_layernorm.weight", 1, hidden)?,
                gate: get("mlp.gate_proj.weight", inter, hidden)?,
                gate_bias,
                up: get("mlp.up_proj.weight", inter, hidden)?,
                up_bias,
                down: get("mlp.down_proj.weight", hidden, inter)?,
                down_bias,
                window,
                routed: None,
            });
        }
        let inv_freq = be.upload(&Tensor::from_f32(&config.rope.inv_freq(d)))?;
        let mut model = Model { config, routing: None, embed, layers, norm, head, inv_freq, routers: None };
        model.route(routing, be)?;
        Ok(model)
    }

    /// Routes as asked from here on; None: not at all. The backend must forget its recorded steps.
    pub(crate) fn route(&mut self, routing: Option<Routing>, be: &mut dyn Backend) -> Result<()> {
        self.layers.iter_mut().for_each(|layer| layer.routed = None);
        self.routing = None;
        let Some(routing) = routing else { return Ok(()) };
        let held = match &routing.gates {
            Gates::Routers(set) => self.hold(set, be)?,
            Gates::Random { .. } => BTreeMap::new(),
        };
        let count = self.layers.len();
        for &l in &routing.layers {
            if l >= count {
                return Err(Error::new(
                    Kind::Argument,
                    format!("layer {l} cannot be routed, the model has layers 0 to {}", count - 1),
                ));
            }
            if matches!(routing.gates, Gates::Routers(_)) && !held.contains_key(&l) {
                return Err(Error::new(Kind::Argument, format!("layer {l} is routed, but has no router")));
            }
        }
        for (nth, l) in routing.layers.iter().enumerate() {
            self.layers[*l].routed = Some(Routed { nth, router: held.get(l).copied() });
        }
        self.routing = Some(routing);
        Ok(())
    }

    /// The routers of a set, handed over unless they are those of the last time.
    fn hold(&mut self, set: &RouterSet, be: &mut dyn Backend) -> Result<BTreeMap<usize, Weight>> {
        if let Some((known, held)) = &self.routers
            && known.weights == set.weights
        {
            return Ok(held.clone());
        }
        let upload = |(&layer, router): (&usize, &Vec<f32>)| Ok((layer, be.upload(&Tensor::from_f32(router))?));
        let held: BTreeMap<_, _> = set.weights.iter().map(upload).collect::<Result<_>>()?;
        self.routers = Some((set.clone(), held.clone()));
        Ok(held)
    }

    /// Which rows of layer `l` write K/V.
    pub(crate) fn keys_of(&self, l: usize) -> Take {
        self.keys(&self.layers[l])
    }

    /// One step over the rows that `st` holds, up to the residual stream behind the last layer.
    pub(crate) fn forward(&self, be: &mut dyn Backend, st: &mut State) -> Result<()> {
        let b = st.plan.buffers;
        let (ids, pos) = (b.ids.slice(0..st.rows()), b.pos.slice(0..st.rows()));
        be.embed(&Embed { table: self.embed, ids, out: b.x })?;
        be.rope_angles(&RopeAngles { pos, inv_freq: self.inv_freq, out: b.angles })?;
        let whole = st.chunks().len() == 1;
        for (l, layer) in self.layers.iter().enumerate() {
            // Top-k and sequence decisions need every row's score, so all chunks are scored before the first one goes on.
            let scored = layer.router().is_some();
            if scored {
                let norm = if whole { Norm::RowsAndScores } else { Norm::Scores };
                for chunk in st.chunks() {
                    be.norm_gate(&self.input_norm(layer, st, chunk, norm))?;
                }
            }
            be.route(&self.routing_of(l, layer, st))?;
            st.keep_rows(be, l, self.keys(layer), layer.routed.is_some())?;
            for chunk in st.chunks() {
                if !(scored && whole) {
                    be.norm_gate(&self.input_norm(layer, st, chunk, Norm::Rows))?;
                }
                self.attention(be, st, l, chunk)?;
                self.mlp(be, st, l, chunk)?;
                st.passed(l, chunk)?;
            }
        }
        Ok(())
    }

    /// The final norm and the logits of the rows listed in `head_rows[0..n]`, into `logits[0..n]`.
    pub(crate) fn head(&self, be: &mut dyn Backend, st: &State, n: usize) -> Result<()> {
        let b = &st.plan.buffers;
        be.norm_gate(&NormGate {
            x: b.x,
            rows: RowSet::exact(b.head_rows.slice(0..n)),
            weight: self.norm,
            eps: self.config.norm_eps,
            out: Some(b.h),
            gate: None,
        })?;
        be.logits(&Logits { h: b.h, weight: self.head, out: b.logits.rows(0..n) })
    }

    /// Log-probabilities of (row of the last prefill, token behind it).
    pub(crate) fn logprobs(
        &self,
        be: &mut dyn Backend,
        st: &State,
        targets: &[(u32, u32)],
        out: &mut [f32],
    ) -> Result<()> {
        let b = &st.plan.buffers;
        let at_once = b.logits.rows;
        for (targets, out) in targets.chunks(at_once).zip(out.chunks_mut(at_once)) {
            let n = targets.len();
            let (rows, targets): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
            be.write_ints(b.head_rows, &rows)?;
            be.write_ints(b.targets, &targets)?;
            self.head(be, st, n)?;
            be.logprobs(&LogProbs {
                logits: b.logits.rows(0..n),
                targets: b.targets.slice(0..n),
                out: b.logprobs.rows(0..n),
            })?;
            be.read_floats(b.logprobs.rows(0..n), out)?;
        }
        Ok(())
    }

    /// h = RMSNorm(x) of a chunk, or the router's logits h·r, or both.
    fn input_norm(&self, layer: &Layer, st: &State, chunk: Chunk, norm: Norm) -> NormGate {
        let b = &st.plan.buffers;
        let gate = layer
            .routed
            .filter(|_| norm != Norm::Rows)
            .and_then(|routed| routed.router.map(|router| Gate { router, logits: st.gate(routed.nth) }));
        let out = (norm != Norm::Scores).then_some(b.h);
        NormGate { x: b.x, rows: st.all(chunk), weight: layer.input_norm, eps: self.config.norm_eps, out, gate }
    }

    fn routing_of(&self, l: usize, layer: &Layer, st: &State) -> Route {
        let b = &st.plan.buffers;
        let (decide, queries, keys) = match (&self.routing, layer.routed) {
            (Some(r), Some(_)) => (r.decide(l, st.phase()), r.queries(), r.keys()),
            _ => (Decide::All, Take::All, Take::All),
        };
        let seqs = st.sequences();
        Route {
            layer: l,
            decide,
            queries,
            keys,
            window: layer.window,
            logits: layer.routed.map_or(b.x.rows(0..0), |r| st.gate(r.nth)),
            pos: b.pos.slice(0..st.rows()),
            seq_start: b.seq_start.slice(0..seqs + 1),
            slots: b.slots.slice(0..seqs),
            decided: st.decided(l),
            cuts: st.cuts(),
            active: self.active(layer, st),
            active_at: st.active_at(l),
            first: b.first,
            end: b.end,
            kv_row: b.kv_row,
        }
    }

    /// x += m·Attn(h): Q of the active rows, K/V of the kept rows, attention by ranges, output scattered back.
    fn attention(&self, be: &mut dyn Backend, st: &State, l: usize, chunk: Chunk) -> Result<()> {
        let (b, layer, c) = (&st.plan.buffers, &self.layers[l], &self.config);
        let (q_rows, kv_rows) =
            (self.rows(st, l, chunk, self.queries(layer)), self.rows(st, l, chunk, self.keys(layer)));
        // What Route wrote for the i-th querying or kept row of the step; this chunk's part of it.
        let (q_part, kv_part) = (st.part(l, chunk, self.queries(layer)), st.part(l, chunk, self.keys(layer)));
        be.qkv(&Qkv {
            h: b.h,
            base: chunk.start,
            q_rows,
            kv_rows,
            weights: layer.qkv,
            biases: layer.qkv_bias,
            q: b.q,
            k: b.k,
            v: b.v,
        })?;
        be.rope_append(&RopeAppend {
            layer: l,
            head_dim: c.head_dim,
            angles: b.angles,
            pos: b.pos,
            row_slot: b.row_slot,
            q_rows,
            kv_rows,
            kv_row: b.kv_row.slice(kv_part),
            q: b.q,
            k: b.k,
            v: b.v,
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            eps: c.norm_eps,
        })?;
        be.attend(&Attend {
            layer: l,
            head_dim: c.head_dim,
            scale: (c.head_dim as f32).sqrt().recip(),
            rows: q_rows,
            row_slot: b.row_slot,
            first: b.first.slice(q_part.clone()),
            end: b.end.slice(q_part),
            q: b.q,
            out: b.attn,
            kv_heads: c.kv_heads,
            single: st.phase() == Phase::Decode,
        })?;
        be.project_add(&ProjectAdd { src: b.attn, weight: layer.o, bias: layer.o_bias, rows: q_rows, x: b.x })
    }

    /// x += m·MLP(RMSNorm(x)).
    fn mlp(&self, be: &mut dyn Backend, st: &State, l: usize, chunk: Chunk) -> Result<()> {
        let (b, layer) = (&st.plan.buffers, &self.layers[l]);
        let take = match (&self.routing, layer.routed) {
            (Some(r), Some(_)) => r.mlp(),
            _ => Take::All,
        };
        let rows = self.rows(st, l, chunk, take);
        let eps = self.config.norm_eps;
        be.norm_gate(&NormGate { x: b.x, rows, weight: layer.post_norm, eps, out: Some(b.h), gate: None })?;
        be.swiglu(&SwiGlu {
            h: b.h,
            rows,
            gate: layer.gate,
            up: layer.up,
            gate_bias: layer.gate_bias,
            up_bias: layer.up_bias,
            out: b.act,
        })?;
        be.project_add(&ProjectAdd { src: b.act, weight: layer.down, bias: layer.down_bias, rows, x: b.x })
    }

    /// The rows of a chunk that a part of layer `l` takes.
    fn rows(&self, st: &State, l: usize, chunk: Chunk, take: Take) -> RowSet {
        match take {
            Take::All => st.all(chunk),
            Take::Active => st.active(l, chunk, self.active(&self.layers[l], st)),
        }
    }

    fn queries(&self, layer: &Layer) -> Take {
        self.routing.as_ref().filter(|_| layer.routed.is_some()).map_or(Take::All, Routing::queries)
    }

    fn keys(&self, layer: &Layer) -> Take {
        self.routing.as_ref().filter(|_| layer.routed.is_some()).map_or(Take::All, Routing::keys)
    }

    /// Where a layer's active rows are listed; dense layers share one place.
    fn active(&self, layer: &Layer, st: &State) -> Ints {
        let dense = self.routing.as_ref().map_or(0, |r| r.layers.len());
        st.active_list(layer.routed.map_or(dense, |r| r.nth))
    }
}

impl Layer {
    pub(crate) fn router(&self) -> Option<Weight> {
        self.routed.and_then(|r| r.router)
    }
}
