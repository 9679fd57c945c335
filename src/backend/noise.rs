//! Random weights, the same on every device: a number is a hash of the place where it stands.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::Result;
use crate::tensor::{Bytes, DType, Tensor};

/// Numbers drawn evenly from [mean − scale, mean + scale).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    pub seed: u64,
    pub mean: f32,
    pub scale: f32,
}

impl Noise {
    /// The number at place `i`, before it is rounded to the type that it is stored in. It takes two roundings, of the
    /// product and of the sum; a device that fuses them makes other numbers.
    pub fn at(&self, i: u64) -> f32 {
        let bits = mix(self.seed.wrapping_add(i.wrapping_mul(GOLDEN))) >> 40;
        let unit = bits as f32 / (1u32 << 23) as f32 - 1.0;
        self.mean + self.scale * unit
    }

    /// A tensor of them, row by row.
    pub fn tensor(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let places = (0..rows as u64 * cols as u64).into_par_iter();
        let bytes = match dtype {
            DType::F32 => Bytes::new(Owned(places.map(|i| self.at(i)).collect())),
            DType::F16 => Bytes::new(Owned(places.map(|i| f16::from_f32(self.at(i))).collect())),
            DType::BF16 => Bytes::new(Owned(places.map(|i| bf16::from_f32(self.at(i))).collect())),
        };
        Tensor::new(dtype, rows, cols, bytes)
    }
}

/// Numbers as bytes.
struct Owned<T>(Vec<T>);

impl<T: bytemuck::Pod> AsRef<[u8]> for Owned<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What SplitMix64 (Steele et al., 2014) makes of a state: every bit of the input reaches every bit of the output.
pub(crate) fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_splitmix64() {
        // The first outputs of the reference generator from the seed 1234567.
        let outputs = [0, 1, 2].map(|i: u64| mix(1_234_567u64.wrapping_add(i.wrapping_mul(GOLDEN))));
        assert_eq!(outputs, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn numbers_spread_evenly_around_the_mean() {
        let noise = Noise { seed: 5, mean: 1.0, scale: 0.25 };
        let values = noise.tensor(DType::F32, 100, 1000).unwrap().to_f32();
        assert!(values.iter().all(|x| (0.75..1.25).contains(x)));
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 1e5;
        // Five standard errors.
        assert!((mean - 1.0).abs() < 5.0 * 0.25 / (3e5f64).sqrt(), "{mean}");
        assert!((variance - 0.25f64.powi(2) / 3.0).abs() < 5.0 * 1.8e-4 / 3.0, "{variance}");
        let other = Noise { seed: 6, ..noise }.tensor(DType::F32, 100, 1000).unwrap().to_f32();
        let same = values.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(same < 5, "{same} places of 100000 are the same for another seed");
    }
}
