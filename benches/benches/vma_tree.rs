//! Ranges: a lookup, a gap search, a hole punched and filled, among 1000.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use criterion::{Criterion, criterion_group, criterion_main};
use kmem_benches::platform::{Machine, Region};
use kmem_hal::{Page, PageRange};
use kmem_slab::Cache;
use kmem_vma_tree::{GapRequest, Node, RangeTree};

fn range(first: u64, count: u64) -> PageRange {
    PageRange::with_count(Page::from_number(first), count).expect("not empty")
}

fn ranges(c: &mut Criterion) {
    let machine = Machine::leak(Region::new(1 << 12).touched());
    let nodes: Cache<'_, Node, _> = Cache::new(&machine.slab, "vma_node");
    let mut tree: RangeTree<u64, _> = RangeTree::new_in(&nodes);
    for number in 0..1000 {
        tree.store(range(16 + 16 * number, 12), Some(number), &mut |_| ())
            .expect("memory for nodes");
    }
    let mut at = 0;
    c.bench_function("vma_tree/lookup", |b| {
        b.iter(|| {
            at = (at + 617) % 1000;
            tree.get(Page::from_number(16 + 16 * at))
        });
    });
    let request = GapRequest::new(5).limits(range(16, 32 * 1000));
    c.bench_function("vma_tree/gap_up", |b| b.iter(|| tree.find_gap_up(&request)));
    c.bench_function("vma_tree/punch_merge", |b| {
        b.iter(|| {
            at = (at + 617) % 1000;
            let page = range(16 + 16 * at + 5, 1);
            tree.store(page, None, &mut |_| ())
                .expect("memory for nodes");
            tree.store_merged(page, at, &mut |_| ())
                .expect("memory for nodes");
        });
    });
    assert_eq!(tree.len(), 1000);
}

criterion_group!(benches, ranges);
criterion_main!(benches);
