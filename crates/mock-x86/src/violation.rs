//! What a program did that no processor forgives, told with its history.
//!
//! ```text
//! violation at step 91: a freed frame was used through a stale translation
//!   CPU 1 wrote to 0x400010 through a TLB entry (rw-u, frame 0x1234, PCID 0) filled at step 40
//!   tables now: PML4E 0x2007 -> PDPTE 0x3007 -> PDE 0x4007 -> PTE 0x0: not present
//!   frame 0x1234: allocated at step 30 on CPU 0 by ..; cached in a TLB .. at step 40 on CPU 1; freed at step 88 on CPU 0 by ..
//!   last flush on CPU 1 that covers it: none remembered
//!   missing: invlpg 0x400000 on CPU 1 between the change of the entry and step 88
//! ```

use std::fmt;

use crate::frames::FrameEvent;

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ViolationKind {
    /// A cached translation led to a frame that was freed after it was cached.
    FreedFrame,
    /// A cached entry rests on a page table that was freed after it was cached.
    FreedTable,
    /// The tables themselves lead to a free frame: freed before it was unmapped.
    MappedFreeFrame,
    /// A walk read a table in a free frame.
    WalkedFreeTable,
    /// A stale entry was used after the change had been declared flushed.
    Unflushed,
    /// An entry of another address space was used: a PCID was reused without a flush.
    ForeignSpace,
    /// A table or page lies where no memory is.
    NoMemory,
    /// A free frame was freed, or one in use was given out.
    Ownership,
    /// A device moved data to or from a free frame.
    DeviceFreedFrame,
    /// The kernel reached for a free frame through its map of physical memory.
    KernelFreedFrame,
    /// No CPU can go on: each waits for an interrupt or a lock that never comes.
    Deadlock,
}

impl ViolationKind {
    fn headline(self) -> &'static str {
        match self {
            Self::FreedFrame => "a freed frame was used through a stale translation",
            Self::FreedTable => "a stale entry that rests on a freed page table was used",
            Self::MappedFreeFrame => "a frame was freed while the tables still map it",
            Self::WalkedFreeTable => "a page walk went through a table in a freed frame",
            Self::Unflushed => "a stale translation was used after its change was declared flushed",
            Self::ForeignSpace => {
                "a translation of another address space was used (PCID reused without a flush)"
            }
            Self::NoMemory => "a table or page lies where no memory is",
            Self::Ownership => "a frame changed hands against the rules",
            Self::DeviceFreedFrame => "a device transfer reached a free frame",
            Self::KernelFreedFrame => {
                "the kernel reached for a free frame through its map of physical memory"
            }
            Self::Deadlock => "no CPU can go on",
        }
    }
}

/// A violation and everything known about it.
#[derive(Debug, Clone)]
pub struct Violation {
    /// What went wrong.
    pub kind: ViolationKind,
    /// The machine's step.
    pub step: u64,
    /// The CPU that did the last act.
    pub cpu: usize,
    /// The linear address accessed, if it was an access.
    pub linear: Option<u64>,
    /// The frame concerned, if there is one.
    pub frame: Option<u64>,
    /// The frame's remembered events, oldest first.
    pub history: Vec<FrameEvent>,
    /// What happened and what is missing, line by line.
    pub lines: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "violation at step {}: {}",
            self.step,
            self.kind.headline()
        )?;
        for line in &self.lines {
            writeln!(f, "  {line}")?;
        }
        if let Some(frame) = self.frame {
            write!(f, "  frame {frame:#x}:")?;
            if self.history.is_empty() {
                write!(f, " nothing is remembered of it")?;
            }
            for (number, event) in self.history.iter().enumerate() {
                write!(f, "{} {event}", if number == 0 { "" } else { ";" })?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violation {}

/// What the machine does with a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnViolation {
    /// Panics with the story, in the code that did it.
    #[default]
    Panic,
    /// Keeps it for [`Machine::take_violations`](crate::Machine::take_violations).
    Record,
}
