//! `/proc/PID/pagemap`: where each page is, a word each.
//!
//! ```text
//!   63 62 61 60..59 58    57 56        55         54 ............................ 0
//!   │  │  │         │     │  │         │          └ frame number, if present; else swap type (4..0) and offset
//!   │  │  │         │     │  │         └ soft-dirty: not tracked, 0
//!   │  │  │         │     │  └ nobody else maps it
//!   │  │  │         │     └ write-protected by userfaultfd: never
//!   │  │  │         └ guard region
//!   │  │  └ a file's page or shared memory
//!   │  └ in swap
//!   └ present
//! ```
//!
//! Source: Linux `Documentation/admin-guide/mm/pagemap.rst`, `fs/proc/task_mmu.c` (`pagemap_read`).

use core::fmt;

use kmem_hal::{Frame, FrameTag, Page};
use kmem_paging::{Entry, Leaf};

use crate::absent::Absent;
use crate::env::Env;
use crate::space::AddressSpace;

/// A word of `pagemap`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagemapEntry(u64);

impl PagemapEntry {
    const FRAME: u64 = (1 << 55) - 1;
    const EXCLUSIVE: u64 = 1 << 56;
    const GUARD: u64 = 1 << 58;
    const FILE: u64 = 1 << 61;
    const SWAP: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;

    /// The word, as a program reads it.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        self.0
    }

    /// The same without the frame's number: what a process without `CAP_SYS_ADMIN` may see.
    #[must_use]
    pub const fn without_frame(self) -> Self {
        if self.is_present() {
            Self(self.0 & !Self::FRAME)
        } else {
            self
        }
    }

    /// Whether the page is in memory and mapped.
    #[must_use]
    pub const fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Whether the page is in swap.
    #[must_use]
    pub const fn is_swapped(self) -> bool {
        self.0 & Self::SWAP != 0
    }

    /// Whether it is a file's page or shared memory.
    #[must_use]
    pub const fn is_file(self) -> bool {
        self.0 & Self::FILE != 0
    }

    /// Whether nobody else maps it.
    #[must_use]
    pub const fn is_exclusive(self) -> bool {
        self.0 & Self::EXCLUSIVE != 0
    }

    /// Whether it is in a guard region.
    #[must_use]
    pub const fn is_guard(self) -> bool {
        self.0 & Self::GUARD != 0
    }

    /// The frame, if the page is present.
    #[must_use]
    pub const fn frame(self) -> Option<Frame> {
        if self.is_present() {
            Some(Frame::from_number(self.0 & Self::FRAME))
        } else {
            None
        }
    }
}

impl fmt::Display for PagemapEntry {
    /// `present frame 0x1234 file exclusive`, `swapped`, `guard`, or `absent`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.frame() {
            Some(frame) => write!(f, "present frame {:#x}", frame.number())?,
            None if self.is_guard() => f.write_str("guard")?,
            None if self.is_swapped() => write!(f, "swapped {:#x}", self.0 & Self::FRAME)?,
            None => f.write_str("absent")?,
        }
        for (is, word) in [
            (self.is_file(), " file"),
            (self.is_exclusive(), " exclusive"),
        ] {
            if is {
                f.write_str(word)?;
            }
        }
        Ok(())
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// Where a page is.
    #[must_use]
    pub fn pagemap_entry(&self, page: Page) -> PagemapEntry {
        match self.tables().query(page) {
            Entry::Empty => PagemapEntry::default(),
            Entry::Leaf(leaf) => self.present_entry(page, &leaf),
            Entry::Payload(payload) => self.payload_entry(payload),
        }
    }

    /// Fills `entries` with those of `first` and the pages after it; gives how many there are: fewer at the end of the space.
    #[doc(alias = "pagemap_read")]
    pub fn pagemap(&self, first: Page, entries: &mut [PagemapEntry]) -> usize {
        let last = self.all_pages().last();
        let mut next = Some(first);
        let mut count = 0;
        for entry in entries {
            let Some(page) = next.filter(|page| *page <= last) else {
                break;
            };
            *entry = self.pagemap_entry(page);
            next = page.checked_add(1);
            count += 1;
        }
        count
    }

    fn present_entry(&self, page: Page, leaf: &Leaf) -> PagemapEntry {
        let frame = leaf.frame_of(page).unwrap_or(leaf.frame);
        let mut word = PagemapEntry::PRESENT | frame.number() & PagemapEntry::FRAME;
        let counted = self.mm().counted(frame);
        if let Some(mapped) = counted.filter(|_| frame != self.mm().zero_page()) {
            if mapped.slot().tag() != FrameTag::Anon {
                word |= PagemapEntry::FILE;
            }
            if self.viewers(leaf) == 1 {
                word |= PagemapEntry::EXCLUSIVE;
            }
        }
        PagemapEntry(word)
    }

    fn payload_entry(&self, payload: kmem_paging::Payload) -> PagemapEntry {
        match Absent::of(payload) {
            Some(Absent::Swapped(entry)) => {
                let place = entry.offset << 5 | u64::from(entry.area);
                PagemapEntry(PagemapEntry::SWAP | place & PagemapEntry::FRAME)
            }
            // As Linux says it: a note is an entry of swap too.
            Some(Absent::Guard) => PagemapEntry(PagemapEntry::SWAP | PagemapEntry::GUARD),
            Some(Absent::Moving(_)) | None => PagemapEntry(PagemapEntry::SWAP),
        }
    }
}
