//! Gaps: what a search finds, how often it looks, and how large a gap or an alignment may be.

mod common;

use common::{Heap, Tree, count, page, pages};
use kmem_hal::{Page, PageRange};
use kmem_vma_tree::GapRequest;

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
