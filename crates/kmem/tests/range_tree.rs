//! The range tree on the slab system: its nodes are objects of a cache, from the first range to the last frame of the machine.

use kmem::hal::{ObjectAlloc, Page, PageRange, SingleGrace};
use kmem::vma_tree::{GapRequest, Node, RangeTree, SharedTree};
use kmem::{
    AllocError, BootMap, Cache, FrameRequest, FrameSink, FrameSource, Heap, PhysAddr, RegionKind,
};

static HEAP: Heap = Heap::new();

/// Memory of `mib` MiB at 1 MiB for the heap.
fn start(mib: usize) {
    let bytes = vec![0u8; (mib + 1) << 20].leak();
    let base = (bytes.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    let mut map: BootMap = BootMap::new();
    map.push(
        PhysAddr::new(1 << 20),
        (mib as u64) << 20,
        RegionKind::Usable,
    )
    .unwrap();
    // SAFETY: the memory is mapped there and nobody's; one thread uses the heap.
    unsafe { HEAP.init(&mut map, base.wrapping_sub(1 << 20)) }.unwrap();
}

fn range(first: u64, pages: u64) -> PageRange {
    PageRange::with_count(Page::new(first).unwrap(), pages).unwrap()
}

#[test]
fn nodes_come_from_a_cache() {
    start(16);
    let slab = HEAP.memory().slab();
    let nodes: Cache<'_, Node, _> = Cache::new(slab, "vma_node");
    let live = || nodes.info().map_or(0, |info| info.active_objects);

    // A tree of one's own: built, searched, copied as fork does, given back.
    let mut tree: RangeTree<u64, _> = RangeTree::new_in(&nodes);
    for i in 0..2000 {
        tree.store(range(8 * i, 4), Some(i), &mut |_| ()).unwrap();
    }
    tree.check().unwrap();
    let stats = tree.stats();
    assert_eq!(live(), (stats.leaves + stats.inner + stats.spare) as u64);
    let request = GapRequest::new(5).limits(range(0, 8 * 2000 + 100));
    assert_eq!(tree.find_gap_up(&request), Some(range(8 * 1999 + 4, 5)));
    let child = tree
        .duplicate_in(&nodes, &mut |entry| {
            (entry.value % 2 == 0).then_some(entry.value)
        })
        .unwrap();
    assert_eq!((tree.len(), child.len()), (2000, 1000));
    drop(child);

    // A page out of the middle and back asks the cache for nothing.
    let before = live();
    for i in 0..2000 {
        tree.store(range(8 * i + 1, 1), None, &mut |_| ()).unwrap();
        tree.store_merged(range(8 * i + 1, 1), i, &mut |_| ())
            .unwrap();
    }
    assert!(live() <= before + 100, "{} of {before} nodes", live());

    // What was reserved goes through when the machine has no frame left; what was not is refused and changes nothing.
    let reserved = 3;
    {
        let mut hold = tree.reserve(reserved).unwrap();
        let mut frames = Vec::new();
        while let Ok(frame) = HEAP.memory().frames().alloc(&FrameRequest::ONE) {
            frames.push(frame);
        }
        let mut objects = Vec::new();
        while let Ok(object) = ObjectAlloc::<Node>::alloc(&nodes) {
            objects.push(object);
        }
        for i in 0..reserved as u64 {
            hold.store(range(100_000 + 2 * i, 1), Some(i), &mut |_| ());
        }
        drop(hold);
        let mut stored = 0;
        let refused = loop {
            let at = range(200_000 + 2 * stored, 1);
            match tree.store(at, Some(stored), &mut |_| ()) {
                Ok(()) => stored += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused, AllocError::OutOfMemory);
        tree.check().unwrap();
        assert_eq!(tree.len() as u64, 2000 + reserved as u64 + stored);
        for object in objects {
            // SAFETY: it came from this cache and nobody uses it.
            unsafe { ObjectAlloc::<Node>::free(&nodes, object) };
        }
        for frame in frames {
            HEAP.memory().frames().free(frame);
        }
    }
    tree.store(range(300_000, 1), Some(1), &mut |_| ()).unwrap();

    // Shared from here on: edits go into copies, which come back after the grace period.
    // SAFETY: one thread runs the test.
    let grace = unsafe { SingleGrace::new() };
    let mut shared = SharedTree::from_tree(tree, &grace);
    let (mut writer, readers) = shared.split();
    let section = readers.read();
    let seen = section.get(Page::ZERO).unwrap();
    writer
        .store(range(0, 4), Some(u64::MAX), &mut |_| ())
        .unwrap();
    assert_eq!(seen.value, 0);
    assert_eq!(section.get(Page::ZERO).unwrap().value, u64::MAX);
    drop(section);
    writer.quiesce();
    writer.check().unwrap();
    drop(shared);
    assert_eq!(live(), 0, "every node went back to its cache");
}
