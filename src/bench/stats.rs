//! What a few samples come to.

/// The middle of some samples, and how far they scatter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stats {
    pub median: f64,
    /// From the lower to the upper quartile, as a share of the median.
    pub spread: f64,
}

impl Stats {
    /// Of at least one sample.
    pub fn of(samples: &[f64]) -> Stats {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let median = quantile(&sorted, 0.5);
        Stats { median, spread: (quantile(&sorted, 0.75) - quantile(&sorted, 0.25)) / median }
    }
}

/// Of sorted samples, interpolated between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// The median of `dense[i] / own[i]`: both of one round, so that what slows the machine down cancels.
pub fn speedup(dense: &[f64], own: &[f64]) -> f64 {
    let ratios: Vec<f64> = dense.iter().zip(own).map(|(dense, own)| dense / own).collect();
    Stats::of(&ratios).median
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quartiles() {
        assert_eq!(Stats::of(&[7.0]), Stats { median: 7.0, spread: 0.0 });
        assert_eq!(Stats::of(&[3.0, 1.0]), Stats { median: 2.0, spread: 0.5 });
        // The outlier does not count.
        assert_eq!(Stats::of(&[100.0, 4.0, 1.0, 3.0, 2.0]), Stats { median: 3.0, spread: 2.0 / 3.0 });
        assert_eq!(Stats::of(&[1.0, 2.0, 3.0, 4.0]), Stats { median: 2.5, spread: 1.5 / 2.5 });
        assert!(Stats::of(&[1.0, f64::NAN, f64::NAN]).median.is_nan());
    }

    /// The machine becomes twice as slow on the way: the ratio stays.
    #[test]
    fn drift_cancels() {
        assert_eq!(speedup(&[3.0, 3.0, 6.0], &[1.0, 1.0, 2.0]), 3.0);
        assert_eq!(speedup(&[2.0, 8.0, 2.0], &[2.0, 2.0, 1.0]), 2.0);
    }
}
