//! What a reader costs: loads, and nothing else, also while the writer stands still in the middle of an edit.
//!
//! Run with `RUSTFLAGS="--cfg kmem_counting" cargo test -p kmem-vma-tree --test counting`.
#![cfg(kmem_counting)]

mod common;

use std::alloc::{Layout, alloc, dealloc};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;

use common::{count, page};
use kmem_hal::sync::{Counts, counts, reset_counts};
use kmem_hal::{AllocError, Deferred, Grace, ObjectAlloc, Page};
use kmem_vma_tree::{Finger, Readers, SharedTree};

/// A grace period that never ends before it is told to: its guards cost nothing, so that what is counted is the lookup.
#[derive(Default)]
struct Held {
    calls: RefCell<Vec<Deferred>>,
}

// SAFETY: G1, G2: calls are made in `synchronize` only, which these tests call when no section is open; G3: one thread;
// G4: a guard is nothing.
unsafe impl Grace for Held {
    type Guard<'a> = ();
    fn read(&self) {}
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        self.calls.borrow_mut().push(call);
        Ok(())
    }
    fn poll(&self) -> usize {
        0
    }
    fn synchronize(&self) {
        for call in self.calls.take() {
            // SAFETY: no section is open.
            unsafe { call.run() };
        }
    }
    fn pending(&self) -> usize {
        self.calls.borrow().len()
    }
}

/// The host's heap, which runs a closure at every call: there the writer stands still, half-way.
#[derive(Default)]
struct Stops {
    stop: RefCell<Option<Box<dyn FnMut()>>>,
    stops: Cell<usize>,
}

impl Stops {
    fn stop(&self) {
        if let Some(mut stop) = self.stop.take() {
            self.stops.set(self.stops.get() + 1);
            stop();
            *self.stop.borrow_mut() = Some(stop);
        }
    }
}

// SAFETY: B1: the host's heap; B2: fails never; B3: not type-stable.
unsafe impl<T> ObjectAlloc<T> for Stops {
    const TYPE_STABLE: bool = false;
    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        self.stop();
        // SAFETY: nodes have a size.
        NonNull::new(unsafe { alloc(Layout::new::<T>()) }.cast()).ok_or(AllocError::OutOfMemory)
    }
    unsafe fn free(&self, object: NonNull<T>) {
        self.stop();
        // SAFETY: the object came from `alloc`.
        unsafe { dealloc(object.as_ptr().cast(), Layout::new::<T>()) }
    }
}

/// Every way to look, once; what it cost.
fn look(readers: Readers<'_, u64, &Stops, &Held>, finger: &mut Finger<u64>) -> Counts {
    reset_counts();
    let section = readers.read();
    for at in (0..2000).step_by(37) {
        let found = section.get(page(at));
        assert!(found.is_none_or(|entry| entry.range.contains(page(at))));
        let _ = section.get_with(finger, page(at));
        let _ = section.first_at_or_after(page(at));
    }
    // The upper half is never edited.
    assert_eq!(
        section
            .entries_from(page(1000))
            .map(|entry| entry.value)
            .sum::<u64>(),
        100 * 7
    );
    counts()
}

#[test]
fn a_lookup_stores_nothing_and_takes_no_lock() {
    let (alloc, grace) = (Stops::default(), Held::default());
    let mut tree: SharedTree<u64, _, _> = SharedTree::new_in(&alloc, &grace);
    let (mut writer, readers) = tree.split();
    for i in 0..200 {
        writer
            .store(count(10 * i, 5), Some(7), &mut |_| ())
            .unwrap();
    }
    assert_eq!(look(readers, &mut Finger::new()), Counts::default());
}

#[test]
fn nor_while_the_writer_stands_still_half_way() {
    let (alloc, grace) = (Stops::default(), Held::default());
    let mut tree: SharedTree<u64, _, _> = SharedTree::new_in(&alloc, &grace);
    for i in 0..200 {
        let (mut writer, _) = tree.split();
        writer
            .store(count(10 * i, 5), Some(7), &mut |_| ())
            .unwrap();
    }
    let (mut writer, readers) = tree.split();
    // SAFETY: the closure is taken out of the allocator below, while the tree still lives.
    let forever: Readers<'static, u64, &'static Stops, &'static Held> =
        unsafe { std::mem::transmute(readers) };
    let mut finger = Finger::new();
    *alloc.stop.borrow_mut() = Some(Box::new(move || {
        assert_eq!(look(forever, &mut finger), Counts::default());
    }));
    let mut removals = 0;
    for i in 0..100_u64 {
        // Over leaf boundaries, splitting, joining, and in place.
        let at = (i * 7) % 90;
        let value = (i % 3 == 0).then_some(i);
        writer
            .store(count(10 * at + 2, 1 + (i * 13) % 60), value, &mut |_| {
                // The change is published; the old nodes are not retired yet.
                assert_eq!(look(readers, &mut Finger::new()), Counts::default());
                removals += 1;
            })
            .unwrap();
    }
    assert!(alloc.stops.get() > 50, "{} stops", alloc.stops.get());
    assert!(removals > 100);
    assert_eq!(
        writer
            .range(kmem_hal::PageRange::new(page(1000), Page::MAX).unwrap())
            .count(),
        100
    );
    alloc.stop.take();
    grace.synchronize();
    writer.quiesce();
    assert_eq!(writer.garbage(), 0);
}

#[test]
fn a_lookup_in_a_tree_of_ones_own_costs_the_same() {
    let alloc = Stops::default();
    let mut tree: kmem_vma_tree::RangeTree<u64, _> = kmem_vma_tree::RangeTree::new_in(&alloc);
    for i in 0..200 {
        tree.store(count(10 * i, 5), Some(7), &mut |_| ()).unwrap();
    }
    reset_counts();
    for at in 0..2000 {
        let _ = tree.get(page(at));
    }
    let _ = tree.find_gap_up(&kmem_vma_tree::GapRequest::new(6));
    assert_eq!(counts(), Counts::default());
}
