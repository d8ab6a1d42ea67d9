//! vmalloc on the mock machine: the kernel's accesses go through its MMU, which knows every missing flush.

use std::collections::BTreeMap;

use kmem_hal::{
    FrameRange, LargeSource, Mmu, PAGE_SIZE, Page, PageRange, PhysAddr, SingleGrace, Spin, VirtAddr,
};
use kmem_mock_x86::{FramePool, Machine};
use kmem_paging::format::X86_64;
use kmem_paging::{MemoryType, PageTable, Parts, TableCache};
use kmem_testkit::{FailPlan, Failing, HeapObjects, SlotArena};
use kmem_vma_tree::Node;
use kmem_vmalloc::{
    FixMap, FixMapError, KernelLayout, KernelPage, NotAnArea, Vmalloc, VmallocError,
};
use proptest::prelude::*;

type Frames<'m> = Failing<'m, FramePool<'m>>;
type Env<'m> =
    Parts<'m, &'m Machine, Frames<'m>, &'m Machine, SingleGrace, &'m Machine, &'m Machine>;
type Table<'m> = PageTable<X86_64, &'m Env<'m>, KernelPage>;
type Kernel<'m> = Vmalloc<'m, X86_64, &'m Env<'m>, &'m HeapObjects<Node>, Spin>;

/// Runs `test` on a machine of 32 MiB, in a table that both CPUs have loaded, and checks that nothing is left behind.
fn on_table(test: impl FnOnce(&Machine, &Table<'_>, &FailPlan)) {
    let machine = Machine::pc(32 << 20, 2);
    let slots =
        SlotArena::new(FrameRange::from_numbers(0, machine.memory().frame_limit()).unwrap());
    let plan = FailPlan::new();
    let frames = Failing::new(FramePool::new(&machine, 256), &plan);
    // SAFETY: one thread, and the parts belong to one machine.
    let env: Env<'_> = unsafe {
        Parts::new(
            &machine,
            frames,
            &machine,
            SingleGrace::new(),
            &machine,
            &slots,
        )
    }
    .with_trace(&machine);
    let table: Table<'_> = PageTable::new(&env).unwrap();
    let load = |root| {
        for cpu in 0..2 {
            // SAFETY: the mock's kernel code does not run in the tables.
            machine.on_cpu(cpu, || unsafe { machine.load_root(root, false) });
        }
    };
    load(table.root());
    test(&machine, &table, &plan);
    load(kmem_hal::Root {
        frame: kmem_hal::Frame::ZERO,
        asid: kmem_hal::Asid::ZERO,
    });
    table.destroy(|_, page| panic!("{page:?} was left mapped"), |_, _| {});
    TableCache::shrink(&env, usize::MAX);
    use kmem_paging::Env as _;
    assert_eq!(env.frames().inner().in_use(), 0, "frames leak");
}

/// Runs `test` with a window of `pages` pages, and checks that all of it comes back.
fn on_machine(pages: u64, test: impl FnOnce(&Machine, &Kernel<'_>, &FailPlan)) {
    on_table(|machine, table, plan| {
        let nodes = HeapObjects::new();
        let window = PageRange::with_count(KernelLayout::x86_64().vmalloc.first(), pages).unwrap();
        let vmalloc = Vmalloc::new(table, window, &nodes);
        test(machine, &vmalloc, plan);
        vmalloc.purge();
        assert_eq!(
            vmalloc.used(),
            (0, 0),
            "areas are left:\n{}",
            vmalloc.info()
        );
        drop(vmalloc);
        nodes.assert_all_free();
    });
}

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
    });
}

#[test]
fn a_batch_of_frees_is_one_shootdown() {
    on_machine(1024, |machine, vmalloc, _| {
        let areas: Vec<_> = (0..16)
            .map(|_| vmalloc.alloc(4 * PAGE_SIZE).unwrap())
            .collect();
        for at in &areas {
            for cpu in 0..2 {
                machine.cpu(cpu).write_u64(at.as_u64(), 1).unwrap();
            }
        }
        let before = machine.stats().interrupts;
        for at in areas {
            vmalloc.free(at).unwrap();
        }
        // Sixteen areas of four pages are one full batch.
        assert_eq!(machine.stats().interrupts - before, 1);
        // What comes now may be the old addresses with other frames: nobody may see the old ones.
        let again = vmalloc.alloc(4 * PAGE_SIZE).unwrap();
        machine.cpu(1).write_u64(again.as_u64(), 2).unwrap();
        vmalloc.free(again).unwrap();
    });
}

#[test]
fn a_failure_at_any_allocation_leaves_nothing() {
    on_machine(64, |_, vmalloc, plan| {
        for n in 1.. {
            plan.fail_at(n);
            let outcome = vmalloc.alloc(5 * PAGE_SIZE);
            plan.stop();
            match outcome {
                Ok(at) => {
                    assert!(n > 5);
                    vmalloc.free(at).unwrap();
                    break;
                }
                Err(error) => assert_eq!(error, VmallocError::Memory),
            }
            assert_eq!(vmalloc.used(), (0, 0));
        }
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
    });
}

#[test]
fn devices_are_mapped_where_they_are_and_freed_by_nobody() {
    on_machine(64, |_, vmalloc, _| {
        let at = vmalloc
            .ioremap(PhysAddr::new(0xfee0_0020), 0x1000, MemoryType::Uncached)
            .unwrap();
        assert_eq!(at.page_offset(), 0x20);
        let info = vmalloc.info().to_string();
        assert!(info.contains("phys=0x00000000fee00000 ioremap"), "{info}");
        vmalloc.free(at).unwrap();
        assert_eq!(vmalloc.info().to_string(), "");
    });
}

#[test]
fn fixed_pages_have_their_addresses_at_compile_time() {
    type Fixed<'a, 'm> = FixMap<'a, X86_64, &'m Env<'m>, 0xffff_ffff_ff60_0000, 4>;
    const APIC: VirtAddr = Fixed::address(1);
    on_table(|_, table, _| {
        let fixed = Fixed::new(table);
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Areas never overlap, hold what was written to them, and all room comes back.
    #[test]
    fn areas_are_the_models(ops in proptest::collection::vec((0..3u8, 1..9u64, any::<u16>()), 1..80)) {
        on_machine(96, |machine, vmalloc, _| {
            let mut model: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            for (step, (kind, pages, pick)) in ops.into_iter().enumerate() {
                if kind < 2 {
                    let Ok(at) = vmalloc.alloc(pages * PAGE_SIZE) else { continue };
                    let at = at.as_u64();
                    for (&other, &(length, _)) in &model {
                        assert!(at + (pages + 1) * PAGE_SIZE <= other || other + (length + 1) * PAGE_SIZE <= at);
                    }
                    for page in 0..pages {
                        machine.cpu(step % 2).write_u64(at + page * PAGE_SIZE, step as u64).unwrap();
                    }
                    model.insert(at, (pages, step as u64));
                } else if let Some((&at, _)) = model.iter().nth(usize::from(pick) % model.len().max(1)) {
                    let (pages, mark) = model.remove(&at).unwrap();
                    for page in 0..pages {
                        assert_eq!(machine.cpu(step % 2).read_u64(at + page * PAGE_SIZE), Ok(mark));
                    }
                    vmalloc.free(VirtAddr::new(at)).unwrap();
                }
                assert_eq!(vmalloc.used().0, model.len() as u64);
            }
            for at in model.into_keys() {
                vmalloc.free(VirtAddr::new(at)).unwrap();
            }
        });
    }
}
