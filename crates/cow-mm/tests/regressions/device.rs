//! The list's part about device memory: frames that are nobody's pages, in programs' tables among those that are.

use std::sync::{Arc, Mutex};

use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    Advice, DeviceMemory, Errno, LockAll, MapFlags, MapRequest, Mm, OpenFile, Outcome, PinError,
    Prot, Reclaimer, RemapFlags, Signal, SyncFlags,
};
use kmem_hal::{
    Access, FaultCode, Frame, FrameRange, FrameRequest, FrameSink, FrameSource, Migrate,
    MigrateError, Page, PhysAddr, VirtAddr,
};
use kmem_mock_x86::Device;
use kmem_paging::{MemoryType, Rights};

use super::common::{PAGE, Program, RW, World, check_counters, signal};
use super::list::Regression;

const REGISTERS: u64 = 0xfe00_0000;
/// Video memory of the PC: in a section of the frame table, whose other frames are memory.
const VIDEO: u64 = 0xa_0000;
const PAGES: u64 = 24;

/// All of them.
pub const ALL: &[Regression] = &[
    (
        "accesses_reach_the_device_uncached",
        accesses_reach_the_device_uncached,
        &["device-memory-is-cached"],
    ),
    (
        "device_memory_is_nobodys_page",
        device_memory_is_nobodys_page,
        &["device-memory-is-pinned", "device-memory-is-resident"],
    ),
    (
        "device_memory_over_fork_and_in_shared_tables",
        device_memory_over_fork_and_in_shared_tables,
        &["device-memory-stops-a-copy"],
    ),
    (
        "calls_on_device_memory_answer_as_linux",
        calls_on_device_memory_answer_as_linux,
        &["device-memory-is-locked", "device-mapping-grows"],
    ),
    (
        "a_device_is_mapped_within_its_end_and_never_copied",
        a_device_is_mapped_within_its_end_and_never_copied,
        &["device-is-mapped-beyond-its-end", "device-memory-is-copied"],
    ),
];

/// Registers of 8 bytes, which remember what was written to them.
struct Registers(Arc<Mutex<Vec<u64>>>);

impl Device for Registers {
    fn read(&mut self, offset: u64, _bytes: u32) -> u64 {
        self.0.lock().unwrap()[offset as usize / 8]
    }

    fn write(&mut self, offset: u64, _bytes: u32, value: u64) {
        self.0.lock().unwrap()[offset as usize / 8] = value;
    }
}

/// A machine with a device of [`PAGES`] pages at `base`; what its registers hold, and the open device.
fn device(
    base: u64,
    memory_type: MemoryType,
) -> (
    &'static World,
    &'static Mm<'static, World>,
    Arc<Mutex<Vec<u64>>>,
    OpenFile,
) {
    let world = World::new();
    let mm = world.mm();
    let held = Arc::new(Mutex::new(vec![0; (PAGES * PAGE / 8) as usize]));
    let last = base + PAGES * PAGE - 1;
    world
        .machine
        .attach_memory(base, last, Registers(held.clone()));
    let memory = DeviceMemory {
        frames: FrameRange::inside(PhysAddr::new(base), PAGES * PAGE),
        memory_type,
    };
    // SAFETY: the device answers there and no memory does.
    let file = unsafe { mm.open_device(memory, "/dev/registers", 7) }.unwrap();
    let open = OpenFile {
        file,
        readable: true,
        writable: true,
    };
    (world, mm, held, open)
}

fn map(
    program: &Program,
    file: OpenFile,
    pages: u64,
    prot: Prot,
    flags: MapFlags,
) -> Result<u64, Errno> {
    let request = MapRequest {
        flags,
        file: Some(file),
        ..MapRequest::anonymous(pages * PAGE, prot)
    };
    program.space.mmap(&request).map(VirtAddr::as_u64)
}

fn page(address: u64) -> Page {
    Page::containing(VirtAddr::new(address))
}

/// Reads and writes reach the registers, the entries say how to cache them, and `smaps` says what the mapping is.
fn accesses_reach_the_device_uncached() {
    for (base, memory_type) in [
        (REGISTERS, MemoryType::Uncached),
        (VIDEO, MemoryType::WriteCombining),
    ] {
        let (world, mm, held, file) = device(base, memory_type);
        let before = world.used_frames();
        let program = Program::new(mm);
        let at = map(&program, file, PAGES, RW, MapFlags::SHARED).unwrap();
        held.lock().unwrap()[1] = 0x55;
        assert_eq!(program.load(at + 8), Ok(0x55));
        program.store(at + 3 * PAGE + 16, 0x77).unwrap();
        assert_eq!(held.lock().unwrap()[(3 * PAGE + 16) as usize / 8], 0x77);
        let leaf = program.space.page_tables().query(page(at)).leaf().unwrap();
        assert_eq!(leaf.attributes.memory_type, memory_type);
        assert_eq!(leaf.frame.start().as_u64(), base);
        // One fault mapped the neighbours, and none beyond what 16 pages cover.
        let present = |pages: u64| {
            (0..PAGES)
                .filter(|n| program.space.frame_at(page(at + n * PAGE)).is_some())
                .count() as u64
                >= pages
        };
        assert!(present(4) && !present(PAGES));
        // Less and more rights: the memory type stays, and so does what the registers hold.
        let space = &program.space;
        space.mprotect(at, PAGE, Prot::READ).unwrap();
        let refused = signal(Signal::AccessError, at);
        assert_eq!(program.store(at, 1), Err(refused));
        space.mprotect(at, PAGE, RW).unwrap();
        program.store(at, 0x99).unwrap();
        assert_eq!(held.lock().unwrap()[0], 0x99);
        let leaf = space.page_tables().query(page(at)).leaf().unwrap();
        assert_eq!(leaf.attributes.memory_type, memory_type);
        assert!(leaf.attributes.rights.contains(Rights::WRITE));
        let smaps = space.smaps().to_string();
        assert!(
            smaps.contains("VmFlags: rd wr sh mr mw me ms pf io de dd \n"),
            "{smaps}"
        );
        assert!(smaps.contains("/dev/registers"));
        program.exit();
        assert_eq!(world.used_frames(), before);
        assert!(mm.close(file.file));
    }
}

/// Not counted, not pinned, not read by the kernel, not moved, not reclaimed.
fn device_memory_is_nobodys_page() {
    let (world, mm, held, file) = device(REGISTERS, MemoryType::Uncached);
    world.disk(mm, 64);
    let program = Program::new(mm);
    let space = &program.space;
    let at = map(&program, file, PAGES, RW, MapFlags::SHARED).unwrap();
    program.store(at, 0x11).unwrap();
    let usage = space.recount();
    assert_eq!((usage.rss_anon, usage.rss_file, usage.rss_shmem), (0, 0, 0));
    assert_eq!(usage.total, PAGES);
    assert_eq!(space.resident_in_all().rss, 0);
    let word = space.pagemap_entry(page(at));
    let frame = Frame::containing(PhysAddr::new(REGISTERS));
    assert_eq!(word.frame(), Some(frame));
    assert!(!word.is_file() && !word.is_exclusive());
    for access in [Access::Read, Access::Write] {
        let address = VirtAddr::new(at);
        let refused = space.pin(address, access).map(|pin| pin.frame());
        assert_eq!(refused, Err(PinError::Fault(address)));
    }
    let mut bytes = [0; 8];
    assert!(space.read_memory(VirtAddr::new(at), &mut bytes).is_err());
    assert!(space.write_memory(VirtAddr::new(at), &bytes).is_err());
    assert_eq!(space.peek(VirtAddr::new(at), &mut bytes), None);
    let spare = world.frames().alloc(&FrameRequest::ONE).unwrap();
    let Err((error, spare)) = mm.migrate(frame, spare) else {
        panic!("a register is moved");
    };
    assert_eq!(error, MigrateError::NotMovable);
    world.frames().free(spare);
    Reclaimer::new(Fifo).reclaim(mm, 1 << 20);
    assert_eq!(space.frame_at(page(at)), Some(frame));
    assert_eq!(held.lock().unwrap()[0], 0x11);
    let told = space.explain_fault(VirtAddr::new(at + 20 * PAGE), FaultCode::USER);
    assert!(told.to_string().contains("page of the device"), "{told}");
    check_counters([&program]);
    program.exit();
}

/// Entries of device memory come along where they lie in one table with anonymous pages, and the child finds the others again.
fn device_memory_over_fork_and_in_shared_tables() {
    for alone in [false, true] {
        let (world, mm, held, file) = device(REGISTERS, MemoryType::Uncached);
        let before = world.used_frames();
        let parent = Program::new(mm);
        let at = map(&parent, file, PAGES, RW, MapFlags::SHARED).unwrap();
        let memory = at - 4 * PAGE;
        if !alone {
            let request = MapRequest::anonymous(2 * PAGE, RW).at(memory);
            parent.space.mmap(&request).unwrap();
            parent.store(memory, 5).unwrap();
        }
        parent.store(at, 1).unwrap();
        let child = parent.fork().unwrap();
        assert_eq!(
            child.space.frame_at(page(at)).is_some(),
            !alone,
            "in a shared table, or not at all"
        );
        assert_eq!(child.load(at), Ok(1));
        let other = child.fork().unwrap();
        if !alone {
            // Copies of the table.
            child.store(memory, 6).unwrap();
            other.store(memory + PAGE, 7).unwrap();
        }
        child.store(at + 8, 2).unwrap();
        other.store(at + 16, 3).unwrap();
        assert_eq!(held.lock().unwrap()[..3], [1, 2, 3]);
        // The mapping of one goes, whole and in part, and moves: the others' stay.
        child.space.munmap(at + PAGE, 2 * PAGE).unwrap();
        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
        let to = at - 0x100_0000;
        let length = 4 * PAGE;
        let moved = other.space.mremap(at, length, length, flags, to);
        assert_eq!(moved, Ok(to));
        assert_eq!(other.load(to + 8), Ok(2));
        parent.exit();
        assert_eq!(child.load(at + 16), Ok(3));
        child.exit();
        assert_eq!(other.load(to), Ok(1));
        // An eager copy, and a child without it.
        other.space.madvise(to, length, Advice::DontFork).unwrap();
        let last = other.fork().unwrap();
        assert_eq!(last.load(to), Err(signal(Signal::MapError, to)));
        other.exit();
        last.exit();
        assert_eq!(world.used_frames(), before);
    }
}

/// Answers of Linux 6.18: `mm/madvise.c`, `mm/mremap.c`, `mm/mlock.c`.
fn calls_on_device_memory_answer_as_linux() {
    let (_, mm, held, file) = device(REGISTERS, MemoryType::Uncached);
    let program = Program::new(mm);
    let space = &program.space;
    let locked = MapFlags::SHARED | MapFlags::LOCKED | MapFlags::POPULATE;
    let at = map(&program, file, 4, RW, locked).unwrap();
    program.store(at, 1).unwrap();
    let length = 4 * PAGE;
    for (advice, answer) in [
        (Advice::DontNeed, Err(Errno::EINVAL)),
        (Advice::DontNeedLocked, Err(Errno::EINVAL)),
        (Advice::Free, Err(Errno::EINVAL)),
        (Advice::Cold, Err(Errno::EINVAL)),
        (Advice::PageOut, Err(Errno::EINVAL)),
        (Advice::PopulateRead, Err(Errno::EINVAL)),
        (Advice::PopulateWrite, Err(Errno::EINVAL)),
        (Advice::DoFork, Err(Errno::EINVAL)),
        (Advice::DoDump, Err(Errno::EINVAL)),
        (Advice::WipeOnFork, Err(Errno::EINVAL)),
        (Advice::GuardInstall, Err(Errno::EINVAL)),
        (Advice::Remove, Err(Errno::ENODEV)),
        (Advice::Mergeable, Ok(())),
        (Advice::WillNeed, Ok(())),
        (Advice::Random, Ok(())),
        (Advice::Normal, Ok(())),
    ] {
        assert_eq!(space.madvise(at, length, advice), answer, "{advice:?}");
    }
    assert_eq!(program.load(at), Ok(1), "nothing of it went");
    space.mlock(at, length).unwrap();
    space.mlockall(LockAll::CURRENT | LockAll::FUTURE).unwrap();
    let more = map(&program, file, 2, RW, MapFlags::SHARED).unwrap();
    assert_eq!(space.recount().locked, 0);
    assert_eq!(space.frame_at(page(more)), None);
    space.munlockall().unwrap();
    let grown = space.mremap(at, length, 2 * length, RemapFlags::MAYMOVE, 0);
    assert_eq!(grown, Err(Errno::EFAULT));
    let twice = space.mremap(at, 0, PAGE, RemapFlags::MAYMOVE, 0);
    assert_eq!(twice, Err(Errno::EFAULT));
    let flags = RemapFlags::MAYMOVE | RemapFlags::DONTUNMAP;
    let kept = space.mremap(at, length, length, flags, 0);
    assert_eq!(kept, Err(Errno::EINVAL));
    let mut vector = [9; 4];
    space.mincore(at, length, &mut vector).unwrap();
    assert_eq!(vector[0], 1);
    space.msync_with(at, length, SyncFlags::SYNC).unwrap();
    let shrunk = space.mremap(at, length, 2 * PAGE, RemapFlags::empty(), 0);
    assert_eq!(shrunk, Ok(at));
    assert_eq!(program.load(at), Ok(1));
    // It is no file: the driver reads and writes.
    let mut bytes = [0; 8];
    assert_eq!(mm.read_file(file.file, 0, &mut bytes), Err(Errno::EINVAL));
    assert_eq!(mm.write_file(file.file, 0, &bytes), Err(Errno::EINVAL));
    assert_eq!(mm.sync_file(file.file), Ok(()));
    assert_eq!(held.lock().unwrap()[0], 1);
    program.exit();
}

/// What is no page of the device is not mapped, and what would need a copy is not either.
fn a_device_is_mapped_within_its_end_and_never_copied() {
    let (world, mm, held, file) = device(REGISTERS, MemoryType::Uncached);
    let program = Program::new(mm);
    let space = &program.space;
    let too_long = map(&program, file, PAGES + 1, RW, MapFlags::SHARED);
    assert_eq!(too_long, Err(Errno::EINVAL));
    let request = MapRequest {
        flags: MapFlags::SHARED,
        file: Some(file),
        offset: (PAGES - 1) * PAGE,
        ..MapRequest::anonymous(PAGE, RW)
    };
    let last = space.mmap(&request).unwrap().as_u64();
    program.store(last, 4).unwrap();
    assert_eq!(held.lock().unwrap()[((PAGES - 1) * PAGE / 8) as usize], 4);
    let beyond = MapRequest {
        length: 2 * PAGE,
        ..request
    };
    assert_eq!(space.mmap(&beyond), Err(Errno::EINVAL));
    let private = map(&program, file, 1, RW, MapFlags::PRIVATE);
    assert_eq!(private, Err(Errno::EINVAL));
    held.lock().unwrap()[0] = 8;
    let private = map(&program, file, 1, Prot::READ, MapFlags::PRIVATE).unwrap();
    assert_eq!(program.load(private), Ok(8));
    assert_eq!(space.mprotect(private, PAGE, RW), Err(Errno::EACCES));
    held.lock().unwrap()[0] = 9;
    assert_eq!(program.load(private), Ok(9), "no copy");
    // Whoever may only read the device may only read its mapping.
    let read_only = OpenFile {
        writable: false,
        ..file
    };
    let refused = map(&program, read_only, 1, RW, MapFlags::SHARED);
    assert_eq!(refused, Err(Errno::EACCES));
    let shown = map(&program, read_only, 1, Prot::READ, MapFlags::SHARED).unwrap();
    assert_eq!(space.mprotect(shown, PAGE, RW), Err(Errno::EACCES));
    // A page of a program is no device's.
    let request = MapRequest::anonymous(PAGE, RW);
    let memory = space.mmap(&request).unwrap();
    program.store(memory.as_u64(), 1).unwrap();
    let frame = space.frame_at(page(memory.as_u64())).unwrap();
    for frames in [FrameRange::new(frame, 1), FrameRange::new(frame, 0)] {
        let memory = DeviceMemory {
            frames: frames.unwrap(),
            memory_type: MemoryType::Uncached,
        };
        // SAFETY: it is refused.
        let refused = unsafe { mm.open_device(memory, "/dev/mem", 0) };
        assert_eq!(refused, Err(Errno::EINVAL));
    }
    let before = world.used_frames();
    // An allocation that fails at each point: the access is made again, and nothing is left behind.
    let other = Program::new(mm);
    let at = map(&other, file, 1, RW, MapFlags::SHARED).unwrap();
    for n in 1.. {
        world.plan.fail_at(n);
        let outcome = other.load(at);
        world.plan.stop();
        if outcome == Ok(9) {
            assert!(n > 1, "a table was needed");
            break;
        }
        assert_eq!(outcome, Err(Outcome::OutOfMemory));
    }
    other.exit();
    assert_eq!(world.used_frames(), before);
    // The object outlives its handle, as long as something is mapped.
    assert!(mm.close(file.file));
    assert_eq!(program.load(last), Ok(4));
    program.exit();
    assert_eq!(mm.object_info(file.file).err(), Some(Errno::EBADF));
}
