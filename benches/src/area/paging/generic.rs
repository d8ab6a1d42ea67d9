//! page-table-generic over x86-64's four levels, on the pool.

use page_table_generic::{
    FrameAllocator, MapConfig, PageTable, PageTableEntry, PhysAddr, TableMeta, VirtAddr,
};

use super::tables::{FIRST, Ranged, SPARSE, Table, pool, target};

/// Frames of the pool.
#[derive(Clone, Copy)]
pub(super) struct PoolAllocator;

impl FrameAllocator for PoolAllocator {
    fn alloc_frame(&self) -> Option<PhysAddr> {
        Some(PhysAddr::from_usize(pool().take(false)? as usize * 4096))
    }
    fn dealloc_frame(&self, frame: PhysAddr) {
        pool().give(frame.as_usize() as u64 / 4096);
    }
    #[inline]
    fn phys_to_virt(&self, address: PhysAddr) -> *mut u8 {
        let address = address.as_usize() as u64;
        pool()
            .pointer(address / 4096)
            .wrapping_add(address as usize % 4096)
    }
}

const PRESENT: u64 = 1;
const HUGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// An entry of x86-64; its configuration is its bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct X64Entry(u64);

impl PageTableEntry for X64Entry {
    type PteConfig = u64;

    #[inline]
    fn new_page(address: PhysAddr, config: u64, is_huge: bool) -> Self {
        let huge = if is_huge { HUGE } else { 0 };
        Self(address.as_usize() as u64 & ADDRESS | config | huge)
    }
    #[inline]
    fn new_table(address: PhysAddr) -> Self {
        Self(address.as_usize() as u64 & ADDRESS | 7)
    }
    #[inline]
    fn paddr(&self, _is_dir: bool) -> PhysAddr {
        PhysAddr::from_usize((self.0 & ADDRESS) as usize)
    }
    #[inline]
    fn config(&self, _is_dir: bool) -> u64 {
        self.0 & !(ADDRESS | HUGE)
    }
    #[inline]
    fn present(&self) -> bool {
        self.0 & PRESENT != 0
    }
    #[inline]
    fn huge(&self, is_dir: bool) -> bool {
        is_dir && self.0 & HUGE != 0
    }
    #[inline]
    fn unused(&self) -> bool {
        self.0 == 0
    }
    #[inline]
    fn clear(&mut self) {
        self.0 = 0;
    }
}

/// Four levels; flushing costs nothing.
#[derive(Clone, Copy)]
pub(super) struct FourLevels;

impl TableMeta for FourLevels {
    type P = X64Entry;
    const PAGE_SIZE: usize = 4096;
    const LEVEL_BITS: &[usize] = &[9, 9, 9, 9];
    const MAX_BLOCK_LEVEL: usize = 3;
    #[inline]
    fn flush(address: Option<VirtAddr>) {
        std::hint::black_box(address);
    }
}

/// page-table-generic; dropping it frees its tables.
pub(super) struct Generic(PageTable<FourLevels, PoolAllocator>);

fn address(index: u64) -> VirtAddr {
    VirtAddr::from_usize((FIRST + index) as usize * 4096)
}

fn frame(index: u64) -> PhysAddr {
    PhysAddr::from_usize(target(index) as usize * 4096)
}

fn bits(writable: bool) -> u64 {
    PRESENT | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 63 | u64::from(writable) << 1
}

impl Generic {
    fn map_steps(&mut self, count: u64, step: u64) {
        for index in 0..count {
            self.0
                .map_page(address(index * step), frame(index), 4096, bits(true))
                .expect("the place is free");
        }
    }

    fn unmap_steps(&mut self, count: u64, step: u64) -> u64 {
        let mut sum = 0;
        for index in 0..count {
            let unmapped = self.0.unmap_page(address(index * step));
            sum += unmapped.expect("it is mapped").0.as_usize() as u64 / 4096;
        }
        sum
    }

    fn map_linear(&mut self, count: u64, allow_huge: bool) {
        self.0
            .map(&MapConfig {
                vaddr: address(0),
                paddr: frame(0),
                size: count as usize * 4096,
                pte: bits(true),
                allow_huge,
                flush: false,
            })
            .expect("the range is free");
    }
}

impl Table for Generic {
    fn new() -> Self {
        Self(PageTable::new(PoolAllocator).expect("memory for a root"))
    }
    fn map_each(&mut self, count: u64) {
        self.map_steps(count, 1);
    }
    fn protect_each(&mut self, count: u64, writable: bool) {
        for index in 0..count {
            self.0
                .protect_page(address(index), bits(writable))
                .expect("it is mapped");
        }
    }
    fn unmap_each(&mut self, count: u64) -> u64 {
        self.unmap_steps(count, 1)
    }
    #[inline]
    fn translate(&self, index: u64) -> Option<u64> {
        let (found, ..) = self.0.query(address(index)).ok()?;
        Some(found.as_usize() as u64 / 4096)
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

impl Ranged for Generic {
    fn map_range(&mut self, count: u64, _used: bool) {
        self.map_linear(count, false);
    }
    fn map_range_2m(&mut self, blocks: u64) {
        // Less than 1 GiB at a time, or it would map larger leaves.
        for block in 0..blocks {
            self.0
                .map(&MapConfig {
                    vaddr: address(block * SPARSE),
                    paddr: frame(block * SPARSE),
                    size: SPARSE as usize * 4096,
                    pte: bits(true),
                    allow_huge: true,
                    flush: false,
                })
                .expect("the range is free");
        }
    }
    fn protect_range(&mut self, count: u64, writable: bool) {
        self.0
            .protect_region(address(0), count as usize * 4096, bits(writable))
            .expect("it is mapped");
    }
    fn unmap_range(&mut self, count: u64) {
        self.0
            .unmap(address(0), count as usize * 4096)
            .expect("it is mapped");
    }
}
