//! Words of free bits, and which aligned runs are in them.
//!
//! A page block is 512 frames: eight words of 64 bits, bit set = frame free. Buddies are not stored anywhere: a
//! *maximal run* of order j is 2^j free frames, naturally aligned, whose buddy is not wholly free. That is exactly
//! a block on the order-j list of a classic buddy system, so splitting and coalescing cost nothing.
//!
//! ```text
//!   word 0   1 1 1 1 0 1 ...      maximal runs: order 2 at 0, order 0 at 5
//!   runs[0]  1 1 1 1 0 1          every free frame
//!   runs[1]  1 . 1 . . .          runs[0] & runs[0] >> 1, at even places
//!   runs[2]  1 . . . . .          runs[1] & runs[1] >> 2, at places divisible by 4
//! ```
//!
//! Each word has a summary byte: bits 0..=5 say that it has a maximal run *inside* of that order, bit 6 that all 64
//! frames are free (orders 6 to 9 are made of whole words), bit 7 that it is stale. The eight bytes are one `u64` per block.

/// Frames in a page block.
pub(crate) const BLOCK_FRAMES: u64 = 512;
/// log2 of [`BLOCK_FRAMES`].
pub(crate) const BLOCK_ORDER: usize = 9;
/// Words in a page block.
pub(crate) const WORDS: usize = 8;
/// The top order of the buddy system.
pub(crate) const TOP: usize = 10;
/// How many orders there are.
pub(crate) const ORDERS: usize = TOP + 1;
/// The summary of a block that is wholly free.
pub(crate) const WHOLE: u64 = 0x4040_4040_4040_4040;

/// Places where a run of each order may start in a word.
const PLACES: [u64; 7] = [
    !0,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    1,
];

/// The aligned free runs of `order + 1` frames, given those of `order`.
#[inline]
const fn widen(runs: u64, order: usize) -> u64 {
    runs & (runs >> (1 << order)) & PLACES[order + 1]
}

/// The starts of the maximal runs of `order` (0..=5, or 6 for a whole word) inside `word`.
#[inline]
pub(crate) const fn maximal(word: u64, order: usize) -> u64 {
    let mut runs = word;
    let mut at = 0;
    while at < order {
        runs = widen(runs, at);
        at += 1;
    }
    if order >= 6 {
        return runs;
    }
    let wider = widen(runs, order);
    runs & !(wider | wider << (1 << order))
}

/// The summary byte of a word, without a branch: words of a fragmented zone look alike to no predictor.
#[inline]
pub(crate) const fn summary(word: u64) -> u8 {
    let mut result = 0;
    let mut runs = word;
    let mut order = 0;
    while order < 6 {
        let wider = widen(runs, order);
        result |= ((runs & !(wider | wider << (1 << order)) != 0) as u8) << order;
        runs = wider;
        order += 1;
    }
    result | (runs as u8) << 6
}

/// The bit of a summary that says: runs were freed in the word since it was computed.
pub(crate) const STALE_BYTE: u8 = 0x80;
/// That of each byte of a block's summaries.
pub(crate) const STALE: u64 = 0x8080_8080_8080_8080;
/// One in every byte of a block's summaries.
pub(crate) const EACH: u64 = 0x0101_0101_0101_0101;

/// Which words of the block are wholly free, a bit each.
#[inline]
pub(crate) const fn whole_words(summaries: u64) -> u8 {
    // Gathers bit 0 of each byte into the top byte: no two products meet in one bit.
    (((summaries >> 6) & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

/// The starts, in words, of the maximal runs of `order` (6..=9) among whole words.
#[inline]
pub(crate) const fn maximal_words(whole: u8, order: usize) -> u8 {
    let r0 = whole;
    let r1 = r0 & (r0 >> 1) & 0x55;
    let r2 = r1 & (r1 >> 2) & 0x11;
    let r3 = r2 & (r2 >> 4) & 1;
    match order {
        6 => r0 & !(r1 | r1 << 1),
        7 => r1 & !(r2 | r2 << 2),
        8 => r2 & !(r3 | r3 << 4),
        _ => r3,
    }
}

/// The orders 0..=5 of which the block has a maximal run, a bit each.
#[inline]
pub(crate) const fn short_orders(summaries: u64) -> u16 {
    let mut low = summaries | summaries >> 32;
    low |= low >> 16;
    low |= low >> 8;
    low as u16 & 0x3f
}

/// The orders 0..=9 of which the block has a maximal run, a bit each.
#[inline]
pub(crate) const fn orders(summaries: u64) -> u16 {
    let mut result = short_orders(summaries);
    let whole = whole_words(summaries);
    if whole != 0 {
        let mut order = 6;
        while order <= BLOCK_ORDER {
            if maximal_words(whole, order) != 0 {
                result |= 1 << order;
            }
            order += 1;
        }
    }
    result
}

/// A mask of `2^order` bits from bit `at`; `order` at most 6.
#[inline]
pub(crate) const fn run_mask(at: u32, order: usize) -> u64 {
    (if order >= 6 {
        !0
    } else {
        (1 << (1u32 << order)) - 1
    }) << at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Maximal runs found one bit at a time.
    fn slow(block: &[u64; WORDS], order: usize) -> std::vec::Vec<usize> {
        let free = |at: usize| block[at / 64] >> (at % 64) & 1 == 1;
        let run = |at: usize, order: usize| (at..at + (1 << order)).all(free);
        (0..512)
            .step_by(1 << order)
            .filter(|&at| run(at, order))
            .filter(|&at| order == 9 || !run(at & !((2 << order) - 1), order + 1))
            .collect()
    }

    extern crate std;

    #[test]
    fn maximal_runs_are_those_found_bit_by_bit() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for round in 0..3000 {
            let mut block = [0u64; WORDS];
            for word in &mut block {
                *word = match random() % 5 {
                    0 => 0,
                    1 => !0,
                    2 => random(),
                    3 => random() | random() | random(),
                    _ => !0 << (random() % 64),
                };
                if round % 3 == 0 {
                    *word |= 0u64.wrapping_sub(random() % 2);
                }
            }
            let mut summaries = [0; 8];
            for (at, &word) in block.iter().enumerate() {
                summaries[at] = summary(word);
            }
            let summaries = u64::from_le_bytes(summaries);
            for order in 0..=9 {
                let expected = slow(&block, order);
                let found: std::vec::Vec<usize> = if order < 6 {
                    (0..512)
                        .filter(|at| maximal(block[at / 64], order) >> (at % 64) & 1 == 1)
                        .collect()
                } else {
                    let words = maximal_words(whole_words(summaries), order);
                    (0..8)
                        .filter(|at| words >> at & 1 == 1)
                        .map(|at| at * 64)
                        .collect()
                };
                assert_eq!(found, expected, "order {order} of {block:x?}");
                assert_eq!(orders(summaries) >> order & 1 == 1, !expected.is_empty());
            }
        }
    }
}
