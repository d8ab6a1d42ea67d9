//! Processes by the textbook: a table of pages for each, every byte in a model, and the calls that change them.
//!
//! One operation enum serves proptest, libFuzzer and a kernel author's own tests. The model knows nothing of page tables,
//! copy-on-write or TLBs: fork copies everything, a store writes. Whatever a real memory manager does cleverly must look
//! like that.
//!
//! ```text
//!   process ── page 0 .. 63 ── None                         not mapped
//!                           └─ Private { value, rights }    a value of its own
//!                           └─ Shared { object, index }     a value in an object that others map too
//! ```
//!
//! Not handled: files, stacks, the heap, merging and the names of mappings; the recorded runs of Linux hold those.

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use proptest::prelude::*;

/// Pages that the operations speak of.
pub const WINDOW: u8 = 64;
/// Processes at most.
pub const PROCESSES: usize = 6;

/// One step of one process. Numbers out of range wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Arbitrary)]
pub enum ProcessOp {
    /// mmap at a fixed place, private or shared among relatives; what was there goes.
    Map {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
        /// Bits: 1 read, 2 write.
        rights: u8,
        /// Shared memory instead of private.
        shared: bool,
    },
    /// munmap.
    Unmap {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// mprotect.
    Protect {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
        /// Bits: 1 read, 2 write.
        rights: u8,
    },
    /// Writes one word of a page.
    Store {
        /// Which process.
        process: u8,
        /// Which page.
        page: u8,
        /// What; a marker of the page is mixed in.
        value: u8,
    },
    /// Reads that word.
    Load {
        /// Which process.
        process: u8,
        /// Which page.
        page: u8,
    },
    /// madvise(MADV_DONTNEED).
    DontNeed {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// mremap with MREMAP_FIXED to another place.
    Move {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
        /// First page of the target.
        to: u8,
    },
    /// fork, if there is room for a child.
    Fork {
        /// Which process.
        process: u8,
    },
    /// The process ends, if it is not the last.
    Exit {
        /// Which process.
        process: u8,
    },
    /// Memory is short: so many pages should go to swap. No process may notice.
    Reclaim {
        /// How many.
        pages: u8,
        /// How often the device must be asked until a transfer is done, modulo 4.
        latency: u8,
    },
    /// Pages get other frames. No process may notice.
    Migrate {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// A coming transfer of swap fails: who needs the page hears of it once, and nothing is lost.
    DiskError {
        /// Which one.
        after: u8,
    },
}

/// A strategy that makes lists of at most `length` steps, mostly stores and loads among calls that matter to them.
pub fn process_ops(length: usize) -> impl Strategy<Value = Vec<ProcessOp>> {
    let process = 0..PROCESSES as u8;
    let page = 0..WINDOW;
    let pages = 1..12u8;
    let mapped = prop_oneof![2 => 1..12u8, 1 => 24..WINDOW];
    let rights = prop_oneof![1 => 0..2u8, 3 => Just(3u8)];
    let op = prop_oneof![
        3 => (process.clone(), page.clone(), mapped, rights.clone(), any::<bool>()).prop_map(
            |(process, page, pages, rights, shared)| ProcessOp::Map { process, page, pages, rights, shared }
        ),
        1 => (process.clone(), page.clone(), pages.clone())
            .prop_map(|(process, page, pages)| ProcessOp::Unmap { process, page, pages }),
        2 => (process.clone(), page.clone(), pages.clone(), rights)
            .prop_map(|(process, page, pages, rights)| ProcessOp::Protect { process, page, pages, rights }),
        8 => (process.clone(), page.clone(), any::<u8>())
            .prop_map(|(process, page, value)| ProcessOp::Store { process, page, value }),
        4 => (process.clone(), page.clone()).prop_map(|(process, page)| ProcessOp::Load { process, page }),
        1 => (process.clone(), page.clone(), pages.clone())
            .prop_map(|(process, page, pages)| ProcessOp::DontNeed { process, page, pages }),
        1 => (process.clone(), page.clone(), pages, page)
            .prop_map(|(process, page, pages, to)| ProcessOp::Move { process, page, pages, to }),
        2 => process.clone().prop_map(|process| ProcessOp::Fork { process }),
        1 => process.clone().prop_map(|process| ProcessOp::Exit { process }),
        2 => (1..80u8, 0..4u8).prop_map(|(pages, latency)| ProcessOp::Reclaim { pages, latency }),
        2 => (process, 0..WINDOW, 1..WINDOW)
            .prop_map(|(process, page, pages)| ProcessOp::Migrate { process, page, pages }),
        1 => (1..6u8).prop_map(|after| ProcessOp::DiskError { after }),
    ];
    proptest::collection::vec(op, 1..length)
}

/// What an access or call comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// The word read.
    Value(u64),
    /// `SIGSEGV`, nothing mapped.
    NotMapped,
    /// `SIGSEGV`, not allowed.
    NotAllowed,
    /// `ENOMEM`: a hole in the range.
    Hole,
    /// `EFAULT`: nothing to move.
    NothingThere,
    /// `EINVAL`.
    Invalid,
}

/// A page of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PageModel {
    rights: u8,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Private(u64),
    Shared(usize, u8),
}

type Table = [Option<PageModel>; WINDOW as usize];

/// The model: every process's pages and every shared word.
#[derive(Clone, Debug)]
pub struct Processes {
    tables: Vec<Option<Table>>,
    shared: BTreeMap<(usize, u8), u64>,
    objects: usize,
}

impl Processes {
    /// One process without mappings.
    #[must_use]
    pub fn new() -> Self {
        let mut tables = vec![None; PROCESSES];
        tables[0] = Some([None; WINDOW as usize]);
        Self {
            tables,
            shared: BTreeMap::new(),
            objects: 0,
        }
    }

    /// The process that a step means: the number wraps, and dead ones stand for the next living one.
    #[must_use]
    pub fn living(&self, process: u8) -> usize {
        let start = usize::from(process) % PROCESSES;
        (0..PROCESSES)
            .map(|i| (start + i) % PROCESSES)
            .find(|&i| self.tables[i].is_some())
            .unwrap_or(0)
    }

    /// Where a child would go; `None` where there is no room.
    #[must_use]
    pub fn vacancy(&self) -> Option<usize> {
        self.tables.iter().position(Option::is_none)
    }

    /// The processes that live.
    pub fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        (0..PROCESSES).filter(|&i| self.tables[i].is_some())
    }

    /// The word of a page: its value, or why it cannot be read.
    #[must_use]
    pub fn load(&self, process: usize, page: u8) -> Answer {
        match self.tables[process]
            .as_ref()
            .and_then(|table| table[usize::from(page % WINDOW)])
        {
            None => Answer::NotMapped,
            Some(PageModel { rights: 0, .. }) => Answer::NotAllowed,
            Some(PageModel { content, .. }) => Answer::Value(self.value(content)),
        }
    }

    fn value(&self, content: Content) -> u64 {
        match content {
            Content::Private(value) => value,
            Content::Shared(object, index) => {
                self.shared.get(&(object, index)).copied().unwrap_or(0)
            }
        }
    }

    /// Applies a step that is not a fork or an exit to process `living`; says what Linux answers.
    ///
    /// # Panics
    ///
    /// Where `living` does not live, or the step is a fork or an exit.
    pub fn apply(&mut self, living: usize, op: ProcessOp) -> Answer {
        let table = self.tables[living].as_mut().expect("a living process");
        match op {
            ProcessOp::Map {
                page,
                pages,
                rights,
                shared,
                ..
            } => {
                let (first, last) = span(page, pages);
                self.objects += 1;
                for (index, slot) in (0u8..).zip(&mut table[first..last]) {
                    let content = if shared {
                        Content::Shared(self.objects, index)
                    } else {
                        Content::Private(0)
                    };
                    *slot = Some(PageModel {
                        rights: rights & 3,
                        content,
                    });
                }
                Answer::Done
            }
            ProcessOp::Unmap { page, pages, .. } => {
                let (first, last) = span(page, pages);
                table[first..last].fill(None);
                Answer::Done
            }
            ProcessOp::Protect {
                page,
                pages,
                rights,
                ..
            } => {
                let (first, last) = span(page, pages);
                for slot in &mut table[first..last] {
                    match slot {
                        Some(page) => page.rights = rights & 3,
                        None => return Answer::Hole,
                    }
                }
                Answer::Done
            }
            ProcessOp::Store { page, value, .. } => match &mut table[usize::from(page % WINDOW)] {
                None => Answer::NotMapped,
                Some(PageModel { rights, .. }) if *rights & 2 == 0 => Answer::NotAllowed,
                Some(PageModel { content, .. }) => {
                    match content {
                        Content::Private(word) => *word = stored(page, value),
                        Content::Shared(object, index) => {
                            self.shared.insert((*object, *index), stored(page, value));
                        }
                    }
                    Answer::Done
                }
            },
            ProcessOp::Load { page, .. } => self.load(living, page),
            ProcessOp::DontNeed { page, pages, .. } => {
                let (first, last) = span(page, pages);
                let mut hole = false;
                for slot in &mut table[first..last] {
                    match slot {
                        Some(PageModel {
                            content: Content::Private(word),
                            ..
                        }) => *word = 0,
                        Some(_) => {}
                        None => hole = true,
                    }
                }
                if hole { Answer::Hole } else { Answer::Done }
            }
            ProcessOp::Move {
                page, pages, to, ..
            } => {
                let (first, last) = span(page, pages);
                let (to, end) = span(to, (last - first) as u8);
                if end - to != last - first || to < last && first < end {
                    return Answer::Invalid;
                }
                if table[first].is_none() {
                    return Answer::NothingThere;
                }
                // Holes do not move: what is mapped at their place stays.
                for offset in 0..last - first {
                    if let Some(moved) = table[first + offset].take() {
                        table[to + offset] = Some(moved);
                    }
                }
                Answer::Done
            }
            ProcessOp::Migrate { .. } => Answer::Done,
            ProcessOp::Fork { .. }
            | ProcessOp::Exit { .. }
            | ProcessOp::Reclaim { .. }
            | ProcessOp::DiskError { .. } => {
                unreachable!("not a step of one process")
            }
        }
    }

    /// Process `child` becomes a copy of process `parent`.
    pub fn fork(&mut self, parent: usize, child: usize) {
        self.tables[child] = self.tables[parent];
    }

    /// Process `process` ends.
    pub fn exit(&mut self, process: usize) {
        self.tables[process] = None;
    }
}

impl Default for Processes {
    fn default() -> Self {
        Self::new()
    }
}

impl ProcessOp {
    /// The process that the step names.
    #[must_use]
    pub const fn process(self) -> u8 {
        match self {
            Self::Map { process, .. }
            | Self::Unmap { process, .. }
            | Self::Protect { process, .. }
            | Self::Store { process, .. }
            | Self::Load { process, .. }
            | Self::DontNeed { process, .. }
            | Self::Move { process, .. }
            | Self::Fork { process }
            | Self::Exit { process }
            | Self::Migrate { process, .. } => process,
            Self::Reclaim { .. } | Self::DiskError { .. } => 0,
        }
    }
}

/// The pages of a step: first, and one past the last, inside the window and never empty.
#[must_use]
pub fn span(page: u8, pages: u8) -> (usize, usize) {
    let first = usize::from(page % WINDOW);
    (
        first,
        (first + usize::from(pages.max(1))).min(usize::from(WINDOW)),
    )
}

/// The word that a store of `value` to `page` writes: never 0, and different for each page.
#[must_use]
pub const fn stored(page: u8, value: u8) -> u64 {
    0x1000 + ((page % WINDOW) as u64) * 0x100 + value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_has_its_own_private_words_and_the_same_shared_ones() {
        let mut model = Processes::new();
        let map = |shared, page| ProcessOp::Map {
            process: 0,
            page,
            pages: 1,
            rights: 3,
            shared,
        };
        let store = |page, value| ProcessOp::Store {
            process: 0,
            page,
            value,
        };
        assert_eq!(model.apply(0, map(false, 0)), Answer::Done);
        assert_eq!(model.apply(0, map(true, 1)), Answer::Done);
        model.fork(0, 1);
        model.apply(1, store(0, 7));
        model.apply(1, store(1, 8));
        assert_eq!(model.load(0, 0), Answer::Value(0));
        assert_eq!(model.load(0, 1), Answer::Value(stored(1, 8)));
        assert_eq!(model.load(0, 2), Answer::NotMapped);
    }
}
