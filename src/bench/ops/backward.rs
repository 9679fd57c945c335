//! The ops of Router-Tuning's backward pass.

use super::Bench;
use crate::backend::*;
use crate::config::Config;
use crate::error::Result;
use crate::memory::Placer;
use crate::tensor::DType;

/// The gradients of a training step of R rows, all f32.
#[derive(Clone, Copy)]
pub(super) struct GradientBuffers {
    /// `[R, hidden]`
    d_x: Mat,
    d_h: Mat,
    /// `[R, heads·head_dim]`
    d_q: Mat,
    d_attn: Mat,
    /// `[R, kv_heads·head_dim]`
    d_k: Mat,
    d_v: Mat,
    /// `[R, intermediate]`
    d_act: Mat,
    d_gate: Mat,
    d_up: Mat,
    /// `[R, 1]`
    d_mask: Mat,
    /// `[1, hidden]`
    d_router: Mat,
    /// A loss for each row of logits.
    losses: Mat,
    /// `[2]`: where the K/V rows of the sequence begin and end
    kv_start: Ints,
}

const NOTHING: Mat = Mat { offset: 0, rows: 0, cols: 0, dtype: DType::F32 };

impl GradientBuffers {
    /// Where nothing goes backward.
    pub const NONE: GradientBuffers = GradientBuffers {
        d_x: NOTHING,
        d_h: NOTHING,
        d_q: NOTHING,
        d_attn: NOTHING,
        d_k: NOTHING,
        d_v: NOTHING,
        d_act: NOTHING,
        d_gate: NOTHING,
        d_up: NOTHING,
        d_mask: NOTHING,
        d_router: NOTHING,
        losses: NOTHING,
        kv_start: Ints { offset: 0, len: 0 },
    };

    /// Behind the buffers of the forward pass; None when a size overflows.
    pub fn place(c: &Config, rows: usize, logits: Mat, at: &mut Placer) -> Option<GradientBuffers> {
        let mut mat = |rows: usize, cols: usize| at.mat(rows, cols, DType::F32);
        Some(GradientBuffers {
            d_x: mat(rows, c.hidden)?,
            d_h: mat(rows, c.hidden)?,
            d_q: mat(rows, c.q_rows())?,
            d_attn: mat(rows, c.q_rows())?,
            d_k: mat(rows, c.kv_rows())?,
            d_v: mat(rows, c.kv_rows())?,
            d_act: mat(rows, c.intermediate)?,
            d_gate: mat(rows, c.intermediate)?,
            d_up: mat(rows, c.intermediate)?,
            d_mask: mat(rows, 1)?,
            d_router: mat(1, c.hidden)?,
            losses: mat(logits.rows, 1)?,
            kv_start: at.ints(2)?,
        })
    }
}

impl Bench {
    pub(super) fn training(&self) -> bool {
        self.gradients.d_x.rows > 0
    }

    /// Numbers as gradients are, around 0, and logits; the forward ops run on each layer before it is measured.
    pub(super) fn fill_gradients(&mut self) -> Result<()> {
        let GradientBuffers { d_x, d_h, d_q, d_attn, d_k, d_v, d_act, d_gate, d_up, d_mask, d_router, .. } =
            self.gradients;
        let all = [
            d_x,
            d_h,
            d_q,
            d_attn,
            d_k,
            d_v,
            d_act,
            d_gate,
            d_up,
            d_mask,
            d_router,
            self.buffers.logits,
            self.buffers.gate,
        ];
        for mat in all {
            let number = |i: usize| (mix(i as u64) % 2001) as f32 / 1e3 - 1.0;
            let values: Vec<f32> = (0..mat.rows * mat.cols).map(number).collect();
            self.backend.write_floats(mat, &values)?;
        }
        self.backend.write_ints(self.gradients.kv_start, &[0, self.rows as u32])
    }

    /// A backward op over all rows of the step. A new one does not compile without its size here.
    pub(super) fn gradient(&self, kind: GradientKind, layer: usize) -> Gradient {
        let (b, g, c, rows) = (&self.buffers, &self.gradients, &self.config, self.rows);
        let own = self.layers[layer];
        let all = b.all.slice(0..rows);
        let scale = (c.head_dim as f32).sqrt().recip();
        let (head_dim, kv_heads) = (c.head_dim, c.kv_heads);
        let (first, end) = (b.first.slice(0..rows), b.end.slice(0..rows));
        let gate_up = GateUp { h: b.h, gate: own.gate, up: own.up, gate_bias: None, up_bias: None };
        match kind {
            GradientKind::CopyRows => Gradient::CopyRows(CopyRows { src: Some(b.x.rows(0..rows)), out: g.d_x }),
            GradientKind::Loss => {
                let scored = rows.min(b.logits.rows);
                Gradient::Loss(Loss {
                    logits: b.logits.rows(0..scored),
                    against: Against::Tokens(b.targets.slice(0..scored)),
                    scale: 1.0 / scored as f32,
                    losses: g.losses.rows(0..scored),
                })
            }
            GradientKind::BackProject => Gradient::BackProject(BackProject {
                rows,
                d_out: g.d_x,
                from: None,
                weight: own.down,
                d_in: g.d_act,
                to: None,
                add: false,
            }),
            GradientKind::NormBackward => Gradient::NormBackward(NormBackward {
                x: b.x,
                rows: all,
                weight: own.norm,
                eps: c.norm_eps,
                d_h: g.d_h,
                gate: Some((self.router, g.d_mask)),
                d_x: g.d_x,
            }),
            GradientKind::SwiGluKept => {
                Gradient::SwiGluKept(SwiGluKept { of: gate_up, gate: g.d_gate, up: g.d_up, out: g.d_act })
            }
            GradientKind::SwiGluBackward => Gradient::SwiGluBackward(SwiGluBackward {
                again: Some(gate_up),
                d_act: g.d_act,
                d_gate: g.d_gate,
                d_up: g.d_up,
                dots: Some((all, g.d_mask)),
            }),
            GradientKind::AttendBackward => Gradient::AttendBackward(AttendBackward {
                layer,
                head_dim,
                kv_heads,
                scale,
                rows: all,
                row_slot: b.row_slot,
                first,
                end,
                kv_start: g.kv_start,
                q: b.q,
                out: b.attn,
                d_out: g.d_attn,
                d_q: g.d_q,
                d_k: g.d_k,
                d_v: g.d_v,
            }),
            GradientKind::RopeBackward => {
                Gradient::RopeBackward(RopeBackward { head_dim, angles: b.angles, rows: all, d: g.d_q, norm: None })
            }
            GradientKind::AttendApart => Gradient::AttendApart(AttendApart {
                layer,
                head_dim,
                kv_heads,
                scale,
                rows: all,
                row_slot: b.row_slot,
                first,
                end,
                q: b.q,
                k: b.k,
                v: b.v,
                out: b.attn,
            }),
            GradientKind::RowDots => {
                Gradient::RowDots(RowDots { a: g.d_attn, b: g.d_q, rows: all, bias: None, out: g.d_mask })
            }
            // With a penalty, as gradients that only go through the gate again and again become too small to be normal.
            GradientKind::GateBackward => Gradient::GateBackward(GateBackward {
                sequences: None,
                logits: b.gate.rows(0..rows),
                d_mask: g.d_mask,
                penalty: 1.0,
                h: b.h.rows(0..rows),
                d_router: g.d_router,
            }),
        }
    }
}
