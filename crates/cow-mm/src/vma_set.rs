//! The VMAs of one space, by address: the tree, the memory of what it points to, and a lock in each.
//!
//! ```text
//!   fault  ── no lock of the space ──> VmaIndex ── tree ── VmaMemory { lock, Vma }      held shared while the fault works
//!   call   ── the space's lock ──> VmaSet ── writes the same tree; write-locks what it changes, releases all at its end
//! ```
//!
//! Readers get copies of VMAs. Changes go through an [`Edit`] (`vma_edit.rs`), which takes the memory for a call's worst case first, so
//! that no step of a call can fail after the first one.
//!
//! A call write-locks a VMA before it changes it or takes it out, and a new VMA before the tree leads to it: so no fault
//! sees a mapping whose pages are still those of the mapping before. The locks are released when the space's lock is
//! ([`VmaSet::end_write`]). A fault that finds a VMA write-locked waits for the space's lock.
//!
//! Whoever holds a VMA's lock shared must not wait for a space's lock: its writer waits for him.
//!
//! Invariants
//! - `I1`: every handle in the tree is the address of a VMA that this set allocated and has not freed.
//! - `I2`: the tree holds a VMA under exactly the VMA's own range.
//! - `I3`: each VMA with a file holds one reference of its object, and each with a name one use of it.
//! - `I4`: what the tree says of a page changes only while the VMAs concerned, old and new, are write-locked; a VMA that is taken out is
//!   emptied under its lock. So whoever holds a VMA's lock and finds its page in it holds the VMA that the tree leads to.
//! - `I5`: an object that a VMA of the set maps has its bit in `objects` of the ledger; other objects may have it too.
//! - `I6`: what a read section of the grace period found in the tree stays a VMA's memory until the section ends.
//!
//! Source: Linux `mm/vma.c`, `include/linux/mmap_lock.h` (per-VMA locks).

use core::ptr::NonNull;

use kmem_hal::{Page, PageRange};
use kmem_paging::Env as PagingEnv;
use kmem_vma_tree::{Entry, Gap, GapRequest, SharedTree, SpaceSeq, VmaReadGuard, Writer};

use crate::counters::{Counters, Ledger};
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::handle::Handle;
use crate::mm::Mm;
use crate::object::{Ended, FileRef};
use crate::vma::{Label, Vma};
use crate::vma_edit::{Edit, STOCK, STORES};
use crate::vma_memory::{VmaMemory, VmaStock};

pub(crate) type GraceOf<'m, E> = &'m <<E as Env>::Paging as PagingEnv>::Grace;
pub(crate) type NodesOf<'m, E> = &'m <E as Env>::Nodes;

/// Where a space's VMAs are found, with the space's lock or without.
pub(crate) struct VmaIndex<'m, E: Env> {
    mm: &'m Mm<'m, E>,
    tree: SharedTree<Handle, NodesOf<'m, E>, GraceOf<'m, E>>,
    seq: SpaceSeq,
}

impl<'m, E: Env> VmaIndex<'m, E> {
    pub fn new(mm: &'m Mm<'m, E>) -> Self {
        Self {
            mm,
            tree: SharedTree::new_in(mm.env().nodes(), mm.env().paging().grace()),
            seq: SpaceSeq::new(),
        }
    }

    /// The VMA that covers `page`, which stays as it is until the guard is dropped; `None` where there is none, or somebody changes
    /// it: take the space's lock and look again.
    ///
    /// Takes no lock of the space, and stores to no word but the VMA's own.
    #[doc(alias = "lock_vma_under_rcu")]
    pub fn lock_vma(&self, page: Page) -> Option<HeldVma<'_>> {
        let section = self.tree.read();
        let memory = section.get(page)?.value.vma()?;
        // SAFETY: found in the section, which keeps the memory a VMA's (`I6`), and the lock holds it after that (`I4`).
        let guard = unsafe { VmaMemory::lock_of(memory) }.try_read(&self.seq)?;
        // Now that nobody changes it: is it still the one? No second search is needed, as it says so itself.
        // SAFETY: the lock is held for as long as the answer lives.
        let vma = unsafe { VmaMemory::get(memory) }?;
        if !vma.range.contains(page) {
            return None;
        }
        Some(HeldVma { vma, _guard: guard })
    }
}

/// A VMA that stays as it is while this lives.
pub(crate) struct HeldVma<'v> {
    vma: &'v Vma,
    _guard: VmaReadGuard<'v>,
}

impl core::ops::Deref for HeldVma<'_> {
    type Target = Vma;

    fn deref(&self) -> &Vma {
        self.vma
    }
}

/// A space's VMAs, for whoever holds the space's lock.
pub(crate) struct VmaSet<'m, E: Env> {
    mm: &'m Mm<'m, E>,
    seq: &'m SpaceSeq,
    tree: Writer<'m, Handle, NodesOf<'m, E>, GraceOf<'m, E>>,
    stock: VmaStock,
    ledger: Ledger,
    /// Whether VMAs are write-locked.
    locked: bool,
}

// SAFETY: the handles are the set's own (`I1`); the allocators and the `Mm` are shared by contract.
unsafe impl<E: Env> Send for VmaSet<'_, E> {}
// SAFETY: as above; shared access only reads.
unsafe impl<E: Env> Sync for VmaSet<'_, E> {}

/// A VMA in the set, to be changed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmaId(pub NonNull<VmaMemory>);

/// A VMA with its place in the set.
pub(crate) type Found = (VmaId, Vma);

pub(crate) fn read(handle: Handle) -> Option<Found> {
    let pointer = handle.vma()?;
    // SAFETY: `I1`: the VMA is alive, and it changes only through an exclusive borrow of the set, which the space's lock gives.
    let vma = unsafe { VmaMemory::read(pointer) }?;
    Some((VmaId(pointer), vma))
}

const fn object_bit(number: u32) -> u64 {
    1 << (number % 64)
}

fn value(entry: Option<Entry<Handle>>) -> Option<Vma> {
    read(entry?.value).map(|(_, vma)| vma)
}

impl<'m, E: Env> VmaSet<'m, E> {
    /// The set of an index.
    ///
    /// # Safety
    ///
    /// The index stays where it is until the set is dropped, and has no other set.
    pub unsafe fn new(index: NonNull<VmaIndex<'m, E>>) -> Self {
        // SAFETY: the caller's promise; the set does not outlive it.
        let index = unsafe { &*index.as_ptr() };
        Self {
            mm: index.mm,
            seq: &index.seq,
            // SAFETY: the only set, which is borrowed exclusively for every change.
            tree: unsafe { index.tree.writer() },
            stock: VmaStock::new(),
            ledger: Ledger::default(),
            locked: false,
        }
    }

    /// Fills this set, which is empty, with what `inherit` makes of another's VMAs, and charges it; `None` leaves one out.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; the set is still empty.
    #[doc(alias = "__mt_dup")]
    pub fn copy_from(
        &mut self,
        parent: &Self,
        is_admin: bool,
        mut inherit: impl FnMut(&Vma) -> Option<Vma>,
    ) -> Result<(), Errno> {
        let (mm, stock, ledger) = (self.mm, &mut self.stock, &mut self.ledger);
        let mut failed = false;
        // Those in the tree that is being made, to find them should it fail.
        let mut made = VmaStock::new();
        let tree = parent.tree.duplicate_in(mm.env().nodes(), &mut |entry| {
            let (_, vma) = read(entry.value)?;
            let vma = inherit(&vma)?;
            if vma.flags.contains(VmFlags::ACCOUNT) && !failed {
                let (pages, total) = (vma.range.count(), ledger.counters.total);
                match mm.commit().charge(pages, total, is_admin) {
                    Ok(()) => ledger.note_charge(pages),
                    Err(_) => failed = true,
                }
            }
            failed = failed || stock.fill(mm.env().vmas(), 1).is_err();
            let memory = stock.take().filter(|_| !failed)?;
            // SAFETY: M2: no tree leads to it yet.
            unsafe { VmaMemory::write(memory, vma) };
            ledger.counters.add(&vma);
            hold(mm, &vma, ledger);
            made.put(memory);
            Some(Handle::of_vma(memory))
        });
        let tree = match tree {
            Ok(tree) if !failed => tree,
            _ => {
                while let Some(memory) = made.take() {
                    discard(mm, stock, ledger, Handle::of_vma(memory));
                }
                ledger.settle(mm.commit());
                return Err(Errno::ENOMEM);
            }
        };
        // SAFETY: the nodes of all spaces are the environment's.
        unsafe { self.tree.adopt(tree) };
        ledger.settle(mm.commit());
        Ok(())
    }

    /// Write-locks every VMA: no fault is at work in the space until [`end_write`](Self::end_write).
    pub fn lock_all(&mut self) {
        self.locked = true;
        for entry in self.tree.iter() {
            start_write(self.mm, self.seq, entry.value);
        }
    }

    /// Releases every VMA that was write-locked. Whoever lets the space's lock go calls it.
    pub fn end_write(&mut self) {
        if core::mem::take(&mut self.locked) {
            self.seq.end_write_all();
        }
    }

    /// Gives up a reference of an object, which ends with the objects of the VMAs that went.
    pub fn leave_object(&mut self, file: FileRef) {
        self.mm.leave_object(file, &mut self.ledger.ended);
    }

    /// The objects whose last reference went: theirs to end who let the space's lock go.
    pub fn take_ended(&mut self) -> Ended {
        core::mem::take(&mut self.ledger.ended)
    }

    /// How many VMAs there are (`map_count`).
    pub fn len(&self) -> usize {
        self.tree.len()
    }

    /// Pages in the set's VMAs, by kind.
    pub fn counters(&self) -> &Counters {
        &self.ledger.counters
    }

    /// The most pages that the VMAs ever had together (`hiwater_vm`).
    pub fn peak(&self) -> u64 {
        self.ledger.peak
    }

    /// Pages in the parts of VMAs that lie in a range, by kind.
    pub fn counters_in(&self, range: PageRange) -> Counters {
        let mut counters = Counters::default();
        let mut at = Some(range.first());
        while let Some(vma) = at.and_then(|at| self.at_or_after(at)) {
            let Some(part) = vma.range.intersection(range) else {
                break;
            };
            counters.add(&vma.part(part));
            at = vma.range.last().checked_add(1);
        }
        counters
    }

    /// The VMA that covers `page`.
    pub fn get(&self, page: Page) -> Option<Vma> {
        value(self.tree.get(page))
    }

    /// The first VMA that ends at or after `page` (`find_vma`).
    pub fn at_or_after(&self, page: Page) -> Option<Vma> {
        value(self.tree.first_at_or_after(page))
    }

    /// The last VMA that ends before `page`, or covers none from it on.
    pub fn before(&self, page: Page) -> Option<Vma> {
        value(self.tree.last_before(page))
    }

    /// Whether a VMA may map the object with this number; `false` is certain.
    pub fn may_map(&self, object: u32) -> bool {
        self.ledger.objects & object_bit(object) != 0
    }

    /// Whether no VMA touches the range.
    pub fn is_free(&self, range: PageRange) -> bool {
        self.at_or_after(range.first())
            .is_none_or(|vma| vma.range.first() > range.last())
    }

    /// The VMAs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Vma> + '_ {
        self.tree.iter().filter_map(|entry| value(Some(entry)))
    }

    /// The highest free place inside of limits, keeping the guard gap below stacks. As in Linux, a gap that a stack's guard reaches into ends the
    /// search above that guard's end, though other mappings lie there and gaps between them.
    #[doc(alias = "unmapped_area_topdown")]
    pub fn find_gap_down(&self, pages: u64, limits: PageRange) -> Option<PageRange> {
        let request = GapRequest::new(pages).limits(limits);
        let mut highest = limits.last();
        self.tree.find_gap_down_with(&request, &mut |gap| {
            let first = gap.range.first().max(limits.first());
            let free = PageRange::new(first, gap.range.last().min(highest))?;
            if free.count() < pages {
                return None;
            }
            highest = highest.min(self.below_guard(gap).unwrap_or(Page::ZERO));
            PageRange::new(first, free.last().min(highest))
        })
    }

    /// The lowest free place inside of limits, keeping the guard gap below stacks.
    #[doc(alias = "unmapped_area")]
    pub fn find_gap_up(&self, pages: u64, limits: PageRange) -> Option<PageRange> {
        let request = GapRequest::new(pages).limits(limits);
        self.tree.find_gap_up_with(&request, &mut |gap| {
            PageRange::new(gap.range.first(), self.below_guard(gap)?)
        })
    }

    /// The last page of a gap that the guard of a stack above it leaves; it may lie below the gap. `None` where there is none. What is above may
    /// lie beyond the limits of a search, and its guard reaches into them all the same.
    fn below_guard(&self, gap: &Gap<Handle>) -> Option<Page> {
        let beyond = || self.at_or_after(gap.range.last().checked_add(1)?);
        let last = match value(gap.above).or_else(beyond) {
            Some(above) => above.range.first().checked_sub(above.guard_below() + 1)?,
            None => Page::MAX,
        };
        Some(last.min(gap.range.last()))
    }

    /// Takes the memory that a call's changes may need.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`]; nothing has changed.
    pub fn edit(&mut self) -> Result<Edit<'_, 'm, E>, Errno> {
        self.edit_with(STORES)
    }

    /// [`edit`](Self::edit) for changes of which it is known how many stores they make. What they need at most is nearly
    /// always at hand: set and tree keep it from call to call.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn edit_with(&mut self, stores: usize) -> Result<Edit<'_, 'm, E>, Errno> {
        self.stock
            .trim(self.mm.env().vmas(), self.mm.env().paging().grace());
        self.stock.fill(self.mm.env().vmas(), STOCK)?;
        let tree = self.tree.reserve(stores)?;
        self.locked = true;
        Ok(Edit {
            mm: self.mm,
            seq: self.seq,
            tree,
            stock: &mut self.stock,
            ledger: &mut self.ledger,
        })
    }

    /// Changes what a VMA says of itself apart from its range. Needs no memory.
    pub fn update(&mut self, page: Page, change: impl FnOnce(&mut Vma)) {
        if let Some((id, vma)) = self.tree.get(page).and_then(|entry| read(entry.value)) {
            let mut changed = vma;
            change(&mut changed);
            changed.range = vma.range;
            self.locked = true;
            start_write(self.mm, self.seq, Handle::of_vma(id.0));
            self.ledger.counters.remove(&vma);
            self.ledger.counters.add(&changed);
            // SAFETY: M2: write-locked, and the set is borrowed exclusively.
            unsafe { VmaMemory::write(id.0, changed) };
            self.ledger.settle(self.mm.commit());
        }
    }
}

impl<E: Env> Drop for VmaSet<'_, E> {
    fn drop(&mut self) {
        // The space goes: nobody looks for VMAs without its lock any more, and the tree's nodes go with the index.
        for entry in self.tree.iter() {
            discard(self.mm, &mut self.stock, &mut self.ledger, entry.value);
        }
        self.stock.trim_to(self.mm.env().vmas(), 0);
        self.ledger.settle(self.mm.commit());
        // Nobody reaches the space, so there is no lock of it to let go of.
        let ended = core::mem::take(&mut self.ledger.ended);
        self.mm.end_objects(ended);
    }
}

/// Write-locks a VMA, waiting for the faults in it.
pub(crate) fn start_write<E: Env>(mm: &Mm<'_, E>, seq: &SpaceSeq, handle: Handle) {
    if let Some(memory) = handle.vma() {
        // SAFETY: `I1`, and the caller is the set's writer.
        let lock = unsafe { VmaMemory::lock_of(memory) };
        lock.start_write(seq, &mut || mm.env().paging().relax());
    }
}

/// Counts what a VMA holds: its object, and its name.
pub(crate) fn hold<E: Env>(mm: &Mm<'_, E>, vma: &Vma, ledger: &mut Ledger) {
    if let Some(file) = vma.file {
        mm.get_object(file);
        ledger.objects |= object_bit(mm.object_number(file));
    }
    if let Label::Named(name) = vma.label {
        mm.names().get(name);
    }
}

/// Takes the memory of a VMA that no tree leads to any more.
pub(crate) fn discard<E: Env>(
    mm: &Mm<'_, E>,
    stock: &mut VmaStock,
    ledger: &mut Ledger,
    handle: Handle,
) {
    if let Some((id, vma)) = read(handle) {
        ledger.counters.remove(&vma);
        // SAFETY: M2: write-locked, or nobody looks at the set any more.
        unsafe { VmaMemory::clear(id.0) };
        stock.put(id.0);
        if let Some(file) = vma.file {
            // The space is locked.
            mm.leave_object(file, &mut ledger.ended);
        }
        if let Label::Named(name) = vma.label {
            mm.names().put(name);
        }
    }
}
