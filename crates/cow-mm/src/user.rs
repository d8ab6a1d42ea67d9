//! The kernel's own accesses to a space's memory, whether or not it is loaded.
//!
//! Each page is brought in by the fault path with the rights that the program has, and then accessed through the
//! kernel's map of physical memory: what ptrace, exec and copies to another space need. A kernel that runs in the
//! space itself copies through the MMU with [`UserAccess`](kmem_hal::UserAccess) instead.

use kmem_hal::{Frame, PAGE_SIZE, Page, SlotFlags, UserFault, VirtAddr};

use crate::env::Env;
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::space::AddressSpace;
use crate::vma::Vma;

impl<E: Env> AddressSpace<'_, E> {
    /// Reads the program's memory.
    ///
    /// # Errors
    ///
    /// [`UserFault`] at the first byte that the program could not read itself.
    #[doc(alias = "access_process_vm")]
    pub fn read_memory(&self, from: VirtAddr, to: &mut [u8]) -> Result<(), UserFault> {
        let length = to.len();
        self.each_page(from, length, false, |mm, frame, offset, done, length| {
            mm.read_frame(frame, offset, &mut to[done..done + length]);
        })
    }

    /// Writes the program's memory, copying on write where the program's own write would.
    ///
    /// # Errors
    ///
    /// [`UserFault`] at the first byte that the program could not write itself.
    pub fn write_memory(&self, to: VirtAddr, from: &[u8]) -> Result<(), UserFault> {
        self.each_page(to, from.len(), true, |mm, frame, offset, done, length| {
            mm.write_frame(frame, offset, &from[done..done + length]);
        })
    }

    /// Fills the program's memory with zeros.
    ///
    /// # Errors
    ///
    /// As [`write_memory`](Self::write_memory).
    #[doc(alias = "clear_user")]
    pub fn zero_memory(&self, to: VirtAddr, length: usize) -> Result<(), UserFault> {
        self.each_page(to, length, true, |mm, frame, offset, _, length| {
            mm.zero_frame(frame, offset, length)
        })
    }

    /// Looks at the program's memory without touching it: nothing is faulted in and no bit is set.
    ///
    /// Inside one page. `None` where nothing is mapped, where the page is a file's that has not been read yet or in swap, or where the
    /// bytes cross the page's end. What a debugger and `/proc/PID/mem` of a stopped process need.
    #[must_use]
    pub fn peek(&self, from: VirtAddr, to: &mut [u8]) -> Option<()> {
        let page = Page::containing(from);
        let offset = from.page_offset() as usize;
        if to.len() > PAGE_SIZE as usize - offset {
            return None;
        }
        let state = self.lock();
        let frame = self.hold_shown(&state.vmas.get(page)?, page)?;
        self.mm().read_frame(frame, offset, to);
        self.mm().put_reference(frame);
        Some(())
    }

    /// The frame whose bytes a program would read at a page of a VMA, with a reference, if it is in memory. The space's lock is held.
    fn hold_shown(&self, vma: &Vma, page: Page) -> Option<Frame> {
        let mm = self.mm();
        if let Some(payload) = self.payload_at(page) {
            return self.cached_swap(page, payload);
        }
        if let Some((_, frame)) = self.hold_leaf(page).ok()? {
            return Some(frame);
        }
        if let Some(file) = vma.file {
            let index = vma.object_page(page);
            if let Some(frame) = mm.get_cached(file, index) {
                return Some(frame);
            }
            if mm.is_swapped_out(file, index) || !mm.info(file).is_shared_memory {
                return None;
            }
        }
        mm.user(mm.zero_page()).add_reference().ok()?;
        Some(mm.zero_page())
    }

    fn each_page(
        &self,
        start: VirtAddr,
        length: usize,
        write: bool,
        mut access: impl FnMut(&Mm<'_, E>, Frame, usize, usize, usize),
    ) -> Result<(), UserFault> {
        let mut done = 0;
        while done < length {
            let fault = UserFault {
                address: start,
                copied: done,
            };
            let address = start.checked_add(done as u64).ok_or(fault)?;
            let fault = UserFault { address, ..fault };
            self.bring_in(address, write).map_err(|_| fault)?;
            // The lock keeps the page mapped while its bytes are touched, and the reference its frame, whatever others do in a table that is
            // shared. Between the fault and the lock a fork may have shared the page again, or an unmapping taken it: then start over, with
            // the intent to write unchanged (losing it here was CVE-2016-5195).
            let _state = self.lock();
            let mm = self.mm();
            // Not a device's memory: that is beyond the kernel's map, and a read may have effects.
            let held = self.hold_leaf(Page::containing(address));
            let Some((leaf, frame)) = held.map_err(|_| fault)? else {
                continue;
            };
            if !write || leaf.is_writable() {
                let offset = address.page_offset() as usize;
                let part = (length - done).min(PAGE_SIZE as usize - offset);
                access(mm, frame, offset, done, part);
                done += part;
                if write && !mutant!("kernel-write-is-not-noted") {
                    // No processor sets the entry's bit for this write (Linux: `follow_page_pte` with FOLL_TOUCH). After the bytes: a
                    // write-back meanwhile may have missed some. Before the reference goes: until then the page is not taken for clean.
                    mm.user(frame).slot().set_flags(SlotFlags::DIRTY);
                }
            }
            mm.put_reference(frame);
        }
        Ok(())
    }
}
