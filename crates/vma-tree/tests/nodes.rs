//! Which nodes an edit takes, writes anew and gives back; what reservations and failures do with them.

mod common;

use common::{Heap, Tree, count, fill, page, pages};
use kmem_hal::{Page, PageRange, SingleGrace};
use kmem_vma_tree::{Entry, GapRequest, Node, RangeTree, SharedTree};

/// A `modify` of ranges that have a leaf each, while a reader lets no node be used again, fails before its first piece or not at all.
#[test]
fn a_change_of_many_leaves_is_made_whole_or_not_at_all() {
    fn run<const W: usize>(touching: bool, change: impl Fn(u64) -> Option<u64>) {
        let heap = Heap::default();
        // SAFETY: one thread runs the test.
        let grace = unsafe { SingleGrace::new() };
        let mut tree: SharedTree<u64, &Heap, &SingleGrace, W> = SharedTree::new_in(&heap, &grace);
        let (mut writer, readers) = tree.split();
        let far = 1_u64 << 44;
        for i in 0..120 {
            let range = count(i * far, if touching { far } else { far - 1 });
            writer.store(range, Some(i), &mut |_| ()).unwrap();
        }
        writer.quiesce();
        let before: Vec<_> = writer.iter().collect();
        let section = readers.read();
        for allowed in (0..).step_by(7) {
            heap.left.set(Some(allowed));
            let done = writer.modify(PageRange::ALL, &mut |piece, _| change(piece.value));
            heap.left.set(None);
            if done.is_ok() {
                break;
            }
            assert!(writer.iter().eq(before.iter().copied()));
        }
        writer.check().unwrap();
        drop(section);
        writer.quiesce();
    }
    for touching in [false, true] {
        run::<32>(touching, |_| None);
        run::<32>(touching, |_| Some(7));
        run::<32>(touching, |value| (value % 3 > 0).then_some(value / 2));
        run::<8>(touching, |_| None);
        run::<8>(touching, |_| Some(7));
        run::<8>(touching, |value| (value % 3 > 0).then_some(value / 2));
    }
}

/// A punch and a merge that stay in a leaf ask for no memory.
#[test]
fn punch_and_merge_allocate_nothing() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..1000);
    // Once each, so that full leaves have split.
    let around = |tree: &mut Tree<'_>| {
        for i in 0..1000 {
            tree.store(count(4 * i + 1, 1), None, &mut |_| ()).unwrap();
            tree.store_merged(count(4 * i + 1, 1), i, &mut |_| ())
                .unwrap();
        }
    };
    around(&mut tree);
    let before = heap.total.get();
    around(&mut tree);
    around(&mut tree);
    assert_eq!(heap.total.get(), before);
    assert_eq!(tree.len(), 1000);
    tree.check().unwrap();
}

/// A full leaf of a tree of one's own is split in place: no node is written anew but the one that is added.
#[test]
fn a_full_leaf_is_split_where_it_stands() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let full = Node::<32>::RANGES as u64;
    fill(&mut tree, (0..full).map(|i| 2 * i));
    assert_eq!((tree.height(), heap.live.get()), (1, 1));
    // It takes a leaf and a root. Where either is not to be had nothing changes.
    let before: Vec<_> = tree.iter().collect();
    for nodes in 0..2 {
        heap.left.set(Some(nodes));
        let stored = tree.store(count(4 * 13, 3), Some(13), &mut |_| ());
        assert!(stored.is_err());
        assert!(tree.iter().eq(before.iter().copied()));
        tree.check().unwrap();
    }
    heap.left.set(None);
    tree.store(count(4 * 13, 3), Some(13), &mut |_| ()).unwrap();
    tree.check().unwrap();
    assert_eq!((tree.height(), heap.live.get()), (2, 3));
    // Fill the holes between, in leaves below a root that is not full: a node for each leaf that is added, no other.
    let (live, mut added) = (heap.live.get(), 0);
    for i in (0..full).map(|i| 2 * i + 1).filter(|&i| i != 13) {
        let leaves = tree.stats().leaves;
        tree.store(count(4 * i, 3), Some(i), &mut |_| ()).unwrap();
        tree.check().unwrap();
        added += tree.stats().leaves - leaves;
    }
    assert_eq!(heap.live.get(), live + added);
    assert!(tree.iter().map(|entry| entry.value).eq(0..2 * full));
}

/// Forty ranges of so many pages, one every 16 pages.
fn forty_of(pages: u64) -> impl Iterator<Item = Entry<u64>> {
    (0..40).map(move |i| Entry {
        range: count(16 * i, pages),
        value: i,
    })
}

/// Forty ranges of three pages, in several leaves.
fn forty(heap: &Heap) -> Tree<'_> {
    let mut tree = Tree::new_in(heap);
    for entry in forty_of(3) {
        tree.store(entry.range, Some(entry.value), &mut |_| ())
            .unwrap();
    }
    assert!(tree.stats().leaves > 2);
    tree
}

/// A heap that grows where its leaf ends takes no node, and neither does what lies above it change.
#[test]
fn a_range_grows_over_the_end_of_its_leaf() {
    let heap = Heap::default();
    let mut tree = forty(&heap);
    heap.left.set(Some(0));
    for more in 3..15 {
        for i in 0..40 {
            tree.store_merged(count(16 * i + more, 1), i, &mut |_| ())
                .unwrap();
            tree.check().unwrap();
        }
    }
    assert!(tree.iter().eq(forty_of(15)));
    let request = GapRequest::new(2).limits(pages(0, 16 * 40 - 2));
    assert_eq!(tree.find_gap_up(&request), None);
    assert_eq!(tree.find_gap_down(&request), None);
}

/// What the writer remembers of its last leaf follows a boundary that moves, up and down: the next edit beside it takes no node.
#[test]
fn an_edit_beside_a_boundary_that_just_moved_takes_no_node() {
    let heap = Heap::default();
    let mut tree = forty(&heap);
    heap.left.set(Some(0));
    // Some of these end a leaf.
    for i in 0..40 {
        for pages in 4..7 {
            tree.store(count(16 * i, pages), Some(i), &mut |_| ())
                .unwrap();
            tree.check().unwrap();
        }
        let end = count(16 * i + 5, 1);
        for value in [None, Some(99), None] {
            tree.store(end, value, &mut |_| ()).unwrap();
            tree.check().unwrap();
        }
    }
    assert!(tree.iter().eq(forty_of(5)));
}

/// What lies at the top of the space, too far from the rest to share a leaf, is put into a new one; no other is written anew.
#[test]
fn what_lies_far_above_gets_a_leaf_of_its_own() {
    let top = Page::MAX.number() - 5;
    for ranges in [5, 40] {
        let heap = Heap::default();
        let mut tree = Tree::new_in(&heap);
        fill(&mut tree, 0..ranges);
        let (total, height) = (heap.total.get(), tree.height());
        // A leaf, and a root above the first two.
        let nodes = 1 + usize::from(height == 1);
        heap.left.set(Some(nodes - 1));
        let stored = tree.store(count(top, 1), Some(99), &mut |_| ());
        assert!(stored.is_err());
        tree.check().unwrap();
        assert_eq!(tree.len() as u64, ranges);
        heap.left.set(None);
        tree.store(count(top, 1), Some(99), &mut |_| ()).unwrap();
        tree.check().unwrap();
        // What was taken for the attempt that failed serves the second.
        assert_eq!(heap.total.get() - total, nodes);
        let gap = tree.find_gap_up(&GapRequest::new(1 << 40)).unwrap();
        assert_eq!(gap.first(), page(4 * ranges - 1));
    }
}

/// Leaves whose ranges become few by merging are joined, as they are where ranges are taken out.
#[test]
fn leaves_emptied_by_merging_are_joined() {
    let heap = Heap::default();
    let entry = |i| Entry {
        range: count(4 * i, 3),
        value: 1,
    };
    let ranges = 6000;
    let mut tree = RangeTree::<u64, _>::build_in(&heap, (0..ranges).map(entry)).unwrap();
    let before = tree.stats();
    let in_leaf = before.ranges.div_ceil(before.leaves) as u64;
    assert!(in_leaf > 10);
    // Every hole inside a leaf is filled with what lies on both sides; those between leaves stay.
    for i in (1..ranges).filter(|i| i % in_leaf != 0) {
        tree.store_merged(count(4 * i - 1, 1), 1, &mut |_| ())
            .unwrap();
        if i % 500 == 0 {
            tree.check().unwrap();
        }
    }
    tree.check().unwrap();
    let stats = tree.stats();
    assert_eq!(stats.ranges as u64, ranges.div_ceil(in_leaf));
    assert!(
        stats.leaves * 4 <= stats.ranges,
        "{} leaves became\n{stats}",
        before.leaves
    );
}

/// A reservation of more than any memory has is refused before a node is taken.
#[test]
fn a_reservation_beyond_all_memory_takes_nothing() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..100);
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    let mut shared: SharedTree<u64, &Heap, &SingleGrace> = SharedTree::new_in(&heap, &grace);
    let (mut writer, _) = shared.split();
    writer.store(count(0, 1), Some(0), &mut |_| ()).unwrap();
    let taken = heap.total.get();
    heap.left.set(Some(10_000));
    for bits in [40, 60, 62, 63] {
        for stores in [1_usize << bits, (1 << bits) + 1, usize::MAX >> (63 - bits)] {
            assert!(writer.nodes_for(stores) >= stores);
            assert!(writer.reserve(stores).is_err(), "{stores} stores");
            assert!(tree.nodes_for(stores) >= stores);
            assert!(tree.reserve(stores).is_err(), "{stores} stores");
        }
    }
    assert_eq!(heap.total.get(), taken);
}

/// A reservation that fails when some nodes were taken already gives them back, but for the few that a tree keeps.
#[test]
fn a_reservation_that_fails_half_way_gives_back() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..300);
    let (live, need) = (heap.live.get(), tree.nodes_for(20));
    assert!(need > 30);
    for taken in 0..need {
        heap.left.set(Some(taken));
        match tree.reserve(20) {
            Ok(_) => {
                assert!(taken + 4 >= need);
                break;
            }
            Err(error) => assert_eq!(error, kmem_hal::AllocError::OutOfMemory),
        }
        assert!(heap.live.get() <= live + 4, "{taken} of {need}");
        tree.check().unwrap();
    }
}
