//! Values that count from the start of their range, as file offsets do, through cuts, moved boundaries and merges; and whose rule merges.

mod common;

use common::{Heap, Tree, count, pages};
use kmem_hal::SingleGrace;
use kmem_vma_tree::{Entry, Mergeable, RangeTree, SharedTree, Value};

/// A value that counts from the start of its range, as a file offset does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Offset(u64);

impl Value for Offset {
    fn to_word(self) -> u64 {
        self.0
    }
    fn from_word(word: u64) -> Self {
        Self(word)
    }
    fn split(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

impl Mergeable for Offset {
    fn merge(left: &Entry<Self>, right: &Entry<Self>) -> Option<Self> {
        (left.value.0 + left.range.count() == right.value.0).then_some(left.value)
    }
}

#[test]
fn offsets_follow_every_cut() {
    let heap = Heap::default();
    let mut tree: RangeTree<Offset, &Heap> = RangeTree::new_in(&heap);
    // Offset = page: whatever is cut and merged, it must stay so.
    tree.store(count(0, 5000), Some(Offset(0)), &mut |_| ())
        .unwrap();
    let mut random = 12345_u64;
    for _ in 0..2000 {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let range = count((random >> 33) % 5000, 1 + (random >> 20) % 60);
        let as_page = |piece: Entry<Offset>| assert_eq!(piece.value.0, piece.first().number());
        match random % 3 {
            0 => tree.store(range, None, &mut { as_page }).unwrap(),
            1 => {
                let value = Offset(range.first().number());
                let merged = tree.store_merged(range, value, &mut { as_page }).unwrap();
                assert_eq!(merged.value.0, merged.first().number());
            }
            _ => tree
                .modify(range, &mut |piece, around| {
                    as_page(piece);
                    around.below.map(as_page);
                    around.above.map(as_page);
                    Some(piece.value)
                })
                .unwrap(),
        }
        tree.check().unwrap();
    }
    assert!(tree.len() > 10);
    assert!(
        tree.iter()
            .all(|entry| entry.value.0 == entry.first().number())
    );
}

/// Where the boundary between two ranges moves, the rest of the one that gets shorter counts from its own first page.
#[test]
fn offsets_follow_a_boundary_that_moves() {
    let heap = Heap::default();
    for (stored, value, all, gone) in [
        (pages(10, 12), 10, [(0, 12, 0), (13, 19, 103)], 100),
        (pages(7, 9), 97, [(0, 6, 0), (7, 19, 97)], 7),
    ] {
        let mut tree: RangeTree<Offset, &Heap> = RangeTree::new_in(&heap);
        tree.store(pages(0, 9), Some(Offset(0)), &mut |_| ())
            .unwrap();
        tree.store(pages(10, 19), Some(Offset(100)), &mut |_| ())
            .unwrap();
        let mut removed = Vec::new();
        tree.store_merged(stored, Offset(value), &mut |piece| removed.push(piece))
            .unwrap();
        assert_eq!(
            removed,
            [Entry {
                range: stored,
                value: Offset(gone)
            }]
        );
        let expected = all.map(|(first, last, value)| Entry {
            range: pages(first, last),
            value: Offset(value),
        });
        assert!(tree.iter().eq(expected), "{tree:?}");
        tree.check().unwrap();
    }
}

/// A range that becomes one with its neighbours is written over them whole; what was removed is its own pages all the same.
#[test]
fn a_merge_shows_what_was_inside_the_range() {
    fn run<const W: usize>() {
        let heap = Heap::default();
        let mut tree = RangeTree::<u64, &Heap, kmem_vma_tree::Exclusive, W>::new_in(&heap);
        for (range, value) in [
            (pages(0, 0), 0),
            (pages(0x3f, 0xc8), 3),
            (pages(0xc9, 0xce), 0),
            (pages(0xcf, 0xd0), 3),
            (pages(0xd1, 0xd1), 0),
        ] {
            tree.store(range, Some(value), &mut |_| ()).unwrap();
        }
        let mut removed = Vec::new();
        let entry = tree
            .store_merged(pages(0xcf, 0xcf), 3, &mut |piece| removed.push(piece.range))
            .unwrap();
        assert_eq!(entry.range, pages(0xcf, 0xd0));
        assert_eq!(removed, [pages(0xcf, 0xcf)]);
        tree.check().unwrap();
    }
    run::<32>();
    run::<11>();
    run::<8>();
}

/// The caller's rule merges, not the value's own.
#[test]
fn a_rule_of_the_callers_merges() {
    fn sum(left: &Entry<u64>, right: &Entry<u64>) -> Option<u64> {
        (left.value != 5).then_some(left.value + right.value)
    }
    let all = |entries: &mut dyn Iterator<Item = Entry<u64>>| -> Vec<_> {
        entries.map(|entry| (entry.range, entry.value)).collect()
    };
    let heap = Heap::default();
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    let mut shared: SharedTree<u64, &Heap, &SingleGrace> = SharedTree::new_in(&heap, &grace);
    let (mut writer, _) = shared.split();
    let mut tree = Tree::new_in(&heap);
    for (range, value) in [(pages(0, 9), 1), (pages(20, 29), 2), (pages(30, 39), 5)] {
        tree.store(range, Some(value), &mut |_| ()).unwrap();
        writer.store(range, Some(value), &mut |_| ()).unwrap();
    }
    let (hole, whole) = (pages(10, 19), pages(0, 29));
    let stored = [
        tree.store_merged_by(hole, 4, &mut |_| (), &mut sum),
        writer.store_merged_by(hole, 4, &mut |_| (), &mut |left, right| sum(left, right)),
    ];
    // 1 + 4 is 5, which stays apart from what is above.
    for stored in stored {
        assert_eq!(stored.unwrap().range, pages(0, 19));
    }
    let expected = [(pages(0, 19), 5), (pages(20, 29), 2), (pages(30, 39), 5)];
    assert_eq!(all(&mut tree.iter()), expected);
    assert_eq!(all(&mut writer.iter()), expected);
    let (mut by_tree, mut by_writer) = (sum, sum);
    tree.modify_by(whole, &mut |piece, _| Some(piece.value + 1), &mut by_tree)
        .unwrap();
    writer
        .modify_by(whole, &mut |piece, _| Some(piece.value + 1), &mut by_writer)
        .unwrap();
    // 5 became 6, and takes 2 in: 8. Of that the upper part is the next piece: 9, with the lower one 17, and with what is above 22.
    let expected = [(pages(0, 39), 22)];
    assert_eq!(all(&mut tree.iter()), expected);
    assert_eq!(all(&mut writer.iter()), expected);
}
