//! What a backend's threads can do at best: a copy far larger than the caches, and a product of its own.

use super::*;
use crate::backend::rates::best;

/// Bytes of a copy: several times the third-level cache of most machines.
const COPY: usize = 128 << 20;
/// Rows and width of the product: a chunk of a prompt through a layer that the caches hold, where products are fastest.
const ROWS: usize = 512;
const WIDTH: usize = 768;

impl CpuBackend {
    pub(super) fn measure(&mut self, dtype: DType) -> Result<Rates> {
        Ok(Rates { copy: self.copy_rate()?, product: self.product_rate(dtype)? })
    }

    fn copy_rate(&self) -> Result<f64> {
        let (mut from, mut to) = (zeroed(COPY)?, zeroed(COPY)?);
        from.fill(1);
        // A part for each thread: only long copies pass the caches by.
        let part = COPY.div_ceil(self.threads.count());
        let seconds = best(&mut |n| {
            let mut copy =
                || to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
            (0..n).for_each(|_| self.threads.enter(&mut copy));
            Ok(())
        })?;
        Ok(2.0 * COPY as f64 / seconds)
    }

    fn product_rate(&mut self, dtype: DType) -> Result<f64> {
        let weight = self.random(dtype, WIDTH, WIDTH, Noise { seed: 1, mean: 0.0, scale: 0.1 })?;
        let kv =
            KvLayout { layers: 1, slots: 1, pages: 1, pages_per_seq: 1, kv_heads: 1, head_dim: 2, dtype: DType::F32 };
        let h = Mat { offset: 0, rows: ROWS, cols: WIDTH, dtype: DType::F32 };
        let out = Mat { offset: h.bytes(), ..h };
        self.reserve(h.bytes() + out.bytes(), 0, 0, &kv)?;
        let noise = Noise { seed: 2, mean: 0.5, scale: 1.0 };
        self.write_floats(h, &noise.tensor(DType::F32, ROWS, WIDTH)?.to_f32())?;
        let product = Logits { h, weight, out };
        let seconds = best(&mut |n| self.step(None, &mut |be| (0..n).try_for_each(|_| be.logits(&product))))?;
        Ok(product.cost(Work { rows: ROWS, ..Work::default() }).flops as f64 / seconds)
    }
}
