//! vmalloc: a pair of calls beside the sum of what it cannot do without.
//!
//! Frames, tables and flushes are those of the other areas: kmem's page-frame allocator, its live tables, and no processor that walks
//! them, so that a flush costs nothing. An area that stays keeps the leaf table, as in a kernel that runs.
//!
//! | workload | an operation |
//! |---|---|
//! | `pair_64k`, `pair_4k` | an area allocated and freed, its share of the purges included |
//! | `pair_2m` | the same with one large leaf |
//! | `stack_16k` | a kernel stack out of the cache and back |
//! | `ioremap_16k` | device registers mapped and unmapped, the share of the purges included |
//! | `kmap_local` | a frame mapped for a moment by its CPU |
//!
//! `limit:frames+tables` allocates the same frames one by one, maps them with one call for the range, unmaps the range, commits and frees
//! each frame: no addresses are looked for or kept, nothing is lazy. `limit:tables` does the same without frames.

use kmem_hal::{
    Cpu as _, DeviceFrame, Frame, FrameHandle, FrameRequest, FrameSink, FrameSource, Order,
    OwnedFrame, PAGE_SIZE, Page, PageRange, PhysAddr, Spin,
};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, MemoryType, PageTable, Parts, Rights};
use kmem_slab::Cache;
use kmem_vma_tree::Node;
use kmem_vmalloc::{
    KernelLayout, KernelPage, LOCAL_DEPTH, LocalMap, LocalSlots, StackCache, StackSlots, Vmalloc,
};

use crate::clock::Watch;
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::output::Unit;
use crate::platform::{
    HostBuddy, HostGrace, Machine, NoWalks, Region, SlabParts, ThreadCpus, grace,
};

const AREA: &str = "vmalloc";

/// Operations of a slice.
const OPS: u64 = 240;

type Env =
    Parts<'static, &'static Region, &'static HostBuddy, NoWalks, &'static HostGrace, ThreadCpus>;
type Kernel = Vmalloc<'static, X86_64, &'static Env, Cache<'static, Node, SlabParts>, Spin>;
type Table<H> = PageTable<X86_64, &'static Env, H>;

fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn env(machine: &'static Machine) -> &'static Env {
    // SAFETY: the machine's only frame table, and no MMU walks.
    leak(unsafe {
        Parts::new(
            machine.region,
            machine.buddy,
            NoWalks,
            grace(),
            ThreadCpus::all(),
            machine.table,
        )
    })
}

fn machine() -> &'static Machine {
    Machine::leak(Region::new(1 << 15).touched())
}

fn kernel() -> &'static Kernel {
    let machine = machine();
    let table = leak(Table::<KernelPage>::new(env(machine)).expect("a frame for the root"));
    let nodes = Cache::new(&machine.slab, "vmap_node");
    let kernel = leak(Vmalloc::new(table, KernelLayout::x86_64().vmalloc, nodes));
    kernel.alloc(PAGE_SIZE).expect("the area that stays");
    kernel
}

fn pair(kernel: &'static Kernel, bytes: u64) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        let mut pages = 0;
        watch.time(|| {
            for _ in 0..OPS {
                let at = kernel.alloc(bytes).expect("memory");
                pages += bytes / PAGE_SIZE;
                kernel.free(at).expect("it was just given");
            }
        });
        kernel.purge();
        assert_eq!(kernel.used(), (1, 1), "areas are left");
        Slice::ops(OPS, pages)
    }
}

/// What the limit maps: frames of its own, or somebody's.
trait Handle: FrameHandle + kmem_paging::Divisible + 'static {
    const BLOCK: bool;
    fn take(buddy: &HostBuddy, order: Order, index: u64) -> Option<Self>;
    fn give(self, buddy: &HostBuddy);
}

impl Handle for OwnedFrame {
    const BLOCK: bool = true;
    #[inline]
    fn take(buddy: &HostBuddy, order: Order, _index: u64) -> Option<Self> {
        FrameSource::alloc(buddy, &FrameRequest::new(order)).ok()
    }
    #[inline]
    fn give(self, buddy: &HostBuddy) {
        FrameSink::free(buddy, self);
    }
}

impl Handle for DeviceFrame {
    const BLOCK: bool = false;
    #[inline]
    fn take(_buddy: &HostBuddy, order: Order, index: u64) -> Option<Self> {
        DeviceFrame::new(Frame::from_number(0xf_e000 + index), order)
    }
    #[inline]
    fn give(self, _buddy: &HostBuddy) {}
}

/// Frames, mappings, and nothing else.
fn parts<H: Handle>(bytes: u64) -> impl Competitor {
    let machine = machine();
    let table = leak(Table::<H>::new(env(machine)).expect("a frame for the root"));
    let order = if H::BLOCK && bytes >= Order::HUGE_2M.bytes() {
        Order::HUGE_2M
    } else {
        Order::ZERO
    };
    let first = KernelLayout::x86_64().vmalloc.first();
    let pages = bytes / PAGE_SIZE;
    let base = first.number() + order.frames().max(1);
    let range = PageRange::with_count(Page::from_number(base), pages).expect("inside the window");
    let attributes = Attributes::new(Rights::KERNEL_DATA | Rights::GLOBAL);
    let stays = PageRange::single(first);
    let mut cursor = table.cursor(stays).expect("the kernel's half");
    let frame = H::take(machine.buddy, Order::ZERO, 99).expect("memory");
    assert!(
        cursor.map(first, frame, attributes).is_ok(),
        "the page that stays"
    );
    drop(cursor);
    move |_: u64, watch: &mut Watch| {
        let mut done = 0;
        watch.time(|| {
            for _ in 0..OPS {
                let mut cursor = table.cursor(range).expect("the kernel's half");
                let mapped = cursor.map_range(range, order, attributes, |page, _| {
                    H::take(machine.buddy, order, page.number() - base)
                });
                assert!(mapped.is_ok(), "memory");
                drop(cursor);
                let mut gather = table.gather::<32>();
                let mut cursor = table.cursor(range).expect("the kernel's half");
                done += cursor
                    .unmap(range, &mut gather)
                    .expect("it fits the gather");
                drop(cursor);
                gather.commit(|frame| frame.give(machine.buddy));
            }
        });
        Slice::ops(OPS, done)
    }
}

fn ioremap(kernel: &'static Kernel) -> impl Competitor {
    move |_: u64, watch: &mut Watch| {
        let mut pages = 0;
        watch.time(|| {
            for _ in 0..OPS {
                let at = kernel
                    .ioremap(PhysAddr::new(0xfe00_0000), 16 << 10, MemoryType::Uncached)
                    .expect("addresses");
                pages += 4;
                kernel.free(at).expect("it was just given");
            }
        });
        kernel.purge();
        Slice::ops(OPS, pages)
    }
}

fn stacks(kernel: &'static Kernel) -> impl Competitor {
    let slots: &'static mut [StackSlots] =
        Box::leak(Box::new([StackSlots::new(), StackSlots::new()]));
    let cache = StackCache::new(kernel, ThreadCpus::all(), slots, 4);
    move |_: u64, watch: &mut Watch| {
        let mut sum = 0;
        let ops = OPS * 16;
        watch.time(|| {
            for _ in 0..ops {
                let top = cache.alloc().expect("memory");
                sum += 4;
                cache.free(top).expect("it was just given");
            }
        });
        Slice::ops(ops, sum)
    }
}

fn local() -> impl Competitor {
    let machine = machine();
    let table = leak(Table::<KernelPage>::new(env(machine)).expect("a frame for the root"));
    let slots: &'static [LocalSlots] = Box::leak(Box::new([LocalSlots::new(), LocalSlots::new()]));
    let local: LocalMap<'static, X86_64, _, _, _> =
        LocalMap::new(machine.region, NoWalks, ThreadCpus::all(), slots);
    local
        .init(table, KernelLayout::x86_64().vmalloc.first())
        .expect("frames for its tables");
    move |index: u64, watch: &mut Watch| {
        let mut sum = 0;
        let ops = OPS * 16;
        watch.time(|| {
            for n in 0..ops {
                let pin = local.cpu().pin();
                let page = local
                    .map(&pin, Frame::from_number((1 << 22) + n))
                    .expect("a page of the CPU's");
                sum += page.address().as_u64() & u64::from(LOCAL_DEPTH);
            }
        });
        assert_eq!(slots[0].in_use(), 0, "slice {index} left a page");
        Slice::ops(ops, sum)
    }
}

fn workload(name: &'static str) -> Workload<'static> {
    Workload::new(AREA, name, Unit::Ns)
}

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    for (name, bytes) in [
        ("pair_64k", 64 << 10),
        ("pair_4k", 4 << 10),
        ("pair_2m", 2 << 20),
    ] {
        if runner.wants(name) {
            runner.run(
                workload(name)
                    .with("kmem", pair(kernel(), bytes))
                    .with("limit:frames+tables", parts::<OwnedFrame>(bytes)),
            );
        }
    }
    if runner.wants("stack_16k") {
        runner.run(workload("stack_16k").with("kmem", stacks(kernel())));
    }
    if runner.wants("ioremap_16k") {
        runner.run(
            workload("ioremap_16k")
                .with("kmem", ioremap(kernel()))
                .with("limit:tables", parts::<DeviceFrame>(16 << 10)),
        );
    }
    if runner.wants("kmap_local") {
        runner.run(workload("kmap_local").with("kmem", local()));
    }
}
