//! What a GPU can do at best: a copy within its memory and a product of cuBLASLt, as large as it has room and time for.

use super::*;

/// Bytes of a copy and the width of a square product. They grow from the first to the last, and stop where a call lasts
/// [`LONG`], as it does on the emulator.
const COPIES: [usize; 4] = [1 << 20, 16 << 20, 256 << 20, 1 << 30];
const PRODUCTS: [usize; 4] = [64, 512, 2048, 8192];
const LONG: Duration = Duration::from_millis(5);

impl CudaBackend {
    pub(super) fn measure(&mut self) -> Result<Rates> {
        let (copy, product) = (self.copy_rate()?, self.product_rate()?);
        Ok(Rates { copy, product })
    }

    /// Waits for what was sent.
    fn wait(&mut self) -> Result<()> {
        self.device.copy_out(self.staged, &mut [0; 4])
    }

    /// The rate that `run` gives, beside the seconds of a call, for the largest size that is called for. Each size takes memory
    /// of its own; where that is not to be had, the one before counts.
    fn grow(&mut self, sizes: [usize; 4], mut run: impl FnMut(&mut Self, usize) -> Result<(f64, f64)>) -> Result<f64> {
        let mut rate = run(self, sizes[0])?;
        for size in &sizes[1..] {
            if rate.0 > LONG.as_secs_f64() {
                break;
            }
            match run(self, *size) {
                Err(e) if e.kind() == Kind::Memory => break,
                measured => rate = measured?,
            }
        }
        Ok(rate.1)
    }

    fn copy_rate(&mut self) -> Result<f64> {
        self.grow(COPIES, |this, bytes| {
            let (from, to) = (this.device.allocate(bytes)?, this.device.allocate(bytes)?);
            this.device.clear(from, bytes)?;
            let seconds = best(&mut |n| {
                (0..n).try_for_each(|_| this.device.copy(to, from, bytes))?;
                this.wait()
            })?;
            Ok((seconds, 2.0 * bytes as f64 / seconds))
        })
    }

    fn product_rate(&mut self) -> Result<f64> {
        let dtype = self.info.activations;
        self.grow(PRODUCTS, |this, n| {
            let bytes = n * n * dtype.size();
            let noise = Noise { seed: n as u64, mean: 0.0, scale: 1.0 };
            let mut matrix = || {
                let at = this.device.allocate(bytes)?;
                this.draw(at, n * n, noise)?;
                Ok(at)
            };
            // Random numbers, as a GPU is faster with zeros.
            let [weight, src, out] = [matrix()?, matrix()?, matrix()?];
            let gemm = Gemm { weight, src, out, m: n, n, k: n, dtype, out_dtype: dtype, add: false, backward: false };
            let seconds = best(&mut |times| {
                // SAFETY: the three matrices were allocated above, in this size.
                (0..times).try_for_each(|_| unsafe { this.device.gemm(&gemm) })?;
                this.wait()
            })?;
            Ok((seconds, 2.0 * (n as f64).powi(3) / seconds))
        })
    }
}
