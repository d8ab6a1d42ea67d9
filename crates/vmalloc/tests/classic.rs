//! The classic 32-bit split, on two-level and on PAE tables: 896 MiB of low memory, the rest reached page by page; and the same
//! questions asked of the 64-bit layout, which has no high memory.

mod common;

use std::cell::Cell;

use common::{Env, Low, Pae, Setup, Two, on_table, on_window};
use kmem_hal::{
    Cpu, CpuId, DeviceFrame, Frame, FrameRange, Mmu, Order, PAGE_SIZE, Page, PageRange, PhysAddr,
    PhysMap, Spin, VirtAddr, Wait,
};
use kmem_mock_x86::Machine;
use kmem_paging::format::{Aarch64, Format, X86_64};
use kmem_paging::{Attributes, Env as _, MapError, MemoryType, PageTable, Rights};
use kmem_vmalloc::{
    KernelLayout, KernelPage, KernelRegion, Kmap, KmapError, KmapSlot, LOCAL_DEPTH, LinearMapped,
    LocalMap, LocalSlots, adopt, map_linear,
};

/// 896 MiB in frames.
const LOW: u64 = 0x3_8000;

/// Nobody gives a page back while this test waits: waiting is a bug.
struct NeverWait;

impl Wait for NeverWait {
    fn wait_until(&self, _key: usize, done: &dyn Fn() -> bool) {
        assert!(done(), "waits for ever");
    }
    fn wake(&self, _key: usize) {}
}

/// Unmaps the linear map: its leaves own nothing.
fn unmap_all<F: Format>(table: &common::Table<'_, F>, pages: PageRange) {
    let mut cursor = table.cursor(pages).unwrap();
    let mut gather = table.gather::<32>();
    let mut rest = Some(pages);
    while let Some(range) = rest.take() {
        if let Err(kmem_paging::ChangeError::Full { next }) = cursor.unmap(range, &mut gather) {
            cursor.release();
            gather.commit(|page: KernelPage| {
                let _ = page;
            });
            rest = PageRange::new(next, range.last());
        }
    }
    drop(cursor);
    gather.commit(|page: KernelPage| {
        let _ = page;
    });
}

fn linear<F: Format>(setup: Setup, largest: Order, expected: LinearMapped) {
    on_table::<F>(setup, |machine, table, _| {
        let all = FrameRange::from_numbers(0, machine.memory().frame_limit()).unwrap();
        let layout = setup.layout;
        let mapped = map_linear(table, &layout, all, largest).unwrap();
        assert_eq!(mapped, expected);
        let cpu = machine.cpu(0);
        for physical in [0x48u64, 0x5008, (mapped.pages << 12) - 8] {
            let at = layout.va(PhysAddr::new(physical)).unwrap();
            assert_eq!(layout.pa(at), Some(PhysAddr::new(physical)));
            assert_eq!(layout.region(at), Some(KernelRegion::Linear));
            cpu.write_u64(at.as_u64(), physical ^ 0x55).unwrap();
            assert_eq!(machine.memory().load(physical, 8), Some(physical ^ 0x55));
            // Executing from it is what NX is for; the two-level format has none.
            assert_eq!(cpu.fetch(at.as_u64()).is_err(), F::LEVELS.len() > 2);
        }
        if mapped.pages < all.count() {
            assert_eq!(layout.va(PhysAddr::new(mapped.pages << 12)), None);
        }
        let end = layout.linear.as_u64() + (mapped.pages << 12);
        assert!(cpu.read_u64(end).is_err(), "high memory is mapped");
        unmap_all(table, layout.linear_pages(all).unwrap());
    });
}

#[test]
fn low_memory_is_mapped_on_the_largest_leaves() {
    linear::<Two>(
        Setup::classic(),
        Order::HUGE_1G,
        LinearMapped {
            leaves: [0, 224, 0],
            pages: LOW,
        },
    );
    linear::<Pae>(
        Setup::pae(),
        Order::HUGE_1G,
        LinearMapped {
            leaves: [0, 448, 0],
            pages: LOW,
        },
    );
    linear::<X86_64>(
        Setup::long(),
        Order::HUGE_2M,
        LinearMapped {
            leaves: [0, 32, 0],
            pages: 1 << 14,
        },
    );
    let giant = Setup {
        memory: 3 << 30,
        ..Setup::long()
    };
    linear::<X86_64>(
        giant,
        Order::HUGE_1G,
        LinearMapped {
            leaves: [0, 0, 3],
            pages: 3 << 18,
        },
    );
}

#[test]
fn the_parts_of_a_layout_do_not_meet() {
    let layouts = [
        KernelLayout::x86_64(),
        KernelLayout::x86_64_la57(),
        KernelLayout::x86_32(),
        KernelLayout::x86_32_pae(),
    ];
    for layout in layouts {
        let linear = layout.linear_pages(layout.low_memory()).unwrap();
        let parts = [
            Some(linear),
            Some(layout.vmalloc),
            layout.modules,
            layout.kmap,
            layout.local,
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        for pair in parts.windows(2) {
            // At least a page lies between two parts, so that running off one does not reach the other.
            let ordered = pair[0].first() > pair[1].last() || pair[0].last() < pair[1].first();
            assert!(ordered, "{layout:?}");
        }
        for part in &parts {
            assert!(part.last().start() < layout.fixmap_end);
            assert!(layout.region(part.start()).is_some());
        }
        assert!(layout.vmalloc.first().number() > linear.last().number() + 1);
        assert_eq!(layout.pa(VirtAddr::new(layout.linear.as_u64() - 1)), None);
    }
    assert_eq!(KernelLayout::x86_32().low_memory().count(), LOW);
    // With 896 MiB all memory is low; the last byte of it is the last of the linear map.
    let layout = KernelLayout::x86_32();
    assert_eq!(
        layout.va(PhysAddr::new((896 << 20) - 1)),
        Some(VirtAddr::new(0xf7ff_ffff))
    );
    assert_eq!(layout.va(PhysAddr::new(896 << 20)), None);
}

fn high_first<F: Format>(setup: Setup, has_high: bool) {
    on_window::<F>(setup.adversarial(7), 900, |machine, vmalloc, plan| {
        let at = vmalloc.alloc(20 * PAGE_SIZE).unwrap();
        let frame_at = |page: u64| {
            let page = Page::containing(VirtAddr::new(at.as_u64() + page * PAGE_SIZE));
            let leaf = vmalloc.table().query(page).leaf().unwrap();
            leaf.frame_of(page).unwrap().number()
        };
        for page in 0..20 {
            assert_eq!(frame_at(page) >= LOW, has_high, "page {page}");
            let address = at.as_u64() + page * PAGE_SIZE;
            machine
                .cpu(page as usize % 2)
                .write_u64(address, page)
                .unwrap();
        }
        for page in 0..20 {
            let address = at.as_u64() + page * PAGE_SIZE;
            assert_eq!(machine.cpu(1).read_u64(address), Ok(page));
        }
        // Everything else stays low: tables, the batch, what devices reach.
        let buffer = vmalloc
            .alloc_dma(PAGE_SIZE, kmem_vmalloc::DmaMask::ALL, Default::default())
            .unwrap();
        assert!(buffer.device.as_u64() < LOW << 12);
        vmalloc.free(buffer.address).unwrap();
        vmalloc.free(at).unwrap();
        vmalloc.purge();
        for n in 1.. {
            plan.fail_at(n);
            let before = plan.failed();
            let outcome = vmalloc.alloc(8 << 12);
            let failed = plan.failed() > before;
            plan.stop();
            match outcome {
                Ok(at) => vmalloc.free(at).unwrap(),
                Err(_) => assert_eq!(vmalloc.used(), (0, 0)),
            }
            if !failed {
                break;
            }
        }
    });
}

#[test]
fn vmalloc_takes_high_memory_first() {
    high_first::<Two>(Setup::classic(), true);
    high_first::<Pae>(Setup::pae(), true);
    high_first::<X86_64>(Setup::long(), false);
}

type Map<'k, 'm, F> = Kmap<'k, F, &'m Env<'m>, Spin, NeverWait>;

fn permanent<F: Format>(setup: Setup, frame: impl Fn(u64) -> Frame) {
    on_table::<F>(setup.adversarial(3), |machine, table, plan| {
        let base = setup.layout.kmap.unwrap_or(setup.layout.vmalloc).first();
        let pages = PageRange::with_count(base, 8).unwrap();
        let mut slots = [KmapSlot::VACANT; 8];
        // Making the window needs memory for its tables, and nothing else does.
        plan.fail_at(1);
        let refused = Map::<F>::new(table, pages, &mut slots, NeverWait);
        assert!(matches!(refused, Err(KmapError::Table(_))));
        drop(refused);
        plan.stop();
        let kmap: Map<'_, '_, F> = Kmap::new(table, pages, &mut slots, NeverWait).unwrap();
        plan.fail_from(1);
        let one = kmap.map(frame(0)).unwrap();
        assert_eq!(kmap.map(frame(0)), Ok(one));
        assert_eq!(kmap.lookup(frame(0)), Some((one, 2)));
        machine.cpu(0).write_u64(one.as_u64() + 8, 11).unwrap();
        let physical = frame(0).start().as_u64();
        assert_eq!(machine.memory().load(physical + 8, 8), Some(11));
        kmap.unmap(one).unwrap();
        assert_eq!(machine.cpu(1).read_u64(one.as_u64() + 8), Ok(11));
        kmap.unmap(one).unwrap();
        assert_eq!(kmap.unmap(one), Err(KmapError::NotMapped));
        assert_eq!(kmap.lookup(frame(0)), None);

        // 1000 frames through 8 pages: each is read where another was before, and a flush serves all idle pages at once.
        let before = machine.stats().interrupts;
        for n in 0..1000 {
            let at = kmap.map(frame(n)).unwrap().as_u64();
            machine.cpu(n as usize % 2).write_u64(at, n).unwrap();
            assert_eq!(machine.cpu(1).read_u64(at), Ok(n));
            kmap.unmap(VirtAddr::new(at)).unwrap();
        }
        let flushes = machine.stats().interrupts - before;
        assert!(flushes <= 1000 / 8, "{flushes} shootdowns");
        for n in 0..1000 {
            let physical = frame(n).start().as_u64();
            assert_eq!(machine.memory().load(physical, 8), Some(n));
        }
        // The same frame again and again costs none.
        let before = machine.stats().interrupts;
        for _ in 0..100 {
            let at = kmap.map(frame(1)).unwrap();
            kmap.unmap(at).unwrap();
        }
        assert!(machine.stats().interrupts - before <= 1);

        let held: Vec<_> = (0..8).map(|n| kmap.map(frame(n)).unwrap()).collect();
        assert_eq!(kmap.try_map(frame(8)), Err(KmapError::WouldWait));
        assert_eq!(kmap.try_map(frame(3)), Ok(held[3]));
        kmap.unmap(held[3]).unwrap();
        for at in held {
            kmap.unmap(at).unwrap();
        }
        kmap.flush();
        // A flushed page faults, on each CPU.
        assert!(machine.cpu(0).read_u64(one.as_u64()).is_err());
        assert!(machine.cpu(1).read_u64(one.as_u64()).is_err());
        plan.stop();
        drop(kmap);
        let mut few = [KmapSlot::VACANT; 7];
        let bad = Map::<F>::new(table, pages, &mut few, NeverWait);
        assert!(matches!(bad, Err(KmapError::BadWindow)));
    });
}

#[test]
fn permanent_mappings_are_shared_and_flushed_together() {
    permanent::<Two>(Setup::classic(), |n| Frame::from_number(LOW + 5 + n));
    // Above 4 GiB, where only PAE tables reach.
    permanent::<Pae>(Setup::pae(), |n| Frame::from_number((1 << 20) + 3 * n));
    permanent::<X86_64>(Setup::long(), |n| Frame::from_number(0x2000 + n));
}

/// Somebody else gives a page back while the caller waits for one.
struct GivesBack {
    give: Cell<Option<&'static dyn Fn()>>,
}

impl Wait for &GivesBack {
    fn wait_until(&self, _key: usize, done: &dyn Fn() -> bool) {
        while !done() {
            let give = self.give.take().expect("nobody gives a page back");
            give();
        }
    }
    fn wake(&self, _key: usize) {}
}

/// Frames of one hash share a chain: what leaves it from its middle is found no more, and the others are.
#[test]
fn mappings_leave_the_chain_of_their_hash_one_by_one() {
    let setup = Setup::classic();
    on_table::<Two>(setup, |_, table, _| {
        let pages = PageRange::with_count(setup.layout.kmap.unwrap().first(), 8).unwrap();
        let mut slots = [KmapSlot::VACANT; 8];
        let kmap: Map<'_, '_, Two> = Kmap::new(table, pages, &mut slots, NeverWait).unwrap();
        for round in 0..64 {
            let frames = [0, 1, 2, 3, 4, 5, 6, 7].map(|n| Frame::from_number(round * 8 + n));
            let mut at = frames.map(|frame| kmap.try_map(frame).unwrap());
            for n in (0..8).step_by(2) {
                kmap.unmap(at[n]).unwrap();
            }
            kmap.flush();
            for n in 0..8 {
                let seen = (n % 2 == 1).then_some((at[n], 1));
                assert_eq!(kmap.lookup(frames[n]), seen);
            }
            for n in (0..8).step_by(2) {
                at[n] = kmap.try_map(frames[n]).unwrap();
            }
            for n in 0..8 {
                assert_eq!(kmap.lookup(frames[n]), Some((at[n], 1)));
                kmap.unmap(at[n]).unwrap();
            }
            kmap.flush();
        }
    });
}

#[test]
fn a_full_window_waits_for_a_user_to_go() {
    on_table::<Two>(Setup::classic(), |machine, table, _| {
        let pages = PageRange::with_count(KernelLayout::x86_32().kmap.unwrap().first(), 1).unwrap();
        let mut slots = [KmapSlot::VACANT; 1];
        let wait = GivesBack {
            give: Cell::new(None),
        };
        let kmap: Kmap<'_, Two, _, Spin, _> = Kmap::new(table, pages, &mut slots, &wait).unwrap();
        let first = kmap.map(Frame::from_number(LOW)).unwrap();
        machine.cpu(0).write_u64(first.as_u64(), 1).unwrap();
        let give = || kmap.unmap(first).unwrap();
        let give: &dyn Fn() = &give;
        // SAFETY: it is called below, where `kmap` and `first` live, and never again.
        wait.give.set(Some(unsafe {
            core::mem::transmute::<&dyn Fn(), &'static dyn Fn()>(give)
        }));
        let second = kmap.map(Frame::from_number(LOW + 1)).unwrap();
        assert_eq!(first, second, "there is one page");
        assert_eq!(
            machine.cpu(0).read_u64(second.as_u64()),
            Ok(0),
            "the old frame is seen"
        );
        kmap.unmap(second).unwrap();
    });
}

type Local<'m, F> = LocalMap<'m, F, Low<'m>, &'m Machine, &'m Machine>;

fn temporary<F: Format>(setup: Setup, high: u64) {
    on_table::<F>(setup.adversarial(5), |machine, table, plan| {
        let slots = [LocalSlots::new(), LocalSlots::new()];
        let local: Local<'_, F> = LocalMap::new(*table.env().map(), machine, machine, &slots);
        let frame = |n: u64| Frame::from_number(high + n);
        assert_eq!(
            local.map_temporary(frame(0)),
            None,
            "there is no window yet"
        );
        let first = setup.layout.local.unwrap_or(setup.layout.vmalloc).first();
        plan.fail_at(1);
        assert!(local.init(table, first).is_err());
        plan.stop();
        local.init(table, first).unwrap();
        plan.fail_from(1);
        let pin = local.cpu().pin();
        let before = machine.stats().interrupts;
        for round in 0..50 {
            // A call, an interrupt in it, an NMI in that: each has its own page.
            let outer = local.map(&pin, frame(round)).unwrap();
            machine
                .cpu(0)
                .write_u64(outer.address().as_u64(), round)
                .unwrap();
            {
                let inner = local.map(&pin, frame(round + 100)).unwrap();
                assert_ne!(inner.address(), outer.address());
                machine
                    .cpu(0)
                    .write_u64(inner.address().as_u64(), round + 1)
                    .unwrap();
                let nmi = local.map(&pin, frame(round)).unwrap();
                assert_eq!(machine.cpu(0).read_u64(nmi.address().as_u64()), Ok(round));
            }
            assert_eq!(machine.cpu(0).read_u64(outer.address().as_u64()), Ok(round));
        }
        for round in 0..50 {
            let at = frame(round + 100).start().as_u64();
            assert_eq!(machine.memory().load(at, 8), Some(round + 1));
        }
        assert_eq!(machine.stats().interrupts, before, "no other CPU is asked");
        // What ended faults.
        let gone = local.map(&pin, frame(0)).unwrap().address();
        assert!(machine.cpu(0).read_u64(gone.as_u64()).is_err());
        let all: Vec<_> = (0..u64::from(LOCAL_DEPTH))
            .map(|n| local.map(&pin, frame(n)).unwrap())
            .collect();
        assert!(
            local.map(&pin, frame(0)).is_none(),
            "the CPU has no page left"
        );
        assert_eq!(slots[0].in_use(), LOCAL_DEPTH);
        // The other CPU has its own.
        machine.on_cpu(1, || {
            let pin = local.cpu().pin();
            assert_eq!(pin.id(), CpuId::new(1));
            let page = local.map(&pin, frame(9)).unwrap();
            machine
                .cpu(1)
                .write_u64(page.address().as_u64(), 99)
                .unwrap();
            assert!(all.iter().all(|other| other.address() != page.address()));
        });
        drop(all);
        assert_eq!((slots[0].in_use(), slots[1].in_use()), (0, 0));
        // As a `PhysMap`: low memory where it is, high memory through the window.
        let low = local.map_temporary(Frame::from_number(300)).unwrap();
        assert_eq!(low.as_ptr(), local.to_ptr(PhysAddr::new(300 << 12)));
        // SAFETY: from `map_temporary`.
        unsafe { local.unmap_temporary(low) };
        if high >= LOW {
            let window = local.map_temporary(frame(0)).unwrap();
            assert_eq!(VirtAddr::from_ptr(window.as_ptr()), first.start());
            assert_eq!(slots[0].in_use(), 1);
            // SAFETY: from `map_temporary`.
            unsafe { local.unmap_temporary(window) };
            assert_eq!(slots[0].in_use(), 0);
        }
        plan.stop();
        local.retire(table);
    });
}

#[test]
fn temporary_mappings_nest_and_ask_nobody() {
    temporary::<Two>(Setup::classic(), LOW);
    temporary::<Pae>(Setup::pae(), 1 << 20);
}

/// A boot loader's tables: an identity map on large leaves, the kernel's image on small ones, a frame buffer.
fn loader<F: Format>(table: &common::Table<'_, F>, kernel: u64) {
    let map = |page: u64, frame: u64, order: Order, attributes: Attributes| {
        let page = Page::from_number(page);
        let range = PageRange::with_count(page, order.frames()).unwrap();
        let block = DeviceFrame::new(Frame::from_number(frame), order).unwrap();
        let mut cursor = table.cursor(range).unwrap();
        assert!(
            cursor
                .map(page, KernelPage::borrowed(block), attributes)
                .is_ok()
        );
    };
    let huge = F::LEVELS[1].order();
    let data = Attributes::new(Rights::KERNEL_DATA).accessed().dirty();
    for block in 0..4 {
        map(block * huge.frames(), block * huge.frames(), huge, data);
    }
    for page in 0..5 {
        let rights = if page < 2 {
            Rights::READ | Rights::EXECUTE
        } else {
            Rights::KERNEL_DATA
        };
        map(
            kernel + page,
            0x700 + 2 * page,
            Order::ZERO,
            Attributes::new(rights),
        );
    }
    let registers = data.memory_type(MemoryType::Uncached);
    map(
        kernel + huge.frames() * 2,
        0xf_d000 & !(huge.frames() - 1),
        huge,
        registers,
    );
}

fn takes_over<F: Format>(setup: Setup, kernel: u64) {
    on_table::<F>(setup.adversarial(11), |machine, table, plan| {
        let theirs: common::Table<'_, F> = PageTable::new(*table.env()).unwrap();
        loader(&theirs, kernel);
        let lower = PageRange::with_count(Page::ZERO, 8 * F::LEVELS[1].order().frames()).unwrap();
        let upper = PageRange::with_count(Page::from_number(kernel), 4096).unwrap();
        let load = |root| {
            for cpu in 0..2 {
                // SAFETY: the mock's kernel code does not run in the tables.
                machine.on_cpu(cpu, || unsafe { machine.load_root(root, false) });
            }
        };
        load(theirs.root());
        let stack = (kernel + 3) << 12;
        machine.cpu(0).write_u64(stack + 8, 77).unwrap();
        let root = theirs.root().frame;
        // No memory for a table: nothing but the caller's own table is at stake.
        plan.fail_at(1);
        // SAFETY: live tables of this format, which nobody changes.
        let refused = unsafe { adopt(table, root, upper, |_, _, _| true) };
        plan.stop();
        assert!(matches!(refused, Err(MapError::Memory(_))));
        let mut seen = 0;
        // SAFETY: as above.
        let (leaves, pages) = unsafe {
            adopt(table, root, upper, |_, _, _| {
                seen += 1;
                true
            })
        }
        .unwrap();
        let huge = F::LEVELS[1].order().frames();
        assert_eq!((leaves, pages, seen), (6, 5 + huge, 6));
        // The identity map is left behind, one block of it excepted.
        // SAFETY: as above.
        let (leaves, _) = unsafe {
            adopt(table, root, lower, |page, frame, attributes| {
                assert_eq!(page.number(), frame.number());
                assert!(attributes.dirty);
                page.number() == huge
            })
        }
        .unwrap();
        assert_eq!(leaves, 1);
        load(table.root());
        assert_eq!(
            machine.cpu(0).read_u64(stack + 8),
            Ok(77),
            "the stack moved"
        );
        assert!(machine.cpu(1).fetch(kernel << 12).is_ok());
        assert!(machine.cpu(1).write_u64(kernel << 12, 0).is_err());
        assert!(machine.cpu(0).read_u64(0x1000).is_err());
        assert!(machine.cpu(0).read_u64((huge << 12) + 8).is_ok());
        for page in [kernel, kernel + 4, kernel + 2 * huge, huge] {
            let page = Page::from_number(page);
            let (old, new) = (
                theirs.query(page).leaf().unwrap(),
                table.query(page).leaf().unwrap(),
            );
            assert_eq!((old.frame, old.order), (new.frame, new.order));
            assert_eq!(old.attributes.rights, new.attributes.rights);
            assert_eq!(old.attributes.memory_type, new.attributes.memory_type);
        }
        // The boot loader's tables are free memory now; whoever still walked them would be caught.
        theirs.destroy(
            |_, page| {
                let _ = page;
            },
            |_, _| {},
        );
        assert_eq!(machine.cpu(0).read_u64(stack + 8), Ok(77));
        unmap_all(table, upper);
        unmap_all(table, lower);
    });
}

#[test]
fn a_boot_loaders_tables_are_taken_over() {
    takes_over::<X86_64>(Setup::long(), 0xf_ffff_fff8_0000);
    takes_over::<Two>(Setup::classic(), 0xc_0000);
    takes_over::<Pae>(Setup::pae(), 0xc_0000);
}

/// Takes over one page that a leaf gives user mode in full, below an entry of `level` from which bits were taken or to which some were added.
fn restricted<F: Format>(setup: Setup, level: usize, clear: u64, set: u64, expected: Rights) {
    on_table::<F>(setup, |machine, table, _| {
        let theirs: common::Table<'_, F> = PageTable::new(*table.env()).unwrap();
        let number = 0x1234;
        let page = Page::from_number(number);
        let single = PageRange::single(page);
        let rights = Rights::USER_DATA | Rights::EXECUTE;
        let block = DeviceFrame::new(Frame::from_number(0x700), Order::ZERO).unwrap();
        let mut cursor = theirs.cursor(single).unwrap();
        assert!(
            cursor
                .map(page, KernelPage::borrowed(block), rights)
                .is_ok()
        );
        drop(cursor);
        let bytes = size_of::<F::Word>() as u64;
        let mut frame = theirs.root().frame;
        for above in (level..=theirs.levels()).rev() {
            let shape = F::LEVELS[above - 1];
            let index = number >> shape.shift & (shape.entries() as u64 - 1);
            let at = frame.start().as_u64() + index * bytes;
            let word = machine.memory().load(at, bytes).unwrap();
            frame = F::table_frame(word);
            if above == level {
                assert!(machine.memory().store(at, bytes, word & !clear | set));
            }
        }
        // SAFETY: tables of this format, which nobody changes.
        let adopted = unsafe {
            adopt(table, theirs.root().frame, single, |_, _, attributes| {
                assert_eq!(attributes.rights, expected, "what is asked about");
                true
            })
        };
        assert_eq!(adopted, Ok((1, 1)));
        let leaf = table.query(page).leaf().unwrap();
        assert_eq!(leaf.attributes.rights, expected);
        unmap_all(&theirs, single);
        theirs.destroy(|_, page| panic!("{page:?}"), |_, _| {});
        unmap_all(table, single);
    });
}

#[test]
fn what_upper_entries_of_a_boot_loader_deny_stays_denied() {
    const WRITE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    const NO_EXECUTE: u64 = 1 << 63;
    let all = Rights::USER_DATA | Rights::EXECUTE;
    for level in 2..=4 {
        let run = |clear, set, expected| {
            restricted::<X86_64>(Setup::long(), level, clear, set, expected);
        };
        run(0, 0, all);
        run(WRITE, 0, all - Rights::WRITE);
        run(USER, 0, all - Rights::USER);
        run(USER, NO_EXECUTE, Rights::KERNEL_DATA);
    }
    restricted::<Pae>(Setup::pae(), 2, USER, NO_EXECUTE, Rights::KERNEL_DATA);
    // The four entries at the top of PAE tables say nothing of rights.
    restricted::<Pae>(Setup::pae(), 3, 0, 0, all);
    // AArch64: APTable, UXNTable, PXNTable. Code of the user's is not the kernel's.
    for level in 2..=4 {
        let run = |set, expected| {
            restricted::<Aarch64>(Setup::long(), level, 0, set, expected);
        };
        run(0, all);
        run(1 << 62, all - Rights::WRITE);
        run(1 << 61, Rights::KERNEL_DATA);
        run(1 << 60, Rights::USER_DATA);
        run(1 << 59, all);
        run(0xf << 59, Rights::READ);
        let kernel = Rights::READ | Rights::EXECUTE;
        for (bit, left) in [(59, Rights::READ), (60, kernel), (61, kernel), (62, kernel)] {
            let left = kernel.intersection(left);
            assert_eq!(Aarch64::rights_below(level, 1 << bit | 3, kernel), left);
        }
    }
    restricted::<Two>(
        Setup::classic(),
        2,
        WRITE | USER,
        0,
        Rights::READ | Rights::EXECUTE,
    );
}
