//! Shapes that hurt trees, and the ends of the space.

mod common;

use common::{Heap, count, page, pages};
use kmem_hal::{FixedPool, Page, PageRange, SingleGrace};
use kmem_vma_tree::{
    BuildError, Entry, Finger, GapRequest, Mergeable, Node, RangeTree, SharedTree, Value,
};

type Tree<'h> = RangeTree<u64, &'h Heap>;

fn fill(tree: &mut Tree<'_>, order: impl Iterator<Item = u64>) {
    for i in order {
        tree.store(count(4 * i, 3), Some(i), &mut |_| ()).unwrap();
    }
    tree.check().unwrap();
}

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

/// A gap of just as many pages as are asked for, between ranges of one page each, is not passed over for a larger one.
#[test]
fn a_gap_that_just_fits_is_the_first() {
    let heap = Heap::default();
    for need in [1, 4, 1000] {
        let mut tree = Tree::new_in(&heap);
        // Gaps of `need` pages, one more and one less in turns.
        let mut at = need + 1;
        for i in 0..9 {
            tree.store(count(at, 1), Some(i), &mut |_| ()).unwrap();
            at += need + [0, 1, 2][i as usize % 3];
        }
        let limits = pages(need + 1, at);
        let request = GapRequest::new(need).limits(limits);
        let gaps = || tree.gaps(limits).map(|gap| gap.range);
        let fits = |gap: &PageRange| gap.count() >= need;
        let first = gaps().find(fits).unwrap().first();
        assert_eq!(gaps().find(fits).unwrap().count(), need);
        assert_eq!(tree.find_gap_up(&request).unwrap().first(), first);
        let limits = pages(0, tree.last().unwrap().last().number() - 1);
        let request = GapRequest::new(need).limits(limits);
        let inside = tree.gaps(limits).filter(|gap| fits(&gap.range));
        let last = inside.last().unwrap().range.last();
        assert_eq!(tree.find_gap_down(&request).unwrap().last(), last);
    }
}

/// A gap beyond what a node can record is found and measured all the same.
#[test]
fn gaps_beyond_the_record() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let wide = 1_u64 << 40;
    for i in 0..200 {
        tree.store(count(i * wide, 1 + i), Some(i), &mut |_| ())
            .unwrap();
    }
    tree.check().unwrap();
    let limits = pages(0, 199 * wide);
    // The hole after range 0 is the largest of those inside the limits; from above, 198's fits less.
    let request = GapRequest::new(wide - 1).limits(limits);
    assert_eq!(tree.find_gap_up(&request), Some(count(1, wide - 1)));
    assert_eq!(tree.find_gap_down(&request), Some(count(1, wide - 1)));
    assert_eq!(tree.largest_gap(), Page::LIMIT - (199 * wide + 200));
}

#[test]
fn a_guard_predicate_is_asked_inside_the_search() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    // Stacks (odd values) want 256 pages free below them.
    for i in 0..100 {
        tree.store(count(1000 * i + 600, 400), Some(i % 2), &mut |_| ())
            .unwrap();
    }
    let request = GapRequest::new(500).limits(pages(0, 99_999));
    let mut asked = 0;
    let mut guard = |gap: &kmem_vma_tree::Gap<u64>| {
        asked += 1;
        let stack = gap.above.is_some_and(|above| above.value == 1);
        let last = gap.range.last().number() - if stack { 256 } else { 0 };
        PageRange::new(gap.range.first(), page(last))
    };
    let up = tree.find_gap_up_with(&request, &mut guard).unwrap();
    assert_eq!(up.first(), page(0));
    let down = tree.find_gap_down_with(&request, &mut guard).unwrap();
    assert_eq!(down.last(), page(98_599));
    assert_eq!(asked, 3);
}

/// With `at_least` every gap that is looked at serves: one look, whatever lies badly before it.
#[test]
fn sure_alignment_looks_at_one_gap() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    for i in 0..5000 {
        // Gaps of 16 pages, none aligned to 16.
        tree.store(count(20 * i, 4), Some(i), &mut |_| ()).unwrap();
    }
    tree.store(count(20 * 2500, 4), None, &mut |_| ()).unwrap();
    let mut asked = 0;
    let mut count_asked = |gap: &kmem_vma_tree::Gap<u64>| {
        asked += 1;
        Some(gap.range)
    };
    let sure = GapRequest::new(16)
        .aligned(16, 0)
        .at_least(31)
        .limits(pages(0, 99_999));
    let found = tree.find_gap_up_with(&sure, &mut count_asked).unwrap();
    assert_eq!((found.first().number() % 16, asked), (0, 1));
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

#[test]
fn views_are_well_formed() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..40);
    let dump = tree.dump().to_string();
    assert_eq!(dump.lines().filter(|line| line.contains("->")).count(), 40);
    assert!(dump.starts_with("inner 0x0..=0xfffffffffffff"), "{dump}");
    let layout = tree.layout_svg(pages(0, 200)).to_string();
    assert_eq!(layout.matches("<title>").count(), 40);
    let nodes = tree.nodes_svg().to_string();
    let stats = tree.stats();
    assert_eq!(nodes.matches("<title>").count(), stats.leaves + stats.inner);
    for svg in [layout, nodes] {
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(
            svg.matches("<rect").count(),
            svg.matches("</rect>").count() + svg.matches("height=\"30\" fill=\"#eee\"/>").count()
        );
    }
    assert!(stats.to_string().contains("leaf fill"));
}

/// In a picture of the nodes those of each level cover the whole width, side by side: each is as wide as its leaves.
#[test]
fn each_level_of_a_picture_is_as_wide_as_the_other() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    fill(&mut tree, 0..1500);
    let (stats, svg) = (tree.stats(), tree.nodes_svg().to_string());
    assert_eq!(stats.height, 3);
    let number = |line: &str, name: &str| -> u64 {
        let (_, rest) = line.split_once(name).unwrap();
        rest.split_once('"').unwrap().0.parse().unwrap()
    };
    for level in 0..stats.height {
        let top = format!(" y=\"{}\"", 40 * level);
        let (mut end, mut nodes) = (0, 0);
        for line in svg.lines().filter(|line| line.contains(&top)) {
            assert_eq!(number(line, "x=\""), end, "{line}");
            end += number(line, " width=\"");
            nodes += 1;
        }
        assert_eq!(end, 1000, "level {level} of {nodes} nodes");
    }
}

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

/// A heap that grows where its leaf ends takes no node, and neither does what lies above it change.
#[test]
fn a_range_grows_over_the_end_of_its_leaf() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    for i in 0..40 {
        tree.store(count(16 * i, 3), Some(i), &mut |_| ()).unwrap();
    }
    assert!(tree.stats().leaves > 2);
    heap.left.set(Some(0));
    for more in 3..15 {
        for i in 0..40 {
            tree.store_merged(count(16 * i + more, 1), i, &mut |_| ())
                .unwrap();
            tree.check().unwrap();
        }
    }
    let whole = (0..40).map(|i| (count(16 * i, 15), i));
    assert!(
        tree.iter()
            .map(|entry| (entry.range, entry.value))
            .eq(whole)
    );
    let request = GapRequest::new(2).limits(pages(0, 16 * 40 - 2));
    assert_eq!(tree.find_gap_up(&request), None);
    assert_eq!(tree.find_gap_down(&request), None);
}

/// What the writer remembers of its last leaf follows a boundary that moves, up and down: the next edit beside it takes no node.
#[test]
fn an_edit_beside_a_boundary_that_just_moved_takes_no_node() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    for i in 0..40 {
        tree.store(count(16 * i, 3), Some(i), &mut |_| ()).unwrap();
    }
    assert!(tree.stats().leaves > 2);
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
    let whole = (0..40).map(|i| (count(16 * i, 5), i));
    assert!(
        tree.iter()
            .map(|entry| (entry.range, entry.value))
            .eq(whole)
    );
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

/// An alignment near the end of what a word holds is an alignment like any other.
#[test]
fn a_huge_alignment_is_no_sum() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    tree.store(count(0, 10), Some(0), &mut |_| ()).unwrap();
    for alignment in [u64::MAX, u64::MAX - 5, 1 << 63] {
        let only_zero = GapRequest::new(1).aligned(alignment, 0);
        assert_eq!(tree.find_gap_up(&only_zero), None);
        assert_eq!(tree.find_gap_down(&only_zero), None);
        let one_page = GapRequest::new(1).aligned(alignment, 77);
        let place = Some(PageRange::single(page(77)));
        assert_eq!(tree.find_gap_up(&one_page), place);
        assert_eq!(tree.find_gap_down(&one_page), place);
        let beyond = GapRequest::new(1).aligned(alignment, alignment - 1);
        assert_eq!(tree.find_gap_up(&beyond), None);
        assert_eq!(tree.find_gap_down(&beyond), None);
    }
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
