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

/// Whether two lists of samples differ by more than chance: the two-sided rank test of Mann and Whitney at
/// [`CHANCE`]. None where there are too few samples for it to say so of any.
pub fn differ(a: &[f64], b: &[f64]) -> Option<bool> {
    let pairs = (a.len() * b.len()) as f64;
    let wins = |a: &f64| b.iter().map(|b| if a < b { 1.0 } else { f64::from(u8::from(a == b)) / 2.0 }).sum::<f64>();
    let above: f64 = a.iter().map(wins).sum();
    let least = above.min(pairs - above).ceil();
    if pairs > MOST_PAIRS {
        let deviation = (pairs * (a.len() + b.len() + 1) as f64 / 12.0).sqrt();
        return Some((pairs / 2.0 - least) / deviation >= NORMAL);
    }
    let orders = orders(a.len(), b.len(), least as usize);
    let all = (1..=a.len()).fold(1.0, |all, i| all * (b.len() + i) as f64 / i as f64);
    (2.0 / all <= CHANCE).then(|| 2.0 * orders.iter().sum::<f64>() / all <= CHANCE)
}

/// How likely it is that [`differ`] finds a difference where there is none; and the deviations of a normal distribution beyond
/// which that much lies.
pub const CHANCE: f64 = 0.01;
const NORMAL: f64 = 2.5758;
/// Orders are counted up to so many pairs.
const MOST_PAIRS: f64 = 10_000.0;

/// In how many orders of n and m values u of the pairs are inverted, for each u up to `most`: the coefficients of the Gaussian
/// binomial.
fn orders(n: usize, m: usize, most: usize) -> Vec<f64> {
    let mut count = vec![0.0; most + 1];
    count[0] = 1.0;
    for k in 1..=n {
        for u in (m + k..=most).rev() {
            count[u] -= count[u - m - k];
        }
        for u in k..=most {
            count[u] += count[u - k];
        }
    }
    count
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

    /// Against all orders, one by one.
    #[test]
    fn orders_are_counted() {
        for (n, m) in [(1usize, 1usize), (2, 3), (4, 3), (5, 5)] {
            let mut counted = vec![0.0; n * m + 1];
            for first in (0u32..1 << (n + m)).filter(|first| first.count_ones() as usize == n) {
                let inverted = |i: usize| (0..i).filter(|j| first >> j & 1 == 0).count();
                counted[(0..n + m).filter(|i| first >> i & 1 == 1).map(inverted).sum::<usize>()] += 1.0;
            }
            assert_eq!(orders(n, m, n * m), counted, "{n} and {m}");
        }
    }

    #[test]
    fn what_differs_by_more_than_chance() {
        let low = [1.0, 1.1, 1.2, 1.3, 1.4];
        let high = low.map(|x| x + 1.0);
        // All five below all five: 2 of 252 orders.
        assert_eq!((differ(&low, &high), differ(&high, &low)), (Some(true), Some(true)));
        // One of them between: 4 of 252.
        assert_eq!(differ(&low, &[2.0, 1.35, 2.2, 2.3, 2.4]), Some(false));
        assert_eq!((differ(&low, &low), differ(&[1.0; 5], &[1.0; 5])), (Some(false), Some(false)));
        // 2 of 70 orders of four and four are more than one in a hundred.
        assert_eq!((differ(&low[1..], &high[1..]), differ(&low[..1], &high[..1])), (None, None));
        let many: Vec<f64> = (0..300).map(f64::from).collect();
        let shifted = |by: f64| many.iter().map(|x| x + by).collect::<Vec<_>>();
        assert_eq!((differ(&many, &shifted(1.0)), differ(&many, &shifted(40.0))), (Some(false), Some(true)));
    }
}
