//! What the harness takes from Python: random draws, and what counts as a space.

/// Python's `random.Random(seed)`: the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998), seeded by an array.
pub(super) struct Random {
    state: [u32; N],
    next: usize,
}

const N: usize = 624;
const M: usize = 397;

impl Random {
    pub fn new(seed: u32) -> Random {
        let mut state = [0u32; N];
        state[0] = 19_650_218;
        let mixed = |x: u32| x ^ (x >> 30);
        for i in 1..N {
            state[i] = mixed(state[i - 1]).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let mut i = 1;
        let step = |state: &mut [u32; N], i: &mut usize, factor: u32, add: u32| {
            state[*i] = (state[*i] ^ mixed(state[*i - 1]).wrapping_mul(factor)).wrapping_add(add);
            *i += 1;
            if *i == N {
                state[0] = state[N - 1];
                *i = 1;
            }
        };
        for _ in 0..N {
            step(&mut state, &mut i, 1_664_525, seed);
        }
        for _ in 1..N {
            let less = (i as u32).wrapping_neg();
            step(&mut state, &mut i, 1_566_083_941, less);
        }
        state[0] = 0x8000_0000;
        Random { state, next: N }
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Below `n`, which is at least 1.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.word() >> (32 - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `sample(range(n), k)`, for k <= n < 2^31.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // The size from which on Python remembers what it has drawn in place of copying the whole list.
        let mut small = 21;
        if k > 5 {
            small += (0..).map(|power| 4usize.pow(power)).find(|&size| size >= 3 * k).expect("k is small");
        }
        let mut pool: Vec<usize> = if n <= small { (0..n).collect() } else { Vec::new() };
        let mut drawn = Vec::with_capacity(k);
        for i in 0..k {
            if n <= small {
                let j = self.below(n - i);
                drawn.push(pool[j]);
                pool[j] = pool[n - i - 1];
            } else {
                let mut j = self.below(n);
                while drawn.contains(&j) {
                    j = self.below(n);
                }
                drawn.push(j);
            }
        }
        drawn
    }
}

/// `str.isspace` of a character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.capitalize`: the first character in upper case, all others in lower case.
pub(super) fn capitalize(text: &str) -> String {
    let mut rest = text.chars();
    let mut first = rest.next().into_iter().flat_map(char::to_uppercase);
    first
        .next()
        .into_iter()
        .chain(first.flat_map(char::to_lowercase))
        .chain(rest.as_str().to_lowercase().chars())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Figures of CPython 3.11.
    #[test]
    fn draws_are_pythons() {
        let mut random = Random::new(1234);
        assert_eq!(random.sample(10, 3), [7, 1, 0]);
        assert_eq!(random.sample(1000, 5), [92, 932, 965, 961, 826]);
        assert_eq!(random.sample(100, 8), [74, 4, 85, 88, 10, 12, 98, 45]);
        assert_eq!(random.sample(50, 6), [15, 1, 48, 47, 22, 41]);
        assert_eq!(random.sample(7, 7), [4, 3, 6, 5, 0, 2, 1]);
        assert_eq!(random.sample(1, 1), [0]);
        assert_eq!(random.sample(70_000, 3), [1916, 65_940, 63_799]);
        assert_eq!(Random::new(0).sample(1 << 20, 2), [807_917, 882_002]);
    }

    #[test]
    fn texts_are_treated_as_python_treats_them() {
        assert_eq!(["", "éTÉ", "a B", "ß"].map(capitalize), ["", "Été", "A b", "Ss"]);
        assert!([' ', '\n', '\u{a0}', '\x1d', '\u{3000}'].into_iter().all(is_space));
        assert!(!['x', '\u{200b}', '_'].into_iter().any(is_space));
    }
}
