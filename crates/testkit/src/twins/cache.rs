//! A set-associative cache of a processor: sets, ways and tags, the least recently used line leaves.
//!
//! ```text
//!   address   | tag                    | set    | byte in the line |
//!                                          │
//!      set 0   [tag][tag] .. ways          │
//!      set 1   [tag][tag]            <─────┘   a line may lie in any way of its set, and nowhere else
//!      ...
//! ```
//!
//! A program whose addresses have the same set bits fights for the few ways of that set while the rest of the cache stands empty. That
//! is what colours of slabs are for ([`BonwickCache`](super::BonwickCache)).
//!
//! Invariant `I1`: a set holds at most `ways` tags, each once, the most recently used last.
//!
//! Source: Hennessy and Patterson, *Computer Architecture*, appendix B; the shapes are those of Intel and AMD processors
//! (32 KiB, 8 ways, lines of 64 bytes).

/// A cache of lines.
///
/// # Examples
///
/// ```
/// use kmem_testkit::twins::LineCache;
///
/// let mut l1 = LineCache::new(32 << 10, 8, 64);
/// // Nine lines a page apart have one set, which has eight ways: each finds that it was thrown out by the one before.
/// for _ in 0..10 {
///     (0..9).for_each(|page| drop(l1.touch(page * 4096)));
/// }
/// assert_eq!((l1.hits(), l1.sets_used()), (0, 1));
/// // One of nine moved by a line makes room.
/// for _ in 0..10 {
///     (0..8).for_each(|page| drop(l1.touch(page * 4096)));
///     l1.touch(8 * 4096 + 64);
/// }
/// assert!(l1.hits() > 70);
/// ```
#[derive(Clone, Debug)]
pub struct LineCache {
    sets: Vec<Vec<u64>>,
    used: Vec<bool>,
    ways: usize,
    line: u64,
    hits: u64,
    misses: u64,
}

impl LineCache {
    /// An empty cache of so many bytes, ways, and bytes a line.
    ///
    /// # Panics
    ///
    /// Where the bytes are not a multiple of `ways * line`, or there is no set.
    #[must_use]
    pub fn new(bytes: usize, ways: usize, line: usize) -> Self {
        let way = ways * line;
        assert!(
            way > 0 && bytes.is_multiple_of(way) && bytes > 0,
            "whole sets"
        );
        Self {
            sets: vec![Vec::with_capacity(ways); bytes / way],
            used: vec![false; bytes / way],
            ways,
            line: line as u64,
            hits: 0,
            misses: 0,
        }
    }

    /// An access to the line of an address; whether it was there.
    pub fn touch(&mut self, address: u64) -> bool {
        let tag = address / self.line;
        let index = (tag % self.sets.len() as u64) as usize;
        self.used[index] = true;
        let set = &mut self.sets[index];
        let found = set.iter().position(|&there| there == tag);
        match found {
            Some(at) => {
                set.remove(at);
                self.hits += 1;
            }
            None => {
                if set.len() == self.ways {
                    set.remove(0);
                }
                self.misses += 1;
            }
        }
        set.push(tag);
        found.is_some()
    }

    /// Accesses that found their line.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// Accesses that did not.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.misses
    }

    /// Sets that were ever touched.
    #[must_use]
    pub fn sets_used(&self) -> usize {
        self.used.iter().filter(|&&used| used).count()
    }
}
