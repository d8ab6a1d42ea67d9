//! What a processor may do on its own account: evict, walk ahead, cache what it finds, run ahead of its checks.
//!
//! Source: Intel SDM volume 3A, 4.10.2.3 (speculative fills) and 4.10.3.1 (paging-structure caches of a walk that fails).

use super::Core;
use crate::tlb::{Origin, WalkEntry};
use crate::walker::{self, Position, Rights, Stop, Touch, Walk, WalkContext};

/// Addresses used last, near which it walks ahead.
pub(super) const RECENT: usize = 16;

impl Core {
    /// What a processor may do on its own account before an access.
    pub(super) fn take_liberties(&mut self, cpu: usize, context: &WalkContext, linear: u64) {
        let adversary = self.adversary;
        let slot = self.step as usize % RECENT;
        self.recent[slot] = linear;
        if self.rng.chance(adversary.evict) {
            let victim = self.rng.below(self.cpus[cpu].caches.len());
            if self.cpus[cpu].caches.evict(victim) {
                self.stats.evictions += 1;
            }
        }
        if self.rng.chance(adversary.speculate) {
            self.speculate(cpu, context);
        }
    }

    /// Walks to an address that nobody asked for, and caches what is there (SDM 3A 4.10.2.3): A may be set, D never.
    fn speculate(&mut self, cpu: usize, context: &WalkContext) {
        let near = self.recent[self.rng.below(RECENT as u64) as usize];
        let target = match self.rng.below(4) {
            0 => self.rng.next() & 0x0000_7fff_ffff_f000,
            1 => near,
            _ => near
                .wrapping_add(self.rng.below(16) << 12)
                .wrapping_sub(8 << 12),
        };
        self.speculate_at(cpu, context, context.mode.wrap(target));
    }

    /// Walks to an address ahead of any access, and caches what is there.
    fn speculate_at(&mut self, cpu: usize, context: &WalkContext, linear: u64) {
        let tag = self.cpus[cpu].pcid();
        let (_, present) = self.cpus[cpu].caches.hits(linear, tag);
        if !context.mode.is_canonical(linear) || present > 0 {
            return;
        }
        let start = self.cpus[cpu].caches.deepest(linear, tag).copied();
        let walk = self.walk_once(cpu, context, linear, start.as_ref());
        if self.caches_absent && start.is_none() && walk.outcome == Err(Stop::NotPresent) {
            self.remember_absent(cpu, context, linear, &walk);
        }
        if walk.outcome == Err(Stop::NotPresent) {
            // The way to a missing page may be cached too, and no fault tells (SDM 3A 4.10.3.1).
            self.fill_upper(cpu, context, linear, start.as_ref(), &walk);
        }
        let Ok(found) = walk.outcome else { return };
        let leaf = *walk.steps().last().expect("a translation has a leaf");
        let early = leaf.entry & crate::manual::pte::A == 0;
        if walker::touch_leaf(&self.memory, context.mode, leaf, false).is_none() {
            return;
        }
        self.stats.early_accessed += u64::from(early);
        self.stats.speculative_fills += 1;
        let entry = self.fill(cpu, context, linear, start.as_ref(), &walk, found);
        if start.is_none() {
            self.check_fresh(cpu, linear, &entry);
        }
    }

    /// Caches the tables on the way of a speculative walk that found no page.
    fn fill_upper(
        &mut self,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        start: Option<&WalkEntry>,
        walk: &Walk,
    ) {
        if !self.caching || start.is_some() {
            return;
        }
        let event = self.frames.now();
        let mut origin = Origin::new(context.root(), self.step, event);
        let tag = self.cpus[cpu].pcid();
        let mut rights = Rights::ALL;
        let Some((_, upper)) = walk.steps().split_last() else {
            return;
        };
        for step in upper {
            if let Some(address) = step.address {
                origin.pass(address >> 12, event);
            }
            let level = &context.mode.levels[step.index];
            if !level.accessed {
                continue;
            }
            rights = rights.and(step.entry, context.mode.has_xd);
            let position = Position {
                index: step.index + 1,
                table: context.mode.address(step.index, step.entry, false),
                rights,
            };
            self.cpus[cpu].caches.fill_walk(WalkEntry {
                linear: linear >> level.shift << level.shift,
                shift: level.shift,
                position,
                tag,
                origin,
            });
        }
    }

    /// Where a load would read that runs ahead of its permission check: through any translation that the CPU holds or walks to, whoever may
    /// use it. No fault is raised, whatever comes of the load is thrown away; what a program learns of it, it learns by timing.
    pub(crate) fn transient(&mut self, cpu: usize, linear: u64) -> Option<u64> {
        self.step += 1;
        let context = self.cpus[cpu].context()?;
        if !context.mode.is_canonical(linear) {
            return None;
        }
        let linear = context.mode.wrap(linear);
        self.speculate_at(cpu, &context, linear);
        let tag = self.cpus[cpu].pcid();
        let (hits, _) = self.cpus[cpu].caches.hits(linear, tag);
        let found = match hits[0] {
            Some(hit) => Some(
                self.cpus[cpu]
                    .caches
                    .entry(hit)
                    .translation
                    .physical(linear),
            ),
            // Without caches the walk itself tells.
            None => walker::walk(&self.memory, &context, linear, None, Touch::Nothing)
                .outcome
                .ok()
                .map(|found| found.physical(linear)),
        };
        self.mix(found.unwrap_or(u64::MAX));
        self.stats.transient_reads += u64::from(found.is_some());
        found
    }
}
