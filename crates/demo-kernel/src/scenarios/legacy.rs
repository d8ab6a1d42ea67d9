//! Tables of 32-bit paging, with 4 MiB pages and as PAE, made by kmem and walked by this machine's MMU in that mode.

use kmem::hal::{
    Asid, DeviceFrame, Frame, FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame, Page,
    PageRange, Root, VirtAddr,
};
use kmem::paging::format::{Format, X86Pae, X86TwoLevel};
use kmem::paging::{PageTable, Rights};
use kmem::vmalloc::KernelPage;
use kmem::{Order, PhysAddr};

use crate::layout::{self, direct};
use crate::memory::{MACHINE, frames, load_kernel_table};
use crate::platform::Machine;
use crate::{cpu, println};

/// CR4 bits of the two modes.
const PSE: u32 = 1 << 4;
const PAE: u32 = 1 << 5;

/// One line of `legacy_list`: address, what, value.
type Line = [u32; 4];
const READ: u32 = 0;
const WRITE: u32 = 1;
const END: u32 = 2;

/// Walks tables of both modes.
pub fn run() -> bool {
    // Leaves of 4 MiB are of order 10, those of 2 MiB of order 9.
    check::<X86TwoLevel>("32-bit with PSE", PSE, 10) & check::<X86Pae>("PAE", PAE, 9)
}

fn device(frame: Frame, order: Order) -> KernelPage {
    KernelPage::borrowed(DeviceFrame::new(frame, order).expect("aligned"))
}

fn word(frame: Frame, offset: u64) -> *mut u32 {
    direct(frame.start().as_u64() + offset).cast()
}

fn check<F: Format>(name: &str, mode: u32, large: u8) -> bool {
    let large = Order::new(large).expect("an order");
    let take = |order: Order| -> OwnedFrame {
        let request = FrameRequest::new(order).below(PhysAddr::new(u64::from(u32::MAX)));
        frames().alloc(&request.zeroed()).expect("memory")
    };
    let (block, pages) = (take(large), [take(Order::ZERO), take(Order::ZERO)]);
    let table = PageTable::<F, _, KernelPage>::new(&MACHINE).expect("a root");
    let map = |address: u64, frame: Frame, order: Order, rights: Rights| {
        let first = Page::containing(VirtAddr::new(address));
        let range = PageRange::with_count(first, order.frames()).expect("pages");
        let mut cursor = table.cursor(range).expect("a range of the table");
        let mapped = cursor.map(first, device(frame, order), rights);
        mapped.map_err(|(error, _)| error).expect("room for tables");
    };
    // Where the stub runs: the low 4 MiB, as they are.
    for start in (0..4 << 20).step_by((order_bytes(large)) as usize) {
        let frame = Frame::containing(PhysAddr::new(start));
        map(start, frame, large, Rights::KERNEL_DATA | Rights::EXECUTE);
    }
    map(
        0x4000_0000,
        pages[0].first(),
        Order::ZERO,
        Rights::KERNEL_DATA,
    );
    map(
        0x403f_f000,
        pages[1].first(),
        Order::ZERO,
        Rights::KERNEL_DATA,
    );
    map(0xbff0_0000, pages[1].first(), Order::ZERO, Rights::READ);
    map(0xc000_0000, block.first(), large, Rights::KERNEL_DATA);
    let last = order_bytes(large) - 4;
    // SAFETY: the frames are ours.
    unsafe {
        word(pages[0].first(), 0).write_volatile(0x1111);
        word(pages[1].first(), 0xffc).write_volatile(0x2222);
        word(block.first(), 0).write_volatile(0x3333);
        word(block.first(), last).write_volatile(0x4444);
    }
    let lines: [Line; 8] = [
        [0x4000_0000, READ, 0, 0],
        [0x403f_fffc, READ, 0, 0],
        [0xbff0_0ffc, READ, 0, 0],
        [0xc000_0000, READ, 0, 0],
        [0xc000_0000 + last as u32, READ, 0, 0],
        [0x4000_0008, WRITE, 0x5555, 0],
        [0xc000_0010, WRITE, 0x6666, 0],
        [0, END, 0, 0],
    ];
    let seen = walk(table.root(), mode, &lines);
    let values = [seen[0], seen[1], seen[2], seen[3], seen[4]].map(|line| line[2]);
    // SAFETY: the frames are ours.
    let written = unsafe {
        [
            word(pages[0].first(), 8).read_volatile(),
            word(block.first(), 0x10).read_volatile(),
        ]
    };
    let bits = [0x4000_0000, 0x403f_f000, 0xbff0_0000, 0xc000_0000u64].map(|address| {
        let leaf = table.query(Page::containing(VirtAddr::new(address))).leaf();
        let attributes = leaf.expect("mapped").attributes;
        (attributes.accessed, attributes.dirty)
    });
    println!("{name}: read {values:x?}, written {written:x?}, accessed and dirty {bits:?}");
    table.destroy(|_, _| {}, |_, _| {});
    for frame in pages.into_iter().chain([block]) {
        frames().free(frame);
    }
    values == [0x1111, 0x2222, 0x2222, 0x3333, 0x4444]
        && written == [0x5555, 0x6666]
        && bits == [(true, true), (true, false), (true, false), (true, true)]
}

fn order_bytes(order: Order) -> u64 {
    order.frames() << 12
}

/// Runs the list in another mode, with interrupts off and the identity map on.
fn walk(root: Root, mode: u32, lines: &[Line]) -> [Line; 8] {
    unsafe extern "C" {
        fn legacy_walk(root: u32, mode: u32);
        static legacy_list: u8;
    }
    let list = direct(&raw const legacy_list as u64).cast::<Line>();
    let boot = Root {
        frame: Frame::containing(PhysAddr::new(layout::boot_root())),
        asid: Asid::ZERO,
    };
    cpu::without_interrupts(|| {
        // SAFETY: boot.s's tables map the image, the stack in it, and the stub where it is; the list has room for 32.
        unsafe {
            list.copy_from_nonoverlapping(lines.as_ptr(), lines.len());
            layout::identity_map(true);
            Machine.load_root(boot, false);
            legacy_walk(root.frame.start().as_u64() as u32, mode);
            load_kernel_table();
            layout::identity_map(false);
            list.cast::<[Line; 8]>().read_volatile()
        }
    })
}
