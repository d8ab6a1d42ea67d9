//! The machine's state, and the path of one access through it.
//!
//! ```text
//!  access --canonical?--> TLB hit? --rights? D?--> use --.
//!             | #GP          | no / too little           |--> verify: frame freed since? tables still say so?
//!                            v                           |        no: stale, and a violation if it was freed,
//!                   walk cache hit? --> walk --> A, D ---'            foreign, or declared flushed
//!                            |            | #PF
//!                            `-- a failure from a cached position is tried again from the root
//! ```
//!
//! Invariants
//! - `I1` what the running program sees (bytes, faults, A and D bits) depends on registers, tables and caches alone; verification
//!   reads and never writes.
//! - `I2` an entry's origin is as old as the oldest cached thing it was made from, so that evidence cannot be laundered by
//!   going from a stale walk cache into a fresh TLB entry.
//! - `I3` all choices come from one seeded generator, in program order.

mod liberties;
mod verify;

use std::collections::VecDeque;
use std::sync::Arc;

use liberties::RECENT;
use verify::Settled;

use crate::adversary::{Adversary, Stats};
use crate::bus::Bus;
use crate::cpu::{CpuState, Fault};
use crate::frames::{FrameEventKind, Frames};
use crate::memory::PhysMemory;
use crate::rng::SeededRng;
use crate::tlb::{GLOBAL, Origin, TlbEntry, WalkEntry};
use crate::violation::Violation;
use crate::walker::{
    self, Access, AccessKind, MAX_LEVELS, Position, Rights, Stop, Touch, Translation, Walk,
    WalkContext,
};

pub(crate) const STORY_EVENTS: usize = 12;

#[derive(Debug)]
pub(crate) struct Core {
    pub memory: Arc<PhysMemory>,
    pub cpus: Vec<CpuState>,
    pub frames: Frames,
    pub adversary: Adversary,
    pub rng: SeededRng,
    pub stats: Stats,
    pub step: u64,
    /// A running hash of every access and its outcome: equal digests mean equal runs.
    pub digest: u64,
    /// Whether hits are compared with the tables.
    pub verify: bool,
    /// Whether anything is cached at all.
    pub caching: bool,
    /// Whether entries that were not present are cached too.
    pub caches_absent: bool,
    /// Linear ranges that may map free frames: a kernel's map of all memory.
    pub exempt: Vec<(u64, u64)>,
    /// Devices.
    pub bus: Bus,
    /// Violations not yet handed over.
    pub raised: Vec<Violation>,
    settled: VecDeque<Settled>,
    recent: [u64; RECENT],
}

impl Core {
    pub(crate) fn new(
        memory: Arc<PhysMemory>,
        cpus: Vec<CpuState>,
        frames: Frames,
        seed: u64,
    ) -> Self {
        Self {
            memory,
            cpus,
            frames,
            adversary: Adversary::OFF,
            rng: SeededRng::new(seed),
            stats: Stats::default(),
            step: 0,
            digest: 0xcbf2_9ce4_8422_2325,
            verify: true,
            caching: true,
            caches_absent: false,
            exempt: Vec::new(),
            bus: Bus::default(),
            raised: Vec::new(),
            settled: VecDeque::new(),
            recent: [0; RECENT],
        }
    }

    pub(crate) fn mix(&mut self, value: u64) {
        self.digest = (self.digest ^ value)
            .wrapping_mul(0x100_0000_01b3)
            .rotate_left(17);
    }

    /// Translates one access of `cpu`: the physical address, or the fault it raises.
    pub(crate) fn translate(
        &mut self,
        cpu: usize,
        linear: u64,
        access: Access,
    ) -> Result<u64, Fault> {
        self.step += 1;
        self.stats.accesses += 1;
        let outcome = self.translate_inner(cpu, linear, access);
        match outcome {
            Ok(physical) => self.mix(physical ^ (cpu as u64) << 56),
            Err(fault) => {
                self.stats.faults += 1;
                let code = if let Fault::Page { code, .. } = fault {
                    code
                } else {
                    u32::MAX
                };
                self.mix(linear ^ u64::from(code) << 32);
            }
        }
        outcome
    }

    fn translate_inner(&mut self, cpu: usize, linear: u64, access: Access) -> Result<u64, Fault> {
        let Some(context) = self.cpus[cpu].context() else {
            return Ok(linear & 0xffff_ffff);
        };
        if !context.mode.is_canonical(linear) {
            return Err(Fault::GeneralProtection { value: linear });
        }
        let linear = context.mode.wrap(linear);
        if self.adversary != Adversary::OFF {
            self.take_liberties(cpu, &context, linear);
        }
        let tag = self.cpus[cpu].pcid();
        if self.caches_absent && self.cpus[cpu].caches.holds_absent(linear, tag) {
            if self.allowed_by_tables(&context, linear, access) {
                self.stats.stale_absent += 1;
            }
            let code = walker::stop_code(&context, Stop::NotPresent, access);
            return Err(self.cpus[cpu].fault(linear, code));
        }
        let (hits, count) = self.cpus[cpu].caches.hits(linear, tag);
        if count > 0 {
            let chosen = if count > 1 && self.rng.chance(self.adversary.any_hit) {
                self.rng.below(count as u64) as usize
            } else {
                0
            };
            let hit = hits[chosen].expect("the first `count` are there");
            let entry = *self.cpus[cpu].caches.entry(hit);
            let judged = walker::check(
                &context,
                entry.translation.rights,
                entry.translation.key,
                access,
            );
            let sets_dirty = access.kind == AccessKind::Write && !entry.translation.dirty;
            match judged {
                Ok(()) if !sets_dirty => {
                    self.stats.tlb_hits += 1;
                    self.verify(cpu, &context, linear, access, &entry, "a TLB entry");
                    return Ok(entry.translation.physical(linear));
                }
                Err(code) if self.caches_absent => {
                    // Such a processor may go on refusing until it is told to forget.
                    if self.allowed_by_tables(&context, linear, access) {
                        self.stats.stale_faults += 1;
                    }
                    return Err(self.cpus[cpu].fault(linear, code));
                }
                Err(code) if self.rng.chance(self.adversary.stale_fault) => {
                    if self.allowed_by_tables(&context, linear, access) {
                        self.stats.stale_faults += 1;
                    }
                    return Err(self.cpus[cpu].page_fault(linear, code));
                }
                _ => {
                    // Too little, or D still to be set: the processor looks at the tables again.
                    for hit in hits.into_iter().flatten() {
                        self.cpus[cpu].caches.drop_hit(hit);
                    }
                }
            }
        }
        self.walk_and_fill(cpu, &context, linear, access)
    }

    fn allowed_by_tables(&self, context: &WalkContext, linear: u64, access: Access) -> bool {
        let fresh = walker::walk(&self.memory, context, linear, None, Touch::Nothing);
        fresh
            .outcome
            .is_ok_and(|now| walker::check(context, now.rights, now.key, access).is_ok())
    }

    fn walk_and_fill(
        &mut self,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        access: Access,
    ) -> Result<u64, Fault> {
        let tag = self.cpus[cpu].pcid();
        let mut start = self.cpus[cpu].caches.deepest(linear, tag).copied();
        loop {
            let walk = self.walk_once(cpu, context, linear, start.as_ref());
            let judged = match walk.outcome {
                Ok(found) => {
                    walker::check(context, found.rights, found.key, access).map(|()| found)
                }
                Err(stop) => Err(walker::stop_code(context, stop, access)),
            };
            let found = match judged {
                Ok(found) => found,
                Err(code) => {
                    if start.is_some() {
                        // The tables may allow more than the cached position does.
                        let early = self.rng.chance(self.adversary.stale_fault);
                        if early && self.allowed_by_tables(context, linear, access) {
                            self.stats.stale_faults += 1;
                            return Err(self.cpus[cpu].page_fault(linear, code));
                        }
                        start = None;
                        continue;
                    }
                    if let Err(Stop::NoMemory(table)) = walk.outcome {
                        self.no_memory(cpu, linear, table, "page table");
                    }
                    if self.caches_absent && walk.outcome == Err(Stop::NotPresent) {
                        self.remember_absent(cpu, context, linear, &walk);
                    }
                    return Err(self.cpus[cpu].page_fault(linear, code));
                }
            };
            let write = access.kind == AccessKind::Write;
            let leaf = *walk.steps().last().expect("a translation has a leaf");
            if walker::touch_leaf(&self.memory, context.mode, leaf, write).is_none() {
                continue;
            }
            let found = Translation {
                dirty: found.dirty || write,
                ..found
            };
            let entry = self.fill(cpu, context, linear, start.as_ref(), &walk, found);
            if start.is_some() {
                self.verify(
                    cpu,
                    context,
                    linear,
                    access,
                    &entry,
                    "a walk from a cached table",
                );
            } else {
                self.check_fresh(cpu, linear, &entry);
            }
            return Ok(found.physical(linear));
        }
    }

    /// One walk with the books kept, and the check of the cached table it starts from.
    fn walk_once(
        &mut self,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        start: Option<&WalkEntry>,
    ) -> Walk {
        self.stats.walks += 1;
        if let Some(start) = start {
            self.stats.short_walks += 1;
            let table = start.position.table >> 12;
            if self.frames.freed_since(table, start.origin.read) {
                self.freed_walk_table(cpu, context, linear, start);
            }
        }
        walker::walk(
            &self.memory,
            context,
            linear,
            start.map(|start| start.position),
            Touch::UpperAccessed,
        )
    }

    /// The tables above those of a walk that began at a cached position, if a walk from the root comes to the same.
    fn upper_tables(
        &self,
        context: &WalkContext,
        linear: u64,
        walk: &Walk,
        found: &Translation,
    ) -> Option<impl Iterator<Item = u64> + use<>> {
        let fresh = walker::walk(&self.memory, context, linear, None, Touch::Nothing);
        let now = fresh.outcome.ok()?;
        let count = fresh.tables().count().checked_sub(walk.tables().count())?;
        let same = (now.page, now.shift, now.rights, now.key)
            == (found.page, found.shift, found.rights, found.key)
            && fresh.tables().skip(count).eq(walk.tables());
        let mut tables = [0; MAX_LEVELS];
        for (slot, table) in tables.iter_mut().zip(fresh.tables()) {
            *slot = table >> 12;
        }
        same.then(|| tables.into_iter().take(count))
    }

    /// Caches a finished walk whose A bits are set: the translation and every table on the way.
    fn fill(
        &mut self,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        start: Option<&WalkEntry>,
        walk: &Walk,
        found: Translation,
    ) -> TlbEntry {
        let tag = self.cpus[cpu].pcid();
        let caching = self.caching;
        let event = self.frames.now();
        // I2: as old as what it started from, unless a walk from the root says the same at this moment.
        let new = Origin::new(context.root(), self.step, event);
        let (mut origin, mut reached) = match start {
            Some(start) => match self.upper_tables(context, linear, walk, &found) {
                Some(tables) => {
                    let mut origin = new;
                    tables.for_each(|table| origin.pass(table, event));
                    (origin, event)
                }
                // The pointer to the first table was read when the position was cached, the others are read now.
                None => (start.origin, start.origin.read),
            },
            None => (new, event),
        };
        origin.read = event;
        let mut rights = start.map_or(Rights::ALL, |start| start.position.rights);
        for step in walk.steps() {
            if let Some(address) = step.address {
                origin.pass(address >> 12, reached);
                reached = event;
            }
            if step.index == found.index {
                break;
            }
            let level = &context.mode.levels[step.index];
            if !level.accessed {
                continue;
            }
            rights = rights.and(step.entry, context.mode.has_xd);
            let table = context.mode.address(step.index, step.entry, false);
            let position = Position {
                index: step.index + 1,
                table,
                rights,
            };
            let shift = level.shift;
            let cached = WalkEntry {
                linear: linear >> shift << shift,
                shift,
                position,
                tag,
                origin,
            };
            if !caching {
                continue;
            }
            self.cpus[cpu].caches.fill_walk(cached);
            self.frames.note(
                table >> 12,
                FrameEventKind::FilledTable(linear),
                self.step,
                cpu,
                None,
            );
        }
        let mut piece = found;
        if found.shift > 12 && self.rng.chance(self.adversary.fracture) {
            self.stats.fractures += 1;
            piece.page = found.physical(linear) & !0xfff;
            piece.shift = 12;
        }
        let entry = TlbEntry {
            linear: linear >> piece.shift << piece.shift,
            translation: piece,
            whole_shift: found.shift,
            tag: if found.global { GLOBAL } else { tag },
            origin,
        };
        if !caching {
            return entry;
        }
        self.cpus[cpu].caches.fill(entry);
        self.frames.note(
            found.physical(linear) >> 12,
            FrameEventKind::Filled(linear),
            self.step,
            cpu,
            None,
        );
        entry
    }

    /// Caches that a walk from the root found an entry not present.
    fn remember_absent(&mut self, cpu: usize, context: &WalkContext, linear: u64, walk: &Walk) {
        if let (true, Some(step)) = (self.caching, walk.steps().last()) {
            let tag = self.cpus[cpu].pcid();
            let shift = context.mode.levels[step.index].shift;
            self.stats.absent_fills += 1;
            self.cpus[cpu].caches.fill_absent(linear, shift, tag);
        }
    }
}
