//! Operations on processes with private memory.

use arbitrary::Arbitrary;
use kmem_hal::{Page, PageRange};
use proptest::prelude::*;

use super::{Disagreement, strategy};
use crate::twins::{ProcessId, SpaceModel};

/// One operation of a process. Pages are numbers in a window that the implementation places where it likes.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceOp {
    /// Map fresh zero pages, over what was there (`MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS`).
    Map {
        /// Who.
        process: u8,
        /// First page, modulo the window.
        first: u16,
        /// Pages, modulo 64, at least 1.
        count: u8,
        /// Whether they may be written.
        writable: bool,
    },
    /// Unmap pages.
    Unmap {
        /// Who.
        process: u8,
        /// First page, modulo the window.
        first: u16,
        /// Pages, at least 1.
        count: u8,
    },
    /// Change the rights of what is mapped.
    Protect {
        /// Who.
        process: u8,
        /// First page, modulo the window.
        first: u16,
        /// Pages, at least 1.
        count: u8,
        /// Whether they may be written.
        writable: bool,
    },
    /// Drop the content of pages (`MADV_DONTNEED`).
    Discard {
        /// Who.
        process: u8,
        /// First page, modulo the window.
        first: u16,
        /// Pages, at least 1.
        count: u8,
    },
    /// Read a byte.
    Read {
        /// Who.
        process: u8,
        /// The page, modulo the window.
        page: u16,
    },
    /// Write a byte.
    Write {
        /// Who.
        process: u8,
        /// The page, modulo the window.
        page: u16,
        /// What.
        byte: u8,
    },
    /// Fork.
    Fork {
        /// Who.
        process: u8,
    },
    /// Exit, unless it is the last process.
    Exit {
        /// Who.
        process: u8,
    },
}

/// Pages of the window.
const WINDOW: u64 = 1024;
/// The most processes at a time.
const PROCESSES: usize = 6;

strategy!(
    SpaceOp,
    prop_oneof![
        3 => (any::<u8>(), 0u16..1024, 1u8..64, prop_oneof![3 => Just(true), 1 => Just(false)]).prop_map(
            |(process, first, count, writable)| Self::Map { process, first, count, writable }
        ),
        1 => (any::<u8>(), 0u16..1024, 1u8..100)
            .prop_map(|(process, first, count)| Self::Unmap { process, first, count }),
        1 => (any::<u8>(), 0u16..1024, 1u8..100, any::<bool>()).prop_map(
            |(process, first, count, writable)| Self::Protect { process, first, count, writable }
        ),
        1 => (any::<u8>(), 0u16..1024, 1u8..100)
            .prop_map(|(process, first, count)| Self::Discard { process, first, count }),
        5 => (any::<u8>(), 0u16..1024).prop_map(|(process, page)| Self::Read { process, page }),
        8 => (any::<u8>(), 0u16..1024, any::<u8>())
            .prop_map(|(process, page, byte)| Self::Write { process, page, byte }),
        1 => any::<u8>().prop_map(|process| Self::Fork { process }),
        1 => any::<u8>().prop_map(|process| Self::Exit { process }),
    ]
);

/// What the operations are run on: a wrapper of address spaces, by the model's process numbers. Every `false` or `None` of a
/// call that is not an access means that memory ran out and nothing changed.
pub trait SpacesUnderTest {
    /// A new process.
    fn spawn(&mut self, process: ProcessId) -> bool;
    /// A copy of `parent`.
    fn fork(&mut self, parent: ProcessId, child: ProcessId) -> bool;
    /// The end of a process.
    fn exit(&mut self, process: ProcessId);
    /// Maps fresh zero pages, over what was there.
    fn map(&mut self, process: ProcessId, pages: PageRange, writable: bool) -> bool;
    /// Unmaps pages.
    fn unmap(&mut self, process: ProcessId, pages: PageRange) -> bool;
    /// Changes the rights of what is mapped.
    fn protect(&mut self, process: ProcessId, pages: PageRange, writable: bool) -> bool;
    /// Drops the content of pages.
    fn discard(&mut self, process: ProcessId, pages: PageRange) -> bool;
    /// Reads the first byte of a page as the process does; `None`: the process would be killed.
    fn read(&mut self, process: ProcessId, page: Page) -> Option<u8>;
    /// Writes the first byte of a page as the process does; `false`: the process would be killed.
    fn write(&mut self, process: ProcessId, page: Page, byte: u8) -> bool;
}

fn pages(first: u16, count: u8) -> PageRange {
    let first = u64::from(first) % WINDOW;
    let count = u64::from(count).clamp(1, WINDOW - first);
    PageRange::with_count(Page::from_number(first), count).expect("inside the window")
}

/// Runs operations on address spaces and on processes that copy everything; in the end every process is read page by page
/// and ends.
///
/// # Errors
///
/// The first [`Disagreement`].
pub fn run_spaces(spaces: &mut impl SpacesUnderTest, ops: &[SpaceOp]) -> Result<(), Disagreement> {
    let mut model = SpaceModel::new();
    let first = model.spawn();
    if !spaces.spawn(first) {
        return Ok(());
    }
    for (at, op) in ops.iter().enumerate() {
        step(spaces, &mut model, op).map_err(|what| Disagreement::new(at, op, what))?;
    }
    for process in model.processes() {
        for page in pages(0, u8::MAX).hull(pages(WINDOW as u16 - 1, 1)).iter() {
            let (found, expected) = (spaces.read(process, page), model.read(process, page));
            if found != expected {
                let what =
                    format!("process {process} reads {found:?} from page {page}, not {expected:?}");
                return Err(Disagreement::new(ops.len(), &"reading every page", what));
            }
        }
        spaces.exit(process);
        model.exit(process);
    }
    Ok(())
}

fn step(
    spaces: &mut impl SpacesUnderTest,
    model: &mut SpaceModel,
    op: &SpaceOp,
) -> Result<(), String> {
    let alive = model.processes();
    let who = |process: u8| alive[usize::from(process) % alive.len()];
    match *op {
        SpaceOp::Map {
            process,
            first,
            count,
            writable,
        } => {
            let (process, pages) = (who(process), pages(first, count % 64));
            if spaces.map(process, pages, writable) {
                model.map(process, pages, writable);
            }
        }
        SpaceOp::Unmap {
            process,
            first,
            count,
        } => {
            let (process, pages) = (who(process), pages(first, count));
            if spaces.unmap(process, pages) {
                model.unmap(process, pages);
            }
        }
        SpaceOp::Protect {
            process,
            first,
            count,
            writable,
        } => {
            let (process, pages) = (who(process), pages(first, count));
            if spaces.protect(process, pages, writable) {
                model.protect(process, pages, writable);
            }
        }
        SpaceOp::Discard {
            process,
            first,
            count,
        } => {
            let (process, pages) = (who(process), pages(first, count));
            if spaces.discard(process, pages) {
                model.discard(process, pages);
            }
        }
        SpaceOp::Read { process, page } => {
            let (process, page) = (who(process), Page::from_number(u64::from(page) % WINDOW));
            let (found, expected) = (spaces.read(process, page), model.read(process, page));
            if found != expected {
                return Err(format!(
                    "process {process} reads {found:?} from page {page}, not {expected:?}"
                ));
            }
        }
        SpaceOp::Write {
            process,
            page,
            byte,
        } => {
            let (process, page) = (who(process), Page::from_number(u64::from(page) % WINDOW));
            let wrote = spaces.write(process, page, byte);
            let expected = model.write(process, page, byte);
            if wrote != expected {
                return Err(format!(
                    "process {process} writes page {page}: {wrote}, not {expected}"
                ));
            }
        }
        SpaceOp::Fork { process } => {
            if alive.len() < PROCESSES {
                let parent = who(process);
                let mut next = model.clone();
                if let Some(child) = next.fork(parent)
                    && spaces.fork(parent, child)
                {
                    *model = next;
                }
            }
        }
        SpaceOp::Exit { process } => {
            if alive.len() > 1 {
                let process = who(process);
                spaces.exit(process);
                model.exit(process);
            }
        }
    }
    Ok(())
}
