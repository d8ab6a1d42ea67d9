//! Reading and writing files through their page cache, and files that become shorter or longer.
//!
//! What a program reads and writes by calls and what it sees in its mappings are the same frames.
//!
//! Source: Linux `mm/filemap.c` (`filemap_read`, `generic_perform_write`), `mm/truncate.c` (`truncate_pagecache`).

use kmem_hal::{IoTicket, PAGE_SIZE, Page, PageRange, SlotFlags};

use core::ops::ControlFlow;

use crate::env::Env;
use crate::errno::Errno;
use crate::mm::Mm;
use crate::object::FileRef;
use crate::page_cache::ObjectPage;

/// How far a read or write of a file came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a read or write may have stopped early"]
pub struct FileIo {
    /// Bytes that were copied.
    pub bytes: usize,
    /// Where it stopped for a page that is on its way: call again with the rest once that is done. `None` at the end of the bytes
    /// asked for or of the file.
    pub ticket: Option<IoTicket>,
}

impl<'m, E: Env> Mm<'m, E> {
    /// Reads bytes of a file from `offset` on, through its page cache.
    ///
    /// # Errors
    ///
    /// [`Errno::EIO`] and [`Errno::ENOMEM`], where not one byte was read before; [`Errno::EBADF`] where the file is gone.
    #[doc(alias = "filemap_read")]
    pub fn read_file(&self, file: FileRef, offset: u64, to: &mut [u8]) -> Result<FileIo, Errno> {
        let length = to.len();
        self.each_page(file, offset, length, |frame, start, done, part| {
            self.read_frame(frame, start, &mut to[done..done + part]);
        })
    }

    /// Writes bytes of a file from `offset` on, in its page cache, from where they are written back. A file does not grow by it: that is the
    /// file system's business, which says so to [`extend_file`](Self::extend_file).
    ///
    /// # Errors
    ///
    /// As [`read_file`](Self::read_file).
    #[doc(alias = "generic_perform_write")]
    pub fn write_file(&self, file: FileRef, offset: u64, from: &[u8]) -> Result<FileIo, Errno> {
        self.each_page(file, offset, from.len(), |frame, start, done, part| {
            self.write_frame(frame, start, &from[done..done + part]);
            // After the bytes: a write-back meanwhile may have missed some.
            self.slot(frame).set_flags(SlotFlags::DIRTY);
        })
    }

    /// Writes every dirty page of a file to its provider, and waits.
    ///
    /// Context: no lock of a space held.
    ///
    /// # Errors
    ///
    /// [`Errno::EIO`]; what was written before is written. [`Errno::EBADF`] where the file is gone.
    #[doc(alias = "fsync")]
    pub fn sync_file(&self, file: FileRef) -> Result<(), Errno> {
        let _held = self.hold(file)?;
        match PageRange::new(Page::ZERO, Page::MAX) {
            Some(all) => self.write_back(file, all),
            None => Ok(()),
        }
    }

    fn each_page(
        &self,
        file: FileRef,
        offset: u64,
        length: usize,
        mut access: impl FnMut(kmem_hal::Frame, usize, usize, usize),
    ) -> Result<FileIo, Errno> {
        let _held = self.hold(file)?;
        let size = self.object(file).size();
        let room = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = length.min(room);
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let stopped = |ticket| FileIo {
                bytes: done,
                ticket,
            };
            let frame = match self.object_page(file, at / PAGE_SIZE) {
                Ok(ObjectPage::Ready(frame)) => frame,
                Ok(ObjectPage::NeedIo(ticket)) => return Ok(stopped(Some(ticket))),
                Ok(ObjectPage::Beyond) => return Ok(stopped(None)),
                Err(error) if done == 0 => return Err(error),
                Err(_) => return Ok(stopped(None)),
            };
            let start = (at % PAGE_SIZE) as usize;
            let part = (length - done).min(PAGE_SIZE as usize - start);
            access(frame, start, done, part);
            self.put_reference(frame);
            done += part;
        }
        Ok(FileIo {
            bytes: done,
            ticket: None,
        })
    }

    /// Takes away what lies beyond a file's end, which has moved down: pages of the cache, and mapped pages in every space, private copies
    /// too. Accesses there are bus errors from now on. Of the page that the end is in, the bytes beyond it become zero.
    ///
    /// The provider says the new size already.
    ///
    /// Context: no lock of a space held, nor one that the provider's [`size`](kmem_hal::PageProvider::size) takes: a page's lock is waited for,
    /// whose holder may ask for the size. May wait for faults and transfers that are under way.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where not even the frames set aside are left to copy a shared table: call again. [`Errno::EBADF`] where the file
    /// is gone.
    #[doc(alias = "truncate_pagecache")]
    #[doc(alias = "unmap_mapping_range")]
    pub fn truncate_file(&self, file: FileRef) -> Result<(), Errno> {
        let _held = self.hold(file)?;
        let size = self.object(file).size();
        let first_gone = size.div_ceil(PAGE_SIZE);
        self.unmap_from(file, first_gone)?;
        self.forget_from(file, first_gone)?;
        let inside = (size % PAGE_SIZE) as usize;
        if inside > 0 {
            self.zero_tail(file, size / PAGE_SIZE, inside);
        }
        Ok(())
    }

    /// Takes note that a file's end, which was at `from` bytes, has moved up. Of the page that the old end is in, the bytes beyond it become
    /// zero: whatever programs stored there through mappings was no part of the file.
    ///
    /// The provider says the new size already. Who makes files longer calls this before anybody is told of it: what is written beyond the old
    /// end before this returns may become zero as well.
    ///
    /// Context: as [`truncate_file`](Self::truncate_file).
    ///
    /// # Errors
    ///
    /// [`Errno::EBADF`] where the file is gone.
    #[doc(alias = "pagecache_isize_extended")]
    pub fn extend_file(&self, file: FileRef, from: u64) -> Result<(), Errno> {
        let _held = self.hold(file)?;
        let inside = (from % PAGE_SIZE) as usize;
        if inside > 0 {
            self.zero_tail(file, from / PAGE_SIZE, inside);
        }
        Ok(())
    }

    /// Unmaps the object's pages from an index on in every space.
    fn unmap_from(&self, file: FileRef, first_gone: u64) -> Result<(), Errno> {
        let number = self.object_number(file);
        let spaces = self.registry().lock();
        let mut outcome = Ok(());
        let _ = self.for_each_space(
            &spaces,
            |_| true,
            |space| {
                let mut state = space.lock();
                if !state.vmas.may_map(number) {
                    return ControlFlow::Continue(());
                }
                // From here on no fault is at work in the space that saw the old size.
                state.vmas.lock_all();
                for vma in state.vmas.iter() {
                    if vma
                        .file
                        .is_none_or(|file| self.object_number(file) != number)
                    {
                        continue;
                    }
                    let kept = first_gone.saturating_sub(vma.offset);
                    let first = Page::new(vma.range.first().number().saturating_add(kept));
                    let gone = first.and_then(|first| PageRange::new(first, vma.range.last()));
                    let Some(gone) = gone else { continue };
                    // Guard regions are the mapping's, not the file's (`zap_drop_markers`).
                    if let Err(error) = space.empty(&state, gone) {
                        outcome = Err(error);
                        return ControlFlow::Break(());
                    }
                }
                ControlFlow::Continue(())
            },
        );
        outcome
    }
}
