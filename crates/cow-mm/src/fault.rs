//! The page fault, as one state machine.
//!
//! ```text
//!   address ── a user address? ── no ──> KernelFault
//!      │ yes
//!   in a VMA? ── no ── below a stack, within its limit? ── no ──> SIGSEGV (MAPERR)
//!      │ yes                  └─ yes: grow it
//!   does the VMA allow the access? ── no ──> SIGSEGV (ACCERR)
//!      │ yes
//!   present? ── yes ── write to a page that is not writable?
//!      │                 │ its table is shared since a fork: take it back (alone), or copy it (others too); look again
//!      │                 │ shared: mark dirty, make writable
//!      │                 │ private, ours alone: make writable (reuse)
//!      │                 │ private, others' too: copy, map the copy (copy on write)
//!      │                 └ no: another CPU was faster, or a stale TLB entry (spurious)
//!      no
//!      ├ anonymous, read:  map the zero page          write: map a fresh page of zeros
//!      ├ file, read or shared: map the object's page  (NeedIo: come back when it is there; beyond the end: SIGBUS)
//!      └ file, private, write: copy the object's page, map the copy
//! ```
//!
//! Nothing waits inside: a page that must be read gives [`Outcome::NeedIo`], which holds no lock; the access is made again
//! later and starts from the top.
//!
//! Invariants
//! - `I1`: whatever is installed grants at most what the VMA grants (`I1` of the space).
//! - `I2`: a page is made writable in place only where it is exclusive: its slot says so, and every table that leads to it is this space's
//!   alone, both looked at under the table's lock ([`Mm::is_exclusive`](crate::Mm), `Cursor::own`).
//! - `I3`: accessed is set at installation, and dirty for a write: saves the processor two writes.
//!
//! Source: Linux `mm/memory.c` (`handle_mm_fault` and below), `arch/x86/mm/fault.c`; Bovet and Cesati, figure 9-4.

use kmem_hal::{
    Access, FaultCode, Frame, IoTicket, Page, PageFault, PageRange, SlotFlags, VirtAddr,
};
use kmem_paging::{Entry, Rights};

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::merge::may_share_anon;
use crate::mutants::mutant;
use crate::space::{AddressSpace, State};
use crate::tables::{attributes, rights, write_flag};
use crate::vma::{AnonLink, Vma};

/// Why a program gets a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// `SIGSEGV` with `SEGV_MAPERR`: nothing is mapped there.
    MapError,
    /// `SIGSEGV` with `SEGV_ACCERR`: the mapping does not allow it.
    AccessError,
    /// `SIGBUS` with `BUS_ADRERR`: beyond the end of the file.
    BusError,
    /// `SIGSEGV` with `SEGV_PKUERR`: the thread's rights for the mapping's protection key forbid it.
    KeyError(u8),
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault that is not handled needs an answer"]
pub enum Outcome {
    /// Make the access again.
    Handled,
    /// A page is on its way; make the access again when the I/O is done.
    NeedIo(IoTicket),
    /// Tell the program.
    Signal {
        /// Which signal.
        signal: Signal,
        /// The address that was accessed.
        address: VirtAddr,
    },
    /// The kernel itself accessed what is not mapped.
    KernelFault,
    /// No memory for the page: reclaim, choose a victim, or try again.
    OutOfMemory,
}

/// A fault that ends before a page is installed.
pub(crate) enum Stop {
    Outcome(Outcome),
    Errno(Errno),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl<'m, E: Env> AddressSpace<'m, E> {
    /// Handles a page fault of this space.
    ///
    /// Context: the faulting task's, interrupts on; may allocate. Holds the lock of the VMA shared; takes the space's lock
    /// only where the mapping itself must change (a stack grows, a first write) or is being changed.
    #[doc(alias = "do_user_addr_fault")]
    #[doc(alias = "handle_mm_fault")]
    pub fn fault(&self, fault: &PageFault) -> Outcome {
        if fault.address.as_u64() >= self.layout().task_size {
            return match fault.code.contains(FaultCode::USER) {
                true => Outcome::Signal {
                    signal: Signal::MapError,
                    address: fault.address,
                },
                false => Outcome::KernelFault,
            };
        }
        if fault.code.contains(FaultCode::PROTECTION_KEY)
            && let Some(vma) = self.vma_at(fault.address)
        {
            let signal = Signal::KeyError(vma.flags.key());
            let address = fault.address;
            return Outcome::Signal { signal, address };
        }
        let access = fault.code.access();
        let outcome = match self.fault_in_vma(fault) {
            Some(outcome) => outcome,
            None => self.fault_locked(&mut self.lock(), fault.address, access),
        };
        match outcome {
            Ok(()) => Outcome::Handled,
            Err(Stop::Outcome(outcome)) => outcome,
            Err(Stop::Errno(Errno::ENOMEM)) => Outcome::OutOfMemory,
            Err(Stop::Errno(_)) => Outcome::Signal {
                signal: Signal::BusError,
                address: fault.address,
            },
        }
    }

    /// A fault in a mapping that exists, without the space's lock; `None` where it takes that: to add or change a mapping, or because
    /// somebody does.
    fn fault_in_vma(&self, fault: &PageFault) -> Option<Result<(), Stop>> {
        let (address, access) = (fault.address, fault.code.access());
        let page = Page::containing(address);
        // The VMA stays as it is while it is held, and so do its pages' entries but for other faults. Nothing below waits for
        // the space's lock.
        let vma = self.core().vmas.lock_vma(page)?;
        if !allows(vma.flags, access) || needs_anon(&vma, access) {
            return None;
        }
        let write = access == Access::Write;
        if write && fault.code.contains(FaultCode::PRESENT) {
            // Copy on write, most likely: straight to the entry.
            return Some(self.present(&vma, page, access));
        }
        if write && vma.is_anonymous() && !vma.is_shared() {
            // A first touch, most likely: no look before the page is there.
            return Some(self.first_touch(&vma, page, address));
        }
        Some(self.fault_page(&vma, page, address, access))
    }

    #[inline(never)]
    pub(crate) fn fault_locked(
        &self,
        state: &mut State<'m, E>,
        address: VirtAddr,
        access: Access,
    ) -> Result<(), Stop> {
        let page = Page::containing(address);
        let signal = |signal| Err(Stop::Outcome(Outcome::Signal { signal, address }));
        let Some(vma) = self.vma_or_stack(state, page)? else {
            return signal(Signal::MapError);
        };
        if !allows(vma.flags, access) {
            return signal(Signal::AccessError);
        }
        if needs_anon(&vma, access) {
            // A program that writes to its own copy owns pages from now on, even if this one cannot be had.
            self.prepare_anon(state, page);
        }
        self.fault_page(&vma, page, address, access)
    }

    /// The part of a fault that is about pages and entries: the mapping allows the access, and stays as it is.
    fn fault_page(
        &self,
        vma: &Vma,
        page: Page,
        address: VirtAddr,
        access: Access,
    ) -> Result<(), Stop> {
        match self.tables().query(page) {
            Entry::Leaf(leaf) if leaf.attributes.rights.contains(needed(access)) => {
                // A stale translation, which the processor has dropped by now, or another CPU was faster.
                Ok(())
            }
            Entry::Leaf(_) => self.present(vma, page, access),
            Entry::Payload(payload) => self.fault_absent(vma, page, payload, address),
            Entry::Empty => self.absent(vma, page, address, access == Access::Write),
        }
    }

    /// The VMA of a page, grown down to it where it is a stack and may.
    fn vma_or_stack(&self, state: &mut State<'m, E>, page: Page) -> Result<Option<Vma>, Stop> {
        match state.vmas.get(page) {
            None if self.grow_stack(state, page)? => Ok(state.vmas.get(page)),
            vma => Ok(vma),
        }
    }

    /// Lets the stack above a page that is in no VMA grow down to it, if there is one that may.
    #[cold]
    #[inline(never)]
    #[doc(alias = "expand_stack")]
    fn grow_stack(&self, state: &mut State<'m, E>, page: Page) -> Result<bool, Stop> {
        let above = state.vmas.at_or_after(page);
        let Some(vma) = above.filter(|vma| vma.flags.contains(VmFlags::GROWSDOWN)) else {
            return Ok(false);
        };
        let size =
            (vma.range.last().number() - page.number() + 1).saturating_mul(kmem_hal::PAGE_SIZE);
        let guard = match mutant!("stack-guard-forgotten") {
            true => 0,
            false => crate::layout::STACK_GUARD_PAGES,
        };
        let below = state.vmas.before(page);
        let blocked = below.is_some_and(|below| {
            !below.flags.contains(VmFlags::GROWSDOWN)
                && below.flags.intersects(VmFlags::ACCESS)
                && below.range.last().number() + guard >= page.number()
        });
        if blocked || self.layout().is_too_low(page) {
            return Ok(false);
        }
        let (range, flags) = (vma.range, vma.flags);
        // Whether or not a page comes of it, or it may grow at all: what it merges with depends on that from now on (`expand_downwards`).
        self.prepare_anon(state, range.first());
        let added = range.first().number() - page.number();
        // Its pages are numbered from 0 on: below that none could be found again.
        if size > state.limits.stack
            || added > vma.offset
            || !state.may_expand(added, flags)
            || !state.may_lock_more(added, flags)
        {
            return Ok(false);
        }
        let Some(grown) = PageRange::new(page, range.last()) else {
            return Ok(false);
        };
        let mut edit = state.vmas.edit()?;
        if flags.contains(VmFlags::ACCOUNT) && edit.charge(added, &state.limits).is_err() {
            return Ok(false);
        }
        edit.grow_down(range.first(), grown);
        Ok(true)
    }

    /// Something is mapped, and it does not allow the access.
    pub(crate) fn present(&self, vma: &Vma, page: Page, access: Access) -> Result<(), Stop> {
        // Under the table's lock from here on, in tables that are this space's alone.
        let Some(mut entry) = self.lock_own(page)? else {
            return Ok(());
        };
        let Entry::Leaf(leaf) = entry.get() else {
            return Ok(());
        };
        let mut now = rights(vma.flags);
        let writable = leaf.is_writable();
        let becomes_writable = access == Access::Write && !writable;
        if !becomes_writable {
            // The table was taken back, or the mapping was given more rights since.
            now.set(Rights::WRITE, writable);
        } else if vma.is_shared() {
            if let Some(written) = self.mm().counted(leaf.frame) {
                written.slot().set_flags(SlotFlags::DIRTY);
            }
        } else if !self.mm().is_exclusive(leaf.frame, || entry.pins()) {
            self.copy_page(entry, vma, page, leaf.frame)?;
            return Ok(());
        }
        entry.relax(now, becomes_writable);
        Ok(())
    }

    /// Maps a copy of a page in place of it, unless somebody else did meanwhile. `locked` is what holds the page's table, which is let go.
    #[doc(alias = "wp_page_copy")]
    pub(crate) fn copy_page(
        &self,
        locked: impl Sized,
        vma: &Vma,
        page: Page,
        shared: Frame,
    ) -> Result<(), Errno> {
        let mm = self.mm();
        let source = (shared != mm.zero_page()).then_some(shared);
        if let Some(source) = source {
            // So that it stays what it is until the copy is in its place.
            let counted = mm.user(source).add_reference();
            counted.map_err(|_| Errno::ENOMEM)?;
        }
        drop(locked);
        let copy = mm.new_anonymous(self.family(), vma.object_page(page), source);
        let outcome = copy.map(|copy| {
            let unused = match self.lock_own(page) {
                Ok(Some(entry)) if is_read_only(&entry.get(), shared) => {
                    match entry.replace(copy, attributes(vma.flags).accessed().dirty()) {
                        Ok((_, old)) => old,
                        Err((_, copy)) => copy,
                    }
                }
                _ => copy,
            };
            mm.put(unused);
        });
        if let Some(source) = source {
            mm.put_reference(source);
        }
        outcome
    }

    /// A write to private memory without a file, where nothing should be mapped yet.
    #[doc(alias = "do_anonymous_page")]
    fn first_touch(&self, vma: &Vma, page: Page, address: VirtAddr) -> Result<(), Stop> {
        let attributes = attributes(vma.flags).accessed().dirty();
        let made = self
            .mm()
            .new_anonymous(self.family(), vma.object_page(page), None);
        let mapping = match made {
            Ok(mapping) => mapping,
            // What stands there may need no memory: a page in the swap cache, or a guard region.
            Err(error) => {
                return match self.tables().query(page) {
                    Entry::Empty => Err(error.into()),
                    _ => self.fault_page(vma, page, address, Access::Write),
                };
            }
        };
        match self.install(page, mapping, attributes)? {
            true => Ok(()),
            // Something is, or what was there was swapped out.
            false => self.fault_page(vma, page, address, Access::Write),
        }
    }

    /// Nothing is mapped.
    fn absent(&self, vma: &Vma, page: Page, address: VirtAddr, write: bool) -> Result<(), Stop> {
        let mut attributes = attributes(vma.flags).accessed();
        let mapping = match vma.file {
            None if write => {
                attributes.dirty = true;
                self.mm()
                    .new_anonymous(self.family(), vma.object_page(page), None)?
            }
            None => {
                attributes = attributes.write_protected();
                self.mm().map_page(self.mm().zero_page())?
            }
            Some(file) => return self.fault_object(vma, file, page, address, write),
        };
        self.install(page, mapping, attributes)?;
        Ok(())
    }

    /// Gives a private VMA a reverse map before its first anonymous page: a neighbour's where Linux takes it.
    #[inline(never)]
    #[doc(alias = "anon_vma_prepare")]
    pub(crate) fn prepare_anon(&self, state: &mut State<'m, E>, page: Page) {
        let Some(vma) = state.vmas.get(page) else {
            return;
        };
        if vma.anon.is_some() || vma.is_shared() {
            return;
        }
        let next = vma
            .range
            .last()
            .checked_add(1)
            .and_then(|next| state.vmas.get(next));
        let previous = vma
            .range
            .first()
            .checked_sub(1)
            .and_then(|previous| state.vmas.get(previous));
        let usable = |other: Option<Vma>, fits: fn(&Vma, &Vma) -> bool| {
            other
                .filter(|other| fits(&vma, other))
                .and_then(|other| other.anon)
                .filter(|anon| anon.singular)
        };
        let shared = usable(next, may_share_anon)
            .or_else(|| usable(previous, |vma, previous| may_share_anon(previous, vma)));
        let anon = shared.unwrap_or_else(|| AnonLink {
            id: self.mm().next_anon_id(),
            singular: true,
        });
        state.vmas.update(page, |vma| vma.anon = Some(anon));
    }

    /// Notes that a private VMA holds anonymous pages, as a recorded run of a program says.
    ///
    /// The same bookkeeping as a first write fault, without a page.
    pub fn note_written(&self, address: VirtAddr) {
        let mut state = self.lock();
        self.prepare_anon(&mut state, Page::containing(address));
    }

    /// Faults a page in as an access would, and waits for what is on its way. No lock is held.
    pub(crate) fn bring_in(&self, address: VirtAddr, write: bool) -> Result<(), Errno> {
        let page = Page::containing(address);
        loop {
            let leaf = self.leaf(page);
            if let Some(leaf) = leaf
                && leaf.attributes.rights.grants_access()
                && (!write || leaf.is_writable())
            {
                return Ok(());
            }
            let mut code = FaultCode::USER;
            code.set(FaultCode::WRITE, write);
            code.set(FaultCode::PRESENT, leaf.is_some());
            match self.fault(&PageFault { address, code }) {
                Outcome::Handled => {}
                Outcome::NeedIo(ticket) => self.mm().env().wait(ticket),
                Outcome::OutOfMemory => return Err(Errno::ENOMEM),
                Outcome::Signal { .. } | Outcome::KernelFault => return Err(Errno::EFAULT),
            }
        }
    }
}

/// Whether a page is mapped to this frame still, and not writable.
fn is_read_only(entry: &Entry, frame: Frame) -> bool {
    matches!(entry, Entry::Leaf(leaf) if leaf.frame == frame && !leaf.is_writable())
}

/// What an entry must grant.
pub(crate) fn needed(access: Access) -> Rights {
    match access {
        Access::Read => Rights::READ,
        Access::Write => Rights::WRITE,
        Access::Execute => Rights::EXECUTE,
    }
}

/// Whether a mapping allows an access: any right at all allows reading on x86.
pub(crate) fn allows(flags: VmFlags, access: Access) -> bool {
    match access {
        Access::Read => flags.intersects(VmFlags::ACCESS),
        Access::Write => flags.contains(write_flag()),
        Access::Execute => flags.contains(VmFlags::EXEC),
    }
}

/// Whether the mapping has to get a reverse map first: a program that writes to its own copy of something owns pages from now on.
pub(crate) fn needs_anon(vma: &Vma, access: Access) -> bool {
    access == Access::Write && !vma.is_shared() && vma.anon.is_none()
}
