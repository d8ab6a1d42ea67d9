//! vmalloc on the mock machine: the kernel's accesses go through its MMU, which knows every missing flush.

mod common;

use common::{Env, Setup, on_machine, on_table, on_window};
use kmem_hal::{
    DeviceFrame, Frame, FrameRequest, FrameSink, FrameSource, LargeSource, Order, PAGE_SIZE, Page,
    PageRange, PhysAddr, Shrink, Spin, VirtAddr,
};
use kmem_mock_x86::{Adversary, Fault};
use kmem_paging::format::X86_64;
use kmem_paging::{Attributes, Env as _, MapError, MemoryType, Rights};
use kmem_testkit::HeapObjects;
use kmem_vmalloc::{
    AreaKind, BATCH, DmaMask, FixMap, FixMapError, KernelPage, NotAnArea, Request, StackCache,
    StackSlots, Vmalloc, VmallocError,
};

#[test]
fn memory_is_contiguous_and_its_ends_are_guarded() {
    on_machine(64, |machine, vmalloc, _| {
        let at = vmalloc.alloc(3 * PAGE_SIZE - 1).unwrap();
        let cpu = machine.cpu(0);
        for offset in [0, PAGE_SIZE, 3 * PAGE_SIZE - 8] {
            cpu.write_u64(at.as_u64() + offset, offset).unwrap();
        }
        assert_eq!(
            machine.cpu(1).read_u64(at.as_u64() + PAGE_SIZE),
            Ok(PAGE_SIZE)
        );
        assert!(
            cpu.read_u64(at.as_u64() + 3 * PAGE_SIZE).is_err(),
            "the guard is mapped"
        );
        assert_eq!(
            vmalloc.bytes_at(VirtAddr::new(at.as_u64() + PAGE_SIZE)),
            Some(2 * PAGE_SIZE)
        );
        let top = vmalloc.alloc_stack(2).unwrap().as_u64();
        cpu.write_u64(top - 8, 1).unwrap();
        cpu.write_u64(top - 2 * PAGE_SIZE, 1).unwrap();
        assert!(
            cpu.write_u64(top - 2 * PAGE_SIZE - 8, 1).is_err(),
            "an overflow must fault"
        );
        vmalloc.free_stack(VirtAddr::new(top), 2).unwrap();
        vmalloc.free(at).unwrap();
        assert_eq!(vmalloc.free(at), Err(NotAnArea(at)), "freed twice");
        let outside = VirtAddr::new(0xffff_ffff_8000_0000);
        assert_eq!(vmalloc.free(outside), Err(NotAnArea(outside)));
    });
}

#[test]
fn a_batch_of_frees_is_one_shootdown() {
    on_machine(1024, |machine, vmalloc, _| {
        let per = 4;
        // Two CPUs.
        assert_eq!(vmalloc.batch_leaves(), 96);
        assert!(vmalloc.batch_leaves() <= BATCH as u64);
        let areas: Vec<_> = (0..vmalloc.batch_leaves() / per)
            .map(|_| vmalloc.alloc(per * PAGE_SIZE).unwrap())
            .collect();
        for at in &areas {
            for cpu in 0..2 {
                machine.cpu(cpu).write_u64(at.as_u64(), 1).unwrap();
            }
        }
        let before = machine.stats().interrupts;
        let (last, rest) = areas.split_last().unwrap();
        for at in rest {
            vmalloc.free(*at).unwrap();
        }
        assert_eq!(machine.stats().interrupts, before, "they wait");
        vmalloc.free(*last).unwrap();
        assert_eq!(
            machine.stats().interrupts - before,
            1,
            "one batch, one shootdown"
        );
        // What comes now may be the old addresses with other frames: nobody may see the old ones.
        let again = vmalloc.alloc(4 * PAGE_SIZE).unwrap();
        machine.cpu(1).write_u64(again.as_u64(), 2).unwrap();
        vmalloc.free(again).unwrap();
        // A purge of what waits is one as well, and one with nothing to do is none.
        let before = machine.stats().interrupts;
        vmalloc.purge();
        vmalloc.purge();
        assert_eq!(machine.stats().interrupts - before, 1);
    });
}

#[test]
fn a_failure_at_any_allocation_leaves_nothing() {
    for (kind, pages) in [("alloc", 5), ("huge", 1030), ("dma", 3)] {
        for n in 1.. {
            let mut done = false;
            on_machine(4096, |_, vmalloc, plan| {
                plan.fail_at(n);
                let outcome = match kind {
                    "dma" => vmalloc
                        .alloc_dma(pages * PAGE_SIZE, DmaMask::ALL, MemoryType::WriteBack)
                        .map(|buffer| buffer.address),
                    _ => vmalloc.alloc(pages * PAGE_SIZE),
                };
                done = plan.failed() == 0;
                plan.stop();
                match outcome {
                    Ok(at) => vmalloc.free(at).unwrap(),
                    Err(error) => assert_eq!(error, VmallocError::Memory),
                }
                assert_eq!(vmalloc.used(), (0, 0));
            });
            if done {
                assert!(n > 3, "{kind} allocates in {n} places");
                break;
            }
        }
    }
}

#[test]
fn freeing_never_needs_memory() {
    on_machine(4096, |machine, vmalloc, plan| {
        let areas: Vec<_> = (0..100)
            .map(|_| vmalloc.alloc(PAGE_SIZE).unwrap())
            .collect();
        plan.fail_from(1);
        for at in areas {
            machine.cpu(1).write_u64(at.as_u64(), 3).unwrap();
            vmalloc.free(at).unwrap();
            assert_eq!(vmalloc.bytes_at(at), None);
        }
        vmalloc.purge();
        assert_eq!(vmalloc.used(), (0, 0));
        plan.stop();
    });
}

#[test]
fn the_window_is_used_up_and_comes_back() {
    on_machine(16, |_, vmalloc, _| {
        let one = vmalloc.alloc(7 * PAGE_SIZE).unwrap();
        let two = vmalloc.alloc(7 * PAGE_SIZE).unwrap();
        assert_eq!(vmalloc.alloc(PAGE_SIZE), Err(VmallocError::NoSpace));
        vmalloc.free(one).unwrap();
        // Lazily freed addresses are found when they are needed.
        let three = vmalloc.alloc(7 * PAGE_SIZE).unwrap();
        assert_eq!(three, one);
        vmalloc.free(two).unwrap();
        vmalloc.free(three).unwrap();
        assert_eq!(vmalloc.alloc(0), Err(VmallocError::BadSize));
        assert_eq!(vmalloc.alloc(u64::MAX), Err(VmallocError::BadSize));
        let odd = Request::new(1).aligned(3);
        assert_eq!(vmalloc.alloc_memory(odd), Err(VmallocError::BadSize));
        let user = Request::new(1).rights(Rights::USER_DATA);
        assert_eq!(vmalloc.alloc_memory(user), Err(VmallocError::BadRights));
        let both = Request::new(1).rights(Rights::KERNEL_DATA | Rights::EXECUTE);
        assert_eq!(vmalloc.alloc_memory(both), Err(VmallocError::BadRights));
    });
}

#[test]
fn devices_are_mapped_where_they_are_and_freed_by_nobody() {
    on_machine(2048, |_, vmalloc, _| {
        let at = vmalloc
            .ioremap(PhysAddr::new(0xfee0_0020), 0x1000, MemoryType::Uncached)
            .unwrap();
        assert_eq!(at.page_offset(), 0x20);
        // A frame buffer that begins 12 KiB into a 2 MiB block: a large leaf where there can be one.
        let buffer = vmalloc
            .ioremap(
                PhysAddr::new(0xe000_3000),
                4 << 20,
                MemoryType::WriteCombining,
            )
            .unwrap();
        let leaf = |offset: u64| {
            let page = Page::containing(VirtAddr::new(buffer.as_u64() + offset));
            let leaf = vmalloc.table().query(page).leaf().unwrap();
            (leaf.order, leaf.frame_of(page).unwrap().number())
        };
        assert_eq!(leaf(0), (Order::ZERO, 0xe_0003));
        assert_eq!(leaf((2 << 20) - 0x3000), (Order::HUGE_2M, 0xe_0200));
        assert_eq!(leaf((4 << 20) - 0x1000), (Order::ZERO, 0xe_0402));
        let info = vmalloc.info().to_string();
        let lines: Vec<_> = info.lines().collect();
        assert!(
            lines[0].starts_with("0xffffc90000000000-0xffffc90000003000   12288 ")
                && lines[0].ends_with(" phys=0x00000000fee00000 ioremap"),
            "{info}"
        );
        assert!(lines[0].contains("tests/window.rs:"), "{info}");
        assert!(
            lines[1].ends_with(" phys=0x00000000e0003000 ioremap"),
            "{info}"
        );
        vmalloc.free(at).unwrap();
        let info = vmalloc.info().to_string();
        assert!(
            info.starts_with("0xffffc90000000000-0xffffc90000003000   12288 unpurged vm_area\n"),
            "{info}"
        );
        vmalloc.free(buffer).unwrap();
        vmalloc.purge();
        assert_eq!(vmalloc.info().to_string(), "");
        // Firmware's tables lie in memory that has slots: their window closes at once.
        let table = vmalloc
            .ioremap(PhysAddr::new(0x9_f000), 64, MemoryType::WriteBack)
            .unwrap();
        vmalloc.free(table).unwrap();
        assert_eq!(vmalloc.info().to_string(), "");
    });
}

#[test]
fn large_areas_get_large_leaves_while_there_are_any() {
    on_machine(1 << 14, |machine, vmalloc, plan| {
        let at = vmalloc.alloc(5 << 20).unwrap();
        assert!(at.is_aligned(2 << 20));
        let order = |offset: u64| {
            let page = Page::containing(VirtAddr::new(at.as_u64() + offset));
            vmalloc.table().query(page).leaf().unwrap().order
        };
        assert_eq!(order(0), Order::HUGE_2M);
        assert_eq!(order(2 << 20), Order::HUGE_2M);
        assert_eq!(order(4 << 20), Order::ZERO);
        for offset in (0..5 << 20).step_by(4096) {
            machine
                .cpu(1)
                .write_u64(at.as_u64() + offset, offset)
                .unwrap();
        }
        vmalloc.free(at).unwrap();
        vmalloc.purge();
        // Nodes for the tree are there the second time.
        vmalloc.free(vmalloc.alloc(2 << 20).unwrap()).unwrap();
        vmalloc.purge();
        // No block, which is asked for first: single frames.
        plan.fail_at(1);
        let again = vmalloc.alloc(2 << 20).unwrap();
        plan.stop();
        let page = Page::containing(again);
        assert_eq!(
            vmalloc.table().query(page).leaf().unwrap().order,
            Order::ZERO
        );
        assert_eq!(vmalloc.bytes_at(again), Some(2 << 20));
        let small = vmalloc
            .alloc_memory(Request::bytes(2 << 20).small_leaves().zeroed())
            .unwrap();
        let page = Page::containing(small);
        assert_eq!(
            vmalloc.table().query(page).leaf().unwrap().order,
            Order::ZERO
        );
        assert_eq!(machine.cpu(0).read_u64(small.as_u64() + 0x1008), Ok(0));
        vmalloc.free(again).unwrap();
        vmalloc.free(small).unwrap();
    });
}

#[test]
fn a_batch_is_counted_in_leaves_of_every_size() {
    on_machine(1 << 14, |_, vmalloc, _| {
        assert_eq!(vmalloc.batch_leaves(), 96);
        // Two large leaves wait; one and a hundred small ones make a batch.
        let large = vmalloc.alloc(4 << 20).unwrap();
        vmalloc.free(large).unwrap();
        assert!(vmalloc.info().to_string().contains("unpurged"));
        let mixed = vmalloc.alloc((2 << 20) + 100 * 4096).unwrap();
        vmalloc.free(mixed).unwrap();
        assert_eq!(vmalloc.info().to_string(), "");
    });
}

#[test]
fn borrowed_frames_stay_their_owners() {
    on_machine(64, |machine, vmalloc, _| {
        let frames = vmalloc.table().env().frames();
        let owned: Vec<_> = (0..3)
            .map(|_| frames.alloc(&FrameRequest::ONE).unwrap())
            .collect();
        let mut numbers = owned.iter().rev().map(|frame| frame.first());
        let attributes = Attributes::new(Rights::READ);
        let at = vmalloc
            .vmap_borrowed(3, attributes, || numbers.next())
            .unwrap();
        assert!(machine.cpu(0).read_u64(at.as_u64()).is_ok());
        assert!(machine.cpu(1).read_u64(at.as_u64()).is_ok());
        assert!(machine.cpu(0).write_u64(at.as_u64(), 1).is_err());
        vmalloc.free(at).unwrap();
        // Unmapped and flushed everywhere before the call returned: the owner may free them.
        for frame in owned {
            frames.free(frame);
        }
        assert!(machine.cpu(1).read_u64(at.as_u64()).is_err());
        assert_eq!(
            vmalloc.vmap_borrowed(2, attributes, || None),
            Err(VmallocError::Memory)
        );
        // Owned ones go with the area.
        let mut given = (0..2).map(|_| frames.alloc(&FrameRequest::ONE).unwrap());
        let at = vmalloc.vmap(2, || given.next()).unwrap();
        vmalloc.free(at).unwrap();
    });
}

#[test]
fn module_memory_is_written_then_executed_never_both() {
    on_machine(64, |machine, vmalloc, _| {
        let code = vmalloc
            .alloc_memory(Request::new(2).of(AreaKind::Module))
            .unwrap();
        let cpu = machine.cpu(0);
        cpu.write_u64(code.as_u64(), 0xc3).unwrap();
        assert!(cpu.fetch(code.as_u64()).is_err());
        vmalloc
            .protect(code, Rights::READ | Rights::EXECUTE)
            .unwrap();
        assert_eq!(cpu.fetch(code.as_u64()), Ok(0xc3));
        assert!(matches!(
            machine.cpu(1).write_u64(code.as_u64() + PAGE_SIZE, 1),
            Err(Fault::Page { .. })
        ));
        assert_eq!(
            vmalloc.protect(code, Rights::KERNEL_DATA | Rights::EXECUTE),
            Err(VmallocError::BadRights)
        );
        let second = VirtAddr::new(code.as_u64() + PAGE_SIZE);
        assert_eq!(
            vmalloc.protect(second, Rights::READ),
            Err(VmallocError::NotAnArea)
        );
        assert!(
            vmalloc
                .info()
                .to_string()
                .trim_end()
                .ends_with(" pages=2 module")
        );
        vmalloc.free(code).unwrap();
    });
}

#[test]
fn dma_buffers_are_contiguous_and_in_reach_of_the_device() {
    on_machine(64, |machine, vmalloc, _| {
        let buffer = vmalloc
            .alloc_dma(5 * PAGE_SIZE, DmaMask::ISA, MemoryType::Uncached)
            .unwrap();
        assert!(buffer.device.as_u64() + buffer.bytes <= 1 << 24);
        assert_eq!(buffer.bytes, 5 * PAGE_SIZE);
        for page in 0..5 {
            let offset = page * PAGE_SIZE + 16;
            machine
                .cpu(0)
                .write_u64(buffer.address.as_u64() + offset, page + 7)
                .unwrap();
            let seen = machine.memory().load(buffer.device.as_u64() + offset, 8);
            assert_eq!(seen, Some(page + 7), "the device sees another page");
        }
        vmalloc.free(buffer.address).unwrap();
        let narrow = DmaMask::bits(12);
        assert_eq!(
            vmalloc.alloc_dma(PAGE_SIZE, narrow, MemoryType::WriteBack),
            Err(VmallocError::Memory)
        );
        assert_eq!(DmaMask::bits(64), DmaMask::ALL);
    });
}

#[test]
fn stacks_are_kept_and_given_back_under_pressure() {
    on_machine(256, |machine, vmalloc, _| {
        let mut slots: [StackSlots<2>; 2] = [StackSlots::new(), StackSlots::new()];
        let stacks = StackCache::new(vmalloc, machine, &mut slots, 4);
        let tops: Vec<_> = (0..3).map(|_| stacks.alloc().unwrap()).collect();
        let before = machine.stats().interrupts;
        for top in &tops {
            machine.cpu(0).write_u64(top.as_u64() - 8, 1).unwrap();
            stacks.free(*top).unwrap();
        }
        assert_eq!(stacks.count(), 2);
        assert_eq!(stacks.free(tops[0]), Err(NotAnArea(tops[0])), "freed twice");
        assert_eq!(stacks.free(tops[2]), Err(NotAnArea(tops[2])), "freed twice");
        let again = stacks.alloc().unwrap();
        assert_eq!(again, tops[0]);
        machine.cpu(0).write_u64(again.as_u64() - 8, 2).unwrap();
        assert!(
            machine
                .cpu(0)
                .write_u64(again.as_u64() - 4 * PAGE_SIZE - 8, 2)
                .is_err()
        );
        assert_eq!(
            machine.stats().interrupts,
            before,
            "the cache flushes nothing"
        );
        stacks.free(again).unwrap();
        // Another CPU has none of its own; one that goes offline leaves none.
        let other = machine.on_cpu(1, || stacks.alloc().unwrap());
        machine.on_cpu(1, || stacks.free(other)).unwrap();
        assert_eq!(stacks.count(), 3);
        assert_eq!(stacks.drain(kmem_hal::CpuId::new(1)), 1);
        assert_eq!(stacks.scan(usize::MAX), 2);
        assert_eq!(stacks.count(), 0);
        assert_eq!(vmalloc.used(), (0, 0));
    });
}

#[test]
fn only_whole_stacks_of_the_size_are_kept() {
    on_machine(256, |machine, vmalloc, _| {
        let mut slots: [StackSlots<2>; 2] = [StackSlots::new(), StackSlots::new()];
        let stacks = StackCache::new(vmalloc, machine, &mut slots, 4);
        let large = vmalloc.alloc_stack(8).unwrap();
        let memory = vmalloc.alloc(4 * PAGE_SIZE).unwrap();
        // It calls itself a stack, but nothing guards its bottom.
        let bare = Request::new(4).of(AreaKind::Stack);
        let bare = vmalloc.alloc_memory(bare).unwrap();
        let end = |at: VirtAddr| VirtAddr::new(at.as_u64() + 4 * PAGE_SIZE);
        for top in [large, end(memory), end(bare)] {
            assert_eq!(stacks.free(top), Err(NotAnArea(top)));
        }
        assert_eq!(stacks.count(), 0);
        // One that the cache did not give, but might have.
        let whole = vmalloc.alloc_stack(4).unwrap();
        let inside = VirtAddr::new(whole.as_u64() - 8);
        assert_eq!(stacks.free(inside), Err(NotAnArea(inside)));
        stacks.free(whole).unwrap();
        stacks.scan(1);
        vmalloc.free_stack(large, 8).unwrap();
        vmalloc.free(memory).unwrap();
        vmalloc.free(bare).unwrap();
    });
}

#[test]
fn a_stack_of_another_cpu_is_better_than_none() {
    on_machine(7, |machine, vmalloc, _| {
        let mut slots: [StackSlots<1>; 2] = [StackSlots::new(), StackSlots::new()];
        let stacks = StackCache::new(vmalloc, machine, &mut slots, 4);
        let top = stacks.alloc().unwrap();
        assert_eq!(stacks.alloc(), Err(VmallocError::NoSpace));
        stacks.free(top).unwrap();
        assert_eq!(machine.on_cpu(1, || stacks.alloc()), Ok(top));
        stacks.free(top).unwrap();
        stacks.scan(1);
    });
}

#[test]
fn fixed_pages_have_their_addresses_at_compile_time() {
    type Fixed<'a, 'm> = FixMap<'a, X86_64, &'m Env<'m>, 0xffff_ffff_ff60_0000, 4>;
    const APIC: VirtAddr = Fixed::address(1);
    on_table::<X86_64>(Setup::long(), |_, table, _| {
        let fixed = Fixed::new(table).unwrap();
        assert_eq!(
            fixed.set(1, PhysAddr::new(0xfee0_0000), MemoryType::Uncached),
            Ok(APIC)
        );
        let leaf = table.query(Page::containing(APIC)).leaf().unwrap();
        assert_eq!(leaf.attributes.memory_type, MemoryType::Uncached);
        assert_eq!(
            fixed.set(4, PhysAddr::new(0), MemoryType::WriteBack),
            Err(FixMapError::BadIndex)
        );
        assert_eq!(
            fixed.set(0, PhysAddr::new(1), MemoryType::WriteBack),
            Err(FixMapError::Misaligned)
        );
        fixed.clear(1).unwrap();
        assert!(table.query(Page::containing(APIC)).leaf().is_none());
    });
}

/// The tables of the fixed pages are there from the start and stay: setting and clearing need no memory and give none back.
#[test]
fn fixed_pages_need_no_memory_once_they_are_there() {
    type Fixed<'a, 'm> = FixMap<'a, X86_64, &'m Env<'m>, 0xffff_ffff_ff60_0000, 1>;
    on_table::<X86_64>(Setup::long(), |_, table, plan| {
        let page = Page::containing(Fixed::address(0));
        // Each of the tables may be the one that there is no frame for.
        let mut refused = 0;
        let fixed = loop {
            plan.fail_at(refused + 1);
            let made = Fixed::new(table);
            plan.stop();
            let Err(error) = made else {
                break made.unwrap();
            };
            assert!(matches!(error, FixMapError::Table(MapError::Memory(_))));
            assert_eq!(table.query(page), kmem_paging::Entry::Empty);
            refused += 1;
        };
        assert!(refused > 0, "no table was needed");
        assert!(Fixed::new(table).is_err(), "two fixmaps share a page");
        plan.fail_from(1);
        let calls = plan.calls();
        for round in 0..3u64 {
            let address = PhysAddr::new(0xfee0_0000 + round * PAGE_SIZE);
            let at = fixed.set(0, address, MemoryType::Uncached).unwrap();
            assert_eq!(table.translate(at), Some(address));
            fixed.clear(0).unwrap();
            fixed.clear(0).unwrap();
            assert_eq!(table.translate(at), None);
        }
        assert_eq!(plan.calls(), calls, "frames were asked for");
        plan.stop();
    });
}

/// A leaf that somebody else has in the window: an area that runs into it is refused, and it stays as it is.
#[test]
fn what_others_mapped_in_the_window_stays() {
    on_machine(16, |_, vmalloc, _| {
        let table = vmalloc.table();
        let page = Page::from_number(vmalloc.window().first().number() + 3);
        let frame = Frame::from_number(0xf_d000);
        let screen = || KernelPage::borrowed(DeviceFrame::new(frame, Order::ZERO).unwrap());
        let attributes = Attributes::new(Rights::KERNEL_DATA.union(Rights::GLOBAL));
        let single = PageRange::single(page);
        let mut cursor = table.cursor(single).unwrap();
        cursor.map(page, screen(), attributes).unwrap();
        drop(cursor);
        let occupied = VmallocError::Table(MapError::Occupied);
        for _ in 0..2 {
            assert_eq!(vmalloc.alloc(6 * PAGE_SIZE), Err(occupied));
            let frames =
                vmalloc.vmap_borrowed(6, attributes, || Some(Frame::from_number(0xf_e000)));
            assert_eq!(frames, Err(occupied));
            let registers = PhysAddr::new(0xfee0_0000);
            let mapped = vmalloc.ioremap(registers, 6 * PAGE_SIZE, MemoryType::Uncached);
            assert_eq!(mapped, Err(occupied));
            let leaf = table.query(page).leaf().expect("the other's leaf is gone");
            assert_eq!(leaf.frame, frame);
            for other in vmalloc.window().iter().filter(|&other| other != page) {
                assert!(table.query(other).leaf().is_none(), "{other:?} is left");
            }
        }
        let mut gather = table.gather::<1>();
        let mut cursor = table.cursor(single).unwrap();
        cursor.unmap(single, &mut gather).unwrap();
        drop(cursor);
        gather.commit(std::mem::forget);
    });
}

/// The last page of the space may be the guard of an area, whose end is then 2^64.
#[test]
fn an_area_at_the_top_of_the_space_is_printed() {
    on_table::<X86_64>(Setup::long(), |_, table, _| {
        let top = Page::containing(VirtAddr::new(u64::MAX));
        let window = PageRange::new(Page::from_number(top.number() - 3), top).unwrap();
        let vmalloc: Vmalloc<'_, _, _, _, Spin> = Vmalloc::new(table, window, HeapObjects::new());
        let at = vmalloc.alloc(3 * PAGE_SIZE).unwrap();
        let info = vmalloc.info().to_string();
        let start = "0xffffffffffffc000-0x10000000000000000   16384 ";
        assert!(info.starts_with(start), "{info}");
        vmalloc.free(at).unwrap();
        vmalloc.purge();
    });
}

#[test]
fn it_is_a_source_of_large_memory() {
    on_machine(64, |_, vmalloc, _| {
        let memory = vmalloc.alloc_large(10_000, 8192).unwrap();
        assert!(memory.addr().get().is_multiple_of(8192));
        assert_eq!(LargeSource::size_of(vmalloc, memory), Some(3 * 4096));
        assert!(vmalloc.contains(memory.as_ptr().wrapping_add(5000)));
        // SAFETY: it came from this source.
        unsafe { vmalloc.free_large(memory) };
        assert!(!vmalloc.contains(memory.as_ptr()));
    });
}

#[test]
fn the_adversary_finds_no_stale_use() {
    for seed in 0..4 {
        let setup = Setup {
            adversary: Adversary::FULL,
            seed,
            ..Setup::long()
        };
        on_window::<X86_64>(setup, 512, |machine, vmalloc, _| {
            let mut live = Vec::new();
            for step in 0..400u64 {
                if step % 3 < 2 {
                    let at = vmalloc.alloc((step % 5 + 1) * PAGE_SIZE).unwrap().as_u64();
                    machine.cpu(step as usize % 2).write_u64(at, step).unwrap();
                    live.push((at, step));
                }
                if step % 3 == 2 || live.len() > 40 {
                    let (at, mark) = live.swap_remove(step as usize * 7 % live.len());
                    assert_eq!(machine.cpu(1).read_u64(at), Ok(mark));
                    vmalloc.free(VirtAddr::new(at)).unwrap();
                }
            }
            for (at, mark) in live {
                assert_eq!(machine.cpu(0).read_u64(at), Ok(mark));
                vmalloc.free(VirtAddr::new(at)).unwrap();
            }
        });
    }
}
