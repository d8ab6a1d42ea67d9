//! Changing the leaves of a range in place: rights, memory types, software bits, accessed and dirty bits.
//!
//! Which changes ask for a flush (x86; other formats may ask for more):
//!
//! | change | flush |
//! |---|---|
//! | a right is added, software bits | none: the processor walks again before it faults |
//! | a right is taken away, memory type, key | yes |
//! | a page becomes global | yes: it may be cached under another tag, where later flushes of global pages miss it |
//! | dirty cleared | yes: a CPU that remembers it as dirty would not set it again |
//! | accessed cleared | none: ageing only gets less exact (Linux does the same) |
//!
//! Source: Intel SDM volume 3A, 4.10.4.2 (when no invalidation is needed), 4.8 (accessed and dirty flags).

use kmem_hal::{Page, PageRange, Trace, TraceEvent};

use super::leaf::{Change, Restricted, Unencodable, change_entry};
use super::{Cursor, Divisible};
use crate::attributes::{Attributes, Leaf, Rights};
use crate::env::Env;
use crate::error::ChangeError;
use crate::format::{Format, Kind, Patch, Word, level};
use crate::gather::{Gather, Stale};
use crate::mutants::mutant;
use crate::node::Node;
use crate::quiescent::{Liveness, patch_present};
use crate::table::{Entry, decode, index_at};

enum Step {
    Done,
    Next(u64),
    Split(u64),
    Unencodable(u64),
}

impl<'t, F: Format, E: Env, H: Divisible, S: Liveness> Cursor<'t, F, E, H, S> {
    /// Gives every leaf in `range` these rights; gives how many pages changed.
    ///
    /// # Errors
    ///
    /// As [`update`](Self::update).
    #[doc(alias = "change_protection")]
    #[doc(alias = "pte_modify")]
    #[inline(always)]
    pub fn protect<const N: usize>(
        &mut self,
        range: PageRange,
        rights: Rights,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<u64, ChangeError> {
        // A leaf of the held leaf table: no walk.
        let page = range.first();
        if page == range.last()
            && let Some(node) = self.held_leaf(page)
            && gather.belongs_to(self.table)
            && let Some(patch) = F::rights_patch(1, rights)
            && let Some(changed) = self.patch_one(node, page.number(), patch, rights, gather)
        {
            return Ok(changed);
        }
        self.protect_slowly(range, rights, gather)
    }

    #[inline(never)]
    fn protect_slowly<const N: usize>(
        &mut self,
        range: PageRange,
        rights: Rights,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Result<u64, ChangeError> {
        self.check_change(range, gather)?;
        self.table.note_global(rights);
        let patch = F::rights_patch(1, rights).map(|patch| (rights, patch));
        let mut change = |number, _, word| Ok(Some(F::with_rights(number, word, rights)));
        self.change_words(range, gather, patch, &mut change)
    }

    /// Gives a present leaf to which the hardware has nothing to write other rights, by a patch of bits; `None` where it is another.
    #[inline(always)]
    fn patch_one<const N: usize>(
        &self,
        node: &Node<'t, F>,
        page: u64,
        patch: Patch,
        rights: Rights,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> Option<u64> {
        let entry = node.leaf_entry(page);
        let word = F::Word::load(entry);
        if !F::is_present(1, word) || !(S::QUIESCENT || F::is_settled(word)) {
            return None;
        }
        self.table.note_global(rights);
        let new = patch.apply(word);
        if patch.needs_flush(word, word) {
            if !mutant!("patch-one-not-noted") {
                gather.announce_page(page, F::is_global(1, word));
            }
            let page = PageRange::single(Page::from_number(page));
            self.table.env().trace().event(TraceEvent::Restricted(page));
        }
        F::Word::store(entry, new);
        Some(u64::from(new != word))
    }

    /// Gives `count` leaves of a leaf table from `page` on other rights, by a patch of bits where they are present; gives how many
    /// changed. The gather was announced.
    ///
    /// Works on runs: leaves to which the hardware has nothing to write (`F4`) are changed by plain stores, others by a locked AND where
    /// bits are only to be cleared. Of a run only the union and the intersection of the words are kept, which say whether it must be
    /// flushed.
    #[inline(always)]
    fn patch_leaves<const N: usize>(
        &self,
        node: &Node<'t, F>,
        page: u64,
        count: usize,
        rights: Rights,
        patch: Patch,
        gather: &mut Gather<'_, F, E, H, N>,
    ) -> u64 {
        let Patch { keep, set, .. } = patch;
        let trace = self.table.env().trace();
        let entries = node.entries(index_at::<F>(page, 1), count);
        let mut changed = 0u64;
        let mut at = 0;
        while at < count {
            let (mut union, mut common) = (0u64, u64::MAX);
            let mut run = 0u64;
            let first = at;
            if S::QUIESCENT {
                let done = patch_present::<F>(&entries[at..], (keep, set));
                (at, run) = (at + done.entries, done.changed);
                (union, common) = (done.union, done.common);
            }
            for entry in &entries[at..] {
                let word = F::Word::load(entry);
                if !F::is_present(1, word) {
                    break;
                }
                let new = word & keep | set;
                if S::QUIESCENT || F::is_settled(word) {
                    F::Word::store(entry, new);
                } else if word & set == set {
                    if new != word {
                        F::Word::and(entry, keep | set);
                    }
                } else {
                    break;
                }
                run += u64::from(new != word);
                union |= word;
                common &= word;
                at += 1;
            }
            changed += run;
            let (noted, both) = (
                !mutant!("patch-not-noted"),
                !mutant!("patch-looks-at-the-union"),
            );
            if run > 0 && noted && patch.needs_flush(union, if both { common } else { union }) {
                let first = Page::from_number(page + first as u64);
                let last = Page::from_number(page + (at as u64 - 1));
                if let Some(range) = PageRange::new(first, last) {
                    gather.note(Stale {
                        range,
                        stride: 1,
                        global: F::is_global(1, union),
                        local: !F::is_global(1, common),
                    });
                    trace.event(TraceEvent::Restricted(range));
                }
            }
            // What ended the run, one by one.
            while at < count {
                let entry = &entries[at];
                let word = F::Word::load(entry);
                if F::is_present(1, word)
                    && (S::QUIESCENT || F::is_settled(word) || word & set == set)
                {
                    break;
                }
                let page = Page::from_number(page + at as u64);
                at += 1;
                if F::kind(1, word) != Kind::Leaf {
                    continue;
                }
                let mut restricted = Restricted::new(gather, 1);
                let mut change = |number, _, word| Ok(Some(F::with_rights(number, word, rights)));
                match change_entry::<F, E, H, S, N>(
                    1,
                    entry,
                    page,
                    word,
                    &mut restricted,
                    &mut change,
                ) {
                    Ok(Change::None) | Err(Unencodable) => {}
                    Ok(Change::Relaxed) => changed += 1,
                    Ok(Change::Restricted) => {
                        changed += 1;
                        trace.event(TraceEvent::Restricted(PageRange::single(page)));
                    }
                }
            }
        }
        changed
    }

    /// Shows every leaf in `range` to `change` and gives it the attributes that this answers; `None` leaves it alone.
    /// Gives how many pages changed.
    ///
    /// `change` is asked again about a leaf whose accessed or dirty bit the hardware set meanwhile; what it clears was
    /// in the leaf that it saw last. It runs under a table's lock: it must not use this table's cursors. Huge leaves that
    /// the range covers in part are split.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Memory`] and [`ChangeError::Indivisible`] where a huge leaf cannot be split; nothing changed. [`ChangeError::Unencodable`] where the
    /// format cannot say what `change` asked for, and [`ChangeError::Shared`] where another space shares the table; what is below was
    /// changed. The others change nothing; it is never [`ChangeError::Full`].
    ///
    /// # Examples
    ///
    /// ```
    /// # mod example { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs")); }
    /// # use example::*;
    /// use kmem_paging::MemoryType;
    ///
    /// // What a device reads must not stay in caches.
    /// let table = mapped(pages(0x400, 2));
    /// let mut gather = table.gather::<1>();
    /// let changed = table.cursor(pages(0x400, 2))?.update(pages(0x400, 2), &mut gather, |leaf| {
    ///     Some(leaf.attributes.memory_type(MemoryType::Uncached))
    /// })?;
    /// assert_eq!(changed, 2);
    /// gather.commit(drop);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn update<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        mut change: impl FnMut(&Leaf) -> Option<Attributes>,
    ) -> Result<u64, ChangeError> {
        self.check_change(range, gather)?;
        let table = self.table;
        self.change_words(range, gather, None, &mut |number, page, word| {
            let Entry::Leaf(leaf) = decode::<F>(page, number, word) else {
                return Ok(None);
            };
            let Some(attributes) = change(&leaf) else {
                return Ok(None);
            };
            if !F::can_encode(number, leaf.frame, &attributes) {
                return Err(Unencodable);
            }
            table.note_global(attributes.rights);
            Ok(Some(F::leaf(number, leaf.frame, &attributes)))
        })
    }

    /// Gives every leaf's word in `range` to `change`, with its level and first page. Where there is a patch of bits, it is
    /// what `change` does to a present leaf of level 1, as are the rights.
    #[inline]
    fn change_words<const N: usize>(
        &mut self,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        patch: Option<(Rights, Patch)>,
        change: &mut impl FnMut(usize, Page, u64) -> Result<Option<u64>, Unencodable>,
    ) -> Result<u64, ChangeError> {
        let mut pages = 0;
        let mut page = range.first().number();
        loop {
            let node = self.seek_own(Page::from_number(page), 1)?;
            if node.level == 1 {
                match self.change_leaves(&node, page, range.last().number(), gather, patch, change)
                {
                    Ok((changed, next)) => {
                        pages += changed;
                        match next {
                            Some(next) => page = next,
                            None => return Ok(pages),
                        }
                        continue;
                    }
                    Err(at) => {
                        return Err(ChangeError::Unencodable {
                            at: Page::from_number(at),
                        });
                    }
                }
            }
            match self.change_table(&node, page, range, gather, change, &mut pages) {
                Step::Done => return Ok(pages),
                Step::Next(next) => page = next,
                Step::Split(next) => {
                    self.split_held(Page::from_number(next), gather)?;
                    page = next;
                }
                Step::Unencodable(at) => {
                    return Err(ChangeError::Unencodable {
                        at: Page::from_number(at),
                    });
                }
            }
        }
    }

    /// Changes the leaves of a leaf table from `page` to `last` or to its end; gives how many pages changed, and where to
    /// go on. Fails at the page of a leaf that cannot be as it should.
    #[inline(always)]
    fn change_leaves<const N: usize>(
        &self,
        node: &Node<'t, F>,
        page: u64,
        last: u64,
        gather: &mut Gather<'_, F, E, H, N>,
        patch: Option<(Rights, Patch)>,
        change: &mut impl FnMut(usize, Page, u64) -> Result<Option<u64>, Unencodable>,
    ) -> Result<(u64, Option<u64>), u64> {
        let index = index_at::<F>(page, 1);
        let room = (level::<F>(1).entries() - index) as u64;
        let count = (last - page + 1).min(room);
        let trace = self.table.env().trace();
        let end = page + (count - 1);
        let next = (end < last).then(|| end + 1);
        if let Some((rights, patch)) = patch {
            // Before the first store that may need it.
            gather.announce();
            let changed = self.patch_leaves(node, page, count as usize, rights, patch, gather);
            return Ok((changed, next));
        }
        let mut restricted = Restricted::new(gather, 1);
        let mut changed = 0;
        for (at, entry) in (page..).zip(node.entries(index, count as usize)) {
            let word = F::Word::load(entry);
            if F::kind(1, word) != Kind::Leaf {
                continue;
            }
            let at = Page::from_number(at);
            match change_entry::<F, E, H, S, N>(1, entry, at, word, &mut restricted, change) {
                Ok(Change::None) => {}
                Ok(Change::Relaxed) => changed += 1,
                Ok(Change::Restricted) => {
                    changed += 1;
                    trace.event(TraceEvent::Restricted(PageRange::single(at)));
                }
                Err(Unencodable) => return Err(at.number()),
            }
        }
        Ok((changed, next))
    }

    /// As `change_leaves`, for tables of any level: finds tables below, and huge leaves that must be split.
    fn change_table<const N: usize>(
        &self,
        node: &Node<'t, F>,
        mut page: u64,
        range: PageRange,
        gather: &mut Gather<'_, F, E, H, N>,
        change: &mut impl FnMut(usize, Page, u64) -> Result<Option<u64>, Unencodable>,
        pages: &mut u64,
    ) -> Step {
        let number = node.level;
        let level = level::<F>(number);
        let covered = 1u64 << level.shift;
        let last = range.last().number();
        let trace = self.table.env().trace();
        let mut index = index_at::<F>(page, number);
        let mut restricted = Restricted::new(gather, number);
        loop {
            let first = page & !(covered - 1);
            let word = node.load(index);
            match F::kind(number, word) {
                Kind::Empty | Kind::Payload => {}
                Kind::Table => return Step::Next(page),
                Kind::Leaf => {
                    if (first < range.first().number() || last - first < covered - 1)
                        && !mutant!("change-cuts-no-leaf")
                    {
                        return Step::Split(page);
                    }
                    let at = Page::from_number(first);
                    match change_entry::<F, E, H, S, N>(
                        number,
                        node.entry(index),
                        at,
                        word,
                        &mut restricted,
                        change,
                    ) {
                        Ok(Change::None) => {}
                        Ok(Change::Relaxed) => *pages += covered,
                        Ok(Change::Restricted) => {
                            *pages += covered;
                            trace.event(TraceEvent::Restricted(super::map::block(
                                at,
                                level.order(),
                            )));
                        }
                        Err(Unencodable) => return Step::Unencodable(first),
                    }
                }
            }
            if last - first < covered {
                return Step::Done;
            }
            page = first + covered;
            index += 1;
            if index == level.entries() {
                return Step::Next(page);
            }
        }
    }
}
