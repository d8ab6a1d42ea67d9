//! Changes of a leaf from outside of its space, in a table that two spaces share: both see each of them, only the leaf that was meant is
//! changed, the table's live count stays right, and what was announced is flushed.

#![cfg(not(loom))]

#[path = "common/machine.rs"]
mod machine;

use kmem_hal::{DeviceFrame, FlushScope, Frame, Order, Page, PageRange};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, Entry, ForkStep, PageTable, Payload, Rights, TableCache};
use machine::{Machine, TestEnv};

type Table = PageTable<X86_64, &'static TestEnv, DeviceFrame>;

const FIRST: u64 = 0x400;
const READ_ONLY: Rights = Rights::READ.union(Rights::USER);

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

fn frame(number: u64) -> Frame {
    Frame::from_number(number)
}

fn payload(number: u64) -> Payload {
    Payload::new::<X86_64>(number).unwrap()
}

/// Two spaces that share a leaf table with four pages, used and written, in frames of the same numbers.
struct Family {
    machine: Machine,
    parent: Table,
    child: Table,
}

impl Family {
    fn new() -> Self {
        Self::with(Rights::USER_DATA)
    }

    fn with(rights: Rights) -> Self {
        let machine = Machine::new(64);
        let parent = Table::new(machine.env()).unwrap();
        let child = Table::empty_like(machine.env(), &parent).unwrap();
        let all = pages(FIRST, 512);
        let used = Attributes::new(rights).accessed().dirty();
        let mut cursor = parent.cursor(all).unwrap();
        for number in FIRST..FIRST + 4 {
            let handle = DeviceFrame::new(frame(number), Order::ZERO).unwrap();
            cursor.map(page(number), handle, used).unwrap();
        }
        drop(cursor);
        let _ = (parent.root(), child.root());
        let mut gather = parent.gather::<1>();
        // SAFETY: one thread, and no cursor is open.
        let shared =
            unsafe { parent.fork_sharing(&child, all, 1, &mut gather, |_| ForkStep::Stop) };
        assert_eq!(shared, Ok(4));
        gather.commit(drop);
        drop(gather);
        machine.flushes.0.lock().unwrap().clear();
        Self {
            machine,
            parent,
            child,
        }
    }

    fn cursor(&self) -> kmem_paging::Cursor<'_, X86_64, &'static TestEnv, DeviceFrame> {
        self.child.cursor(pages(FIRST, 512)).unwrap()
    }

    /// What both spaces say of a page.
    fn see(&self, number: u64) -> Entry {
        let seen = self.parent.query(page(number));
        assert_eq!(seen, self.child.query(page(number)), "page {number:#x}");
        seen
    }

    fn announced(&self, number: u64, change: impl FnOnce()) {
        let both = [&self.parent, &self.child].map(|table| table.announce_foreign(page(number)));
        change();
        for announced in both {
            announced.commit();
        }
    }

    /// The child gives its share up; then the parent's table is as full as its live count says.
    fn finish(self, left: u64) {
        self.child
            .destroy(|_, _| panic!("shared"), |_, _| panic!("shared"));
        let all = pages(FIRST, 512);
        let mut gather = self.parent.gather::<8>();
        let mut cursor = self.parent.cursor(all).unwrap();
        assert_eq!(cursor.unmap(all, &mut gather), Ok(left));
        drop((cursor, gather));
        assert_eq!(
            self.parent.table_count(),
            1,
            "the last page took its table along"
        );
        self.parent.destroy(|_, _| {}, |_, _| {});
        TableCache::shrink(self.machine.env(), usize::MAX);
        assert_eq!(self.machine.frames.out(), 0, "tables leaked");
    }
}

#[test]
fn a_look_says_what_the_entry_says_and_whether_others_have_it() {
    let family = Family::new();
    let mut cursor = family.cursor();
    let (entry, shared) = cursor.look(page(FIRST));
    assert!(shared && entry.leaf().unwrap().is_writable());
    let seen = cursor.query(page(FIRST)).leaf().unwrap();
    assert!(!seen.is_writable(), "nobody writes below a shared table");
    assert_eq!(cursor.look(page(FIRST + 600)), (Entry::Empty, false));
    // Runs show what a write would find.
    let run = cursor.next_run().unwrap();
    assert!(matches!(run, kmem_paging::Run::Leaves { first, .. } if !first.is_writable()));
    drop(cursor);
    family.finish(4);
}

#[test]
fn a_leaf_is_taken_from_both() {
    let family = Family::new();
    let take = |number: u64, of: u64, instead| {
        let mut taken = None;
        family.announced(number, || {
            // SAFETY: both tables announced it.
            taken = unsafe {
                family
                    .cursor()
                    .take_shared(page(number), frame(of), instead)
            };
        });
        taken
    };
    assert_eq!(take(FIRST, FIRST + 1, None), None, "another frame's");
    assert!(family.see(FIRST).leaf().is_some());
    let (leaf, handle) = take(FIRST, FIRST, None).unwrap();
    assert_eq!((leaf.frame, handle.first()), (frame(FIRST), frame(FIRST)));
    assert!(leaf.attributes.dirty);
    assert_eq!(family.see(FIRST), Entry::Empty);
    assert_eq!(take(FIRST, FIRST, None), None, "it is gone");
    assert!(take(FIRST + 1, FIRST + 1, Some(payload(9))).is_some());
    assert_eq!(family.see(FIRST + 1), Entry::Payload(payload(9)));
    // One flush of the page in each space, for each time.
    let flushes = family.machine.flushes.0.lock().unwrap().clone();
    assert_eq!(flushes.len(), 8);
    for (flush, number) in flushes
        .iter()
        .zip([FIRST, FIRST, FIRST, FIRST, FIRST, FIRST, FIRST + 1])
    {
        let range = pages(number, 1);
        assert_eq!(flush.scope, FlushScope::Pages { range, stride: 1 });
    }
    family.finish(3);
}

#[test]
fn a_payload_gives_way_to_its_page_and_to_no_other() {
    let family = Family::new();
    family.announced(FIRST, || {
        // SAFETY: both tables announced it.
        let taken = unsafe {
            family
                .cursor()
                .take_shared(page(FIRST), frame(FIRST), Some(payload(7)))
        };
        assert!(taken.is_some());
    });
    let attributes = Attributes::new(READ_ONLY).accessed();
    let handle = DeviceFrame::new(frame(0x99), Order::ZERO).unwrap();
    let mut cursor = family.cursor();
    for (number, other) in [(FIRST, 8), (FIRST + 1, 7), (FIRST + 9, 7)] {
        let refused = cursor.restore(page(number), payload(other), handle, attributes);
        assert_eq!(refused, Err(handle), "page {number:#x}");
        assert!(!cursor.clear_shared(page(number), payload(other)));
    }
    assert_eq!(family.child.query(page(FIRST)), Entry::Payload(payload(7)));
    assert_eq!(
        cursor.restore(page(FIRST), payload(7), handle, attributes),
        Ok(())
    );
    drop(cursor);
    let leaf = family.see(FIRST).leaf().unwrap();
    assert_eq!((leaf.frame.number(), leaf.attributes), (0x99, attributes));
    // Dropped, where nobody wants it any more.
    let mut cursor = family.cursor();
    family.announced(FIRST, || {
        // SAFETY: both tables announced it.
        let taken = unsafe { cursor.take_shared(page(FIRST), frame(0x99), Some(payload(5))) };
        assert!(taken.is_some());
    });
    assert!(cursor.clear_shared(page(FIRST), payload(5)));
    drop(cursor);
    assert_eq!(family.see(FIRST), Entry::Empty);
    family.finish(3);
}

#[test]
fn a_page_that_is_cleaned_is_written_to_by_nobody_unseen() {
    let family = Family::new();
    let clean = |number: u64, of: u64| {
        let mut found = None;
        family.announced(number, || {
            found = family.cursor().clean_shared(page(number), frame(of));
        });
        found
    };
    assert_eq!(clean(FIRST, FIRST + 1), None, "another frame's");
    assert!(family.see(FIRST).leaf().unwrap().attributes.dirty);
    assert_eq!(clean(FIRST, FIRST), Some(true));
    assert_eq!(clean(FIRST, FIRST), Some(false));
    assert_eq!(clean(FIRST + 9, FIRST), None, "a hole");
    let mut cursor = family.cursor();
    let leaf = cursor.look(page(FIRST)).0.leaf().unwrap();
    assert!(!leaf.attributes.dirty && leaf.attributes.accessed && !leaf.is_writable());
    let next = cursor.look(page(FIRST + 1)).0.leaf().unwrap();
    assert!(next.attributes.dirty && next.is_writable(), "its neighbour");
    drop(cursor);
    family.finish(4);
}

#[test]
fn accessed_bits_are_cleared_and_set_again_after_a_flush() {
    let family = Family::new();
    let mut cursor = family.cursor();
    assert!(cursor.clear_accessed(page(FIRST)));
    assert!(
        !cursor.clear_accessed(page(FIRST)),
        "nobody was there since"
    );
    assert!(!cursor.clear_accessed(page(FIRST + 9)), "a hole");
    let leaf = cursor.look(page(FIRST)).0.leaf().unwrap();
    assert!(!leaf.attributes.accessed && leaf.attributes.dirty && leaf.is_writable());
    drop(cursor);
    let flushes = || family.machine.flushes.0.lock().unwrap().clone();
    assert!(flushes().is_empty(), "ageing tells nobody");
    family.child.flush_accessed();
    let flushed = flushes();
    assert_eq!(flushed.len(), 1);
    assert_eq!(flushed[0].scope, FlushScope::Space);
    family.finish(4);
}

/// An announcement that was forgotten makes whoever fills a hole flush it, until it is resumed and committed.
#[test]
fn an_announcement_counts_until_it_is_committed() {
    let family = Family::new();
    let table = &family.parent;
    let flushes = || std::mem::take(&mut *family.machine.flushes.0.lock().unwrap());
    let fill = |number: u64| {
        let handle = DeviceFrame::new(frame(number), Order::ZERO).unwrap();
        let mut cursor = table.cursor(pages(number, 1)).unwrap();
        cursor.map(page(number), handle, READ_ONLY).unwrap();
        flushes()
    };
    assert!(fill(0x800).is_empty());
    std::mem::forget(table.announce_foreign(page(FIRST)));
    let settled = fill(0x801);
    assert_eq!(settled.len(), 1);
    // What was there before may have been of any kind.
    assert!(settled[0].global && settled[0].scope == FlushScope::Everything);
    // SAFETY: forgotten above, and resumed once.
    unsafe { table.resume_foreign(page(FIRST)) }.commit();
    assert_eq!(flushes().len(), 1);
    assert!(fill(0x802).is_empty());
    let range = pages(0x800, 3);
    let mut gather = table.gather::<4>();
    assert_eq!(
        table.cursor(range).unwrap().unmap(range, &mut gather),
        Ok(3)
    );
    drop(gather);
    family.finish(4);
}

#[test]
fn a_global_page_that_changes_from_outside_is_flushed_as_one() {
    for rights in [Rights::USER_DATA, Rights::USER_DATA | Rights::GLOBAL] {
        let family = Family::with(rights);
        family.announced(FIRST, || {
            let cleaned = family.cursor().clean_shared(page(FIRST), frame(FIRST));
            assert_eq!(cleaned, Some(true));
        });
        let flushes = family.machine.flushes.0.lock().unwrap().clone();
        let global = rights.contains(Rights::GLOBAL);
        assert_eq!(flushes.len(), 2);
        assert!(flushes.iter().all(|flush| flush.global == global));
        family.finish(4);
    }
}
