//! A system with a policy: what it reported is written down, and its large source gives single pages.

use std::alloc::Layout;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kmem_hal::{AllocError, FrameTable, LargeSource, OffsetMap, Spin};
use kmem_slab::{Flags, Misuse, Platform, Policy, SlabSystem};

use super::{Arena, TestParts, ThreadCpu, parts, run_as};

/// The parts of the other tests with a policy, a log of what was reported, and a source of pages for guarded objects.
pub struct Hardened<H> {
    parts: TestParts,
    log: Arc<Mutex<Vec<Misuse>>>,
    panics: Arc<AtomicBool>,
    refused: Arc<Mutex<Vec<usize>>>,
    large: Pages,
    policy: PhantomData<fn() -> H>,
}

/// Pages of the host's heap, as a large source.
pub struct Pages(Mutex<Vec<usize>>);

// SAFETY: V1 to V3: the host's heap gives each page once.
unsafe impl LargeSource for Pages {
    fn in_any_context(&self) -> bool {
        true
    }
    fn alloc_large(&self, size: usize, _align: usize) -> Result<NonNull<u8>, AllocError> {
        if size > 4096 {
            return Err(AllocError::OutOfMemory);
        }
        // SAFETY: the layout is not empty.
        let page = unsafe { std::alloc::alloc(Layout::from_size_align(4096, 4096).unwrap()) };
        self.0.lock().unwrap().push(page.expose_provenance());
        let page = NonNull::new(page).ok_or(AllocError::OutOfMemory)?;
        // As if somebody had used it.
        // SAFETY: a page that was just allocated.
        unsafe { page.write_bytes(0xa5, 4096) };
        Ok(page)
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        let mut pages = self.0.lock().unwrap();
        let at = pages
            .iter()
            .position(|&page| page == memory.as_ptr().addr());
        pages.swap_remove(at.expect("a page that was given"));
        // SAFETY: from `alloc_large`, and only once.
        unsafe {
            std::alloc::dealloc(
                memory.as_ptr(),
                Layout::from_size_align(4096, 4096).unwrap(),
            )
        };
    }
    fn contains(&self, address: *const u8) -> bool {
        self.0.lock().unwrap().contains(&(address.addr() & !4095))
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        self.0
            .lock()
            .unwrap()
            .contains(&memory.as_ptr().addr())
            .then_some(4096)
    }
}

// SAFETY: S1 to S3: those of the parts.
unsafe impl<H: Policy> Platform for Hardened<H> {
    type Frames = &'static Arena;
    type Map = OffsetMap;
    type Cpu = ThreadCpu;
    type Lock = Spin;
    type Large = Pages;
    type Policy = H;

    fn frames(&self) -> &&'static Arena {
        self.parts.frames()
    }
    fn map(&self) -> &OffsetMap {
        self.parts.map()
    }
    fn table(&self) -> &FrameTable {
        self.parts.table()
    }
    fn cpu(&self) -> &ThreadCpu {
        self.parts.cpu()
    }
    fn large(&self) -> &Pages {
        &self.large
    }
    fn refused(&self, bytes: usize, error: AllocError) {
        assert_eq!(error, AllocError::OutOfMemory);
        self.refused.lock().unwrap().push(bytes);
    }
    fn misuse(&self, misuse: &Misuse) {
        self.log.lock().unwrap().push(*misuse);
        assert!(!self.panics.load(Ordering::Relaxed), "{misuse}");
    }
}

/// The system, and what it said.
pub struct World<H: Policy> {
    pub arena: &'static Arena,
    pub system: SlabSystem<Hardened<H>>,
    log: Arc<Mutex<Vec<Misuse>>>,
    /// Whether a report of a misuse panics.
    pub panics: Arc<AtomicBool>,
    pub refused: Arc<Mutex<Vec<usize>>>,
}

impl<H: Policy> World<H> {
    pub fn new() -> Self {
        Self::with_nodes(1)
    }

    /// As many memory nodes; CPU `n` of two is of node `n`, or of the only one.
    pub fn with_nodes(nodes: u16) -> Self {
        run_as(0);
        let arena = Arena::with_nodes(2048, nodes);
        let (log, refused) = (Arc::default(), Arc::default());
        let panics = Arc::default();
        let system = SlabSystem::new();
        system
            .init(Hardened {
                parts: parts(arena, 2),
                log: Arc::clone(&log),
                panics: Arc::clone(&panics),
                refused: Arc::clone(&refused),
                large: Pages(Mutex::default()),
                policy: PhantomData,
            })
            .unwrap();
        Self {
            arena,
            system,
            log,
            panics,
            refused,
        }
    }

    pub fn take(&self, size: usize) -> NonNull<u8> {
        self.system.kmalloc(size, Flags::empty()).unwrap()
    }

    /// What was reported since the last look.
    pub fn seen(&self) -> Vec<Misuse> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    pub fn end(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        assert_eq!(self.seen(), []);
        self.system.teardown().unwrap();
        assert_eq!(self.arena.used(), 0);
        self.arena.check_slots();
    }

    /// Ends the system, and starts it over another arena.
    pub fn restart(&mut self) {
        self.stop();
        self.arena = Arena::new(2048);
        let parts = Hardened {
            parts: parts(self.arena, 2),
            log: Arc::clone(&self.log),
            panics: Arc::clone(&self.panics),
            refused: Arc::clone(&self.refused),
            large: Pages(Mutex::default()),
            policy: PhantomData,
        };
        self.system.init(parts).unwrap();
    }
}
