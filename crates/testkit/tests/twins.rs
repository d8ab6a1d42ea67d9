//! The twins against each other and against planted bugs, through the operation enums.
#![cfg(not(any(loom, shuttle)))]

use kmem_hal::{
    AllocError, FixedPool, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, ObjectAlloc,
    Order, OwnedFrame, Page, PageRange,
};
use kmem_testkit::arena::order;
use kmem_testkit::conformance::{Report, frame_source, object_alloc};
use kmem_testkit::ops::{
    FrameOp, ObjectOp, PageOp, PageTableUnderTest, RangeOp, RangesUnderTest, SpaceOp,
    SpacesUnderTest, from_bytes, run_frames, run_objects, run_pages, run_ranges, run_spaces,
};
use kmem_testkit::twins::{
    BonwickCache, FlatMap, ListBuddy, ListVmas, ProcessId, RangeModel, SpaceModel, TreeVmas,
};
use kmem_testkit::{Arena, ArenaSource, FailingSource, HeapObjects, every_failure};
use proptest::collection::vec;
use proptest::prelude::*;

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn buddy_serves_and_merges_everything_back(ops in vec(any::<FrameOp>(), 1..120), frames in 1u64..700) {
        let arena = Arena::new(frames);
        let buddy = ListBuddy::new(&arena, arena.range());
        let before = buddy.free_blocks();
        run_frames(&buddy, &arena, &ops).map_err(|e| TestCaseError::fail(e.to_string()))?;
        buddy.assert_consistent();
        prop_assert_eq!(buddy.free_blocks(), before);
    }

    #[test]
    fn arena_source_serves(ops in vec(any::<FrameOp>(), 1..120)) {
        let arena = Arena::new(200);
        let source = ArenaSource::new(&arena);
        run_frames(&source, &arena, &ops).map_err(|e| TestCaseError::fail(e.to_string()))?;
        source.assert_all_free();
    }

    #[test]
    fn object_allocators_serve(ops in vec(any::<ObjectOp>(), 1..200)) {
        let fail = |e: kmem_testkit::ops::Disagreement| TestCaseError::fail(e.to_string());
        let arena = Arena::new(64);
        let frames = ArenaSource::new(&arena);
        let slab = BonwickCache::<[u64; 9], _, _>::new(&frames, &arena, order(1), || [0; 9]);
        run_objects(&slab, &ops).map_err(fail)?;
        prop_assert_eq!(slab.in_use(), 0);
        slab.reap();
        frames.assert_all_free();
        let heap = HeapObjects::<[u64; 3]>::with_limit(50);
        run_objects(&heap, &ops).map_err(fail)?;
        heap.assert_all_free();
        let pool = FixedPool::<[u64; 2], 100>::new();
        run_objects(&pool, &ops).map_err(fail)?;
        prop_assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn list_and_tree_agree(ops in vec(any::<RangeOp>(), 1..150)) {
        run_ranges(&mut ListVmas::new(), &ops).map_err(|e| TestCaseError::fail(e.to_string()))?;
        run_ranges(&mut TreeVmas::new(), &ops).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }

    #[test]
    fn flat_map_agrees_with_itself(ops in vec(any::<PageOp>(), 1..60)) {
        run_pages(&mut Flat::default(), &ops, false).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }

    #[test]
    fn spaces_agree_with_themselves(ops in vec(any::<SpaceOp>(), 1..150)) {
        run_spaces(&mut Spaces::default(), &ops).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }

    #[test]
    fn any_bytes_are_operations(bytes in vec(any::<u8>(), 0..300)) {
        let arena = Arena::new(64);
        let source = ArenaSource::new(&arena);
        let ops: Vec<FrameOp> = from_bytes(&bytes);
        prop_assert!(run_frames(&source, &arena, &ops).is_ok());
        source.assert_all_free();
        let _: Vec<SpaceOp> = from_bytes(&bytes);
    }
}

/// Runs enough random lists that a bug which shows in one of fifty is found for sure, from a fixed seed.
fn finds<O: std::fmt::Debug>(
    strategy: impl Strategy<Value = O>,
    mut run: impl FnMut(&O) -> bool,
) -> bool {
    use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(cases(1), rng);
    (0..400).any(|_| {
        let value = strategy.new_tree(&mut runner).unwrap();
        !run(&proptest::strategy::ValueTree::current(&value))
    })
}

/// A source that does not zero, or hands a tail out twice.
struct Broken<'a>(ArenaSource<'a>, bool);

// SAFETY: none: the runner must find out.
unsafe impl FrameSource for Broken<'_> {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if self.1 {
            let mut request = *request;
            request.zeroed = false;
            return self.0.alloc(&request);
        }
        let block = self.0.alloc(request)?;
        if block.order() == order(2) {
            // The lower half too late: both halves are the first one's.
            let (first, _) = block.into_raw();
            let first = first.align_down(order(3));
            // SAFETY: none.
            return Ok(unsafe { OwnedFrame::from_raw(first, order(2)) });
        }
        Ok(block)
    }
}

impl FrameSink for Broken<'_> {
    fn free(&self, block: OwnedFrame) {
        let _ = block.into_raw();
    }
}

#[test]
fn frame_runner_finds_missing_zeroes_and_overlaps() {
    for zeroes in [true, false] {
        assert!(finds(vec(any::<FrameOp>(), 1..60), |ops| {
            let arena = Arena::new(256);
            run_frames(&Broken(ArenaSource::new(&arena), zeroes), &arena, ops).is_ok()
        }));
    }
}

/// Ranges with a planted bug.
struct Planted(TreeVmas<u8>, &'static str);

impl RangesUnderTest for Planted {
    fn insert(&mut self, range: PageRange, value: u8) -> bool {
        RangeModel::insert(&mut self.0, range, value);
        true
    }
    fn remove(&mut self, range: PageRange) -> bool {
        let range = match (
            self.1,
            PageRange::with_count(range.first(), range.count() - 1),
        ) {
            // The last page stays.
            ("remove", Some(shorter)) => shorter,
            _ => range,
        };
        RangeModel::remove(&mut self.0, range);
        true
    }
    fn get(&self, page: Page) -> Option<u8> {
        RangeModel::get(&self.0, page)
    }
    fn gap_up(&self, count: u64, within: PageRange) -> Option<PageRange> {
        let more = u64::from(self.1 == "gap");
        RangeModel::gap_up(&self.0, count + more, within)
    }
    fn gap_down(&self, count: u64, within: PageRange) -> Option<PageRange> {
        RangeModel::gap_down(&self.0, count, within)
    }
    fn ranges(&self) -> Vec<(PageRange, u8)> {
        RangeModel::ranges(&self.0)
    }
}

#[test]
fn range_runner_finds_an_off_by_one() {
    for plant in ["remove", "gap"] {
        assert!(finds(vec(any::<RangeOp>(), 1..100), |ops| {
            run_ranges(&mut Planted(TreeVmas::new(), plant), ops).is_ok()
        }));
    }
}

/// A page table that is the flat map, with a bug if asked.
#[derive(Default)]
struct Flat(FlatMap<bool>, &'static str);

impl PageTableUnderTest for Flat {
    fn map(&mut self, pages: PageRange, first: Frame, writable: bool) -> bool {
        if self.1 == "prefix" {
            // Not all or none: a prefix stays behind.
            return pages.iter().enumerate().all(|(index, page)| {
                let frame = Frame::from_number(first.number() + index as u64);
                self.0.map(PageRange::single(page), frame, writable).is_ok()
            });
        }
        self.0.map(pages, first, writable).is_ok()
    }
    fn unmap(&mut self, pages: PageRange) -> Vec<Frame> {
        let gone = self.0.unmap(pages);
        gone.into_iter().map(|(_, entry)| entry.frame).collect()
    }
    fn protect(&mut self, pages: PageRange, writable: bool) {
        if self.1 == "protect" && writable {
            return;
        }
        self.0.protect(pages, writable);
    }
    fn query(&self, page: Page) -> Option<(Frame, bool)> {
        self.0.get(page).map(|entry| (entry.frame, entry.rights))
    }
}

#[test]
fn page_runner_finds_prefixes_and_lost_rights() {
    for plant in ["prefix", "protect"] {
        assert!(finds(vec(any::<PageOp>(), 1..60), |ops| {
            run_pages(&mut Flat(FlatMap::new(), plant), ops, false).is_ok()
        }));
    }
}

/// Spaces that are the model, with a bug if asked.
#[derive(Default)]
struct Spaces {
    model: SpaceModel,
    plant: &'static str,
    /// Parent of each process.
    parents: std::collections::BTreeMap<ProcessId, ProcessId>,
}

impl SpacesUnderTest for Spaces {
    fn spawn(&mut self, process: ProcessId) -> bool {
        self.model.spawn() == process
    }
    fn fork(&mut self, parent: ProcessId, child: ProcessId) -> bool {
        self.parents.insert(child, parent);
        self.model.fork(parent) == Some(child)
    }
    fn exit(&mut self, process: ProcessId) {
        self.model.exit(process);
    }
    fn map(&mut self, process: ProcessId, pages: PageRange, writable: bool) -> bool {
        self.model.map(process, pages, writable)
    }
    fn unmap(&mut self, process: ProcessId, pages: PageRange) -> bool {
        self.model.unmap(process, pages)
    }
    fn protect(&mut self, process: ProcessId, pages: PageRange, writable: bool) -> bool {
        self.model.protect(process, pages, writable)
    }
    fn discard(&mut self, process: ProcessId, pages: PageRange) -> bool {
        self.plant == "discard" || self.model.discard(process, pages)
    }
    fn read(&mut self, process: ProcessId, page: Page) -> Option<u8> {
        self.model.read(process, page)
    }
    fn write(&mut self, process: ProcessId, page: Page, byte: u8) -> bool {
        if self.plant == "fork"
            && let Some(&parent) = self.parents.get(&process)
        {
            // The parent's frame was left writable for the child.
            self.model.write(parent, page, byte);
        }
        self.model.write(process, page, byte)
    }
}

#[test]
fn space_runner_finds_shared_writes_and_stale_content() {
    for plant in ["fork", "discard"] {
        assert!(finds(vec(any::<SpaceOp>(), 1..200), |ops| {
            let mut spaces = Spaces {
                plant,
                ..Spaces::default()
            };
            run_spaces(&mut spaces, ops).is_ok()
        }));
    }
}

#[test]
fn twins_keep_hals_contracts() {
    let report = Report::new();
    let arena = Arena::at(FrameRange::new(Frame::from_number(0x3fd), 1300).unwrap());
    let buddy = ListBuddy::new(&arena, arena.range());
    frame_source::check(&report, &buddy, &arena, Order::MAX_BUDDY);
    buddy.assert_consistent();
    assert_eq!(buddy.free_frames(), 1300);
    let slab = BonwickCache::<[u32; 5], _, _>::new(&buddy, &arena, order(0), || [0; 5]);
    object_alloc::check(&report, &slab);
    report.assert_ok();
    drop(slab);
    assert_eq!(buddy.free_frames(), 1300);
}

#[test]
fn a_slab_builds_each_object_once_and_survives_every_failure() {
    use std::sync::atomic::{AtomicU32, Ordering};
    static BUILT: AtomicU32 = AtomicU32::new(0);
    let places = every_failure(|plan| {
        let arena = Arena::new(8);
        let frames = ArenaSource::new(&arena);
        let source = FailingSource::new(&frames, plan);
        let slab = BonwickCache::<[u64; 64], _, _>::new(&source, &arena, order(0), || {
            BUILT.fetch_add(1, Ordering::Relaxed);
            [0; 64]
        });
        let objects: Vec<_> = (0..20).map_while(|_| slab.alloc().ok()).collect();
        for &object in &objects {
            // SAFETY: from this cache, freed once.
            unsafe { slab.free(object) };
        }
        let built = BUILT.load(Ordering::Relaxed);
        if let Ok(again) = slab.alloc() {
            // SAFETY: as above.
            unsafe { slab.free(again) };
            if !objects.is_empty() {
                assert_eq!(BUILT.load(Ordering::Relaxed), built, "built again");
            }
        }
        slab.reap();
        frames.assert_all_free();
    });
    // Eight objects a slab: twenty need three slabs.
    assert_eq!(places, 3);
}
