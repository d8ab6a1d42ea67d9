//! Address spaces: kmem's beside the host's kernel, reached through libc.
//!
//! kmem's calls are function calls over kmem's whole stack (frames, slab, tables, ranges) with a fault handed in as a value; the host's are
//! real system calls and real page faults under whatever hypervisor there is, with everything that its kernel does besides. The two
//! are printed together to show orders of magnitude, not who is faster at the same work. Limits of the same run: `limit:memcpy` copies the
//! words of the tables, `limit:eager-copy` copies entries, clears their write bits and counts a reference for each, `limit:copy-table` copies the 512 entries
//! of a table and counts a reference for each (a locked addition, as other spaces count too, to a slot of 32 bytes), `limit:zero-frame` and
//! `limit:copy-frame` zero and copy 4 KiB that are not in a cache, `limit:copy-table+frame` is a table and a frame in turn.
//!
//! `fork_exec` of the host is a program made for it (`host_program.rs`): the same 40 mappings and touched pages in parent and image, and a parent as small.
//! Comparable: the copy of the space, 40 calls of mmap and 160 first touches, and the end of both spaces. Not comparable, and in the host's
//! figure alone: making, scheduling and reaping a task, reading the image's headers, its stack, `[vdso]`, and the traps.
//!
//! | workload | an operation |
//! |---|---|
//! | `fork_1g_tables`, `fork_64g_tables` | a fork's work on the tables of 1 GiB in pages of 4 KiB, which shares leaf tables; of 64 GiB, level-2 tables |
//! | `fork_exit_tables` | the first of these and the end of the child's tables |
//! | `fork_write_all_tables` | the first of these, and every table copied at its first change: the work on tables of a child that writes to every page |
//! | `first_write_table`, `first_write_level2` | a table copied at its first change, with a count for each frame; a level-2 table and a leaf table |
//! | `fork_1g` | a fork of a space with 1 GiB of touched pages, in the parent; `limit:eager-copy` is kmem's own fork that shares no tables |
//! | `fork_read_all` | one page of a fork and a child that reads from all pages (kmem: walks its tables for each), and its end |
//! | `fork_exec` | a fork of a program with 40 mappings, another program of 40 in a new space, 4 pages of each touched, and its end |
//! | `retake_table` | a write fault after the child has gone without a write: the whole table is taken back |
//! | `fork_exit` | the same and the child's end, in parent and child |
//! | `fork_write_all` | one page of a fork, a child that writes to all pages, and its end |
//! | `first_write`, `later_write` | a write fault that copies, with the child alive: the first in each 2 MiB, and the others |
//! | `reuse_fault` | a write fault after the child has gone, which had written to a page of each table: no copy |
//! | `anon_fault` | a first write to an anonymous page |
//! | `mmap_munmap` | a page mapped and unmapped, not touched |
//! | `mprotect_split_merge` | a call that makes one page in the middle of a mapping read-only, or writable again |
//! | `brk_grow` | a call that moves the break up by a page, or down again |

use std::sync::atomic::{AtomicU64, Ordering};

use kmem_cow_mm::{
    AddressSpace, Env, Layout, MapRequest, Mm, Object, Outcome, Prot, SpaceMemory, VmaMemory,
};
use kmem_hal::{
    DeviceFrame, FaultCode, Frame, Order, Page, PageFault, PageRange, SpinWait, VirtAddr,
};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, ForkItem, ForkStep, PageTable, Parts, Rights, UnshareStep};
use kmem_slab::Cache;
use kmem_vma_tree::Node;

use super::host_program::{FORKS, Program};
use crate::clock::Watch;
use crate::harness::{Competitor, Runner, Slice, Workload};
use crate::output::Unit;
use crate::platform::{
    HostBuddy, HostGrace, Machine, NoWalks, Region, SlabParts, ThreadCpus, grace,
};

const AREA: &str = "fork";
const PAGE: u64 = 4096;

/// Pages of 1 GiB.
const GIB: u64 = 1 << 18;

type Paging =
    Parts<'static, &'static Region, &'static HostBuddy, NoWalks, &'static HostGrace, ThreadCpus>;
type Nodes = Cache<'static, Node, SlabParts>;
type Objects = Cache<'static, Object<Nodes, SpinWait>, SlabParts>;
type Spaces = Cache<'static, SpaceMemory, SlabParts>;
type Space = AddressSpace<'static, World>;

/// What address spaces need: kmem's own stack over one region.
#[derive(Debug)]
pub struct World {
    machine: &'static Machine,
    paging: Paging,
    nodes: Nodes,
    vmas: Cache<'static, VmaMemory, SlabParts>,
    objects: Objects,
    spaces: Spaces,
}

// SAFETY: E1: fields never change; E2: table and map cover the machine's region; E3: worlds are leaked.
unsafe impl Env for World {
    type Paging = Paging;
    type Format = X86_64;
    type Nodes = Nodes;
    type Vmas = Cache<'static, VmaMemory, SlabParts>;
    type Objects = Objects;
    type Spaces = Spaces;
    type Lock = SpinWait;

    fn paging(&self) -> &Paging {
        &self.paging
    }
    fn nodes(&self) -> &Nodes {
        &self.nodes
    }
    fn vmas(&self) -> &Self::Vmas {
        &self.vmas
    }
    fn objects(&self) -> &Objects {
        &self.objects
    }
    fn spaces(&self) -> &Spaces {
        &self.spaces
    }
}

impl World {
    fn leak(region: Region) -> &'static Mm<'static, Self> {
        let machine = Machine::leak(region);
        // SAFETY: the machine's only frame table, and no MMU walks.
        let paging = unsafe {
            Parts::new(
                machine.region,
                machine.buddy,
                NoWalks,
                grace(),
                ThreadCpus::all(),
                machine.table,
            )
        };
        let world: &'static Self = Box::leak(Box::new(Self {
            machine,
            paging,
            nodes: Cache::new(&machine.slab, "vma_node"),
            vmas: Cache::new(&machine.slab, "vma"),
            objects: Cache::new(&machine.slab, "object"),
            spaces: Cache::new(&machine.slab, "mm_struct"),
        }));
        Box::leak(Box::new(Mm::new(world).expect("memory for the zero page")))
    }
}

/// Memory management of kmem's over a region; it lives for ever.
///
/// # Panics
///
/// Where it does not start.
#[must_use]
pub fn mm(region: Region) -> &'static Mm<'static, World> {
    World::leak(region)
}

/// A process of kmem's: a space with one anonymous mapping.
#[derive(Debug)]
pub struct Process {
    space: Space,
    start: u64,
    pages: u64,
}

impl Process {
    fn new(mm: &'static Mm<'static, World>, pages: u64) -> Self {
        let space = AddressSpace::new(mm, Layout::x86_64()).expect("memory for a root");
        let request = MapRequest::anonymous(pages * PAGE, Prot::READ | Prot::WRITE);
        let start = space.mmap(&request).expect("room for a mapping").as_u64();
        Self {
            space,
            start,
            pages,
        }
    }

    /// A process that has written to all of its `pages` pages.
    ///
    /// # Panics
    ///
    /// Without memory for them.
    #[must_use]
    pub fn touched(mm: &'static Mm<'static, World>, pages: u64) -> Self {
        let process = Self::new(mm, pages);
        process.write(0..pages, FaultCode::empty());
        process.check();
        process
    }

    /// A write fault at each of these pages.
    #[inline]
    fn write(&self, pages: impl Iterator<Item = u64>, present: FaultCode) {
        for page in pages {
            let outcome = self.space.fault(&PageFault {
                address: VirtAddr::new(self.start + page * PAGE),
                code: FaultCode::WRITE | FaultCode::USER | present,
            });
            assert_eq!(outcome, Outcome::Handled);
        }
    }

    /// A child.
    ///
    /// # Panics
    ///
    /// Without memory for its tables.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            space: self.space.fork().expect("memory for a child"),
            start: self.start,
            pages: self.pages,
        }
    }

    /// All pages are there.
    fn check(&self) {
        let table = self.space.page_tables();
        for page in (0..self.pages).step_by((self.pages / 64).max(1) as usize) {
            let page = Page::containing(VirtAddr::new(self.start + page * PAGE));
            assert!(table.query(page).leaf().is_some(), "a page is missing");
        }
    }

    fn frame(&self, page: u64) -> Option<Frame> {
        let page = Page::containing(VirtAddr::new(self.start + page * PAGE));
        Some(self.space.page_tables().query(page).leaf()?.frame)
    }
}

/// Memory of this process, in pages of 4 KiB, which its children get.
struct HostMemory {
    base: *mut u8,
    pages: u64,
}

impl HostMemory {
    fn new(pages: u64) -> Self {
        let length = (pages * PAGE) as usize;
        // SAFETY: a new mapping that nothing else uses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED, "the host has no room");
        // SAFETY: the mapping just made.
        unsafe { libc::madvise(base, length, libc::MADV_NOHUGEPAGE) };
        Self {
            base: base.cast(),
            pages,
        }
    }

    fn touched(pages: u64) -> Self {
        let memory = Self::new(pages);
        memory.write(0..pages);
        memory
    }

    #[inline]
    fn write(&self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            // SAFETY: inside the mapping, which this value owns.
            unsafe { self.base.add((page * PAGE) as usize).write_volatile(1) };
        }
    }

    #[inline]
    fn read(&self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            // SAFETY: inside the mapping, which this value owns.
            std::hint::black_box(unsafe { self.base.add((page * PAGE) as usize).read_volatile() });
        }
    }

    /// Gives the pages back to the kernel.
    fn forget(&self) {
        let length = (self.pages * PAGE) as usize;
        // SAFETY: the value's mapping.
        unsafe { libc::madvise(self.base.cast(), length, libc::MADV_DONTNEED) };
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.base.cast(), (self.pages * PAGE) as usize) };
    }
}

/// CPU time of all children that ended and were waited for.
fn children_time() -> std::time::Duration {
    // SAFETY: zero is a value of this plain struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a local of the right type.
    assert_eq!(0, unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage)
    });
    [usage.ru_utime, usage.ru_stime]
        .iter()
        .map(|time| std::time::Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000))
        .sum()
}

/// A child of this process; it is ended and waited for when this is dropped.
struct Child(libc::pid_t);

impl Child {
    /// Forks; the child sleeps until it is killed. Times the parent's part.
    fn asleep(watch: Option<&mut Watch>) -> Self {
        // SAFETY: no other thread runs, and the child calls only what is allowed after fork.
        let fork = || unsafe { libc::fork() };
        let child = match watch {
            Some(watch) => watch.time(fork),
            None => fork(),
        };
        if child == 0 {
            loop {
                // SAFETY: no arguments.
                unsafe { libc::pause() };
            }
        }
        assert!(child > 0, "the host cannot fork");
        Self(child)
    }

    /// Forks; the child does `work` and ends.
    fn working(work: impl FnOnce()) -> Self {
        // SAFETY: as above; `work` only writes to memory.
        let child = unsafe { libc::fork() };
        if child == 0 {
            work();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        assert!(child > 0, "the host cannot fork");
        Self(child)
    }

    /// Waits for the child's own end; it must have done its work.
    fn wait(self) {
        let mut status = 0;
        // SAFETY: a child of this process that nobody else waits for.
        let child = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!((child, status), (self.0, 0), "the child failed");
        std::mem::forget(self);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: a child of this process that nobody else waits for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, &raw mut status, 0);
        }
    }
}

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    let of_tables = [
        "fork_1g_tables",
        "fork_exit_tables",
        "fork_64g_tables",
        "first_write_table",
        "first_write_level2",
        "fork_write_all_tables",
    ];
    if of_tables.iter().any(|name| runner.wants(name)) {
        tables(runner);
    }
    if runner.wants("fork_1g") || runner.wants("fork_exit") {
        whole(runner);
    }
    let count = runner.size(1 << 12, 1 << 14);
    let mm = World::leak(Region::new(4 * count + (1 << 13)).touched());
    writes(runner, mm, count);
    programs(runner, mm);
    faults(runner, mm, count);
    calls(runner, mm);
}

fn workload(name: &'static str) -> Workload<'static> {
    Workload::new(AREA, name, Unit::Ns)
}

/// Copies entries, clears write bits on both sides, and counts a reference for each frame: what an eager fork has to do.
fn eager_copy() -> impl Competitor {
    let mut parent = vec![0u64; GIB as usize];
    let mut child = vec![0u64; GIB as usize];
    let mut counts = vec![1u32; GIB as usize];
    for (number, entry) in parent.iter_mut().enumerate() {
        *entry = (number as u64) << 12 | 0x67;
    }
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for (parent, child) in parent.iter_mut().zip(&mut child) {
                *parent &= !2;
                *child = *parent;
                counts[(*parent >> 12) as usize] += 1;
            }
        });
        std::hint::black_box((&parent, &child, &counts));
        Slice::limit(1)
    }
}

fn copy_tables() -> impl Competitor {
    let from = vec![1u64; GIB as usize];
    let mut to = vec![2u64; GIB as usize];
    move |_: u64, watch: &mut Watch| {
        watch.time(|| to.copy_from_slice(std::hint::black_box(&from)));
        std::hint::black_box(&to);
        Slice::limit(1)
    }
}

type Table = PageTable<X86_64, &'static Paging, DeviceFrame>;

fn device(number: u64) -> DeviceFrame {
    DeviceFrame::new(Frame::from_number(number), Order::ZERO).expect("order 0")
}

/// Tables that map so many GiB in pages of 4 KiB, with A and D set, and their pages.
fn filled(mm: &'static Mm<'static, World>, gibs: u64) -> (Table, PageRange) {
    let range = PageRange::with_count(Page::from_number(1 << 20), gibs * GIB).expect("not empty");
    let table = Table::new(&mm.env().paging).expect("memory for a root");
    let attributes = Attributes::new(Rights::USER_DATA).accessed().dirty();
    table
        .cursor(range)
        .expect("a valid range")
        .map_range(range, Order::ZERO, attributes, |page, _left| {
            Some(device((1 << 24) + page.number()))
        })
        .expect("memory for tables");
    (table, range)
}

/// A child that shares tables of level `most` and below.
fn sharing(parent: &Table, range: PageRange, most: usize, watch: Option<&mut Watch>) -> Table {
    let child = Table::new(*parent.env()).expect("memory for a root");
    let mut gather = parent.gather::<8>();
    let mut fork = || {
        // SAFETY: one thread, without an open cursor; no processor uses these tables.
        unsafe { parent.fork_sharing(&child, range, most, &mut gather, |_| ForkStep::Skip) }
    };
    let shared = match watch {
        Some(watch) => watch.time(fork),
        None => fork(),
    };
    assert!(shared.is_ok(), "memory for the child's tables");
    gather.commit(|_| {});
    drop(gather);
    child
}

fn end(child: Table) {
    child.destroy(|_leaf, _frame| {}, |_page, _payload| {});
}

/// Makes the table of `page` the space's own, with a count for each frame.
fn own(table: &Table, page: Page, counts: &mut [u32]) -> bool {
    let mut gather = table.gather::<8>();
    let copied = table
        .cursor(PageRange::single(page))
        .expect("a valid range")
        .unshare(
            page,
            &mut gather,
            |item| match item {
                ForkItem::Leaf(leaf) => {
                    counts[leaf.frame.number() as usize % GIB as usize] += 1;
                    UnshareStep::Protected(device(leaf.frame.number()))
                }
                _ => UnshareStep::Skip,
            },
            drop,
        )
        .expect("memory for a table");
    gather.commit(|_| {});
    copied
}

/// Copies the entries of tables and counts a reference for each frame, in slots of 32 bytes, as other spaces' forks may too.
struct FlatTables {
    from: Vec<u64>,
    to: Vec<u64>,
    counts: Vec<[AtomicU64; 4]>,
}

impl FlatTables {
    /// Tables of so many pages.
    fn new(pages: u64) -> Self {
        Self {
            from: (0..pages).map(|frame| frame << 12 | 0x67).collect(),
            to: vec![0u64; pages as usize],
            counts: (0..pages).map(|_| Default::default()).collect(),
        }
    }

    #[inline]
    fn copy(&mut self, table: u64) {
        let first = (table * 512 % self.to.len() as u64) as usize;
        let words = self.from.iter().zip(&mut self.to).skip(first).take(512);
        for (from, to) in words {
            *to = *from;
            self.counts[(*from >> 12) as usize][1].fetch_add(1 << 32, Ordering::AcqRel);
        }
    }
}

fn copy_one_table() -> impl Competitor {
    let mut tables = FlatTables::new(GIB);
    move |index: u64, watch: &mut Watch| {
        watch.time(|| (index * 64..(index + 1) * 64).for_each(|table| tables.copy(table)));
        std::hint::black_box((&tables.to, &tables.counts));
        Slice::limit(64)
    }
}

/// One table of a process of so many pages copied, and one frame, in turn: what a first write cannot do without.
fn copy_table_and_frame(pages: u64) -> impl Competitor {
    let mut tables = FlatTables::new(pages);
    let mut frames = ColdFrames::new();
    move |index: u64, watch: &mut Watch| {
        watch.time(|| {
            for table in index * 64..(index + 1) * 64 {
                tables.copy(table);
                frames.copy();
            }
        });
        std::hint::black_box((&tables.to, &tables.counts));
        Slice::limit(64)
    }
}

/// Children of all these parents, which share tables of level `most` and below; the fork's work is timed where there is a watch.
fn children(parents: &[(Table, PageRange)], most: usize, watch: Option<&mut Watch>) -> Vec<Table> {
    let mut gathers: Vec<_> = parents
        .iter()
        .map(|(parent, _)| parent.gather::<8>())
        .collect();
    let children: Vec<Table> = parents
        .iter()
        .map(|(parent, _)| Table::new(*parent.env()).expect("memory for a root"))
        .collect();
    let mut fork = || {
        let all = parents.iter().zip(&children).zip(&mut gathers);
        for (((parent, range), child), gather) in all {
            // SAFETY: one thread, without an open cursor; no processor uses these tables.
            let shared =
                unsafe { parent.fork_sharing(child, *range, most, gather, |_| ForkStep::Skip) };
            assert!(shared.is_ok(), "memory for the child's tables");
        }
    };
    match watch {
        Some(watch) => watch.time(fork),
        None => fork(),
    }
    gathers.iter_mut().for_each(|gather| gather.commit(|_| {}));
    children
}

fn tables(runner: &mut Runner) {
    let mm = World::leak(Region::new(1 << 13).touched());
    // Several, since one is forked in not much more time than the clock needs.
    let parents: Vec<_> = (0..4).map(|_| filled(mm, 1)).collect();
    let of_kmem = |_: u64, watch: &mut Watch| {
        let children = children(&parents, 1, Some(watch));
        children.into_iter().for_each(end);
        Slice::ops(4, 4 * GIB)
    };
    runner.run(
        workload("fork_1g_tables")
            .with("kmem", of_kmem)
            .with("limit:eager-copy", eager_copy())
            .with("limit:memcpy", copy_tables()),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for (parent, range) in &parents {
                end(sharing(parent, *range, 1, None));
            }
        });
        Slice::ops(4, 4 * GIB)
    };
    runner.run(
        workload("fork_exit_tables")
            .with("kmem", of_kmem)
            .with("limit:eager-copy", eager_copy()),
    );
    let (parent, range) = &parents[0];
    let (parent, range) = (parent, *range);
    let mut counts = vec![1u32; GIB as usize];
    let of_kmem = |_: u64, watch: &mut Watch| {
        let child = sharing(parent, range, 1, None);
        watch.time(|| {
            for number in 0..64 {
                let page = Page::from_number(range.first().number() + number * 512);
                assert!(own(&child, page, &mut counts), "nothing was shared");
            }
        });
        end(child);
        Slice::ops(64, 64)
    };
    runner.run(
        workload("first_write_table")
            .with("kmem", of_kmem)
            .with("limit:copy-table", copy_one_table()),
    );
    let mut counts = vec![1u32; GIB as usize];
    let of_kmem = |_: u64, watch: &mut Watch| {
        let child = watch.time(|| {
            let child = sharing(parent, range, 1, None);
            for number in 0..512 {
                let page = Page::from_number(range.first().number() + number * 512);
                assert!(own(&child, page, &mut counts), "nothing was shared");
            }
            child
        });
        end(child);
        Slice::ops(1, GIB)
    };
    runner.run(
        workload("fork_write_all_tables")
            .with("kmem", of_kmem)
            .with("limit:eager-copy", eager_copy()),
    );
    let mut counts = vec![1u32; GIB as usize];
    let of_kmem = |_: u64, watch: &mut Watch| {
        let children = children(&parents, 2, None);
        watch.time(|| {
            for (child, (_, range)) in children.iter().zip(&parents) {
                assert!(own(child, range.first(), &mut counts), "nothing was shared");
            }
        });
        children.into_iter().for_each(end);
        Slice::ops(4, 4)
    };
    runner.run(
        workload("first_write_level2")
            .with("kmem", of_kmem)
            .with("limit:copy-table", copy_one_table()),
    );
    if runner.wants("fork_64g_tables") {
        let mm = World::leak(Region::new(1 << 16).touched());
        let (parent, range) = filled(mm, 64);
        let of_kmem = move |_: u64, watch: &mut Watch| {
            end(sharing(&parent, range, 2, Some(watch)));
            Slice::ops(1, 64 * GIB)
        };
        runner.run(workload("fork_64g_tables").with("kmem", of_kmem));
    }
}

fn whole(runner: &mut Runner) {
    let mm = World::leak(Region::new(GIB + (1 << 14)));
    let process = Process::touched(mm, GIB);
    let memory = HostMemory::touched(GIB);
    let of_kmem = |_: u64, watch: &mut Watch| {
        let child = watch.time(|| process.fork());
        child.check();
        Slice::ops(1, GIB)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let child = Child::asleep(Some(watch));
        drop(child);
        Slice::ops(1, memory.pages)
    };
    let eagerly = |_: u64, watch: &mut Watch| {
        let child = watch.time(|| process.space.fork_copying());
        drop(child.expect("memory for a child"));
        Slice::limit(1)
    };
    runner.run(
        workload("fork_1g")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host)
            .with("limit:eager-copy", eagerly)
            .with("limit:memcpy", copy_tables()),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| drop(process.fork()));
        process.check();
        Slice::ops(1, GIB)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let before = children_time();
        watch.time(|| Child::working(|| ()).wait());
        watch.add(children_time() - before);
        Slice::ops(1, memory.pages)
    };
    runner.run(
        workload("fork_exit")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
}

/// Frames of memory that is larger than the caches, one after the other.
struct ColdFrames {
    region: Region,
    at: usize,
}

impl ColdFrames {
    const HALF: usize = 1 << 13;

    fn new() -> Self {
        let region = Region::new(2 * Self::HALF as u64).touched();
        Self { region, at: 0 }
    }

    /// The next frame of the lower half, and one of the upper.
    #[inline]
    fn next(&mut self) -> (*mut u8, *mut u8) {
        self.at = (self.at + 1) % Self::HALF;
        let frame = |number| self.region.base().wrapping_add(number * 4096);
        (frame(self.at), frame(self.at + Self::HALF))
    }

    #[inline]
    fn zero(&mut self) {
        // SAFETY: a frame of the region, which this value owns.
        unsafe { self.next().0.write_bytes(0, 4096) };
    }

    #[inline]
    fn copy(&mut self) {
        let (low, high) = self.next();
        // SAFETY: two frames of the region, which this value owns.
        unsafe { high.copy_from_nonoverlapping(low, 4096) };
    }
}

/// Zeroes cold frames, or copies them.
fn cold_frames(copies: bool) -> impl Competitor {
    let mut frames = ColdFrames::new();
    move |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..256 {
                if copies {
                    frames.copy();
                } else {
                    frames.zero();
                }
            }
        });
        Slice::limit(256)
    }
}

fn writes(runner: &mut Runner, mm: &'static Mm<'static, World>, count: u64) {
    let process = Process::touched(mm, count);
    let memory = HostMemory::touched(count);
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            let child = process.fork();
            child.write(0..count, FaultCode::PRESENT);
            drop(child);
        });
        process.check();
        Slice::ops(count, count)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let before = children_time();
        watch.time(|| Child::working(|| memory.write(0..count)).wait());
        watch.add(children_time() - before);
        Slice::ops(count, count)
    };
    runner.run(
        workload("fork_write_all")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        let mut sum = 0;
        watch.time(|| {
            let child = process.fork();
            sum = (0..count).filter_map(|page| child.frame(page)).count() as u64;
            drop(child);
        });
        assert_eq!(sum, count, "a page is missing");
        Slice::ops(count, count)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let before = children_time();
        watch.time(|| Child::working(|| memory.read(0..count)).wait());
        watch.add(children_time() - before);
        Slice::ops(count, count)
    };
    runner.run(
        workload("fork_read_all")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
    let firsts = || (0..count).step_by(512);
    let others = || (0..count).filter(|page| page % 512 != 0);
    for (name, is_first) in [("first_write", true), ("later_write", false)] {
        let of_kmem = |_: u64, watch: &mut Watch| {
            let child = process.fork();
            let ops = if is_first {
                watch.time(|| process.write(firsts(), FaultCode::PRESENT));
                firsts().count()
            } else {
                process.write(firsts(), FaultCode::PRESENT);
                watch.time(|| process.write(others(), FaultCode::PRESENT));
                others().count()
            };
            for page in [0, count - 1] {
                let copied = process.frame(page) != child.frame(page);
                assert_eq!(copied, page == 0 || !is_first, "page {page}");
            }
            drop(child);
            // All writable again, as the other program's pages are.
            process.write(0..count, FaultCode::PRESENT);
            Slice::ops(ops as u64, ops as u64)
        };
        let of_host = |_: u64, watch: &mut Watch| {
            let child = Child::asleep(None);
            let ops = if is_first {
                watch.time(|| memory.write(firsts()));
                firsts().count()
            } else {
                memory.write(firsts());
                watch.time(|| memory.write(others()));
                others().count()
            };
            drop(child);
            memory.write(0..count);
            Slice::ops(ops as u64, ops as u64)
        };
        let row = workload(name)
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host)
            .with("limit:copy-frame", cold_frames(true));
        runner.run(if is_first {
            row.with("limit:copy-table+frame", copy_table_and_frame(count))
        } else {
            row
        });
    }
    let of_kmem = |_: u64, watch: &mut Watch| {
        let before = process.frame(1);
        let child = process.fork();
        // Both sides have tables of their own from now on, and all their leaves are read-only.
        child.write(firsts(), FaultCode::PRESENT);
        drop(child);
        process.write(firsts(), FaultCode::PRESENT);
        watch.time(|| process.write(others(), FaultCode::PRESENT));
        assert_eq!(process.frame(1), before, "a page was copied for nobody");
        let ops = others().count() as u64;
        Slice::ops(ops, ops)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        Child::working(|| ()).wait();
        memory.write(firsts());
        watch.time(|| memory.write(others()));
        let ops = others().count() as u64;
        Slice::ops(ops, ops)
    };
    runner.run(
        workload("reuse_fault")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        let before = process.frame(1);
        drop(process.fork());
        watch.time(|| process.write(firsts(), FaultCode::PRESENT));
        assert_eq!(process.frame(1), before, "a page was copied for nobody");
        let ops = firsts().count() as u64;
        Slice::ops(ops, ops)
    };
    runner.run(workload("retake_table").n(count).with("kmem", of_kmem));
}

/// A program of 40 mappings, with pages in each.
fn program(mm: &'static Mm<'static, World>) -> Process {
    let space = AddressSpace::new(mm, Layout::x86_64()).expect("memory for a root");
    let mut start = 0;
    for number in 0..40 {
        // Other rights than the neighbours', so that they do not merge.
        let prot = match number % 2 {
            0 => Prot::READ | Prot::WRITE,
            _ => Prot::READ,
        };
        let request = MapRequest::anonymous(16 * PAGE, prot);
        start = space.mmap(&request).expect("room for a mapping").as_u64();
        let code = match number % 2 {
            0 => FaultCode::WRITE | FaultCode::USER,
            _ => FaultCode::USER,
        };
        for page in 0..4 {
            let outcome = space.fault(&PageFault {
                address: VirtAddr::new(start + page * PAGE),
                code,
            });
            assert_eq!(outcome, Outcome::Handled);
        }
    }
    assert_eq!(space.map_count(), 40);
    Process {
        space,
        start,
        pages: 4,
    }
}

fn programs(runner: &mut Runner, mm: &'static Mm<'static, World>) {
    let parent = program(mm);
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..FORKS {
                let child = parent.fork();
                let image = program(mm);
                drop(child);
                drop(image);
            }
        });
        parent.check();
        Slice::ops(FORKS, FORKS * 40)
    };
    let made = Program::new();
    let of_host = |_: u64, watch: &mut Watch| {
        // The measuring process only waits.
        let before = children_time();
        made.run();
        watch.add(children_time() - before);
        Slice::ops(FORKS, FORKS * 40)
    };
    runner.run(
        workload("fork_exec")
            .n(40)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
}

fn faults(runner: &mut Runner, mm: &'static Mm<'static, World>, count: u64) {
    let of_kmem = |_: u64, watch: &mut Watch| {
        let used = mm.env().machine.used_frames();
        let process = Process::new(mm, count);
        watch.time(|| process.write(0..count, FaultCode::empty()));
        process.check();
        let taken = mm.env().machine.used_frames() - used;
        assert!(taken >= count, "{count} pages in {taken} frames");
        Slice::ops(count, count)
    };
    let memory = HostMemory::new(count);
    let of_host = |_: u64, watch: &mut Watch| {
        memory.forget();
        watch.time(|| memory.write(0..count));
        Slice::ops(count, count)
    };
    runner.run(
        workload("anon_fault")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host)
            .with("limit:zero-frame", cold_frames(false)),
    );
}

const CALLS: u64 = 500;

fn calls(runner: &mut Runner, mm: &'static Mm<'static, World>) {
    let process = Process::new(mm, 64);
    let space = &process.space;
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..CALLS {
                let request = MapRequest::anonymous(PAGE, Prot::READ);
                let page = space.mmap(&request).expect("room for a page");
                space.munmap(page.as_u64(), PAGE).expect("it is mapped");
            }
        });
        assert_eq!(space.map_count(), 1);
        Slice::ops(CALLS, CALLS)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        watch.time(|| (0..CALLS).for_each(|_| drop(HostPage::new())));
        Slice::ops(CALLS, CALLS)
    };
    runner.run(
        workload("mmap_munmap")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );

    let memory = HostMemory::new(64);
    let middle = process.start + 32 * PAGE;
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..CALLS {
                space
                    .mprotect(middle, PAGE, Prot::READ)
                    .expect("it is mapped");
                let both = Prot::READ | Prot::WRITE;
                space.mprotect(middle, PAGE, both).expect("it is mapped");
            }
        });
        assert_eq!(space.map_count(), 1, "the parts did not merge");
        Slice::ops(2 * CALLS, CALLS)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let middle = memory.base.wrapping_add(32 * PAGE as usize).cast();
        watch.time(|| {
            for _ in 0..CALLS {
                for rights in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
                    // SAFETY: a page of the value's own mapping.
                    let result = unsafe { libc::mprotect(middle, PAGE as usize, rights) };
                    assert_eq!(result, 0);
                }
            }
        });
        Slice::ops(2 * CALLS, CALLS)
    };
    runner.run(
        workload("mprotect_split_merge")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );

    let bottom = 0x1000_0000;
    space.set_heap(bottom);
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..CALLS {
                assert_eq!(space.brk(bottom + PAGE), bottom + PAGE);
                assert_eq!(space.brk(bottom), bottom);
            }
        });
        Slice::ops(2 * CALLS, CALLS)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        // SAFETY: asks for the break; nothing else in this loop allocates, and it ends where it began.
        let brk = |end: i64| unsafe { libc::syscall(libc::SYS_brk, end) };
        let bottom = brk(0);
        let mut moved = true;
        watch.time(|| {
            for _ in 0..CALLS {
                moved &= brk(bottom + PAGE as i64) == bottom + PAGE as i64;
                moved &= brk(bottom) == bottom;
            }
        });
        assert!(moved, "the host did not move the break");
        Slice::ops(2 * CALLS, CALLS)
    };
    runner.run(
        workload("brk_grow")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
}

/// One page of the host's; unmapped when it is dropped.
struct HostPage(*mut libc::c_void);

impl HostPage {
    fn new() -> Self {
        // SAFETY: a new mapping that nothing else uses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page)
    }
}

impl Drop for HostPage {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        let result = unsafe { libc::munmap(self.0, PAGE as usize) };
        assert_eq!(result, 0);
    }
}
