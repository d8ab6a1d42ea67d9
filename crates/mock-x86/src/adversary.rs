//! What hardware is allowed to do and rarely does: the machine does it often, by seed.
//!
//! Plain mode ([`Adversary::OFF`]) keeps every entry until it must go, uses the first that fits, and never guesses. Each
//! switch below adds one liberty that the manual gives the processor (SDM 3A 4.10.2.3, 4.10.3.1, 4.8), so that a memory manager that
//! relies on its absence fails here and not once a year in the field.
//!
//! Rates are in 1/1024 of the accesses (of the events named, for the last two).

use std::fmt;

/// How often each liberty is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adversary {
    /// Drops a random cached entry before an access.
    pub evict: u32,
    /// Walks to some address near a recent one, or to any, sets A on the way and caches what it finds.
    pub speculate: u32,
    /// Where several cached entries fit (a page and a part of it), uses any of them.
    pub any_hit: u32,
    /// Faults from a cached entry that allows too little, although the tables allow the access by now.
    pub stale_fault: u32,
    /// Caches a 4 KiB piece of a large page instead of the page.
    pub fracture: u32,
    /// Longest time a shootdown interrupt may be late, in yield points of its CPU.
    pub delay_interrupts: u32,
}

impl Adversary {
    /// Plain mode: deterministic hardware.
    pub const OFF: Self = Self {
        evict: 0,
        speculate: 0,
        any_hit: 0,
        stale_fault: 0,
        fracture: 0,
        delay_interrupts: 0,
    };

    /// Every liberty, often enough to matter within some thousand accesses.
    pub const FULL: Self = Self {
        evict: 16,
        speculate: 64,
        any_hit: 512,
        stale_fault: 256,
        fracture: 128,
        delay_interrupts: 8,
    };
}

impl Default for Adversary {
    fn default() -> Self {
        Self::OFF
    }
}

/// What the machine did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Translations asked for by running code.
    pub accesses: u64,
    /// Of them, served by a TLB.
    pub tlb_hits: u64,
    /// Walks, also speculative ones.
    pub walks: u64,
    /// Walks that began at a cached paging-structure entry.
    pub short_walks: u64,
    /// Faults raised.
    pub faults: u64,
    /// Accesses through an entry that the tables no longer back (in flight, or a violation).
    pub stale_hits: u64,
    /// Writes through an entry with D cached while the table's D is clear.
    pub stale_dirty: u64,
    /// Faults from an entry that was stricter than the tables.
    pub stale_faults: u64,
    /// Entries dropped without a flush.
    pub evictions: u64,
    /// Entries cached without an access.
    pub speculative_fills: u64,
    /// A bits set without an access.
    pub early_accessed: u64,
    /// Loads ahead of their permission check that found a translation ([`VirtualCpu::transient_read`](crate::VirtualCpu::transient_read)).
    pub transient_reads: u64,
    /// Pieces of large pages cached.
    pub fractures: u64,
    /// Entries cached as not present ([`MachineBuilder::caches_absent`](crate::MachineBuilder::caches_absent)).
    pub absent_fills: u64,
    /// Faults from such an entry although the tables allowed the access by then.
    pub stale_absent: u64,
    /// Flush instructions executed.
    pub flushes: u64,
    /// Interrupts sent to other CPUs.
    pub interrupts: u64,
    /// Of them, delivered late.
    pub delayed_interrupts: u64,
    /// Switches between virtual CPUs.
    pub switches: u64,
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "accesses {} (tlb hits {}), walks {} (short {}), faults {}, stale hits {} (dirty {}), stale faults {}, \
             evictions {}, speculative fills {}, early A {}, transient reads {}, fractures {}, absent fills {} (stale {}), flushes {}, \
             interrupts {} (delayed {}), switches {}",
            self.accesses,
            self.tlb_hits,
            self.walks,
            self.short_walks,
            self.faults,
            self.stale_hits,
            self.stale_dirty,
            self.stale_faults,
            self.evictions,
            self.speculative_fills,
            self.early_accessed,
            self.transient_reads,
            self.fractures,
            self.absent_fills,
            self.stale_absent,
            self.flushes,
            self.interrupts,
            self.delayed_interrupts,
            self.switches,
        )
    }
}
