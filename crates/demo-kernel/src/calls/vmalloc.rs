//! The calls of `kmem-vmalloc`.

use kmem::IrqSafe;
use kmem::vmalloc::{KernelPage, NotAnArea, Vmalloc, VmallocError};
use kmem_hal::{FixedPool, VirtAddr};
use kmem_paging::format::X86_64;
use kmem_vma_tree::Node;

use crate::calls;
use crate::paging::Machine;

type Window = Vmalloc<'static, X86_64, &'static Machine, &'static FixedPool<Node, 64>, IrqSafe>;

calls! {
    call_vmalloc_alloc(window: &Window, bytes: u64) -> Result<VirtAddr, VmallocError> { window.alloc(bytes) }
    call_vmalloc_alloc_stack(window: &Window, pages: u64) -> Result<VirtAddr, VmallocError> { window.alloc_stack(pages) }
    call_vmalloc_free(window: &Window, address: VirtAddr) -> Result<(), NotAnArea> { window.free(address) }
    call_vmalloc_purge(window: &Window) { window.purge() }
    call_vmalloc_page(page: KernelPage, slots: &kmem_hal::FrameTable, frames: &crate::paging::Frames) {
        page.release(slots, &frames)
    }
}
