//! A small associative array with an order of its own: what TLBs and walk caches are made of.
//!
//! A hash index over a dense vector. The hash is fixed, so the same history gives the same order on every host, which is what makes
//! eviction by number and replay by seed exact.
//!
//! Invariants
//! - `I1` `index[key] == i` exactly if `entries[i].0 == key`.
//! - `I2` at most `capacity` entries; a full array replaces the entry under a cursor that goes round.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// Multiply and rotate: fast, fixed, and good enough for page numbers.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct FixedHasher(u64);

impl Hasher for FixedHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[derive(Debug)]
pub(crate) struct Slots<K, V> {
    index: HashMap<K, usize, BuildHasherDefault<FixedHasher>>,
    entries: Vec<(K, V)>,
    capacity: usize,
    cursor: usize,
}

impl<K: Copy + Eq + Hash, V> Slots<K, V> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            index: HashMap::default(),
            entries: Vec::new(),
            capacity: capacity.max(1),
            cursor: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        if self.entries.is_empty() {
            return None;
        }
        self.index.get(key).map(|&at| &self.entries[at].1)
    }

    /// Inserts or replaces; a full array loses the entry under the cursor.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        if let Some(&at) = self.index.get(&key) {
            self.entries[at].1 = value;
            return;
        }
        if self.entries.len() == self.capacity {
            self.cursor = (self.cursor + 1) % self.capacity;
            self.index.remove(&self.entries[self.cursor].0);
            self.entries[self.cursor] = (key, value);
            self.index.insert(key, self.cursor);
            return;
        }
        self.index.insert(key, self.entries.len());
        self.entries.push((key, value));
    }

    pub(crate) fn remove(&mut self, key: &K) -> bool {
        match self.index.remove(key) {
            Some(at) => {
                self.entries.swap_remove(at);
                if let Some((moved, _)) = self.entries.get(at) {
                    self.index.insert(*moved, at);
                }
                true
            }
            None => false,
        }
    }

    /// Removes the entry at a position of the dense vector.
    pub(crate) fn remove_at(&mut self, at: usize) {
        if let Some((key, _)) = self.entries.get(at) {
            let key = *key;
            self.remove(&key);
        }
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&K, &V) -> bool) {
        let before = self.entries.len();
        self.entries.retain(|(key, value)| keep(key, value));
        if self.entries.len() != before {
            self.index.clear();
            self.index.extend(
                self.entries
                    .iter()
                    .enumerate()
                    .map(|(at, (key, _))| (*key, at)),
            );
        }
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.index.clear();
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(K, V)> {
        self.entries.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_plain_map_and_replaces_in_turn() {
        let mut slots = Slots::new(4);
        for key in 0u64..4 {
            slots.insert(key, key * 10);
        }
        slots.insert(2, 21);
        assert_eq!((slots.len(), slots.get(&2)), (4, Some(&21)));
        slots.insert(9, 90);
        assert_eq!(slots.len(), 4);
        assert_eq!(slots.get(&1), None, "the cursor's entry went");
        assert!(slots.remove(&0) && !slots.remove(&0));
        assert_eq!(slots.get(&9), Some(&90));
        slots.retain(|_, value| *value != 21);
        assert_eq!(
            slots.iter().map(|(key, _)| *key).collect::<Vec<_>>().len(),
            2
        );
        assert_eq!((slots.get(&3), slots.get(&9)), (Some(&30), Some(&90)));
        slots.remove_at(7);
        slots.clear();
        assert_eq!(slots.get(&3), None);
    }
}
