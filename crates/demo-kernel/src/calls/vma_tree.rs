//! The calls of `kmem-vma-tree`.

use kmem_hal::{AllocError, FixedPool, Page, PageRange};
use kmem_vma_tree::{Entry, GapRequest, Node, RangeTree};

use crate::calls;

type Tree = RangeTree<u64, &'static FixedPool<Node, 64>>;

calls! {
    call_vma_tree_get(tree: &Tree, page: Page) -> Option<Entry<u64>> { tree.get(page) }
    call_vma_tree_first_at_or_after(tree: &Tree, page: Page) -> Option<Entry<u64>> { tree.first_at_or_after(page) }
    call_vma_tree_store(tree: &mut Tree, range: PageRange, value: Option<u64>) -> Result<(), AllocError> {
        tree.store(range, value, &mut |_| ())
    }
    call_vma_tree_reserve(tree: &mut Tree, stores: usize) -> bool { tree.reserve(stores).is_ok() }
    call_vma_tree_gap_up(tree: &Tree, request: &GapRequest) -> Option<PageRange> { tree.find_gap_up(request) }
    call_vma_tree_gap_down(tree: &Tree, request: &GapRequest) -> Option<PageRange> { tree.find_gap_down(request) }
    call_vma_tree_largest_gap(tree: &Tree) -> u64 { tree.largest_gap() }
    call_vma_tree_iterate(tree: &Tree) -> u64 { tree.iter().map(|entry| entry.value).sum() }
    call_vma_tree_clear(tree: &mut Tree) { tree.clear() }
}
