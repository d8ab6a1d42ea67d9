//! Processes and files by the textbook: a table of pages for each, every byte in a model, and the calls that change them.
//!
//! One operation enum serves proptest, libFuzzer and a kernel author's own tests. The model knows nothing of page tables,
//! copy-on-write or TLBs: fork copies everything, a store writes. Whatever a real memory manager does cleverly must look
//! like that.
//!
//! ```text
//!   process ── page 0 .. 63 ── None                         not mapped
//!                           └─ Private(value)               a value of its own
//!                           └─ Object { object, index }     a value in shared memory or a file, which others see too
//!                           └─ FilePrivate { file, index }  the file's value, until it is written: then a copy of its own
//!   pin ────────────────────── the page's value, for as long as the process keeps the page; after that what it was last
//! ```
//!
//! Each page holds one word, and zeros.
//!
//! Not handled: stacks, the heap, merging and the names of mappings; the recorded runs of Linux hold those.

mod model;

pub use model::{Answer, Processes};

use arbitrary::Arbitrary;
use proptest::prelude::*;

/// Pages that the operations speak of.
pub const WINDOW: u8 = 64;
/// Processes at most.
pub const PROCESSES: usize = 6;
/// Files that can be mapped.
pub const FILES: usize = 2;
/// Pages of a file at most, and at first.
pub const FILE_PAGES: u8 = 16;
/// Pins at most.
pub const PINS: usize = 4;

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
    /// A coming transfer of swap, and one of each file, fails: who needs the page hears of it once, and nothing is lost.
    DiskError {
        /// Which one.
        after: u8,
    },
    /// mmap of a file at a fixed place; what was there goes.
    MapFile {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
        /// Bits: 1 read, 2 write.
        rights: u8,
        /// Shared instead of private.
        shared: bool,
        /// Which file, modulo [`FILES`].
        file: u8,
        /// First page of the file, modulo [`FILE_PAGES`].
        index: u8,
    },
    /// A file becomes shorter or longer; what it grows by is zero.
    Truncate {
        /// Which file.
        file: u8,
        /// Its new size in pages, modulo one more than [`FILE_PAGES`].
        pages: u8,
    },
    /// A write call: the word of a file's page.
    WriteFile {
        /// Which file.
        file: u8,
        /// Which page.
        index: u8,
        /// What; a marker of the page is mixed in.
        value: u8,
    },
    /// A read call: that word.
    ReadFile {
        /// Which file.
        file: u8,
        /// Which page.
        index: u8,
    },
    /// fsync: the disk has the file's words after that.
    SyncFile {
        /// Which file.
        file: u8,
    },
    /// msync(MS_SYNC): the disk has the words of the files that are mapped shared.
    Sync {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// madvise(MADV_REMOVE): shared memory is zero again for everybody.
    Remove {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// mlock, but of private mappings of files.
    Lock {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// munlock.
    Unlock {
        /// Which process.
        process: u8,
        /// First page.
        page: u8,
        /// How many.
        pages: u8,
    },
    /// A device or the kernel pins a page, if it is not pinned yet and there are not [`PINS`] pins.
    Pin {
        /// Which process.
        process: u8,
        /// Which page.
        page: u8,
        /// To be written.
        write: bool,
    },
    /// Writes the word through a pin that may be written.
    PinWrite {
        /// Which pin, modulo [`PINS`].
        pin: u8,
        /// What.
        value: u8,
    },
    /// Reads the word through a pin.
    PinRead {
        /// Which pin, modulo [`PINS`].
        pin: u8,
    },
    /// The pin ends.
    Unpin {
        /// Which pin, modulo [`PINS`].
        pin: u8,
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
        12 => file_op(),
    ];
    proptest::collection::vec(op, 1..length)
}

/// Steps of files, locks and pins.
fn file_op() -> impl Strategy<Value = ProcessOp> {
    let process = 0..PROCESSES as u8;
    let page = 0..WINDOW;
    let pages = 1..12u8;
    let file = 0..FILES as u8;
    let index = 0..FILE_PAGES;
    let rights = prop_oneof![1 => 0..2u8, 3 => Just(3u8)];
    // Mostly whole files, and large parts of the window at a time: what is written again after it was written back is what matters.
    let size = prop_oneof![1 => 0..=FILE_PAGES, 2 => Just(FILE_PAGES)];
    let wide = (process.clone(), 0..WINDOW / 2, 1..WINDOW);
    let range = (process.clone(), page.clone(), pages.clone());
    let mapped = (process.clone(), page.clone(), pages, rights, any::<bool>());
    prop_oneof![
        4 => (mapped, file.clone(), index.clone()).prop_map(|((process, page, pages, rights, shared), file, index)| {
            ProcessOp::MapFile { process, page, pages, rights, shared, file, index }
        }),
        2 => (file.clone(), size).prop_map(|(file, pages)| ProcessOp::Truncate { file, pages }),
        2 => (file.clone(), index.clone(), any::<u8>())
            .prop_map(|(file, index, value)| ProcessOp::WriteFile { file, index, value }),
        1 => (file.clone(), index).prop_map(|(file, index)| ProcessOp::ReadFile { file, index }),
        2 => file.prop_map(|file| ProcessOp::SyncFile { file }),
        2 => wide.prop_map(|(process, page, pages)| ProcessOp::Sync { process, page, pages }),
        2 => range.clone().prop_map(|(process, page, pages)| ProcessOp::Remove { process, page, pages }),
        1 => range.clone().prop_map(|(process, page, pages)| ProcessOp::Lock { process, page, pages }),
        1 => range.prop_map(|(process, page, pages)| ProcessOp::Unlock { process, page, pages }),
        3 => (process, page, any::<bool>())
            .prop_map(|(process, page, write)| ProcessOp::Pin { process, page, write }),
        2 => (0..PINS as u8, any::<u8>()).prop_map(|(pin, value)| ProcessOp::PinWrite { pin, value }),
        1 => (0..PINS as u8).prop_map(|pin| ProcessOp::PinRead { pin }),
        2 => (0..PINS as u8).prop_map(|pin| ProcessOp::Unpin { pin }),
    ]
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
            | Self::Migrate { process, .. }
            | Self::MapFile { process, .. }
            | Self::Sync { process, .. }
            | Self::Remove { process, .. }
            | Self::Lock { process, .. }
            | Self::Unlock { process, .. }
            | Self::Pin { process, .. } => process,
            Self::Reclaim { .. }
            | Self::DiskError { .. }
            | Self::Truncate { .. }
            | Self::WriteFile { .. }
            | Self::ReadFile { .. }
            | Self::SyncFile { .. }
            | Self::PinWrite { .. }
            | Self::PinRead { .. }
            | Self::Unpin { .. } => 0,
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

/// The word that a file's page holds at first.
#[must_use]
pub const fn first_word(file: usize, index: u8) -> u64 {
    0xf_0000 + (file as u64) * 0x100 + index as u64
}

/// The word that a write call writes to a file's page.
#[must_use]
pub const fn written(index: u8, value: u8) -> u64 {
    0xe_0000 + ((index % FILE_PAGES) as u64) * 0x100 + value as u64
}

/// The word that is written through a pin.
#[must_use]
pub const fn pinned_word(pin: u8, value: u8) -> u64 {
    0xd_0000 + ((pin as usize % PINS) as u64) * 0x100 + value as u64
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
