//! The calls of `kmem-paging`, on a four-level table with owned frames.

use core::hint::black_box;

use kmem::Buddy;
use kmem_hal::{
    FlushRequest, FrameSink, Mmu, OffsetMap, Order, OwnedFrame, Page, PageRange, Root, SingleCpu,
    SingleGrace,
};
use kmem_paging::format::X86_64;
use kmem_paging::{
    ChangeError, Cursor, Entry, Gather, Leaf, MapError, PageTable, Parts, Rights, Run, TableCache,
    TableError,
};

use crate::calls;

/// The real allocator, whose need counts with that of its callers.
pub type Frames = Buddy<OffsetMap, SingleCpu>;

/// Stands for the machine.
pub struct NoMmu;

// SAFETY: never loads a root, so that nothing is ever cached.
unsafe impl Mmu for NoMmu {
    unsafe fn load_root(&self, root: Root, _keep: bool) {
        black_box(root);
    }
    #[inline(never)]
    fn flush_local(&self, request: &FlushRequest) {
        black_box(request);
    }
}

pub type Machine =
    Parts<'static, &'static OffsetMap, &'static Frames, NoMmu, SingleGrace, SingleCpu>;
type Table = PageTable<X86_64, &'static Machine, OwnedFrame>;
type At<'t> = Cursor<'t, X86_64, &'static Machine, OwnedFrame>;
type Pending<'t> = Gather<'t, X86_64, &'static Machine, OwnedFrame, 32>;

calls! {
    call_paging_new(machine: &'static Machine) -> Result<Table, TableError> { Table::new(machine) }
    call_paging_lend_from(table: &Table, page: Page) -> Result<(), TableError> { table.lend_from(page) }
    call_paging_sharing(machine: &'static Machine, kernel: &Table, page: Page) -> Result<Table, TableError> {
        Table::sharing(machine, kernel, page)
    }
    call_paging_query(table: &Table, page: Page) -> Entry { table.query(page) }
    call_paging_map(cursor: &mut At<'_>, page: Page, frame: OwnedFrame) -> Result<(), (MapError, OwnedFrame)> {
        cursor.map(page, frame, Rights::USER_DATA)
    }
    call_paging_map_range(cursor: &mut At<'_>, range: PageRange, frames: &mut Option<OwnedFrame>) -> bool {
        cursor.map_range(range, Order::ZERO, Rights::USER_DATA, |_, _| frames.take()).is_ok()
    }
    call_paging_unmap(cursor: &mut At<'_>, range: PageRange, gather: &mut Pending<'_>) -> Result<u64, ChangeError> {
        cursor.unmap(range, gather)
    }
    call_paging_protect(cursor: &mut At<'_>, range: PageRange, gather: &mut Pending<'_>) -> Result<u64, ChangeError> {
        cursor.protect(range, Rights::READ, gather)
    }
    call_paging_next_run(cursor: &mut At<'_>) -> Option<Run> { cursor.next_run() }
    call_paging_commit(gather: &mut Pending<'_>, frames: &Frames) -> usize { gather.commit_to(frames) }
    call_paging_destroy(table: Table, frames: &Frames) {
        table.destroy(|_: Leaf, frame| frames.free(frame), |_, _| {});
    }
    call_paging_shrink(machine: &'static Machine, count: usize) -> usize { TableCache::shrink(&machine, count) }
}
