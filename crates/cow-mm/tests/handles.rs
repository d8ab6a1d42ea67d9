//! What callers keep from one call to the next, mappings, names and handles, may be of things that are gone by then.

mod common;

use common::{PAGE, Program, RW, World, signal};
use kmem_cow_mm::{
    Advice, DeviceMemory, Errno, Label, MapFlags, MapRequest, OpenFile, Prot, Signal,
};
use kmem_hal::FrameRange;
use kmem_paging::MemoryType;

const AT: u64 = 0x1000_0000;

#[test]
fn a_copy_of_a_mapping_outlives_its_file() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    let (_, open) = world.file(mm, &[1; 2 * PAGE as usize]);
    let request = MapRequest {
        address: AT,
        flags: MapFlags::PRIVATE | MapFlags::FIXED,
        file: Some(open),
        ..MapRequest::anonymous(2 * PAGE, RW)
    };
    program.space.mmap(&request).unwrap();
    assert_eq!(program.load(AT), Ok(0x0101_0101_0101_0101));
    let copy = program.space.vma_at(AT.into()).unwrap();
    assert_eq!(program.space.resident(&copy).pss_file(), 2 * PAGE);
    program.space.munmap(AT, 2 * PAGE).unwrap();
    assert!(mm.close(open.file));
    assert_eq!(mm.object_info(open.file).unwrap_err(), Errno::EBADF);
    // Other memory is at the object's place now, and says that it is shared memory.
    let shared = MapRequest {
        address: AT,
        flags: MapFlags::SHARED | MapFlags::ANONYMOUS | MapFlags::FIXED,
        ..MapRequest::anonymous(2 * PAGE, RW)
    };
    program.space.mmap(&shared).unwrap();
    program.store(AT, 1).unwrap();
    let resident = program.space.resident(&copy);
    assert_eq!((resident.rss, resident.pss_shmem()), (PAGE, 0));
    program.exit();
}

#[test]
fn a_special_mapping_has_no_name_that_a_program_gave() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    space.mmap(&MapRequest::anonymous(PAGE, RW).at(AT)).unwrap();
    space.set_anon_name(AT, PAGE, Some(b"x")).unwrap();
    let label = space.vma_at(AT.into()).unwrap().label;
    assert!(matches!(label, Label::Named(_)));
    space.set_anon_name(AT, PAGE, None).unwrap();
    let at = AT + 16 * PAGE;
    assert_eq!(
        space.map_special(at, PAGE, Prot::READ, label),
        Err(Errno::EINVAL)
    );
    assert_eq!(space.map_count(), 1);
    program.exit();
}

#[test]
fn mmap_looks_at_a_file_only_where_it_uses_one() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    let (_, open) = world.file(mm, &[1; PAGE as usize]);
    let (_, stale) = world.file(mm, &[1; PAGE as usize]);
    assert!(mm.close(stale.file));
    let with = |flags, file, pages, offset| {
        let request = MapRequest {
            flags,
            file: Some(file),
            offset,
            ..MapRequest::anonymous(pages * PAGE, RW)
        };
        program.space.mmap(&request).map(|_| ())
    };
    let private = MapFlags::PRIVATE | MapFlags::ANONYMOUS;
    let shared = MapFlags::SHARED | MapFlags::ANONYMOUS;
    // Without a file its offset means nothing.
    let last = PAGE.wrapping_neg();
    for flags in [private, shared] {
        assert_eq!(with(flags, stale, 1, 0), Ok(()));
        assert_eq!(with(flags, open, 2, last), Ok(()));
        assert_eq!(with(flags, stale, 1, 1), Err(Errno::EINVAL));
    }
    assert_eq!(with(MapFlags::SHARED, stale, 1, 0), Err(Errno::EBADF));
    assert_eq!(with(MapFlags::SHARED, stale, 1, 1), Err(Errno::EINVAL));
    // The last byte of a file is at 2^63 - 2 at most.
    for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
        let end = 1 << 63;
        assert_eq!(with(flags, open, 1, end - 2 * PAGE), Ok(()));
        for (pages, offset) in [(2, end - 2 * PAGE), (1, end - PAGE), (1, end), (1, last)] {
            assert_eq!(with(flags, open, pages, offset), Err(Errno::EOVERFLOW));
        }
    }
    program.exit();
}

#[test]
fn special_mappings_lie_in_user_space() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    let end = space.layout().task_size;
    for (at, pages) in [(end, 1), (end - PAGE, 2), (1 << 63, 1)] {
        assert_eq!(
            space.map_special(at, pages * PAGE, Prot::READ, Label::Vdso),
            Err(Errno::EINVAL)
        );
    }
    space
        .map_special(end - PAGE, PAGE, Prot::READ, Label::Vdso)
        .unwrap();
    program.exit();
}

/// What DONTNEED takes away of the kernel's own pages comes back as it was (Linux: the special mapping's fault handler).
#[test]
fn the_kernels_pages_of_a_program_are_never_emptied() {
    let program = Program::new(World::new().mm());
    let space = &program.space;
    space.map_special(AT, PAGE, RW, Label::Vdso).unwrap();
    program.store(AT, 7).unwrap();
    assert_eq!(space.madvise(AT, PAGE, Advice::DontNeed), Ok(()));
    assert_eq!(program.load(AT), Ok(7));
    // To Linux they are no anonymous memory, whatever they are made of.
    let free = space.madvise(AT, PAGE, Advice::Free);
    assert_eq!(free, Err(Errno::EINVAL));
    program.exit();
}

/// Frames that no entry can name: the same bus error whether there is a table already or not.
#[test]
fn a_device_beyond_all_entries_is_a_bus_error() {
    let world = World::new();
    let mm = world.mm();
    let program = Program::new(mm);
    let memory = DeviceMemory {
        frames: FrameRange::from_numbers(1 << 45, (1 << 45) + 2).unwrap(),
        memory_type: MemoryType::Uncached,
    };
    // SAFETY: nothing is there, and no entry leads there.
    let file = unsafe { mm.open_device(memory, "/dev/nothing", 1) }.unwrap();
    let open = OpenFile {
        file,
        readable: true,
        writable: true,
    };
    let request = MapRequest {
        address: AT,
        flags: MapFlags::SHARED | MapFlags::FIXED,
        file: Some(open),
        ..MapRequest::anonymous(2 * PAGE, RW)
    };
    program.space.mmap(&request).unwrap();
    assert_eq!(program.load(AT), Err(signal(Signal::BusError, AT)));
    let beside = MapRequest {
        address: AT + 2 * PAGE,
        flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED,
        ..MapRequest::anonymous(PAGE, RW)
    };
    program.space.mmap(&beside).unwrap();
    program.store(AT + 2 * PAGE, 1).unwrap();
    assert_eq!(program.load(AT), Err(signal(Signal::BusError, AT)));
    program.exit();
}
