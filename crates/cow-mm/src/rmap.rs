//! From a frame to the entries that map it: the reverse map.
//!
//! A page's slot says what it is a page of; the list of spaces says who may map that.
//!
//! ```text
//!   anonymous   slot: family 7, index 0x55554 ──> spaces of family 7 ──> VMA over page 0x55554? leaf? is it the frame?
//!                                                                    └─> else every VMA whose offsets cover the index (mremap)
//!   file        slot: object 12, index 3 ──> spaces whose filter has bit 12 ──> every VMA of object 12 that covers index 3
//! ```
//!
//! A family is all that fork made from one space. An anonymous page gets from one space into another in no other way, so nobody else can map
//! it. Nothing is kept for each page or VMA: a mapping needs no memory beyond its entry, and cannot fail for want of it.
//!
//! Invariants
//! - `I1`: an anonymous page's index is the offset of its VMA at the page (`I2` of the VMA), which does not change as the VMA moves; so a
//!   VMA of the family that maps the page covers the index.
//! - `I2`: the walk holds the list's lock throughout, so no space comes or goes, and each space's lock while it looks at its VMAs;
//!   parents before their children (`I3` of the registry), so that it misses no copy which a fork makes meanwhile.
//! - `I3`: a leaf that is found is looked at again under its table's lock before it is changed.
//!
//! Costs: for an anonymous page of a space that never forked, one look-up; in a family, one for each member until every mapping is found.
//! Linux's chains of `anon_vma` reach fewer spaces, and cost two allocations for each VMA at each fork.
//!
//! Context: no lock of a space held; may wait for those of others.
//!
//! Source: Linux `mm/rmap.c` (what has to be found).

use core::ops::ControlFlow;

use kmem_hal::{Frame, FrameTag, Order, Page, PageRange};
use kmem_paging::{Cleared, Entry as TableEntry, Leaf, Payload};

use crate::env::Env;
use crate::flags::VmFlags;
use crate::mm::{Mm, PageRef};
use crate::mutants::mutant;
use crate::object::FileRef;
use crate::registry::First;
use crate::space::{AddressSpace, Core};
use crate::vma::Vma;

/// What a page is a page of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// Anonymous memory of a family of spaces.
    Anonymous { family: u32, index: u64 },
    /// A page of an object.
    Object { number: u32, index: u64 },
}

/// A page of a VMA where a frame may be mapped.
pub(crate) struct Candidate<'a, 'm, E: Env> {
    pub spaces: &'a First,
    pub space: &'a AddressSpace<'m, E>,
    pub vma: &'a Vma,
    pub page: Page,
    /// Whether it was shown before, unless its page came there since.
    pub again: bool,
}

/// What the mappings of a page have in common.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Looked {
    /// Leaves found; those of shared tables as often as spaces see them.
    pub found: u32,
    /// Whether one had been accessed since it was last looked at.
    pub accessed: bool,
    /// Whether one says that the page was written.
    pub dirty: bool,
    /// Whether a mapping keeps the page in memory.
    pub locked: bool,
    /// Whether the table of one is shared.
    pub shared: bool,
    /// Whether a mapping lets its pages go at any time.
    pub droppable: bool,
}

/// Why a leaf stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Its mapping is locked.
    Locked,
    /// The page was pinned since it was looked at.
    Pinned,
    /// What should stand in its place cannot be said or counted.
    Unencodable,
}

impl<'m, E: Env> Mm<'m, E> {
    /// What a frame that the caller keeps referenced is a page of; `None` for one that no reverse map finds.
    pub(crate) fn identity(&self, frame: Frame) -> Option<Identity> {
        let page = self.user(frame);
        let (owner, index) = (page.object(), page.page());
        if owner == 0 {
            return None;
        }
        Some(match page.slot().tag() {
            FrameTag::Anon => Identity::Anonymous {
                family: owner,
                index,
            },
            _ => Identity::Object {
                number: owner,
                index,
            },
        })
    }

    /// Shows every page of every VMA where a page with this identity may be mapped, until `visit` breaks.
    ///
    /// Of anonymous memory first the places where most pages are, and then all, those once more: between the two mremap may bring home what
    /// was elsewhere. Of each space all places are shown under one lock, so no mapping passes a walk that goes to its end.
    pub(crate) fn for_each_candidate(
        &self,
        spaces: &First,
        identity: Identity,
        mut visit: impl FnMut(&Candidate<'_, 'm, E>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        match identity {
            Identity::Anonymous { family, index } => {
                let own = |core: &Core<'m, E>| core.entry.family() == family;
                // Where it was made: nearly always the only place.
                self.for_each_space(spaces, own, |space| {
                    let Some(page) = Page::new(index) else {
                        return ControlFlow::Continue(());
                    };
                    let state = space.read();
                    match state.vmas.get(page).filter(|vma| is_home(vma, index, page)) {
                        Some(vma) => visit(&Candidate {
                            spaces,
                            space,
                            vma: &vma,
                            page,
                            again: false,
                        }),
                        None => ControlFlow::Continue(()),
                    }
                })?;
                self.for_each_space(spaces, own, |space| {
                    let state = space.read();
                    for vma in state.vmas.iter() {
                        if vma.is_shared() || vma.anon.is_none() {
                            continue;
                        }
                        let Some(page) = page_of(&vma, index) else {
                            continue;
                        };
                        visit(&Candidate {
                            spaces,
                            space,
                            vma: &vma,
                            page,
                            again: is_home(&vma, index, page),
                        })?;
                    }
                    ControlFlow::Continue(())
                })
            }
            Identity::Object { number, index } => {
                let any = |_: &Core<'m, E>| true;
                self.for_each_space(spaces, any, |space| {
                    let state = space.read();
                    if !state.vmas.may_map(number) {
                        return ControlFlow::Continue(());
                    }
                    for vma in state.vmas.iter() {
                        let ours = |file: FileRef| self.object_number(file) == number;
                        if !vma.file.is_some_and(ours) {
                            continue;
                        }
                        let Some(page) = page_of(&vma, index) else {
                            continue;
                        };
                        visit(&Candidate {
                            spaces,
                            space,
                            vma: &vma,
                            page,
                            again: false,
                        })?;
                    }
                    ControlFlow::Continue(())
                })
            }
        }
    }

    pub(crate) fn for_each_space(
        &self,
        spaces: &First,
        wanted: impl Fn(&Core<'m, E>) -> bool,
        mut visit: impl FnMut(&AddressSpace<'m, E>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        for core in spaces.iter(self) {
            // SAFETY: the borrow of the list keeps its lock (`I2`).
            let space = unsafe { AddressSpace::borrowed(core) };
            if wanted(space.core()) {
                visit(&space)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Looks at every mapping of a page, and clears the accessed bits where `forget` says so.
    #[doc(alias = "folio_referenced")]
    pub(crate) fn look_at_mappings(&self, frame: Frame, forget: bool) -> Looked {
        let mut looked = Looked::default();
        let Some(identity) = self.identity(frame) else {
            return looked;
        };
        let mappings = self.user(frame).mappings();
        let spaces = self.registry().lock();
        let _ = self.for_each_candidate(&spaces, identity, |place| {
            if place.again {
                // Counted. What moved meanwhile is seen next time.
                return ControlFlow::Continue(());
            }
            let Ok(mut cursor) = place.space.tables().cursor(PageRange::single(place.page)) else {
                return ControlFlow::Continue(());
            };
            let (entry, shared) = cursor.look(place.page);
            let TableEntry::Leaf(leaf) = entry else {
                return ControlFlow::Continue(());
            };
            if leaf.frame != frame || leaf.order != Order::ZERO {
                return ControlFlow::Continue(());
            }
            looked.found += 1;
            looked.shared |= shared;
            looked.dirty |= leaf.attributes.dirty;
            looked.locked |= place.vma.flags.contains(VmFlags::LOCKED);
            looked.droppable |= place.vma.flags.contains(VmFlags::DROPPABLE);
            looked.accessed |= leaf.attributes.accessed;
            if forget && (leaf.attributes.accessed || shared) {
                cursor.clear_accessed(place.page);
                place.space.core().entry.note_aged();
            }
            // A shared table's leaf is counted once and found more often.
            if looked.found >= mappings && !looked.shared {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        looked
    }

    /// Makes CPUs set accessed bits again that were cleared: one flush for each space that had some.
    pub(crate) fn flush_aged(&self) {
        let spaces = self.registry().lock();
        let aged = |core: &Core<'m, E>| core.entry.take_aged();
        let _ = self.for_each_space(&spaces, aged, |space| {
            space.tables().flush_accessed();
            ControlFlow::Continue(())
        });
    }

    /// Takes a page, to which the caller holds a reference, out of every table. What stands in its place `instead` says for each leaf
    /// ([`None`] inside for nothing); it refuses to leave the leaf and the rest alone.
    ///
    /// Translations are flushed everywhere, and mappings given back, when this returns. The leaves' dirty bits are collected in
    /// the answer.
    ///
    /// # Errors
    ///
    /// [`Refused`] where some mappings are left; those that were taken stay taken.
    #[doc(alias = "try_to_unmap")]
    pub(crate) fn unmap_everywhere(
        &self,
        spaces: &First,
        frame: Frame,
        mut instead: impl FnMut(&Leaf) -> Result<Option<Payload>, Refused>,
    ) -> Result<bool, Refused> {
        let mut dirty = false;
        let mut outcome = Ok(());
        let Some(identity) = self.identity(frame) else {
            return Ok(false);
        };
        let _ = self.for_each_candidate(spaces, identity, |place| {
            match self.unmap_one(place, frame, &mut instead) {
                Ok(Some(leaf)) => dirty |= leaf.attributes.dirty,
                Ok(None) => {}
                Err(refused) => {
                    outcome = Err(refused);
                    return ControlFlow::Break(());
                }
            }
            match self.user(frame).mappings() {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        outcome.map(|()| dirty)
    }

    /// Takes a page out of one table, if it is there; the leaf as it was last.
    fn unmap_one(
        &self,
        place: &Candidate<'_, 'm, E>,
        frame: Frame,
        instead: &mut impl FnMut(&Leaf) -> Result<Option<Payload>, Refused>,
    ) -> Result<Option<Leaf>, Refused> {
        let page = place.page;
        let tables = place.space.tables();
        let Ok(mut cursor) = tables.cursor(PageRange::single(page)) else {
            return Ok(None);
        };
        let (entry, shared) = cursor.look(page);
        let TableEntry::Leaf(leaf) = entry else {
            return Ok(None);
        };
        if leaf.frame != frame || leaf.order != Order::ZERO {
            return Ok(None);
        }
        if place.vma.flags.contains(VmFlags::LOCKED) && !mutant!("locked-page-goes") {
            return Err(Refused::Locked);
        }
        let payload = instead(&leaf)?;
        if shared {
            let taken = self.with_announced(place, shared, || {
                // SAFETY: all tables that may lead here were announced, and are flushed before the handle is used: the list is
                // locked, so there are no others.
                let taken = unsafe { cursor.take_shared(page, frame, payload) };
                cursor.release();
                taken
            });
            let taken = taken.map(|(leaf, mapping): (Leaf, PageRef)| {
                self.put(mapping);
                leaf
            });
            if taken.is_none() {
                // The table was exchanged for a copy meanwhile; the entry that was counted is not made.
                payload.inspect(|&payload| self.drop_payload(payload));
            }
            return Ok(taken);
        }
        // The table is this space's own, and locked by the cursor since the look.
        let mut gather = tables.gather::<1>();
        let mut taken = None;
        match payload {
            Some(payload) => match cursor.set_payload(page, payload, &mut gather) {
                Ok(TableEntry::Leaf(leaf)) => taken = Some(leaf),
                _ => self.drop_payload(payload),
            },
            None => {
                let _ = cursor.unmap_with(PageRange::single(page), &mut gather, |cleared| {
                    if let Cleared::Leaf(leaf) = cleared {
                        taken = Some(leaf);
                    }
                });
            }
        }
        cursor.release();
        gather.commit(|mapping: PageRef| self.put(mapping));
        Ok(taken)
    }

    /// Takes dirty bits and the right to write from every mapping of a page, flushed, so that the next write of anybody faults.
    #[doc(alias = "folio_mkclean")]
    pub(crate) fn clean_mappings(&self, frame: Frame) {
        let Some(identity) = self.identity(frame) else {
            return;
        };
        if self.user(frame).mappings() == 0 || mutant!("cleaned-page-stays-writable") {
            return;
        }
        let spaces = self.registry().lock();
        let _ = self.for_each_candidate(&spaces, identity, |place| {
            let tables = place.space.tables();
            let Ok(mut cursor) = tables.cursor(PageRange::single(place.page)) else {
                return ControlFlow::Continue(());
            };
            // Another page's, or clean already, as a shared table's entry is after the first space that sees it: calls that take away, in part
            // or whole, hold the space's lock until they have flushed, so no CPU remembers more.
            let (entry, shared) = cursor.look(place.page);
            let unclean =
                |leaf: Leaf| leaf.frame == frame && (leaf.is_writable() || leaf.attributes.dirty);
            if entry.leaf().is_some_and(unclean) {
                self.with_announced(place, shared, || {
                    let _ = cursor.clean_shared(place.page, frame);
                    cursor.release();
                });
            }
            ControlFlow::Continue(())
        });
    }

    /// Changes a candidate's entry, which other spaces see if its table is `shared`: those to which that may have come by fork. The change
    /// is announced in their tables before, and flushed in all of them when this returns.
    #[inline(always)]
    fn with_announced<R>(
        &self,
        place: &Candidate<'_, 'm, E>,
        shared: bool,
        change: impl FnOnce() -> R,
    ) -> R {
        let (spaces, page, here) = (place.spaces, place.page, place.space.core());
        let is_here = |core: &Core<'m, E>| core::ptr::eq(core, here);
        let sees = |core: &Core<'m, E>| match shared {
            true => core.entry.family() == here.entry.family(),
            false => is_here(core),
        };
        let _ = self.for_each_space(spaces, sees, |space| {
            core::mem::forget(space.tables().announce_foreign(page));
            ControlFlow::Continue(())
        });
        let changed = change();
        let flushed = |core: &Core<'m, E>| {
            sees(core) && (is_here(core) || !mutant!("shared-entry-flushed-for-one"))
        };
        let _ = self.for_each_space(spaces, flushed, |space| {
            // SAFETY: one was forgotten above for each of these spaces: nobody joins the list or a family while it is locked.
            unsafe { space.tables().resume_foreign(page) }.commit();
            ControlFlow::Continue(())
        });
        changed
    }
}

/// Whether a private VMA without a file has the page of its index at that very address.
fn is_home(vma: &Vma, index: u64, page: Page) -> bool {
    vma.is_anonymous()
        && !vma.is_shared()
        && page.number() == index
        && vma.object_page(page) == index
}

/// The page of a VMA at an offset of its object, if it covers that.
#[doc(alias = "vma_address")]
fn page_of(vma: &Vma, index: u64) -> Option<Page> {
    let into = index.checked_sub(vma.offset)?;
    (into < vma.range.count()).then(|| Page::new(vma.range.first().number() + into))?
}
