//! The TLB's instructions by what this machine's processors have: PCID and INVPCID, or not.
//!
//! [`SPACES`](crate::platform::SPACES) is made before a processor can be asked, so it stands on [`BootTlb`], which passes every call on to the
//! [`X86Tlb`] that the first CPU found. A kernel that is built for processors it knows writes `X86Tlb::new(true, true)` there and needs
//! none of this but the call of `enable`.

use core::cell::UnsafeCell;

use kmem::hal::{Asid, Page, Root, Tlb};
use kmem::paging::X86Tlb;

use crate::plant::{self, Plant};

struct Found(UnsafeCell<X86Tlb>);
// SAFETY: written by the first CPU before another one runs, only read afterwards.
unsafe impl Sync for Found {}
// SAFETY: MOV CR3, INVLPG and CR4 are there in ring 0, where this kernel runs.
static FOUND: Found = Found(UnsafeCell::new(unsafe { X86Tlb::new(false, false) }));

fn found() -> &'static X86Tlb {
    // SAFETY: `start` on the first CPU, which alone writes, has returned.
    unsafe { &*FOUND.0.get() }
}

/// Switches tags on where this CPU has them.
///
/// # Safety
/// Once on each CPU, the first one first, on the tables of `boot.s` with interrupts off.
pub unsafe fn start(cpu: usize) {
    // SAFETY: ring 0 and long mode; boot.s loads roots without flags.
    let tlb = unsafe { X86Tlb::enable() };
    if cpu == 0 {
        // SAFETY: no other CPU runs yet, and this one has loaded no root.
        unsafe { *FOUND.0.get() = tlb };
    } else {
        assert_eq!(tlb, *found(), "CPU {cpu} is not like the first");
    }
}

/// What was found, for people.
pub fn describe() -> impl core::fmt::Debug {
    found()
}

/// The caches of the CPU that runs the code.
#[derive(Clone, Copy, Debug)]
pub struct BootTlb;

// SAFETY: `X86Tlb` keeps the contract; the fault of `plant.rs` is there to break it.
unsafe impl Tlb for BootTlb {
    fn tags(&self) -> u16 {
        found().tags()
    }

    unsafe fn load(&self, root: Root, keep: bool) {
        // SAFETY: the caller's promise is passed on.
        unsafe { found().load(root, keep) };
    }

    fn drop_page(&self, page: Page) {
        if !plant::is(Plant::LostDrop) {
            found().drop_page(page);
        }
    }

    fn drop_page_of(&self, tag: Asid, page: Page) -> bool {
        found().drop_page_of(tag, page)
    }

    fn drop_current(&self) {
        found().drop_current();
    }

    fn drop_tag(&self, tag: Asid) -> bool {
        found().drop_tag(tag)
    }

    fn drop_all(&self) {
        found().drop_all();
    }
}
