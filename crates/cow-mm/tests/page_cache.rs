//! The page cache: what calls and mappings see, what the disk gets, what goes when memory is short.

mod common;

use common::changing_file::ChangingFile;
use common::{PAGE, Program, RW, World, signal};
use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    Advice, Errno, Image, MapFlags, MapRequest, Mm, OpenFile, Prot, Reclaimer, Signal,
};
use kmem_hal::{Frame, IoError, IoState, IoTicket, Page, PageProvider, VirtAddr};
use kmem_mock_x86::{DiskImage, Machine, MemoryMap};
use std::sync::atomic::{AtomicU64, Ordering};

fn bytes(pages: u64) -> Vec<u8> {
    (0..pages * PAGE)
        .map(|at| (at / PAGE * 7 + at % 13) as u8)
        .collect()
}

fn on_disk(world: &World, image: &DiskImage<'_>, index: u64) -> u64 {
    use kmem_hal::{FrameRequest, FrameSink, FrameSource};
    let frame = world.frames().alloc(&FrameRequest::ONE).unwrap();
    if let Ok(IoState::Pending(ticket)) = image.read(index, frame.first()) {
        while let Ok(IoState::Pending(_)) = image.poll(ticket) {}
    }
    let mut word = [0; 8];
    assert!(
        world
            .machine
            .memory()
            .read(frame.first().start().as_u64(), &mut word)
    );
    world.frames().free(frame);
    u64::from_le_bytes(word)
}

#[test]
fn calls_and_mappings_share_pages() {
    let world = World::new();
    let mm = world.mm();
    let (image, file) = world.file(mm, &bytes(8));
    image.set_latency(2);
    let program = Program::new(mm);
    let shared = program.map_file(file, 8, RW, MapFlags::SHARED);
    let private = program.map_file(file, 8, RW, MapFlags::PRIVATE);
    program.store(shared + 2 * PAGE, 0x1111).unwrap();
    let mut word = [0; 8];
    let read = |offset, word: &mut [u8]| loop {
        let io = mm.read_file(file.file, offset, word).unwrap();
        if io.ticket.is_none() {
            break io.bytes;
        }
    };
    assert_eq!(read(2 * PAGE, &mut word), 8);
    assert_eq!(u64::from_le_bytes(word), 0x1111);
    let write = |offset, word: u64| {
        while mm
            .write_file(file.file, offset, &word.to_le_bytes())
            .unwrap()
            .bytes
            < 8
        {}
    };
    write(3 * PAGE, 0x2222);
    assert_eq!(program.load(shared + 3 * PAGE), Ok(0x2222));
    assert_eq!(program.load(private + 3 * PAGE), Ok(0x2222));
    program.store(private + 3 * PAGE, 0x3333).unwrap();
    write(3 * PAGE, 0x4444);
    assert_eq!(program.load(private + 3 * PAGE), Ok(0x3333));
    assert_eq!(
        read(8 * PAGE - 4, &mut word),
        4,
        "reads end at the file's end"
    );
    assert_eq!(mm.meminfo().dirty, 2);
    mm.sync_file(file.file).unwrap();
    assert_eq!(mm.meminfo().dirty, 0);
    assert_eq!(on_disk(world, image, 2), 0x1111);
    assert_eq!(on_disk(world, image, 3), 0x4444);
    program.exit();
    mm.close(file.file);
}

#[test]
fn a_page_that_was_written_back_is_dirty_again_at_the_next_write() {
    let world = World::new();
    let mm = world.mm();
    let (image, file) = world.file(mm, &bytes(2));
    let program = Program::new(mm);
    let start = program.map_file(file, 2, RW, MapFlags::SHARED);
    for value in 1..5 {
        program.store(start, value).unwrap();
        assert_eq!(mm.meminfo().dirty, 1);
        program.space.msync(start, PAGE).unwrap();
        assert_eq!(mm.meminfo().dirty, 0);
        assert_eq!(on_disk(world, image, 0), value);
    }
    let written = image.transfers().1;
    program.space.msync(start, PAGE).unwrap();
    assert_eq!(image.transfers().1, written, "a clean page is not written");
    // A write that fails leaves the page dirty, and the next one brings the bytes there.
    program.store(start, 9).unwrap();
    image.fail_at(1);
    assert!(program.space.msync(start, PAGE).is_err());
    assert_eq!(mm.meminfo().dirty, 1);
    program.space.msync(start, PAGE).unwrap();
    assert_eq!(on_disk(world, image, 0), 9);
    program.exit();
    mm.close(file.file);
}

#[test]
fn pages_of_files_go_when_memory_is_short_and_dirty_ones_are_written_first() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (image, file) = world.file(mm, &bytes(64));
    let program = Program::new(mm);
    let start = program.map_file(file, 64, RW, MapFlags::SHARED);
    let text = program.map_file(file, 64, Prot::READ, MapFlags::PRIVATE);
    for page in 0..64 {
        program.load(text + page * PAGE).unwrap();
    }
    program.store(start, 0xabcd).unwrap();
    let child = program.fork().unwrap();
    child.load(text).unwrap();
    assert_eq!(mm.cached_pages(file.file), 64);
    let made = Reclaimer::new(Fifo).reclaim(mm, 64);
    assert_eq!(made.freed, 64, "{made:?}");
    assert_eq!(mm.cached_pages(file.file), 0);
    assert_eq!(program.space.recount().rss_file, 0);
    assert_eq!(on_disk(world, image, 0), 0xabcd);
    assert_eq!(child.load(text), Ok(0xabcd));
    let want = u64::from_le_bytes(bytes(64)[5 * 4096..][..8].try_into().unwrap());
    assert_eq!(program.load(start + 5 * PAGE), Ok(want));
    program.exit();
    child.exit();
    mm.close(file.file);
    assert_eq!(world.used_frames(), before);
}

#[test]
fn a_read_brings_its_neighbours() {
    let world = World::new();
    let mm = world.mm();
    let (image, file) = world.file(mm, &bytes(64));
    let program = Program::new(mm);
    let start = program.map_file(file, 64, Prot::READ, MapFlags::PRIVATE);
    // A page from which a window of 16 pages begins.
    let aligned = 16 - start / PAGE % 16;
    program.load(start + aligned * PAGE).unwrap();
    assert_eq!(mm.cached_pages(file.file), 9, "the page and eight after it");
    assert_eq!(
        program.space.recount().rss_file,
        9,
        "all of them are mapped by one fault"
    );
    program
        .space
        .madvise(start, 64 * PAGE, Advice::Random)
        .unwrap();
    program.load(start + 48 * PAGE).unwrap();
    assert_eq!(mm.cached_pages(file.file), 10);
    let reads = image.transfers().0;
    program
        .space
        .madvise(start + 56 * PAGE, 8 * PAGE, Advice::WillNeed)
        .unwrap();
    assert_eq!(image.transfers().0, reads + 8);
    program.exit();
    mm.close(file.file);
}

/// Whoever reads from front to back has more read ahead of him.
#[test]
fn a_sequential_reader_is_read_ahead_of() {
    let world = World::new();
    let mm = world.mm();
    let (_, file) = world.file(mm, &bytes(64));
    let program = Program::new(mm);
    let start = program.map_file(file, 64, Prot::READ, MapFlags::SHARED);
    let sequential = program.space.madvise(start, 64 * PAGE, Advice::Sequential);
    sequential.unwrap();
    program.load(start).unwrap();
    assert_eq!(mm.cached_pages(file.file), 1 + 32);
    program.exit();
    mm.close(file.file);
}

/// What is large is not read whole because a program says that it will need it: the rest comes when it is touched.
#[test]
fn willneed_of_a_large_file_takes_two_megabytes() {
    let world = World::new();
    let mm = world.mm();
    let (image, file) = world.file(mm, &bytes(1024));
    let program = Program::new(mm);
    let start = program.map_file(file, 1024, RW, MapFlags::SHARED);
    let willneed = |page: u64, pages: u64| {
        let (start, length) = (start + page * PAGE, pages * PAGE);
        program.space.madvise(start, length, Advice::WillNeed)
    };
    assert_eq!(willneed(0, 1024), Ok(()));
    assert_eq!(mm.cached_pages(file.file), 512);
    assert_eq!(willneed(256, 768), Ok(()));
    assert_eq!(mm.cached_pages(file.file), 768);
    assert_eq!(image.transfers().0, 768, "none is read twice");
    program.exit();
    mm.close(file.file);
}

/// Write-back makes a page read-only where it is mapped, and flushes there: a family costs no flush of each member for each, whether its members
/// have tables of their own or share one.
#[test]
fn write_back_flushes_the_spaces_that_map_the_page() {
    let machine = Machine::builder().memory(MemoryMap::pc(16 << 20)).cpus(4);
    let world = World::on(Box::leak(Box::new(machine.build().unwrap())));
    let mm = world.mm();
    for shared in [false, true] {
        let (_, file) = world.file(mm, &bytes(1));
        let parent = Program::new(mm);
        let start = parent.map_file(file, 1, RW, MapFlags::SHARED);
        if shared {
            // Anonymous memory beside it: the child gets the table, and the file's page with it.
            let beside = parent.map(1);
            assert_eq!(beside >> 21, start >> 21);
            parent.store(beside, 1).unwrap();
        }
        parent.store(start, 1).unwrap();
        let children = [(); 3].map(|()| parent.fork().unwrap());
        for (cpu, program) in children.iter().chain([&parent]).enumerate() {
            program.run_on(cpu);
            if !shared {
                program.space.write_memory(start.into(), &[1]).unwrap();
            }
            assert!(program.frame_at(start).is_some());
        }
        let before = world.machine.stats().flushes;
        mm.sync_file(file.file).unwrap();
        let flushes = world.machine.stats().flushes - before;
        assert_eq!(flushes, 4, "one for each space that maps it");
        children.into_iter().for_each(Program::exit);
        parent.exit();
        mm.close(file.file);
    }
}

fn shrinking(
    world: &'static World,
    mm: &'static Mm<'static, World>,
    pages: u64,
) -> (&'static ChangingFile, OpenFile) {
    let provider: &'static ChangingFile = Box::leak(Box::new(ChangingFile {
        image: DiskImage::from_bytes(world.machine, &bytes(pages)),
        size: AtomicU64::new(pages * PAGE),
    }));
    let file = mm.open_file(provider, "/shrinks", 7).unwrap();
    (
        provider,
        OpenFile {
            file,
            readable: true,
            writable: true,
        },
    )
}

#[test]
fn a_file_that_shrinks_takes_its_pages_out_of_every_mapping() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (provider, file) = shrinking(world, mm, 8);
    let program = Program::new(mm);
    let shared = program.map_file(file, 8, RW, MapFlags::SHARED);
    let private = program.map_file(file, 8, RW, MapFlags::PRIVATE);
    for page in 0..8 {
        program.store(shared + page * PAGE, page + 1).unwrap();
        program.store(private + page * PAGE, page + 100).unwrap();
    }
    let child = program.fork().unwrap();
    provider.size.store(3 * PAGE + 8, Ordering::SeqCst);
    mm.truncate_file(file.file).unwrap();
    assert_eq!(mm.cached_pages(file.file), 4);
    for program in [&program, &child] {
        for page in 0..4 {
            assert_eq!(program.load(shared + page * PAGE), Ok(page + 1));
            assert_eq!(program.load(private + page * PAGE), Ok(page + 100));
        }
        assert_eq!(
            program.load(shared + 3 * PAGE + 8),
            Ok(0),
            "behind the end there are zeros"
        );
        for page in 4..8 {
            for start in [shared, private] {
                let address = start + page * PAGE;
                assert_eq!(
                    program.load(address),
                    Err(signal(Signal::BusError, address))
                );
            }
        }
    }
    program.exit();
    child.exit();
    mm.close(file.file);
    assert_eq!(world.used_frames(), before);
}

#[test]
fn advice_about_pages_has_its_effect() {
    let world = World::new();
    let mm = world.mm();
    world.disk(mm, 64);
    let program = Program::new(mm);
    let start = program.map(8);
    let present = |page: u64| {
        let page = Page::containing(VirtAddr::new(start + page * PAGE));
        program.space.frame_at(page).is_some()
    };
    for page in 0..8 {
        program.store(start + page * PAGE, page + 1).unwrap();
    }
    program
        .space
        .madvise(start, 2 * PAGE, Advice::PageOut)
        .unwrap();
    assert!(!present(0) && !present(1) && present(2));
    assert_eq!(program.space.swapped(), 2);
    assert_eq!(program.load(start), Ok(1));
    // Lazily freed: there until memory is short, kept if it is written.
    program
        .space
        .madvise(start + 2 * PAGE, 2 * PAGE, Advice::Free)
        .unwrap();
    assert_eq!(program.load(start + 2 * PAGE), Ok(3));
    program.store(start + 3 * PAGE, 44).unwrap();
    assert_eq!(mm.meminfo().lazily_freed, 2);
    let out = mm.events().swapped_out;
    Reclaimer::new(Fifo).reclaim(mm, 64);
    assert_eq!(
        program.load(start + 2 * PAGE),
        Ok(0),
        "dropped without a copy"
    );
    assert_eq!(
        program.load(start + 3 * PAGE),
        Ok(44),
        "written again, so kept"
    );
    assert!(mm.events().swapped_out > out);
    // What is in swap is forgotten.
    program
        .space
        .madvise(start, 8 * PAGE, Advice::PageOut)
        .unwrap();
    program
        .space
        .madvise(start, 8 * PAGE, Advice::Free)
        .unwrap();
    assert_eq!(program.space.swapped(), 0);
    assert_eq!(program.load(start + 3 * PAGE), Ok(0));
    // Cold pages go first.
    for page in 0..8 {
        program.store(start + page * PAGE, page + 1).unwrap();
    }
    program
        .space
        .madvise(start + 6 * PAGE, 2 * PAGE, Advice::Cold)
        .unwrap();
    Reclaimer::new(kmem_cow_mm::replacement::Clock).reclaim(mm, 2);
    assert!((0..6).all(present) && !present(6) && !present(7));
    program.exit();
}

/// What a handle names is gone: its memory may be another object's by now.
#[test]
fn a_handle_that_outlived_its_file_is_an_error_and_never_another_files() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (_, old) = world.file(mm, &bytes(2));
    let program = Program::new(mm);
    let start = program.map_file(old, 2, RW, MapFlags::SHARED);
    let again = mm.reopen(old.file);
    assert!(mm.close(old.file) && mm.close(again));
    // The mapping keeps it alive, and no handle can be closed that is none.
    assert!(!mm.close(old.file));
    assert_eq!(mm.object_info(old.file).unwrap().inode, 42);
    program.store(start, 7).unwrap();
    program.space.munmap(start, 2 * PAGE).unwrap();
    // The heap gives the memory away again at once.
    let (_, other) = world.file(mm, &bytes(3));
    for stale in [old.file, again, mm.reopen(old.file)] {
        let mut word = [0; 8];
        assert_eq!(mm.object_info(stale).err(), Some(Errno::EBADF));
        assert_eq!(mm.read_file(stale, 0, &mut word), Err(Errno::EBADF));
        assert_eq!(mm.write_file(stale, 0, &word), Err(Errno::EBADF));
        assert_eq!(mm.sync_file(stale), Err(Errno::EBADF));
        assert_eq!(mm.truncate_file(stale), Err(Errno::EBADF));
        assert_eq!(mm.cached_pages(stale), 0);
        assert!(!mm.close(stale));
        let file = OpenFile {
            file: stale,
            ..other
        };
        let request = MapRequest {
            flags: MapFlags::SHARED,
            file: Some(file),
            ..MapRequest::anonymous(PAGE, RW)
        };
        assert_eq!(program.space.mmap(&request), Err(Errno::EBADF));
        let image = Image::new(file, b"/bin/test");
        assert_eq!(
            Program::new(mm).space.exec(&image),
            Err(Errno::EBADF.into())
        );
    }
    assert_eq!(mm.object_info(other.file).unwrap().size, 3 * PAGE);
    program.exit();
    assert!(mm.close(other.file));
    assert_eq!(world.used_frames(), before);
}

#[test]
fn removed_pages_of_shared_memory_are_freed_for_everybody() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    world.disk(mm, 64);
    let parent = Program::new(mm);
    let request = MapRequest {
        flags: MapFlags::SHARED | MapFlags::ANONYMOUS,
        ..MapRequest::anonymous(8 * PAGE, RW)
    };
    let start = parent.space.mmap(&request).unwrap().as_u64();
    for page in 0..8 {
        parent.store(start + page * PAGE, page + 1).unwrap();
    }
    let child = parent.fork().unwrap();
    child.load(start).unwrap();
    // Two are in swap.
    parent
        .space
        .madvise(start + 4 * PAGE, 2 * PAGE, Advice::PageOut)
        .unwrap();
    let locked = start + 7 * PAGE;
    child.space.mlock(locked, PAGE).unwrap();
    let pin = child
        .space
        .pin(VirtAddr::new(start + 3 * PAGE), kmem_hal::Access::Write)
        .unwrap();
    let used = world.used_frames();
    parent
        .space
        .madvise(start + PAGE, 7 * PAGE, Advice::Remove)
        .unwrap();
    // Pages 1, 2 and 6 are free, 3 is the pin's, 4 and 5 are gone from swap, 7 is locked by the child and keeps its frame.
    assert_eq!(used - world.used_frames(), 3);
    assert_eq!(mm.meminfo().swap.free, 64);
    for program in [&parent, &child] {
        assert_eq!(program.load(start), Ok(1));
        for page in 1..8 {
            assert_eq!(program.load(start + page * PAGE), Ok(0));
        }
    }
    child.store(start + 3 * PAGE, 33).unwrap();
    assert_eq!(parent.load(start + 3 * PAGE), Ok(33));
    let mut word = [0; 8];
    pin.read(0, &mut word);
    assert_eq!(u64::from_le_bytes(word), 4, "the pin's page is its own now");
    drop(pin);
    for harmful in [Advice::HwPoison, Advice::SoftOffline] {
        assert_eq!(
            parent.space.madvise(start, PAGE, harmful),
            Err(Errno::EPERM)
        );
    }
    parent.exit();
    child.exit();
    assert_eq!(world.used_frames(), before);
}

/// A file whose every transfer takes some rounds, and which counts how often it was asked.
#[derive(Debug)]
struct Slow {
    image: &'static DiskImage<'static>,
    polls: AtomicU64,
}

// SAFETY: W1 to W4: forwards to an image that keeps them.
unsafe impl PageProvider for Slow {
    fn size(&self) -> u64 {
        self.image.size()
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.image.read(index, frame)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.image.write(index, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.polls.fetch_add(1, Ordering::SeqCst);
        self.image.poll(ticket)
    }
}

#[test]
fn calls_that_wait_for_a_device_ask_the_kernel_to_wait() {
    const ROUNDS: u64 = 5;
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let image: &'static DiskImage<'static> =
        Box::leak(Box::new(DiskImage::from_bytes(world.machine, &bytes(4))));
    image.set_latency(ROUNDS as u32);
    let polls = AtomicU64::new(0);
    let slow: &'static Slow = Box::leak(Box::new(Slow { image, polls }));
    let file = OpenFile {
        file: mm.open_file(slow, "/slow", 7).unwrap(),
        readable: true,
        writable: true,
    };
    let program = Program::new(mm);
    let start = program.map_file(file, 4, RW, MapFlags::SHARED);
    // Each time that the device was asked, and had not finished, the kernel was asked to wait; and no more often.
    let waited = |what: &str, call: &dyn Fn()| {
        let before = (
            world.waits.load(Ordering::SeqCst),
            slow.polls.load(Ordering::SeqCst),
        );
        call();
        let waits = world.waits.load(Ordering::SeqCst) - before.0;
        let polls = slow.polls.load(Ordering::SeqCst) - before.1;
        assert!(waits >= ROUNDS - 1, "{what}: waited {waits} times");
        // One look more for each page whose transfer is over.
        assert!(
            polls <= waits + 4,
            "{what}: {polls} questions, {waits} waits"
        );
    };
    waited("populate", &|| {
        program
            .space
            .madvise(start, PAGE, Advice::PopulateWrite)
            .unwrap();
    });
    waited("write_memory", &|| {
        // Of a page of which no read was begun.
        let far = start + 3 * PAGE;
        program
            .space
            .madvise(start, 4 * PAGE, Advice::Random)
            .unwrap();
        let to = VirtAddr::new(far);
        program.space.write_memory(to, &9u64.to_le_bytes()).unwrap();
    });
    waited("msync", &|| program.space.msync(start, PAGE).unwrap());
    // A page on its way out ends with its object.
    program.store(start, 5).unwrap();
    let made = Reclaimer::new(Fifo).reclaim(mm, 1);
    assert!(made.writing > 0, "{made:?}");
    program.exit();
    waited("close", &|| assert!(mm.close(file.file)));
    assert_eq!(world.used_frames(), before);
}

#[test]
fn a_truncation_waits_for_reads_that_are_under_way() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (provider, file) = shrinking(world, mm, 8);
    provider.image.set_latency(6);
    let program = Program::new(mm);
    let start = program.map_file(file, 8, RW, MapFlags::SHARED);
    program
        .space
        .madvise(start, 8 * PAGE, Advice::WillNeed)
        .unwrap();
    provider.size.store(0, Ordering::SeqCst);
    mm.truncate_file(file.file).unwrap();
    let waits = world.waits.load(Ordering::SeqCst);
    assert!(waits >= 5, "waited {waits} times");
    assert_eq!(mm.cached_pages(file.file), 0);
    assert_eq!(provider.image.in_flight(), 0);
    program.exit();
    assert!(mm.close(file.file));
    assert_eq!(world.used_frames(), before);
}

/// The page that the new end lies in is on its way when the file is cut: what the disk has behind the end is not seen when it arrives.
#[test]
fn a_truncation_empties_the_rest_of_a_page_that_is_being_read() {
    let world = World::new();
    let mm = world.mm();
    let (provider, file) = shrinking(world, mm, 2);
    provider.image.set_latency(6);
    let program = Program::new(mm);
    let start = program.map_file(file, 2, RW, MapFlags::SHARED);
    let willneed = program.space.madvise(start, 2 * PAGE, Advice::WillNeed);
    willneed.unwrap();
    let (end, behind) = (PAGE + 64, start + PAGE + 64);
    let word = |at: u64| u64::from_le_bytes(bytes(2)[at as usize..][..8].try_into().unwrap());
    assert_ne!(word(end), 0);
    provider.size.store(end, Ordering::SeqCst);
    mm.truncate_file(file.file).unwrap();
    assert_eq!(program.load(behind), Ok(0));
    assert_eq!(program.load(behind - 8), Ok(word(end - 8)));
    program.exit();
    assert!(mm.close(file.file));
}

/// A pager may fail at once or late, for a read or a write, and have less than was mapped: the access is a bus error, and nothing else is.
#[test]
fn a_pager_that_fails_is_a_bus_error_and_is_asked_again() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (provider, file) = shrinking(world, mm, 4);
    let program = Program::new(mm);
    let start = program.map_file(file, 4, RW, MapFlags::SHARED);
    let copy = program.map_file(file, 4, RW, MapFlags::PRIVATE);
    let want = |page: u64| {
        let at = (page * PAGE) as usize;
        u64::from_le_bytes(bytes(4)[at..at + 8].try_into().unwrap())
    };
    for start in [start, copy] {
        program
            .space
            .madvise(start, 4 * PAGE, Advice::Random)
            .unwrap();
    }
    for (page, latency) in [(0, 0), (1, 4)] {
        provider.image.set_latency(latency);
        provider.image.fail_at(1);
        let address = start + page * PAGE;
        let refused = Err(signal(Signal::BusError, address));
        assert_eq!(program.load(address), refused, "page {page}");
        // The page keeps its frame, and nobody maps it.
        assert_eq!(mm.cached_pages(file.file), page + 1);
        assert_eq!(program.space.recount().rss_file, page);
        assert_eq!(program.load(address), Ok(want(page)));
    }
    // A write to a private copy needs the page as well.
    let address = copy + 2 * PAGE;
    provider.image.fail_at(1);
    let refused = Err(signal(Signal::BusError, address));
    assert_eq!(program.store(address, 5), refused);
    assert_eq!(program.store(address, 5), Ok(()));
    assert_eq!(program.load(start + 2 * PAGE), Ok(want(2)));
    // What calls read fails alike.
    provider.image.set_latency(0);
    provider.image.fail_at(1);
    let mut word = [0; 8];
    let read = mm.read_file(file.file, 3 * PAGE, &mut word);
    assert_eq!(read, Err(Errno::EIO));
    assert_eq!(program.load(start + 3 * PAGE), Ok(want(3)));
    // The pager has less than it said: what is behind the end is no page any more, what is before it stays.
    provider.size.store(PAGE, Ordering::SeqCst);
    mm.truncate_file(file.file).unwrap();
    for start in [start, copy] {
        let behind = start + 2 * PAGE;
        let refused = Err(signal(Signal::BusError, behind));
        assert_eq!(program.load(behind), refused);
        assert_eq!(program.load(start), Ok(want(0)));
    }
    program.exit();
    assert!(mm.close(file.file));
    assert_eq!(world.used_frames(), before);
}
