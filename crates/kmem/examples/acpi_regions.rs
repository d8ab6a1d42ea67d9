//! kmem under the `acpi` crate: its region mapper in terms of vmalloc.
//!
//! ACPI's tables lie in memory that firmware keeps, anywhere, at any alignment. Each is mapped for as long as the crate looks at
//! it: an ioremap with the memory type of memory, which ends at once where the frames have slots.

mod machine;

use std::ptr::NonNull;

use acpi::{AcpiHandler, PhysicalMapping};
use kmem::paging::MemoryType;
use kmem::{PhysAddr, VirtAddr};
use machine::Kernel;

#[derive(Clone)]
struct Regions(&'static Kernel);

impl AcpiHandler for Regions {
    unsafe fn map_physical_region<T>(
        &self,
        physical_address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        let address = PhysAddr::new(physical_address as u64);
        let mapped = self
            .0
            .ioremap(address, size as u64, MemoryType::WriteBack)
            .expect("addresses for an ACPI table");
        let pointer = std::ptr::with_exposed_provenance_mut(mapped.as_u64() as usize);
        let pages = (address.page_offset() as usize + size).div_ceil(4096);
        let mapped = pages * 4096 - address.page_offset() as usize;
        // SAFETY: the region is mapped from that address to the end of its last page.
        unsafe {
            PhysicalMapping::new(
                physical_address,
                NonNull::new(pointer).expect("no area begins at 0"),
                size,
                mapped,
                self.clone(),
            )
        }
    }

    fn unmap_physical_region<T>(region: &PhysicalMapping<Self, T>) {
        let address = VirtAddr::from_ptr(region.virtual_start().as_ptr());
        // Any address in the area's first page names it.
        region.handler().0.free(address).expect("it was mapped");
    }
}

fn main() {
    let kernel = machine::start(32);
    let regions = Regions(kernel);
    // A table of 120 bytes that begins 16 bytes before the end of a page.
    // SAFETY: nothing reads it: this machine has no processor that would walk the tables.
    let table = unsafe { regions.map_physical_region::<[u8; 120]>(0xbff0_aff0, 120) };
    assert_eq!(table.physical_start() & 0xfff, 0xff0);
    assert_eq!(table.mapped_length(), 0x1010);
    print!("{}", kernel.info());
    drop(table);
    kernel.purge();
    assert_eq!(kernel.used(), (0, 0));
}
