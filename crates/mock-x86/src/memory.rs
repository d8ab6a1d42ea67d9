//! Physical memory: sparse, with holes, addressed by plain 64-bit physical addresses.
//!
//! ```text
//!  physical 0 ............................................ end()
//!           |    RAM    |  hole  |    RAM     |  dev  | RAM |
//!  host     base + 0                                  base + end     (one lazily committed arena)
//! ```
//!
//! Invariants
//! - `I1` physical address `a` lives at `base + a` of one arena, for all `a < end`.
//! - `I2` entries of page tables are accessed as atomics (the processor's locked bus cycles), bytes as atomics of
//!   their own size where they are aligned, so that two CPUs on two host threads do not race in Rust's sense either.
//! - `I3` an address outside of backed memory is refused, never wrapped.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::arena::Arena;
use crate::memory_map::{FRAME_BYTES, MemoryMap};

/// The memory of a machine.
#[derive(Debug)]
pub struct PhysMemory {
    arena: Arena,
    map: MemoryMap,
    /// Bounds of backed memory, neighbours joined, for the check on the hot path.
    backed: Vec<(u64, u64)>,
    /// The entry of `backed` that matched last.
    hint: AtomicUsize,
}

impl PhysMemory {
    /// Makes the memory of `map`.
    ///
    /// # Errors
    ///
    /// The host's, if it cannot reserve the address space (no memory is committed).
    pub fn new(map: MemoryMap) -> io::Result<Self> {
        let mut backed: Vec<(u64, u64)> = Vec::new();
        for range in map.ranges().iter().filter(|range| range.kind.is_backed()) {
            match backed.last_mut() {
                Some(last) if last.1 == range.start => last.1 = range.end,
                _ => backed.push((range.start, range.end)),
            }
        }
        let arena = Arena::new(map.end())?;
        Ok(Self {
            arena,
            map,
            backed,
            hint: AtomicUsize::new(0),
        })
    }

    /// The map it was made from.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The first frame number behind all memory.
    pub fn frame_limit(&self) -> u64 {
        self.map.end().div_ceil(FRAME_BYTES)
    }

    /// Returns whether all of `bytes` bytes at `address` are backed by memory.
    #[inline]
    pub fn is_backed(&self, address: u64, bytes: u64) -> bool {
        let Some(end) = address.checked_add(bytes) else {
            return false;
        };
        let hint = self.hint.load(Ordering::Relaxed);
        if let Some(&(low, high)) = self.backed.get(hint)
            && low <= address
            && end <= high
        {
            return true;
        }
        let after = self.backed.partition_point(|range| range.0 <= address);
        let Some(index) = after.checked_sub(1) else {
            return false;
        };
        let inside = end <= self.backed[index].1;
        if inside {
            self.hint.store(index, Ordering::Relaxed);
        }
        inside
    }

    /// The host pointer to physical address `address`; valid as far as memory is backed there.
    ///
    /// # Panics
    ///
    /// If no memory is there: a kernel that computes such an address has a bug worth a message.
    #[inline]
    pub fn to_ptr(&self, address: u64) -> *mut u8 {
        assert!(self.is_backed(address, 1), "{}", self.nothing_at(address));
        self.pointer(address)
    }

    /// The host address of backed memory (I1: the arena has `end` bytes and the address is below).
    #[inline]
    fn pointer(&self, address: u64) -> *mut u8 {
        self.arena.base().wrapping_add(address as usize)
    }

    /// The physical address of a pointer from [`to_ptr`](Self::to_ptr), `None` for any other pointer.
    pub fn to_phys(&self, pointer: *const u8) -> Option<u64> {
        let offset = pointer.addr().checked_sub(self.arena.base().addr())?;
        (offset < self.arena.bytes()).then_some(offset as u64)
    }

    fn nothing_at(&self, address: u64) -> String {
        match self.map.find(address) {
            Some(range) => format!(
                "physical address {address:#x} is no memory but {:?}",
                range.kind
            ),
            None => format!("physical address {address:#x} is a hole: nothing answers there"),
        }
    }

    /// Reads up to 8 aligned bytes, `None` where there is no memory.
    ///
    /// # Panics
    ///
    /// If `bytes` is not 1, 2, 4 or 8, or the address is not aligned to it.
    pub fn load(&self, address: u64, bytes: u64) -> Option<u64> {
        if !self.is_backed(address, bytes) {
            return None;
        }
        assert!(
            address.is_multiple_of(bytes),
            "a load of {bytes} bytes at {address:#x} is not aligned"
        );
        let pointer = self.pointer(address);
        // SAFETY: I1: backed and aligned, checked above; I2.
        unsafe {
            Some(match bytes {
                1 => AtomicU8::from_ptr(pointer).load(Ordering::Acquire).into(),
                2 => AtomicU16::from_ptr(pointer.cast())
                    .load(Ordering::Acquire)
                    .into(),
                4 => AtomicU32::from_ptr(pointer.cast())
                    .load(Ordering::Acquire)
                    .into(),
                8 => AtomicU64::from_ptr(pointer.cast()).load(Ordering::Acquire),
                _ => panic!("a load of {bytes} bytes"),
            })
        }
    }

    /// Writes up to 8 aligned bytes; returns whether there is memory.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    pub fn store(&self, address: u64, bytes: u64, value: u64) -> bool {
        if !self.is_backed(address, bytes) {
            return false;
        }
        assert!(
            address.is_multiple_of(bytes),
            "a store of {bytes} bytes at {address:#x} is not aligned"
        );
        let pointer = self.pointer(address);
        // SAFETY: I1: backed and aligned, checked above; I2.
        unsafe {
            match bytes {
                1 => AtomicU8::from_ptr(pointer).store(value as u8, Ordering::Release),
                2 => AtomicU16::from_ptr(pointer.cast()).store(value as u16, Ordering::Release),
                4 => AtomicU32::from_ptr(pointer.cast()).store(value as u32, Ordering::Release),
                8 => AtomicU64::from_ptr(pointer.cast()).store(value, Ordering::Release),
                _ => panic!("a store of {bytes} bytes"),
            }
        }
        true
    }

    /// Replaces an aligned entry of 4 or 8 bytes if it still is `old`: the processor's locked update of A and D.
    ///
    /// Returns whether it was.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load), and where there is no memory.
    pub fn compare_exchange(&self, address: u64, bytes: u64, old: u64, new: u64) -> bool {
        assert!(
            self.is_backed(address, bytes) && address.is_multiple_of(bytes),
            "no entry at {address:#x}"
        );
        let pointer = self.pointer(address);
        // SAFETY: I1: backed and aligned, checked above; I2.
        unsafe {
            match bytes {
                4 => AtomicU32::from_ptr(pointer.cast())
                    .compare_exchange(old as u32, new as u32, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok(),
                8 => AtomicU64::from_ptr(pointer.cast())
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok(),
                _ => panic!("an entry of {bytes} bytes"),
            }
        }
    }

    /// Reads bytes that lie in one frame; returns whether there is memory.
    pub fn read(&self, address: u64, into: &mut [u8]) -> bool {
        if !self.is_backed(address, into.len() as u64) {
            return false;
        }
        // SAFETY: I1: backed, checked above; the buffer is the caller's own. A racing writer on another host thread
        // is a program that races on the machine too.
        unsafe {
            std::ptr::copy_nonoverlapping(self.pointer(address), into.as_mut_ptr(), into.len())
        };
        true
    }

    /// Writes bytes that lie in one frame; returns whether there is memory.
    pub fn write(&self, address: u64, from: &[u8]) -> bool {
        if !self.is_backed(address, from.len() as u64) {
            return false;
        }
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.pointer(address), from.len()) };
        true
    }

    /// Gives the host back what `count` frames from `frame` on hold; they read as zeros afterwards.
    pub fn discard(&self, frame: u64, count: u64) {
        self.arena.discard(frame as usize, count as usize);
    }

    /// Bytes that the host has committed for this memory: what the program touched.
    pub fn committed_bytes(&self) -> u64 {
        self.arena.committed_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{MemoryKind, MemoryRange};

    #[test]
    fn a_machine_of_64_gib_costs_what_it_touches() {
        let memory = PhysMemory::new(MemoryMap::pc(64 << 30)).unwrap();
        let high = (64 << 30) + (512 << 20);
        assert!(memory.store(high, 8, 0x1122_3344_5566_7788));
        assert_eq!(memory.load(high + 4, 4), Some(0x1122_3344));
        assert_eq!(memory.load(high - 8, 8), Some(0));
        assert!(
            memory.committed_bytes() <= 16 * 4096,
            "{}",
            memory.committed_bytes()
        );
        memory.discard(high / 4096, 1);
        assert_eq!(memory.load(high, 8), Some(0));
    }

    #[test]
    fn holes_and_devices_do_not_answer() {
        let ram = |start, end| MemoryRange {
            start,
            end,
            kind: MemoryKind::Ram,
            node: 0,
        };
        let device = MemoryRange {
            start: 0x2000,
            end: 0x3000,
            kind: MemoryKind::Device,
            node: 0,
        };
        let memory = PhysMemory::new(
            MemoryMap::new(&[
                ram(0, 0x2000),
                device,
                ram(0x3000, 0x4000),
                ram(0x4000, 0x5000),
            ])
            .unwrap(),
        )
        .unwrap();
        assert!(memory.is_backed(0x1fff, 1));
        assert!(!memory.is_backed(0x1fff, 2));
        assert!(memory.load(0x2000, 8).is_none());
        assert!(!memory.store(0x5000, 1, 0));
        assert!(memory.is_backed(0x3ff8, 16), "neighbours join");
        assert!(!memory.is_backed(u64::MAX, 2));
        assert_eq!(memory.to_phys(memory.to_ptr(0x3010)), Some(0x3010));
        assert!(std::panic::catch_unwind(|| memory.to_ptr(0x2000)).is_err());
    }

    #[test]
    fn an_entry_changes_only_from_what_it_was() {
        let memory = PhysMemory::new(MemoryMap::pc(4 << 20)).unwrap();
        assert!(memory.store(0x1000, 8, 5));
        assert!(!memory.compare_exchange(0x1000, 8, 4, 6));
        assert!(memory.compare_exchange(0x1000, 8, 5, 0x25));
        assert_eq!(memory.load(0x1000, 8), Some(0x25));
        assert!(memory.compare_exchange(0x1004, 4, 0, 7));
        assert_eq!(memory.load(0x1000, 8), Some(0x7_0000_0025));
    }
}
