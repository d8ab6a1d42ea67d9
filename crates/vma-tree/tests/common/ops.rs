//! Operations on a tree and on the model, for the property test and the fuzz target.

use kmem_hal::{AllocError, Page, PageRange, SingleGrace};
use kmem_vma_tree::{Entry, Finger, Gap, GapRequest, RangeTree, Reserved, SharedTree, Sharing};

use super::{Heap, Model, Request, count};

/// An operation on both.
#[derive(Clone, Debug)]
pub enum Op {
    Store(PageRange, u64),
    Erase(PageRange),
    Merged(PageRange, u64),
    Modify(PageRange, u64),
    Clear,
}

type Tree<'h, const W: usize> = RangeTree<u64, &'h Heap, kmem_vma_tree::Exclusive, W>;

/// What `modify` does here: depends on the piece, so that order and clipping matter.
fn change(piece: Entry<u64>, by: u64) -> Option<u64> {
    match by {
        5 => None,
        4 if piece.first().number().is_multiple_of(2) => None,
        4 => Some(piece.value),
        by => Some((piece.value + by) % 4),
    }
}

/// The calls are the same on a tree of one's own and on the writer of a shared one.
macro_rules! run {
    ($tree:expr, $model:expr, $op:expr) => {{
        let (tree, model) = ($tree, $model);
        let mut removed = Vec::new();
        match *$op {
            Op::Store(range, value) => tree
                .store(range, Some(value), &mut |piece| removed.push(piece))
                .map(|()| assert_eq!(removed, model.store(range, Some(value)))),
            Op::Erase(range) => tree
                .store(range, None, &mut |piece| removed.push(piece))
                .map(|()| assert_eq!(removed, model.store(range, None))),
            Op::Merged(range, value) => tree
                .store_merged(range, value, &mut |piece| removed.push(piece))
                .map(|entry| assert_eq!((entry, removed), model.store_merged(range, value))),
            Op::Modify(range, by) => tree
                .modify(range, &mut |piece, around| {
                    if let Some(below) = around.below {
                        assert!(below.last() < piece.first());
                    }
                    if let Some(above) = around.above {
                        assert!(piece.last() < above.first());
                    }
                    change(piece, by)
                })
                .map(|()| model.modify(range, |piece| change(piece, by))),
            Op::Clear => {
                tree.clear();
                model.entries.clear();
                Ok(())
            }
        }
    }};
}

fn same<const W: usize>(tree: &Tree<'_, W>, model: &Model) {
    tree.check().unwrap();
    assert_eq!(tree.len(), model.entries.len());
    assert_eq!(tree.is_empty(), model.entries.is_empty());
    assert!(
        tree.iter().eq(model.entries.iter().copied()),
        "{tree:?}\n{model:?}"
    );
    assert!(tree.iter().rev().eq(model.entries.iter().rev().copied()));
}

fn same_answers<S: Sharing, const W: usize>(
    tree: &RangeTree<u64, &Heap, S, W>,
    model: &Model,
    finger: &mut Finger<u64>,
    at: u64,
    request: &Request,
) {
    for at in [
        at,
        at.wrapping_add(1),
        at.wrapping_sub(1),
        0,
        Page::MAX.number(),
    ] {
        let at = Page::from_number(at);
        assert_eq!(tree.get(at), model.get(at));
        // Found once, found again, and found often.
        for _ in 0..3 {
            assert_eq!(tree.get_with(finger, at), model.get(at));
        }
        assert_eq!(tree.first_at_or_after(at), model.first_at_or_after(at));
        assert_eq!(tree.last_before(at), model.last_before(at));
    }
    let inside: Vec<_> = model
        .entries
        .iter()
        .copied()
        .filter(|e| e.range.overlaps(request.limits))
        .collect();
    assert!(tree.range(request.limits).eq(inside.iter().copied()));
    assert!(
        tree.range(request.limits)
            .rev()
            .eq(inside.iter().rev().copied())
    );
    let gaps: Vec<_> = tree.gaps(request.limits).collect();
    assert!(
        gaps.iter()
            .map(|gap| gap.range)
            .eq(model.gaps(request.limits))
    );
    for gap in gaps {
        let beside = |page: Option<Page>| page.and_then(|page| model.get(page));
        if gap.range.first() > request.limits.first() {
            assert_eq!(gap.below, beside(gap.range.first().checked_sub(1)));
        }
        if gap.range.last() < request.limits.last() {
            assert_eq!(gap.above, beside(gap.range.last().checked_add(1)));
        }
    }
    // A search with a predicate is shown each gap that is large enough, with the entries beside it.
    for up in [true, false] {
        let asked = GapRequest::new(request.pages.min(3)).limits(request.limits);
        let mut shown = Vec::new();
        let mut note = |gap: &Gap<u64>| {
            shown.push(*gap);
            None
        };
        let found = if up {
            tree.find_gap_up_with(&asked, &mut note)
        } else {
            tree.find_gap_down_with(&asked, &mut note)
        };
        assert_eq!(found, None);
        let mut gaps = model.gaps(request.limits);
        gaps.retain(|gap| gap.count() >= asked.pages());
        if !up {
            gaps.reverse();
        }
        let expected = gaps.into_iter().map(|range| {
            // Free pages outside of the limits are beside it where those clip it.
            let beside = |page: Option<Page>| page.and_then(|page| model.get(page));
            let (low, high) = (range.first(), range.last());
            Gap {
                range,
                below: beside(low.checked_sub(1)),
                above: beside(high.checked_add(1)),
            }
        });
        assert!(shown.iter().copied().eq(expected), "{shown:?}");
    }
    let largest = model
        .gaps(PageRange::ALL)
        .iter()
        .map(|gap| gap.count())
        .max();
    assert_eq!(tree.largest_gap(), largest.unwrap_or(0));
    for up in [true, false] {
        let asked = request.gap_request();
        let found = if up {
            tree.find_gap_up(&asked)
        } else {
            tree.find_gap_down(&asked)
        };
        assert_eq!(
            found,
            model.find_gap(request, up),
            "up {up} {request:?}\n{model:?}"
        );
    }
}

/// Front and back taken in turns, as `turns` says, give every entry once.
fn both_ends<const W: usize>(tree: &Tree<'_, W>, model: &Model, turns: u64) {
    let (mut iter, mut left) = (tree.iter(), &model.entries[..]);
    for turn in 0.. {
        let (found, expected) = if turns >> (turn % 64) & 1 == 0 {
            let expected = left.first().copied();
            left = left.get(1..).unwrap_or(&[]);
            (iter.next(), expected)
        } else {
            let expected = left.last().copied();
            left = left.get(..left.len().saturating_sub(1)).unwrap_or(&[]);
            (iter.next_back(), expected)
        };
        assert_eq!(found, expected);
        if expected.is_none() {
            break;
        }
    }
}

/// Leaves of a tree of one's own lie in any order; a tree that is shared has them sorted, and says the same, whether it was
/// made of one or takes one over.
fn shares<const W: usize>(tree: &Tree<'_, W>, model: &Model) {
    let heap = Heap::default();
    {
        let copy = || tree.duplicate_in(&heap, &mut |entry| Some(entry.value));
        // SAFETY: one thread runs the test.
        let grace = unsafe { SingleGrace::new() };
        let made = SharedTree::from_tree(copy().unwrap(), &grace);
        let taken_over = SharedTree::new_in(&heap, &grace);
        // SAFETY: there is no other writer.
        let mut writer = unsafe { taken_over.writer() };
        writer.store(count(7, 30), Some(9), &mut |_| ()).unwrap();
        // SAFETY: all nodes are of one heap.
        unsafe { writer.adopt(copy().unwrap()) };
        for shared in [&made, &taken_over] {
            // SAFETY: there is no other writer that is used from here on.
            unsafe { shared.writer() }.check().unwrap();
            let section = shared.read();
            let all = section.entries_from(Page::ZERO);
            assert!(all.eq(model.entries.iter().copied()));
            for entry in &model.entries {
                assert_eq!(section.get(entry.last()), Some(*entry));
            }
        }
    }
    assert_eq!(heap.live.get(), 0, "nodes leaked");
}

pub fn differential<const W: usize>(ops: &[Op], asks: &[(u64, Request)], turns: u64) {
    let heap = Heap::default();
    {
        let mut tree: Tree<'_, W> = RangeTree::new_in(&heap);
        let mut model = Model::default();
        let mut finger = Finger::new();
        for (index, op) in ops.iter().enumerate() {
            run!(&mut tree, &mut model, op).unwrap();
            same(&tree, &model);
            let (at, request) = &asks[index % asks.len()];
            same_answers(&tree, &model, &mut finger, *at, request);
        }
        both_ends(&tree, &model, turns);
        shares(&tree, &model);
        let copy = tree
            .duplicate_in(&heap, &mut |entry| {
                (entry.value != 1).then_some(entry.value + 1)
            })
            .unwrap();
        copy.check().unwrap();
        let kept = model.entries.iter().filter(|entry| entry.value != 1);
        assert!(copy.iter().eq(kept.map(|entry| Entry {
            value: entry.value + 1,
            ..*entry
        })));
    }
    assert_eq!(heap.live.get(), 0, "nodes leaked");
}

/// Lets the allocation of every number fail in turn: each failed call leaves the tree as it was.
pub fn failing<const W: usize>(ops: &[Op]) {
    let heap = Heap::default();
    {
        let mut tree: Tree<'_, W> = RangeTree::new_in(&heap);
        let mut model = Model::default();
        for op in ops {
            for allowed in 0.. {
                heap.left.set(Some(allowed));
                let before = model.clone();
                let done = run!(&mut tree, &mut model, op);
                heap.left.set(None);
                same(&tree, &model);
                if done.is_ok() {
                    break;
                }
                assert_eq!(done, Err(AllocError::OutOfMemory));
                assert_eq!(model, before);
            }
        }
        for allowed in 0.. {
            heap.left.set(Some(allowed));
            let copy = tree.duplicate_in(&heap, &mut |entry| Some(entry.value));
            heap.left.set(None);
            if let Ok(copy) = copy {
                assert!(copy.iter().eq(tree.iter()));
                break;
            }
        }
    }
    assert_eq!(heap.live.get(), 0, "nodes leaked");
}

/// A shared tree with a reader inside all the time, which lets go now and then: what it found stays as it was.
///
/// Each allocation fails in turn, as in [`failing`].
pub fn differential_shared<const W: usize>(ops: &[Op], asks: &[(u64, Request)]) {
    let heap = Heap::default();
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    {
        let mut tree: SharedTree<u64, &Heap, &SingleGrace, W> = SharedTree::new_in(&heap, &grace);
        let (mut writer, readers) = tree.split();
        let mut model = Model::default();
        let mut finger = Finger::new();
        for (round, ops) in ops.chunks(7).enumerate() {
            // The walk holds leaves of the tree as it is now.
            let section = readers.read();
            let before = model.clone();
            let mut walk = section.entries_from(Page::ZERO);
            let first = walk.next();
            assert_eq!(first, before.entries.first().copied());
            // Every entry that the tree had while the section was open, and those that it had all the time.
            let mut states = before.entries.clone();
            let mut unchanged = before.entries.clone();
            for op in ops {
                for allowed in 0.. {
                    heap.left.set(Some(allowed));
                    let before = model.clone();
                    let done = run!(&mut writer, &mut model, op);
                    heap.left.set(None);
                    writer.check().unwrap();
                    if done.is_ok() {
                        break;
                    }
                    assert_eq!(done, Err(AllocError::OutOfMemory));
                    assert_eq!(model, before);
                }
                assert!(writer.iter().eq(model.entries.iter().copied()));
                assert_eq!(writer.len(), model.entries.len());
                states.extend(&model.entries);
                unchanged.retain(|entry| model.entries.contains(entry));
                let (at, request) = &asks[round % asks.len()];
                same_answers(&writer, &model, &mut finger, *at, request);
                for at in [*at, 0, at.wrapping_mul(3) % 500, Page::MAX.number()] {
                    let at = Page::from_number(at);
                    assert_eq!(section.get(at), model.get(at));
                    assert_eq!(section.get_with(&mut finger, at), model.get(at));
                    assert_eq!(section.first_at_or_after(at), model.first_at_or_after(at));
                }
                let now = section.entries_from(Page::ZERO);
                assert!(now.eq(model.entries.iter().copied()));
            }
            // The old walk goes on: ascending, each page once.
            let mut free = first.map_or(0, |entry| entry.last().number() + 1);
            let rest: Vec<_> = walk.collect();
            // What stayed as it was is given whole (R3).
            for entry in unchanged.iter().filter(|entry| Some(**entry) != first) {
                assert!(rest.contains(entry), "{entry:?} was passed over");
            }
            for entry in rest {
                assert!(entry.first().number() >= free);
                // As it was at some moment, or what is left of that above the pages that were passed.
                let known = states.iter().any(|state| {
                    let below_passed =
                        entry.first().number() == free && state.first() < entry.first();
                    (state.first() == entry.first() || below_passed)
                        && (state.last(), state.value) == (entry.last(), entry.value)
                });
                // A `modify` passes through states that the model does not record.
                let modified = ops.iter().any(|op| matches!(op, Op::Modify(..)));
                assert!(known || modified, "{entry:?} was never in the tree");
                free = entry.last().number() + 1;
            }
            drop(section);
            let copy = writer.duplicate_in(&heap, &mut |entry| Some(entry.value));
            same(&copy.unwrap(), &model);
            if round % 3 == 0 {
                writer.quiesce();
                assert_eq!(writer.garbage(), 0);
            }
        }
    }
    assert_eq!(heap.live.get(), 0, "nodes leaked");
}

/// A store, which merges or not.
type Stored = (PageRange, Option<u64>, bool);

fn store_all<S: Sharing, const W: usize>(
    mut reserved: Reserved<'_, u64, &Heap, S, W>,
    model: &mut Model,
    stores: &[Stored],
) {
    for &(range, value, merged) in stores {
        if let Some(value) = value.filter(|_| merged) {
            let entry = reserved.store_merged(range, value, &mut |_| ());
            assert_eq!(entry, model.store_merged(range, value).0);
        } else {
            reserved.store(range, value, &mut |_| ());
            model.store(range, value);
        }
    }
    assert_eq!(reserved.stores_left(), 0);
}

/// As many stores as were reserved go through when there is no memory at all.
pub fn reserved<const W: usize>(fill: &[Op], stores: &[Stored]) {
    let heap = Heap::default();
    let mut tree: Tree<'_, W> = RangeTree::new_in(&heap);
    let mut model = Model::default();
    for op in fill {
        run!(&mut tree, &mut model, op).unwrap();
    }
    let reserved = tree.reserve(stores.len()).unwrap();
    heap.left.set(Some(0));
    store_all(reserved, &mut model, stores);
    heap.left.set(None);
    same(&tree, &model);
    // And on a shared tree, where a reader lets nothing be reused.
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    let mut shared: SharedTree<u64, &Heap, &SingleGrace, W> = SharedTree::new_in(&heap, &grace);
    let (mut writer, readers) = shared.split();
    let mut model = Model::default();
    for op in fill {
        run!(&mut writer, &mut model, op).unwrap();
    }
    let section = readers.read();
    let reserved = writer.reserve(stores.len()).unwrap();
    heap.left.set(Some(0));
    store_all(reserved, &mut model, stores);
    heap.left.set(None);
    assert!(
        section
            .entries_from(Page::ZERO)
            .eq(model.entries.iter().copied())
    );
    drop(section);
    writer.check().unwrap();
}
