//! What other CPUs meet while a call is half-way: one thread plays all of them, from hooks in the environment.
//!
//! Nothing waits here: where a call would spin for somebody else, [`Env::relax`] or [`Wait::wait_until`] leaves it by unwinding, and
//! the test learns that it waited.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;

use kmem_hal::{
    AllocError, Context, FlushRequest, Frame, FrameRange, FrameRequest, FrameSink, FrameSource,
    FrameTable, FrameTag, Mmu, NoTrace, ObjectAlloc, Order, OwnedFrame, PAGE_SIZE, Page, PageRange,
    PhysAddr, RawLock, Root, Shrink, SingleCpu, SingleGrace, Spin, VirtAddr, Wait,
};
use kmem_paging::format::X86_64;
use kmem_paging::{Env, MemoryType, PageTable, Parts, Rights, TableCache};
use kmem_testkit::{Arena, ArenaSource, HeapObjects, SlotArena};
use kmem_vma_tree::Node;
use kmem_vmalloc::{
    KernelLayout, KernelPage, Kmap, KmapSlot, StackCache, StackSlots, Vmalloc, VmallocError,
};

/// What somebody else does at one point of a call.
type Other = Box<dyn Fn()>;

/// Called when the call under test comes there; empty at first.
#[derive(Default)]
struct Hook(RefCell<Option<Other>>);

impl Hook {
    fn set(&self, other: impl Fn() + 'static) {
        *self.0.borrow_mut() = Some(Box::new(other));
    }

    /// Runs what was set, which is then gone.
    fn run(&self) -> bool {
        let other = self.0.borrow_mut().take();
        other.map(|other| other()).is_some()
    }
}

/// The payload of an unwinding that ends a wait.
struct Waits;

/// Whether `call` waits for somebody.
fn waits(call: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(()) => false,
        Err(payload) if payload.is::<Waits>() => true,
        Err(payload) => resume_unwind(payload),
    }
}

/// Frames that run out for callers who cannot wait, and come back by reclaim for those who can.
struct Frames {
    arena: ArenaSource<'static>,
    left: Cell<u64>,
    reclaim: Hook,
    /// What the kernel does whenever memory is asked for that is getting scarce, whoever asks.
    pressure: Hook,
    /// The context of each request of unzeroed memory.
    asked: RefCell<Vec<(Order, Context)>>,
}

// SAFETY: F1 to F3: the arena's, or a refusal.
unsafe impl FrameSource for Frames {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        no_lock_is_held();
        self.pressure.run();
        if !request.zeroed {
            let asked = (request.order, request.context);
            self.asked.borrow_mut().push(asked);
        }
        let may_reclaim = request.context >= Context::NoIo;
        while self.left.get() == 0 {
            if !may_reclaim || !self.reclaim.run() {
                return Err(AllocError::OutOfMemory);
            }
        }
        let frame = self.arena.alloc(request)?;
        self.left.set(self.left.get() - 1);
        Ok(frame)
    }
}

impl FrameSink for Frames {
    fn free(&self, frame: OwnedFrame) {
        no_lock_is_held();
        self.left.set(self.left.get() + 1);
        self.arena.free(frame);
    }
}

/// Tells the test of each flush: the entries are gone, and no CPU has been told.
#[derive(Default)]
struct Flushes(Hook);

// SAFETY: M1 to M5: nobody walks the tables.
unsafe impl Mmu for Flushes {
    unsafe fn load_root(&self, _root: Root, _keep: bool) {}
    fn flush_local(&self, _request: &FlushRequest) {
        self.0.run();
    }
}

/// Parts, and a spin that shows.
struct Hooked(Parts<'static, &'static Arena, Frames, Flushes, SingleGrace, SingleCpu, NoTrace>);

// SAFETY: E1 to E4: those of the parts.
unsafe impl Env for Hooked {
    type Map = &'static Arena;
    type Frames = Frames;
    type Mmu = Flushes;
    type Grace = SingleGrace;
    type Cpu = SingleCpu;
    type Trace = NoTrace;

    fn map(&self) -> &&'static Arena {
        self.0.map()
    }
    fn frames(&self) -> &Frames {
        self.0.frames()
    }
    fn mmu(&self) -> &Flushes {
        self.0.mmu()
    }
    fn grace(&self) -> &SingleGrace {
        self.0.grace()
    }
    fn cpu(&self) -> &SingleCpu {
        self.0.cpu()
    }
    fn trace(&self) -> &NoTrace {
        self.0.trace()
    }
    fn slots(&self) -> &FrameTable {
        self.0.slots()
    }
    fn cache(&self) -> &TableCache {
        self.0.cache()
    }
    fn relax(&self) {
        resume_unwind(Box::new(Waits));
    }
}

type Stacks =
    StackCache<'static, 'static, X86_64, &'static Hooked, &'static Nodes, Watched, SingleCpu, 2>;
type Table = PageTable<X86_64, &'static Hooked, KernelPage>;
type Kernel = Vmalloc<'static, X86_64, &'static Hooked, &'static Nodes, Watched>;

thread_local! {
    /// Run where somebody is about to take the lock of a [`Kernel`].
    static LOCKED: Hook = Hook::default();
    /// Whether one is taken.
    static HELD: Cell<bool> = const { Cell::new(false) };
}

/// Whoever gives and takes memory may come back to the kernel that asks, and want its lock.
fn no_lock_is_held() {
    assert!(!HELD.get(), "memory changes hands under the lock");
}

/// A lock that shows.
struct Watched(Spin);

// SAFETY: the lock inside.
unsafe impl RawLock for Watched {
    type State = <Spin as RawLock>::State;
    const INIT: Self = Self(Spin::INIT);

    fn lock(&self) -> Self::State {
        LOCKED.with(Hook::run);
        HELD.set(true);
        self.0.lock()
    }
    fn try_lock(&self) -> Option<Self::State> {
        self.0.try_lock().inspect(|_| HELD.set(true))
    }
    unsafe fn unlock(&self, state: Self::State) {
        HELD.set(false);
        // SAFETY: the caller's.
        unsafe { self.0.unlock(state) }
    }
}

/// Memory for nodes, which can run out.
struct Nodes {
    objects: HeapObjects<Node>,
    refuses: Cell<bool>,
}

// SAFETY: B1 to B4: the objects', or a refusal.
unsafe impl ObjectAlloc<Node> for Nodes {
    const TYPE_STABLE: bool = false;

    fn alloc(&self) -> Result<NonNull<Node>, AllocError> {
        no_lock_is_held();
        if self.refuses.get() {
            return Err(AllocError::OutOfMemory);
        }
        self.objects.alloc()
    }

    unsafe fn free(&self, node: NonNull<Node>) {
        no_lock_is_held();
        // SAFETY: the caller's promise.
        unsafe { self.objects.free(node) }
    }
}

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn cpu() -> SingleCpu {
    // SAFETY: one thread plays all CPUs, and nothing interrupts it but its own hooks.
    unsafe { SingleCpu::new() }
}

fn table(first: Frame, count: u64) -> (&'static Hooked, &'static Table) {
    let arena = leak(Arena::at(FrameRange::new(first, count).unwrap()));
    let slots = leak(SlotArena::new(kmem_hal::PhysMap::reach(arena)));
    let frames = Frames {
        arena: ArenaSource::new(arena),
        left: Cell::new(count),
        reclaim: Hook::default(),
        pressure: Hook::default(),
        asked: RefCell::default(),
    };
    let flushes = Flushes::default();
    // SAFETY: one thread, and the parts belong to one arena.
    let parts = unsafe { Parts::new(arena, frames, flushes, SingleGrace::new(), cpu(), slots) };
    let env = leak(Hooked(parts));
    let table = leak(Table::new(env).unwrap());
    // Loaded, for all that the table knows: changes of one that never was are not flushed.
    let _ = table.root();
    (env, table)
}

fn kernel(request: FrameRequest) -> (&'static Hooked, &'static Kernel) {
    let (env, table) = table(Arena::FIRST, 512);
    (env, leak(on_table(table, 256).with_frames(request)))
}

fn on_table(table: &'static Table, pages: u64) -> Kernel {
    with_nodes(table, pages, nodes())
}

fn nodes() -> &'static Nodes {
    leak(Nodes {
        objects: HeapObjects::new(),
        refuses: Cell::new(false),
    })
}

fn with_nodes(table: &'static Table, pages: u64, nodes: &'static Nodes) -> Kernel {
    let window = PageRange::with_count(KernelLayout::x86_64().vmalloc.first(), pages).unwrap();
    Vmalloc::new(table, window, nodes)
}

#[test]
fn reclaim_for_an_area_runs_without_its_tables_lock() {
    let (env, kernel) = kernel(FrameRequest::ONE.context(Context::MayWait));
    let slots = Box::leak(Box::new([StackSlots::<2>::new()]));
    let stacks = leak(StackCache::new(kernel, cpu(), slots, 8));
    for top in [stacks.alloc().unwrap(), stacks.alloc().unwrap()] {
        stacks.free(top).unwrap();
    }
    kernel.purge();
    let frames = env.frames();
    let others = frames.left.get() - 4;
    frames.left.set(4);
    // Reclaim takes the stacks, whose leaves are in the table that the area is being mapped in.
    frames.reclaim.set(|| assert_eq!(stacks.scan(1), 1));
    let mut area = None;
    let spun = waits(|| area = Some(kernel.alloc(10 * PAGE_SIZE)));
    assert!(!spun, "reclaim waits for the lock of its caller");
    let area = area.unwrap().unwrap();
    assert_eq!(kernel.bytes_at(area), Some(10 * PAGE_SIZE));
    assert_eq!(stacks.count(), 1);
    // Nothing is left to reclaim: a refusal, and what was mapped until then is gone.
    let left = frames.left.get();
    assert!(left < 20);
    assert!(kernel.alloc(20 * PAGE_SIZE).is_err());
    assert_eq!(frames.left.get(), left);
    frames.left.set(left + others);
    kernel.free(area).unwrap();
    stacks.scan(usize::MAX);
    assert_eq!(kernel.used(), (0, 0));
}

#[test]
fn memory_for_an_area_is_asked_for_as_the_caller_can_bear_with_no_lock_held() {
    let (env, table) = table(Arena::FIRST, 4096);
    let kernel =
        leak(on_table(table, 4096).with_frames(FrameRequest::ONE.context(Context::MayWait)));
    let slots = Box::leak(Box::new([StackSlots::<2>::new()]));
    let stacks = leak(StackCache::new(kernel, cpu(), slots, 8));
    let frames = env.frames();
    let huge = Order::HUGE_2M.bytes();
    let single = (Order::ZERO, Context::MayWait);
    // A large block is a wish, for which nothing is reclaimed.
    let wish = (Order::HUGE_2M, Context::NoReclaim);
    for (bytes, asked) in [
        (40 * PAGE_SIZE, vec![single; 40]),
        (huge + PAGE_SIZE, vec![wish, single]),
    ] {
        for top in [stacks.alloc().unwrap(), stacks.alloc().unwrap()] {
            stacks.free(top).unwrap();
        }
        kernel.purge();
        // Addresses, descriptions and tables are there the second time.
        kernel.free(kernel.alloc(bytes).unwrap()).unwrap();
        kernel.purge();
        frames.asked.take();
        // Each request for a frame makes the kernel look for what it can spare, in the very table that is being filled.
        let scanned = leak(Cell::new(0));
        scan_each_time(frames, stacks, scanned);
        let mut area = None;
        let spun = waits(|| area = Some(kernel.alloc(bytes)));
        frames.pressure.0.take();
        assert!(!spun, "memory is asked for under a table's lock");
        assert_eq!(scanned.get(), 2);
        assert_eq!(frames.asked.take(), asked);
        kernel.free(area.unwrap().unwrap()).unwrap();
    }
    stacks.scan(usize::MAX);
    kernel.purge();
    assert_eq!(kernel.used(), (0, 0));
}

/// Has every request for memory take one idle stack back.
fn scan_each_time(frames: &'static Frames, stacks: &'static Stacks, scanned: &'static Cell<usize>) {
    frames.pressure.set(move || {
        scanned.set(scanned.get() + stacks.scan(1));
        scan_each_time(frames, stacks, scanned);
    });
}

#[test]
fn nodes_change_hands_with_no_lock_held_and_ending_areas_needs_none() {
    let (_, table) = table(Arena::FIRST, 512);
    let nodes = nodes();
    let kernel = with_nodes(table, 1 << 14, nodes);
    let window = |_| kernel.ioremap(PhysAddr::new(0xfee0_0000), PAGE_SIZE, MemoryType::Uncached);
    for round in 0..3 {
        nodes.refuses.set(false);
        let areas: Vec<_> = (0..3000).map(|n| window(n).unwrap()).collect();
        let most = nodes.objects.used();
        assert!(most > 200, "{most} nodes: the tree has no levels");
        // What is there is enough for every order in which areas end.
        nodes.refuses.set(true);
        for at in (0..3000).map(|n| n * [1, 7, 1999][round] % 3000) {
            kernel.free(areas[at]).unwrap();
        }
        kernel.purge();
        assert_eq!(kernel.info().to_string(), "");
        let left = nodes.objects.used();
        assert!(left < most / 2, "{left} of {most} nodes are kept");
    }
    // A search that finds no room takes out what is ready.
    let all = kernel.alloc(PAGE_SIZE << 14);
    assert_eq!(all, Err(VmallocError::NoSpace));
    assert!(nodes.objects.used() < 40);
    drop(kernel);
    nodes.objects.assert_all_free();
}

/// Areas that are kept for the next of their size give their nodes to who gets none.
#[test]
fn areas_that_ended_give_their_nodes_where_there_are_no_others() {
    let (_, table) = table(Arena::FIRST, 512);
    let nodes = nodes();
    let kernel = with_nodes(table, 1 << 14, nodes);
    let window = |bytes| kernel.ioremap(PhysAddr::new(0xfee0_0000), bytes, MemoryType::Uncached);
    let mut areas: Vec<_> = (0..3000).map(|_| window(PAGE_SIZE).unwrap()).collect();
    nodes.refuses.set(true);
    let refused = loop {
        match window(2 * PAGE_SIZE) {
            Ok(area) => areas.push(area),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, VmallocError::Memory);
    // Few enough that all are kept for the next of their size, in the tree.
    for area in areas.drain(..400) {
        kernel.free(area).unwrap();
    }
    areas.push(window(2 * PAGE_SIZE).unwrap());
    for area in areas {
        kernel.free(area).unwrap();
    }
    drop(kernel);
    nodes.objects.assert_all_free();
}

#[test]
fn memory_for_a_purge_is_asked_for_before_its_turn() {
    let (env, kernel) = kernel(FrameRequest::ONE);
    let frames = env.frames();
    let before = frames.left.get();
    let area = kernel.alloc(PAGE_SIZE).unwrap();
    kernel.free(area).unwrap();
    // The kernel looks for what it can spare, and that is what waits for this purge.
    let nested = leak(Cell::new(None));
    frames
        .pressure
        .set(move || nested.set(Some(waits(|| kernel.purge()))));
    assert!(!waits(|| kernel.purge()));
    assert_eq!(nested.get(), Some(false), "waits for a turn of its caller");
    assert!(
        kernel
            .table()
            .query(Page::containing(area))
            .leaf()
            .is_none()
    );
    assert_eq!(kernel.used(), (0, 0));
    // One frame for a batch and one for descriptions, whoever took them; the rest are tables.
    let kept = before - frames.left.get();
    assert_eq!(kept, 2 + 3);
    // Later purges have theirs.
    frames.asked.take();
    kernel.free(kernel.alloc(PAGE_SIZE).unwrap()).unwrap();
    kernel.purge();
    assert_eq!(frames.asked.take().len(), 1);
}

#[test]
fn a_search_waits_for_purges_that_took_something_and_for_no_others() {
    let (env, table) = table(Arena::FIRST, 512);
    let kernel = leak(on_table(table, 8));
    let seen = leak(Cell::new(None));
    let area = kernel.alloc(4 * PAGE_SIZE).unwrap();
    kernel.free(area).unwrap();
    // The addresses are about to come free.
    env.mmu().0.set(move || {
        seen.set(Some(waits(|| {
            let _ = kernel.alloc(5 * PAGE_SIZE);
        })));
    });
    kernel.purge();
    assert_eq!(seen.take(), Some(true), "refused, and they came free");
    let area = kernel.alloc(5 * PAGE_SIZE).unwrap();
    // Nothing will: a purge that has its turn is about to look.
    LOCKED.with(|locked| {
        locked.set(move || {
            seen.set(Some(waits(|| {
                assert_eq!(kernel.alloc(4 * PAGE_SIZE), Err(VmallocError::NoSpace));
            })));
        });
    });
    kernel.purge();
    assert_eq!(seen.take(), Some(false), "waits for what does not come");
    kernel.free(area).unwrap();
}

#[test]
fn a_purge_ends_after_those_that_began_before_it() {
    let (env, kernel) = kernel(FrameRequest::ONE);
    let area = kernel.alloc(PAGE_SIZE).unwrap();
    kernel.free(area).unwrap();
    let page = Page::containing(area);
    let seen = leak(Cell::new(None));
    // The first one has taken what waited. Its entries are gone, and CPUs still translate.
    env.mmu().0.set(move || {
        assert!(kernel.table().query(page).leaf().is_none());
        seen.set(Some(waits(|| kernel.purge())));
    });
    kernel.purge();
    assert_eq!(seen.get(), Some(true), "the second left before the flush");
    // With nothing under way it returns at once.
    assert!(!waits(|| kernel.purge()));
    assert_eq!(kernel.used(), (0, 0));
}

/// A wait that shows.
struct Shows;

impl Wait for Shows {
    fn wait_until(&self, _key: usize, done: &dyn Fn() -> bool) {
        if !done() {
            resume_unwind(Box::new(Waits));
        }
    }
    fn wake(&self, _key: usize) {}
}

#[test]
fn a_flush_of_idle_mappings_ends_after_the_one_before_it() {
    let (env, table) = table(Arena::FIRST, 512);
    let pages = PageRange::with_count(KernelLayout::x86_64().vmalloc.first(), 4).unwrap();
    let slots = Box::leak(Box::new([KmapSlot::VACANT; 4]));
    let kmap: &Kmap<'_, X86_64, _, Spin, _> = leak(Kmap::new(table, pages, slots, Shows).unwrap());
    let frame = |n: u64| Frame::from_number(0x200 + n);
    let [one, two] = [0, 1].map(|n| kmap.map(frame(n)).unwrap());
    kmap.unmap(one).unwrap();
    let seen = leak(Cell::new(None));
    env.mmu().0.set(move || {
        let nothing_new = waits(|| kmap.flush());
        // Too late for the flush that is under way.
        kmap.unmap(two).unwrap();
        seen.set(Some((nothing_new, waits(|| kmap.flush()))));
        // A caller who never waits for users finds a vacant page.
        assert!(!waits(|| kmap
            .unmap(kmap.try_map(frame(2)).unwrap())
            .unwrap()));
    });
    kmap.flush();
    assert_eq!(seen.get(), Some((true, true)), "left before the flush");
    let readable = |at| {
        let leaf = table.query(Page::containing(at)).leaf();
        leaf.is_some_and(|leaf| leaf.attributes.rights.contains(Rights::READ))
    };
    assert!(!readable(one) && readable(two));
    kmap.flush();
    assert!(!readable(two));
    assert!(!waits(|| kmap.flush()));
}

#[test]
fn a_window_over_memory_between_two_holes_frees_none_of_it() {
    // All memory lies above 4 GiB, in slots of its own; the window begins below and ends behind what has slots.
    let (env, table) = table(Frame::from_number(1 << 20), 2048);
    let kernel = on_table(table, 1 << 19);
    let owned = kernel.alloc(Order::HUGE_2M.bytes()).unwrap();
    let leaf = |at| kernel.table().query(Page::containing(at)).leaf().unwrap();
    assert_eq!(leaf(owned).order, Order::HUGE_2M);
    let (start, bytes) = (PhysAddr::new(0xffff_f000), (1 << 30) + 0x2000);
    let window = kernel.ioremap(start, bytes, MemoryType::WriteBack).unwrap();
    let offset = leaf(owned).frame.start().as_u64() - start.as_u64();
    let seen = leaf(VirtAddr::new(window.as_u64() + offset));
    assert_eq!(
        (seen.frame, seen.order),
        (leaf(owned).frame, Order::HUGE_2M)
    );
    kernel.free(window).unwrap();
    kernel.purge();
    let slot = env.slots().slot(seen.frame).unwrap();
    assert_eq!(
        slot.tag(),
        FrameTag::Vmalloc,
        "the window freed its owner's memory"
    );
    kernel.free(owned).unwrap();
}
