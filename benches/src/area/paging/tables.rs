//! The page tables that are compared, behind two traits, and the pool that their tables come from.

use std::hint::black_box;
use std::sync::OnceLock;

use kmem_hal::{
    AllocError, DeviceFrame, Frame, FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, Page,
    PageRange, PhysAddr, PhysMap, VirtAddr,
};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, ChangeError, Cursor, PageTable, Parts, Rights, TableCache};
use memory_addr::MemoryAddr as _;
use page_table_entry::{MappingFlags, x86_64::X64PTE};
use page_table_multiarch::{PageSize, PageTable64, PagingHandler, PagingMetaData};
use x86_64::structures::paging as x86;
use x86_64::structures::paging::{Mapper as _, Translate as _};

use crate::platform::{BASE, HostGrace, NoWalks, Region, ThreadCpus, frame_table, grace};

/// The first page that is mapped, aligned to 1 GiB.
pub(super) const FIRST: u64 = 1 << 20;

/// The frame that page `index` of a workload gets; huge leaves get frames of their size.
pub(super) const fn target(index: u64) -> u64 {
    (1 << 24) + index
}

/// Frames for the tables of all programs.
pub(super) struct Pool {
    region: &'static Region,
    free: spin::Mutex<Vec<u64>>,
}

impl Pool {
    pub(super) fn take(&self, zeroed: bool) -> Option<u64> {
        let frame = self.free.lock().pop()?;
        if zeroed {
            // SAFETY: the frame was free and is in the region.
            unsafe { self.pointer(frame).write_bytes(0, 4096) };
        }
        Some(frame)
    }

    pub(super) fn give(&self, frame: u64) {
        self.free.lock().push(frame);
    }

    pub(super) fn region(&self) -> &'static Region {
        self.region
    }

    #[inline]
    pub(super) fn pointer(&self, frame: u64) -> *mut u8 {
        self.region.to_ptr(PhysAddr::new(frame * 4096))
    }
}

/// Tables that the pool has.
pub(super) const POOL: u64 = 1 << 15;

pub(super) fn pool() -> &'static Pool {
    static ALL: OnceLock<Pool> = OnceLock::new();
    ALL.get_or_init(|| {
        let region: &'static Region = Box::leak(Box::new(Region::new(POOL).touched()));
        Pool {
            region,
            free: (BASE..BASE + POOL).rev().collect::<Vec<_>>().into(),
        }
    })
}

// SAFETY: F1 to F3: a number is in the pool or out, and only single frames are asked for.
unsafe impl FrameSource for Pool {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        if request.order != Order::ZERO {
            return Err(AllocError::Unsatisfiable);
        }
        let frame = self.take(request.zeroed).ok_or(AllocError::OutOfMemory)?;
        // SAFETY: O1 to O3: it was free.
        Ok(unsafe { OwnedFrame::from_raw(Frame::from_number(frame), Order::ZERO) })
    }
}

impl FrameSink for Pool {
    fn free(&self, frame: OwnedFrame) {
        self.give(frame.into_raw().0.number());
    }
}

pub(super) type Env =
    Parts<'static, &'static Region, &'static Pool, NoWalks, &'static HostGrace, ThreadCpus>;

pub(super) fn env() -> &'static Env {
    struct Shared(Env);
    // SAFETY: the environment of a machine with several CPUs, which the threads play.
    unsafe impl Send for Shared {}
    // SAFETY: as above.
    unsafe impl Sync for Shared {}
    static ALL: OnceLock<Shared> = OnceLock::new();
    let shared = ALL.get_or_init(|| {
        let cpus = ThreadCpus::all();
        let grace = grace();
        let slots = frame_table(pool().region);
        // SAFETY: the only frame table of the pool's region, and no MMU walks.
        let parts = unsafe { Parts::new(pool().region, pool(), NoWalks, grace, cpus, slots) };
        Shared(parts.with_cache(POOL as usize))
    });
    &shared.0
}

/// Page tables as the workloads see them. Pages count from [`FIRST`].
pub(super) trait Table: Sized {
    fn new() -> Self;
    fn map_each(&mut self, pages: u64);
    fn protect_each(&mut self, pages: u64, writable: bool);
    /// The sum of the frames that were mapped.
    fn unmap_each(&mut self, pages: u64) -> u64;
    fn translate(&self, page: u64) -> Option<u64>;
    fn map_2m(&mut self, blocks: u64);
    fn map_sparse(&mut self, pages: u64);
    fn unmap_sparse(&mut self, pages: u64) -> u64;
}

/// Page tables with calls for ranges.
pub(super) trait Ranged: Table {
    fn map_range(&mut self, pages: u64, used: bool);
    fn map_range_2m(&mut self, blocks: u64);
    fn protect_range(&mut self, pages: u64, writable: bool);
    fn unmap_range(&mut self, pages: u64);
    /// As `protect_range`, on a table that is loaded nowhere; the peers know no difference.
    fn protect_range_quiescent(&mut self, pages: u64, writable: bool) {
        self.protect_range(pages, writable);
    }
}

pub(super) type KmemTable = PageTable<X86_64, &'static Env, DeviceFrame>;

/// kmem's table; what is mapped at the end is unmapped when it is dropped.
pub(super) struct Kmem(Option<KmemTable>);

impl Kmem {
    pub(super) fn table(&self) -> &KmemTable {
        self.0.as_ref().expect("it is there until it is dropped")
    }

    pub(super) fn handle(index: u64, order: Order) -> DeviceFrame {
        DeviceFrame::new(Frame::from_number(target(index)), order).expect("it is aligned")
    }
}

impl Drop for Kmem {
    fn drop(&mut self) {
        let table = self.0.take().expect("it is dropped once");
        table.destroy(|_leaf, _frame| {}, |_page, _payload| {});
        // The next table starts without known-zero ones.
        TableCache::shrink(env(), usize::MAX);
    }
}

pub(super) fn page(index: u64) -> Page {
    Page::from_number(FIRST + index)
}

pub(super) fn pages(count: u64) -> PageRange {
    PageRange::with_count(page(0), count).expect("not empty")
}

pub(super) const SPARSE: u64 = 512;

pub(super) fn huge() -> Order {
    Order::new(9).expect("a valid order")
}

pub(super) fn rights(writable: bool) -> Rights {
    if writable {
        Rights::USER_DATA
    } else {
        Rights::READ | Rights::USER
    }
}

/// Unmaps a range of kmem's; the sum of the frames.
pub(super) fn unmap_kmem(table: &KmemTable, range: PageRange) -> u64 {
    let mut cursor = table.cursor(range).expect("a range of the format");
    let mut gather = table.gather::<256>();
    let (mut sum, mut rest) = (0, range);
    loop {
        let outcome = cursor.unmap(rest, &mut gather);
        cursor.release();
        gather.commit(|frame: DeviceFrame| sum += frame.first().number());
        match outcome {
            Err(ChangeError::Full { next }) => {
                rest = PageRange::new(next, range.last()).expect("next is inside");
            }
            outcome => {
                outcome.expect("only full gathers stop it");
                return sum;
            }
        }
    }
}

impl Kmem {
    /// Maps `count` pages to the frames of a device, in blocks that are as large as can be, by leaves of at most `largest`.
    fn map_linear(
        cursor: &mut Cursor<'_, X86_64, &'static Env, DeviceFrame>,
        count: u64,
        largest: Order,
        attributes: Attributes,
    ) {
        let mut done = 0;
        while done < count {
            let order =
                Order::new((count - done).ilog2() as u8).expect("the range is not that large");
            cursor
                .map_divided(page(done), Self::handle(done, order), largest, attributes)
                .expect("the range is free");
            done += order.frames();
        }
    }

    /// Unmaps `count` pages, `step` apart, one by one.
    fn unmap_steps(&mut self, count: u64, step: u64) -> u64 {
        let table = self.table();
        let mut cursor = table.cursor(pages(count * step)).expect("a valid range");
        let mut gather = table.gather::<256>();
        let mut sum = 0;
        for index in 0..count {
            let one = PageRange::single(page(index * step));
            if let Err(error) = cursor.unmap(one, &mut gather) {
                assert!(matches!(error, ChangeError::Full { .. }));
                cursor.release();
                gather.commit(|frame: DeviceFrame| sum += frame.first().number());
                cursor.unmap(one, &mut gather).expect("the gather is empty");
            }
        }
        drop(cursor);
        gather.commit(|frame: DeviceFrame| sum += frame.first().number());
        sum
    }

    fn map_steps(&mut self, count: u64, step: u64) {
        let mut cursor = self
            .table()
            .cursor(pages(count * step))
            .expect("a valid range");
        // As a fault leaves them: used and written.
        let attributes = Attributes::new(Rights::USER_DATA).accessed().dirty();
        for index in 0..count {
            cursor
                .map(
                    page(index * step),
                    Self::handle(index, Order::ZERO),
                    attributes,
                )
                .expect("the place is free");
        }
    }
}

impl Table for Kmem {
    fn new() -> Self {
        let table = PageTable::new(env()).expect("memory for a root");
        // From here on it counts as live.
        let _ = table.root();
        Self(Some(table))
    }
    fn map_each(&mut self, count: u64) {
        self.map_steps(count, 1);
    }
    fn protect_each(&mut self, count: u64, writable: bool) {
        let table = self.table();
        let mut cursor = table.cursor(pages(count)).expect("a valid range");
        let mut gather = table.gather::<8>();
        for index in 0..count {
            cursor
                .protect(
                    PageRange::single(page(index)),
                    rights(writable),
                    &mut gather,
                )
                .expect("no huge leaf is split");
        }
        drop(cursor);
        gather.commit(|_| {});
    }
    fn unmap_each(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, 1)
    }
    #[inline]
    fn translate(&self, index: u64) -> Option<u64> {
        let address = VirtAddr::new((FIRST + index) * 4096);
        Some(self.table().translate(address)?.as_u64() / 4096)
    }
    fn map_2m(&mut self, blocks: u64) {
        self.map_range_2m(blocks);
    }
    fn map_sparse(&mut self, count: u64) {
        self.map_steps(count, SPARSE);
    }
    fn unmap_sparse(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, SPARSE)
    }
}

impl Ranged for Kmem {
    fn map_range(&mut self, count: u64, used: bool) {
        let mut cursor = self.table().cursor(pages(count)).expect("a valid range");
        let mut attributes = Attributes::new(Rights::USER_DATA);
        if used {
            attributes = attributes.accessed().dirty();
        }
        Self::map_linear(&mut cursor, count, Order::ZERO, attributes);
    }
    fn map_range_2m(&mut self, blocks: u64) {
        let range = pages(blocks * SPARSE);
        let mut cursor = self.table().cursor(range).expect("a valid range");
        let attributes = Attributes::new(Rights::USER_DATA);
        Self::map_linear(&mut cursor, blocks * SPARSE, huge(), attributes);
    }
    fn protect_range(&mut self, count: u64, writable: bool) {
        let table = self.table();
        let mut cursor = table.cursor(pages(count)).expect("a valid range");
        let mut gather = table.gather::<8>();
        let changed = cursor
            .protect(pages(count), rights(writable), &mut gather)
            .expect("no huge leaf is split");
        assert_eq!(changed, count);
        drop(cursor);
        gather.commit(|_| {});
    }
    fn protect_range_quiescent(&mut self, count: u64, writable: bool) {
        let table = self.0.as_mut().expect("it is there until it is dropped");
        let quiescent = table.quiesce().expect("no processor walks here");
        let mut cursor = quiescent.cursor(pages(count)).expect("a valid range");
        let mut gather = quiescent.gather::<8>();
        let changed = cursor
            .protect(pages(count), rights(writable), &mut gather)
            .expect("no huge leaf is split");
        assert_eq!(changed, count);
        drop(cursor);
        gather.commit(|_| {});
    }
    fn unmap_range(&mut self, count: u64) {
        let sum = unmap_kmem(self.table(), pages(count));
        assert_eq!(sum, (0..count).map(target).sum::<u64>());
    }
}

/// `x86_64`'s `OffsetPageTable`; dropping it takes its tables down.
pub(super) struct Offset {
    pub(super) mapper: x86::OffsetPageTable<'static>,
    root: u64,
}

pub(super) struct PoolFrames;

// SAFETY: the pool gives each frame once.
unsafe impl x86::FrameAllocator<x86::Size4KiB> for PoolFrames {
    fn allocate_frame(&mut self) -> Option<x86::PhysFrame> {
        let address = x86_64::PhysAddr::new(pool().take(false)? * 4096);
        Some(x86::PhysFrame::containing_address(address))
    }
}

impl x86::FrameDeallocator<x86::Size4KiB> for PoolFrames {
    unsafe fn deallocate_frame(&mut self, frame: x86::PhysFrame) {
        pool().give(frame.start_address().as_u64() / 4096);
    }
}

pub(super) fn x86_page<S: x86::PageSize>(index: u64) -> x86::Page<S> {
    x86::Page::containing_address(x86_64::VirtAddr::new((FIRST + index) * 4096))
}

pub(super) fn x86_frame<S: x86::PageSize>(index: u64) -> x86::PhysFrame<S> {
    x86::PhysFrame::containing_address(x86_64::PhysAddr::new(target(index) * 4096))
}

pub(super) fn x86_flags(writable: bool) -> x86::PageTableFlags {
    let mut flags = x86::PageTableFlags::PRESENT
        | x86::PageTableFlags::ACCESSED
        | x86::PageTableFlags::DIRTY
        | x86::PageTableFlags::USER_ACCESSIBLE
        | x86::PageTableFlags::NO_EXECUTE;
    flags.set(x86::PageTableFlags::WRITABLE, writable);
    flags
}

impl Offset {
    fn map_steps(&mut self, count: u64, step: u64) {
        for index in 0..count {
            // SAFETY: no processor uses these tables.
            let mapped = unsafe {
                self.mapper.map_to(
                    x86_page::<x86::Size4KiB>(index * step),
                    x86_frame(index),
                    x86_flags(true),
                    &mut PoolFrames,
                )
            };
            mapped.expect("the place is free").ignore();
        }
    }

    fn unmap_steps(&mut self, count: u64, step: u64) -> u64 {
        let mut sum = 0;
        for index in 0..count {
            let unmapped = self.mapper.unmap(x86_page::<x86::Size4KiB>(index * step));
            let (frame, flush) = unmapped.expect("it is mapped");
            flush.ignore();
            sum += frame.start_address().as_u64() / 4096;
        }
        sum
    }
}

/// Gives all tables below a root back; what leaves point to is nobody's.
pub(super) fn free_tables(frame: u64, level: u32) {
    if level > 1 {
        for index in 0..512 {
            // SAFETY: a table of 512 words that nothing uses any more.
            let word = unsafe { pool().pointer(frame).cast::<u64>().add(index).read() };
            let is_table = word & 1 != 0 && word & (1 << 7) == 0;
            if is_table {
                free_tables((word >> 12) & ((1 << 40) - 1), level - 1);
            }
        }
    }
    pool().give(frame);
}

impl Drop for Offset {
    fn drop(&mut self) {
        free_tables(self.root, 4);
    }
}

impl Table for Offset {
    fn new() -> Self {
        let root = pool().take(true).expect("memory for a root");
        // SAFETY: a zeroed frame of the pool is an empty table that this value owns.
        let table = unsafe { &mut *pool().pointer(root).cast::<x86::PageTable>() };
        let offset = (pool().region.base() as u64).wrapping_sub(BASE * 4096);
        // SAFETY: the pool's frames are mapped at that offset.
        let mapper = unsafe { x86::OffsetPageTable::new(table, x86_64::VirtAddr::new(offset)) };
        Self { mapper, root }
    }
    fn map_each(&mut self, count: u64) {
        self.map_steps(count, 1);
    }
    fn protect_each(&mut self, count: u64, writable: bool) {
        for index in 0..count {
            let page = x86_page::<x86::Size4KiB>(index);
            // SAFETY: no processor uses these tables.
            let changed = unsafe { self.mapper.update_flags(page, x86_flags(writable)) };
            changed.expect("it is mapped").ignore();
        }
    }
    fn unmap_each(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, 1)
    }
    #[inline]
    fn translate(&self, index: u64) -> Option<u64> {
        let address = x86_64::VirtAddr::new((FIRST + index) * 4096);
        Some(self.mapper.translate_addr(address)?.as_u64() / 4096)
    }
    fn map_2m(&mut self, blocks: u64) {
        for index in (0..blocks).map(|block| block * SPARSE) {
            // SAFETY: no processor uses these tables.
            let mapped = unsafe {
                self.mapper.map_to(
                    x86_page::<x86::Size2MiB>(index),
                    x86_frame(index),
                    x86_flags(true),
                    &mut PoolFrames,
                )
            };
            mapped.expect("the place is free").ignore();
        }
    }
    fn map_sparse(&mut self, count: u64) {
        self.map_steps(count, SPARSE);
    }
    fn unmap_sparse(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, SPARSE)
    }
}

/// x86-64's four levels for page_table_multiarch, without an instruction that a program may not execute.
pub(super) struct Unflushed;

impl PagingMetaData for Unflushed {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = memory_addr::VirtAddr;
    #[inline]
    fn flush_tlb(address: Option<Self::VirtAddr>) {
        black_box(address);
    }
}

pub(super) struct PoolHandler;

impl PagingHandler for PoolHandler {
    fn alloc_frames(count: usize, _align: usize) -> Option<memory_addr::PhysAddr> {
        assert_eq!(count, 1, "tables are single frames");
        Some(memory_addr::PhysAddr::from_usize(
            pool().take(false)? as usize * 4096,
        ))
    }
    fn dealloc_frames(address: memory_addr::PhysAddr, _count: usize) {
        pool().give(address.as_usize() as u64 / 4096);
    }
    fn phys_to_virt(address: memory_addr::PhysAddr) -> memory_addr::VirtAddr {
        let pointer = pool().pointer(address.as_usize() as u64 / 4096);
        memory_addr::VirtAddr::from_usize(pointer as usize + address.align_offset_4k())
    }
}

/// page_table_multiarch; dropping it frees its tables.
pub(super) struct Multiarch(pub(super) PageTable64<Unflushed, X64PTE, PoolHandler>);

pub(super) fn arch_address(index: u64) -> memory_addr::VirtAddr {
    memory_addr::VirtAddr::from_usize((FIRST + index) as usize * 4096)
}

pub(super) fn arch_frame(index: u64) -> memory_addr::PhysAddr {
    memory_addr::PhysAddr::from_usize(target(index) as usize * 4096)
}

pub(super) fn arch_flags(writable: bool) -> MappingFlags {
    let mut flags = MappingFlags::READ | MappingFlags::USER;
    flags.set(MappingFlags::WRITE, writable);
    flags
}

impl Multiarch {
    fn map_steps(&mut self, count: u64, step: u64) {
        let mut cursor = self.0.cursor();
        for index in 0..count {
            cursor
                .map(
                    arch_address(index * step),
                    arch_frame(index),
                    PageSize::Size4K,
                    arch_flags(true),
                )
                .expect("the place is free");
        }
    }

    fn unmap_steps(&mut self, count: u64, step: u64) -> u64 {
        let mut cursor = self.0.cursor();
        let mut sum = 0;
        for index in 0..count {
            let unmapped = cursor.unmap(arch_address(index * step));
            sum += unmapped.expect("it is mapped").0.as_usize() as u64 / 4096;
        }
        sum
    }
}

impl Table for Multiarch {
    fn new() -> Self {
        Self(PageTable64::try_new().expect("memory for a root"))
    }
    fn map_each(&mut self, count: u64) {
        self.map_steps(count, 1);
    }
    fn protect_each(&mut self, count: u64, writable: bool) {
        let mut cursor = self.0.cursor();
        for index in 0..count {
            cursor
                .protect(arch_address(index), arch_flags(writable))
                .expect("it is mapped");
        }
    }
    fn unmap_each(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, 1)
    }
    #[inline]
    fn translate(&self, index: u64) -> Option<u64> {
        let (frame, ..) = self.0.query(arch_address(index)).ok()?;
        Some(frame.as_usize() as u64 / 4096)
    }
    fn map_2m(&mut self, blocks: u64) {
        self.map_range_2m(blocks);
    }
    fn map_sparse(&mut self, count: u64) {
        self.map_steps(count, SPARSE);
    }
    fn unmap_sparse(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, SPARSE)
    }
}

impl Ranged for Multiarch {
    fn map_range(&mut self, count: u64, _used: bool) {
        let frame_of =
            |address: memory_addr::VirtAddr| arch_frame(address.as_usize() as u64 / 4096 - FIRST);
        self.0
            .cursor()
            .map_region(
                arch_address(0),
                frame_of,
                count as usize * 4096,
                arch_flags(true),
                false,
            )
            .expect("the range is free");
    }
    fn map_range_2m(&mut self, blocks: u64) {
        let frame_of =
            |address: memory_addr::VirtAddr| arch_frame(address.as_usize() as u64 / 4096 - FIRST);
        // Less than 1 GiB at a time, or it would map larger leaves.
        for block in 0..blocks {
            let at = arch_address(block * SPARSE);
            let mapped = self.0.cursor().map_region(
                at,
                frame_of,
                SPARSE as usize * 4096,
                arch_flags(true),
                true,
            );
            mapped.expect("the range is free");
        }
    }
    fn protect_range(&mut self, count: u64, writable: bool) {
        self.0
            .cursor()
            .protect_region(arch_address(0), count as usize * 4096, arch_flags(writable))
            .expect("it is mapped");
    }
    fn unmap_range(&mut self, count: u64) {
        self.0
            .cursor()
            .unmap_region(arch_address(0), count as usize * 4096)
            .expect("it is mapped");
    }
}
