//! Page tables and faults on the real walker, printed so that a host can hold them against mock-x86 (`oracle/`).

mod probe;
mod steps;

pub use probe::intercept;

use alloc::boxed::Box;

use kmem::Order;
use kmem::hal::{
    DeviceFrame, FrameHandle, FrameRequest, FrameSink, FrameSource, Mmu, OwnedFrame, Page,
    PageRange, VirtAddr,
};
use kmem::paging::{PageTable, Rights};

use self::probe::Here;
use self::steps::{Bench, Digest, FLUSHED, LAZY, Outcome, STUB, Seen, Window};
use crate::layout::{DIRECT, direct};
use crate::memory::{self, MACHINE, frames, load_kernel_table};
use crate::platform::Machine;
use crate::{print, println, traps};

/// The stack that the CPU changes to when it leaves user mode.
static mut STACK: Stack = Stack([0; 2048]);
#[repr(align(16))]
#[allow(dead_code)]
struct Stack([u64; 2048]);

fn block(order: u8) -> OwnedFrame {
    let order = Order::new(order).expect("an order");
    frames()
        .alloc(&FrameRequest::new(order).zeroed())
        .expect("memory for the bench")
}

/// Runs all programs, or the one of a number in full, and prints what they saw.
pub fn run(only: Option<u64>) -> bool {
    let half = Page::starting_at(VirtAddr::new(DIRECT)).expect("aligned");
    let tables = PageTable::sharing(&MACHINE, memory::table(), half).expect("a root");
    let owned: [OwnedFrame; steps::FRAMES] = core::array::from_fn(|_| block(0));
    let blocks: [OwnedFrame; steps::BLOCKS] = core::array::from_fn(|_| block(9));
    let stub = block(0);
    let code = probe::user_code();
    // SAFETY: the frame is ours.
    unsafe {
        direct(stub.first().start().as_u64()).copy_from_nonoverlapping(code.as_ptr(), code.len());
        traps::set_kernel_stack((&raw mut STACK).add(1) as u64);
        Machine.load_root(tables.root(), false);
    }
    let page = PageRange::single(Page::containing(VirtAddr::new(STUB)));
    let window = DeviceFrame::new(stub.first(), Order::ZERO).expect("a frame");
    // SAFETY: a device frame owns nothing.
    let window = unsafe { Window::from_entry(window.first(), Order::ZERO) };
    tables
        .cursor(page)
        .expect("a user page")
        .map(page.first(), window, Rights::USER_CODE)
        .expect("room for tables");

    let mut bench = Box::new(Bench {
        tables: &tables,
        frames: owned.each_ref().map(|frame| frame.first()),
        blocks: blocks.each_ref().map(|frame| frame.first()),
        processor: Here {
            root: tables.root(),
        },
    });
    println!("differential levels={}", tables.levels());
    match only {
        Some(number) => bench.run(number, false, &mut |seen| println!("{seen:x?}")),
        None => {
            for number in 0..FLUSHED {
                let mut digest = Digest::EMPTY;
                bench.run(number, false, &mut |seen| digest.add(seen));
                print!(
                    "{:016x}{}",
                    digest.0,
                    if number % 8 == 7 { '\n' } else { ' ' }
                );
            }
            for number in 0..LAZY {
                print!("lazy {number}");
                bench.run(number, true, &mut |seen| match seen {
                    Seen::Access(_, _, Outcome::Value(value)) => print!(" v{value:x}"),
                    Seen::Access(_, _, Outcome::Fault(code, at)) => print!(" f{code:x}@{at:x}"),
                    Seen::Entry(..) => {}
                });
                print!("\n");
            }
        }
    }
    // SAFETY: nothing uses the tables any more.
    unsafe { load_kernel_table() };
    drop(bench);
    tables.destroy(|_, _| {}, |_, _| {});
    for frame in owned.into_iter().chain(blocks).chain([stub]) {
        frames().free(frame);
    }
    true
}
