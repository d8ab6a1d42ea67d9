//! The scenarios that `cargo xtask qemu NAME` runs, by name.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use core::arch::asm;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use kmem::hal::{
    Asid, CpuCall, CpuId, Frame, FrameRequest, FrameSink, FrameSource, Mmu, Page, PageRange,
    PhysAddr, Root, VirtAddr,
};
use kmem::paging::{ChangeError, MapError, Rights, TableCache};

use crate::memory::{self, HEAP, KernelFrame, MACHINE, Table, frames};
use crate::platform::{self, Machine};
use crate::pvh::Boot;
use crate::{print, println, smp, traps};

/// Runs the named scenario; false when there is none of that name or it failed.
pub fn run(name: &str, boot: &Boot) -> bool {
    println!("scenario {name}");
    match name {
        "boot" => hello(boot),
        "fault" => fault(),
        "smp" => smp(boot),
        "heap" => heap(boot),
        "paging" => paging(boot),
        "leak" => {
            let free = start(boot);
            let _ = frames().alloc(&FrameRequest::ONE); // dropping a frame leaks it
            end(free)
        }
        "stale" => {
            smp::DEAF.store(true, Ordering::Relaxed);
            paging(boot)
        }
        "fail" => false,
        "panic" => panic!("asked for"),
        "triple" => triple_fault(),
        "hang" => loop {
            core::hint::spin_loop();
        },
        _ => {
            println!("no scenario of that name");
            false
        }
    }
}

/// Prints the memory map, takes a breakpoint exception and returns from it.
fn hello(boot: &Boot) -> bool {
    let mut usable = 0;
    for entry in boot.map() {
        println!(
            "{:#013x}..{:#013x} type {}",
            entry.base,
            entry.base + entry.length,
            entry.kind
        );
        if entry.kind == 1 {
            usable += entry.length;
        }
    }
    println!(
        "{} KiB usable, image ends at {:#x}",
        usable >> 10,
        platform::image_end()
    );
    // SAFETY: the breakpoint handler counts and returns.
    unsafe { asm!("int3") };
    traps::BREAKPOINTS.load(Ordering::Relaxed) == 1 && usable > 0
}

/// Takes a real page fault on an address that nothing maps, and retries the access after the handler.
fn fault() -> bool {
    static SEEN: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    traps::on_page_fault(|address, error| {
        SEEN[0].store(address, Ordering::Relaxed);
        SEEN[1].store(error, Ordering::Relaxed);
        // SAFETY: switching a map on takes nothing away.
        unsafe { platform::identity_map(true) };
        true
    });
    let word = 0x5000 as *mut u64;
    // SAFETY: frame 5 is usable memory that nothing owns; the handler maps it before the store completes.
    let back = unsafe {
        word.write_volatile(0xfeed);
        platform::identity_map(false);
        platform::direct(0x5000).cast::<u64>().read_volatile()
    };
    let [address, error] = [&SEEN[0], &SEEN[1]].map(|word| word.load(Ordering::Relaxed));
    println!("page fault at {address:#x}, error {error:#x}, read back {back:#x}");
    (address, error, back) == (0x5000, 0x2, 0xfeed)
}

/// Starts every CPU and calls functions on all of them, from all of them at once.
fn smp(boot: &Boot) -> bool {
    // SAFETY: once, on the first CPU.
    let running = unsafe { smp::start(boot.cpus()) };
    smp::expect(running, boot.cpus());
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let all = smp::online();
    for _ in 0..100 {
        Machine
            .run_on(&all, &|_| {
                let inner = Machine.run_on(&all, &|_| {
                    COUNT.fetch_add(1, Ordering::Relaxed);
                });
                assert!(inner.is_ok());
            })
            .expect("every CPU answers");
    }
    let count = COUNT.load(Ordering::Relaxed);
    println!("{running} CPUs, {count} nested calls");
    count == 100 * u64::from(running * running)
}

/// Brings up memory and every CPU; gives how many frames are free when nothing is allocated.
fn start(boot: &Boot) -> u64 {
    // SAFETY: once, on the first CPU, with QEMU's own map.
    unsafe { memory::init(boot) }.expect("memory");
    // SAFETY: once, on the first CPU.
    smp::expect(unsafe { smp::start(boot.cpus()) }, boot.cpus());
    (1..boot.cpus()).for_each(|cpu| memory::cpu_online(CpuId::new(cpu)));
    let objects = HEAP.memory().slab().totals();
    memory::free_frames() + objects.slab_frames + objects.overhead_frames
}

/// Takes the object allocator down; whether as many frames are free as `start` said, and nothing was freed wrongly.
fn end(free: u64) -> bool {
    memory::free_frames();
    // SAFETY: no CPU is in a call, and nothing is allocated from now on.
    let objects = unsafe { HEAP.memory().slab().teardown_shared() };
    let leaked = free as i64 - memory::free_frames() as i64;
    let (zones, misuse) = (frames().check(), frames().misuse());
    println!("{leaked} frames leaked; objects: {objects:?}; zones: {zones:?}; misuse: {misuse:?}");
    leaked == 0 && objects.is_ok() && zones.is_ok() && misuse.is_none()
}

/// Boxes, queues and maps from kmem's slab on every CPU; all frames are back at the end.
fn heap(boot: &Boot) -> bool {
    let free = start(boot);
    static SUM: AtomicU64 = AtomicU64::new(0);
    smp::each(|cpu| {
        let mut kept: VecDeque<Box<[u64; 9]>> = VecDeque::new();
        let mut names = BTreeMap::new();
        for round in 0..2000u64 {
            kept.push_back(Box::new([round; 9]));
            names.insert(round % 97, format!("{cpu}:{round}"));
            if kept.len() > 100 {
                SUM.fetch_add(
                    kept.pop_front().map_or(0, |oldest| oldest[8]),
                    Ordering::Relaxed,
                );
            }
        }
        SUM.fetch_add(kept.iter().map(|kept| kept[0]).sum(), Ordering::Relaxed);
    });
    print!("{}{}{}", HEAP.meminfo(), HEAP.buddyinfo(), HEAP.slabinfo());
    let expected = u64::from(boot.cpus()) * (0..2000).sum::<u64>();
    SUM.load(Ordering::Relaxed) == expected && end(free)
}

/// Memory that is mapped page by page when it is touched: in two leaf tables, and few enough pages to stay in a TLB
/// (QEMU's begins with 256 entries).
const DEMAND: u64 = 0xffff_c000_001c_e000;
const DEMAND_PAGES: u64 = 100;

/// A kernel page table made by kmem, loaded on every CPU; real page faults fill it, a shootdown empties it.
fn paging(boot: &Boot) -> bool {
    let free = start(boot);
    let old = platform::current_root();

    static TABLE: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());
    static FAULTS: AtomicU64 = AtomicU64::new(0);
    fn table() -> &'static Table {
        // SAFETY: TABLE is set before the first fault and outlives the last one.
        unsafe { &*TABLE.load(Ordering::Acquire) }
    }
    TABLE.store(
        Box::into_raw(Box::new(memory::new_table())),
        Ordering::Release,
    );
    traps::on_page_fault(|address, error| {
        if address.wrapping_sub(DEMAND) >= DEMAND_PAGES << 12 || error & 1 != 0 {
            return false;
        }
        let page = Page::containing(VirtAddr::new(address));
        let Ok(frame) = frames().alloc(&FrameRequest::ONE.zeroed()) else {
            return false;
        };
        let mut cursor = table().cursor(PageRange::single(page)).expect("canonical");
        match cursor.map(page, KernelFrame::Owned(frame), Rights::KERNEL_DATA) {
            Ok(()) => FAULTS.fetch_add(1, Ordering::Relaxed),
            // Another CPU was first: the page is there.
            Err((MapError::Occupied, KernelFrame::Owned(frame))) => {
                frames().free(frame);
                0
            }
            Err(_) => return false,
        };
        true
    });
    // SAFETY: the table maps the image, the stacks in it and the direct map at the places where they are.
    smp::each(|_| unsafe { Machine.load_root(table().root(), false) });

    let word = |page: u64| (DEMAND + (page << 12)) as *mut u64;
    for round in 0..10 {
        let faults = FAULTS.load(Ordering::Relaxed);
        // Every CPU touches every page; what is new is zero, and all CPUs see one frame.
        smp::each(|_| {
            for page in 0..DEMAND_PAGES {
                // SAFETY: the fault handler maps memory there; all access is atomic.
                let word = unsafe { AtomicU64::from_ptr((DEMAND + (page << 12)) as *mut u64) };
                word.fetch_add(page + 1, Ordering::Relaxed);
            }
        });
        let new = FAULTS.load(Ordering::Relaxed) - faults;
        for page in 0..DEMAND_PAGES {
            // SAFETY: as above; the other CPUs wait.
            let found = unsafe { word(page).read() };
            assert_eq!(
                found,
                (page + 1) * u64::from(boot.cpus()),
                "page {page} in round {round}"
            );
        }
        println!(
            "round {round}: {new} pages faulted in by {} CPUs",
            boot.cpus()
        );
        assert_eq!(
            new, DEMAND_PAGES,
            "a stale translation kept a CPU from faulting"
        );
        let range = PageRange::with_count(Page::containing(VirtAddr::new(DEMAND)), DEMAND_PAGES)
            .expect("pages");
        unmap(table(), range);
    }

    // SAFETY: boot.s's table still maps the image and the direct map.
    smp::each(|_| unsafe {
        let boot = Frame::containing(PhysAddr::new(platform::boot_root()));
        Machine.load_root(
            Root {
                frame: boot,
                asid: Asid::ZERO,
            },
            false,
        );
    });
    assert_eq!(platform::current_root(), old);
    // SAFETY: no CPU uses the table any more; it came from a box.
    let table = unsafe { *Box::from_raw(TABLE.load(Ordering::Acquire)) };
    table.destroy(|_, frame| give(frame), |_, _| {});
    TableCache::shrink(&&MACHINE, usize::MAX);
    end(free)
}

fn give(frame: KernelFrame) {
    if let KernelFrame::Owned(frame) = frame {
        frames().free(frame);
    }
}

/// Unmaps a range, as many pages at a time as the gather holds.
fn unmap(table: &Table, range: PageRange) {
    let mut gather = table.gather::<64>();
    let mut left = range;
    loop {
        let mut cursor = table.cursor(left).expect("canonical");
        match cursor.unmap(left, &mut gather) {
            Ok(_) => break,
            Err(ChangeError::Full { next }) => {
                left = PageRange::new(next, range.last()).expect("pages are left")
            }
            Err(error) => panic!("unmap: {error}"),
        }
        drop(cursor);
        gather.commit(give);
    }
    gather.commit(give);
}

/// Resets the machine: with `-no-reboot` QEMU ends with status 0, which must not count as success.
fn triple_fault() -> ! {
    let none = [0u8; 10];
    // SAFETY: an empty IDT makes the next exception a shutdown, which is the purpose.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &none, options(noreturn)) }
}
