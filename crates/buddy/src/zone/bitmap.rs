//! A bitmap with summaries above it: find the first set bit at or after a place in a few loads.
//!
//! ```text
//!   level 2             [.......1]              one word for 262144 bits
//!   level 1   [..1.....] ...                    bit i = word i of level 0 is not zero
//!   level 0   [0][0][x][0] ...                  the bits
//! ```
//!
//! The top level has up to eight words, a line of the cache: a summary of so few would be read as often as they are.
//!
//! Invariant `I1`: a bit of level n+1 is set exactly while its word of level n is not zero.
//!
//! Costs: `set` and `clear` touch one word, and one more per level where a word becomes or stops being zero; `next`
//! climbs and descends: at most two loads a level, and the words of the top one. Bits: n * (1 + 1/64 + ..).

/// At most 8 * 64^5 bits.
const LEVELS: usize = 5;
/// Words of the top level.
const TOP_WORDS: usize = 8;

/// Where the levels of a bitmap of `bits` bits start in its words, and how many words it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    starts: [u32; LEVELS],
    levels: u32,
    words: u32,
}

impl Shape {
    pub const fn new(bits: usize) -> Self {
        let mut shape = Self {
            starts: [0; LEVELS],
            levels: 0,
            words: 0,
        };
        let mut rest = bits;
        while shape.levels < LEVELS as u32 {
            shape.starts[shape.levels as usize] = shape.words;
            let words = rest.div_ceil(64);
            let words = if words == 0 { 1 } else { words };
            shape.words += words as u32;
            shape.levels += 1;
            if words <= TOP_WORDS {
                break;
            }
            rest = words;
        }
        shape
    }

    /// Words of all levels together.
    pub const fn words(&self) -> usize {
        self.words as usize
    }

    #[inline(always)]
    const fn start(&self, level: usize) -> usize {
        self.starts[level] as usize
    }
}

/// Sets bit `at`.
#[inline]
pub(crate) fn set(words: &mut [u64], shape: &Shape, mut at: usize) {
    for level in 0..shape.levels as usize {
        let word = &mut words[shape.start(level) + at / 64];
        let before = *word;
        *word = before | 1 << (at % 64);
        if before != 0 {
            return;
        }
        at /= 64;
    }
}

/// Clears bit `at`; whether no bit is set any more.
#[inline]
pub(crate) fn clear(words: &mut [u64], shape: &Shape, mut at: usize) -> bool {
    for level in 0..shape.levels as usize {
        let word = &mut words[shape.start(level) + at / 64];
        *word &= !(1 << (at % 64));
        if *word != 0 {
            return false;
        }
        at /= 64;
    }
    // The word of the top level is zero: are the others?
    let top = shape.start(shape.levels as usize - 1);
    words[top..shape.words as usize]
        .iter()
        .all(|&word| word == 0)
}

/// The first set bit at or after `from`.
#[inline]
pub(crate) fn next(words: &[u64], shape: &Shape, from: usize) -> Option<usize> {
    let mut at = from;
    let mut level = 0;
    // Up, until a word has a set bit at or after the place.
    let found = loop {
        if level == shape.levels as usize {
            // The place is that of a word of the top level.
            level -= 1;
            let top = words.get(shape.start(level) + at..shape.words as usize)?;
            let word = at + top.iter().position(|&word| word != 0)?;
            break word * 64 + words[shape.start(level) + word].trailing_zeros() as usize;
        }
        let index = shape.start(level) + at / 64;
        let end = shape
            .starts
            .get(level + 1)
            .filter(|_| level + 1 < shape.levels as usize);
        if index >= end.copied().unwrap_or(shape.words) as usize {
            return None;
        }
        let rest = words[index] & (!0 << (at % 64));
        if rest != 0 {
            break (at & !63) + rest.trailing_zeros() as usize;
        }
        at = at / 64 + 1;
        level += 1;
    };
    // Down, always to the lowest set bit.
    let mut place = found;
    while level > 0 {
        level -= 1;
        let word = words[shape.start(level) + place];
        place = place * 64 + word.trailing_zeros() as usize;
    }
    Some(place)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;
    use std::vec;

    use super::*;

    #[test]
    fn agrees_with_a_set() {
        for bits in [1, 63, 64, 65, 4096, 4097, 300_000] {
            let shape = Shape::new(bits);
            let mut words = vec![0; shape.words()];
            let mut model = BTreeSet::new();
            let mut seed = 7u64;
            for step in 0..4000 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % bits;
                if step % 3 == 0 {
                    let empty = clear(&mut words, &shape, at);
                    model.remove(&at);
                    assert_eq!(empty, model.is_empty());
                } else {
                    set(&mut words, &shape, at);
                    model.insert(at);
                }
                let from = (seed >> 20) as usize % (bits + 70);
                assert_eq!(
                    next(&words, &shape, from),
                    model.range(from..).next().copied(),
                    "{bits} bits from {from}"
                );
            }
            for at in model {
                clear(&mut words, &shape, at);
            }
            assert!(words.iter().all(|&word| word == 0));
        }
    }
}
