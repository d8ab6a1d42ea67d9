//! Telling what went wrong, and looking for what is about to: the words of a violation, and the audit of all caches.

use std::fmt::Write;

use crate::engine::{Core, STORY_EVENTS};
use crate::manual::pte;
use crate::tlb::{GLOBAL, TlbEntry, WalkEntry, rights_text};
use crate::violation::{Violation, ViolationKind};
use crate::walker::{self, Access, AccessKind, Stop, Touch, WalkContext};

impl Core {
    /// Files a violation with the history of its frame.
    pub(crate) fn raise(
        &mut self,
        kind: ViolationKind,
        cpu: usize,
        linear: Option<u64>,
        frame: Option<u64>,
        lines: Vec<String>,
    ) {
        let violation = self.violation(kind, cpu, linear, frame, lines);
        self.raised.push(violation);
    }

    fn violation(
        &self,
        kind: ViolationKind,
        cpu: usize,
        linear: Option<u64>,
        frame: Option<u64>,
        lines: Vec<String>,
    ) -> Violation {
        let history = frame
            .map(|frame| self.frames.history(frame, STORY_EVENTS))
            .unwrap_or_default();
        Violation {
            kind,
            step: self.step,
            cpu,
            linear,
            frame,
            history,
            lines,
        }
    }

    /// Files the use of a stale translation.
    pub(crate) fn stale(
        &mut self,
        kind: ViolationKind,
        cpu: usize,
        linear: u64,
        access: Option<Access>,
        entry: &TlbEntry,
        source: &str,
    ) {
        let violation = self.stale_story(kind, cpu, linear, access, entry, source);
        self.raised.push(violation);
    }

    fn stale_story(
        &self,
        kind: ViolationKind,
        cpu: usize,
        linear: u64,
        access: Option<Access>,
        entry: &TlbEntry,
        source: &str,
    ) -> Violation {
        let did = match access.map(|access| (access.kind, access.user)) {
            None => "still holds a translation of",
            Some((AccessKind::Read, false)) => "read from",
            Some((AccessKind::Write, false)) => "wrote to",
            Some((AccessKind::Fetch, false)) => "executed at",
            Some((AccessKind::Read, true)) => "read (user) from",
            Some((AccessKind::Write, true)) => "wrote (user) to",
            Some((AccessKind::Fetch, true)) => "executed (user) at",
        };
        let mut frame = entry.translation.physical(linear) >> 12;
        let tag = if entry.tag == GLOBAL {
            "global".to_owned()
        } else {
            format!("PCID {}", entry.tag)
        };
        let mut lines = vec![format!(
            "CPU {cpu} {did} {linear:#x} through {source} ({}{}, frame {frame:#x}, {tag}, root {:#x}) filled at step {}",
            rights_text(entry.translation.rights),
            if entry.translation.dirty {
                ", dirty"
            } else {
                ""
            },
            entry.origin.root,
            entry.origin.step,
        )];
        lines.push(self.tables_text(cpu, linear));
        if kind == ViolationKind::FreedTable
            && let Some((table, _)) = entry
                .origin
                .reached()
                .find(|&(table, reached)| self.frames.freed_since(table, reached))
        {
            lines.push(format!(
                "it rests on the page table in frame {table:#x}, freed since"
            ));
            frame = table;
        }
        let pcid = if entry.tag == GLOBAL { 0 } else { entry.tag };
        self.missing_text(&mut lines, cpu, linear, pcid, entry.whole_shift);
        self.violation(kind, cpu, Some(linear), Some(frame), lines)
    }

    fn missing_text(
        &self,
        lines: &mut Vec<String>,
        cpu: usize,
        linear: u64,
        pcid: u16,
        shift: u32,
    ) {
        lines.push(match self.cpus[cpu].last_flush(linear, pcid, shift) {
            Some((step, flush)) => {
                format!("last flush on CPU {cpu} that covers it: {flush} at step {step}")
            }
            None => format!("last flush on CPU {cpu} that covers it: none remembered"),
        });
        let page = linear >> shift << shift;
        lines.push(format!(
            "missing: invlpg {page:#x} or a wider flush on CPU {cpu} for PCID {pcid}, after the entry was changed and before \
             anything it led to was reused"
        ));
    }

    /// Files a walk that starts in a freed table.
    pub(crate) fn freed_walk_table(
        &mut self,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        start: &WalkEntry,
    ) {
        self.stats.stale_hits += 1;
        let violation = self.walk_story(
            ViolationKind::FreedTable,
            cpu,
            context,
            linear,
            start,
            "walked to",
        );
        self.raised.push(violation);
    }

    fn walk_story(
        &self,
        kind: ViolationKind,
        cpu: usize,
        context: &WalkContext,
        linear: u64,
        start: &WalkEntry,
        did: &str,
    ) -> Violation {
        let table = start.position.table >> 12;
        let name = context.mode.levels[start.position.index - 1].name;
        let mut lines = vec![format!(
            "CPU {cpu} {did} {linear:#x} from a cached {name} that leads to the table in frame {table:#x} (PCID {}, root {:#x}), \
             filled at step {}",
            start.tag, start.origin.root, start.origin.step,
        )];
        lines.push(self.tables_text(cpu, linear));
        self.missing_text(&mut lines, cpu, linear, start.tag, 12);
        self.violation(kind, cpu, Some(linear), Some(table), lines)
    }

    /// Files a table or page where no memory is.
    pub(crate) fn no_memory(&mut self, cpu: usize, linear: u64, address: u64, what: &str) {
        let lines = vec![
            format!(
                "CPU {cpu} needed the {what} at physical {address:#x} for {linear:#x}, and nothing answers there"
            ),
            self.tables_text(cpu, linear),
        ];
        self.raise(
            ViolationKind::NoMemory,
            cpu,
            Some(linear),
            Some(address >> 12),
            lines,
        );
    }

    /// What the tables say about an address now, entry by entry.
    pub(crate) fn tables_text(&self, cpu: usize, linear: u64) -> String {
        let Some(context) = self.cpus[cpu].context() else {
            return "tables now: paging is off".to_owned();
        };
        let walk = walker::walk(&self.memory, &context, linear, None, Touch::Nothing);
        let mut text = format!("tables now (CR3 {:#x}):", context.cr3);
        for (number, step) in walk.steps().iter().enumerate() {
            let arrow = if number == 0 { "" } else { " ->" };
            let _ = write!(
                text,
                "{arrow} {} {:#x}",
                context.mode.levels[step.index].name, step.entry
            );
            if step.entry & pte::P == 0 {
                break;
            }
        }
        let end = match walk.outcome {
            Ok(now) => {
                let dirty = if now.dirty { ", dirty" } else { "" };
                format!(
                    "frame {:#x} {}{dirty}",
                    now.physical(linear) >> 12,
                    rights_text(now.rights)
                )
            }
            Err(Stop::NotPresent) => "not present".to_owned(),
            Err(Stop::Reserved) => "a reserved bit is set".to_owned(),
            Err(Stop::NoMemory(at)) => format!("no memory at {at:#x}"),
        };
        let _ = write!(text, ": {end}");
        text
    }

    /// Finds every cached entry that a CPU could use at once and that the tables do not back, for linear addresses in
    /// `first..=last`.
    pub(crate) fn audit(&self, first: u64, last: u64) -> Vec<Violation> {
        let mut found = Vec::new();
        for cpu in 0..self.cpus.len() {
            let Some(context) = self.cpus[cpu].context() else {
                continue;
            };
            let pcid = self.cpus[cpu].pcid();
            for entry in self.cpus[cpu].caches.entries() {
                let end = entry.linear + ((1u64 << entry.translation.shift) - 1);
                if (entry.tag == pcid || entry.tag == GLOBAL)
                    && entry.linear <= last
                    && end >= first
                {
                    self.audit_entry(
                        cpu,
                        &context,
                        entry,
                        (entry.linear.max(first), end.min(last)),
                        &mut found,
                    );
                }
            }
            for entry in self.cpus[cpu].caches.walk_entries() {
                let end = entry.linear + ((1u64 << entry.shift) - 1);
                if entry.tag == pcid && entry.linear <= last && end >= first {
                    self.audit_walk_entry(cpu, &context, entry, &mut found);
                }
            }
        }
        found
    }

    fn audit_entry(
        &self,
        cpu: usize,
        context: &WalkContext,
        entry: &TlbEntry,
        (first, last): (u64, u64),
        found: &mut Vec<Violation>,
    ) {
        let mut at = first;
        loop {
            let fresh = walker::walk(&self.memory, context, at, None, Touch::Nothing);
            let held = entry.translation;
            let mapped = fresh
                .outcome
                .is_ok_and(|now| now.physical(at) == held.physical(at));
            // As for accesses: what the tables say as well counts from when it was read.
            let since = if mapped {
                entry.origin.read
            } else {
                entry.origin.event
            };
            let freed =
                self.frames.freed_since(held.physical(at) >> 12, since) && !self.is_exempt(at);
            let stale = match fresh.outcome {
                Ok(now) => {
                    now.physical(at) != held.physical(at)
                        || held.rights.exceed(now.rights)
                        || held.key != now.key
                        || held.pat != now.pat
                        // A global entry serves every space; one that is global no more must not.
                        || (held.global && !now.global)
                        || (held.dirty && !now.dirty)
                }
                Err(_) => true,
            };
            if freed || stale {
                let kind = if freed {
                    ViolationKind::FreedFrame
                } else if self.table_freed(entry) {
                    ViolationKind::FreedTable
                } else {
                    ViolationKind::Unflushed
                };
                found.push(self.stale_story(kind, cpu, at, None, entry, "a TLB entry"));
                return;
            }
            // To the next page of the tables: a large cached page may stand for many small ones by now.
            let shift = fresh.outcome.map_or(12, |now| now.shift);
            match ((at >> shift) + 1).checked_shl(shift) {
                Some(next) if next > at && next <= last => at = next,
                _ => return,
            }
        }
    }

    fn audit_walk_entry(
        &self,
        cpu: usize,
        context: &WalkContext,
        entry: &WalkEntry,
        found: &mut Vec<Violation>,
    ) {
        let fresh = walker::walk(&self.memory, context, entry.linear, None, Touch::Nothing);
        let mut rights = walker::Rights::ALL;
        let mut same = false;
        for step in fresh.steps() {
            if step.entry & pte::P == 0
                || context
                    .mode
                    .is_leaf(step.index, step.entry, context.inputs.pse)
            {
                break;
            }
            if context.mode.levels[step.index].accessed {
                rights = rights.and(step.entry, context.mode.has_xd);
            }
            if step.index + 1 == entry.position.index {
                same = context.mode.address(step.index, step.entry, false) == entry.position.table
                    && !entry.position.rights.exceed(rights);
                break;
            }
        }
        let freed = self
            .frames
            .freed_since(entry.position.table >> 12, entry.origin.read);
        if freed || !same {
            let kind = if freed {
                ViolationKind::FreedTable
            } else {
                ViolationKind::Unflushed
            };
            found.push(self.walk_story(
                kind,
                cpu,
                context,
                entry.linear,
                entry,
                "may still walk to",
            ));
        }
    }
}
