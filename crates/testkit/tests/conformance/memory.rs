//! `PhysMap`, `PageProvider`, `BlockDevice`, `UserAccess`.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use kmem_hal::{
    BlockDevice, Frame, FrameRange, IoError, IoState, IoTicket, OffsetMap, PageProvider, PhysAddr,
    PhysMap, UserAccess, UserFault, VirtAddr,
};
use kmem_testkit::Arena;
use kmem_testkit::conformance::user_access::UserAddresses;
use kmem_testkit::conformance::{Report, pages, phys_map, user_access};

use super::names;

fn run_map(map: &impl PhysMap, scratch: FrameRange) -> Report {
    let report = Report::new();
    // SAFETY: the scratch frames are the test's.
    unsafe { phys_map::check(&report, map, scratch) };
    report
}

#[test]
fn arena_and_offset_map_pass() {
    let arena = Arena::new(8);
    run_map(&arena, arena.range()).assert_ok();
    run_map(&&arena, arena.range()).assert_ok();
    let (offset, frames) = arena.offset();
    // SAFETY: the offset is right for the arena's frames, and no other is touched.
    let map = unsafe { OffsetMap::new(offset, frames) };
    run_map(&map, arena.range()).assert_ok();
}

struct BrokenMap<'a> {
    arena: &'a Arena,
    clause: &'static str,
    asked: AtomicU64,
}

// SAFETY: none: each value breaks the clause that it names, and the tests only look for that.
unsafe impl PhysMap for BrokenMap<'_> {
    fn reach(&self) -> FrameRange {
        let reach = self.arena.reach();
        match self.clause {
            "P4" if self.asked.fetch_add(1, Ordering::Relaxed) > 0 => {
                FrameRange::new(reach.first(), reach.count() - 1).unwrap()
            }
            _ => reach,
        }
    }
    fn to_ptr(&self, address: PhysAddr) -> *mut u8 {
        let address = match self.clause {
            // Frames in another order: reachable, not contiguous.
            "P1" => PhysAddr::new(address.as_u64() ^ 0x1000),
            // Two frames in one place.
            "P2" => PhysAddr::new(address.as_u64() & !0x1000),
            _ => address,
        };
        self.arena.to_ptr(address)
    }
    fn to_phys(&self, pointer: *const u8) -> PhysAddr {
        let address = self.arena.to_phys(pointer).as_u64();
        PhysAddr::new(match self.clause {
            "P1" => address ^ 0x1000,
            "P3" => address & !0xfff,
            _ => address,
        })
    }
    fn map_temporary(&self, frame: Frame) -> Option<std::ptr::NonNull<u8>> {
        let frame = if self.clause == "P5" {
            self.arena.frame(0)
        } else {
            frame
        };
        std::ptr::NonNull::new(self.arena.to_ptr(frame.start()))
    }
    unsafe fn zero(&self, range: FrameRange) {
        let bytes = (range.count() * 4096) as usize - usize::from(self.clause == "P6");
        // SAFETY: within the frames.
        unsafe { self.to_ptr(range.first().start()).write_bytes(0, bytes) }
    }
}

#[test]
fn broken_maps_are_named() {
    for clause in ["P1", "P2", "P3", "P4", "P5", "P6"] {
        let arena = Arena::new(8);
        let map = BrokenMap {
            arena: &arena,
            clause,
            asked: AtomicU64::new(0),
        };
        names(&run_map(&map, arena.range()), "PhysMap", clause);
    }
}

/// A file or disk in memory; with a delay, its I/O is done at the third question.
struct Ram<'a> {
    arena: &'a Arena,
    bytes: RefCell<Vec<u8>>,
    clause: &'static str,
    delay: u64,
    questions: AtomicU64,
    last_read: RefCell<Option<Frame>>,
}

impl<'a> Ram<'a> {
    fn new(arena: &'a Arena, size: usize, clause: &'static str, delay: u64) -> Self {
        Self {
            arena,
            bytes: RefCell::new((0..size).map(|at| at as u8 | 1).collect()),
            clause,
            delay,
            questions: AtomicU64::new(0),
            last_read: RefCell::new(None),
        }
    }

    fn state(&self) -> IoState {
        if self.delay == 0 {
            return IoState::Done;
        }
        self.questions.store(self.delay, Ordering::Relaxed);
        IoState::Pending(IoTicket(1))
    }

    fn range(&self, page: u64) -> Result<std::ops::Range<usize>, IoError> {
        let start = page as usize * 4096;
        let end = self.bytes.borrow().len();
        if start >= end {
            return Err(IoError::OutOfRange);
        }
        Ok(start..end.min(start + 4096))
    }

    fn load(&self, page: u64, frame: Frame) -> Result<IoState, IoError> {
        let range = self.range(page)?;
        let bytes = self.bytes.borrow();
        let target = self.arena.to_ptr(frame.start());
        // SAFETY: the check owns the frame; W1 gives it to us until we are done.
        unsafe {
            if self.clause != "W2" {
                target.write_bytes(0, 4096);
            }
            target.copy_from_nonoverlapping(bytes[range.clone()].as_ptr(), range.len());
        }
        if let ("W1", Some(old)) = (self.clause, self.last_read.replace(Some(frame))) {
            // SAFETY: none: a frame that is not ours any more.
            unsafe { *self.arena.to_ptr(old.start()).add(100) = 0xdd };
        }
        Ok(self.state())
    }

    fn store(&self, page: u64, frame: Frame) -> Result<IoState, IoError> {
        let range = self.range(page)?;
        let refused = match self.clause {
            "read-only" | "W4 silent" => true,
            "W4 first" => page == 0,
            _ => false,
        };
        if refused {
            return Err(IoError::ReadOnly);
        }
        let source = self.arena.to_ptr(frame.start());
        let mut bytes = self.bytes.borrow_mut();
        for (at, byte) in bytes[range].iter_mut().enumerate() {
            if self.clause == "W3" && at == 77 {
                continue;
            }
            // SAFETY: the check owns the frame.
            *byte = unsafe { *source.add(at) };
        }
        Ok(self.state())
    }

    fn ask(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        match self.questions.load(Ordering::Relaxed) {
            0 => Err(IoError::UnknownTicket),
            1 => {
                self.questions.store(0, Ordering::Relaxed);
                Ok(IoState::Done)
            }
            n => {
                self.questions.store(n - 1, Ordering::Relaxed);
                Ok(IoState::Pending(ticket))
            }
        }
    }
}

// SAFETY: W1 to W4, except for the clause that a value is made to break.
unsafe impl PageProvider for Ram<'_> {
    fn size(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }
    fn is_read_only(&self) -> bool {
        matches!(self.clause, "read-only" | "W4 first" | "W4 lies")
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.load(index, frame)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.store(index, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.ask(ticket)
    }
}

// SAFETY: as above.
unsafe impl BlockDevice for Ram<'_> {
    fn blocks(&self) -> u64 {
        self.bytes.borrow().len() as u64 / 4096
    }
    fn read(&self, block: u64, frame: Frame) -> Result<IoState, IoError> {
        self.load(block, frame)
    }
    fn write(&self, block: u64, frame: Frame) -> Result<IoState, IoError> {
        self.store(block, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.ask(ticket)
    }
}

fn run_pages(clause: &'static str, delay: u64) -> (Report, Report) {
    let arena = Arena::new(2);
    let frames = [arena.frame(0), arena.frame(1)];
    let (files, disks) = (Report::new(), Report::new());
    let file = Ram::new(&arena, 2 * 4096 + 1000, clause, delay);
    let disk = Ram::new(&arena, 3 * 4096, clause, delay);
    // SAFETY: both frames are the test's.
    unsafe {
        pages::check_provider(&files, &file, &arena, frames, &|| {});
        pages::check_device(&disks, &disk, &arena, frames, &|| {});
    }
    (files, disks)
}

#[test]
fn files_and_disks_pass_at_once_and_later() {
    for delay in [0, 3] {
        let (files, disks) = run_pages("", delay);
        files.assert_ok();
        disks.assert_ok();
        run_pages("read-only", delay).0.assert_ok();
    }
}

#[test]
fn broken_files_and_disks_are_named() {
    for clause in ["W1", "W2", "W3"] {
        let (files, disks) = run_pages(clause, 0);
        names(&files, "PageProvider", clause);
        if clause != "W2" {
            // A disk's blocks are whole: there is no end to leave out.
            names(&disks, "BlockDevice", clause);
        }
    }
    // It says that it can be written, or that it cannot, and all or a part of it is otherwise.
    for lie in ["W4 silent", "W4 lies", "W4 first"] {
        names(&run_pages(lie, 0).0, "PageProvider", "W4");
    }
}

/// User memory at 0x1000 (writable) and 0x3000 (read-only), a kernel's at 0x8000.
struct Users {
    memory: RefCell<Vec<u8>>,
    clause: &'static str,
}

impl Users {
    fn new(clause: &'static str) -> Self {
        Self {
            memory: RefCell::new(vec![0; 0x9000]),
            clause,
        }
    }

    fn allowed(&self, address: u64, write: bool) -> bool {
        match address {
            0x1000..0x2000 => true,
            0x3000..0x4000 => !write || self.clause == "U1 write",
            0x8000..0x9000 => self.clause == "U1 kernel",
            _ => false,
        }
    }

    fn copy(
        &self,
        address: VirtAddr,
        count: usize,
        write: bool,
        mut byte: impl FnMut(usize, &mut u8),
    ) -> Result<(), UserFault> {
        let mut memory = self.memory.borrow_mut();
        for at in 0..count {
            let address = address.as_u64() + at as u64;
            if !self.allowed(address, write) {
                return match self.clause {
                    "U2 lies" => Ok(()),
                    "U2 counts" => Err(UserFault {
                        address: VirtAddr::new(address),
                        copied: 0,
                    }),
                    _ => Err(UserFault {
                        address: VirtAddr::new(address),
                        copied: at,
                    }),
                };
            }
            byte(at, &mut memory[address as usize]);
        }
        Ok(())
    }
}

// SAFETY: U1 and U2, except for what a value is made to break.
unsafe impl UserAccess for Users {
    fn copy_from_user(&self, to: &mut [u8], from: VirtAddr) -> Result<(), UserFault> {
        self.copy(from, to.len(), false, |at, byte| to[at] = *byte)
    }
    fn copy_to_user(&self, to: VirtAddr, from: &[u8]) -> Result<(), UserFault> {
        self.copy(to, from.len(), true, |at, byte| *byte = from[at])
    }
}

#[test]
fn user_access_passes_and_broken_ones_are_named() {
    let addresses = UserAddresses {
        end_of_writable: VirtAddr::new(0x2000),
        read_only: Some(VirtAddr::new(0x3000)),
        kernel: Some(VirtAddr::new(0x8000)),
    };
    for clause in ["", "U1 write", "U1 kernel", "U2 lies", "U2 counts"] {
        let report = Report::new();
        user_access::check(&report, &Users::new(clause), &addresses);
        match clause.get(..2) {
            None => report.assert_ok(),
            Some(label) => names(&report, "UserAccess", label),
        }
    }
}
