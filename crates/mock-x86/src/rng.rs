//! The machine's own random numbers: a seed gives the same run on every host, for ever.
//!
//! SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): one addition and a finaliser per number, any seed is fine. Not for secrets.

/// A seeded generator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeededRng {
    state: u64,
}

impl SeededRng {
    /// Starts from `seed`.
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The high half of a 128-bit product: unbiased enough for schedules (error below bound / 2^64).
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True `per_1024` times in 1024. Draws no number at 0, so that switched-off features do not move a seed's run.
    pub fn chance(&mut self, per_1024: u32) -> bool {
        per_1024 != 0 && self.below(1024) < u64::from(per_1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_bounds() {
        // Reference output of SplitMix64 for seed 1234567.
        let mut rng = SeededRng::new(1_234_567);
        assert_eq!(rng.next(), 6_457_827_717_110_365_317);
        assert_eq!(rng.next(), 3_203_168_211_198_807_973);
        assert_eq!(rng.below(0), 0);
        assert!((0..1000).all(|_| rng.below(7) < 7));
        assert!(!rng.chance(0) && rng.chance(1024));
    }
}
