//! What cursors cost in locked instructions and stores, and what an interrupt between any two steps of a flush does to it.
//!
//! Run with `RUSTFLAGS="--cfg kmem_counting" cargo test -p kmem-paging --test counting`.
#![cfg(kmem_counting)]

#[path = "common/machine.rs"]
mod machine;

use std::cell::Cell;

use kmem_hal::sync::{AtomicU64, Counts, counts, reset_counts, with_interrupt};
use kmem_hal::{
    Asid, CachePadded, Cpu, CpuCall, CpuCallError, CpuId, CpuSet, DeviceFrame, FlushRequest,
    FlushScope, Frame, Mmu, Order, Page, PageRange, Root, Tlb,
};
use kmem_paging::format::X86_64;
use kmem_paging::{AsidArea, AsidMmu, Attributes, Cursor, PageTable, Rights};
use machine::{Machine, TestEnv};

type Table = PageTable<X86_64, &'static TestEnv, DeviceFrame>;
type Held<'t> = Cursor<'t, X86_64, &'static TestEnv, DeviceFrame>;

/// Pages of 1 GiB, of which each CPU of a test has one.
const GIB: u64 = 1 << 18;

fn page(number: u64) -> Page {
    Page::new(number).unwrap()
}

fn pages(first: u64, count: u64) -> PageRange {
    PageRange::with_count(page(first), count).unwrap()
}

fn frame(number: u64) -> DeviceFrame {
    DeviceFrame::new(Frame::from_number(0x10_0000 + number), Order::ZERO).unwrap()
}

/// Maps a page as a fault leaves it, used and written: the hardware has nothing to write into its entry.
fn map(cursor: &mut Held<'_>, number: u64) {
    let attributes = Attributes::new(Rights::USER_DATA).accessed().dirty();
    cursor.map(page(number), frame(number), attributes).unwrap();
}

/// Locked instructions and stores of a closure.
fn cost(f: impl FnOnce()) -> (u64, u64) {
    reset_counts();
    f();
    let Counts { locked, stores } = counts();
    (locked, stores)
}

/// Two cursors in different GiB, each a page in turn: whatever a page costs goes to the cursor's own table. A word that both
/// CPUs write to would be one more store, or a locked instruction.
#[test]
fn disjoint_cursors_write_to_no_shared_line() {
    let machine = Machine::new(64);
    let table = Table::new(machine.env()).unwrap();
    let _ = table.root();
    let mut cursors = [0, 1].map(|cpu| table.cursor(pages(cpu * GIB, GIB)).unwrap());
    let mut gathers = [(); 2].map(|()| table.gather::<512>());
    for (cursor, cpu) in cursors.iter_mut().zip(0..) {
        map(cursor, cpu * GIB);
    }
    for index in 1..512 {
        for (cursor, cpu) in cursors.iter_mut().zip(0..) {
            // The entry, and the live count of its table.
            assert_eq!(cost(|| map(cursor, cpu * GIB + index)), (0, 2));
        }
    }
    for index in 0..511 {
        let both = cursors.iter_mut().zip(&mut gathers);
        for ((cursor, gather), cpu) in both.zip(0..) {
            let one = pages(cpu * GIB + index, 1);
            let spent = cost(|| assert_eq!(cursor.unmap(one, gather), Ok(1)));
            // The first page of a gather announces it.
            assert!(index == 0 || spent == (0, 2), "page {index}: {spent:?}");
        }
    }
    cursors.iter_mut().for_each(Cursor::release);
    gathers.iter_mut().for_each(|gather| gather.commit(drop));
    drop((cursors, gathers));
    table.destroy(|_, _| {}, |_, _| {});
}

/// One page in every 2 MiB: the table above stays held, so a leaf table that is made costs the count of tables, and one that goes its
/// own lock as well, beside what the cache and the commit cost for several at once.
#[test]
fn neighbouring_tables_are_made_and_emptied_without_a_walk() {
    const TABLES: u64 = 256;
    let machine = Machine::new(1024);
    let table = Table::new(machine.env()).unwrap();
    let _ = table.root();
    let range = pages(0, GIB);
    for cached in [false, true] {
        let mut cursor = table.cursor(range).unwrap();
        // The first two show that each has one page.
        map(&mut cursor, 0);
        map(&mut cursor, 512);
        let (locked, _) = cost(|| (2..TABLES).for_each(|index| map(&mut cursor, index * 512)));
        // The count of tables; and a lock of the cache for sixteen frames that are known to be zero.
        assert!(!cached || locked <= TABLES + TABLES / 8, "{locked}");
        let mut gather = table.gather::<{ TABLES as usize }>();
        let mut unmap = |index: u64| {
            let one = pages(index * 512, 1);
            assert_eq!(cursor.unmap(one, &mut gather), Ok(1));
        };
        unmap(0);
        let (locked, _) = cost(|| (1..TABLES - 1).for_each(unmap));
        assert!(locked <= 3 * TABLES, "{locked}");
        assert_eq!(
            cursor.unmap(pages((TABLES - 1) * 512, 1), &mut gather),
            Ok(1)
        );
        drop(cursor);
        gather.commit(drop);
        drop(gather);
        assert_eq!(table.table_count(), 1);
    }
    table.destroy(|_, _| {}, |_, _| {});
}

/// Two CPUs that one thread plays: an interrupt is a call.
struct Played {
    now: Cell<u32>,
    /// Whether the last root of CPU 0 was loaded without dropping what its tag holds.
    kept: Cell<bool>,
}

// SAFETY: one thread.
unsafe impl Sync for Played {}

#[derive(Clone, Copy)]
struct Both(&'static Played);

// SAFETY: no processor.
unsafe impl Tlb for Both {
    fn tags(&self) -> u16 {
        4096
    }
    unsafe fn load(&self, _root: Root, keep: bool) {
        if self.0.now.get() == 0 {
            self.0.kept.set(keep);
        }
    }
    fn drop_page(&self, _page: Page) {}
    fn drop_current(&self) {}
    fn drop_all(&self) {}
}

// SAFETY: one thread plays the CPUs in turn.
unsafe impl Cpu for Both {
    type Guard<'a> = ();
    fn raw_pin(&self) {}
    fn id<'a>(&'a self, (): &()) -> CpuId {
        CpuId::new(self.0.now.get())
    }
    fn count(&self) -> u32 {
        2
    }
}

// SAFETY: each call is made before this returns.
unsafe impl CpuCall for Both {
    fn run_on(&self, cpus: &CpuSet, f: &(dyn Fn(CpuId) + Sync)) -> Result<(), CpuCallError> {
        for cpu in (0..2).map(CpuId::new).filter(|&cpu| cpus.contains(cpu)) {
            let before = self.0.now.replace(cpu.index() as u32);
            f(cpu);
            self.0.now.set(before);
        }
        Ok(())
    }
}

fn root(number: u64) -> Root {
    Root {
        frame: Frame::from_number(number),
        asid: Asid::ZERO,
    }
}

fn request(of: Root, scope: FlushScope, tables_freed: bool) -> FlushRequest {
    FlushRequest {
        root: of,
        scope,
        global: false,
        tables_freed,
    }
}

type Played2 = AsidMmu<'static, Both, Both>;

/// A whole commit by CPU `cpu`.
fn flush(mmu: &Played2, played: &Played, cpu: u32, request: &FlushRequest, local: impl FnOnce()) {
    let before = played.now.replace(cpu);
    let mut cpus = mmu.flush_targets(request);
    cpus.remove(CpuId::new(cpu));
    let sent = mmu.shootdown(&cpus, request);
    local();
    mmu.complete(sent);
    played.now.set(before);
}

/// CPU 0 is lazy in a space and flushes it; in the middle of that CPU 1 frees tables of it, which takes CPU 0 to the kernel's root. Then the
/// kernel's tables change `changes` times while CPU 0 runs another space: it must not keep what it has of them.
fn leave_in_the_middle(at: u64, changes: u64, scope: FlushScope) -> bool {
    let (kernel, space, other) = (root(1), root(10), root(20));
    let played: &'static Played = Box::leak(Box::new(Played {
        now: Cell::new(0),
        kept: Cell::new(false),
    }));
    let areas: Vec<CachePadded<AsidArea>> =
        (0..2).map(|_| CachePadded::new(AsidArea::new())).collect();
    let counters: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
    // SAFETY: an area a CPU, and nobody else uses them.
    let mmu: &'static Played2 = Box::leak(Box::new(unsafe {
        AsidMmu::new(Both(played), Both(played), areas.leak(), counters.leak())
    }));
    // SAFETY: no processor.
    let load = |root| unsafe { mmu.load_root(root, true) };
    // SAFETY: no processor.
    unsafe { mmu.set_kernel_root(kernel) };
    load(kernel);
    load(space);
    mmu.enter_lazy().unwrap();
    let own = request(space, scope, false);
    let theirs = request(space, FlushScope::Everything, true);
    let mut fired = false;
    flush(mmu, played, 0, &own, || {
        let mut interrupt = || flush(mmu, played, 1, &theirs, || mmu.flush_local(&theirs));
        ((), fired) = with_interrupt(at, &mut interrupt, || mmu.flush_local(&own));
    });
    load(other);
    let change = request(kernel, FlushScope::Everything, true);
    for _ in 0..changes {
        flush(mmu, played, 1, &change, || mmu.flush_local(&change));
    }
    played.kept.set(false);
    load(kernel);
    assert!(
        changes == 0 || !played.kept.get(),
        "step {at}: {changes} changes of the kernel's tables were missed"
    );
    fired
}

#[test]
fn a_lazy_cpu_leaves_in_the_middle_of_its_own_flush() {
    let range = pages(5, 1);
    for scope in [
        FlushScope::Everything,
        FlushScope::Pages { range, stride: 1 },
    ] {
        for changes in 0..6 {
            let mut at = 1;
            while leave_in_the_middle(at, changes, scope) {
                at += 1;
            }
            assert!(at > 5, "the flush has more steps than that");
        }
    }
}

#[test]
fn nobody_is_lazy_without_a_root_to_go_to() {
    let played: &'static Played = Box::leak(Box::new(Played {
        now: Cell::new(0),
        kept: Cell::new(false),
    }));
    let areas = vec![CachePadded::new(AsidArea::new())].leak();
    let counters = vec![AtomicU64::new(0)].leak();
    // SAFETY: an area a CPU, and nobody else uses them.
    let mmu = unsafe { AsidMmu::new(Both(played), Both(played), areas, counters) };
    assert!(mmu.enter_lazy().is_err());
    assert!(!mmu.is_lazy());
    // SAFETY: no processor.
    unsafe { mmu.set_kernel_root(root(1)) };
    assert_eq!(mmu.enter_lazy(), Ok(()));
    assert!(mmu.is_lazy());
}
