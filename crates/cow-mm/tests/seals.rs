//! Sealed mappings (mseal), and those whose pages may go at any time (MAP_DROPPABLE): answers as recorded from Linux 6.18.

mod common;

use common::{PAGE, Program, RW, World, check_counters, signal};
use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    Advice, Errno, Label, Layout, LockAll, MapFlags, MapRequest, Prot, Reclaimer, RemapFlags,
    Signal, VmFlags,
};
use kmem_hal::{Access, VirtAddr};

const AT: u64 = 0x1000_0000;

/// What is mapped: first page and end from `AT` on, and whether it is sealed.
fn mapped(program: &Program) -> Vec<(u64, u64, bool)> {
    let mut found = Vec::new();
    program.space.for_each_vma(|vma| {
        let first = (vma.range.start().as_u64() - AT) / PAGE;
        let sealed = vma.flags.contains(VmFlags::SEALED);
        found.push((first, first + vma.range.count(), sealed));
        true
    });
    found
}

fn map(program: &Program, first: u64, pages: u64, prot: Prot) {
    let request = MapRequest::anonymous(pages * PAGE, prot);
    let made = program.space.mmap(&request.at(AT + first * PAGE));
    made.unwrap();
}

#[test]
fn what_is_sealed_stays_mapped_as_it_is() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let program = Program::new(mm);
    let space = &program.space;
    map(&program, 0, 4, RW);
    map(&program, 4, 4, Prot::READ);
    let sealed = AT + 4 * PAGE;
    assert_eq!(space.mseal(sealed, 4 * PAGE, 1), Err(Errno::EINVAL));
    assert_eq!(space.mseal(sealed + 1, PAGE, 0), Err(Errno::EINVAL));
    assert_eq!(space.mseal(sealed, u64::MAX, 0), Err(Errno::EINVAL));
    assert_eq!(space.mseal(sealed, 8 * PAGE, 0), Err(Errno::ENOMEM));
    assert_eq!(space.mseal(sealed, 0, 0), Ok(()));
    assert_eq!(mapped(&program), [(0, 4, false), (4, 8, false)]);
    assert_eq!(space.mseal(sealed, 4 * PAGE, 0), Ok(()));
    assert_eq!(space.mseal(sealed, 4 * PAGE, 0), Ok(()), "once more");
    let refused = Err(Errno::EPERM);
    assert_eq!(space.munmap(AT + 2 * PAGE, 4 * PAGE), refused);
    let cut = [(0, 2, false), (2, 4, false), (4, 8, true)];
    assert_eq!(mapped(&program), cut, "where the range begins");
    assert_eq!(space.munmap(sealed + PAGE, PAGE), refused);
    assert_eq!(mapped(&program), cut);
    let over = MapRequest::anonymous(2 * PAGE, RW).at(AT + 3 * PAGE);
    assert_eq!(space.mmap(&over).map(|_| ()), refused);
    for prot in [Prot::READ, RW] {
        assert_eq!(space.mprotect(sealed, PAGE, prot), refused);
    }
    assert_eq!(
        space.mprotect(AT + 3 * PAGE, 2 * PAGE, Prot::READ),
        refused,
        "and what is before it has changed"
    );
    let rights = space.vma_at(VirtAddr::new(AT + 3 * PAGE)).unwrap().flags;
    assert!(!rights.contains(VmFlags::WRITE));
    let may = RemapFlags::MAYMOVE;
    let to = AT + 0x100 * PAGE;
    for (old, new, flags, to) in [
        (4, 2, RemapFlags::empty(), 0),
        (4, 8, may, 0),
        (4, 4, RemapFlags::empty(), 0),
        (4, 4, may | RemapFlags::FIXED, to),
        (4, 8, may | RemapFlags::FIXED, to),
    ] {
        let moved = space.mremap(sealed, old * PAGE, new * PAGE, flags, to);
        assert_eq!(moved, Err(Errno::EPERM), "{old} to {new}");
    }
    let onto = space.mremap(AT, 2 * PAGE, 2 * PAGE, may | RemapFlags::FIXED, sealed);
    assert_eq!(onto, Err(Errno::EPERM));
    for advice in Advice::ALL {
        let discards = [
            Advice::DontNeed,
            Advice::DontNeedLocked,
            Advice::Free,
            Advice::Remove,
            Advice::DontFork,
            Advice::WipeOnFork,
            Advice::GuardInstall,
            // For want of a capability.
            Advice::HwPoison,
            Advice::SoftOffline,
        ];
        let outcome = space.madvise(sealed, PAGE, advice);
        assert_eq!(outcome == refused, discards.contains(&advice), "{advice:?}");
    }
    // What the kernel put there is none of the program's anonymous memory: the seal keeps nothing from it that it would not refuse anyway.
    let kernels = AT + 64 * PAGE;
    space
        .map_special(kernels, PAGE, Prot::READ | Prot::EXEC, Label::Vdso)
        .unwrap();
    space.mseal(kernels, PAGE, 0).unwrap();
    for (advice, outcome) in [
        (Advice::DontNeed, Ok(())),
        (Advice::DontNeedLocked, Ok(())),
        (Advice::DontFork, Ok(())),
        (Advice::WipeOnFork, Ok(())),
        (Advice::Free, Err(Errno::EINVAL)),
        (Advice::Remove, Err(Errno::EINVAL)),
        (Advice::GuardInstall, Err(Errno::EINVAL)),
    ] {
        assert_eq!(space.madvise(kernels, PAGE, advice), outcome, "{advice:?}");
    }
    space.mlock(sealed, PAGE).unwrap();
    space.munlock(sealed, PAGE).unwrap();
    // What the program may write it may throw away as well.
    map(&program, 32, 1, RW);
    program.store(AT + 32 * PAGE, 1).unwrap();
    space.mseal(AT + 32 * PAGE, PAGE, 0).unwrap();
    space
        .madvise(AT + 32 * PAGE, PAGE, Advice::DontNeed)
        .unwrap();
    assert_eq!(program.load(AT + 32 * PAGE), Ok(0));
    // A child has the seals.
    let child = program.fork().unwrap();
    assert_eq!(child.space.munmap(sealed, PAGE), refused);
    check_counters([&program, &child]);
    child.exit();
    program.exit();
    assert_eq!(world.used_frames(), before);
}

/// Maps a droppable page at a page from `AT` on, with these flags too.
fn droppable(program: &Program, flags: MapFlags) -> Result<u64, Errno> {
    let request = MapRequest {
        flags: MapFlags::DROPPABLE | MapFlags::ANONYMOUS | flags,
        ..MapRequest::anonymous(4 * PAGE, RW)
    };
    program.space.mmap(&request).map(VirtAddr::as_u64)
}

#[test]
fn a_droppable_mapping_is_what_linux_makes() {
    let world = World::new();
    let mm = world.mm();
    let (_, open) = world.file(mm, &[7; 4096]);
    let program = Program::new(mm);
    let space = &program.space;
    let committed = mm.committed();
    let start = droppable(&program, MapFlags::empty()).unwrap();
    assert_eq!(mm.committed(), committed, "nothing is promised");
    let smaps = space.smaps().to_string();
    assert!(
        smaps.contains("VmFlags: rd wr mr mw me nr wf dd dp "),
        "{smaps}"
    );
    for flags in [MapFlags::LOCKED, MapFlags::GROWSDOWN, MapFlags::HUGETLB] {
        assert_eq!(droppable(&program, flags), Err(Errno::EINVAL), "{flags:?}");
    }
    let of_a_file = MapRequest {
        flags: MapFlags::DROPPABLE,
        file: Some(open),
        ..MapRequest::anonymous(PAGE, RW)
    };
    assert_eq!(space.mmap(&of_a_file), Err(Errno::EINVAL));
    assert_eq!(space.mlock(start, PAGE), Ok(()), "and is not locked");
    for (advice, outcome) in [
        (Advice::KeepOnFork, Err(Errno::EINVAL)),
        (Advice::DoDump, Err(Errno::EINVAL)),
        (Advice::WipeOnFork, Ok(())),
        (Advice::DontDump, Ok(())),
        (Advice::Mergeable, Ok(())),
        (Advice::Free, Ok(())),
    ] {
        assert_eq!(space.madvise(start, PAGE, advice), outcome, "{advice:?}");
    }
    assert_eq!(space.map_count(), 1, "no advice changed anything");
    assert!(!space.smaps().to_string().contains(" lo "));
    program.exit();
    let narrow = Program::with_layout(mm, Layout::x86_32_legacy());
    let refused = Err(Errno::EOPNOTSUPP);
    assert_eq!(droppable(&narrow, MapFlags::empty()), refused);
    assert_eq!(narrow.space.mseal(AT, PAGE, 0), Err(Errno::ENOSYS));
    narrow.exit();
    assert!(mm.close(open.file));
}

#[test]
fn droppable_pages_go_without_a_copy_unless_somebody_holds_them() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let disk = world.disk(mm, 16);
    let program = Program::new(mm);
    let space = &program.space;
    let start = droppable(&program, MapFlags::empty()).unwrap();
    let kept = program.map(1);
    program.store(kept, 5).unwrap();
    for page in 0..4 {
        program.store(start + page * PAGE, 1 + page).unwrap();
    }
    let child = program.fork().unwrap();
    assert_eq!(child.load(start), Ok(0), "a child has nothing of it");
    child.exit();
    let pin = space.pin(VirtAddr::new(start), Access::Read).unwrap();
    Reclaimer::new(Fifo).reclaim(mm, 16);
    while mm.poll_swap().is_some() {}
    assert_eq!(disk.transfers().1, 1, "the other mapping's page alone");
    let words: Vec<_> = (0..4)
        .map(|page| program.load(start + page * PAGE))
        .collect();
    assert_eq!(words, [Ok(1), Ok(0), Ok(0), Ok(0)], "a pinned page stays");
    assert_eq!(program.load(kept), Ok(5));
    drop(pin);
    program.store(start + PAGE, 9).unwrap();
    space.madvise(start, 4 * PAGE, Advice::PageOut).unwrap();
    assert_eq!(program.load(start), Ok(0));
    assert_eq!(program.load(start + PAGE), Ok(0));
    assert_eq!(
        program.load(start + 4 * PAGE),
        Err(signal(Signal::MapError, start + 4 * PAGE))
    );
    // It is not locked with everything that is mapped from now on, though it is brought in as that is.
    space.mlockall(LockAll::FUTURE).unwrap();
    let locked = space.counters().locked;
    let start = droppable(&program, MapFlags::empty()).unwrap();
    assert_eq!(space.counters().locked, locked);
    assert!(program.frame_at(start).is_some());
    program.store(start, 3).unwrap();
    Reclaimer::new(Fifo).reclaim(mm, 16);
    assert_eq!(program.load(start), Ok(0));
    check_counters([&program]);
    program.exit();
    assert_eq!(world.used_frames(), before);
}
