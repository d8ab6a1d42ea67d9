//! The VMAs of one space, by address: the tree, the memory of what it points to, and a lock in each.
//!
//! ```text
//!   fault  ── no lock of the space ──> VmaIndex ── tree ── VmaMemory { lock, Vma }      held shared while the fault works
//!   call   ── the space's lock ──> VmaSet ── writes the same tree; write-locks what it changes, releases all at its end
//! ```
//!
//! Readers get copies of VMAs. Changes go through an [`Edit`], which takes the memory for a call's worst case first, so
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
//! - `I6`: what a read section of the grace period found in the tree stays a VMA's memory until the section ends.
//! - `I5`: an object that a VMA of the set maps has its bit in `objects` of the ledger; other objects may have it too.
//!
//! Source: Linux `mm/vma.c`, `include/linux/mmap_lock.h` (per-VMA locks).

use core::ptr::NonNull;

use kmem_hal::{Page, PageRange};
use kmem_paging::Env as PagingEnv;
use kmem_vma_tree::{
    Entry, GapRequest, Reserved, Shared, SharedTree, SpaceSeq, VmaReadGuard, Writer,
};

use crate::counters::{Counters, Ledger};
use crate::env::Env;
use crate::errno::Errno;
use crate::flags::VmFlags;
use crate::handle::Handle;
use crate::limits::Limits;
use crate::merge::{Candidate, joins};
use crate::mm::Mm;
use crate::mutants::mutant;
use crate::vma::{Label, Vma};
use crate::vma_memory::{VmaMemory, VmaStock};

/// VMAs that an edit may need: two splits and a new one.
const STOCK: usize = 3;
/// Stores that any edit may need.
const STORES: usize = 8;
/// Stores of [`Edit::insert`], and of an [`Edit::add`] that merges on both sides.
pub(crate) const STORES_TO_ADD: usize = 2;
/// Stores of [`Edit::clear`]: two splits and an erasure.
pub(crate) const STORES_TO_CLEAR: usize = 3;
/// Stores of [`Edit::modify`]: what is given away is reshaped, and merged on both sides.
pub(crate) const STORES_TO_MODIFY: usize = 4;

type GraceOf<'m, E> = &'m <<E as Env>::Paging as PagingEnv>::Grace;
type NodesOf<'m, E> = &'m <E as Env>::Nodes;

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
pub(crate) struct VmaId(NonNull<VmaMemory>);

/// A VMA with its place in the set.
type Found = (VmaId, Vma);

fn read(handle: Handle) -> Option<Found> {
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

    /// The highest or lowest free place, keeping the guard gap below stacks.
    pub fn find_gap(&self, request: &GapRequest, top_down: bool, guard: u64) -> Option<PageRange> {
        let mut usable = |gap: &kmem_vma_tree::Gap<Handle>| {
            let above = value(gap.above).map_or(0, |vma| vma.guard_below());
            let last = gap.range.last().checked_sub(above)?;
            let first = gap.range.first().checked_add(guard)?;
            PageRange::new(first, last)
        };
        if top_down {
            self.tree.find_gap_down_with(request, &mut usable)
        } else {
            self.tree.find_gap_up_with(request, &mut usable)
        }
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
    }
}

/// Write-locks a VMA, waiting for the faults in it.
fn start_write<E: Env>(mm: &Mm<'_, E>, seq: &SpaceSeq, handle: Handle) {
    if let Some(memory) = handle.vma() {
        // SAFETY: `I1`, and the caller is the set's writer.
        let lock = unsafe { VmaMemory::lock_of(memory) };
        lock.start_write(seq, &mut || mm.env().paging().relax());
    }
}

/// Counts what a VMA holds: its object, and its name.
fn hold<E: Env>(mm: &Mm<'_, E>, vma: &Vma, ledger: &mut Ledger) {
    if let Some(file) = vma.file {
        mm.get_object(file);
        ledger.objects |= object_bit(mm.object_number(file));
    }
    if let Label::Named(name) = vma.label {
        mm.names().get(name);
    }
}

/// Takes the memory of a VMA that no tree leads to any more.
fn discard<E: Env>(mm: &Mm<'_, E>, stock: &mut VmaStock, ledger: &mut Ledger, handle: Handle) {
    if let Some((id, vma)) = read(handle) {
        ledger.counters.remove(&vma);
        // SAFETY: M2: write-locked, or nobody looks at the set any more.
        unsafe { VmaMemory::clear(id.0) };
        stock.put(id.0);
        if let Some(file) = vma.file {
            mm.put_object(file);
        }
        if let Label::Named(name) = vma.label {
            mm.names().put(name);
        }
    }
}

/// Changes to a set that cannot fail.
pub(crate) struct Edit<'t, 'm, E: Env> {
    mm: &'m Mm<'m, E>,
    seq: &'m SpaceSeq,
    tree: Reserved<'t, Handle, NodesOf<'m, E>, Shared<GraceOf<'m, E>>>,
    stock: &'t mut VmaStock,
    ledger: &'t mut Ledger,
}

impl<E: Env> Drop for Edit<'_, '_, E> {
    fn drop(&mut self) {
        self.ledger.settle(self.mm.commit());
    }
}

impl<E: Env> Edit<'_, '_, E> {
    fn find(&self, page: Page) -> Option<Found> {
        read(self.tree.get(page)?.value)
    }

    /// Write-locks a VMA, before it is changed or the tree says something else of its pages (`I4`).
    fn lock(&self, id: VmaId) {
        start_write(self.mm, self.seq, Handle::of_vma(id.0));
    }

    /// Write-locks what lies in a range: from here on no fault is at work there, nor puts a page there, before the call ends.
    pub fn lock_range(&mut self, range: PageRange) {
        for entry in self.tree.range(range) {
            start_write(self.mm, self.seq, entry.value);
        }
    }

    /// Says that a range is a VMA's, or nobody's. VMAs that end by this are write-locked.
    // Not inlined, as some others here: a caller's stack is that of its deepest call, and the copies of VMAs that are gone by then are not on it.
    #[inline(never)]
    fn put(&mut self, range: PageRange, id: Option<VmaId>) {
        let (mm, seq, stock, ledger) = (self.mm, self.seq, &mut *self.stock, &mut *self.ledger);
        let kept = id.map(|id| Handle::of_vma(id.0));
        self.tree.store(range, kept, &mut |entry| {
            // A piece of the VMA itself, or of one that another call of the edit cut, is no VMA that ends.
            let ends = read(entry.value).is_some_and(|(_, vma)| vma.range == entry.range);
            if kept != Some(entry.value) && ends {
                debug_assert!(
                    entry.value.vma().is_none_or(|memory| {
                        // SAFETY: `I1`.
                        unsafe { VmaMemory::lock_of(memory) }.is_write_locked(seq)
                    }),
                    "a VMA ends that is not locked"
                );
                discard(mm, stock, ledger, entry.value);
            }
        });
    }

    /// Promises `pages` more for the change that follows; an edit that ends without it takes the promise back.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] beyond what may be promised.
    pub fn charge(&mut self, pages: u64, limits: &Limits) -> Result<(), Errno> {
        let total = self.ledger.counters.total;
        self.mm.commit().charge(pages, total, limits.is_admin)?;
        self.ledger.note_charge(pages);
        Ok(())
    }

    #[inline(never)]
    fn write(&mut self, id: VmaId, vma: &Vma) {
        self.lock(id);
        // SAFETY: M2: write-locked, and the set is borrowed exclusively by the edit.
        let before = unsafe {
            let before = VmaMemory::read(id.0);
            VmaMemory::write(id.0, *vma);
            before
        };
        self.ledger.counters.add(vma);
        let Some(before) = before else { return };
        self.ledger.counters.remove(&before);
        if before.label != vma.label {
            if let Label::Named(name) = vma.label {
                self.mm.names().get(name);
            }
            if let Label::Named(name) = before.label {
                self.mm.names().put(name);
            }
        }
    }

    /// Adds a VMA where nothing is.
    #[inline(never)]
    pub fn insert(&mut self, vma: Vma) {
        let Some(memory) = self.stock.take() else {
            unreachable!("an edit makes at most {STOCK} VMAs")
        };
        let id = VmaId(memory);
        // Before the tree leads to it: what is still mapped in its range is not its own.
        self.lock(id);
        // SAFETY: M2: write-locked, and no tree leads to it.
        unsafe { VmaMemory::write(memory, vma) };
        self.ledger.counters.add(&vma);
        hold(self.mm, &vma, self.ledger);
        self.put(vma.range, Some(id));
    }

    /// As [`split`](Self::split), where a cut takes one of the mappings that there is room for.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where there is none.
    #[doc(alias = "split_vma")]
    fn split_within(&mut self, page: Page, room: &mut usize) -> Result<(), Errno> {
        let cuts = |(_, vma): Found| vma.range.first() < page;
        if self.find(page).is_some_and(cuts) {
            match room.checked_sub(1) {
                Some(left) => *room = left,
                None if mutant!("cut-beyond-the-limit") => {}
                None => return Err(Errno::ENOMEM),
            }
            self.split(page);
        }
        Ok(())
    }

    /// Cuts the VMA that covers `page` so that one begins there.
    #[inline(never)]
    pub fn split(&mut self, page: Page) {
        let Some((id, vma)) = self.find(page) else {
            return;
        };
        let Some(last_below) = page
            .checked_sub(1)
            .filter(|below| vma.range.contains(*below))
        else {
            return;
        };
        let (Some(below), Some(above)) = (
            PageRange::new(vma.range.first(), last_below),
            PageRange::new(page, vma.range.last()),
        ) else {
            return;
        };
        self.write(id, &vma.part(below));
        self.insert(vma.part(above));
    }

    /// Cuts what crosses an edge of the range.
    pub fn split_around(&mut self, range: PageRange) {
        self.split(range.first());
        if let Some(after) = range.last().checked_add(1) {
            self.split(after);
        }
    }

    /// Removes everything in the range, cutting what sticks out. `empty` takes the pages away, and their translations from every
    /// processor: while the mappings are locked and hold their objects still, so that no object ends whose memory somebody reaches.
    #[doc(alias = "unmap_region")]
    pub fn clear(&mut self, range: PageRange, empty: impl FnOnce()) {
        self.split_around(range);
        let mut any = false;
        for entry in self.tree.range(range) {
            start_write(self.mm, self.seq, entry.value);
            any = true;
        }
        if any {
            empty();
            self.put(range, None);
        }
    }

    /// Gives a VMA another range and, with it, other contents; the range may only take free pages.
    #[inline(never)]
    fn reshape(&mut self, id: VmaId, old: PageRange, vma: &Vma) {
        let range = vma.range;
        self.write(id, vma);
        for gone in difference(old, range).into_iter().flatten() {
            self.put(gone, None);
        }
        self.put(range, Some(id));
    }

    /// Lets the VMA at `page` begin lower: a stack grew. The pages below it are free.
    pub fn grow_down(&mut self, page: Page, range: PageRange) {
        if let Some((id, mut vma)) = self.find(page) {
            let old = vma.range;
            let added = old.first().number() - range.first().number();
            vma.offset = vma.offset.wrapping_sub(added);
            vma.range = range;
            self.reshape(id, old, &vma);
        }
    }

    /// Adds a range where nothing is, merged with its neighbours as Linux merges; `right` allows the one after.
    #[doc(alias = "vma_merge_new_range")]
    pub fn add(&mut self, range: PageRange, new: Candidate, right: bool) {
        match self.joined(range, &new, None, right) {
            (None, None) => self.insert(Vma {
                range,
                flags: new.flags,
                offset: new.offset,
                file: new.file,
                anon: new.anon,
                label: new.label,
            }),
            (previous, next) => self.merge(range, &new, previous, next),
        }
    }

    /// Gives a part of one VMA other flags, merged with the VMA's neighbours or cut out of it as Linux does.
    ///
    /// `range` lies in one VMA. There may be `room` VMAs more.
    ///
    /// # Errors
    ///
    /// [`Errno::ENOMEM`] where there is no room for a cut; one that there was room for stays, as in Linux.
    #[doc(alias = "vma_modify_flags")]
    pub fn modify(
        &mut self,
        range: PageRange,
        mut room: usize,
        change: impl FnOnce(&mut Candidate),
    ) -> Result<(), Errno> {
        let Some((id, mut new)) = self.candidate(range) else {
            return Ok(());
        };
        change(&mut new);
        match self.joined(range, &new, Some(id), true) {
            (None, None) => {
                self.split_within(range.first(), &mut room)?;
                if let Some(after) = range.last().checked_add(1) {
                    self.split_within(after, &mut room)?;
                }
                self.relabel(range.first(), &new);
            }
            (previous, next) => {
                self.give_away(id, range);
                self.merge(range, &new, previous, next);
            }
        }
        Ok(())
    }

    /// The VMA that has a range, and what the range would be as a VMA of its own.
    #[inline(never)]
    fn candidate(&self, range: PageRange) -> Option<(VmaId, Candidate)> {
        let (id, vma) = self.find(range.first())?;
        Some((id, Candidate::from(&vma.part(range))))
    }

    /// Gives the VMA at `page` the flags and the label of `new`.
    #[inline(never)]
    fn relabel(&mut self, page: Page, new: &Candidate) {
        if let Some((id, mut vma)) = self.find(page) {
            (vma.flags, vma.label) = (new.flags, new.label);
            self.write(id, &vma);
        }
    }

    /// The neighbours that a range joins, were it a VMA like `new`: none of them is `but`, and there is one after it only where `right` says so.
    #[inline(never)]
    fn joined(
        &self,
        range: PageRange,
        new: &Candidate,
        but: Option<VmaId>,
        right: bool,
    ) -> (Option<VmaId>, Option<VmaId>) {
        let other = |page: Option<Page>| {
            let found = page.and_then(|page| self.find(page));
            found.filter(|(id, _)| Some(*id) != but)
        };
        let previous = other(range.first().checked_sub(1));
        let next = other(range.last().checked_add(1).filter(|_| right));
        let vma = |found: &Option<Found>| found.map(|(_, vma)| vma);
        let joins = joins(
            new,
            range.count(),
            vma(&previous).as_ref(),
            vma(&next).as_ref(),
        );
        let id = |found: Option<Found>| found.map(|(id, _)| id);
        (
            id(previous).filter(|_| joins.left),
            id(next).filter(|_| joins.right),
        )
    }

    /// Lets a free range become part of the neighbours that it joins; there is at least one.
    fn merge(
        &mut self,
        range: PageRange,
        new: &Candidate,
        previous: Option<VmaId>,
        next: Option<VmaId>,
    ) {
        let Some(id) = previous.or(next) else {
            return;
        };
        let Some((old, gone, vma)) = self.merged(range, new, previous, next) else {
            return;
        };
        if let (Some(next), Some(gone)) = (next, gone) {
            self.lock(next);
            self.put(gone, None);
        }
        self.reshape(id, old, &vma);
    }

    /// What becomes of the neighbours that a range joins: the range of the one that is kept, that of the one that ends, and the VMA
    /// that comes of them.
    #[inline(never)]
    fn merged(
        &self,
        range: PageRange,
        new: &Candidate,
        previous: Option<VmaId>,
        next: Option<VmaId>,
    ) -> Option<(PageRange, Option<PageRange>, Vma)> {
        let previous = previous.and_then(|id| read(Handle::of_vma(id.0)));
        let next = next.and_then(|id| read(Handle::of_vma(id.0)));
        let (_, kept) = previous.or(next)?;
        let gone = match (previous, next) {
            (Some(_), Some((_, next))) => Some(next.range),
            _ => None,
        };
        let range = next.map_or(range, |(_, next)| range.hull(next.range));
        let others = next.map_or(new.flags, |(_, next)| new.flags | next.flags);
        let flags = kept.flags | others & VmFlags::STICKY;
        let anon = kept
            .anon
            .or(new.anon)
            .or(next.and_then(|(_, next)| next.anon));
        let (range, offset) = match previous {
            Some(_) => (kept.range.hull(range), kept.offset),
            None => (range, new.offset),
        };
        let vma = Vma {
            range,
            offset,
            anon,
            flags,
            ..kept
        };
        Some((kept.range, gone, vma))
    }

    /// Takes an end of a VMA, or all of it, away from it.
    #[inline(never)]
    fn give_away(&mut self, id: VmaId, range: PageRange) {
        let Some((_, vma)) = read(Handle::of_vma(id.0)) else {
            return;
        };
        match difference(vma.range, range) {
            [None, None] => {
                self.lock(id);
                self.put(vma.range, None);
            }
            [Some(rest), _] | [_, Some(rest)] => self.reshape(id, vma.range, &vma.part(rest)),
        }
    }
}

/// The parts of `of` below and above `without`.
fn difference(of: PageRange, without: PageRange) -> [Option<PageRange>; 2] {
    let below = without
        .first()
        .checked_sub(1)
        .and_then(|last| PageRange::new(of.first(), last.min(of.last())))
        .filter(|_| of.first() < without.first());
    let above = without
        .last()
        .checked_add(1)
        .and_then(|first| PageRange::new(first.max(of.first()), of.last()))
        .filter(|_| of.last() > without.last());
    [below, above]
}
