//! Closures of the caller that unwind in the middle of an edit: the tree is whole afterwards, and nothing is lost.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::{Heap, Model, count, page};
use kmem_hal::{Page, PageRange, SingleGrace};
use kmem_vma_tree::{Exclusive, Finger, RangeTree, SharedTree};

/// A generator that any run repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1);
        (self.0 >> 33) % limit
    }

    /// A range of few pages mostly, of hundreds now and then, and what it is to become.
    fn edit(&mut self) -> (PageRange, Option<u64>, bool) {
        let pages = if self.below(6) == 0 { 200 } else { 12 };
        let range = count(self.below(900), 1 + self.below(pages));
        let value = (self.below(3) > 0).then(|| self.below(3));
        (range, value, self.below(2) == 0)
    }
}

/// Unwinds with the `left`-th call.
fn removed(left: &mut u64) {
    *left -= 1;
    if *left == 0 {
        // Without a message: it is no failure.
        resume_unwind(Box::new(()));
    }
}

macro_rules! edit {
    ($tree:expr, $range:expr, $value:expr, $merged:expr, $left:expr) => {
        catch_unwind(AssertUnwindSafe(|| match $value {
            Some(value) if $merged => {
                let stored = $tree.store_merged($range, value, &mut |_| removed($left));
                stored.map(|_| ()).unwrap();
            }
            value => $tree.store($range, value, &mut |_| removed($left)).unwrap(),
        }))
        .is_err()
    };
}

fn after(model: &Model, range: PageRange, value: Option<u64>, merged: bool) -> Model {
    let mut model = model.clone();
    match value {
        Some(value) if merged => {
            model.store_merged(range, value);
        }
        value => {
            model.store(range, value);
        }
    }
    model
}

const EDITS: u64 = if cfg!(miri) { 60 } else { 3000 };

fn of_ones_own<const W: usize>() {
    let (heap, mut random, mut unwound) = (Heap::default(), Random(1), 0);
    {
        let mut tree: RangeTree<u64, &Heap, Exclusive, W> = RangeTree::new_in(&heap);
        let mut model = Model::default();
        for _ in 0..EDITS {
            let (range, value, merged) = random.edit();
            let next = after(&model, range, value, merged);
            let left = &mut (1 + random.below(6));
            if edit!(tree, range, value, merged, left) {
                unwound += 1;
                // All of the edit, or nothing.
                if !tree.iter().eq(next.entries.iter().copied()) {
                    assert!(tree.iter().eq(model.entries.iter().copied()));
                    tree.check().unwrap();
                    continue;
                }
            }
            model = next;
            tree.check().unwrap();
            assert!(tree.iter().eq(model.entries.iter().copied()));
        }
    }
    assert!(unwound > EDITS / 20, "{unwound}");
    assert_eq!(heap.live.get(), 0, "nodes leaked");
}

fn beside_readers<const W: usize>() {
    let (heap, mut random, mut unwound) = (Heap::default(), Random(2), 0);
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    {
        let mut tree: SharedTree<u64, &Heap, &SingleGrace, W> = SharedTree::new_in(&heap, &grace);
        let (mut writer, readers) = tree.split();
        let mut model = Model::default();
        let mut finger = Finger::new();
        for round in 0..EDITS {
            let (range, value, merged) = random.edit();
            model = after(&model, range, value, merged);
            let left = &mut (1 + random.below(6));
            let at = page(random.below(900));
            let section = readers.read();
            // So that the finger remembers what the edit may replace.
            let _ = section.get_with(&mut finger, at);
            // What was removed is shown when readers see the change already.
            unwound += u64::from(edit!(writer, range, value, merged, left));
            writer.check().unwrap();
            assert!(writer.iter().eq(model.entries.iter().copied()));
            let seen = section.entries_from(Page::ZERO);
            assert!(seen.eq(model.entries.iter().copied()));
            assert_eq!(section.get_with(&mut finger, at), model.get(at));
            drop(section);
            if round % 100 == 0 {
                writer.quiesce();
                assert_eq!(writer.garbage(), 0);
            }
        }
    }
    assert!(unwound > EDITS / 20, "{unwound}");
    assert_eq!(heap.live.get(), 0, "nodes leaked");
}

#[test]
fn a_tree_of_ones_own_is_whole_when_a_closure_unwound() {
    of_ones_own::<32>();
    of_ones_own::<8>();
}

#[test]
fn a_shared_tree_is_whole_when_a_closure_unwound() {
    beside_readers::<32>();
    beside_readers::<8>();
}

/// A `modify` that unwinds holds no nodes back for pieces that never come.
#[test]
fn a_change_that_unwinds_gives_its_nodes_back() {
    let heap = Heap::default();
    let mut tree: RangeTree<u64, &Heap> = RangeTree::new_in(&heap);
    for i in 0..1000 {
        tree.store(count(4 * i, 3), Some(i), &mut |_| ()).unwrap();
    }
    let live = heap.live.get();
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        tree.modify(PageRange::ALL, &mut |piece, _| {
            if piece.value == 500 {
                resume_unwind(Box::new(()));
            }
            Some(piece.value + 10_000)
        })
    }));
    assert!(unwound.is_err());
    tree.check().unwrap();
    assert!(
        heap.live.get() <= live + 8,
        "{} and {live}",
        heap.live.get()
    );
}
