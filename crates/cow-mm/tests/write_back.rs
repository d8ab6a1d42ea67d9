//! What was written to a file reaches its provider whoever lets go of it last, and nothing beyond the file's end does.

mod common;

use common::changing_file::ChangingFile;
use common::kept::keep;
use common::{PAGE, Program, RW, World};
use kmem_cow_mm::replacement::Fifo;
use kmem_cow_mm::{
    AddressSpace, Errno, MapFlags, MapRequest, Mm, OpenFile, Prot, Reclaimer, RemapFlags,
};
use kmem_hal::{Frame, IoError, IoState, IoTicket, PageProvider};
use kmem_mock_x86::DiskImage;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

/// How long something may take that happens at once, unless it never does.
const PATIENCE: Duration = Duration::from_secs(20);

/// A file of so many bytes, on a disk with room for more.
fn file_of(
    world: &'static World,
    mm: &'static Mm<'static, World>,
    size: u64,
) -> (&'static ChangingFile, OpenFile) {
    let room = vec![7; 4 * PAGE as usize];
    let provider: &'static ChangingFile = keep(Box::new(ChangingFile {
        image: DiskImage::from_bytes(world.machine, &room),
        size: AtomicU64::new(size),
    }));
    let open = OpenFile {
        file: mm.open_file(provider, "/data", 0).unwrap(),
        readable: true,
        writable: true,
    };
    (provider, open)
}

/// The word at an offset of a file, as somebody reads it who opens it anew.
fn reopened(mm: &'static Mm<'static, World>, provider: &'static ChangingFile, offset: u64) -> u64 {
    let file = mm.open_file(provider, "/data", 0).unwrap();
    let mut word = [0; 8];
    while mm.read_file(file, offset, &mut word).unwrap().bytes < 8 {}
    assert!(mm.close(file));
    u64::from_le_bytes(word)
}

#[test]
fn who_lets_go_of_a_file_last_writes_it() {
    for (latency, exits) in [(0, false), (3, false), (0, true), (3, true)] {
        let world = World::new();
        let mm = world.mm();
        let before = world.used_frames();
        let (provider, file) = file_of(world, mm, 4 * PAGE);
        provider.image.set_latency(latency);
        let program = Program::new(mm);
        let start = program.map_file(file, 4, RW, MapFlags::SHARED);
        program.store(start, 1).unwrap();
        assert!(mm.close(file.file), "mapped, and closed");
        program.store(start + 2 * PAGE, 2).unwrap();
        let written = mm.events().written_back;
        if exits {
            program.exit();
        } else {
            program.space.munmap(start, 4 * PAGE).unwrap();
            program.exit();
        }
        assert_eq!(mm.events().written_back - written, 2, "clean pages are not");
        assert_eq!(reopened(mm, provider, 0), 1);
        assert_eq!(reopened(mm, provider, 2 * PAGE), 2);
        assert_eq!(world.used_frames(), before);
    }
}

/// A file whose provider looks at a space before it takes a page, as one does that reclaims, or that is a program itself.
struct Asking {
    file: ChangingFile,
    space: OnceLock<&'static AddressSpace<'static, World>>,
    asked: AtomicU64,
}

// SAFETY: W1 to W4: forwards to a file that keeps them.
unsafe impl PageProvider for Asking {
    fn size(&self) -> u64 {
        self.file.size()
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.file.read(index, frame)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        if let Some(&space) = self.space.get() {
            // From another thread, which can be given up: one that waits for a lock that this one holds would hang.
            let (tell, told) = mpsc::channel();
            thread::spawn(move || tell.send(space.map_count() as u64));
            let count = told.recv_timeout(PATIENCE);
            let count = count.expect("the space is locked while its file is written");
            self.asked.fetch_add(1 + count, Ordering::Relaxed);
        }
        self.file.write(index, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.file.poll(ticket)
    }
}

#[test]
fn a_file_ends_without_the_lock_of_the_space_that_let_go_of_it() {
    let ways: [fn(&Program, u64); 4] = [
        |program, start| program.space.munmap(start, 2 * PAGE).unwrap(),
        |program, start| {
            // Over the file's mapping.
            let request = MapRequest {
                address: start,
                flags: MapFlags::PRIVATE | MapFlags::ANONYMOUS | MapFlags::FIXED,
                ..MapRequest::anonymous(2 * PAGE, RW)
            };
            program.space.mmap(&request).unwrap();
        },
        |program, start| {
            let other = program.map(2);
            let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED;
            let moved = program
                .space
                .mremap(other, 2 * PAGE, 2 * PAGE, flags, start);
            assert_eq!(moved.unwrap(), start);
        },
        |program, start| {
            // A part of the mapping is left each time but the last.
            program.space.munmap(start, PAGE).unwrap();
            program.space.munmap(start + PAGE, PAGE).unwrap();
        },
    ];
    for way in ways {
        let world = World::new();
        let mm = world.mm();
        let room = vec![7; 4 * PAGE as usize];
        let provider: &'static Asking = keep(Box::new(Asking {
            file: ChangingFile {
                image: DiskImage::from_bytes(world.machine, &room),
                size: AtomicU64::new(2 * PAGE),
            },
            space: OnceLock::new(),
            asked: AtomicU64::new(0),
        }));
        let file = OpenFile {
            file: mm.open_file(provider, "/served", 0).unwrap(),
            readable: true,
            writable: true,
        };
        let program = Program::new(mm);
        let space = keep(Box::new(program.space.share().unwrap()));
        assert!(provider.space.set(space).is_ok());
        let start = program.map_file(file, 2, RW, MapFlags::SHARED);
        program.store(start, 1).unwrap();
        program.store(start + PAGE, 2).unwrap();
        assert!(mm.close(file.file));
        way(&program, start);
        assert!(provider.asked.load(Ordering::Relaxed) >= 2, "both pages");
        assert_eq!(mm.events().write_errors, 0);
    }
}

#[test]
fn who_closes_a_file_that_nobody_maps_writes_it() {
    let world = World::new();
    let mm = world.mm();
    let (provider, file) = file_of(world, mm, 2 * PAGE);
    while mm.write_file(file.file, PAGE, &[9; 8]).unwrap().bytes < 8 {}
    assert!(mm.close(file.file));
    assert_eq!(reopened(mm, provider, PAGE), 0x0909_0909_0909_0909);
}

#[test]
fn a_last_write_that_fails_is_counted() {
    let world = World::new();
    let mm = world.mm();
    let before = world.used_frames();
    let (provider, file) = file_of(world, mm, 2 * PAGE);
    let program = Program::new(mm);
    let start = program.map_file(file, 2, RW, MapFlags::SHARED);
    program.store(start, 1).unwrap();
    program.store(start + PAGE, 2).unwrap();
    assert!(mm.close(file.file));
    provider.image.fail_at(1);
    program.exit();
    assert_eq!(mm.events().write_errors, 1);
    assert_eq!(reopened(mm, provider, PAGE), 2, "the others are written");
    assert_eq!(world.used_frames(), before);
}

#[test]
fn bytes_beyond_the_end_do_not_come_back_when_a_file_grows() {
    let world = World::new();
    let mm = world.mm();
    let (provider, file) = file_of(world, mm, 100);
    let program = Program::new(mm);
    let start = program.map_file(file, 1, RW, MapFlags::SHARED);
    program.store(start + 8, 5).unwrap();
    program.store(start + 2000, 6).unwrap();
    program.space.msync(start, PAGE).unwrap();
    assert!(mm.close(file.file));
    program.exit();
    provider.size.store(PAGE, Ordering::SeqCst);
    assert_eq!(reopened(mm, provider, 8), 5);
    assert_eq!(reopened(mm, provider, 2000), 0);
}

#[test]
fn a_file_that_grows_shows_zeros_though_its_page_is_mapped() {
    let world = World::new();
    let mm = world.mm();
    let (provider, file) = file_of(world, mm, 100);
    let program = Program::new(mm);
    let start = program.map_file(file, 2, RW, MapFlags::SHARED);
    let other = program.map_file(file, 2, Prot::READ, MapFlags::PRIVATE);
    program.store(start + 8, 5).unwrap();
    program.store(start + 2000, 6).unwrap();
    provider.image.set_latency(3);
    provider.size.store(2 * PAGE, Ordering::SeqCst);
    mm.extend_file(file.file, 100).unwrap();
    for at in [start, other] {
        assert_eq!(program.load(at + 8), Ok(5));
        assert_eq!(program.load(at + 2000), Ok(0));
    }
    // What is written from now on is the file's.
    program.store(start + 3000, 7).unwrap();
    mm.sync_file(file.file).unwrap();
    assert!(mm.close(file.file));
    program.exit();
    assert_eq!(reopened(mm, provider, 2000), 0);
    assert_eq!(reopened(mm, provider, 3000), 7);
    // One that ended with a page has nothing behind its end.
    let (provider, file) = file_of(world, mm, PAGE);
    provider.size.store(2 * PAGE, Ordering::SeqCst);
    mm.extend_file(file.file, PAGE).unwrap();
    assert_eq!(mm.cached_pages(file.file), 0);
    assert!(mm.close(file.file));
    assert_eq!(
        mm.extend_file(file.file, 100),
        Err(kmem_cow_mm::Errno::EBADF)
    );
}

/// A file that others change, and this machine only reads.
struct ReadOnly(ChangingFile);

// SAFETY: W1 to W4: forwards to a file that keeps them.
unsafe impl PageProvider for ReadOnly {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.0.read(index, frame)
    }
    fn write(&self, _: u64, _: Frame) -> Result<IoState, IoError> {
        Err(IoError::ReadOnly)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.0.poll(ticket)
    }
}

/// What was zeroed behind an end that moved cannot be written, and so must not wait for that: it would stay for ever.
#[test]
fn a_page_that_the_end_of_a_read_only_file_moved_in_stays_clean() {
    let world = World::new();
    let mm = world.mm();
    let image = DiskImage::from_bytes(world.machine, &vec![7; 4 * PAGE as usize]);
    let size = AtomicU64::new(4 * PAGE);
    let provider: &'static ReadOnly = keep(Box::new(ReadOnly(ChangingFile { image, size })));
    let open = OpenFile {
        file: mm.open_file(provider, "/mnt/data", 0).unwrap(),
        readable: true,
        writable: false,
    };
    let program = Program::new(mm);
    let start = program.map_file(open, 4, Prot::READ, MapFlags::SHARED);
    for page in 0..4 {
        program.load(start + page * PAGE).unwrap();
    }
    let resize = |from: u64, to: u64| {
        provider.0.size.store(to, Ordering::SeqCst);
        match from > to {
            true => mm.truncate_file(open.file).unwrap(),
            false => mm.extend_file(open.file, from).unwrap(),
        }
    };
    resize(4 * PAGE, PAGE + 16);
    let sevens = 0x0707_0707_0707_0707;
    assert_eq!(program.load(start + PAGE), Ok(sevens));
    assert_eq!(program.load(start + PAGE + 16), Ok(0));
    assert!(program.load(start + 2 * PAGE).is_err());
    resize(PAGE + 16, 2 * PAGE);
    assert_eq!(program.load(start + PAGE + 16), Ok(0));
    // Nothing is to be written, and nothing failed.
    assert_eq!(mm.sync_file(open.file), Ok(()));
    assert_eq!(mm.meminfo().dirty, 0);
    assert_eq!(mm.events().write_errors, 0);
    assert_eq!(mm.cached_pages(open.file), 2);
    program.space.munmap(start, 4 * PAGE).unwrap();
    Reclaimer::new(Fifo).reclaim(mm, 64);
    assert_eq!(mm.cached_pages(open.file), 0, "it goes like any other");
    program.exit();
    assert!(mm.close(open.file));
}

/// Nobody opens such a file for writing in Linux (EROFS); whatever the mode says that a kernel hands in, what would be stored through a shared mapping
/// could never be written, and would stay in memory for ever.
#[test]
fn a_file_that_cannot_be_written_has_no_shared_mapping_that_can() {
    let world = World::new();
    let mm = world.mm();
    let image = DiskImage::from_bytes(world.machine, &vec![7; PAGE as usize]);
    let size = AtomicU64::new(PAGE);
    let provider: &'static ReadOnly = keep(Box::new(ReadOnly(ChangingFile { image, size })));
    let open = OpenFile {
        file: mm.open_file(provider, "/mnt/data", 0).unwrap(),
        readable: true,
        writable: true,
    };
    let program = Program::new(mm);
    let map = |prot, flags| {
        program.space.mmap(&MapRequest {
            flags,
            file: Some(open),
            ..MapRequest::anonymous(PAGE, prot)
        })
    };
    assert_eq!(map(RW, MapFlags::SHARED), Err(Errno::EACCES));
    let shared = map(Prot::READ, MapFlags::SHARED).unwrap().as_u64();
    let protected = program.space.mprotect(shared, PAGE, RW);
    assert_eq!(protected, Err(Errno::EACCES));
    let private = map(RW, MapFlags::PRIVATE).unwrap().as_u64();
    program.store(private, 5).unwrap();
    assert_eq!(program.load(shared), Ok(0x0707_0707_0707_0707));
    assert_eq!(mm.meminfo().dirty, 0);
    assert!(mm.close(open.file));
    program.exit();
}
