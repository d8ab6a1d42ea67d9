//! Scenarios inside the kernel: boot, faults, CPUs, allocators, page tables, stacks.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use kmem::hal::{
    CpuCall, FrameRequest, FrameSink, FrameSource, OwnedFrame, Page, PageRange, VirtAddr,
};
use kmem::paging::{ChangeError, MapError, Rights};
use kmem::vmalloc::KernelPage;

use crate::layout::{self, direct};
use crate::memory::{self, HEAP, MACHINE, frames};
use crate::platform::{Machine, this_cpu};
use crate::pvh::Boot;
use crate::scenarios::{end, start};
use crate::{print, println, sched, smp, tlb, traps};

/// Prints the memory map, takes a breakpoint exception and returns from it.
pub fn hello(boot: &Boot) -> bool {
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
        "{} KiB usable, image ends at {:#x}, {} levels",
        usable >> 10,
        layout::image_end(),
        if layout::five_levels() { 5 } else { 4 }
    );
    println!("{:?}", tlb::describe());
    // SAFETY: the breakpoint handler counts and returns.
    unsafe { asm!("int3") };
    traps::BREAKPOINTS.load(Ordering::Relaxed) == 1 && usable > 0
}

/// Takes a real page fault on an address that nothing maps, and retries the access after the handler.
pub fn fault() -> bool {
    static SEEN: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    traps::on_page_fault(|address, error| {
        SEEN[0].store(address, Ordering::Relaxed);
        SEEN[1].store(error, Ordering::Relaxed);
        // SAFETY: switching a map on takes nothing away.
        unsafe { layout::identity_map(true) };
        true
    });
    let word = 0x5000 as *mut u64;
    // SAFETY: frame 5 is usable memory that nothing owns; the handler maps it before the store completes.
    let back = unsafe {
        word.write_volatile(0xfeed);
        layout::identity_map(false);
        direct(0x5000).cast::<u64>().read_volatile()
    };
    let [address, error] = [&SEEN[0], &SEEN[1]].map(|word| word.load(Ordering::Relaxed));
    println!("page fault at {address:#x}, error {error:#x}, read back {back:#x}");
    (address, error, back) == (0x5000, 0x2, 0xfeed)
}

/// Starts every CPU and calls functions on all of them, from all of them at once.
pub fn smp(boot: &Boot) -> bool {
    let baseline = start(boot);
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
    println!("{} CPUs, {count} nested calls", boot.cpus());
    end(baseline) && count == 100 * u64::from(boot.cpus().pow(2))
}

/// Boxes, queues and maps from kmem's slab on every CPU; all frames are back at the end.
pub fn heap(boot: &Boot) -> bool {
    let baseline = start(boot);
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
    end(baseline) && SUM.load(Ordering::Relaxed) == expected
}

/// Frames of many orders and objects of many sizes on every CPU, while the timer interrupt allocates too.
pub fn storm(boot: &Boot) -> bool {
    let baseline = start(boot);
    static INSIDE: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicU64 = AtomicU64::new(0);
    let ticks = traps::TICKS.load(Ordering::Relaxed);
    traps::on_timer(|| {
        let mark = 0x1234_5678 + INSIDE.fetch_add(1, Ordering::Relaxed);
        let mut objects: [Option<Box<[u64; 6]>>; 4] = [const { None }; 4];
        for object in &mut objects {
            *object = Box::try_new_in_interrupt([mark; 6]);
        }
        let frame = frames().alloc(&FrameRequest::ONE);
        for object in objects.into_iter().flatten() {
            if object.iter().any(|word| *word != mark) {
                WRONG.fetch_add(1, Ordering::Relaxed);
            }
        }
        if let Ok(frame) = frame {
            frames().free(frame);
        }
    });
    smp::each(|cpu| {
        let mut kept: VecDeque<(OwnedFrame, u64)> = VecDeque::with_capacity(65);
        let mut objects: VecDeque<Vec<u64>> = VecDeque::with_capacity(65);
        // On a busy host the timer may stay silent for longer than the rounds take.
        let goes_on = |round: &u64| *round < 4000 || INSIDE.load(Ordering::Relaxed) == 0;
        for round in (0_u64..).take_while(goes_on) {
            let order = kmem::Order::new((round * 7 % 11 % 5) as u8).expect("an order");
            let mark = round << 8 | u64::from(cpu.get());
            if let Ok(frame) = frames().alloc(&FrameRequest::new(order)) {
                // SAFETY: the frame is ours and in the direct map.
                unsafe {
                    direct(frame.first().start().as_u64())
                        .cast::<u64>()
                        .write(mark)
                };
                kept.push_back((frame, mark));
            }
            objects.push_back(alloc::vec![mark; (round * 13 % 200) as usize]);
            if round % 2 == 1 && objects.len() > 40 || objects.len() == 64 {
                let object = objects.pop_front().expect("not empty");
                if object
                    .iter()
                    .any(|word| word & 0xff != u64::from(cpu.get()))
                {
                    WRONG.fetch_add(1, Ordering::Relaxed);
                }
            }
            if kept.len() > 48 {
                let (frame, mark) = kept.pop_front().expect("not empty");
                // SAFETY: as above.
                let found = unsafe { direct(frame.first().start().as_u64()).cast::<u64>().read() };
                if found != mark {
                    WRONG.fetch_add(1, Ordering::Relaxed);
                }
                frames().free(frame);
            }
        }
        for (frame, _) in kept {
            frames().free(frame);
        }
    });
    traps::on_timer(|| {});
    let [wrong, inside] = [&WRONG, &INSIDE].map(|count| count.load(Ordering::Relaxed));
    println!("{inside} allocations inside interrupts, {wrong} wrong contents");
    let ticks = traps::TICKS.load(Ordering::Relaxed) - ticks;
    end(baseline) && wrong == 0 && inside > 0 && ticks > 0
}

/// A box for interrupts: `None` where there is no memory, instead of the end of the kernel.
trait TryBox<T> {
    fn try_new_in_interrupt(value: T) -> Option<Box<T>>;
}
impl<T> TryBox<T> for Box<T> {
    fn try_new_in_interrupt(value: T) -> Option<Self> {
        let layout = core::alloc::Layout::new::<T>();
        // SAFETY: not of size 0; a box of the global allocator is what it gives for the type's layout.
        unsafe {
            let memory = alloc::alloc::alloc(layout).cast::<T>();
            (!memory.is_null()).then(|| {
                memory.write(value);
                Self::from_raw(memory)
            })
        }
    }
}

/// Keeps data below the stack pointer, as the prebuilt core does, while interrupts arrive.
pub fn red_zone(boot: &Boot) -> bool {
    let baseline = start(boot);
    let ticks = traps::TICKS.load(Ordering::Relaxed);
    let mut lost = 0u64;
    while traps::TICKS.load(Ordering::Relaxed) < ticks + 20 {
        // SAFETY: a leaf's red zone, by the ABI: 128 bytes below rsp, which this image's own code does not use.
        unsafe {
            asm!(
                "mov rcx, 20000",
                "2: mov [rsp - 8], rcx",
                "mov [rsp - 128], rcx",
                "pause",
                "cmp [rsp - 8], rcx",
                "jne 3f",
                "cmp [rsp - 128], rcx",
                "je 4f",
                "3: inc {lost}",
                "4: dec rcx",
                "jnz 2b",
                lost = inout(reg) lost,
                out("rcx") _,
            );
        }
    }
    println!("{lost} times the red zone was overwritten");
    end(baseline) && lost == 0
}

/// Takes all memory, above 4 GiB too, writes to a block in eight, and reads it back.
pub fn all_memory(boot: &Boot) -> bool {
    let baseline = start(boot);
    let is_sample = |address: u64| address >> 22 & 7 == 5; // a host gives memory for what is touched, and takes its time
    let mut taken = Vec::with_capacity(8192);
    let mut above = 0u64;
    let request = FrameRequest::new(kmem::Order::new(10).expect("an order"));
    while let Ok(frame) = frames().alloc(&request) {
        let address = frame.first().start().as_u64();
        above += u64::from(address >= 4 << 30);
        if is_sample(address) {
            // SAFETY: the frames are ours and in the direct map.
            unsafe { direct(address + (3 << 20)).cast::<u64>().write(address) };
        }
        taken.push(frame);
        if taken.len() == taken.capacity() {
            break;
        }
    }
    let count = taken.len();
    let mut right = true;
    for frame in taken {
        let address = frame.first().start().as_u64();
        if is_sample(address) {
            // SAFETY: as above.
            right &= unsafe { direct(address + (3 << 20)).cast::<u64>().read() } == address;
        }
        frames().free(frame);
    }
    println!("{count} blocks of 4 MiB, {above} of them above 4 GiB");
    let has_high = boot
        .usable()
        .any(|entry| entry.base + entry.length > 5 << 30);
    end(baseline) && right && count > 0 && (above > 0) == has_high
}

/// Memory that is mapped page by page when it is touched: in two leaf tables, and few enough pages to stay in a TLB
/// (QEMU's begins with 256 entries).
const DEMAND: u64 = 0xffff_c000_001c_e000;
const DEMAND_PAGES: u64 = 100;

/// Real page faults fill a part of the kernel's table on every CPU, a shootdown empties it.
pub fn paging(boot: &Boot) -> bool {
    let baseline = start(boot);
    static FAULTS: AtomicU64 = AtomicU64::new(0);
    traps::on_page_fault(|address, error| {
        if address.wrapping_sub(DEMAND) >= DEMAND_PAGES << 12 || error & 1 != 0 {
            return false;
        }
        let page = Page::containing(VirtAddr::new(address));
        let Ok(frame) = frames().alloc(&FrameRequest::ONE.zeroed()) else {
            return false;
        };
        let owned = KernelPage::owned(frame, HEAP.memory().table()).expect("a slot");
        let mut cursor = memory::table()
            .cursor(PageRange::single(page))
            .expect("canonical");
        match cursor.map(page, owned, Rights::KERNEL_DATA) {
            Ok(()) => FAULTS.fetch_add(1, Ordering::Relaxed),
            // Another CPU was first: the page is there.
            Err((MapError::Occupied, owned)) => {
                give(owned);
                0
            }
            Err(_) => return false,
        };
        true
    });
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
        unmap(memory::pages(DEMAND, DEMAND_PAGES << 12));
    }
    end(baseline)
}

fn give(page: KernelPage) {
    page.release(HEAP.memory().table(), frames());
}

/// Unmaps a range of the kernel's table, as many pages at a time as the gather holds.
fn unmap(range: PageRange) {
    let table = memory::table();
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
    let _ = &MACHINE;
}

/// Runs off the end of a guarded kernel stack: the double fault that follows has a stack of its own, and knows the guard.
pub fn overflow(boot: &Boot) -> bool {
    start(boot);
    let pages = sched::STACK_PAGES;
    static TOP: AtomicU64 = AtomicU64::new(0);
    let top = memory::areas().alloc_stack(pages).expect("a stack");
    TOP.store(top.as_u64(), Ordering::Relaxed);
    traps::on_double_fault(|address, rsp| {
        let bottom = TOP.load(Ordering::Relaxed) - (sched::STACK_PAGES << 12);
        println!(
            "double fault on CPU {}: rsp {rsp:#x}, CR2 {address:#x}",
            this_cpu()
        );
        println!(
            "kernel stack {bottom:#x}..{:#x}, its guard page {:#x}..{bottom:#x}",
            TOP.load(Ordering::Relaxed),
            bottom - 4096
        );
        print!("{}", memory::areas().info());
        (bottom - 4096..bottom).contains(&address) && rsp.abs_diff(bottom) <= 4096
    });
    #[allow(unconditional_recursion)]
    extern "C" fn deeper(level: u64) -> u64 {
        let room = core::hint::black_box([level; 40]);
        deeper(level + 1) + core::hint::black_box(room[3])
    }
    // SAFETY: never returns: the recursion ends in the handler.
    unsafe {
        asm!("mov rsp, {}", "call {}", "ud2", in(reg) top.as_u64(), sym deeper,
            in("rdi") 0u64, options(noreturn));
    }
}

/// Resets the machine: with `-no-reboot` QEMU ends with status 0, which must not count as success.
pub fn triple_fault() -> ! {
    let none = [0u8; 10];
    // SAFETY: an empty IDT makes the next exception a shutdown, which is the purpose.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &none, options(noreturn)) }
}
