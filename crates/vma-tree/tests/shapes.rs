//! Shapes that hurt trees, and the ends of the space.

mod common;

use common::{Heap, Tree, count, fill, page, pages};
use kmem_hal::{FixedPool, Page, PageRange, SingleGrace};
use kmem_vma_tree::{BuildError, Entry, Finger, GapRequest, Node, RangeTree, SharedTree};

#[test]
fn ascending_leaves_are_nearly_full() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..3000);
    let stats = tree.stats();
    assert!(stats.fill_percent() >= 85, "{stats}");
    assert!(stats.height <= 4, "{stats}");
    assert!(stats.centibytes_per_range() < 2400, "{stats}");
}

#[test]
fn descending_leaves_are_nearly_full() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, (0..3000).rev());
    let stats = tree.stats();
    assert!(stats.fill_percent() >= 80, "{stats}");
    assert!(stats.height <= 4, "{stats}");
    assert!(stats.centibytes_per_range() < 2050, "{stats}");
}

/// A descending tree is as high as leaves of 14 ranges and nodes of 13 children make it, also where it lies above leaves that it cannot
/// share.
#[test]
fn a_descending_tree_is_no_level_too_high() {
    for (giants, ranges, height) in [(0, 10_000, 4), (0, 2000, 3), (5, 1900, 3), (17, 1700, 3)] {
        let heap = Heap::default();
        let mut tree = Tree::new_in(&heap);
        // Too long to share a leaf.
        let long = 1_u64 << 44;
        for i in 0..giants {
            let giant = count(i * long, long);
            tree.store(giant, Some(i), &mut |_| ()).unwrap();
        }
        for i in (0..ranges).rev() {
            let range = count(giants * long + 4 * i, 3);
            tree.store(range, Some(i), &mut |_| ()).unwrap();
        }
        tree.check().unwrap();
        let stats = tree.stats();
        assert_eq!(stats.height, height, "{giants} below {ranges}: {stats}");
        let nodes = (stats.leaves + stats.inner) as u64;
        assert!(
            100 * (nodes - giants) < 8 * ranges,
            "{giants} below {ranges}: {stats}"
        );
    }
}

/// A range over many others that begins where a leaf does splits no leaf: what is left of two nodes above it is shared out evenly, and not as a
/// descending series would leave it.
#[test]
fn a_range_over_many_is_no_descending_series() {
    let heap = Heap::default();
    let entry = |i| Entry {
        range: count(4 * i, 3),
        value: i,
    };
    let children = |dump: &str| {
        let counts = dump
            .lines()
            .filter_map(|line| line.split_once("children="))
            .map(|(_, count)| count.split(' ').next().unwrap().parse().unwrap());
        counts.collect::<Vec<usize>>()
    };
    // Leaves of 13 ranges and nodes of 12 leaves.
    for first in (0..13 * 12).step_by(13) {
        for last in [13 * 12 + 3, 13 * 13 + 3, 13 * 24 + 3] {
            let mut tree = Tree::build_in(&heap, (0..2000).map(entry)).unwrap();
            let over = pages(4 * first, 4 * last + 2);
            tree.store(over, Some(7), &mut |_| ()).unwrap();
            tree.check().unwrap();
            let dump = tree.dump().to_string();
            let counts = children(&dump);
            assert!(
                counts.len() > 2 && counts.iter().all(|&count| count >= 4),
                "{first}..={last}: {counts:?}"
            );
        }
    }
}

#[test]
fn alternating_ends() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(
        &mut tree,
        (0..2000).map(|i| if i % 2 == 0 { i / 2 } else { 3000 - i / 2 }),
    );
    assert_eq!(tree.len(), 2000);
    assert!(tree.stats().fill_percent() >= 45, "{}", tree.stats());
    // Every second one goes: leaves are joined and memory comes back.
    let before = heap.live.get();
    let all: Vec<_> = tree.iter().collect();
    for entry in all.iter().step_by(2).chain(all.iter().skip(1).step_by(4)) {
        tree.store(entry.range, None, &mut |_| ()).unwrap();
    }
    tree.check().unwrap();
    assert_eq!(tree.len(), 500);
    assert!(
        heap.live.get() * 2 < before,
        "{} of {before} nodes left",
        heap.live.get()
    );
}

#[test]
fn one_range_covers_everything() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..1000);
    let mut seen = 0;
    tree.store(PageRange::ALL, Some(7), &mut |_| seen += 1)
        .unwrap();
    assert_eq!((seen, tree.len(), tree.largest_gap()), (1000, 1, 0));
    assert_eq!(tree.get(Page::MAX).unwrap().range, PageRange::ALL);
    assert!(tree.find_gap_up(&GapRequest::new(1)).is_none());
    assert!(tree.find_gap_down(&GapRequest::new(1)).is_none());
    tree.check().unwrap();
    tree.store(PageRange::single(Page::MAX), None, &mut |_| ())
        .unwrap();
    assert_eq!(
        tree.find_gap_down(&GapRequest::new(1)),
        Some(PageRange::single(Page::MAX))
    );
    tree.store(PageRange::single(Page::ZERO), None, &mut |_| ())
        .unwrap();
    assert_eq!(
        tree.find_gap_up(&GapRequest::new(1)),
        Some(PageRange::single(Page::ZERO))
    );
    tree.check().unwrap();
}

#[test]
fn ranges_that_end_with_the_last_page() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let top = Page::MAX.number();
    for i in 0..200 {
        tree.store(pages(top - 10 * i - 5, top - 10 * i), Some(i), &mut |_| ())
            .unwrap();
        tree.check().unwrap();
    }
    assert_eq!(tree.last().unwrap().last(), Page::MAX);
    assert_eq!(tree.iter_from(Page::MAX).count(), 1);
    assert_eq!(tree.first_at_or_after(Page::MAX).unwrap().value, 0);
    for i in 0..200 {
        tree.store(pages(top - 10 * i - 5, top - 10 * i), None, &mut |_| ())
            .unwrap();
        tree.check().unwrap();
    }
    assert!(tree.is_empty());
}

/// Ranges too long and too far apart to share a leaf.
#[test]
fn giants_beside_dwarfs() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let far = 1_u64 << 45;
    for i in 0..60 {
        tree.store(count(i * far, 1), Some(i), &mut |_| ()).unwrap();
        tree.store(count(i * far + 7, far - 9), Some(i + 100), &mut |_| ())
            .unwrap();
        tree.check().unwrap();
    }
    assert_eq!(tree.len(), 120);
    assert_eq!(tree.get(page(5 * far + 8)).unwrap().value, 105);
    // Holes of six and of two pages, at every giant.
    assert_eq!(
        tree.find_gap_up(&GapRequest::new(6)).unwrap().first(),
        page(1)
    );
    let down = GapRequest::new(6).limits(pages(0, 59 * far + 20));
    assert_eq!(
        tree.find_gap_down(&down).unwrap().first(),
        page(59 * far + 1)
    );
    for i in 0..60 {
        tree.store(count(i * far + far / 2, 3), None, &mut |_| ())
            .unwrap();
        tree.check().unwrap();
    }
    assert_eq!(tree.len(), 180);
}

#[test]
fn a_tree_in_a_static_without_an_allocator() {
    static NODES: FixedPool<Node, 64> = FixedPool::new();
    static TREE: std::sync::Mutex<RangeTree<u32, &FixedPool<Node, 64>>> =
        std::sync::Mutex::new(RangeTree::new_in(&NODES));
    let mut tree = TREE.lock().unwrap();
    let mut stored = 0;
    while tree
        .store(count(3 * stored, 2), Some(stored as u32), &mut |_| ())
        .is_ok()
    {
        stored += 1;
    }
    // The pool is used up; the tree is whole, and says how much it holds.
    assert!(stored > 64 * 10, "{stored}");
    assert_eq!(tree.len() as u64, stored);
    tree.check().unwrap();
    tree.clear();
    assert_eq!(NODES.in_use(), 0);
}

#[test]
fn bulk_build_refuses_disorder() {
    let heap = Heap::default();
    let entry = |first, value| Entry {
        range: count(first, 4),
        value,
    };
    let built = RangeTree::<u64, _>::build_in(&heap, [entry(0, 1), entry(3, 2)]);
    assert_eq!(built.unwrap_err(), BuildError::Order);
    assert_eq!(heap.live.get(), 0);
    let built = RangeTree::<u64, _>::build_in(&heap, (0..2000).map(|i| entry(4 * i, i))).unwrap();
    built.check().unwrap();
    assert_eq!(
        (built.len(), built.stats().fill_percent() >= 80),
        (2000, true)
    );
}

#[test]
fn a_finger_notices_edits_and_other_trees() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..100);
    let mut finger = Finger::new();
    for round in 0..3 {
        for at in 0..400 {
            assert_eq!(tree.get_with(&mut finger, page(at)), tree.get(page(at)));
        }
        tree.store(count(40 * round, 30), None, &mut |_| ())
            .unwrap();
        for at in (0..400).rev() {
            assert_eq!(tree.get_with(&mut finger, page(at)), tree.get(page(at)));
        }
    }
    let other = tree
        .duplicate_in(&heap, &mut |entry| Some(entry.value + 1))
        .unwrap();
    for at in 200..400 {
        assert_eq!(other.get_with(&mut finger, page(at)), other.get(page(at)));
    }
}

/// A tree that takes over another one beside a reader: the reader's old walk goes on, and its finger is not trusted.
#[test]
fn a_tree_is_taken_over_beside_a_reader() {
    let heap = Heap::default();
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    let mut shared: SharedTree<u64, &Heap, &SingleGrace> = SharedTree::new_in(&heap, &grace);
    let (mut writer, readers) = shared.split();
    for i in 0..100 {
        writer.store(count(4 * i, 3), Some(i), &mut |_| ()).unwrap();
    }
    let mut other = Tree::new_in(&heap);
    fill(&mut other, 50..80);
    for i in 50..80 {
        let range = count(4 * i + 1, 1);
        other.store(range, Some(1000 + i), &mut |_| ()).unwrap();
    }
    let expected: Vec<_> = other.iter().collect();
    let mut finger = Finger::new();
    let section = readers.read();
    for i in 0..100 {
        for _ in 0..3 {
            let found = section.get_with(&mut finger, page(4 * i + 1));
            assert_eq!(found.unwrap().value, i);
        }
    }
    let mut walk = section.entries_from(Page::ZERO);
    assert_eq!(walk.next().unwrap().value, 0);
    // SAFETY: all nodes are of one heap.
    unsafe { writer.adopt(other) };
    writer.check().unwrap();
    assert!(writer.garbage() > 0);
    for at in 0..400 {
        let found = expected.iter().find(|entry| entry.range.contains(page(at)));
        let near = section.get_with(&mut finger, page(at));
        assert_eq!(near.as_ref(), found);
    }
    // What is left of the leaf that the walk was in, and then what there is now.
    let rest: Vec<_> = walk.collect();
    let old = rest.iter().take_while(|entry| entry.first() < page(200));
    assert!(
        old.enumerate()
            .all(|(i, entry)| entry.value == i as u64 + 1)
    );
    assert!(rest.ends_with(&expected));
    drop(section);
    writer.quiesce();
    assert_eq!(writer.garbage(), 0);
}
