//! Faults on pages of files and shared memory that are not mapped yet: the page itself, and the pages around it.
//!
//! ```text
//!   read ──> the page, read-only, and those around it that are in memory already (fault-around): one fault for 16 pages
//!   write, shared ──> read-only, DIRTY, then writable  write, private ──> a copy
//!   not in memory ──> asked for, with the pages after it (read-ahead), and NeedIo
//! ```
//!
//! Source: Linux `mm/memory.c` (`do_read_fault`, `do_cow_fault`, `do_shared_fault`), `mm/filemap.c` (`do_sync_mmap_readahead`).

use kmem_hal::{Access, Frame, Page, PageRange, VirtAddr};
use kmem_paging::Entry;

use crate::env::Env;
use crate::errno::Errno;
use crate::fault::{Outcome, Signal, Stop};
use crate::flags::VmFlags;
use crate::mutants::mutant;
use crate::object::FileRef;
use crate::page_cache::ObjectPage;
use crate::space::AddressSpace;
use crate::tables::attributes;
use crate::vma::Vma;

/// Pages that a read fault maps at most (`fault_around_bytes` of 64 KiB).
const AROUND: u64 = 16;

/// How a page of an object was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapped {
    AsWanted,
    /// Read-only; the write that faulted makes it writable.
    ToBeWritten,
}

/// Pages that are read after one that was missing, where nothing was said, and where the reader said "sequential".
const AHEAD: u64 = 8;
const AHEAD_SEQUENTIAL: u64 = 32;

impl<E: Env> AddressSpace<'_, E> {
    /// Maps a page of the VMA's object, or a copy of it.
    pub(crate) fn fault_object(
        &self,
        vma: &Vma,
        file: FileRef,
        page: Page,
        address: VirtAddr,
        write: bool,
    ) -> Result<(), Stop> {
        if !vma.is_memory()
            && let Some(device) = self.mm().device(file)
        {
            return self.fault_device(vma, device, page, address);
        }
        let source = self.object_frame(vma, file, page, address)?;
        let outcome = self.map_object_page(vma, file, page, source, write);
        self.mm().put_reference(source);
        match outcome? {
            // Under the table's lock, and `DIRTY` before the right to write: a write-back that clears the flag after that finds the entry.
            Mapped::ToBeWritten => return self.present(vma, page, Access::Write),
            Mapped::AsWanted if !write => self.fault_around(vma, file, page),
            Mapped::AsWanted => {}
        }
        Ok(())
    }

    fn object_frame(
        &self,
        vma: &Vma,
        file: FileRef,
        page: Page,
        address: VirtAddr,
    ) -> Result<Frame, Stop> {
        let mm = self.mm();
        let index = vma.object_page(page);
        let missing = mm.cached_page(file, index).is_none();
        let found = mm.object_page(file, index)?;
        if missing && found != ObjectPage::Beyond {
            let pages = match vma.flags {
                flags if flags.contains(VmFlags::RAND_READ) => 0,
                flags if flags.contains(VmFlags::SEQ_READ) => AHEAD_SEQUENTIAL,
                _ => AHEAD,
            };
            mm.read_ahead(file, index + 1, pages);
        }
        match found {
            ObjectPage::Ready(frame) => Ok(frame),
            ObjectPage::NeedIo(ticket) => Err(Stop::Outcome(Outcome::NeedIo(ticket))),
            ObjectPage::Beyond => Err(Stop::Outcome(Outcome::Signal {
                signal: Signal::BusError,
                address,
            })),
        }
    }

    /// The caller holds a reference of `source`. A page of a file that is to be written through to is mapped read-only first.
    fn map_object_page(
        &self,
        vma: &Vma,
        file: FileRef,
        page: Page,
        source: Frame,
        write: bool,
    ) -> Result<Mapped, Errno> {
        let mm = self.mm();
        let mut entry = attributes(vma.flags).accessed();
        if !vma.is_shared() {
            let copy = write && !mutant!("private-write-hits-the-file");
            let mapping = if copy {
                entry.dirty = true;
                mm.new_anonymous(self.family(), vma.object_page(page), Some(source))?
            } else {
                if !write {
                    entry = entry.write_protected();
                }
                mm.map_page(source)?
            };
            self.install(page, mapping, entry)?;
            return Ok(Mapped::AsWanted);
        }
        if mm.info(file).is_shared_memory {
            // Whoever takes it out of memory writes it in any case.
            entry.dirty = write;
            self.install(page, mm.map_page(source)?, entry)?;
            return Ok(Mapped::AsWanted);
        }
        // The first write must be seen, so that it reaches the file.
        self.install(page, mm.map_page(source)?, entry.write_protected())?;
        Ok(match write {
            true => Mapped::ToBeWritten,
            false => Mapped::AsWanted,
        })
    }

    /// Maps pages around one that was read, as far as they are in memory, and nothing is in their place yet.
    #[doc(alias = "do_fault_around")]
    fn fault_around(&self, vma: &Vma, file: FileRef, page: Page) {
        let mm = self.mm();
        if mm.info(file).is_shared_memory {
            return;
        }
        let first = page.number() & !(AROUND - 1);
        let (Some(first), Some(last)) = (Page::new(first), Page::new(first + AROUND - 1)) else {
            return;
        };
        let window = PageRange::new(first, last);
        let Some(window) = window.and_then(|window| window.intersection(vma.range)) else {
            return;
        };
        let entry = attributes(vma.flags).write_protected();
        for near in window.iter() {
            if near == page || self.tables().query(near) != Entry::Empty {
                continue;
            }
            let Some(frame) = mm.get_cached(file, vma.object_page(near)) else {
                continue;
            };
            if let Ok(mapping) = mm.map_page(frame) {
                // Where another fault was faster, or a table would have to be copied, the page comes by a fault of its own.
                let _ = self.install(near, mapping, entry);
            }
            mm.put_reference(frame);
        }
    }
}
