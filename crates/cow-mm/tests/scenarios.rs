//! What a program sees: mappings, faults, fork, files, stack, heap. One CPU, plain mock.

mod common;

use common::{PAGE, Program, RW, World, signal};
use kmem_cow_mm::{Advice, Errno, Image, MapFlags, MapRequest, Prot, RemapFlags, Signal};
use kmem_hal::VirtAddr;

#[test]
fn memory_is_zero_until_written_and_gone_when_unmapped() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let program = Program::new(mm);
    let at = program.map(8);
    assert_eq!(program.load(at + 3 * PAGE), Ok(0));
    assert_eq!(program.store(at + 3 * PAGE, 7), Ok(()));
    assert_eq!(program.load(at + 3 * PAGE), Ok(7));
    assert_eq!(program.space.recount().rss_anon, 1);
    program.space.munmap(at, 8 * PAGE).unwrap();
    assert_eq!(program.load(at), Err(signal(Signal::MapError, at)));
    program.exit();
    assert_eq!(world.used_frames(), before);
}

#[test]
fn fork_copies_on_write_in_both_directions() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let parent = Program::new(mm);
    let at = parent.map(3);
    for page in 0..3 {
        parent.store(at + page * PAGE, 100 + page).unwrap();
    }
    let child = parent.fork().unwrap();
    // The parent's own TLB held write rights a moment ago.
    parent.store(at, 1).unwrap();
    child.store(at + PAGE, 2).unwrap();
    assert_eq!((parent.load(at), child.load(at)), (Ok(1), Ok(100)));
    assert_eq!(
        (parent.load(at + PAGE), child.load(at + PAGE)),
        (Ok(101), Ok(2))
    );
    assert_eq!(
        parent.frame_at(at + 2 * PAGE),
        child.frame_at(at + 2 * PAGE)
    );
    let grandchild = child.fork().unwrap();
    grandchild.store(at + 2 * PAGE, 3).unwrap();
    assert_eq!(
        (parent.load(at + 2 * PAGE), child.load(at + 2 * PAGE)),
        (Ok(102), Ok(102))
    );
    child.exit();
    grandchild.exit();
    // Alone again: the page is reused, not copied.
    let frame = parent.frame_at(at + 2 * PAGE);
    parent.store(at + 2 * PAGE, 9).unwrap();
    assert_eq!(parent.frame_at(at + 2 * PAGE), frame);
    parent.exit();
    assert_eq!(world.used_frames(), before);
}

#[test]
fn protection_is_enforced_at_once() {
    let world = World::new();
    let program = Program::new(world.mm());
    let at = program.map(3);
    program.store(at + PAGE, 5).unwrap();
    program.space.mprotect(at + PAGE, PAGE, Prot::READ).unwrap();
    assert_eq!(program.space.map_count(), 3);
    assert_eq!(
        program.store(at + PAGE, 6),
        Err(signal(Signal::AccessError, at + PAGE))
    );
    assert_eq!(program.load(at + PAGE), Ok(5));
    program
        .space
        .mprotect(at + PAGE, PAGE, Prot::empty())
        .unwrap();
    assert_eq!(
        program.load(at + PAGE),
        Err(signal(Signal::AccessError, at + PAGE))
    );
    program.space.mprotect(at + PAGE, PAGE, RW).unwrap();
    assert_eq!(program.space.map_count(), 1, "equal neighbours merge again");
    assert_eq!(program.load(at + PAGE), Ok(5));
    assert_eq!(
        program.execute(at + PAGE),
        Err(signal(Signal::AccessError, at + PAGE))
    );
    program.exit();
}

#[test]
fn shared_memory_is_shared_over_fork_and_private_files_are_not() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (image, open) = world.file(mm, &[0x11; 3 * 4096]);
    let parent = Program::new(mm);
    let flags = MapFlags::SHARED | MapFlags::ANONYMOUS;
    let shared = parent
        .space
        .mmap(&MapRequest {
            flags,
            ..MapRequest::anonymous(2 * PAGE, RW)
        })
        .unwrap()
        .as_u64();
    let private = MapRequest {
        flags: MapFlags::PRIVATE,
        file: Some(open),
        ..MapRequest::anonymous(4 * PAGE, RW)
    };
    let private = parent.space.mmap(&private).unwrap().as_u64();
    assert_eq!(parent.load(private + PAGE), Ok(0x1111_1111_1111_1111));
    parent.store(private + PAGE, 1).unwrap();
    let child = parent.fork().unwrap();
    child.store(shared, 77).unwrap();
    child.store(private + PAGE, 2).unwrap();
    assert_eq!(parent.load(shared), Ok(77));
    assert_eq!(
        (parent.load(private + PAGE), child.load(private + PAGE)),
        (Ok(1), Ok(2))
    );
    assert_eq!(
        parent.load(private + 3 * PAGE),
        Err(signal(Signal::BusError, private + 3 * PAGE))
    );
    child.exit();
    parent.exit();
    mm.close(open.file);
    assert_eq!(
        image.transfers().1,
        0,
        "a private mapping writes nothing back"
    );
    assert_eq!(world.used_frames(), before);
}

#[test]
fn msync_brings_shared_writes_to_the_file() {
    let world = World::new();
    let mm = world.mm();
    let (image, open) = world.file(mm, &[0; 2 * 4096]);
    let program = Program::new(mm);
    let map = MapRequest {
        flags: MapFlags::SHARED,
        file: Some(open),
        ..MapRequest::anonymous(2 * PAGE, RW)
    };
    let at = program.space.mmap(&map).unwrap().as_u64();
    assert_eq!(program.load(at), Ok(0));
    program.store(at + 8, 0x55).unwrap();
    program.space.msync(at, 2 * PAGE).unwrap();
    program.exit();
    mm.close(open.file);
    // A second object over the same image reads what the first wrote.
    let file = mm.open_file(image, "/bin/test", 42).unwrap();
    let again = Program::new(mm);
    let open = kmem_cow_mm::OpenFile {
        file,
        readable: true,
        writable: false,
    };
    let map = MapRequest {
        flags: MapFlags::PRIVATE,
        file: Some(open),
        ..MapRequest::anonymous(PAGE, Prot::READ)
    };
    let at = again.space.mmap(&map).unwrap().as_u64();
    assert_eq!(again.load(at + 8), Ok(0x55));
    again.exit();
    mm.close(file);
}

#[test]
fn mremap_moves_contents_and_dontneed_drops_them() {
    let world = World::new();
    let program = Program::new(world.mm());
    let space = &program.space;
    // Something above, so that there is no room to grow.
    space
        .mmap(&MapRequest::anonymous(PAGE, Prot::READ))
        .unwrap();
    let at = space
        .mmap(&MapRequest::anonymous(2 * PAGE, RW))
        .unwrap()
        .as_u64();
    program.store(at, 1).unwrap();
    program.store(at + PAGE, 2).unwrap();
    assert_eq!(
        space.mremap(at, 2 * PAGE, 4 * PAGE, RemapFlags::empty(), 0),
        Err(Errno::ENOMEM)
    );
    let moved = space
        .mremap(at, 2 * PAGE, 600 * PAGE, RemapFlags::MAYMOVE, 0)
        .unwrap();
    assert_ne!(moved, at);
    assert_eq!(
        (program.load(moved), program.load(moved + PAGE)),
        (Ok(1), Ok(2))
    );
    assert_eq!(program.load(at), Err(signal(Signal::MapError, at)));
    space.madvise(moved, PAGE, Advice::DontNeed).unwrap();
    assert_eq!(
        (program.load(moved), program.load(moved + PAGE)),
        (Ok(0), Ok(2))
    );
    program.exit();
}

/// What stays mapped after `DONTUNMAP` has no pages: if all of the mapping was moved it has no reverse map either, and merges with what was never
/// written (`dontunmap_complete`).
#[test]
fn a_mapping_whose_pages_were_all_moved_away_is_as_new() {
    let program = Program::new(World::new().mm());
    let flags = RemapFlags::MAYMOVE | RemapFlags::DONTUNMAP;
    for (moved, is_new) in [(2, true), (1, false)] {
        let old = program.map(2);
        program.store(old, 1).unwrap();
        let length = moved * PAGE;
        program.space.mremap(old, length, length, flags, 0).unwrap();
        let left = program.space.vma_at(VirtAddr::new(old)).unwrap();
        assert_eq!(left.anon.is_none(), is_new);
        assert_eq!(program.load(old), Ok(0));
    }
    program.exit();
}

#[test]
fn a_failed_call_changes_nothing() {
    let world = World::new();
    let mm = world.mm();
    let calls: [fn(&Program, u64) -> bool; 6] = [
        |p, at| p.space.mprotect(at + PAGE, PAGE, Prot::READ).is_ok(),
        |p, at| p.space.munmap(at + PAGE, PAGE).is_ok(),
        |p, at| {
            p.space
                .mremap(at, 4 * PAGE, 700 * PAGE, RemapFlags::MAYMOVE, 0)
                .is_ok()
        },
        |p, at| p.space.madvise(at + PAGE, PAGE, Advice::DontFork).is_ok(),
        |p, at| {
            p.space
                .mmap(&MapRequest::anonymous(PAGE, RW).at(at + 2 * PAGE))
                .is_ok()
        },
        |p, _| p.fork().map(Program::exit).is_ok(),
    ];
    for (index, call) in calls.iter().enumerate() {
        let before = world.used_frames();
        for fail_at in 0.. {
            let program = Program::new(mm);
            let at = program.map(4);
            for page in 0..4 {
                program.store(at + page * PAGE, 10 + page).unwrap();
            }
            let maps = program.space.maps().to_string();
            world.plan.fail_at(fail_at + 1);
            let done = call(&program, at);
            world.plan.stop();
            if done {
                program.exit();
                assert!(fail_at > 0, "call {index} allocates nothing");
                break;
            }
            assert_eq!(
                program.space.maps().to_string(),
                maps,
                "call {index}, failure {fail_at}"
            );
            for page in 0..4 {
                assert_eq!(
                    program.load(at + page * PAGE),
                    Ok(10 + page),
                    "call {index}, failure {fail_at}"
                );
            }
            program.exit();
        }
        assert_eq!(world.used_frames(), before, "call {index} leaks");
    }
}

#[test]
fn a_real_image_is_mapped_and_its_pages_are_the_files() {
    let world = World::new();
    let mm = world.mm();
    let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let (_, open) = world.file(mm, &bytes);
    let program = Program::new(mm);
    let image = Image {
        arguments: &[b"test", b"--one"],
        environment: &[b"HOME=/"],
        random: [7; 16],
        ..Image::new(open, b"/bin/test")
    };
    let start = loop {
        match program.space.exec(&image) {
            Err(kmem_cow_mm::ExecError::NeedIo(_)) => {}
            other => break other.unwrap(),
        }
    };
    let entry = start.entry.as_u64();
    assert!(program.execute(entry).is_ok());
    assert_eq!(program.load(start.stack.as_u64()), Ok(2), "argc");
    let first = program.load(start.stack.as_u64() + 8).unwrap();
    let mut name = [0; 4];
    program
        .space
        .read_memory(VirtAddr::new(first), &mut name)
        .unwrap();
    assert_eq!(&name, b"test");
    // The header is at the image's base, byte for byte.
    let mut header = [0; 64];
    program
        .space
        .read_memory(VirtAddr::new(start.bias), &mut header)
        .unwrap();
    assert_eq!(header[..], bytes[..64]);
    assert!(program.space.maps().to_string().contains("[stack]"));
    program.exit();
}

#[test]
fn every_space_has_the_kernels_half() {
    use kmem_cow_mm::{AddressSpace, Layout};
    use kmem_hal::{FrameRequest, FrameSource, OwnedFrame, PageRange};
    use kmem_paging::{PageTable, Rights, format::X86_64};

    let world = World::new();
    let mm = world.mm();
    let half = page(0xffff_8000_0000_0000);
    let kernel: PageTable<X86_64, _, OwnedFrame> =
        PageTable::new(kmem_cow_mm::Env::paging(world)).unwrap();
    assert!(
        AddressSpace::with_kernel(mm, Layout::x86_64(), &kernel, half).is_err(),
        "not lent yet"
    );
    kernel.lend_from(half).unwrap();
    let parent = AddressSpace::with_kernel(mm, Layout::x86_64(), &kernel, half).unwrap();
    let child = parent.fork().unwrap();
    // What the kernel maps later is everybody's.
    let at = page(0xffff_8000_1234_5000);
    let frames = kmem_paging::Env::frames(kmem_cow_mm::Env::paging(world));
    let frame = frames.alloc(&FrameRequest::ONE).unwrap();
    let number = frame.first();
    kernel
        .cursor(PageRange::single(at))
        .unwrap()
        .map(at, frame, Rights::KERNEL_DATA)
        .unwrap();
    for space in [&parent, &child] {
        assert_eq!(
            space.page_tables().query(at).leaf().map(|leaf| leaf.frame),
            Some(number)
        );
    }
    child.exit();
    parent.exit();
    assert!(
        kernel.query(at).leaf().is_some(),
        "a space's end takes nothing from the kernel"
    );
}

fn page(address: u64) -> kmem_hal::Page {
    kmem_hal::Page::containing(VirtAddr::new(address))
}

fn vm_flags(program: &Program, address: u64) -> String {
    let smaps = program.space.smaps().to_string();
    let from = smaps.find(&format!("{address:x}-")).unwrap();
    let line = smaps[from..]
        .lines()
        .find(|line| line.starts_with("VmFlags"));
    line.unwrap().to_string()
}

/// Linux 6.18: `mm/mmap.c` (`do_mmap`), `include/linux/mman.h` (`LEGACY_MAP_MASK`).
#[test]
fn flags_of_mmap_that_other_tests_do_not_name() {
    let world = World::new();
    let mm = world.mm();
    let (_, file) = world.file(mm, &[7; 2 * PAGE as usize]);
    let program = Program::new(mm);
    let space = &program.space;
    let map = |flags: u32, file| {
        space.mmap(&MapRequest {
            // So that FIXED_NOREPLACE finds one that may be and is free.
            address: if flags & MapFlags::FIXED_NOREPLACE.bits() != 0 {
                0x5000_0000
            } else {
                0
            },
            flags: MapFlags::from_bits_retain(flags),
            file,
            ..MapRequest::anonymous(2 * PAGE, Prot::READ | Prot::WRITE)
        })
    };
    let validate = MapFlags::SHARED_VALIDATE;
    let at = map(validate, Some(file)).unwrap().as_u64();
    program.store(at, 5).unwrap();
    let sync = 0x8_0000;
    for unknown in [sync, 0x100_0000, MapFlags::FIXED_NOREPLACE.bits()] {
        assert_eq!(map(validate | unknown, Some(file)), Err(Errno::EOPNOTSUPP));
    }
    let known = MapFlags::NORESERVE | MapFlags::STACK | MapFlags::DENYWRITE;
    assert!(map(validate | known.bits(), Some(file)).is_ok());
    let anonymous = MapFlags::ANONYMOUS.bits();
    assert_eq!(map(validate | anonymous, None), Err(Errno::EINVAL));
    let huge = MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::HUGETLB;
    assert_eq!(map(huge.bits(), None), Err(Errno::EINVAL));
    // Populating without waiting populates nothing, and a thread's stack gets no huge pages.
    let memory = MapFlags::PRIVATE | MapFlags::ANONYMOUS;
    let none = memory | MapFlags::POPULATE | MapFlags::NONBLOCK | MapFlags::STACK;
    let at = map(none.bits(), None).unwrap();
    assert_eq!(space.frame_at(page(at.as_u64())), None);
    assert!(vm_flags(&program, at.as_u64()).contains(" nh "));
    let all = map((memory | MapFlags::POPULATE).bits(), None).unwrap();
    assert!(space.frame_at(page(all.as_u64())).is_some());
    program.exit();
}

/// Linux 6.18: `mm/madvise.c`.
#[test]
fn advice_that_other_tests_do_not_name() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    let space = &program.space;
    let map = || space.mmap(&MapRequest::anonymous(4 * PAGE, Prot::READ | Prot::WRITE));
    let at = map().unwrap().as_u64();
    for (advice, there, gone) in [
        (Advice::Mergeable, "mg", ""),
        (Advice::Unmergeable, "", "mg"),
        (Advice::HugePage, "hg", "nh"),
        (Advice::NoHugePage, "nh", "hg"),
        (Advice::DontDump, "dd", ""),
        (Advice::DoDump, "", "dd"),
    ] {
        space.madvise(at, 4 * PAGE, advice).unwrap();
        let flags = vm_flags(&program, at);
        assert!(flags.contains(there), "{advice:?}: {flags}");
        assert!(
            gone.is_empty() || !flags.contains(gone),
            "{advice:?}: {flags}"
        );
    }
    assert_eq!(
        space.madvise(at, PAGE, Advice::Collapse),
        Err(Errno::EINVAL)
    );
    // Locked memory is emptied by the one advice and not by the other, and stays locked.
    program.store(at, 3).unwrap();
    space.mlock(at, 4 * PAGE).unwrap();
    assert_eq!(
        space.madvise(at, PAGE, Advice::DontNeed),
        Err(Errno::EINVAL)
    );
    assert_eq!(program.load(at), Ok(3));
    space.madvise(at, PAGE, Advice::DontNeedLocked).unwrap();
    assert_eq!((program.load(at), space.counters().locked), (Ok(0), 4));
    space.munlock(at, 4 * PAGE).unwrap();
    // Several ranges, of any process: what was done before the first that cannot be.
    program.store(at, 3).unwrap();
    program.store(at + 2 * PAGE, 4).unwrap();
    let hole = at - (1 << 30);
    let ranges = [
        (at, PAGE),
        (at + 2 * PAGE, PAGE),
        (hole, PAGE),
        (at + PAGE, PAGE),
    ];
    let done = space.madvise_ranges(&ranges, Advice::DontNeed);
    assert_eq!(done, Ok(2 * PAGE));
    assert_eq!(
        (program.load(at), program.load(at + 2 * PAGE)),
        (Ok(0), Ok(0))
    );
    let none = space.madvise_ranges(&ranges[2..], Advice::DontNeed);
    assert_eq!(none, Err(Errno::ENOMEM));
    program.exit();
}

/// As Linux 6.18: what an inherited mapping grows by joins the one behind it, to which nobody wrote yet.
#[test]
fn an_inherited_mapping_grows_up_to_its_neighbour_and_joins_it() {
    let parent = Program::new(World::new().mm());
    let at = 0x60_0000;
    let request = |pages| MapRequest::anonymous(pages * PAGE, RW);
    parent.space.mmap(&request(2).at(at)).unwrap();
    parent.store(at, 1).unwrap();
    let child = parent.fork().unwrap();
    let space = &child.space;
    space.mmap(&request(2).at(at + 4 * PAGE)).unwrap();
    let grown = space.mremap(at, 2 * PAGE, 4 * PAGE, RemapFlags::empty(), 0);
    assert_eq!((grown, space.map_count()), (Ok(at), 1));
    assert_eq!(child.load(at), Ok(1));
    child.exit();
    parent.exit();
}
