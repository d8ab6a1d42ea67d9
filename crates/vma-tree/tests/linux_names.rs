//! The cases of Linux's `tools/testing/vma/vma.c`, by name, with expectations of our own.
//!
//! The tree knows no VMA; a small value here stands for one: flags, an offset that counts pages from the start of the
//! space (so that it stays equal where a mapping goes on), an anonymous-memory identity, and whether closing it means
//! something. The rule is the short form of Linux's; the long form lives in `kmem-cow-mm`.

mod common;

use common::{Heap, count, page, pages};
use kmem_hal::{AllocError, Page};
use kmem_vma_tree::{Entry, Mergeable, RangeTree, Value};

/// `flags:8 | close:1 | anon:7 | bias:48`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vm {
    flags: u8,
    close: bool,
    anon: u8,
    /// Offset in the object minus first page, modulo 2^48: equal on both sides of a cut.
    bias: u64,
}

const READ: u8 = 1;
const WRITE: u8 = 2;
/// `VM_SPECIAL`: never merges.
const SPECIAL: u8 = 4;

impl Value for Vm {
    fn to_word(self) -> u64 {
        u64::from(self.flags) << 56
            | u64::from(self.close) << 55
            | u64::from(self.anon) << 48
            | self.bias & 0xffff_ffff_ffff
    }
    fn from_word(word: u64) -> Self {
        Self {
            flags: (word >> 56) as u8,
            close: word >> 55 & 1 == 1,
            anon: (word >> 48) as u8 & 0x7f,
            bias: word & 0xffff_ffff_ffff,
        }
    }
}

impl Mergeable for Vm {
    fn merge(left: &Entry<Self>, right: &Entry<Self>) -> Option<Self> {
        let (l, r) = (left.value, right.value);
        let anon = l.anon == r.anon || l.anon == 0 || r.anon == 0;
        let same = l.flags == r.flags && l.bias == r.bias && anon;
        let plain = l.flags & SPECIAL == 0 && !l.close && !r.close;
        (same && plain).then_some(Vm {
            anon: l.anon.max(r.anon),
            ..l
        })
    }
}

fn vm(flags: u8) -> Vm {
    Vm {
        flags,
        close: false,
        anon: 0,
        bias: 0,
    }
}

type Tree<'h> = RangeTree<Vm, &'h Heap>;

fn put(tree: &mut Tree<'_>, first: u64, end: u64, value: Vm) -> Entry<Vm> {
    tree.store_merged(count(first, end - first), value, &mut |_| ())
        .unwrap()
}

fn list(tree: &Tree<'_>) -> Vec<(u64, u64, u8)> {
    tree.check().unwrap();
    tree.iter()
        .map(|e| (e.first().number(), e.last().number() + 1, e.value.flags))
        .collect()
}

#[test]
fn simple_merge() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 1, vm(READ));
    put(&mut tree, 2, 3, vm(READ));
    let merged = put(&mut tree, 1, 2, vm(READ));
    assert_eq!(merged.range, pages(0, 2));
    assert_eq!(list(&tree), [(0, 3, READ)]);
}

#[test]
fn simple_modify() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 3, vm(READ));
    let mut around = None;
    tree.modify(pages(1, 1), &mut |piece, beside| {
        around = Some(beside);
        Some(Vm {
            flags: READ | WRITE,
            ..piece.value
        })
    })
    .unwrap();
    let around = around.unwrap();
    assert_eq!(around.below.unwrap().range, pages(0, 0));
    assert_eq!(around.above.unwrap().range, pages(2, 2));
    assert_eq!(
        list(&tree),
        [(0, 1, READ), (1, 2, READ | WRITE), (2, 3, READ)]
    );
}

#[test]
fn simple_expand() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 1, vm(READ));
    assert_eq!(put(&mut tree, 1, 3, vm(READ)).range, pages(0, 2));
    assert_eq!(tree.len(), 1);
}

#[test]
fn simple_shrink() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 3, vm(READ));
    tree.store(pages(1, 2), None, &mut |_| ()).unwrap();
    assert_eq!(list(&tree), [(0, 1, READ)]);
    assert_eq!(tree.largest_gap(), Page::LIMIT - 1);
}

#[test]
fn merge_new() {
    // All ways for a new range to touch what is there: none, below, above, both; with matching and other flags.
    for below in [None, Some(READ), Some(WRITE)] {
        for above in [None, Some(READ), Some(WRITE)] {
            let heap = Heap::default();
            let mut tree = Tree::new_in(&heap);
            below.map(|flags| put(&mut tree, 0, 4, vm(flags)));
            above.map(|flags| put(&mut tree, 6, 9, vm(flags)));
            let merged = put(&mut tree, 4, 6, vm(READ));
            let first = if below == Some(READ) { 0 } else { 4 };
            let last = if above == Some(READ) { 8 } else { 5 };
            assert_eq!(merged.range, pages(first, last));
            tree.check().unwrap();
        }
    }
}

#[test]
fn vma_merge_special_flags() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 3, vm(READ | SPECIAL));
    put(&mut tree, 3, 4, vm(READ | SPECIAL));
    assert_eq!(tree.len(), 2);
}

#[test]
fn vma_merge_with_close() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let closing = Vm {
        close: true,
        ..vm(READ)
    };
    put(&mut tree, 0, 3, vm(READ));
    put(&mut tree, 5, 9, closing);
    put(&mut tree, 3, 5, vm(WRITE));
    tree.modify(pages(3, 4), &mut |piece, _| {
        Some(Vm {
            flags: READ,
            ..piece.value
        })
    })
    .unwrap();
    // It joins what is below; what is above would have to be closed, and stays.
    assert_eq!(list(&tree), [(0, 5, READ), (5, 9, READ)]);
}

#[test]
fn vma_merge_new_with_close() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let closing = Vm {
        close: true,
        ..vm(READ)
    };
    put(&mut tree, 0, 2, closing);
    put(&mut tree, 5, 7, closing);
    assert_eq!(put(&mut tree, 2, 5, vm(READ)).range, pages(2, 4));
    assert_eq!(tree.len(), 3);
}

#[test]
fn merge_existing() {
    // Linux's cases 4 to 8: the changed range inside one area, at each end and whole, beside areas that match or not.
    let changed = |first: u64, end: u64, below: bool, above: bool| {
        let heap = Heap::default();
        let mut tree = Tree::new_in(&heap);
        if below {
            put(&mut tree, 0, 4, vm(READ));
        }
        put(&mut tree, 4, 8, vm(WRITE));
        if above {
            put(&mut tree, 8, 12, vm(READ));
        }
        tree.modify(pages(first, end - 1), &mut |piece, _| {
            Some(Vm {
                flags: READ,
                ..piece.value
            })
        })
        .unwrap();
        list(&tree)
    };
    // 4: the tail joins what is above.
    assert_eq!(changed(6, 8, false, true), [(4, 6, WRITE), (6, 12, READ)]);
    // 5: the head joins what is below.
    assert_eq!(changed(4, 6, true, false), [(0, 6, READ), (6, 8, WRITE)]);
    // 6: the whole joins both.
    assert_eq!(changed(4, 8, true, true), [(0, 12, READ)]);
    // 7: the whole joins what is below.
    assert_eq!(changed(4, 8, true, false), [(0, 8, READ)]);
    // 8: the whole joins what is above.
    assert_eq!(changed(4, 8, false, true), [(4, 12, READ)]);
    // Strictly inside: three areas.
    assert_eq!(changed(5, 7, true, true).len(), 5);
}

#[test]
fn anon_vma_non_mergeable() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let with = |anon| Vm { anon, ..vm(READ) };
    put(&mut tree, 0, 3, with(1));
    put(&mut tree, 7, 9, with(2));
    // It may join either, and takes the one below; then the two identities differ.
    assert_eq!(put(&mut tree, 3, 7, with(0)).range, pages(0, 6));
    assert_eq!(tree.len(), 2);
}

#[test]
fn dup_anon_vma() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 3, vm(READ));
    let merged = put(
        &mut tree,
        3,
        5,
        Vm {
            anon: 3,
            ..vm(READ)
        },
    );
    assert_eq!((merged.range, merged.value.anon), (pages(0, 4), 3));
}

#[test]
fn vmi_prealloc_fail() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    for i in 0..15 {
        put(&mut tree, 10 * i, 10 * i + 5, vm(READ));
    }
    let before = list(&tree);
    heap.left.set(Some(0));
    let failed = tree.store(pages(7, 8), Some(vm(WRITE)), &mut |_| {
        panic!("nothing is removed")
    });
    assert_eq!(failed, Err(AllocError::OutOfMemory));
    assert_eq!(list(&tree), before);
    assert!(tree.reserve(1).is_err());
    heap.left.set(None);
    let mut reserved = tree.reserve(40).unwrap();
    heap.left.set(Some(0));
    for i in 0..40 {
        reserved.store(
            pages(10 * i + 1, 10 * i + 1),
            (i % 3 > 0).then_some(vm(WRITE)),
            &mut |_| (),
        );
    }
    assert_eq!(reserved.stores_left(), 0);
    drop(reserved);
    tree.check().unwrap();
    // What was set aside and not needed went back, but for what the next reservation finds.
    assert!(heap.live.get() <= tree.stats().leaves + tree.stats().inner + 24);
    assert!(tree.stats().spare <= 24);
}

#[test]
fn merge_extend() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 1, vm(READ));
    put(&mut tree, 4, 9, vm(READ));
    // mremap grows the first up to the second.
    assert_eq!(put(&mut tree, 1, 4, vm(READ)).range, pages(0, 8));
}

#[test]
fn copy_vma() {
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    let source = put(&mut tree, 3, 5, vm(READ));
    // mremap to another place, touching nothing: a second area.
    put(&mut tree, 0, 2, source.value);
    assert_eq!(tree.len(), 2);
    // And touching one that goes on where it ends: one area.
    put(&mut tree, 2, 3, source.value);
    assert_eq!(list(&tree), [(0, 5, READ)]);
}

#[test]
fn expand_only_mode() {
    // brk: the new pages may join what is below, never what is above.
    let heap = Heap::default();
    let mut tree = Tree::new_in(&heap);
    put(&mut tree, 0, 3, vm(READ));
    put(&mut tree, 9, 12, vm(READ));
    let merged = tree
        .store_merged_by(pages(3, 8), vm(READ), &mut |_| (), &mut |left, right| {
            if right.first() == page(9) {
                None
            } else {
                Vm::merge(left, right)
            }
        })
        .unwrap();
    assert_eq!(merged.range, pages(0, 8));
    assert_eq!(tree.len(), 2);
}
