//! Models of readers beside a writer: every interleaving of small trees, nodes of three ranges and three children.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p kmem-vma-tree --test loom_readers --release`. Each model is a few
//! edits against a few lookups; every answer must be one that the tree gave at some moment. The same models with a bug
//! on purpose must fail.
#![cfg(loom)]

use std::alloc::{Layout, alloc};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;

use kmem_hal::sync::{AtomicUsize, Ordering, fence, spin_loop};
use kmem_hal::{AllocError, Deferred, Grace, ObjectAlloc, Page, PageRange};
use kmem_vma_tree::{Entry, Finger, Node, Plant, RangeTree, SharedTree};

/// Three ranges a leaf, three children an inner node.
const WORDS: usize = 8;

/// Memory that is never given back while a model runs, so that a stale pointer reads a stale node, not a fault.
struct Leak;

// SAFETY: B1: fresh memory every time; B2: fails never; B3: freed memory is left alone.
unsafe impl<T> ObjectAlloc<T> for Leak {
    const TYPE_STABLE: bool = true;
    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        // SAFETY: nodes have a size.
        NonNull::new(unsafe { alloc(Layout::new::<T>()) }.cast()).ok_or(AllocError::OutOfMemory)
    }
    unsafe fn free(&self, _object: NonNull<T>) {}
}

/// The plainest grace period: a count of readers; a call waits until it is zero.
struct Count {
    inside: AtomicUsize,
    waiting: loom::sync::Mutex<Vec<Deferred>>,
}

struct Inside<'a>(&'a Count);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::Release);
    }
}

// SAFETY: G1, G2: the fences order a reader's entry against the writer's look at the count: either the writer counts the
// reader, or the reader sees what the writer unlinked; G3: Release and Acquire on the count; G4 does not matter here.
unsafe impl Grace for Count {
    type Guard<'a> = Inside<'a>;

    fn read(&self) -> Inside<'_> {
        self.inside.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Inside(self)
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        self.waiting.lock().unwrap().push(call);
        self.poll();
        Ok(())
    }
    fn poll(&self) -> usize {
        fence(Ordering::SeqCst);
        if self.inside.load(Ordering::Acquire) != 0 {
            return 0;
        }
        let calls = std::mem::take(&mut *self.waiting.lock().unwrap());
        let made = calls.len();
        for call in calls {
            // SAFETY: nobody is inside, and whoever enters now does not find what was unlinked.
            unsafe { call.run() };
        }
        made
    }
    fn synchronize(&self) {
        while self.pending() != 0 {
            if self.poll() == 0 {
                spin_loop();
            }
        }
    }
    fn pending(&self) -> usize {
        self.waiting.lock().unwrap().len()
    }
}

type Tree = SharedTree<u64, Leak, Count, WORDS>;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, last: u64) -> PageRange {
    PageRange::new(page(first), page(last)).unwrap()
}

fn tree(entries: &[(u64, u64, u64)], bug: Plant) -> Arc<Tree> {
    let grace = Count {
        inside: AtomicUsize::new(0),
        waiting: loom::sync::Mutex::new(Vec::new()),
    };
    let tree = Tree::with_bug(Leak, grace, bug);
    {
        // SAFETY: no thread has the tree yet.
        let mut writer = unsafe { tree.writer() };
        for &(first, last, value) in entries {
            writer
                .store(pages(first, last), Some(value), &mut |_| ())
                .unwrap();
        }
    }
    Arc::new(tree)
}

/// Explores `readers` threads that run `read` beside one that runs `write`.
fn explore(
    entries: &'static [(u64, u64, u64)],
    bug: Plant,
    readers: usize,
    write: fn(&mut kmem_vma_tree::Writer<'_, u64, Leak, Count, WORDS>),
    read: fn(&Tree),
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.max_branches = 100_000;
    builder.check(move || {
        let shared = tree(entries, bug);
        let threads: Vec<_> = (0..readers)
            .map(|_| {
                let shared = Arc::clone(&shared);
                loom::thread::spawn(move || read(&shared))
            })
            .collect();
        {
            // SAFETY: this thread is the one writer.
            let mut writer = unsafe { shared.writer() };
            write(&mut writer);
        }
        for thread in threads {
            thread.join().unwrap();
        }
        // SAFETY: the readers are gone.
        let writer = unsafe { shared.writer() };
        writer.check().unwrap();
    });
}

fn finds(bug: Plant, model: fn(Plant)) {
    let found = catch_unwind(AssertUnwindSafe(|| model(bug)));
    assert!(found.is_err(), "the model does not find {bug:?}");
}

fn store(
    writer: &mut kmem_vma_tree::Writer<'_, u64, Leak, Count, WORDS>,
    first: u64,
    last: u64,
    value: Option<u64>,
) {
    writer
        .store(pages(first, last), value, &mut |_| ())
        .unwrap();
}

fn flat(entry: Option<Entry<u64>>) -> Option<(u64, u64, u64)> {
    entry.map(|e| (e.first().number(), e.last().number(), e.value))
}

/// One leaf: a range is punched and put back with another value.
fn in_a_leaf(bug: Plant) {
    explore(
        &[(0, 9, 1), (20, 29, 2)],
        bug,
        1,
        |writer| {
            store(writer, 4, 5, None);
            store(writer, 0, 9, Some(3));
        },
        |tree| {
            let section = tree.read();
            let first = flat(section.get(page(4)));
            assert!(
                [Some((0, 9, 1)), None, Some((0, 9, 3))].contains(&first),
                "{first:?}"
            );
            let second = flat(section.get(page(8)));
            assert!(
                [Some((0, 9, 1)), Some((6, 9, 1)), Some((0, 9, 3))].contains(&second),
                "{second:?}"
            );
            // Time does not run backwards.
            assert!(first != Some((0, 9, 3)) || second == Some((0, 9, 3)));
            assert!(first.is_some() || second != Some((0, 9, 1)));
            assert_eq!(flat(section.get(page(25))), Some((20, 29, 2)));
        },
    );
}

/// One leaf: a range loses its lower end, another is written over at its upper end.
fn at_an_end(bug: Plant) {
    explore(
        &[(0, 9, 1), (20, 29, 2)],
        bug,
        1,
        |writer| {
            store(writer, 0, 3, None);
            store(writer, 26, 29, Some(3));
        },
        |tree| {
            let section = tree.read();
            let late = flat(section.get(page(27)));
            assert!(
                [Some((20, 29, 2)), Some((26, 29, 3))].contains(&late),
                "{late:?}"
            );
            let below = flat(section.get(page(22)));
            assert!(
                below == Some((20, 25, 2)) || (below == Some((20, 29, 2)) && late == below),
                "{below:?}"
            );
            let early = flat(section.get(page(5)));
            assert!(
                early == Some((4, 9, 1)) || (early == Some((0, 9, 1)) && late == Some((20, 29, 2))),
                "{early:?}"
            );
        },
    );
}

/// A full leaf is split under a new root, and joined again: growth and shrinking of the root.
fn root_grows_and_shrinks(bug: Plant) {
    explore(
        &[(0, 9, 1), (20, 29, 2), (40, 49, 3)],
        bug,
        1,
        |writer| {
            store(writer, 30, 31, Some(4));
            store(writer, 20, 49, None);
        },
        |tree| {
            let section = tree.read();
            assert_eq!(flat(section.get(page(5))), Some((0, 9, 1)));
            let upper = flat(section.get(page(45)));
            assert!(upper.is_none() || upper == Some((40, 49, 3)));
            let new = flat(section.get(page(30)));
            assert!(
                new.is_none() || (new == Some((30, 31, 4)) && upper.is_some()) || upper.is_some()
            );
            assert_eq!(flat(section.get(page(9))), Some((0, 9, 1)));
        },
    );
}

/// A leaf below an inner node is split; the parent is replaced.
fn a_leaf_splits(bug: Plant) {
    explore(
        &[
            (0, 1, 1),
            (10, 11, 2),
            (20, 21, 3),
            (30, 31, 4),
            (40, 41, 5),
        ],
        bug,
        1,
        |writer| {
            store(writer, 5, 5, Some(6));
            store(writer, 15, 15, Some(7));
        },
        |tree| {
            let section = tree.read();
            for (at, value) in [(1, 1), (11, 2), (21, 3), (40, 5)] {
                assert_eq!(section.get(page(at)).map(|e| e.value), Some(value));
            }
            let late = section.get(page(15)).is_some();
            let early = section.get(page(5)).is_some();
            assert!(early || !late, "the second edit is seen, the first is not");
        },
    );
}

/// Leaves are joined and freed, and their memory is used again.
fn leaves_join_and_are_reused(bug: Plant) {
    explore(
        &[(0, 1, 1), (10, 11, 2), (20, 21, 3), (30, 31, 4)],
        bug,
        1,
        |writer| {
            store(writer, 10, 11, None);
            store(writer, 20, 21, None);
            store(writer, 50, 51, Some(5));
            store(writer, 60, 61, Some(6));
            writer.quiesce();
            store(writer, 70, 71, Some(7));
        },
        |tree| {
            let section = tree.read();
            assert_eq!(flat(section.get(page(31))), Some((30, 31, 4)));
            let gone = flat(section.get(page(20)));
            assert!(gone.is_none() || gone == Some((20, 21, 3)));
        },
    );
}

/// The last range of a leaf goes and the next leaf takes its pages: boundaries move inside a hole.
fn boundaries_move(bug: Plant) {
    explore(
        &[
            (0, 1, 1),
            (10, 11, 2),
            (20, 21, 3),
            (30, 31, 4),
            (40, 41, 5),
        ],
        bug,
        1,
        |writer| {
            store(writer, 10, 11, None);
            store(writer, 9, 12, Some(6));
        },
        |tree| {
            let section = tree.read();
            let first = flat(section.get(page(11)));
            assert!(
                [Some((10, 11, 2)), None, Some((9, 12, 6))].contains(&first),
                "{first:?}"
            );
            let second = flat(section.get(page(11)));
            assert!(first.is_some() || second != Some((10, 11, 2)));
            assert!(first != Some((9, 12, 6)) || second == first);
            let above = flat(section.first_at_or_after(page(13)));
            assert_eq!(above, Some((20, 21, 3)));
        },
    );
}

/// The last range of a leaf loses its last page, and the boundary above it follows: whom the boundary tells that the page is free must not
/// find the range as it was before.
fn a_boundary_goes_down(bug: Plant) {
    explore(
        &[
            (0, 1, 1),
            (10, 11, 2),
            (20, 21, 3),
            (30, 31, 4),
            (40, 41, 5),
        ],
        bug,
        1,
        |writer| store(writer, 21, 21, None),
        |tree| {
            let section = tree.read();
            let gone = flat(section.get(page(21)));
            let left = flat(section.get(page(20)));
            let before = Some((20, 21, 3));
            assert!(gone.is_none() || gone == before, "{gone:?}");
            assert!(left == Some((20, 20, 3)) || (left == before && gone == before));
        },
    );
}

/// The same for a walk.
fn a_walk_over_a_boundary(bug: Plant) {
    explore(
        &[
            (0, 1, 1),
            (10, 11, 2),
            (20, 21, 3),
            (30, 31, 4),
            (40, 41, 5),
        ],
        bug,
        1,
        |writer| store(writer, 21, 21, None),
        |tree| {
            let section = tree.read();
            let gone = flat(section.first_at_or_after(page(21)));
            let left = flat(section.get(page(20)));
            assert!([Some((20, 21, 3)), Some((30, 31, 4))].contains(&gone));
            assert!(gone == Some((20, 21, 3)) || left == Some((20, 20, 3)));
        },
    );
}

/// A finger: what it remembers is forgotten when the reader knows that the edit is over.
fn a_finger_beside_edits(bug: Plant) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.max_branches = 100_000;
    builder.check(move || {
        let shared = tree(&[(0, 9, 1), (20, 29, 2)], bug);
        let over = Arc::new(AtomicUsize::new(0));
        let reader = {
            let (shared, over) = (Arc::clone(&shared), Arc::clone(&over));
            loom::thread::spawn(move || {
                let mut finger = Finger::new();
                let section = shared.read();
                let look = |finger: &mut Finger<u64>| flat(section.get_with(finger, page(4)));
                let first = look(&mut finger);
                assert!([Some((0, 9, 1)), Some((0, 9, 3))].contains(&first));
                if over.load(Ordering::Acquire) == 1 {
                    assert_eq!(look(&mut finger), Some((0, 9, 3)));
                }
            })
        };
        {
            // SAFETY: this thread is the one writer.
            let mut writer = unsafe { shared.writer() };
            store(&mut writer, 0, 9, Some(3));
        }
        over.store(1, Ordering::Release);
        reader.join().unwrap();
    });
}

/// A finger does not answer with what an edit replaced that the reader has seen already.
fn a_finger_after_a_lookup(bug: Plant) {
    explore(
        &[(0, 9, 1), (20, 29, 2)],
        bug,
        1,
        |writer| {
            store(writer, 0, 9, Some(3));
            store(writer, 20, 22, None);
        },
        |tree| {
            let section = tree.read();
            let mut finger = Finger::new();
            let look = |finger: &mut Finger<u64>, at| flat(section.get_with(finger, page(at)));
            let first = look(&mut finger, 4);
            let seen = flat(section.get(page(4)));
            let again = look(&mut finger, 4);
            let (before, after) = (Some((0, 9, 1)), Some((0, 9, 3)));
            assert!(first == before || first == after);
            assert!(seen == after || seen == before && first == before);
            assert!(again == after || again == before && seen == before);
        },
    );
}

/// Two readers beside the writer.
fn two_readers(bug: Plant) {
    explore(
        &[(0, 9, 1), (20, 29, 2), (40, 49, 3)],
        bug,
        2,
        |writer| store(writer, 4, 24, Some(4)),
        |tree| {
            let section = tree.read();
            let first = section.get(page(6)).map(|e| e.value);
            let second = section.get(page(22)).map(|e| e.value);
            // Both pages change in one moment.
            assert!(
                [(Some(1), Some(2)), (Some(1), Some(4)), (Some(4), Some(4))]
                    .contains(&(first, second))
            );
            assert_eq!(section.get(page(45)).map(|e| e.value), Some(3));
        },
    );
}

/// A walk for /proc while the entries change.
fn a_walk_gives_each_page_once(bug: Plant) {
    explore(
        &[(0, 9, 1), (20, 29, 2), (40, 49, 3), (60, 69, 4)],
        bug,
        1,
        |writer| {
            store(writer, 5, 24, None);
            store(writer, 20, 49, Some(5));
        },
        |tree| {
            let section = tree.read();
            let mut free = 0;
            let mut last = 0;
            for entry in section.entries_from(Page::ZERO) {
                assert!(entry.first().number() >= free);
                free = entry.last().number() + 1;
                last = entry.value;
                assert!(entry.value <= 5 && entry.value > 0);
            }
            assert_eq!((free, last), (70, 4));
        },
    );
}

#[test]
fn reader_beside_edits_in_a_leaf() {
    in_a_leaf(Plant::Nothing);
}

#[test]
fn reader_beside_edits_at_an_end() {
    at_an_end(Plant::Nothing);
}

#[test]
fn reader_beside_a_growing_and_shrinking_root() {
    root_grows_and_shrinks(Plant::Nothing);
}

#[test]
fn reader_beside_a_split() {
    a_leaf_splits(Plant::Nothing);
}

#[test]
fn reader_beside_joining_and_reuse() {
    leaves_join_and_are_reused(Plant::Nothing);
}

#[test]
fn reader_beside_moving_boundaries() {
    boundaries_move(Plant::Nothing);
}

#[test]
fn reader_beside_a_boundary_that_goes_down() {
    a_boundary_goes_down(Plant::Nothing);
}

#[test]
fn walk_over_a_boundary_that_goes_down() {
    a_walk_over_a_boundary(Plant::Nothing);
}

#[test]
fn finger_beside_a_writer() {
    a_finger_beside_edits(Plant::Nothing);
}

#[test]
fn finger_after_a_lookup() {
    a_finger_after_a_lookup(Plant::Nothing);
}

#[test]
fn two_readers_and_a_writer() {
    two_readers(Plant::Nothing);
}

#[test]
fn walk_beside_a_writer() {
    a_walk_gives_each_page_once(Plant::Nothing);
}

#[test]
fn a_missing_publish_fence_is_found() {
    // (Under a model that reuses nodes the half-written ones hold wild pointers, and the model ends in a crash.)
    finds(Plant::NoPublishFence, in_a_leaf);
    finds(Plant::NoPublishFence, at_an_end);
    finds(Plant::NoPublishFence, root_grows_and_shrinks);
}

#[test]
fn a_root_loaded_without_acquire_is_found() {
    finds(Plant::NoRootAcquire, in_a_leaf);
    finds(Plant::NoRootAcquire, at_an_end);
}

#[test]
fn a_child_loaded_without_acquire_is_found() {
    finds(Plant::NoChildAcquire, a_leaf_splits);
}

#[test]
fn a_boundary_moved_without_release_is_found() {
    finds(Plant::NoBoundaryRelease, a_boundary_goes_down);
    finds(Plant::NoBoundaryRelease, a_walk_over_a_boundary);
}

#[test]
fn a_boundary_seen_without_acquire_is_found() {
    finds(Plant::NoBoundaryAcquire, a_boundary_goes_down);
    finds(Plant::NoBoundaryAcquire, a_walk_over_a_boundary);
}

#[test]
fn an_edit_counted_without_release_is_found() {
    finds(Plant::NoEditsRelease, a_finger_beside_edits);
}

#[test]
fn a_count_of_edits_loaded_without_acquire_is_found() {
    finds(Plant::NoEditsAcquire, a_finger_beside_edits);
}

#[test]
fn an_edit_that_fingers_are_not_told_of_is_found() {
    finds(Plant::NoBeginning, a_finger_after_a_lookup);
}

#[test]
fn reuse_without_a_grace_period_is_found() {
    finds(Plant::NoGrace, leaves_join_and_are_reused);
}

#[test]
fn editing_under_readers_is_found() {
    finds(Plant::InPlace, in_a_leaf);
    finds(Plant::InPlace, at_an_end);
}

/// A tree that is not shared works under loom's atomics too.
#[test]
fn alone() {
    loom::model(|| {
        let mut tree: RangeTree<u64, _, _, WORDS> = RangeTree::new_in(Leak);
        tree.store(pages(0, 9), Some(1), &mut |_| ()).unwrap();
        assert_eq!(tree.get(page(3)).map(|e| e.value), Some(1));
        let _: Option<Node<WORDS>> = None;
    });
}
