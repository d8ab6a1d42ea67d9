//! Processes that copy everything at fork: what copy-on-write must be indistinguishable from.
//!
//! Each process is a map from pages to one byte of content and a right to write. A fork clones the map. So nobody can see a
//! write of another process, which is the whole specification of private memory.

use std::collections::BTreeMap;

use kmem_hal::{Page, PageRange};

use super::vma::{RangeModel, TreeVmas};

/// The number of a process.
pub type ProcessId = u32;

/// Processes with private anonymous memory.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Page, PageRange};
/// use kmem_testkit::twins::SpaceModel;
///
/// let pages = PageRange::with_count(Page::from_number(0x10), 4).unwrap();
/// let mut model = SpaceModel::new();
/// let parent = model.spawn();
/// model.map(parent, pages, true);
/// assert!(model.write(parent, pages.first(), 1));
/// let child = model.fork(parent).unwrap();
/// model.write(child, pages.first(), 2);
/// assert_eq!(model.read(parent, pages.first()), Some(1));
/// assert_eq!(model.read(child, pages.last()), Some(0));
/// ```
#[derive(Clone, Debug, Default)]
pub struct SpaceModel {
    processes: BTreeMap<ProcessId, Process>,
    next: ProcessId,
}

#[derive(Clone, Debug, Default)]
struct Process {
    /// Mapped pages, and whether they may be written.
    vmas: TreeVmas<bool>,
    /// What was written; other mapped pages read as zero.
    content: BTreeMap<u64, u8>,
}

impl SpaceModel {
    /// No process.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A process with no memory.
    pub fn spawn(&mut self) -> ProcessId {
        self.add(Process::default())
    }

    fn add(&mut self, process: Process) -> ProcessId {
        let id = self.next;
        self.next += 1;
        self.processes.insert(id, process);
        id
    }

    /// A copy of a process; `None` where there is none.
    pub fn fork(&mut self, parent: ProcessId) -> Option<ProcessId> {
        let copy = self.processes.get(&parent)?.clone();
        Some(self.add(copy))
    }

    /// Ends a process; whether there was one.
    pub fn exit(&mut self, process: ProcessId) -> bool {
        self.processes.remove(&process).is_some()
    }

    /// The processes, ascending.
    #[must_use]
    pub fn processes(&self) -> Vec<ProcessId> {
        self.processes.keys().copied().collect()
    }

    /// Maps fresh zero pages, over what was there.
    pub fn map(&mut self, process: ProcessId, pages: PageRange, writable: bool) -> bool {
        self.unmap(process, pages);
        self.processes
            .get_mut(&process)
            .map(|process| process.vmas.insert(pages, writable))
            .is_some()
    }

    /// Unmaps pages.
    pub fn unmap(&mut self, process: ProcessId, pages: PageRange) -> bool {
        let Some(process) = self.processes.get_mut(&process) else {
            return false;
        };
        process.vmas.remove(pages);
        process
            .content
            .retain(|&page, _| !pages.contains(Page::from_number(page)));
        true
    }

    /// Changes the right to write of what is mapped.
    pub fn protect(&mut self, process: ProcessId, pages: PageRange, writable: bool) -> bool {
        let Some(process) = self.processes.get_mut(&process) else {
            return false;
        };
        for (range, _) in process.vmas.remove(pages) {
            process.vmas.insert(range, writable);
        }
        true
    }

    /// Drops the content of pages: they read as zero (`MADV_DONTNEED`).
    pub fn discard(&mut self, process: ProcessId, pages: PageRange) -> bool {
        let Some(process) = self.processes.get_mut(&process) else {
            return false;
        };
        process
            .content
            .retain(|&page, _| !pages.contains(Page::from_number(page)));
        true
    }

    /// What a process reads; `None`: a fault that kills.
    #[must_use]
    pub fn read(&self, process: ProcessId, page: Page) -> Option<u8> {
        let process = self.processes.get(&process)?;
        process.vmas.get(page)?;
        Some(process.content.get(&page.number()).copied().unwrap_or(0))
    }

    /// A process writes; `false`: a fault that kills.
    pub fn write(&mut self, process: ProcessId, page: Page, byte: u8) -> bool {
        let Some(process) = self.processes.get_mut(&process) else {
            return false;
        };
        let writable = process.vmas.get(page) == Some(true);
        if writable {
            process.content.insert(page.number(), byte);
        }
        writable
    }

    /// The ranges of a process with equal neighbours merged.
    #[must_use]
    pub fn ranges(&self, process: ProcessId) -> Vec<(PageRange, bool)> {
        self.processes
            .get(&process)
            .map(|process| process.vmas.merge())
            .unwrap_or_default()
    }
}
