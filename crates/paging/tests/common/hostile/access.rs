// Accesses of CPUs, held against the flat map: each comes to the frame that the map says, or faults where the map says so, and a write
// leaves its page dirty.

use kmem_mock_x86::AccessKind;
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Rights};

use super::model::{Item, find};
use super::{NO_ACCESS_KEY, NO_WRITE_KEY, World};

impl<F: Format> World<F> {
    /// A page that the space of a CPU has, most of the time.
    fn used_page(&mut self, cpu: usize) -> u64 {
        let page = self.page();
        if self.rng.below(8) == 0 {
            return page;
        }
        let model = &self.spaces[self.loaded[cpu]].model;
        match model.range(page..).next() {
            Some((&first, item)) if item.pages() == 1 => first,
            Some((&first, item)) => first + self.rng.next() % item.pages(),
            None => page,
        }
    }

    /// Whether an access may pass, by the manual's rules for these registers.
    fn allows(&self, attributes: &Attributes, kind: AccessKind, user: bool) -> bool {
        use kmem_mock_x86::manual::cr4;
        let rights = attributes.rights;
        let on = |bit| self.setup.registers.cr4 & bit != 0;
        let is_user = rights.contains(Rights::USER);
        let needed = match kind {
            AccessKind::Read => Rights::READ,
            AccessKind::Write => Rights::WRITE,
            AccessKind::Fetch => Rights::EXECUTE,
        };
        let refused = user && !is_user
            || !user && is_user && kind == AccessKind::Fetch && on(cr4::SMEP)
            || !user && is_user && kind != AccessKind::Fetch && on(cr4::SMAP)
            || on(cr4::PKE)
                && is_user
                && (attributes.pkey == NO_ACCESS_KEY && kind != AccessKind::Fetch
                    || attributes.pkey == NO_WRITE_KEY && kind == AccessKind::Write);
        rights.contains(needed) && !refused
    }

    pub(super) fn access(&mut self) {
        let cpu = self.rng.below(self.setup.cpus as u64) as usize;
        let kind =
            [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][self.rng.below(3) as usize];
        if self.kernel.is_some() && self.rng.below(6) == 0 {
            let page = self.kernel_page();
            self.check(cpu, page, kind, false);
            return;
        }
        let page = self.used_page(cpu);
        // Mostly what a program would do, and again and again.
        let user = self.rng.below(8) != 0;
        let kind = match find(&self.spaces[self.loaded[cpu]].model, page) {
            Some((_, Item::Leaf { attributes, .. })) if self.rng.below(8) != 0 => {
                if attributes.rights.contains(Rights::WRITE) && self.rng.below(2) == 0 {
                    AccessKind::Write
                } else {
                    AccessKind::Read
                }
            }
            _ => kind,
        };
        for _ in 0..1 + self.rng.below(3) {
            self.check(cpu, page, kind, user);
        }
    }

    /// One access of one CPU, held against the model.
    fn check(&mut self, cpu: usize, page: u64, kind: AccessKind, user: bool) {
        let (model, waiting) = {
            let space = match &self.kernel {
                Some(kernel) if page >= self.kernel_base => kernel,
                _ => &self.spaces[self.loaded[cpu]],
            };
            (find(&space.model, page), space.waiting.contains(&page))
        };
        let expected = match model {
            Some((
                first,
                Item::Leaf {
                    frame, attributes, ..
                },
            )) if self.allows(&attributes, kind, user) => Some(frame + (page - first)),
            _ => None,
        };
        let mut handle = self.env.machine.cpu(cpu);
        if user {
            handle = handle.user();
        }
        let linear = page << 12 | 0x123;
        // A fault from an entry that was stricter once is allowed, several in a row as well; not for ever.
        let mut seen = handle.translate(linear, kind);
        for _ in 0..20 {
            if expected.is_none() || seen.is_ok() {
                break;
            }
            seen = handle.translate(linear, kind);
        }
        if waiting {
            // Either is allowed until the flush; a write may be one that a cached dirty bit swallowed.
            if kind == AccessKind::Write && seen.is_ok() {
                self.wrote(cpu, page, None);
            }
            return;
        }
        match expected {
            Some(frame) => assert_eq!(
                seen.ok(),
                Some(frame << 12 | 0x123),
                "CPU {cpu} page {page:#x} {kind:?} user {user} {model:?}: {}",
                self.env.machine.explain(cpu, linear)
            ),
            None => assert!(
                seen.is_err(),
                "CPU {cpu} page {page:#x} {kind:?} user {user} {model:?} should fault: {}",
                self.env.machine.explain(cpu, linear)
            ),
        }
        if kind == AccessKind::Write && expected.is_some() {
            self.wrote(cpu, page, Some(true));
        }
    }

    fn wrote(&mut self, cpu: usize, page: u64, how: Option<bool>) {
        let model = match &mut self.kernel {
            Some(kernel) if page >= self.kernel_base => &mut kernel.model,
            _ => &mut self.spaces[self.loaded[cpu]].model,
        };
        if let Some((first, _)) = find(model, page)
            && let Some(Item::Leaf { dirty, .. }) = model.get_mut(&first)
            && *dirty != Some(true)
        {
            *dirty = how;
        }
    }

    /// Some CPU comes back to the space that was changed, with what it has cached under its tag, and looks there.
    pub(super) fn revisit(&mut self) {
        let (space, first, count) = self.last;
        if space >= self.spaces.len() {
            return;
        }
        if self.rng.below(3) == 0 {
            let cpu = self.rng.below(self.setup.cpus as u64) as usize;
            if self.loaded[cpu] != space {
                self.load(cpu, space);
                self.audit();
            }
        }
        for cpu in 0..self.setup.cpus {
            if self.loaded[cpu] == space {
                let page = first + self.rng.below(count);
                let kind = [AccessKind::Read, AccessKind::Write][self.rng.below(2) as usize];
                self.check(cpu, page, kind, true);
            }
        }
    }
}
