//! `FrameSource`, `FrameSink`, `FrameHandle`, `ObjectAlloc`, `LargeSource`.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use kmem_hal::{
    AllocError, DeviceFrame, FixedPool, Frame, FrameHandle, FrameRequest, FrameSink, FrameSource,
    LargeSource, ObjectAlloc, Order, OwnedFrame,
};
use kmem_testkit::arena::order;
use kmem_testkit::conformance::{Report, frame_handle, frame_source, large_source, object_alloc};
use kmem_testkit::{Arena, ArenaSource, HeapObjects};

use super::names;

struct BrokenSource<'a> {
    inner: ArenaSource<'a>,
    clause: &'static str,
    calls: Cell<u64>,
    kept: Cell<Option<(Frame, Order)>>,
}

impl<'a> BrokenSource<'a> {
    fn new(arena: &'a Arena, clause: &'static str) -> Self {
        Self {
            inner: ArenaSource::new(arena),
            clause,
            calls: Cell::new(0),
            kept: Cell::new(None),
        }
    }
}

// SAFETY: F1 to F3 are the inner source's, except for what a value is made to break.
unsafe impl FrameSource for BrokenSource<'_> {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        self.calls.set(self.calls.get() + 1);
        match self.clause {
            "F2 zeroed" => {
                let mut request = *request;
                request.zeroed = false;
                self.inner.alloc(&request)
            }
            "F2 limit" => {
                let mut request = *request;
                request.max_address = FrameRequest::ONE.max_address;
                self.inner.alloc(&request)
            }
            "F2 alignment" => {
                let mut request = *request;
                request.alignment = Order::ZERO;
                self.inner.alloc(&request)
            }
            "F1" => {
                if let Some((first, order)) = self.kept.take() {
                    // SAFETY: none: the block is owned already.
                    return Ok(unsafe { OwnedFrame::from_raw(first, order) });
                }
                let block = self.inner.alloc(request)?;
                if self.inner.used() == 7 && request.order == Order::ZERO {
                    self.kept.set(Some((block.first(), block.order())));
                }
                Ok(block)
            }
            "F3" => self.inner.alloc(request).inspect_err(|_| {
                // A refusal that loses a frame.
                if let Ok(block) = self.inner.alloc(&FrameRequest::ONE) {
                    let _ = block.into_raw();
                }
            }),
            _ => self.inner.alloc(request),
        }
    }
}

impl FrameSink for BrokenSource<'_> {
    fn free(&self, block: OwnedFrame) {
        if self.clause == "F4" && block.first().number() % 16 == 5 {
            let _ = block.into_raw();
            return;
        }
        self.inner.free(block);
    }
}

#[test]
fn arena_source_passes() {
    let arena = Arena::new(100);
    let source = ArenaSource::new(&arena);
    let report = Report::new();
    frame_source::check(&report, &source, &arena, order(5));
    report.assert_ok();
    source.assert_all_free();
    let checked: Vec<_> = report.checked().iter().map(|check| check.1).collect();
    assert_eq!(checked, ["F1", "F2", "F3", "F4"]);
}

#[test]
fn broken_sources_are_named() {
    for clause in ["F1", "F2 zeroed", "F2 limit", "F2 alignment", "F3", "F4"] {
        let arena = Arena::new(100);
        let source = BrokenSource::new(&arena, clause);
        let report = Report::new();
        frame_source::check(&report, &source, &arena, order(4));
        names(&report, "FrameSource", &clause[..2]);
    }
}

thread_local! {
    static ALIVE: Cell<usize> = const { Cell::new(0) };
}

/// A counted handle; `HOW` is what it does wrong.
struct Counted<const HOW: u8>(Frame);

// SAFETY: H1 and H2, except where HOW says otherwise.
unsafe impl<const HOW: u8> FrameHandle for Counted<HOW> {
    fn into_entry(self) -> (Frame, Order) {
        if HOW == 1 {
            ALIVE.set(ALIVE.get() - 1);
        }
        (self.0, Order::ZERO)
    }
    unsafe fn from_entry(first: Frame, _order: Order) -> Self {
        if HOW == 2 {
            ALIVE.set(ALIVE.get() + 1);
        }
        Self(first)
    }
}

fn run_handle<const HOW: u8>() -> Report {
    let report = Report::new();
    let make = || {
        ALIVE.set(ALIVE.get() + 1);
        Counted::<HOW>(Frame::from_number(3))
    };
    ALIVE.set(10);
    frame_handle::check(
        &report,
        make,
        |_| ALIVE.set(ALIVE.get() - 1),
        || ALIVE.get(),
    );
    report
}

#[test]
fn handles_pass_and_broken_ones_are_named() {
    run_handle::<0>().assert_ok();
    names(&run_handle::<1>(), "FrameHandle", "H1");
    names(&run_handle::<2>(), "FrameHandle", "H2");

    let report = Report::new();
    let arena = Arena::new(4);
    let source = ArenaSource::new(&arena);
    frame_handle::check(
        &report,
        || source.alloc(&FrameRequest::new(order(1))).unwrap(),
        |block| source.free(block),
        || source.used() as usize,
    );
    let device = || DeviceFrame::new(Frame::from_number(0xfee00), Order::ZERO).unwrap();
    frame_handle::check(&report, device, |_| {}, || 0);
    report.assert_ok();
}

struct BrokenObjects {
    inner: HeapObjects<u64>,
    clause: &'static str,
    lost: RefCell<Vec<NonNull<u64>>>,
    given: Cell<Option<NonNull<u64>>>,
}

// SAFETY: none where the clause says so.
unsafe impl ObjectAlloc<u64> for BrokenObjects {
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<u64>, AllocError> {
        if self.clause == "B1"
            && self.inner.used() == 5
            && let Some(object) = self.given.get()
        {
            return Ok(object);
        }
        let object = self.inner.alloc();
        if let Ok(object) = object {
            self.given.set(Some(object));
        }
        object
    }
    unsafe fn free(&self, object: NonNull<u64>) {
        if self.clause == "B2" && self.lost.borrow().is_empty() {
            self.lost.borrow_mut().push(object);
            return;
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.free(object) }
    }
    fn alloc_bulk(&self, out: &mut [MaybeUninit<NonNull<u64>>]) -> usize {
        for place in out.iter_mut().skip(usize::from(self.clause == "B4")) {
            let Ok(object) = ObjectAlloc::<u64>::alloc(self) else {
                return 0;
            };
            place.write(object);
        }
        out.len()
    }
}

#[test]
fn objects_pass_and_broken_ones_are_named() {
    let report = Report::new();
    let limited = HeapObjects::<[u64; 3]>::with_limit(77);
    object_alloc::check(&report, &limited);
    limited.assert_all_free();
    let pool = FixedPool::<u32, 130>::new();
    object_alloc::check(&report, &pool);
    assert_eq!(pool.in_use(), 0);
    report.assert_ok();

    for clause in ["B1", "B2", "B4"] {
        let report = Report::new();
        let broken = BrokenObjects {
            inner: HeapObjects::with_limit(60),
            clause,
            lost: RefCell::default(),
            given: Cell::default(),
        };
        object_alloc::check(&report, &broken);
        names(&report, "ObjectAlloc", clause);
    }
}

struct HeapLarge {
    given: RefCell<BTreeMap<usize, Layout>>,
    clause: &'static str,
}

// SAFETY: V1, V2, except where the clause says otherwise.
unsafe impl LargeSource for HeapLarge {
    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError> {
        // A page more, so that the broken one has somewhere to point.
        let layout = Layout::from_size_align(size + 4096, align.max(16)).unwrap();
        // SAFETY: the layout is not empty.
        let memory = NonNull::new(unsafe { alloc(layout) }).ok_or(AllocError::OutOfMemory)?;
        let memory = if self.clause == "V1" {
            // SAFETY: inside the extra page.
            unsafe { memory.add(8) }
        } else {
            memory
        };
        self.given.borrow_mut().insert(memory.addr().get(), layout);
        Ok(memory)
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        let layout = self.given.borrow_mut().remove(&memory.addr().get());
        let back = if self.clause == "V1" { 8 } else { 0 };
        // SAFETY: given by `alloc_large` with this layout.
        unsafe { dealloc(memory.as_ptr().sub(back), layout.unwrap()) }
    }
    fn contains(&self, address: *const u8) -> bool {
        let given = self.given.borrow();
        let below = given.range(..=address.addr()).next_back();
        below.is_some_and(|(&start, layout)| address.addr() < start + layout.size() - 4096)
            || self.clause == "V2"
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        let given = self.given.borrow();
        given
            .get(&memory.addr().get())
            .map(|layout| layout.size() - 4096)
    }
}

#[test]
fn large_sources_pass_and_broken_ones_are_named() {
    for clause in ["", "V1", "V2"] {
        let report = Report::new();
        let source = HeapLarge {
            given: RefCell::default(),
            clause,
        };
        large_source::check(&report, &source, 20_000);
        if clause.is_empty() {
            report.assert_ok();
        } else {
            names(&report, "LargeSource", clause);
        }
    }
}
