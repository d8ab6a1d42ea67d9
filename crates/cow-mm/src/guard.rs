//! Guard regions: pages of a mapping that fault for good, without a mapping of their own.
//!
//! ```text
//!   one VMA   [ stack of a thread .......... | G | stack of the next ...... | G | ... ]     G: a note in the entry, no page
//! ```
//!
//! An access to one is SIGSEGV. They cost an entry, not a VMA; they survive `MADV_DONTNEED`, mprotect, mremap and fork, and end with
//! `MADV_GUARD_REMOVE` or the mapping.
//!
//! Source: madvise(2); Linux 6.13 and later `mm/madvise.c` (`madvise_guard_install`, `madvise_guard_remove`).

use kmem_hal::{Page, PageRange};
use kmem_paging::{ChangeError, Entry};

use crate::absent::Absent;
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::space::{AddressSpace, State};
use crate::vma::Vma;

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Makes a part of a mapping a guard region; what it held is gone.
    #[inline(never)]
    pub(crate) fn install_guards(
        &self,
        state: &mut State<'m, E>,
        vma: &Vma,
        part: PageRange,
    ) -> Result<(), Errno> {
        if vma.flags.intersects(VmFlags::SPECIAL | VmFlags::LOCKED) {
            return Err(Errno::EINVAL);
        }
        // A child inherits the tables of a mapping with this flag, and the notes with them.
        state
            .vmas
            .update(part.first(), |vma| vma.flags |= VmFlags::MAYBE_GUARD);
        state.guards = true;
        if vma.is_anonymous() {
            self.prepare_anon(state, part.first());
        }
        let guard = Absent::Guard
            .payload::<E::Format>()
            .ok_or(Errno::EOPNOTSUPP)?;
        let cursor = self.tables().cursor(part);
        let mut cursor = cursor.map_err(|_| Errno::EINVAL)?;
        let mut gather = self.tables().gather::<32>();
        let mut outcome = Ok(());
        for page in part.iter() {
            outcome = loop {
                if let Err(error) = self.own(&mut cursor, page) {
                    break Err(error);
                }
                match cursor.set_payload(page, guard, &mut gather) {
                    Ok(Entry::Payload(before)) => {
                        self.mm().drop_payload(before);
                        break Ok(());
                    }
                    Ok(_) => break Ok(()),
                    Err(ChangeError::Full { .. }) => {
                        cursor.release();
                        self.settle(&mut gather);
                    }
                    Err(ChangeError::Shared { .. }) => {}
                    Err(_) => break Err(Errno::ENOMEM),
                }
            };
            if outcome.is_err() {
                break;
            }
        }
        cursor.release();
        self.settle(&mut gather);
        outcome
    }

    /// Makes ordinary, empty pages of the guard regions in a part of a mapping.
    #[inline(never)]
    pub(crate) fn remove_guards(
        &self,
        state: &State<'m, E>,
        vma: &Vma,
        part: PageRange,
    ) -> Result<(), Errno> {
        if vma.flags.intersects(VmFlags::SPECIAL) {
            return Err(Errno::EINVAL);
        }
        let mut next = state.guards.then_some(part.first());
        while let Some(page) = next.and_then(|from| self.next_guard(from, part)) {
            let cursor = self.tables().cursor(PageRange::single(page));
            let mut cursor = cursor.map_err(|_| Errno::EINVAL)?;
            self.own(&mut cursor, page)?;
            let mut gather = self.tables().gather::<1>();
            let _ = cursor.unmap_with(PageRange::single(page), &mut gather, |_| {});
            cursor.release();
            self.settle(&mut gather);
            next = page.checked_add(1);
        }
        Ok(())
    }

    /// Empties a part of a mapping, all but its guard regions.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where not even the frames set aside for it are left.
    #[inline(never)]
    pub(crate) fn empty(&self, state: &State<'m, E>, part: PageRange) -> Result<(), Errno> {
        let mut at = Some(part.first());
        while let Some(first) = at.filter(|first| *first <= part.last()) {
            let guard = match state.guards {
                true => self.next_guard(first, part),
                false => None,
            };
            let last = match guard {
                Some(guard) => guard.checked_sub(1).filter(|last| *last >= first),
                None => Some(part.last()),
            };
            if let Some(range) = last.and_then(|last| PageRange::new(first, last)) {
                self.own_ends(range)?;
                self.zap(range);
            }
            at = guard.and_then(|guard| guard.checked_add(1));
        }
        Ok(())
    }

    /// The first page of a guard region from `from` on, in the range.
    fn next_guard(&self, from: Page, range: PageRange) -> Option<Page> {
        let mut from = from;
        loop {
            let (page, payload) = self.next_payload(from, range)?;
            if Absent::of(payload) == Some(Absent::Guard) {
                return Some(page);
            }
            from = page.checked_add(1)?;
        }
    }
}
