//! Pinned pages: memory of a program that a device or the kernel uses by its frame, for as long as it likes.
//!
//! ```text
//!   pin ── the VMA held shared, the table its space's own, under its lock:
//!      │    exclusive?  yes: references + 1024, the table's pins + 1
//!      │                no, to be read: the page is copied first (un-shared), and the copy is exclusive
//!      │                no, to be written: a write fault first, which makes it so
//!      └─> Pin { frame } ── dropped: references - 1024, the table's pins - 1
//! ```
//!
//! What the program writes the pin sees, and what is written through the pin the program sees, whatever happens to other spaces: the frame
//! stays the page's until the program itself gives the page up.
//!
//! Invariants
//! - `P1`: an anonymous page is pinned only while it is exclusive, and stays so: a table with pins is never shared, and a
//!   fork gives the child a copy of a pinned page (Linux had neither: CVE-2020-29374, and direct I/O into the wrong process after fork).
//! - `P2`: a table counts at least the pins of the anonymous pages that it maps; more where a pinned page was unmapped, or moved away.
//! - `P3`: a pin is [`PIN`] references, so that a page says whether it may be pinned.
//!
//! No fork is at work while a page is being pinned: a pin holds the VMA shared, and fork write-locks every VMA of the space.
//!
//! Source: Linux `mm/gup.c`, `Documentation/core-api/pin_user_pages.rst`.

use core::fmt;

use kmem_hal::sync::Ordering;
use kmem_hal::{
    Access, FaultCode, Frame, FrameTag, IoTicket, Page, PageFault, PageRange, SlotFlags, VirtAddr,
};
use kmem_paging::Entry;

use crate::env::Env;
use crate::errno::Errno;
use crate::fault::{Outcome, allows, needs_anon};
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::space::AddressSpace;
use crate::vma::Vma;

/// References that a pin counts.
#[doc(alias = "GUP_PIN_COUNTING_BIAS")]
pub(crate) const PIN: u32 = 1024;

/// A pinned page. Dropping it unpins the page.
///
/// # Examples
///
/// See `tests/regressions/pins.rs` of the crate.
#[doc(alias = "pin_user_pages")]
#[doc(alias = "get_user_pages")]
#[must_use = "a page is pinned only while its pin lives"]
pub struct Pin<'s, 'm, E: Env> {
    space: &'s AddressSpace<'m, E>,
    page: Page,
    frame: Frame,
    write: bool,
}

/// Why a page is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PinError {
    /// The program itself could not access the address so, or it is device memory.
    Fault(VirtAddr),
    /// A page is on its way: pin again when the I/O is done.
    NeedIo(IoTicket),
    /// No memory for the page or for a table, or the page has as many pins as can be counted.
    OutOfMemory,
}

impl fmt::Display for PinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(address) => write!(f, "the program cannot access {address:?} so"),
            Self::NeedIo(_) => f.write_str("the page is on its way"),
            Self::OutOfMemory => f.write_str("out of memory"),
        }
    }
}

impl core::error::Error for PinError {}

impl From<Errno> for PinError {
    fn from(_: Errno) -> Self {
        Self::OutOfMemory
    }
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Pins the page at an address, for [`Access::Read`] or [`Access::Write`], bringing it in where it must be.
    ///
    /// Context: task context; may allocate. Not while a device waits for this very page.
    ///
    /// # Errors
    ///
    /// [`PinError`]; the page may be in memory, and a private one the program's own, where it was not before.
    #[doc(alias = "pin_user_pages")]
    #[doc(alias = "get_user_pages")]
    pub fn pin(&self, address: VirtAddr, access: Access) -> Result<Pin<'_, 'm, E>, PinError> {
        let page = Page::containing(address);
        let mut code = FaultCode::USER;
        code.set(FaultCode::WRITE, access == Access::Write);
        loop {
            if let Some(frame) = self.pin_present(page, address, access)? {
                return Ok(Pin {
                    space: self,
                    page,
                    frame,
                    write: access == Access::Write,
                });
            }
            code.set(FaultCode::PRESENT, self.frame_at(page).is_some());
            match self.fault(&PageFault { address, code }) {
                Outcome::Handled => {}
                Outcome::NeedIo(ticket) => return Err(PinError::NeedIo(ticket)),
                Outcome::OutOfMemory => return Err(PinError::OutOfMemory),
                _ => return Err(PinError::Fault(address)),
            }
        }
    }

    /// Pins what is mapped, if it can be pinned as it is or after a copy; `None` where the program's own access would fault.
    fn pin_present(
        &self,
        page: Page,
        address: VirtAddr,
        access: Access,
    ) -> Result<Option<Frame>, PinError> {
        if let Some(vma) = self.core().vmas.lock_vma(page)
            && (vma.shows_object() || vma.anon.is_some())
        {
            return self.pin_in(&vma, page, address, access);
        }
        let mut state = self.lock();
        let Some(vma) = state.vmas.get(page) else {
            return Ok(None);
        };
        let may_copy = vma.is_memory() && !vma.shows_object() && allows(vma.flags, access);
        if may_copy && needs_anon(&vma, Access::Write) {
            // The copy that a private page may become is anonymous.
            self.prepare_anon(&mut state, page);
        }
        self.pin_in(&vma, page, address, access)
    }

    /// The VMA stays as it is.
    fn pin_in(
        &self,
        vma: &Vma,
        page: Page,
        address: VirtAddr,
        access: Access,
    ) -> Result<Option<Frame>, PinError> {
        let is_memory = vma.is_memory() || mutant!("device-memory-is-pinned");
        if !allows(vma.flags, access) || !is_memory {
            return Err(PinError::Fault(address));
        }
        let range = PageRange::single(page);
        loop {
            let cursor = self.tables().cursor(range);
            let mut cursor = cursor.map_err(|_| PinError::Fault(address))?;
            let Entry::Leaf(leaf) = self.own(&mut cursor, page)? else {
                return Ok(None);
            };
            let written = access == Access::Write && !mutant!("write-intent-is-lost");
            if written && !leaf.is_writable() || !leaf.attributes.rights.grants_access() {
                return Ok(None);
            }
            // Linux: `gup_must_unshare` asks `is_cow_mapping`.
            if vma.shows_object() && !mutant!("file-page-is-copied-for-a-pin") {
                self.mm().add_pin(leaf.frame)?;
            } else if self.mm().is_exclusive(leaf.frame, || cursor.pins(page)) || pinned_anyway() {
                self.mm().add_pin(leaf.frame)?;
                if !mutant!("pins-not-counted") && cursor.add_pins(page, 1).is_err() {
                    self.mm().sub_pin(leaf.frame);
                    return Err(PinError::OutOfMemory);
                }
                self.core().sharing.pins.fetch_add(1, Ordering::Relaxed);
            } else {
                // To be read, and others have it too: what they write must not be seen, and what this program writes must.
                self.copy_page(cursor, vma, page, leaf.frame)?;
                continue;
            }
            return Ok(Some(leaf.frame));
        }
    }

    /// How many anonymous pages of the space are pinned, each as often as it is.
    #[must_use]
    pub fn pins(&self) -> u32 {
        self.core().sharing.pins.load(Ordering::Relaxed)
    }

    /// Lets the tables of pages that were moved count their pins (`P2`).
    ///
    /// Where they were the pins stay counted: a table that the move emptied is gone with its count, and one that came in its place counts the
    /// pins of others, who may have begun meanwhile.
    pub(crate) fn move_pins(&self, to: PageRange) {
        if self.pins() == 0 || mutant!("moved-pins-not-counted") {
            return;
        }
        let Ok(mut cursor) = self.tables().cursor(to) else {
            return;
        };
        for page in to.iter() {
            let pins = match cursor.query(page) {
                Entry::Leaf(leaf) => self.mm().pins_of(leaf.frame),
                _ => 0,
            };
            if pins > 0 {
                let _ = cursor.add_pins(page, pins);
            }
        }
    }
}

/// The faults by which a page is pinned as it is, whoever else has it.
fn pinned_anyway() -> bool {
    let faults = [
        mutant!("shared-page-is-pinned"),
        mutant!("mappings-alone-decide"),
        mutant!("write-intent-is-lost"),
    ];
    faults.contains(&true)
}

impl<'m, E: Env> Mm<'m, E> {
    fn add_pin(&self, frame: Frame) -> Result<(), PinError> {
        let counted = self.slot(frame).try_add_count(PIN);
        counted.map(|_| ()).map_err(|_| PinError::OutOfMemory)
    }

    fn sub_pin(&self, frame: Frame) {
        self.put_references(frame, PIN);
    }

    /// How often an anonymous page is pinned: more than it is only where it has a thousand other references.
    #[doc(alias = "folio_maybe_dma_pinned")]
    pub(crate) fn pins_of(&self, frame: Frame) -> u32 {
        match self.counted(frame) {
            Some(page) if page.slot().tag() == FrameTag::Anon => page.references() / PIN,
            _ => 0,
        }
    }
}

impl<E: Env> Pin<'_, '_, E> {
    /// The frame, which stays what it is while the pin lives.
    #[must_use]
    pub const fn frame(&self) -> Frame {
        self.frame
    }

    /// Reads bytes of the page from `offset` on, as far as they lie in it.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        self.space.mm().read_frame(self.frame, offset, to);
    }

    /// Writes bytes of the page from `offset` on, as far as they lie in it; `false`, and nothing is written, where it was pinned to be
    /// read.
    #[must_use]
    pub fn write(&self, offset: usize, from: &[u8]) -> bool {
        if self.write {
            self.space.mm().write_frame(self.frame, offset, from);
        }
        self.write
    }
}

impl<E: Env> Drop for Pin<'_, '_, E> {
    #[doc(alias = "unpin_user_page")]
    fn drop(&mut self) {
        let mm = self.space.mm();
        let slot = mm.slot(self.frame);
        if self.write && !mutant!("pinned-write-is-not-noted") {
            // A device may have written to it, past every dirty bit.
            slot.set_flags(SlotFlags::DIRTY);
        }
        let anonymous = slot.tag() == FrameTag::Anon;
        // The page's count first: a fork or a move in between then finds too many pins counted in the table, not too few.
        mm.sub_pin(self.frame);
        if !anonymous {
            return;
        }
        self.space
            .core()
            .sharing
            .pins
            .fetch_sub(1, Ordering::Relaxed);
        if let Ok(mut cursor) = self.space.tables().cursor(PageRange::single(self.page))
            && let Entry::Leaf(leaf) = cursor.query(self.page)
            && leaf.frame == self.frame
        {
            cursor.sub_pins(self.page, 1);
        }
    }
}

impl<E: Env> fmt::Debug for Pin<'_, '_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin")
            .field("page", &self.page)
            .field("frame", &self.frame)
            .finish_non_exhaustive()
    }
}
