//! kmem under the `virtio-drivers` crate: its `Hal` trait in terms of vmalloc.
//!
//! The trait has no `self`, so the kernel's vmalloc stands in a static. DMA memory is an area whose frames follow each other;
//! device registers are an ioremap; buffers of the kernel's are shared by copying, which works wherever they lie, on a machine
//! with less address lines on the device as well.

mod machine;

use std::ptr::NonNull;
use std::sync::OnceLock;

use kmem::paging::MemoryType;
use kmem::vmalloc::DmaMask;
use kmem::{PhysAddr, VirtAddr};
use machine::Kernel;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr as DevicePhysAddr};

static KERNEL: OnceLock<&'static Kernel> = OnceLock::new();

fn kernel() -> &'static Kernel {
    KERNEL.get().expect("set before the first driver")
}

fn pointer(address: VirtAddr) -> NonNull<u8> {
    let address = std::ptr::with_exposed_provenance_mut(address.as_u64() as usize);
    NonNull::new(address).expect("no area begins at 0")
}

struct KernelHal;

// SAFETY: an area is zeroed, aligned to pages, its own until it is freed, and physically contiguous; registers are mapped for
// the device; a shared buffer is copied in both directions that it is asked for.
unsafe impl Hal for KernelHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (DevicePhysAddr, NonNull<u8>) {
        let bytes = (pages * PAGE_SIZE) as u64;
        match kernel().alloc_dma(bytes, DmaMask::ALL, MemoryType::WriteBack) {
            Ok(buffer) => (buffer.device.as_u64(), pointer(buffer.address)),
            // The trait's word for «no memory» is a physical address of 0.
            Err(_) => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_paddr: DevicePhysAddr, vaddr: NonNull<u8>, _pages: usize) -> i32 {
        match kernel().free(VirtAddr::from_ptr(vaddr.as_ptr())) {
            Ok(()) => 0,
            Err(_) => -1,
        }
    }

    unsafe fn mmio_phys_to_virt(paddr: DevicePhysAddr, size: usize) -> NonNull<u8> {
        let address = PhysAddr::new(paddr);
        let mapped = kernel().ioremap(address, size as u64, MemoryType::Uncached);
        pointer(mapped.expect("addresses for the registers"))
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> DevicePhysAddr {
        let bytes = buffer.len() as u64;
        let shared = kernel()
            .alloc_dma(bytes, DmaMask::ALL, MemoryType::WriteBack)
            .expect("memory to share");
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: both are valid for that many bytes, and the copy is fresh.
            unsafe { copy(buffer.cast(), pointer(shared.address), buffer.len()) };
        }
        SHARED.lock().expect("no panic in it").push(shared);
        shared.device.as_u64()
    }

    unsafe fn unshare(paddr: DevicePhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let mut all = SHARED.lock().expect("no panic in it");
        let at = all
            .iter()
            .position(|shared| shared.device.as_u64() == paddr)
            .expect("it was shared");
        let shared = all.swap_remove(at);
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: as in `share`; the device is done.
            unsafe { copy(pointer(shared.address), buffer.cast(), buffer.len()) };
        }
        kernel().free(shared.address).expect("it was given");
    }
}

static SHARED: std::sync::Mutex<Vec<kmem::vmalloc::DmaBuffer>> = std::sync::Mutex::new(Vec::new());

/// A kernel copies `bytes` bytes here. This example's processor walks no tables, so there is nothing behind the addresses.
///
/// # Safety
///
/// Both are valid for that many bytes and do not overlap.
unsafe fn copy(_from: NonNull<u8>, _to: NonNull<u8>, _bytes: usize) {}

fn main() {
    assert!(KERNEL.set(machine::start(32)).is_ok());
    let (device, driver) = KernelHal::dma_alloc(3, BufferDirection::Both);
    assert!(device != 0 && device.is_multiple_of(4096));
    println!("a ring of 3 pages: {driver:p}, for the device {device:#x}");
    // SAFETY: the registers of a device that this machine does not have; nothing touches them.
    let registers = unsafe { KernelHal::mmio_phys_to_virt(0xfebf_0000, 0x1000) };
    println!("registers at {registers:p}");
    let mut text = *b"sent";
    let buffer = NonNull::from(&mut text[..]);
    // SAFETY: the buffer lives, and the device that is not there never touches it.
    unsafe {
        let shared = KernelHal::share(buffer, BufferDirection::DriverToDevice);
        KernelHal::unshare(shared, buffer, BufferDirection::DriverToDevice);
        assert_eq!(KernelHal::dma_dealloc(device, driver, 3), 0);
        assert_eq!(KernelHal::dma_dealloc(device, driver, 3), -1);
    }
    print!("{}", kernel().info());
    kernel()
        .free(VirtAddr::from_ptr(registers.as_ptr()))
        .expect("it was mapped");
    kernel().purge();
    assert_eq!(kernel().used(), (0, 0));
}
