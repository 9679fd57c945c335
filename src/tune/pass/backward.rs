//! The way back of a step, from the loss down to the lowest routed layer.

use super::*;
use crate::tune::Ste;

impl Pass<'_> {
    /// From the gradient behind the last layer to those of the routers.
    pub fn backward(&mut self, settings: &StepSettings) -> Result<()> {
        for l in (self.plan.first..self.model.layers.len()).rev() {
            self.layer_backward(l, settings)?;
        }
        Ok(())
    }

    /// Computes a layer again from its input, as far as it was not kept, and turns the gradient behind it into the one
    /// before it and, where it is routed, into that of its router. The lowest layer passes on nothing.
    fn layer_backward(&mut self, l: usize, settings: &StepSettings) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        let (lowest, input) = (l == self.plan.first, self.saved(l).expect("its input was kept"));
        let target = self.settings(layer).map(|s| s.granularity.target);
        self.be.copy(&CopyRows { src: Some(input), out: self.part(b.x) })?;
        let at = self.place(l, Save::Activations);
        let treated = match at.kept {
            None => self.attention(l, at)?,
            Some(Between { x, .. }) => {
                self.input_norm(l)?;
                let treated = self.route(l, at)?;
                self.be.copy(&CopyRows { src: Some(x), out: self.part(b.x) })?;
                treated
            }
        };
        if target.is_some() {
            self.be.copy(&CopyRows { src: None, out: self.part(b.d_mask) })?;
        }

        if target == Some(Target::Block) {
            self.attention_dots(l, at.attn, treated.queries.rows)?;
        }
        match target {
            Some(Target::Mlp | Target::Block) if lowest => self.mlp_dots(l, treated.mlp)?,
            Some(Target::Mlp | Target::Block) => self.mlp_backward(l, treated.mlp, at.kept, true)?,
            Some(Target::Attn) | None => self.mlp_backward(l, treated.mlp, at.kept, false)?,
        }
        if target == Some(Target::Attn) {
            self.attention_dots(l, at.attn, treated.queries.rows)?;
        }
        if !lowest {
            if target != Some(Target::Attn) {
                self.attention_gradient(l, treated.queries.rows)?;
            }
            self.attention_backward(l, &treated)?;
        }
        if let Some(target) = target {
            if settings.ste == Ste::Full {
                self.skipped_dots(l, target, &treated)?;
            }
            self.gate_backward(l, &treated, settings)?;
        }
        if !lowest {
            let gate = target.and(layer.router()).map(|router| (router, b.d_mask));
            self.norm_backward(input, self.all(), layer.input_norm, b.d_h, gate)?;
        }
        Ok(())
    }

    pub(super) fn back(
        &mut self,
        rows: usize,
        (d_out, from): (Mat, Option<Ints>),
        weight: Weight,
        (d_in, to): (Mat, Option<Ints>),
        add: bool,
    ) -> Result<()> {
        self.be.back_project(&BackProject { rows, d_out, from, weight, d_in, to, add })
    }

    pub(super) fn norm_backward(
        &mut self,
        x: Mat,
        rows: Ints,
        weight: Weight,
        d_h: Mat,
        gate: Option<(Weight, Mat)>,
    ) -> Result<()> {
        let (eps, d_x) = (self.model.config.norm_eps, self.buffers().d_x);
        self.be.norm_backward(&NormBackward { x, rows, weight, eps, d_h, gate, d_x })
    }

    /// The gradient of what attention gave some rows, into `d_attn`.
    fn attention_gradient(&mut self, l: usize, rows: Ints) -> Result<()> {
        let b = self.buffers();
        self.back(rows.len, (b.d_x, Some(rows)), self.model.layers[l].o, (b.d_attn, None), false)
    }

    /// The gradient of the mask in front of the attention of some rows, which `attn` holds; `d_attn` is left behind.
    fn attention_dots(&mut self, l: usize, attn: Mat, rows: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        self.attention_gradient(l, rows)?;
        let bias = layer.o_bias.map(|bias| (b.d_x, bias));
        let (a, b, out) = (b.d_attn, attn, b.d_mask);
        self.be.row_dots(&RowDots { a: a.rows(0..rows.len), b: b.rows(0..rows.len), rows, bias, out })
    }

    /// The same for the MLP of some rows.
    fn mlp_dots(&mut self, l: usize, rows: Ints) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        for (_, part) in chunks(rows, b.h2.rows) {
            self.activations(l, part)?;
            self.back(part.len, (b.d_x, Some(part)), layer.down, (b.d_gate, None), false)?;
            let bias = layer.down_bias.map(|bias| (b.d_x, bias));
            let [d_act, act] = [b.d_gate, b.act].map(|m| m.rows(0..part.len));
            self.be.row_dots(&RowDots { a: d_act, b: act, rows: part, bias, out: b.d_mask })?;
        }
        Ok(())
    }

    /// Adds to `d_x` what comes through the MLP of some rows; `x` is what it read. With `dots`, also the gradient of
    /// the mask in front of it.
    fn mlp_backward(&mut self, l: usize, rows: Ints, kept: Option<Between>, dots: bool) -> Result<()> {
        let (b, layer) = (self.buffers(), &self.model.layers[l]);
        for (start, part) in chunks(rows, b.h2.rows) {
            let n = part.len;
            let [d_h, d_act] = [b.d_h2, b.act].map(|m| m.rows(0..n));
            let [d_gate, d_up] = match kept {
                None => [b.d_gate, b.d_up].map(|m| m.rows(0..n)),
                Some(kept) => [kept.gate, kept.up].map(|m| m.rows(start..start + n)),
            };
            if kept.is_none() {
                self.norm(b.x, part, layer.post_norm, b.h2)?;
            }
            self.back(n, (b.d_x, Some(part)), layer.down, (d_act, None), false)?;
            if let Some(bias) = layer.down_bias.filter(|_| dots) {
                // Of no columns: only the bias.
                let none = Mat { cols: 0, ..d_act };
                self.be.row_dots(&RowDots {
                    a: none,
                    b: none,
                    rows: part,
                    bias: Some((b.d_x, bias)),
                    out: b.d_mask,
                })?;
            }
            self.be.swiglu_backward(&SwiGluBackward {
                again: kept.is_none().then(|| self.gate_up(l)),
                d_act,
                d_gate,
                d_up,
                dots: dots.then_some((part, b.d_mask)),
            })?;
            self.back(n, (d_gate, None), layer.gate, (d_h, None), false)?;
            self.back(n, (d_up, None), layer.up, (d_h, None), true)?;
            self.norm_backward(b.x, part, layer.post_norm, d_h, None)?;
        }
        Ok(())
    }

    /// From `d_attn` to the gradient of what the layer's attention read, in `d_h`.
    fn attention_backward(&mut self, l: usize, treated: &Treated) -> Result<()> {
        let (b, layer, c) = (self.buffers(), &self.model.layers[l], &self.model.config);
        let (at, Queries { rows, first, end }, keys) = (treated.at, treated.queries, treated.keys);
        let [d_k, d_v] = [b.d_k, b.d_v].map(|m| m.rows(0..keys.len));
        self.be.attend_backward(&AttendBackward {
            layer: at.kv,
            head_dim: c.head_dim,
            kv_heads: c.kv_heads,
            scale: self.scale(),
            rows,
            row_slot: b.row_slot,
            first,
            end,
            kv_start: b.kv_start.slice(0..self.samples.len() + 1),
            q: at.q,
            out: at.attn,
            d_out: b.d_attn,
            d_q: b.d_q.rows(0..rows.len),
            d_k,
            d_v,
        })?;
        if layer.q_norm.is_some() {
            self.project(l, b.q, rows, keys)?; // as they were before their norms
        }
        for (d, rows, norm, src) in [(b.d_q, rows, layer.q_norm, b.q), (d_k, keys, layer.k_norm, b.k)] {
            let norm = norm.map(|weight| HeadNorm { weight, eps: c.norm_eps, src: src.rows(0..rows.len) });
            let d = d.rows(0..rows.len);
            self.be.rope_backward(&RopeBackward { head_dim: c.head_dim, angles: b.angles, rows, d, norm })?;
        }
        self.be.copy(&CopyRows { src: None, out: self.part(b.d_h) })?;
        for (d, rows, weight) in [(b.d_q, rows, 0), (d_k, keys, 1), (d_v, keys, 2)] {
            self.back(rows.len, (d, None), layer.qkv[weight], (b.d_h, Some(rows)), true)?;
        }
        Ok(())
    }

    /// The gradients of the masks of the rows that were skipped: what their sub-layers would have given.
    fn skipped_dots(&mut self, l: usize, target: Target, treated: &Treated) -> Result<()> {
        let (b, layer, c) = (self.buffers(), &self.model.layers[l], &self.model.config);
        let Queries { rows, first, end } = treated.skipped;
        if rows.len == 0 {
            return Ok(());
        }
        if target != Target::Mlp {
            let (nobody, idle) = (rows.slice(0..0), [b.d_k, b.d_v]);
            let at = Place { kv: treated.at.kv, ..self.shared() };
            self.project(l, b.q, rows, if treated.apart { rows } else { nobody })?;
            self.rope(l, at.kv, (b.q, layer.q_norm), rows, nobody, idle)?;
            if treated.apart {
                self.rope(l, at.kv, (b.k, layer.k_norm), rows, nobody, idle)?;
                self.be.attend_apart(&AttendApart {
                    layer: at.kv,
                    head_dim: c.head_dim,
                    kv_heads: c.kv_heads,
                    scale: self.scale(),
                    rows,
                    row_slot: b.row_slot,
                    first,
                    end,
                    q: b.q,
                    k: b.k,
                    v: b.v,
                    out: b.attn,
                })?;
            } else {
                self.attend(at, treated.skipped)?;
            }
            self.attention_dots(l, b.attn, rows)?;
        }
        if target == Target::Block {
            let rows = RowSet::exact(rows);
            self.be.project_add(&ProjectAdd { src: b.attn, weight: layer.o, bias: layer.o_bias, rows, x: b.x })?;
        }
        if target != Target::Attn {
            self.mlp_dots(l, rows)?;
        }
        Ok(())
    }

    /// From the gradients of the masks to those of the router and of its logits, which take their place.
    fn gate_backward(&mut self, l: usize, treated: &Treated, settings: &StepSettings) -> Result<()> {
        let (b, n, layer) = (self.buffers(), self.rows(), &self.model.layers[l]);
        let (Some(routed), Some(of)) = (layer.routed, self.settings(layer)) else { return Ok(()) };
        let active = n - treated.skipped.rows.len;
        let above = active as f32 > settings.target * n as f32;
        let sequences = b.seq_start.slice(0..self.samples.len() + 1);
        self.be.gate_backward(&GateBackward {
            sequences: (of.granularity.level == Level::Sequence).then_some(sequences),
            logits: b.gate,
            d_mask: self.part(b.d_mask),
            penalty: if above { settings.lambda * settings.capacity_scale } else { 0.0 },
            h: b.h,
            d_router: b.d_routers.rows(routed.nth..routed.nth + 1),
        })
    }
}
