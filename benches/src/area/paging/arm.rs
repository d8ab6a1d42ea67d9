//! aarch64-paging over the four levels of stage 1, on the pool. Its instructions for TLBs are compiled for Arm alone.

use std::cell::Cell;
use std::ptr::NonNull;

use aarch64_paging::Mapping;
use aarch64_paging::descriptor::{El1Attributes, PhysicalAddress};
use aarch64_paging::paging::{Constraints, El1And0, MemoryRegion, PageTable, Translation, VaRange};
use kmem_hal::PhysMap as _;

use super::tables::{FIRST, Ranged, SPARSE, Table, pool, target};

/// Tables of the pool.
pub(super) struct PoolTables;

fn table(frame: u64) -> NonNull<PageTable<El1Attributes>> {
    NonNull::new(pool().pointer(frame).cast()).expect("the pool is not at address 0")
}

impl Translation<El1Attributes> for PoolTables {
    fn allocate_table(&mut self) -> (NonNull<PageTable<El1Attributes>>, PhysicalAddress) {
        let frame = pool().take(true).expect("memory for a table");
        (table(frame), PhysicalAddress(frame as usize * 4096))
    }
    unsafe fn deallocate_table(&mut self, table: NonNull<PageTable<El1Attributes>>) {
        let address = pool().region().to_phys(table.as_ptr().cast());
        pool().give(address.as_u64() / 4096);
    }
    #[inline]
    fn physical_to_virtual(&self, address: PhysicalAddress) -> NonNull<PageTable<El1Attributes>> {
        table(address.0 as u64 / 4096)
    }
}

/// aarch64-paging, on a table that no processor uses; dropping it frees its tables.
pub(super) struct Arm(Mapping<PoolTables, El1And0>);

fn region(index: u64, pages: u64) -> MemoryRegion {
    let start = (FIRST + index) as usize * 4096;
    MemoryRegion::new(start, start + pages as usize * 4096)
}

fn frame(index: u64) -> PhysicalAddress {
    PhysicalAddress(target(index) as usize * 4096)
}

fn flags(writable: bool) -> El1Attributes {
    let mut flags = El1Attributes::ATTRIBUTE_INDEX_1
        | El1Attributes::INNER_SHAREABLE
        | El1Attributes::USER
        | El1Attributes::UXN
        | El1Attributes::PXN
        | El1Attributes::NON_GLOBAL
        | El1Attributes::ACCESSED
        | El1Attributes::VALID;
    flags.set(El1Attributes::READ_ONLY, !writable);
    flags
}

const SMALL: Constraints = Constraints::NO_BLOCK_MAPPINGS.union(Constraints::NO_CONTIGUOUS_HINT);

impl Arm {
    fn map(&mut self, first: u64, index: u64, pages: u64, constraints: Constraints) {
        self.0
            .map_range(
                &region(first, pages),
                frame(index),
                flags(true),
                constraints,
            )
            .expect("the range is free");
    }

    fn protect(&mut self, first: u64, pages: u64, writable: bool) {
        let (set, clear) = if writable {
            (El1Attributes::empty(), El1Attributes::READ_ONLY)
        } else {
            (El1Attributes::READ_ONLY, El1Attributes::empty())
        };
        self.0
            .modify_range(&region(first, pages), &|_, entry| {
                if entry.is_table() || !entry.flags().contains(El1Attributes::VALID) {
                    return Ok(());
                }
                entry.modify_flags(set, clear)
            })
            .expect("it is mapped");
    }

    /// The sum of the frames.
    fn unmap(&mut self, first: u64, pages: u64) -> u64 {
        let sum = Cell::new(0);
        self.0
            .modify_range(&region(first, pages), &|_, entry| {
                if entry.is_table() || !entry.flags().contains(El1Attributes::VALID) {
                    return Ok(());
                }
                sum.set(sum.get() + entry.output_address().0 as u64 / 4096);
                entry.set(PhysicalAddress(0), El1Attributes::empty())
            })
            .expect("it is mapped");
        sum.get()
    }
}

impl Table for Arm {
    fn new() -> Self {
        Self(Mapping::with_asid_and_va_range(
            PoolTables,
            1,
            0,
            El1And0,
            VaRange::Lower,
        ))
    }
    fn map_each(&mut self, count: u64) {
        (0..count).for_each(|index| self.map(index, index, 1, SMALL));
    }
    fn protect_each(&mut self, count: u64, writable: bool) {
        (0..count).for_each(|index| self.protect(index, 1, writable));
    }
    fn unmap_each(&mut self, count: u64) -> u64 {
        (0..count).map(|index| self.unmap(index, 1)).sum()
    }
    #[inline]
    fn translate(&self, index: u64) -> Option<u64> {
        let page = FIRST + index;
        let mut found = None;
        self.0
            .walk_range(&region(index, 1), &mut |_, entry, level| {
                let leaf = level == 3 || !entry.is_table_or_page();
                if leaf && entry.is_valid() {
                    let inside = page & ((1 << (9 * (3 - level))) - 1);
                    found = Some(entry.output_address().0 as u64 / 4096 + inside);
                }
                Ok(())
            })
            .ok()?;
        found
    }
    fn map_2m(&mut self, blocks: u64) {
        self.map_range_2m(blocks);
    }
    fn map_sparse(&mut self, count: u64) {
        (0..count).for_each(|index| self.map(index * SPARSE, index, 1, SMALL));
    }
    fn unmap_sparse(&mut self, count: u64) -> u64 {
        (0..count).map(|index| self.unmap(index * SPARSE, 1)).sum()
    }
}

impl Ranged for Arm {
    fn map_range(&mut self, count: u64, _used: bool) {
        self.map(0, 0, count, SMALL);
    }
    fn map_range_2m(&mut self, blocks: u64) {
        // Less than 1 GiB at a time, or it would map larger leaves.
        for block in (0..blocks).map(|block| block * SPARSE) {
            self.map(block, block, SPARSE, Constraints::NO_CONTIGUOUS_HINT);
        }
    }
    fn protect_range(&mut self, count: u64, writable: bool) {
        self.protect(0, count, writable);
    }
    fn unmap_range(&mut self, count: u64) {
        self.unmap(0, count);
    }
}
