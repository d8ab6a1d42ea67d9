//! Guard regions: MADV_GUARD_INSTALL and MADV_GUARD_REMOVE.

mod common;

use common::changing_file::ChangingFile;
use common::kept::keep;
use common::{PAGE, Program, RW, World, check_counters, signal};
use kmem_cow_mm::{Advice, Errno, MapFlags, MapRequest, OpenFile, Prot, RemapFlags, Signal};
use kmem_hal::{FaultCode, Page, VirtAddr};
use kmem_mock_x86::DiskImage;
use std::sync::atomic::{AtomicU64, Ordering};

const AT: u64 = 0x1000_0000;

fn is_guard(program: &Program, address: u64) -> bool {
    let page = Page::containing(VirtAddr::new(address));
    let entry = program.space.pagemap_entry(page);
    let faults = program.load(address) == Err(signal(Signal::MapError, address));
    assert_eq!(entry.is_guard(), faults, "{address:#x}");
    faults
}

fn guards(program: &Program, at: u64, pages: u64) -> Vec<u64> {
    (0..pages)
        .filter(|page| is_guard(program, at + page * PAGE))
        .collect()
}

#[test]
fn a_guard_region_faults_until_it_is_removed() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let program = Program::new(mm);
    let space = &program.space;
    space
        .mmap(&MapRequest::anonymous(8 * PAGE, RW).at(AT))
        .unwrap();
    for page in 0..8 {
        program.store(AT + page * PAGE, 10 + page).unwrap();
    }
    space
        .madvise(AT + 2 * PAGE, 2 * PAGE, Advice::GuardInstall)
        .unwrap();
    assert_eq!(guards(&program, AT, 8), [2, 3]);
    assert_eq!(space.map_count(), 1, "no mapping of its own");
    assert_eq!(space.recount().rss_anon, 6, "what it held is gone");
    let guard = AT + 2 * PAGE;
    let story = space
        .explain_fault(VirtAddr::new(guard), FaultCode::USER)
        .to_string();
    assert!(story.contains("MADV_GUARD_INSTALL"), "{story}");
    assert_eq!(
        program.store(guard, 1),
        Err(signal(Signal::MapError, guard))
    );
    assert_eq!(
        space.madvise(AT, 8 * PAGE, Advice::PopulateRead),
        Err(Errno::EFAULT)
    );
    assert_eq!(
        space.madvise(AT, 8 * PAGE, Advice::PopulateWrite),
        Err(Errno::EFAULT)
    );
    // Advice and rights come and go, the guards stay.
    space.madvise(AT, 8 * PAGE, Advice::Free).unwrap();
    assert_eq!(guards(&program, AT, 8), [2, 3]);
    space.madvise(AT, 8 * PAGE, Advice::DontNeed).unwrap();
    space.mprotect(AT, 8 * PAGE, Prot::READ).unwrap();
    space.mprotect(AT, 8 * PAGE, RW).unwrap();
    assert_eq!(guards(&program, AT, 8), [2, 3]);
    assert_eq!(program.load(AT + PAGE), Ok(0));
    let child = program.fork().unwrap();
    assert_eq!(guards(&child, AT, 8), [2, 3], "a child inherits them");
    child
        .space
        .madvise(AT, 8 * PAGE, Advice::GuardRemove)
        .unwrap();
    assert_eq!(guards(&child, AT, 8), []);
    assert_eq!(
        guards(&program, AT, 8),
        [2, 3],
        "and takes away its own alone"
    );
    child.exit();
    let to = AT + 0x100_0000;
    let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    space.mremap(AT, 8 * PAGE, 8 * PAGE, flags, to).unwrap();
    assert_eq!(guards(&program, to, 8), [2, 3], "they move along");
    assert_eq!(space.mlock(to, 8 * PAGE), Err(Errno::ENOMEM));
    assert_eq!(
        space.madvise(to, PAGE, Advice::GuardInstall),
        Err(Errno::EINVAL),
        "not in locked memory"
    );
    space.madvise(to, 8 * PAGE, Advice::GuardRemove).unwrap();
    assert_eq!(guards(&program, to, 8), []);
    program.store(to + 2 * PAGE, 5).unwrap();
    space.munlock(to, 8 * PAGE).unwrap();
    space.madvise(to, 8 * PAGE, Advice::GuardInstall).unwrap();
    space.munmap(to, 8 * PAGE).unwrap();
    space
        .mmap(&MapRequest::anonymous(8 * PAGE, RW).at(to))
        .unwrap();
    assert_eq!(guards(&program, to, 8), [], "they end with the mapping");
    check_counters([&program]);
    program.exit();
    assert_eq!(world.used_frames(), before);
}

#[test]
fn files_and_shared_memory_have_guards_too() {
    let world = World::new();
    let mm = world.mm();
    let (_, open) = world.file(mm, &[7; 4 * 4096]);
    let program = Program::new(mm);
    for (number, flags, file) in [
        (0, MapFlags::PRIVATE, Some(open)),
        (1, MapFlags::SHARED, Some(open)),
        (2, MapFlags::SHARED | MapFlags::ANONYMOUS, None),
    ] {
        let at = AT + number * 16 * PAGE;
        let request = MapRequest {
            address: at,
            flags: flags | MapFlags::FIXED,
            file,
            ..MapRequest::anonymous(4 * PAGE, RW)
        };
        program.space.mmap(&request).unwrap();
        let first = program.load(at).unwrap();
        program
            .space
            .madvise(at, PAGE, Advice::GuardInstall)
            .unwrap();
        assert_eq!(guards(&program, at, 4), [0]);
        let child = program.fork().unwrap();
        assert_eq!(guards(&child, at, 4), [0]);
        child.exit();
        program
            .space
            .madvise(at, PAGE, Advice::GuardRemove)
            .unwrap();
        assert_eq!(program.load(at), Ok(first), "the object is as it was");
    }
    program.exit();
    mm.close(open.file);
}

/// A file that ends where a guard region is takes its pages along, and not the guards.
#[test]
fn a_file_that_becomes_shorter_leaves_guards_where_they_are() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let provider: &'static ChangingFile = keep(Box::new(ChangingFile {
        image: DiskImage::from_bytes(world.machine, &[7; 8 * 4096]),
        size: AtomicU64::new(8 * PAGE),
    }));
    let open = OpenFile {
        file: mm.open_file(provider, "/data", 0).unwrap(),
        readable: true,
        writable: true,
    };
    let program = Program::new(mm);
    for (number, kind) in [(0, MapFlags::PRIVATE), (1, MapFlags::SHARED)] {
        let request = MapRequest {
            address: AT + number * 16 * PAGE,
            flags: kind | MapFlags::FIXED,
            file: Some(open),
            ..MapRequest::anonymous(8 * PAGE, RW)
        };
        let at = program.space.mmap(&request).unwrap().as_u64();
        for page in 0..8 {
            program.store(at + page * PAGE, page).unwrap();
        }
        let guard = at + 5 * PAGE;
        let install = Advice::GuardInstall;
        program.space.madvise(guard, PAGE, install).unwrap();
    }
    let child = program.fork().unwrap();
    provider.size.store(4 * PAGE, Ordering::SeqCst);
    mm.truncate_file(open.file).unwrap();
    for program in [&program, &child] {
        for at in [AT, AT + 16 * PAGE] {
            let beyond = at + 6 * PAGE;
            let refused = Err(signal(Signal::BusError, beyond));
            assert_eq!(program.load(beyond), refused);
            assert_eq!(guards(program, at, 6), [5]);
        }
        // The pages before the end, of both mappings.
        assert_eq!(program.space.recount().rss_anon, 4);
    }
    child.exit();
    program.exit();
    mm.close(open.file);
    assert_eq!(world.used_frames(), before);
}

/// A write to a guard region is a signal even where no frame is left for a page that it will not get.
#[test]
fn a_guard_region_needs_no_memory_to_say_no() {
    let world = World::new();
    let program = Program::new(world.mm());
    let start = program.map(2);
    program.store(start + PAGE, 1).unwrap();
    program
        .space
        .madvise(start, PAGE, Advice::GuardInstall)
        .unwrap();
    world.plan.fail_from(1);
    let refused = Err(signal(Signal::MapError, start));
    assert_eq!(program.store(start, 1), refused);
    world.plan.stop();
    program.exit();
}
