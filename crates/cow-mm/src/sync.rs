//! msync and mincore: what of a range is in the file, and what is in memory.
//!
//! Source: msync(2), mincore(2); Linux `mm/msync.c`, `mm/mincore.c`.

use bitflags::bitflags;
use kmem_hal::{PAGE_SIZE, Page, PageRange};

use kmem_paging::Entry;

use crate::absent::Absent;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::object::FileRef;
use crate::space::AddressSpace;
use crate::vma::Vma;

bitflags! {
    /// How a range is written back: `MS_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct SyncFlags: u32 {
        /// Some time; in kmem, as in Linux, this starts nothing: dirty pages are written when it is their turn.
        const ASYNC = 1;
        /// Other mappings see the file's bytes: they always do, but locked pages may not be taken away for it.
        const INVALIDATE = 2;
        /// Now.
        const SYNC = 4;
    }
}

impl<E: Env> AddressSpace<'_, E> {
    /// Writes the dirty pages of shared file mappings in a range to their files (with `SYNC`).
    ///
    /// When it answers `Ok`, the provider holds the bytes.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for an unaligned address and for flags that contradict each other; [`Errno::ENOMEM`] where there was a
    /// hole (the rest is written) or the length wraps; [`Errno::EBUSY`] with `INVALIDATE` at a locked mapping; [`Errno::EIO`]
    /// where the provider failed.
    #[doc(alias = "sys_msync")]
    pub fn msync_with(&self, address: u64, length: u64, flags: SyncFlags) -> Result<(), Errno> {
        let both = SyncFlags::ASYNC | SyncFlags::SYNC;
        if !SyncFlags::all().contains(flags)
            || !address.is_multiple_of(PAGE_SIZE)
            || flags.contains(both)
        {
            return Err(Errno::EINVAL);
        }
        // A length that wraps when it is rounded up is none, as in Linux.
        let length = length.wrapping_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1);
        address.checked_add(length).ok_or(Errno::ENOMEM)?;
        if length == 0 {
            return Ok(());
        }
        let range = self.user_range(address, length / PAGE_SIZE);
        let range = range.ok_or(Errno::ENOMEM)?;
        // No lock is held while pages are written, so mappings may come and go between the parts.
        let mut at = range.first();
        let mut hole = false;
        loop {
            let Some((vma, part, file)) = self.next_to_sync(at, range, flags)? else {
                return Err(Errno::ENOMEM);
            };
            hole |= vma.range.first() > at;
            if let Some(file) = file {
                let first = Page::new(vma.object_page(part.first()));
                let indices = first.and_then(|first| PageRange::with_count(first, part.count()));
                let outcome = match indices {
                    Some(indices) => self.mm().write_back(file, indices),
                    None => Err(Errno::EINVAL),
                };
                self.mm().put_object(file);
                outcome?;
            }
            match part.last().checked_add(1) {
                Some(next) if next <= range.last() => at = next,
                _ => return if hole { Err(Errno::ENOMEM) } else { Ok(()) },
            }
        }
    }

    /// The next mapping's part of a range, and the file to write back for it, with a reference.
    fn next_to_sync(
        &self,
        at: Page,
        range: PageRange,
        flags: SyncFlags,
    ) -> Result<Option<(Vma, PageRange, Option<FileRef>)>, Errno> {
        let state = self.read();
        let Some(vma) = state.vmas.at_or_after(at) else {
            return Ok(None);
        };
        let first = at.max(vma.range.first());
        let Some(part) = PageRange::new(first, vma.range.last().min(range.last())) else {
            return Ok(None);
        };
        if flags.contains(SyncFlags::INVALIDATE) && vma.flags.contains(VmFlags::LOCKED) {
            return Err(Errno::EBUSY);
        }
        let file = vma
            .file
            .filter(|_| vma.is_shared() && flags.contains(SyncFlags::SYNC));
        file.inspect(|&file| self.mm().get_object(file));
        Ok(Some((vma, part, file)))
    }

    /// [`msync_with`](Self::msync_with) `MS_SYNC`.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn msync(&self, address: u64, length: u64) -> Result<(), Errno> {
        self.msync_with(address, length, SyncFlags::SYNC)
    }

    /// Says which pages of a range are in memory: one byte per page, bit 0.
    ///
    /// A page of a file or of shared memory is in memory also where it is not mapped yet, and one whose place is in swap while the swap cache
    /// has it.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for an unaligned address; [`Errno::ENOMEM`] where a page is not mapped;
    /// [`Errno::EFAULT`] where `vector` is shorter than the range has pages.
    #[doc(alias = "sys_mincore")]
    pub fn mincore(&self, address: u64, length: u64, vector: &mut [u8]) -> Result<(), Errno> {
        if !address.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        let task_size = self.layout().task_size;
        if address > task_size || length > task_size - address {
            return Err(Errno::ENOMEM);
        }
        if length == 0 {
            return Ok(());
        }
        let range = self.user_range(address, length.div_ceil(PAGE_SIZE));
        let range = range.ok_or(Errno::ENOMEM)?;
        if (vector.len() as u64) < range.count() {
            return Err(Errno::EFAULT);
        }
        let mut state = self.lock();
        self.for_each_part_up_to_a_hole(&mut state, range, |_, vma, part| {
            for page in part.iter() {
                let index = (page.number() - range.first().number()) as usize;
                vector[index] = u8::from(self.is_in_memory(vma, page));
            }
            Ok(())
        })
    }

    fn is_in_memory(&self, vma: &Vma, page: Page) -> bool {
        if vma.is_kernels() {
            // Whose they are is not asked, so nothing is told (Linux: `can_do_mincore`).
            return true;
        }
        let payload = match self.tables().query(page) {
            Entry::Leaf(_) => return true,
            Entry::Payload(payload) => Absent::of(payload),
            Entry::Empty => None,
        };
        let mm = self.mm();
        match (payload, vma.file) {
            (Some(Absent::Moving(_)), _) => true,
            (Some(Absent::Swapped(entry)), _) => mm.is_in_swap_cache(entry),
            (Some(Absent::Guard) | None, Some(file)) => {
                mm.is_in_memory(file, vma.object_page(page))
            }
            (Some(Absent::Guard) | None, None) => false,
        }
    }
}
